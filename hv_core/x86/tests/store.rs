// SPDX-License-Identifier: GPL-2.0
//! The decoder of doorbell stores, against encodings from an assembler and against another decoder.

use hv_x86::store::{decode_store, Mode, Source, Store};
use iced_x86::{Code, Decoder, DecoderOptions, OpKind, Register};
use proptest::prelude::*;

fn store(length: u8, size: u8, source: Source) -> Option<Store> {
    Some(Store {
        length,
        size,
        source,
    })
}

#[test]
fn stores_of_registers() {
    use Source::Register;
    let cases: [(&[u8], Mode, Option<Store>); 9] = [
        // mov %eax,(%rdx)
        (
            &[0x89, 0x02, 0xcc],
            Mode::Bits64,
            store(2, 4, Register(0, false)),
        ),
        // mov %r9w,0x10(%rax,%rbx,4)
        (
            &[0x66, 0x44, 0x89, 0x4c, 0x98, 0x10],
            Mode::Bits64,
            store(6, 2, Register(9, false)),
        ),
        // mov %rsi,0x12345678
        (
            &[0x48, 0x89, 0x34, 0x25, 0x78, 0x56, 0x34, 0x12],
            Mode::Bits64,
            store(8, 8, Register(6, false)),
        ),
        // mov %ax,0x0(%rip)
        (
            &[0x66, 0x89, 0x05, 0, 0, 0, 0],
            Mode::Bits64,
            store(7, 2, Register(0, false)),
        ),
        // mov %ah,(%rcx), and with REX it is SPL
        (&[0x88, 0x21], Mode::Bits64, store(2, 1, Register(0, true))),
        (
            &[0x40, 0x88, 0x21],
            Mode::Bits64,
            store(3, 1, Register(4, false)),
        ),
        // mov %eax,%ds:0x1234 in 16-bit code with operand prefix
        (
            &[0x66, 0x89, 0x06, 0x34, 0x12],
            Mode::Bits16,
            store(5, 4, Register(0, false)),
        ),
        // mov %cx,(%bx,%si) in 16-bit code
        (&[0x89, 0x08], Mode::Bits16, store(2, 2, Register(1, false))),
        // mov %eax,(%bx) in 32-bit code
        (
            &[0x67, 0x89, 0x07],
            Mode::Bits32,
            store(3, 4, Register(0, false)),
        ),
    ];
    for (bytes, mode, expected) in cases {
        assert_eq!(decode_store(bytes, mode), expected, "{bytes:02x?}");
    }
}

#[test]
fn stores_of_constants() {
    use Source::Immediate;
    // movw $1,(%rax)
    assert_eq!(
        decode_store(&[0x66, 0xc7, 0x00, 1, 0], Mode::Bits64),
        store(5, 2, Immediate(1))
    );
    // movq $-1,(%rax)
    let all = decode_store(&[0x48, 0xc7, 0x00, 0xff, 0xff, 0xff, 0xff], Mode::Bits64);
    assert_eq!(all, store(7, 8, Immediate(u64::MAX)));
    assert_eq!(all.map(|s| s.value(0)), Some(u64::MAX));
    // movl $-1,(%rax)
    let word = decode_store(&[0xc7, 0x00, 0xff, 0xff, 0xff, 0xff], Mode::Bits64);
    assert_eq!(word.map(|s| s.value(0)), Some(0xffff_ffff));
    // movb $0x80,8(%eax)
    assert_eq!(
        decode_store(&[0xc6, 0x40, 8, 0x80], Mode::Bits32),
        store(4, 1, Immediate(0xffff_ffff_ffff_ff80))
    );
}

#[test]
fn high_byte_registers_are_shifted() {
    let s = decode_store(&[0x88, 0x21], Mode::Bits32).expect("a store");
    assert_eq!(s.value(0x1234_5678), 0x56);
}

#[test]
fn other_instructions_and_cut_ones_are_left_alone() {
    // A load, a register move, an unknown C7 form, LOCK, REP, a store cut short, nothing.
    let cases: [&[u8]; 8] = [
        &[0x8b, 0x02],
        &[0x89, 0xc2],
        &[0xc7, 0xf8, 0, 0, 0, 0],
        &[0xf0, 0x89, 0x02],
        &[0xf3, 0xa5],
        &[0x89, 0x82, 1, 2, 3],
        &[0xc7, 0x00, 1, 2],
        &[],
    ];
    for bytes in cases {
        assert_eq!(decode_store(bytes, Mode::Bits64), None, "{bytes:02x?}");
    }
}

/// Bytes that often begin with a store: prefixes, an opcode of MOV, noise.
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
        4 => prop::sample::select(vec![0x88, 0x89, 0xc6, 0xc7]),
        1 => any::<u8>(),
    ];
    let parts = (
        prop::collection::vec(prefix, 0..4),
        opcode,
        prop::collection::vec(any::<u8>(), 0..13),
    );
    parts.prop_map(|(mut all, opcode, rest)| {
        all.push(opcode);
        all.extend(rest);
        all
    })
}

/// What another decoder makes of them, if it is a MOV to memory with a ModRM byte and without REP and the like.
fn reference(bytes: &[u8], bits: u32) -> Option<Store> {
    let mut decoder = Decoder::new(bits, bytes, DecoderOptions::NONE);
    let instruction = decoder.decode();
    let size = match instruction.code() {
        Code::Mov_rm8_r8 | Code::Mov_rm8_imm8 => 1,
        Code::Mov_rm16_r16 | Code::Mov_rm16_imm16 => 2,
        Code::Mov_rm32_r32 | Code::Mov_rm32_imm32 => 4,
        Code::Mov_rm64_r64 | Code::Mov_rm64_imm32 => 8,
        _ => return None,
    };
    // LOCK and REP, and REX prefixes that mean nothing because others follow: ours leaves these alone.
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
    let odd = prefixes.iter().any(|byte| **byte >= 0xf0)
        || prefixes.iter().rev().skip(1).any(|byte| is_rex(byte));
    if instruction.op0_kind() != OpKind::Memory || odd {
        return None;
    }
    let source = if instruction.op1_kind() == OpKind::Register {
        let register = instruction.op1_register();
        let high = matches!(
            register,
            Register::AH | Register::CH | Register::DH | Register::BH
        );
        Source::Register(register.full_register().number() as u8, high)
    } else {
        let shift = 64 - 8 * size.min(4) as u32;
        Source::Immediate(((instruction.immediate(1) << shift) as i64 >> shift) as u64)
    };
    store(instruction.len() as u8, size, source)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    #[test]
    fn another_decoder_agrees(bytes in bytes()) {
        for (mode, bits) in [(Mode::Bits16, 16), (Mode::Bits32, 32), (Mode::Bits64, 64)] {
            prop_assert_eq!(decode_store(&bytes, mode), reference(&bytes, bits), "{:02x?} {}", bytes, bits);
        }
    }
}
