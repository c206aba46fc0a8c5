// SPDX-License-Identifier: GPL-2.0
//! The memory that the kernel is given: at a fixed place, so that a wrong pointer near it hits nothing of this
//! program, and changed through system calls only, so that a page that is not there is an error and not a signal.

use crate::random::Random;

const PAGE: u64 = 4096;
/// Where it is: one bit, so that no pointer into it with a bit flipped is near program, heap or stacks.
const BASE: u64 = 1 << 44;
/// Pages for arguments and what they point to.
const ARGUMENTS: u64 = 64;
/// Where guest memory begins, and its pages.
const RAM: u64 = BASE + (1 << 30);
const RAM_PAGES: u64 = 2048;
/// Where pages of VPs are mapped, and how many.
const WINDOWS: u64 = BASE + (2 << 30);
const WINDOW_PAGES: u64 = 16;

/// Guest memory's first address and its size.
pub fn ram() -> (u64, u64) {
    (RAM, RAM_PAGES * PAGE)
}

/// An address for a page of a VP.
pub fn window(random: &mut Random) -> u64 {
    WINDOWS + random.below(WINDOW_PAGES) * PAGE
}

/// Maps fresh memory; what was there goes away.
pub fn map(address: u64, size: u64, flags: i32, file: i32) {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = flags | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: the range belongs to the arena, which no reference points into.
    unsafe { libc::mmap(address as *mut _, size as usize, access, flags, file, 0) };
}

/// Maps all: a third of guest memory shared, a third private, a third from `file`.
pub fn make(file: i32) {
    const ANONYMOUS: i32 = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE;
    map(BASE, ARGUMENTS * PAGE, ANONYMOUS, -1);
    let third = RAM_PAGES / 3 * PAGE;
    map(RAM, third, libc::MAP_ANONYMOUS | libc::MAP_SHARED, -1);
    map(RAM + third, RAM_PAGES * PAGE - third, ANONYMOUS, -1);
    // SAFETY: a file of ours.
    unsafe { libc::ftruncate(file, third as i64) };
    map(RAM + 2 * third, third, libc::MAP_SHARED, file);
    map(WINDOWS, WINDOW_PAGES * PAGE, ANONYMOUS, -1);
}

/// Writes, if memory is there and may be written.
pub fn write(address: u64, bytes: &[u8]) {
    let from = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    let to = libc::iovec {
        iov_base: address as *mut _,
        iov_len: bytes.len(),
    };
    // SAFETY: the kernel checks the addresses, and the arena is nobody's object.
    unsafe { libc::process_vm_writev(libc::getpid(), &from, 1, &to, 1, 0) };
}

/// A place for `length` bytes (at most a page) that thread `own` alone uses, or another thread too, or at the end of
/// memory, or that is no place.
pub fn place(random: &mut Random, own: u64, length: u64) -> u64 {
    let length = length.min(PAGE);
    match random.below(24) {
        0 => random.of(&[
            0,
            1,
            BASE - PAGE,
            BASE + ARGUMENTS * PAGE,
            u64::MAX,
            u64::MAX << 47,
            1 << 47,
            (1 << 47) - PAGE,
        ]),
        // Cut short by the end of the arguments.
        1 => BASE + ARGUMENTS * PAGE - random.below(length + 1),
        2 => RAM + random.below(RAM_PAGES) * PAGE,
        3 => window(random),
        // Seen by all threads.
        4..8 => BASE + random.below(8) * PAGE,
        _ => BASE + (8 + (own % 8) * 6 + random.below(6)) * PAGE,
    }
}

/// Changes what is mapped, or overwrites arguments that somebody may be using.
pub fn disturb(random: &mut Random, file: i32) {
    let first = random.below(RAM_PAGES);
    let pages = (1 + random.below(64)).min(RAM_PAGES - first);
    let (address, size) = match random.below(4) {
        0 => (BASE + random.below(ARGUMENTS - 1) * PAGE, PAGE),
        _ => (RAM + first * PAGE, pages * PAGE),
    };
    let (pointer, length) = (address as *mut libc::c_void, size as usize);
    // SAFETY (of all blocks here): the range belongs to the arena, which no reference points into.
    match random.below(10) {
        0 => {
            // SAFETY: as above.
            unsafe { libc::munmap(pointer, length) };
        }
        1 => {
            let access = random.below(8) as i32;
            // SAFETY: as above.
            unsafe { libc::mprotect(pointer, length, access) };
        }
        2 => {
            let advice = random.of(&[
                libc::MADV_DONTNEED,
                libc::MADV_REMOVE,
                libc::MADV_HUGEPAGE,
                libc::MADV_NOHUGEPAGE,
                libc::MADV_DONTFORK,
                libc::MADV_DOFORK,
                libc::MADV_PAGEOUT,
                libc::MADV_COLLAPSE,
            ]);
            // SAFETY: as above.
            unsafe { libc::madvise(pointer, length, advice) };
        }
        3 => {
            let length = random.below(RAM_PAGES / 3 * PAGE * 2);
            // SAFETY: a file of ours.
            unsafe { libc::ftruncate(file, length as i64) };
        }
        4..7 => {
            let kind = random.of(&[libc::MAP_PRIVATE, libc::MAP_SHARED]);
            map(address, size, libc::MAP_ANONYMOUS | kind, -1);
        }
        _ => {
            let at = BASE + random.below(8 * PAGE);
            write(at, &random.value().to_le_bytes());
        }
    }
}
