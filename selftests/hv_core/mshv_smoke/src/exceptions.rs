// SPDX-License-Identifier: GPL-2.0
//! Exceptions that the hypervisor intercepts: the guest must see them as without it, and cannot hold a CPU with them.

use std::arch::asm;

use mshv_bindings::*;
use mshv_smoke::machine::{table, Machine};

use super::{interrupted_run, Outcome};

type Made = Result<Machine, Box<dyn std::error::Error>>;

pub fn debug_exceptions_reach_the_guest() -> Outcome {
    #[rustfmt::skip]
    let main = [
        0xa2, 0x00, 0x50,             // 0x1000: mov %al, 0x5000     watched by DR0
        0xf1,                         // 0x1003: int1
        0x68, 0x02, 0x01,             // 0x1004: push $0x102          TF
        0x9d,                         // 0x1007: popf
        0x90,                         // 0x1008: nop
        0x0f, 0xa2,                   // 0x1009: cpuid
        0x68, 0x02, 0x00,             // 0x100b: push $2
        0x9d,                         // 0x100e: popf
        0xf4,                         // 0x100f: hlt
    ];
    #[rustfmt::skip]
    let debug = [
        0x66, 0x0f, 0x21, 0xf0,       // 0x1080: mov %dr6, %eax
        0xe6, 0x10,                   // out %al, $0x10
        0x88, 0xe0,                   // mov %ah, %al
        0xe6, 0x11,                   // out %al, $0x11
        0x66, 0x31, 0xc0,             // xor %eax, %eax
        0x66, 0x0f, 0x23, 0xf0,       // mov %eax, %dr6
        0x8b, 0xec,                   // mov %sp, %bp
        0x8a, 0x46, 0x00,             // mov (%bp), %al       the low byte of the return address
        0xe6, 0x12,                   // out %al, $0x12
        0xcf,                         // iret
    ];
    let machine = Machine::new(&main)?;
    machine.memory.write(0x80, &debug);
    machine.handle(1, 0x1080)?;
    machine.set(&[
        (hv_register_name_HV_X64_REGISTER_DR0, 0x5000),
        // Local enable, a byte, writes.
        (hv_register_name_HV_X64_REGISTER_DR7, 0x1_0401),
    ])?;
    // After the write: B0. INT1 sets nothing. After each stepped instruction, the emulated CPUID too: BS.
    for (cause, next) in [
        ((1, 0), 0x03),
        ((0, 0), 0x04),
        ((0, 0x40), 0x09),
        ((0, 0x40), 0x0b),
        ((0, 0x40), 0x0e),
        ((0, 0x40), 0x0f),
    ] {
        let mut seen = [0; 3];
        for (port, slot) in (0x10..).zip(&mut seen) {
            let (at, value) = machine.next_port_write()?;
            ensure!(at == port, "port {at:#x}, not {port:#x}, before {next:#x}");
            *slot = value;
        }
        let [low, high, at] = seen;
        ensure!(
            (low & 0xf, high & 0x40, at) == (cause.0, cause.1, next),
            "DR6 {high:02x}{low:02x} at {at:#x}, not {cause:x?} at {next:#x}"
        );
    }
    interrupted_run(&machine).map(|_| ())
}

/// Whether this machine checks the alignment of a program that asks for it.
fn machine_checks_alignment() -> std::io::Result<bool> {
    // SAFETY: the child only sets a flag, reads its own stack, and ends.
    match unsafe { libc::fork() } {
        -1 => Err(std::io::Error::last_os_error()),
        0 => {
            let words = [0u64; 2];
            // SAFETY: reads inside of `words`; AC ends the child if it is checked.
            unsafe {
                libc::signal(libc::SIGBUS, libc::SIG_DFL);
                asm!("pushfq", "or dword ptr [rsp], 0x40000", "popfq", "mov {0:e}, [{1} + 1]",
                    "pushfq", "and dword ptr [rsp], 0xfffbffff", "popfq",
                    out(reg) _, in(reg) words.as_ptr());
                libc::_exit(0);
            }
        }
        child => {
            let mut status = 0;
            // SAFETY: waits for our own child.
            unsafe { libc::waitpid(child, &mut status, 0) };
            Ok(libc::WIFSIGNALED(status))
        }
    }
}

/// A guest in 64-bit mode that starts at `rip`, 0x1000 (CPL 0) or with `user` at CPL 3. The handler of `vector`, on a stack of its own
/// whose top is 0x8000, is at 0x1080.
fn long_mode(main: &[u8], code: &[u8], vector: usize, user: bool) -> Made {
    let machine = Machine::new(main)?;
    // Memory begins at 0x1000.
    let write =
        |address: usize, value: u64| machine.memory.write(address - 0x1000, &value.to_le_bytes());
    machine.memory.write(0x80, code);
    // PML4, PDPT, PD with one page of 2 MiB, all for user code too.
    write(0x2000, 0x3007);
    write(0x3000, 0x4007);
    write(0x4000, 0x87);
    // GDT: code and data of CPL 0, then of CPL 3, then the TSS.
    for (index, descriptor) in [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x0000_8b00_7000_0067,
        0,
    ]
    .into_iter()
    .enumerate()
    {
        write(0x5000 + 8 * index, descriptor);
    }
    // An interrupt gate, first stack of the TSS.
    write(0x6000 + 16 * vector, 0x1080 | 8 << 16 | 0x8e01 << 32);
    write(0x7000 + 0x24, 0x8000);
    let segment = |name, selector, attributes, limit, base| hv_register_assoc {
        name,
        value: hv_register_value {
            segment: hv_x64_segment_register {
                base,
                limit,
                selector,
                __bindgen_anon_1: hv_x64_segment_register__bindgen_ty_1 { attributes },
            },
        },
        ..Default::default()
    };
    let (cs, ss) = if user {
        ((0x1b, 0xa0fb), (0x23, 0xc0f3))
    } else {
        ((8, 0xa09b), (0x10, 0xc093))
    };
    machine.set(&[
        (hv_register_name_HV_X64_REGISTER_CR3, 0x2000),
        (hv_register_name_HV_X64_REGISTER_CR4, 0x20),
        (hv_register_name_HV_X64_REGISTER_EFER, 0x500),
        // PG, AM, PE with ET and NE.
        (hv_register_name_HV_X64_REGISTER_CR0, 0x8004_0031),
        (hv_register_name_HV_X64_REGISTER_RSP, 0x9000),
    ])?;
    machine.vcpu.set_reg(&[
        segment(hv_register_name_HV_X64_REGISTER_CS, cs.0, cs.1, u32::MAX, 0),
        segment(hv_register_name_HV_X64_REGISTER_SS, ss.0, ss.1, u32::MAX, 0),
        segment(hv_register_name_HV_X64_REGISTER_DS, ss.0, ss.1, u32::MAX, 0),
        segment(
            hv_register_name_HV_X64_REGISTER_TR,
            0x28,
            0x8b,
            0x67,
            0x7000,
        ),
        table(hv_register_name_HV_X64_REGISTER_GDTR, 0x5000, 0x37),
        table(hv_register_name_HV_X64_REGISTER_IDTR, 0x6000, 0xfff),
    ])?;
    Ok(machine)
}

pub fn alignment_checks_reach_the_guest() -> Outcome {
    #[rustfmt::skip]
    let main = [
        0x8b, 0x04, 0x25, 0x01, 0x90, 0, 0, // mov 0x9001, %eax
        0xf4,                               // hlt: #GP at CPL 3, for which there is no handler
    ];
    #[rustfmt::skip]
    let handler = [
        0x58,                               // pop %rax       the error code
        0x04, 0x11,                         // add $17, %al
        0xe6, 0x10,                         // out %al, $0x10
        0xf4,
    ];
    let machine = long_mode(&main, &handler, 17, true)?;
    machine.set(&[(hv_register_name_HV_X64_REGISTER_RFLAGS, 0x4_0002)])?;
    if !machine_checks_alignment()? {
        println!("this machine does not check alignment, natively neither");
        let message = machine.next_message()?;
        let kind = mshv_smoke::machine::kind(&message);
        ensure!(
            kind == hv_message_type_HVMSG_UNRECOVERABLE_EXCEPTION,
            "message {kind:#x}"
        );
        return Ok(());
    }
    ensure!(machine.next_port_write()? == (0x10, 17), "port");
    Ok(())
}

/// A write watched by DR0 raises #DB, whose delivery writes there too, and so on.
pub fn run_of_a_vp_that_recurses_in_debug_exceptions_ends_in_time() -> Outcome {
    #[rustfmt::skip]
    let main = [
        0x48, 0x89, 0x04, 0x25, 0xf8, 0x7f, 0, 0, // mov %rax, 0x7ff8
        0xeb, 0xfe,                               // jmp .
    ];
    let handler = [0xeb, 0xfe]; // jmp .
    let machine = long_mode(&main, &handler, 1, false)?;
    machine.set(&[
        (hv_register_name_HV_X64_REGISTER_DR0, 0x7ff8),
        // Local enable, 8 bytes, writes.
        (hv_register_name_HV_X64_REGISTER_DR7, 0x9_0401),
    ])?;
    for _ in 0..3 {
        let took = interrupted_run(&machine)?;
        ensure!((5..500).contains(&took.as_millis()), "{took:?}");
    }
    Ok(())
}
