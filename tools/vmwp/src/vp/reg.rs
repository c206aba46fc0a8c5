// SPDX-License-Identifier: GPL-2.0
//! Names and values of VP registers (TLFS 7.9), without the unions of the C headers.

use mshv_bindings as hv;

/// Name of a register: an `HV_REGISTER_NAME`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Reg(pub u32);

macro_rules! names {
    ($($name:ident = $constant:ident),* $(,)?) => {
        #[allow(missing_docs)]
        impl Reg {
            $(pub const $name: Reg = Reg(hv::$constant);)*
        }
    };
}

names! {
    RAX = hv_register_name_HV_X64_REGISTER_RAX,
    RCX = hv_register_name_HV_X64_REGISTER_RCX,
    RSP = hv_register_name_HV_X64_REGISTER_RSP,
    RBP = hv_register_name_HV_X64_REGISTER_RBP,
    RSI = hv_register_name_HV_X64_REGISTER_RSI,
    RDI = hv_register_name_HV_X64_REGISTER_RDI,
    RIP = hv_register_name_HV_X64_REGISTER_RIP,
    RFLAGS = hv_register_name_HV_X64_REGISTER_RFLAGS,
    CR0 = hv_register_name_HV_X64_REGISTER_CR0,
    CR2 = hv_register_name_HV_X64_REGISTER_CR2,
    CR3 = hv_register_name_HV_X64_REGISTER_CR3,
    CR4 = hv_register_name_HV_X64_REGISTER_CR4,
    EFER = hv_register_name_HV_X64_REGISTER_EFER,
    ES = hv_register_name_HV_X64_REGISTER_ES,
    CS = hv_register_name_HV_X64_REGISTER_CS,
    SS = hv_register_name_HV_X64_REGISTER_SS,
    DS = hv_register_name_HV_X64_REGISTER_DS,
    FS = hv_register_name_HV_X64_REGISTER_FS,
    GS = hv_register_name_HV_X64_REGISTER_GS,
    LDTR = hv_register_name_HV_X64_REGISTER_LDTR,
    TR = hv_register_name_HV_X64_REGISTER_TR,
    IDTR = hv_register_name_HV_X64_REGISTER_IDTR,
    GDTR = hv_register_name_HV_X64_REGISTER_GDTR,
}

impl Reg {
    /// The general register with this number in instruction encoding (0 RAX, 1 RCX, … 15 R15).
    pub fn general(number: usize) -> Reg {
        debug_assert!(number < 16);
        Reg(Reg::RAX.0 + number as u32 % 16)
    }

    /// Position among the general registers, RIP and RFLAGS, which follow each other in name and in the register page.
    pub fn page_slot(self) -> Option<usize> {
        let slot = self.0.checked_sub(Reg::RAX.0)? as usize;
        (slot < 18).then_some(slot)
    }
}

/// A segment register with its cached descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u32,
    /// Selector.
    pub selector: u16,
    /// Bits 40-55 of a descriptor, without the limit's part.
    pub attributes: u16,
}

/// Value of a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegValue {
    /// Up to 64 bits.
    Word(u64),
    /// A segment.
    Segment(Segment),
    /// GDTR or IDTR.
    Table {
        /// Base address.
        base: u64,
        /// Limit in bytes.
        limit: u16,
    },
}

impl RegValue {
    /// The value as a number; zero for segments and tables.
    pub fn word(self) -> u64 {
        match self {
            RegValue::Word(w) => w,
            _ => 0,
        }
    }
}

impl From<u64> for RegValue {
    fn from(w: u64) -> Self {
        RegValue::Word(w)
    }
}

impl From<Segment> for RegValue {
    fn from(s: Segment) -> Self {
        RegValue::Segment(s)
    }
}

impl From<Segment> for hv::hv_x64_segment_register {
    fn from(s: Segment) -> Self {
        hv::hv_x64_segment_register {
            base: s.base,
            limit: s.limit,
            selector: s.selector,
            __bindgen_anon_1: hv::hv_x64_segment_register__bindgen_ty_1 {
                attributes: s.attributes,
            },
        }
    }
}

impl From<hv::hv_x64_segment_register> for Segment {
    fn from(s: hv::hv_x64_segment_register) -> Self {
        Segment {
            base: s.base,
            limit: s.limit,
            selector: s.selector,
            // SAFETY: the union is a u16 and a bit field of the same 16 bits; every pattern is valid for both.
            attributes: unsafe { s.__bindgen_anon_1.attributes },
        }
    }
}

impl From<RegValue> for hv::hv_register_value {
    fn from(v: RegValue) -> Self {
        // All 128 bits must be defined, the union's other members are shorter.
        let mut out = hv::hv_register_value {
            reg128: hv::hv_u128::default(),
        };
        match v {
            RegValue::Word(w) => out.reg64 = w,
            RegValue::Segment(s) => out.segment = s.into(),
            RegValue::Table { base, limit } => {
                out.table = hv::hv_x64_table_register {
                    pad: [0; 3],
                    limit,
                    base,
                }
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_tlfs() {
        assert_eq!(Reg::RAX.0, 0x20000);
        assert_eq!(Reg::RDI.0, 0x20007);
        assert_eq!(Reg::RIP.0, 0x20010);
        assert_eq!(Reg::CR4.0, 0x40003);
        assert_eq!(Reg::CS.0, 0x60001);
        assert_eq!(Reg::TR.0, 0x60007);
        assert_eq!(Reg::GDTR.0, 0x70001);
        assert_eq!(Reg::EFER.0, 0x80001);
    }

    #[test]
    fn page_slots_cover_general_registers_rip_and_rflags_only() {
        assert_eq!(Reg::general(0).page_slot(), Some(0));
        assert_eq!(Reg::general(15).page_slot(), Some(15));
        assert_eq!(Reg::RIP.page_slot(), Some(16));
        assert_eq!(Reg::RFLAGS.page_slot(), Some(17));
        assert_eq!(Reg(Reg::RFLAGS.0 + 1).page_slot(), None);
        assert_eq!(Reg(0).page_slot(), None);
    }

    #[test]
    fn segments_survive_the_way_through_the_c_struct() {
        let s = Segment {
            base: 1 << 40,
            limit: 0xffff_ffff,
            selector: 0x10,
            attributes: 0xa09b,
        };
        assert_eq!(Segment::from(hv::hv_x64_segment_register::from(s)), s);
    }
}
