// SPDX-License-Identifier: GPL-2.0
//! Guest memory in pages of both sizes against a map of 4 KiB pages, short of tables at every step.

use std::collections::{BTreeMap, BTreeSet};

use hv_abi::partition::map;
use hv_abi::status::HvStatus;
use hv_image::slat::{page_size, Page, Slat};
use hv_x86::mtrr::MemoryType;
use hv_x86::paging::{Attributes, Ept, Layout, Npt, PageSize, PageTable, TableMemory, ENTRIES};
use proptest::prelude::*;

const KB4: u64 = 1 << 12;
const MB2: u64 = 1 << 21;
const GB1: u64 = 1 << 30;

/// The window that operations hit: two large pages on either side of an edge of 1 GiB.
const START: u64 = 3 * GB1 - 2 * MB2;
const PAGES: u64 = 4 * 512;

/// Tables as a partition has them: a number of free ones, and those taken.
#[derive(Clone, Default)]
struct Deposit {
    tables: BTreeMap<u64, Vec<u64>>,
    free: u64,
    next: u64,
}

impl TableMemory for Deposit {
    fn allocate(&mut self) -> Option<u64> {
        self.free = self.free.checked_sub(1)?;
        self.next += KB4;
        self.tables.insert(self.next, vec![0; ENTRIES]);
        Some(self.next)
    }

    fn free(&mut self, table: u64) {
        assert!(self.tables.remove(&table).is_some(), "freed twice");
        self.free += 1;
    }

    fn read(&self, table: u64, index: usize) -> u64 {
        self.tables[&table][index]
    }

    fn write(&mut self, table: u64, index: usize, entry: u64) {
        self.tables.get_mut(&table).unwrap()[index] = entry;
    }
}

fn slats() -> [(Slat, Deposit); 2] {
    let layout = Layout::new(4, PageSize::Size1G);
    let deposit = || Deposit {
        free: 1,
        ..Deposit::default()
    };
    let (mut ept, mut npt) = (deposit(), deposit());
    [
        (
            Slat::Ept(PageTable::<Ept>::with_layout(&mut ept, layout).unwrap()),
            ept,
        ),
        (
            Slat::Npt(PageTable::<Npt>::with_layout(&mut npt, layout).unwrap()),
            npt,
        ),
    ]
}

/// What the root asks for, with GPA (in 4 KiB pages of the window) and SPA (in 4 KiB pages) of a page.
#[derive(Clone, Copy, Debug)]
struct Operation {
    large: bool,
    gpa: u64,
    what: Option<(u64, u32)>,
}

impl Operation {
    /// First page in the window and number of pages.
    fn span(self) -> (u64, u64) {
        if self.large {
            (self.gpa & !511, 512)
        } else {
            (self.gpa, 1)
        }
    }

    /// Does it; whether it replaced something, if it maps.
    fn apply(self, slat: &mut Slat, deposit: &mut Deposit) -> Result<Option<bool>, HvStatus> {
        let (first, count) = self.span();
        let gpa = START + first * KB4;
        match self.what {
            Some((spa, flags)) => {
                let flags = flags | if self.large { map::LARGE_PAGE } else { 0 };
                let spa = (spa & !(count - 1)) * KB4;
                let replaced = slat.map_page(deposit, gpa, spa, Page::from_flags(flags))?;
                Ok(Some(replaced))
            }
            None => slat
                .unmap_page(deposit, gpa, page_size(self.large))
                .map(|()| None),
        }
    }
}

type Model = BTreeMap<u64, (u64, Attributes)>;

/// The window as the table translates it; also that no translation is outside it.
fn translations(slat: &Slat, deposit: &Deposit) -> Model {
    let page = |page: u64| {
        let found = slat.lookup(deposit, START + page * KB4 + 0x123)?;
        assert_eq!(found.spa & 0xfff, 0x123);
        Some((page, (found.spa & !0xfff, found.attributes)))
    };
    for outside in [START - KB4, START - MB2, START + PAGES * KB4, 0] {
        assert_eq!(slat.lookup(deposit, outside), None);
    }
    (0..PAGES).filter_map(page).collect()
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let rights = prop_oneof![
        Just(map::READABLE),
        Just(map::READABLE | map::WRITABLE),
        Just(map::READABLE | map::WRITABLE | map::EXECUTABLE),
        Just(map::READABLE | map::WRITABLE | map::NOT_CACHED),
    ];
    let gpa = prop_oneof![0..PAGES, (0..PAGES / 512).prop_map(|page| page * 512 + 511)];
    let what = prop::option::weighted(0.6, (0u64..1 << 20, rights));
    let operation =
        (any::<bool>(), gpa, what).prop_map(|(large, gpa, what)| Operation { large, gpa, what });
    prop::collection::vec(operation, 1..40)
}

/// Each operation is repeated with one more table for as long as it lacks one, as the root does.
fn agrees(mut slat: Slat, mut deposit: Deposit, operations: &[Operation]) {
    let mut model = Model::new();
    for operation in operations {
        let (first, count) = operation.span();
        let replaces = model.range(first..first + count).next().is_some();
        // None is free: whatever the last one gave back was withdrawn.
        deposit.free = 0;
        let mut shortages = 0;
        let answer = loop {
            match operation.apply(&mut slat, &mut deposit) {
                Err(HvStatus::INSUFFICIENT_MEMORY) => {
                    assert_eq!(translations(&slat, &deposit), model, "half done");
                    shortages += 1;
                    assert!(shortages <= 3, "{operation:?}");
                    deposit.free = shortages;
                }
                answer => break answer,
            }
        };
        let expected = operation.what.map(|_| replaces);
        assert_eq!(answer, Ok(expected), "{operation:?}");
        for page in first..first + count {
            match operation.what {
                Some((spa, flags)) => {
                    let spa = (spa & !(count - 1)) * KB4 + (page - first) * KB4;
                    model.insert(page, (spa, Page::from_flags(flags).attributes));
                }
                None => {
                    model.remove(&page);
                }
            }
        }
        assert_eq!(translations(&slat, &deposit), model, "{operation:?}");
        if operation.large && operation.what.is_some() {
            let found = slat.lookup(&deposit, START + first * KB4).unwrap();
            assert_eq!(found.size, PageSize::Size2M);
        }
        // One page that is left splits, and holds a table; none is kept for what is large or gone.
        let halves: BTreeSet<_> = model.keys().map(|page| page / 1024).collect();
        let small = (0..PAGES / 512).filter(|large| {
            let mapped = (0..512).any(|page| model.contains_key(&(large * 512 + page)));
            mapped
                && (0..512).any(|page| {
                    let at = START + (large * 512 + page) * KB4;
                    slat.lookup(&deposit, at)
                        .is_none_or(|found| found.size == PageSize::Size4K)
                })
        });
        let level3 = usize::from(!halves.is_empty());
        assert_eq!(
            deposit.tables.len(),
            1 + level3 + halves.len() + small.count()
        );
    }
    for large in 0..PAGES / 512 {
        let gone = slat.unmap_page(&mut deposit, START + large * MB2, PageSize::Size2M);
        assert_eq!(gone, Ok(()));
    }
    assert_eq!(deposit.tables.len(), 1);
    slat.destroy(&mut deposit);
    assert!(deposit.tables.is_empty(), "leak");
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 32,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn pages_of_both_sizes_agree_with_a_map_of_pages(operations in operations()) {
        for (slat, deposit) in slats() {
            agrees(slat, deposit, &operations);
        }
    }

    #[test]
    fn arbitrary_pages_are_survived(gpa: u64, spa: u64, flags: u32) {
        for (mut slat, mut deposit) in slats() {
            deposit.free = 3;
            let page = Page::from_flags(flags);
            let mapped = slat.map_page(&mut deposit, gpa, spa, page);
            let _ = slat.is_writable_identity(&deposit, spa, page.size);
            let unmapped = slat.unmap_page(&mut deposit, gpa, page.size);
            prop_assert!(mapped.is_err() || unmapped.is_ok());
            slat.destroy(&mut deposit);
            prop_assert!(deposit.tables.is_empty());
        }
    }
}

#[test]
fn flags_become_size_and_rights() {
    let page = |flags| {
        let Page { size, attributes } = Page::from_flags(flags);
        (size, attributes)
    };
    let uncached = Attributes::RW.with_memory_type(MemoryType::Uncacheable);
    assert_eq!(page(0x800f), (PageSize::Size4K, Attributes::RWX));
    assert_eq!(page(0x8000_000f), (PageSize::Size2M, Attributes::RWX));
    assert_eq!(page(0x8000_0001), (PageSize::Size2M, Attributes::R));
    // Code for one privilege level only would need mode-based execute control.
    assert_eq!(page(7), (PageSize::Size4K, Attributes::RW));
    assert_eq!(page(0x20_0003), (PageSize::Size4K, uncached));
}

#[test]
fn misaligned_and_distant_pages_are_refused() {
    let large = Page::from_flags(map::READABLE | map::LARGE_PAGE);
    for (mut slat, mut deposit) in slats() {
        deposit.free = 8;
        let cases = [
            (MB2 + KB4, MB2, HvStatus::INVALID_ALIGNMENT),
            (MB2, MB2 + KB4, HvStatus::INVALID_ALIGNMENT),
            (MB2, MB2 / 2, HvStatus::INVALID_ALIGNMENT),
            (1 << 48, MB2, HvStatus::INVALID_PARAMETER),
            (u64::MAX & !(MB2 - 1), MB2, HvStatus::INVALID_PARAMETER),
            (MB2, 1 << 52, HvStatus::INVALID_PARAMETER),
            (MB2, u64::MAX & !(MB2 - 1), HvStatus::INVALID_PARAMETER),
        ];
        for (gpa, spa, expected) in cases {
            let answer = slat.map_page(&mut deposit, gpa, spa, large);
            assert_eq!(answer, Err(expected), "{gpa:#x} {spa:#x}");
        }
        let unmap = |slat: &mut Slat, deposit: &mut Deposit, gpa| {
            slat.unmap_page(deposit, gpa, PageSize::Size2M)
        };
        assert_eq!(
            unmap(&mut slat, &mut deposit, KB4),
            Err(HvStatus::INVALID_ALIGNMENT)
        );
        assert_eq!(
            unmap(&mut slat, &mut deposit, 1 << 48),
            Err(HvStatus::INVALID_PARAMETER)
        );
        assert_eq!(deposit.tables.len(), 1);
    }
}

/// The root's own table: mapped to itself, with a page that shows zeros instead.
#[test]
fn large_page_around_a_sealed_page_is_not_the_roots() {
    for (mut slat, mut deposit) in slats() {
        deposit.free = 16;
        slat.map(&mut deposit, 0, 0, 4 * GB1, Attributes::RWX)
            .unwrap();
        let sealed = GB1 + 3 * MB2 + 511 * KB4;
        let zeros = 5 * KB4;
        slat.map(&mut deposit, sealed, zeros, KB4, Attributes::R)
            .unwrap();
        slat.map(&mut deposit, 2 * GB1, 2 * GB1, KB4, Attributes::R)
            .unwrap();
        slat.map(&mut deposit, 3 * GB1, 0, KB4, Attributes::RWX)
            .unwrap();
        // As after a page was given back: small, and all of it the root's.
        slat.map(&mut deposit, MB2, MB2, KB4, Attributes::RWX)
            .unwrap();
        let is_roots = |page, large| slat.is_writable_identity(&deposit, page, page_size(large));
        for (page, large, expected) in [
            (GB1 + 3 * MB2, true, false),
            (GB1 + 3 * MB2, false, true),
            (sealed, false, false),
            (GB1 + 2 * MB2, true, true),
            (GB1 + 4 * MB2, true, true),
            (2 * GB1, true, false),
            (3 * GB1, true, false),
            (MB2, true, true),
            (MB2 + KB4, true, false),
            (4 * GB1 - MB2, true, true),
            (4 * GB1, true, false),
            (4 * GB1, false, false),
            (u64::MAX & !(MB2 - 1), true, false),
        ] {
            assert_eq!(is_roots(page, large), expected, "{page:#x} {large}");
        }
    }
}
