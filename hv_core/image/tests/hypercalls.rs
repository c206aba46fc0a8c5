// SPDX-License-Identifier: GPL-2.0
//! The root's hypercalls about partitions, with their parameters in the memory of a machine without a processor.

mod common;

use std::collections::BTreeSet;

use common::*;
use hv_abi::boot::Vendor;
use hv_abi::hypercall::{code, state_page};
use hv_abi::partition::*;
use hv_abi::status::HvStatus;
use hv_image::arch::host::{MEMORY, POOL};
use hv_image::partition::find;
use proptest::prelude::*;

/// `HV_X64_REGISTER_RIP`.
const RIP: u32 = 0x0002_0010;

fn both(test: impl Fn(Root)) {
    for vendor in [Vendor::Vmx, Vendor::Svm] {
        test(Root::new(vendor));
    }
}

#[test]
fn partition_gives_back_all_that_it_got() {
    both(|mut root| {
        let id = root.partition();
        for page in 0..40 {
            // Far apart, so that each needs tables of its own.
            root.with_deposits(id, |root| root.map(id, page << 30, KEPT, 0xf));
        }
        assert!(root.given.len() > 40);
        root.root_has_all_but_what_it_gave();
        root.bury(id);
        assert_eq!(root.given, BTreeSet::new());
        root.root_has_all_but_what_it_gave();
        let gone = root.call(code::DELETE_PARTITION, PartitionId { partition_id: id });
        assert_eq!(gone, Err(HvStatus::INVALID_PARTITION_ID));
    });
}

#[test]
fn deposit_retry_after_insufficient_memory() {
    both(|mut root| {
        let id = root.create();
        let this = PartitionId { partition_id: id };
        assert_eq!(
            root.with_deposits(id, |r| r.call(code::INITIALIZE_PARTITION, this)),
            1
        );
        assert_eq!(
            root.with_deposits(id, |r| r.call(code::CREATE_VP, vp(id, 0))),
            6
        );
        // One table at each level below the root.
        assert_eq!(root.with_deposits(id, |r| r.map(id, 0, KEPT, 3)), 3);
        assert_eq!(root.with_deposits(id, |r| r.map(id, PAGE, KEPT, 3)), 0);
        root.bury(id);
    });
}

#[test]
fn rep_call_tells_how_far_it_got() {
    both(|mut root| {
        let id = root.partition();
        root.with_deposits(id, |root| root.map(id, 0, KEPT, 3));
        let head = MapGpaPages {
            target_partition_id: id,
            target_gpa_base: 0x200,
            map_flags: 3,
            padding: 0,
        };
        // The third page is the hypervisor's; the first needs a table.
        let list = [KEPT / PAGE, KEPT / PAGE, POOL / PAGE, KEPT / PAGE];
        assert_eq!(
            root.reps(code::MAP_GPA_PAGES, head, &list),
            (HvStatus::INSUFFICIENT_MEMORY, 0)
        );
        root.deposit(id);
        assert_eq!(
            root.reps(code::MAP_GPA_PAGES, head, &list),
            (HvStatus::ACCESS_DENIED, 2)
        );
        let inner = |gpa| find(id).expect("it lives").translate(gpa, true);
        assert_eq!(inner(0x20_0000), Some(KEPT));
        assert_eq!(inner(0x20_1000), Some(KEPT));
        assert_eq!(inner(0x20_2000), None);
        root.bury(id);
    });
}

#[test]
fn page_can_be_given_once() {
    both(|mut root| {
        let id = root.partition();
        let sealed = *root.given.first().expect("deposits");
        let head = PartitionId { partition_id: id };
        for page in [sealed, POOL, MEMORY - PAGE, MEMORY, 1 << 50] {
            let answer = root.reps(code::DEPOSIT_MEMORY, head, &[page / PAGE]);
            assert_eq!(answer, (HvStatus::INVALID_PARAMETER, 0), "{page:#x}");
        }
        let answer = root.reps(code::DEPOSIT_MEMORY, head, &[u64::MAX]);
        assert_eq!(answer, (HvStatus::INVALID_PARAMETER, 0));
        root.bury(id);
    });
}

#[test]
fn parameters_lie_in_memory_of_the_root() {
    both(|mut root| {
        let id = root.partition();
        let sealed = *root.given.first().expect("deposits");
        let number = u64::from(code::CREATE_PARTITION);
        for (input, output, status) in [
            (sealed, OUTPUT, HvStatus::INVALID_PARAMETER),
            (INPUT, sealed, HvStatus::INVALID_PARAMETER),
            (POOL, OUTPUT, HvStatus::INVALID_PARAMETER),
            (INPUT, MEMORY + 0x1000, HvStatus::INVALID_PARAMETER),
            (INPUT + 1, OUTPUT, HvStatus::INVALID_ALIGNMENT),
            (INPUT, OUTPUT + 4, HvStatus::INVALID_ALIGNMENT),
            (0, OUTPUT, HvStatus::INVALID_HYPERCALL_INPUT),
            (INPUT, 0, HvStatus::INVALID_HYPERCALL_INPUT),
            // Not in one page.
            (INPUT + PAGE - 48, OUTPUT, HvStatus::INVALID_HYPERCALL_INPUT),
        ] {
            put(INPUT, CreatePartition::default());
            assert_eq!(
                root.raw(number, input, output),
                (status, 0),
                "{input:#x} {output:#x}"
            );
        }
        root.bury(id);
    });
}

#[test]
fn partition_with_a_user_is_not_finalized() {
    both(|mut root| {
        let id = root.partition();
        let user = find(id).expect("it lives");
        let this = PartitionId { partition_id: id };
        let refused = root.call(code::FINALIZE_PARTITION, this);
        assert_eq!(refused, Err(HvStatus::INVALID_PARTITION_STATE));
        let refused = root.call(code::DELETE_PARTITION, this);
        assert_eq!(refused, Err(HvStatus::INVALID_PARTITION_STATE));
        drop(user);
        root.bury(id);
    });
}

#[test]
fn vp_is_made_once_and_again_after_its_deletion() {
    both(|mut root| {
        let id = root.partition();
        let again = root.call(code::CREATE_VP, vp(id, 0));
        assert_eq!(again, Err(HvStatus::INVALID_PARAMETER));
        let beyond = root.call(code::CREATE_VP, vp(id, 256));
        assert_eq!(beyond, Err(HvStatus::INVALID_VP_INDEX));
        let this = DeleteVp {
            partition_id: id,
            ..Default::default()
        };
        assert_eq!(root.call(code::DELETE_VP, this), Ok(()));
        assert_eq!(
            root.call(code::DELETE_VP, this),
            Err(HvStatus::INVALID_VP_INDEX)
        );
        // Its pages are free for it.
        assert_eq!(
            root.with_deposits(id, |r| r.call(code::CREATE_VP, vp(id, 0))),
            0
        );
        root.bury(id);
    });
}

#[test]
fn register_reads_as_written() {
    both(|mut root| {
        let id = root.partition();
        let head = VpRegisters {
            partition_id: id,
            ..Default::default()
        };
        let rip = RegisterAssoc {
            name: RIP,
            value: [0x1234_5678, 0],
            ..Default::default()
        };
        let bad = RegisterAssoc {
            name: u32::MAX,
            ..rip
        };
        let set = root.reps(code::SET_VP_REGISTERS, head, &[rip, bad]);
        assert_eq!(set, (HvStatus::INVALID_PARAMETER, 1));
        assert_eq!(
            root.reps(code::GET_VP_REGISTERS, head, &[RIP]),
            (HvStatus::SUCCESS, 1)
        );
        assert_eq!(get::<[u64; 2]>(OUTPUT), [0x1234_5678, 0]);
        root.bury(id);
    });
}

#[test]
fn state_page_shows_the_registers() {
    both(|mut root| {
        let id = root.partition();
        let map = MapVpStatePage {
            partition_id: id,
            page_type: state_page::REGISTERS,
            flags: 1,
            requested_map_location: KEPT / PAGE,
            ..Default::default()
        };
        let sealed = *root.given.first().expect("deposits");
        let wrong = MapVpStatePage {
            requested_map_location: sealed / PAGE,
            ..map
        };
        let refused = root.call(code::MAP_VP_STATE_PAGE, wrong);
        assert_eq!(refused, Err(HvStatus::INVALID_PARAMETER));
        assert_eq!(root.call(code::MAP_VP_STATE_PAGE, map), Ok(()));
        // Version 1, valid, and RIP of a VP after INIT.
        assert_eq!((get::<u16>(KEPT), get::<u8>(KEPT + 2)), (1, 1));
        assert_eq!(get::<u64>(KEPT + 136), 0xfff0);
        root.bury(id);
    });
}

/// A value that is often one that means something.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0u64..4,
        2 => (0u64..8).prop_map(|n| n << 8 | 2),
        2 => Just(KEPT / PAGE),
        1 => Just(POOL / PAGE),
        2 => Just(u64::from(RIP)),
        1 => Just(u64::MAX),
        1 => any::<u64>(),
    ]
}

fn any_call() -> impl Strategy<Value = (u64, Vec<u64>)> {
    let number = prop_oneof![
        20 => 0x40u64..0x58,
        4 => Just(u64::from(code::REGISTER_INTERCEPT_RESULT)),
        4 => Just(u64::from(code::ASSERT_VIRTUAL_INTERRUPT)),
        8 => 0xe1u64..0xe5,
        2 => Just(u64::from(code::GET_VP_CPUID_VALUES)),
        2 => Just(u64::from(code::GET_PARTITION_PROPERTY_EX)),
        1 => any::<u16>().prop_map(u64::from),
    ];
    let reps = prop_oneof![4 => 0u64..4, 1 => 0u64..0x1000];
    let start = prop_oneof![4 => Just(0u64), 1 => 0u64..0x1000];
    let control = (number, reps, start, any::<u16>()).prop_map(|(number, reps, start, rest)| {
        number | u64::from(rest & 0x3ff) << 17 | reps << 32 | start << 48
    });
    (control, prop::collection::vec(word(), 1..12))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Nothing that the root says makes the hypervisor panic, hold a page that the root still has, or keep one after the end.
    #[test]
    fn any_calls_leave_the_memory_in_order(
        vmx in any::<bool>(),
        calls in prop::collection::vec(any_call(), 1..60),
    ) {
        let mut root = Root::new(if vmx { Vendor::Vmx } else { Vendor::Svm });
        let first = root.partition();
        for (control, words) in calls {
            let is_deposit = control as u16 == code::DEPOSIT_MEMORY;
            let is_withdrawal = control as u16 == code::WITHDRAW_MEMORY;
            // A lifetime is over when the test says so.
            if [code::FINALIZE_PARTITION, code::CREATE_PARTITION].contains(&(control as u16)) || is_deposit || is_withdrawal {
                continue;
            }
            for (index, word) in words.iter().enumerate() {
                put(INPUT + 8 * index as u64, *word);
            }
            // The first word mostly names the partition.
            if words.len() % 4 != 0 {
                put(INPUT, first);
            }
            let (status, _) = root.raw(control, INPUT, OUTPUT);
            prop_assert!(status.name().is_some(), "{status:?}");
        }
        root.root_has_all_but_what_it_gave();
        root.bury(first);
        prop_assert_eq!(&root.given, &BTreeSet::new());
    }
}
