// SPDX-License-Identifier: GPL-2.0
//! What a VMM sees and changes at an access to a port, and doorbells that come late.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};

use mshv_bindings::*;
use mshv_smoke::machine::{self, ioctl, Machine};
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use super::Outcome;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Words of the register page: its head, 16 general registers, RIP, RFLAGS, one reserved, XMM0 to XMM5, ES to GS, ten others.
type Page = [u64; 54];
const RAX: usize = 1;
const RIP: usize = 17;
/// Version 1, valid, nothing changed.
const CLEAN: u64 = 0x1_0001;
/// Groups in the upper half of the head: general registers and RIP.
const CHANGED: u64 = 3 << 32;

fn address(machine: &Machine) -> Result<*mut u64> {
    let page = machine.vcpu.get_vp_reg_page().ok_or("no register page")?;
    Ok(page.0.cast())
}

fn page(machine: &Machine) -> Result<Page> {
    let address = address(machine)?;
    // SAFETY: the crate maps a whole page for as long as the VP lives.
    Ok(std::array::from_fn(|word| unsafe {
        address.add(word).read_volatile()
    }))
}

fn write(machine: &Machine, word: usize, value: u64) -> Outcome {
    // SAFETY: as above, and the callers' words are in the page.
    unsafe { address(machine)?.add(word).write_volatile(value) };
    Ok(())
}

/// The same words by hypercall.
fn registers(machine: &Machine) -> Result<Page> {
    let pairs = (0..6).map(|index| hv_register_name_HV_X64_REGISTER_XMM0 + index);
    let segments = (0..6).map(|index| hv_register_name_HV_X64_REGISTER_ES + index);
    let names: Vec<_> = (0..18)
        .map(|index| hv_register_name_HV_X64_REGISTER_RAX + index)
        .chain(pairs)
        .chain(segments)
        .chain([
            hv_register_name_HV_X64_REGISTER_CR0,
            hv_register_name_HV_X64_REGISTER_CR3,
            hv_register_name_HV_X64_REGISTER_CR4,
            hv_register_name_HV_X64_REGISTER_CR8,
            hv_register_name_HV_X64_REGISTER_EFER,
            hv_register_name_HV_X64_REGISTER_DR7,
            hv_register_name_HV_REGISTER_PENDING_INTERRUPTION,
            hv_register_name_HV_REGISTER_INTERRUPT_STATE,
            hv_register_name_HV_X64_REGISTER_XFEM,
        ])
        .collect();
    let mut list: Vec<_> = names
        .iter()
        .map(|name| hv_register_assoc {
            name: *name,
            ..Default::default()
        })
        .collect();
    machine.vcpu.get_reg(&mut list)?;
    // SAFETY: all 128 bits were zero or are what the call wrote.
    let value = |index: usize| unsafe { list[index].value.reg128 };
    let low = |index: usize| value(index).low_part;
    let mut words = [0; 54];
    words[0] = CLEAN;
    for index in 0..18 {
        words[RAX + index] = low(index);
    }
    for index in 0..12 {
        let pair = value(18 + index);
        words[20 + 2 * index..][..2].copy_from_slice(&[pair.low_part, pair.high_part]);
    }
    for index in 0..8 {
        words[44 + index] = low(30 + index);
    }
    words[53] = low(38);
    Ok(words)
}

/// The register page says what the registers are.
pub fn ensure_same(machine: &Machine) -> Outcome {
    let shown = page(machine)?;
    let true_ones = registers(machine)?;
    let wrong = (0..shown.len()).find(|word| shown[*word] != true_ones[*word]);
    let Some(word) = wrong else { return Ok(()) };
    let (page, register) = (shown[word], true_ones[word]);
    Err(format!("word {word} of the page is {page:#x}, the register {register:#x}").into())
}

/// Runs to an access to a port and moves behind it by the register page. Port, AL, and whether it is a read.
fn next_access(machine: &Machine, al: Option<u64>) -> Result<(u16, u64, bool)> {
    let message = machine.next_message()?;
    let kind = machine::kind(&message);
    if kind != hv_message_type_HVMSG_X64_IO_PORT_INTERCEPT {
        return Err(format!("message {kind:#x} instead of port I/O").into());
    }
    let info = message.to_ioport_info()?;
    let words = page(machine)?;
    let (rip, rax) = (info.header.rip, info.rax);
    if (words[0], words[RAX], words[RIP]) != (CLEAN, rax, rip) {
        return Err(format!("page {words:x?}, but RIP {rip:#x} and RAX {rax:#x}").into());
    }
    let next = rip + u64::from(info.header.instruction_length());
    write(machine, RIP, next)?;
    if let Some(al) = al {
        write(machine, RAX, rax & !0xff | al)?;
    }
    write(machine, 0, CLEAN | CHANGED)?;
    let is_read = info.header.intercept_access_type == 0;
    Ok((info.port_number, rax & 0xff, is_read))
}

/// Also where no message ends the run, but its time.
pub fn register_page_is_right_after_any_run() -> Outcome {
    let machine = Machine::new(&[0x66, 0x41, 0xeb, 0xfc])?; // 1: inc %ecx; jmp 1b
    for _ in 0..3 {
        let ended = machine.vcpu.run().err().map(|error| error.errno());
        if ended != Some(libc::EINTR) {
            return Err(format!("the run gave {ended:?}").into());
        }
        ensure_same(&machine)?;
    }
    Ok(())
}

pub fn register_page_is_right_at_a_port() -> Outcome {
    #[rustfmt::skip]
    let code = [
        0xba, 0x20, 0x05, // mov $0x520, %dx
        0xb0, 0x33,       // mov $0x33, %al
        0xee,             // out %al, %dx
        0xec,             // in %dx, %al
        0xe6, 0x21,       // out %al, $0x21
        0xfb,             // sti
        0xe6, 0x22,       // out %al, $0x22      in the shadow of STI
        0xf4,             // hlt
    ];
    let machine = Machine::new(&code)?;
    let mut list = [
        hv_register_name_HV_X64_REGISTER_XMM0 + 5,
        hv_register_name_HV_X64_REGISTER_FS,
    ]
    .map(|name| hv_register_assoc {
        name,
        ..Default::default()
    });
    machine.vcpu.get_reg(&mut list)?;
    list[0].value.reg128 = hv_u128 {
        low_part: 0x1111_2222_3333_4444,
        high_part: 0x5555_6666_7777_8888,
    };
    list[1].value.segment.base = 0x1_2340;
    list[1].value.segment.selector = 0x1234;
    machine.vcpu.set_reg(&list)?;
    machine.set(&[
        (hv_register_name_HV_X64_REGISTER_R15, 0xfedc_ba98_7654_3210),
        (hv_register_name_HV_X64_REGISTER_RSP, 0x8000),
        (hv_register_name_HV_X64_REGISTER_DR7, 0x402),
    ])?;
    let access = next_access(&machine, None)?;
    ensure!(access == (0x520, 0x33, false), "first {access:x?}");
    let access = next_access(&machine, Some(0x5a))?;
    ensure!(access == (0x520, 0x33, true), "second {access:x?}");
    let message = machine.next_message()?;
    let info = message.to_ioport_info()?;
    ensure!((info.port_number, info.rax & 0xff) == (0x21, 0x5a), "third");
    ensure_same(&machine)?;
    let access = next_access(&machine, None)?;
    ensure!(access == (0x21, 0x5a, false), "third again {access:x?}");
    machine.next_message()?;
    let words = page(&machine)?;
    ensure!(words[51] == 1, "interrupt state {:#x}", words[51]);
    ensure_same(&machine)
}

pub fn port_doorbell_is_heard_at_once() -> Outcome {
    const PORT: u16 = 0x510;
    #[rustfmt::skip]
    let code = [
        0xba, 0x10, 0x05,             // mov $0x510, %dx
        0xbb, 0x00, 0x20,             // mov $0x2000, %bx
        0xfe, 0x07,                   // 1: incb (%bx)
        0x80, 0x7f, 0x01, 0x00,       // cmpb $0, 1(%bx)
        0x74, 0xf8,                   // jz 1b
        0xee,                         // out %al, %dx
        0xe6, 0x21,                   // out %al, $0x21
        0xf4,                         // hlt
    ];
    for turn in 0..10 {
        let machine = Machine::new(&code)?;
        let event = EventFd::new(EFD_NONBLOCK)?;
        let bell = mshv_user_ioeventfd {
            addr: PORT.into(),
            len: 1,
            fd: event.as_raw_fd(),
            flags: 1 << MSHV_IOEVENTFD_BIT_PIO,
            ..Default::default()
        };
        let stopped = AtomicBool::new(false);
        let seen = std::thread::scope(|scope| {
            let runner = scope.spawn(|| {
                let seen = machine.next_port_write().map_err(|error| error.to_string());
                stopped.store(true, Ordering::Release);
                seen
            });
            // It runs.
            for _ in 0..100 {
                let before = machine.memory.read(0x1000);
                while machine.memory.read(0x1000) == before && !stopped.load(Ordering::Acquire) {
                    std::hint::spin_loop();
                }
            }
            let added = ioctl(machine.vm.as_raw_fd(), 0x4020_b804, &raw const bell as u64);
            machine.memory.write(0x1001, &[1]);
            added?;
            let seen = runner.join().map_err(|_| "thread")??;
            Ok::<_, Box<dyn std::error::Error>>(seen)
        })?;
        ensure!(seen.0 == 0x21, "turn {turn}: port {:#x}", seen.0);
        ensure!(event.read().ok() == Some(1), "turn {turn}: not rung");
    }
    Ok(())
}
