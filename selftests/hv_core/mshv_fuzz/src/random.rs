// SPDX-License-Identifier: GPL-2.0
//! Random numbers that a seed repeats, and values that are worth a try.

/// SplitMix64.
pub struct Random(u64);

impl Random {
    /// A sequence of its own for each pair.
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut mixed = Self(seed ^ stream.wrapping_mul(0xd134_2543_de82_ef95));
        Self(mixed.next())
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    /// True once in `n`.
    pub fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// One of them.
    pub fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }

    /// A number near an edge of something, or any.
    pub fn value(&mut self) -> u64 {
        let power = 1u64 << self.below(64);
        match self.below(10) {
            0 => 0,
            1 => u64::MAX,
            2 => power,
            3 => power.wrapping_sub(1),
            4 => power.wrapping_neg(),
            5 => self.below(16),
            6 => self.below(0x1_0000),
            7 => self.below(0x4000) << 12,
            8 => self.below(1 << 32),
            _ => self.next(),
        }
    }
}
