// SPDX-License-Identifier: GPL-2.0
//! Second-level tables of either vendor, and the pages of guest memory in them.
#![forbid(unsafe_code)]

use hv_abi::boot::{BootInfo, Vendor};
use hv_abi::partition::map;
use hv_abi::status::HvStatus;
use hv_x86::mtrr::MemoryType;
use hv_x86::paging::{
    Attributes, Ept, Error, Layout, Npt, PageSize, PageTable, TableMemory, Translation,
};

/// How a page of guest memory is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// 4 KiB or 2 MiB.
    pub size: PageSize,
    /// Rights and memory type.
    pub attributes: Attributes,
}

impl Page {
    /// What `HV_MAP_GPA_*` flags ask for. Those that say nothing of a page do not count.
    #[must_use]
    pub const fn from_flags(flags: u32) -> Self {
        Self {
            size: page_size(flags & map::LARGE_PAGE != 0),
            attributes: Attributes {
                read: flags & map::READABLE != 0,
                write: flags & map::WRITABLE != 0,
                // At any privilege level: both bits.
                execute: flags & map::EXECUTABLE == map::EXECUTABLE,
                memory_type: if flags & map::NOT_CACHED != 0 {
                    MemoryType::Uncacheable
                } else {
                    MemoryType::WriteBack
                },
            },
        }
    }
}

/// Size of what one repetition of a call maps or unmaps.
#[must_use]
pub const fn page_size(large: bool) -> PageSize {
    if large {
        PageSize::Size2M
    } else {
        PageSize::Size4K
    }
}

/// Status of a failed change of a table.
pub fn table_status(error: Error) -> HvStatus {
    match error {
        Error::OutOfTables => HvStatus::INSUFFICIENT_MEMORY,
        Error::Unaligned => HvStatus::INVALID_ALIGNMENT,
        Error::OutOfRange | Error::Misconfigured => HvStatus::INVALID_PARAMETER,
    }
}

/// A second-level table of either vendor.
pub enum Slat {
    /// VT-x.
    Ept(PageTable<Ept>),
    /// AMD-V.
    Npt(PageTable<Npt>),
}

macro_rules! each {
    ($self:expr, $table:ident => $body:expr) => {
        match $self {
            Slat::Ept($table) => $body,
            Slat::Npt($table) => $body,
        }
    };
}

impl Slat {
    /// Shape of the second-level tables of this machine.
    fn layout(info: &BootInfo) -> Layout {
        // The nested table of AMD-V has as many levels as the host's (APM 15.25.3).
        let levels = match info.vendor {
            Vendor::Vmx => 4,
            Vendor::Svm => info.host_levels as u8,
        };
        let largest = if info.slat_1g != 0 {
            PageSize::Size1G
        } else {
            PageSize::Size2M
        };
        Layout::new(levels, largest)
    }

    /// A new, empty table.
    pub fn new<M: TableMemory>(info: &BootInfo, memory: &mut M) -> Result<Self, HvStatus> {
        let layout = Self::layout(info);
        match info.vendor {
            Vendor::Vmx => PageTable::with_layout(memory, layout).map(Self::Ept),
            Vendor::Svm => PageTable::with_layout(memory, layout).map(Self::Npt),
        }
        .map_err(table_status)
    }

    /// The table with that root.
    pub fn adopt(info: &BootInfo, root: u64) -> Result<Self, HvStatus> {
        let layout = Self::layout(info);
        match info.vendor {
            Vendor::Vmx => PageTable::adopt(root, layout).map(Self::Ept),
            Vendor::Svm => PageTable::adopt(root, layout).map(Self::Npt),
        }
        .map_err(table_status)
    }

    /// SPA of the root table.
    pub fn root(&self) -> u64 {
        each!(self, table => table.root())
    }

    /// Maps a range.
    pub fn map<M: TableMemory>(
        &mut self,
        memory: &mut M,
        gpa: u64,
        spa: u64,
        length: u64,
        attributes: Attributes,
    ) -> Result<(), HvStatus> {
        each!(self, table => table.map(memory, gpa, spa, length, attributes)).map_err(table_status)
    }

    /// Unmaps a range.
    pub fn unmap<M: TableMemory>(
        &mut self,
        memory: &mut M,
        gpa: u64,
        length: u64,
    ) -> Result<(), HvStatus> {
        each!(self, table => table.unmap(memory, gpa, length)).map_err(table_status)
    }

    /// Maps one page of the child, in place of whatever was mapped there. Tells whether that was anything: then stale
    /// translations must go. A larger page that it is a part of is split.
    ///
    /// # Errors
    ///
    /// `INVALID_ALIGNMENT`, `INVALID_PARAMETER`, `INSUFFICIENT_MEMORY`. Nothing has changed then.
    pub fn map_page<M: TableMemory>(
        &mut self,
        memory: &mut M,
        gpa: u64,
        spa: u64,
        page: Page,
    ) -> Result<bool, HvStatus> {
        let length = page.size.bytes();
        if !page.size.divides(gpa | spa) {
            return Err(HvStatus::INVALID_ALIGNMENT);
        }
        let mut replaces = false;
        each!(self, table => table.for_each_leaf(memory, gpa, length, |_, _| replaces = true))
            .map_err(table_status)?;
        self.map(memory, gpa, spa, length, page.attributes)?;
        Ok(replaces)
    }

    /// Unmaps what is mapped in the place of one page, and splits a larger one that this is a part of.
    ///
    /// # Errors
    ///
    /// As for [`Self::map_page`].
    pub fn unmap_page<M: TableMemory>(
        &mut self,
        memory: &mut M,
        gpa: u64,
        size: PageSize,
    ) -> Result<(), HvStatus> {
        if !size.divides(gpa) {
            return Err(HvStatus::INVALID_ALIGNMENT);
        }
        self.unmap(memory, gpa, size.bytes())
    }

    /// Whether every byte of a page is mapped to itself and writable.
    pub fn is_writable_identity<M: TableMemory>(
        &self,
        memory: &M,
        page: u64,
        size: PageSize,
    ) -> bool {
        let mut found = 0;
        let leaf = |at: u64, leaf: Translation| {
            if leaf.spa == at && leaf.attributes.write {
                // A larger leaf reaches beyond the page.
                found += leaf.size.min(size).bytes();
            }
        };
        size.divides(page)
            && each!(self, table => table.for_each_leaf(memory, page, size.bytes(), leaf)).is_ok()
            && found == size.bytes()
    }

    /// Translates one address.
    pub fn lookup<M: TableMemory>(&self, memory: &M, gpa: u64) -> Option<Translation> {
        each!(self, table => table.lookup(memory, gpa))
    }

    /// Frees all tables.
    pub fn destroy<M: TableMemory>(self, memory: &mut M) {
        each!(self, table => table.destroy(memory))
    }
}
