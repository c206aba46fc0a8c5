// SPDX-License-Identifier: GPL-2.0
//! The APIC timer as a function of the guest's TSC (SDM vol 3, 12.5.4).
//!
//! There is no clock in here. Time comes in as the guest's TSC and the next expiry goes out as a TSC
//! value. Between them the timer counts *bus ticks* since the TSC value at which it was started, in
//! whole numbers: a periodic timer adds its period to the expiry before, so that neither late calls
//! nor the conversion to TSC make it drift.

/// `value * multiplier / 2^shift`, the multiplier having 64 significant bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ratio {
    multiplier: u64,
    shift: u32,
}

impl Ratio {
    /// 1 / 1.
    const ONE: Self = Self {
        multiplier: 1 << 63,
        shift: 63,
    };

    /// `numerator / denominator`, rounded up to 64 significant bits; `None` if either is 0.
    ///
    /// Up, so that whole results come out whole: 12 TSC ticks at 1/12 are one bus tick, not none.
    const fn new(numerator: u64, denominator: u64) -> Option<Self> {
        // Long division, bit by bit: `u128 / u64` would need a library function.
        let (Some(mut multiplier), Some(rest)) = (
            numerator.checked_div(denominator),
            numerator.checked_rem(denominator),
        ) else {
            return None;
        };
        if numerator == 0 {
            return None;
        }
        let mut rest = rest as u128;
        let divisor = denominator as u128;
        let mut shift = 0_u32;
        while multiplier >> 63 == 0 && shift < 127 {
            rest <<= 1;
            multiplier <<= 1;
            if rest >= divisor {
                rest = rest.wrapping_sub(divisor);
                multiplier |= 1;
            }
            shift = shift.wrapping_add(1);
        }
        if rest != 0 {
            multiplier = multiplier.saturating_add(1);
        }
        Some(Self { multiplier, shift })
    }

    /// Rounds down; stays at `u64::MAX` if the result does not fit.
    #[inline]
    const fn apply(self, value: u64) -> u64 {
        let product = (value as u128).wrapping_mul(self.multiplier as u128) >> self.shift;
        if product >> 64 != 0 {
            u64::MAX
        } else {
            product as u64
        }
    }
}

/// Relation between the guest's TSC and the timer's bus clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimerClock {
    to_bus: Ratio,
    to_tsc: Ratio,
}

impl TimerClock {
    /// Bus clock that Hyper-V shows in `HV_X64_MSR_APIC_FREQUENCY`, in Hz.
    pub const HYPERV_APIC_HZ: u64 = 200_000_000;

    /// TSC and bus at the same speed.
    pub const SAME: Self = Self {
        to_bus: Ratio::ONE,
        to_tsc: Ratio::ONE,
    };

    /// `None` if a frequency is 0. Both in Hz; the bus may be the faster one.
    #[must_use]
    pub const fn new(tsc_hz: u64, apic_hz: u64) -> Option<Self> {
        match (Ratio::new(apic_hz, tsc_hz), Ratio::new(tsc_hz, apic_hz)) {
            (Some(to_bus), Some(to_tsc)) => Some(Self { to_bus, to_tsc }),
            _ => None,
        }
    }

    /// Bus ticks in `tsc` TSC ticks, rounded down.
    #[inline]
    #[must_use]
    pub const fn bus_ticks(self, tsc: u64) -> u64 {
        self.to_bus.apply(tsc)
    }

    /// Least number of TSC ticks that are `bus` bus ticks by [`Self::bus_ticks`].
    #[must_use]
    pub const fn tsc_ticks(self, bus: u64) -> u64 {
        let mut tsc = self.to_tsc.apply(bus);
        // Each ratio is off by less than 2^-63, so the estimate is off by two at most.
        let mut tries = 0_u32;
        while tries < 4 && self.bus_ticks(tsc) < bus {
            tsc = tsc.saturating_add(1);
            tries = tries.wrapping_add(1);
        }
        while tries < 8 && tsc != 0 && self.bus_ticks(tsc.wrapping_sub(1)) >= bus {
            tsc = tsc.wrapping_sub(1);
            tries = tries.wrapping_add(1);
        }
        tsc
    }
}

/// Timer mode, LVT timer bits 18:17 (SDM vol 3, figure 12-8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimerMode {
    /// Counts down once.
    OneShot,
    /// Counts down and starts again.
    Periodic,
    /// Waits for the TSC to reach IA32_TSC_DEADLINE.
    TscDeadline,
    /// Encoding 3: never fires.
    Reserved,
}

impl TimerMode {
    /// Decodes an LVT timer register.
    #[inline]
    #[must_use]
    pub const fn from_lvt(lvt: u32) -> Self {
        match (lvt >> 17) & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::Reserved,
        }
    }

    /// One-shot or periodic: the mode in which the counter registers work.
    #[inline]
    #[must_use]
    pub const fn counts(self) -> bool {
        matches!(self, Self::OneShot | Self::Periodic)
    }
}

/// The divide configuration register's bits that exist (SDM vol 3, figure 12-10).
pub const DIVIDE_BITS: u32 = 0b1011;

/// State of the timer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timer {
    clock: TimerClock,
    mode: TimerMode,
    /// Initial-count register.
    initial: u32,
    /// Divide configuration register.
    divide: u32,
    armed: bool,
    /// TSC at which bus ticks count from.
    base: u64,
    /// Bus ticks after `base` at which the counter reaches 0.
    target: u64,
    /// TSC value of the next expiry; derived from `base` and `target` in the counting modes.
    deadline: u64,
}

impl Timer {
    /// Power-on state: stopped, one-shot, divide by 2.
    pub(super) const fn new(clock: TimerClock) -> Self {
        Self {
            clock,
            mode: TimerMode::OneShot,
            initial: 0,
            divide: 0,
            armed: false,
            base: 0,
            target: 0,
            deadline: 0,
        }
    }

    /// Back to power-on state.
    pub(super) fn reset(&mut self) {
        *self = Self::new(self.clock);
    }

    /// Binary logarithm of the divisor, 0 to 7.
    #[inline]
    const fn shift(&self) -> u32 {
        let code = (self.divide & 3) | ((self.divide >> 1) & 4);
        code.wrapping_add(1) & 7
    }

    /// Bus ticks in `count` timer ticks.
    #[inline]
    const fn ticks(&self, count: u32) -> u64 {
        (count as u64) << self.shift()
    }

    pub(super) const fn initial(&self) -> u32 {
        self.initial
    }

    pub(super) const fn divide(&self) -> u32 {
        self.divide
    }

    /// TSC value of the next expiry.
    #[inline]
    pub(super) const fn deadline(&self) -> Option<u64> {
        if self.armed {
            Some(self.deadline)
        } else {
            None
        }
    }

    /// Starts counting `bus` ticks at `now`.
    fn start(&mut self, bus: u64, now: u64) {
        self.base = now;
        self.target = bus;
        self.armed = bus != 0;
        self.set_deadline();
    }

    fn set_deadline(&mut self) {
        self.deadline = self.base.saturating_add(self.clock.tsc_ticks(self.target));
    }

    fn stop(&mut self) {
        self.armed = false;
        self.deadline = 0;
    }

    /// Bus ticks since `base`. A TSC that went backwards counts as standing still.
    #[inline]
    fn elapsed(&self, now: u64) -> u64 {
        self.clock.bus_ticks(now.saturating_sub(self.base))
    }

    /// The target of the first period that ends after `elapsed`.
    fn next_target(&self, elapsed: u64) -> u64 {
        let period = self.ticks(self.initial).max(1);
        let late = elapsed.saturating_sub(self.target);
        let missed = if late < period {
            0
        } else {
            late.checked_div(period).unwrap_or(0)
        };
        self.target
            .saturating_add(period.saturating_mul(missed.saturating_add(1)))
    }

    /// Write to the initial-count register (SDM vol 3, 12.5.4). 0 stops. The caller has called
    /// [`Self::expire`] before, as for all other changes.
    pub(super) fn write_initial(&mut self, count: u32, now: u64) {
        if self.mode.counts() {
            self.initial = count;
            self.start(self.ticks(count), now);
        }
    }

    /// Write to the divide configuration register: the count goes on from where it is, at the new speed.
    pub(super) fn write_divide(&mut self, value: u32, now: u64) {
        let count = self.current(now);
        self.divide = value & DIVIDE_BITS;
        if self.armed && self.mode.counts() {
            self.start(self.ticks(count), now);
        }
    }

    /// Changes the mode. One-shot and periodic share the running count; every other change stops the
    /// timer (SDM vol 3, 12.5.4.1).
    pub(super) fn set_mode(&mut self, mode: TimerMode) {
        if mode != self.mode && !(mode.counts() && self.mode.counts()) {
            self.stop();
            self.initial = 0;
        }
        self.mode = mode;
    }

    /// Current-count register at `now`. Reads 0 in TSC-deadline mode.
    pub(super) fn current(&self, now: u64) -> u32 {
        if !self.armed || !self.mode.counts() {
            return 0;
        }
        let elapsed = self.elapsed(now);
        let target = if elapsed < self.target {
            self.target
        } else if self.mode == TimerMode::Periodic {
            self.next_target(elapsed)
        } else {
            return 0;
        };
        // A started tick shows the value it began with.
        let left = target.saturating_sub(elapsed);
        let unit = self.ticks(1);
        let count = left.saturating_add(unit.wrapping_sub(1)) >> self.shift();
        u32::try_from(count).unwrap_or(u32::MAX).min(self.initial)
    }

    /// Read of IA32_TSC_DEADLINE: 0 when disarmed or past.
    pub(super) fn tsc_deadline(&self, now: u64) -> u64 {
        if self.mode == TimerMode::TscDeadline && self.armed && now < self.deadline {
            self.deadline
        } else {
            0
        }
    }

    /// Write of IA32_TSC_DEADLINE; ignored in the other modes (SDM vol 3, 12.5.4.1).
    #[inline]
    pub(super) fn write_tsc_deadline(&mut self, deadline: u64) {
        if self.mode == TimerMode::TscDeadline {
            self.deadline = deadline;
            self.armed = deadline != 0;
        }
    }

    /// Takes note of an expiry at or before `now`: true if there was one (or several: they coalesce).
    /// A periodic timer is armed for the first multiple of its period after `now`.
    pub(super) fn expire(&mut self, now: u64) -> bool {
        if !self.armed || now < self.deadline {
            return false;
        }
        if self.mode == TimerMode::Periodic {
            self.target = self.next_target(self.elapsed(now));
            self.set_deadline();
            if self.deadline <= now {
                // Only if the arithmetic saturated, that is never within a machine's life.
                self.start(self.ticks(self.initial), now);
            }
        } else {
            self.stop();
        }
        true
    }

    /// The TSC jumped from `before` to `after`: what is left of the count stays. The TSC deadline is
    /// an absolute value and does not move.
    pub(super) fn tsc_changed(&mut self, before: u64, after: u64) {
        if self.armed && self.mode.counts() && before != after {
            let left = self.target.saturating_sub(self.elapsed(before)).max(1);
            self.start(left, after);
        }
    }

    /// Loads a saved state. A TSC deadline survives if the mode stays: it is not part of that state.
    pub(super) fn restore(&mut self, saved: SavedTimer, now: u64) {
        self.set_mode(saved.mode);
        self.divide = saved.divide & DIVIDE_BITS;
        if self.mode.counts() {
            self.initial = saved.initial;
            self.start(self.ticks(saved.current), now);
        }
    }
}

/// What the saved interrupt controller state holds of the timer.
#[derive(Clone, Copy)]
pub(super) struct SavedTimer {
    pub(super) mode: TimerMode,
    pub(super) initial: u32,
    pub(super) current: u32,
    pub(super) divide: u32,
}
