// SPDX-License-Identifier: GPL-2.0
//! Hypercall numbers and the control word (TLFS chapter 3).
//!
//! The register convention on x86-64 is the TLFS one: RCX holds the control word, RDX the input GPA or
//! first fast input, R8 the output GPA or second fast input; RAX returns the result value.

/// Hypercall input value, RCX (TLFS 3.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Control(pub u64);

impl Control {
    /// Builds the control word of a simple (not rep) call with no variable header.
    pub const fn simple(code: u16, fast: bool) -> Self {
        Self(code as u64 | ((fast as u64) << 16))
    }

    /// Call code, bits 15:0.
    pub const fn code(self) -> u16 {
        self.0 as u16
    }

    /// Whether the parameters are in registers, bit 16.
    pub const fn is_fast(self) -> bool {
        (self.0 >> 16) & 1 != 0
    }

    /// Words of variable header, bits 26:17.
    pub const fn variable_words(self) -> u16 {
        (self.0 >> 17) as u16 & 0x3ff
    }

    /// Whether bits are set that have to be zero: 30:27, 47:44, 63:60; bit 31, a call to a nested hypervisor.
    pub const fn has_reserved(self) -> bool {
        self.0 & 0xf000_f000_f800_0000 != 0
    }

    /// Rep count, bits 43:32.
    pub const fn rep_count(self) -> u16 {
        ((self.0 >> 32) & 0xfff) as u16
    }

    /// Index of the first rep to do, bits 59:48.
    pub const fn rep_start(self) -> u16 {
        ((self.0 >> 48) & 0xfff) as u16
    }
}

/// Result value, RAX (TLFS 3.8): status in bits 15:0, reps completed in bits 43:32.
pub const fn result(status: super::status::HvStatus, reps_done: u16) -> u64 {
    status.0 as u64 | ((reps_done as u64 & 0xfff) << 32)
}

/// Partition identifier of the root.
pub const ROOT_PARTITION: u64 = 1;
/// "The caller's own partition" (TLFS 2.2.1).
pub const PARTITION_SELF: u64 = u64::MAX;
/// "Any VP" in calls that accept it.
pub const ANY_VP: u32 = u32::MAX;

/// Call codes of TLFS that the root may use. Input and output structures are those of
/// `include/hyperv/hvhdk.h` and its companions; RDX and R8 hold the GPAs of input and output, each inside
/// one page and aligned to 8 bytes.
#[allow(missing_docs)] // The names are TLFS'.
pub mod code {
    pub const CREATE_PARTITION: u16 = 0x40;
    pub const INITIALIZE_PARTITION: u16 = 0x41;
    pub const FINALIZE_PARTITION: u16 = 0x42;
    pub const DELETE_PARTITION: u16 = 0x43;
    pub const GET_PARTITION_PROPERTY: u16 = 0x44;
    pub const SET_PARTITION_PROPERTY: u16 = 0x45;
    pub const DEPOSIT_MEMORY: u16 = 0x48;
    pub const WITHDRAW_MEMORY: u16 = 0x49;
    pub const MAP_GPA_PAGES: u16 = 0x4b;
    pub const UNMAP_GPA_PAGES: u16 = 0x4c;
    pub const INSTALL_INTERCEPT: u16 = 0x4d;
    pub const CREATE_VP: u16 = 0x4e;
    pub const DELETE_VP: u16 = 0x4f;
    pub const GET_VP_REGISTERS: u16 = 0x50;
    pub const SET_VP_REGISTERS: u16 = 0x51;
    pub const TRANSLATE_VIRTUAL_ADDRESS: u16 = 0x52;
    pub const CLEAR_VIRTUAL_INTERRUPT: u16 = 0x56;
    pub const REGISTER_INTERCEPT_RESULT: u16 = 0x91;
    pub const ASSERT_VIRTUAL_INTERRUPT: u16 = 0x94;
    pub const SIGNAL_EVENT_DIRECT: u16 = 0xc0;
    pub const POST_MESSAGE_DIRECT: u16 = 0xc1;
    pub const DISPATCH_VP: u16 = 0xc2;
    pub const MAP_VP_STATE_PAGE: u16 = 0xe1;
    pub const UNMAP_VP_STATE_PAGE: u16 = 0xe2;
    pub const GET_VP_STATE: u16 = 0xe3;
    pub const SET_VP_STATE: u16 = 0xe4;
    pub const GET_VP_CPUID_VALUES: u16 = 0xf4;
    pub const GET_PARTITION_PROPERTY_EX: u16 = 0x101;
}

/// `HV_VP_STATE_PAGE_*`, and one of our own.
pub mod state_page {
    /// The register page.
    pub const REGISTERS: u16 = 0;
    /// The intercept message page.
    pub const INTERCEPT_MESSAGE: u16 = 1;
    /// [`VpRunPage`](super::VpRunPage). Not in TLFS.
    pub const RUN: u16 = 0x80;
}

/// Why [`code::DISPATCH_VP`] came back, in RDX. The call takes the partition in RDX (the fast form, to spare the image the
/// input page) and in R8 the VP in bits 31:0; bits 39:32 are the length of the instruction that the last message was
/// about, if the root has completed it: the VP goes on behind it. 0 if not; bits 55:40 are a [`PortSet`]; bit 56 is [`MAY_PAUSE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum DispatchEvent {
    /// A physical interrupt or NMI waits for the root: take it and dispatch again.
    Interrupt = 0,
    /// The intercept message page holds a message: the root finishes it, or has the register page filled by
    /// [`private::SHOW_REGISTERS`] for the VMM.
    Intercept = 1,
    /// The VP halted: sleep until a signal or the deadline of the run page.
    Halted = 2,
    /// The VP waits for a start-up IPI: sleep until a signal.
    WaitForSipi = 3,
    /// Other VPs were signalled: look at their run pages, then dispatch again.
    Signal = 4,
    /// The deadline in the run page changed: program the timer, then dispatch again.
    Deadline = 5,
    /// The VP wrote to a port of the [`PortSet`]: see [`PortWrite`]. The root either completes it and dispatches again, or has
    /// the message made by [`private::SHOW_REGISTERS`].
    PortWrite = 6,
    /// A machine check ended the run: the root's handler has to see it before anything else runs on this CPU.
    MachineCheck = 7,
    /// The intercept message page holds a message for the VMM, and the register page is filled.
    Message = 8,
    /// The VP signalled an event: see [`EventSignal`]. Its hypercall has succeeded unless the root says otherwise by
    /// [`private::FAIL_CALL`], here and in what follows.
    SignalEvent = 9,
    /// The VP posted a message, which is in the intercept message page as the guest laid it out (`HV_INPUT_POST_MESSAGE`): connection,
    /// type, size, payload.
    PostMessage = 10,
    /// The image has to reach a page of guest memory that is not mapped so: the run page says which.
    Missing = 11,
}

impl DispatchEvent {
    /// From RDX.
    pub const fn from_value(value: u64) -> Option<Self> {
        Some(match value & 0xf {
            0 => Self::Interrupt,
            1 => Self::Intercept,
            2 => Self::Halted,
            3 => Self::WaitForSipi,
            4 => Self::Signal,
            5 => Self::Deadline,
            6 => Self::PortWrite,
            7 => Self::MachineCheck,
            8 => Self::Message,
            9 => Self::SignalEvent,
            10 => Self::PostMessage,
            11 => Self::Missing,
            _ => return None,
        })
    }
}

/// What RDX says besides [`DispatchEvent::PortWrite`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortWrite {
    /// The port.
    pub port: u16,
    /// Bytes written: 1, 2 or 4.
    pub size: u8,
    /// Bytes of the instruction.
    pub length: u8,
    /// EAX; only its low `size` bytes were written.
    pub value: u32,
}

impl PortWrite {
    /// Bits of the instruction's length.
    pub const LENGTH_MASK: u64 = 0xf << 8;
    /// Bits of the size.
    pub const SIZE_MASK: u64 = 7 << 4;

    /// RDX.
    pub const fn to_value(self) -> u64 {
        DispatchEvent::PortWrite as u64
            | (self.size as u64 & 7) << 4
            | (self.length as u64 & 0xf) << 8
            | (self.port as u64) << 16
            | (self.value as u64) << 32
    }

    /// From RDX, if that is the event.
    pub const fn from_value(value: u64) -> Option<Self> {
        if value & 0xf != DispatchEvent::PortWrite as u64 {
            return None;
        }
        Some(Self {
            port: (value >> 16) as u16,
            size: (value >> 4 & 7) as u8,
            length: (value >> 8 & 0xf) as u8,
            value: (value >> 32) as u32,
        })
    }
}

/// What RDX says besides [`DispatchEvent::SignalEvent`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventSignal {
    /// TLFS connection identifier, 24 bits.
    pub connection: u32,
    /// Number of the event flag.
    pub flag: u16,
}

impl EventSignal {
    /// RDX.
    pub const fn to_value(self) -> u64 {
        DispatchEvent::SignalEvent as u64
            | (self.connection as u64 & 0xff_ffff) << 8
            | (self.flag as u64) << 32
    }

    /// From RDX, if that is the event.
    pub const fn from_value(value: u64) -> Option<Self> {
        if value & 0xff != DispatchEvent::SignalEvent as u64 {
            return None;
        }
        Some(Self {
            connection: (value >> 8) as u32 & 0xff_ffff,
            flag: (value >> 32) as u16,
        })
    }
}

/// Ports whose writes the root may be able to complete itself, some others among them: one in 16 has the same bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortSet(u16);

impl PortSet {
    /// How many there are.
    pub const BITS: usize = 16;

    /// The bit of a port: the upper bits of its product with 2^32 over the golden ratio.
    pub const fn bit(port: u16) -> usize {
        ((port as u32).wrapping_mul(0x9e37_79b1) >> 28) as usize
    }

    /// The set and a port.
    #[must_use]
    pub const fn with(self, port: u16) -> Self {
        Self(self.0 | 1 << Self::bit(port))
    }

    /// Whether a port is in it.
    pub const fn has(self, port: u16) -> bool {
        self.0 >> Self::bit(port) & 1 != 0
    }

    /// Whether no port is in it.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// In R8 of [`code::DISPATCH_VP`].
    pub const fn to_value(self) -> u64 {
        (self.0 as u64) << 40
    }

    /// From R8.
    pub const fn from_value(value: u64) -> Self {
        Self((value >> 40) as u16)
    }
}

/// In R8 of [`code::DISPATCH_VP`]: after [`DispatchEvent::PortWrite`] the VP may be *paused*. Its extended state, DR0 to DR3,
/// TSC_AUX and (VT-x) the MSRs of system calls are still in the processor then, and nobody else can have the VP. Until
/// [`private::RESUME_VP`] or any other hypercall the root must not use them: it keeps interrupts and its own use of the FPU off.
pub const MAY_PAUSE: u64 = 1 << 56;

/// A page per VP that the root gives with [`code::MAP_VP_STATE_PAGE`] and only its kernel sees.
#[repr(C, align(4096))]
pub struct VpRunPage {
    /// Set by the image when it left something for this VP (an interrupt, INIT, SIPI): wake its thread, or
    /// interrupt the CPU that runs it. The root swaps it to 0 before it acts.
    pub signal: core::sync::atomic::AtomicU32,
    reserved: u32,
    /// Host TSC at which the VP's next timer expires, `u64::MAX` for none. Valid after each dispatch: the
    /// root arranges for an interrupt, or for a wake-up, at that time.
    pub deadline: core::sync::atomic::AtomicU64,
    /// Exits of this VP that the image finished, since its creation.
    pub exits: core::sync::atomic::AtomicU64,
    /// Page of guest memory that the image has to reach for what it was to do: bits 63:12 of its GPA, bit 1 set, bit 0 if it
    /// writes. Set with [`DispatchEvent::Missing`], and by calls about a VP that did without the page or did nothing yet. The
    /// root swaps it to 0, maps the page and repeats.
    pub missing: core::sync::atomic::AtomicU64,
    /// The same value, set by the root if it cannot: the next attempt goes on without the page.
    pub refused: core::sync::atomic::AtomicU64,
    rest: [u64; 507],
}

const _: () = assert!(core::mem::size_of::<VpRunPage>() == 4096);

/// Calls between the module and the image that TLFS does not have. They are answered only to CPL 0 of
/// the root partition and use codes that TLFS leaves free.
pub mod private {
    /// Proves that this CPU runs beneath the image. Fast; returns the CPU index in RDX.
    pub const PROVE: u16 = 0xf000;
    /// Returns this CPU to native operation. Fast; the next instruction runs natively.
    pub const LEAVE: u16 = 0xf001;
    /// Invalidates this CPU's second-level translations of the root. Fast.
    pub const FLUSH: u16 = 0xf002;
    /// Makes the image fault in the way RDX selects (see [`super::fault`]). Test builds of the module
    /// call it; it is answered only when the boot information allows it.
    pub const FAULT: u16 = 0xf003;
    /// Takes a VP (partition in RDX, index in R8) off this CPU, where it was dispatched last: whatever the
    /// CPU still holds of it goes to memory (VT-x: VMCLEAR). Fast; a VP that is not here is no error. The
    /// root calls it before it dispatches the VP on another CPU, before the CPU goes offline, and before
    /// the partition is finalized.
    pub const DETACH_VP: u16 = 0xf004;
    /// Fills the register page of a VP (partition in RDX, index in R8), which nobody runs, and its message page if it left with
    /// [`DispatchEvent::PortWrite`](super::DispatchEvent). Fast. The image does not do it at each message, because the root
    /// finishes many of them itself.
    pub const SHOW_REGISTERS: u16 = 0xf005;
    /// Gives the hypercall with which a VP (partition in RDX, index in R8 bits 31:0) left the status in R8 bits 47:32. Fast.
    pub const FAIL_CALL: u16 = 0xf007;
    /// As [`DISPATCH_VP`](super::code::DISPATCH_VP), for the VP that the last one on this CPU may have paused, whose write the root
    /// has completed: quicker if it still is. Fast.
    pub const RESUME_VP: u16 = 0xf006;
}

/// What [`private::FAULT`] provokes.
pub mod fault {
    /// A general-protection fault.
    pub const GENERAL_PROTECTION: u64 = 0;
    /// A page fault by a read of an address that the image does not map.
    pub const PAGE_FAULT: u64 = 1;
    /// A Rust panic.
    pub const PANIC: u64 = 2;
    /// A machine check that no hardware reported. It belongs to the root; VT-x only.
    pub const MACHINE_CHECK: u64 = 3;
    /// CPUID leaf that provokes the fault of its subleaf where the call is allowed, so that a user program or a child can.
    pub const LEAF: u32 = 0x4000_00ff;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_set_has_what_was_put_in_and_little_else() {
        let (none, value) = (
            PortSet::default(),
            PortSet::default().with(0x510).to_value(),
        );
        assert_eq!((none.to_value(), value & 0xff_ffff_ffff), (0, 0));
        assert_eq!(value >> 56, 0);
        let set = PortSet::from_value(value | 0xff << 56 | 0xff_ffff_ffff);
        let others = (0..=u16::MAX).filter(|port| set.has(*port)).count();
        assert!((0xfe0..0x1020).contains(&others), "{others}");
        assert!(set.has(0x510) && !set.has(0x520) && !set.has(0x511) && !none.has(0x510));
        let both = set.with(0x64);
        assert!(both.has(0x510) && both.has(0x64));
    }

    #[test]
    fn port_write_survives_its_register() {
        let write = PortWrite {
            port: 0xfffe,
            size: 4,
            length: 15,
            value: 0x8765_4321,
        };
        let value = write.to_value();
        assert_eq!(PortWrite::from_value(value), Some(write));
        let event = DispatchEvent::from_value(value);
        assert_eq!(event, Some(DispatchEvent::PortWrite));
        let message = DispatchEvent::Message as u64;
        let event = DispatchEvent::from_value(message);
        assert_eq!(event, Some(DispatchEvent::Message));
        assert_eq!(PortWrite::from_value(message), None);
    }
}
