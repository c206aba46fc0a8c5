// SPDX-License-Identifier: GPL-2.0
//! The extended state, debug registers and TSC_AUX of guest and program, whatever a run does.

use std::arch::asm;
use std::os::fd::AsRawFd;

use mshv_bindings::hv_message;
use mshv_smoke::machine::Machine;

use super::Outcome;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const RUN_VP: u64 = 0x8100_b800;
/// SSE and AVX.
const COMPONENTS: u32 = 6;
/// Bytes of the XMM registers in the standard form, of the upper halves of the YMM registers, and where the header says what
/// there is (SDM 13.4).
const XMM: std::ops::Range<usize> = 160..416;
const YMM: std::ops::Range<usize> = 576..832;
const MXCSR: usize = 24;
const XSTATE_BV: usize = 512;

/// An XSAVE area in the standard form.
#[repr(C, align(64))]
struct Area([u8; 4096]);

/// What a program has there: different in all registers.
fn pattern() -> Area {
    let mut area = Area([0; 4096]);
    for (index, byte) in XMM.chain(YMM).enumerate() {
        area.0[byte] = (index * 7 + 1) as u8;
    }
    area.0[MXCSR..][..4].copy_from_slice(&0x1f80u32.to_le_bytes());
    area.0[XSTATE_BV] = COMPONENTS as u8;
    area
}

/// XCR0.
fn xcr0() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the kernels of all beds use XSAVE.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack))
    };
    u64::from(high) << 32 | u64::from(low)
}

/// Runs the VP once with all vector registers full. Their contents and XCR0 must be the same afterwards. What the call
/// returned: 0 for a message, or the negative errno.
fn run(machine: &Machine) -> Result<i64> {
    let mut message = hv_message::default();
    let (before, mut after) = (pattern(), Area([0; 4096]));
    let old = xcr0();
    if old & 7 != 7 {
        return Err("the kernel does not use AVX".into());
    }
    let result: i64;
    // SAFETY: the system call writes to the message; the areas are large enough for their components and aligned; what the
    // registers held is declared as lost.
    unsafe {
        asm!(
            "xrstor64 [r12]",
            "mov eax, {ioctl}",
            "mov rdx, r14",
            "syscall",
            "mov r14, rax",
            "mov eax, {components}",
            "xor edx, edx",
            "xsave64 [r13]",
            "vzeroupper",
            ioctl = const libc::SYS_ioctl,
            components = const COMPONENTS,
            in("rax") COMPONENTS,
            in("rdx") 0,
            in("rdi") machine.vcpu.as_raw_fd(),
            in("rsi") RUN_VP,
            in("r12") &raw const before,
            in("r13") &raw mut after,
            inout("r14") &raw mut message => result,
            clobber_abi("sysv64"),
        );
    }
    if xcr0() != old {
        return Err(format!("XCR0 was {old:#x} and is {:#x}", xcr0()).into());
    }
    let wrong = XMM
        .chain(YMM)
        .find(|byte| before.0[*byte] != after.0[*byte]);
    match wrong {
        Some(byte) => Err(format!("byte {byte} of the extended state changed").into()),
        None => Ok(result),
    }
}

/// The guest has the image fault while it runs: the VP is gone with the hypervisor, and its registers with it.
pub fn fault_under_a_guest() -> Outcome {
    #[rustfmt::skip]
    let code = [
        0x66, 0xb8, 0xff, 0x00, 0x00, 0x40, // mov $0x400000ff, %eax
        0x66, 0x31, 0xc9,                   // xor %ecx, %ecx      general protection
        0x0f, 0xa2,                         // cpuid
        0xf4,                               // hlt
    ];
    let result = run(&Machine::new(&code)?)?;
    ensure!(result == -i64::from(libc::ENODEV), "the run gave {result}");
    Ok(())
}
