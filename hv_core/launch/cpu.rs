// SPDX-License-Identifier: GPL-2.0
//! Entering the image and leaving it, on the CPU this runs on.

use core::arch::asm;
use core::ffi::c_void;

use kernel::prelude::*;

use crate::abi::boot::{CpuArea, ImageHeader, Vendor};
use crate::abi::hypercall::{private, Control};
use crate::abi::layout::{cpu_block, cpu_page, selector, IMAGE_BASE, PAGE_SIZE};
use crate::abi::status::HvStatus;
use crate::launch::load::{CpuBlock, Loaded};
use crate::sys;
use crate::x86::regs::{cr4, efer, msr};
use crate::x86::root::{fill_vmcb, segment, write_vmcs, VmxControls, VmxHost};
use crate::x86::state::{CpuState, Segment, Table};
use crate::x86::vmcb::Vmcb;
use crate::x86::vmcs::field;

/// Where a launch may be made to fail (module parameter `fail_step`). Each step stands for what can go
/// wrong there.
pub(crate) mod step {
    /// Before anything is changed.
    pub(crate) const PREPARE: u32 = 1;
    /// The extension is on, its control structure not yet active (VMXON refused).
    pub(crate) const ENABLE: u32 = 2;
    /// The processor refuses the entry at its checks of the controls (VT-x: VMfail; AMD-V: invalid).
    pub(crate) const ENTER_CONTROLS: u32 = 3;
    /// The processor refuses the guest state (VT-x: exit 33 with entry failure; AMD-V: invalid).
    pub(crate) const ENTER_STATE: u32 = 4;
    /// The CPU is in but does not prove it.
    pub(crate) const PROVE: u32 = 5;
    /// All CPUs are in, what follows the launch fails.
    pub(crate) const FINISH: u32 = 6;
}

/// Executes CPUID.
pub(crate) fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    // SAFETY: every x86-64 processor has CPUID.
    let r = unsafe { core::arch::x86_64::__cpuid_count(leaf, subleaf) };
    [r.eax, r.ebx, r.ecx, r.edx]
}

macro_rules! read_register {
    ($($(#[$doc:meta])* $name:ident: $register:literal;)*) => {$(
        $(#[$doc])*
        pub(crate) fn $name() -> u64 {
            let value;
            // SAFETY: reads a register at CPL 0.
            unsafe { asm!(concat!("mov {}, ", $register), out(reg) value, options(nomem, nostack)) };
            value
        }
    )*};
}

read_register! {
    /// CR0.
    read_cr0: "cr0";
    /// CR2.
    read_cr2: "cr2";
    /// CR3.
    read_cr3: "cr3";
    /// CR4.
    read_cr4: "cr4";
    /// DR6.
    read_dr6: "dr6";
    /// DR7.
    read_dr7: "dr7";
    /// ES.
    read_es: "es";
    /// CS.
    read_cs: "cs";
    /// SS.
    read_ss: "ss";
    /// DS.
    read_ds: "ds";
    /// FS selector.
    read_fs: "fs";
    /// GS selector.
    read_gs: "gs";
}

/// XCR0.
pub(crate) fn read_xcr0() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: every processor with the extension has XSAVE, and Linux sets CR4.OSXSAVE.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack))
    };
    u64::from(high) << 32 | u64::from(low)
}

/// TR.
pub(crate) fn task_register() -> u16 {
    let value: u16;
    // SAFETY: reads a register.
    unsafe { asm!("str {:x}", out(reg) value, options(nomem, nostack)) };
    value
}

fn local_descriptor_table() -> u16 {
    let value: u16;
    // SAFETY: reads a register.
    unsafe { asm!("sldt {:x}", out(reg) value, options(nomem, nostack)) };
    value
}

fn tables() -> (Table, Table) {
    #[repr(C, packed)]
    #[derive(Default)]
    struct Register {
        limit: u16,
        base: u64,
    }
    let (mut gdt, mut idt) = (Register::default(), Register::default());
    // SAFETY: stores two registers into memory of ours.
    unsafe {
        asm!("sgdt [{}]", in(reg) &raw mut gdt, options(nostack));
        asm!("sidt [{}]", in(reg) &raw mut idt, options(nostack));
    }
    (
        Table {
            base: gdt.base,
            limit: gdt.limit,
        },
        Table {
            base: idt.base,
            limit: idt.limit,
        },
    )
}

/// Captures the state of this CPU. Interrupts are off.
fn capture() -> CpuState {
    let (gdtr, idtr) = tables();
    let descriptor = |selector: u16, system| -> Segment {
        segment(selector, gdtr.limit, system, |offset| {
            // SAFETY: `segment` asks only for offsets inside the limit of the live GDT.
            unsafe {
                (gdtr.base as *const u8)
                    .add(offset.into())
                    .cast::<u64>()
                    .read_unaligned()
            }
        })
    };
    let read = |number| sys::rdmsr(number).unwrap_or(0);
    let cr4_value = read_cr4();
    let cet = |number| {
        if cr4_value & cr4::CET != 0 {
            read(number)
        } else {
            0
        }
    };
    CpuState {
        cr0: read_cr0(),
        cr2: read_cr2(),
        cr3: read_cr3(),
        cr4: cr4_value,
        dr6: read_dr6(),
        dr7: read_dr7(),
        efer: read(msr::EFER),
        pat: read(msr::PAT),
        debugctl: read(msr::DEBUGCTL),
        sysenter_cs: read(msr::SYSENTER_CS),
        sysenter_esp: read(msr::SYSENTER_ESP),
        sysenter_eip: read(msr::SYSENTER_EIP),
        fs_base: read(msr::FS_BASE),
        gs_base: read(msr::GS_BASE),
        s_cet: cet(msr::S_CET),
        ssp_table: cet(msr::SSP_TABLE),
        cs: descriptor(read_cs() as u16, false),
        ss: descriptor(read_ss() as u16, false),
        ds: descriptor(read_ds() as u16, false),
        es: descriptor(read_es() as u16, false),
        fs: descriptor(read_fs() as u16, false),
        gs: descriptor(read_gs() as u16, false),
        ldtr: descriptor(local_descriptor_table(), true),
        tr: descriptor(task_register(), true),
        gdtr,
        idtr,
    }
}

/// A hypercall with its parameters in registers, in the TLFS convention: status and value.
pub(crate) fn hypercall(vendor: Vendor, code: u16, input: u64) -> (HvStatus, u64) {
    let control = Control::simple(code, true).0;
    let answer = match vendor {
        Vendor::Vmx => sys::vmcall(control, input, 0),
        Vendor::Svm => sys::vmmcall(control, input, 0),
    };
    (HvStatus(answer.result as u16), answer.value)
}

/// Takes this CPU beneath the image. Interrupts are off. On an error the CPU is native as before.
///
/// `fail` names the step that a test wants to fail, or is 0.
pub(crate) fn enter(image: &Loaded, block: &CpuBlock, fail: u32) -> Result {
    if fail == step::PREPARE {
        return Err(EIO);
    }
    let state = capture();
    block.reset();
    match image.vendor() {
        Vendor::Vmx => enter_vmx(image, block, &state, fail)?,
        Vendor::Svm => enter_svm(image, block, &state, fail)?,
    }
    let (status, cpu) = hypercall(image.vendor(), private::PROVE, 0);
    if status.is_success() && cpu == u64::from(block.cpu()) && fail != step::PROVE {
        return Ok(());
    }
    leave(image);
    Err(EIO)
}

/// Brings this CPU back to native operation. Interrupts are off. Does nothing on a CPU that is native.
pub(crate) fn leave(image: &Loaded) {
    // A native CPU answers "undefined instruction", which the call turns into a status.
    let _ = hypercall(image.vendor(), private::LEAVE, 0);
    if image.vendor() == Vendor::Svm {
        // SAFETY: EFER.SVME is clear, nothing uses the area any more.
        let _ = unsafe { sys::wrmsr(msr::VM_HSAVE_PA, 0) };
    }
}

fn write_cr4(value: u64) {
    // SAFETY: the callers change CR4.VMXE only, behind the back of Linux' shadow on purpose: Linux must
    // not learn of it, and the bit is clear again whenever Linux compares.
    unsafe { asm!("mov cr4, {}", in(reg) value, options(nostack)) };
}

fn vmwrite(number: u32, value: u64) {
    // SAFETY: the caller loaded a VMCS; a wrong field or value is found at the entry.
    unsafe { asm!("vmwrite {}, {}", in(reg) u64::from(number), in(reg) value, options(nostack)) };
}

/// Executes a VMX instruction with a physical address; false if it failed (SDM 31.2).
macro_rules! vmx_instruction {
    ($instruction:literal, $address:expr) => {{
        let address: u64 = $address;
        let failed: u8;
        // SAFETY: VMX operation is entered or on; the address is that of a page of this CPU's block.
        unsafe {
            asm!(concat!($instruction, " [{}]"), "setbe {}", in(reg) &raw const address,
                lateout(reg_byte) failed, options(nostack));
        }
        failed == 0
    }};
}

fn vmxoff() {
    // SAFETY: VMX operation is on, on this CPU, by us.
    unsafe { asm!("vmxoff", options(nostack)) };
}

fn enter_vmx(image: &Loaded, block: &CpuBlock, state: &CpuState, fail: u32) -> Result {
    let facts = image.facts();
    let revision = facts.vmx.basic as u32 & 0x7fff_ffff;
    let cr4_native = state.cr4;
    write_cr4(cr4_native | cr4::VMXE);
    let vmxon = block.page_spa(cpu_block::HOST_SAVE);
    let vmcs = block.page_spa(cpu_block::ROOT_CONTROL);
    for page in [cpu_block::HOST_SAVE, cpu_block::ROOT_CONTROL] {
        // SAFETY: a page of this CPU's block; the image does not use it before the launch.
        unsafe { block.page(page).cast::<u32>().write(revision) };
    }
    let on = fail != step::ENABLE && vmx_instruction!("vmxon", vmxon);
    if !on {
        write_cr4(cr4_native);
        pr_err!("cpu {}: VMXON failed\n", block.cpu());
        return Err(EIO);
    }
    let refused = |what: u64| {
        vmxoff();
        write_cr4(cr4_native);
        pr_err!("cpu {}: VT-x launch refused ({what})\n", block.cpu());
        Err(EIO)
    };
    if !vmx_instruction!("vmclear", vmcs) || !vmx_instruction!("vmptrld", vmcs) {
        return refused(0);
    }
    let header = image.header();
    let controls = VmxControls::root(&facts.vmx, facts.instructions());
    let cpu = block.cpu() as usize;
    let area = cpu_page(cpu, cpu_block::AREA);
    let host = VmxHost {
        cr3: image.host_cr3(),
        rip: header.vmx_exit,
        rsp: stack_top(cpu),
        gdt: area + core::mem::offset_of!(CpuArea, gdt) as u64,
        idt: IMAGE_BASE + header.idt,
        tss: area + core::mem::offset_of!(CpuArea, tss) as u64,
        area,
        code: selector::CODE,
        data: selector::DATA,
        task: selector::TSS,
        eptp: image.eptp(),
        msr_bitmap: image.msr_bitmap(),
    };
    write_vmcs(state, &controls, &host, &mut vmwrite);
    block.set_vmx_controls(controls.processor);
    match fail {
        step::ENTER_CONTROLS => vmwrite(field::VPID, 0),
        step::ENTER_STATE => vmwrite(field::LINK_POINTER, 0),
        _ => {}
    }
    flush_all();
    // SAFETY: the VMCS is current and complete; the function returns from the guest, or on failure.
    match unsafe { sys::hv_vmx_launch() } {
        0 => Ok(()),
        failure => {
            let mut error = 0u64;
            // SAFETY: reads a field of the current VMCS; without one the value stays 0.
            unsafe {
                asm!("vmread {}, {}", inout(reg) error, in(reg) u64::from(field::INSTRUCTION_ERROR),
                    options(nostack));
            }
            refused(failure as u64 * 1000 + error)
        }
    }
}

/// Drops all EPT and VPID translations of this CPU: earlier hypervisors may have left some.
fn flush_all() {
    let descriptor = [0u64; 2];
    // SAFETY: preflight checked both instructions with the all-context type.
    unsafe {
        asm!("invept {0}, [{1}]", in(reg) 2u64, in(reg) &raw const descriptor, options(nostack));
        asm!("invvpid {0}, [{1}]", in(reg) 2u64, in(reg) &raw const descriptor, options(nostack));
    }
}

/// HOST_RSP: the word at the top of the stack holds the address of the area, and the stack stays
/// aligned for the calls of the entry code.
pub(crate) fn stack_top(cpu: usize) -> u64 {
    cpu_page(cpu, cpu_block::STACK + cpu_block::STACK_PAGES) - 16
}

fn enter_svm(image: &Loaded, block: &CpuBlock, state: &CpuState, fail: u32) -> Result {
    let control = block.page(cpu_block::ROOT_CONTROL);
    let vmcb_spa = block.page_spa(cpu_block::ROOT_CONTROL);
    // SAFETY: a zeroed page of this CPU's block, aligned; all-zero is a valid `Vmcb`.
    let vmcb = unsafe { &mut *control.cast::<Vmcb>() };
    fill_vmcb(state, image.root_slat(), image.msrpm(), image.iopm(), vmcb);
    if fail == step::ENABLE {
        return Err(EIO);
    }
    // SAFETY: preflight found the extension enabled by firmware and not in use; the area is a page of ours.
    // Linux never looks at the two MSRs but to use the extension itself, which preflight excludes.
    unsafe {
        sys::wrmsr(msr::VM_HSAVE_PA, block.page_spa(cpu_block::HOST_SAVE))?;
        sys::wrmsr(msr::EFER, state.efer | efer::SVME)?;
    }
    // SAFETY: EFER.SVME is set; the address is that of the VMCB page.
    unsafe { asm!("vmsave rax", in("rax") vmcb_spa, options(nostack)) };
    match fail {
        step::ENTER_CONTROLS => vmcb.asid = 0,
        step::ENTER_STATE => vmcb.efer &= !efer::SVME,
        _ => {}
    }
    let area = cpu_page(block.cpu() as usize, cpu_block::AREA);
    let vmcb: *mut c_void = control.cast();
    let frame = block.prepare_leave(state);
    // SAFETY: the VMCB is complete, the trampoline and the image are mapped by the image's tables, and
    // interrupts are off. Returns from the guest, or natively if the entry was refused.
    unsafe {
        sys::hv_svm_enter(
            vmcb,
            image.header().svm_start,
            image.host_cr3(),
            area,
            frame.cast(),
        )
    };
    Ok(())
}

const _: () = assert!(PAGE_SIZE == 4096 && size_of::<ImageHeader>() == 80);
