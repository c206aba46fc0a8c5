// SPDX-License-Identifier: GPL-2.0
//! The decoder of doorbell stores, against encodings from an assembler.

use hv_x86::store::{decode_store, Mode, Source, Store};

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

#[test]
fn no_bytes_make_it_panic() {
    let mut seed = 1u64;
    for _ in 0..200_000 {
        let mut bytes = [0u8; 16];
        for byte in &mut bytes {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            *byte = (seed >> 56) as u8;
        }
        bytes[(seed % 3) as usize] = [0x89, 0xc7, 0x88, 0xc6][(seed >> 8) as usize % 4];
        let length = (seed >> 16) as usize % 17;
        for mode in [Mode::Bits16, Mode::Bits32, Mode::Bits64] {
            if let Some(store) = decode_store(&bytes[..length], mode) {
                assert!(usize::from(store.length) <= length);
            }
        }
    }
}
