// SPDX-License-Identifier: GPL-2.0
//! Memory that the root lends to the image: a hypercall that lacks pages says so, the root deposits some and
//! repeats it. They come back when the partition dies.

use kernel::new_mutex;
use kernel::prelude::*;
use kernel::sync::Mutex;

use super::call::{bytes, bytes_mut, errno, rep_control, Answer};
use super::Winhv;
use crate::abi::hypercall::{code, private};
use crate::abi::partition::{PartitionId, WithdrawMemory};
use crate::abi::status::HvStatus;
use crate::sys;

/// Pages deposited at a time.
const CHUNK_ORDER: u32 = 6;
const CHUNK: usize = 1 << CHUNK_ORDER;
/// Deposits during one hypercall: an image that asks for more is wrong.
const DEPOSITS_PER_CALL: usize = 1024;

/// Pages deposited to one partition.
#[pin_data]
pub(crate) struct Pool {
    partition: u64,
    #[pin]
    pages: Mutex<KVVec<u64>>,
}

impl Pool {
    /// An empty pool of partition `partition`.
    pub(crate) fn new(partition: u64) -> impl PinInit<Self> {
        pin_init!(Self { partition, pages <- new_mutex!(KVVec::new()) })
    }

    /// Pages in it.
    pub(crate) fn len(&self) -> usize {
        self.pages.lock().len()
    }

    /// Makes a call until it does not lack memory. `attempt` gets the repetitions done so far.
    pub(crate) fn call(
        &self,
        winhv: &Winhv,
        mut attempt: impl FnMut(u16) -> Result<Answer>,
    ) -> Result<Answer> {
        let mut done = 0;
        for _ in 0..DEPOSITS_PER_CALL {
            let answer = attempt(done)?;
            if answer.status != HvStatus::INSUFFICIENT_MEMORY {
                return Ok(answer);
            }
            done = answer.reps;
            self.deposit(winhv)?;
            sys::reschedule()?;
        }
        pr_warn!(
            "partition {}: the hypervisor asks for memory without end\n",
            self.partition
        );
        Err(ENOMEM)
    }

    /// Lends the image a few pages.
    pub(super) fn deposit(&self, winhv: &Winhv) -> Result {
        let mut pfns = [0u64; CHUNK];
        // One piece keeps the second-level table of the root coarse; single pages will do.
        let count = if sys::alloc_single_pages(CHUNK_ORDER, self.partition, &mut pfns).is_ok() {
            CHUNK
        } else {
            let one = |pfn: &mut u64| {
                sys::alloc_single_pages(0, self.partition, core::slice::from_mut(pfn)).is_ok()
            };
            pfns.iter_mut().map(one).take_while(|got| *got).count()
        };
        if count == 0 {
            return Err(ENOMEM);
        }
        let pfns = &pfns[..count];
        let done = self.hand_over(winhv, pfns);
        let taken = *done.as_ref().unwrap_or(&0);
        for pfn in pfns.iter().skip(taken) {
            // SAFETY: allocated above and not taken by the image.
            unsafe { sys::free_single_page(*pfn) };
        }
        // Other CPUs may still translate the pages for the root.
        winhv.flush();
        if done? == count {
            Ok(())
        } else {
            Err(EIO)
        }
    }

    /// Gives pages to the image and tells how many it took.
    fn hand_over(&self, winhv: &Winhv, pfns: &[u64]) -> Result<usize> {
        let mut pages = self.pages.lock();
        pages.reserve(pfns.len(), GFP_KERNEL)?;
        let head = PartitionId {
            partition_id: self.partition,
        };
        let control = rep_control(code::DEPOSIT_MEMORY, pfns.len() as u16, 0);
        let answer = winhv
            .calls
            .paged(control, [bytes(&head), bytes(pfns)], &mut [])?;
        let taken = if answer.status.is_success() {
            pfns.len()
        } else {
            usize::from(answer.reps)
        };
        let taken = taken.min(pfns.len());
        if !answer.status.is_success() {
            pr_warn!(
                "partition {}: deposit failed, status {:#x}\n",
                self.partition,
                answer.status.0
            );
        }
        for pfn in pfns.iter().take(taken) {
            // There is room: reserved above.
            pages.push(*pfn, GFP_KERNEL)?;
        }
        Ok(taken)
    }

    /// Takes back all that the image no longer uses, and frees it. What it keeps goes to the orphans.
    pub(crate) fn withdraw(&self, winhv: &Winhv) {
        let mut pages = self.pages.lock();
        let mut out = [0u64; 128];
        let control = rep_control(code::WITHDRAW_MEMORY, out.len() as u16, 0);
        let head = WithdrawMemory {
            partition_id: self.partition,
            proximity_domain_info: 0,
        };
        let mut back = 0;
        while back < pages.len() {
            let Ok(answer) = winhv
                .calls
                .paged(control, [bytes(&head), &[]], bytes_mut(&mut out))
            else {
                break;
            };
            for pfn in out.iter().take(usize::from(answer.reps)) {
                if sys::disown_page(*pfn, self.partition) {
                    back += 1;
                } else {
                    pr_warn!(
                        "partition {}: page {:#x} was not deposited\n",
                        self.partition,
                        pfn
                    );
                }
            }
            if !answer.status.is_success() || answer.reps == 0 {
                break;
            }
        }
        if back < pages.len() {
            pr_warn!(
                "partition {}: {} of {} pages stay with the hypervisor\n",
                self.partition,
                pages.len() - back,
                pages.len()
            );
        }
        // Before Linux uses them again, no CPU may believe that they are sealed.
        winhv.flush();
        for pfn in pages.drain_all() {
            if sys::is_own_page(pfn, self.partition) {
                winhv.adopt(pfn);
            } else {
                // SAFETY: deposited by us, given back by the image.
                unsafe { sys::free_single_page(pfn) };
            }
        }
    }
}

/// Drops what this CPU remembers of second-level translations.
pub(super) fn flush_this_cpu(winhv: &Winhv) {
    errno(winhv.calls.fast(private::FLUSH, 0, 0).status).unwrap_or(());
}

impl Pool {
    /// Everything goes to the orphans: the image is gone or will be.
    pub(super) fn abandon(&self, winhv: &Winhv) {
        for page in self.pages.lock().drain_all() {
            winhv.adopt(page);
        }
    }
}
