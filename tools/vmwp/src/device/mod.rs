// SPDX-License-Identifier: GPL-2.0
//! The devices of the machine and the two buses that find them.

pub mod clock;
pub mod ioapic;
pub mod mmio;
pub mod ports;
pub mod power;
pub mod uart;

pub use mmio::MmioBus;
pub use ports::PortBus;

use ioapic::{Ioapic, LineTrigger};
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// An interrupt as the IOAPIC sends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupt {
    /// Delivery mode as in an IOAPIC entry; TLFS uses the same numbers for `HV_INTERRUPT_TYPE`.
    pub mode: u8,
    /// Vector.
    pub vector: u8,
    /// Destination: APIC id, or a set of logical ids.
    pub destination: u32,
    /// The destination is logical.
    pub logical: bool,
    /// The line is level-triggered; the hypervisor then reports its end.
    pub level: bool,
}

/// Takes interrupts to the VPs.
pub trait InterruptSink: Send + Sync {
    /// Asserts `interrupt`. A destination that does not exist is silently ignored, as on bare metal.
    fn assert(&self, interrupt: Interrupt);
}

/// The guest asked for the end of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// Power off (S5).
    Off,
    /// Reset.
    Reset,
}

/// All devices of one partition, shared by its VPs.
pub struct Machine<W: Write> {
    /// Port space.
    pub ports: PortBus<W>,
    /// Memory-mapped devices.
    pub mmio: MmioBus,
}

impl<W: Write> Machine<W> {
    /// Builds the machine; the UART writes to `console`, interrupts go to `sink`.
    pub fn new(sink: Arc<dyn InterruptSink>, console: W) -> Self {
        let ioapic = Arc::new(Mutex::new(Ioapic::new(sink)));
        let line = LineTrigger::new(ioapic.clone(), crate::layout::UART_IRQ);
        Machine {
            ports: PortBus::new(line, console),
            mmio: MmioBus::new(ioapic),
        }
    }
}

/// Locks a device. A VP thread that panicked ends the process anyway, so poison tells nothing new.
pub(crate) fn lock<T>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Collects interrupts.
    #[derive(Default)]
    pub(crate) struct Recorder(pub Mutex<Vec<Interrupt>>);

    impl Recorder {
        /// Takes what was asserted since the last call.
        pub(crate) fn take(&self) -> Vec<Interrupt> {
            std::mem::take(&mut lock(&self.0))
        }
    }

    impl InterruptSink for Recorder {
        fn assert(&self, interrupt: Interrupt) {
            lock(&self.0).push(interrupt);
        }
    }
}
