// SPDX-License-Identifier: GPL-2.0
//! Fills 64 MiB of memory with numbers, then prints the SHA-256 of all of them: the same on every sound machine. Everything
//! happens in the program's own memory. Copies between kernel and user space would take Bochs minutes: with SMAP it walks the
//! page tables for each byte.

use sha2::{Digest, Sha256};

const BYTES: usize = 64 << 20;

fn main() {
    // Xorshift (Marsaglia 2003): no two words are the same.
    let mut x = 0x9e37_79b9_7f4a_7c15_u64;
    let mut memory = vec![0u8; BYTES];
    for word in memory.chunks_exact_mut(8) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        word.copy_from_slice(&x.to_le_bytes());
    }
    println!("{:x}", Sha256::digest(&memory));
}
