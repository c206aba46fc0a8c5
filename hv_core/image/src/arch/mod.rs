// SPDX-License-Identifier: GPL-2.0
//! The seam between the two vendors and the rest of the image.
//!
//! `vmx/` and `svm/` hold the only privileged instructions and the only knowledge of VMCS and VMCB.
//! What they have in common is the trait [`Processor`]; exit handling is generic over it, and host tests
//! give it a processor of their own.

use hv_abi::boot::VpContext;
use hv_abi::hypercall::{Control, DispatchEvent, PortWrite};
use hv_abi::stats::ExitKind;
use hv_abi::status::HvStatus;

use crate::child_msr::Paging;
use crate::register_page::Shown;
use crate::vp::VpCore;

pub mod cpu;
#[cfg(target_os = "none")]
pub mod dispatch;
#[cfg(not(target_os = "none"))]
pub mod host;
pub mod memory;
pub mod object;
#[cfg(target_os = "none")]
pub mod svm;
pub mod switch;
#[cfg(target_os = "none")]
pub mod vmx;

/// Why the processor left the virtual processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// CPUID.
    Cpuid,
    /// VMCALL or VMMCALL.
    Hypercall,
    /// RDMSR.
    MsrRead,
    /// WRMSR.
    MsrWrite,
    /// XSETBV.
    Xsetbv,
    /// MOV to CR0 or CR4 from general register `source` that changes bits the image owns.
    ControlRegisterWrite {
        /// 0 or 4.
        register: u8,
        /// Number of the general register.
        source: u8,
    },
    /// Access that the second-level tables refuse.
    SecondLevelFault {
        /// The guest physical address.
        gpa: u64,
        /// The access was a write.
        write: bool,
        /// The access was an instruction fetch.
        execute: bool,
    },
    /// An instruction of the virtualization extension.
    VirtualizationInstruction,
    /// INVD, which must not lose Linux' dirty lines.
    Invd,
    /// INIT signal.
    Init,
    /// Start-up IPI with its vector.
    Sipi(u8),
    /// Triple fault.
    TripleFault,
    /// The processor refused the VM entry.
    EntryFailure,
    /// Nothing this image knows.
    Unknown,
}

impl Exit {
    /// The statistics row.
    pub const fn kind(self) -> ExitKind {
        match self {
            Self::Cpuid => ExitKind::Cpuid,
            Self::Hypercall => ExitKind::Hypercall,
            Self::MsrRead => ExitKind::MsrRead,
            Self::MsrWrite => ExitKind::MsrWrite,
            Self::Xsetbv => ExitKind::Xsetbv,
            Self::ControlRegisterWrite { .. } => ExitKind::ControlRegister,
            Self::SecondLevelFault { .. } => ExitKind::SecondLevelFault,
            Self::VirtualizationInstruction => ExitKind::VirtualizationInstruction,
            Self::Invd => ExitKind::CacheInvalidate,
            Self::Init => ExitKind::Init,
            Self::Sipi(_) => ExitKind::Sipi,
            Self::TripleFault => ExitKind::TripleFault,
            Self::EntryFailure => ExitKind::EntryFailure,
            Self::Unknown => ExitKind::Other,
        }
    }
}

/// Exceptions that the image raises in a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exception {
    /// #UD, invalid opcode.
    InvalidOpcode,
    /// #GP(0), general protection.
    GeneralProtection,
}

/// General register numbers (SDM table 28-3), the index into [`VpContext::gprs`].
#[allow(missing_docs)] // The names are the registers'.
pub mod gpr {
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
    pub const R8: usize = 8;
}

/// What the root asks about a VP after a dispatch.
#[derive(Clone, Copy)]
pub enum Work {
    /// Fill the register page, and the message page if it left with a write to a port.
    Show,
    /// Give the hypercall with which it left this status.
    Fail(HvStatus),
}

/// The processor at a VM exit: the virtual processor that was left, and instructions to execute on its
/// behalf.
pub trait Processor {
    /// Why it exited.
    fn exit(&mut self) -> Exit;
    /// Its general registers.
    fn context(&mut self) -> &mut VpContext;
    /// Its current privilege level.
    fn cpl(&self) -> u8;
    /// Its CR4 as it sees it.
    fn cr4(&self) -> u64;
    /// Its instruction pointer.
    fn rip(&self) -> u64;
    /// Its stack pointer.
    fn rsp(&self) -> u64;
    /// Moves it past the exiting instruction: ends interrupt shadows, keeps a pending single step.
    fn skip(&mut self);
    /// Raises an exception at the current instruction.
    fn raise(&mut self, exception: Exception);
    /// Writes CR0 or CR4 (`register` 0 or 4) as the guest asked, keeping the bits the image owns.
    /// Returns false if the processor would refuse the value.
    fn write_control_register(&mut self, register: u8, value: u64) -> bool;
    /// Reads an MSR that the image shadows; `None`: the guest gets #GP.
    fn read_msr(&mut self, msr: u32) -> Option<u64>;
    /// Writes an MSR that the image shadows; `None`: the guest gets #GP.
    fn write_msr(&mut self, msr: u32, value: u64) -> Option<()>;
    /// Drops all second-level translations of the root on this CPU.
    fn flush_second_level(&mut self);
    /// Puts it into the wait-for-SIPI state.
    fn wait_for_sipi(&mut self);
    /// Starts it at the real-mode address `vector << 12`.
    fn start(&mut self, vector: u8);
    /// Executes CPUID.
    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4];
    /// Executes XSETBV on behalf of the guest; the value was validated.
    fn xsetbv(&mut self, value: u64);
    /// Reads XCR0's supported bits from CPUID leaf 0dh.
    fn supported_xcr0(&mut self) -> u64 {
        let [eax, _, _, edx] = self.cpuid(0xd, 0);
        u64::from(eax) | (u64::from(edx) << 32)
    }
    /// The CPU has proved that it runs beneath the image: the launch is over.
    fn proved(&mut self) {}
    /// Writes back and invalidates the caches.
    fn wbinvd(&mut self);
    /// Resets the machine.
    fn reset(&mut self) -> !;
    /// A hypercall about partitions; RAX.
    fn call(&mut self, control: Control, input: u64, output: u64) -> u64;
    /// HvCallDispatchVp with RDX and R8: `Ok(None)` if a child runs next.
    fn dispatch(&mut self, partition: u64, vp: u64) -> Result<Option<DispatchEvent>, HvStatus>;
    /// Does something with the registers of a VP that nobody runs.
    fn on_stopped_vp(&mut self, partition: u64, index: u32, work: Work) -> Result<(), HvStatus>;
    /// Faults in the way `how` names (test aid).
    fn fault(&mut self, how: u64);
    /// Returns the CPU to native operation at the current instruction.
    fn leave(&mut self) -> !;
}

/// An access to a port that a child made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoAccess {
    /// Port number.
    pub port: u16,
    /// Bytes: 1, 2 or 4.
    pub size: u8,
    /// IN or INS.
    pub is_in: bool,
    /// INS or OUTS.
    pub string: bool,
    /// With a REP prefix.
    pub rep: bool,
    /// Segment register of OUTS: ES, CS, SS, DS, FS, GS.
    pub segment: u8,
    /// Instruction length in bytes.
    pub length: u8,
}

/// Why a child's VP exited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChildExit {
    /// An interrupt of the machine waits for the root.
    ExternalInterrupt,
    /// An NMI (or SMI, or INIT) waits for the root.
    Nmi,
    /// The guest can take an interrupt now.
    Window,
    /// IRET, which ends the guest's NMI handler, comes next.
    Iret,
    /// CPUID.
    Cpuid,
    /// HLT.
    Halt,
    /// VMCALL or VMMCALL.
    Hypercall,
    /// RDMSR.
    MsrRead,
    /// WRMSR.
    MsrWrite,
    /// XSETBV.
    Xsetbv,
    /// IN, OUT, INS, OUTS.
    Io(IoAccess),
    /// MOV to CR0 or CR4 that changes bits the hypervisor owns.
    ControlRegisterWrite {
        /// 0 or 4.
        register: u8,
        /// General register.
        source: u8,
    },
    /// MOV to or from CR8.
    TaskPriority {
        /// To CR8.
        write: bool,
        /// General register.
        register: u8,
    },
    /// Second-level fault.
    Fault {
        /// Guest physical address.
        gpa: u64,
        /// Write access.
        write: bool,
        /// Instruction fetch.
        execute: bool,
        /// Linear address, where the processor gives it.
        gva: Option<u64>,
    },
    /// An instruction that does nothing here (INVD, WBINVD, PAUSE).
    Nop,
    /// An instruction that does not exist for a child.
    Undefined,
    /// #DB or #AC, in the form of [`ChildHardware::inject`]. The guest gets it; it exits because a guest could recurse in its
    /// delivery without an end, out of reach of interrupts.
    Exception {
        /// Event.
        info: u32,
        /// Its error code.
        error: u32,
    },
    /// A machine check, which is the root's.
    MachineCheck,
    /// Triple fault.
    TripleFault,
    /// The processor refused the registers.
    InvalidState {
        /// The vendor's code.
        reason: u64,
        /// What else it says: the exit qualification (SDM 27.8), or EXITINFO1.
        qualification: u64,
    },
    /// Nothing known, with the vendor's code.
    Unknown(u64),
}

/// An exit that general registers and the hypervisor's own state answer, of an instruction that nothing disturbed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuickExit {
    /// CPUID.
    Cpuid,
    /// VMCALL or VMMCALL.
    Hypercall,
    /// RDMSR.
    MsrRead,
}

/// The control structure of a child's VP.
pub trait ChildHardware {
    /// PAE paging uses page-directory pointers that the structure keeps (SDM 27.3.2.4), not those in memory (APM 15.25.10).
    const KEEPS_POINTERS: bool;

    /// Whether an exit cut no delivery of an event short, no trap is due after the instruction (RFLAGS.TF), and the guest
    /// changed nothing that only [`Self::after_exit`] takes in.
    fn is_undisturbed(&self, core: &VpCore) -> bool;
    /// The exit, if it is one of those; readies the structure for the next entry after an undisturbed exit.
    fn quick_exit(&mut self) -> Option<QuickExit>;
    /// Whether it exited for an access to a port.
    fn is_port(&self) -> bool;
    /// As [`Self::quick_exit`], for IN and OUT.
    fn quick_port(&mut self) -> Option<IoAccess>;
    /// The same for an OUT without a REP prefix only.
    fn quick_write(&mut self, core: &VpCore) -> Option<PortWrite>;
    /// Registers into the structure.
    fn load(&mut self, core: &VpCore);
    /// General registers, RIP and RFLAGS into the structure, where all others are up to date.
    fn load_general(&mut self, core: &VpCore);
    /// RIP alone. False, and nothing is done, if more than that depends on it: an instruction that blocks interrupts, or an IRET.
    fn jump_quick(&mut self, core: &VpCore, rip: u64) -> bool;
    /// Registers out of the structure.
    fn store(&mut self, core: &mut VpCore);
    /// Only those of [`Self::load_general`], and what blocks interrupts.
    fn store_general(&self, core: &mut VpCore);
    /// What a VMM sees of the others.
    fn shown(&self, core: &VpCore) -> Shown;
    /// Only the mode: CR0, CR4, EFER, RIP, the rights of CS and the privilege level (SS.DPL), for exits that need no more.
    fn peek(&mut self, core: &mut VpCore);
    /// First thing after an exit: what the exit interrupted, and the task priority.
    fn after_exit(&mut self, core: &mut VpCore);
    /// Why it exited.
    fn exit(&mut self, core: &mut VpCore) -> ChildExit;
    /// Length of the exiting instruction.
    fn instruction_length(&self) -> u64;
    /// Moves past it, with the registers in the structure.
    fn skip(&mut self, core: &mut VpCore, length: u64);
    /// Has the trap of a single step raised, wherever the registers are: an instruction with RFLAGS.TF was emulated.
    fn trap_step(&mut self, core: &mut VpCore);
    /// At a quick exit: EAX.
    fn eax(&self, core: &VpCore) -> u32;
    /// At a quick exit: CR4 without the bits that the hypervisor owns, and whether the VP is in 64-bit mode.
    fn cr4_and_long(&self) -> (u64, bool);
    /// At a quick exit: whether the VP is at CPL 0 in protected mode.
    fn is_kernel(&self) -> bool;
    /// At a quick exit: moves past the instruction, which has `usual` bytes without prefixes. No trap is due.
    fn skip_quick(&mut self, usual: u64);
    /// At a quick access to a port: moves past the instruction. No trap is due.
    fn skip_port(&mut self);
    /// At an exit: XMM0 to XMM5, which are still the guest's.
    fn xmm(&self) -> [u64; 12] {
        switch::xmm()
    }
    /// Sets RAX.
    fn rax(&mut self, core: &mut VpCore, value: u64);
    /// Delivers an event in VMX form (SDM 26.8.3) at the entry.
    fn inject(&mut self, info: u32, error: u32);
    /// Delivers an NMI at the entry.
    fn inject_nmi(&mut self, core: &mut VpCore);
    /// Delivers an external interrupt at the entry.
    fn inject_interrupt(&mut self, vector: u8);
    /// Has the processor take an interrupt of the local APIC by itself, if it can: then [`Self::after_exit`] acknowledges it once it
    /// was taken.
    fn offer_interrupt(&mut self, core: &mut VpCore, vector: u8) -> bool {
        let _ = (core, vector);
        false
    }
    /// An exception in the form of [`Self::inject`].
    fn exception(vector: u8, error: Option<u32>) -> (u32, u32);
    /// Whether an interrupt can be delivered at the entry.
    fn interrupts_open(&self, core: &VpCore) -> bool;
    /// RFLAGS.IF.
    fn interrupt_flag(&self) -> bool;
    /// Whether an NMI can be delivered at the entry.
    fn nmis_open(&self, core: &VpCore) -> bool;
    /// The guest's NMI handler ends with the next instruction.
    fn end_nmi(&mut self, core: &mut VpCore);
    /// Exit as soon as an interrupt can be delivered.
    fn request_window(&mut self);
    /// Exit as soon as an NMI can be delivered.
    fn request_nmi_window(&mut self, core: &mut VpCore);
    /// Last thing before an entry.
    fn before_entry(&mut self, core: &mut VpCore, flush: bool);
    /// An NMI ended the run: makes sure that the root takes it. Nothing to do where it stays pending.
    fn forward_nmi(&mut self, cpu: u32) {
        let _ = cpu;
    }
    /// What decides about paging, as the control structure has it.
    fn paging(&self) -> Paging;
    /// Takes the page-directory pointers, if [`Self::KEEPS_POINTERS`].
    fn set_pointers(&mut self, pointers: [u64; 4]) {
        let _ = pointers;
    }
}
