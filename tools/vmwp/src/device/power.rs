// SPDX-License-Identifier: GPL-2.0
//! Power control: the ACPI sleep registers, the chipset's reset register, and the keyboard controller's reset line.

use super::PowerEvent;
use crate::layout::S5;
use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use vm_superio::{I8042Device, Trigger};

/// Sleep control: SLP_EN.
const SLEEP_ENABLE: u8 = 1 << 5;
/// Sleep status: WAK_STS, which a guest polls after it woke.
const WAKE_STATUS: u8 = 1 << 7;
/// Reset control: do it now.
const RESET_REQUEST: u8 = 1 << 2;

/// Meaning of a write to the sleep control register (ACPI 6.5, 4.8.3.7).
pub fn sleep_control(value: u8) -> Option<PowerEvent> {
    let kind = (value >> 2) & 7;
    (value & SLEEP_ENABLE != 0 && kind == S5).then_some(PowerEvent::Off)
}

/// What the sleep status register reads.
pub fn sleep_status() -> u8 {
    WAKE_STATUS
}

/// Meaning of a write to the reset control register; its other bits choose kinds of reset that are all the same here.
pub fn reset_control(value: u8) -> Option<PowerEvent> {
    (value & RESET_REQUEST != 0).then_some(PowerEvent::Reset)
}

#[derive(Clone, Default)]
struct Latch(Arc<AtomicBool>);

impl Trigger for Latch {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// The keyboard controller, of which only the reset line is connected.
pub struct Keyboard {
    chip: I8042Device<Latch>,
    reset: Latch,
}

impl Default for Keyboard {
    fn default() -> Self {
        let reset = Latch::default();
        Keyboard {
            chip: I8042Device::new(reset.clone()),
            reset,
        }
    }
}

impl Keyboard {
    /// Reads port 0x60 + `offset`.
    pub fn read(&mut self, offset: u8) -> u8 {
        self.chip.read(offset)
    }

    /// Writes port 0x60 + `offset`.
    pub fn write(&mut self, offset: u8, value: u8) -> Option<PowerEvent> {
        let Ok(()) = self.chip.write(offset, value);
        self.reset
            .0
            .swap(false, Ordering::Relaxed)
            .then_some(PowerEvent::Reset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_s5_with_enable_powers_off() {
        assert_eq!(sleep_control((5 << 2) | 0x20), Some(PowerEvent::Off));
        assert_eq!(sleep_control(5 << 2), None);
        assert_eq!(sleep_control((3 << 2) | 0x20), None);
    }

    #[test]
    fn the_reset_register_resets_on_the_request_bit() {
        assert_eq!(reset_control(2), None);
        assert_eq!(reset_control(6), Some(PowerEvent::Reset));
        assert_eq!(reset_control(0x0e), Some(PowerEvent::Reset));
    }

    #[test]
    fn the_keyboard_controller_resets_by_command_fe_only() {
        let mut k = Keyboard::default();
        assert_eq!(k.write(4, 0xd1), None);
        assert_eq!(k.write(4, 0xfe), Some(PowerEvent::Reset));
        assert_eq!(k.write(4, 0xd1), None);
        assert_eq!(k.read(4) & 2, 0, "input buffer is empty, so nobody waits");
    }
}
