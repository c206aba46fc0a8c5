// SPDX-License-Identifier: GPL-2.0
//! The state of a running CPU as captured before it enters, and descriptors.

/// A segment register with its hidden part, in VMX form (SDM 26.4.1: access rights as in Table 26-2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Segment {
    /// Base address.
    pub base: u64,
    /// Limit in bytes, expanded by granularity.
    pub limit: u32,
    /// Access rights: descriptor bits 55:52 and 47:40 in bits 15:12 and 7:0; bit 16 unusable.
    pub rights: u32,
    /// Selector.
    pub selector: u16,
}

/// Bit 16 of the VMX access rights: the register is unusable.
pub const UNUSABLE: u32 = 1 << 16;

impl Segment {
    /// A null selector.
    pub const fn unusable(selector: u16) -> Self {
        Self {
            base: 0,
            limit: 0,
            rights: UNUSABLE,
            selector,
        }
    }

    /// Decodes an 8-byte descriptor, with `high` the following 8 bytes for a system segment in 64-bit
    /// mode (SDM 3.4.5, 8.2.3).
    pub const fn from_descriptor(selector: u16, low: u64, high: u64, system: bool) -> Self {
        let mut base = ((low >> 16) & 0xff_ffff) | (low >> 56 << 24);
        if system {
            base |= high << 32;
        }
        let mut limit = (low & 0xffff) as u32 | (low >> 32) as u32 & 0xf_0000;
        if (low >> 55) & 1 != 0 {
            limit = (limit << 12) | 0xfff;
        }
        let rights = (low >> 40) as u32 & 0xf0ff;
        Self {
            base,
            limit,
            rights,
            selector,
        }
    }

    /// The access rights in VMCB form: bits 7:0 as in the descriptor, bits 11:8 from bits 55:52
    /// (APM 15.5.1).
    pub const fn vmcb_attributes(&self) -> u16 {
        if self.rights & UNUSABLE != 0 {
            return 0;
        }
        (self.rights & 0xff | (self.rights >> 4) & 0xf00) as u16
    }

    /// Rebuilds an available (not busy) 64-bit TSS descriptor: low and high word.
    pub const fn tss_descriptor(&self) -> (u64, u64) {
        let low = (self.limit as u64 & 0xffff)
            | ((self.base & 0xff_ffff) << 16)
            | (0x89 << 40)
            | (((self.limit as u64 >> 16) & 0xf) << 48)
            | (((self.base >> 24) & 0xff) << 56);
        (low, self.base >> 32)
    }
}

/// Descriptor-table register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Table {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// A CPU's state at the moment of launch. RSP, RIP and RFLAGS are set by the entry code itself.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
#[allow(missing_docs)] // The names are the registers'.
pub struct CpuState {
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub dr6: u64,
    pub dr7: u64,
    pub efer: u64,
    pub pat: u64,
    pub debugctl: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub s_cet: u64,
    pub ssp_table: u64,
    pub cs: Segment,
    pub ss: Segment,
    pub ds: Segment,
    pub es: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: Table,
    pub idtr: Table,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flat_code_descriptor_decodes() {
        let s = Segment::from_descriptor(0x10, 0x00af_9b00_0000_ffff, 0, false);
        assert_eq!((s.base, s.limit, s.rights), (0, 0xffff_ffff, 0xa09b));
        assert_eq!(s.vmcb_attributes(), 0xa9b);
    }

    #[test]
    fn tss_descriptor_round_trips_without_busy_bit() {
        let tr = Segment {
            base: 0xffff_fe12_3456_7000,
            limit: 0x4087,
            rights: 0x8b,
            selector: 0x40,
        };
        let (low, high) = tr.tss_descriptor();
        let back = Segment::from_descriptor(0x40, low, high, true);
        assert_eq!(
            (back.base, back.limit, back.rights),
            (tr.base, tr.limit, 0x89)
        );
    }

    #[test]
    fn unusable_segment_has_no_vmcb_attributes() {
        assert_eq!(Segment::unusable(3).vmcb_attributes(), 0);
    }
}
