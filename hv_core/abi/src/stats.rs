// SPDX-License-Identifier: GPL-2.0
//! Per-CPU statistics page: written by the image, readable by the root at any time.

use core::sync::atomic::AtomicU64;

/// Kinds of exits, the same names on both vendors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum ExitKind {
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
    /// MOV to or from a control register.
    ControlRegister,
    /// Second-level translation fault.
    SecondLevelFault,
    /// A VMX or SVM instruction.
    VirtualizationInstruction,
    /// INVD or WBINVD.
    CacheInvalidate,
    /// INIT signal.
    Init,
    /// Start-up IPI.
    Sipi,
    /// HLT.
    Halt,
    /// IN or OUT.
    IoPort,
    /// External interrupt while a child ran.
    ExternalInterrupt,
    /// NMI while a child ran.
    Nmi,
    /// Intercepted exception.
    Exception,
    /// Triple fault.
    TripleFault,
    /// Interrupt or NMI window.
    Window,
    /// The processor refused the entry.
    EntryFailure,
    /// Any other reason.
    Other,
}

/// Number of [`ExitKind`] values.
pub const EXIT_KINDS: usize = ExitKind::Other as usize + 1;

/// Names of the kinds as `status` prints them, by index.
pub const EXIT_NAMES: [&str; EXIT_KINDS] = [
    "cpuid",
    "hypercall",
    "msr_read",
    "msr_write",
    "xsetbv",
    "control_register",
    "second_level_fault",
    "virtualization_instruction",
    "cache_invalidate",
    "init",
    "sipi",
    "halt",
    "io_port",
    "external_interrupt",
    "nmi",
    "exception",
    "triple_fault",
    "window",
    "entry_failure",
    "other",
];

/// One page per CPU.
#[repr(C, align(4096))]
pub struct StatsPage {
    /// Exits of the root since launch, by [`ExitKind`].
    pub root_exits: [AtomicU64; EXIT_KINDS],
    /// Exits of children run on this CPU, by [`ExitKind`].
    pub child_exits: [AtomicU64; EXIT_KINDS],
    /// NMIs that arrived while the image ran and were handed on to the root.
    pub host_nmis: AtomicU64,
    /// Accesses to sealed pages that were refused.
    pub sealed_accesses: AtomicU64,
    /// Faults of the image on this CPU, which it gave back.
    pub faults: AtomicU64,
}

const _: () = assert!(core::mem::size_of::<StatsPage>() == 4096);
