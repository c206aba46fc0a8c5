// SPDX-License-Identifier: GPL-2.0
//! The guest: loops around one instruction each, between two readings of the TSC.

use vmwp::layout::SLEEP_CONTROL_PORT;

/// GPA of the code.
pub const CODE: u64 = 0x10_0000;
/// GPA of the result, a 64-bit number of ticks.
pub const RESULT: u64 = 0x11_0000;
/// Port whose writes end in the kernel, at an eventfd.
pub const EVENT_PORT: u16 = 0x510;
/// Port whose writes go to user space, where nothing is.
const EMPTY_PORT: u16 = 0x520;
/// GPA where nothing is.
const EMPTY_GPA: u32 = 0xd000_0000;
/// Exits in one run: short enough to fit between two ticks of the host's timer.
pub const EXITS: u32 = 200;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Row {
    /// No exit: what the loop itself costs.
    Loop,
    /// CPUID leaf 0.
    Cpuid,
    /// A hypercall with a code that nobody has.
    Hypercall,
    /// RDMSR of the microcode revision.
    MsrRead,
    /// OUT that signals an eventfd.
    PortEvent,
    /// OUT that goes to user space and back.
    PortUser,
    /// A store that goes to user space and back.
    MemoryUser,
}

impl Row {
    /// All, in the order of the table.
    pub const ALL: [Row; 7] = [
        Row::Loop,
        Row::Cpuid,
        Row::Hypercall,
        Row::MsrRead,
        Row::PortEvent,
        Row::PortUser,
        Row::MemoryUser,
    ];

    /// Name in the table.
    pub fn name(self) -> &'static str {
        match self {
            Row::Loop => "loop",
            Row::Cpuid => "cpuid",
            Row::Hypercall => "unknown_hypercall",
            Row::MsrRead => "msr_read",
            Row::PortEvent => "port_to_kernel",
            Row::PortUser => "port_to_user",
            Row::MemoryUser => "mmio_to_user",
        }
    }

    /// The instruction; RAX, RBX, RCX and RDX are scratch.
    fn instruction(self, amd: bool) -> Vec<u8> {
        match self {
            Row::Loop => vec![0x90],
            Row::Cpuid => vec![0x0f, 0xa2],
            Row::Hypercall if amd => vec![0x0f, 0x01, 0xd9],
            Row::Hypercall => vec![0x0f, 0x01, 0xc1],
            Row::MsrRead => vec![0x0f, 0x32],
            // OUT DX, AL.
            Row::PortEvent | Row::PortUser => vec![0xee],
            // MOV [RBX], EAX.
            Row::MemoryUser => vec![0x89, 0x03],
        }
    }

    /// RAX, RBX, RCX and RDX before the instruction.
    fn registers(self) -> [u32; 4] {
        match self {
            Row::Loop | Row::Cpuid => [0; 4],
            // Bits 15:0 of the control are the code; no such code exists on Hyper-V, and no such number in KVM.
            Row::Hypercall => [0x7fff, 0, 0x7fff, 0],
            Row::MsrRead => [0, 0, 0x8b, 0],
            Row::PortEvent => [0, 0, 0, EVENT_PORT.into()],
            Row::PortUser => [0, 0, 0, EMPTY_PORT.into()],
            Row::MemoryUser => [0, EMPTY_GPA, 0, 0],
        }
    }

    /// 64-bit code for CODE: writes the ticks of [`EXITS`] rounds to RESULT and powers off.
    pub fn code(self, amd: bool) -> Vec<u8> {
        let mut code = vec![0xbe]; // mov esi, EXITS
        code.extend(EXITS.to_le_bytes());
        code.extend(READ_TSC_TO_RDI);
        let top = code.len();
        let [a, b, c, d] = self.registers();
        for (opcode, value) in [(0xb8, a), (0xbb, b), (0xb9, c), (0xba, d)] {
            code.push(opcode); // mov e?x, value
            code.extend(value.to_le_bytes());
        }
        code.extend(self.instruction(amd));
        code.extend([0xff, 0xce]); // dec esi
        let back = top as i64 - (code.len() as i64 + 2);
        code.extend([0x75, back as i8 as u8]); // jnz top
        code.extend([0x49, 0x89, 0xf8]); // mov r8, rdi
        code.extend(READ_TSC_TO_RDI);
        code.extend([0x4c, 0x29, 0xc7]); // sub rdi, r8
        code.extend([0x48, 0x89, 0x3c, 0x25]); // mov [RESULT], rdi
        code.extend((RESULT as u32).to_le_bytes());
        code.push(0xba); // mov edx, SLEEP_CONTROL_PORT
        code.extend(u32::from(SLEEP_CONTROL_PORT).to_le_bytes());
        // mov al, sleep type S5 with sleep enable; out dx, al
        code.extend([0xb0, vmwp::layout::S5 << 2 | 1 << 5, 0xee]);
        code
    }
}

/// rdtsc; shl rdx, 32; or rax, rdx; mov rdi, rax
const READ_TSC_TO_RDI: [u8; 12] = [
    0x0f, 0x31, 0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0, 0x48, 0x89, 0xc7,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loop_jumps_back_to_its_first_instruction() {
        for row in Row::ALL {
            let code = row.code(true);
            let top = 5 + READ_TSC_TO_RDI.len();
            let jump = code.windows(2).position(|w| w == [0xff, 0xce]).unwrap() + 2;
            assert_eq!(code[jump], 0x75);
            let target = jump as i64 + 2 + i64::from(code[jump + 1] as i8);
            assert_eq!(target, top as i64, "{row:?}");
            assert_eq!(code[top], 0xb8);
        }
    }
}
