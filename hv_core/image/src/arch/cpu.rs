// SPDX-License-Identifier: GPL-2.0
//! Instructions that both back ends execute.

use core::arch::asm;
use core::sync::atomic::Ordering;

use hv_abi::boot::{CpuArea, LeaveFrame, TableRegister, Vendor};
use hv_abi::layout::{cpu_block, stats_page, PAGE_SIZE};
use hv_abi::stats::StatsPage;
use hv_x86::regs::cr4;

use crate::arch::gpr;
use crate::header::boot;
use crate::root::RootCpu;

/// Executes CPUID.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let (a, b, c, d): (u32, u64, u32, u32);
    // SAFETY: CPUID changes only the four registers; RBX is saved because LLVM reserves it.
    unsafe {
        asm!("xchg {b:r}, rbx", "cpuid", "xchg {b:r}, rbx", b = inout(reg) 0u64 => b,
            inout("eax") leaf => a, inout("ecx") subleaf => c, out("edx") d, options(nomem, nostack));
    }
    [a, b as u32, c, d]
}

/// Reads an MSR that the caller knows to exist.
pub fn rdmsr(number: u32) -> u64 {
    if cfg!(not(target_os = "none")) {
        return 0;
    }
    let (low, high): (u32, u32);
    // SAFETY: the callers name MSRs that every processor with the vendor's extension has.
    unsafe {
        asm!("rdmsr", in("ecx") number, out("eax") low, out("edx") high, options(nomem, nostack))
    };
    u64::from(high) << 32 | u64::from(low)
}

/// Writes an MSR.
///
/// # Safety
/// The MSR must exist, accept the value, and the image must be able to go on with it.
pub unsafe fn wrmsr(number: u32, value: u64) {
    // SAFETY: by the caller's promise.
    unsafe {
        asm!("wrmsr", in("ecx") number, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nostack));
    }
}

/// Executes XSETBV for XCR0.
pub fn xsetbv(value: u64) {
    // SAFETY: the caller validated the value against CPUID; the image itself uses no extended state. The
    // image's CR4.OSXSAVE is Linux' one, which is set when the root's XSETBV got as far as an exit.
    unsafe {
        asm!("xsetbv", in("ecx") 0, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nomem, nostack));
    }
}

/// Writes back and invalidates the caches.
pub fn wbinvd() {
    // SAFETY: WBINVD loses nothing.
    unsafe { asm!("wbinvd", options(nostack)) };
}

/// Resets the machine through the reset control register of the chipset (port cf9h), which is what a
/// triple fault would have done, and waits.
pub fn reset() -> ! {
    // SAFETY: the machine is to be reset; nothing runs after.
    unsafe {
        asm!("out dx, al", in("dx") 0xcf9u16, in("al") 2u8, options(nomem, nostack));
        asm!("out dx, al", in("dx") 0xcf9u16, in("al") 6u8, options(nomem, nostack));
        loop {
            asm!("pause", options(nomem, nostack));
        }
    }
}

/// Provokes the fault that `private::FAULT` names.
pub fn fault(how: u64) {
    use hv_abi::hypercall::fault;
    match how {
        fault::GENERAL_PROTECTION => {
            // SAFETY: a test asked for the fault: the address is not canonical.
            unsafe {
                asm!("mov {0}, [{0}]", inout(reg) 0x8000_0000_0000_0000u64 => _, options(readonly))
            }
        }
        fault::PAGE_FAULT => {
            // SAFETY: a test asked for the fault: the image maps nothing there.
            unsafe { asm!("mov {0}, [{0}]", inout(reg) 0x1000u64 => _, options(readonly)) }
        }
        fault::PANIC => panic!("provoked by a test"),
        fault::MACHINE_CHECK if boot().vendor == Vendor::Vmx => {
            // SAFETY: a test asked for it; `vmx::pass_machine_check` lets it return.
            unsafe { asm!("int 18") }
        }
        _ => {}
    }
}

/// The statistics of the CPU that owns `area`.
fn stats(area: &CpuArea) -> &'static StatsPage {
    // SAFETY: the loader maps one page per CPU there, for as long as the image runs; all fields are atomics.
    unsafe { &*(stats_page(area.cpu as usize) as *const StatsPage) }
}

/// What exits of the root need to know.
pub fn root_cpu(area: &CpuArea) -> RootCpu<'static> {
    RootCpu {
        cpu: area.cpu,
        allow_fault: boot().allow_fault != 0,
        stats: stats(area),
    }
}

/// CR3 with which a CPU can leave: the root's, or if that is the page table of a user program which does not map
/// the kernel (page-table isolation), the kernel's table of the same program. There user pages are not executable:
/// the program takes a page fault at once, which Linux finds spurious and returns from with the right table.
pub fn leave_cr3(cr3: u64, cpl: u8) -> u64 {
    if cpl == 0 {
        cr3
    } else {
        cr3 & !boot().user_cr3_bits
    }
}

/// Ends a leave: native state comes from `area.leave`, general registers from the root's context, and
/// the module's trampoline does the rest on Linux' page tables.
///
/// # Safety
/// The frame must hold the root's native state, the back end must have switched the extension off as far
/// as it can (VT-x: VMXOFF done; AMD-V: GIF clear), and CR3 in the frame must map the kernel (see
/// [`leave_cr3`]).
pub unsafe fn finish_leave(area: &mut CpuArea) -> ! {
    const ORDER: [usize; 15] = [
        15,
        14,
        13,
        12,
        11,
        10,
        9,
        gpr::R8,
        7,
        6,
        5,
        gpr::RBX,
        gpr::RDX,
        gpr::RCX,
        gpr::RAX,
    ];
    let info = boot();
    for (slot, register) in area.leave.gprs.iter_mut().zip(ORDER) {
        *slot = area.root.gprs.get(register).copied().unwrap_or(0);
    }
    let frame = &raw const area.leave as u64 - area.self_address
        + area.block_spa
        + cpu_block::AREA as u64 * PAGE_SIZE
        + info.linux_direct_map;
    let copy = frame + core::mem::offset_of!(LeaveFrame, copy_gdt) as u64;
    area.leave.copy_gdtr = TableRegister::new(copy, size_of::<[u64; 16]>() as u16 - 1);
    if area.state == hv_abi::boot::cpu_state::FAULTED {
        stats(area).faults.fetch_add(1, Ordering::Release);
    } else {
        area.state = hv_abi::boot::cpu_state::NATIVE;
    }
    // SAFETY: the trampoline is mapped here and in Linux at the same address; the registers are its
    // contract (see its file). It does not return.
    unsafe {
        asm!("jmp {target}", target = in(reg) info.leave_trampoline, in("rdi") frame,
            in("rsi") area.leave.cr3, in("rdx") area.leave.cr4 & !cr4::PGE, in("rcx") area.leave.cr0,
            options(noreturn));
    }
}

/// Sends an NMI to this CPU. While NMIs are blocked it stays pending: until the root is entered, which takes it.
pub fn resend_nmi(cpu: u32) {
    const NMI_TO_PHYSICAL: u32 = 0x4400;
    // SAFETY: the area of the CPU that runs this.
    let area =
        unsafe { &*(hv_abi::layout::cpu_page(cpu as usize, cpu_block::AREA) as *const CpuArea) };
    if area.x2apic != 0 {
        // SAFETY: the APIC is in x2APIC mode; the command names this CPU.
        unsafe {
            wrmsr(
                hv_x86::regs::msr::X2APIC_ICR,
                u64::from(area.apic_id) << 32 | u64::from(NMI_TO_PHYSICAL),
            );
        }
        return;
    }
    let register = |offset: u64| (hv_abi::layout::APIC_PAGE + offset) as *mut u32;
    // SAFETY: the loader mapped the APIC page there, uncached; the destination half that Linux may have written
    // is put back.
    unsafe {
        let destination = register(0x310).read_volatile();
        register(0x310).write_volatile(area.apic_id << 24);
        register(0x300).write_volatile(NMI_TO_PHYSICAL);
        while register(0x300).read_volatile() & 1 << 12 != 0 {
            core::hint::spin_loop();
        }
        register(0x310).write_volatile(destination);
    }
}
