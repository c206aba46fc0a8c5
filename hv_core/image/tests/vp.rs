// SPDX-License-Identifier: GPL-2.0
//! Properties of a child's registers, CPUID, MSRs and translations that must hold whatever a guest or a VMM writes.

use std::sync::atomic::Ordering;

use hv_abi::boot::Vendor;
use hv_abi::partition::{creation, property};
use hv_image::apic::{ApicConfig, LocalApic, TimerClock};
use hv_image::child_cpuid::{
    cpuid, get_property, set_property, CpuidResult, Features, Guest, Overrides,
};
use hv_image::child_msr::{
    self, reference_time, reference_tsc_page, set_reference_time, validate_cr0, validate_cr3,
    validate_cr4, validate_efer, validate_xcr0, Local,
};
use hv_image::messages;
use hv_image::register_page::{absorb, fill, RegisterPage, Shown};
use hv_image::registers::{name, reset, Registers, SetGroup};
use hv_image::stimer::Timers;
use hv_image::translate::{control, fetch_instruction, gva_page, linear_rip, translate};
use hv_image::vp_state::{Effect, HostFacts, PartitionState, VpState, XSAVE_BYTES};
use proptest::prelude::*;

const HZ: u64 = 2_100_000_000;

/// A processor whose answers are noise made of `seed`, with enough leaves and plausible extended state.
fn host(seed: u32) -> impl Fn(u32, u32) -> [u32; 4] {
    move |leaf, subleaf| {
        let noise = |index: u32| {
            let mut value = seed ^ leaf.rotate_left(7) ^ subleaf.rotate_left(19) ^ (index << 28);
            for _ in 0..3 {
                value ^= value << 13;
                value ^= value >> 17;
                value ^= value << 5;
            }
            value
        };
        match (leaf, subleaf) {
            (0, _) => [0x24, noise(1), noise(2), noise(3)],
            (0x8000_0000, _) => [0x8000_0028, 0, 0, 0],
            (0xd, 0) => [noise(0) | 3, 0, 0, 0],
            (0xd, 2..=20) => [64 * subleaf, 576 + 64 * subleaf, noise(2) & 2, 0],
            (0x8000_0008, _) => [0x3030, noise(1), noise(2), noise(3)],
            _ => [noise(0), noise(1), noise(2), noise(3)],
        }
    }
}

struct Machine {
    vp: VpState,
    apic: LocalApic,
    timers: Timers,
    partition: PartitionState,
    overrides: Overrides,
    xsave: [u8; XSAVE_BYTES],
    tsc: u64,
    seed: u32,
}

impl core::fmt::Debug for Machine {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let partition = &self.partition;
        write!(
            f,
            "Machine::new({:#x}, {:#x?}, {}, {:#x})",
            self.seed,
            partition.disabled,
            partition.host.vendor == Vendor::Svm,
            partition.synthetic_features
        )
    }
}

impl Machine {
    fn new(seed: u32, disabled: [u64; 3], amd: bool, features: u64) -> Self {
        let facts = HostFacts {
            vendor: if amd { Vendor::Svm } else { Vendor::Vmx },
            tsc_hz: HZ,
            xcr0: 0x2e7,
            arch_capabilities: u64::from(seed) << 3,
        };
        let mut partition = PartitionState::new(facts, 1000);
        partition.creation_flags = creation::LAPIC_ENABLED;
        if seed & 1 != 0 {
            partition.creation_flags |= creation::X2APIC_CAPABLE;
        }
        partition.disabled = disabled;
        partition.synthetic_features = features;
        partition.vps = seed % 300;
        let config = ApicConfig {
            x2apic: seed & 1 != 0,
            tsc_deadline: true,
            physical_address_bits: 48,
            clock: TimerClock::new(HZ, TimerClock::HYPERV_APIC_HZ).expect("not 0"),
        };
        let mut new = Self {
            vp: VpState::reset(true),
            apic: LocalApic::new(config, 2, true),
            timers: Timers::RESET,
            partition,
            overrides: Overrides::new(),
            xsave: [0; XSAVE_BYTES],
            tsc: 1_000_000,
            seed,
        };
        new.refresh();
        new
    }

    fn refresh(&mut self) {
        self.vp.features = Features::of(&host(self.seed), &self.partition, &self.overrides);
    }

    fn registers(&mut self) -> Registers<'_> {
        Registers {
            vp: &mut self.vp,
            apic: &mut self.apic,
            partition: &mut self.partition,
            xsave: &mut self.xsave,
            vp_index: 2,
            host_tsc: self.tsc,
        }
    }

    fn write_msr(&mut self, number: u32, value: u64) {
        let mut local = Local {
            vp: &mut self.vp,
            apic: &mut self.apic,
            timers: &mut self.timers,
            partition: &self.partition,
            vp_index: 2,
            host_tsc: self.tsc,
        };
        if let Ok(Effect::Partition) = child_msr::write(number, value, &mut local) {
            let features = self.vp.features;
            let _ = child_msr::write_partition(number, value, &mut self.partition, &features);
        }
    }

    fn read_msr(&mut self, number: u32) {
        let local = Local {
            vp: &mut self.vp,
            apic: &mut self.apic,
            timers: &mut self.timers,
            partition: &self.partition,
            vp_index: 2,
            host_tsc: self.tsc,
        };
        let _ = child_msr::read(number, &local);
    }

    fn cpuid(&self, leaf: u32, subleaf: u32, registered: bool) -> [u32; 4] {
        let overrides = registered.then_some(&self.overrides);
        let guest = Guest::of(&self.vp, &self.apic, &self.partition, overrides);
        cpuid(leaf, subleaf, &host(self.seed), &guest)
    }

    /// What the hypervisor loads by instructions that fault on a bad value.
    fn check_loadable(&self) {
        let vp = &self.vp;
        for address in [
            vp.lstar,
            vp.cstar,
            vp.kernel_gs_base,
            vp.sysenter_eip,
            vp.sysenter_esp,
        ] {
            assert!(vp.features.is_canonical(address), "{address:#x}");
        }
        assert_eq!(
            (vp.sfmask >> 32) | (vp.tsc_aux >> 32) | (vp.dr6 >> 32) | (vp.dr7 >> 32),
            0
        );
        assert_eq!(vp.xss, 0);
        assert!(validate_xcr0(vp.xcr0, &vp.features).is_ok());
        assert_eq!(vp.spec_ctrl & !vp.features.spec_ctrl, 0);
        assert_eq!(vp.rflags & 2, 2);
        // MXCSR has its reserved bits clear.
        assert_eq!(self.xsave[26..28], [0, 0]);
    }
}

/// Numbers as they come: plain, all ones, single bits, almost canonical.
fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        any::<u32>().prop_map(u64::from),
        (0..0x1000_u64),
        (0..64_u32).prop_map(|bit| 1 << bit),
        (0..64_u32).prop_map(|bit| u64::MAX << bit),
        Just(0x0007_0406_0007_0406),
        Just(u64::MAX),
    ]
}

fn register() -> impl Strategy<Value = u32> {
    let series = prop::sample::select(vec![
        0x0, 0x200, 0x1_0000, 0x2_0000, 0x3_0000, 0x4_0000, 0x4_1000, 0x5_0000, 0x6_0000, 0x7_0000,
        0x8_0000, 0x8_0040, 0x8_0070, 0x8_0080, 0x8_00a0, 0x8_4800, 0x9_0000, 0xa_0000, 0xb_0000,
    ]);
    prop_oneof![20 => (series, 0..0x30_u32).prop_map(|(series, index)| series + index), 1 => any::<u32>()]
}

fn msr() -> impl Strategy<Value = u32> {
    let series = prop::sample::select(vec![
        0x0,
        0x40,
        0x80,
        0xc0,
        0x100,
        0x170,
        0x1a0,
        0x1d0,
        0x200,
        0x250,
        0x277,
        0x2ff,
        0x480,
        0x6e0,
        0x800,
        0x830,
        0xda0,
        0x4000_0000,
        0x4000_0020,
        0x4000_0070,
        0x4000_0100,
        0xc000_0080,
        0xc000_0100,
        0xc001_0000,
        0xc001_0110,
        0xc001_1020,
    ]);
    prop_oneof![20 => (series, 0..0x20_u32).prop_map(|(series, index)| series + index), 1 => any::<u32>()]
}

fn leaf() -> impl Strategy<Value = u32> {
    prop_oneof![
        8 => 0..0x26_u32,
        8 => (0..0x2a_u32).prop_map(|leaf| 0x8000_0000 + leaf),
        2 => (0..0x100_u32).prop_map(|leaf| 0x4000_0000 + leaf),
        1 => any::<u32>(),
    ]
}

fn result() -> impl Strategy<Value = CpuidResult> {
    let word = || prop_oneof![Just(0), Just(u32::MAX), any::<u32>()];
    (
        leaf(),
        0..70_u32,
        any::<bool>(),
        prop::array::uniform8(word()),
    )
        .prop_map(|(leaf, subleaf, subleaf_specific, words)| CpuidResult {
            leaf,
            subleaf,
            subleaf_specific,
            result: [
                [words[0], words[1]],
                [words[2], words[3]],
                [words[4], words[5]],
                [words[6], words[7]],
            ],
        })
}

fn machine() -> impl Strategy<Value = Machine> {
    let bank = || prop_oneof![Just(0), any::<u64>()];
    let features = prop_oneof![Just(0x640_0ffb), any::<u64>()];
    (
        any::<u32>(),
        [bank(), bank(), bank()],
        any::<bool>(),
        features,
    )
        .prop_map(|(seed, disabled, amd, features)| Machine::new(seed, disabled, amd, features))
}

#[derive(Clone, Debug)]
enum Op {
    Get(u32),
    Set(u32, u64, u64),
    WriteBack(u32),
    ReadMsr(u32),
    WriteMsr(u32, u64),
    Register(CpuidResult),
    Property(u32, u64),
    Efer(u64),
    Cr(u64),
    Page(u32, u64),
    Tick(u64),
    Reset,
}

fn op() -> impl Strategy<Value = Op> {
    let page_property = (0..0x20_u32).prop_map(|low| {
        let groups = [0x1_0000, 0x3_0000, 0x5_0000, 0x6_0000, 0x9_0000];
        groups[low as usize % groups.len()] + low
    });
    prop_oneof![
        2 => register().prop_map(Op::Get),
        12 => (register(), value(), value()).prop_map(|(number, low, high)| Op::Set(number, low, high)),
        4 => register().prop_map(Op::WriteBack),
        2 => msr().prop_map(Op::ReadMsr),
        12 => (msr(), value()).prop_map(|(number, value)| Op::WriteMsr(number, value)),
        1 => result().prop_map(Op::Register),
        1 => (page_property, value()).prop_map(|(code, value)| Op::Property(code, value)),
        1 => value().prop_map(Op::Efer),
        1 => value().prop_map(Op::Cr),
        1 => (any::<u32>(), value()).prop_map(|(dirty, value)| Op::Page(dirty, value)),
        2 => (0..1_000_000_000_u64).prop_map(Op::Tick),
        1 => Just(Op::Reset),
    ]
}

fn apply(m: &mut Machine, op: Op) {
    match op {
        Op::Get(number) => {
            let _ = m.registers().get(number);
        }
        Op::Set(number, low, high) => {
            let _ = m.registers().set(number, [low, high]);
        }
        Op::WriteBack(number) => {
            // What can be read can be written back, and reads the same, unless it is for reading.
            if let Ok(before) = m.registers().get(number) {
                if m.registers().set(number, before).is_ok() {
                    assert_eq!(m.registers().get(number), Ok(before), "{number:#x}");
                }
            }
        }
        Op::ReadMsr(number) => m.read_msr(number),
        Op::WriteMsr(number, value) => m.write_msr(number, value),
        Op::Register(result) => {
            let before = m.vp.features;
            let _ = m.overrides.register(&result, &host(m.seed), &m.partition);
            m.refresh();
            if m.vp.features != before {
                // VMMs register before they set registers.
                let features = m.vp.features;
                m.vp = VpState::reset(true);
                m.vp.features = features;
            }
        }
        Op::Property(code, value) => {
            let _ = set_property(code, value, true, &mut m.partition, m.tsc);
            let _ = get_property(code, &host(m.seed), &m.partition, m.tsc);
        }
        Op::Efer(value) => {
            let _ = validate_efer(value, &m.vp);
        }
        Op::Cr(value) => {
            for write in [
                validate_cr0(value, &m.vp),
                validate_cr3(value, &m.vp),
                validate_cr4(value, &m.vp),
            ]
            .into_iter()
            .flatten()
            {
                // Long mode is active only with paging and long mode enabled.
                assert!(write.efer & (1 << 10) == 0 || m.vp.efer & ((1 << 8) | (1 << 10)) != 0);
            }
        }
        Op::Page(dirty, value) => {
            let page = filled(m);
            let pairs = page.xmm.iter().chain(&page.segments).flatten();
            for word in page
                .gprs
                .iter()
                .chain([&page.rip, &page.rflags])
                .chain(pairs)
            {
                word.store(value, Ordering::Relaxed);
            }
            absorb(&page, dirty, &mut m.vp, &mut m.xsave);
        }
        Op::Tick(ticks) => m.tsc += ticks,
        Op::Reset => reset(&mut m.vp, &mut m.apic),
    }
}

/// Bits that must stay clear in each register of a leaf.
fn forbidden(leaf: u32, subleaf: u32) -> [u32; 4] {
    match (leaf, subleaf) {
        // Debug store, MONITOR, VMX, SMX, thermal control, PDCM.
        (1, _) => [
            0,
            0,
            (1 << 2) | (1 << 3) | (1 << 5) | (1 << 6) | (1 << 8) | (1 << 15),
            (1 << 21) | (1 << 22),
        ],
        (7, 0) => [
            0,
            (1 << 2) | (1 << 12) | (1 << 14) | (1 << 15) | (1 << 25),
            (1 << 5)
                | (1 << 7)
                | (1 << 13)
                | (1 << 23)
                | (1 << 24)
                | (1 << 29)
                | (1 << 30)
                | (1 << 31),
            (1 << 5)
                | (1 << 18)
                | (1 << 19)
                | (1 << 20)
                | (1 << 22)
                | (1 << 24)
                | (1 << 25)
                | (1 << 30),
        ],
        (7, 1) => [
            (1 << 17) | (1 << 19) | (1 << 21) | (1 << 26) | (1 << 27),
            u32::MAX,
            u32::MAX,
            (1 << 8) | (1 << 21),
        ],
        (0xd, 0) => [!0x2e7, 0, 0, u32::MAX],
        (0xd, 1) => [!0xf, 0, u32::MAX, u32::MAX],
        (0xa | 0xf | 0x10 | 0x12 | 0x14 | 0x19 | 0x1d | 0x1e | 0x23, _) => [u32::MAX; 4],
        (0x8000_0001, _) => [0, 0, (1 << 2) | (1 << 10) | (1 << 29), 0],
        (0x8000_000a | 0x8000_001b | 0x8000_001f | 0x8000_0022, _) => [u32::MAX; 4],
        _ => [0; 4],
    }
}

fn filled(m: &Machine) -> RegisterPage {
    let page = RegisterPage::default();
    fill(&page, &m.vp, &Shown::of(&m.vp), m.apic.cr8(), &m.xsave);
    page
}

proptest! {
    #[test]
    fn nothing_that_is_written_makes_the_hypervisor_fault(
        mut m in machine(),
        ops in prop::collection::vec(op(), 0..60),
    ) {
        for op in ops {
            apply(&mut m, op);
            m.check_loadable();
        }
    }

    #[test]
    fn cpuid_never_shows_what_is_not_virtualised(
        mut m in machine(),
        results in prop::collection::vec(result(), 0..100),
        asked in prop::collection::vec((leaf(), 0..70_u32), 1..50),
    ) {
        for result in &results {
            let _ = m.overrides.register(result, &host(m.seed), &m.partition);
        }
        for (leaf, subleaf) in asked {
            let seen = m.cpuid(leaf, subleaf, true);
            for (register, bits) in seen.into_iter().zip(forbidden(leaf, subleaf)) {
                prop_assert_eq!(register & bits, 0, "{:#x} {}", leaf, subleaf);
            }
            // The VP is found under one id.
            if leaf == 1 {
                prop_assert_eq!(seen[1] >> 24, 2);
            }
        }
    }

    #[test]
    fn disabled_banks_are_disjoint_from_those_the_partition_has(m in machine()) {
        let codes = [
            property::PROCESSOR_FEATURES0,
            property::PROCESSOR_FEATURES1,
            property::PROCESSOR_XSAVE_FEATURES,
        ];
        for (code, disabled) in codes.into_iter().zip(m.partition.disabled) {
            let bank = get_property(code, &host(m.seed), &m.partition, 0).expect("exists");
            prop_assert_eq!(bank & disabled, 0);
        }
        let size = get_property(property::MAX_XSAVE_DATA_SIZE, &host(m.seed), &m.partition, 0);
        prop_assert!(size.expect("exists") <= 4096);
    }

    #[test]
    fn register_page_with_all_groups_dirty_restores_the_registers(
        mut m in machine(),
        ops in prop::collection::vec(op(), 0..30),
    ) {
        for op in ops {
            apply(&mut m, op);
        }
        let page = filled(&m);
        let mut other = Machine::new(0, [0; 3], false, 0);
        absorb(&page, 0x1f, &mut other.vp, &mut other.xsave);
        let back = filled(&other);
        let groups = |page: &RegisterPage| {
            let general = format!("{:?} {:?} {:?}", page.gprs, page.rip, page.rflags);
            general + &format!("{:?} {:?}", page.segments, page.xmm)
        };
        prop_assert_eq!(groups(&back), groups(&page));
    }

    #[test]
    fn reference_time_never_goes_back(
        base in 0..1_u64 << 50,
        offset in value(),
        mut times in prop::collection::vec(0..1_u64 << 58, 2..20),
    ) {
        let mut m = Machine::new(0, [0; 3], false, 0);
        m.partition.reference_base = base;
        times.sort_unstable();
        let read: Vec<u64> = times.iter().map(|tsc| reference_time(*tsc, &m.partition)).collect();
        prop_assert!(read.is_sorted());
        let page = reference_tsc_page(&mut m.partition, offset);
        prop_assert_ne!(page.sequence, 0);
        set_reference_time(base, &mut m.partition, 1 << 51);
        prop_assert_eq!(reference_time(1 << 51, &m.partition), base);
    }

    #[test]
    fn translation_of_any_tables_ends_and_stays_in_its_page(
        mut m in machine(),
        cr0 in value(),
        cr3 in value(),
        cr4 in value(),
        efer in value(),
        address in value(),
        flags in 0..0x800_u64,
        tables in any::<u64>(),
    ) {
        m.vp.cr0 = cr0;
        m.vp.cr3 = cr3;
        m.vp.cr4 = cr4;
        m.vp.efer = efer;
        let reads = core::cell::Cell::new(0);
        let memory = |at: u64, to: &mut [u8]| {
            reads.set(reads.get() + 1);
            assert_eq!(at >> 12, (at + to.len() as u64 - 1) >> 12);
            for (index, byte) in to.iter_mut().enumerate() {
                let mix = (at + index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ tables;
                *byte = (mix >> 32) as u8 | u8::from(index == 0);
            }
            // Addresses that the tables can have.
            if let Some(last) = to.get_mut(5..) {
                last.fill(0);
            }
            (at >> 3) % 31 != tables % 31
        };
        let result = translate(&m.vp, address, flags, &mut |at, to| memory(at, to).then_some(()));
        if let Ok(gpa) = result {
            prop_assert_eq!(gpa & 0xfff, address & 0xfff);
        }
        prop_assert!(reads.get() <= 5);
        let mut bytes = [0; 16];
        let count = fetch_instruction(&m.vp, &mut bytes, |at, to| memory(at, to).then_some(()));
        prop_assert!(count <= 16);
        let exempt = gva_page(&m.vp, address >> 12, control::PRIVILEGE_EXEMPT, |at, to| {
            memory(at, to).then_some(())
        });
        prop_assert!(exempt.0 <= 4 && exempt.0 != 2);
    }

    #[test]
    fn fetched_bytes_are_those_that_each_address_translates_to(
        mut m in machine(),
        cr0 in value(),
        cr3 in value(),
        cr4 in value(),
        efer in value(),
        rip in prop_oneof![value(), value().prop_map(|v| v | 0xff0)],
        tables in any::<u64>(),
    ) {
        m.vp.cr0 = cr0;
        m.vp.cr3 = cr3;
        m.vp.cr4 = cr4;
        m.vp.efer = efer;
        m.vp.rip = rip;
        // Every page but some is there, and is a table that one can walk.
        let memory = |at: u64, to: &mut [u8]| {
            for (address, byte) in (at..).zip(to.iter_mut()) {
                let mix = address.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ tables;
                *byte = match address & 7 {
                    0 => (mix >> 32) as u8 | 1,
                    1..=4 => (mix >> 32) as u8,
                    _ => 0,
                };
            }
            ((at >> 12) % 7 != tables % 7).then_some(())
        };
        let mut expected = Vec::new();
        for offset in 0..16 {
            let address = linear_rip(&m.vp).wrapping_add(offset);
            let flags = control::VALIDATE_EXECUTE | control::PRIVILEGE_EXEMPT;
            let mut byte = [0];
            let read = translate(&m.vp, address, flags, &mut { memory })
                .ok()
                .and_then(|gpa| memory(gpa, &mut byte));
            if read.is_none() {
                break;
            }
            expected.push(byte[0]);
        }
        let mut bytes = [0; 16];
        let count = usize::from(fetch_instruction(&m.vp, &mut bytes, memory));
        prop_assert_eq!(&bytes[..count], &expected[..]);
    }

    #[test]
    fn messages_name_their_size_and_vp(
        mut m in machine(),
        ops in prop::collection::vec(op(), 0..20),
        gpa in value(),
        count in any::<u8>(),
    ) {
        for op in ops {
            apply(&mut m, op);
        }
        let made = [
            messages::memory(9, &m.vp, 0x50, false, 1, Some(gpa), gpa, [0xaa; 16], count),
            messages::unrecoverable_exception(9, &m.vp),
            messages::msr(9, &m.vp, 5, 2, true),
            messages::cpuid(9, &m.vp, 5, 2, [1, 2, 3, 4]),
            messages::apic_eoi(9, count),
            messages::unsupported_feature(9, gpa),
        ];
        for message in made {
            let size = (message[0] >> 32) as usize;
            prop_assert!(size <= 128);
            prop_assert_eq!(message[2] as u32, 9);
            let beyond = 2 + size.div_ceil(8);
            prop_assert!(message[beyond..].iter().all(|word| *word == 0));
        }
    }

    #[test]
    fn only_a_whole_reset_is_taken_for_one(
        mut m in machine(),
        sets in prop::collection::vec((register(), value()), 0..20),
    ) {
        let mut group = SetGroup::default();
        for (number, value) in sets {
            group.note(number);
            let _ = m.registers().set(number, [value, value]);
        }
        if group.is_reset(&m.vp) {
            prop_assert_eq!(m.registers().get(name::RIP), Ok([0xfff0, 0]));
            prop_assert_eq!(m.registers().get(name::CR0), Ok([0x6000_0010, 0]));
        }
    }
}
