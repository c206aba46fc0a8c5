// SPDX-License-Identifier: GPL-2.0
//! How the root makes a hypercall: parameters to pages, status to errno.

use kernel::prelude::*;
use kernel::transmute::{AsBytes, FromBytes};

use crate::abi::boot::Vendor;
use crate::abi::hypercall::Control;
use crate::abi::partition::{
    AssertVirtualInterrupt, CreatePartition, CreateVp, DeleteVp, GetPartitionProperty, MapGpaPages,
    MapVpStatePage, PartitionId, RegisterAssoc, SetPartitionProperty, UnmapGpaPages,
    UnmapVpStatePage, VpRegisters, VpState, WithdrawMemory,
};
use crate::abi::status::HvStatus;
use crate::sys::{self, IrqsOff, Pages};

const PAGE: usize = 4096;

macro_rules! parameters {
    ($($name:ty),*) => {$(
        // SAFETY: integers only, and the size assertion of each says that there is no padding.
        unsafe impl AsBytes for $name {}
    )*};
}

parameters!(
    AssertVirtualInterrupt,
    CreatePartition,
    CreateVp,
    DeleteVp,
    GetPartitionProperty,
    MapGpaPages,
    MapVpStatePage,
    PartitionId,
    RegisterAssoc,
    SetPartitionProperty,
    UnmapGpaPages,
    UnmapVpStatePage,
    VpRegisters,
    VpState,
    WithdrawMemory
);

/// The errno that `/dev/mshv` documents for a status.
pub(crate) fn errno(status: HvStatus) -> Result {
    Err(match status.0 {
        0x00 => return Ok(()),
        // Call code, input, parameter, property, property value, partition, VP, port, connection, logical
        // processor, register value.
        0x02 | 0x03 | 0x05 | 0x09 | 0x0a | 0x0d | 0x0e | 0x11 | 0x12 | 0x41 | 0x50 => EINVAL,
        // Access denied, operation denied.
        0x06 | 0x08 => EACCES,
        // Insufficient memory.
        0x0b => ENOMEM,
        // Processor feature not supported.
        0x20 => EOPNOTSUPP,
        // The hypervisor is gone.
        0xff => ENODEV,
        _ => EIO,
    })
}

/// The bytes of a parameter.
pub(crate) fn bytes<T: AsBytes + ?Sized>(value: &T) -> &[u8] {
    AsBytes::as_bytes(value)
}

/// The same, to write to.
pub(crate) fn bytes_mut<T: AsBytes + FromBytes + ?Sized>(value: &mut T) -> &mut [u8] {
    AsBytes::as_bytes_mut(value)
}

/// What one attempt at a hypercall gave.
#[derive(Clone, Copy)]
pub(crate) struct Answer {
    /// Its status.
    pub(crate) status: HvStatus,
    /// Repetitions completed, counted from the first of the whole call.
    pub(crate) reps: u16,
    /// RDX: the value of a fast call that has one.
    pub(crate) value: u64,
}

/// The instruction that reaches the image.
#[derive(Clone, Copy)]
pub(crate) struct Instruction(Vendor);

impl Instruction {
    /// A call with its parameters where the control word says.
    fn raw(self, control: u64, input: u64, output: u64) -> Answer {
        let answer = match self.0 {
            Vendor::Vmx => sys::vmcall(control, input, output),
            Vendor::Svm => sys::vmmcall(control, input, output),
        };
        Answer {
            status: HvStatus(answer.result as u16),
            reps: ((answer.result >> 32) & 0xfff) as u16,
            value: answer.value,
        }
    }

    /// A call with its parameters in registers.
    pub(crate) fn fast(self, code: u16, first: u64, second: u64) -> Answer {
        self.raw(Control::simple(code, true).0, first, second)
    }
}

/// The instruction that reaches the image, and a pair of parameter pages for each CPU.
pub(crate) struct Calls {
    instruction: Instruction,
    pages: KVec<Option<Pages>>,
}

impl Calls {
    /// Allocates the pages.
    pub(crate) fn new(vendor: Vendor) -> Result<Self> {
        let mut pages = KVec::new();
        for cpu in 0..sys::cpu_count() {
            let pair = if sys::cpu_possible(cpu) {
                Some(Pages::new(1)?)
            } else {
                None
            };
            pages.push(pair, GFP_KERNEL)?;
        }
        let instruction = Instruction(vendor);
        Ok(Self { instruction, pages })
    }

    /// The instruction.
    pub(crate) fn instruction(&self) -> Instruction {
        self.instruction
    }

    /// A call with its parameters in memory, until all its repetitions are done or one fails: the image does a bounded
    /// number of elements at a time and wants the call again for the rest (TLFS 3.7).
    pub(crate) fn whole(&self, control: u64, input: u64, output: u64) -> Answer {
        let count = Control(control).rep_count();
        let mut control = control;
        loop {
            let answer = self.instruction.raw(control, input, output);
            let start = Control(control).rep_start();
            if !answer.status.is_success() || answer.reps >= count || answer.reps <= start {
                return answer;
            }
            control = control & !(0xfff << 48) | u64::from(answer.reps) << 48;
        }
    }

    /// A call with its parameters in registers.
    pub(crate) fn fast(&self, code: u16, first: u64, second: u64) -> Answer {
        self.instruction.fast(code, first, second)
    }

    /// A call through the pages of this CPU, any context: `input` one after the other goes in, `output` comes
    /// back (zero where the image wrote nothing).
    pub(crate) fn paged(
        &self,
        control: u64,
        input: [&[u8]; 2],
        output: &mut [u8],
    ) -> Result<Answer> {
        let length = input[0].len().checked_add(input[1].len()).ok_or(EINVAL)?;
        if length > PAGE || output.len() > PAGE {
            return Err(EINVAL);
        }
        let _irqs = IrqsOff::new();
        let pages = self
            .pages
            .get(sys::this_cpu() as usize)
            .and_then(Option::as_ref)
            .ok_or(ENODEV)?;
        let page = pages.address();
        // SAFETY: with interrupts off the pair of this CPU is ours alone. It has two pages, and the lengths were
        // checked. The image writes to the second during the call only.
        unsafe {
            core::ptr::copy_nonoverlapping(input[0].as_ptr(), page, input[0].len());
            core::ptr::copy_nonoverlapping(
                input[1].as_ptr(),
                page.add(input[0].len()),
                input[1].len(),
            );
            core::ptr::write_bytes(page.add(PAGE), 0, output.len());
        }
        let answer = self.whole(control, pages.spa(), pages.spa() + PAGE as u64);
        // SAFETY: as above.
        unsafe {
            core::ptr::copy_nonoverlapping(page.add(PAGE), output.as_mut_ptr(), output.len());
        }
        Ok(answer)
    }

    /// A simple call with one structure in, and maybe a value out.
    pub(crate) fn simple<I: AsBytes, O: AsBytes + FromBytes>(
        &self,
        code: u16,
        input: &I,
        output: &mut O,
    ) -> Result<Answer> {
        self.paged(
            Control::simple(code, false).0,
            [bytes(input), &[]],
            bytes_mut(output),
        )
    }
}

/// Control word of a rep call: `count` repetitions, the first to do is `start` (TLFS 3.7).
pub(crate) const fn rep_control(code: u16, count: u16, start: u16) -> u64 {
    code as u64 | ((count as u64 & 0xfff) << 32) | ((start as u64 & 0xfff) << 48)
}

/// Control word of a simple call with a variable header of `words` times 8 bytes (TLFS 3.7).
pub(crate) const fn variable_control(code: u16, words: u16) -> u64 {
    code as u64 | ((words as u64 & 0x3ff) << 17)
}
