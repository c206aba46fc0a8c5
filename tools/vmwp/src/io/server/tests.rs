// SPDX-License-Identifier: GPL-2.0
//! The server with a fake guest: a closure for its input, a buffer for its output.

use super::*;
use crate::control::{socket, Client};
use crate::io::ConsoleWriter;
use std::os::unix::net::UnixStream;
use vmm_sys_util::tempdir::TempDir;

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Sink {
    fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().clone()
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

struct Bench {
    ending: Arc<Ending>,
    writer: ConsoleWriter,
    sink: Sink,
    guest_input: Sink,
    dir: TempDir,
    thread: std::thread::JoinHandle<()>,
}

fn bench(source: Option<File>) -> Bench {
    let dir = TempDir::new().unwrap();
    let (ending, output) = (Arc::new(Ending::new().unwrap()), Output::new().unwrap());
    let (sink, guest_input) = (Sink::default(), Sink::default());
    let input = guest_input.clone();
    let parts = ServerParts {
        ending: ending.clone(),
        output: output.clone(),
        input: Box::new(move |bytes| input.clone().write_all(bytes).unwrap()),
        sink: Some(Box::new(sink.clone())),
        source,
        escape: true,
        listener: Some(UnixListener::bind(socket(dir.as_path(), "t")).unwrap()),
        status: Box::new(|| Status {
            name: "t".into(),
            vps: 2,
            ..Default::default()
        }),
    };
    let mut server = Server::new(parts).unwrap();
    let thread = std::thread::spawn(move || {
        server.run().unwrap();
        server.flush();
    });
    Bench {
        ending,
        writer: ConsoleWriter(output),
        sink,
        guest_input,
        dir,
        thread,
    }
}

impl Bench {
    fn client(&self) -> Client {
        Client::connect(&socket(self.dir.as_path(), "t")).unwrap()
    }

    fn end(self) -> Outcome {
        self.thread.join().unwrap();
        self.ending.outcome().unwrap()
    }
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..500 {
        if condition() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("never happened: {what}");
}

#[test]
fn status_then_stop_on_one_connection() {
    let b = bench(None);
    let mut c = b.client();
    assert_eq!(c.ask(Request::Status).unwrap().status.unwrap().vps, 2);
    assert!(c.ask(Request::Stop).unwrap().ok);
    assert_eq!(
        b.end(),
        Outcome::Stopped {
            by: "the control socket".into()
        }
    );
}

#[test]
fn a_late_console_sees_earlier_output_and_can_type() {
    let mut b = bench(None);
    b.writer.write_all(b"early ").unwrap();
    let sink = b.sink.clone();
    eventually("output reaches the sink", || sink.bytes() == b"early ");
    let (mut stream, mut seen) = b.client().into_console().unwrap();
    b.writer.write_all(b"late").unwrap();
    while seen.len() < 10 {
        let mut buf = [0; 16];
        let n = stream.read(&mut buf).unwrap();
        assert_ne!(n, 0);
        seen.extend_from_slice(&buf[..n]);
    }
    assert_eq!(seen, b"early late");
    stream.write_all(b"ls\n").unwrap();
    let guest = b.guest_input.clone();
    eventually("input reaches the guest", || guest.bytes() == b"ls\n");
    b.ending.finish(Outcome::PowerOff);
    assert_eq!(b.end(), Outcome::PowerOff);
}

#[test]
fn the_last_output_is_delivered_after_the_end() {
    let mut b = bench(None);
    b.writer.write_all(b"reboot: Power down\n").unwrap();
    b.ending.finish(Outcome::PowerOff);
    let sink = b.sink.clone();
    b.end();
    assert_eq!(sink.bytes(), b"reboot: Power down\n");
}

#[test]
fn the_escape_key_of_the_source_stops() {
    let (near, mut far) = UnixStream::pair().unwrap();
    let b = bench(Some(File::from(OwnedFd::from(near))));
    far.write_all(b"a\x01\x01b\x01x").unwrap();
    let guest = b.guest_input.clone();
    assert_eq!(
        b.end(),
        Outcome::Stopped {
            by: "Ctrl-A x".into()
        }
    );
    assert_eq!(guest.bytes(), b"a\x01b");
}

#[test]
fn nonsense_is_answered_and_the_connection_lives_on() {
    let b = bench(None);
    let mut s = UnixStream::connect(socket(b.dir.as_path(), "t")).unwrap();
    s.write_all(b"hello\n{\"op\":\"status\"}\n").unwrap();
    let mut text = String::new();
    while text.matches('\n').count() < 2 {
        let mut buf = [0; 1024];
        let n = s.read(&mut buf).unwrap();
        assert_ne!(n, 0);
        text.push_str(std::str::from_utf8(&buf[..n]).unwrap());
    }
    assert!(
        text.starts_with("{\"ok\":false") && text.contains("\"name\":\"t\""),
        "{text}"
    );
    b.ending.finish(Outcome::Reset);
    b.end();
}

#[test]
fn a_closed_source_does_not_end_the_partition() {
    let (near, far) = UnixStream::pair().unwrap();
    let b = bench(Some(File::from(OwnedFd::from(near))));
    drop(far);
    assert!(b.client().ask(Request::Status).unwrap().ok);
    b.ending.finish(Outcome::PowerOff);
    b.end();
}
