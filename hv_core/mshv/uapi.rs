// SPDX-License-Identifier: GPL-2.0
//! Arguments of the ioctls, as in `include/uapi/linux/mshv.h`; `shim.c` asserts sizes, offsets and numbers
//! against it.

use kernel::transmute::{AsBytes, FromBytes};

/// `MSHV_CREATE_PARTITION`, on the device.
pub(super) const CREATE_PARTITION: u32 = 0x4010_b800;
/// `MSHV_ROOT_HVCALL`, everywhere.
pub(super) const ROOT_HVCALL: u32 = 0xc020_b807;
/// `MSHV_INITIALIZE_PARTITION`, on a partition, as are those up to the bitmap.
pub(super) const INITIALIZE_PARTITION: u32 = 0x0000_b800;
/// `MSHV_CREATE_VP`.
pub(super) const CREATE_VP: u32 = 0x4004_b801;
/// `MSHV_SET_GUEST_MEMORY`.
pub(super) const SET_GUEST_MEMORY: u32 = 0x4020_b802;
/// `MSHV_IRQFD`.
pub(super) const IRQFD: u32 = 0x4010_b803;
/// `MSHV_IOEVENTFD`.
pub(super) const IOEVENTFD: u32 = 0x4020_b804;
/// `MSHV_SET_MSI_ROUTING`.
pub(super) const SET_MSI_ROUTING: u32 = 0x4008_b805;
/// `MSHV_GET_GPAP_ACCESS_BITMAP`.
pub(super) const GET_GPAP_ACCESS_BITMAP: u32 = 0xc020_b806;
/// `MSHV_CREATE_DEVICE`.
pub(super) const CREATE_DEVICE: u32 = 0xc00c_b808;
/// `HV_PORT_EVENTFD`, which is ours: see `include/uapi/linux/hv_core.h`.
pub(super) const PORT_EVENTFD: u32 = 0x4010_b8c0;
/// `MSHV_SET_DEVICE_ATTR`, on a device object, as are the next two.
pub(super) const SET_DEVICE_ATTR: u32 = 0x4018_b800;
/// `MSHV_GET_DEVICE_ATTR`.
pub(super) const GET_DEVICE_ATTR: u32 = 0x4018_b801;
/// `MSHV_HAS_DEVICE_ATTR`.
pub(super) const HAS_DEVICE_ATTR: u32 = 0x4018_b802;
/// `MSHV_RUN_VP`, on a VP, as are the next two.
pub(super) const RUN_VP: u32 = 0x8100_b800;
/// `MSHV_GET_VP_STATE`.
pub(super) const GET_VP_STATE: u32 = 0xc010_b801;
/// `MSHV_SET_VP_STATE`.
pub(super) const SET_VP_STATE: u32 = 0xc010_b802;

macro_rules! arguments {
    ($($(#[$doc:meta])* $name:ident, $size:literal: { $($field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Default)]
        #[repr(C)]
        pub(super) struct $name {
            $(pub(super) $field: $type,)*
        }
        const _: () = assert!(core::mem::size_of::<$name>() == $size);
        // SAFETY: integers only; every value is good.
        unsafe impl FromBytes for $name {}
        // SAFETY: integers only; the size says that there is no padding.
        unsafe impl AsBytes for $name {}
    )*};
}

arguments! {
    /// `mshv_create_partition`.
    CreatePartition, 16: {
        flags: u64,
        isolation: u64,
    }

    /// `mshv_create_partition_v2`, without the packing that changes nothing.
    CreatePartitionV2, 64: {
        flags: u64,
        isolation: u64,
        feature_banks: u16,
        reserved: [u8; 6],
        disabled_features: [u64; 2],
        reserved1: [u64; 2],
        disabled_xsave: u64,
    }

    /// `mshv_user_mem_region`.
    MemoryRegion, 32: {
        size: u64,
        guest_pfn: u64,
        address: u64,
        flags: u8,
        reserved: [u8; 7],
    }

    /// `mshv_user_irqfd`.
    Irqfd, 16: {
        fd: i32,
        resample_fd: i32,
        gsi: u32,
        flags: u32,
    }

    /// `mshv_user_ioeventfd`.
    Ioeventfd, 32: {
        data: u64,
        address: u64,
        length: u32,
        fd: i32,
        flags: u32,
        reserved: [u8; 4],
    }

    /// `hv_port_eventfd`.
    PortEventfd, 16: {
        connection: u32,
        fd: i32,
        flags: u32,
        reserved: u32,
    }

    /// `mshv_user_irq_table`; the entries follow.
    RouteTable, 8: {
        count: u32,
        reserved: u32,
    }

    /// `mshv_user_irq_entry`.
    RouteEntry, 16: {
        gsi: u32,
        address_low: u32,
        address_high: u32,
        data: u32,
    }

    /// `mshv_gpap_access_bitmap`.
    AccessBitmap, 32: {
        access_type: u8,
        access_op: u8,
        reserved: [u8; 6],
        page_count: u64,
        base: u64,
        bitmap: u64,
    }

    /// `mshv_root_hvcall`.
    RootHvcall, 32: {
        code: u16,
        reps: u16,
        input_size: u16,
        output_size: u16,
        status: u16,
        reserved: [u8; 6],
        input: u64,
        output: u64,
    }

    /// `mshv_get_set_vp_state`.
    VpState, 16: {
        kind: u8,
        reserved: [u8; 3],
        size: u32,
        buffer: u64,
    }

    /// `mshv_create_device` of the crates.
    CreateDevice, 12: {
        kind: u32,
        fd: u32,
        flags: u32,
    }

    /// `mshv_device_attr` of the crates.
    DeviceAttribute, 24: {
        flags: u32,
        group: u32,
        number: u64,
        address: u64,
    }
}
