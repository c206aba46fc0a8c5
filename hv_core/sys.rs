// SPDX-License-Identifier: GPL-2.0
//! The kernel as seen through `shim.c`, `launch/enter.S` and the embedded image, with safe faces.

use core::ffi::{c_char, c_int, c_uint, c_ulong, c_void};
use core::marker::PhantomData;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};

use kernel::prelude::*;

use crate::abi::mitigation;

mod ffi {
    use super::*;

    extern "C" {
        pub(super) fn hv_sys_alloc_pages(order: c_uint) -> *mut c_void;
        pub(super) fn hv_sys_free_pages(address: *mut c_void, order: c_uint);
        pub(super) fn hv_sys_virt_to_phys(address: *const c_void) -> u64;
        pub(super) fn hv_sys_direct_map() -> u64;
        pub(super) fn hv_sys_physical_bits() -> u32;
        pub(super) fn hv_sys_tsc_khz() -> u32;
        pub(super) fn hv_sys_user_cr3_bits() -> u64;
        pub(super) fn hv_sys_mitigations() -> u32;
        pub(super) fn hv_sys_cpu_count() -> c_uint;
        pub(super) fn hv_sys_cpu_possible(cpu: c_uint) -> bool;
        pub(super) fn hv_sys_cpu_online(cpu: c_uint) -> bool;
        pub(super) fn hv_sys_this_cpu() -> c_uint;
        pub(super) fn hv_sys_apic_id(cpu: c_uint) -> u32;
        pub(super) fn hv_sys_cpus_lock();
        pub(super) fn hv_sys_cpus_unlock();
        pub(super) fn hv_sys_call_on_cpu(
            cpu: c_uint,
            call: unsafe extern "C" fn(*mut c_void),
            data: *mut c_void,
        ) -> c_int;
        pub(super) fn hv_sys_irq_save() -> c_ulong;
        pub(super) fn hv_sys_irq_restore(flags: c_ulong);
        pub(super) fn hv_sys_rdmsr(msr: u32, value: *mut u64) -> c_int;
        pub(super) fn hv_sys_wrmsr(msr: u32, value: u64) -> c_int;
        pub(super) fn hv_sys_module_loaded(name: *const c_char) -> bool;
        pub(super) fn hv_sys_hotplug_start() -> c_int;
        pub(super) fn hv_sys_hotplug_stop();
        pub(super) fn hv_sys_notifiers_start() -> c_int;
        pub(super) fn hv_sys_notifiers_stop();
        pub(super) fn hv_sys_debugfs_start();
        pub(super) fn hv_sys_debugfs_stop();
        pub(super) fn hv_sys_drain_start();
        pub(super) fn hv_sys_drain_stop();
        pub(super) fn hv_sys_mshv_register() -> c_int;
        pub(super) fn hv_sys_mshv_deregister();
        pub(super) fn hv_sys_partition_fd(partition: *mut c_void) -> c_int;
        pub(super) fn hv_sys_vp_fd(vp: *mut c_void) -> c_int;
        pub(super) fn hv_sys_device_fd() -> c_int;
        pub(super) fn hv_sys_alloc_single_pages(
            order: c_uint,
            owner: c_ulong,
            pfns: *mut u64,
        ) -> c_int;
        pub(super) fn hv_sys_page_owned(pfn: u64, owner: c_ulong) -> bool;
        pub(super) fn hv_sys_page_disown(pfn: u64);
        pub(super) fn hv_sys_free_single_page(pfn: u64);
        pub(super) fn hv_sys_pin_pages(
            address: c_ulong,
            count: c_int,
            write: bool,
            pages: *mut *mut c_void,
        ) -> c_int;
        pub(super) fn hv_sys_unpin_pages(pages: *mut *mut c_void, count: c_ulong, dirty: bool);
        pub(super) fn hv_sys_hold_pages(
            address: c_ulong,
            count: c_int,
            write: bool,
            how: c_int,
            pages: *mut *mut c_void,
        ) -> c_int;
        pub(super) fn hv_sys_device_page(address: c_ulong, write: bool, pfn: *mut u64) -> c_int;
        pub(super) fn hv_sys_release_pages(pages: *mut *mut c_void, count: c_ulong);
        pub(super) fn hv_sys_dirty_pages(pages: *const *mut c_void, count: c_ulong);
        pub(super) fn hv_sys_watch_new(
            address: c_ulong,
            length: c_ulong,
            owner: *mut c_void,
        ) -> *mut c_void;
        pub(super) fn hv_sys_watch_free(watch: *mut c_void);
        pub(super) fn hv_sys_watch_begin(watch: *mut c_void) -> c_ulong;
        pub(super) fn hv_sys_watch_changed(watch: *mut c_void, sequence: c_ulong) -> bool;
        pub(super) fn hv_sys_watch_note(watch: *mut c_void, sequence: c_ulong);
        pub(super) fn hv_sys_page_to_pfn(page: *mut c_void) -> u64;
        pub(super) fn hv_sys_large_code_pages_are_unsafe() -> bool;
        pub(super) fn hv_sys_machine_check();
        pub(super) fn hv_sys_fpu_begin();
        pub(super) fn hv_sys_fpu_end();
        pub(super) fn hv_sys_must_reschedule() -> bool;
        pub(super) fn hv_sys_reschedule_flag() -> RescheduleFlag;
        pub(super) fn hv_sys_guest_mode_work() -> c_int;
        pub(super) fn hv_sys_guest_mode_end();
        pub(super) fn hv_sys_reschedule() -> c_int;
        pub(super) fn hv_sys_interrupt_cpu(cpu: c_uint);
        pub(super) fn hv_sys_call_on_each_cpu(
            call: unsafe extern "C" fn(*mut c_void),
            data: *mut c_void,
        );
        pub(super) fn hv_sys_call_on_one_cpu(
            cpu: c_uint,
            call: unsafe extern "C" fn(*mut c_void),
            data: *mut c_void,
        ) -> c_int;
        pub(super) fn hv_sys_time() -> u64;
        pub(super) fn hv_sys_write_message(to: c_ulong, from: *const u64) -> c_int;
        pub(super) fn hv_sys_alarm_new() -> *mut c_void;
        pub(super) fn hv_sys_alarm_free(alarm: *mut c_void);
        pub(super) fn hv_sys_alarm_set(alarm: *mut c_void, nanoseconds: u64);
        pub(super) fn hv_sys_alarm_fired(alarm: *mut c_void) -> bool;
        pub(super) fn hv_sys_alarm_reset(alarm: *mut c_void);
        pub(super) fn hv_sys_alarm_wake(alarm: *mut c_void);
        pub(super) fn hv_sys_alarm_wait(alarm: *mut c_void) -> c_int;
        pub(super) fn hv_sys_eventfd_get(fd: c_int) -> *mut c_void;
        pub(super) fn hv_sys_eventfd_put(event: *mut c_void);
        pub(super) fn hv_sys_eventfd_signal(event: *mut c_void);
        pub(super) fn eventfd_signal_mask(event: *mut c_void, mask: c_uint);
        pub(super) fn hv_sys_irqfd_new(
            fd: c_int,
            event: *mut c_void,
            owner: *mut c_void,
            signalled: *mut c_int,
        ) -> *mut c_void;
        pub(super) fn hv_sys_irqfd_free(irqfd: *mut c_void);
        pub(super) fn hv_sys_irqfd_closed(irqfd: *const c_void) -> bool;
        pub(super) fn hv_vmcall(control: u64, input: u64, output: u64) -> HypercallResult;
        pub(super) fn hv_vmmcall(control: u64, input: u64, output: u64) -> HypercallResult;
        pub(super) static hv_trampoline_bytes: u64;
        pub(super) static hv_image_start: u8;
        pub(super) static hv_image_end: u8;
        pub(super) static hv_image_hash: [u8; 64];
    }
}

extern "C" {
    /// See `launch/enter.S`.
    pub(crate) fn hv_vmx_launch() -> i64;
    /// See `launch/enter.S`.
    pub(crate) fn hv_svm_enter(
        vmcb: *mut c_void,
        start: u64,
        cr3: u64,
        area: u64,
        frame: *mut c_void,
    );
    /// See `launch/enter.S`.
    pub(crate) fn hv_leave();
}

/// RAX and RDX after a hypercall.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct HypercallResult {
    pub(crate) result: u64,
    pub(crate) value: u64,
}

/// Physically contiguous, zeroed pages, `1 << order` of them; wiped and freed on drop.
pub(crate) struct Pages {
    address: NonNull<u8>,
    order: u32,
}

// SAFETY: it is memory, owned by this value alone.
unsafe impl Send for Pages {}
// SAFETY: a shared reference gives out addresses only; who uses them says why that is sound.
unsafe impl Sync for Pages {}

impl Pages {
    /// Allocates `1 << order` pages.
    pub(crate) fn new(order: u32) -> Result<Self> {
        // SAFETY: no precondition; process context.
        let address = unsafe { ffi::hv_sys_alloc_pages(order) };
        Ok(Self {
            address: NonNull::new(address.cast()).ok_or(ENOMEM)?,
            order,
        })
    }

    /// Start in Linux' direct map.
    pub(crate) fn address(&self) -> *mut u8 {
        self.address.as_ptr()
    }

    /// Start as a physical address.
    pub(crate) fn spa(&self) -> u64 {
        virt_to_phys(self.address().cast())
    }

    /// Bytes.
    pub(crate) fn len(&self) -> usize {
        4096 << self.order
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the memory is ours and nothing uses it any more; what the image kept there is wiped.
        unsafe {
            core::ptr::write_bytes(self.address(), 0, self.len());
            ffi::hv_sys_free_pages(self.address().cast(), self.order);
        }
    }
}

/// Physical address of a kernel address (direct map or module).
pub(crate) fn virt_to_phys(address: *const c_void) -> u64 {
    // SAFETY: callers pass addresses of objects that exist.
    unsafe { ffi::hv_sys_virt_to_phys(address) }
}

/// Base of the direct map.
pub(crate) fn direct_map() -> u64 {
    // SAFETY: no precondition.
    unsafe { ffi::hv_sys_direct_map() }
}

/// Bits of CR3 that are set in user programs and clear in the kernel; 0 without page-table isolation.
pub(crate) fn user_cr3_bits() -> u64 {
    // SAFETY: no precondition.
    unsafe { ffi::hv_sys_user_cr3_bits() }
}

/// What Linux found and chose about speculation: bits of [`mitigation::host`].
pub(crate) fn mitigations() -> u32 {
    /// IA32_ARCH_CAPABILITIES, and its bit that a hypervisor flushes the L1 data cache.
    const ARCH_CAPABILITIES: u32 = 0x10a;
    const SKIP_FLUSH: u64 = 1 << 3;
    let below = match rdmsr(ARCH_CAPABILITIES) {
        Some(value) if value & SKIP_FLUSH != 0 => mitigation::host::FLUSHED_BELOW,
        _ => 0,
    };
    // SAFETY: no precondition.
    below | unsafe { ffi::hv_sys_mitigations() }
}

/// Physical address bits that Linux uses.
pub(crate) fn physical_bits() -> u32 {
    // SAFETY: no precondition.
    unsafe { ffi::hv_sys_physical_bits() }
}

/// This CPU's TSC.
pub(crate) fn tsc() -> u64 {
    // SAFETY: every x86-64 processor has one.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// TSC ticks per second.
pub(crate) fn tsc_hz() -> u64 {
    // SAFETY: no precondition.
    u64::from(unsafe { ffi::hv_sys_tsc_khz() }) * 1000
}

/// One more than the highest CPU number.
pub(crate) fn cpu_count() -> u32 {
    // SAFETY: no precondition.
    unsafe { ffi::hv_sys_cpu_count() }
}

/// Whether the CPU may ever exist.
pub(crate) fn cpu_possible(cpu: u32) -> bool {
    // SAFETY: the mask has a bit for every number below `cpu_count`.
    cpu < cpu_count() && unsafe { ffi::hv_sys_cpu_possible(cpu) }
}

/// Whether the CPU is online.
pub(crate) fn cpu_online(cpu: u32) -> bool {
    // SAFETY: the mask has a bit for every number below `cpu_count`.
    cpu < cpu_count() && unsafe { ffi::hv_sys_cpu_online(cpu) }
}

/// The CPU this runs on; stable only where preemption is off.
pub(crate) fn this_cpu() -> u32 {
    // SAFETY: no precondition.
    unsafe { ffi::hv_sys_this_cpu() }
}

/// APIC ID of a possible CPU.
pub(crate) fn apic_id(cpu: u32) -> u32 {
    // SAFETY: the caller's CPU is possible.
    unsafe { ffi::hv_sys_apic_id(cpu) }
}

/// Holds CPU hotplug off while it lives.
pub(crate) struct CpusLocked(());

impl CpusLocked {
    /// Takes the lock.
    pub(crate) fn new() -> Self {
        // SAFETY: process context; paired with the drop.
        unsafe { ffi::hv_sys_cpus_lock() };
        Self(())
    }
}

impl Drop for CpusLocked {
    fn drop(&mut self) {
        // SAFETY: taken by `new`.
        unsafe { ffi::hv_sys_cpus_unlock() };
    }
}

/// Calls `call` on `cpu` with interrupts off and returns what it returns; `ENXIO` if it is offline.
pub(crate) fn call_on_cpu<R, F: FnMut() -> R>(_: &CpusLocked, cpu: u32, call: F) -> Result<R> {
    struct Call<R, F> {
        call: F,
        result: Option<R>,
    }
    /// Calls a closure for C.
    ///
    /// # Safety
    /// `data` must be a `Call` of these types.
    unsafe extern "C" fn trampoline<R, F: FnMut() -> R>(data: *mut c_void) {
        // SAFETY: `data` is the `Call` below, which outlives the call because the caller waits.
        let call = unsafe { &mut *data.cast::<Call<R, F>>() };
        call.result = Some((call.call)());
    }
    let mut data = Call { call, result: None };
    // SAFETY: waits for the end of the call; hotplug is held off.
    let error = unsafe { ffi::hv_sys_call_on_cpu(cpu, trampoline::<R, F>, (&raw mut data).cast()) };
    kernel::error::to_result(error)?;
    data.result.ok_or(ENXIO)
}

/// Interrupts are off on this CPU while it lives.
pub(crate) struct IrqsOff(c_ulong);

impl IrqsOff {
    /// Switches interrupts off.
    pub(crate) fn new() -> Self {
        // SAFETY: paired with the drop on the same CPU: the value is not `Send`-dependent, it lives on one
        // stack frame.
        Self(unsafe { ffi::hv_sys_irq_save() })
    }
}

impl Drop for IrqsOff {
    fn drop(&mut self) {
        // SAFETY: the flags come from `new`.
        unsafe { ffi::hv_sys_irq_restore(self.0) };
    }
}

/// The FPU is nobody's on this CPU while this value lives: the registers of the current task are in memory, and no code uses those
/// of the CPU.
pub(crate) struct FpuOff<'a>(PhantomData<&'a IrqsOff>);

impl<'a> FpuOff<'a> {
    /// Takes the FPU away.
    pub(crate) fn new(_: &'a IrqsOff) -> Self {
        // SAFETY: a task that works for user space, with interrupts off, so on this CPU until the drop.
        unsafe { ffi::hv_sys_fpu_begin() };
        Self(PhantomData)
    }
}

impl Drop for FpuOff<'_> {
    fn drop(&mut self) {
        // SAFETY: begun by `new`; interrupts are still off.
        unsafe { ffi::hv_sys_fpu_end() };
    }
}

/// Reads an MSR; `None` if the processor has none of that number.
pub(crate) fn rdmsr(msr: u32) -> Option<u64> {
    let mut value = 0;
    // SAFETY: the shim catches the fault of a missing MSR.
    (unsafe { ffi::hv_sys_rdmsr(msr, &mut value) } == 0).then_some(value)
}

/// Writes an MSR; `EIO` if the processor refuses.
///
/// # Safety
/// Linux must be able to live with the value.
pub(crate) unsafe fn wrmsr(msr: u32, value: u64) -> Result {
    // SAFETY: by the caller's promise.
    if unsafe { ffi::hv_sys_wrmsr(msr, value) } == 0 {
        Ok(())
    } else {
        Err(EIO)
    }
}

/// Whether a module of that name is loaded.
pub(crate) fn module_loaded(name: &CStr) -> bool {
    // SAFETY: a C string; process context.
    unsafe { ffi::hv_sys_module_loaded(name.as_char_ptr().cast()) }
}

/// Registers the CPU hotplug callbacks without calling them.
pub(crate) fn hotplug_start(_: &CpusLocked) -> Result {
    // SAFETY: the callbacks exist for as long as the module.
    kernel::error::to_result(unsafe { ffi::hv_sys_hotplug_start() })
}

/// Removes them.
pub(crate) fn hotplug_stop() {
    // SAFETY: idempotent.
    unsafe { ffi::hv_sys_hotplug_stop() }
}

/// Registers the reboot, power and module notifiers.
pub(crate) fn notifiers_start() -> Result {
    // SAFETY: the callbacks exist for as long as the module.
    kernel::error::to_result(unsafe { ffi::hv_sys_notifiers_start() })
}

/// Removes them.
pub(crate) fn notifiers_stop() {
    // SAFETY: called once after a successful start.
    unsafe { ffi::hv_sys_notifiers_stop() }
}

/// Creates the debugfs files.
pub(crate) fn debugfs_start() {
    // SAFETY: the callbacks exist for as long as the module.
    unsafe { ffi::hv_sys_debugfs_start() }
}

/// Removes them.
pub(crate) fn debugfs_stop() {
    // SAFETY: called once after the start.
    unsafe { ffi::hv_sys_debugfs_stop() }
}

/// Starts the periodic reading of the log ring.
pub(crate) fn drain_start() {
    // SAFETY: the callback exists for as long as the module.
    unsafe { ffi::hv_sys_drain_start() }
}

/// Stops it and waits.
pub(crate) fn drain_stop() {
    // SAFETY: no precondition.
    unsafe { ffi::hv_sys_drain_stop() }
}

/// A hypercall on VT-x.
pub(crate) fn vmcall(control: u64, input: u64, output: u64) -> HypercallResult {
    // SAFETY: answered by the image, or by the exception table where there is none.
    unsafe { ffi::hv_vmcall(control, input, output) }
}

/// A hypercall on AMD-V.
pub(crate) fn vmmcall(control: u64, input: u64, output: u64) -> HypercallResult {
    // SAFETY: as for `vmcall`.
    unsafe { ffi::hv_vmmcall(control, input, output) }
}

/// The embedded image.
pub(crate) fn image() -> &'static [u8] {
    // SAFETY: the two symbols delimit read-only data of this module.
    unsafe {
        let start = &raw const ffi::hv_image_start;
        let length = (&raw const ffi::hv_image_end).offset_from(start);
        core::slice::from_raw_parts(start, length as usize)
    }
}

/// SHA-256 of the embedded image, in hexadecimal.
pub(crate) fn image_hash() -> &'static str {
    // SAFETY: read-only data of this module.
    let digits = unsafe { &ffi::hv_image_hash };
    core::str::from_utf8(digits).unwrap_or("")
}

/// Addresses of the code that runs while CR3 changes: first byte and byte after the last.
pub(crate) fn trampoline() -> (u64, u64) {
    let start = hv_svm_enter as usize as u64;
    // SAFETY: a constant of `enter.S`.
    (start, start + unsafe { ffi::hv_trampoline_bytes })
}

/// Makes `/dev/mshv` appear.
pub(crate) fn mshv_register() -> Result {
    // SAFETY: the callbacks exist for as long as the module.
    kernel::error::to_result(unsafe { ffi::hv_sys_mshv_register() })
}

/// Takes it away.
pub(crate) fn mshv_deregister() {
    // SAFETY: called once after a successful registration.
    unsafe { ffi::hv_sys_mshv_deregister() }
}

/// Gives the caller's process a partition file that owns `partition`, which comes back to
/// `hv_mshv_partition_release`.
///
/// # Safety
/// `partition` must be what the partition callbacks of `mshv/mod.rs` expect. On an error it stays the
/// caller's.
pub(crate) unsafe fn partition_fd(partition: *mut c_void) -> Result<i32> {
    // SAFETY: by the caller's promise.
    let fd = unsafe { ffi::hv_sys_partition_fd(partition) };
    kernel::error::to_result(fd)?;
    Ok(fd)
}

/// Gives the caller's process a VP file that owns `vp`, which comes back to `hv_mshv_vp_release`.
///
/// # Safety
/// As for [`partition_fd`], for the VP callbacks.
pub(crate) unsafe fn vp_fd(vp: *mut c_void) -> Result<i32> {
    // SAFETY: by the caller's promise.
    let fd = unsafe { ffi::hv_sys_vp_fd(vp) };
    kernel::error::to_result(fd)?;
    Ok(fd)
}

/// Gives the caller's process a device object.
pub(crate) fn device_fd() -> Result<i32> {
    // SAFETY: process context.
    let fd = unsafe { ffi::hv_sys_device_fd() };
    kernel::error::to_result(fd)?;
    Ok(fd)
}

/// Allocates `1 << order` pages that are freed one by one and writes their numbers to `pfns`. They are marked with
/// their owner, a number that is not 0.
pub(crate) fn alloc_single_pages(order: u32, owner: u64, pfns: &mut [u64]) -> Result {
    if pfns.len() != 1 << order {
        return Err(EINVAL);
    }
    // SAFETY: the slice has room for all numbers; process context.
    kernel::error::to_result(unsafe {
        ffi::hv_sys_alloc_single_pages(order, owner as c_ulong, pfns.as_mut_ptr())
    })
}

/// Whether a page is marked as the owner's. The number may be anything.
pub(crate) fn is_own_page(pfn: u64, owner: u64) -> bool {
    // SAFETY: the function looks only at pages that exist.
    unsafe { ffi::hv_sys_page_owned(pfn, owner as c_ulong) }
}

/// Takes the owner's mark off a page; false if it had none.
pub(crate) fn disown_page(pfn: u64, owner: u64) -> bool {
    let own = is_own_page(pfn, owner);
    if own {
        // SAFETY: the page exists and is ours.
        unsafe { ffi::hv_sys_page_disown(pfn) };
    }
    own
}

/// Wipes and frees a page of [`alloc_single_pages`].
///
/// # Safety
/// The page must be the caller's, and nobody may use it any more.
pub(crate) unsafe fn free_single_page(pfn: u64) {
    // SAFETY: by the caller's promise.
    unsafe { ffi::hv_sys_free_single_page(pfn) }
}

/// A page of user space: a `struct page`, or null.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct UserPage(*mut c_void);

// SAFETY: it names memory; who holds it decides on its end.
unsafe impl Send for UserPage {}
// SAFETY: as above.
unsafe impl Sync for UserPage {}

impl UserPage {
    /// No page.
    pub(crate) const NONE: Self = Self(core::ptr::null_mut());
    /// A page of a device: it has no `struct page`.
    pub(crate) const DEVICE: Self = Self(core::ptr::dangling_mut());

    /// Page number.
    pub(crate) fn pfn(self) -> u64 {
        // SAFETY: the callers do not ask this of `NONE` and `DEVICE`; the arithmetic touches no memory.
        unsafe { ffi::hv_sys_page_to_pfn(self.0) }
    }
}

/// Number of pages that the kernel wrote to `pages`, from what its function returned.
fn pages_got(got: c_int, pages: &mut [UserPage]) -> Result<usize> {
    let count = usize::try_from(got).unwrap_or(0);
    // Also when it fails, the kernel may have written down pages that it let go again.
    if let Some(rest) = pages.get_mut(count..) {
        rest.fill(UserPage::NONE);
    }
    kernel::error::to_result(got)?;
    Ok(count)
}

/// Pins pages of the current process for a long time, as many as it can up to the length of `pages`.
pub(crate) fn pin_pages(address: u64, write: bool, pages: &mut [UserPage]) -> Result<usize> {
    let count = c_int::try_from(pages.len()).map_err(|_| EINVAL)?;
    // SAFETY: the slice has room for `count` pointers; the function checks the address.
    let pinned = unsafe {
        ffi::hv_sys_pin_pages(address as c_ulong, count, write, pages.as_mut_ptr().cast())
    };
    pages_got(pinned, pages)
}

/// Lets pages of [`pin_pages`] go, marking them as written to if `dirty`.
///
/// # Safety
/// All must be pinned by the caller, and no longer reachable by a child.
pub(crate) unsafe fn unpin_pages(pages: &mut [UserPage], dirty: bool) {
    // SAFETY: by the caller's promise.
    unsafe {
        ffi::hv_sys_unpin_pages(pages.as_mut_ptr().cast(), pages.len() as c_ulong, dirty);
    }
}

/// Which pages [`hold_pages`] gets.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum Hold {
    /// Those that are there.
    Present = 0,
    /// Those that come without waiting.
    WithoutWaiting = 1,
    /// All; `EINTR` if a signal waits.
    Waiting = 2,
}

/// Holds pages of the current process for a moment, as many as it can up to the length of `pages`.
pub(crate) fn hold_pages(
    address: u64,
    write: bool,
    how: Hold,
    pages: &mut [UserPage],
) -> Result<usize> {
    let count = c_int::try_from(pages.len()).map_err(|_| EINVAL)?;
    let to = pages.as_mut_ptr().cast();
    // SAFETY: the slice has room for `count` pointers; the function checks the address.
    let got = unsafe { ffi::hv_sys_hold_pages(address as c_ulong, count, write, how as c_int, to) };
    pages_got(got, pages)
}

/// Number of the page of a device that the current process has mapped at `address`, and whether it may write to it. `EFAULT` if
/// it has none, or memory.
pub(crate) fn device_page(address: u64, write: bool) -> Result<(u64, bool)> {
    let mut pfn = 0;
    // SAFETY: process context; the function checks the address.
    let writable = unsafe { ffi::hv_sys_device_page(address as c_ulong, write, &mut pfn) };
    kernel::error::to_result(writable)?;
    Ok((pfn, writable != 0))
}

/// Lets pages of [`hold_pages`] go.
///
/// # Safety
/// All must be held by the caller.
pub(crate) unsafe fn release_pages(pages: &mut [UserPage]) {
    // SAFETY: by the caller's promise.
    unsafe { ffi::hv_sys_release_pages(pages.as_mut_ptr().cast(), pages.len() as c_ulong) }
}

/// Marks pages as written to. Does not sleep.
///
/// # Safety
/// All must be held by the caller for writing, and user space must still have them so: what the kernel takes away
/// meanwhile waits for the caller.
pub(crate) unsafe fn dirty_pages(pages: &[UserPage]) {
    // SAFETY: by the caller's promise.
    unsafe { ffi::hv_sys_dirty_pages(pages.as_ptr().cast(), pages.len() as c_ulong) }
}

/// Tells `hv_root_memory_changes` of changes to a range of the creator's address space, until it is dropped.
pub(crate) struct Watch(NonNull<c_void>);

// SAFETY: all functions of the shim on it may be called from every thread.
unsafe impl Send for Watch {}
// SAFETY: as above.
unsafe impl Sync for Watch {}

impl Watch {
    /// Watches a range of the current process.
    ///
    /// # Safety
    /// `owner` must be what `hv_root_memory_changes` expects, until the watch is dropped.
    pub(crate) unsafe fn new(address: u64, length: u64, owner: *mut c_void) -> Result<Self> {
        // SAFETY: process context; by the caller's promise for the owner.
        let watch = unsafe { ffi::hv_sys_watch_new(address as c_ulong, length as c_ulong, owner) };
        pointer_or_error(watch).map(Self)
    }

    /// Waits for changes under way. Its result is for [`Self::has_changed`].
    pub(crate) fn begin(&self) -> c_ulong {
        // SAFETY: the object lives as long as `self`; process context.
        unsafe { ffi::hv_sys_watch_begin(self.0.as_ptr()) }
    }

    /// Whether anything may have changed since. The caller holds the lock of [`note_change`].
    pub(crate) fn has_changed(&self, since: c_ulong) -> bool {
        // SAFETY: the object lives as long as `self`.
        unsafe { ffi::hv_sys_watch_changed(self.0.as_ptr(), since) }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // SAFETY: made by `new`; process context.
        unsafe { ffi::hv_sys_watch_free(self.0.as_ptr()) }
    }
}

/// Notes that a change of this number began, with the lock of the owner held.
///
/// # Safety
/// Only for `hv_root_memory_changes`, with what it was called with.
pub(crate) unsafe fn note_change(watch: *mut c_void, sequence: c_ulong) {
    // SAFETY: by the caller's promise.
    unsafe { ffi::hv_sys_watch_note(watch, sequence) }
}

/// Whether a guest that may execute large second-level pages can stop this processor (INTEL-SA-00210): it has to change the
/// size of a page in its own tables and fetch from it before a flush.
pub(crate) fn large_code_pages_are_unsafe() -> bool {
    // SAFETY: reads what the kernel found out about the processor.
    unsafe { ffi::hv_sys_large_code_pages_are_unsafe() }
}

/// What must be done before a thread runs a guest: rescheduling, task work. `EINTR` if a signal waits.
pub(crate) fn guest_mode_work() -> Result {
    // SAFETY: process context, interrupts on.
    kernel::error::to_result(unsafe { ffi::hv_sys_guest_mode_work() })
}

/// What must be done once a thread goes back to user space after it ran a guest.
pub(crate) fn guest_mode_end() {
    // SAFETY: process context.
    unsafe { ffi::hv_sys_guest_mode_end() }
}

/// Has the kernel handle a machine check that ended the run of a child on this CPU.
pub(crate) fn machine_check(_: &IrqsOff) {
    // SAFETY: interrupts are off, and this is the CPU whose banks are to be looked at.
    unsafe { ffi::hv_sys_machine_check() }
}

/// Whether another thread shall run on this CPU. Any context.
pub(crate) fn must_reschedule() -> bool {
    // SAFETY: looks at a flag of the current thread.
    unsafe { ffi::hv_sys_must_reschedule() }
}

/// [`must_reschedule`] of this thread without a call.
#[repr(C)]
pub(crate) struct RescheduleFlag {
    word: *const AtomicU64,
    mask: u64,
}

impl RescheduleFlag {
    /// That of the current thread. It stays with it, because it is not `Send`.
    pub(crate) fn new() -> Self {
        // SAFETY: gives the address of the current thread's flags.
        unsafe { ffi::hv_sys_reschedule_flag() }
    }

    /// Whether another thread shall run on this CPU.
    pub(crate) fn is_set(&self) -> bool {
        // SAFETY: the flags live as long as the thread, which is here. All change them by atomic operations.
        unsafe { &*self.word }.load(Ordering::Relaxed) & self.mask != 0
    }
}

/// A point in a long loop: lets others run. `EINTR` if the process is being killed.
pub(crate) fn reschedule() -> Result {
    // SAFETY: process context.
    kernel::error::to_result(unsafe { ffi::hv_sys_reschedule() })
}

/// Interrupts a CPU, so that a child that runs there exits.
pub(crate) fn interrupt_cpu(cpu: u32) {
    // SAFETY: the callers name a CPU that is online, because a thread runs on it.
    unsafe { ffi::hv_sys_interrupt_cpu(cpu) }
}

/// Calls a closure for C.
///
/// # Safety
/// `data` must be a closure of that type.
unsafe extern "C" fn call_shared<F: Fn() + Sync>(data: *mut c_void) {
    // SAFETY: by the caller's promise.
    unsafe { (*data.cast::<F>())() }
}

/// Calls `call` on every CPU that is online, with interrupts off, and waits for all.
pub(crate) fn call_on_each_cpu<F: Fn() + Sync>(call: F) {
    // SAFETY: waits for the end of the calls, so the closure outlives them.
    unsafe { ffi::hv_sys_call_on_each_cpu(call_shared::<F>, (&raw const call).cast_mut().cast()) }
}

/// Calls `call` on one CPU with interrupts off and waits; `ENXIO` if it is offline.
pub(crate) fn call_on_one_cpu<F: Fn() + Sync>(cpu: u32, call: F) -> Result {
    // SAFETY: waits for the end of the call, so the closure outlives it.
    kernel::error::to_result(unsafe {
        ffi::hv_sys_call_on_one_cpu(cpu, call_shared::<F>, (&raw const call).cast_mut().cast())
    })
}

/// Nanoseconds of the monotonic clock.
pub(crate) fn time() -> u64 {
    // SAFETY: no precondition.
    unsafe { ffi::hv_sys_time() }
}

/// Copies a message to user space, or as much of it as goes: `EFAULT` if that is not all.
///
/// # Safety
/// `message` must be as long as [`message::WORDS`](crate::abi::partition::message::WORDS) says.
pub(crate) unsafe fn write_message(address: usize, message: *const u64) -> Result {
    const { assert!(crate::abi::partition::message::WORDS == 18) };
    // SAFETY: by the caller's promise; the function checks the address.
    kernel::error::to_result(unsafe { ffi::hv_sys_write_message(address as c_ulong, message) })
}

/// Something one thread sleeps on, with a timer. Anybody may wake it, in any context.
pub(crate) struct Alarm(NonNull<c_void>);

// SAFETY: all functions of the shim on it may be called from every thread.
unsafe impl Send for Alarm {}
// SAFETY: as above.
unsafe impl Sync for Alarm {}

impl Alarm {
    /// A new one, not set.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: process context.
        NonNull::new(unsafe { ffi::hv_sys_alarm_new() })
            .map(Self)
            .ok_or(ENOMEM)
    }

    /// Starts the timer of this CPU, in place of an earlier one.
    pub(crate) fn set(&self, nanoseconds: u64) {
        // SAFETY: the object lives as long as `self`.
        unsafe { ffi::hv_sys_alarm_set(self.0.as_ptr(), nanoseconds) }
    }

    /// Whether the timer ended since it was set.
    pub(crate) fn fired(&self) -> bool {
        // SAFETY: as above.
        unsafe { ffi::hv_sys_alarm_fired(self.0.as_ptr()) }
    }

    /// Forgets earlier wake-ups. Only the thread that sleeps calls it.
    pub(crate) fn reset(&self) {
        // SAFETY: as above.
        unsafe { ffi::hv_sys_alarm_reset(self.0.as_ptr()) }
    }

    /// Ends the sleep, or the next one.
    pub(crate) fn wake(&self) {
        // SAFETY: as above.
        unsafe { ffi::hv_sys_alarm_wake(self.0.as_ptr()) }
    }

    /// Sleeps until the timer ends or somebody wakes us. `EINTR` if a signal waits.
    pub(crate) fn wait(&self) -> Result {
        // SAFETY: as above; process context.
        match unsafe { ffi::hv_sys_alarm_wait(self.0.as_ptr()) } {
            0 => Ok(()),
            _ => Err(EINTR),
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: nobody has the object but us.
        unsafe { ffi::hv_sys_alarm_free(self.0.as_ptr()) }
    }
}

fn pointer_or_error(pointer: *mut c_void) -> Result<NonNull<c_void>> {
    NonNull::new(kernel::error::from_err_ptr(pointer)?).ok_or(ENOMEM)
}

/// A counted reference to the object behind an event file descriptor.
pub(crate) struct EventFd(NonNull<c_void>);

// SAFETY: the object is reference counted and has its own lock.
unsafe impl Send for EventFd {}
// SAFETY: as above.
unsafe impl Sync for EventFd {}

impl EventFd {
    /// That of a descriptor of this process: `EBADF` if it is none, `EINVAL` if it is not an eventfd.
    pub(crate) fn get(fd: i32) -> Result<Self> {
        // SAFETY: process context; the function checks the number.
        pointer_or_error(unsafe { ffi::hv_sys_eventfd_get(fd) }).map(Self)
    }

    /// The same object without a reference of its own.
    pub(crate) fn alias(&self) -> EventAlias {
        EventAlias(self.0.as_ptr())
    }

    /// Adds 1 to its counter. Any context.
    pub(crate) fn signal(&self) {
        // SAFETY: we hold a reference.
        unsafe { ffi::hv_sys_eventfd_signal(self.0.as_ptr()) }
    }
}

/// See [`EventFd::alias`].
pub(crate) struct EventAlias(*mut c_void);

impl EventAlias {
    /// Of nothing.
    pub(crate) const NONE: Self = Self(core::ptr::null_mut());

    /// Whether it is of nothing.
    pub(crate) fn is_none(&self) -> bool {
        self.0.is_null()
    }

    /// As [`EventFd::signal`].
    ///
    /// # Safety
    /// It is of an `EventFd` that still exists.
    pub(crate) unsafe fn signal(&self) {
        // SAFETY: by the caller's promise, there is a reference.
        unsafe { ffi::eventfd_signal_mask(self.0, 0) }
    }
}

impl PartialEq for EventFd {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl Drop for EventFd {
    fn drop(&mut self) {
        // SAFETY: we hold a reference and never use it again.
        unsafe { ffi::hv_sys_eventfd_put(self.0.as_ptr()) }
    }
}

/// A hook on an eventfd: `hv_root_irqfd_signalled` is called when it is signalled, until this is dropped.
pub(crate) struct EventHook {
    hook: NonNull<c_void>,
    event: NonNull<c_void>,
}

// SAFETY: all functions of the shim on it may be called from every thread.
unsafe impl Send for EventHook {}
// SAFETY: as above.
unsafe impl Sync for EventHook {}

impl EventHook {
    /// Hooks on to `event`, which `fd` names. True if it was signalled before.
    ///
    /// # Safety
    /// `owner` must be what `hv_root_irqfd_signalled` expects, until the hook is dropped.
    pub(crate) unsafe fn new(fd: i32, event: EventFd, owner: *mut c_void) -> Result<(Self, bool)> {
        let mut signalled = 0;
        // SAFETY: the event is referenced; by the caller's promise for the owner.
        let hook = pointer_or_error(unsafe {
            ffi::hv_sys_irqfd_new(fd, event.0.as_ptr(), owner, &mut signalled)
        })?;
        let this = Self {
            hook,
            event: event.0,
        };
        // The reference is the hook's now.
        core::mem::forget(event);
        Ok((this, signalled != 0))
    }

    /// Whether it hangs on this event.
    pub(crate) fn is_on(&self, event: &EventFd) -> bool {
        self.event == event.0
    }

    /// Whether the last descriptor of the event was closed.
    pub(crate) fn is_closed(&self) -> bool {
        // SAFETY: the object lives as long as `self`.
        unsafe { ffi::hv_sys_irqfd_closed(self.hook.as_ptr()) }
    }
}

impl Drop for EventHook {
    fn drop(&mut self) {
        // SAFETY: made by `new`; process context.
        unsafe { ffi::hv_sys_irqfd_free(self.hook.as_ptr()) }
    }
}

/// Nanoseconds until the TSC reaches `deadline`, rounded up; 0 if it did.
pub(crate) fn nanoseconds_until(deadline: u64) -> u64 {
    let rest = deadline.saturating_sub(tsc());
    let khz = (tsc_hz() / 1000).max(1);
    // Beyond an hour the exact value does not matter, and it cannot overflow.
    (rest.min(khz.saturating_mul(3_600_000)) * 1000)
        .div_ceil(khz)
        .saturating_mul(1000)
}
