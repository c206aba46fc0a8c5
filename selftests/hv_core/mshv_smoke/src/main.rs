// SPDX-License-Identifier: GPL-2.0
//! Checks of `/dev/mshv`: each argument is the name of one check; without one, all names are listed. A check that
//! fails says why and ends the program with status 1. `selftests/hv_core/mshv.sh` runs them in a bed's guest.

use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use mshv_bindings::*;
use mshv_ioctls::{InterruptRequest, Mshv};
use mshv_smoke::machine::{self, errno, ioctl, region, set_memory, Machine, Memory};
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

type Outcome = Result<(), Box<dyn std::error::Error>>;
type Check = (&'static str, fn() -> Outcome);

/// All checks.
const CHECKS: &[Check] = &[
    (
        "guest_runs_code_and_writes_ports",
        guest_runs_code_and_writes_ports,
    ),
    (
        "system_call_registers_survive_a_run",
        system_call_registers_survive_a_run,
    ),
    (
        "speculation_control_stays_with_the_vp",
        speculation_control_stays_with_the_vp,
    ),
    ("wrong_arguments_are_refused", wrong_arguments_are_refused),
    ("wrong_memory_is_refused", wrong_memory_is_refused),
    (
        "long_lists_are_done_to_the_end",
        long_lists_are_done_to_the_end,
    ),
    (
        "memory_changes_beneath_running_vps",
        memory_changes_beneath_running_vps,
    ),
    (
        "guest_memory_appears_when_touched",
        guest_memory_appears_when_touched,
    ),
    (
        "unmapped_memory_exits_with_its_address",
        unmapped_memory_exits_with_its_address,
    ),
    (
        "hole_in_a_region_is_the_vmms_to_fill",
        memory::hole_in_a_region_is_the_vmms_to_fill,
    ),
    (
        "read_only_memory_exits_at_a_write",
        read_only_memory_exits_at_a_write,
    ),
    (
        "huge_memory_is_mapped_by_large_pages",
        large::huge_memory_is_mapped_by_large_pages,
    ),
    (
        "holes_and_odd_places_in_huge_memory_are_exact",
        large::holes_and_odd_places_in_huge_memory_are_exact,
    ),
    (
        "read_only_huge_memory_exits_at_each_write",
        large::read_only_huge_memory_exits_at_each_write,
    ),
    (
        "huge_memory_changes_beneath_running_vps",
        large::huge_memory_changes_beneath_running_vps,
    ),
    (
        "doorbells_ring_without_an_exit",
        doorbells_ring_without_an_exit,
    ),
    (
        "port_doorbells_ring_without_an_exit",
        port_doorbells_ring_without_an_exit,
    ),
    (
        "port_doorbell_is_heard_at_once",
        ports::port_doorbell_is_heard_at_once,
    ),
    (
        "registers_survive_doorbells",
        extended::registers_survive_doorbells,
    ),
    (
        "breakpoint_survives_doorbells",
        extended::breakpoint_survives_doorbells,
    ),
    (
        "waiter_runs_between_doorbells",
        extended::waiter_runs_between_doorbells,
    ),
    (
        "doorbell_interrupts_its_own_vp",
        extended::doorbell_interrupts_its_own_vp,
    ),
    (
        "registers_are_right_after_a_pause",
        extended::registers_are_right_after_a_pause,
    ),
    (
        "register_page_is_right_at_a_port",
        ports::register_page_is_right_at_a_port,
    ),
    (
        "register_page_is_right_after_any_run",
        ports::register_page_is_right_after_any_run,
    ),
    (
        "run_of_a_halted_vp_ends_in_time",
        run_of_a_halted_vp_ends_in_time,
    ),
    (
        "run_of_a_busy_vp_ends_in_time",
        run_of_a_busy_vp_ends_in_time,
    ),
    (
        "debug_exceptions_reach_the_guest",
        exceptions::debug_exceptions_reach_the_guest,
    ),
    (
        "alignment_checks_reach_the_guest",
        exceptions::alignment_checks_reach_the_guest,
    ),
    (
        "run_of_a_vp_that_recurses_in_debug_exceptions_ends_in_time",
        exceptions::run_of_a_vp_that_recurses_in_debug_exceptions_ends_in_time,
    ),
    (
        "nmis_stay_blocked_until_iret_is_done",
        nmi::nmis_stay_blocked_until_iret_is_done,
    ),
    (
        "guest_pages_with_pointers",
        paging::guest_pages_with_pointers,
    ),
    ("interrupt_wakes_a_halted_vp", interrupt_wakes_a_halted_vp),
    ("event_asserts_an_interrupt", event_asserts_an_interrupt),
    ("vp_starts_another_vp", || {
        starts_another_vp(&apic::START_BY_MSR)
    }),
    ("vp_starts_another_vp_by_the_apic_page", || {
        starts_another_vp(&apic::START_BY_PAGE)
    }),
    (
        "apic_page_takes_all_kinds_of_accesses",
        apic::page_takes_all_kinds_of_accesses,
    ),
    (
        "end_of_a_level_interrupt_reaches_the_vmm",
        apic::end_of_a_level_interrupt_reaches_the_vmm,
    ),
    (
        "end_of_a_level_interrupt_reaches_the_event",
        apic::end_of_a_level_interrupt_reaches_the_event,
    ),
    (
        "large_region_costs_nothing_until_touched",
        large_region_costs_nothing_until_touched,
    ),
    ("killed_owner_leaves_nothing", killed_owner_leaves_nothing),
    (
        "exits_are_counted_for_each_vp",
        exits_are_counted_for_each_vp,
    ),
    ("vp_outlives_its_file", vps::vp_outlives_its_file),
    ("deleted_vp_is_gone", vps::deleted_vp_is_gone),
    (
        "messages_reach_the_guest_in_order",
        synic::messages_reach_the_guest_in_order,
    ),
    (
        "message_wakes_a_sleeping_guest",
        synic::message_wakes_a_sleeping_guest,
    ),
    (
        "event_flags_reach_the_guest",
        synic::event_flags_reach_the_guest,
    ),
    (
        "vmm_hears_when_a_source_takes_messages_again",
        synic::vmm_hears_when_a_source_takes_messages_again,
    ),
    (
        "pages_that_are_away_come_for_the_hypervisor",
        synic::pages_that_are_away_come_for_the_hypervisor,
    ),
    (
        "device_memory_is_the_guests",
        movable::device_memory_is_the_guests,
    ),
    (
        "merged_pages_part_when_written_to",
        movable::merged_pages_part_when_written_to,
    ),
    (
        "page_that_the_vmm_brings_is_waited_for",
        movable::page_that_the_vmm_brings_is_waited_for,
    ),
    ("timers_expire", synic::timers_expire),
    (
        "event_of_a_connection_reaches_an_eventfd",
        connections::event_of_a_connection_reaches_an_eventfd,
    ),
    (
        "messages_and_events_reach_another_module",
        connections::messages_and_events_reach_another_module,
    ),
    (
        "fast_call_goes_on_in_xmm_registers",
        connections::fast_call_goes_on_in_xmm_registers,
    ),
    ("synic_state_moves", synic::synic_state_moves),
    (
        "memory_comes_when_touched_and_goes_when_given_back",
        movable::memory_comes_when_touched_and_goes_when_given_back,
    ),
    (
        "nothing_is_lost_when_the_kernel_moves_memory",
        movable::nothing_is_lost_when_the_kernel_moves_memory,
    ),
    (
        "given_back_pages_are_forgotten_by_all_vps",
        movable::given_back_pages_are_forgotten_by_all_vps,
    ),
    (
        "what_the_vmm_may_only_read_is_rom",
        movable::what_the_vmm_may_only_read_is_rom,
    ),
    (
        "file_may_lose_pages_beneath_the_guest",
        movable::file_may_lose_pages_beneath_the_guest,
    ),
    (
        "dirty_pages_stay_dirty_when_they_go",
        movable::dirty_pages_stay_dirty_when_they_go,
    ),
];

/// What `killed_owner_leaves_nothing` starts itself as: one after the other.
const VICTIMS: [&str; 3] = ["victim", "changing_victim", "waiting_victim"];

/// What scripts call with more around it: [`killed_owners`], [`starved`], and those that need `/dev/hv_state`.
const PARTS: [Check; 9] = [
    ("fault_under_a_guest", extended::fault_under_a_guest),
    ("victim", victim),
    ("changing_victim", || {
        movable::run_in_changing_memory(|| println!("x"))
    }),
    ("waiting_victim", || {
        movable::run_without_memory(|| println!("x"))
    }),
    ("killed_owners", killed_owners),
    ("starved", starved),
    ("wrong_large_pages", large::wrong_large_pages),
    ("parts_of_large_pages", large::parts_of_large_pages),
    ("short_of_tables", large::short_of_tables),
];

fn main() -> ExitCode {
    let names: Vec<String> = std::env::args().skip(1).collect();
    if names.is_empty() {
        CHECKS.iter().for_each(|(name, _)| println!("{name}"));
    }
    for name in names {
        let mut all = CHECKS.iter().chain(&PARTS);
        let Some((_, check)) = all.find(|(known, _)| *known == name) else {
            eprintln!("no check {name}");
            return ExitCode::from(2);
        };
        if let Err(error) = check() {
            eprintln!("{name}: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// Fails with a text unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($text:tt)*) => {
        if !$condition {
            return Err(format!($($text)*).into());
        }
    };
}

mod apic;
mod connections;
mod exceptions;
mod extended;
mod large;
mod memory;
mod movable;
mod nmi;
mod paging;
mod ports;
mod synic;
mod vps;

fn guest_runs_code_and_writes_ports() -> Outcome {
    #[rustfmt::skip]
    let code = [
        0xba, 0xf8, 0x03, // mov $0x3f8, %dx
        0x00, 0xd8,       // add %bl, %al
        0x04, b'0',       // add $'0', %al
        0xee,             // out %al, (%dx)
        0xb0, 0,          // mov $0, %al
        0xee,             // out %al, (%dx)
    ];
    let machine = Machine::new(&code)?;
    machine.set(&[
        (hv_register_name_HV_X64_REGISTER_RAX, 2),
        (hv_register_name_HV_X64_REGISTER_RBX, 2),
    ])?;
    for expected in [b'4', 0] {
        let (port, value) = machine.next_port_write()?;
        ensure!(
            (port, value) == (0x3f8, u64::from(expected)),
            "port {port:#x} value {value:#x}"
        );
    }
    Ok(())
}

/// Those that are loaded by hand, with values that the root does not have.
fn system_call_registers_survive_a_run() -> Outcome {
    let machine = Machine::new(&[0xe6, 0x10])?; // out %al, $0x10
    let values = [
        (hv_register_name_HV_X64_REGISTER_STAR, 0x1234_5678_9abc_def0),
        (
            hv_register_name_HV_X64_REGISTER_LSTAR,
            0xffff_8765_4321_0000,
        ),
        (hv_register_name_HV_X64_REGISTER_CSTAR, 0x7654_3210_1000),
        (hv_register_name_HV_X64_REGISTER_SFMASK, 0x8765_4321),
        (
            hv_register_name_HV_X64_REGISTER_KERNEL_GS_BASE,
            0xffff_9999_0000_1111,
        ),
    ];
    machine.set(&values)?;
    machine.next_port_write()?;
    for (name, value) in values {
        let mut register = [hv_register_assoc {
            name,
            ..Default::default()
        }];
        machine.vcpu.get_reg(&mut register)?;
        // SAFETY: the register has 64 bits.
        let seen = unsafe { register[0].value.reg64 };
        ensure!(seen == value, "register {name:#x}: {seen:#x}");
    }
    Ok(())
}

/// IA32_SPEC_CTRL with IBRS, where the processor has it.
fn speculation_control_stays_with_the_vp() -> Outcome {
    // SAFETY: every processor of 64 bits has CPUID.
    let (intel, amd) = unsafe {
        (
            __cpuid_count(7, 0).edx >> 26,
            __cpuid(0x8000_0008).ebx >> 14,
        )
    };
    if (intel | amd) & 1 == 0 {
        println!("this machine has no IBRS");
        return Ok(());
    }
    #[rustfmt::skip]
    let code = [
        0x66, 0xb9, 0x48, 0, 0, 0, // mov $0x48, %ecx
        0x66, 0x31, 0xd2,          // xor %edx, %edx
        0x66, 0xb8, 1, 0, 0, 0,    // mov $1, %eax
        0x0f, 0x30,                // wrmsr
        0xb0, 0,                   // mov $0, %al
        0xe6, 0x10,                // out %al, $0x10
        0x0f, 0x32,                // 1: rdmsr
        0xe6, 0x10,                // out %al, $0x10
        0xeb, 0xfa,                // jmp 1b
    ];
    let machine = Machine::new(&code)?;
    // A partition beside it, which has none of this.
    let other = Machine::new(&code[17..])?;
    other.set(&[(hv_register_name_HV_X64_REGISTER_RCX, 0x48)])?;
    machine.next_port_write()?;
    other.next_port_write()?;
    for _ in 0..3 {
        let (own, others) = (machine.next_port_write()?, other.next_port_write()?);
        ensure!(
            (own, others) == ((0x10, 1), (0x10, 0)),
            "{own:x?} {others:x?}"
        );
    }
    machine.set(&[(hv_register_name_HV_X64_REGISTER_SPEC_CTRL, 0)])?;
    let own = machine.next_port_write()?;
    ensure!(own == (0x10, 0), "{own:x?} after the VMM cleared it");
    Ok(())
}

fn wrong_arguments_are_refused() -> Outcome {
    let device = Mshv::new()?;
    let device_fd = Mshv::open_with_cloexec(true)?;
    ensure!(
        errno(ioctl(device_fd, 0xb8ff, 0)) == libc::ENOTTY,
        "unknown ioctl of the device"
    );
    ensure!(
        errno(ioctl(device_fd, 0x4010_b800, 8)) == libc::EFAULT,
        "bad address"
    );
    let mut v1 = [1u64 << 6, 0];
    ensure!(
        errno(ioctl(device_fd, 0x4010_b800, v1.as_mut_ptr() as u64)) == libc::EINVAL,
        "unknown flag"
    );
    v1 = [1, 1];
    ensure!(
        errno(ioctl(device_fd, 0x4010_b800, v1.as_mut_ptr() as u64)) == libc::EINVAL,
        "isolation"
    );
    // A hypercall that is not allowed, and envelopes that are wrong.
    let (input, mut output) = ([0u64; 4], [0u64; 4]);
    let (in_ptr, out_ptr) = (input.as_ptr() as u64, output.as_mut_ptr() as u64);
    let envelope = |code: u16| mshv_root_hvcall {
        code,
        in_sz: 16,
        out_sz: 8,
        in_ptr,
        out_ptr,
        ..Default::default()
    };
    let mut cases = vec![
        envelope(0x40),
        envelope(0x48),
        envelope(0x50),
        envelope(0xf001),
    ];
    cases.push(mshv_root_hvcall {
        status: 1,
        ..envelope(0x44)
    });
    cases.push(mshv_root_hvcall {
        in_sz: 4,
        ..envelope(0x44)
    });
    cases.push(mshv_root_hvcall {
        in_sz: 4097,
        ..envelope(0x44)
    });
    cases.push(mshv_root_hvcall {
        out_sz: 0,
        ..envelope(0x44)
    });
    cases.push(mshv_root_hvcall {
        in_ptr: 0,
        ..envelope(0x44)
    });
    for (index, mut case) in cases.into_iter().enumerate() {
        let result = ioctl(device_fd, 0xc020_b807, &raw mut case as u64);
        ensure!(errno(result) == libc::EINVAL, "hypercall case {index}");
    }
    let vm = device.create_vm()?;
    vm.initialize()?;
    let vm_fd = vm.as_raw_fd();
    ensure!(
        errno(ioctl(vm_fd, 0xb8ff, 0)) == libc::ENOTTY,
        "unknown ioctl of a partition"
    );
    for (index, expected) in [(256u32, libc::EINVAL), (u32::MAX, libc::EINVAL)] {
        ensure!(
            errno(ioctl(vm_fd, 0x4004_b801, &raw const index as u64)) == expected,
            "VP {index}"
        );
    }
    let vcpu = vm.create_vcpu(3)?;
    let index = 3u32;
    ensure!(
        errno(ioctl(vm_fd, 0x4004_b801, &raw const index as u64)) == libc::EEXIST,
        "VP twice"
    );
    ensure!(
        errno(ioctl(vcpu.as_raw_fd(), 0xb8ff, 0)) == libc::ENOTTY,
        "unknown ioctl of a VP"
    );
    // A property can be set on the partition's file only.
    let mut set = mshv_root_hvcall {
        in_sz: 24,
        out_ptr: 0,
        ..envelope(0x45)
    };
    ensure!(
        errno(ioctl(vcpu.as_raw_fd(), 0xc020_b807, &raw mut set as u64)) == libc::EINVAL,
        "property on a VP"
    );
    for (offset, expected) in [(2i64, libc::ENODEV), (3, libc::EINVAL)] {
        let mapped = machine::map_page(vcpu.as_raw_fd(), offset);
        ensure!(
            mapped.map_err(|e| e.raw_os_error()) == Err(Some(expected)),
            "mmap at page {offset}"
        );
    }
    // SAFETY: a descriptor of ours.
    unsafe { libc::close(device_fd) };
    Ok(())
}

fn wrong_memory_is_refused() -> Outcome {
    let vm = Mshv::new()?.create_vm()?;
    vm.initialize()?;
    let memory = Memory::new(0x10_0000)?;
    let at = memory.address();
    let attempt = |r| set_memory(&vm, r);
    ensure!(attempt(region(0x10, at, 0x4000, 3)) == 0, "a good region");
    let cases = [
        (region(0x100, at, 0, 3), libc::EINVAL),
        (region(0x100, at, 0x1001, 3), libc::EINVAL),
        (region(0x100, at + 1, 0x1000, 3), libc::EINVAL),
        (region(0x100, at, 0x1000, 8), libc::EINVAL),
        (region(0x100, 0x1000, 0x1000, 3), libc::EINVAL),
        (region(0x100, at, u64::MAX & !0xfff, 3), libc::EINVAL),
        (region(u64::MAX, at, 0x1000, 3), libc::EINVAL),
        (
            mshv_user_mem_region {
                rsvd: [1; 7],
                ..region(0x100, at, 0x1000, 3)
            },
            libc::EINVAL,
        ),
        (region(0x13, at, 0x1000, 3), libc::EEXIST),
        (region(0xc, at, 0x10000, 3), libc::EEXIST),
        (region(0xf, at, 0x2000, 3), libc::EEXIST),
        (region(0x11, at, 0x1000, 4), libc::EINVAL),
        (region(0x10, at + 0x1000, 0x4000, 4), libc::EINVAL),
        (region(0x10, at, 0x3000, 4), libc::EINVAL),
        (region(0x20, at, 0x4000, 4), libc::ENOENT),
    ];
    for (index, (case, expected)) in cases.into_iter().enumerate() {
        let got = attempt(case);
        ensure!(
            got == expected,
            "case {index}: errno {got} instead of {expected}"
        );
    }
    // Beside it, twice the same memory, and away again.
    ensure!(attempt(region(0xf, at, 0x1000, 3)) == 0, "neighbour");
    ensure!(attempt(region(0x14, at, 0x1000, 3)) == 0, "other neighbour");
    ensure!(attempt(region(0x10, at, 0x4000, 4)) == 0, "unmap");
    ensure!(
        attempt(region(0x10, at, 0x4000, 4)) == libc::ENOENT,
        "unmap twice"
    );
    Ok(())
}

/// The image does a part of a long list at a time; clients get the whole.
fn long_lists_are_done_to_the_end() -> Outcome {
    const COUNT: usize = 200;
    let machine = Machine::new(&[0xf4])?;
    machine.set(&[(hv_register_name_HV_X64_REGISTER_RBX, 0x1234_5678)])?;
    let mut input = [0u32; 4 + COUNT];
    input[4..].fill(hv_register_name_HV_X64_REGISTER_RBX);
    let mut output = [[0u64; 2]; COUNT];
    let mut call = mshv_root_hvcall {
        code: 0x50,
        reps: COUNT as u16,
        in_sz: size_of_val(&input) as u16,
        out_sz: size_of_val(&output) as u16,
        in_ptr: input.as_ptr() as u64,
        out_ptr: output.as_mut_ptr() as u64,
        ..Default::default()
    };
    ioctl(machine.vcpu.as_raw_fd(), 0xc020_b807, &raw mut call as u64)?;
    ensure!(usize::from(call.reps) == COUNT, "{} done", call.reps);
    ensure!(output == [[0x1234_5678, 0]; COUNT], "values");
    Ok(())
}

/// The sum of a number that each partition has in the status.
fn sum(name: &str) -> io::Result<u64> {
    let status = std::fs::read_to_string("/sys/kernel/debug/hv_core/status")?;
    let key = format!("\"{name}\":");
    let numbers = status.split(&key).skip(1);
    Ok(numbers
        .filter_map(|rest| rest.split([',', '}']).next()?.parse::<u64>().ok())
        .sum())
}

/// Two VPs write to all pages of a window, over and over; meanwhile regions in it come, go and are refused where they
/// overlap. What is taken away is not written to any more, although the VPs try.
fn memory_changes_beneath_running_vps() -> Outcome {
    /// First page and pages of the window, which lies above what the code is in.
    const FIRST: u64 = 0x10;
    const PAGES: u64 = 0x80;
    /// Length of the instruction that writes.
    const INCREMENT_BYTES: u64 = 4;
    #[rustfmt::skip]
    let code = [
        0xb8, 0x00, 0x10,       // mov $0x1000, %ax     the window's first segment
        0x8e, 0xd8,             // 1: mov %ax, %ds
        0xfe, 0x06, 0x00, 0x00, // incb 0
        0x05, 0x00, 0x01,       // add $0x100, %ax      next page
        0x3d, 0x00, 0x90,       // cmp $0x9000, %ax     behind the window
        0x75, 0xf2,             // jne 1b
        0xeb, 0xed,             // jmp to the start
    ];
    let machine = Machine::new(&code)?;
    let second = machine.vm.create_vcpu(1)?;
    machine::prepare(&second)?;
    machine::wake(&second)?;
    let memory = Memory::new(PAGES as usize * 4096)?;
    let rest = sum("mapped_pages")?;
    let attempt = |first: u64, pages: u64, flags| {
        let address = memory.address() + first * 4096;
        set_memory(
            &machine.vm,
            region(FIRST + first, address, pages * 4096, flags),
        )
    };
    let done = std::sync::atomic::AtomicBool::new(false);
    let is_done = || done.load(std::sync::atomic::Ordering::Acquire);
    // A write to a page that is not there ends the run; the next page may be there.
    let keep_running = |vcpu: &mshv_ioctls::VcpuFd| -> Result<(), String> {
        while !is_done() {
            match vcpu.run() {
                Ok(message) if machine::kind(&message) == hv_message_type_HVMSG_UNMAPPED_GPA => {
                    let info = message
                        .to_memory_info()
                        .map_err(|error| error.to_string())?;
                    let next = info.header.rip + INCREMENT_BYTES;
                    machine::set(vcpu, &[(hv_register_name_HV_X64_REGISTER_RIP, next)])
                        .map_err(|error| error.to_string())?;
                }
                Err(error) if error.errno() == libc::EINTR => {}
                Ok(message) => return Err(format!("message {:#x}", machine::kind(&message))),
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let runners = [&machine.vcpu, &second].map(|vcpu| scope.spawn(|| keep_running(vcpu)));
        let outcome = (|| -> Outcome {
            for turn in 0..200u64 {
                let pages = 1 << (turn % 4);
                let first = turn * 11 % (PAGES - 16);
                ensure!(attempt(first, pages, 3) == 0, "turn {turn}: map");
                let over = attempt(first.saturating_sub(1), pages + 2, 3);
                ensure!(over == libc::EEXIST, "turn {turn}: overlap {over}");
                // In every fourth turn the guest surely uses it.
                while turn % 4 == 0 && memory.read(first as usize * 4096) == 0 {
                    ensure!(!runners.iter().any(|r| r.is_finished()), "a VP stopped");
                    std::thread::yield_now();
                }
                ensure!(attempt(first, pages, 4) == 0, "turn {turn}: unmap");
                for page in first..first + pages {
                    memory.write(page as usize * 4096, &[0]);
                }
            }
            Ok(())
        })();
        // From here on nothing is mapped, and the VPs still try.
        let late = (0..5).all(|_| {
            std::thread::yield_now();
            (0..PAGES).all(|page| memory.read(page as usize * 4096) == 0)
        });
        done.store(true, std::sync::atomic::Ordering::Release);
        for runner in runners {
            runner.join().map_err(|_| "thread")??;
        }
        outcome?;
        ensure!(late, "a page was written to after it was taken away");
        Ok::<_, Box<dyn std::error::Error>>(())
    })?;
    ensure!(sum("mapped_pages")? <= rest + 10, "pages stay mapped");
    Ok(())
}

fn guest_memory_appears_when_touched() -> Outcome {
    // 16-bit code can reach 64 KiB per segment: it adds up a byte of 8 pages, then writes one.
    #[rustfmt::skip]
    let code = [
        0xbb, 0x00, 0x20,       // mov $0x2000, %bx
        0x30, 0xc0,             // xor %al, %al
        0x02, 0x07,             // 1: add (%bx), %al
        0x81, 0xc3, 0x00, 0x10, // add $0x1000, %bx
        0x81, 0xfb, 0x00, 0xa0, // cmp $0xa000, %bx
        0x75, 0xf4,             // jne 1b
        0xa2, 0x00, 0xa8,       // mov %al, 0xa800
        0xe6, 0x10,             // out %al, $0x10
    ];
    let machine = Machine::new(&code)?;
    for page in 1..9 {
        machine.memory.write(page * 0x1000, &[page as u8]);
    }
    let (port, value) = machine.next_port_write()?;
    ensure!((port, value) == (0x10, 36), "port {port:#x} value {value}");
    ensure!(
        machine.memory.read(0x9800) == 36,
        "the write did not arrive"
    );
    Ok(())
}

fn unmapped_memory_exits_with_its_address() -> Outcome {
    #[rustfmt::skip]
    let code = [
        0xb8, 0x00, 0xf0, // mov $0xf000, %ax
        0x8e, 0xd8,       // mov %ax, %ds
        0xa2, 0x34, 0x12, // mov %al, 0x1234
    ];
    let machine = Machine::new(&code)?;
    let message = machine.next_message()?;
    ensure!(
        machine::kind(&message) == hv_message_type_HVMSG_UNMAPPED_GPA,
        "{:#x}",
        machine::kind(&message)
    );
    let info = message.to_memory_info()?;
    let (gpa, access, count) = (
        info.guest_physical_address,
        info.header.intercept_access_type,
        info.instruction_byte_count,
    );
    ensure!(
        (gpa, access) == (0xf1234, 1),
        "gpa {gpa:#x} access {access}"
    );
    ensure!(
        count >= 3 && info.instruction_bytes[..3] == code[5..],
        "instruction bytes"
    );
    Ok(())
}

fn read_only_memory_exits_at_a_write() -> Outcome {
    #[rustfmt::skip]
    let code = [
        0xa0, 0x00, 0xc0, // mov 0xc000, %al
        0xe6, 0x10,       // out %al, $0x10
        0xa2, 0x01, 0xc0, // mov %al, 0xc001
    ];
    let machine = Machine::new(&code)?;
    let rom = Memory::new(0x1000)?;
    rom.write(0, &[0x5a]);
    machine
        .vm
        .map_user_memory(region(0xc, rom.address(), 0x1000, 2))?;
    ensure!(machine.next_port_write()? == (0x10, 0x5a), "read");
    let message = machine.next_message()?;
    ensure!(
        machine::kind(&message) == hv_message_type_HVMSG_GPA_INTERCEPT,
        "{:#x}",
        machine::kind(&message)
    );
    let info = message.to_memory_info()?;
    let (gpa, access) = (
        info.guest_physical_address,
        info.header.intercept_access_type,
    );
    ensure!((gpa, access) == (0xc001, 1), "gpa {gpa:#x} access {access}");
    ensure!(rom.read(1) == 0, "the write arrived");
    Ok(())
}

fn doorbells_ring_without_an_exit() -> Outcome {
    #[rustfmt::skip]
    let code = [
        0xb8, 0x00, 0xf0, // mov $0xf000, %ax
        0x8e, 0xd8,       // mov %ax, %ds
        0xb8, 0x07, 0x00, // mov $7, %ax
        0xa3, 0x00, 0x10, // mov %ax, 0x1000     any value
        0x89, 0x07,       // mov %ax, (%bx)      any value
        0x89, 0x44, 0x04, // mov %ax, 4(%si)     wants 7
        0xb0, 0x08,       // mov $8, %al
        0x89, 0x44, 0x04, // mov %ax, 4(%si)     wants 7, gets 8
        0xe6, 0x10,       // out %al, $0x10
    ];
    let machine = Machine::new(&code)?;
    machine.set(&[
        (hv_register_name_HV_X64_REGISTER_RBX, 0x1000),
        (hv_register_name_HV_X64_REGISTER_RSI, 0x1000),
    ])?;
    let any = EventFd::new(EFD_NONBLOCK)?;
    let seven = EventFd::new(EFD_NONBLOCK)?;
    let bell = |fd: &EventFd, addr, len, flags, datamatch| mshv_user_ioeventfd {
        datamatch,
        addr,
        len,
        fd: fd.as_raw_fd(),
        flags,
        ..Default::default()
    };
    let attempt =
        |b: mshv_user_ioeventfd| ioctl(machine.vm.as_raw_fd(), 0x4020_b804, &raw const b as u64);
    ensure!(attempt(bell(&any, 0xf1000, 0, 0, 0)).is_ok(), "assign");
    ensure!(
        attempt(bell(&seven, 0xf1004, 2, 1, 7)).is_ok(),
        "assign with data"
    );
    ensure!(
        errno(attempt(bell(&any, 0xf1004, 2, 1, 7))) == libc::EEXIST,
        "twice"
    );
    ensure!(
        errno(attempt(bell(&any, 0xf1004, 3, 0, 0))) == libc::EINVAL,
        "odd length"
    );
    ensure!(
        errno(attempt(bell(&any, u64::MAX, 8, 0, 0))) == libc::EINVAL,
        "overflow"
    );
    let message = machine.next_message()?;
    ensure!(
        machine::kind(&message) == hv_message_type_HVMSG_UNMAPPED_GPA,
        "no exit for the wrong value"
    );
    let info = message.to_memory_info()?;
    let (gpa, rip) = (info.guest_physical_address, info.header.rip);
    ensure!(
        (gpa, rip) == (0xf1004, 0x1000 + 18),
        "exit: gpa {gpa:#x} rip {rip:#x}"
    );
    ensure!(
        any.read().ok() == Some(2) && seven.read().ok() == Some(1),
        "the bells did not ring as often as they should"
    );
    // Clients remove with neither length nor data.
    ensure!(attempt(bell(&seven, 0xf1004, 0, 4, 0)).is_ok(), "deassign");
    ensure!(
        errno(attempt(bell(&seven, 0xf1004, 0, 4, 0))) == libc::ENOENT,
        "deassign twice"
    );
    Ok(())
}

/// A run returns with EINTR, and how long that took.
fn interrupted_run(machine: &Machine) -> Result<Duration, Box<dyn std::error::Error>> {
    let start = Instant::now();
    match machine.vcpu.run() {
        Err(error) if error.errno() == libc::EINTR => Ok(start.elapsed()),
        Err(error) => Err(error.into()),
        Ok(message) => Err(format!("message {:#x}", machine::kind(&message)).into()),
    }
}

fn run_of_a_halted_vp_ends_in_time() -> Outcome {
    let machine = Machine::new(&[0xf4, 0xeb, 0xfd])?; // 1: hlt; jmp 1b
    for _ in 0..5 {
        let took = interrupted_run(&machine)?;
        ensure!((5..500).contains(&took.as_millis()), "{took:?}");
    }
    Ok(())
}

fn run_of_a_busy_vp_ends_in_time() -> Outcome {
    let machine = Machine::new(&[0xeb, 0xfe])?; // 1: jmp 1b
    for _ in 0..5 {
        let took = interrupted_run(&machine)?;
        ensure!((5..500).contains(&took.as_millis()), "{took:?}");
    }
    Ok(())
}

/// Ports too: by value and width, with a step over the write that is as good as the processor's.
fn port_doorbells_ring_without_an_exit() -> Outcome {
    const PORT: u16 = 0x510;
    #[rustfmt::skip]
    let code = [
        0xba, 0x10, 0x05, // 0x1000: mov $0x510, %dx
        0xb8, 0x07, 0x01, // mov $0x107, %ax
        0xee,             // out %al, %dx       rings
        0xef,             // out %ax, %dx       another width: for the VMM
        0xb0, 0x08,       // mov $8, %al
        0xee,             // out %al, %dx       another value: for the VMM
        0xb0, 0x07,       // mov $7, %al
        0x68, 0x02, 0x01, // push $0x102        TF
        0x9d,             // 0x1010: popf
        0xee,             // 0x1011: out %al, %dx       rings, and traps
        0xf4,             // 0x1012: hlt
    ];
    #[rustfmt::skip]
    let debug = [
        0x8b, 0xec,       // 0x1080: mov %sp, %bp
        0x8a, 0x46, 0x00, // mov (%bp), %al     the low byte of the return address
        0xe6, 0x12,       // out %al, $0x12
        0xf4,             // hlt
    ];
    let machine = Machine::new(&code)?;
    machine.memory.write(0x80, &debug);
    machine.handle(1, 0x1080)?;
    let event = EventFd::new(EFD_NONBLOCK)?;
    let bell = mshv_user_ioeventfd {
        datamatch: 7,
        addr: PORT.into(),
        len: 1,
        fd: event.as_raw_fd(),
        flags: 1 << MSHV_IOEVENTFD_BIT_DATAMATCH | 1 << MSHV_IOEVENTFD_BIT_PIO,
        ..Default::default()
    };
    ioctl(machine.vm.as_raw_fd(), 0x4020_b804, &raw const bell as u64)?;
    for value in [7, 8] {
        let seen = machine.next_port_write()?;
        ensure!(seen == (PORT, value), "port {seen:x?} for {value}");
    }
    let rung = event.read().ok();
    ensure!(rung == Some(1), "rung {rung:?} before the step");
    let trap = machine.next_port_write()?;
    ensure!(trap == (0x12, 0x12), "trap {trap:x?}");
    let rung = event.read().ok();
    ensure!(rung == Some(1), "rung {rung:?} with the step");
    Ok(())
}

/// A guest that sleeps with interrupts on, and whose handler of vector 0x40 writes to port 0x20.
fn sleeper() -> Result<Machine, Box<dyn std::error::Error>> {
    #[rustfmt::skip]
    let code = [
        0xfb,                         // sti
        0xf4, 0xeb, 0xfd,             // 1: hlt; jmp 1b
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        0xb0, 0x33,                   // 0x1010: mov $0x33, %al
        0xe6, 0x20,                   // out %al, $0x20
        0xf4,                         // hlt
    ];
    let machine = Machine::new(&code)?;
    machine.handle(0x40, 0x1010)?;
    machine.enable_apic()?;
    Ok(machine)
}

fn interrupt_wakes_a_halted_vp() -> Outcome {
    let machine = sleeper()?;
    interrupted_run(&machine)?;
    machine.vm.request_virtual_interrupt(&InterruptRequest {
        interrupt_type: hv_interrupt_type_HV_X64_INTERRUPT_TYPE_FIXED,
        apic_id: 0,
        vector: 0x40,
        level_triggered: false,
        logical_destination_mode: false,
        long_mode: false,
    })?;
    ensure!(machine.next_port_write()? == (0x20, 0x33), "port");
    Ok(())
}

fn event_asserts_an_interrupt() -> Outcome {
    let machine = sleeper()?;
    let vm = machine.vm.as_raw_fd();
    let event = EventFd::new(EFD_NONBLOCK)?;
    machine.vm.register_irqfd(&event, 30)?;
    let again = machine
        .vm
        .register_irqfd(&event, 31)
        .map_err(|error| error.errno());
    ensure!(again == Err(libc::EBUSY), "twice: {again:?}");
    let mut table = [0u32; 10];
    let mut set = |entries: &[[u32; 4]]| {
        table[0] = entries.len() as u32;
        table[2..2 + entries.len() * 4].copy_from_slice(entries.as_flattened());
        ioctl(vm, 0x4008_b805, table.as_ptr() as u64)
    };
    ensure!(
        errno(set(&[[30, 0xfee0_0000, 0, 0x40], [30, 0, 0, 0]])) == libc::EINVAL,
        "number twice"
    );
    ensure!(
        errno(set(&[[4096, 0, 0, 0]])) == libc::EINVAL,
        "number too large"
    );
    ensure!(errno(set(&[[30, 0, 1, 0]])) == libc::EINVAL, "high address");
    // Without a route nothing comes.
    event.write(1)?;
    interrupted_run(&machine)?;
    ensure!(
        set(&[[30, 0xfee0_0000, 0, 0x40], [5, 0, 0, 0]]).is_ok(),
        "route"
    );
    // Signalled from another thread while the VP sleeps in its run.
    let writer = event.try_clone()?;
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(30));
        writer.write(1)
    });
    ensure!(machine.next_port_write()? == (0x20, 0x33), "port");
    thread.join().map_err(|_| "thread")??;
    ensure!(event.read().is_err(), "the event was not consumed");
    machine.vm.unregister_irqfd(&event, 30)?;
    event.write(1)?;
    ensure!(event.read()? == 1, "the event was consumed");
    Ok(())
}

/// The guest starts VP 1 at 0x2000.
fn starts_another_vp(code: &[u8]) -> Outcome {
    let machine = Machine::new(code)?;
    apic::reach_page(&machine)?;
    machine.memory.write(
        0x1000,
        &[
            0xb0, 0x77, // mov $0x77, %al
            0xe6, 0x30, // out %al, $0x30
            0xf4, // hlt
        ],
    );
    let second = machine.vm.create_vcpu(1)?;
    // It waits, whatever its registers say, until it is started.
    match second.run() {
        Err(error) if error.errno() == libc::EINTR => {}
        other => {
            return Err(format!("it did not wait: {:?}", other.map(|m| machine::kind(&m))).into())
        }
    }
    let done = std::sync::atomic::AtomicBool::new(false);
    let outcome = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Acquire) {
                if interrupted_run(&machine).is_err() {
                    break;
                }
            }
        });
        let outcome = machine::next_port_write_of(&second);
        done.store(true, std::sync::atomic::Ordering::Release);
        outcome
    })?;
    ensure!(outcome == (0x30, 0x77), "port {outcome:?}");
    Ok(())
}

fn large_region_costs_nothing_until_touched() -> Outcome {
    const SIZE: u64 = 8 << 30;
    let vm = Mshv::new()?.create_vm()?;
    vm.initialize()?;
    let memory = Memory::new(SIZE as usize)?;
    vm.map_user_memory(region(0, memory.address(), SIZE, 3))?;
    // While nothing is tracked all is dirty; once it is, what was never touched is clean.
    let mut bitmap = [0u8; 0x400];
    let mut ask = |page_count: u64, base: u64, op: u8| {
        let request = mshv_gpap_access_bitmap {
            access_type: 1,
            access_op: op,
            page_count,
            gpap_base: base,
            bitmap_ptr: bitmap.as_mut_ptr() as u64,
            ..Default::default()
        };
        ioctl(vm.as_raw_fd(), 0xc020_b806, &raw const request as u64).map(|_| bitmap)
    };
    ensure!(
        ask(0x2000, 0, 1)?.iter().all(|byte| *byte == 0xff),
        "all dirty"
    );
    ensure!(ask(8, (SIZE >> 12) - 4, 0)?[0] == 0x0f, "the end");
    ensure!(errno(ask(0, 0, 0).map(|_| 0)) == libc::EINVAL, "no page");
    ensure!(errno(ask(8, 0, 3).map(|_| 0)) == libc::EINVAL, "operation");
    vm.enable_dirty_page_tracking()?;
    ensure!(
        ask(0x2000, 0, 1)?.iter().all(|byte| *byte == 0),
        "all clean"
    );
    vm.disable_dirty_page_tracking()?;
    Ok(())
}

fn partitions() -> io::Result<usize> {
    let status = std::fs::read_to_string("/sys/kernel/debug/hv_core/status")?;
    let list = status.split("\"partitions\":[").nth(1).unwrap_or("");
    Ok(list.matches("\"deposited_pages\"").count())
}

/// Exits of each VP of the only partition.
fn exits() -> Result<Vec<u64>, Box<dyn std::error::Error>> {
    let status = std::fs::read_to_string("/sys/kernel/debug/hv_core/status")?;
    let list = status.split("\"partitions\":[").nth(1).unwrap_or("");
    let counts = list.split("\"exits\":").skip(1);
    let digits = |rest: &str| rest.split('}').next().unwrap_or("").parse();
    Ok(counts.map(digits).collect::<Result<_, _>>()?)
}

fn exits_are_counted_for_each_vp() -> Outcome {
    #[rustfmt::skip]
    let code = [
        0xbe, 100, 0,     // mov $100, %si
        0x31, 0xc0,       // 1: xor %ax, %ax
        0x0f, 0xa2,       // cpuid
        0x4e,             // dec %si
        0x75, 0xf9,       // jnz 1b
        0xe6, 0x10,       // out %al, $0x10
    ];
    let machine = Machine::new(&code)?;
    let second = machine.vm.create_vcpu(1)?;
    machine::prepare(&second)?;
    machine::wake(&second)?;
    let start = exits()?;
    ensure!(start.len() == 2, "{} VPs", start.len());
    machine.next_port_write()?;
    let first_ran = exits()?;
    machine::next_port_write_of(&second)?;
    let both_ran = exits()?;
    // Interrupts of the root are exits, too.
    ensure!(
        first_ran[0] > start[0] + 100 && first_ran[1] == start[1],
        "{start:?}, then {first_ran:?}"
    );
    ensure!(
        both_ran[0] == first_ran[0] && both_ran[1] > first_ran[1] + 100,
        "{first_ran:?}, then {both_ran:?}"
    );
    Ok(())
}

fn killed_owner_leaves_nothing() -> Outcome {
    VICTIMS.iter().try_for_each(|victim| killed_owner(victim))
}

fn killed_owner(victim: &str) -> Outcome {
    let before = partitions()?;
    let mut child = Command::new("/proc/self/exe")
        .arg(victim)
        .stdout(Stdio::piped())
        .spawn()?;
    // It says when it runs.
    let mut out = child.stdout.take().ok_or("no output")?;
    io::Read::read_exact(&mut out, &mut [0])?;
    std::thread::sleep(Duration::from_millis(50));
    ensure!(partitions()? == before + 1, "{victim} has no partition");
    child.kill()?;
    child.wait()?;
    ensure!(
        partitions()? == before,
        "{victim}: the partition is still there"
    );
    Ok(())
}

/// Many processes whose VPs run are killed; what they had is free again, to the last page. How many is in `KILLS`.
fn killed_owners() -> Outcome {
    let kills: usize = std::env::var("KILLS")?.parse()?;
    for victim in VICTIMS.iter().cycle().take(kills) {
        killed_owner(victim)?;
    }
    let (pinned, released) = memory::pins()?;
    ensure!(
        pinned == released,
        "{pinned} pages pinned, {released} let go"
    );
    Ok(())
}

/// Partitions with VPs and memory, until there is no memory for one more. Prints how far it came: 0 for no partition.
fn starved() -> Outcome {
    let mut all = Vec::new();
    let error = loop {
        match starved_machine(&all) {
            Ok(machine) => all.push(machine),
            Err(error) => break error,
        }
        ensure!(all.len() < 200, "there is no limit");
    };
    let count = all.len();
    // Printing needs memory, too.
    drop(all);
    println!("{count} machines");
    ensure!(error.raw_os_error() == Some(libc::ENOMEM), "{error}");
    Ok(())
}

/// One more partition, as plain descriptors.
fn starved_machine(all: &[[OwnedFd; 4]]) -> io::Result<[OwnedFd; 4]> {
    let own = |number: i32| {
        // SAFETY: the kernel gave us the descriptor just now.
        unsafe { OwnedFd::from_raw_fd(number) }
    };
    let device = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/mshv")?;
    let create = [7u64, 0];
    let partition = own(ioctl(
        device.as_raw_fd(),
        0x4010_b800,
        create.as_ptr() as u64,
    )?);
    ioctl(partition.as_raw_fd(), 0xb800, 0)?;
    let vp = |index: u32| ioctl(partition.as_raw_fd(), 0x4004_b801, &raw const index as u64);
    // Which of the two does not fit differs.
    let (first, second) = (vp(0)?, vp(all.len() as u32 + 1)?);
    Ok([device.into(), own(first), own(second), partition])
}

fn victim() -> Outcome {
    let machine = Machine::new(&[0xeb, 0xfe])?;
    println!("x");
    loop {
        interrupted_run(&machine)?;
    }
}
