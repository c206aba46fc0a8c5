// SPDX-License-Identifier: GPL-2.0
//! Page pools, and the pages that change hands between root and hypervisor.

use hv_abi::boot::BootInfo;
use hv_abi::layout::{DIRECT_BASE, PAGE_SIZE};
use hv_abi::status::HvStatus;
use hv_x86::paging::{Attributes, Host, Layout, PageSize, PageTable};

use crate::arch::memory::{link, set_link, wipe};
use crate::slat::{table_status, Slat};

/// Free pages of one partition, linked through their first word.
pub struct PagePool {
    head: u64,
    count: u64,
    /// Tables that were unlinked. A CPU may still walk them, so they stay out of use until
    /// [`Self::release`].
    held: u64,
}

impl PagePool {
    /// An empty pool.
    pub const fn new() -> Self {
        Self {
            head: 0,
            count: 0,
            held: 0,
        }
    }

    /// Number of free pages.
    pub const fn len(&self) -> u64 {
        self.count
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Takes a page, wiped.
    pub fn take(&mut self) -> Option<u64> {
        let page = self.take_dirty()?;
        wipe(page);
        Some(page)
    }

    /// Takes a page as it is.
    pub fn take_dirty(&mut self) -> Option<u64> {
        if self.head == 0 {
            return None;
        }
        let page = self.head;
        self.head = link(page);
        self.count -= 1;
        Some(page)
    }

    /// Takes back a table that a CPU may still walk.
    pub fn hold(&mut self, table: u64) {
        set_link(table, self.held);
        self.held = table;
    }

    /// Makes the held tables free pages: no CPU walks them any more.
    pub fn release(&mut self) {
        while self.held != 0 {
            let table = self.held;
            self.held = link(table);
            self.give(table);
        }
    }

    /// Adds a page of the hypervisor.
    pub fn give(&mut self, page: u64) {
        set_link(page, self.head);
        self.head = page;
        self.count += 1;
    }
}

impl Default for PagePool {
    fn default() -> Self {
        Self::new()
    }
}

/// What all partitions share: the hypervisor's own pool and the two tables that decide which pages are its.
pub struct Shared {
    /// The root partition's pool: tables of the root and of the image.
    pub pool: PagePool,
    ready: bool,
}

impl Shared {
    /// Before the first use.
    pub const fn new() -> Self {
        Self {
            pool: PagePool::new(),
            ready: false,
        }
    }

    /// Takes over what the loader left of its pool.
    pub fn prepare(&mut self, info: &BootInfo) {
        if self.ready {
            return;
        }
        self.ready = true;
        for page in (info.pool_used..info.pool_pages).rev() {
            self.pool.give(info.pool + page * PAGE_SIZE);
        }
    }

    /// Whether the page is ordinary memory of the root, neither the hypervisor's nor beyond the end.
    pub fn is_roots(&self, info: &BootInfo, page: u64) -> bool {
        self.all_is_roots(info, page, PageSize::Size4K)
    }

    /// The same for every byte of a page of this size.
    pub fn all_is_roots(&self, info: &BootInfo, page: u64, size: PageSize) -> bool {
        Slat::adopt(info, info.root_slat)
            .is_ok_and(|slat| slat.is_writable_identity(&self.pool, page, size))
    }

    /// Takes a page from the root: it vanishes from the root's view and appears in the direct map.
    pub fn seal(&mut self, info: &BootInfo, page: u64) -> Result<(), HvStatus> {
        if page & (PAGE_SIZE - 1) != 0 || !self.is_roots(info, page) {
            return Err(HvStatus::INVALID_PARAMETER);
        }
        self.share(info, page)?;
        let mut slat = Slat::adopt(info, info.root_slat)?;
        slat.map(
            &mut self.pool,
            page,
            info.zero_page,
            PAGE_SIZE,
            Attributes::R,
        )
    }

    /// Gives a page back to the root, wiped.
    pub fn unseal(&mut self, info: &BootInfo, page: u64) -> Result<(), HvStatus> {
        wipe(page);
        let mut slat = Slat::adopt(info, info.root_slat)?;
        slat.map(&mut self.pool, page, page, PAGE_SIZE, Attributes::RWX)?;
        self.unshare(info, page)
    }

    /// Adds a page to the direct map.
    pub fn share(&mut self, info: &BootInfo, page: u64) -> Result<(), HvStatus> {
        self.host(info)?
            .map(
                &mut self.pool,
                DIRECT_BASE + page,
                page,
                PAGE_SIZE,
                Attributes::RW,
            )
            .map_err(table_status)
    }

    /// Removes a page from the direct map. Other CPUs may keep its translation until they next flush: the
    /// image does not use the page any more.
    pub fn unshare(&mut self, info: &BootInfo, page: u64) -> Result<(), HvStatus> {
        self.host(info)?
            .unmap(&mut self.pool, DIRECT_BASE + page, PAGE_SIZE)
            .map_err(table_status)
    }

    fn host(&self, info: &BootInfo) -> Result<PageTable<Host>, HvStatus> {
        PageTable::adopt(
            info.host_cr3,
            Layout::new(info.host_levels as u8, PageSize::Size4K),
        )
        .map_err(table_status)
    }
}

impl Default for Shared {
    fn default() -> Self {
        Self::new()
    }
}
