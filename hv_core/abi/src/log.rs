// SPDX-License-Identifier: GPL-2.0
//! The log ring: lines of text that the image writes and the root reads.
//!
//! Writers reserve bytes with one atomic addition to `head` and then store them, so that CPUs do not
//! wait for each other, not even in a fault handler. The reader (the module) keeps its own position;
//! when it lags by more than the ring's size the oldest bytes are gone and it says how many.

use core::sync::atomic::{AtomicU64, AtomicU8};

/// Bytes of text in the ring.
pub const LOG_BYTES: usize = 15 * 4096;

/// The ring as it lies in memory: one page of header, then the text.
#[repr(C, align(4096))]
pub struct LogRing {
    /// Bytes ever written; the next byte goes to `head % LOG_BYTES`.
    pub head: AtomicU64,
    reserved: [u64; 511],
    /// The text, NUL where nothing was written yet.
    pub text: [AtomicU8; LOG_BYTES],
}

const _: () = assert!(core::mem::size_of::<LogRing>() == 16 * 4096);

/// Pages of a [`LogRing`].
pub const LOG_PAGES: usize = 16;
