// SPDX-License-Identifier: GPL-2.0
//! A set of interrupt vectors: the 256-bit ISR, TMR and IRR (SDM vol 3, 12.8.4).

/// Lowest vector that may be delivered; 0 to 15 are illegal (SDM vol 3, 12.5.2).
pub const FIRST_VECTOR: u8 = 16;

/// 256 bits, one for each vector.
///
/// # Invariants
///
/// Bits 0 to 15 are clear, so that vector 0 can stand for "none" in the cached maxima.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VectorSet {
    words: [u64; 4],
}

impl VectorSet {
    /// The empty set.
    pub const EMPTY: Self = Self { words: [0; 4] };

    /// Splits a vector into word index and bit.
    #[inline]
    const fn place(vector: u8) -> (usize, u64) {
        ((vector >> 6) as usize, 1 << (vector & 63))
    }

    /// Adds `vector`. Illegal vectors are ignored.
    #[inline]
    pub fn insert(&mut self, vector: u8) {
        let (index, bit) = Self::place(vector);
        if vector >= FIRST_VECTOR {
            if let Some(word) = self.words.get_mut(index) {
                *word |= bit;
            }
        }
    }

    /// Takes `vector` out; true if it was in.
    #[inline]
    pub fn remove(&mut self, vector: u8) -> bool {
        let (index, bit) = Self::place(vector);
        let Some(word) = self.words.get_mut(index) else {
            return false;
        };
        let was_in = *word & bit != 0;
        *word &= !bit;
        was_in
    }

    /// Puts `vector` in or takes it out.
    #[inline]
    pub fn assign(&mut self, vector: u8, member: bool) {
        if member {
            self.insert(vector);
        } else {
            self.remove(vector);
        }
    }

    /// True if `vector` is in.
    #[inline]
    #[must_use]
    pub fn contains(&self, vector: u8) -> bool {
        let (index, bit) = Self::place(vector);
        self.words.get(index).is_some_and(|word| word & bit != 0)
    }

    /// The highest member, or 0 if there is none.
    #[inline]
    #[must_use]
    pub fn highest(&self) -> u8 {
        let [a, b, c, d] = self.words;
        let (word, base) = if d != 0 {
            (d, 192)
        } else if c != 0 {
            (c, 128)
        } else if b != 0 {
            (b, 64)
        } else {
            (a, 0)
        };
        match word.checked_ilog2() {
            Some(bit) => base | (bit as u8),
            None => 0,
        }
    }

    /// True if there is exactly one member.
    #[inline]
    #[must_use]
    pub fn is_single(&self) -> bool {
        let [a, b, c, d] = self.words;
        let ones = |word: u64| u32::from(word != 0);
        let used = ones(a)
            .wrapping_add(ones(b))
            .wrapping_add(ones(c))
            .wrapping_add(ones(d));
        used == 1 && (a | b | c | d).is_power_of_two()
    }

    /// Adds the members of 64-bit word `index`, and says for each whether it is in `level`, which
    /// replaces their membership in `tmr`. Illegal vectors are ignored.
    #[inline]
    pub(super) fn merge(&mut self, tmr: &mut Self, index: usize, new: u64, level: u64) {
        let new = if index == 0 { new & !ILLEGAL } else { new };
        if let (Some(word), Some(trigger)) = (self.words.get_mut(index), tmr.words.get_mut(index)) {
            *word |= new;
            *trigger = (*trigger & !new) | (level & new);
        }
    }

    /// The 32-bit register `index` (0 to 7) as the guest reads it (SDM vol 3, figure 12-20).
    #[inline]
    #[must_use]
    pub fn register(&self, index: usize) -> u32 {
        let word = self.words.get(index >> 1).copied().unwrap_or(0);
        if index & 1 == 0 {
            word as u32
        } else {
            (word >> 32) as u32
        }
    }

    /// All eight registers.
    #[must_use]
    pub fn to_registers(&self) -> [u32; 8] {
        let [a, b, c, d] = self.words;
        [
            a as u32,
            (a >> 32) as u32,
            b as u32,
            (b >> 32) as u32,
            c as u32,
            (c >> 32) as u32,
            d as u32,
            (d >> 32) as u32,
        ]
    }

    /// The set held by eight registers, or `None` if an illegal vector is in it.
    #[must_use]
    pub fn from_registers(registers: &[u32; 8]) -> Option<Self> {
        let [a, b, c, d, e, f, g, h] = *registers;
        let join = |low: u32, high: u32| u64::from(low) | (u64::from(high) << 32);
        let words = [join(a, b), join(c, d), join(e, f), join(g, h)];
        (u64::from(a) & ILLEGAL == 0).then_some(Self { words })
    }
}

/// Vectors 0 to 15 within word 0.
pub(super) const ILLEGAL: u64 = 0xffff;
