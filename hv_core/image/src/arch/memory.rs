// SPDX-License-Identifier: GPL-2.0
//! Memory as the image reaches it: the direct map of its own pages, and windows on all others.

#[cfg(target_os = "none")]
use core::arch::asm;
use core::cell::UnsafeCell;
use core::ops::{Deref, DerefMut};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hv_abi::layout::PAGE_SIZE;
#[cfg(target_os = "none")]
use hv_abi::layout::{CPU_BASE, CPU_STRIDE, CPU_WINDOWS, DIRECT_BASE};
use hv_x86::paging::TableMemory;

#[cfg(target_os = "none")]
use crate::header::boot;
use crate::memory::PagePool;

/// Address of a page that the hypervisor owns.
#[cfg(target_os = "none")]
pub fn direct(spa: u64) -> *mut u8 {
    (DIRECT_BASE + spa) as *mut u8
}

#[cfg(not(target_os = "none"))]
pub use super::host::memory as direct;

/// A lock for short sections: the image is not preempted, so a holder always goes on.
///
/// Order: a partition's lock, that of a VP's SynIC, the hypervisor's. None is held across a world switch.
pub struct SpinLock<T> {
    taken: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: the lock admits one CPU at a time.
unsafe impl<T: Send> Sync for SpinLock<T> {}

impl<T> SpinLock<T> {
    /// A free lock.
    pub const fn new(value: T) -> Self {
        Self {
            taken: AtomicBool::new(false),
            value: UnsafeCell::new(value),
        }
    }

    /// Waits for the lock.
    pub fn lock(&self) -> Guard<'_, T> {
        while self
            .taken
            .compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed)
            .is_err()
        {
            core::hint::spin_loop();
        }
        Guard { lock: self }
    }
}

/// Holds a [`SpinLock`].
pub struct Guard<'a, T> {
    lock: &'a SpinLock<T>,
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the lock is ours.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the lock is ours.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for Guard<'_, T> {
    fn drop(&mut self) {
        self.lock.taken.store(false, Ordering::Release);
    }
}

fn entry(table: u64, index: usize) -> *mut u64 {
    direct(table).cast::<u64>().wrapping_add(index & 511)
}

impl TableMemory for PagePool {
    fn allocate(&mut self) -> Option<u64> {
        self.take()
    }

    fn free(&mut self, table: u64) {
        self.hold(table);
    }

    fn read(&self, table: u64, index: usize) -> u64 {
        // SAFETY: tables are pages of the hypervisor, which the direct map holds; the index is masked. Other
        // CPUs' page walks read and set bits in it, hence volatile.
        unsafe { entry(table, index).read_volatile() }
    }

    fn write(&mut self, table: u64, index: usize, value: u64) {
        // SAFETY: as for `read`; the caller holds the lock of the tree.
        unsafe { entry(table, index).write_volatile(value) }
    }
}

/// First eight bytes of a page of the hypervisor: the link of a free list.
pub fn link(spa: u64) -> u64 {
    // SAFETY: free pages of a pool are in the direct map.
    unsafe { direct(spa).cast::<u64>().read() }
}

/// Sets the link of a free page.
pub fn set_link(spa: u64, next: u64) {
    // SAFETY: as for `link`; the page is free, so nobody else uses it.
    unsafe { direct(spa).cast::<u64>().write(next) }
}

/// Wipes a page of the hypervisor.
pub fn wipe(spa: u64) {
    // SAFETY: the page belongs to the caller and is in the direct map.
    unsafe { core::ptr::write_bytes(direct(spa), 0, PAGE_SIZE as usize) }
}

/// Windows of a CPU, by use.
#[derive(Clone, Copy)]
#[repr(u64)]
pub enum Window {
    /// Hypercall input.
    Input = 0,
    /// Hypercall output.
    Output = 1,
    /// Guest memory: page tables and instruction bytes.
    Guest = 2,
}

/// Number of windows that the loader prepares.
pub const WINDOWS: u64 = 3;
const _: () = assert!(WINDOWS == hv_abi::layout::WINDOW_COUNT);

/// Makes the page at `spa` visible through a window of CPU `cpu` and returns its address. The same window
/// shows another page after the next call.
#[cfg(target_os = "none")]
pub fn window(cpu: u32, window: Window, spa: u64) -> *mut u8 {
    const PRESENT_RW_AD_NX: u64 = 0x63 | 1 << 63;
    const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    let address = CPU_BASE + u64::from(cpu) * CPU_STRIDE + CPU_WINDOWS + window as u64 * PAGE_SIZE;
    let info = boot();
    let mut table = info.host_cr3 & ADDRESS;
    let mut level = if info.host_levels == 5 { 5 } else { 4 };
    while level > 1 {
        let index = (address >> (12 + 9 * (level - 1))) as usize & 511;
        // SAFETY: the loader mapped the window, so every table on the way exists and is in the direct map.
        table = unsafe { entry(table, index).read() } & ADDRESS;
        level -= 1;
    }
    let index = (address >> 12) as usize & 511;
    // SAFETY: the entry is that of this CPU's window, which only this CPU uses; stale translations go.
    unsafe {
        entry(table, index).write_volatile((spa & ADDRESS) | PRESENT_RW_AD_NX);
        asm!("invlpg [{}]", in(reg) address, options(nostack));
    }
    address as *mut u8
}

/// The page at `spa`: all of the host's memory is visible.
#[cfg(not(target_os = "none"))]
pub fn window(_: u32, _: Window, spa: u64) -> *mut u8 {
    direct(spa & !(PAGE_SIZE - 1))
}

/// Runs `f` on the page of guest memory at `spa`. `f` looks at no other guest memory.
pub fn with_guest_page<R>(
    cpu: u32,
    spa: u64,
    f: impl FnOnce(&[AtomicU64; PAGE_SIZE as usize / 8]) -> R,
) -> R {
    let page = window(cpu, Window::Guest, spa).cast();
    // SAFETY: the window shows one whole page, until this CPU uses it the next time, which `f` does not. The guest may write
    // the page at the same time; any bytes are valid for atomics.
    f(unsafe { &*page })
}

/// Copies `to.len()` bytes from physical memory; the range lies inside one page.
pub fn read_physical(cpu: u32, use_: Window, spa: u64, to: &mut [u8]) {
    let offset = (spa & (PAGE_SIZE - 1)) as usize;
    let length = to.len().min(PAGE_SIZE as usize - offset);
    let page = window(cpu, use_, spa);
    // SAFETY: the window shows one whole page; the copy stays inside it. Guests may write it at the same
    // time: bytes are copied once and then looked at.
    unsafe { core::ptr::copy_nonoverlapping(page.add(offset), to.as_mut_ptr(), length) }
}

/// Copies `from` to physical memory; the range lies inside one page.
pub fn write_physical(cpu: u32, use_: Window, spa: u64, from: &[u8]) {
    let offset = (spa & (PAGE_SIZE - 1)) as usize;
    let length = from.len().min(PAGE_SIZE as usize - offset);
    let page = window(cpu, use_, spa);
    // SAFETY: as for `read_physical`.
    unsafe { core::ptr::copy_nonoverlapping(from.as_ptr(), page.add(offset), length) }
}

/// Copies a plain value from physical memory; it lies inside one page.
pub fn read_value<T: Copy + Default>(cpu: u32, use_: Window, spa: u64) -> T {
    let mut value = T::default();
    // SAFETY: `T` is a plain structure of integers (the callers' wire types): any bytes are valid.
    let bytes =
        unsafe { core::slice::from_raw_parts_mut((&raw mut value).cast::<u8>(), size_of::<T>()) };
    read_physical(cpu, use_, spa, bytes);
    value
}

/// Copies a plain value to physical memory; it lies inside one page.
pub fn write_value<T: Copy>(cpu: u32, use_: Window, spa: u64, value: &T) {
    // SAFETY: as for `read_value`; wire types have no padding.
    let bytes =
        unsafe { core::slice::from_raw_parts((&raw const *value).cast::<u8>(), size_of::<T>()) };
    write_physical(cpu, use_, spa, bytes);
}
