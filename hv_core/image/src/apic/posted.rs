// SPDX-License-Identifier: GPL-2.0
//! The mailbox through which every CPU reaches a VP's APIC without a lock.
//!
//! A [`LocalApic`] is touched by one CPU only: the one that runs its VP. All others post here. The
//! VP's CPU drains the mailbox before it looks for something to deliver.
//!
//! Ordering: a post first leaves its message, then raises `outstanding`; draining first lowers
//! `outstanding`, then takes the messages. So a message is either taken by the drain under way or
//! seen as outstanding by the next.

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use super::ipi::{Addressing, DeliveryMode, Destination, Interrupt};
use super::LocalApic;

const NMI: u32 = 1 << 0;
const INIT: u32 = 1 << 1;
const SIPI: u32 = 1 << 2;
const EXT_INT: u32 = 1 << 3;
const LINT0: u32 = 1 << 4;
const LINT1: u32 = 1 << 5;
const SIPI_SHIFT: u32 = 8;
const EXT_INT_SHIFT: u32 = 16;
const LINT_SHIFT: u32 = 24;

/// Interrupts on their way to one VP.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Posted {
    irr: [AtomicU64; 4],
    /// Trigger mode of the vector's latest post. Not cleared by draining: a second post of a level
    /// interrupt would otherwise lose its mode to a drain in between.
    level: [AtomicU64; 4],
    /// Signals in bits 5:0; SIPI vector 15:8; ExtINT vector 23:16; vector for the LINT pins 31:24.
    signals: AtomicU32,
    outstanding: AtomicBool,
    /// TMR reads as zero.
    hides_trigger_modes: AtomicBool,
    addressing: AtomicU64,
}

impl Posted {
    /// An empty mailbox of a VP that is not reachable yet: see [`Self::publish`].
    #[must_use]
    pub const fn new() -> Self {
        Self {
            irr: [const { AtomicU64::new(0) }; 4],
            level: [const { AtomicU64::new(0) }; 4],
            signals: AtomicU32::new(0),
            outstanding: AtomicBool::new(false),
            hides_trigger_modes: AtomicBool::new(false),
            addressing: AtomicU64::new(0),
        }
    }

    /// Tells the other CPUs how this APIC is addressed. To be called at creation and after each
    /// [`WriteEffect::AddressingChanged`](super::WriteEffect::AddressingChanged) or change of
    /// IA32_APIC_BASE.
    pub fn publish(&self, addressing: Addressing) {
        self.addressing
            .store(addressing.to_bits(), Ordering::Release);
    }

    /// True if a message to `destination` is for this VP, by the addressing published last.
    #[inline]
    #[must_use]
    pub fn matches(&self, destination: Destination, is_sender: bool) -> bool {
        Addressing::from_bits(self.addressing.load(Ordering::Acquire))
            .matches(destination, is_sender)
    }

    /// Posts `interrupt` from any CPU. True if the mailbox was empty: the caller then has to make sure
    /// that the VP's CPU looks at it.
    #[inline]
    pub fn post(&self, interrupt: Interrupt) -> bool {
        let vector = u32::from(interrupt.vector);
        match interrupt.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                self.post_vector(interrupt.vector, interrupt.level);
            }
            DeliveryMode::Smi => return false,
            DeliveryMode::Nmi => self.signal(NMI, 0, 0),
            DeliveryMode::Init => self.signals.store(INIT, Ordering::Release),
            DeliveryMode::Startup => self.signal(SIPI, vector, SIPI_SHIFT),
            DeliveryMode::ExtInt => self.signal(EXT_INT, vector, EXT_INT_SHIFT),
            DeliveryMode::LocalInt0 => self.signal(LINT0, vector, LINT_SHIFT),
            DeliveryMode::LocalInt1 => self.signal(LINT1, vector, LINT_SHIFT),
        }
        !self.outstanding.swap(true, Ordering::AcqRel)
    }

    /// TMR reads as zero in the guest from the next drain on, though ends of level-triggered interrupts are still reported. For VMMs
    /// that do not act on the report, as QEMU: Linux then ends such an interrupt in the I/O APIC, too.
    pub fn hide_trigger_modes(&self) {
        self.hides_trigger_modes.store(true, Ordering::Release);
    }

    #[inline]
    fn post_vector(&self, vector: u8, level: bool) {
        let index = usize::from(vector >> 6);
        let bit = 1_u64 << (vector & 63);
        let (Some(irr), Some(trigger)) = (self.irr.get(index), self.level.get(index)) else {
            return;
        };
        if level != (trigger.load(Ordering::Relaxed) & bit != 0) {
            if level {
                trigger.fetch_or(bit, Ordering::Relaxed);
            } else {
                trigger.fetch_and(!bit, Ordering::Relaxed);
            }
        }
        irr.fetch_or(bit, Ordering::Release);
    }

    /// Raises a signal. One that is up already keeps its vector, like a latch.
    fn signal(&self, flag: u32, vector: u32, shift: u32) {
        let raise = |old: u32| {
            if old & flag != 0 {
                return None;
            }
            let kept = if shift == 0 {
                old
            } else {
                old & !(0xff << shift)
            };
            Some(kept | flag | (vector << shift))
        };
        // An error means that there is nothing to change.
        let _ = self
            .signals
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, raise);
    }

    /// Makes the VP look what there is at its next exit, and before it runs if the caller sees it not in use after this.
    pub fn alert(&self) {
        self.outstanding.store(true, Ordering::SeqCst);
    }

    /// True if something has been posted since the last drain.
    #[inline]
    #[must_use]
    pub fn is_outstanding(&self) -> bool {
        self.outstanding.load(Ordering::SeqCst)
    }

    /// Moves everything into `apic`; on the VP's own CPU only. True if something was outstanding.
    #[inline]
    pub fn drain_into(&self, apic: &mut LocalApic) -> bool {
        if !self.is_outstanding() || !self.outstanding.swap(false, Ordering::AcqRel) {
            return false;
        }
        apic.hides_trigger_modes = self.hides_trigger_modes.load(Ordering::Acquire);
        if self.signals.load(Ordering::Acquire) != 0 {
            self.drain_signals(apic);
        }
        for (index, (irr, level)) in self.irr.iter().zip(&self.level).enumerate() {
            if irr.load(Ordering::Acquire) != 0 {
                let new = irr.swap(0, Ordering::AcqRel);
                apic.accept_word(index, new, level.load(Ordering::Acquire));
            }
        }
        true
    }

    /// INIT comes first: what was posted after it must survive it (posting it dropped what was before).
    #[cold]
    fn drain_signals(&self, apic: &mut LocalApic) {
        let signals = self.signals.swap(0, Ordering::AcqRel);
        let order = [
            (INIT, DeliveryMode::Init, 0),
            (SIPI, DeliveryMode::Startup, SIPI_SHIFT),
            (NMI, DeliveryMode::Nmi, 0),
            (EXT_INT, DeliveryMode::ExtInt, EXT_INT_SHIFT),
            (LINT0, DeliveryMode::LocalInt0, LINT_SHIFT),
            (LINT1, DeliveryMode::LocalInt1, LINT_SHIFT),
        ];
        for (flag, mode, shift) in order {
            if signals & flag != 0 {
                apic.accept(Interrupt {
                    mode,
                    vector: (signals >> shift) as u8,
                    level: false,
                });
            }
        }
    }
}

impl Default for Posted {
    fn default() -> Self {
        Self::new()
    }
}
