// SPDX-License-Identifier: GPL-2.0
//! What both back ends switch between root and child besides the control structure: extended state, debug
//! registers, TSC_AUX, speculation.
//!
//! IA32_SPEC_CTRL holds the root's bits at all times, and while a child is current also the child's: whatever protects the root
//! protects the image at a child's exits without a write, so exits that the image finishes cost nothing. (With V_SPEC_CTRL of
//! AMD-V, APM 15.20.2, the processor adds the bits of the VMCB, which are zero, to the same effect.) The other barriers are for
//! what the root or another partition left behind; what the image touches for a child is the child's own partition.

use core::arch::asm;

use hv_abi::boot::CpuArea;
use hv_abi::layout::{cpu_block, cpu_page, selector};
use hv_abi::mitigation::action;

use super::cpu::{rdmsr, wrmsr};
use super::memory::direct;
use crate::header::boot;
use crate::vp::VpCore;

/// State components that a child may have: x87, SSE, AVX, AVX-512, PKRU. What it cannot touch stays the root's
/// without being moved (AMX tiles, CET, supervisor states).
pub const CHILD_XCR0: u64 = 0x2e7;
const TSC_AUX: u32 = 0xc000_0103;
const SPEC_CTRL: u32 = 0x48;
/// IA32_PRED_CMD and its IBPB, IA32_FLUSH_CMD and its L1D_FLUSH.
const PRED_CMD: u32 = 0x49;
const FLUSH_CMD: u32 = 0x10b;

fn xgetbv() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the image keeps Linux' CR4.OSXSAVE.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack))
    };
    u64::from(high) << 32 | u64::from(low)
}

/// Saves the components in `mask` to the page at `area`.
///
/// # Safety
/// `area` is a page of the hypervisor, and XCR0 has all components of `mask`.
unsafe fn xsave(area: *mut u8, mask: u64) {
    // SAFETY: by the caller's promise; 4 KiB hold the components of `CHILD_XCR0` (SDM 13.5).
    unsafe {
        asm!("xsave64 [{}]", in(reg) area, in("eax") mask as u32, in("edx") (mask >> 32) as u32,
            options(nostack));
    }
}

/// Loads them.
///
/// # Safety
/// As for [`xsave`], and the area holds a valid image.
unsafe fn xrstor(area: *mut u8, mask: u64) {
    // SAFETY: by the caller's promise.
    unsafe {
        asm!("xrstor64 [{}]", in(reg) area, in("eax") mask as u32, in("edx") (mask >> 32) as u32,
            options(nostack));
    }
}

macro_rules! debug_register {
    ($read:ident, $write:ident, $name:literal) => {
        /// Reads it.
        pub fn $read() -> u64 {
            let value;
            // SAFETY: the image runs at CPL 0 with DR7 without general detect.
            unsafe { asm!(concat!("mov {}, ", $name), out(reg) value, options(nomem, nostack)) };
            value
        }
        /// Writes it.
        pub fn $write(value: u64) {
            // SAFETY: DR7 is 0x400 in the image, so no breakpoint is armed here.
            unsafe { asm!(concat!("mov ", $name, ", {}"), in(reg) value, options(nomem, nostack)) };
        }
    };
}

debug_register!(dr0, set_dr0, "dr0");
debug_register!(dr1, set_dr1, "dr1");
debug_register!(dr2, set_dr2, "dr2");
debug_register!(dr3, set_dr3, "dr3");
debug_register!(dr6, set_dr6, "dr6");

#[inline(always)]
fn set_dr0_to_3([a, b, c, d]: [u64; 4]) {
    set_dr0(a);
    set_dr1(b);
    set_dr2(c);
    set_dr3(d);
}

fn cr2() -> u64 {
    let value;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, cr2", out(reg) value, options(nomem, nostack)) };
    value
}

fn set_cr2(value: u64) {
    // SAFETY: CR2 means nothing to the image.
    unsafe { asm!("mov cr2, {}", in(reg) value, options(nomem, nostack)) };
}

/// The root's part of the switched state, in a page of the CPU's block.
#[repr(C)]
struct RootState {
    xcr0: u64,
    tsc_aux: u64,
    dr: [u64; 4],
    dr6: u64,
    cr2: u64,
    spec_ctrl: u64,
}

fn root_state(cpu: u32) -> *mut RootState {
    cpu_page(cpu as usize, cpu_block::ROOT_STATE) as *mut RootState
}

fn root_xsave(area: &CpuArea) -> *mut u8 {
    cpu_page(area.cpu as usize, cpu_block::ROOT_XSAVE) as *mut u8
}

fn set_xcr0(from: u64, to: u64) {
    if from != to {
        super::cpu::xsetbv(to);
    }
}

fn set_tsc_aux(from: u64, to: u64) {
    if from != to {
        // SAFETY: RDTSCP exists where Linux uses the MSR; a child's value was checked to have 32 bits.
        unsafe { wrmsr(TSC_AUX, to) };
    }
}

/// What takes more than a few instructions on the way to a child, and to the root.
const TO_CHILD: u32 = action::SPEC_CTRL | action::CLEAR_BUFFERS | action::FLUSH_L1D;
const TO_ROOT: u32 = action::SPEC_CTRL | action::WRITE_SPEC_CTRL | action::IBPB_TO_ROOT;

/// Whether the world switch does any of this.
fn does(what: u32) -> bool {
    boot().mitigations & what != 0
}

fn write_spec_ctrl(value: u64) {
    // SAFETY: the root's value, with bits that CPUID offers to the child, which are the processor's.
    unsafe { wrmsr(SPEC_CTRL, value) };
}

/// The child that is current on `cpu` changed its IA32_SPEC_CTRL.
pub fn set_spec_ctrl(cpu: u32, core: &VpCore) {
    // SAFETY: as in `to_child`.
    let root = unsafe { &*root_state(cpu) };
    write_spec_ctrl(root.spec_ctrl | core.state.spec_ctrl);
}

/// IA32_PRED_CMD and IA32_FLUSH_CMD: their first bit.
fn command(number: u32) {
    // SAFETY: the loader found the register; what it drops comes back by itself.
    unsafe { wrmsr(number, 1) };
}

/// Overwrites the processor's buffers.
fn clear_buffers() {
    let data = selector::DATA;
    // SAFETY: VERW of a selector of the image's GDT changes only ZF (and the buffers).
    unsafe { asm!("verw word ptr [{}]", in(reg) &raw const data, options(nostack, readonly)) };
}

/// Fills the return stack with addresses of traps: none of the child's is left for the root's returns.
#[inline(always)]
fn fill_return_stack() {
    // SAFETY: each call pushes an address, which ADD takes from the stack again; nothing executes the traps. The image has no
    // red zone and no shadow stack.
    unsafe {
        asm!(
            ".rept 32",
            "call 3f",
            "int3",
            "3:",
            ".endr",
            "add rsp, 32 * 8",
            "lfence"
        );
    }
}

/// Apart, so that they cost nothing where there are none.
#[inline(never)]
fn barriers_to_child(root: &RootState, core: &VpCore, other: bool) {
    if does(action::SPEC_CTRL) && core.state.spec_ctrl & !root.spec_ctrl != 0 {
        write_spec_ctrl(root.spec_ctrl | core.state.spec_ctrl);
    }
    if other && does(action::IBPB_BETWEEN_CHILDREN) {
        command(PRED_CMD);
    }
    if does(action::FLUSH_L1D) {
        command(FLUSH_CMD);
    }
    if does(action::CLEAR_BUFFERS) {
        clear_buffers();
    }
}

#[inline(never)]
fn barriers_to_root(root: &RootState, core: &VpCore) {
    let extra = core.state.spec_ctrl & !root.spec_ctrl != 0;
    if does(action::WRITE_SPEC_CTRL) || extra && does(action::SPEC_CTRL) {
        write_spec_ctrl(root.spec_ctrl);
    }
    if does(action::IBPB_TO_ROOT) {
        command(PRED_CMD);
    }
}

/// From the root to a child. `other`: the child that this CPU ran last is of another partition. `in_registers`: CR2 and DR6 are
/// not in the control structures.
#[inline(always)]
pub fn to_child(area: &mut CpuArea, core: &VpCore, other: bool, in_registers: bool) {
    // SAFETY: the page belongs to this CPU; the image runs on it.
    let root = unsafe { &mut *root_state(area.cpu) };
    root.xcr0 = xgetbv();
    root.tsc_aux = rdmsr(TSC_AUX);
    root.dr = [dr0(), dr1(), dr2(), dr3()];
    if in_registers {
        root.dr6 = dr6();
        root.cr2 = cr2();
    }
    if does(action::SPEC_CTRL) {
        root.spec_ctrl = rdmsr(SPEC_CTRL);
    }
    let mask = root.xcr0 & CHILD_XCR0;
    // SAFETY: the area is a page of the hypervisor; XCR0 is the root's, which has all of `mask`.
    unsafe { xsave(root_xsave(area), mask) };
    // From here on there is something to bring back.
    area.extended = &raw const core.state.context as u64;
    // SAFETY: as above. The child's area is always a valid standard image: made by XSAVE or checked when the VMM set it.
    unsafe { xrstor(direct(core.xsave), mask) };
    set_xcr0(root.xcr0, core.state.xcr0);
    set_tsc_aux(root.tsc_aux, core.state.tsc_aux);
    set_dr0_to_3(core.state.dr);
    if in_registers {
        set_dr6(core.state.dr6);
        set_cr2(core.state.cr2);
    }
    if boot().mitigations != 0 {
        barriers_to_child(root, core, other);
    }
}

/// From the root back to a paused child: what [`pause`] did, undone.
#[inline(always)]
pub fn resume(area: &CpuArea, core: &VpCore, in_registers: bool) {
    // SAFETY: as in `to_child`.
    let root = unsafe { &mut *root_state(area.cpu) };
    if in_registers {
        root.dr6 = dr6();
        root.cr2 = cr2();
        set_dr6(core.state.dr6);
        set_cr2(core.state.cr2);
    }
}

/// Whether there is more to do before [`pause`] and before [`resume`] than they do.
#[inline(always)]
pub fn pause_has_barriers() -> bool {
    does(TO_ROOT)
}

/// See [`pause_has_barriers`].
#[inline(always)]
pub fn resume_has_barriers() -> bool {
    does(TO_CHILD)
}

/// Those before [`pause`].
pub fn pause_barriers(area: &CpuArea, core: &VpCore) {
    // SAFETY: as in `to_child`.
    barriers_to_root(unsafe { &*root_state(area.cpu) }, core);
}

/// Those before [`resume`].
pub fn resume_barriers(area: &CpuArea, core: &VpCore) {
    // SAFETY: as in `to_child`.
    let root = unsafe { &mut *root_state(area.cpu) };
    if does(action::SPEC_CTRL) {
        root.spec_ctrl = rdmsr(SPEC_CTRL);
    }
    barriers_to_child(root, core, false);
}

/// From a child to the root's kernel, which is about to complete a write to a port and nothing else: the extended state, DR0 to
/// DR3 and TSC_AUX stay the child's. The root has no breakpoint armed.
#[inline(always)]
pub fn pause(area: &CpuArea, core: &mut VpCore, in_registers: bool) {
    if does(action::FILL_RETURN_STACK) {
        fill_return_stack();
    }
    if in_registers {
        // SAFETY: as in `to_child`.
        let root = unsafe { &*root_state(area.cpu) };
        core.state.dr6 = dr6();
        core.state.cr2 = cr2();
        set_dr6(root.dr6);
        set_cr2(root.cr2);
    }
}

/// The rest of the way to the root after [`pause`].
#[inline(always)]
pub fn end_pause(area: &mut CpuArea, core: &mut VpCore) {
    // SAFETY: as in `to_child`.
    let root = unsafe { &*root_state(area.cpu) };
    core.state.dr = [dr0(), dr1(), dr2(), dr3()];
    set_xcr0(core.state.xcr0, root.xcr0);
    set_tsc_aux(core.state.tsc_aux, root.tsc_aux);
    let mask = root.xcr0 & CHILD_XCR0;
    // SAFETY: as in `to_child`.
    unsafe {
        xsave(direct(core.xsave), mask);
        xrstor(root_xsave(area), mask);
    }
    set_dr0_to_3(root.dr);
    area.extended = 0;
}

/// From a child to the root.
#[inline(always)]
pub fn to_root(area: &mut CpuArea, core: &mut VpCore, in_registers: bool) {
    if pause_has_barriers() {
        pause_barriers(area, core);
    }
    pause(area, core, in_registers);
    end_pause(area, core);
}

/// Brings back what [`to_child`] took of the root, wherever a fault stopped the switch. What the child had is lost.
pub fn rescue_root(area: &mut CpuArea, in_registers: bool) {
    if area.extended == 0 {
        return;
    }
    // SAFETY: as in `to_child`, which filled it.
    let root = unsafe { &*root_state(area.cpu) };
    if in_registers {
        set_dr6(root.dr6);
        set_cr2(root.cr2);
    }
    super::cpu::xsetbv(root.xcr0);
    // SAFETY: RDTSCP exists where the image runs children; the value is the root's.
    unsafe { wrmsr(TSC_AUX, root.tsc_aux) };
    if does(action::SPEC_CTRL) {
        write_spec_ctrl(root.spec_ctrl);
    }
    // SAFETY: as in `to_child`, which made the image.
    unsafe { xrstor(root_xsave(area), root.xcr0 & CHILD_XCR0) };
    set_dr0_to_3(root.dr);
    area.extended = 0;
}

/// XMM0 to XMM5: the image does not use them, so they are those of whoever ran last.
pub fn xmm() -> [u64; 12] {
    let mut values = [0_u64; 12];
    // SAFETY: 6 registers of 16 bytes fill the array; Linux' CR0 and CR4, which the image keeps, let SSE be used.
    unsafe {
        asm!(
            "movups [{0}], xmm0",
            "movups [{0} + 16], xmm1",
            "movups [{0} + 32], xmm2",
            "movups [{0} + 48], xmm3",
            "movups [{0} + 64], xmm4",
            "movups [{0} + 80], xmm5",
            in(reg) values.as_mut_ptr(),
            options(nostack)
        );
    }
    values
}

/// Host TSC.
pub fn rdtsc() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the image runs at CPL 0.
    unsafe { asm!("rdtsc", out("eax") low, out("edx") high, options(nomem, nostack)) };
    u64::from(high) << 32 | u64::from(low)
}
