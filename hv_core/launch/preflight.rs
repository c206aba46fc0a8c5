// SPDX-License-Identifier: GPL-2.0
//! Preflight: every CPU is looked at, nothing is changed, and one table says what is there.
//!
//! Each row of the table is a requirement: what, why, what was found, what is needed. The first row that
//! fails decides the errno and is printed with its remedy.

use kernel::fmt;
use kernel::prelude::*;

use crate::abi::boot::Vendor;
use crate::abi::layout::{DIRECT_BITS, MAX_CPUS};
use crate::launch::cpu;
use crate::sys;
use crate::x86::regs::{cpuid, cr4, efer, msr};
use crate::x86::root::{EnabledInstructions, VmxCapabilities, VmxControls};
use crate::x86::vmcs::{allows, ept_cap, processor, secondary};

/// What one CPU says. Compared over all CPUs.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct Facts {
    vendor_id: [u32; 3],
    has_extension: bool,
    /// IA32_FEATURE_CONTROL or VM_CR.
    firmware: u64,
    cr4: u64,
    efer: u64,
    tr: u16,
    leaf1_ecx: u32,
    features: [u32; 4],
    /// VT-x capabilities; zero on AMD-V.
    pub(crate) vmx: VmxCapabilities,
    /// CPUID 8000_000Ah EBX (ASIDs) and EDX (features); zero on VT-x.
    svm: [u32; 2],
    page_1g: bool,
    trace_enabled: bool,
}

impl Facts {
    /// Collects the facts of the CPU this runs on. Reads only.
    pub(crate) fn of_this_cpu() -> Self {
        let [max, b, c, d] = cpu::cpuid(0, 0);
        let [_, _, leaf1_ecx, _] = cpu::cpuid(1, 0);
        let leaf7 = if max >= 7 { cpu::cpuid(7, 0) } else { [0; 4] };
        let leafd1 = if max >= 0xd {
            cpu::cpuid(0xd, 1)
        } else {
            [0; 4]
        };
        let [extended, ..] = cpu::cpuid(0x8000_0000, 0);
        let e1 = if extended >= 0x8000_0001 {
            cpu::cpuid(0x8000_0001, 0)
        } else {
            [0; 4]
        };
        let intel = [b, d, c] == ids(b"GenuineIntel");
        let vmx_present = intel && leaf1_ecx & cpuid::L1_ECX_VMX != 0;
        let svm_present = !intel && e1[2] & cpuid::E1_ECX_SVM != 0;
        let read = |number| sys::rdmsr(number).unwrap_or(0);
        let vmx = if vmx_present {
            VmxCapabilities {
                basic: read(msr::VMX_BASIC),
                misc: read(msr::VMX_MISC),
                pin: read(msr::VMX_TRUE_PINBASED_CTLS),
                processor: read(msr::VMX_TRUE_PROCBASED_CTLS),
                secondary: read(msr::VMX_PROCBASED_CTLS2),
                exit: read(msr::VMX_TRUE_EXIT_CTLS),
                entry: read(msr::VMX_TRUE_ENTRY_CTLS),
                ept_vpid: read(msr::VMX_EPT_VPID_CAP),
            }
        } else {
            VmxCapabilities::default()
        };
        let svm = if svm_present {
            let [_, asids, _, features] = cpu::cpuid(0x8000_000a, 0);
            [asids, features]
        } else {
            [0; 2]
        };
        // Processor trace in a VMX root that cannot take it: RTIT_CTL.TraceEn (SDM 34.5).
        let has_trace = leaf7[1] >> 25 & 1 != 0;
        Self {
            vendor_id: [b, d, c],
            has_extension: vmx_present || svm_present,
            firmware: if vmx_present {
                read(msr::FEATURE_CONTROL)
            } else if svm_present {
                read(msr::VM_CR)
            } else {
                0
            },
            cr4: cpu::read_cr4(),
            efer: read(msr::EFER),
            tr: cpu::task_register(),
            leaf1_ecx: leaf1_ecx & !cpuid::L1_ECX_OSXSAVE,
            features: [leaf7[1], leaf7[2] & !cpuid::L7_ECX_OSPKE, leafd1[0], e1[3]],
            vmx,
            svm,
            page_1g: e1[3] >> 26 & 1 != 0,
            trace_enabled: intel && has_trace && read(0x570) & 1 != 0 && vmx.misc >> 14 & 1 == 0,
        }
    }

    fn is_intel(&self) -> bool {
        self.vendor_id == ids(b"GenuineIntel")
    }

    /// The back end for this processor.
    pub(crate) fn vendor(&self) -> Vendor {
        if self.is_intel() {
            Vendor::Vmx
        } else {
            Vendor::Svm
        }
    }

    /// Instructions that need a VMX control to go on working.
    pub(crate) fn instructions(&self) -> EnabledInstructions {
        let [ebx7, ecx7, eaxd1, edxe1] = self.features;
        EnabledInstructions {
            rdtscp: edxe1 >> 27 & 1 != 0,
            invpcid: ebx7 >> 10 & 1 != 0,
            xsaves: eaxd1 >> 3 & 1 != 0,
            user_wait: ecx7 >> 5 & 1 != 0,
            pconfig: false,
        }
    }

    /// Whether second-level tables may have 1 GiB leaves.
    pub(crate) fn second_level_1g(&self) -> bool {
        match self.vendor() {
            Vendor::Vmx => self.vmx.ept_vpid & ept_cap::PAGE_1G != 0,
            Vendor::Svm => self.page_1g,
        }
    }

    /// Whether exits save the address of the next instruction (AMD-V).
    pub(crate) fn svm_next_rip(&self) -> bool {
        self.svm[1] >> 3 & 1 != 0
    }

    /// Whether linear addresses have five levels.
    pub(crate) fn la57(&self) -> bool {
        self.cr4 & cr4::LA57 != 0
    }
}

fn ids(name: &[u8; 12]) -> [u32; 3] {
    let word = |i: usize| u32::from_le_bytes([name[i], name[i + 1], name[i + 2], name[i + 3]]);
    [word(0), word(4), word(8)]
}

/// One row of the capability table.
pub(crate) struct Row {
    /// Name of the requirement.
    pub(crate) name: &'static str,
    /// Why it is needed.
    pub(crate) why: &'static str,
    /// What was found.
    pub(crate) found: u64,
    /// What is required.
    pub(crate) required: &'static str,
    /// What the user can do.
    pub(crate) remedy: &'static str,
    /// Whether it is met.
    pub(crate) ok: bool,
    /// Error when it is not.
    pub(crate) error: Error,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_fmt(fmt!(
            "{}: found {:#x}, required: {} ({}). {}",
            self.name,
            self.found,
            self.required,
            self.why,
            self.remedy
        ))
    }
}

/// The table and the facts behind it.
pub(crate) struct Preflight {
    /// Facts of the first CPU; equal on all if the launch is not refused.
    pub(crate) facts: Facts,
    /// All requirements.
    pub(crate) rows: KVec<Row>,
}

impl Preflight {
    /// Looks at every online CPU.
    pub(crate) fn run(locked: &sys::CpusLocked) -> Result<Self> {
        let mut first: Option<Facts> = None;
        let mut differing = 0u64;
        let mut enabled = 0u64;
        for cpu in (0..sys::cpu_count()).filter(|cpu| sys::cpu_online(*cpu)) {
            let mut facts = sys::call_on_cpu(locked, cpu, Facts::of_this_cpu)?;
            if facts.cr4 & cr4::VMXE != 0 || facts.efer & efer::SVME != 0 {
                enabled += 1;
            }
            facts.cr4 &= !cr4::VMXE;
            facts.efer &= !efer::SVME;
            match &first {
                None => first = Some(facts),
                Some(other) if *other == facts => {}
                Some(_) => differing += 1,
            }
        }
        let facts = first.ok_or(ENODEV)?;
        let mut rows = KVec::new();
        table(&facts, differing, enabled, |row| rows.push(row, GFP_KERNEL))?;
        Ok(Self { facts, rows })
    }

    /// The first requirement that is not met.
    pub(crate) fn refusal(&self) -> Option<&Row> {
        self.rows.iter().find(|row| !row.ok)
    }
}

type Push = core::result::Result<(), kernel::alloc::AllocError>;

#[allow(clippy::too_many_arguments)]
fn table(facts: &Facts, differing: u64, enabled: u64, mut push: impl FnMut(Row) -> Push) -> Push {
    let mut row = |name, why, found, required, ok, error, remedy| {
        push(Row {
            name,
            why,
            found,
            required,
            remedy,
            ok,
            error,
        })
    };
    let [max_leaf, b, c, d] = cpu::cpuid(0x4000_0000, 0);
    let hypervisor = facts.leaf1_ecx & cpuid::L1_ECX_HYPERVISOR != 0;
    let microsoft = hypervisor && [b, c, d] == ids(b"Microsoft Hv");
    let root = microsoft && max_leaf >= 0x4000_0003 && cpu::cpuid(0x4000_0003, 0)[1] & 1 != 0;
    row(
        "Microsoft hypervisor",
        "a root partition cannot become a root partition again",
        root.into(),
        "not already a root partition",
        !root,
        EBUSY,
        "Use the /dev/mshv of the hypervisor that is already there.",
    )?;
    let intel = facts.is_intel();
    row(
        if intel { "VT-x" } else { "AMD-V" },
        "the image runs beneath Linux",
        facts.has_extension.into(),
        "CPUID announces it",
        facts.has_extension,
        ENODEV,
        "Use a processor with VT-x or AMD-V; in a virtual machine, enable nested virtualization.",
    )?;
    if !facts.has_extension {
        return Ok(());
    }
    row(
        "CPUs with the extension in use",
        "only one hypervisor can own it",
        enabled,
        "none",
        enabled == 0,
        EBUSY,
        "Unload kvm_intel or kvm_amd (TDX hosts keep VT-x on for good: boot with kvm_intel.tdx=0).",
    )?;
    let kvm = sys::module_loaded(c"kvm_intel") || sys::module_loaded(c"kvm_amd");
    row(
        "KVM",
        "it would take the extension at its first guest",
        kvm.into(),
        "kvm_intel and kvm_amd not loaded",
        !kvm,
        EBUSY,
        "Unload kvm_intel or kvm_amd: modprobe -r kvm_intel kvm_amd.",
    )?;
    row(
        "CPUs that differ from the first",
        "a virtual processor may run on any CPU",
        differing,
        "none",
        differing == 0,
        EOPNOTSUPP,
        "Update microcode and firmware, or take the differing CPUs offline.",
    )?;
    row(
        "task register",
        "leaving rebuilds its descriptor",
        facts.tr.into(),
        "selector below 0x70",
        facts.tr & 4 == 0 && facts.tr < 0x70,
        EOPNOTSUPP,
        "Report this kernel.",
    )?;
    row(
        "possible CPUs",
        "each CPU has a block of its own in the image",
        sys::cpu_count().into(),
        "at most 512",
        sys::cpu_count() as usize <= MAX_CPUS,
        EOPNOTSUPP,
        "Boot with nr_cpus=512.",
    )?;
    row(
        "physical address bits",
        "the second-level table has four levels, the direct map 64 TiB",
        sys::physical_bits().into(),
        "at most 46 on a host without 5-level paging",
        sys::physical_bits() <= if facts.la57() { 52 } else { DIRECT_BITS },
        EOPNOTSUPP,
        "Report this machine.",
    )?;
    if intel {
        vmx_rows(facts, &mut row)
    } else {
        svm_rows(facts, &mut row)
    }
}

fn vmx_rows(
    facts: &Facts,
    row: &mut impl FnMut(
        &'static str,
        &'static str,
        u64,
        &'static str,
        bool,
        Error,
        &'static str,
    ) -> Push,
) -> Push {
    let vmx = &facts.vmx;
    row(
        "IA32_FEATURE_CONTROL",
        "firmware decides on VMXON",
        facts.firmware,
        "locked with VMX outside SMX on (5)",
        facts.firmware & 5 == 5,
        ENODEV,
        "Enable Intel Virtualization Technology in the firmware set-up.",
    )?;
    row(
        "VMX true controls",
        "CR3 loads must not exit",
        vmx.basic >> 55 & 1,
        "IA32_VMX_BASIC bit 55",
        vmx.basic >> 55 & 1 != 0,
        EOPNOTSUPP,
        "This processor is too old.",
    )?;
    row(
        "MSR bitmaps and secondary controls",
        "MSRs of the root pass through",
        vmx.processor >> 32,
        "both allowed",
        allows(processor::MSR_BITMAP | processor::SECONDARY, vmx.processor),
        EOPNOTSUPP,
        "This processor is too old.",
    )?;
    let need = secondary::EPT | secondary::VPID | secondary::UNRESTRICTED_GUEST;
    row(
        "EPT, VPID, unrestricted guest",
        "second-level translation, no flush at exits, real mode",
        vmx.secondary >> 32,
        "all three allowed",
        allows(need, vmx.secondary),
        EOPNOTSUPP,
        "This processor is too old.",
    )?;
    let need = ept_cap::WALK_4
        | ept_cap::WRITE_BACK
        | ept_cap::PAGE_2M
        | ept_cap::INVEPT
        | ept_cap::INVVPID;
    row(
        "EPT capabilities",
        "four levels, write-back tables, 2 MiB leaves, INVEPT, INVVPID",
        vmx.ept_vpid,
        "all of them",
        vmx.ept_vpid & need == need,
        EOPNOTSUPP,
        "This processor is too old.",
    )?;
    let on = VmxControls::root(vmx, facts.instructions());
    let wanted = facts.instructions();
    let mirrored = (!wanted.rdtscp || on.secondary & secondary::RDTSCP != 0)
        && (!wanted.invpcid || on.secondary & secondary::INVPCID != 0)
        && (!wanted.xsaves || on.secondary & secondary::XSAVES != 0)
        && (!wanted.user_wait || on.secondary & secondary::USER_WAIT != 0);
    row(
        "enable controls",
        "Linux already uses what CPUID announced",
        on.secondary.into(),
        "each announced instruction can be enabled",
        mirrored,
        EOPNOTSUPP,
        "The hypervisor beneath this machine hides a control: report it.",
    )?;
    let cet = facts.cr4 & cr4::CET != 0;
    row(
        "CET state controls",
        "indirect-branch tracking of the kernel must not reach the image",
        on.cet.into(),
        "allowed where CR4.CET is set",
        on.cet || !cet,
        EOPNOTSUPP,
        "Boot with ibt=off.",
    )?;
    row(
        "Processor Trace",
        "VMXON would fault while it traces",
        facts.trace_enabled.into(),
        "off, or allowed in VMX operation",
        !facts.trace_enabled,
        EBUSY,
        "Stop tracing (perf record -e intel_pt//).",
    )
}

fn svm_rows(
    facts: &Facts,
    row: &mut impl FnMut(
        &'static str,
        &'static str,
        u64,
        &'static str,
        bool,
        Error,
        &'static str,
    ) -> Push,
) -> Push {
    row(
        "VM_CR.SVMDIS",
        "firmware decides on EFER.SVME",
        facts.firmware,
        "bit 4 clear",
        facts.firmware & 1 << 4 == 0,
        ENODEV,
        "Enable SVM (AMD-V) in the firmware set-up.",
    )?;
    row(
        "nested paging",
        "second-level translation",
        (facts.svm[1] & 1).into(),
        "CPUID 8000_000Ah EDX bit 0",
        facts.svm[1] & 1 != 0,
        EOPNOTSUPP,
        "This processor is too old.",
    )?;
    row(
        "address space identifiers",
        "one for the root, one for a child",
        facts.svm[0].into(),
        "at least 3",
        facts.svm[0] >= 3,
        EOPNOTSUPP,
        "This processor is too old.",
    )
}
