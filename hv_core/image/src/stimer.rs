// SPDX-License-Identifier: GPL-2.0
//! The four synthetic timers of a VP (TLFS 12.3): they count the partition's reference time, in units of 100 ns, and end in a
//! message to a source of the SynIC or, in direct mode, in an interrupt.
#![forbid(unsafe_code)]
#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]

/// Timers of a VP.
pub const TIMERS: usize = 4;

/// Bits of HV_X64_MSR_STIMER0_CONFIG and following.
pub mod config {
    /// It runs.
    pub const ENABLE: u64 = 1 << 0;
    /// The count is a period, otherwise the time of the expiry.
    pub const PERIODIC: u64 = 1 << 1;
    /// A message that cannot be delivered at once may be dropped.
    pub const LAZY: u64 = 1 << 2;
    /// A write of a count other than 0 enables it.
    pub const AUTO_ENABLE: u64 = 1 << 3;
    /// It raises its vector instead of sending a message.
    pub const DIRECT: u64 = 1 << 12;
    /// What may be set: the above, the vector in 11:4, the source in 19:16.
    pub const WRITABLE: u64 = 0xf_1fff;

    /// Vector of the interrupt in direct mode.
    #[must_use]
    pub const fn vector(value: u64) -> u8 {
        (value >> 4 & 0xff) as u8
    }

    /// Source that the message is for.
    #[must_use]
    pub const fn source(value: u64) -> usize {
        (value >> 16 & 0xf) as usize
    }
}

/// `HvMessageTimerExpired` with 24 bytes of payload.
const TIMER_EXPIRED: u64 = 0x8000_0010 | 24 << 32;

/// Words of a timer in the page of a VP's timers (`HV_STIMER_STATE`): flags, configuration, count, adjustment, expiry of which
/// the message is not delivered.
pub const STATE_WORDS: usize = 5;
/// State flag: there is such a message.
const UNDELIVERED: u64 = 1;

/// One timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Timer {
    config: u64,
    count: u64,
    /// Reference time of the next expiry.
    expires: Option<u64>,
    /// Reference time of an expiry whose message could not be delivered yet.
    undelivered: Option<u64>,
}

/// What an expiry leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expiry {
    /// An interrupt with that vector.
    Direct(u8),
    /// A message to that source: its first words, the others are 0.
    Message(usize, [u64; 5]),
}

/// The timers of a VP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timers {
    timers: [Timer; TIMERS],
    /// Host TSC of the first expiry, as [`Timers::set_deadline`] was told; `u64::MAX` for none.
    deadline: u64,
}

impl Default for Timers {
    fn default() -> Self {
        Self::RESET
    }
}

impl Timers {
    /// After reset: none runs.
    pub const RESET: Self = Self {
        timers: [Timer {
            config: 0,
            count: 0,
            expires: None,
            undelivered: None,
        }; TIMERS],
        deadline: u64::MAX,
    };

    /// HV_X64_MSR_STIMERn_CONFIG; 0 for a timer that does not exist.
    #[must_use]
    pub fn config(&self, index: usize) -> u64 {
        self.timers.get(index).map_or(0, |timer| timer.config)
    }

    /// HV_X64_MSR_STIMERn_COUNT.
    #[must_use]
    pub fn count(&self, index: usize) -> u64 {
        self.timers.get(index).map_or(0, |timer| timer.count)
    }

    /// Writes HV_X64_MSR_STIMERn_CONFIG, whose bits were checked. A timer without an aim does not run.
    pub fn set_config(&mut self, index: usize, value: u64, now: u64) {
        if let Some(timer) = self.timers.get_mut(index) {
            timer.config = value;
            if config::source(value) == 0 && value & config::DIRECT == 0 {
                timer.config &= !config::ENABLE;
            }
            timer.start(now);
        }
    }

    /// Writes HV_X64_MSR_STIMERn_COUNT. 0 stops the timer.
    pub fn set_count(&mut self, index: usize, value: u64, now: u64) {
        if let Some(timer) = self.timers.get_mut(index) {
            timer.count = value;
            if value == 0 {
                timer.config &= !config::ENABLE;
            } else if timer.config & config::AUTO_ENABLE != 0 {
                timer.config |= config::ENABLE;
            }
            timer.start(now);
        }
    }

    /// Reference time of the first expiry.
    #[must_use]
    pub fn first(&self) -> Option<u64> {
        self.timers.iter().filter_map(|timer| timer.expires).min()
    }

    /// Host TSC of the first expiry.
    #[inline(always)]
    #[must_use]
    pub const fn deadline(&self) -> u64 {
        self.deadline
    }

    /// What [`Timers::deadline`] says from now on.
    pub fn set_deadline(&mut self, host_tsc: u64) {
        self.deadline = host_tsc;
    }

    /// Hands the timers that expired by reference time `now` to `deliver`, and messages that are still to be delivered. It
    /// says whether it could deliver.
    pub fn expire(&mut self, now: u64, mut deliver: impl FnMut(Expiry) -> bool) {
        for (index, timer) in (0_u64..).zip(&mut self.timers) {
            let expired = timer.expires.filter(|at| *at <= now);
            if let Some(at) = expired {
                timer.go_on(at, now);
            }
            let Some(at) = timer.undelivered.or(expired) else {
                continue;
            };
            if timer.config & config::DIRECT != 0 {
                deliver(Expiry::Direct(config::vector(timer.config)));
                continue;
            }
            let message = [TIMER_EXPIRED, 0, index, at, now];
            let delivered = deliver(Expiry::Message(config::source(timer.config), message));
            let keep = !delivered && timer.config & config::LAZY == 0;
            timer.undelivered = keep.then_some(at);
        }
    }

    /// Whether messages wait for a slot.
    #[must_use]
    pub fn has_undelivered(&self) -> bool {
        self.timers.iter().any(|timer| timer.undelivered.is_some())
    }

    /// `HV_SYNTHETIC_TIMERS_STATE` without its reserved end. The adjustment is the time of the next expiry of a periodic timer.
    #[must_use]
    pub fn export(&self) -> [[u64; STATE_WORDS]; TIMERS] {
        self.timers.map(|timer| {
            [
                timer.undelivered.map_or(0, |_| UNDELIVERED),
                timer.config,
                timer.count,
                timer.expires.unwrap_or(0),
                timer.undelivered.unwrap_or(0),
            ]
        })
    }

    /// Loads what [`Timers::export`] gave. False, and nothing changed, if a configuration has bits that do not exist.
    pub fn import(&mut self, state: &[[u64; STATE_WORDS]; TIMERS], now: u64) -> bool {
        if state
            .iter()
            .any(|[_, config, ..]| config & !config::WRITABLE != 0)
        {
            return false;
        }
        for (timer, [flags, config, count, next, undelivered]) in self.timers.iter_mut().zip(state)
        {
            timer.config = *config;
            timer.count = *count;
            timer.start(now);
            if timer.expires.is_some() && config & config::PERIODIC != 0 && *next != 0 {
                timer.expires = Some(*next);
            }
            timer.undelivered = (flags & UNDELIVERED != 0).then_some(*undelivered);
        }
        true
    }
}

impl Timer {
    fn start(&mut self, now: u64) {
        self.undelivered = None;
        self.expires = if self.config & config::ENABLE == 0 || self.count == 0 {
            None
        } else if self.config & config::PERIODIC != 0 {
            Some(now.saturating_add(self.count))
        } else {
            Some(self.count)
        };
    }

    /// After the expiry that was due at `at`. Periods that were missed are left out.
    fn go_on(&mut self, at: u64, now: u64) {
        if self.config & config::PERIODIC == 0 {
            self.config &= !config::ENABLE;
            self.expires = None;
            return;
        }
        let late = now.saturating_sub(at);
        let missed = late.checked_rem(self.count).unwrap_or(0);
        let next = now.saturating_sub(missed).saturating_add(self.count);
        self.expires = Some(next);
    }
}

#[cfg(test)]
#[allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]
mod tests {
    use super::config::*;
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    const SOURCE3: u64 = 3 << 16;
    const VECTOR: u64 = DIRECT | 0xed << 4;

    fn expire(timers: &mut Timers, now: u64, can: bool) -> Vec<Expiry> {
        let mut all = Vec::new();
        timers.expire(now, |expiry| {
            all.push(expiry);
            can
        });
        all
    }

    fn message(index: u64, at: u64, now: u64) -> Expiry {
        Expiry::Message(3, [0x18_8000_0010, 0, index, at, now])
    }

    #[test]
    fn one_shot_expires_once() {
        let mut timers = Timers::RESET;
        timers.set_config(1, SOURCE3 | AUTO_ENABLE, 10);
        assert_eq!(timers.first(), None);
        timers.set_count(1, 100, 20);
        assert_eq!(timers.first(), Some(100));
        assert_eq!(timers.config(1), SOURCE3 | AUTO_ENABLE | ENABLE);
        assert_eq!(expire(&mut timers, 99, true), []);
        assert_eq!(expire(&mut timers, 105, true), [message(1, 100, 105)]);
        assert_eq!(expire(&mut timers, 105, true), []);
        assert_eq!(timers.config(1), SOURCE3 | AUTO_ENABLE);
        assert_eq!((timers.first(), timers.count(1)), (None, 100));
    }

    #[test]
    fn time_in_the_past_expires_at_once() {
        let mut timers = Timers::RESET;
        timers.set_config(0, VECTOR | AUTO_ENABLE, 500);
        timers.set_count(0, 100, 500);
        assert_eq!(expire(&mut timers, 500, true), [Expiry::Direct(0xed)]);
    }

    #[test]
    fn periodic_timer_goes_on_and_leaves_out_what_it_missed() {
        let mut timers = Timers::RESET;
        timers.set_count(0, 10, 0);
        timers.set_config(0, VECTOR | PERIODIC | ENABLE, 5);
        assert_eq!(timers.first(), Some(15));
        assert_eq!(expire(&mut timers, 15, true).len(), 1);
        assert_eq!(timers.first(), Some(25));
        assert_eq!(expire(&mut timers, 47, true).len(), 1);
        assert_eq!(timers.first(), Some(55));
    }

    #[test]
    fn writing_0_stops() {
        let mut timers = Timers::RESET;
        timers.set_config(0, VECTOR | AUTO_ENABLE | PERIODIC, 0);
        timers.set_count(0, 10, 0);
        timers.set_count(0, 0, 5);
        assert_eq!((timers.first(), timers.config(0) & ENABLE), (None, 0));
        timers.set_count(0, 10, 0);
        timers.set_config(0, 0, 5);
        assert_eq!(timers.first(), None);
    }

    #[test]
    fn timer_without_an_aim_does_not_run() {
        let mut timers = Timers::RESET;
        timers.set_count(0, 10, 0);
        timers.set_config(0, ENABLE | PERIODIC, 0);
        assert_eq!((timers.config(0), timers.first()), (PERIODIC, None));
    }

    #[test]
    fn message_that_is_not_delivered_comes_again_unless_lazy() {
        let mut timers = Timers::RESET;
        timers.set_count(0, 10, 0);
        timers.set_config(0, SOURCE3 | ENABLE, 0);
        assert_eq!(expire(&mut timers, 11, false), [message(0, 10, 11)]);
        assert!(timers.has_undelivered());
        assert_eq!(expire(&mut timers, 12, false), [message(0, 10, 12)]);
        assert_eq!(expire(&mut timers, 13, true), [message(0, 10, 13)]);
        assert_eq!(expire(&mut timers, 14, true), []);
        timers.set_config(0, SOURCE3 | ENABLE | LAZY, 0);
        assert_eq!(expire(&mut timers, 20, false).len(), 1);
        assert_eq!(expire(&mut timers, 21, true), []);
    }

    #[test]
    fn state_goes_round() {
        let mut timers = Timers::RESET;
        timers.set_count(2, 1000, 5);
        timers.set_config(2, VECTOR | PERIODIC | ENABLE, 5);
        timers.set_count(3, 7, 5);
        timers.set_config(3, SOURCE3 | ENABLE, 5);
        let _ = expire(&mut timers, 8, false);
        let mut other = Timers::RESET;
        assert!(other.import(&timers.export(), 600));
        assert_eq!(other, timers);
        let mut bad = timers.export();
        bad[3][1] = 1 << 20;
        assert!(!other.import(&bad, 0));
        assert_eq!(other, timers);
    }

    proptest! {
        /// Whatever a guest writes, an expiry is never in the past for long, and each timer expires at most once at a time.
        #[test]
        fn any_program_is_bounded(
            writes in prop::collection::vec((0..4_usize, any::<bool>(), any::<u64>(), any::<u64>()), 0..40)
        ) {
            let mut timers = Timers::RESET;
            for (index, is_config, value, now) in writes {
                if is_config {
                    timers.set_config(index, value & WRITABLE, now);
                } else {
                    timers.set_count(index, value, now);
                }
                let all = expire(&mut timers, now, true);
                prop_assert!(all.len() <= TIMERS);
                prop_assert!(timers.first().is_none_or(|at| at > now || now == u64::MAX));
            }
        }
    }
}
