// SPDX-License-Identifier: GPL-2.0
//! The messages that a VP leaves for its VMM (`hv_message` with the payloads of `hvhdk.h`, TLFS 9.3).
//!
//! RIP, RFLAGS and CS are those before the instruction, so that it starts again unless the VMM moves past it.
//! VMMs decode the instruction by the bytes in the message, and move by its length: both have to be right.
#![forbid(unsafe_code)]
#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]

use hv_abi::partition::{access, message};
use hv_x86::regs::{cr0, efer};

use crate::arch::{gpr, IoAccess};
use crate::register_page::Shown;
use crate::synic::Sources;
use crate::vp_state::{segment, VpState};

/// A message, header and payload, as far as any of them reaches. What it does not use is zero.
pub type Message = [u64; message::WORDS];

/// HVMSG_UNSUPPORTED_FEATURE.
const UNSUPPORTED_FEATURE: u32 = 0x8000_0022;
/// HVMSG_X64_HALT.
const HALT: u32 = 0x8001_0007;
/// `HvUnsupportedFeatureIntercept`.
const FEATURE_INTERCEPT: u64 = 1;
/// `HV_CACHE_TYPE_X64_WRITE_BACK` and `_UNCACHED`.
const WRITE_BACK: u64 = 6;
const UNCACHED: u64 = 0;
/// Payload of a message begins there.
const PAYLOAD: usize = 16;
/// Size of `hv_x64_intercept_message_header`.
const HEADER: u8 = 40;
/// General registers that messages hold and that `gpr` does not name.
const RSI: usize = 6;
const RDI: usize = 7;
const CR0_AM: u64 = 1 << 18;
const RFLAGS_VM: u64 = 1 << 17;

struct Builder(Message);

impl Builder {
    #[inline(always)]
    fn new(kind: u32, payload_size: u8) -> Self {
        let mut new = Self([0; message::WORDS]);
        if let Some(word) = new.0.first_mut() {
            *word = u64::from(kind) | (u64::from(payload_size) << 32);
        }
        new
    }

    /// Puts a field of the payload at its offset in bytes. It does not cross a multiple of 8.
    #[inline(always)]
    fn put(&mut self, offset: usize, value: u64) {
        let at = offset.saturating_add(PAYLOAD);
        if let Some(word) = self.0.get_mut(at >> 3) {
            *word |= value << ((at & 7) << 3);
        }
    }

    #[inline(always)]
    fn put_pair(&mut self, offset: usize, [low, high]: [u64; 2]) {
        self.put(offset, low);
        self.put(offset.saturating_add(8), high);
    }

    #[inline(always)]
    fn put_bytes(&mut self, offset: usize, bytes: [u8; 16]) {
        let value = u128::from_le_bytes(bytes);
        self.put_pair(offset, [value as u64, (value >> 64) as u64]);
    }

    /// `hv_x64_intercept_message_header`.
    #[inline(always)]
    fn header(
        &mut self,
        vp_index: u32,
        vp: &VpState,
        shown: &Shown,
        cr8: u8,
        length: u8,
        access: u8,
    ) {
        self.put(0, vp_index.into());
        self.put(4, u64::from(length & 0xf) | (u64::from(cr8 & 0xf) << 4));
        self.put(5, access.into());
        self.put(6, execution_state(vp, shown));
        self.put_pair(8, segment_or_zero(shown, segment::CS));
        self.put(24, vp.rip);
        self.put(32, vp.rflags);
    }
}

/// Privilege level: that of SS; 3 in virtual-8086 mode, 0 in real mode.
#[must_use]
pub fn cpl(vp: &VpState) -> u8 {
    let stack = vp.segments.get(segment::SS).map_or(0, |stack| stack.rights);
    privilege(vp.cr0, vp.rflags, stack)
}

fn privilege(cr0: u64, rflags: u64, stack: u32) -> u8 {
    if cr0 & cr0::PE == 0 {
        0
    } else if rflags & RFLAGS_VM != 0 {
        3
    } else {
        (stack >> 5) as u8 & 3
    }
}

/// `hv_x64_vp_execution_state`.
#[inline(always)]
fn execution_state(vp: &VpState, shown: &Shown) -> u64 {
    let when = |on: bool, bit: u32| u64::from(on) << bit;
    let [_, stack] = segment_or_zero(shown, segment::SS);
    u64::from(privilege(shown.cr0, vp.rflags, (stack >> 48) as u32))
        | when(shown.cr0 & cr0::PE != 0, 2)
        | when(shown.cr0 & CR0_AM != 0, 3)
        | when(shown.efer & efer::LMA != 0, 4)
        // A breakpoint is armed.
        | when(shown.dr7 & 0xff != 0, 5)
        | when(vp.pending_interruption & 1 != 0, 6)
        | when(vp.interrupt_shadow, 12)
}

#[inline(always)]
fn segment_or_zero(shown: &Shown, index: usize) -> [u64; 2] {
    shown.segments.get(index).copied().unwrap_or([0; 2])
}

#[inline(always)]
fn general(vp: &VpState, index: usize) -> u64 {
    vp.context.gprs.get(index).copied().unwrap_or(0)
}

/// An access that the second-level tables refuse: UNMAPPED_GPA, or GPA_INTERCEPT if there is memory but not
/// this right to it. `access` is one of [`access`]; `gva` is the linear address of the access, if known.
#[allow(clippy::too_many_arguments)]
#[must_use]
pub fn memory(
    vp_index: u32,
    vp: &VpState,
    tpr: u8,
    mapped: bool,
    access: u8,
    gva: Option<u64>,
    gpa: u64,
    bytes: [u8; 16],
    count: u8,
) -> Message {
    let kind = if mapped {
        message::GPA_INTERCEPT
    } else {
        message::UNMAPPED_GPA
    };
    let mut new = Builder::new(kind, 80);
    // The length is unknown: the VMM decodes.
    new.header(vp_index, vp, &Shown::of(vp), tpr >> 4, 0, access);
    new.put(40, if mapped { WRITE_BACK } else { UNCACHED });
    new.put(44, count.min(16).into());
    // The GVA is valid, and it is the one that leads to the GPA.
    new.put(45, if gva.is_some() { 3 } else { 0 });
    new.put(46, u64::from(tpr >> 4));
    new.put(48, gva.unwrap_or(0));
    new.put(56, gpa);
    new.put_bytes(64, bytes);
    new.0
}

/// An access to a port. The registers in `shown` need not be in `vp`.
#[must_use]
#[inline(always)]
pub fn io_port(
    vp_index: u32,
    vp: &VpState,
    shown: &Shown,
    cr8: u8,
    io: &IoAccess,
    bytes: [u8; 16],
    count: u8,
) -> Message {
    let mut new = Builder::new(message::IO_PORT_INTERCEPT, 128);
    let access = if io.is_in {
        access::READ
    } else {
        access::WRITE
    };
    new.header(vp_index, vp, shown, cr8, io.length, access);
    new.put(40, io.port.into());
    let info = (io.size & 7) | (u8::from(io.string) << 3) | (u8::from(io.rep) << 4);
    new.put(42, info.into());
    new.put(43, count.min(16).into());
    new.put(48, general(vp, gpr::RAX));
    new.put_bytes(56, bytes);
    // OUTS may have a prefix: the segment that it names.
    let source = if io.string && !io.is_in {
        io.segment.into()
    } else {
        segment::DS
    };
    new.put_pair(72, segment_or_zero(shown, source));
    new.put_pair(88, segment_or_zero(shown, segment::ES));
    new.put(104, general(vp, gpr::RCX));
    new.put(112, general(vp, RSI));
    new.put(120, general(vp, RDI));
    new.0
}

/// RDMSR or WRMSR, only for a VMM that installed the intercept.
#[must_use]
pub fn msr(vp_index: u32, vp: &VpState, cr8: u8, length: u8, write: bool) -> Message {
    let mut new = Builder::new(message::MSR_INTERCEPT, 64);
    let access = if write { access::WRITE } else { access::READ };
    new.header(vp_index, vp, &Shown::of(vp), cr8, length, access);
    new.put(40, general(vp, gpr::RCX) & 0xffff_ffff);
    new.put(48, general(vp, gpr::RDX));
    new.put(56, general(vp, gpr::RAX));
    new.0
}

/// CPUID, only for a VMM that installed the intercept. `result` is EAX, EBX, ECX, EDX as the hypervisor would
/// answer.
#[must_use]
pub fn cpuid(vp_index: u32, vp: &VpState, cr8: u8, length: u8, result: [u32; 4]) -> Message {
    let mut new = Builder::new(message::CPUID_INTERCEPT, 104);
    new.header(vp_index, vp, &Shown::of(vp), cr8, length, access::EXECUTE);
    let [a, b, c, d] = result;
    // The message has RBX last.
    let order = [(gpr::RAX, a), (gpr::RCX, c), (gpr::RDX, d), (gpr::RBX, b)];
    for ((register, value), offset) in order.into_iter().zip([40_usize, 48, 56, 64]) {
        new.put(offset, general(vp, register));
        new.put(offset.saturating_add(32), value.into());
    }
    new.0
}

/// A triple fault.
#[must_use]
pub fn unrecoverable_exception(vp_index: u32, vp: &VpState) -> Message {
    header_only(message::UNRECOVERABLE_EXCEPTION, vp_index, vp)
}

/// HLT, only for a VMM that asked for it.
#[must_use]
pub fn halt(vp_index: u32, vp: &VpState) -> Message {
    header_only(HALT, vp_index, vp)
}

fn header_only(kind: u32, vp_index: u32, vp: &VpState) -> Message {
    let mut new = Builder::new(kind, HEADER);
    new.header(vp_index, vp, &Shown::of(vp), 0, 0, access::EXECUTE);
    new.0
}

/// End of a level-triggered interrupt: the VMM's I/O APIC looks for its vector.
#[must_use]
pub fn apic_eoi(vp_index: u32, vector: u8) -> Message {
    let mut new = Builder::new(message::APIC_EOI, 8);
    new.put(0, vp_index.into());
    new.put(4, vector.into());
    new.0
}

/// Sources of the SynIC that the VMM asked for can take a message (`hv_x64_synic_sint_deliverable_message`).
#[must_use]
pub fn sint_deliverable(vp_index: u32, vp: &VpState, cr8: u8, sources: Sources) -> Message {
    let mut new = Builder::new(message::SYNIC_SINT_DELIVERABLE, 48);
    new.header(vp_index, vp, &Shown::of(vp), cr8, 0, access::READ);
    new.put(40, sources.into());
    new.0
}

/// The processor refuses to run the VP with its registers.
#[must_use]
pub fn invalid_vp_register(vp_index: u32) -> Message {
    let mut new = Builder::new(message::INVALID_VP_REGISTER_VALUE, 8);
    new.put(0, vp_index.into());
    new.0
}

/// An exit that the hypervisor does not know, with the vendor's code.
#[must_use]
pub fn unsupported_feature(vp_index: u32, code: u64) -> Message {
    let mut new = Builder::new(UNSUPPORTED_FEATURE, 16);
    new.put(0, vp_index.into());
    new.put(4, FEATURE_INTERCEPT);
    new.put(8, code);
    new.0
}

#[cfg(test)]
#[allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]
mod tests {
    use super::*;
    use core::mem::{offset_of, size_of};
    use hv_abi::partition::{ApicEoi, InterceptHeader, IoPortIntercept, MemoryIntercept};

    const BYTES: [u8; 16] = [
        0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18, 0x19, 0x1a, 0x1b, 0x1c, 0x1d, 0x1e,
        0x1f,
    ];

    /// A field of the payload.
    fn field(message: &Message, offset: usize, size: usize) -> u64 {
        let bytes: Vec<u8> = message.iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut value = [0; 8];
        value[..size].copy_from_slice(&bytes[PAYLOAD + offset..PAYLOAD + offset + size]);
        u64::from_le_bytes(value)
    }

    fn head(message: &Message) -> (u32, u8) {
        assert_eq!((message[0] >> 40, message[1]), (0, 0));
        (message[0] as u32, (message[0] >> 32) as u8)
    }

    fn vp() -> VpState {
        let mut vp = VpState::reset(true);
        for (index, register) in vp.context.gprs.iter_mut().enumerate() {
            *register = 0x1111_1111_1111_1100 + index as u64;
        }
        vp.rip = 0xffff_8000_0000_1234;
        vp.rflags = 0x10246;
        vp.cr0 = 0x8005_0033;
        vp.efer = 0xd01;
        vp.segments[segment::CS].rights = 0xa09b;
        vp.segments[segment::CS].selector = 0x10;
        vp.segments[segment::SS].rights = 0xc0f3;
        vp.segments[segment::ES].base = 0xe5_0000;
        vp.segments[segment::DS].base = 0xd5_0000;
        vp.segments[segment::FS].base = 0xf5_0000;
        vp
    }

    #[test]
    fn header_shows_the_state_before_the_instruction() {
        let mut vp = vp();
        vp.dr7 = 0x401;
        vp.pending_interruption = 1;
        vp.interrupt_shadow = true;
        let message = msr(7, &vp, 0xb, 2, true);
        assert_eq!(head(&message), (0x8001_0001, 64));
        assert_eq!(field(&message, 0, 4), 7);
        assert_eq!(
            field(&message, offset_of!(InterceptHeader, length_cr8), 1),
            0xb2
        );
        assert_eq!(
            field(&message, offset_of!(InterceptHeader, access_type), 1),
            1
        );
        // CPL 3, PE, AM, LMA, debug, interruption pending, shadow.
        let state = field(&message, offset_of!(InterceptHeader, execution_state), 2);
        assert_eq!(state, 0x107f);
        assert_eq!(field(&message, 8, 8), 0xffff_0000);
        assert_eq!(
            field(&message, 16, 8),
            0xffff | (0x10 << 32) | (0xa09b << 48)
        );
        assert_eq!(field(&message, offset_of!(InterceptHeader, rip), 8), vp.rip);
        assert_eq!(
            field(&message, offset_of!(InterceptHeader, rflags), 8),
            vp.rflags
        );
    }

    #[test]
    fn privilege_level_is_that_of_the_mode() {
        let mut vp = vp();
        assert_eq!(cpl(&vp), 3);
        vp.segments[segment::SS].rights = 0xc093;
        assert_eq!(cpl(&vp), 0);
        vp.rflags |= RFLAGS_VM;
        assert_eq!(cpl(&vp), 3);
        vp.cr0 = 0x10;
        assert_eq!(cpl(&vp), 0);
    }

    #[test]
    fn memory_message_is_laid_out_as_the_header_file_says() {
        let vp = vp();
        let message = memory(
            1,
            &vp,
            0x57,
            false,
            access::WRITE,
            Some(0xabc_d123),
            0xfee0_0123,
            BYTES,
            9,
        );
        assert_eq!(
            head(&message),
            (0x8000_0000, size_of::<MemoryIntercept>() as u8)
        );
        assert_eq!(field(&message, 4, 1), 0x50);
        assert_eq!(field(&message, 5, 1), 1);
        let at = |offset, size| field(&message, offset, size);
        assert_eq!(at(offset_of!(MemoryIntercept, cache_type), 4), 0);
        assert_eq!(
            at(offset_of!(MemoryIntercept, instruction_byte_count), 1),
            9
        );
        assert_eq!(at(offset_of!(MemoryIntercept, access_info), 1), 3);
        assert_eq!(at(offset_of!(MemoryIntercept, tpr_priority), 1), 5);
        assert_eq!(at(offset_of!(MemoryIntercept, gva), 8), 0xabc_d123);
        assert_eq!(at(offset_of!(MemoryIntercept, gpa), 8), 0xfee0_0123);
        let bytes = offset_of!(MemoryIntercept, instruction_bytes);
        assert_eq!(
            at(bytes, 8),
            u64::from_le_bytes(BYTES[..8].try_into().unwrap())
        );
        assert_eq!(
            at(bytes + 8, 8),
            u64::from_le_bytes(BYTES[8..].try_into().unwrap())
        );
        assert_eq!(message[12..], [0; 6]);
    }

    #[test]
    fn memory_without_the_right_is_another_message_than_no_memory() {
        let vp = vp();
        let message = memory(1, &vp, 0, true, access::EXECUTE, None, 0x5000, BYTES, 200);
        assert_eq!(head(&message).0, 0x8000_0001);
        assert_eq!(field(&message, 40, 4), 6);
        assert_eq!(field(&message, 44, 1), 16);
        assert_eq!(field(&message, 45, 1), 0);
        assert_eq!(field(&message, 5, 1), 2);
    }

    #[test]
    fn port_message_is_laid_out_as_the_header_file_says() {
        let vp = vp();
        let io = IoAccess {
            port: 0x3f8,
            size: 4,
            is_in: false,
            string: true,
            rep: true,
            segment: segment::FS as u8,
            length: 3,
        };
        let message = io_port(2, &vp, &Shown::of(&vp), 1, &io, BYTES, 16);
        assert_eq!(
            head(&message),
            (0x8001_0000, size_of::<IoPortIntercept>() as u8)
        );
        let at = |offset, size| field(&message, offset, size);
        assert_eq!((at(4, 1), at(5, 1)), (0x13, 1));
        assert_eq!(at(offset_of!(IoPortIntercept, port), 2), 0x3f8);
        assert_eq!(at(offset_of!(IoPortIntercept, access_info), 1), 0x1c);
        assert_eq!(
            at(offset_of!(IoPortIntercept, instruction_byte_count), 1),
            16
        );
        assert_eq!(at(offset_of!(IoPortIntercept, rax), 8), vp.context.gprs[0]);
        assert_eq!(at(offset_of!(IoPortIntercept, instruction_bytes), 1), 0x10);
        assert_eq!(at(offset_of!(IoPortIntercept, ds), 8), 0xf5_0000);
        assert_eq!(at(offset_of!(IoPortIntercept, es), 8), 0xe5_0000);
        assert_eq!(at(offset_of!(IoPortIntercept, rcx), 8), vp.context.gprs[1]);
        assert_eq!(at(offset_of!(IoPortIntercept, rsi), 8), vp.context.gprs[6]);
        assert_eq!(at(offset_of!(IoPortIntercept, rdi), 8), vp.context.gprs[7]);
        let input = IoAccess {
            is_in: true,
            string: false,
            rep: false,
            ..io
        };
        let message = io_port(2, &vp, &Shown::of(&vp), 1, &input, BYTES, 1);
        assert_eq!((field(&message, 5, 1), field(&message, 42, 1)), (0, 4));
        assert_eq!(field(&message, 72, 8), 0xd5_0000);
    }

    #[test]
    fn segment_that_does_not_exist_is_zero() {
        let io = IoAccess {
            port: 0,
            size: 1,
            is_in: false,
            string: true,
            rep: false,
            segment: 200,
            length: 1,
        };
        let message = io_port(0, &vp(), &Shown::of(&vp()), 0, &io, BYTES, 1);
        assert_eq!((field(&message, 72, 8), field(&message, 80, 8)), (0, 0));
    }

    #[test]
    fn msr_and_cpuid_messages_hold_the_registers() {
        let vp = vp();
        let message = msr(0, &vp, 0, 2, false);
        assert_eq!(field(&message, 40, 8), 0x1111_1101);
        assert_eq!(field(&message, 48, 8), vp.context.gprs[2]);
        assert_eq!(field(&message, 56, 8), vp.context.gprs[0]);
        let message = cpuid(0, &vp, 0, 2, [1, 2, 3, 4]);
        assert_eq!(head(&message), (0x8001_0002, 104));
        let registers = [40, 48, 56, 64].map(|offset| field(&message, offset, 8));
        assert_eq!(registers, [0, 1, 2, 3].map(|index| vp.context.gprs[index]));
        let defaults = [72, 80, 88, 96].map(|offset| field(&message, offset, 8));
        assert_eq!(defaults, [1, 3, 4, 2]);
    }

    #[test]
    fn short_messages_name_the_vp() {
        let eoi = apic_eoi(3, 0x41);
        assert_eq!(head(&eoi), (0x8001_0004, size_of::<ApicEoi>() as u8));
        assert_eq!((field(&eoi, 0, 4), field(&eoi, 4, 4)), (3, 0x41));
        let invalid = invalid_vp_register(3);
        assert_eq!((head(&invalid), invalid[2]), ((0x8000_0020, 8), 3));
        let unsupported = unsupported_feature(3, 0x1234);
        assert_eq!(head(&unsupported), (0x8000_0022, 16));
        assert_eq!((unsupported[2], unsupported[3]), (3 | (1 << 32), 0x1234));
    }

    #[test]
    fn end_of_the_vp_is_told_by_a_header() {
        let vp = vp();
        for (message, kind) in [
            (unrecoverable_exception(4, &vp), 0x8000_0021),
            (halt(4, &vp), 0x8001_0007),
        ] {
            assert_eq!(head(&message), (kind, 40));
            assert_eq!(field(&message, 24, 8), vp.rip);
            assert_eq!(message[7..], [0; 11]);
        }
    }
}
