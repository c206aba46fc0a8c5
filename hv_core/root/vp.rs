// SPDX-License-Identifier: GPL-2.0
//! A virtual processor as the root sees it: the thread that dispatches it, and how others reach that thread.
//!
//! ```text
//!   dispatch ──► Interrupt, Signal, Deadline: dispatch again
//!      ▲    ──► Halted, WaitForSipi: sleep until kicked or the deadline, dispatch again
//!      │    ──► Intercept: memory, doorbells and resampling are finished here, the rest goes to the VMM
//! ```
//!
//! A run ends after [`RUN_BOUND`] with `EINTR` in any case, because clients rely on that. It is the time in which
//! the VP runs or sleeps: a machine that is slow or busy elsewhere does not keep it from getting anywhere.

use core::sync::atomic::{fence, AtomicBool, AtomicU32, AtomicU64, Ordering};

use kernel::new_mutex;
use kernel::prelude::*;
use kernel::seq_file::SeqFile;
use kernel::seq_print;
use kernel::sync::Mutex;

use super::call::{bytes, bytes_mut, errno, variable_control, Answer};
use super::memory::Fault;
use super::partition::Partition;
use crate::abi::hypercall::{
    code, private, state_page, DispatchEvent, EventSignal, PortWrite, VpRunPage, MAY_PAUSE,
};
use crate::abi::partition::{
    access, message, vp_state, GetPartitionProperty, MapVpStatePage, VpState,
};
use crate::abi::partition::{property, VpRegisters};
use crate::abi::status::HvStatus;
use crate::sys::{self, Alarm, FpuOff, IrqsOff, Pages, RescheduleFlag};

/// Nanoseconds after which a run goes back to user space.
const RUN_BOUND: u64 = 50_000_000;
/// Nanoseconds between two dispatches from which on they do not count as part of the run.
const PAUSE: u64 = 1_000_000;
/// No CPU.
const NOWHERE: u32 = u32::MAX;
/// Largest state that goes by page number.
const STATE_PAGES: usize = 16;

/// One message of a VP.
pub(crate) type Message = [u64; message::WORDS];

/// A message that a VP posted: `HV_INPUT_POST_MESSAGE`.
pub(super) type Posted = [u64; 32];

/// A virtual processor. Its memory lives as long as its partition.
#[pin_data]
pub(crate) struct Vp {
    index: u32,
    /// Held for the whole of each operation on the VP.
    #[pin]
    busy: Mutex<Busy>,
    alarm: Alarm,
    registers: Pages,
    message: Pages,
    run: Pages,
    /// CPU on which the image may still hold state of it.
    last_cpu: AtomicU32,
    /// CPU on which it runs now. Set and cleared with interrupts off.
    running_cpu: AtomicU32,
    /// Somebody wants it dispatched (again).
    kicked: AtomicBool,
    /// A file was given out for it.
    opened: AtomicBool,
    dispatches: AtomicU64,
    intercepts: AtomicU64,
}

/// What belongs to the thread that works on the VP.
struct Busy {
    armed: Armed,
    /// Copy of the last message that may be finished here, out of reach of user space.
    message: Message,
}

/// What the alarm was last set to.
#[derive(Clone, Copy)]
struct Armed {
    /// The VP's deadline that went into it.
    deadline: u64,
    /// CPU whose timer it is.
    cpu: u32,
}

impl Vp {
    /// Creates VP `index` in the image, with the pages that both share.
    pub(super) fn create(partition: &Partition, index: u32) -> Result<Pin<KBox<Self>>> {
        let this = KBox::pin_init(
            try_pin_init!(Self {
                index,
                busy <- new_mutex!(Busy {
                    armed: Armed { deadline: 0, cpu: NOWHERE },
                    message: [0; message::WORDS],
                }),
                alarm: Alarm::new()?,
                registers: Pages::new(0)?,
                message: Pages::new(0)?,
                run: Pages::new(0)?,
                last_cpu: AtomicU32::new(NOWHERE),
                running_cpu: AtomicU32::new(NOWHERE),
                kicked: AtomicBool::new(false),
                opened: AtomicBool::new(false),
                dispatches: AtomicU64::new(0),
                intercepts: AtomicU64::new(0),
            }? Error),
            GFP_KERNEL,
        )?;
        partition.create_vp_in_image(index)?;
        let pages = [
            (state_page::REGISTERS, &this.registers),
            (state_page::INTERCEPT_MESSAGE, &this.message),
            (state_page::RUN, &this.run),
        ];
        for (page_type, page) in pages {
            let input = MapVpStatePage {
                partition_id: partition.id(),
                vp_index: index,
                page_type,
                input_vtl: 0,
                flags: 1,
                requested_map_location: page.spa() >> 12,
            };
            let mapped = partition.simple(code::MAP_VP_STATE_PAGE, &input, &mut 0u64);
            if let Err(error) = mapped.and_then(|answer| errno(answer.status)) {
                // The image must not keep pages that go away.
                partition.delete_vp_in_image(index);
                return Err(error);
            }
        }
        Ok(this)
    }

    /// True the first time.
    pub(super) fn open(&self) -> bool {
        !self.opened.swap(true, Ordering::AcqRel)
    }

    /// The file could not be made.
    pub(super) fn unopen(&self) {
        self.opened.store(false, Ordering::Release);
    }

    /// The page that user space may map at page offset `number`.
    pub(crate) fn user_page(&self, number: usize) -> Result<*mut u8> {
        match number {
            0 => Ok(self.registers.address()),
            1 => Ok(self.message.address()),
            // GHCB.
            2 => Err(ENODEV),
            _ => Err(EINVAL),
        }
    }

    fn run_page(&self) -> &VpRunPage {
        // SAFETY: a page of ours, zeroed at first, that consists of atomics and lives as long as `self`.
        unsafe { &*self.run.address().cast() }
    }

    /// Swaps the signal that the image left for this VP.
    pub(super) fn take_signal(&self) -> bool {
        self.run_page().signal.swap(0, Ordering::AcqRel) != 0
    }

    /// Makes it be dispatched (again) soon: its thread wakes up, or it leaves its CPU. Any context.
    pub(super) fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.alarm.wake();
        fence(Ordering::SeqCst);
        let cpu = self.running_cpu.load(Ordering::SeqCst);
        if cpu != NOWHERE {
            sys::interrupt_cpu(cpu);
        }
    }

    /// Does `call` while nobody else runs or changes the VP.
    pub(crate) fn exclusively<R>(&self, call: impl FnOnce() -> R) -> R {
        let _busy = self.busy.lock();
        call()
    }

    /// Runs it until it has a message for the VMM, which is written to `address` in user space. `EINTR` when a signal waits or
    /// after a while.
    pub(crate) fn run(&self, partition: &Partition, address: usize) -> Result {
        let mut busy = self.busy.lock();
        let busy = &mut *busy;
        partition.check_caller()?;
        let result = self.run_until(partition, &mut busy.armed, &mut busy.message);
        sys::guest_mode_end();
        if result.as_ref().err() == Some(&EINTR) {
            // No message, but the register page says what is.
            self.show(partition)?;
        }
        let message = match result? {
            Place::Copy => busy.message.as_ptr(),
            Place::Page => self.message.address().cast(),
        };
        // SAFETY: both are longer than a message and live as long as `busy` is locked. User space may write to the page
        // meanwhile: nobody here looks at what comes of it.
        unsafe { sys::write_message(address, message) }
    }

    fn run_until(
        &self,
        partition: &Partition,
        armed: &mut Armed,
        message: &mut Message,
    ) -> Result<Place> {
        // Known from the first time on that anybody asks. Until then an alarm that was set for an earlier run goes off earlier.
        let mut bound = None;
        // When the VP stopped, if it was dispatched yet.
        let mut stopped = None;
        // Length of the instruction that the last message was about and that was completed here.
        let mut step = 0;
        loop {
            // With a step to be made the VP is dispatched in any case: nobody may see it before the instruction.
            if step != 0 {
                let _ = sys::reschedule();
            } else {
                sys::guest_mode_work()?;
                if let Some(stopped) = stopped {
                    let now = sys::time();
                    let pause = now.saturating_sub(stopped);
                    let end = run_end(&mut bound);
                    if pause > PAUSE {
                        *end = end.saturating_add(pause);
                    }
                    if now >= *end {
                        return Err(EINTR);
                    }
                }
            }
            let (event, value, left) = self.dispatch(partition, &mut bound, armed, step)?;
            step = left;
            match event {
                DispatchEvent::Halted | DispatchEvent::WaitForSipi => {
                    self.sleep(&mut bound, armed)?;
                }
                DispatchEvent::Signal => partition.scan_signals(),
                DispatchEvent::Missing => {
                    self.provide_missing(partition)?;
                }
                DispatchEvent::Intercept => {
                    self.intercepts.fetch_add(1, Ordering::Relaxed);
                    self.copy_message(message);
                    match self.finish_intercept(partition, message)? {
                        Some(length) => step = length,
                        None => {
                            self.show(partition)?;
                            return Ok(Place::Copy);
                        }
                    }
                }
                // No doorbell.
                DispatchEvent::PortWrite => {
                    self.intercepts.fetch_add(1, Ordering::Relaxed);
                    self.show(partition)?;
                    return Ok(Place::Page);
                }
                DispatchEvent::Message => {
                    self.intercepts.fetch_add(1, Ordering::Relaxed);
                    return Ok(Place::Page);
                }
                DispatchEvent::SignalEvent => {
                    let event = EventSignal::from_value(value).ok_or(EIO)?;
                    self.end_call(partition, partition.signalled(self.index, event))?;
                }
                DispatchEvent::PostMessage => {
                    let status = partition.posted(self.index, &self.posted());
                    self.end_call(partition, status)?;
                }
                DispatchEvent::Interrupt
                | DispatchEvent::Deadline
                | DispatchEvent::MachineCheck => {}
            }
            stopped = Some(sys::time());
            run_end(&mut bound);
        }
    }

    /// The message that the VP posted.
    fn posted(&self) -> Posted {
        let page = self.message.address().cast::<u64>();
        core::array::from_fn(|index| {
            // SAFETY: the page lives as long as `self` and is longer. User space may write to it meanwhile, so each word is read
            // once.
            unsafe { page.add(index).read_volatile() }
        })
    }

    /// The hypercall with which the VP left has this status.
    fn end_call(&self, partition: &Partition, status: HvStatus) -> Result {
        if status.is_success() {
            return Ok(());
        }
        let second = u64::from(self.index) | u64::from(status.0) << 32;
        errno(partition.fast(private::FAIL_CALL, second).status)
    }

    /// Gets the page of guest memory that the image asked for, or says that there is none. False if it asked for nothing:
    /// otherwise what it was to do has to be repeated.
    pub(super) fn provide_missing(&self, partition: &Partition) -> Result<bool> {
        let page = self.run_page();
        let wanted = page.missing.swap(0, Ordering::AcqRel);
        if wanted == 0 {
            return Ok(false);
        }
        let kind = if wanted & 1 != 0 {
            access::WRITE
        } else {
            access::READ
        };
        if partition.fault(wanted >> 12, kind)? != Fault::Mapped {
            page.refused.store(wanted, Ordering::Release);
        }
        Ok(true)
    }

    /// Has the image fill the pages that the VMM sees.
    fn show(&self, partition: &Partition) -> Result {
        errno(
            partition
                .fast(private::SHOW_REGISTERS, u64::from(self.index))
                .status,
        )
    }

    /// Dispatches it on the CPU this happens to run on until there is more to do than to ring doorbells. Besides the event,
    /// the length of an instruction that is still to be stepped over.
    fn dispatch(
        &self,
        partition: &Partition,
        bound: &mut Option<u64>,
        armed: &mut Armed,
        step: u8,
    ) -> Result<(DispatchEvent, u64, u8)> {
        let at = |step: u8| u64::from(self.index) | u64::from(step) << 32 | partition.ports();
        let mut left = 0;
        let answer = loop {
            // From here on an interrupt, so a kick too, waits and ends the run of the child at once.
            let irqs = IrqsOff::new();
            let cpu = sys::this_cpu();
            let last = self.last_cpu.load(Ordering::Relaxed);
            if last != cpu {
                if last != NOWHERE {
                    drop(irqs);
                    self.detach(partition);
                    continue;
                }
                self.last_cpu.store(cpu, Ordering::Relaxed);
            }
            self.running_cpu.store(cpu, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            self.kicked.store(false, Ordering::SeqCst);
            self.set_alarm(cpu, bound, armed);
            // A doorbell is rung without enabling interrupts: one that came ends the next run at once. From the second on, the VP
            // is only paused: it keeps the registers of the FPU, which Linux puts into memory once. Breakpoints of the kernel
            // are looked at by the image. What else stays the VP's, only user space needs.
            let mut answer = partition.fast(code::DISPATCH_VP, at(step));
            let (mut fpu, mut rung) = (None, false);
            while let Some(write) = PortWrite::from_value(answer.value) {
                rung = rung || partition.ring_port_doorbell(write);
                if rung && !sys::must_reschedule() {
                    fpu.get_or_insert_with(|| FpuOff::new(&irqs));
                    let second = at(write.length) | MAY_PAUSE;
                    (answer, rung) = resume(partition, second, &irqs);
                    continue;
                }
                if fpu.is_some() {
                    // Nothing but doorbells is rung during a pause.
                    self.detach_here(partition);
                }
                if rung {
                    left = write.length;
                    answer.value = DispatchEvent::Interrupt as u64;
                }
                break;
            }
            drop(fpu);
            self.running_cpu.store(NOWHERE, Ordering::SeqCst);
            if answer.value == DispatchEvent::MachineCheck as u64 {
                sys::machine_check(&irqs);
            }
            drop(irqs);
            break answer;
        };
        self.dispatches.fetch_add(1, Ordering::Relaxed);
        errno(answer.status)?;
        let event = DispatchEvent::from_value(answer.value).ok_or(EIO)?;
        Ok((event, answer.value, left))
    }

    /// Makes sure that the alarm fires at the end of the run or at the VP's next timer, or before: then it is set again.
    #[inline]
    fn set_alarm(&self, cpu: u32, bound: &mut Option<u64>, armed: &mut Armed) {
        let deadline = self.run_page().deadline.load(Ordering::Relaxed);
        if armed.cpu != cpu || armed.deadline != deadline || self.alarm.fired() {
            self.set_alarm_to(deadline, cpu, bound, armed);
        }
    }

    #[inline(never)]
    fn set_alarm_to(&self, deadline: u64, cpu: u32, bound: &mut Option<u64>, armed: &mut Armed) {
        let rest = run_end(bound).saturating_sub(sys::time());
        // A fresh page says 0: no deadline was set yet.
        let rest = match deadline {
            0 | u64::MAX => rest,
            _ => rest.min(sys::nanoseconds_until(deadline)),
        };
        self.alarm.set(rest);
        *armed = Armed { deadline, cpu };
    }

    /// Sleeps until somebody kicks it, or its next timer or the end of the run comes.
    fn sleep(&self, bound: &mut Option<u64>, armed: &mut Armed) -> Result {
        // Whatever it was set to may have ended before the reset.
        armed.cpu = NOWHERE;
        self.alarm.reset();
        fence(Ordering::SeqCst);
        if self.kicked.load(Ordering::SeqCst) || self.run_page().signal.load(Ordering::Acquire) != 0
        {
            return Ok(());
        }
        self.set_alarm(sys::this_cpu(), bound, armed);
        self.alarm.wait()
    }

    /// Makes the CPU that ran it last forget it.
    fn detach(&self, partition: &Partition) {
        let last = self.last_cpu.load(Ordering::Relaxed);
        if last != NOWHERE {
            // A CPU that went offline forgot it then.
            let _ = sys::call_on_one_cpu(last, || self.detach_here(partition));
            self.last_cpu.store(NOWHERE, Ordering::Relaxed);
        }
    }

    fn detach_here(&self, partition: &Partition) {
        let answer = partition.fast(private::DETACH_VP, u64::from(self.index));
        // A hypervisor that is gone holds nothing.
        let _ = errno(answer.status);
    }

    /// The same before the partition dies.
    pub(super) fn detach_for_good(&self, partition: &Partition) {
        self.detach(partition);
    }

    /// This CPU, `cpu`, goes offline.
    pub(super) fn detach_from(&self, partition: &Partition, cpu: u32) {
        if self.last_cpu.load(Ordering::Relaxed) == cpu {
            self.detach_here(partition);
        }
    }

    /// Copies the message that the VP left.
    fn copy_message(&self, copy: &mut Message) {
        let page = self.message.address().cast::<u64>();
        for (index, to) in copy.iter_mut().enumerate() {
            // SAFETY: the page lives as long as `self` and is longer than a message. User space may write to it meanwhile, so
            // it is copied once (a torn copy is only wrong data), and only the copy is looked at.
            *to = unsafe { page.add(index).read_volatile() };
        }
    }

    /// Finishes a message here if possible. `None` if it is the VMM's; otherwise the VP goes on behind an instruction of that
    /// length, or with 0 at the instruction.
    fn finish_intercept(&self, partition: &Partition, copy: &mut Message) -> Result<Option<u8>> {
        Ok(match word(copy, 0) {
            message::UNMAPPED_GPA | message::GPA_INTERCEPT => {
                let gpa = quad(copy, PAYLOAD + 56);
                let kind = word(copy, PAYLOAD + 5) as u8;
                match partition.fault(gpa >> 12, kind)? {
                    Fault::Mapped => Some(0),
                    Fault::Broken | Fault::Denied => {
                        // Also while the host cannot give it or did not yet: the VMM shall know that it is memory.
                        self.rename_message(copy, message::GPA_INTERCEPT);
                        None
                    }
                    Fault::NotMemory if kind == access::WRITE => {
                        partition.ring_memory_doorbell(self, copy)?
                    }
                    Fault::NotMemory => None,
                }
            }
            message::APIC_EOI
                if partition.resample(word(copy, PAYLOAD), word(copy, PAYLOAD + 4)) =>
            {
                Some(0)
            }
            _ => None,
        })
    }

    fn rename_message(&self, copy: &mut Message, message_type: u32) {
        copy[0] = copy[0] & !0xffff_ffff | u64::from(message_type);
        // SAFETY: the page lives as long as `self`; nothing in the kernel reads it back without a check.
        unsafe {
            self.message
                .address()
                .cast::<u32>()
                .write_volatile(message_type.to_le())
        };
    }

    /// Reads one register.
    pub(super) fn register(&self, partition: &Partition, name: u32) -> Result<u64> {
        let mut value = [0u64; 2];
        let head = self.register_head(partition);
        let answer = partition.rep(
            code::GET_VP_REGISTERS,
            1,
            [bytes(&head), &name.to_le_bytes()],
            bytes_mut(&mut value),
        )?;
        errno(answer.status)?;
        Ok(value[0])
    }

    fn register_head(&self, partition: &Partition) -> VpRegisters {
        VpRegisters {
            partition_id: partition.id(),
            vp_index: self.index,
            ..Default::default()
        }
    }

    /// Bytes of a state of `mshv_get_set_vp_state`, and how the image calls it.
    pub(crate) fn state_size(&self, partition: &Partition, state: StateKind) -> Result<usize> {
        match state {
            StateKind::SyntheticTimers => Ok(vp_state::SYNTHETIC_TIMERS_BYTES),
            StateKind::Xsave => {
                let size = partition.property(property::MAX_XSAVE_DATA_SIZE)?;
                usize::try_from(size)
                    .ok()
                    .filter(|size| *size <= STATE_PAGES * 4096)
                    .ok_or(EIO)
            }
            _ => Ok(4096),
        }
    }

    /// Gets or sets a state. `data` is whole pages, as many as the state needs.
    pub(crate) fn transfer_state(
        &self,
        partition: &Partition,
        state: StateKind,
        set: bool,
        data: &mut [u8],
    ) -> Result {
        let mut head = VpState {
            partition_id: partition.id(),
            vp_index: self.index,
            state_type: state.to_abi(),
            ..Default::default()
        };
        if state == StateKind::Xsave {
            // x87 and SSE belong to every image.
            head.xsave_states = partition.property(property::XSAVE_STATES)? | 3;
        }
        let code = if set {
            code::SET_VP_STATE
        } else {
            code::GET_VP_STATE
        };
        if state == StateKind::SyntheticTimers {
            let timers = data
                .get_mut(..vp_state::SYNTHETIC_TIMERS_BYTES)
                .ok_or(EINVAL)?;
            let words = (vp_state::SYNTHETIC_TIMERS_BYTES / 8) as u16;
            let answer = if set {
                let control = variable_control(code, words);
                partition.paged(control, [bytes(&head), timers], &mut [])?
            } else {
                partition.paged(variable_control(code, 0), [bytes(&head), &[]], timers)?
            };
            return errno(answer.status);
        }
        // Through pages of our own: user space cannot touch them while the image does.
        let mut bounce = KVec::new();
        let mut pfns = [0u64; STATE_PAGES];
        for (chunk, pfn) in data.chunks(4096).zip(pfns.iter_mut()) {
            let page = Pages::new(0)?;
            if set {
                // SAFETY: a page of ours, and a chunk is not longer than a page.
                unsafe {
                    core::ptr::copy_nonoverlapping(chunk.as_ptr(), page.address(), chunk.len())
                };
            }
            *pfn = page.spa() >> 12;
            bounce.push(page, GFP_KERNEL)?;
        }
        let pfns = &pfns[..bounce.len()];
        let control = variable_control(code, pfns.len() as u16);
        loop {
            let answer = partition.paged(control, [bytes(&head), bytes(pfns)], &mut [])?;
            errno(answer.status)?;
            if !self.provide_missing(partition)? {
                break;
            }
        }
        if !set {
            for (chunk, page) in data.chunks_mut(4096).zip(bounce.iter()) {
                // SAFETY: as above; the image is done with the page.
                unsafe {
                    core::ptr::copy_nonoverlapping(page.address(), chunk.as_mut_ptr(), chunk.len());
                }
            }
        }
        Ok(())
    }

    /// Prints it as a JSON object.
    pub(super) fn print(&self, seq: &SeqFile) {
        let cpu = self.running_cpu.load(Ordering::Relaxed);
        let state = if cpu == NOWHERE { "stopped" } else { "running" };
        seq_print!(
            seq,
            "{{\"index\":{},\"state\":\"{}\",\"dispatches\":{},\"intercepts\":{},\"exits\":{}}}",
            self.index,
            state,
            self.dispatches.load(Ordering::Relaxed),
            self.intercepts.load(Ordering::Relaxed),
            self.run_page().exits.load(Ordering::Relaxed)
        );
    }
}

/// Resumes a VP, which may pause, as long as it rings doorbells that are found at once. Whether its last write was one, too.
#[inline(never)]
fn resume(partition: &Partition, second: u64, irqs: &IrqsOff) -> (Answer, bool) {
    let reschedule = RescheduleFlag::new();
    let instruction = partition.instruction();
    // Without the length of the instruction.
    let rest = second & !(0xff << 32);
    let mut second = second;
    loop {
        let answer = instruction.fast(private::RESUME_VP, partition.id(), second);
        if !partition.quick_doorbells.ring(answer.value, irqs) {
            return (answer, false);
        }
        if reschedule.is_set() {
            return (answer, true);
        }
        second = rest | (answer.value & PortWrite::LENGTH_MASK) << 24;
    }
}

/// When a run ends, in nanoseconds of [`sys::time`].
fn run_end(bound: &mut Option<u64>) -> &mut u64 {
    bound.get_or_insert_with(|| sys::time().saturating_add(RUN_BOUND))
}

/// Where the message of a VP is.
enum Place {
    /// In [`Busy::message`].
    Copy,
    /// In the page that user space may map, where nobody looked at it.
    Page,
}

/// Offset of the payload in a message.
pub(super) const PAYLOAD: usize = 16;

/// The u32 at `offset`, 0 outside. It does not cross a multiple of 8.
pub(super) fn word(message: &Message, offset: usize) -> u32 {
    quad(message, offset) as u32
}

/// The u64 at `offset`, 0 outside: without what is beyond the next multiple of 8.
pub(super) fn quad(message: &Message, offset: usize) -> u64 {
    message
        .get(offset / 8)
        .map_or(0, |word| word >> (offset % 8 * 8))
}

/// `MSHV_VP_STATE_*`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum StateKind {
    /// Local APIC.
    Lapic,
    /// XSAVE image, compacted.
    Xsave,
    /// SynIC message page.
    Simp,
    /// SynIC event flags page.
    Siefp,
    /// Synthetic timers.
    SyntheticTimers,
}

impl StateKind {
    /// From the number in the ioctl.
    pub(crate) fn from_user(number: u8) -> Result<Self> {
        Ok(match number {
            0 => Self::Lapic,
            1 => Self::Xsave,
            2 => Self::Simp,
            3 => Self::Siefp,
            4 => Self::SyntheticTimers,
            _ => return Err(EINVAL),
        })
    }

    fn to_abi(self) -> u32 {
        match self {
            Self::Lapic => vp_state::LAPIC,
            Self::Xsave => vp_state::XSAVE,
            Self::Simp => vp_state::SIM_PAGE,
            Self::Siefp => vp_state::SIEF_PAGE,
            Self::SyntheticTimers => vp_state::SYNTHETIC_TIMERS,
        }
    }
}

/// What one property of a partition is asked with.
pub(super) fn property_input(partition: u64, property_code: u32) -> GetPartitionProperty {
    GetPartitionProperty {
        partition_id: partition,
        property_code,
        padding: 0,
    }
}
