// SPDX-License-Identifier: GPL-2.0
//! `MSHV_ROOT_HVCALL`: hypercalls that a client may make about its own partition.

use kernel::prelude::*;
use kernel::uaccess::{UserPtr, UserSlice};

use super::{address, read, uapi, write};
use crate::abi::hypercall::{code, PARTITION_SELF};
use crate::root::{self, Partition, Passed, Vp};
use crate::sys::Pages;

/// Allowed about a partition; each input begins with the partition's number.
const ABOUT_PARTITION: [u16; 14] = [
    code::GET_PARTITION_PROPERTY,
    code::SET_PARTITION_PROPERTY,
    code::INSTALL_INTERCEPT,
    code::GET_VP_REGISTERS,
    code::SET_VP_REGISTERS,
    code::TRANSLATE_VIRTUAL_ADDRESS,
    code::CLEAR_VIRTUAL_INTERRUPT,
    code::REGISTER_INTERCEPT_RESULT,
    code::ASSERT_VIRTUAL_INTERRUPT,
    code::SIGNAL_EVENT_DIRECT,
    code::POST_MESSAGE_DIRECT,
    GET_GPA_PAGES_ACCESS_STATES,
    code::GET_VP_CPUID_VALUES,
    code::GET_PARTITION_PROPERTY_EX,
];
/// Allowed about the root.
const ABOUT_ROOT: [u16; 2] = [
    code::GET_PARTITION_PROPERTY,
    code::GET_PARTITION_PROPERTY_EX,
];

const GET_GPA_PAGES_ACCESS_STATES: u16 = 0xc9;

/// Does the call in the structure at `argument`. `call` gets code, repetitions, and pages for input and output.
fn pass(
    argument: usize,
    target: u64,
    allowed: &[u16],
    call: impl FnOnce(u16, u16, &Pages) -> Passed,
) -> Result {
    let mut envelope: uapi::RootHvcall = read(argument)?;
    let (input_size, output_size) = (
        usize::from(envelope.input_size),
        usize::from(envelope.output_size),
    );
    if envelope.status != 0
        || envelope.reserved != [0; 6]
        || envelope.input == 0
        || !(8..=4096).contains(&input_size)
        || (envelope.output != 0 && !(1..=4096).contains(&output_size))
        || envelope.reps > 0xfff
        || !allowed.contains(&envelope.code)
    {
        return Err(EINVAL);
    }
    let pages = Pages::new(1)?;
    // SAFETY: both pages are ours, zeroed, and nobody else has their address before the call.
    let (input, output) = unsafe {
        (
            core::slice::from_raw_parts_mut(pages.address(), 4096),
            core::slice::from_raw_parts(pages.address().add(4096), 4096),
        )
    };
    let from = UserSlice::new(UserPtr::from_addr(address(envelope.input)?), input_size);
    from.reader().read_slice(&mut input[..input_size])?;
    input[..8].copy_from_slice(&target.to_le_bytes());
    let passed = call(envelope.code, envelope.reps, &pages);
    envelope.status = passed.status.0;
    envelope.reps = passed.reps;
    write(argument, &envelope)?;
    passed.result?;
    if envelope.output != 0 {
        let to = UserSlice::new(UserPtr::from_addr(address(envelope.output)?), output_size);
        to.writer().write_slice(&output[..output_size])?;
    }
    Ok(())
}

/// On the device: about the root.
pub(super) fn on_device(argument: usize) -> Result {
    let winhv = root::winhv()?;
    pass(
        argument,
        PARTITION_SELF,
        &ABOUT_ROOT,
        |code, reps, pages| winhv.pass(code, reps, pages),
    )
}

/// On a partition.
pub(super) fn on_partition(partition: &Partition, argument: usize) -> Result {
    pass(
        argument,
        partition.id(),
        &ABOUT_PARTITION,
        |code, reps, pages| partition.pass_exclusively(code, reps, pages),
    )
}

/// On a VP: about its partition, while it does not run. Properties are the partition's own matter.
pub(super) fn on_vp(partition: &Partition, vp: &Vp, argument: usize) -> Result {
    let mut allowed = ABOUT_PARTITION;
    // In its place the same as the one before it.
    allowed[1] = allowed[0];
    pass(argument, partition.id(), &allowed, |code, reps, pages| {
        vp.exclusively(|| partition.pass(code, reps, pages))
    })
}
