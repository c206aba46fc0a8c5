// SPDX-License-Identifier: GPL-2.0
//! What CPUID says in a child, and the partition properties that follow from it.
//!
//! ```text
//!   processor ─ allow-lists below ─ disabled feature banks ─► default ─┐
//!   results that the VMM registered, cut to what the default allows ───┴─► + what mirrors registers ─► guest
//! ```
//!
//! A bit reaches a child only if it stands in a list here: a feature that nobody thought of is not there.
//! Registered results replace what describes the model (names, caches, topology) but only take away from
//! what are features.
#![forbid(unsafe_code)]
#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]

use hv_abi::boot::Vendor;
use hv_abi::partition::{creation, property};
use hv_abi::status::HvStatus;
use hv_x86::regs::{cr4, efer};

use crate::apic::{LocalApic, Mode};
use crate::child_msr::{reference_time, set_reference_time};
use crate::vp_state::{segment, Effect, HostFacts, PartitionState, VpState};

/// EAX, EBX, ECX, EDX.
pub type Registers = [u32; 4];

/// Register numbers in [`Registers`].
const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// Highest basic leaf: the topology of leaf 1fh is the last one that a child can have.
const MAX_BASIC: u32 = 0x1f;
/// Highest extended leaf.
const MAX_EXTENDED: u32 = 0x8000_0021;
/// Highest hypervisor leaf.
const MAX_HYPERVISOR: u32 = 0x4000_0006;
/// Second-level tables of four levels reach that far.
const MAX_PHYSICAL_BITS: u32 = 48;
/// Most VPs of a partition.
const MAX_VPS: u32 = 256;
/// Version that CPUID 4000_0002h shows: major and minor as Windows 10 and later, and our own build.
const VERSION: (u32, u32, u32) = (10, 0, 1);

/// State components that a child may have: x87, SSE, AVX, AVX-512 (three) and PKRU. All of them together fit
/// into the 4096 bytes that the VMM's interface has for them; AMX tiles do not. CET and supervisor states
/// are not virtualised.
pub const XCR0_BITS: u64 = 0x2e7;
/// Components beyond the legacy region, in the order of their bits.
const XSAVE_COMPONENTS: [u32; 5] = [2, 5, 6, 7, 9];
/// Bytes of the legacy region and the header (SDM vol 1, 13.4).
const XSAVE_HEADER_END: u32 = 576;

/// The bits with these numbers.
#[allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)] // Evaluated by the compiler.
const fn bits(numbers: &[u32]) -> u32 {
    let mut mask = 0;
    let mut index = 0;
    while index < numbers.len() {
        mask |= 1 << numbers[index];
        index += 1;
    }
    mask
}

/// Bits of leaf 1.
mod leaf1 {
    use super::bits;

    pub const ECX_X2APIC: u32 = 1 << 21;
    pub const ECX_TSC_DEADLINE: u32 = 1 << 24;
    pub const ECX_XSAVE: u32 = 1 << 26;
    pub const ECX_OSXSAVE: u32 = 1 << 27;
    pub const ECX_AVX: u32 = 1 << 28;
    pub const ECX_HYPERVISOR: u32 = 1 << 31;
    pub const EDX_APIC: u32 = 1 << 9;
    pub const EDX_MTRR: u32 = 1 << 12;
    pub const EDX_HTT: u32 = 1 << 28;

    /// SSE3, PCLMULQDQ, SSSE3, FMA, CMPXCHG16B, PCID, SSE4.1, SSE4.2, MOVBE, POPCNT, AES, XSAVE, AVX, F16C,
    /// RDRAND. Not: MONITOR, VMX, SMX, EIST, TM2, debug store, xTPR, PDCM, DCA.
    pub const ECX: u32 = bits(&[0, 1, 9, 12, 13, 17, 19, 20, 22, 23, 25, 26, 28, 29, 30]);
    /// FPU, VME, DE, PSE, TSC, MSR, PAE, MCE, CX8, SEP, PGE, MCA, CMOV, PAT, PSE-36, CLFLUSH, MMX, FXSR, SSE,
    /// SSE2, self snoop. APIC and MTRR are ours. Not: serial number, debug store, ACPI thermal, TM, PBE.
    pub const EDX: u32 = bits(&[
        0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26, 27,
    ]);
}

/// Bits of leaf 7.
mod leaf7 {
    use super::bits;

    pub const EBX_TSC_ADJUST: u32 = 1 << 1;
    pub const EBX_AVX512F: u32 = 1 << 16;
    pub const ECX_PKU: u32 = 1 << 3;
    pub const ECX_OSPKE: u32 = 1 << 4;
    pub const ECX_LA57: u32 = 1 << 16;
    pub const EDX_ARCH_CAPABILITIES: u32 = 1 << 29;

    /// FSGSBASE, BMI1, HLE, AVX2, FDP only at exceptions, SMEP, BMI2, ERMS, INVPCID, RTM, FCS and FDS zero,
    /// AVX512F, DQ, RDSEED, ADX, SMAP, IFMA, CLFLUSHOPT, CLWB, CD, SHA, BW, VL. Not: SGX, MPX, resource
    /// monitoring and allocation, processor trace.
    pub const EBX: u32 = bits(&[
        0, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 16, 17, 18, 19, 20, 21, 23, 24, 28, 29, 30, 31,
    ]);
    /// PREFETCHWT1, VBMI, UMIP, PKU, VBMI2, GFNI, VAES, VPCLMULQDQ, VNNI, BITALG, VPOPCNTDQ, LA57, RDPID,
    /// CLDEMOTE, MOVDIRI, MOVDIR64B. Not: WAITPKG, CET, TME, key locker, bus-lock detection, ENQCMD, SGX, PKS.
    pub const ECX: u32 = bits(&[0, 1, 2, 3, 6, 8, 9, 10, 11, 12, 14, 16, 22, 25, 27, 28]);
    /// FSRM, VP2INTERSECT, MD_CLEAR, RTM always aborts, SERIALIZE, TSXLDTRK, FP16, IBRS and IBPB, STIBP, L1D
    /// flush, IA32_ARCH_CAPABILITIES, SSBD. Not: user interrupts, SRBDS control, hybrid, PCONFIG, LBR, CET,
    /// AMX, IA32_CORE_CAPABILITIES.
    pub const EDX: u32 = bits(&[4, 8, 10, 11, 14, 16, 23, 26, 27, 28, 29, 31]);
    /// Subleaf 1: SHA512, SM3, SM4, AVX-VNNI, BF16, CMPCCXADD, fast string operations, AVX-IFMA. Not: LASS,
    /// FRED, LKGS, WRMSRNS, AMX, HRESET, LAM, MSRLIST.
    pub const SUB1_EAX: u32 = bits(&[0, 1, 2, 4, 5, 7, 10, 11, 12, 23]);
    /// Subleaf 1: AVX-VNNI-INT8, AVX-NE-CONVERT, AVX-VNNI-INT16, PREFETCHITI. Not: AMX, AVX10, APX, CET-SSS.
    pub const SUB1_EDX: u32 = bits(&[4, 5, 10, 14]);
    /// Subleaf 2: controls in IA32_SPEC_CTRL, and MCDT_NO.
    pub const SUB2_EDX: u32 = 0x0000_003f;
}

/// XSAVEOPT, XSAVEC, XGETBV with ECX = 1, XSAVES. Not: XFD.
const LEAFD_SUB1_EAX: u32 = 0xf;

/// Bits of the extended leaves.
mod extended {
    use super::bits;

    pub const E1_ECX_CMP_LEGACY: u32 = 1 << 1;
    pub const E1_EDX_SYSCALL: u32 = 1 << 11;
    pub const E7_EDX_INVARIANT_TSC: u32 = 1 << 8;

    /// LAHF, CR8 by LOCK MOV CR0, ABM, SSE4A, misaligned SSE, PREFETCHW, XOP, FMA4, TBM, topology extensions.
    /// Not: SVM, extended APIC space, OSVW, IBS, SKINIT, watchdog, LWP, TCE, performance counters, data
    /// breakpoint extension, MONITORX.
    pub const E1_ECX: u32 = bits(&[0, 4, 5, 6, 7, 8, 11, 16, 21, 22]);
    /// The bits of leaf 1 that AMD repeats, SYSCALL, NX, MMX extensions, 1 GiB pages, RDTSCP, long mode,
    /// 3DNow!. Not: FFXSR.
    pub const E1_EDX: u32 = bits(&[
        0, 1, 2, 3, 4, 5, 6, 7, 8, 13, 14, 15, 16, 17, 20, 22, 23, 24, 26, 27, 29, 30, 31,
    ]);
    /// CLZERO, error pointers always restored, WBNOINVD, IBPB, IBRS, STIBP, their preferences, SSBD, SSB_NO,
    /// PSFD, BTC_NO, IBPB_RET. Not: IRPERF, RDPRU, virtual SSBD.
    pub const E8_EBX: u32 = bits(&[0, 2, 9, 12, 14, 15, 16, 17, 18, 19, 24, 26, 28, 29, 30]);
    /// FP128, MOVU, FP256.
    pub const E1A_EAX: u32 = 0x7;
    /// No nested data breakpoints, LFENCE serialises, null selector clears base, automatic IBRS, no SMM_CTL,
    /// SBPB, IBPB flushes branch types, SRSO_NO.
    pub const E21_EAX: u32 = bits(&[0, 2, 6, 8, 9, 27, 28, 29]);
}

/// What of IA32_ARCH_CAPABILITIES is true for a child too: the statements "not affected" and the buffer-clearing
/// ability. Bits that promise control MSRs are not (TSX_CTRL, MISC_PACKAGE_CTLS, MCU_OPT, ...).
const ARCH_CAPABILITIES: u64 = {
    // RDCL_NO, SSB_NO, MDS_NO, PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO, FBSDP_NO, PSDP_NO.
    let not_affected = bits(&[0, 4, 5, 6, 8, 13, 14, 15]);
    // IBRS_ALL, RSBA, SKIP_L1DFL, FB_CLEAR, RRSBA.
    let behaviour = bits(&[1, 2, 3, 17, 19]);
    // BHI_NO, PBRSB_NO, GDS_NO, RFDS_NO, RFDS_CLEAR.
    let newer = bits(&[20, 24, 26, 27, 28]);
    // ITS_NO.
    (not_affected | behaviour | newer) as u64 | (1 << 62)
};

/// Bits of SYNTHETIC_PROC_FEATURES (`hv_partition_synthetic_processor_features`).
pub mod synthetic {
    /// CPUID says that there is a hypervisor.
    pub const HYPERVISOR_PRESENT: u64 = 1 << 0;
    /// Leaves 4000_0000h to 4000_0006h.
    pub const HV1: u64 = 1 << 1;
    /// HV_X64_MSR_TIME_REF_COUNT.
    pub const REFERENCE_COUNTER: u64 = 1 << 3;
    /// HV_X64_MSR_SCONTROL and the rest of the SynIC.
    pub const SYNIC: u64 = 1 << 4;
    /// HV_X64_MSR_STIMER0_CONFIG and following.
    pub const SYNTHETIC_TIMERS: u64 = 1 << 5;
    /// HV_X64_MSR_EOI, ICR, TPR and VP_ASSIST_PAGE.
    pub const APIC_MSRS: u64 = 1 << 6;
    /// HV_X64_MSR_GUEST_OS_ID and HYPERCALL.
    pub const HYPERCALL_MSRS: u64 = 1 << 7;
    /// HV_X64_MSR_VP_INDEX.
    pub const VP_INDEX: u64 = 1 << 8;
    /// HV_X64_MSR_REFERENCE_TSC.
    pub const REFERENCE_TSC: u64 = 1 << 9;
    /// HV_X64_MSR_TSC_FREQUENCY and APIC_FREQUENCY.
    pub const FREQUENCY_MSRS: u64 = 1 << 11;
    /// HV_X64_MSR_GUEST_IDLE.
    pub const GUEST_IDLE: u64 = 1 << 10;
    /// Synthetic timers that raise interrupts.
    pub const DIRECT_TIMERS: u64 = 1 << 22;
    /// Hypercalls with sparse sets of VPs.
    pub const SPARSE_SETS: u64 = 1 << 24;
    /// Hypercalls that flush translations.
    pub const FLUSHES: u64 = 1 << 25;
    /// Hypercalls that send interrupts.
    pub const CLUSTER_IPI: u64 = 1 << 26;
    /// HvCallSignalEvent.
    pub const SIGNAL_EVENTS: u64 = 1 << 29;
    /// All that a partition can be given.
    pub const ASSIGNABLE: u64 = HYPERVISOR_PRESENT
        | HV1
        | REFERENCE_COUNTER
        | SYNIC
        | SYNTHETIC_TIMERS
        | APIC_MSRS
        | HYPERCALL_MSRS
        | VP_INDEX
        | REFERENCE_TSC
        | FREQUENCY_MSRS
        | GUEST_IDLE
        | DIRECT_TIMERS
        | SPARSE_SETS
        | FLUSHES
        | CLUSTER_IPI
        | SIGNAL_EVENTS;
}

/// Bits of the privilege mask: leaf 4000_0003h EAX and EBX.
pub mod privilege {
    /// HV_X64_MSR_TIME_REF_COUNT.
    pub const TIME_REF_COUNT: u64 = 1 << 1;
    /// HV_X64_MSR_SCONTROL and the rest of the SynIC.
    pub const SYNIC: u64 = 1 << 2;
    /// HV_X64_MSR_STIMER0_CONFIG and following.
    pub const SYNTHETIC_TIMERS: u64 = 1 << 3;
    /// HV_X64_MSR_EOI, ICR, TPR and VP_ASSIST_PAGE.
    pub const APIC_MSRS: u64 = 1 << 4;
    /// HV_X64_MSR_GUEST_OS_ID and HYPERCALL.
    pub const HYPERCALL: u64 = 1 << 5;
    /// HV_X64_MSR_VP_INDEX.
    pub const VP_INDEX: u64 = 1 << 6;
    /// HV_X64_MSR_REFERENCE_TSC.
    pub const REFERENCE_TSC: u64 = 1 << 9;
    /// HV_X64_MSR_GUEST_IDLE.
    pub const GUEST_IDLE: u64 = 1 << 10;
    /// HV_X64_MSR_TSC_FREQUENCY and APIC_FREQUENCY.
    pub const FREQUENCIES: u64 = 1 << 11;
    /// HV_X64_MSR_REENLIGHTENMENT_CONTROL, TSC_EMULATION_CONTROL and STATUS.
    pub const REENLIGHTENMENT: u64 = 1 << 13;
    /// HV_X64_MSR_TSC_INVARIANT_CONTROL.
    pub const TSC_INVARIANT: u64 = 1 << 15;
    /// HvCallPostMessage.
    pub const POST_MESSAGES: u64 = 1 << 36;
    /// HvCallSignalEvent.
    pub const SIGNAL_EVENTS: u64 = 1 << 37;
    /// HvExtCallQueryCapabilities.
    pub const EXTENDED_HYPERCALLS: u64 = 1 << 52;
}

/// Leaf 4000_0003h EDX: frequency MSRs, crash MSRs, timers that raise interrupts.
const FEATURE_FREQUENCIES: u32 = 1 << 8;
const FEATURE_XMM_INPUT: u32 = 1 << 4;
const FEATURE_CRASH: u32 = 1 << 10;
const FEATURE_DIRECT_TIMERS: u32 = 1 << 19;
/// Leaf 4000_0004h EAX: flushes by hypercall; EOI, ICR and TPR by MSR; no watchdog by time; no automatic EOI; interrupts by
/// hypercall; sparse sets of VPs in both.
const HINT_FLUSHES: u32 = 1 << 2;
const HINT_APIC_MSRS: u32 = 1 << 3;
const HINT_RELAXED_TIMING: u32 = 1 << 5;
const HINT_NO_AUTO_EOI: u32 = 1 << 9;
const HINT_CLUSTER_IPI: u32 = 1 << 10;
const HINT_SPARSE_SETS: u32 = 1 << 11;

/// One feature of the banks: bank (2 = XSAVE features) and bit, and where CPUID has it.
struct Feature {
    bank: usize,
    bit: u32,
    leaf: u32,
    subleaf: u32,
    register: usize,
    mask: u32,
}

const fn feature(bank: usize, bit: u32, at: (u32, u32, usize), cpuid_bit: u32) -> Feature {
    let (leaf, subleaf, register) = at;
    Feature {
        bank,
        bit,
        leaf,
        subleaf,
        register,
        mask: 1 << cpuid_bit,
    }
}

const L1C: (u32, u32, usize) = (1, 0, ECX);
const L7B: (u32, u32, usize) = (7, 0, EBX);
const L7C: (u32, u32, usize) = (7, 0, ECX);
const L7D: (u32, u32, usize) = (7, 0, EDX);
const L71A: (u32, u32, usize) = (7, 1, EAX);
const L71D: (u32, u32, usize) = (7, 1, EDX);
const LD1A: (u32, u32, usize) = (0xd, 1, EAX);
const E1C: (u32, u32, usize) = (0x8000_0001, 0, ECX);
const E1D: (u32, u32, usize) = (0x8000_0001, 0, EDX);
const E7D: (u32, u32, usize) = (0x8000_0007, 0, EDX);
const E8B: (u32, u32, usize) = (0x8000_0008, 0, EBX);

/// The features of the banks that CPUID shows (`hv_partition_processor_features` and
/// `hv_partition_processor_xsave_features`), ordered by leaf.
static FEATURES: [Feature; 106] = [
    feature(0, 0, L1C, 0),
    feature(0, 17, L1C, 1),
    feature(0, 2, L1C, 9),
    feature(2, 4, L1C, 12),
    feature(0, 8, L1C, 13),
    feature(0, 18, L1C, 17),
    feature(0, 3, L1C, 19),
    feature(0, 4, L1C, 20),
    feature(0, 29, L1C, 22),
    feature(0, 7, L1C, 23),
    feature(1, 17, L1C, 24),
    feature(0, 16, L1C, 25),
    feature(2, 0, L1C, 26),
    feature(2, 2, L1C, 28),
    feature(0, 20, L1C, 29),
    feature(0, 21, L1C, 30),
    feature(0, 22, L7B, 0),
    feature(1, 18, L7B, 1),
    feature(0, 25, L7B, 3),
    feature(0, 36, L7B, 4),
    feature(2, 3, L7B, 5),
    feature(0, 23, L7B, 7),
    feature(0, 26, L7B, 8),
    feature(0, 24, L7B, 9),
    feature(0, 43, L7B, 10),
    feature(0, 37, L7B, 11),
    feature(0, 31, L7B, 13),
    feature(2, 6, L7B, 16),
    feature(2, 7, L7B, 17),
    feature(0, 32, L7B, 18),
    feature(0, 33, L7B, 19),
    feature(0, 35, L7B, 20),
    feature(2, 15, L7B, 21),
    feature(0, 39, L7B, 23),
    feature(0, 40, L7B, 24),
    feature(2, 8, L7B, 28),
    feature(0, 41, L7B, 29),
    feature(2, 9, L7B, 30),
    feature(2, 10, L7B, 31),
    feature(2, 16, L7C, 1),
    feature(0, 58, L7C, 2),
    feature(2, 17, L7C, 6),
    feature(2, 19, L7C, 8),
    feature(2, 20, L7C, 9),
    feature(2, 22, L7C, 10),
    feature(2, 18, L7C, 11),
    feature(2, 14, L7C, 12),
    feature(2, 21, L7C, 14),
    feature(1, 4, L7C, 16),
    feature(0, 57, L7C, 22),
    feature(1, 15, L7C, 25),
    feature(1, 13, L7C, 27),
    feature(1, 14, L7C, 28),
    feature(0, 49, L7D, 4),
    feature(2, 24, L7D, 8),
    feature(0, 60, L7D, 10),
    feature(1, 16, L7D, 14),
    feature(1, 22, L7D, 16),
    feature(2, 25, L7D, 23),
    feature(0, 44, L7D, 26),
    feature(0, 45, L7D, 27),
    feature(0, 50, L7D, 28),
    feature(0, 48, L7D, 31),
    feature(1, 46, L71A, 0),
    feature(1, 50, L71A, 1),
    feature(1, 51, L71A, 2),
    feature(2, 30, L71A, 4),
    feature(2, 23, L71A, 5),
    feature(1, 40, L71A, 7),
    feature(1, 19, L71A, 10),
    feature(1, 20, L71A, 11),
    feature(1, 21, L71A, 12),
    feature(2, 31, L71A, 23),
    feature(2, 33, L71D, 4),
    feature(2, 32, L71D, 5),
    feature(2, 34, L71D, 10),
    feature(1, 45, L71D, 14),
    feature(2, 1, LD1A, 0),
    feature(2, 11, LD1A, 1),
    feature(2, 13, LD1A, 2),
    feature(2, 12, LD1A, 3),
    feature(0, 1, E1C, 0),
    feature(0, 9, E1C, 4),
    feature(0, 10, E1C, 5),
    feature(0, 5, E1C, 6),
    feature(0, 11, E1C, 7),
    feature(0, 34, E1C, 8),
    feature(0, 6, E1C, 11),
    feature(0, 19, E1C, 16),
    feature(0, 12, E1D, 22),
    feature(0, 15, E1D, 26),
    feature(0, 38, E1D, 27),
    feature(0, 14, E1D, 30),
    feature(0, 13, E1D, 31),
    feature(1, 1, E7D, 8),
    feature(1, 2, E8B, 0),
    feature(0, 42, E8B, 2),
    feature(0, 46, E8B, 12),
    feature(0, 44, E8B, 14),
    feature(0, 45, E8B, 15),
    feature(1, 31, E8B, 17),
    feature(0, 48, E8B, 24),
    feature(0, 54, E8B, 26),
    feature(1, 7, E8B, 28),
    feature(1, 29, E8B, 29),
    feature(1, 30, E8B, 30),
];

/// Bits of IA32_ARCH_CAPABILITIES that the banks have: bank, bit, MSR bit.
const ARCH_FEATURES: [(usize, u32, u32); 14] = [
    (0, 51, 0),
    (0, 52, 1),
    (0, 53, 3),
    (0, 54, 4),
    (0, 55, 2),
    (0, 59, 5),
    (0, 61, 8),
    (1, 25, 13),
    (1, 26, 14),
    (1, 27, 15),
    (1, 28, 17),
    (1, 39, 26),
    (1, 43, 20),
    (1, 48, 27),
];

/// XSAVE features that need AVX: AVX2, FMA, all of AVX-512, the VEX forms that came later.
const NEED_AVX: u64 = (1 << 3) | (1 << 4) | AVX512 | (1 << 20) | (1 << 22) | (0x1f << 30);
/// XSAVE features that need AVX-512F, and that itself.
const AVX512: u64 = (0x1f << 6) | (0x1f << 14) | (1 << 21) | (7 << 23);

/// The disabled banks, with all that depends on what is disabled.
fn disabled(partition: &PartitionState) -> [u64; 3] {
    let [mut bank0, bank1, mut xsave] = partition.disabled;
    if xsave & 1 != 0 {
        xsave = u64::MAX;
    }
    if xsave & (1 << 2) != 0 {
        xsave |= NEED_AVX;
        // XOP, FMA4, F16C.
        bank0 |= (1 << 6) | (1 << 19) | (1 << 20);
    }
    if xsave & (1 << 6) != 0 {
        xsave |= AVX512;
    }
    [bank0, bank1, xsave]
}

/// IA32_ARCH_CAPABILITIES of a child.
#[must_use]
pub fn arch_capabilities(partition: &PartitionState) -> u64 {
    let banks = disabled(partition);
    let mut value = partition.host.arch_capabilities & ARCH_CAPABILITIES;
    for (bank, bit, msr_bit) in ARCH_FEATURES {
        if banks.get(bank).is_some_and(|bank| (bank >> bit) & 1 != 0) {
            value &= !(1 << msr_bit);
        }
    }
    value
}

/// A default and what a registered result may set beyond it.
#[derive(Clone, Copy, Default)]
struct Answer {
    value: Registers,
    free: Registers,
}

impl Answer {
    /// Features: nothing beyond the default.
    fn fixed(value: Registers) -> Self {
        Self {
            value,
            free: [0; 4],
        }
    }

    /// Description of the model: free to choose.
    fn free(value: Registers) -> Self {
        Self {
            value,
            free: [u32::MAX; 4],
        }
    }

    /// A result that was registered, cut to what is allowed.
    fn cut(&self, leaf: u32, given: Registers) -> Registers {
        let mut out = [0; 4];
        let allowed = self.value.iter().zip(self.free);
        for ((out, given), (value, free)) in out.iter_mut().zip(given).zip(allowed) {
            *out = given & (value | free);
        }
        if leaf == 0x8000_0008 {
            let [limit, ..] = self.value;
            let [given, ..] = given;
            let [eax, ..] = &mut out;
            *eax = at_most(given, limit);
        }
        out
    }
}

/// Address widths, one per byte: the smaller ones; 0 is "as usual".
fn at_most(given: u32, limit: u32) -> u32 {
    let [physical, linear, guest, _] = given.to_le_bytes();
    let [max_physical, max_linear, ..] = limit.to_le_bytes();
    let width = |value: u8, max: u8| if value == 0 { max } else { value.min(max) };
    u32::from_le_bytes([
        width(physical, max_physical),
        width(linear, max_linear),
        guest.min(max_physical),
        0,
    ])
}

/// Processors of a socket, and the bits that their numbers take.
fn socket(partition: &PartitionState) -> (u32, u32) {
    let count = match u32::try_from(partition.processors_per_socket) {
        Ok(0) | Err(_) => partition.vps,
        Ok(count) => count,
    }
    .clamp(1, MAX_VPS);
    (count, count.next_power_of_two().trailing_zeros())
}

fn has_subleaves(leaf: u32) -> bool {
    matches!(leaf, 4 | 7 | 0xb | 0xd | 0x1f | 0x8000_001d)
}

/// The default of a leaf, without what mirrors registers.
fn default(
    leaf: u32,
    subleaf: u32,
    host: &impl Fn(u32, u32) -> Registers,
    partition: &PartitionState,
) -> Answer {
    let first = leaf & 0x8000_0000;
    if leaf != first && leaf > 1 {
        // Beyond the last leaf processors answer what they like (SDM, CPUID).
        let [last, ..] = host(first, 0);
        if leaf > last {
            return Answer::default();
        }
    }
    let mut answer = unfiltered(leaf, subleaf, host, partition);
    let banks = disabled(partition);
    for feature in &FEATURES {
        if feature.leaf == leaf
            && (feature.subleaf == subleaf || !has_subleaves(leaf))
            && banks
                .get(feature.bank)
                .is_some_and(|bank| (bank >> feature.bit) & 1 != 0)
        {
            if let Some(register) = answer.value.get_mut(feature.register) {
                *register &= !feature.mask;
            }
        }
    }
    answer
}

fn unfiltered(
    leaf: u32,
    subleaf: u32,
    host: &impl Fn(u32, u32) -> Registers,
    partition: &PartitionState,
) -> Answer {
    let [a, b, c, d] = host(leaf, if has_subleaves(leaf) { subleaf } else { 0 });
    let (count, shift) = socket(partition);
    let intel = partition.host.vendor == Vendor::Vmx;
    match leaf {
        0 => Answer::free([a.min(MAX_BASIC), b, c, d]),
        1 => {
            let mut ecx = c & leaf1::ECX;
            if partition.creation_flags & creation::LAPIC_ENABLED != 0 {
                ecx |= leaf1::ECX_TSC_DEADLINE;
            }
            if partition.creation_flags & creation::X2APIC_CAPABLE != 0 {
                ecx |= leaf1::ECX_X2APIC;
            }
            let mut edx = d & leaf1::EDX | leaf1::EDX_MTRR | leaf1::EDX_APIC;
            if count > 1 {
                edx |= leaf1::EDX_HTT;
            }
            // Line size of CLFLUSH and number of APIC ids; the initial APIC id comes later.
            let ebx = b & 0xff00 | ((1_u32 << shift).min(0xff) << 16);
            Answer {
                value: [a, ebx, ecx, edx],
                free: [u32::MAX, u32::MAX, 0, leaf1::EDX_HTT],
            }
        }
        2 => Answer::free([a, b, c, d]),
        4 => {
            // Type 0 ends the list. One thread per core: only the last level is shared.
            if a & 0x1f == 0 {
                return Answer::default();
            }
            let ids = (1_u32 << shift).wrapping_sub(1);
            let sharing = if (a >> 5) & 7 >= 3 { ids & 0xfff } else { 0 };
            let eax = a & 0x3fff | (sharing << 14) | ((ids & 0x3f) << 26);
            Answer::free([eax, b, c, d])
        }
        // The APIC timer runs in all C-states: there are none.
        6 => Answer::fixed([1 << 2, 0, 0, 0]),
        7 => match subleaf {
            0 => {
                let mut edx = d & leaf7::EDX;
                if partition.host.arch_capabilities == 0 {
                    edx &= !leaf7::EDX_ARCH_CAPABILITIES;
                }
                let ebx = b & leaf7::EBX | leaf7::EBX_TSC_ADJUST;
                Answer {
                    value: [a.min(2), ebx, c & leaf7::ECX, edx],
                    free: [3, 0, 0, 0],
                }
            }
            1 => Answer::fixed([a & leaf7::SUB1_EAX, 0, 0, d & leaf7::SUB1_EDX]),
            2 => Answer::fixed([0, 0, 0, d & leaf7::SUB2_EDX]),
            _ => Answer::default(),
        },
        0xb | 0x1f => Answer::free(match subleaf {
            // No bits for threads: there is one per core.
            0 => [0, 1, 1 << 8, 0],
            1 => [shift, count, (2 << 8) | 1, 0],
            _ => [0, 0, subleaf & 0xff, 0],
        }),
        0xd => {
            let states = allowed_xcr0(host, partition);
            match subleaf {
                _ if states == 0 => Answer::default(),
                0 => Answer::fixed([states as u32, 0, 0, (states >> 32) as u32]),
                1 => Answer::fixed([a & LEAFD_SUB1_EAX, 0, 0, 0]),
                2..=62 if (states >> subleaf) & 1 != 0 => Answer::fixed([a, b, c & 2, 0]),
                _ => Answer::default(),
            }
        }
        // TSC and crystal, frequencies.
        0x15 => Answer::free([a, b, c, 0]),
        0x16 => Answer::free([a, b, c, 0]),
        0x8000_0000 => Answer::free([a.min(MAX_EXTENDED), b, c, d]),
        0x8000_0001 => {
            let mut edx = d & extended::E1_EDX | extended::E1_EDX_SYSCALL;
            let mut ecx = c & extended::E1_ECX;
            if !intel {
                edx |= leaf1::EDX_MTRR | leaf1::EDX_APIC;
                if count > 1 {
                    ecx |= extended::E1_ECX_CMP_LEGACY;
                }
            }
            Answer {
                value: [a, b, ecx, edx],
                free: [u32::MAX, u32::MAX, extended::E1_ECX_CMP_LEGACY, 0],
            }
        }
        // Name; caches and TLBs.
        0x8000_0002..=0x8000_0006 | 0x8000_0019 => Answer::free([a, b, c, d]),
        0x8000_0007 => Answer::fixed([0, 0, 0, d & extended::E7_EDX_INVARIANT_TSC]),
        0x8000_0008 => {
            let physical = (a & 0xff).min(MAX_PHYSICAL_BITS);
            let [_, _, seven, _] = default(7, 0, host, partition).value;
            let linear = if seven & leaf7::ECX_LA57 != 0 { 57 } else { 48 };
            let (ebx, ecx) = if intel {
                (b & extended::E8_EBX & (1 << 9), 0)
            } else {
                (b & extended::E8_EBX, count.wrapping_sub(1) | (shift << 12))
            };
            Answer {
                value: [physical | (linear << 8), ebx, ecx, 0],
                free: [0, 0, 0xf0ff, 0],
            }
        }
        0x8000_001a => Answer::fixed([a & extended::E1A_EAX, 0, 0, 0]),
        0x8000_001d if a & 0x1f != 0 => {
            let sharing = if (a >> 5) & 7 >= 3 {
                (1_u32 << shift).wrapping_sub(1) & 0xfff
            } else {
                0
            };
            Answer::free([a & 0x3fff | (sharing << 14), b, c, d])
        }
        // Core id and node; the APIC id comes later.
        0x8000_001e if !intel => Answer::free([0; 4]),
        0x8000_0021 => Answer::fixed([a & extended::E21_EAX, 0, 0, 0]),
        _ => Answer::default(),
    }
}

// ---- extended state -----------------------------------------------------------------------------------

/// XCR0 that the partition's VPs can have.
fn allowed_xcr0(host: &impl Fn(u32, u32) -> Registers, partition: &PartitionState) -> u64 {
    let [_, _, one, _] = default(1, 0, host, partition).value;
    if one & leaf1::ECX_XSAVE == 0 {
        return 0;
    }
    let [low, _, _, high] = host(0xd, 0);
    let mut states = 3;
    if one & leaf1::ECX_AVX != 0 {
        states |= 1 << 2;
    }
    let [_, ebx, ecx, _] = default(7, 0, host, partition).value;
    if ebx & leaf7::EBX_AVX512F != 0 {
        states |= 7 << 5;
    }
    if ecx & leaf7::ECX_PKU != 0 {
        states |= 1 << 9;
    }
    states &= (u64::from(low) | (u64::from(high) << 32)) & partition.host.xcr0 & XCR0_BITS;
    if states & 0xe4 != 0xe4 {
        states &= !0xe0;
    }
    states
}

/// The processor's size, offset and compacted alignment of each component in `states` beyond the legacy
/// region (SDM vol 1, 13.5).
fn components(
    host: &impl Fn(u32, u32) -> Registers,
    states: u64,
) -> impl Iterator<Item = (u32, u32, bool)> + '_ {
    XSAVE_COMPONENTS
        .into_iter()
        .filter(move |bit| (states >> bit) & 1 != 0)
        .map(|bit| {
            let [size, offset, flags, _] = host(0xd, bit);
            (size, offset, flags & 2 != 0)
        })
}

/// Bytes of the standard form for `states`.
fn standard_size(host: &impl Fn(u32, u32) -> Registers, states: u64) -> u32 {
    components(host, states)
        .map(|(size, offset, _)| offset.saturating_add(size))
        .fold(XSAVE_HEADER_END, u32::max)
}

/// Bytes of the compacted form for `states`.
fn compacted_size(host: &impl Fn(u32, u32) -> Registers, states: u64) -> u32 {
    components(host, states).fold(XSAVE_HEADER_END, |end, (size, _, aligned)| {
        let start = if aligned {
            end.saturating_add(63) & !63
        } else {
            end
        };
        start.saturating_add(size)
    })
}

// ---- registered results --------------------------------------------------------------------------------

/// Results that fit into [`Overrides`].
pub const MAX_OVERRIDES: usize = 92;

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Override {
    leaf: u32,
    subleaf: u32,
    /// [`SUBLEAF_SPECIFIC`], [`CUT`].
    flags: u32,
    value: Registers,
    mask: Registers,
}

/// The result is for one subleaf.
const SUBLEAF_SPECIFIC: u32 = 1;
/// The value was cut to what is allowed when it was registered.
const CUT: u32 = 2;

/// A result to register (`HV_REGISTER_X64_CPUID_RESULT_PARAMETERS`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidResult {
    /// EAX of the guest.
    pub leaf: u32,
    /// ECX of the guest, if `subleaf_specific`.
    pub subleaf: u32,
    /// For this subleaf only.
    pub subleaf_specific: bool,
    /// EAX, EBX, ECX, EDX: value and mask.
    pub result: [[u32; 2]; 4],
}

/// The results that the VMM registered for a VP: one page. A page of zeros is an empty one.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Overrides {
    count: u32,
    reserved: u32,
    entries: [Override; MAX_OVERRIDES],
}

const _: () = assert!(core::mem::size_of::<Overrides>() <= 4096);

impl Default for Overrides {
    fn default() -> Self {
        Self::new()
    }
}

impl Overrides {
    /// None.
    #[must_use]
    pub const fn new() -> Self {
        const NONE: Override = Override {
            leaf: 0,
            subleaf: 0,
            flags: 0,
            value: [0; 4],
            mask: [0; 4],
        };
        Self {
            count: 0,
            reserved: 0,
            entries: [NONE; MAX_OVERRIDES],
        }
    }

    fn entries(&self) -> &[Override] {
        self.entries
            .get(..self.count as usize)
            .unwrap_or(&self.entries)
    }

    /// The result for a subleaf before that for the whole leaf.
    fn find(&self, leaf: u32, subleaf: u32) -> Option<&Override> {
        let mut whole = None;
        for entry in self.entries() {
            if entry.leaf == leaf {
                if entry.flags & SUBLEAF_SPECIFIC == 0 {
                    whole = Some(entry);
                } else if entry.subleaf == subleaf {
                    return Some(entry);
                }
            }
        }
        whole
    }

    /// Registers a result; one for the same leaf is replaced. What cannot have an effect is not stored:
    /// VMMs register every leaf that there is.
    ///
    /// # Errors
    ///
    /// NO_RESOURCES if the table is full.
    pub fn register(
        &mut self,
        new: &CpuidResult,
        host: &impl Fn(u32, u32) -> Registers,
        partition: &PartitionState,
    ) -> Result<(), HvStatus> {
        let whole = !new.subleaf_specific && has_subleaves(new.leaf);
        let mut entry = Override {
            leaf: new.leaf,
            subleaf: new.subleaf,
            flags: if new.subleaf_specific && has_subleaves(new.leaf) {
                SUBLEAF_SPECIFIC
            } else {
                0
            },
            value: new.result.map(|[value, _]| value),
            mask: new.result.map(|[_, mask]| mask),
        };
        if !whole {
            let subleaf = if has_subleaves(new.leaf) {
                new.subleaf
            } else {
                0
            };
            let answer = default(new.leaf, subleaf, host, partition);
            if answer.value == [0; 4] && answer.free == [0; 4] {
                return Ok(());
            }
            entry.value = answer.cut(new.leaf, entry.value);
            entry.flags |= CUT;
        }
        let same = |old: &Override| {
            old.leaf == entry.leaf
                && (old.flags ^ entry.flags) & SUBLEAF_SPECIFIC == 0
                && (entry.flags & SUBLEAF_SPECIFIC == 0 || old.subleaf == entry.subleaf)
        };
        let count = self.count as usize;
        let place = self.entries().iter().position(same).unwrap_or(count);
        *self.entries.get_mut(place).ok_or(HvStatus::NO_RESOURCES)? = entry;
        if place == count {
            self.count = self.count.saturating_add(1);
        }
        Ok(())
    }

    /// The default of a leaf with the registered results applied. Protection keys are state of XSAVE: a VMM that takes that away
    /// takes them along, also if it says nothing about leaf 7, as QEMU for processor models that have none of its features.
    fn apply(
        &self,
        leaf: u32,
        subleaf: u32,
        host: &impl Fn(u32, u32) -> Registers,
        partition: &PartitionState,
    ) -> Registers {
        let [a, b, mut c, d] = self.apply_own(leaf, subleaf, host, partition);
        if (leaf, subleaf) == (7, 0) && c & leaf7::ECX_PKU != 0 {
            let [_, _, one, _] = self.apply_own(1, 0, host, partition);
            if one & leaf1::ECX_XSAVE == 0 {
                c &= !leaf7::ECX_PKU;
            }
        }
        [a, b, c, d]
    }

    /// The default of a leaf with the result that was registered for it.
    fn apply_own(
        &self,
        leaf: u32,
        subleaf: u32,
        host: &impl Fn(u32, u32) -> Registers,
        partition: &PartitionState,
    ) -> Registers {
        let Some(entry) = self.find(leaf, subleaf) else {
            return default(leaf, subleaf, host, partition).value;
        };
        let whole = entry.mask == [u32::MAX; 4];
        if whole && entry.flags & CUT != 0 {
            return entry.value;
        }
        let answer = default(leaf, subleaf, host, partition);
        let given = if entry.flags & CUT != 0 {
            entry.value
        } else {
            answer.cut(leaf, entry.value)
        };
        let mut out = answer.value;
        for ((out, given), mask) in out.iter_mut().zip(given).zip(entry.mask) {
            *out = given & mask | *out & !mask;
        }
        out
    }
}

// ---- the guest's view -----------------------------------------------------------------------------------

/// What CPUID in a VP depends on.
#[derive(Clone, Copy)]
pub struct Guest<'a> {
    /// CR4 as the guest sees it.
    pub cr4: u64,
    /// XCR0.
    pub xcr0: u64,
    /// IA32_XSS.
    pub xss: u64,
    /// In 64-bit mode.
    pub long: bool,
    /// x2APIC id.
    pub apic_id: u32,
    /// The APIC is enabled in IA32_APIC_BASE.
    pub apic: bool,
    /// Its partition.
    pub partition: &'a PartitionState,
    /// Registered results; `None` to see the defaults.
    pub overrides: Option<&'a Overrides>,
}

impl<'a> Guest<'a> {
    /// From the state of a VP.
    #[must_use]
    pub fn of(
        vp: &VpState,
        apic: &LocalApic,
        partition: &'a PartitionState,
        overrides: Option<&'a Overrides>,
    ) -> Self {
        Self {
            cr4: vp.cr4,
            xcr0: vp.xcr0,
            xss: vp.xss,
            long: is_long(vp),
            apic_id: apic.id(),
            apic: apic.mode() != Mode::Disabled,
            partition,
            overrides,
        }
    }
}

/// In 64-bit mode: long mode active and CS.L.
pub(crate) fn is_long(vp: &VpState) -> bool {
    let [_, code, ..] = &vp.segments;
    const { assert!(segment::CS == 1) };
    vp.efer & efer::LMA != 0 && code.rights & (1 << 13) != 0
}

/// CPUID in a VP: EAX, EBX, ECX, EDX. `host` executes CPUID.
pub fn cpuid(
    leaf: u32,
    subleaf: u32,
    host: &impl Fn(u32, u32) -> Registers,
    guest: &Guest<'_>,
) -> Registers {
    let partition = guest.partition;
    if leaf >> 28 == 4 {
        return hypervisor_leaf(leaf, host, partition);
    }
    let [mut a, mut b, mut c, mut d] = match guest.overrides {
        Some(overrides) => overrides.apply(leaf, subleaf, host, partition),
        None => default(leaf, subleaf, host, partition).value,
    };
    match (leaf, subleaf) {
        (1, _) => {
            b = b & 0x00ff_ffff | (guest.apic_id << 24);
            c &= !(leaf1::ECX_OSXSAVE | leaf1::ECX_HYPERVISOR);
            if guest.cr4 & cr4::OSXSAVE != 0 {
                c |= leaf1::ECX_OSXSAVE;
            }
            if partition.synthetic_features & synthetic::HYPERVISOR_PRESENT != 0 {
                c |= leaf1::ECX_HYPERVISOR;
            }
            if !guest.apic {
                d &= !leaf1::EDX_APIC;
            }
        }
        (7, 0) => {
            c &= !leaf7::ECX_OSPKE;
            if guest.cr4 & cr4::PKE != 0 {
                c |= leaf7::ECX_OSPKE;
            }
        }
        (0xb | 0x1f, _) if c != 0 => d = guest.apic_id,
        (0xd, 0) if a != 0 => {
            b = standard_size(host, guest.xcr0);
            c = standard_size(host, u64::from(a) | (u64::from(d) << 32));
        }
        (0xd, 1) if a != 0 => b = compacted_size(host, guest.xcr0 | guest.xss),
        (0x8000_0001, _) => {
            if partition.host.vendor == Vendor::Vmx && !guest.long {
                d &= !extended::E1_EDX_SYSCALL;
            }
            if !guest.apic {
                d &= !leaf1::EDX_APIC;
            }
        }
        (0x8000_001e, _) if partition.host.vendor == Vendor::Svm => a = guest.apic_id,
        _ => {}
    }
    [a, b, c, d]
}

fn words(text: &[u8; 12]) -> [u32; 3] {
    let [a, b, c, d, e, f, g, h, i, j, k, l] = *text;
    [[a, b, c, d], [e, f, g, h], [i, j, k, l]].map(u32::from_le_bytes)
}

/// The privilege mask: what MSRs and calls the partition has (leaf 4000_0003h EAX and EBX).
#[must_use]
pub fn privileges(features: u64, invariant_tsc: bool) -> u64 {
    const MAP: [(u64, u64); 11] = [
        (synthetic::GUEST_IDLE, privilege::GUEST_IDLE),
        (synthetic::REFERENCE_COUNTER, privilege::TIME_REF_COUNT),
        (synthetic::SYNIC, privilege::SYNIC),
        (synthetic::SYNTHETIC_TIMERS, privilege::SYNTHETIC_TIMERS),
        (synthetic::APIC_MSRS, privilege::APIC_MSRS),
        (synthetic::HYPERCALL_MSRS, privilege::HYPERCALL),
        (synthetic::VP_INDEX, privilege::VP_INDEX),
        (synthetic::REFERENCE_TSC, privilege::REFERENCE_TSC),
        (synthetic::FREQUENCY_MSRS, privilege::FREQUENCIES),
        (synthetic::SYNIC, privilege::POST_MESSAGES),
        (synthetic::SIGNAL_EVENTS, privilege::SIGNAL_EVENTS),
    ];
    if features & synthetic::HV1 == 0 {
        return 0;
    }
    let mut mask = privilege::REENLIGHTENMENT | privilege::EXTENDED_HYPERCALLS;
    if invariant_tsc {
        mask |= privilege::TSC_INVARIANT;
    }
    for (feature, privilege) in MAP {
        if features & feature != 0 {
            mask |= privilege;
        }
    }
    mask
}

/// Leaves 4000_0000h and following (TLFS 2.4). Those above the last read zero: Linux looks at some of them
/// without asking.
fn hypervisor_leaf(
    leaf: u32,
    host: &impl Fn(u32, u32) -> Registers,
    partition: &PartitionState,
) -> Registers {
    let features = partition.synthetic_features;
    if features & synthetic::HV1 == 0 {
        return [0; 4];
    }
    match leaf {
        0x4000_0000 => {
            let [b, c, d] = words(b"Microsoft Hv");
            [MAX_HYPERVISOR, b, c, d]
        }
        0x4000_0001 => [u32::from_le_bytes(*b"Hv#1"), 0, 0, 0],
        0x4000_0002 => {
            let (major, minor, build) = VERSION;
            [build, (major << 16) | minor, 0, 0]
        }
        0x4000_0003 => {
            let [.., edx] = default(0x8000_0007, 0, host, partition).value;
            let mask = privileges(features, edx & extended::E7_EDX_INVARIANT_TSC != 0);
            let mut d = FEATURE_CRASH;
            if mask & privilege::FREQUENCIES != 0 {
                d |= FEATURE_FREQUENCIES;
            }
            if mask & privilege::SYNTHETIC_TIMERS != 0 && features & synthetic::DIRECT_TIMERS != 0 {
                d |= FEATURE_DIRECT_TIMERS;
            }
            if mask & privilege::HYPERCALL != 0 {
                d |= FEATURE_XMM_INPUT;
            }
            [mask as u32, (mask >> 32) as u32, 0, d]
        }
        0x4000_0004 => {
            let mut hints = HINT_RELAXED_TIMING | HINT_NO_AUTO_EOI;
            if features & synthetic::APIC_MSRS != 0 {
                hints |= HINT_APIC_MSRS;
            }
            for (feature, hint) in [
                (synthetic::FLUSHES, HINT_FLUSHES),
                (synthetic::CLUSTER_IPI, HINT_CLUSTER_IPI),
                (synthetic::SPARSE_SETS, HINT_SPARSE_SETS),
            ] {
                if features & feature != 0 {
                    hints |= hint;
                }
            }
            // Spin locks: never report a long wait.
            [hints, u32::MAX, 0, 0]
        }
        0x4000_0005 => [MAX_VPS, MAX_VPS, 0, 0],
        // MSR bitmaps and second-level translation are in use.
        0x4000_0006 => [(1 << 1) | (1 << 3), 0, 0, 0],
        _ => [0; 4],
    }
}

// ---- features in the form that checks need -------------------------------------------------------------

/// What a VP's CPUID allows in its registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Bits of CR4 that can be set.
    pub cr4: u64,
    /// Bits of EFER that can be set.
    pub efer: u64,
    /// Bits of XCR0 that can be set.
    pub xcr0: u64,
    /// Bits of IA32_SPEC_CTRL that can be set; 0 without the MSR.
    pub spec_ctrl: u64,
    /// Bits of IA32_PRED_CMD that can be written; 0 without the MSR.
    pub pred_cmd: u64,
    /// IA32_ARCH_CAPABILITIES; `None` without the MSR.
    pub arch_capabilities: Option<u64>,
    /// MAXPHYADDR.
    pub physical_bits: u8,
    /// Bits of a linear address: what MSRs check, whatever CR4.LA57 is.
    pub linear_bits: u8,
    /// IA32_FLUSH_CMD exists.
    pub flush_cmd: bool,
    /// IA32_TSC_AUX exists.
    pub tsc_aux: bool,
    /// IA32_TSC_ADJUST exists.
    pub tsc_adjust: bool,
    /// IA32_XSS exists.
    pub xss: bool,
    /// The TSC is invariant.
    pub invariant_tsc: bool,
}

impl Features {
    /// A processor without any, for a VP whose CPUID is not known yet.
    pub const NONE: Self = Self {
        cr4: 0,
        efer: 0,
        xcr0: 1,
        spec_ctrl: 0,
        pred_cmd: 0,
        arch_capabilities: None,
        physical_bits: 36,
        linear_bits: 48,
        flush_cmd: false,
        tsc_aux: false,
        tsc_adjust: false,
        xss: false,
        invariant_tsc: false,
    };

    /// Of a VP with these registered results.
    pub fn of(
        host: &impl Fn(u32, u32) -> Registers,
        partition: &PartitionState,
        overrides: &Overrides,
    ) -> Self {
        let guest = |leaf, subleaf| overrides.apply(leaf, subleaf, host, partition);
        let [max, ..] = guest(0x8000_0000, 0);
        let high = |leaf| if leaf <= max { guest(leaf, 0) } else { [0; 4] };
        let [_, _, c1, d1] = guest(1, 0);
        let [max7, b7, c7, d7] = guest(7, 0);
        let [.., d72] = if max7 >= 2 { guest(7, 2) } else { [0; 4] };
        let [_, _, _, de1] = high(0x8000_0001);
        let [.., de7] = high(0x8000_0007);
        let [ae8, be8, ..] = high(0x8000_0008);
        let [ae21, ..] = high(0x8000_0021);
        let [xcr0_low, _, _, xcr0_high] = guest(0xd, 0);
        let [ad1, ..] = guest(0xd, 1);
        let xsave = c1 & leaf1::ECX_XSAVE != 0;
        let when = |there: bool, bits: u64| if there { bits } else { 0 };
        let bit = |register: u32, number: u32| (register >> number) & 1 != 0;

        // TSD, MCE, PCE, OSFXSR, OSXMMEXCPT: every processor with long mode has them.
        let mut cr4_bits = (1 << 2) | cr4::MCE | (1 << 8) | (1 << 9) | (1 << 10);
        cr4_bits |= when(bit(d1, 1), 3);
        cr4_bits |= when(bit(d1, 2), 1 << 3);
        cr4_bits |= when(bit(d1, 3), 1 << 4);
        cr4_bits |= when(bit(d1, 6), cr4::PAE);
        cr4_bits |= when(bit(d1, 13), cr4::PGE);
        cr4_bits |= when(bit(c7, 2), 1 << 11);
        cr4_bits |= when(bit(c7, 16), cr4::LA57);
        cr4_bits |= when(bit(b7, 0), 1 << 16);
        cr4_bits |= when(bit(c1, 17), cr4::PCIDE);
        cr4_bits |= when(xsave, cr4::OSXSAVE);
        cr4_bits |= when(bit(b7, 7), cr4::SMEP);
        cr4_bits |= when(bit(b7, 20), cr4::SMAP);
        cr4_bits |= when(c7 & leaf7::ECX_PKU != 0, cr4::PKE);

        let long = bit(de1, 29);
        let mut efer_bits = when(long, efer::LME | efer::LMA);
        efer_bits |= when(long || bit(de1, 11), 1);
        efer_bits |= when(bit(de1, 20), efer::NXE);
        efer_bits |= when(bit(ae21, 8), 1 << 21);

        let mut spec_ctrl = when(bit(d7, 26) || bit(be8, 14), 1);
        spec_ctrl |= when(bit(d7, 27) || bit(be8, 15), 1 << 1);
        spec_ctrl |= when(bit(d7, 31) || bit(be8, 24), 1 << 2);
        spec_ctrl |= when(bit(d72, 0) || bit(be8, 28), 1 << 7);
        spec_ctrl |= when(bit(d72, 1), 3 << 3);
        spec_ctrl |= when(bit(d72, 2), 3 << 5);
        spec_ctrl |= when(bit(d72, 3), 1 << 8);
        spec_ctrl |= when(bit(d72, 4), 1 << 10);

        let [physical, linear, ..] = ae8.to_le_bytes();
        Self {
            cr4: cr4_bits,
            efer: efer_bits,
            xcr0: when(xsave, u64::from(xcr0_low) | (u64::from(xcr0_high) << 32)) | 1,
            spec_ctrl,
            pred_cmd: when(bit(d7, 26) || bit(be8, 12), 1) | when(bit(ae21, 27), 1 << 7),
            arch_capabilities: bit(d7, 29).then(|| arch_capabilities(partition)),
            physical_bits: if physical == 0 { 36 } else { physical },
            linear_bits: if bit(c7, 16) && linear >= 57 { 57 } else { 48 },
            flush_cmd: bit(d7, 28),
            tsc_aux: bit(de1, 27) || bit(c7, 22),
            tsc_adjust: b7 & leaf7::EBX_TSC_ADJUST != 0,
            xss: xsave && bit(ad1, 3),
            invariant_tsc: bit(de7, 8),
        }
    }

    /// Whether bit 63 to the last bit of a linear address are equal.
    #[must_use]
    pub fn is_canonical(&self, address: u64) -> bool {
        let unused = 64_u32.saturating_sub(self.linear_bits.into());
        ((address << unused) as i64 >> unused) as u64 == address
    }

    /// Whether a physical address is below MAXPHYADDR.
    #[must_use]
    pub fn is_physical(&self, address: u64) -> bool {
        address.checked_shr(self.physical_bits.into()).unwrap_or(0) == 0
    }
}

// ---- partition properties ------------------------------------------------------------------------------

/// Bank 0 or 1 of the processor features, or 2 for the XSAVE features, that the partition has.
fn bank(number: usize, host: &impl Fn(u32, u32) -> Registers, partition: &PartitionState) -> u64 {
    let mut bank = 0_u64;
    let mut last = (0, 0);
    let mut answer = [0; 4];
    for feature in FEATURES.iter().filter(|feature| feature.bank == number) {
        if last != (feature.leaf, feature.subleaf) {
            last = (feature.leaf, feature.subleaf);
            answer = default(feature.leaf, feature.subleaf, host, partition).value;
        }
        let there = answer
            .get(feature.register)
            .is_some_and(|register| register & feature.mask != 0);
        if there {
            bank |= 1 << feature.bit;
        }
    }
    let capabilities = arch_capabilities(partition);
    for (_, bit, msr_bit) in ARCH_FEATURES.iter().filter(|(bank, ..)| *bank == number) {
        bank |= ((capabilities >> msr_bit) & 1) << bit;
    }
    bank
}

/// A property of the processor: GET_PARTITION_PROPERTY of the root.
///
/// # Errors
///
/// As for [`get_property`].
pub fn host_property(
    code: u32,
    host: &impl Fn(u32, u32) -> Registers,
    facts: HostFacts,
    host_tsc: u64,
) -> Result<u64, HvStatus> {
    let mut all = PartitionState::new(facts, host_tsc);
    all.creation_flags = creation::LAPIC_ENABLED | creation::X2APIC_CAPABLE;
    all.synthetic_features = synthetic::ASSIGNABLE;
    get_property(code, host, &all, host_tsc)
}

/// GET_PARTITION_PROPERTY.
///
/// # Errors
///
/// UNKNOWN_PROPERTY.
pub fn get_property(
    code: u32,
    host: &impl Fn(u32, u32) -> Registers,
    partition: &PartitionState,
    host_tsc: u64,
) -> Result<u64, HvStatus> {
    Ok(match code {
        property::PRIVILEGE_FLAGS => {
            let [.., edx] = default(0x8000_0007, 0, host, partition).value;
            let invariant = edx & extended::E7_EDX_INVARIANT_TSC != 0;
            privileges(partition.synthetic_features, invariant)
        }
        property::SYNTHETIC_PROC_FEATURES => partition.synthetic_features,
        property::TIME_FREEZE => partition.frozen_at.is_some().into(),
        property::REFERENCE_TIME => reference_time(host_tsc, partition),
        property::PROCESSORS_PER_SOCKET => partition.processors_per_socket,
        property::GPA_PAGE_ACCESS_TRACKING => partition.access_tracking.into(),
        property::UNIMPLEMENTED_MSR_ACTION => partition.ignore_unknown_msrs.into(),
        property::PROCESSOR_VENDOR => match partition.host.vendor {
            Vendor::Svm => 0,
            Vendor::Vmx => 1,
        },
        property::PROCESSOR_XSAVE_FEATURES => bank(2, host, partition),
        property::PHYSICAL_ADDRESS_WIDTH => {
            let [eax, ..] = default(0x8000_0008, 0, host, partition).value;
            (eax & 0xff).into()
        }
        property::XSAVE_STATES => allowed_xcr0(host, partition),
        property::MAX_XSAVE_DATA_SIZE => {
            let states = allowed_xcr0(host, partition);
            compacted_size(host, states).into()
        }
        property::PROCESSOR_CLOCK_FREQUENCY => partition.tsc_hz,
        property::PROCESSOR_FEATURES0 => bank(0, host, partition),
        property::PROCESSOR_FEATURES1 => bank(1, host, partition),
        _ => return Err(HvStatus::UNKNOWN_PROPERTY),
    })
}

/// GET_PARTITION_PROPERTY_EX of what is longer than a word: the words and how many of them count.
///
/// # Errors
///
/// ACCESS_DENIED for the VMM capabilities, which clients take for "none"; UNKNOWN_PROPERTY.
pub fn property_ex(code: u32) -> Result<([u64; 2], usize), HvStatus> {
    match code {
        // The number of banks, then the bank.
        property::ASSIGNABLE_SYNTHETIC_PROC_FEATURES => Ok(([1, synthetic::ASSIGNABLE], 2)),
        property::VMM_CAPABILITIES => Err(HvStatus::ACCESS_DENIED),
        _ => Err(HvStatus::UNKNOWN_PROPERTY),
    }
}

fn flag(value: u64) -> Result<bool, HvStatus> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(HvStatus::PROPERTY_VALUE_OUT_OF_RANGE),
    }
}

/// SET_PARTITION_PROPERTY. `initialized`: INITIALIZE_PARTITION is behind.
///
/// Synthetic features that a partition cannot have are stored as asked for, and not offered to the guest.
///
/// # Errors
///
/// INVALID_PARTITION_STATE if it is too late for the property, OPERATION_DENIED if it cannot be set,
/// PROPERTY_VALUE_OUT_OF_RANGE, UNKNOWN_PROPERTY.
pub fn set_property(
    code: u32,
    value: u64,
    initialized: bool,
    partition: &mut PartitionState,
    host_tsc: u64,
) -> Result<Effect, HvStatus> {
    match code {
        property::PRIVILEGE_FLAGS | property::SYNTHETIC_PROC_FEATURES if initialized => {
            return Err(HvStatus::INVALID_PARTITION_STATE);
        }
        property::SYNTHETIC_PROC_FEATURES => partition.synthetic_features = value,
        property::TIME_FREEZE => return Ok(freeze(flag(value)?, partition, host_tsc)),
        property::REFERENCE_TIME => {
            set_reference_time(value, partition, host_tsc);
            return Ok(Effect::ReferenceTime);
        }
        property::PROCESSORS_PER_SOCKET => {
            if value > MAX_VPS.into() {
                return Err(HvStatus::PROPERTY_VALUE_OUT_OF_RANGE);
            }
            partition.processors_per_socket = value;
        }
        property::GPA_PAGE_ACCESS_TRACKING => {
            let on = flag(value)?;
            let changed = on != partition.access_tracking;
            partition.access_tracking = on;
            return Ok(if changed {
                Effect::AccessTracking(on)
            } else {
                Effect::None
            });
        }
        property::UNIMPLEMENTED_MSR_ACTION => partition.ignore_unknown_msrs = flag(value)?,
        property::PRIVILEGE_FLAGS
        | property::PROCESSOR_VENDOR
        | property::PROCESSOR_XSAVE_FEATURES
        | property::PHYSICAL_ADDRESS_WIDTH
        | property::XSAVE_STATES
        | property::MAX_XSAVE_DATA_SIZE
        | property::PROCESSOR_CLOCK_FREQUENCY
        | property::PROCESSOR_FEATURES0
        | property::PROCESSOR_FEATURES1
        | property::VMM_CAPABILITIES
        | property::ASSIGNABLE_SYNTHETIC_PROC_FEATURES => return Err(HvStatus::OPERATION_DENIED),
        _ => return Err(HvStatus::UNKNOWN_PROPERTY),
    }
    Ok(Effect::None)
}

/// Stops or resumes reference time. Both may be repeated.
fn freeze(on: bool, partition: &mut PartitionState, host_tsc: u64) -> Effect {
    match (on, partition.frozen_at) {
        (true, None) => partition.frozen_at = Some(host_tsc),
        (false, Some(at)) => {
            let pause = host_tsc.wrapping_sub(at);
            partition.reference_base = partition.reference_base.wrapping_add(pause);
            partition.frozen_at = None;
            return Effect::ReferenceTime;
        }
        _ => {}
    }
    Effect::None
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
    use hv_abi::features::{Given, FEATURES as TOLD};

    const FACTS: HostFacts = HostFacts {
        vendor: Vendor::Vmx,
        tsc_hz: 2_500_000_000,
        xcr0: 0x6_02e7,
        arch_capabilities: u64::MAX,
    };

    /// A processor with every feature bit set.
    fn all_features(leaf: u32, subleaf: u32) -> Registers {
        match (leaf, subleaf) {
            (0, _) => [0x24, 0x756e_6547, 0x6c65_746e, 0x4965_6e69],
            (0x8000_0000, _) => [0x8000_0028, 0, 0, 0],
            (1, _) => [0x000c_06a1, 0x1234_5678, u32::MAX, u32::MAX],
            (4, 0) => [0x1c00_4121, 0x02c0_003f, 0x3f, 0],
            (4, 1) => [0x1c03_c163, 0x03c0_003f, 0x7ff, 4],
            (4, _) => [0; 4],
            (7, 0) => [2, u32::MAX, u32::MAX, u32::MAX],
            (0xd, 0) => [0x6_02ff, 2696, 11008, 0],
            (0xd, 1) => [0x1f, 2696, 0x1900, 0],
            (0xd, 2) => [256, 576, 0, 0],
            (0xd, 5) => [64, 1088, 0, 0],
            (0xd, 6) => [512, 1152, 0, 0],
            (0xd, 7) => [1024, 1664, 0, 0],
            (0xd, 9) => [8, 2688, 0, 0],
            (0xd, 17) => [64, 2752, 2, 0],
            (0xd, 18) => [8192, 2816, 6, 0],
            (0xd, _) => [0; 4],
            (0x15, _) => [2, 130, 38_400_000, 0],
            (0x8000_0002..=0x8000_0004, _) => [0x2020_2020; 4],
            (0x8000_0008, _) => [0x3934, u32::MAX, 0x7007, 0],
            (0x8000_001d, 0) => [0x1c00_4121, 0x01c0_003f, 0x3f, 0],
            (0x8000_001d, _) => [0; 4],
            _ => [u32::MAX; 4],
        }
    }

    fn partition() -> PartitionState {
        let mut partition = PartitionState::new(FACTS, 0);
        partition.creation_flags = creation::LAPIC_ENABLED | creation::X2APIC_CAPABLE;
        partition.synthetic_features = 0x640_0ffb;
        partition.vps = 6;
        partition
    }

    fn amd_partition() -> PartitionState {
        let mut partition = partition();
        partition.host.vendor = Vendor::Svm;
        partition.host.arch_capabilities = 0;
        partition
    }

    fn guest<'a>(partition: &'a PartitionState, overrides: Option<&'a Overrides>) -> Guest<'a> {
        Guest {
            cr4: cr4::OSXSAVE,
            xcr0: 7,
            xss: 0,
            long: true,
            apic_id: 3,
            apic: true,
            partition,
            overrides,
        }
    }

    fn seen(leaf: u32, subleaf: u32, partition: &PartitionState) -> Registers {
        cpuid(leaf, subleaf, &all_features, &guest(partition, None))
    }

    fn result(leaf: u32, subleaf: Option<u32>, values: Registers) -> CpuidResult {
        CpuidResult {
            leaf,
            subleaf: subleaf.unwrap_or(0),
            subleaf_specific: subleaf.is_some(),
            result: values.map(|value| [value, u32::MAX]),
        }
    }

    /// Leaf, subleaf, register and bit of what no child may have.
    const FORBIDDEN: [(u32, u32, usize, u32); 40] = [
        (1, 0, ECX, 2),
        (1, 0, ECX, 3),
        (1, 0, ECX, 5),
        (1, 0, ECX, 6),
        (1, 0, ECX, 15),
        (1, 0, EDX, 21),
        (1, 0, EDX, 22),
        (7, 0, EBX, 2),
        (7, 0, EBX, 12),
        (7, 0, EBX, 14),
        (7, 0, EBX, 15),
        (7, 0, EBX, 25),
        (7, 0, ECX, 5),
        (7, 0, ECX, 7),
        (7, 0, ECX, 13),
        (7, 0, ECX, 23),
        (7, 0, ECX, 24),
        (7, 0, ECX, 29),
        (7, 0, ECX, 30),
        (7, 0, ECX, 31),
        (7, 0, EDX, 5),
        (7, 0, EDX, 9),
        (7, 0, EDX, 15),
        (7, 0, EDX, 18),
        (7, 0, EDX, 19),
        (7, 0, EDX, 20),
        (7, 0, EDX, 22),
        (7, 0, EDX, 24),
        (7, 0, EDX, 25),
        (7, 0, EDX, 30),
        (7, 1, EAX, 17),
        (7, 1, EAX, 21),
        (7, 1, EAX, 26),
        (0xd, 0, EAX, 3),
        (0xd, 0, EAX, 17),
        (0xd, 0, EAX, 18),
        (0xd, 1, EAX, 4),
        (0xd, 1, ECX, 8),
        (0x8000_0001, 0, ECX, 2),
        (0x8000_0008, 0, EBX, 4),
    ];

    /// Leaves of which nothing may be seen: MONITOR, performance counters, resource control, SGX, trace, key locker,
    /// LBR, AMX, SVM, memory encryption.
    const EMPTY: [u32; 16] = [
        5,
        0xa,
        0xf,
        0x10,
        0x12,
        0x14,
        0x19,
        0x1a,
        0x1b,
        0x1c,
        0x1d,
        0x1e,
        0x20,
        0x23,
        0x8000_000a,
        0x8000_001f,
    ];

    #[test]
    fn what_cannot_be_virtualised_is_hidden_even_if_registered() {
        for partition in [partition(), amd_partition()] {
            let mut overrides = Overrides::new();
            for leaf in (0..0x28).chain(0x8000_0000..0x8000_0028) {
                for subleaf in 0..64 {
                    let new = result(leaf, Some(subleaf), [u32::MAX; 4]);
                    if leaf != 0xd || subleaf < 10 {
                        overrides.register(&new, &all_features, &partition).unwrap();
                    }
                    if !has_subleaves(leaf) || leaf & 0xff == 0xb || leaf & 0x1f == 0x1f {
                        break;
                    }
                    if subleaf == 3 && leaf != 0xd {
                        break;
                    }
                }
            }
            for overrides in [None, Some(&overrides)] {
                let guest = guest(&partition, overrides);
                for (leaf, subleaf, register, bit) in FORBIDDEN {
                    let seen = cpuid(leaf, subleaf, &all_features, &guest);
                    assert_eq!(
                        (seen[register] >> bit) & 1,
                        0,
                        "{leaf:#x} {subleaf} {register} {bit}"
                    );
                }
                for leaf in EMPTY {
                    assert_eq!(cpuid(leaf, 0, &all_features, &guest), [0; 4], "{leaf:#x}");
                }
            }
        }
    }

    #[test]
    fn ordinary_features_pass() {
        let partition = partition();
        let [_, _, c, d] = seen(1, 0, &partition);
        assert_eq!(c & 0x7ed8_3203, 0x7ed8_3203 & c);
        for bit in [0, 9, 12, 13, 17, 19, 20, 21, 23, 24, 25, 26, 27, 28, 31] {
            assert_eq!((c >> bit) & 1, 1, "{bit}");
        }
        for bit in [0, 4, 5, 6, 9, 12, 13, 15, 16, 24, 25, 26, 28] {
            assert_eq!((d >> bit) & 1, 1, "{bit}");
        }
        let [max, b, c, d] = seen(7, 0, &partition);
        assert_eq!(
            (
                max,
                (b >> 5) & 1,
                (b >> 16) & 1,
                (c >> 3) & 1,
                (d >> 26) & 1
            ),
            (2, 1, 1, 1, 1)
        );
        assert_eq!(seen(0x8000_0002, 0, &partition), [0x2020_2020; 4]);
        assert_eq!(seen(0x15, 0, &partition), [2, 130, 38_400_000, 0]);
    }

    #[test]
    fn apic_features_follow_the_creation_flags() {
        let mut partition = partition();
        partition.creation_flags = 0;
        let [_, _, c, _] = seen(1, 0, &partition);
        assert_eq!(c & (leaf1::ECX_X2APIC | leaf1::ECX_TSC_DEADLINE), 0);
        partition.creation_flags = creation::X2APIC_CAPABLE;
        assert_ne!(seen(1, 0, &partition)[ECX] & leaf1::ECX_X2APIC, 0);
    }

    #[test]
    fn bits_that_mirror_registers_follow_them() {
        let partition = partition();
        let mut guest = guest(&partition, None);
        let at = |leaf, register: usize, guest: &Guest<'_>| {
            cpuid(leaf, 0, &all_features, guest)[register]
        };
        assert_ne!(at(1, ECX, &guest) & leaf1::ECX_OSXSAVE, 0);
        assert_eq!(at(7, ECX, &guest) & leaf7::ECX_OSPKE, 0);
        guest.cr4 = cr4::PKE;
        assert_eq!(at(1, ECX, &guest) & leaf1::ECX_OSXSAVE, 0);
        assert_ne!(at(7, ECX, &guest) & leaf7::ECX_OSPKE, 0);
        guest.apic = false;
        assert_eq!(at(1, EDX, &guest) & leaf1::EDX_APIC, 0);
        assert_ne!(at(0x8000_0001, EDX, &guest) & (1 << 11), 0);
        guest.long = false;
        assert_eq!(at(0x8000_0001, EDX, &guest) & (1 << 11), 0);
    }

    #[test]
    fn extended_state_fits_into_the_pages_of_clients() {
        let partition = partition();
        let get = |code| get_property(code, &all_features, &partition, 0).unwrap();
        assert_eq!(get(property::XSAVE_STATES), 0x2e7);
        let size = get(property::MAX_XSAVE_DATA_SIZE);
        assert_eq!(size, 576 + 256 + 64 + 512 + 1024 + 8);
        assert!(size <= 4096);
        assert_eq!(seen(0xd, 0, &partition), [0x2e7, 832, 2696, 0]);
        assert_eq!(seen(0xd, 1, &partition), [0xf, 832, 0, 0]);
        assert_eq!(seen(0xd, 5, &partition), [64, 1088, 0, 0]);
        assert_eq!(seen(0xd, 18, &partition), [0; 4]);
        let mut full = guest(&partition, None);
        full.xcr0 = 0x2e7;
        assert_eq!(cpuid(0xd, 0, &all_features, &full)[EBX], 2696);
        assert_eq!(cpuid(0xd, 1, &all_features, &full)[EBX], 2440);
    }

    #[test]
    fn aligned_components_start_at_64_bytes_when_compacted() {
        let host = |leaf, subleaf| match (leaf, subleaf) {
            (0xd, 9) => [8, 2688, 2, 0],
            (0xd, 2) => [250, 576, 0, 0],
            _ => all_features(leaf, subleaf),
        };
        assert_eq!(compacted_size(&host, 0x207), 832 + 8);
    }

    #[test]
    fn root_without_a_component_leaves_it_out() {
        let mut partition = partition();
        partition.host.xcr0 = 0x207;
        let states = get_property(property::XSAVE_STATES, &all_features, &partition, 0);
        assert_eq!(states, Ok(0x207));
        partition.host.xcr0 = 0x67;
        let states = get_property(property::XSAVE_STATES, &all_features, &partition, 0);
        assert_eq!(states, Ok(7));
    }

    #[test]
    fn topology_is_one_thread_per_core() {
        let mut partition = partition();
        assert_eq!(seen(0xb, 0, &partition), [0, 1, 0x100, 3]);
        assert_eq!(seen(0xb, 1, &partition), [3, 6, 0x201, 3]);
        assert_eq!(seen(0x1f, 1, &partition), [3, 6, 0x201, 3]);
        let [_, b, _, d] = seen(1, 0, &partition);
        assert_eq!((b >> 24, (b >> 16) & 0xff, (b >> 8) & 0xff), (3, 8, 0x56));
        assert_ne!(d & leaf1::EDX_HTT, 0);
        // First level not shared, third by all.
        assert_eq!(seen(4, 0, &partition)[EAX], 0x1c00_0121);
        assert_eq!(seen(4, 1, &partition)[EAX], 0x1c01_c163);
        assert_eq!(seen(4, 2, &partition), [0; 4]);
        partition.processors_per_socket = 1;
        assert_eq!(seen(0xb, 1, &partition), [0, 1, 0x201, 3]);
        assert_eq!(seen(1, 0, &partition)[EDX] & leaf1::EDX_HTT, 0);
    }

    #[test]
    fn amd_topology_has_its_own_leaves() {
        let partition = amd_partition();
        assert_eq!(seen(0x8000_0008, 0, &partition)[ECX], 0x3005);
        assert_eq!(seen(0x8000_001e, 0, &partition), [3, 0, 0, 0]);
        assert_eq!(seen(0x8000_001d, 0, &partition)[EAX], 0x121);
        assert_ne!(seen(0x8000_0001, 0, &partition)[ECX] & 2, 0);
    }

    #[test]
    fn address_widths_are_those_of_second_level_tables() {
        let mut partition = partition();
        assert_eq!(seen(0x8000_0008, 0, &partition)[EAX], 0x3930);
        partition.disabled[1] = 1 << 4;
        assert_eq!(seen(0x8000_0008, 0, &partition)[EAX], 0x3030);
        assert_eq!(at_most(0x3028, 0x3930), 0x3028);
        assert_eq!(at_most(0x0040, 0x3930), 0x3930);
    }

    #[test]
    fn leaves_above_the_last_are_empty() {
        let host = |leaf, subleaf| match leaf {
            0 => [0xd, 0, 0, 0],
            0x8000_0000 => [0x8000_0008, 0, 0, 0],
            _ => all_features(leaf, subleaf),
        };
        let partition = partition();
        for leaf in [0x15, 0x1f, 0x25, 0x8000_0021, 0x8000_0100, 0xc000_0000] {
            assert_eq!(cpuid(leaf, 0, &host, &guest(&partition, None)), [0; 4]);
        }
        assert_eq!(seen(0, 0, &partition)[EAX], MAX_BASIC);
        assert_eq!(seen(0x8000_0000, 0, &partition)[EAX], MAX_EXTENDED);
    }

    #[test]
    fn disabled_feature_is_gone_from_cpuid_and_from_the_banks() {
        for base in [partition(), amd_partition()] {
            for feature in &FEATURES {
                let mut partition = base;
                partition.disabled[feature.bank] = 1 << feature.bit;
                let seen = seen(feature.leaf, feature.subleaf, &partition);
                assert_eq!(seen[feature.register] & feature.mask, 0);
                let bank = bank(feature.bank, &all_features, &partition);
                assert_eq!(
                    (bank >> feature.bit) & 1,
                    0,
                    "{} {}",
                    feature.bank,
                    feature.bit
                );
            }
        }
    }

    #[test]
    fn every_feature_of_the_table_can_be_there() {
        let (intel, amd) = (partition(), amd_partition());
        for feature in &FEATURES {
            let there = [intel, amd].iter().any(|partition| {
                seen(feature.leaf, feature.subleaf, partition)[feature.register] & feature.mask != 0
            });
            assert!(there, "bank {} bit {}", feature.bank, feature.bit);
        }
    }

    #[test]
    fn disabling_the_inverse_of_the_host_banks_disables_nothing() {
        let property = |code| host_property(code, &all_features, FACTS, 0).unwrap();
        let mut copy = partition();
        copy.disabled = [
            !property(property::PROCESSOR_FEATURES0),
            !property(property::PROCESSOR_FEATURES1),
            0,
        ];
        for (leaf, subleaf) in [(1, 0), (7, 0), (7, 1), (0xd, 1), (0x8000_0001, 0)] {
            assert_eq!(
                seen(leaf, subleaf, &copy),
                seen(leaf, subleaf, &partition())
            );
        }
        assert_eq!(arch_capabilities(&copy), arch_capabilities(&partition()));
        let bank =
            |partition| get_property(property::PROCESSOR_FEATURES1, &all_features, partition, 0);
        assert_eq!(bank(&copy), bank(&partition()));
    }

    #[test]
    fn without_avx_nothing_of_it_remains() {
        let mut partition = partition();
        // What the mshv crates leave enabled, less AVX.
        partition.disabled[2] = !0b1_1000_0001_1011;
        let [_, _, c, _] = seen(1, 0, &partition);
        assert_eq!(c & ((1 << 12) | (1 << 28) | (1 << 29)), 0);
        let [_, b, c, _] = seen(7, 0, &partition);
        assert_eq!(b & ((1 << 5) | (1 << 16) | (1 << 31)), 0);
        assert_eq!(c & ((1 << 9) | (1 << 10)), 0);
        let states = get_property(property::XSAVE_STATES, &all_features, &partition, 0);
        assert_eq!(states, Ok(0x203));
        partition.disabled[2] = 1;
        assert_eq!(seen(0xd, 0, &partition), [0; 4]);
        assert_eq!(seen(1, 0, &partition)[ECX] & leaf1::ECX_XSAVE, 0);
    }

    #[test]
    fn registered_model_replaces_the_processors_and_takes_features_away() {
        let partition = partition();
        let mut overrides = Overrides::new();
        let new = result(
            1,
            None,
            [0x0006_0fb1, 0x0700_0800, 0x0000_0001, 0x0000_0021],
        );
        overrides.register(&new, &all_features, &partition).unwrap();
        let guest = guest(&partition, Some(&overrides));
        let [a, b, c, d] = cpuid(1, 0, &all_features, &guest);
        assert_eq!(a, 0x0006_0fb1);
        // The APIC id is the VP's whatever was registered; the mirrors and the hypervisor bit are ours.
        assert_eq!(b, 0x0300_0800);
        assert_eq!(c, 1 | leaf1::ECX_OSXSAVE | leaf1::ECX_HYPERVISOR);
        assert_eq!(d, 0x21);
    }

    #[test]
    fn protection_keys_go_with_xsave() {
        let partition = partition();
        let mut overrides = Overrides::new();
        let keys = |overrides: &Overrides| {
            let guest = guest(&partition, Some(overrides));
            let features = Features::of(&all_features, &partition, overrides);
            (
                cpuid(7, 0, &all_features, &guest)[ECX] & leaf7::ECX_PKU != 0,
                features.cr4 & cr4::PKE != 0,
            )
        };
        assert_eq!(keys(&overrides), (true, true));
        let mut new = result(1, None, [0; 4]);
        new.result[ECX] = [leaf1::ECX_XSAVE, u32::MAX];
        overrides.register(&new, &all_features, &partition).unwrap();
        assert_eq!(keys(&overrides), (true, true));
        new.result[ECX] = [0, u32::MAX];
        overrides.register(&new, &all_features, &partition).unwrap();
        assert_eq!(keys(&overrides), (false, false));
    }

    #[test]
    fn mask_decides_bit_by_bit() {
        let partition = partition();
        let mut overrides = Overrides::new();
        let mut new = result(0x8000_0002, None, [0x4141_4141; 4]);
        new.result[0] = [0x4141_4141, 0xffff];
        new.result[1] = [0x4141_4141, 0];
        overrides.register(&new, &all_features, &partition).unwrap();
        let guest = guest(&partition, Some(&overrides));
        let seen = cpuid(0x8000_0002, 0, &all_features, &guest);
        assert_eq!(seen, [0x2020_4141, 0x2020_2020, 0x4141_4141, 0x4141_4141]);
    }

    #[test]
    fn registering_a_leaf_again_replaces_it() {
        let partition = partition();
        let mut overrides = Overrides::new();
        for value in [1, 2] {
            let new = result(0x8000_0003, None, [value; 4]);
            overrides.register(&new, &all_features, &partition).unwrap();
        }
        assert_eq!(overrides.entries().len(), 1);
        let guest = guest(&partition, Some(&overrides));
        assert_eq!(cpuid(0x8000_0003, 0, &all_features, &guest), [2; 4]);
    }

    #[test]
    fn result_for_a_subleaf_comes_before_that_for_the_leaf() {
        let partition = partition();
        let mut overrides = Overrides::new();
        for new in [
            result(4, None, [0x21, 1, 1, 1]),
            result(4, Some(1), [0x43, 2, 2, 2]),
        ] {
            overrides.register(&new, &all_features, &partition).unwrap();
        }
        let guest = guest(&partition, Some(&overrides));
        assert_eq!(cpuid(4, 1, &all_features, &guest), [0x43, 2, 2, 2]);
        assert_eq!(cpuid(4, 0, &all_features, &guest), [0x21, 1, 1, 1]);
    }

    #[test]
    fn result_for_the_whole_of_leaf_7_still_only_takes_away() {
        let partition = partition();
        let mut overrides = Overrides::new();
        let new = result(7, None, [u32::MAX; 4]);
        overrides.register(&new, &all_features, &partition).unwrap();
        let with = guest(&partition, Some(&overrides));
        for subleaf in 0..3 {
            let [_, b, c, d] = cpuid(7, subleaf, &all_features, &with);
            let [_, b0, c0, d0] = seen(7, subleaf, &partition);
            assert_eq!([b, c, d], [b0, c0, d0]);
        }
    }

    #[test]
    fn all_leaves_of_a_big_processor_fit() {
        let partition = partition();
        let mut overrides = Overrides::new();
        let mut register = |leaf, subleaf| {
            let mut new = result(leaf, subleaf, [u32::MAX; 4]);
            if leaf == 0xd && subleaf.is_some_and(|subleaf| subleaf < 2) {
                new.result[1][1] = 0;
            }
            overrides.register(&new, &all_features, &partition).unwrap();
        };
        for leaf in (0..=0x24).chain(0x8000_0000..=0x8000_0028) {
            match leaf {
                0xd => (0..64).for_each(|subleaf| register(leaf, Some(subleaf))),
                4 | 7 | 0xb | 0xf | 0x10 | 0x14 | 0x1f | 0x8000_001d | 0x8000_0026 => {
                    (0..5).for_each(|subleaf| register(leaf, Some(subleaf)));
                }
                _ => register(leaf, None),
            }
        }
        assert!(
            overrides.entries().len() < 60,
            "{}",
            overrides.entries().len()
        );
        let guest = guest(&partition, Some(&overrides));
        assert_eq!(cpuid(0xd, 0, &all_features, &guest), [0x2e7, 832, 2696, 0]);
    }

    #[test]
    fn full_table_says_so() {
        let partition = partition();
        let mut overrides = Overrides::new();
        let last = (0..200).find_map(|subleaf| {
            let new = result(0xb, Some(subleaf), [1; 4]);
            overrides
                .register(&new, &all_features, &partition)
                .err()
                .map(|status| (subleaf, status))
        });
        assert_eq!(last, Some((MAX_OVERRIDES as u32, HvStatus::NO_RESOURCES)));
    }

    #[test]
    fn page_of_zeros_is_an_empty_table() {
        let overrides = Overrides::default();
        assert_eq!((overrides.count, overrides.entries().len()), (0, 0));
    }

    #[test]
    fn hypervisor_leaves_say_what_the_partition_was_given() {
        let mut partition = partition();
        let [max, b, c, d] = seen(0x4000_0000, 0, &partition);
        assert_eq!(max, 0x4000_0006);
        let name: Vec<u8> = [b, c, d].into_iter().flat_map(u32::to_le_bytes).collect();
        assert_eq!(name, b"Microsoft Hv");
        assert_eq!(
            seen(0x4000_0001, 0, &partition)[EAX].to_le_bytes(),
            *b"Hv#1"
        );
        assert_eq!(seen(0x4000_0002, 0, &partition)[EBX], 10 << 16);
        let [a, b, _, d] = seen(0x4000_0003, 0, &partition);
        assert_eq!((a, b, d), (0xae7e, 0x10_0010, 0x8_0510));
        assert_eq!(seen(0x4000_0004, 0, &partition)[EAX], 0x62c);
        for leaf in [0x4000_0007, 0x4000_000a, 0x4000_0082] {
            assert_eq!(seen(leaf, 0, &partition), [0; 4]);
        }
        partition.synthetic_features = synthetic::HYPERVISOR_PRESENT;
        assert_eq!(seen(0x4000_0000, 0, &partition), [0; 4]);
        assert_ne!(seen(1, 0, &partition)[ECX] & leaf1::ECX_HYPERVISOR, 0);
        partition.synthetic_features = 0;
        assert_eq!(seen(1, 0, &partition)[ECX] & leaf1::ECX_HYPERVISOR, 0);
    }

    /// The table of features says exactly what CPUID shows.
    #[test]
    fn features_are_those_of_the_table() {
        let mut partition = partition();
        let with = |partition: &mut PartitionState, features: u64| {
            partition.synthetic_features = features;
            [3, 4].map(|leaf| seen(0x4000_0000 | leaf, 0, partition))
        };
        let base = synthetic::HYPERVISOR_PRESENT | synthetic::HV1;
        let least = with(&mut partition, base);
        let all = with(&mut partition, synthetic::ASSIGNABLE);
        let mut table = [[0; 4]; 2];
        for feature in &TOLD {
            let leaf = (feature.leaf - 0x4000_0003) as usize;
            let (register, mask) = (feature.register.index(), 1 << feature.bit);
            table[leaf][register] |= mask;
            let at_least = least[leaf][register] & mask != 0;
            match feature.given {
                Given::Feature(bit) => {
                    let lacks = with(&mut partition, synthetic::ASSIGNABLE & !(1 << bit));
                    assert!(
                        !at_least && lacks[leaf][register] & mask == 0,
                        "{}",
                        feature.name
                    );
                }
                Given::Always | Given::InvariantTsc => assert!(at_least, "{}", feature.name),
            }
        }
        // EBX of the hints is a number.
        assert_eq!(all[0], table[0]);
        assert_eq!(all[1][EAX], table[1][EAX]);
    }

    #[test]
    fn each_privilege_needs_its_feature() {
        let always = privileges(synthetic::HV1, false);
        assert_eq!(always, 1 << 13 | 1 << 52);
        let more = |features: u64| privileges(synthetic::HV1 | features, false) & !always;
        for (feature, bit) in [
            (3, 1),
            (5, 3),
            (6, 4),
            (7, 5),
            (8, 6),
            (9, 9),
            (10, 10),
            (11, 11),
            (29, 37),
        ] {
            assert_eq!(more(1 << feature), 1 << bit);
            assert_eq!(privileges(1 << feature, false), 0);
        }
        // The SynIC goes with messages.
        assert_eq!(more(1 << 4), 1 << 2 | 1 << 36);
        assert_eq!(privileges(synthetic::HV1, true), always | 1 << 15);
    }

    #[test]
    fn features_follow_the_registered_results() {
        let partition = partition();
        let none = Overrides::new();
        let all = Features::of(&all_features, &partition, &none);
        assert_eq!(all.xcr0, 0x2e7);
        assert_eq!((all.physical_bits, all.linear_bits), (48, 57));
        assert_eq!(
            all.cr4 & (cr4::VMXE | cr4::SMXE | cr4::CET | cr4::PKS | cr4::FRED),
            0
        );
        assert_eq!(all.efer, 0x20_0d01);
        assert!(all.tsc_aux && all.tsc_adjust && all.xss && all.invariant_tsc && all.flush_cmd);
        assert_eq!(all.spec_ctrl, 0x5ff);
        let mut overrides = Overrides::new();
        for new in [
            result(1, None, [0, 0, 1 << 26, 1 << 6]),
            result(7, Some(0), [0; 4]),
            result(0xd, Some(0), [3, 0, 0, 0]),
            result(0x8000_0001, None, [0, 0, 0, (1 << 20) | (1 << 29)]),
            result(0x8000_0008, None, [0x3028, 0, 0, 0]),
        ] {
            overrides.register(&new, &all_features, &partition).unwrap();
        }
        let few = Features::of(&all_features, &partition, &overrides);
        assert_eq!(few.xcr0, 3);
        assert_eq!((few.physical_bits, few.linear_bits), (40, 48));
        assert_eq!(
            few.cr4,
            (1 << 2) | (1 << 5) | (1 << 6) | (7 << 8) | (1 << 18)
        );
        assert_eq!(few.efer, 0xd01 | (1 << 21));
        assert_eq!((few.spec_ctrl, few.arch_capabilities), (0, None));
        assert!(!few.tsc_aux && !few.tsc_adjust);
    }

    #[test]
    fn addresses_are_checked_by_width() {
        let mut features = Features::NONE;
        assert!(
            features.is_canonical(0xffff_8000_0000_0000) && features.is_canonical(0x7fff_ffff_ffff)
        );
        assert!(!features.is_canonical(0x8000_0000_0000));
        features.linear_bits = 57;
        assert!(features.is_canonical(0x8000_0000_0000) && !features.is_canonical(1 << 56));
        assert!(features.is_physical(0xf_ffff_f000) && !features.is_physical(1 << 36));
    }

    #[test]
    fn properties_answer_as_clients_expect() {
        let mut partition = partition();
        let set = |code, value, partition: &mut PartitionState| {
            set_property(code, value, true, partition, 50)
        };
        let late = Err(HvStatus::INVALID_PARTITION_STATE);
        assert_eq!(set(property::PRIVILEGE_FLAGS, 0, &mut partition), late);
        assert_eq!(
            set(property::SYNTHETIC_PROC_FEATURES, 0, &mut partition),
            late
        );
        assert_eq!(
            set(property::UNIMPLEMENTED_MSR_ACTION, 1, &mut partition),
            Ok(Effect::None)
        );
        assert_eq!(
            set(property::UNIMPLEMENTED_MSR_ACTION, 2, &mut partition),
            Err(HvStatus::PROPERTY_VALUE_OUT_OF_RANGE)
        );
        assert_eq!(
            set(property::PROCESSOR_FEATURES0, 0, &mut partition),
            Err(HvStatus::OPERATION_DENIED)
        );
        assert_eq!(
            set(0x12345, 0, &mut partition),
            Err(HvStatus::UNKNOWN_PROPERTY)
        );
        let get = |code| get_property(code, &all_features, &partition, 50);
        assert_eq!(get(property::UNIMPLEMENTED_MSR_ACTION), Ok(1));
        assert_eq!(get(property::SYNTHETIC_PROC_FEATURES), Ok(0x640_0ffb));
        assert_eq!(get(property::PROCESSOR_VENDOR), Ok(1));
        assert_eq!(get(property::PHYSICAL_ADDRESS_WIDTH), Ok(48));
        assert_eq!(get(property::PROCESSOR_CLOCK_FREQUENCY), Ok(2_500_000_000));
        assert_eq!(
            get(property::VMM_CAPABILITIES),
            Err(HvStatus::UNKNOWN_PROPERTY)
        );
        assert_eq!(
            property_ex(property::VMM_CAPABILITIES),
            Err(HvStatus::ACCESS_DENIED)
        );
        let assignable = property_ex(property::ASSIGNABLE_SYNTHETIC_PROC_FEATURES).unwrap();
        assert_eq!(assignable, ([1, synthetic::ASSIGNABLE], 2));
    }

    #[test]
    fn synthetic_features_are_kept_until_initialization() {
        let mut partition = PartitionState::new(FACTS, 0);
        let code = property::SYNTHETIC_PROC_FEATURES;
        assert_eq!(
            set_property(code, 0x640_0ffb, false, &mut partition, 0),
            Ok(Effect::None)
        );
        assert_eq!(
            get_property(code, &all_features, &partition, 0),
            Ok(0x640_0ffb)
        );
    }

    #[test]
    fn frozen_time_stands_still_and_goes_on_from_there() {
        let mut partition = PartitionState::new(FACTS, 0);
        let second = FACTS.tsc_hz;
        let time = |partition: &PartitionState, tsc| {
            get_property(property::REFERENCE_TIME, &all_features, partition, tsc).unwrap()
        };
        let freeze = |partition: &mut PartitionState, on, tsc| {
            set_property(property::TIME_FREEZE, on, true, partition, tsc).unwrap()
        };
        assert_eq!(freeze(&mut partition, 1, second), Effect::None);
        assert_eq!(freeze(&mut partition, 1, 3 * second), Effect::None);
        let before = time(&partition, 9 * second);
        assert!((9_999_999..=10_000_000).contains(&before));
        assert_eq!(freeze(&mut partition, 0, 9 * second), Effect::ReferenceTime);
        assert_eq!(freeze(&mut partition, 0, 9 * second), Effect::None);
        assert_eq!(time(&partition, 9 * second), before);
    }

    #[test]
    fn access_tracking_reports_only_changes() {
        let mut partition = partition();
        let code = property::GPA_PAGE_ACCESS_TRACKING;
        let mut set = |value| set_property(code, value, true, &mut partition, 0);
        assert_eq!(set(0), Ok(Effect::None));
        assert_eq!(set(1), Ok(Effect::AccessTracking(true)));
        assert_eq!(set(1), Ok(Effect::None));
    }
}
