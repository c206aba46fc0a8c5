// SPDX-License-Identifier: GPL-2.0
//! `/dev/mshv`: checks and copies what user space says, and calls `root/`. The interface is that of
//! `include/uapi/linux/mshv.h`.
//!
//! ```text
//!   device ── CREATE_PARTITION ──► partition ── CREATE_VP ──► VP ── RUN_VP
//!      └───────── ROOT_HVCALL ────────┴───────────────────────┘
//! ```
//!
//! Each file holds the module; a VP's file holds its partition.

mod device;
mod hvcall;
mod partition;
mod uapi;
mod vp;

use core::ffi::{c_long, c_uint, c_ulong, c_void};
use core::sync::atomic::{AtomicBool, Ordering};

use kernel::prelude::*;
use kernel::sync::Arc;
use kernel::transmute::{AsBytes, FromBytes};
use kernel::uaccess::{UserPtr, UserSlice};

use crate::root::{self, Creation, Partition};
use crate::sys;

/// Whether the device is there.
static STARTED: AtomicBool = AtomicBool::new(false);

/// Makes the device appear.
pub(crate) fn start() -> Result {
    sys::mshv_register()?;
    STARTED.store(true, Ordering::Release);
    Ok(())
}

/// Takes it away. No file is open any more: each holds the module.
pub(crate) fn stop() {
    if STARTED.swap(false, Ordering::AcqRel) {
        sys::mshv_deregister();
    }
}

/// Bits of `pt_flags` and what the image calls them.
const PARTITION_FLAGS: [(u64, u64); 5] = {
    use crate::abi::partition::creation;
    [
        (1 << 0, creation::LAPIC_ENABLED),
        (1 << 1, creation::X2APIC_CAPABLE),
        (1 << 2, creation::GPA_SUPER_PAGES_ENABLED),
        (1 << 4, creation::NESTED_VIRTUALIZATION_CAPABLE),
        (1 << 5, creation::SMT_ENABLED_GUEST),
    ]
};
/// `MSHV_PT_BIT_CPU_AND_XSAVE_FEATURES`: the longer structure follows.
const HAS_FEATURES: u64 = 1 << 3;
/// All bits of `pt_flags`.
const ALL_FLAGS: u64 = 0x3f;

/// Reads a structure of user space.
fn read<T: FromBytes>(address: usize) -> Result<T> {
    UserSlice::new(UserPtr::from_addr(address), size_of::<T>())
        .reader()
        .read()
}

/// Writes a structure to user space.
fn write<T: AsBytes>(address: usize, value: &T) -> Result {
    UserSlice::new(UserPtr::from_addr(address), size_of::<T>())
        .writer()
        .write(value)
}

/// An address that user space gave as a number.
fn address(number: u64) -> Result<usize> {
    usize::try_from(number).map_err(|_| EFAULT)
}

fn create_partition(argument: usize) -> Result<i32> {
    let check = |flags: u64, isolation: u64| {
        if flags & !ALL_FLAGS != 0 || isolation != 0 {
            Err(EINVAL)
        } else {
            Ok(())
        }
    };
    let short: uapi::CreatePartition = read(argument)?;
    check(short.flags, short.isolation)?;
    let mut wanted = Creation::default();
    let mut flags = short.flags;
    if flags & HAS_FEATURES != 0 {
        let long: uapi::CreatePartitionV2 = read(argument)?;
        check(long.flags, long.isolation)?;
        if long.feature_banks != 2 || long.reserved != [0; 6] || long.reserved1 != [0; 2] {
            return Err(EINVAL);
        }
        flags = long.flags;
        wanted.disabled_features = long.disabled_features;
        wanted.disabled_xsave = long.disabled_xsave;
    }
    for (theirs, ours) in PARTITION_FLAGS {
        if flags & theirs != 0 {
            wanted.flags |= ours;
        }
    }
    let partition = Partition::create(root::winhv()?, wanted)?;
    let raw = Arc::into_raw(partition);
    // SAFETY: what the callbacks below expect.
    unsafe { sys::partition_fd(raw.cast_mut().cast()) }.inspect_err(|_| {
        // SAFETY: made by `into_raw` above, and no file has it.
        drop(unsafe { Arc::from_raw(raw) });
    })
}

fn answer(result: Result<i32>) -> c_long {
    match result {
        Ok(value) => value.into(),
        Err(error) => error.to_errno().into(),
    }
}

/// ioctl on the device.
#[no_mangle]
extern "C" fn hv_mshv_device_ioctl(command: c_uint, argument: c_ulong) -> c_long {
    let argument = argument as usize;
    answer(match command {
        uapi::CREATE_PARTITION => create_partition(argument),
        uapi::ROOT_HVCALL => hvcall::on_device(argument).map(|()| 0),
        _ => Err(ENOTTY),
    })
}

/// ioctl on a partition.
#[no_mangle]
extern "C" fn hv_mshv_partition_ioctl(
    data: *mut c_void,
    command: c_uint,
    argument: c_ulong,
) -> c_long {
    // SAFETY: the data of a partition file is an `Arc<Partition>` made raw, which the file keeps.
    let partition = unsafe { Arc::from_raw(data.cast::<Partition>().cast_const()) };
    let result = partition::ioctl(&partition, command, argument as usize);
    // The file still has it.
    let _ = Arc::into_raw(partition);
    answer(result)
}

/// The last descriptor of a partition was closed.
#[no_mangle]
extern "C" fn hv_mshv_partition_release(data: *mut c_void) {
    // SAFETY: as above; the file goes away.
    drop(unsafe { Arc::from_raw(data.cast::<Partition>().cast_const()) });
}

/// ioctl on a VP.
#[no_mangle]
extern "C" fn hv_mshv_vp_ioctl(data: *mut c_void, command: c_uint, argument: c_ulong) -> c_long {
    // SAFETY: the data of a VP file is a `VpFile`, which the file keeps.
    let file = unsafe { &*data.cast::<vp::VpFile>() };
    answer(file.ioctl(command, argument as usize).map(|()| 0))
}

/// The page that mmap of a VP at page offset `number` shows, or an error pointer.
#[no_mangle]
extern "C" fn hv_mshv_vp_page(data: *mut c_void, number: c_ulong) -> *mut c_void {
    // SAFETY: as above.
    let file = unsafe { &*data.cast::<vp::VpFile>() };
    match file.vp().user_page(number as usize) {
        Ok(page) => page.cast(),
        Err(error) => error.to_errno() as isize as *mut c_void,
    }
}

/// The last descriptor and mapping of a VP is gone.
#[no_mangle]
extern "C" fn hv_mshv_vp_release(data: *mut c_void) {
    // SAFETY: made by `KBox::into_raw`; the file goes away.
    drop(unsafe { KBox::from_raw(data.cast::<vp::VpFile>()) });
}
