// SPDX-License-Identifier: GPL-2.0
//! Guest memory: regions of the VMM's address space, mapped to the child in batches when it first touches
//! them.
//!
//! A region is cut into chunks where the child may have large pages of [`CHUNK`] pages. A chunk exists once a page of it
//! is mapped; it holds the pinned pages. So a region costs nothing until it is used, whatever its size. A chunk whose
//! pages lie in a row in memory, as those of a huge page do, is mapped as one large page.

use core::sync::atomic::{AtomicU64, Ordering};

use kernel::mm::MmWithUser;
use kernel::prelude::*;
use kernel::rbtree::RBTree;

use super::call::{bytes, errno};
use super::partition::Partition;
use crate::abi::hypercall::code;
use crate::abi::partition::{access, map, unmap, MapGpaPages, UnmapGpaPages};
use crate::sys::{self, PinnedPage};

/// Pages that are pinned and mapped together: those of a large page of the child.
const CHUNK: usize = 512;
/// Pages of one MAP_GPA_PAGES call; 500 would fit, but their numbers are on the stack.
const BATCH: usize = 128;
/// Pages that a child's physical address space may have (52 bits).
const GUEST_PAGES: u64 = 1 << 40;

/// What a region has of the [`CHUNK`] pages of a large page.
struct Chunk {
    /// By page in the child, also those that belong to another region or to none.
    pages: KVec<PinnedPage>,
    /// Mapped as one large page.
    large: bool,
}

/// A region of guest memory.
pub(crate) struct Region {
    /// First page number in the child.
    start: u64,
    pages: u64,
    /// Address in the VMM, page aligned.
    address: u64,
    writable: bool,
    executable: bool,
    /// By first page number in the child, divided by [`CHUNK`].
    chunks: RBTree<u64, Chunk>,
}

/// How much there is. Read without the lock: who holds that may wait for the disk, or for a file system that the VMM
/// itself serves.
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
    /// The page is there and the region does not allow the access.
    Denied,
    /// The page belongs to a region but the host cannot provide it.
    Broken,
    /// No region.
    NotMemory,
}

impl Region {
    /// A region that is not part of a partition yet.
    pub(crate) fn new(
        start: u64,
        size: u64,
        address: u64,
        writable: bool,
        executable: bool,
    ) -> Result<Self> {
        let pages = size / 4096;
        let end = start.checked_add(pages).ok_or(EINVAL)?;
        if size == 0 || size % 4096 != 0 || address % 4096 != 0 || end > GUEST_PAGES {
            return Err(EINVAL);
        }
        address.checked_add(size).ok_or(EINVAL)?;
        Ok(Self {
            start,
            pages,
            address,
            writable,
            executable,
            chunks: RBTree::new(),
        })
    }

    fn end(&self) -> u64 {
        self.start + self.pages
    }

    /// `EINVAL` if nothing is mapped at its address, `EOPNOTSUPP` if that is device memory.
    pub(super) fn check_source(&self, mm: &MmWithUser) -> Result {
        let lock = mm.mmap_read_lock();
        let vma = lock.vma_lookup(self.address as usize).ok_or(EINVAL)?;
        if vma.flags() & (kernel::mm::virt::flags::IO | kernel::mm::virt::flags::PFNMAP) != 0 {
            return Err(EOPNOTSUPP);
        }
        Ok(())
    }

    fn flags(&self) -> u32 {
        let mut flags = map::READABLE | map::ADJUSTABLE;
        if self.writable {
            flags |= map::WRITABLE;
        }
        if self.executable {
            flags |= map::EXECUTABLE;
        }
        flags
    }

    fn allows(&self, kind: u8) -> bool {
        match kind {
            access::WRITE => self.writable,
            access::EXECUTE => self.executable,
            _ => true,
        }
    }

    /// Whether any page of the chunk of page `gfn` may be mapped.
    fn has_chunk(&self, gfn: u64) -> bool {
        self.chunks.get(&(gfn / CHUNK as u64)).is_some()
    }

    /// Whether page `gfn` is mapped.
    fn is_mapped(&self, gfn: u64) -> bool {
        let chunk = self.chunks.get(&(gfn / CHUNK as u64));
        let page = chunk.and_then(|chunk| chunk.pages.get((gfn % CHUNK as u64) as usize));
        page.is_some_and(|page| *page != PinnedPage::NONE)
    }

    /// Pins and maps page `gfn` of the child, and as many around it as it gets.
    fn populate(&mut self, partition: &Partition, gfn: u64) -> Result {
        let number = gfn / CHUNK as u64;
        if self.chunks.get(&number).is_none() {
            let chunk = Chunk {
                pages: KVec::from_elem(PinnedPage::NONE, CHUNK, GFP_KERNEL_ACCOUNT)?,
                large: false,
            };
            self.chunks
                .try_create_and_insert(number, chunk, GFP_KERNEL_ACCOUNT)?;
        }
        // The part of it that is the region's.
        let first = number * CHUNK as u64;
        let low = self.start.saturating_sub(first) as usize;
        let high = (self.end() - first).min(CHUNK as u64) as usize;
        let index = (gfn - first) as usize;
        let (start, address, writable, executable, flags) = (
            self.start,
            self.address,
            self.writable,
            self.executable,
            self.flags(),
        );
        let Chunk { pages, large } = self.chunks.get_mut(&number).ok_or(EIO)?;
        let chunk = pages.get_mut(..high).ok_or(EIO)?;
        // The pages not yet there around the one that is wanted.
        let from = chunk[low..index]
            .iter()
            .rposition(|page| *page != PinnedPage::NONE)
            .map_or(low, |last| low + last + 1);
        let to = chunk[index..]
            .iter()
            .position(|page| *page != PinnedPage::NONE)
            .map_or(high, |next| index + next);
        let at = |index: usize| address + (first + index as u64 - start) * 4096;
        let mut begin = from;
        let mut pinned = sys::pin_pages(at(from), writable, &mut chunk[from..to]).unwrap_or(0);
        if begin + pinned <= index {
            // Something before it is missing: then this one alone.
            // SAFETY: pinned just now, not mapped.
            unsafe { unpin(&mut chunk[begin..begin + pinned], false) };
            begin = index;
            pinned = sys::pin_pages(at(index), writable, &mut chunk[index..=index])?;
            if pinned == 0 {
                return Err(EFAULT);
            }
        }
        let pages = &mut chunk[begin..begin + pinned];
        *large = is_large(pages) && !(executable && sys::large_code_pages_are_unsafe());
        let mapped = if *large {
            map_list(partition, first, flags | map::LARGE_PAGE, &[pages[0].pfn()])
                .map(|()| CHUNK)
                .map_err(|(_, error)| (0, error))
        } else {
            map_pages(partition, first + begin as u64, flags, pages)
        };
        let done = *mapped.as_ref().unwrap_or_else(|(done, _)| done);
        // SAFETY: these could not be mapped.
        unsafe { unpin(&mut pages[done..], false) };
        let sizes = &partition.sizes;
        sizes.mapped.fetch_add(done as u64, Ordering::Relaxed);
        *large &= mapped.is_ok();
        sizes.large.fetch_add((*large).into(), Ordering::Relaxed);
        match mapped {
            Err((_, error)) if begin + done <= index => Err(error),
            _ => Ok(()),
        }
    }

    /// Takes all pages away from the child and lets them go. On an error they stay pinned for ever: the child may
    /// still reach them.
    pub(super) fn unmap(mut self, partition: &Partition) -> Result {
        let (mut mapped, mut large) = (0, 0);
        for (number, chunk) in self.chunks.iter() {
            let first = number * CHUNK as u64;
            let mut index = 0;
            while let Some(run) = next_run(&chunk.pages, index) {
                index = run.end;
                mapped += run.len() as u64;
                large += u64::from(chunk.large);
                let (count, unmap_flags) = if chunk.large {
                    (1, unmap::LARGE_PAGE)
                } else {
                    (run.len() as u16, 0)
                };
                let head = UnmapGpaPages {
                    target_partition_id: partition.id(),
                    target_gpa_base: first + run.start as u64,
                    unmap_flags,
                    ..Default::default()
                };
                let answer =
                    partition.rep(code::UNMAP_GPA_PAGES, count, [bytes(&head), &[]], &mut [])?;
                match errno(answer.status) {
                    Ok(()) | Err(ENODEV) => {}
                    Err(error) => {
                        pr_warn!(
                            "partition {}: memory cannot be unmapped: {:?}\n",
                            partition.id(),
                            error
                        );
                        return Err(error);
                    }
                }
            }
            sys::reschedule().unwrap_or(());
        }
        if mapped != 0 {
            partition.flush();
        }
        self.release();
        let sizes = &partition.sizes;
        sizes.mapped.fetch_sub(mapped, Ordering::Relaxed);
        sizes.large.fetch_sub(large, Ordering::Relaxed);
        sizes.regions.fetch_sub(1, Ordering::Relaxed);
        sizes.pages.fetch_sub(self.pages, Ordering::Relaxed);
        Ok(())
    }

    /// Lets the pages go; the child cannot reach them any more.
    fn release(&mut self) {
        let dirty = self.writable;
        for chunk in self.chunks.values_mut() {
            let mut index = 0;
            while let Some(run) = next_run(&chunk.pages, index) {
                index = run.end;
                // SAFETY: pinned by `populate`; the caller says that no child reaches them.
                unsafe { unpin(&mut chunk.pages[run], dirty) };
            }
        }
    }
}

/// The next pages in a row from `index` on that are there.
fn next_run(chunk: &[PinnedPage], index: usize) -> Option<core::ops::Range<usize>> {
    let rest = chunk.get(index..)?;
    let start = index + rest.iter().position(|page| *page != PinnedPage::NONE)?;
    let length = chunk[start..]
        .iter()
        .take_while(|page| **page != PinnedPage::NONE)
        .count();
    Some(start..start + length)
}

/// Lets pages go.
///
/// # Safety
/// As for [`sys::unpin_pages`].
unsafe fn unpin(pages: &mut [PinnedPage], dirty: bool) {
    if !pages.is_empty() {
        // SAFETY: by the caller's promise.
        unsafe { sys::unpin_pages(pages, dirty) };
        pages.fill(PinnedPage::NONE);
    }
}

/// Whether pinned pages can be one large page.
fn is_large(pages: &[PinnedPage]) -> bool {
    let first = pages.first().map_or(0, |page| page.pfn());
    pages.len() == CHUNK
        && first % CHUNK as u64 == 0
        && (first..).zip(pages).all(|(pfn, page)| page.pfn() == pfn)
}

/// Maps pinned pages from page `gfn` of the child on, and tells how many. On an error also why it stopped.
fn map_pages(
    partition: &Partition,
    gfn: u64,
    flags: u32,
    pages: &[PinnedPage],
) -> core::result::Result<usize, (usize, Error)> {
    let mut done = 0;
    for batch in pages.chunks(BATCH) {
        let mut pfns = [0u64; BATCH];
        for (pfn, page) in pfns.iter_mut().zip(batch) {
            *pfn = page.pfn();
        }
        let at = gfn + done as u64;
        map_list(partition, at, flags, &pfns[..batch.len()])
            .map_err(|(more, error)| (done + more, error))?;
        done += batch.len();
    }
    Ok(done)
}

/// Maps the pages, small or large as the flags say, with these numbers. On an error how many and why it stopped.
fn map_list(
    partition: &Partition,
    gfn: u64,
    flags: u32,
    pfns: &[u64],
) -> core::result::Result<(), (usize, Error)> {
    let head = MapGpaPages {
        target_partition_id: partition.id(),
        target_gpa_base: gfn,
        map_flags: flags,
        padding: 0,
    };
    let input = [bytes(&head), bytes(pfns)];
    let answer = partition
        .rep(code::MAP_GPA_PAGES, pfns.len() as u16, input, &mut [])
        .map_err(|error| (0, error))?;
    errno(answer.status).map_err(|error| (usize::from(answer.reps).min(pfns.len()), error))
}

/// All regions of a partition, by their first page.
pub(crate) struct Memory {
    regions: RBTree<u64, Region>,
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
    fn find(&self, gfn: u64) -> Option<&Region> {
        let region = self.regions.get(&self.start_before(gfn)?)?;
        (gfn < region.end()).then_some(region)
    }

    /// Adds a region; `EEXIST` if it overlaps one.
    pub(super) fn add(&mut self, partition: &Partition, region: Region) -> Result {
        // The last that starts inside it or before it decides.
        if let Some(start) = self.start_before(region.end() - 1) {
            if self
                .regions
                .get(&start)
                .is_some_and(|other| other.end() > region.start)
            {
                return Err(EEXIST);
            }
        }
        let pages = region.pages;
        self.regions
            .try_create_and_insert(region.start, region, GFP_KERNEL_ACCOUNT)?;
        partition.sizes.regions.fetch_add(1, Ordering::Relaxed);
        partition.sizes.pages.fetch_add(pages, Ordering::Relaxed);
        Ok(())
    }

    /// Takes out exactly this region: `ENOENT` if none is at `start`, `EINVAL` if it is another.
    pub(super) fn remove(&mut self, start: u64, pages: u64, address: u64) -> Result<Region> {
        let region = self.find(start).ok_or(ENOENT)?;
        if region.start != start || region.pages != pages || region.address != address {
            return Err(EINVAL);
        }
        self.regions.remove(&start).ok_or(ENOENT)
    }

    /// See [`Partition::fault`].
    pub(super) fn fault(&mut self, partition: &Partition, gfn: u64, kind: u8) -> Result<Fault> {
        if gfn >= GUEST_PAGES {
            return Ok(Fault::NotMemory);
        }
        let Some(start) = self.start_before(gfn) else {
            return Ok(Fault::NotMemory);
        };
        let Some(region) = self
            .regions
            .get_mut(&start)
            .filter(|region| gfn < region.end())
        else {
            return Ok(Fault::NotMemory);
        };
        if region.is_mapped(gfn) {
            return Ok(if region.allows(kind) {
                Fault::Mapped
            } else {
                Fault::Denied
            });
        }
        match region.populate(partition, gfn) {
            Ok(()) => Ok(Fault::Mapped),
            Err(error @ (EINTR | ENODEV)) => Err(error),
            Err(error) => {
                pr_warn_ratelimited(partition.id(), gfn, error);
                Ok(Fault::Broken)
            }
        }
    }

    /// Lets everything go once no VP can run.
    pub(super) fn release(&mut self) {
        for region in self.regions.values_mut() {
            region.release();
        }
    }

    /// Access bits of `count` pages from `gfn` on, which fit `bits`. While nothing is tracked, every page of a
    /// writable region counts as accessed and dirty, so that displays are drawn; while tracking is on, every page
    /// that the child can write to.
    fn access_bits(&self, gfn: u64, count: u64, tracks: bool, bits: &mut [u8]) {
        bits.fill(0);
        let end = gfn.saturating_add(count);
        let mut page = gfn;
        while page < end {
            // The rest of a chunk of a region, or of a piece of the hole, is the same for all or looked at.
            let Some(region) = self.find(page) else {
                page = self.next_start(page).unwrap_or(end).min(end);
                continue;
            };
            let next = (page / CHUNK as u64 + 1) * CHUNK as u64;
            let stop = region.end().min(next).min(end);
            if region.writable && (!tracks || region.has_chunk(page)) {
                for page in page..stop {
                    if !tracks || region.is_mapped(page) {
                        let bit = page - gfn;
                        if let Some(byte) = bits.get_mut((bit / 8) as usize) {
                            *byte |= 1 << (bit % 8);
                        }
                    }
                }
            }
            page = stop;
        }
    }

    /// First page of the first region behind `gfn`.
    fn next_start(&self, gfn: u64) -> Option<u64> {
        self.regions
            .cursor_lower_bound(&gfn)
            .map(|cursor| *cursor.current().0)
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
            {
                let memory = partition.memory.lock();
                memory.access_bits(gfn, pages, tracks, piece);
            }
            write(piece)?;
            gfn = gfn.saturating_add(pages);
            count -= pages;
            sys::reschedule()?;
        }
        Ok(())
    }
}
