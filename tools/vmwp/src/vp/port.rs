// SPDX-License-Identifier: GPL-2.0
//! Completion of IN, OUT, INS and OUTS.

use super::message::{Access, PortIntercept};
use super::reg::{Reg, RegValue};
use super::{read_virtual, write_virtual, GuestRam, Vp, VpResult};
use crate::device::{PortBus, PowerEvent};
use iced_x86::{Decoder, DecoderOptions, OpKind, Register};
use std::io::Write;

/// Elements of a string instruction that are done before the VP runs again, so that interrupts are never held long.
const BATCH: u64 = 1024;

const DIRECTION: u64 = 1 << 10;

/// Performs the access and moves the VP on. After a power event the VP is left where it is.
pub fn complete<W: Write>(
    vp: &mut dyn Vp,
    ram: &dyn GuestRam,
    ports: &PortBus<W>,
    i: &PortIntercept,
) -> VpResult<Option<PowerEvent>> {
    if !matches!(i.size, 1 | 2 | 4) {
        return Err(format!(
            "port access of {} bytes at {:#x}",
            i.size, i.header.rip
        ));
    }
    if i.string {
        return string(vp, ram, ports, i);
    }
    let next = (Reg::RIP, next_rip(i).into());
    if i.header.access == Access::Write {
        let event = ports.write(i.port, i.size, i.rax as u32);
        if event.is_none() {
            vp.set(&[next])?;
        }
        return Ok(event);
    }
    let value = u64::from(ports.read(i.port, i.size));
    vp.set(&[(Reg::RAX, merge(i.rax, value, i.size).into()), next])?;
    Ok(None)
}

/// Puts a value of `size` bytes into a register as an instruction does: 32-bit results clear the upper half.
pub fn merge(old: u64, value: u64, size: u8) -> u64 {
    match size {
        1 => old & !0xff | value & 0xff,
        2 => old & !0xffff | value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    }
}

fn next_rip(i: &PortIntercept) -> u64 {
    let next = i
        .header
        .rip
        .wrapping_add(i.header.instruction_length.into());
    if i.header.bitness == 64 {
        next
    } else {
        next & 0xffff_ffff
    }
}

/// How a string instruction addresses memory.
struct Addressing {
    /// Address size in bytes.
    size: u8,
    /// Segment of the source operand.
    source: Register,
}

/// From the instruction's bytes if they came with the message, else from the mode.
fn addressing(i: &PortIntercept) -> Addressing {
    let mut out = Addressing {
        size: i.header.bitness / 8,
        source: Register::DS,
    };
    let bytes = i.instruction.as_slice();
    if bytes.is_empty() {
        return out;
    }
    let decoded = Decoder::new(i.header.bitness.into(), bytes, DecoderOptions::NONE).decode();
    for kind in decoded.op_kinds() {
        match kind {
            OpKind::MemorySegSI | OpKind::MemoryESDI => out.size = 2,
            OpKind::MemorySegESI | OpKind::MemoryESEDI => out.size = 4,
            OpKind::MemorySegRSI | OpKind::MemoryESRDI => out.size = 8,
            _ => continue,
        }
        if matches!(
            kind,
            OpKind::MemorySegSI | OpKind::MemorySegESI | OpKind::MemorySegRSI
        ) {
            out.source = decoded.memory_segment();
        }
    }
    out
}

/// Base of the segment that INS or OUTS uses.
fn segment_base(vp: &mut dyn Vp, i: &PortIntercept, segment: Register) -> VpResult<u64> {
    let long = i.header.bitness == 64;
    Ok(match segment {
        Register::FS => vp.segment(Reg::FS)?.base,
        Register::GS => vp.segment(Reg::GS)?.base,
        _ if long => 0,
        Register::ES => i.es.base,
        Register::CS => i.header.cs.base,
        Register::SS => vp.segment(Reg::SS)?.base,
        _ => i.ds.base,
    })
}

fn string<W: Write>(
    vp: &mut dyn Vp,
    ram: &dyn GuestRam,
    ports: &PortBus<W>,
    i: &PortIntercept,
) -> VpResult<Option<PowerEvent>> {
    let out = i.header.access == Access::Write;
    let how = addressing(i);
    let mask = u64::MAX >> (64 - 8 * u32::from(how.size));
    let base = segment_base(vp, i, if out { how.source } else { Register::ES })?;
    let linear_mask = if i.header.bitness == 64 {
        u64::MAX
    } else {
        0xffff_ffff
    };
    let size = usize::from(i.size);
    let step = if i.header.rflags & DIRECTION != 0 {
        (size as u64).wrapping_neg()
    } else {
        size as u64
    };

    let (index_reg, old_index) = if out {
        (Reg::RSI, i.rsi)
    } else {
        (Reg::RDI, i.rdi)
    };
    let count = if i.rep { i.rcx & mask } else { 1 };
    let todo = count.min(BATCH);
    let mut index = old_index;
    let mut event = None;
    for _ in 0..todo {
        let gva = base.wrapping_add(index & mask) & linear_mask;
        let mut element = [0; 4];
        let element_bytes = &mut element[..size];
        let moved = if out {
            let n = read_virtual(vp, ram, gva, element_bytes)?;
            event = event.or(ports.write(i.port, i.size, u32::from_le_bytes(element)));
            n
        } else {
            element = ports.read(i.port, i.size).to_le_bytes();
            write_virtual(vp, ram, gva, &element[..size])?
        };
        if moved < size {
            return Err(format!(
                "string port access at {:#x} to unmapped memory {gva:#x}",
                i.header.rip
            ));
        }
        index = index.wrapping_add(step);
        if event.is_some() {
            return Ok(event);
        }
    }

    let mut values: Vec<(Reg, RegValue)> =
        vec![(index_reg, merge(old_index, index & mask, how.size).into())];
    if i.rep {
        values.push((
            Reg::RCX,
            merge(i.rcx, (count - todo) & mask, how.size).into(),
        ));
    }
    if todo == count {
        values.push((Reg::RIP, next_rip(i).into()));
    }
    vp.set(&values)?;
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::super::fake::{machine, FakeRam, FakeVp};
    use super::super::message::{Header, InstructionBytes};
    use super::*;
    use crate::layout::{SLEEP_CONTROL_PORT, UART_PORT};

    const SCRATCH: u16 = UART_PORT + 7;

    fn access(access: Access, port: u16, size: u8) -> PortIntercept {
        let header = Header {
            bitness: 64,
            instruction_length: 1,
            rip: 0x1000,
            access,
            ..Default::default()
        };
        PortIntercept {
            header,
            port,
            size,
            rax: 0x1122_3344_5566_7788,
            ..Default::default()
        }
    }

    #[test]
    fn out_reaches_the_device_and_moves_on() {
        let (m, mut vp, ram) = (machine(), FakeVp::default(), FakeRam::default());
        let i = access(Access::Write, SCRATCH, 1);
        assert_eq!(complete(&mut vp, &ram, &m.ports, &i), Ok(None));
        assert_eq!(m.ports.read(SCRATCH, 1), 0x88);
        assert_eq!(vp.reg(Reg::RIP), 0x1001);
        assert_eq!(vp.sets, 1);
    }

    #[test]
    fn in_keeps_or_clears_the_upper_bits_as_a_processor_does() {
        let (m, ram) = (machine(), FakeRam::default());
        for (size, rax) in [
            (1, 0x1122_3344_5566_77ff),
            (2, 0x1122_3344_5566_ffff),
            (4, 0x0000_0000_ffff_ffffu64),
        ] {
            let mut vp = FakeVp::default();
            complete(&mut vp, &ram, &m.ports, &access(Access::Read, 0x2f8, size)).unwrap();
            assert_eq!(vp.reg(Reg::RAX), rax);
        }
    }

    #[test]
    fn a_power_event_leaves_the_vp_where_it_is() {
        let (m, mut vp, ram) = (machine(), FakeVp::default(), FakeRam::default());
        let mut i = access(Access::Write, SLEEP_CONTROL_PORT, 1);
        i.rax = 0x34;
        assert_eq!(
            complete(&mut vp, &ram, &m.ports, &i),
            Ok(Some(PowerEvent::Off))
        );
        assert_eq!(vp.sets, 0);
    }

    #[test]
    fn rip_wraps_at_32_bits_outside_long_mode() {
        let (m, mut vp, ram) = (machine(), FakeVp::default(), FakeRam::default());
        let mut i = access(Access::Write, 0x80, 1);
        i.header.bitness = 32;
        i.header.rip = 0xffff_ffff;
        complete(&mut vp, &ram, &m.ports, &i).unwrap();
        assert_eq!(vp.reg(Reg::RIP), 0);
    }

    fn string_access(kind: Access, size: u8, count: Option<u64>) -> PortIntercept {
        let mut i = access(kind, SCRATCH, size);
        (i.string, i.rep, i.rcx) = (true, count.is_some(), count.unwrap_or(77));
        (i.rsi, i.rdi) = (0x2000, 0x3000);
        i
    }

    #[test]
    fn rep_outsb_writes_every_byte_and_ends_with_rcx_zero() {
        let (m, mut vp, mut ram) = (machine(), FakeVp::default(), FakeRam::default());
        ram.put(0x2000, b"abc");
        complete(
            &mut vp,
            &ram,
            &m.ports,
            &string_access(Access::Write, 1, Some(3)),
        )
        .unwrap();
        assert_eq!(m.ports.read(SCRATCH, 1), u32::from(b'c'));
        assert_eq!(
            (vp.reg(Reg::RCX), vp.reg(Reg::RSI), vp.reg(Reg::RIP)),
            (0, 0x2003, 0x1001)
        );
    }

    #[test]
    fn insb_without_rep_leaves_rcx_alone() {
        let (m, mut vp, ram) = (machine(), FakeVp::default(), FakeRam::default());
        m.ports.write(SCRATCH, 1, 0x5a);
        complete(
            &mut vp,
            &ram,
            &m.ports,
            &string_access(Access::Read, 1, None),
        )
        .unwrap();
        assert_eq!(ram.get(0x3000, 1), [0x5a]);
        assert_eq!((vp.reg(Reg::RDI), vp.has(Reg::RCX)), (0x3001, false));
    }

    #[test]
    fn the_direction_flag_counts_down() {
        let (m, mut vp, ram) = (machine(), FakeVp::default(), FakeRam::default());
        let mut i = string_access(Access::Read, 2, Some(2));
        i.header.rflags = DIRECTION;
        complete(&mut vp, &ram, &m.ports, &i).unwrap();
        assert_eq!(vp.reg(Reg::RDI), 0x2ffc);
    }

    #[test]
    fn rep_with_zero_count_only_moves_on() {
        let (m, mut vp, ram) = (machine(), FakeVp::default(), FakeRam::default());
        complete(
            &mut vp,
            &ram,
            &m.ports,
            &string_access(Access::Write, 4, Some(0)),
        )
        .unwrap();
        assert_eq!((vp.reg(Reg::RSI), vp.reg(Reg::RIP)), (0x2000, 0x1001));
    }

    #[test]
    fn long_transfers_are_done_in_batches_that_restart() {
        let (m, mut vp, ram) = (machine(), FakeVp::default(), FakeRam::default());
        complete(
            &mut vp,
            &ram,
            &m.ports,
            &string_access(Access::Read, 1, Some(BATCH + 5)),
        )
        .unwrap();
        assert_eq!(
            (vp.reg(Reg::RCX), vp.reg(Reg::RDI), vp.has(Reg::RIP)),
            (5, 0x3000 + BATCH, false)
        );
    }

    #[test]
    fn prefixes_choose_address_size_and_segment() {
        let (m, mut vp, mut ram) = (machine(), FakeVp::default(), FakeRam::default());
        vp.segments.insert(
            Reg::FS.0,
            super::super::reg::Segment {
                base: 0x4000,
                ..Default::default()
            },
        );
        ram.put(0x4010, b"z");
        let mut i = string_access(Access::Write, 1, None);
        // fs addr32 outsb
        i.instruction = InstructionBytes::new(&[0x64, 0x67, 0x6e]);
        i.rsi = 0xdead_0000_0000_0010;
        complete(&mut vp, &ram, &m.ports, &i).unwrap();
        assert_eq!(m.ports.read(SCRATCH, 1), u32::from(b'z'));
        assert_eq!(
            vp.reg(Reg::RSI),
            0x11,
            "a 32-bit index clears the upper half"
        );
    }

    #[test]
    fn unmapped_memory_is_an_error_not_a_hang() {
        let (m, mut vp, ram) = (
            machine(),
            FakeVp {
                unmapped: Some(0x2000),
                ..Default::default()
            },
            FakeRam::default(),
        );
        let e = complete(
            &mut vp,
            &ram,
            &m.ports,
            &string_access(Access::Write, 1, None),
        )
        .unwrap_err();
        assert!(e.contains("unmapped memory 0x2000"), "{e}");
    }
}
