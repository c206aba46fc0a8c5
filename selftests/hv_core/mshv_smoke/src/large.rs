// SPDX-License-Identifier: GPL-2.0
//! Guest memory in pages of 2 MiB: what `/dev/mshv` makes of huge pages, and what the hypercalls of the root's kernel do with
//! parts of large pages.

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use mshv_bindings::*;
use mshv_smoke::machine::{self, kind, Machine, Memory};

use super::{sum, Outcome};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

pub const PAGE: u64 = 0x1000;
pub const LARGE: u64 = 0x20_0000;
/// Pages of a large one.
pub const SMALL: u64 = LARGE / PAGE;
/// Where a guest has the memory under test, beyond its code.
pub const PLACE: u64 = LARGE;
/// Flags of a region.
pub const WRITABLE: u8 = 1;

/// Adds up the first byte of each page of `size` bytes at DS:0 and increments it; writes the sum to port 0x10, and starts again.
#[rustfmt::skip]
pub fn code(size: u64) -> Vec<u8> {
    let [a, b, c, d] = (size as u32).to_le_bytes();
    vec![
        0x66, 0x31, 0xdb,                   // xor %ebx, %ebx
        0x30, 0xc0,                         // xor %al, %al
        0x67, 0x02, 0x03,                   // 1: add (%ebx), %al
        0x67, 0xfe, 0x03,                   // incb (%ebx)
        0x66, 0x81, 0xc3, 0x00, 0x10, 0, 0, // add $0x1000, %ebx
        0x66, 0x81, 0xfb, a, b, c, d,       // cmp $size, %ebx
        0x75, 0xea,                         // jne 1b
        0xe6, 0x10,                         // out %al, $0x10
        0xeb, 0xe1,                         // jmp to the start
    ]
}

/// Length of each of its instructions that touch memory.
const TOUCH_BYTES: u64 = 3;

/// Lets DS begin at `base` and reach 4 GiB.
pub fn look_at(vcpu: &mshv_ioctls::VcpuFd, base: u64) -> Outcome {
    let mut data = [hv_register_assoc {
        name: hv_register_name_HV_X64_REGISTER_DS,
        ..Default::default()
    }];
    vcpu.get_reg(&mut data)?;
    // SAFETY: the register is a segment.
    let mut segment = unsafe { data[0].value.segment };
    segment.base = base;
    segment.limit = u32::MAX;
    // SAFETY: the union is 16 bits in both forms. Bit 15 is G: the limit counts pages.
    segment.__bindgen_anon_1.attributes = unsafe { segment.__bindgen_anon_1.attributes } | 1 << 15;
    data[0].value.segment = segment;
    Ok(vcpu.set_reg(&data)?)
}

/// A guest that touches `size` bytes at `base`, where nothing is yet.
pub fn toucher(base: u64, size: u64) -> Result<Machine> {
    let machine = Machine::new(&code(size))?;
    look_at(&machine.vcpu, base)?;
    Ok(machine)
}

/// Touches each page, and steps over accesses that end in a message: the addresses of these, each counted from `base` in
/// pages. Then the sum.
#[allow(non_upper_case_globals)] // The names are the bindings'.
fn touch(machine: &Machine, base: u64) -> Result<(Vec<u64>, u64)> {
    let mut faults = Vec::new();
    loop {
        let message = machine.next_message()?;
        let rip = match kind(&message) {
            hv_message_type_HVMSG_UNMAPPED_GPA | hv_message_type_HVMSG_GPA_INTERCEPT => {
                let info = message.to_memory_info()?;
                faults.push((info.guest_physical_address - base) / PAGE);
                info.header.rip + TOUCH_BYTES
            }
            hv_message_type_HVMSG_X64_IO_PORT_INTERCEPT => {
                let info = message.to_ioport_info()?;
                let rip = info.header.rip + u64::from(info.header.instruction_length());
                machine.set(&[(hv_register_name_HV_X64_REGISTER_RIP, rip)])?;
                return Ok((faults, info.rax & 0xff));
            }
            other => return Err(format!("message {other:#x}").into()),
        };
        machine.set(&[(hv_register_name_HV_X64_REGISTER_RIP, rip)])?;
    }
}

/// Both accesses to a page.
fn twice(pages: impl IntoIterator<Item = u64>) -> Vec<u64> {
    pages.into_iter().flat_map(|page| [page, page]).collect()
}

/// Page `n` begins with the byte `n`.
pub fn number(memory: &Memory, pages: u64) {
    for page in 0..pages {
        memory.write((page * PAGE) as usize, &[page as u8]);
    }
}

pub fn region(
    memory: &Memory,
    offset: u64,
    size: u64,
    gpa: u64,
    flags: u8,
) -> mshv_user_mem_region {
    mshv_user_mem_region {
        size,
        guest_pfn: gpa / PAGE,
        userspace_addr: memory.address() + offset,
        flags,
        ..Default::default()
    }
}

/// Whether a guest may execute large pages on this processor.
fn large_code_is_safe() -> Result<bool> {
    let text = fs::read_to_string("/sys/devices/system/cpu/vulnerabilities/itlb_multihit")?;
    Ok(text.trim() == "Not affected")
}

pub fn huge_memory_is_mapped_by_large_pages() -> Outcome {
    const SIZE: u64 = 2 * LARGE;
    const EXECUTABLE: u8 = 2;
    let machine = toucher(PLACE, SIZE)?;
    let rest = sum("large_pages")?;
    let safe = large_code_is_safe()?;
    for (flags, expected) in [
        (WRITABLE, 2),
        (WRITABLE | EXECUTABLE, if safe { 2 } else { 0 }),
    ] {
        let memory = Memory::huge(SIZE as usize)?;
        number(&memory, SIZE / PAGE);
        let all = region(&memory, 0, SIZE, PLACE, flags);
        machine.vm.map_user_memory(all)?;
        let before = sum("mapped_pages")?;
        let (faults, total) = touch(&machine, PLACE)?;
        ensure!(faults.is_empty(), "faults at {faults:x?}");
        let numbers: u64 = (0..SIZE / PAGE).sum();
        ensure!(total == numbers & 0xff, "it read other bytes: {total:#x}");
        let (large, mapped) = (sum("large_pages")? - rest, sum("mapped_pages")? - before);
        ensure!(large == expected, "{large} large pages, flags {flags}");
        // The code's own pages come when it starts.
        ensure!((1024..=1034).contains(&mapped), "{mapped} pages");
        for page in 0..SIZE / PAGE {
            let byte = memory.read((page * PAGE) as usize);
            ensure!(byte == (page + 1) as u8, "page {page:#x} has {byte:#x}");
        }
        machine.vm.unmap_user_memory(all)?;
        ensure!(sum("large_pages")? == rest, "large pages stay");
        let message = machine.next_message()?;
        ensure!(
            kind(&message) == hv_message_type_HVMSG_UNMAPPED_GPA,
            "it still reads"
        );
        let rip = message.to_memory_info()?.header.rip;
        machine.set(&[(hv_register_name_HV_X64_REGISTER_RIP, rip)])?;
    }
    Ok(())
}

/// A page in the middle of a huge one, the first page of another, and a whole one that is elsewhere in the guest.
pub fn holes_and_odd_places_in_huge_memory_are_exact() -> Outcome {
    const SIZE: u64 = 4 * LARGE;
    const HOLE: u64 = 77 * PAGE;
    let machine = toucher(PLACE, SIZE)?;
    let memory = Memory::huge(SIZE as usize)?;
    number(&memory, SIZE / PAGE);
    let rest = sum("large_pages")?;
    let map = |offset, size, gpa| {
        machine
            .vm
            .map_user_memory(region(&memory, offset, size, gpa, WRITABLE))
    };
    map(0, HOLE, PLACE)?;
    map(HOLE + PAGE, LARGE - HOLE - PAGE, PLACE + HOLE + PAGE)?;
    // From its second page to the last of the next one.
    map(LARGE + PAGE, 2 * LARGE - PAGE, PLACE + LARGE + PAGE)?;
    // The memory of the page before: pages that are in a row, but one page too late.
    map(3 * LARGE - PAGE, LARGE, PLACE + 3 * LARGE)?;
    let (faults, _) = touch(&machine, PLACE)?;
    ensure!(
        faults == twice([HOLE / PAGE, SMALL]),
        "faults at {faults:x?}"
    );
    let large = sum("large_pages")? - rest;
    ensure!(large == 1, "{large} large pages");
    for page in 0..SIZE / PAGE {
        let expected = match page {
            77 | SMALL => page,
            // Two pages of the guest.
            _ if page == 3 * SMALL - 1 => page + 2,
            // Its end is in none.
            _ if page == 4 * SMALL - 1 => page,
            _ => page + 1,
        };
        let byte = memory.read((page * PAGE) as usize);
        ensure!(byte == expected as u8, "page {page:#x} has {byte:#x}");
    }
    Ok(())
}

pub fn read_only_huge_memory_exits_at_each_write() -> Outcome {
    const SIZE: u64 = 2 * LARGE;
    let machine = toucher(PLACE, SIZE)?;
    let memory = Memory::huge(SIZE as usize)?;
    number(&memory, SIZE / PAGE);
    let rest = sum("large_pages")?;
    for (place, flags) in [(0, WRITABLE), (LARGE, 0)] {
        let half = region(&memory, place, LARGE, PLACE + place, flags);
        machine.vm.map_user_memory(half)?;
    }
    let (faults, total) = touch(&machine, PLACE)?;
    ensure!(
        faults == (SMALL..2 * SMALL).collect::<Vec<_>>(),
        "faults at {faults:x?}"
    );
    let numbers: u64 = (0..SIZE / PAGE).sum();
    ensure!(total == numbers & 0xff, "it read other bytes: {total:#x}");
    let large = sum("large_pages")? - rest;
    ensure!(large == 2, "{large} large pages");
    for page in 0..SIZE / PAGE {
        let expected = page + u64::from(page < SMALL);
        let byte = memory.read((page * PAGE) as usize);
        ensure!(byte == expected as u8, "page {page:#x} has {byte:#x}");
    }
    Ok(())
}

/// Two VPs write to all of a large page, over and over. What is taken away is not written to any more.
pub fn huge_memory_changes_beneath_running_vps() -> Outcome {
    let machine = toucher(PLACE, LARGE)?;
    // Without the write to the port: nothing but the end of their time makes them exit.
    machine.memory.write(27, &[0x90; 2]);
    let second = machine.vm.create_vcpu(1)?;
    machine::prepare(&second)?;
    look_at(&second, PLACE)?;
    // Without INIT and SIPI.
    second.set_reg(&[hv_register_assoc {
        name: hv_register_name_HV_REGISTER_INTERNAL_ACTIVITY_STATE,
        ..Default::default()
    }])?;
    let memory = Memory::huge(LARGE as usize)?;
    number(&memory, SMALL);
    let rest = sum("large_pages")?;
    let done = AtomicBool::new(false);
    // What each VP could not write to.
    let misses = [const { AtomicU64::new(0) }; 2];
    // What ends a run is tried again: the page may be back.
    let keep_running =
        |vcpu: &mshv_ioctls::VcpuFd, misses: &AtomicU64| -> std::result::Result<(), String> {
            while !done.load(Ordering::Acquire) {
                match vcpu.run() {
                    Ok(message) if kind(&message) == hv_message_type_HVMSG_UNMAPPED_GPA => {
                        misses.fetch_add(1, Ordering::AcqRel);
                    }
                    Err(error) if error.errno() == libc::EINTR => {}
                    Ok(message) => return Err(format!("message {:#x}", kind(&message))),
                    Err(error) => return Err(error.to_string()),
                }
            }
            Ok(())
        };
    let all = region(&memory, 0, LARGE, PLACE, WRITABLE);
    let last = ((SMALL - 1) * PAGE) as usize;
    std::thread::scope(|scope| {
        let [of_first, of_second] = &misses;
        let runners = [(&machine.vcpu, of_first), (&second, of_second)]
            .map(|(vcpu, misses)| scope.spawn(move || keep_running(vcpu, misses)));
        let outcome = (|| -> Outcome {
            for turn in 0..20 {
                memory.write(last, &[0]);
                machine.vm.map_user_memory(all)?;
                while memory.read(last) == 0 {
                    ensure!(!runners.iter().any(|r| r.is_finished()), "a VP stopped");
                    std::thread::yield_now();
                }
                let again = machine.vm.map_user_memory(all).map_err(|e| e.errno());
                ensure!(again == Err(libc::EEXIST), "turn {turn}: map twice");
                // The guest may be faster than who counts.
                while sum("large_pages")? == rest {
                    ensure!(!runners.iter().any(|r| r.is_finished()), "a VP stopped");
                    std::thread::yield_now();
                }
                let large = sum("large_pages")? - rest;
                ensure!(large == 1, "turn {turn}: {large} large pages");
                machine.vm.unmap_user_memory(all)?;
                (0..SMALL).for_each(|page| memory.write((page * PAGE) as usize, &[0]));
                // Until then a VP may not have run at all.
                for misses in &misses {
                    let before = misses.load(Ordering::Acquire);
                    while misses.load(Ordering::Acquire) == before {
                        ensure!(!runners.iter().any(|r| r.is_finished()), "a VP stopped");
                        std::thread::yield_now();
                    }
                }
                let written = (0..SMALL).find(|page| memory.read((page * PAGE) as usize) != 0);
                ensure!(
                    written.is_none(),
                    "turn {turn}: page {written:x?} was written to after it was taken away"
                );
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

/// Codes and flags of the hypercalls.
const MAP: u64 = 0x4b;
const UNMAP: u64 = 0x4c;
const READ: u64 = 1;
const READ_WRITE: u64 = 3;
const LARGE_PAGE: u64 = 0x8000_0000;
const UNMAP_LARGE_PAGE: u64 = 2;
/// Statuses.
const INVALID_ALIGNMENT: u64 = 4;
const INVALID_PARAMETER: u64 = 5;
const ACCESS_DENIED: u64 = 6;
const INSUFFICIENT_MEMORY: u64 = 0xb;

/// A guest and a huge page that the root has pinned. The hypercalls go past the root: of what they map it knows nothing, so
/// whatever the guest cannot reach ends in a message.
struct Bare {
    machine: Machine,
    memory: Memory,
    /// Page number of the huge page.
    spa: u64,
    partition: u64,
}

/// Where hypercalls map it.
const BARE: u64 = 4 * LARGE;

impl Bare {
    fn new() -> Result<Self> {
        let machine = toucher(PLACE, LARGE)?;
        let memory = Memory::huge(LARGE as usize)?;
        number(&memory, SMALL);
        let pinned = region(&memory, 0, LARGE, PLACE, WRITABLE);
        machine.vm.map_user_memory(pinned)?;
        let (faults, _) = touch(&machine, PLACE)?;
        ensure!(faults.is_empty(), "faults at {faults:x?}");
        // Bits 54:0 of an entry are the page number.
        let mut entry = [0; 8];
        let at = memory.address() / PAGE * 8;
        fs::File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, at)?;
        let spa = u64::from_le_bytes(entry) & ((1 << 55) - 1);
        ensure!(spa != 0 && spa % SMALL == 0, "no huge page: {spa:#x}");
        let partition = machine::only_partition()?;
        look_at(&machine.vcpu, BARE)?;
        Ok(Self {
            machine,
            memory,
            spa,
            partition,
        })
    }

    /// Status and repetitions done of a hypercall.
    fn call(&self, code: u64, reps: u64, start: u64, words: &[u64]) -> Result<(u64, u64)> {
        let control = code | reps << 32 | start << 48;
        machine::hypercall(control, &[&[self.partition], words].concat())
    }

    /// Status of mapping one page.
    fn map(&self, gpa: u64, flags: u64, spa: u64) -> Result<u64> {
        Ok(self.call(MAP, 1, 0, &[gpa / PAGE, flags, spa])?.0)
    }

    /// Status of unmapping one page.
    fn unmap(&self, gpa: u64, flags: u64) -> Result<u64> {
        Ok(self.call(UNMAP, 1, 0, &[gpa / PAGE, flags])?.0)
    }

    /// The guest faults exactly at these pages of the 2 MiB that it looks at, counted in pages from `base`.
    fn faults_are(&self, base: u64, expected: &[u64], when: &str) -> Outcome {
        let (faults, _) = touch(&self.machine, base)?;
        ensure!(faults == expected, "{when}: faults at {faults:x?}");
        Ok(())
    }
}

/// Large pages that are misaligned, beyond the end, or not the root's.
pub fn wrong_large_pages() -> Outcome {
    let bare = Bare::new()?;
    let (gfn, spa) = (BARE / PAGE, bare.spa);
    // The last large page whose address is a number of 64 bits.
    let top = (1 << 52) - SMALL;
    let none = u64::MAX & !(SMALL - 1);
    let status = fs::read_to_string("/sys/kernel/debug/hv_core/status")?;
    let base = status.split("\"base\":\"0x").nth(1).unwrap_or("");
    let base = u64::from_str_radix(base.split('"').next().unwrap_or(""), 16)?;
    let image = base / LARGE * SMALL;
    let cases = [
        (gfn + 1, READ_WRITE, spa, INVALID_ALIGNMENT),
        (gfn + SMALL / 2, READ_WRITE, spa, INVALID_ALIGNMENT),
        (gfn, READ_WRITE, spa + 1, INVALID_ALIGNMENT),
        (1 << 40, READ_WRITE, spa, INVALID_PARAMETER),
        (top, READ_WRITE, spa, INVALID_PARAMETER),
        (none, READ_WRITE, spa, INVALID_PARAMETER),
        (gfn, READ_WRITE, none, INVALID_PARAMETER),
        (gfn, READ_WRITE, top, ACCESS_DENIED),
        (gfn, 0, spa, INVALID_PARAMETER),
        (gfn, 2, spa, INVALID_PARAMETER),
        (gfn, READ_WRITE, image, ACCESS_DENIED),
        (gfn, READ, image, ACCESS_DENIED),
    ];
    for (gfn, flags, spa, expected) in cases {
        let words = [gfn, flags | LARGE_PAGE, spa];
        let got = bare.call(MAP, 1, 0, &words)?;
        ensure!(got == (expected, 0), "map {words:x?}: {got:x?}");
    }
    for (gfn, expected) in [
        (gfn + 1, INVALID_ALIGNMENT),
        (1 << 46, INVALID_PARAMETER),
        (none, INVALID_PARAMETER),
    ] {
        let got = bare.call(UNMAP, 1, 0, &[gfn, UNMAP_LARGE_PAGE])?;
        ensure!(got == (expected, 0), "unmap {gfn:x}: {got:x?}");
    }
    // The first of a list is mapped, the second is refused.
    let words = [gfn, READ_WRITE | LARGE_PAGE, spa, image];
    let got = bare.call(MAP, 2, 0, &words)?;
    ensure!(got == (ACCESS_DENIED, 1), "list: {got:x?}");
    bare.faults_are(BARE, &[], "after the list")?;
    look_at(&bare.machine.vcpu, BARE + LARGE)?;
    bare.faults_are(BARE + LARGE, &twice(0..SMALL), "behind the list")
}

/// A large page loses, gets back and changes single pages, and as a whole.
pub fn parts_of_large_pages() -> Outcome {
    let bare = Bare::new()?;
    let (hole, moved, read_only) = (77, 10, 300);
    let at = |page: u64| BARE + page * PAGE;
    let step = |status: u64, what: &str| -> Outcome {
        ensure!(status == 0, "{what}: status {status:#x}");
        Ok(())
    };
    let large = |flags: u64| bare.map(BARE, flags | LARGE_PAGE, bare.spa);
    step(large(READ_WRITE)?, "map")?;
    bare.faults_are(BARE, &[], "large page")?;
    step(bare.unmap(at(hole), 0)?, "unmap a page")?;
    bare.faults_are(BARE, &twice([hole]), "hole")?;
    step(bare.map(at(read_only), READ, bare.spa + read_only)?, "less")?;
    step(bare.map(at(moved), READ_WRITE, bare.spa + 20)?, "move")?;
    bare.faults_are(BARE, &[hole, hole, read_only], "small pages")?;
    // Three times by the root's region and the large page, then not in holes, and twice where two pages meet.
    for (page, turns) in [(hole, 2), (moved, 3), (read_only, 3), (20, 5), (511, 4)] {
        let byte = bare.memory.read((page * PAGE) as usize);
        ensure!(byte == (page + turns) as u8, "page {page} has {byte:#x}");
    }
    step(large(READ)?, "map over small pages")?;
    let all: Vec<_> = (0..SMALL).collect();
    bare.faults_are(BARE, &all, "read-only large page")?;
    step(large(READ_WRITE)?, "more")?;
    bare.faults_are(BARE, &[], "large page again")?;
    step(bare.unmap(at(511), 0)?, "unmap the last page")?;
    step(bare.unmap(BARE, UNMAP_LARGE_PAGE)?, "unmap the pieces")?;
    bare.faults_are(BARE, &twice(0..SMALL), "nothing")?;
    // Each turn takes a table and gives it back, and the deposit is finite.
    for turn in 0..500 {
        step(large(READ_WRITE)?, &format!("map {turn}"))?;
        step(bare.unmap(at(hole), 0)?, &format!("split {turn}"))?;
    }
    bare.faults_are(BARE, &twice([hole]), "hole in the end")
}

/// Splits run out of tables. What failed did nothing, and goes on once the root has deposited more.
pub fn short_of_tables() -> Outcome {
    const MANY: u64 = 0x4000_0000;
    let bare = Bare::new()?;
    let deposited = sum("deposited_pages")?;
    let place = |index: u64| MANY + index * LARGE;
    // Fewer than a table of them.
    let split = |index| -> Result<u64> {
        let status = bare.map(place(index), READ_WRITE | LARGE_PAGE, bare.spa)?;
        ensure!(status == 0, "map {index}: status {status:#x}");
        bare.unmap(place(index) + PAGE, 0)
    };
    let mut last = 0;
    loop {
        match split(last)? {
            0 => last += 1,
            INSUFFICIENT_MEMORY => break,
            status => return Err(format!("split {last}: status {status:#x}").into()),
        }
        ensure!(last < 200, "the deposit does not end");
    }
    ensure!(last > 0, "no table");
    let (whole, before) = (place(last), place(last - 1));
    // The last page of the one before needs no table, the first of the next one does.
    let list = [(whole - PAGE) / PAGE, 0];
    let got = bare.call(UNMAP, 2, 0, &list)?;
    ensure!(got == (INSUFFICIENT_MEMORY, 1), "list: {got:x?}");
    let status = bare.map(whole + 5 * PAGE, READ, bare.spa)?;
    ensure!(status == INSUFFICIENT_MEMORY, "less: {status:#x}");
    look_at(&bare.machine.vcpu, whole)?;
    bare.faults_are(whole, &[], "not split")?;
    look_at(&bare.machine.vcpu, before)?;
    bare.faults_are(before, &twice([1, SMALL - 1]), "the one before")?;
    // A region elsewhere needs a table: the root deposits.
    const ELSEWHERE: u64 = 2 * MANY;
    let more = region(&bare.memory, 0, LARGE, ELSEWHERE, WRITABLE);
    bare.machine.vm.map_user_memory(more)?;
    look_at(&bare.machine.vcpu, ELSEWHERE)?;
    bare.faults_are(ELSEWHERE, &[], "elsewhere")?;
    ensure!(sum("deposited_pages")? > deposited, "nothing deposited");
    let got = bare.call(UNMAP, 2, 1, &list)?;
    ensure!(got == (0, 2), "list, continued: {got:x?}");
    look_at(&bare.machine.vcpu, whole)?;
    bare.faults_are(whole, &twice([0]), "split")
}
