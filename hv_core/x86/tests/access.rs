// SPDX-License-Identifier: GPL-2.0
//! Accesses to memory: decoded against encodings from an assembler and against another decoder, performed against the processor.

use std::arch::asm;

use hv_x86::access::{decode, Access, Arithmetic, Mode, Operation, Register, Source};
use hv_x86::regs::rflags;
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind};
use proptest::prelude::*;

fn register(number: u8, high: bool) -> Source {
    Source::Register(Register { number, high })
}

fn access(length: u8, size: u8, operation: Operation) -> Option<Access> {
    Some(Access {
        length,
        size,
        operation,
    })
}

fn store(length: u8, size: u8, source: Source) -> Option<Access> {
    access(length, size, Operation::Store(source))
}

/// What a store writes.
fn stored(access: Option<Access>, rax: u64) -> Option<u64> {
    let mut registers = [0; 16];
    registers[0] = rax;
    access?.perform(0, &mut registers, &mut 0)
}

#[test]
fn stores_of_registers() {
    let cases: [(&[u8], Mode, Option<Access>); 9] = [
        // mov %eax,(%rdx)
        (
            &[0x89, 0x02, 0xcc],
            Mode::Bits64,
            store(2, 4, register(0, false)),
        ),
        // mov %r9w,0x10(%rax,%rbx,4)
        (
            &[0x66, 0x44, 0x89, 0x4c, 0x98, 0x10],
            Mode::Bits64,
            store(6, 2, register(9, false)),
        ),
        // mov %rsi,0x12345678
        (
            &[0x48, 0x89, 0x34, 0x25, 0x78, 0x56, 0x34, 0x12],
            Mode::Bits64,
            store(8, 8, register(6, false)),
        ),
        // mov %ax,0x0(%rip)
        (
            &[0x66, 0x89, 0x05, 0, 0, 0, 0],
            Mode::Bits64,
            store(7, 2, register(0, false)),
        ),
        // mov %ah,(%rcx), and with REX it is SPL
        (&[0x88, 0x21], Mode::Bits64, store(2, 1, register(0, true))),
        (
            &[0x40, 0x88, 0x21],
            Mode::Bits64,
            store(3, 1, register(4, false)),
        ),
        // mov %eax,%ds:0x1234 in 16-bit code with operand prefix
        (
            &[0x66, 0x89, 0x06, 0x34, 0x12],
            Mode::Bits16,
            store(5, 4, register(0, false)),
        ),
        // mov %cx,(%bx,%si) in 16-bit code
        (&[0x89, 0x08], Mode::Bits16, store(2, 2, register(1, false))),
        // mov %eax,(%bx) in 32-bit code
        (
            &[0x67, 0x89, 0x07],
            Mode::Bits32,
            store(3, 4, register(0, false)),
        ),
    ];
    for (bytes, mode, expected) in cases {
        assert_eq!(decode(bytes, mode), expected, "{bytes:02x?}");
    }
}

#[test]
fn stores_of_constants() {
    use Source::Immediate;
    // movw $1,(%rax)
    assert_eq!(
        decode(&[0x66, 0xc7, 0x00, 1, 0], Mode::Bits64),
        store(5, 2, Immediate(1))
    );
    // movq $-1,(%rax)
    let all = decode(&[0x48, 0xc7, 0x00, 0xff, 0xff, 0xff, 0xff], Mode::Bits64);
    assert_eq!(all, store(7, 8, Immediate(u64::MAX)));
    assert_eq!(stored(all, 0), Some(u64::MAX));
    // movl $-1,(%rax)
    let word = decode(&[0xc7, 0x00, 0xff, 0xff, 0xff, 0xff], Mode::Bits64);
    assert_eq!(stored(word, 0), Some(0xffff_ffff));
    // movb $0x80,8(%eax)
    assert_eq!(
        decode(&[0xc6, 0x40, 8, 0x80], Mode::Bits32),
        store(4, 1, Immediate(0xffff_ffff_ffff_ff80))
    );
}

#[test]
fn high_byte_registers_are_shifted() {
    let high = decode(&[0x88, 0x21], Mode::Bits32);
    assert_eq!(stored(high, 0x1234_5678), Some(0x56));
}

#[test]
fn other_instructions_and_cut_ones_are_left_alone() {
    // ADC, a register move, an unknown C7 form, LOCK with MOV and CMP, REP, a store cut short, nothing.
    let cases: [&[u8]; 9] = [
        &[0x11, 0x02],
        &[0xf0, 0x39, 0x02],
        &[0x89, 0xc2],
        &[0xc7, 0xf8, 0, 0, 0, 0],
        &[0xf0, 0x89, 0x02],
        &[0xf3, 0xa5],
        &[0x89, 0x82, 1, 2, 3],
        &[0xc7, 0x00, 1, 2],
        &[],
    ];
    for bytes in cases {
        assert_eq!(decode(bytes, Mode::Bits64), None, "{bytes:02x?}");
    }
}

#[test]
fn loads() {
    let load = |number, width, signed| Operation::Load {
        to: Register {
            number,
            high: false,
        },
        width,
        signed,
    };
    let cases: [(&[u8], Option<Access>); 5] = [
        // mov 0xfee00020,%eax as compilers write it
        (
            &[0x8b, 0x04, 0x25, 0x20, 0, 0xe0, 0xfe],
            access(7, 4, load(0, 4, false)),
        ),
        // mov (%rdx),%r11
        (&[0x4c, 0x8b, 0x1a], access(3, 8, load(11, 8, false))),
        // movabs 0xfee00020,%eax
        (
            &[0xa1, 0x20, 0, 0xe0, 0xfe, 0, 0, 0, 0],
            access(9, 4, load(0, 4, false)),
        ),
        // movzbl (%rax),%ecx
        (&[0x0f, 0xb6, 0x08], access(3, 1, load(1, 4, false))),
        // movswq (%rax),%rcx
        (&[0x48, 0x0f, 0xbf, 0x08], access(4, 2, load(1, 8, true))),
    ];
    for (bytes, expected) in cases {
        assert_eq!(decode(bytes, Mode::Bits64), expected, "{bytes:02x?}");
    }
}

#[test]
fn partial_registers_keep_the_rest() {
    let load = |bytes: &[u8]| {
        let mut registers = [0x1122_3344_5566_7788; 16];
        let access = decode(bytes, Mode::Bits64).expect("a load");
        assert_eq!(
            access.perform(0xffff_ffff_ffff_ff80, &mut registers, &mut 0),
            None
        );
        registers[0]
    };
    // mov (%rcx),%al / %ah / %ax / %eax / %rax; movsbl (%rcx),%eax
    assert_eq!(load(&[0x8a, 0x01]), 0x1122_3344_5566_7780);
    assert_eq!(load(&[0x8a, 0x21]), 0x1122_3344_5566_8088);
    assert_eq!(load(&[0x66, 0x8b, 0x01]), 0x1122_3344_5566_ff80);
    assert_eq!(load(&[0x8b, 0x01]), 0xffff_ff80);
    assert_eq!(load(&[0x48, 0x8b, 0x01]), 0xffff_ffff_ffff_ff80);
    assert_eq!(load(&[0x0f, 0xbe, 0x01]), 0xffff_ff80);
}

/// Bytes that often begin with such an access: prefixes, an opcode that is known, noise.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let prefix = prop_oneof![
        Just(0x66),
        Just(0x67),
        Just(0x2e),
        Just(0x64),
        Just(0x65),
        Just(0xf0),
        Just(0xf2),
        Just(0xf3),
        0x40..=0x4f_u8,
    ];
    let opcode = prop_oneof![
        3 => prop::sample::select(vec![0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8a, 0x8b, 0xc6, 0xc7, 0xf6, 0xf7]),
        3 => prop::sample::select(vec![0x0f, 0x80, 0x81, 0x83, 0xa0, 0xa1, 0xa2, 0xa3]),
        2 => 0..0x40_u8,
        1 => any::<u8>(),
    ];
    let second = prop_oneof![
        prop::sample::select(vec![0xb6, 0xb7, 0xbe, 0xbf]),
        any::<u8>()
    ];
    let parts = (
        prop::collection::vec(prefix, 0..4),
        opcode,
        second,
        prop::collection::vec(any::<u8>(), 0..13),
    );
    parts.prop_map(|(mut all, opcode, second, rest)| {
        all.extend([opcode, second]);
        all.extend(rest);
        all
    })
}

fn register_of(instruction: &Instruction, operand: u32) -> Option<Register> {
    use iced_x86::Register as R;
    let register = instruction.op_register(operand);
    register.is_gpr().then(|| Register {
        number: register.full_register().number() as u8,
        high: matches!(register, R::AH | R::CH | R::DH | R::BH),
    })
}

fn arithmetic(mnemonic: Mnemonic) -> Option<Arithmetic> {
    Some(match mnemonic {
        Mnemonic::Add => Arithmetic::Add,
        Mnemonic::Or => Arithmetic::Or,
        Mnemonic::And => Arithmetic::And,
        Mnemonic::Sub => Arithmetic::Subtract,
        Mnemonic::Xor => Arithmetic::Xor,
        Mnemonic::Cmp => Arithmetic::Compare,
        Mnemonic::Test => Arithmetic::Test,
        _ => return None,
    })
}

/// What another decoder makes of them, but for what ours leaves alone on purpose.
fn reference(bytes: &[u8], bits: u32) -> Option<Access> {
    let mut decoder = Decoder::new(bits, bytes, DecoderOptions::NONE);
    let instruction = decoder.decode();
    // REP, and REX prefixes that mean nothing because others follow.
    let is_rex = |byte: &u8| bits == 64 && matches!(byte, 0x40..=0x4f);
    let prefixes: Vec<_> = bytes
        .iter()
        .take_while(|byte| {
            is_rex(byte)
                || matches!(
                    byte,
                    0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3
                )
        })
        .collect();
    let code = instruction.op_code();
    if prefixes.iter().any(|byte| **byte >= 0xf2)
        || prefixes.iter().rev().skip(1).any(|byte| is_rex(byte))
        // The second names of ADD and TEST.
        || code.op_code() == 0x82
        || (instruction.mnemonic() == Mnemonic::Test && code.group_index() == 1)
    {
        return None;
    }
    let memory = |operand| instruction.op_kind(operand) == OpKind::Memory;
    let size = instruction.memory_size().size() as u8;
    let operation = if memory(0) && instruction.op_count() == 2 {
        let source = match instruction.op_kind(1) {
            OpKind::Register => Source::Register(register_of(&instruction, 1)?),
            _ => {
                let shift = 64 - 8 * u32::from(size.min(4));
                Source::Immediate(((instruction.immediate(1) << shift) as i64 >> shift) as u64)
            }
        };
        match (instruction.mnemonic(), source) {
            (Mnemonic::Mov, _) => Operation::Store(source),
            (Mnemonic::Xchg, Source::Register(register)) => Operation::Exchange(register),
            (other, _) => Operation::Change(arithmetic(other)?, source),
        }
    } else if instruction.op_count() == 2 && memory(1) {
        let to = register_of(&instruction, 0)?;
        let width = instruction.op_register(0).size() as u8;
        match instruction.mnemonic() {
            Mnemonic::Mov | Mnemonic::Movzx => Operation::Load {
                to,
                width,
                signed: false,
            },
            Mnemonic::Movsx => Operation::Load {
                to,
                width,
                signed: true,
            },
            other => Operation::Combine(arithmetic(other)?, to),
        }
    } else {
        return None;
    };
    access(instruction.len() as u8, size, operation)
}

/// The result and the flags of an instruction of the processor on two registers.
macro_rules! run {
    ($name:literal, $a:expr, $b:expr, $type:ty, $modifier:literal) => {{
        let (mut a, flags): (u64, u64) = ($a, 0);
        let mut seen = flags;
        // SAFETY: changes a register and the flags, and restores the stack.
        unsafe {
            asm!(concat!($name, " {0:", $modifier, "}, {1:", $modifier, "}"), "pushfq", "pop {2}",
                inout(reg) a, in(reg) $b, inout(reg) seen);
        }
        (a as $type as u64, seen & rflags::ARITHMETIC)
    }};
}

macro_rules! agree {
    ($what:ident, $name:literal, $a:expr, $b:expr) => {
        for (size, (value, mut flags)) in [
            (2, run!($name, $a, $b, u16, "x")),
            (4, run!($name, $a, $b, u32, "e")),
            (8, run!($name, $a, $b, u64, "r")),
        ] {
            // AF is undefined after logical instructions.
            let undefined = match Arithmetic::$what {
                Arithmetic::And | Arithmetic::Or | Arithmetic::Xor | Arithmetic::Test => rflags::AF,
                _ => 0,
            };
            flags &= !undefined;
            let source = register(3, false);
            let access =
                access(3, size, Operation::Change(Arithmetic::$what, source)).expect("an access");
            let mut registers = [0; 16];
            registers[3] = $b;
            let mut ours = rflags::TF | rflags::ARITHMETIC;
            let result = access.perform($a, &mut registers, &mut ours);
            if let Some(result) = result {
                prop_assert_eq!(result, value, "{} of {}", $name, size);
            }
            prop_assert_eq!(
                ours,
                flags | rflags::TF,
                "flags of {} of {}: {:#x} {:#x}",
                $name,
                size,
                $a,
                $b
            );
        }
    };
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8_000))]

    #[test]
    fn another_decoder_agrees(bytes in bytes()) {
        for (mode, bits) in [(Mode::Bits16, 16), (Mode::Bits32, 32), (Mode::Bits64, 64)] {
            prop_assert_eq!(decode(&bytes, mode), reference(&bytes, bits), "{:02x?} {}", bytes, bits);
        }
    }

    #[test]
    fn the_processor_agrees(a in prop_oneof![any::<u64>(), 0..3_u64, Just(0x8000_0000), Just(u64::MAX)],
                            b in prop_oneof![any::<u64>(), 0..3_u64, Just(0x7fff_ffff), Just(u64::MAX)]) {
        agree!(Add, "add", a, b);
        agree!(Or, "or", a, b);
        agree!(And, "and", a, b);
        agree!(Subtract, "sub", a, b);
        agree!(Xor, "xor", a, b);
        agree!(Compare, "cmp", a, b);
        agree!(Test, "test", a, b);
    }
}
