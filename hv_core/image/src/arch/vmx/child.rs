// SPDX-License-Identifier: GPL-2.0
//! A child's VMCS: set-up, registers in and out, exits and event injection (SDM 26-28).

use core::arch::asm;

use hv_abi::boot::{BootInfo, CpuArea};
use hv_abi::hypercall::PortWrite;
use hv_x86::regs::{cr0, cr4, efer, msr, rflags};
use hv_x86::state::Segment;
use hv_x86::vmcs::{
    adjust, entry_control, exit_control, field, pin, processor, reason, secondary, ENTRY_FAILED,
};

use super::{invept, read, read_known, write};
use crate::arch::cpu::{rdmsr, resend_nmi, wrmsr};
use crate::arch::memory::direct;
use crate::arch::switch::{dr6, set_dr6};
use crate::arch::{ChildExit, ChildHardware, IoAccess, QuickExit};
use crate::child::exception;
use crate::child_msr::Paging;
use crate::register_page::Shown;
use crate::registers::segment_value;
use crate::vp::VpCore;
use crate::vp_state::{segment, VpState, RSP};

/// CR0 bits that the image owns: NE must be set in VMX operation, CD and NW would reach the machine's caches.
const CR0_OWNED: u64 = cr0::NE | cr0::CD | cr0::NW;
/// CR4 bits that a child may change freely if its CPUID has them. The rest is owned: VMXE must be set, MCE stays on for
/// the root's sake, a change of LA57 needs checks, and what CPUID hides from children is reserved.
const CR4_FREE: u64 = 0x7bf & !cr4::MCE
    | 1 << 11
    | 1 << 16
    | cr4::PCIDE
    | cr4::OSXSAVE
    | cr4::SMEP
    | cr4::SMAP
    | cr4::PKE;
/// All CR4 bits that a child may set.
const CR4_ALLOWED: u64 = CR4_FREE | cr4::MCE | cr4::LA57;
/// Interruptibility: STI, MOV SS, NMI.
const BLOCKING_STI: u64 = 1;
const BLOCKING_MOVSS: u64 = 2;
const BLOCKING_NMI: u64 = 8;
/// Event types of the interruption information.
const TYPE_NMI: u32 = 2;
const TYPE_EXCEPTION: u32 = 3;
const VALID: u32 = 1 << 31;
const WITH_ERROR: u32 = 1 << 11;
/// In the information about an exception and in the qualification of an EPT violation.
const UNBLOCKED_BY_IRET: u32 = 1 << 12;
/// Restricted transactional memory, clear if the exception was in such a region.
const DR6_RTM: u64 = 1 << 16;
/// General detect.
const DR7_GD: u64 = 1 << 13;
/// Last branch records.
const DEBUGCTL_LBR: u64 = 1;

/// How often a child that nothing interrupts comes back to the root.
const RUNS_PER_SECOND: u64 = 200;

/// MSRs that the world switch moves, with their place in [`VpState`].
const SWITCHED: [u32; 5] = [
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0102,
];

fn switched(state: &mut VpState) -> [&mut u64; 5] {
    [
        &mut state.star,
        &mut state.lstar,
        &mut state.cstar,
        &mut state.sfmask,
        &mut state.kernel_gs_base,
    ]
}

/// Makes a VMCS current.
pub fn load_vmcs(spa: u64) {
    // SAFETY: the page is a VMCS region of the hypervisor with the revision identifier, not active on another
    // CPU: each leaves it by VMCLEAR.
    unsafe { asm!("vmptrld [{}]", in(reg) &raw const spa, options(nostack)) };
}

/// SPA of the current VMCS.
pub fn current_vmcs() -> u64 {
    let mut spa = 0u64;
    // SAFETY: stores an address to `spa`.
    unsafe { asm!("vmptrst [{}]", in(reg) &raw mut spa, options(nostack)) };
    spa
}

/// Writes a VMCS back to memory and makes it inactive.
pub fn clear_vmcs(spa: u64) {
    // SAFETY: as for `load_vmcs`.
    unsafe { asm!("vmclear [{}]", in(reg) &raw const spa, options(nostack)) };
}

fn invvpid(vpid: u64) {
    let descriptor = [vpid, 0u64];
    // SAFETY: preflight checked the single-context type; it only drops translations.
    unsafe {
        asm!("invvpid {0}, [{1}]", in(reg) 1u64, in(reg) &raw const descriptor, options(nostack))
    };
}

/// The current VMCS, of a child.
pub struct VmxChild {
    /// Facts of the machine.
    pub info: &'static BootInfo,
}

/// Host fields that are the same in all VMCSs of a CPU: copied from the root's.
const HOST_FIELDS: [u32; 22] = [
    field::HOST_ES_SELECTOR,
    field::HOST_CS_SELECTOR,
    field::HOST_SS_SELECTOR,
    field::HOST_DS_SELECTOR,
    field::HOST_FS_SELECTOR,
    field::HOST_GS_SELECTOR,
    field::HOST_TR_SELECTOR,
    field::HOST_PAT,
    field::HOST_EFER,
    field::HOST_SYSENTER_CS,
    field::HOST_CR0,
    field::HOST_CR3,
    field::HOST_CR4,
    field::HOST_FS_BASE,
    field::HOST_GS_BASE,
    field::HOST_TR_BASE,
    field::HOST_GDTR_BASE,
    field::HOST_IDTR_BASE,
    field::HOST_SYSENTER_ESP,
    field::HOST_SYSENTER_EIP,
    field::HOST_RSP,
    field::HOST_RIP,
];

impl VmxChild {
    /// Makes the VMCS of a VP current on this CPU, setting it up the first time.
    pub fn open(area: &CpuArea, info: &'static BootInfo, core: &mut VpCore, slat: u64) -> Self {
        let moved = core.host_cpu != area.cpu;
        // The root's VMCS is current here.
        let host = if moved {
            HOST_FIELDS.map(read)
        } else {
            [0; HOST_FIELDS.len()]
        };
        let this = Self { info };
        if !core.prepared {
            // SAFETY: the page is the VP's own control structure, not used before.
            unsafe {
                direct(core.control)
                    .cast::<u32>()
                    .write(info.vmx.basic as u32 & 0x7fff_ffff)
            };
            clear_vmcs(core.control);
        }
        load_vmcs(core.control);
        if moved {
            for (number, value) in HOST_FIELDS.into_iter().zip(host) {
                write(number, value);
            }
            core.host_cpu = area.cpu;
        }
        if !core.prepared {
            this.prepare(slat, core.vpid);
            core.prepared = true;
            core.dirty = true;
        }
        this
    }

    fn prepare(&self, slat: u64, vpid: u16) {
        let vmx = &self.info.vmx;
        let cet = self.info.vmx_cet != 0;
        let mut entry =
            entry_control::LOAD_DEBUG | entry_control::LOAD_PAT | entry_control::LOAD_EFER;
        let mut exit = exit_control::SAVE_DEBUG
            | exit_control::HOST_64BIT
            | exit_control::SAVE_PAT
            | exit_control::LOAD_PAT
            | exit_control::SAVE_EFER
            | exit_control::LOAD_EFER;
        if cet {
            entry |= entry_control::LOAD_CET;
            exit |= exit_control::LOAD_CET;
        }
        let second = secondary::EPT
            | secondary::VPID
            | secondary::UNRESTRICTED_GUEST
            | secondary::RDTSCP
            | secondary::INVPCID
            | secondary::WBINVD;
        let first = processor::HLT
            | processor::MWAIT
            | processor::RDPMC
            | processor::CR8_LOAD
            | processor::CR8_STORE
            | processor::IO
            | processor::MONITOR
            | processor::TSC_OFFSET
            | processor::MSR_BITMAP
            | processor::SECONDARY;
        for (number, wanted, capability) in [
            (
                field::PIN_CONTROLS,
                pin::EXTERNAL_INTERRUPT | pin::NMI | pin::VIRTUAL_NMI | pin::PREEMPTION_TIMER,
                vmx.pin,
            ),
            (field::PROCESSOR_CONTROLS, first, vmx.processor),
            (field::SECONDARY_CONTROLS, second, vmx.secondary),
            (field::EXIT_CONTROLS, exit, vmx.exit),
            (field::ENTRY_CONTROLS, entry, vmx.entry),
        ] {
            write(number, adjust(wanted, capability).into());
        }
        write(field::VPID, vpid.into());
        write(field::EPT_POINTER, slat | 3 << 3 | 6);
        write(field::MSR_BITMAP, self.info.child_msr_map);
        write(field::LINK_POINTER, u64::MAX);
        write(field::CR0_MASK, CR0_OWNED);
        write(field::EXCEPTION_BITMAP, exception::INTERCEPTED.into());
        for zero in [
            field::PAGE_FAULT_MASK,
            field::PAGE_FAULT_MATCH,
            field::CR3_TARGET_COUNT,
            field::EXIT_MSR_STORE_COUNT,
            field::EXIT_MSR_LOAD_COUNT,
            field::ENTRY_MSR_LOAD_COUNT,
            field::ENTRY_INTERRUPTION,
            field::GUEST_ACTIVITY,
            field::GUEST_PENDING_DEBUG,
        ] {
            write(zero, 0);
        }
        if cet {
            for zero in [
                field::GUEST_S_CET,
                field::GUEST_SSP,
                field::GUEST_SSP_TABLE,
                field::HOST_S_CET,
                field::HOST_SSP,
                field::HOST_SSP_TABLE,
            ] {
                write(zero, 0);
            }
        }
    }
}

/// Keeps the root's MSRs.
pub fn keep_msrs(core: &mut VpCore) {
    core.root_msrs = SWITCHED.map(rdmsr);
}

/// Hands the MSRs to the child.
pub fn msrs_to_child(core: &mut VpCore) {
    let root = core.root_msrs;
    for ((number, value), root) in SWITCHED
        .into_iter()
        .zip(switched(&mut core.state))
        .zip(root)
    {
        if root != *value {
            // SAFETY: the VMM's or the guest's value; what would fault (an address that is not canonical, the upper half of
            // SFMASK) was refused when it was set.
            unsafe { wrmsr(number, *value) };
        }
    }
}

/// The way back.
pub fn msrs_to_root(core: &mut VpCore) {
    let root = core.root_msrs;
    for ((number, value), root) in SWITCHED
        .into_iter()
        .zip(switched(&mut core.state))
        .zip(root)
    {
        *value = rdmsr(number);
        if *value != root {
            // SAFETY: the root's own value.
            unsafe { wrmsr(number, root) };
        }
    }
    const _: () = assert!(msr::EFER == 0xc000_0080);
}

/// The way back after a fault.
pub fn rescue_msrs(core: &VpCore) {
    for (number, root) in SWITCHED.into_iter().zip(core.root_msrs) {
        // SAFETY: as above.
        unsafe { wrmsr(number, root) };
    }
}

const SEGMENT_STRIDE: u32 = 2;

fn set_segment(index: u32, s: Segment) {
    let step = SEGMENT_STRIDE * index;
    write(field::GUEST_ES_SELECTOR + step, s.selector.into());
    write(field::GUEST_ES_BASE + step, s.base);
    write(field::GUEST_ES_LIMIT + step, s.limit.into());
    write(field::GUEST_ES_RIGHTS + step, s.rights.into());
}

fn get_segment(index: u32) -> Segment {
    let step = SEGMENT_STRIDE * index;
    Segment {
        selector: read(field::GUEST_ES_SELECTOR + step) as u16,
        base: read(field::GUEST_ES_BASE + step),
        limit: read(field::GUEST_ES_LIMIT + step) as u32,
        rights: read(field::GUEST_ES_RIGHTS + step) as u32,
    }
}

fn set_processor_control(bit: u32, on: bool) {
    let old = read(field::PROCESSOR_CONTROLS);
    let new = if on {
        old | u64::from(bit)
    } else {
        old & !u64::from(bit)
    };
    if new != old {
        write(field::PROCESSOR_CONTROLS, new);
    }
}

#[inline(always)]
fn get_cr0() -> u64 {
    read(field::GUEST_CR0) & !CR0_OWNED | read(field::CR0_SHADOW) & CR0_OWNED
}

fn set_cr0(value: u64) {
    write(field::CR0_SHADOW, value);
    write(field::GUEST_CR0, value & !(cr0::CD | cr0::NW) | cr0::NE);
}

/// CR4 as the guest sees it. Bits that are owned only because its CPUID lacks them are the same in both fields.
#[inline(always)]
fn get_cr4() -> u64 {
    read(field::GUEST_CR4) & CR4_FREE | read(field::CR4_SHADOW) & !CR4_FREE
}

fn set_cr4(value: u64) {
    write(field::CR4_SHADOW, value);
    write(field::GUEST_CR4, value & CR4_ALLOWED | cr4::VMXE | cr4::MCE);
}

/// Moves behind an instruction, which ends interrupt shadows.
#[inline(always)]
fn step_over(length: u64) {
    write(
        field::GUEST_RIP,
        read_known(field::GUEST_RIP).wrapping_add(length),
    );
    let shadow = read_known(field::GUEST_INTERRUPTIBILITY);
    if shadow & (BLOCKING_STI | BLOCKING_MOVSS) != 0 {
        write(
            field::GUEST_INTERRUPTIBILITY,
            shadow & !(BLOCKING_STI | BLOCKING_MOVSS),
        );
    }
}

fn set_efer(value: u64, cr0_value: u64) {
    let mut value = value & !efer::LMA;
    let mut entry = read(field::ENTRY_CONTROLS) & !u64::from(entry_control::IA32E);
    if value & efer::LME != 0 && cr0_value & cr0::PG != 0 {
        value |= efer::LMA;
        entry |= u64::from(entry_control::IA32E);
    }
    write(field::GUEST_EFER, value);
    write(field::ENTRY_CONTROLS, entry);
}

/// An IRET that faulted has already ended the blocking of NMIs, which begins anew (SDM 28.2.3).
fn block_nmis_again(unblocked: bool) {
    if unblocked && read(field::VECTORING_INFORMATION) as u32 & VALID == 0 {
        let old = read(field::GUEST_INTERRUPTIBILITY);
        write(field::GUEST_INTERRUPTIBILITY, old | BLOCKING_NMI);
    }
}

/// Tells NMIs from exceptions. What an exception's delivery would have changed is changed here (SDM 28.1, 19.2.3).
fn exception_or_nmi() -> ChildExit {
    let info = read(field::EXIT_INTERRUPTION) as u32;
    if info >> 8 & 7 == TYPE_NMI {
        return ChildExit::Nmi;
    }
    if info & 0xff == exception::MACHINE_CHECK.into() {
        return ChildExit::MachineCheck;
    }
    if info & 0xff == exception::DEBUG.into() {
        // B0-B3, BD and BS as in DR6; RTM the other way round.
        let causes = read(field::EXIT_QUALIFICATION);
        set_dr6(dr6() & !(0xf | DR6_RTM) | causes & 0x600f | !causes & DR6_RTM);
        write(field::GUEST_DR7, read(field::GUEST_DR7) & !DR7_GD);
        write(
            field::GUEST_DEBUGCTL,
            read(field::GUEST_DEBUGCTL) & !DEBUGCTL_LBR,
        );
        // With a shadow and TF the entry would want a trap that is pending; the exception ends the shadow.
        let shadow = read(field::GUEST_INTERRUPTIBILITY);
        write(
            field::GUEST_INTERRUPTIBILITY,
            shadow & !(BLOCKING_STI | BLOCKING_MOVSS),
        );
        // INT1 is a trap behind its instruction.
        write(
            field::ENTRY_INSTRUCTION_LENGTH,
            read(field::EXIT_INSTRUCTION_LENGTH),
        );
    }
    block_nmis_again(info & UNBLOCKED_BY_IRET != 0);
    ChildExit::Exception {
        info: info & !UNBLOCKED_BY_IRET,
        error: read(field::EXIT_ERROR_CODE) as u32,
    }
}

/// The access of an exit for I/O with this qualification: size - 1 in 2:0, IN 3, string 4, REP 5, port in 31:16 (SDM table 28-5).
#[inline(always)]
fn io_access(q: u64) -> IoAccess {
    let string = q & 16 != 0;
    IoAccess {
        port: (q >> 16) as u16,
        size: (q & 7) as u8 + 1,
        is_in: q & 8 != 0,
        string,
        rep: q & 32 != 0,
        segment: if string {
            (read(field::EXIT_INSTRUCTION_INFORMATION) >> 15 & 7) as u8
        } else {
            0
        },
        length: read(field::EXIT_INSTRUCTION_LENGTH) as u8,
    }
}

impl ChildHardware for VmxChild {
    const KEEPS_POINTERS: bool = true;

    #[inline(always)]
    fn is_undisturbed(&self, _: &VpCore) -> bool {
        read_known(field::VECTORING_INFORMATION) as u32 & VALID == 0
            && read_known(field::GUEST_RFLAGS) & rflags::TF == 0
    }

    #[inline(always)]
    fn quick_exit(&mut self) -> Option<QuickExit> {
        match read_known(field::EXIT_REASON) as u32 {
            reason::CPUID => Some(QuickExit::Cpuid),
            reason::VMCALL => Some(QuickExit::Hypercall),
            reason::RDMSR => Some(QuickExit::MsrRead),
            _ => None,
        }
    }

    #[inline(always)]
    fn is_port(&self) -> bool {
        read_known(field::EXIT_REASON) as u32 == reason::IO
    }

    #[inline(always)]
    fn quick_port(&mut self) -> Option<IoAccess> {
        let q = read(field::EXIT_QUALIFICATION);
        // No string.
        (q & 0x10 == 0).then(|| io_access(q))
    }

    #[inline(always)]
    fn quick_write(&mut self, core: &VpCore) -> Option<PortWrite> {
        let q = read_known(field::EXIT_QUALIFICATION);
        // IN, string or REP.
        (q & 0x38 == 0).then(|| PortWrite {
            port: (q >> 16) as u16,
            size: (q & 7) as u8 + 1,
            length: read_known(field::EXIT_INSTRUCTION_LENGTH) as u8,
            value: core.state.context.gprs[0] as u32,
        })
    }

    fn load_general(&mut self, core: &VpCore) {
        let s = &core.state;
        write(field::GUEST_RSP, s.context.gprs[RSP]);
        write(field::GUEST_RIP, s.rip);
        write(field::GUEST_RFLAGS, s.rflags & 0x3f_7fd7 | 2);
    }

    fn load(&mut self, core: &VpCore) {
        self.load_general(core);
        let s = &core.state;
        set_cr0(s.cr0);
        set_cr4(s.cr4);
        write(field::CR4_MASK, !(CR4_FREE & s.features.cr4));
        set_efer(s.efer, s.cr0);
        write(field::GUEST_CR3, s.cr3);
        write(field::GUEST_PAT, s.pat);
        write(field::GUEST_DR7, s.dr7);
        write(field::GUEST_DEBUGCTL, s.debugctl);
        for (index, segment) in s.segments.into_iter().enumerate() {
            set_segment(index as u32, segment);
        }
        write(field::GUEST_GDTR_BASE, s.gdtr.base);
        write(field::GUEST_GDTR_LIMIT, s.gdtr.limit.into());
        write(field::GUEST_IDTR_BASE, s.idtr.base);
        write(field::GUEST_IDTR_LIMIT, s.idtr.limit.into());
        write(field::GUEST_SYSENTER_CS, s.sysenter_cs);
        write(field::GUEST_SYSENTER_ESP, s.sysenter_esp);
        write(field::GUEST_SYSENTER_EIP, s.sysenter_eip);
        write(field::TSC_OFFSET, s.tsc_offset);
        let shadow = if s.interrupt_shadow { BLOCKING_STI } else { 0 };
        let masked = if s.nmi_masked { BLOCKING_NMI } else { 0 };
        // STI blocking needs RFLAGS.IF (SDM 27.3.1.5).
        let shadow = if s.rflags & rflags::IF == 0 && shadow != 0 {
            BLOCKING_MOVSS
        } else {
            shadow
        };
        write(field::GUEST_INTERRUPTIBILITY, shadow | masked);
        write(field::GUEST_PENDING_DEBUG, 0);
    }

    fn jump_quick(&mut self, _: &VpCore, rip: u64) -> bool {
        let blocks = read_known(field::GUEST_INTERRUPTIBILITY) & (BLOCKING_STI | BLOCKING_MOVSS);
        if blocks == 0 {
            write(field::GUEST_RIP, rip);
        }
        blocks == 0
    }

    fn store_general(&self, core: &mut VpCore) {
        let s = &mut core.state;
        s.context.gprs[RSP] = read(field::GUEST_RSP);
        s.rip = read(field::GUEST_RIP);
        s.rflags = read(field::GUEST_RFLAGS);
        let shadow = read(field::GUEST_INTERRUPTIBILITY);
        s.interrupt_shadow = shadow & (BLOCKING_STI | BLOCKING_MOVSS) != 0;
        s.nmi_masked = shadow & BLOCKING_NMI != 0;
    }

    fn shown(&self, _: &VpCore) -> Shown {
        Shown {
            segments: core::array::from_fn(|index| segment_value(&get_segment(index as u32))),
            cr0: get_cr0(),
            cr3: read(field::GUEST_CR3),
            cr4: get_cr4(),
            efer: read(field::GUEST_EFER),
            dr7: read(field::GUEST_DR7),
        }
    }

    fn store(&mut self, core: &mut VpCore) {
        self.store_general(core);
        let s = &mut core.state;
        s.cr0 = get_cr0();
        s.cr4 = get_cr4();
        s.cr3 = read(field::GUEST_CR3);
        s.efer = read(field::GUEST_EFER);
        s.pat = read(field::GUEST_PAT);
        s.dr7 = read(field::GUEST_DR7);
        s.debugctl = read(field::GUEST_DEBUGCTL);
        for (index, segment) in s.segments.iter_mut().enumerate() {
            *segment = get_segment(index as u32);
        }
        s.gdtr.base = read(field::GUEST_GDTR_BASE);
        s.gdtr.limit = read(field::GUEST_GDTR_LIMIT) as u16;
        s.idtr.base = read(field::GUEST_IDTR_BASE);
        s.idtr.limit = read(field::GUEST_IDTR_LIMIT) as u16;
        s.sysenter_cs = read(field::GUEST_SYSENTER_CS);
        s.sysenter_esp = read(field::GUEST_SYSENTER_ESP);
        s.sysenter_eip = read(field::GUEST_SYSENTER_EIP);
    }

    #[inline(always)]
    fn peek(&mut self, core: &mut VpCore) {
        let s = &mut core.state;
        s.cr0 = get_cr0();
        s.cr4 = get_cr4();
        s.efer = read(field::GUEST_EFER);
        s.rip = read(field::GUEST_RIP);
        s.segments[segment::CS].rights = read(field::GUEST_CS_RIGHTS) as u32;
        s.segments[segment::SS].rights = read(field::GUEST_SS_RIGHTS) as u32;
    }

    fn after_exit(&mut self, core: &mut VpCore) {
        let vectoring = read(field::VECTORING_INFORMATION) as u32;
        core.requeue = if vectoring & VALID != 0 {
            write(
                field::ENTRY_INSTRUCTION_LENGTH,
                read(field::EXIT_INSTRUCTION_LENGTH),
            );
            (
                vectoring & !(1 << 12),
                read(field::VECTORING_ERROR_CODE) as u32,
            )
        } else {
            (0, 0)
        };
        if core.window_requested {
            core.window_requested = false;
            set_processor_control(processor::INTERRUPT_WINDOW | processor::NMI_WINDOW, false);
        }
    }

    fn exit(&mut self, _: &mut VpCore) -> ChildExit {
        let full = read(field::EXIT_REASON) as u32;
        if full & ENTRY_FAILED != 0 {
            return if full & 0xffff == reason::ENTRY_FAILURE_MACHINE_CHECK {
                ChildExit::MachineCheck
            } else {
                ChildExit::InvalidState {
                    reason: full.into(),
                    qualification: read(field::EXIT_QUALIFICATION),
                }
            };
        }
        match full & 0xffff {
            reason::EXTERNAL_INTERRUPT | reason::PREEMPTION_TIMER => ChildExit::ExternalInterrupt,
            reason::EXCEPTION_OR_NMI => exception_or_nmi(),
            reason::INTERRUPT_WINDOW => ChildExit::Window,
            reason::NMI_WINDOW => ChildExit::Window,
            reason::CPUID => ChildExit::Cpuid,
            reason::HLT => ChildExit::Halt,
            reason::VMCALL => ChildExit::Hypercall,
            reason::RDMSR => ChildExit::MsrRead,
            reason::WRMSR => ChildExit::MsrWrite,
            reason::XSETBV => ChildExit::Xsetbv,
            reason::TRIPLE_FAULT => ChildExit::TripleFault,
            reason::INIT | reason::SIPI => ChildExit::Nmi,
            reason::IO => ChildExit::Io(io_access(read(field::EXIT_QUALIFICATION))),
            reason::CR_ACCESS => {
                let q = read(field::EXIT_QUALIFICATION);
                let register = (q >> 8 & 15) as u8;
                match (q & 15, q >> 4 & 3) {
                    (number @ (0 | 4), 0) => ChildExit::ControlRegisterWrite {
                        register: number as u8,
                        source: register,
                    },
                    (8, 0) => ChildExit::TaskPriority {
                        write: true,
                        register,
                    },
                    (8, 1) => ChildExit::TaskPriority {
                        write: false,
                        register,
                    },
                    _ => ChildExit::Undefined,
                }
            }
            reason::EPT_VIOLATION => {
                let q = read(field::EXIT_QUALIFICATION);
                block_nmis_again(q as u32 & UNBLOCKED_BY_IRET != 0);
                ChildExit::Fault {
                    gpa: read(field::GUEST_PHYSICAL_ADDRESS),
                    write: q & 2 != 0,
                    execute: q & 4 != 0,
                    gva: (q & 0x180 == 0x180).then(|| read(field::GUEST_LINEAR_ADDRESS)),
                }
            }
            reason::INVD | reason::WBINVD | 40 => ChildExit::Nop,
            reason::GETSEC
            | reason::VMCLEAR..=reason::VMXON
            | reason::INVEPT
            | reason::INVVPID
            | 36
            | 39
            | 15 => ChildExit::Undefined,
            other => ChildExit::Unknown(other.into()),
        }
    }

    #[inline(always)]
    fn instruction_length(&self) -> u64 {
        read(field::EXIT_INSTRUCTION_LENGTH)
    }

    #[inline(always)]
    fn skip(&mut self, core: &mut VpCore, length: u64) {
        step_over(length);
        if read(field::GUEST_RFLAGS) & rflags::TF != 0 {
            self.trap_step(core);
        }
    }

    fn trap_step(&mut self, core: &mut VpCore) {
        let control = if core.in_hardware {
            read(field::GUEST_DEBUGCTL)
        } else {
            core.state.debugctl
        };
        // With BTF only branches trap.
        if control & 2 == 0 {
            write(
                field::GUEST_PENDING_DEBUG,
                read(field::GUEST_PENDING_DEBUG) | 1 << 14,
            );
        }
    }

    #[inline(always)]
    fn eax(&self, core: &VpCore) -> u32 {
        core.state.context.gprs[0] as u32
    }

    #[inline(always)]
    fn cr4_and_long(&self) -> (u64, bool) {
        // The entry control follows EFER.LMA; bit 13 of the rights is L.
        let long = read_known(field::GUEST_EFER) & efer::LMA != 0
            && read_known(field::GUEST_CS_RIGHTS) & 1 << 13 != 0;
        // The child's own in the bits that the shadow does not hold.
        (read_known(field::GUEST_CR4) & CR4_FREE, long)
    }

    #[inline(always)]
    fn is_kernel(&self) -> bool {
        read_known(field::GUEST_SS_RIGHTS) & 0x60 == 0
            && read_known(field::GUEST_CR0) & cr0::PE != 0
    }

    #[inline(always)]
    fn skip_quick(&mut self, _: u64) {
        let length = read_known(field::EXIT_INSTRUCTION_LENGTH);
        step_over(length);
    }

    #[inline(always)]
    fn skip_port(&mut self) {
        self.skip_quick(0);
    }

    #[inline(always)]
    fn rax(&mut self, core: &mut VpCore, value: u64) {
        core.state.context.gprs[0] = value;
    }

    fn inject(&mut self, info: u32, error: u32) {
        // Outside protected mode no exception has an error code (SDM 27.2.1.3).
        let info = if read(field::GUEST_CR0) & cr0::PE == 0 {
            info & !WITH_ERROR
        } else {
            info
        };
        write(field::ENTRY_INTERRUPTION, info.into());
        write(field::ENTRY_ERROR_CODE, error.into());
    }

    fn inject_nmi(&mut self, _: &mut VpCore) {
        write(
            field::ENTRY_INTERRUPTION,
            u64::from(VALID | TYPE_NMI << 8 | 2),
        );
    }

    fn inject_interrupt(&mut self, vector: u8) {
        write(
            field::ENTRY_INTERRUPTION,
            u64::from(VALID | u32::from(vector)),
        );
    }

    fn exception(vector: u8, error: Option<u32>) -> (u32, u32) {
        let with = if error.is_some() { WITH_ERROR } else { 0 };
        (
            VALID | TYPE_EXCEPTION << 8 | with | u32::from(vector),
            error.unwrap_or(0),
        )
    }

    fn interrupts_open(&self, _: &VpCore) -> bool {
        self.interrupt_flag()
            && read(field::GUEST_INTERRUPTIBILITY) & (BLOCKING_STI | BLOCKING_MOVSS) == 0
    }

    fn interrupt_flag(&self) -> bool {
        read(field::GUEST_RFLAGS) & rflags::IF != 0
    }

    fn nmis_open(&self, _: &VpCore) -> bool {
        read(field::GUEST_INTERRUPTIBILITY) & (BLOCKING_STI | BLOCKING_MOVSS | BLOCKING_NMI) == 0
    }

    fn end_nmi(&mut self, _: &mut VpCore) {}

    fn request_window(&mut self) {
        set_processor_control(processor::INTERRUPT_WINDOW, true);
    }

    fn request_nmi_window(&mut self, _: &mut VpCore) {
        set_processor_control(processor::NMI_WINDOW, true);
    }

    fn before_entry(&mut self, core: &mut VpCore, flush: bool) {
        core.window_requested = read(field::PROCESSOR_CONTROLS) as u32
            & (processor::INTERRUPT_WINDOW | processor::NMI_WINDOW)
            != 0;
        if read(field::PIN_CONTROLS) as u32 & pin::PREEMPTION_TIMER != 0 {
            // A bound on the time away from the root that does not depend on interrupts: some processors' models hold
            // them back while the child has IF clear. The timer counts at the TSC's rate shifted right (SDM A.6).
            let rate = self.info.vmx.misc & 31;
            write(
                field::PREEMPTION_TIMER,
                (self.info.tsc_hz / RUNS_PER_SECOND >> rate).min(u64::from(u32::MAX)),
            );
        }
        if flush {
            invept(read(field::EPT_POINTER));
            invvpid(core.vpid.into());
        }
    }

    fn paging(&self) -> Paging {
        Paging {
            cr0: get_cr0(),
            cr3: read(field::GUEST_CR3),
            cr4: get_cr4(),
            efer: read(field::GUEST_EFER),
        }
    }

    fn set_pointers(&mut self, pointers: [u64; 4]) {
        for (number, pointer) in (field::GUEST_PDPTE0..).step_by(2).zip(pointers) {
            write(number, pointer);
        }
    }

    fn forward_nmi(&mut self, area_cpu: u32) {
        if read(field::EXIT_REASON) as u32 & 0xffff == reason::EXCEPTION_OR_NMI {
            resend_nmi(area_cpu);
        }
    }
}
