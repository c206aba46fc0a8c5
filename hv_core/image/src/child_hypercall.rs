// SPDX-License-Identifier: GPL-2.0
//! Hypercalls of a child: where its parameters are, and what is done to other VPs.

use core::sync::atomic::Ordering;

use hv_abi::hypercall::{result, Control, DispatchEvent};
use hv_abi::status::HvStatus;
use hv_x86::regs::efer;

use crate::apic::{DeliveryMode, Interrupt};
use crate::arch::memory::{read_physical, Window};
use crate::arch::{gpr, ChildHardware};
use crate::child::{exception, post, signal, write_message, Run};
use crate::child_emulate::write_guest;
use crate::guest_call::{self, code, Request, VpSet};
use crate::vp::Vp;
use crate::vp_state::{segment, VpState};

/// What became of a hypercall.
pub enum Outcome {
    /// The VP goes on, perhaps with an exception.
    Done,
    /// The root has to wake or interrupt other VPs, or to act on the call.
    Leave(DispatchEvent),
    /// Its input, or its output (true), is at this GPA, where nothing is mapped for that. It runs again when there is.
    Missing(u64, bool),
}

/// Whether the VP may make hypercalls in its mode, which is in `state` (TLFS 3.7).
fn may_call(state: &VpState) -> bool {
    state.segments[segment::SS].rights >> 5 & 3 == 0 && state.cr0 & 1 != 0
}

/// A hypercall of a guest that made one before, with the same identity, if it concerns no other VP.
#[inline(always)]
pub fn hypercall_quickly<H: ChildHardware>(run: &mut Run<'_, H>) -> bool {
    let changes = run.partition().changes.load(Ordering::Acquire);
    let control = Control(run.core.state.context.gprs[gpr::RCX]);
    let (_, long) = run.hardware.cr4_and_long();
    let known = run.core.identified == changes && run.hardware.is_kernel();
    let status = match control.code() {
        code::NOTIFY_LONG_SPIN_WAIT => HvStatus::SUCCESS,
        code::FLUSH_VIRTUAL_ADDRESS_SPACE
        | code::FLUSH_VIRTUAL_ADDRESS_LIST
        | code::POST_MESSAGE
        | code::SIGNAL_EVENT
        | code::QUERY_CAPABILITIES
        | code::SEND_SYNTHETIC_CLUSTER_IPI..=code::SEND_SYNTHETIC_CLUSTER_IPI_EX => return false,
        _ => HvStatus::INVALID_HYPERCALL_CODE,
    };
    if known && long {
        run.hardware.skip_quick(3);
        run.hardware.rax(run.core, result(status, 0));
    }
    known && long
}

/// A hypercall of the guest.
pub fn hypercall<H: ChildHardware>(run: &mut Run<'_, H>) -> Outcome {
    let changes = run.partition().changes.load(Ordering::Acquire);
    let (os_id, features) = {
        let inner = run.partition().inner.lock();
        (inner.state.guest_os_id, inner.state.synthetic_features)
    };
    let state = run.peek();
    if !may_call(state) || os_id == 0 {
        run.raise(exception::UNDEFINED, None);
        return Outcome::Done;
    }
    let long = is_long(state);
    let gprs = &state.context.gprs;
    let pair = |high: usize, low: usize| gprs[high] << 32 | gprs[low] & 0xffff_ffff;
    let (control, first, second) = if long {
        (gprs[gpr::RCX], gprs[gpr::RDX], gprs[gpr::R8])
    } else {
        let first = pair(gpr::RBX, gpr::RCX);
        (pair(gpr::RDX, gpr::RAX), first, pair(gpr::RDI, gpr::RSI))
    };
    run.core.identified = changes;
    let control = Control(control);
    let mut words = [0; guest_call::WORDS];
    let mut request = if control.is_fast() {
        let words = fast_input(run, control, [first, second], &mut words);
        guest_call::parse(control, words, features)
    } else if first & 7 != 0 {
        Err(HvStatus::INVALID_ALIGNMENT)
    } else {
        match read_input(run, control, first, &mut words) {
            Some(words) => guest_call::parse(control, words, features),
            // A call that needs no input has none.
            None => match guest_call::parse(control, &[], features) {
                Err(HvStatus::INVALID_HYPERCALL_INPUT) => return Outcome::Missing(first, false),
                other => other,
            },
        }
    };
    if request == Ok(Request::Capabilities) {
        // There are none.
        if second & 7 != 0 {
            request = Err(HvStatus::INVALID_ALIGNMENT);
        } else if let Err(gpa) = write_guest(run.cpu, run.partition(), second, &[0; 8]) {
            return Outcome::Missing(gpa, true);
        }
    }
    run.skip();
    let (status, done) = match request {
        Ok(_) => (HvStatus::SUCCESS, control.rep_count()),
        Err(status) => (status, 0),
    };
    let value = result(status, done);
    if long {
        run.hardware.rax(run.core, value);
    } else {
        run.core.state.context.gprs[gpr::RDX] = value >> 32;
        run.hardware.rax(run.core, value & 0xffff_ffff);
    }
    match request {
        Ok(Request::Flush(set)) => flush(run, set),
        Ok(Request::Interrupt(vector, set)) => interrupt(run, vector, set),
        Ok(Request::PostMessage) => {
            write_message(run.core, words);
            Outcome::Leave(DispatchEvent::PostMessage)
        }
        Ok(Request::SignalEvent(event)) => {
            run.core.event = event;
            Outcome::Leave(DispatchEvent::SignalEvent)
        }
        Ok(Request::LongSpinWait | Request::Capabilities) | Err(_) => Outcome::Done,
    }
}

/// Gives a VP's hypercall, which it left with, another status than success.
pub fn fail(state: &mut VpState, status: HvStatus) {
    let long = is_long(state);
    let gprs = &mut state.context.gprs;
    gprs[gpr::RAX] = result(status, 0);
    if !long {
        gprs[gpr::RDX] = 0;
    }
}

fn is_long(state: &VpState) -> bool {
    state.efer & efer::LMA != 0 && state.segments[segment::CS].rights & 1 << 13 != 0
}

/// The input of a fast call: only what does not fit into two registers is looked for in XMM registers.
fn fast_input<'w, H: ChildHardware>(
    run: &Run<'_, H>,
    control: Control,
    pair: [u64; 2],
    words: &'w mut [u64; guest_call::WORDS],
) -> &'w [u64] {
    let mut count = pair.len();
    if guest_call::input_words(control) > count {
        count = guest_call::FAST_WORDS;
        for (to, from) in words.iter_mut().skip(pair.len()).zip(run.hardware.xmm()) {
            *to = from;
        }
    }
    for (to, from) in words.iter_mut().zip(pair) {
        *to = from;
    }
    words.get(..count).unwrap_or(&[])
}

/// The words of input that the call looks at, as far as they are in the page at `gpa`.
fn read_input<'w, H: ChildHardware>(
    run: &Run<'_, H>,
    control: Control,
    gpa: u64,
    words: &'w mut [u64; guest_call::WORDS],
) -> Option<&'w [u64]> {
    let spa = run.partition().translate(gpa, false)?;
    let in_page = (4096 - (gpa & 0xfff) as usize) / 8;
    let count = in_page.min(guest_call::input_words(control));
    let mut bytes = [0; guest_call::WORDS * 8];
    let bytes = bytes.get_mut(..count * 8)?;
    read_physical(run.cpu, Window::Guest, spa, bytes);
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = bytes.try_into().map_or(0, u64::from_le_bytes);
    }
    words.get(..count)
}

/// Sends a fixed interrupt to the VPs of a set.
fn interrupt<H: ChildHardware>(run: &mut Run<'_, H>, vector: u8, set: VpSet) -> Outcome {
    let interrupt = Interrupt {
        mode: DeliveryMode::Fixed,
        vector,
        level: false,
    };
    let mut signalled = false;
    for other in run.partition().vps().filter(|vp| set.has(vp.index)) {
        if other.index == run.vp.index {
            run.core.apic.accept(interrupt);
        } else {
            signalled |= post(other, interrupt);
        }
    }
    if signalled {
        Outcome::Leave(DispatchEvent::Signal)
    } else {
        Outcome::Done
    }
}

/// Makes the VPs of a set forget their translations. Those that run have to exit for it: this one waits for them.
fn flush<H: ChildHardware>(run: &mut Run<'_, H>, set: VpSet) -> Outcome {
    let mut waits = VpSet::NONE;
    for other in run.partition().vps().filter(|vp| set.has(vp.index)) {
        if other.index == run.vp.index {
            run.first = true;
            continue;
        }
        // Before it is looked at whether it runs: who takes the VP after that sees this at its entry.
        other.stale.swap(true, Ordering::SeqCst);
        other.posted.alert();
        waits.add(other.index);
    }
    run.core.flushes = waits;
    if flushes_are_done(run) {
        return Outcome::Done;
    }
    let waiting = run.core.flushes;
    for other in run.partition().vps().filter(|vp| waiting.has(vp.index)) {
        signal(other);
    }
    Outcome::Leave(DispatchEvent::Signal)
}

/// Whether the VPs that this one waits for have forgotten their translations, or will before they run.
fn flushes_are_done<H: ChildHardware>(run: &mut Run<'_, H>) -> bool {
    let waiting = run.core.flushes;
    for other in run.partition().vps().filter(|vp| waiting.has(vp.index)) {
        if !is_stale(other) {
            run.core.flushes.remove(other.index);
        }
    }
    run.core.flushes.is_empty()
}

/// Waits a little for them. The root interrupted the CPUs that run them.
#[cold]
pub fn wait_for_flushes<H: ChildHardware>(run: &mut Run<'_, H>) -> bool {
    const TURNS: u32 = 100;
    for _ in 0..TURNS {
        if flushes_are_done(run) {
            return true;
        }
        core::hint::spin_loop();
    }
    false
}

fn is_stale(vp: &Vp) -> bool {
    vp.stale.load(Ordering::SeqCst) && vp.core.is_in_use()
}
