// SPDX-License-Identifier: GPL-2.0
//! Behaviour of the APIC, one sentence each. Properties over random accesses: `tests/apic.rs`.
#![allow(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]

use super::*;

/// 2.4 GHz: 12 TSC ticks for one bus tick.
const TSC_HZ: u64 = 2_400_000_000;
const TICK: u64 = 12;

const EOI: u32 = 0xb0;
const TPR: u32 = 0x80;
const LDR: u32 = 0xd0;
const DFR: u32 = 0xe0;
const SVR: u32 = 0xf0;
const ESR: u32 = 0x280;
const ICR_LOW: u32 = 0x300;
const ICR_HIGH: u32 = 0x310;
const LVT_TIMER: u32 = 0x320;
const LVT_PERF: u32 = 0x340;
const LVT_LINT0: u32 = 0x350;
const LVT_LINT1: u32 = 0x360;
const LVT_ERROR: u32 = 0x370;
const INITIAL: u32 = 0x380;
const CURRENT: u32 = 0x390;
const DIVIDE: u32 = 0x3e0;
const BY_1: u32 = 0b1011;

const PERIODIC: u32 = 1 << 17;
const DEADLINE: u32 = 2 << 17;
const GP: ApicFault = ApicFault::GeneralProtection;

fn config() -> ApicConfig {
    ApicConfig {
        x2apic: true,
        tsc_deadline: true,
        physical_address_bits: 46,
        clock: TimerClock::new(TSC_HZ, TimerClock::HYPERV_APIC_HZ).unwrap(),
    }
}

/// Software-enabled, xAPIC mode.
fn xapic(id: u32) -> LocalApic {
    let mut apic = LocalApic::new(config(), id, id == 0);
    let _ = put(&mut apic, SVR, 0x1ff);
    apic
}

/// Software-enabled, x2APIC mode.
fn x2apic(id: u32) -> LocalApic {
    let mut apic = xapic(id);
    let base = apic.apic_base() | APIC_BASE_EXTD;
    assert_eq!(apic.write_apic_base(base), Ok(WriteEffect::BaseChanged));
    apic
}

fn put(apic: &mut LocalApic, offset: u32, value: u32) -> WriteEffect {
    apic.write(offset, value, 0).unwrap()
}

fn get(apic: &mut LocalApic, offset: u32) -> u32 {
    apic.read(offset, 0).unwrap()
}

fn errors(apic: &mut LocalApic) -> u32 {
    let _ = put(apic, ESR, 0);
    get(apic, ESR)
}

fn ipi(effect: WriteEffect) -> IpiRequest {
    match effect {
        WriteEffect::Ipi(request) => request,
        other => panic!("no IPI but {other:?}"),
    }
}

fn service(apic: &mut LocalApic, vector: u8) {
    assert_eq!(apic.highest_pending(), Some(vector));
    assert!(apic.acknowledge(vector));
}

fn signal(mode: DeliveryMode, vector: u8) -> Interrupt {
    Interrupt {
        mode,
        vector,
        level: false,
    }
}

// ---- reset state and modes

#[test]
fn power_on_state_is_what_the_manual_says() {
    let mut apic = LocalApic::new(config(), 3, false);
    assert_eq!(apic.apic_base(), 0xfee0_0800);
    assert_eq!(LocalApic::new(config(), 0, true).apic_base(), 0xfee0_0900);
    assert_eq!(apic.page(), Some(DEFAULT_PAGE));
    assert_eq!(get(&mut apic, 0x20), 3 << 24);
    assert_eq!(get(&mut apic, 0x30), 0x0005_0014);
    assert_eq!(get(&mut apic, SVR), 0xff);
    assert_eq!(get(&mut apic, DFR), u32::MAX);
    for offset in (LVT_TIMER..=LVT_ERROR).step_by(16) {
        assert_eq!(get(&mut apic, offset), 0x1_0000);
    }
    for offset in [TPR, LDR, ESR, ICR_LOW, ICR_HIGH, INITIAL, CURRENT, DIVIDE] {
        assert_eq!(get(&mut apic, offset), 0);
    }
}

#[test]
fn mode_transition_x2apic_to_xapic_is_gp() {
    let mut apic = x2apic(0);
    assert_eq!(apic.write_apic_base(0xfee0_0900), Err(GP));
    assert_eq!(apic.mode(), Mode::X2Apic);
}

#[test]
fn mode_transition_disabled_to_x2apic_is_gp() {
    let mut apic = xapic(0);
    assert_eq!(
        apic.write_apic_base(0xfee0_0100),
        Ok(WriteEffect::BaseChanged)
    );
    assert_eq!(apic.write_apic_base(0xfee0_0d00), Err(GP));
    assert_eq!(
        apic.write_apic_base(0xfee0_0900),
        Ok(WriteEffect::BaseChanged)
    );
    assert_eq!(
        apic.write_apic_base(0xfee0_0d00),
        Ok(WriteEffect::BaseChanged)
    );
}

#[test]
fn mode_extd_without_enable_is_gp() {
    for mut apic in [xapic(0), x2apic(0)] {
        assert_eq!(apic.write_apic_base(0xfee0_0500), Err(GP));
    }
}

#[test]
fn reserved_bits_of_apic_base_are_gp() {
    let mut apic = xapic(0);
    for bit in (0..8).chain([9]).chain(46..64) {
        assert_eq!(
            apic.write_apic_base(0xfee0_0900 | (1 << bit)),
            Err(GP),
            "bit {bit}"
        );
    }
    assert_eq!(apic.write_apic_base(0xfee0_0900), Ok(WriteEffect::None));
}

#[test]
fn x2apic_is_refused_to_a_partition_without_it() {
    let mut apic = LocalApic::new(
        ApicConfig {
            x2apic: false,
            ..config()
        },
        0,
        true,
    );
    assert_eq!(apic.write_apic_base(0xfee0_0d00), Err(GP));
    assert_eq!(apic.restore_apic_base(0xfee0_0d00), Err(GP));
}

#[test]
fn page_moves_with_apic_base_and_vanishes_in_x2apic_mode() {
    let mut apic = xapic(0);
    assert_eq!(
        apic.write_apic_base(0x1_2345_6900),
        Ok(WriteEffect::BaseChanged)
    );
    assert_eq!(apic.page(), Some(0x1_2345_6000));
    let _ = apic.write_apic_base(0x1_2345_6d00).unwrap();
    assert_eq!(apic.page(), None);
    assert_eq!(apic.read(TPR, 0), Err(ApicFault::NotMapped));
    assert_eq!(apic.write(TPR, 0, 0), Err(ApicFault::NotMapped));
}

#[test]
fn disabling_in_apic_base_resets_the_registers() {
    let mut apic = x2apic(5);
    apic.accept(Interrupt::edge(0x40));
    let _ = apic.write_apic_base(0xfee0_0000).unwrap();
    assert_eq!(apic.highest_pending(), None);
    assert!(!apic.accept(Interrupt::edge(0x41)));
    let _ = apic.write_apic_base(0xfee0_0800).unwrap();
    assert_eq!(get(&mut apic, SVR), 0xff);
    assert_eq!(get(&mut apic, 0x20), 5 << 24);
}

#[test]
fn entering_x2apic_mode_keeps_pending_interrupts() {
    let mut apic = xapic(0);
    apic.accept(Interrupt::edge(0x55));
    let _ = put(&mut apic, ICR_HIGH, 7 << 24);
    let _ = apic.write_apic_base(0xfee0_0d00).unwrap();
    assert_eq!(apic.highest_pending(), Some(0x55));
    assert_eq!(apic.msr_read(0x830, 0), Ok(0));
}

#[test]
fn restored_apic_base_may_take_any_legal_mode_at_once() {
    let mut apic = LocalApic::new(config(), 9, false);
    assert_eq!(apic.restore_apic_base(0xfee0_0c00), Ok(()));
    assert_eq!(apic.mode(), Mode::X2Apic);
    assert_eq!(apic.restore_apic_base(0xfee0_0800), Ok(()));
    assert_eq!(apic.restore_apic_base(apic.apic_base()), Ok(()));
    assert_eq!(apic.restore_apic_base(0xfee0_0400), Err(GP));
}

// ---- priorities, IRR, ISR, EOI

#[test]
fn higher_vector_is_delivered_first_and_nests() {
    let mut apic = xapic(0);
    apic.accept(Interrupt::edge(0x31));
    service(&mut apic, 0x31);
    apic.accept(Interrupt::edge(0x3f));
    assert_eq!(apic.highest_pending(), None, "same class waits");
    apic.accept(Interrupt::edge(0x40));
    apic.accept(Interrupt::edge(0xef));
    service(&mut apic, 0xef);
    assert_eq!(apic.ppr(), 0xe0);
    assert_eq!(
        apic.eoi(),
        WriteEffect::Eoi {
            vector: 0xef,
            level: false
        }
    );
    service(&mut apic, 0x40);
    assert_eq!(
        apic.eoi(),
        WriteEffect::Eoi {
            vector: 0x40,
            level: false
        }
    );
    assert_eq!(apic.highest_pending(), None);
    assert_eq!(
        apic.eoi(),
        WriteEffect::Eoi {
            vector: 0x31,
            level: false
        }
    );
    service(&mut apic, 0x3f);
    assert_eq!(
        put(&mut apic, EOI, 0),
        WriteEffect::Eoi {
            vector: 0x3f,
            level: false
        }
    );
    assert_eq!(apic.eoi(), WriteEffect::None);
    assert_eq!(apic.ppr(), 0);
}

#[test]
fn eoi_of_level_interrupt_reports_vector() {
    let mut apic = xapic(0);
    apic.accept(Interrupt::level(0x61));
    service(&mut apic, 0x61);
    assert_eq!(get(&mut apic, 0x180 + 0x30), 1 << 1, "TMR");
    assert_eq!(
        put(&mut apic, EOI, 0),
        WriteEffect::Eoi {
            vector: 0x61,
            level: true
        }
    );
    apic.accept(Interrupt::edge(0x61));
    service(&mut apic, 0x61);
    assert_eq!(
        apic.eoi(),
        WriteEffect::Eoi {
            vector: 0x61,
            level: false
        }
    );
}

#[test]
fn interrupt_in_service_can_become_pending_again() {
    let mut apic = xapic(0);
    apic.accept(Interrupt::edge(0x50));
    service(&mut apic, 0x50);
    apic.accept(Interrupt::edge(0x50));
    apic.accept(Interrupt::edge(0x50));
    assert_eq!(apic.highest_pending(), None);
    let _ = apic.eoi();
    service(&mut apic, 0x50);
    let _ = apic.eoi();
    assert_eq!(apic.highest_pending(), None);
}

#[test]
fn acknowledging_what_is_not_pending_changes_nothing() {
    let mut apic = xapic(0);
    assert!(!apic.acknowledge(0x50));
    assert!(!apic.acknowledge(3));
    assert_eq!(apic.eoi(), WriteEffect::None);
}

#[test]
fn tpr_holds_back_its_class_and_below() {
    let mut apic = xapic(0);
    apic.accept(Interrupt::edge(0x5a));
    for (tpr, seen) in [
        (0x4f, true),
        (0x50, false),
        (0x5f, false),
        (0xff, false),
        (0, true),
    ] {
        let _ = put(&mut apic, TPR, tpr);
        assert_eq!(apic.highest_pending().is_some(), seen, "TPR {tpr:#x}");
    }
}

#[test]
fn tpr_threshold_is_the_class_that_tpr_holds_back() {
    let mut apic = xapic(0);
    apic.set_tpr(0x80);
    assert_eq!(apic.tpr_threshold(), 0);
    apic.accept(Interrupt::edge(0x5a));
    assert_eq!(apic.tpr_threshold(), 5);
    apic.set_tpr(0x40);
    assert_eq!(apic.tpr_threshold(), 0, "deliverable");
    service(&mut apic, 0x5a);
    apic.accept(Interrupt::edge(0x59));
    apic.set_tpr(0x80);
    assert_eq!(apic.tpr_threshold(), 0, "held back by the ISR too");
}

#[test]
fn cr8_is_the_upper_half_of_tpr() {
    let mut apic = xapic(0);
    assert_eq!(apic.set_cr8(0xb), Ok(()));
    assert_eq!(apic.tpr(), 0xb0);
    apic.set_tpr(0x2f);
    assert_eq!(apic.cr8(), 2);
    assert_eq!(apic.set_cr8(16), Err(GP));
    assert_eq!(apic.set_cr8(u64::MAX), Err(GP));
    assert_eq!(apic.tpr(), 0x2f);
}

#[test]
fn ppr_is_tpr_unless_a_higher_class_is_in_service() {
    let mut apic = xapic(0);
    apic.accept(Interrupt::edge(0x73));
    service(&mut apic, 0x73);
    for (tpr, ppr) in [(0x6f, 0x70), (0x75, 0x75), (0x8c, 0x8c), (0, 0x70)] {
        apic.set_tpr(tpr);
        assert_eq!(get(&mut apic, 0xa0), ppr);
    }
}

#[test]
fn eoi_may_be_skipped_only_for_a_lone_edge_interrupt() {
    let mut apic = xapic(0);
    assert!(!apic.can_skip_eoi());
    apic.accept(Interrupt::edge(0x50));
    service(&mut apic, 0x50);
    assert!(apic.can_skip_eoi());
    apic.accept(Interrupt::edge(0x30));
    assert!(!apic.can_skip_eoi(), "another waits");
    let _ = apic.eoi();
    service(&mut apic, 0x30);
    apic.accept(Interrupt::edge(0xa0));
    service(&mut apic, 0xa0);
    assert!(!apic.can_skip_eoi(), "two in service");
    let mut apic = xapic(0);
    apic.accept(Interrupt::level(0x50));
    service(&mut apic, 0x50);
    assert!(!apic.can_skip_eoi(), "level");
}

// ---- SVR, LVT, errors

#[test]
fn software_disable_masks_all_lvts() {
    let mut apic = xapic(0);
    for offset in (LVT_TIMER..=LVT_ERROR).step_by(16) {
        let _ = put(&mut apic, offset, 0x40);
        assert_eq!(get(&mut apic, offset), 0x40);
    }
    assert_eq!(put(&mut apic, SVR, 0xff), WriteEffect::TimerChanged);
    for offset in (LVT_TIMER..=LVT_ERROR).step_by(16) {
        assert_eq!(get(&mut apic, offset), 0x1_0040);
        let _ = put(&mut apic, offset, 0x41);
        assert_eq!(get(&mut apic, offset), 0x1_0041, "cannot be unmasked");
    }
    let _ = put(&mut apic, SVR, 0x1ff);
    assert_eq!(
        get(&mut apic, LVT_TIMER),
        0x1_0041,
        "enabling does not unmask"
    );
}

#[test]
fn software_disabled_apic_keeps_pending_but_accepts_only_signals() {
    let mut apic = xapic(0);
    apic.accept(Interrupt::edge(0x44));
    let _ = put(&mut apic, SVR, 0xff);
    assert_eq!(apic.highest_pending(), Some(0x44));
    assert!(!apic.accept(Interrupt::edge(0x99)));
    assert!(apic.accept(signal(DeliveryMode::Nmi, 0)));
    assert!(apic.accept(signal(DeliveryMode::Startup, 8)));
    assert_eq!(
        ipi(put(&mut apic, ICR_LOW, 0x40)).interrupt.vector,
        0x40,
        "still sends"
    );
    assert_eq!(apic.highest_pending(), Some(0x44));
}

#[test]
fn xapic_ignores_reserved_bits() {
    let mut apic = xapic(0);
    for (offset, kept) in [
        (SVR, 0x3ff),
        (TPR, 0xff),
        (LDR, 0xff00_0000),
        (LVT_TIMER, 0x7_00ff),
        (LVT_PERF, 0x1_07ff),
        (LVT_LINT0, 0x1_a7ff),
        (LVT_ERROR, 0x1_00ff),
        (ICR_HIGH, 0xff00_0000),
        (DIVIDE, 0b1011),
    ] {
        let _ = put(&mut apic, offset, u32::MAX);
        assert_eq!(get(&mut apic, offset), kept, "{offset:#x}");
    }
    let _ = put(&mut apic, DFR, 0);
    assert_eq!(get(&mut apic, DFR), 0x0fff_ffff);
    let _ = put(&mut apic, ICR_LOW, u32::MAX);
    assert_eq!(get(&mut apic, ICR_LOW), 0xc_cfff);
}

#[test]
fn read_only_registers_ignore_writes() {
    let mut apic = xapic(2);
    for offset in [0x20, 0x30, 0x90, 0xa0, 0xc0, 0x100, 0x1f0, 0x270, CURRENT] {
        let before = get(&mut apic, offset);
        let _ = put(&mut apic, offset, 0x5555_5555);
        assert_eq!(get(&mut apic, offset), before);
    }
    assert_eq!(errors(&mut apic), 0);
}

#[test]
fn esr_shows_errors_only_after_it_is_written() {
    let mut apic = xapic(0);
    assert!(!apic.accept(Interrupt::edge(15)));
    assert_eq!(get(&mut apic, ESR), 0);
    let _ = put(&mut apic, ESR, 0);
    assert_eq!(get(&mut apic, ESR), 1 << 6);
    assert_eq!(get(&mut apic, ESR), 1 << 6, "stays until the next write");
    let _ = put(&mut apic, ESR, 0);
    assert_eq!(get(&mut apic, ESR), 0);
}

#[test]
fn illegal_vectors_are_logged_and_not_sent() {
    let mut apic = xapic(0);
    assert_eq!(put(&mut apic, ICR_LOW, 0xf), WriteEffect::None);
    assert_eq!(errors(&mut apic), 1 << 5);
    assert_eq!(put(&mut apic, ICR_LOW, 0x4_000f), WriteEffect::None);
    assert_eq!(errors(&mut apic), 3 << 5, "self: sender and receiver");
    assert_eq!(
        ipi(put(&mut apic, ICR_LOW, 0x4600)).interrupt.mode,
        DeliveryMode::Startup
    );
    assert_eq!(errors(&mut apic), 0, "a SIPI has no vector");
}

#[test]
fn reserved_registers_are_logged() {
    let mut apic = xapic(0);
    for offset in [
        0x0,
        0x10,
        0x40,
        0x2f0,
        0x3a0,
        0x3f0,
        0x400,
        0x21,
        0xfff,
        u32::MAX,
    ] {
        assert_eq!(get(&mut apic, offset), 0);
        assert_eq!(errors(&mut apic), 1 << 7, "read {offset:#x}");
        assert_eq!(put(&mut apic, offset, 1), WriteEffect::None);
        assert_eq!(errors(&mut apic), 1 << 7, "write {offset:#x}");
    }
    assert_eq!(get(&mut apic, EOI), 0);
    assert_eq!(errors(&mut apic), 0);
}

#[test]
fn first_error_raises_the_error_interrupt_once() {
    let mut apic = xapic(0);
    let _ = put(&mut apic, LVT_ERROR, 0xfe);
    apic.accept(Interrupt::edge(1));
    service(&mut apic, 0xfe);
    let _ = apic.eoi();
    apic.accept(Interrupt::edge(1));
    assert_eq!(apic.highest_pending(), None);
    assert_eq!(errors(&mut apic), 1 << 6);
    apic.accept(Interrupt::edge(1));
    assert_eq!(
        apic.highest_pending(),
        Some(0xfe),
        "armed again by the write"
    );
}

#[test]
fn error_interrupt_with_illegal_vector_ends_in_the_log() {
    let mut apic = xapic(0);
    let _ = put(&mut apic, LVT_ERROR, 0x3);
    let _ = get(&mut apic, 0x3f0);
    assert_eq!(errors(&mut apic), 3 << 6);
    assert!(apic.pending().is_empty());
}

#[test]
fn lint0_passes_ext_int_when_programmed_for_it() {
    let mut apic = xapic(0);
    assert!(apic.accept(signal(DeliveryMode::ExtInt, 0x08)));
    assert_eq!(apic.pending().ext_int, None, "masked");
    let _ = put(&mut apic, LVT_LINT0, 0x700);
    assert!(apic.lint0_is_ext_int());
    assert_eq!(apic.pending().ext_int, Some(0x08));
    assert_eq!(apic.take_ext_int(), Some(0x08));
    assert_eq!(apic.take_ext_int(), None);
    assert!(apic.accept(signal(DeliveryMode::LocalInt0, 0x70)));
    assert_eq!(apic.take_ext_int(), Some(0x70));
}

#[test]
fn lint1_raises_nmi_when_programmed_for_it() {
    let mut apic = xapic(0);
    assert!(!apic.accept(signal(DeliveryMode::LocalInt1, 0)));
    let _ = put(&mut apic, LVT_LINT1, 0x400);
    assert!(apic.accept(signal(DeliveryMode::LocalInt1, 0)));
    assert!(apic.pending().nmi);
    assert!(apic.take_nmi());
    assert!(!apic.take_nmi());
}

#[test]
fn level_lint0_waits_for_its_eoi() {
    let mut apic = xapic(0);
    let _ = put(&mut apic, LVT_LINT0, 0x8050);
    assert!(apic.raise(Lvt::Lint0, 0));
    assert_eq!(get(&mut apic, LVT_LINT0), 0xc050);
    assert!(!apic.raise(Lvt::Lint0, 0));
    service(&mut apic, 0x50);
    assert_eq!(
        apic.eoi(),
        WriteEffect::Eoi {
            vector: 0x50,
            level: true
        }
    );
    assert_eq!(get(&mut apic, LVT_LINT0), 0x8050);
    assert!(apic.raise(Lvt::Lint0, 0));
}

#[test]
fn pins_by_pass_a_disabled_apic() {
    let mut apic = xapic(0);
    let _ = apic.write_apic_base(0xfee0_0100).unwrap();
    assert!(apic.raise(Lvt::Lint0, 0x20));
    assert_eq!(apic.pending().ext_int, Some(0x20));
    assert!(apic.raise(Lvt::Lint1, 0));
    assert!(apic.take_nmi());
    assert!(!apic.accept(signal(DeliveryMode::Startup, 1)));
}

#[test]
fn performance_interrupt_masks_itself() {
    let mut apic = xapic(0);
    let _ = put(&mut apic, LVT_PERF, 0x400);
    assert!(apic.raise(Lvt::PerfMon, 0));
    assert!(apic.take_nmi());
    assert_eq!(get(&mut apic, LVT_PERF), 0x1_0400);
    assert!(!apic.raise(Lvt::PerfMon, 0));
}

// ---- IPIs and destinations

#[test]
fn xapic_icr_write_asks_for_a_physical_ipi() {
    let mut apic = xapic(0);
    assert_eq!(put(&mut apic, ICR_HIGH, 3 << 24), WriteEffect::None);
    let request = ipi(put(&mut apic, ICR_LOW, 0x40fd));
    assert_eq!(request.destination, Destination::Physical(3));
    assert_eq!(request.interrupt, Interrupt::edge(0xfd));
    assert_eq!(request.destination.single(), Some(3));
    assert_eq!(get(&mut apic, ICR_LOW) & (1 << 12), 0, "never busy");
}

#[test]
fn all_shorthands_and_modes_are_decoded() {
    let mut apic = xapic(0);
    let mut send = |low| put(&mut apic, ICR_LOW, low);
    assert_eq!(
        ipi(send(0x8_4030)).destination,
        Destination::AllIncludingSelf
    );
    assert_eq!(
        ipi(send(0xc_4030)).destination,
        Destination::AllExcludingSelf
    );
    assert_eq!(
        ipi(send(0x4930)).interrupt.mode,
        DeliveryMode::LowestPriority
    );
    assert_eq!(ipi(send(0xc_4400)).interrupt.mode, DeliveryMode::Nmi);
    assert_eq!(ipi(send(0xc_4500)).interrupt.mode, DeliveryMode::Init);
    assert_eq!(ipi(send(0xc500)).interrupt.mode, DeliveryMode::Init);
    assert_eq!(ipi(send(0x4200)).interrupt.mode, DeliveryMode::Smi);
    let sipi = ipi(send(0x4608)).interrupt;
    assert_eq!((sipi.mode, sipi.vector), (DeliveryMode::Startup, 8));
    for ignored in [
        0x8500, 0x4330, 0x4730, 0x8_4500, 0x8_4608, 0x4_4500, 0x4_4608, 0x4_4200,
    ] {
        assert_eq!(send(ignored), WriteEffect::None, "{ignored:#x}");
    }
    assert!(apic.pending().is_empty());
}

#[test]
fn level_bit_of_the_icr_does_not_make_an_ipi_level_triggered() {
    let mut apic = xapic(0);
    assert!(!ipi(put(&mut apic, ICR_LOW, 0xc040)).interrupt.level);
}

#[test]
fn self_ipi_becomes_pending_at_once() {
    let mut apic = xapic(0);
    assert_eq!(put(&mut apic, ICR_LOW, 0x4_4080), WriteEffect::None);
    assert_eq!(apic.highest_pending(), Some(0x80));
    let mut apic = x2apic(0);
    assert_eq!(apic.msr_write(0x83f, 0x81, 0), Ok(WriteEffect::None));
    assert_eq!(apic.highest_pending(), Some(0x81));
    assert_eq!(apic.msr_write(0x830, 0x4_4400, 0), Ok(WriteEffect::None));
    assert!(apic.take_nmi());
}

#[test]
fn physical_destination_matches_only_its_id() {
    let apic = xapic(4);
    assert!(apic.matches_destination(Destination::Physical(4), false));
    assert!(!apic.matches_destination(Destination::Physical(5), false));
    assert!(apic.matches_destination(Destination::from_xapic(0xff, false), false));
    assert!(!xapic(0xff).matches_destination(Destination::Physical(BROADCAST - 1), false));
}

#[test]
fn id_above_254_is_reachable_in_xapic_mode_without_aliases() {
    let apic = xapic(0x104);
    assert!(apic.matches_destination(Destination::Physical(0x104), false));
    assert!(!apic.matches_destination(Destination::Physical(4), false));
    assert!(xapic(0xff).matches_destination(Destination::from_x2apic(0xff, false), false));
    assert!(!xapic(1).matches_destination(Destination::from_x2apic(0xff, false), false));
}

#[test]
fn shorthand_destinations_know_the_sender() {
    let apic = xapic(1);
    assert!(apic.matches_destination(Destination::AllIncludingSelf, true));
    assert!(apic.matches_destination(Destination::AllExcludingSelf, false));
    assert!(!apic.matches_destination(Destination::AllExcludingSelf, true));
}

#[test]
fn logical_flat_matches_any_common_bit() {
    let mut apic = xapic(1);
    assert_eq!(
        put(&mut apic, LDR, 0x0200_0000),
        WriteEffect::AddressingChanged
    );
    assert!(apic.matches_destination(Destination::Logical(0x02), false));
    assert!(apic.matches_destination(Destination::Logical(0x83), false));
    assert!(!apic.matches_destination(Destination::Logical(0x01), false));
    assert!(!apic.matches_destination(Destination::Logical(0x102), false));
    assert!(apic.matches_destination(Destination::from_xapic(0xff, true), false));
}

#[test]
fn logical_cluster_matches_cluster_and_member() {
    let mut apic = xapic(1);
    assert_eq!(
        put(&mut apic, DFR, 0x0fff_ffff),
        WriteEffect::AddressingChanged
    );
    let _ = put(&mut apic, LDR, 0x3200_0000);
    for (mda, matched) in [
        (0x32, true),
        (0x3f, true),
        (0x31, false),
        (0x22, false),
        (0x30, false),
    ] {
        assert_eq!(
            apic.matches_destination(Destination::Logical(mda), false),
            matched,
            "{mda:#x}"
        );
    }
    assert!(apic.matches_destination(Destination::from_xapic(0xff, true), false));
}

#[test]
fn undefined_logical_model_matches_broadcast_only() {
    let mut apic = xapic(1);
    let _ = put(&mut apic, DFR, 0x7fff_ffff);
    let _ = put(&mut apic, LDR, 0xff00_0000);
    assert!(!apic.matches_destination(Destination::Logical(1), false));
    assert!(apic.matches_destination(Destination::Logical(BROADCAST), false));
}

#[test]
fn x2apic_ldr_is_derived_from_id() {
    let apic = x2apic(0x123);
    assert_eq!(apic.msr_read(0x80d, 0), Ok(0x12_0008));
    assert_eq!(apic.msr_read(0x802, 0), Ok(0x123));
}

#[test]
fn x2apic_logical_matches_cluster_and_member() {
    let apic = x2apic(0x123);
    for (mda, matched) in [
        (0x12_0008, true),
        (0x12_ffff, true),
        (0x12_0007, false),
        (0x13_0008, false),
        (0x12_0000, false),
        (0xff, false),
        (BROADCAST, true),
    ] {
        assert_eq!(
            apic.matches_destination(Destination::Logical(mda), false),
            matched,
            "{mda:#x}"
        );
    }
}

#[test]
fn disabled_apic_receives_no_messages() {
    let mut apic = xapic(0);
    let _ = apic.write_apic_base(0xfee0_0100).unwrap();
    assert!(!apic.matches_destination(Destination::Physical(0), false));
    assert!(!apic.matches_destination(Destination::AllIncludingSelf, false));
}

#[test]
fn lowest_priority_is_compared_by_the_rule_of_the_p6() {
    let mut apic = xapic(0);
    apic.set_tpr(0x34);
    assert_eq!(apic.arbitration_priority(), 0x34);
    apic.accept(Interrupt::edge(0x66));
    assert_eq!(apic.arbitration_priority(), 0x60);
    assert_eq!(get(&mut apic, 0x90), 0x60);
}

// ---- x2APIC MSRs

#[test]
fn x2apic_icr_is_one_64_bit_write() {
    let mut apic = x2apic(0);
    let request = ipi(apic.msr_write(0x830, 0x0000_1234_0000_40fb, 0).unwrap());
    assert_eq!(request.destination, Destination::Physical(0x1234));
    assert_eq!(apic.msr_read(0x830, 0), Ok(0x0000_1234_0000_40fb));
    let request = ipi(apic.msr_write(0x830, 0x0002_0003_0000_08fb, 0).unwrap());
    assert_eq!(request.destination, Destination::Logical(0x2_0003));
    let request = ipi(apic.msr_write(0x830, 0xffff_ffff_0000_00fb, 0).unwrap());
    assert_eq!(request.destination.single(), None);
}

#[test]
fn x2apic_reserved_bits_are_gp() {
    let mut apic = x2apic(0);
    for (msr, value) in [
        (0x80b, 1),
        (0x828, 1),
        (0x808, 0x100),
        (0x80f, 0x1000),
        (0x832, 0x8_0000),
        (0x833, 0x2000),
        (0x837, 0x100),
        (0x83e, 4),
        (0x838, 1 << 32),
        (0x83f, 0x100),
        (0x830, 1 << 13),
        (0x830, 1 << 20),
        (0x830, 1 << 16),
    ] {
        assert_eq!(
            apic.msr_write(msr, value, 0),
            Err(GP),
            "{msr:#x} {value:#x}"
        );
    }
    assert!(
        apic.msr_write(0x830, 0x1040, 0).is_ok(),
        "old delivery status is tolerated"
    );
}

#[test]
fn x2apic_read_only_write_only_and_absent_registers_are_gp() {
    let mut apic = x2apic(0);
    for msr in [
        0x802, 0x803, 0x80a, 0x80d, 0x810, 0x81f, 0x827, 0x839, 0x80e, 0x82f, 0x831, 0x8ff,
    ] {
        assert_eq!(apic.msr_write(msr, 0, 0), Err(GP), "write {msr:#x}");
    }
    for msr in [
        0x80b,
        0x83f,
        0x800,
        0x809,
        0x80c,
        0x80e,
        0x82f,
        0x831,
        0x840,
        0x8ff,
        0x7ff,
        0,
        u32::MAX,
    ] {
        assert_eq!(apic.msr_read(msr, 0), Err(GP), "read {msr:#x}");
    }
    assert_eq!(apic.msr_write(0x7ff, 0, 0), Err(GP));
}

#[test]
fn x2apic_msrs_are_gp_in_xapic_mode() {
    let mut apic = xapic(0);
    assert_eq!(apic.msr_read(0x802, 0), Err(GP));
    assert_eq!(apic.msr_write(0x80b, 0, 0), Err(GP));
}

#[test]
fn x2apic_registers_work_like_those_of_the_page() {
    let mut apic = x2apic(1);
    let mut write = |msr, value| apic.msr_write(msr, value, 0).unwrap();
    let _ = write(0x808, 0x30);
    let _ = write(0x835, 0x700);
    let _ = write(0x83f, 0x45);
    assert_eq!(apic.highest_pending(), Some(0x45));
    assert_eq!(apic.msr_read(0x808, 0), Ok(0x30));
    assert_eq!(apic.msr_read(0x835, 0), Ok(0x700));
    assert_eq!(apic.msr_read(0x822, 0), Ok(0x20));
    service(&mut apic, 0x45);
    assert_eq!(apic.msr_read(0x812, 0), Ok(0x20));
    assert_eq!(apic.msr_read(0x80a, 0), Ok(0x40));
    assert_eq!(
        apic.msr_write(0x80b, 0, 0),
        Ok(WriteEffect::Eoi {
            vector: 0x45,
            level: false
        })
    );
    assert_eq!(apic.msr_read(0x803, 0), Ok(u64::from(VERSION)));
}

// ---- INIT, SIPI, NMI

#[test]
fn init_resets_all_but_id_and_mode() {
    let mut apic = x2apic(7);
    apic.set_tpr(0x20);
    apic.accept(Interrupt::edge(0x99));
    let _ = apic.msr_write(0x838, 1000, 0).unwrap();
    let _ = apic.msr_write(0x832, 0x40, 0).unwrap();
    assert!(apic.accept(signal(DeliveryMode::Init, 0)));
    assert_eq!(apic.mode(), Mode::X2Apic);
    assert_eq!(apic.msr_read(0x802, 0), Ok(7));
    assert_eq!(apic.msr_read(0x80f, 0), Ok(0xff));
    assert_eq!(apic.tpr(), 0);
    assert_eq!(apic.timer_deadline(), None);
    assert_eq!(
        apic.pending(),
        Pending {
            init: true,
            ..Pending::default()
        }
    );
    assert!(apic.take_init());
    assert!(apic.pending().is_empty());
}

#[test]
fn sipi_is_recorded_with_its_vector_and_init_wipes_it() {
    let mut apic = xapic(1);
    apic.accept(signal(DeliveryMode::Startup, 0x9a));
    assert!(
        !apic.accept(signal(DeliveryMode::Startup, 0x9b)),
        "the second is dropped"
    );
    assert_eq!(apic.pending().sipi, Some(0x9a));
    apic.accept(signal(DeliveryMode::Init, 0));
    assert_eq!(apic.take_sipi(), None);
    apic.accept(signal(DeliveryMode::Startup, 0));
    assert_eq!(apic.take_sipi(), Some(0));
}

#[test]
fn nmis_coalesce_to_one() {
    let mut apic = xapic(1);
    apic.accept(signal(DeliveryMode::Nmi, 2));
    apic.accept(signal(DeliveryMode::Nmi, 2));
    assert!(apic.take_nmi());
    assert!(apic.pending().is_empty());
    assert!(!apic.accept(signal(DeliveryMode::Smi, 0)));
}

#[test]
fn power_on_reset_can_keep_what_the_vmm_wired() {
    let mut apic = x2apic(0);
    let _ = apic.msr_write(0x835, 0x700, 0).unwrap();
    let _ = apic.msr_write(0x836, 0x400, 0).unwrap();
    apic.accept(signal(DeliveryMode::Nmi, 0));
    apic.reset(true);
    assert_eq!(apic.apic_base(), 0xfee0_0900);
    assert_eq!(get(&mut apic, LVT_LINT0), 0x1_0700);
    assert_eq!(get(&mut apic, LVT_LINT1), 0x1_0400);
    assert!(apic.pending().is_empty());
    apic.reset(false);
    assert_eq!(get(&mut apic, LVT_LINT0), 0x1_0000);
}

// ---- timer

fn timer(lvt: u32, count: u32, now: u64) -> LocalApic {
    let mut apic = xapic(0);
    let _ = apic.write(DIVIDE, BY_1, now).unwrap();
    assert_eq!(
        apic.write(LVT_TIMER, lvt, now),
        Ok(WriteEffect::TimerChanged)
    );
    assert_eq!(
        apic.write(INITIAL, count, now),
        Ok(WriteEffect::TimerChanged)
    );
    apic
}

#[test]
fn one_shot_fires_once_at_its_deadline() {
    let mut apic = timer(0x30, 1000, 5);
    assert_eq!(apic.timer_deadline(), Some(5 + 1000 * TICK));
    assert_eq!(apic.current_count(5), 1000);
    assert_eq!(apic.current_count(5 + 1), 1000, "within the first tick");
    assert_eq!(apic.current_count(5 + TICK), 999);
    assert!(!apic.timer_expired(4 + 1000 * TICK));
    assert_eq!(apic.current_count(4 + 1000 * TICK), 1);
    assert!(apic.timer_expired(5 + 1000 * TICK));
    assert_eq!(apic.highest_pending(), Some(0x30));
    assert_eq!(apic.timer_deadline(), None);
    assert_eq!(apic.current_count(u64::MAX), 0);
    assert!(!apic.timer_expired(u64::MAX));
}

#[test]
fn initial_count_zero_stops_the_timer() {
    let mut apic = timer(0x30 | PERIODIC, 1000, 0);
    let _ = apic.write(INITIAL, 0, 10).unwrap();
    assert_eq!(apic.timer_deadline(), None);
    assert_eq!(apic.current_count(11), 0);
}

#[test]
fn divide_configuration_scales_the_count() {
    for (code, divisor) in [
        (0, 2),
        (1, 4),
        (2, 8),
        (3, 16),
        (8, 32),
        (9, 64),
        (10, 128),
        (11, 1),
    ] {
        let mut apic = timer(0x30, 0, 0);
        let _ = apic.write(DIVIDE, code, 0).unwrap();
        let _ = apic.write(INITIAL, 100, 0).unwrap();
        assert_eq!(apic.timer_deadline(), Some(100 * divisor * TICK));
    }
}

#[test]
fn changing_the_divisor_keeps_the_count() {
    let mut apic = timer(0x30, 1000, 0);
    assert_eq!(
        apic.write(DIVIDE, 0, 400 * TICK),
        Ok(WriteEffect::TimerChanged)
    );
    assert_eq!(apic.current_count(400 * TICK), 600);
    assert_eq!(apic.timer_deadline(), Some(400 * TICK + 1200 * TICK));
}

#[test]
fn periodic_timer_does_not_drift() {
    // Odd frequencies, and every call late by a varying amount.
    let clock = TimerClock::new(2_893_201_987, TimerClock::HYPERV_APIC_HZ).unwrap();
    let mut apic = LocalApic::new(ApicConfig { clock, ..config() }, 0, true);
    let _ = put(&mut apic, SVR, 0x1ff);
    let _ = put(&mut apic, LVT_TIMER, 0x30 | PERIODIC);
    let _ = put(&mut apic, DIVIDE, BY_1);
    let start = 987_654_321_u64;
    let count = 199_999_u32;
    let _ = apic.write(INITIAL, count, start).unwrap();
    for n in 1..=100_000_u64 {
        let deadline = apic.timer_deadline().unwrap();
        let exact = u128::from(n) * u128::from(count) * 2_893_201_987;
        let exact = start + exact.div_ceil(200_000_000) as u64;
        assert!(
            deadline.abs_diff(exact) <= 1,
            "period {n}: {deadline} instead of {exact}"
        );
        assert!(apic.timer_expired(deadline + n % 1000));
    }
}

#[test]
fn missed_periods_coalesce_to_one() {
    let mut apic = timer(0x30 | PERIODIC, 100, 0);
    let period = 100 * TICK;
    let now = 57 * period + 3;
    assert_eq!(
        apic.current_count(now),
        100,
        "reads right even before the expiry is seen"
    );
    assert!(apic.timer_expired(now));
    assert!(!apic.timer_expired(now));
    assert_eq!(apic.timer_deadline(), Some(58 * period), "on the old grid");
    assert!(apic.timer_expired(58 * period));
    assert_eq!(apic.timer_deadline(), Some(59 * period));
}

#[test]
fn shortest_period_and_longest_sleep_end_at_once() {
    let mut apic = timer(0x30 | PERIODIC, 1, 0);
    let now = u64::MAX / 2;
    assert!(apic.timer_expired(now));
    assert!(apic.timer_deadline().unwrap() > now);
    assert!(apic.timer_deadline().unwrap() <= now + TICK);
    assert!(apic.timer_expired(u64::MAX));
}

#[test]
fn masked_timer_counts_but_neither_wakes_nor_fires() {
    let mut apic = timer(0x1_0030, 100, 0);
    assert_eq!(apic.timer_deadline(), None);
    assert_eq!(apic.current_count(50 * TICK), 50);
    let _ = apic.write(LVT_TIMER, 0x30, 200 * TICK).unwrap();
    assert_eq!(apic.timer_deadline(), None, "expired while masked");
    assert!(!apic.timer_expired(300 * TICK));
    assert!(apic.pending().is_empty());
}

#[test]
fn masking_late_does_not_lose_an_expiry_before() {
    let mut apic = timer(0x30, 100, 0);
    let _ = apic.write(LVT_TIMER, 0x1_0030, 101 * TICK).unwrap();
    assert_eq!(apic.highest_pending(), Some(0x30));
    let mut apic = timer(0x30, 100, 0);
    let _ = apic.write(SVR, 0xff, 101 * TICK).unwrap();
    assert_eq!(apic.highest_pending(), Some(0x30));
}

#[test]
fn one_shot_and_periodic_share_the_running_count() {
    let mut apic = timer(0x30, 100, 0);
    let _ = apic.write(LVT_TIMER, 0x30 | PERIODIC, 60 * TICK).unwrap();
    assert_eq!(apic.read(INITIAL, 0), Ok(100));
    assert_eq!(apic.current_count(60 * TICK), 40);
    assert!(apic.timer_expired(100 * TICK));
    assert_eq!(apic.current_count(130 * TICK), 70);
    let _ = apic.write(LVT_TIMER, 0x30, 130 * TICK).unwrap();
    assert!(apic.timer_expired(200 * TICK));
    assert_eq!(apic.current_count(230 * TICK), 0);
    let _ = apic.write(LVT_TIMER, 0x30 | PERIODIC, 231 * TICK).unwrap();
    assert_eq!(
        apic.current_count(240 * TICK),
        0,
        "does not start by itself"
    );
}

#[test]
fn tsc_deadline_fires_once_and_reads_zero_after() {
    let mut apic = timer(0x30 | DEADLINE, 0, 0);
    assert_eq!(
        apic.write_tsc_deadline(5000, 10),
        Ok(WriteEffect::TimerChanged)
    );
    assert_eq!(apic.timer_deadline(), Some(5000));
    assert_eq!(apic.tsc_deadline(4999), 5000);
    assert!(!apic.timer_expired(4999));
    assert!(apic.timer_expired(5000));
    assert_eq!(apic.tsc_deadline(5000), 0);
    assert_eq!(apic.highest_pending(), Some(0x30));
    assert_eq!(apic.timer_deadline(), None);
}

#[test]
fn tsc_deadline_zero_disarms() {
    let mut apic = timer(0x30 | DEADLINE, 0, 0);
    let _ = apic.write_tsc_deadline(5000, 0).unwrap();
    let _ = apic.write_tsc_deadline(0, 1).unwrap();
    assert_eq!(apic.timer_deadline(), None);
    assert!(!apic.timer_expired(6000));
}

#[test]
fn tsc_deadline_in_the_past_fires_at_once() {
    let mut apic = timer(0x30 | DEADLINE, 0, 0);
    let _ = apic.write_tsc_deadline(5, 5000).unwrap();
    assert!(apic.timer_deadline().unwrap() <= 5000);
    assert!(apic.timer_expired(5000));
}

#[test]
fn tsc_deadline_mode_ignores_the_count_registers() {
    let mut apic = timer(0x30 | DEADLINE, 1000, 0);
    assert_eq!(apic.timer_deadline(), None);
    assert_eq!(apic.read(INITIAL, 0), Ok(0));
    let _ = apic.write_tsc_deadline(5000, 0).unwrap();
    assert_eq!(apic.read(CURRENT, 10), Ok(0));
    let _ = apic.write(DIVIDE, 0, 10).unwrap();
    assert_eq!(apic.timer_deadline(), Some(5000));
}

#[test]
fn tsc_deadline_is_ignored_in_other_modes() {
    let mut apic = timer(0x30, 1000, 0);
    let _ = apic.write_tsc_deadline(5, 1).unwrap();
    assert_eq!(apic.tsc_deadline(1), 0);
    assert_eq!(apic.timer_deadline(), Some(1000 * TICK));
}

#[test]
fn changing_to_or_from_tsc_deadline_mode_disarms() {
    let mut apic = timer(0x30, 1000, 0);
    let _ = put(&mut apic, LVT_TIMER, 0x30 | DEADLINE);
    assert_eq!(apic.timer_deadline(), None);
    assert_eq!(get(&mut apic, INITIAL), 0);
    let _ = apic.write_tsc_deadline(5000, 0).unwrap();
    let _ = put(&mut apic, LVT_TIMER, 0x31 | DEADLINE);
    assert_eq!(apic.timer_deadline(), Some(5000), "same mode");
    let _ = put(&mut apic, LVT_TIMER, 0x31);
    assert_eq!(apic.timer_deadline(), None);
    let _ = put(&mut apic, LVT_TIMER, 0x30 | DEADLINE);
    assert_eq!(apic.tsc_deadline(0), 0);
}

#[test]
fn reserved_timer_mode_never_fires() {
    let mut apic = timer(0x30 | PERIODIC | DEADLINE, 10, 0);
    let _ = apic.write_tsc_deadline(10, 0).unwrap();
    assert_eq!(apic.timer_deadline(), None);
    assert!(!apic.timer_expired(u64::MAX));
}

#[test]
fn partition_without_tsc_deadline_has_neither_mode_nor_msr() {
    let mut apic = LocalApic::new(
        ApicConfig {
            tsc_deadline: false,
            ..config()
        },
        0,
        true,
    );
    assert_eq!(apic.write_tsc_deadline(1, 0), Err(GP));
    let _ = put(&mut apic, LVT_TIMER, 0x30 | DEADLINE);
    assert_eq!(get(&mut apic, LVT_TIMER), 0x1_0030);
    let _ = apic.write_apic_base(0xfee0_0d00).unwrap();
    assert_eq!(apic.msr_write(0x832, u64::from(DEADLINE), 0), Err(GP));
}

#[test]
fn timer_with_illegal_vector_logs_an_error() {
    let mut apic = timer(0x5, 10, 0);
    assert!(!apic.timer_expired(1000));
    assert_eq!(errors(&mut apic), 1 << 6);
}

#[test]
fn bus_may_be_faster_than_the_tsc() {
    let clock = TimerClock::new(50_000_000, TimerClock::HYPERV_APIC_HZ).unwrap();
    let mut apic = LocalApic::new(ApicConfig { clock, ..config() }, 0, true);
    let _ = put(&mut apic, DIVIDE, BY_1);
    let _ = put(&mut apic, SVR, 0x1ff);
    let _ = put(&mut apic, LVT_TIMER, 0x30);
    let _ = apic.write(INITIAL, 1001, 100).unwrap();
    assert_eq!(apic.timer_deadline(), Some(351));
    assert_eq!(apic.current_count(101), 997);
}

#[test]
fn setting_the_tsc_moves_a_count_but_not_a_deadline() {
    let mut apic = timer(0x30, 1000, 1_000_000);
    apic.tsc_changed(1_000_000 + 400 * TICK, 0);
    assert_eq!(apic.current_count(0), 600);
    assert_eq!(apic.timer_deadline(), Some(600 * TICK));
    let mut apic = timer(0x30 | DEADLINE, 0, 0);
    let _ = apic.write_tsc_deadline(5000, 0).unwrap();
    apic.tsc_changed(10, 4000);
    assert_eq!(apic.timer_deadline(), Some(5000));
}

#[test]
fn clock_needs_both_frequencies() {
    assert_eq!(TimerClock::new(0, 1), None);
    assert_eq!(TimerClock::new(1, 0), None);
    let clock = TimerClock::new(3, 1).unwrap();
    assert_eq!(clock.bus_ticks(u64::MAX), u64::MAX / 3);
    assert!(TimerClock::new(u64::MAX, 1).is_some());
    assert!(TimerClock::new(1, u64::MAX).is_some());
}

// ---- mailbox

#[test]
fn posted_interrupts_arrive_with_one_kick() {
    let posted = Posted::new();
    let mut apic = xapic(0);
    assert!(!posted.drain_into(&mut apic));
    assert!(posted.post(Interrupt::edge(0x31)), "first: kick");
    assert!(!posted.post(Interrupt::level(0xf0)));
    assert!(!posted.post(signal(DeliveryMode::Nmi, 0)));
    assert!(posted.is_outstanding());
    assert!(posted.drain_into(&mut apic));
    assert!(!posted.is_outstanding());
    assert!(!posted.drain_into(&mut apic));
    assert!(apic.take_nmi());
    service(&mut apic, 0xf0);
    assert_eq!(
        apic.eoi(),
        WriteEffect::Eoi {
            vector: 0xf0,
            level: true
        }
    );
    service(&mut apic, 0x31);
    assert_eq!(
        apic.eoi(),
        WriteEffect::Eoi {
            vector: 0x31,
            level: false
        }
    );
    assert!(
        posted.post(Interrupt::edge(0x31)),
        "empty again: kick again"
    );
}

#[test]
fn posted_vector_carries_its_latest_trigger_mode() {
    let posted = Posted::new();
    let mut apic = xapic(0);
    for level in [true, true, false, true] {
        posted.post(Interrupt {
            mode: DeliveryMode::Fixed,
            vector: 0x42,
            level,
        });
        posted.drain_into(&mut apic);
        service(&mut apic, 0x42);
        assert_eq!(
            apic.eoi(),
            WriteEffect::Eoi {
                vector: 0x42,
                level
            }
        );
    }
}

#[test]
fn posted_init_drops_what_came_before_it_and_keeps_the_sipi_after() {
    let posted = Posted::new();
    let mut apic = xapic(1);
    posted.post(Interrupt::edge(0x31));
    posted.post(signal(DeliveryMode::Nmi, 0));
    posted.post(signal(DeliveryMode::Startup, 1));
    posted.post(signal(DeliveryMode::Init, 0));
    posted.post(signal(DeliveryMode::Startup, 0x9f));
    posted.post(signal(DeliveryMode::Startup, 0x77));
    posted.drain_into(&mut apic);
    assert_eq!(
        apic.pending(),
        Pending {
            init: true,
            sipi: Some(0x9f),
            ..Pending::default()
        }
    );
}

#[test]
fn posted_illegal_vector_is_logged_by_the_receiver() {
    let posted = Posted::new();
    let mut apic = xapic(0);
    posted.post(Interrupt::level(2));
    posted.post(Interrupt::edge(0x20));
    posted.drain_into(&mut apic);
    assert_eq!(apic.highest_pending(), Some(0x20));
    assert_eq!(get(&mut apic, 0x180), 0);
    assert_eq!(errors(&mut apic), 1 << 6);
}

#[test]
fn posted_pins_and_ext_int_keep_their_vectors() {
    let posted = Posted::new();
    let mut apic = xapic(0);
    let _ = put(&mut apic, LVT_LINT0, 0x700);
    let _ = put(&mut apic, LVT_LINT1, 0x400);
    posted.post(signal(DeliveryMode::ExtInt, 0x21));
    posted.post(signal(DeliveryMode::LocalInt1, 0));
    assert!(!posted.post(signal(DeliveryMode::Smi, 0)));
    posted.drain_into(&mut apic);
    assert_eq!(apic.take_ext_int(), Some(0x21));
    assert!(apic.take_nmi());
    posted.post(signal(DeliveryMode::LocalInt0, 0x22));
    posted.drain_into(&mut apic);
    assert_eq!(apic.take_ext_int(), Some(0x22));
}

#[test]
fn posted_interrupts_are_dropped_by_a_software_disabled_apic() {
    let posted = Posted::new();
    let mut apic = LocalApic::new(config(), 0, true);
    posted.post(Interrupt::edge(0x31));
    posted.drain_into(&mut apic);
    assert!(apic.pending().is_empty());
}

#[test]
fn mailbox_matches_by_the_published_addressing() {
    let posted = Posted::new();
    assert!(
        !posted.matches(Destination::AllIncludingSelf, false),
        "not published yet"
    );
    let mut flat = xapic(6);
    let _ = put(&mut flat, LDR, 0x4000_0000);
    posted.publish(flat.addressing());
    assert!(posted.matches(Destination::Logical(0x40), false));
    assert!(posted.matches(Destination::Physical(6), false));
    let wide = x2apic(0xffff_fff0);
    posted.publish(wide.addressing());
    assert!(posted.matches(Destination::Physical(0xffff_fff0), false));
    assert!(posted.matches(Destination::Logical(0xffff_0001), false));
    assert!(!posted.matches(Destination::AllExcludingSelf, true));
}

#[test]
fn no_post_is_lost_between_threads() {
    use std::sync::atomic::{AtomicBool, Ordering};
    const ROUNDS: usize = 20_000;
    let posted = Posted::new();
    let done = AtomicBool::new(false);
    // Each sender waits until its own vector has been taken, so that none may coalesce.
    let taken: [AtomicBool; 3] = Default::default();
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let mut apic = xapic(0);
            let mut counts = [0_usize; 3];
            while !done.load(Ordering::Acquire) {
                if !posted.drain_into(&mut apic) {
                    std::thread::yield_now();
                }
                while let Some(vector) = apic.highest_pending() {
                    assert!(apic.acknowledge(vector));
                    let level = vector == 0x90;
                    assert_eq!(apic.eoi(), WriteEffect::Eoi { vector, level });
                    let sender = usize::from(vector >> 4) - 7;
                    counts[sender] += 1;
                    taken[sender].store(true, Ordering::Release);
                }
            }
            counts
        });
        let senders: Vec<_> = (0..3_u8)
            .map(|sender| {
                let (posted, taken) = (&posted, &taken[usize::from(sender)]);
                scope.spawn(move || {
                    let vector = 0x70 + (sender << 4);
                    for _ in 0..ROUNDS {
                        posted.post(Interrupt {
                            mode: DeliveryMode::Fixed,
                            vector,
                            level: vector == 0x90,
                        });
                        while !taken.swap(false, Ordering::AcqRel) {
                            std::thread::yield_now();
                        }
                    }
                })
            })
            .collect();
        for sender in senders {
            sender.join().unwrap();
        }
        done.store(true, Ordering::Release);
        assert_eq!(receiver.join().unwrap(), [ROUNDS; 3]);
    });
}

// ---- saved state

#[test]
fn state_of_a_fresh_apic_has_the_documented_layout() {
    let bytes = LocalApic::new(config(), 2, false).export(0).to_bytes();
    let word = |offset: usize| u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap());
    for (offset, value) in [
        (0, 2 << 24),
        (4, VERSION),
        (8, 0),
        (12, u32::MAX),
        (16, 0xff),
        (20, 0),
        (116, 0),
        (128, 0x1_0000),
        (140, 0x1_0000),
        (152, 0x1_0000),
        (160, 0),
        (172, 0),
    ] {
        assert_eq!(word(offset), value, "offset {offset}");
    }
}

#[test]
fn state_bytes_round_trip_in_place() {
    let bytes: [u8; STATE_SIZE] = core::array::from_fn(|i| i as u8);
    let state = InterruptControllerState::from_bytes(&bytes);
    assert_eq!(state.apic_dfr, 0x0f0e_0d0c);
    assert_eq!(state.apic_irr[0], 0x5756_5554);
    assert_eq!(state.apic_remote_read, 0xafae_adac);
    assert_eq!(state.to_bytes(), bytes);
}

#[test]
fn state_with_lint_wired_by_the_vmm_is_accepted() {
    let mut apic = LocalApic::new(config(), 1, false);
    let mut state = apic.export(0);
    state.apic_lvt_lint0 = (state.apic_lvt_lint0 & !0x700) | 0x700;
    state.apic_lvt_lint1 = (state.apic_lvt_lint1 & !0x700) | 0x400;
    state.apic_lvt_cmci = 0;
    assert_eq!(apic.import(&state, 0), Ok(()));
    let after = apic.export(0);
    assert_eq!(
        (after.apic_lvt_lint0, after.apic_lvt_lint1),
        (0x1_0700, 0x1_0400)
    );
}

#[test]
fn state_moves_a_busy_apic_to_another() {
    let mut apic = timer(0x30 | PERIODIC, 1000, 0);
    let _ = put(&mut apic, LDR, 0x0100_0000);
    apic.accept(Interrupt::level(0x45));
    service(&mut apic, 0x45);
    apic.accept(Interrupt::edge(0x46));
    apic.accept(Interrupt::edge(0x99));
    apic.accept(Interrupt::edge(1));
    let state = apic.export(250 * TICK);
    let mut other = LocalApic::new(config(), 0, true);
    assert_eq!(other.import(&state, 9_999), Ok(()));
    assert_eq!(other.export(9_999), state);
    assert_eq!(other.timer_deadline(), Some(9_999 + 750 * TICK));
    assert_eq!(other.ppr(), 0x40);
    service(&mut other, 0x99);
    let _ = other.eoi();
    assert_eq!(
        other.eoi(),
        WriteEffect::Eoi {
            vector: 0x45,
            level: true
        }
    );
    service(&mut other, 0x46);
    assert_eq!(errors(&mut other), 1 << 6);
    assert!(other.matches_destination(Destination::Logical(1), false));
}

#[test]
fn state_saved_in_x2apic_mode_is_accepted_before_the_mode_is() {
    let mut apic = x2apic(0x21);
    let _ = apic.msr_write(0x830, 0x0002_0001_0000_0840, 0).unwrap();
    let state = apic.export(0);
    assert_eq!(state.apic_id, 0x21);
    assert_eq!(state.apic_ldr, 0x2_0002);
    let mut other = LocalApic::new(config(), 0x21, false);
    assert_eq!(other.import(&state, 0), Ok(()));
    assert_eq!(other.restore_apic_base(0xfee0_0c00), Ok(()));
    assert_eq!(other.import(&state, 0), Ok(()));
    assert_eq!(other.export(0), state);
}

#[test]
fn malformed_state_is_refused_and_changes_nothing() {
    type Spoil = fn(&mut InterruptControllerState);
    let cases: [(StateError, Spoil); 16] = [
        (StateError::Id, |s| s.apic_id = 7),
        (StateError::Addressing, |s| s.apic_ldr = 2),
        (StateError::Addressing, |s| s.apic_dfr = 0),
        (StateError::Spurious, |s| s.apic_spurious = 0x11ff),
        (StateError::Vector, |s| s.apic_isr[0] = 0x8000),
        (StateError::Vector, |s| s.apic_tmr[0] = 1),
        (StateError::Vector, |s| s.apic_irr[0] = 2),
        (StateError::ErrorStatus, |s| s.apic_esr = 0x100),
        (StateError::ErrorStatus, |s| s.apic_error_status = 0x100),
        (StateError::Icr, |s| s.apic_icr_low = 0x2000),
        (StateError::Lvt, |s| s.apic_lvt_timer = 0x8_0000),
        (StateError::Lvt, |s| s.apic_lvt_error = 0x700),
        (StateError::Timer, |s| s.apic_divide_configuration = 4),
        (StateError::Timer, |s| s.apic_counter_value = 1),
        (StateError::Timer, |s| {
            s.apic_lvt_timer = DEADLINE;
            s.apic_initial_count = 1;
        }),
        (StateError::Timer, |s| {
            s.apic_lvt_timer = PERIODIC | DEADLINE;
            s.apic_initial_count = 1;
        }),
    ];
    let mut apic = xapic(0);
    let good = apic.export(0);
    for (error, spoil) in cases {
        let mut state = good;
        spoil(&mut state);
        assert_eq!(apic.import(&state, 0), Err(error));
        assert_eq!(apic.export(0), good);
    }
}

#[test]
fn state_of_a_software_disabled_apic_comes_in_masked() {
    let mut apic = LocalApic::new(config(), 0, true);
    let mut state = apic.export(0);
    state.apic_lvt_lint0 = 0x700;
    assert_eq!(apic.import(&state, 0), Ok(()));
    assert_eq!(get(&mut apic, LVT_LINT0), 0x1_0700);
}

#[test]
fn import_keeps_tpr_and_an_armed_tsc_deadline() {
    let mut apic = timer(0x30 | DEADLINE, 0, 0);
    let _ = apic.write_tsc_deadline(777, 0).unwrap();
    apic.set_tpr(0x20);
    let state = apic.export(0);
    assert_eq!(apic.import(&state, 0), Ok(()));
    assert_eq!(apic.tsc_deadline(0), 777);
    assert_eq!((apic.tpr(), apic.ppr()), (0x20, 0x20));
}

#[test]
fn apic_fits_easily_into_a_page() {
    assert!(core::mem::size_of::<LocalApic>() <= 320);
    assert!(core::mem::size_of::<Posted>() <= 128);
}

#[test]
fn hidden_trigger_modes_still_report_the_end() {
    let posted = Posted::new();
    let mut apic = xapic(0);
    for (hide, shown) in [(false, 1 << 2), (true, 0)] {
        if hide {
            posted.hide_trigger_modes();
        }
        posted.post(Interrupt::level(0x42));
        posted.drain_into(&mut apic);
        service(&mut apic, 0x42);
        assert_eq!(get(&mut apic, 0x180 + 0x20), shown, "TMR");
        assert_eq!(
            apic.eoi(),
            WriteEffect::Eoi {
                vector: 0x42,
                level: true
            }
        );
    }
}
