// SPDX-License-Identifier: GPL-2.0

//! One page-table builder for the three tables that the hypervisor owns.
//!
//! | format  | translates                        | defined in                     |
//! |---------|-----------------------------------|--------------------------------|
//! | [`Ept`] | guest-physical, VT-x              | SDM 29.3.2                     |
//! | [`Npt`] | guest-physical, AMD-V             | APM 15.25                      |
//! | [`Host`]| the hypervisor's linear addresses | SDM 5.5 (APM 5.3), supervisor  |
//!
//! All three are radix trees of 4 KiB tables with 512 entries of 64 bits, and differ only in what the bits of an entry
//! say. The walker is therefore written once and a [`Format`] says the rest. The tables are reached through
//! [`TableMemory`], which hands out system-physical addresses (SPA) and performs each read and write: the module
//! implements it over the direct map, the image over its windows, and tests over a hash map.
//!
//! # What a caller may rely on
//!
//! * **Live use.** Other CPUs may be walking the table while it changes. A new table is complete before the one 64-bit
//!   write that links it, and an entry that is replaced is replaced by one 64-bit write, never cleared in between. An
//!   unlinked table goes to [`TableMemory::free`] after the write that unlinked it. *Invalidating* translations
//!   (INVEPT, SDM 29.4.3; ASID flush, APM 15.16; INVLPG) is the caller's part, after every change that is not from
//!   not-present to present.
//! * **Failure.** [`Error::Unaligned`], [`Error::OutOfRange`] and [`Error::Misconfigured`] are found before anything is
//!   changed. [`Error::OutOfTables`] can strike in the middle: everything below some address in the range is then done,
//!   everything from there on is as it was, and nothing outside the range has changed its translation (a larger leaf
//!   may have been split, completely). No table is leaked. Repeating the call with more memory finishes the work.
//! * **No empty tables.** Neither success nor failure leaves a table (but the root) with no present entry.
//! * **No merging.** Splitting is never undone, except by mapping a larger leaf over the pieces.

use core::marker::PhantomData;

use super::mtrr::MemoryType;

/// Entries of one table (SDM 5.5, 29.3.2).
pub const ENTRIES: usize = 512;

/// Bytes of the smallest page and of every table.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

/// Address bits that one level translates.
const LEVEL_SHIFT: u32 = 9;

/// Address bits below the lowest level.
const PAGE_SHIFT: u32 = 12;

/// Bits 51:12, the address field of an entry in every format.
const ADDRESS_FIELD: u64 = 0x000f_ffff_ffff_f000;

/// Bit 7 of an entry above the lowest level: it maps a page (PS). The same bit in every format.
const LARGE: u64 = 1 << 7;

/// The widest system-physical address that an entry can hold.
const MAX_PHYSICAL_ADDRESS_BITS: u8 = 52;

/// Why a table could not be changed. The caller maps this to its own status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Error {
    /// [`TableMemory::allocate`] had no (usable) table left: deposit more and repeat.
    OutOfTables,
    /// An address or a length is not a multiple of 4 KiB.
    Unaligned,
    /// The range does not fit into the levels of the table (or is not canonical, for [`Host`]), or the SPA range does
    /// not fit into the physical-address width.
    OutOfRange,
    /// The format cannot express this: see [`Format::leaf`] and [`Layout`].
    Misconfigured,
}

/// Where tables come from and how they are reached.
///
/// A table is known by its SPA. The walker passes only addresses that it got from [`Self::allocate`] (or the root given
/// to [`PageTable::adopt`] and what is linked below it), and only indices below [`ENTRIES`].
pub trait TableMemory {
    /// Hands out the SPA of a zeroed 4 KiB table, or `None` if there is none left. It must be a multiple of 4 KiB
    /// within [`Layout::physical_address_bits`], without encryption mask.
    fn allocate(&mut self) -> Option<u64>;

    /// Takes back a table. It is no longer linked, but a CPU that uses the tree may still hold it in its
    /// paging-structure caches: an implementation for live tables keeps it from reuse until the next invalidation.
    fn free(&mut self, table: u64);

    /// Reads one entry.
    fn read(&self, table: u64, index: usize) -> u64;

    /// Writes one entry, by a single 64-bit store that is ordered after all earlier ones.
    fn write(&mut self, table: u64, index: usize, entry: u64);
}

/// A leaf's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum PageSize {
    /// 4 KiB, an entry of a level-1 table.
    Size4K,
    /// 2 MiB, an entry of a level-2 table.
    Size2M,
    /// 1 GiB, an entry of a level-3 table. EPT: only if `IA32_VMX_EPT_VPID_CAP` bit 17 is set (SDM A.10).
    Size1G,
}

impl PageSize {
    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        entry_size(self.level())
    }

    /// Whether an address or a length is a multiple of the size.
    pub const fn divides(self, value: u64) -> bool {
        value & (self.bytes() - 1) == 0
    }

    /// The level of the table whose entries map pages of this size: 1, 2 or 3.
    pub const fn level(self) -> u8 {
        match self {
            Self::Size4K => 1,
            Self::Size2M => 2,
            Self::Size1G => 3,
        }
    }

    /// The size of a leaf in a table of this level.
    const fn of_level(level: u8) -> Self {
        match level {
            1 => Self::Size4K,
            2 => Self::Size2M,
            _ => Self::Size1G,
        }
    }
}

/// What a mapping allows, and how it is cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// Data reads are allowed.
    pub read: bool,
    /// Data writes are allowed.
    pub write: bool,
    /// Instruction fetches are allowed.
    pub execute: bool,
    /// The memory type. [`Ept`] takes all five; [`Npt`] and [`Host`] only write-back and uncacheable.
    pub memory_type: MemoryType,
}

impl Attributes {
    /// Read, write and execute, write-back.
    pub const RWX: Self = Self {
        read: true,
        write: true,
        execute: true,
        memory_type: MemoryType::WriteBack,
    };
    /// Read and write, write-back.
    pub const RW: Self = Self {
        execute: false,
        ..Self::RWX
    };
    /// Read and execute, write-back.
    pub const RX: Self = Self {
        write: false,
        ..Self::RWX
    };
    /// Read only, write-back.
    pub const R: Self = Self {
        write: false,
        ..Self::RW
    };

    /// The same rights with another memory type.
    #[must_use]
    pub const fn with_memory_type(self, memory_type: MemoryType) -> Self {
        Self {
            memory_type,
            ..self
        }
    }
}

/// What an address translates to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translation {
    /// The SPA: of the address that was asked for, offset included ([`PageTable::lookup`]), or of the first byte of the
    /// leaf ([`PageTable::for_each_leaf`]).
    pub spa: u64,
    /// The size of the leaf.
    pub size: PageSize,
    /// Rights and memory type of the leaf.
    pub attributes: Attributes,
    /// The leaf carries the encryption mask. Always false if [`Layout::encryption_mask`] is zero.
    pub encrypted: bool,
}

/// What the bits of an entry mean. The address field (51:12) and bit 7 (PS) are the same in every format.
pub trait Format {
    /// Addresses are linear: the bits above the highest translated one must repeat it (canonical form, SDM 3.3.7.1).
    const CANONICAL: bool;

    /// Bits of an entry that links a table. Such an entry allows everything; leaves restrict.
    const TABLE: u64;

    /// Bits of a leaf without address and PS.
    ///
    /// # Errors
    ///
    /// [`Error::Misconfigured`] if the format cannot express the attributes.
    fn leaf(attributes: Attributes) -> Result<u64, Error>;

    /// Whether an entry maps a page or links a table.
    fn is_present(entry: u64) -> bool;

    /// The reverse of [`Self::leaf`].
    fn attributes(entry: u64) -> Attributes;
}

/// Extended page tables of VT-x (SDM 29.3.2).
///
/// Bits: R 0, W 1, X 2, memory type 5:3, ignore-PAT 6 (left clear: the guest's PAT still takes part, SDM 29.3.7.2).
/// Accessed and dirty flags (8, 9) are left clear; they are ignored unless the EPTP enables them.
///
/// Not expressible, as the processor would raise an EPT misconfiguration (SDM 29.3.3.1): write without read. Not
/// expressible, as it would be a hole: no right at all (use [`PageTable::unmap`]). Execute without read is encoded as
/// asked; it is a misconfiguration unless `IA32_VMX_EPT_VPID_CAP` bit 0 is set, which is for the caller to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ept;

impl Ept {
    const READ: u64 = 1 << 0;
    const WRITE: u64 = 1 << 1;
    const EXECUTE: u64 = 1 << 2;
    const MEMORY_TYPE_SHIFT: u32 = 3;
}

impl Format for Ept {
    const CANONICAL: bool = false;
    const TABLE: u64 = Self::READ | Self::WRITE | Self::EXECUTE;

    fn leaf(attributes: Attributes) -> Result<u64, Error> {
        if attributes.write && !attributes.read {
            return Err(Error::Misconfigured);
        }
        let rights = flag(attributes.read, Self::READ)
            | flag(attributes.write, Self::WRITE)
            | flag(attributes.execute, Self::EXECUTE);
        if rights == 0 {
            return Err(Error::Misconfigured);
        }
        Ok(rights | (u64::from(attributes.memory_type.encoding()) << Self::MEMORY_TYPE_SHIFT))
    }

    fn is_present(entry: u64) -> bool {
        entry & Self::TABLE != 0
    }

    fn attributes(entry: u64) -> Attributes {
        Attributes {
            read: entry & Self::READ != 0,
            write: entry & Self::WRITE != 0,
            execute: entry & Self::EXECUTE != 0,
            memory_type: MemoryType::from_encoding_or_uncacheable(
                (entry >> Self::MEMORY_TYPE_SHIFT) & 7,
            ),
        }
    }
}

/// Bits of a long-mode entry, shared by [`Npt`] and [`Host`] (SDM 5.5.4, APM 5.4.1).
mod long_mode {
    use super::{flag, Attributes, Error, MemoryType};

    pub(super) const PRESENT: u64 = 1 << 0;
    pub(super) const WRITE: u64 = 1 << 1;
    pub(super) const USER: u64 = 1 << 2;
    const WRITE_THROUGH: u64 = 1 << 3;
    const CACHE_DISABLE: u64 = 1 << 4;
    pub(super) const ACCESSED: u64 = 1 << 5;
    const DIRTY: u64 = 1 << 6;
    const NO_EXECUTE: u64 = 1 << 63;

    /// A/D are preset, so that the processor never has to write to the table and an entry that we read cannot change
    /// before we replace it.
    ///
    /// Of the page attribute table only the entries 0 (WB) and 3 (UC, PCD|PWT) are used: they mean the same at reset
    /// (SDM 13.12.4, APM 7.8.1) and in the PAT that Linux programs. The others do not, so they are refused.
    pub(super) fn leaf(attributes: Attributes) -> Result<u64, Error> {
        let caching = match attributes.memory_type {
            MemoryType::WriteBack => 0,
            MemoryType::Uncacheable => CACHE_DISABLE | WRITE_THROUGH,
            _ => return Err(Error::Misconfigured),
        };
        if !attributes.read {
            return Err(Error::Misconfigured);
        }
        Ok(PRESENT
            | ACCESSED
            | DIRTY
            | caching
            | flag(attributes.write, WRITE)
            | flag(!attributes.execute, NO_EXECUTE))
    }

    pub(super) fn is_present(entry: u64) -> bool {
        entry & PRESENT != 0
    }

    pub(super) fn attributes(entry: u64) -> Attributes {
        Attributes {
            read: entry & PRESENT != 0,
            write: entry & WRITE != 0,
            execute: entry & NO_EXECUTE == 0,
            memory_type: if entry & (CACHE_DISABLE | WRITE_THROUGH) == 0 {
                MemoryType::WriteBack
            } else {
                MemoryType::Uncacheable
            },
        }
    }
}

/// Nested page tables of AMD-V (APM 15.25).
///
/// The format is that of long mode. The processor treats every nested walk as a user access, so U/S is set everywhere
/// (APM 15.25.5). NX counts if EFER.NXE is set in the host; the depth follows the host's CR4.LA57. The host's MTRRs
/// still apply, so a leaf over device memory may stay write-back (APM 15.25.8).
///
/// Not expressible: no read, and memory types other than write-back and uncacheable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Npt;

impl Format for Npt {
    const CANONICAL: bool = false;
    const TABLE: u64 =
        long_mode::PRESENT | long_mode::WRITE | long_mode::USER | long_mode::ACCESSED;

    fn leaf(attributes: Attributes) -> Result<u64, Error> {
        Ok(long_mode::leaf(attributes)? | long_mode::USER)
    }

    fn is_present(entry: u64) -> bool {
        long_mode::is_present(entry)
    }

    fn attributes(entry: u64) -> Attributes {
        long_mode::attributes(entry)
    }
}

/// The hypervisor's own tables (SDM 5.5, APM 5.3): supervisor only, and no global pages, so that a load of CR3 flushes
/// them. NX needs EFER.NXE.
///
/// Not expressible: no read, and memory types other than write-back and uncacheable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host;

impl Format for Host {
    const CANONICAL: bool = true;
    const TABLE: u64 = long_mode::PRESENT | long_mode::WRITE | long_mode::ACCESSED;

    fn leaf(attributes: Attributes) -> Result<u64, Error> {
        long_mode::leaf(attributes)
    }

    fn is_present(entry: u64) -> bool {
        long_mode::is_present(entry)
    }

    fn attributes(entry: u64) -> Attributes {
        long_mode::attributes(entry)
    }
}

/// The shape of a table, the same for its whole life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// 4 or 5.
    pub levels: u8,
    /// The largest leaf that [`PageTable::map`] may make.
    pub largest: PageSize,
    /// Width of a system-physical address, 13 to 52 bits (CPUID 8000_0008h EAX\[7:0\], less what memory encryption
    /// takes away). SPAs beyond it are refused, as their bits are reserved in an entry.
    pub physical_address_bits: u8,
    /// OR-ed into the address of every table and of every leaf made by [`PageTable::map`]: the C-bit of AMD's SME
    /// (CPUID 8000_001Fh EBX\[5:0\], APM 7.10.1), or 0. It lies within bits 51:12, above the physical-address width.
    pub encryption_mask: u64,
}

impl Layout {
    /// A layout with 52 physical-address bits and no encryption.
    pub const fn new(levels: u8, largest: PageSize) -> Self {
        Self {
            levels,
            largest,
            physical_address_bits: MAX_PHYSICAL_ADDRESS_BITS,
            encryption_mask: 0,
        }
    }

    fn check(&self) -> Result<(), Error> {
        let physical = self.physical_address_bits;
        if !(4..=5).contains(&self.levels)
            || physical <= PAGE_SHIFT as u8
            || physical > MAX_PHYSICAL_ADDRESS_BITS
            || self.encryption_mask & !ADDRESS_FIELD != 0
            || self.encryption_mask & low_bits(physical) != 0
        {
            return Err(Error::Misconfigured);
        }
        Ok(())
    }
}

/// A page table in the format `F`.
///
/// The object holds no memory itself: the tables belong to the [`TableMemory`] that is passed to each call, always the
/// same one. Dropping the object leaves the tables in place (they may be in use by a processor); [`Self::destroy`]
/// frees them. There is no locking: whoever changes the table has it to himself, `&mut`.
#[derive(Debug)]
pub struct PageTable<F: Format> {
    root: u64,
    layout: Layout,
    format: PhantomData<F>,
}

/// A checked range: addresses within the tree, without the sign extension of [`Format::CANONICAL`].
#[derive(Clone, Copy)]
struct Span {
    start: u64,
    /// Exclusive. At most 2^57.
    end: u64,
}

/// What [`PageTable::map`] writes: the next SPA, and the bits of a leaf apart from address and PS.
#[derive(Clone, Copy)]
struct Target {
    spa: u64,
    bits: u64,
}

/// One entry and the part of a span that it covers, relative to the table's and to the entry's first byte.
#[derive(Clone, Copy)]
struct Slot {
    index: usize,
    /// Start of the covered part, relative to the table's span.
    at: u64,
    /// The covered part, relative to the entry's own span.
    inner: Span,
    /// The part is the whole entry.
    whole: bool,
}

/// The entries that a span within a table of this level touches, in ascending order.
struct Slots {
    level: u8,
    span: Span,
}

impl Iterator for Slots {
    type Item = Slot;

    fn next(&mut self) -> Option<Slot> {
        let Span { start: at, end } = self.span;
        if at >= end {
            return None;
        }
        let size = entry_size(self.level);
        let within = at & (size - 1);
        let taken = (size - within).min(end - at);
        self.span.start = at + taken;
        Some(Slot {
            index: ((at >> entry_shift(self.level)) as usize) % ENTRIES,
            at,
            inner: Span {
                start: within,
                end: within + taken,
            },
            whole: taken == size,
        })
    }
}

impl<F: Format> PageTable<F> {
    /// Makes an empty table for 52-bit SPAs without memory encryption: [`Self::with_layout`] for the usual case.
    ///
    /// # Errors
    ///
    /// As [`Self::with_layout`].
    pub fn new<M: TableMemory + ?Sized>(
        mem: &mut M,
        levels: u8,
        largest: PageSize,
    ) -> Result<Self, Error> {
        Self::with_layout(mem, Layout::new(levels, largest))
    }

    /// Makes an empty table; takes one table for the root.
    ///
    /// # Errors
    ///
    /// [`Error::Misconfigured`] if the layout breaks one of its rules, [`Error::OutOfTables`].
    pub fn with_layout<M: TableMemory + ?Sized>(
        mem: &mut M,
        layout: Layout,
    ) -> Result<Self, Error> {
        layout.check()?;
        let mut table = Self {
            root: 0,
            layout,
            format: PhantomData,
        };
        table.root = table.allocate(mem)?;
        Ok(table)
    }

    /// Takes over a table that was made elsewhere (by the module, for the image) in the same format and layout.
    ///
    /// # Errors
    ///
    /// [`Error::Misconfigured`] if the layout breaks one of its rules, [`Error::Unaligned`] or [`Error::OutOfRange`] if
    /// the root cannot be a table.
    pub fn adopt(root: u64, layout: Layout) -> Result<Self, Error> {
        layout.check()?;
        let table = Self {
            root,
            layout,
            format: PhantomData,
        };
        table.check_spa(root, PAGE_SIZE)?;
        Ok(table)
    }

    /// The SPA of the root table, without encryption mask: for CR3, nCR3 or the EPTP's address field.
    pub fn root(&self) -> u64 {
        self.root
    }

    /// The shape of the table.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Maps `address..address + length` to `spa..spa + length`, replacing whatever was mapped there.
    ///
    /// Takes the largest leaf that the alignment of both addresses, the length and [`Layout::largest`] permit. A larger
    /// leaf that the range overlaps in part is split, and its rest keeps its translation; tables below a new larger
    /// leaf are freed. A length of 0 does nothing.
    ///
    /// # Errors
    ///
    /// Any [`Error`]; see the module's documentation for what holds after one.
    pub fn map<M: TableMemory + ?Sized>(
        &mut self,
        mem: &mut M,
        address: u64,
        spa: u64,
        length: u64,
        attributes: Attributes,
    ) -> Result<(), Error> {
        let bits = F::leaf(attributes)? | self.layout.encryption_mask;
        self.map_bits(mem, address, length, Target { spa, bits })
    }

    /// As [`Self::map`], but the leaves do not carry the encryption mask: for device memory, which is never encrypted
    /// (APM 7.10.5), and memory shared in the clear.
    ///
    /// # Errors
    ///
    /// As [`Self::map`].
    pub fn map_unencrypted<M: TableMemory + ?Sized>(
        &mut self,
        mem: &mut M,
        address: u64,
        spa: u64,
        length: u64,
        attributes: Attributes,
    ) -> Result<(), Error> {
        let bits = F::leaf(attributes)?;
        self.map_bits(mem, address, length, Target { spa, bits })
    }

    /// Removes all translations of `address..address + length`, whether there are any or not.
    ///
    /// A larger leaf that the range overlaps in part is split, and its rest keeps its translation. Tables that become
    /// empty are freed.
    ///
    /// # Errors
    ///
    /// [`Error::Unaligned`], [`Error::OutOfRange`]; [`Error::OutOfTables`] if a split needs a table.
    pub fn unmap<M: TableMemory + ?Sized>(
        &mut self,
        mem: &mut M,
        address: u64,
        length: u64,
    ) -> Result<(), Error> {
        let span = self.check_range(address, length)?;
        self.unmap_in(mem, self.root, self.layout.levels, span)
    }

    /// Translates one address, aligned or not. `None` if nothing is mapped there, or if it is out of range or not
    /// canonical.
    pub fn lookup<M: TableMemory + ?Sized>(&self, mem: &M, address: u64) -> Option<Translation> {
        let page = self
            .check_range(address & !(PAGE_SIZE - 1), PAGE_SIZE)
            .ok()?;
        let mut table = self.root;
        for level in (1..=self.layout.levels).rev() {
            let index = ((page.start >> entry_shift(level)) as usize) % ENTRIES;
            let entry = mem.read(table, index);
            if !F::is_present(entry) {
                return None;
            }
            if is_leaf(entry, level) {
                let mut translation = self.translation(entry, level);
                translation.spa |= address & (entry_size(level) - 1);
                return Some(translation);
            }
            table = self.address_of(entry, 1);
        }
        None
    }

    /// Calls `f` with the first address and the translation of each leaf that overlaps `address..address + length`, in
    /// ascending order. The first and last leaf may reach beyond the range.
    ///
    /// # Errors
    ///
    /// [`Error::Unaligned`], [`Error::OutOfRange`].
    pub fn for_each_leaf<M, V>(
        &self,
        mem: &M,
        address: u64,
        length: u64,
        mut f: V,
    ) -> Result<(), Error>
    where
        M: TableMemory + ?Sized,
        V: FnMut(u64, Translation),
    {
        let span = self.check_range(address, length)?;
        // In canonical form, the whole range has the same upper bits.
        let upper = address & !low_bits(self.address_bits());
        self.visit(mem, self.root, self.layout.levels, upper, span, &mut f);
        Ok(())
    }

    /// An upper bound of the tables that any single [`Self::map`] or [`Self::unmap`] of this range can take, whatever
    /// is mapped now and whatever it is mapped to: one for each table that the range touches if it consists of 4 KiB
    /// pages. For large ranges [`Self::tables_to_map`] is exact and far smaller.
    ///
    /// # Errors
    ///
    /// [`Error::Unaligned`], [`Error::OutOfRange`].
    pub fn tables_needed(&self, address: u64, length: u64) -> Result<u64, Error> {
        let span = self.check_range(address, length)?;
        if span.start == span.end {
            return Ok(0);
        }
        let last = span.end - 1;
        let mut tables = 0;
        for level in 2..=self.layout.levels {
            let shift = entry_shift(level);
            tables += (last >> shift) - (span.start >> shift) + 1;
        }
        Ok(tables)
    }

    /// Exactly how many tables [`Self::map`] would take now. It may free others on the way; they are not counted.
    ///
    /// Looks at each entry that is to link a table, so it takes about a thousandth of the time of mapping if all leaves
    /// are 4 KiB (an SPA that is not as aligned as the address).
    ///
    /// # Errors
    ///
    /// [`Error::Unaligned`], [`Error::OutOfRange`].
    pub fn tables_to_map<M: TableMemory + ?Sized>(
        &self,
        mem: &M,
        address: u64,
        spa: u64,
        length: u64,
    ) -> Result<u64, Error> {
        let span = self.check_range(address, length)?;
        self.check_spa(spa, length)?;
        Ok(self.count_to_map(mem, Some(self.root), self.layout.levels, span, spa))
    }

    /// Exactly how many tables [`Self::unmap`] would take now, for splits: never more than two for each level below the
    /// largest leaf.
    ///
    /// # Errors
    ///
    /// [`Error::Unaligned`], [`Error::OutOfRange`].
    pub fn tables_to_unmap<M: TableMemory + ?Sized>(
        &self,
        mem: &M,
        address: u64,
        length: u64,
    ) -> Result<u64, Error> {
        let span = self.check_range(address, length)?;
        Ok(self.count_to_unmap(mem, Some(self.root), self.layout.levels, span))
    }

    /// Frees all tables, the root included. No processor may use them any more.
    pub fn destroy<M: TableMemory + ?Sized>(self, mem: &mut M) {
        self.free_tree(mem, self.root, self.layout.levels);
    }

    /// Bits of an address that the tree translates.
    fn address_bits(&self) -> u8 {
        address_bits(self.layout.levels)
    }

    /// Checks a range of addresses and strips its sign extension.
    fn check_range(&self, address: u64, length: u64) -> Result<Span, Error> {
        if (address | length) & (PAGE_SIZE - 1) != 0 {
            return Err(Error::Unaligned);
        }
        // The last byte, as the end itself may be 2^64. An empty range still has a first byte to check.
        let last = address
            .checked_add(length.saturating_sub(1))
            .ok_or(Error::OutOfRange)?;
        let bits = self.address_bits();
        let (first_half, last_half) = if F::CANONICAL {
            (address >> (bits - 1), last >> (bits - 1))
        } else {
            (address >> bits, last >> bits)
        };
        let upper_half = u64::MAX >> (bits - 1);
        if first_half != last_half
            || !(first_half == 0 || (F::CANONICAL && first_half == upper_half))
        {
            return Err(Error::OutOfRange);
        }
        let start = address & low_bits(bits);
        Ok(Span {
            start,
            end: start + length,
        })
    }

    /// Checks a range of system-physical addresses.
    fn check_spa(&self, spa: u64, length: u64) -> Result<(), Error> {
        if (spa | length) & (PAGE_SIZE - 1) != 0 {
            return Err(Error::Unaligned);
        }
        let last = spa
            .checked_add(length.saturating_sub(1))
            .ok_or(Error::OutOfRange)?;
        if last & !low_bits(self.layout.physical_address_bits) != 0 {
            return Err(Error::OutOfRange);
        }
        Ok(())
    }

    /// Takes a table, and gives back one whose address an entry cannot hold.
    fn allocate<M: TableMemory + ?Sized>(&self, mem: &mut M) -> Result<u64, Error> {
        let table = mem.allocate().ok_or(Error::OutOfTables)?;
        if self.check_spa(table, PAGE_SIZE).is_err() {
            mem.free(table);
            return Err(Error::OutOfTables);
        }
        Ok(table)
    }

    /// The SPA in an entry: that of a table or 4 KiB page (level 1), or of a larger page.
    fn address_of(&self, entry: u64, level: u8) -> u64 {
        entry & ADDRESS_FIELD & !self.layout.encryption_mask & !(entry_size(level) - 1)
    }

    /// The entry that links a table.
    fn link(&self, table: u64) -> u64 {
        table | self.layout.encryption_mask | F::TABLE
    }

    fn translation(&self, leaf: u64, level: u8) -> Translation {
        let mask = self.layout.encryption_mask;
        Translation {
            spa: self.address_of(leaf, level),
            size: PageSize::of_level(level),
            attributes: F::attributes(leaf),
            encrypted: mask != 0 && leaf & mask == mask,
        }
    }

    fn map_bits<M: TableMemory + ?Sized>(
        &mut self,
        mem: &mut M,
        address: u64,
        length: u64,
        target: Target,
    ) -> Result<(), Error> {
        let span = self.check_range(address, length)?;
        self.check_spa(target.spa, length)?;
        self.map_in(mem, self.root, self.layout.levels, span, target)
    }

    /// Whether `map` makes a leaf of this part, rather than going down a level.
    fn takes_leaf(&self, slot: Slot, level: u8, spa: u64) -> bool {
        slot.whole && level <= self.layout.largest.level() && spa & (entry_size(level) - 1) == 0
    }

    fn map_in<M: TableMemory + ?Sized>(
        &self,
        mem: &mut M,
        table: u64,
        level: u8,
        span: Span,
        target: Target,
    ) -> Result<(), Error> {
        for slot in (Slots { level, span }) {
            let entry = mem.read(table, slot.index);
            let here = Target {
                spa: target.spa + (slot.at - span.start),
                bits: target.bits,
            };
            if self.takes_leaf(slot, level, here.spa) {
                mem.write(table, slot.index, here.spa | here.bits | large(level));
                self.free_below(mem, entry, level);
            } else {
                self.change_below(mem, table, slot, level, |mem, child| {
                    self.map_in(mem, child, level - 1, slot.inner, here)
                })?;
            }
        }
        Ok(())
    }

    fn unmap_in<M: TableMemory + ?Sized>(
        &self,
        mem: &mut M,
        table: u64,
        level: u8,
        span: Span,
    ) -> Result<(), Error> {
        for slot in (Slots { level, span }) {
            let entry = mem.read(table, slot.index);
            if !F::is_present(entry) {
                continue;
            }
            if slot.whole {
                mem.write(table, slot.index, 0);
                self.free_below(mem, entry, level);
            } else {
                self.change_below(mem, table, slot, level, |mem, child| {
                    self.unmap_in(mem, child, level - 1, slot.inner)
                })?;
            }
        }
        Ok(())
    }

    /// Runs `change` on the table below an entry.
    ///
    /// If there is none yet, a new one that translates as the entry did is changed first and linked afterwards, so that
    /// nobody ever sees it half done. It is linked even if the change failed midway (part of it counts as done); but a
    /// table that ends up empty is unlinked, or never linked, and freed.
    fn change_below<M, C>(
        &self,
        mem: &mut M,
        table: u64,
        slot: Slot,
        level: u8,
        change: C,
    ) -> Result<(), Error>
    where
        M: TableMemory + ?Sized,
        C: FnOnce(&mut M, u64) -> Result<(), Error>,
    {
        let entry = mem.read(table, slot.index);
        let linked = F::is_present(entry) && !is_leaf(entry, level);
        let child = if linked {
            self.address_of(entry, 1)
        } else {
            let child = self.allocate(mem)?;
            if F::is_present(entry) {
                self.fill(mem, child, entry, level);
            }
            child
        };
        let result = change(mem, child);
        if is_empty::<F, M>(mem, child) {
            if F::is_present(entry) {
                mem.write(table, slot.index, 0);
            }
            mem.free(child);
        } else if !linked {
            mem.write(table, slot.index, self.link(child));
        }
        result
    }

    /// Fills a new table with the pieces of a leaf of the level above. All other bits stay as they are, those that the
    /// processor set included.
    fn fill<M: TableMemory + ?Sized>(&self, mem: &mut M, child: u64, leaf: u64, level: u8) {
        let spa = self.address_of(leaf, level);
        let encryption = leaf & self.layout.encryption_mask;
        let bits = leaf & !ADDRESS_FIELD & !LARGE | encryption | large(level - 1);
        let mut piece = spa;
        for index in 0..ENTRIES {
            mem.write(child, index, piece | bits);
            piece += entry_size(level - 1);
        }
    }

    /// Frees the tables below an entry that has just been replaced.
    fn free_below<M: TableMemory + ?Sized>(&self, mem: &mut M, old: u64, level: u8) {
        if F::is_present(old) && !is_leaf(old, level) {
            self.free_tree(mem, self.address_of(old, 1), level - 1);
        }
    }

    fn free_tree<M: TableMemory + ?Sized>(&self, mem: &mut M, table: u64, level: u8) {
        if level > 1 {
            for index in 0..ENTRIES {
                let entry = mem.read(table, index);
                self.free_below(mem, entry, level);
            }
        }
        mem.free(table);
    }

    fn visit<M, V>(&self, mem: &M, table: u64, level: u8, base: u64, span: Span, f: &mut V)
    where
        M: TableMemory + ?Sized,
        V: FnMut(u64, Translation),
    {
        for slot in (Slots { level, span }) {
            let entry = mem.read(table, slot.index);
            if !F::is_present(entry) {
                continue;
            }
            let first = base | (slot.at & !(entry_size(level) - 1));
            if is_leaf(entry, level) {
                f(first, self.translation(entry, level));
            } else {
                let child = self.address_of(entry, 1);
                self.visit(mem, child, level - 1, first, slot.inner, f);
            }
        }
    }

    /// The table below an entry, if the entry links one. `table` is `None` within a table that does not exist yet.
    fn child<M: TableMemory + ?Sized>(
        &self,
        mem: &M,
        table: Option<u64>,
        slot: Slot,
        level: u8,
    ) -> Option<u64> {
        let entry = mem.read(table?, slot.index);
        if F::is_present(entry) && !is_leaf(entry, level) {
            Some(self.address_of(entry, 1))
        } else {
            None
        }
    }

    fn count_to_map<M: TableMemory + ?Sized>(
        &self,
        mem: &M,
        table: Option<u64>,
        level: u8,
        span: Span,
        spa: u64,
    ) -> u64 {
        let mut tables = 0;
        if level == 1 {
            return tables;
        }
        for slot in (Slots { level, span }) {
            let here = spa + (slot.at - span.start);
            if self.takes_leaf(slot, level, here) {
                continue;
            }
            let child = self.child(mem, table, slot, level);
            tables += u64::from(child.is_none());
            tables += self.count_to_map(mem, child, level - 1, slot.inner, here);
        }
        tables
    }

    fn count_to_unmap<M: TableMemory + ?Sized>(
        &self,
        mem: &M,
        table: Option<u64>,
        level: u8,
        span: Span,
    ) -> u64 {
        let mut tables = 0;
        if level == 1 {
            return tables;
        }
        for slot in (Slots { level, span }) {
            // Below a leaf that is to be split (`None`), everything is present.
            let present = table.is_none_or(|table| F::is_present(mem.read(table, slot.index)));
            if slot.whole || !present {
                continue;
            }
            let child = self.child(mem, table, slot, level);
            tables += u64::from(child.is_none());
            tables += self.count_to_unmap(mem, child, level - 1, slot.inner);
        }
        tables
    }
}

/// `bit` if the condition holds, else 0.
const fn flag(condition: bool, bit: u64) -> u64 {
    if condition {
        bit
    } else {
        0
    }
}

/// Address bits that a tree of this depth translates: 48 or 57.
const fn address_bits(levels: u8) -> u8 {
    (entry_shift(levels) + LEVEL_SHIFT) as u8
}

/// log2 of the bytes that one entry of a table of this level spans.
const fn entry_shift(level: u8) -> u32 {
    PAGE_SHIFT + LEVEL_SHIFT * (level as u32 - 1)
}

/// The bytes that one entry of a table of this level spans.
const fn entry_size(level: u8) -> u64 {
    1 << entry_shift(level)
}

/// A mask of the lowest `bits` bits, fewer than 64.
const fn low_bits(bits: u8) -> u64 {
    (1 << bits) - 1
}

/// PS for a leaf of this level. At level 1 the bit has another meaning.
const fn large(level: u8) -> u64 {
    flag(level > 1, LARGE)
}

/// Whether a present entry maps a page.
const fn is_leaf(entry: u64, level: u8) -> bool {
    level == 1 || (level <= PageSize::Size1G.level() && entry & LARGE != 0)
}

/// Whether a table has no present entry.
fn is_empty<F: Format, M: TableMemory + ?Sized>(mem: &M, table: u64) -> bool {
    (0..ENTRIES).all(|index| !F::is_present(mem.read(table, index)))
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::{boxed::Box, collections::BTreeMap, vec, vec::Vec};

    use super::*;

    const KB4: u64 = PageSize::Size4K.bytes();
    const MB2: u64 = PageSize::Size2M.bytes();
    const GB1: u64 = PageSize::Size1G.bytes();

    /// Tables at made-up addresses. Any access to a table that is not allocated fails the test.
    struct Pool {
        tables: BTreeMap<u64, Box<[u64; ENTRIES]>>,
        next: u64,
        left: usize,
    }

    impl Pool {
        fn new() -> Self {
            Self::with_tables(usize::MAX)
        }

        fn with_tables(left: usize) -> Self {
            Self {
                tables: BTreeMap::new(),
                next: 0x7_0000_0000,
                left,
            }
        }

        fn in_use(&self) -> usize {
            self.tables.len()
        }
    }

    impl TableMemory for Pool {
        fn allocate(&mut self) -> Option<u64> {
            self.left = self.left.checked_sub(1)?;
            let table = self.next;
            self.next += PAGE_SIZE;
            self.tables.insert(table, Box::new([0; ENTRIES]));
            Some(table)
        }

        fn free(&mut self, table: u64) {
            assert!(self.tables.remove(&table).is_some());
            self.left = self.left.saturating_add(1);
        }

        fn read(&self, table: u64, index: usize) -> u64 {
            self.tables[&table][index]
        }

        fn write(&mut self, table: u64, index: usize, entry: u64) {
            self.tables.get_mut(&table).unwrap()[index] = entry;
        }
    }

    fn table<F: Format>(pool: &mut Pool) -> PageTable<F> {
        PageTable::new(pool, 4, PageSize::Size1G).unwrap()
    }

    /// The entry that translates an address, and its level.
    fn raw<F: Format>(table: &PageTable<F>, pool: &Pool, address: u64) -> (u64, u8) {
        let mut at = table.root();
        for level in (1..=table.layout().levels).rev() {
            let entry = pool.read(at, (address >> entry_shift(level)) as usize % ENTRIES);
            if !F::is_present(entry) || is_leaf(entry, level) {
                return (entry, level);
            }
            at = entry & ADDRESS_FIELD & !table.layout().encryption_mask;
        }
        unreachable!()
    }

    fn leaves<F: Format>(
        table: &PageTable<F>,
        pool: &Pool,
        address: u64,
        length: u64,
    ) -> Vec<(u64, u64, PageSize)> {
        let mut found = Vec::new();
        table
            .for_each_leaf(pool, address, length, |address, translation| {
                found.push((address, translation.spa, translation.size));
            })
            .unwrap();
        found
    }

    #[test]
    fn ept_entries_have_the_bits_of_the_manual() {
        let mut pool = Pool::new();
        let mut ept = table::<Ept>(&mut pool);
        let uncacheable = Attributes::RWX.with_memory_type(MemoryType::Uncacheable);
        ept.map(&mut pool, 0, 0, GB1, Attributes::RWX).unwrap();
        ept.map(&mut pool, GB1, GB1, MB2, uncacheable).unwrap();
        ept.map(&mut pool, GB1 + MB2, 0x1000, KB4, Attributes::R)
            .unwrap();
        assert_eq!(raw(&ept, &pool, 0), (0b1011_0111, 3));
        assert_eq!(raw(&ept, &pool, GB1), (GB1 | 0b1000_0111, 2));
        assert_eq!(raw(&ept, &pool, GB1 + MB2), (0x1000 | 0b0011_0001, 1));
        let pdpt = pool.read(ept.root(), 0);
        assert_eq!(pdpt & 0xfff, 0b111);
    }

    #[test]
    fn npt_entries_are_user_accessed_and_dirty() {
        let mut pool = Pool::new();
        let mut npt = table::<Npt>(&mut pool);
        let device = Attributes::RW.with_memory_type(MemoryType::Uncacheable);
        npt.map(&mut pool, 0, 0, GB1, Attributes::RWX).unwrap();
        npt.map(&mut pool, GB1, GB1, MB2, device).unwrap();
        npt.map(&mut pool, GB1 + MB2, 0x1000, KB4, Attributes::RX)
            .unwrap();
        assert_eq!(raw(&npt, &pool, 0), (0xe7, 3));
        assert_eq!(raw(&npt, &pool, GB1), ((1 << 63) | GB1 | 0xff, 2));
        assert_eq!(raw(&npt, &pool, GB1 + MB2), (0x1000 | 0x65, 1));
        assert_eq!(pool.read(npt.root(), 0) & !ADDRESS_FIELD, 0x27);
    }

    #[test]
    fn host_entries_are_supervisor_and_not_global() {
        let mut pool = Pool::new();
        let mut host = table::<Host>(&mut pool);
        let top = 0u64.wrapping_sub(GB1);
        host.map(&mut pool, top, 0x1000, KB4, Attributes::RX)
            .unwrap();
        host.map(&mut pool, top + KB4, 0x2000, KB4, Attributes::RW)
            .unwrap();
        host.map(&mut pool, top + MB2, MB2, MB2, Attributes::R)
            .unwrap();
        assert_eq!(raw(&host, &pool, top), (0x1061, 1));
        assert_eq!(raw(&host, &pool, top + KB4), ((1 << 63) | 0x2063, 1));
        assert_eq!(raw(&host, &pool, top + MB2), ((1 << 63) | MB2 | 0xe1, 2));
        assert_eq!(pool.read(host.root(), 511) & !ADDRESS_FIELD, 0x23);
    }

    #[test]
    fn attributes_survive_the_encoding() {
        fn check<F: Format>(attributes: Attributes) -> bool {
            match F::leaf(attributes) {
                Ok(bits) => {
                    assert!(F::is_present(bits));
                    assert_eq!(F::attributes(bits), attributes);
                    true
                }
                Err(error) => {
                    assert_eq!(error, Error::Misconfigured);
                    false
                }
            }
        }
        for rights in 0..8 {
            for memory_type in (0..8).filter_map(MemoryType::from_encoding) {
                let attributes = Attributes {
                    read: rights & 1 != 0,
                    write: rights & 2 != 0,
                    execute: rights & 4 != 0,
                    memory_type,
                };
                // SDM 29.3.3.1: 010b and 110b are misconfigurations, 000b is not present.
                assert_eq!(check::<Ept>(attributes), !matches!(rights, 0 | 2 | 6));
                let common = matches!(memory_type, MemoryType::WriteBack | MemoryType::Uncacheable);
                assert_eq!(check::<Npt>(attributes), attributes.read && common);
                assert_eq!(check::<Host>(attributes), attributes.read && common);
            }
        }
    }

    #[test]
    fn refused_attributes_change_nothing() {
        let mut pool = Pool::new();
        let mut ept = table::<Ept>(&mut pool);
        let write_only = Attributes {
            read: false,
            ..Attributes::RW
        };
        assert_eq!(
            ept.map(&mut pool, 0, 0, KB4, write_only),
            Err(Error::Misconfigured)
        );
        assert_eq!(pool.in_use(), 1);
    }

    #[test]
    fn identity_map_takes_the_largest_leaves() {
        let mut pool = Pool::new();
        let mut ept = table::<Ept>(&mut pool);
        // 46 bits: 128 tables of level 3.
        ept.map(&mut pool, 0, 0, 1 << 46, Attributes::RWX).unwrap();
        assert_eq!(pool.in_use(), 1 + 128);
        let high = (1 << 46) - 1;
        assert_eq!(
            ept.lookup(&pool, high),
            Some(Translation {
                spa: high,
                size: PageSize::Size1G,
                attributes: Attributes::RWX,
                encrypted: false,
            })
        );
        assert_eq!(ept.lookup(&pool, 1 << 46), None);
    }

    #[test]
    fn ragged_range_takes_each_size_in_turn() {
        let mut pool = Pool::new();
        let mut npt = table::<Npt>(&mut pool);
        let start = GB1 - MB2 - KB4;
        let end = 2 * GB1 + MB2 + KB4;
        npt.map(&mut pool, start, start, end - start, Attributes::RWX)
            .unwrap();
        assert_eq!(
            leaves(&npt, &pool, 0, 4 * GB1),
            vec![
                (start, start, PageSize::Size4K),
                (GB1 - MB2, GB1 - MB2, PageSize::Size2M),
                (GB1, GB1, PageSize::Size1G),
                (2 * GB1, 2 * GB1, PageSize::Size2M),
                (2 * GB1 + MB2, 2 * GB1 + MB2, PageSize::Size4K),
            ]
        );
    }

    #[test]
    fn leaf_size_obeys_the_limit_and_the_alignment_of_the_spa() {
        for (largest, spa, expected) in [
            (PageSize::Size1G, 2 * GB1, PageSize::Size1G),
            (PageSize::Size2M, 2 * GB1, PageSize::Size2M),
            (PageSize::Size4K, 2 * GB1, PageSize::Size4K),
            (PageSize::Size1G, MB2, PageSize::Size2M),
            (PageSize::Size1G, KB4, PageSize::Size4K),
        ] {
            let mut pool = Pool::new();
            let mut ept = PageTable::<Ept>::new(&mut pool, 4, largest).unwrap();
            ept.map(&mut pool, GB1, spa, GB1, Attributes::R).unwrap();
            let all = leaves(&ept, &pool, 0, 1 << 48);
            assert_eq!(all.len() as u64, GB1 / expected.bytes());
            for (address, at, size) in all {
                assert_eq!((at - spa, size), (address - GB1, expected));
            }
        }
    }

    #[test]
    fn split_keeps_the_neighbours() {
        let mut pool = Pool::new();
        let mut ept = table::<Ept>(&mut pool);
        let wc = Attributes::RW.with_memory_type(MemoryType::WriteCombining);
        ept.map(&mut pool, 0, 8 * GB1, 3 * GB1, wc).unwrap();
        let hole = GB1 + 5 * MB2 + 7 * KB4;
        ept.map(&mut pool, hole, 0x5000, KB4, Attributes::R)
            .unwrap();
        assert_eq!(pool.in_use(), 4);
        for (address, size) in [
            (GB1 - KB4, PageSize::Size1G),
            (GB1, PageSize::Size2M),
            (GB1 + 5 * MB2, PageSize::Size4K),
            (hole - 1, PageSize::Size4K),
            (hole + KB4, PageSize::Size4K),
            (GB1 + 6 * MB2, PageSize::Size2M),
            (2 * GB1 - 1, PageSize::Size2M),
            (2 * GB1, PageSize::Size1G),
        ] {
            let translation = ept.lookup(&pool, address).unwrap();
            assert_eq!(translation.spa, 8 * GB1 + address);
            assert_eq!(translation.size, size);
            assert_eq!(translation.attributes, wc);
        }
        let translation = ept.lookup(&pool, hole + 5).unwrap();
        assert_eq!(translation.spa, 0x5005);
        assert_eq!(translation.attributes, Attributes::R);
    }

    #[test]
    fn split_keeps_bits_that_the_processor_or_others_set() {
        let mut pool = Pool::new();
        let mut ept = table::<Ept>(&mut pool);
        ept.map(&mut pool, 0, 0, MB2, Attributes::RWX).unwrap();
        // Accessed, dirty, and suppress #VE.
        let extra = (1 << 63) | (1 << 9) | (1 << 8);
        let pdpt = ept.address_of(pool.read(ept.root(), 0), 1);
        let pd = ept.address_of(pool.read(pdpt, 0), 1);
        pool.write(pd, 0, pool.read(pd, 0) | extra);
        ept.unmap(&mut pool, 0, KB4).unwrap();
        assert_eq!(raw(&ept, &pool, KB4), (extra | KB4 | 0b11_0111, 1));
    }

    #[test]
    fn larger_leaf_frees_the_tables_that_it_replaces() {
        let mut pool = Pool::new();
        let mut npt = table::<Npt>(&mut pool);
        for page in 0..20 {
            let address = page * (MB2 * 25 + KB4);
            npt.map(&mut pool, address, address, KB4, Attributes::RX)
                .unwrap();
        }
        assert_eq!(pool.in_use(), 3 + 20);
        npt.map(&mut pool, 0, 0, GB1, Attributes::RWX).unwrap();
        assert_eq!(pool.in_use(), 2);
        assert_eq!(leaves(&npt, &pool, 0, GB1), vec![(0, 0, PageSize::Size1G)]);
    }

    #[test]
    fn unmap_splits_and_frees_empty_tables() {
        let mut pool = Pool::new();
        let mut npt = table::<Npt>(&mut pool);
        npt.map(&mut pool, 0, 0, 2 * GB1, Attributes::RWX).unwrap();
        npt.unmap(&mut pool, GB1 - KB4, 2 * KB4).unwrap();
        assert_eq!(pool.in_use(), 2 + 4);
        assert_eq!(npt.lookup(&pool, GB1 - KB4), None);
        assert_eq!(npt.lookup(&pool, GB1 + KB4 - 1), None);
        assert_eq!(npt.lookup(&pool, GB1 + KB4).unwrap().spa, GB1 + KB4);
        npt.unmap(&mut pool, 0, GB1).unwrap();
        assert_eq!(pool.in_use(), 2 + 2);
        npt.unmap(&mut pool, GB1 + KB4, MB2 - KB4).unwrap();
        assert_eq!(pool.in_use(), 2 + 1);
        npt.unmap(&mut pool, GB1, GB1).unwrap();
        assert_eq!(pool.in_use(), 1);
        npt.unmap(&mut pool, 0, 1 << 48).unwrap();
        npt.destroy(&mut pool);
        assert_eq!(pool.in_use(), 0);
    }

    #[test]
    fn whole_leaf_is_unmapped_without_a_table() {
        let mut pool = Pool::with_tables(2);
        let mut npt = table::<Npt>(&mut pool);
        npt.map(&mut pool, GB1, GB1, GB1, Attributes::RWX).unwrap();
        assert_eq!(npt.tables_to_unmap(&pool, 0, 4 * GB1), Ok(0));
        npt.unmap(&mut pool, 0, 4 * GB1).unwrap();
        assert_eq!(pool.in_use(), 1);
    }

    #[test]
    fn empty_range_does_nothing() {
        let mut pool = Pool::with_tables(1);
        let mut host = table::<Host>(&mut pool);
        assert_eq!(host.map(&mut pool, GB1, 0, 0, Attributes::R), Ok(()));
        assert_eq!(host.unmap(&mut pool, GB1, 0), Ok(()));
        assert_eq!(host.tables_needed(GB1, 0), Ok(0));
        assert_eq!(host.tables_to_map(&pool, GB1, 0, 0), Ok(0));
        assert_eq!(leaves(&host, &pool, GB1, 0), vec![]);
    }

    #[test]
    fn ranges_are_checked() {
        let mut pool = Pool::new();
        let layout = Layout {
            physical_address_bits: 40,
            ..Layout::new(4, PageSize::Size1G)
        };
        let mut ept = PageTable::<Ept>::with_layout(&mut pool, layout).unwrap();
        let top = 1 << 48;
        for (address, spa, length, expected) in [
            (1, 0, KB4, Error::Unaligned),
            (0, 1, KB4, Error::Unaligned),
            (0, 0, KB4 + 1, Error::Unaligned),
            (top, 0, KB4, Error::OutOfRange),
            (top - KB4, 0, 2 * KB4, Error::OutOfRange),
            (!0xfff, 0, KB4, Error::OutOfRange),
            (!0xfff, 0, 2 * KB4, Error::OutOfRange),
            (KB4, 0, 0u64.wrapping_sub(KB4), Error::OutOfRange),
            (0, 1 << 40, KB4, Error::OutOfRange),
            (0, (1 << 40) - KB4, 2 * KB4, Error::OutOfRange),
            (0, 0u64.wrapping_sub(KB4), 2 * KB4, Error::OutOfRange),
        ] {
            assert_eq!(
                ept.map(&mut pool, address, spa, length, Attributes::R),
                Err(expected)
            );
            assert_eq!(
                ept.tables_to_map(&pool, address, spa, length),
                Err(expected)
            );
        }
        assert_eq!(ept.unmap(&mut pool, top, KB4), Err(Error::OutOfRange));
        assert_eq!(ept.unmap(&mut pool, 0x10, KB4), Err(Error::Unaligned));
        assert_eq!(ept.tables_needed(top, KB4), Err(Error::OutOfRange));
        assert_eq!(ept.lookup(&pool, u64::MAX), None);
        assert_eq!(pool.in_use(), 1);
        ept.map(&mut pool, top - KB4, (1 << 40) - KB4, KB4, Attributes::R)
            .unwrap();
        assert_eq!(ept.lookup(&pool, top - 1).unwrap().spa, (1 << 40) - 1);
    }

    #[test]
    fn host_addresses_are_canonical() {
        for (levels, bits) in [(4, 48), (5, 57)] {
            let mut pool = Pool::new();
            let mut host = PageTable::<Host>::new(&mut pool, levels, PageSize::Size1G).unwrap();
            let lower_end = 1u64 << (bits - 1);
            let upper = 0u64.wrapping_sub(lower_end);
            for (address, length) in [
                (lower_end, KB4),
                (lower_end - KB4, 2 * KB4),
                (upper - KB4, KB4),
                (upper - KB4, 2 * KB4),
                (1 << bits, KB4),
                (0, 0u64.wrapping_sub(KB4)),
                (lower_end, 0),
            ] {
                assert_eq!(
                    host.map(&mut pool, address, 0, length, Attributes::R),
                    Err(Error::OutOfRange)
                );
            }
            let last = 0u64.wrapping_sub(KB4);
            for (address, spa) in [
                (0, 0x1000),
                (lower_end - KB4, 0x2000),
                (upper, 0x3000),
                (last, 0x4000),
            ] {
                host.map(&mut pool, address, spa, KB4, Attributes::R)
                    .unwrap();
                assert_eq!(host.lookup(&pool, address).unwrap().spa, spa);
            }
            assert_eq!(host.lookup(&pool, u64::MAX).unwrap().spa, 0x4fff);
            assert_eq!(host.lookup(&pool, lower_end), None);
            assert_eq!(
                leaves(&host, &pool, upper, lower_end),
                vec![
                    (upper, 0x3000, PageSize::Size4K),
                    (last, 0x4000, PageSize::Size4K)
                ]
            );
            host.unmap(&mut pool, upper, lower_end).unwrap();
            assert_eq!(host.lookup(&pool, last), None);
            assert_eq!(host.lookup(&pool, lower_end - 1).unwrap().spa, 0x2fff);
        }
    }

    #[test]
    fn five_levels_reach_57_bits() {
        let mut pool = Pool::new();
        let mut ept = PageTable::<Ept>::new(&mut pool, 5, PageSize::Size2M).unwrap();
        let top = (1 << 57) - KB4;
        ept.map(&mut pool, top, 0x1000, KB4, Attributes::RW)
            .unwrap();
        assert_eq!(pool.in_use(), 5);
        assert_eq!(ept.lookup(&pool, top).unwrap().spa, 0x1000);
        assert_eq!(
            ept.map(&mut pool, 1 << 57, 0, KB4, Attributes::RW),
            Err(Error::OutOfRange)
        );
        ept.map(&mut pool, (1 << 48) - MB2, 0, 2 * MB2, Attributes::RW)
            .unwrap();
        assert_eq!(
            leaves(&ept, &pool, 0, 1 << 57),
            vec![
                ((1 << 48) - MB2, 0, PageSize::Size2M),
                (1 << 48, MB2, PageSize::Size2M),
                (top, 0x1000, PageSize::Size4K),
            ]
        );
    }

    #[test]
    fn layout_is_checked() {
        let good = Layout {
            levels: 4,
            largest: PageSize::Size2M,
            physical_address_bits: 43,
            encryption_mask: 1 << 47,
        };
        let mut pool = Pool::new();
        for bad in [
            Layout { levels: 3, ..good },
            Layout { levels: 6, ..good },
            Layout {
                physical_address_bits: 12,
                ..good
            },
            Layout {
                physical_address_bits: 53,
                ..good
            },
            Layout {
                physical_address_bits: u8::MAX,
                ..good
            },
            Layout {
                encryption_mask: 1 << 42,
                ..good
            },
            Layout {
                encryption_mask: 1 << 52,
                ..good
            },
        ] {
            let made = PageTable::<Npt>::with_layout(&mut pool, bad);
            assert_eq!(made.err(), Some(Error::Misconfigured));
            let adopted = PageTable::<Npt>::adopt(0x1000, bad);
            assert_eq!(adopted.err(), Some(Error::Misconfigured));
        }
        assert_eq!(pool.in_use(), 0);
        let misplaced = PageTable::<Npt>::adopt(1 << 43, good);
        assert_eq!(misplaced.err(), Some(Error::OutOfRange));
        let misaligned = PageTable::<Npt>::adopt(0x1008, good);
        assert_eq!(misaligned.err(), Some(Error::Unaligned));
    }

    #[test]
    fn unusable_table_is_given_back() {
        let mut pool = Pool::new();
        pool.next = 1 << 40;
        let layout = Layout {
            physical_address_bits: 40,
            ..Layout::new(4, PageSize::Size1G)
        };
        let made = PageTable::<Npt>::with_layout(&mut pool, layout);
        assert_eq!(made.err(), Some(Error::OutOfTables));
        assert_eq!(pool.in_use(), 0);
    }

    #[test]
    fn adopted_table_goes_on_where_its_maker_stopped() {
        let mut pool = Pool::new();
        let mut made = table::<Host>(&mut pool);
        made.map(&mut pool, 0, 0, GB1, Attributes::RW).unwrap();
        let mut adopted = PageTable::<Host>::adopt(made.root(), made.layout()).unwrap();
        adopted.unmap(&mut pool, MB2, MB2).unwrap();
        assert_eq!(adopted.lookup(&pool, MB2), None);
        assert_eq!(adopted.lookup(&pool, 0).unwrap().spa, 0);
        adopted.destroy(&mut pool);
        assert_eq!(pool.in_use(), 0);
    }

    #[test]
    fn encryption_mask_is_in_tables_and_leaves() {
        let c_bit = 1 << 51;
        let layout = Layout {
            physical_address_bits: 48,
            encryption_mask: c_bit,
            ..Layout::new(4, PageSize::Size1G)
        };
        let mut pool = Pool::new();
        let mut npt = PageTable::<Npt>::with_layout(&mut pool, layout).unwrap();
        npt.map(&mut pool, 0, 0, GB1, Attributes::RWX).unwrap();
        npt.map_unencrypted(&mut pool, GB1, GB1, GB1, Attributes::RW)
            .unwrap();
        assert_eq!(npt.root() & c_bit, 0);
        assert_eq!(pool.read(npt.root(), 0) & c_bit, c_bit);
        npt.unmap(&mut pool, 0, KB4).unwrap();
        npt.unmap(&mut pool, GB1, KB4).unwrap();
        for (address, encrypted) in [
            (KB4, true),
            (MB2, true),
            (GB1 + KB4, false),
            (GB1 + MB2, false),
        ] {
            let translation = npt.lookup(&pool, address).unwrap();
            assert_eq!(translation.spa, address);
            assert_eq!(translation.encrypted, encrypted);
            assert_eq!(raw(&npt, &pool, address).0 & c_bit != 0, encrypted);
        }
        assert_eq!(
            npt.map(&mut pool, 0, c_bit, KB4, Attributes::RWX),
            Err(Error::OutOfRange)
        );
        npt.destroy(&mut pool);
        assert_eq!(pool.in_use(), 0);
    }

    #[test]
    fn out_of_tables_at_each_allocation_leaves_a_consistent_table() {
        let start = GB1 - 3 * MB2 - KB4;
        let length = GB1 + 5 * MB2 + 3 * KB4;
        let setup = |pool: &mut Pool| {
            let mut ept = table::<Ept>(pool);
            ept.map(pool, 0, 0, 4 * GB1, Attributes::RX).unwrap();
            ept
        };
        let mut pool = Pool::new();
        let ept = setup(&mut pool);
        let target = 16 * GB1 + MB2 + start % MB2;
        let needed = ept.tables_to_map(&pool, start, target, length).unwrap();
        assert!(needed > 4 && needed <= ept.tables_needed(start, length).unwrap());
        let mut done_before = 0;
        for budget in 0..=needed {
            let mut pool = Pool::new();
            let mut ept = setup(&mut pool);
            pool.left = budget as usize;
            let result = ept.map(&mut pool, start, target, length, Attributes::RW);
            assert_eq!(result.is_ok(), budget == needed);
            assert_eq!(
                result.err(),
                (budget < needed).then_some(Error::OutOfTables)
            );
            // A prefix of the range is new, the rest is old, and so is everything outside.
            let mut done = 0;
            for page in (0..4 * GB1).step_by(KB4 as usize) {
                let translation = ept.lookup(&pool, page).unwrap();
                if translation.attributes == Attributes::RW {
                    assert_eq!(page, start + done);
                    assert_eq!(translation.spa, target + done);
                    done += KB4;
                } else {
                    assert_eq!(translation.spa, page);
                    assert_eq!(translation.attributes, Attributes::RX);
                }
            }
            assert!(done >= done_before);
            done_before = done;
            pool.left = usize::MAX;
            ept.map(&mut pool, start, target, length, Attributes::RW)
                .unwrap();
            assert_eq!(
                ept.lookup(&pool, start + length - 1).unwrap().spa,
                target + length - 1
            );
            ept.destroy(&mut pool);
            assert_eq!(pool.in_use(), 0);
        }
        assert_eq!(done_before, length);
    }

    #[test]
    fn failed_map_leaves_no_empty_table() {
        let mut pool = Pool::with_tables(3);
        let mut host = table::<Host>(&mut pool);
        assert_eq!(
            host.map(&mut pool, 0, 0, KB4, Attributes::R),
            Err(Error::OutOfTables)
        );
        assert_eq!(pool.in_use(), 1);
        assert_eq!(pool.left, 2);
    }

    #[test]
    fn exact_count_is_what_map_and_unmap_take() {
        let mut pool = Pool::new();
        let mut npt = table::<Npt>(&mut pool);
        let whole = 1 << 40;
        assert_eq!(npt.tables_to_map(&pool, 0, 0, whole), Ok(2));
        npt.map(&mut pool, 0, 0, whole, Attributes::RWX).unwrap();
        assert_eq!(npt.tables_to_unmap(&pool, KB4, GB1), Ok(4));
        let before = pool.next;
        npt.unmap(&mut pool, KB4, GB1).unwrap();
        assert_eq!((pool.next - before) / KB4, 4);
        // The worst case: a level-2 and a level-3 table, and as many of level 1 as are touched.
        assert_eq!(npt.tables_needed(MB2 - KB4, 2 * KB4), Ok(4));
        assert_eq!(npt.tables_needed(0, GB1), Ok(512 + 2));
    }

    #[test]
    fn trait_object_is_a_table_memory() {
        let mut pool = Pool::new();
        let mem: &mut dyn TableMemory = &mut pool;
        let mut ept = PageTable::<Ept>::new(mem, 4, PageSize::Size2M).unwrap();
        ept.map(mem, 0, 0, MB2, Attributes::RWX).unwrap();
        assert!(ept.lookup(mem, 0).is_some());
        ept.destroy(mem);
        assert_eq!(pool.in_use(), 0);
    }
}
