// SPDX-License-Identifier: GPL-2.0
//! A region of guest memory: what the VMM has at its addresses, mapped to the child when that first touches it.
//!
//! The pages stay the kernel's to move, to swap and to share. A page is mapped as the VMM has it at that moment, and
//! taken away from the child before the kernel changes anything about it (`mmu_interval_notifier`); the next access brings
//! it back:
//!
//! ```text
//!   fault: begin() ── hold pages (may sleep) ── lock ── changed? again : map ── unlock ── release pages
//!   change:                                     lock ── note, unmap, every CPU left its child ── unlock
//! ```
//!
//! So the lock is never held where memory is allocated, and nothing waits for a file system with it. Where the kernel
//! cannot tell of changes, pages are pinned.
//!
//! A region is cut into chunks where the child may have large pages of [`CHUNK`] pages. A chunk exists once a page of it
//! was mapped: a region costs nothing until it is used, whatever its size. A chunk whose pages lie in a row in memory, as
//! those of a huge page do, is mapped as one large page, and goes as one.

use core::ffi::{c_ulong, c_void};
use core::ops::Range;
use core::sync::atomic::Ordering;

use kernel::mm::MmWithUser;
use kernel::new_mutex;
use kernel::prelude::*;
use kernel::rbtree::{RBTree, RBTreeNode};
use kernel::sync::{Arc, Mutex, SetOnce};

use super::call::{bytes, errno};
use super::memory::Fault;
use super::partition::Partition;
use crate::abi::hypercall::code;
use crate::abi::partition::{access, map, unmap, MapGpaPages, UnmapGpaPages};
use crate::sys::{self, Hold, UserPage, Watch};

/// Pages that are mapped together: those of a large page of the child.
pub(super) const CHUNK: usize = 512;
/// Pages of one MAP_GPA_PAGES call; 500 would fit, but their numbers are on the stack.
const BATCH: usize = 128;
/// Pages that a child's physical address space may have (52 bits).
pub(super) const GUEST_PAGES: u64 = 1 << 40;
/// Deposits during one fault: an image that asks for more is wrong.
const DEPOSITS_PER_FAULT: usize = 16;

/// What a client says of a region.
#[derive(Clone, Copy)]
pub(crate) struct RegionRequest {
    /// First page number in the child.
    pub(super) start: u64,
    pub(super) pages: u64,
    /// Address in the VMM, page aligned.
    pub(super) address: u64,
    pub(super) writable: bool,
    executable: bool,
}

impl RegionRequest {
    /// `EINVAL` unless all of it is aligned to pages and there are such addresses. `size` is in bytes.
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
        })
    }

    pub(super) fn end(&self) -> u64 {
        self.start + self.pages
    }

    /// `EINVAL` if nothing is mapped at its address.
    pub(super) fn check_source(&self, mm: &MmWithUser) -> Result {
        let lock = mm.mmap_read_lock();
        lock.vma_lookup(self.address as usize).ok_or(EINVAL)?;
        Ok(())
    }

    fn allows(&self, kind: u8) -> bool {
        match kind {
            access::WRITE => self.writable,
            access::EXECUTE => self.executable,
            _ => true,
        }
    }

    fn flags(&self, writable: bool) -> u32 {
        let mut flags = map::READABLE | map::ADJUSTABLE;
        if writable {
            flags |= map::WRITABLE;
        }
        if self.executable {
            flags |= map::EXECUTABLE;
        }
        flags
    }

    /// Address in the VMM of page `gfn`, which belongs to the region.
    fn address_of(&self, gfn: u64) -> u64 {
        self.address + (gfn - self.start) * 4096
    }

    /// Pages of the child whose addresses in the VMM are in `addresses`.
    fn pages_at(&self, addresses: &Range<u64>) -> Range<u64> {
        let page = |address: u64| self.start + address.saturating_sub(self.address) / 4096;
        page(addresses.start)..page(addresses.end.saturating_add(4095)).min(self.end())
    }
}

/// A bit for each page of a chunk.
#[derive(Clone, Copy)]
struct Bits([u64; CHUNK / 64]);

impl Bits {
    const NONE: Self = Self([0; CHUNK / 64]);

    fn has(&self, index: usize) -> bool {
        self.0[index / 64] >> (index % 64) & 1 != 0
    }

    fn set(&mut self, range: Range<usize>, value: bool) {
        for index in range {
            let bit = 1 << (index % 64);
            if value {
                self.0[index / 64] |= bit;
            } else {
                self.0[index / 64] &= !bit;
            }
        }
    }

    fn is_empty(&self) -> bool {
        self.0 == [0; CHUNK / 64]
    }
}

/// What a region has of the [`CHUNK`] pages of a large page.
struct Chunk {
    /// Those that the child has, by page in the child. Held only if they are pinned.
    pages: KVec<UserPage>,
    /// Those that the child may write to.
    writable: Bits,
    /// Those that the child could write to at any time since the VMM last cleared that.
    written: Bits,
    /// Mapped as one large page.
    large: bool,
    /// The kernel took pages away: from now on the child gets only what it asks for, and what is there anyway. Memory
    /// that the VMM gave back does not come back with its neighbours.
    shrunk: bool,
    /// Counts changes.
    changes: u64,
}

impl Chunk {
    fn new() -> Result<Self> {
        Ok(Self {
            pages: KVec::from_elem(UserPage::NONE, CHUNK, GFP_KERNEL_ACCOUNT)?,
            writable: Bits::NONE,
            written: Bits::NONE,
            large: false,
            shrunk: false,
            changes: 0,
        })
    }

    fn has(&self, index: usize) -> bool {
        self.pages
            .get(index)
            .is_some_and(|page| *page != UserPage::NONE)
    }

    /// Whether the child has the page as it wants it.
    fn suffices(&self, index: usize, write: bool) -> bool {
        self.has(index) && (!write || self.writable.has(index))
    }

    /// The next pages in a row that the child has, from `index` on.
    fn next_run(&self, range: Range<usize>) -> Option<Range<usize>> {
        let start = range.clone().find(|index| self.has(*index))?;
        let end = (start..range.end)
            .find(|index| !self.has(*index))
            .unwrap_or(range.end);
        Some(start..end)
    }
}

/// What the lock of a region guards.
struct State {
    /// By first page number in the child, divided by [`CHUNK`].
    chunks: RBTree<u64, Chunk>,
    /// The region is not part of the partition any more.
    gone: bool,
}

/// The partition of a region, which outlives it.
struct Owner(*const Partition);

// SAFETY: a partition may be used from every thread.
unsafe impl Send for Owner {}
// SAFETY: as above.
unsafe impl Sync for Owner {}

/// A region of guest memory.
#[pin_data]
pub(super) struct Region {
    /// First, so that nobody hears of changes while the rest goes. None: pages are pinned.
    watch: SetOnce<Watch>,
    pub(super) range: RegionRequest,
    owner: Owner,
    #[pin]
    state: Mutex<State>,
}

/// What a fault wants of a chunk.
struct Wanted {
    /// The page, and the pages around it that the child does not have as it wants them.
    index: usize,
    around: Range<usize>,
    /// First page of the chunk in the child.
    first: u64,
    write: bool,
    /// Get what is around it where that is not there yet.
    fresh: bool,
    /// See [`Chunk::changes`].
    changes: u64,
}

/// Where a fault begins.
enum Plan {
    /// The region is gone.
    Gone,
    /// The child has the page.
    There,
    Get(Wanted),
}

/// Pages of user space in the place of pages of a chunk, held until this is dropped.
struct Held<'r> {
    region: &'r Region,
    pages: KVec<UserPage>,
    /// In place of `pages`: number of one page of a device. Nothing has to hold that.
    device: Option<u64>,
    from: usize,
    write: bool,
}

impl Held<'_> {
    fn range(&self) -> Range<usize> {
        let count = self.pages.len() + usize::from(self.device.is_some());
        self.from..self.from + count
    }

    /// Keeps the first pages for good.
    fn keep(&mut self, count: usize) {
        if let Some(kept) = self.pages.get_mut(..count) {
            kept.fill(UserPage::NONE);
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let kept = self
            .pages
            .iter()
            .take_while(|page| **page == UserPage::NONE);
        let kept = kept.count();
        if let Some(pages) = self.pages.get_mut(kept..) {
            // SAFETY: got by `hold`, and no child has them.
            unsafe { self.region.let_go(pages, false) };
        }
    }
}

impl Region {
    /// A region of the caller's memory for `partition`, which has to drop it before it dies.
    pub(super) fn new(partition: &Partition, range: RegionRequest) -> Result<Arc<Self>> {
        let new = Arc::pin_init(
            pin_init!(Self {
                watch: SetOnce::new(),
                range,
                owner: Owner(partition),
                state <- new_mutex!(State {
                    chunks: RBTree::new(),
                    gone: false,
                }),
            }),
            GFP_KERNEL_ACCOUNT,
        )?;
        let owner = core::ptr::from_ref::<Self>(&new).cast_mut().cast();
        // SAFETY: the region does not move, and drops the watch first.
        if let Ok(watch) = unsafe { Watch::new(range.address, range.pages * 4096, owner) } {
            new.watch.populate(watch);
        }
        Ok(new)
    }

    fn is_pinned(&self) -> bool {
        self.watch.as_ref().is_none()
    }

    /// Gets pages from `address` on, as many as it can up to `count`.
    fn hold(
        &self,
        from: usize,
        gfn: u64,
        count: usize,
        write: bool,
        how: Hold,
    ) -> Result<Held<'_>> {
        let address = self.range.address_of(gfn);
        let mut pages = KVec::from_elem(UserPage::NONE, count, GFP_KERNEL_ACCOUNT)?;
        let got = if self.is_pinned() {
            sys::pin_pages(address, write, &mut pages)
        } else {
            sys::hold_pages(address, write, how, &mut pages)
        }?;
        pages.truncate(got);
        Ok(Held {
            region: self,
            pages,
            device: None,
            from,
            write,
        })
    }

    /// The page of a device behind page `gfn`, if the kernel tells of its end.
    fn device(&self, from: usize, gfn: u64, write: bool) -> Result<Held<'_>> {
        if self.is_pinned() {
            return Err(EFAULT);
        }
        let (pfn, writable) = sys::device_page(self.range.address_of(gfn), write)?;
        Ok(Held {
            region: self,
            pages: KVec::new(),
            device: Some(pfn),
            from,
            write: writable && self.range.writable,
        })
    }

    /// Lets pages of [`Self::hold`] go.
    ///
    /// # Safety
    /// They must be held, and if they are pinned, no child may reach them.
    unsafe fn let_go(&self, pages: &mut [UserPage], dirty: bool) {
        if pages.is_empty() {
            return;
        }
        if self.is_pinned() {
            // SAFETY: by the caller's promise.
            unsafe { sys::unpin_pages(pages, dirty) };
        } else {
            // SAFETY: by the caller's promise.
            unsafe { sys::release_pages(pages) };
        }
        pages.fill(UserPage::NONE);
    }

    /// Makes sure that page `gfn` of the child is there for an access of this kind. `None`: the region is gone.
    pub(super) fn fault(&self, partition: &Partition, gfn: u64, kind: u8) -> Result<Option<Fault>> {
        if !self.range.allows(kind) {
            return Ok(Some(Fault::Denied));
        }
        // What is pinned stays as it is.
        let write = kind == access::WRITE || self.is_pinned() && self.range.writable;
        let (mut attempts, mut deposits) = (0, 0);
        loop {
            attempts += 1;
            sys::reschedule()?;
            self.make_chunk(gfn)?;
            let since = self.watch.as_ref().map_or(0, Watch::begin);
            let mut wanted = match self.plan(gfn, write) {
                Plan::Gone => return Ok(None),
                Plan::There => return Ok(Some(Fault::Mapped)),
                Plan::Get(wanted) => wanted,
            };
            if attempts > 2 {
                // The region changes all the time. What takes less time fits in between.
                wanted.around = wanted.index..wanted.index + 1;
            }
            let mut held = self.gather(&wanted)?;
            match self.map(partition, &wanted, &mut held, since) {
                // It looks again whether that was enough.
                Ok(()) => {}
                Err(ENOMEM) if deposits < DEPOSITS_PER_FAULT => {
                    drop(held);
                    deposits += 1;
                    partition.deposit()?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn make_chunk(&self, gfn: u64) -> Result {
        let number = gfn / CHUNK as u64;
        if self.state.lock().chunks.get(&number).is_none() {
            let new = RBTreeNode::new(number, Chunk::new()?, GFP_KERNEL_ACCOUNT)?;
            let mut state = self.state.lock();
            if state.chunks.get(&number).is_none() {
                state.chunks.insert(new);
            }
        }
        Ok(())
    }

    fn plan(&self, gfn: u64, write: bool) -> Plan {
        let number = gfn / CHUNK as u64;
        let first = number * CHUNK as u64;
        let state = self.state.lock();
        let chunk = match state.chunks.get(&number) {
            Some(chunk) if !state.gone => chunk,
            _ => return Plan::Gone,
        };
        let index = (gfn - first) as usize;
        if chunk.suffices(index, write) {
            return Plan::There;
        }
        // The part of it that is the region's.
        let low = self.range.start.saturating_sub(first) as usize;
        let high = (self.range.end() - first).min(CHUNK as u64) as usize;
        let from = (low..index).rfind(|index| chunk.suffices(*index, write));
        let to = (index..high).find(|index| chunk.suffices(*index, write));
        // The first access of its kind brings all of the chunk.
        let touched = if write {
            !chunk.writable.is_empty()
        } else {
            (low..high).any(|index| chunk.has(index))
        };
        Plan::Get(Wanted {
            index,
            around: from.map_or(low, |last| last + 1)..to.unwrap_or(high),
            first,
            write,
            fresh: !chunk.shrunk && !touched,
            changes: chunk.changes,
        })
    }

    /// Holds the page that is wanted and as many around it as there are. What the VMM may not do is an error.
    fn gather(&self, wanted: &Wanted) -> Result<Held<'_>> {
        let Wanted { index, first, .. } = *wanted;
        let hold = |from: usize, to: usize, write, how| {
            self.hold(from, first + from as u64, to - from, write, how)
        };
        let mut fresh = wanted.fresh;
        let mut one = None;
        // Read accesses get the page as it is.
        if !wanted.write && self.range.writable {
            one = hold(index, index + 1, true, Hold::Present)
                .ok()
                .filter(|held| !held.pages.is_empty());
            fresh &= one.is_none();
        }
        let one = match one {
            Some(one) => one,
            None => match hold(index, index + 1, wanted.write, Hold::Waiting) {
                Err(EFAULT) => return self.device(index, first + index as u64, wanted.write),
                held => held?,
            },
        };
        if one.pages.is_empty() {
            return Err(EFAULT);
        }
        if wanted.around.len() == 1 {
            return Ok(one);
        }
        let how = if fresh {
            Hold::WithoutWaiting
        } else {
            Hold::Present
        };
        for from in [wanted.around.start, index] {
            if let Ok(held) = hold(from, wanted.around.end, one.write, how) {
                if held.range().contains(&index) {
                    return Ok(held);
                }
            }
        }
        Ok(one)
    }

    /// Maps what is held, unless anything changed meanwhile. `ENOMEM` if the image needs memory for it; what fits is
    /// mapped.
    fn map(
        &self,
        partition: &Partition,
        wanted: &Wanted,
        held: &mut Held<'_>,
        since: c_ulong,
    ) -> Result {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let changed = self
            .watch
            .as_ref()
            .is_some_and(|watch| watch.has_changed(since));
        let chunk = match state.chunks.get_mut(&(wanted.first / CHUNK as u64)) {
            Some(chunk) if !changed && !state.gone && chunk.changes == wanted.changes => chunk,
            _ => return Ok(()),
        };
        if held.write && !self.is_pinned() {
            // SAFETY: held for writing, and nothing changed since.
            unsafe { sys::dirty_pages(&held.pages) };
        }
        let flags = self.range.flags(held.write);
        let large =
            is_large(&held.pages) && !(self.range.executable && sys::large_code_pages_are_unsafe());
        let (done, result) = if let Some(pfn) = held.device {
            let at = wanted.first + held.from as u64;
            map_list(partition, at, flags | map::NOT_CACHED, &[pfn])
        } else if large {
            let pfn = held.pages.first().map_or(0, |page| page.pfn());
            match map_list(partition, wanted.first, flags | map::LARGE_PAGE, &[pfn]) {
                (1, result) => (CHUNK, result),
                (_, result) => (0, result),
            }
        } else {
            map_pages(
                partition,
                wanted.first + held.from as u64,
                flags,
                &held.pages,
            )
        };
        let mut new = 0;
        let device = held.device.map(|_| UserPage::DEVICE);
        let pages = Iterator::chain(held.pages.iter().copied(), device);
        for (page, index) in pages.zip(held.range()).take(done) {
            new += u64::from(!chunk.has(index));
            if let Some(slot) = chunk.pages.get_mut(index) {
                *slot = page;
            }
        }
        if done != 0 {
            let range = held.from..held.from + done;
            chunk.writable.set(range.clone(), held.write);
            if held.write {
                chunk.written.set(range, true);
            }
            chunk.changes += 1;
            let sizes = &partition.sizes;
            sizes.mapped.fetch_add(new, Ordering::Relaxed);
            // Pages that replace a part of a large page split it.
            sizes.large.fetch_sub(chunk.large.into(), Ordering::Relaxed);
            chunk.large = large;
            sizes.large.fetch_add(large.into(), Ordering::Relaxed);
        }
        drop(guard);
        if self.is_pinned() {
            held.keep(done);
        }
        result
    }

    /// Takes pages away from the child; a large page goes as a whole. Tells whether there were any.
    fn take_away(
        &self,
        state: &mut State,
        partition: &Partition,
        pages: &Range<u64>,
    ) -> Result<bool> {
        let mut any = false;
        let mut next = state
            .chunks
            .cursor_lower_bound_mut(&(pages.start / CHUNK as u64));
        while let Some(mut cursor) = next {
            let (number, chunk) = cursor.current_mut();
            let first = number * CHUNK as u64;
            if first >= pages.end {
                break;
            }
            let within = |page: u64| page.saturating_sub(first).min(CHUNK as u64) as usize;
            let mut rest = if chunk.large {
                0..CHUNK
            } else {
                within(pages.start)..within(pages.end)
            };
            while let Some(run) = chunk.next_run(rest.clone()) {
                unmap_pages(partition, first, run.clone(), chunk.large)?;
                let sizes = &partition.sizes;
                sizes.mapped.fetch_sub(run.len() as u64, Ordering::Relaxed);
                sizes.large.fetch_sub(chunk.large.into(), Ordering::Relaxed);
                chunk.large = false;
                chunk.writable.set(run.clone(), false);
                chunk.shrunk = true;
                chunk.changes += 1;
                if !self.is_pinned() {
                    if let Some(pages) = chunk.pages.get_mut(run.clone()) {
                        pages.fill(UserPage::NONE);
                    }
                }
                any = true;
                rest.start = run.end;
            }
            next = cursor.move_next();
        }
        Ok(any)
    }

    /// Takes the whole region away from the child. On an error pinned pages stay so for ever: the child may still reach
    /// them.
    pub(super) fn remove(&self, partition: &Partition) -> Result {
        let mut state = self.state.lock();
        state.gone = true;
        let all = self.range.start..self.range.end();
        let removed = self.take_away(&mut state, partition, &all);
        drop(state);
        if removed.inspect_err(|error| complain(partition, *error))? {
            partition.leave_children();
        }
        self.release();
        Ok(())
    }

    /// Lets everything go; no child can reach it any more.
    pub(super) fn release(&self) {
        let mut state = self.state.lock();
        state.gone = true;
        if self.is_pinned() {
            for chunk in state.chunks.values_mut() {
                let mut rest = 0..CHUNK;
                while let Some(run) = chunk.next_run(rest.clone()) {
                    rest.start = run.end;
                    if let Some(pages) = chunk.pages.get_mut(run) {
                        // SAFETY: pinned by `fault`; the caller says that no child reaches them.
                        unsafe { self.let_go(pages, self.range.writable) };
                    }
                }
            }
        }
    }

    /// The kernel takes pages away, or rights to them; see [`hv_root_memory_changes`].
    fn change(&self, addresses: &Range<u64>, may_sleep: bool, note: impl FnOnce()) -> bool {
        let guard = if may_sleep {
            Some(self.state.lock())
        } else {
            self.state.try_lock()
        };
        let Some(mut state) = guard else { return false };
        note();
        if !state.gone {
            // SAFETY: the partition drops its regions before it dies.
            let partition = unsafe { &*self.owner.0 };
            let pages = self.range.pages_at(addresses);
            match self.take_away(&mut state, partition, &pages) {
                Ok(true) => partition.leave_children(),
                Ok(false) => {}
                Err(error) => complain(partition, error),
            }
        }
        true
    }

    /// Calls `each` with every page of `pages` that the child has or has had; see [`super::memory::AccessQuery`].
    pub(super) fn for_each_accessed(
        &self,
        pages: &Range<u64>,
        dirty: bool,
        clear: bool,
        mut each: impl FnMut(u64),
    ) {
        let mut state = self.state.lock();
        let mut next = state
            .chunks
            .cursor_lower_bound_mut(&(pages.start / CHUNK as u64));
        while let Some(mut cursor) = next {
            let (number, chunk) = cursor.current_mut();
            let first = number * CHUNK as u64;
            if first >= pages.end {
                break;
            }
            for page in first.max(pages.start)..(first + CHUNK as u64).min(pages.end) {
                let index = (page - first) as usize;
                if chunk.written.has(index) || !dirty && chunk.has(index) {
                    each(page);
                }
                if clear {
                    let still = chunk.writable.has(index);
                    chunk.written.set(index..index + 1, still);
                }
            }
            next = cursor.move_next();
        }
    }
}

/// The kernel is about to change what is at addresses of a region; called by `shim.c`. Afterwards no child reaches what is
/// there now. False if that would sleep and may not.
#[no_mangle]
extern "C" fn hv_root_memory_changes(
    owner: *mut c_void,
    watch: *mut c_void,
    start: c_ulong,
    end: c_ulong,
    may_sleep: bool,
    sequence: c_ulong,
) -> bool {
    // SAFETY: the owner of a watch is its region, which drops the watch before it dies.
    let region = unsafe { &*owner.cast::<Region>() };
    region.change(&(start..end), may_sleep, || {
        // SAFETY: with what this was called with.
        unsafe { sys::note_change(watch, sequence) }
    })
}

fn complain(partition: &Partition, error: Error) {
    let id = partition.id();
    pr_warn!("partition {}: memory cannot be unmapped: {:?}\n", id, error);
}

/// Whether pages can be one large page.
fn is_large(pages: &[UserPage]) -> bool {
    let first = pages.first().map_or(0, |page| page.pfn());
    pages.len() == CHUNK
        && first % CHUNK as u64 == 0
        && (first..).zip(pages).all(|(pfn, page)| page.pfn() == pfn)
}

/// Maps pages from page `gfn` of the child on, and tells how many, and why it stopped.
fn map_pages(partition: &Partition, gfn: u64, flags: u32, pages: &[UserPage]) -> (usize, Result) {
    let mut done = 0;
    for batch in pages.chunks(BATCH) {
        let mut pfns = [0u64; BATCH];
        for (pfn, page) in pfns.iter_mut().zip(batch) {
            *pfn = page.pfn();
        }
        let (more, result) = map_list(partition, gfn + done as u64, flags, &pfns[..batch.len()]);
        done += more;
        if result.is_err() {
            return (done, result);
        }
    }
    (done, Ok(()))
}

/// Maps the pages, small or large as the flags say, with these numbers. Tells how many, and why it stopped.
fn map_list(partition: &Partition, gfn: u64, flags: u32, pfns: &[u64]) -> (usize, Result) {
    let head = MapGpaPages {
        target_partition_id: partition.id(),
        target_gpa_base: gfn,
        map_flags: flags,
        padding: 0,
    };
    let input = [bytes(&head), bytes(pfns)];
    match partition.rep_once(code::MAP_GPA_PAGES, pfns.len() as u16, input) {
        Ok(answer) if answer.status.is_success() => (pfns.len(), Ok(())),
        Ok(answer) => (
            usize::from(answer.reps).min(pfns.len()),
            errno(answer.status),
        ),
        Err(error) => (0, Err(error)),
    }
}

/// Unmaps pages of the chunk that begins with page `first`. It has them in this size, so that needs no memory.
fn unmap_pages(partition: &Partition, first: u64, run: Range<usize>, large: bool) -> Result {
    let (count, unmap_flags) = if large {
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
    let answer = partition.rep_once(code::UNMAP_GPA_PAGES, count, [bytes(&head), &[]])?;
    match errno(answer.status) {
        // Without a hypervisor nobody has anything.
        Err(ENODEV) => Ok(()),
        result => result,
    }
}
