// SPDX-License-Identifier: GPL-2.0
//! Terminals: raw mode that is always undone, pseudo terminals, and the escape key.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use vmm_sys_util::terminal::Terminal;

/// Ctrl-A, as in other machine emulators.
pub const ESCAPE: u8 = 0x01;

/// Standard input in raw mode for as long as this lives.
pub struct RawMode(());

impl RawMode {
    /// Switches standard input to raw mode if it is a terminal.
    pub fn stdin() -> Option<Self> {
        let stdin = io::stdin();
        // SAFETY: asks only what kind of file descriptor 0 is.
        let terminal = unsafe { libc::isatty(stdin.as_raw_fd()) } == 1;
        (terminal && stdin.lock().set_raw_mode().is_ok()).then_some(RawMode(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // There is nobody left to tell.
        let _ = io::stdin().lock().set_canon_mode();
    }
}

/// A new pseudo terminal.
pub struct Pty {
    /// The side of this process; it never blocks.
    pub main: File,
    /// Path of the other side.
    pub path: String,
    /// The other side, held open: without it every look at `main` reports a hang-up while nobody else has it open.
    _other: File,
}

impl Pty {
    /// Makes one, in raw mode.
    pub fn open() -> io::Result<Self> {
        // SAFETY: plain system call; the result is checked and owned below.
        let fd = unsafe {
            libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC | libc::O_NONBLOCK)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` is open and nobody else owns it.
        let main = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        // SAFETY: `fd` is a pseudo terminal.
        if unsafe { libc::grantpt(fd) } != 0 || unsafe { libc::unlockpt(fd) } != 0 {
            return Err(io::Error::last_os_error());
        }
        raw(fd)?;
        let mut name = [0u8; 64];
        // SAFETY: the buffer is writable in its whole length.
        if unsafe { libc::ptsname_r(fd, name.as_mut_ptr().cast(), name.len()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
        let path = String::from_utf8_lossy(&name[..end]).into_owned();
        let other = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY | libc::O_CLOEXEC)
            .open(&path)?;
        Ok(Pty {
            main,
            path,
            _other: other,
        })
    }
}

impl Write for Pty {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.main.write(bytes) {
            // Nobody reads: what does not fit is lost, as on a line without a listener.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(bytes.len()),
            done => done,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A pseudo terminal must not echo the guest's output back as its input.
fn raw(fd: RawFd) -> io::Result<()> {
    // SAFETY: termios is plain data, and both calls get a valid pointer to it.
    unsafe {
        let mut mode: libc::termios = std::mem::zeroed();
        if libc::tcgetattr(fd, &mut mode) != 0 {
            return Err(io::Error::last_os_error());
        }
        libc::cfmakeraw(&mut mode);
        if libc::tcsetattr(fd, libc::TCSANOW, &mode) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// What the keys of a terminal ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// Leave: Ctrl-A x.
    Leave,
    /// An ordinary byte for the guest.
    Byte(u8),
}

/// Finds the escape sequences in a stream of input: Ctrl-A x leaves, Ctrl-A Ctrl-A is one Ctrl-A.
#[derive(Debug, Default)]
pub struct EscapeFilter {
    escaped: bool,
}

impl EscapeFilter {
    /// Takes one byte of input.
    pub fn feed(&mut self, byte: u8) -> Option<Key> {
        match (std::mem::take(&mut self.escaped), byte) {
            (false, ESCAPE) => {
                self.escaped = true;
                None
            }
            (true, b'x' | b'X') => Some(Key::Leave),
            (true, b) if b != ESCAPE => None,
            (_, b) => Some(Key::Byte(b)),
        }
    }

    /// Takes many bytes; the flag says that the user wants to leave.
    pub fn feed_all(&mut self, bytes: &[u8]) -> (Vec<u8>, bool) {
        let mut out = Vec::with_capacity(bytes.len());
        for byte in bytes {
            match self.feed(*byte) {
                Some(Key::Leave) => return (out, true),
                Some(Key::Byte(b)) => out.push(b),
                None => {}
            }
        }
        (out, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_sequences_are_found_across_reads() {
        let mut f = EscapeFilter::default();
        assert_eq!(f.feed_all(b"ab\x01"), (b"ab".to_vec(), false));
        assert_eq!(f.feed_all(b"\x01c"), (b"\x01c".to_vec(), false));
        assert_eq!(f.feed_all(b"\x01qd"), (b"d".to_vec(), false));
        assert_eq!(f.feed_all(b"e\x01xf"), (b"e".to_vec(), true));
    }

    #[test]
    fn a_pty_that_nobody_reads_does_not_block() {
        let Ok(mut pty) = Pty::open() else { return };
        pty.write_all(&vec![b'x'; 1 << 20]).unwrap();
    }

    #[test]
    fn a_pty_has_a_path_and_carries_bytes_without_echo() {
        use std::io::Read;
        let Ok(mut pty) = Pty::open() else { return };
        assert!(pty.path.starts_with("/dev/pts/"), "{}", pty.path);
        let mut other = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&pty.path)
            .unwrap();
        pty.write_all(b"hi\n").unwrap();
        let mut got = [0; 3];
        other.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hi\n");
        let e = pty.main.read(&mut got).unwrap_err();
        assert_eq!(e.kind(), std::io::ErrorKind::WouldBlock);
    }
}
