// SPDX-License-Identifier: GPL-2.0
//! Guest memory stays the kernel's to move, to swap, to share and to take away, beneath a guest that uses it.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use mshv_bindings::*;
use mshv_ioctls::VcpuFd;
use mshv_smoke::machine::{self, kind, Machine, Memory};

use super::large::{code, look_at, number, region, toucher, LARGE, PAGE, PLACE, SMALL, WRITABLE};
use super::memory::{counter, pinned_and_mapped};
use super::Outcome;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const ACCESS: i32 = libc::PROT_READ | libc::PROT_WRITE;
const EXECUTABLE: u8 = 2;

/// Private memory in pages of 4 KiB.
fn small_pages(size: u64) -> io::Result<Memory> {
    let memory = Memory::huge(size as usize)?;
    memory.advise(0, size as usize, libc::MADV_NOHUGEPAGE)?;
    Ok(memory)
}

/// A file without a name.
fn file(size: u64) -> io::Result<File> {
    // SAFETY: a name, and a new descriptor that nobody else has.
    let file = unsafe {
        match libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) {
            -1 => return Err(io::Error::last_os_error()),
            number => File::from_raw_fd(number),
        }
    };
    file.set_len(size)?;
    Ok(file)
}

/// Lets the guest run `code` from its start.
fn restart(machine: &Machine, code: &[u8]) -> Outcome {
    machine.memory.write(0, code);
    machine.set(&[(hv_register_name_HV_X64_REGISTER_RIP, 0x1000)])
}

/// The guest's next sum.
fn total(machine: &Machine) -> Result<u64> {
    let (port, total) = machine.next_port_write()?;
    ensure!(port == 0x10, "port {port:#x}");
    Ok(total)
}

/// Pages come when the guest touches them, not before; what the VMM gives back goes, reads as zero, and does not come back
/// with its neighbours.
pub fn memory_comes_when_touched_and_goes_when_given_back() -> Outcome {
    const SIZE: u64 = 4 * LARGE;
    let machine = toucher(PLACE, LARGE)?;
    let memory = small_pages(SIZE)?;
    let before = pinned_and_mapped()?;
    let all = region(&memory, 0, SIZE, PLACE, WRITABLE);
    machine.vm.map_user_memory(all)?;
    let resident = memory.resident(0, SIZE as usize)?;
    ensure!(resident == 0, "{resident} pages when nobody touched any");
    ensure!(pinned_and_mapped()? == before, "mapped untouched");
    ensure!(total(&machine)? == 0, "first sum");
    let chunks = [0, 1, 2, 3].map(|n| memory.resident((n * LARGE) as usize, LARGE as usize));
    ensure!(
        matches!(chunks, [Ok(512), Ok(0), Ok(0), Ok(0)]),
        "resident by 2 MiB: {chunks:?}"
    );
    let after = pinned_and_mapped()?;
    ensure!(
        after.0 == before.0 && (512..=522).contains(&(after.1 - before.1)),
        "{before:?}, touched {after:?}"
    );
    // 100 pages start again at zero.
    memory.advise(10 * PAGE as usize, 100 * PAGE as usize, libc::MADV_DONTNEED)?;
    let left = pinned_and_mapped()?;
    ensure!(left.1 == after.1 - 100, "{after:?}, given back {left:?}");
    let sum = total(&machine)?;
    ensure!(
        sum == (SMALL - 100) & 0xff,
        "sum {sum} after 100 pages went"
    );
    for page in 0..SMALL {
        let expected = if (10..110).contains(&page) { 1 } else { 2 };
        let byte = memory.read((page * PAGE) as usize);
        ensure!(byte == expected, "page {page:#x} has {byte:#x}");
    }
    // Then the guest wants one page only.
    memory.advise(0, LARGE as usize, libc::MADV_DONTNEED)?;
    restart(&machine, &code(PAGE))?;
    ensure!(total(&machine)? == 0, "an old page");
    let resident = memory.resident(0, LARGE as usize)?;
    ensure!(resident == 1, "{resident} pages came back for one");
    drop(memory);
    let left = pinned_and_mapped()?.1;
    ensure!(left <= before.1 + 10, "{left} pages stay mapped");
    Ok(())
}

/// Something the kernel does to memory that loses nothing of it.
type Disturbance = fn(&Memory, usize) -> io::Result<()>;

/// A process with the same memory, which does `work` and ends.
fn fork(work: impl FnOnce()) -> io::Result<()> {
    // SAFETY: the child makes no call but to write to memory and to end.
    unsafe {
        match libc::fork() {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                work();
                libc::_exit(0)
            }
            child => {
                libc::waitpid(child, std::ptr::null_mut(), 0);
                Ok(())
            }
        }
    }
}

fn fork_only(_: &Memory, _: usize) -> io::Result<()> {
    fork(|| ())
}

fn fork_and_write(memory: &Memory, size: usize) -> io::Result<()> {
    fork(|| {
        (0..size)
            .step_by(4096)
            .for_each(|at| memory.write(at, &[0xee]))
    })
}

fn write_protect(memory: &Memory, size: usize) -> io::Result<()> {
    memory.protect(0, size, libc::PROT_READ)?;
    memory.protect(0, size, ACCESS)
}

fn forbid(memory: &Memory, size: usize) -> io::Result<()> {
    memory.protect(4096, size / 2, libc::PROT_NONE)?;
    memory.protect(4096, size / 2, ACCESS)
}

fn page_out(memory: &Memory, size: usize) -> io::Result<()> {
    memory.advise(0, size, libc::MADV_PAGEOUT)
}

/// Pages that went to swap space so far; and whether there is any.
fn swapped() -> Result<(u64, bool)> {
    let swaps = fs::read_to_string("/proc/swaps")?;
    Ok((counter("pswpout ")?, swaps.lines().count() > 1))
}

fn collapse(memory: &Memory, size: usize) -> io::Result<()> {
    memory.advise(0, size, libc::MADV_HUGEPAGE)?;
    const MADV_COLLAPSE: i32 = 25;
    // It may fail while the guest is in the way.
    let _ = memory.advise(0, size, MADV_COLLAPSE);
    Ok(())
}

fn compact(_: &Memory, _: usize) -> io::Result<()> {
    fs::write("/proc/sys/vm/compact_memory", "1")
}

fn merge(memory: &Memory, size: usize) -> io::Result<()> {
    memory.advise(0, size, libc::MADV_MERGEABLE)?;
    fs::write("/sys/kernel/mm/ksm/run", "1")
}

fn unmerge(_: &Memory, _: usize) -> io::Result<()> {
    fs::write("/sys/kernel/mm/ksm/run", "2")
}

const DISTURBANCES: [(&str, Disturbance); 9] = [
    ("fork", fork_only),
    ("collapse", collapse),
    ("fork_and_write", fork_and_write),
    ("write_protect", write_protect),
    ("merge", merge),
    ("page_out", page_out),
    ("forbid", forbid),
    ("compact", compact),
    ("unmerge", unmerge),
];

/// Runs a VP that writes to port 0x10 after each pass until it is `done`, and counts the passes. What it cannot reach at the
/// moment it tries again.
fn passes(
    vcpu: &VcpuFd,
    sum: u64,
    count: &AtomicU64,
    done: &AtomicBool,
) -> std::result::Result<(), String> {
    loop {
        let message = match vcpu.run() {
            Ok(message) => message,
            Err(error) if error.errno() == libc::EINTR => continue,
            Err(error) => return Err(error.to_string()),
        };
        #[allow(non_upper_case_globals)] // The names are the bindings'.
        match kind(&message) {
            hv_message_type_HVMSG_GPA_INTERCEPT => {}
            hv_message_type_HVMSG_X64_IO_PORT_INTERCEPT => {
                let info = message.to_ioport_info().map_err(|e| e.to_string())?;
                let (got, pass) = (info.rax & 0xff, count.load(Ordering::Relaxed));
                if got != sum {
                    return Err(format!("sum {got:#x} in pass {pass}, not {sum:#x}"));
                }
                let rip = info.header.rip + u64::from(info.header.instruction_length());
                machine::set(vcpu, &[(hv_register_name_HV_X64_REGISTER_RIP, rip)])
                    .map_err(|e| e.to_string())?;
                count.fetch_add(1, Ordering::AcqRel);
                if done.load(Ordering::Acquire) {
                    return Ok(());
                }
            }
            other => return Err(format!("message {other:#x}")),
        }
    }
}

/// A guest adds to all pages, over and over, while the kernel does all that it may do to memory. Nothing that it writes is
/// lost, and it never reads anything old.
pub fn nothing_is_lost_when_the_kernel_moves_memory() -> Outcome {
    const SIZE: u64 = 2 * LARGE;
    let machine = toucher(PLACE, SIZE)?;
    let memory = Memory::huge(SIZE as usize)?;
    number(&memory, SIZE / PAGE);
    machine
        .vm
        .map_user_memory(region(&memory, 0, SIZE, PLACE, WRITABLE))?;
    let sum = (0..SIZE / PAGE).sum::<u64>() & 0xff;
    let before = swapped()?;
    let (count, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let turns = std::env::var("TURNS").map_or(Ok(3), |turns| turns.parse())?;
    std::thread::scope(|scope| {
        let runner = scope.spawn(|| passes(&machine.vcpu, sum, &count, &done));
        let outcome = (|| -> Outcome {
            for turn in 0..turns {
                for (name, disturb) in DISTURBANCES {
                    disturb(&memory, SIZE as usize).map_err(|e| format!("{name}: {e}"))?;
                    // All of the next pass comes after it.
                    let seen = count.load(Ordering::Acquire);
                    while count.load(Ordering::Acquire) < seen + 1 {
                        ensure!(!runner.is_finished(), "turn {turn}, after {name}");
                        std::thread::yield_now();
                    }
                }
            }
            Ok(())
        })();
        done.store(true, Ordering::Release);
        let ran = runner.join().map_err(|_| "thread")?;
        ran.map_err(|error| match &outcome {
            Ok(()) => error,
            Err(when) => format!("{when}: {error}"),
        })?;
        outcome
    })?;
    let after = swapped()?;
    ensure!(after.0 > before.0 || !after.1, "nothing was swapped");
    let count = count.into_inner();
    for page in 0..SIZE / PAGE {
        let byte = memory.read((page * PAGE) as usize);
        ensure!(
            byte == (page + count) as u8,
            "page {page:#x} has {byte:#x} after {count} passes"
        );
    }
    Ok(())
}

/// Two VPs copy bytes of pages that the VMM gives back and fills anew, over and over: what they see is never of an old page.
pub fn given_back_pages_are_forgotten_by_all_vps() -> Outcome {
    const PAGES: u64 = 64;
    const TURNS: u64 = 40;
    // Each page: byte 0 to the byte at SI.
    #[rustfmt::skip]
    let code = [
        0x66, 0x31, 0xdb,                          // 1: xor %ebx, %ebx
        0x67, 0x8a, 0x03,                          // 2: mov (%ebx), %al
        0x67, 0x88, 0x04, 0x33,                    // mov %al, (%ebx,%esi)
        0x66, 0x81, 0xc3, 0x00, 0x10, 0, 0,        // add $0x1000, %ebx
        0x66, 0x81, 0xfb, 0x00, 0x00, PAGES as u8 >> 4, 0, // cmp $PAGES * 0x1000, %ebx
        0x75, 0xe9,                                // jne 2b
        0xeb, 0xe4,                                // jmp 1b
    ];
    let machine = Machine::new(&code)?;
    look_at(&machine.vcpu, PLACE)?;
    let second = machine.vm.create_vcpu(1)?;
    machine::prepare(&second)?;
    machine::wake(&second)?;
    look_at(&second, PLACE)?;
    machine.set(&[(hv_register_name_HV_X64_REGISTER_RSI, 1)])?;
    machine::set(&second, &[(hv_register_name_HV_X64_REGISTER_RSI, 2)])?;
    let memory = small_pages(LARGE)?;
    machine
        .vm
        .map_user_memory(region(&memory, 0, LARGE, PLACE, WRITABLE))?;
    let done = AtomicBool::new(false);
    let run = |vcpu: &VcpuFd| -> std::result::Result<(), String> {
        while !done.load(Ordering::Acquire) {
            match vcpu.run() {
                Err(error) if error.errno() == libc::EINTR => {}
                Ok(message) => return Err(format!("message {:#x}", kind(&message))),
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let runners = [&machine.vcpu, &second].map(|vcpu| scope.spawn(|| run(vcpu)));
        let outcome = (|| -> Outcome {
            for turn in 1..=TURNS {
                let odd = (turn % 3 * PAGE) as usize;
                let size = (PAGES * PAGE) as usize - odd;
                memory.advise(odd, size, libc::MADV_DONTNEED)?;
                (0..PAGES).for_each(|page| memory.write((page * PAGE) as usize, &[turn as u8]));
                for at in (0..PAGES).flat_map(|page| [1, 2].map(|vp| page * PAGE + vp)) {
                    while memory.read(at as usize) != turn as u8 {
                        ensure!(!runners.iter().any(|r| r.is_finished()), "a VP stopped");
                        std::thread::yield_now();
                    }
                }
            }
            Ok(())
        })();
        done.store(true, Ordering::Release);
        for runner in runners {
            runner.join().map_err(|_| "thread")??;
        }
        outcome
    })
}

/// The next access that the VMM has to finish: type of the message, GPA and kind of access.
fn next_access(machine: &Machine) -> Result<(u32, u64, u8)> {
    let message = machine.next_message()?;
    let info = message.to_memory_info()?;
    let access = info.header.intercept_access_type;
    Ok((kind(&message), info.guest_physical_address, access))
}

/// Memory that the VMM may only read serves as ROM, whatever the region says: the guest reads it, and its writes are the VMM's.
pub fn what_the_vmm_may_only_read_is_rom() -> Outcome {
    let file = file(2 * PAGE)?;
    std::os::unix::fs::FileExt::write_all_at(&file, &[5], PAGE)?;
    for (sharing, flags) in [
        (libc::MAP_PRIVATE, EXECUTABLE),
        (libc::MAP_SHARED, EXECUTABLE),
        (libc::MAP_SHARED, WRITABLE),
    ] {
        let memory = Memory::map(2 * PAGE as usize, libc::PROT_READ, sharing, Some(&file))?;
        let machine = toucher(PLACE, 2 * PAGE)?;
        machine
            .vm
            .map_user_memory(region(&memory, 0, 2 * PAGE, PLACE, flags))?;
        for page in [0, 1] {
            let (kind, gpa, access) = next_access(&machine)?;
            ensure!(
                (kind, gpa, access)
                    == (hv_message_type_HVMSG_GPA_INTERCEPT, PLACE + page * PAGE, 1),
                "flags {flags}: message {kind:#x} at {gpa:#x}, access {access}"
            );
            let rip = machine_rip(&machine)?;
            machine.set(&[(hv_register_name_HV_X64_REGISTER_RIP, rip + 3)])?;
        }
        ensure!(
            total(&machine)? == 5,
            "flags {flags}: it read something else"
        );
    }
    Ok(())
}

fn machine_rip(machine: &Machine) -> Result<u64> {
    let mut rip = [hv_register_assoc {
        name: hv_register_name_HV_X64_REGISTER_RIP,
        ..Default::default()
    }];
    machine.vcpu.get_reg(&mut rip)?;
    // SAFETY: the register has 64 bits.
    Ok(unsafe { rip[0].value.reg64 })
}

/// A file: a hole in it reads as zero, what is beyond its end is the VMM's to handle, and comes when the file grows.
pub fn file_may_lose_pages_beneath_the_guest() -> Outcome {
    const PAGES: u64 = 16;
    let file = file(PAGES * PAGE)?;
    let memory = Memory::map(
        (PAGES * PAGE) as usize,
        ACCESS,
        libc::MAP_SHARED,
        Some(&file),
    )?;
    let machine = toucher(PLACE, PAGES * PAGE)?;
    machine
        .vm
        .map_user_memory(region(&memory, 0, PAGES * PAGE, PLACE, WRITABLE))?;
    ensure!(total(&machine)? == 0, "first sum");
    let hole = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let (from, size) = (3 * PAGE as i64, 4 * PAGE as i64);
    // SAFETY: a descriptor of ours.
    let punched = unsafe { libc::fallocate(file.as_raw_fd(), hole, from, size) };
    ensure!(punched == 0, "{}", io::Error::last_os_error());
    let sum = total(&machine)?;
    ensure!(sum == PAGES - 4, "sum {sum} with a hole of 4 pages");
    file.set_len(10 * PAGE)?;
    let access = next_access(&machine)?;
    let read = (hv_message_type_HVMSG_GPA_INTERCEPT, PLACE + 10 * PAGE, 0);
    ensure!(access == read, "beyond the end: {access:x?}");
    // The same again, and again.
    ensure!(next_access(&machine)? == read, "at the second attempt");
    file.set_len(PAGES * PAGE)?;
    let sum = total(&machine)?;
    ensure!(sum == 10 * 2 - 4, "sum {sum} after the file grew again");
    Ok(())
}

/// Memory of a device: here that with the firmware's tables, which every PC has.
pub fn device_memory_is_the_guests() -> Outcome {
    const FIRMWARE: u64 = 0xf_0000;
    const SIZE: u64 = 16 * PAGE;
    let file = File::open("/dev/mem")?;
    let memory = Memory::map_at(SIZE as usize, FIRMWARE as i64, libc::PROT_READ, &file)?;
    let bytes: Vec<u64> = (0..SIZE)
        .step_by(PAGE as usize)
        .map(|at| memory.read(at as usize).into())
        .collect();
    let machine = toucher(PLACE, SIZE)?;
    // Without the write to memory.
    machine.memory.write(8, &[0x90; 3]);
    let before = pinned_and_mapped()?;
    machine
        .vm
        .map_user_memory(region(&memory, 0, SIZE, PLACE, 0))?;
    let (sum, seen) = (bytes.iter().sum::<u64>() & 0xff, total(&machine)?);
    ensure!(seen == sum, "sum {seen:#x} of {bytes:x?}");
    let after = pinned_and_mapped()?;
    ensure!(after.1 >= before.1 + 16, "{before:?}, then {after:?}");
    drop(memory);
    let after = pinned_and_mapped()?;
    ensure!(
        after.1 < before.1 + 16,
        "it stays: {before:?}, then {after:?}"
    );
    let access = next_access(&machine)?;
    ensure!(
        access == (hv_message_type_HVMSG_GPA_INTERCEPT, PLACE, 0),
        "afterwards {access:x?}"
    );
    Ok(())
}

/// Pages that the guest wrote to count as dirty also when they are not there any more, until the VMM clears that.
pub fn dirty_pages_stay_dirty_when_they_go() -> Outcome {
    let machine = toucher(PLACE, 8 * PAGE)?;
    let memory = small_pages(LARGE)?;
    machine
        .vm
        .map_user_memory(region(&memory, 0, LARGE, PLACE, WRITABLE))?;
    machine.vm.enable_dirty_page_tracking()?;
    const CLEAR: u8 = 1;
    let clear = || {
        machine
            .vm
            .get_dirty_log(PLACE / PAGE, LARGE as usize, CLEAR)
    };
    ensure!(clear()?.iter().all(|word| *word == 0), "dirty untouched");
    ensure!(total(&machine)? == 0, "first sum");
    memory.advise(0, LARGE as usize, libc::MADV_DONTNEED)?;
    let first = clear()?[0];
    ensure!(first & 0xff == 0xff, "dirty {first:#x} after they went");
    let second = clear()?;
    ensure!(
        second.iter().all(|word| *word == 0),
        "dirty {second:x?} when nothing is there"
    );
    ensure!(total(&machine)? == 0, "second sum");
    let third = clear()?;
    ensure!(
        third[0] == 0xff && third[1..].iter().all(|word| *word == 0),
        "dirty {third:x?} after 8 pages came"
    );
    machine.vm.disable_dirty_page_tracking()?;
    Ok(())
}

/// Pages that the kernel merged because they are the same part again when the guest writes to them.
pub fn merged_pages_part_when_written_to() -> Outcome {
    let ksm = |name: &str| format!("/sys/kernel/mm/ksm/{name}");
    let number_of =
        |name: &str| -> Result<u64> { Ok(fs::read_to_string(ksm(name))?.trim().parse()?) };
    let machine = toucher(PLACE, LARGE)?;
    let memory = small_pages(LARGE)?;
    machine
        .vm
        .map_user_memory(region(&memory, 0, LARGE, PLACE, WRITABLE))?;
    ensure!(total(&machine)? == 0, "first sum");
    memory.advise(0, LARGE as usize, libc::MADV_MERGEABLE)?;
    let usual = fs::read_to_string(ksm("pages_to_scan"))?;
    fs::write(ksm("pages_to_scan"), "2000")?;
    fs::write(ksm("run"), "1")?;
    // The guest stands still meanwhile.
    while number_of("pages_sharing")? < SMALL - 10 {
        std::thread::yield_now();
    }
    fs::write(ksm("pages_to_scan"), usual)?;
    for pass in 1..4 {
        let sum = total(&machine)?;
        ensure!(sum == pass * SMALL & 0xff, "pass {pass}: sum {sum}");
    }
    fs::write(ksm("run"), "2")?;
    let wrong = (0..SMALL).find(|page| memory.read((page * PAGE) as usize) != 4);
    ensure!(wrong.is_none(), "page {wrong:x?} has another number");
    Ok(())
}

/// A handler of page faults for memory that is not there (userfaultfd(2)).
struct Handler(File);

impl Handler {
    /// For all of `memory`.
    fn new(memory: &Memory, size: u64) -> Result<Self> {
        const API: u64 = 0xc018_aa3f;
        const REGISTER: u64 = 0xc020_aa00;
        const MISSING: u64 = 1;
        // SAFETY: a new descriptor that nobody else has.
        let file = unsafe {
            match libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) {
                -1 => return Err(io::Error::last_os_error().into()),
                number => File::from_raw_fd(number as i32),
            }
        };
        let mut api = [0xaa_u64, 0, 0];
        machine::ioctl(file.as_raw_fd(), API, api.as_mut_ptr() as u64)?;
        let mut range = [memory.address(), size, MISSING, 0];
        machine::ioctl(file.as_raw_fd(), REGISTER, range.as_mut_ptr() as u64)?;
        Ok(Self(file))
    }

    /// Address of the next page that somebody waits for.
    fn next(&mut self) -> Result<u64> {
        let mut message = [0_u8; 32];
        io::Read::read_exact(&mut self.0, &mut message)?;
        ensure!(message[0] == 0x12, "event {:#x}", message[0]);
        Ok(u64::from_ne_bytes(message[16..24].try_into()?) & !(PAGE - 1))
    }

    /// Gives a page that consists of this byte.
    fn give(&self, address: u64, byte: u8) -> Outcome {
        const COPY: u64 = 0xc028_aa03;
        let page = [byte; PAGE as usize];
        let mut copy = [address, page.as_ptr() as u64, PAGE, 0, 0];
        machine::ioctl(self.0.as_raw_fd(), COPY, copy.as_mut_ptr() as u64)?;
        Ok(())
    }
}

/// A page that the VMM itself has to bring (as after a migration): it is asked for those pages only that the guest wants; other
/// calls go on meanwhile, and a region that is taken away meanwhile is away.
pub fn page_that_the_vmm_brings_is_waited_for() -> Outcome {
    let machine = toucher(PLACE, 4 * PAGE)?;
    let memory = small_pages(LARGE)?;
    let mut handler = Handler::new(&memory, LARGE)?;
    let all = region(&memory, 0, LARGE, PLACE, WRITABLE);
    machine.vm.map_user_memory(all)?;
    std::thread::scope(|scope| {
        let runner = scope.spawn(|| total(&machine).map_err(|error| error.to_string()));
        let brought = (0..4).try_for_each(|page| -> Outcome {
            let address = handler.next()?;
            ensure!(
                address == memory.address() + page * PAGE,
                "page {page}: asked for {address:#x}"
            );
            // The locks of the partition are free.
            let other = region(&memory, 0, PAGE, 4 * PLACE, WRITABLE);
            machine.vm.map_user_memory(other)?;
            machine.vm.unmap_user_memory(other)?;
            handler.give(address, page as u8 + 5)
        });
        if brought.is_err() {
            // Nobody waits for it any more.
            drop(handler);
            return brought;
        }
        let sum = runner.join().map_err(|_| "thread")??;
        ensure!(sum == 5 + 6 + 7 + 8, "sum {sum}");
        // What the guest waits for goes.
        memory.advise(0, LARGE as usize, libc::MADV_DONTNEED)?;
        let runner = scope.spawn(|| next_access(&machine).map_err(|error| error.to_string()));
        let address = handler.next()?;
        machine.vm.unmap_user_memory(all)?;
        handler.give(address, 9)?;
        let access = runner.join().map_err(|_| "thread")??;
        let gone = (hv_message_type_HVMSG_UNMAPPED_GPA, PLACE, 0);
        ensure!(access == gone, "access {access:x?} after the region went");
        Ok(())
    })
}

/// A VP that writes to memory which the VMM gives back all the time; never comes back.
pub fn run_in_changing_memory(started: impl FnOnce()) -> Outcome {
    let machine = toucher(PLACE, LARGE)?;
    // Without the write to the port.
    machine.memory.write(27, &[0x90; 2]);
    let memory = Memory::huge(LARGE as usize)?;
    machine
        .vm
        .map_user_memory(region(&memory, 0, LARGE, PLACE, WRITABLE))?;
    std::thread::scope(|scope| {
        scope.spawn(|| loop {
            if let Err(error) = memory.advise(0, LARGE as usize, libc::MADV_DONTNEED) {
                panic!("{error}");
            }
            std::thread::yield_now();
        });
        started();
        loop {
            match machine.vcpu.run() {
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => return Err(error.into()),
                Ok(message) => return Err(format!("message {:#x}", kind(&message)).into()),
            }
        }
    })
}

/// A VP that waits for a page that never comes.
pub fn run_without_memory(started: impl FnOnce()) -> Outcome {
    let machine = toucher(PLACE, PAGE)?;
    let memory = small_pages(LARGE)?;
    let mut handler = Handler::new(&memory, LARGE)?;
    machine
        .vm
        .map_user_memory(region(&memory, 0, LARGE, PLACE, WRITABLE))?;
    std::thread::scope(|scope| {
        scope.spawn(|| total(&machine).map_err(|error| error.to_string()));
        handler.next()?;
        started();
        loop {
            std::thread::park();
        }
    })
}
