// SPDX-License-Identifier: GPL-2.0
//! Guest memory: the regions of a partition, and which of their pages the child accessed.

use core::sync::atomic::{AtomicU64, Ordering};

use kernel::prelude::*;
use kernel::rbtree::RBTree;
use kernel::sync::Arc;

use super::partition::Partition;
use super::region::{Region, RegionRequest, GUEST_PAGES};
use crate::sys;

/// How much there is. Read without a lock.
#[derive(Default)]
pub(crate) struct Sizes {
    pub(super) regions: AtomicU64,
    pub(super) pages: AtomicU64,
    pub(super) mapped: AtomicU64,
    /// Large pages among what is mapped.
    pub(super) large: AtomicU64,
}

/// What came of an access that the child could not make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The page is there now (or was): try again.
    Mapped,
    /// The region does not allow the access.
    Denied,
    /// The page belongs to a region but the host cannot provide it.
    Broken,
    /// No region.
    NotMemory,
}

/// All regions of a partition, by their first page.
pub(crate) struct Memory {
    regions: RBTree<u64, Arc<Region>>,
}

impl Memory {
    /// None.
    pub(super) fn new() -> Self {
        Self {
            regions: RBTree::new(),
        }
    }

    /// First page of the last region that starts at or before `gfn`.
    fn start_before(&self, gfn: u64) -> Option<u64> {
        match self.regions.cursor_lower_bound(&gfn.saturating_add(1)) {
            Some(cursor) => cursor.peek_prev().map(|(start, _)| *start),
            None => self.regions.cursor_back().map(|cursor| *cursor.current().0),
        }
    }

    /// The region that page `gfn` belongs to.
    fn find(&self, gfn: u64) -> Option<&Arc<Region>> {
        let region = self.regions.get(&self.start_before(gfn)?)?;
        (gfn < region.range.end()).then_some(region)
    }

    /// `EEXIST` if it overlaps a region.
    pub(super) fn check_free(&self, range: &RegionRequest) -> Result {
        // The last that starts inside it or before it decides.
        let last = self.start_before(range.end() - 1);
        match last.and_then(|start| self.regions.get(&start)) {
            Some(other) if other.range.end() > range.start => Err(EEXIST),
            _ => Ok(()),
        }
    }

    /// Adds a region where [`Self::check_free`] found room.
    pub(super) fn add(&mut self, partition: &Partition, region: Arc<Region>) -> Result {
        let RegionRequest { start, pages, .. } = region.range;
        self.regions
            .try_create_and_insert(start, region, GFP_KERNEL_ACCOUNT)?;
        partition.sizes.regions.fetch_add(1, Ordering::Relaxed);
        partition.sizes.pages.fetch_add(pages, Ordering::Relaxed);
        Ok(())
    }

    /// Takes out exactly this region: `ENOENT` if none is at `start`, `EINVAL` if it is another.
    pub(super) fn remove(
        &mut self,
        partition: &Partition,
        request: &RegionRequest,
    ) -> Result<Arc<Region>> {
        let found = &self.find(request.start).ok_or(ENOENT)?.range;
        let key = |range: &RegionRequest| (range.start, range.pages, range.address);
        if key(found) != key(request) {
            return Err(EINVAL);
        }
        let region = self.regions.remove(&request.start).ok_or(ENOENT)?;
        partition.sizes.regions.fetch_sub(1, Ordering::Relaxed);
        let pages = request.pages;
        partition.sizes.pages.fetch_sub(pages, Ordering::Relaxed);
        Ok(region)
    }

    /// Lets everything go once no VP can run.
    pub(super) fn release(&mut self) {
        let regions = core::mem::take(&mut self.regions);
        regions.values().for_each(|region| region.release());
    }

    /// First page of the first region behind `gfn`.
    fn next_start(&self, gfn: u64) -> Option<u64> {
        self.regions
            .cursor_lower_bound(&gfn)
            .map(|cursor| *cursor.current().0)
    }
}

impl Partition {
    /// Guest memory at page `gfn` is missing, or does not allow an access of this kind. `EINTR` if a signal waits.
    pub(super) fn fault(&self, gfn: u64, kind: u8) -> Result<Fault> {
        loop {
            // Not held while pages come: that may wait for the disk, or for who removes the region.
            let region = match self.memory.lock().find(gfn) {
                Some(region) if gfn < GUEST_PAGES => region.clone(),
                _ => return Ok(Fault::NotMemory),
            };
            match region.fault(self, gfn, kind) {
                Ok(Some(fault)) => return Ok(fault),
                Ok(None) => {}
                Err(error @ (EINTR | ENODEV)) => return Err(error),
                // That the VMM has nothing there is its own business.
                Err(EFAULT) => return Ok(Fault::Broken),
                Err(error) => {
                    pr_warn_ratelimited(self.id(), gfn, error);
                    return Ok(Fault::Broken);
                }
            }
        }
    }
}

fn pr_warn_ratelimited(partition: u64, gfn: u64, error: Error) {
    use core::sync::atomic::{AtomicU32, Ordering};
    static SAID: AtomicU32 = AtomicU32::new(0);
    if SAID.fetch_add(1, Ordering::Relaxed) < 10 {
        pr_warn!(
            "partition {}: page {:#x} of guest memory is missing: {:?}\n",
            partition,
            gfn,
            error
        );
    }
}

/// A question about accessed or dirty pages.
pub(crate) struct AccessQuery {
    /// First page in the child.
    pub(crate) gfn: u64,
    /// Number of pages.
    pub(crate) count: u64,
    /// Not those that were only read.
    pub(crate) dirty: bool,
    /// Pages that the child does not have any more count from now on only once it gets them again.
    pub(crate) clear: bool,
}

impl AccessQuery {
    /// Hands the bitmap to `write`, piece by piece.
    pub(super) fn run(
        self,
        partition: &Partition,
        tracks: bool,
        mut write: impl FnMut(&[u8]) -> Result,
    ) -> Result {
        let mut buffer = [0u8; 512];
        let (mut gfn, mut count) = (self.gfn, self.count);
        while count != 0 {
            let pages = count.min(buffer.len() as u64 * 8);
            let piece = buffer.get_mut(..pages.div_ceil(8) as usize).ok_or(EIO)?;
            self.bits(partition, gfn, pages, tracks, piece);
            write(piece)?;
            gfn = gfn.saturating_add(pages);
            count -= pages;
            sys::reschedule()?;
        }
        Ok(())
    }

    /// Access bits of `count` pages from `gfn` on, which fit `bits`. While nothing is tracked, every page of a
    /// writable region counts as accessed and dirty, so that displays are drawn; while tracking is on, every page
    /// that the child could access, or write to, since the bits were cleared.
    fn bits(&self, partition: &Partition, gfn: u64, count: u64, tracks: bool, bits: &mut [u8]) {
        bits.fill(0);
        let mut set = |page: u64| {
            let bit = page - gfn;
            if let Some(byte) = bits.get_mut((bit / 8) as usize) {
                *byte |= 1 << (bit % 8);
            }
        };
        let end = gfn.saturating_add(count);
        let memory = partition.memory.lock();
        let mut page = gfn;
        while page < end {
            let Some(region) = memory.find(page) else {
                page = memory.next_start(page).unwrap_or(end).min(end);
                continue;
            };
            let pages = page..region.range.end().min(end);
            page = pages.end;
            if !region.range.writable && self.dirty {
                continue;
            }
            if tracks {
                region.for_each_accessed(&pages, self.dirty, self.clear, &mut set);
            } else if region.range.writable {
                pages.for_each(&mut set);
            }
        }
    }
}
