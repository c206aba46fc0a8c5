// SPDX-License-Identifier: GPL-2.0
//! The virtual machine control block (APM vol. 2 appendix B), exit codes and intercept bits.

use super::state::Segment;

/// Segment register in the state-save area.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
#[allow(missing_docs)] // The names are the manual's.
pub struct VmcbSegment {
    pub selector: u16,
    pub attributes: u16,
    pub limit: u32,
    pub base: u64,
}

impl From<Segment> for VmcbSegment {
    fn from(s: Segment) -> Self {
        Self {
            selector: s.selector,
            attributes: s.vmcb_attributes(),
            limit: s.limit,
            base: s.base,
        }
    }
}

/// The whole 4 KiB block: control area, then state-save area at 0x400.
#[derive(Clone, Copy)]
#[repr(C, align(4096))]
#[allow(missing_docs)] // The names are the manual's.
pub struct Vmcb {
    pub intercepts: [u32; 6],
    reserved_018: [u32; 9],
    pub pause_filter_threshold: u16,
    pub pause_filter_count: u16,
    pub iopm_base: u64,
    pub msrpm_base: u64,
    pub tsc_offset: u64,
    pub asid: u32,
    pub tlb_control: u32,
    pub interrupt_control: u64,
    pub interrupt_shadow: u64,
    pub exit_code: u64,
    pub exit_info_1: u64,
    pub exit_info_2: u64,
    pub exit_interrupt_info: u64,
    pub nested_control: u64,
    pub avic_apic_bar: u64,
    pub ghcb: u64,
    pub event_injection: u64,
    pub nested_cr3: u64,
    pub lbr_control: u64,
    pub clean: u64,
    pub next_rip: u64,
    pub fetched_bytes: u8,
    pub instruction_bytes: [u8; 15],
    reserved_0e0: [u8; 0x320],
    pub es: VmcbSegment,
    pub cs: VmcbSegment,
    pub ss: VmcbSegment,
    pub ds: VmcbSegment,
    pub fs: VmcbSegment,
    pub gs: VmcbSegment,
    pub gdtr: VmcbSegment,
    pub ldtr: VmcbSegment,
    pub idtr: VmcbSegment,
    pub tr: VmcbSegment,
    reserved_4a0: [u8; 0x2b],
    pub cpl: u8,
    reserved_4cc: u32,
    pub efer: u64,
    reserved_4d8: [u8; 0x70],
    pub cr4: u64,
    pub cr3: u64,
    pub cr0: u64,
    pub dr7: u64,
    pub dr6: u64,
    pub rflags: u64,
    pub rip: u64,
    reserved_580: [u8; 0x58],
    pub rsp: u64,
    pub s_cet: u64,
    pub ssp: u64,
    pub isst: u64,
    pub rax: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub cr2: u64,
    reserved_648: [u8; 0x20],
    pub pat: u64,
    pub debugctl: u64,
    reserved_678: [u8; 0x988],
}

const _: () = {
    use core::mem::{offset_of, size_of};
    assert!(size_of::<Vmcb>() == 4096);
    assert!(offset_of!(Vmcb, iopm_base) == 0x40);
    assert!(offset_of!(Vmcb, exit_code) == 0x70);
    assert!(offset_of!(Vmcb, event_injection) == 0xa8);
    assert!(offset_of!(Vmcb, nested_cr3) == 0xb0);
    assert!(offset_of!(Vmcb, next_rip) == 0xc8);
    assert!(offset_of!(Vmcb, es) == 0x400);
    assert!(offset_of!(Vmcb, cpl) == 0x4cb);
    assert!(offset_of!(Vmcb, efer) == 0x4d0);
    assert!(offset_of!(Vmcb, cr4) == 0x548);
    assert!(offset_of!(Vmcb, rflags) == 0x570);
    assert!(offset_of!(Vmcb, rip) == 0x578);
    assert!(offset_of!(Vmcb, rsp) == 0x5d8);
    assert!(offset_of!(Vmcb, rax) == 0x5f8);
    assert!(offset_of!(Vmcb, cr2) == 0x640);
    assert!(offset_of!(Vmcb, pat) == 0x668);
};

/// Intercept bits: word and bit of the intercept vectors.
pub mod intercept {
    /// Word 3: physical interrupt.
    pub const W3_INTR: u32 = 1 << 0;
    /// Word 3: NMI.
    pub const W3_NMI: u32 = 1 << 1;
    /// Word 3: SMI.
    pub const W3_SMI: u32 = 1 << 2;
    /// Word 3: INIT.
    pub const W3_INIT: u32 = 1 << 3;
    /// Word 3: virtual interrupt (interrupt window).
    pub const W3_VINTR: u32 = 1 << 4;
    /// Word 3: CPUID.
    pub const W3_CPUID: u32 = 1 << 18;
    /// Word 3: IRET.
    pub const W3_IRET: u32 = 1 << 20;
    /// Word 3: INVD.
    pub const W3_INVD: u32 = 1 << 22;
    /// Word 3: HLT.
    pub const W3_HLT: u32 = 1 << 24;
    /// Word 3: INVLPGA.
    pub const W3_INVLPGA: u32 = 1 << 26;
    /// Word 3: IN and OUT by the permission map.
    pub const W3_IOIO: u32 = 1 << 27;
    /// Word 3: RDMSR and WRMSR by the permission map.
    pub const W3_MSR: u32 = 1 << 28;
    /// Word 3: shutdown (triple fault).
    pub const W3_SHUTDOWN: u32 = 1 << 31;
    /// Word 4: VMRUN, VMMCALL, VMLOAD, VMSAVE, STGI, CLGI, SKINIT.
    pub const W4_SVM: u32 = 0x7f;
    /// Word 4: XSETBV.
    pub const W4_XSETBV: u32 = 1 << 13;
}

/// Exit codes (APM appendix C).
pub mod exit {
    /// First exception; add the vector.
    pub const EXCEPTION: u64 = 0x40;
    /// Physical interrupt.
    pub const INTR: u64 = 0x60;
    /// NMI.
    pub const NMI: u64 = 0x61;
    /// SMI.
    pub const SMI: u64 = 0x62;
    /// INIT.
    pub const INIT: u64 = 0x63;
    /// Virtual interrupt.
    pub const VINTR: u64 = 0x64;
    /// CPUID.
    pub const CPUID: u64 = 0x72;
    /// IRET.
    pub const IRET: u64 = 0x74;
    /// INVD.
    pub const INVD: u64 = 0x76;
    /// HLT.
    pub const HLT: u64 = 0x78;
    /// INVLPGA.
    pub const INVLPGA: u64 = 0x7a;
    /// IN or OUT.
    pub const IOIO: u64 = 0x7b;
    /// RDMSR or WRMSR.
    pub const MSR: u64 = 0x7c;
    /// Shutdown.
    pub const SHUTDOWN: u64 = 0x7f;
    /// VMRUN.
    pub const VMRUN: u64 = 0x80;
    /// VMMCALL.
    pub const VMMCALL: u64 = 0x81;
    /// SKINIT, the last of the SVM instructions.
    pub const SKINIT: u64 = 0x86;
    /// XSETBV.
    pub const XSETBV: u64 = 0x8d;
    /// Nested page fault.
    pub const NPF: u64 = 0x400;
    /// Invalid guest state.
    pub const INVALID: u64 = u64::MAX;
}

/// MSR permission map: 2 bits (read, write) per MSR, three ranges of 8,192 MSRs in 2 KiB each
/// (APM 15.11).
pub mod msrpm {
    /// Bytes of the map.
    pub const BYTES: usize = 8192;

    /// Byte and shift of the two bits of `msr`, `None` outside the ranges (these always exit).
    pub const fn position(msr: u32) -> Option<(usize, u32)> {
        let (range, index) = match msr {
            0..=0x1fff => (0, msr),
            0xc000_0000..=0xc000_1fff => (0x800, msr - 0xc000_0000),
            0xc001_0000..=0xc001_1fff => (0x1000, msr - 0xc001_0000),
            _ => return None,
        };
        Some((range + index as usize / 4, index % 4 * 2))
    }
}

#[cfg(test)]
mod tests {
    use super::msrpm::position;

    #[test]
    fn permission_map_positions_match_the_manual() {
        assert_eq!(position(0xc000_0080), Some((0x820, 0)));
        assert_eq!(position(0xc001_0114), Some((0x1045, 0)));
        assert_eq!(position(0xc001_0117), Some((0x1045, 6)));
        assert_eq!(position(0x830), Some((0x20c, 0)));
        assert_eq!(position(0x4000_0000), None);
    }
}
