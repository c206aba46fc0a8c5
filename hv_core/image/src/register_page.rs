// SPDX-License-Identifier: GPL-2.0
//! The page in which a VMM sees the registers of a VP between two runs, and changes them without a hypercall
//! (`hv_vp_register_page` of `hvhdk.h`).
//!
//! User space writes to it at any time. What it wrote is taken in from a copy, and only the groups whose dirty
//! bit it set.
#![forbid(unsafe_code)]
#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]

use core::mem::{offset_of, size_of};

use crate::registers::{fpu, interrupt_state, segment_from, segment_value};
use crate::vp_state::{segment, VpState, XSAVE_BYTES};

/// `HV_VP_REGISTER_PAGE_VERSION_1`.
const VERSION: u16 = 1;

/// Bits of [`RegisterPage::dirty`] (`HV_X64_REGISTER_CLASS_*`).
pub mod dirty {
    /// General registers.
    pub const GENERAL: u32 = 1 << 0;
    /// RIP.
    pub const IP: u32 = 1 << 1;
    /// XMM0 to XMM5.
    pub const XMM: u32 = 1 << 2;
    /// ES, CS, SS, DS, FS, GS.
    pub const SEGMENT: u32 = 1 << 3;
    /// RFLAGS.
    pub const FLAGS: u32 = 1 << 4;
}

/// The page as far as it is defined; the rest is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
#[allow(missing_docs)] // The names are the registers'.
pub struct RegisterPage {
    /// Layout version, 1.
    pub version: u16,
    /// 1 while the contents count.
    pub is_valid: u8,
    pub reserved: u8,
    /// Groups that the VMM changed: see [`dirty`].
    pub dirty: u32,
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8..R15.
    pub gprs: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub reserved1: u64,
    pub xmm: [[u64; 2]; 6],
    /// ES, CS, SS, DS, FS, GS as `hv_x64_segment_register`.
    pub segments: [[u64; 2]; 6],
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    pub dr7: u64,
    pub pending_interruption: u64,
    pub interrupt_state: u64,
    pub instruction_emulation_hints: u64,
    pub xfem: u64,
    pub reserved2: [u64; 32],
    /// Number of vectors, then up to seven: a way to inject that this hypervisor does not read.
    pub interrupt_vectors: u64,
}

const _: () = {
    assert!(offset_of!(RegisterPage, is_valid) == 2);
    assert!(offset_of!(RegisterPage, dirty) == 4);
    assert!(offset_of!(RegisterPage, gprs) == 8);
    assert!(offset_of!(RegisterPage, rip) == 136);
    assert!(offset_of!(RegisterPage, rflags) == 144);
    assert!(offset_of!(RegisterPage, xmm) == 160);
    assert!(offset_of!(RegisterPage, segments) == 256);
    assert!(offset_of!(RegisterPage, cr0) == 352);
    assert!(offset_of!(RegisterPage, efer) == 384);
    assert!(offset_of!(RegisterPage, pending_interruption) == 400);
    assert!(offset_of!(RegisterPage, xfem) == 424);
    assert!(offset_of!(RegisterPage, reserved2) == 432);
    assert!(offset_of!(RegisterPage, interrupt_vectors) == 688);
    assert!(size_of::<RegisterPage>() == 696);
    assert!(segment::ES == 0 && segment::GS == 5);
};

/// Shows the registers of a VP.
#[must_use]
pub fn fill(vp: &VpState, cr8: u64, xsave: &[u8; XSAVE_BYTES]) -> RegisterPage {
    let mut segments = [[0; 2]; 6];
    for (to, from) in segments.iter_mut().zip(&vp.segments) {
        *to = segment_value(from);
    }
    RegisterPage {
        version: VERSION,
        is_valid: 1,
        reserved: 0,
        dirty: 0,
        gprs: vp.context.gprs,
        rip: vp.rip,
        rflags: vp.rflags,
        reserved1: 0,
        xmm: core::array::from_fn(|index| fpu::xmm(xsave, index)),
        segments,
        cr0: vp.cr0,
        cr3: vp.cr3,
        cr4: vp.cr4,
        cr8,
        efer: vp.efer,
        dr7: vp.dr7,
        pending_interruption: vp.pending_interruption,
        interrupt_state: interrupt_state(vp),
        instruction_emulation_hints: 0,
        xfem: vp.xcr0,
        reserved2: [0; 32],
        interrupt_vectors: 0,
    }
}

/// Takes in what the VMM changed. `page` is a copy that nobody else writes to.
pub fn absorb(page: &RegisterPage, vp: &mut VpState, xsave: &mut [u8; XSAVE_BYTES]) {
    let is_dirty = |class| page.dirty & class != 0;
    if is_dirty(dirty::GENERAL) {
        vp.context.gprs = page.gprs;
    }
    if is_dirty(dirty::IP) {
        vp.rip = page.rip;
    }
    if is_dirty(dirty::FLAGS) {
        vp.rflags = page.rflags | 2;
    }
    if is_dirty(dirty::XMM) {
        for (index, value) in page.xmm.into_iter().enumerate() {
            fpu::set_xmm(xsave, index, value);
        }
    }
    if is_dirty(dirty::SEGMENT) {
        for (to, from) in vp.segments.iter_mut().zip(page.segments) {
            *to = segment_from(from);
        }
    }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)]
mod tests {
    use super::*;

    const EVERY: u32 = 0x1f;

    fn changed() -> (VpState, [u8; XSAVE_BYTES]) {
        let mut vp = VpState::reset(false);
        for (index, register) in vp.context.gprs.iter_mut().enumerate() {
            *register = 0x1000 + index as u64;
        }
        vp.rip = 0x7c00;
        vp.rflags = 0x202;
        vp.segments[segment::CS].selector = 0x8;
        vp.segments[segment::FS].base = 0xf5;
        vp.interrupt_shadow = true;
        vp.nmi_masked = true;
        vp.pending_interruption = 0x8_0001;
        let mut xsave = [0; XSAVE_BYTES];
        for index in 0..16 {
            fpu::set_xmm(&mut xsave, index, [index as u64, 99]);
        }
        (vp, xsave)
    }

    #[test]
    fn page_is_valid_and_clean_when_filled() {
        let (vp, xsave) = changed();
        let page = fill(&vp, 6, &xsave);
        assert_eq!((page.version, page.is_valid, page.dirty), (1, 1, 0));
        assert_eq!((page.rip, page.rflags, page.cr8), (0x7c00, 0x202, 6));
        assert_eq!((page.gprs[4], page.xmm[5]), (0x1004, [5, 99]));
        assert_eq!(page.segments[1][1], 0xffff | (8 << 32) | (0x9b << 48));
        assert_eq!(
            (page.interrupt_state, page.pending_interruption),
            (3, 0x8_0001)
        );
        assert_eq!((page.cr0, page.dr7, page.xfem), (0x6000_0010, 0x400, 1));
        assert_eq!(page.interrupt_vectors, 0);
    }

    #[test]
    fn clean_groups_are_ignored() {
        let (from, xsave_from) = changed();
        let page = fill(&from, 0, &xsave_from);
        let mut vp = VpState::reset(true);
        let mut xsave = [0; XSAVE_BYTES];
        let before = fill(&vp, 0, &xsave);
        absorb(&page, &mut vp, &mut xsave);
        assert_eq!(fill(&vp, 0, &xsave), before);
        absorb(
            &RegisterPage {
                dirty: !EVERY,
                ..page
            },
            &mut vp,
            &mut xsave,
        );
        assert_eq!(fill(&vp, 0, &xsave), before);
    }

    #[test]
    fn each_dirty_bit_takes_in_its_group() {
        let (from, xsave_from) = changed();
        let page = fill(&from, 0, &xsave_from);
        for bit in 0..5 {
            let mut vp = VpState::reset(true);
            let mut xsave = [0; XSAVE_BYTES];
            let before = fill(&vp, 0, &xsave);
            absorb(
                &RegisterPage {
                    dirty: 1 << bit,
                    ..page
                },
                &mut vp,
                &mut xsave,
            );
            let after = fill(&vp, 0, &xsave);
            let taken = [
                after.gprs != before.gprs,
                after.rip != before.rip,
                after.xmm != before.xmm,
                after.segments != before.segments,
                after.rflags != before.rflags,
            ];
            assert_eq!(taken, core::array::from_fn(|index| index == bit));
        }
    }

    #[test]
    fn control_registers_cannot_be_set_by_the_page() {
        let (from, xsave) = changed();
        let mut page = fill(&from, 0, &xsave);
        page.cr0 = 1;
        page.efer = 1;
        page.pending_interruption = 1;
        page.interrupt_vectors = u64::MAX;
        page.dirty = EVERY;
        let mut vp = VpState::reset(true);
        absorb(&page, &mut vp, &mut [0; XSAVE_BYTES]);
        assert_eq!(
            (vp.cr0, vp.efer, vp.pending_interruption),
            (0x6000_0010, 0, 0)
        );
    }

    #[test]
    fn other_xmm_registers_survive() {
        let (mut vp, mut xsave) = changed();
        let mut page = fill(&vp, 0, &xsave);
        page.xmm = [[7; 2]; 6];
        page.dirty = dirty::XMM;
        absorb(&page, &mut vp, &mut xsave);
        assert_eq!(fpu::xmm(&xsave, 5), [7, 7]);
        assert_eq!(fpu::xmm(&xsave, 6), [6, 99]);
    }

    #[test]
    fn rflags_from_the_page_have_bit_1() {
        let (mut vp, mut xsave) = changed();
        let page = RegisterPage {
            rflags: 0x44,
            dirty: dirty::FLAGS,
            ..fill(&vp, 0, &xsave)
        };
        absorb(&page, &mut vp, &mut xsave);
        assert_eq!(vp.rflags, 0x46);
    }
}
