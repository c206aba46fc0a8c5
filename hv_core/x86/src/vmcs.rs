// SPDX-License-Identifier: GPL-2.0
//! VMCS field encodings (SDM appendix B), controls (SDM 26.6-26.8) and exit reasons (SDM appendix C).

/// Field encodings.
#[allow(missing_docs)] // The names are the manual's.
pub mod field {
    pub const VPID: u32 = 0x0000;
    pub const GUEST_ES_SELECTOR: u32 = 0x0800;
    pub const GUEST_CS_SELECTOR: u32 = 0x0802;
    pub const GUEST_SS_SELECTOR: u32 = 0x0804;
    pub const GUEST_DS_SELECTOR: u32 = 0x0806;
    pub const GUEST_FS_SELECTOR: u32 = 0x0808;
    pub const GUEST_GS_SELECTOR: u32 = 0x080a;
    pub const GUEST_LDTR_SELECTOR: u32 = 0x080c;
    pub const GUEST_TR_SELECTOR: u32 = 0x080e;
    pub const HOST_ES_SELECTOR: u32 = 0x0c00;
    pub const HOST_CS_SELECTOR: u32 = 0x0c02;
    pub const HOST_SS_SELECTOR: u32 = 0x0c04;
    pub const HOST_DS_SELECTOR: u32 = 0x0c06;
    pub const HOST_FS_SELECTOR: u32 = 0x0c08;
    pub const HOST_GS_SELECTOR: u32 = 0x0c0a;
    pub const HOST_TR_SELECTOR: u32 = 0x0c0c;
    pub const IO_BITMAP_A: u32 = 0x2000;
    pub const IO_BITMAP_B: u32 = 0x2002;
    pub const MSR_BITMAP: u32 = 0x2004;
    pub const TSC_OFFSET: u32 = 0x2010;
    pub const EPT_POINTER: u32 = 0x201a;
    pub const XSS_EXITING_BITMAP: u32 = 0x202c;
    pub const ENCLS_EXITING_BITMAP: u32 = 0x202e;
    pub const GUEST_PHYSICAL_ADDRESS: u32 = 0x2400;
    pub const LINK_POINTER: u32 = 0x2800;
    pub const GUEST_DEBUGCTL: u32 = 0x2802;
    pub const GUEST_PAT: u32 = 0x2804;
    pub const GUEST_EFER: u32 = 0x2806;
    pub const GUEST_PDPTE0: u32 = 0x280a;
    pub const HOST_PAT: u32 = 0x2c00;
    pub const HOST_EFER: u32 = 0x2c02;
    pub const PIN_CONTROLS: u32 = 0x4000;
    pub const PROCESSOR_CONTROLS: u32 = 0x4002;
    pub const EXCEPTION_BITMAP: u32 = 0x4004;
    pub const PAGE_FAULT_MASK: u32 = 0x4006;
    pub const PAGE_FAULT_MATCH: u32 = 0x4008;
    pub const CR3_TARGET_COUNT: u32 = 0x400a;
    pub const EXIT_CONTROLS: u32 = 0x400c;
    pub const EXIT_MSR_STORE_COUNT: u32 = 0x400e;
    pub const EXIT_MSR_LOAD_COUNT: u32 = 0x4010;
    pub const ENTRY_CONTROLS: u32 = 0x4012;
    pub const ENTRY_MSR_LOAD_COUNT: u32 = 0x4014;
    pub const ENTRY_INTERRUPTION: u32 = 0x4016;
    pub const ENTRY_ERROR_CODE: u32 = 0x4018;
    pub const ENTRY_INSTRUCTION_LENGTH: u32 = 0x401a;
    pub const SECONDARY_CONTROLS: u32 = 0x401e;
    pub const INSTRUCTION_ERROR: u32 = 0x4400;
    pub const EXIT_REASON: u32 = 0x4402;
    pub const EXIT_INTERRUPTION: u32 = 0x4404;
    pub const EXIT_ERROR_CODE: u32 = 0x4406;
    pub const VECTORING_INFORMATION: u32 = 0x4408;
    pub const VECTORING_ERROR_CODE: u32 = 0x440a;
    pub const EXIT_INSTRUCTION_LENGTH: u32 = 0x440c;
    pub const EXIT_INSTRUCTION_INFORMATION: u32 = 0x440e;
    pub const GUEST_ES_LIMIT: u32 = 0x4800;
    pub const GUEST_CS_LIMIT: u32 = 0x4802;
    pub const GUEST_SS_LIMIT: u32 = 0x4804;
    pub const GUEST_DS_LIMIT: u32 = 0x4806;
    pub const GUEST_FS_LIMIT: u32 = 0x4808;
    pub const GUEST_GS_LIMIT: u32 = 0x480a;
    pub const GUEST_LDTR_LIMIT: u32 = 0x480c;
    pub const GUEST_TR_LIMIT: u32 = 0x480e;
    pub const GUEST_GDTR_LIMIT: u32 = 0x4810;
    pub const GUEST_IDTR_LIMIT: u32 = 0x4812;
    pub const GUEST_ES_RIGHTS: u32 = 0x4814;
    pub const GUEST_CS_RIGHTS: u32 = 0x4816;
    pub const GUEST_SS_RIGHTS: u32 = 0x4818;
    pub const GUEST_DS_RIGHTS: u32 = 0x481a;
    pub const GUEST_FS_RIGHTS: u32 = 0x481c;
    pub const GUEST_GS_RIGHTS: u32 = 0x481e;
    pub const GUEST_LDTR_RIGHTS: u32 = 0x4820;
    pub const GUEST_TR_RIGHTS: u32 = 0x4822;
    pub const GUEST_INTERRUPTIBILITY: u32 = 0x4824;
    pub const GUEST_ACTIVITY: u32 = 0x4826;
    pub const GUEST_SYSENTER_CS: u32 = 0x482a;
    pub const PREEMPTION_TIMER: u32 = 0x482e;
    pub const HOST_SYSENTER_CS: u32 = 0x4c00;
    pub const CR0_MASK: u32 = 0x6000;
    pub const CR4_MASK: u32 = 0x6002;
    pub const CR0_SHADOW: u32 = 0x6004;
    pub const CR4_SHADOW: u32 = 0x6006;
    pub const EXIT_QUALIFICATION: u32 = 0x6400;
    pub const GUEST_LINEAR_ADDRESS: u32 = 0x640a;
    pub const GUEST_CR0: u32 = 0x6800;
    pub const GUEST_CR3: u32 = 0x6802;
    pub const GUEST_CR4: u32 = 0x6804;
    pub const GUEST_ES_BASE: u32 = 0x6806;
    pub const GUEST_CS_BASE: u32 = 0x6808;
    pub const GUEST_SS_BASE: u32 = 0x680a;
    pub const GUEST_DS_BASE: u32 = 0x680c;
    pub const GUEST_FS_BASE: u32 = 0x680e;
    pub const GUEST_GS_BASE: u32 = 0x6810;
    pub const GUEST_LDTR_BASE: u32 = 0x6812;
    pub const GUEST_TR_BASE: u32 = 0x6814;
    pub const GUEST_GDTR_BASE: u32 = 0x6816;
    pub const GUEST_IDTR_BASE: u32 = 0x6818;
    pub const GUEST_DR7: u32 = 0x681a;
    pub const GUEST_RSP: u32 = 0x681c;
    pub const GUEST_RIP: u32 = 0x681e;
    pub const GUEST_RFLAGS: u32 = 0x6820;
    pub const GUEST_PENDING_DEBUG: u32 = 0x6822;
    pub const GUEST_SYSENTER_ESP: u32 = 0x6824;
    pub const GUEST_SYSENTER_EIP: u32 = 0x6826;
    pub const GUEST_S_CET: u32 = 0x6828;
    pub const GUEST_SSP: u32 = 0x682a;
    pub const GUEST_SSP_TABLE: u32 = 0x682c;
    pub const HOST_CR0: u32 = 0x6c00;
    pub const HOST_CR3: u32 = 0x6c02;
    pub const HOST_CR4: u32 = 0x6c04;
    pub const HOST_FS_BASE: u32 = 0x6c06;
    pub const HOST_GS_BASE: u32 = 0x6c08;
    pub const HOST_TR_BASE: u32 = 0x6c0a;
    pub const HOST_GDTR_BASE: u32 = 0x6c0c;
    pub const HOST_IDTR_BASE: u32 = 0x6c0e;
    pub const HOST_SYSENTER_ESP: u32 = 0x6c10;
    pub const HOST_SYSENTER_EIP: u32 = 0x6c12;
    pub const HOST_RSP: u32 = 0x6c14;
    pub const HOST_RIP: u32 = 0x6c16;
    pub const HOST_S_CET: u32 = 0x6c18;
    pub const HOST_SSP: u32 = 0x6c1a;
    pub const HOST_SSP_TABLE: u32 = 0x6c1c;
}

/// Pin-based controls (SDM 26.6.1).
pub mod pin {
    /// External-interrupt exiting.
    pub const EXTERNAL_INTERRUPT: u32 = 1 << 0;
    /// NMI exiting.
    pub const NMI: u32 = 1 << 3;
    /// Virtual NMIs.
    pub const VIRTUAL_NMI: u32 = 1 << 5;
    /// VMX-preemption timer.
    pub const PREEMPTION_TIMER: u32 = 1 << 6;
}

/// Primary processor-based controls (SDM 26.6.2).
pub mod processor {
    /// Interrupt-window exiting.
    pub const INTERRUPT_WINDOW: u32 = 1 << 2;
    /// Use TSC offsetting.
    pub const TSC_OFFSET: u32 = 1 << 3;
    /// HLT exiting.
    pub const HLT: u32 = 1 << 7;
    /// MWAIT exiting.
    pub const MWAIT: u32 = 1 << 10;
    /// RDPMC exiting.
    pub const RDPMC: u32 = 1 << 11;
    /// CR8-load exiting.
    pub const CR8_LOAD: u32 = 1 << 19;
    /// CR8-store exiting.
    pub const CR8_STORE: u32 = 1 << 20;
    /// NMI-window exiting.
    pub const NMI_WINDOW: u32 = 1 << 22;
    /// MOV-DR exiting.
    pub const MOV_DR: u32 = 1 << 23;
    /// Unconditional I/O exiting.
    pub const IO: u32 = 1 << 24;
    /// Use MSR bitmaps.
    pub const MSR_BITMAP: u32 = 1 << 28;
    /// MONITOR exiting.
    pub const MONITOR: u32 = 1 << 29;
    /// Activate secondary controls.
    pub const SECONDARY: u32 = 1 << 31;
}

/// Secondary processor-based controls (SDM 26.6.2).
pub mod secondary {
    /// Enable EPT.
    pub const EPT: u32 = 1 << 1;
    /// Enable RDTSCP.
    pub const RDTSCP: u32 = 1 << 3;
    /// Enable VPID.
    pub const VPID: u32 = 1 << 5;
    /// WBINVD exiting.
    pub const WBINVD: u32 = 1 << 6;
    /// Unrestricted guest.
    pub const UNRESTRICTED_GUEST: u32 = 1 << 7;
    /// Enable INVPCID.
    pub const INVPCID: u32 = 1 << 12;
    /// Enable XSAVES and XRSTORS.
    pub const XSAVES: u32 = 1 << 20;
    /// Enable user wait and pause.
    pub const USER_WAIT: u32 = 1 << 26;
    /// Enable PCONFIG.
    pub const PCONFIG: u32 = 1 << 27;
}

/// VM-exit controls (SDM 26.7.1).
pub mod exit_control {
    /// Save debug controls.
    pub const SAVE_DEBUG: u32 = 1 << 2;
    /// Host address-space size: 64-bit.
    pub const HOST_64BIT: u32 = 1 << 9;
    /// Acknowledge interrupt on exit.
    pub const ACKNOWLEDGE_INTERRUPT: u32 = 1 << 15;
    /// Save IA32_PAT.
    pub const SAVE_PAT: u32 = 1 << 18;
    /// Load IA32_PAT.
    pub const LOAD_PAT: u32 = 1 << 19;
    /// Save EFER.
    pub const SAVE_EFER: u32 = 1 << 20;
    /// Load EFER.
    pub const LOAD_EFER: u32 = 1 << 21;
    /// Load CET state.
    pub const LOAD_CET: u32 = 1 << 28;
}

/// VM-entry controls (SDM 26.8.1).
pub mod entry_control {
    /// Load debug controls.
    pub const LOAD_DEBUG: u32 = 1 << 2;
    /// IA-32e mode guest.
    pub const IA32E: u32 = 1 << 9;
    /// Load IA32_PAT.
    pub const LOAD_PAT: u32 = 1 << 14;
    /// Load EFER.
    pub const LOAD_EFER: u32 = 1 << 15;
    /// Load CET state.
    pub const LOAD_CET: u32 = 1 << 20;
}

/// Adjusts wanted controls to a capability MSR: bits 31:0 must be 1, bits 63:32 may be 1 (SDM A.3).
pub const fn adjust(wanted: u32, capability: u64) -> u32 {
    (wanted | capability as u32) & (capability >> 32) as u32
}

/// Whether every bit of `wanted` may be 1.
pub const fn allows(wanted: u32, capability: u64) -> bool {
    wanted & !((capability >> 32) as u32) == 0
}

/// Basic exit reasons.
#[allow(missing_docs)] // The names are the manual's.
pub mod reason {
    pub const EXCEPTION_OR_NMI: u32 = 0;
    pub const EXTERNAL_INTERRUPT: u32 = 1;
    pub const TRIPLE_FAULT: u32 = 2;
    pub const INIT: u32 = 3;
    pub const SIPI: u32 = 4;
    pub const INTERRUPT_WINDOW: u32 = 7;
    pub const NMI_WINDOW: u32 = 8;
    pub const CPUID: u32 = 10;
    pub const GETSEC: u32 = 11;
    pub const HLT: u32 = 12;
    pub const INVD: u32 = 13;
    pub const VMCALL: u32 = 18;
    pub const VMCLEAR: u32 = 19;
    pub const VMXON: u32 = 27;
    pub const CR_ACCESS: u32 = 28;
    pub const IO: u32 = 30;
    pub const RDMSR: u32 = 31;
    pub const WRMSR: u32 = 32;
    pub const ENTRY_FAILURE_STATE: u32 = 33;
    pub const ENTRY_FAILURE_MACHINE_CHECK: u32 = 41;
    pub const EPT_VIOLATION: u32 = 48;
    pub const EPT_MISCONFIGURATION: u32 = 49;
    pub const INVEPT: u32 = 50;
    pub const PREEMPTION_TIMER: u32 = 52;
    pub const INVVPID: u32 = 53;
    pub const WBINVD: u32 = 54;
    pub const XSETBV: u32 = 55;
}

/// Exit-reason bit: the VM entry failed (SDM 26.9.1).
pub const ENTRY_FAILED: u32 = 1 << 31;

/// IA32_VMX_EPT_VPID_CAP bits (SDM A.10).
pub mod ept_cap {
    /// Four-level walks.
    pub const WALK_4: u64 = 1 << 6;
    /// Write-back table memory.
    pub const WRITE_BACK: u64 = 1 << 14;
    /// 2 MiB leaves.
    pub const PAGE_2M: u64 = 1 << 16;
    /// 1 GiB leaves.
    pub const PAGE_1G: u64 = 1 << 17;
    /// INVEPT, single and all contexts.
    pub const INVEPT: u64 = (1 << 20) | (1 << 25) | (1 << 26);
    /// INVVPID, single and all contexts.
    pub const INVVPID: u64 = (1 << 32) | (1 << 41) | (1 << 42);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adjust_forces_and_masks() {
        // Bits 0 and 1 must be 1; bits 0..=3 may be 1.
        let capability = 0x0000_000f_0000_0003;
        assert_eq!(adjust((1 << 2) | (1 << 7), capability), 0b111);
        assert!(allows(1 << 3, capability));
        assert!(!allows(1 << 4, capability));
    }
}
