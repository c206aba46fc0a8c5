// SPDX-License-Identifier: GPL-2.0
//! The synthetic interrupt controller of a VP (TLFS chapter 11): sixteen interrupt sources, each with a slot for a message and
//! 2048 event flags in pages of the guest.
//!
//! What cannot be delivered yet is held in two pages of the hypervisor, laid out as the guest's: one message and the flags of
//! each source. It is delivered when the guest opens the source or frees the slot. The guest may write its pages at any
//! time; nothing in them is trusted.
#![forbid(unsafe_code)]
#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]

use core::sync::atomic::{AtomicU64, Ordering};

use hv_abi::status::HvStatus;

/// Sources of interrupts.
pub const SINTS: usize = 16;
/// Event flags of a source.
pub const FLAGS: u16 = 2048;
/// HV_X64_MSR_SVERSION: the version of the interface.
pub const VERSION: u64 = 1;
/// Words of a message slot, and of the flags of a source.
const WORDS: usize = 32;

/// HV_X64_MSR_SCONTROL, SIMP and SIEFP: on.
pub const ENABLE: u64 = 1;
/// Bits of HV_X64_MSR_SINT0 and following.
pub mod sint {
    /// Vector of the interrupt.
    pub const VECTOR: u64 = 0xff;
    /// Nothing is delivered.
    pub const MASKED: u64 = 1 << 16;
    /// The interrupt ends by itself.
    pub const AUTO_EOI: u64 = 1 << 17;
    /// Messages and flags come without an interrupt.
    pub const POLLING: u64 = 1 << 18;
}

/// First word of a message (`HV_MESSAGE_HEADER`): type in bits 31:0, bytes of payload in 39:32, flags in 47:40.
mod header {
    pub const TYPE: u64 = 0xffff_ffff;
    pub const PENDING: u64 = 1 << 40;
    pub const FLAGS: u64 = 0xff << 40;
    pub const MAX_PAYLOAD: u64 = 240;

    pub const fn payload(word: u64) -> u64 {
        word >> 32 & 0xff
    }
}

/// A page of message slots or event flags.
pub type Page = [AtomicU64; 512];

/// A message: header and payload (`HV_MESSAGE`).
pub type Message = [u64; WORDS];

/// The registers of a VP that the SynIC goes by.
#[derive(Clone, Copy)]
pub struct Registers {
    /// HV_X64_MSR_SCONTROL.
    pub control: u64,
    /// HV_X64_MSR_SIMP.
    pub simp: u64,
    /// HV_X64_MSR_SIEFP.
    pub siefp: u64,
    /// HV_X64_MSR_SINT0 and following.
    pub sint: [u64; SINTS],
}

impl Registers {
    /// After reset: everything off.
    pub const RESET: Self = Self {
        control: 0,
        simp: 0,
        siefp: 0,
        sint: [sint::MASKED; SINTS],
    };

    fn page(&self, register: u64) -> Option<u64> {
        (self.control & register & ENABLE != 0).then_some(register & !0xfff)
    }

    /// GPA of the page of messages, if there is one.
    #[must_use]
    pub fn message_page(&self) -> Option<u64> {
        self.page(self.simp)
    }

    /// GPA of the page of event flags, if there is one.
    #[must_use]
    pub fn event_page(&self) -> Option<u64> {
        self.page(self.siefp)
    }

    fn source(&self, index: usize) -> u64 {
        self.sint.get(index).copied().unwrap_or(sint::MASKED)
    }

    /// Vector of the interrupt that goes with what a source delivers.
    #[must_use]
    pub fn vector(&self, index: usize) -> Option<u8> {
        let source = self.source(index);
        (source & (sint::MASKED | sint::POLLING) == 0).then_some((source & sint::VECTOR) as u8)
    }

    /// Vectors whose interrupts end by themselves.
    pub fn auto_eoi_vectors(&self) -> impl Iterator<Item = u8> + '_ {
        let ends = |source: &&u64| **source & (sint::MASKED | sint::AUTO_EOI) == sint::AUTO_EOI;
        let vector = |source: &u64| (source & sint::VECTOR) as u8;
        self.sint.iter().filter(ends).map(vector)
    }
}

/// A set of sources.
pub type Sources = u16;

fn one(index: usize) -> Sources {
    1_u16.checked_shl(index as u32).unwrap_or(0)
}

/// The sources of a set.
pub fn sources(set: Sources) -> impl Iterator<Item = usize> {
    (0..SINTS).filter(move |index| set & one(*index) != 0)
}

/// What the SynIC of one VP holds back, and the registers that say until when.
pub struct Synic {
    registers: Registers,
    /// Sources of which a message is held.
    messages: Sources,
    /// Sources of which flags are held.
    flags: Sources,
    /// Sources of which the VMM wants to know when they can take a message.
    wanted: Sources,
}

impl Default for Synic {
    fn default() -> Self {
        Self::new()
    }
}

impl Synic {
    /// Of a new VP.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            registers: Registers::RESET,
            messages: 0,
            flags: 0,
            wanted: 0,
        }
    }

    /// The registers that it goes by.
    #[must_use]
    pub const fn registers(&self) -> &Registers {
        &self.registers
    }

    /// The VP's registers are these now. What is held may have become deliverable.
    pub fn set_registers(&mut self, registers: Registers) {
        self.registers = registers;
    }

    /// Whether anything waits to be delivered to the guest, or the VMM waits for a source.
    #[must_use]
    pub const fn is_idle(&self) -> bool {
        self.messages | self.flags | self.wanted == 0
    }

    /// Whether messages are held.
    #[must_use]
    pub const fn holds_messages(&self) -> bool {
        self.messages != 0
    }

    /// Whether flags are held.
    #[must_use]
    pub const fn holds_flags(&self) -> bool {
        self.flags != 0
    }

    /// A source delivers if the SynIC is on and the source is not masked.
    fn is_open(&self, index: usize) -> bool {
        self.registers.control & ENABLE != 0 && self.registers.source(index) & sint::MASKED == 0
    }

    /// HvCallPostMessageDirect: puts a message into the slot of a source, or holds it until that is possible. `guest` is the
    /// guest's page of messages, if it can be written. True if the guest has it now. A message without a type is none.
    ///
    /// # Errors
    ///
    /// INVALID_PARAMETER if there is no such source or the payload is too long; INSUFFICIENT_BUFFERS if another message is
    /// held, which the guest learns from its slot.
    pub fn post(
        &mut self,
        guest: Option<&Page>,
        held: &Page,
        index: usize,
        message: &Message,
    ) -> Result<bool, HvStatus> {
        let [first, ..] = *message;
        if index >= SINTS || header::payload(first) > header::MAX_PAYLOAD {
            return Err(HvStatus::INVALID_PARAMETER);
        }
        if first & header::TYPE == 0 {
            return Ok(false);
        }
        if self.messages & one(index) != 0 {
            return Err(HvStatus::INSUFFICIENT_BUFFERS);
        }
        if self.try_post(guest, index, message) {
            return Ok(true);
        }
        write(slot(held, index), message);
        self.messages |= one(index);
        Ok(false)
    }

    /// Puts a message into the guest's slot, if that is possible now. Otherwise a full slot is marked, so that the guest says
    /// when it is free.
    pub fn try_post(&self, guest: Option<&Page>, index: usize, message: &Message) -> bool {
        match guest {
            Some(page) if self.is_open(index) => put(slot(page, index), message),
            _ => false,
        }
    }

    /// HvCallSignalEventDirect: sets a flag of a source. `guest` is the guest's page of flags, if it can be written. Returns
    /// whether the flag was not set before, and whether the guest has it.
    ///
    /// # Errors
    ///
    /// INVALID_PARAMETER if there is no such source or flag.
    pub fn signal(
        &mut self,
        guest: Option<&Page>,
        held: &Page,
        index: usize,
        flag: u16,
    ) -> Result<(bool, bool), HvStatus> {
        if index >= SINTS || flag >= FLAGS {
            return Err(HvStatus::INVALID_PARAMETER);
        }
        let (page, delivered) = match guest {
            Some(page) if self.is_open(index) => (page, true),
            _ => (held, false),
        };
        if !delivered {
            self.flags |= one(index);
        }
        let bit = 1 << (flag & 63);
        let word = slot(page, index).get(usize::from(flag >> 6));
        let old = word.map_or(bit, |word| word.fetch_or(bit, Ordering::AcqRel));
        Ok((old & bit == 0, delivered))
    }

    /// Delivers held messages. Returns the sources that got one.
    pub fn deliver_messages(&mut self, guest: &Page, held: &Page) -> Sources {
        let mut delivered = 0;
        for index in sources(self.messages).filter(|index| self.is_open(*index)) {
            if put(slot(guest, index), &read(slot(held, index))) {
                delivered |= one(index);
            }
        }
        self.messages &= !delivered;
        delivered
    }

    /// Delivers held flags. Returns the sources that got some which they had not.
    pub fn deliver_flags(&mut self, guest: &Page, held: &Page) -> Sources {
        let mut delivered = 0;
        let mut new = 0;
        for index in sources(self.flags).filter(|index| self.is_open(*index)) {
            for (from, to) in slot(held, index).iter().zip(slot(guest, index)) {
                let bits = from.swap(0, Ordering::Relaxed);
                if bits & !to.fetch_or(bits, Ordering::AcqRel) != 0 {
                    new |= one(index);
                }
            }
            delivered |= one(index);
        }
        self.flags &= !delivered;
        new
    }

    /// The held messages are those in the page.
    pub fn adopt_messages(&mut self, held: &Page) {
        let full = |index: &usize| {
            let head = slot(held, *index).first();
            head.is_some_and(|head| head.load(Ordering::Relaxed) & header::TYPE != 0)
        };
        self.messages = (0..SINTS)
            .filter(full)
            .fold(0, |set, index| set | one(index));
    }

    /// The held flags are those in the page.
    pub fn adopt_flags(&mut self, held: &Page) {
        let any = |index: &usize| {
            let mut words = slot(held, *index).iter();
            words.any(|word| word.load(Ordering::Relaxed) != 0)
        };
        self.flags = (0..SINTS)
            .filter(any)
            .fold(0, |set, index| set | one(index));
    }

    /// The VMM wants to know when these sources can take a message.
    pub fn want(&mut self, set: Sources) {
        self.wanted = set;
    }

    /// Those that can now. They are not wanted any more.
    pub fn take_wanted(&mut self) -> Sources {
        let can = self.wanted & !self.messages;
        self.wanted &= !can;
        can
    }

    /// Forgets everything.
    pub fn reset(&mut self, held_flags: &Page) {
        for index in sources(self.flags) {
            clear(slot(held_flags, index));
        }
        *self = Self::new();
    }
}

/// The part of a page that belongs to a source.
fn slot(page: &Page, index: usize) -> &[AtomicU64] {
    page.chunks_exact(WORDS).nth(index).unwrap_or(&[])
}

fn clear(slot: &[AtomicU64]) {
    for word in slot {
        word.store(0, Ordering::Relaxed);
    }
}

fn read(slot: &[AtomicU64]) -> Message {
    let mut message = [0; WORDS];
    for (to, from) in message.iter_mut().zip(slot) {
        *to = from.load(Ordering::Relaxed);
    }
    message
}

/// Writes a message, its type last: who sees the type sees the rest.
fn write(slot: &[AtomicU64], message: &Message) {
    let ([first, rest @ ..], [head, body @ ..]) = (message, slot) else {
        return;
    };
    for (to, from) in body.iter().zip(rest) {
        to.store(*from, Ordering::Relaxed);
    }
    head.store(first & !header::FLAGS, Ordering::Release);
}

/// Writes a message into a free slot of the guest; marks one that is not free.
fn put(slot: &[AtomicU64], message: &Message) -> bool {
    let Some(head) = slot.first() else {
        return false;
    };
    // Marked first, and looked at then: a guest that frees the slot after this sees the mark.
    if head.load(Ordering::Acquire) & header::TYPE != 0
        && head.fetch_or(header::PENDING, Ordering::AcqRel) & header::TYPE != 0
    {
        return false;
    }
    write(slot, message);
    true
}

#[cfg(test)]
#[allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::boxed::Box;

    const SIMP: u64 = 0x5000 | ENABLE;
    const SIEFP: u64 = 0x6000 | ENABLE;

    struct Machine {
        synic: Synic,
        guest: Box<Page>,
        held: Box<Page>,
    }

    fn page() -> Box<Page> {
        Box::new([const { AtomicU64::new(0) }; 512])
    }

    fn message(kind: u32, value: u64) -> Message {
        let mut message = [0; WORDS];
        message[0] = u64::from(kind) | 8 << 32;
        message[2] = value;
        message
    }

    impl Machine {
        fn new() -> Self {
            Self {
                synic: Synic::new(),
                guest: page(),
                held: page(),
            }
        }

        /// With everything on, source `n` on vector 30h + n.
        fn open() -> Self {
            let mut machine = Self::new();
            let mut registers = Registers {
                control: ENABLE,
                simp: SIMP,
                siefp: SIEFP,
                ..Registers::RESET
            };
            for (index, source) in registers.sint.iter_mut().enumerate() {
                *source = 0x30 + index as u64;
            }
            machine.synic.set_registers(registers);
            machine
        }

        fn post(&mut self, index: usize, message: &Message) -> Result<bool, HvStatus> {
            let there = self.synic.registers().message_page().is_some();
            let guest = there.then_some(&*self.guest);
            self.synic.post(guest, &self.held, index, message)
        }

        fn signal(&mut self, index: usize, flag: u16) -> Result<(bool, bool), HvStatus> {
            let there = self.synic.registers().event_page().is_some();
            let guest = there.then_some(&*self.guest);
            self.synic.signal(guest, &self.held, index, flag)
        }

        fn deliver_messages(&mut self) -> Sources {
            self.synic.deliver_messages(&self.guest, &self.held)
        }

        fn deliver_flags(&mut self) -> Sources {
            self.synic.deliver_flags(&self.guest, &self.held)
        }

        fn head(&self, index: usize) -> u64 {
            self.guest[index * WORDS].load(Ordering::Relaxed)
        }

        /// The guest takes its message; true if it has to say so.
        fn take(&mut self, index: usize) -> (u32, u64, bool) {
            let slot = slot(&self.guest, index);
            let old = slot[0].fetch_and(!header::TYPE, Ordering::AcqRel);
            let value = slot[2].load(Ordering::Relaxed);
            (old as u32, value, old & header::PENDING != 0)
        }
    }

    #[test]
    fn message_reaches_its_slot() {
        let mut m = Machine::open();
        assert_eq!(m.post(2, &message(1, 77)), Ok(true));
        assert_eq!(m.head(2), 1 | 8 << 32);
        assert_eq!(m.take(2), (1, 77, false));
        assert_eq!(m.synic.registers().vector(2), Some(0x32));
        assert!((0..SINTS).all(|index| index == 2 || m.head(index) == 0));
    }

    #[test]
    fn second_message_waits_and_third_is_refused() {
        let mut m = Machine::open();
        assert_eq!(m.post(2, &message(1, 1)), Ok(true));
        assert_eq!(m.post(2, &message(1, 2)), Ok(false));
        assert_eq!(
            m.post(2, &message(1, 3)),
            Err(HvStatus::INSUFFICIENT_BUFFERS)
        );
        // Another source has nothing to do with it.
        assert_eq!(m.post(3, &message(1, 4)), Ok(true));
        assert_eq!(m.deliver_messages(), 0);
        assert_eq!(m.take(2), (1, 1, true));
        assert_eq!(m.deliver_messages(), 1 << 2);
        assert_eq!(m.deliver_messages(), 0);
        assert_eq!(m.take(2), (1, 2, false));
    }

    #[test]
    fn what_comes_before_the_guest_listens_is_held() {
        let mut m = Machine::new();
        assert_eq!(m.post(5, &message(1, 9)), Ok(false));
        assert_eq!(m.signal(5, 2047), Ok((true, false)));
        assert_eq!(m.signal(5, 2047), Ok((false, false)));
        assert_eq!((m.deliver_messages(), m.deliver_flags()), (0, 0));
        let mut registers = *Machine::open().synic.registers();
        registers.sint[5] |= sint::MASKED;
        m.synic.set_registers(registers);
        assert_eq!((m.deliver_messages(), m.deliver_flags()), (0, 0));
        registers.sint[5] &= !sint::MASKED;
        m.synic.set_registers(registers);
        assert_eq!(m.deliver_messages(), 1 << 5);
        assert_eq!(m.take(5), (1, 9, false));
        for word in m.guest.iter() {
            word.store(0, Ordering::Relaxed);
        }
        assert_eq!(m.deliver_flags(), 1 << 5);
        assert_eq!(slot(&m.guest, 5)[31].load(Ordering::Relaxed), 1 << 63);
        assert!(m.synic.is_idle());
    }

    #[test]
    fn flag_that_is_set_is_not_new() {
        let mut m = Machine::open();
        assert_eq!(m.signal(0, 65), Ok((true, true)));
        assert_eq!(m.signal(0, 65), Ok((false, true)));
        assert_eq!(slot(&m.guest, 0)[1].load(Ordering::Relaxed), 2);
    }

    #[test]
    fn bad_parameters_are_refused() {
        let mut m = Machine::open();
        let bad = Err(HvStatus::INVALID_PARAMETER);
        assert_eq!(m.post(16, &message(1, 0)), bad);
        let mut long = message(1, 0);
        long[0] = 1 | 241 << 32;
        assert_eq!(m.post(0, &long), bad);
        assert_eq!(m.signal(16, 0), Err(HvStatus::INVALID_PARAMETER));
        assert_eq!(m.signal(0, 2048), Err(HvStatus::INVALID_PARAMETER));
        assert_eq!(m.post(0, &message(0, 0)), Ok(false));
        assert!(m.synic.is_idle() && m.head(0) == 0);
    }

    #[test]
    fn sender_does_not_set_the_flags_of_a_slot() {
        let mut m = Machine::open();
        let mut sly = message(1, 0);
        sly[0] |= header::PENDING;
        assert_eq!(m.post(0, &sly), Ok(true));
        assert_eq!(m.head(0) & header::FLAGS, 0);
    }

    #[test]
    fn polled_source_has_no_interrupt() {
        let mut registers = *Machine::open().synic.registers();
        registers.sint[1] |= sint::POLLING;
        registers.sint[2] |= sint::AUTO_EOI;
        registers.sint[3] |= sint::AUTO_EOI | sint::MASKED;
        assert_eq!(registers.vector(1), None);
        assert!(registers.auto_eoi_vectors().eq([0x32]));
    }

    #[test]
    fn vmm_hears_of_a_source_once() {
        let mut m = Machine::new();
        assert_eq!(m.post(2, &message(1, 1)), Ok(false));
        m.synic.want(1 << 2 | 1 << 7);
        assert_eq!(m.synic.take_wanted(), 1 << 7);
        assert_eq!(m.synic.take_wanted(), 0);
        m.synic.set_registers(*Machine::open().synic.registers());
        m.deliver_messages();
        assert_eq!(m.synic.take_wanted(), 1 << 2);
        assert_eq!(m.synic.take_wanted(), 0);
    }

    #[test]
    fn reset_forgets_what_was_held() {
        let mut m = Machine::new();
        let _ = (m.post(1, &message(1, 1)), m.signal(1, 5));
        m.synic.reset(&m.held);
        m.synic.set_registers(*Machine::open().synic.registers());
        assert_eq!((m.deliver_messages(), m.deliver_flags()), (0, 0));
        // The page of messages still has the old one; nothing says so.
        assert!(m.synic.is_idle());
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Post(usize),
        Take(usize),
        Mask(usize, bool),
        Control(bool),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..3_usize).prop_map(Step::Post),
            (0..3_usize).prop_map(Step::Take),
            (0..3_usize, any::<bool>()).prop_map(|(index, on)| Step::Mask(index, on)),
            any::<bool>().prop_map(Step::Control),
        ]
    }

    proptest! {
        /// Messages that were accepted arrive once and in order, whatever the guest does in between, if it says when it frees
        /// a marked slot.
        #[test]
        fn messages_arrive_in_order(steps in prop::collection::vec(step(), 0..200)) {
            let mut m = Machine::open();
            let mut registers = *m.synic.registers();
            let (mut sent, mut got) = ([0_u64; 3], [0_u64; 3]);
            let finish = (0..3).flat_map(|i| [Step::Mask(i, false), Step::Take(i), Step::Take(i)]);
            for step in steps.into_iter().chain([Step::Control(true)]).chain(finish) {
                match step {
                    Step::Post(i) => {
                        if m.post(i, &message(1, sent[i] + 1)).is_ok() {
                            sent[i] += 1;
                        }
                    }
                    Step::Take(i) => {
                        let (kind, value, marked) = m.take(i);
                        if kind != 0 {
                            got[i] += 1;
                            prop_assert_eq!(value, got[i]);
                        }
                        if marked {
                            m.deliver_messages();
                        }
                    }
                    Step::Mask(i, on) => {
                        registers.sint[i] = (registers.sint[i] & !sint::MASKED) | if on { sint::MASKED } else { 0 };
                        m.synic.set_registers(registers);
                        m.deliver_messages();
                    }
                    Step::Control(on) => {
                        registers.control = on.into();
                        m.synic.set_registers(registers);
                        m.deliver_messages();
                    }
                }
            }
            prop_assert_eq!(sent, got);
        }
    }
}
