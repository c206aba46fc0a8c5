// SPDX-License-Identifier: GPL-2.0
//! hv_core: slips a hypervisor beneath the running kernel, which becomes its root partition.
//!
//! `insmod` launches, `rmmod` leaves. This file is the module's frame: parameters, the one
//! [`Hypervisor`](launch::Hypervisor), and the callbacks of `shim.c`.

use core::ptr;
use core::sync::atomic::{AtomicPtr, Ordering};

use kernel::prelude::*;
use kernel::seq_file::SeqFile;

#[allow(dead_code, unused_attributes, unreachable_pub)]
#[path = "abi/src/lib.rs"]
mod abi;
mod api;
mod launch;
mod mshv;
mod root;
mod sys;
#[allow(dead_code, unused_attributes, unreachable_pub)]
#[path = "x86/src/lib.rs"]
mod x86;

use launch::{Faults, Hypervisor};

module! {
    type: HvCore,
    name: "hv_core",
    authors: ["hv_core developers"],
    description: "Hypervisor beneath the running kernel",
    license: "GPL v2",
    params: {
        fail_cpu: u32 {
            default: 0,
            description: "Test: CPU on which the launch fails at fail_step",
        },
        fail_step: u32 {
            default: 0,
            description: "Test: step at which the launch fails (1-6), 0 for none",
        },
        provoke: i32 {
            default: -1,
            description: "Test: fault of the image after the launch (0 #GP, 1 #PF, 2 panic, 3 #MC, 4 when CPUID 400000ffh is executed), -1 for none",
        },
    },
}

/// The hypervisor that the callbacks see; null before the launch and after the leave.
static HYPERVISOR: AtomicPtr<Hypervisor> = AtomicPtr::new(ptr::null_mut());

fn hypervisor() -> Option<&'static Hypervisor> {
    // SAFETY: set while the module is loaded, to a value that lives until the callbacks are gone.
    unsafe { HYPERVISOR.load(Ordering::Acquire).as_ref() }
}

/// A CPU came up: it goes beneath the image, or the CPU does not come up.
#[no_mangle]
extern "C" fn hv_core_cpu_online(_cpu: u32) -> i32 {
    match hypervisor()
        .filter(|h| !h.is_faulted())
        .map(|h| h.enter_this_cpu(0))
    {
        Some(Err(error)) => error.to_errno(),
        _ => 0,
    }
}

/// A CPU goes down: it leaves first, because INIT cannot be held off on every processor.
#[no_mangle]
extern "C" fn hv_core_cpu_offline(cpu: u32) -> i32 {
    root::cpu_offline(cpu);
    if let Some(h) = hypervisor() {
        h.leave_this_cpu();
    }
    0
}

/// Reboot, power-off or kexec: the next kernel finds a native machine.
#[no_mangle]
extern "C" fn hv_core_reboot() {
    if let Some(h) = hypervisor() {
        h.leave_all(&sys::CpusLocked::new());
        h.drain_log();
    }
}

/// Whether a hypervisor is there.
#[no_mangle]
extern "C" fn hv_core_launched() -> bool {
    hypervisor().is_some_and(|h| !h.is_faulted())
}

/// Contents of the status file.
#[no_mangle]
extern "C" fn hv_core_status(seq: *mut kernel::bindings::seq_file) {
    // SAFETY: the shim passes the seq_file of the current read.
    let seq = unsafe { SeqFile::from_raw(seq) };
    if let Some(h) = hypervisor() {
        h.drain_log();
        h.status(seq, root::print_partitions);
    }
}

/// Periodic reading of the log ring, and the look whether the image still works.
#[no_mangle]
extern "C" fn hv_core_drain_log() {
    if let Some(h) = hypervisor() {
        h.drain_log();
        h.check();
    }
}

struct HvCore;

impl kernel::Module for HvCore {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        let provoke = module_parameters::provoke.value();
        let faults = Faults {
            cpu: module_parameters::fail_cpu.value(),
            step: module_parameters::fail_step.value(),
            allow: provoke >= 0,
        };
        let hypervisor = KBox::new(Hypervisor::launch(faults)?, GFP_KERNEL)?;
        HYPERVISOR.store(KBox::into_raw(hypervisor), Ordering::Release);
        let this = HvCore;
        if let Some(h) = self::hypervisor() {
            root::start(h.vendor())?;
        }
        sys::hotplug_start(&sys::CpusLocked::new())?;
        sys::notifiers_start().inspect_err(|_| sys::hotplug_stop())?;
        sys::debugfs_start();
        sys::drain_start();
        mshv::start()?;
        if let (Ok(how), Some(h)) = (u64::try_from(provoke), self::hypervisor()) {
            h.provoke(how);
        }
        Ok(this)
    }
}

impl Drop for HvCore {
    fn drop(&mut self) {
        let hypervisor = HYPERVISOR.load(Ordering::Acquire);
        if hypervisor.is_null() {
            return;
        }
        mshv::stop();
        sys::drain_stop();
        sys::debugfs_stop();
        sys::notifiers_stop();
        sys::hotplug_stop();
        HYPERVISOR.store(ptr::null_mut(), Ordering::Release);
        // SAFETY: made by `KBox::into_raw` in `init`; the callbacks are gone.
        let hypervisor = unsafe { KBox::from_raw(hypervisor) };
        hypervisor.leave_all(&sys::CpusLocked::new());
        let ticks = hypervisor.leave_ticks();
        drop(hypervisor);
        root::stop();
        pr_info!(
            "all CPUs are native again, each within {} TSC ticks\n",
            ticks
        );
    }
}
