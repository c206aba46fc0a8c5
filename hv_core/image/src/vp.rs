// SPDX-License-Identifier: GPL-2.0
//! A virtual processor of a child.

use core::sync::atomic::{AtomicBool, AtomicU64};

use hv_abi::hypercall::{EventSignal, PortSet};

use crate::apic::{LocalApic, Posted};
use crate::arch::memory::SpinLock;
use crate::arch::object::{Handle, Owned};
use crate::arch::IoAccess;
use crate::cpuid_cache::CpuidCache;
use crate::guest_call::VpSet;
use crate::partition::Partition;
use crate::stimer::Timers;
use crate::synic::Synic;
use crate::vp_state::VpState;

/// What the hypervisor writes to a page of the guest because the guest asked for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owed {
    /// Code of the hypercall page.
    HypercallPage,
    /// The reference TSC page.
    ReferencePage,
    /// Zeros at this GPA, before it becomes a page of the SynIC.
    SynicPage(u64),
}

/// What belongs to the CPU that runs the VP, or that works on its registers.
#[repr(C)]
pub struct VpCore {
    /// Registers. While `in_hardware`, those that the VMCS or VMCB holds are stale here.
    pub state: VpState,
    /// Local APIC.
    pub apic: LocalApic,
    /// SPA of the XSAVE area.
    pub xsave: u64,
    /// SPA of the VMCS or VMCB.
    pub control: u64,
    /// SPAs of the pages that the root gave: registers, intercept message, run page; 0 for none.
    pub pages: [u64; 3],
    /// CPU on which the VP ran last.
    pub last_cpu: u32,
    /// VT-x: CPU whose host state the VMCS holds. A dispatch that does not enter changes it and not `last_cpu`.
    pub host_cpu: u32,
    /// The VMCS or VMCB is newer than `state`.
    pub in_hardware: bool,
    /// `state` has changes that the VMCS or VMCB lacks.
    pub dirty: bool,
    /// The control structure was set up.
    pub prepared: bool,
    /// Shut down by a triple fault: reports it again when it is run again.
    pub shut_down: bool,
    /// Generation of the partition's second-level table that the last entry saw.
    pub seen_generation: u64,
    /// Deadline that the root was told last, in host TSC.
    pub told_deadline: u64,
    /// Exits so far.
    pub exits: u64,
    /// The partition's `changes` when it had an identity, at its last hypercall.
    pub identified: u64,
    /// Event to deliver at the next entry because the last exit interrupted its delivery: entry
    /// interruption information in VMX form (SDM 26.8.3) and error code.
    pub requeue: (u32, u32),
    /// AMD-V: vector of the interrupt that the last entry offered. It is in the IRR until the processor took it.
    pub offered: Option<u8>,
    /// AMD-V: RIP of the IRET that ends the handler of an NMI. Until the guest is elsewhere, NMIs are blocked.
    pub iret: Option<u64>,
    /// AMD-V: the last entry set RFLAGS.TF to exit behind that IRET.
    pub steps: bool,
    /// An interrupt or NMI window was requested at the last entry.
    pub window_requested: bool,
    /// VT-x: tag of its translations, unique on this machine.
    pub vpid: u16,
    /// The root's values of the MSRs that VT-x switches by hand, while the VP runs.
    pub root_msrs: [u64; 5],
    /// SPA of the results of CPUID that the VMM registered.
    pub overrides: u64,
    /// At the last full entry nothing waited for delivery.
    pub quiet: bool,
    /// It went to the root with an exit that nothing disturbed.
    pub left_quickly: bool,
    /// The ports whose writes the root wants to hear of first.
    pub ports: PortSet,
    /// Those of them whose writes pause the VP.
    pub pauses: PortSet,
    /// What RDX said when it paused.
    pub paused_with: u64,
    /// The access to a port with which it went to the root, until there is a message about it or it is dispatched again.
    pub port: Option<IoAccess>,
    /// The event of a connection that it signalled last.
    pub event: EventSignal,
    /// A line about the VP was logged: each VP gets one, so that no guest and no VMM floods the root's log.
    pub logged: bool,
    /// Synthetic timers.
    pub timers: Timers,
    /// What its last instruction wrote to guest memory and is not there yet.
    pub owed: Option<Owed>,
    /// VPs that have to forget translations before this one goes on.
    pub flushes: VpSet,
    /// The partition's `changes` when their deadline was computed.
    pub timers_seen: u64,
    /// What CPUID said last.
    pub cpuid: CpuidCache,
}

/// A VP in its page.
#[repr(C)]
pub struct Vp {
    /// Owned by the CPU that runs it. At offset 0: the entry code finds registers and VP at one address.
    pub core: Owned<VpCore>,
    /// Interrupts from others.
    pub posted: Posted,
    /// It has translations that do not hold any more, as another VP of the guest says.
    pub stale: AtomicBool,
    /// What others may send by the SynIC.
    pub synic: SpinLock<Synic>,
    /// GPA of a page of the SynIC that could not be reached when there was something for it, with bit 0 set. 0 for none.
    pub awaited: AtomicU64,
    /// SPAs of the pages in which it holds messages and event flags.
    pub held: [u64; 2],
    /// Its partition.
    pub partition: Handle<Partition>,
    /// VP index.
    pub index: u32,
    /// SPA of the run page, 0 for none: read by those who signal.
    pub run_page: AtomicU64,
}
