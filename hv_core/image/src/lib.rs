// SPDX-License-Identifier: GPL-2.0
//! The hypervisor image.
//!
//! A freestanding program that runs beneath Linux: entered by VM exits, it finishes them and resumes.
//! It has its own page tables, descriptor tables and stacks, calls nothing in the kernel and allocates
//! nothing that was not given to it. Privileged instructions live in `arch/` only; the rest is pure over
//! the traits of [`arch`] and runs under `cargo test`.
#![cfg_attr(not(test), no_std)]

pub mod apic;
pub mod arch;
pub mod child_cpuid;
pub mod child_msr;
pub mod cpuid_cache;
pub mod log;
pub mod messages;
pub mod register_page;
pub mod registers;
pub mod root;
pub mod slat;
pub mod translate;
pub mod vp_state;

#[cfg(target_os = "none")]
pub mod child;
#[cfg(target_os = "none")]
pub mod child_emulate;
#[cfg(target_os = "none")]
mod fault;
#[cfg(target_os = "none")]
mod header;
#[cfg(target_os = "none")]
pub mod hypercall;
#[cfg(target_os = "none")]
pub mod memory;
#[cfg(target_os = "none")]
pub mod partition;
#[cfg(target_os = "none")]
pub mod vp;
pub mod xsave;
