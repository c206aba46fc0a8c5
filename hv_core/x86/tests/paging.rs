// SPDX-License-Identifier: GPL-2.0

//! Page tables against models, under random sequences of changes.
//!
//! The memory under test plays the processor: it walks the raw entries itself, by the manuals and not by the code under
//! test, refuses reserved bits, and looks at a few addresses after *every* single write, as a CPU that uses the table
//! at that moment might.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

use hv_x86::mtrr::MemoryType;
use hv_x86::paging::{
    Attributes, Ept, Error, Format, Host, Layout, Npt, PageSize, PageTable, TableMemory,
    Translation, ENTRIES,
};
use proptest::prelude::*;

const KB4: u64 = 1 << 12;
const MB2: u64 = 1 << 21;
const GB1: u64 = 1 << 30;

const PHYSICAL_ADDRESS_BITS: u8 = 46;
const ENCRYPTION_MASK: u64 = 1 << 47;

/// What one walk by the processor finds: SPA, rights, memory type, C-bit.
type Walked = Option<(u64, Attributes, bool)>;

/// How the processor reads an entry of one format.
trait Processor: Format + Debug {
    /// Where the ranges under test begin, and which attributes they use.
    const BASES: [u64; 4];
    const ATTRIBUTES: [Attributes; 4];

    /// Rights and memory type of a present entry; panics on what the processor does not accept.
    fn read(entry: u64, leaf: bool) -> Option<Attributes>;
}

const UC: MemoryType = MemoryType::Uncacheable;

impl Processor for Ept {
    const BASES: [u64; 4] = [0, 511 * GB1, (1 << 47) - GB1, (1 << 48) - 8 * GB1];
    const ATTRIBUTES: [Attributes; 4] = [
        Attributes::RWX,
        Attributes::R.with_memory_type(MemoryType::WriteCombining),
        Attributes::RW.with_memory_type(UC),
        Attributes {
            read: false,
            ..Attributes::RX
        },
    ];

    fn read(entry: u64, leaf: bool) -> Option<Attributes> {
        let (read, write, execute) = (entry & 1 != 0, entry & 2 != 0, entry & 4 != 0);
        if !read && !write && !execute {
            assert_eq!(entry, 0);
            return None;
        }
        assert!(read || !write, "misconfiguration");
        if !leaf {
            assert_eq!((entry >> 3) & 0x1f, 0, "reserved bits");
            assert!(read && write && execute);
        }
        let memory_type = MemoryType::from_encoding((entry >> 3) & 7).expect("misconfiguration");
        Some(Attributes {
            read,
            write,
            execute,
            memory_type,
        })
    }
}

fn read_long_mode(entry: u64, leaf: bool, user: bool) -> Option<Attributes> {
    if entry & 1 == 0 {
        assert_eq!(entry, 0);
        return None;
    }
    assert_eq!(entry & (1 << 2) != 0, user);
    assert_ne!(entry & (1 << 5), 0, "not accessed");
    assert_eq!(entry & (1 << 8), 0, "global");
    if leaf {
        assert_ne!(entry & (1 << 6), 0, "not dirty");
    } else {
        assert_eq!(
            entry & 0x8000_0000_0000_0002,
            2,
            "a table must not restrict"
        );
    }
    Some(Attributes {
        read: true,
        write: entry & 2 != 0,
        execute: entry >> 63 == 0,
        memory_type: match (entry >> 3) & 3 {
            0 => MemoryType::WriteBack,
            3 => UC,
            other => panic!("PAT index {other}"),
        },
    })
}

const LONG_MODE_ATTRIBUTES: [Attributes; 4] = [
    Attributes::RWX,
    Attributes::R,
    Attributes::RW.with_memory_type(UC),
    Attributes::RX,
];

impl Processor for Npt {
    const BASES: [u64; 4] = Ept::BASES;
    const ATTRIBUTES: [Attributes; 4] = LONG_MODE_ATTRIBUTES;

    fn read(entry: u64, leaf: bool) -> Option<Attributes> {
        read_long_mode(entry, leaf, true)
    }
}

impl Processor for Host {
    const BASES: [u64; 4] = [
        0,
        (1 << 47) - 8 * GB1,
        0xffff_8000_0000_0000,
        0u64.wrapping_sub(8 * GB1),
    ];
    const ATTRIBUTES: [Attributes; 4] = LONG_MODE_ATTRIBUTES;

    fn read(entry: u64, leaf: bool) -> Option<Attributes> {
        read_long_mode(entry, leaf, false)
    }
}

/// An address that is watched during a change, and what it may translate to.
struct Probe {
    address: u64,
    allowed: [Walked; 2],
}

/// The root of the table in use and its depth.
#[derive(Clone, Copy)]
struct Cr3 {
    root: u64,
    levels: u8,
}

struct Memory {
    tables: BTreeMap<u64, Vec<u64>>,
    next: u64,
    taken: u64,
    budget: u64,
    cr3: Option<Cr3>,
    probes: Vec<Probe>,
    walk: fn(&Memory, Cr3, u64) -> Walked,
    mask: u64,
}

impl Memory {
    fn new<F: Processor>(mask: u64) -> Self {
        Self {
            tables: BTreeMap::new(),
            next: 0x12_3456_7000,
            taken: 0,
            budget: u64::MAX,
            cr3: None,
            probes: Vec::new(),
            walk: walk::<F>,
            mask,
        }
    }

    /// The table or page at the end of an entry.
    fn target(&self, entry: u64) -> u64 {
        let address = entry & 0x000f_ffff_ffff_f000 & !self.mask;
        assert_eq!(address >> PHYSICAL_ADDRESS_BITS, 0, "reserved bits");
        address
    }

    fn check_probes(&self) {
        if let Some(cr3) = self.cr3 {
            for probe in &self.probes {
                let found = (self.walk)(self, cr3, probe.address);
                assert!(
                    probe.allowed.contains(&found),
                    "{:#x}: {found:x?} is none of {:x?}",
                    probe.address,
                    probe.allowed
                );
            }
        }
    }

    /// All tables linked from a root; asserts that none but the root is empty, and none is linked twice.
    fn reachable<F: Processor>(&self, cr3: Cr3) -> BTreeSet<u64> {
        let mut found = BTreeSet::new();
        let mut todo = vec![(cr3.root, cr3.levels)];
        while let Some((table, level)) = todo.pop() {
            assert!(found.insert(table), "linked twice");
            let mut present = 0;
            for &entry in &self.tables[&table] {
                let leaf = level == 1 || entry & (1 << 7) != 0;
                if F::read(entry, leaf).is_some() {
                    present += 1;
                    if !leaf {
                        todo.push((self.target(entry), level - 1));
                    }
                }
            }
            assert!(present > 0 || table == cr3.root, "empty table");
        }
        found
    }
}

impl TableMemory for Memory {
    fn allocate(&mut self) -> Option<u64> {
        self.budget = self.budget.checked_sub(1)?;
        self.taken += 1;
        let table = self.next;
        self.next += KB4;
        self.tables.insert(table, vec![0; ENTRIES]);
        Some(table)
    }

    fn free(&mut self, table: u64) {
        assert!(self.tables.remove(&table).is_some(), "freed twice");
        // A walk over a freed table panics.
        self.check_probes();
    }

    fn read(&self, table: u64, index: usize) -> u64 {
        self.tables[&table][index]
    }

    fn write(&mut self, table: u64, index: usize, entry: u64) {
        self.tables.get_mut(&table).expect("not allocated")[index] = entry;
        self.check_probes();
    }
}

/// The processor's walk.
fn walk<F: Processor>(memory: &Memory, cr3: Cr3, address: u64) -> Walked {
    let mut table = cr3.root;
    for level in (1..=cr3.levels).rev() {
        let shift = 12 + 9 * (u32::from(level) - 1);
        let entry = memory.tables[&table][(address >> shift) as usize & 511];
        let leaf = level == 1 || entry & (1 << 7) != 0;
        let attributes = F::read(entry, leaf)?;
        let encrypted = memory.mask != 0 && entry & memory.mask != 0;
        let target = memory.target(entry);
        if leaf {
            assert!(level <= 3, "PS in level {level}");
            let within = address & ((1 << shift) - 1);
            assert_eq!(target & ((1 << shift) - 1), 0, "reserved bits");
            return Some((target | within, attributes, encrypted));
        }
        assert!(memory.mask == 0 || encrypted, "table without C-bit");
        table = target;
    }
    unreachable!()
}

#[derive(Debug, Clone, Copy)]
enum What {
    Map {
        spa: u64,
        attributes: usize,
        clear: bool,
    },
    Unmap,
}

#[derive(Debug, Clone, Copy)]
struct Change {
    base: usize,
    offset: u64,
    length: u64,
    what: What,
}

impl Change {
    fn address<F: Processor>(&self) -> u64 {
        F::BASES[self.base].wrapping_add(self.offset)
    }

    /// What an address translates to after this change, if the change covers it.
    fn covers<F: Processor>(&self, address: u64, mask: u64) -> Option<Walked> {
        let within = address.wrapping_sub(self.address::<F>());
        (within < self.length).then(|| match self.what {
            What::Map {
                spa,
                attributes,
                clear,
            } => Some((spa + within, F::ATTRIBUTES[attributes], mask != 0 && !clear)),
            What::Unmap => None,
        })
    }

    fn apply<F: Processor>(
        &self,
        table: &mut PageTable<F>,
        memory: &mut Memory,
    ) -> Result<(), Error> {
        let address = self.address::<F>();
        match self.what {
            What::Map {
                spa,
                attributes,
                clear: false,
            } => table.map(memory, address, spa, self.length, F::ATTRIBUTES[attributes]),
            What::Map {
                spa, attributes, ..
            } => {
                table.map_unencrypted(memory, address, spa, self.length, F::ATTRIBUTES[attributes])
            }
            What::Unmap => table.unmap(memory, address, self.length),
        }
    }

    fn needs<F: Processor>(&self, table: &PageTable<F>, memory: &Memory) -> u64 {
        let address = self.address::<F>();
        match self.what {
            What::Map { spa, .. } => table.tables_to_map(memory, address, spa, self.length),
            What::Unmap => table.tables_to_unmap(memory, address, self.length),
        }
        .unwrap()
    }
}

/// A count of units below `most`, where the first and last of the table above are as likely as the others.
fn units(most: u64) -> impl Strategy<Value = u64> + Clone {
    prop_oneof![Just(0), Just(1), Just(most - 1), 0..most]
}

/// Changes within 3 GiB from one of the bases, with edges near those of all page sizes.
fn change() -> impl Strategy<Value = Change> {
    let offset = (0u64..3, units(512), units(512))
        .prop_map(|(gb, mb2, kb4)| gb * GB1 + mb2 * MB2 + kb4 * KB4);
    let round = (0u64..3, units(512)).prop_map(|(gb, mb2)| gb * GB1 + mb2 * MB2);
    let any_offset = prop_oneof![offset, round.clone(), (0u64..3).prop_map(|gb| gb * GB1)];
    let length = prop_oneof![
        (1u64..4).prop_map(|n| n * KB4),
        (1u64..1100).prop_map(|n| n * KB4),
        (1u64..4).prop_map(|n| n * MB2),
        (1u64..1100).prop_map(|n| n * MB2),
        (1u64..3).prop_map(|n| n * GB1),
        (round, 0u64..600).prop_map(|(n, kb4)| n + (kb4 + 1) * KB4),
    ];
    // The same alignment as the address, or of 2 MiB or 4 KiB only.
    let skew = prop_oneof![
        6 => Just(0u64),
        2 => (0u64..512).prop_map(|n| n * MB2),
        1 => (0u64..512).prop_map(|n| n * KB4),
    ];
    let map = (skew, 0u64..32, 0usize..4, any::<bool>());
    let what = prop_oneof![3 => map.prop_map(Some), 2 => Just(None)];
    (0usize..4, any_offset, length, what).prop_map(|(base, offset, length, what)| {
        let Some((skew, gb, attributes, clear)) = what else {
            return Change {
                base,
                offset,
                length,
                what: What::Unmap,
            };
        };
        Change {
            base,
            offset,
            // Millions of small pages take too long.
            length: if skew % MB2 == 0 {
                length
            } else {
                length.min(4 * MB2)
            },
            what: What::Map {
                spa: gb * GB1 + offset + skew,
                attributes,
                clear,
            },
        }
    })
}

/// Few bases, so that changes meet.
fn changes(most: usize) -> impl Strategy<Value = Vec<Change>> {
    (
        prop::collection::vec(change(), 1..most),
        prop::bool::weighted(0.8),
        0usize..4,
    )
        .prop_map(|(mut changes, one_base, base)| {
            if one_base {
                for change in &mut changes {
                    change.base = base;
                }
            }
            changes
        })
}

fn layout() -> impl Strategy<Value = Layout> {
    let largest = prop_oneof![
        3 => Just(PageSize::Size1G),
        2 => Just(PageSize::Size2M),
    ];
    (4u8..=5, largest, any::<bool>()).prop_map(|(levels, largest, encrypted)| Layout {
        levels,
        largest,
        physical_address_bits: PHYSICAL_ADDRESS_BITS,
        encryption_mask: if encrypted { ENCRYPTION_MASK } else { 0 },
    })
}

/// A table under test with the log of what was done to it. The log is the model: the last change that covers an
/// address says what it translates to.
struct Bench<F: Processor> {
    memory: Memory,
    table: PageTable<F>,
    log: Vec<Change>,
}

impl<F: Processor> Bench<F> {
    fn new(layout: Layout) -> Self {
        let mut memory = Memory::new::<F>(layout.encryption_mask);
        let table = PageTable::with_layout(&mut memory, layout).unwrap();
        memory.cr3 = Some(Cr3 {
            root: table.root(),
            levels: layout.levels,
        });
        Self {
            memory,
            table,
            log: Vec::new(),
        }
    }

    fn cr3(&self) -> Cr3 {
        Cr3 {
            root: self.table.root(),
            levels: self.table.layout().levels,
        }
    }

    fn expected(&self, address: u64) -> Walked {
        let mask = self.memory.mask;
        let last = self.log.iter().rev();
        last.filter_map(|change| change.covers::<F>(address, mask))
            .next()
            .flatten()
    }

    /// The pages on both sides of each edge of all changes, in ascending order of edges.
    fn edges(&self, more: &[Change]) -> BTreeSet<u64> {
        self.log
            .iter()
            .chain(more)
            .flat_map(|change| {
                let start = change.address::<F>();
                [start, start.wrapping_add(change.length)]
            })
            .filter(|edge| *edge != 0)
            .collect()
    }

    /// Addresses worth looking at.
    fn interesting(&self, more: &[Change]) -> BTreeSet<u64> {
        let mut all = BTreeSet::new();
        for edge in self.edges(more) {
            for size in [KB4, MB2, GB1] {
                all.extend([edge & !(size - 1), edge | (size - 1)]);
            }
            all.extend([edge - 1, edge, edge + 0x123, edge.wrapping_add(MB2 + 7)]);
        }
        for base in F::BASES {
            all.extend([base, base + GB1 + 5 * MB2 + 3]);
        }
        all.retain(|&address| {
            let levels = self.table.layout().levels;
            let extended = (address as i64) << (64 - (12 + 9 * u32::from(levels)));
            let upper = extended >> (64 - (12 + 9 * u32::from(levels)));
            if F::CANONICAL {
                upper as u64 == address
            } else {
                address >> (12 + 9 * levels) == 0
            }
        });
        all
    }

    /// The change, watched and counted.
    fn change(&mut self, change: Change) {
        let mut probes: Vec<Probe> = Vec::new();
        let near = self.interesting(&[change]);
        for address in near.into_iter().step_by(7) {
            let old = self.expected(address);
            let new = change.covers::<F>(address, self.memory.mask).unwrap_or(old);
            probes.push(Probe {
                address,
                allowed: [old, new],
            });
        }
        probes.truncate(12);
        self.memory.probes = probes;
        let needs = change.needs(&self.table, &self.memory);
        let bound = self
            .table
            .tables_needed(change.address::<F>(), change.length)
            .unwrap();
        assert!(needs <= bound);
        self.memory.taken = 0;
        change.apply(&mut self.table, &mut self.memory).unwrap();
        assert_eq!(self.memory.taken, needs);
        self.memory.probes.clear();
        self.log.push(change);
    }

    /// Everything that can be said about the table agrees with the log.
    fn check(&self) {
        let walked = |translation: Translation| {
            (
                translation.spa,
                translation.attributes,
                translation.encrypted,
            )
        };
        for address in self.interesting(&[]) {
            let expected = self.expected(address);
            assert_eq!(walk::<F>(&self.memory, self.cr3(), address), expected);
            let found = self.table.lookup(&self.memory, address);
            assert_eq!(found.map(walked), expected);
        }
        // Between two edges there is one translation or none, so the sizes add up.
        let edges: Vec<u64> = self.edges(&[]).into_iter().chain(F::BASES).collect();
        let edges: BTreeSet<u64> = edges.into_iter().collect();
        let mut mapped = 0u64;
        let mut start = None;
        for &edge in &edges {
            if let Some(start) = start {
                if self.expected(start).is_some() {
                    mapped += edge - start;
                }
            }
            start = Some(edge);
        }
        if let Some(last) = start.filter(|&last| self.expected(last).is_some()) {
            // Only the end of the address space, 2^64, is no edge.
            mapped += 0u64.wrapping_sub(last);
        }
        let mut counted = 0;
        let mut at = None;
        for (first, length) in self.everything() {
            self.table
                .for_each_leaf(&self.memory, first, length, |address, translation| {
                    assert!(at.is_none_or(|at| address >= at), "not ascending");
                    let size = translation.size.bytes();
                    assert_eq!(address % size, 0);
                    assert!(translation.size <= self.table.layout().largest);
                    let last = address + (size - 1);
                    at = Some(last);
                    counted += size;
                    assert_eq!(self.expected(address), Some(walked(translation)));
                    let (spa, attributes, encrypted) = walked(translation);
                    let expected = Some((spa + (size - 1), attributes, encrypted));
                    assert_eq!(self.expected(last), expected);
                })
                .unwrap();
        }
        assert_eq!(counted, mapped);
        self.check_tables();
    }

    /// All that is allocated is linked.
    fn check_tables(&self) {
        let reachable = self.memory.reachable::<F>(self.cr3());
        let allocated: BTreeSet<u64> = self.memory.tables.keys().copied().collect();
        assert_eq!(reachable, allocated);
    }

    /// The whole address space.
    fn everything(&self) -> Vec<(u64, u64)> {
        let bits = 12 + 9 * u32::from(self.table.layout().levels);
        if F::CANONICAL {
            let half = 1u64 << (bits - 1);
            vec![(0, half), (0u64.wrapping_sub(half), half)]
        } else {
            vec![(0, 1 << bits)]
        }
    }

    fn destroy(mut self) {
        self.memory.cr3 = None;
        self.table.destroy(&mut self.memory);
        assert!(self.memory.tables.is_empty(), "leak");
    }
}

fn agrees_with_log<F: Processor>(layout: Layout, changes: &[Change]) {
    let mut bench = Bench::<F>::new(layout);
    for &change in changes {
        bench.change(change);
        bench.check_tables();
    }
    bench.check();
    for (first, length) in bench.everything() {
        bench.table.unmap(&mut bench.memory, first, length).unwrap();
    }
    assert_eq!(bench.memory.tables.len(), 1);
    bench.destroy();
}

/// The last change runs out of tables, at each allocation (or at a few of them, if there are many).
fn survives_shortage<F: Processor>(layout: Layout, changes: &[Change]) {
    let (&last, before) = changes.split_last().unwrap();
    let build = || {
        let mut bench = Bench::<F>::new(layout);
        for change in before {
            change.apply(&mut bench.table, &mut bench.memory).unwrap();
            bench.log.push(*change);
        }
        bench
    };
    let needs = {
        let bench = build();
        last.needs(&bench.table, &bench.memory)
    };
    let start = last.address::<F>();
    for budget in (0..needs).step_by(1 + needs as usize / 12) {
        let mut bench = build();
        let near = bench.interesting(&[last]);
        bench.memory.budget = budget;
        let result = last.apply(&mut bench.table, &mut bench.memory);
        assert_eq!(result, Err(Error::OutOfTables));
        bench.check_tables();
        // Somewhere in the range is a cut: done below, untouched above. Find it by what the addresses say; those where
        // the change makes no difference say nothing.
        let mut untouched = false;
        for address in near {
            let found = walk::<F>(&bench.memory, bench.cr3(), address);
            let old = bench.expected(address);
            match last.covers::<F>(address, bench.memory.mask) {
                Some(new) if new != old => {
                    if found == old {
                        untouched = true;
                    } else {
                        assert_eq!(found, new);
                        assert!(
                            !untouched,
                            "{address:#x} is done before {start:#x} and below"
                        );
                    }
                }
                _ => assert_eq!(found, old),
            }
        }
        // With more memory, a second call finishes the work.
        bench.memory.budget = u64::MAX;
        last.apply(&mut bench.table, &mut bench.memory).unwrap();
        bench.log.push(last);
        bench.check();
        bench.destroy();
    }
}

/// First page, count, and what to map: SPA (in GiB if even, in pages if odd) and attributes.
type PageChange = (u64, u64, Option<(u64, usize)>);

/// A window of 4 KiB pages around an edge of 1 GiB, as a map from page to translation.
fn agrees_with_pages<F: Processor>(layout: Layout, changes: &[PageChange]) {
    const PAGES: u64 = 1536;
    let start = F::BASES[1].wrapping_add(GB1 - 700 * KB4);
    let mut bench = Bench::<F>::new(layout);
    let mut model: BTreeMap<u64, (u64, Attributes)> = BTreeMap::new();
    // Everything around is mapped already, so that changes have something to split.
    let around = Change {
        base: 1,
        offset: 0,
        length: 2 * GB1,
        what: What::Map {
            spa: 4 * GB1,
            attributes: 0,
            clear: false,
        },
    };
    bench.change(around);
    for page in 0..PAGES {
        let spa = 4 * GB1 + GB1 - 700 * KB4 + page * KB4;
        model.insert(start + page * KB4, (spa, F::ATTRIBUTES[0]));
    }
    for &(first, count, what) in changes {
        let first = first % PAGES;
        let count = count.min(PAGES - first);
        let address = start + first * KB4;
        let (memory, table) = (&mut bench.memory, &mut bench.table);
        let result = match what {
            Some((spa, attributes)) => {
                let attributes = F::ATTRIBUTES[attributes];
                // Half of them as aligned as the address is.
                let spa = if spa % 2 == 0 {
                    spa * GB1 + address % GB1
                } else {
                    spa * KB4
                };
                for page in 0..count {
                    model.insert(address + page * KB4, (spa + page * KB4, attributes));
                }
                table.map(memory, address, spa, count * KB4, attributes)
            }
            None => {
                for page in 0..count {
                    model.remove(&(address + page * KB4));
                }
                table.unmap(memory, address, count * KB4)
            }
        };
        assert_eq!(result, Ok(()));
        for page in 0..PAGES {
            let page = start + page * KB4;
            let found = bench.table.lookup(&bench.memory, page);
            let found = found.map(|found| (found.spa, found.attributes));
            assert_eq!(found, model.get(&page).copied());
        }
    }
    for outside in [start - KB4, start - GB1 / 2, start + PAGES * KB4] {
        let within = outside - F::BASES[1];
        let found = bench.table.lookup(&bench.memory, outside).unwrap();
        assert_eq!(found.spa, 4 * GB1 + within);
    }
    bench.check_tables();
    bench.destroy();
}

fn page_changes() -> impl Strategy<Value = Vec<PageChange>> {
    let count = prop_oneof![1u64..8, 1u64..1600, Just(512u64)];
    let first = prop_oneof![0u64..1536, Just(188u64), Just(700u64), Just(1212u64)];
    let what = prop::option::weighted(0.6, (0u64..64, 0usize..4));
    prop::collection::vec((first, count, what), 1..12)
}

/// For each format.
macro_rules! every_format {
    ($($format:ident, $module:ident;)*) => {
        $(mod $module {
            use super::*;

            proptest! {
                #![proptest_config(ProptestConfig {
                    cases: 64,
                    failure_persistence: None,
                    ..ProptestConfig::default()
                })]

                #[test]
                fn table_agrees_with_the_log_of_changes(
                    layout in layout(),
                    changes in changes(14),
                ) {
                    agrees_with_log::<$format>(layout, &changes);
                }

                #[test]
                fn shortage_of_tables_leaves_a_prefix_done(
                    layout in layout(),
                    changes in changes(6),
                ) {
                    survives_shortage::<$format>(layout, &changes);
                }

                #[test]
                fn each_page_agrees_with_a_map_of_pages(
                    layout in layout(),
                    changes in page_changes(),
                ) {
                    agrees_with_pages::<$format>(layout, &changes);
                }

                #[test]
                fn arbitrary_arguments_are_survived(
                    layout in layout(),
                    address: u64,
                    spa: u64,
                    length: u64,
                    aligned: bool,
                    rights in 0u8..8,
                    encoding in 0u64..8,
                ) {
                    let mut bench = Bench::<$format>::new(layout);
                    bench.memory.budget = 64;
                    let round = if aligned { !(KB4 - 1) } else { u64::MAX };
                    let (address, spa, length) = (address & round, spa & round, length & round);
                    let attributes = Attributes {
                        read: rights & 1 != 0,
                        write: rights & 2 != 0,
                        execute: rights & 4 != 0,
                        memory_type: MemoryType::from_encoding_or_uncacheable(encoding),
                    };
                    let (table, memory) = (&mut bench.table, &mut bench.memory);
                    let _ = table.map(memory, address, spa, length % GB1, attributes);
                    let _ = table.map(memory, address, spa, length, attributes);
                    let _ = table.lookup(memory, address);
                    let _ = table.tables_needed(address, length);
                    let _ = table.tables_to_unmap(memory, address, length);
                    let _ = table.unmap(memory, address, length);
                    bench.check_tables();
                    bench.destroy();
                }
            }
        })*
    };
}

every_format! {
    Ept, ept;
    Npt, npt;
    Host, host;
}
