// SPDX-License-Identifier: GPL-2.0
//! The partition on `/dev/mshv`: creation, memory, VPs, interrupts. Nothing here decides anything.

use crate::device::{Interrupt, InterruptSink};
use crate::layout::{self, PAGE};
use crate::vp::message::Intercept;
use crate::vp::reg::{Reg, RegValue, Segment};
use crate::vp::{Run, Vp, VpResult};
use crate::{Error, Result};
use mshv_bindings as hv;
use mshv_ioctls::{InterruptRequest, Mshv, MshvError, VcpuFd, VmFd};
use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use vm_memory::{
    Address, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress,
};

/// Bytes of a large second-level mapping.
const LARGE_PAGE: u64 = 2 * layout::MIB;

/// Times that creation is repeated when a signal interrupts it.
const CREATE_TRIES: usize = 16;

/// Makes guest memory of `memory` bytes, in anonymous pages that the kernel fills on first use.
pub fn guest_memory(memory: u64) -> Result<GuestMemoryMmap> {
    let fail = |why: String| Error::HostMemory {
        mib: memory / layout::MIB,
        why,
    };
    // The kernel lets mappings begin at 2 MiB whose size is a multiple of that: the rest of an odd size is one by itself.
    let ranges: Vec<_> = layout::ram(memory)
        .iter()
        .flat_map(|r| {
            let rest = r.size % LARGE_PAGE;
            let whole = r.size - rest;
            [(r.start, whole), (r.start + whole, rest)]
        })
        .filter(|(_, size)| *size != 0)
        .map(|(start, size)| (GuestAddress(start), size as usize))
        .collect();
    let mem = GuestMemoryMmap::from_ranges(&ranges).map_err(|e| fail(e.to_string()))?;
    for region in mem.iter() {
        let at = region
            .get_host_address(MemoryRegionAddress(0))
            .map_err(|e| fail(e.to_string()))?;
        // Both are wishes: large pages make large second-level mappings, a forked child needs no copy.
        for advice in [libc::MADV_HUGEPAGE, libc::MADV_DONTFORK] {
            // SAFETY: the range is exactly one live mapping of this process; neither advice changes its contents.
            unsafe { libc::madvise(at.cast(), region.len() as usize, advice) };
        }
    }
    Ok(mem)
}

/// A child partition.
pub struct Partition {
    vm: Arc<VmFd>,
    /// Kept alive as long as the partition maps it.
    _memory: GuestMemoryMmap,
}

impl Partition {
    /// Creates and initializes a partition with the crate's default features, and maps its memory.
    pub fn create(device: &Path, memory: &GuestMemoryMmap) -> Result<Self> {
        let mshv = open(device)?;
        // The crate's helper panics if these are refused; ask first, so that the refusal gets a sentence.
        let refused = |what: &str| {
            let what = what.to_owned();
            move |e: MshvError| Error::hypervisor(what, e)
        };
        for code in [
            hv::hv_partition_property_code_HV_PARTITION_PROPERTY_PROCESSOR_FEATURES0,
            hv::hv_partition_property_code_HV_PARTITION_PROPERTY_PROCESSOR_FEATURES1,
        ] {
            mshv.get_host_partition_property(code)
                .map_err(refused("tell the processor features"))?;
        }
        mshv.get_vmm_caps()
            .map_err(refused("tell its capabilities"))?;

        let vm = create(&mshv).map_err(refused("create a partition"))?;
        vm.initialize()
            .map_err(refused("initialize the partition"))?;
        // As every client does: an unknown MSR reads as zero instead of raising #GP.
        vm.set_partition_property(
            hv::hv_partition_property_code_HV_PARTITION_PROPERTY_UNIMPLEMENTED_MSR_ACTION,
            hv::hv_unimplemented_msr_action_HV_UNIMPLEMENTED_MSR_ACTION_IGNORE_WRITE_READ_ZERO
                .into(),
        )
        .map_err(refused("ignore unknown MSRs"))?;

        for region in memory.iter() {
            let at = region
                .get_host_address(MemoryRegionAddress(0))
                .map_err(|e| Error::hypervisor("map guest memory", e))?;
            let start = region.start_addr().raw_value();
            let request = hv::mshv_user_mem_region {
                size: region.len(),
                guest_pfn: start / PAGE,
                userspace_addr: at as u64,
                flags: (1 << hv::MSHV_SET_MEM_BIT_WRITABLE)
                    | (1 << hv::MSHV_SET_MEM_BIT_EXECUTABLE),
                ..Default::default()
            };
            vm.map_user_memory(request)
                .map_err(refused(&format!("map guest memory at {start:#x}")))?;
        }
        Ok(Partition {
            vm: Arc::new(vm),
            _memory: memory.clone(),
        })
    }

    /// Tells the hypervisor the topology, for the CPUID leaves it makes by itself. It may not know the property.
    pub fn set_vps_per_socket(&self, vps: u32) {
        let code = hv::hv_partition_property_code_HV_PARTITION_PROPERTY_PROCESSORS_PER_SOCKET;
        let _unknown = self.vm.set_partition_property(code, vps.into());
    }

    /// Creates a VP.
    pub fn create_vp(&self, index: u8) -> Result<MshvVp> {
        let fd = self
            .vm
            .create_vcpu(index)
            .map_err(|e| Error::hypervisor(format!("create VP {index}"), e))?;
        Ok(MshvVp {
            fd,
            message: hv::hv_message::default(),
        })
    }

    /// The partition's descriptor, for what only some users of a partition need.
    pub fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// Where devices send interrupts.
    pub fn interrupts(&self) -> Arc<dyn InterruptSink> {
        Arc::new(Interrupts(self.vm.clone()))
    }
}

fn open(device: &Path) -> Result<Mshv> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC)
        .open(device)
        .map_err(|e| Error::device(device, e))?;
    // SAFETY: the descriptor is open and its ownership passes to the crate's object.
    Ok(unsafe { Mshv::new_with_fd_number(file.into_raw_fd()) })
}

fn create(mshv: &Mshv) -> std::result::Result<VmFd, MshvError> {
    let mut last = mshv.create_vm();
    for _ in 1..CREATE_TRIES {
        match last {
            Err(e) if e.errno() == libc::EINTR => last = mshv.create_vm(),
            _ => break,
        }
    }
    last
}

struct Interrupts(Arc<VmFd>);

impl InterruptSink for Interrupts {
    fn assert(&self, interrupt: Interrupt) {
        let request = InterruptRequest {
            interrupt_type: interrupt.mode.into(),
            apic_id: interrupt.destination.into(),
            vector: interrupt.vector.into(),
            level_triggered: interrupt.level,
            logical_destination_mode: interrupt.logical,
            long_mode: false,
        };
        // A guest can program nonsense; the bus drops it as hardware does.
        let _dropped = self.0.request_virtual_interrupt(&request);
    }
}

/// A VP of the real hypervisor.
pub struct MshvVp {
    fd: VcpuFd,
    /// The last one.
    message: hv::hv_message,
}

/// `MSHV_RUN_VP`: `_IOR(0xb8, 0, struct mshv_run_vp)`.
const RUN_VP: libc::Ioctl = 0x8100_b800_u32 as libc::Ioctl;

/// Dirty groups of the register page: general registers, RIP, RFLAGS.
const DIRTY_GENERAL: u32 = 1 << 0;
const DIRTY_RIP: u32 = 1 << 1;
const DIRTY_RFLAGS: u32 = 1 << 4;

/// Position of RIP behind the 16 general registers.
const SLOT_RIP: usize = 16;

impl MshvVp {
    /// Runs the VP. Its message, or nothing if a signal came or the kernel let go of it.
    #[inline]
    pub fn run_to_message(&mut self) -> VpResult<Option<&hv::hv_message>> {
        // The crate's function copies the message twice.
        // SAFETY: a VP's descriptor, and a whole message for the kernel to write.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), RUN_VP, &raw mut self.message) };
        if result == 0 {
            return Ok(Some(&self.message));
        }
        let error = std::io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR | libc::EAGAIN) => Ok(None),
            _ => Err(format!("running the VP failed: {error}")),
        }
    }

    /// The register page, if there is one and it is valid now.
    fn page(&self) -> Option<*mut hv::hv_vp_register_page> {
        let page = self.fd.get_vp_reg_page()?.0;
        // SAFETY: the crate mapped a whole page when it created the VP and keeps it mapped; the kernel writes the
        // page only while this thread is in an ioctl on the VP.
        let valid = unsafe { std::ptr::addr_of!((*page).isvalid).read_volatile() } != 0;
        valid.then_some(page)
    }

    /// Address of a general register, RIP or RFLAGS in the page.
    fn slot(page: *mut hv::hv_vp_register_page, slot: usize) -> *mut u64 {
        debug_assert!(slot < 18);
        // SAFETY: the union is an array of 18 words, `slot` is below 18.
        unsafe {
            std::ptr::addr_of_mut!((*page).__bindgen_anon_1)
                .cast::<u64>()
                .add(slot)
        }
    }

    /// Writes registers through the page; `false` if one of them is not in it.
    fn set_by_page(&self, values: &[(Reg, RegValue)]) -> bool {
        let Some(page) = self.page() else {
            return false;
        };
        let mut dirty = 0;
        for (reg, value) in values {
            // What was written before counts only with its dirty bit.
            let Some(slot) = reg.page_slot() else {
                return false;
            };
            // SAFETY: see `page`; the slot is aligned and inside the page.
            unsafe { Self::slot(page, slot).write_volatile(value.word()) };
            dirty |= match slot {
                0..SLOT_RIP => DIRTY_GENERAL,
                SLOT_RIP => DIRTY_RIP,
                _ => DIRTY_RFLAGS,
            };
        }
        // SAFETY: see `page`; nobody else writes the page between two runs.
        unsafe {
            let at = std::ptr::addr_of_mut!((*page).dirty);
            at.write_volatile(at.read_volatile() | dirty);
        }
        true
    }

    /// Reads registers through the page, if all of them are in it.
    fn get_by_page(&self, names: &[Reg]) -> Option<Vec<u64>> {
        let page = self.page()?;
        let slots: Option<Vec<usize>> = names.iter().map(|reg| reg.page_slot()).collect();
        let read = |slot| {
            // SAFETY: see `page`; the slot is aligned and inside the page.
            unsafe { Self::slot(page, slot).read_volatile() }
        };
        Some(slots?.into_iter().map(read).collect())
    }

    fn get_values(&self, names: &[Reg]) -> VpResult<Vec<hv::hv_register_value>> {
        let mut list: Vec<_> = names
            .iter()
            .map(|reg| hv::hv_register_assoc {
                name: reg.0,
                ..Default::default()
            })
            .collect();
        self.fd
            .get_reg(&mut list)
            .map_err(|e| format!("reading registers failed: {e}"))?;
        Ok(list.iter().map(|assoc| assoc.value).collect())
    }
}

impl Vp for MshvVp {
    fn run(&mut self) -> VpResult<Run> {
        Ok(match self.run_to_message()? {
            Some(message) => Run::Intercept(Intercept::from(message)),
            None => Run::Interrupted,
        })
    }

    fn get(&mut self, names: &[Reg]) -> VpResult<Vec<u64>> {
        if let Some(values) = self.get_by_page(names) {
            return Ok(values);
        }
        let values = self.get_values(names)?;
        // SAFETY: the crate zeroes all 128 bits before the call, every pattern is a valid word.
        Ok(values.iter().map(|v| unsafe { v.reg64 }).collect())
    }

    fn set(&mut self, values: &[(Reg, RegValue)]) -> VpResult<()> {
        if self.set_by_page(values) {
            return Ok(());
        }
        let list: Vec<_> = values
            .iter()
            .map(|(reg, value)| hv::hv_register_assoc {
                name: reg.0,
                value: (*value).into(),
                ..Default::default()
            })
            .collect();
        self.fd
            .set_reg(&list)
            .map_err(|e| format!("setting registers failed: {e}"))
    }

    fn segment(&mut self, name: Reg) -> VpResult<Segment> {
        let values = self.get_values(&[name])?;
        // SAFETY: a segment is plain integers within the zeroed 128 bits.
        Ok(unsafe { values[0].segment }.into())
    }

    fn translate(&mut self, gva: u64, write: bool) -> VpResult<Option<u64>> {
        const READ: u64 = hv::HV_TRANSLATE_GVA_VALIDATE_READ as u64;
        const WRITE: u64 = hv::HV_TRANSLATE_GVA_VALIDATE_WRITE as u64;
        let flags = if write { WRITE } else { READ };
        let (gpa, result) = self
            .fd
            .translate_gva(gva, flags)
            .map_err(|e| format!("translating {gva:#x} failed: {e}"))?;
        // SAFETY: the union is a u64 and its parts; the hypervisor or `Default` wrote it whole.
        let code = unsafe { result.__bindgen_anon_1.result_code };
        Ok((code == hv::hv_translate_gva_result_code_HV_TRANSLATE_GVA_SUCCESS).then_some(gpa))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn guest_memory_has_the_layout_of_the_map() {
        let mem = guest_memory(64 * layout::MIB).unwrap();
        assert_eq!(mem.num_regions(), 1);
        assert_eq!(
            mem.read_obj::<u64>(GuestAddress(64 * layout::MIB - 8))
                .unwrap(),
            0
        );
    }

    #[test]
    fn rest_of_an_odd_size_is_a_region_by_itself() {
        let mem = guest_memory(7 * layout::MIB + PAGE).unwrap();
        let sizes: Vec<_> = mem.iter().map(|region| region.len()).collect();
        assert_eq!(sizes, [6 * layout::MIB, layout::MIB + PAGE]);
        let across = GuestAddress(6 * layout::MIB - 4);
        mem.write_obj(0x1234_5678_9abc_def0_u64, across).unwrap();
        assert_eq!(mem.read_obj::<u64>(across).unwrap(), 0x1234_5678_9abc_def0);
    }

    #[test]
    fn more_memory_than_there_are_addresses_is_refused_with_a_sentence() {
        let e = guest_memory(1 << 62).unwrap_err().to_string();
        assert!(e.contains("lower --memory"), "{e}");
    }

    #[test]
    fn a_missing_device_and_a_wrong_one_are_told_apart() {
        let mem = guest_memory(16 * layout::MIB).unwrap();
        let e = Partition::create(Path::new("/nonexistent/mshv"), &mem)
            .err()
            .unwrap();
        assert!(matches!(e, Error::NoDevice(_)), "{e}");
        let e = Partition::create(Path::new("/dev/null"), &mem)
            .err()
            .unwrap();
        assert!(matches!(e, Error::Hypervisor { .. }), "{e}");
    }
}
