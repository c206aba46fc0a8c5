// SPDX-License-Identifier: GPL-2.0
//! What the loader leaves for the image, and the block of each CPU.
//!
//! The image is a flat file linked at [`IMAGE_BASE`](super::layout::IMAGE_BASE) that begins with an
//! [`ImageHeader`]. The loader copies it to pages of its own, writes [`BootInfo`] where the header says,
//! fills one [`CpuArea`] per CPU, builds the page tables, and enters.

/// First eight bytes of the image: "HVIMAGE" and the layout version.
pub const IMAGE_MAGIC: u64 = u64::from_le_bytes(*b"HVIMAGE\x01");

/// Header at offset 0 of the image. Offsets are in bytes from the image's start, addresses are virtual.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct ImageHeader {
    /// [`IMAGE_MAGIC`].
    pub magic: u64,
    /// End of header and text (page multiple): mapped read and execute.
    pub text_end: u64,
    /// End of read-only data (page multiple).
    pub rodata_end: u64,
    /// End of the bytes in the file: initialised data.
    pub file_end: u64,
    /// End of the image in memory (page multiple), zeroed from `file_end` on.
    pub memory_end: u64,
    /// Offset of [`BootInfo`].
    pub boot_info: u64,
    /// Address of the VT-x exit entry (host RIP).
    pub vmx_exit: u64,
    /// Address that the AMD-V trampoline jumps to.
    pub svm_start: u64,
    /// Address of the exception stub of vector 0; vector `n` is at `+ 16 * n`, for 32 vectors.
    pub exception_stubs: u64,
    /// Offset of the page for the IDT.
    pub idt: u64,
}

/// Processor vendor, that is which back end runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Vendor {
    /// Intel VT-x.
    Vmx = 1,
    /// AMD-V.
    Svm = 2,
}

/// Capability MSRs of VT-x that decide on a child's controls (SDM appendix A).
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
#[allow(missing_docs)] // The names are the MSRs'.
pub struct VmxCapabilityMsrs {
    pub basic: u64,
    pub misc: u64,
    pub pin: u64,
    pub processor: u64,
    pub secondary: u64,
    pub exit: u64,
    pub entry: u64,
}

/// Facts for all CPUs, written once by the loader before the first CPU enters.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct BootInfo {
    /// Which back end runs.
    pub vendor: Vendor,
    /// Number of CPU blocks (possible CPUs of Linux).
    pub cpus: u32,
    /// 1 if `private::FAULT` is allowed (test parameter of the module).
    pub allow_fault: u32,
    /// CR3 of the image.
    pub host_cr3: u64,
    /// Root table of the root partition's second-level translation.
    pub root_slat: u64,
    /// EPT pointer of the root (VT-x) as in the VMCS.
    pub root_eptp: u64,
    /// Added to an SPA gives the address in Linux' direct map; used only after leaving.
    pub linux_direct_map: u64,
    /// Linux address of the code that ends a leave, mapped at the same address in the image.
    pub leave_trampoline: u64,
    /// First page of the pool for tables, physically contiguous, in the direct map.
    pub pool: u64,
    /// Pages of the pool.
    pub pool_pages: u64,
    /// Pages of the pool that the loader used.
    pub pool_used: u64,
    /// SPA of the page that a read of a sealed page sees.
    pub zero_page: u64,
    /// Physical address bits of the processor.
    pub physical_bits: u32,
    /// 1 if VM entries and exits load the CET state (VT-x).
    pub vmx_cet: u32,
    /// 1 if the processor saves the address of the next instruction at exits (AMD-V NRIPS).
    pub svm_next_rip: u32,
    /// Levels of the image's page tables, as many as Linux has.
    pub host_levels: u32,
    /// 1 if second-level tables may have 1 GiB leaves.
    pub slat_1g: u32,
    /// Two pages, MSR bitmap (VT-x) or permission map (AMD-V) of children.
    pub child_msr_map: u64,
    /// Three pages, I/O permission map of children: all ports exit (AMD-V).
    pub child_iopm: u64,
    /// Host TSC ticks per second.
    pub tsc_hz: u64,
    /// The VMX capability MSRs as the loader read them.
    pub vmx: VmxCapabilityMsrs,
    /// XCR0 of the root when the loader ran, and whether XSAVES exists.
    pub root_xcr0: u64,
    /// 1 if XSAVES and XRSTORS exist.
    pub xsaves: u64,
    /// Bits of CR3 that tell the page table of a user program from the kernel's (page-table isolation), or 0.
    pub user_cr3_bits: u64,
    /// What the world switch does against speculation: see [`mitigation::action`](super::mitigation::action).
    pub mitigations: u32,
}

/// Registers of a virtual processor that hardware does not switch, in the order of their numbers.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct VpContext {
    /// RAX, RCX, RDX, RBX, (RSP unused), RBP, RSI, RDI, R8..R15.
    pub gprs: [u64; 16],
    /// SPA of the VMCS or VMCB.
    pub control_spa: u64,
    /// Address of the VMCB in the image (AMD-V).
    pub control: u64,
    /// 1 for the root's.
    pub is_root: u64,
}

/// Descriptor-table register as LGDT and LIDT read it, padded so that the limit sits at offset 6 of an
/// aligned 16-byte slot.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct TableRegister {
    pad: [u16; 3],
    /// Limit in bytes.
    pub limit: u16,
    /// Linear base address.
    pub base: u64,
}

impl TableRegister {
    /// A register value.
    pub const fn new(base: u64, limit: u16) -> Self {
        Self {
            pad: [0; 3],
            limit,
            base,
        }
    }
}

/// Native state that the leave trampoline loads. Filled by the image, read through Linux' direct map.
/// The assembly of the trampoline knows the offsets; they are asserted below.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct LeaveFrame {
    /// 0x00: GPRs in the order R15, R14, R13, R12, R11, R10, R9, R8, RDI, RSI, RBP, RBX, RDX, RCX, RAX.
    pub gprs: [u64; 15],
    /// 0x78: RIP, CS, RFLAGS, RSP, SS: the frame of the final IRETQ.
    pub iret: [u64; 5],
    /// 0xa0: CR0.
    pub cr0: u64,
    /// 0xa8: CR3.
    pub cr3: u64,
    /// 0xb0: CR4.
    pub cr4: u64,
    /// 0xb8: EFER.
    pub efer: u64,
    /// 0xc0: DR7.
    pub dr7: u64,
    /// 0xc8: IA32_DEBUGCTL.
    pub debugctl: u64,
    /// 0xd0: FS base.
    pub fs_base: u64,
    /// 0xd8: GS base.
    pub gs_base: u64,
    /// 0xe0: PAT.
    pub pat: u64,
    /// 0xe8: S_CET, restored if `has_cet`.
    pub s_cet: u64,
    /// 0xf0: interrupt SSP table address, restored if `has_cet`.
    pub ssp_table: u64,
    /// 0xf8: 1 if the CET registers exist.
    pub has_cet: u64,
    /// 0x100: DS, ES, FS, GS, LDTR, TR.
    pub selectors: [u16; 8],
    /// 0x110: GDTR.
    pub gdtr: TableRegister,
    /// 0x120: IDTR.
    pub idtr: TableRegister,
    /// 0x130: GDTR of the copy below, in Linux' direct map.
    pub copy_gdtr: TableRegister,
    /// 0x140: 1 on VT-x: load TR from the copy, and LDTR; 0 on AMD-V: set GIF.
    pub vmx: u64,
    /// 0x148: 1 if the loader filled the frame and the CPU has not proved itself yet (AMD-V).
    pub launching: u64,
    /// 0x150: a GDT with room for Linux' TSS descriptor, busy bit clear.
    pub copy_gdt: [u64; 16],
}

const _: () = {
    use core::mem::offset_of;
    assert!(offset_of!(LeaveFrame, iret) == 0x78);
    assert!(offset_of!(LeaveFrame, cr0) == 0xa0);
    assert!(offset_of!(LeaveFrame, efer) == 0xb8);
    assert!(offset_of!(LeaveFrame, fs_base) == 0xd0);
    assert!(offset_of!(LeaveFrame, has_cet) == 0xf8);
    assert!(offset_of!(LeaveFrame, selectors) == 0x100);
    assert!(offset_of!(LeaveFrame, gdtr) == 0x110);
    assert!(offset_of!(LeaveFrame, idtr) == 0x120);
    assert!(offset_of!(LeaveFrame, copy_gdtr) == 0x130);
    assert!(offset_of!(LeaveFrame, vmx) == 0x140);
    assert!(offset_of!(LeaveFrame, copy_gdt) == 0x150);
};

/// State of a CPU as the module and `status` see it.
pub mod cpu_state {
    /// Runs natively.
    pub const NATIVE: u32 = 0;
    /// Runs beneath the image.
    pub const LAUNCHED: u32 = 1;
    /// The image faulted on it and gave it back.
    pub const FAULTED: u32 = 2;
}

/// First two pages of a CPU block.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct CpuArea {
    /// 0x00: address of this area in the image.
    pub self_address: u64,
    /// 0x08: address of the [`VpContext`] that runs.
    pub current: u64,
    /// 0x10: top of the stack: HOST_RSP of VT-x; the word there is `self_address`.
    pub stack: u64,
    /// 0x18: SPA of the block.
    pub block_spa: u64,
    /// 0x20: Linux' number of the CPU.
    pub cpu: u32,
    /// 0x24: APIC ID.
    pub apic_id: u32,
    /// 0x28: 1 while NMIs that arrive in the image must be sent again by x2APIC, 0 by the APIC page.
    pub x2apic: u32,
    /// 0x2c: see [`cpu_state`]; cleared by the image when it leaves.
    pub state: u32,
    /// 0x30: 1 if the root has to take a machine check when the CPU returns to it (VT-x).
    pub machine_check: u64,
    /// 0x38: GDTR operand for `svm_start`.
    pub gdtr: TableRegister,
    /// 0x48: IDTR operand for `svm_start`.
    pub idtr: TableRegister,
    /// 0x58: the root's virtual processor on this CPU.
    pub root: VpContext,
    /// GDT: two unused, code, data, TSS (two slots).
    pub gdt: [u64; 6],
    /// Task state segment (SDM 8.7), 104 bytes and an I/O map base beyond the limit.
    pub tss: [u32; 26],
    /// Primary processor-based controls of the root (VT-x).
    pub vmx_processor_controls: u64,
    /// Address of the VP that ran last on this CPU: another one finds foreign translations under the children's ASID.
    pub last_child: u64,
    /// Its partition.
    pub last_partition: u64,
    /// Address of the VP whose extended state and debug registers are in the processor; 0 while those of the root are. If the
    /// root runs meanwhile, the VP is paused.
    pub extended: u64,
    /// What leaving restores.
    pub leave: LeaveFrame,
}

const _: () = {
    use core::mem::{offset_of, size_of};
    assert!(offset_of!(CpuArea, current) == 8);
    assert!(offset_of!(CpuArea, stack) == 0x10);
    assert!(offset_of!(CpuArea, x2apic) == 0x28);
    assert!(offset_of!(CpuArea, machine_check) == 0x30);
    assert!(offset_of!(CpuArea, gdtr) == 0x38);
    assert!(offset_of!(CpuArea, idtr) == 0x48);
    assert!(offset_of!(CpuArea, root) == 0x58);
    assert!(offset_of!(VpContext, control_spa) == 0x80);
    assert!(offset_of!(VpContext, is_root) == 0x90);
    assert!(size_of::<CpuArea>() <= 2 * 4096);
};
