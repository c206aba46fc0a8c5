// SPDX-License-Identifier: GPL-2.0
//! Interrupt messages and who receives them (SDM vol 3, 12.6 and 12.12.10).

/// How an interrupt is delivered: the encoding of ICR and LVT bits 10:8 (SDM vol 3, 12.6.1), continued
/// as in `HV_INTERRUPT_TYPE` of the TLFS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum DeliveryMode {
    /// The vector, at every destination.
    Fixed = 0,
    /// The vector, at the one destination that works at the lowest priority. The caller picks it.
    LowestPriority = 1,
    /// System management interrupt. Accepted and dropped: there is no SMM here.
    Smi = 2,
    /// Non-maskable interrupt.
    Nmi = 4,
    /// INIT reset.
    Init = 5,
    /// Start-up; the vector is the page number of the entry point.
    Startup = 6,
    /// As if from an external 8259: the vector by-passes IRR, ISR and priorities.
    ExtInt = 7,
    /// A pulse on pin LINT0; the LVT decides what becomes of it.
    LocalInt0 = 8,
    /// A pulse on pin LINT1.
    LocalInt1 = 9,
}

impl DeliveryMode {
    /// Decodes `HV_INTERRUPT_TYPE`, or bits 10:8 of an MSI. `None` for remote read and unknown types.
    #[inline]
    #[must_use]
    pub const fn from_bits(bits: u32) -> Option<Self> {
        Some(match bits {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::Startup,
            7 => Self::ExtInt,
            8 => Self::LocalInt0,
            9 => Self::LocalInt1,
            _ => return None,
        })
    }

    /// Decodes ICR bits 10:8; ExtINT cannot be sent by it (SDM vol 3, 12.6.1).
    #[inline]
    #[must_use]
    pub const fn from_icr(icr_low: u32) -> Option<Self> {
        match Self::from_bits((icr_low >> 8) & 7) {
            Some(Self::ExtInt) => None,
            other => other,
        }
    }

    /// True if the vector goes through IRR and must therefore be 16 or above.
    #[inline]
    #[must_use]
    pub const fn goes_through_irr(self) -> bool {
        matches!(self, Self::Fixed | Self::LowestPriority)
    }
}

/// One interrupt message, without its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupt {
    /// How to deliver it.
    pub mode: DeliveryMode,
    /// Vector; page number for [`DeliveryMode::Startup`]; ignored for NMI, INIT and SMI.
    pub vector: u8,
    /// Level-triggered: sets TMR, so that the EOI is reported. IPIs are always edge.
    pub level: bool,
}

impl Interrupt {
    /// An edge-triggered fixed interrupt.
    #[must_use]
    pub const fn edge(vector: u8) -> Self {
        Self {
            mode: DeliveryMode::Fixed,
            vector,
            level: false,
        }
    }

    /// A level-triggered fixed interrupt.
    #[must_use]
    pub const fn level(vector: u8) -> Self {
        Self {
            mode: DeliveryMode::Fixed,
            vector,
            level: true,
        }
    }
}

/// Where a message goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// The APIC with this id, or every APIC for [`BROADCAST`].
    Physical(u32),
    /// Message destination address, compared with LDR in the receiver's own format; every APIC for
    /// [`BROADCAST`].
    Logical(u32),
    /// Every APIC.
    AllIncludingSelf,
    /// Every APIC but the sender's.
    AllExcludingSelf,
}

/// Destination that means "everybody" (SDM vol 3, 12.12.9). The eight-bit form, 0xff, is turned into
/// this one at the sender, so that the x2APIC id 255 stays addressable.
pub const BROADCAST: u32 = u32::MAX;

impl Destination {
    /// Destination of an eight-bit sender: the xAPIC's ICR, an MSI or an I/O APIC.
    #[inline]
    #[must_use]
    pub const fn from_xapic(id: u8, logical: bool) -> Self {
        Self::from_x2apic(if id == 0xff { BROADCAST } else { id as u32 }, logical)
    }

    /// Destination of a 32-bit sender: the x2APIC's ICR.
    #[inline]
    #[must_use]
    pub const fn from_x2apic(id: u32, logical: bool) -> Self {
        if logical {
            Self::Logical(id)
        } else {
            Self::Physical(id)
        }
    }

    /// The only possible receiver, if there is at most one: lets the caller go straight to it.
    #[inline]
    #[must_use]
    pub const fn single(self) -> Option<u32> {
        match self {
            Self::Physical(id) if id != BROADCAST => Some(id),
            _ => None,
        }
    }
}

/// What a write to the ICR asks for. The caller delivers `interrupt` to each VP whose
/// [`Addressing::matches`] says so, the sender included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpiRequest {
    /// Who gets it.
    pub destination: Destination,
    /// What they get.
    pub interrupt: Interrupt,
}

/// How an APIC compares logical destinations (SDM vol 3, 12.6.2.2 and 12.12.10.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Model {
    /// APIC off in IA32_APIC_BASE: receives no messages.
    Off,
    /// xAPIC, one bit for each of eight APICs.
    Flat,
    /// xAPIC, 15 clusters of four.
    Cluster,
    /// xAPIC, DFR holds a model that is not defined.
    Undefined,
    /// x2APIC, clusters of 16.
    X2Apic,
}

/// All that decides whether a message is for this APIC; a snapshot that other CPUs may read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addressing {
    id: u32,
    ldr: u8,
    model: Model,
}

/// LDR in x2APIC mode, derived from the id (SDM vol 3, 12.12.10.2).
#[inline]
#[must_use]
pub const fn x2apic_ldr(id: u32) -> u32 {
    ((id >> 4) << 16) | (1 << (id & 15))
}

impl Addressing {
    /// An APIC that is off in IA32_APIC_BASE: no message reaches it.
    #[must_use]
    pub const fn off(id: u32) -> Self {
        Self {
            id,
            ldr: 0,
            model: Model::Off,
        }
    }

    /// An APIC in xAPIC mode.
    #[must_use]
    pub const fn xapic(id: u32, ldr: u32, dfr: u32) -> Self {
        let model = match dfr >> 28 {
            0xf => Model::Flat,
            0 => Model::Cluster,
            _ => Model::Undefined,
        };
        Self {
            id,
            ldr: (ldr >> 24) as u8,
            model,
        }
    }

    /// An APIC in x2APIC mode.
    #[must_use]
    pub const fn x2apic(id: u32) -> Self {
        Self {
            id,
            ldr: 0,
            model: Model::X2Apic,
        }
    }

    /// True if a message to `destination` is for this APIC; `is_sender` if it sent it.
    ///
    /// A VP in xAPIC mode answers to its full 32-bit id, not to the low byte of it: ids above 254 are
    /// reachable (by a sender in x2APIC mode) before their VP has switched to x2APIC mode, and do not
    /// answer to the id of another VP.
    #[inline]
    #[must_use]
    pub const fn matches(self, destination: Destination, is_sender: bool) -> bool {
        if matches!(self.model, Model::Off) {
            return false;
        }
        match destination {
            Destination::AllIncludingSelf
            | Destination::Physical(BROADCAST)
            | Destination::Logical(BROADCAST) => true,
            Destination::AllExcludingSelf => !is_sender,
            Destination::Physical(id) => id == self.id,
            Destination::Logical(mda) => self.matches_logical(mda),
        }
    }

    /// Logical destination match; broadcast is dealt with before.
    const fn matches_logical(self, mda: u32) -> bool {
        match self.model {
            Model::X2Apic => {
                let ldr = x2apic_ldr(self.id);
                mda >> 16 == ldr >> 16 && mda & ldr & 0xffff != 0
            }
            Model::Flat => mda <= 0xff && mda & (self.ldr as u32) != 0,
            Model::Cluster => {
                let ldr = self.ldr as u32;
                mda <= 0xff && mda >> 4 == ldr >> 4 && mda & ldr & 0xf != 0
            }
            Model::Off | Model::Undefined => false,
        }
    }

    /// Packs into one word: id in bits 31:0, LDR in 39:32, model in 42:40.
    #[must_use]
    pub(super) const fn to_bits(self) -> u64 {
        let model = match self.model {
            Model::Off => 0_u64,
            Model::Flat => 1,
            Model::Cluster => 2,
            Model::Undefined => 3,
            Model::X2Apic => 4,
        };
        (self.id as u64) | ((self.ldr as u64) << 32) | (model << 40)
    }

    /// Reverse of [`Self::to_bits`].
    #[must_use]
    pub(super) const fn from_bits(bits: u64) -> Self {
        let model = match bits >> 40 {
            1 => Model::Flat,
            2 => Model::Cluster,
            3 => Model::Undefined,
            4 => Model::X2Apic,
            _ => Model::Off,
        };
        Self {
            id: bits as u32,
            ldr: (bits >> 32) as u8,
            model,
        }
    }
}
