// SPDX-License-Identifier: GPL-2.0
//! The run loop of a VP's thread, and the one place where the end of the partition is decided.

use super::exit::{self, Step};
use super::stats::{Counters, Kind};
use super::{GuestRam, Run, Vp};
use crate::device::{lock, Machine, PowerEvent};
use crate::outcome::Outcome;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Mutex;
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

/// How long a VP sleeps that has nothing to do and whose hypervisor does not wait for it.
const IDLE: Duration = Duration::from_millis(1);

/// The end of the partition: the first cause wins, everybody hears of it.
pub struct Ending {
    stop: AtomicBool,
    outcome: Mutex<Option<Outcome>>,
    event: EventFd,
}

impl Ending {
    /// Nothing has ended yet.
    pub fn new() -> std::io::Result<Self> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Ending {
            stop: AtomicBool::new(false),
            outcome: Mutex::new(None),
            event,
        })
    }

    /// Ends the partition with `outcome`, unless it has ended already.
    pub fn finish(&self, outcome: Outcome) {
        lock(&self.outcome).get_or_insert(outcome);
        self.stop.store(true, Ordering::Release);
        // The counter can only overflow after 2^64 calls.
        let _ = self.event.write(1);
    }

    /// Shall the VPs stop?
    #[inline]
    pub fn stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Becomes readable when the partition ends.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Why it ended.
    pub fn outcome(&self) -> Option<Outcome> {
        lock(&self.outcome).clone()
    }
}

/// Runs a VP until the partition ends.
pub fn run<W: Write>(
    vp: &mut dyn Vp,
    index: u32,
    ram: &dyn GuestRam,
    machine: &Machine<W>,
    counters: &Counters,
    ending: &Ending,
) {
    while !ending.stopping() {
        // Looked at where it is, because it is long.
        let run = vp.run();
        let intercept = match &run {
            Ok(Run::Intercept(intercept)) => intercept,
            Ok(Run::Interrupted) => {
                counters.add(Kind::Interrupted);
                continue;
            }
            Err(why) => return ending.finish(Outcome::error(index, why)),
        };
        counters.add(exit::kind(intercept));
        match exit::complete(vp, ram, machine, intercept) {
            Ok(Step::Continue) => {}
            Ok(Step::Idle) => std::thread::sleep(IDLE),
            Ok(Step::Power(PowerEvent::Off)) => return ending.finish(Outcome::PowerOff),
            Ok(Step::Power(PowerEvent::Reset)) => return ending.finish(Outcome::Reset),
            Ok(Step::TripleFault(place)) => {
                return ending.finish(Outcome::TripleFault { vp: index, place })
            }
            Err(why) => return ending.finish(Outcome::error(index, why)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::{machine, out, FakeRam, FakeVp};
    use super::super::message::{Header, Intercept};
    use super::super::reg::Reg;
    use super::*;
    use crate::layout::{RESET_PORT, SLEEP_CONTROL_PORT, UART_PORT};

    fn run_all(runs: Vec<Result<Run, String>>) -> (Outcome, crate::vp::stats::VpExits, FakeVp) {
        let mut vp = FakeVp {
            runs: runs.into(),
            ..Default::default()
        };
        let (counters, ending) = (Counters::default(), Ending::new().unwrap());
        run(
            &mut vp,
            7,
            &FakeRam::default(),
            &machine(),
            &counters,
            &ending,
        );
        (ending.outcome().unwrap(), counters.snapshot(7), vp)
    }

    #[test]
    fn a_guest_that_prints_and_powers_off_ends_with_power_off() {
        let runs = vec![
            out(UART_PORT, 0x41),
            Ok(Run::Interrupted),
            out(UART_PORT, 0x42),
            out(SLEEP_CONTROL_PORT, 0x34),
        ];
        let (outcome, exits, vp) = run_all(runs);
        assert_eq!(outcome, Outcome::PowerOff);
        assert_eq!((exits.port, exits.interrupted, exits.vp), (3, 1, 7));
        assert_eq!(vp.reg(Reg::RIP), 0x1001);
    }

    #[test]
    fn reset_and_triple_fault_are_told_apart() {
        assert_eq!(run_all(vec![out(RESET_PORT, 6)]).0, Outcome::Reset);
        let fault = Ok(Run::Intercept(Intercept::UnrecoverableException(Header {
            rip: 5,
            ..Default::default()
        })));
        assert!(matches!(
            run_all(vec![fault]).0,
            Outcome::TripleFault { vp: 7, .. }
        ));
    }

    #[test]
    fn a_failing_run_ends_with_its_reason() {
        let (outcome, ..) = run_all(vec![Err("EIO".into())]);
        assert_eq!(outcome, Outcome::error(7, "EIO"));
    }

    #[test]
    fn the_first_outcome_wins_and_a_stopped_vp_does_not_run() {
        let ending = Ending::new().unwrap();
        ending.finish(Outcome::Reset);
        ending.finish(Outcome::PowerOff);
        assert_eq!(ending.outcome(), Some(Outcome::Reset));
        assert!(ending.event().read().is_ok());
        let mut vp = FakeVp::default();
        run(
            &mut vp,
            0,
            &FakeRam::default(),
            &machine(),
            &Counters::default(),
            &ending,
        );
        assert_eq!(ending.outcome(), Some(Outcome::Reset));
    }
}
