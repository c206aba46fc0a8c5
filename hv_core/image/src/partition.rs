// SPDX-License-Identifier: GPL-2.0
//! Partitions: creation, memory, deletion.

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use hv_abi::boot::BootInfo;
use hv_abi::hypercall::{EventSignal, PortSet};
use hv_abi::layout::PAGE_SIZE;
use hv_abi::status::HvStatus;
use hv_x86::paging::{PageSize, Translation};

use crate::arch::memory::{Guard, SpinLock};
use crate::arch::object::{Handle, Owned};
use crate::guest_call::VpSet;
use crate::memory::{PagePool, Shared};
use crate::slat::{Page, Slat};
use crate::stimer::Timers;
use crate::synic::Synic;
use crate::vp::{Vp, VpCore};
use crate::vp_state::{PartitionState, VpState};

/// Partitions at a time.
const MAX_PARTITIONS: usize = 256;
/// Pages of a VP: itself, extended state, VMCS or VMCB, CPUID results, messages and event flags that the SynIC holds.
const VP_PAGES: u64 = 6;
/// VPs of a partition.
pub const MAX_VPS: usize = 256;

/// Life of a partition (TLFS 4.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Created: early properties can be set.
    Created,
    /// Initialized: VPs can be made.
    Active,
    /// Finalized: only withdrawal and deletion are left.
    Finalized,
}

/// What the lock of a partition guards.
pub struct Inner {
    /// Where it is in its life.
    pub phase: Phase,
    /// Registers and properties that its VPs share.
    pub state: PartitionState,
    /// Deposited pages that are free.
    pub pool: PagePool,
    /// Its second-level table while it is active.
    slat: Option<Slat>,
}

/// A partition in its page.
pub struct Partition {
    /// TLFS partition identifier.
    pub id: u64,
    /// See [`Inner`].
    pub inner: SpinLock<Inner>,
    /// SPA of the root of its second-level table, 0 after finalization.
    pub slat: AtomicU64,
    /// Incremented when a mapping became stricter: entries with an older one flush first.
    pub generation: AtomicU64,
    /// Incremented when something changed that the results of CPUID depend on.
    pub changes: AtomicU64,
    /// The root changed the reference time and could not reach the reference TSC page: the next VP that runs writes it.
    pub owes_reference_page: AtomicBool,
    /// CPUs that use it at this moment, running VPs included.
    pub users: AtomicU32,
    /// SPA of each VP, 0 for none.
    vps: [AtomicU64; MAX_VPS],
}

const _: () = assert!(size_of::<Partition>() <= 4096);
const _: () = assert!(size_of::<Vp>() <= 4096);

static SHARED: SpinLock<Shared> = SpinLock::new(Shared::new());
/// SPA of the partition in each slot.
static PARTITIONS: [AtomicU64; MAX_PARTITIONS] = [const { AtomicU64::new(0) }; MAX_PARTITIONS];
static CREATED: AtomicU64 = AtomicU64::new(0);

/// A partition in use: it is not deleted before this is dropped.
pub struct InUse(Handle<Partition>);

impl core::ops::Deref for InUse {
    type Target = Partition;
    fn deref(&self) -> &Partition {
        self.0.get()
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.get().users.fetch_sub(1, Ordering::Release);
    }
}

impl InUse {
    /// Its handle.
    pub fn handle(&self) -> Handle<Partition> {
        self.0
    }

    /// Stays in use while a VP of it runs.
    pub fn keep(self) {
        core::mem::forget(self);
    }
}

/// Runs `f` with the shared memory state.
pub fn with_shared<R>(info: &BootInfo, f: impl FnOnce(&mut Shared) -> R) -> R {
    let mut shared = SHARED.lock();
    shared.prepare(info);
    f(&mut shared)
}

/// A new machine: no partition, and the pool as the loader left it.
#[cfg(not(target_os = "none"))]
pub fn forget_all() {
    *SHARED.lock() = Shared::new();
    for slot in &PARTITIONS {
        slot.store(0, Ordering::Relaxed);
    }
}

fn slot_of(id: u64) -> usize {
    (id & 0xff) as usize
}

/// Finds a partition.
pub fn find(id: u64) -> Result<InUse, HvStatus> {
    // The lock keeps a deletion from coming between the look-up and the count.
    let _guard = SHARED.lock();
    let spa = PARTITIONS
        .get(slot_of(id))
        .map_or(0, |slot| slot.load(Ordering::Acquire));
    if spa == 0 {
        return Err(HvStatus::INVALID_PARTITION_ID);
    }
    let handle = Handle::<Partition>::at(spa);
    if handle.get().id != id {
        return Err(HvStatus::INVALID_PARTITION_ID);
    }
    handle.get().users.fetch_add(1, Ordering::Acquire);
    Ok(InUse(handle))
}

/// HvCallCreatePartition: its page comes from the root's pool.
pub fn create(info: &BootInfo, state: PartitionState) -> Result<u64, HvStatus> {
    with_shared(info, |shared| {
        let slot = PARTITIONS
            .iter()
            .enumerate()
            .skip(2)
            .find(|(_, slot)| slot.load(Ordering::Relaxed) == 0)
            .map(|(index, _)| index)
            .ok_or(HvStatus::NO_RESOURCES)?;
        let page = shared.pool.take().ok_or(HvStatus::INSUFFICIENT_MEMORY)?;
        let id = CREATED.fetch_add(1, Ordering::Relaxed) << 8 | slot as u64;
        let partition = Partition {
            id,
            inner: SpinLock::new(Inner {
                phase: Phase::Created,
                state,
                pool: PagePool::new(),
                slat: None,
            }),
            slat: AtomicU64::new(0),
            generation: AtomicU64::new(0),
            changes: AtomicU64::new(0),
            owes_reference_page: AtomicBool::new(false),
            users: AtomicU32::new(0),
            vps: [const { AtomicU64::new(0) }; MAX_VPS],
        };
        let handle = Handle::place(page, partition);
        if let Some(entry) = PARTITIONS.get(slot) {
            entry.store(handle.spa(), Ordering::Release);
        }
        Ok(id)
    })
}

/// HvCallDeletePartition: only when its memory was withdrawn and nobody uses it.
pub fn delete(info: &BootInfo, id: u64) -> Result<(), HvStatus> {
    with_shared(info, |shared| {
        let slot = PARTITIONS
            .get(slot_of(id))
            .ok_or(HvStatus::INVALID_PARTITION_ID)?;
        let spa = slot.load(Ordering::Acquire);
        if spa == 0 {
            return Err(HvStatus::INVALID_PARTITION_ID);
        }
        let partition = Handle::<Partition>::at(spa).get();
        if partition.id != id {
            return Err(HvStatus::INVALID_PARTITION_ID);
        }
        let inner = partition.inner.lock();
        if inner.phase == Phase::Active
            || partition.users.load(Ordering::Acquire) != 0
            || !inner.pool.is_empty()
            || partition.slat.load(Ordering::Relaxed) != 0
        {
            return Err(HvStatus::INVALID_PARTITION_STATE);
        }
        drop(inner);
        slot.store(0, Ordering::Release);
        shared.pool.give(spa);
        Ok(())
    })
}

/// Deposits one page to the root (`partition` is `None`) or to a partition.
pub fn deposit(info: &BootInfo, partition: Option<&Partition>, page: u64) -> Result<(), HvStatus> {
    with_shared(info, |shared| {
        shared.seal(info, page)?;
        if partition.is_none() {
            shared.pool.give(page);
        }
        Ok(())
    })?;
    if let Some(partition) = partition {
        partition.inner.lock().pool.give(page);
    }
    Ok(())
}

/// Withdraws one free page; `None` if there is none.
pub fn withdraw(info: &BootInfo, partition: &Partition) -> Result<Option<u64>, HvStatus> {
    let Some(page) = partition.inner.lock().pool.take_dirty() else {
        return Ok(None);
    };
    with_shared(info, |shared| shared.unseal(info, page))?;
    Ok(Some(page))
}

impl Partition {
    /// HvCallInitializePartition.
    pub fn initialize(&self, info: &BootInfo) -> Result<(), HvStatus> {
        let mut inner = self.inner.lock();
        if inner.phase != Phase::Created {
            return Err(HvStatus::INVALID_PARTITION_STATE);
        }
        let slat = Slat::new(info, &mut inner.pool)?;
        self.slat.store(slat.root(), Ordering::Release);
        inner.slat = Some(slat);
        inner.phase = Phase::Active;
        Ok(())
    }

    /// HvCallFinalizePartition: VPs and tables become free pages again. No VP may run.
    pub fn finalize(&self, info: &BootInfo) -> Result<(), HvStatus> {
        let mut inner = self.inner.lock();
        // One user is the caller.
        if self.users.load(Ordering::Acquire) > 1 {
            return Err(HvStatus::INVALID_PARTITION_STATE);
        }
        inner.phase = Phase::Finalized;
        for vp in &self.vps {
            let spa = vp.swap(0, Ordering::AcqRel);
            if spa != 0 {
                self.free_vp(info, Handle::at(spa), &mut inner.pool);
            }
        }
        self.slat.store(0, Ordering::Release);
        if let Some(slat) = inner.slat.take() {
            slat.destroy(&mut inner.pool);
        }
        // No VP runs and none ever will: nobody walks the tables any more.
        inner.pool.release();
        Ok(())
    }

    fn free_vp(&self, info: &BootInfo, vp: Handle<Vp>, pool: &mut PagePool) {
        if let Some(mut core) = vp.get().core.acquire() {
            for index in 0..core.pages.len() {
                // A page that was shared is in the direct map, so removing it needs no table.
                let _ = Self::set_state_page(info, vp.get(), &mut core, index, 0);
            }
            for page in [core.xsave, core.control, core.overrides] {
                pool.give(page);
            }
            core.keep();
        }
        for page in vp.get().held {
            pool.give(page);
        }
        pool.give(vp.spa());
    }

    /// Gives (or with `page` 0 takes away) state page `index` of a VP.
    pub fn set_state_page(
        info: &BootInfo,
        vp: &Vp,
        core: &mut VpCore,
        index: usize,
        page: u64,
    ) -> Result<(), HvStatus> {
        let slot = core
            .pages
            .get_mut(index)
            .ok_or(HvStatus::INVALID_PARAMETER)?;
        with_shared(info, |shared| {
            if page != 0 {
                if page & (PAGE_SIZE - 1) != 0 || !shared.is_roots(info, page) {
                    return Err(HvStatus::INVALID_PARAMETER);
                }
                shared.share(info, page)?;
            }
            if *slot != 0 && *slot != page {
                shared.unshare(info, *slot)?;
            }
            Ok(())
        })?;
        *slot = page;
        if index == RUN_PAGE {
            vp.run_page.store(page, Ordering::Release);
        }
        Ok(())
    }

    /// HvCallCreateVp.
    pub fn create_vp(
        &self,
        handle: Handle<Self>,
        index: u32,
        make: impl FnOnce(&Inner) -> VpCore,
    ) -> Result<(), HvStatus> {
        let slot = self
            .vps
            .get(index as usize)
            .ok_or(HvStatus::INVALID_VP_INDEX)?;
        let mut inner = self.inner.lock();
        if inner.phase != Phase::Active {
            return Err(HvStatus::INVALID_PARTITION_STATE);
        }
        if slot.load(Ordering::Acquire) != 0 {
            return Err(HvStatus::INVALID_PARAMETER);
        }
        if inner.pool.len() < VP_PAGES {
            return Err(HvStatus::INSUFFICIENT_MEMORY);
        }
        let mut core = make(&inner);
        let pool = &mut inner.pool;
        let mut take = || pool.take().ok_or(HvStatus::INSUFFICIENT_MEMORY);
        let page = take()?;
        core.xsave = take()?;
        core.control = take()?;
        core.overrides = take()?;
        let held = [take()?, take()?];
        // Slot and index in 16 bits; slots begin at 2, so 0 and the root's 1 do not occur.
        core.vpid = (slot_of(self.id) as u16) << 8 | index as u16;
        let addressing = core.apic.addressing();
        let vp = Vp {
            core: Owned::new(core),
            posted: crate::apic::Posted::new(),
            stale: AtomicBool::new(false),
            synic: SpinLock::new(Synic::new()),
            awaited: AtomicU64::new(0),
            held,
            partition: handle,
            index,
            run_page: AtomicU64::new(0),
        };
        vp.posted.publish(addressing);
        inner.state.vps += 1;
        self.changes.fetch_add(1, Ordering::Release);
        slot.store(Handle::place(page, vp).spa(), Ordering::Release);
        Ok(())
    }

    /// HvCallDeleteVp, while nobody but the caller uses the partition: others may hold on to the VP.
    pub fn delete_vp(&self, info: &BootInfo, index: u32) -> Result<(), HvStatus> {
        let slot = self
            .vps
            .get(index as usize)
            .ok_or(HvStatus::INVALID_VP_INDEX)?;
        let mut inner = self.inner.lock();
        let spa = slot.swap(0, Ordering::SeqCst);
        if spa == 0 {
            return Err(HvStatus::INVALID_VP_INDEX);
        }
        // Who comes from here on does not find it any more.
        if self.users.load(Ordering::SeqCst) > 1 {
            slot.store(spa, Ordering::SeqCst);
            return Err(HvStatus::INVALID_PARTITION_STATE);
        }
        self.free_vp(info, Handle::at(spa), &mut inner.pool);
        inner.state.vps = inner.state.vps.saturating_sub(1);
        self.changes.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// The VP with that index.
    pub fn vp(&self, index: u32) -> Result<&'static Vp, HvStatus> {
        match self
            .vps
            .get(index as usize)
            .map_or(0, |vp| vp.load(Ordering::Acquire))
        {
            0 => Err(HvStatus::INVALID_VP_INDEX),
            spa => Ok(Handle::<Vp>::at(spa).get()),
        }
    }

    /// All VPs.
    pub fn vps(&self) -> impl Iterator<Item = &'static Vp> + '_ {
        self.vps
            .iter()
            .map(|vp| vp.load(Ordering::Acquire))
            .filter(|spa| *spa != 0)
            .map(|spa| Handle::<Vp>::at(spa).get())
    }

    /// Maps one page, `HvCallMapGpaPages`.
    pub fn map(&self, info: &BootInfo, gpa: u64, spa: u64, page: Page) -> Result<(), HvStatus> {
        let last = gpa | (page.size.bytes() - 1);
        if last >> info.physical_bits != 0 {
            return Err(HvStatus::INVALID_PARAMETER);
        }
        if !page.size.divides(spa) {
            return Err(HvStatus::INVALID_ALIGNMENT);
        }
        if !with_shared(info, |shared| shared.all_is_roots(info, spa, page.size)) {
            return Err(HvStatus::ACCESS_DENIED);
        }
        let mut inner = self.lock_for_change();
        let (slat, pool) = inner.table()?;
        if slat.map_page(pool, gpa, spa, page)? {
            self.generation.fetch_add(1, Ordering::Release);
        }
        Ok(())
    }

    /// Unmaps one page.
    pub fn unmap(&self, gpa: u64, size: PageSize) -> Result<(), HvStatus> {
        let mut inner = self.lock_for_change();
        let (slat, pool) = inner.table()?;
        slat.unmap_page(pool, gpa, size)?;
        self.generation.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// The lock, to change the second-level table.
    fn lock_for_change(&self) -> Guard<'_, Inner> {
        let mut inner = self.inner.lock();
        // One user is the caller. If there is no other, no CPU walks tables that were unlinked; each flushes before it
        // walks the rest, because the generation changed with them.
        if self.users.load(Ordering::SeqCst) == 1 {
            inner.pool.release();
        }
        inner
    }

    /// What is behind a GPA, if it is mapped.
    pub fn lookup(&self, gpa: u64) -> Option<Translation> {
        self.inner.lock().lookup(gpa)
    }

    /// SPA behind a GPA, if it is mapped with the rights.
    pub fn translate(&self, gpa: u64, write: bool) -> Option<u64> {
        self.inner.lock().translate(gpa, write)
    }
}

impl Inner {
    fn lookup(&self, gpa: u64) -> Option<Translation> {
        let found = self.slat.as_ref()?.lookup(&self.pool, gpa);
        found.filter(|found| found.attributes.read)
    }

    /// SPA behind a GPA, if it is mapped with the rights. It stays so while the lock is held.
    pub fn translate(&self, gpa: u64, write: bool) -> Option<u64> {
        let found = self.lookup(gpa)?;
        (!write || found.attributes.write).then_some(found.spa)
    }

    fn table(&mut self) -> Result<(&mut Slat, &mut PagePool), HvStatus> {
        match &mut self.slat {
            Some(slat) => Ok((slat, &mut self.pool)),
            None => Err(HvStatus::INVALID_PARTITION_STATE),
        }
    }
}

/// Index of the run page in [`VpCore::pages`].
pub const RUN_PAGE: usize = 2;

/// A core before its memory is known.
pub fn new_core(state: VpState, apic: crate::apic::LocalApic) -> VpCore {
    VpCore {
        state,
        apic,
        xsave: 0,
        control: 0,
        pages: [0; 3],
        last_cpu: u32::MAX,
        host_cpu: u32::MAX,
        in_hardware: false,
        dirty: true,
        prepared: false,
        shut_down: false,
        seen_generation: 0,
        told_deadline: u64::MAX,
        exits: 0,
        identified: u64::MAX,
        requeue: (0, 0),
        window_requested: false,
        vpid: 0,
        root_msrs: [0; 5],
        overrides: 0,
        quiet: false,
        left_quickly: false,
        pauses: PortSet::default(),
        paused_with: 0,
        ports: PortSet::default(),
        offered: None,
        iret: None,
        steps: false,
        port: None,
        event: EventSignal::default(),
        logged: false,
        timers: Timers::RESET,
        timers_seen: 0,
        owed: None,
        flushes: VpSet::NONE,
        cpuid: crate::cpuid_cache::CpuidCache::new(),
    }
}

/// Ends a use that [`InUse::keep`] left standing.
pub fn end_use(partition: Handle<Partition>) {
    drop(InUse(partition));
}
