// SPDX-License-Identifier: GPL-2.0
//! The same guest under KVM, with as little user space around it as possible.

use kvm_bindings::{kvm_segment, kvm_userspace_memory_region, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Address, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;
use vmwp::boot::regs::boot_registers;
use vmwp::layout::SLEEP_CONTROL_PORT;
use vmwp::vp::reg::{Reg, RegValue, Segment};

use crate::guest::{CODE, EVENT_PORT};
use crate::{Host, Result};

/// A virtual machine with one VCPU.
pub struct Kvm {
    vcpu: VcpuFd,
    // Both live as long as the VCPU runs.
    _vm: VmFd,
    _memory: GuestMemoryMmap,
}

impl Kvm {
    /// Creates it on `memory`; writes to [`EVENT_PORT`] signal `event`.
    pub fn new(memory: &GuestMemoryMmap, event: EventFd) -> Result<Self> {
        let kvm = kvm_ioctls::Kvm::new()?;
        let vm = kvm.create_vm()?;
        for (slot, region) in memory.iter().enumerate() {
            let host = region.get_host_address(MemoryRegionAddress(0))?;
            // SAFETY: the memory is kept alive beside the VM.
            unsafe {
                vm.set_user_memory_region(kvm_userspace_memory_region {
                    slot: slot as u32,
                    flags: 0,
                    guest_phys_addr: region.start_addr().raw_value(),
                    memory_size: region.len(),
                    userspace_addr: host as u64,
                })?;
            }
        }
        vm.register_ioevent(&event, &IoEventAddress::Pio(EVENT_PORT.into()), NoDatamatch)?;
        let vcpu = vm.create_vcpu(0)?;
        vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
        Ok(Self {
            vcpu,
            _vm: vm,
            _memory: memory.clone(),
        })
    }

    fn reset(&self) -> Result<()> {
        let mut special = self.vcpu.get_sregs()?;
        let mut general = self.vcpu.get_regs()?;
        for (name, value) in boot_registers(CODE) {
            match (name, value) {
                (_, RegValue::Segment(s)) => {
                    let slot = match name {
                        Reg::CS => &mut special.cs,
                        Reg::DS => &mut special.ds,
                        Reg::ES => &mut special.es,
                        Reg::FS => &mut special.fs,
                        Reg::GS => &mut special.gs,
                        Reg::SS => &mut special.ss,
                        Reg::TR => &mut special.tr,
                        _ => &mut special.ldt,
                    };
                    *slot = segment(s);
                }
                (_, RegValue::Table { base, limit }) => {
                    let slot = if name == Reg::GDTR {
                        &mut special.gdt
                    } else {
                        &mut special.idt
                    };
                    (slot.base, slot.limit) = (base, limit);
                }
                (Reg::CR0, value) => special.cr0 = value.word(),
                (Reg::CR3, value) => special.cr3 = value.word(),
                (Reg::CR4, value) => special.cr4 = value.word(),
                (Reg::EFER, value) => special.efer = value.word(),
                (Reg::RIP, value) => general.rip = value.word(),
                (Reg::RSP, value) => general.rsp = value.word(),
                (Reg::RFLAGS, value) => general.rflags = value.word(),
                _ => {}
            }
        }
        self.vcpu.set_sregs(&special)?;
        Ok(self.vcpu.set_regs(&general)?)
    }
}

fn segment(s: Segment) -> kvm_segment {
    let bit = |number: u16| (s.attributes >> number & 1) as u8;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: (s.attributes & 15) as u8,
        s: bit(4),
        dpl: (s.attributes >> 5 & 3) as u8,
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        unusable: 1 - bit(7),
        padding: 0,
    }
}

impl Host for Kvm {
    fn run(&mut self) -> Result<()> {
        self.reset()?;
        loop {
            match self.vcpu.run()? {
                VcpuExit::IoOut(port, _) if port == SLEEP_CONTROL_PORT => return Ok(()),
                VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..) => {}
                other => return Err(format!("the guest ended with {other:?}").into()),
            }
        }
    }
}
