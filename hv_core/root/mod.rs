// SPDX-License-Identifier: GPL-2.0
//! The root's side of partitions (Winhv): typed hypercalls, memory for the image, partitions with their
//! virtual processors, memory regions and interrupt sources.
//!
//! Locks, outermost first: list of partitions, life of a partition, VP, doorbells, connections or interrupt sources,
//! memory, region, pool, orphans. Changes of an address space take only that of a region, so nobody allocates memory or touches user
//! space with it. What interrupts touch (waking a VP, asserting an interrupt) takes none of them.

mod call;
mod doorbell;
mod interrupt;
mod memory;
mod partition;
mod pool;
mod port;
mod region;
mod vp;

use core::ptr;
use core::sync::atomic::{AtomicPtr, Ordering};

use kernel::new_mutex;
use kernel::prelude::*;
use kernel::seq_file::SeqFile;
use kernel::seq_print;
use kernel::sync::Mutex;

use crate::abi::boot::Vendor;
use crate::abi::hypercall::ROOT_PARTITION;
use crate::sys;
use call::Calls;
use pool::Pool;

pub(crate) use doorbell::DoorbellRequest;
pub(crate) use interrupt::{IrqfdRequest, Route, Routes, MAX_ROUTES};
pub(crate) use memory::AccessQuery;
pub(crate) use partition::{Creation, Partition, Passed};
pub(crate) use port::{End, Port, PortOps};
pub(crate) use region::RegionRequest;
pub(crate) use vp::{StateKind, Vp};

/// All that the root has in common for its partitions.
#[pin_data]
pub(crate) struct Winhv {
    calls: Calls,
    /// What the image needs for itself.
    #[pin]
    pool: Pool,
    /// Pages that the image did not give back; they are safe to free once it is gone.
    #[pin]
    orphans: Mutex<KVVec<u64>>,
    /// Each removes itself before it dies.
    #[pin]
    partitions: Mutex<KVec<PartitionLink>>,
}

struct PartitionLink(*const Partition);

// SAFETY: a partition may be used from every thread.
unsafe impl Send for PartitionLink {}

/// The one; null before the start and after the stop.
static WINHV: AtomicPtr<Winhv> = AtomicPtr::new(ptr::null_mut());

/// The root's side, `ENODEV` if there is none. It outlives every file of `/dev/mshv` and the callbacks of the
/// module.
pub(crate) fn winhv() -> Result<&'static Winhv> {
    // SAFETY: set while the module is loaded, to a value that lives until `stop`.
    unsafe { WINHV.load(Ordering::Acquire).as_ref() }.ok_or(ENODEV)
}

/// Makes the root's side, once Linux runs beneath the image.
pub(crate) fn start(vendor: Vendor) -> Result {
    let calls = Calls::new(vendor)?;
    let winhv = KBox::pin_init(
        pin_init!(Winhv {
            calls,
            pool <- Pool::new(ROOT_PARTITION),
            orphans <- new_mutex!(KVVec::new()),
            partitions <- new_mutex!(KVec::new()),
        }),
        GFP_KERNEL,
    )?;
    // SAFETY: it is not moved while it is shared, nor by `stop`.
    let winhv = KBox::into_raw(unsafe { Pin::into_inner_unchecked(winhv) });
    WINHV.store(winhv, Ordering::Release);
    Ok(())
}

/// Ends it, after every CPU left the image and the last file was closed: frees what the image still had.
pub(crate) fn stop() {
    let winhv = WINHV.swap(ptr::null_mut(), Ordering::AcqRel);
    if winhv.is_null() {
        return;
    }
    // SAFETY: made by `start`; nobody uses it any more.
    let winhv = unsafe { KBox::from_raw(winhv) };
    winhv.pool.abandon(&winhv);
    for pfn in winhv.orphans.lock().iter() {
        // SAFETY: allocated by a pool; the image that had it is gone from every CPU.
        unsafe { sys::free_single_page(*pfn) };
    }
}

/// This CPU goes offline: no VP may leave anything in it.
pub(crate) fn cpu_offline(cpu: u32) {
    let Ok(winhv) = winhv() else { return };
    for partition in winhv.partitions.lock().iter() {
        // SAFETY: it is in the list, whose lock we hold.
        unsafe { (*partition.0).detach_from(cpu) };
    }
}

/// Prints the list of partitions as the elements of a JSON array.
pub(crate) fn print_partitions(seq: &SeqFile) {
    let Ok(winhv) = winhv() else { return };
    let mut comma = "";
    for partition in winhv.partitions.lock().iter() {
        seq_print!(seq, "{}", comma);
        comma = ",";
        // SAFETY: it is in the list, whose lock we hold.
        unsafe { (*partition.0).print(seq) };
    }
}

impl Winhv {
    /// Makes every CPU forget second-level translations, of the root and of children; a child that runs
    /// leaves for it.
    fn flush(&self) {
        sys::call_on_each_cpu(|| pool::flush_this_cpu(self));
    }

    /// Keeps a page that cannot be freed yet.
    fn adopt(&self, pfn: u64) {
        if self.orphans.lock().push(pfn, GFP_KERNEL).is_err() {
            pr_warn!("page {:#x} is lost\n", pfn);
        }
    }

    fn enlist(&self, partition: &Partition) -> Result {
        self.partitions
            .lock()
            .push(PartitionLink(partition), GFP_KERNEL)?;
        Ok(())
    }

    /// Does `f` with the partition of that number, which does not die meanwhile; `ENOENT` if there is none.
    fn with_partition<R>(&self, id: u64, f: impl FnOnce(&Partition) -> Result<R>) -> Result<R> {
        let partitions = self.partitions.lock();
        for partition in partitions.iter() {
            // SAFETY: it is in the list, whose lock we hold.
            let partition = unsafe { &*partition.0 };
            if partition.id() == id {
                return f(partition);
            }
        }
        Err(ENOENT)
    }

    fn delist(&self, partition: &Partition) {
        self.partitions
            .lock()
            .retain(|link| !ptr::eq(link.0, partition));
    }
}
