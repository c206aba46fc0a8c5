// SPDX-License-Identifier: GPL-2.0
//! The worker process of one child partition.
//!
//! `vmwp` creates a partition on `/dev/mshv`, puts a Linux kernel into its memory, and runs one thread per virtual
//! processor (VP). What the hypervisor does not finish itself comes back as an intercept message; the devices that
//! answer these messages live here.
//!
//! | module | idea |
//! |---|---|
//! | [`cli`] | the options, shared with `hvctl run` |
//! | [`layout`] | the guest-physical address map |
//! | [`boot`] | kernel, initrd, zero page, first register state |
//! | [`acpi`] | the tables that describe the machine |
//! | [`device`] | UART, IOAPIC, clock, power control, and the buses that find them |
//! | [`vp`] | intercept messages, their completion, the run loop |
//! | [`partition`] | the only module that talks to `/dev/mshv` |
//! | [`io`] | console, control socket, event loop |
//! | [`control`] | the protocol of the control socket, shared with `hvctl` |
//! | [`outcome`] | why a partition ended, as exit code, sentence and JSON |
//! | [`worker`] | puts all of it together |
//!
//! Everything but [`partition`] and [`io`] is pure and runs under `cargo test` on any machine.

pub mod acpi;
pub mod boot;
pub mod cli;
pub mod control;
pub mod device;
pub mod error;
pub mod io;
pub mod layout;
pub mod outcome;
pub mod partition;
pub mod vp;
pub mod worker;

pub use error::{Error, Result};
