// SPDX-License-Identifier: GPL-2.0
//! The zero page: what the kernel is told about memory, initrd, command line and ACPI.

use crate::layout::{self, CMDLINE, ZERO_PAGE};
use crate::{Error, Result};
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// "A loader without an assigned number".
const LOADER_UNDEFINED: u8 = 0xff;

/// Builds the zero page.
pub fn build(memory: u64, header: setup_header, initrd: Option<(u64, u64)>) -> boot_params {
    let mut p = boot_params {
        hdr: header,
        ..Default::default()
    };
    p.hdr.type_of_loader = LOADER_UNDEFINED;
    p.hdr.cmd_line_ptr = CMDLINE as u32;
    if let Some((at, size)) = initrd {
        p.hdr.ramdisk_image = at as u32;
        p.hdr.ramdisk_size = size as u32;
        p.ext_ramdisk_image = (at >> 32) as u32;
        p.ext_ramdisk_size = (size >> 32) as u32;
    }
    p.acpi_rsdp_addr = layout::ACPI;
    let map = layout::e820(memory);
    p.e820_entries = map.len() as u8;
    for (slot, (range, kind)) in p.e820_table.iter_mut().zip(&map) {
        *slot = boot_e820_entry {
            addr: range.start,
            size: range.size,
            type_: *kind as u32,
        };
    }
    p
}

/// Builds the zero page and writes it to its place.
pub fn write(
    mem: &GuestMemoryMmap,
    memory: u64,
    header: setup_header,
    initrd: Option<(u64, u64)>,
) -> Result<()> {
    let params = build(memory, header, initrd);
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, GuestAddress(ZERO_PAGE)), mem)
        .map_err(|e| Error::hypervisor("write the zero page", e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::MIB;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn the_zero_page_has_its_fields_where_the_protocol_wants_them() {
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let header = setup_header {
            header: 0x5372_6448,
            ..Default::default()
        };
        write(&mem, 512 * MIB, header, Some((0x1fff_0000, 0x1234))).unwrap();
        let u32_at = |off: u64| mem.read_obj::<u32>(GuestAddress(ZERO_PAGE + off)).unwrap();
        let u64_at = |off: u64| mem.read_obj::<u64>(GuestAddress(ZERO_PAGE + off)).unwrap();
        assert_eq!(u64_at(0x70), layout::ACPI);
        assert_eq!(u32_at(0x202), 0x5372_6448);
        assert_eq!(u32_at(0x218), 0x1fff_0000);
        assert_eq!(u32_at(0x21c), 0x1234);
        assert_eq!(u32_at(0x228), CMDLINE as u32);
        assert_eq!(
            mem.read_obj::<u8>(GuestAddress(ZERO_PAGE + 0x210)).unwrap(),
            0xff
        );
        assert_eq!(
            mem.read_obj::<u8>(GuestAddress(ZERO_PAGE + 0x1e8)).unwrap(),
            3
        );
        // The last e820 entry is the RAM above 1 MiB.
        assert_eq!(u64_at(0x2d0 + 40), 0x10_0000);
        assert_eq!(u64_at(0x2d0 + 48), 511 * MIB);
        assert_eq!(u32_at(0x2d0 + 56), 1);
    }

    #[test]
    fn an_initrd_above_four_gib_uses_the_extension_fields() {
        let p = build(
            8 << 30,
            setup_header::default(),
            Some((0x1_2345_6000, 0x2_0000_0001)),
        );
        assert_eq!({ p.ext_ramdisk_image }, 1);
        assert_eq!({ p.ext_ramdisk_size }, 2);
        assert_eq!({ p.hdr.ramdisk_image }, 0x2345_6000);
    }
}
