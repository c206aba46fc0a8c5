// SPDX-License-Identifier: GPL-2.0
//! RDMSR and WRMSR of a child, its control registers, and its time.
//!
//! Reading needs the partition's state, writing mostly only the VP's: a write that is for the partition comes
//! back as [`Effect::Partition`], to be done by [`write_partition`] under the partition's lock.
//!
//! The MSRs that CPUID does not announce and that Linux 6.1 to 7.3 reads at boot all the same have harmless
//! values here. Every other MSR is unknown: #GP, or with the property UNIMPLEMENTED_MSR_ACTION = 1 a read of
//! zero and a write without effect.
#![forbid(unsafe_code)]
#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]

use hv_abi::boot::Vendor;
use hv_x86::regs::{cr0, cr4, efer, msr};
use hv_x86::state::Segment;

use crate::apic::{
    ApicFault, LocalApic, TimerClock, WriteEffect, X2APIC_MSR_FIRST, X2APIC_MSR_LAST,
};
use crate::child_cpuid::{is_long, privilege, privileges, synthetic, Features};
use crate::stimer::{config, Timers};
use crate::synic;
use crate::vp_state::{segment, Effect, PartitionState, VpState};

/// The access raises #GP(0) in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeneralProtection;

impl From<ApicFault> for GeneralProtection {
    fn from(_: ApicFault) -> Self {
        Self
    }
}

type Outcome<T> = Result<T, GeneralProtection>;

/// HV_X64_MSR_*.
#[allow(missing_docs)] // The names are TLFS'.
pub mod hv {
    pub const GUEST_OS_ID: u32 = 0x4000_0000;
    pub const HYPERCALL: u32 = 0x4000_0001;
    pub const VP_INDEX: u32 = 0x4000_0002;
    pub const RESET: u32 = 0x4000_0003;
    pub const TIME_REF_COUNT: u32 = 0x4000_0020;
    pub const REFERENCE_TSC: u32 = 0x4000_0021;
    pub const TSC_FREQUENCY: u32 = 0x4000_0022;
    pub const APIC_FREQUENCY: u32 = 0x4000_0023;
    pub const EOI: u32 = 0x4000_0070;
    pub const ICR: u32 = 0x4000_0071;
    pub const TPR: u32 = 0x4000_0072;
    pub const VP_ASSIST_PAGE: u32 = 0x4000_0073;
    pub const SCONTROL: u32 = 0x4000_0080;
    pub const SVERSION: u32 = 0x4000_0081;
    pub const SIEFP: u32 = 0x4000_0082;
    pub const SIMP: u32 = 0x4000_0083;
    pub const EOM: u32 = 0x4000_0084;
    pub const SINT0: u32 = 0x4000_0090;
    pub const SINT15: u32 = 0x4000_009f;
    pub const STIMER0_CONFIG: u32 = 0x4000_00b0;
    pub const STIMER3_COUNT: u32 = 0x4000_00b7;
    pub const GUEST_IDLE: u32 = 0x4000_00f0;
    pub const CRASH_P0: u32 = 0x4000_0100;
    pub const CRASH_CTL: u32 = 0x4000_0105;
    pub const REENLIGHTENMENT_CONTROL: u32 = 0x4000_0106;
    pub const TSC_EMULATION_STATUS: u32 = 0x4000_0108;
    pub const TSC_INVARIANT_CONTROL: u32 = 0x4000_0118;
    /// The last of the range that TLFS uses.
    pub const LAST: u32 = 0x4000_01ff;
}

/// Architectural MSRs that `hv_x86` does not name.
mod ia32 {
    pub const TSC: u32 = 0x10;
    pub const TSC_ADJUST: u32 = 0x3b;
    pub const SPEC_CTRL: u32 = 0x48;
    pub const PRED_CMD: u32 = 0x49;
    pub const BIOS_SIGN_ID: u32 = 0x8b;
    pub const ARCH_CAPABILITIES: u32 = 0x10a;
    pub const FLUSH_CMD: u32 = 0x10b;
    pub const MISC_ENABLE: u32 = 0x1a0;
    pub const TSC_DEADLINE: u32 = 0x6e0;
    pub const XSS: u32 = 0xda0;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const SFMASK: u32 = 0xc000_0084;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
}

/// Bit 0 of HV_X64_MSR_HYPERCALL, REFERENCE_TSC and VP_ASSIST_PAGE.
const PAGE_ENABLE: u64 = 1;
/// HV_X64_MSR_HYPERCALL: the register cannot be changed until reset (TLFS 3.13).
const HYPERCALL_LOCKED: u64 = 1 << 1;
/// HV_X64_MSR_CRASH_CTL: the guest crashed; there is a message at the GPA in P3 of length P4.
const CRASH_NOTIFY: u64 = 1 << 63;
const CRASH_NOTIFY_MESSAGE: u64 = 1 << 62;
/// IA32_MISC_ENABLE: no branch trace store, no PEBS; read-only.
const MISC_ENABLE_READ_ONLY: u64 = (1 << 11) | (1 << 12);
/// IA32_MISC_ENABLE: what software may set, without effect: fast strings, thermal control, EIST, MWAIT, CPUID
/// limit, xTPR, execute disable.
const MISC_ENABLE_BITS: u64 = 0x44_00c5_0089;
/// IA32_DEBUGCTL: single step on branches. Last-branch recording (bit 0) is accepted and does nothing.
const DEBUGCTL_BTF: u64 = 1 << 1;
const DEBUGCTL_LBR: u64 = 1 << 0;
/// IA32_MTRRCAP: eight variable ranges, fixed ranges, write combining.
pub const MTRR_CAP: u64 = 8 | (1 << 8) | (1 << 10);
/// Offset bits of a page.
const PAGE: u64 = 0xfff;

/// Registers that an MSR access of a VP can reach.
pub struct Local<'a> {
    /// Registers of the VP. `tsc_offset`, APIC, EFER, PAT, the MTRRs and what is not in a VMCS or VMCB are all
    /// that most accesses need; the segment bases and the SYSENTER registers have to be current too.
    pub vp: &'a mut VpState,
    /// Its local APIC.
    pub apic: &'a mut LocalApic,
    /// Its synthetic timers.
    pub timers: &'a mut Timers,
    /// Its partition.
    pub partition: &'a PartitionState,
    /// Its index.
    pub vp_index: u32,
    /// Host TSC.
    pub host_tsc: u64,
}

impl Local<'_> {
    /// The guest's TSC.
    fn now(&self) -> u64 {
        self.host_tsc.wrapping_add(self.vp.tsc_offset)
    }

    fn has(&self, needed: u64) -> bool {
        let features = self.partition.synthetic_features;
        privileges(features, self.vp.features.invariant_tsc) & needed != 0
    }

    fn segment_base(&mut self, index: usize) -> Option<&mut u64> {
        self.vp
            .segments
            .get_mut(index)
            .map(|segment| &mut segment.base)
    }
}

// ---- reading -------------------------------------------------------------------------------------------

/// RDMSR.
///
/// # Errors
///
/// #GP.
pub fn read(number: u32, on: &Local<'_>) -> Outcome<u64> {
    let now = on.now();
    let vp = &*on.vp;
    let features = &vp.features;
    let base = |index: usize| vp.segments.get(index).map_or(0, |segment| segment.base);
    Ok(match number {
        X2APIC_MSR_FIRST..=X2APIC_MSR_LAST => on.apic.msr_read(number, now)?,
        ia32::TSC_DEADLINE => on.apic.tsc_deadline(now),
        ia32::TSC => now,
        ia32::TSC_ADJUST if features.tsc_adjust => vp.tsc_adjust,
        msr::APIC_BASE => on.apic.apic_base(),
        msr::EFER => vp.efer,
        ia32::STAR => vp.star,
        ia32::LSTAR => vp.lstar,
        ia32::CSTAR => vp.cstar,
        ia32::SFMASK => vp.sfmask,
        msr::FS_BASE => base(segment::FS),
        msr::GS_BASE => base(segment::GS),
        ia32::KERNEL_GS_BASE => vp.kernel_gs_base,
        ia32::TSC_AUX if features.tsc_aux => vp.tsc_aux,
        msr::SYSENTER_CS => vp.sysenter_cs,
        msr::SYSENTER_ESP => vp.sysenter_esp,
        msr::SYSENTER_EIP => vp.sysenter_eip,
        msr::PAT => vp.pat,
        msr::DEBUGCTL => vp.debugctl,
        ia32::SPEC_CTRL if features.spec_ctrl != 0 => vp.spec_ctrl,
        ia32::ARCH_CAPABILITIES if features.arch_capabilities.is_some() => {
            features.arch_capabilities.unwrap_or(0)
        }
        ia32::XSS if features.xss => vp.xss,
        ia32::MISC_ENABLE => vp.misc_enable | MISC_ENABLE_READ_ONLY,
        _ => match read_mtrr(number, vp) {
            Some(value) => value,
            None if number >> 16 == 0x4000 => read_hypervisor(number, on)?,
            None => {
                let vendor = on.partition.host.vendor;
                constant(number, vendor).map_or_else(|| unknown(on.partition), Ok)?
            }
        },
    })
}

/// Whether only the hypervisor knows the value of an MSR: TSC deadline, and those of TLFS.
#[must_use]
pub const fn is_hidden(number: u32) -> bool {
    matches!(number, ia32::TSC_DEADLINE | hv::GUEST_OS_ID..=hv::LAST)
}

/// An MSR that does not exist.
fn unknown(partition: &PartitionState) -> Outcome<u64> {
    if partition.ignore_unknown_msrs {
        Ok(0)
    } else {
        Err(GeneralProtection)
    }
}

/// Place of an MTRR in the state of a VP.
#[derive(Clone, Copy)]
enum Mtrr {
    Default,
    Fixed(usize),
    Base(usize),
    Mask(usize),
}

fn mtrr(number: u32) -> Option<Mtrr> {
    if number == msr::MTRR_DEF_TYPE {
        return Some(Mtrr::Default);
    }
    if let Some(index) = msr::MTRR_FIXED.iter().position(|fixed| *fixed == number) {
        return Some(Mtrr::Fixed(index));
    }
    let index = number
        .checked_sub(msr::MTRR_VARIABLE)
        .filter(|index| *index < 16)?;
    let pair = (index >> 1) as usize;
    Some(if index & 1 == 0 {
        Mtrr::Base(pair)
    } else {
        Mtrr::Mask(pair)
    })
}

/// Value of the MTRR with that MSR number.
pub(crate) fn read_mtrr(number: u32, vp: &VpState) -> Option<u64> {
    let pair = |index| vp.mtrr_variable.get(index).copied();
    match mtrr(number)? {
        Mtrr::Default => Some(vp.mtrr_def_type),
        Mtrr::Fixed(index) => vp.mtrr_fixed.get(index).copied(),
        Mtrr::Base(index) => pair(index).map(|(base, _)| base),
        Mtrr::Mask(index) => pair(index).map(|(_, mask)| mask),
    }
}

/// The MTRR with that MSR number.
pub(crate) fn mtrr_slot(number: u32, vp: &mut VpState) -> Option<&mut u64> {
    match mtrr(number)? {
        Mtrr::Default => Some(&mut vp.mtrr_def_type),
        Mtrr::Fixed(index) => vp.mtrr_fixed.get_mut(index),
        Mtrr::Base(index) => vp.mtrr_variable.get_mut(index).map(|(base, _)| base),
        Mtrr::Mask(index) => vp.mtrr_variable.get_mut(index).map(|(_, mask)| mask),
    }
}

/// MSRs with one value: what the VP can do, and what no CPUID bit announces but software reads or writes all the same.
#[must_use]
pub const fn constant(number: u32, vendor: Vendor) -> Option<u64> {
    Some(match number {
        msr::MTRR_CAP => MTRR_CAP,
        ia32::BIOS_SIGN_ID => match vendor {
            // A revision in bits 63:32; AMD's patch level.
            Vendor::Vmx => 1 << 32,
            Vendor::Svm => 0x0100_0065,
        },
        // P5 machine check, platform id, power-on configuration.
        0x0 | 0x1 | 0x17 | 0x2a => 0,
        // Feature control: locked, nothing on.
        msr::FEATURE_CONTROL => 1,
        // SMI count; microcode update trigger; PERFCTR and EVNTSEL of the P6 family.
        0x34 | 0x79 | 0xc1 | 0xc2 | 0x186 | 0x187 => 0,
        // Platform information; last branch and exception records; BBL_CR_CTL3 says that the L2 cache is on.
        0xce | 0x1db..=0x1de => 0,
        0x11e => 0xbe70_2111,
        // MISC_FEATURES_ENABLES; machine check: no banks, no status.
        0x140 | 0x179 | 0x17a => 0,
        // Performance status and control, power control.
        0x198 | 0x199 | 0x1fc => 0,
        // Energy counters.
        0x606 | 0x611 | 0x619 | 0x639 | 0x641 => 0,
        // TSC ratio: one.
        0xc000_0104 => 1 << 32,
        // EVNTSEL and PERFCTR of the K7.
        0xc001_0000..=0xc001_0007 => 0,
        // SYSCFG, top of memory (two), IORRs.
        0xc001_0010 | 0xc001_0016..=0xc001_001a | 0xc001_001d => 0,
        // HWCR: the TSC counts at the P0 frequency.
        0xc001_0015 => 1 << 24,
        // NB_CFG, patch loader, interrupt pending, MMIO configuration base, P-states.
        0xc001_001f | 0xc001_0020 | 0xc001_0055 | 0xc001_0058 | 0xc001_0061..=0xc001_0063 => 0,
        // SMM: base, address, mask.
        0xc001_0111..=0xc001_0113 => 0,
        // VM_CR: SVM disabled and locked. VM_HSAVE_PA.
        msr::VM_CR => (1 << 3) | (1 << 4),
        msr::VM_HSAVE_PA => 0,
        // OSVW: no errata to report.
        0xc001_0140 | 0xc001_0141 => 0,
        // EVNTSEL and PERFCTR of family 15h.
        0xc001_0200..=0xc001_020b => 0,
        // LS_CFG, IC_CFG, DC_CFG, BU_CFG, BU_CFG2, EX_CFG, FP_CFG, DE_CFG2.
        0xc001_1020..=0xc001_1023 | 0xc001_1028 | 0xc001_102a | 0xc001_102c | 0xc001_10e3 => 0,
        // DE_CFG: LFENCE serialises.
        0xc001_1029 => 1 << 1,
        _ => return None,
    })
}

/// The TLFS MSRs.
fn read_hypervisor(number: u32, on: &Local<'_>) -> Outcome<u64> {
    let partition = on.partition;
    let hv1 = partition.synthetic_features & synthetic::HV1 != 0;
    Ok(match number {
        hv::GUEST_OS_ID if on.has(privilege::HYPERCALL) => partition.guest_os_id,
        hv::HYPERCALL if on.has(privilege::HYPERCALL) => partition.hypercall,
        hv::VP_INDEX if on.has(privilege::VP_INDEX) => on.vp_index.into(),
        hv::RESET if hv1 => 0,
        hv::TIME_REF_COUNT if on.has(privilege::TIME_REF_COUNT) => {
            reference_time(on.host_tsc, partition)
        }
        hv::REFERENCE_TSC if on.has(privilege::REFERENCE_TSC) => partition.reference_tsc,
        hv::TSC_FREQUENCY if on.has(privilege::FREQUENCIES) => partition.tsc_hz,
        hv::APIC_FREQUENCY if on.has(privilege::FREQUENCIES) => TimerClock::HYPERV_APIC_HZ,
        hv::EOI if on.has(privilege::APIC_MSRS) => return Err(GeneralProtection),
        hv::ICR if on.has(privilege::APIC_MSRS) => on.apic.icr(),
        hv::TPR if on.has(privilege::APIC_MSRS) => on.apic.tpr().into(),
        hv::VP_ASSIST_PAGE if hv1 => on.vp.vp_assist_page,
        hv::SCONTROL..=hv::EOM | hv::SINT0..=hv::SINT15 if on.has(privilege::SYNIC) => {
            read_synic(number, &on.vp.synic)?
        }
        hv::STIMER0_CONFIG..=hv::STIMER3_COUNT if on.has(privilege::SYNTHETIC_TIMERS) => {
            let (index, is_count) = timer_of(number);
            if is_count {
                on.timers.count(index)
            } else {
                on.timers.config(index)
            }
        }
        // The caller lets the VP wait.
        hv::GUEST_IDLE if on.has(privilege::GUEST_IDLE) => 0,
        hv::CRASH_CTL if hv1 => CRASH_NOTIFY | CRASH_NOTIFY_MESSAGE,
        hv::CRASH_P0..=hv::CRASH_CTL if hv1 => {
            let index = number.wrapping_sub(hv::CRASH_P0) as usize;
            partition.crash.get(index).copied().unwrap_or(0)
        }
        hv::REENLIGHTENMENT_CONTROL..=hv::TSC_EMULATION_STATUS if hv1 => {
            let index = number.wrapping_sub(hv::REENLIGHTENMENT_CONTROL) as usize;
            partition.reenlightenment.get(index).copied().unwrap_or(0)
        }
        hv::TSC_INVARIANT_CONTROL if on.has(privilege::TSC_INVARIANT) => {
            partition.tsc_invariant_control
        }
        _ => return unknown(partition),
    })
}

fn read_synic(number: u32, synic: &synic::Registers) -> Outcome<u64> {
    Ok(match number {
        hv::SCONTROL => synic.control,
        hv::SVERSION => synic::VERSION,
        hv::SIEFP => synic.siefp,
        hv::SIMP => synic.simp,
        hv::EOM => 0,
        _ => *synic.sint.get(source_of(number)).ok_or(GeneralProtection)?,
    })
}

/// Source whose register this MSR is; too large for the numbers in the gap before them.
fn source_of(number: u32) -> usize {
    number.wrapping_sub(hv::SINT0) as usize
}

/// Timer that this MSR belongs to, and whether it is the count.
fn timer_of(number: u32) -> (usize, bool) {
    let index = number.wrapping_sub(hv::STIMER0_CONFIG) as usize;
    (index >> 1, index & 1 != 0)
}

// ---- writing -------------------------------------------------------------------------------------------

fn check(good: bool) -> Outcome<()> {
    if good {
        Ok(())
    } else {
        Err(GeneralProtection)
    }
}

/// WRMSR.
///
/// # Errors
///
/// #GP; nothing is changed then.
pub fn write(number: u32, value: u64, on: &mut Local<'_>) -> Outcome<Effect> {
    let now = on.now();
    let features = on.vp.features;
    let vp = &mut *on.vp;
    match number {
        X2APIC_MSR_FIRST..=X2APIC_MSR_LAST => {
            return Ok(Effect::Apic(on.apic.msr_write(number, value, now)?));
        }
        ia32::TSC_DEADLINE => return Ok(Effect::Apic(on.apic.write_tsc_deadline(value, now)?)),
        ia32::TSC => {
            let step = value.wrapping_sub(now);
            vp.tsc_adjust = vp.tsc_adjust.wrapping_add(step);
            return Ok(move_tsc(step, on.vp, on.apic, on.host_tsc));
        }
        ia32::TSC_ADJUST if features.tsc_adjust => {
            let step = value.wrapping_sub(vp.tsc_adjust);
            vp.tsc_adjust = value;
            return Ok(move_tsc(step, on.vp, on.apic, on.host_tsc));
        }
        msr::APIC_BASE => return Ok(Effect::Apic(on.apic.write_apic_base(value)?)),
        msr::EFER => vp.efer = validate_efer(value, vp)?,
        ia32::STAR => vp.star = value,
        ia32::LSTAR | ia32::CSTAR | ia32::KERNEL_GS_BASE => {
            check(features.is_canonical(value))?;
            match number {
                ia32::LSTAR => vp.lstar = value,
                ia32::CSTAR => vp.cstar = value,
                _ => vp.kernel_gs_base = value,
            }
        }
        msr::SYSENTER_ESP | msr::SYSENTER_EIP => {
            check(features.is_canonical(value))?;
            if number == msr::SYSENTER_ESP {
                vp.sysenter_esp = value;
            } else {
                vp.sysenter_eip = value;
            }
        }
        msr::FS_BASE | msr::GS_BASE => {
            check(features.is_canonical(value))?;
            let index = if number == msr::FS_BASE {
                segment::FS
            } else {
                segment::GS
            };
            if let Some(base) = on.segment_base(index) {
                *base = value;
            }
        }
        ia32::SFMASK => {
            check(value >> 32 == 0)?;
            vp.sfmask = value;
        }
        ia32::TSC_AUX if features.tsc_aux => {
            check(value >> 32 == 0)?;
            vp.tsc_aux = value;
        }
        msr::SYSENTER_CS => vp.sysenter_cs = value & 0xffff_ffff,
        msr::PAT => {
            check(is_pat(value))?;
            vp.pat = value;
        }
        msr::DEBUGCTL => {
            check(value & !(DEBUGCTL_BTF | DEBUGCTL_LBR) == 0)?;
            vp.debugctl = value & DEBUGCTL_BTF;
        }
        ia32::SPEC_CTRL if features.spec_ctrl != 0 => {
            check(value & !features.spec_ctrl == 0)?;
            vp.spec_ctrl = value;
            return Ok(Effect::SpeculationControl);
        }
        ia32::PRED_CMD if features.pred_cmd != 0 => {
            check(value & !features.pred_cmd == 0)?;
            if value != 0 {
                return Ok(Effect::PredictionCommand(value));
            }
        }
        ia32::FLUSH_CMD if features.flush_cmd => {
            check(value & !1 == 0)?;
            if value != 0 {
                return Ok(Effect::FlushL1d);
            }
        }
        ia32::ARCH_CAPABILITIES if features.arch_capabilities.is_some() => {
            return Err(GeneralProtection);
        }
        // No supervisor state can be enabled.
        ia32::XSS if features.xss => check(value == 0)?,
        ia32::MISC_ENABLE => {
            check(value & !(MISC_ENABLE_BITS | MISC_ENABLE_READ_ONLY) == 0)?;
            vp.misc_enable = value & MISC_ENABLE_BITS;
        }
        msr::MTRR_CAP | msr::FEATURE_CONTROL => return Err(GeneralProtection),
        _ => return write_other(number, value, on),
    }
    Ok(Effect::None)
}

fn write_other(number: u32, value: u64, on: &mut Local<'_>) -> Outcome<Effect> {
    let features = on.vp.features;
    if let Some(slot) = mtrr_slot(number, on.vp) {
        check(is_mtrr(number, value, &features))?;
        *slot = value;
    } else if number >> 16 == 0x4000 {
        return write_hypervisor(number, value, on);
    } else if constant(number, on.partition.host.vendor).is_none() {
        // Its write has no effect, or it has no write. (Of BIOS_SIGN_ID: zero, to have the revision loaded, SDM 11.11.7.1.)
        unknown(on.partition)?;
    }
    Ok(Effect::None)
}

fn write_hypervisor(number: u32, value: u64, on: &mut Local<'_>) -> Outcome<Effect> {
    let hv1 = on.partition.synthetic_features & synthetic::HV1 != 0;
    Ok(match number {
        hv::EOI if on.has(privilege::APIC_MSRS) => Effect::Apic(on.apic.eoi()),
        hv::ICR if on.has(privilege::APIC_MSRS) => Effect::Apic(on.apic.write_icr(value)?),
        hv::TPR if on.has(privilege::APIC_MSRS) => {
            on.apic
                .set_tpr(u8::try_from(value).map_err(|_| GeneralProtection)?);
            Effect::Apic(WriteEffect::None)
        }
        hv::VP_ASSIST_PAGE if hv1 => {
            check(on.vp.features.is_physical(value))?;
            on.vp.vp_assist_page = value;
            Effect::VpAssistPage(page(value))
        }
        hv::SCONTROL..=hv::EOM | hv::SINT0..=hv::SINT15 if on.has(privilege::SYNIC) => {
            write_synic(number, value, on.vp)?
        }
        hv::STIMER0_CONFIG..=hv::STIMER3_COUNT if on.has(privilege::SYNTHETIC_TIMERS) => {
            write_timer(number, value, on)?
        }
        hv::RESET if hv1 => {
            check(value & !1 == 0)?;
            if value == 0 {
                Effect::None
            } else {
                Effect::Reset
            }
        }
        hv::GUEST_OS_ID | hv::HYPERCALL if on.has(privilege::HYPERCALL) => Effect::Partition,
        hv::REFERENCE_TSC if on.has(privilege::REFERENCE_TSC) => Effect::Partition,
        hv::CRASH_P0..=hv::TSC_EMULATION_STATUS if hv1 => Effect::Partition,
        hv::TSC_INVARIANT_CONTROL if on.has(privilege::TSC_INVARIANT) => Effect::Partition,
        hv::VP_INDEX if on.has(privilege::VP_INDEX) => return Err(GeneralProtection),
        hv::GUEST_IDLE if on.has(privilege::GUEST_IDLE) => return Err(GeneralProtection),
        hv::TIME_REF_COUNT if on.has(privilege::TIME_REF_COUNT) => return Err(GeneralProtection),
        hv::TSC_FREQUENCY | hv::APIC_FREQUENCY if on.has(privilege::FREQUENCIES) => {
            return Err(GeneralProtection);
        }
        _ => {
            unknown(on.partition)?;
            Effect::None
        }
    })
}

fn write_synic(number: u32, value: u64, vp: &mut VpState) -> Outcome<Effect> {
    let features = vp.features;
    let synic = &mut vp.synic;
    let slot = match number {
        hv::SCONTROL => {
            synic.control = value & synic::ENABLE;
            return Ok(Effect::Synic(None));
        }
        hv::SVERSION => return Err(GeneralProtection),
        hv::EOM => return Ok(Effect::Synic(None)),
        hv::SIEFP => &mut synic.siefp,
        hv::SIMP => &mut synic.simp,
        _ => {
            let slot = synic.sint.get_mut(source_of(number));
            let vector = value & synic::sint::VECTOR;
            // Vectors below 16 are the processor's (SDM vol 3, 12.5.2).
            check(vector >= 16 || value & synic::sint::MASKED != 0)?;
            *slot.ok_or(GeneralProtection)? = value;
            return Ok(Effect::Synic(None));
        }
    };
    check(features.is_physical(value))?;
    let old = core::mem::replace(slot, value);
    // A page of the SynIC is empty at first, as if it were not the guest's memory.
    Ok(Effect::Synic(
        page(value).filter(|new| page(old) != Some(*new)),
    ))
}

fn write_timer(number: u32, value: u64, on: &mut Local<'_>) -> Outcome<Effect> {
    let now = reference_time(on.host_tsc, on.partition);
    let (index, is_count) = timer_of(number);
    if is_count {
        on.timers.set_count(index, value, now);
    } else {
        let direct = on.partition.synthetic_features & synthetic::DIRECT_TIMERS != 0;
        check(value & !config::WRITABLE == 0)?;
        check(value & config::DIRECT == 0 || direct && config::vector(value) >= 16)?;
        on.timers.set_config(index, value, now);
    }
    Ok(Effect::Timers)
}

/// A write that [`write`] answered with [`Effect::Partition`].
///
/// # Errors
///
/// #GP.
pub fn write_partition(
    number: u32,
    value: u64,
    partition: &mut PartitionState,
    features: &Features,
) -> Outcome<Effect> {
    Ok(match number {
        hv::GUEST_OS_ID => {
            partition.guest_os_id = value;
            if value != 0 || partition.hypercall & PAGE_ENABLE == 0 {
                return Ok(Effect::None);
            }
            // Who has no identity has no hypercalls (TLFS 3.13).
            partition.hypercall &= !(PAGE_ENABLE | HYPERCALL_LOCKED);
            Effect::HypercallPage(None)
        }
        hv::HYPERCALL => {
            if partition.hypercall & HYPERCALL_LOCKED != 0 {
                return Ok(Effect::None);
            }
            check(features.is_physical(value))?;
            let enable = if partition.guest_os_id == 0 {
                0
            } else {
                PAGE_ENABLE
            };
            partition.hypercall = value & (!PAGE_ENABLE | enable);
            Effect::HypercallPage(page(partition.hypercall))
        }
        hv::REFERENCE_TSC => {
            check(features.is_physical(value))?;
            partition.reference_tsc = value;
            Effect::ReferenceTscPage(page(value))
        }
        hv::CRASH_P0..=hv::CRASH_CTL => {
            let index = number.wrapping_sub(hv::CRASH_P0) as usize;
            if let Some(slot) = partition.crash.get_mut(index) {
                *slot = value;
            }
            if number == hv::CRASH_CTL && value & CRASH_NOTIFY != 0 {
                Effect::Crash
            } else {
                Effect::None
            }
        }
        // The TSC never changes its frequency: nothing ever comes of them, and no emulation is in progress.
        hv::REENLIGHTENMENT_CONTROL..=hv::TSC_EMULATION_STATUS => {
            check(number != hv::TSC_EMULATION_STATUS || value == 0)?;
            let index = number.wrapping_sub(hv::REENLIGHTENMENT_CONTROL) as usize;
            if let Some(slot) = partition.reenlightenment.get_mut(index) {
                *slot = value;
            }
            Effect::None
        }
        hv::TSC_INVARIANT_CONTROL => {
            check(value & !1 == 0)?;
            // Cannot be taken back.
            partition.tsc_invariant_control |= value;
            Effect::None
        }
        _ => return Err(GeneralProtection),
    })
}

/// GPA of the page that HV_X64_MSR_HYPERCALL and its kind name, if they are enabled.
pub(crate) const fn page(value: u64) -> Option<u64> {
    if value & PAGE_ENABLE != 0 {
        Some(value & !PAGE)
    } else {
        None
    }
}

/// The guest's TSC goes forward by `step`.
pub(crate) fn move_tsc(step: u64, vp: &mut VpState, apic: &mut LocalApic, host_tsc: u64) -> Effect {
    let before = host_tsc.wrapping_add(vp.tsc_offset);
    vp.tsc_offset = vp.tsc_offset.wrapping_add(step);
    apic.tsc_changed(before, before.wrapping_add(step));
    Effect::TscOffset
}

/// Every byte names a memory type that PAT has: UC, WC, WT, WP, WB, UC- (SDM 13.12.2).
#[must_use]
pub fn is_pat(value: u64) -> bool {
    value
        .to_le_bytes()
        .iter()
        .all(|kind| matches!(kind, 0 | 1 | 4..=7))
}

/// Memory types of MTRRs (SDM table 13-8).
const fn is_type(kind: u8) -> bool {
    matches!(kind, 0 | 1 | 4 | 5 | 6)
}

/// Whether an MTRR takes the value (SDM 13.11.2).
fn is_mtrr(number: u32, value: u64, features: &Features) -> bool {
    let [first, ..] = value.to_le_bytes();
    if number == msr::MTRR_DEF_TYPE {
        // Enable, and enable of the fixed ranges.
        return is_type(first) && value & !0xcff == 0;
    }
    if msr::MTRR_FIXED.contains(&number) {
        return value.to_le_bytes().iter().all(|kind| is_type(*kind));
    }
    let reserved = if number & 1 == 0 { 0xf00 } else { 0x7ff };
    features.is_physical(value) && value & reserved == 0 && (number & 1 != 0 || is_type(first))
}

// ---- control registers ---------------------------------------------------------------------------------

/// What a write to a control register leads to. Bit 4 of CR0 (ET) is always set in `value`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlWrite {
    /// The register.
    pub value: u64,
    /// EFER, whose LMA follows CR0.PG.
    pub efer: u64,
    /// PAE paging without long mode: load the four PDPTEs from CR3.
    pub load_pdptes: bool,
    /// Translations of linear addresses may be stale, also global ones (SDM 5.10.4.1).
    pub flush: bool,
}

/// The registers that say how linear addresses are translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // The names are the registers'.
pub struct Paging {
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
}

impl Paging {
    /// Those of a VP.
    #[must_use]
    pub const fn of(vp: &VpState) -> Self {
        Self {
            cr0: vp.cr0,
            cr3: vp.cr3,
            cr4: vp.cr4,
            efer: vp.efer,
        }
    }

    /// PAE paging: with CR0.PG and LME, long mode is active.
    const fn is_pae(&self) -> bool {
        self.cr0 & cr0::PG != 0 && self.cr4 & cr4::PAE != 0 && self.efer & efer::LME == 0
    }

    /// Whether the processor loads the four page-directory pointers on the way from `old` (SDM 5.4.1).
    #[must_use]
    pub const fn loads_pointers(&self, old: &Self) -> bool {
        let in_cr0 = cr0::CD | cr0::NW;
        let in_cr4 = cr4::PSE | cr4::PGE | cr4::SMEP;
        self.is_pae()
            && (!old.is_pae()
                || self.cr3 != old.cr3
                || (self.cr0 ^ old.cr0) & in_cr0 != 0
                || (self.cr4 ^ old.cr4) & in_cr4 != 0)
    }
}

/// MOV to CR0 (SDM 2.5, 5.1.2, 11.8.5, 18.2.3).
///
/// # Errors
///
/// #GP.
pub fn validate_cr0(value: u64, vp: &VpState) -> Outcome<ControlWrite> {
    let value = value | cr0::ET;
    check(value >> 32 == 0)?;
    let has = |bit| value & bit != 0;
    check(!has(cr0::PG) || has(cr0::PE))?;
    check(!has(cr0::NW) || has(cr0::CD))?;
    let changed = value ^ vp.cr0;
    let mut new_efer = vp.efer;
    if changed & cr0::PG != 0 {
        if has(cr0::PG) {
            if vp.efer & efer::LME != 0 {
                let rights = |index| vp.segments.get(index).map_or(0, |s: &Segment| s.rights);
                check(vp.cr4 & cr4::PAE != 0 && rights(segment::CS) & (1 << 13) == 0)?;
                // Long mode has no use for a TSS of 16 bits.
                check(!matches!(rights(segment::TR) & 0xf, 1 | 3))?;
                new_efer |= efer::LMA;
            }
        } else {
            check(vp.cr4 & cr4::PCIDE == 0 && !is_long(vp))?;
            new_efer &= !efer::LMA;
        }
    }
    // Shadow stacks need write protection.
    check(has(cr0::WP) || vp.cr4 & cr4::CET == 0)?;
    let old = Paging::of(vp);
    Ok(ControlWrite {
        // Reserved bits read as they were at reset, zero.
        value: value & CR0_BITS,
        efer: new_efer,
        load_pdptes: Paging { cr0: value, ..old }.loads_pointers(&old),
        flush: changed & (cr0::PG | cr0::PE | cr0::WP) != 0,
    })
}

/// PE, MP, EM, TS, ET, NE, WP, AM, NW, CD, PG.
const CR0_BITS: u64 = 0x3f | (1 << 16) | (1 << 18) | (7 << 29);

/// MOV to CR3. Bit 63 asks to keep translations and is not stored (SDM 5.10.4.1).
///
/// # Errors
///
/// #GP.
pub fn validate_cr3(value: u64, vp: &VpState) -> Outcome<ControlWrite> {
    let keep = vp.cr4 & cr4::PCIDE != 0 && value >> 63 != 0;
    let value = if keep { value & !(1 << 63) } else { value };
    let long = vp.efer & efer::LMA != 0;
    check(!long || vp.features.is_physical(value))?;
    Ok(ControlWrite {
        value: if long { value } else { value & 0xffff_ffff },
        efer: vp.efer,
        load_pdptes: Paging::of(vp).is_pae(),
        flush: !keep,
    })
}

/// MOV to CR4 (SDM 2.5, 5.10.1, 18.2.3).
///
/// # Errors
///
/// #GP, also for each bit of a feature that the VP's CPUID does not have.
pub fn validate_cr4(value: u64, vp: &VpState) -> Outcome<ControlWrite> {
    check(value & !vp.features.cr4 == 0)?;
    let changed = value ^ vp.cr4;
    if vp.efer & efer::LMA != 0 {
        check(value & cr4::PAE != 0 && changed & cr4::LA57 == 0)?;
    }
    if changed & value & cr4::PCIDE != 0 {
        check(vp.efer & efer::LMA != 0 && vp.cr3 & PAGE == 0)?;
    }
    check(value & cr4::CET == 0 || vp.cr0 & cr0::WP != 0)?;
    let old = Paging::of(vp);
    let paging = cr4::PAE | cr4::PGE | cr4::PSE | cr4::PCIDE | cr4::SMEP | cr4::SMAP | cr4::PKE;
    Ok(ControlWrite {
        value,
        efer: vp.efer,
        load_pdptes: Paging { cr4: value, ..old }.loads_pointers(&old),
        flush: changed & paging != 0,
    })
}

/// WRMSR to EFER: the new value. LMA is the processor's, not software's.
///
/// # Errors
///
/// #GP for reserved bits, and for a change of LME while paging is on (APM 3.1.7).
pub fn validate_efer(value: u64, vp: &VpState) -> Outcome<u64> {
    check(value & !vp.features.efer == 0)?;
    check((value ^ vp.efer) & efer::LME == 0 || vp.cr0 & cr0::PG == 0)?;
    Ok(value & !efer::LMA | vp.efer & efer::LMA)
}

/// XSETBV of XCR0 (SDM vol 1, 13.3). The caller has checked CPL, ECX and CR4.OSXSAVE.
///
/// # Errors
///
/// #GP.
pub fn validate_xcr0(value: u64, features: &Features) -> Outcome<u64> {
    const AVX512: u64 = 7 << 5;
    check(value & 1 != 0 && value & !features.xcr0 == 0)?;
    check(value & (1 << 2) == 0 || value & (1 << 1) != 0)?;
    let avx512 = value & AVX512;
    check(avx512 == 0 || avx512 == AVX512 && value & (1 << 2) != 0)?;
    Ok(value)
}

// ---- time ----------------------------------------------------------------------------------------------

/// Units of reference time in a second: 100 ns each.
const REFERENCE_HZ: u64 = 10_000_000;

/// Reference time per TSC tick as a fraction of 2^64: `(10^7 << 64) / tsc_hz`, rounded down. A TSC slower than
/// reference time counts as just as fast.
#[must_use]
pub const fn reference_scale(tsc_hz: u64) -> u64 {
    if tsc_hz <= REFERENCE_HZ {
        return u64::MAX;
    }
    // Bit by bit: `u128 / u64` would need a library function.
    let (mut rest, mut scale) = (REFERENCE_HZ as u128, 0_u64);
    let mut bit = 0;
    while bit < 64 {
        rest <<= 1;
        scale <<= 1;
        if rest >= tsc_hz as u128 {
            rest = rest.wrapping_sub(tsc_hz as u128);
            scale |= 1;
        }
        bit = u32::wrapping_add(bit, 1);
    }
    scale
}

const fn scaled(ticks: u64, scale: u64) -> u64 {
    ((ticks as u128).wrapping_mul(scale as u128) >> 64) as u64
}

/// The partition's reference time in units of 100 ns (TLFS 12.4).
#[must_use]
pub const fn reference_time(host_tsc: u64, partition: &PartitionState) -> u64 {
    let now = match partition.frozen_at {
        Some(at) => at,
        None => host_tsc,
    };
    let ticks = now.wrapping_sub(partition.reference_base);
    // The base may be a little in the future: it was taken by another CPU.
    if ticks >> 63 != 0 {
        0
    } else {
        scaled(ticks, partition.reference_scale)
    }
}

/// TSC ticks from reference time 0 to `value`; `u64::MAX` if that does not fit.
fn reference_ticks(value: u64, partition: &PartitionState) -> u64 {
    let seconds = value.checked_div(REFERENCE_HZ).unwrap_or(0);
    let rest = value.checked_rem(REFERENCE_HZ).unwrap_or(0);
    let part = rest
        .saturating_mul(partition.tsc_hz)
        .checked_div(REFERENCE_HZ)
        .unwrap_or(0);
    let mut ticks = seconds
        .saturating_mul(partition.tsc_hz)
        .saturating_add(part);
    // Scale and quotient were rounded down: then the time shall have been reached.
    for _ in 0..4 {
        if scaled(ticks, partition.reference_scale) < value {
            ticks = ticks.saturating_add(1);
        }
    }
    ticks
}

/// Sets the reference time to `value` at this moment.
pub fn set_reference_time(value: u64, partition: &mut PartitionState, host_tsc: u64) {
    let now = partition.frozen_at.unwrap_or(host_tsc);
    partition.reference_base = now.wrapping_sub(reference_ticks(value, partition));
}

/// Host TSC at which the reference time reaches `value`; `u64::MAX` for never, as long as the partition's time stands still.
#[must_use]
pub fn host_tsc_at(value: u64, partition: &PartitionState) -> u64 {
    let ticks = reference_ticks(value, partition);
    if partition.frozen_at.is_some() || ticks >> 63 != 0 {
        u64::MAX
    } else {
        partition.reference_base.wrapping_add(ticks)
    }
}

/// Start of the reference TSC page (TLFS 12.7.2); the rest is zero. Reference time is
/// `((tsc * scale) >> 64) + offset`, at most one unit off HV_X64_MSR_TIME_REF_COUNT.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ReferenceTscPage {
    /// Changes with the other fields; 0: use the MSR.
    pub sequence: u32,
    /// Zero.
    pub reserved: u32,
    /// Fraction of 2^64.
    pub scale: u64,
    /// Units of 100 ns.
    pub offset: i64,
}

const _: () = assert!(core::mem::size_of::<ReferenceTscPage>() == 24);

/// Makes the page for VPs whose TSC is the host's plus `tsc_offset`. While time is frozen it is invalid.
pub fn reference_tsc_page(partition: &mut PartitionState, tsc_offset: u64) -> ReferenceTscPage {
    if partition.frozen_at.is_some() {
        return ReferenceTscPage::default();
    }
    partition.reference_sequence = match partition.reference_sequence.wrapping_add(1) {
        // Both mean "invalid", the latter in old versions.
        0 | u32::MAX => 1,
        next => next,
    };
    // The guest's TSC at time 0, perhaps before its TSC was 0.
    let zero = partition.reference_base.wrapping_add(tsc_offset) as i64;
    let scaled_zero = (zero as i128).wrapping_mul(partition.reference_scale as i128) >> 64;
    ReferenceTscPage {
        sequence: partition.reference_sequence,
        reserved: 0,
        scale: partition.reference_scale,
        offset: (scaled_zero as i64).wrapping_neg(),
    }
}

/// Fills the hypercall page: VMCALL or VMMCALL, RET, and breakpoints where nothing should run.
pub fn fill_hypercall_page(page: &mut [u8; 4096], vendor: Vendor) {
    page.fill(0xcc);
    let code = match vendor {
        Vendor::Vmx => [0x0f, 0x01, 0xc1, 0xc3],
        Vendor::Svm => [0x0f, 0x01, 0xd9, 0xc3],
    };
    for (byte, instruction) in page.iter_mut().zip(code) {
        *byte = instruction;
    }
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
    use crate::vp_state::HostFacts;

    const HZ: u64 = 2_893_437_123;

    struct Machine {
        vp: VpState,
        apic: LocalApic,
        timers: Timers,
        partition: PartitionState,
        tsc: u64,
    }

    impl Machine {
        fn new() -> Self {
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
            let mut partition = PartitionState::new(host, 1000);
            partition.synthetic_features = 0x640_0ffb;
            let mut vp = VpState::reset(true);
            vp.features = Features {
                cr4: 0x3f_37ff & !(1 << 13),
                efer: 0xd01,
                xcr0: 0xe7,
                spec_ctrl: 7,
                pred_cmd: 1,
                arch_capabilities: Some(0x2b),
                physical_bits: 40,
                linear_bits: 48,
                flush_cmd: true,
                tsc_aux: true,
                tsc_adjust: true,
                xss: true,
                invariant_tsc: true,
            };
            Self {
                vp,
                apic: LocalApic::new(config, 5, true),
                timers: Timers::RESET,
                partition,
                tsc: 1_000_000,
            }
        }

        fn local(&mut self) -> Local<'_> {
            Local {
                vp: &mut self.vp,
                apic: &mut self.apic,
                timers: &mut self.timers,
                partition: &self.partition,
                vp_index: 5,
                host_tsc: self.tsc,
            }
        }

        fn read(&mut self, number: u32) -> Outcome<u64> {
            read(number, &self.local())
        }

        /// As the hypervisor does it.
        fn write(&mut self, number: u32, value: u64) -> Outcome<Effect> {
            match write(number, value, &mut self.local())? {
                Effect::Partition => {
                    write_partition(number, value, &mut self.partition, &self.vp.features)
                }
                effect => Ok(effect),
            }
        }

        fn put(&mut self, number: u32, value: u64) {
            assert_eq!(self.write(number, value), Ok(Effect::None), "{number:#x}");
        }
    }

    const GP: Outcome<Effect> = Err(GeneralProtection);

    #[test]
    fn what_linux_reads_without_asking_is_there() {
        let mut m = Machine::new();
        for vendor in [Vendor::Vmx, Vendor::Svm] {
            m.partition.host.vendor = vendor;
            for number in [
                0x0,
                0x1,
                0x10,
                0x17,
                0x1b,
                0x2a,
                0x34,
                0x3a,
                0x3b,
                0x8b,
                0xce,
                0xfe,
                0x140,
                0x174,
                0x175,
                0x176,
                0x179,
                0x17a,
                0x198,
                0x199,
                0x1a0,
                0x1d9,
                0x1fc,
                0x200,
                0x20f,
                0x250,
                0x26f,
                0x277,
                0x2ff,
                0x606,
                0x6e0,
                0xc000_0080,
                0xc000_0081,
                0xc000_0082,
                0xc000_0083,
                0xc000_0084,
                0xc000_0100,
                0xc000_0101,
                0xc000_0102,
                0xc000_0103,
                0xc000_0104,
                0xc001_0000,
                0xc001_0010,
                0xc001_0015,
                0xc001_001a,
                0xc001_001d,
                0xc001_001f,
                0xc001_0055,
                0xc001_0112,
                0xc001_0113,
                0xc001_0114,
                0xc001_0140,
                0xc001_1020,
                0xc001_1029,
                0xc001_102a,
            ] {
                assert!(m.read(number).is_ok(), "{number:#x}");
            }
        }
    }

    #[test]
    fn values_that_linux_judges_are_right() {
        let mut m = Machine::new();
        // Feature control locked without VMX; SVM locked off; TSC at P0; LFENCE serialises; no banks.
        assert_eq!(m.read(0x3a), Ok(1));
        assert_eq!(m.read(0xc001_0114), Ok(0x18));
        assert_eq!(m.read(0xc001_0015), Ok(1 << 24));
        assert_eq!(m.read(0xc001_1029), Ok(2));
        assert_eq!(m.read(0x179), Ok(0));
        assert_eq!(m.read(0xc000_0104), Ok(1 << 32));
        assert_eq!(m.read(0xfe), Ok(0x508));
        assert_eq!(m.read(0x1a0), Ok(0x1801));
    }

    #[test]
    fn writes_to_constant_msrs_do_nothing() {
        let mut m = Machine::new();
        for number in [
            0x79,
            0x8b,
            0x140,
            0x17a,
            0x199,
            0xc001_0015,
            0xc001_1029,
            0xc001_0020,
        ] {
            let before = m.read(number);
            m.put(number, 5);
            assert_eq!(m.read(number), before);
        }
        assert_eq!(m.write(0xfe, 0), GP);
        assert_eq!(m.write(0x3a, 1), GP);
    }

    #[test]
    fn unknown_msrs_do_what_the_property_says() {
        let mut m = Machine::new();
        for number in [
            0x480,
            0x570,
            0x4000_0010,
            0x4000_0050,
            0x4000_0085,
            0x4000_00f8,
            0xdead_beef,
        ] {
            m.partition.ignore_unknown_msrs = false;
            assert_eq!(m.read(number), Err(GeneralProtection), "{number:#x}");
            assert_eq!(m.write(number, 1), GP);
            m.partition.ignore_unknown_msrs = true;
            assert_eq!(m.read(number), Ok(0));
            m.put(number, 1);
        }
        // A known one that refuses the value still does.
        assert_eq!(m.write(0x277, 2), GP);
    }

    #[test]
    fn msrs_of_absent_features_are_unknown() {
        let mut m = Machine::new();
        m.vp.features = Features::NONE;
        for number in [0x3b, 0x48, 0x49, 0x10a, 0x10b, 0xda0, 0xc000_0103] {
            assert_eq!(m.write(number, 0), GP, "{number:#x}");
        }
        for number in [0x3b, 0x48, 0x10a, 0xda0, 0xc000_0103] {
            assert_eq!(m.read(number), Err(GeneralProtection), "{number:#x}");
        }
    }

    #[test]
    fn x2apic_msrs_need_x2apic_mode() {
        let mut m = Machine::new();
        assert_eq!(m.read(0x802), Err(GeneralProtection));
        let effect = m.write(0x1b, 0xfee0_0d00);
        assert_eq!(effect, Ok(Effect::Apic(WriteEffect::BaseChanged)));
        assert_eq!(m.apic.mode(), Mode::X2Apic);
        assert_eq!(m.read(0x802), Ok(5));
        assert_eq!(m.write(0x808, 0x30), Ok(Effect::Apic(WriteEffect::None)));
        assert_eq!(m.read(0x808), Ok(0x30));
        assert_eq!(m.write(0x808, 0x100), GP);
    }

    #[test]
    fn writing_the_tsc_moves_tsc_adjust_with_it() {
        let mut m = Machine::new();
        assert_eq!(m.read(0x10), Ok(1_000_000));
        assert_eq!(m.write(0x10, 5_000_000), Ok(Effect::TscOffset));
        assert_eq!((m.read(0x10), m.read(0x3b)), (Ok(5_000_000), Ok(4_000_000)));
        assert_eq!(m.write(0x3b, 0), Ok(Effect::TscOffset));
        assert_eq!((m.read(0x10), m.read(0x3b)), (Ok(1_000_000), Ok(0)));
    }

    #[test]
    fn tsc_deadline_is_the_local_apics() {
        let mut m = Machine::new();
        let _ = m.apic.write(0xf0, 0x1ff, 0).unwrap();
        let _ = m.apic.write(0x320, 0x0004_0040, 0).unwrap();
        let effect = m.write(0x6e0, 2_000_000);
        assert_eq!(effect, Ok(Effect::Apic(WriteEffect::TimerChanged)));
        assert_eq!(m.read(0x6e0), Ok(2_000_000));
    }

    #[test]
    fn addresses_have_to_be_canonical() {
        let mut m = Machine::new();
        for number in [
            0x175,
            0x176,
            0xc000_0082,
            0xc000_0083,
            0xc000_0100,
            0xc000_0101,
            0xc000_0102,
        ] {
            m.put(number, 0xffff_8000_0000_1000);
            assert_eq!(m.write(number, 0x8000_0000_0000), GP);
            assert_eq!(m.read(number), Ok(0xffff_8000_0000_1000));
        }
        assert_eq!(m.vp.segments[segment::GS].base, 0xffff_8000_0000_1000);
    }

    #[test]
    fn upper_halves_of_32_bit_msrs_are_reserved() {
        let mut m = Machine::new();
        for number in [0xc000_0084, 0xc000_0103] {
            m.put(number, 0xffff_ffff);
            assert_eq!(m.write(number, 1 << 32), GP);
        }
    }

    #[test]
    fn memory_types_are_checked() {
        let mut m = Machine::new();
        m.put(0x277, 0x0007_0406_0007_0406);
        for bad in [2, 3, 8, 0x0300, 0xff << 56] {
            assert_eq!(m.write(0x277, bad), GP);
        }
        m.put(0x2ff, 0xc06);
        assert_eq!(m.write(0x2ff, 0x1c06), GP);
        assert_eq!(m.write(0x2ff, 2), GP);
        m.put(0x250, 0x0606_0606_0505_0401);
        assert_eq!(m.write(0x250, 7), GP);
        m.put(0x200, 0xc000_0000);
        m.put(0x201, 0xff_c000_0800);
        assert_eq!(m.write(0x200, 0xc000_0100), GP);
        assert_eq!(m.write(0x201, 0xc000_0001), GP);
        assert_eq!(m.write(0x201, 1 << 40), GP);
        assert_eq!(m.read(0x201), Ok(0xff_c000_0800));
        m.put(0x20e, 6);
        assert_eq!(m.read(0x20e), Ok(6));
        assert_eq!(m.read(0x210), Err(GeneralProtection));
    }

    #[test]
    fn speculation_controls_take_what_cpuid_has() {
        let mut m = Machine::new();
        assert_eq!(m.write(0x48, 5), Ok(Effect::SpeculationControl));
        assert_eq!(m.write(0x48, 1 << 10), GP);
        assert_eq!(m.read(0x48), Ok(5));
        m.put(0x49, 0);
        assert_eq!(m.write(0x49, 1), Ok(Effect::PredictionCommand(1)));
        assert_eq!(m.write(0x49, 1 << 7), GP);
        assert_eq!(m.write(0x10b, 1), Ok(Effect::FlushL1d));
        assert_eq!(m.read(0x10a), Ok(0x2b));
        assert_eq!(m.write(0x10a, 0), GP);
    }

    #[test]
    fn debugctl_keeps_only_branch_stepping() {
        let mut m = Machine::new();
        m.put(0x1d9, 3);
        assert_eq!(m.read(0x1d9), Ok(2));
        assert_eq!(m.write(0x1d9, 1 << 6), GP);
    }

    #[test]
    fn efer_follows_the_rules_of_long_mode() {
        let mut m = Machine::new();
        m.put(0xc000_0080, 0xd01);
        // LMA is not software's.
        assert_eq!(m.read(0xc000_0080), Ok(0x901));
        assert_eq!(m.write(0xc000_0080, 1 << 12), GP);
        m.vp.cr0 = 0x8000_0011;
        m.vp.efer = 0xd01;
        assert_eq!(m.write(0xc000_0080, 1), GP);
        m.put(0xc000_0080, 0x501);
        assert_eq!(m.read(0xc000_0080), Ok(0x501));
    }

    #[test]
    fn hypercall_page_needs_an_identity() {
        let mut m = Machine::new();
        let on = 0x5000 | PAGE_ENABLE;
        assert_eq!(m.write(hv::HYPERCALL, on), Ok(Effect::HypercallPage(None)));
        assert_eq!(m.read(hv::HYPERCALL), Ok(0x5000));
        m.put(hv::GUEST_OS_ID, 0x8100 << 48);
        assert_eq!(
            m.write(hv::HYPERCALL, on),
            Ok(Effect::HypercallPage(Some(0x5000)))
        );
        assert_eq!(m.read(hv::HYPERCALL), Ok(on));
        assert_eq!(m.write(hv::HYPERCALL, (1 << 40) | 1), GP);
        assert_eq!(m.write(hv::GUEST_OS_ID, 0), Ok(Effect::HypercallPage(None)));
        assert_eq!(m.read(hv::HYPERCALL), Ok(0x5000));
    }

    #[test]
    fn locked_hypercall_page_stays() {
        let mut m = Machine::new();
        m.put(hv::GUEST_OS_ID, 1);
        let locked = 0x5000 | PAGE_ENABLE | HYPERCALL_LOCKED;
        assert_eq!(
            m.write(hv::HYPERCALL, locked),
            Ok(Effect::HypercallPage(Some(0x5000)))
        );
        m.put(hv::HYPERCALL, 0x9001);
        assert_eq!(m.read(hv::HYPERCALL), Ok(locked));
    }

    #[test]
    fn hypervisor_msrs_answer() {
        let mut m = Machine::new();
        assert_eq!(m.read(hv::VP_INDEX), Ok(5));
        assert_eq!(m.read(hv::TSC_FREQUENCY), Ok(HZ));
        assert_eq!(m.read(hv::APIC_FREQUENCY), Ok(200_000_000));
        assert_eq!(m.read(hv::EOI), Err(GeneralProtection));
        assert_eq!(m.write(hv::EOI, 0), Ok(Effect::Apic(WriteEffect::None)));
        assert_eq!(m.write(hv::TPR, 0x40), Ok(Effect::Apic(WriteEffect::None)));
        assert_eq!((m.read(hv::TPR), m.apic.tpr()), (Ok(0x40), 0x40));
        assert_eq!(m.write(hv::TPR, 0x100), GP);
        let ipi = m.write(hv::ICR, 0x0300_0000_0000_4040);
        assert!(matches!(ipi, Ok(Effect::Apic(WriteEffect::Ipi(_)))));
        let assist = m.write(hv::VP_ASSIST_PAGE, 0x7001);
        assert_eq!(assist, Ok(Effect::VpAssistPage(Some(0x7000))));
        assert_eq!(
            m.write(hv::VP_ASSIST_PAGE, 0),
            Ok(Effect::VpAssistPage(None))
        );
        assert_eq!(m.write(hv::RESET, 1), Ok(Effect::Reset));
        for number in 0x4000_0106..=0x4000_0107 {
            m.put(number, 0x1_0001_00ee);
            assert_eq!(m.read(number), Ok(0x1_0001_00ee));
        }
        // Emulation, of which there is none, can only be said to be over.
        assert_eq!(m.write(hv::TSC_EMULATION_STATUS, 1), GP);
        m.put(hv::TSC_EMULATION_STATUS, 0);
        m.put(hv::TSC_INVARIANT_CONTROL, 1);
        m.put(hv::TSC_INVARIANT_CONTROL, 0);
        assert_eq!(m.read(hv::TSC_INVARIANT_CONTROL), Ok(1));
        assert_eq!(m.write(hv::TSC_INVARIANT_CONTROL, 2), GP);
        for number in [
            hv::VP_INDEX,
            hv::TIME_REF_COUNT,
            hv::TSC_FREQUENCY,
            hv::APIC_FREQUENCY,
        ] {
            assert_eq!(m.write(number, 0), GP);
        }
    }

    #[test]
    fn hypervisor_msrs_need_their_feature() {
        let mut m = Machine::new();
        m.partition.synthetic_features = synthetic::HYPERVISOR_PRESENT;
        for number in [
            hv::GUEST_OS_ID,
            hv::HYPERCALL,
            hv::VP_INDEX,
            hv::TIME_REF_COUNT,
            hv::REFERENCE_TSC,
            hv::TSC_FREQUENCY,
            hv::ICR,
            hv::TPR,
            hv::VP_ASSIST_PAGE,
            hv::CRASH_CTL,
            hv::TSC_INVARIANT_CONTROL,
        ] {
            assert_eq!(m.read(number), Err(GeneralProtection), "{number:#x}");
            assert_eq!(m.write(number, 0), GP, "{number:#x}");
        }
    }

    #[test]
    fn crash_is_reported_with_its_parameters() {
        let mut m = Machine::new();
        assert_eq!(m.read(hv::CRASH_CTL), Ok(3 << 62));
        for index in 0..5 {
            m.put(hv::CRASH_P0 + index, u64::from(index) + 10);
            assert_eq!(m.read(hv::CRASH_P0 + index), Ok(u64::from(index) + 10));
        }
        assert_eq!(m.write(hv::CRASH_CTL, CRASH_NOTIFY), Ok(Effect::Crash));
        assert_eq!(m.partition.crash, [10, 11, 12, 13, 14, CRASH_NOTIFY]);
    }

    #[test]
    fn reference_time_counts_ten_million_a_second() {
        for hz in [10_000_001, 19_200_000, 1_000_000_000, HZ, 5_999_999_999] {
            let host = HostFacts {
                tsc_hz: hz,
                ..Machine::new().partition.host
            };
            let partition = PartitionState::new(host, 777);
            for seconds in [0, 1, 86_400, 3_000_000] {
                let time = reference_time(777 + seconds * hz, &partition);
                let error = (seconds * REFERENCE_HZ).wrapping_sub(time);
                assert!(error <= 1, "{hz} {seconds} {time}");
            }
            assert_eq!(reference_time(700, &partition), 0);
        }
        assert_eq!(reference_scale(1), u64::MAX);
    }

    #[test]
    fn reference_time_that_is_set_reads_back() {
        let mut partition = Machine::new().partition;
        for value in [0, 1, 9_999_999, 123_456_789_012, 1 << 50] {
            set_reference_time(value, &mut partition, 5_000);
            assert_eq!(reference_time(5_000, &partition), value);
            partition.frozen_at = Some(9_000);
            set_reference_time(value, &mut partition, 77_000);
            assert_eq!(reference_time(88_000, &partition), value);
            partition.frozen_at = None;
        }
    }

    #[test]
    fn reference_page_agrees_with_the_msr() {
        let mut partition = Machine::new().partition;
        for (base, offset) in [
            (1_000, 0),
            (1 << 40, 0_u64.wrapping_sub(1 << 40)),
            (5, 1 << 50),
        ] {
            partition.reference_base = base;
            let page = reference_tsc_page(&mut partition, offset);
            for later in [0, 1, HZ, 1000 * HZ] {
                let host_tsc = (1 << 41) + later;
                let tsc = host_tsc.wrapping_add(offset);
                let by_page = scaled(tsc, page.scale).wrapping_add(page.offset as u64);
                let by_msr = reference_time(host_tsc, &partition);
                assert!(by_page.abs_diff(by_msr) <= 1, "{by_page} {by_msr}");
            }
        }
    }

    #[test]
    fn reference_page_changes_its_sequence_and_is_invalid_while_frozen() {
        let mut partition = Machine::new().partition;
        assert_eq!(reference_tsc_page(&mut partition, 0).sequence, 1);
        assert_eq!(reference_tsc_page(&mut partition, 0).sequence, 2);
        partition.reference_sequence = u32::MAX - 1;
        assert_eq!(reference_tsc_page(&mut partition, 0).sequence, 1);
        partition.frozen_at = Some(5);
        assert_eq!(reference_tsc_page(&mut partition, 0).sequence, 0);
    }

    #[test]
    fn hypercall_page_traps_and_returns() {
        let mut page = [0; 4096];
        fill_hypercall_page(&mut page, Vendor::Vmx);
        assert_eq!(page[..5], [0x0f, 0x01, 0xc1, 0xc3, 0xcc]);
        fill_hypercall_page(&mut page, Vendor::Svm);
        assert_eq!(page[..5], [0x0f, 0x01, 0xd9, 0xc3, 0xcc]);
        assert_eq!(page[4095], 0xcc);
    }

    #[test]
    fn cr0_rules() {
        let mut vp = Machine::new().vp;
        for bad in [cr0::PG, cr0::NW, 1 << 32] {
            assert_eq!(validate_cr0(bad, &vp), Err(GeneralProtection), "{bad:#x}");
        }
        let write = validate_cr0((1 << 63 >> 63) | (1 << 6), &vp).unwrap();
        assert_eq!(write.value, 0x11);
        // Paging with long mode enabled needs PAE, and CS must not be 64-bit.
        vp.efer = efer::LME;
        let paging = cr0::PG | cr0::PE;
        assert_eq!(validate_cr0(paging, &vp), Err(GeneralProtection));
        vp.cr4 = cr4::PAE;
        let write = validate_cr0(paging, &vp).unwrap();
        assert_eq!(
            (write.efer, write.load_pdptes),
            (efer::LME | efer::LMA, false)
        );
        assert!(write.flush);
        vp.segments[segment::CS].rights = 0xa09b;
        assert_eq!(validate_cr0(paging, &vp), Err(GeneralProtection));
        // And cannot be left from 64-bit mode, nor with PCIDs.
        vp.cr0 = paging | cr0::ET;
        vp.efer |= efer::LMA;
        assert_eq!(validate_cr0(cr0::PE, &vp), Err(GeneralProtection));
        vp.segments[segment::CS].rights = 0xc09b;
        assert_eq!(validate_cr0(cr0::PE, &vp).unwrap().efer, efer::LME);
        vp.cr4 |= cr4::PCIDE;
        assert_eq!(validate_cr0(cr0::PE, &vp), Err(GeneralProtection));
    }

    #[test]
    fn long_mode_refuses_a_16_bit_tss() {
        let mut vp = Machine::new().vp;
        vp.efer = efer::LME;
        vp.cr4 = cr4::PAE;
        for (rights, good) in [(0x81, false), (0x83, false), (0x89, true), (0x8b, true)] {
            vp.segments[segment::TR].rights = rights;
            let write = validate_cr0(cr0::PG | cr0::PE, &vp);
            assert_eq!(write.is_ok(), good, "{rights:#x}");
        }
    }

    #[test]
    fn shadow_stacks_and_write_protection_go_together() {
        let mut vp = Machine::new().vp;
        vp.features.cr4 |= cr4::CET;
        assert_eq!(validate_cr4(cr4::CET, &vp), Err(GeneralProtection));
        vp.cr0 |= cr0::WP;
        assert!(validate_cr4(cr4::CET, &vp).is_ok());
        vp.cr4 = cr4::CET;
        assert_eq!(validate_cr0(cr0::PE, &vp), Err(GeneralProtection));
        assert!(validate_cr0(cr0::PE | cr0::WP, &vp).is_ok());
    }

    #[test]
    fn pae_paging_loads_the_pointers() {
        let mut vp = Machine::new().vp;
        vp.cr4 = cr4::PAE;
        assert!(validate_cr0(cr0::PG | cr0::PE, &vp).unwrap().load_pdptes);
        vp.cr0 = cr0::PG | cr0::PE | cr0::ET;
        assert!(!validate_cr0(vp.cr0 | cr0::WP, &vp).unwrap().load_pdptes);
        assert!(validate_cr3(0x1000, &vp).unwrap().load_pdptes);
        assert!(validate_cr4(cr4::PAE | cr4::PGE, &vp).unwrap().load_pdptes);
        assert!(!validate_cr4(cr4::PAE | (1 << 9), &vp).unwrap().load_pdptes);
        assert!(validate_cr0(vp.cr0 | cr0::CD, &vp).unwrap().load_pdptes);
        vp.efer = efer::LME | efer::LMA;
        assert!(!validate_cr4(cr4::PAE | cr4::PGE, &vp).unwrap().load_pdptes);
    }

    #[test]
    fn registers_set_from_outside_load_the_pointers_only_if_they_matter() {
        let old = Paging {
            cr0: cr0::PG | cr0::PE,
            cr3: 0x1000,
            cr4: cr4::PAE,
            efer: 0,
        };
        for new in [
            old,
            Paging {
                cr0: old.cr0 | cr0::WP,
                ..old
            },
            Paging {
                cr0: cr0::PE,
                cr3: 0x2000,
                ..old
            },
            Paging {
                cr4: cr4::PSE,
                cr3: 0x2000,
                ..old
            },
            Paging {
                efer: efer::LME | efer::LMA,
                cr3: 0x2000,
                ..old
            },
        ] {
            assert!(!new.loads_pointers(&old), "{new:x?}");
        }
        for from in [
            Paging { cr3: 0x2000, ..old },
            Paging {
                cr0: cr0::PE,
                ..old
            },
            Paging { cr4: 0, ..old },
            Paging {
                efer: efer::LME | efer::LMA,
                ..old
            },
        ] {
            assert!(old.loads_pointers(&from), "{from:x?}");
        }
    }

    #[test]
    fn cr3_rules() {
        let mut vp = Machine::new().vp;
        assert_eq!(validate_cr3((1 << 45) | 0x1018, &vp).unwrap().value, 0x1018);
        vp.efer = efer::LMA;
        assert_eq!(validate_cr3(1 << 45, &vp), Err(GeneralProtection));
        assert_eq!(
            validate_cr3((1 << 63) | 0x1001, &vp),
            Err(GeneralProtection)
        );
        vp.cr4 = cr4::PCIDE;
        let keep = validate_cr3((1 << 63) | 0x1001, &vp).unwrap();
        assert_eq!((keep.value, keep.flush), (0x1001, false));
    }

    #[test]
    fn cr4_rules() {
        let mut vp = Machine::new().vp;
        for absent in [cr4::VMXE, cr4::SMXE, cr4::CET, cr4::FRED, 1 << 63] {
            assert_eq!(validate_cr4(absent, &vp), Err(GeneralProtection));
        }
        assert_eq!(validate_cr4(cr4::PCIDE, &vp), Err(GeneralProtection));
        vp.efer = efer::LMA;
        vp.cr4 = cr4::PAE;
        assert!(validate_cr4(cr4::PAE | cr4::PCIDE, &vp).is_ok());
        vp.cr3 = 1;
        assert_eq!(
            validate_cr4(cr4::PAE | cr4::PCIDE, &vp),
            Err(GeneralProtection)
        );
        assert_eq!(validate_cr4(0, &vp), Err(GeneralProtection));
        assert_eq!(
            validate_cr4(cr4::PAE | cr4::LA57, &vp),
            Err(GeneralProtection)
        );
    }

    #[test]
    fn xcr0_rules() {
        let features = Machine::new().vp.features;
        for good in [1, 3, 7, 0xe7] {
            assert_eq!(validate_xcr0(good, &features), Ok(good));
        }
        for bad in [0, 2, 5, 0x27, 0xe3, 0x207, 0x6_0003] {
            assert_eq!(
                validate_xcr0(bad, &features),
                Err(GeneralProtection),
                "{bad:#x}"
            );
        }
    }
}
