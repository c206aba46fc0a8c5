// SPDX-License-Identifier: GPL-2.0
//! What an exit costs: `exit_cost kvm` and `exit_cost mshv` run the same guest and print one JSON object with the ticks of
//! the TSC per exit, from guest to guest. On a machine whose TSC counts instructions these are instructions.

mod guest;
mod kvm;

use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::ExitCode;

use guest::{Row, CODE, EVENT_PORT, EXITS, RESULT};
use mshv_bindings::hv_register_name_HV_REGISTER_GUEST_OS_ID as GUEST_OS_ID;
use mshv_bindings::{mshv_user_ioeventfd, MSHV_IOEVENTFD_BIT_PIO};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};
use vmwp::boot::regs::boot_registers;
use vmwp::device::Machine;
use vmwp::layout::MIB;
use vmwp::outcome::Outcome;
use vmwp::partition::{guest_memory, Partition};
use vmwp::vp::reg::Reg;
use vmwp::vp::runner::{self, Ending};
use vmwp::vp::stats::Counters;
use vmwp::vp::Vp;

/// Any error.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Runs of each row; the fastest counts: the first fills caches and maps memory, and a tick of the host's timer may hit another.
const RUNS: usize = 5;

/// A hypervisor with the guest's memory.
trait Host {
    /// Runs the code at [`CODE`] from its beginning until it powers off.
    fn run(&mut self) -> Result<()>;
}

struct Mshv {
    vp: vmwp::partition::MshvVp,
    partition: Partition,
    memory: GuestMemoryMmap,
}

impl Mshv {
    fn new(memory: &GuestMemoryMmap, event: &EventFd) -> Result<Self> {
        let partition = Partition::create(Path::new("/dev/mshv"), memory)?;
        let mut vp = partition.create_vp(0)?;
        // Without an identity, hypercalls are undefined instructions (TLFS 3.13).
        vp.set(&[(Reg(GUEST_OS_ID), 1.into())])?;
        ring(&partition, event)?;
        Ok(Self {
            vp,
            partition,
            memory: memory.clone(),
        })
    }
}

/// Writes to [`EVENT_PORT`] signal `event`. The crate offers that for memory only.
fn ring(partition: &Partition, event: &EventFd) -> Result<()> {
    const MSHV_IOEVENTFD: libc::Ioctl = 0x4020_b804;
    let request = mshv_user_ioeventfd {
        addr: EVENT_PORT.into(),
        fd: event.as_raw_fd(),
        flags: 1 << MSHV_IOEVENTFD_BIT_PIO,
        ..Default::default()
    };
    // SAFETY: the structure is the one of this ioctl and outlives the call.
    match unsafe {
        libc::ioctl(
            partition.vm().as_raw_fd(),
            MSHV_IOEVENTFD,
            &raw const request,
        )
    } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error().into()),
    }
}

impl Host for Mshv {
    fn run(&mut self) -> Result<()> {
        let machine = Machine::new(self.partition.interrupts(), Vec::new());
        let ending = Ending::new()?;
        self.vp.set(&boot_registers(CODE))?;
        runner::run(
            &mut self.vp,
            0,
            &self.memory,
            &machine,
            &Counters::default(),
            &ending,
        );
        match ending.outcome() {
            Some(Outcome::PowerOff) => Ok(()),
            other => Err(format!("the guest ended with {other:?}").into()),
        }
    }
}

/// Vendor of the processor, which decides on the hypercall instruction.
fn is_amd() -> bool {
    // SAFETY: every x86-64 processor has CPUID.
    let leaf = unsafe { std::arch::x86_64::__cpuid(0) };
    leaf.ecx == u32::from_le_bytes(*b"cAMD")
}

fn ticks(host: &mut dyn Host, memory: &GuestMemoryMmap, row: Row) -> Result<u64> {
    let mut best = u64::MAX;
    memory.write_slice(&row.code(is_amd()), GuestAddress(CODE))?;
    for _ in 0..RUNS {
        memory.write_obj(0u64, GuestAddress(RESULT))?;
        host.run()?;
        let ticks: u64 = memory.read_obj(GuestAddress(RESULT))?;
        if ticks == 0 {
            return Err("the guest left no result".into());
        }
        best = best.min(ticks);
    }
    Ok(best)
}

fn measure(name: &str) -> Result<()> {
    let memory = guest_memory(16 * MIB)?;
    vmwp::boot::paging::write(&memory)?;
    let event = EventFd::new(EFD_NONBLOCK)?;
    let mut host: Box<dyn Host> = match name {
        "kvm" => Box::new(kvm::Kvm::new(&memory, event.try_clone()?)?),
        "mshv" => Box::new(Mshv::new(&memory, &event)?),
        _ => return Err("usage: exit_cost kvm|mshv".into()),
    };
    let mut base = 0;
    let mut costs = Vec::new();
    for row in Row::ALL {
        let ticks = ticks(host.as_mut(), &memory, row)?;
        if row == Row::Loop {
            base = ticks;
            continue;
        }
        if row == Row::PortEvent && event.read()? != u64::from(EXITS) * RUNS as u64 {
            return Err("the eventfd was not signalled once for each write".into());
        }
        let cost = ticks.saturating_sub(base) / u64::from(EXITS);
        costs.push(format!("\"{}\":{cost}", row.name()));
    }
    println!("{{\"hypervisor\":\"{name}\",{}}}", costs.join(","));
    Ok(())
}

fn main() -> ExitCode {
    let name = std::env::args().nth(1).unwrap_or_default();
    match measure(&name) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("exit_cost {name}: {error}");
            ExitCode::FAILURE
        }
    }
}
