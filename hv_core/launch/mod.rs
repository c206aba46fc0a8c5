// SPDX-License-Identifier: GPL-2.0
//! Launch and leave (Hvboot): preflight, loading, and the way of each CPU beneath the image and back.

pub(crate) mod cpu;
pub(crate) mod load;
pub(crate) mod preflight;

use core::sync::atomic::{AtomicBool, AtomicU64, AtomicU8, Ordering};

use kernel::prelude::*;
use kernel::seq_file::SeqFile;
use kernel::seq_print;

use crate::abi::boot::Vendor;
use crate::abi::hypercall::private;
use crate::abi::mitigation::NAMES;
use crate::abi::stats::{EXIT_KINDS, EXIT_NAMES};
use crate::sys::{self, CpusLocked, IrqsOff};
use load::Loaded;
use preflight::Preflight;

/// Parameters of a test that makes the launch fail.
#[derive(Clone, Copy, Default)]
pub(crate) struct Faults {
    /// CPU on which it fails.
    pub(crate) cpu: u32,
    /// One of [`cpu::step`], 0 for none.
    pub(crate) step: u32,
    /// Whether the image may be asked to fault.
    pub(crate) allow: bool,
}

const NATIVE: u8 = 0;
const LAUNCHED: u8 = 1;

/// What Linux knows of a CPU; changed by that CPU, or with hotplug held off.
struct Cpu {
    state: AtomicU8,
    /// What its last launch and leave took, in ticks of its TSC.
    launch_ticks: AtomicU64,
    leave_ticks: AtomicU64,
}

/// Linux beneath the image.
pub(crate) struct Hypervisor {
    preflight: Preflight,
    image: Loaded,
    cpus: KVec<Cpu>,
    /// Set for good when the image faulted.
    faulted: AtomicBool,
}

impl Hypervisor {
    /// Launches on all CPUs. On an error all are native as before.
    pub(crate) fn launch(faults: Faults) -> Result<Self> {
        let locked = CpusLocked::new();
        let preflight = Preflight::run(&locked)?;
        if let Some(row) = preflight.refusal() {
            pr_err!("launch refused: {}\n", row);
            return Err(row.error);
        }
        let image = Loaded::new(preflight.facts, faults.allow)?;
        let mut cpus = KVec::new();
        for _ in 0..sys::cpu_count() {
            let cpu = Cpu {
                state: AtomicU8::new(NATIVE),
                launch_ticks: AtomicU64::new(0),
                leave_ticks: AtomicU64::new(0),
            };
            cpus.push(cpu, GFP_KERNEL)?;
        }
        let this = Self {
            preflight,
            image,
            cpus,
            faulted: AtomicBool::new(false),
        };
        this.enter_all(&locked, faults).inspect_err(|_| {
            this.leave_all(&locked);
            this.drain_log();
            pr_err!("launch failed, all CPUs are native again\n");
        })?;
        Ok(this)
    }

    fn enter_all(&self, locked: &CpusLocked, faults: Faults) -> Result {
        for cpu in (0..sys::cpu_count()).filter(|cpu| sys::cpu_online(*cpu)) {
            let fail = if cpu == faults.cpu { faults.step } else { 0 };
            sys::call_on_cpu(locked, cpu, || self.enter_this_cpu(fail))??;
        }
        if faults.step == cpu::step::FINISH {
            return Err(EIO);
        }
        pr_info!("all CPUs run beneath the hypervisor\n");
        Ok(())
    }

    /// Enters on the CPU this runs on; also the hotplug callback's way in.
    pub(crate) fn enter_this_cpu(&self, fail: u32) -> Result {
        let _irqs = IrqsOff::new();
        let this = sys::this_cpu();
        let block = self.image.block(this).ok_or(ENODEV)?;
        let slot = self.cpus.get(this as usize).ok_or(ENODEV)?;
        let began = sys::tsc();
        cpu::enter(&self.image, block, fail)?;
        slot.launch_ticks
            .store(sys::tsc().wrapping_sub(began), Ordering::Relaxed);
        slot.state.store(LAUNCHED, Ordering::Release);
        Ok(())
    }

    /// Leaves on the CPU this runs on.
    pub(crate) fn leave_this_cpu(&self) {
        let _irqs = IrqsOff::new();
        let this = sys::this_cpu();
        if let Some(slot) = self.cpus.get(this as usize) {
            if slot.state.load(Ordering::Acquire) == LAUNCHED {
                let began = sys::tsc();
                cpu::leave(&self.image);
                slot.leave_ticks
                    .store(sys::tsc().wrapping_sub(began), Ordering::Relaxed);
                slot.state.store(NATIVE, Ordering::Release);
            }
        }
    }

    /// The longest that a CPU took to leave, in ticks of its TSC.
    pub(crate) fn leave_ticks(&self) -> u64 {
        let ticks = self
            .cpus
            .iter()
            .map(|cpu| cpu.leave_ticks.load(Ordering::Relaxed));
        ticks.max().unwrap_or(0)
    }

    fn is_launched(&self, cpu: u32) -> bool {
        self.cpus
            .get(cpu as usize)
            .is_some_and(|slot| slot.state.load(Ordering::Acquire) == LAUNCHED)
    }

    /// Whether the image faulted and gave the machine back.
    pub(crate) fn is_faulted(&self) -> bool {
        self.faulted.load(Ordering::Acquire)
    }

    /// Brings every CPU back to native operation.
    pub(crate) fn leave_all(&self, locked: &CpusLocked) {
        for cpu in (0..sys::cpu_count()).filter(|cpu| sys::cpu_online(*cpu)) {
            // The CPU is online and hotplug is off: the call cannot fail.
            let _ = sys::call_on_cpu(locked, cpu, || self.leave_this_cpu());
        }
    }

    /// Makes the image fault on CPU 0, for tests; afterwards every CPU is native.
    pub(crate) fn provoke(&self, how: u64) {
        let locked = CpusLocked::new();
        let vendor = self.image.vendor();
        // The CPU exists: the call cannot fail. What came of it is seen below.
        let _ = sys::call_on_cpu(&locked, 0, || cpu::hypercall(vendor, private::FAULT, how));
        drop(locked);
        self.check();
    }

    /// Looks whether the image gave a CPU back, and then takes back the others: half a hypervisor is none.
    pub(crate) fn check(&self) {
        let faults = |cpu| {
            self.image
                .stats(cpu)
                .map_or(0, |s| s.faults.load(Ordering::Acquire))
        };
        if (0..sys::cpu_count()).all(|cpu| faults(cpu) == 0)
            || self.faulted.swap(true, Ordering::AcqRel)
        {
            return;
        }
        self.leave_all(&CpusLocked::new());
        self.drain_log();
        pr_err!("the hypervisor stopped because of an internal fault; all CPUs are native again\n");
    }

    /// Prints what the image wrote to its log.
    pub(crate) fn drain_log(&self) {
        static READER: AtomicBool = AtomicBool::new(false);
        if READER.swap(true, Ordering::Acquire) {
            return;
        }
        // SAFETY: `READER` admits one at a time.
        unsafe {
            self.image
                .drain_log(|line| match core::str::from_utf8(line) {
                    Ok(text) => pr_warn!("image: {}\n", text),
                    Err(_) => pr_warn!("image: (unreadable line)\n"),
                });
        }
        READER.store(false, Ordering::Release);
    }

    /// Whose extension runs the image.
    pub(crate) fn vendor(&self) -> Vendor {
        self.image.vendor()
    }

    /// Prints the status as one JSON document; `partitions` prints the elements of that list.
    pub(crate) fn status(&self, seq: &SeqFile, partitions: impl FnOnce(&SeqFile)) {
        let [image, block, pool] = self.image.sizes();
        let state = if self.is_faulted() {
            "faulted"
        } else {
            "launched"
        };
        seq_print!(
            seq,
            "{{\"state\":\"{}\",\"vendor\":\"{:?}\",",
            state,
            self.image.vendor()
        );
        seq_print!(
            seq,
            "\"image\":{{\"size\":{},\"base\":\"{:#x}\",\"hash\":\"{}\"}},",
            image,
            self.image.image_spa(),
            sys::image_hash()
        );
        seq_print!(
            seq,
            "\"memory\":{{\"image_bytes\":{},\"per_cpu_bytes\":{},\"pool_bytes\":{},\"pool_used_bytes\":{}}},",
            image, block, pool, self.image.pool_used() * 4096
        );
        seq_print!(seq, "\"mitigations\":[");
        let chosen = NAMES
            .iter()
            .filter(|(bit, _)| self.image.mitigations() & bit != 0);
        for (index, (_, name)) in chosen.enumerate() {
            let comma = if index == 0 { "" } else { "," };
            seq_print!(seq, "{}\"{}\"", comma, name);
        }
        seq_print!(seq, "],\"caps\":[");
        for (index, row) in self.preflight.rows.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            seq_print!(
                seq,
                "{}{{\"name\":\"{}\",\"why\":\"{}\",\"found\":\"{:#x}\",\"required\":\"{}\",\"ok\":{}}}",
                comma, row.name, row.why, row.found, row.required, row.ok
            );
        }
        seq_print!(seq, "],\"cpus\":[");
        let mut comma = "";
        for cpu in (0..sys::cpu_count()).filter(|cpu| sys::cpu_possible(*cpu)) {
            let Some(stats) = self.image.stats(cpu) else {
                continue;
            };
            let state = if self.is_launched(cpu) {
                "launched"
            } else {
                "native"
            };
            seq_print!(
                seq,
                "{}{{\"cpu\":{},\"state\":\"{}\",\"exits\":{{",
                comma,
                cpu,
                state
            );
            comma = ",";
            let mut inner = "";
            for kind in 0..EXIT_KINDS {
                let count = stats
                    .root_exits
                    .get(kind)
                    .map_or(0, |c| c.load(Ordering::Relaxed));
                if count != 0 {
                    let name = EXIT_NAMES.get(kind).copied().unwrap_or("");
                    seq_print!(seq, "{}\"{}\":{}", inner, name, count);
                    inner = ",";
                }
            }
            seq_print!(
                seq,
                "}},\"launch_ticks\":{},\"sealed_accesses\":{},\"host_nmis\":{},\"faults\":{}}}",
                self.cpus
                    .get(cpu as usize)
                    .map_or(0, |slot| slot.launch_ticks.load(Ordering::Relaxed)),
                stats.sealed_accesses.load(Ordering::Relaxed),
                stats.host_nmis.load(Ordering::Relaxed),
                stats.faults.load(Ordering::Relaxed)
            );
        }
        seq_print!(seq, "],\"partitions\":[");
        partitions(seq);
        seq_print!(seq, "],\"refusal\":null}}\n");
    }
}

impl Drop for Hypervisor {
    fn drop(&mut self) {
        self.leave_all(&CpusLocked::new());
        self.drain_log();
    }
}
