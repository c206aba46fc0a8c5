// SPDX-License-Identifier: GPL-2.0
//! Hypercall numbers and the control word (TLFS chapter 3).
//!
//! The register convention on x86-64 is the TLFS one: RCX holds the control word, RDX the input GPA or
//! first fast input, R8 the output GPA or second fast input; RAX returns the result value.

/// Hypercall input value, RCX (TLFS 3.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Control(pub u64);

impl Control {
    /// Builds the control word of a simple (not rep) call with no variable header.
    pub const fn simple(code: u16, fast: bool) -> Self {
        Self(code as u64 | ((fast as u64) << 16))
    }

    /// Call code, bits 15:0.
    pub const fn code(self) -> u16 {
        self.0 as u16
    }

    /// Whether the parameters are in registers, bit 16.
    pub const fn is_fast(self) -> bool {
        (self.0 >> 16) & 1 != 0
    }

    /// Rep count, bits 43:32.
    pub const fn rep_count(self) -> u16 {
        ((self.0 >> 32) & 0xfff) as u16
    }

    /// Index of the first rep to do, bits 59:48.
    pub const fn rep_start(self) -> u16 {
        ((self.0 >> 48) & 0xfff) as u16
    }
}

/// Result value, RAX (TLFS 3.8): status in bits 15:0, reps completed in bits 43:32.
pub const fn result(status: super::status::HvStatus, reps_done: u16) -> u64 {
    status.0 as u64 | ((reps_done as u64 & 0xfff) << 32)
}

/// Calls between the module and the image that TLFS does not have. They are answered only to CPL 0 of
/// the root partition and use codes that TLFS leaves free.
pub mod private {
    /// Proves that this CPU runs beneath the image. Fast; returns the CPU index in RDX.
    pub const PROVE: u16 = 0xf000;
    /// Returns this CPU to native operation. Fast; the next instruction runs natively.
    pub const LEAVE: u16 = 0xf001;
    /// Invalidates this CPU's second-level translations of the root. Fast.
    pub const FLUSH: u16 = 0xf002;
    /// Makes the image fault in the way RDX selects (see [`super::fault`]). Test builds of the module
    /// call it; it is answered only when the boot information allows it.
    pub const FAULT: u16 = 0xf003;
}

/// What [`private::FAULT`] provokes.
pub mod fault {
    /// A general-protection fault.
    pub const GENERAL_PROTECTION: u64 = 0;
    /// A page fault by a read of an address that the image does not map.
    pub const PAGE_FAULT: u64 = 1;
    /// A Rust panic.
    pub const PANIC: u64 = 2;
}
