// SPDX-License-Identifier: GPL-2.0
//! A partition from its options to its end.

use crate::boot::{self, BootSource};
use crate::cli::{Cli, Console, VmOptions};
use crate::control::Status;
use crate::device::{InterruptSink, Machine};
use crate::io::server::block_signals;
use crate::io::terminal::{Pty, RawMode};
use crate::io::{ConsoleWriter, Output, Server, ServerParts};
use crate::outcome::{Outcome, Summary};
use crate::partition::{self, Partition};
use crate::vp::runner::{self, Ending};
use crate::vp::stats::{Counters, VpExits};
use crate::vp::Vp;
use crate::{Error, Result};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::signal::{register_signal_handler, Killable, SIGRTMIN};

/// A kick may come just before the VP enters the kernel and be lost; so it is repeated.
const KICK_AGAIN: Duration = Duration::from_millis(1);

/// Runs the partition that the options describe. An error is what kept it from running.
pub fn run(cli: &Cli) -> Result<Summary> {
    let vm = &cli.vm;
    let memory = vm.memory.0;
    let source = BootSource {
        kernel: vm.kernel.clone(),
        initrd: vm.initrd.clone(),
        cmdline: vm.cmdline.clone(),
    };

    let mem = partition::guest_memory(memory)?;
    let loaded = boot::load(&mem, memory, vm.vps, &source)?;
    let partition = Partition::create(&vm.device, &mem)?;
    partition.set_vps_per_socket(vm.vps);
    let mut vps = Vec::new();
    for index in 0..vm.vps {
        vps.push(partition.create_vp(index as u8)?);
    }
    if let Some(first) = vps.first_mut() {
        first
            .set(&boot::regs::boot_registers(loaded.entry))
            .map_err(|why| Error::hypervisor("set the first VP's registers", why))?;
    }
    serve(cli, &mem, vps, partition.interrupts())
}

/// Runs VPs that are ready, and everything around them, until the partition ends.
fn serve<V: Vp + Send + 'static>(
    cli: &Cli,
    mem: &GuestMemoryMmap,
    vps: Vec<V>,
    interrupts: Arc<dyn InterruptSink>,
) -> Result<Summary> {
    block_signals()?;
    let ending = Arc::new(Ending::new().map_err(|e| Error::io("an event", e))?);
    let output = Output::new().map_err(|e| Error::io("an event", e))?;
    let console = ConsoleWriter(output.clone());
    let machine = Arc::new(Machine::new(interrupts, console));
    let running = Running {
        name: name(cli),
        started: Instant::now(),
        counters: vps.iter().map(|_| Counters::default()).collect(),
        output: output.clone(),
    };

    let control = cli
        .control
        .as_deref()
        .map(ControlSocket::bind)
        .transpose()?;
    let (sink, source) = open_console(&cli.console)?;
    let raw = match cli.console {
        Console::Stdio => RawMode::stdin(),
        _ => None,
    };
    let mut server = Server::new(ServerParts {
        ending: ending.clone(),
        output: output.clone(),
        input: {
            let machine = machine.clone();
            // What a guest does not read for long is lost, as on a real line.
            Box::new(move |bytes: &[u8]| {
                machine.ports.console_input(bytes);
            })
        },
        sink,
        source,
        escape: raw.is_some(),
        listener: control.as_ref().map(ControlSocket::listener).transpose()?,
        status: {
            let (running, vm) = (running.clone(), cli.vm.clone());
            Box::new(move || running.status(&vm))
        },
    })?;

    let threads = Threads::start(vps, mem, &machine, &running.counters, &ending)?;
    let served = server.run();
    if served.is_err() {
        let by = "a failure of the event loop".into();
        ending.finish(Outcome::Stopped { by });
    }
    output.close();
    threads.stop();
    server.flush();
    drop(raw);
    served?;
    let nobody = || Outcome::Stopped {
        by: "nobody".into(),
    };
    Ok(running.summary(&ending.outcome().unwrap_or_else(nobody)))
}

/// The name given, or one that no other worker process has.
fn name(cli: &Cli) -> String {
    let unique = || format!("vm-{}", std::process::id());
    cli.vm.name.clone().unwrap_or_else(unique)
}

/// What can be told about a partition while it runs and at its end.
#[derive(Clone)]
struct Running {
    name: String,
    started: Instant,
    counters: Arc<[Counters]>,
    output: Arc<Output>,
}

impl Running {
    fn status(&self, vm: &VmOptions) -> Status {
        Status {
            name: self.name.clone(),
            pid: std::process::id(),
            kernel: vm.kernel.clone(),
            vps: vm.vps,
            memory: vm.memory.0,
            uptime_ms: self.uptime_ms(),
            console_bytes: self.output.total(),
            exits: self.exits(),
        }
    }

    fn summary(&self, outcome: &Outcome) -> Summary {
        Summary {
            name: self.name.clone(),
            outcome: outcome.word().into(),
            detail: outcome.to_string(),
            exit_code: outcome.exit_code(),
            uptime_ms: self.uptime_ms(),
            console_bytes: self.output.total(),
            vps: self.exits(),
        }
    }

    fn uptime_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    fn exits(&self) -> Vec<VpExits> {
        self.counters
            .iter()
            .enumerate()
            .map(|(vp, c)| c.snapshot(vp as u32))
            .collect()
    }
}

/// The threads of the VPs.
struct Threads(Vec<JoinHandle<()>>);

extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // Only its arrival matters: it makes the running ioctl return EINTR.
}

impl Threads {
    fn start<V: Vp + Send + 'static>(
        vps: Vec<V>,
        mem: &GuestMemoryMmap,
        machine: &Arc<Machine<ConsoleWriter>>,
        counters: &Arc<[Counters]>,
        ending: &Arc<Ending>,
    ) -> Result<Self> {
        register_signal_handler(SIGRTMIN(), kicked).map_err(|e| Error::io("signal handling", e))?;
        let mut threads = Threads(Vec::new());
        for (index, mut vp) in vps.into_iter().enumerate() {
            let (mem, machine, counters, on_end) = (
                mem.clone(),
                machine.clone(),
                counters.clone(),
                ending.clone(),
            );
            let body = move || {
                let guard = PanicGuard {
                    ending: &on_end,
                    index: index as u32,
                };
                runner::run(
                    &mut vp,
                    index as u32,
                    &mem,
                    &machine,
                    &counters[index],
                    &on_end,
                );
                drop(guard);
            };
            let spawned = std::thread::Builder::new()
                .name(format!("vp{index}"))
                .spawn(body);
            match spawned {
                Ok(thread) => threads.0.push(thread),
                Err(e) => {
                    ending.finish(Outcome::error(index as u32, "no thread"));
                    threads.stop();
                    return Err(Error::io(format!("the thread of VP {index}"), e));
                }
            }
        }
        Ok(threads)
    }

    /// Kicks every VP until its thread has ended.
    fn stop(self) {
        for thread in self.0 {
            while !thread.is_finished() {
                // A thread that ended just now cannot be kicked, and need not be.
                let _ended = thread.kill(0);
                std::thread::sleep(KICK_AGAIN);
            }
            // A panic has been reported by the guard.
            let _panicked = thread.join();
        }
    }
}

/// Ends the partition if its VP's thread panics, so that nobody waits for it.
struct PanicGuard<'a> {
    ending: &'a Ending,
    index: u32,
}

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.ending.finish(Outcome::error(
                self.index,
                "internal error (see the panic message above)",
            ));
        }
    }
}

/// Sink and source of the serial console.
type Ends = (Option<Box<dyn Write + Send>>, Option<File>);

fn open_console(console: &Console) -> Result<Ends> {
    let fail = |e: std::io::Error| Error::io(format!("the console ({console:?})"), e);
    Ok(match console {
        Console::None => (None, None),
        Console::File(path) => (Some(Box::new(File::create(path).map_err(fail)?)), None),
        Console::Stdio => {
            let stdin = std::io::stdin()
                .as_fd()
                .try_clone_to_owned()
                .map_err(fail)?;
            (Some(Box::new(std::io::stdout())), Some(stdin.into()))
        }
        Console::Pty => {
            let pty = Pty::open().map_err(fail)?;
            eprintln!("vmwp: the console is at {}", pty.path);
            let source = pty.main.try_clone().map_err(fail)?;
            (Some(Box::new(pty)), Some(source))
        }
    })
}

/// The control socket, which goes away with the partition.
struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ControlSocket {
    fn bind(path: &Path) -> Result<Self> {
        let fail = |why: String| Error::io(format!("the control socket {}", path.display()), why);
        if path.exists() {
            if UnixStream::connect(path).is_ok() {
                return Err(fail(
                    "a partition listens there already; choose another --name or stop it first"
                        .into(),
                ));
            }
            std::fs::remove_file(path)
                .map_err(|e| fail(format!("cannot remove what an earlier run left: {e}")))?;
        }
        let listener = UnixListener::bind(path).map_err(|e| {
            fail(format!(
                "{e}; its folder must exist and be writable for you"
            ))
        })?;
        listener
            .set_nonblocking(true)
            .map_err(|e| fail(e.to_string()))?;
        Ok(ControlSocket {
            listener,
            path: path.to_owned(),
        })
    }

    fn listener(&self) -> Result<UnixListener> {
        self.listener
            .try_clone()
            .map_err(|e| Error::io("the control socket", e))
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        let _gone = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{Client, Request};
    use crate::device::tests::Recorder;
    use crate::layout::{MIB, SLEEP_CONTROL_PORT, UART_PORT};
    use crate::vp::fake::{out, FakeVp};
    use crate::vp::{Run, VpResult};
    use clap::Parser;
    use vmm_sys_util::tempdir::TempDir;

    fn options(args: &[&str]) -> Cli {
        let fixed = ["vmwp", "--kernel", "k", "--console", "none", "--name", "t"];
        Cli::try_parse_from([&fixed, args].concat()).unwrap()
    }

    fn serve_fake(cli: &Cli, vps: Vec<FakeVp>) -> Summary {
        let mem = partition::guest_memory(16 * MIB).unwrap();
        serve(cli, &mem, vps, Arc::new(Recorder::default())).unwrap()
    }

    /// A VP that has nothing to do, as one that waits for its start-up interrupt.
    fn waiting() -> FakeVp {
        FakeVp {
            idle: true,
            ..Default::default()
        }
    }

    fn doing(runs: Vec<VpResult<Run>>) -> FakeVp {
        FakeVp {
            runs: runs.into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_power_off_on_one_vp_ends_the_others_and_keeps_the_output() {
        let dir = TempDir::new().unwrap();
        let file = dir.as_path().join("console");
        let mut cli = options(&["--vps", "2"]);
        cli.console = Console::File(file.clone());
        let first = doing(vec![
            out(UART_PORT, b'h'.into()),
            out(UART_PORT, b'i'.into()),
            out(SLEEP_CONTROL_PORT, 0x34),
        ]);
        let summary = serve_fake(&cli, vec![first, waiting()]);
        assert_eq!(
            (summary.outcome.as_str(), summary.exit_code),
            ("power-off", 0)
        );
        assert_eq!((summary.vps.len(), summary.vps[0].port), (2, 3));
        assert_eq!(summary.console_bytes, 2);
        assert_eq!(std::fs::read(file).unwrap(), b"hi");
    }

    #[test]
    fn a_vp_that_fails_ends_the_partition_with_its_reason() {
        let summary = serve_fake(
            &options(&[]),
            vec![waiting(), doing(vec![Err("EIO".into())])],
        );
        assert_eq!((summary.outcome.as_str(), summary.exit_code), ("error", 1));
        assert!(summary.detail.contains("VP 1") && summary.detail.contains("EIO"));
    }

    #[test]
    fn a_vp_that_panics_ends_the_partition() {
        let vp = FakeVp {
            panics: true,
            ..Default::default()
        };
        let summary = serve_fake(&options(&[]), vec![vp, waiting()]);
        assert!(
            summary.detail.contains("internal error"),
            "{}",
            summary.detail
        );
    }

    #[test]
    fn the_control_socket_shows_and_stops_a_partition_and_then_vanishes() {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("t.sock");
        let cli = options(&["--vps", "2", "--control", path.to_str().unwrap()]);
        let thread = std::thread::spawn(move || serve_fake(&cli, vec![waiting(), waiting()]));
        let mut client = loop {
            match Client::connect(&path) {
                Ok(client) => break client,
                Err(_) => std::thread::sleep(KICK_AGAIN),
            }
        };
        let status = client.ask(Request::Status).unwrap().status.unwrap();
        assert_eq!((status.name.as_str(), status.exits.len()), ("t", 2));
        client.ask(Request::Stop).unwrap();
        assert_eq!(thread.join().unwrap().exit_code, 5);
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_in_use_is_refused_and_a_stale_one_replaced() {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("a.sock");
        let first = ControlSocket::bind(&path).unwrap();
        let e = ControlSocket::bind(&path).err().unwrap().to_string();
        assert!(e.contains("listens there already"), "{e}");
        drop(first);
        assert!(!path.exists());
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a killed worker leaves its socket");
        ControlSocket::bind(&path).unwrap();
    }

    #[test]
    fn a_socket_in_a_missing_folder_says_so() {
        let e = ControlSocket::bind(Path::new("/nonexistent/a.sock"))
            .err()
            .unwrap()
            .to_string();
        assert!(e.contains("folder must exist"), "{e}");
    }
}
