// SPDX-License-Identifier: GPL-2.0
//! The contract between the hypervisor image, the kernel module and the tools.
//!
//! Everything that two of them must agree on lives here: the image header, the boot information, the
//! address-space plan of the image, the per-CPU block, hypercall codes and status values, and the
//! pages both sides read. It is pure data: no `unsafe`, no privileged instruction, no allocation.
//! Behaviour belongs to `image/`, `launch/` or `root/`.
//!
//! The same source is an ordinary crate for `cargo test`, a library of the freestanding image, and a
//! module of the kernel object.
#![no_std]

pub mod boot;
pub mod features;
pub mod hypercall;
pub mod layout;
pub mod log;
pub mod mitigation;
pub mod partition;
pub mod stats;
pub mod status;
