// SPDX-License-Identifier: GPL-2.0
//! The extended state, debug registers and TSC_AUX of guest and program, whatever a run does.

use std::arch::asm;
use std::mem;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;

use mshv_bindings::*;
use mshv_smoke::machine::{ioctl, Machine};
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

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
    let machine = Machine::new(&code)?;
    let result = loop {
        match run(&machine)? {
            // A run that had to wait for the guest's memory may end before the guest begins.
            result if result == -i64::from(libc::EINTR) => {}
            result => break result,
        }
    };
    ensure!(result == -i64::from(libc::ENODEV), "the run gave {result}");
    Ok(())
}

const PORT: u16 = 0x510;
/// How often the guest below rings.
const RINGS: u64 = 0x3000;

/// Sets XCR0, TSC_AUX, DR0 to DR3 and XMM7, and looks at all of them after each doorbell. AL at port 0x21 says what was wrong.
#[rustfmt::skip]
const RINGER: &[u8] = &[
    0x0f, 0x20, 0xe0,                         // mov %cr4, %eax
    0x66, 0x0d, 0x00, 0x06, 0x04, 0x00,       // or $0x40600, %eax
    0x0f, 0x22, 0xe0,                         // mov %eax, %cr4
    0x66, 0x31, 0xc9,                         // xor %ecx, %ecx
    0x66, 0x31, 0xd2,                         // xor %edx, %edx
    0x66, 0xb8, 0x03, 0x00, 0x00, 0x00,       // mov $3, %eax
    0x0f, 0x01, 0xd1,                         // xsetbv
    0x66, 0xb9, 0x03, 0x01, 0x00, 0xc0,       // mov $0xc0000103, %ecx
    0x66, 0xb8, 0x11, 0x77, 0x00, 0x00,       // mov $0x7711, %eax
    0x0f, 0x30,                               // wrmsr
    0x66, 0xb8, 0x10, 0x11, 0x11, 0x11,       // mov $0x11111110, %eax
    0x0f, 0x23, 0xc0,                         // mov %eax, %dr0
    0x66, 0x40,                               // inc %eax
    0x0f, 0x23, 0xc8,                         // mov %eax, %dr1
    0x66, 0x40,                               // inc %eax
    0x0f, 0x23, 0xd0,                         // mov %eax, %dr2
    0x66, 0x40,                               // inc %eax
    0x0f, 0x23, 0xd8,                         // mov %eax, %dr3
    0x66, 0x0f, 0x6e, 0xf8,                   // movd %eax, %xmm7
    0x66, 0x0f, 0x70, 0xff, 0x00,             // pshufd $0, %xmm7, %xmm7
    0xbf, 0x00, 0x30,                         // mov $RINGS, %di
    0xba, 0x10, 0x05,                         // mov $PORT, %dx
    0xee,                                     // 1: out %al, %dx
    0xb3, 0x01,                               // mov $1, %bl
    0x0f, 0x21, 0xc0,                         // mov %dr0, %eax
    0x66, 0x3d, 0x10, 0x11, 0x11, 0x11,       // cmp $0x11111110, %eax
    0x75, 0x5a,                               // jne 2f
    0xfe, 0xc3,                               // inc %bl
    0x0f, 0x21, 0xc8,                         // mov %dr1, %eax
    0x66, 0x3d, 0x11, 0x11, 0x11, 0x11,       // cmp $0x11111111, %eax
    0x75, 0x4d,                               // jne 2f
    0xfe, 0xc3,                               // inc %bl
    0x0f, 0x21, 0xd0,                         // mov %dr2, %eax
    0x66, 0x3d, 0x12, 0x11, 0x11, 0x11,       // cmp $0x11111112, %eax
    0x75, 0x40,                               // jne 2f
    0xfe, 0xc3,                               // inc %bl
    0x0f, 0x21, 0xd8,                         // mov %dr3, %eax
    0x66, 0x3d, 0x13, 0x11, 0x11, 0x11,       // cmp $0x11111113, %eax
    0x75, 0x33,                               // jne 2f
    0xfe, 0xc3,                               // inc %bl
    0x66, 0x0f, 0x7e, 0xf8,                   // movd %xmm7, %eax
    0x66, 0x3d, 0x13, 0x11, 0x11, 0x11,       // cmp $0x11111113, %eax
    0x75, 0x25,                               // jne 2f
    0xfe, 0xc3,                               // inc %bl
    0x66, 0x31, 0xc9,                         // xor %ecx, %ecx
    0x52,                                     // push %dx
    0x0f, 0x01, 0xd0,                         // xgetbv
    0x5a,                                     // pop %dx
    0x66, 0x83, 0xf8, 0x03,                   // cmp $3, %eax
    0x75, 0x15,                               // jne 2f
    0xfe, 0xc3,                               // inc %bl
    0x52,                                     // push %dx
    0x0f, 0x01, 0xf9,                         // rdtscp
    0x5a,                                     // pop %dx
    0x66, 0x81, 0xf9, 0x11, 0x77, 0x00, 0x00, // cmp $0x7711, %ecx
    0x75, 0x05,                               // jne 2f
    0xb3, 0x00,                               // mov $0, %bl
    0x4f,                                     // dec %di
    0x75, 0x98,                               // jnz 1b
    0x88, 0xd8,                               // 2: mov %bl, %al
    0xe6, 0x21,                               // out %al, $0x21
    0xf4,                                     // hlt
];

/// A guest with a stack, whose writes of bytes to the port ring the doorbell.
fn ringing(code: &[u8]) -> Result<(Machine, EventFd)> {
    let machine = Machine::new(code)?;
    machine.handle(0x40, 0x1080)?;
    let event = EventFd::new(EFD_NONBLOCK)?;
    let bell = mshv_user_ioeventfd {
        addr: PORT.into(),
        len: 1,
        fd: event.as_raw_fd(),
        flags: 1 << MSHV_IOEVENTFD_BIT_PIO,
        ..Default::default()
    };
    ioctl(machine.vm.as_raw_fd(), 0x4020_b804, &raw const bell as u64)?;
    Ok((machine, event))
}

/// Runs the VP to its write to port 0x21 with the check of [`run`], and gives AL.
fn run_to_the_end(machine: &Machine) -> Result<u64> {
    loop {
        match run(machine)? {
            0 => break,
            error if error == -i64::from(libc::EINTR) => {}
            error => return Err(format!("the run gave {error}").into()),
        }
    }
    // The message is shown again.
    let seen = machine.next_port_write()?;
    if seen.0 != 0x21 {
        return Err(format!("port {:#x}", seen.0).into());
    }
    Ok(seen.1)
}

fn ring_and_check() -> Outcome {
    let (machine, event) = ringing(RINGER)?;
    let wrong = run_to_the_end(&machine)?;
    ensure!(wrong == 0, "the guest's check {wrong} failed");
    let rung = event.read()?;
    ensure!(rung == RINGS, "rung {rung} times");
    Ok(())
}

/// While a VP rings a doorbell again and again, neither it nor the program that runs it loses a register.
pub fn registers_survive_doorbells() -> Outcome {
    ring_and_check()
}

/// The same with a breakpoint armed in the program, which is still there afterwards.
pub fn breakpoint_survives_doorbells() -> Outcome {
    static WATCHED: AtomicU32 = AtomicU32::new(0);
    let register = |number: usize| {
        (mem::offset_of!(libc::user, u_debugreg) + number * size_of::<u64>()) as *mut libc::c_void
    };
    // SAFETY: one thread; the new process ends itself.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        // SAFETY: asks to be traced, and stops.
        unsafe {
            libc::ptrace(libc::PTRACE_TRACEME);
            libc::raise(libc::SIGSTOP);
        }
        let outcome = ring_and_check();
        WATCHED.store(1, Ordering::SeqCst);
        if let Err(error) = &outcome {
            eprintln!("{error}");
        }
        std::process::exit(outcome.is_err().into());
    }
    let wait = || {
        let mut status = 0;
        // SAFETY: our process, and a number to write to.
        unsafe { libc::waitpid(pid, &raw mut status, 0) };
        status
    };
    let go_on = || {
        // SAFETY: it is stopped.
        unsafe { libc::ptrace(libc::PTRACE_CONT, pid, 0, 0) }
    };
    ensure!(libc::WIFSTOPPED(wait()), "not stopped");
    let watched = WATCHED.as_ptr() as u64;
    // A write of four bytes, by DR0.
    for (number, value) in [(0, watched), (7, 0xd << 16 | 1)] {
        // SAFETY: it is stopped, and the registers are its own.
        let set = unsafe { libc::ptrace(libc::PTRACE_POKEUSER, pid, register(number), value) };
        ensure!(set == 0, "DR{number}");
    }
    go_on();
    let status = wait();
    ensure!(
        libc::WIFSTOPPED(status) && libc::WSTOPSIG(status) == libc::SIGTRAP,
        "status {status:#x} instead of the breakpoint"
    );
    go_on();
    let status = wait();
    ensure!(status == 0, "status {status:#x} in the end");
    Ok(())
}

/// Each doorbell wakes a thread that takes the CPU at once. It finds the program's XCR0, not the guest's.
pub fn waiter_runs_between_doorbells() -> Outcome {
    const FEW: u16 = 0x200;
    let mut code = RINGER.to_vec();
    let count = code
        .windows(3)
        .position(|bytes| bytes == [0xbf, 0x00, 0x30]);
    code[count.ok_or("no count")? + 1..][..2].copy_from_slice(&FEW.to_le_bytes());
    let (machine, event) = ringing(&code)?;
    // SAFETY: sets the affinity and the scheduling of the calling thread only.
    let here = || unsafe {
        let mut cpu: libc::cpu_set_t = mem::zeroed();
        libc::CPU_SET(0, &mut cpu);
        libc::sched_setaffinity(0, size_of_val(&cpu), &raw const cpu)
    };
    ensure!(here() == 0, "not on CPU 0");
    let ours = xcr0();
    let event = &event;
    let (ready, is_ready) = mpsc::channel();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(move || {
            let first = libc::sched_param { sched_priority: 1 };
            // SAFETY: as above.
            if unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const first) } != 0 {
                return Err("no real-time priority".to_owned());
            }
            // The other thread gets this CPU only when this one waits for the event.
            let _ = ready.send(());
            let (mut rung, mut wakes) = (0, 0);
            while rung < u64::from(FEW) {
                let mut poll = libc::pollfd {
                    fd: event.as_raw_fd(),
                    events: libc::POLLIN,
                    revents: 0,
                };
                // SAFETY: one descriptor of ours.
                unsafe { libc::poll(&raw mut poll, 1, 30_000) };
                if xcr0() != ours {
                    return Err(format!("XCR0 is {:#x}", xcr0()));
                }
                rung += event.read().map_err(|error| error.to_string())?;
                wakes += 1;
            }
            Ok(wakes)
        });
        // An error is the thread's, which tells it below.
        let wrong = match is_ready.recv() {
            Ok(()) => run_to_the_end(&machine)?,
            Err(_) => 0,
        };
        ensure!(wrong == 0, "the guest's check {wrong} failed");
        let wakes = waiter.join().map_err(|_| "thread")??;
        ensure!(wakes > u64::from(FEW) / 2, "the thread ran {wakes} times");
        Ok(())
    })
}

/// A doorbell that is an interrupt of the same VP: what arrives while its write is completed is delivered next.
pub fn doorbell_interrupts_its_own_vp() -> Outcome {
    #[rustfmt::skip]
    let code = [
        0x66, 0xb9, 0x1b, 0, 0, 0,    // mov $0x1b, %ecx       IA32_APIC_BASE
        0x0f, 0x32,                   // rdmsr
        0x66, 0x0d, 0, 0x0c, 0, 0,    // or $0xc00, %eax       x2APIC mode
        0x0f, 0x30,                   // wrmsr
        0x31, 0xf6,                   // xor %si, %si
        0xbf, 0x64, 0x00,             // mov $100, %di
        0xba, 0x10, 0x05,             // mov $PORT, %dx
        0xfb,                         // sti
        0xee,                         // 1: out %al, %dx
        0x90,                         // nop
        0x4f,                         // dec %di
        0x75, 0xfb,                   // jnz 1b
        0x89, 0xf0,                   // mov %si, %ax
        0xe6, 0x21,                   // out %al, $0x21
        0xf4,                         // hlt
    ];
    #[rustfmt::skip]
    let handler = [
        0x46,                         // 0x1080: inc %si
        0x66, 0x60,                   // pushal
        0x66, 0xb9, 0x0b, 0x08, 0, 0, // mov $0x80b, %ecx      x2APIC EOI
        0x66, 0x31, 0xc0,             // xor %eax, %eax
        0x66, 0x31, 0xd2,             // xor %edx, %edx
        0x0f, 0x30,                   // wrmsr
        0x66, 0x61,                   // popal
        0xcf,                         // iret
    ];
    let (machine, event) = ringing(&code)?;
    machine.memory.write(0x80, &handler);
    machine.enable_apic()?;
    machine.vm.register_irqfd(&event, 30)?;
    let table = [1u32, 0, 30, 0xfee0_0000, 0, 0x40];
    ioctl(machine.vm.as_raw_fd(), 0x4008_b805, table.as_ptr() as u64)?;
    let counted = run_to_the_end(&machine)?;
    ensure!(counted == 100, "{counted} interrupts");
    Ok(())
}

/// What a VMM sees of a write that was no doorbell, after some that were.
pub fn registers_are_right_after_a_pause() -> Outcome {
    #[rustfmt::skip]
    let code = [
        0xba, 0x10, 0x05,                   // mov $PORT, %dx
        0xb0, 0x33,                         // mov $0x33, %al
        0xee,                               // out %al, %dx
        0xee,                               // out %al, %dx
        0xee,                               // out %al, %dx
        0x66, 0xb8, 0x78, 0x56, 0x34, 0x12, // mov $0x12345678, %eax
        0x66, 0x0f, 0x6e, 0xd8,             // movd %eax, %xmm3
        0x0f, 0x23, 0xd0,                   // mov %eax, %dr2
        0xef,                               // out %ax, %dx        another width
        0xee,                               // out %al, %dx
        0xe6, 0x21,                         // out %al, $0x21
        0xf4,                               // hlt
    ];
    let (machine, event) = ringing(&code)?;
    machine.set(&[(hv_register_name_HV_X64_REGISTER_CR4, 0x200)])?;
    let message = machine.next_message()?;
    let info = message.to_ioport_info()?;
    let seen = (info.port_number, info.rax, info.header.rip);
    ensure!(seen == (PORT, 0x1234_5678, 0x1015), "saw {seen:x?}");
    // SAFETY: a byte in any case; its lowest three bits are the size.
    let size = unsafe { info.access_info.as_uint8 } & 7;
    ensure!(size == 2, "a write of {size} bytes");
    super::ports::ensure_same(&machine)?;
    let mut list = [
        hv_register_name_HV_X64_REGISTER_XMM3,
        hv_register_name_HV_X64_REGISTER_DR2,
    ]
    .map(|name| hv_register_assoc {
        name,
        ..Default::default()
    });
    machine.vcpu.get_reg(&mut list)?;
    // SAFETY: the call wrote both.
    let values = list.map(|register| unsafe { register.value.reg64 });
    ensure!(values == [0x1234_5678; 2], "XMM3 and DR2 are {values:x?}");
    ensure!(event.read()? == 3, "rung before");
    machine.next_port_write()?;
    let last = machine.next_port_write()?;
    ensure!(last == (0x21, 0x78), "last {last:x?}");
    ensure!(event.read()? == 1, "rung behind");
    Ok(())
}
