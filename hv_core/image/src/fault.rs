// SPDX-License-Identifier: GPL-2.0
//! Faults of the image itself: exceptions and panics.
//!
//! The registers go to the log ring. Then the CPU returns to native operation at the root's current
//! instruction, which Linux executes as if we had never been there. What cannot be survived: a fault
//! while this very path runs, and a fault whose stack is gone on AMD-V (no interrupt stack there). The root
//! sees the count of faults in the statistics page and takes the other CPUs back, too.
//!
//! A machine check that is not about what the image itself does goes on to the root instead, on VT-x; on AMD-V it waits for
//! the next VMRUN, because GIF is clear here (APM 15.17).

use core::arch::global_asm;
use core::panic::PanicInfo;

use hv_abi::boot::{cpu_state, CpuArea, Vendor};
use hv_abi::layout::CPU_STRIDE;

use crate::arch::{svm, vmx};
use crate::child::exception;
use crate::header::boot;
use crate::log;

// One stub of 16 bytes per vector: error code (0 where the processor pushes none), vector, common part.
// Vector 2 is the NMI path of VT-x. The common part stores the general registers below and calls
// image_fault(rdi = Frame), which returns only if the image may go on as if nothing had been.
global_asm!(
    ".pushsection .text.entry, \"ax\"",
    ".globl exception_stubs",
    ".p2align 4",
    "exception_stubs:",
    ".set vector, 0",
    ".rept 32",
    ".p2align 4",
    ".if vector == 2",
    "jmp vmx_nmi",
    ".else",
    ".if (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21)",
    ".else",
    "push 0",
    ".endif",
    "push vector",
    "jmp 9f",
    ".endif",
    ".set vector, vector + 1",
    ".endr",
    "9:",
    "push rax; push rcx; push rdx; push rbx; push rbp; push rsi; push rdi",
    "push r8; push r9; push r10; push r11; push r12; push r13; push r14; push r15",
    "mov rdi, rsp",
    "mov rbx, rsp",
    "and rsp, -16",
    "call image_fault",
    "mov rsp, rbx",
    "pop r15; pop r14; pop r13; pop r12; pop r11; pop r10; pop r9; pop r8",
    "pop rdi; pop rsi; pop rbp; pop rbx; pop rdx; pop rcx; pop rax",
    "add rsp, 16",
    "iretq",
    ".popsection",
);

/// What the stubs leave on the stack.
#[repr(C)]
struct Frame {
    gprs: [u64; 15],
    vector: u64,
    error_code: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

/// The area of the CPU whose stack `address` lies in.
fn area_of(address: u64) -> &'static mut CpuArea {
    // SAFETY: all stacks of a CPU lie in its own 2 MiB, which begins with its area; only that CPU uses it,
    // and the code that was interrupted never continues.
    unsafe { &mut *((address & !(CPU_STRIDE - 1)) as *mut CpuArea) }
}

#[no_mangle]
extern "C" fn image_fault(frame: &Frame) {
    let area = area_of(&raw const *frame as u64);
    let is_machine_check = frame.vector == u64::from(exception::MACHINE_CHECK);
    if is_machine_check && boot().vendor == Vendor::Vmx && vmx::pass_machine_check(area) {
        return;
    }
    let cr2: u64;
    // SAFETY: reads a register.
    unsafe { core::arch::asm!("mov {0}, cr2", out(reg) cr2, options(nomem, nostack)) };
    let cpu = area.cpu;
    log!(
        "cpu {cpu}: the image faulted: vector {} error {:#x} CR2 {cr2:#x}",
        frame.vector,
        frame.error_code
    );
    log!(
        "cpu {cpu}: RIP {:#x} CS {:#x} RFLAGS {:#x} RSP {:#x} SS {:#x}",
        frame.rip,
        frame.cs,
        frame.rflags,
        frame.rsp,
        frame.ss
    );
    let [r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax] = frame.gprs;
    log!("cpu {cpu}: RAX {rax:#x} RBX {rbx:#x} RCX {rcx:#x} RDX {rdx:#x} RSI {rsi:#x} RDI {rdi:#x} RBP {rbp:#x}");
    log!("cpu {cpu}: R8 {r8:#x} R9 {r9:#x} R10 {r10:#x} R11 {r11:#x} R12 {r12:#x} R13 {r13:#x} R14 {r14:#x} R15 {r15:#x}");
    give_back(area)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let here = 0u8;
    let area = area_of(&raw const here as u64);
    match info.location() {
        Some(at) => log!(
            "cpu {}: the image panicked at {}:{}: {}",
            area.cpu,
            at.file(),
            at.line(),
            info.message()
        ),
        None => log!("cpu {}: the image panicked: {}", area.cpu, info.message()),
    }
    give_back(area)
}

fn give_back(area: &mut CpuArea) -> ! {
    let vendor = boot().vendor;
    if area.state == cpu_state::FAULTED {
        log!(
            "cpu {}: fault while returning to Linux, stopping this CPU",
            area.cpu
        );
        loop {
            // SAFETY: stops this CPU for good; there is no state to go on with.
            unsafe { core::arch::asm!("cli", "hlt", options(nomem, nostack)) };
        }
    }
    area.state = cpu_state::FAULTED;
    match vendor {
        Vendor::Vmx => vmx::abandon_child(area),
        Vendor::Svm => svm::abandon_child(area),
    }
    log!("cpu {}: returning to native operation", area.cpu);
    match vendor {
        Vendor::Vmx => vmx::leave_after_fault(area),
        Vendor::Svm => svm::leave_after_fault(area),
    }
}
