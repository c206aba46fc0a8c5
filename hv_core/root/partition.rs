// SPDX-License-Identifier: GPL-2.0
//! A partition: its life in the image, its virtual processors, and everything that hangs on it.

use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};

use kernel::mm::Mm;
use kernel::prelude::*;
use kernel::seq_file::SeqFile;
use kernel::seq_print;
use kernel::sync::aref::ARef;
use kernel::sync::{Arc, Mutex, SpinLock};
use kernel::transmute::{AsBytes, FromBytes};
use kernel::{new_mutex, new_spinlock};

use super::call::{errno, rep_control, Answer, Instruction};
use super::doorbell::{Doorbells, QuickBells};
use super::interrupt::Interrupts;
use super::memory::{AccessQuery, Memory, Sizes};
use super::pool::Pool;
use super::port::Connections;
use super::region::{Region, RegionRequest};
use super::vp::{property_input, Vp};
use super::Winhv;
use crate::abi::hypercall::{code, Control};
use crate::abi::partition::{
    creation, property, CreatePartition, CreateVp, DeleteVp, PartitionId, COMPATIBILITY_VERSION,
};
use crate::abi::status::HvStatus;
use crate::sys::{self, Pages};

/// Largest number of VPs.
pub(crate) const MAX_VPS: usize = 256;

/// Life of a partition.
struct Life {
    initialized: bool,
}

/// A partition. It dies with its last reference: that of its file or of a file of one of its VPs.
#[pin_data(PinnedDrop)]
pub(crate) struct Partition {
    id: u64,
    winhv: &'static Winhv,
    /// Address space that its memory comes from.
    mm: ARef<Mm>,
    #[pin]
    pub(super) pool: Pool,
    #[pin]
    life: Mutex<Life>,
    #[pin]
    pub(super) memory: Mutex<Memory>,
    pub(super) sizes: Sizes,
    #[pin]
    pub(super) doorbells: SpinLock<Doorbells>,
    pub(super) quick_doorbells: QuickBells,
    /// A [`PortSet`](crate::abi::hypercall::PortSet): those of the doorbells. Written with their lock held.
    pub(super) ports: AtomicU64,
    #[pin]
    pub(super) interrupts: Mutex<Interrupts>,
    #[pin]
    pub(super) connections: Mutex<Connections>,
    /// Owned; each is set once.
    vps: KVec<AtomicPtr<Vp>>,
    /// One more than the highest VP number.
    vp_limit: AtomicU32,
    /// Property GPA_PAGE_ACCESS_TRACKING.
    tracks_access: AtomicBool,
}

/// What creation asks of the image.
#[derive(Clone, Copy, Default)]
pub(crate) struct Creation {
    /// TLFS creation flags beyond those that every partition has.
    pub(crate) flags: u64,
    /// Processor features the partition shall not have.
    pub(crate) disabled_features: [u64; 2],
    /// XSAVE features the partition shall not have.
    pub(crate) disabled_xsave: u64,
}

/// What a hypercall that was passed through gave.
pub(crate) struct Passed {
    /// Its status.
    pub(crate) status: HvStatus,
    /// Repetitions completed.
    pub(crate) reps: u16,
    /// The errno for the client.
    pub(crate) result: Result,
}

/// Passes a hypercall of a client through; `pages` holds input and output. The caller checked the code and wrote
/// the target into the input.
fn pass(winhv: &Winhv, pool: &Pool, code: u16, reps: u16, pages: &Pages) -> Passed {
    let (input, output) = (pages.spa(), pages.spa() + 4096);
    let mut last = Answer {
        status: HvStatus::SUCCESS,
        reps: 0,
        value: 0,
    };
    let result = pool.call(winhv, |done| {
        let control = if reps == 0 {
            Control::simple(code, false).0
        } else {
            rep_control(code, reps, done)
        };
        last = winhv.calls.whole(control, input, output);
        Ok(last)
    });
    let result = result.and_then(|answer| errno(answer.status));
    Passed {
        status: last.status,
        reps: if reps == 0 { 0 } else { last.reps },
        result,
    }
}

impl Winhv {
    /// Passes a hypercall through whose target is the root itself.
    pub(crate) fn pass(&self, code: u16, reps: u16, pages: &Pages) -> Passed {
        pass(self, &self.pool, code, reps, pages)
    }
}

impl Partition {
    /// Creates one whose memory comes from the current process.
    pub(crate) fn create(winhv: &'static Winhv, wanted: Creation) -> Result<Arc<Self>> {
        let mm: ARef<Mm> = {
            let current = current!();
            let mm: &Mm = current.mm().ok_or(EINVAL)?;
            mm.into()
        };
        let input = CreatePartition {
            flags: creation::EXO_PARTITION
                | creation::INTERCEPT_MESSAGE_PAGE_ENABLED
                | wanted.flags,
            compatibility_version: COMPATIBILITY_VERSION,
            disabled_processor_features: wanted.disabled_features,
            disabled_xsave_features: wanted.disabled_xsave,
            ..Default::default()
        };
        let mut vps = KVec::with_capacity(MAX_VPS, GFP_KERNEL)?;
        for _ in 0..MAX_VPS {
            vps.push(AtomicPtr::new(ptr::null_mut()), GFP_KERNEL)?;
        }
        let mut id = 0u64;
        let answer = winhv.pool.call(winhv, |_| {
            winhv.calls.simple(code::CREATE_PARTITION, &input, &mut id)
        })?;
        errno(answer.status)?;
        let new = Arc::pin_init(
            try_pin_init!(Self {
                id,
                winhv,
                mm,
                pool <- Pool::new(*id),
                life <- new_mutex!(Life { initialized: false }),
                memory <- new_mutex!(Memory::new()),
                sizes: Sizes::default(),
                doorbells <- new_spinlock!(Doorbells::new()),
                quick_doorbells: QuickBells::new()?,
                ports: AtomicU64::new(0),
                interrupts <- new_mutex!(Interrupts::new()),
                connections <- new_mutex!(Connections::new()),
                vps,
                vp_limit: AtomicU32::new(0),
                tracks_access: AtomicBool::new(false),
            }? Error),
            GFP_KERNEL,
        )
        .inspect_err(|_| delete_in_image(winhv, id))?;
        winhv.enlist(&new)?;
        Ok(new)
    }

    /// Its number.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// Memory is looked up in the address space of the creator; no other may drive the partition.
    pub(super) fn check_caller(&self) -> Result {
        let same = current!()
            .mm()
            .is_some_and(|mm| ptr::eq(mm.as_raw(), self.mm.as_raw()));
        if same {
            Ok(())
        } else {
            Err(EIO)
        }
    }

    /// Makes it ready for VPs. Once is enough.
    pub(crate) fn initialize(&self) -> Result {
        let mut life = self.life.lock();
        if !life.initialized {
            let input = PartitionId {
                partition_id: self.id,
            };
            errno(
                self.simple(code::INITIALIZE_PARTITION, &input, &mut [0u8; 0])?
                    .status,
            )?;
            life.initialized = true;
        }
        Ok(())
    }

    /// Creates VP `index`, or finds the one whose file could not be made, and gives it to `open`.
    pub(crate) fn create_vp(
        &self,
        index: u32,
        open: impl FnOnce(&Vp) -> Result<i32>,
    ) -> Result<i32> {
        let slot = self.vps.get(index as usize).ok_or(EINVAL)?;
        let _life = self.life.lock();
        if slot.load(Ordering::Acquire).is_null() {
            let vp = Vp::create(self, index)?;
            // SAFETY: it is not moved until the partition dies and frees it.
            let vp = KBox::into_raw(unsafe { Pin::into_inner_unchecked(vp) });
            slot.store(vp, Ordering::Release);
            self.vp_limit.fetch_max(index + 1, Ordering::AcqRel);
        }
        let vp = self.vp(index).ok_or(EIO)?;
        if !vp.open() {
            return Err(EEXIST);
        }
        open(vp).inspect_err(|_| vp.unopen())
    }

    /// VP `index`.
    pub(super) fn vp(&self, index: u32) -> Option<&Vp> {
        // SAFETY: a VP in the table lives as long as the partition.
        unsafe {
            self.vps
                .get(index as usize)?
                .load(Ordering::Acquire)
                .as_ref()
        }
    }

    fn all_vps(&self) -> impl Iterator<Item = &Vp> {
        (0..self.vp_limit.load(Ordering::Acquire)).filter_map(|index| self.vp(index))
    }

    /// Makes the VPs be dispatched for which the image left something. Any context.
    pub(super) fn scan_signals(&self) {
        for vp in self.all_vps().filter(|vp| vp.take_signal()) {
            vp.kick();
        }
    }

    pub(super) fn detach_from(&self, cpu: u32) {
        for vp in self.all_vps() {
            vp.detach_from(self, cpu);
        }
    }

    /// What a dispatch says of the ports of the doorbells.
    pub(super) fn ports(&self) -> u64 {
        self.ports.load(Ordering::Relaxed)
    }

    /// How the image is called.
    pub(super) fn instruction(&self) -> Instruction {
        self.winhv.calls.instruction()
    }

    /// A fast call about a VP of the partition.
    pub(super) fn fast(&self, code: u16, second: u64) -> Answer {
        self.winhv.calls.fast(code, self.id, second)
    }

    /// A call through the pages of this CPU, once, in any context.
    pub(super) fn paged_once(&self, control: u64, input: &[u8]) -> Result<Answer> {
        self.winhv.calls.paged(control, [input, &[]], &mut [])
    }

    /// A simple call, repeated while it lacks memory.
    pub(super) fn simple<I: AsBytes, O: AsBytes + FromBytes>(
        &self,
        code: u16,
        input: &I,
        output: &mut O,
    ) -> Result<Answer> {
        self.pool
            .call(self.winhv, |_| self.winhv.calls.simple(code, input, output))
    }

    /// A call with this control word, repeated while it lacks memory.
    pub(super) fn paged(
        &self,
        control: u64,
        input: [&[u8]; 2],
        output: &mut [u8],
    ) -> Result<Answer> {
        self.pool.call(self.winhv, |_| {
            self.winhv.calls.paged(control, input, output)
        })
    }

    /// A rep call, continued while it lacks memory.
    pub(super) fn rep(
        &self,
        code: u16,
        count: u16,
        input: [&[u8]; 2],
        output: &mut [u8],
    ) -> Result<Answer> {
        self.pool.call(self.winhv, |done| {
            self.winhv
                .calls
                .paged(rep_control(code, count, done), input, output)
        })
    }

    /// One attempt at a rep call that returns nothing, in any context.
    pub(super) fn rep_once(&self, code: u16, count: u16, input: [&[u8]; 2]) -> Result<Answer> {
        let control = rep_control(code, count, 0);
        self.winhv.calls.paged(control, input, &mut [])
    }

    /// Lends the image some memory.
    pub(super) fn deposit(&self) -> Result {
        self.pool.deposit(self.winhv)
    }

    /// Waits until every CPU has left its child and the image. What was unmapped before is out of reach then: a VP
    /// forgets its translations before it runs again, because the image counts changes to the tables.
    pub(super) fn leave_children(&self) {
        sys::call_on_each_cpu(|| ());
    }

    /// A property.
    pub(super) fn property(&self, number: u32) -> Result<u64> {
        let mut value = 0u64;
        let input = property_input(self.id, number);
        errno(
            self.simple(code::GET_PARTITION_PROPERTY, &input, &mut value)?
                .status,
        )?;
        Ok(value)
    }

    /// Passes a hypercall through whose input names this partition; see [`pass`]. Takes note of what it means
    /// for the root.
    pub(crate) fn pass(&self, code: u16, reps: u16, pages: &Pages) -> Passed {
        let mut passed = pass(self.winhv, &self.pool, code, reps, pages);
        while code == code::TRANSLATE_VIRTUAL_ADDRESS && passed.result.is_ok() {
            // SAFETY: as in `property_set`.
            let [_, index] = unsafe { pages.address().cast::<[u64; 2]>().read() };
            match self.vp(index as u32).map(|vp| vp.provide_missing(self)) {
                Some(Ok(true)) => passed = pass(self.winhv, &self.pool, code, reps, pages),
                Some(Err(error)) => passed.result = Err(error),
                Some(Ok(false)) | None => break,
            }
        }
        if passed.result.is_ok() {
            match code {
                code::SET_PARTITION_PROPERTY => self.property_set(pages),
                code::GET_VP_REGISTERS | code::GET_PARTITION_PROPERTY => {}
                // An interrupt, a start-up, whatever wakes a VP.
                _ => self.scan_signals(),
            }
        }
        passed
    }

    fn property_set(&self, pages: &Pages) {
        // SAFETY: the input page is ours, aligned, and nobody writes to it.
        let [_, code, value] = unsafe { pages.address().cast::<[u64; 3]>().read() };
        if code as u32 == property::GPA_PAGE_ACCESS_TRACKING {
            self.tracks_access.store(value != 0, Ordering::Release);
        }
        self.scan_signals();
    }

    /// The same on the partition's own file: no other change of the partition goes on meanwhile.
    pub(crate) fn pass_exclusively(&self, code: u16, reps: u16, pages: &Pages) -> Passed {
        let _life = self.life.lock();
        self.pass(code, reps, pages)
    }

    /// Makes a region of the caller's memory guest memory. Nothing is mapped before the guest asks for it.
    pub(crate) fn map(&self, request: RegionRequest) -> Result {
        let _life = self.life.lock();
        self.check_caller()?;
        let current = current!();
        request.check_source(current.mm().ok_or(EINVAL)?)?;
        self.memory.lock().check_free(&request)?;
        // No other region comes meanwhile, and a change of the address space must not wait for it.
        let region = Region::new(self, request)?;
        self.memory.lock().add(self, region)
    }

    /// Takes a region away again: afterwards no VP can reach it.
    pub(crate) fn unmap(&self, request: &RegionRequest) -> Result {
        let _life = self.life.lock();
        self.check_caller()?;
        let region = self.memory.lock().remove(self, request)?;
        region.remove(self)
    }

    /// Accessed or dirty states; see [`AccessQuery`].
    pub(crate) fn access_bitmap(
        &self,
        query: AccessQuery,
        write: impl FnMut(&[u8]) -> Result,
    ) -> Result {
        let _life = self.life.lock();
        self.check_caller()?;
        query.run(self, self.tracks_access.load(Ordering::Acquire), write)
    }

    pub(super) fn create_vp_in_image(&self, index: u32) -> Result {
        let input = CreateVp {
            partition_id: self.id,
            vp_index: index,
            ..Default::default()
        };
        errno(self.simple(code::CREATE_VP, &input, &mut [0u8; 0])?.status)
    }

    pub(super) fn delete_vp_in_image(&self, index: u32) {
        let input = DeleteVp {
            partition_id: self.id,
            vp_index: index,
            reserved: 0,
        };
        let answer = self.simple(code::DELETE_VP, &input, &mut [0u8; 0]);
        if let Err(error) = answer.and_then(|answer| errno(answer.status)) {
            pr_warn!(
                "partition {}: VP {} cannot be deleted: {:?}\n",
                self.id,
                index,
                error
            );
        }
    }

    /// Prints it as a JSON object.
    pub(super) fn print(&self, seq: &SeqFile) {
        seq_print!(seq, "{{\"id\":{},\"vps\":[", self.id);
        let mut comma = "";
        for vp in self.all_vps() {
            seq_print!(seq, "{}", comma);
            comma = ",";
            vp.print(seq);
        }
        seq_print!(
            seq,
            "],\"regions\":{},\"region_pages\":{},\"mapped_pages\":{},\"large_pages\":{},\"deposited_pages\":{}}}",
            self.sizes.regions.load(Ordering::Relaxed),
            self.sizes.pages.load(Ordering::Relaxed),
            self.sizes.mapped.load(Ordering::Relaxed),
            self.sizes.large.load(Ordering::Relaxed),
            self.pool.len()
        );
    }
}

fn delete_in_image(winhv: &Winhv, id: u64) {
    let input = PartitionId { partition_id: id };
    let answer = winhv
        .calls
        .simple(code::DELETE_PARTITION, &input, &mut [0u8; 0]);
    match answer.and_then(|answer| errno(answer.status)) {
        Ok(()) | Err(ENODEV) => {}
        Err(error) => pr_warn!("partition {}: cannot be deleted: {:?}\n", id, error),
    }
}

#[pinned_drop]
impl PinnedDrop for Partition {
    fn drop(self: Pin<&mut Self>) {
        let this: &Self = &self;
        // Nobody can run a VP any more; what may still call us are events.
        this.interrupts.lock().clear();
        for vp in this.all_vps() {
            vp.detach_for_good(this);
        }
        this.winhv.delist(this);
        this.close_connections();
        // No VP can be dispatched: nothing reaches guest memory. From here on nobody asks us to unmap any.
        this.memory.lock().release();
        if this.life.lock().initialized {
            let input = PartitionId {
                partition_id: this.id,
            };
            let answer = this.simple(code::FINALIZE_PARTITION, &input, &mut [0u8; 0]);
            match answer.and_then(|answer| errno(answer.status)) {
                Ok(()) | Err(ENODEV) => {}
                Err(error) => pr_warn!("partition {}: cannot be finalized: {:?}\n", this.id, error),
            }
        }
        this.pool.withdraw(this.winhv);
        delete_in_image(this.winhv, this.id);
        for slot in this.vps.iter() {
            let vp = slot.swap(ptr::null_mut(), Ordering::AcqRel);
            if !vp.is_null() {
                // SAFETY: made by `create_vp`; the image has forgotten it.
                drop(unsafe { KBox::from_raw(vp) });
            }
        }
    }
}
