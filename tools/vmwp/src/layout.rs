// SPDX-License-Identifier: GPL-2.0
//! The guest-physical address map.
//!
//! ```text
//! 0x0000_0000 ┌───────────────────────────────┐
//!             │ RAM  0x0500 GDT               │
//!             │      0x7000 zero page         │
//!             │      0x9000 page tables       │
//!             │      0x2_0000 command line    │
//! 0x0009_fc00 ├───────────────────────────────┤
//!             │ RAM, reserved in e820:        │
//!             │ 0xe_0000 ACPI tables          │
//!             │ 0xf_fff0 reset vector         │
//! 0x0010_0000 ├───────────────────────────────┤
//!             │ RAM  kernel … initrd at top   │
//! low RAM end ├───────────────────────────────┤ at most 3 GiB
//!             │ nothing                       │
//! 0xfec0_0000 │ IOAPIC (this process)         │
//! 0xfee0_0000 │ local APIC (hypervisor)       │
//! 4 GiB       ├───────────────────────────────┤
//!             │ the rest of RAM               │
//!             └───────────────────────────────┘
//! ```
//!
//! The legacy hole 0xa0000-0xfffff is backed by plain RAM, so that the probing of option ROMs and of the EBDA, which
//! every x86 kernel does, takes no exits.

/// One MiB.
pub const MIB: u64 = 1 << 20;
/// The unit of everything mapped.
pub const PAGE: u64 = 4096;

/// Boot GDT.
pub const GDT: u64 = 0x500;
/// The zero page (`struct boot_params`).
pub const ZERO_PAGE: u64 = 0x7000;
/// Boot stack top; the kernel sets its own at once.
pub const STACK_TOP: u64 = 0x8ff0;
/// Boot page tables: PML4, PDPT, then four page directories.
pub const PML4: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// First byte that is not conventional memory any more.
pub const LOW_RESERVED: u64 = 0x9_fc00;
/// ACPI tables, RSDP first.
pub const ACPI: u64 = 0xe_0000;
/// End of the ACPI tables' window.
pub const ACPI_END: u64 = RESET_VECTOR;
/// Where kernels jump in real mode to have firmware reset the machine (SDM vol 3, 11.1.4).
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Where memory for kernels begins.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// RAM below 4 GiB ends here at the latest.
pub const LOW_RAM_MAX: u64 = 3 << 30;
/// RAM above the device window begins here.
pub const HIGH_RAM: u64 = 4 << 30;
/// The IOAPIC's page.
pub const IOAPIC: u64 = 0xfec0_0000;
/// The local APICs' page, served by the hypervisor.
pub const LAPIC: u64 = 0xfee0_0000;

/// Interrupt line of the UART.
pub const UART_IRQ: u8 = 4;
/// First port of the UART.
pub const UART_PORT: u16 = 0x3f8;
/// First port of the clock.
pub const CLOCK_PORT: u16 = 0x70;
/// ACPI sleep control register.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// The reset control register of PC chipsets, which is the ACPI reset register too.
pub const RESET_PORT: u16 = 0xcf9;
/// What must be written to [`RESET_PORT`].
pub const RESET_VALUE: u8 = 6;
/// The value of `\_S5`, written to the sleep control register to power off.
pub const S5: u8 = 5;

/// Smallest and largest memory sizes that are accepted, in bytes.
pub const MEMORY_RANGE: std::ops::RangeInclusive<u64> = 16 * MIB..=1 << 40;

/// A piece of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRange {
    /// First guest-physical address.
    pub start: u64,
    /// Size in bytes.
    pub size: u64,
}

impl RamRange {
    /// The address after the last byte.
    pub fn end(&self) -> u64 {
        self.start + self.size
    }
}

/// Splits `memory` bytes of RAM around the device window below 4 GiB.
pub fn ram(memory: u64) -> Vec<RamRange> {
    let low = memory.min(LOW_RAM_MAX);
    let mut ranges = vec![RamRange {
        start: 0,
        size: low,
    }];
    if memory > low {
        ranges.push(RamRange {
            start: HIGH_RAM,
            size: memory - low,
        });
    }
    ranges
}

/// Kinds of e820 entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum E820 {
    /// The kernel may use it.
    Ram = 1,
    /// The kernel must leave it alone.
    Reserved = 2,
}

/// The memory map as the guest is told it.
pub fn e820(memory: u64) -> Vec<(RamRange, E820)> {
    let span = |start, end| RamRange {
        start,
        size: end - start,
    };
    let mut map = vec![
        (span(0, LOW_RESERVED), E820::Ram),
        (span(LOW_RESERVED, HIGH_MEMORY), E820::Reserved),
    ];
    for r in ram(memory) {
        map.push((span(r.start.max(HIGH_MEMORY), r.end()), E820::Ram));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn small_memory_is_one_range() {
        assert_eq!(
            ram(512 * MIB),
            [RamRange {
                start: 0,
                size: 512 * MIB
            }]
        );
    }

    #[test]
    fn memory_above_three_gib_continues_at_four() {
        let r = ram(5 << 30);
        assert_eq!(r[0].end(), LOW_RAM_MAX);
        assert_eq!(
            r[1],
            RamRange {
                start: HIGH_RAM,
                size: 2 << 30
            }
        );
    }

    proptest! {
        #[test]
        fn no_byte_is_lost_and_devices_stay_free(pages in 4096u64..(1 << 28)) {
            let memory = pages * PAGE;
            let ranges = ram(memory);
            prop_assert_eq!(ranges.iter().map(|r| r.size).sum::<u64>(), memory);
            for r in &ranges {
                prop_assert!(r.end() <= LOW_RAM_MAX || r.start >= HIGH_RAM);
            }
        }

        #[test]
        fn e820_is_sorted_without_overlap_and_covers_ram(pages in 4096u64..(1 << 28)) {
            let memory = pages * PAGE;
            let map = e820(memory);
            for w in map.windows(2) {
                prop_assert!(w[0].0.end() <= w[1].0.start);
            }
            prop_assert_eq!(map.iter().map(|(r, _)| r.size).sum::<u64>(), memory);
        }
    }
}
