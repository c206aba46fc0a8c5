// SPDX-License-Identifier: GPL-2.0
//! What the processor manuals define, and pure algorithms over it.
//!
//! Register bits and MSR numbers, VMCS fields and controls, the VMCB, captured processor state, the
//! page-table builder (EPT, NPT and the image's own tables) and the MTRR map. Shared by the image,
//! the launch code of the module, and host tests. No privileged instruction and no `unsafe` here.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod access;
pub mod mtrr;
pub mod paging;
pub mod regs;
pub mod root;
pub mod state;

pub mod vmcb;
pub mod vmcs;
