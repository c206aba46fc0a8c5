// SPDX-License-Identifier: GPL-2.0
//! What a VP gets at an entry and what becomes of its exits, on a processor that only takes notes.

mod common;

use core::mem::offset_of;

use common::*;
use hv_abi::boot::Vendor;
use hv_abi::hypercall::{
    code, state_page, DispatchEvent, EventSignal, PortSet, PortWrite, VpRunPage,
};
use hv_abi::partition::{message, property, vp_state, RegisterAssoc, VpRegisters};
use hv_abi::partition::{MapVpStatePage, SetPartitionProperty, SignalEventDirect, VpState};
use hv_abi::status::HvStatus;
use hv_image::apic::{DeliveryMode, Interrupt};
use hv_image::arch::object::Ownership;
use hv_image::arch::{ChildExit, ChildHardware, IoAccess, QuickExit};
use hv_image::child::{post, show, Next, Run};
use hv_image::child_cpuid::synthetic;
use hv_image::child_hypercall::fail;
use hv_image::child_msr::Paging;
use hv_image::partition::find;
use hv_image::register_page::{self, RegisterPage, Shown};
use hv_image::registers::name;
use hv_image::vp::{Vp, VpCore};
use hv_x86::paging::PageSize;
use proptest::prelude::*;

const VALID: u32 = 1 << 31;
const MESSAGE: u64 = KEPT;
const RUN_PAGE: u64 = KEPT + PAGE;
const MISSING: Option<DispatchEvent> = Some(DispatchEvent::Missing);

/// What was delivered at an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Delivered {
    Event(u32, u32),
    Nmi,
    Interrupt(u8),
}

/// The processor. `open` is RFLAGS.IF.
struct Fake {
    exit: ChildExit,
    /// What an exit cut short.
    cut: u32,
    open: bool,
    shadow: bool,
    delivered: Option<Delivered>,
    window: bool,
    nmi_window: bool,
    rip: u64,
    /// The last entry dropped translations.
    flushed: bool,
    xmm: [u64; 12],
}

impl Fake {
    fn new(exit: ChildExit) -> Self {
        Self {
            exit,
            cut: 0,
            open: true,
            shadow: false,
            delivered: None,
            window: false,
            nmi_window: false,
            rip: 0x1000,
            flushed: false,
            xmm: [0; 12],
        }
    }

    fn deliver(&mut self, what: Delivered) {
        assert_eq!(self.delivered, None, "two events at one entry: {what:?}");
        self.delivered = Some(what);
    }
}

impl ChildHardware for Fake {
    const KEEPS_POINTERS: bool = false;

    fn is_undisturbed(&self, _: &VpCore) -> bool {
        self.cut == 0
    }
    fn quick_exit(&mut self) -> Option<QuickExit> {
        None
    }
    fn is_port(&self) -> bool {
        matches!(self.exit, ChildExit::Io(_))
    }
    fn quick_port(&mut self) -> Option<IoAccess> {
        match self.exit {
            ChildExit::Io(access) if !access.string => Some(access),
            _ => None,
        }
    }
    fn quick_write(&mut self, core: &VpCore) -> Option<PortWrite> {
        let access = self.quick_port()?;
        (!access.is_in && !access.rep).then(|| PortWrite {
            port: access.port,
            size: access.size,
            length: access.length,
            value: self.eax(core),
        })
    }
    fn load(&mut self, core: &VpCore) {
        self.rip = core.state.rip;
    }
    fn load_general(&mut self, core: &VpCore) {
        self.load(core);
    }
    fn jump_quick(&mut self, _: &VpCore, rip: u64) -> bool {
        if !self.shadow {
            self.rip = rip;
        }
        !self.shadow
    }
    fn store_general(&self, core: &mut VpCore) {
        core.state.rip = self.rip;
        core.state.interrupt_shadow = self.shadow;
    }
    fn shown(&self, core: &VpCore) -> Shown {
        Shown::of(&core.state)
    }
    fn store(&mut self, core: &mut VpCore) {
        self.store_general(core);
    }
    fn peek(&mut self, _: &mut VpCore) {}
    fn xmm(&self) -> [u64; 12] {
        self.xmm
    }
    fn after_exit(&mut self, core: &mut VpCore) {
        core.requeue = (self.cut, 0);
        self.delivered = None;
        (self.window, self.nmi_window) = (false, false);
    }
    fn exit(&mut self, _: &mut VpCore) -> ChildExit {
        self.exit
    }
    fn instruction_length(&self) -> u64 {
        1
    }
    fn skip(&mut self, _: &mut VpCore, length: u64) {
        self.rip += length;
    }
    fn trap_step(&mut self, _: &mut VpCore) {}
    fn eax(&self, core: &VpCore) -> u32 {
        core.state.context.gprs[0] as u32
    }
    fn cr4_and_long(&self) -> (u64, bool) {
        (0, false)
    }
    fn is_kernel(&self) -> bool {
        true
    }
    fn skip_quick(&mut self, usual: u64) {
        self.rip += usual;
    }
    fn skip_port(&mut self) {
        self.rip += 1;
    }
    fn rax(&mut self, core: &mut VpCore, value: u64) {
        core.state.context.gprs[0] = value;
    }
    fn inject(&mut self, info: u32, error: u32) {
        self.deliver(Delivered::Event(info, error));
    }
    fn inject_nmi(&mut self, _: &mut VpCore) {
        self.deliver(Delivered::Nmi);
    }
    fn inject_interrupt(&mut self, vector: u8) {
        assert!(self.open && !self.shadow, "{vector:#x} with interrupts off");
        self.deliver(Delivered::Interrupt(vector));
    }
    fn exception(vector: u8, error: Option<u32>) -> (u32, u32) {
        (VALID | 3 << 8 | u32::from(vector), error.unwrap_or(0))
    }
    fn interrupts_open(&self, _: &VpCore) -> bool {
        self.open && !self.shadow
    }
    fn interrupt_flag(&self) -> bool {
        self.open
    }
    fn nmis_open(&self, core: &VpCore) -> bool {
        !core.state.nmi_masked && !self.shadow
    }
    fn end_nmi(&mut self, core: &mut VpCore) {
        core.state.nmi_masked = false;
    }
    fn request_window(&mut self) {
        self.window = true;
    }
    fn request_nmi_window(&mut self, _: &mut VpCore) {
        self.nmi_window = true;
    }
    fn before_entry(&mut self, _: &mut VpCore, flush: bool) {
        self.flushed = flush;
    }
    fn paging(&self) -> Paging {
        Paging {
            cr0: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
        }
    }
}

/// A partition with one VP that has message and run page, and the VP taken.
struct Bed {
    root: Root,
    id: u64,
    vp: &'static Vp,
    core: Option<Ownership<'static, VpCore>>,
}

impl Bed {
    fn new() -> Self {
        let mut root = Root::new(Vendor::Svm);
        let id = root.partition();
        for (page_type, page) in [
            (state_page::INTERCEPT_MESSAGE, MESSAGE),
            (state_page::RUN, RUN_PAGE),
        ] {
            let map = MapVpStatePage {
                partition_id: id,
                page_type,
                flags: 1,
                requested_map_location: page / PAGE,
                ..Default::default()
            };
            root.call(code::MAP_VP_STATE_PAGE, map)
                .expect("pages of the root");
        }
        let vp = find(id).expect("it lives").vp(0).expect("there is one");
        let mut core = vp.core.acquire().expect("nobody has it");
        core.state.explicit_suspend = false;
        // Software enabled: vectors other than NMI come through.
        let _ = core.apic.write(0xf0, 0x1ff, 0);
        let mut bed = Self {
            root,
            id,
            vp,
            core: Some(core),
        };
        // The registers of a new VP go into the processor.
        let entered = bed.run(Fake::new(ChildExit::Nop)).enter();
        assert!(matches!(entered, Next::Enter));
        bed
    }

    fn run(&mut self, fake: Fake) -> Run<'_, Fake> {
        Run {
            info: self.root.machine.info(),
            cpu: 0,
            vp: self.vp,
            core: self.core.as_mut().expect("until the end"),
            hardware: fake,
            first: false,
            deliverable: 0,
        }
    }

    /// An exit and what follows it.
    fn exit(&mut self, fake: Fake) -> (Option<DispatchEvent>, Fake) {
        let mut run = self.run(fake);
        let next = match run.after_exit() {
            Next::Enter => None,
            Next::Root(event) => {
                run.tell_deadline();
                Some(event)
            }
        };
        (next, run.hardware)
    }

    fn post(&self, mode: DeliveryMode, vector: u8) {
        post(
            self.vp,
            Interrupt {
                mode,
                vector,
                level: false,
            },
        );
    }

    fn core(&mut self) -> &mut VpCore {
        self.core.as_mut().expect("until the end")
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.core = None;
        if !std::thread::panicking() {
            self.root.bury(self.id);
        }
    }
}

fn out(port: u16) -> ChildExit {
    ChildExit::Io(IoAccess {
        port,
        size: 1,
        is_in: false,
        string: false,
        rep: false,
        segment: 0,
        length: 2,
    })
}

/// What a VMM stores that resets a VP: RIP, CS, CR0, EFER, and IA32_APIC_BASE with the bit of the boot processor.
fn reset_group() -> [RegisterAssoc; 5] {
    let code = [0xffff_0000, 0xffff | 0xf000 << 32 | 0x9b << 48];
    [
        (name::RIP, [0xfff0, 0]),
        (name::CS, code),
        (name::CR0, [0x6000_0010, 0]),
        (name::EFER, [0, 0]),
        (name::APIC_BASE, [0xfee0_0900, 0]),
    ]
    .map(|(name, value)| RegisterAssoc {
        name,
        value,
        ..Default::default()
    })
}

#[test]
fn nothing_of_a_guest_survives_the_reset_by_its_vmm() {
    let mut bed = Bed::new();
    let partition = find(bed.id).expect("it lives");
    {
        let state = &mut partition.inner.lock().state;
        (state.guest_os_id, state.hypercall, state.reference_tsc) = (1, 0x5001, 0x6001);
    }
    let core = bed.core();
    core.requeue = (VALID | 3 << 8 | 14, 0);
    core.iret = Some(0x1000);
    core.in_hardware = false;
    bed.core = None;
    let head = VpRegisters {
        partition_id: bed.id,
        ..Default::default()
    };
    let set = bed.root.reps(code::SET_VP_REGISTERS, head, &reset_group());
    assert_eq!(set, (HvStatus::SUCCESS, 5));
    bed.core = bed.vp.core.acquire();
    let entered = bed.run(Fake::new(ChildExit::Nop));
    assert_eq!((entered.core.requeue, entered.core.iret), ((0, 0), None));
    let state = partition.inner.lock().state;
    let seen = (state.guest_os_id, state.hypercall, state.reference_tsc);
    assert_eq!(seen, (0, 0, 0));
}

#[test]
fn interrupts_come_in_the_order_of_their_priority() {
    let mut bed = Bed::new();
    for vector in [0x31, 0x55, 0x42] {
        bed.post(DeliveryMode::Fixed, vector);
    }
    for vector in [0x55, 0x42, 0x31] {
        let (next, fake) = bed.exit(Fake::new(ChildExit::Nop));
        assert_eq!(
            (next, fake.delivered),
            (None, Some(Delivered::Interrupt(vector)))
        );
        // Those of lower priority wait for its end.
        let _ = bed.core().apic.eoi();
    }
    let (_, fake) = bed.exit(Fake::new(ChildExit::Nop));
    assert_eq!((fake.delivered, fake.window), (None, false));
}

#[test]
fn interrupt_waits_until_the_guest_takes_it() {
    let mut bed = Bed::new();
    bed.post(DeliveryMode::Fixed, 0x31);
    for (open, shadow) in [(false, false), (true, true)] {
        let mut fake = Fake::new(ChildExit::Nop);
        (fake.open, fake.shadow) = (open, shadow);
        let (next, fake) = bed.exit(fake);
        assert_eq!((next, fake.delivered, fake.window), (None, None, true));
    }
    let (_, fake) = bed.exit(Fake::new(ChildExit::Window));
    assert_eq!(fake.delivered, Some(Delivered::Interrupt(0x31)));
}

#[test]
fn what_an_exit_cut_short_comes_first_and_nothing_is_lost() {
    let mut bed = Bed::new();
    bed.post(DeliveryMode::Nmi, 0);
    bed.post(DeliveryMode::Fixed, 0x31);
    let mut fake = Fake::new(ChildExit::Nop);
    fake.cut = VALID | 3 << 8 | 14;
    let (_, fake) = bed.exit(fake);
    assert_eq!(
        fake.delivered,
        Some(Delivered::Event(VALID | 3 << 8 | 14, 0))
    );
    assert!(fake.window && fake.nmi_window);
    let (_, fake) = bed.exit(Fake::new(ChildExit::Window));
    assert_eq!(fake.delivered, Some(Delivered::Nmi));
    assert!(
        fake.window,
        "the interrupt behind the NMI waits for another exit"
    );
    let (_, fake) = bed.exit(Fake::new(ChildExit::Window));
    assert_eq!(fake.delivered, Some(Delivered::Interrupt(0x31)));
}

#[test]
fn halted_vp_sleeps_until_something_can_wake_it() {
    let mut bed = Bed::new();
    let (next, _) = bed.exit(Fake::new(ChildExit::Halt));
    assert_eq!(next, Some(DispatchEvent::Halted));
    // With interrupts off only an NMI does.
    let mut fake = Fake::new(ChildExit::Nop);
    fake.open = false;
    bed.post(DeliveryMode::Fixed, 0x31);
    let mut run = bed.run(fake);
    assert!(matches!(run.enter(), Next::Root(DispatchEvent::Halted)));
    bed.post(DeliveryMode::Nmi, 0);
    let mut fake = Fake::new(ChildExit::Nop);
    fake.open = false;
    let mut run = bed.run(fake);
    assert!(matches!(run.enter(), Next::Enter));
    assert_eq!(run.hardware.delivered, Some(Delivered::Nmi));
    assert!(!bed.core().state.halt_suspend);
}

#[test]
fn exception_does_not_lose_the_interrupt_that_it_cut_short() {
    const PAGE_FAULT: u32 = VALID | 3 << 8 | 14;
    let mut bed = Bed::new();
    for (cut, first) in [
        (VALID | 0x31, VALID | 0x31),
        (VALID | 2 << 8 | 2, VALID | 2 << 8 | 2),
        (PAGE_FAULT, VALID | 3 << 8 | 1),
        (0, VALID | 3 << 8 | 1),
    ] {
        let mut fake = Fake::new(ChildExit::Exception {
            info: VALID | 3 << 8 | 1,
            error: 0,
        });
        fake.cut = cut;
        let (next, _) = bed.exit(fake);
        assert_eq!(next, Some(DispatchEvent::Interrupt));
        let mut run = bed.run(Fake::new(ChildExit::Nop));
        assert!(matches!(run.enter(), Next::Enter));
        assert_eq!(
            run.hardware.delivered,
            Some(Delivered::Event(first, 0)),
            "{cut:#x}"
        );
    }
}

#[test]
fn machine_check_is_the_roots_and_changes_nothing() {
    let mut bed = Bed::new();
    let mut fake = Fake::new(ChildExit::MachineCheck);
    fake.cut = VALID | 0x31;
    let (next, fake) = bed.exit(fake);
    assert_eq!(next, Some(DispatchEvent::MachineCheck));
    assert_eq!(fake.rip, 0x1000);
    let mut run = bed.run(fake);
    run.hardware.exit = ChildExit::Nop;
    assert!(matches!(run.enter(), Next::Enter));
    assert_eq!(
        run.hardware.delivered,
        Some(Delivered::Event(VALID | 0x31, 0))
    );
}

#[test]
fn triple_fault_is_reported_at_each_run() {
    let mut bed = Bed::new();
    let (next, _) = bed.exit(Fake::new(ChildExit::TripleFault));
    assert_eq!(next, Some(DispatchEvent::Intercept));
    assert_eq!(get::<u32>(MESSAGE), message::UNRECOVERABLE_EXCEPTION);
    put(MESSAGE, 0u32);
    let mut run = bed.run(Fake::new(ChildExit::Nop));
    assert!(matches!(run.enter(), Next::Root(DispatchEvent::Intercept)));
    assert_eq!(get::<u32>(MESSAGE), message::UNRECOVERABLE_EXCEPTION);
}

#[test]
fn write_to_a_port_leaves_a_message_only_if_nobody_completes_it() {
    let mut bed = Bed::new();
    put(MESSAGE, 0u32);
    // The root may have a doorbell there.
    bed.core().ports = PortSet::default().with(0x80);
    let (next, fake) = bed.exit(Fake::new(out(0x80)));
    assert_eq!(next, Some(DispatchEvent::PortWrite));
    assert_eq!(get::<u32>(MESSAGE), message::NONE);
    // It has: the VP goes on behind the instruction.
    let mut run = bed.run(fake);
    assert!(
        !run.resume_quickly(2),
        "an exit that was not quick needs a whole entry"
    );
    run.skip_by(2);
    assert!(matches!(run.enter(), Next::Enter));
    assert_eq!(run.hardware.rip, 0x1002);
    // It has not.
    let (_, mut fake) = bed.exit(Fake::new(out(0x80)));
    fake.store(bed.core());
    let shown = fake.shown(bed.core());
    show(0, bed.core(), &shown);
    assert_eq!(get::<u32>(MESSAGE), message::IO_PORT_INTERCEPT);
    assert_eq!(bed.core().state.rip, 0x1000);
    // No doorbell can be there.
    let (next, _) = bed.exit(Fake::new(out(0x81)));
    assert_eq!(next, Some(DispatchEvent::Message));
}

#[test]
fn quiet_vp_goes_on_without_a_whole_entry() {
    let mut bed = Bed::new();
    bed.core().ports = PortSet::default().with(0x80);
    // One whole entry, after which nothing waits.
    let (_, fake) = bed.exit(Fake::new(ChildExit::Nop));
    let mut run = bed.run(fake);
    run.hardware.exit = out(0x80);
    assert!(run.is_simple());
    assert_eq!(run.leave_quickly(), Some(DispatchEvent::PortWrite));
    assert!(run.resume_quickly(2));
    // Behind both instructions.
    assert_eq!(run.hardware.rip, 0x1003);
    assert!(!run.resume_quickly(2), "it left once");
    // Something came meanwhile: it has to be delivered.
    assert_eq!(run.leave_quickly(), Some(DispatchEvent::PortWrite));
    bed.post(DeliveryMode::Fixed, 0x31);
    let mut run = bed.run(Fake::new(out(0x80)));
    assert!(!run.resume_quickly(2));
    assert!(!run.is_simple());
}

#[test]
fn vp_goes_on_where_the_register_page_says() {
    const REGISTERS: u64 = KEPT + 2 * PAGE;
    let mut bed = Bed::new();
    bed.core().pages[0] = REGISTERS;
    let rip = REGISTERS + offset_of!(RegisterPage, rip) as u64;
    let dirty = REGISTERS + offset_of!(RegisterPage, dirty) as u64;
    for (shadow, target) in [(false, 0x2000), (true, 0x3000)] {
        let (_, mut fake) = bed.exit(Fake::new(ChildExit::Nop));
        fake.shadow = shadow;
        put(rip, target);
        put(dirty, register_page::dirty::IP);
        let mut run = bed.run(fake);
        run.core.left_quickly = true;
        let goes_on = run.resume_quickly(0);
        assert_eq!(goes_on, !shadow, "what blocks interrupts may not stay");
        if shadow {
            assert_eq!(run.core.state.rip, target);
        } else {
            assert_eq!(run.hardware.rip, target);
        }
        assert_eq!(get::<u32>(dirty), 0);
    }
}

#[test]
fn vp_pauses_with_a_write_that_the_root_completes_and_nothing_else() {
    let mut bed = Bed::new();
    let set = PortSet::default().with(0x80);
    bed.core().ports = set;
    let (_, fake) = bed.exit(Fake::new(ChildExit::Nop));
    let mut run = bed.run(fake);
    run.hardware.exit = out(0x80);
    assert_eq!(run.pause_quickly(), None, "the root did not offer it");
    run.core.pauses = set;
    let value = run.pause_quickly().expect("pauses");
    let write = PortWrite::from_value(value).expect("a write");
    assert_eq!((write.port, write.size, write.length), (0x80, 1, 2));
    run.hardware.exit = out(0x81);
    assert_eq!(run.pause_quickly(), None, "another port");
    run.hardware.exit = out(0x80);
    run.hardware.cut = VALID;
    assert_eq!(run.pause_quickly(), None, "an event is due");
    run.hardware.cut = 0;
    run.core.quiet = false;
    assert_eq!(
        run.pause_quickly(),
        None,
        "an event may have been delivered"
    );
    // The end of a pause: as if it had left with the write.
    run.core.quiet = true;
    run.core.paused_with = value;
    run.end_pause();
    assert_eq!(ChildExit::Io(run.core.port.expect("a port")), out(0x80));
    assert!(run.resume_quickly(2));
    // What came from outside is seen only when it goes on.
    bed.post(DeliveryMode::Fixed, 0x31);
    let mut run = bed.run(Fake::new(out(0x80)));
    assert_eq!(run.pause_quickly(), Some(value));
    assert!(!run.is_quiet());
}

#[test]
fn root_hears_of_deadline_and_exits() {
    let mut bed = Bed::new();
    // The timer's vector, one-shot, and a count.
    let now = bed.run(Fake::new(ChildExit::Nop)).now();
    for (offset, value) in [(0x320, 0x41), (0x3e0, 0xb), (0x380, 1_000_000)] {
        let _ = bed.core().apic.write(offset, value, now);
    }
    let (next, _) = bed.exit(Fake::new(ChildExit::Halt));
    assert_eq!(next, Some(DispatchEvent::Halted));
    // SAFETY: the page was mapped as the run page and consists of atomics.
    let page = unsafe { &*hv_image::arch::host::memory(RUN_PAGE).cast::<VpRunPage>() };
    let deadline = page.deadline.load(std::sync::atomic::Ordering::Relaxed);
    // 200 MHz against 1 GHz.
    let guest = deadline.wrapping_add(bed.core().state.tsc_offset);
    assert!(
        (now + 5_000_000..now + 5_000_100).contains(&guest),
        "{guest} {now}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever comes in whatever state, it is delivered once, at the latest when the guest takes all; and while it waits, a window
    /// is asked for.
    #[test]
    fn every_event_is_delivered_once(
        steps in prop::collection::vec((any::<[bool; 3]>(), 0u8..6, 0x20u8..0xff), 1..40),
    ) {
        let mut bed = Bed::new();
        let mut posted = std::collections::BTreeSet::new();
        let mut delivered = Vec::new();
        let mut nmi = (0, 0);
        for ([open, shadow, masked], what, vector) in steps {
            match what {
                0..=2 => {
                    // Once more while it waits is the same.
                    posted.insert(vector);
                    bed.post(DeliveryMode::Fixed, vector);
                }
                3 if nmi.0 == nmi.1 => {
                    nmi.0 += 1;
                    bed.post(DeliveryMode::Nmi, 0);
                }
                _ => {}
            }
            let mut fake = Fake::new(ChildExit::Nop);
            (fake.open, fake.shadow) = (open, shadow);
            // A handler may run already.
            bed.core().state.nmi_masked = masked;
            let (next, fake) = bed.exit(fake);
            prop_assert_eq!(next, None);
            // What has a lower priority than one that is in service comes with the end of that one, which exits.
            let waits = bed.core().apic.pending();
            prop_assert!(fake.window || waits.vector.is_none(), "nobody comes back for {:x?}", posted);
            prop_assert_eq!(fake.nmi_window, waits.nmi);
            match fake.delivered {
                Some(Delivered::Interrupt(vector)) => {
                    prop_assert!(posted.remove(&vector), "{:#x} came twice", vector);
                    delivered.push(vector);
                    let _ = bed.core().apic.eoi();
                }
                Some(Delivered::Nmi) => {
                    prop_assert!(!masked);
                    nmi.1 += 1;
                }
                _ => {}
            }
        }
        bed.core().state.nmi_masked = false;
        for _ in 0..posted.len() + 1 {
            let (_, fake) = bed.exit(Fake::new(ChildExit::Window));
            match fake.delivered {
                Some(Delivered::Interrupt(vector)) => {
                    prop_assert!(posted.remove(&vector));
                    let _ = bed.core().apic.eoi();
                }
                Some(Delivered::Nmi) => nmi.1 += 1,
                _ => {}
            }
        }
        prop_assert!(posted.is_empty() && nmi.0 == nmi.1, "{:x?} {:?}", posted, nmi);
    }
}

const GUEST_OS_ID: u32 = 0x4000_0000;
const HYPERCALL: u32 = 0x4000_0001;
const REFERENCE_TSC: u32 = 0x4000_0021;
const SCONTROL: u32 = 0x4000_0080;
const SIMP: u32 = 0x4000_0083;
const EOM: u32 = 0x4000_0084;
const SINT2: u32 = 0x4000_0092;
const SINT3: u32 = 0x4000_0093;
const STIMER0_CONFIG: u32 = 0x4000_00b0;
const STIMER0_COUNT: u32 = 0x4000_00b1;
/// Guest memory for the SynIC, and where it is.
const SLOTS_GPA: u64 = 0x5000;
const SLOTS: u64 = KEPT + 4 * PAGE;
const SLOT2: u64 = SLOTS + 2 * 256;

impl Bed {
    /// With a SynIC, and memory for it.
    fn with_synic() -> Self {
        let mut bed = Self::new();
        let id = bed.id;
        bed.map(SLOTS_GPA, SLOTS);
        let partition = find(id).expect("it lives");
        partition.inner.lock().state.synthetic_features = synthetic::ASSIGNABLE;
        bed
    }

    /// What the image wants to reach, as the root takes it.
    fn missing(&self) -> u64 {
        let at = RUN_PAGE + offset_of!(VpRunPage, missing) as u64;
        let wanted = get(at);
        put(at, 0_u64);
        wanted
    }

    /// The root cannot map that.
    fn refuse(&self, wanted: u64) {
        let _ = self.missing();
        put(RUN_PAGE + offset_of!(VpRunPage, refused) as u64, wanted);
    }

    fn map(&mut self, gpa: u64, spa: u64) {
        let id = self.id;
        self.root
            .with_deposits(id, |root| root.map(id, gpa, spa, 3));
    }

    fn unmap(&self, gpa: u64) {
        let partition = find(self.id).expect("it lives");
        partition
            .unmap(gpa, PageSize::Size4K)
            .expect("it is mapped");
    }

    /// The VP is dispatched again.
    fn enter(&mut self) -> (Option<DispatchEvent>, Option<Delivered>) {
        let mut run = self.run(Fake::new(ChildExit::Nop));
        let next = match run.enter() {
            Next::Enter => None,
            Next::Root(event) => Some(event),
        };
        (next, run.hardware.delivered)
    }

    fn wrmsr(&mut self, number: u32, value: u64) -> (Option<DispatchEvent>, Option<Delivered>) {
        let gprs = &mut self.core().state.context.gprs;
        (gprs[0], gprs[1], gprs[2]) = (value & 0xffff_ffff, number.into(), value >> 32);
        let (next, fake) = self.exit(Fake::new(ChildExit::MsrWrite));
        (next, fake.delivered)
    }

    /// The VMM posts a message with this value to source 2.
    fn message(&self, value: u64) -> Result<(), HvStatus> {
        let mut input = [0_u32; 70];
        let head = [self.id as u32, (self.id >> 32) as u32, 0, 0, 2, 1, 8];
        input[..7].copy_from_slice(&head);
        input[9] = value as u32;
        self.root.call(code::POST_MESSAGE_DIRECT, input)
    }

    fn signal(&self, vp: u32, target_sint: u8, flag_number: u16) -> Result<u64, HvStatus> {
        let input = SignalEventDirect {
            target_partition: self.id,
            target_vp: vp,
            target_sint,
            flag_number,
            ..Default::default()
        };
        self.root.call(code::SIGNAL_EVENT_DIRECT, input)?;
        Ok(get(OUTPUT))
    }
}

#[test]
fn messages_wait_for_the_guest() {
    let mut bed = Bed::with_synic();
    put(SLOTS, [u64::MAX; 512]);
    assert_eq!(bed.message(1), Ok(()));
    assert_eq!(bed.message(2), Err(HvStatus::INSUFFICIENT_BUFFERS));
    assert_eq!(bed.wrmsr(SIMP, SLOTS_GPA | 1), (None, None));
    assert_eq!(bytes(SLOTS), [0; 4096], "the page is empty at first");
    assert_eq!(bed.wrmsr(SCONTROL, 1), (None, None));
    let second = Some(Delivered::Interrupt(0x40));
    assert_eq!(bed.wrmsr(SINT2, 0x40), (None, second));
    assert_eq!(get::<[u64; 3]>(SLOT2), [1 | 8 << 32, 0, 1]);
    // The slot is full now: it says that there is more.
    assert_eq!(bed.message(2), Ok(()));
    assert_eq!(get::<u64>(SLOT2), 1 | 8 << 32 | 1 << 40);
    assert_eq!(bed.message(3), Err(HvStatus::INSUFFICIENT_BUFFERS));
    let _ = bed.core().apic.eoi();
    put(SLOT2, 0_u64);
    assert_eq!(bed.wrmsr(EOM, 0), (None, second));
    assert_eq!(get::<[u64; 3]>(SLOT2), [1 | 8 << 32, 0, 2]);
}

#[test]
fn vmm_is_told_when_a_source_can_take_a_message() {
    let mut bed = Bed::with_synic();
    assert_eq!(bed.message(1), Ok(()));
    bed.vp.synic.lock().want(1 << 2);
    let _ = (bed.wrmsr(SIMP, SLOTS_GPA | 1), bed.wrmsr(SCONTROL, 1));
    let (next, _) = bed.wrmsr(SINT2, 0x40);
    assert_eq!(next, Some(DispatchEvent::Intercept));
    assert_eq!(get::<u32>(MESSAGE), 0x8000_0062);
    assert_eq!(get::<u16>(MESSAGE + 16 + 40), 1 << 2);
    let (next, fake) = bed.exit(Fake::new(ChildExit::Nop));
    assert_eq!(
        (next, fake.delivered),
        (None, Some(Delivered::Interrupt(0x40)))
    );
}

#[test]
fn calls_to_the_synic_are_checked() {
    let bed = Bed::with_synic();
    let bad = Err(HvStatus::INVALID_PARAMETER);
    assert_eq!(bed.signal(1, 0, 0), Err(HvStatus::INVALID_VP_INDEX));
    assert_eq!(bed.signal(0, 16, 0), bad);
    assert_eq!(bed.signal(0, 0, 2048), bad);
    assert_eq!(bed.signal(0, 15, 2047), Ok(1));
    assert_eq!(bed.signal(0, 15, 2047), Ok(0));
    for (word, value) in [(3, 1), (4, 16), (6, 241)] {
        let mut input = [0_u32; 70];
        input[..7].copy_from_slice(&[bed.id as u32, (bed.id >> 32) as u32, 0, 0, 2, 1, 8]);
        input[word] = value;
        assert_eq!(
            bed.root.call(code::POST_MESSAGE_DIRECT, input),
            Err(HvStatus::INVALID_PARAMETER)
        );
    }
}

#[test]
fn synic_that_the_partition_lacks_faults() {
    let mut bed = Bed::with_synic();
    let partition = find(bed.id).expect("it lives");
    let lacks = synthetic::SYNIC | synthetic::SYNTHETIC_TIMERS;
    partition.inner.lock().state.synthetic_features = synthetic::ASSIGNABLE & !lacks;
    for number in [SIMP, SINT2, STIMER0_CONFIG] {
        let fault = Delivered::Event(VALID | 3 << 8 | 13, 0);
        assert_eq!(bed.wrmsr(number, 0x30), (None, Some(fault)));
    }
}

#[test]
fn source_without_memory_keeps_what_it_gets() {
    let mut bed = Bed::with_synic();
    assert_eq!(bed.wrmsr(SIMP, 0x9001), (MISSING, None));
    bed.refuse(0x9003);
    assert_eq!(bed.enter(), (None, None));
    for (number, value) in [(SCONTROL, 1), (SINT2, 0x40)] {
        assert_eq!(bed.wrmsr(number, value), (None, None));
    }
    assert_eq!(bed.message(7), Ok(()));
    assert_eq!(bed.enter(), (MISSING, None));
    bed.refuse(0x9003);
    assert_eq!(bed.enter(), (None, None));
    let vector = Some(Delivered::Interrupt(0x40));
    assert_eq!(bed.wrmsr(SIMP, SLOTS_GPA | 1), (None, vector));
    assert_eq!(get::<u64>(SLOT2 + 16), 7);
}

#[test]
fn page_that_is_away_gets_what_came_meanwhile() {
    let mut bed = Bed::with_synic();
    let _ = (bed.wrmsr(SIMP, SLOTS_GPA | 1), bed.wrmsr(SCONTROL, 1));
    assert_eq!(bed.wrmsr(SINT2, 0x40), (None, None));
    bed.unmap(SLOTS_GPA);
    assert_eq!(bed.message(7), Ok(()));
    let signal = RUN_PAGE + offset_of!(VpRunPage, signal) as u64;
    assert_eq!(get::<u32>(signal), 1, "a VP that sleeps would not ask");
    for _ in 0..2 {
        // Until the root did something, also if it was interrupted.
        assert_eq!(bed.enter(), (MISSING, None));
        assert_eq!(bed.missing(), SLOTS_GPA | 3);
    }
    bed.map(SLOTS_GPA, SLOTS);
    let vector = Some(Delivered::Interrupt(0x40));
    assert_eq!(bed.enter(), (None, vector));
    assert_eq!(get::<u64>(SLOT2 + 16), 7);
}

#[test]
fn pages_that_the_guest_asks_for_are_written_when_they_come() {
    let mut bed = Bed::with_synic();
    let _ = bed.wrmsr(GUEST_OS_ID, 1);
    for (number, value) in [(HYPERCALL, 1), (REFERENCE_TSC, 1), (SIMP, 1)] {
        bed.unmap(SLOTS_GPA);
        put(SLOTS, [!0_u64; 512]);
        assert_eq!(bed.wrmsr(number, SLOTS_GPA | value), (MISSING, None));
        assert_eq!(bed.missing(), SLOTS_GPA | 3, "{number:#x}");
        bed.map(SLOTS_GPA, SLOTS);
        assert_eq!(bed.enter(), (None, None));
        let words: [u64; 512] = get(SLOTS);
        let right = match number {
            HYPERCALL => words[0] & 0xff_ffff == 0xd9_010f,
            REFERENCE_TSC => (1..9).contains(&words[0]) && words[511] == 0,
            _ => words == [0; 512],
        };
        assert!(right, "{number:#x}: {:x?}", &words[..4]);
        assert_eq!(bed.wrmsr(number, 0), (None, None));
        // Once.
        put(SLOTS, [!0_u64; 512]);
        assert_eq!(bed.enter(), (None, None));
        assert_eq!(get::<[u64; 512]>(SLOTS), [!0; 512]);
    }
}

#[test]
fn reference_page_follows_the_root_also_when_it_is_away() {
    let mut bed = Bed::with_synic();
    let _ = bed.wrmsr(REFERENCE_TSC, SLOTS_GPA | 1);
    let old: [u64; 3] = get(SLOTS);
    bed.unmap(SLOTS_GPA);
    let partition_id = bed.id;
    let set = SetPartitionProperty {
        partition_id,
        property_code: property::REFERENCE_TIME,
        value: 1 << 40,
        ..Default::default()
    };
    bed.root
        .call(code::SET_PARTITION_PROPERTY, set)
        .expect("it is a time");
    assert_eq!(bed.enter(), (MISSING, None));
    bed.map(SLOTS_GPA, SLOTS);
    assert_eq!(bed.enter(), (None, None));
    let new: [u64; 3] = get(SLOTS);
    assert!(new[0] > old[0], "{old:x?}, then {new:x?}");
}

#[test]
fn state_of_a_page_that_is_away_waits_for_it() {
    let mut bed = Bed::with_synic();
    let _ = (bed.wrmsr(SIMP, SLOTS_GPA | 1), bed.wrmsr(SCONTROL, 1));
    put(SLOT2 + 16, 7_u64);
    bed.unmap(SLOTS_GPA);
    let (id, buffer) = (bed.id, KEPT + 2 * PAGE);
    bed.core = None;
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Input(VpState, u64);
    let head = VpState {
        partition_id: id,
        state_type: vp_state::SIM_PAGE,
        ..Default::default()
    };
    let call = |bed: &Bed, number| {
        let done = bed.root.call(number, Input(head, buffer / PAGE));
        (done, bed.missing())
    };
    put(buffer, [0_u64; 512]);
    let asks = (Ok(()), SLOTS_GPA | 3);
    assert_eq!(call(&bed, code::GET_VP_STATE), asks);
    bed.map(SLOTS_GPA, SLOTS);
    assert_eq!(call(&bed, code::GET_VP_STATE), (Ok(()), 0));
    let value = buffer + 2 * 256 + 16;
    assert_eq!(get::<u64>(value), 7);
    put(value, 8_u64);
    bed.unmap(SLOTS_GPA);
    assert_eq!(call(&bed, code::SET_VP_STATE), asks);
    bed.map(SLOTS_GPA, SLOTS);
    assert_eq!(call(&bed, code::SET_VP_STATE), (Ok(()), 0));
    assert_eq!(get::<u64>(SLOT2 + 16), 8);
}

#[test]
fn interrupt_that_ends_itself_is_not_in_service() {
    let mut bed = Bed::with_synic();
    let _ = (bed.wrmsr(SIMP, SLOTS_GPA | 1), bed.wrmsr(SCONTROL, 1));
    assert_eq!(bed.wrmsr(SINT2, 0x40 | 1 << 17), (None, None));
    for value in 1..4 {
        assert_eq!(bed.message(value), Ok(()));
        let (_, fake) = bed.exit(Fake::new(ChildExit::Nop));
        assert_eq!(fake.delivered, Some(Delivered::Interrupt(0x40)));
        put(SLOT2, 0_u64);
    }
}

#[test]
fn timers_raise_interrupts_and_send_messages() {
    let mut bed = Bed::with_synic();
    let _ = (bed.wrmsr(SIMP, SLOTS_GPA | 1), bed.wrmsr(SCONTROL, 1));
    // Direct, enabled by its count, which has passed.
    assert_eq!(bed.wrmsr(STIMER0_CONFIG, 0xed << 4 | 0x1008), (None, None));
    let direct = Some(Delivered::Interrupt(0xed));
    assert_eq!(bed.wrmsr(STIMER0_COUNT, 1), (None, direct));
    let _ = bed.core().apic.eoi();
    let (_, fake) = bed.exit(Fake::new(ChildExit::Nop));
    assert_eq!(fake.delivered, None, "it is no periodic one");
    // Timer 1 for source 3, which is full: its message comes when it is free.
    put(SLOTS + 3 * 256, 1_u64);
    assert_eq!(bed.wrmsr(SINT3, 0x41), (None, None));
    assert_eq!(bed.wrmsr(STIMER0_CONFIG + 2, 3 << 16 | 8), (None, None));
    assert_eq!(bed.wrmsr(STIMER0_COUNT + 2, 1), (None, None));
    put(SLOTS + 3 * 256, 0_u64);
    let message = Some(Delivered::Interrupt(0x41));
    assert_eq!(bed.wrmsr(EOM, 0), (None, message));
    let [first, _, index, at, ..] = get::<[u64; 5]>(SLOTS + 3 * 256);
    assert_eq!((first, index, at), (0x18_8000_0010, 1, 1));
}

#[test]
fn root_learns_when_a_timer_expires() {
    let mut bed = Bed::with_synic();
    let deadline = || get::<u64>(RUN_PAGE + offset_of!(VpRunPage, deadline) as u64);
    assert_eq!(bed.wrmsr(STIMER0_CONFIG, 0xed << 4 | 0x1008), (None, None));
    // 100 s, in ticks of 1 GHz.
    let time = 1_000_000_000;
    let (next, _) = bed.wrmsr(STIMER0_COUNT, time);
    assert_eq!(next, Some(DispatchEvent::Deadline));
    let base = {
        let partition = find(bed.id).expect("it lives");
        let base = partition.inner.lock().state.reference_base;
        base
    };
    let expected = base + time * 100;
    assert!((expected..expected + 200).contains(&deadline()));
    // Once told, it goes on.
    let (next, _) = bed.exit(Fake::new(ChildExit::Nop));
    assert_eq!(next, None);
}

const FLUSH: u64 = 0x2;
const SEND_IPI: u64 = 0xb;
const FAST: u64 = 1 << 16;
const GUEST_IDLE: u32 = 0x4000_00f0;

impl Bed {
    /// With an identity and 64-bit code, so that it can make hypercalls.
    fn that_calls() -> Self {
        let mut bed = Self::with_synic();
        let partition = find(bed.id).expect("it lives");
        partition.inner.lock().state.guest_os_id = 1;
        let state = &mut bed.core().state;
        state.cr0 |= 1;
        state.efer = 1 << 10;
        state.segments[1].rights |= 1 << 13;
        bed
    }

    fn call(&mut self, control: u64, first: u64, second: u64) -> (Option<DispatchEvent>, Fake) {
        let gprs = &mut self.core().state.context.gprs;
        (gprs[1], gprs[2], gprs[8]) = (control, first, second);
        self.exit(Fake::new(ChildExit::Hypercall))
    }

    fn rax(&mut self) -> u64 {
        self.core().state.context.gprs[0]
    }

    /// Makes another VP and takes it.
    fn other(&mut self) -> (&'static Vp, Ownership<'static, VpCore>) {
        let id = self.id;
        self.root
            .with_deposits(id, |root| root.call(code::CREATE_VP, vp(id, 1)));
        let other = find(id).expect("it lives").vp(1).expect("there is one");
        let mut core = other.core.acquire().expect("nobody has it");
        core.state.startup_suspend = false;
        let _ = core.apic.write(0xf0, 0x1ff, 0);
        (other, core)
    }

    fn run_of<'a>(&'a self, vp: &'static Vp, core: &'a mut VpCore) -> Run<'a, Fake> {
        Run {
            info: self.root.machine.info(),
            cpu: 1,
            vp,
            core,
            hardware: Fake::new(ChildExit::Nop),
            first: false,
            deliverable: 0,
        }
    }

    /// An exit of another VP without an effect, and its entry.
    fn pass(&self, vp: &'static Vp, core: &mut VpCore) -> Fake {
        let mut run = self.run_of(vp, core);
        assert!(matches!(run.after_exit(), Next::Enter));
        run.hardware
    }
}

#[test]
fn flush_waits_for_vps_that_run() {
    let mut bed = Bed::that_calls();
    let (other, mut core) = bed.other();
    let _ = bed.pass(other, &mut core);
    assert!(!bed.pass(other, &mut core).flushed);
    let (next, _) = bed.call(FLUSH, SLOTS_GPA, 0);
    assert_eq!((next, bed.rax()), (None, 0), "the set was empty");
    put(SLOTS, [0_u64, 0, 0b11]);
    let (next, _) = bed.call(FLUSH, SLOTS_GPA, 0);
    assert_eq!((next, bed.rax()), (Some(DispatchEvent::Signal), 0));
    let again = bed.run(Fake::new(ChildExit::Nop)).enter();
    assert!(matches!(again, Next::Root(DispatchEvent::Signal)));
    assert!(bed.pass(other, &mut core).flushed);
    let mut run = bed.run(Fake::new(ChildExit::Nop));
    run.first = true;
    assert!(matches!(run.enter(), Next::Enter));
    assert!(run.hardware.flushed);
    assert!(!bed.pass(other, &mut core).flushed);
}

#[test]
fn flush_of_a_vp_that_does_not_run_comes_at_its_entry() {
    let mut bed = Bed::that_calls();
    let (other, mut core) = bed.other();
    let _ = bed.pass(other, &mut core);
    drop(core);
    put(SLOTS, [0_u64, 1, 0]);
    let (next, fake) = bed.call(FLUSH, SLOTS_GPA, 0);
    assert_eq!((next, bed.rax(), fake.flushed), (None, 0, true));
    let mut core = other.core.acquire().expect("nobody has it");
    assert!(bed.pass(other, &mut core).flushed);
}

#[test]
fn flush_does_not_wait_for_a_paused_vp_which_sees_it_before_it_runs() {
    let mut bed = Bed::that_calls();
    let (other, mut core) = bed.other();
    let _ = bed.pass(other, &mut core);
    core.put_aside();
    put(SLOTS, [0_u64, 1, 0]);
    let (next, _) = bed.call(FLUSH, SLOTS_GPA, 0);
    assert_eq!((next, bed.rax()), (None, 0));
    assert!(other.core.acquire().is_none(), "it stays its CPU's");
    // SAFETY: this thread put it aside, and takes it up once.
    let mut core = unsafe { other.core.take_up() };
    assert!(!bed.run_of(other, &mut core).is_untouched());
    assert!(bed.pass(other, &mut core).flushed);
    assert!(bed.run_of(other, &mut core).is_untouched());
    // In use again, it is waited for.
    let (next, _) = bed.call(FLUSH, SLOTS_GPA, 0);
    assert_eq!(next, Some(DispatchEvent::Signal));
}

#[test]
fn interrupt_goes_to_all_of_a_set() {
    let mut bed = Bed::that_calls();
    let (other, mut core) = bed.other();
    let _ = bed.pass(other, &mut core);
    let (next, _) = bed.call(SEND_IPI | FAST, 0x51, 0b11);
    assert_eq!((next, bed.rax()), (Some(DispatchEvent::Signal), 0));
    let vector = Some(Delivered::Interrupt(0x51));
    assert_eq!(bed.pass(other, &mut core).delivered, vector);
    let (_, fake) = bed.exit(Fake::new(ChildExit::Nop));
    assert_eq!(fake.delivered, vector);
    let (next, _) = bed.call(SEND_IPI | FAST, 5, 0b11);
    let status = HvStatus::INVALID_PARAMETER.0.into();
    assert_eq!((next, bed.rax()), (None, status));
}

#[test]
fn call_without_input_is_the_vmms_to_see() {
    let mut bed = Bed::that_calls();
    // First the instruction is looked for.
    let (next, _) = bed.call(FLUSH, 0x9000, 0);
    assert_eq!(next, MISSING);
    let code = bed.missing();
    assert_eq!(code & 0xfff, 2, "{code:#x}");
    bed.refuse(code);
    let (next, fake) = bed.call(FLUSH, 0x9000, 0);
    assert_eq!((next, fake.rip), (Some(DispatchEvent::Intercept), 0x1000));
    assert_eq!(get::<u32>(MESSAGE), 0x8000_0000);
    let (next, fake) = bed.call(FLUSH, SLOTS_GPA + 4, 0);
    let status = HvStatus::INVALID_ALIGNMENT.0.into();
    assert_eq!((next, bed.rax(), fake.rip), (None, status, 0x1001));
    // The input ends at the end of its page.
    let (next, _) = bed.call(FLUSH, SLOTS_GPA + 4096 - 16, 0);
    let status = HvStatus::INVALID_HYPERCALL_INPUT.0.into();
    assert_eq!((next, bed.rax()), (None, status));
}

#[test]
fn idle_guest_wakes_with_interrupts_off() {
    let mut bed = Bed::with_synic();
    bed.core().state.context.gprs[1] = GUEST_IDLE.into();
    let (next, fake) = bed.exit(Fake::new(ChildExit::MsrRead));
    assert_eq!((next, fake.rip), (Some(DispatchEvent::Halted), 0x1001));
    bed.post(DeliveryMode::Fixed, 0x31);
    let mut run = bed.run(Fake::new(ChildExit::Nop));
    run.hardware.open = false;
    assert!(matches!(run.enter(), Next::Enter));
    assert_eq!(run.hardware.delivered, None);
    // HLT is another matter.
    let mut fake = Fake::new(ChildExit::Halt);
    fake.open = false;
    let (next, _) = bed.exit(fake);
    assert_eq!(next, Some(DispatchEvent::Halted));
}

const POST_MESSAGE: u64 = 0x5c;
const SIGNAL_EVENT: u64 = 0x5d;

#[test]
fn posted_message_reaches_the_root() {
    let mut bed = Bed::that_calls();
    // Connection 7, type 1, 13 bytes.
    put(SLOTS, [7_u64, 13 << 32 | 1, 0x1111, 0x2222, 0x3333]);
    let (next, fake) = bed.call(POST_MESSAGE, SLOTS_GPA, 0);
    let status = (next, bed.rax(), fake.rip);
    assert_eq!(status, (Some(DispatchEvent::PostMessage), 0, 0x1001));
    let message = get::<[u64; 5]>(MESSAGE);
    assert_eq!(message, [7, 13 << 32 | 1, 0x1111, 0x2222, 0x3333]);
    // It does not fit into registers.
    let (next, _) = bed.call(POST_MESSAGE | FAST, 7, 240 << 32 | 1);
    let status = HvStatus::INVALID_HYPERCALL_INPUT.0.into();
    assert_eq!((next, bed.rax()), (None, status));
}

#[test]
fn signalled_event_reaches_the_root_which_may_refuse() {
    let mut bed = Bed::that_calls();
    let (next, fake) = bed.call(SIGNAL_EVENT | FAST, 5 << 32 | 0x1234, 0);
    let status = (next, bed.rax(), fake.rip);
    assert_eq!(status, (Some(DispatchEvent::SignalEvent), 0, 0x1001));
    let event = bed.core().event;
    assert_eq!((event.connection, event.flag), (0x1234, 5));
    let value = bed
        .run(Fake::new(ChildExit::Nop))
        .event_value(DispatchEvent::SignalEvent);
    assert_eq!(EventSignal::from_value(value), Some(event));
    fail(&mut bed.core().state, HvStatus::INVALID_CONNECTION_ID);
    assert_eq!(bed.rax(), 0x12);
    // A 32-bit caller has its result in EDX:EAX.
    let state = &mut bed.core().state;
    state.efer = 0;
    state.context.gprs[2] = 99;
    fail(state, HvStatus::INSUFFICIENT_BUFFERS);
    assert_eq!((state.context.gprs[0], state.context.gprs[2]), (0x13, 0));
}

#[test]
fn fast_call_goes_on_in_xmm_registers() {
    let mut bed = Bed::that_calls();
    let (other, mut core) = bed.other();
    let _ = bed.pass(other, &mut core);
    assert!(!bed.pass(other, &mut core).flushed);
    // Address space and flags in the pair; the mask is the first word of XMM0.
    let gprs = &mut bed.core().state.context.gprs;
    (gprs[1], gprs[2], gprs[8]) = (FLUSH | FAST, 0, 0);
    let mut fake = Fake::new(ChildExit::Hypercall);
    fake.xmm = [0b10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let (next, _) = bed.exit(fake);
    assert_eq!((next, bed.rax()), (Some(DispatchEvent::Signal), 0));
    assert!(bed.pass(other, &mut core).flushed);
}

#[test]
fn guest_learns_that_there_are_no_extended_capabilities() {
    const QUERY_CAPABILITIES: u64 = 0x8001;
    let mut bed = Bed::that_calls();
    put(SLOTS, u64::MAX);
    let (next, fake) = bed.call(QUERY_CAPABILITIES, 0, SLOTS_GPA);
    assert_eq!((next, bed.rax(), fake.rip), (None, 0, 0x1001));
    assert_eq!(get::<u64>(SLOTS), 0);
    // Of an output that is not there, the VMM hears with the instruction.
    assert_eq!(bed.call(QUERY_CAPABILITIES, 0, 0x9000).0, MISSING);
    let code = bed.missing();
    bed.refuse(code);
    let (next, fake) = bed.call(QUERY_CAPABILITIES, 0, 0x9000);
    assert_eq!((next, fake.rip), (Some(DispatchEvent::Intercept), 0x1000));
    assert_eq!(get::<u32>(MESSAGE), 0x8000_0000);
    for (control, output, expected) in [
        (
            QUERY_CAPABILITIES,
            SLOTS_GPA + 4,
            HvStatus::INVALID_ALIGNMENT,
        ),
        (
            QUERY_CAPABILITIES | FAST,
            SLOTS_GPA,
            HvStatus::INVALID_HYPERCALL_INPUT,
        ),
    ] {
        let (next, _) = bed.call(control, 0, output);
        assert_eq!((next, bed.rax()), (None, expected.0.into()));
    }
}
