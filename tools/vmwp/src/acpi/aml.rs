// SPDX-License-Identifier: GPL-2.0
//! The few pieces of ACPI Machine Language (ACPI 6.5, 20.2) and of resource descriptors (6.4) that the DSDT is made of.
//!
//! Every function returns finished bytes; what contains others takes them as slices.

const ZERO_OP: u8 = 0x00;
const NAME_OP: u8 = 0x08;
const BYTE_PREFIX: u8 = 0x0a;
const DWORD_PREFIX: u8 = 0x0c;
const SCOPE_OP: u8 = 0x10;
const BUFFER_OP: u8 = 0x11;
const PACKAGE_OP: u8 = 0x12;
const EXT_PREFIX: u8 = 0x5b;
const DEVICE_OP: u8 = 0x82;

/// PkgLength (20.2.4): its own bytes count too.
fn package_length(content: usize) -> Vec<u8> {
    if content + 1 < 1 << 6 {
        return vec![(content + 1) as u8];
    }
    // More bytes carry 8 bits each behind the low 4.
    let more = (1..=3)
        .find(|n| content + 1 + n < 1 << (4 + 8 * n))
        .unwrap_or(3);
    let length = content + 1 + more;
    let mut out = vec![(more << 6) as u8 | (length & 0xf) as u8];
    out.extend((0..more).map(|i| (length >> (4 + 8 * i)) as u8));
    out
}

/// An operator, the length of what follows, and that.
fn sized(operator: &[u8], content: &[u8]) -> Vec<u8> {
    [operator, &package_length(content.len()), content].concat()
}

/// Name segments have four characters.
fn segment(name: &str) -> [u8; 4] {
    let mut out = [b'_'; 4];
    let n = name.len().min(4);
    out[..n].copy_from_slice(&name.as_bytes()[..n]);
    out
}

/// `Name (NAME, VALUE)`.
pub fn name(name: &str, value: &[u8]) -> Vec<u8> {
    [&[NAME_OP][..], &segment(name), value].concat()
}

/// `Scope (\\NAME) { … }`.
pub fn scope(name: &str, content: &[Vec<u8>]) -> Vec<u8> {
    sized(
        &[SCOPE_OP],
        &[&b"\\"[..], &segment(name), &content.concat()].concat(),
    )
}

/// `Device (NAME) { … }`.
pub fn device(name: &str, content: &[Vec<u8>]) -> Vec<u8> {
    sized(
        &[EXT_PREFIX, DEVICE_OP],
        &[&segment(name)[..], &content.concat()].concat(),
    )
}

/// `Package () { … }`.
pub fn package(elements: &[Vec<u8>]) -> Vec<u8> {
    sized(
        &[PACKAGE_OP],
        &[&[elements.len() as u8][..], &elements.concat()].concat(),
    )
}

/// A small integer.
pub fn byte(value: u8) -> Vec<u8> {
    match value {
        0 => vec![ZERO_OP],
        v => vec![BYTE_PREFIX, v],
    }
}

/// `EISAID ("PNP0501")` (19.3.4): three letters in five bits each, four hexadecimal digits.
pub fn eisa_id(id: &str) -> Vec<u8> {
    let bytes = id.as_bytes();
    debug_assert_eq!(bytes.len(), 7);
    let letters = bytes[..3]
        .iter()
        .fold(0u32, |v, c| (v << 5) | u32::from(c - 0x40));
    let digits = u32::from_str_radix(&id[3..], 16).unwrap_or_default();
    let mut out = vec![DWORD_PREFIX];
    out.extend(((letters << 16) | digits).to_be_bytes());
    out
}

/// `ResourceTemplate () { … }`: a buffer that closes with an end tag (6.4.2.9).
pub fn resources(descriptors: &[Vec<u8>]) -> Vec<u8> {
    /// A checksum of zero means "do not check".
    const END_TAG: [u8; 2] = [0x79, 0];
    let data = [&descriptors.concat()[..], &END_TAG].concat();
    sized(&[BUFFER_OP], &[byte(data.len() as u8), data].concat())
}

/// `IO (Decode16, …)` (6.4.2.5): fixed ports.
pub fn ports(first: u16, count: u8) -> Vec<u8> {
    const IO_PORT: u8 = 0x47;
    const DECODE_16: u8 = 1;
    let [low, high] = first.to_le_bytes();
    vec![IO_PORT, DECODE_16, low, high, low, high, 1, count]
}

/// `Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive)` (6.4.3.6).
pub fn edge_interrupt(line: u8) -> Vec<u8> {
    const EXTENDED_INTERRUPT: u8 = 0x89;
    const CONSUMER_EDGE: u8 = 0b11;
    vec![EXTENDED_INTERRUPT, 6, 0, CONSUMER_EDGE, 1, line, 0, 0, 0]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads a PkgLength back: the length and the bytes it took.
    fn decode(bytes: &[u8]) -> (usize, usize) {
        let more = usize::from(bytes[0] >> 6);
        let low = usize::from(bytes[0] & if more == 0 { 0x3f } else { 0xf });
        let length = (0..more).fold(low, |v, i| v | (usize::from(bytes[1 + i]) << (4 + 8 * i)));
        (length, 1 + more)
    }

    #[test]
    fn package_lengths_count_themselves_at_every_boundary() {
        for content in [0, 1, 61, 62, 63, 64, 4092, 4093, 4094, 5000, 1 << 20] {
            let bytes = package_length(content);
            assert_eq!(
                decode(&bytes),
                (content + bytes.len(), bytes.len()),
                "{content}"
            );
        }
    }

    #[test]
    fn known_encodings_are_met() {
        assert_eq!(eisa_id("PNP0501"), [0x0c, 0x41, 0xd0, 0x05, 0x01]);
        assert_eq!(eisa_id("PNP0B00"), [0x0c, 0x41, 0xd0, 0x0b, 0x00]);
        assert_eq!(name("_UID", &byte(0)), *b"\x08_UID\x00");
        assert_eq!(package(&[byte(5)]), [0x12, 4, 1, 0x0a, 5]);
        assert_eq!(device("A", &[]), *b"\x5b\x82\x05A___");
        assert_eq!(scope("_SB_", &[]), *b"\x10\x06\\_SB_");
        assert_eq!(resources(&[]), [0x11, 5, 0x0a, 2, 0x79, 0]);
    }
}
