// SPDX-License-Identifier: GPL-2.0
//! The register state in which the first VP enters the kernel.

use super::paging::{BOOT_CS, BOOT_DS, BOOT_TSS, GDT_ENTRIES};
use crate::layout::{GDT, PML4, STACK_TOP, ZERO_PAGE};
use crate::vp::reg::{Reg, RegValue, Segment};

/// CR0: protected mode, extension type, numeric errors, paging.
const CR0: u64 = (1 << 0) | (1 << 4) | (1 << 5) | (1 << 31);
/// CR4: physical address extension.
const CR4: u64 = 1 << 5;
/// EFER: long mode enabled and active.
const EFER: u64 = (1 << 8) | (1 << 10);

/// The list to be set on VP 0, in an order that is consistent after every element: tables and control registers
/// before the segments that depend on them.
pub fn boot_registers(entry: u64) -> Vec<(Reg, RegValue)> {
    let data = Segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: BOOT_DS,
        attributes: 0xc093,
    };
    let code = Segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: BOOT_CS,
        attributes: 0xa09b,
    };
    let task = Segment {
        base: 0,
        limit: 0x67,
        selector: BOOT_TSS,
        attributes: 0x8b,
    };
    let no_ldt = Segment {
        base: 0,
        limit: 0xffff,
        selector: 0,
        attributes: 0x82,
    };
    let mut list = vec![
        (
            Reg::GDTR,
            RegValue::Table {
                base: GDT,
                limit: (GDT_ENTRIES.len() * 8 - 1) as u16,
            },
        ),
        (Reg::IDTR, RegValue::Table { base: 0, limit: 0 }),
        (Reg::CR3, PML4.into()),
        (Reg::CR4, CR4.into()),
        (Reg::EFER, EFER.into()),
        (Reg::CR0, CR0.into()),
        (Reg::CS, code.into()),
    ];
    list.extend([Reg::DS, Reg::ES, Reg::FS, Reg::GS, Reg::SS].map(|r| (r, data.into())));
    list.extend([(Reg::TR, task.into()), (Reg::LDTR, no_ldt.into())]);
    list.extend([
        (Reg::RSI, ZERO_PAGE.into()),
        (Reg::RSP, STACK_TOP.into()),
        (Reg::RBP, STACK_TOP.into()),
        (Reg::RIP, entry.into()),
        // Interrupts off; bit 1 always reads as one.
        (Reg::RFLAGS, 2.into()),
    ]);
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(list: &[(Reg, RegValue)], reg: Reg) -> RegValue {
        list.iter().find(|(r, _)| *r == reg).unwrap().1
    }

    /// Rebuilds the cached part of a descriptor from the GDT.
    fn cached(selector: u16) -> (u64, u32, u16) {
        let d = GDT_ENTRIES[selector as usize / 8];
        let attributes = ((d >> 40) & 0xf0ff) as u16;
        let raw = (d & 0xffff) as u32 | ((d >> 32) & 0xf_0000) as u32;
        let limit = if attributes & 0x8000 != 0 {
            (raw << 12) | 0xfff
        } else {
            raw
        };
        let base = (d >> 16) & 0xff_ffff | (d >> 56 << 24);
        (base, limit, attributes)
    }

    #[test]
    fn segments_agree_with_the_gdt() {
        let list = boot_registers(0);
        for reg in [
            Reg::CS,
            Reg::DS,
            Reg::ES,
            Reg::FS,
            Reg::GS,
            Reg::SS,
            Reg::TR,
        ] {
            let RegValue::Segment(s) = value(&list, reg) else {
                panic!()
            };
            assert_eq!(
                (s.base, s.limit, s.attributes),
                cached(s.selector),
                "{reg:?}"
            );
        }
    }

    #[test]
    fn long_mode_is_consistent() {
        let list = boot_registers(0x100_0200);
        let word = |r| value(&list, r).word();
        assert_eq!(word(Reg::CR0) & ((1 << 31) | 1), (1 << 31) | 1);
        assert_eq!(word(Reg::CR4) & (1 << 5), 1 << 5);
        assert_eq!(word(Reg::EFER), 0x500);
        assert_eq!(word(Reg::RIP), 0x100_0200);
        assert_eq!(word(Reg::RSI), ZERO_PAGE);
        assert_eq!(word(Reg::RFLAGS) & (1 << 9), 0, "interrupts must be off");
    }

    #[test]
    fn no_register_is_set_twice() {
        let mut names: Vec<_> = boot_registers(0).iter().map(|(r, _)| r.0).collect();
        let n = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), n);
    }
}
