// SPDX-License-Identifier: GPL-2.0
//! The event loop of the main thread: console, control socket, signals, and the end of the partition.

use super::output::Output;
use super::session::{Event, Session};
use super::terminal::EscapeFilter;
use crate::control::{Reply, Request, Status};
use crate::outcome::Outcome;
use crate::vp::runner::Ending;
use crate::{Error, Result};
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vmm_sys_util::timerfd::TimerFd;

/// Console bytes gather for so long before they are delivered together.
const GATHER: Duration = Duration::from_millis(2);
/// Bytes of output that a new console gets to see.
const MEMORY: usize = 64 * 1024;
/// Signals that end the partition.
const SIGNALS: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// Takes console input to the guest.
pub type Input = Box<dyn Fn(&[u8]) + Send>;

/// What the server works with.
pub struct ServerParts {
    /// The end of the partition.
    pub ending: Arc<Ending>,
    /// Console output.
    pub output: Arc<Output>,
    /// Takes console input.
    pub input: Input,
    /// Where the console's output goes beside attached clients.
    pub sink: Option<Box<dyn Write + Send>>,
    /// Where the console's input comes from beside attached clients.
    pub source: Option<File>,
    /// Ctrl-A x in the source stops the partition.
    pub escape: bool,
    /// Control socket.
    pub listener: Option<UnixListener>,
    /// Answers a status request.
    pub status: Box<dyn Fn() -> Status + Send>,
}

/// The event loop.
pub struct Server {
    manager: EventManager<Arc<Mutex<State>>>,
    state: Arc<Mutex<State>>,
}

struct State {
    parts: ServerParts,
    signals: File,
    timer: TimerFd,
    escape: EscapeFilter,
    sessions: HashMap<RawFd, Session>,
    memory: VecDeque<u8>,
    ended: Arc<AtomicBool>,
}

/// Blocks the signals that end the partition, so that they only arrive at the server. To be called before any thread
/// is started.
pub fn block_signals() -> Result<()> {
    SIGNALS
        .iter()
        .try_for_each(|signal| vmm_sys_util::signal::block_signal(*signal))
        .map_err(|e| Error::io("signal handling", e))
}

fn signal_file() -> Result<File> {
    let set = vmm_sys_util::signal::create_sigset(&SIGNALS)
        .map_err(|e| Error::io("signal handling", e))?;
    // SAFETY: the set is initialized; the result is checked and owned below.
    let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(Error::io(
            "signal handling",
            std::io::Error::last_os_error(),
        ));
    }
    // SAFETY: `fd` is open and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

impl Server {
    /// Sets everything up; nothing is served before [`Server::run`].
    pub fn new(parts: ServerParts) -> Result<Self> {
        let fail = |e: event_manager::Error| Error::io("the event loop", format!("{e:?}"));
        let timer = TimerFd::new().map_err(|e| Error::io("a timer", e))?;
        let state = Arc::new(Mutex::new(State {
            parts,
            signals: signal_file()?,
            timer,
            escape: EscapeFilter::default(),
            sessions: HashMap::new(),
            memory: VecDeque::new(),
            ended: Arc::new(AtomicBool::new(false)),
        }));
        let mut manager = EventManager::new().map_err(fail)?;
        manager.add_subscriber(state.clone());
        Ok(Server { manager, state })
    }

    /// Serves until the partition has ended.
    pub fn run(&mut self) -> Result<()> {
        let ended = crate::device::lock(&self.state).ended.clone();
        while !ended.load(Ordering::Acquire) {
            match self.manager.run() {
                Ok(_) => {}
                Err(event_manager::Error::Epoll(e)) if e.errno() == libc::EINTR => {}
                Err(e) => return Err(Error::io("the event loop", format!("{e:?}"))),
            }
        }
        Ok(())
    }

    /// Delivers the last output, after the VPs have stopped.
    pub fn flush(&self) {
        crate::device::lock(&self.state).deliver(None);
    }
}

impl State {
    fn deliver(&mut self, ops: Option<&mut EventOps>) {
        let bytes = self.parts.output.take();
        if bytes.is_empty() {
            return;
        }
        if let Some(sink) = &mut self.parts.sink {
            if sink.write_all(&bytes).and_then(|()| sink.flush()).is_err() {
                self.parts.sink = None;
            }
        }
        self.memory.extend(&bytes);
        let excess = self.memory.len().saturating_sub(MEMORY);
        self.memory.drain(..excess);
        let mut gone = Vec::new();
        for (fd, session) in self.sessions.iter_mut().filter(|(_, s)| s.is_console()) {
            if !session.send(&bytes) {
                gone.push(*fd);
            }
        }
        if let Some(ops) = ops {
            gone.into_iter().for_each(|fd| self.drop_session(fd, ops));
        }
    }

    fn stop(&self, by: impl Into<String>) {
        self.parts.ending.finish(Outcome::Stopped { by: by.into() });
    }

    fn signal(&mut self) {
        const SIZE: usize = std::mem::size_of::<libc::signalfd_siginfo>();
        let mut info = [0; SIZE];
        if self.signals.read_exact(&mut info).is_ok() {
            // ssi_signo is the first field.
            let number = u32::from_ne_bytes([info[0], info[1], info[2], info[3]]) as libc::c_int;
            self.stop(match number {
                libc::SIGINT => "SIGINT",
                libc::SIGTERM => "SIGTERM",
                _ => "SIGHUP",
            });
        }
    }

    fn source_input(&mut self, ops: &mut EventOps) {
        let Some(source) = &mut self.parts.source else {
            return;
        };
        let mut buf = [0; 4096];
        match source.read(&mut buf) {
            Ok(0) => self.drop_source(ops),
            Ok(n) if self.parts.escape => {
                let (bytes, leave) = self.escape.feed_all(&buf[..n]);
                (self.parts.input)(&bytes);
                if leave {
                    self.stop("Ctrl-A x");
                }
            }
            Ok(n) => (self.parts.input)(&buf[..n]),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => self.drop_source(ops),
        }
    }

    fn drop_source(&mut self, ops: &mut EventOps) {
        if let Some(source) = self.parts.source.take() {
            let _gone = ops.remove(Events::empty(&source));
        }
    }

    fn accept(&mut self, ops: &mut EventOps) {
        let Some(listener) = &self.parts.listener else {
            return;
        };
        let Ok((stream, _)) = listener.accept() else {
            return;
        };
        let Ok(session) = Session::new(stream) else {
            return;
        };
        let fd = session.stream().as_raw_fd();
        if ops.add(Events::new(session.stream(), EventSet::IN)).is_ok() {
            self.sessions.insert(fd, session);
        }
    }

    fn session_input(&mut self, fd: RawFd, ops: &mut EventOps) {
        let Some(session) = self.sessions.get_mut(&fd) else {
            return;
        };
        for event in session.receive() {
            let fine = match event {
                Event::Closed => false,
                Event::Input(bytes) => {
                    (self.parts.input)(&bytes);
                    true
                }
                Event::Request(request) => self.request(fd, request),
            };
            if !fine {
                return self.drop_session(fd, ops);
            }
        }
    }

    /// Answers a request; `false` if the connection is of no use any more.
    fn request(&mut self, fd: RawFd, request: std::result::Result<Request, String>) -> bool {
        let Some(session) = self.sessions.get_mut(&fd) else {
            return false;
        };
        match request {
            Ok(Request::Status) => session.reply(&Reply {
                status: Some((self.parts.status)()),
                ..Reply::done()
            }),
            Ok(Request::Stop) => {
                let fine = session.reply(&Reply::done());
                self.stop("the control socket");
                fine
            }
            Ok(Request::Console) => {
                session.become_console();
                session.reply(&Reply::done()) && session.send(self.memory.make_contiguous())
            }
            Err(why) => session.reply(&Reply::refused(why)),
        }
    }

    fn drop_session(&mut self, fd: RawFd, ops: &mut EventOps) {
        if let Some(session) = self.sessions.remove(&fd) {
            let _gone = ops.remove(Events::empty(session.stream()));
        }
    }
}

impl MutEventSubscriber for State {
    fn init(&mut self, ops: &mut EventOps) {
        let mut watch = |events| ops.add(events).is_ok();
        let mut fine = watch(Events::new(self.parts.ending.event(), EventSet::IN))
            && watch(Events::new(self.parts.output.event(), EventSet::IN))
            && watch(Events::new(&self.signals, EventSet::IN))
            && watch(Events::new(&self.timer, EventSet::IN));
        if let Some(listener) = &self.parts.listener {
            fine &= watch(Events::new(listener, EventSet::IN));
        }
        if let Some(source) = &self.parts.source {
            // Regular files and /dev/null cannot be waited for: they are no interactive input.
            if !watch(Events::new(source, EventSet::IN)) {
                self.parts.source = None;
            }
        }
        if !fine {
            self.parts
                .ending
                .finish(Outcome::error(0, "the event loop cannot watch its files"));
            self.ended.store(true, Ordering::Release);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let fd = events.fd();
        if fd == self.parts.ending.event().as_raw_fd() {
            self.ended.store(true, Ordering::Release);
        } else if fd == self.parts.output.event().as_raw_fd() {
            // Rung by the first byte: wait for its followers. Without a timer deliver at once.
            let _rung = self.parts.output.event().read();
            if self.timer.reset(GATHER, None).is_err() {
                self.deliver(Some(ops));
            }
        } else if fd == self.timer.as_raw_fd() {
            let _expirations = self.timer.wait();
            self.deliver(Some(ops));
        } else if fd == self.signals.as_raw_fd() {
            self.signal();
        } else if self
            .parts
            .source
            .as_ref()
            .is_some_and(|s| s.as_raw_fd() == fd)
        {
            self.source_input(ops);
        } else if self
            .parts
            .listener
            .as_ref()
            .is_some_and(|l| l.as_raw_fd() == fd)
        {
            self.accept(ops);
        } else {
            self.session_input(fd, ops);
        }
    }
}

#[cfg(test)]
mod tests;
