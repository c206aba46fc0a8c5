// SPDX-License-Identifier: GPL-2.0
//! Memory-mapped devices: the IOAPIC. Other addresses read as ones and ignore writes.

use super::ioapic::Ioapic;
use super::lock;
use crate::layout::{IOAPIC, PAGE};
use std::sync::{Arc, Mutex};

/// The bus.
pub struct MmioBus {
    ioapic: Arc<Mutex<Ioapic>>,
}

impl MmioBus {
    /// A bus with this IOAPIC.
    pub fn new(ioapic: Arc<Mutex<Ioapic>>) -> Self {
        MmioBus { ioapic }
    }

    /// Reads `size` (1, 2, 4 or 8) bytes.
    pub fn read(&self, gpa: u64, size: u8) -> u64 {
        let ones = u64::MAX >> (64 - 8 * u32::from(size.clamp(1, 8)));
        match ioapic_offset(gpa) {
            Some(offset) => {
                let shift = 8 * (offset & 3) as u32;
                (u64::from(lock(&self.ioapic).read(offset)) >> shift) & ones
            }
            None => ones,
        }
    }

    /// Writes `size` (1, 2, 4 or 8) bytes. The IOAPIC takes aligned 32-bit registers; a narrow write gives their low part.
    pub fn write(&self, gpa: u64, size: u8, value: u64) {
        if let Some(offset) = ioapic_offset(gpa) {
            let kept = u64::MAX >> (64 - 8 * u32::from(size.clamp(1, 4)));
            lock(&self.ioapic).write(offset, (value & kept) as u32);
        }
    }

    /// A level-triggered interrupt ended on some VP.
    pub fn eoi(&self, vector: u8) {
        lock(&self.ioapic).eoi(vector);
    }
}

fn ioapic_offset(gpa: u64) -> Option<u64> {
    gpa.checked_sub(IOAPIC).filter(|offset| *offset < PAGE)
}

#[cfg(test)]
mod tests {
    use super::super::tests::Recorder;
    use super::super::Machine;
    use super::*;

    fn bus() -> MmioBus {
        Machine::new(Arc::new(Recorder::default()), Vec::<u8>::new()).mmio
    }

    #[test]
    fn the_ioapic_answers_in_every_width() {
        let b = bus();
        b.write(IOAPIC, 1, 0xff01);
        assert_eq!(b.read(IOAPIC, 4), 1);
        assert_eq!(b.read(IOAPIC + 0x10, 4), 0x0017_0020);
        assert_eq!(b.read(IOAPIC + 0x12, 1), 0x17);
    }

    #[test]
    fn holes_read_as_ones_of_their_width() {
        let b = bus();
        assert_eq!(b.read(0xd000_0000, 1), 0xff);
        assert_eq!(b.read(IOAPIC + PAGE, 8), u64::MAX);
        b.write(IOAPIC - 4, 4, 0);
    }
}
