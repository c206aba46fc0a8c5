// SPDX-License-Identifier: GPL-2.0
//! VT-x back end (SDM vol. 3 chapters 25-30).

use core::arch::{asm, global_asm};

use hv_abi::boot::{BootInfo, CpuArea, TableRegister, VpContext};
use hv_abi::hypercall::{private, Control, DispatchEvent};
use hv_abi::layout::{stats_page, APIC_PAGE};
use hv_abi::stats::StatsPage;
use hv_abi::status::HvStatus;
use hv_x86::regs::{cr0, cr4, efer, msr, rflags};
use hv_x86::state::Segment;
use hv_x86::vmcs::{entry_control, field, reason, ENTRY_FAILED};

use super::dispatch::{self, WorldSwitch};
use super::{cpu, gpr, switch, ChildHardware, Exception, Exit, Processor, Work};
use crate::child::exception;
use crate::header::boot;
use crate::hypercall::Call;
use crate::vp::VpCore;
use crate::{log, root};

global_asm!(include_str!("entry.S"), apic_page = const APIC_PAGE,
    nmis = const stats_page(0) + core::mem::offset_of!(StatsPage, host_nmis) as u64);

/// Event to inject at the next entry: valid, hardware exception, with error code (SDM 26.8.3).
const INJECT_UD: u64 = 1 << 31 | 3 << 8 | 6;
const INJECT_GP: u64 = 1 << 31 | 3 << 8 | 1 << 11 | 13;
/// Control word of the call that resumes a paused VP, and the length of its instruction.
const RESUME: u64 = Control::simple(private::RESUME_VP, true).0;
const VMCALL_LENGTH: u64 = 3;
const INJECT_MC: u64 = 1 << 31 | 3 << 8 | exception::MACHINE_CHECK as u64;
/// IA32_MCG_STATUS: the interrupted code can go on; the check is about the instruction there; a check is in progress (SDM 17.3.1.2).
const MCG_RIPV: u64 = 1;
const MCG_EIPV: u64 = 2;
const MCG_MCIP: u64 = 4;
/// Interruptibility: blocking by STI or by MOV SS (SDM table 26-3).
const BLOCKING_STI_MOVSS: u64 = 3;
/// Pending debug exceptions: single step (SDM table 26-4).
const PENDING_SINGLE_STEP: u64 = 1 << 14;
/// Activity state: wait for SIPI (SDM 26.4.2).
const WAIT_FOR_SIPI: u64 = 3;

fn read(field: u32) -> u64 {
    let value;
    // SAFETY: a VMCS is current whenever this code runs; a field that does not exist leaves the register
    // as it was, zero.
    unsafe {
        asm!("vmread {0}, {1}", inout(reg) 0u64 => value, in(reg) u64::from(field), options(nostack))
    };
    value
}

/// The same of a field that every processor has: one instruction less on the way of a quick exit.
#[inline(always)]
fn read_known(field: u32) -> u64 {
    let value;
    // SAFETY: a VMCS is current whenever this code runs and the field exists, so the register is written.
    unsafe { asm!("vmread {0}, {1}", out(reg) value, in(reg) u64::from(field), options(nostack)) };
    value
}

fn write(field: u32, value: u64) {
    // SAFETY: a VMCS is current; the fields written here exist on every processor that passed preflight,
    // and a wrong value is found by the entry checks, not here.
    unsafe { asm!("vmwrite {0}, {1}", in(reg) u64::from(field), in(reg) value, options(nostack)) };
}

/// INVEPT, single context (SDM 32.3).
fn invept(eptp: u64) {
    let descriptor = [eptp, 0u64];
    // SAFETY: preflight checked that the processor has the type; it only drops cached translations.
    unsafe { asm!("invept {0}, [{1}]", in(reg) 1u64, in(reg) &descriptor, options(nostack)) };
}

/// A CPU at an exit, with its current VMCS.
struct Vmx<'a> {
    area: &'a mut CpuArea,
}

/// Called by `vmx_exit`. Returns the context to resume and whether to use VMLAUNCH.
#[repr(C)]
struct Resume {
    context: *const VpContext,
    launch: u64,
}

mod child;

/// The switch between root and child of VT-x.
struct Switch;

/// Makes the root's VMCS current.
#[inline(always)]
fn open_root(area: &mut CpuArea) {
    child::load_vmcs(area.root.control_spa);
    if core::mem::take(&mut area.machine_check) != 0 {
        write(field::ENTRY_INTERRUPTION, INJECT_MC);
    }
}

impl WorldSwitch for Switch {
    type Hardware = child::VmxChild;
    const IN_REGISTERS: bool = true;
    const PORTS_FIRST: bool = false;

    fn open(
        area: &mut CpuArea,
        info: &'static BootInfo,
        core: &mut VpCore,
        slat: u64,
    ) -> Self::Hardware {
        child::VmxChild::open(area, info, core, slat)
    }

    fn current(info: &'static BootInfo, _: &VpCore) -> Self::Hardware {
        child::VmxChild { info }
    }

    fn close(area: &mut CpuArea, core: &VpCore) {
        child::clear_vmcs(core.control);
        open_root(area);
    }

    fn keep_root(_: &mut CpuArea, core: &mut VpCore) {
        child::keep_msrs(core);
    }

    fn to_child(_: &mut CpuArea, core: &mut VpCore) {
        child::msrs_to_child(core);
    }

    fn to_root(area: &mut CpuArea, core: &mut VpCore) {
        child::msrs_to_root(core);
        Self::close(area, core);
    }

    /// The VMCS of the child stays active: no other CPU gets it before `end_pause`.
    fn pause(area: &mut CpuArea, _: &mut VpCore) {
        open_root(area);
    }

    fn resume(_: &mut CpuArea, core: &mut VpCore) {
        child::load_vmcs(core.control);
    }

    fn end_pause(area: &mut CpuArea, core: &mut VpCore) {
        Self::to_root(area, core);
    }

    fn root_is_traced(_: &CpuArea) -> bool {
        read(field::GUEST_DR7) & 0xff != 0 || read(field::GUEST_RFLAGS) & rflags::TF != 0
    }

    fn rescue_root(area: &mut CpuArea, core: &VpCore) {
        child::rescue_msrs(core);
        Self::close(area, core);
    }

    fn set_result(area: &mut CpuArea, rax: u64) {
        area.root.gprs[gpr::RAX] = rax;
    }
}

/// Brings the registers of a VP that this CPU owns out of its VMCS. The root's is current before and after.
fn pull(area_root: u64, core: &mut VpCore) {
    if core.in_hardware {
        child::load_vmcs(core.control);
        child::VmxChild { info: boot() }.store(core);
        child::clear_vmcs(core.control);
        child::load_vmcs(area_root);
        core.in_hardware = false;
    }
}

#[no_mangle]
extern "C" fn vmx_handle_exit(area: &mut CpuArea) -> Resume {
    let root = &raw const area.root as u64;
    if area.current != root {
        let context = dispatch::child_exit::<Switch>(area);
        return Resume { context, launch: 0 };
    }
    if area.extended == 0 {
        return root_exit(area);
    }
    let resumes = area.root.gprs[gpr::RCX] == RESUME
        && read_known(field::EXIT_REASON) as u32 == reason::VMCALL
        && read_known(field::GUEST_RFLAGS) & rflags::TF == 0
        && read_known(field::GUEST_SS_RIGHTS) & 0x60 == 0;
    let Some(vp) = resumes.then(|| dispatch::ready::<Switch>(area)).flatten() else {
        return end_pause(area);
    };
    // No shadow of STI or MOV SS ends here: the module's call does not follow one.
    let rip = read_known(field::GUEST_RIP);
    write(field::GUEST_RIP, rip.wrapping_add(VMCALL_LENGTH));
    let context = if switch::resume_has_barriers() {
        dispatch::resume_with_barriers::<Switch>(area)
    } else {
        dispatch::resume::<Switch>(area, vp)
    };
    // Its VMCS was not cleared.
    Resume { context, launch: 0 }
}

/// An exit of the root that ends a pause.
#[inline(never)]
fn end_pause(area: &mut CpuArea) -> Resume {
    dispatch::end_pause::<Switch>(area);
    root_exit(area)
}

#[inline(never)]
fn root_exit(area: &mut CpuArea) -> Resume {
    let root = &raw const area.root as u64;
    let on = cpu::root_cpu(area);
    let mut processor = Vmx { area };
    processor.requeue_interrupted_event();
    root::handle_exit(&mut processor, on);
    // A child was just made current by VMPTRLD after a VMCLEAR: it needs VMLAUNCH.
    Resume {
        context: dispatch::context(area),
        launch: (area.current != root).into(),
    }
}

/// VMRESUME or VMLAUNCH failed without an exit (SDM 31.2). A child that cannot be entered is an invalid VP; for
/// the root it is a bug, and the CPU goes back to native operation if it can.
#[no_mangle]
extern "C" fn vmx_entry_failed(area: &mut CpuArea) -> Resume {
    log!(
        "cpu {}: VM entry failed, instruction error {}, last exit {:#x}, child {}",
        area.cpu,
        read(field::INSTRUCTION_ERROR),
        read(field::EXIT_REASON),
        area.current != &raw const area.root as u64
    );
    if area.current == &raw const area.root as u64 {
        Vmx { area }.leave();
    }
    dispatch::entry_failed::<Switch>(area);
    Resume {
        context: dispatch::context(area),
        launch: 0,
    }
}

/// Makes the root current after a fault of the image while a child was.
pub fn abandon_child(area: &mut CpuArea) {
    // That of a child which was about to run, maybe.
    child::load_vmcs(area.root.control_spa);
    dispatch::abandon::<Switch>(area);
}

/// Gives a CPU back after a fault of the image. A hypercall that it was about ends with HYPERVISOR_FAULT.
pub fn leave_after_fault(area: &mut CpuArea) -> ! {
    if read(field::EXIT_REASON) as u32 == reason::VMCALL {
        area.root.gprs[gpr::RAX] = HvStatus::HYPERVISOR_FAULT.0.into();
    }
    Vmx { area }.leave()
}

/// A machine check arrived while the image ran. True if it is not about the image, which then goes on: the root takes it at its
/// next entry, which the preemption timer of a child that runs before it does not let wait for long. False for a fault of the
/// image's own; its banks stay for the root to read, and another check does not shut the machine down.
pub fn pass_machine_check(area: &mut CpuArea) -> bool {
    let status = cpu::rdmsr(msr::MCG_STATUS);
    if status & MCG_MCIP != 0 && status & (MCG_RIPV | MCG_EIPV) != MCG_RIPV {
        // SAFETY: a machine check is in progress, so the MSR exists; its handler is the one to clear it.
        unsafe { cpu::wrmsr(msr::MCG_STATUS, 0) };
        return false;
    }
    if child::current_vmcs() == area.root.control_spa {
        write(field::ENTRY_INTERRUPTION, INJECT_MC);
    } else {
        area.machine_check = 1;
    }
    true
}

/// Privilege level of the root at the last exit.
fn root_cpl() -> u8 {
    (read(field::GUEST_SS_RIGHTS) >> 5 & 3) as u8
}

impl Vmx<'_> {
    /// An event whose delivery the exit interrupted is delivered again (SDM 28.2.4).
    fn requeue_interrupted_event(&self) {
        let vectoring = read(field::VECTORING_INFORMATION);
        if vectoring >> 31 & 1 == 0 {
            return;
        }
        write(field::ENTRY_INTERRUPTION, vectoring & !(1 << 12));
        write(field::ENTRY_ERROR_CODE, read(field::VECTORING_ERROR_CODE));
        write(
            field::ENTRY_INSTRUCTION_LENGTH,
            read(field::EXIT_INSTRUCTION_LENGTH),
        );
    }

    fn set_segment(&self, index: u32, s: Segment) {
        write(field::GUEST_ES_SELECTOR + 2 * index, s.selector.into());
        write(field::GUEST_ES_BASE + 2 * index, s.base);
        write(field::GUEST_ES_LIMIT + 2 * index, s.limit.into());
        write(field::GUEST_ES_RIGHTS + 2 * index, s.rights.into());
    }

    /// Keeps EFER.LMA and the IA-32e entry control in step with CR0.PG (SDM 4.1.2).
    fn update_long_mode(&self, cr0_value: u64) {
        let mut value = read(field::GUEST_EFER);
        let mut entry = read(field::ENTRY_CONTROLS);
        if cr0_value & cr0::PG != 0 && value & efer::LME != 0 {
            value |= efer::LMA;
            entry |= u64::from(entry_control::IA32E);
        } else if cr0_value & cr0::PG == 0 {
            value &= !efer::LMA;
            entry &= !u64::from(entry_control::IA32E);
        }
        write(field::GUEST_EFER, value);
        write(field::ENTRY_CONTROLS, entry);
    }
}

impl Processor for Vmx<'_> {
    #[inline]
    fn exit(&mut self) -> Exit {
        let full = read(field::EXIT_REASON) as u32;
        if full & ENTRY_FAILED != 0 {
            log!(
                "cpu {}: VM entry refused, reason {full:#x} qualification {:#x}",
                self.area.cpu,
                read(field::EXIT_QUALIFICATION)
            );
            return Exit::EntryFailure;
        }
        match full & 0xffff {
            reason::CPUID => Exit::Cpuid,
            reason::VMCALL => Exit::Hypercall,
            reason::RDMSR => Exit::MsrRead,
            reason::WRMSR => Exit::MsrWrite,
            reason::XSETBV => Exit::Xsetbv,
            reason::CR_ACCESS => {
                // Qualification: register in 3:0, access type in 5:4 (0 = MOV to), source in 11:8.
                let q = read(field::EXIT_QUALIFICATION);
                match (q & 15, q >> 4 & 3) {
                    (register @ (0 | 4), 0) => Exit::ControlRegisterWrite {
                        register: register as u8,
                        source: (q >> 8 & 15) as u8,
                    },
                    _ => Exit::Unknown,
                }
            }
            reason::EPT_VIOLATION => {
                let q = read(field::EXIT_QUALIFICATION);
                Exit::SecondLevelFault {
                    gpa: read(field::GUEST_PHYSICAL_ADDRESS),
                    write: q & 2 != 0,
                    execute: q & 4 != 0,
                }
            }
            reason::INVD => Exit::Invd,
            reason::INIT => Exit::Init,
            reason::SIPI => Exit::Sipi(read(field::EXIT_QUALIFICATION) as u8),
            reason::TRIPLE_FAULT => Exit::TripleFault,
            // VMCALL is among these numbers but matched above.
            reason::GETSEC | reason::VMCLEAR..=reason::VMXON | reason::INVEPT | reason::INVVPID => {
                Exit::VirtualizationInstruction
            }
            other => {
                log!(
                    "cpu {}: exit reason {other} qualification {:#x} GPA {:#x}",
                    self.area.cpu,
                    read(field::EXIT_QUALIFICATION),
                    read(field::GUEST_PHYSICAL_ADDRESS)
                );
                Exit::Unknown
            }
        }
    }

    #[inline]
    fn context(&mut self) -> &mut VpContext {
        &mut self.area.root
    }

    #[inline]
    fn cpl(&self) -> u8 {
        root_cpl()
    }

    #[inline]
    fn cr4(&self) -> u64 {
        read(field::GUEST_CR4) & !cr4::VMXE
    }

    fn rip(&self) -> u64 {
        read(field::GUEST_RIP)
    }

    fn rsp(&self) -> u64 {
        read(field::GUEST_RSP)
    }

    #[inline]
    fn skip(&mut self) {
        write(
            field::GUEST_RIP,
            read(field::GUEST_RIP).wrapping_add(read(field::EXIT_INSTRUCTION_LENGTH)),
        );
        let shadow = read(field::GUEST_INTERRUPTIBILITY);
        if shadow & BLOCKING_STI_MOVSS != 0 {
            write(field::GUEST_INTERRUPTIBILITY, shadow & !BLOCKING_STI_MOVSS);
        }
        // The trap of a single step belongs to the instruction that was emulated, unless only branches
        // are traced (DEBUGCTL.BTF, bit 1).
        if read(field::GUEST_RFLAGS) & rflags::TF != 0 && read(field::GUEST_DEBUGCTL) & 2 == 0 {
            write(
                field::GUEST_PENDING_DEBUG,
                read(field::GUEST_PENDING_DEBUG) | PENDING_SINGLE_STEP,
            );
        }
    }

    fn raise(&mut self, exception: Exception) {
        let event = match exception {
            Exception::InvalidOpcode => INJECT_UD,
            Exception::GeneralProtection => INJECT_GP,
        };
        // After a machine check the instruction comes again, and so does its exception.
        if read(field::ENTRY_INTERRUPTION) == INJECT_MC {
            return;
        }
        write(field::ENTRY_INTERRUPTION, event);
        write(field::ENTRY_ERROR_CODE, 0);
    }

    fn write_control_register(&mut self, register: u8, value: u64) -> bool {
        if register == 0 {
            if value >> 32 != 0
                || value & (cr0::PG | cr0::PE) == cr0::PG
                || value & (cr0::NW | cr0::CD) == cr0::NW
            {
                return false;
            }
            write(field::CR0_SHADOW, value);
            write(field::GUEST_CR0, value | cr0::NE);
            self.update_long_mode(value);
        } else {
            // CPUID does not announce VMX, so CR4.VMXE is a reserved bit.
            if value & cr4::VMXE != 0 {
                return false;
            }
            write(field::CR4_SHADOW, value);
            write(field::GUEST_CR4, value | cr4::VMXE);
        }
        true
    }

    /// Only numbers outside the MSR bitmap come here, and no such MSR exists on these processors.
    fn read_msr(&mut self, _: u32) -> Option<u64> {
        None
    }

    fn write_msr(&mut self, _: u32, _: u64) -> Option<()> {
        None
    }

    fn flush_second_level(&mut self) {
        invept(boot().root_eptp);
    }

    fn wait_for_sipi(&mut self) {
        write(field::GUEST_ACTIVITY, WAIT_FOR_SIPI);
        write(field::GUEST_INTERRUPTIBILITY, 0);
        write(field::GUEST_RFLAGS, 2);
    }

    /// The state after INIT and SIPI (SDM table 11-1).
    fn start(&mut self, vector: u8) {
        let [signature, ..] = cpu::cpuid(1, 0);
        self.area.root.gprs = [0; 16];
        self.area.root.gprs[super::gpr::RDX] = signature.into();
        write(field::GUEST_CR0, cr0::CD | cr0::NW | cr0::ET | cr0::NE);
        write(field::CR0_SHADOW, cr0::CD | cr0::NW | cr0::ET);
        write(field::GUEST_CR3, 0);
        write(field::GUEST_CR4, cr4::VMXE);
        write(field::CR4_SHADOW, 0);
        write(field::GUEST_EFER, 0);
        write(
            field::ENTRY_CONTROLS,
            read(field::ENTRY_CONTROLS) & !u64::from(entry_control::IA32E),
        );
        let data = Segment {
            base: 0,
            limit: 0xffff,
            rights: 0x93,
            selector: 0,
        };
        let code = Segment {
            base: u64::from(vector) << 12,
            selector: u16::from(vector) << 8,
            rights: 0x9b,
            ..data
        };
        // Order of the VMCS: ES, CS, SS, DS, FS, GS, LDTR, TR.
        let ldtr = Segment {
            rights: 0x82,
            ..data
        };
        let tr = Segment {
            rights: 0x8b,
            ..data
        };
        for (index, s) in [data, code, data, data, data, data, ldtr, tr]
            .into_iter()
            .enumerate()
        {
            self.set_segment(index as u32, s);
        }
        for (base, limit) in [
            (field::GUEST_GDTR_BASE, field::GUEST_GDTR_LIMIT),
            (field::GUEST_IDTR_BASE, field::GUEST_IDTR_LIMIT),
        ] {
            write(base, 0);
            write(limit, 0xffff);
        }
        for zero in [
            field::GUEST_RIP,
            field::GUEST_RSP,
            field::GUEST_DEBUGCTL,
            field::GUEST_SYSENTER_CS,
            field::GUEST_SYSENTER_ESP,
            field::GUEST_SYSENTER_EIP,
            field::GUEST_INTERRUPTIBILITY,
            field::GUEST_PENDING_DEBUG,
            field::GUEST_ACTIVITY,
        ] {
            write(zero, 0);
        }
        write(field::GUEST_RFLAGS, 2);
        write(field::GUEST_DR7, 0x400);
        if boot().vmx_cet != 0 {
            for zero in [field::GUEST_S_CET, field::GUEST_SSP, field::GUEST_SSP_TABLE] {
                write(zero, 0);
            }
        }
        // SAFETY: CR2 belongs to the root, whose value after INIT is 0.
        unsafe { asm!("mov cr2, {0}", in(reg) 0u64, options(nomem, nostack)) };
    }

    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        cpu::cpuid(leaf, subleaf)
    }

    fn xsetbv(&mut self, value: u64) {
        cpu::xsetbv(value);
    }

    fn wbinvd(&mut self) {
        cpu::wbinvd();
    }

    fn reset(&mut self) -> ! {
        cpu::reset()
    }

    fn fault(&mut self, how: u64) {
        cpu::fault(how);
    }

    fn call(&mut self, control: Control, input: u64, output: u64) -> u64 {
        let root_control = self.area.root.control_spa;
        Call {
            info: boot(),
            cpu: self.area.cpu,
            control,
            input,
            output,
            pull,
            root_control,
        }
        .run()
    }

    fn dispatch(&mut self, partition: u64, vp: u64) -> Result<Option<DispatchEvent>, HvStatus> {
        dispatch::dispatch::<Switch>(self.area, partition, vp)
    }

    fn on_stopped_vp(&mut self, partition: u64, index: u32, work: Work) -> Result<(), HvStatus> {
        dispatch::on_stopped_vp(pull, self.area.root.control_spa, partition, index, work)
    }

    fn leave(&mut self) -> ! {
        let has_cet = boot().vmx_cet;
        let area = &mut *self.area;
        let frame = &mut area.leave;
        frame.iret = [
            read(field::GUEST_RIP),
            read(field::GUEST_CS_SELECTOR),
            read(field::GUEST_RFLAGS),
            read(field::GUEST_RSP),
            read(field::GUEST_SS_SELECTOR),
        ];
        frame.cr0 = read(field::GUEST_CR0);
        let cpl = root_cpl();
        frame.cr3 = cpu::leave_cr3(read(field::GUEST_CR3), cpl);
        frame.cr4 = read(field::GUEST_CR4) & !cr4::VMXE;
        frame.efer = read(field::GUEST_EFER);
        frame.pat = read(field::GUEST_PAT);
        frame.dr7 = read(field::GUEST_DR7);
        frame.debugctl = read(field::GUEST_DEBUGCTL);
        frame.fs_base = read(field::GUEST_FS_BASE);
        frame.gs_base = read(field::GUEST_GS_BASE);
        frame.has_cet = has_cet.into();
        if has_cet != 0 {
            frame.s_cet = read(field::GUEST_S_CET);
            frame.ssp_table = read(field::GUEST_SSP_TABLE);
            if cpl != 0 && cpu::rdmsr(msr::U_CET) & 1 != 0 {
                // The IRETQ to a user program takes its shadow stack from there.
                // SAFETY: exists with CET; the value is the program's own.
                unsafe { cpu::wrmsr(msr::PL3_SSP, read(field::GUEST_SSP)) };
            }
        }
        for (slot, selector) in frame.selectors.iter_mut().zip([
            field::GUEST_DS_SELECTOR,
            field::GUEST_ES_SELECTOR,
            field::GUEST_FS_SELECTOR,
            field::GUEST_GS_SELECTOR,
            field::GUEST_LDTR_SELECTOR,
            field::GUEST_TR_SELECTOR,
        ]) {
            *slot = read(selector) as u16;
        }
        frame.gdtr = TableRegister::new(
            read(field::GUEST_GDTR_BASE),
            read(field::GUEST_GDTR_LIMIT) as u16,
        );
        frame.idtr = TableRegister::new(
            read(field::GUEST_IDTR_BASE),
            read(field::GUEST_IDTR_LIMIT) as u16,
        );
        let task = Segment {
            base: read(field::GUEST_TR_BASE),
            limit: read(field::GUEST_TR_LIMIT) as u32,
            rights: 0,
            selector: read(field::GUEST_TR_SELECTOR) as u16,
        };
        let (low, high) = task.tss_descriptor();
        let index = usize::from(task.selector) / 8;
        for (offset, value) in [low, high].into_iter().enumerate() {
            if let Some(slot) = frame.copy_gdt.get_mut(index + offset) {
                *slot = value;
            }
        }
        frame.vmx = 1;
        let system_call = [
            (msr::SYSENTER_CS, read(field::GUEST_SYSENTER_CS)),
            (msr::SYSENTER_ESP, read(field::GUEST_SYSENTER_ESP)),
            (msr::SYSENTER_EIP, read(field::GUEST_SYSENTER_EIP)),
        ];
        // SAFETY: the root's VMCS is current and its address is in the context; after VMXOFF nothing here
        // uses it. The SYSENTER values are the root's own.
        unsafe {
            asm!("vmclear [{0}]", in(reg) &area.root.control_spa, options(nostack));
            asm!("vmxoff", options(nostack));
            for (number, value) in system_call {
                cpu::wrmsr(number, value);
            }
            cpu::finish_leave(area)
        }
    }
}

const _: () = assert!(field::GUEST_TR_SELECTOR == field::GUEST_ES_SELECTOR + 14);
