// SPDX-License-Identifier: GPL-2.0
//! The ACPI tables: a hardware-reduced machine with local APICs, one IOAPIC, one UART, a clock and power control.
//!
//! Hardware-reduced (ACPI 6.5, 4.1) means: no PIC, no PIT, no PM timer, no SCI. The guest takes its clock rates from the
//! hypervisor's frequency MSRs and powers off by the sleep control register.

pub mod aml;
mod table;

use crate::layout::*;
use crate::{Error, Result};
use table::Table;

/// Tables begin on such a boundary.
const ALIGN: usize = 64;
/// Size of the RSDP of ACPI 2.0 and later.
const RSDP_SIZE: usize = 36;

/// All tables as one block that belongs at [`ACPI`]; the RSDP is first.
pub fn build(vps: u32) -> Result<Vec<u8>> {
    let mut block = vec![0; RSDP_SIZE];
    let dsdt = place(&mut block, dsdt());
    let fadt = place(&mut block, fadt(dsdt));
    let madt = place(&mut block, madt(vps));
    let xsdt = place(
        &mut block,
        Table::new(b"XSDT", 1).u64(fadt).u64(madt).finish(),
    );
    block[..RSDP_SIZE].copy_from_slice(&rsdp(xsdt));
    if block.len() as u64 > ACPI_END - ACPI {
        let why = "the tables outgrew their window";
        return Err(Error::hypervisor("describe the machine by ACPI", why));
    }
    Ok(block)
}

/// Appends a table and returns its guest-physical address.
fn place(block: &mut Vec<u8>, table: Vec<u8>) -> u64 {
    block.resize(block.len().next_multiple_of(ALIGN), 0);
    let at = ACPI + block.len() as u64;
    block.extend(table);
    at
}

/// Root System Description Pointer (5.2.5.3).
fn rsdp(xsdt: u64) -> [u8; RSDP_SIZE] {
    let mut t = [0; RSDP_SIZE];
    t[..8].copy_from_slice(b"RSD PTR ");
    t[9..15].copy_from_slice(&table::OEM);
    t[15] = 2;
    t[20..24].copy_from_slice(&(RSDP_SIZE as u32).to_le_bytes());
    t[24..32].copy_from_slice(&xsdt.to_le_bytes());
    t[8] = table::checksum(&t[..20]);
    t[32] = table::checksum(&t);
    t
}

/// Fixed ACPI Description Table (5.2.9).
fn fadt(dsdt: u64) -> Vec<u8> {
    /// WBINVD works; there is no fixed power or sleep button; there is a reset register; nobody sits at it; the
    /// IOAPIC's destinations are physical in xAPIC and x2APIC mode; hardware-reduced.
    const FLAGS: u32 =
        (1 << 0) | (1 << 4) | (1 << 5) | (1 << 10) | (1 << 12) | (1 << 19) | (1 << 20);
    /// There is no VGA adapter. The 8042 bit stays clear: the ports answer, but there is no keyboard.
    const BOOT_ARCHITECTURE: u16 = 1 << 2;
    const ENTERPRISE_SERVER: u8 = 4;
    const MINOR_REVISION: u8 = 5;

    let mut t = Table::with_size(b"FACP", 6, 276);
    t.put(45, &[ENTERPRISE_SERVER]);
    t.put(109, &BOOT_ARCHITECTURE.to_le_bytes());
    t.put(112, &FLAGS.to_le_bytes());
    t.put(116, &port_register(RESET_PORT));
    t.put(128, &[RESET_VALUE]);
    t.put(131, &[MINOR_REVISION]);
    t.put(140, &dsdt.to_le_bytes());
    t.put(244, &port_register(SLEEP_CONTROL_PORT));
    t.put(256, &port_register(SLEEP_STATUS_PORT));
    t.finish()
}

/// Generic Address Structure (5.2.3.2) of a byte-wide port.
fn port_register(port: u16) -> [u8; 12] {
    const SYSTEM_IO: u8 = 1;
    const BYTE_ACCESS: u8 = 1;
    let mut gas = [SYSTEM_IO, 8, 0, BYTE_ACCESS, 0, 0, 0, 0, 0, 0, 0, 0];
    gas[4..6].copy_from_slice(&port.to_le_bytes());
    gas
}

/// Multiple APIC Description Table (5.2.12).
fn madt(vps: u32) -> Vec<u8> {
    const LOCAL_APIC: u8 = 0;
    const IO_APIC: u8 = 1;
    const ENABLED: u32 = 1;
    let mut t = Table::new(b"APIC", 5).u32(LAPIC as u32).u32(0);
    for vp in 0..vps {
        // The initial APIC id of a VP is its index; the command line allows no more than 255 VPs.
        t = t.bytes(&[LOCAL_APIC, 8, vp as u8, vp as u8]).u32(ENABLED);
    }
    t.bytes(&[IO_APIC, 12, 0, 0])
        .u32(IOAPIC as u32)
        .u32(0)
        .finish()
}

/// Differentiated System Description Table: UART, clock, and the value that powers off.
fn dsdt() -> Vec<u8> {
    let uart = aml::device(
        "COM1",
        &[
            aml::name("_HID", &aml::eisa_id("PNP0501")),
            aml::name("_UID", &aml::byte(0)),
            aml::name(
                "_CRS",
                &aml::resources(&[aml::ports(UART_PORT, 8), aml::edge_interrupt(UART_IRQ)]),
            ),
        ],
    );
    // Without an interrupt: the clock has no alarm.
    let clock = aml::device(
        "RTC_",
        &[
            aml::name("_HID", &aml::eisa_id("PNP0B00")),
            aml::name("_CRS", &aml::resources(&[aml::ports(CLOCK_PORT, 2)])),
        ],
    );
    Table::new(b"DSDT", 6)
        .bytes(&aml::scope("_SB_", &[uart, clock]))
        .bytes(&aml::name("_S5_", &aml::package(&[aml::byte(S5)])))
        .finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(b: &[u8]) -> u8 {
        b.iter().fold(0, |a, x| a.wrapping_add(*x))
    }

    fn u16_at(b: &[u8], at: usize) -> u16 {
        u16::from_le_bytes(b[at..at + 2].try_into().unwrap())
    }

    fn u32_at(b: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(b[at..at + 4].try_into().unwrap())
    }

    fn u64_at(b: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(b[at..at + 8].try_into().unwrap())
    }

    /// The table at a guest-physical address, checked for its length and checksum.
    fn table(block: &[u8], at: u64) -> &[u8] {
        let t = &block[(at - ACPI) as usize..];
        let t = &t[..u32_at(t, 4) as usize];
        assert_eq!(sum(t), 0, "checksum of {:?}", std::str::from_utf8(&t[..4]));
        t
    }

    /// Follows RSDP and XSDT to the table with this signature, as a kernel does.
    fn find<'a>(block: &'a [u8], signature: &[u8; 4]) -> &'a [u8] {
        assert_eq!(&block[..8], b"RSD PTR ");
        assert_eq!(sum(&block[..20]), 0);
        assert_eq!(sum(&block[..36]), 0);
        let xsdt = table(block, u64_at(block, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        xsdt[36..]
            .chunks(8)
            .map(|e| table(block, u64_at(e, 0)))
            .find(|t| &t[..4] == signature)
            .expect("table is in the XSDT")
    }

    /// A generic address as (space, width, port).
    fn register(t: &[u8], at: usize) -> (u8, u8, u64) {
        (t[at], t[at + 1], u64_at(t, at + 4))
    }

    #[test]
    fn fadt_is_hardware_reduced_with_sleep_and_reset_registers() {
        let block = build(1).unwrap();
        let fadt = find(&block, b"FACP");
        let flags = u32_at(fadt, 112);
        assert_ne!(flags & (1 << 20), 0, "HW_REDUCED_ACPI");
        assert_ne!(flags & (1 << 10), 0, "RESET_REG_SUP");
        assert_ne!(flags & (1 << 19), 0, "physical destinations");
        assert_eq!(register(fadt, 116), (1, 8, RESET_PORT.into()));
        assert_eq!(fadt[128], RESET_VALUE);
        assert_eq!(register(fadt, 244), (1, 8, SLEEP_CONTROL_PORT.into()));
        assert_eq!(register(fadt, 256), (1, 8, SLEEP_STATUS_PORT.into()));
        assert_eq!(u16_at(fadt, 109) & (1 << 1), 0, "no 8042");
    }

    #[test]
    fn dsdt_hangs_off_the_fadt_and_names_uart_and_s5() {
        let block = build(1).unwrap();
        let dsdt = table(&block, u64_at(find(&block, b"FACP"), 140));
        assert_eq!(&dsdt[..4], b"DSDT");
        let has = |needle: &[u8]| dsdt.windows(needle.len()).any(|w| w == needle);
        assert!(has(b"COM1") && has(b"_HID") && has(b"_CRS"));
        // IO descriptor of eight ports at 0x3f8, then an edge-triggered, active-high interrupt 4.
        assert!(has(&[0x47, 1, 0xf8, 3, 0xf8, 3, 1, 8]));
        assert!(has(&[0x89, 6, 0, 0b0011, 1, 4, 0, 0, 0]));
        // The clock has two ports and no interrupt.
        assert!(has(b"RTC_") && has(&[0x47, 1, 0x70, 0, 0x70, 0, 1, 2, 0x79]));
        // Name (_S5_, Package () { 5 })
        assert!(has(b"\x08_S5_\x12\x04\x01\x0a\x05"));
    }

    #[test]
    fn madt_lists_every_vp_and_one_ioapic() {
        for vps in [1, 2, 255] {
            let block = build(vps).unwrap();
            let madt = find(&block, b"APIC");
            assert_eq!(u32_at(madt, 36), LAPIC as u32);
            let (mut lapics, mut ioapics, mut at) = (Vec::new(), Vec::new(), 44);
            while at < madt.len() {
                match madt[at] {
                    0 => {
                        assert_eq!(u32_at(madt, at + 4), 1, "enabled");
                        lapics.push(madt[at + 3]);
                    }
                    1 => ioapics.push((u32_at(madt, at + 4), u32_at(madt, at + 8))),
                    other => panic!("unexpected MADT entry {other}"),
                }
                at += usize::from(madt[at + 1]);
            }
            assert_eq!(lapics, (0..vps).map(|v| v as u8).collect::<Vec<_>>());
            assert_eq!(ioapics, [(IOAPIC as u32, 0)]);
        }
    }

    #[test]
    fn tables_fit_their_window() {
        assert!(build(255).unwrap().len() as u64 <= ACPI_END - ACPI);
    }
}
