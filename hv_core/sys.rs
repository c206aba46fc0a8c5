// SPDX-License-Identifier: GPL-2.0
//! The kernel as seen through `shim.c`, `launch/enter.S` and the embedded image, with safe faces.

use core::ffi::{c_char, c_int, c_uint, c_ulong, c_void};
use core::ptr::NonNull;

use kernel::prelude::*;

mod ffi {
    use super::*;

    extern "C" {
        pub(super) fn hv_sys_alloc_pages(order: c_uint) -> *mut c_void;
        pub(super) fn hv_sys_free_pages(address: *mut c_void, order: c_uint);
        pub(super) fn hv_sys_virt_to_phys(address: *const c_void) -> u64;
        pub(super) fn hv_sys_direct_map() -> u64;
        pub(super) fn hv_sys_physical_bits() -> u32;
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
        pub(super) fn hv_vmcall(control: u64, input: u64, output: u64) -> HypercallResult;
        pub(super) fn hv_vmmcall(control: u64, input: u64, output: u64) -> HypercallResult;
        pub(super) static hv_trampoline_bytes: u64;
        pub(super) static hv_image_start: u8;
        pub(super) static hv_image_end: u8;
    }
}

extern "C" {
    /// See `launch/enter.S`.
    pub(crate) fn hv_vmx_launch() -> i64;
    /// See `launch/enter.S`.
    pub(crate) fn hv_svm_enter(vmcb: *mut c_void, start: u64, cr3: u64, area: u64);
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
        Ok(Self { address: NonNull::new(address.cast()).ok_or(ENOMEM)?, order })
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

/// Physical address bits that Linux uses.
pub(crate) fn physical_bits() -> u32 {
    // SAFETY: no precondition.
    unsafe { ffi::hv_sys_physical_bits() }
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
    unsafe extern "C" fn trampoline<R, F: FnMut() -> R>(data: *mut c_void) {
        // SAFETY: `data` is the `Call` below, which outlives the call because the caller waits.
        let call = unsafe { &mut *data.cast::<Call<R, F>>() };
        call.result = Some((call.call)());
    }
    let mut data = Call { call, result: None };
    // SAFETY: waits for the end of the call; hotplug is held off.
    let error = unsafe {
        ffi::hv_sys_call_on_cpu(cpu, trampoline::<R, F>, (&raw mut data).cast())
    };
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
    unsafe { ffi::hv_sys_module_loaded(name.as_ptr().cast()) }
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

/// Addresses of the code that runs while CR3 changes: first byte and byte after the last.
pub(crate) fn trampoline() -> (u64, u64) {
    let start = hv_svm_enter as usize as u64;
    // SAFETY: a constant of `enter.S`.
    (start, start + unsafe { ffi::hv_trampoline_bytes })
}
