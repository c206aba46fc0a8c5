// SPDX-License-Identifier: GPL-2.0
//! The hypervisor image.
//!
//! A freestanding program that runs beneath Linux: entered by VM exits, it finishes them and resumes.
//! It has its own page tables, descriptor tables and stacks, calls nothing in the kernel and allocates
//! nothing that was not given to it. Privileged instructions live in `arch/` only; the rest is pure over
//! the traits of [`arch`] and runs under `cargo test`, on the memory of [`arch::host`].
#![cfg_attr(not(test), no_std)]

pub mod apic;
pub mod arch;
pub mod child;
pub mod child_cpuid;
pub mod child_emulate;
pub mod child_hypercall;
pub mod child_msr;
pub mod child_synic;
pub mod cpuid_cache;
pub mod guest_call;
mod header;
pub mod hypercall;
pub mod log;
pub mod memory;
pub mod messages;
pub mod partition;
pub mod register_page;
pub mod registers;
pub mod root;
pub mod slat;
pub mod stimer;
pub mod synic;
pub mod translate;
pub mod vp;
pub mod vp_state;
pub mod xsave;

#[cfg(target_os = "none")]
mod fault;
