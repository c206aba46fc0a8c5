// SPDX-License-Identifier: GPL-2.0
//! Random ioctls on `/dev/mshv`: `mshv_fuzz [seed=N] [first=N] [rounds=N | seconds=N] [ops=N] [threads=N]`.
//!
//! A round is a process of its own with some threads, which share files and memory and change both beneath each
//! other's calls; some processes are killed in the middle. Its number goes to the kernel log. What a thread does
//! follows from seed, round and thread, so `seed=N first=N rounds=1` repeats a round as far as threads can repeat
//! anything; with `threads=1` it does so exactly.

mod arena;
mod guest;
mod random;
mod requests;

use std::ffi::CString;
use std::io;
use std::process::ExitCode;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mshv_smoke::machine::{errno, ioctl, Memory};
use random::Random;
use requests::{Bytes, Kind, On, KINDS};

/// What the command line says.
struct Options {
    seed: u64,
    first: u64,
    rounds: u64,
    seconds: u64,
    ops: u64,
    threads: u64,
}

impl Options {
    fn read() -> Result<Self, String> {
        let mut options = Self {
            seed: 1,
            first: 0,
            rounds: u64::MAX,
            seconds: u64::MAX,
            ops: 400,
            threads: 3,
        };
        for argument in std::env::args().skip(1) {
            let (name, value) = argument
                .split_once('=')
                .ok_or("arguments are NAME=NUMBER")?;
            let value: u64 = value
                .parse()
                .map_err(|_| format!("{argument}: no number"))?;
            match name {
                "seed" => options.seed = value,
                "first" => options.first = value,
                "rounds" => options.rounds = value,
                "seconds" => options.seconds = value,
                "ops" => options.ops = value,
                "threads" => options.threads = value,
                _ => return Err(format!("no option {name}")),
            }
        }
        Ok(options)
    }
}

/// How often each ioctl was made, and how often it succeeded; one for all processes.
struct Counts(Memory);

impl Counts {
    fn new() -> io::Result<Self> {
        Ok(Self(Memory::new(4096)?))
    }

    fn of(&self, kind: usize) -> &[AtomicU64; 2] {
        assert!(kind < KINDS.len());
        // SAFETY: inside the page, which lives as long as `self`; all processes use it as atomics.
        unsafe { &*(self.0.address() as *const [AtomicU64; 2]).add(kind) }
    }

    fn add(&self, kind: usize, good: bool) {
        let [made, succeeded] = self.of(kind);
        made.fetch_add(1, Ordering::Relaxed);
        succeeded.fetch_add(good.into(), Ordering::Relaxed);
    }

    /// Prints them, and says whether each ioctl succeeded at least once. Which calls do depends on how the threads take turns:
    /// one that was made a few times only may have failed each time.
    fn report(&self) -> bool {
        let mut all = true;
        for (index, kind) in KINDS.iter().enumerate() {
            let [made, succeeded] = self.of(index).each_ref().map(|n| n.load(Ordering::Relaxed));
            println!("{:24}{made:8} of which good {succeeded:8}", kind.name);
            // There is no device attribute that can be set yet.
            all &= succeeded != 0 || made < FEW || kind.name == "SET_DEVICE_ATTR";
        }
        all
    }
}

/// So few calls may all fail by chance.
const FEW: u64 = 50;

/// Descriptors by kind. What is put into a place closes what was there; a call may be using it.
struct Files([AtomicI32; 28]);

impl Files {
    const EVENTS: (u64, u64) = (18, 8);

    fn range(on: On) -> (u64, u64) {
        match on {
            On::Device => (0, 2),
            On::Partition => (2, 4),
            On::Vp => (6, 12),
            On::Object => (26, 2),
            On::Any => (0, 18),
        }
    }

    fn get(&self, random: &mut Random, (first, count): (u64, u64)) -> i32 {
        self.0[(first + random.below(count)) as usize].load(Ordering::Relaxed)
    }

    fn put(&self, random: &mut Random, (first, count): (u64, u64), fd: i32) {
        let place = &self.0[(first + random.below(count)) as usize];
        let old = place.swap(fd, Ordering::Relaxed);
        if old >= 0 {
            // SAFETY: a descriptor of ours that no object owns.
            unsafe { libc::close(old) };
        }
    }
}

/// What the threads of a round have in common.
struct Round<'a> {
    files: Files,
    /// Backs a part of guest memory.
    backing: i32,
    counts: &'a Counts,
    /// Thread IDs, for signals.
    threads: [AtomicI32; 8],
}

impl Round<'_> {
    fn thread(&self, number: u64, mut random: Random, ops: u64, killed: bool) {
        // SAFETY: no arguments.
        let id = unsafe { libc::gettid() };
        self.threads[number as usize % 8].store(id, Ordering::Relaxed);
        if random.below(8) != 0 {
            self.machine(&mut random, number);
        }
        for _ in 0..ops {
            self.step(&mut random, number);
        }
        if killed {
            // SAFETY: ends this process, on purpose in the middle of the other threads' calls.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        }
    }

    fn step(&self, random: &mut Random, own: u64) {
        match random.below(100) {
            0..62 => self.call(random, own),
            62..66 => self.random_call(random, own),
            66..80 => arena::disturb(random, self.backing),
            80..85 => self.window(random),
            85..90 => self.event(random),
            90..93 => self.exchange(random),
            93..95 => self.signal(random),
            95..97 => self.machine(random, own),
            97 => self.fork(random, own),
            _ => {
                let (ram, _) = arena::ram();
                arena::write(ram + guest::START, &guest::code(random));
            }
        }
    }

    /// A partition that works, in the ordinary way.
    fn machine(&self, random: &mut Random, own: u64) {
        let index = |name| KINDS.iter().position(|kind| kind.name == name).unwrap_or(0);
        let (ram, size) = arena::ram();
        arena::write(ram + 0x1000, &guest::tables());
        arena::write(ram + guest::START, &guest::code(random));
        let at = arena::place(random, own, 256);
        let make = |name, fd, bytes: &[u8]| {
            arena::write(at, bytes);
            self.issue(index(name), fd, KINDS[index(name)].command, at)
        };
        let device = self.files.get(random, Files::range(On::Device));
        let flags = random.of(&[0u64, 3, 7, 0x27]);
        let Ok(partition) = make(
            "CREATE_PARTITION",
            device,
            &[flags, 0].map(u64::to_le_bytes).concat(),
        ) else {
            return;
        };
        self.files
            .put(random, Files::range(On::Partition), partition);
        let _ = make("INITIALIZE_PARTITION", partition, &[]);
        let region = [random.of(&[size, 0x10_0000]), 0, ram, 3];
        let _ = make(
            "SET_GUEST_MEMORY",
            partition,
            &region.map(u64::to_le_bytes).concat(),
        );
        let input = arena::place(random, own, 4096);
        for number in 0..=random.below(3) as u32 {
            let Ok(vp) = make("CREATE_VP", partition, &number.to_le_bytes()) else {
                continue;
            };
            let (registers, count) = requests::start(number, random.once_in(2));
            arena::write(input, &registers.0);
            let call = requests::envelope(0x51, count, (input, registers.0.len() as u64), (0, 0));
            let _ = make("ROOT_HVCALL", vp, &call.0);
            self.files.put(random, Files::range(On::Vp), vp);
        }
    }

    /// An ioctl, right or not.
    fn call(&self, random: &mut Random, own: u64) {
        let index = chosen(random);
        let kind = KINDS[index];
        let events = [(); 2].map(|()| self.files.get(random, Files::EVENTS));
        let mut bytes = requests::argument(kind, random, own, events);
        if random.once_in(6) {
            bytes.damage(random);
        }
        let files = if random.once_in(16) {
            (0, 28)
        } else {
            Files::range(kind.on)
        };
        let fd = self.files.get(random, files);
        let command = match random.below(48) {
            0 => kind.command ^ 1 << random.below(32),
            1 => kind.command & !0x3fff_0000 | (random.below(512) as u32) << 16,
            _ => kind.command,
        };
        let at = arena::place(random, own, bytes.0.len() as u64);
        arena::write(at, &bytes.0);
        if let Ok(new) = self.issue(index, fd, command, at) {
            if new > 2 {
                let to = match kind.on {
                    On::Device => On::Partition,
                    _ => On::Vp,
                };
                self.files.put(random, Files::range(to), new);
            } else if kind.name == "CREATE_DEVICE" {
                self.take_object(random, at);
            }
        }
    }

    /// Finds the descriptor in the argument of CREATE_DEVICE, if nobody overwrote it.
    fn take_object(&self, random: &mut Random, at: u64) {
        let mut fd = [0u8; 4];
        let local = libc::iovec {
            iov_base: fd.as_mut_ptr().cast(),
            iov_len: 4,
        };
        let remote = libc::iovec {
            iov_base: (at + 4) as *mut _,
            iov_len: 4,
        };
        // SAFETY: the kernel checks the remote address and writes four bytes to `fd`.
        let got = unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) };
        let fd = i32::from_le_bytes(fd);
        if got == 4 && (3..1024).contains(&fd) {
            self.files.put(random, Files::range(On::Object), fd);
        }
    }

    fn issue(&self, index: usize, fd: i32, command: u32, at: u64) -> io::Result<i32> {
        let result = ioctl(fd, command.into(), at);
        // An ended run is what most runs are.
        let good = result.is_ok();
        if command == KINDS[index].command {
            self.counts.add(index, good);
        }
        result
    }

    /// Any number of our type on any file.
    fn random_call(&self, random: &mut Random, own: u64) {
        let fd = self.files.get(random, (0, 28));
        let nr = random.below(16) as u32;
        let command = 0xb800 | nr | (random.next() as u32) << 16;
        let mut bytes = Bytes(vec![0; 256]);
        (0..16).for_each(|_| bytes.damage(random));
        let at = arena::place(random, own, 256);
        arena::write(at, &bytes.0);
        if let Ok(new @ 3..) = ioctl(fd, command.into(), at) {
            self.files.put(random, Files::range(On::Any), new);
        }
    }

    /// Maps a page of a VP, or writes to one.
    fn window(&self, random: &mut Random) {
        let address = arena::window(random);
        if random.once_in(2) {
            let at = address + random.below(4096 / 8) * 8;
            arena::write(at, &random.value().to_le_bytes());
            return;
        }
        let fd = self.files.get(random, Files::range(On::Vp));
        let access = random.of(&[3, 3, 3, 1, 7]);
        let kind = random.of(&[libc::MAP_SHARED, libc::MAP_SHARED, libc::MAP_PRIVATE]);
        let any = random.below(1 << 40);
        let offset = random.of(&[0, 0, 1, 1, 2, 3, any]) << 12;
        let length = random.of(&[4096, 4096, 4096, 8192]);
        // SAFETY: the place belongs to the arena, which no reference points into.
        unsafe {
            let flags = kind | libc::MAP_FIXED;
            libc::mmap(address as *mut _, length, access, flags, fd, offset as i64);
        }
    }

    /// Signals an event, or makes a new one.
    fn event(&self, random: &mut Random) {
        if random.once_in(4) {
            // SAFETY: no pointers.
            let fd = unsafe { libc::eventfd(random.below(2) as u32, libc::EFD_NONBLOCK) };
            self.files.put(random, Files::EVENTS, fd);
            return;
        }
        let fd = self.files.get(random, Files::EVENTS);
        let one = 1u64;
        // SAFETY: eight bytes of ours; the descriptor may be any, of which none here takes a write but an event.
        unsafe { libc::write(fd, (&raw const one).cast(), 8) };
    }

    /// Closes a file, or puts it into the place of another kind.
    fn exchange(&self, random: &mut Random) {
        let fd = self.files.get(random, (0, 28));
        let new = match random.below(3) {
            // SAFETY: no pointers; a closed descriptor is an error.
            0 => unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) },
            1 => open_device(),
            _ => -1,
        };
        let to = match random.below(3) {
            0 => (0, 28),
            1 => Files::range(On::Device),
            _ => Files::range(On::Vp),
        };
        self.files.put(random, to, new);
    }

    /// Interrupts a thread.
    fn signal(&self, random: &mut Random) {
        let thread = random.of(&[0, 1, 2]);
        let id = self.threads[thread].load(Ordering::Relaxed);
        let signal = random.of(&[libc::SIGUSR1, libc::SIGUSR2]);
        if id != 0 {
            // SAFETY: no pointers; both signals have handlers.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), id, signal) };
        }
    }

    /// Another process uses the same files for a moment; it has no threads and allocates nothing.
    fn fork(&self, random: &mut Random, own: u64) {
        let fds = [On::Partition, On::Vp].map(|on| self.files.get(random, Files::range(on)));
        let at = arena::place(random, own, 256);
        // SAFETY: the child makes system calls only, and ends.
        unsafe {
            let child = libc::fork();
            if child == 0 {
                for kind in KINDS {
                    let fd = if kind.on == On::Vp { fds[1] } else { fds[0] };
                    libc::ioctl(fd, kind.command as _, at);
                }
                libc::_exit(0);
            }
            if child > 0 {
                libc::waitpid(child, std::ptr::null_mut(), 0);
            }
        }
    }
}

/// An ioctl by weight.
fn chosen(random: &mut Random) -> usize {
    let mut left = random.below(KINDS.iter().map(|kind: &Kind| kind.weight).sum());
    for (index, kind) in KINDS.iter().enumerate() {
        if left < kind.weight {
            return index;
        }
        left -= kind.weight;
    }
    0
}

fn open_device() -> i32 {
    // SAFETY: a constant string.
    unsafe { libc::open(c"/dev/mshv".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) }
}

extern "C" fn on_signal(_: i32) {}

/// One round, in a process of its own.
fn round(options: &Options, number: u64, counts: &Counts) -> i32 {
    for (signal, flags) in [(libc::SIGUSR1, 0), (libc::SIGUSR2, libc::SA_RESTART)] {
        // SAFETY: a handler that does nothing.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_signal as *const () as usize;
            action.sa_flags = flags;
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
    let mut random = Random::new(options.seed, number);
    let name = CString::default();
    // SAFETY: a string of ours.
    let backing = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    arena::make(backing);
    let shared = Round {
        files: Files([const { AtomicI32::new(-1) }; 28]),
        backing,
        counts,
        threads: [const { AtomicI32::new(0) }; 8],
    };
    let device = open_device();
    if device < 0 {
        eprintln!("/dev/mshv: {}", io::Error::last_os_error());
        return 1;
    }
    shared.files.0[0].store(device, Ordering::Relaxed);
    for _ in 0..4 {
        shared.event(&mut random);
    }
    let killed = random.once_in(4).then(|| random.below(options.threads));
    std::thread::scope(|scope| {
        for thread in 0..options.threads {
            let random = Random::new(options.seed, (number << 8) + thread + 1);
            let shared = &shared;
            // Who kills does so early.
            let ops = match killed {
                Some(killer) if killer == thread => options.ops / 2,
                _ => options.ops,
            };
            scope.spawn(move || shared.thread(thread, random, ops, killed == Some(thread)));
        }
    });
    0
}

fn run(options: &Options) -> Result<(), String> {
    let counts = Counts::new().map_err(|error| error.to_string())?;
    let start = Instant::now();
    let mut done = 0;
    while done < options.rounds && start.elapsed() < Duration::from_secs(options.seconds) {
        let number = options.first.wrapping_add(done);
        // If the machine dies, its console says where.
        let _ = std::fs::write(
            "/dev/kmsg",
            format!("<3>mshv_fuzz: seed={} first={number}\n", options.seed),
        );
        // SAFETY: this process has one thread; the child ends without returning.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let status = round(options, number, &counts);
            // SAFETY: ends the child.
            unsafe { libc::_exit(status) };
        }
        let mut status = 0;
        // SAFETY: an integer of ours.
        let waited = errno(match unsafe { libc::waitpid(child, &raw mut status, 0) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        });
        let killed = libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGKILL;
        if waited != 0 || (status != 0 && !killed) {
            return Err(format!("round {number}: wait status {status:#x}"));
        }
        done += 1;
    }
    println!(
        "{done} rounds of {} steps by {} threads",
        options.ops, options.threads
    );
    if counts.report() {
        Ok(())
    } else {
        Err("an ioctl never succeeded: this tests nothing".into())
    }
}

fn main() -> ExitCode {
    let outcome = Options::read().and_then(|options| {
        println!("seed={}", options.seed);
        run(&options)
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mshv_fuzz: {error}");
            ExitCode::FAILURE
        }
    }
}
