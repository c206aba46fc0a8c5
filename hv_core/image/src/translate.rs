// SPDX-License-Identifier: GPL-2.0
//! Linear to guest physical addresses, by walking the guest's tables (SDM 5.3 to 5.6; TLFS 6.6.3).
//!
//! For VMMs that emulate instructions, and to fetch the instruction that exited. Accessed and dirty bits are
//! left alone.
#![forbid(unsafe_code)]
#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]

use hv_x86::regs::{cr0, cr4, efer};

use crate::child_cpuid::is_long;
use crate::messages::cpl;
use crate::vp_state::{segment, VpState};

/// `HV_TRANSLATE_GVA_*`: how to check.
pub mod control {
    /// The access reads.
    pub const VALIDATE_READ: u64 = 1 << 0;
    /// The access writes.
    pub const VALIDATE_WRITE: u64 = 1 << 1;
    /// The access fetches instructions.
    pub const VALIDATE_EXECUTE: u64 = 1 << 2;
    /// No privilege check.
    pub const PRIVILEGE_EXEMPT: u64 = 1 << 3;
    /// As supervisor, whatever the privilege level is.
    pub const SUPERVISOR_ACCESS: u64 = 1 << 6;
    /// As user.
    pub const USER_ACCESS: u64 = 1 << 7;
    /// SMAP counts whatever RFLAGS.AC is.
    pub const ENFORCE_SMAP: u64 = 1 << 8;
    /// SMAP does not count.
    pub const OVERRIDE_SMAP: u64 = 1 << 9;
}

/// Why there is no translation (`hv_translate_gva_result_code`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Failure {
    /// An entry is not present, or the address is not canonical.
    PageNotPresent = 1,
    /// Privilege level, write protection, execute disable, SMEP or SMAP.
    PrivilegeViolation = 2,
    /// Reserved bits in an entry.
    InvalidPageTableFlags = 3,
    /// A table is not in memory.
    GpaUnmapped = 4,
}

/// Bits of entries (SDM 5.5.4).
mod entry {
    pub const PRESENT: u64 = 1 << 0;
    pub const WRITE: u64 = 1 << 1;
    pub const USER: u64 = 1 << 2;
    pub const LARGE: u64 = 1 << 7;
    pub const NO_EXECUTE: u64 = 1 << 63;
}

const RFLAGS_AC: u64 = 1 << 18;
const PAGE: u64 = 0xfff;

/// What an access has to be allowed to do.
#[derive(Clone, Copy)]
struct Rights {
    write: bool,
    execute: bool,
    user: bool,
    exempt: bool,
    smap: bool,
}

impl Rights {
    fn new(vp: &VpState, flags: u64) -> Self {
        let has = |flag| flags & flag != 0;
        let user = if has(control::SUPERVISOR_ACCESS) {
            false
        } else {
            has(control::USER_ACCESS) || cpl(vp) == 3
        };
        let enforce = has(control::ENFORCE_SMAP) || vp.rflags & RFLAGS_AC == 0;
        Self {
            write: has(control::VALIDATE_WRITE),
            execute: has(control::VALIDATE_EXECUTE),
            user,
            exempt: has(control::PRIVILEGE_EXEMPT),
            smap: vp.cr4 & cr4::SMAP != 0 && enforce && !has(control::OVERRIDE_SMAP),
        }
    }

    /// Checks the rights of all levels together (SDM 5.6.1): `all` is the AND of the entries, NX inverted.
    fn check(&self, vp: &VpState, all: u64) -> Result<(), Failure> {
        let user_page = all & entry::USER != 0;
        let denied = if self.user {
            !user_page || self.write && all & entry::WRITE == 0
        } else {
            let protects = vp.cr0 & cr0::WP != 0;
            self.write && protects && all & entry::WRITE == 0
                || user_page && self.execute && vp.cr4 & cr4::SMEP != 0
                || user_page && !self.execute && self.smap
        };
        let disabled = self.execute && vp.efer & efer::NXE != 0 && all & entry::NO_EXECUTE == 0;
        if !self.exempt && (denied || disabled) {
            Err(Failure::PrivilegeViolation)
        } else {
            Ok(())
        }
    }
}

/// Translates a linear address. `read` copies guest physical memory that lies in one page.
///
/// # Errors
///
/// See [`Failure`].
pub fn translate(
    vp: &VpState,
    address: u64,
    flags: u64,
    read: &mut impl FnMut(u64, &mut [u8]) -> Option<()>,
) -> Result<u64, Failure> {
    let long = vp.efer & efer::LMA != 0;
    let address = if long { address } else { address & 0xffff_ffff };
    if vp.cr0 & cr0::PG == 0 {
        return Ok(address);
    }
    let rights = Rights::new(vp, flags);
    if long {
        let levels = if vp.cr4 & cr4::LA57 != 0 { 5 } else { 4 };
        let unused = if levels == 5 { 7 } else { 16 };
        if ((address << unused) as i64 >> unused) as u64 != address {
            return Err(Failure::PageNotPresent);
        }
        walk(vp, address, vp.cr3 & FRAME, levels, rights, u64::MAX, read)
    } else if vp.cr4 & cr4::PAE != 0 {
        // The page-directory pointers have neither rights nor NX (SDM table 5-8).
        let at = pointers_gpa(vp) | (((address >> 30) & 3) << 3);
        let pointer = quad(at, read)?;
        if pointer & entry::PRESENT == 0 {
            return Err(Failure::PageNotPresent);
        }
        if !is_pointer(vp, pointer) {
            return Err(Failure::InvalidPageTableFlags);
        }
        walk(vp, address, pointer & FRAME, 2, rights, u64::MAX, read)
    } else {
        walk_32(vp, address, rights, read)
    }
}

/// GPA of the four page-directory pointers of PAE paging (SDM table 5-7).
#[must_use]
pub const fn pointers_gpa(vp: &VpState) -> u64 {
    vp.cr3 & 0xffff_ffe0
}

/// Whether PAE paging takes the pointer: reserved bits count only in one that is present (SDM 5.4.1).
#[must_use]
pub fn is_pointer(vp: &VpState, pointer: u64) -> bool {
    let above = u64::MAX.checked_shl(vp.features.physical_bits.into());
    pointer & entry::PRESENT == 0 || pointer & (0x1e6 | above.unwrap_or(0)) == 0
}

/// Copies the four pointers at once, as the processor loads them. `None` if they are not in memory.
pub fn pointers(
    vp: &VpState,
    mut read: impl FnMut(u64, &mut [u8]) -> Option<()>,
) -> Option<[u64; 4]> {
    let mut bytes = [0; 32];
    read(pointers_gpa(vp), &mut bytes)?;
    let mut all = [0; 4];
    for (pointer, bytes) in all.iter_mut().zip(bytes.chunks_exact(8)) {
        *pointer = u64::from_le_bytes(bytes.try_into().ok()?);
    }
    Some(all)
}

/// Bits 51:12 of an entry.
const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// Bits of a frame number above MAXPHYADDR.
fn reserved_high(vp: &VpState) -> u64 {
    let above = u64::MAX
        .checked_shl(vp.features.physical_bits.into())
        .unwrap_or(0);
    above & FRAME
}

fn quad(at: u64, read: &mut impl FnMut(u64, &mut [u8]) -> Option<()>) -> Result<u64, Failure> {
    let mut bytes = [0; 8];
    read(at, &mut bytes).ok_or(Failure::GpaUnmapped)?;
    Ok(u64::from_le_bytes(bytes))
}

/// Tables of 512 entries, from the table at `table` and `levels` above a page.
fn walk(
    vp: &VpState,
    address: u64,
    table: u64,
    levels: u32,
    rights: Rights,
    mut all: u64,
    read: &mut impl FnMut(u64, &mut [u8]) -> Option<()>,
) -> Result<u64, Failure> {
    let reserved = reserved_high(vp)
        | if vp.efer & efer::NXE == 0 {
            entry::NO_EXECUTE
        } else {
            0
        };
    let mut table = table;
    for level in (1..=levels).rev() {
        let shift = level.saturating_mul(9).saturating_add(3);
        let index = (address >> shift) & 0x1ff;
        let value = quad(table | (index << 3), read)?;
        if value & entry::PRESENT == 0 {
            return Err(Failure::PageNotPresent);
        }
        if value & reserved != 0 {
            return Err(Failure::InvalidPageTableFlags);
        }
        all &= value ^ entry::NO_EXECUTE;
        let large = value & entry::LARGE != 0;
        let leaf = match level {
            1 => true,
            2 | 3 => large,
            _ if large => return Err(Failure::InvalidPageTableFlags),
            _ => false,
        };
        if leaf {
            let offset = (1_u64 << shift).wrapping_sub(1);
            // Bit 12 of a large page is PAT; the others below its size are reserved.
            if level > 1 && value & FRAME & offset & !(1 << 12) != 0 {
                return Err(Failure::InvalidPageTableFlags);
            }
            rights.check(vp, all)?;
            return Ok((value & FRAME & !offset) | (address & offset));
        }
        table = value & FRAME;
    }
    Err(Failure::PageNotPresent)
}

/// Tables of 1024 entries (SDM 5.3).
fn walk_32(
    vp: &VpState,
    address: u64,
    rights: Rights,
    read: &mut impl FnMut(u64, &mut [u8]) -> Option<()>,
) -> Result<u64, Failure> {
    let mut word = |at: u64| {
        let mut bytes = [0; 4];
        read(at, &mut bytes).ok_or(Failure::GpaUnmapped)?;
        let value = u64::from(u32::from_le_bytes(bytes));
        if value & entry::PRESENT == 0 {
            return Err(Failure::PageNotPresent);
        }
        Ok(value)
    };
    let directory = word((vp.cr3 & 0xffff_f000) | ((address >> 22) << 2))?;
    if directory & entry::LARGE != 0 && vp.cr4 & cr4::PSE != 0 {
        // Bits 20:13 are bits 39:32 of the frame (PSE-36); bit 21 is reserved.
        if directory & (1 << 21) != 0 {
            return Err(Failure::InvalidPageTableFlags);
        }
        rights.check(vp, directory | entry::NO_EXECUTE)?;
        let high = (directory >> 13) & 0xff;
        return Ok((high << 32) | (directory & 0xffc0_0000) | (address & 0x3f_ffff));
    }
    let table = word((directory & 0xffff_f000) | (((address >> 12) & 0x3ff) << 2))?;
    rights.check(vp, (directory & table) | entry::NO_EXECUTE)?;
    Ok((table & 0xffff_f000) | (address & PAGE))
}

/// HvCallTranslateVirtualAddress: result code (0 is success) and page number.
pub fn gva_page(
    vp: &VpState,
    page: u64,
    flags: u64,
    mut read: impl FnMut(u64, &mut [u8]) -> Option<()>,
) -> (u32, u64) {
    match translate(vp, page << 12, flags, &mut read) {
        Ok(gpa) => (0, gpa >> 12),
        Err(failure) => (failure as u32, 0),
    }
}

/// Linear address of the next instruction.
#[must_use]
pub fn linear_rip(vp: &VpState) -> u64 {
    if is_long(vp) {
        vp.rip
    } else {
        let base = vp.segments.get(segment::CS).map_or(0, |code| code.base);
        base.wrapping_add(vp.rip & 0xffff_ffff) & 0xffff_ffff
    }
}

/// Fetches up to 16 bytes at the instruction pointer, as many as there are before a page that is not present or
/// not in memory. The processor fetched the instruction already, so its rights are not asked for again.
pub fn fetch_instruction(
    vp: &VpState,
    bytes: &mut [u8; 16],
    mut read: impl FnMut(u64, &mut [u8]) -> Option<()>,
) -> u8 {
    let flags = control::VALIDATE_EXECUTE | control::PRIVILEGE_EXEMPT;
    let start = linear_rip(vp);
    let room = PAGE.wrapping_add(1).wrapping_sub(start & PAGE).min(16) as usize;
    let (first, second) = bytes.split_at_mut(room);
    let mut count = 0_usize;
    let parts = [(start, first), (start.wrapping_add(room as u64), second)];
    for (address, part) in parts {
        if part.is_empty() {
            break;
        }
        let length = part.len();
        let copied = translate(vp, address, flags, &mut read)
            .ok()
            .and_then(|gpa| read(gpa, part));
        if copied.is_none() {
            break;
        }
        count = count.saturating_add(length);
    }
    count as u8
}

#[cfg(test)]
#[allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]
mod tests {
    use super::*;
    use crate::child_cpuid::Features;
    use std::collections::BTreeMap;

    const P: u64 = entry::PRESENT;
    const W: u64 = entry::WRITE;
    const U: u64 = entry::USER;
    const L: u64 = entry::LARGE;
    const NX: u64 = entry::NO_EXECUTE;
    const READ: u64 = control::VALIDATE_READ;
    const WRITE: u64 = control::VALIDATE_WRITE;
    const EXECUTE: u64 = control::VALIDATE_EXECUTE;

    /// Guest memory by the byte; what is not there is not mapped.
    #[derive(Default)]
    struct Memory(BTreeMap<u64, u8>);

    impl Memory {
        fn put(&mut self, at: u64, value: u64) {
            for (offset, byte) in (0..).zip(value.to_le_bytes()) {
                self.0.insert(at + offset, byte);
            }
        }

        fn put_32(&mut self, at: u64, value: u32) {
            for (offset, byte) in (0..).zip(value.to_le_bytes()) {
                self.0.insert(at + offset, byte);
            }
        }

        fn read(&self, at: u64, to: &mut [u8]) -> Option<()> {
            assert_eq!(
                at >> 12,
                (at + to.len() as u64 - 1) >> 12,
                "stays in a page"
            );
            for (offset, byte) in (0..).zip(to) {
                *byte = *self.0.get(&(at + offset))?;
            }
            Some(())
        }
    }

    fn walk_it(vp: &VpState, memory: &Memory, address: u64, flags: u64) -> Result<u64, Failure> {
        translate(vp, address, flags, &mut |at, to| memory.read(at, to))
    }

    fn vp(cr0: u64, cr4: u64, efer: u64) -> VpState {
        let mut vp = VpState::reset(true);
        vp.cr0 = cr0;
        vp.cr3 = 0x1000;
        vp.cr4 = cr4;
        vp.efer = efer;
        vp.features = Features {
            physical_bits: 40,
            ..Features::NONE
        };
        vp.segments[segment::SS].rights = 0xc093;
        vp
    }

    /// 4-level paging: 0x40_3000 is one page, 2 MiB and 1 GiB pages behind; rights as given.
    fn long(rights: u64) -> (VpState, Memory) {
        let vp = vp(0x8001_0011, 0x20, efer::LME | efer::LMA | efer::NXE);
        let mut memory = Memory::default();
        for (at, value) in [
            (0x1000, 0x2000 | P | W | U),
            (0x2000, 0x3000 | P | W | U),
            (0x2008, 0x4000_0000 | P | W | U | L),
            (0x3010, 0x4000 | P | W | U),
            (0x3018, 0x60_0000 | P | W | U | L),
            (0x4018, 0x1234_5000 | rights),
        ] {
            memory.put(at, value);
        }
        (vp, memory)
    }

    const ADDRESS: u64 = 0x40_3678;

    #[test]
    fn without_paging_addresses_are_physical() {
        let vp = vp(0x11, 0, 0);
        let memory = Memory::default();
        assert_eq!(walk_it(&vp, &memory, 0x1_2345_6789, READ), Ok(0x2345_6789));
        assert_eq!(gva_page(&vp, 0x9f, READ, |_, _| None), (0, 0x9f));
    }

    #[test]
    fn four_levels_lead_to_pages_of_all_sizes() {
        let (vp, memory) = long(P | W | U);
        assert_eq!(walk_it(&vp, &memory, ADDRESS, READ), Ok(0x1234_5678));
        assert_eq!(walk_it(&vp, &memory, 0x70_0123, READ), Ok(0x70_0123));
        assert_eq!(walk_it(&vp, &memory, 0x5234_5678, READ), Ok(0x5234_5678));
        assert_eq!(
            gva_page(&vp, ADDRESS >> 12, READ, |at, to| memory.read(at, to)),
            (0, 0x1_2345)
        );
    }

    #[test]
    fn fifth_level_comes_first() {
        let (mut vp, mut memory) = long(P | W | U);
        vp.cr4 |= cr4::LA57;
        vp.cr3 = 0x9000;
        memory.put(0x9008, 0x1000 | P | W | U);
        assert_eq!(
            walk_it(&vp, &memory, (1 << 48) | ADDRESS, READ),
            Ok(0x1234_5678)
        );
        assert_eq!(
            walk_it(&vp, &memory, 1 << 56, READ),
            Err(Failure::PageNotPresent)
        );
    }

    #[test]
    fn pointers_are_copied_and_checked() {
        let mut vp = vp(0x8000_0011, 0x20, 0);
        vp.cr3 = 0xffff_ffff_0000_103f;
        let mut memory = Memory::default();
        for (index, pointer) in (0_u64..).zip([0x5001, 0, 0x7001]) {
            memory.put(0x1020 + 8 * index, pointer);
        }
        let read = |memory: &Memory, vp: &VpState| pointers(vp, |at, to| memory.read(at, to));
        assert_eq!(read(&memory, &vp), None);
        memory.put(0x1038, 0x8001);
        assert_eq!(read(&memory, &vp), Some([0x5001, 0, 0x7001, 0x8001]));
        assert_eq!(pointers_gpa(&vp), 0x1020);
        for bit in (1..9).chain(40..64) {
            let reserved = !matches!(bit, 3 | 4);
            assert_eq!(is_pointer(&vp, 1 << bit | 0x5001), !reserved, "{bit}");
            assert!(is_pointer(&vp, 1 << bit), "{bit} not present");
        }
        assert!(is_pointer(&vp, 1 << 39 | 0xe19));
    }

    #[test]
    fn pae_has_four_pointers_in_32_bytes() {
        let mut vp = vp(0x8001_0011, 0x20, 0);
        vp.cr3 = 0x1020;
        let mut memory = Memory::default();
        memory.put(0x1028, 0x2000 | P);
        memory.put(0x2010, 0x3000 | P | W | U);
        memory.put(0x3018, 0x12_3456_7000 | P);
        assert_eq!(walk_it(&vp, &memory, 0x4040_3abc, READ), Ok(0x12_3456_7abc));
        memory.put(0x1028, 0x2000 | P | W);
        let failure = walk_it(&vp, &memory, 0x4040_3abc, READ);
        assert_eq!(failure, Err(Failure::InvalidPageTableFlags));
    }

    #[test]
    fn two_levels_of_32_bits_and_large_pages() {
        let mut vp = vp(0x8001_0011, 0x10, 0);
        let mut memory = Memory::default();
        memory.put_32(0x1004, 0x2000 | 3);
        memory.put_32(0x200c, 0x5000 | 3);
        memory.put_32(0x1008, 0x0080_4000 | 0x83);
        assert_eq!(walk_it(&vp, &memory, 0x40_3123, READ), Ok(0x5123));
        // PSE-36: bits 20:13 are the upper ones.
        assert_eq!(walk_it(&vp, &memory, 0x81_2345, READ), Ok(0x2_0081_2345));
        vp.cr4 = 0;
        memory.put_32(0x80_4048, 0x7000 | 3);
        assert_eq!(walk_it(&vp, &memory, 0x81_2345, READ), Ok(0x7345));
    }

    #[test]
    fn missing_entries_and_tables_are_told_apart() {
        let (vp, mut memory) = long(0);
        assert_eq!(
            walk_it(&vp, &memory, ADDRESS, READ),
            Err(Failure::PageNotPresent)
        );
        memory.put(0x3010, 0x7_0000 | P);
        assert_eq!(
            walk_it(&vp, &memory, ADDRESS, READ),
            Err(Failure::GpaUnmapped)
        );
        let outside = walk_it(&vp, &memory, 0x8000_0000_0000, READ);
        assert_eq!(outside, Err(Failure::PageNotPresent));
        assert_eq!(gva_page(&vp, 1, READ, |_, _| None), (4, 0));
    }

    #[test]
    fn reserved_bits_are_seen() {
        for (at, value) in [
            (0x1000, 0x2000 | P | L),
            (0x3010, 0x4000 | P | (1 << 40)),
            (0x4018, 0x1000 | P | (1 << 51)),
        ] {
            let (vp, mut memory) = long(P);
            memory.put(at, value);
            let result = walk_it(&vp, &memory, ADDRESS, READ);
            assert_eq!(result, Err(Failure::InvalidPageTableFlags), "{at:#x}");
        }
        let (mut vp, mut memory) = long(P | NX);
        vp.efer &= !efer::NXE;
        assert_eq!(
            walk_it(&vp, &memory, ADDRESS, READ),
            Err(Failure::InvalidPageTableFlags)
        );
        memory.put(0x3018, 0x60_2000 | P | L);
        assert_eq!(
            walk_it(&vp, &memory, 0x70_0000, READ),
            Err(Failure::InvalidPageTableFlags)
        );
        memory.put(0x3018, 0x60_1000 | P | L);
        assert_eq!(walk_it(&vp, &memory, 0x70_0000, READ), Ok(0x70_0000));
    }

    /// Rights of the page, CR0.WP, CR4 bits, RFLAGS.AC, flags, allowed.
    #[test]
    fn rights_are_checked_as_the_processor_does() {
        let user = control::USER_ACCESS;
        let smep = cr4::SMEP;
        let smap = cr4::SMAP;
        let violation = Err(Failure::PrivilegeViolation);
        for (rights, wp, cr4_bits, ac, flags, allowed) in [
            (P, true, 0, false, READ, true),
            (P, true, 0, false, WRITE, false),
            (P, false, 0, false, WRITE, true),
            (P | W, true, 0, false, WRITE, true),
            (P | W, true, 0, false, READ | user, false),
            (P | U, true, 0, false, READ | user, true),
            (P | U, false, 0, false, WRITE | user, false),
            (P | U | W, false, 0, false, WRITE | user, true),
            (P | NX, true, 0, false, EXECUTE, false),
            (P | NX, true, 0, false, READ, true),
            (P | U, true, 0, false, EXECUTE, true),
            (P | U, true, smep, false, EXECUTE, false),
            (P | U, true, smep, false, EXECUTE | user, true),
            (P | U, true, smap, false, READ, false),
            (P | U, true, smap, true, READ, true),
            (P | U, true, smap, true, READ | control::ENFORCE_SMAP, false),
            (
                P | U,
                true,
                smap,
                false,
                READ | control::OVERRIDE_SMAP,
                true,
            ),
            (P | U, true, smap, false, EXECUTE, true),
            (P | U, true, smap, false, READ | user, true),
            (P, true, smap, false, READ, true),
            (
                P | NX,
                true,
                smep,
                false,
                EXECUTE | control::PRIVILEGE_EXEMPT,
                true,
            ),
            (
                P,
                true,
                0,
                false,
                WRITE | user | control::PRIVILEGE_EXEMPT,
                true,
            ),
        ] {
            let (mut vp, memory) = long(rights);
            vp.cr0 = if wp {
                vp.cr0 | cr0::WP
            } else {
                vp.cr0 & !cr0::WP
            };
            vp.cr4 |= cr4_bits;
            vp.rflags = if ac { 2 | RFLAGS_AC } else { 2 };
            let expected = if allowed { Ok(0x1234_5678) } else { violation };
            let result = walk_it(&vp, &memory, ADDRESS, flags);
            assert_eq!(
                result, expected,
                "{rights:#x} {wp} {cr4_bits:#x} {ac} {flags:#x}"
            );
        }
    }

    #[test]
    fn privilege_level_decides_unless_told() {
        let (mut vp, memory) = long(P | W);
        vp.segments[segment::SS].rights = 0xc0f3;
        assert_eq!(
            walk_it(&vp, &memory, ADDRESS, READ),
            Err(Failure::PrivilegeViolation)
        );
        let supervisor = READ | control::SUPERVISOR_ACCESS;
        assert_eq!(walk_it(&vp, &memory, ADDRESS, supervisor), Ok(0x1234_5678));
    }

    #[test]
    fn rights_of_upper_levels_count() {
        let (vp, mut memory) = long(P | W | U);
        memory.put(0x3010, 0x4000 | P | U);
        assert_eq!(
            walk_it(&vp, &memory, ADDRESS, WRITE),
            Err(Failure::PrivilegeViolation)
        );
        memory.put(0x3010, 0x4000 | P | W | U | NX);
        assert_eq!(
            walk_it(&vp, &memory, ADDRESS, EXECUTE),
            Err(Failure::PrivilegeViolation)
        );
    }

    #[test]
    fn instruction_is_fetched_in_real_mode() {
        let mut vp = vp(0x10, 0, 0);
        vp.rip = 0xfff0;
        assert_eq!(linear_rip(&vp), 0xffff_fff0);
        let mut memory = Memory::default();
        memory.put(0xffff_fff0, 0x0706_0504_0302_0100);
        memory.put(0xffff_fff8, 0x0f0e_0d0c_0b0a_0908);
        let mut bytes = [0; 16];
        assert_eq!(
            fetch_instruction(&vp, &mut bytes, |at, to| memory.read(at, to)),
            16
        );
        assert_eq!(bytes, core::array::from_fn(|index| index as u8));
    }

    #[test]
    fn instruction_ends_where_memory_does() {
        let (mut vp, mut memory) = long(P | U | NX);
        vp.segments[segment::CS].rights = 0xa09b;
        vp.rip = 0x40_3ffb;
        for offset in 0..5 {
            memory.0.insert(0x1234_5ffb + offset, 0x90 + offset as u8);
        }
        let mut bytes = [0; 16];
        let fetch = |memory: &Memory, bytes: &mut [u8; 16]| {
            fetch_instruction(&vp, bytes, |at, to| memory.read(at, to))
        };
        assert_eq!(fetch(&memory, &mut bytes), 5);
        assert_eq!(bytes[..6], [0x90, 0x91, 0x92, 0x93, 0x94, 0]);
        memory.put(0x4020, 0x9000 | P);
        for offset in 0..16 {
            memory.0.insert(0x9000 + offset, 0xa0);
        }
        assert_eq!(fetch(&memory, &mut bytes), 16);
        assert_eq!(bytes[4..6], [0x94, 0xa0]);
        memory.put(0x4018, 0);
        assert_eq!(fetch(&memory, &mut bytes), 0);
    }

    #[test]
    fn instruction_pointer_wraps_at_4_gib_outside_long_mode() {
        let mut vp = vp(0x11, 0, 0);
        vp.segments[segment::CS].base = 0xffff_fff8;
        vp.rip = 0x10;
        assert_eq!(linear_rip(&vp), 8);
    }
}
