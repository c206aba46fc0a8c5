// SPDX-License-Identifier: GPL-2.0

//! The MTRR map against a naive reading of SDM 13.11, on arbitrary register values.

use hv_x86::mtrr::{MemoryType, MtrrState, Range, FIXED_COUNT, MAX_VARIABLE};
use proptest::prelude::*;

const PAGE: u64 = 0x1000;
const VALID: u64 = 1 << 11;

/// The manual, word by word: no sharing of code or ideas with the crate.
fn naive_type_of(state: &MtrrState, spa: u64) -> MemoryType {
    let decode = |encoding: u64| match encoding & 0xff {
        1 => MemoryType::WriteCombining,
        4 => MemoryType::WriteThrough,
        5 => MemoryType::WriteProtected,
        6 => MemoryType::WriteBack,
        _ => MemoryType::Uncacheable,
    };
    let enabled = (state.default_type >> 11) & 1 != 0;
    let fixed = (state.default_type >> 10) & 1 != 0 && (state.capabilities >> 8) & 1 != 0;
    if !enabled || spa >> state.physical_address_bits != 0 {
        return MemoryType::Uncacheable;
    }
    if fixed && spa < 0x10_0000 {
        let (register, start, size) = match spa {
            0..0x8_0000 => (0, 0, 0x1_0000),
            0x8_0000..0xa_0000 => (1, 0x8_0000, 0x4000),
            0xa_0000..0xc_0000 => (2, 0xa_0000, 0x4000),
            _ => {
                let n = (spa - 0xc_0000) / 0x8000;
                (3 + n as usize, 0xc_0000 + n * 0x8000, 0x1000)
            }
        };
        let byte = (spa - start) / size;
        return decode(u64::from(
            state.fixed[register].to_le_bytes()[byte as usize],
        ));
    }
    let mut types = Vec::new();
    for (base, mask) in &state.variable[..state.variable_count] {
        let matched = (12..state.physical_address_bits)
            .all(|bit| (mask >> bit) & 1 == 0 || ((base >> bit) & 1) == ((spa >> bit) & 1));
        if mask & VALID != 0 && matched {
            types.push(decode(*base));
        }
    }
    let Some(&first) = types.first() else {
        return decode(state.default_type);
    };
    if types.iter().all(|&memory_type| memory_type == first) {
        return first;
    }
    let defined = [MemoryType::WriteThrough, MemoryType::WriteBack];
    if types
        .iter()
        .all(|memory_type| defined.contains(memory_type))
    {
        return MemoryType::WriteThrough;
    }
    MemoryType::Uncacheable
}

/// Mostly real types, sometimes a reserved one.
fn encoding() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => prop::sample::select(vec![0u64, 1, 4, 5, 6]),
        1 => 0u64..256,
    ]
}

/// Mostly few different bytes, so that neighbours are often equal.
fn fixed_register() -> impl Strategy<Value = u64> {
    prop_oneof![
        encoding().prop_map(|byte| byte * 0x0101_0101_0101_0101),
        prop::collection::vec(encoding(), 8)
            .prop_map(|bytes| { bytes.iter().fold(0, |value, byte| (value << 8) | byte) }),
    ]
}

/// A range within `width` bits whose mask compares no bit below `lowest`: a power of two as firmware sets it, or any
/// mask; sometimes not valid.
fn variable_range(width: u8, lowest: u8) -> impl Strategy<Value = (u64, u64)> {
    let limit = 1u64 << width;
    let contiguous = (lowest..=width).prop_map(move |shift| (limit - 1) & !((1u64 << shift) - 1));
    let mask = prop_oneof![3 => contiguous.boxed(), 1 => (0..limit).boxed()];
    (0..limit, mask, encoding(), prop::bool::weighted(0.9)).prop_map(
        move |(base, mask, encoding, valid)| {
            let compared = mask & !((1u64 << lowest) - 1);
            let valid = if valid { VALID } else { 0 };
            (base & !0xfff | encoding, compared | valid)
        },
    )
}

/// Any state; `coarse` is how many of the lowest bits no mask compares, so that few ranges come out.
fn state(width: u8, coarse: u8) -> impl Strategy<Value = MtrrState> {
    (
        prop::array::uniform11(fixed_register()),
        prop::collection::vec(variable_range(width, coarse), 0..=MAX_VARIABLE),
        encoding(),
        prop::bool::weighted(0.95),
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(
            move |(fixed, variable, default, enable, fixed_enable, fixed_present)| {
                let fixed: [u64; FIXED_COUNT] = fixed;
                let mut state = MtrrState::disabled(width);
                state.capabilities = variable.len() as u64 | (u64::from(fixed_present) << 8);
                state.default_type =
                    default | (u64::from(fixed_enable) << 10) | (u64::from(enable) << 11);
                state.fixed = fixed;
                state.variable_count = variable.len();
                for (slot, range) in state.variable.iter_mut().zip(variable) {
                    *slot = range;
                }
                state
            },
        )
}

/// Sorted, without holes, up to the limit, and no two neighbours of one type.
fn check_shape(ranges: &[Range], limit: u64) -> Result<(), TestCaseError> {
    let mut at = 0;
    let mut before = None;
    for range in ranges {
        prop_assert_eq!(range.start, at);
        prop_assert!(range.end > range.start);
        prop_assert_ne!(before, Some(range.memory_type));
        at = range.end;
        before = Some(range.memory_type);
    }
    prop_assert_eq!(at, limit);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    /// Small address space, every page, any mask (of so few bits, none has too many gaps to be exact).
    #[test]
    fn every_page_has_the_type_of_its_range(
        (width, state) in (13u8..=20).prop_flat_map(|width| (Just(width), state(width, 12))),
    ) {
        let limit = (1 << width) + 4 * PAGE;
        let ranges: Vec<Range> = state.ranges(limit).collect();
        check_shape(&ranges, limit)?;
        let mut current = ranges.iter();
        let mut range = current.next().unwrap();
        for page in (0..limit).step_by(PAGE as usize) {
            if page >= range.end {
                range = current.next().unwrap();
            }
            let expected = naive_type_of(&state, page);
            prop_assert_eq!(state.type_of(page), expected);
            prop_assert_eq!(state.type_of(page + PAGE - 1), expected);
            prop_assert_eq!(range.memory_type, expected, "page {:#x}", page);
        }
    }

    /// Real widths: probes at all edges and anywhere.
    #[test]
    fn probes_have_the_type_of_their_range(
        (width, state) in prop::sample::select(vec![36u8, 39, 40, 46, 48, 52])
            .prop_flat_map(|width| (Just(width), state(width, width - 8))),
        anywhere in prop::collection::vec(any::<u64>(), 64),
    ) {
        let limit = 1 << width;
        let ranges: Vec<Range> = state.ranges(limit).collect();
        check_shape(&ranges, limit)?;
        let edges = ranges.iter().flat_map(|range| [range.start, range.end - 1]);
        let bases = state.variable.iter().flat_map(|(base, _)| {
            let base = base & !0xfff;
            [base, base.wrapping_sub(1), base ^ PAGE]
        });
        let inside = ranges.iter().map(|range| range.start + (range.end - range.start) / 2);
        for probe in edges.chain(bases).chain(inside).chain(anywhere) {
            let probe = probe % limit;
            let range = ranges.iter().find(|range| (range.start..range.end).contains(&probe));
            let expected = naive_type_of(&state, probe);
            prop_assert_eq!(state.type_of(probe), expected);
            prop_assert_eq!(range.map(|range| range.memory_type), Some(expected));
        }
    }

    /// With too many gaps the type is uncacheable where it is not exact.
    #[test]
    fn masks_with_many_gaps_are_conservative(
        state in state(40, 12),
        anywhere in prop::collection::vec(0u64..1 << 40, 64),
    ) {
        let limit = 1 << 40;
        let ranges: Vec<Range> = state.ranges(limit).collect();
        check_shape(&ranges, limit)?;
        let edges = ranges.iter().flat_map(|range| [range.start, range.end - 1]);
        for probe in edges.chain(anywhere) {
            let found = state.type_of(probe);
            let range = ranges.iter().find(|range| (range.start..range.end).contains(&probe));
            prop_assert_eq!(range.map(|range| range.memory_type), Some(found));
            if found != MemoryType::Uncacheable {
                prop_assert_eq!(found, naive_type_of(&state, probe));
            }
        }
    }

    /// A smaller limit only cuts.
    #[test]
    fn limit_only_cuts(state in state(36, 28), limit in 1u64..1 << 37) {
        let cut: Vec<Range> = state
            .ranges(1 << 37)
            .filter(|range| range.start < limit)
            .map(|range| Range { end: range.end.min(limit), ..range })
            .collect();
        prop_assert_eq!(state.ranges(limit).collect::<Vec<_>>(), cut);
    }

    /// Whatever the registers hold, nothing panics.
    #[test]
    fn arbitrary_registers_are_survived(
        capabilities: u64,
        default_type: u64,
        fixed: [u64; FIXED_COUNT],
        variable: [(u64, u64); MAX_VARIABLE],
        variable_count: usize,
        physical_address_bits: u8,
        probes: [u64; 16],
    ) {
        let state = MtrrState {
            capabilities,
            default_type,
            fixed,
            variable,
            variable_count,
            physical_address_bits,
        };
        for probe in probes {
            state.type_of(probe);
        }
        let mut at = 0;
        for range in state.ranges(u64::MAX).take(200) {
            prop_assert_eq!(range.start, at);
            at = range.end;
        }
        state.first_discontiguous();
        state.is_truncated();
    }
}
