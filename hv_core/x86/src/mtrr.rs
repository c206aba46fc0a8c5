// SPDX-License-Identifier: GPL-2.0

//! From raw MTRRs to memory types (SDM 13.11, APM 7.7).
//!
//! Under EPT the memory type of a leaf takes the place of the MTRRs (SDM 29.3.7.2), so the identity map of the root
//! must repeat what they say. [`MtrrState`] holds their raw values; [`MtrrState::type_of`] answers for one address and
//! [`MtrrState::ranges`] cuts the physical address space into the fewest ranges of one type each. Under nested paging
//! of AMD-V the host's MTRRs stay in force and none of this is needed (APM 15.25.8).
//!
//! Not modelled: SMRRs (SMM has its own view), the AMD extensions in SYSCFG (RdMem/WrMem bits of the fixed ranges, and
//! TOM2 forcing write-back, APM 7.9).

/// A memory type in the encoding of MTRRs, the PAT and EPT leaves (SDM table 13-8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum MemoryType {
    /// UC, strong uncacheable.
    Uncacheable = 0,
    /// WC, write combining.
    WriteCombining = 1,
    /// WT, write-through.
    WriteThrough = 4,
    /// WP, write-protected.
    WriteProtected = 5,
    /// WB, write-back.
    WriteBack = 6,
}

impl MemoryType {
    /// The architectural encoding.
    pub const fn encoding(self) -> u8 {
        self as u8
    }

    /// The type with this encoding; `None` for the reserved ones (2, 3, 7 and above; PAT's UC-, 7, is no memory type).
    pub const fn from_encoding(encoding: u64) -> Option<Self> {
        match encoding {
            0 => Some(Self::Uncacheable),
            1 => Some(Self::WriteCombining),
            4 => Some(Self::WriteThrough),
            5 => Some(Self::WriteProtected),
            6 => Some(Self::WriteBack),
            _ => None,
        }
    }

    /// As [`Self::from_encoding`], with uncacheable for the reserved encodings: always correct, merely slow.
    pub const fn from_encoding_or_uncacheable(encoding: u64) -> Self {
        match Self::from_encoding(encoding) {
            Some(memory_type) => memory_type,
            None => Self::Uncacheable,
        }
    }

    /// The type where two variable ranges overlap (SDM 13.11.4.1): the same stays, UC wins, WT wins over WB. All other
    /// pairs are undefined and made UC.
    const fn overlap(self, other: Self) -> Self {
        match (self, other) {
            (Self::WriteBack, Self::WriteBack) => Self::WriteBack,
            (Self::WriteThrough, Self::WriteThrough | Self::WriteBack)
            | (Self::WriteBack, Self::WriteThrough) => Self::WriteThrough,
            (Self::WriteCombining, Self::WriteCombining) => Self::WriteCombining,
            (Self::WriteProtected, Self::WriteProtected) => Self::WriteProtected,
            _ => Self::Uncacheable,
        }
    }
}

/// How many variable ranges are kept. Processors have 8 or 10.
pub const MAX_VARIABLE: usize = 16;

/// Registers of the fixed ranges.
pub const FIXED_COUNT: usize = 11;

/// `IA32_MTRRCAP` (SDM 13.11.1).
pub const IA32_MTRRCAP: u32 = 0xfe;

/// `IA32_MTRR_DEF_TYPE` (SDM 13.11.2.1).
pub const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;

/// `IA32_MTRR_PHYSBASE0`; base and mask of range `n` are at `2n` and `2n + 1` from here (SDM 13.11.2.3).
pub const IA32_MTRR_PHYSBASE0: u32 = 0x200;

/// The registers of the fixed ranges in ascending order of address: FIX64K_00000, FIX16K_80000, FIX16K_A0000,
/// FIX4K_C0000 to FIX4K_F8000 (SDM 13.11.2.2).
pub const FIXED_MSRS: [u32; FIXED_COUNT] = [
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f,
];

/// `IA32_MTRRCAP`: number of variable ranges.
const CAPABILITIES_VARIABLE_COUNT: u64 = 0xff;
/// `IA32_MTRRCAP`: there are fixed ranges.
const CAPABILITIES_FIXED: u64 = 1 << 8;

/// `IA32_MTRR_DEF_TYPE`: type of what no range covers.
const DEFAULT_TYPE: u64 = 0xff;
/// `IA32_MTRR_DEF_TYPE`: the fixed ranges count (FE).
const DEFAULT_FIXED_ENABLE: u64 = 1 << 10;
/// `IA32_MTRR_DEF_TYPE`: the MTRRs count (E).
const DEFAULT_ENABLE: u64 = 1 << 11;

/// `IA32_MTRR_PHYSBASEn`: the type.
const BASE_TYPE: u64 = 0xff;
/// `IA32_MTRR_PHYSMASKn`: the range counts (V).
const MASK_VALID: u64 = 1 << 11;

/// A variable range is exact up to 2^8 pieces. More would make the work on the map unbounded.
const MAX_GAPS: u32 = 8;

/// First address above the fixed ranges.
const FIXED_END: u64 = 0x10_0000;

/// The address bits that variable ranges compare begin here.
const PAGE_SHIFT: u32 = 12;

/// The MTRRs of one processor as they were read; they are the same on all (SDM 13.11.8). Two states are equal if and
/// only if the registers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MtrrState {
    /// `IA32_MTRRCAP`.
    pub capabilities: u64,
    /// `IA32_MTRR_DEF_TYPE`.
    pub default_type: u64,
    /// The fixed ranges in the order of [`FIXED_MSRS`]; not looked at unless `capabilities` has them.
    pub fixed: [u64; FIXED_COUNT],
    /// `IA32_MTRR_PHYSBASEn` and `IA32_MTRR_PHYSMASKn`.
    pub variable: [(u64, u64); MAX_VARIABLE],
    /// How many of `variable` are there.
    pub variable_count: usize,
    /// Width of a physical address (CPUID 8000_0008h EAX\[7:0\]). Address bits from here on do not exist: not in bases,
    /// not in masks.
    pub physical_address_bits: u8,
}

impl MtrrState {
    /// No MTRRs at all: everything uncacheable.
    pub const fn disabled(physical_address_bits: u8) -> Self {
        Self {
            capabilities: 0,
            default_type: 0,
            fixed: [0; FIXED_COUNT],
            variable: [(0, 0); MAX_VARIABLE],
            variable_count: 0,
            physical_address_bits,
        }
    }

    /// Collects the state through `read`, which reads one MSR. Only MSRs that `IA32_MTRRCAP` announces are read. The
    /// caller has made sure that there are MTRRs (CPUID 1 EDX\[12\]), and looks at [`Self::is_truncated`].
    pub fn from_msrs(physical_address_bits: u8, mut read: impl FnMut(u32) -> u64) -> Self {
        let mut state = Self::disabled(physical_address_bits);
        state.capabilities = read(IA32_MTRRCAP);
        state.default_type = read(IA32_MTRR_DEF_TYPE);
        if state.capabilities & CAPABILITIES_FIXED != 0 {
            for (value, msr) in state.fixed.iter_mut().zip(FIXED_MSRS) {
                *value = read(msr);
            }
        }
        state.variable_count = announced(state.capabilities).min(MAX_VARIABLE);
        let bases = (IA32_MTRR_PHYSBASE0..).step_by(2);
        for ((base, mask), msr) in state
            .variable
            .iter_mut()
            .take(state.variable_count)
            .zip(bases)
        {
            *base = read(msr);
            *mask = read(msr + 1);
        }
        state
    }

    /// The processor has more variable ranges than are kept here, so the answers may be wrong: do not go on.
    pub const fn is_truncated(&self) -> bool {
        announced(self.capabilities) > self.variable_count || self.variable_count > MAX_VARIABLE
    }

    /// The index of the first enabled variable range whose mask has a gap, so that the range comes in several pieces
    /// (SDM 13.11.2.3): 2^n for n clear bits above the lowest set one. It usually means that firmware believed in fewer
    /// address bits.
    ///
    /// Up to 256 pieces are treated exactly. Of a range with more, the lowest compared bits are dropped until 256
    /// remain, which makes each piece larger, and the range is made uncacheable: slow, but safe.
    pub fn first_discontiguous(&self) -> Option<usize> {
        self.variable
            .iter()
            .take(self.variable_count)
            .position(|&(_, mask)| {
                mask & MASK_VALID != 0 && self.gaps(mask & self.address_mask()) != 0
            })
    }

    /// The memory type at a physical address.
    ///
    /// * MTRRs disabled, or an address beyond the physical width: UC (SDM 13.11.2.1).
    /// * Below 1 MiB the fixed ranges decide, if present and enabled, whatever the variable ranges say.
    /// * Elsewhere the variable ranges that match; for overlaps see SDM 13.11.4.1 (UC wins, WT wins over WB; what is
    ///   undefined there is UC here).
    /// * Otherwise the default type.
    ///
    /// Reserved encodings are taken as UC.
    pub fn type_of(&self, spa: u64) -> MemoryType {
        if !self.enabled() || spa & !low_bits(self.width()) != 0 {
            return MemoryType::Uncacheable;
        }
        if spa < FIXED_END && self.fixed_enabled() {
            return self.fixed_type(spa);
        }
        self.valid_ranges()
            .filter(|range| range.matches(spa))
            .map(|range| range.memory_type)
            .reduce(MemoryType::overlap)
            .unwrap_or(MemoryType::from_encoding_or_uncacheable(
                self.default_type & DEFAULT_TYPE,
            ))
    }

    /// Cuts `[0, limit)` into maximal ranges of one type, in ascending order and without holes. Boundaries within
    /// lie on multiples of 4 KiB.
    ///
    /// The work does not depend on the limit: only edges of fixed and variable ranges are looked at, of which there are
    /// two for each range whose mask has no gap, and never more than 2^9 (see [`Self::first_discontiguous`]).
    pub fn ranges(&self, limit: u64) -> Ranges<'_> {
        Ranges {
            state: self,
            at: 0,
            limit,
        }
    }

    fn enabled(&self) -> bool {
        self.default_type & DEFAULT_ENABLE != 0
    }

    fn fixed_enabled(&self) -> bool {
        self.capabilities & CAPABILITIES_FIXED != 0 && self.default_type & DEFAULT_FIXED_ENABLE != 0
    }

    /// The physical width, within what a base register can hold.
    fn width(&self) -> u8 {
        self.physical_address_bits.clamp(PAGE_SHIFT as u8, 52)
    }

    /// The address bits in base and mask registers.
    fn address_mask(&self) -> u64 {
        low_bits(self.width()) & !low_bits(PAGE_SHIFT as u8)
    }

    /// How many address bits above the lowest set one of a mask are clear.
    fn gaps(&self, mask: u64) -> u32 {
        (!(mask | mask.wrapping_sub(1)) & self.address_mask()).count_ones()
    }

    /// The enabled variable ranges.
    fn valid_ranges(&self) -> impl Iterator<Item = VariableRange> + '_ {
        self.variable
            .iter()
            .take(self.variable_count)
            .filter(|(_, mask)| mask & MASK_VALID != 0)
            .map(|&(base, mask)| {
                let mut memory_type = MemoryType::from_encoding_or_uncacheable(base & BASE_TYPE);
                let mut mask = mask & self.address_mask();
                while self.gaps(mask) > MAX_GAPS {
                    mask &= mask.wrapping_sub(1);
                    memory_type = MemoryType::Uncacheable;
                }
                VariableRange {
                    base: base & mask,
                    mask,
                    memory_type,
                }
            })
    }

    /// The type of an address below [`FIXED_END`] by the fixed ranges.
    fn fixed_type(&self, spa: u64) -> MemoryType {
        // One byte for each sub-range: 8 of 64 KiB, 16 of 16 KiB, 64 of 4 KiB (SDM table 13-9).
        let byte = match spa {
            0..0x8_0000 => spa >> 16,
            0x8_0000..0xc_0000 => 8 + ((spa - 0x8_0000) >> 14),
            _ => 24 + ((spa - 0xc_0000) >> 12),
        };
        let register = usize::try_from(byte / 8)
            .ok()
            .and_then(|register| self.fixed.get(register));
        match register {
            Some(value) => {
                MemoryType::from_encoding_or_uncacheable((value >> ((byte % 8) * 8)) & 0xff)
            }
            None => MemoryType::Uncacheable,
        }
    }

    /// The first address above `spa` where the type may change; `None` if it stays to the end.
    fn next_boundary(&self, spa: u64) -> Option<u64> {
        let end = 1 << self.width();
        if spa >= end {
            return None;
        }
        if !self.enabled() {
            return Some(end);
        }
        if spa < FIXED_END && self.fixed_enabled() {
            let size: u64 = match spa {
                0..0x8_0000 => 0x1_0000,
                0x8_0000..0xc_0000 => 0x4000,
                _ => 0x1000,
            };
            return Some(((spa | (size - 1)) + 1).min(end));
        }
        let edges = self
            .valid_ranges()
            .filter_map(|range| range.next_edge(spa, self.width()));
        Some(edges.fold(end, u64::min))
    }
}

/// A range of physical addresses with one memory type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub start: u64,
    /// Behind the last byte.
    pub end: u64,
    /// The type of all of it, unlike that of its neighbours.
    pub memory_type: MemoryType,
}

/// The iterator of [`MtrrState::ranges`].
#[derive(Debug, Clone)]
pub struct Ranges<'a> {
    state: &'a MtrrState,
    at: u64,
    limit: u64,
}

impl Iterator for Ranges<'_> {
    type Item = Range;

    fn next(&mut self) -> Option<Range> {
        if self.at >= self.limit {
            return None;
        }
        let start = self.at;
        let memory_type = self.state.type_of(start);
        while self.at < self.limit {
            self.at = match self.state.next_boundary(self.at) {
                Some(boundary) => boundary.min(self.limit),
                None => self.limit,
            };
            if self.at < self.limit && self.state.type_of(self.at) != memory_type {
                break;
            }
        }
        Some(Range {
            start,
            end: self.at,
            memory_type,
        })
    }
}

impl core::iter::FusedIterator for Ranges<'_> {}

/// An enabled variable range: the addresses with `address & mask == base` (SDM 13.11.3).
#[derive(Clone, Copy)]
struct VariableRange {
    /// No bit outside `mask`.
    base: u64,
    mask: u64,
    memory_type: MemoryType,
}

impl VariableRange {
    const fn matches(&self, spa: u64) -> bool {
        spa & self.mask == self.base
    }

    /// The first address above `spa`, and below 2^width, where matching begins or ends. Exact for every mask.
    fn next_edge(&self, spa: u64, width: u8) -> Option<u64> {
        if self.mask == 0 {
            // Matches everything.
            return None;
        }
        // A compared bit flips at each multiple of its lowest one, and a flip ends the match.
        let next = (spa | ((self.mask ^ (self.mask - 1)) >> 1)) + 1;
        if self.matches(spa) {
            return Some(next);
        }
        // Look for the smallest match from `next` on. The highest compared bit that differs decides.
        let differing = (next ^ self.base) & self.mask & low_bits(width);
        let Some(highest) = differing.checked_ilog2() else {
            return Some(next);
        };
        let bit = 1 << highest;
        let found = if self.base & bit != 0 {
            // Raising that bit is enough: what is above it matches already, what is below it takes its least value.
            (next & !(bit | (bit - 1))) | (self.base & (bit | (bit - 1)))
        } else {
            // `next` is beyond the match: carry into the lowest clear bit above that is not compared.
            let free = !self.mask & !next & low_bits(width) & !(bit | (bit - 1));
            if free == 0 {
                return None;
            }
            let carry = free & free.wrapping_neg();
            (next & !(carry | (carry - 1))) | carry | (self.base & (carry - 1))
        };
        Some(found)
    }
}

/// The number of variable ranges that `IA32_MTRRCAP` announces.
const fn announced(capabilities: u64) -> usize {
    (capabilities & CAPABILITIES_VARIABLE_COUNT) as usize
}

/// A mask of the lowest `bits` bits, fewer than 64.
const fn low_bits(bits: u8) -> u64 {
    (1 << bits) - 1
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::{vec, vec::Vec};

    use super::*;
    use MemoryType::{
        Uncacheable as UC, WriteBack as WB, WriteCombining as WC, WriteProtected as WP,
        WriteThrough as WT,
    };

    const ENABLE: u64 = DEFAULT_ENABLE;
    const FIXED: u64 = DEFAULT_FIXED_ENABLE;
    const MB: u64 = 1 << 20;
    const GB: u64 = 1 << 30;

    /// Enabled, no fixed ranges, and these ranges: base, mask (both without V and type bits), type.
    fn state(width: u8, default: MemoryType, ranges: &[(u64, u64, MemoryType)]) -> MtrrState {
        let mut state = MtrrState::disabled(width);
        state.capabilities = CAPABILITIES_FIXED | 8;
        state.default_type = ENABLE | u64::from(default.encoding());
        for (slot, &(base, mask, memory_type)) in state.variable.iter_mut().zip(ranges) {
            *slot = (base | u64::from(memory_type.encoding()), mask | MASK_VALID);
        }
        state.variable_count = 8;
        state
    }

    /// The mask of a contiguous range.
    fn mask(width: u8, size: u64) -> u64 {
        low_bits(width) & !(size - 1)
    }

    fn ranges(state: &MtrrState, limit: u64) -> Vec<(u64, u64, MemoryType)> {
        state
            .ranges(limit)
            .map(|range| (range.start, range.end, range.memory_type))
            .collect()
    }

    /// The fixed ranges as PC firmware leaves them: RAM to 640 KiB, VGA uncached, ROM shadow in the given type.
    fn pc_fixed(rom: u64) -> [u64; FIXED_COUNT] {
        let mut fixed = [rom * 0x0101_0101_0101_0101; FIXED_COUNT];
        fixed[0] = 0x0606_0606_0606_0606;
        fixed[1] = 0x0606_0606_0606_0606;
        fixed[2] = 0;
        fixed
    }

    #[test]
    fn disabled_mtrrs_make_everything_uncacheable() {
        let mut disabled = state(36, WB, &[(0, mask(36, GB), WB)]);
        disabled.default_type &= !ENABLE;
        disabled.default_type |= FIXED;
        disabled.fixed = pc_fixed(6);
        assert_eq!(disabled.type_of(0), UC);
        assert_eq!(ranges(&disabled, 1 << 36), vec![(0, 1 << 36, UC)]);
        assert_eq!(ranges(&MtrrState::disabled(40), GB), vec![(0, GB, UC)]);
    }

    #[test]
    fn limit_bounds_the_ranges() {
        let all = state(36, WB, &[]);
        assert_eq!(ranges(&all, 0), vec![]);
        assert_eq!(ranges(&all, 1), vec![(0, 1, WB)]);
        assert_eq!(ranges(&all, 1 << 36), vec![(0, 1 << 36, WB)]);
        // What does not exist is uncacheable.
        assert_eq!(
            ranges(&all, u64::MAX),
            vec![(0, 1 << 36, WB), (1 << 36, u64::MAX, UC)]
        );
        let mut iterator = all.ranges(GB);
        assert!(iterator.next().is_some());
        assert_eq!((iterator.next(), iterator.next()), (None, None));
    }

    #[test]
    fn fixed_ranges_win_below_1_mib_only_if_present_and_enabled() {
        let mut fixed = state(36, UC, &[(0, mask(36, 2 * MB), WT)]);
        fixed.fixed = pc_fixed(5);
        assert_eq!(
            ranges(&fixed, 4 * MB),
            vec![(0, 2 * MB, WT), (2 * MB, 4 * MB, UC)]
        );
        fixed.default_type |= FIXED;
        assert_eq!(
            ranges(&fixed, 4 * MB),
            vec![
                (0, 0xa_0000, WB),
                (0xa_0000, 0xc_0000, UC),
                (0xc_0000, MB, WP),
                (MB, 2 * MB, WT),
                (2 * MB, 4 * MB, UC),
            ]
        );
        fixed.capabilities &= !CAPABILITIES_FIXED;
        assert_eq!(fixed.type_of(0xa_0000), WT);
    }

    #[test]
    fn each_byte_of_each_fixed_register_has_its_place() {
        let edges: Vec<u64> = (0..8)
            .map(|n| n * 0x1_0000)
            .chain((0..16).map(|n| 0x8_0000 + n * 0x4000))
            .chain((0..64).map(|n| 0xc_0000 + n * 0x1000))
            .collect();
        assert_eq!(edges.len(), FIXED_COUNT * 8);
        for (n, &start) in edges.iter().enumerate() {
            let end = edges.get(n + 1).copied().unwrap_or(MB);
            let mut one = state(36, WB, &[]);
            one.default_type |= FIXED;
            one.fixed[n / 8] = 4 << (n % 8 * 8);
            let mut expected = vec![(start, end, WT)];
            if start > 0 {
                expected.insert(0, (0, start, UC));
            }
            if end < MB {
                expected.push((end, MB, UC));
            }
            expected.push((MB, GB, WB));
            assert_eq!(ranges(&one, GB), expected);
        }
    }

    #[test]
    fn overlaps_follow_the_precedences() {
        for (first, second, expected) in [
            (UC, WB, UC),
            (UC, WC, UC),
            (WT, WB, WT),
            (WT, WT, WT),
            (WB, WB, WB),
            (WC, WC, WC),
            (WP, WP, WP),
            // Undefined in the manual.
            (WC, WB, UC),
            (WP, WB, UC),
            (WC, WT, UC),
            (WP, WT, UC),
            (WC, WP, UC),
        ] {
            for (first, second) in [(first, second), (second, first)] {
                let two = state(
                    36,
                    WB,
                    &[(0, mask(36, GB), first), (0, mask(36, MB), second)],
                );
                assert_eq!(two.type_of(0), expected, "{first:?} and {second:?}");
            }
        }
        let three = state(
            36,
            UC,
            &[(0, 0, WB), (0, mask(36, GB), WT), (0, mask(36, GB), WB)],
        );
        assert_eq!(three.type_of(0), WT);
        assert_eq!(three.type_of(GB), WB);
    }

    #[test]
    fn reserved_types_are_uncacheable() {
        for reserved in [2, 3, 7, 8, 0x16, 0xff] {
            let mut all = state(36, UC, &[(GB, mask(36, GB), UC)]);
            all.default_type = ENABLE | FIXED | reserved;
            all.fixed = [reserved * 0x0101_0101_0101_0101; FIXED_COUNT];
            all.variable[0].0 |= reserved;
            assert_eq!(ranges(&all, 4 * GB), vec![(0, 4 * GB, UC)]);
        }
    }

    #[test]
    fn range_without_valid_bit_or_beyond_the_count_is_ignored() {
        let mut one = state(36, UC, &[(0, mask(36, GB), WB), (GB, mask(36, GB), WB)]);
        one.variable[0].1 &= !MASK_VALID;
        assert_eq!(one.type_of(0), UC);
        assert_eq!(one.type_of(GB), WB);
        one.variable_count = 1;
        assert_eq!(one.type_of(GB), UC);
        one.variable_count = usize::MAX;
        assert_eq!(one.type_of(GB), WB);
        assert!(one.is_truncated());
    }

    #[test]
    fn mask_with_a_gap_is_exact() {
        // Compares bits 32 and 25 only: odd multiples of 32 MiB in the lower half of each 8 GiB.
        let gap = state(34, UC, &[(32 * MB, (1 << 32) | (32 * MB), WB)]);
        assert_eq!(gap.first_discontiguous(), Some(0));
        let mut expected = Vec::new();
        for piece in 0..2 {
            for odd in (1..128).step_by(2) {
                let start = piece * 8 * GB + odd * 32 * MB;
                expected.push((start, start + 32 * MB, WB));
            }
        }
        let mut found = ranges(&gap, 1 << 34);
        found.retain(|range| range.2 == WB);
        assert_eq!(found, expected);
    }

    #[test]
    fn mask_with_too_many_gaps_is_coarse_and_uncacheable() {
        // Every other page, below bit 40 or anywhere: 2^27 pieces, and more.
        for high in [1 << 40, 0] {
            let gap = state(46, WB, &[(0x1000, high | 0x1000, WB)]);
            assert!(gap.ranges(u64::MAX).count() <= 513);
            assert_eq!(gap.type_of(0x1000), UC);
            assert_eq!(gap.type_of(0), UC);
        }
        let gap = state(46, WB, &[(0x1000, (1 << 40) | 0x1000, WB)]);
        assert_eq!(gap.type_of(1 << 40), WB);
    }

    #[test]
    fn mask_for_too_few_address_bits_repeats() {
        // Firmware that believed in 36 bits on a processor with 39.
        let narrow = state(39, UC, &[(0, mask(36, 2 * GB), WB)]);
        assert_eq!(narrow.first_discontiguous(), Some(0));
        assert_eq!(narrow.type_of(64 * GB), WB);
        assert_eq!(ranges(&narrow, 1 << 39).len(), 16);
        let right = state(39, UC, &[(0, mask(39, 2 * GB), WB), (0, 0, UC)]);
        assert_eq!(right.first_discontiguous(), None);
    }

    #[test]
    fn bits_beyond_the_physical_width_do_not_count() {
        let wide = state(36, UC, &[(1 << 40, mask(46, GB), WB)]);
        assert_eq!(wide.type_of(0), WB);
        assert_eq!(wide.type_of(1 << 40), UC);
        for width in [0, 11, 12, 52, 53, 64, u8::MAX] {
            let odd = state(width, WB, &[(0, !0xfff, WT)]);
            assert_eq!(
                odd.ranges(u64::MAX).last().map(|range| range.end),
                Some(u64::MAX)
            );
        }
    }

    #[test]
    fn registers_are_read_as_announced() {
        let mut asked = Vec::new();
        let state = MtrrState::from_msrs(36, |msr| {
            asked.push(msr);
            match msr {
                IA32_MTRRCAP => CAPABILITIES_FIXED | 3,
                IA32_MTRR_DEF_TYPE => ENABLE | FIXED,
                msr => u64::from(msr),
            }
        });
        let mut expected = vec![IA32_MTRRCAP, IA32_MTRR_DEF_TYPE];
        expected.extend(FIXED_MSRS);
        expected.extend(0x200..0x206);
        assert_eq!(asked, expected);
        assert_eq!(state.fixed[10], 0x26f);
        assert_eq!(state.variable[2], (0x204, 0x205));
        assert_eq!(state.variable_count, 3);
        assert!(!state.is_truncated());

        let mut asked = 0;
        let many = MtrrState::from_msrs(36, |msr| {
            asked += 1;
            if msr == IA32_MTRRCAP {
                200
            } else {
                0
            }
        });
        assert_eq!(asked, 2 + 2 * MAX_VARIABLE);
        assert!(many.is_truncated());
    }

    #[test]
    fn seabios_on_q35() {
        // Default WB, one uncacheable range over the PCI hole.
        for (hole, width) in [(0x8000_0000, 40), (0xc000_0000, 46)] {
            let mut q35 = state(width, WB, &[(hole, mask(width, 4 * GB - hole), UC)]);
            q35.default_type |= FIXED;
            q35.fixed = pc_fixed(5);
            let end = 1 << width;
            assert_eq!(
                ranges(&q35, end),
                vec![
                    (0, 0xa_0000, WB),
                    (0xa_0000, 0xc_0000, UC),
                    (0xc_0000, MB, WP),
                    (MB, hole, WB),
                    (hole, 4 * GB, UC),
                    (4 * GB, end, WB),
                ]
            );
        }
    }

    #[test]
    fn ovmf_on_q35() {
        // Default WB; two ranges cover the hole from 2 GiB with its MMCONFIG, one the 64-bit BARs.
        let mut q35 = state(
            40,
            WB,
            &[
                (2 * GB, mask(40, 2 * GB), UC),
                (0xe000_0000, mask(40, 256 * MB), UC),
                (512 * GB, mask(40, 512 * GB), UC),
            ],
        );
        q35.default_type |= FIXED;
        q35.fixed = pc_fixed(0);
        assert_eq!(
            ranges(&q35, 1 << 40),
            vec![
                (0, 0xa_0000, WB),
                (0xa_0000, MB, UC),
                (MB, 2 * GB, WB),
                (2 * GB, 4 * GB, UC),
                (4 * GB, 512 * GB, WB),
                (512 * GB, 1 << 40, UC),
            ]
        );
    }

    #[test]
    fn bochs_bios() {
        // Default UC; RAM is one write-back range, the frame buffer write-combining.
        let mut bochs = state(
            40,
            UC,
            &[(0, mask(40, GB), WB), (0xe000_0000, mask(40, 16 * MB), WC)],
        );
        bochs.default_type |= FIXED;
        bochs.fixed = pc_fixed(6);
        assert_eq!(
            ranges(&bochs, 4 * GB),
            vec![
                (0, 0xa_0000, WB),
                (0xa_0000, 0xc_0000, UC),
                (0xc_0000, GB, WB),
                (GB, 0xe000_0000, UC),
                (0xe000_0000, 0xe100_0000, WC),
                (0xe100_0000, 4 * GB, UC),
            ]
        );
    }

    #[test]
    fn server_that_carves_its_hole_out_of_larger_ranges() {
        // Default UC; 66 GiB of write-back in powers of two, with uncacheable pieces carved out below 2 GiB, and a
        // write-through range inside.
        let mut server = state(
            46,
            UC,
            &[
                (0, mask(46, 2 * GB), WB),
                (2 * GB - 64 * MB, mask(46, 64 * MB), UC),
                (2 * GB - 96 * MB, mask(46, 32 * MB), UC),
                (4 * GB, mask(46, 4 * GB), WB),
                (8 * GB, mask(46, 8 * GB), WB),
                (16 * GB, mask(46, 16 * GB), WB),
                (32 * GB, mask(46, 32 * GB), WB),
                (64 * GB, mask(46, 2 * GB), WB),
            ],
        );
        server.capabilities = CAPABILITIES_FIXED | 10;
        server.variable_count = 10;
        server.variable[8] = ((5 * GB) | 4, mask(46, 256 * MB) | MASK_VALID);
        server.variable[9] = (0x3800_0000_0000 | 1, mask(46, 256 * MB) | MASK_VALID);
        server.default_type |= FIXED;
        server.fixed = pc_fixed(5);
        assert_eq!(server.first_discontiguous(), None);
        assert!(!server.is_truncated());
        assert_eq!(
            ranges(&server, 1 << 46),
            vec![
                (0, 0xa_0000, WB),
                (0xa_0000, 0xc_0000, UC),
                (0xc_0000, MB, WP),
                (MB, 2 * GB - 96 * MB, WB),
                (2 * GB - 96 * MB, 4 * GB, UC),
                (4 * GB, 5 * GB, WB),
                (5 * GB, 5 * GB + 256 * MB, WT),
                (5 * GB + 256 * MB, 66 * GB, WB),
                (66 * GB, 0x3800_0000_0000, UC),
                (0x3800_0000_0000, 0x3800_1000_0000, WC),
                (0x3800_1000_0000, 1 << 46, UC),
            ]
        );
    }

    #[test]
    fn encodings_round_trip() {
        for encoding in 0..=u64::from(u8::MAX) {
            match MemoryType::from_encoding(encoding) {
                Some(memory_type) => assert_eq!(u64::from(memory_type.encoding()), encoding),
                None => assert_eq!(MemoryType::from_encoding_or_uncacheable(encoding), UC),
            }
        }
    }
}
