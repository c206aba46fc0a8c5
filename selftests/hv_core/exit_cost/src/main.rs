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
use mshv_bindings::{
    hv_message_type_HVMSG_X64_IO_PORT_INTERCEPT as HVMSG_X64_IO_PORT_INTERCEPT,
    hv_x64_io_port_intercept_message as PortMessage, mshv_user_ioeventfd, MSHV_IOEVENTFD_BIT_PIO,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};
use vmwp::boot::regs::boot_registers;
use vmwp::device::Machine;
use vmwp::layout::{MIB, SLEEP_CONTROL_PORT};
use vmwp::partition::{guest_memory, MshvVp, Partition};
use vmwp::vp::message::Intercept;
use vmwp::vp::reg::Reg;
use vmwp::vp::{emulate, Vp};

/// Any error.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Runs of each row; the fastest counts: the first fills caches and maps memory, and a tick of the host's timer may hit another.
const RUNS: usize = 5;

/// A hypervisor with the guest's memory.
trait Host {
    /// Runs the code at [`CODE`] from its beginning until it powers off.
    fn run(&mut self) -> Result<()>;
}

/// As little user space as under KVM, but for the emulation of stores.
struct Mshv {
    vp: MshvVp,
    machine: Machine<Vec<u8>>,
    // Lives as long as the VP runs.
    _partition: Partition,
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
            machine: Machine::new(partition.interrupts(), Vec::new()),
            _partition: partition,
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
        self.vp.set(&boot_registers(CODE))?;
        loop {
            let Some(message) = self.vp.run_to_message()? else {
                continue;
            };
            if message.header.message_type != HVMSG_X64_IO_PORT_INTERCEPT {
                match Intercept::from(message) {
                    // KVM does in the kernel what this does.
                    Intercept::Memory(store) => {
                        emulate::complete(&mut self.vp, &self.memory, &self.machine.mmio, &store)?;
                        continue;
                    }
                    other => return Err(format!("the guest ended with {other:?}").into()),
                }
            }
            // SAFETY: the payload of such a message, in a structure without alignment; all bytes are valid.
            let out = unsafe { &*(&raw const message.u).cast::<PortMessage>() };
            if out.port_number == SLEEP_CONTROL_PORT {
                return Ok(());
            }
            // SAFETY: the fifth byte of the payload. Its function in the structure goes through it bit by bit.
            let length = unsafe { (&raw const message.u).cast::<u8>().add(4).read() } & 15;
            let next = { out.header.rip } + u64::from(length);
            self.vp.set(&[(Reg::RIP, next.into())])?;
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
