// SPDX-License-Identifier: GPL-2.0
//! Completion of accesses to memory-mapped devices: the instruction is decoded and done here.
//!
//! Covered are the forms that compilers and kernels use for device access: MOV in all its forms, MOVNTI, MOVZX, MOVSX,
//! MOVSXD, and one element per exit of STOS and MOVS. Anything else is an error that shows the bytes.

use super::message::{Access, MemoryIntercept, INSTRUCTION_BYTES};
use super::port::merge;
use super::reg::{Reg, RegValue};
use super::{read_virtual, write_virtual, GuestRam, Vp, VpResult};
use crate::device::MmioBus;
use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

const DIRECTION: u64 = 1 << 10;
/// Longest x86 instruction.
const LONGEST: usize = 15;

/// Performs the access and moves the VP on.
pub fn complete(
    vp: &mut dyn Vp,
    ram: &dyn GuestRam,
    bus: &MmioBus,
    i: &MemoryIntercept,
) -> VpResult<()> {
    if i.header.access == Access::Execute {
        return Err(format!(
            "instruction fetch at {:#x} from {:#x}, where there is no memory",
            i.header.rip, i.gpa
        ));
    }
    let instruction = decode(vp, ram, i)?;
    Emulation {
        vp,
        ram,
        bus,
        i,
        instruction: &instruction,
    }
    .run()
}

/// Decodes the bytes of the message; if they are none or not enough, fetches them from guest memory.
fn decode(vp: &mut dyn Vp, ram: &dyn GuestRam, i: &MemoryIntercept) -> VpResult<Instruction> {
    let decode = |bytes: &[u8]| {
        let mut decoder = Decoder::with_ip(
            i.header.bitness.into(),
            bytes,
            i.header.rip,
            DecoderOptions::NONE,
        );
        let instruction = decoder.decode();
        (decoder.last_error() == DecoderError::None).then_some(instruction)
    };
    let given = i.instruction.as_slice();
    if let Some(instruction) = decode(given) {
        return Ok(instruction);
    }
    let mut fetched = [0; INSTRUCTION_BYTES];
    let base = if i.header.bitness == 64 {
        0
    } else {
        i.header.cs.base
    };
    let n = read_virtual(
        vp,
        ram,
        base.wrapping_add(i.header.rip),
        &mut fetched[..LONGEST],
    )?;
    decode(&fetched[..n]).ok_or_else(|| unsupported(i, &fetched[..n]))
}

fn unsupported(i: &MemoryIntercept, bytes: &[u8]) -> String {
    let hex: Vec<_> = bytes.iter().map(|b| format!("{b:02x}")).collect();
    format!(
        "device access at rip {:#x} to {:#x} by an instruction that is not supported: {}",
        i.header.rip,
        i.gpa,
        hex.join(" ")
    )
}

struct Emulation<'a> {
    vp: &'a mut dyn Vp,
    ram: &'a dyn GuestRam,
    bus: &'a MmioBus,
    i: &'a MemoryIntercept,
    instruction: &'a Instruction,
}

impl Emulation<'_> {
    fn run(&mut self) -> VpResult<()> {
        let size = self.instruction.memory_size().size() as u8;
        if !matches!(size, 1 | 2 | 4 | 8) {
            return Err(self.unsupported());
        }
        match self.instruction.mnemonic() {
            Mnemonic::Mov | Mnemonic::Movnti => self.mov(size),
            Mnemonic::Movzx => self.load(size, |v, _| v),
            Mnemonic::Movsx | Mnemonic::Movsxd => self.load(size, sign_extend),
            Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => {
                self.stos(size)
            }
            Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq => {
                self.movs(size)
            }
            _ => Err(self.unsupported()),
        }
    }

    fn unsupported(&self) -> String {
        unsupported(self.i, self.i.instruction.as_slice())
    }

    fn next_rip(&self) -> (Reg, RegValue) {
        (Reg::RIP, self.instruction.next_ip().into())
    }

    fn mov(&mut self, size: u8) -> VpResult<()> {
        if self.instruction.op0_kind() != OpKind::Memory {
            return self.load(size, |v, _| v);
        }
        let value = match self.instruction.op1_kind() {
            OpKind::Register => self.read_register(self.instruction.op1_register())?,
            kind if is_immediate(kind) => self.instruction.immediate(1),
            _ => return Err(self.unsupported()),
        };
        self.bus.write(self.i.gpa, size, value);
        let next = self.next_rip();
        self.vp.set(&[next])
    }

    /// Device to register, widened by `extend`.
    fn load(&mut self, size: u8, extend: fn(u64, u8) -> u64) -> VpResult<()> {
        let register = self.instruction.op0_register();
        let (reg, high) = self.general(register)?;
        let value = extend(self.bus.read(self.i.gpa, size), size);
        let old = self.vp.get(&[reg])?[0];
        let new = if high {
            old & !0xff00 | ((value & 0xff) << 8)
        } else {
            merge(old, value, register.size() as u8)
        };
        let next = self.next_rip();
        self.vp.set(&[(reg, new.into()), next])
    }

    fn stos(&mut self, size: u8) -> VpResult<()> {
        self.string_width()?;
        let value = self.vp.get(&[Reg::RAX])?[0];
        self.bus.write(self.i.gpa, size, value);
        self.advance_string(size, &[Reg::RDI])
    }

    /// One side is the device that caused the exit, the other side may be RAM or a device too.
    fn movs(&mut self, size: u8) -> VpResult<()> {
        // SSE has a MOVSD too; it has no string operands.
        self.string_width()?;
        let to_device = self.i.header.access == Access::Write;
        let len = usize::from(size);
        let other = self.string_operand(if to_device { Reg::RSI } else { Reg::RDI })?;
        let other_gpa = self.vp.translate(other, !to_device)?;
        let mut bytes = [0; 8];
        let moved = if to_device {
            let n = read_virtual(self.vp, self.ram, other, &mut bytes[..len])?;
            let value = match other_gpa {
                Some(gpa) if n < len => self.bus.read(gpa, size),
                _ => u64::from_le_bytes(bytes),
            };
            self.bus.write(self.i.gpa, size, value);
            n == len || other_gpa.is_some()
        } else {
            bytes = self.bus.read(self.i.gpa, size).to_le_bytes();
            let n = write_virtual(self.vp, self.ram, other, &bytes[..len])?;
            if let (Some(gpa), true) = (other_gpa, n < len) {
                self.bus.write(gpa, size, u64::from_le_bytes(bytes));
            }
            n == len || other_gpa.is_some()
        };
        if !moved {
            return Err(format!(
                "string move at {:#x} to unmapped memory {other:#x}",
                self.i.header.rip
            ));
        }
        self.advance_string(size, &[Reg::RSI, Reg::RDI])
    }

    /// Address size in bytes of a string instruction.
    fn string_width(&self) -> VpResult<u8> {
        let of = |kind| match kind {
            OpKind::MemorySegSI | OpKind::MemoryESDI => Some(2),
            OpKind::MemorySegESI | OpKind::MemoryESEDI => Some(4),
            OpKind::MemorySegRSI | OpKind::MemoryESRDI => Some(8),
            _ => None,
        };
        self.instruction
            .op_kinds()
            .find_map(of)
            .ok_or_else(|| self.unsupported())
    }

    /// Linear address of the operand behind RSI or RDI.
    fn string_operand(&mut self, index: Reg) -> VpResult<u64> {
        let segment = if index == Reg::RSI {
            self.instruction.memory_segment()
        } else {
            Register::ES
        };
        let long = self.i.header.bitness == 64;
        let base = match segment {
            Register::FS => self.vp.segment(Reg::FS)?.base,
            Register::GS => self.vp.segment(Reg::GS)?.base,
            _ if long => 0,
            Register::ES => self.vp.segment(Reg::ES)?.base,
            Register::CS => self.i.header.cs.base,
            Register::SS => self.vp.segment(Reg::SS)?.base,
            _ => self.vp.segment(Reg::DS)?.base,
        };
        let offset = self.vp.get(&[index])?[0] & width_mask(self.string_width()?);
        let linear = base.wrapping_add(offset);
        Ok(if long { linear } else { linear & 0xffff_ffff })
    }

    /// Moves the index registers by one element, counts RCX down, and leaves the instruction when it is done.
    fn advance_string(&mut self, size: u8, indexes: &[Reg]) -> VpResult<()> {
        let width = self.string_width()?;
        let step = if self.i.header.rflags & DIRECTION != 0 {
            u64::from(size).wrapping_neg()
        } else {
            u64::from(size)
        };
        let mut values = Vec::new();
        for index in indexes {
            let old = self.vp.get(&[*index])?[0];
            values.push((
                *index,
                merge(old, old.wrapping_add(step) & width_mask(width), width).into(),
            ));
        }
        let rep = self.instruction.has_rep_prefix() || self.instruction.has_repne_prefix();
        let mut last = true;
        if rep {
            let old = self.vp.get(&[Reg::RCX])?[0];
            let left = old.wrapping_sub(1) & width_mask(width);
            values.push((Reg::RCX, merge(old, left, width).into()));
            last = left == 0;
        }
        if last {
            values.push(self.next_rip());
        }
        self.vp.set(&values)
    }

    fn read_register(&mut self, register: Register) -> VpResult<u64> {
        let (reg, high) = self.general(register)?;
        let value = self.vp.get(&[reg])?[0];
        Ok(if high { value >> 8 } else { value })
    }

    /// The general register that holds `register`, and whether it is AH, CH, DH or BH.
    fn general(&self, register: Register) -> VpResult<(Reg, bool)> {
        if !register.is_gpr() {
            return Err(self.unsupported());
        }
        let high = matches!(
            register,
            Register::AH | Register::CH | Register::DH | Register::BH
        );
        Ok((Reg::general(register.full_register().number()), high))
    }
}

fn is_immediate(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::Immediate8
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
    )
}

fn sign_extend(value: u64, size: u8) -> u64 {
    let shift = 64 - 8 * u32::from(size);
    ((value << shift) as i64 >> shift) as u64
}

fn width_mask(bytes: u8) -> u64 {
    u64::MAX >> (64 - 8 * u32::from(bytes))
}

#[cfg(test)]
mod tests {
    use super::super::fake::{machine, FakeRam, FakeVp};
    use super::super::message::{Header, InstructionBytes};
    use super::*;
    use crate::layout::IOAPIC;
    use proptest::prelude::*;

    const WINDOW: u64 = IOAPIC + 0x10;
    const RIP: u64 = 0xffff_ffff_8100_0000;

    fn intercept(gpa: u64, access: Access, bytes: &[u8]) -> MemoryIntercept {
        let header = Header {
            bitness: 64,
            rip: RIP,
            access,
            ..Default::default()
        };
        let instruction = InstructionBytes::new(bytes);
        MemoryIntercept {
            header,
            unmapped: true,
            instruction,
            gva: None,
            gpa,
        }
    }

    /// Runs one instruction against a machine whose IOAPIC shows its version (0x170020) in the window.
    fn step(vp: &mut FakeVp, ram: &FakeRam, i: &MemoryIntercept) -> VpResult<()> {
        let m = machine();
        m.mmio.write(IOAPIC, 4, 1);
        complete(vp, ram, &m.mmio, i)
    }

    fn load(bytes: &[u8], reg: Reg, before: u64) -> u64 {
        let mut vp = FakeVp::default();
        vp.values.insert(reg.0, before);
        step(
            &mut vp,
            &FakeRam::default(),
            &intercept(WINDOW, Access::Read, bytes),
        )
        .unwrap();
        assert_eq!(vp.reg(Reg::RIP), RIP + bytes.len() as u64);
        vp.reg(reg)
    }

    #[test]
    fn loads_fill_registers_by_their_width() {
        const OLD: u64 = 0x1122_3344_5566_7788;
        // mov eax,[rdx] · mov ax,[rdx] · mov al,[rdx] · mov ah,[rdx] · mov r9d,[rdx]
        assert_eq!(load(&[0x8b, 0x02], Reg::RAX, OLD), 0x17_0020);
        assert_eq!(
            load(&[0x66, 0x8b, 0x02], Reg::RAX, OLD),
            0x1122_3344_5566_0020
        );
        assert_eq!(load(&[0x8a, 0x02], Reg::RAX, OLD), 0x1122_3344_5566_7720);
        assert_eq!(load(&[0x8a, 0x22], Reg::RAX, OLD), 0x1122_3344_5566_2088);
        assert_eq!(load(&[0x44, 0x8b, 0x0a], Reg::general(9), OLD), 0x17_0020);
        // mov eax, moffs64
        assert_eq!(
            load(&[0xa1, 1, 2, 3, 4, 5, 6, 7, 8], Reg::RAX, OLD),
            0x17_0020
        );
    }

    #[test]
    fn widening_loads_extend() {
        let mut vp = FakeVp::default();
        // movzx eax, byte [rdx] from a hole, which reads as ones
        step(
            &mut vp,
            &FakeRam::default(),
            &intercept(0xd000_0000, Access::Read, &[0x0f, 0xb6, 0x02]),
        )
        .unwrap();
        assert_eq!(vp.reg(Reg::RAX), 0xff);
        // movsx rax, byte [rdx] · movsxd rax, dword [rdx]
        for bytes in [&[0x48, 0x0f, 0xbe, 0x02][..], &[0x48, 0x63, 0x02]] {
            step(
                &mut vp,
                &FakeRam::default(),
                &intercept(0xd000_0000, Access::Read, bytes),
            )
            .unwrap();
            assert_eq!(vp.reg(Reg::RAX), u64::MAX);
        }
    }

    #[test]
    fn stores_take_registers_and_immediates() {
        let m = machine();
        let mut vp = FakeVp::default();
        vp.values.insert(Reg::RCX.0, 0x0011);
        // mov [rdx], ecx selects register 0x11, mov dword [rdx], imm32 writes it, mov [rdx], ch selects 0
        let ram = FakeRam::default();
        complete(
            &mut vp,
            &ram,
            &m.mmio,
            &intercept(IOAPIC, Access::Write, &[0x89, 0x0a]),
        )
        .unwrap();
        let store = [0xc7, 0x02, 0, 0, 0, 0x42];
        complete(
            &mut vp,
            &ram,
            &m.mmio,
            &intercept(WINDOW, Access::Write, &store),
        )
        .unwrap();
        assert_eq!(m.mmio.read(WINDOW, 4), 0x4200_0000);
        complete(
            &mut vp,
            &ram,
            &m.mmio,
            &intercept(IOAPIC, Access::Write, &[0x88, 0x2a]),
        )
        .unwrap();
        assert_eq!(m.mmio.read(IOAPIC, 4), 0);
    }

    #[test]
    fn missing_or_short_bytes_are_fetched_from_guest_memory() {
        let mut ram = FakeRam::default();
        ram.put(0x1000, &[0x8b, 0x02]);
        for given in [&[][..], &[0x8b]] {
            let mut vp = FakeVp::default();
            let mut i = intercept(WINDOW, Access::Read, given);
            i.header.rip = 0x1000;
            step(&mut vp, &ram, &i).unwrap();
            assert_eq!((vp.reg(Reg::RAX), vp.reg(Reg::RIP)), (0x17_0020, 0x1002));
        }
    }

    #[test]
    fn rep_stos_does_one_element_and_restarts_until_rcx_is_zero() {
        let mut vp = FakeVp::default();
        vp.values.extend([(Reg::RCX.0, 2), (Reg::RDI.0, 0x100)]);
        let i = intercept(0xd000_0000, Access::Write, &[0xf3, 0xab]);
        step(&mut vp, &FakeRam::default(), &i).unwrap();
        assert_eq!(
            (vp.reg(Reg::RCX), vp.reg(Reg::RDI), vp.has(Reg::RIP)),
            (1, 0x104, false)
        );
        step(&mut vp, &FakeRam::default(), &i).unwrap();
        assert_eq!(
            (vp.reg(Reg::RCX), vp.reg(Reg::RDI), vp.reg(Reg::RIP)),
            (0, 0x108, RIP + 2)
        );
    }

    #[test]
    fn movs_copies_between_device_and_memory() {
        let mut ram = FakeRam::default();
        let mut vp = FakeVp::default();
        vp.values
            .extend([(Reg::RSI.0, 0x9999), (Reg::RDI.0, 0x200)]);
        step(&mut vp, &ram, &intercept(WINDOW, Access::Read, &[0xa5])).unwrap();
        assert_eq!(ram.get(0x200, 4), 0x17_0020u32.to_le_bytes());
        assert_eq!((vp.reg(Reg::RSI), vp.reg(Reg::RDI)), (0x999d, 0x204));

        let m = machine();
        ram.put(0x300, &[1, 0, 0, 0]);
        vp.values.insert(Reg::RSI.0, 0x300);
        complete(
            &mut vp,
            &ram,
            &m.mmio,
            &intercept(IOAPIC, Access::Write, &[0xa5]),
        )
        .unwrap();
        assert_eq!(m.mmio.read(IOAPIC, 4), 1);
    }

    #[test]
    fn what_is_not_supported_shows_its_bytes() {
        let mut vp = FakeVp::default();
        // lock cmpxchg [rdx], ecx
        let i = intercept(WINDOW, Access::Write, &[0xf0, 0x0f, 0xb1, 0x0a]);
        let e = step(&mut vp, &FakeRam::default(), &i).unwrap_err();
        assert!(e.contains("f0 0f b1 0a"), "{e}");
        assert_eq!(vp.sets, 0);
    }

    #[test]
    fn a_jump_into_nowhere_is_an_error() {
        let i = intercept(0xd000_0000, Access::Execute, &[]);
        let e = step(&mut FakeVp::default(), &FakeRam::default(), &i).unwrap_err();
        assert!(e.contains("instruction fetch"), "{e}");
    }

    proptest! {
        #[test]
        fn no_instruction_panics(bytes in proptest::collection::vec(any::<u8>(), 0..16), mode in 0usize..3, write: bool) {
            let mut i = intercept(WINDOW, if write { Access::Write } else { Access::Read }, &bytes);
            i.header.bitness = [16, 32, 64][mode];
            let _ = step(&mut FakeVp::default(), &FakeRam::default(), &i);
        }
    }
}
