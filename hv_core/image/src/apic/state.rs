// SPDX-License-Identifier: GPL-2.0
//! Saving and restoring: `hv_local_interrupt_controller_state` of the TLFS headers, the LAPIC page of
//! MSHV_GET_VP_STATE and MSHV_SET_VP_STATE.
//!
//! Not in it, and therefore kept by [`LocalApic::import`]: TPR (it is CR8), IA32_APIC_BASE,
//! IA32_TSC_DEADLINE, and pending NMI, INIT, SIPI and ExtINT. IA32_APIC_BASE should be restored first.

use super::timer::{self, SavedTimer, TimerMode};
use super::{
    x2apic_ldr, LocalApic, Lvt, Mode, VectorSet, DELIVERY_STATUS, ICR_LOW_BITS, LVT_MASKED,
    SVR_BITS, SVR_ENABLE, VERSION,
};

/// Size of [`InterruptControllerState`] in bytes; the rest of the 4096-byte page is zero.
pub const STATE_SIZE: usize = 176;

const WORDS: usize = STATE_SIZE / 4;

/// `hv_local_interrupt_controller_state`: registers as the guest reads them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct InterruptControllerState {
    /// APIC id register: `id << 24` in xAPIC mode, the id in x2APIC mode.
    pub apic_id: u32,
    /// Version register; ignored on import.
    pub apic_version: u32,
    /// LDR; ignored on import in x2APIC mode.
    pub apic_ldr: u32,
    /// DFR; ignored on import in x2APIC mode.
    pub apic_dfr: u32,
    /// SVR.
    pub apic_spurious: u32,
    /// ISR.
    pub apic_isr: [u32; 8],
    /// TMR.
    pub apic_tmr: [u32; 8],
    /// IRR.
    pub apic_irr: [u32; 8],
    /// ESR as the guest reads it.
    pub apic_esr: u32,
    /// ICR bits 63:32.
    pub apic_icr_high: u32,
    /// ICR bits 31:0.
    pub apic_icr_low: u32,
    /// LVT timer.
    pub apic_lvt_timer: u32,
    /// LVT thermal sensor.
    pub apic_lvt_thermal: u32,
    /// LVT performance monitoring.
    pub apic_lvt_perfmon: u32,
    /// LVT LINT0.
    pub apic_lvt_lint0: u32,
    /// LVT LINT1.
    pub apic_lvt_lint1: u32,
    /// LVT error.
    pub apic_lvt_error: u32,
    /// LVT CMCI, which is absent: reads masked, ignored on import.
    pub apic_lvt_cmci: u32,
    /// Errors logged but not yet latched into the ESR.
    pub apic_error_status: u32,
    /// Initial count.
    pub apic_initial_count: u32,
    /// Current count.
    pub apic_counter_value: u32,
    /// Divide configuration.
    pub apic_divide_configuration: u32,
    /// Remote read register, which is absent: reads 0, ignored on import.
    pub apic_remote_read: u32,
}

const _: () = assert!(core::mem::size_of::<InterruptControllerState>() == STATE_SIZE);
const _: () = assert!(core::mem::offset_of!(InterruptControllerState, apic_isr) == 20);
const _: () = assert!(core::mem::offset_of!(InterruptControllerState, apic_esr) == 116);
const _: () = assert!(core::mem::offset_of!(InterruptControllerState, apic_lvt_lint0) == 140);
const _: () = assert!(core::mem::offset_of!(InterruptControllerState, apic_remote_read) == 172);

/// Why a state cannot be imported. The APIC is then as before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateError {
    /// The id is not this VP's, in neither format.
    Id,
    /// Reserved bits in LDR or DFR.
    Addressing,
    /// Reserved bits in the SVR.
    Spurious,
    /// A vector below 16 in ISR, TMR or IRR.
    Vector,
    /// Reserved bits in an error register.
    ErrorStatus,
    /// Reserved bits in the ICR.
    Icr,
    /// Reserved bits in an LVT entry.
    Lvt,
    /// Reserved bits in the divide configuration, or counts that the timer cannot have.
    Timer,
}

impl InterruptControllerState {
    /// The state as little-endian bytes, to be copied to the start of the page.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; STATE_SIZE] {
        let mut bytes = [0; STATE_SIZE];
        for (byte, value) in bytes
            .iter_mut()
            .zip(self.words().flat_map(u32::to_le_bytes))
        {
            *byte = value;
        }
        bytes
    }

    /// Reads the state from bytes.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; STATE_SIZE]) -> Self {
        let mut words = bytes.chunks_exact(4).map(|chunk| {
            chunk
                .iter()
                .rev()
                .fold(0_u32, |word, &byte| (word << 8) | u32::from(byte))
        });
        let mut next = || words.next().unwrap_or(0);
        let apic_id = next();
        let apic_version = next();
        let apic_ldr = next();
        let apic_dfr = next();
        let apic_spurious = next();
        let apic_isr = core::array::from_fn(|_| next());
        let apic_tmr = core::array::from_fn(|_| next());
        let apic_irr = core::array::from_fn(|_| next());
        Self {
            apic_id,
            apic_version,
            apic_ldr,
            apic_dfr,
            apic_spurious,
            apic_isr,
            apic_tmr,
            apic_irr,
            // Fields are evaluated in the order they are written.
            apic_esr: next(),
            apic_icr_high: next(),
            apic_icr_low: next(),
            apic_lvt_timer: next(),
            apic_lvt_thermal: next(),
            apic_lvt_perfmon: next(),
            apic_lvt_lint0: next(),
            apic_lvt_lint1: next(),
            apic_lvt_error: next(),
            apic_lvt_cmci: next(),
            apic_error_status: next(),
            apic_initial_count: next(),
            apic_counter_value: next(),
            apic_divide_configuration: next(),
            apic_remote_read: next(),
        }
    }

    /// All registers in the order of the layout.
    fn words(&self) -> impl Iterator<Item = u32> {
        let head = [
            self.apic_id,
            self.apic_version,
            self.apic_ldr,
            self.apic_dfr,
            self.apic_spurious,
        ];
        let tail = [
            self.apic_esr,
            self.apic_icr_high,
            self.apic_icr_low,
            self.apic_lvt_timer,
            self.apic_lvt_thermal,
            self.apic_lvt_perfmon,
            self.apic_lvt_lint0,
            self.apic_lvt_lint1,
            self.apic_lvt_error,
            self.apic_lvt_cmci,
            self.apic_error_status,
            self.apic_initial_count,
            self.apic_counter_value,
            self.apic_divide_configuration,
            self.apic_remote_read,
        ];
        const { assert!(5 + 3 * 8 + 15 == WORDS) };
        let vectors = self
            .apic_isr
            .into_iter()
            .chain(self.apic_tmr)
            .chain(self.apic_irr);
        head.into_iter().chain(vectors).chain(tail)
    }
}

impl LocalApic {
    /// Saves the registers at `now`. What is still in the VP's mailbox should be drained before.
    #[must_use]
    pub fn export(&self, now: u64) -> InterruptControllerState {
        let x2apic = self.mode == Mode::X2Apic;
        InterruptControllerState {
            apic_id: if x2apic { self.id } else { self.id << 24 },
            apic_version: VERSION,
            apic_ldr: if x2apic {
                x2apic_ldr(self.id)
            } else {
                self.ldr
            },
            apic_dfr: if x2apic { u32::MAX } else { self.dfr },
            apic_spurious: self.svr,
            apic_isr: self.isr.to_registers(),
            apic_tmr: self.tmr.to_registers(),
            apic_irr: self.irr.to_registers(),
            apic_esr: self.esr,
            apic_icr_high: (self.icr >> 32) as u32,
            apic_icr_low: self.icr as u32,
            apic_lvt_timer: self.lvt(Lvt::Timer),
            apic_lvt_thermal: self.lvt(Lvt::Thermal),
            apic_lvt_perfmon: self.lvt(Lvt::PerfMon),
            apic_lvt_lint0: self.lvt(Lvt::Lint0),
            apic_lvt_lint1: self.lvt(Lvt::Lint1),
            apic_lvt_error: self.lvt(Lvt::Error),
            apic_lvt_cmci: LVT_MASKED,
            apic_error_status: self.errors,
            apic_initial_count: self.timer.initial(),
            apic_counter_value: self.timer.current(now),
            apic_divide_configuration: self.timer.divide(),
            apic_remote_read: 0,
        }
    }

    /// Loads a saved state at `now`; a running count goes on from there. Call
    /// [`Posted::publish`](super::Posted::publish) and look at [`LocalApic::timer_deadline`] afterwards.
    ///
    /// # Errors
    ///
    /// [`StateError`] names the register that is malformed; nothing has changed then. LVT entries of a
    /// software-disabled APIC are not malformed if unmasked, but become masked.
    pub fn import(&mut self, state: &InterruptControllerState, now: u64) -> Result<(), StateError> {
        let x2apic = self.mode == Mode::X2Apic;
        if state.apic_id != self.id && state.apic_id != self.id << 24 {
            return Err(StateError::Id);
        }
        let (ldr, dfr) = if x2apic || state.apic_ldr == x2apic_ldr(self.id) {
            // Saved in x2APIC mode, or about to be used in it: derived, not stored.
            (if x2apic { self.ldr } else { 0 }, u32::MAX)
        } else if state.apic_ldr & 0x00ff_ffff == 0 && state.apic_dfr & 0x0fff_ffff == 0x0fff_ffff {
            (state.apic_ldr, state.apic_dfr)
        } else {
            return Err(StateError::Addressing);
        };
        if state.apic_spurious & !SVR_BITS != 0 {
            return Err(StateError::Spurious);
        }
        let isr = VectorSet::from_registers(&state.apic_isr).ok_or(StateError::Vector)?;
        let tmr = VectorSet::from_registers(&state.apic_tmr).ok_or(StateError::Vector)?;
        let irr = VectorSet::from_registers(&state.apic_irr).ok_or(StateError::Vector)?;
        if (state.apic_esr | state.apic_error_status) & !0xff != 0 {
            return Err(StateError::ErrorStatus);
        }
        if state.apic_icr_low & !(ICR_LOW_BITS | DELIVERY_STATUS) != 0 {
            return Err(StateError::Icr);
        }
        let icr_high = if x2apic {
            state.apic_icr_high
        } else {
            state.apic_icr_high & 0xff00_0000
        };
        let lvt = self.check_lvt(state)?;
        let timer = check_timer(state)?;

        self.ldr = ldr;
        self.dfr = dfr;
        self.svr = state.apic_spurious;
        self.isr = isr;
        self.tmr = tmr;
        self.irr = irr;
        self.isr_top = isr.highest();
        self.irr_top = irr.highest();
        self.esr = state.apic_esr;
        self.errors = state.apic_error_status;
        self.icr = (u64::from(icr_high) << 32) | u64::from(state.apic_icr_low & ICR_LOW_BITS);
        self.lvt = lvt;
        self.timer.restore(timer, now);
        self.update_ppr();
        Ok(())
    }

    /// The LVT entries as this APIC can hold them.
    fn check_lvt(&self, state: &InterruptControllerState) -> Result<[u32; Lvt::COUNT], StateError> {
        let mut entries = [
            (Lvt::Timer, state.apic_lvt_timer),
            (Lvt::Thermal, state.apic_lvt_thermal),
            (Lvt::PerfMon, state.apic_lvt_perfmon),
            (Lvt::Lint0, state.apic_lvt_lint0),
            (Lvt::Lint1, state.apic_lvt_lint1),
            (Lvt::Error, state.apic_lvt_error),
        ];
        for (entry, value) in &mut entries {
            if *value & !(entry.writable(self.tsc_deadline) | entry.read_only()) != 0 {
                return Err(StateError::Lvt);
            }
            *value &= !DELIVERY_STATUS;
            if state.apic_spurious & SVR_ENABLE == 0 {
                *value |= LVT_MASKED;
            }
        }
        Ok(entries.map(|(_, value)| value))
    }
}

/// The timer's registers, if they fit together.
fn check_timer(state: &InterruptControllerState) -> Result<SavedTimer, StateError> {
    let saved = SavedTimer {
        mode: TimerMode::from_lvt(state.apic_lvt_timer),
        initial: state.apic_initial_count,
        current: state.apic_counter_value,
        divide: state.apic_divide_configuration,
    };
    let possible = saved.divide & !timer::DIVIDE_BITS == 0
        && saved.current <= saved.initial
        && (saved.mode.counts() || saved.initial == 0);
    if possible {
        Ok(saved)
    } else {
        Err(StateError::Timer)
    }
}
