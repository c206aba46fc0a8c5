// SPDX-License-Identifier: GPL-2.0
//! The architectural state of a child's virtual processor, independent of the vendor.
//!
//! While a VP runs, part of this is in the VMCS or VMCB; the back ends move it there and back. All of it
//! is plain data, so that hypercalls, CPUID and MSR emulation are pure functions of it.

use hv_abi::boot::VpContext;
use hv_x86::state::{Segment, Table};

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
    /// `HvRegisterExplicitSuspend`.
    pub explicit_suspend: bool,
    /// `HvRegisterInterceptSuspend`.
    pub intercept_suspend: bool,
    /// HV_X64_MSR_VP_ASSIST_PAGE.
    pub vp_assist_page: u64,
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
}

impl VpState {
    /// The state after INIT or power-on (SDM table 11-1) of VP `index`.
    pub const fn reset(is_bsp: bool) -> Self {
        const fn data(rights: u32) -> Segment {
            Segment { base: 0, limit: 0xffff, rights, selector: 0 }
        }
        let code = Segment { base: 0xffff_0000, limit: 0xffff, rights: 0x9b, selector: 0xf000 };
        let table = Table { base: 0, limit: 0xffff };
        Self {
            context: VpContext { gprs: [0; 16], control_spa: 0, control: 0 },
            rip: 0xfff0,
            rflags: 2,
            cr0: 0x6000_0010,
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
                code,
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
            explicit_suspend: true,
            intercept_suspend: false,
            vp_assist_page: 0,
        }
    }
}
