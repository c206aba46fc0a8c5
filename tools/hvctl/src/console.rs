// SPDX-License-Identifier: GPL-2.0
//! `hvctl console`: the terminal on one side, the partition's console on the other.

use crate::{partitions, Error, Result};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use vmwp::control::run_dir;
use vmwp::io::terminal::{EscapeFilter, RawMode};

/// Attaches to a partition until it ends or the user leaves.
pub fn attach(name: &str) -> Result<()> {
    let failed = |source| Error::Worker {
        name: name.into(),
        source,
    };
    let client = partitions::connect(&run_dir(), name)?;
    let (mut stream, early) = client.into_console().map_err(failed)?;
    let raw = RawMode::stdin();
    if raw.is_some() {
        eprintln!("hvctl: attached to {name}; Ctrl-A x detaches");
    }
    let mut stdout = io::stdout();
    let mut stdin = std::fs::File::from(io::stdin().as_fd().try_clone_to_owned().map_err(failed)?);
    let end = stdout
        .write_all(&early)
        .and_then(|()| stdout.flush())
        .and_then(|()| relay(&mut stdin, &mut stdout, &mut stream, raw.is_some()));
    drop(raw);
    match end.map_err(failed)? {
        End::Left => eprintln!("\nhvctl: detached from {name}"),
        End::Partition => eprintln!("\nhvctl: {name} has ended"),
    }
    Ok(())
}

/// Why the relay ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// The user left.
    Left,
    /// The partition ended.
    Partition,
}

/// Carries bytes both ways. With `escape`, Ctrl-A x in the input leaves.
fn relay<I: Read + AsRawFd>(
    input: &mut I,
    output: &mut impl Write,
    stream: &mut UnixStream,
    escape: bool,
) -> io::Result<End> {
    let mut filter = EscapeFilter::default();
    let mut typing = true;
    let mut buf = [0; 4096];
    loop {
        let (typed, came) = wait(typing.then(|| input.as_raw_fd()), stream.as_raw_fd())?;
        if came {
            match stream.read(&mut buf) {
                Ok(0) => return Ok(End::Partition),
                Ok(n) => {
                    output.write_all(&buf[..n])?;
                    output.flush()?;
                }
                Err(e) if e.kind() == ErrorKind::ConnectionReset => return Ok(End::Partition),
                Err(e) => return Err(e),
            }
        }
        if typed {
            let n = input.read(&mut buf)?;
            typing = n > 0;
            let (bytes, leave) = if escape {
                filter.feed_all(&buf[..n])
            } else {
                (buf[..n].to_vec(), false)
            };
            match stream.write_all(&bytes) {
                Err(e) if e.kind() == ErrorKind::BrokenPipe => return Ok(End::Partition),
                done => done?,
            }
            if leave {
                return Ok(End::Left);
            }
        }
    }
}

/// Waits until one of the two has something to read.
fn wait(input: Option<RawFd>, stream: RawFd) -> io::Result<(bool, bool)> {
    // A negative descriptor is ignored by poll.
    let mut fds = [input.unwrap_or(-1), stream].map(|fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    });
    loop {
        // SAFETY: the array is valid for its length during the call.
        let n = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
        if n >= 0 {
            return Ok((fds[0].revents != 0, fds[1].revents != 0));
        }
        let e = io::Error::last_os_error();
        if e.kind() != ErrorKind::Interrupted {
            return Err(e);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_both_ways_until_the_user_leaves() {
        let (mut keyboard, mut input) = UnixStream::pair().unwrap();
        let (mut near, mut far) = UnixStream::pair().unwrap();
        far.write_all(b"login: ").unwrap();
        keyboard.write_all(b"root\n\x01x").unwrap();
        let mut screen = Vec::new();
        let end = relay(&mut input, &mut screen, &mut near, true).unwrap();
        assert_eq!(end, End::Left);
        assert_eq!(screen, b"login: ");
        let mut typed = [0; 5];
        far.read_exact(&mut typed).unwrap();
        assert_eq!(&typed, b"root\n");
    }

    #[test]
    fn the_end_of_input_is_not_the_end_of_output() {
        let (keyboard, mut input) = UnixStream::pair().unwrap();
        let (mut near, mut far) = UnixStream::pair().unwrap();
        drop(keyboard);
        let guest = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(50));
            far.write_all(b"bye").unwrap();
        });
        let mut screen = Vec::new();
        assert_eq!(
            relay(&mut input, &mut screen, &mut near, true).unwrap(),
            End::Partition
        );
        assert_eq!(screen, b"bye");
        guest.join().unwrap();
    }

    #[test]
    fn without_a_terminal_the_escape_key_is_an_ordinary_byte() {
        let (mut keyboard, mut input) = UnixStream::pair().unwrap();
        let (mut near, mut far) = UnixStream::pair().unwrap();
        keyboard.write_all(b"\x01x").unwrap();
        let guest = std::thread::spawn(move || {
            let mut got = [0; 2];
            far.read_exact(&mut got).unwrap();
            got
        });
        assert_eq!(
            relay(&mut input, &mut Vec::new(), &mut near, false).unwrap(),
            End::Partition
        );
        assert_eq!(&guest.join().unwrap(), b"\x01x");
    }
}
