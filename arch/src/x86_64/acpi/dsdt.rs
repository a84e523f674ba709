//! The DSDT: every device of the machine that cannot be found by itself, in AML.
//!
//! Each function appends the bytes of one device. Names are four characters and unique below
//! `\_SB`; the index of a device is in its name and its `_UID`.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal, Field,
    FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed,
    Method, MethodCall, Name, NotEqual, Notify, ONE, OpRegion, OpRegionSpace, Or, Package, Path,
    ResourceTemplate, Return, Scope, Store, Uuid, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::{
    Description, Events, POWER_OFF_SLEEP_TYPE, PciHost, PciHotplug, Register, SerialPort, VirtioMmio, event,
    layout, processors, table as sdt,
};

/// Bytes of AML that are done.
pub(super) struct Done<'a>(pub(super) &'a [u8]);

impl Aml for Done<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.0);
    }
}

/// The whole table. Revision 2: integers have 64 bits.
pub(super) fn table(machine: &Description<'_>) -> Sdt {
    let mut devices = Vec::new();
    if let Some(described) = machine.processors {
        processors::container(&mut devices, described);
    }
    for (index, port) in machine.serial.iter().enumerate() {
        serial(&mut devices, index, *port);
    }
    if machine.i8042 {
        keyboard(&mut devices);
    }
    if let Some(port) = machine.pvpanic {
        let hid = Name::new("_HID".into(), &"QEMU0001");
        let ports = IO::new(port, port, 1, 1);
        let resources = ResourceTemplate::new(vec![&ports]);
        let crs = Name::new("_CRS".into(), &resources);
        Device::new("PEVT".into(), vec![&hid, &crs]).to_aml_bytes(&mut devices);
    }
    for (index, virtio) in machine.virtio_mmio.iter().enumerate() {
        virtio_mmio(&mut devices, index, *virtio);
    }
    if let Some(pci) = &machine.pci {
        pci_host(&mut devices, pci);
    }
    if machine.power_button {
        let id = Name::new("_HID".into(), &EISAName::new("PNP0C0C"));
        Device::new("PWRB".into(), vec![&id]).to_aml_bytes(&mut devices);
    }
    if let Some(address) = machine.generation_id {
        generation_id(&mut devices, address);
    }
    if let Some(memory) = &machine.vm_clock {
        let window = memory_64(memory.start, memory.end.saturating_sub(1));
        vm_clock(&mut devices, &window);
    }
    if let Some(events) = machine.events {
        event_device(&mut devices, events, machine);
    }
    let mut body = Scope::raw("\\_SB_".into(), devices);
    if machine.sleep.is_some() {
        let kind = POWER_OFF_SLEEP_TYPE;
        let package = Package::new(vec![&kind, &kind, &ZERO, &ZERO]);
        Name::new("\\_S5_".into(), &package).to_aml_bytes(&mut body);
    }
    sdt(*b"DSDT", 2, &body)
}

pub(super) fn numbered(letter: char, index: usize) -> Path {
    // Three hexadecimal digits are more than fit into the tables' memory.
    Path::new(&format!("{letter}{:03X}", index & 0xfff))
}

/// An edge-triggered, active-high line of one owner, which is how an event descriptor in KVM
/// raises it.
fn line(number: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, number)
}

fn serial(out: &mut Vec<u8>, index: usize, serial: SerialPort) {
    let SerialPort { port, line: number } = serial;
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0501"));
    let uid = Name::new("_UID".into(), &index);
    let (ports, line) = (IO::new(port, port, 1, 8), line(number));
    let resources = ResourceTemplate::new(vec![&ports, &line]);
    let crs = Name::new("_CRS".into(), &resources);
    Device::new(numbered('S', index), vec![&hid, &uid, &crs]).to_aml_bytes(out);
}

fn keyboard(out: &mut Vec<u8>) {
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0303"));
    let (data, command, line) = (IO::new(0x60, 0x60, 1, 1), IO::new(0x64, 0x64, 1, 1), line(1));
    let resources = ResourceTemplate::new(vec![&data, &command, &line]);
    let crs = Name::new("_CRS".into(), &resources);
    Device::new("KBD_".into(), vec![&hid, &crs]).to_aml_bytes(out);
}

fn virtio_mmio(out: &mut Vec<u8>, index: usize, virtio: VirtioMmio) {
    let hid = Name::new("_HID".into(), &"LNRO0005");
    let uid = Name::new("_UID".into(), &index);
    // Its DMA sees the processors' caches.
    let coherent = Name::new("_CCA".into(), &ONE);
    let registers = Memory32Fixed::new(true, virtio.base, virtio.len);
    let line = line(virtio.line);
    let resources = ResourceTemplate::new(vec![&registers, &line]);
    let crs = Name::new("_CRS".into(), &resources);
    Device::new(numbered('V', index), vec![&hid, &uid, &coherent, &crs]).to_aml_bytes(out);
}

fn memory_64(first: u64, last: u64) -> AddressSpace<u64> {
    AddressSpace::new_memory(AddressSpaceCacheable::Cacheable, true, first, last, None)
}

fn vm_clock(out: &mut Vec<u8>, window: &AddressSpace<u64>) {
    let hid = Name::new("_HID".into(), &"AMZNC10C");
    let cid = Name::new("_CID".into(), &"VMCLOCK");
    let ddn = Name::new("_DDN".into(), &"VMCLOCK");
    let resources = ResourceTemplate::new(vec![window]);
    let crs = Name::new("_CRS".into(), &resources);
    Device::new("VCLK".into(), vec![&hid, &cid, &ddn, &crs]).to_aml_bytes(out);
}

fn generation_id(out: &mut Vec<u8>, address: u64) {
    let hid = Name::new("_HID".into(), &"NCEL0001");
    // The name of the specification, and the shorter one that Linux and Hyper-V also use.
    let names = Package::new(vec![&"VM_Gen_Counter", &"VMGENCTR"]);
    let cid = Name::new("_CID".into(), &names);
    let ddn = Name::new("_DDN".into(), &"VM_Gen_Counter");
    let (low, high) = (address as u32, (address >> 32) as u32);
    let package = Package::new(vec![&low, &high]);
    let addr = Name::new("ADDR".into(), &package);
    Device::new("VGEN".into(), vec![&hid, &cid, &ddn, &addr]).to_aml_bytes(out);
}

/// The Generic Event Device: on its line, reads the status byte and notifies whom it concerns.
fn event_device(out: &mut Vec<u8>, events: Events, machine: &Description<'_>) {
    let (space, address) = match events.status {
        Register::Io(port) => (OpRegionSpace::SystemIO, u64::from(port)),
        Register::Mmio(address) => (OpRegionSpace::SystemMemory, address),
    };
    let region = OpRegion::new("STAT".into(), space, &address, &ONE);
    let field = Field::new(
        "STAT".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"PEND", 8)],
    );
    let (pending, status) = (Local(0), Path::new("PEND"));
    let read = Store::new(&pending, &status);
    let mut handlers = Vec::new();
    for (bit, there, target) in [
        (event::POWER_BUTTON, machine.power_button, "\\_SB_.PWRB"),
        (event::GENERATION, machine.generation_id.is_some(), "\\_SB_.VGEN"),
        (event::GENERATION, machine.vm_clock.is_some(), "\\_SB_.VCLK"),
    ] {
        let (target, changed) = (Path::new(target), 0x80u8);
        let notify = Notify::new(&target, &changed);
        // A ZERO as target is "nowhere" in AML.
        let is_set = And::new(&ZERO, &pending, &bit);
        if there {
            If::new(&is_set, vec![&notify]).to_aml_bytes(&mut handlers);
        }
    }
    if machine.pci.as_ref().is_some_and(|pci| pci.hotplug.is_some()) {
        let is_set = And::new(&ZERO, &pending, &event::PCI);
        let scan = MethodCall::new("\\_SB_.PCI0.PSCN".into(), Vec::new());
        If::new(&is_set, vec![&scan]).to_aml_bytes(&mut handlers);
    }
    if machine.processors.is_some() {
        let is_set = And::new(&ZERO, &pending, &event::PROCESSORS);
        let scan = MethodCall::new(processors::SCAN.into(), Vec::new());
        If::new(&is_set, vec![&scan]).to_aml_bytes(&mut handlers);
    }
    let handlers = Done(&handlers);
    let method = Method::new("_EVT".into(), 1, true, vec![&read, &handlers]);
    let hid = Name::new("_HID".into(), &"ACPI0013");
    let uid = Name::new("_UID".into(), &ZERO);
    let line = line(events.line);
    let resources = ResourceTemplate::new(vec![&line]);
    let crs = Name::new("_CRS".into(), &resources);
    Device::new("GED_".into(), vec![&hid, &uid, &crs, &region, &field, &method]).to_aml_bytes(out);
}

/// The host bridge, and the device that claims its configuration space: Linux uses ECAM only
/// where a device of the motherboard owns it.
fn pci_host(out: &mut Vec<u8>, pci: &PciHost) {
    let buses = AddressSpace::new_bus_number(0u16, u16::from(pci.last_bus));
    let window =
        |first, last| AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, first, last, None);
    let low = window(pci.window_32.start, pci.window_32.end.saturating_sub(1));
    let high = pci.window_64.as_ref().map(|w| memory_64(w.start, w.end.saturating_sub(1)));
    let mut windows: Vec<&dyn Aml> = vec![&buses, &low];
    windows.extend(high.as_ref().map(|w| w as &dyn Aml));
    let resources = ResourceTemplate::new(windows);

    let hid = Name::new("_HID".into(), &EISAName::new("PNP0A08"));
    let cid = Name::new("_CID".into(), &EISAName::new("PNP0A03"));
    let seg = Name::new("_SEG".into(), &ZERO);
    let bbn = Name::new("_BBN".into(), &ZERO);
    let uid = Name::new("_UID".into(), &ZERO);
    let coherent = Name::new("_CCA".into(), &ONE);
    let crs = Name::new("_CRS".into(), &resources);
    let mut osc = Vec::new();
    operating_system_capabilities(&mut osc);
    let osc = Done(&osc);
    let mut slots = Vec::new();
    if let Some(hotplug) = pci.hotplug {
        pci_slots(&mut slots, hotplug);
    }
    let slots = Done(&slots);
    let parts: Vec<&dyn Aml> = vec![&hid, &cid, &seg, &bbn, &uid, &coherent, &crs, &osc, &slots];
    Device::new("PCI0".into(), parts).to_aml_bytes(out);

    let length = (u32::from(pci.last_bus) + 1).saturating_mul(layout::ECAM_BUS as u32);
    let ecam = Memory32Fixed::new(true, pci.ecam, length);
    let resources = ResourceTemplate::new(vec![&ecam]);
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0C02"));
    let crs = Name::new("_CRS".into(), &resources);
    Device::new("MBRD".into(), vec![&hid, &uid, &crs]).to_aml_bytes(out);
}

/// The slots of bus 0 and the method that looks which of them changed (ACPI 6.5 sections 6.1.1,
/// 6.1.8 and 6.3.3). There is no `_STA`: a guest finds out by the configuration space whether
/// something is in a slot.
fn pci_slots(out: &mut Vec<u8>, hotplug: PciHotplug) {
    const DEVICE_CHECK: u8 = 1;
    const EJECT_REQUEST: u8 = 3;
    let region = OpRegion::new("PHPR".into(), OpRegionSpace::SystemIO, &hotplug.port, &12u8);
    region.to_aml_bytes(out);
    let field = |name| FieldEntry::Named(name, 32);
    Field::new(
        "PHPR".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![field(*b"PINS"), field(*b"PWNT"), field(*b"PEJT")],
    )
    .to_aml_bytes(out);
    let (inserted, wanted, eject) = (Path::new("PINS"), Path::new("PWNT"), Path::new("PEJT"));
    let mut scan = Vec::new();
    Store::new(&Local(0), &inserted).to_aml_bytes(&mut scan);
    Store::new(&Local(1), &wanted).to_aml_bytes(&mut scan);
    for slot in 1..hotplug.slots.min(32) {
        let (name, bit) = (numbered('P', slot.into()), 1u32 << slot);
        let (sun, adr) =
            (Name::new("_SUN".into(), &slot), Name::new("_ADR".into(), &(u32::from(slot) << 16)));
        let give = Store::new(&eject, &bit);
        let eject = Method::new("_EJ0".into(), 1, true, vec![&give]);
        Device::new(numbered('P', slot.into()), vec![&sun, &adr, &eject]).to_aml_bytes(out);
        for (bits, what) in [(Local(0), DEVICE_CHECK), (Local(1), EJECT_REQUEST)] {
            let is_set = And::new(&ZERO, &bits, &bit);
            let notify = Notify::new(&name, &what);
            If::new(&is_set, vec![&notify]).to_aml_bytes(&mut scan);
        }
    }
    let scan = Done(&scan);
    Method::new("PSCN".into(), 0, true, vec![&scan]).to_aml_bytes(out);
}

/// `_OSC` of the host bridge (PCI Firmware Specification 4.5): the operating system may have
/// hotplug, power management events, error reporting and the PCI Express capability; what else
/// it asks for is masked and it is told so.
fn operating_system_capabilities(out: &mut Vec<u8>) {
    const GRANTED: u8 = 0x1d;
    const UNKNOWN_UUID: u8 = 0x04;
    const MASKED: u8 = 0x10;
    let (uuid_arg, buffer, asked) = (Arg(0), Arg(3), Local(0));
    let (first, third) = (Path::new("CDW1"), Path::new("CDW3"));
    let eight = 8u8;
    let status = CreateDWordField::new(&first, &buffer, &ZERO);
    let control = CreateDWordField::new(&third, &buffer, &eight);
    let uuid = Uuid::new("33DB4D5B-1FF7-401C-9657-7441C03DD766");
    let known = Equal::new(&uuid_arg, &uuid);
    let mask = And::new(&asked, &third, &GRANTED);
    let differs = NotEqual::new(&asked, &third);
    let say_masked = Or::new(&first, &first, &MASKED);
    let masked = If::new(&differs, vec![&say_masked]);
    let grant = Store::new(&third, &asked);
    let then = If::new(&known, vec![&control, &mask, &masked, &grant]);
    let say_unknown = Or::new(&first, &first, &UNKNOWN_UUID);
    let otherwise = Else::new(vec![&say_unknown]);
    let answer = Return::new(&buffer);
    let body: Vec<&dyn Aml> = vec![&status, &then, &otherwise, &answer];
    Method::new("_OSC".into(), 4, true, body).to_aml_bytes(out);
}
