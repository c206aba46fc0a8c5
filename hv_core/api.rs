// SPDX-License-Identifier: GPL-2.0
//! What other modules call: the functions of `include/hv_core.h`, exported by `shim.c`.

use core::ffi::c_void;
use core::ptr;

use kernel::prelude::*;
use kernel::sync::Arc;

use crate::root::{Port, PortOps};

fn code(result: Result) -> i32 {
    result.map_or_else(|error| error.to_errno(), |()| 0)
}

/// `hv_port_connect`.
///
/// # Safety
/// `ops` is readable, and its functions take `context` as `hv_core.h` says.
#[no_mangle]
unsafe extern "C" fn hv_port_connect(
    partition: u64,
    connection: u32,
    ops: *const PortOps,
    context: *mut c_void,
) -> *const Port {
    // SAFETY: the caller's promises.
    match unsafe { Port::connect(partition, connection, *ops, context) } {
        Ok(port) => Arc::into_raw(port),
        Err(error) => ptr::without_provenance(error.to_errno() as isize as usize),
    }
}

/// `hv_port_disconnect`.
///
/// # Safety
/// `port` is from [`hv_port_connect`] and not used any more.
#[no_mangle]
unsafe extern "C" fn hv_port_disconnect(port: *const Port) {
    // SAFETY: the caller's promise; made by `Arc::into_raw`.
    Port::disconnect(unsafe { Arc::from_raw(port) });
}

/// `hv_port_post_message`.
///
/// # Safety
/// `port` is from [`hv_port_connect`], and `payload` has `size` bytes.
#[no_mangle]
unsafe extern "C" fn hv_port_post_message(
    port: *const Port,
    vp: u32,
    source: u32,
    kind: u32,
    payload: *const u8,
    size: u32,
) -> i32 {
    let payload = if size == 0 {
        &[]
    } else {
        // SAFETY: the caller's promise.
        unsafe { core::slice::from_raw_parts(payload, size as usize) }
    };
    // SAFETY: the caller's promise: it is not disconnected yet.
    code(unsafe { &*port }.post(vp, source, kind, payload))
}

/// `hv_port_signal_event`.
///
/// # Safety
/// `port` is from [`hv_port_connect`].
#[no_mangle]
unsafe extern "C" fn hv_port_signal_event(
    port: *const Port,
    vp: u32,
    source: u32,
    flag: u16,
) -> i32 {
    // SAFETY: as above.
    code(unsafe { &*port }.signal(vp, source, flag))
}
