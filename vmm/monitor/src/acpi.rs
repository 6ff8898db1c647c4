//! The ACPI tables: what this machine is made of, as the kernel reads it. Written
//! to guest memory by [`crate::machine`] at every start.
//!
//! Hardware-reduced ACPI 6: no PM timer, no SCI, no fixed events. Power-off and
//! reset are one port ([`layout::SLEEP_PORT`]). Linux takes such a machine for one with EFI when
//! it resets, and jumps to where a BIOS would be when it finds none: a few instructions
//! there write to the port. A legacy interrupt exists only
//! where a device declares it, which is why the 16550 is a device here.

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as Space, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use vm_memory::{Bytes, GuestAddress};

use crate::layout;
use crate::memory::Ram;

const OEM: [u8; 6] = *b"PERICP";
const TABLE: [u8; 8] = *b"PERICARP";
const REVISION: u32 = 1;

/// IAPC_BOOT_ARCH: no VGA to probe, no CMOS clock; no 8042 either, by silence.
const BOOT_FLAGS: u16 = (1 << 2) | (1 << 5);

/// `mov dx, SLEEP_PORT; mov al, SLEEP_RESET; out dx, al; hlt; jmp` back to it, for 16 bits.
const RESET: [u8; 9] = {
    let [low, high] = layout::SLEEP_PORT.to_le_bytes();
    let reset = layout::SLEEP_RESET;
    [0xba, low, high, 0xb0, reset, 0xee, 0xf4, 0xeb, 0xfd]
};

/// The tables at [`layout::ACPI`], and the root pointer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tables {
    /// All but the root pointer.
    pub body: Vec<u8>,
    /// The root pointer.
    pub root: Vec<u8>,
}

/// Makes the tables of a machine with so many CPUs.
pub fn tables(cpus: u8) -> Tables {
    let mut body = Vec::new();
    let mut place = |table: &dyn Aml| -> u64 {
        // Linux warns of tables that are not aligned.
        let at = body.len().next_multiple_of(16);
        body.resize(at, 0);
        table.to_aml_bytes(&mut body);
        layout::ACPI + at as u64
    };
    let dsdt = place(&dsdt());
    let fadt = place(&fadt(dsdt));
    let madt = place(&madt(cpus));
    let mut mcfg = MCFG::new(OEM, TABLE, REVISION);
    mcfg.add_ecam(layout::ECAM, 0, 0, 0);
    let mcfg = place(&mcfg);
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    let xsdt = place(&xsdt);
    let mut root = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut root);
    Tables { body, root }
}

/// Writes them to guest memory.
///
/// # Errors
/// The memory is too small.
pub fn write(ram: &Ram, cpus: u8) -> Result<(), vm_memory::GuestMemoryError> {
    let tables = tables(cpus);
    let memory = ram.mmap();
    memory.write_slice(&RESET, GuestAddress(layout::RESET_VECTOR))?;
    memory.write_slice(&tables.body, GuestAddress(layout::ACPI))?;
    memory.write_slice(&tables.root, GuestAddress(layout::RSDP))
}

fn sleep_port() -> GAS {
    let port = u64::from(layout::SLEEP_PORT);
    GAS::new(Space::SystemIo, 8, 0, AccessSize::ByteAccess, port)
}

fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup);
    fadt.iapc_boot_arch = BOOT_FLAGS.into();
    fadt.reset_reg = sleep_port();
    fadt.reset_value = layout::SLEEP_RESET;
    // Power-off exists only where both are there.
    fadt.sleep_control_reg = sleep_port();
    fadt.sleep_status_reg = sleep_port();
    fadt.finalize()
}

fn madt(cpus: u8) -> MADT {
    let local = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut madt = MADT::new(OEM, TABLE, REVISION, local);
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    madt
}

fn dsdt() -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, REVISION);
    let mut add = |item: &dyn Aml| {
        let mut bytes = Vec::new();
        item.to_aml_bytes(&mut bytes);
        dsdt.append_slice(&bytes);
    };
    let soft_off = layout::SLEEP_S5 >> 2 & 7;
    let sleep = aml::Package::new(vec![&soft_off, &soft_off, &aml::ZERO, &aml::ZERO]);
    add(&aml::Name::new("_S5_".into(), &sleep));
    add(&host_bridge_scope());
    add(&serial_scope());
    dsdt
}

/// Bytes of AML that were made before.
struct Made(Vec<u8>);

impl Aml for Made {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        self.0.iter().for_each(|byte| sink.byte(*byte));
    }
}

fn made(item: &dyn Aml) -> Made {
    let mut bytes = Vec::new();
    item.to_aml_bytes(&mut bytes);
    Made(bytes)
}

fn host_bridge_scope() -> Made {
    let memory = aml::AddressSpaceCacheable::NotCacheable;
    let window32 = aml::AddressSpace::new_memory(
        memory,
        true,
        layout::WINDOW32 as u32,
        (layout::WINDOW32 + layout::WINDOW32_SIZE - 1) as u32,
        None,
    );
    let window64 = aml::AddressSpace::new_memory(
        memory,
        true,
        layout::WINDOW64,
        layout::WINDOW64 + layout::WINDOW64_SIZE - 1,
        None,
    );
    let bus = aml::AddressSpace::new_bus_number(0u16, 0u16);
    let resources = aml::ResourceTemplate::new(vec![&bus, &window32, &window64]);
    let express = aml::EISAName::new("PNP0A08");
    let classic = aml::EISAName::new("PNP0A03");
    // The firmware has placed the devices' memory: keep it (PCI Firmware 3.2, 4.6.5).
    let uuid = aml::Uuid::new("E5C937D0-3553-4D7A-9117-EA4D19C3434D");
    let keep = aml::Return::new(&aml::ZERO);
    let known = aml::BufferData::new(vec![0b10_0001]);
    let functions = aml::Return::new(&known);
    let nothing = aml::BufferData::new(vec![0]);
    let otherwise = aml::Return::new(&nothing);
    let is_query = aml::Equal::new(&aml::Arg(2), &aml::ZERO);
    let five = 5u8;
    let is_keep = aml::Equal::new(&aml::Arg(2), &five);
    let query = aml::If::new(&is_query, vec![&functions]);
    let preserve = aml::If::new(&is_keep, vec![&keep]);
    let is_pci = aml::Equal::new(&aml::Arg(0), &uuid);
    let pci = aml::If::new(&is_pci, vec![&query, &preserve]);
    let method = aml::Method::new("_DSM".into(), 4, false, vec![&pci, &otherwise]);
    let hid = aml::Name::new("_HID".into(), &express);
    let cid = aml::Name::new("_CID".into(), &classic);
    let uid = aml::Name::new("_UID".into(), &aml::ZERO);
    let segment = aml::Name::new("_SEG".into(), &aml::ZERO);
    let number = aml::Name::new("_BBN".into(), &aml::ZERO);
    let crs = aml::Name::new("_CRS".into(), &resources);
    let bridge = aml::Device::new(
        "PCI0".into(),
        vec![&hid, &cid, &uid, &segment, &number, &crs, &method],
    );
    // The configuration space, as a motherboard resource: what the memory map says
    // is not enough for newer kernels.
    let ecam = aml::Memory32Fixed::new(true, layout::ECAM as u32, layout::ECAM_SIZE as u32);
    let board_resources = aml::ResourceTemplate::new(vec![&ecam]);
    let board_id = aml::EISAName::new("PNP0C02");
    let board_hid = aml::Name::new("_HID".into(), &board_id);
    let board_crs = aml::Name::new("_CRS".into(), &board_resources);
    let board = aml::Device::new("MBRD".into(), vec![&board_hid, &board_crs]);
    made(&aml::Scope::new("_SB_".into(), vec![&bridge, &board]))
}

fn serial_scope() -> Made {
    let ports = aml::IO::new(
        layout::SERIAL_PORT,
        layout::SERIAL_PORT,
        1,
        layout::SERIAL_PORTS as u8,
    );
    let interrupt = aml::Interrupt::new(true, true, false, false, layout::SERIAL_IRQ);
    let resources = aml::ResourceTemplate::new(vec![&ports, &interrupt]);
    let id = aml::EISAName::new("PNP0501");
    let hid = aml::Name::new("_HID".into(), &id);
    let uid = aml::Name::new("_UID".into(), &aml::ZERO);
    let crs = aml::Name::new("_CRS".into(), &resources);
    let serial = aml::Device::new("COM1".into(), vec![&hid, &uid, &crs]);
    made(&aml::Scope::new("_SB_".into(), vec![&serial]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// The table at this guest address.
    fn table(tables: &Tables, address: u64) -> &[u8] {
        let at = (address - layout::ACPI) as usize;
        let size = u32::from_le_bytes(tables.body[at + 4..at + 8].try_into().unwrap());
        &tables.body[at..at + size as usize]
    }

    fn word(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn every_table_is_found_from_the_root_and_sums_to_zero() {
        let tables = tables(3);
        assert_eq!(&tables.root[..8], b"RSD PTR ");
        assert_eq!((sum(&tables.root[..20]), sum(&tables.root)), (0, 0));
        let xsdt = table(&tables, word(&tables.root, 24));
        let entries = (36..xsdt.len()).step_by(8).map(|at| word(xsdt, at));
        let mut found = vec![xsdt];
        found.extend(entries.map(|address| table(&tables, address)));
        let fadt = found[1];
        found.push(table(&tables, word(fadt, 140)));
        let names: Vec<_> = found.iter().map(|table| &table[..4]).collect();
        let wanted: [&[u8]; 5] = [b"XSDT", b"FACP", b"APIC", b"MCFG", b"DSDT"];
        assert_eq!(names, wanted);
        assert!(found.iter().all(|table| sum(table) == 0));
        assert_eq!(fadt.len(), 276);
        let end = layout::ACPI + tables.body.len() as u64;
        assert!(end < layout::RSDP, "{end:#x}");
        // Three CPUs of 8 bytes and an IOAPIC of 12.
        assert_eq!(found[2].len(), 44 + 3 * 8 + 12);
    }

    #[test]
    fn the_sleep_type_is_what_the_port_is_told() {
        // A sleep type in bits 2 to 4, and the enable bit.
        assert_eq!(layout::SLEEP_S5, 0x34);
        let found = tables(1).body;
        let s5 = b"_S5_\x12";
        assert!(found.windows(5).any(|window| window == s5));
    }
}
