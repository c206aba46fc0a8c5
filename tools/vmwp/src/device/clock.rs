// SPDX-License-Identifier: GPL-2.0
//! The battery-backed clock of a PC (MC146818): the host's wall time in UTC, read-only.
//!
//! A guest reads it once at boot to set its own clock. There are no alarms and no interrupt.

use std::time::{SystemTime, UNIX_EPOCH};

/// Register B: 24-hour mode, binary values.
const STATUS_B: u8 = (1 << 1) | (1 << 2);
/// Register D: the battery is good.
const STATUS_D: u8 = 1 << 7;
const RAM: usize = 128;

/// The clock with its RAM.
pub struct Clock {
    index: u8,
    ram: [u8; RAM],
    now: fn() -> u64,
}

impl Default for Clock {
    fn default() -> Self {
        Clock::with_time(|| {
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |d| d.as_secs())
        })
    }
}

impl Clock {
    /// A clock that takes seconds since 1970 from `now`.
    pub fn with_time(now: fn() -> u64) -> Self {
        Clock {
            index: 0,
            ram: [0; RAM],
            now,
        }
    }

    /// Reads port 0x70 + `offset`.
    pub fn read(&self, offset: u8) -> u8 {
        if offset == 0 {
            return 0xff;
        }
        let t = Civil::from_unix((self.now)());
        match self.index {
            0x00 => t.second,
            0x02 => t.minute,
            0x04 => t.hour,
            0x06 => t.weekday,
            0x07 => t.day,
            0x08 => t.month,
            0x09 => t.year_in_century,
            0x0a => 0x26,
            0x0b => STATUS_B,
            0x0c => 0,
            0x0d => STATUS_D,
            0x32 => t.century,
            i => self.ram[usize::from(i) % RAM],
        }
    }

    /// Writes port 0x70 + `offset`. The time itself cannot be set.
    pub fn write(&mut self, offset: u8, value: u8) {
        if offset == 0 {
            // Bit 7 is the NMI mask of the chipset.
            self.index = value & 0x7f;
        } else {
            self.ram[usize::from(self.index) % RAM] = value;
        }
    }
}

/// A date as the clock shows it.
#[derive(Debug, PartialEq, Eq)]
struct Civil {
    second: u8,
    minute: u8,
    hour: u8,
    weekday: u8,
    day: u8,
    month: u8,
    year_in_century: u8,
    century: u8,
}

impl Civil {
    /// Gregorian calendar from days since 1970 (H. Hinnant, "chrono-compatible low-level date algorithms").
    fn from_unix(seconds: u64) -> Self {
        let days = seconds / 86_400;
        let in_day = seconds % 86_400;
        let z = days + 719_468;
        let era = z / 146_097;
        let doe = z % 146_097;
        let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
        let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
        let mp = (5 * doy + 2) / 153;
        let month = if mp < 10 { mp + 3 } else { mp - 9 };
        let year = yoe + era * 400 + u64::from(month <= 2);
        Civil {
            second: (in_day % 60) as u8,
            minute: (in_day / 60 % 60) as u8,
            hour: (in_day / 3600) as u8,
            weekday: ((days + 4) % 7 + 1) as u8,
            day: (doy - (153 * mp + 2) / 5 + 1) as u8,
            month: month as u8,
            year_in_century: (year % 100) as u8,
            century: (year / 100 % 100) as u8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(c: &mut Clock, index: u8) -> u8 {
        c.write(0, index | 0x80);
        c.read(1)
    }

    #[test]
    fn known_dates_are_shown() {
        // 2024-02-29 23:59:58 UTC, a Thursday.
        let mut c = Clock::with_time(|| 1_709_251_198);
        let shown: Vec<_> = [0x32, 9, 8, 7, 4, 2, 0, 6].map(|i| read(&mut c, i)).into();
        assert_eq!(shown, [20, 24, 2, 29, 23, 59, 58, 5]);
        // The epoch was a Thursday too.
        let c = Civil::from_unix(0);
        assert_eq!(
            (c.century, c.year_in_century, c.month, c.day, c.weekday),
            (19, 70, 1, 1, 5)
        );
    }

    #[test]
    fn status_says_binary_24_hours_and_no_update_in_progress() {
        let mut c = Clock::default();
        assert_eq!(read(&mut c, 0x0a) & 0x80, 0);
        assert_eq!(read(&mut c, 0x0b), 6);
        assert_eq!(read(&mut c, 0x0d), 0x80);
    }

    #[test]
    fn ram_keeps_values_and_time_ignores_them() {
        let mut c = Clock::with_time(|| 0);
        c.write(0, 0x40);
        c.write(1, 0x77);
        assert_eq!(read(&mut c, 0x40), 0x77);
        c.write(0, 0);
        c.write(1, 30);
        assert_eq!(read(&mut c, 0), 0);
    }
}
