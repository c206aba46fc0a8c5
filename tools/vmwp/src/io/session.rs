// SPDX-License-Identifier: GPL-2.0
//! One connection to the control socket: first lines of requests, then perhaps a console.

use crate::control::{parse_request, Reply, Request, LINE_MAX};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

/// What a connection wants after input came.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// A request, or a line that is none.
    Request(Result<Request, String>),
    /// Console input.
    Input(Vec<u8>),
    /// The connection ended or broke the rules.
    Closed,
}

/// A connection.
pub struct Session {
    stream: UnixStream,
    line: Vec<u8>,
    console: bool,
}

impl Session {
    /// Takes over a connection; it must not block.
    pub fn new(stream: UnixStream) -> std::io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Session {
            stream,
            line: Vec::new(),
            console: false,
        })
    }

    /// The socket.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Is it attached to the console?
    pub fn is_console(&self) -> bool {
        self.console
    }

    /// From now on the connection carries console bytes.
    pub fn become_console(&mut self) {
        self.console = true;
    }

    /// Reads what is there.
    pub fn receive(&mut self) -> Vec<Event> {
        let mut buf = [0; 4096];
        match self.stream.read(&mut buf) {
            Ok(0) => vec![Event::Closed],
            Ok(n) if self.console => vec![Event::Input(buf[..n].to_vec())],
            Ok(n) => self.lines(&buf[..n]),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                Vec::new()
            }
            Err(_) => vec![Event::Closed],
        }
    }

    /// Cuts the input into lines. What follows a console request is console input.
    fn lines(&mut self, bytes: &[u8]) -> Vec<Event> {
        let mut events = Vec::new();
        self.line.extend_from_slice(bytes);
        while let Some(end) = self.line.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = self.line.drain(..=end).collect();
            let request = parse_request(String::from_utf8_lossy(&line[..end]).trim());
            let console = request == Ok(Request::Console);
            events.push(Event::Request(request));
            if console {
                let rest = std::mem::take(&mut self.line);
                if !rest.is_empty() {
                    events.push(Event::Input(rest));
                }
                return events;
            }
        }
        if self.line.len() > LINE_MAX {
            events.push(Event::Closed);
        }
        events
    }

    /// Sends a reply; `false` if the peer does not take it.
    pub fn reply(&mut self, reply: &Reply) -> bool {
        self.send(reply.line().as_bytes())
    }

    /// Sends bytes without waiting; `false` if the peer does not take them. A console that is too slow is cut off, it
    /// can attach anew and gets the remembered output.
    pub fn send(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Session, UnixStream) {
        let (a, b) = UnixStream::pair().unwrap();
        (Session::new(a).unwrap(), b)
    }

    #[test]
    fn requests_may_come_in_pieces_and_several_at_once() {
        let (mut s, mut peer) = pair();
        peer.write_all(br#"{"op":"sta"#).unwrap();
        assert_eq!(s.receive(), []);
        peer.write_all(b"tus\"}\n{\"op\":\"stop\"}\nx\n").unwrap();
        let events = s.receive();
        assert_eq!(
            events[..2],
            [
                Event::Request(Ok(Request::Status)),
                Event::Request(Ok(Request::Stop))
            ]
        );
        assert!(matches!(events[2], Event::Request(Err(_))));
    }

    #[test]
    fn bytes_behind_a_console_request_are_input() {
        let (mut s, mut peer) = pair();
        peer.write_all(b"{\"op\":\"console\"}\nls\n").unwrap();
        assert_eq!(
            s.receive(),
            [
                Event::Request(Ok(Request::Console)),
                Event::Input(b"ls\n".to_vec())
            ]
        );
        s.become_console();
        peer.write_all(b"pwd\n").unwrap();
        assert_eq!(s.receive(), [Event::Input(b"pwd\n".to_vec())]);
    }

    #[test]
    fn endless_lines_and_hang_ups_close() {
        let (mut s, mut peer) = pair();
        peer.write_all(&vec![b'a'; LINE_MAX + 1]).unwrap();
        let mut events = s.receive();
        events.extend(s.receive());
        assert!(events.contains(&Event::Closed));
        let (mut s, peer) = pair();
        drop(peer);
        assert_eq!(s.receive(), [Event::Closed]);
    }

    #[test]
    fn a_peer_that_does_not_read_is_noticed() {
        let (mut s, _peer) = pair();
        assert!(!s.send(&vec![0; 8 << 20]));
    }
}
