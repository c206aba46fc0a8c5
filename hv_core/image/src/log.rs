// SPDX-License-Identifier: GPL-2.0
//! Writing lines into the log ring that the root reads.

use core::fmt::{self, Write};
use core::sync::atomic::Ordering;

use hv_abi::log::{LogRing, LOG_BYTES};

/// Longest line; the rest of a longer one is cut.
const LINE: usize = 256;

/// A line under construction: it goes to the ring in one piece, so that lines of two CPUs do not mix.
struct Line {
    bytes: [u8; LINE],
    used: usize,
}

impl Write for Line {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        for (to, from) in self.bytes.iter_mut().skip(self.used).zip(s.bytes()) {
            *to = from;
            self.used += 1;
        }
        Ok(())
    }
}

/// Appends `arguments` and a newline to `ring`.
pub fn write(ring: &LogRing, arguments: fmt::Arguments<'_>) {
    let mut line = Line {
        bytes: [0; LINE],
        used: 0,
    };
    // A `Line` never fails, and a formatting trait that does only shortens the line.
    let _ = line.write_fmt(arguments);
    let used = line.used.min(LINE - 1);
    if let Some(end) = line.bytes.get_mut(used) {
        *end = b'\n';
    }
    let text = line.bytes.get(..=used).unwrap_or(&[]);
    let start = ring.head.fetch_add(text.len() as u64, Ordering::AcqRel);
    for (position, byte) in (start..).zip(text) {
        if let Some(slot) = ring.text.get((position % LOG_BYTES as u64) as usize) {
            slot.store(*byte, Ordering::Release);
        }
    }
}

/// The ring at its address in the image.
#[cfg(target_os = "none")]
pub fn ring() -> &'static LogRing {
    // SAFETY: the loader maps the ring's pages there, read and write, for as long as the image runs; all
    // fields are atomics.
    unsafe { &*(hv_abi::layout::SHARED_BASE as *const LogRing) }
}

/// Writes a formatted line to the log ring.
#[cfg(target_os = "none")]
#[macro_export]
macro_rules! log {
    ($($argument:tt)*) => { $crate::log::write($crate::log::ring(), format_args!($($argument)*)) };
}

/// Writes a formatted line to standard error (host tests).
#[cfg(not(target_os = "none"))]
#[macro_export]
macro_rules! log {
    ($($argument:tt)*) => { $crate::log::discard(format_args!($($argument)*)) };
}

/// Stands in for the ring where there is none.
#[cfg(not(target_os = "none"))]
pub fn discard(_: fmt::Arguments<'_>) {}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring() -> Box<LogRing> {
        // SAFETY: all-zero is a valid `LogRing`: it holds integers and atomics only.
        unsafe { Box::new(core::mem::zeroed()) }
    }

    fn text(ring: &LogRing) -> String {
        let head = ring.head.load(Ordering::Relaxed);
        (head.saturating_sub(LOG_BYTES as u64)..head)
            .map(|i| ring.text[(i % LOG_BYTES as u64) as usize].load(Ordering::Relaxed) as char)
            .collect()
    }

    #[test]
    fn lines_follow_each_other() {
        let r = ring();
        write(&r, format_args!("one {}", 1));
        write(&r, format_args!("two"));
        assert_eq!(text(&r), "one 1\ntwo\n");
    }

    #[test]
    fn long_line_is_cut_and_still_ends() {
        let r = ring();
        write(&r, format_args!("{}", "x".repeat(1000)));
        assert_eq!(text(&r).len(), LINE);
        assert!(text(&r).ends_with("x\n"));
    }

    #[test]
    fn old_bytes_give_way_to_new_ones() {
        let r = ring();
        for i in 0..5000 {
            write(&r, format_args!("line {i}"));
        }
        assert!(text(&r).ends_with("line 4998\nline 4999\n"));
    }
}
