// SPDX-License-Identifier: GPL-2.0
//! Where a child's instructions, and the root's calls about its registers, meet the pure models.

use core::sync::atomic::Ordering;

use hv_abi::boot::{BootInfo, Vendor};
use hv_abi::hypercall::fault;
use hv_abi::mitigation::action;
use hv_abi::partition::{creation, vp_state, CreatePartition, RegisterInterceptResult};
use hv_abi::status::HvStatus;
use hv_x86::access::{decode, Mode as CodeMode};
use hv_x86::regs::{cr4, efer};
use hv_x86::vmcs::{allows, secondary};

use crate::apic::{
    ApicConfig, InterruptControllerState, LocalApic, Mode, TimerClock, WriteEffect, STATE_SIZE,
};
use crate::arch::memory::{read_physical, write_physical, Window};
use crate::arch::object::{overrides, overrides_mut, page_bytes, scratch};
use crate::arch::switch::{self, rdtsc, CHILD_XCR0};
use crate::arch::{cpu, gpr, ChildHardware};
use crate::child::{self, absorb_page, dirty_page, Run};
use crate::child_cpuid::{self, CpuidResult, Features, Guest};
use crate::child_msr::{self, Local, Paging};
use crate::child_synic;
use crate::cpuid_cache::Key;
use crate::header::boot;
use crate::partition::{new_core, Partition};
use crate::registers::{self, Registers, SetGroup};
use crate::stimer::{self, Timers};
use crate::translate;
use crate::vp::{Owed, Vp, VpCore};
use crate::vp_state::{segment, Effect, HostFacts, PartitionState, VpState};
use crate::xsave::{self, Component};

/// Frequency of the local APIC timer, as on Hyper-V: 200 MHz.
const APIC_HZ: u64 = 200_000_000;

/// Components of extended state that children of this machine may have.
pub fn child_xcr0(info: &BootInfo) -> u64 {
    info.root_xcr0 & CHILD_XCR0
}

fn component(bit: u32) -> Component {
    let [size, offset, flags, _] = cpu::cpuid(0xd, bit);
    Component {
        offset: offset as usize,
        size: size as usize,
        aligned: flags & 2 != 0,
    }
}

/// CPUID of the machine, without what the back ends do not switch or enable for children: IA32_SPEC_CTRL where Linux does
/// not know it, and on VT-x XSAVES and whatever the controls do not allow.
fn host(leaf: u32, subleaf: u32) -> [u32; 4] {
    let [a, mut b, mut c, mut d] = cpu::cpuid(leaf, subleaf);
    let mut a = a;
    let info = boot();
    let vmx = info.vendor == Vendor::Vmx;
    let without = |control: u32| vmx && !allows(control, info.vmx.secondary);
    let fixed = info.mitigations & action::SPEC_CTRL == 0;
    match (leaf, subleaf) {
        (7, 0) => {
            if fixed {
                // IBRS and IBPB, STIBP, SSBD.
                d &= !(1 << 26 | 1 << 27 | 1 << 31);
            }
            if without(secondary::INVPCID) {
                b &= !(1 << 10);
            }
        }
        (7, 2) if fixed => d = 0,
        // XSAVES needs IA32_XSS, which stays the root's.
        (0xd, 1) => {
            a &= !(1 << 3);
            c = 0;
            d = 0;
        }
        (0x8000_0001, _) if without(secondary::RDTSCP) => d &= !(1 << 27),
        // IBRS, STIBP, SSBD, predictive store forwarding.
        (0x8000_0008, _) if fixed => b &= !(1 << 14 | 1 << 15 | 1 << 24 | 1 << 28),
        _ => {}
    }
    [a, b, c, d]
}

fn facts(info: &BootInfo) -> HostFacts {
    const ARCH_CAPABILITIES: u32 = 0x10a;
    let [max, ..] = host(0, 0);
    let has = max >= 7 && {
        let [.., edx] = host(7, 0);
        edx >> 29 & 1 != 0
    };
    HostFacts {
        vendor: info.vendor,
        tsc_hz: info.tsc_hz,
        xcr0: child_xcr0(info),
        arch_capabilities: if has {
            cpu::rdmsr(ARCH_CAPABILITIES)
        } else {
            0
        },
    }
}

/// State of a new partition.
pub fn new_partition_state(info: &BootInfo, input: &CreatePartition) -> PartitionState {
    let [bank0, bank1] = input.disabled_processor_features;
    PartitionState {
        creation_flags: input.flags,
        disabled: [bank0, bank1, input.disabled_xsave_features],
        ..PartitionState::new(facts(info), rdtsc())
    }
}

/// A new VP. Guest time starts with the partition, the same for all VPs.
pub fn new_vp(info: &BootInfo, partition: &PartitionState, index: u32) -> VpCore {
    // The loader refuses a TSC that does not count.
    let clock = TimerClock::new(info.tsc_hz, APIC_HZ).unwrap_or(TimerClock::SAME);
    let config = ApicConfig {
        x2apic: partition.creation_flags & creation::X2APIC_CAPABLE != 0,
        tsc_deadline: true,
        physical_address_bits: info.physical_bits as u8,
        clock,
    };
    let mut state = VpState::reset(index == 0);
    state.tsc_offset = partition.reference_base.wrapping_neg();
    new_core(state, LocalApic::new(config, index, index == 0))
}

/// Puts a new VP's extended state into its initial configuration.
pub fn reset_xsave(page: u64) {
    xsave::reset(page_bytes(page));
}

/// CPUID.1:EAX of the machine: RDX of a started processor.
pub fn signature<H: ChildHardware>(_: &Run<'_, H>) -> u32 {
    let [eax, ..] = cpu::cpuid(1, 0);
    eax
}

/// Reads guest physical memory of a partition; `None` where nothing is mapped.
fn read_guest(cpu: u32, partition: &Partition, gpa: u64, to: &mut [u8]) -> Option<()> {
    let spa = partition.translate(gpa, false)?;
    read_physical(cpu, Window::Guest, spa, to);
    Some(())
}

/// As [`read_guest`], and takes down in `missing` what is not mapped.
fn read_or_note(
    cpu: u32,
    partition: &Partition,
    missing: &mut Option<u64>,
    gpa: u64,
    to: &mut [u8],
) -> Option<()> {
    let read = read_guest(cpu, partition, gpa, to);
    if read.is_none() {
        *missing = Some(gpa);
    }
    read
}

/// The bytes at the VP's instruction pointer and their number. If that is 0, also the GPA that is not mapped.
pub fn instruction_bytes<H: ChildHardware>(run: &mut Run<'_, H>) -> ([u8; 16], u8, Option<u64>) {
    let (cpu, partition) = (run.cpu, run.partition());
    let state = &*run.pull();
    let (mut bytes, mut missing) = ([0; 16], None);
    let count = translate::fetch_instruction(state, &mut bytes, |gpa, to| {
        read_or_note(cpu, partition, &mut missing, gpa, to)
    });
    (bytes, count, missing.filter(|_| count == 0))
}

/// Whether a GPA is in the page of the VP's local APIC (SDM vol 3, 12.4.1).
pub fn is_apic_page(core: &VpCore, gpa: u64) -> bool {
    core.apic.mode() == Mode::XApic && gpa & !0xfff == core.apic.apic_base() & !0xfff
}

/// An access to a register of the local APIC by its page: 32 bits, aligned to 16. Other reads see the bytes that they overlap, and
/// other writes do nothing. `None` for an instruction that only a VMM can emulate; nothing was done then.
pub fn access_apic<H: ChildHardware>(run: &mut Run<'_, H>, gpa: u64) -> Option<WriteEffect> {
    let (bytes, count, _) = instruction_bytes(run);
    let mode = code_mode(&run.core.state);
    let access = decode(bytes.get(..count.into())?, mode)?;
    let now = run.now();
    let (register, within) = ((gpa & 0xff0) as u32, (gpa & 0xf) as u32);
    let core = &mut *run.core;
    let memory = if access.reads() && within < 4 {
        u64::from(core.apic.read(register, now).ok()?) >> (8 * within)
    } else {
        0
    };
    let state = &mut core.state;
    let written = access.perform(memory, &mut state.context.gprs, &mut state.rflags);
    let effect = match written {
        Some(value) if within == 0 && access.size == 4 => {
            core.apic.write(register, value as u32, now).ok()?
        }
        _ => WriteEffect::None,
    };
    run.changed();
    run.skip_by(access.length.into());
    Some(effect)
}

/// Width of the code that a VP runs.
fn code_mode(state: &VpState) -> CodeMode {
    let code = state.segments[segment::CS].rights;
    match (
        state.efer & efer::LMA != 0 && code & 1 << 13 != 0,
        code & 1 << 14 != 0,
    ) {
        (true, _) => CodeMode::Bits64,
        (_, true) => CodeMode::Bits32,
        _ => CodeMode::Bits16,
    }
}

/// HvCallTranslateVirtualAddress: result code and page number. The GPA of a table that is not mapped is for the root.
pub fn translate(
    cpu: u32,
    partition: &Partition,
    core: &VpCore,
    gva_page: u64,
    flags: u64,
) -> (u32, u64) {
    let mut missing = None;
    let result = translate::gva_page(&core.state, gva_page, flags, |gpa, to| {
        read_or_note(cpu, partition, &mut missing, gpa, to)
    });
    if let Some(gpa) = missing {
        child::ask_for(core, gpa, false);
    }
    result
}

/// What the result of CPUID depends on.
#[inline(always)]
fn cpuid_key(core: &VpCore, cr4_value: u64, long: bool, changes: u64) -> Key {
    Key {
        cr4: cr4_value & (cr4::OSXSAVE | cr4::PKE),
        xcr0: core.state.xcr0,
        xss: core.state.xss,
        changes,
        mode: u32::from(long) | u32::from(core.apic.mode() != Mode::Disabled) << 1,
    }
}

#[inline(always)]
fn set_cpuid_result<H: ChildHardware>(run: &mut Run<'_, H>, [a, b, c, d]: [u32; 4]) {
    let gprs = &mut run.core.state.context.gprs;
    gprs[gpr::RBX] = b.into();
    gprs[gpr::RCX] = c.into();
    gprs[gpr::RDX] = d.into();
    run.hardware.rax(run.core, a.into());
}

/// CPUID of a child, if the result is known.
#[inline(always)]
pub fn cpuid_quickly<H: ChildHardware>(run: &mut Run<'_, H>) -> bool {
    let leaf = run.hardware.eax(run.core);
    let subleaf = run.core.state.context.gprs[gpr::RCX] as u32;
    let (cr4_value, long) = run.hardware.cr4_and_long();
    let changes = run.partition().changes.load(Ordering::Acquire);
    let key = cpuid_key(run.core, cr4_value, long, changes);
    let Some(result) = run.core.cpuid.get(&key, leaf, subleaf) else {
        return false;
    };
    run.hardware.skip_quick(2);
    set_cpuid_result(run, result);
    true
}

/// CPUID of a child.
pub fn cpuid<H: ChildHardware>(run: &mut Run<'_, H>) {
    let gprs = &run.core.state.context.gprs;
    let (leaf, subleaf) = (gprs[gpr::RAX] as u32, gprs[gpr::RCX] as u32);
    if leaf == fault::LEAF && run.info.allow_fault != 0 {
        cpu::fault(subleaf.into());
    }
    run.peek();
    let partition = run.partition();
    let core = &mut *run.core;
    let key = cpuid_key(
        core,
        core.state.cr4,
        child_cpuid::is_long(&core.state),
        partition.changes.load(Ordering::Acquire),
    );
    let result = core.cpuid.get(&key, leaf, subleaf).unwrap_or_else(|| {
        let inner = partition.inner.lock();
        let guest = Guest::of(
            &core.state,
            &core.apic,
            &inner.state,
            Some(overrides(core.overrides)),
        );
        let result = child_cpuid::cpuid(leaf, subleaf, &host, &guest);
        core.cpuid.put(&key, leaf, subleaf, result);
        result
    });
    run.skip();
    set_cpuid_result(run, result);
}

/// The value of an MSR.
#[inline(never)]
fn msr_value(vp: &Vp, core: &mut VpCore, number: u32) -> Result<u64, child_msr::GeneralProtection> {
    let inner = vp.partition.get().inner.lock();
    let on = Local {
        vp: &mut core.state,
        apic: &mut core.apic,
        timers: &mut core.timers,
        partition: &inner.state,
        vp_index: vp.index,
        host_tsc: rdtsc(),
    };
    child_msr::read(number, &on)
}

#[inline(always)]
fn set_msr_result<H: ChildHardware>(run: &mut Run<'_, H>, value: u64) {
    run.core.state.context.gprs[gpr::RDX] = value >> 32;
    run.hardware.rax(run.core, value & 0xffff_ffff);
}

/// RDMSR of a child, if the MSR is a constant, or exists and nothing but the hypervisor knows its value.
#[inline(always)]
pub fn read_msr_quickly<H: ChildHardware>(run: &mut Run<'_, H>) -> bool {
    let number = run.core.state.context.gprs[gpr::RCX] as u32;
    let value = match child_msr::constant(number, run.info.vendor) {
        Some(value) => value,
        None if child_msr::is_hidden(number) && number != child_msr::hv::GUEST_IDLE => {
            match msr_value(run.vp, run.core, number) {
                Ok(value) => value,
                Err(_) => return false,
            }
        }
        None => return false,
    };
    run.hardware.skip_quick(2);
    set_msr_result(run, value);
    true
}

/// RDMSR of a child.
pub fn read_msr<H: ChildHardware>(run: &mut Run<'_, H>) {
    let number = run.core.state.context.gprs[gpr::RCX] as u32;
    msr_state(run, number);
    match msr_value(run.vp, run.core, number) {
        Ok(value) => {
            run.skip();
            set_msr_result(run, value);
            if number == child_msr::hv::GUEST_IDLE && may_wait(run.partition()) {
                run.core.state.halt_suspend = true;
                run.core.state.idle = true;
            }
        }
        Err(_) => run.general_protection(),
    }
}

/// Whether HV_X64_MSR_GUEST_IDLE is more than an unknown MSR.
fn may_wait(partition: &Partition) -> bool {
    let features = partition.inner.lock().state.synthetic_features;
    child_cpuid::privileges(features, false) & child_cpuid::privilege::GUEST_IDLE != 0
}

/// Brings out what an access to the MSR needs: nothing but the mode for those that only the hypervisor keeps.
fn msr_state<H: ChildHardware>(run: &mut Run<'_, H>, number: u32) {
    if child_msr::is_hidden(number) || (0x800..=0x8ff).contains(&number) {
        run.peek();
    } else {
        run.pull();
    }
}

/// WRMSR of a child. Returns what the local APIC asks for.
pub fn write_msr<H: ChildHardware>(run: &mut Run<'_, H>) -> WriteEffect {
    let gprs = &run.core.state.context.gprs;
    let number = gprs[gpr::RCX] as u32;
    let value = gprs[gpr::RDX] << 32 | gprs[gpr::RAX] & 0xffff_ffff;
    msr_state(run, number);
    let partition = run.partition();
    let index = run.vp.index;
    let mut inner = partition.inner.lock();
    let mut on = Local {
        vp: &mut run.core.state,
        apic: &mut run.core.apic,
        timers: &mut run.core.timers,
        partition: &inner.state,
        vp_index: index,
        host_tsc: rdtsc(),
    };
    let mut outcome = child_msr::write(number, value, &mut on);
    if outcome == Ok(Effect::Partition) {
        outcome =
            child_msr::write_partition(number, value, &mut inner.state, &run.core.state.features);
        partition.changes.fetch_add(1, Ordering::Release);
    }
    drop(inner);
    let Ok(effect) = outcome else {
        run.general_protection();
        return WriteEffect::None;
    };
    if !run.core.in_hardware {
        run.changed();
    }
    run.skip();
    effect_of_msr(run, effect)
}

fn effect_of_msr<H: ChildHardware>(run: &mut Run<'_, H>, effect: Effect) -> WriteEffect {
    let (number, partition) = (run.cpu, run.partition());
    match effect {
        Effect::Apic(effect) => return effect,
        Effect::TscOffset => {
            run.pull();
            run.changed();
        }
        // Written before the next entry.
        Effect::HypercallPage(Some(_)) => run.core.owed = Some(Owed::HypercallPage),
        Effect::ReferenceTscPage(Some(_)) | Effect::ReferenceTime => {
            run.core.owed = Some(Owed::ReferencePage);
        }
        Effect::Synic(Some(gpa)) => run.core.owed = Some(Owed::SynicPage(gpa)),
        Effect::SpeculationControl => switch::set_spec_ctrl(number, run.core),
        Effect::PredictionCommand(value) => {
            // SAFETY: the model checked the value against the processor's features; it only drops predictions.
            unsafe { cpu::wrmsr(0x49, value) };
        }
        Effect::FlushL1d => cpu::wbinvd(),
        Effect::Crash => {
            let crash = partition.inner.lock().state.crash;
            run.log(format_args!("the guest reports a crash {crash:x?}"));
        }
        Effect::Reset => run.core.shut_down = true,
        Effect::Synic(None) => synic_changed(run),
        Effect::Timers => child_synic::expire_timers(number, run.vp, run.core),
        Effect::HypercallPage(None)
        | Effect::ReferenceTscPage(None)
        | Effect::VpAssistPage(_)
        | Effect::AccessTracking(_)
        | Effect::Notify(_)
        | Effect::Partition
        | Effect::None => {}
    }
    WriteEffect::None
}

fn synic_changed<H: ChildHardware>(run: &mut Run<'_, H>) {
    child_synic::publish(run.vp, run.core);
    run.deliverable |= child_synic::deliver(run.cpu, run.vp, run.core);
}

/// Before an entry: writes what the VP, or else the partition, has to write to guest memory. The error is the GPA of a page that is not mapped for that.
pub fn settle<H: ChildHardware>(run: &mut Run<'_, H>) -> Result<(), u64> {
    let (cpu, partition) = (run.cpu, run.partition());
    match run.core.owed {
        Some(Owed::HypercallPage) => {
            let msr = partition.inner.lock().state.hypercall;
            if let Some(gpa) = child_msr::page(msr) {
                let page = scratch(cpu);
                child_msr::fill_hypercall_page(page, run.info.vendor);
                write_guest(cpu, partition, gpa, page)?;
            }
        }
        Some(Owed::SynicPage(gpa)) => write_guest(cpu, partition, gpa, &[0; 4096])?,
        Some(Owed::ReferencePage) => {
            write_reference_page(cpu, partition, run.core.state.tsc_offset)?;
        }
        None => {
            let offset = partition.inner.lock().state.reference_base.wrapping_neg();
            write_reference_page(cpu, partition, offset)?;
        }
    }
    settled(run);
    Ok(())
}

/// What was to be written is there, or there is no such page.
pub fn settled<H: ChildHardware>(run: &mut Run<'_, H>) {
    match run.core.owed.take() {
        Some(Owed::SynicPage(_)) => synic_changed(run),
        Some(Owed::HypercallPage | Owed::ReferencePage) => {}
        None => {
            let owes = &run.partition().owes_reference_page;
            owes.store(false, Ordering::Release);
        }
    }
}

/// Writes guest memory that is mapped and writable. The error is the GPA of what is not.
pub fn write_guest(cpu: u32, partition: &Partition, gpa: u64, from: &[u8]) -> Result<(), u64> {
    let spa = partition.translate(gpa, true).ok_or(gpa)?;
    write_physical(cpu, Window::Guest, spa, from);
    Ok(())
}

/// The error is as for [`write_guest`].
fn write_reference_page(cpu: u32, partition: &Partition, tsc_offset: u64) -> Result<(), u64> {
    let mut inner = partition.inner.lock();
    let msr = inner.state.reference_tsc;
    let page = child_msr::reference_tsc_page(&mut inner.state, tsc_offset);
    drop(inner);
    let Some(gpa) = child_msr::page(msr) else {
        return Ok(());
    };
    let bytes = scratch(cpu);
    bytes.fill(0);
    let words = [u64::from(page.sequence), page.scale, page.offset as u64];
    for (slot, word) in bytes.chunks_exact_mut(8).zip(words) {
        slot.copy_from_slice(&word.to_le_bytes());
    }
    write_guest(cpu, partition, gpa, bytes)
}

/// XSETBV of a child.
pub fn xsetbv<H: ChildHardware>(run: &mut Run<'_, H>) {
    let state = run.peek();
    let gprs = &state.context.gprs;
    let (index, value) = (
        gprs[gpr::RCX] as u32,
        gprs[gpr::RDX] << 32 | gprs[gpr::RAX] & 0xffff_ffff,
    );
    let privileged = state.segments[segment::SS].rights >> 5 & 3 == 0;
    let valid = child_msr::validate_xcr0(value, &state.features);
    if index != 0 || !privileged || state.cr4 & cr4::OSXSAVE == 0 || valid.is_err() {
        return run.general_protection();
    }
    // The world switch loads it; the child runs on this CPU now, so it also goes there at once.
    run.core.state.xcr0 = value;
    cpu::xsetbv(value);
    run.skip();
}

/// Takes the page-directory pointers from guest memory, as loads of control registers do. The error is the GPA of a table that
/// is not mapped.
fn load_pointers<H: ChildHardware>(run: &mut Run<'_, H>) -> Result<[u64; 4], u64> {
    let (cpu, partition) = (run.cpu, run.partition());
    let state = &run.core.state;
    translate::pointers(state, |gpa, to| read_guest(cpu, partition, gpa, to))
        .ok_or(translate::pointers_gpa(state))
}

/// MOV to CR0 or CR4 that changes bits which the hypervisor owns. The error is the GPA of a table that it reads and that is not
/// mapped: as a page walk would exit there, this does, and the instruction runs again.
pub fn write_control_register<H: ChildHardware>(
    run: &mut Run<'_, H>,
    register: u8,
    value: u64,
) -> Result<(), u64> {
    let state = run.pull();
    let write = match register {
        0 => child_msr::validate_cr0(value, state),
        _ => child_msr::validate_cr4(value, state),
    };
    let Ok(write) = write else {
        run.general_protection();
        return Ok(());
    };
    if H::KEEPS_POINTERS && write.load_pdptes {
        let pointers = load_pointers(run)?;
        let state = &run.core.state;
        if !pointers
            .iter()
            .all(|one| translate::is_pointer(state, *one))
        {
            run.general_protection();
            return Ok(());
        }
        run.hardware.set_pointers(pointers);
    }
    let state = &mut run.core.state;
    match register {
        0 => state.cr0 = write.value,
        _ => state.cr4 = write.value,
    }
    state.efer = write.efer;
    run.first |= write.flush;
    run.hardware.load(run.core);
    run.core.in_hardware = true;
    run.skip();
    Ok(())
}

/// Before registers that were set from outside go to the control structure: translations made with others do not hold any
/// more, and page-directory pointers have to come from memory. (The processor refuses the entry if they have reserved bits.)
/// The error is as for [`write_control_register`].
pub fn change_paging<H: ChildHardware>(run: &mut Run<'_, H>) -> Result<(), u64> {
    let (old, new) = (run.hardware.paging(), Paging::of(&run.core.state));
    run.first |= new != old;
    if H::KEEPS_POINTERS && new.loads_pointers(&old) {
        let pointers = load_pointers(run)?;
        run.hardware.set_pointers(pointers);
    }
    Ok(())
}

/// The registers of a VP as the root's calls see them.
pub struct View<'a> {
    info: &'a BootInfo,
    vp: &'a Vp,
    core: &'a mut VpCore,
    partition: &'a mut PartitionState,
}

impl<'a> View<'a> {
    /// The view of a VP that the caller owns and whose registers are in `core.state`.
    pub fn new(
        info: &'a BootInfo,
        vp: &'a Vp,
        core: &'a mut VpCore,
        partition: &'a mut PartitionState,
    ) -> Self {
        Self {
            info,
            vp,
            core,
            partition,
        }
    }

    fn now(&self) -> u64 {
        rdtsc().wrapping_add(self.core.state.tsc_offset)
    }

    /// What the VMM wrote into the register page.
    pub fn absorb_register_page(&mut self) {
        if let Some((page, dirty)) = dirty_page(self.core) {
            absorb_page(self.core, page, dirty);
            self.core.dirty = true;
        }
    }

    /// After a change: the next entry loads it, the register page shows it, others address the APIC by it.
    pub fn publish(&mut self) {
        self.core.dirty = true;
        self.vp.posted.publish(self.core.apic.addressing());
        // A page that is not cleared yet takes nothing.
        if !matches!(self.core.owed, Some(Owed::SynicPage(_))) {
            child_synic::publish(self.vp, self.core);
        }
        child::show_registers(self.core);
    }

    /// CPUID as the guest would see it now.
    pub fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let core = &*self.core;
        let guest = Guest::of(
            &core.state,
            &core.apic,
            self.partition,
            Some(overrides(core.overrides)),
        );
        child_cpuid::cpuid(leaf, subleaf, &host, &guest)
    }

    fn registers(&mut self) -> Registers<'_> {
        Registers {
            vp: &mut self.core.state,
            apic: &mut self.core.apic,
            partition: self.partition,
            xsave: page_bytes(self.core.xsave),
            vp_index: self.vp.index,
            host_tsc: rdtsc(),
        }
    }

    /// A register by its TLFS name.
    pub fn get(&mut self, name: u32) -> Result<[u64; 2], HvStatus> {
        self.vp.posted.drain_into(&mut self.core.apic);
        self.registers().get(name)
    }

    /// Sets a register by its TLFS name. Returns what is left to do.
    pub fn set(&mut self, name: u32, value: [u64; 2]) -> Result<Effect, HvStatus> {
        let partition = self.vp.partition.get();
        partition.changes.fetch_add(1, Ordering::Release);
        let effect = self.registers().set(name, value)?;
        if let Effect::Notify(set) = effect {
            child_synic::notify(self.vp, set);
        }
        Ok(effect)
    }

    /// After a group of registers was set: a VMM that resets a VP by its registers alone.
    pub fn end_group(&mut self, group: &SetGroup) {
        if group.is_reset(&self.core.state) {
            registers::reset(&mut self.core.state, &mut self.core.apic);
            if self.core.apic.is_bsp() {
                // Its memory is another guest's now: nothing may be written to where the last one wanted it.
                self.partition.reset_guest();
            }
            self.core.owed = None;
            self.vp.awaited.store(0, Ordering::SeqCst);
            self.core.requeue = (0, 0);
            self.core.offered = None;
            self.core.iret = None;
            self.core.steps = false;
            self.core.timers = Timers::RESET;
            child_synic::reset(self.vp);
            self.core.shut_down = false;
        }
    }

    /// Takes the features anew from CPUID: after creation and after each registered result.
    pub fn update_features(&mut self) {
        let partition = self.vp.partition.get();
        partition.changes.fetch_add(1, Ordering::Release);
        self.core.state.features =
            Features::of(&host, self.partition, overrides(self.core.overrides));
        // VT-x: which bits of CR4 it may change.
        self.core.dirty = true;
    }

    /// HvCallRegisterInterceptResult for CPUID.
    pub fn register_cpuid(&mut self, input: &RegisterInterceptResult) -> Result<(), HvStatus> {
        let new = CpuidResult {
            leaf: input.eax,
            subleaf: input.ecx,
            subleaf_specific: input.subleaf_specific != 0,
            result: input.result,
        };
        overrides_mut(self.core.overrides).register(&new, &host, self.partition)?;
        self.update_features();
        Ok(())
    }

    /// The local APIC state page.
    pub fn get_lapic(&mut self, cpu: u32, page: u64) -> Result<(), HvStatus> {
        self.vp.posted.drain_into(&mut self.core.apic);
        let now = self.now();
        let bytes = scratch(cpu);
        bytes.fill(0);
        if let Some(slot) = bytes.get_mut(..STATE_SIZE) {
            slot.copy_from_slice(&self.core.apic.export(now).to_bytes());
        }
        write_physical(cpu, Window::Output, page, bytes);
        Ok(())
    }

    /// Loads it.
    pub fn set_lapic(&mut self, cpu: u32, page: u64) -> Result<(), HvStatus> {
        let mut bytes = [0; STATE_SIZE];
        read_physical(cpu, Window::Output, page, &mut bytes);
        let now = self.now();
        self.core
            .apic
            .import(&InterruptControllerState::from_bytes(&bytes), now)
            .map_err(|_| HvStatus::INVALID_PARAMETER)
    }

    /// The extended state, compacted.
    pub fn get_xsave(&mut self, cpu: u32, page: u64) -> Result<(), HvStatus> {
        let area = scratch(cpu);
        xsave::compact(
            page_bytes(self.core.xsave),
            area,
            self.core.state.xcr0,
            component,
        )?;
        write_physical(cpu, Window::Output, page, area);
        Ok(())
    }

    /// Loads it.
    pub fn set_xsave(&mut self, cpu: u32, page: u64) -> Result<(), HvStatus> {
        let bytes = scratch(cpu);
        read_physical(cpu, Window::Output, page, bytes);
        xsave::expand(
            bytes,
            page_bytes(self.core.xsave),
            child_xcr0(self.info),
            component,
        )
    }

    /// The state of the synthetic timers.
    pub fn get_timers(&self) -> [u64; TIMER_WORDS] {
        let mut words = [0; TIMER_WORDS];
        let state = self.core.timers.export();
        for (to, from) in words.iter_mut().zip(state.iter().flatten()) {
            *to = *from;
        }
        words
    }

    /// Loads it.
    pub fn set_timers(&mut self, words: &[u64; TIMER_WORDS]) -> Result<(), HvStatus> {
        let mut state = [[0; stimer::STATE_WORDS]; stimer::TIMERS];
        for (to, from) in state.iter_mut().flatten().zip(words) {
            *to = *from;
        }
        let now = child_msr::reference_time(rdtsc(), self.partition);
        if self.core.timers.import(&state, now) {
            // The next entry computes the deadline.
            self.vp
                .partition
                .get()
                .changes
                .fetch_add(1, Ordering::Release);
            Ok(())
        } else {
            Err(HvStatus::INVALID_PARAMETER)
        }
    }
}

/// Words of `hv_synthetic_timers_state`.
pub const TIMER_WORDS: usize = vp_state::SYNTHETIC_TIMERS_BYTES / 8;

/// A page of the SynIC, for the VMM. The root is asked for one that is not mapped; then nothing was done.
pub fn get_synic_page(cpu: u32, vp: &Vp, core: &VpCore, kind: child_synic::Kind, page: u64) {
    let bytes = scratch(cpu);
    child_synic::get_page(cpu, vp, core, kind, bytes);
    write_physical(cpu, Window::Output, page, bytes);
}

/// Loads it.
pub fn set_synic_page(cpu: u32, vp: &Vp, core: &VpCore, kind: child_synic::Kind, page: u64) {
    let bytes = scratch(cpu);
    read_physical(cpu, Window::Output, page, bytes);
    child_synic::set_page(cpu, vp, core, kind, bytes);
}

/// GET_PARTITION_PROPERTY of the root: what the processor has.
pub fn host_property(info: &BootInfo, code: u32) -> Result<u64, HvStatus> {
    child_cpuid::host_property(code, &host, facts(info), rdtsc())
}

/// GET_PARTITION_PROPERTY of a child.
pub fn partition_property(state: &PartitionState, code: u32) -> Result<u64, HvStatus> {
    child_cpuid::get_property(code, &host, state, rdtsc())
}

/// SET_PARTITION_PROPERTY.
pub fn set_property(
    cpu: u32,
    partition: &Partition,
    code: u32,
    value: u64,
) -> Result<(), HvStatus> {
    let mut inner = partition.inner.lock();
    let initialized = inner.phase != crate::partition::Phase::Created;
    let effect = child_cpuid::set_property(code, value, initialized, &mut inner.state, rdtsc())?;
    let offset = inner.state.reference_base.wrapping_neg();
    partition.changes.fetch_add(1, Ordering::Release);
    drop(inner);
    if effect == Effect::ReferenceTime && write_reference_page(cpu, partition, offset).is_err() {
        partition.owes_reference_page.store(true, Ordering::Release);
    }
    Ok(())
}

/// GET_PARTITION_PROPERTY_EX.
pub fn property_ex(code: u32) -> Result<([u64; 2], usize), HvStatus> {
    child_cpuid::property_ex(code)
}
