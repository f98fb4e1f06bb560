//! ACPI without the hardware that it is named after (ACPI 6.5, "hardware-reduced"): FADT, MADT, DSDT.
//!
//! The FADT says that there is no clock of a PC (CMOS), or Linux waits seconds for one. A guest switches itself off by the sleep control register.

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use podvisor_virtio::device::Memory;
use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::layout::{
    ACPI, IO_APIC, LOCAL_APIC, PANIC, RESET_PORT, SERIAL_INTERRUPT, SERIAL_PORT, SLEEP_CONTROL_PORT,
    SLEEP_STATUS_PORT,
};

const OEM: [u8; 6] = *b"PODVSR";
const TABLE: [u8; 8] = *b"PODVISOR";
/// FADT, `iapc_boot_arch`: no VGA, no MSI restriction, no CMOS clock.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS: u16 = 1 << 5;
/// What a guest writes to the sleep control register to be off: SLP_TYP 5, SLP_EN.
pub(crate) const SLEEP_TYPE_OFF: u8 = 5;
/// What it writes to the reset register.
pub(crate) const RESET_VALUE: u8 = 1;

/// What the tables are to tell.
#[derive(Debug)]
pub(crate) struct Tables<'a> {
    /// Local APICs' numbers, of all processors that there can be.
    pub(crate) processors: u8,
    /// How devices are found: definitions for the DSDT's scope `\_SB`.
    pub(crate) devices: &'a [u8],
}

/// Writes them into the guest's memory; gives the root's address.
pub(crate) fn write(memory: &Memory, tables: &Tables<'_>) -> Result<u64, BootError> {
    let mut at = ACPI + Rsdp::len().next_multiple_of(64) as u64;
    let mut put = |bytes: &[u8]| -> Result<u64, BootError> {
        let place = at;
        memory.write_slice(bytes, GuestAddress(place))?;
        at += bytes.len().next_multiple_of(64) as u64;
        Ok(place)
    };
    let dsdt = put(dsdt(tables.devices).as_slice())?;
    let fadt = put(&bytes(&fadt(dsdt)))?;
    let madt = put(&bytes(&madt(tables.processors)))?;
    let mut xsdt = XSDT::new(OEM, TABLE, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = put(&bytes(&xsdt))?;
    memory.write_slice(&bytes(&Rsdp::new(OEM, xsdt)), GuestAddress(ACPI))?;
    Ok(ACPI)
}

/// What an object of the tables is as bytes.
pub(crate) fn bytes(object: &dyn Aml) -> Vec<u8> {
    struct Bytes(Vec<u8>);
    impl AmlSink for Bytes {
        fn byte(&mut self, byte: u8) {
            self.0.push(byte);
        }
    }
    let mut bytes = Bytes(Vec::new());
    object.to_aml_bytes(&mut bytes);
    bytes.0
}

/// A virtio device behind registers of one page at `address`.
pub(crate) fn virtio_mmio(number: u8, address: u32, length: u32, interrupt: u32) -> Vec<u8> {
    bytes(&Device::new(
        Path::new(&format!("V{number:03}")),
        vec![
            &Name::new(Path::new("_HID"), &"LNRO0005"),
            &Name::new(Path::new("_UID"), &number),
            // Memory can be read coherently.
            &Name::new(Path::new("_CCA"), &1u8),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, address, length),
                    &Interrupt::new(true, true, false, false, interrupt),
                ]),
            ),
        ],
    ))
}

fn dsdt(devices: &[u8]) -> Sdt {
    let mut scope = bytes(&Device::new(
        Path::new("COM1"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &1u8),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &IO::new(SERIAL_PORT, SERIAL_PORT, 0, 8),
                    &Interrupt::new(true, true, false, false, SERIAL_INTERRUPT),
                ]),
            ),
        ],
    ));
    let panic = Memory32Fixed::new(true, PANIC, 2);
    scope.extend(bytes(&Device::new(
        Path::new("PEVT"),
        vec![
            &Name::new(Path::new("_HID"), &"QEMU0001"),
            &Name::new(Path::new("_STA"), &0x0fu8),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&panic])),
        ],
    )));
    let off = Name::new(Path::new("_S5_"), &Package::new(vec![&SLEEP_TYPE_OFF, &0u8, &0u8, &0u8]));
    scope.extend(devices);
    let mut sdt = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, 1);
    sdt.append_slice(&bytes(&off));
    sdt.append_slice(&Scope::raw(Path::new("_SB_"), scope));
    sdt.update_checksum();
    sdt
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let port = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port));
    let mut fadt = FADTBuilder::new(OEM, TABLE, 1)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS).into();
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(TABLE).into();
    fadt.finalize()
}

fn madt(processors: u8) -> MADT {
    let mut madt = MADT::new(OEM, TABLE, 1, LocalInterruptController::Address(LOCAL_APIC));
    for number in 0..processors {
        madt.add_structure(ProcessorLocalApic::new(number, number, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(processors, IO_APIC, 0));
    madt
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_add_up() {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let devices: Vec<u8> = (0..3)
            .flat_map(|number| virtio_mmio(number, 0xd000_0000 + 0x1000 * u32::from(number), 0x1000, 5))
            .collect();
        let root = write(&memory, &Tables { processors: 4, devices: &devices }).unwrap();
        let read = |at: u64, length: usize| {
            let mut bytes = vec![0; length];
            memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
            bytes
        };
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        let rsdp = read(root, 36);
        assert!(rsdp.starts_with(b"RSD PTR ") && sum(&rsdp) == 0);
        let table = |at: u64| {
            let length = memory.read_obj::<u32>(GuestAddress(at + 4)).unwrap();
            let bytes = read(at, length as usize);
            assert_eq!(sum(&bytes), 0, "{:?}", String::from_utf8_lossy(&bytes[..4]));
            bytes
        };
        let long = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let xsdt = table(long(&rsdp, 24));
        assert!(xsdt.starts_with(b"XSDT") && xsdt.len() == 52);
        let (fadt, madt) = (table(long(&xsdt, 36)), table(long(&xsdt, 44)));
        assert!(fadt.starts_with(b"FACP") && madt.starts_with(b"APIC"));
        // Four processors and an I/O APIC.
        assert_eq!(madt.len(), 44 + 4 * 8 + 12);
        let dsdt = table(long(&fadt, 140));
        let count = |name: &[u8]| dsdt.windows(name.len()).filter(|part| *part == name).count();
        assert_eq!((count(b"LNRO0005"), count(b"_S5_"), count(b"COM1")), (3, 1, 1));
    }
}
