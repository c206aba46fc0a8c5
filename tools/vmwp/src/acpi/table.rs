// SPDX-License-Identifier: GPL-2.0
//! The frame of a system description table (ACPI 6.5, 5.2.6): header, length, checksum.

/// Who made the tables.
pub const OEM: [u8; 6] = *b"HVROOT";
const OEM_TABLE: [u8; 8] = *b"HVCHILD ";
const OEM_REVISION: u32 = 1;
const CREATOR: [u8; 4] = *b"VMWP";
const CREATOR_REVISION: u32 = 1;

const LENGTH_AT: usize = 4;
const CHECKSUM_AT: usize = 9;

/// The byte that makes the sum of all bytes zero.
pub fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, b| sum.wrapping_add(*b))
        .wrapping_neg()
}

/// A table in the making.
pub struct Table(Vec<u8>);

impl Table {
    /// A table that is a header so far.
    pub fn new(signature: &[u8; 4], revision: u8) -> Self {
        Table(Vec::new())
            .bytes(signature)
            .u32(0)
            .bytes(&[revision, 0])
            .bytes(&OEM)
            .bytes(&OEM_TABLE)
            .u32(OEM_REVISION)
            .bytes(&CREATOR)
            .u32(CREATOR_REVISION)
    }

    /// A table of a fixed size whose fields are zero so far.
    pub fn with_size(signature: &[u8; 4], revision: u8, size: usize) -> Self {
        let mut table = Self::new(signature, revision);
        table.0.resize(size, 0);
        table
    }

    /// Sets a field of a table of fixed size.
    pub fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Appends bytes.
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Appends a 32-bit field.
    pub fn u32(self, value: u32) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Appends a 64-bit field.
    pub fn u64(self, value: u64) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Fills in length and checksum.
    pub fn finish(mut self) -> Vec<u8> {
        let length = self.0.len() as u32;
        self.put(LENGTH_AT, &length.to_le_bytes());
        self.0[CHECKSUM_AT] = checksum(&self.0);
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_has_its_documented_size_and_the_sum_is_zero() {
        let t = Table::new(b"TEST", 1).bytes(&[1, 2, 3]).finish();
        assert_eq!(t.len(), 36 + 3);
        assert_eq!(t[4], 39);
        assert_eq!(checksum(&t), 0);
    }
}
