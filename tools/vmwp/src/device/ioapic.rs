// SPDX-License-Identifier: GPL-2.0
//! The IOAPIC: 24 pins, edge and level, version 0x20 (with an EOI register).
//!
//! Source: Intel 82093AA datasheet, chapter 3, and the ICH's EOI register. Two deliberate choices: an edge that arrives
//! while its pin is masked is kept and delivered when the pin is unmasked (the chip loses it), and writes to read-only
//! bits are ignored.

use super::{lock, Interrupt, InterruptSink};
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use vm_superio::Trigger;

/// Number of pins.
pub const PINS: usize = 24;

const REG_SELECT: u64 = 0x00;
const REG_WINDOW: u64 = 0x10;
const REG_EOI: u64 = 0x40;

const INDEX_ID: u8 = 0;
const INDEX_VERSION: u8 = 1;
const INDEX_ARBITRATION: u8 = 2;
const INDEX_TABLE: u8 = 0x10;

const VERSION: u32 = 0x20 | ((PINS as u32 - 1) << 16);

const MASKED: u64 = 1 << 16;
const LEVEL: u64 = 1 << 15;
const REMOTE_IRR: u64 = 1 << 14;
const DELIVERY_STATUS: u64 = 1 << 12;
const LOGICAL: u64 = 1 << 11;
const READ_ONLY: u64 = REMOTE_IRR | DELIVERY_STATUS;

/// Delivery mode "external interrupt": there is no 8259 behind it.
const MODE_EXTINT: u8 = 7;

/// The device's state.
pub struct Ioapic {
    select: u8,
    id: u32,
    table: [u64; PINS],
    /// Lines that are high now.
    lines: u32,
    /// Edges not yet delivered.
    edges: u32,
    sink: Arc<dyn InterruptSink>,
}

impl Ioapic {
    /// A chip after reset: all pins masked.
    pub fn new(sink: Arc<dyn InterruptSink>) -> Self {
        Ioapic {
            select: 0,
            id: 0,
            table: [MASKED; PINS],
            lines: 0,
            edges: 0,
            sink,
        }
    }

    /// Reads the 32-bit register at `offset` of the page.
    pub fn read(&self, offset: u64) -> u32 {
        match offset & !3 {
            REG_SELECT => self.select.into(),
            REG_WINDOW => self.read_indexed(),
            _ => 0,
        }
    }

    /// Writes the 32-bit register at `offset` of the page.
    pub fn write(&mut self, offset: u64, value: u32) {
        match offset & !3 {
            REG_SELECT => self.select = value as u8,
            REG_WINDOW => self.write_indexed(value),
            REG_EOI => self.eoi(value as u8),
            _ => {}
        }
    }

    /// Drives the line of a pin; pins that do not exist are ignored.
    pub fn set_line(&mut self, pin: u8, high: bool) {
        let Some(entry) = self.table.get(usize::from(pin)) else {
            return;
        };
        let bit = 1 << pin;
        let rises = high && self.lines & bit == 0;
        if rises && entry & LEVEL == 0 {
            self.edges |= bit;
        }
        self.lines = if high {
            self.lines | bit
        } else {
            self.lines & !bit
        };
        self.service(pin.into());
    }

    /// A rising and a falling edge.
    pub fn pulse(&mut self, pin: u8) {
        self.set_line(pin, true);
        self.set_line(pin, false);
    }

    /// The end of a level-triggered interrupt, from the hypervisor or from the EOI register.
    pub fn eoi(&mut self, vector: u8) {
        for pin in 0..PINS {
            let entry = self.table[pin];
            if entry & LEVEL != 0 && entry & REMOTE_IRR != 0 && entry as u8 == vector {
                self.table[pin] &= !REMOTE_IRR;
                self.service(pin);
            }
        }
    }

    /// The table slot that the index register selects, and whether it is the upper half.
    fn slot(&self) -> Option<(usize, bool)> {
        let index = self.select.checked_sub(INDEX_TABLE)?;
        let pin = usize::from(index / 2);
        (pin < PINS).then_some((pin, index % 2 == 1))
    }

    fn read_indexed(&self) -> u32 {
        match (self.select, self.slot()) {
            (INDEX_ID | INDEX_ARBITRATION, _) => self.id,
            (INDEX_VERSION, _) => VERSION,
            (_, Some((pin, true))) => (self.table[pin] >> 32) as u32,
            (_, Some((pin, false))) => self.table[pin] as u32,
            _ => 0,
        }
    }

    fn write_indexed(&mut self, value: u32) {
        match (self.select, self.slot()) {
            (INDEX_ID, _) => self.id = value & 0x0f00_0000,
            (_, Some((pin, upper))) => {
                let old = self.table[pin];
                let mut new = if upper {
                    old & 0xffff_ffff | (u64::from(value) << 32)
                } else {
                    old & !0xffff_ffff | u64::from(value)
                };
                new = new & !READ_ONLY | old & READ_ONLY;
                if new & LEVEL == 0 {
                    // Linux clears a stuck remote IRR by switching the pin to edge and back.
                    new &= !REMOTE_IRR;
                } else {
                    self.edges &= !(1 << pin);
                }
                self.table[pin] = new;
                self.service(pin);
            }
            _ => {}
        }
    }

    /// Delivers what is pending on a pin, if it may be delivered.
    fn service(&mut self, pin: usize) {
        let entry = self.table[pin];
        let bit = 1 << pin;
        if entry & MASKED != 0 {
            return;
        }
        let level = entry & LEVEL != 0;
        if level {
            if self.lines & bit == 0 || entry & REMOTE_IRR != 0 {
                return;
            }
            self.table[pin] |= REMOTE_IRR;
        } else {
            if self.edges & bit == 0 {
                return;
            }
            self.edges &= !bit;
        }
        let mode = ((entry >> 8) & 7) as u8;
        if mode == MODE_EXTINT {
            return;
        }
        self.sink.assert(Interrupt {
            mode,
            vector: entry as u8,
            destination: (entry >> 56) as u32,
            logical: entry & LOGICAL != 0,
            level,
        });
    }
}

/// An edge-triggered line of a device that holds it as a [`Trigger`].
pub struct LineTrigger {
    ioapic: Arc<Mutex<Ioapic>>,
    pin: u8,
}

impl LineTrigger {
    /// The line to `pin`.
    pub fn new(ioapic: Arc<Mutex<Ioapic>>, pin: u8) -> Self {
        LineTrigger { ioapic, pin }
    }
}

impl Trigger for LineTrigger {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        lock(&self.ioapic).pulse(self.pin);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Recorder;
    use super::*;

    fn chip() -> (Ioapic, Arc<Recorder>) {
        let sink = Arc::new(Recorder::default());
        (Ioapic::new(sink.clone()), sink)
    }

    /// Writes an entry as Linux does: upper half first.
    fn program(chip: &mut Ioapic, pin: u8, entry: u64) {
        for (half, value) in [(1, (entry >> 32) as u32), (0, entry as u32)] {
            chip.write(REG_SELECT, u32::from(INDEX_TABLE + pin * 2 + half));
            chip.write(REG_WINDOW, value);
        }
    }

    fn entry(chip: &mut Ioapic, pin: u8) -> u64 {
        let mut half = |h: u8| {
            chip.write(REG_SELECT, u32::from(INDEX_TABLE + pin * 2 + h));
            u64::from(chip.read(REG_WINDOW))
        };
        half(0) | (half(1) << 32)
    }

    #[test]
    fn identity_registers_read_as_a_24_pin_version_20() {
        let (mut chip, _) = chip();
        chip.write(REG_SELECT, 1);
        assert_eq!(chip.read(REG_WINDOW), 0x0017_0020);
        chip.write(REG_SELECT, 0);
        chip.write(REG_WINDOW, 0xffff_ffff);
        assert_eq!(chip.read(REG_WINDOW), 0x0f00_0000);
        chip.write(REG_SELECT, 2);
        assert_eq!(chip.read(REG_WINDOW), 0x0f00_0000);
    }

    #[test]
    fn all_pins_are_masked_after_reset() {
        let (mut chip, sink) = chip();
        for pin in 0..PINS as u8 {
            assert_eq!(entry(&mut chip, pin), MASKED);
            chip.pulse(pin);
        }
        assert!(sink.take().is_empty());
    }

    #[test]
    fn an_edge_is_delivered_once_with_all_fields() {
        let (mut chip, sink) = chip();
        program(
            &mut chip,
            4,
            0x0300_0000_0000_0000 | LOGICAL | (1 << 8) | 0x31,
        );
        chip.pulse(4);
        let expected = Interrupt {
            mode: 1,
            vector: 0x31,
            destination: 3,
            logical: true,
            level: false,
        };
        assert_eq!(sink.take(), [expected]);
        chip.set_line(4, true);
        chip.set_line(4, true);
        assert_eq!(
            sink.take().len(),
            1,
            "a line that stays high makes no second edge"
        );
    }

    #[test]
    fn an_edge_under_mask_is_kept_until_unmask() {
        let (mut chip, sink) = chip();
        program(&mut chip, 4, MASKED | 0x31);
        chip.pulse(4);
        chip.pulse(4);
        assert!(sink.take().is_empty());
        program(&mut chip, 4, 0x31);
        assert_eq!(sink.take().len(), 1);
    }

    #[test]
    fn a_level_line_fires_again_only_after_eoi() {
        let (mut chip, sink) = chip();
        program(&mut chip, 9, LEVEL | 0x40);
        chip.set_line(9, true);
        chip.set_line(9, true);
        assert_eq!(sink.take().len(), 1);
        assert_ne!(entry(&mut chip, 9) & REMOTE_IRR, 0);
        chip.eoi(0x41);
        assert!(
            sink.take().is_empty(),
            "another vector's EOI changes nothing"
        );
        chip.eoi(0x40);
        assert_eq!(sink.take().len(), 1, "the line is still high");
        chip.set_line(9, false);
        chip.eoi(0x40);
        assert!(sink.take().is_empty());
        assert_eq!(entry(&mut chip, 9) & REMOTE_IRR, 0);
    }

    #[test]
    fn the_eoi_register_works_like_an_eoi() {
        let (mut chip, sink) = chip();
        program(&mut chip, 9, LEVEL | 0x40);
        chip.set_line(9, true);
        chip.write(REG_EOI, 0x40);
        assert_eq!(sink.take().len(), 2);
    }

    #[test]
    fn read_only_bits_cannot_be_written_but_edge_mode_clears_remote_irr() {
        let (mut chip, _) = chip();
        program(&mut chip, 9, LEVEL | MASKED | READ_ONLY | 0x40);
        assert_eq!(entry(&mut chip, 9) & READ_ONLY, 0);
        chip.set_line(9, true);
        program(&mut chip, 9, LEVEL | 0x40);
        assert_ne!(entry(&mut chip, 9) & REMOTE_IRR, 0);
        program(&mut chip, 9, MASKED | 0x40);
        assert_eq!(entry(&mut chip, 9) & REMOTE_IRR, 0);
    }

    #[test]
    fn pins_and_registers_that_do_not_exist_are_harmless() {
        let (mut chip, sink) = chip();
        chip.pulse(24);
        chip.pulse(255);
        for select in 0..=255 {
            chip.write(REG_SELECT, select);
            chip.read(REG_WINDOW);
            chip.write(REG_WINDOW, 0xffff_ffff);
        }
        chip.write(0x30, 1);
        assert_eq!(chip.read(0x30), 0);
        assert!(sink.take().is_empty());
    }
}
