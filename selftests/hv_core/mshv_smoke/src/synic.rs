// SPDX-License-Identifier: GPL-2.0
//! The guest's synthetic interrupt controller and its timers.

use mshv_bindings::*;
use mshv_smoke::machine::{kind, region, Machine, Memory};

use super::Outcome;

const GUEST_OS_ID: u32 = 0x4000_0000;
const HYPERCALL: u32 = 0x4000_0001;
const REFERENCE_TSC: u32 = 0x4000_0021;
const SCONTROL: u32 = 0x4000_0080;
const SIEFP: u32 = 0x4000_0082;
const SIMP: u32 = 0x4000_0083;
const EOM: u32 = 0x4000_0084;
const SINT2: u32 = 0x4000_0092;
const SINT3: u32 = 0x4000_0093;
const EOI: u32 = 0x4000_0070;
const STIMER0_CONFIG: u32 = 0x4000_00b0;
const AUTO_EOI: u64 = 1 << 17;

/// Code that writes an MSR.
#[rustfmt::skip]
fn wrmsr(number: u32, value: u64) -> Vec<u8> {
    let (n, l, h) = (number.to_le_bytes(), (value as u32).to_le_bytes(), ((value >> 32) as u32).to_le_bytes());
    vec![
        0x66, 0xb9, n[0], n[1], n[2], n[3], // mov $number, %ecx
        0x66, 0xb8, l[0], l[1], l[2], l[3], // mov $low, %eax
        0x66, 0xba, h[0], h[1], h[2], h[3], // mov $high, %edx
        0x0f, 0x30,                         // wrmsr
    ]
}

/// Code that writes the byte at an address to a port.
fn out(address: u16, port: u8) -> Vec<u8> {
    let [low, high] = address.to_le_bytes();
    vec![0xa0, low, high, 0xe6, port] // mov address, %al; out %al, $port
}

/// Code that clears the 32 bits at an address.
fn clear(address: u16) -> Vec<u8> {
    let [low, high] = address.to_le_bytes();
    vec![0x66, 0xc7, 0x06, low, high, 0, 0, 0, 0] // movl $0, address
}

/// Code that waits with interrupts on.
fn sleep() -> Vec<u8> {
    vec![0xfb, 0xf4, 0xeb, 0xfd] // sti; 1: hlt; jmp 1b
}

const IRET: [u8; 1] = [0xcf];

/// A guest with a SynIC whose pages are at 0x5000 and 0x6000, that runs `code` and then sleeps, with handlers of two vectors.
fn guest(
    code: &[Vec<u8>],
    handlers: &[(u8, Vec<u8>)],
) -> Result<Machine, Box<dyn std::error::Error>> {
    let mut main = [
        wrmsr(SIMP, 0x5001),
        wrmsr(SIEFP, 0x6001),
        wrmsr(SCONTROL, 1),
    ]
    .concat();
    main.extend(code.concat());
    main.extend(sleep());
    assert!(main.len() <= 0x200);
    let machine = Machine::new(&main)?;
    let table = Memory::new(0x1000)?;
    for ((vector, code), address) in handlers.iter().zip((0x1200_u16..).step_by(0x100)) {
        assert!(code.len() <= 0x100);
        machine.memory.write(usize::from(address) - 0x1000, code);
        table.write(usize::from(*vector) * 4, &u32::from(address).to_le_bytes());
    }
    machine
        .vm
        .map_user_memory(region(0, table.address(), 0x1000, 3))?;
    std::mem::forget(table);
    machine.set(&[(hv_register_name_HV_X64_REGISTER_RSP, 0x4000)])?;
    machine.enable_apic()?;
    Ok(machine)
}

/// A message of type 1 with one byte, to source 2.
fn post(machine: &Machine, value: u8) -> Result<(), u16> {
    let mut message = [0; 256];
    (message[0], message[4], message[16]) = (1, 1, value);
    match machine.vm.post_message_direct(0, 2, &message) {
        Ok(()) => Ok(()),
        Err(mshv_ioctls::MshvError::Hypercall { status_raw, .. }) => Err(status_raw),
        Err(_) => Err(u16::MAX),
    }
}

const INSUFFICIENT_BUFFERS: u16 = 0x13;

/// Takes the message of source 2: value to port 0x10, flags to port 0x11.
fn take_message() -> Vec<u8> {
    [
        out(0x5210, 0x10),
        out(0x5205, 0x11),
        clear(0x5200),
        wrmsr(EOM, 0),
        wrmsr(EOI, 0),
        IRET.to_vec(),
    ]
    .concat()
}

pub fn messages_reach_the_guest_in_order() -> Outcome {
    let machine = guest(&[wrmsr(SINT2, 0x40)], &[(0x40, take_message())])?;
    // Before the guest listens, and one more than can wait.
    ensure!(post(&machine, 1) == Ok(()), "first message");
    ensure!(
        post(&machine, 9) == Err(INSUFFICIENT_BUFFERS),
        "one too many"
    );
    let seen = machine.next_port_write()?;
    ensure!(seen == (0x10, 1), "port {seen:x?}");
    // While the slot is full.
    ensure!(post(&machine, 2) == Ok(()), "second message");
    ensure!(
        post(&machine, 9) == Err(INSUFFICIENT_BUFFERS),
        "one too many"
    );
    for expected in [(0x11, 1), (0x10, 2), (0x11, 0)] {
        let seen = machine.next_port_write()?;
        ensure!(seen == expected, "port {seen:x?}, not {expected:x?}");
    }
    Ok(())
}

/// A message wakes a guest that sleeps, from another thread than the one that runs it.
pub fn message_wakes_a_sleeping_guest() -> Outcome {
    let machine = guest(
        &[wrmsr(SINT2, 0x40), vec![0xe6, 0x20]],
        &[(0x40, take_message())],
    )?;
    let seen = machine.next_port_write()?;
    ensure!(seen.0 == 0x20, "port {seen:x?}");
    let seen = std::thread::scope(|scope| {
        let sender = scope.spawn(|| post(&machine, 3));
        let seen = machine.next_port_write().map_err(|error| error.to_string());
        (sender.join(), seen)
    });
    ensure!(matches!(seen.0, Ok(Ok(()))), "message {:?}", seen.0);
    ensure!(seen.1 == Ok((0x10, 3)), "port {:x?}", seen.1);
    Ok(())
}

/// The interrupt of source 3 ends itself; flag 9 is bit 1 of its second byte. Outside of its handler the guest writes to port 0x20.
pub fn event_flags_reach_the_guest() -> Outcome {
    let handler = [out(0x6301, 0x12), clear(0x6300), IRET.to_vec()].concat();
    let main = [
        wrmsr(SINT3, 0x41 | AUTO_EOI),
        vec![0xfb, 0xe6, 0x20, 0xeb, 0xfc], // sti; 1: out %al, $0x20; jmp 1b
    ];
    let machine = guest(&main, &[(0x41, handler)])?;
    for new in [true, false] {
        let answer = machine.vm.signal_event_direct(0, 3, 9)?;
        ensure!(answer == new, "newly signalled: {answer}");
    }
    let next = || loop {
        match machine.next_port_write() {
            Ok((0x20, _)) => {}
            other => return other,
        }
    };
    for _ in 0..3 {
        let seen = next()?;
        ensure!(seen == (0x12, 2), "port {seen:x?}");
        // It is in the handler, before it clears the flag.
        ensure!(!machine.vm.signal_event_direct(0, 3, 9)?, "flag 9 is new");
        ensure!(machine.vm.signal_event_direct(0, 3, 300)?, "flag 300");
        let seen = next()?;
        ensure!(seen == (0x12, 0), "port {seen:x?}");
        machine.memory.write(0x5325, &[0]);
        let seen = machine.next_port_write()?;
        ensure!(seen.0 == 0x20, "port {seen:x?}");
        ensure!(machine.vm.signal_event_direct(0, 3, 9)?, "flag 9 is old");
    }
    Ok(())
}

pub fn vmm_hears_when_a_source_takes_messages_again() -> Outcome {
    let machine = guest(&[wrmsr(SINT2, 0x40)], &[(0x40, take_message())])?;
    ensure!(post(&machine, 1) == Ok(()), "message");
    machine
        .vm
        .register_deliverabilty_notifications(0, 1 << 50)?;
    let message = machine.next_message()?;
    ensure!(
        kind(&message) == hv_message_type_HVMSG_SYNIC_SINT_DELIVERABLE,
        "message {:#x}",
        kind(&message)
    );
    // SAFETY: any bytes are valid.
    let payload = unsafe { message.u.payload };
    let sources = payload[5] & 0xffff;
    ensure!(sources == 1 << 2, "sources {sources:#x}");
    let seen = machine.next_port_write()?;
    ensure!(seen == (0x10, 1), "port {seen:x?}");
    Ok(())
}

/// Timer 0 raises vector 0x42 at a time 1 ms from now; timer 1 sends messages to source 2 each 200 us.
pub fn timers_expire() -> Outcome {
    #[rustfmt::skip]
    let one_shot = [
        wrmsr(STIMER0_CONFIG, 0x42 << 4 | 0x1008),
        vec![
            0x66, 0xb9, 0x20, 0, 0, 0x40, // mov $0x40000020, %ecx   TIME_REF_COUNT
            0x0f, 0x32,                   // rdmsr
            0x66, 0x05, 0x10, 0x27, 0, 0, // add $10000, %eax
            0x66, 0x83, 0xd2, 0,          // adc $0, %edx
            0x66, 0xb9, 0xb1, 0, 0, 0x40, // mov $0x400000b1, %ecx
            0x0f, 0x30,                   // wrmsr
        ],
    ].concat();
    let direct = [vec![0xe6, 0x13], wrmsr(EOI, 0), IRET.to_vec()].concat();
    let machine = guest(&[one_shot], &[(0x42, direct)])?;
    let seen = machine.next_port_write()?;
    ensure!(seen.0 == 0x13, "port {seen:x?}");

    let periodic = [
        wrmsr(SINT2, 0x40),
        wrmsr(STIMER0_CONFIG + 3, 2000),
        wrmsr(STIMER0_CONFIG + 2, 2 << 16 | 3),
    ]
    .concat();
    let handler = [
        out(0x5210, 0x10), // which timer
        out(0x5200, 0x11), // low byte of the message's type
        clear(0x5200),
        wrmsr(EOM, 0),
        wrmsr(EOI, 0),
        IRET.to_vec(),
    ]
    .concat();
    let machine = guest(&[periodic], &[(0x40, handler)])?;
    for _ in 0..3 {
        for expected in [(0x10, 1), (0x11, 0x10)] {
            let seen = machine.next_port_write()?;
            ensure!(seen == expected, "port {seen:x?}, not {expected:x?}");
        }
    }
    Ok(())
}

/// Pages of the guest that only the hypervisor touches are found wherever the kernel has them.
pub fn pages_that_are_away_come_for_the_hypervisor() -> Outcome {
    let give_back = |machine: &Machine| machine.memory.advise(0, 0xa000, libc::MADV_DONTNEED);
    // Never touched by anybody.
    let code = [
        wrmsr(GUEST_OS_ID, 1),
        wrmsr(HYPERCALL, 0x7001),
        wrmsr(REFERENCE_TSC, 0x8001),
        out(0x7000, 0x10),
        out(0x8000, 0x11),
        wrmsr(SINT2, 0x40),
    ];
    let machine = guest(&code, &[(0x40, take_message())])?;
    let seen = machine.next_port_write()?;
    ensure!(seen == (0x10, 0x0f), "hypercall page: port {seen:x?}");
    let seen = machine.next_port_write()?;
    ensure!(seen.0 == 0x11 && seen.1 != 0, "time page: port {seen:x?}");
    for value in 1..4 {
        // Asleep.
        while machine.vcpu.run().is_ok() {}
        give_back(&machine)?;
        ensure!(post(&machine, value) == Ok(()), "message {value}");
        for expected in [(0x10, value.into()), (0x11, 0)] {
            let seen = machine.next_port_write()?;
            ensure!(seen == expected, "port {seen:x?}, not {expected:x?}");
        }
    }
    // What the VMM sees of them.
    machine.memory.write(0x4210, &[0x5a]);
    give_back(&machine)?;
    let page = machine.vcpu.get_all_vp_state_components()?;
    let offset = page.buffer.windows(2).any(|bytes| bytes == [0x5a, 0]);
    ensure!(offset, "the page of messages is another");
    Ok(())
}

/// What a VMM saves of the SynIC and its timers, it can load into another VP.
pub fn synic_state_moves() -> Outcome {
    let machine = guest(&[wrmsr(SINT2, 0x40)], &[(0x40, take_message())])?;
    ensure!(post(&machine, 5) == Ok(()), "message");
    let mut state = machine.vcpu.get_all_vp_state_components()?;
    let other = guest(&[wrmsr(SINT2, 0x40)], &[(0x40, take_message())])?;
    other.vcpu.set_all_vp_state_components(&mut state)?;
    let seen = other.next_port_write()?;
    ensure!(seen == (0x10, 5), "port {seen:x?}");
    Ok(())
}
