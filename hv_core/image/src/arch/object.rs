// SPDX-License-Identifier: GPL-2.0
//! Partitions and virtual processors as objects in pages of the hypervisor.
//!
//! A [`Handle`] is the address of such an object. Objects live until their partition is deleted, which waits
//! until nobody uses the partition: [`Partition::users`](crate::partition::Partition::users).

use core::cell::UnsafeCell;
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};
use core::sync::atomic::{AtomicU8, Ordering};

use super::memory::direct;
use crate::child_cpuid::Overrides;
use crate::vp::{Vp, VpCore};

/// Address of an object in a page of its own.
pub struct Handle<T> {
    spa: u64,
    kind: PhantomData<*const T>,
}

impl<T> Clone for Handle<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Handle<T> {}

// SAFETY: a handle is an address; what it gives out is `Sync`.
unsafe impl<T: Sync> Send for Handle<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Handle<T> {}

impl<T: Sync> Handle<T> {
    /// Puts `value` into the page at `spa`, which the caller took from a pool.
    pub fn place(spa: u64, value: T) -> Self {
        const { assert!(size_of::<T>() <= 4096 && align_of::<T>() <= 4096) };
        // SAFETY: the page is the caller's and in the direct map.
        unsafe { direct(spa).cast::<T>().write(value) };
        Self {
            spa,
            kind: PhantomData,
        }
    }

    /// The object at `spa`, where one was placed.
    pub fn at(spa: u64) -> Self {
        Self {
            spa,
            kind: PhantomData,
        }
    }

    /// SPA of the object.
    pub fn spa(self) -> u64 {
        self.spa
    }

    /// The object.
    pub fn get(self) -> &'static T {
        // SAFETY: handles exist only for objects that were placed, and go away before their page does (see the
        // module's text).
        unsafe { &*direct(self.spa).cast::<T>() }
    }
}

/// A cell that one CPU at a time owns, also across a world switch.
pub struct Owned<T> {
    value: UnsafeCell<T>,
    state: AtomicU8,
}

/// States of an [`Owned`]: nobody's, in use, and taken by a CPU that does something else before it goes on with it.
mod state {
    pub(super) const FREE: u8 = 0;
    pub(super) const IN_USE: u8 = 1;
    pub(super) const ASIDE: u8 = 2;
}

// SAFETY: only from `FREE` a CPU gets it, one at a time.
unsafe impl<T: Send> Sync for Owned<T> {}

impl<T> Owned<T> {
    /// A free cell. The value is at offset 0.
    pub const fn new(value: T) -> Self {
        Self {
            value: UnsafeCell::new(value),
            state: AtomicU8::new(state::FREE),
        }
    }

    /// Whether somebody uses it. Whoever begins to after a `false`, by [`Self::acquire`] or [`Self::take_up`], sees what the caller
    /// wrote before, if all of it is `SeqCst`.
    pub fn is_in_use(&self) -> bool {
        self.state.load(Ordering::SeqCst) == state::IN_USE
    }

    /// Takes the cell, unless somebody has it.
    pub fn acquire(&self) -> Option<Ownership<'_, T>> {
        self.state
            .compare_exchange(
                state::FREE,
                state::IN_USE,
                Ordering::SeqCst,
                Ordering::Relaxed,
            )
            .is_ok()
            // Not made before it is owned: its drop frees the cell.
            .then(|| Ownership { cell: self })
    }

    /// Takes up an ownership that [`Ownership::keep`] or [`Ownership::put_aside`] left standing, in the state in which it is.
    ///
    /// # Safety
    /// The caller's CPU is the one that left it, and it does so once.
    pub unsafe fn resume(&self) -> Ownership<'_, T> {
        Ownership { cell: self }
    }

    /// Uses the cell again after [`Ownership::put_aside`].
    ///
    /// # Safety
    /// As for [`Self::resume`], and it is aside.
    #[inline(always)]
    pub unsafe fn take_up(&self) -> Ownership<'_, T> {
        const { assert!(state::ASIDE - 1 == state::IN_USE) };
        // One instruction; nobody else changes what is aside.
        self.state.fetch_sub(1, Ordering::SeqCst);
        Ownership { cell: self }
    }
}

/// Owns the value of an [`Owned`].
pub struct Ownership<'a, T> {
    cell: &'a Owned<T>,
}

impl<T> Ownership<'_, T> {
    /// Keeps the cell taken beyond this value's life: the CPU goes into the guest with it.
    pub fn keep(self) {
        core::mem::forget(self);
    }

    /// The same, but for [`Owned::is_in_use`] nobody uses it until [`Owned::take_up`].
    #[inline(always)]
    pub fn put_aside(self) {
        self.cell.state.store(state::ASIDE, Ordering::Release);
        self.keep();
    }
}

impl<T> Deref for Ownership<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: this value is the only way to the cell.
        unsafe { &*self.cell.value.get() }
    }
}

impl<T> DerefMut for Ownership<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: this value is the only way to the cell.
        unsafe { &mut *self.cell.value.get() }
    }
}

impl<T> Drop for Ownership<'_, T> {
    fn drop(&mut self) {
        self.cell.state.store(state::FREE, Ordering::Release);
    }
}

/// The VP whose registers the exit code stored at `context`.
pub fn running(context: u64) -> &'static Vp {
    const { assert!(core::mem::offset_of!(Vp, core) == 0) };
    const { assert!(core::mem::offset_of!(VpCore, state) == 0) };
    // SAFETY: `CpuArea::current` is the root's context or that of a VP, whose context is at its start.
    unsafe { &*(context as *const Vp) }
}

/// A page that the VMM or the root's kernel shares, as atomics.
pub fn shared<T: Sync>(spa: u64) -> &'static T {
    const { assert!(size_of::<T>() <= 4096) };
    // SAFETY: state pages are in the direct map while they are mapped. `T` consists of atomics at every use, of which any bytes
    // are valid values: the other side may write at the same time.
    unsafe { &*direct(spa).cast::<T>() }
}

/// A whole page as bytes, owned by the caller.
pub fn page_bytes(spa: u64) -> &'static mut [u8; 4096] {
    // SAFETY: the callers own the page (the XSAVE area of a VP that they own).
    unsafe { &mut *direct(spa).cast::<[u8; 4096]>() }
}

/// The scratch page of CPU `cpu`: contents last until the next user on it.
pub fn scratch(cpu: u32) -> &'static mut [u8; 4096] {
    #[cfg(not(target_os = "none"))]
    let address = super::host::scratch(cpu);
    #[cfg(target_os = "none")]
    let address = hv_abi::layout::cpu_page(cpu as usize, hv_abi::layout::cpu_block::SCRATCH);
    // SAFETY: mapped by the loader; only the CPU itself uses it, and the image is not preempted.
    unsafe { &mut *(address as *mut [u8; 4096]) }
}

/// The registered CPUID results of a VP.
pub fn overrides(spa: u64) -> &'static Overrides {
    const { assert!(size_of::<Overrides>() <= 4096) };
    // SAFETY: the page was taken for it, all-zero is the empty table, and the caller owns the VP.
    unsafe { &*direct(spa).cast::<Overrides>() }
}

/// The same, to change.
pub fn overrides_mut(spa: u64) -> &'static mut Overrides {
    // SAFETY: as for `overrides`; the owner of the VP is the only one to look at it.
    unsafe { &mut *direct(spa).cast::<Overrides>() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cell_stays_its_owners_whoever_else_wants_it() {
        let cell = Owned::new(0);
        let owner = cell.acquire().expect("nobody has it");
        for _ in 0..2 {
            assert!(cell.acquire().is_none());
        }
        assert!(cell.is_in_use());
        owner.put_aside();
        for _ in 0..2 {
            assert!(cell.acquire().is_none());
        }
        assert!(!cell.is_in_use());
        // SAFETY: put aside by this thread, and taken up once.
        drop(unsafe { cell.take_up() });
        assert!(cell.acquire().is_some());
    }
}
