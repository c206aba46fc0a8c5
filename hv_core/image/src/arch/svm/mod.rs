// SPDX-License-Identifier: GPL-2.0
//! AMD-V back end (APM vol. 2 chapter 15).

use core::arch::{asm, global_asm};

use hv_abi::boot::{BootInfo, CpuArea, TableRegister, VpContext};
use hv_abi::hypercall::{code, private, Control, DispatchEvent};
use hv_abi::layout::{selector, DIRECT_BASE};
use hv_abi::status::HvStatus;
use hv_x86::regs::{cr0, efer, msr, rflags};
use hv_x86::vmcb::{exit, Vmcb};

use super::dispatch::{self, WorldSwitch};
use super::{cpu, gpr, switch, ChildHardware, Exception, Exit, Processor, Work};
use crate::header::boot;
use crate::hypercall::Call;
use crate::vp::VpCore;
use crate::{log, root};

global_asm!(include_str!("entry.S"), code = const selector::CODE, data = const selector::DATA);

/// Event injection: valid, exception (APM 15.20).
const INJECT_UD: u64 = 1 << 31 | 3 << 8 | 6;
const INJECT_GP: u64 = 1 << 31 | 3 << 8 | 1 << 11 | 13;
/// EFER bits that a root may set: everything defined up to AutoIBRS (APM 3.1.7) but SVME.
const EFER_WRITABLE: u64 = 0x36_fd01 & !efer::SVME;
/// Control word of the call that resumes a paused VP, and the length of its instruction.
const RESUME: u64 = Control::simple(private::RESUME_VP, true).0;
/// That of a dispatch.
const DISPATCH: u64 = Control::simple(code::DISPATCH_VP, true).0;
const VMMCALL_LENGTH: u64 = 3;
/// TLB control: flush all of this CPU (APM 15.16.1).
const FLUSH_ALL: u32 = 1;

/// A CPU at an exit, with the VMCB that ran.
struct Svm<'a> {
    area: &'a mut CpuArea,
    vmcb: &'a mut Vmcb,
}

impl<'a> Svm<'a> {
    fn root(area: &'a mut CpuArea) -> Self {
        // SAFETY: the loader put the address of this CPU's root VMCB there; it is mapped, aligned, and
        // only this CPU uses it while the image runs on it.
        let vmcb = unsafe { &mut *(area.root.control as *mut Vmcb) };
        Self { area, vmcb }
    }
}

mod child;

/// The switch between root and child of AMD-V: VMSAVE and VMLOAD move what VMRUN does not.
struct Switch;

fn vmcb_at(address: u64) -> &'static mut Vmcb {
    // SAFETY: the address of a VMCB in a page of the hypervisor that this CPU owns: its root's, or that of the
    // VP that it runs.
    unsafe { &mut *(address as *mut Vmcb) }
}

/// Stores FS, GS, TR, LDTR, KernelGSBase and the system-call MSRs in the VMCB at `spa` (APM 15.5.2).
fn vmsave(spa: u64) {
    // SAFETY: the VMCB of this CPU's root or of the VP that it owns; EFER.SVME is set.
    unsafe { asm!("vmsave rax", in("rax") spa, options(nostack)) };
}

/// Loads them.
fn vmload(spa: u64) {
    // SAFETY: as for `vmsave`; the image uses none of these registers.
    unsafe { asm!("vmload rax", in("rax") spa, options(nostack)) };
}

impl WorldSwitch for Switch {
    type Hardware = child::SvmChild<'static>;
    const IN_REGISTERS: bool = false;
    const PORTS_FIRST: bool = true;

    fn open(
        _: &mut CpuArea,
        info: &'static BootInfo,
        core: &mut VpCore,
        slat: u64,
    ) -> Self::Hardware {
        let address = DIRECT_BASE + core.control;
        let mut hardware = child::SvmChild {
            vmcb: vmcb_at(address),
            info,
            live: false,
        };
        if !core.prepared {
            hardware.prepare(slat);
            core.prepared = true;
            core.dirty = true;
            core.state.context.control = address;
            core.state.context.control_spa = core.control;
        }
        hardware
    }

    fn current(info: &'static BootInfo, core: &VpCore) -> Self::Hardware {
        child::SvmChild {
            vmcb: vmcb_at(core.state.context.control),
            info,
            live: true,
        }
    }

    fn close(_: &mut CpuArea, _: &VpCore) {}

    fn keep_root(area: &mut CpuArea, _: &mut VpCore) {
        vmsave(area.root.control_spa);
    }

    fn to_child(_: &mut CpuArea, core: &mut VpCore) {
        vmload(core.control);
    }

    fn to_root(area: &mut CpuArea, core: &mut VpCore) {
        vmsave(core.control);
        vmload(area.root.control_spa);
    }

    fn pause(area: &mut CpuArea, core: &mut VpCore) {
        Self::to_root(area, core);
    }

    fn resume(area: &mut CpuArea, core: &mut VpCore) {
        Self::keep_root(area, core);
        Self::to_child(area, core);
    }

    fn end_pause(_: &mut CpuArea, _: &mut VpCore) {}

    fn root_is_traced(area: &CpuArea) -> bool {
        let vmcb = vmcb_at(area.root.control);
        vmcb.dr7 & 0xff != 0 || vmcb.rflags & rflags::TF != 0
    }

    fn rescue_root(area: &mut CpuArea, _: &VpCore) {
        if area.current != &raw const area.root as u64 {
            vmload(area.root.control_spa);
        }
    }

    fn set_result(area: &mut CpuArea, rax: u64) {
        vmcb_at(area.root.control).rax = rax;
    }
}

/// Brings the registers of a VP that this CPU owns out of its VMCB.
fn pull(_: u64, core: &mut VpCore) {
    if core.in_hardware {
        child::SvmChild {
            vmcb: vmcb_at(core.state.context.control),
            info: boot(),
            live: false,
        }
        .store(core);
        core.in_hardware = false;
    }
}

#[no_mangle]
extern "C" fn svm_child_exit(area: &mut CpuArea) -> *const VpContext {
    dispatch::child_exit::<Switch>(area)
}

#[no_mangle]
extern "C" fn svm_root_exit(area: &mut CpuArea) -> *const VpContext {
    if area.extended == 0 {
        return unpaused_exit(area);
    }
    let vmcb = vmcb_at(area.root.control);
    // If the root began to make single steps meanwhile, it sees the next after this call.
    let resumes =
        vmcb.exit_code == exit::VMMCALL && vmcb.cpl == 0 && area.root.gprs[gpr::RCX] == RESUME;
    let Some(vp) = resumes.then(|| dispatch::ready::<Switch>(area)).flatten() else {
        return end_pause(area);
    };
    // The dispatch left no event, flush or shadow, and the module's call neither has prefixes nor follows STI.
    vmcb.rip = vmcb.rip.wrapping_add(VMMCALL_LENGTH);
    if switch::resume_has_barriers() {
        return dispatch::resume_with_barriers::<Switch>(area);
    }
    dispatch::resume::<Switch>(area, vp)
}

/// An exit of the root that ends a pause.
#[inline(never)]
fn end_pause(area: &mut CpuArea) -> *const VpContext {
    dispatch::end_pause::<Switch>(area);
    root_exit(area)
}

/// An exit of the root that has nothing to do with a pause. The most frequent one goes without what the others need.
#[inline(never)]
fn unpaused_exit(area: &mut CpuArea) -> *const VpContext {
    let vmcb = vmcb_at(area.root.control);
    let dispatches =
        vmcb.exit_code == exit::VMMCALL && vmcb.cpl == 0 && area.root.gprs[gpr::RCX] == DISPATCH;
    if !dispatches {
        return root_exit(area);
    }
    let on = cpu::root_cpu(area);
    let mut processor = Svm::root(area);
    processor.vmcb.tlb_control = 0;
    processor.vmcb.event_injection = 0;
    root::handle_dispatch(&mut processor, on);
    processor.vmcb.rax = processor.area.root.gprs[gpr::RAX];
    dispatch::context(area)
}

#[inline(never)]
fn root_exit(area: &mut CpuArea) -> *const VpContext {
    let on = cpu::root_cpu(area);
    let mut processor = Svm::root(area);
    processor.area.root.gprs[gpr::RAX] = processor.vmcb.rax;
    processor.vmcb.tlb_control = 0;
    processor.requeue_interrupted_event();
    root::handle_exit(&mut processor, on);
    processor.vmcb.rax = processor.area.root.gprs[gpr::RAX];
    dispatch::context(area)
}

/// Makes the root current after a fault of the image while a child was.
pub fn abandon_child(area: &mut CpuArea) {
    dispatch::abandon::<Switch>(area);
}

/// Gives a CPU back after a fault of the image. A hypercall that it was about ends with HYPERVISOR_FAULT.
pub fn leave_after_fault(area: &mut CpuArea) -> ! {
    let mut processor = Svm::root(area);
    if processor.vmcb.exit_code == exit::VMMCALL {
        processor.area.root.gprs[gpr::RAX] = HvStatus::HYPERVISOR_FAULT.0.into();
    }
    processor.leave()
}

impl Svm<'_> {
    /// An event whose delivery the exit interrupted is delivered again (APM 15.7.2).
    fn requeue_interrupted_event(&mut self) {
        self.vmcb.event_injection =
            if self.vmcb.exit_interrupt_info >> 31 & 1 != 0 && self.vmcb.exit_code == exit::NPF {
                self.vmcb.exit_interrupt_info
            } else {
                0
            };
    }

    /// Length of the instruction that exited, where the processor does not give the next RIP. The
    /// prefixes that these instructions allow do nothing, and Linux writes none.
    fn instruction_length(&self) -> u64 {
        match self.vmcb.exit_code {
            exit::VMMCALL | exit::XSETBV => VMMCALL_LENGTH,
            _ => 2,
        }
    }
}

impl Processor for Svm<'_> {
    #[inline]
    fn exit(&mut self) -> Exit {
        match self.vmcb.exit_code {
            exit::CPUID => Exit::Cpuid,
            exit::VMMCALL => Exit::Hypercall,
            exit::MSR if self.vmcb.exit_info_1 & 1 == 0 => Exit::MsrRead,
            exit::MSR => Exit::MsrWrite,
            exit::XSETBV => Exit::Xsetbv,
            exit::NPF => Exit::SecondLevelFault {
                gpa: self.vmcb.exit_info_2,
                write: self.vmcb.exit_info_1 & 2 != 0,
                execute: self.vmcb.exit_info_1 & 16 != 0,
            },
            exit::INVD => Exit::Invd,
            exit::SHUTDOWN => Exit::TripleFault,
            exit::INVLPGA | exit::VMRUN..=exit::SKINIT => Exit::VirtualizationInstruction,
            exit::INVALID => {
                log!("cpu {}: VMRUN refused the state", self.area.cpu);
                Exit::EntryFailure
            }
            other => {
                log!(
                    "cpu {}: exit code {other:#x} info {:#x} {:#x}",
                    self.area.cpu,
                    self.vmcb.exit_info_1,
                    self.vmcb.exit_info_2
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
        self.vmcb.cpl
    }

    #[inline]
    fn cr4(&self) -> u64 {
        self.vmcb.cr4
    }

    fn rip(&self) -> u64 {
        self.vmcb.rip
    }

    fn rsp(&self) -> u64 {
        self.vmcb.rsp
    }

    #[inline]
    fn skip(&mut self) {
        self.vmcb.rip = if boot().svm_next_rip != 0 {
            self.vmcb.next_rip
        } else {
            self.vmcb.rip.wrapping_add(self.instruction_length())
        };
        self.vmcb.interrupt_shadow = 0;
        if self.vmcb.rflags & rflags::TF != 0 {
            // The trap of a single step belongs to the instruction that was emulated: vector 1, with
            // DR6.BS as the processor would set it.
            self.vmcb.dr6 |= 1 << 14;
            self.vmcb.event_injection = 1 << 31 | 3 << 8 | 1;
        }
    }

    fn raise(&mut self, exception: Exception) {
        self.vmcb.event_injection = match exception {
            Exception::InvalidOpcode => INJECT_UD,
            Exception::GeneralProtection => INJECT_GP,
        };
    }

    /// AMD-V owns no bit of CR0 and CR4.
    fn write_control_register(&mut self, _: u8, _: u64) -> bool {
        false
    }

    fn read_msr(&mut self, number: u32) -> Option<u64> {
        match number {
            msr::EFER => Some(self.vmcb.efer & !efer::SVME),
            // Linux reads VM_CR on every CPU that comes up and takes SVMDIS for a contradiction.
            msr::VM_CR | msr::VM_HSAVE_PA => Some(0),
            _ => None,
        }
    }

    fn write_msr(&mut self, number: u32, value: u64) -> Option<()> {
        if number != msr::EFER || value & !EFER_WRITABLE != 0 {
            return None;
        }
        if (value ^ self.vmcb.efer) & efer::LME != 0 && self.vmcb.cr0 & cr0::PG != 0 {
            return None;
        }
        self.vmcb.efer = value & !efer::LMA | self.vmcb.efer & efer::LMA | efer::SVME;
        Some(())
    }

    fn flush_second_level(&mut self) {
        self.vmcb.tlb_control = FLUSH_ALL;
    }

    /// INIT is not intercepted on AMD-V.
    fn wait_for_sipi(&mut self) {}

    fn start(&mut self, _: u8) {}

    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        cpu::cpuid(leaf, subleaf)
    }

    fn xsetbv(&mut self, value: u64) {
        cpu::xsetbv(value);
    }

    fn proved(&mut self) {
        self.area.leave.launching = 0;
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
        Call {
            info: boot(),
            cpu: self.area.cpu,
            control,
            input,
            output,
            pull,
            root_control: 0,
        }
        .run()
    }

    fn dispatch(&mut self, partition: u64, vp: u64) -> Result<Option<DispatchEvent>, HvStatus> {
        dispatch::dispatch::<Switch>(self.area, partition, vp)
    }

    fn on_stopped_vp(&mut self, partition: u64, index: u32, work: Work) -> Result<(), HvStatus> {
        dispatch::on_stopped_vp(pull, 0, partition, index, work)
    }

    fn leave(&mut self) -> ! {
        let v = &*self.vmcb;
        let area = &mut *self.area;
        if v.exit_code == exit::INVALID && area.leave.launching != 0 {
            // The APM leaves open what a refused VMRUN stores in the VMCB: QEMU mixes the registers of host
            // and guest. For the first entry of a CPU the loader filled the frame.
            // SAFETY: as below, with the state of the launch; IF is cleared for good before GIF is set.
            unsafe {
                asm!("cli", options(nomem, nostack));
                cpu::finish_leave(area)
            }
        }
        let frame = &mut area.leave;
        frame.iret = [
            v.rip,
            v.cs.selector.into(),
            v.rflags,
            v.rsp,
            v.ss.selector.into(),
        ];
        frame.cr0 = v.cr0;
        frame.cr3 = cpu::leave_cr3(v.cr3, v.cpl);
        frame.cr4 = v.cr4;
        frame.efer = v.efer & !efer::SVME;
        frame.pat = v.pat;
        frame.dr7 = v.dr7;
        // FS, GS, LDTR and TR are still Linux'; DEBUGCTL is not switched without LBR virtualization.
        frame.fs_base = cpu::rdmsr(msr::FS_BASE);
        frame.gs_base = cpu::rdmsr(msr::GS_BASE);
        frame.has_cet = 0;
        let (fs, gs): (u32, u32);
        // SAFETY: reads two selectors, and loads CR2 and DR6, which the image does not use, with the
        // root's values; IF is cleared for good before GIF is set again.
        unsafe {
            asm!("mov {0:e}, fs", "mov {1:e}, gs", out(reg) fs, out(reg) gs, options(nomem, nostack));
            asm!("cli", "mov cr2, {0}", "mov dr6, {1}", in(reg) v.cr2, in(reg) v.dr6,
                options(nomem, nostack));
        }
        frame.selectors = [
            v.ds.selector,
            v.es.selector,
            fs as u16,
            gs as u16,
            0,
            0,
            0,
            0,
        ];
        frame.gdtr = TableRegister::new(v.gdtr.base, v.gdtr.limit as u16);
        frame.idtr = TableRegister::new(v.idtr.base, v.idtr.limit as u16);
        frame.vmx = 0;
        // SAFETY: the frame is the root's state, GIF is clear.
        unsafe { cpu::finish_leave(area) }
    }
}
