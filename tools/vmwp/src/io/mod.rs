// SPDX-License-Identifier: GPL-2.0
//! Everything that waits for the outside world: console, control socket, signals.

pub mod output;
pub mod server;
pub mod session;
pub mod terminal;

pub use output::{ConsoleWriter, Output};
pub use server::{Server, ServerParts};
