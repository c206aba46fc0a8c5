// SPDX-License-Identifier: GPL-2.0
//! What CPUID tells a child about its hypervisor, bit by bit (TLFS 2.4): what stands behind each, and which test sees it.
//!
//! A test of the image holds this table against its CPUID, one of this crate against the names of tests.

/// A register of CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// EDX.
    Edx,
}

impl Register {
    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Eax => "EAX",
            Self::Ebx => "EBX",
            Self::Edx => "EDX",
        }
    }

    /// Its place in the order EAX, EBX, ECX, EDX.
    #[must_use]
    pub const fn index(self) -> usize {
        match self {
            Self::Eax => 0,
            Self::Ebx => 1,
            Self::Edx => 3,
        }
    }
}

/// When a child sees a bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Given {
    /// Whenever it sees a hypervisor of this interface.
    Always,
    /// If its VMM set this bit of the partition property SYNTHETIC_PROC_FEATURES.
    Feature(u8),
    /// If its TSC is invariant.
    InvariantTsc,
}

/// A bit.
#[derive(Clone, Copy, Debug)]
pub struct Feature {
    /// Leaf of CPUID.
    pub leaf: u32,
    /// Register.
    pub register: Register,
    /// Bit.
    pub bit: u8,
    /// Name in TLFS.
    pub name: &'static str,
    /// When it is set.
    pub given: Given,
    /// What it promises.
    pub obligation: &'static str,
    /// File and name of a test of it.
    pub test: (&'static str, &'static str),
}

const RUN: &str = "hv_core/image/tests/run.rs";
const MSRS: &str = "hv_core/image/src/child_msr.rs";
const SMOKE: &str = "selftests/hv_core/mshv_smoke/src/main.rs";
const BOOT: &str = "selftests/hv_core/boot.sh";

const fn feature(
    leaf: u32,
    (register, bit): (Register, u8),
    name: &'static str,
    given: Given,
    obligation: &'static str,
    test: (&'static str, &'static str),
) -> Feature {
    Feature {
        leaf: 0x4000_0000 | leaf,
        register,
        bit,
        name,
        given,
        obligation,
        test,
    }
}

/// All bits that a child may see in the leaves of privileges, features and hints.
pub const FEATURES: [Feature; 24] = {
    use Given::*;
    use Register::*;
    [
        feature(
            3,
            (Eax, 1),
            "AccessPartitionReferenceCounter",
            Feature(3),
            "MSR 40000020: time of the partition in 100 ns, the same on all VPs",
            (MSRS, "reference_time_counts_ten_million_a_second"),
        ),
        feature(
            3,
            (Eax, 2),
            "AccessSynicRegs",
            Feature(4),
            "MSRs 40000080-84, 90-9f: messages and event flags of 16 sources",
            (SMOKE, "messages_reach_the_guest_in_order"),
        ),
        feature(
            3,
            (Eax, 3),
            "AccessSyntheticTimerRegs",
            Feature(5),
            "MSRs 400000b0-b7: four timers",
            (SMOKE, "timers_expire"),
        ),
        feature(
            3,
            (Eax, 4),
            "AccessIntrCtrlRegs",
            Feature(6),
            "MSRs 40000070-72: EOI, ICR and TPR of the local APIC",
            (SMOKE, "messages_reach_the_guest_in_order"),
        ),
        feature(
            3,
            (Eax, 5),
            "AccessHypercallMsrs",
            Feature(7),
            "MSRs 40000000-01: identity and hypercall page",
            (MSRS, "hypercall_page_needs_an_identity"),
        ),
        feature(
            3,
            (Eax, 6),
            "AccessVpIndex",
            Feature(8),
            "MSR 40000002: number of the VP",
            (MSRS, "hypervisor_msrs_answer"),
        ),
        feature(
            3,
            (Eax, 9),
            "AccessPartitionReferenceTsc",
            Feature(9),
            "MSR 40000021: page from which the time follows without an exit",
            (MSRS, "reference_page_agrees_with_the_msr"),
        ),
        feature(
            3,
            (Eax, 10),
            "AccessGuestIdleReg",
            Feature(10),
            "MSR 400000f0: sleeps until an interrupt comes, also with interrupts off",
            (RUN, "idle_guest_wakes_with_interrupts_off"),
        ),
        feature(
            3,
            (Eax, 11),
            "AccessFrequencyRegs",
            Feature(11),
            "MSRs 40000022-23: frequencies of TSC and APIC timer",
            (MSRS, "hypervisor_msrs_answer"),
        ),
        feature(
            3,
            (Eax, 13),
            "AccessReenlightenmentControls",
            Always,
            "MSRs 40000106-108: accepted; the TSC's frequency never changes",
            (MSRS, "hypervisor_msrs_answer"),
        ),
        feature(
            3,
            (Eax, 15),
            "AccessTscInvariantControls",
            InvariantTsc,
            "MSR 40000118: shows the invariant TSC, which counts the same on all CPUs",
            (MSRS, "hypervisor_msrs_answer"),
        ),
        feature(
            3,
            (Ebx, 4),
            "PostMessages",
            Feature(4),
            "hypercall 5c: messages to ports of the root",
            (SMOKE, "messages_and_events_reach_another_module"),
        ),
        feature(
            3,
            (Ebx, 5),
            "SignalEvents",
            Feature(29),
            "hypercall 5d: events to ports of the root, and to eventfds",
            (SMOKE, "event_of_a_connection_reaches_an_eventfd"),
        ),
        feature(
            3,
            (Ebx, 20),
            "EnableExtendedHypercalls",
            Always,
            "hypercall 8001: says that there are no extended capabilities",
            (RUN, "guest_learns_that_there_are_no_extended_capabilities"),
        ),
        feature(
            3,
            (Edx, 4),
            "XmmRegistersForFastHypercallAvailable",
            Feature(7),
            "fast hypercalls with input in XMM0 to XMM5",
            (SMOKE, "fast_call_goes_on_in_xmm_registers"),
        ),
        feature(
            3,
            (Edx, 8),
            "FrequencyRegsAvailable",
            Feature(11),
            "as AccessFrequencyRegs",
            (MSRS, "hypervisor_msrs_answer"),
        ),
        feature(
            3,
            (Edx, 10),
            "GuestCrashRegsAvailable",
            Always,
            "MSRs 40000100-105: parameters of a crash reach the root's log",
            (MSRS, "crash_is_reported_with_its_parameters"),
        ),
        feature(
            3,
            (Edx, 19),
            "DirectSyntheticTimers",
            Feature(22),
            "timers that raise a vector without the SynIC",
            (SMOKE, "timers_expire"),
        ),
        feature(
            4,
            (Eax, 2),
            "UseHypercallForRemoteFlush",
            Feature(25),
            "hypercalls 2, 3: VPs that do not run are not waited for",
            (BOOT, "Using hypercall for remote TLB flush"),
        ),
        feature(
            4,
            (Eax, 3),
            "UseApicMsrs",
            Feature(6),
            "as AccessIntrCtrlRegs",
            (SMOKE, "messages_reach_the_guest_in_order"),
        ),
        feature(
            4,
            (Eax, 5),
            "UseRelaxedTiming",
            Always,
            "none: watchdogs by time mean less in a child",
            (BOOT, "computes"),
        ),
        feature(
            4,
            (Eax, 9),
            "DeprecateAutoEoi",
            Always,
            "none: automatic EOI works, and costs an exit",
            (SMOKE, "event_flags_reach_the_guest"),
        ),
        feature(
            4,
            (Eax, 10),
            "UseSyntheticClusterIpi",
            Feature(26),
            "hypercall b: an interrupt to a set of VPs",
            (BOOT, "Using IPI hypercalls"),
        ),
        feature(
            4,
            (Eax, 11),
            "UseExProcessorMasks",
            Feature(24),
            "hypercalls 13, 14, 15: sets of more than 64 VPs",
            (SMOKE, "fast_call_goes_on_in_xmm_registers"),
        ),
    ]
};
