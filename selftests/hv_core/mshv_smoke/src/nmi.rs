// SPDX-License-Identifier: GPL-2.0
//! Non-maskable interrupts, which are blocked from one's delivery to the end of the IRET that ends its handler.

use mshv_bindings::*;
use mshv_ioctls::InterruptRequest;
use mshv_smoke::machine::{kind, region, Machine, Memory};

use super::Outcome;

fn send(machine: &Machine) -> Outcome {
    Ok(machine.vm.request_virtual_interrupt(&InterruptRequest {
        interrupt_type: hv_interrupt_type_HV_X64_INTERRUPT_TYPE_NMI,
        apic_id: 0,
        vector: 2,
        level_triggered: false,
        logical_destination_mode: false,
        long_mode: false,
    })?)
}

/// The IRET finds no stack, until the VMM maps it. A second NMI comes before or after that, and is delivered behind the IRET.
pub fn nmis_stay_blocked_until_iret_is_done() -> Outcome {
    const IRET: u64 = 0x108f;
    let main = [0xeb, 0xfe]; // 0x1000: jmp .
    let behind = [0xeb, 0xfe]; // 0x1010: jmp .
    #[rustfmt::skip]
    let handler = [
        0x8b, 0xec,       // 0x1080: mov %sp, %bp
        0x8a, 0x46, 0x00, // mov (%bp), %al       the low byte of the return address
        0xe6, 0x10,       // out %al, $0x10
        0xb9, 0x00, 0xf0, // mov $0xf000, %cx
        0x8e, 0xd1,       // mov %cx, %ss
        0xbc, 0x00, 0x01, // mov $0x100, %sp
        0xcf,             // 0x108f: iret
    ];
    for before_the_fault in [true, false] {
        let machine = Machine::new(&main)?;
        machine.memory.write(0x10, &behind);
        machine.memory.write(0x80, &handler);
        machine.handle(2, 0x1080)?;
        send(&machine)?;
        let first = machine.next_port_write()?;
        ensure!(first == (0x10, 0), "first {first:x?}");
        if before_the_fault {
            send(&machine)?;
        }
        let message = machine.next_message()?;
        ensure!(
            kind(&message) == hv_message_type_HVMSG_UNMAPPED_GPA,
            "message {:#x}, {before_the_fault}",
            kind(&message)
        );
        let info = message.to_memory_info()?;
        let (gpa, rip) = (info.guest_physical_address, info.header.rip);
        ensure!(
            (gpa >> 12, rip) == (0xf0, IRET),
            "GPA {gpa:#x} at {rip:#x}, {before_the_fault}"
        );
        if !before_the_fault {
            send(&machine)?;
        }
        let stack = Memory::new(0x1000)?;
        // IP, CS, flags.
        stack.write(0x100, &[0x10, 0x10, 0, 0, 2, 0]);
        machine
            .vm
            .map_user_memory(region(0xf0, stack.address(), 0x1000, 3))?;
        let second = machine.next_port_write()?;
        ensure!(
            second == (0x10, 0x10),
            "second {second:x?}, {before_the_fault}"
        );
    }
    Ok(())
}
