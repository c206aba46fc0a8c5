// SPDX-License-Identifier: GPL-2.0
//! The switch between the root and a child, the same on both vendors but for the control structure.

use hv_abi::boot::{BootInfo, CpuArea, VpContext};
use hv_abi::hypercall::{result, DispatchEvent, PortSet, MAY_PAUSE};
use hv_abi::status::HvStatus;

use super::object::{running, Ownership};
use super::{gpr, switch, ChildHardware, Work};
use crate::child::{Next, Run};
use crate::header::boot;
use crate::partition;
use crate::register_page::Shown;
use crate::vp::{Vp, VpCore};

/// What a back end adds.
pub trait WorldSwitch {
    /// Its control structure.
    type Hardware: ChildHardware;
    /// CR2 and DR6 stay in the registers at an exit (VT-x). AMD-V has those of both worlds in their VMCBs (APM 15.5.1).
    const IN_REGISTERS: bool;
    /// Accesses to ports are told from other exits first, because that is one comparison (AMD-V).
    const PORTS_FIRST: bool;

    /// The structure of a VP, made usable on this CPU; `slat` is the partition's second-level table.
    fn open(
        area: &mut CpuArea,
        info: &'static BootInfo,
        core: &mut VpCore,
        slat: u64,
    ) -> Self::Hardware;
    /// The structure of the VP that just exited.
    fn current(info: &'static BootInfo, core: &VpCore) -> Self::Hardware;
    /// Leaves the structure without entering.
    fn close(area: &mut CpuArea, core: &VpCore);
    /// Keeps what only this vendor has to bring back for the root.
    fn keep_root(area: &mut CpuArea, core: &mut VpCore);
    /// Hands the processor to the child.
    fn to_child(area: &mut CpuArea, core: &mut VpCore);
    /// Takes it back for the root.
    fn to_root(area: &mut CpuArea, core: &mut VpCore);
    /// As [`Self::to_root`], but without what may wait until [`Self::end_pause`].
    fn pause(area: &mut CpuArea, core: &mut VpCore);
    /// The way back.
    fn resume(area: &mut CpuArea, core: &mut VpCore);
    /// What [`Self::pause`] left.
    fn end_pause(area: &mut CpuArea, core: &mut VpCore);
    /// Whether the root has a breakpoint armed (DR7) or makes single steps; its control structure is current.
    fn root_is_traced(area: &CpuArea) -> bool;
    /// The root's part of [`Self::to_root`], wherever a fault stopped the switch.
    fn rescue_root(area: &mut CpuArea, core: &VpCore);
    /// Sets RAX of the root.
    fn set_result(area: &mut CpuArea, rax: u64);
}

/// HvCallDispatchVp with RDX and R8: `Ok(None)` if the child runs next, `Ok(Some(_))` if it cannot.
pub fn dispatch<W: WorldSwitch>(
    area: &mut CpuArea,
    partition_id: u64,
    second: u64,
) -> Result<Option<DispatchEvent>, HvStatus> {
    let info = boot();
    let step = (second >> 32) as u8;
    let target = partition::find(partition_id)?;
    let vp = target.vp(second as u32)?;
    let slat = target.slat.load(core::sync::atomic::Ordering::Acquire);
    if slat == 0 {
        return Err(HvStatus::INVALID_PARTITION_STATE);
    }
    let mut core = vp.core.acquire().ok_or(HvStatus::INVALID_VP_STATE)?;
    // Armed breakpoints of the root must not see DR0 to DR3 of a child.
    let may_pause = second & MAY_PAUSE != 0 && !W::root_is_traced(area);
    let hardware = W::open(area, info, &mut core, slat);
    core.state.explicit_suspend = false;
    core.state.intercept_suspend = false;
    core.state.tsc_read = None;
    core.ports = PortSet::from_value(second);
    core.pauses = if may_pause {
        core.ports
    } else {
        PortSet::default()
    };
    core.port = None;
    let address = &raw const core.state.context as u64;
    let first = area.last_child != address;
    let mut run = Run {
        info,
        cpu: area.cpu,
        vp,
        core: &mut core,
        hardware,
        first,
        deliverable: 0,
    };
    let next = if run.resume_quickly(step) {
        Next::Enter
    } else {
        run.absorb_register_page();
        if step != 0 {
            run.skip_by(step.into());
        }
        run.enter()
    };
    match next {
        Next::Root(event) => {
            finish(&mut run, event);
            drop(run);
            W::close(area, &core);
            Ok(Some(event))
        }
        Next::Enter => {
            drop(run);
            let other = area.last_partition != partition_id;
            area.last_partition = partition_id;
            W::keep_root(area, &mut core);
            switch::to_child(area, &core, other, W::IN_REGISTERS);
            area.current = address;
            area.last_child = address;
            W::to_child(area, &mut core);
            core.keep();
            target.keep();
            Ok(None)
        }
    }
}

/// Does something with the registers of a VP that nobody runs; `pull` brings them out of the control structure.
pub fn on_stopped_vp(
    pull: fn(u64, &mut VpCore),
    root_control: u64,
    partition_id: u64,
    index: u32,
    work: Work,
) -> Result<(), HvStatus> {
    let target = partition::find(partition_id)?;
    let vp = target.vp(index)?;
    let mut core = vp.core.acquire().ok_or(HvStatus::INVALID_VP_STATE)?;
    pull(root_control, &mut core);
    match work {
        Work::Show => {
            let shown = Shown::of(&core.state);
            crate::child::show(index, &mut core, &shown);
        }
        Work::Fail(status) => {
            crate::child_hypercall::fail(&mut core.state, status);
            core.dirty = true;
        }
    }
    Ok(())
}

/// What the root sees after a dispatch.
fn finish<H: ChildHardware>(run: &mut Run<'_, H>, event: DispatchEvent) {
    run.tell_deadline();
    if event == DispatchEvent::Intercept {
        run.core.state.intercept_suspend = true;
    }
}

/// The VP in `core`, which runs on this CPU and just exited.
#[inline(always)]
fn exited<'a, W: WorldSwitch>(
    area: &CpuArea,
    vp: &'static Vp,
    core: &'a mut VpCore,
) -> Run<'a, W::Hardware> {
    let info = boot();
    let hardware = W::current(info, core);
    Run {
        info,
        cpu: area.cpu,
        vp,
        core,
        hardware,
        first: false,
        deliverable: 0,
    }
}

/// An exit of the child that runs on this CPU. The context to resume is `area.current` afterwards. A pause, simple exits
/// ([`Run::finish_quickly`]) and the others are apart because those in front need few registers.
#[inline(always)]
pub fn child_exit<W: WorldSwitch>(area: &mut CpuArea) -> *const VpContext {
    let vp = running(area.current);
    // SAFETY: `dispatch` kept the ownership when it let this CPU go into the child.
    let mut core = unsafe { vp.core.resume() };
    core.exits = core.exits.wrapping_add(1);
    let is_port = W::PORTS_FIRST && exited::<W>(area, vp, &mut core).hardware.is_port();
    let done = !W::PORTS_FIRST && exited::<W>(area, vp, &mut core).finish_quickly();
    core.keep();
    if is_port {
        may_pause::<W>(area)
    } else if W::PORTS_FIRST {
        simple_exit::<W>(area)
    } else if done {
        context(area)
    } else {
        other_exit::<W>(area)
    }
}

/// An exit that is not simple, where [`WorldSwitch::PORTS_FIRST`] is false.
#[inline(never)]
fn other_exit<W: WorldSwitch>(area: &mut CpuArea) -> *const VpContext {
    let vp = running(area.current);
    // SAFETY: as in `child_exit`.
    let mut core = unsafe { vp.core.resume() };
    let is_port = exited::<W>(area, vp, &mut core).hardware.is_port();
    core.keep();
    if is_port {
        may_pause::<W>(area)
    } else {
        full_exit::<W>(area)
    }
}

/// An access to a port.
#[inline(always)]
fn may_pause<W: WorldSwitch>(area: &mut CpuArea) -> *const VpContext {
    let vp = running(area.current);
    // SAFETY: as in `child_exit`.
    let mut core = unsafe { vp.core.resume() };
    let paused = exited::<W>(area, vp, &mut core).pause_quickly();
    let Some(value) = paused else {
        core.keep();
        return port_exit::<W>(area);
    };
    core.paused_with = value;
    core.keep();
    if switch::pause_has_barriers() {
        return pause_with_barriers::<W>(area, value);
    }
    pause::<W>(area, value)
}

#[inline(never)]
fn simple_exit<W: WorldSwitch>(area: &mut CpuArea) -> *const VpContext {
    let vp = running(area.current);
    // SAFETY: as in `child_exit`.
    let mut core = unsafe { vp.core.resume() };
    let done = exited::<W>(area, vp, &mut core).finish_quickly();
    core.keep();
    if done {
        context(area)
    } else {
        full_exit::<W>(area)
    }
}

/// The root runs next, with `value` in RDX, and the VP stays on this CPU.
#[inline(always)]
fn pause<W: WorldSwitch>(area: &mut CpuArea, value: u64) -> *const VpContext {
    let vp = running(area.current);
    // SAFETY: as in `child_exit`.
    let mut core = unsafe { vp.core.resume() };
    switch::pause(area, &mut core, W::IN_REGISTERS);
    W::pause(area, &mut core);
    core.put_aside();
    to_root_context::<W>(area, HvStatus::SUCCESS, value);
    &raw const area.root
}

#[inline(never)]
fn pause_with_barriers<W: WorldSwitch>(area: &mut CpuArea, value: u64) -> *const VpContext {
    let vp = running(area.current);
    // SAFETY: as in `child_exit`.
    let core = unsafe { vp.core.resume() };
    switch::pause_barriers(area, &core);
    core.keep();
    pause::<W>(area, value)
}

/// The VP that is paused on this CPU, if it can go on as it is.
#[inline(always)]
pub fn ready<W: WorldSwitch>(area: &CpuArea) -> Option<&'static Vp> {
    let vp = running(area.extended);
    // SAFETY: `pause` kept the ownership when it paused the VP on this CPU.
    let mut core = unsafe { vp.core.take_up() };
    let is_ready = exited::<W>(area, vp, &mut core).is_untouched();
    core.keep();
    is_ready.then_some(vp)
}

/// It goes on behind its instruction. Its control structure is not current yet.
#[inline(always)]
pub fn resume<W: WorldSwitch>(area: &mut CpuArea, vp: &'static Vp) -> *const VpContext {
    // SAFETY: as in `ready`.
    let mut core = unsafe { vp.core.resume() };
    let context = &raw const core.state.context;
    // Before any register changes: see `WorldSwitch::rescue_root`.
    area.current = context as u64;
    W::resume(area, &mut core);
    exited::<W>(area, vp, &mut core).hardware.skip_port();
    switch::resume(area, &core, W::IN_REGISTERS);
    core.keep();
    context
}

/// The same where barriers come first.
#[inline(never)]
pub fn resume_with_barriers<W: WorldSwitch>(area: &mut CpuArea) -> *const VpContext {
    let vp = running(area.extended);
    // SAFETY: as in `ready`.
    let core = unsafe { vp.core.resume() };
    switch::resume_barriers(area, &core);
    core.keep();
    resume::<W>(area, vp)
}

/// Brings back all that a pause left. Afterwards the VP is as if it had left with its write.
pub fn end_pause<W: WorldSwitch>(area: &mut CpuArea) {
    let vp = running(area.extended);
    // SAFETY: as in `ready`.
    let mut core = unsafe { vp.core.resume() };
    exited::<W>(area, vp, &mut core).end_pause();
    W::end_pause(area, &mut core);
    switch::end_pause(area, &mut core);
    drop(core);
    partition::end_use(vp.partition);
}

/// An exit for an access to a port that did not pause the VP.
#[inline(never)]
fn port_exit<W: WorldSwitch>(area: &mut CpuArea) -> *const VpContext {
    let vp = running(area.current);
    // SAFETY: as in `child_exit`.
    let mut core = unsafe { vp.core.resume() };
    if !exited::<W>(area, vp, &mut core).is_simple() {
        core.keep();
        return full_exit::<W>(area);
    }
    let mut run = exited::<W>(area, vp, &mut core);
    let Some(event) = run.leave_quickly() else {
        drop(run);
        core.keep();
        return full_exit::<W>(area);
    };
    let value = run.event_value(event);
    drop(run);
    leave::<W>(area, vp, core, event, value);
    context(area)
}

#[inline(never)]
fn full_exit<W: WorldSwitch>(area: &mut CpuArea) -> *const VpContext {
    let vp = running(area.current);
    // SAFETY: as in `child_exit`.
    let mut core = unsafe { vp.core.resume() };
    let mut run = exited::<W>(area, vp, &mut core);
    match run.after_exit() {
        Next::Enter => {
            drop(run);
            core.keep();
        }
        Next::Root(event) => {
            finish(&mut run, event);
            let value = run.event_value(event);
            drop(run);
            leave::<W>(area, vp, core, event, value);
        }
    }
    context(area)
}

/// Goes back to the root with an event.
#[inline(always)]
fn leave<W: WorldSwitch>(
    area: &mut CpuArea,
    vp: &'static Vp,
    mut core: Ownership<'_, VpCore>,
    event: DispatchEvent,
    value: u64,
) {
    switch::to_root(area, &mut core, W::IN_REGISTERS);
    if event == DispatchEvent::Message {
        // Only now the extended state is in its area, and the control structure is still the child's.
        exited::<W>(area, vp, &mut core).show();
    }
    back_to_root::<W>(area, vp, core, HvStatus::SUCCESS, value);
}

/// The root runs next, with the registers that [`switch::to_root`] brought back.
#[inline(always)]
fn back_to_root<W: WorldSwitch>(
    area: &mut CpuArea,
    vp: &Vp,
    mut core: Ownership<'_, VpCore>,
    status: HvStatus,
    value: u64,
) {
    W::to_root(area, &mut core);
    drop(core);
    partition::end_use(vp.partition);
    to_root_context::<W>(area, status, value);
}

/// The root runs next, with these in RAX and RDX.
#[inline(always)]
fn to_root_context<W: WorldSwitch>(area: &mut CpuArea, status: HvStatus, value: u64) {
    area.current = &raw const area.root as u64;
    W::set_result(area, result(status, 0));
    area.root.gprs[gpr::RDX] = value;
}

/// The processor refused to enter the child: the root hears that its state is invalid.
pub fn entry_failed<W: WorldSwitch>(area: &mut CpuArea) {
    let vp = running(area.current);
    // SAFETY: as in `child_exit`.
    let mut core = unsafe { vp.core.resume() };
    switch::to_root(area, &mut core, W::IN_REGISTERS);
    back_to_root::<W>(area, vp, core, HvStatus::INVALID_VP_STATE, 0);
}

/// The image faulted: if a child or any of its registers was current, the root's come back.
pub fn abandon<W: WorldSwitch>(area: &mut CpuArea) {
    let root = &raw const area.root as u64;
    let child = if area.extended != 0 {
        area.extended
    } else {
        area.current
    };
    if child == root {
        return;
    }
    let vp = running(child);
    // SAFETY: as in `child_exit`; the code that owned the VP never continues.
    let core = unsafe { vp.core.resume() };
    switch::rescue_root(area, W::IN_REGISTERS);
    W::rescue_root(area, &core);
    area.current = root;
    drop(core);
    partition::end_use(vp.partition);
}

/// The context to resume.
pub fn context(area: &CpuArea) -> *const VpContext {
    area.current as *const VpContext
}
