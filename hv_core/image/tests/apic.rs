// SPDX-License-Identifier: GPL-2.0
//! Properties of the virtual local APIC that must hold whatever a guest or a VMM does to it.

use std::collections::BTreeSet;

use hv_image::apic::{
    Addressing, ApicConfig, DeliveryMode, Destination, Interrupt, InterruptControllerState,
    LocalApic, Lvt, Mode, Posted, TimerClock, WriteEffect, BROADCAST, STATE_SIZE,
};
use proptest::prelude::*;

const APIC_HZ: u64 = TimerClock::HYPERV_APIC_HZ;

fn new_apic(tsc_hz: u64, id: u32, x2apic: bool) -> LocalApic {
    let clock = TimerClock::new(tsc_hz, APIC_HZ).expect("frequencies are not 0");
    let config = ApicConfig {
        x2apic,
        tsc_deadline: true,
        physical_address_bits: 40,
        clock,
    };
    LocalApic::new(config, id, id == 0)
}

/// Anything that can happen to an APIC.
#[derive(Clone, Debug)]
enum Op {
    Read(u32),
    Write(u32, u32),
    MsrRead(u32),
    MsrWrite(u32, u64),
    Base(u64),
    RestoreBase(u64),
    Accept(Interrupt),
    Post(Interrupt),
    Drain,
    Raise(Lvt, u8),
    Deliver,
    Acknowledge(u8),
    Eoi,
    Icr(u64),
    Cr8(u64),
    Deadline(u64),
    Tick(u64),
    SetTsc(u64),
    Expire,
    TakeEvents,
    Reset(bool),
    Import(usize, u32),
}

fn interrupt() -> impl Strategy<Value = Interrupt> {
    (0..12_u32, any::<u8>(), any::<bool>()).prop_map(|(mode, vector, level)| Interrupt {
        mode: DeliveryMode::from_bits(mode).unwrap_or(DeliveryMode::Fixed),
        vector,
        level,
    })
}

/// Numbers as guests like them: plain, all ones, single bits.
fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        any::<u32>().prop_map(u64::from),
        (0..0x800_u64),
        (0..64_u32).prop_map(|bit| 1 << bit),
        Just(u64::MAX),
        Just(0x1ff),
    ]
}

fn base() -> impl Strategy<Value = u64> {
    let usual = (0..16_u64).prop_map(|flags| 0xfee0_0000 | (flags << 8));
    prop_oneof![4 => usual, 1 => value()]
}

fn lvt() -> impl Strategy<Value = Lvt> {
    use Lvt::{Error, Lint0, Lint1, PerfMon, Thermal, Timer};
    prop::sample::select(vec![Timer, Thermal, PerfMon, Lint0, Lint1, Error])
}

fn op() -> impl Strategy<Value = Op> {
    let offset = || prop_oneof![8 => (0..0x41_u32).prop_map(|index| index << 4), 1 => any::<u32>()];
    let msr = || prop_oneof![8 => 0x800..0x841_u32, 1 => any::<u32>()];
    prop_oneof![
        2 => offset().prop_map(Op::Read),
        8 => (offset(), value()).prop_map(|(at, value)| Op::Write(at, value as u32)),
        2 => msr().prop_map(Op::MsrRead),
        8 => (msr(), value()).prop_map(|(msr, value)| Op::MsrWrite(msr, value)),
        1 => base().prop_map(Op::Base),
        1 => base().prop_map(Op::RestoreBase),
        6 => interrupt().prop_map(Op::Accept),
        6 => interrupt().prop_map(Op::Post),
        4 => Just(Op::Drain),
        3 => (lvt(), any::<u8>()).prop_map(|(lvt, vector)| Op::Raise(lvt, vector)),
        6 => Just(Op::Deliver),
        1 => any::<u8>().prop_map(Op::Acknowledge),
        4 => Just(Op::Eoi),
        2 => value().prop_map(Op::Icr),
        2 => (0..20_u64).prop_map(Op::Cr8),
        2 => value().prop_map(Op::Deadline),
        4 => (0..100_000_u64).prop_map(Op::Tick),
        1 => value().prop_map(Op::SetTsc),
        3 => Just(Op::Expire),
        1 => Just(Op::TakeEvents),
        1 => any::<bool>().prop_map(Op::Reset),
        1 => (0..STATE_SIZE, any::<u32>()).prop_map(|(at, value)| Op::Import(at, value)),
    ]
}

fn apply(apic: &mut LocalApic, posted: &Posted, now: &mut u64, op: Op) {
    match op {
        Op::Read(offset) => {
            let _ = apic.read(offset, *now);
        }
        Op::Write(offset, value) => {
            let mapped = apic.mode() == Mode::XApic;
            assert_eq!(apic.write(offset, value, *now).is_ok(), mapped);
        }
        Op::MsrRead(msr) => {
            let _ = apic.msr_read(msr, *now);
        }
        Op::MsrWrite(msr, value) => {
            let _ = apic.msr_write(msr, value, *now);
        }
        Op::Base(value) => {
            let _ = apic.write_apic_base(value);
        }
        Op::RestoreBase(value) => {
            let _ = apic.restore_apic_base(value);
        }
        Op::Accept(interrupt) => {
            let _ = apic.accept(interrupt);
        }
        Op::Post(interrupt) => {
            let _ = posted.post(interrupt);
        }
        Op::Drain => {
            let _ = posted.drain_into(apic);
        }
        Op::Raise(lvt, vector) => {
            let _ = apic.raise(lvt, vector);
        }
        Op::Deliver => {
            if let Some(vector) = apic.highest_pending() {
                assert!(apic.acknowledge(vector));
            }
        }
        Op::Acknowledge(vector) => {
            let _ = apic.acknowledge(vector);
        }
        Op::Eoi => {
            let _ = apic.eoi();
        }
        Op::Icr(value) => {
            let _ = apic.write_icr(value);
        }
        Op::Cr8(value) => assert_eq!(apic.set_cr8(value).is_ok(), value < 16),
        Op::Deadline(value) => {
            let _ = apic.write_tsc_deadline(value, *now);
        }
        Op::Tick(ticks) => *now = now.saturating_add(ticks),
        Op::SetTsc(value) => {
            apic.tsc_changed(*now, value);
            *now = value;
        }
        Op::Expire => {
            apic.timer_expired(*now);
            if *now < u64::MAX {
                assert!(apic.timer_deadline().is_none_or(|deadline| deadline > *now));
            }
        }
        Op::TakeEvents => {
            apic.take_nmi();
            apic.take_init();
            apic.take_sipi();
            apic.take_ext_int();
        }
        Op::Reset(keep) => apic.reset(keep),
        Op::Import(at, value) => {
            let mut bytes = apic.export(*now).to_bytes();
            for (byte, new) in bytes.iter_mut().skip(at).zip(value.to_le_bytes()) {
                *byte = new;
            }
            let _ = apic.import(&InterruptControllerState::from_bytes(&bytes), *now);
        }
    }
}

fn highest(registers: &[u32; 8]) -> u8 {
    (0..=255_u8)
        .rev()
        .find(|&v| registers[usize::from(v >> 5)] & (1 << (v & 31)) != 0)
        .unwrap_or(0)
}

/// What holds at any time, computed the slow way from the saved state.
fn check(apic: &LocalApic, now: u64) {
    let state = apic.export(now);
    for registers in [&state.apic_isr, &state.apic_tmr, &state.apic_irr] {
        assert_eq!(registers[0] & 0xffff, 0, "vectors below 16 are never set");
    }
    let (irr, isr) = (highest(&state.apic_irr), highest(&state.apic_isr));
    let (tpr, ppr) = (apic.tpr(), apic.ppr());
    assert_eq!(ppr >> 4, (tpr >> 4).max(isr >> 4));
    assert!(ppr & 15 == 0 || ppr == tpr);
    let deliverable = irr >> 4 > ppr >> 4 && apic.mode() != Mode::Disabled;
    assert_eq!(apic.highest_pending(), deliverable.then_some(irr));
    assert_eq!(apic.pending().vector, apic.highest_pending());
    let threshold = apic.tpr_threshold();
    assert!(threshold == 0 || (threshold == irr >> 4 && threshold <= tpr >> 4 && !deliverable));
    if state.apic_spurious & 0x100 == 0 {
        assert!(!apic.is_enabled());
        for entry in [
            state.apic_lvt_timer,
            state.apic_lvt_thermal,
            state.apic_lvt_perfmon,
            state.apic_lvt_lint0,
            state.apic_lvt_lint1,
            state.apic_lvt_error,
        ] {
            assert_ne!(entry & 0x1_0000, 0, "software-disabled means masked");
        }
        assert_eq!(apic.timer_deadline(), None);
    }
    assert!(state.apic_counter_value <= state.apic_initial_count);
    assert_eq!(
        Mode::X2Apic == apic.mode(),
        apic.apic_base() & 0xc00 == 0xc00
    );
    assert_eq!(apic.page().is_some(), apic.mode() == Mode::XApic);
}

/// Export, import, export: equal, into itself and into a fresh APIC of the same mode.
fn check_round_trip(apic: &LocalApic, fresh: &LocalApic, now: u64) {
    let state = apic.export(now);
    assert_eq!(
        InterruptControllerState::from_bytes(&state.to_bytes()),
        state
    );
    let mut other = fresh.clone();
    assert_eq!(other.restore_apic_base(apic.apic_base()), Ok(()));
    assert_eq!(other.import(&state, now), Ok(()));
    assert_eq!(other.export(now), state);
    other.set_tpr(apic.tpr());
    assert_eq!(other.ppr(), apic.ppr());
    assert_eq!(other.highest_pending(), apic.highest_pending());
}

proptest! {
    #[test]
    fn no_sequence_of_accesses_panics_or_breaks_an_invariant(
        ops in prop::collection::vec(op(), 1..120),
        tsc_hz in prop_oneof![Just(2_400_000_000), 1_u64..10_000_000_000],
        id in prop_oneof![0_u32..8, any::<u32>()],
        x2apic in any::<bool>(),
    ) {
        let fresh = new_apic(tsc_hz, id, x2apic);
        let mut apic = fresh.clone();
        let posted = Posted::new();
        let mut now = 1_000;
        for op in ops {
            apply(&mut apic, &posted, &mut now, op);
            check(&apic, now);
        }
        check_round_trip(&apic, &fresh, now);
    }

    #[test]
    fn any_bytes_are_refused_or_imported_into_a_valid_state(
        words in prop::collection::vec(prop_oneof![6 => Just(0_u32), 1 => any::<u32>()], STATE_SIZE / 4),
        plausible in any::<bool>(),
    ) {
        let mut apic = new_apic(2_400_000_000, 0, true);
        let before = apic.export(7);
        let mut bytes = [0; STATE_SIZE];
        for (chunk, word) in bytes.chunks_exact_mut(4).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        let mut state = InterruptControllerState::from_bytes(&bytes);
        if plausible {
            state.apic_id = 0;
            state.apic_dfr = u32::MAX;
            state.apic_ldr &= 0xff00_0000;
            state.apic_spurious &= 0x3ff;
            state.apic_icr_low &= 0xfff;
            state.apic_isr[0] &= !0xffff;
            state.apic_tmr[0] &= !0xffff;
            state.apic_irr[0] &= !0xffff;
        }
        let accepted = apic.import(&state, 7).is_ok();
        check(&apic, 7);
        let after = apic.export(7);
        if accepted {
            let mut again = new_apic(2_400_000_000, 0, true);
            prop_assert_eq!(again.import(&after, 7), Ok(()));
            prop_assert_eq!(again.export(7), after);
        } else {
            prop_assert_eq!(after, before);
        }
    }

    #[test]
    fn delivery_order_is_that_of_a_naive_model(
        steps in prop::collection::vec((0..4_u8, any::<u8>(), any::<bool>()), 1..200),
    ) {
        let mut apic = new_apic(2_400_000_000, 0, true);
        let _ = apic.write(0xf0, 0x1ff, 0).expect("xAPIC mode");
        let (mut irr, mut isr, mut tmr) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        let mut tpr = 0_u8;
        for (step, vector, level) in steps {
            match step {
                0 => {
                    apic.accept(if level { Interrupt::level(vector) } else { Interrupt::edge(vector) });
                    if vector >= 16 {
                        irr.insert(vector);
                        if level { tmr.insert(vector); } else { tmr.remove(&vector); }
                    }
                }
                1 => {
                    let floor = (tpr >> 4).max(isr.last().map_or(0, |v: &u8| v >> 4));
                    let expected = irr.last().copied().filter(|v: &u8| v >> 4 > floor);
                    prop_assert_eq!(apic.highest_pending(), expected);
                    if let Some(v) = expected {
                        prop_assert!(apic.acknowledge(v));
                        irr.remove(&v);
                        isr.insert(v);
                    }
                }
                2 => {
                    let expected = isr.pop_last().map_or(WriteEffect::None, |vector| {
                        WriteEffect::Eoi { vector, level: tmr.contains(&vector) }
                    });
                    prop_assert_eq!(apic.write(0xb0, 0, 0), Ok(expected));
                }
                _ => {
                    // Mostly low, or nothing would ever be delivered.
                    tpr = if level { vector } else { 0 };
                    apic.set_tpr(tpr);
                }
            }
        }
    }

    #[test]
    fn clock_conversions_are_exact_inverses(
        tsc_hz in 1_000_000_u64..20_000_000_000,
        bus in 0_u64..1 << 45,
    ) {
        let clock = TimerClock::new(tsc_hz, APIC_HZ).expect("frequencies are not 0");
        let tsc = clock.tsc_ticks(bus);
        prop_assert!(clock.bus_ticks(tsc) >= bus);
        prop_assert!(tsc == 0 || clock.bus_ticks(tsc - 1) < bus);
        let exact = (u128::from(bus) * u128::from(tsc_hz)).div_ceil(u128::from(APIC_HZ));
        prop_assert!(u128::from(tsc).abs_diff(exact) <= 1);
    }

    #[test]
    fn one_shot_reaches_zero_exactly_at_its_deadline(
        tsc_hz in 1_000_000_u64..20_000_000_000,
        count in 1_u32..,
        divide in prop::sample::select(vec![0_u32, 1, 2, 3, 8, 9, 10, 11]),
        start in 0_u64..1 << 60,
        part in 0.0_f64..1.0,
    ) {
        let mut apic = new_apic(tsc_hz, 0, false);
        for (register, value) in [(0xf0, 0x1ff), (0x320, 0x40), (0x3e0, divide), (0x380, count)] {
            let _ = apic.write(register, value, start).expect("xAPIC mode");
        }
        let deadline = apic.timer_deadline().expect("armed");
        prop_assert_eq!(apic.current_count(start), count);
        prop_assert_eq!(apic.current_count(deadline), 0);
        prop_assert!(apic.current_count(deadline - 1) >= 1);
        let between = start + ((deadline - start) as f64 * part) as u64;
        prop_assert!(apic.current_count(between) <= count);
        prop_assert!(apic.current_count(between) >= apic.current_count(between + 1));
        prop_assert!(!apic.timer_expired(deadline - 1));
        prop_assert!(apic.timer_expired(deadline));
        prop_assert_eq!(apic.highest_pending(), Some(0x40));
    }

    #[test]
    fn periodic_expiries_stay_on_their_grid_however_late_they_are_seen(
        tsc_hz in 1_000_000_u64..20_000_000_000,
        count in 1_u32..1_000_000,
        delays in prop::collection::vec(0_u64..100_000_000, 1..50),
    ) {
        let mut apic = new_apic(tsc_hz, 0, false);
        let start = 12_345;
        for (register, value) in [(0xf0, 0x1ff), (0x320, 0x2_0040), (0x3e0, 0xb), (0x380, count)] {
            let _ = apic.write(register, value, start).expect("xAPIC mode");
        }
        for delay in delays {
            let now = apic.timer_deadline().expect("armed") + delay;
            prop_assert!(apic.timer_expired(now));
            prop_assert!(!apic.timer_expired(now));
            let next = apic.timer_deadline().expect("armed");
            prop_assert!(next > now);
            // The nearest multiple of the period, to one TSC tick (or one bus tick if that is longer).
            let (num, den) = (u128::from(count) * u128::from(tsc_hz), u128::from(APIC_HZ));
            let periods = (u128::from(next - start) * den + num / 2) / num;
            let grid = (periods * num).div_ceil(den);
            prop_assert!(grid.abs_diff(u128::from(next - start)) <= 1);
            let first = (u128::from(now - start) * den) / num + 1;
            prop_assert!(periods.abs_diff(first) <= 1 && periods >= first - 1);
        }
    }

    #[test]
    fn published_addressing_matches_like_the_apic_itself(
        id in any::<u32>(),
        ldr in any::<u32>(),
        dfr in prop::sample::select(vec![u32::MAX, 0x0fff_ffff, 0x7fff_ffff]),
        kind in 0..3_u8,
        mda in prop_oneof![0..0x100_u32, any::<u32>(), Just(BROADCAST)],
        is_sender in any::<bool>(),
    ) {
        let addressing = match kind {
            0 => Addressing::off(id),
            1 => Addressing::xapic(id, ldr, dfr),
            _ => Addressing::x2apic(id),
        };
        let posted = Posted::new();
        posted.publish(addressing);
        for destination in [
            Destination::Physical(mda),
            Destination::Physical(id),
            Destination::Logical(mda),
            Destination::AllIncludingSelf,
            Destination::AllExcludingSelf,
        ] {
            prop_assert_eq!(
                posted.matches(destination, is_sender),
                addressing.matches(destination, is_sender)
            );
        }
        prop_assert_eq!(posted.matches(Destination::Physical(id), false), kind != 0);
    }
}

#[test]
fn each_x2apic_is_the_only_one_with_its_logical_id() {
    for id in 0..0x200_u32 {
        let logical = Destination::Logical(hv_image::apic::x2apic_ldr(id));
        for other in 0..0x200_u32 {
            assert_eq!(
                Addressing::x2apic(other).matches(logical, false),
                id == other
            );
        }
    }
}
