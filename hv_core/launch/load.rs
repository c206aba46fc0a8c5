// SPDX-License-Identifier: GPL-2.0
//! Loading the image: memory, address space, second-level table of the root, and the CPU blocks.

use core::cell::UnsafeCell;
use core::mem::offset_of;

use kernel::prelude::*;

use crate::abi::boot::{
    BootInfo, CpuArea, ImageHeader, LeaveFrame, TableRegister, Vendor, VmxCapabilityMsrs,
    VpContext, IMAGE_MAGIC,
};
use crate::abi::layout::{
    cpu_block, cpu_page, selector, stats_page, APIC_PAGE, CPU_WINDOWS, DIRECT_BASE, IMAGE_BASE,
    PAGE_SIZE, SHARED_BASE, WINDOW_COUNT,
};
use crate::abi::log::{LogRing, LOG_PAGES};
use crate::abi::mitigation;
use crate::abi::stats::StatsPage;
use crate::launch::cpu::stack_top;
use crate::launch::preflight::Facts;
use crate::sys::{self, Pages};
use crate::x86::mtrr::{MemoryType, MtrrState};
use crate::x86::paging::{
    Attributes, Ept, Format, Host, Layout, Npt, PageSize, PageTable, TableMemory,
};
use crate::x86::regs::{msr, APIC_DEFAULT_BASE};
use crate::x86::root::{fill_root_msrpm, VmxControls};
use crate::x86::state::CpuState;
use crate::x86::vmcb::msrpm;

/// Pages of the pool besides those that grow with the machine.
const POOL_BASE_PAGES: u64 = 512;
/// Pool pages per CPU: its own table, and tables that split the second-level mapping around its block.
const POOL_PAGES_PER_CPU: u64 = 4;
/// Pages of the AMD-V permission maps: 2 for MSRs, 3 for ports.
const MSRPM_PAGES: u64 = 2;
const IOPM_PAGES: u64 = 3;

/// MSRs that a child reads and writes without an exit: SYSENTER, the system-call MSRs and the bases.
const CHILD_MSRS: [u32; 10] = [
    0x174,
    0x175,
    0x176,
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0100,
    0xc000_0101,
    0xc000_0102,
];

/// Memory of one CPU.
pub(crate) struct CpuBlock {
    cpu: u32,
    pages: Pages,
    template: CpuArea,
}

impl CpuBlock {
    /// Linux' number of the CPU.
    pub(crate) fn cpu(&self) -> u32 {
        self.cpu
    }

    /// Address of page `page` in Linux' direct map. What the image keeps there may be read and written
    /// only while the CPU is native.
    pub(crate) fn page(&self, page: usize) -> *mut u8 {
        // Blocks have `cpu_block::PAGES` pages and callers pass its constants.
        self.pages.address().wrapping_add(page * PAGE_SIZE as usize)
    }

    /// Physical address of page `page`.
    pub(crate) fn page_spa(&self, page: usize) -> u64 {
        self.pages.spa() + page as u64 * PAGE_SIZE
    }

    fn area(&self) -> *mut CpuArea {
        self.page(cpu_block::AREA).cast()
    }

    /// Prepares the block for an entry: area as the loader made it, the rest zero.
    pub(crate) fn reset(&self) {
        // SAFETY: the CPU is native, so the image does not use the block; the sizes are those of the
        // allocation. The top word of the stack is the image's way to the area.
        unsafe {
            core::ptr::write_bytes(self.pages.address(), 0, self.pages.len());
            self.area().write(self.template);
            let top = self.page(cpu_block::STACK + cpu_block::STACK_PAGES).sub(16);
            top.cast::<u64>().write(self.template.self_address);
        }
    }

    /// What the image restores if the processor refuses the first entry and spoils the VMCB (AMD-V). The entry
    /// code adds RIP, RFLAGS and RSP.
    pub(crate) fn prepare_leave(&self, state: &CpuState) -> *mut LeaveFrame {
        // SAFETY: the CPU is native and on its way in.
        let frame = unsafe { &raw mut (*self.area()).leave };
        // SAFETY: all-zero is a valid `LeaveFrame`: integers only.
        let empty: LeaveFrame = unsafe { core::mem::zeroed() };
        let value = LeaveFrame {
            iret: [0, state.cs.selector.into(), 0, 0, state.ss.selector.into()],
            cr0: state.cr0,
            cr3: state.cr3,
            cr4: state.cr4,
            efer: state.efer,
            dr7: state.dr7,
            fs_base: state.fs_base,
            gs_base: state.gs_base,
            pat: state.pat,
            selectors: [
                state.ds.selector,
                state.es.selector,
                state.fs.selector,
                state.gs.selector,
                0,
                0,
                0,
                0,
            ],
            gdtr: TableRegister::new(state.gdtr.base, state.gdtr.limit),
            idtr: TableRegister::new(state.idtr.base, state.idtr.limit),
            launching: 1,
            ..empty
        };
        // SAFETY: as above.
        unsafe { frame.write(value) };
        frame
    }

    /// Notes the root's processor controls for the image.
    pub(crate) fn set_vmx_controls(&self, value: u32) {
        // SAFETY: the CPU is native and on its way in.
        unsafe { (*self.area()).vmx_processor_controls = value.into() };
    }
}

/// Tables from the pool, reached through Linux' direct map.
struct Pool {
    spa: u64,
    pages: u64,
    used: u64,
    free: u64,
}

impl Pool {
    fn entry(table: u64, index: usize) -> *mut u64 {
        ((sys::direct_map() + table) as *mut u64).wrapping_add(index)
    }

    /// Takes `count` contiguous zeroed pages.
    fn take(&mut self, count: u64) -> Option<u64> {
        let start = self.used;
        if count > self.pages - start {
            return None;
        }
        self.used += count;
        Some(self.spa + start * PAGE_SIZE)
    }
}

impl TableMemory for Pool {
    fn allocate(&mut self) -> Option<u64> {
        if self.free == 0 {
            return self.take(1);
        }
        let table = self.free;
        self.free = self.read(table, 0);
        self.write(table, 0, 0);
        Some(table)
    }

    fn free(&mut self, table: u64) {
        for index in 1..512 {
            self.write(table, index, 0);
        }
        let next = self.free;
        self.write(table, 0, next);
        self.free = table;
    }

    fn read(&self, table: u64, index: usize) -> u64 {
        // SAFETY: the builder passes tables of this pool and indices below 512; no CPU runs on them yet.
        unsafe { Self::entry(table, index).read() }
    }

    fn write(&mut self, table: u64, index: usize, entry: u64) {
        // SAFETY: as for `read`.
        unsafe { Self::entry(table, index).write(entry) }
    }
}

/// The image in memory, ready to be entered.
pub(crate) struct Loaded {
    facts: Facts,
    header: ImageHeader,
    boot: BootInfo,
    image: Pages,
    pool: Pages,
    zero: Pages,
    log: Pages,
    stats: KVec<Pages>,
    blocks: KVec<CpuBlock>,
    msrpm: u64,
    iopm: u64,
    /// Read position of the log ring; used under the caller's lock.
    log_read: UnsafeCell<u64>,
}

// SAFETY: the memory behind it is used by the image, by the CPU that a block belongs to, and through
// atomics; `log_read` is used by `drain_log` only, whose callers hold a lock.
unsafe impl Send for Loaded {}
// SAFETY: see above.
unsafe impl Sync for Loaded {}

fn align_up(value: u64) -> u64 {
    (value + PAGE_SIZE - 1) & !(PAGE_SIZE - 1)
}

fn order_for(pages: u64) -> u32 {
    pages.next_power_of_two().trailing_zeros()
}

fn table_error(error: crate::x86::paging::Error) -> Error {
    pr_err!("page tables of the image: {:?}\n", error);
    ENOMEM
}

/// Reads and checks the header of the embedded image.
fn read_header(image: &[u8]) -> Result<ImageHeader> {
    if image.len() < size_of::<ImageHeader>() {
        return Err(EINVAL);
    }
    // SAFETY: long enough; any bytes are a valid `ImageHeader`.
    let header = unsafe { image.as_ptr().cast::<ImageHeader>().read_unaligned() };
    let ordered = header.text_end <= header.rodata_end
        && header.rodata_end <= header.file_end
        && header.file_end <= align_up(image.len() as u64)
        && image.len() as u64 <= header.memory_end
        && header.boot_info + size_of::<BootInfo>() as u64 <= header.memory_end
        && header.idt + PAGE_SIZE <= header.memory_end;
    if header.magic != IMAGE_MAGIC || !ordered {
        pr_err!("the embedded image has a bad header\n");
        return Err(EINVAL);
    }
    Ok(header)
}

impl Loaded {
    /// Lays everything out. Nothing of Linux changes.
    pub(crate) fn new(facts: Facts, allow_fault: bool) -> Result<Self> {
        let bytes = sys::image();
        let header = read_header(bytes)?;
        let bits = sys::physical_bits();
        let mut pool_pages = POOL_BASE_PAGES + POOL_PAGES_PER_CPU * u64::from(sys::cpu_count());
        if !facts.second_level_1g() {
            pool_pages += 1 << bits.saturating_sub(30);
        } else {
            pool_pages += 1 << bits.saturating_sub(39);
        }
        let image = Pages::new(order_for(header.memory_end / PAGE_SIZE))?;
        let pool = Pages::new(order_for(pool_pages))?;
        let zero = Pages::new(0)?;
        let log = Pages::new(order_for(LOG_PAGES as u64))?;
        let mut stats = KVec::new();
        for _ in 0..sys::cpu_count() {
            stats.push(Pages::new(0)?, GFP_KERNEL)?;
        }
        let mut tables = Pool {
            spa: pool.spa(),
            pages: (pool.len() / 4096) as u64,
            used: 0,
            free: 0,
        };

        let mut blocks = KVec::new();
        for cpu in (0..sys::cpu_count()).filter(|cpu| sys::cpu_possible(*cpu)) {
            blocks.push(new_block(cpu, &header)?, GFP_KERNEL)?;
        }
        let msrpm = tables.take(MSRPM_PAGES).ok_or(ENOMEM)?;
        let iopm = tables.take(IOPM_PAGES).ok_or(ENOMEM)?;
        if facts.vendor() == Vendor::Svm {
            // SAFETY: the pages were just taken from the pool.
            let map = unsafe {
                core::slice::from_raw_parts_mut(
                    (sys::direct_map() + msrpm) as *mut u8,
                    msrpm::BYTES,
                )
            };
            fill_root_msrpm(map);
        }
        let child_msr_map = tables.take(MSRPM_PAGES).ok_or(ENOMEM)?;
        let child_iopm = tables.take(IOPM_PAGES).ok_or(ENOMEM)?;
        fill_child_maps(facts.vendor(), child_msr_map, child_iopm);
        let mut this = Self {
            facts,
            header,
            boot: BootInfo {
                vendor: facts.vendor(),
                cpus: sys::cpu_count(),
                allow_fault: allow_fault.into(),
                host_cr3: 0,
                root_slat: 0,
                root_eptp: 0,
                linux_direct_map: sys::direct_map(),
                leave_trampoline: sys::hv_leave as usize as u64,
                pool: pool.spa(),
                pool_pages: tables.pages,
                pool_used: 0,
                zero_page: zero.spa(),
                physical_bits: bits,
                vmx_cet: VmxControls::root(&facts.vmx, facts.instructions())
                    .cet
                    .into(),
                svm_next_rip: facts.svm_next_rip().into(),
                host_levels: if facts.la57() { 5 } else { 4 },
                slat_1g: facts.second_level_1g().into(),
                child_msr_map,
                child_iopm,
                tsc_hz: sys::tsc_hz(),
                vmx: VmxCapabilityMsrs {
                    basic: facts.vmx.basic,
                    misc: facts.vmx.misc,
                    pin: facts.vmx.pin,
                    processor: facts.vmx.processor,
                    secondary: facts.vmx.secondary,
                    exit: facts.vmx.exit,
                    entry: facts.vmx.entry,
                },
                root_xcr0: crate::launch::cpu::read_xcr0(),
                xsaves: facts.instructions().xsaves.into(),
                user_cr3_bits: sys::user_cr3_bits(),
                mitigations: mitigation::decide(sys::mitigations()),
            },
            image,
            pool,
            zero,
            log,
            stats,
            blocks,
            msrpm,
            iopm,
            log_read: UnsafeCell::new(0),
        };
        this.boot.host_cr3 = this.build_host_tables(&mut tables)?;
        let slat = match facts.vendor() {
            Vendor::Vmx => this.build_root_slat::<Ept>(
                &mut tables,
                4,
                &MtrrState::from_msrs(bits as u8, |n| sys::rdmsr(n).unwrap_or(0)),
            )?,
            // The nested table has as many levels as the host's (APM 15.25.3), and MTRRs still apply.
            Vendor::Svm => {
                let levels = if facts.la57() { 5 } else { 4 };
                this.build_root_slat::<Npt>(&mut tables, levels, &MtrrState::disabled(bits as u8))?
            }
        };
        this.boot.root_slat = slat;
        // EPT pointer: write-back tables, walk length 4 (SDM 26.6.11).
        this.boot.root_eptp = slat | 3 << 3 | 6;
        this.boot.pool_used = tables.used;
        this.copy_image(bytes);
        Ok(this)
    }

    /// Facts of the CPUs.
    pub(crate) fn facts(&self) -> &Facts {
        &self.facts
    }

    /// The back end.
    pub(crate) fn vendor(&self) -> Vendor {
        self.boot.vendor
    }

    /// The image's header.
    pub(crate) fn header(&self) -> &ImageHeader {
        &self.header
    }

    /// CR3 of the image.
    pub(crate) fn host_cr3(&self) -> u64 {
        self.boot.host_cr3
    }

    /// Root of the root partition's second-level table.
    pub(crate) fn root_slat(&self) -> u64 {
        self.boot.root_slat
    }

    /// EPT pointer.
    pub(crate) fn eptp(&self) -> u64 {
        self.boot.root_eptp
    }

    /// VT-x: a page of zeros, no MSR exits. It shares the page with the AMD-V map, which VT-x leaves empty.
    pub(crate) fn msr_bitmap(&self) -> u64 {
        self.msrpm
    }

    /// AMD-V MSR permission map.
    pub(crate) fn msrpm(&self) -> u64 {
        self.msrpm
    }

    /// AMD-V I/O permission map.
    pub(crate) fn iopm(&self) -> u64 {
        self.iopm
    }

    /// The block of a CPU.
    pub(crate) fn block(&self, cpu: u32) -> Option<&CpuBlock> {
        self.blocks.iter().find(|block| block.cpu == cpu)
    }

    /// What the world switch does against speculation: [`mitigation::action`].
    pub(crate) fn mitigations(&self) -> u32 {
        self.boot.mitigations
    }

    /// Bytes: image, one CPU block, pool.
    pub(crate) fn sizes(&self) -> [usize; 3] {
        [
            self.header.memory_end as usize,
            cpu_block::PAGES * PAGE_SIZE as usize,
            self.pool.len(),
        ]
    }

    /// Pages of the pool in use.
    pub(crate) fn pool_used(&self) -> u64 {
        self.boot.pool_used
    }

    /// Physical address of the image, for tests of the seal.
    pub(crate) fn image_spa(&self) -> u64 {
        self.image.spa()
    }

    /// Statistics of a CPU.
    pub(crate) fn stats(&self, cpu: u32) -> Option<&StatsPage> {
        let pages = self.stats.get(cpu as usize)?;
        // SAFETY: a zeroed page with atomics only, which lives as long as `self`.
        Some(unsafe { &*pages.address().cast::<StatsPage>() })
    }

    /// Passes each complete new line of the log ring to `line`.
    ///
    /// # Safety
    /// One caller at a time.
    pub(crate) unsafe fn drain_log(&self, mut line: impl FnMut(&[u8])) {
        use core::sync::atomic::Ordering;
        // SAFETY: zeroed pages with atomics only, which live as long as `self`.
        let ring = unsafe { &*self.log.address().cast::<LogRing>() };
        // SAFETY: by the caller's promise.
        let position = unsafe { &mut *self.log_read.get() };
        let head = ring.head.load(Ordering::Acquire);
        let size = ring.text.len() as u64;
        if head.saturating_sub(*position) > size {
            pr_warn!(
                "{} bytes of the image's log were overwritten\n",
                head - size - *position
            );
            *position = head - size;
        }
        let mut buffer = [0u8; 256];
        let mut used = 0;
        for at in *position..head {
            let byte = ring
                .text
                .get((at % size) as usize)
                .map_or(0, |b| b.load(Ordering::Acquire));
            if byte == b'\n' || used == buffer.len() {
                line(buffer.get(..used).unwrap_or(&[]));
                used = 0;
                *position = at + 1;
            }
            if byte != b'\n' {
                if let Some(slot) = buffer.get_mut(used) {
                    *slot = byte;
                    used += 1;
                }
            }
        }
    }

    /// The image's own address space (see the map in `abi/src/layout.rs`).
    fn build_host_tables(&self, tables: &mut Pool) -> Result<u64> {
        let levels = if self.facts.la57() { 5 } else { 4 };
        let mut host =
            PageTable::<Host>::with_layout(tables, Layout::new(levels, PageSize::Size4K))
                .map_err(table_error)?;
        let mut map = |address, spa, length, attributes| {
            host.map(tables, address, spa, length, attributes)
                .map_err(table_error)
        };
        let h = &self.header;
        let image = self.image.spa();
        for (start, end, attributes) in [
            (0, h.text_end, Attributes::RX),
            (h.text_end, h.rodata_end, Attributes::R),
            (h.rodata_end, h.memory_end, Attributes::RW),
        ] {
            if start < end {
                map(IMAGE_BASE + start, image + start, end - start, attributes)?;
            }
        }
        for block in &self.blocks {
            let mapped = (0..cpu_block::PAGES)
                .filter(|page| ![cpu_block::GUARD, cpu_block::IST_GUARD].contains(page));
            for page in mapped {
                let address = cpu_page(block.cpu as usize, page);
                map(address, block.page_spa(page), PAGE_SIZE, Attributes::RW)?;
            }
            // The windows show the zero page until their first use; this makes their tables.
            let windows = cpu_page(block.cpu as usize, 0) + CPU_WINDOWS;
            for window in 0..WINDOW_COUNT {
                map(
                    windows + window * PAGE_SIZE,
                    self.zero.spa(),
                    PAGE_SIZE,
                    Attributes::R,
                )?;
            }
        }
        map(
            SHARED_BASE,
            self.log.spa(),
            LOG_PAGES as u64 * PAGE_SIZE,
            Attributes::RW,
        )?;
        for (cpu, page) in self.stats.iter().enumerate() {
            map(stats_page(cpu), page.spa(), PAGE_SIZE, Attributes::RW)?;
        }
        let uncached = Attributes::RW.with_memory_type(MemoryType::Uncacheable);
        let apic = sys::rdmsr(msr::APIC_BASE).unwrap_or(APIC_DEFAULT_BASE) & !(PAGE_SIZE - 1);
        map(APIC_PAGE, apic, PAGE_SIZE, uncached)?;
        map(
            DIRECT_BASE + self.pool.spa(),
            self.pool.spa(),
            self.pool.len() as u64,
            Attributes::RW,
        )?;
        let (start, end) = sys::trampoline();
        let mut address = start & !(PAGE_SIZE - 1);
        while address < end {
            map(
                address,
                sys::virt_to_phys(address as *const _),
                PAGE_SIZE,
                Attributes::RX,
            )?;
            address += PAGE_SIZE;
        }
        Ok(host.root())
    }

    /// Identity map of the whole physical address space, with the memory types of the MTRRs, except that
    /// the hypervisor's own pages show the zero page, read-only: the root is sealed off from the start.
    fn build_root_slat<F: Format>(
        &self,
        tables: &mut Pool,
        levels: u8,
        mtrr: &MtrrState,
    ) -> Result<u64> {
        let largest = if self.facts.second_level_1g() {
            PageSize::Size1G
        } else {
            PageSize::Size2M
        };
        let mut slat = PageTable::<F>::with_layout(tables, Layout::new(levels, largest))
            .map_err(table_error)?;
        let limit = 1u64 << self.boot.physical_bits;
        if self.facts.vendor() == Vendor::Vmx {
            for range in mtrr.ranges(limit) {
                let attributes = Attributes::RWX.with_memory_type(range.memory_type);
                slat.map(
                    tables,
                    range.start,
                    range.start,
                    range.end - range.start,
                    attributes,
                )
                .map_err(table_error)?;
            }
        } else {
            slat.map(tables, 0, 0, limit, Attributes::RWX)
                .map_err(table_error)?;
        }
        let zero = self.zero.spa();
        let own = [&self.image, &self.pool];
        for pages in Iterator::chain(
            own.into_iter(),
            self.blocks.iter().map(|block| &block.pages),
        ) {
            for page in 0..pages.len() as u64 / PAGE_SIZE {
                slat.map(
                    tables,
                    pages.spa() + page * PAGE_SIZE,
                    zero,
                    PAGE_SIZE,
                    Attributes::R,
                )
                .map_err(table_error)?;
            }
        }
        slat.map(tables, zero, zero, PAGE_SIZE, Attributes::R)
            .map_err(table_error)?;
        Ok(slat.root())
    }

    /// Copies the image to its pages, with boot information and IDT.
    fn copy_image(&self, bytes: &[u8]) {
        let at = |offset: u64| self.image.address().wrapping_add(offset as usize);
        // SAFETY: `read_header` checked that the offsets lie in the image's memory, which nobody uses yet.
        unsafe {
            core::ptr::copy_nonoverlapping(bytes.as_ptr(), self.image.address(), bytes.len());
            at(self.header.boot_info)
                .cast::<BootInfo>()
                .write(self.boot);
            let idt = at(self.header.idt).cast::<[u64; 2]>();
            for vector in 0..32u64 {
                idt.add(vector as usize).write(gate(
                    self.header.exception_stubs + 16 * vector,
                    self.ist(vector),
                ));
            }
        }
    }

    /// Interrupt stack of a vector. None on AMD-V: TR stays Linux' there, and GIF keeps NMI and #MC out.
    fn ist(&self, vector: u64) -> u64 {
        match (self.boot.vendor, vector) {
            (Vendor::Vmx, 8) => 1,
            (Vendor::Vmx, 2) => 2,
            (Vendor::Vmx, 18) => 3,
            _ => 0,
        }
    }
}

/// 64-bit interrupt gate (SDM 7.14.1).
fn gate(handler: u64, ist: u64) -> [u64; 2] {
    let low = handler & 0xffff
        | u64::from(selector::CODE) << 16
        | ist << 32
        | 0x8e << 40
        | (handler >> 16 & 0xffff) << 48;
    [low, handler >> 32]
}

/// Permission maps of children: everything exits, but MSRs that the world switch saves and loads.
fn fill_child_maps(vendor: Vendor, msr_map: u64, iopm: u64) {
    // SAFETY: both were just taken from the pool and have these sizes.
    let (msrs, ports) = unsafe {
        (
            core::slice::from_raw_parts_mut((sys::direct_map() + msr_map) as *mut u8, msrpm::BYTES),
            core::slice::from_raw_parts_mut(
                (sys::direct_map() + iopm) as *mut u8,
                3 * PAGE_SIZE as usize,
            ),
        )
    };
    ports.fill(0xff);
    msrs.fill(0xff);
    for number in CHILD_MSRS {
        match vendor {
            Vendor::Svm => {
                if let Some((byte, shift)) = msrpm::position(number) {
                    if let Some(b) = msrs.get_mut(byte) {
                        *b &= !(3 << shift);
                    }
                }
            }
            // VMX bitmap: read low, read high, write low, write high, 1 KiB each (SDM 26.6.9).
            Vendor::Vmx => {
                let high = number >= 0xc000_0000;
                let bit = number & 0x1fff;
                for part in [0, 2048] {
                    let byte = part + if high { 1024 } else { 0 } + bit as usize / 8;
                    if let Some(b) = msrs.get_mut(byte) {
                        *b &= !(1 << (bit % 8));
                    }
                }
            }
        }
    }
}

fn new_block(cpu: u32, header: &ImageHeader) -> Result<CpuBlock> {
    let pages = Pages::new(cpu_block::ORDER)?;
    let index = cpu as usize;
    let area = cpu_page(index, cpu_block::AREA);
    let root = area + offset_of!(CpuArea, root) as u64;
    let tss_address = area + offset_of!(CpuArea, tss) as u64;
    let mut tss = [0u32; 26];
    for stack in 0..cpu_block::IST_COUNT {
        // IST1 is at byte 24h (SDM figure 8-11); stacks grow down from the page's end.
        let top = cpu_page(index, cpu_block::IST + stack + 1);
        if let Some([low, high]) = tss.get_mut(9 + 2 * stack..11 + 2 * stack) {
            *low = top as u32;
            *high = (top >> 32) as u32;
        }
    }
    tss[25] = (size_of::<[u32; 26]>() as u32) << 16;
    let limit = size_of::<[u32; 26]>() as u64 - 1;
    let tss_low =
        limit | (tss_address & 0xff_ffff) << 16 | 0x8b << 40 | (tss_address >> 24 & 0xff) << 56;
    // SAFETY: all-zero is a valid `CpuArea`: integers only.
    let empty: CpuArea = unsafe { core::mem::zeroed() };
    let control_spa = pages.spa() + cpu_block::ROOT_CONTROL as u64 * PAGE_SIZE;
    let apic_base = sys::rdmsr(msr::APIC_BASE).unwrap_or(0);
    let template = CpuArea {
        self_address: area,
        current: root,
        stack: stack_top(index),
        block_spa: pages.spa(),
        cpu,
        apic_id: sys::apic_id(cpu),
        x2apic: (apic_base >> 10 & 1) as u32,
        state: crate::abi::boot::cpu_state::LAUNCHED,
        gdtr: TableRegister::new(
            area + offset_of!(CpuArea, gdt) as u64,
            size_of::<[u64; 6]>() as u16 - 1,
        ),
        idtr: TableRegister::new(IMAGE_BASE + header.idt, 32 * 16 - 1),
        root: VpContext {
            control_spa,
            control: cpu_page(index, cpu_block::ROOT_CONTROL),
            is_root: 1,
            ..empty.root
        },
        gdt: [
            0,
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            tss_low,
            tss_address >> 32,
        ],
        tss,
        ..empty
    };
    Ok(CpuBlock {
        cpu,
        pages,
        template,
    })
}
