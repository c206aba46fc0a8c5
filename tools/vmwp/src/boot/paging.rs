// SPDX-License-Identifier: GPL-2.0
//! The boot GDT and the identity map of the first 4 GiB in 2 MiB pages.

use super::write as put;
use crate::layout::{GDT, PML4};
use crate::Result;
use vm_memory::GuestMemoryMmap;

/// Selector of the 64-bit code segment (`__BOOT_CS`).
pub const BOOT_CS: u16 = 0x10;
/// Selector of the data segment (`__BOOT_DS`).
pub const BOOT_DS: u16 = 0x18;
/// Selector of the task state segment.
pub const BOOT_TSS: u16 = 0x20;

/// The descriptors: two null, code, data, and a 16-byte TSS descriptor.
pub const GDT_ENTRIES: [u64; 6] = [
    0,
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x0000_8b00_0000_0067,
    0,
];

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;
const PAGE: u64 = 4096;

/// Writes GDT and page tables to their places.
pub fn write(mem: &GuestMemoryMmap) -> Result<()> {
    put(mem, GDT, &bytes(&GDT_ENTRIES))?;
    put(mem, PML4, &bytes(&tables()))
}

/// PML4, PDPT and four page directories, as they lie in memory.
fn tables() -> Vec<u64> {
    const PER_TABLE: usize = 512;
    let mut t = vec![0; 6 * PER_TABLE];
    let pdpt = PML4 + PAGE;
    t[0] = pdpt | PRESENT_WRITABLE;
    for gib in 0..4u64 {
        let pd = pdpt + PAGE * (gib + 1);
        t[PER_TABLE + gib as usize] = pd | PRESENT_WRITABLE;
    }
    for (i, entry) in t[2 * PER_TABLE..].iter_mut().enumerate() {
        *entry = ((i as u64) << 21) | LARGE | PRESENT_WRITABLE;
    }
    t
}

fn bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::CMDLINE;

    /// Walks the tables as a processor would.
    fn translate(t: &[u64], gva: u64) -> Option<u64> {
        let entry = |table: u64, index: u64| {
            let at = (table - PML4) / 8 + index;
            Some(t[at as usize]).filter(|e| e & 1 == 1)
        };
        let pdpt = entry(PML4, (gva >> 39) & 511)? & !0xfff;
        let pd = entry(pdpt, (gva >> 30) & 511)? & !0xfff;
        let leaf = entry(pd, (gva >> 21) & 511)?;
        assert!(leaf & LARGE != 0);
        Some((leaf & !0x1f_ffff) | (gva & 0x1f_ffff))
    }

    #[test]
    fn the_first_four_gib_map_to_themselves_and_no_more() {
        let t = tables();
        for gva in [
            0,
            0x7000,
            0x10_0000,
            0x100_0200,
            0x7fff_ffff,
            0xfee0_0000,
            0xffff_ffff,
        ] {
            assert_eq!(translate(&t, gva), Some(gva));
        }
        assert_eq!(translate(&t, 1 << 32), None);
        assert_eq!(translate(&t, 1 << 39), None);
    }

    #[test]
    fn the_tables_end_before_the_command_line() {
        assert!(PML4 + tables().len() as u64 * 8 <= CMDLINE);
    }
}
