// SPDX-License-Identifier: GPL-2.0
//! The local APIC in both modes: what the guest does to it, and what the VMM hears of that.

use std::os::fd::{AsRawFd, RawFd};

use mshv_bindings::*;
use mshv_ioctls::InterruptRequest;
use mshv_smoke::machine::{errno, ioctl, kind, Machine};
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use super::Outcome;

/// Real-mode code that starts VP 1 at 0x2000 in x2APIC mode.
#[rustfmt::skip]
pub const START_BY_MSR: [u8; 44] = [
    0x66, 0xb9, 0x1b, 0, 0, 0,          // mov $0x1b, %ecx     IA32_APIC_BASE
    0x0f, 0x32,                         // rdmsr
    0x0d, 0x00, 0x0c,                   // or $0xc00, %ax      x2APIC mode
    0x0f, 0x30,                         // wrmsr
    0x66, 0xb9, 0x30, 0x08, 0, 0,       // mov $0x830, %ecx    ICR
    0x66, 0xba, 0x01, 0, 0, 0,          // mov $1, %edx        to APIC 1
    0x66, 0xb8, 0x00, 0x45, 0, 0,       // mov $0x4500, %eax   INIT
    0x0f, 0x30,                         // wrmsr
    0x66, 0xb8, 0x02, 0x46, 0, 0,       // mov $0x4602, %eax   SIPI to 0x2000
    0x0f, 0x30,                         // wrmsr
    0xf4, 0xeb, 0xfd,                   // 1: hlt; jmp 1b
];

/// The same in xAPIC mode, with the page at DS:0.
#[rustfmt::skip]
pub const START_BY_PAGE: [u8; 30] = [
    0x66, 0xc7, 0x06, 0x10, 0x03, 0, 0, 0, 0x01,    // movl $0x1000000, 0x310   to APIC 1
    0x66, 0xc7, 0x06, 0x00, 0x03, 0x00, 0x45, 0, 0, // movl $0x4500, 0x300      INIT
    0x66, 0xc7, 0x06, 0x00, 0x03, 0x02, 0x46, 0, 0, // movl $0x4602, 0x300      SIPI to 0x2000
    0xf4, 0xeb, 0xfd,                               // 1: hlt; jmp 1b
];

/// Lets DS of a real-mode guest begin at the page of its local APIC.
pub fn reach_page(machine: &Machine) -> Outcome {
    let mut data = [hv_register_assoc {
        name: hv_register_name_HV_X64_REGISTER_DS,
        ..Default::default()
    }];
    machine.vcpu.get_reg(&mut data)?;
    data[0].value.segment.base = 0xfee0_0000;
    Ok(machine.vcpu.set_reg(&data)?)
}

pub fn page_takes_all_kinds_of_accesses() -> Outcome {
    #[rustfmt::skip]
    let code = [
        0x66, 0xa1, 0x30, 0,                            // mov 0x30, %eax        version
        0xe6, 0x10,                                     // out %al, $0x10
        0x66, 0xc7, 0x06, 0x80, 0, 0x20, 0, 0, 0,       // movl $0x20, 0x80      TPR
        0x66, 0x0f, 0xb6, 0x06, 0x80, 0,                // movzbl 0x80, %eax
        0xe6, 0x11,                                     // out %al, $0x11
        0x66, 0x81, 0x0e, 0xf0, 0, 0, 0x01, 0, 0,       // orl $0x100, 0xf0      SVR
        0x66, 0xf7, 0x06, 0xf0, 0, 0, 0x01, 0, 0,       // testl $0x100, 0xf0
        0x0f, 0x95, 0xc0,                               // setnz %al
        0xe6, 0x12,                                     // out %al, $0x12
        0x66, 0xb8, 0x30, 0, 0, 0,                      // mov $0x30, %eax
        0x66, 0x87, 0x06, 0x80, 0,                      // xchg %eax, 0x80
        0xe6, 0x13,                                     // out %al, $0x13
        0xc6, 0x06, 0x80, 0, 0x50,                      // movb $0x50, 0x80      not 32 bits: ignored
        0x66, 0xc7, 0x06, 0x84, 0, 0x50, 0, 0, 0,       // movl $0x50, 0x84      not aligned: ignored
        0x66, 0x8b, 0x0e, 0x80, 0,                      // mov 0x80, %ecx
        0x88, 0xc8,                                     // mov %cl, %al
        0xe6, 0x14,                                     // out %al, $0x14
        0x66, 0xbe, 0x80, 0, 0, 0,                      // mov $0x80, %esi
        0x66, 0xa5,                                     // movsl                 for the VMM
    ];
    let machine = Machine::new(&code)?;
    reach_page(&machine)?;
    for expected in [
        (0x10, 0x14),
        (0x11, 0x20),
        (0x12, 1),
        (0x13, 0x20),
        (0x14, 0x30),
    ] {
        let seen = machine.next_port_write()?;
        ensure!(seen == expected, "port {seen:x?}, not {expected:x?}");
    }
    let message = machine.next_message()?;
    ensure!(
        kind(&message) == hv_message_type_HVMSG_UNMAPPED_GPA,
        "message {:#x}",
        kind(&message)
    );
    let gpa = message.to_memory_info()?.guest_physical_address;
    ensure!(gpa == 0xfee0_0080, "GPA {gpa:#x}");
    Ok(())
}

/// A guest that sleeps with interrupts on, and whose handler of vector 0x40 ends the interrupt and writes to port 0x20: 0x33, and 1 more
/// if the interrupt was level-triggered by the word of its APIC.
fn level_sleeper() -> Result<Machine, Box<dyn std::error::Error>> {
    #[rustfmt::skip]
    let code = [
        0xfb,                                           // sti
        0xf4, 0xeb, 0xfd,                               // 1: hlt; jmp 1b
        0x66, 0xc7, 0x06, 0xb0, 0, 0, 0, 0, 0,          // 0x1004: movl $0, 0xb0   EOI
        0x66, 0x8b, 0x06, 0xa0, 0x01,                   // mov 0x1a0, %eax      TMR of vectors 0x40 to 0x5f
        0x04, 0x33,                                     // add $0x33, %al
        0xe6, 0x20,                                     // out %al, $0x20
        0xcf,                                           // iret
    ];
    let machine = Machine::new(&code)?;
    machine.handle(0x40, 0x1004)?;
    reach_page(&machine)?;
    machine.enable_apic()?;
    Ok(machine)
}

/// The VMM hears that VP 0 ended vector 0x40.
fn expect_eoi(machine: &Machine) -> Outcome {
    let message = machine.next_message()?;
    ensure!(
        kind(&message) == hv_message_type_HVMSG_X64_APIC_EOI,
        "message {:#x}",
        kind(&message)
    );
    let end = message.to_apic_eoi_info()?;
    let (vp, vector) = (end.vp_index, end.interrupt_vector);
    ensure!((vp, vector) == (0, 0x40), "VP {vp} vector {vector:#x}");
    Ok(())
}

/// And the guest does not see from its APIC that it will: it ends the interrupt in the I/O APIC itself, because QEMU does not.
pub fn end_of_a_level_interrupt_reaches_the_vmm() -> Outcome {
    let machine = level_sleeper()?;
    for level_triggered in [false, true] {
        machine.vm.request_virtual_interrupt(&InterruptRequest {
            interrupt_type: hv_interrupt_type_HV_X64_INTERRUPT_TYPE_FIXED,
            apic_id: 0,
            vector: 0x40,
            level_triggered,
            logical_destination_mode: false,
            long_mode: false,
        })?;
        if level_triggered {
            expect_eoi(&machine)?;
        }
        ensure!(machine.next_port_write()? == (0x20, 0x33), "port");
    }
    Ok(())
}

/// The kernel tells an event of the end of a level-triggered interrupt, as long as the line has an irqfd that wants it.
pub fn end_of_a_level_interrupt_reaches_the_event() -> Outcome {
    const RESAMPLE: u32 = 1 << MSHV_IRQFD_BIT_RESAMPLE;
    let machine = level_sleeper()?;
    let vm = machine.vm.as_raw_fd();
    let event = || EventFd::new(EFD_NONBLOCK);
    let (line, shared, resample) = (event()?, event()?, event()?);
    let attempt = |fd: RawFd, resamplefd: RawFd, gsi: u32, flags: u32| {
        let request = mshv_user_irqfd {
            fd,
            resamplefd,
            gsi,
            flags,
        };
        errno(ioctl(vm, 0x4010_b803, &raw const request as u64))
    };
    let (line_fd, resample_fd) = (line.as_raw_fd(), resample.as_raw_fd());
    // Lines 5, 6 and 9 are level-triggered and share a vector, 9 goes to VP 1; 7 is edge-triggered, 8 has no route.
    #[rustfmt::skip]
    let table = [
        4u32, 0,
        5, 0xfee0_0000, 0, 0x8040,
        6, 0xfee0_0000, 0, 0x8040,
        7, 0xfee0_0000, 0, 0x0040,
        9, 0xfee0_1000, 0, 0x8040,
    ];
    ensure!(
        ioctl(vm, 0x4008_b805, table.as_ptr() as u64).is_ok(),
        "routes"
    );
    for (case, (got, expected)) in [
        (attempt(-1, resample_fd, 5, RESAMPLE), libc::EBADF),
        (attempt(vm, resample_fd, 5, RESAMPLE), libc::EINVAL),
        (attempt(line_fd, -1, 5, RESAMPLE), libc::EBADF),
        (attempt(line_fd, vm, 5, RESAMPLE), libc::EINVAL),
        (attempt(line_fd, resample_fd, 7, RESAMPLE), libc::EINVAL),
        (attempt(line_fd, resample_fd, 8, RESAMPLE), libc::EINVAL),
        (attempt(line_fd, resample_fd, 5, 4), libc::EINVAL),
    ]
    .into_iter()
    .enumerate()
    {
        ensure!(got == expected, "case {case}: errno {got}, not {expected}");
    }
    // What was refused left nothing: the event is free.
    machine
        .vm
        .register_irqfd_with_resample(&line, &resample, 5)?;
    let expect_end = |times: Option<u64>| -> Outcome {
        ensure!(machine.next_port_write()? == (0x20, 0x34), "port");
        let told = resample.read().ok();
        ensure!(told == times, "told {told:?} times, not {times:?}");
        Ok(())
    };
    // The device still wants attention after the first time.
    for _ in 0..2 {
        line.write(1)?;
        expect_end(Some(1))?;
    }
    super::interrupted_run(&machine)?;
    ensure!(resample.read().is_err(), "told without an interrupt");
    // Each of two lines is told.
    machine
        .vm
        .register_irqfd_with_resample(&shared, &resample, 6)?;
    shared.write(1)?;
    expect_end(Some(2))?;
    // A line that goes away between the interrupt and its end is not told; without any line of this VP the VMM is.
    let other = event()?;
    machine
        .vm
        .register_irqfd_with_resample(&other, &resample, 9)?;
    shared.write(1)?;
    machine.vm.unregister_irqfd(&shared, 6)?;
    expect_end(Some(1))?;
    line.write(1)?;
    machine.vm.unregister_irqfd(&line, 5)?;
    expect_eoi(&machine)?;
    expect_end(None)?;
    line.write(1)?;
    super::interrupted_run(&machine)?;
    Ok(())
}
