// SPDX-License-Identifier: GPL-2.0
//! The two forms of the XSAVE area (SDM 13.4): standard, as the image keeps a child's, and compacted, as clients of
//! the device exchange it.

use hv_abi::status::HvStatus;

/// Bytes of an area in either form.
pub const BYTES: usize = 4096;
/// Header: XSTATE_BV, then XCOMP_BV (SDM 13.4.2).
const XSTATE_BV: usize = 512;
const XCOMP_BV: usize = 520;
/// First byte after header.
const EXTENDED: usize = 576;
/// XCOMP_BV bit 63: the area is compacted.
const COMPACTED: u64 = 1 << 63;
/// x87 and SSE, which live in the legacy region.
const LEGACY: u64 = 3;
/// MXCSR and its position.
const MXCSR: usize = 24;
const MXCSR_RESERVED: u32 = 0xffff_0000;

/// Where the processor puts a component in the standard form: offset, size, and whether the compacted form aligns it
/// to 64 bytes. CPUID leaf 0dh tells (EBX, EAX, ECX bit 1 of sub-leaf `n`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Component {
    /// Offset in the standard form.
    pub offset: usize,
    /// Bytes.
    pub size: usize,
    /// Aligned to 64 bytes when compacted.
    pub aligned: bool,
}

fn get(area: &[u8], offset: usize) -> u64 {
    area.get(offset..offset + 8)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u64::from_le_bytes)
}

fn put(area: &mut [u8], offset: usize, value: u64) {
    if let Some(slot) = area.get_mut(offset..offset + 8) {
        slot.copy_from_slice(&value.to_le_bytes());
    }
}

/// Calls `each` with component and compacted offset of every extended component in `mask`, of those that `form` lays out.
/// The others only take room, and need not fit.
fn walk(
    form: u64,
    mask: u64,
    component: impl Fn(u32) -> Component,
    mut each: impl FnMut(Component, usize) -> Option<()>,
) -> Option<()> {
    let mut offset = EXTENDED;
    for bit in (2..63).filter(|bit| form >> bit & 1 != 0) {
        let c = component(bit);
        if c.aligned {
            offset = offset.checked_next_multiple_of(64)?;
        }
        let end = offset.checked_add(c.size)?;
        if mask >> bit & 1 != 0 {
            if end.max(c.offset.checked_add(c.size)?) > BYTES {
                return None;
            }
            each(c, offset)?;
        }
        offset = end;
    }
    Some(())
}

/// Writes the compacted form of a standard area to `to`: the components of `mask`, those in initial state left out of
/// XSTATE_BV.
pub fn compact(
    standard: &[u8; BYTES],
    to: &mut [u8; BYTES],
    mask: u64,
    component: impl Fn(u32) -> Component,
) -> Result<(), HvStatus> {
    to.fill(0);
    // MXCSR counts as part of SSE: it would be lost with the component in its initial state.
    let used = get(standard, XSTATE_BV) & mask | mask & 2;
    if let (Some(to), Some(from)) = (to.get_mut(..XSTATE_BV), standard.get(..XSTATE_BV)) {
        to.copy_from_slice(from);
    }
    put(to, XSTATE_BV, used);
    put(to, XCOMP_BV, COMPACTED | mask);
    walk(mask, used, component, |c, offset| {
        to.get_mut(offset..offset + c.size)?
            .copy_from_slice(standard.get(c.offset..c.offset + c.size)?);
        Some(())
    })
    .ok_or(HvStatus::INVALID_PARAMETER)
}

/// Writes the standard form of an area that the VMM gave, in either form, to `to`. Components outside `mask`, reserved
/// header bits and reserved MXCSR bits are refused: loading them would fault. The compacted form may leave room for
/// components outside `mask` that the processor has: clients lay out all that they offer the guest. On an error `to` is
/// unchanged.
pub fn expand(
    from: &[u8; BYTES],
    to: &mut [u8; BYTES],
    mask: u64,
    component: impl Fn(u32) -> Component,
) -> Result<(), HvStatus> {
    let used = get(from, XSTATE_BV);
    let form = get(from, XCOMP_BV);
    let reserved = from
        .get(XCOMP_BV + 8..EXTENDED)
        .is_some_and(|b| b.iter().any(|b| *b != 0));
    let mxcsr = get(from, MXCSR) as u32;
    let room = form & !mask;
    let unknown = (2..63).any(|bit| room >> bit & 1 != 0 && component(bit).size == 0);
    if used & !mask != 0 || unknown || reserved || mxcsr & MXCSR_RESERVED != 0 {
        return Err(HvStatus::INVALID_PARAMETER);
    }
    if form & COMPACTED == 0 {
        if form != 0 {
            return Err(HvStatus::INVALID_PARAMETER);
        }
        to.copy_from_slice(from);
        return Ok(());
    }
    if used & !form & !LEGACY != 0 {
        return Err(HvStatus::INVALID_PARAMETER);
    }
    // Nothing is written before it is known that every component fits.
    walk(form, used, &component, |_, _| Some(())).ok_or(HvStatus::INVALID_PARAMETER)?;
    to.fill(0);
    if let (Some(to), Some(from)) = (to.get_mut(..XSTATE_BV), from.get(..XSTATE_BV)) {
        to.copy_from_slice(from);
    }
    put(to, XSTATE_BV, used);
    walk(form, used, component, |c, offset| {
        to.get_mut(c.offset..c.offset + c.size)?
            .copy_from_slice(from.get(offset..offset + c.size)?);
        Some(())
    })
    .ok_or(HvStatus::INVALID_PARAMETER)
}

/// Puts x87 and SSE into the state after FNINIT and a reset of MXCSR.
pub fn reset(area: &mut [u8; BYTES]) {
    area.fill(0);
    put(area, 0, 0x37f);
    put(area, MXCSR, 0xffff_0000_1f80);
    put(area, XSTATE_BV, LEGACY);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As on processors with AVX, MPX, AVX-512, protection keys and AMX.
    fn component(bit: u32) -> Component {
        let (offset, size, aligned) = match bit {
            2 => (576, 256, false),
            3 => (960, 64, false),
            5 => (1088, 64, false),
            6 => (1152, 512, true),
            7 => (1664, 1024, true),
            9 => (2688, 8, false),
            18 => (2752, 8192, true),
            _ => (0, 0, false),
        };
        Component {
            offset,
            size,
            aligned,
        }
    }

    fn filled() -> [u8; BYTES] {
        let mut area = [0; BYTES];
        reset(&mut area);
        put(&mut area, XSTATE_BV, 0x2e7);
        for bit in [2, 5, 6, 7, 9] {
            let c = component(bit);
            area[c.offset..c.offset + c.size].fill(bit as u8);
        }
        area
    }

    fn compacted(area: &[u8; BYTES], mask: u64) -> [u8; BYTES] {
        let mut to = [0; BYTES];
        compact(area, &mut to, mask, component).unwrap();
        to
    }

    #[test]
    fn compacting_and_expanding_gives_the_same_back() {
        let area = filled();
        let compacted = compacted(&area, 0x2e7);
        assert_eq!(get(&compacted, XCOMP_BV), COMPACTED | 0x2e7);
        assert_eq!(compacted[576], 2);
        assert_eq!(compacted[576 + 256], 5);
        let mut back = [0; BYTES];
        expand(&compacted, &mut back, 0x2e7, component).unwrap();
        assert_eq!(back[..2696], area[..2696]);
    }

    #[test]
    fn component_in_initial_state_is_not_copied() {
        let mut area = filled();
        put(&mut area, XSTATE_BV, 1);
        let compacted = compacted(&area, 7);
        assert_eq!(get(&compacted, XSTATE_BV), 3);
        assert_eq!(compacted[576], 0);
    }

    #[test]
    fn client_that_names_no_component_is_accepted() {
        let mut area = [0; BYTES];
        put(&mut area, XCOMP_BV, COMPACTED);
        assert!(expand(&area, &mut [0; BYTES], 7, component).is_ok());
    }

    #[test]
    fn room_for_components_that_the_partition_lacks_is_passed_over() {
        let mut wide = compacted(&filled(), 4 | 8 | 0x20 | 1 << 18);
        put(&mut wide, XSTATE_BV, 4 | 0x20);
        // BNDREGS lie between AVX and the opmask registers.
        wide[576 + 256..576 + 256 + 64].fill(3);
        wide[576 + 256 + 64..576 + 256 + 128].fill(5);
        let mut to = [0; BYTES];
        expand(&wide, &mut to, 0x27, component).unwrap();
        assert_eq!((to[576], to[1088], to[1151]), (2, 5, 5));
        assert_eq!(get(&to, XSTATE_BV), 0x24);
        put(&mut wide, XSTATE_BV, 4 | 8);
        assert!(expand(&wide, &mut to, 0x27, component).is_err());
    }

    #[test]
    fn component_that_does_not_fit_is_refused() {
        let mut area = [0; BYTES];
        put(&mut area, XSTATE_BV, 1 << 18);
        put(&mut area, XCOMP_BV, COMPACTED | 1 << 18);
        let mut to = [7; BYTES];
        assert!(expand(&area, &mut to, 7 | 1 << 18, component).is_err());
        assert_eq!(to, [7; BYTES]);
        put(&mut area, XSTATE_BV, 0);
        assert!(expand(&area, &mut to, 7, component).is_ok());
    }

    #[test]
    fn what_would_fault_when_loaded_is_refused() {
        let good = compacted(&filled(), 7);
        for (offset, value) in [
            (XSTATE_BV, 1 << 17),
            (XCOMP_BV, COMPACTED | 7 | 1 << 40),
            (XCOMP_BV, COMPACTED),
            (XCOMP_BV + 8, 1),
            (MXCSR, 1 << 16),
            (XCOMP_BV, 1),
        ] {
            let mut bad = good;
            put(&mut bad, offset, value);
            let mut to = [7; BYTES];
            assert!(
                expand(&bad, &mut to, 7, component).is_err(),
                "{offset} {value:#x}"
            );
            assert_eq!(to, [7; BYTES]);
        }
    }

    /// Areas whose header is right, nearly right, or anything.
    fn any_area() -> impl Strategy<Value = [u8; BYTES]> {
        let bits = || prop_oneof![Just(0), any::<u64>().prop_map(|v| v & 0x2e7), any::<u64>()];
        let form = (any::<bool>(), bits()).prop_map(|(set, bits)| bits | u64::from(set) << 63);
        let rest = prop_oneof![8 => Just(0), 1 => any::<u64>()];
        let mxcsr = prop_oneof![Just(0x1f80), any::<u32>()];
        (any::<u64>(), bits(), form, rest, mxcsr).prop_map(|(seed, used, form, rest, mxcsr)| {
            let mut area = [0; BYTES];
            let mut state = seed;
            for byte in &mut area {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                *byte = (state >> 56) as u8;
            }
            put(&mut area, XSTATE_BV, used);
            put(&mut area, XCOMP_BV, form);
            area[XCOMP_BV + 8..EXTENDED].fill(0);
            put(&mut area, XCOMP_BV + 8 + (seed as usize % 6) * 8, rest);
            area[MXCSR..MXCSR + 4].copy_from_slice(&u32::to_le_bytes(mxcsr));
            area
        })
    }

    /// Components where a processor, or a broken one, could say they are.
    fn any_components() -> impl Strategy<Value = Vec<Component>> {
        let broken = (0..2 * BYTES, 0..2 * BYTES, any::<bool>());
        let broken = broken.prop_map(|(offset, size, aligned)| Component {
            offset,
            size,
            aligned,
        });
        prop_oneof![
            4 => Just((0..64).map(component).collect()),
            1 => prop::collection::vec(broken, 64),
        ]
    }

    proptest! {
        #[test]
        fn what_is_accepted_can_be_loaded_and_comes_back(
            area in any_area(),
            mask in any::<u64>().prop_map(|v| v & 0x2e7 | LEGACY),
            components in any_components(),
        ) {
            let component = |bit: u32| components[bit as usize];
            let mut to = [7; BYTES];
            if expand(&area, &mut to, mask, component).is_err() {
                prop_assert_eq!(to, [7; BYTES]);
                return Ok(());
            }
            // What XRSTOR checks (SDM 13.8.1).
            prop_assert_eq!(get(&to, XSTATE_BV) & !mask, 0);
            prop_assert_eq!(get(&to, XCOMP_BV), 0);
            prop_assert!(to[XCOMP_BV + 8..EXTENDED].iter().all(|byte| *byte == 0));
            prop_assert_eq!(get(&to, MXCSR) as u32 & MXCSR_RESERVED, 0);
            let used = get(&area, XSTATE_BV) & !LEGACY;
            if get(&area, XCOMP_BV) & COMPACTED != 0 && components[2] == super::tests::component(2) {
                // Where the compacted form has each component, step by step.
                prop_assert_eq!(used & !get(&area, XCOMP_BV), 0);
                let mut offset = EXTENDED;
                for bit in (2..63).filter(|bit| get(&area, XCOMP_BV) >> bit & 1 != 0) {
                    let c = component(bit);
                    offset = if c.aligned { (offset + 63) / 64 * 64 } else { offset };
                    if used >> bit & 1 != 0 {
                        prop_assert_eq!(&to[c.offset..c.offset + c.size], &area[offset..offset + c.size]);
                    }
                    offset += c.size;
                }
            }
            let mut compacted = [0; BYTES];
            if compact(&to, &mut compacted, mask, component).is_err() {
                return Ok(());
            }
            let mut back = [0; BYTES];
            prop_assert!(expand(&compacted, &mut back, mask, component).is_ok());
            prop_assert_eq!(&back[..XSTATE_BV], &to[..XSTATE_BV]);
            prop_assert_eq!(get(&back, XSTATE_BV), get(&to, XSTATE_BV) | 2);
            if components[2] == super::tests::component(2) {
                for bit in (2..63).filter(|bit| get(&to, XSTATE_BV) >> bit & 1 != 0) {
                    let c = component(bit);
                    prop_assert_eq!(&back[c.offset..c.offset + c.size], &to[c.offset..c.offset + c.size]);
                }
            }
        }
    }
}
