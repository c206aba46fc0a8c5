// SPDX-License-Identifier: GPL-2.0
//! Hypercalls of the root about partitions (TLFS chapters 4-7).
//!
//! Input is copied before it is looked at, each element once. Rep calls do a bounded number of elements and say
//! how many; the caller goes on from there (TLFS 3.7).

use core::mem::offset_of;

use hv_abi::boot::BootInfo;
use hv_abi::hypercall::{code, result, Control, ANY_VP, PARTITION_SELF, ROOT_PARTITION};
use hv_abi::layout::PAGE_SIZE;
use hv_abi::partition::{
    unmap, vp_state, AssertVirtualInterrupt, CpuidLeaf, CreatePartition, CreateVp, DeleteVp,
    GetPartitionProperty, GetVpCpuidValues, InstallIntercept, MapGpaPages, MapVpStatePage,
    PartitionId, PostMessageDirect, RegisterAssoc, RegisterInterceptResult, SetPartitionProperty,
    SignalEventDirect, TranslateResult, TranslateVirtualAddress, UnmapGpaPages, UnmapVpStatePage,
    VpRegisters, VpState, WithdrawMemory,
};
use hv_abi::status::HvStatus;
use hv_x86::paging::PageSize;

use crate::apic::{DeliveryMode, Destination, Interrupt};
use crate::arch::memory::{read_value, write_value, Window};
use crate::arch::object::Ownership;
use crate::child;
use crate::child_emulate as emulate;
use crate::child_synic::{self, Kind};
use crate::partition::{self, InUse, Partition};
use crate::registers::SetGroup;
use crate::slat::{page_size, Page};
use crate::synic::Message;
use crate::vp::{Vp, VpCore};

/// Elements of a rep call that one call does at most: bounds the time with interrupts off.
const REPS_AT_A_TIME: u16 = 128;
/// The same for large pages: each may be 512 pages to look at.
const LARGE_PAGES_AT_A_TIME: u16 = 16;

/// Parameters of one call.
pub struct Call<'a> {
    /// Facts of the machine.
    pub info: &'a BootInfo,
    /// CPU number.
    pub cpu: u32,
    /// Control word.
    pub control: Control,
    /// GPA of the input.
    pub input: u64,
    /// GPA of the output.
    pub output: u64,
    /// Brings the registers of a VP that this CPU owns out of its control structure.
    pub pull: fn(u64, &mut VpCore),
    /// First parameter of `pull`: SPA of the root's VMCS.
    pub root_control: u64,
}

type Outcome = Result<(), HvStatus>;

impl Call<'_> {
    /// Does the call; RAX.
    pub fn run(&self) -> u64 {
        if let Err(status) = self.check_pages() {
            return result(status, 0);
        }
        let (outcome, done) = self.dispatch();
        result(outcome.err().unwrap_or(HvStatus::SUCCESS), done)
    }

    /// Parameters lie in memory of the root, aligned to 8 bytes (TLFS 3.6).
    fn check_pages(&self) -> Outcome {
        for gpa in [self.input, self.output] {
            if gpa & 7 != 0 {
                return Err(HvStatus::INVALID_ALIGNMENT);
            }
            let page = gpa & !(PAGE_SIZE - 1);
            if gpa != 0
                && !partition::with_shared(self.info, |shared| shared.is_roots(self.info, page))
            {
                return Err(HvStatus::INVALID_PARAMETER);
            }
        }
        Ok(())
    }

    /// Copies the input at `offset`.
    fn read<T: Copy + Default>(&self, offset: u64) -> Result<T, HvStatus> {
        let start = self.input & (PAGE_SIZE - 1);
        if self.input == 0 || start + offset + size_of::<T>() as u64 > PAGE_SIZE {
            return Err(HvStatus::INVALID_HYPERCALL_INPUT);
        }
        Ok(read_value(self.cpu, Window::Input, self.input + offset))
    }

    /// Writes the output at `offset`.
    fn write<T: Copy>(&self, offset: u64, value: &T) -> Outcome {
        let start = self.output & (PAGE_SIZE - 1);
        if self.output == 0 || start + offset + size_of::<T>() as u64 > PAGE_SIZE {
            return Err(HvStatus::INVALID_HYPERCALL_INPUT);
        }
        write_value(self.cpu, Window::Output, self.output + offset, value);
        Ok(())
    }

    /// Runs `each` for the reps of this call and returns how many are done in all.
    fn reps(&self, each: impl FnMut(u64) -> Outcome) -> (Outcome, u16) {
        self.reps_of(REPS_AT_A_TIME, each)
    }

    /// The same for pages of guest memory from page number `base` on; `each` gets the GPA, too.
    fn page_reps(
        &self,
        base: u64,
        size: PageSize,
        mut each: impl FnMut(u64, u64) -> Outcome,
    ) -> (Outcome, u16) {
        let limit = match size {
            PageSize::Size4K => REPS_AT_A_TIME,
            _ => LARGE_PAGES_AT_A_TIME,
        };
        self.reps_of(limit, |rep| {
            let gpa = page_address(base)?
                .checked_add(rep * size.bytes())
                .ok_or(HvStatus::INVALID_PARAMETER)?;
            each(rep, gpa)
        })
    }

    fn reps_of(&self, limit: u16, mut each: impl FnMut(u64) -> Outcome) -> (Outcome, u16) {
        let (start, count) = (self.control.rep_start(), self.control.rep_count());
        if count == 0 || start >= count {
            return (Err(HvStatus::INVALID_HYPERCALL_INPUT), 0);
        }
        let end = count.min(start.saturating_add(limit));
        for rep in start..end {
            if let Err(status) = each(rep.into()) {
                return (Err(status), rep);
            }
        }
        (Ok(()), end)
    }

    fn dispatch(&self) -> (Outcome, u16) {
        match self.control.code() {
            code::DEPOSIT_MEMORY => self.deposit(),
            code::WITHDRAW_MEMORY => self.withdraw(),
            code::MAP_GPA_PAGES => self.map(),
            code::UNMAP_GPA_PAGES => self.unmap(),
            code::GET_VP_REGISTERS => self.get_registers(),
            code::SET_VP_REGISTERS => self.set_registers(),
            code::GET_VP_CPUID_VALUES => self.cpuid_values(),
            other => (self.simple(other), 0),
        }
    }

    fn simple(&self, number: u16) -> Outcome {
        match number {
            code::CREATE_PARTITION => self.create(),
            code::INITIALIZE_PARTITION => self.partition()?.initialize(self.info),
            code::FINALIZE_PARTITION => self.partition()?.finalize(self.info),
            code::DELETE_PARTITION => {
                let input: PartitionId = self.read(0)?;
                partition::delete(self.info, input.partition_id)
            }
            code::GET_PARTITION_PROPERTY => self.get_property(),
            code::SET_PARTITION_PROPERTY => self.set_property(),
            code::GET_PARTITION_PROPERTY_EX => self.get_property_ex(),
            code::CREATE_VP => self.create_vp(),
            code::DELETE_VP => self.delete_vp(),
            code::INSTALL_INTERCEPT => self.install_intercept(),
            code::TRANSLATE_VIRTUAL_ADDRESS => self.translate(),
            code::REGISTER_INTERCEPT_RESULT => self.register_result(),
            code::ASSERT_VIRTUAL_INTERRUPT => self.assert_interrupt(),
            code::SIGNAL_EVENT_DIRECT => self.signal_event(),
            code::POST_MESSAGE_DIRECT => self.post_message(),
            code::MAP_VP_STATE_PAGE => self.map_state_page(),
            code::UNMAP_VP_STATE_PAGE => self.unmap_state_page(),
            code::GET_VP_STATE => self.get_state(),
            code::SET_VP_STATE => self.set_state(),
            _ => Err(HvStatus::INVALID_HYPERCALL_CODE),
        }
    }

    /// The partition that the first word of the input names.
    fn partition(&self) -> Result<InUse, HvStatus> {
        let input: PartitionId = self.read(0)?;
        partition::find(input.partition_id)
    }

    fn create(&self) -> Outcome {
        let input: CreatePartition = self.read(0)?;
        if input.isolation_properties != 0 {
            return Err(HvStatus::INVALID_PARAMETER);
        }
        let id = partition::create(self.info, emulate::new_partition_state(self.info, &input))?;
        self.write(0, &id)
    }

    fn deposit(&self) -> (Outcome, u16) {
        let input: PartitionId = match self.read(0) {
            Ok(input) => input,
            Err(status) => return (Err(status), 0),
        };
        let target = match input.partition_id {
            ROOT_PARTITION | PARTITION_SELF => None,
            id => match partition::find(id) {
                Ok(found) => Some(found),
                Err(status) => return (Err(status), 0),
            },
        };
        self.reps(|rep| {
            let page: u64 = self.read(8 + 8 * rep)?;
            partition::deposit(self.info, target.as_deref(), page_address(page)?)
        })
    }

    fn withdraw(&self) -> (Outcome, u16) {
        let found = self
            .read::<WithdrawMemory>(0)
            .and_then(|input| partition::find(input.partition_id));
        let target = match found {
            Ok(target) => target,
            Err(status) => return (Err(status), 0),
        };
        self.reps(|rep| match partition::withdraw(self.info, &target)? {
            Some(page) => self.write(8 * rep, &(page / PAGE_SIZE)),
            None => Err(HvStatus::NO_RESOURCES),
        })
    }

    fn map(&self) -> (Outcome, u16) {
        let found = self
            .read::<MapGpaPages>(0)
            .and_then(|input| Ok((input, partition::find(input.target_partition_id)?)));
        let (input, target) = match found {
            Ok(found) => found,
            Err(status) => return (Err(status), 0),
        };
        let page = Page::from_flags(input.map_flags);
        self.page_reps(input.target_gpa_base, page.size, |rep, gpa| {
            let spa: u64 = self.read(size_of::<MapGpaPages>() as u64 + 8 * rep)?;
            target.map(self.info, gpa, page_address(spa)?, page)
        })
    }

    fn unmap(&self) -> (Outcome, u16) {
        let found = self
            .read::<UnmapGpaPages>(0)
            .and_then(|input| Ok((input, partition::find(input.target_partition_id)?)));
        let (input, target) = match found {
            Ok(found) => found,
            Err(status) => return (Err(status), 0),
        };
        let size = page_size(input.unmap_flags & unmap::LARGE_PAGE != 0);
        self.page_reps(input.target_gpa_base, size, |_, gpa| {
            target.unmap(gpa, size)
        })
    }

    fn get_property(&self) -> Outcome {
        let input: GetPartitionProperty = self.read(0)?;
        let value = if is_self(input.partition_id) {
            emulate::host_property(self.info, input.property_code)?
        } else {
            let target = partition::find(input.partition_id)?;
            let inner = target.inner.lock();
            emulate::partition_property(&inner.state, input.property_code)?
        };
        self.write(0, &value)
    }

    fn set_property(&self) -> Outcome {
        let input: SetPartitionProperty = self.read(0)?;
        if is_self(input.partition_id) {
            return Err(HvStatus::OPERATION_DENIED);
        }
        let target = partition::find(input.partition_id)?;
        emulate::set_property(self.cpu, &target, input.property_code, input.value)
    }

    fn get_property_ex(&self) -> Outcome {
        let input: SetPartitionProperty = self.read(0)?;
        let (value, words) = emulate::property_ex(input.property_code)?;
        for (index, word) in value.iter().take(words).enumerate() {
            self.write(8 * index as u64, word)?;
        }
        Ok(())
    }

    fn create_vp(&self) -> Outcome {
        let input: CreateVp = self.read(0)?;
        let target = partition::find(input.partition_id)?;
        target.create_vp(target.handle(), input.vp_index, |inner| {
            emulate::new_vp(self.info, &inner.state, input.vp_index)
        })?;
        // The extended state starts as FNINIT and LDMXCSR leave it.
        let (vp, mut core) = self.own(&target, input.vp_index)?;
        emulate::reset_xsave(core.xsave);
        let mut inner = target.inner.lock();
        emulate::View::new(self.info, vp, &mut core, &mut inner.state).update_features();
        Ok(())
    }

    fn delete_vp(&self) -> Outcome {
        let input: DeleteVp = self.read(0)?;
        let target = partition::find(input.partition_id)?;
        target.delete_vp(self.info, input.vp_index)
    }

    /// Takes a VP that nobody runs.
    fn own<'p>(
        &self,
        target: &'p Partition,
        index: u32,
    ) -> Result<(&'p Vp, Ownership<'p, VpCore>), HvStatus> {
        let vp = target.vp(index)?;
        let mut core = vp.core.acquire().ok_or(HvStatus::INVALID_VP_STATE)?;
        (self.pull)(self.root_control, &mut core);
        Ok((vp, core))
    }

    fn registers<T: Copy + Default>(
        &self,
        element: u64,
        mut each: impl FnMut(u64, T, &mut emulate::View<'_>) -> Outcome,
        changes: bool,
    ) -> (Outcome, u16) {
        let found = self
            .read::<VpRegisters>(0)
            .and_then(|input| Ok((input, partition::find(input.partition_id)?)));
        let (input, target) = match found {
            Ok(found) => found,
            Err(status) => return (Err(status), 0),
        };
        let (vp, mut core) = match self.own(&target, input.vp_index) {
            Ok(owned) => owned,
            Err(status) => return (Err(status), 0),
        };
        let mut inner = target.inner.lock();
        let mut view = emulate::View::new(self.info, vp, &mut core, &mut inner.state);
        view.absorb_register_page();
        let answer = self.reps(|rep| {
            let value: T = self.read(size_of::<VpRegisters>() as u64 + element * rep)?;
            each(rep, value, &mut view)
        });
        if changes {
            view.publish();
        }
        answer
    }

    fn get_registers(&self) -> (Outcome, u16) {
        self.registers::<u32>(
            4,
            |rep, name, view| {
                let value = view.get(name)?;
                self.write(16 * rep, &value)
            },
            false,
        )
    }

    fn set_registers(&self) -> (Outcome, u16) {
        let mut group = SetGroup::default();
        let count = u64::from(self.control.rep_count());
        self.registers::<RegisterAssoc>(
            32,
            |rep, assoc, view| {
                // What reaches guest memory or the APIC takes effect at the next entry, which looks at the state.
                let _ = view.set(assoc.name, assoc.value)?;
                group.note(assoc.name);
                if rep + 1 == count {
                    view.end_group(&group);
                }
                Ok(())
            },
            true,
        )
    }

    fn cpuid_values(&self) -> (Outcome, u16) {
        let found = self
            .read::<GetVpCpuidValues>(0)
            .and_then(|input| Ok((input, partition::find(input.partition_id)?)));
        let (input, target) = match found {
            Ok(found) => found,
            Err(status) => return (Err(status), 0),
        };
        let (vp, mut core) = match self.own(&target, input.vp_index) {
            Ok(owned) => owned,
            Err(status) => return (Err(status), 0),
        };
        let mut inner = target.inner.lock();
        let mut view = emulate::View::new(self.info, vp, &mut core, &mut inner.state);
        self.reps(|rep| {
            let leaf: CpuidLeaf = self
                .read(size_of::<GetVpCpuidValues>() as u64 + size_of::<CpuidLeaf>() as u64 * rep)?;
            self.write(16 * rep, &view.cpuid(leaf.eax, leaf.ecx))
        })
    }

    /// Intercepts of CPUID are accepted: it exits anyway, and the VMM registers results.
    fn install_intercept(&self) -> Outcome {
        let input: InstallIntercept = self.read(0)?;
        partition::find(input.partition_id)?;
        const CPUID: u32 = 2;
        match input.intercept_type {
            CPUID if input.access_mask & !4 == 0 => Ok(()),
            _ => Err(HvStatus::INVALID_PARAMETER),
        }
    }

    fn translate(&self) -> Outcome {
        let input: TranslateVirtualAddress = self.read(0)?;
        let target = partition::find(input.partition_id)?;
        let (_, core) = self.own(&target, input.vp_index)?;
        let (result_code, gpa_page) = emulate::translate(
            self.cpu,
            &target,
            &core,
            input.gva_page,
            input.control_flags,
        );
        self.write(
            0,
            &TranslateResult {
                result_code,
                cache_type: 6,
                gpa_page,
            },
        )
    }

    fn register_result(&self) -> Outcome {
        let input: RegisterInterceptResult = self.read(0)?;
        let target = partition::find(input.partition_id)?;
        const CPUID: u32 = 2;
        if input.intercept_type != CPUID {
            return Err(HvStatus::INVALID_PARAMETER);
        }
        if input.vp_index != ANY_VP {
            return self.register_on(&target, input.vp_index, &input);
        }
        for vp in target.vps() {
            self.register_on(&target, vp.index, &input)?;
        }
        Ok(())
    }

    fn register_on(
        &self,
        target: &Partition,
        index: u32,
        input: &RegisterInterceptResult,
    ) -> Outcome {
        let (vp, mut core) = self.own(target, index)?;
        let mut inner = target.inner.lock();
        emulate::View::new(self.info, vp, &mut core, &mut inner.state).register_cpuid(input)
    }

    fn assert_interrupt(&self) -> Outcome {
        let input: AssertVirtualInterrupt = self.read(0)?;
        let target = partition::find(input.partition_id)?;
        let kind = input.control as u32;
        let logical = input.control >> 33 & 1 != 0;
        let level = input.control >> 32 & 1 != 0;
        let end_counts = input.control >> 34 & 1 != 0;
        let vector = u8::try_from(input.vector).map_err(|_| HvStatus::INVALID_PARAMETER)?;
        let mode = DeliveryMode::from_bits(kind).ok_or(HvStatus::INVALID_PARAMETER)?;
        if mode.goes_through_irr() && vector < 16 {
            return Err(HvStatus::INVALID_PARAMETER);
        }
        let destination = match u8::try_from(input.dest_addr) {
            Ok(id) => Destination::from_xapic(id, logical),
            Err(_) => Destination::from_x2apic(input.dest_addr as u32, logical),
        };
        let mut found = false;
        for vp in target
            .vps()
            .filter(|vp| vp.posted.matches(destination, false))
        {
            if level && !end_counts {
                vp.posted.hide_trigger_modes();
            }
            child::post(
                vp,
                Interrupt {
                    mode,
                    vector,
                    level,
                },
            );
            found = true;
            if mode == DeliveryMode::LowestPriority {
                break;
            }
        }
        // A message to nobody is lost, as on the bus.
        let _ = found;
        Ok(())
    }

    fn signal_event(&self) -> Outcome {
        let input: SignalEventDirect = self.read(0)?;
        let target = partition::find(input.target_partition)?;
        let vp = target.vp(input.target_vp)?;
        only_vtl_0(input.target_vtl)?;
        let new = child_synic::signal_event(
            self.cpu,
            &target,
            vp,
            input.target_sint.into(),
            input.flag_number,
        )?;
        self.write(0, &u64::from(new))
    }

    fn post_message(&self) -> Outcome {
        let input: PostMessageDirect = self.read(0)?;
        let message: Message = self.read(offset_of!(PostMessageDirect, message_type) as u64)?;
        let target = partition::find(input.partition_id)?;
        let vp = target.vp(input.vp_index)?;
        only_vtl_0(input.vtl)?;
        child_synic::post_message(self.cpu, &target, vp, input.sint_index as usize, &message)
    }

    fn map_state_page(&self) -> Outcome {
        let input: MapVpStatePage = self.read(0)?;
        let target = partition::find(input.partition_id)?;
        if input.flags & 1 == 0 {
            return Err(HvStatus::INVALID_PARAMETER);
        }
        let page = page_address(input.requested_map_location)?;
        let (vp, mut core) = self.own(&target, input.vp_index)?;
        let index = state_page_index(input.page_type)?;
        Partition::set_state_page(self.info, vp, &mut core, index, page)?;
        let mut inner = target.inner.lock();
        emulate::View::new(self.info, vp, &mut core, &mut inner.state).publish();
        drop(inner);
        self.write(0, &input.requested_map_location)
    }

    fn unmap_state_page(&self) -> Outcome {
        let input: UnmapVpStatePage = self.read(0)?;
        let target = partition::find(input.partition_id)?;
        let (vp, mut core) = self.own(&target, input.vp_index)?;
        Partition::set_state_page(
            self.info,
            vp,
            &mut core,
            state_page_index(input.page_type)?,
            0,
        )
    }

    /// The first page of the list that follows the structure.
    fn state_buffer(&self) -> Result<u64, HvStatus> {
        let page = page_address(self.read(size_of::<VpState>() as u64)?)?;
        if partition::with_shared(self.info, |shared| shared.is_roots(self.info, page)) {
            Ok(page)
        } else {
            Err(HvStatus::INVALID_PARAMETER)
        }
    }

    fn get_state(&self) -> Outcome {
        let input: VpState = self.read(0)?;
        let target = partition::find(input.partition_id)?;
        let (vp, mut core) = self.own(&target, input.vp_index)?;
        if let Some(kind) = synic_page(input.state_type) {
            emulate::get_synic_page(self.cpu, vp, &core, kind, self.state_buffer()?);
            return Ok(());
        }
        let mut inner = target.inner.lock();
        let mut view = emulate::View::new(self.info, vp, &mut core, &mut inner.state);
        view.absorb_register_page();
        match input.state_type {
            vp_state::SYNTHETIC_TIMERS => self.write(0, &view.get_timers()),
            vp_state::LAPIC => view.get_lapic(self.cpu, self.state_buffer()?),
            vp_state::XSAVE => view.get_xsave(self.cpu, self.state_buffer()?),
            _ => Err(HvStatus::INVALID_PARAMETER),
        }
    }

    fn set_state(&self) -> Outcome {
        let input: VpState = self.read(0)?;
        let target = partition::find(input.partition_id)?;
        let (vp, mut core) = self.own(&target, input.vp_index)?;
        if let Some(kind) = synic_page(input.state_type) {
            emulate::set_synic_page(self.cpu, vp, &core, kind, self.state_buffer()?);
            // The next entry delivers what is there.
            core.dirty = true;
            return Ok(());
        }
        let mut inner = target.inner.lock();
        let mut view = emulate::View::new(self.info, vp, &mut core, &mut inner.state);
        view.absorb_register_page();
        match input.state_type {
            vp_state::SYNTHETIC_TIMERS => view.set_timers(&self.read(size_of::<VpState>() as u64)?),
            vp_state::LAPIC => view.set_lapic(self.cpu, self.state_buffer()?),
            vp_state::XSAVE => view.set_xsave(self.cpu, self.state_buffer()?),
            _ => Err(HvStatus::INVALID_PARAMETER),
        }?;
        view.publish();
        Ok(())
    }
}

/// Other trust levels than the lowest do not exist.
fn only_vtl_0(vtl: u8) -> Outcome {
    if vtl == 0 {
        Ok(())
    } else {
        Err(HvStatus::INVALID_PARAMETER)
    }
}

fn synic_page(state: u32) -> Option<Kind> {
    match state {
        vp_state::SIM_PAGE => Some(Kind::Messages),
        vp_state::SIEF_PAGE => Some(Kind::Flags),
        _ => None,
    }
}

fn is_self(id: u64) -> bool {
    id == PARTITION_SELF || id == ROOT_PARTITION
}

/// Address of a page number.
fn page_address(number: u64) -> Result<u64, HvStatus> {
    number
        .checked_mul(PAGE_SIZE)
        .ok_or(HvStatus::INVALID_PARAMETER)
}

fn state_page_index(kind: u16) -> Result<usize, HvStatus> {
    use hv_abi::hypercall::state_page;
    match kind {
        state_page::REGISTERS => Ok(0),
        state_page::INTERCEPT_MESSAGE => Ok(1),
        state_page::RUN => Ok(partition::RUN_PAGE),
        _ => Err(HvStatus::INVALID_PARAMETER),
    }
}
