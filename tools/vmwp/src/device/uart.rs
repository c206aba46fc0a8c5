// SPDX-License-Identifier: GPL-2.0
//! The 16550 UART behind COM1.

use super::ioapic::LineTrigger;
use std::collections::VecDeque;
use std::io::Write;
use vm_superio::serial::NoEvents;
use vm_superio::Serial;

/// Most input that is kept for a guest that does not read.
const BACKLOG: usize = 64 * 1024;

/// The UART with a backlog of input, because its FIFO is only 64 bytes long.
pub struct Uart<W: Write> {
    chip: Serial<LineTrigger, NoEvents, W>,
    backlog: VecDeque<u8>,
}

impl<W: Write> Uart<W> {
    /// A UART that writes to `console` and interrupts by `line`.
    pub fn new(line: LineTrigger, console: W) -> Self {
        Uart {
            chip: Serial::new(line, console),
            backlog: VecDeque::new(),
        }
    }

    /// Reads a register.
    pub fn read(&mut self, offset: u8) -> u8 {
        let value = self.chip.read(offset);
        self.refill();
        value
    }

    /// Writes a register. Output that cannot be written is lost, as on a cable without a listener.
    pub fn write(&mut self, offset: u8, value: u8) {
        let _lost = self.chip.write(offset, value);
        self.refill();
    }

    /// Feeds input to the guest and returns how many bytes were taken.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(BACKLOG - self.backlog.len());
        self.backlog.extend(&bytes[..taken]);
        self.refill();
        taken
    }

    /// Moves backlog into the FIFO.
    fn refill(&mut self) {
        while !self.backlog.is_empty() && self.chip.fifo_capacity() > 0 {
            let (head, _) = self.backlog.as_slices();
            match self.chip.enqueue_raw_bytes(head) {
                Ok(n) if n > 0 => drop(self.backlog.drain(..n)),
                // Loop-back mode takes no input from outside.
                _ => break,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::ioapic::Ioapic;
    use super::super::tests::Recorder;
    use super::*;
    use std::sync::{Arc, Mutex};

    fn uart() -> (Uart<Vec<u8>>, Arc<Recorder>) {
        let sink = Arc::new(Recorder::default());
        let ioapic = Arc::new(Mutex::new(Ioapic::new(sink.clone())));
        {
            let mut chip = ioapic.lock().unwrap();
            chip.write(0, 0x18);
            chip.write(0x10, 0x24);
        }
        (Uart::new(LineTrigger::new(ioapic, 4), Vec::new()), sink)
    }

    #[test]
    fn output_reaches_the_console() {
        let (mut u, _) = uart();
        for b in b"hello" {
            u.write(0, *b);
        }
        assert_eq!(u.chip.writer(), b"hello");
    }

    #[test]
    fn input_interrupts_and_is_read_in_order_beyond_the_fifo() {
        let (mut u, sink) = uart();
        u.write(1, 1);
        let text: Vec<u8> = (0..200).collect();
        assert_eq!(u.input(&text), 200);
        assert!(!sink.take().is_empty());
        let mut got = Vec::new();
        while u.read(5) & 1 != 0 {
            got.push(u.read(0));
        }
        assert_eq!(got, text);
    }

    #[test]
    fn input_beyond_the_backlog_is_refused_not_lost_silently() {
        let (mut u, _) = uart();
        let taken = u.input(&vec![0; BACKLOG * 2]);
        assert!((BACKLOG..BACKLOG * 2).contains(&taken));
    }

    #[test]
    fn loop_back_mode_keeps_input_for_later() {
        let (mut u, _) = uart();
        u.write(4, 0x10);
        u.input(b"x");
        assert_eq!(u.read(5) & 1, 0);
        u.write(4, 0);
        assert_eq!(u.read(0), b'x');
    }
}
