// SPDX-License-Identifier: GPL-2.0
//! Stands in for the machine where the image's code runs as an ordinary program, under `cargo test`: memory, and what the
//! loader leaves there. There is no processor: children do not run, MSRs are 0, CPUID is the host's.

use core::cell::UnsafeCell;

use hv_abi::boot::{BootInfo, Vendor, VmxCapabilityMsrs};
use hv_abi::layout::{DIRECT_BASE, PAGE_SIZE};
use hv_x86::paging::{Attributes, Host, Layout, PageSize, PageTable};

use super::memory::{wipe, Guard, SpinLock};
use crate::header::{boot, set_boot};
use crate::memory::PagePool;
use crate::partition;
use crate::slat::Slat;

/// Bytes of memory, from SPA 0 on.
pub const MEMORY: u64 = 8 << 20;
/// First page of the loader's pool. What lies below is the root's.
pub const POOL: u64 = 6 << 20;
const POOL_PAGES: u64 = (MEMORY - POOL) / PAGE_SIZE - 2;
/// The page that a read of a sealed page sees, and the scratch page of all CPUs: the last two.
const ZERO_PAGE: u64 = MEMORY - PAGE_SIZE;
const SCRATCH: u64 = MEMORY - 2 * PAGE_SIZE;

#[repr(C, align(4096))]
struct Memory(UnsafeCell<[u8; MEMORY as usize]>);

// SAFETY: one test at a time uses it (see `Machine`).
unsafe impl Sync for Memory {}

static BYTES: Memory = Memory(UnsafeCell::new([0; MEMORY as usize]));
static IN_USE: SpinLock<()> = SpinLock::new(());

/// Address of physical memory.
pub fn memory(spa: u64) -> *mut u8 {
    assert!(spa < MEMORY, "no memory at SPA {spa:#x}");
    BYTES.0.get().cast::<u8>().wrapping_add(spa as usize)
}

/// Address of the scratch page.
pub fn scratch(_: u32) -> u64 {
    memory(SCRATCH) as u64
}

/// The machine, of which a process has one: a second test waits until the first has dropped it.
pub struct Machine {
    _one: Guard<'static, ()>,
}

impl Machine {
    /// As the loader leaves it: memory zero, the pool sealed and in the direct map, no partition.
    #[must_use]
    pub fn start(vendor: Vendor) -> Self {
        let one = IN_USE.lock();
        for page in 0..MEMORY / PAGE_SIZE {
            wipe(page * PAGE_SIZE);
        }
        // Taken from the first page on, as the loader does.
        let mut pool = PagePool::new();
        for page in (0..POOL_PAGES).rev() {
            pool.give(POOL + page * PAGE_SIZE);
        }
        let layout = Layout::new(4, PageSize::Size4K);
        let direct = PageTable::<Host>::with_layout(&mut pool, layout);
        let mut direct = direct.expect("the pool has room");
        let length = MEMORY - POOL;
        direct
            .map(&mut pool, DIRECT_BASE + POOL, POOL, length, Attributes::RW)
            .expect("the pool has room");
        let mut info = BootInfo {
            vendor,
            cpus: 2,
            allow_fault: 0,
            host_cr3: direct.root(),
            root_slat: 0,
            root_eptp: 0,
            linux_direct_map: 0,
            leave_trampoline: 0,
            pool: POOL,
            pool_pages: POOL_PAGES,
            pool_used: 0,
            zero_page: ZERO_PAGE,
            physical_bits: 40,
            vmx_cet: 0,
            svm_next_rip: 0,
            host_levels: 4,
            slat_1g: 1,
            child_msr_map: 0,
            child_iopm: 0,
            tsc_hz: 1_000_000_000,
            vmx: VmxCapabilityMsrs::default(),
            root_xcr0: 7,
            xsaves: 0,
            user_cr3_bits: 0,
            mitigations: 0,
        };
        let mut root = Slat::new(&info, &mut pool).expect("the pool has room");
        root.map(&mut pool, 0, 0, POOL, Attributes::RWX)
            .expect("the pool has room");
        for page in POOL / PAGE_SIZE..MEMORY / PAGE_SIZE {
            root.map(
                &mut pool,
                page * PAGE_SIZE,
                ZERO_PAGE,
                PAGE_SIZE,
                Attributes::R,
            )
            .expect("the pool has room");
        }
        info.root_slat = root.root();
        info.pool_used = POOL_PAGES - pool.len();
        // SAFETY: the machine is ours, and nobody keeps a reference across tests.
        unsafe { set_boot(info) };
        partition::forget_all();
        Self { _one: one }
    }

    /// What the loader left for all CPUs.
    #[must_use]
    pub fn info(&self) -> &'static BootInfo {
        boot()
    }
}
