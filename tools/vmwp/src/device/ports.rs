// SPDX-License-Identifier: GPL-2.0
//! The I/O port space.
//!
//! | ports | device |
//! |---|---|
//! | 0x40-0x42 | no PIT: reads as zero, so that a calibration by PIT fails at once |
//! | 0x60, 0x64 | keyboard controller (reset only) |
//! | 0x70, 0x71 | clock |
//! | 0x3f8-0x3ff | UART |
//! | 0x600, 0x601 | ACPI sleep control and status |
//! | 0xcf9 | reset control |
//!
//! Everything else reads as ones and ignores writes, as a bus without a device does.

use super::clock::Clock;
use super::ioapic::LineTrigger;
use super::power::{self, Keyboard};
use super::uart::Uart;
use super::{lock, PowerEvent};
use crate::layout::{CLOCK_PORT, RESET_PORT, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT, UART_PORT};
use std::io::Write;
use std::sync::Mutex;

/// The devices in port space.
pub struct PortBus<W: Write> {
    uart: Mutex<Uart<W>>,
    clock: Mutex<Clock>,
    keyboard: Mutex<Keyboard>,
}

/// Who answers at a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Pit,
    Keyboard(u8),
    Clock(u8),
    Uart(u8),
    SleepControl,
    SleepStatus,
    Reset,
    Nobody,
}

fn decode(port: u16) -> Target {
    const UART_LAST: u16 = UART_PORT + 7;
    const CLOCK_LAST: u16 = CLOCK_PORT + 1;
    match port {
        0x40..=0x42 => Target::Pit,
        0x60 | 0x64 => Target::Keyboard((port - 0x60) as u8),
        CLOCK_PORT..=CLOCK_LAST => Target::Clock((port - CLOCK_PORT) as u8),
        UART_PORT..=UART_LAST => Target::Uart((port - UART_PORT) as u8),
        SLEEP_CONTROL_PORT => Target::SleepControl,
        SLEEP_STATUS_PORT => Target::SleepStatus,
        RESET_PORT => Target::Reset,
        _ => Target::Nobody,
    }
}

/// PCI configuration mechanism 1 has wide registers: only a byte access at 0xcf9 means the reset register.
fn is_pci_config(port: u16, size: u8) -> bool {
    size > 1 && (0xcf8..=0xcff).contains(&port)
}

impl<W: Write> PortBus<W> {
    /// The bus with its devices.
    pub fn new(line: LineTrigger, console: W) -> Self {
        PortBus {
            uart: Mutex::new(Uart::new(line, console)),
            clock: Mutex::default(),
            keyboard: Mutex::default(),
        }
    }

    /// Reads `size` (1, 2 or 4) bytes; a wide access to byte-wide devices reaches consecutive ports.
    pub fn read(&self, port: u16, size: u8) -> u32 {
        if is_pci_config(port, size) {
            return u32::MAX >> (32 - 8 * u32::from(size.min(4)));
        }
        (0..size.min(4)).fold(0, |value, i| {
            let byte = self.read_byte(port.wrapping_add(i.into()));
            value | (u32::from(byte) << (8 * i))
        })
    }

    /// Writes `size` (1, 2 or 4) bytes.
    pub fn write(&self, port: u16, size: u8, value: u32) -> Option<PowerEvent> {
        if is_pci_config(port, size) {
            return None;
        }
        // Nearly all are.
        if size == 1 {
            return self.write_byte(port, value as u8);
        }
        let mut event = None;
        for i in 0..size.min(4) {
            let byte = (value >> (8 * i)) as u8;
            event = event.or(self.write_byte(port.wrapping_add(i.into()), byte));
        }
        event
    }

    /// Feeds input to the UART; returns how many bytes it took.
    pub fn console_input(&self, bytes: &[u8]) -> usize {
        lock(&self.uart).input(bytes)
    }

    fn read_byte(&self, port: u16) -> u8 {
        match decode(port) {
            Target::Pit | Target::SleepControl | Target::Reset => 0,
            Target::Keyboard(offset) => lock(&self.keyboard).read(offset),
            Target::Clock(offset) => lock(&self.clock).read(offset),
            Target::Uart(offset) => lock(&self.uart).read(offset),
            Target::SleepStatus => power::sleep_status(),
            Target::Nobody => 0xff,
        }
    }

    fn write_byte(&self, port: u16, value: u8) -> Option<PowerEvent> {
        match decode(port) {
            Target::Keyboard(offset) => return lock(&self.keyboard).write(offset, value),
            Target::Clock(offset) => lock(&self.clock).write(offset, value),
            Target::Uart(offset) => lock(&self.uart).write(offset, value),
            Target::SleepControl => return power::sleep_control(value),
            Target::Reset => return power::reset_control(value),
            Target::Pit | Target::SleepStatus | Target::Nobody => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Recorder;
    use super::super::Machine;
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;

    fn machine() -> Machine<Vec<u8>> {
        Machine::new(Arc::new(Recorder::default()), Vec::new())
    }

    #[test]
    fn ports_decode_to_their_devices_and_no_further() {
        assert_eq!(decode(0x3f7), Target::Nobody);
        assert_eq!(decode(0x3f8), Target::Uart(0));
        assert_eq!(decode(0x3ff), Target::Uart(7));
        assert_eq!(decode(0x400), Target::Nobody);
        assert_eq!(decode(0x64), Target::Keyboard(4));
        assert_eq!(decode(0x61), Target::Nobody);
        assert_eq!(decode(0xcf9), Target::Reset);
    }

    #[test]
    fn an_empty_port_reads_as_ones_in_its_width() {
        let p = machine().ports;
        assert_eq!(p.read(0xcf8, 4), 0xffff_ffff);
        assert_eq!(p.read(0x2f8, 1), 0xff);
        assert_eq!(p.read(0x2f8, 2), 0xffff);
        assert_eq!(p.read(0xffff, 4), 0xffff_ffff);
    }

    #[test]
    fn pci_probing_does_not_reset_the_machine() {
        let p = machine().ports;
        assert_eq!(p.write(0xcf8, 4, 0x8000_0000 | 0x0600), None);
        assert_eq!(p.write(0xcfb, 1, 1), None);
        assert_eq!(p.write(0xcf9, 1, 6), Some(PowerEvent::Reset));
    }

    #[test]
    fn power_off_goes_through_the_sleep_register() {
        let p = machine().ports;
        assert_eq!(p.write(SLEEP_STATUS_PORT, 1, 0x80), None);
        assert_eq!(p.write(SLEEP_CONTROL_PORT, 1, 0x34), Some(PowerEvent::Off));
    }

    #[test]
    fn a_uart_scratch_register_round_trips() {
        let p = machine().ports;
        p.write(0x3ff, 1, 0x5a);
        assert_eq!(p.read(0x3ff, 1), 0x5a);
    }

    proptest! {
        #[test]
        fn no_access_panics(port: u16, size in 0u8..=8, value: u32) {
            let p = machine().ports;
            p.read(port, size);
            p.write(port, size, value);
        }
    }
}
