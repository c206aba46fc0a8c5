// SPDX-License-Identifier: GPL-2.0
//! A child's VMCB: set-up, registers in and out, exits and event injection (APM 15.5-15.21).

use hv_abi::boot::BootInfo;
use hv_abi::hypercall::PortWrite;
use hv_x86::regs::{efer, rflags};
use hv_x86::state::{Segment, UNUSABLE};
use hv_x86::vmcb::{exit, intercept, Vmcb, VmcbSegment};

use super::{vmload, vmsave};
use crate::arch::{ChildExit, ChildHardware, IoAccess, QuickExit};
use crate::child::exception;
use crate::child_msr::Paging;
use crate::register_page::Shown;
use crate::vp::VpCore;
use crate::vp_state::{segment, RSP};

/// ASID of children; a CPU flushes it when another VP takes it over.
const CHILD_ASID: u32 = 2;
/// TLB control: flush everything (the only kind that all processors have).
const FLUSH_ALL: u32 = 1;
/// Interrupt control: virtual TPR in bits 3:0, V_IRQ, priority, ignore TPR, V_INTR_MASKING.
const V_IRQ: u64 = 1 << 8;
const V_INTR_PRIORITY: u64 = 0xf << 16;
const V_IGNORE_TPR: u64 = 1 << 20;
const V_INTR_MASKING: u64 = 1 << 24;
const V_TPR: u64 = 0xf;
const V_INTR_VECTOR: u64 = 0xff << 32;
/// Event types (APM 15.20).
const TYPE_INTERRUPT: u64 = 0;
const TYPE_NMI: u64 = 2;
const TYPE_EXCEPTION: u64 = 3;
const VALID: u64 = 1 << 31;
const WITH_ERROR: u64 = 1 << 11;
/// Single step, in DR6.
const DR6_BS: u64 = 1 << 14;
/// Exit codes of the exceptions that exit.
const DEBUG: u64 = exit::EXCEPTION + exception::DEBUG as u64;
const ALIGNMENT_CHECK: u64 = exit::EXCEPTION + exception::ALIGNMENT_CHECK as u64;
const MACHINE_CHECK: u64 = exit::EXCEPTION + exception::MACHINE_CHECK as u64;

/// The VMCB of a child.
pub struct SvmChild<'a> {
    /// The block itself.
    pub vmcb: &'a mut Vmcb,
    /// Facts of the machine.
    pub info: &'a BootInfo,
    /// The child has just exited: FS, GS, LDTR, TR and the system-call MSRs are in the processor, not in the block.
    pub live: bool,
}

fn to_vmcb(s: Segment) -> VmcbSegment {
    s.into()
}

fn from_vmcb(s: VmcbSegment) -> Segment {
    let attributes = u32::from(s.attributes);
    let mut rights = (attributes & 0xff) | (attributes & 0xf00) << 4;
    if attributes & 0x80 == 0 {
        rights |= UNUSABLE;
    }
    Segment {
        base: s.base,
        limit: s.limit,
        rights,
        selector: s.selector,
    }
}

/// `hv_x64_segment_register`: its second word is the limit, the selector, and attributes with AVL, L, D and G in bits 15:12,
/// where the block has them in bits 11:8.
#[inline(always)]
fn segment_value(s: VmcbSegment) -> [u64; 2] {
    // As they lie in memory, so that it is one read.
    let raw = u64::from(s.selector) | u64::from(s.attributes) << 16 | u64::from(s.limit) << 32;
    let value = raw.rotate_left(32);
    [s.base, value & !(0xff << 56) | (value & 0xf << 56) << 4]
}

/// The access of an exit for I/O (APM 15.10.2).
#[inline(always)]
fn io_access(v: &Vmcb) -> IoAccess {
    let i = v.exit_info_1;
    IoAccess {
        port: (i >> 16) as u16,
        size: (i >> 4 & 7) as u8,
        is_in: i & 1 != 0,
        string: i & 4 != 0,
        rep: i & 8 != 0,
        segment: (i >> 10 & 7) as u8,
        length: v.exit_info_2.wrapping_sub(v.rip) as u8,
    }
}

/// An IRET that the guest is past was executed, or it raised an exception: that ends the blocking of NMIs, too.
fn leave_iret(rip: u64, core: &mut VpCore) {
    if core.iret.is_some_and(|at| at != rip) {
        core.iret = None;
        core.state.nmi_masked = false;
    }
}

impl SvmChild<'_> {
    /// Sets up a new block: everything exits that the root or the hypervisor must see.
    pub fn prepare(&mut self, slat: u64) {
        let v = &mut *self.vmcb;
        v.intercepts[2] = exception::INTERCEPTED;
        v.intercepts[3] = intercept::W3_INTR
            | intercept::W3_NMI
            | intercept::W3_SMI
            | intercept::W3_INIT
            | intercept::W3_CPUID
            | intercept::W3_INVD
            | intercept::W3_HLT
            | intercept::W3_INVLPGA
            | intercept::W3_IOIO
            | intercept::W3_MSR
            | intercept::W3_SHUTDOWN;
        // MONITOR and MWAIT (bits 10-12) raise #UD: CPUID hides them.
        v.intercepts[4] = intercept::W4_SVM | intercept::W4_XSETBV | 1 << 9 | 7 << 10;
        v.iopm_base = self.info.child_iopm;
        v.msrpm_base = self.info.child_msr_map;
        v.asid = CHILD_ASID;
        v.interrupt_control = V_INTR_MASKING;
        v.nested_control = 1;
        v.nested_cr3 = slat;
    }
}

impl ChildHardware for SvmChild<'_> {
    const KEEPS_POINTERS: bool = false;

    #[inline(always)]
    fn is_undisturbed(&self, core: &VpCore) -> bool {
        let v = &*self.vmcb;
        v.exit_interrupt_info & VALID == 0
            && v.rflags & rflags::TF == 0
            && v.interrupt_control & (V_IRQ | V_TPR) == u64::from(core.apic.tpr() >> 4)
    }

    #[inline(always)]
    fn quick_exit(&mut self) -> Option<QuickExit> {
        let v = &mut *self.vmcb;
        v.tlb_control = 0;
        match v.exit_code {
            exit::CPUID => Some(QuickExit::Cpuid),
            exit::VMMCALL => Some(QuickExit::Hypercall),
            exit::MSR if v.exit_info_1 & 1 == 0 => Some(QuickExit::MsrRead),
            _ => None,
        }
    }

    #[inline(always)]
    fn is_port(&self) -> bool {
        // In 32 bits the compiler keeps it apart from `quick_exit`: a table of jumps for all four costs more.
        self.vmcb.exit_code as u32 == exit::IOIO as u32
    }

    #[inline(always)]
    fn quick_port(&mut self) -> Option<IoAccess> {
        let v = &mut *self.vmcb;
        // No string.
        if v.exit_info_1 & 4 != 0 {
            return None;
        }
        v.tlb_control = 0;
        Some(io_access(v))
    }

    #[inline(always)]
    fn quick_write(&mut self, _: &VpCore) -> Option<PortWrite> {
        let v = &mut *self.vmcb;
        // IN, string or REP.
        if v.exit_info_1 & 13 != 0 {
            return None;
        }
        v.tlb_control = 0;
        let access = io_access(v);
        Some(PortWrite {
            port: access.port,
            size: access.size,
            length: access.length,
            value: v.rax as u32,
        })
    }

    fn load_general(&mut self, core: &VpCore) {
        let s = &core.state;
        let v = &mut *self.vmcb;
        v.rax = s.context.gprs[0];
        v.rsp = s.context.gprs[RSP];
        v.rip = s.rip;
        v.rflags = s.rflags | 2;
    }

    fn load(&mut self, core: &VpCore) {
        self.load_general(core);
        let s = &core.state;
        let v = &mut *self.vmcb;
        v.cr0 = s.cr0;
        v.cr2 = s.cr2;
        v.cr3 = s.cr3;
        v.cr4 = s.cr4;
        v.efer = s.efer | efer::SVME;
        v.pat = s.pat;
        v.dr6 = s.dr6;
        v.dr7 = s.dr7;
        v.debugctl = s.debugctl;
        let to = [
            &mut v.es,
            &mut v.cs,
            &mut v.ss,
            &mut v.ds,
            &mut v.fs,
            &mut v.gs,
            &mut v.ldtr,
            &mut v.tr,
        ];
        for (slot, from) in to.into_iter().zip(s.segments) {
            *slot = to_vmcb(from);
        }
        // The privilege level has a field of its own (APM 15.5.1).
        let [_, _, ss, ..] = s.segments;
        v.cpl = if s.cr0 & 1 == 0 {
            0
        } else if s.rflags & 1 << 17 != 0 {
            3
        } else {
            (ss.rights >> 5 & 3) as u8
        };
        v.gdtr.base = s.gdtr.base;
        v.gdtr.limit = s.gdtr.limit.into();
        v.idtr.base = s.idtr.base;
        v.idtr.limit = s.idtr.limit.into();
        v.sysenter_cs = s.sysenter_cs;
        v.sysenter_esp = s.sysenter_esp;
        v.sysenter_eip = s.sysenter_eip;
        v.star = s.star;
        v.lstar = s.lstar;
        v.cstar = s.cstar;
        v.sfmask = s.sfmask;
        v.kernel_gs_base = s.kernel_gs_base;
        v.tsc_offset = s.tsc_offset;
        v.interrupt_shadow = s.interrupt_shadow.into();
        v.clean = 0;
        if self.live {
            vmload(core.control);
        }
    }

    #[inline(always)]
    fn jump_quick(&mut self, core: &VpCore, rip: u64) -> bool {
        let alone = self.vmcb.interrupt_shadow & 1 == 0 && core.iret.is_none();
        if alone {
            self.vmcb.rip = rip;
        }
        alone
    }

    #[inline(always)]
    fn store_general(&self, core: &mut VpCore) {
        let v = &*self.vmcb;
        leave_iret(v.rip, core);
        let s = &mut core.state;
        s.context.gprs[0] = v.rax;
        s.context.gprs[RSP] = v.rsp;
        s.rip = v.rip;
        s.rflags = v.rflags;
        s.interrupt_shadow = v.interrupt_shadow & 1 != 0;
    }

    #[inline(always)]
    fn shown(&self, core: &VpCore) -> Shown {
        if self.live {
            vmsave(core.control);
        }
        let v = &*self.vmcb;
        // SS.DPL does not always follow the privilege level in the block.
        let [base, stack] = segment_value(v.ss);
        let stack = stack & !(3 << 53) | u64::from(v.cpl & 3) << 53;
        Shown {
            // One by one: `map` copies them twice.
            segments: [
                segment_value(v.es),
                segment_value(v.cs),
                [base, stack],
                segment_value(v.ds),
                segment_value(v.fs),
                segment_value(v.gs),
            ],
            cr0: v.cr0,
            cr3: v.cr3,
            cr4: v.cr4,
            efer: v.efer & !efer::SVME,
            dr7: v.dr7,
        }
    }

    fn store(&mut self, core: &mut VpCore) {
        if self.live {
            vmsave(core.control);
        }
        self.store_general(core);
        let v = &*self.vmcb;
        let s = &mut core.state;
        s.cr0 = v.cr0;
        s.cr2 = v.cr2;
        s.cr3 = v.cr3;
        s.cr4 = v.cr4;
        s.efer = v.efer & !efer::SVME;
        s.pat = v.pat;
        s.dr6 = v.dr6;
        s.dr7 = v.dr7;
        s.debugctl = v.debugctl;
        let from = [v.es, v.cs, v.ss, v.ds, v.fs, v.gs, v.ldtr, v.tr];
        for (slot, value) in s.segments.iter_mut().zip(from) {
            *slot = from_vmcb(value);
        }
        // SS.DPL does not always follow the privilege level in the block.
        let ss = &mut s.segments[segment::SS];
        ss.rights = ss.rights & !0x60 | u32::from(v.cpl & 3) << 5;
        s.gdtr.base = v.gdtr.base;
        s.gdtr.limit = v.gdtr.limit as u16;
        s.idtr.base = v.idtr.base;
        s.idtr.limit = v.idtr.limit as u16;
        s.sysenter_cs = v.sysenter_cs;
        s.sysenter_esp = v.sysenter_esp;
        s.sysenter_eip = v.sysenter_eip;
        s.star = v.star;
        s.lstar = v.lstar;
        s.cstar = v.cstar;
        s.sfmask = v.sfmask;
        s.kernel_gs_base = v.kernel_gs_base;
    }

    #[inline(always)]
    fn peek(&mut self, core: &mut VpCore) {
        let v = &*self.vmcb;
        let s = &mut core.state;
        s.cr0 = v.cr0;
        s.cr4 = v.cr4;
        s.efer = v.efer & !efer::SVME;
        s.rip = v.rip;
        s.segments[segment::CS].rights = from_vmcb(v.cs).rights;
        s.segments[segment::SS].rights = u32::from(v.cpl & 3) << 5 | 0x93;
    }

    fn after_exit(&mut self, core: &mut VpCore) {
        let v = &mut *self.vmcb;
        core.state.context.gprs[0] = v.rax;
        v.tlb_control = 0;
        leave_iret(v.rip, core);
        let waits = v.interrupt_control & V_IRQ != 0;
        if waits {
            v.interrupt_control &= !(V_IRQ | V_INTR_PRIORITY | V_IGNORE_TPR);
            v.intercepts[3] &= !intercept::W3_VINTR;
        }
        let priority = ((v.interrupt_control & V_TPR) << 4) as u8 | core.apic.tpr() & 0xf;
        if priority != core.apic.tpr() {
            core.apic.set_tpr(priority);
        }
        // What an exit interrupted is delivered again, in VMX form: the types agree but for software
        // interrupts, which AMD-V delivers again by itself.
        let info = v.exit_interrupt_info;
        core.requeue = if info & VALID != 0 {
            ((info & 0xffff_ffff) as u32, (info >> 32) as u32)
        } else {
            (0, 0)
        };
        v.event_injection = 0;
        if let Some(vector) = core.offered.take() {
            // One whose delivery the exit cut short is offered again.
            let cut = info & VALID != 0 && info as u8 == vector;
            if cut {
                core.requeue = (0, 0);
            } else if !waits {
                core.apic.acknowledge(vector);
            }
        }
    }

    fn exit(&mut self, core: &mut VpCore) -> ChildExit {
        let v = &mut *self.vmcb;
        if core::mem::take(&mut core.steps) {
            if core.iret.is_some() {
                // Not executed yet. Otherwise it brought flags of its own.
                v.rflags &= !rflags::TF;
            } else if v.exit_code == DEBUG {
                v.dr6 &= !DR6_BS;
                if v.dr6 & 0xf == 0 {
                    return ChildExit::Window;
                }
            }
        }
        match v.exit_code {
            exit::INTR => ChildExit::ExternalInterrupt,
            exit::NMI | exit::SMI | exit::INIT => ChildExit::Nmi,
            exit::VINTR => ChildExit::Window,
            exit::IRET => ChildExit::Iret,
            exit::CPUID => ChildExit::Cpuid,
            exit::HLT => ChildExit::Halt,
            exit::VMMCALL => ChildExit::Hypercall,
            exit::MSR if v.exit_info_1 & 1 == 0 => ChildExit::MsrRead,
            exit::MSR => ChildExit::MsrWrite,
            exit::XSETBV => ChildExit::Xsetbv,
            exit::IOIO => ChildExit::Io(io_access(v)),
            exit::NPF => ChildExit::Fault {
                gpa: v.exit_info_2,
                write: v.exit_info_1 & 2 != 0,
                execute: v.exit_info_1 & 16 != 0,
                gva: None,
            },
            exit::INVD | 0x89 => ChildExit::Nop,
            DEBUG => {
                // DR6 has the causes already (APM 15.12.2).
                v.interrupt_shadow = 0;
                ChildExit::Exception {
                    info: (VALID | TYPE_EXCEPTION << 8) as u32 | u32::from(exception::DEBUG),
                    error: 0,
                }
            }
            ALIGNMENT_CHECK => ChildExit::Exception {
                info: (VALID | TYPE_EXCEPTION << 8 | WITH_ERROR) as u32
                    | u32::from(exception::ALIGNMENT_CHECK),
                error: v.exit_info_1 as u32,
            },
            MACHINE_CHECK => ChildExit::MachineCheck,
            exit::SHUTDOWN => ChildExit::TripleFault,
            exit::INVLPGA | exit::VMRUN | 0x82..=exit::SKINIT | 0x8a..=0x8c => ChildExit::Undefined,
            exit::INVALID => ChildExit::InvalidState {
                reason: v.exit_code,
                qualification: v.exit_info_1,
            },
            _ => ChildExit::Unknown(v.exit_code),
        }
    }

    #[inline(always)]
    fn instruction_length(&self) -> u64 {
        let v = &*self.vmcb;
        if self.info.svm_next_rip != 0 && v.next_rip != 0 {
            return v.next_rip.wrapping_sub(v.rip);
        }
        match v.exit_code {
            exit::HLT => 1,
            exit::VMMCALL | exit::XSETBV => 3,
            exit::IOIO => v.exit_info_2.wrapping_sub(v.rip),
            _ => 2,
        }
    }

    #[inline(always)]
    fn skip(&mut self, core: &mut VpCore, length: u64) {
        let v = &mut *self.vmcb;
        v.rip = v.rip.wrapping_add(length);
        v.interrupt_shadow = 0;
        if v.rflags & rflags::TF != 0 {
            self.trap_step(core);
        }
    }

    fn trap_step(&mut self, core: &mut VpCore) {
        let dr6 = if core.in_hardware {
            &mut self.vmcb.dr6
        } else {
            &mut core.state.dr6
        };
        *dr6 |= DR6_BS;
        core.requeue = Self::exception(exception::DEBUG, None);
    }

    #[inline(always)]
    fn eax(&self, _: &VpCore) -> u32 {
        self.vmcb.rax as u32
    }

    #[inline(always)]
    fn cr4_and_long(&self) -> (u64, bool) {
        let v = &*self.vmcb;
        // Bit 9 of the attributes is L.
        let long = v.efer & efer::LMA != 0 && v.cs.attributes & 1 << 9 != 0;
        (v.cr4, long)
    }

    #[inline(always)]
    fn is_kernel(&self) -> bool {
        self.vmcb.cpl == 0 && self.vmcb.cr0 & 1 != 0
    }

    #[inline(always)]
    fn skip_quick(&mut self, usual: u64) {
        let v = &mut *self.vmcb;
        v.rip = if v.next_rip != 0 {
            v.next_rip
        } else {
            v.rip.wrapping_add(usual)
        };
        v.interrupt_shadow = 0;
    }

    #[inline(always)]
    fn skip_port(&mut self) {
        // The next RIP (APM 15.10.2).
        self.vmcb.rip = self.vmcb.exit_info_2;
        self.vmcb.interrupt_shadow = 0;
    }

    #[inline(always)]
    fn rax(&mut self, core: &mut VpCore, value: u64) {
        self.vmcb.rax = value;
        core.state.context.gprs[0] = value;
    }

    fn inject(&mut self, info: u32, error: u32) {
        self.vmcb.event_injection = u64::from(info & !(1 << 12)) | u64::from(error) << 32;
    }

    fn inject_nmi(&mut self, core: &mut VpCore) {
        self.vmcb.event_injection = VALID | TYPE_NMI << 8 | 2;
        core.iret = None;
    }

    fn inject_interrupt(&mut self, vector: u8) {
        self.vmcb.event_injection = VALID | TYPE_INTERRUPT << 8 | u64::from(vector);
    }

    /// As a virtual interrupt (APM 15.21.4). QEMU delivers an interrupt that is injected instead a second time if its own timers
    /// get its attention just then.
    fn offer_interrupt(&mut self, core: &mut VpCore, vector: u8) -> bool {
        let v = &mut *self.vmcb;
        v.intercepts[3] &= !intercept::W3_VINTR;
        v.interrupt_control = v.interrupt_control & !V_INTR_VECTOR
            | V_IRQ
            | V_INTR_PRIORITY
            | V_IGNORE_TPR
            | u64::from(vector) << 32;
        core.offered = Some(vector);
        true
    }

    fn exception(vector: u8, error: Option<u32>) -> (u32, u32) {
        let with = if error.is_some() { WITH_ERROR } else { 0 };
        (
            (VALID | TYPE_EXCEPTION << 8 | with | u64::from(vector)) as u32,
            error.unwrap_or(0),
        )
    }

    fn interrupts_open(&self, _: &VpCore) -> bool {
        self.vmcb.rflags & rflags::IF != 0 && self.vmcb.interrupt_shadow & 1 == 0
    }

    fn interrupt_flag(&self) -> bool {
        self.vmcb.rflags & rflags::IF != 0
    }

    fn nmis_open(&self, core: &VpCore) -> bool {
        !core.state.nmi_masked && self.vmcb.interrupt_shadow & 1 == 0
    }

    fn end_nmi(&mut self, core: &mut VpCore) {
        core.iret = Some(self.vmcb.rip);
    }

    fn request_window(&mut self) {
        self.vmcb.interrupt_control |= V_IRQ | V_INTR_PRIORITY | V_IGNORE_TPR;
        self.vmcb.intercepts[3] |= intercept::W3_VINTR;
    }

    fn request_nmi_window(&mut self, core: &mut VpCore) {
        let v = &mut *self.vmcb;
        if core.iret.is_some() {
            // The step of a guest that makes some itself exits, too. An event that comes first would take the flag along.
            let event = v.event_injection & VALID != 0 || core.offered.is_some();
            if v.rflags & rflags::TF == 0 && !event {
                v.rflags |= rflags::TF;
                core.steps = true;
            }
        } else if !core.state.nmi_masked {
            // A shadow ends with the interrupt window.
            self.request_window();
        }
    }

    fn before_entry(&mut self, core: &mut VpCore, flush: bool) {
        let v = &mut *self.vmcb;
        v.interrupt_control = v.interrupt_control & !V_TPR | u64::from(core.apic.tpr() >> 4);
        v.intercepts[3] &= !intercept::W3_IRET;
        if core.state.nmi_masked && core.iret.is_none() {
            v.intercepts[3] |= intercept::W3_IRET;
        }
        if flush {
            v.tlb_control = FLUSH_ALL;
        }
    }

    fn paging(&self) -> Paging {
        let v = &*self.vmcb;
        Paging {
            cr0: v.cr0,
            cr3: v.cr3,
            cr4: v.cr4,
            efer: v.efer & !efer::SVME,
        }
    }
}
