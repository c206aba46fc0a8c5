// SPDX-License-Identifier: GPL-2.0
//! The kernel file: is it a bzImage that can be entered in long mode, and where does it go?

use crate::layout::{HIGH_MEMORY, LOW_RAM_MAX, MIB};
use crate::{Error, Result};
use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, KernelLoader};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryMmap};

/// The 64-bit entry stands this far behind the load address.
pub const ENTRY_64: u64 = 0x200;

/// Offset of `struct setup_header` in the file.
const HEADER_AT: usize = 0x1f1;
/// "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
/// Boot protocol 2.12 brought `xloadflags`.
const MIN_VERSION: u16 = 0x020c;
/// The file has a 64-bit entry.
const XLF_KERNEL_64: u16 = 1 << 0;
/// The protected-mode code is loaded high.
const LOADED_HIGH: u8 = 1 << 0;

/// A checked kernel file.
#[derive(Debug)]
pub struct Kernel {
    path: PathBuf,
    file: File,
    header: setup_header,
    /// Bytes of the protected-mode part.
    payload: u64,
}

impl Kernel {
    /// Opens `path` and checks that it can be booted here.
    pub fn open(path: &Path) -> Result<Self> {
        let fail = |source| Error::File {
            what: "kernel",
            path: path.to_owned(),
            source,
        };
        let mut file = File::open(path).map_err(fail)?;
        let meta = file.metadata().map_err(fail)?;
        if !meta.is_file() {
            return Err(fail(std::io::Error::other("not a regular file")));
        }
        let size = meta.len();
        let mut start = Vec::new();
        file.by_ref()
            .take(0x400)
            .read_to_end(&mut start)
            .map_err(fail)?;
        let header = parse(&start).map_err(|why| Error::kernel(path, why))?;
        let setup = (u64::from(if header.setup_sects == 0 {
            4
        } else {
            header.setup_sects
        }) + 1)
            * 512;
        let payload = size
            .checked_sub(setup)
            .filter(|p| *p > ENTRY_64)
            .ok_or_else(|| Error::kernel(path, "the file is cut short"))?;
        Ok(Kernel {
            path: path.to_owned(),
            file,
            header,
            payload,
        })
    }

    /// Memory the kernel uses from its load address on before it knows the memory map.
    pub fn init_size(&self) -> u64 {
        u64::from(self.header.init_size).max(self.payload)
    }

    /// The initrd must end at or below this address.
    pub fn initrd_limit(&self) -> u64 {
        u64::from(self.header.initrd_addr_max).saturating_add(1)
    }

    /// Longest command line, without the closing zero.
    pub fn cmdline_max(&self) -> usize {
        self.header.cmdline_size as usize
    }

    /// The address the kernel prefers; it must be RAM up to `init_size` behind it.
    pub fn place(&self, memory: u64) -> Result<u64> {
        let at = self.header.pref_address;
        if at < HIGH_MEMORY {
            return Err(Error::kernel(
                &self.path,
                format!("it wants to be loaded at {at:#x}"),
            ));
        }
        let end = at.saturating_add(self.init_size());
        if end > memory.min(LOW_RAM_MAX) {
            return Err(Error::MemoryTooSmall {
                what: "kernel",
                have: memory / MIB,
                // Beside its own pages a kernel needs memory to run in.
                need: (end.div_ceil(MIB) + 32).next_multiple_of(16),
            });
        }
        Ok(at)
    }

    /// Copies the kernel to `at` and returns its header for the zero page.
    pub fn load(&self, mem: &GuestMemoryMmap, at: u64) -> Result<setup_header> {
        let mut file = self.file.try_clone().map_err(|source| Error::File {
            what: "kernel",
            path: self.path.clone(),
            source,
        })?;
        BzImage::load(
            mem,
            Some(GuestAddress(at)),
            &mut file,
            Some(GuestAddress(HIGH_MEMORY)),
        )
        .map_err(|e| Error::kernel(&self.path, e.to_string()))?;
        Ok(self.header)
    }
}

/// Reads the setup header from the first bytes of the file.
fn parse(start: &[u8]) -> std::result::Result<setup_header, String> {
    if start.get(..4) == Some(b"\x7fELF") {
        return Err("it is an ELF file (a vmlinux?)".into());
    }
    if start.get(..2) == Some(b"\x1f\x8b") {
        return Err("it is a gzip file".into());
    }
    let size = std::mem::size_of::<setup_header>();
    let mut header = setup_header::default();
    let bytes = start
        .get(HEADER_AT..HEADER_AT + size)
        .ok_or("the file is too short")?;
    header.as_mut_slice().copy_from_slice(bytes);
    if header.boot_flag != 0xaa55 || header.header != HEADER_MAGIC {
        return Err("there is no Linux boot header in it".into());
    }
    let version = header.version;
    if version < MIN_VERSION {
        return Err(format!(
            "its boot protocol is {}.{:02}, the oldest supported one is 2.12",
            version >> 8,
            version & 0xff
        ));
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err("it is a zImage".into());
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err("it has no 64-bit entry (a 32-bit kernel?)".into());
    }
    Ok(header)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;
    use vm_memory::Bytes;
    use vmm_sys_util::tempfile::TempFile;

    /// A bzImage with `payload` bytes of 0xcc behind one setup sector.
    pub(crate) fn bzimage(payload: usize) -> Vec<u8> {
        let header = setup_header {
            setup_sects: 1,
            boot_flag: 0xaa55,
            header: HEADER_MAGIC,
            version: 0x020f,
            loadflags: LOADED_HIGH,
            code32_start: 0x10_0000,
            initrd_addr_max: 0x7fff_ffff,
            kernel_alignment: 0x20_0000,
            relocatable_kernel: 1,
            xloadflags: XLF_KERNEL_64,
            cmdline_size: 2047,
            pref_address: 0x100_0000,
            init_size: 0x20_0000,
            ..Default::default()
        };
        let mut image = vec![0; 1024];
        let bytes = header.as_slice();
        image[HEADER_AT..HEADER_AT + bytes.len()].copy_from_slice(bytes);
        image.resize(1024 + payload, 0xcc);
        image
    }

    fn open(bytes: &[u8]) -> Result<Kernel> {
        let f = TempFile::new().unwrap();
        f.as_file().write_all(bytes).unwrap();
        Kernel::open(f.as_path())
    }

    fn refusal(bytes: &[u8]) -> String {
        open(bytes).unwrap_err().to_string()
    }

    #[test]
    fn a_good_image_is_placed_where_it_prefers() {
        let k = open(&bzimage(4096)).unwrap();
        assert_eq!(k.place(64 * MIB).unwrap(), 0x100_0000);
        assert_eq!(k.init_size(), 0x20_0000);
        assert_eq!(k.initrd_limit(), 0x8000_0000);
    }

    #[test]
    fn the_payload_lands_at_the_load_address() {
        let k = open(&bzimage(4096)).unwrap();
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap();
        k.load(&mem, 0x100_0000).unwrap();
        assert_eq!(mem.read_obj::<u8>(GuestAddress(0x100_0fff)).unwrap(), 0xcc);
        assert_eq!(mem.read_obj::<u8>(GuestAddress(0x100_1000)).unwrap(), 0);
    }

    #[test]
    fn other_files_are_refused_with_the_reason() {
        assert!(refusal(b"#!/bin/sh\n").contains("too short"));
        assert!(refusal(&[0; 4096]).contains("no Linux boot header"));
        let mut elf = vec![0; 4096];
        elf[..4].copy_from_slice(b"\x7fELF");
        assert!(refusal(&elf).contains("ELF"));
        assert!(refusal(&bzimage(0)).contains("cut short"));
    }

    #[test]
    fn old_protocols_and_32_bit_kernels_are_refused() {
        let mut old = bzimage(4096);
        old[0x206..0x208].copy_from_slice(&0x0208u16.to_le_bytes());
        assert!(refusal(&old).contains("2.08"));
        let mut small = bzimage(4096);
        small[0x236] = 0;
        assert!(refusal(&small).contains("64-bit"));
    }

    #[test]
    fn too_little_memory_names_what_is_needed() {
        let k = open(&bzimage(4096)).unwrap();
        let e = k.place(17 * MIB).unwrap_err().to_string();
        assert!(e.contains("17 MiB") && e.contains("--memory 64M"), "{e}");
    }

    #[test]
    fn a_missing_kernel_is_named() {
        let e = Kernel::open(Path::new("/nonexistent/vmlinuz"))
            .unwrap_err()
            .to_string();
        assert!(e.contains("kernel /nonexistent/vmlinuz"), "{e}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        /// Whatever its header says, a file is refused or lies where `place` said, and nothing else changed.
        #[test]
        fn no_header_writes_elsewhere(
            changes in prop::collection::vec((0x1f0_usize..0x280, any::<u8>()), 0..3),
            setup_sects in prop_oneof![4 => Just(1), 1 => 0..8_u8],
            init_size in prop_oneof![Just(0x20_0000), 0..0x4000_u32, any::<u32>()],
            pref_address in prop_oneof![Just(0x100_0000), 0..32 * MIB, any::<u64>()],
            payload in 0usize..0x3000,
            memory in 16u64..24,
        ) {
            let mut image = bzimage(payload);
            image[0x1f1] = setup_sects;
            image[0x258..0x260].copy_from_slice(&pref_address.to_le_bytes());
            image[0x260..0x264].copy_from_slice(&init_size.to_le_bytes());
            for (at, value) in changes {
                image[at] = value;
            }
            let Ok(kernel) = open(&image) else {
                return Ok(());
            };
            let Ok(at) = kernel.place(memory * MIB) else {
                return Ok(());
            };
            let end = at + kernel.init_size();
            prop_assert!(at >= HIGH_MEMORY && end <= memory * MIB);
            let size = (memory * MIB) as usize;
            let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).unwrap();
            if kernel.load(&mem, at).is_ok() {
                let mut all = vec![0; size];
                mem.read_slice(&mut all, GuestAddress(0)).unwrap();
                let zeros = vec![0; size];
                let (at, end) = (at as usize, end as usize);
                prop_assert!(all[..at] == zeros[..at], "before {:#x}", at);
                prop_assert!(all[end..] == zeros[end..], "behind {:#x}", end);
            }
        }
    }
}
