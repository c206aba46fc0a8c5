// SPDX-License-Identifier: GPL-2.0
//! The root's control structures: what the VMCS and the VMCB of a CPU hold at launch.
//!
//! Pure functions of the captured state and the capabilities, so that they run in host tests; the
//! launch code only stores what they say.

use super::regs::{cr0, cr4, efer, msr};
use super::state::{CpuState, Segment};
use super::vmcb::{intercept, msrpm, Vmcb};
use super::vmcs::{adjust, allows, entry_control, exit_control, field, processor, secondary};

/// The VMX capability MSRs that decide on controls (SDM appendix A).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // The names are the MSRs'.
pub struct VmxCapabilities {
    pub basic: u64,
    pub misc: u64,
    pub pin: u64,
    pub processor: u64,
    pub secondary: u64,
    pub exit: u64,
    pub entry: u64,
    pub ept_vpid: u64,
}

/// CPUID features that need a control to work in the guest (SDM 27.3).
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)] // The names are the instructions'.
pub struct EnabledInstructions {
    pub rdtscp: bool,
    pub invpcid: bool,
    pub xsaves: bool,
    pub user_wait: bool,
    pub pconfig: bool,
}

/// The controls of a root VMCS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // The names are the fields'.
pub struct VmxControls {
    pub pin: u32,
    pub processor: u32,
    pub secondary: u32,
    pub exit: u32,
    pub entry: u32,
    /// Whether entries and exits load the CET state.
    pub cet: bool,
}

impl VmxControls {
    /// The controls of the root: nothing exits that need not, every instruction that CPUID announces
    /// is enabled.
    ///
    /// NMIs do not exit either: one that arrives while the root runs goes straight to Linux, one that
    /// arrives in the image is sent again and stays pending until the entry unblocks it (SDM 27.7.1.1).
    pub const fn root(cap: &VmxCapabilities, on: EnabledInstructions) -> Self {
        let mut want2 = secondary::EPT | secondary::VPID | secondary::UNRESTRICTED_GUEST;
        if on.rdtscp {
            want2 |= secondary::RDTSCP;
        }
        if on.invpcid {
            want2 |= secondary::INVPCID;
        }
        if on.xsaves {
            want2 |= secondary::XSAVES;
        }
        if on.user_wait {
            want2 |= secondary::USER_WAIT;
        }
        if on.pconfig {
            want2 |= secondary::PCONFIG;
        }
        let cet =
            allows(entry_control::LOAD_CET, cap.entry) && allows(exit_control::LOAD_CET, cap.exit);
        let mut entry = entry_control::LOAD_DEBUG
            | entry_control::IA32E
            | entry_control::LOAD_PAT
            | entry_control::LOAD_EFER;
        let mut exit = exit_control::SAVE_DEBUG
            | exit_control::HOST_64BIT
            | exit_control::SAVE_PAT
            | exit_control::LOAD_PAT
            | exit_control::SAVE_EFER
            | exit_control::LOAD_EFER;
        if cet {
            entry |= entry_control::LOAD_CET;
            exit |= exit_control::LOAD_CET;
        }
        Self {
            pin: adjust(0, cap.pin),
            processor: adjust(processor::MSR_BITMAP | processor::SECONDARY, cap.processor),
            secondary: adjust(want2, cap.secondary),
            exit: adjust(exit, cap.exit),
            entry: adjust(entry, cap.entry),
            cet,
        }
    }
}

/// Where the image wants to be entered on this CPU.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)] // The names are the fields'.
pub struct VmxHost {
    pub cr3: u64,
    pub rip: u64,
    pub rsp: u64,
    pub gdt: u64,
    pub idt: u64,
    pub tss: u64,
    pub area: u64,
    pub code: u16,
    pub data: u16,
    pub task: u16,
    pub eptp: u64,
    pub msr_bitmap: u64,
}

const SEGMENTS: [(u32, u32, u32, u32); 8] = [
    (
        field::GUEST_CS_SELECTOR,
        field::GUEST_CS_BASE,
        field::GUEST_CS_LIMIT,
        field::GUEST_CS_RIGHTS,
    ),
    (
        field::GUEST_SS_SELECTOR,
        field::GUEST_SS_BASE,
        field::GUEST_SS_LIMIT,
        field::GUEST_SS_RIGHTS,
    ),
    (
        field::GUEST_DS_SELECTOR,
        field::GUEST_DS_BASE,
        field::GUEST_DS_LIMIT,
        field::GUEST_DS_RIGHTS,
    ),
    (
        field::GUEST_ES_SELECTOR,
        field::GUEST_ES_BASE,
        field::GUEST_ES_LIMIT,
        field::GUEST_ES_RIGHTS,
    ),
    (
        field::GUEST_FS_SELECTOR,
        field::GUEST_FS_BASE,
        field::GUEST_FS_LIMIT,
        field::GUEST_FS_RIGHTS,
    ),
    (
        field::GUEST_GS_SELECTOR,
        field::GUEST_GS_BASE,
        field::GUEST_GS_LIMIT,
        field::GUEST_GS_RIGHTS,
    ),
    (
        field::GUEST_LDTR_SELECTOR,
        field::GUEST_LDTR_BASE,
        field::GUEST_LDTR_LIMIT,
        field::GUEST_LDTR_RIGHTS,
    ),
    (
        field::GUEST_TR_SELECTOR,
        field::GUEST_TR_BASE,
        field::GUEST_TR_LIMIT,
        field::GUEST_TR_RIGHTS,
    ),
];

/// Writes the VMCS of the root: guest state = `cpu`, host state = `host`. RSP, RIP and RFLAGS are left
/// to the entry code. `write` stores one field.
pub fn write_vmcs(
    cpu: &CpuState,
    controls: &VmxControls,
    host: &VmxHost,
    write: &mut impl FnMut(u32, u64),
) {
    use field::*;
    write(PIN_CONTROLS, controls.pin.into());
    write(PROCESSOR_CONTROLS, controls.processor.into());
    write(SECONDARY_CONTROLS, controls.secondary.into());
    write(EXIT_CONTROLS, controls.exit.into());
    write(ENTRY_CONTROLS, controls.entry.into());
    write(VPID, 1);
    write(EPT_POINTER, host.eptp);
    write(MSR_BITMAP, host.msr_bitmap);
    write(LINK_POINTER, u64::MAX);
    for zero in [
        EXCEPTION_BITMAP,
        PAGE_FAULT_MASK,
        PAGE_FAULT_MATCH,
        CR3_TARGET_COUNT,
        EXIT_MSR_STORE_COUNT,
        EXIT_MSR_LOAD_COUNT,
        ENTRY_MSR_LOAD_COUNT,
        ENTRY_INTERRUPTION,
        GUEST_ACTIVITY,
        GUEST_INTERRUPTIBILITY,
        GUEST_PENDING_DEBUG,
    ] {
        write(zero, 0);
    }
    if controls.secondary & secondary::XSAVES != 0 {
        write(XSS_EXITING_BITMAP, 0);
    }
    // The image owns CR0.NE (a CPU that comes from SIPI clears it) and CR4.VMXE; the rest is Linux'.
    write(CR0_MASK, cr0::NE);
    write(CR0_SHADOW, cpu.cr0);
    write(CR4_MASK, cr4::VMXE);
    write(CR4_SHADOW, cpu.cr4 & !cr4::VMXE);
    write(GUEST_CR0, cpu.cr0);
    write(GUEST_CR3, cpu.cr3);
    write(GUEST_CR4, cpu.cr4 | cr4::VMXE);
    write(GUEST_DR7, cpu.dr7);
    write(GUEST_DEBUGCTL, cpu.debugctl);
    write(GUEST_EFER, cpu.efer);
    write(GUEST_PAT, cpu.pat);
    write(GUEST_SYSENTER_CS, cpu.sysenter_cs);
    write(GUEST_SYSENTER_ESP, cpu.sysenter_esp);
    write(GUEST_SYSENTER_EIP, cpu.sysenter_eip);
    let segments = [
        cpu.cs, cpu.ss, cpu.ds, cpu.es, cpu.fs, cpu.gs, cpu.ldtr, cpu.tr,
    ];
    for ((selector, base, limit, rights), s) in SEGMENTS.into_iter().zip(segments) {
        write(selector, s.selector.into());
        write(base, s.base);
        write(limit, s.limit.into());
        write(rights, s.rights.into());
    }
    write(GUEST_FS_BASE, cpu.fs_base);
    write(GUEST_GS_BASE, cpu.gs_base);
    write(GUEST_GDTR_BASE, cpu.gdtr.base);
    write(GUEST_GDTR_LIMIT, cpu.gdtr.limit.into());
    write(GUEST_IDTR_BASE, cpu.idtr.base);
    write(GUEST_IDTR_LIMIT, cpu.idtr.limit.into());
    if controls.cet {
        write(GUEST_S_CET, cpu.s_cet);
        write(GUEST_SSP, 0);
        write(GUEST_SSP_TABLE, cpu.ssp_table);
        write(HOST_S_CET, 0);
        write(HOST_SSP, 0);
        write(HOST_SSP_TABLE, 0);
    }
    write(HOST_CR0, cpu.cr0);
    write(HOST_CR3, host.cr3);
    write(HOST_CR4, host_cr4(cpu.cr4));
    write(HOST_CS_SELECTOR, host.code.into());
    write(HOST_SS_SELECTOR, host.data.into());
    write(HOST_DS_SELECTOR, 0);
    write(HOST_ES_SELECTOR, 0);
    write(HOST_FS_SELECTOR, 0);
    write(HOST_GS_SELECTOR, 0);
    write(HOST_TR_SELECTOR, host.task.into());
    write(HOST_FS_BASE, 0);
    write(HOST_GS_BASE, host.area);
    write(HOST_TR_BASE, host.tss);
    write(HOST_GDTR_BASE, host.gdt);
    write(HOST_IDTR_BASE, host.idt);
    write(HOST_SYSENTER_CS, 0);
    write(HOST_SYSENTER_ESP, 0);
    write(HOST_SYSENTER_EIP, 0);
    write(HOST_EFER, cpu.efer);
    write(HOST_PAT, cpu.pat);
    write(HOST_RIP, host.rip);
    write(HOST_RSP, host.rsp);
}

/// CR4 of the image on VT-x. PCIDE, LA57 and OSXSAVE stay as Linux has them: they may not change
/// while leaving, and XSAVE instructions need the last. CET, FRED, SMEP, SMAP and the protection keys
/// mean nothing to code that never touches user pages.
const fn host_cr4(linux: u64) -> u64 {
    (linux | cr4::VMXE) & !(cr4::CET | cr4::FRED | cr4::PKE | cr4::PKS | cr4::SMEP | cr4::SMAP)
}

/// Fills the VMCB of the root. RSP, RIP, RFLAGS and RAX are left to the entry code, and FS, GS, TR,
/// LDTR and the system-call MSRs to VMSAVE.
pub fn fill_vmcb(
    cpu: &CpuState,
    nested_cr3: u64,
    msrpm_base: u64,
    iopm_base: u64,
    vmcb: &mut Vmcb,
) {
    vmcb.intercepts[3] = intercept::W3_CPUID
        | intercept::W3_INVD
        | intercept::W3_INVLPGA
        | intercept::W3_MSR
        | intercept::W3_SHUTDOWN;
    vmcb.intercepts[4] = intercept::W4_SVM;
    vmcb.iopm_base = iopm_base;
    vmcb.msrpm_base = msrpm_base;
    vmcb.asid = 1;
    vmcb.tlb_control = 1;
    vmcb.nested_control = 1;
    vmcb.nested_cr3 = nested_cr3;
    vmcb.cs = cpu.cs.into();
    vmcb.ss = cpu.ss.into();
    vmcb.ds = cpu.ds.into();
    vmcb.es = cpu.es.into();
    vmcb.gdtr.base = cpu.gdtr.base;
    vmcb.gdtr.limit = cpu.gdtr.limit.into();
    vmcb.idtr.base = cpu.idtr.base;
    vmcb.idtr.limit = cpu.idtr.limit.into();
    vmcb.efer = cpu.efer | efer::SVME;
    vmcb.cr0 = cpu.cr0;
    vmcb.cr2 = cpu.cr2;
    vmcb.cr3 = cpu.cr3;
    vmcb.cr4 = cpu.cr4;
    vmcb.dr6 = cpu.dr6;
    vmcb.dr7 = cpu.dr7;
    vmcb.pat = cpu.pat;
    vmcb.s_cet = cpu.s_cet;
    vmcb.isst = cpu.ssp_table;
}

/// MSRs of AMD-V that the root may not touch directly: EFER (SVME is hidden), VM_CR and VM_HSAVE_PA.
const ROOT_MSRS: [u32; 3] = [msr::EFER, msr::VM_CR, msr::VM_HSAVE_PA];

/// Sets the bits of the root's MSR permission map. `map` is zeroed and [`msrpm::BYTES`] long.
pub fn fill_root_msrpm(map: &mut [u8]) {
    for (byte, shift) in ROOT_MSRS.into_iter().filter_map(msrpm::position) {
        if let Some(b) = map.get_mut(byte) {
            *b |= 3 << shift;
        }
    }
}

/// The segment of a selector: `read` gives the 8-byte descriptor at an offset of the GDT (LDT
/// selectors are taken as unusable: the kernel uses none).
pub fn segment(selector: u16, gdt_limit: u16, system: bool, read: impl Fn(u16) -> u64) -> Segment {
    let offset = selector & !7;
    let size = if system { 15 } else { 7 };
    if offset == 0 || selector & 4 != 0 || gdt_limit < offset.saturating_add(size) {
        return Segment::unusable(selector);
    }
    let low = read(offset);
    let high = if system { read(offset + 8) } else { 0 };
    if (low >> 47) & 1 == 0 {
        return Segment::unusable(selector);
    }
    Segment::from_descriptor(selector, low, high, system)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::vec::Vec;

    /// Capability MSRs as the `tigerlake` bed shows them.
    fn tigerlake() -> VmxCapabilities {
        VmxCapabilities {
            basic: 0x01d8_1000_0000_0004,
            misc: 0x6004_01e0,
            pin: 0x0000_00ff_0000_0016,
            processor: 0xfff9_fffe_0400_6172,
            secondary: 0x0fff_ffff_0000_0000,
            exit: 0x1fff_ffff_0003_6dfb,
            entry: 0x0010_ffff_0000_11fb,
            ept_vpid: 0x0f01_0673_4141,
        }
    }

    fn all() -> EnabledInstructions {
        EnabledInstructions {
            rdtscp: true,
            invpcid: true,
            xsaves: true,
            user_wait: false,
            pconfig: false,
        }
    }

    #[test]
    fn root_passes_interrupts_and_nmis_through() {
        let c = VmxControls::root(&tigerlake(), all());
        assert_eq!(c.pin, 0x16);
        assert_eq!(
            c.processor & (processor::HLT | processor::MWAIT | processor::IO),
            0
        );
        assert_eq!(c.secondary, 0x10_10aa);
        assert!(c.cet);
    }

    #[test]
    fn instruction_that_cpuid_hides_is_not_enabled() {
        let c = VmxControls::root(&tigerlake(), EnabledInstructions::default());
        assert_eq!(c.secondary, 0xa2);
    }

    #[test]
    fn each_vmcs_field_is_written_once_and_vmxe_is_hidden() {
        let cpu = CpuState {
            cr4: 0x37_26f0,
            cr0: 0x8005_0033,
            ..Default::default()
        };
        let controls = VmxControls::root(&tigerlake(), all());
        let host = VmxHost {
            cr3: 0x1000,
            rip: 2,
            rsp: 3,
            gdt: 4,
            idt: 5,
            tss: 6,
            area: 7,
            code: 8,
            data: 16,
            task: 24,
            eptp: 0x201e,
            msr_bitmap: 0x3000,
        };
        let mut fields: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
        write_vmcs(&cpu, &controls, &host, &mut |f, v| {
            fields.entry(f).or_default().push(v)
        });
        assert_eq!(fields[&field::CR4_SHADOW], [0x37_06f0]);
        assert_eq!(fields[&field::GUEST_CR4], [0x37_26f0]);
        // FS and GS bases come from MSRs and replace the descriptor's.
        for (f, v) in &fields {
            let expected = if [field::GUEST_FS_BASE, field::GUEST_GS_BASE].contains(f) {
                2
            } else {
                1
            };
            assert_eq!(v.len(), expected, "field {f:#x}");
        }
    }

    #[test]
    fn selectors_beyond_the_table_are_unusable() {
        let read = |_: u16| 0x00cf_9300_0000_ffff;
        assert_eq!(segment(0x18, 0x17, false, read), Segment::unusable(0x18));
        assert_eq!(segment(0x10, 0x17, false, read).rights, 0xc093);
        assert_eq!(segment(0x10, 0x17, true, read), Segment::unusable(0x10));
    }

    #[test]
    fn root_msrpm_intercepts_svme_holders_only() {
        let mut map = [0u8; msrpm::BYTES];
        fill_root_msrpm(&mut map);
        assert_eq!(map.iter().map(|b| b.count_ones()).sum::<u32>(), 6);
        assert_eq!(map[0x820], 3);
        assert_eq!(map[0x1045], 0xc3);
    }
}
