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

const CR4_PSE: u64 = 1 << 4;
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
        let at = (vp.cr3 & 0xffff_ffe0) | (((address >> 30) & 3) << 3);
        let pointer = quad(at, read)?;
        if pointer & entry::PRESENT == 0 {
            return Err(Failure::PageNotPresent);
        }
        if pointer & (0x1e6 | reserved_high(vp) | entry::NO_EXECUTE) != 0 {
            return Err(Failure::InvalidPageTableFlags);
        }
        walk(vp, address, pointer & FRAME, 2, rights, u64::MAX, read)
    } else {
        walk_32(vp, address, rights, read)
    }
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
    if directory & entry::LARGE != 0 && vp.cr4 & CR4_PSE != 0 {
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
