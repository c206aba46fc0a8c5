// SPDX-License-Identifier: GPL-2.0
//! Decodes and performs instructions with one operand in memory that is not plain memory: a doorbell, or the page of a local
//! APIC (SDM volume 2, chapters 2 to 5).
//!
//! What compilers make of an access to a register of a device: MOV and its extending forms, XCHG, and arithmetic without
//! carry-in. Everything else is `None`, which is always safe: the VMM emulates it.

use super::regs::rflags;

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

/// A general register, or its second byte (AH, CH, DH, BH).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Register {
    /// Its number: RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8...
    pub number: u8,
    /// Bits 15:8 are meant.
    pub high: bool,
}

impl Register {
    fn read(self, registers: &[u64; 16], size: u8) -> u64 {
        let value = registers.get(usize::from(self.number)).copied();
        truncate(value.unwrap_or(0) >> if self.high { 8 } else { 0 }, size)
    }

    /// Four bytes clear the upper half, fewer leave the rest alone (SDM volume 1, 3.4.1.1).
    fn write(self, registers: &mut [u64; 16], value: u64, size: u8) {
        let Some(register) = registers.get_mut(usize::from(self.number)) else {
            return;
        };
        let shift = if self.high { 8 } else { 0 };
        let kept = match size {
            1 => !(0xff << shift),
            2 => !0xffff,
            _ => 0,
        };
        *register = (*register & kept) | (truncate(value, size) << shift);
    }
}

/// The other operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A register.
    Register(Register),
    /// The value itself, sign-extended to 64 bits.
    Immediate(u64),
}

impl Source {
    /// Its low `size` bytes, zero-extended.
    pub fn value(self, registers: &[u64; 16], size: u8) -> u64 {
        match self {
            Self::Register(register) => register.read(registers, size),
            Self::Immediate(value) => truncate(value, size),
        }
    }
}

/// Arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// ADD.
    Add,
    /// OR.
    Or,
    /// AND.
    And,
    /// SUB.
    Subtract,
    /// XOR.
    Xor,
    /// CMP: a difference that only sets flags.
    Compare,
    /// TEST: an AND that only sets flags.
    Test,
}

impl Arithmetic {
    /// By bits 5:3 of the opcode or the ModRM byte; ADC and SBB are left out.
    const fn numbered(number: u8) -> Option<Self> {
        Some(match number & 7 {
            0 => Self::Add,
            1 => Self::Or,
            4 => Self::And,
            5 => Self::Subtract,
            6 => Self::Xor,
            7 => Self::Compare,
            _ => return None,
        })
    }

    const fn has_result(self) -> bool {
        !matches!(self, Self::Compare | Self::Test)
    }

    /// The result of `a` and `b`, both of `size` bytes, and its flags (SDM volume 1, 3.4.3.1; AF of the logical ones, which is
    /// undefined, is cleared).
    fn result(self, a: u64, b: u64, size: u8, flags: &mut u64) -> u64 {
        let (raw, carry, overflow) = match self {
            Self::Add => {
                let sum = truncate(a.wrapping_add(b), size);
                (sum, sum < a, !(a ^ b) & (a ^ sum))
            }
            Self::Subtract | Self::Compare => {
                let difference = a.wrapping_sub(b);
                (difference, a < b, (a ^ b) & (a ^ difference))
            }
            Self::And | Self::Test => (a & b, false, 0),
            Self::Or => (a | b, false, 0),
            Self::Xor => (a ^ b, false, 0),
        };
        let result = truncate(raw, size);
        let sign = 1 << (u32::from(size) * 8 - 1);
        let adjust = match self {
            Self::Add | Self::Subtract | Self::Compare => (a ^ b ^ result) & 0x10 != 0,
            _ => false,
        };
        let set = |on: bool, flag: u64| if on { flag } else { 0 };
        *flags = (*flags & !rflags::ARITHMETIC)
            | set(carry, rflags::CF)
            | set((result as u8).count_ones() % 2 == 0, rflags::PF)
            | set(adjust, rflags::AF)
            | set(result == 0, rflags::ZF)
            | set(result & sign != 0, rflags::SF)
            | set(overflow & sign != 0, rflags::OF);
        result
    }
}

/// What an instruction does with its operand in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// MOV to memory.
    Store(Source),
    /// MOV, MOVZX or MOVSX to `width` bytes of a register.
    Load {
        /// The register.
        to: Register,
        /// Bytes of the register that are written.
        width: u8,
        /// Whether the sign is extended.
        signed: bool,
    },
    /// XCHG.
    Exchange(Register),
    /// Arithmetic with the result in memory.
    Change(Arithmetic, Source),
    /// Arithmetic with the result in a register.
    Combine(Arithmetic, Register),
}

/// An instruction with an operand in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Bytes of the instruction.
    pub length: u8,
    /// Bytes of the operand in memory: 1, 2, 4 or 8.
    pub size: u8,
    /// What it does.
    pub operation: Operation,
}

impl Access {
    /// Whether it reads the operand in memory.
    pub const fn reads(&self) -> bool {
        !matches!(self.operation, Operation::Store(_))
    }

    /// Does it, with the operand in memory as `memory`: registers and flags are changed, and what goes to memory is returned.
    pub fn perform(&self, memory: u64, registers: &mut [u64; 16], flags: &mut u64) -> Option<u64> {
        let size = self.size;
        let memory = truncate(memory, size);
        match self.operation {
            Operation::Store(source) => Some(source.value(registers, size)),
            Operation::Load { to, width, signed } => {
                let shift = 64 - 8 * u32::from(size);
                let value = match signed {
                    true => ((memory << shift) as i64 >> shift) as u64,
                    false => memory,
                };
                to.write(registers, value, width);
                None
            }
            Operation::Exchange(register) => {
                let value = register.read(registers, size);
                register.write(registers, memory, size);
                Some(value)
            }
            Operation::Change(what, source) => {
                let result = what.result(memory, source.value(registers, size), size, flags);
                what.has_result().then_some(result)
            }
            Operation::Combine(what, register) => {
                let result = what.result(register.read(registers, size), memory, size, flags);
                if what.has_result() {
                    register.write(registers, result, size);
                }
                None
            }
        }
    }
}

/// The low `size` bytes.
const fn truncate(value: u64, size: u8) -> u64 {
    match size {
        1 => value & 0xff,
        2 => value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    }
}

/// The bytes at RIP, one after the other.
struct Bytes<'a> {
    all: &'a [u8],
    at: usize,
}

impl Bytes<'_> {
    fn next(&mut self) -> Option<u8> {
        let byte = *self.all.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    /// A constant of some bytes, sign-extended.
    fn constant(&mut self, width: u8) -> Option<u64> {
        let raw = self.all.get(self.at..self.at + usize::from(width))?;
        self.at += usize::from(width);
        let mut value = if raw.last()? & 0x80 != 0 { u64::MAX } else { 0 };
        for byte in raw.iter().rev() {
            value = (value << 8) | u64::from(*byte);
        }
        Some(value)
    }
}

/// Prefixes of an instruction.
#[derive(Default)]
struct Prefixes {
    operand: bool,
    address: bool,
    lock: bool,
    rex: u8,
}

impl Prefixes {
    /// Reads them, and the first byte of the opcode.
    fn read(bytes: &mut Bytes<'_>, mode: Mode) -> Option<(Self, u8)> {
        let mut prefixes = Self::default();
        loop {
            match bytes.next()? {
                0x66 => prefixes.operand = true,
                0x67 => prefixes.address = true,
                0xf0 => prefixes.lock = true,
                // Segment overrides: the processor reported the linear address, or the VMM does not care.
                0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 => {}
                rex @ 0x40..=0x4f if mode == Mode::Bits64 => {
                    prefixes.rex = rex;
                    return Some((prefixes, bytes.next()?));
                }
                opcode => return Some((prefixes, opcode)),
            }
        }
    }

    /// Bytes of an operand that is no single byte.
    const fn operand_size(&self, mode: Mode) -> u8 {
        match (self.rex & 8 != 0, self.operand, mode) {
            (true, ..) => 8,
            (_, true, Mode::Bits16) | (_, false, Mode::Bits32 | Mode::Bits64) => 4,
            _ => 2,
        }
    }

    const fn address_size(&self, mode: Mode) -> u8 {
        match (mode, self.address) {
            (Mode::Bits64, false) => 8,
            (Mode::Bits64, true) | (Mode::Bits32, false) | (Mode::Bits16, true) => 4,
            _ => 2,
        }
    }

    /// The register with that number in ModRM, of a byte or more.
    const fn register(&self, number: u8, byte: bool) -> Register {
        if byte && self.rex == 0 && number >= 4 {
            return Register {
                number: number - 4,
                high: true,
            };
        }
        Register {
            number: number | ((self.rex & 4) << 1),
            high: false,
        }
    }
}

/// Skips a memory operand and returns the register field before it. `None` for a register operand.
fn modrm(bytes: &mut Bytes<'_>, address_size: u8) -> Option<u8> {
    let byte = bytes.next()?;
    let (kind, register, memory) = (byte >> 6, (byte >> 3) & 7, byte & 7);
    if kind == 3 {
        return None;
    }
    let displacement = if address_size == 2 {
        // SDM volume 2, table 2-1.
        match (kind, memory) {
            (0, 6) | (2, _) => 2,
            (1, _) => 1,
            _ => 0,
        }
    } else {
        let base = if memory == 4 {
            bytes.next()? & 7
        } else {
            memory
        };
        match (kind, base) {
            (0, 5) | (2, _) => 4,
            (1, _) => 1,
            _ => 0,
        }
    };
    bytes.at += displacement;
    Some(register)
}

/// Decodes the bytes at RIP. `None` unless they begin with a whole instruction that this module knows.
pub fn decode(bytes: &[u8], mode: Mode) -> Option<Access> {
    let mut bytes = Bytes { all: bytes, at: 0 };
    let (prefixes, opcode) = Prefixes::read(&mut bytes, mode)?;
    let address_size = prefixes.address_size(mode);
    let byte = opcode & 1 == 0;
    let word = prefixes.operand_size(mode);
    let mut size = if byte { 1 } else { word };
    // Bytes of a constant of the operand's size.
    let constant = size.min(4);
    let operation = match opcode {
        0x00..=0x3b if opcode & 7 < 4 => {
            let what = Arithmetic::numbered(opcode >> 3)?;
            let register = prefixes.register(modrm(&mut bytes, address_size)?, byte);
            if opcode & 2 == 0 {
                Operation::Change(what, Source::Register(register))
            } else {
                Operation::Combine(what, register)
            }
        }
        0x80 | 0x81 | 0x83 => {
            let what = Arithmetic::numbered(modrm(&mut bytes, address_size)?)?;
            let width = if opcode == 0x83 { 1 } else { constant };
            Operation::Change(what, Source::Immediate(bytes.constant(width)?))
        }
        0x84..=0x8b => {
            let register = prefixes.register(modrm(&mut bytes, address_size)?, byte);
            match opcode & !1 {
                0x84 => Operation::Change(Arithmetic::Test, Source::Register(register)),
                0x86 => Operation::Exchange(register),
                0x88 => Operation::Store(Source::Register(register)),
                _ => Operation::Load {
                    to: register,
                    width: size,
                    signed: false,
                },
            }
        }
        0xa0..=0xa3 => {
            bytes.at += usize::from(address_size);
            let to = Register {
                number: 0,
                high: false,
            };
            match opcode & 2 {
                0 => Operation::Load {
                    to,
                    width: size,
                    signed: false,
                },
                _ => Operation::Store(Source::Register(to)),
            }
        }
        0xc6 | 0xc7 if modrm(&mut bytes, address_size)? == 0 => {
            Operation::Store(Source::Immediate(bytes.constant(constant)?))
        }
        0xf6 | 0xf7 if modrm(&mut bytes, address_size)? == 0 => Operation::Change(
            Arithmetic::Test,
            Source::Immediate(bytes.constant(constant)?),
        ),
        0x0f => {
            let opcode = bytes.next()?;
            let signed = match opcode {
                0xb6 | 0xb7 => false,
                0xbe | 0xbf => true,
                _ => return None,
            };
            size = 1 + (opcode & 1);
            Operation::Load {
                to: prefixes.register(modrm(&mut bytes, address_size)?, false),
                width: word,
                signed,
            }
        }
        _ => return None,
    };
    let may_lock = match operation {
        Operation::Exchange(_) => true,
        Operation::Change(what, _) => what.has_result(),
        _ => false,
    };
    // The whole instruction must be there, and 15 bytes is the limit (SDM volume 2, 2.3.11).
    if prefixes.lock && !may_lock || bytes.at > bytes.all.len() || bytes.at > 15 {
        return None;
    }
    Some(Access {
        length: bytes.at as u8,
        size,
        operation,
    })
}
