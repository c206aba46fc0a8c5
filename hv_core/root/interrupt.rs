// SPDX-License-Identifier: GPL-2.0
//! Interrupts from devices: the MSI routing table, and events that assert an interrupt (irqfd).
//!
//! An event may come in any context with interrupts off, so it takes no lock: its route is one atomic word, the
//! hypercall has pages of its own on each CPU, and waking a VP needs nothing else.

use core::ffi::c_void;
use core::sync::atomic::{AtomicU64, Ordering};

use kernel::prelude::*;

use super::call::{bytes, errno};
use super::partition::Partition;
use crate::abi::hypercall::{code, Control};
use crate::abi::partition::AssertVirtualInterrupt;
use crate::sys::{EventFd, EventHook};

/// Largest number of routes, and of events.
pub(crate) const MAX_ROUTES: usize = 4096;

/// Where a message-signalled interrupt goes: address in bits 31:0, data in bits 63:32 (SDM 11.11). 0: nowhere.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Route(u64);

impl Route {
    const NONE: Self = Self(0);

    /// From what a client gives.
    pub(crate) const fn new(address: u32, data: u32) -> Self {
        Self(address as u64 | (data as u64) << 32)
    }

    const fn data(self) -> u64 {
        self.0 >> 32
    }

    const fn is_level(self) -> bool {
        self.data() & (1 << 15) != 0
    }

    const fn vector(self) -> u32 {
        (self.data() & 0xff) as u32
    }

    const fn destination(self) -> u64 {
        self.0 >> 12 & 0xff
    }

    const fn is_logical(self) -> bool {
        self.0 & (1 << 2) != 0
    }

    /// Whether an end of a level-triggered interrupt that a VP gave may be meant for this route. A VP's APIC ID is its number; what
    /// a logical destination names, only the guest knows.
    fn may_end_on(self, vp: u32, vector: u32) -> bool {
        self.is_level()
            && self.vector() == vector
            && (self.is_logical() || [0xff, vp.into()].contains(&self.destination()))
    }

    /// The hypercall's input; `None` if there is nothing to deliver.
    fn to_call(self, partition: u64) -> Option<AssertVirtualInterrupt> {
        let kind = (self.data() >> 8) & 7;
        // Fixed and lowest priority need a vector.
        if self == Self::NONE || (kind <= 1 && self.vector() == 0) {
            return None;
        }
        // Whoever has an event for a level-triggered interrupt acts on its end.
        let level = if self.is_level() {
            1 << 32 | 1 << 34
        } else {
            0
        };
        Some(AssertVirtualInterrupt {
            partition_id: partition,
            control: kind | level | u64::from(self.is_logical()) << 33,
            dest_addr: self.destination(),
            vector: self.vector(),
            ..Default::default()
        })
    }
}

/// What a client asks.
pub(crate) struct IrqfdRequest {
    /// The descriptor of the event.
    pub(crate) fd: i32,
    /// The event it names.
    pub(crate) event: EventFd,
    /// Signalled at the end of a level-triggered interrupt.
    pub(crate) resample: Option<EventFd>,
    /// Number of the route.
    pub(crate) gsi: u32,
}

/// What an event finds when it is signalled.
struct Source {
    partition: *const Partition,
    route: AtomicU64,
}

/// An event that asserts an interrupt.
struct Irqfd {
    /// Dropped first: then nobody looks at the source.
    hook: EventHook,
    source: KBox<Source>,
    resample: Option<EventFd>,
    gsi: u32,
}

// SAFETY: the pointer to the partition is used only while the partition lives, from any thread.
unsafe impl Send for Irqfd {}

/// A routing table.
pub(crate) struct Routes {
    /// By number.
    table: KVVec<Route>,
    /// Numbers that were named.
    named: [u64; MAX_ROUTES / 64],
}

impl Routes {
    /// Without routes.
    pub(crate) fn new() -> Self {
        Self {
            table: KVVec::new(),
            named: [0; MAX_ROUTES / 64],
        }
    }

    /// Adds a route; `EINVAL` if its number is too large or was named before.
    pub(crate) fn add(&mut self, gsi: u32, route: Route) -> Result {
        let index = gsi as usize;
        let named = self.named.get_mut(index / 64).ok_or(EINVAL)?;
        if *named & (1 << (index % 64)) != 0 {
            return Err(EINVAL);
        }
        if self.table.len() <= index {
            self.table
                .resize(index + 1, Route::NONE, GFP_KERNEL_ACCOUNT)?;
        }
        *named |= 1 << (index % 64);
        *self.table.get_mut(index).ok_or(EINVAL)? = route;
        Ok(())
    }

    fn get(&self, gsi: u32) -> Route {
        self.table.get(gsi as usize).copied().unwrap_or(Route::NONE)
    }
}

/// Routes, and events.
pub(crate) struct Interrupts {
    routes: Routes,
    irqfds: KVVec<Irqfd>,
}

impl Interrupts {
    /// None.
    pub(super) fn new() -> Self {
        Self {
            routes: Routes::new(),
            irqfds: KVVec::new(),
        }
    }

    /// Removes all events. Afterwards none comes.
    pub(super) fn clear(&mut self) {
        self.irqfds.clear();
    }
}

/// An event was signalled; called by `shim.c` with interrupts off.
#[no_mangle]
extern "C" fn hv_root_irqfd_signalled(owner: *mut c_void) {
    // SAFETY: the owner of a hook is the source beside it, which outlives the hook.
    let source = unsafe { &*owner.cast::<Source>() };
    // SAFETY: the partition removes its events before it dies.
    let partition = unsafe { &*source.partition };
    partition.assert_route(Route(source.route.load(Ordering::Acquire)));
}

impl Partition {
    /// Asserts the interrupt of a route. Any context; an interrupt that cannot be delivered is lost, as on a bus.
    fn assert_route(&self, route: Route) {
        let Some(input) = route.to_call(self.id()) else {
            return;
        };
        let control = Control::simple(code::ASSERT_VIRTUAL_INTERRUPT, false).0;
        let answer = self.paged_once(control, bytes(&input));
        if answer.and_then(|answer| errno(answer.status)).is_ok() {
            self.scan_signals();
        }
    }

    /// Replaces the routing table.
    pub(crate) fn set_routes(&self, routes: Routes) {
        let mut interrupts = self.interrupts.lock();
        interrupts.routes = routes;
        for irqfd in interrupts.irqfds.iter() {
            irqfd
                .source
                .route
                .store(interrupts.routes.get(irqfd.gsi).0, Ordering::Release);
        }
    }

    /// Makes an event assert the interrupt of a route, which may come later. `EBUSY` if the event is in use.
    pub(crate) fn add_irqfd(&self, request: IrqfdRequest) -> Result {
        let mut interrupts = self.interrupts.lock();
        // Those whose last descriptor is closed cannot be removed by anybody else.
        interrupts.irqfds.retain(|irqfd| !irqfd.hook.is_closed());
        if interrupts
            .irqfds
            .iter()
            .any(|irqfd| irqfd.hook.is_on(&request.event))
        {
            return Err(EBUSY);
        }
        if interrupts.irqfds.len() >= MAX_ROUTES {
            return Err(ENOSPC);
        }
        let route = interrupts.routes.get(request.gsi);
        if request.resample.is_some() && !route.is_level() {
            return Err(EINVAL);
        }
        interrupts.irqfds.reserve(1, GFP_KERNEL_ACCOUNT)?;
        let source = Source {
            partition: self,
            route: AtomicU64::new(route.0),
        };
        let source = KBox::new(source, GFP_KERNEL_ACCOUNT)?;
        let owner = (&raw const *source).cast_mut().cast();
        // SAFETY: the source outlives the hook (the order of the fields), and the partition removes both.
        let (hook, signalled) = unsafe { EventHook::new(request.fd, request.event, owner)? };
        let irqfd = Irqfd {
            hook,
            source,
            resample: request.resample,
            gsi: request.gsi,
        };
        interrupts.irqfds.push(irqfd, GFP_KERNEL_ACCOUNT)?;
        if signalled {
            self.assert_route(route);
        }
        Ok(())
    }

    /// Ends that. No matter whether it was so; afterwards the event asserts nothing.
    pub(crate) fn remove_irqfd(&self, event: &EventFd, gsi: u32) {
        self.interrupts
            .lock()
            .irqfds
            .retain(|irqfd| irqfd.gsi != gsi || !irqfd.hook.is_on(event));
    }

    /// A VP ended a level-triggered interrupt: events that want to know are told. True if there was one.
    pub(super) fn resample(&self, vp: u32, vector: u32) -> bool {
        let interrupts = self.interrupts.lock();
        let mut told = false;
        for irqfd in interrupts.irqfds.iter() {
            let route = Route(irqfd.source.route.load(Ordering::Acquire));
            if let Some(event) = irqfd.resample.as_ref() {
                if route.may_end_on(vp, vector) {
                    event.signal();
                    told = true;
                }
            }
        }
        told
    }
}
