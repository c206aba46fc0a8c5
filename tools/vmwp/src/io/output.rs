// SPDX-License-Identifier: GPL-2.0
//! The way of console bytes from VP threads to the event loop.
//!
//! A guest writes byte by byte. A VP thread only appends to a buffer; the event loop is woken by the first byte and
//! takes what has gathered a moment later.

use crate::device::lock;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

/// A VP waits when so many bytes have not been taken.
const HIGH_WATER: usize = 1 << 20;
/// How long it waits at most for space, before output is dropped.
const PATIENCE: Duration = Duration::from_secs(1);

/// Console output that is not yet delivered.
pub struct Output {
    pending: Mutex<Vec<u8>>,
    space: Condvar,
    event: EventFd,
    closed: AtomicBool,
    total: AtomicU64,
}

impl Output {
    /// An empty buffer.
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Output {
            pending: Mutex::default(),
            space: Condvar::new(),
            event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            closed: AtomicBool::new(false),
            total: AtomicU64::new(0),
        }))
    }

    /// Readable when there is something to take.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Takes everything.
    pub fn take(&self) -> Vec<u8> {
        // Nothing to read means nobody rang, which is fine.
        let _ = self.event.read();
        let bytes = std::mem::take(&mut *lock(&self.pending));
        self.space.notify_all();
        bytes
    }

    /// From now on nobody waits for space.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.space.notify_all();
    }

    /// Bytes written so far.
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }
}

/// The UART's end of an [`Output`].
pub struct ConsoleWriter(pub Arc<Output>);

impl Write for ConsoleWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let out = &self.0;
        let mut pending = lock(&out.pending);
        if pending.len() >= HIGH_WATER && !out.closed.load(Ordering::Acquire) {
            let full =
                |p: &mut Vec<u8>| p.len() >= HIGH_WATER && !out.closed.load(Ordering::Acquire);
            pending = match out.space.wait_timeout_while(pending, PATIENCE, full) {
                Ok((guard, _)) => guard,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        out.total.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        if pending.len() >= HIGH_WATER {
            return Ok(bytes.len());
        }
        let first = pending.is_empty();
        pending.extend_from_slice(bytes);
        drop(pending);
        if first {
            out.event.write(1)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_event_rings_once_for_many_bytes() {
        let out = Output::new().unwrap();
        let mut w = ConsoleWriter(out.clone());
        for b in b"abc" {
            w.write_all(&[*b]).unwrap();
        }
        assert_eq!(out.event().read().unwrap(), 1);
        assert_eq!(out.take(), b"abc");
        assert!(out.take().is_empty());
        assert_eq!(out.total(), 3);
    }

    #[test]
    fn a_writer_waits_for_space_and_goes_on() {
        let out = Output::new().unwrap();
        let mut w = ConsoleWriter(out.clone());
        w.write_all(&vec![0; HIGH_WATER]).unwrap();
        let thread = std::thread::spawn(move || w.write_all(b"x"));
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(out.take().len(), HIGH_WATER);
        thread.join().unwrap().unwrap();
        assert_eq!(out.take(), b"x");
    }

    #[test]
    fn nobody_waits_after_close() {
        let out = Output::new().unwrap();
        let mut w = ConsoleWriter(out.clone());
        w.write_all(&vec![0; HIGH_WATER]).unwrap();
        out.close();
        w.write_all(b"x").unwrap();
        assert_eq!(out.take().len(), HIGH_WATER);
    }
}
