// SPDX-License-Identifier: GPL-2.0
//! The architectural state of a child's virtual processor, independent of the vendor.
//!
//! While a VP runs, part of this is in the VMCS or VMCB; the back ends move it there and back. All of it
//! is plain data, so that hypercalls, CPUID and MSR emulation are pure functions of it.

use hv_abi::boot::{Vendor, VpContext};
use hv_x86::state::{Segment, Table};

use crate::apic::WriteEffect;
use crate::child_cpuid::Features;
use crate::child_msr::reference_scale;
use crate::synic::{self, Sources};

/// Index into [`VpState::segments`], in the order of `HV_X64_REGISTER_ES` and following.
#[allow(missing_docs)] // The names are the registers'.
pub mod segment {
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
    pub const LDTR: usize = 6;
    pub const TR: usize = 7;
}

/// General registers by number: RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8..R15.
pub const RSP: usize = 4;

/// Bytes of the XSAVE area of a VP: all that clients of the device can hold.
pub const XSAVE_BYTES: usize = 4096;

/// Registers of one VP. FS and GS base are those of their segments.
#[derive(Clone, Copy)]
#[repr(C)]
#[allow(missing_docs)] // The names are the registers'.
pub struct VpState {
    /// General registers; `gprs[RSP]` is valid here even though the entry code does not use it.
    pub context: VpContext,
    pub rip: u64,
    pub rflags: u64,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub xcr0: u64,
    pub xss: u64,
    pub pat: u64,
    pub dr: [u64; 4],
    pub dr6: u64,
    pub dr7: u64,
    pub debugctl: u64,
    pub segments: [Segment; 8],
    pub gdtr: Table,
    pub idtr: Table,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub tsc_aux: u64,
    /// Added to the host's TSC gives the guest's.
    pub tsc_offset: u64,
    pub tsc_adjust: u64,
    /// Number of the last [`TscWrite`] that it took part in.
    pub tsc_write: u64,
    pub spec_ctrl: u64,
    pub misc_enable: u64,
    pub mtrr_def_type: u64,
    pub mtrr_fixed: [u64; 11],
    /// Base and mask pairs.
    pub mtrr_variable: [(u64, u64); 8],
    /// `HV_X64_PENDING_INTERRUPTION_REGISTER`: bit 0 pending, 3:1 type, 4 error code valid, 8:5 instruction
    /// length, 31:16 vector, 63:32 error code.
    pub pending_interruption: u64,
    /// `HV_X64_PENDING_EVENT0`, low and high half.
    pub pending_event: [u64; 2],
    /// `HV_X64_PENDING_EVENT1`.
    pub pending_event1: [u64; 2],
    /// Interrupt shadow of STI or MOV SS.
    pub interrupt_shadow: bool,
    /// NMIs are blocked until IRET.
    pub nmi_masked: bool,
    /// Waits for a start-up IPI.
    pub startup_suspend: bool,
    /// Executed HLT and waits for an event.
    pub halt_suspend: bool,
    /// It waits because it read HV_X64_MSR_GUEST_IDLE.
    pub idle: bool,
    /// `HvRegisterExplicitSuspend`.
    pub explicit_suspend: bool,
    /// `HvRegisterInterceptSuspend`.
    pub intercept_suspend: bool,
    /// HV_X64_MSR_VP_ASSIST_PAGE.
    pub vp_assist_page: u64,
    /// Registers of the SynIC.
    pub synic: synic::Registers,
    /// The TSC that the VMM read last. `None` again once the VP has run.
    pub tsc_read: Option<u64>,
    /// What its CPUID offers: taken anew whenever a result is registered.
    pub features: Features,
}

/// What the caller has to do after it wrote a register, an MSR or a property. Whatever it says, registers in
/// [`VpState`] may have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Effect {
    /// Nothing.
    None,
    /// Act on the local APIC's effect.
    Apic(WriteEffect),
    /// `tsc_offset` changed, and with it the host time of the APIC timer's deadline.
    TscOffset,
    /// HV_X64_MSR_HYPERCALL: the page is at this GPA now, `None` if nowhere.
    HypercallPage(Option<u64>),
    /// HV_X64_MSR_REFERENCE_TSC: the page is at this GPA now, `None` if nowhere.
    ReferenceTscPage(Option<u64>),
    /// HV_X64_MSR_VP_ASSIST_PAGE: the page is at this GPA now, `None` if nowhere.
    VpAssistPage(Option<u64>),
    /// A register of the SynIC was written. Its page at this GPA is new: clear it.
    Synic(Option<u64>),
    /// Tell the VMM when these sources of the SynIC can take a message.
    Notify(Sources),
    /// A synthetic timer was set.
    Timers,
    /// Reference time jumped: write the reference TSC page anew, if there is one.
    ReferenceTime,
    /// IA32_SPEC_CTRL has another value.
    SpeculationControl,
    /// IA32_PRED_CMD: write this value, which the processor takes, on this CPU.
    PredictionCommand(u64),
    /// IA32_FLUSH_CMD: write back and invalidate the L1 data cache of this CPU.
    FlushL1d,
    /// The guest reported a crash: the parameters are in [`PartitionState::crash`].
    Crash,
    /// The guest asked for a reset.
    Reset,
    /// The write is to [`PartitionState`]: do it with
    /// [`write_partition`](crate::child_msr::write_partition) under the partition's lock.
    Partition,
    /// Access tracking of the partition's memory was switched on or off.
    AccessTracking(bool),
}

/// The VMM's last write of a TSC that did not go with the one before. VPs for which the same is written follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscWrite {
    /// Counts such writes; 0 for none. A VP took part in the one that its `tsc_write` names.
    pub number: u64,
    /// What was written.
    pub value: u64,
    /// TSC offset that came of it.
    pub offset: u64,
}

/// State of a partition that its VPs share and that MSRs and registers reach.
#[derive(Clone, Copy)]
#[allow(missing_docs)] // The names are the registers'.
pub struct PartitionState {
    /// HV_X64_MSR_GUEST_OS_ID.
    pub guest_os_id: u64,
    /// HV_X64_MSR_HYPERCALL.
    pub hypercall: u64,
    /// HV_X64_MSR_REFERENCE_TSC.
    pub reference_tsc: u64,
    /// HV_X64_MSR_CRASH_P0..P4 and CTL.
    pub crash: [u64; 6],
    /// HV_X64_MSR_REENLIGHTENMENT_CONTROL, TSC_EMULATION_CONTROL and STATUS.
    pub reenlightenment: [u64; 3],
    /// Host TSC ticks per second.
    pub tsc_hz: u64,
    /// Host TSC when reference time was zero.
    pub reference_base: u64,
    /// Partition property UNIMPLEMENTED_MSR_ACTION: 1 = ignore writes and read zero.
    pub ignore_unknown_msrs: bool,
    /// Partition property SYNTHETIC_PROC_FEATURES as the VMM set it.
    pub synthetic_features: u64,
    /// Creation flags: TLFS `HV_PARTITION_CREATION_FLAG_*`.
    pub creation_flags: u64,
    /// Disabled processor features, banks 0 and 1, and disabled XSAVE features.
    pub disabled: [u64; 3],
    /// Processors per socket, 0 for the default.
    pub processors_per_socket: u64,
    /// Number of VPs.
    pub vps: u32,
    /// The processor.
    pub host: HostFacts,
    /// Reference time in 100 ns units per TSC tick, as a fraction of 2^64.
    pub reference_scale: u64,
    /// Sequence number of the reference TSC page.
    pub reference_sequence: u32,
    /// Host TSC at which the partition's time was frozen.
    pub frozen_at: Option<u64>,
    /// HV_X64_MSR_TSC_INVARIANT_CONTROL.
    pub tsc_invariant_control: u64,
    /// Partition property GPA_PAGE_ACCESS_TRACKING.
    pub access_tracking: bool,
    /// See [`TscWrite`].
    pub tsc_write: TscWrite,
}

/// Facts of the processor that CPUID does not tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostFacts {
    /// Vendor.
    pub vendor: Vendor,
    /// TSC ticks per second.
    pub tsc_hz: u64,
    /// XCR0 of the root: a child cannot have more.
    pub xcr0: u64,
    /// IA32_ARCH_CAPABILITIES, 0 if there is none.
    pub arch_capabilities: u64,
}

impl PartitionState {
    /// What the guest told of itself and set for all VPs, as after a reset.
    pub fn reset_guest(&mut self) {
        self.guest_os_id = 0;
        self.hypercall = 0;
        self.reference_tsc = 0;
        self.tsc_invariant_control = 0;
        self.crash = [0; 6];
        self.reenlightenment = [0; 3];
    }

    /// A new partition: its reference time starts at `host_tsc`.
    pub const fn new(host: HostFacts, host_tsc: u64) -> Self {
        Self {
            guest_os_id: 0,
            hypercall: 0,
            reference_tsc: 0,
            crash: [0; 6],
            reenlightenment: [0; 3],
            tsc_hz: host.tsc_hz,
            reference_base: host_tsc,
            ignore_unknown_msrs: false,
            synthetic_features: 0,
            creation_flags: 0,
            disabled: [0; 3],
            processors_per_socket: 0,
            vps: 0,
            host,
            reference_scale: reference_scale(host.tsc_hz),
            reference_sequence: 0,
            frozen_at: None,
            tsc_invariant_control: 0,
            access_tracking: false,
            tsc_write: TscWrite {
                number: 0,
                value: 0,
                offset: 0,
            },
        }
    }
}

impl VpState {
    /// RIP after reset.
    pub const RESET_RIP: u64 = 0xfff0;
    /// CR0 after reset.
    pub const RESET_CR0: u64 = 0x6000_0010;
    /// CS after reset.
    pub const RESET_CODE: Segment = Segment {
        base: 0xffff_0000,
        limit: 0xffff,
        rights: 0x9b,
        selector: 0xf000,
    };

    /// The state after INIT or power-on (SDM table 11-1) of VP `index`.
    pub const fn reset(is_bsp: bool) -> Self {
        const fn data(rights: u32) -> Segment {
            Segment {
                base: 0,
                limit: 0xffff,
                rights,
                selector: 0,
            }
        }
        let table = Table {
            base: 0,
            limit: 0xffff,
        };
        Self {
            context: VpContext {
                gprs: [0; 16],
                control_spa: 0,
                control: 0,
                is_root: 0,
            },
            rip: Self::RESET_RIP,
            rflags: 2,
            cr0: Self::RESET_CR0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: 1,
            xss: 0,
            pat: 0x0007_0406_0007_0406,
            dr: [0; 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            debugctl: 0,
            segments: [
                data(0x93),
                Self::RESET_CODE,
                data(0x93),
                data(0x93),
                data(0x93),
                data(0x93),
                data(0x82),
                data(0x8b),
            ],
            gdtr: table,
            idtr: table,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            kernel_gs_base: 0,
            tsc_aux: 0,
            tsc_offset: 0,
            tsc_adjust: 0,
            tsc_write: 0,
            spec_ctrl: 0,
            misc_enable: 1,
            mtrr_def_type: 0,
            mtrr_fixed: [0; 11],
            mtrr_variable: [(0, 0); 8],
            pending_interruption: 0,
            pending_event: [0; 2],
            pending_event1: [0; 2],
            interrupt_shadow: false,
            nmi_masked: false,
            startup_suspend: !is_bsp,
            halt_suspend: false,
            idle: false,
            explicit_suspend: true,
            intercept_suspend: false,
            vp_assist_page: 0,
            synic: synic::Registers::RESET,
            tsc_read: None,
            features: Features::NONE,
        }
    }
}
