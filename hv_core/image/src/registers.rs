// SPDX-License-Identifier: GPL-2.0
//! Registers of a VP by their TLFS names: HvCallGetVpRegisters and HvCallSetVpRegisters (TLFS 7.10).
//!
//! A VMM sets registers one after the other and may pass through combinations that no processor would
//! accept; those are for the processor to refuse at the next entry. What is refused here is only what
//! the hypervisor itself loads, with instructions that would fault in it.
#![forbid(unsafe_code)]
#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]

use hv_abi::status::HvStatus;
use hv_x86::regs::msr;
use hv_x86::state::{Segment, Table, UNUSABLE};

use crate::apic::{self, LocalApic, TimerClock, WriteEffect};
use crate::child_msr::{
    move_tsc, mtrr_slot, page, read_mtrr, reference_time, validate_xcr0, MTRR_CAP,
};
use crate::synic;
use crate::vp_state::{segment, Effect, PartitionState, TscWrite, VpState, XSAVE_BYTES};

/// Names of registers (`hv_register_name`), as far as they are not one of a series.
#[allow(missing_docs)] // The names are TLFS'.
pub mod name {
    pub const EXPLICIT_SUSPEND: u32 = 0x0;
    pub const INTERCEPT_SUSPEND: u32 = 0x1;
    pub const INSTRUCTION_EMULATION_HINTS: u32 = 0x2;
    pub const DISPATCH_SUSPEND: u32 = 0x3;
    pub const INTERNAL_ACTIVITY_STATE: u32 = 0x4;
    pub const CRASH_P0: u32 = 0x210;
    pub const CRASH_CTL: u32 = 0x215;
    pub const PROCESSOR_CLOCK_FREQUENCY: u32 = 0x240;
    pub const INTERRUPT_CLOCK_FREQUENCY: u32 = 0x241;
    pub const PENDING_INTERRUPTION: u32 = 0x1_0002;
    pub const INTERRUPT_STATE: u32 = 0x1_0003;
    pub const PENDING_EVENT0: u32 = 0x1_0004;
    pub const PENDING_EVENT1: u32 = 0x1_0005;
    pub const DELIVERABILITY_NOTIFICATIONS: u32 = 0x1_0006;
    pub const PENDING_DEBUG_EXCEPTION: u32 = 0x1_0007;
    pub const RAX: u32 = 0x2_0000;
    pub const R15: u32 = 0x2_000f;
    pub const RIP: u32 = 0x2_0010;
    pub const RFLAGS: u32 = 0x2_0011;
    pub const XMM0: u32 = 0x3_0000;
    pub const XMM15: u32 = 0x3_000f;
    pub const FP_MMX0: u32 = 0x3_0010;
    pub const FP_MMX7: u32 = 0x3_0017;
    pub const FP_CONTROL_STATUS: u32 = 0x3_0018;
    pub const XMM_CONTROL_STATUS: u32 = 0x3_0019;
    pub const CR0: u32 = 0x4_0000;
    pub const CR2: u32 = 0x4_0001;
    pub const CR3: u32 = 0x4_0002;
    pub const CR4: u32 = 0x4_0003;
    pub const CR8: u32 = 0x4_0004;
    pub const XFEM: u32 = 0x4_0005;
    pub const INTERMEDIATE_CR0: u32 = 0x4_1000;
    pub const INTERMEDIATE_CR3: u32 = 0x4_1002;
    pub const INTERMEDIATE_CR4: u32 = 0x4_1003;
    pub const INTERMEDIATE_CR8: u32 = 0x4_1004;
    pub const DR0: u32 = 0x5_0000;
    pub const DR3: u32 = 0x5_0003;
    pub const DR6: u32 = 0x5_0004;
    pub const DR7: u32 = 0x5_0005;
    pub const ES: u32 = 0x6_0000;
    pub const CS: u32 = 0x6_0001;
    pub const TR: u32 = 0x6_0007;
    pub const IDTR: u32 = 0x7_0000;
    pub const GDTR: u32 = 0x7_0001;
    pub const TSC: u32 = 0x8_0000;
    pub const EFER: u32 = 0x8_0001;
    pub const KERNEL_GS_BASE: u32 = 0x8_0002;
    pub const APIC_BASE: u32 = 0x8_0003;
    pub const PAT: u32 = 0x8_0004;
    pub const SYSENTER_CS: u32 = 0x8_0005;
    pub const SYSENTER_EIP: u32 = 0x8_0006;
    pub const SYSENTER_ESP: u32 = 0x8_0007;
    pub const STAR: u32 = 0x8_0008;
    pub const LSTAR: u32 = 0x8_0009;
    pub const CSTAR: u32 = 0x8_000a;
    pub const SFMASK: u32 = 0x8_000b;
    pub const INITIAL_APIC_ID: u32 = 0x8_000c;
    pub const MTRR_CAP: u32 = 0x8_000d;
    pub const MTRR_DEF_TYPE: u32 = 0x8_000e;
    pub const MTRR_PHYS_BASE0: u32 = 0x8_0010;
    pub const MTRR_PHYS_BASEF: u32 = 0x8_001f;
    pub const MTRR_PHYS_MASK0: u32 = 0x8_0040;
    pub const MTRR_PHYS_MASKF: u32 = 0x8_004f;
    pub const MTRR_FIX64K00000: u32 = 0x8_0070;
    pub const MTRR_FIX4KF8000: u32 = 0x8_007a;
    pub const TSC_AUX: u32 = 0x8_007b;
    pub const BNDCFGS: u32 = 0x8_007c;
    pub const DEBUG_CTL: u32 = 0x8_007d;
    pub const SPEC_CTRL: u32 = 0x8_0084;
    pub const PRED_CMD: u32 = 0x8_0085;
    pub const VIRT_SPEC_CTRL: u32 = 0x8_0086;
    pub const U_XSS: u32 = 0x8_008b;
    pub const U_CET: u32 = 0x8_008c;
    pub const INTERRUPT_SSP_TABLE_ADDR: u32 = 0x8_0093;
    pub const TSC_ADJUST: u32 = 0x8_0096;
    pub const MISC_ENABLE: u32 = 0x8_00a0;
    pub const APIC_ID: u32 = 0x8_4802;
    pub const APIC_VERSION: u32 = 0x8_4803;
    pub const VP_RUNTIME: u32 = 0x9_0000;
    pub const HYPERCALL: u32 = 0x9_0001;
    pub const GUEST_OS_ID: u32 = 0x9_0002;
    pub const VP_INDEX: u32 = 0x9_0003;
    pub const TIME_REF_COUNT: u32 = 0x9_0004;
    pub const VP_ASSIST_PAGE: u32 = 0x9_0013;
    pub const REFERENCE_TSC: u32 = 0x9_0017;
    pub const SINT0: u32 = 0xa_0000;
    pub const SINT15: u32 = 0xa_000f;
    pub const SCONTROL: u32 = 0xa_0010;
    pub const SVERSION: u32 = 0xa_0011;
    pub const SIEFP: u32 = 0xa_0012;
    pub const SIMP: u32 = 0xa_0013;
    pub const EOM: u32 = 0xa_0014;
    pub const SIRBP: u32 = 0xa_0015;
    pub const STIMER0_CONFIG: u32 = 0xb_0000;
    pub const STIMER3_COUNT: u32 = 0xb_0007;
}

/// Bits of INTERNAL_ACTIVITY_STATE.
const STARTUP_SUSPEND: u64 = 1 << 0;
const HALT_SUSPEND: u64 = 1 << 1;

/// DELIVERABILITY_NOTIFICATIONS: sources of the SynIC.
const NOTIFY_SINTS: u64 = 0xffff << 48;

/// Everything that a register name can reach.
pub struct Registers<'a> {
    /// Registers of the VP.
    pub vp: &'a mut VpState,
    /// Its local APIC.
    pub apic: &'a mut LocalApic,
    /// Its partition.
    pub partition: &'a mut PartitionState,
    /// Its XSAVE area, in standard form.
    pub xsave: &'a mut [u8; XSAVE_BYTES],
    /// Its index.
    pub vp_index: u32,
    /// Host TSC.
    pub host_tsc: u64,
}

impl Registers<'_> {
    /// Reads a register: low and high half.
    ///
    /// # Errors
    ///
    /// INVALID_PARAMETER for a name that does not exist.
    pub fn get(&mut self, number: u32) -> Result<[u64; 2], HvStatus> {
        use name::*;
        let vp = &*self.vp;
        let partition = &*self.partition;
        let word = match number {
            XMM0..=XMM15 => return Ok(fpu::xmm(self.xsave, offset(number, XMM0))),
            FP_MMX0..=FP_MMX7 => return Ok(fpu::st(self.xsave, offset(number, FP_MMX0))),
            FP_CONTROL_STATUS => return Ok(fpu::control(self.xsave)),
            XMM_CONTROL_STATUS => return Ok(fpu::sse_control(self.xsave)),
            ES..=TR => {
                let found = vp.segments.get(offset(number, ES));
                return found.map(segment_value).ok_or(HvStatus::INVALID_PARAMETER);
            }
            IDTR => return Ok(table_value(&vp.idtr)),
            GDTR => return Ok(table_value(&vp.gdtr)),
            PENDING_EVENT0 => return Ok(vp.pending_event),
            PENDING_EVENT1 => return Ok(vp.pending_event1),
            TSC => {
                let tsc = self.host_tsc.wrapping_add(vp.tsc_offset);
                self.vp.tsc_read = Some(tsc);
                tsc
            }
            EXPLICIT_SUSPEND => vp.explicit_suspend.into(),
            INTERCEPT_SUSPEND => vp.intercept_suspend.into(),
            INTERNAL_ACTIVITY_STATE => {
                let when = |on: bool, bit: u64| if on { bit } else { 0 };
                when(vp.startup_suspend, STARTUP_SUSPEND) | when(vp.halt_suspend, HALT_SUSPEND)
            }
            CRASH_P0..=CRASH_CTL => *item(&partition.crash, number, CRASH_P0)?,
            PROCESSOR_CLOCK_FREQUENCY => partition.tsc_hz,
            INTERRUPT_CLOCK_FREQUENCY => TimerClock::HYPERV_APIC_HZ,
            PENDING_INTERRUPTION => vp.pending_interruption,
            INTERRUPT_STATE => interrupt_state(vp),
            RAX..=R15 => *item(&vp.context.gprs, number, RAX)?,
            RIP => vp.rip,
            RFLAGS => vp.rflags,
            CR0 | INTERMEDIATE_CR0 => vp.cr0,
            CR2 => vp.cr2,
            CR3 | INTERMEDIATE_CR3 => vp.cr3,
            CR4 | INTERMEDIATE_CR4 => vp.cr4,
            CR8 | INTERMEDIATE_CR8 => self.apic.cr8(),
            XFEM => vp.xcr0,
            DR0..=DR3 => *item(&vp.dr, number, DR0)?,
            DR6 => vp.dr6,
            DR7 => vp.dr7,
            EFER => vp.efer,
            KERNEL_GS_BASE => vp.kernel_gs_base,
            APIC_BASE => self.apic.apic_base(),
            PAT => vp.pat,
            SYSENTER_CS => vp.sysenter_cs,
            SYSENTER_EIP => vp.sysenter_eip,
            SYSENTER_ESP => vp.sysenter_esp,
            STAR => vp.star,
            LSTAR => vp.lstar,
            CSTAR => vp.cstar,
            SFMASK => vp.sfmask,
            INITIAL_APIC_ID | APIC_ID => self.apic.id().into(),
            APIC_VERSION => apic::VERSION.into(),
            MTRR_CAP => self::MTRR_CAP,
            TSC_AUX => vp.tsc_aux,
            DEBUG_CTL => vp.debugctl,
            SPEC_CTRL => vp.spec_ctrl,
            U_XSS => vp.xss,
            TSC_ADJUST => vp.tsc_adjust,
            MISC_ENABLE => vp.misc_enable,
            HYPERCALL => partition.hypercall,
            GUEST_OS_ID => partition.guest_os_id,
            VP_INDEX => self.vp_index.into(),
            TIME_REF_COUNT => reference_time(self.host_tsc, partition),
            VP_ASSIST_PAGE => vp.vp_assist_page,
            REFERENCE_TSC => partition.reference_tsc,
            SINT0..=SINT15 => *item(&vp.synic.sint, number, SINT0)?,
            SCONTROL => vp.synic.control,
            SVERSION => synic::VERSION,
            SIEFP => vp.synic.siefp,
            SIMP => vp.synic.simp,
            _ => match mtrr_number(number).and_then(|number| read_mtrr(number, vp)) {
                Some(value) => value,
                None if reads_zero(number) => 0,
                None => return Err(HvStatus::INVALID_PARAMETER),
            },
        };
        Ok([word, 0])
    }

    /// Writes a register.
    ///
    /// # Errors
    ///
    /// INVALID_PARAMETER for a name that does not exist or cannot be written, and for deliverability
    /// notifications; INVALID_REGISTER_VALUE for a value that the hypervisor could not load. Nothing is
    /// changed then.
    pub fn set(&mut self, number: u32, value: [u64; 2]) -> Result<Effect, HvStatus> {
        use name::*;
        let [low, high] = value;
        let vp = &mut *self.vp;
        match number {
            XMM0..=XMM15 => fpu::set_xmm(self.xsave, offset(number, XMM0), value),
            FP_MMX0..=FP_MMX7 => fpu::set_st(self.xsave, offset(number, FP_MMX0), value),
            FP_CONTROL_STATUS => fpu::set_control(self.xsave, value),
            XMM_CONTROL_STATUS => check(fpu::set_sse_control(self.xsave, value))?,
            ES..=TR => *item_mut(&mut vp.segments, number, ES)? = segment_from(value),
            IDTR => vp.idtr = table_from(value),
            GDTR => vp.gdtr = table_from(value),
            PENDING_EVENT0 => vp.pending_event = value,
            PENDING_EVENT1 => vp.pending_event1 = value,
            TSC => return Ok(self.set_tsc(low)),
            EXPLICIT_SUSPEND => vp.explicit_suspend = low & 1 != 0,
            INTERCEPT_SUSPEND => vp.intercept_suspend = low & 1 != 0,
            // The root schedules: it dispatches the VP or not.
            DISPATCH_SUSPEND => {}
            INTERNAL_ACTIVITY_STATE => {
                vp.startup_suspend = low & STARTUP_SUSPEND != 0;
                vp.halt_suspend = low & HALT_SUSPEND != 0;
            }
            CRASH_P0..=CRASH_CTL => *item_mut(&mut self.partition.crash, number, CRASH_P0)? = low,
            PENDING_INTERRUPTION => vp.pending_interruption = low,
            INTERRUPT_STATE => {
                vp.interrupt_shadow = low & 1 != 0;
                vp.nmi_masked = low & 2 != 0;
            }
            DELIVERABILITY_NOTIFICATIONS => {
                // Of those for interrupts there are none: the APIC is the hypervisor's.
                if low & !NOTIFY_SINTS != 0 {
                    return Err(HvStatus::INVALID_PARAMETER);
                }
                return Ok(Effect::Notify((low >> 48) as u16));
            }
            RAX..=R15 => *item_mut(&mut vp.context.gprs, number, RAX)? = low,
            RIP => vp.rip = low,
            RFLAGS => vp.rflags = low | 2,
            CR0 | INTERMEDIATE_CR0 => vp.cr0 = low,
            CR2 => vp.cr2 = low,
            CR3 | INTERMEDIATE_CR3 => vp.cr3 = low,
            CR4 | INTERMEDIATE_CR4 => vp.cr4 = low,
            CR8 | INTERMEDIATE_CR8 => {
                // Equal: the sub-class in bits 3:0 of TPR stays.
                if low != self.apic.cr8() {
                    check(self.apic.set_cr8(low).is_ok())?;
                }
            }
            XFEM => vp.xcr0 = validate_xcr0(low, &vp.features).map_err(|_| BAD_VALUE)?,
            DR0..=DR3 => *item_mut(&mut vp.dr, number, DR0)? = low,
            DR6 | DR7 => {
                check(low >> 32 == 0)?;
                if number == DR6 {
                    vp.dr6 = low;
                } else {
                    vp.dr7 = low;
                }
            }
            EFER => vp.efer = low,
            KERNEL_GS_BASE => vp.kernel_gs_base = canonical(low, vp)?,
            APIC_BASE => {
                check(self.apic.restore_apic_base(low).is_ok())?;
                return Ok(Effect::Apic(WriteEffect::BaseChanged));
            }
            PAT => vp.pat = low,
            SYSENTER_CS => vp.sysenter_cs = low,
            SYSENTER_EIP => vp.sysenter_eip = canonical(low, vp)?,
            SYSENTER_ESP => vp.sysenter_esp = canonical(low, vp)?,
            STAR => vp.star = low,
            LSTAR => vp.lstar = canonical(low, vp)?,
            CSTAR => vp.cstar = canonical(low, vp)?,
            SFMASK | TSC_AUX => {
                check(low >> 32 == 0)?;
                if number == SFMASK {
                    vp.sfmask = low;
                } else {
                    vp.tsc_aux = low;
                }
            }
            // Known by index, and for ever.
            INITIAL_APIC_ID => check(low == self.apic.id().into())?,
            DEBUG_CTL => vp.debugctl = low,
            SPEC_CTRL => {
                check(low & !vp.features.spec_ctrl == 0)?;
                vp.spec_ctrl = low;
            }
            U_XSS => check(low == 0)?,
            TSC_ADJUST => vp.tsc_adjust = low,
            MISC_ENABLE => vp.misc_enable = low,
            HYPERCALL => {
                let old = core::mem::replace(&mut self.partition.hypercall, low);
                return Ok(if page(old) == page(low) {
                    Effect::None
                } else {
                    Effect::HypercallPage(page(low))
                });
            }
            GUEST_OS_ID => self.partition.guest_os_id = low,
            VP_ASSIST_PAGE => {
                let old = core::mem::replace(&mut vp.vp_assist_page, low);
                return Ok(if page(old) == page(low) {
                    Effect::None
                } else {
                    Effect::VpAssistPage(page(low))
                });
            }
            REFERENCE_TSC => {
                let old = core::mem::replace(&mut self.partition.reference_tsc, low);
                return Ok(if page(old) == page(low) {
                    Effect::None
                } else {
                    Effect::ReferenceTscPage(page(low))
                });
            }
            SINT0..=SINT15 => {
                *item_mut(&mut vp.synic.sint, number, SINT0)? = low;
                return Ok(Effect::Synic(None));
            }
            SCONTROL => {
                vp.synic.control = low & synic::ENABLE;
                return Ok(Effect::Synic(None));
            }
            SIEFP => {
                vp.synic.siefp = low;
                return Ok(Effect::Synic(None));
            }
            SIMP => {
                vp.synic.simp = low;
                return Ok(Effect::Synic(None));
            }
            // End of message: whatever was written.
            EOM => return Ok(Effect::Synic(None)),
            _ => {
                if let Some(slot) = mtrr_number(number).and_then(|number| mtrr_slot(number, vp)) {
                    *slot = low;
                } else if reads_zero(number) {
                    check(low == 0 && high == 0)?;
                } else {
                    return Err(HvStatus::INVALID_PARAMETER);
                }
            }
        }
        Ok(Effect::None)
    }

    /// Sets the guest's TSC.
    ///
    /// A VMM that stores what it loaded before means no change, though time went on since. One that sets the TSCs of several VPs to
    /// the same value, as at a reset, or within a second to one that goes with it, means the same time: they get one offset. How long it
    /// takes from one VP to the next says nothing, since none of them needs to run.
    fn set_tsc(&mut self, value: u64) -> Effect {
        if self.vp.tsc_read == Some(value) {
            return Effect::None;
        }
        let mut offset = value.wrapping_sub(self.host_tsc);
        let last = &mut self.partition.tsc_write;
        let apart = last
            .offset
            .wrapping_sub(offset)
            .min(offset.wrapping_sub(last.offset));
        let together = last.value == value || apart <= self.partition.tsc_hz;
        if self.vp.tsc_write < last.number && together {
            offset = last.offset;
        } else {
            *last = TscWrite {
                number: last.number.wrapping_add(1),
                value,
                offset,
            };
        }
        self.vp.tsc_write = last.number;
        self.vp.tsc_read = None;
        let step = offset.wrapping_sub(self.vp.tsc_offset);
        move_tsc(step, self.vp, self.apic, self.host_tsc)
    }
}

const BAD_VALUE: HvStatus = HvStatus::INVALID_REGISTER_VALUE;

fn check(good: bool) -> Result<(), HvStatus> {
    if good {
        Ok(())
    } else {
        Err(BAD_VALUE)
    }
}

/// The hypervisor loads it with WRMSR: it has to be canonical.
fn canonical(address: u64, vp: &VpState) -> Result<u64, HvStatus> {
    check(vp.features.is_canonical(address))?;
    Ok(address)
}

/// Position in a series of names.
const fn offset(number: u32, first: u32) -> usize {
    number.wrapping_sub(first) as usize
}

fn item<T>(list: &[T], number: u32, first: u32) -> Result<&T, HvStatus> {
    list.get(offset(number, first))
        .ok_or(HvStatus::INVALID_PARAMETER)
}

fn item_mut<T>(list: &mut [T], number: u32, first: u32) -> Result<&mut T, HvStatus> {
    list.get_mut(offset(number, first))
        .ok_or(HvStatus::INVALID_PARAMETER)
}

/// MSR number of an MTRR by its register name.
fn mtrr_number(number: u32) -> Option<u32> {
    use name::*;
    let variable = |index: u32, mask: u32| {
        (index < 8).then(|| msr::MTRR_VARIABLE.wrapping_add((index << 1) | mask))
    };
    match number {
        MTRR_DEF_TYPE => Some(msr::MTRR_DEF_TYPE),
        MTRR_PHYS_BASE0..=MTRR_PHYS_BASEF => variable(number.wrapping_sub(MTRR_PHYS_BASE0), 0),
        MTRR_PHYS_MASK0..=MTRR_PHYS_MASKF => variable(number.wrapping_sub(MTRR_PHYS_MASK0), 1),
        MTRR_FIX64K00000..=MTRR_FIX4KF8000 => msr::MTRR_FIXED
            .get(offset(number, MTRR_FIX64K00000))
            .copied(),
        _ => None,
    }
}

/// Registers of features that a VP does not have. Clients hold them in lists that have to succeed as a whole.
const fn reads_zero(number: u32) -> bool {
    use name::*;
    matches!(
        number,
        INSTRUCTION_EMULATION_HINTS
            | DISPATCH_SUSPEND
            | DELIVERABILITY_NOTIFICATIONS
            | PENDING_DEBUG_EXCEPTION
            | MTRR_PHYS_BASE0..=MTRR_PHYS_BASEF
            | MTRR_PHYS_MASK0..=MTRR_PHYS_MASKF
            | BNDCFGS
            | PRED_CMD
            | VIRT_SPEC_CTRL
            | U_CET..=INTERRUPT_SSP_TABLE_ADDR
            | VP_RUNTIME
            | EOM
            | SIRBP
            | STIMER0_CONFIG..=STIMER3_COUNT
    )
}

// ---- forms of values ------------------------------------------------------------------------------------

/// `hv_x64_interrupt_state_register`.
pub(crate) fn interrupt_state(vp: &VpState) -> u64 {
    u64::from(vp.interrupt_shadow) | (u64::from(vp.nmi_masked) << 1)
}

/// `hv_x64_segment_register`. An unusable register reads as not present.
pub(crate) fn segment_value(from: &Segment) -> [u64; 2] {
    let mut attributes = from.rights & 0xf0ff;
    if from.rights & UNUSABLE != 0 {
        attributes &= !PRESENT;
    }
    [
        from.base,
        u64::from(from.limit) | (u64::from(from.selector) << 32) | (u64::from(attributes) << 48),
    ]
}

/// Access rights bit 7.
const PRESENT: u32 = 1 << 7;

pub(crate) fn segment_from([base, high]: [u64; 2]) -> Segment {
    let rights = (high >> 48) as u32 & 0xf0ff;
    Segment {
        base,
        limit: high as u32,
        rights: if rights & PRESENT == 0 {
            rights | UNUSABLE
        } else {
            rights
        },
        selector: (high >> 32) as u16,
    }
}

/// `hv_x64_table_register`.
fn table_value(from: &Table) -> [u64; 2] {
    [u64::from(from.limit) << 48, from.base]
}

fn table_from([low, base]: [u64; 2]) -> Table {
    Table {
        base,
        limit: (low >> 48) as u16,
    }
}

/// The legacy region of an XSAVE area in standard form (SDM vol 1, 10.5.1 and 13.4.1).
///
/// A component whose bit in XSTATE_BV is clear is in its initial state, whatever its bytes say.
pub(crate) mod fpu {
    use crate::vp_state::XSAVE_BYTES;

    type Area = [u8; XSAVE_BYTES];

    const FCW: usize = 0;
    const FIP: usize = 8;
    const FDP: usize = 16;
    const MXCSR: usize = 24;
    const ST0: usize = 32;
    const XMM0: usize = 160;
    const XMM_END: usize = 416;
    const XSTATE_BV: usize = 512;
    const X87: u64 = 1 << 0;
    const SSE: u64 = 1 << 1;
    /// FCW after FNINIT.
    const INITIAL_FCW: u64 = 0x37f;
    /// Bits of MXCSR that exist: what MXCSR_MASK says.
    const MXCSR_BITS: u32 = 0xffff;

    fn word(area: &Area, at: usize) -> u64 {
        let bytes = area.get(at..).and_then(|rest| rest.first_chunk::<8>());
        bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }

    fn set_word(area: &mut Area, at: usize, value: u64) {
        if let Some(bytes) = area
            .get_mut(at..)
            .and_then(|rest| rest.first_chunk_mut::<8>())
        {
            *bytes = value.to_le_bytes();
        }
    }

    fn in_use(area: &Area, component: u64) -> bool {
        word(area, XSTATE_BV) & component != 0
    }

    /// Makes the bytes of a component count.
    fn begin(area: &mut Area, component: u64) {
        if in_use(area, component) {
            return;
        }
        if component == X87 {
            set_word(area, FCW, INITIAL_FCW);
            set_word(area, FIP, 0);
            set_word(area, FDP, 0);
            if let Some(bytes) = area.get_mut(ST0..XMM0) {
                bytes.fill(0);
            }
        } else if let Some(bytes) = area.get_mut(XMM0..XMM_END) {
            bytes.fill(0);
        }
        let used = word(area, XSTATE_BV) | component;
        set_word(area, XSTATE_BV, used);
    }

    /// Start of the 16-byte register `index` of those at `first`.
    fn place(first: usize, index: usize) -> usize {
        first.saturating_add(index.saturating_mul(16))
    }

    fn pair(area: &Area, at: usize) -> [u64; 2] {
        [word(area, at), word(area, at.saturating_add(8))]
    }

    fn set_pair(area: &mut Area, at: usize, [low, high]: [u64; 2]) {
        set_word(area, at, low);
        set_word(area, at.saturating_add(8), high);
    }

    /// XMM0 to XMM15.
    pub(crate) fn xmm(area: &Area, index: usize) -> [u64; 2] {
        if in_use(area, SSE) {
            pair(area, place(XMM0, index))
        } else {
            [0; 2]
        }
    }

    /// Gives XMM0 to XMM5 to `to`, one after the other.
    #[inline(always)]
    pub(crate) fn first_xmm(area: &Area, mut to: impl FnMut(usize, [u64; 2])) {
        let used = in_use(area, SSE);
        for index in 0..6 {
            to(
                index,
                if used {
                    pair(area, place(XMM0, index))
                } else {
                    [0; 2]
                },
            );
        }
    }

    /// Sets XMM0 to XMM15.
    pub(crate) fn set_xmm(area: &mut Area, index: usize, value: [u64; 2]) {
        begin(area, SSE);
        set_pair(area, place(XMM0, index), value);
    }

    /// ST(0) to ST(7): 80 bits.
    pub(crate) fn st(area: &Area, index: usize) -> [u64; 2] {
        if !in_use(area, X87) {
            return [0; 2];
        }
        let [low, high] = pair(area, place(ST0, index));
        [low, high & 0xffff]
    }

    /// Sets ST(0) to ST(7).
    pub(crate) fn set_st(area: &mut Area, index: usize, [low, high]: [u64; 2]) {
        begin(area, X87);
        set_pair(area, place(ST0, index), [low, high & 0xffff]);
    }

    /// `hv_x64_fp_control_status_register`: FCW, FSW, abridged FTW, opcode; instruction pointer.
    pub(crate) fn control(area: &Area) -> [u64; 2] {
        if in_use(area, X87) {
            [word(area, FCW) & !(0xff << 40), word(area, FIP)]
        } else {
            [INITIAL_FCW, 0]
        }
    }

    /// Sets them.
    pub(crate) fn set_control(area: &mut Area, [low, high]: [u64; 2]) {
        begin(area, X87);
        set_word(area, FCW, low & !(0xff << 40));
        set_word(area, FIP, high);
    }

    /// `hv_x64_xmm_control_status_register`: data pointer; MXCSR and its mask.
    pub(crate) fn sse_control(area: &Area) -> [u64; 2] {
        let pointer = if in_use(area, X87) {
            word(area, FDP)
        } else {
            0
        };
        // The standard form has MXCSR whether SSE is in use or not (SDM vol 1, 13.8.1).
        let mxcsr = word(area, MXCSR) as u32 & MXCSR_BITS;
        [pointer, u64::from(mxcsr) | (u64::from(MXCSR_BITS) << 32)]
    }

    /// Sets them; false if MXCSR has bits that XRSTOR refuses. The mask cannot be set.
    pub(crate) fn set_sse_control(area: &mut Area, [low, high]: [u64; 2]) -> bool {
        let mxcsr = high as u32;
        if mxcsr & !MXCSR_BITS != 0 {
            return false;
        }
        if low != 0 || in_use(area, X87) {
            begin(area, X87);
            set_word(area, FDP, low);
        }
        begin(area, SSE);
        set_word(
            area,
            MXCSR,
            u64::from(mxcsr) | (u64::from(MXCSR_BITS) << 32),
        );
        true
    }
}

// ---- reset by the VMM ------------------------------------------------------------------------------------

/// Which registers one HvCallSetVpRegisters wrote, to recognise a VMM that resets a VP by its registers
/// alone: it sets CS, CR0 and IA32_APIC_BASE in one call, to what they are after power-on.
#[derive(Clone, Copy, Debug, Default)]
pub struct SetGroup {
    code_segment: bool,
    cr0: bool,
    apic_base: bool,
}

impl SetGroup {
    /// Takes note of a name.
    pub fn note(&mut self, number: u32) {
        match number {
            name::CS => self.code_segment = true,
            name::CR0 => self.cr0 = true,
            name::APIC_BASE => self.apic_base = true,
            _ => {}
        }
    }

    /// After the call: whether it was a reset. RIP may have come before, by a call of its own or by the
    /// register page.
    #[must_use]
    pub fn is_reset(&self, vp: &VpState) -> bool {
        let fresh = VpState::RESET_CODE;
        let code = vp.segments.get(segment::CS);
        self.code_segment
            && self.cr0
            && self.apic_base
            && vp.rip == VpState::RESET_RIP
            && code.is_some_and(|code| (code.selector, code.base) == (fresh.selector, fresh.base))
            && vp.cr0 == VpState::RESET_CR0
            && vp.efer == 0
    }
}

/// Does what a reset does to the state that no register name reaches: the APIC but for the LINT entries that the
/// VMM set up, the SynIC, events, and who waits for a start-up IPI. The addressing of the APIC has to be published.
pub fn reset(vp: &mut VpState, apic: &mut LocalApic) {
    apic.reset(true);
    vp.synic = synic::Registers::RESET;
    vp.vp_assist_page = 0;
    vp.pending_interruption = 0;
    vp.pending_event = [0; 2];
    vp.pending_event1 = [0; 2];
    vp.interrupt_shadow = false;
    vp.nmi_masked = false;
    vp.halt_suspend = false;
    vp.idle = false;
    vp.startup_suspend = !apic.is_bsp();
}

#[cfg(test)]
#[allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]
mod tests {
    use super::*;
    use crate::apic::{ApicConfig, Mode};
    use crate::child_cpuid::Features;
    use crate::vp_state::HostFacts;
    use hv_abi::boot::Vendor;

    const HZ: u64 = 2_000_000_000;

    struct Machine {
        vp: VpState,
        apic: LocalApic,
        partition: PartitionState,
        xsave: [u8; XSAVE_BYTES],
        index: u32,
        tsc: u64,
    }

    impl Machine {
        fn new(index: u32) -> Self {
            let clock = TimerClock::new(HZ, TimerClock::HYPERV_APIC_HZ).unwrap();
            let config = ApicConfig {
                x2apic: true,
                tsc_deadline: true,
                physical_address_bits: 40,
                clock,
            };
            let host = HostFacts {
                vendor: Vendor::Vmx,
                tsc_hz: HZ,
                xcr0: 7,
                arch_capabilities: 0,
            };
            let mut xsave = [0; XSAVE_BYTES];
            xsave[0] = 0x7f;
            xsave[1] = 3;
            xsave[24] = 0x80;
            xsave[25] = 0x1f;
            let mut vp = VpState::reset(index == 0);
            vp.features = Features {
                xcr0: 7,
                ..Features::NONE
            };
            Self {
                vp,
                apic: LocalApic::new(config, index, index == 0),
                partition: PartitionState::new(host, 1000),
                xsave,
                index,
                tsc: 1_000_000,
            }
        }

        fn registers(&mut self) -> Registers<'_> {
            Registers {
                vp: &mut self.vp,
                apic: &mut self.apic,
                partition: &mut self.partition,
                xsave: &mut self.xsave,
                vp_index: self.index,
                host_tsc: self.tsc,
            }
        }

        fn get(&mut self, number: u32) -> [u64; 2] {
            self.registers().get(number).unwrap()
        }

        fn set(&mut self, number: u32, low: u64) -> Result<Effect, HvStatus> {
            self.registers().set(number, [low, 0])
        }

        fn put(&mut self, number: u32, low: u64) {
            self.put_pair(number, [low, 0]);
        }

        fn put_pair(&mut self, number: u32, value: [u64; 2]) {
            let _ = self.registers().set(number, value).unwrap();
        }
    }

    /// Names that QEMU, the mshv crates and Cloud Hypervisor read and write in lists.
    fn client_names() -> Vec<u32> {
        let mut names = vec![];
        for (first, last) in [
            (0x2_0000, 0x2_0011),
            (0x3_0000, 0x3_0019),
            (0x4_0000, 0x4_0005),
            (0x5_0000, 0x5_0005),
            (0x6_0000, 0x6_0007),
            (0x7_0000, 0x7_0001),
            (0x8_0000, 0x8_000b),
            (0x8_000e, 0x8_000e),
            (0x8_0010, 0x8_0017),
            (0x8_0040, 0x8_0047),
            (0x8_0070, 0x8_007b),
            (0x8_007d, 0x8_007d),
            (0x8_0084, 0x8_0084),
            (0x8_008b, 0x8_0093),
            (0x8_0096, 0x8_0096),
            (0x9_0001, 0x9_0002),
            (0x9_0017, 0x9_0017),
            (0xa_0000, 0xa_0010),
            (0xa_0012, 0xa_0014),
            (0x1_0002, 0x1_0006),
            (0x0, 0x1),
            (0x4, 0x4),
        ] {
            names.extend(first..=last);
        }
        names
    }

    #[test]
    fn every_register_of_the_clients_lists_can_be_read_and_written_back() {
        for index in [0, 1] {
            let mut m = Machine::new(index);
            for number in client_names() {
                let value = m.registers().get(number);
                let value = value.unwrap_or_else(|status| panic!("{number:#x}: {status:?}"));
                let set = m.registers().set(number, value);
                assert!(set.is_ok(), "{number:#x} {value:x?} {set:?}");
                assert_eq!(m.get(number), value, "{number:#x}");
            }
        }
    }

    #[test]
    fn unknown_names_are_invalid_parameters() {
        let mut m = Machine::new(0);
        for number in [0x5, 0x4_0006, 0x6_0008, 0x8_00ff, 0xc_0000, u32::MAX] {
            assert_eq!(m.registers().get(number), Err(HvStatus::INVALID_PARAMETER));
            assert_eq!(m.set(number, 0), Err(HvStatus::INVALID_PARAMETER));
        }
    }

    #[test]
    fn read_only_registers_cannot_be_set() {
        let mut m = Machine::new(0);
        for number in [
            name::VP_INDEX,
            name::TIME_REF_COUNT,
            name::SVERSION,
            name::MTRR_CAP,
        ] {
            assert_eq!(m.set(number, 0), Err(HvStatus::INVALID_PARAMETER));
        }
    }

    #[test]
    fn fresh_vp_is_suspended_and_all_but_the_first_wait_for_sipi() {
        let mut m = Machine::new(0);
        assert_eq!(m.get(name::EXPLICIT_SUSPEND), [1, 0]);
        assert_eq!(m.get(name::INTERCEPT_SUSPEND), [0, 0]);
        assert_eq!(m.get(name::INTERNAL_ACTIVITY_STATE), [0, 0]);
        assert_eq!(Machine::new(1).get(name::INTERNAL_ACTIVITY_STATE), [1, 0]);
    }

    #[test]
    fn fresh_synic_reads_masked_and_off() {
        let mut m = Machine::new(0);
        for number in name::SINT0..=name::SINT15 {
            assert_eq!(m.get(number), [0x10000, 0]);
        }
        for number in [name::SCONTROL, name::SIEFP, name::SIMP, name::EOM] {
            assert_eq!(m.get(number), [0, 0]);
        }
        assert_eq!(m.set(name::EOM, 5), Ok(Effect::Synic(None)));
        assert_eq!(m.get(name::EOM), [0, 0]);
    }

    #[test]
    fn rflags_always_have_bit_1() {
        let mut m = Machine::new(0);
        m.put(name::RFLAGS, 0x44);
        assert_eq!(m.get(name::RFLAGS), [0x46, 0]);
    }

    #[test]
    fn segment_attributes_round_trip() {
        let mut m = Machine::new(0);
        for attributes in [
            0x9b_u64, 0x93, 0x8b, 0x82, 0xa09b, 0xc093, 0x00f3, 0x0000, 0x1002,
        ] {
            for number in name::ES..=name::TR {
                let value = [0x1234_5000, 0xf_ffff | (0x28 << 32) | (attributes << 48)];
                m.put_pair(number, value);
                assert_eq!(m.get(number), value);
            }
        }
    }

    #[test]
    fn segment_that_is_not_present_is_unusable() {
        let mut m = Machine::new(0);
        m.put_pair(name::ES, [0, 0xffff | (0x13 << 48)]);
        assert_eq!(m.vp.segments[segment::ES].rights, UNUSABLE | 0x13);
        m.put_pair(name::ES, [0, 0xffff | (0x93 << 48)]);
        assert_eq!(m.vp.segments[segment::ES].rights, 0x93);
        // As VM exits leave it.
        m.vp.segments[segment::ES].rights = UNUSABLE | 0xc093;
        assert_eq!(m.get(name::ES)[1] >> 48, 0xc013);
    }

    #[test]
    fn tables_keep_their_limit_in_the_upper_word() {
        let mut m = Machine::new(0);
        m.put_pair(name::GDTR, [0x7f << 48, 0xffff_8000_0000_1000]);
        assert_eq!(
            (m.vp.gdtr.limit, m.vp.gdtr.base),
            (0x7f, 0xffff_8000_0000_1000)
        );
        assert_eq!(m.get(name::GDTR), [0x7f << 48, 0xffff_8000_0000_1000]);
    }

    #[test]
    fn only_notifications_of_the_synic_are_taken() {
        let mut m = Machine::new(0);
        let number = name::DELIVERABILITY_NOTIFICATIONS;
        assert_eq!(m.set(number, 0), Ok(Effect::Notify(0)));
        assert_eq!(m.set(number, 1 << 50), Ok(Effect::Notify(4)));
        assert_eq!(m.set(number, 1), Err(HvStatus(5)));
    }

    #[test]
    fn inconsistent_control_registers_are_stored_as_given() {
        let mut m = Machine::new(0);
        m.put(name::CR0, 0x8000_0001);
        m.put(name::EFER, 0xd01);
        m.put(name::CR4, 0x20);
        assert_eq!((m.vp.cr0, m.vp.cr4, m.vp.efer), (0x8000_0001, 0x20, 0xd01));
        m.put(name::INTERMEDIATE_CR3, 0x5000);
        assert_eq!(m.get(name::CR3), [0x5000, 0]);
    }

    #[test]
    fn what_the_hypervisor_would_fault_on_is_refused() {
        let mut m = Machine::new(0);
        for (number, value) in [
            (name::LSTAR, 0x8000_0000_0000_0000),
            (name::CSTAR, 1 << 47),
            (name::KERNEL_GS_BASE, 1 << 50),
            (name::SYSENTER_EIP, 1 << 63),
            (name::SFMASK, 1 << 32),
            (name::TSC_AUX, 1 << 32),
            (name::XFEM, 0),
            (name::XFEM, 5),
            (name::XFEM, (1 << 17) | 3),
            (name::SPEC_CTRL, 1),
            (name::DR7, 1 << 32),
            (name::U_XSS, 1 << 8),
            (name::U_CET, 1),
            (name::CR8, 16),
            (name::APIC_BASE, 1 << 50),
            (name::INITIAL_APIC_ID, 9),
        ] {
            let before = m.vp;
            assert_eq!(
                m.set(number, value),
                Err(BAD_VALUE),
                "{number:#x} {value:#x}"
            );
            assert_eq!(m.vp.xcr0, before.xcr0);
        }
        let bad_mxcsr = m.registers().set(name::XMM_CONTROL_STATUS, [0, 1 << 16]);
        assert_eq!(bad_mxcsr, Err(BAD_VALUE));
    }

    #[test]
    fn cr8_is_the_task_priority() {
        let mut m = Machine::new(0);
        m.apic.set_tpr(0x57);
        assert_eq!(m.get(name::CR8), [5, 0]);
        m.put(name::CR8, 5);
        assert_eq!(m.apic.tpr(), 0x57);
        m.put(name::INTERMEDIATE_CR8, 6);
        assert_eq!(m.apic.tpr(), 0x60);
    }

    #[test]
    fn apic_base_selects_the_mode() {
        let mut m = Machine::new(0);
        assert_eq!(m.get(name::APIC_BASE), [0xfee0_0900, 0]);
        let set = m.set(name::APIC_BASE, 0xfee0_0d00);
        assert_eq!(set, Ok(Effect::Apic(WriteEffect::BaseChanged)));
        assert_eq!(m.apic.mode(), Mode::X2Apic);
    }

    #[test]
    fn floating_point_registers_in_initial_state_read_so() {
        let mut m = Machine::new(0);
        // Left-overs that do not count.
        m.xsave[32..416].fill(0xee);
        assert_eq!(m.get(name::XMM0), [0, 0]);
        assert_eq!(m.get(name::FP_MMX0 + 3), [0, 0]);
        assert_eq!(m.get(name::FP_CONTROL_STATUS), [0x37f, 0]);
        assert_eq!(m.get(name::XMM_CONTROL_STATUS), [0, 0xffff_0000_1f80]);
        m.put_pair(name::XMM0 + 5, [1, 2]);
        assert_eq!(m.get(name::XMM0 + 5), [1, 2]);
        assert_eq!(m.get(name::XMM0 + 4), [0, 0]);
        m.put_pair(name::FP_MMX7, [3, 0x1_4005]);
        assert_eq!(m.get(name::FP_MMX7), [3, 0x4005]);
        assert_eq!(m.get(name::FP_MMX0), [0, 0]);
        assert_eq!(m.get(name::FP_CONTROL_STATUS), [0x37f, 0]);
        assert_eq!(m.xsave[512], 3);
    }

    #[test]
    fn floating_point_control_is_where_xsave_has_it() {
        let mut m = Machine::new(0);
        let low = 0x027f | (0x3800 << 16) | (0x81 << 32) | (0x123 << 48);
        m.put_pair(name::FP_CONTROL_STATUS, [low, 0x1000]);
        m.put_pair(name::XMM_CONTROL_STATUS, [0x2000, 0xffff_0000_9fc0]);
        assert_eq!(m.get(name::FP_CONTROL_STATUS), [low, 0x1000]);
        assert_eq!(m.get(name::XMM_CONTROL_STATUS), [0x2000, 0xffff_0000_9fc0]);
        assert_eq!(m.xsave[..8], [0x7f, 2, 0, 0x38, 0x81, 0, 0x23, 1]);
        assert_eq!(
            (m.xsave[8..10].to_vec(), m.xsave[17]),
            (vec![0, 0x10], 0x20)
        );
        assert_eq!(m.xsave[24..28], [0xc0, 0x9f, 0, 0]);
    }

    #[test]
    fn storing_the_tsc_that_was_loaded_changes_nothing() {
        let mut m = Machine::new(0);
        let [tsc, _] = m.get(name::TSC);
        let offset = m.vp.tsc_offset;
        m.tsc += 5_000_000;
        assert_eq!(m.set(name::TSC, tsc), Ok(Effect::None));
        assert_eq!(m.vp.tsc_offset, offset);
        // It has run since.
        m.vp.tsc_read = None;
        assert_eq!(m.set(name::TSC, tsc), Ok(Effect::TscOffset));
        assert_eq!(m.get(name::TSC), [tsc, 0]);
    }

    #[test]
    fn tscs_set_at_about_the_same_time_are_the_same() {
        let mut boot = Machine::new(0);
        let mut other = Machine::new(1);
        boot.tsc = 50 * HZ;
        boot.put(name::TSC, 0);
        assert_eq!(boot.vp.tsc_offset, 0_u64.wrapping_sub(50 * HZ));
        other.partition = boot.partition;
        other.tsc = boot.tsc + HZ / 3;
        other.put(name::TSC, 0);
        assert_eq!(other.vp.tsc_offset, boot.vp.tsc_offset);
        // A reset much later starts anew, whoever comes first and however long the other takes.
        other.tsc += 100 * HZ;
        other.put(name::TSC, 0);
        assert_eq!(other.get(name::TSC), [0, 0]);
        boot.partition = other.partition;
        boot.tsc = other.tsc + 7 * HZ;
        boot.put(name::TSC, 0);
        assert_eq!(boot.vp.tsc_offset, other.vp.tsc_offset);
        // Other values that go with each other, and one that does not.
        boot.tsc += HZ;
        boot.put(name::TSC, 1000 * HZ);
        other.partition = boot.partition;
        other.tsc = boot.tsc + HZ / 3;
        other.put(name::TSC, 1000 * HZ + HZ / 3 + 99);
        assert_eq!(boot.vp.tsc_offset, other.vp.tsc_offset);
        other.put(name::TSC, 5000 * HZ);
        boot.partition = other.partition;
        boot.tsc = other.tsc;
        boot.put(name::TSC, 3000 * HZ);
        assert_eq!(boot.get(name::TSC), [3000 * HZ, 0]);
    }

    #[test]
    fn one_vp_can_set_its_tsc_twice() {
        let mut m = Machine::new(0);
        m.put(name::TSC, 1 << 40);
        m.put(name::TSC, (1 << 40) | 5);
        assert_eq!(m.get(name::TSC), [(1 << 40) | 5, 0]);
    }

    #[test]
    fn pages_appear_and_vanish_with_their_registers() {
        let mut m = Machine::new(0);
        let on = 0x1234_5001;
        let page = Some(0x1234_5000);
        assert_eq!(m.set(name::HYPERCALL, on), Ok(Effect::HypercallPage(page)));
        assert_eq!(m.set(name::HYPERCALL, on), Ok(Effect::None));
        assert_eq!(m.set(name::HYPERCALL, 0), Ok(Effect::HypercallPage(None)));
        assert_eq!(
            m.set(name::REFERENCE_TSC, on),
            Ok(Effect::ReferenceTscPage(page))
        );
        assert_eq!(
            m.set(name::VP_ASSIST_PAGE, on),
            Ok(Effect::VpAssistPage(page))
        );
    }

    fn write_reset(m: &mut Machine, apic_base: u64) -> SetGroup {
        let mut group = SetGroup::default();
        m.put(name::RIP, 0xfff0);
        let code = [0xffff_0000, 0xffff | (0xf000 << 32) | (0x9b << 48)];
        for (number, value) in [
            (name::CS, code),
            (name::CR0, [0x6000_0010, 0]),
            (name::EFER, [0, 0]),
            (name::APIC_BASE, [apic_base, 0]),
        ] {
            group.note(number);
            m.put_pair(number, value);
        }
        group
    }

    #[test]
    fn vmm_that_writes_the_reset_state_resets_the_vp() {
        let mut m = Machine::new(1);
        m.vp.startup_suspend = false;
        m.vp.halt_suspend = true;
        m.vp.synic.simp = 0x5001;
        m.vp.pending_interruption = 1;
        m.vp.cr0 = 0x8005_0033;
        let _ = m.apic.write(0x350, 0x0001_0700, 0).unwrap();
        let _ = m.apic.write(0xf0, 0x1ff, 0).unwrap();
        let group = write_reset(&mut m, 0xfee0_0800);
        assert!(group.is_reset(&m.vp));
        reset(&mut m.vp, &mut m.apic);
        assert!(m.vp.startup_suspend && !m.vp.halt_suspend);
        assert_eq!((m.vp.synic.simp, m.vp.pending_interruption), (0, 0));
        assert_eq!(m.apic.read(0xf0, 0), Ok(0xff));
        assert_eq!(m.apic.read(0x350, 0), Ok(0x0001_0700));
    }

    #[test]
    fn boot_processor_does_not_wait_after_reset() {
        let mut m = Machine::new(0);
        let group = write_reset(&mut m, 0xfee0_0900);
        assert!(group.is_reset(&m.vp));
        reset(&mut m.vp, &mut m.apic);
        assert!(!m.vp.startup_suspend);
    }

    #[test]
    fn other_writes_are_no_reset() {
        let mut m = Machine::new(0);
        let group = write_reset(&mut m, 0xfee0_0900);
        assert!(!SetGroup::default().is_reset(&m.vp));
        m.put(name::RIP, 0x1000);
        assert!(!group.is_reset(&m.vp));
        m.put(name::RIP, 0xfff0);
        m.put(name::CR0, 0x11);
        assert!(!group.is_reset(&m.vp));
    }
}
