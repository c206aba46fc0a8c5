// SPDX-License-Identifier: GPL-2.0
//! A small guest in real mode, and the ioctls the crates have no call for.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr;
use std::time::{Duration, Instant};

use mshv_bindings::*;
use mshv_ioctls::{Mshv, VcpuFd, VmFd};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// How long a guest may take to its next message.
const PATIENCE: Duration = Duration::from_secs(30);

/// An ioctl by number, with its argument as a number.
pub fn ioctl(fd: RawFd, command: u64, argument: u64) -> io::Result<i32> {
    // SAFETY: the callers pass addresses of structures of the right size, or wrong ones on purpose, which the
    // kernel refuses.
    match unsafe { libc::ioctl(fd, command as _, argument) } {
        -1 => Err(io::Error::last_os_error()),
        value => Ok(value),
    }
}

/// ID of the only partition.
///
/// # Errors
/// There is none, or no status of `hv_core`.
pub fn only_partition() -> Result<u64> {
    let status = std::fs::read_to_string("/sys/kernel/debug/hv_core/status")?;
    let list = status.split("\"partitions\":[{\"id\":").nth(1);
    let id = list.and_then(|rest| rest.split(',').next());
    Ok(id.ok_or("no partition in the status")?.parse()?)
}

/// A hypercall that the root's kernel makes, by the test module `hv_state`: status and repetitions done (TLFS 3.8).
///
/// # Errors
/// The module is not there, or its answer is not a number.
pub fn hypercall(control: u64, words: &[u64]) -> Result<(u64, u64)> {
    let words: Vec<_> = words.iter().map(|word| format!("{word:x}")).collect();
    std::fs::write(
        "/dev/hv_state",
        format!("hypercall {control:x} {}", words.join(" ")),
    )?;
    let result = std::fs::read_to_string("/sys/module/hv_state/parameters/result")?;
    let result: u64 = result.trim().parse()?;
    Ok((result & 0xffff, result >> 32 & 0xfff))
}

/// The errno of a result, 0 for success.
pub fn errno<T>(result: io::Result<T>) -> i32 {
    result
        .err()
        .and_then(|error| error.raw_os_error())
        .unwrap_or(0)
}

/// Maps one page of a file, and unmaps it again.
pub fn map_page(fd: RawFd, page: i64) -> io::Result<()> {
    let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
    // SAFETY: a new mapping, which nobody uses.
    unsafe {
        let address = libc::mmap(ptr::null_mut(), 4096, access, flags, fd, page * 4096);
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        libc::munmap(address, 4096);
    }
    Ok(())
}

/// A region of guest memory: `size` bytes of ours at `address`, from page `guest_pfn` of the guest on. Of the flags bit 0 is
/// writable, 1 executable, 2 takes the region away again.
pub fn region(guest_pfn: u64, address: u64, size: u64, flags: u8) -> mshv_user_mem_region {
    mshv_user_mem_region {
        size,
        guest_pfn,
        userspace_addr: address,
        flags,
        ..Default::default()
    }
}

/// The errno of mapping or unmapping a region, 0 for success.
pub fn set_memory(vm: &VmFd, region: mshv_user_mem_region) -> i32 {
    errno(ioctl(vm.as_raw_fd(), 0x4020_b802, &raw const region as u64))
}

/// Type of a message.
pub fn kind(message: &hv_message) -> u32 {
    message.header.message_type
}

/// Anonymous memory that nothing is reserved for.
pub struct Memory {
    address: *mut u8,
    size: usize,
}

// SAFETY: it is accessed by copies only, and the guest may change it at any time anyway.
unsafe impl Sync for Memory {}

impl Memory {
    /// Maps it.
    pub fn new(size: usize) -> io::Result<Self> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        Self::map(size, access, libc::MAP_SHARED | libc::MAP_NORESERVE, None)
    }

    /// Maps what a file has from its beginning on, or anonymous memory of this process without one.
    pub fn map(size: usize, access: i32, flags: i32, file: Option<&File>) -> io::Result<Self> {
        let anonymous = if file.is_some() {
            0
        } else {
            libc::MAP_ANONYMOUS
        };
        let fd = file.map_or(-1, AsRawFd::as_raw_fd);
        Self::from_fd(size, access, flags | anonymous, fd, 0)
    }

    /// Maps what a file has from `offset` on, shared with it.
    pub fn map_at(size: usize, offset: i64, access: i32, file: &File) -> io::Result<Self> {
        Self::from_fd(size, access, libc::MAP_SHARED, file.as_raw_fd(), offset)
    }

    fn from_fd(size: usize, access: i32, flags: i32, fd: RawFd, offset: i64) -> io::Result<Self> {
        // SAFETY: a new mapping.
        let address = unsafe { libc::mmap(ptr::null_mut(), size, access, flags, fd, offset) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            address: address.cast(),
            size,
        })
    }

    /// `madvise` of a part.
    pub fn advise(&self, offset: usize, size: usize, advice: i32) -> io::Result<()> {
        assert!(offset + size <= self.size);
        // SAFETY: inside the mapping, of which there are no references.
        match unsafe { libc::madvise(self.address.add(offset).cast(), size, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// `mprotect` of a part. What is forbidden must not be read or written here.
    pub fn protect(&self, offset: usize, size: usize, access: i32) -> io::Result<()> {
        assert!(offset + size <= self.size);
        // SAFETY: inside the mapping; by the note above.
        match unsafe { libc::mprotect(self.address.add(offset).cast(), size, access) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Pages of a part that are there.
    pub fn resident(&self, offset: usize, size: usize) -> io::Result<usize> {
        assert!(offset + size <= self.size);
        let mut pages = vec![0u8; size / 4096];
        // SAFETY: inside the mapping; there is a byte for each page.
        match unsafe { libc::mincore(self.address.add(offset).cast(), size, pages.as_mut_ptr()) } {
            0 => Ok(pages.iter().filter(|page| **page & 1 != 0).count()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Maps memory that begins at a multiple of 2 MiB and consists of huge pages, if the kernel has any. `size` is such a
    /// multiple, too.
    pub fn huge(size: usize) -> io::Result<Self> {
        const HUGE: usize = 2 << 20;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE;
        // SAFETY: a new mapping; only what is not used of it goes away again.
        unsafe {
            let all = libc::mmap(ptr::null_mut(), size + HUGE, access, flags, -1, 0);
            if all == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            let before = all.align_offset(HUGE);
            let address = all.byte_add(before);
            if before != 0 {
                libc::munmap(all, before);
            }
            libc::munmap(address.byte_add(size), HUGE - before);
            libc::madvise(address, size, libc::MADV_HUGEPAGE);
            let address = address.cast();
            Ok(Self { address, size })
        }
    }

    /// Where it is.
    pub fn address(&self) -> u64 {
        self.address as u64
    }

    /// Writes bytes at an offset.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.size);
        // SAFETY: inside the mapping; the guest may write to it too, so no reference is made.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.address.add(offset), bytes.len()) };
    }

    /// Reads the byte at an offset.
    pub fn read(&self, offset: usize) -> u8 {
        assert!(offset < self.size);
        // SAFETY: as above.
        unsafe { self.address.add(offset).read_volatile() }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`.
        unsafe { libc::munmap(self.address.cast(), self.size) };
    }
}

/// A partition with one VP in real mode that starts at 0:0x1000.
pub struct Machine {
    /// The VP.
    pub vcpu: VcpuFd,
    /// The partition.
    pub vm: VmFd,
    /// Guest memory from 0x1000 on, 40 KiB.
    pub memory: Memory,
}

impl Machine {
    /// Makes it, with this code at its start.
    pub fn new(code: &[u8]) -> Result<Self> {
        Self::of(Mshv::new()?.create_vm()?, code)
    }

    /// Makes it of a partition that is not initialized yet.
    pub fn of(vm: VmFd, code: &[u8]) -> Result<Self> {
        vm.initialize()?;
        let vcpu = vm.create_vcpu(0)?;
        let memory = Memory::new(0xa000)?;
        memory.write(0, code);
        vm.map_user_memory(region(1, memory.address(), 0xa000, 3))?;
        prepare(&vcpu)?;
        Ok(Self { vcpu, vm, memory })
    }

    /// Sets registers.
    pub fn set(&self, registers: &[(u32, u64)]) -> Result<()> {
        set(&self.vcpu, registers)
    }

    /// Gives the guest a handler of one vector at 0:`offset`, by a page at 0 with the vector table, and a stack below 0x8000.
    pub fn handle(&self, vector: usize, offset: u16) -> Result<()> {
        let table = Memory::new(0x1000)?;
        table.write(vector * 4, &u32::from(offset).to_le_bytes());
        self.vm
            .map_user_memory(region(0, table.address(), 0x1000, 3))?;
        std::mem::forget(table);
        self.set(&[(hv_register_name_HV_X64_REGISTER_RSP, 0x8000)])
    }

    /// Turns the VP's local APIC on (SVR bit 8).
    pub fn enable_apic(&self) -> Result<()> {
        let mut lapic = self.vcpu.get_lapic()?;
        lapic.regs[0xf1] = 1;
        Ok(self.vcpu.set_lapic(&lapic)?)
    }

    /// Runs until there is a message.
    pub fn next_message(&self) -> Result<hv_message> {
        next_message_of(&self.vcpu)
    }

    /// Runs until the guest writes to a port, and steps over that: port and AL.
    pub fn next_port_write(&self) -> Result<(u16, u64)> {
        next_port_write_of(&self.vcpu)
    }
}

/// Lets a VP start at 0:0x1000.
pub fn prepare(vcpu: &VcpuFd) -> Result<()> {
    let mut segments = [
        hv_register_name_HV_X64_REGISTER_CS,
        hv_register_name_HV_X64_REGISTER_DS,
        hv_register_name_HV_X64_REGISTER_SS,
    ]
    .map(|name| hv_register_assoc {
        name,
        ..Default::default()
    });
    vcpu.get_reg(&mut segments)?;
    for segment in &mut segments {
        segment.value.segment.base = 0;
        segment.value.segment.selector = 0;
    }
    vcpu.set_reg(&segments)?;
    set(
        vcpu,
        &[
            (hv_register_name_HV_X64_REGISTER_RIP, 0x1000),
            (hv_register_name_HV_X64_REGISTER_RFLAGS, 2),
        ],
    )
}

/// Lets a VP run that waits for INIT and SIPI.
pub fn wake(vcpu: &VcpuFd) -> Result<()> {
    set(
        vcpu,
        &[(hv_register_name_HV_REGISTER_INTERNAL_ACTIVITY_STATE, 0)],
    )
}

/// Sets registers of a VP.
pub fn set(vcpu: &VcpuFd, registers: &[(u32, u64)]) -> Result<()> {
    let registers: Vec<_> = registers
        .iter()
        .map(|(name, value)| hv_register_assoc {
            name: *name,
            value: hv_register_value { reg64: *value },
            ..Default::default()
        })
        .collect();
    Ok(vcpu.set_reg(&registers)?)
}

/// A descriptor-table register to set.
pub fn table(name: u32, base: u64, limit: u16) -> hv_register_assoc {
    hv_register_assoc {
        name,
        value: hv_register_value {
            table: hv_x64_table_register {
                pad: [0; 3],
                limit,
                base,
            },
        },
        ..Default::default()
    }
}

/// Runs a VP until there is a message.
fn next_message_of(vcpu: &VcpuFd) -> Result<hv_message> {
    let start = Instant::now();
    loop {
        match vcpu.run() {
            Ok(message) => return Ok(message),
            Err(error) if error.errno() == libc::EINTR && start.elapsed() < PATIENCE => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Runs a VP until it writes to a port, and steps over that: port and AL.
pub fn next_port_write_of(vcpu: &VcpuFd) -> Result<(u16, u64)> {
    let message = next_message_of(vcpu)?;
    if kind(&message) != hv_message_type_HVMSG_X64_IO_PORT_INTERCEPT {
        return Err(format!("message {:#x} instead of port I/O", kind(&message)).into());
    }
    let info = message.to_ioport_info()?;
    let length = info.header.instruction_length();
    let next = info.header.rip + u64::from(length);
    set(vcpu, &[(hv_register_name_HV_X64_REGISTER_RIP, next)])?;
    Ok((info.port_number, info.rax & 0xff))
}
