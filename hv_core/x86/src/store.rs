// SPDX-License-Identifier: GPL-2.0
//! Decodes the instructions that drivers ring doorbells with: MOV to memory (SDM volume 2, MOV and chapter 2).
//!
//! Only what is needed to finish such a store without the VMM: how long the instruction is, how wide the store,
//! and where the value comes from. Everything else is `None`, which is always safe: the VMM emulates it.

/// Width of addresses and operands by default (SDM 3.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Real mode, or a 16-bit code segment.
    Bits16,
    /// A 32-bit code segment.
    Bits32,
    /// 64-bit mode.
    Bits64,
}

/// Where the value of a store comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// General register by number, shifted right by 8 bits if the flag is set (AH, CH, DH, BH).
    Register(u8, bool),
    /// The value itself, sign-extended to 64 bits.
    Immediate(u64),
}

/// A store to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Store {
    /// Bytes of the instruction.
    pub length: u8,
    /// Bytes written: 1, 2, 4 or 8.
    pub size: u8,
    /// The value.
    pub source: Source,
}

impl Store {
    /// The bytes that are written, zero-extended; `register` gives the value of a register that is the source.
    pub const fn value(&self, register: u64) -> u64 {
        let value = match self.source {
            Source::Register(_, false) => register,
            Source::Register(_, true) => register >> 8,
            Source::Immediate(value) => value,
        };
        match self.size {
            1 => value & 0xff,
            2 => value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        }
    }
}

/// Decodes the bytes at RIP. `None` unless they begin with a whole MOV to memory without LOCK or REP.
pub fn decode_store(bytes: &[u8], mode: Mode) -> Option<Store> {
    let mut at = 0;
    let (mut operand_prefix, mut address_prefix, mut rex) = (false, false, 0u8);
    let opcode = loop {
        let byte = *bytes.get(at)?;
        at += 1;
        match byte {
            0x66 => operand_prefix = true,
            0x67 => address_prefix = true,
            // Segment overrides: the processor reported the linear address, or the VMM does not care.
            0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 => {}
            0x40..=0x4f if mode == Mode::Bits64 => {
                rex = byte;
                break *bytes.get(at).inspect(|_| at += 1)?;
            }
            _ => break byte,
        }
    };
    let immediate = match opcode {
        0x88 | 0x89 => false,
        0xc6 | 0xc7 => true,
        _ => return None,
    };
    let size = match (opcode & 1, rex & 8 != 0, operand_prefix, mode) {
        (0, ..) => 1,
        (_, true, ..) => 8,
        (_, _, true, Mode::Bits16) | (_, _, false, Mode::Bits32 | Mode::Bits64) => 4,
        _ => 2,
    };
    let modrm = *bytes.get(at)?;
    at += 1;
    let (kind, register, memory) = (modrm >> 6, (modrm >> 3) & 7, modrm & 7);
    if kind == 3 || (immediate && register != 0) {
        return None;
    }
    let displacement = if (mode == Mode::Bits16) != (address_prefix && mode != Mode::Bits64) {
        // 16-bit addressing (SDM table 2-1).
        match (kind, memory) {
            (0, 6) | (2, _) => 2,
            (1, _) => 1,
            _ => 0,
        }
    } else {
        let mut base = memory;
        if memory == 4 {
            base = *bytes.get(at)? & 7;
            at += 1;
        }
        match (kind, base) {
            (0, 5) | (2, _) => 4,
            (1, _) => 1,
            _ => 0,
        }
    };
    at += displacement;
    let source = if immediate {
        // MOV r/m64, imm32: sign-extended.
        let width = if size == 8 { 4 } else { usize::from(size) };
        let raw = bytes.get(at..at + width)?;
        at += width;
        let mut value = if raw.last()? & 0x80 != 0 { u64::MAX } else { 0 };
        for byte in raw.iter().rev() {
            value = (value << 8) | u64::from(*byte);
        }
        Source::Immediate(value)
    } else if size == 1 && rex == 0 && register >= 4 {
        Source::Register(register - 4, true)
    } else {
        Source::Register(register | ((rex & 4) << 1), false)
    };
    // The whole instruction must be there, and 15 bytes is the limit (SDM volume 2, 2.3.11).
    if at > bytes.len() || at > 15 {
        return None;
    }
    Some(Store {
        length: at as u8,
        size,
        source,
    })
}
