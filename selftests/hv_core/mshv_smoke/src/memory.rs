// SPDX-License-Identifier: GPL-2.0
//! Guest memory that the host cannot give.

use std::io;
use std::{fs, ptr};

use mshv_bindings::*;
use mshv_smoke::machine::{kind, region, set_memory, Machine, Memory};

use super::Outcome;

/// A line of `/proc/vmstat`, whose name ends with the blank.
pub fn counter(name: &str) -> Result<u64, Box<dyn std::error::Error>> {
    let text = fs::read_to_string("/proc/vmstat")?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    Ok(line.ok_or("no such counter")?.trim().parse()?)
}

/// Pages that were pinned and that were let go, by whomever.
pub fn pins() -> Result<(u64, u64), Box<dyn std::error::Error>> {
    // Else each CPU has some of the numbers.
    fs::write("/proc/sys/vm/stat_refresh", "1")?;
    Ok((
        counter("nr_foll_pin_acquired ")?,
        counter("nr_foll_pin_released ")?,
    ))
}

/// Pages that are pinned now, and those that are mapped to partitions.
pub fn pinned_and_mapped() -> Result<(u64, u64), Box<dyn std::error::Error>> {
    let (pinned, released) = pins()?;
    Ok((pinned - released, super::sum("mapped_pages")?))
}

const PAGE: usize = 4096;
const ACCESS: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Does something to a page of ours; 0 for success.
type Change = fn(*mut libc::c_void) -> i32;

/// How a hole comes into memory, and goes again.
const HOLES: [(Change, Change); 2] = [(unmap, map), (forbid, allow)];

fn unmap(page: *mut libc::c_void) -> i32 {
    // SAFETY: a page of a mapping that is accessed by copies only, and not while it is away.
    unsafe { libc::munmap(page, PAGE) }
}

fn map(page: *mut libc::c_void) -> i32 {
    let flags = libc::MAP_ANONYMOUS | libc::MAP_SHARED | libc::MAP_FIXED;
    // SAFETY: in the place of the page that was taken away.
    let at = unsafe { libc::mmap(page, PAGE, ACCESS, flags, -1, 0) };
    if at == page {
        0
    } else {
        -1
    }
}

fn forbid(page: *mut libc::c_void) -> i32 {
    // SAFETY: as for `unmap`.
    unsafe { libc::mprotect(page, PAGE, libc::PROT_NONE) }
}

fn allow(page: *mut libc::c_void) -> i32 {
    // SAFETY: a page that stayed there.
    unsafe { libc::mprotect(page, PAGE, ACCESS) }
}

/// A region may be mapped that has a hole in the VMM. The guest gets all around it; at the hole the VMM hears that it is
/// memory, and the guest goes on when it is there.
pub fn hole_in_a_region_is_the_vmms_to_fill() -> Outcome {
    #[rustfmt::skip]
    let code = [
        0xb8, 0x00, 0x10, // mov $0x1000, %ax
        0x8e, 0xd8,       // mov %ax, %ds
        0xfe, 0x06, 0x00, 0x70, // incb 0x7000      behind the hole
        0xfe, 0x06, 0x00, 0x10, // incb 0x1000      before it
        0xfe, 0x06, 0x00, 0x40, // 0x100d: incb 0x4000      the hole
        0xfe, 0x06, 0x00, 0x50, // incb 0x5000      behind it
        0xe6, 0x10,       // out %al, $0x10
    ];
    for (number, (make, fill)) in HOLES.into_iter().enumerate() {
        let machine = Machine::new(&code)?;
        let memory = Memory::new(8 * PAGE)?;
        let page =
            ptr::without_provenance_mut::<libc::c_void>(memory.address() as usize + 4 * PAGE);
        let checked = |result: i32| match result {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        };
        checked(make(page))?;
        let attempt = |flags| {
            let bytes = 8 * PAGE as u64;
            set_memory(&machine.vm, region(0x10, memory.address(), bytes, flags))
        };
        let before = pinned_and_mapped()?;
        ensure!(attempt(3) == 0, "hole {number}: map");
        let untouched = pinned_and_mapped()?;
        ensure!(untouched == before, "{before:?}, mapped {untouched:?}");
        let message = machine.next_message()?;
        ensure!(
            kind(&message) == hv_message_type_HVMSG_GPA_INTERCEPT,
            "hole {number}: message {:#x}",
            kind(&message)
        );
        let info = message.to_memory_info()?;
        let (gpa, rip) = (info.guest_physical_address, info.header.rip);
        ensure!(
            (gpa, rip) == (0x1_4000, 0x100d),
            "hole {number}: GPA {gpa:#x} at {rip:#x}"
        );
        ensure!(
            [0x7000, 0x1000].map(|at| memory.read(at)) == [1, 1],
            "hole {number}: the guest does not reach what is around it"
        );
        let around = pinned_and_mapped()?;
        ensure!(
            around.0 == before.0 && around.1 > before.1,
            "hole {number}: {before:?}, touched {around:?}"
        );
        checked(fill(page))?;
        ensure!(machine.next_port_write()?.0 == 0x10, "port");
        ensure!(
            [0x4000, 0x5000].map(|at| memory.read(at)) == [1, 1],
            "hole {number}: the guest does not reach the page that came"
        );
        // It is all gone, so that it can come again.
        let again = [4, 3, 4].map(attempt);
        ensure!(again == [0; 3], "hole {number}: errno {again:?}");
        drop(machine);
        let after = pinned_and_mapped()?;
        ensure!(after == before, "hole {number}: {before:?}, then {after:?}");
    }
    Ok(())
}
