// SPDX-License-Identifier: GPL-2.0
//! Direct boot of a bzImage by the 64-bit entry of the x86 boot protocol
//! (Documentation/arch/x86/boot.rst, "64-bit BOOT PROTOCOL").
//!
//! The hardware is left in long mode with an identity map of the first 4 GiB; `RSI` points at the zero page. There is
//! no firmware: what firmware would say stands in the zero page and in the ACPI tables.

pub mod image;
pub mod paging;
pub mod params;
pub mod regs;

use crate::{acpi, layout, Error, Result};
use image::Kernel;
use std::fs::File;
use std::path::{Path, PathBuf};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// What is to be booted.
#[derive(Clone, Debug)]
pub struct BootSource {
    /// A bzImage.
    pub kernel: PathBuf,
    /// An initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
}

/// Where things went, and where the first VP begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// First instruction.
    pub entry: u64,
    /// Where the kernel was put.
    pub kernel: u64,
    /// Where the initrd was put, and its size.
    pub initrd: Option<(u64, u64)>,
}

/// Loads everything into `mem` and returns where the first VP begins.
pub fn load(mem: &GuestMemoryMmap, memory: u64, vps: u32, source: &BootSource) -> Result<Loaded> {
    let kernel = Kernel::open(&source.kernel)?;
    let low_end = memory.min(layout::LOW_RAM_MAX);
    let place = kernel.place(memory)?;
    let header = kernel.load(mem, place)?;

    let initrd = match &source.initrd {
        Some(path) => {
            let free_from = place + kernel.init_size();
            Some(load_initrd(
                mem,
                path,
                free_from,
                low_end.min(kernel.initrd_limit()),
            )?)
        }
        None => None,
    };

    let max = kernel.cmdline_max();
    let cmdline = source.cmdline.as_bytes();
    if cmdline.len() > max {
        return Err(Error::Cmdline {
            len: cmdline.len(),
            max,
        });
    }
    write(mem, layout::CMDLINE, cmdline)?;
    write(mem, layout::CMDLINE + cmdline.len() as u64, &[0])?;

    write(mem, layout::ACPI, &acpi::build(vps)?)?;
    write(mem, layout::RESET_VECTOR, &RESET_CODE)?;
    params::write(mem, memory, header, initrd)?;
    paging::write(mem)?;
    Ok(Loaded {
        entry: place + image::ENTRY_64,
        kernel: place,
        initrd,
    })
}

/// What a kernel without EFI finds when it restarts a machine with hardware-reduced ACPI, in real mode.
#[rustfmt::skip]
const RESET_CODE: [u8; 10] = {
    let [low, high] = layout::RESET_PORT.to_le_bytes();
    [
        0xba, low, high,            // mov $RESET_PORT, %dx
        0xb0, layout::RESET_VALUE,  // mov $RESET_VALUE, %al
        0xee,                       // out %al, %dx
        0xfa,                       // cli
        0xf4, 0xeb, 0xfd,           // 1: hlt; jmp 1b
    ]
};

/// Puts the initrd as high as it may be: the kernel unpacks upwards from its own place.
fn load_initrd(mem: &GuestMemoryMmap, path: &Path, from: u64, to: u64) -> Result<(u64, u64)> {
    let fail = |source| Error::File {
        what: "initrd",
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(fail)?;
    let meta = file.metadata().map_err(fail)?;
    if !meta.is_file() {
        return Err(fail(std::io::Error::other("not a regular file")));
    }
    let size = meta.len();
    let at = initrd_place(size, from, to).ok_or_else(|| Error::MemoryTooSmall {
        what: "kernel with its initrd",
        have: to / layout::MIB,
        need: (from + size).div_ceil(layout::MIB) + 1,
    })?;
    mem.read_exact_volatile_from(GuestAddress(at), &mut file, size as usize)
        .map_err(|e| fail(std::io::Error::other(e.to_string())))?;
    Ok((at, size))
}

/// The page-aligned place that ends closest below `to` and does not begin below `from`.
fn initrd_place(size: u64, from: u64, to: u64) -> Option<u64> {
    let at = to.checked_sub(size)? & !(layout::PAGE - 1);
    (at >= from).then_some(at)
}

/// Writes bytes into guest memory that is known to exist.
fn write(mem: &GuestMemoryMmap, at: u64, bytes: &[u8]) -> Result<()> {
    mem.write_slice(bytes, GuestAddress(at))
        .map_err(|e| Error::hypervisor(format!("write guest memory at {at:#x}"), e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::MIB;
    use std::io::Write;
    use vmm_sys_util::tempfile::TempFile;

    fn guest(memory: u64) -> GuestMemoryMmap {
        let ranges: Vec<_> = layout::ram(memory)
            .iter()
            .map(|r| (GuestAddress(r.start), r.size as usize))
            .collect();
        GuestMemoryMmap::from_ranges(&ranges).unwrap()
    }

    fn file(bytes: &[u8]) -> TempFile {
        let f = TempFile::new().unwrap();
        f.as_file().write_all(bytes).unwrap();
        f
    }

    #[test]
    fn initrd_goes_to_the_top_on_a_page() {
        assert_eq!(initrd_place(1, 0x1000, 0x10000), Some(0xf000));
        assert_eq!(initrd_place(0x1000, 0x1000, 0x10000), Some(0xf000));
        assert_eq!(initrd_place(0x1001, 0x1000, 0x10000), Some(0xe000));
    }

    #[test]
    fn initrd_never_overlaps_the_kernel() {
        assert_eq!(initrd_place(0x2000, 0xf000, 0x10000), None);
        assert_eq!(initrd_place(0x20000, 0, 0x10000), None);
    }

    #[test]
    fn a_complete_boot_leaves_everything_in_place() {
        let kernel = file(&image::tests::bzimage(64 * 1024));
        let initrd = file(&[0x5a; 5000]);
        let mem = guest(64 * MIB);
        let source = BootSource {
            kernel: kernel.as_path().to_owned(),
            initrd: Some(initrd.as_path().to_owned()),
            cmdline: "console=ttyS0".into(),
        };
        let loaded = load(&mem, 64 * MIB, 2, &source).unwrap();
        assert_eq!(loaded.entry, 0x100_0000 + 0x200);
        let (at, size) = loaded.initrd.unwrap();
        assert_eq!((at, size), (64 * MIB - 0x2000, 5000));
        assert_eq!(mem.read_obj::<u8>(GuestAddress(at + 4999)).unwrap(), 0x5a);
        let mut line = [0; 14];
        mem.read_slice(&mut line, GuestAddress(layout::CMDLINE))
            .unwrap();
        assert_eq!(&line, b"console=ttyS0\0");
        let mut rsdp = [0; 8];
        mem.read_slice(&mut rsdp, GuestAddress(layout::ACPI))
            .unwrap();
        assert_eq!(&rsdp, b"RSD PTR ");
    }

    #[test]
    fn an_initrd_that_does_not_fit_says_how_much_memory_would_do() {
        let kernel = file(&image::tests::bzimage(4096));
        let initrd = file(&vec![0; 48 << 20]);
        let source = BootSource {
            kernel: kernel.as_path().to_owned(),
            initrd: Some(initrd.as_path().to_owned()),
            cmdline: String::new(),
        };
        let e = load(&guest(64 * MIB), 64 * MIB, 1, &source).unwrap_err();
        assert!(e.to_string().contains("at least --memory"), "{e}");
    }

    #[test]
    fn a_missing_initrd_is_named() {
        let kernel = file(&image::tests::bzimage(4096));
        let source = BootSource {
            kernel: kernel.as_path().to_owned(),
            initrd: Some("/nonexistent/initrd".into()),
            cmdline: String::new(),
        };
        let e = load(&guest(64 * MIB), 64 * MIB, 1, &source).unwrap_err();
        assert!(e.to_string().contains("initrd /nonexistent/initrd"), "{e}");
    }

    #[test]
    fn a_too_long_command_line_is_refused() {
        let kernel = file(&image::tests::bzimage(4096));
        let source = BootSource {
            kernel: kernel.as_path().to_owned(),
            initrd: None,
            cmdline: "x".repeat(5000),
        };
        let e = load(&guest(64 * MIB), 64 * MIB, 1, &source).unwrap_err();
        assert!(
            matches!(
                e,
                Error::Cmdline {
                    len: 5000,
                    max: 2047
                }
            ),
            "{e}"
        );
    }
}
