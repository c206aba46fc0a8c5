// SPDX-License-Identifier: GPL-2.0
//! Doorbells (ioeventfd): a write of the guest to an address or port that only signals an eventfd.
//!
//! They are matched when the VP leaves with the write, before the VMM sees it. What cannot be finished here (an
//! instruction that is not a plain store, string I/O) goes to the VMM as if there were no doorbell.

use core::sync::atomic::{AtomicPtr, Ordering};

use kernel::prelude::*;

use super::partition::Partition;
use super::vp::{quad, word, Message, Vp, PAYLOAD};
use crate::abi::hypercall::{PortSet, PortWrite};
use crate::sys::{self, EventAlias, EventFd, IrqsOff};
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

    /// Adds it, or gives it back if there is no room.
    fn add(&mut self, bell: DoorbellRequest) -> Result<Option<DoorbellRequest>> {
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
        if self.0.len() == self.0.capacity() {
            return Ok(Some(bell));
        }
        let index = self.0.partition_point(|other| other.key() < bell.key());
        self.0
            .insert_within_capacity(index, bell)
            .map_err(|_| ENOMEM)?;
        Ok(None)
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

/// A doorbell that has its port for itself: what a dispatch says of writes that ring it.
#[repr(align(32))]
struct QuickBell {
    mask: u64,
    value: u64,
    event: EventAlias,
}

impl QuickBell {
    /// Rung by nothing.
    const NONE: Self = Self {
        mask: 0,
        value: 1,
        event: EventAlias::NONE,
    };

    /// `None` for those that need more than a comparison.
    fn of(port: u16, bell: &DoorbellRequest) -> Option<Self> {
        let write = |size, value| {
            PortWrite {
                port,
                size,
                length: 0,
                value,
            }
            .to_value()
        };
        let no_length = !PortWrite::LENGTH_MASK & 0xffff_ffff;
        let (mask, value) = match (bell.length, bell.data) {
            (0, None) => (no_length & !PortWrite::SIZE_MASK, write(0, 0)),
            (size @ (1 | 2 | 4), None) => (no_length, write(size as u8, 0)),
            _ => return None,
        };
        Some(Self {
            mask,
            value,
            event: bell.event.alias(),
        })
    }
}

/// One for each bit of a [`PortSet`].
struct QuickTable([QuickBell; PortSet::BITS]);

impl QuickTable {
    fn new() -> Result<KBox<Self>> {
        Ok(KBox::new(
            Self([const { QuickBell::NONE }; PortSet::BITS]),
            GFP_KERNEL_ACCOUNT,
        )?)
    }

    fn fill(&mut self, bells: &Doorbells) {
        for bell in bells.0.iter().filter(|bell| bell.port) {
            let (Ok(port), [_]) = (u16::try_from(bell.address), bells.at(true, bell.address))
            else {
                continue;
            };
            let slot = &mut self.0[PortSet::bit(port)];
            if slot.event.is_none() {
                *slot = QuickBell::of(port, bell).unwrap_or(QuickBell::NONE);
            }
        }
    }
}

/// The table that VPs look at, with interrupts off. A table that was replaced is in use until every CPU has had them on.
pub(super) struct QuickBells(AtomicPtr<QuickTable>);

impl QuickBells {
    /// Without doorbells.
    pub(super) fn new() -> Result<Self> {
        Ok(Self(AtomicPtr::new(KBox::into_raw(QuickTable::new()?))))
    }

    /// A dispatch came back with `value`. True if that was a write to a doorbell, which has been rung.
    #[inline(always)]
    pub(super) fn ring(&self, value: u64, _: &IrqsOff) -> bool {
        // SAFETY: with interrupts off it stays.
        let table = unsafe { &*self.0.load(Ordering::Acquire) };
        let bell = &table.0[PortSet::bit((value >> 16) as u16)];
        if value & bell.mask != bell.value {
            return false;
        }
        // SAFETY: only one of a doorbell has such a value, and none is dropped while a table with it may be in use
        // (`Partition::change_doorbells`).
        unsafe { bell.event.signal() };
        true
    }

    fn replace(&self, table: KBox<QuickTable>) -> KBox<QuickTable> {
        let old = self.0.swap(KBox::into_raw(table), Ordering::AcqRel);
        // SAFETY: made by `into_raw`, and no longer ours.
        unsafe { KBox::from_raw(old) }
    }
}

impl Drop for QuickBells {
    fn drop(&mut self) {
        // SAFETY: as above; nobody uses it.
        drop(unsafe { KBox::from_raw(*self.0.get_mut()) });
    }
}

impl Partition {
    /// Adds a doorbell; `EEXIST` if it collides with one.
    pub(crate) fn add_doorbell(&self, bell: DoorbellRequest) -> Result {
        let mut bell = Some(bell);
        while let Some(new) = bell.take() {
            self.make_room_for_doorbells()?;
            // Another thread may have taken the room.
            bell = self.change_doorbells(|bells| bells.add(new))?;
        }
        Ok(())
    }

    /// Memory is taken without the lock, which VPs take with interrupts off.
    fn make_room_for_doorbells(&self) -> Result {
        let bells = self.doorbells.lock();
        let (count, room) = (bells.0.len(), bells.0.capacity());
        drop(bells);
        if count < room || count >= MOST {
            return Ok(());
        }
        let mut larger = KVVec::with_capacity((count * 2).max(16), GFP_KERNEL_ACCOUNT)?;
        let mut bells = self.doorbells.lock();
        if larger.capacity() > bells.0.len() {
            while let Some(bell) = bells.0.pop() {
                larger.push_within_capacity(bell).map_err(|_| ENOMEM)?;
            }
            larger.reverse();
            core::mem::swap(&mut bells.0, &mut larger);
        }
        Ok(())
    }

    /// Removes a doorbell; `ENOENT` if there is none like it.
    pub(crate) fn remove_doorbell(&self, like: &DoorbellRequest) -> Result {
        // Dropped without the lock.
        self.change_doorbells(|bells| bells.remove(like)).map(drop)
    }

    /// Afterwards no VP runs that was dispatched with the old set of ports, and none looks at the old table.
    fn change_doorbells<R>(&self, change: impl FnOnce(&mut Doorbells) -> Result<R>) -> Result<R> {
        let mut table = QuickTable::new()?;
        let mut bells = self.doorbells.lock();
        let changed = change(&mut bells)?;
        table.fill(&bells);
        self.ports.store(bells.ports().to_value(), Ordering::SeqCst);
        let old = self.quick_doorbells.replace(table);
        drop(bells);
        sys::call_on_each_cpu(|| {});
        drop(old);
        Ok(changed)
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
