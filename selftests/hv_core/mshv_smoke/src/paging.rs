// SPDX-License-Identifier: GPL-2.0
//! PAE paging without long mode: the processor has four page-directory pointers, which on VT-x the hypervisor loads at writes
//! of control registers that it emulates, and when the VMM changed how the guest pages.

use std::arch::{global_asm, x86_64::__cpuid};

use mshv_bindings::*;
use mshv_smoke::machine::{self, table, Machine, Memory};

use super::Outcome;

// The guest: 16 bits, to be at 0x1000, then 32 bits, to be at 0x1100. Each `probe` writes a byte of each of the four quarters of
// its address space to port 0x10. Port 0x11 asks the VMM for another CR3, port 0x12 tells the vector of an exception.
global_asm!(
    ".pushsection .rodata",
    "paging_start_16: .code16",
    "movl $0x20, %eax", // PAE
    "movl %eax, %cr4",
    "movl $0x2000, %eax",
    "movl %eax, %cr3",
    "movl $0x80000011, %eax", // PG, ET, PE; CD and NW of the reset are gone
    "movl %eax, %cr0",
    "ljmpl $8, $0x1100",
    "paging_start_32: .code32",
    "movl $16, %eax",
    "movl %eax, %ds",
    "movl %eax, %ss",
    "movl $0x9000, %esp",
    "call 9f",
    "movl $0x2020, %eax", // the second table
    "movl %eax, %cr3",
    "call 9f",
    "movl $0x5001, 0x2028", // with another pointer, from here on
    "movl %cr4, %eax",
    "xorl $0x80, %eax", // PGE
    "movl %eax, %cr4",
    "call 9f",
    "movl $0x6001, 0x2028",
    "movl %cr4, %eax",
    "xorl $0xc0, %eax", // PGE and MCE
    "movl %eax, %cr4",
    "call 9f",
    "movl $0x4001, 0x2028",
    "movl %cr0, %eax",
    "xorl $0x40000000, %eax", // CD
    "movl %eax, %cr0",
    "invlpg 0x40009000",
    "call 9f",
    "outb %al, $0x11",
    "call 9f",
    "outb %al, $0x11",
    "call 9f",
    "movl $0x40000000, 0x201c", // a reserved bit in the last pointer
    "movl %cr4, %eax",
    "xorl $0xc0, %eax",
    "movl %eax, %cr4",
    "movb 0xc0009000, %al",
    "hlt",
    "9: movb 0x9000, %al",
    "outb %al, $0x10",
    "movb 0x40009000, %al",
    "outb %al, $0x10",
    "movb 0x80009000, %al",
    "outb %al, $0x10",
    "movb 0xc0009000, %al",
    "outb %al, $0x10",
    "ret",
    ".org paging_start_32 + 0xf0",
    "movb $13, %al",
    "jmp 8f",
    ".org paging_start_32 + 0xf8",
    "movb $14, %al",
    "8: outb %al, $0x12",
    "hlt",
    "paging_end: .code64",
    ".popsection",
    options(att_syntax)
);

extern "C" {
    static paging_start_16: u8;
    static paging_start_32: u8;
    static paging_end: u8;
}

/// GPA from which the second, third and fourth page directory map 2 MiB each, and of a fourth part with one more table.
const PARTS: u64 = 0x20_0000;

pub fn guest_pages_with_pointers() -> Outcome {
    let (first, second, end) = (
        &raw const paging_start_16,
        &raw const paging_start_32,
        &raw const paging_end,
    );
    // SAFETY: the symbols enclose bytes of this program, in this order.
    let code = |from: *const u8, to: *const u8| unsafe {
        std::slice::from_raw_parts(from, to.offset_from(from) as usize)
    };
    let machine = Machine::new(code(first, second))?;
    machine.memory.write(0x100, code(second, end));
    let parts = Memory::new(4 * PARTS as usize)?;
    machine.vm.map_user_memory(mshv_user_mem_region {
        size: 4 * PARTS,
        guest_pfn: PARTS >> 12,
        userspace_addr: parts.address(),
        flags: 3,
        ..Default::default()
    })?;
    // Memory of the code begins at 0x1000.
    let write = |address: u64, values: &[u64]| {
        for (at, value) in (address as usize - 0x1000..).step_by(8).zip(values) {
            machine.memory.write(at, &value.to_le_bytes());
        }
    };
    write(0x2000, &[0x3001, 0x4001, 0x5001, 0x6001]);
    write(0x2020, &[0x3001, 0x6001, 0x4001, 0x5001]);
    for part in 0..4 {
        // A present, writable page of 2 MiB, and a byte in it.
        write(0x3000 + 0x1000 * part, &[part * PARTS | 0x83]);
        let mark = 0xa0 + part as u8;
        match part {
            0 => machine.memory.write(0x8000, &[mark]),
            _ => parts.write(((part - 1) * PARTS) as usize + 0x9000, &[mark]),
        }
    }
    // Code and data, and gates for #GP and #PF.
    write(0x7000, &[0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff]);
    for (vector, handler) in [(13, 0x11f0), (14, 0x11f8)] {
        write(0x7100 + 8 * vector, &[handler | 8 << 16 | 0x8e00 << 32]);
    }
    machine.vcpu.set_reg(&[
        table(hv_register_name_HV_X64_REGISTER_GDTR, 0x7000, 0x17),
        table(hv_register_name_HV_X64_REGISTER_IDTR, 0x7100, 0x7f),
    ])?;
    // Nobody touched the page of this table yet.
    let late = 4 * PARTS;
    for (at, pointer) in (3 * PARTS as usize..)
        .step_by(8)
        .zip([0x3001u64, 0x5001, 0x6001, 0x4001])
    {
        parts.write(at, &pointer.to_le_bytes());
    }
    for (what, quarters, next) in [
        ("the first table", [0, 1, 2, 3], None),
        ("CR3", [0, 3, 1, 2], None),
        ("PGE", [0, 2, 1, 2], None),
        ("PGE and MCE", [0, 3, 1, 2], None),
        ("CD", [0, 1, 1, 2], Some(late)),
        ("the VMM's CR3", [0, 2, 3, 1], Some(0x2000)),
        ("the VMM's second CR3", [0, 1, 2, 3], None),
    ] {
        for (quarter, part) in quarters.into_iter().enumerate() {
            let seen = machine.next_port_write()?;
            ensure!(
                seen == (0x10, 0xa0 + part),
                "after {what}, quarter {quarter}: {seen:x?}"
            );
        }
        if let Some(cr3) = next {
            ensure!(machine.next_port_write()?.0 == 0x11, "no call");
            machine.set(&[(hv_register_name_HV_X64_REGISTER_CR3, cr3)])?;
        }
    }
    // AMD-V with nested paging has no copies of the pointers: a bad one counts when it is used.
    // SAFETY: every processor of 64 bits has CPUID.
    let amd = unsafe { __cpuid(0) }.ecx == u32::from_le_bytes(*b"cAMD");
    let vector = if amd { 14 } else { 13 };
    let seen = machine.next_port_write()?;
    ensure!(seen == (0x12, vector), "reserved bit: {seen:x?}");
    // A table that is nowhere.
    machine.set(&[(hv_register_name_HV_X64_REGISTER_CR3, 0x1000_0020)])?;
    let message = machine.next_message()?;
    let kind = machine::kind(&message);
    ensure!(
        kind == hv_message_type_HVMSG_UNMAPPED_GPA,
        "message {kind:#x}"
    );
    let gpa = message.to_memory_info()?.guest_physical_address;
    ensure!(gpa == 0x1000_0020, "GPA {gpa:#x}");
    Ok(())
}
