// SPDX-License-Identifier: GPL-2.0
//! Counts of exits by kind, one set per VP, readable while the VP runs.

use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicU64, Ordering};

/// Kinds that are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Port access.
    Port,
    /// Memory access.
    Memory,
    /// APIC EOI.
    ApicEoi,
    /// HLT.
    Halt,
    /// Anything else.
    Other,
    /// A return without a message.
    Interrupted,
}

/// Live counters of one VP.
#[derive(Debug, Default)]
pub struct Counters([AtomicU64; 6]);

impl Counters {
    /// Counts one exit.
    #[inline]
    pub fn add(&self, kind: Kind) {
        self.0[kind as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// The values now.
    pub fn snapshot(&self, vp: u32) -> VpExits {
        let n = |kind: Kind| self.0[kind as usize].load(Ordering::Relaxed);
        VpExits {
            vp,
            port: n(Kind::Port),
            memory: n(Kind::Memory),
            apic_eoi: n(Kind::ApicEoi),
            halt: n(Kind::Halt),
            other: n(Kind::Other),
            interrupted: n(Kind::Interrupted),
        }
    }
}

/// Exits of one VP that reached user space.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VpExits {
    /// The VP.
    pub vp: u32,
    /// Port accesses.
    pub port: u64,
    /// Memory accesses.
    pub memory: u64,
    /// APIC EOIs.
    pub apic_eoi: u64,
    /// HLTs.
    pub halt: u64,
    /// Anything else.
    pub other: u64,
    /// Returns without a message.
    pub interrupted: u64,
}

impl VpExits {
    /// Name and value of each kind.
    pub fn by_kind(&self) -> [(&'static str, u64); 6] {
        [
            ("port", self.port),
            ("memory", self.memory),
            ("eoi", self.apic_eoi),
            ("halt", self.halt),
            ("other", self.other),
            ("interrupted", self.interrupted),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_counted_apart() {
        let c = Counters::default();
        c.add(Kind::Port);
        c.add(Kind::Port);
        c.add(Kind::Interrupted);
        let s = c.snapshot(1);
        assert_eq!((s.vp, s.port, s.interrupted, s.memory), (1, 2, 1, 0));
        assert_eq!(s.by_kind().iter().map(|(_, n)| n).sum::<u64>(), 3);
    }
}
