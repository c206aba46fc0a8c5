// SPDX-License-Identifier: GPL-2.0
//! Control-register bits, MSR numbers and CPUID bits (SDM vol. 3 ch. 2 and vol. 4; APM vol. 2 app. A).

/// CR0 bits (SDM 2.5).
pub mod cr0 {
    /// Protection enable.
    pub const PE: u64 = 1 << 0;
    /// Extension type.
    pub const ET: u64 = 1 << 4;
    /// Numeric error: VMX operation needs it (SDM A.7).
    pub const NE: u64 = 1 << 5;
    /// Write protect.
    pub const WP: u64 = 1 << 16;
    /// Not write-through.
    pub const NW: u64 = 1 << 29;
    /// Cache disable.
    pub const CD: u64 = 1 << 30;
    /// Paging.
    pub const PG: u64 = 1 << 31;
}

/// CR4 bits (SDM 2.5).
pub mod cr4 {
    /// Page-size extension.
    pub const PSE: u64 = 1 << 4;
    /// Physical-address extension.
    pub const PAE: u64 = 1 << 5;
    /// Machine-check enable.
    pub const MCE: u64 = 1 << 6;
    /// Global pages.
    pub const PGE: u64 = 1 << 7;
    /// 57-bit linear addresses.
    pub const LA57: u64 = 1 << 12;
    /// VMX enable.
    pub const VMXE: u64 = 1 << 13;
    /// SMX enable.
    pub const SMXE: u64 = 1 << 14;
    /// Process-context identifiers.
    pub const PCIDE: u64 = 1 << 17;
    /// XSAVE and extended states.
    pub const OSXSAVE: u64 = 1 << 18;
    /// Supervisor-mode execution prevention.
    pub const SMEP: u64 = 1 << 20;
    /// Supervisor-mode access prevention.
    pub const SMAP: u64 = 1 << 21;
    /// Protection keys for user pages.
    pub const PKE: u64 = 1 << 22;
    /// Control-flow enforcement.
    pub const CET: u64 = 1 << 23;
    /// Protection keys for supervisor pages.
    pub const PKS: u64 = 1 << 24;
    /// Flexible return and event delivery.
    pub const FRED: u64 = 1 << 32;
}

/// EFER bits (SDM 2.2.1, APM 3.1.7).
pub mod efer {
    /// Long-mode enable.
    pub const LME: u64 = 1 << 8;
    /// Long-mode active.
    pub const LMA: u64 = 1 << 10;
    /// Execute-disable enable.
    pub const NXE: u64 = 1 << 11;
    /// Secure virtual machine enable.
    pub const SVME: u64 = 1 << 12;
}

/// RFLAGS bits.
pub mod rflags {
    /// Carry.
    pub const CF: u64 = 1 << 0;
    /// Parity of the low byte.
    pub const PF: u64 = 1 << 2;
    /// Carry out of bit 3.
    pub const AF: u64 = 1 << 4;
    /// Zero.
    pub const ZF: u64 = 1 << 6;
    /// Sign.
    pub const SF: u64 = 1 << 7;
    /// Signed overflow.
    pub const OF: u64 = 1 << 11;
    /// What arithmetic sets.
    pub const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;
    /// Trap flag.
    pub const TF: u64 = 1 << 8;
    /// Interrupt enable.
    pub const IF: u64 = 1 << 9;
}

/// MSR numbers.
pub mod msr {
    /// IA32_APIC_BASE.
    pub const APIC_BASE: u32 = 0x1b;
    /// IA32_FEATURE_CONTROL.
    pub const FEATURE_CONTROL: u32 = 0x3a;
    /// IA32_MTRRCAP.
    pub const MTRR_CAP: u32 = 0xfe;
    /// IA32_SYSENTER_CS.
    pub const SYSENTER_CS: u32 = 0x174;
    /// IA32_SYSENTER_ESP.
    pub const SYSENTER_ESP: u32 = 0x175;
    /// IA32_SYSENTER_EIP.
    pub const SYSENTER_EIP: u32 = 0x176;
    /// IA32_MCG_STATUS.
    pub const MCG_STATUS: u32 = 0x17a;
    /// IA32_DEBUGCTL.
    pub const DEBUGCTL: u32 = 0x1d9;
    /// First variable MTRR: base; the mask follows, then the next pair.
    pub const MTRR_VARIABLE: u32 = 0x200;
    /// Fixed MTRRs in the order of `MtrrState::fixed`.
    pub const MTRR_FIXED: [u32; 11] = [
        0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f,
    ];
    /// IA32_PAT.
    pub const PAT: u32 = 0x277;
    /// IA32_MTRR_DEF_TYPE.
    pub const MTRR_DEF_TYPE: u32 = 0x2ff;
    /// IA32_VMX_BASIC.
    pub const VMX_BASIC: u32 = 0x480;
    /// IA32_VMX_MISC.
    pub const VMX_MISC: u32 = 0x485;
    /// IA32_VMX_CR0_FIXED0.
    pub const VMX_CR0_FIXED0: u32 = 0x486;
    /// IA32_VMX_CR4_FIXED1.
    pub const VMX_CR4_FIXED1: u32 = 0x489;
    /// IA32_VMX_PROCBASED_CTLS2.
    pub const VMX_PROCBASED_CTLS2: u32 = 0x48b;
    /// IA32_VMX_EPT_VPID_CAP.
    pub const VMX_EPT_VPID_CAP: u32 = 0x48c;
    /// IA32_VMX_TRUE_PINBASED_CTLS.
    pub const VMX_TRUE_PINBASED_CTLS: u32 = 0x48d;
    /// IA32_VMX_TRUE_PROCBASED_CTLS.
    pub const VMX_TRUE_PROCBASED_CTLS: u32 = 0x48e;
    /// IA32_VMX_TRUE_EXIT_CTLS.
    pub const VMX_TRUE_EXIT_CTLS: u32 = 0x48f;
    /// IA32_VMX_TRUE_ENTRY_CTLS.
    pub const VMX_TRUE_ENTRY_CTLS: u32 = 0x490;
    /// IA32_S_CET.
    pub const S_CET: u32 = 0x6a2;
    /// IA32_U_CET; bit 0: shadow stack on.
    pub const U_CET: u32 = 0x6a0;
    /// IA32_PL3_SSP.
    pub const PL3_SSP: u32 = 0x6a7;
    /// IA32_INTERRUPT_SSP_TABLE_ADDR.
    pub const SSP_TABLE: u32 = 0x6a8;
    /// x2APIC interrupt command register.
    pub const X2APIC_ICR: u32 = 0x830;
    /// EFER.
    pub const EFER: u32 = 0xc000_0080;
    /// FS base.
    pub const FS_BASE: u32 = 0xc000_0100;
    /// GS base.
    pub const GS_BASE: u32 = 0xc000_0101;
    /// AMD VM_CR.
    pub const VM_CR: u32 = 0xc001_0114;
    /// AMD VM_HSAVE_PA.
    pub const VM_HSAVE_PA: u32 = 0xc001_0117;
    /// First MSR number of the TLFS synthetic range.
    pub const HV_FIRST: u32 = 0x4000_0000;
    /// Last MSR number of the TLFS synthetic range.
    pub const HV_LAST: u32 = 0x4000_01ff;
}

/// CPUID bits.
pub mod cpuid {
    /// Leaf 1 ECX: VMX.
    pub const L1_ECX_VMX: u32 = 1 << 5;
    /// Leaf 1 ECX: XSAVE.
    pub const L1_ECX_XSAVE: u32 = 1 << 26;
    /// Leaf 1 ECX: OSXSAVE, a mirror of CR4.
    pub const L1_ECX_OSXSAVE: u32 = 1 << 27;
    /// Leaf 1 ECX: a hypervisor is present.
    pub const L1_ECX_HYPERVISOR: u32 = 1 << 31;
    /// Leaf 7 ECX: OSPKE, a mirror of CR4.
    pub const L7_ECX_OSPKE: u32 = 1 << 4;
    /// Leaf 8000_0001h ECX: SVM.
    pub const E1_ECX_SVM: u32 = 1 << 2;
}

/// Type and size of physical memory reached through the xAPIC page.
pub const APIC_DEFAULT_BASE: u64 = 0xfee0_0000;
