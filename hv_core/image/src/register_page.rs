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
use core::sync::atomic::Ordering::Relaxed;
use core::sync::atomic::{AtomicU32, AtomicU64};

use crate::registers::{fpu, interrupt_state, segment_from, segment_value};
use crate::vp_state::{segment, VpState, XSAVE_BYTES};

/// `HV_VP_REGISTER_PAGE_VERSION_1`, and the bit that says that the contents count.
const VERSION: u32 = 1;
const VALID: u32 = 1 << 16;

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

/// The page as far as this hypervisor fills it; the rest is zero. Both sides reach it at any time.
#[derive(Debug, Default)]
#[repr(C)]
#[allow(missing_docs)] // The names are the registers'.
pub struct RegisterPage {
    /// Layout version, 1, in bits 15:0; bit 16 is set while the contents count.
    pub head: AtomicU32,
    /// Groups that the VMM changed: see [`dirty`].
    pub dirty: AtomicU32,
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8..R15.
    pub gprs: [AtomicU64; 16],
    pub rip: AtomicU64,
    pub rflags: AtomicU64,
    pub reserved: AtomicU64,
    pub xmm: [[AtomicU64; 2]; 6],
    /// ES, CS, SS, DS, FS, GS as `hv_x64_segment_register`.
    pub segments: [[AtomicU64; 2]; 6],
    pub cr0: AtomicU64,
    pub cr3: AtomicU64,
    pub cr4: AtomicU64,
    pub cr8: AtomicU64,
    pub efer: AtomicU64,
    pub dr7: AtomicU64,
    pub pending_interruption: AtomicU64,
    pub interrupt_state: AtomicU64,
    pub instruction_emulation_hints: AtomicU64,
    pub xfem: AtomicU64,
}

const _: () = {
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
    assert!(size_of::<RegisterPage>() == 432);
    assert!(segment::ES == 0 && segment::GS == 5);
};

/// What a VMM sees of the registers that are costly to bring into a [`VpState`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // The names are the registers'.
pub struct Shown {
    /// ES, CS, SS, DS, FS, GS as `hv_x64_segment_register`. SS.DPL is the privilege level.
    pub segments: [[u64; 2]; 6],
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub dr7: u64,
}

impl Shown {
    /// Those of a VP whose registers are all in `vp`.
    #[must_use]
    pub fn of(vp: &VpState) -> Self {
        let mut segments = [[0; 2]; 6];
        for (to, from) in segments.iter_mut().zip(&vp.segments) {
            *to = segment_value(from);
        }
        Self {
            segments,
            cr0: vp.cr0,
            cr3: vp.cr3,
            cr4: vp.cr4,
            efer: vp.efer,
            dr7: vp.dr7,
        }
    }
}

#[inline(always)]
fn store<const N: usize>(to: &[AtomicU64; N], from: &[u64; N]) {
    for (to, from) in to.iter().zip(from) {
        to.store(*from, Relaxed);
    }
}

fn load<const N: usize>(from: &[AtomicU64; N]) -> [u64; N] {
    core::array::from_fn(|index| from.get(index).map_or(0, |from| from.load(Relaxed)))
}

/// Shows the registers of a VP: those in `shown`, all others are in `vp`.
#[inline(always)]
pub fn fill(page: &RegisterPage, vp: &VpState, shown: &Shown, cr8: u64, xsave: &[u8; XSAVE_BYTES]) {
    page.head.store(VERSION | VALID, Relaxed);
    page.dirty.store(0, Relaxed);
    store(&page.gprs, &vp.context.gprs);
    page.rip.store(vp.rip, Relaxed);
    page.rflags.store(vp.rflags, Relaxed);
    fpu::first_xmm(xsave, |index, value| {
        if let Some(to) = page.xmm.get(index) {
            store(to, &value);
        }
    });
    for (to, from) in page.segments.iter().zip(&shown.segments) {
        store(to, from);
    }
    page.cr0.store(shown.cr0, Relaxed);
    page.cr3.store(shown.cr3, Relaxed);
    page.cr4.store(shown.cr4, Relaxed);
    page.cr8.store(cr8, Relaxed);
    page.efer.store(shown.efer, Relaxed);
    page.dr7.store(shown.dr7, Relaxed);
    page.pending_interruption
        .store(vp.pending_interruption, Relaxed);
    page.interrupt_state.store(interrupt_state(vp), Relaxed);
    page.xfem.store(vp.xcr0, Relaxed);
}

/// Takes in what the VMM changed: the groups in `dirty`, which came from the page. Each word is read once.
pub fn absorb(page: &RegisterPage, dirty: u32, vp: &mut VpState, xsave: &mut [u8; XSAVE_BYTES]) {
    let is_dirty = |class| dirty & class != 0;
    if is_dirty(dirty::GENERAL) {
        vp.context.gprs = load(&page.gprs);
    }
    if is_dirty(dirty::IP) {
        vp.rip = page.rip.load(Relaxed);
    }
    if is_dirty(dirty::FLAGS) {
        vp.rflags = page.rflags.load(Relaxed) | 2;
    }
    if is_dirty(dirty::XMM) {
        for (index, value) in page.xmm.iter().enumerate() {
            fpu::set_xmm(xsave, index, load(value));
        }
    }
    if is_dirty(dirty::SEGMENT) {
        for (to, from) in vp.segments.iter_mut().zip(&page.segments) {
            *to = segment_from(load(from));
        }
    }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)]
mod tests {
    use super::*;

    const EVERY: u32 = 0x1f;
    fn filled(vp: &VpState, cr8: u64, xsave: &[u8; XSAVE_BYTES]) -> RegisterPage {
        let page = RegisterPage::default();
        page.dirty.store(EVERY, Relaxed);
        fill(&page, vp, &Shown::of(vp), cr8, xsave);
        page
    }

    /// The registers of a VP, to be compared.
    fn text(vp: &VpState, xsave: &[u8; XSAVE_BYTES]) -> String {
        format!("{:?}", filled(vp, 0, xsave))
    }

    fn get(word: &AtomicU64) -> u64 {
        word.load(Relaxed)
    }

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
        let page = filled(&vp, 6, &xsave);
        assert_eq!(page.head.load(Relaxed), 0x1_0001);
        assert_eq!(page.dirty.load(Relaxed), 0);
        assert_eq!((get(&page.rip), get(&page.rflags)), (0x7c00, 0x202));
        assert_eq!(get(&page.cr8), 6);
        assert_eq!((get(&page.gprs[4]), load(&page.xmm[5])), (0x1004, [5, 99]));
        let code = 0xffff | (8 << 32) | (0x9b << 48);
        assert_eq!(get(&page.segments[1][1]), code);
        assert_eq!(get(&page.interrupt_state), 3);
        assert_eq!(get(&page.pending_interruption), 0x8_0001);
        assert_eq!((get(&page.cr0), get(&page.dr7)), (0x6000_0010, 0x400));
        assert_eq!(get(&page.xfem), 1);
    }

    #[test]
    fn page_shows_what_it_is_given_of_registers_that_are_not_in_the_state() {
        let (vp, xsave) = changed();
        let page = RegisterPage::default();
        let shown = Shown {
            segments: core::array::from_fn(|index| [index as u64, 100 + index as u64]),
            cr0: 1,
            cr3: 2,
            cr4: 3,
            efer: 4,
            dr7: 5,
        };
        fill(&page, &vp, &shown, 0, &xsave);
        for (index, segment) in page.segments.iter().enumerate() {
            assert_eq!(load(segment), [index as u64, 100 + index as u64]);
        }
        let words = [page.cr0, page.cr3, page.cr4, page.efer, page.dr7];
        assert_eq!(load(&words), [1, 2, 3, 4, 5]);
    }

    #[test]
    fn unused_xmm_registers_are_zero() {
        let (vp, _) = changed();
        let mut xsave = [0xff; XSAVE_BYTES];
        xsave[512..520].fill(0);
        let page = filled(&vp, 0, &xsave);
        assert!(page.xmm.iter().all(|xmm| load(xmm) == [0; 2]));
    }

    #[test]
    fn clean_groups_are_ignored() {
        let (from, xsave_from) = changed();
        let page = filled(&from, 0, &xsave_from);
        let mut vp = VpState::reset(true);
        let mut xsave = [0; XSAVE_BYTES];
        let before = text(&vp, &xsave);
        for dirty in [0, !EVERY] {
            absorb(&page, dirty, &mut vp, &mut xsave);
            assert_eq!(text(&vp, &xsave), before);
        }
    }

    #[test]
    fn each_dirty_bit_takes_in_its_group() {
        let (from, xsave_from) = changed();
        let page = filled(&from, 0, &xsave_from);
        for bit in 0..5 {
            let mut vp = VpState::reset(true);
            let mut xsave = [0; XSAVE_BYTES];
            let before = filled(&vp, 0, &xsave);
            absorb(&page, 1 << bit, &mut vp, &mut xsave);
            let after = filled(&vp, 0, &xsave);
            let pairs = |pairs: &[[AtomicU64; 2]; 6]| core::array::from_fn(|i| load(&pairs[i]));
            let segments: [_; 6] = pairs(&after.segments);
            let taken = [
                load(&after.gprs) != load(&before.gprs),
                get(&after.rip) != get(&before.rip),
                pairs(&after.xmm) != pairs(&before.xmm),
                segments != pairs(&before.segments),
                get(&after.rflags) != get(&before.rflags),
            ];
            assert_eq!(taken, core::array::from_fn(|index| index == bit));
        }
    }

    #[test]
    fn control_registers_cannot_be_set_by_the_page() {
        let (from, xsave) = changed();
        let page = filled(&from, 0, &xsave);
        for word in [&page.cr0, &page.efer, &page.pending_interruption] {
            word.store(1, Relaxed);
        }
        let mut vp = VpState::reset(true);
        absorb(&page, EVERY, &mut vp, &mut [0; XSAVE_BYTES]);
        assert_eq!(
            (vp.cr0, vp.efer, vp.pending_interruption),
            (0x6000_0010, 0, 0)
        );
    }

    #[test]
    fn other_xmm_registers_survive() {
        let (mut vp, mut xsave) = changed();
        let page = filled(&vp, 0, &xsave);
        for xmm in &page.xmm {
            store(xmm, &[7; 2]);
        }
        absorb(&page, dirty::XMM, &mut vp, &mut xsave);
        assert_eq!(fpu::xmm(&xsave, 5), [7, 7]);
        assert_eq!(fpu::xmm(&xsave, 6), [6, 99]);
    }

    #[test]
    fn rflags_from_the_page_have_bit_1() {
        let (mut vp, mut xsave) = changed();
        let page = filled(&vp, 0, &xsave);
        page.rflags.store(0x44, Relaxed);
        absorb(&page, dirty::FLAGS, &mut vp, &mut xsave);
        assert_eq!(vp.rflags, 0x46);
    }
}
