// SPDX-License-Identifier: GPL-2.0
//! Intercept messages (`struct hv_message`) as Rust values.
//!
//! Offsets are those of `include/hyperv/hvhdk.h`; a test compares them with the bindings.

use super::reg::Segment;
use mshv_bindings as hv;

/// Size of a message.
pub const MESSAGE_SIZE: usize = 256;
/// Most instruction bytes in a message.
pub const INSTRUCTION_BYTES: usize = 16;

const PAYLOAD: usize = 16;
const PAYLOAD_SIZE: usize = MESSAGE_SIZE - PAYLOAD;

/// State of the VP at the intercept, before the instruction had any effect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// The VP.
    pub vp: u32,
    /// Length of the instruction, zero if unknown.
    pub instruction_length: u8,
    /// The access was a read, a write, or an instruction fetch.
    pub access: Access,
    /// 16, 32 or 64.
    pub bitness: u8,
    /// Code segment.
    pub cs: Segment,
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
}

/// Kind of an access.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// Read.
    #[default]
    Read,
    /// Write.
    Write,
    /// Instruction fetch.
    Execute,
}

/// The bytes at RIP that came with a message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InstructionBytes {
    bytes: [u8; INSTRUCTION_BYTES],
    len: usize,
}

impl InstructionBytes {
    /// At most 16 bytes are kept.
    pub fn new(bytes: &[u8]) -> Self {
        let len = bytes.len().min(INSTRUCTION_BYTES);
        let mut out = InstructionBytes {
            len,
            ..Default::default()
        };
        out.bytes[..len].copy_from_slice(&bytes[..len]);
        out
    }

    /// The valid ones.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// An IN or OUT instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortIntercept {
    /// Common part.
    pub header: Header,
    /// Port.
    pub port: u16,
    /// Access size: 1, 2 or 4.
    pub size: u8,
    /// INS or OUTS.
    pub string: bool,
    /// With a repeat prefix.
    pub rep: bool,
    /// RAX before the instruction.
    pub rax: u64,
    /// Bytes at RIP, if any. This and what follows is only read for INS and OUTS.
    pub instruction: InstructionBytes,
    /// Data segment.
    pub ds: Segment,
    /// Extra segment.
    pub es: Segment,
    /// RCX before the instruction.
    pub rcx: u64,
    /// RSI before the instruction.
    pub rsi: u64,
    /// RDI before the instruction.
    pub rdi: u64,
}

/// An access to guest-physical memory that is not mapped, or not mapped for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryIntercept {
    /// Common part.
    pub header: Header,
    /// There is no memory at all at this address.
    pub unmapped: bool,
    /// Bytes at RIP, if any.
    pub instruction: InstructionBytes,
    /// Linear address of the access, if known.
    pub gva: Option<u64>,
    /// Guest-physical address of the access.
    pub gpa: u64,
}

/// What a message says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Intercept {
    /// Port access.
    Port(PortIntercept),
    /// Memory access.
    Memory(MemoryIntercept),
    /// A level-triggered interrupt ended.
    ApicEoi {
        /// Its vector.
        vector: u32,
    },
    /// The VP executed HLT and the hypervisor does not wait for it.
    Halt(Header),
    /// Triple fault.
    UnrecoverableException(Header),
    /// The VP cannot be entered with the state it has.
    InvalidVpRegister,
    /// The hypervisor met something that it does not support.
    UnsupportedFeature {
        /// 1 an intercept, 2 a task switch.
        code: u32,
        /// Detail.
        parameter: u64,
    },
    /// A message type that this process never asked for.
    Other(u32),
    /// A message that is too short for its type.
    Malformed(u32),
}

/// Little-endian fields of a payload. Reading behind the end is the only possible error. Most places are constants, for which
/// inlined code has nothing to check.
struct Fields<'a>(&'a [u8; PAYLOAD_SIZE]);

impl Fields<'_> {
    #[inline(always)]
    fn bytes<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.0.get(at..at + N)?.try_into().ok()
    }

    #[inline(always)]
    fn u8(&self, at: usize) -> Option<u8> {
        self.0.get(at).copied()
    }

    #[inline(always)]
    fn u16(&self, at: usize) -> Option<u16> {
        self.bytes(at).map(u16::from_le_bytes)
    }

    #[inline(always)]
    fn u32(&self, at: usize) -> Option<u32> {
        self.bytes(at).map(u32::from_le_bytes)
    }

    #[inline(always)]
    fn u64(&self, at: usize) -> Option<u64> {
        self.bytes(at).map(u64::from_le_bytes)
    }

    #[inline(always)]
    fn segment(&self, at: usize) -> Option<Segment> {
        Some(Segment {
            base: self.u64(at)?,
            limit: self.u32(at + 8)?,
            selector: self.u16(at + 12)?,
            attributes: self.u16(at + 14)?,
        })
    }

    #[inline(always)]
    fn instruction(&self, count: usize, at: usize) -> Option<InstructionBytes> {
        Some(match self.u8(count)? {
            0 => InstructionBytes::default(),
            count => {
                let count = usize::from(count).min(INSTRUCTION_BYTES);
                InstructionBytes::new(self.0.get(at..at + count)?)
            }
        })
    }

    #[inline(always)]
    fn header(&self) -> Option<Header> {
        const EFER_LMA: u16 = 1 << 4;
        const CS_LONG: u16 = 1 << 13;
        const CS_DEFAULT_32: u16 = 1 << 14;
        let state = self.u16(6)?;
        let cs = self.segment(8)?;
        let bitness = if state & EFER_LMA != 0 && cs.attributes & CS_LONG != 0 {
            64
        } else if cs.attributes & CS_DEFAULT_32 != 0 {
            32
        } else {
            16
        };
        Some(Header {
            vp: self.u32(0)?,
            instruction_length: self.u8(4)? & 0xf,
            access: match self.u8(5)? {
                0 => Access::Read,
                1 => Access::Write,
                _ => Access::Execute,
            },
            bitness,
            cs,
            rip: self.u64(24)?,
            rflags: self.u64(32)?,
        })
    }

    fn port(&self) -> Option<PortIntercept> {
        let access = self.u8(42)?;
        let plain = PortIntercept {
            header: self.header()?,
            port: self.u16(40)?,
            size: access & 7,
            string: access & (1 << 3) != 0,
            rep: access & (1 << 4) != 0,
            rax: self.u64(48)?,
            ..Default::default()
        };
        if !plain.string {
            return Some(plain);
        }
        Some(PortIntercept {
            instruction: self.instruction(43, 56)?,
            ds: self.segment(72)?,
            es: self.segment(88)?,
            rcx: self.u64(104)?,
            rsi: self.u64(112)?,
            rdi: self.u64(120)?,
            ..plain
        })
    }

    fn memory(&self, unmapped: bool) -> Option<MemoryIntercept> {
        let gva_valid = self.u8(45)? & 1 != 0;
        Some(MemoryIntercept {
            header: self.header()?,
            unmapped,
            instruction: self.instruction(44, 64)?,
            gva: if gva_valid { Some(self.u64(48)?) } else { None },
            gpa: self.u64(56)?,
        })
    }
}

impl Intercept {
    /// Reads a message.
    pub fn parse(message: &[u8; MESSAGE_SIZE]) -> Self {
        let kind = u32::from_le_bytes([message[0], message[1], message[2], message[3]]);
        let Some(payload) = message.last_chunk() else {
            return Intercept::Malformed(kind);
        };
        let fields = Fields(payload);
        let parsed = match kind {
            hv::hv_message_type_HVMSG_X64_IO_PORT_INTERCEPT => fields.port().map(Intercept::Port),
            hv::hv_message_type_HVMSG_UNMAPPED_GPA => fields.memory(true).map(Intercept::Memory),
            hv::hv_message_type_HVMSG_GPA_INTERCEPT => fields.memory(false).map(Intercept::Memory),
            hv::hv_message_type_HVMSG_X64_APIC_EOI => {
                fields.u32(4).map(|vector| Intercept::ApicEoi { vector })
            }
            hv::hv_message_type_HVMSG_X64_HALT => fields.header().map(Intercept::Halt),
            hv::hv_message_type_HVMSG_UNRECOVERABLE_EXCEPTION => {
                fields.header().map(Intercept::UnrecoverableException)
            }
            hv::hv_message_type_HVMSG_INVALID_VP_REGISTER_VALUE => {
                Some(Intercept::InvalidVpRegister)
            }
            hv::hv_message_type_HVMSG_UNSUPPORTED_FEATURE => fields
                .u32(4)
                .zip(fields.u64(8))
                .map(|(code, parameter)| Intercept::UnsupportedFeature { code, parameter }),
            other => Some(Intercept::Other(other)),
        };
        parsed.unwrap_or(Intercept::Malformed(kind))
    }
}

impl From<&hv::hv_message> for Intercept {
    fn from(message: &hv::hv_message) -> Self {
        const { assert!(std::mem::size_of::<hv::hv_message>() == MESSAGE_SIZE) };
        // SAFETY: the message is 256 bytes (checked above) of plain integers that the kernel or `Default` wrote whole.
        let bytes = unsafe { &*std::ptr::from_ref(message).cast::<[u8; MESSAGE_SIZE]>() };
        Intercept::parse(bytes)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::mem::offset_of;

    /// A message with `kind` and the given (offset, bytes) of its payload.
    pub(crate) fn message(kind: u32, fields: &[(usize, &[u8])]) -> [u8; MESSAGE_SIZE] {
        let mut m = [0; MESSAGE_SIZE];
        m[..4].copy_from_slice(&kind.to_le_bytes());
        for (at, bytes) in fields {
            m[PAYLOAD + at..PAYLOAD + at + bytes.len()].copy_from_slice(bytes);
        }
        m
    }

    #[test]
    fn offsets_are_those_of_the_bindings() {
        type H = hv::hv_x64_intercept_message_header;
        assert_eq!(offset_of!(hv::hv_message, u), PAYLOAD);
        assert_eq!(
            (
                offset_of!(H, vp_index),
                offset_of!(H, intercept_access_type)
            ),
            (0, 5)
        );
        assert_eq!(
            (offset_of!(H, execution_state), offset_of!(H, cs_segment)),
            (6, 8)
        );
        assert_eq!((offset_of!(H, rip), offset_of!(H, rflags)), (24, 32));
        type P = hv::hv_x64_io_port_intercept_message;
        assert_eq!(
            (offset_of!(P, port_number), offset_of!(P, access_info)),
            (40, 42)
        );
        assert_eq!(
            (offset_of!(P, instruction_byte_count), offset_of!(P, rax)),
            (43, 48)
        );
        assert_eq!(
            (offset_of!(P, instruction_bytes), offset_of!(P, ds_segment)),
            (56, 72)
        );
        assert_eq!((offset_of!(P, es_segment), offset_of!(P, rcx)), (88, 104));
        assert_eq!((offset_of!(P, rsi), offset_of!(P, rdi)), (112, 120));
        type M = hv::hv_x64_memory_intercept_message;
        assert_eq!(
            (
                offset_of!(M, instruction_byte_count),
                offset_of!(M, memory_access_info)
            ),
            (44, 45)
        );
        assert_eq!(
            (
                offset_of!(M, guest_virtual_address),
                offset_of!(M, guest_physical_address)
            ),
            (48, 56)
        );
        assert_eq!(offset_of!(M, instruction_bytes), 64);
        type S = hv::hv_x64_segment_register;
        assert_eq!(
            (
                offset_of!(S, limit),
                offset_of!(S, selector),
                offset_of!(S, __bindgen_anon_1)
            ),
            (8, 12, 14)
        );
        assert_eq!(offset_of!(hv::hv_x64_apic_eoi_message, interrupt_vector), 4);
        assert_eq!(
            offset_of!(hv::hv_x64_unsupported_feature_message, feature_parameter),
            8
        );
    }

    #[test]
    fn a_port_message_is_read_in_full() {
        let m = message(
            0x8001_0000,
            &[
                (0, &3u32.to_le_bytes()),
                (4, &[0x81, 1]),
                (6, &0x10u16.to_le_bytes()),
                (22, &0xa09bu16.to_le_bytes()),
                (24, &0xffff_ffff_8100_0000u64.to_le_bytes()),
                (40, &0x3f8u16.to_le_bytes()),
                (42, &[0b11001, 2]),
                (48, &0x41u64.to_le_bytes()),
                (56, &[0xf3, 0x6e, 0xff]),
                (104, &7u64.to_le_bytes()),
                (112, &8u64.to_le_bytes()),
            ],
        );
        let Intercept::Port(p) = Intercept::parse(&m) else {
            panic!()
        };
        assert_eq!(
            (p.header.vp, p.header.instruction_length, p.header.bitness),
            (3, 1, 64)
        );
        assert_eq!(p.header.access, Access::Write);
        assert_eq!(
            (p.port, p.size, p.string, p.rep, p.rax),
            (0x3f8, 1, true, true, 0x41)
        );
        assert_eq!(p.instruction.as_slice(), [0xf3, 0x6e]);
        assert_eq!((p.rcx, p.rsi, p.header.rip), (7, 8, 0xffff_ffff_8100_0000));
    }

    #[test]
    fn a_memory_message_is_read_in_full() {
        let m = message(
            0x8000_0001,
            &[
                (5, &[2]),
                (44, &[1, 1]),
                (48, &0x1234u64.to_le_bytes()),
                (56, &0xfec0_0010u64.to_le_bytes()),
                (64, &[0x90]),
            ],
        );
        let Intercept::Memory(i) = Intercept::parse(&m) else {
            panic!()
        };
        assert_eq!(
            (i.gva, i.gpa, i.unmapped, i.header.access),
            (Some(0x1234), 0xfec0_0010, false, Access::Execute)
        );
        assert_eq!(i.instruction.as_slice(), [0x90]);
    }

    #[test]
    fn the_mode_follows_lma_and_the_code_segment() {
        let bitness = |state: u16, attributes: u16| {
            let m = message(
                0x8001_0007,
                &[(6, &state.to_le_bytes()), (22, &attributes.to_le_bytes())],
            );
            let Intercept::Halt(h) = Intercept::parse(&m) else {
                panic!()
            };
            h.bitness
        };
        assert_eq!(bitness(0x10, 0xa09b), 64);
        assert_eq!(bitness(0x10, 0xc09b), 32, "compatibility mode");
        assert_eq!(
            bitness(0, 0xa09b),
            16,
            "the long bit means nothing without LMA"
        );
        assert_eq!(bitness(0, 0x009b), 16);
    }

    #[test]
    fn small_messages_are_read() {
        assert_eq!(
            Intercept::parse(&message(0x8001_0004, &[(4, &[0x31])])),
            Intercept::ApicEoi { vector: 0x31 }
        );
        assert_eq!(
            Intercept::parse(&message(0x8000_0022, &[(4, &[2]), (8, &[9])])),
            Intercept::UnsupportedFeature {
                code: 2,
                parameter: 9
            }
        );
        assert_eq!(
            Intercept::parse(&message(0x8000_0020, &[])),
            Intercept::InvalidVpRegister
        );
        assert_eq!(
            Intercept::parse(&message(0x8001_0001, &[])),
            Intercept::Other(0x8001_0001)
        );
    }

    proptest! {
        #[test]
        fn no_message_panics(kind: u32, noise in proptest::collection::vec(any::<u8>(), MESSAGE_SIZE - 4)) {
            let kinds = [kind, 0x8000_0000, 0x8000_0001, 0x8001_0000, 0x8001_0004, 0x8000_0021];
            for kind in kinds {
                let mut m = [0; MESSAGE_SIZE];
                m[..4].copy_from_slice(&kind.to_le_bytes());
                m[4..].copy_from_slice(&noise);
                Intercept::parse(&m);
            }
        }
    }
}
