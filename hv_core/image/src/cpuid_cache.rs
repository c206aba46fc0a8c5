// SPDX-License-Identifier: GPL-2.0
//! The last results of CPUID in a VP, so that the common leaves need no lock, no CPUID and no rules.
#![forbid(unsafe_code)]
#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]

/// Results kept.
const ENTRIES: usize = 16;

/// Everything but leaf and subleaf that a result depends on and that changes while a VP runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Key {
    /// CR4, of which only OSXSAVE and PKE count.
    pub cr4: u64,
    /// XCR0.
    pub xcr0: u64,
    /// IA32_XSS.
    pub xss: u64,
    /// Changes of the partition that CPUID may depend on.
    pub changes: u64,
    /// Bit 0: in 64-bit mode; bit 1: the APIC is enabled.
    pub mode: u32,
}

#[derive(Clone, Copy)]
struct Entry {
    leaf: u32,
    subleaf: u32,
    result: [u32; 4],
}

/// A cache of CPUID results. With another key it is empty.
pub struct CpuidCache {
    key: Key,
    filled: u32,
    entries: [Entry; ENTRIES],
}

impl CpuidCache {
    /// An empty cache.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            key: Key {
                cr4: 0,
                xcr0: 0,
                xss: 0,
                changes: 0,
                mode: 0,
            },
            filled: 0,
            entries: [Entry {
                leaf: 0,
                subleaf: 0,
                result: [0; 4],
            }; ENTRIES],
        }
    }

    #[inline]
    const fn place(leaf: u32, subleaf: u32) -> usize {
        ((leaf ^ leaf >> 28 ^ subleaf << 2) & 0xf) as usize
    }

    /// The result of (`leaf`, `subleaf`), if it is known for this key.
    #[inline(always)]
    #[must_use]
    pub fn get(&self, key: &Key, leaf: u32, subleaf: u32) -> Option<[u32; 4]> {
        let place = Self::place(leaf, subleaf);
        let entry = self.entries.get(place)?;
        (self.filled >> place & 1 != 0
            && entry.leaf == leaf
            && entry.subleaf == subleaf
            && self.key == *key)
            .then_some(entry.result)
    }

    /// Keeps a result.
    pub fn put(&mut self, key: &Key, leaf: u32, subleaf: u32, result: [u32; 4]) {
        if self.key != *key {
            self.key = *key;
            self.filled = 0;
        }
        let place = Self::place(leaf, subleaf);
        if let Some(entry) = self.entries.get_mut(place) {
            *entry = Entry {
                leaf,
                subleaf,
                result,
            };
            self.filled |= 1 << place;
        }
    }
}

impl Default for CpuidCache {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_cache_knows_nothing_even_of_leaf_zero() {
        assert_eq!(CpuidCache::new().get(&Key::default(), 0, 0), None);
    }

    #[test]
    fn what_was_put_comes_back_for_the_same_key_only() {
        let mut cache = CpuidCache::new();
        let key = Key {
            xcr0: 7,
            ..Key::default()
        };
        cache.put(&key, 0xd, 1, [1, 2, 3, 4]);
        assert_eq!(cache.get(&key, 0xd, 1), Some([1, 2, 3, 4]));
        assert_eq!(cache.get(&key, 0xd, 0), None);
        assert_eq!(cache.get(&key, 1, 0xd), None);
        for other in [
            Key { cr4: 1, ..key },
            Key { xcr0: 3, ..key },
            Key { xss: 1, ..key },
            Key { changes: 1, ..key },
            Key { mode: 1, ..key },
        ] {
            assert_eq!(cache.get(&other, 0xd, 1), None, "{other:?}");
        }
    }

    #[test]
    fn another_key_empties_it() {
        let mut cache = CpuidCache::new();
        let (old, new) = (
            Key::default(),
            Key {
                changes: 1,
                ..Key::default()
            },
        );
        cache.put(&old, 0, 0, [1; 4]);
        cache.put(&new, 1, 0, [2; 4]);
        assert_eq!(cache.get(&new, 0, 0), None);
        assert_eq!(cache.get(&old, 0, 0), None);
        assert_eq!(cache.get(&new, 1, 0), Some([2; 4]));
    }

    #[test]
    fn two_leaves_at_one_place_do_not_mix() {
        let mut cache = CpuidCache::new();
        let key = Key::default();
        cache.put(&key, 0x10, 0, [1; 4]);
        cache.put(&key, 0x20, 0, [2; 4]);
        assert_eq!(cache.get(&key, 0x10, 0), None);
        assert_eq!(cache.get(&key, 0x20, 0), Some([2; 4]));
    }
}
