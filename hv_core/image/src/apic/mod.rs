// SPDX-License-Identifier: GPL-2.0
//! The virtual local APIC of one VP, after Intel SDM vol 3, chapter 12.
//!
//! [`LocalApic`] is pure state: the caller decodes the access (a page at IA32_APIC_BASE in xAPIC mode,
//! MSRs 0x800 to 0x8ff in x2APIC mode), passes the guest's TSC where time matters, and acts on the
//! [`WriteEffect`]. Only the CPU that runs the VP touches it; all others leave interrupts in the VP's
//! [`Posted`] mailbox.
//!
//! ```text
//!   other CPUs ── Posted::post ──►  Posted ── drain_into ──►┐
//!   timer: timer_deadline ► timer_expired ─────────────────►│ IRR ── highest_pending ─► inject,
//!   guest: write / msr_write / write_icr (self) ───────────►│ (TMR)                     acknowledge ─► ISR ─ eoi
//! ```
//!
//! After any call that takes `&mut self`, [`LocalApic::pending`] tells in constant time what can be
//! delivered; no effect says so on its own.
//!
//! What it is: version 0x14 with six LVT entries, no CMCI, no EOI-broadcast suppression, no remote
//! read, SMIs dropped. Files: `vectors` the 256-bit registers, `ipi` messages and destinations, `timer`
//! the timer, `posted` the mailbox, `state` saving and restoring.
#![forbid(unsafe_code)]
#![deny(missing_docs)]
#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]

mod ipi;
mod posted;
mod state;
mod timer;
mod vectors;

#[cfg(test)]
mod tests;

pub use ipi::{
    x2apic_ldr, Addressing, DeliveryMode, Destination, Interrupt, IpiRequest, BROADCAST,
};
pub use posted::Posted;
pub use state::{InterruptControllerState, StateError, STATE_SIZE};
pub use timer::{TimerClock, TimerMode};
pub use vectors::{VectorSet, FIRST_VECTOR};

use timer::Timer;

/// Register numbers: MMIO offset / 16, and MSR number - 0x800 (SDM vol 3, tables 12-1 and 12-6).
mod reg {
    pub const ID: u32 = 0x02;
    pub const VERSION: u32 = 0x03;
    pub const TPR: u32 = 0x08;
    pub const APR: u32 = 0x09;
    pub const PPR: u32 = 0x0a;
    pub const EOI: u32 = 0x0b;
    pub const REMOTE_READ: u32 = 0x0c;
    pub const LDR: u32 = 0x0d;
    pub const DFR: u32 = 0x0e;
    pub const SVR: u32 = 0x0f;
    pub const ISR: u32 = 0x10;
    pub const ISR_LAST: u32 = 0x17;
    pub const TMR: u32 = 0x18;
    pub const TMR_LAST: u32 = 0x1f;
    pub const IRR: u32 = 0x20;
    pub const IRR_LAST: u32 = 0x27;
    pub const ESR: u32 = 0x28;
    pub const ICR_LOW: u32 = 0x30;
    pub const ICR_HIGH: u32 = 0x31;
    pub const LVT_TIMER: u32 = 0x32;
    pub const LVT_ERROR: u32 = 0x37;
    pub const INITIAL_COUNT: u32 = 0x38;
    pub const CURRENT_COUNT: u32 = 0x39;
    pub const DIVIDE: u32 = 0x3e;
    pub const SELF_IPI: u32 = 0x3f;
}

/// First MSR of the x2APIC's registers (SDM vol 3, 12.12.1.2).
pub const X2APIC_MSR_FIRST: u32 = 0x800;
/// Last MSR reserved for the x2APIC.
pub const X2APIC_MSR_LAST: u32 = 0x8ff;
/// GPA of the registers after reset (SDM vol 3, 12.4.1).
pub const DEFAULT_PAGE: u64 = 0xfee0_0000;

/// IA32_APIC_BASE: this is the bootstrap processor (SDM vol 3, 12.4.4).
pub const APIC_BASE_BSP: u64 = 1 << 8;
/// IA32_APIC_BASE: x2APIC mode (SDM vol 3, 12.12.1).
pub const APIC_BASE_EXTD: u64 = 1 << 10;
/// IA32_APIC_BASE: APIC global enable.
pub const APIC_BASE_ENABLE: u64 = 1 << 11;

/// Version register: version 0x14, highest LVT entry 5, bit 24 (EOI-broadcast suppression) clear
/// (SDM vol 3, 12.4.8).
pub const VERSION: u32 = 0x0005_0014;

/// SVR bit 8: APIC software enable (SDM vol 3, 12.9).
const SVR_ENABLE: u32 = 1 << 8;
/// SVR bits kept: vector, enable, focus check (no effect). Bit 12 does not exist here.
const SVR_BITS: u32 = 0x3ff;
const SVR_RESET: u32 = 0xff;

/// LVT bit 16 (SDM vol 3, figure 12-8).
const LVT_MASKED: u32 = 1 << 16;
/// LVT LINT bit 15: level-triggered.
const LVT_LEVEL: u32 = 1 << 15;
/// LVT LINT bit 14, read-only: a level interrupt awaits its EOI.
const LVT_REMOTE_IRR: u32 = 1 << 14;
/// LVT and ICR bit 12, read-only: never busy here.
const DELIVERY_STATUS: u32 = 1 << 12;

/// ICR bits 31:0 that software may set (SDM vol 3, figures 12-12 and 12-28).
const ICR_LOW_BITS: u32 = 0x000c_cfff;
/// ICR bit 11: logical destination.
const ICR_LOGICAL: u32 = 1 << 11;
/// ICR bit 14: assert.
const ICR_ASSERT: u32 = 1 << 14;
/// ICR bit 15: level, meaningful for INIT de-assert only.
const ICR_LEVEL: u32 = 1 << 15;

/// Bits of the error status register (SDM vol 3, 12.5.3).
mod esr {
    pub const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
    pub const RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
    pub const ILLEGAL_REGISTER: u32 = 1 << 7;
}

/// Bits of [`LocalApic::events`].
mod event {
    pub const NMI: u8 = 1 << 0;
    pub const INIT: u8 = 1 << 1;
    pub const SIPI: u8 = 1 << 2;
    pub const EXT_INT: u8 = 1 << 3;
}

/// Why an access is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApicFault {
    /// The access raises #GP(0) in the guest.
    GeneralProtection,
    /// There are no registers at IA32_APIC_BASE in this mode: the access goes to memory.
    NotMapped,
}

/// What the caller has to do after a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum WriteEffect {
    /// Nothing more than to look at [`LocalApic::pending`].
    None,
    /// Deliver an interrupt to other VPs, or by way of [`Destination`] to this one too.
    Ipi(IpiRequest),
    /// [`LocalApic::timer_deadline`] may have changed.
    TimerChanged,
    /// End of interrupt; a `level` one is to be broadcast to I/O APICs (SDM vol 3, 12.8.5).
    Eoi {
        /// The vector that left the ISR.
        vector: u8,
        /// Its TMR bit.
        level: bool,
    },
    /// LDR or DFR changed: [`Posted::publish`] the new [`LocalApic::addressing`].
    AddressingChanged,
    /// Mode or page changed, and with it the addressing and perhaps the timer.
    BaseChanged,
}

/// Mode by IA32_APIC_BASE (SDM vol 3, table 12-5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Globally disabled.
    Disabled,
    /// Registers are a page of memory.
    XApic,
    /// Registers are MSRs.
    X2Apic,
}

/// Entries of the local vector table, in the order of their registers (SDM vol 3, 12.5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Lvt {
    /// APIC timer.
    Timer = 0,
    /// Thermal sensor.
    Thermal = 1,
    /// Performance monitoring counters.
    PerfMon = 2,
    /// Pin LINT0.
    Lint0 = 3,
    /// Pin LINT1.
    Lint1 = 4,
    /// APIC errors.
    Error = 5,
}

impl Lvt {
    const COUNT: usize = 6;

    fn from_index(index: u32) -> Option<Self> {
        Some(match index {
            0 => Self::Timer,
            1 => Self::Thermal,
            2 => Self::PerfMon,
            3 => Self::Lint0,
            4 => Self::Lint1,
            5 => Self::Error,
            _ => return None,
        })
    }

    /// Bits that software may set.
    const fn writable(self, tsc_deadline: bool) -> u32 {
        match self {
            Self::Timer if tsc_deadline => 0x0007_00ff,
            Self::Timer => 0x0003_00ff,
            Self::Thermal | Self::PerfMon => 0x0001_07ff,
            Self::Lint0 | Self::Lint1 => 0x0001_a7ff,
            Self::Error => 0x0001_00ff,
        }
    }

    /// Bits that exist but that software cannot set; writing them is no fault.
    const fn read_only(self) -> u32 {
        match self {
            Self::Lint0 | Self::Lint1 => DELIVERY_STATUS | LVT_REMOTE_IRR,
            _ => DELIVERY_STATUS,
        }
    }
}

/// What a partition's APICs can do.
#[derive(Clone, Copy, Debug)]
pub struct ApicConfig {
    /// CPUID.1:ECX.x2APIC.
    pub x2apic: bool,
    /// CPUID.1:ECX.TSC_Deadline.
    pub tsc_deadline: bool,
    /// MAXPHYADDR; the bits of IA32_APIC_BASE above are reserved.
    pub physical_address_bits: u8,
    /// Speed of the timer.
    pub clock: TimerClock,
}

/// What waits for delivery to the VP, from [`LocalApic::pending`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    /// INIT; the APIC has gone through its own reset already.
    pub init: bool,
    /// SIPI with its vector.
    pub sipi: Option<u8>,
    /// NMI.
    pub nmi: bool,
    /// Interrupt of the 8259, with its vector, LINT0 letting it through.
    pub ext_int: Option<u8>,
    /// Highest vector above PPR.
    pub vector: Option<u8>,
}

impl Pending {
    /// True if nothing waits.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        !self.init
            && self.sipi.is_none()
            && !self.nmi
            && self.ext_int.is_none()
            && self.vector.is_none()
    }
}

/// A VP's virtual local APIC.
///
/// # Invariants
///
/// - `irr_top` and `isr_top` are the highest members of IRR and ISR, 0 for none.
/// - `ppr` follows from `tpr` and `isr_top` (SDM vol 3, 12.8.3.1).
/// - While the APIC is software-disabled, every LVT entry is masked (SDM vol 3, 12.4.7.2).
/// - The timer's mode is that of the LVT timer register.
#[derive(Clone, Debug)]
pub struct LocalApic {
    irr: VectorSet,
    isr: VectorSet,
    tmr: VectorSet,
    /// TMR reads as zero; see [`Posted::hide_trigger_modes`].
    hides_trigger_modes: bool,
    irr_top: u8,
    isr_top: u8,
    tpr: u8,
    ppr: u8,
    events: u8,
    sipi_vector: u8,
    ext_int_vector: u8,
    mode: Mode,
    id: u32,
    svr: u32,
    ldr: u32,
    dfr: u32,
    /// Error status as the guest reads it.
    esr: u32,
    /// Errors since the guest's last write of the ESR.
    errors: u32,
    /// Destination in bits 63:32, in the format of the mode.
    icr: u64,
    lvt: [u32; Lvt::COUNT],
    timer: Timer,
    /// IA32_APIC_BASE without the two mode bits.
    base: u64,
    x2apic: bool,
    tsc_deadline: bool,
    address_mask: u64,
    /// Vectors of the SynIC whose interrupts end when they are delivered (TLFS 11.8.4).
    auto_eoi: VectorSet,
}

impl LocalApic {
    /// The APIC of a VP with the given x2APIC id, in its power-on state (SDM vol 3, 12.4.7.1).
    #[must_use]
    pub const fn new(config: ApicConfig, id: u32, bsp: bool) -> Self {
        let unused = match config.physical_address_bits {
            bits @ 32..=63 => 64_u32.wrapping_sub(bits as u32),
            _ => 12,
        };
        Self {
            irr: VectorSet::EMPTY,
            isr: VectorSet::EMPTY,
            tmr: VectorSet::EMPTY,
            hides_trigger_modes: false,
            irr_top: 0,
            isr_top: 0,
            tpr: 0,
            ppr: 0,
            events: 0,
            sipi_vector: 0,
            ext_int_vector: 0,
            mode: Mode::XApic,
            id,
            svr: SVR_RESET,
            ldr: 0,
            dfr: u32::MAX,
            esr: 0,
            errors: 0,
            icr: 0,
            lvt: [LVT_MASKED; Lvt::COUNT],
            timer: Timer::new(config.clock),
            base: DEFAULT_PAGE | if bsp { APIC_BASE_BSP } else { 0 },
            x2apic: config.x2apic,
            tsc_deadline: config.tsc_deadline,
            address_mask: (u64::MAX >> unused) & !0xfff,
            auto_eoi: VectorSet::EMPTY,
        }
    }

    /// Power-on reset: registers, events and IA32_APIC_BASE; the BSP flag stays. `keep_lint` keeps the
    /// delivery modes that the VMM put into LINT0 and LINT1. The addressing has to be published.
    pub fn reset(&mut self, keep_lint: bool) {
        let [_, _, _, lint0, lint1, _] = self.lvt;
        self.reset_registers();
        self.events = 0;
        self.base = DEFAULT_PAGE | (self.base & APIC_BASE_BSP);
        self.mode = Mode::XApic;
        if keep_lint {
            let keep = |old: u32| (old & !LVT_REMOTE_IRR) | LVT_MASKED;
            self.set_lvt(Lvt::Lint0, keep(lint0));
            self.set_lvt(Lvt::Lint1, keep(lint1));
        }
    }

    /// INIT: registers go to their reset values; id, mode and IA32_APIC_BASE stay (SDM vol 3, 12.4.7.3
    /// and 12.12.5.1).
    fn reset_registers(&mut self) {
        self.irr = VectorSet::EMPTY;
        self.isr = VectorSet::EMPTY;
        self.tmr = VectorSet::EMPTY;
        self.irr_top = 0;
        self.isr_top = 0;
        self.tpr = 0;
        self.ppr = 0;
        self.svr = SVR_RESET;
        self.ldr = 0;
        self.dfr = u32::MAX;
        self.esr = 0;
        self.errors = 0;
        self.icr = 0;
        self.lvt = [LVT_MASKED; Lvt::COUNT];
        self.timer.reset();
    }

    // ---- identity and mode -------------------------------------------------------------------------

    /// The VP's x2APIC id.
    #[inline]
    #[must_use]
    pub const fn id(&self) -> u32 {
        self.id
    }

    /// The current mode.
    #[inline]
    #[must_use]
    pub const fn mode(&self) -> Mode {
        self.mode
    }

    /// True if IA32_APIC_BASE marks the bootstrap processor.
    #[must_use]
    pub const fn is_bsp(&self) -> bool {
        self.base & APIC_BASE_BSP != 0
    }

    /// True if enabled in IA32_APIC_BASE and in the SVR: accepts fixed interrupts.
    #[inline]
    #[must_use]
    pub const fn is_enabled(&self) -> bool {
        self.svr & SVR_ENABLE != 0 && !matches!(self.mode, Mode::Disabled)
    }

    /// GPA of the register page; `None` if the mode has none.
    #[must_use]
    pub const fn page(&self) -> Option<u64> {
        match self.mode {
            Mode::XApic => Some(self.base & !0xfff),
            Mode::Disabled | Mode::X2Apic => None,
        }
    }

    /// IA32_APIC_BASE (SDM vol 3, figures 12-5 and 12-26).
    #[must_use]
    pub const fn apic_base(&self) -> u64 {
        self.base
            | match self.mode {
                Mode::Disabled => 0,
                Mode::XApic => APIC_BASE_ENABLE,
                Mode::X2Apic => APIC_BASE_ENABLE | APIC_BASE_EXTD,
            }
    }

    /// Checks reserved bits and decodes the mode.
    fn decode_base(&self, value: u64) -> Result<(Mode, u64), ApicFault> {
        let mut flags = APIC_BASE_BSP | APIC_BASE_ENABLE;
        if self.x2apic {
            flags |= APIC_BASE_EXTD;
        }
        if value & !(self.address_mask | flags) != 0 {
            return Err(ApicFault::GeneralProtection);
        }
        let mode = match (value & APIC_BASE_ENABLE != 0, value & APIC_BASE_EXTD != 0) {
            (false, false) => Mode::Disabled,
            (true, false) => Mode::XApic,
            (true, true) => Mode::X2Apic,
            (false, true) => return Err(ApicFault::GeneralProtection),
        };
        Ok((mode, value & (self.address_mask | APIC_BASE_BSP)))
    }

    /// The guest's WRMSR to IA32_APIC_BASE.
    ///
    /// # Errors
    ///
    /// #GP for reserved bits and for the transitions that SDM vol 3, 12.12.5 forbids: x2APIC to xAPIC,
    /// disabled to x2APIC, and anything to "x2APIC but not enabled".
    pub fn write_apic_base(&mut self, value: u64) -> Result<WriteEffect, ApicFault> {
        let (mode, base) = self.decode_base(value)?;
        let old = self.apic_base();
        match (self.mode, mode) {
            (Mode::X2Apic, Mode::XApic) | (Mode::Disabled, Mode::X2Apic) => {
                return Err(ApicFault::GeneralProtection);
            }
            // All state may be lost (SDM vol 3, 12.4.3).
            (Mode::XApic | Mode::X2Apic, Mode::Disabled) => self.reset_registers(),
            // The upper half of the ICR has another format there (SDM vol 3, 12.12.5.1).
            (Mode::XApic, Mode::X2Apic) => self.icr &= u64::from(u32::MAX),
            _ => {}
        }
        self.mode = mode;
        self.base = base;
        Ok(if self.apic_base() == old {
            WriteEffect::None
        } else {
            WriteEffect::BaseChanged
        })
    }

    /// IA32_APIC_BASE set from outside the guest: any legal mode at once, no register is lost.
    ///
    /// # Errors
    ///
    /// [`ApicFault::GeneralProtection`] for reserved bits and for "x2APIC but not enabled".
    pub fn restore_apic_base(&mut self, value: u64) -> Result<(), ApicFault> {
        let (mode, base) = self.decode_base(value)?;
        if mode != Mode::X2Apic {
            // Eight bits of destination are all that the ICR has there.
            self.icr &= (0xff << 56) | u64::from(u32::MAX);
        }
        self.mode = mode;
        self.base = base;
        Ok(())
    }

    /// How messages find this APIC.
    #[must_use]
    pub const fn addressing(&self) -> Addressing {
        match self.mode {
            Mode::Disabled => Addressing::off(self.id),
            Mode::XApic => Addressing::xapic(self.id, self.ldr, self.dfr),
            Mode::X2Apic => Addressing::x2apic(self.id),
        }
    }

    /// True if a message to `destination` is for this APIC (SDM vol 3, 12.6.2); `is_sender` if it sent
    /// it. Other CPUs ask [`Posted::matches`].
    #[must_use]
    pub const fn matches_destination(&self, destination: Destination, is_sender: bool) -> bool {
        self.addressing().matches(destination, is_sender)
    }

    // ---- priorities --------------------------------------------------------------------------------

    /// Task priority register.
    #[inline]
    #[must_use]
    pub const fn tpr(&self) -> u8 {
        self.tpr
    }

    /// Writes the task priority register.
    #[inline]
    pub fn set_tpr(&mut self, value: u8) {
        self.tpr = value;
        self.update_ppr();
    }

    /// CR8: the task priority class (SDM vol 3, 12.8.6).
    #[inline]
    #[must_use]
    pub const fn cr8(&self) -> u64 {
        (self.tpr >> 4) as u64
    }

    /// MOV to CR8.
    ///
    /// # Errors
    ///
    /// #GP if a bit above 3 is set.
    #[inline]
    pub fn set_cr8(&mut self, value: u64) -> Result<(), ApicFault> {
        if value > 15 {
            return Err(ApicFault::GeneralProtection);
        }
        self.set_tpr((value as u8) << 4);
        Ok(())
    }

    /// Processor priority register (SDM vol 3, 12.8.3.1).
    #[inline]
    #[must_use]
    pub const fn ppr(&self) -> u8 {
        self.ppr
    }

    /// Where the classes are equal the SDM allows TPR's sub-class or 0; this is the former.
    #[inline]
    fn update_ppr(&mut self) {
        let in_service = self.isr_top & 0xf0;
        self.ppr = if self.tpr & 0xf0 >= in_service {
            self.tpr
        } else {
            in_service
        };
    }

    /// Arbitration priority, by the rule of the P6 family (the register is reserved since): what
    /// lowest-priority delivery compares.
    #[must_use]
    pub const fn arbitration_priority(&self) -> u8 {
        let (tpr, isr, irr) = (self.tpr >> 4, self.isr_top >> 4, self.irr_top >> 4);
        if tpr >= irr && tpr > isr {
            self.tpr
        } else {
            let class = if (tpr & isr) > irr { tpr & isr } else { irr };
            class << 4
        }
    }

    /// Value for the VMCS TPR threshold field: the priority class below which TPR has to fall to let
    /// the highest pending vector in; 0 if it is not TPR that holds it back (SDM vol 3, 26.6.8).
    #[inline]
    #[must_use]
    pub const fn tpr_threshold(&self) -> u8 {
        let class = self.irr_top >> 4;
        if class > self.isr_top >> 4
            && class <= self.tpr >> 4
            && !matches!(self.mode, Mode::Disabled)
        {
            class
        } else {
            0
        }
    }

    // ---- interrupts in -----------------------------------------------------------------------------

    /// Takes in an interrupt message or pin event. False if it was dropped.
    ///
    /// With the APIC off in IA32_APIC_BASE, fixed interrupts and SIPIs are dropped; NMI, INIT and
    /// ExtINT stand for the processor's pins and pass.
    #[inline]
    pub fn accept(&mut self, interrupt: Interrupt) -> bool {
        match interrupt.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                self.is_enabled() && self.accept_fixed(interrupt.vector, interrupt.level)
            }
            mode => self.accept_signal(mode, interrupt.vector),
        }
    }

    /// All delivery modes that by-pass the IRR.
    fn accept_signal(&mut self, mode: DeliveryMode, vector: u8) -> bool {
        match mode {
            DeliveryMode::Nmi => self.events |= event::NMI,
            DeliveryMode::Init => {
                self.reset_registers();
                self.events = event::INIT;
            }
            DeliveryMode::Startup => {
                if self.mode == Mode::Disabled || self.events & event::SIPI != 0 {
                    return false;
                }
                self.events |= event::SIPI;
                self.sipi_vector = vector;
            }
            DeliveryMode::ExtInt => {
                self.events |= event::EXT_INT;
                self.ext_int_vector = vector;
            }
            DeliveryMode::LocalInt0 => return self.raise(Lvt::Lint0, vector),
            DeliveryMode::LocalInt1 => return self.raise(Lvt::Lint1, vector),
            DeliveryMode::Smi | DeliveryMode::Fixed | DeliveryMode::LowestPriority => return false,
        }
        true
    }

    /// Sets IRR and TMR (SDM vol 3, 12.8.4).
    #[inline]
    fn accept_fixed(&mut self, vector: u8, level: bool) -> bool {
        if vector < FIRST_VECTOR {
            self.raise_error(esr::RECEIVE_ILLEGAL_VECTOR);
            return false;
        }
        self.tmr.assign(vector, level);
        self.irr.insert(vector);
        self.irr_top = self.irr_top.max(vector);
        true
    }

    /// Takes in 64 vectors at once, from [`Posted`].
    fn accept_word(&mut self, index: usize, new: u64, level: u64) {
        if !self.is_enabled() {
            return;
        }
        if index == 0 && new & vectors::ILLEGAL != 0 {
            self.raise_error(esr::RECEIVE_ILLEGAL_VECTOR);
        }
        self.irr.merge(&mut self.tmr, index, new, level);
        self.irr_top = self.irr.highest();
    }

    /// An event at a source of the local vector table (SDM vol 3, 12.5.1). `ext_int_vector` is what the
    /// 8259 would answer to the acknowledge if the entry's delivery mode is ExtINT. False if it is
    /// masked or dropped.
    pub fn raise(&mut self, source: Lvt, ext_int_vector: u8) -> bool {
        if self.mode == Mode::Disabled {
            // The pins are INTR and NMI then (SDM vol 3, 12.4.3).
            return match source {
                Lvt::Lint0 => self.accept_signal(DeliveryMode::ExtInt, ext_int_vector),
                Lvt::Lint1 => self.accept_signal(DeliveryMode::Nmi, 0),
                _ => false,
            };
        }
        let entry = self.lvt(source);
        if entry & LVT_MASKED != 0 {
            return false;
        }
        let vector = entry as u8;
        let mode = match source {
            Lvt::Timer | Lvt::Error => Some(DeliveryMode::Fixed),
            _ => DeliveryMode::from_bits((entry >> 8) & 7),
        };
        let accepted = match mode {
            Some(DeliveryMode::Fixed) => {
                // LINT1 is edge-sensitive whatever bit 15 says.
                let level = source == Lvt::Lint0 && entry & LVT_LEVEL != 0;
                if level && entry & LVT_REMOTE_IRR != 0 {
                    return false;
                }
                let accepted = self.accept_fixed(vector, level);
                if accepted && level {
                    self.set_lvt(source, entry | LVT_REMOTE_IRR);
                }
                accepted
            }
            Some(mode @ (DeliveryMode::Nmi | DeliveryMode::Init)) => self.accept_signal(mode, 0),
            Some(DeliveryMode::ExtInt) => self.accept_signal(DeliveryMode::ExtInt, ext_int_vector),
            _ => false,
        };
        if source == Lvt::PerfMon {
            // The entry masks itself (SDM vol 3, 12.5.1).
            self.set_lvt(source, self.lvt(source) | LVT_MASKED);
        }
        accepted
    }

    /// Logs errors; the first since the last ESR write raises the error interrupt (SDM vol 3, 12.5.3).
    #[cold]
    fn raise_error(&mut self, bits: u32) {
        let first = self.errors == 0;
        self.errors |= bits;
        let entry = self.lvt(Lvt::Error);
        if first && entry & LVT_MASKED == 0 {
            let vector = entry as u8;
            if vector < FIRST_VECTOR {
                self.errors |= esr::RECEIVE_ILLEGAL_VECTOR;
            } else {
                self.accept_fixed(vector, false);
            }
        }
    }

    // ---- interrupts out ----------------------------------------------------------------------------

    /// Highest vector in IRR whose class is above PPR's (SDM vol 3, 12.8.3).
    #[inline]
    #[must_use]
    pub const fn highest_pending(&self) -> Option<u8> {
        if self.irr_top & 0xf0 > self.ppr & 0xf0 && !matches!(self.mode, Mode::Disabled) {
            Some(self.irr_top)
        } else {
            None
        }
    }

    /// Everything that can be delivered now, in constant time.
    #[inline]
    #[must_use]
    pub fn pending(&self) -> Pending {
        if self.events == 0 {
            return Pending {
                vector: self.highest_pending(),
                ..Pending::default()
            };
        }
        Pending {
            init: self.events & event::INIT != 0,
            sipi: (self.events & event::SIPI != 0).then_some(self.sipi_vector),
            nmi: self.events & event::NMI != 0,
            ext_int: self.ext_int(),
            vector: self.highest_pending(),
        }
    }

    /// Interrupts with these vectors end when they are delivered: the SynIC's.
    pub fn set_auto_eoi(&mut self, vectors: impl Iterator<Item = u8>) {
        self.auto_eoi = VectorSet::EMPTY;
        vectors.for_each(|vector| self.auto_eoi.insert(vector));
    }

    /// Moves `vector` from IRR to ISR when it is delivered to the VP. False if it was not in IRR.
    #[inline]
    pub fn acknowledge(&mut self, vector: u8) -> bool {
        if !self.irr.remove(vector) {
            return false;
        }
        self.irr_top = self.irr.highest();
        if !self.auto_eoi.contains(vector) {
            self.isr.insert(vector);
            self.isr_top = self.isr_top.max(vector);
            self.update_ppr();
        }
        true
    }

    /// End of interrupt: by the EOI register, or by HV_X64_MSR_EOI (SDM vol 3, 12.8.5).
    /// [`WriteEffect::None`] if nothing was in service.
    #[inline]
    pub fn eoi(&mut self) -> WriteEffect {
        let vector = self.isr_top;
        if vector == 0 {
            return WriteEffect::None;
        }
        self.isr.remove(vector);
        self.isr_top = self.isr.highest();
        self.update_ppr();
        let level = self.tmr.contains(vector);
        if level {
            let entry = self.lvt(Lvt::Lint0);
            if entry as u8 == vector {
                self.set_lvt(Lvt::Lint0, entry & !LVT_REMOTE_IRR);
            }
        }
        WriteEffect::Eoi { vector, level }
    }

    /// True if the guest may skip the EOI of the vector in service: "no EOI required" in the VP assist
    /// page (TLFS, APIC assist). It is the only one in service, edge-triggered, and no other waits.
    #[must_use]
    pub fn can_skip_eoi(&self) -> bool {
        self.irr_top == 0 && self.isr.is_single() && !self.tmr.contains(self.isr_top)
    }

    /// Takes the pending NMI.
    pub fn take_nmi(&mut self) -> bool {
        self.take_event(event::NMI)
    }

    /// Takes the pending INIT. The APIC was reset when it came in.
    pub fn take_init(&mut self) -> bool {
        self.take_event(event::INIT)
    }

    /// Takes the pending SIPI. A VP that does not wait for one has to drop it.
    pub fn take_sipi(&mut self) -> Option<u8> {
        self.take_event(event::SIPI).then_some(self.sipi_vector)
    }

    /// The pending ExtINT's vector, if LINT0 lets it through (or the APIC is disabled).
    #[must_use]
    pub fn ext_int(&self) -> Option<u8> {
        let open = self.mode == Mode::Disabled || self.lint0_is_ext_int();
        (open && self.events & event::EXT_INT != 0).then_some(self.ext_int_vector)
    }

    /// Takes the pending ExtINT if LINT0 lets it through.
    pub fn take_ext_int(&mut self) -> Option<u8> {
        let vector = self.ext_int()?;
        self.take_event(event::EXT_INT);
        Some(vector)
    }

    /// True if LINT0 is unmasked with delivery mode ExtINT: an 8259 is wired through.
    #[must_use]
    pub fn lint0_is_ext_int(&self) -> bool {
        self.lvt(Lvt::Lint0) & (LVT_MASKED | 0x700) == 0x700
    }

    fn take_event(&mut self, bit: u8) -> bool {
        let was_set = self.events & bit != 0;
        self.events &= !bit;
        was_set
    }

    // ---- timer -------------------------------------------------------------------------------------

    /// TSC value at which [`Self::timer_expired`] has something to do; `None` while the timer is
    /// stopped or masked.
    #[inline]
    #[must_use]
    pub const fn timer_deadline(&self) -> Option<u64> {
        let [timer, ..] = self.lvt;
        if timer & LVT_MASKED != 0 {
            None
        } else {
            self.timer.deadline()
        }
    }

    /// Deals with an expiry at or before `now`, if there is one: true if it raised an interrupt.
    #[inline]
    pub fn timer_expired(&mut self, now: u64) -> bool {
        self.timer.expire(now) && self.raise(Lvt::Timer, 0)
    }

    /// Current-count register at `now`.
    #[must_use]
    pub fn current_count(&self, now: u64) -> u32 {
        self.timer.current(now)
    }

    /// IA32_TSC_DEADLINE; 0 when not armed.
    #[must_use]
    pub fn tsc_deadline(&self, now: u64) -> u64 {
        self.timer.tsc_deadline(now)
    }

    /// WRMSR to IA32_TSC_DEADLINE; 0 disarms. Has no effect in other timer modes (SDM vol 3, 12.5.4.1).
    ///
    /// # Errors
    ///
    /// #GP if the partition has no TSC-deadline timer.
    #[inline]
    pub fn write_tsc_deadline(
        &mut self,
        deadline: u64,
        now: u64,
    ) -> Result<WriteEffect, ApicFault> {
        if !self.tsc_deadline {
            return Err(ApicFault::GeneralProtection);
        }
        self.timer_expired(now);
        self.timer.write_tsc_deadline(deadline);
        Ok(WriteEffect::TimerChanged)
    }

    /// The guest's TSC is set from `before` to `after`: a running count goes on as if it had not been.
    pub fn tsc_changed(&mut self, before: u64, after: u64) {
        self.timer_expired(before);
        self.timer.tsc_changed(before, after);
    }

    // ---- registers ---------------------------------------------------------------------------------

    #[inline]
    const fn lvt(&self, entry: Lvt) -> u32 {
        let [timer, thermal, perfmon, lint0, lint1, error] = self.lvt;
        match entry {
            Lvt::Timer => timer,
            Lvt::Thermal => thermal,
            Lvt::PerfMon => perfmon,
            Lvt::Lint0 => lint0,
            Lvt::Lint1 => lint1,
            Lvt::Error => error,
        }
    }

    #[inline]
    fn set_lvt(&mut self, entry: Lvt, value: u32) {
        if let Some(register) = self.lvt.get_mut(entry as usize) {
            *register = value;
        }
    }

    /// The registers that both modes have, ICR apart. `None` if reserved or write-only.
    fn register(&self, index: u32, now: u64) -> Option<u32> {
        Some(match index {
            reg::ID if self.mode == Mode::X2Apic => self.id,
            reg::ID => self.id << 24,
            reg::VERSION => VERSION,
            reg::TPR => u32::from(self.tpr),
            reg::PPR => u32::from(self.ppr),
            reg::LDR if self.mode == Mode::X2Apic => x2apic_ldr(self.id),
            reg::LDR => self.ldr,
            reg::SVR => self.svr,
            reg::ISR..=reg::ISR_LAST => self.isr.register((index & 7) as usize),
            reg::TMR..=reg::TMR_LAST if self.hides_trigger_modes => 0,
            reg::TMR..=reg::TMR_LAST => self.tmr.register((index & 7) as usize),
            reg::IRR..=reg::IRR_LAST => self.irr.register((index & 7) as usize),
            reg::ESR => self.esr,
            reg::LVT_TIMER..=reg::LVT_ERROR => {
                self.lvt(Lvt::from_index(index.wrapping_sub(reg::LVT_TIMER))?)
            }
            reg::INITIAL_COUNT => self.timer.initial(),
            reg::CURRENT_COUNT => self.timer.current(now),
            reg::DIVIDE => self.timer.divide(),
            _ => return None,
        })
    }

    /// Reads the register at `offset` of the xAPIC page: a 32-bit access, aligned to 16 (SDM vol 3,
    /// 12.4.1). A reserved register reads 0 and logs an error.
    ///
    /// # Errors
    ///
    /// [`ApicFault::NotMapped`] unless in xAPIC mode.
    pub fn read(&mut self, offset: u32, now: u64) -> Result<u32, ApicFault> {
        if self.mode != Mode::XApic {
            return Err(ApicFault::NotMapped);
        }
        if let Some(index) = register_index(offset) {
            if let Some(value) = self.register(index, now) {
                return Ok(value);
            }
            match index {
                reg::ICR_LOW => return Ok(self.icr as u32),
                reg::ICR_HIGH => return Ok((self.icr >> 32) as u32),
                reg::DFR => return Ok(self.dfr),
                reg::APR => return Ok(u32::from(self.arbitration_priority())),
                // EOI is write-only, and nothing is ever read remotely.
                reg::EOI | reg::REMOTE_READ => return Ok(0),
                _ => {}
            }
        }
        self.raise_error(esr::ILLEGAL_REGISTER);
        Ok(0)
    }

    /// Writes the register at `offset` of the xAPIC page. Reserved bits and read-only registers ignore
    /// the write; a reserved register logs an error.
    ///
    /// # Errors
    ///
    /// [`ApicFault::NotMapped`] unless in xAPIC mode.
    pub fn write(&mut self, offset: u32, value: u32, now: u64) -> Result<WriteEffect, ApicFault> {
        if self.mode != Mode::XApic {
            return Err(ApicFault::NotMapped);
        }
        let Some(index) = register_index(offset) else {
            self.raise_error(esr::ILLEGAL_REGISTER);
            return Ok(WriteEffect::None);
        };
        Ok(match index {
            reg::EOI => self.eoi(),
            reg::ICR_LOW => {
                self.icr = (self.icr & !u64::from(u32::MAX)) | u64::from(value & ICR_LOW_BITS);
                self.send()
            }
            reg::ICR_HIGH => {
                let low = self.icr & u64::from(u32::MAX);
                self.icr = low | (u64::from(value & 0xff00_0000) << 32);
                WriteEffect::None
            }
            reg::TPR => {
                self.set_tpr(value as u8);
                WriteEffect::None
            }
            reg::LDR => {
                self.ldr = value & 0xff00_0000;
                WriteEffect::AddressingChanged
            }
            reg::DFR => {
                self.dfr = value | 0x0fff_ffff;
                WriteEffect::AddressingChanged
            }
            reg::SVR => self.write_svr(value & SVR_BITS, now),
            reg::ESR => self.write_esr(),
            reg::LVT_TIMER..=reg::LVT_ERROR => self.write_lvt(index, value, now),
            reg::INITIAL_COUNT => self.write_initial_count(value, now),
            reg::DIVIDE => self.write_divide(value, now),
            reg::ID
            | reg::VERSION
            | reg::APR
            | reg::PPR
            | reg::REMOTE_READ
            | reg::ISR..=reg::IRR_LAST
            | reg::CURRENT_COUNT => WriteEffect::None,
            _ => {
                self.raise_error(esr::ILLEGAL_REGISTER);
                WriteEffect::None
            }
        })
    }

    /// RDMSR of an x2APIC register (SDM vol 3, 12.12.1.3).
    ///
    /// # Errors
    ///
    /// #GP for reserved and write-only registers and outside x2APIC mode.
    pub fn msr_read(&self, msr: u32, now: u64) -> Result<u64, ApicFault> {
        if self.mode != Mode::X2Apic {
            return Err(ApicFault::GeneralProtection);
        }
        match msr.checked_sub(X2APIC_MSR_FIRST) {
            Some(reg::ICR_LOW) => Ok(self.icr),
            Some(index) => match self.register(index, now) {
                Some(value) => Ok(u64::from(value)),
                None => Err(ApicFault::GeneralProtection),
            },
            None => Err(ApicFault::GeneralProtection),
        }
    }

    /// WRMSR of an x2APIC register (SDM vol 3, 12.12.1.3).
    ///
    /// # Errors
    ///
    /// #GP for reserved bits, reserved and read-only registers, and outside x2APIC mode.
    pub fn msr_write(&mut self, msr: u32, value: u64, now: u64) -> Result<WriteEffect, ApicFault> {
        if self.mode != Mode::X2Apic {
            return Err(ApicFault::GeneralProtection);
        }
        let Some(index) = msr.checked_sub(X2APIC_MSR_FIRST) else {
            return Err(ApicFault::GeneralProtection);
        };
        if index == reg::ICR_LOW {
            return self.write_icr(value);
        }
        let allowed = match index {
            reg::EOI | reg::ESR => 0,
            reg::TPR | reg::SELF_IPI => 0xff,
            reg::SVR => SVR_BITS,
            reg::INITIAL_COUNT => u32::MAX,
            reg::DIVIDE => timer::DIVIDE_BITS,
            reg::LVT_TIMER..=reg::LVT_ERROR => {
                match Lvt::from_index(index.wrapping_sub(reg::LVT_TIMER)) {
                    Some(lvt) => lvt.writable(self.tsc_deadline) | lvt.read_only(),
                    None => 0,
                }
            }
            _ => return Err(ApicFault::GeneralProtection),
        };
        if value & !u64::from(allowed) != 0 {
            return Err(ApicFault::GeneralProtection);
        }
        let value = value as u32;
        Ok(match index {
            reg::EOI => self.eoi(),
            reg::TPR => {
                self.set_tpr(value as u8);
                WriteEffect::None
            }
            reg::SELF_IPI => {
                self.send_to_self(DeliveryMode::Fixed, value as u8);
                WriteEffect::None
            }
            reg::SVR => self.write_svr(value, now),
            reg::ESR => self.write_esr(),
            reg::INITIAL_COUNT => self.write_initial_count(value, now),
            reg::DIVIDE => self.write_divide(value, now),
            _ => self.write_lvt(index, value, now),
        })
    }

    /// SVR (SDM vol 3, 12.9). Software disable masks all LVT entries, and so loses what the timer would
    /// raise from now on; what is in IRR and ISR stays (SDM vol 3, 12.4.7.2).
    fn write_svr(&mut self, value: u32, now: u64) -> WriteEffect {
        self.timer_expired(now);
        self.svr = value;
        if value & SVR_ENABLE == 0 {
            for entry in &mut self.lvt {
                *entry |= LVT_MASKED;
            }
            return WriteEffect::TimerChanged;
        }
        WriteEffect::None
    }

    /// The errors logged become visible, and the log starts anew (SDM vol 3, 12.5.3).
    fn write_esr(&mut self) -> WriteEffect {
        self.esr = self.errors;
        self.errors = 0;
        WriteEffect::None
    }

    fn write_lvt(&mut self, index: u32, value: u32, now: u64) -> WriteEffect {
        let Some(entry) = Lvt::from_index(index.wrapping_sub(reg::LVT_TIMER)) else {
            return WriteEffect::None;
        };
        if entry == Lvt::Timer {
            // An expiry that nobody has seen yet counts by the old setting.
            self.timer_expired(now);
        }
        let mut new = value & entry.writable(self.tsc_deadline);
        if self.svr & SVR_ENABLE == 0 {
            new |= LVT_MASKED;
        }
        if entry == Lvt::Lint0 && new & LVT_LEVEL != 0 {
            new |= self.lvt(entry) & LVT_REMOTE_IRR;
        }
        self.set_lvt(entry, new);
        if entry == Lvt::Timer {
            self.timer.set_mode(TimerMode::from_lvt(new));
            return WriteEffect::TimerChanged;
        }
        WriteEffect::None
    }

    fn write_initial_count(&mut self, value: u32, now: u64) -> WriteEffect {
        self.timer_expired(now);
        self.timer.write_initial(value, now);
        WriteEffect::TimerChanged
    }

    fn write_divide(&mut self, value: u32, now: u64) -> WriteEffect {
        self.timer_expired(now);
        self.timer.write_divide(value, now);
        WriteEffect::TimerChanged
    }

    // ---- interprocessor interrupts -----------------------------------------------------------------

    /// Interrupt command register, all 64 bits, in the format of the mode.
    #[must_use]
    pub const fn icr(&self) -> u64 {
        self.icr
    }

    /// Writes all 64 bits of the ICR: MSR 0x830, or HV_X64_MSR_ICR in either mode (SDM vol 3, 12.12.9).
    ///
    /// # Errors
    ///
    /// #GP for reserved bits in x2APIC mode, or with the APIC disabled. Bit 12 does not count: the
    /// x2APIC has no delivery status, but software written for xAPIC may write back a one.
    #[inline]
    pub fn write_icr(&mut self, value: u64) -> Result<WriteEffect, ApicFault> {
        let low = value as u32;
        let high = value & !u64::from(u32::MAX);
        self.icr = match self.mode {
            Mode::X2Apic if low & !(ICR_LOW_BITS | DELIVERY_STATUS) == 0 => {
                high | u64::from(low & ICR_LOW_BITS)
            }
            Mode::XApic => (high & (0xff << 56)) | u64::from(low & ICR_LOW_BITS),
            Mode::X2Apic | Mode::Disabled => return Err(ApicFault::GeneralProtection),
        };
        Ok(self.send())
    }

    /// Sends what the ICR holds (SDM vol 3, 12.6.1). Combinations that table 12-3 calls invalid: INIT
    /// and SIPI to oneself are dropped, the others are sent as if valid. All IPIs are edge-triggered.
    #[inline]
    fn send(&mut self) -> WriteEffect {
        let low = self.icr as u32;
        let vector = low as u8;
        let Some(mode) = DeliveryMode::from_icr(low) else {
            return WriteEffect::None;
        };
        let shorthand = (low >> 18) & 3;
        if shorthand == 1 {
            self.send_to_self(mode, vector);
            return WriteEffect::None;
        }
        if mode.goes_through_irr() {
            if vector < FIRST_VECTOR {
                self.raise_error(esr::SEND_ILLEGAL_VECTOR);
                return WriteEffect::None;
            }
        } else if mode == DeliveryMode::Init && low & (ICR_ASSERT | ICR_LEVEL) == ICR_LEVEL {
            // INIT level de-assert only synchronised arbitration ids, long ago (SDM vol 3, 12.6.1).
            return WriteEffect::None;
        }
        let destination = match shorthand {
            2 if matches!(mode, DeliveryMode::Init | DeliveryMode::Startup) => {
                return WriteEffect::None;
            }
            2 => Destination::AllIncludingSelf,
            3 => Destination::AllExcludingSelf,
            _ => {
                let logical = low & ICR_LOGICAL != 0;
                if self.mode == Mode::X2Apic {
                    Destination::from_x2apic((self.icr >> 32) as u32, logical)
                } else {
                    Destination::from_xapic((self.icr >> 56) as u8, logical)
                }
            }
        };
        WriteEffect::Ipi(IpiRequest {
            destination,
            interrupt: Interrupt {
                mode,
                vector,
                level: false,
            },
        })
    }

    /// Shorthand "self", and the SELF IPI register (SDM vol 3, 12.12.11).
    fn send_to_self(&mut self, mode: DeliveryMode, vector: u8) {
        if mode.goes_through_irr() {
            if vector < FIRST_VECTOR {
                // Both ends of the message are here.
                self.raise_error(esr::SEND_ILLEGAL_VECTOR | esr::RECEIVE_ILLEGAL_VECTOR);
            } else {
                self.accept(Interrupt::edge(vector));
            }
        } else if mode == DeliveryMode::Nmi {
            self.events |= event::NMI;
        }
    }
}

/// Register number of an offset into the page; `None` if nothing can be there.
#[inline]
const fn register_index(offset: u32) -> Option<u32> {
    if offset & 0xf == 0 && offset < 0x400 {
        Some(offset >> 4)
    } else {
        None
    }
}
