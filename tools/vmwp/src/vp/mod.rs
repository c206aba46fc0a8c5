// SPDX-License-Identifier: GPL-2.0
//! Virtual processors: what comes out of `MSHV_RUN_VP`, and how it is completed.
//!
//! [`Vp`] is all that this module knows of a VP. The real one is `partition::MshvVp`; tests bring their own.

pub mod emulate;
pub mod exit;
pub mod message;
pub mod port;
pub mod reg;
pub mod runner;
pub mod stats;

use message::Intercept;
use reg::{Reg, RegValue, Segment};

/// Why `MSHV_RUN_VP` returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Run {
    /// The guest did something for this process to complete.
    Intercept(Intercept),
    /// A signal came, or the kernel let go of the VP to be asked again.
    Interrupted,
}

/// A failed operation on a VP, as a sentence.
pub type VpResult<T> = Result<T, String>;

/// Operations on one VP. All but `run` are only allowed between two runs.
pub trait Vp {
    /// Runs the guest until something happens.
    fn run(&mut self) -> VpResult<Run>;

    /// Reads 64-bit registers.
    fn get(&mut self, names: &[Reg]) -> VpResult<Vec<u64>>;

    /// Sets registers in the given order.
    fn set(&mut self, values: &[(Reg, RegValue)]) -> VpResult<()>;

    /// Reads a segment register.
    fn segment(&mut self, name: Reg) -> VpResult<Segment>;

    /// Guest-virtual to guest-physical, or `None` if there is no such mapping.
    fn translate(&mut self, gva: u64, write: bool) -> VpResult<Option<u64>>;
}

/// Guest RAM as the emulation of instructions sees it.
pub trait GuestRam {
    /// Fills `buf` from guest-physical memory; `false` if there is no RAM.
    fn read(&self, gpa: u64, buf: &mut [u8]) -> bool;

    /// Writes guest-physical memory; `false` if there is no RAM.
    fn write(&self, gpa: u64, buf: &[u8]) -> bool;
}

impl GuestRam for vm_memory::GuestMemoryMmap {
    fn read(&self, gpa: u64, buf: &mut [u8]) -> bool {
        use vm_memory::{Bytes, GuestAddress};
        self.read_slice(buf, GuestAddress(gpa)).is_ok()
    }

    fn write(&self, gpa: u64, buf: &[u8]) -> bool {
        use vm_memory::{Bytes, GuestAddress};
        self.write_slice(buf, GuestAddress(gpa)).is_ok()
    }
}

/// Bytes of guest-virtual memory, page by page; stops at the first page that is not mapped RAM and returns the count.
pub(crate) fn read_virtual(
    vp: &mut dyn Vp,
    ram: &dyn GuestRam,
    gva: u64,
    buf: &mut [u8],
) -> VpResult<usize> {
    let mut done = 0;
    while done < buf.len() {
        let at = gva.wrapping_add(done as u64);
        let n = in_page(at, buf.len() - done);
        match vp.translate(at, false)? {
            Some(gpa) if ram.read(gpa, &mut buf[done..done + n]) => done += n,
            _ => break,
        }
    }
    Ok(done)
}

/// Like [`read_virtual`], for writing.
pub(crate) fn write_virtual(
    vp: &mut dyn Vp,
    ram: &dyn GuestRam,
    gva: u64,
    buf: &[u8],
) -> VpResult<usize> {
    let mut done = 0;
    while done < buf.len() {
        let at = gva.wrapping_add(done as u64);
        let n = in_page(at, buf.len() - done);
        match vp.translate(at, true)? {
            Some(gpa) if ram.write(gpa, &buf[done..done + n]) => done += n,
            _ => break,
        }
    }
    Ok(done)
}

fn in_page(at: u64, len: usize) -> usize {
    len.min((crate::layout::PAGE - at % crate::layout::PAGE) as usize)
}

#[cfg(test)]
pub(crate) mod fake;
