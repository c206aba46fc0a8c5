// SPDX-License-Identifier: GPL-2.0
//! The virtual address space of the image.
//!
//! ```text
//! ffff_8000_0000_0000  image: text RX, rodata R, data and bss RW
//! ffff_8001_0000_0000  CPU 0 block | 2 MiB per CPU | windows at +1 MiB
//! ffff_8002_0000_0000  pages shared with the root: log ring, then one statistics page per CPU
//! ffff_8100_0000_0000  direct map: SPA + base, only of pages that the hypervisor owns
//! (Linux address)      the trampoline page of the module, for entering (AMD-V) and leaving
//! ```
//!
//! On a Linux host with 4-level paging this range is the hole that Linux keeps for hypervisors, so no
//! stale Linux translation can alias it.

/// Bytes of a page.
pub const PAGE_SIZE: u64 = 4096;

/// Where the image is linked and mapped.
pub const IMAGE_BASE: u64 = 0xffff_8000_0000_0000;
/// Block of CPU 0.
pub const CPU_BASE: u64 = 0xffff_8001_0000_0000;
/// Distance between the blocks of two CPUs: what one last-level table maps.
pub const CPU_STRIDE: u64 = 2 << 20;
/// Offset of the temporary windows inside a CPU's 2 MiB.
pub const CPU_WINDOWS: u64 = 1 << 20;
/// Windows of each CPU.
pub const WINDOW_COUNT: u64 = 3;
/// Pages shared with the root.
pub const SHARED_BASE: u64 = 0xffff_8002_0000_0000;
/// Start of the sparse direct map.
pub const DIRECT_BASE: u64 = 0xffff_8100_0000_0000;
/// Width of physical addresses that the direct map can hold.
pub const DIRECT_BITS: u32 = 46;

/// Largest number of logical processors.
pub const MAX_CPUS: usize = 512;

/// Pages of a CPU block (64 KiB), by use.
pub mod cpu_block {
    /// Pages allocated for one CPU.
    pub const PAGES: usize = 16;
    /// Allocation order of a block.
    pub const ORDER: u32 = 4;
    /// [`CpuArea`](super::super::boot::CpuArea): two pages.
    pub const AREA: usize = 0;
    /// The root's VMCS or VMCB.
    pub const ROOT_CONTROL: usize = 2;
    /// VMXON region or AMD host save area.
    pub const HOST_SAVE: usize = 3;
    /// Not mapped: catches an overflow of the stack above it.
    pub const GUARD: usize = 4;
    /// Stack.
    pub const STACK: usize = 5;
    /// Pages of the stack.
    pub const STACK_PAGES: usize = 4;
    /// Not mapped: catches an overflow of the interrupt stacks above it.
    pub const IST_GUARD: usize = 9;
    /// Interrupt stacks of #DF, NMI and #MC, one page each.
    pub const IST: usize = 10;
    /// Number of interrupt stacks.
    pub const IST_COUNT: usize = 3;
    /// The root's extended state while a child runs.
    pub const ROOT_XSAVE: usize = 13;
    /// The root's other registers while a child runs.
    pub const ROOT_STATE: usize = 14;
    /// A buffer that does not fit on the stack.
    pub const SCRATCH: usize = 15;
}

/// Virtual address of page `page` of the block of CPU `cpu`.
pub const fn cpu_page(cpu: usize, page: usize) -> u64 {
    CPU_BASE + cpu as u64 * CPU_STRIDE + page as u64 * PAGE_SIZE
}

/// Selectors of the image's GDT. Code and data are those of Linux (`__KERNEL_CS`, `__KERNEL_DS`), so that
/// an NMI at the very end of a leave, already taken through Linux' IDT, saves selectors that mean the same
/// in Linux' GDT.
pub mod selector {
    /// 64-bit code.
    pub const CODE: u16 = 0x10;
    /// Data.
    pub const DATA: u16 = 0x18;
    /// Task state segment (16 bytes).
    pub const TSS: u16 = 0x20;
}

/// Virtual address of the xAPIC page, mapped uncached, behind the pages shared with the root.
pub const APIC_PAGE: u64 = SHARED_BASE + ((super::log::LOG_PAGES + MAX_CPUS) as u64) * PAGE_SIZE;

/// Virtual address of the statistics page of CPU `cpu`.
pub const fn stats_page(cpu: usize) -> u64 {
    SHARED_BASE + ((super::log::LOG_PAGES + cpu) as u64) * PAGE_SIZE
}
