// SPDX-License-Identifier: GPL-2.0
//! `MSHV_CREATE_DEVICE`: the object through which clients hand over VFIO groups. The header of mainline does not have
//! it; numbers and structures are those of the `mshv-bindings` crate.
//!
//! The object can be made and asked what it knows. A VFIO file itself is refused for now: there is no translation
//! of device addresses for children yet.

use core::ffi::{c_long, c_uint, c_ulong};

use kernel::prelude::*;

use super::{address, answer, read, uapi, write};
use crate::sys;

/// The only type: VFIO.
const TYPE_VFIO: u32 = 0;
/// Only check whether the type is there.
const CREATE_TEST: u32 = 1;
/// Group of attributes: VFIO files.
const GROUP_FILE: u32 = 1;
/// Attributes of that group: add and remove a file.
const FILE_ADD: u64 = 1;
const FILE_REMOVE: u64 = 2;

/// Makes a device object.
pub(super) fn create(argument: usize) -> Result {
    let mut request: uapi::CreateDevice = read(argument)?;
    if request.flags & !CREATE_TEST != 0 {
        return Err(EINVAL);
    }
    if request.kind != TYPE_VFIO {
        return Err(ENODEV);
    }
    if request.flags & CREATE_TEST != 0 {
        return Ok(());
    }
    request.fd = sys::device_fd()? as u32;
    write(argument, &request)
}

fn ioctl(command: u32, argument: usize) -> Result<i32> {
    let attribute: uapi::DeviceAttribute = match command {
        uapi::SET_DEVICE_ATTR | uapi::GET_DEVICE_ATTR | uapi::HAS_DEVICE_ATTR => read(argument)?,
        _ => return Err(ENOTTY),
    };
    let known = attribute.group == GROUP_FILE && matches!(attribute.number, FILE_ADD | FILE_REMOVE);
    if !known || attribute.flags != 0 || command == uapi::GET_DEVICE_ATTR {
        return Err(ENXIO);
    }
    if command == uapi::SET_DEVICE_ATTR {
        let _fd: i32 = read(address(attribute.address)?)?;
        return Err(EOPNOTSUPP);
    }
    Ok(0)
}

/// ioctl on a device object.
#[no_mangle]
extern "C" fn hv_mshv_object_ioctl(command: c_uint, argument: c_ulong) -> c_long {
    answer(ioctl(command, argument as usize))
}
