//! ACPI: how the guest learns what the machine has, without firmware and without probing.
//!
//! ```text
//!   RSDP -> XSDT -> FADT -> DSDT      what is there, in AML        (dsdt.rs)
//!                -> MADT              processors, IOAPIC
//!                -> MCFG              PCI configuration space, if there is PCI
//! ```
//!
//! **Hardware-reduced.** The FADT says that there is no ACPI hardware: no PM timer, no SCI, no
//! fixed events, and, in its boot flags, no VGA, no CMOS clock and no keyboard controller unless
//! there is one. Linux then does not look for PIC, PIT, CMOS and i8042, each of which would cost
//! exits to find nothing. Power-off goes through the sleep control register, reset through the
//! reset register: one exit each, at addresses the caller chooses. What happens to the running
//! machine (power button, new generation id) comes through one interrupt line and one status
//! byte, a Generic Event Device.
//!
//! Tables are made anew at each start (some microseconds), lie in [`layout::ACPI`] with the RSDP
//! first, and are checked by the tests table by table.

mod dsdt;
mod processors;
#[cfg(test)]
mod tests;

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::{layout, mptable};

/// The sleep type of "power off" in the `_S5` object.
pub const POWER_OFF_SLEEP_TYPE: u8 = 5;
/// What a guest writes to the sleep control register to power off: sleep type and enable bit.
pub const POWER_OFF_VALUE: u8 = POWER_OFF_SLEEP_TYPE << 2 | 1 << 5;

/// Bits of the event status byte. The caller keeps pending bits there, raises the line when it
/// sets one, and clears them all when the byte is read.
pub mod event {
    /// The power button was pressed.
    pub const POWER_BUTTON: u8 = 1;
    /// Processors have come.
    pub const PROCESSORS: u8 = 2;
    /// The generation id has changed. The bit between is that of events of memory, which no
    /// table here speaks of yet.
    pub const GENERATION: u8 = 8;
    /// PCI devices came or are to go.
    pub const PCI: u8 = 16;
}

/// Where a one-byte register lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// An I/O port.
    Io(u16),
    /// A guest physical address.
    Mmio(u64),
}

impl Register {
    fn gas(self) -> GAS {
        let (space, address) = match self {
            Self::Io(port) => (AddressSpace::SystemIo, u64::from(port)),
            Self::Mmio(address) => (AddressSpace::SystemMemory, address),
        };
        GAS::new(space, 8, 0, AccessSize::ByteAccess, address)
    }
}

/// A 16550 with eight ports from `port`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SerialPort {
    /// First I/O port (0x3f8 for the first).
    pub port: u16,
    /// Interrupt line, edge-triggered.
    pub line: u32,
}

/// A virtio device with the MMIO transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioMmio {
    /// First address of its registers.
    pub base: u32,
    /// Bytes of its registers.
    pub len: u32,
    /// Interrupt line, edge-triggered.
    pub line: u32,
}

/// A PCI host bridge with ECAM and message-signalled interrupts only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciHost {
    /// Configuration space of bus 0; [`layout::ECAM_BUS`] bytes a bus.
    pub ecam: u32,
    /// The last bus number.
    pub last_bus: u8,
    /// Window for 32-bit BARs.
    pub window_32: Range<u32>,
    /// Window for 64-bit BARs.
    pub window_64: Option<Range<u64>>,
    /// Devices that come and go while the guest runs; works through the event device.
    pub hotplug: Option<PciHotplug>,
}

/// Three 32-bit I/O ports with a bit a slot: slots that were filled, slots that are wanted back
/// (reading either takes its bits), and, for writing, slots that the guest has let go of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciHotplug {
    /// The first port.
    pub port: u16,
    /// Device numbers 1 to one less than this are described (at most 32).
    pub slots: u8,
}

/// The event device: one line, one status byte (see [`event`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Events {
    /// Interrupt line, edge-triggered.
    pub line: u32,
    /// Pending events, cleared by reading.
    pub status: Register,
}

/// Room for processors that come while the guest runs; works through [`Events`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Processors {
    /// How many there can be in all (at most 64).
    pub max: u8,
    /// First of eight I/O ports with a bit for each processor that is present.
    pub present: u16,
    /// First of eight I/O ports with a bit for each that has come; reading takes the bits.
    pub inserted: u16,
}

/// Sleep registers of a hardware-reduced machine. Only power-off ([`POWER_OFF_VALUE`]) exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sleep {
    /// Written by the guest.
    pub control: Register,
    /// Written to clear the wake status, and read; 0 is a right answer.
    pub status: Register,
}

/// Everything the tables can describe. What is `None`, empty or false is not there, and the
/// guest does not look for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Description<'a> {
    /// vCPUs that are present; their APIC ids are their indices.
    pub vcpus: u8,
    /// Those that can come, with the ones that are present, described in the DSDT too. Where none
    /// can come Linux needs the MADT only and is spared the work.
    pub processors: Option<Processors>,
    /// Serial ports.
    pub serial: &'a [SerialPort],
    /// Port of the panic notifier (`QEMU0001`).
    pub pvpanic: Option<u16>,
    /// virtio devices on the MMIO transport, in the order the guest shall find them.
    pub virtio_mmio: &'a [VirtioMmio],
    /// PCI.
    pub pci: Option<PciHost>,
    /// Reset register and the value that resets.
    pub reset: Option<(Register, u8)>,
    /// Registers for power-off.
    pub sleep: Option<Sleep>,
    /// The event device.
    pub events: Option<Events>,
    /// A power button; works through `events`.
    pub power_button: bool,
    /// A keyboard controller at ports 0x60 and 0x64, line 1.
    pub i8042: bool,
    /// Guest address of the 16-byte generation id (VMGENID); changes come through `events`.
    pub generation_id: Option<u64>,
    /// Guest memory of the VMClock structure; changes come through `events`, with the id's.
    pub vm_clock: Option<Range<u64>>,
}

/// The tables could not be put into guest memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AcpiError {
    /// More devices than there is room to describe.
    #[error("The ACPI tables take {have} bytes; there is room for {room}: fewer devices would do")]
    TooLong {
        /// Bytes of all tables.
        have: usize,
        /// Bytes reserved.
        room: usize,
    },
    /// Guest memory could not be written.
    #[error("Cannot write the ACPI tables into guest memory")]
    Memory(#[from] GuestMemoryError),
}

const OEM: [u8; 6] = *b"NACELL";
const OEM_TABLE: [u8; 8] = *b"NACELLE ";
const OEM_REVISION: u32 = 1;

/// Writes the tables into guest memory and returns the address of the RSDP. The older
/// multiprocessor table is written too, in its own place.
///
/// # Errors
/// See [`AcpiError`].
pub fn write<M: GuestMemoryBackend>(memory: &M, machine: &Description<'_>) -> Result<u64, AcpiError> {
    let bytes = tables(machine);
    let room = (layout::ACPI.end - layout::ACPI.start) as usize;
    if bytes.len() > room {
        return Err(AcpiError::TooLong { have: bytes.len(), room });
    }
    memory.write_slice(&bytes, GuestAddress(layout::ACPI.start))?;
    // The older table, so that it is found where Linux looks early.
    mptable::write(memory, machine.vcpus)?;
    Ok(layout::ACPI.start)
}

/// All tables, as they lie from [`layout::ACPI`]'s start; the RSDP is first.
#[must_use]
pub fn tables(machine: &Description<'_>) -> Vec<u8> {
    // Room for the RSDP, whose content is known last.
    let mut out = vec![0u8; Rsdp::len()];
    let mut add = |table: &dyn Aml| {
        out.resize(out.len().next_multiple_of(16), 0);
        let at = layout::ACPI.start + out.len() as u64;
        table.to_aml_bytes(&mut out);
        at
    };
    let dsdt = add(&dsdt::table(machine));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(add(&fadt(machine, dsdt)));
    xsdt.add_entry(add(&madt(machine)));
    if let Some(pci) = &machine.pci {
        let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
        mcfg.add_ecam(u64::from(pci.ecam), 0, 0, pci.last_bus);
        xsdt.add_entry(add(&mcfg));
    }
    let xsdt = add(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    out[..rsdp.len()].copy_from_slice(&rsdp);
    out
}

fn fadt(machine: &Description<'_>, dsdt: u64) -> impl Aml {
    const HAS_8042: u16 = 1 << 1;
    const NO_VGA: u16 = 1 << 2;
    const NO_CMOS_CLOCK: u16 = 1 << 5;
    let mut boot = NO_VGA | NO_CMOS_CLOCK;
    if machine.i8042 {
        boot |= HAS_8042;
    }
    // The button flags say "no fixed button": ours is a device of the DSDT.
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = boot.into();
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE).into();
    if let Some((register, value)) = machine.reset {
        fadt = fadt.flag(Flags::ResetRegSup);
        fadt.reset_reg = register.gas();
        fadt.reset_value = value;
    }
    if let Some(sleep) = machine.sleep {
        fadt.sleep_control_reg = sleep.control.gas();
        fadt.sleep_status_reg = sleep.status.gas();
    }
    fadt.finalize()
}

/// MADT: local APICs, the IOAPIC with all lines from GSI 0, NMI on LINT1 of every processor.
/// Lines are not renumbered, so there is no override.
fn madt(machine: &Description<'_>) -> Sdt {
    let mut body = Vec::new();
    body.extend_from_slice(&(layout::LOCAL_APIC as u32).to_le_bytes());
    // Flags: there are no 8259s to turn off.
    body.extend_from_slice(&0u32.to_le_bytes());
    let max = machine.processors.map_or(machine.vcpus, |processors| processors.max);
    for id in 0..max.max(machine.vcpus) {
        body.extend_from_slice(&local_apic(id, if id < machine.vcpus { ENABLED } else { ONLINE_CAPABLE }));
    }
    body.extend_from_slice(&[1, 12, 0, 0]);
    body.extend_from_slice(&(layout::IOAPIC as u32).to_le_bytes());
    body.extend_from_slice(&0u32.to_le_bytes());
    body.extend_from_slice(&[4, 6, 0xff, 0, 0, 1]);
    table(*b"APIC", 5, &body)
}

/// Flags of a processor in the MADT (ACPI 6.5 section 5.2.12.2): it is there, or can come.
const ENABLED: u8 = 1;
const ONLINE_CAPABLE: u8 = 2;

/// The MADT's entry of a processor: kind, length, id in the DSDT, APIC id, flags.
fn local_apic(id: u8, flags: u8) -> [u8; 8] {
    [0, 8, id, id, flags, 0, 0, 0]
}

fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Sdt {
    const HEADER: u32 = 36;
    let mut sdt = Sdt::new(signature, HEADER, revision, OEM, OEM_TABLE, OEM_REVISION);
    sdt.append_slice(body);
    sdt
}
