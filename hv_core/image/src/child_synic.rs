// SPDX-License-Identifier: GPL-2.0
//! Where the pure models of the SynIC and its timers meet VPs, guest memory and the local APIC.

use core::sync::atomic::Ordering;

use hv_abi::status::HvStatus;

use crate::apic::{DeliveryMode, Interrupt, LocalApic};
use crate::arch::memory::with_guest_page;
use crate::arch::object::shared;
use crate::arch::switch::rdtsc;
use crate::child;
use crate::child_msr::{host_tsc_at, reference_time};
use crate::partition::{Inner, Partition};
use crate::stimer::Expiry;
use crate::synic::{sources, Message, Page, Sources, Synic};
use crate::vp::{Vp, VpCore};

const fn interrupt(vector: u8) -> Interrupt {
    Interrupt {
        mode: DeliveryMode::Fixed,
        vector,
        level: false,
    }
}

fn held_messages(vp: &Vp) -> &'static Page {
    shared(vp.held[0])
}

fn held_flags(vp: &Vp) -> &'static Page {
    shared(vp.held[1])
}

/// Runs `f` on the guest's page at that GPA, if the guest gave one that can be written. The partition's lock keeps the page there.
/// For one that is not mapped for that, the VP asks before its next entry, and [`deliver`] comes again.
fn with_page<R>(
    cpu: u32,
    inner: &Inner,
    vp: &Vp,
    gpa: Option<u64>,
    f: impl FnOnce(Option<&Page>) -> R,
) -> R {
    let Some(gpa) = gpa else { return f(None) };
    match inner.translate(gpa, true) {
        Some(spa) => with_guest_page(cpu, spa, |page| f(Some(page))),
        None => {
            vp.awaited.store(gpa | 1, Ordering::SeqCst);
            vp.posted.alert();
            f(None)
        }
    }
}

/// Has the VP dispatched if it has to ask for a page, after another CPU had something for it.
fn wake_if_awaited(vp: &Vp) {
    if vp.awaited.load(Ordering::SeqCst) != 0 {
        child::signal(vp);
    }
}

/// HvCallPostMessageDirect, from any CPU.
///
/// # Errors
///
/// As [`Synic::post`].
pub fn post_message(
    cpu: u32,
    partition: &Partition,
    vp: &Vp,
    source: usize,
    message: &Message,
) -> Result<(), HvStatus> {
    let inner = partition.inner.lock();
    let mut synic = vp.synic.lock();
    let gpa = synic.registers().message_page();
    let delivered = with_page(cpu, &inner, vp, gpa, |page| {
        synic.post(page, held_messages(vp), source, message)
    });
    wake_if_awaited(vp);
    let delivered = delivered?;
    if delivered {
        raise(vp, &synic, source);
    }
    Ok(())
}

/// HvCallSignalEventDirect, from any CPU. True if the flag was not set before.
///
/// # Errors
///
/// As [`Synic::signal`].
pub fn signal_event(
    cpu: u32,
    partition: &Partition,
    vp: &Vp,
    source: usize,
    flag: u16,
) -> Result<bool, HvStatus> {
    let inner = partition.inner.lock();
    let mut synic = vp.synic.lock();
    let gpa = synic.registers().event_page();
    let signalled = with_page(cpu, &inner, vp, gpa, |page| {
        synic.signal(page, held_flags(vp), source, flag)
    });
    wake_if_awaited(vp);
    let (new, delivered) = signalled?;
    if new && delivered {
        raise(vp, &synic, source);
    }
    Ok(new)
}

fn raise(vp: &Vp, synic: &Synic, source: usize) {
    if let Some(vector) = synic.registers().vector(source) {
        child::post(vp, interrupt(vector));
    }
}

/// Others send by the VP's registers from here on.
pub fn publish(vp: &Vp, core: &mut VpCore) {
    let registers = core.state.synic;
    core.apic.set_auto_eoi(registers.auto_eoi_vectors());
    vp.synic.lock().set_registers(registers);
}

/// Forgets what is held, with the registers of a reset.
pub fn reset(vp: &Vp) {
    vp.synic.lock().reset(held_flags(vp));
}

/// The VMM wants to know when these sources can take a message.
pub fn notify(vp: &Vp, set: Sources) {
    vp.synic.lock().want(set);
}

/// On the VP's own CPU, after its registers changed or it freed a slot: delivers what was held, and messages of timers. Returns
/// the sources that the VMM wants to hear of.
pub fn deliver(cpu: u32, vp: &Vp, core: &mut VpCore) -> Sources {
    if core.timers.has_undelivered() {
        expire_timers(cpu, vp, core);
    }
    let inner = vp.partition.get().inner.lock();
    let mut synic = vp.synic.lock();
    if synic.is_idle() {
        return 0;
    }
    let mut reached = 0;
    if synic.holds_messages() {
        let gpa = synic.registers().message_page();
        with_page(cpu, &inner, vp, gpa, |page| {
            if let Some(page) = page {
                reached |= synic.deliver_messages(page, held_messages(vp));
            }
        });
    }
    if synic.holds_flags() {
        let gpa = synic.registers().event_page();
        with_page(cpu, &inner, vp, gpa, |page| {
            if let Some(page) = page {
                reached |= synic.deliver_flags(page, held_flags(vp));
            }
        });
    }
    for source in sources(reached) {
        accept(&mut core.apic, synic.registers().vector(source));
    }
    synic.take_wanted()
}

fn accept(apic: &mut LocalApic, vector: Option<u8>) {
    if let Some(vector) = vector {
        apic.accept(interrupt(vector));
    }
}

/// Delivers what the VP's timers have to, and computes when they expire next.
#[cold]
pub fn expire_timers(cpu: u32, vp: &Vp, core: &mut VpCore) {
    let partition = vp.partition.get();
    core.timers_seen = partition.changes.load(Ordering::Acquire);
    let inner = partition.inner.lock();
    let now = reference_time(rdtsc(), &inner.state);
    let apic = &mut core.apic;
    core.timers.expire(now, |expiry| match expiry {
        Expiry::Direct(vector) => apic.accept(interrupt(vector)),
        Expiry::Message(source, words) => {
            let mut message = [0; 32];
            for (to, from) in message.iter_mut().zip(words) {
                *to = from;
            }
            let synic = vp.synic.lock();
            let gpa = synic.registers().message_page();
            let done = with_page(cpu, &inner, vp, gpa, |page| {
                synic.try_post(page, source, &message)
            });
            if done {
                accept(apic, synic.registers().vector(source));
            }
            done
        }
    });
    let first = core.timers.first();
    core.timers
        .set_deadline(first.map_or(u64::MAX, |first| host_tsc_at(first, &inner.state)));
}

/// Which page of the SynIC.
#[derive(Clone, Copy)]
pub enum Kind {
    /// Messages.
    Messages,
    /// Event flags.
    Flags,
}

/// Runs `f` on a page of the VP's SynIC: the guest's, or without one that which holds what comes. What is held then follows from
/// the page. Does nothing if the root is asked for the page.
fn with_state(cpu: u32, vp: &Vp, core: &VpCore, kind: Kind, f: impl FnOnce(&Page)) {
    let inner = vp.partition.get().inner.lock();
    let mut synic = vp.synic.lock();
    let (gpa, held) = match kind {
        Kind::Messages => (synic.registers().message_page(), held_messages(vp)),
        Kind::Flags => (synic.registers().event_page(), held_flags(vp)),
    };
    if let Some(spa) = gpa.and_then(|gpa| inner.translate(gpa, true)) {
        with_guest_page(cpu, spa, f);
    } else if !gpa.is_some_and(|gpa| child::ask_for(core, gpa, true)) {
        f(held);
        match kind {
            Kind::Messages => synic.adopt_messages(held),
            Kind::Flags => synic.adopt_flags(held),
        }
    }
}

/// The page of messages or flags of a VP, for its VMM.
pub fn get_page(cpu: u32, vp: &Vp, core: &VpCore, kind: Kind, to: &mut [u8; 4096]) {
    with_state(cpu, vp, core, kind, |page| {
        for (bytes, word) in to.chunks_exact_mut(8).zip(page) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
        }
    });
}

/// Loads it.
pub fn set_page(cpu: u32, vp: &Vp, core: &VpCore, kind: Kind, from: &[u8; 4096]) {
    with_state(cpu, vp, core, kind, |page| {
        for (bytes, word) in from.chunks_exact(8).zip(page) {
            let value = bytes
                .iter()
                .rev()
                .fold(0, |value, byte| value << 8 | u64::from(*byte));
            word.store(value, Ordering::Relaxed);
        }
    });
}
