// SPDX-License-Identifier: GPL-2.0
//! What guests run: random pieces of code around instructions that a hypervisor has to do with.

use crate::random::Random;

/// Where code starts; page tables for 64-bit mode lie before it.
pub const START: u64 = 0x4000;
/// Bytes of code.
const LENGTH: usize = 0x800;

/// Instructions, the same bytes in all modes where possible.
const PIECES: [&[u8]; 52] = [
    &[0xf4],                         // hlt
    &[0x0f, 0xa2],                   // cpuid
    &[0x0f, 0x32],                   // rdmsr
    &[0x0f, 0x30],                   // wrmsr
    &[0xee],                         // out %al, (%dx)
    &[0xef],                         // out %eax, (%dx)
    &[0xec],                         // in (%dx), %al
    &[0x6c],                         // insb
    &[0xf3, 0x6e],                   // rep outsb
    &[0xe6, 0x10],                   // out %al, $0x10
    &[0x0f, 0x01, 0xd9],             // vmmcall
    &[0x0f, 0x01, 0xc1],             // vmcall
    &[0x0f, 0x01, 0xd1],             // xsetbv
    &[0x0f, 0x01, 0xd0],             // xgetbv
    &[0x0f, 0x22, 0xc0],             // mov %eax, %cr0
    &[0x0f, 0x20, 0xc0],             // mov %cr0, %eax
    &[0x0f, 0x22, 0xd8],             // mov %eax, %cr3
    &[0x0f, 0x22, 0xe0],             // mov %eax, %cr4
    &[0x44, 0x0f, 0x22, 0xc0],       // mov %rax, %cr8
    &[0x0f, 0x23, 0xf8],             // mov %eax, %dr7
    &[0x0f, 0x21, 0xf0],             // mov %dr6, %eax
    &[0x89, 0x07],                   // mov %ax, (%bx)
    &[0x88, 0x44, 0x04],             // mov %al, 4(%si)
    &[0x8b, 0x07],                   // mov (%bx), %ax
    &[0xa4],                         // movsb
    &[0xf3, 0xaa],                   // rep stosb
    &[0xf0, 0x0f, 0xb1, 0x0f],       // lock cmpxchg %cx, (%bx)
    &[0x0f, 0x01, 0x17],             // lgdt (%bx)
    &[0x0f, 0x01, 0x1f],             // lidt (%bx)
    &[0x0f, 0x01, 0x3f],             // invlpg (%bx)
    &[0x0f, 0x01, 0xf0],             // lmsw %ax
    &[0x0f, 0x00, 0xd8],             // ltr %ax
    &[0x8e, 0xd8],                   // mov %ax, %ds
    &[0xcd, 0x03],                   // int $3
    &[0xcc],                         // int3
    &[0xcf],                         // iret
    &[0x0f, 0x0b],                   // ud2
    &[0x0f, 0x08],                   // invd
    &[0x0f, 0x09],                   // wbinvd
    &[0x0f, 0x31],                   // rdtsc
    &[0x0f, 0x33],                   // rdpmc
    &[0x0f, 0x01, 0xf9],             // rdtscp
    &[0x0f, 0x01, 0xc8],             // monitor
    &[0x0f, 0x01, 0xc9],             // mwait
    &[0x0f, 0x01, 0xd8],             // vmrun
    &[0x0f, 0xae, 0x27],             // xsave (%bx)
    &[0x0f, 0xae, 0x2f],             // xrstor (%bx)
    &[0x0f, 0xc7, 0xf0],             // rdrand %ax
    &[0xfa],                         // cli
    &[0xfb],                         // sti
    &[0x40, 0xb0, 0x33],             // mov $0x33, %al
    &[0x66, 0x0f, 0x38, 0x82, 0x07], // invpcid (%rdi), %rax
];

/// MSRs that somebody answers, or their neighbours.
const MSRS: [(u32, u32); 17] = [
    (0x10, 1),
    (0x1b, 1),
    (0x3a, 2),
    (0x48, 2),
    (0x8b, 1),
    (0xfe, 1),
    (0x122, 1),
    (0x174, 6),
    (0x1a0, 1),
    (0x1d9, 1),
    (0x200, 0x100),
    (0x600, 0x110),
    (0x800, 0x40),
    (0xda0, 1),
    (0x4000_0000, 0x120),
    (0xc000_0080, 0x84),
    (0xc001_0000, 0x140),
];

/// The number of an MSR.
pub fn msr(random: &mut Random) -> u32 {
    let (first, count) = random.of(&MSRS);
    first + random.below(count.into()) as u32
}

/// Code in random order, which ends in a loop: nothing says how a run of it ends.
pub fn code(random: &mut Random) -> Vec<u8> {
    let mut code = Vec::new();
    while code.len() < LENGTH {
        match random.below(9) {
            8 => code.extend(hypercall(random)),
            0 => {
                // mov $msr, %ecx in 16-bit mode, then in all others
                let number = msr(random).to_le_bytes();
                let wide: &[u8] = if random.once_in(2) { &[0x66] } else { &[] };
                code.extend_from_slice(wide);
                code.push(0xb9);
                code.extend_from_slice(&number);
            }
            1 => {
                // mov $x, %reg
                code.push(0xb8 + random.below(8) as u8);
                code.extend_from_slice(&random.value().to_le_bytes()[..2]);
            }
            2 => code.extend_from_slice(&random.next().to_le_bytes()[..3]),
            _ => {
                let piece = random.of(&PIECES);
                code.extend_from_slice(piece);
            }
        }
    }
    code.extend_from_slice(&[0xeb, 0xfe]);
    code
}

/// A hypercall, after the guest has named itself: the control word is in both registers that may hold it, the input anywhere.
fn hypercall(random: &mut Random) -> Vec<u8> {
    let call = random.of(&[2, 3, 8, 0xb, 0x13, 0x14, 0x15, 0x5c, 0x5d, 0x8001]);
    let control = call | random.below(2) << 16 | random.below(3) << 17;
    let wide: &[u8] = if random.once_in(2) { &[0x66] } else { &[] };
    let load = |register: u8, value: u64| {
        let immediate = (value as u32).to_le_bytes();
        [wide, &[0xb8 + register], &immediate].concat()
    };
    let instruction = random.of(&[0xd9, 0xc1]);
    [
        load(1, 0x4000_0000),
        vec![0x0f, 0x30], // wrmsr
        load(0, control),
        load(1, control),
        load(2, random.below(0x4000) & !7),
        vec![0x0f, 0x01, instruction],
    ]
    .concat()
}

/// Tables that map the lower 8 MiB to themselves in 64-bit mode, from 0x1000 to 0x3fff.
pub fn tables() -> Vec<u8> {
    let mut words = [0u64; 3 * 512];
    words[0] = 0x2007;
    words[512] = 0x3007;
    for (index, word) in words[1024..1028].iter_mut().enumerate() {
        *word = (index as u64) << 21 | 0x87;
    }
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
