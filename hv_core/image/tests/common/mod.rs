// SPDX-License-Identifier: GPL-2.0
//! A root that makes hypercalls, on a machine without a processor.
#![allow(dead_code, missing_docs)] // Each test takes its part.

use std::collections::BTreeSet;

use hv_abi::boot::Vendor;
use hv_abi::hypercall::{code, Control};
use hv_abi::partition::*;
use hv_abi::status::HvStatus;
use hv_image::arch::host::{memory, Machine, POOL};
use hv_image::hypercall::Call;
use hv_image::partition::with_shared;

pub const PAGE: u64 = 4096;
pub const INPUT: u64 = 0x1000;
pub const OUTPUT: u64 = 0x2000;
/// A page that it maps and shares.
pub const KEPT: u64 = 0x3000;
/// Where the pages start that the root gives away.
const FREE: u64 = 0x10_0000;

/// A root that makes hypercalls. What it gave to the hypervisor is in `given`.
pub struct Root {
    pub machine: Machine,
    pub given: BTreeSet<u64>,
}

impl Root {
    pub fn new(vendor: Vendor) -> Self {
        Self {
            machine: Machine::start(vendor),
            given: BTreeSet::new(),
        }
    }

    pub fn raw(&self, control: u64, input: u64, output: u64) -> (HvStatus, u16) {
        let result = Call {
            info: self.machine.info(),
            cpu: 0,
            control: Control(control),
            input,
            output,
            pull: |_, _| {},
            root_control: 0,
        }
        .run();
        (HvStatus(result as u16), (result >> 32) as u16)
    }

    /// A simple call.
    pub fn call<T: Copy>(&self, number: u16, input: T) -> Result<(), HvStatus> {
        put(INPUT, input);
        match self.raw(number.into(), INPUT, OUTPUT) {
            (HvStatus::SUCCESS, _) => Ok(()),
            (status, _) => Err(status),
        }
    }

    /// A rep call with all its elements, repeated where it stopped as long as it goes on.
    pub fn reps<T: Copy, E: Copy>(&self, number: u16, head: T, list: &[E]) -> (HvStatus, u16) {
        put(INPUT, head);
        for (index, element) in list.iter().enumerate() {
            put(
                INPUT + (size_of::<T>() + index * size_of::<E>()) as u64,
                *element,
            );
        }
        self.repeat(number, list.len() as u64)
    }

    pub fn repeat(&self, number: u16, count: u64) -> (HvStatus, u16) {
        let mut start = 0;
        loop {
            let control = u64::from(number) | count << 32 | start << 48;
            let (status, done) = self.raw(control, INPUT, OUTPUT);
            if status != HvStatus::SUCCESS || u64::from(done) >= count {
                return (status, done);
            }
            assert!(u64::from(done) > start, "no progress");
            start = done.into();
        }
    }

    /// A page of the root that it did not give away.
    pub fn page(&self) -> u64 {
        (FREE..POOL)
            .step_by(PAGE as usize)
            .find(|page| !self.given.contains(page))
            .expect("a free page")
    }

    pub fn deposit(&mut self, partition_id: u64) {
        let page = self.page();
        let head = PartitionId { partition_id };
        let answer = self.reps(code::DEPOSIT_MEMORY, head, &[page / PAGE]);
        assert_eq!(answer, (HvStatus::SUCCESS, 1));
        self.given.insert(page);
    }

    /// Does a call, depositing a page as often as that is asked for. How many it took.
    pub fn with_deposits(
        &mut self,
        id: u64,
        mut call: impl FnMut(&Self) -> Result<(), HvStatus>,
    ) -> usize {
        for deposits in 0..64 {
            match call(self) {
                Ok(()) => return deposits,
                Err(HvStatus::INSUFFICIENT_MEMORY) => self.deposit(id),
                Err(other) => panic!("{other:?}"),
            }
        }
        panic!("never enough");
    }

    pub fn create(&self) -> u64 {
        self.call(code::CREATE_PARTITION, CreatePartition::default())
            .expect("the loader's pool has pages");
        get(OUTPUT)
    }

    /// A partition with one VP.
    pub fn partition(&mut self) -> u64 {
        let id = self.create();
        let this = PartitionId { partition_id: id };
        self.with_deposits(id, |root| root.call(code::INITIALIZE_PARTITION, this));
        self.with_deposits(id, |root| root.call(code::CREATE_VP, vp(id, 0)));
        id
    }

    pub fn map(&self, id: u64, gpa: u64, spa: u64, map_flags: u32) -> Result<(), HvStatus> {
        let head = MapGpaPages {
            target_partition_id: id,
            target_gpa_base: gpa / PAGE,
            map_flags,
            padding: 0,
        };
        match self.reps(code::MAP_GPA_PAGES, head, &[spa / PAGE]) {
            (HvStatus::SUCCESS, 1) => Ok(()),
            (status, 0) => Err(status),
            other => panic!("{other:?}"),
        }
    }

    /// Takes all of a partition's memory back and deletes it.
    pub fn bury(&mut self, id: u64) {
        let this = PartitionId { partition_id: id };
        self.call(code::FINALIZE_PARTITION, this)
            .expect("nobody uses it");
        let head = WithdrawMemory {
            partition_id: id,
            ..Default::default()
        };
        put(INPUT, head);
        loop {
            let (status, done) =
                self.raw(u64::from(code::WITHDRAW_MEMORY) | 1 << 32, INPUT, OUTPUT);
            if status == HvStatus::NO_RESOURCES {
                break;
            }
            assert_eq!((status, done), (HvStatus::SUCCESS, 1));
            let page = get::<u64>(OUTPUT) * PAGE;
            assert!(self.given.remove(&page), "{page:#x} was never given");
            assert_eq!(bytes(page), [0; PAGE as usize], "{page:#x} is not wiped");
        }
        self.call(code::DELETE_PARTITION, this)
            .expect("it is empty");
    }

    /// Of each page below the loader's pool: the root has it if and only if it did not give it away.
    pub fn root_has_all_but_what_it_gave(&self) {
        for page in (0..POOL).step_by(PAGE as usize) {
            let has = with_shared(self.machine.info(), |s| {
                s.is_roots(self.machine.info(), page)
            });
            assert_eq!(has, !self.given.contains(&page), "{page:#x}");
        }
    }
}

pub fn put<T: Copy>(spa: u64, value: T) {
    assert!(spa % PAGE + size_of::<T>() as u64 <= PAGE);
    // SAFETY: inside one page of the machine, which the test has for itself; no alignment is asked for.
    unsafe { memory(spa).cast::<T>().write_unaligned(value) }
}

pub fn get<T: Copy>(spa: u64) -> T {
    assert!(spa % PAGE + size_of::<T>() as u64 <= PAGE);
    // SAFETY: as for `put`; the callers ask for integers.
    unsafe { memory(spa).cast::<T>().read_unaligned() }
}

pub fn bytes(page: u64) -> [u8; PAGE as usize] {
    get(page)
}

pub fn vp(partition_id: u64, vp_index: u32) -> CreateVp {
    CreateVp {
        partition_id,
        vp_index,
        ..Default::default()
    }
}
