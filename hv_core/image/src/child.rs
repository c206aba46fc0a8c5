// SPDX-License-Identifier: GPL-2.0
//! Running a child: its exits, and what is delivered to it at each entry.
//!
//! An exit is finished here where that is possible; otherwise the VP goes back to the root with a
//! [`DispatchEvent`]. All of it is generic over the control structure ([`ChildHardware`]).

use core::sync::atomic::{AtomicU64, Ordering};

use hv_abi::boot::BootInfo;
use hv_abi::hypercall::{state_page, DispatchEvent, PortWrite, VpRunPage};
use hv_x86::regs::rflags;

use crate::apic::{DeliveryMode, Interrupt, IpiRequest, WriteEffect};
use crate::arch::object::{page_bytes, shared};
use crate::arch::switch::rdtsc;
use crate::arch::{ChildExit, ChildHardware, IoAccess, QuickExit};
use crate::child_emulate as emulate;
use crate::child_hypercall::{self, Outcome};
use crate::child_synic;
use crate::messages;
use crate::partition::{Partition, RUN_PAGE};
use crate::register_page::{self, RegisterPage, Shown};
use crate::synic::Sources;
use crate::vp::{Vp, VpCore};
use crate::vp_state::VpState;

/// Vectors of the exceptions that the hypervisor raises.
pub mod exception {
    /// #DB.
    pub const DEBUG: u8 = 1;
    /// #UD.
    pub const UNDEFINED: u8 = 6;
    /// #GP.
    pub const GENERAL_PROTECTION: u8 = 13;
    /// #AC.
    pub const ALIGNMENT_CHECK: u8 = 17;
    /// #MC.
    pub const MACHINE_CHECK: u8 = 18;
    /// Those that exit: bits of the vectors.
    pub const INTERCEPTED: u32 = 1 << DEBUG | 1 << ALIGNMENT_CHECK | 1 << MACHINE_CHECK;
}

/// One VP on one CPU.
pub struct Run<'a, H: ChildHardware> {
    /// Facts of the machine.
    pub info: &'a BootInfo,
    /// CPU number.
    pub cpu: u32,
    /// The VP.
    pub vp: &'static Vp,
    /// What this CPU owns of it.
    pub core: &'a mut VpCore,
    /// Its control structure.
    pub hardware: H,
    /// This CPU may have translations of another VP, or such as do not hold any more.
    pub first: bool,
    /// Sources of the SynIC of which the VMM has to be told that they can take a message.
    pub deliverable: Sources,
}

/// What to do after an exit.
pub enum Next {
    /// Enter the VP again.
    Enter,
    /// Back to the root.
    Root(DispatchEvent),
}

impl<H: ChildHardware> Run<'_, H> {
    /// The partition.
    pub fn partition(&self) -> &'static Partition {
        self.vp.partition.get()
    }

    /// The guest's TSC.
    pub fn now(&self) -> u64 {
        rdtsc().wrapping_add(self.core.state.tsc_offset)
    }

    /// Brings the registers into `core.state`.
    pub fn pull(&mut self) -> &mut VpState {
        if self.core.in_hardware {
            self.hardware.store(self.core);
            self.core.in_hardware = false;
        }
        &mut self.core.state
    }

    /// Brings the mode into `core.state`, if the whole is not there: see [`ChildHardware::peek`].
    pub fn peek(&mut self) -> &mut VpState {
        if self.core.in_hardware {
            self.hardware.peek(self.core);
        }
        &mut self.core.state
    }

    /// `core.state` was changed: it goes back at the next entry.
    pub fn changed(&mut self) {
        self.core.dirty = true;
    }

    /// Raises an exception at the current instruction.
    pub fn raise(&mut self, vector: u8, error: Option<u32>) {
        self.core.requeue = H::exception(vector, error);
    }

    /// Raises #GP(0).
    pub fn general_protection(&mut self) {
        self.raise(exception::GENERAL_PROTECTION, Some(0));
    }

    /// Moves past the exiting instruction.
    #[inline(always)]
    pub fn skip(&mut self) {
        let length = self.hardware.instruction_length();
        self.skip_by(length);
    }

    /// Moves past an instruction of that length.
    #[inline(always)]
    pub fn skip_by(&mut self, length: u64) {
        if self.core.in_hardware {
            self.hardware.skip(self.core, length);
        } else {
            let state = &mut self.core.state;
            state.rip = state.rip.wrapping_add(length);
            state.interrupt_shadow = false;
            let trap = state.rflags & rflags::TF != 0;
            self.core.dirty = true;
            if trap {
                self.hardware.trap_step(self.core);
            }
        }
    }

    /// Whether nothing came since the last full entry that another one would have to deliver. Whatever comes from outside ends
    /// the run by an interrupt of the machine; the VP's timer, too: the root was told when it expires.
    #[inline(always)]
    pub fn is_quiet(&self) -> bool {
        self.core.quiet && self.is_untouched()
    }

    /// Whether nothing came from outside since the last full entry.
    #[inline(always)]
    pub fn is_untouched(&self) -> bool {
        !self.vp.posted.is_outstanding()
            && self.core.seen_generation == self.partition().generation.load(Ordering::Acquire)
    }

    /// Whether the VP can go on after this exit as it was: without interrupts, timers and changes to its registers.
    #[inline(always)]
    pub fn is_simple(&self) -> bool {
        self.is_quiet() && self.hardware.is_undisturbed(self.core)
    }

    /// Finishes an exit if it is a simple one.
    #[inline(always)]
    pub fn finish_quickly(&mut self) -> bool {
        self.is_simple()
            && match self.hardware.quick_exit() {
                Some(QuickExit::Cpuid) => emulate::cpuid_quickly(self),
                Some(QuickExit::Hypercall) => child_hypercall::hypercall_quickly(self),
                Some(QuickExit::MsrRead) => emulate::read_msr_quickly(self),
                None => false,
            }
    }

    /// Leaves with an access to a port under the same conditions, if it is no string.
    #[inline(always)]
    pub fn leave_quickly(&mut self) -> Option<DispatchEvent> {
        let access = self.hardware.quick_port()?;
        self.core.left_quickly = true;
        Some(self.leave_port(access))
    }

    /// What RDX says to the root if the VP pauses: its exit is a write to a port that the root completes at once, under the same
    /// conditions. What came from outside meanwhile is looked at when it goes on.
    #[inline(always)]
    pub fn pause_quickly(&mut self) -> Option<u64> {
        let is_simple = !self.core.pauses.is_empty()
            && self.core.quiet
            && self.hardware.is_undisturbed(self.core);
        if !is_simple {
            return None;
        }
        let write = self.hardware.quick_write(self.core)?;
        self.core.pauses.has(write.port).then(|| write.to_value())
    }

    /// It does not go on: from here on it is as if it had left with its write.
    pub fn end_pause(&mut self) {
        self.core.left_quickly = true;
        self.core.port = PortWrite::from_value(self.core.paused_with).map(|write| IoAccess {
            port: write.port,
            size: write.size,
            is_in: false,
            string: false,
            rep: false,
            segment: 0,
            length: write.length,
        });
    }

    /// Goes on if nothing has happened to the VP since it left, but that the root completed its write to a port or the VMM
    /// changed its general registers.
    #[inline(always)]
    pub fn resume_quickly(&mut self, step: u8) -> bool {
        let quick = core::mem::take(&mut self.core.left_quickly)
            && self.core.in_hardware
            && !self.core.dirty
            && !self.first
            && self.core.last_cpu == self.cpu
            && self.is_quiet();
        if !quick {
            return false;
        }
        if step != 0 {
            self.hardware.skip(self.core, step.into());
            return true;
        }
        self.absorb_register_page()
    }

    /// First part of an exit.
    pub fn after_exit(&mut self) -> Next {
        self.core.in_hardware = true;
        self.hardware.after_exit(self.core);
        match self.hardware.exit(self.core) {
            ChildExit::ExternalInterrupt => return Next::Root(DispatchEvent::Interrupt),
            ChildExit::Nmi => {
                self.hardware.forward_nmi(self.cpu);
                return Next::Root(DispatchEvent::Interrupt);
            }
            ChildExit::Window => {}
            ChildExit::Iret => self.hardware.end_nmi(self.core),
            ChildExit::Cpuid => emulate::cpuid(self),
            ChildExit::Hypercall => match child_hypercall::hypercall(self) {
                Outcome::Done => {}
                Outcome::Leave(event) => return Next::Root(event),
                Outcome::Missing(gpa, write) => {
                    return self.memory_message(false, gpa, write, false, None)
                }
            },
            ChildExit::MsrRead => emulate::read_msr(self),
            ChildExit::MsrWrite => return self.effect_of_msr_write(),
            ChildExit::Xsetbv => emulate::xsetbv(self),
            ChildExit::Halt => {
                self.skip();
                self.core.state.halt_suspend = true;
                self.core.state.idle = false;
            }
            ChildExit::Io(access) => return self.port(access),
            ChildExit::ControlRegisterWrite { register, source } => {
                let value = self.register(source);
                if let Err(gpa) = emulate::write_control_register(self, register, value) {
                    return self.memory_message(false, gpa, false, false, None);
                }
            }
            ChildExit::TaskPriority { write, register } => self.task_priority(write, register),
            ChildExit::Fault {
                gpa,
                write,
                execute,
                gva,
            } => return self.memory(gpa, write, execute, gva),
            ChildExit::Nop => self.skip(),
            ChildExit::Undefined => self.raise(exception::UNDEFINED, None),
            ChildExit::Exception { info, error } => {
                // An interrupt or NMI whose delivery it cut short must not get lost; then the exception comes again. Anything
                // else comes again after the exception's handler (neither is contributory: SDM table 7-5).
                let (cut, _) = self.core.requeue;
                if cut >> 31 == 0 || !matches!(cut >> 8 & 7, 0 | 2) {
                    self.core.requeue = (info, error);
                }
                // If its delivery raises it again, it comes before anything from outside: the root would never get a turn.
                return Next::Root(DispatchEvent::Interrupt);
            }
            ChildExit::MachineCheck => return Next::Root(DispatchEvent::MachineCheck),
            ChildExit::TripleFault => {
                self.core.shut_down = true;
            }
            ChildExit::InvalidState {
                reason,
                qualification,
            } => {
                self.log(format_args!(
                    "the processor refuses its registers, reason {reason:#x} qualification {qualification:#x}"
                ));
                return self.message(|run| messages::invalid_vp_register(run.vp.index));
            }
            ChildExit::Unknown(code) => {
                self.log(format_args!("exit {code:#x} unknown"));
                return self.message(|run| messages::unsupported_feature(run.vp.index, code));
            }
        }
        self.enter()
    }

    /// Logs a line about the VP, if it is the first.
    pub fn log(&mut self, what: core::fmt::Arguments<'_>) {
        if !core::mem::replace(&mut self.core.logged, true) {
            let (partition, vp) = (self.partition().id, self.vp.index);
            crate::log!("partition {partition:#x} VP {vp}: {what}");
        }
    }

    fn register(&mut self, number: u8) -> u64 {
        if usize::from(number) == crate::vp_state::RSP {
            self.pull();
        }
        self.core
            .state
            .context
            .gprs
            .get(usize::from(number))
            .copied()
            .unwrap_or(0)
    }

    fn task_priority(&mut self, write: bool, register: u8) {
        if write {
            let value = self.register(register);
            if self.core.apic.set_cr8(value).is_err() {
                return self.general_protection();
            }
        } else {
            let value = self.core.apic.cr8();
            self.pull();
            if let Some(slot) = self.core.state.context.gprs.get_mut(usize::from(register)) {
                *slot = value;
            }
            self.changed();
        }
        self.skip();
    }

    fn effect_of_msr_write(&mut self) -> Next {
        let effect = emulate::write_msr(self);
        match core::mem::take(&mut self.deliverable) {
            0 => self.apply(effect),
            sources => self.sint_deliverable(sources),
        }
    }

    fn sint_deliverable(&mut self, sources: Sources) -> Next {
        self.message(|run| {
            let cr8 = run.core.apic.cr8() as u8;
            messages::sint_deliverable(run.vp.index, &run.core.state, cr8, sources)
        })
    }

    /// Acts on what a write to the local APIC caused, and goes on.
    fn apply(&mut self, effect: WriteEffect) -> Next {
        match effect {
            WriteEffect::Ipi(request) => {
                if self.send(&request) {
                    return Next::Root(DispatchEvent::Signal);
                }
            }
            WriteEffect::AddressingChanged | WriteEffect::BaseChanged => {
                self.vp.posted.publish(self.core.apic.addressing());
            }
            // The I/O APIC is the VMM's.
            WriteEffect::Eoi {
                vector,
                level: true,
            } => return self.message(|run| messages::apic_eoi(run.vp.index, vector)),
            WriteEffect::None | WriteEffect::TimerChanged | WriteEffect::Eoi { .. } => {}
        }
        self.enter()
    }

    /// Delivers an inter-processor interrupt.
    fn send(&mut self, request: &IpiRequest) -> bool {
        let mut signalled = false;
        let lowest = request.interrupt.mode == DeliveryMode::LowestPriority;
        for other in self.partition().vps() {
            let is_self = other.index == self.vp.index;
            if !other.posted.matches(request.destination, is_self) {
                continue;
            }
            if is_self {
                self.core.apic.accept(request.interrupt);
            } else {
                signalled |= post(other, request.interrupt);
            }
            if lowest {
                break;
            }
        }
        signalled
    }

    /// What RDX says to the root of an event.
    #[inline(always)]
    pub fn event_value(&self, event: DispatchEvent) -> u64 {
        match self.core.port {
            Some(access) if event == DispatchEvent::PortWrite => PortWrite {
                port: access.port,
                size: access.size,
                length: access.length,
                value: self.hardware.eax(self.core),
            }
            .to_value(),
            _ if event == DispatchEvent::SignalEvent => self.core.event.to_value(),
            _ => event as u64,
        }
    }

    /// Leaves with an access to a port that is no string.
    #[inline(always)]
    fn leave_port(&mut self, access: IoAccess) -> DispatchEvent {
        self.core.port = Some(access);
        if !access.is_in && self.core.ports.has(access.port) {
            DispatchEvent::PortWrite
        } else {
            DispatchEvent::Message
        }
    }

    fn port(&mut self, access: IoAccess) -> Next {
        if access.string {
            // Only this has anything in its bytes that the message does not say.
            let bytes = match self.instruction_bytes(true) {
                Ok(bytes) => bytes,
                Err(next) => return next,
            };
            return self.message(|run| {
                let shown = Shown::of(&run.core.state);
                port_message(run.vp.index, run.core, &shown, &access, bytes)
            });
        }
        let event = self.leave_port(access);
        if event == DispatchEvent::Message {
            self.save_requeue();
        }
        Next::Root(event)
    }

    /// Fills the pages that the VMM sees. The extended state is in its area.
    #[inline(always)]
    pub fn show(&mut self) {
        let shown = if self.core.in_hardware {
            self.hardware.store_general(self.core);
            self.hardware.shown(self.core)
        } else {
            Shown::of(&self.core.state)
        };
        show(self.vp.index, self.core, &shown);
    }

    fn memory(&mut self, gpa: u64, write: bool, execute: bool, gva: Option<u64>) -> Next {
        let found = self.partition().lookup(gpa);
        if found.is_some_and(|found| !write || found.attributes.write) && !execute {
            // Another CPU mapped it meanwhile.
            return self.enter();
        }
        if !execute && emulate::is_apic_page(self.core, gpa) {
            if let Some(effect) = emulate::access_apic(self, gpa) {
                return self.apply(effect);
            }
        }
        self.memory_message(found.is_some(), gpa, write, execute, gva)
    }

    /// Tells the root of an access to memory that is not there or does not allow it.
    fn memory_message(
        &mut self,
        mapped: bool,
        gpa: u64,
        write: bool,
        execute: bool,
        gva: Option<u64>,
    ) -> Next {
        self.pull();
        // After a fetch the root looks for the same page.
        let bytes = match self.instruction_bytes(!execute) {
            Ok(bytes) => bytes,
            Err(next) => return next,
        };
        self.message(|run| {
            let access = if write {
                1
            } else if execute {
                2
            } else {
                0
            };
            messages::memory(
                run.vp.index,
                &run.core.state,
                run.core.apic.tpr(),
                mapped,
                access,
                gva,
                gpa,
                bytes.0,
                bytes.1,
            )
        })
    }

    /// The bytes of the instruction for the VMM. An error if it asks the root to map their page first; the instruction runs
    /// again then.
    fn instruction_bytes(&mut self, asks: bool) -> Result<([u8; 16], u8), Next> {
        match emulate::instruction_bytes(self) {
            (_, _, Some(gpa)) if asks && ask_for(self.core, gpa, false) => {
                Err(Next::Root(DispatchEvent::Missing))
            }
            (bytes, count, _) => Ok((bytes, count)),
        }
    }

    /// Brings to guest memory what is to be there before the VP runs.
    #[cold]
    fn reach_guest_memory(&mut self) -> Option<Next> {
        while self.core.owed.is_some()
            || self.partition().owes_reference_page.load(Ordering::Acquire)
        {
            if let Err(gpa) = emulate::settle(self) {
                if ask_for(self.core, gpa, true) {
                    return Some(Next::Root(DispatchEvent::Missing));
                }
                emulate::settled(self);
            }
        }
        loop {
            let awaited = self.vp.awaited.swap(0, Ordering::SeqCst);
            let gpa = awaited & !1;
            if awaited == 0 {
                break;
            } else if self.partition().translate(gpa, true).is_some() {
                self.deliverable |= child_synic::deliver(self.cpu, self.vp, self.core);
            } else if ask_for(self.core, gpa, true) {
                self.vp.awaited.store(awaited, Ordering::SeqCst);
                return Some(Next::Root(DispatchEvent::Missing));
            }
        }
        match core::mem::take(&mut self.deliverable) {
            0 => None,
            sources => Some(self.sint_deliverable(sources)),
        }
    }

    /// Leaves a message for the VMM.
    fn message(&mut self, make: impl FnOnce(&Self) -> messages::Message) -> Next {
        self.pull();
        self.save_requeue();
        write_message(self.core, make(self));
        Next::Root(DispatchEvent::Intercept)
    }

    /// An event whose delivery was interrupted is the VMM's to see, in `PENDING_INTERRUPTION`.
    fn save_requeue(&mut self) {
        let (info, error) = core::mem::take(&mut self.core.requeue);
        if info >> 31 & 1 != 0 {
            let kind = u64::from(info >> 8 & 7);
            let with_error = u64::from(info >> 11 & 1);
            self.core.state.pending_interruption = 1
                | kind << 1
                | with_error << 4
                | u64::from(info & 0xff) << 16
                | u64::from(error) << 32;
        }
    }

    /// Everything before an entry: interrupts, timers, start-up, and the checks that may keep the VP out.
    pub fn enter(&mut self) -> Next {
        if self.core.shut_down {
            return self
                .message(|run| messages::unrecoverable_exception(run.vp.index, &run.core.state));
        }
        if !self.core.flushes.is_empty() && !child_hypercall::wait_for_flushes(self) {
            return Next::Root(DispatchEvent::Signal);
        }
        if self.vp.posted.is_outstanding() {
            self.vp.posted.drain_into(&mut self.core.apic);
        }
        if self.vp.stale.load(Ordering::SeqCst) {
            self.vp.stale.store(false, Ordering::SeqCst);
            self.first = true;
        }
        let host = rdtsc();
        let now = host.wrapping_add(self.core.state.tsc_offset);
        if self
            .core
            .apic
            .timer_deadline()
            .is_some_and(|deadline| deadline <= now)
        {
            self.core.apic.timer_expired(now);
        }
        if self.core.timers.deadline() <= host
            || self.core.timers_seen != self.partition().changes.load(Ordering::Acquire)
        {
            child_synic::expire_timers(self.cpu, self.vp, self.core);
        }
        if self.core.dirty {
            let sources = child_synic::deliver(self.cpu, self.vp, self.core);
            if sources != 0 {
                return self.sint_deliverable(sources);
            }
        }
        if self.core.owed.is_some()
            || self.partition().owes_reference_page.load(Ordering::Relaxed)
            || self.vp.awaited.load(Ordering::SeqCst) != 0
        {
            if let Some(next) = self.reach_guest_memory() {
                return next;
            }
        }
        let pending = self.core.apic.pending();
        if pending.init {
            self.init();
        }
        if let Some(vector) = pending.sipi {
            self.core.apic.take_sipi();
            if self.core.state.startup_suspend {
                self.start(vector);
            }
        }
        if self.core.state.startup_suspend {
            return Next::Root(DispatchEvent::WaitForSipi);
        }
        self.absorb_pending_interruption();
        if self.core.dirty {
            // What the VMM or an emulation left in `state`.
            if let Err(gpa) = emulate::change_paging(self) {
                return self.memory_message(false, gpa, false, false, None);
            }
            self.hardware.load(self.core);
            self.core.dirty = false;
        }
        self.core.in_hardware = true;
        if self.core.state.halt_suspend {
            // HV_X64_MSR_GUEST_IDLE waits for interrupts also where none can be taken.
            let wakes = pending.nmi
                || self.core.requeue.0 != 0
                || (self.core.state.idle || self.hardware.interrupt_flag())
                    && (pending.ext_int.is_some() || pending.vector.is_some());
            if !wakes {
                return Next::Root(DispatchEvent::Halted);
            }
            self.core.state.halt_suspend = false;
            self.core.state.idle = false;
        }
        // Before anything is injected: an injected event must be followed by an entry.
        if self.deadline() < self.core.told_deadline {
            return Next::Root(DispatchEvent::Deadline);
        }
        let mut nmi_waits = pending.nmi;
        let interrupt_waits = pending.ext_int.is_some() || pending.vector.is_some();
        let (info, error) = core::mem::take(&mut self.core.requeue);
        if info >> 31 & 1 != 0 {
            self.hardware.inject(info, error);
            if interrupt_waits {
                self.hardware.request_window();
            }
        } else if nmi_waits && self.hardware.nmis_open(self.core) {
            self.core.apic.take_nmi();
            self.core.state.nmi_masked = true;
            self.hardware.inject_nmi(self.core);
            nmi_waits = false;
            if interrupt_waits {
                self.hardware.request_window();
            }
        } else if interrupt_waits {
            let offer = match (pending.ext_int, pending.vector) {
                (None, vector) => vector,
                _ => None,
            };
            if !self.hardware.interrupts_open(self.core) {
                self.hardware.request_window();
            } else if !offer.is_some_and(|vector| self.hardware.offer_interrupt(self.core, vector))
            {
                let vector = match self.core.apic.take_ext_int() {
                    Some(vector) => vector,
                    None => {
                        let vector = pending.vector.unwrap_or(0);
                        self.core.apic.acknowledge(vector);
                        vector
                    }
                };
                self.hardware.inject_interrupt(vector);
                if !self.core.apic.pending().is_empty() {
                    self.hardware.request_window();
                }
            }
        }
        if nmi_waits {
            self.hardware.request_nmi_window(self.core);
        }
        let generation = self.partition().generation.load(Ordering::Acquire);
        let flush =
            generation != self.core.seen_generation || self.core.last_cpu != self.cpu || self.first;
        self.core.seen_generation = generation;
        self.core.last_cpu = self.cpu;
        self.core.quiet = pending.is_empty() && info >> 31 == 0;
        self.hardware.before_entry(self.core, flush);
        Next::Enter
    }

    /// Host TSC of the next timer expiry.
    fn deadline(&self) -> u64 {
        let apic = self.core.apic.timer_deadline().map_or(u64::MAX, |guest| {
            guest.wrapping_sub(self.core.state.tsc_offset)
        });
        apic.min(self.core.timers.deadline())
    }

    /// Tells the root the deadline; last thing before the switch to the root.
    pub fn tell_deadline(&mut self) {
        let deadline = self.deadline();
        self.core.told_deadline = deadline;
        if let Some(page) = run_page(self.core) {
            page.deadline.store(deadline, Ordering::Release);
            page.exits.store(self.core.exits, Ordering::Relaxed);
        }
    }

    /// The event that the VMM put into `PENDING_INTERRUPTION` or `PENDING_EVENT0`.
    fn absorb_pending_interruption(&mut self) {
        let pending = self.core.state.pending_interruption;
        if pending & 1 != 0 && self.core.requeue.0 == 0 {
            self.core.state.pending_interruption = 0;
            let kind = (pending >> 1 & 7) as u32;
            let with_error = (pending >> 4 & 1) as u32;
            let vector = (pending >> 16 & 0xff) as u32;
            self.core.requeue = (
                1 << 31 | with_error << 11 | kind << 8 | vector,
                (pending >> 32) as u32,
            );
            return;
        }
        let [low, _] = self.core.state.pending_event;
        // Bit 0 pending, 3:1 type (0 exception), 8 error code valid, 31:16 vector, 63:32 error code.
        if low & 0xf == 1 && self.core.requeue.0 == 0 {
            self.core.state.pending_event = [0; 2];
            let error = (low >> 8 & 1 != 0).then_some((low >> 32) as u32);
            self.core.requeue = H::exception((low >> 16) as u8, error);
        }
    }

    /// INIT: the registers of a reset but for what INIT leaves alone, and wait for a start-up IPI.
    fn init(&mut self) {
        self.core.apic.take_init();
        self.pull();
        let old = self.core.state;
        let mut new = VpState {
            // What INIT leaves alone (SDM table 11-1), and what is not the processor's.
            cr0: 0x10 | old.cr0 & 0x6000_0000,
            tsc_offset: old.tsc_offset,
            tsc_aux: old.tsc_aux,
            tsc_adjust: old.tsc_adjust,
            tsc_write: old.tsc_write,
            mtrr_def_type: old.mtrr_def_type,
            mtrr_fixed: old.mtrr_fixed,
            mtrr_variable: old.mtrr_variable,
            xcr0: old.xcr0,
            xss: old.xss,
            pat: old.pat,
            misc_enable: old.misc_enable,
            sysenter_cs: old.sysenter_cs,
            sysenter_esp: old.sysenter_esp,
            sysenter_eip: old.sysenter_eip,
            star: old.star,
            lstar: old.lstar,
            cstar: old.cstar,
            sfmask: old.sfmask,
            kernel_gs_base: old.kernel_gs_base,
            spec_ctrl: old.spec_ctrl,
            synic: old.synic,
            vp_assist_page: old.vp_assist_page,
            features: old.features,
            explicit_suspend: false,
            startup_suspend: true,
            ..VpState::reset(self.core.apic.is_bsp())
        };
        new.context = old.context;
        new.context.gprs = [0; 16];
        if let Some(slot) = new.context.gprs.get_mut(crate::arch::gpr::RDX) {
            *slot = emulate::signature(self).into();
        }
        self.core.state = new;
        self.core.requeue = (0, 0);
        self.vp.posted.publish(self.core.apic.addressing());
        self.changed();
    }

    /// Start-up IPI.
    fn start(&mut self, vector: u8) {
        self.pull();
        let state = &mut self.core.state;
        state.startup_suspend = false;
        state.rip = 0;
        let code = &mut state.segments[crate::vp_state::segment::CS];
        code.selector = u16::from(vector) << 8;
        code.base = u64::from(vector) << 12;
        code.limit = 0xffff;
        self.changed();
    }

    /// What the VMM wrote into the register page since the last exit. True if the control structure has it already.
    #[inline(always)]
    pub fn absorb_register_page(&mut self) -> bool {
        let Some((page, dirty)) = dirty_page(self.core) else {
            return !self.core.dirty;
        };
        // The usual end of an access to a port.
        if dirty == register_page::dirty::IP && self.core.in_hardware && !self.core.dirty {
            let rip = page.rip.load(Ordering::Relaxed);
            if self.hardware.jump_quick(self.core, rip) {
                page.dirty.store(0, Ordering::Relaxed);
                return true;
            }
        }
        if self.core.in_hardware {
            self.hardware.store_general(self.core);
        }
        // What blocks interrupts has to fit RFLAGS.
        let all = dirty & register_page::dirty::SEGMENT != 0 || self.core.state.interrupt_shadow;
        if all {
            self.pull();
            self.changed();
        }
        absorb_page(self.core, page, dirty);
        if !self.core.dirty {
            self.hardware.load_general(self.core);
        }
        !self.core.dirty
    }
}

/// The register page and what the VMM changed in it, if anything.
#[inline(always)]
pub fn dirty_page(core: &VpCore) -> Option<(&'static RegisterPage, u32)> {
    let [page, ..] = core.pages;
    if page == 0 {
        return None;
    }
    let page = shared::<RegisterPage>(page);
    match page.dirty.load(Ordering::Relaxed) {
        0 => None,
        dirty => Some((page, dirty)),
    }
}

/// Takes in what the VMM changed.
#[inline(always)]
pub fn absorb_page(core: &mut VpCore, page: &RegisterPage, dirty: u32) {
    register_page::absorb(page, dirty, &mut core.state, page_bytes(core.xsave));
    page.dirty.store(0, Ordering::Relaxed);
}

fn run_page(core: &VpCore) -> Option<&'static VpRunPage> {
    let page = core.pages.get(RUN_PAGE).copied().unwrap_or(0);
    (page != 0).then(|| shared(page))
}

/// Asks the root for a page of guest memory that is not mapped so. False if the root said that there is none.
pub fn ask_for(core: &VpCore, gpa: u64, write: bool) -> bool {
    let wanted = gpa & !0xfff | 2 | u64::from(write);
    let Some(page) = run_page(core) else {
        return false;
    };
    let asks = page.refused.swap(0, Ordering::AcqRel) != wanted;
    if asks {
        page.missing.store(wanted, Ordering::Release);
    }
    asks
}

#[inline(always)]
fn fill_page(core: &VpCore, shown: &Shown) {
    if let Some(page) = run_page(core) {
        page.exits.store(core.exits, Ordering::Relaxed);
    }
    let [page, ..] = core.pages;
    if page != 0 {
        let xsave = page_bytes(core.xsave);
        register_page::fill(shared(page), &core.state, shown, core.apic.cr8(), xsave);
    }
}

/// Fills the first words of the message page.
#[inline(always)]
pub fn write_message<const WORDS: usize>(core: &VpCore, message: [u64; WORDS]) {
    let [_, page, _] = core.pages;
    if page != 0 {
        for (to, from) in shared::<[AtomicU64; WORDS]>(page).iter().zip(message) {
            to.store(from, Ordering::Relaxed);
        }
    }
}

#[inline(always)]
fn port_message(
    vp_index: u32,
    core: &VpCore,
    shown: &Shown,
    access: &IoAccess,
    (bytes, count): ([u8; 16], u8),
) -> messages::Message {
    let cr8 = core.apic.cr8() as u8;
    messages::io_port(vp_index, &core.state, shown, cr8, access, bytes, count)
}

/// Fills the register page, and the message page if the VP left with an access to a port about which there is no message yet.
#[inline(always)]
pub fn show(vp_index: u32, core: &mut VpCore, shown: &Shown) {
    if let Some(access) = core.port.take() {
        core.state.intercept_suspend = true;
        let message = port_message(vp_index, core, shown, &access, ([0; 16], 0));
        write_message(core, message);
    }
    fill_page(core, shown);
}

/// Shows the registers, which are in `core.state`, to the VMM, and to the root the exits, of which a quick one did not tell.
pub fn show_registers(core: &VpCore) {
    fill_page(core, &Shown::of(&core.state));
}

/// Leaves an interrupt for a VP that this CPU does not own. True if its thread has to be told.
pub fn post(vp: &Vp, interrupt: Interrupt) -> bool {
    let new = vp.posted.post(interrupt);
    if new {
        signal(vp);
    }
    new
}

/// Has the root wake the VP's thread, or interrupt the CPU that runs it.
pub fn signal(vp: &Vp) {
    let page = vp.run_page.load(Ordering::Acquire);
    if page != 0 {
        shared::<VpRunPage>(page).signal.store(1, Ordering::Release);
    }
}

const _: () = assert!(state_page::REGISTERS == 0 && state_page::INTERCEPT_MESSAGE == 1);
