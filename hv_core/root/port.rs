// SPDX-License-Identifier: GPL-2.0
//! Connections of children (TLFS chapter 11.9): where a message that a guest posts, or an event that it signals, ends up. That is an eventfd,
//! or another module of this kernel, which can send to the guest by the same port.
//!
//! A port of a module and its partition may each go first. Whoever goes waits until nobody is inside.

use core::ffi::c_void;

use kernel::new_condvar;
use kernel::new_mutex;
use kernel::prelude::*;
use kernel::sync::{Arc, CondVar, Mutex};

use super::call::{bytes, errno};
use super::partition::Partition;
use super::vp::Posted;
use super::winhv;
use crate::abi::hypercall::{code, Control, EventSignal};
use crate::abi::status::HvStatus;
use crate::sys::EventFd;

/// Most connections of a partition.
const MOST: usize = 4096;
/// A connection identifier has 24 bits.
const LARGEST: u32 = 0xff_ffff;
/// Words of payload of a message.
const PAYLOAD_WORDS: usize = 30;

/// What another module does with what comes, as `struct hv_port_ops` in `hv_core.h`. In the context of the VP's thread; the result is
/// the status of the guest's hypercall.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct PortOps {
    /// VP, type, payload and its size.
    post_message: Option<unsafe extern "C" fn(*mut c_void, u32, u32, *const c_void, u32) -> u16>,
    /// VP and flag.
    signal_event: Option<unsafe extern "C" fn(*mut c_void, u32, u16) -> u16>,
}

/// A port of another module.
#[pin_data]
pub(crate) struct Port {
    partition: u64,
    connection: u32,
    ops: PortOps,
    context: *mut c_void,
    #[pin]
    state: Mutex<State>,
    #[pin]
    left: CondVar,
}

/// Who may use a port.
struct State {
    /// Null once the partition or the port is gone.
    partition: *const Partition,
    inside: u32,
}

// SAFETY: the context is the other module's, which said that it may be used from any thread; the partition may be.
unsafe impl Send for Port {}
// SAFETY: as above.
unsafe impl Sync for Port {}

impl Port {
    /// Does `f` while partition and port exist.
    fn enter<R>(&self, f: impl FnOnce(&Partition) -> R) -> Option<R> {
        let mut state = self.state.lock();
        if state.partition.is_null() {
            return None;
        }
        let partition = state.partition;
        state.inside += 1;
        drop(state);
        // SAFETY: the partition closes its ports before it dies, and that waits for us.
        let result = f(unsafe { &*partition });
        let mut state = self.state.lock();
        state.inside -= 1;
        if state.inside == 0 {
            self.left.notify_all();
        }
        Some(result)
    }

    /// From here on nobody is inside.
    fn close(&self) {
        let mut state = self.state.lock();
        state.partition = core::ptr::null();
        while state.inside != 0 {
            self.left.wait(&mut state);
        }
    }

    /// Connects a port of another module to a partition. `ENOENT` without such a partition; `EEXIST` if it has the connection.
    ///
    /// # Safety
    /// The functions take `context`, on any thread, until [`Self::disconnect`] has returned.
    pub(crate) unsafe fn connect(
        partition: u64,
        connection: u32,
        ops: PortOps,
        context: *mut c_void,
    ) -> Result<Arc<Self>> {
        winhv()?.with_partition(partition, |target| {
            let port = Arc::pin_init(
                pin_init!(Self {
                    partition,
                    connection,
                    ops,
                    context,
                    state <- new_mutex!(State {
                        partition: target,
                        inside: 0,
                    }),
                    left <- new_condvar!(),
                }),
                GFP_KERNEL,
            )?;
            target.add_connection(connection, End::Port(port.clone()))?;
            Ok(port)
        })
    }

    /// Undoes [`Self::connect`]. Not from one of the port's own functions, for whose end it waits.
    pub(crate) fn disconnect(this: Arc<Self>) {
        let _ = winhv().and_then(|winhv| {
            winhv.with_partition(this.partition, |target| {
                target.remove_connection(
                    this.connection,
                    |end| matches!(end, End::Port(port) if Arc::ptr_eq(port, &this)),
                )
            })
        });
        this.close();
    }

    /// Sends a message to the guest (HvCallPostMessageDirect). `ENODEV` if the partition is gone; `EAGAIN` if the guest has not
    /// taken an earlier one yet.
    pub(crate) fn post(&self, vp: u32, source: u32, kind: u32, payload: &[u8]) -> Result {
        if source > 15 || payload.len() > PAYLOAD_WORDS * 8 {
            return Err(EINVAL);
        }
        // `hv_input_post_message_direct`: the message follows the source without a gap. Its header: type, size, flags, port.
        let mut input = [0u8; 20 + 256];
        let parts: [(usize, &[u8]); 6] = [
            (0, &self.partition.to_le_bytes()),
            (8, &vp.to_le_bytes()),
            (16, &source.to_le_bytes()),
            (20, &kind.to_le_bytes()),
            (24, &[payload.len() as u8]),
            (36, payload),
        ];
        for (offset, part) in parts {
            let slot = input.get_mut(offset..offset + part.len());
            slot.ok_or(EINVAL)?.copy_from_slice(part);
        }
        self.send(code::POST_MESSAGE_DIRECT, &input)
    }

    /// Sets an event flag of the guest (HvCallSignalEventDirect). `ENODEV` if the partition is gone.
    pub(crate) fn signal(&self, vp: u32, source: u32, flag: u16) -> Result {
        // `hv_input_signal_event_direct`: partition, VP, trust level, source, flag.
        let word = u64::from(vp) | u64::from(source & 0xff) << 40 | u64::from(flag) << 48;
        if source > 15 {
            return Err(EINVAL);
        }
        self.send(code::SIGNAL_EVENT_DIRECT, bytes(&[self.partition, word]))
    }

    fn send(&self, code: u16, input: &[u8]) -> Result {
        self.enter(|partition| {
            let answer = partition.paged_once(Control::simple(code, false).0, input)?;
            if answer.status == HvStatus::INSUFFICIENT_BUFFERS {
                return Err(EAGAIN);
            }
            errno(answer.status)?;
            partition.scan_signals();
            Ok(())
        })
        .ok_or(ENODEV)?
    }
}

/// Where a connection ends.
#[derive(Clone)]
pub(crate) enum End {
    /// At an event, which takes flag 0 and no messages.
    Event(Arc<EventFd>),
    /// At a port of another module.
    Port(Arc<Port>),
}

/// A connection of a partition.
struct Connection {
    number: u32,
    end: End,
}

/// Those of a partition, by number.
pub(crate) struct Connections(KVVec<Connection>);

impl Connections {
    /// None.
    pub(super) fn new() -> Self {
        Self(KVVec::new())
    }

    fn find(&self, number: u32) -> Result<usize, usize> {
        self.0.binary_search_by_key(&number, |one| one.number)
    }
}

impl Partition {
    /// Makes a connection; `EEXIST` if there is one with that number, `EINVAL` if it is no number of one.
    pub(crate) fn add_connection(&self, number: u32, end: End) -> Result {
        if number > LARGEST {
            return Err(EINVAL);
        }
        let mut connections = self.connections.lock();
        let Err(index) = connections.find(number) else {
            return Err(EEXIST);
        };
        if connections.0.len() >= MOST {
            return Err(ENOSPC);
        }
        connections.0.reserve(1, GFP_KERNEL_ACCOUNT)?;
        connections
            .0
            .insert_within_capacity(index, Connection { number, end })
            .map_err(|_| ENOMEM)
    }

    /// Removes the connection with that number if it ends like that; `ENOENT` if there is none.
    pub(crate) fn remove_connection(
        &self,
        number: u32,
        is_it: impl FnOnce(&End) -> bool,
    ) -> Result {
        let mut connections = self.connections.lock();
        let index = connections.find(number).map_err(|_| ENOENT)?;
        if !connections.0.get(index).is_some_and(|one| is_it(&one.end)) {
            return Err(ENOENT);
        }
        let removed = connections.0.remove(index).map_err(|_| ENOENT)?;
        drop(connections);
        drop(removed);
        Ok(())
    }

    /// The partition dies: no port reaches it any more.
    pub(super) fn close_connections(&self) {
        let mut connections = self.connections.lock();
        let all = core::mem::replace(&mut connections.0, KVVec::new());
        drop(connections);
        for one in &all {
            if let End::Port(port) = &one.end {
                port.close();
            }
        }
    }

    fn connection(&self, number: u32) -> Option<End> {
        let connections = self.connections.lock();
        let index = connections.find(number).ok()?;
        connections.0.get(index).map(|one| one.end.clone())
    }

    /// A VP signalled an event. Returns what its hypercall does.
    pub(super) fn signalled(&self, vp: u32, event: EventSignal) -> HvStatus {
        match self.connection(event.connection) {
            None => HvStatus::INVALID_CONNECTION_ID,
            Some(End::Event(_)) if event.flag != 0 => HvStatus::INVALID_PARAMETER,
            Some(End::Event(end)) => {
                end.signal();
                HvStatus::SUCCESS
            }
            Some(End::Port(port)) => port
                .enter(|_| {
                    let Some(function) = port.ops.signal_event else {
                        return HvStatus::INVALID_PORT_ID;
                    };
                    // SAFETY: promised to `connect`; the port is not disconnected while we are inside.
                    HvStatus(unsafe { function(port.context, vp, event.flag) })
                })
                .unwrap_or(HvStatus::INVALID_CONNECTION_ID),
        }
    }

    /// A VP posted a message. Returns what its hypercall does.
    pub(super) fn posted(&self, vp: u32, message: &Posted) -> HvStatus {
        let [connection, about, payload @ ..] = message;
        let size = ((about >> 32) as usize).min(PAYLOAD_WORDS * 8);
        match self.connection(*connection as u32) {
            None => HvStatus::INVALID_CONNECTION_ID,
            Some(End::Event(_)) => HvStatus::INVALID_PORT_ID,
            Some(End::Port(port)) => port
                .enter(|_| {
                    let Some(function) = port.ops.post_message else {
                        return HvStatus::INVALID_PORT_ID;
                    };
                    let from = payload.as_ptr().cast();
                    // SAFETY: as in `signalled`; the payload has `size` bytes.
                    HvStatus(unsafe {
                        function(port.context, vp, *about as u32, from, size as u32)
                    })
                })
                .unwrap_or(HvStatus::INVALID_CONNECTION_ID),
        }
    }
}
