// SPDX-License-Identifier: GPL-2.0
//! The seam between the two vendors and the rest of the image.
//!
//! `vmx/` and `svm/` hold the only privileged instructions and the only knowledge of VMCS and VMCB.
//! What they have in common is the trait [`Processor`]; exit handling is generic over it, and host tests
//! give it a processor of their own.

use hv_abi::boot::VpContext;
use hv_abi::stats::ExitKind;

#[cfg(target_os = "none")]
mod cpu;
#[cfg(target_os = "none")]
pub mod svm;
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
    pub const R8: usize = 8;
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
    /// Writes back and invalidates the caches.
    fn wbinvd(&mut self);
    /// Resets the machine.
    fn reset(&mut self) -> !;
    /// Faults in the way `how` names (test aid).
    fn fault(&mut self, how: u64);
    /// Returns the CPU to native operation at the current instruction.
    fn leave(&mut self) -> !;
}
