// SPDX-License-Identifier: GPL-2.0
//! Doorbells (ioeventfd): a write of the guest to an address or port that only signals an eventfd.
//!
//! They are matched when the VP leaves with the write, before the VMM sees it. What cannot be finished here (an
//! instruction that is not a plain store, string I/O) goes to the VMM as if there were no doorbell.

use core::sync::atomic::Ordering;

use kernel::prelude::*;

use super::partition::Partition;
use super::vp::{quad, word, Message, Vp, PAYLOAD};
use crate::abi::hypercall::{PortSet, PortWrite};
use crate::sys::{self, EventFd};
use crate::x86::access::{decode, Access, Mode, Operation, Source};

/// Doorbells of one partition: nobody needs more.
const MOST: usize = 65536;
/// HV_X64_REGISTER_RAX; the general registers follow in their order.
const REGISTER_RAX: u32 = 0x2_0000;
/// RFLAGS.TF.
const TRAP_FLAG: u64 = 1 << 8;

/// What a client asks.
pub(crate) struct DoorbellRequest {
    /// I/O port instead of guest-physical address.
    pub(crate) port: bool,
    /// Where.
    pub(crate) address: u64,
    /// Width of the write in bytes; 0 for any.
    pub(crate) length: u32,
    /// The value that must be written, or any.
    pub(crate) data: Option<u64>,
    /// What is signalled.
    pub(crate) event: EventFd,
}

impl DoorbellRequest {
    fn key(&self) -> (bool, u64) {
        (self.port, self.address)
    }

    fn collides(&self, other: &Self) -> bool {
        self.key() == other.key()
            && self.length == other.length
            && (self.data.is_none() || other.data.is_none() || self.data == other.data)
    }
}

/// Sorted by kind and address.
pub(crate) struct Doorbells(KVVec<DoorbellRequest>);

impl Doorbells {
    /// None.
    pub(super) fn new() -> Self {
        Self(KVVec::new())
    }

    /// Those at one place.
    fn at(&self, port: bool, address: u64) -> &[DoorbellRequest] {
        let from = self.0.partition_point(|bell| bell.key() < (port, address));
        let rest = self.0.get(from..).unwrap_or(&[]);
        let count = rest
            .iter()
            .take_while(|bell| bell.key() == (port, address))
            .count();
        rest.get(..count).unwrap_or(&[])
    }

    fn add(&mut self, bell: DoorbellRequest) -> Result {
        if self
            .at(bell.port, bell.address)
            .iter()
            .any(|other| other.collides(&bell))
        {
            return Err(EEXIST);
        }
        if self.0.len() >= MOST {
            return Err(ENOSPC);
        }
        let index = self.0.partition_point(|other| other.key() < bell.key());
        self.0
            .insert_within_capacity(index, bell)
            .map_err(|_| ENOMEM)
    }

    /// Their ports. Addresses that are none do no harm.
    fn ports(&self) -> PortSet {
        let ports = self.0.iter().filter(|bell| bell.port);
        ports.fold(PortSet::default(), |set, bell| {
            set.with(bell.address as u16)
        })
    }

    /// Clients do not repeat length and data: without data in the request, place and event decide.
    fn remove(&mut self, like: &DoorbellRequest) -> Result<DoorbellRequest> {
        let index = self.0.iter().position(|bell| {
            bell.key() == like.key()
                && bell.event == like.event
                && (like.data.is_none() || (bell.data == like.data && bell.length == like.length))
        });
        self.0.remove(index.ok_or(ENOENT)?).map_err(|_| ENOENT)
    }
}

impl Partition {
    /// Adds a doorbell; `EEXIST` if it collides with one.
    pub(crate) fn add_doorbell(&self, bell: DoorbellRequest) -> Result {
        loop {
            let mut bells = self.doorbells.lock();
            let count = bells.0.len();
            if count < bells.0.capacity() || count >= MOST {
                bells.add(bell)?;
                let new = bells.ports().to_value();
                let old = self.ports.swap(new, Ordering::SeqCst);
                drop(bells);
                if new != old {
                    // No VP runs any more that was dispatched with the old set.
                    sys::call_on_each_cpu(|| {});
                }
                return Ok(());
            }
            drop(bells);
            // Memory is taken without the lock, which VPs take with interrupts off.
            let mut larger = KVVec::with_capacity((count * 2).max(16), GFP_KERNEL_ACCOUNT)?;
            let mut bells = self.doorbells.lock();
            if larger.capacity() > bells.0.len() {
                while let Some(bell) = bells.0.pop() {
                    larger.push_within_capacity(bell).map_err(|_| ENOMEM)?;
                }
                larger.reverse();
                core::mem::swap(&mut bells.0, &mut larger);
            }
        }
    }

    /// Removes a doorbell; `ENOENT` if there is none like it.
    pub(crate) fn remove_doorbell(&self, like: &DoorbellRequest) -> Result {
        let mut bells = self.doorbells.lock();
        let removed = bells.remove(like);
        self.ports
            .store(bells.ports().to_value(), Ordering::Relaxed);
        drop(bells);
        // Dropped without the lock.
        removed.map(drop)
    }

    /// A VP wrote to guest-physical memory that is not there. If that was a doorbell, it has been rung, and the length of
    /// the instruction is returned.
    pub(super) fn ring_memory_doorbell(&self, vp: &Vp, message: &Message) -> Result<Option<u8>> {
        let bells = self.doorbells.lock();
        let bells = bells.at(false, quad(message, PAYLOAD + 56));
        if bells.is_empty() || quad(message, PAYLOAD + 32) & TRAP_FLAG != 0 {
            return Ok(None);
        }
        let count = (word(message, PAYLOAD + 44) & 0xff).min(16) as usize;
        let (low, high) = (quad(message, PAYLOAD + 64), quad(message, PAYLOAD + 72));
        let bytes = (u128::from(low) | u128::from(high) << 64).to_le_bytes();
        let bytes = bytes.get(..count).unwrap_or(&[]);
        let Some(Access {
            length,
            size,
            operation: Operation::Store(source),
        }) = decode(bytes, mode(message))
        else {
            return Ok(None);
        };
        let Some(bell) = pick(bells, u32::from(size), || {
            let mut registers = [0; 16];
            if let Source::Register(register) = source {
                if let Some(slot) = registers.get_mut(usize::from(register.number)) {
                    *slot = vp.register(self, REGISTER_RAX + u32::from(register.number))?;
                }
            }
            Ok(source.value(&registers, size))
        })?
        else {
            return Ok(None);
        };
        bell.event.signal();
        Ok(Some(length))
    }

    /// A VP wrote to a port. True if that was a doorbell, which has been rung. Any context.
    pub(super) fn ring_port_doorbell(&self, write: PortWrite) -> bool {
        let bells = self.doorbells.lock();
        let size = u32::from(write.size);
        let mask = u32::MAX >> (32 - 8 * size.clamp(1, 4));
        let bells = bells.at(true, write.port.into());
        match pick(bells, size, || Ok((write.value & mask).into())) {
            Ok(Some(bell)) => {
                bell.event.signal();
                true
            }
            _ => false,
        }
    }
}

/// The doorbell that a write of this size rings.
fn pick<'a>(
    bells: &'a [DoorbellRequest],
    size: u32,
    value: impl FnOnce() -> Result<u64>,
) -> Result<Option<&'a DoorbellRequest>> {
    let fits = |bell: &&DoorbellRequest| bell.length == 0 || bell.length == size;
    if let Some(bell) = bells.iter().filter(fits).find(|bell| bell.data.is_none()) {
        return Ok(Some(bell));
    }
    if !bells.iter().any(|bell| fits(&bell)) {
        return Ok(None);
    }
    let value = value()?;
    Ok(bells
        .iter()
        .filter(fits)
        .find(|bell| bell.data == Some(value)))
}

/// Mode of the code that made a message: EFER.LMA, and L and D of CS.
fn mode(message: &Message) -> Mode {
    let long = word(message, PAYLOAD + 6) & (1 << 4) != 0;
    let attributes = word(message, PAYLOAD + 8 + 14);
    match (
        long && attributes & (1 << 13) != 0,
        attributes & (1 << 14) != 0,
    ) {
        (true, _) => Mode::Bits64,
        (_, true) => Mode::Bits32,
        _ => Mode::Bits16,
    }
}
