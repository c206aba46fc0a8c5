// SPDX-License-Identifier: GPL-2.0
//! ioctls of a partition file.

use kernel::prelude::*;
use kernel::sync::Arc;
use kernel::uaccess::{UserPtr, UserSlice};

use super::vp::VpFile;
use super::{address, device, hvcall, read, uapi};
use crate::root::{
    AccessQuery, DoorbellRequest, End, IrqfdRequest, Partition, RegionRequest, Route, Routes,
    MAX_ROUTES,
};
use crate::sys::EventFd;

/// `MSHV_SET_MEM_BIT_*`.
mod memory_flag {
    pub(super) const WRITABLE: u8 = 1 << 0;
    pub(super) const EXECUTABLE: u8 = 1 << 1;
    pub(super) const UNMAP: u8 = 1 << 2;
    pub(super) const ALL: u8 = 7;
}

/// `MSHV_IRQFD_BIT_*`.
mod irqfd_flag {
    pub(super) const DEASSIGN: u32 = 1 << 0;
    pub(super) const RESAMPLE: u32 = 1 << 1;
    pub(super) const ALL: u32 = 3;
}

/// `MSHV_IOEVENTFD_BIT_*`.
mod ioeventfd_flag {
    pub(super) const DATAMATCH: u32 = 1 << 0;
    pub(super) const PIO: u32 = 1 << 1;
    pub(super) const DEASSIGN: u32 = 1 << 2;
    pub(super) const ALL: u32 = 7;
}

/// One ioctl.
pub(super) fn ioctl(partition: &Arc<Partition>, command: u32, argument: usize) -> Result<i32> {
    match command {
        uapi::CREATE_VP => {
            let index: u32 = read(argument)?;
            return partition.create_vp(index, |vp| VpFile::open(partition, vp));
        }
        uapi::INITIALIZE_PARTITION => partition.initialize(),
        uapi::SET_GUEST_MEMORY => set_memory(partition, argument),
        uapi::IRQFD => irqfd(partition, argument),
        uapi::IOEVENTFD => ioeventfd(partition, argument),
        uapi::SET_MSI_ROUTING => set_routes(partition, argument),
        uapi::GET_GPAP_ACCESS_BITMAP => access_bitmap(partition, argument),
        uapi::PORT_EVENTFD => port_eventfd(partition, argument),
        uapi::CREATE_DEVICE => device::create(argument),
        uapi::ROOT_HVCALL => hvcall::on_partition(partition, argument),
        _ => Err(ENOTTY),
    }?;
    Ok(0)
}

fn set_memory(partition: &Partition, argument: usize) -> Result {
    let region: uapi::MemoryRegion = read(argument)?;
    if region.flags & !memory_flag::ALL != 0 || region.reserved != [0; 7] {
        return Err(EINVAL);
    }
    let (start, size, from) = (region.guest_pfn, region.size, region.address);
    let writable = region.flags & memory_flag::WRITABLE != 0;
    let executable = region.flags & memory_flag::EXECUTABLE != 0;
    let request = RegionRequest::new(start, size, from, writable, executable)?;
    if region.flags & memory_flag::UNMAP != 0 {
        partition.unmap(&request)
    } else {
        partition.map(request)
    }
}

fn irqfd(partition: &Partition, argument: usize) -> Result {
    let request: uapi::Irqfd = read(argument)?;
    if request.flags & !irqfd_flag::ALL != 0 {
        return Err(EINVAL);
    }
    let event = EventFd::get(request.fd)?;
    if request.flags & irqfd_flag::DEASSIGN != 0 {
        partition.remove_irqfd(&event, request.gsi);
        return Ok(());
    }
    let resample = if request.flags & irqfd_flag::RESAMPLE != 0 {
        Some(EventFd::get(request.resample_fd)?)
    } else {
        None
    };
    partition.add_irqfd(IrqfdRequest {
        fd: request.fd,
        event,
        resample,
        gsi: request.gsi,
    })
}

fn ioeventfd(partition: &Partition, argument: usize) -> Result {
    let request: uapi::Ioeventfd = read(argument)?;
    if request.flags & !ioeventfd_flag::ALL != 0
        || request.reserved != [0; 4]
        || !matches!(request.length, 0 | 1 | 2 | 4 | 8)
        || request.address.checked_add(request.length.into()).is_none()
    {
        return Err(EINVAL);
    }
    let bell = DoorbellRequest {
        port: request.flags & ioeventfd_flag::PIO != 0,
        address: request.address,
        length: request.length,
        data: (request.flags & ioeventfd_flag::DATAMATCH != 0).then_some(request.data),
        event: EventFd::get(request.fd)?,
    };
    if request.flags & ioeventfd_flag::DEASSIGN != 0 {
        partition.remove_doorbell(&bell)
    } else {
        partition.add_doorbell(bell)
    }
}

fn port_eventfd(partition: &Partition, argument: usize) -> Result {
    const DEASSIGN: u32 = 1 << 0;
    let request: uapi::PortEventfd = read(argument)?;
    if request.flags & !DEASSIGN != 0 || request.reserved != 0 {
        return Err(EINVAL);
    }
    let event = EventFd::get(request.fd)?;
    if request.flags & DEASSIGN != 0 {
        return partition.remove_connection(
            request.connection,
            |end| matches!(end, End::Event(one) if **one == event),
        );
    }
    let event = Arc::new(event, GFP_KERNEL_ACCOUNT)?;
    partition.add_connection(request.connection, End::Event(event))
}

fn set_routes(partition: &Partition, argument: usize) -> Result {
    let table: uapi::RouteTable = read(argument)?;
    let count = table.count as usize;
    if count > MAX_ROUTES || table.reserved != 0 {
        return Err(EINVAL);
    }
    let entries = argument
        .checked_add(size_of::<uapi::RouteTable>())
        .ok_or(EFAULT)?;
    let length = count * size_of::<uapi::RouteEntry>();
    let mut reader = UserSlice::new(UserPtr::from_addr(entries), length).reader();
    let mut routes = Routes::new();
    for _ in 0..count {
        let entry: uapi::RouteEntry = reader.read()?;
        if entry.address_high != 0 {
            return Err(EINVAL);
        }
        routes.add(entry.gsi, Route::new(entry.address_low, entry.data))?;
    }
    partition.set_routes(routes);
    Ok(())
}

/// `MSHV_GPAP_ACCESS_TYPE_DIRTY`.
const DIRTY: u8 = 1;
/// `MSHV_GPAP_ACCESS_OP_CLEAR`.
const CLEAR: u8 = 1;

fn access_bitmap(partition: &Partition, argument: usize) -> Result {
    let query: uapi::AccessBitmap = read(argument)?;
    if query.access_type > 1
        || query.access_op > 2
        || query.reserved != [0; 6]
        || query.page_count == 0
        || query.bitmap == 0
    {
        return Err(EINVAL);
    }
    let bytes = query.page_count.div_ceil(8);
    let end = query.base.checked_add(query.page_count).ok_or(E2BIG)?;
    // 52 bits of guest-physical address.
    if end > 1 << 40 {
        return Err(E2BIG);
    }
    let mut writer =
        UserSlice::new(UserPtr::from_addr(address(query.bitmap)?), address(bytes)?).writer();
    let query = AccessQuery {
        gfn: query.base,
        count: query.page_count,
        dirty: query.access_type == DIRTY,
        clear: query.access_op == CLEAR,
    };
    partition.access_bitmap(query, |piece| writer.write_slice(piece))
}
