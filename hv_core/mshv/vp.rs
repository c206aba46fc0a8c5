// SPDX-License-Identifier: GPL-2.0
//! ioctls of a VP file.

use core::ptr::NonNull;

use kernel::prelude::*;
use kernel::sync::Arc;
use kernel::uaccess::{UserPtr, UserSlice};

use super::{address, hvcall, read, uapi, write};
use crate::root::{Partition, StateKind, Vp};
use crate::sys;

/// What a VP file has: the VP, and the partition that keeps it.
pub(super) struct VpFile {
    partition: Arc<Partition>,
    vp: NonNull<Vp>,
}

impl VpFile {
    /// Gives the current process a file for a VP of the partition.
    pub(super) fn open(partition: &Arc<Partition>, vp: &Vp) -> Result<i32> {
        let file = Self {
            partition: partition.clone(),
            vp: NonNull::from(vp),
        };
        let file = KBox::into_raw(KBox::new(file, GFP_KERNEL)?);
        // SAFETY: what the callbacks expect.
        unsafe { sys::vp_fd(file.cast()) }.inspect_err(|_| {
            // SAFETY: made by `into_raw` above, and no file has it.
            drop(unsafe { KBox::from_raw(file) });
        })
    }

    /// The VP.
    pub(super) fn vp(&self) -> &Vp {
        // SAFETY: a VP lives as long as its partition, which we hold.
        unsafe { self.vp.as_ref() }
    }

    /// One ioctl.
    pub(super) fn ioctl(&self, command: u32, argument: usize) -> Result {
        match command {
            uapi::RUN_VP => self.vp().run(&self.partition, argument),
            uapi::GET_VP_STATE => self.state(argument, false),
            uapi::SET_VP_STATE => self.state(argument, true),
            uapi::ROOT_HVCALL => hvcall::on_vp(&self.partition, self.vp(), argument),
            _ => Err(ENOTTY),
        }
    }

    fn state(&self, argument: usize, set: bool) -> Result {
        let mut request: uapi::VpState = read(argument)?;
        let given = request.size as usize;
        if request.reserved != [0; 3]
            || given == 0
            || given % 4096 != 0
            || request.buffer % 4096 != 0
        {
            return Err(EINVAL);
        }
        let kind = StateKind::from_user(request.kind)?;
        request.buffer.checked_add(given as u64).ok_or(EOVERFLOW)?;
        self.vp().exclusively(|| {
            let size = self.vp().state_size(&self.partition, kind)?;
            // The client learns the size even if its buffer is too small.
            request.size = size as u32;
            write(argument, &request)?;
            if size > given {
                return Err(EINVAL);
            }
            let whole = size.next_multiple_of(4096);
            let mut data = KVec::from_elem(0u8, whole, GFP_KERNEL)?;
            // Timers are shorter than a page, and only they count.
            let length = if kind == StateKind::SyntheticTimers {
                size
            } else {
                whole
            };
            let buffer = UserSlice::new(UserPtr::from_addr(address(request.buffer)?), length);
            let data_of_user = data.get_mut(..length).ok_or(EIO)?;
            if set {
                buffer.reader().read_slice(data_of_user)?;
                return self
                    .vp()
                    .transfer_state(&self.partition, kind, true, &mut data);
            }
            self.vp()
                .transfer_state(&self.partition, kind, false, &mut data)?;
            buffer.writer().write_slice(data.get(..length).ok_or(EIO)?)
        })
    }
}
