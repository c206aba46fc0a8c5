// SPDX-License-Identifier: GPL-2.0
//! Hypercalls of a guest that leave its partition: messages and events of connections.

use std::arch::x86_64::__cpuid;
use std::fs;
use std::os::fd::AsRawFd;

use mshv_bindings::*;
use mshv_ioctls::Mshv;
use mshv_smoke::machine::{errno, ioctl, kind, only_partition, Machine};
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use super::Outcome;

/// `HV_PORT_EVENTFD` and its argument (hv_core/include/uapi/linux/hv_core.h).
const PORT_EVENTFD: u64 = 0x4010_b8c0;
const DEASSIGN: u32 = 1;

const POST_MESSAGE: u64 = 0x5c;
const SIGNAL_EVENT: u64 = 0x5d;
const SEND_IPI_EX: u64 = 0x15;
const FAST: u64 = 1 << 16;

/// Features of `hv_partition_synthetic_processor_features` that clients do not ask for by themselves.
const SPARSE_SETS: u64 = 1 << 24;
const SIGNAL_EVENTS: u64 = 1 << 29;

const INVALID_PARAMETER: u64 = 0x5;
const INVALID_PORT_ID: u64 = 0x11;
const INVALID_CONNECTION_ID: u64 = 0x12;
const INSUFFICIENT_BUFFERS: u64 = 0x13;

/// Where the guest has its input.
const INPUT: usize = 0x4000;
const MESSAGES: usize = 0x5000;
const FLAGS: usize = 0x6000;

/// Code of 16 bits that loads a register: 0 EAX, 1 ECX, 2 EDX, 3 EBX, 6 ESI, 7 EDI.
fn load(register: u8, value: u64) -> Vec<u8> {
    let [a, b, c, d, ..] = value.to_le_bytes();
    vec![0x66, 0xb8 | register, a, b, c, d]
}

fn wrmsr(number: u64, value: u64) -> Vec<u8> {
    let code = [
        load(1, number),
        load(0, value),
        load(2, value >> 32),
        vec![0x0f, 0x30],
    ];
    code.concat()
}

/// A hypercall by the convention for 32 bits, whose status goes to port 0x30.
fn call(control: u64, first: u64, second: u64) -> Vec<u8> {
    // SAFETY: every processor in 64-bit mode has CPUID.
    let vendor = unsafe { __cpuid(0) }.ebx;
    let amd = vendor.to_le_bytes() == *b"Auth";
    let instruction = vec![0x0f, 0x01, if amd { 0xd9 } else { 0xc1 }];
    let code = [
        load(2, control >> 32),
        load(0, control),
        load(3, first >> 32),
        load(1, first),
        load(7, second >> 32),
        load(6, second),
        instruction,
        vec![0xe6, 0x30], // out %al, $0x30
    ];
    code.concat()
}

/// A guest in protected mode, with a SynIC whose source 3 is polled, that makes these calls.
fn guest(calls: &[Vec<u8>]) -> Result<Machine, Box<dyn std::error::Error>> {
    let code = [
        wrmsr(0x4000_0000, 1),
        wrmsr(0x4000_0083, MESSAGES as u64 | 1),
        wrmsr(0x4000_0082, FLAGS as u64 | 1),
        wrmsr(0x4000_0093, 1 << 18 | 0x40),
        wrmsr(0x4000_0080, 1),
        calls.concat(),
        vec![0xf4],
    ];
    let code = code.concat();
    assert!(code.len() <= INPUT - 0x1000);
    let vm = Mshv::new()?.create_vm()?;
    let property = hv_partition_property_code_HV_PARTITION_PROPERTY_SYNTHETIC_PROC_FEATURES;
    let features = vm.get_partition_property(property)?;
    vm.set_partition_property(property, features | SPARSE_SETS | SIGNAL_EVENTS)?;
    let machine = Machine::of(vm, &code)?;
    machine.set(&[
        (hv_register_name_HV_X64_REGISTER_CR0, 0x11),
        (hv_register_name_HV_X64_REGISTER_CR4, 0x200),
    ])?;
    Ok(machine)
}

fn connect(machine: &Machine, connection: u32, fd: i32, flags: u32) -> i32 {
    let request = [connection, fd as u32, flags, 0];
    errno(ioctl(
        machine.vm.as_raw_fd(),
        PORT_EVENTFD,
        request.as_ptr() as u64,
    ))
}

fn next_status(machine: &Machine, expected: u64) -> Outcome {
    let seen = machine.next_port_write()?;
    ensure!(
        seen == (0x30, expected),
        "port {seen:x?}, not {expected:#x}"
    );
    Ok(())
}

fn event(connection: u64, flag: u64) -> Vec<u8> {
    call(SIGNAL_EVENT | FAST, flag << 32 | connection, 0)
}

pub fn event_of_a_connection_reaches_an_eventfd() -> Outcome {
    let machine = guest(&[
        event(5, 0),
        event(6, 0),
        event(5, 1),
        event(1 << 24, 0),
        // Connection 5 in memory.
        call(SIGNAL_EVENT, INPUT as u64, 0),
        call(POST_MESSAGE, INPUT as u64, 0),
        event(5, 0),
        event(5, 0),
        call(SIGNAL_EVENT, 0x80_0000, 0),
    ])?;
    let words = [5_u64, 8 << 32 | 1, 0];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    machine.memory.write(INPUT - 0x1000, &bytes);
    let event = EventFd::new(EFD_NONBLOCK)?;
    let fd = event.as_raw_fd();
    ensure!(connect(&machine, 5, fd, DEASSIGN) == libc::ENOENT, "none");
    for (connection, fd, flags, expected) in [
        (5, fd, 2, libc::EINVAL),
        (1 << 24, fd, 0, libc::EINVAL),
        (5, -1, 0, libc::EBADF),
        (5, machine.vm.as_raw_fd(), 0, libc::EINVAL),
        (5, fd, 0, 0),
        (5, fd, 0, libc::EEXIST),
    ] {
        let seen = connect(&machine, connection, fd, flags);
        ensure!(seen == expected, "errno {seen}, not {expected}");
    }
    let other = EventFd::new(EFD_NONBLOCK)?;
    let seen = connect(&machine, 5, other.as_raw_fd(), DEASSIGN);
    ensure!(seen == libc::ENOENT, "errno {seen} for another event");
    next_status(&machine, 0)?;
    ensure!(event.read()? == 1, "not signalled");
    next_status(&machine, INVALID_CONNECTION_ID)?;
    next_status(&machine, INVALID_PARAMETER)?;
    next_status(&machine, INVALID_CONNECTION_ID)?;
    ensure!(event.read().is_err(), "signalled");
    next_status(&machine, 0)?;
    ensure!(event.read()? == 1, "not signalled");
    next_status(&machine, INVALID_PORT_ID)?;
    next_status(&machine, 0)?;
    ensure!(connect(&machine, 5, fd, DEASSIGN) == 0, "removal");
    next_status(&machine, INVALID_CONNECTION_ID)?;
    ensure!(event.read()? == 1, "not signalled once");
    // Its input is where nothing is mapped.
    let message = machine.next_message()?;
    ensure!(
        kind(&message) == hv_message_type_HVMSG_UNMAPPED_GPA,
        "message {:#x}",
        kind(&message)
    );
    Ok(())
}

/// Connects the port of the test module `hv_port`.
fn connect_module(to: &str) -> std::io::Result<()> {
    fs::write("/sys/module/hv_port/parameters/connect", to)
}

/// The test module sends back what it gets.
pub fn messages_and_events_reach_another_module() -> Outcome {
    let post = || call(POST_MESSAGE, INPUT as u64, 0);
    let machine = guest(&[post(), post(), post(), post(), event(7, 8), post()])?;
    let message = |kind: u64, value: u8| {
        let words = [7_u64, 9 << 32 | kind];
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.extend([value; 9]);
        machine.memory.write(INPUT - 0x1000, &bytes);
    };
    let partition = only_partition()?;
    ensure!(
        errno(connect_module("77777 7")) == libc::ENOENT,
        "a partition that is not there"
    );
    connect_module(&format!("{partition} 7"))?;
    let slot = |offset: usize| machine.memory.read(MESSAGES - 0x1000 + 3 * 256 + offset);
    message(1, 0xa1);
    next_status(&machine, 0)?;
    let seen = [slot(0), slot(4), slot(16), slot(24), slot(25)];
    ensure!(seen == [1, 9, 0xa1, 0xa1, 0], "slot {seen:x?}");
    // The second waits, the third finds no room.
    message(1, 0xa2);
    next_status(&machine, 0)?;
    next_status(&machine, INSUFFICIENT_BUFFERS)?;
    ensure!(slot(16) == 0xa1, "slot {:x}", slot(16));
    message(2, 0xa3);
    next_status(&machine, INSUFFICIENT_BUFFERS)?;
    next_status(&machine, 0)?;
    let flags = machine.memory.read(FLAGS - 0x1000 + 3 * 256 + 1);
    ensure!(flags == 2, "flags {flags:#x}");
    connect_module("\n")?;
    next_status(&machine, INVALID_CONNECTION_ID)?;
    // Whoever goes first.
    connect_module(&format!("{partition} 7"))?;
    drop(machine);
    connect_module("\n")?;
    Ok(())
}

/// The set of VPs of an interrupt is in XMM0: the guest sends itself vector 0x51.
pub fn fast_call_goes_on_in_xmm_registers() -> Outcome {
    let [low, high] = (INPUT as u16).to_le_bytes();
    let machine = guest(&[
        vec![0x0f, 0x10, 0x06, low, high], // movups INPUT, %xmm0
        call(SEND_IPI_EX | FAST | 1 << 17, 0x51, 0),
    ])?;
    let bytes: Vec<u8> = [1_u64, 1].iter().flat_map(|w| w.to_le_bytes()).collect();
    machine.memory.write(INPUT - 0x1000, &bytes);
    machine.enable_apic()?;
    next_status(&machine, 0)?;
    // IRR bits 95:64 are register 0x220.
    let lapic = machine.vcpu.get_lapic()?;
    let word: Vec<u8> = lapic.regs[0x220..0x224].iter().map(|b| *b as u8).collect();
    ensure!(word == [0, 0, 2, 0], "IRR {word:x?}");
    Ok(())
}
