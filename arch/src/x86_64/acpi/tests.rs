//! The tables, read back as a guest would: from the RSDP on, each header and checksum, each
//! structure of the MADT, and the AML down to the packages' lengths.

use super::*;

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, &b| sum.wrapping_add(b))
}

/// The table at a guest address, with length and checksum looked at.
fn table_at(all: &[u8], address: u64) -> &[u8] {
    let from = (address - layout::ACPI.start) as usize;
    let len = u32_at(all, from + 4) as usize;
    let table = &all[from..from + len];
    assert_eq!(sum(table), 0, "checksum of {:?}", &table[..4]);
    assert_eq!(address % 4, 0);
    table
}

/// Follows RSDP and XSDT.
fn walk(all: &[u8]) -> Vec<&[u8]> {
    assert_eq!(&all[..8], b"RSD PTR ");
    assert_eq!((sum(&all[..20]), sum(&all[..36])), (0, 0));
    assert_eq!(all[15], 2, "revision");
    let xsdt = table_at(all, u64_at(all, 24));
    assert_eq!(&xsdt[..4], b"XSDT");
    xsdt[36..].chunks_exact(8).map(|entry| table_at(all, u64_at(entry, 0))).collect()
}

fn find<'t>(tables: &[&'t [u8]], signature: &[u8; 4]) -> Option<&'t [u8]> {
    tables.iter().copied().find(|t| &t[..4] == signature)
}

fn dsdt(all: &[u8]) -> &[u8] {
    let fadt = find(&walk(all), b"FACP").unwrap();
    let dsdt = table_at(all, u64_at(fadt, 140));
    assert_eq!((&dsdt[..4], dsdt[8]), (&b"DSDT"[..], 2));
    dsdt
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|w| w == needle)
}

fn full() -> Description<'static> {
    const SERIAL: &[SerialPort] = &[SerialPort { port: 0x3f8, line: 4 }];
    const VIRTIO: &[VirtioMmio] = &[
        VirtioMmio { base: 0xc000_0000, len: 0x1000, line: 5 },
        VirtioMmio { base: 0xc000_1000, len: 0x1000, line: 6 },
    ];
    Description {
        vcpus: 64,
        processors: Some(Processors { max: 64, present: 0x620, inserted: 0x628 }),
        serial: SERIAL,
        pvpanic: Some(0x505),
        virtio_mmio: VIRTIO,
        pci: Some(PciHost {
            ecam: 0xe000_0000,
            last_bus: 0,
            window_32: 0xc100_0000..0xe000_0000,
            window_64: Some(0x1_4000_0000..0xfd_0000_0000),
            hotplug: Some(PciHotplug { port: 0x640, slots: 32 }),
        }),
        reset: Some((Register::Io(0x600), 7)),
        sleep: Some(Sleep { control: Register::Io(0x601), status: Register::Io(0x602) }),
        events: Some(Events { line: 9, status: Register::Mmio(0xc0ff_f000) }),
        power_button: true,
        i8042: true,
        generation_id: Some(layout::GENERATION_ID),
        vm_clock: Some(layout::VM_CLOCK),
    }
}

#[test]
fn every_table_has_its_checksum_and_is_found_from_the_rsdp() {
    for (machine, expected) in [(Description { vcpus: 1, ..Default::default() }, 2), (full(), 3)] {
        let all = tables(&machine);
        let found = walk(&all);
        assert_eq!(found.len(), expected);
        assert!(all.len() < 12 << 10, "{} bytes", all.len());
        dsdt(&all);
    }
}

#[test]
fn the_madt_lists_every_processor_and_the_ioapic() {
    for vcpus in [1u8, 2, 64] {
        let all = tables(&Description { vcpus, ..Default::default() });
        let madt = find(&walk(&all), b"APIC").unwrap();
        assert_eq!(u32_at(madt, 36), 0xfee0_0000);
        let mut rest = &madt[44..];
        let (mut ids, mut ioapics) = (Vec::new(), 0);
        while let [kind, len, ..] = *rest {
            let (entry, after) = rest.split_at(usize::from(len));
            match kind {
                0 => {
                    assert_eq!((entry[2], u32_at(entry, 4)), (entry[3], 1));
                    ids.push(entry[3]);
                }
                1 => {
                    assert_eq!((u32_at(entry, 4), u32_at(entry, 8)), (0xfec0_0000, 0));
                    ioapics += 1;
                }
                4 => assert_eq!(entry[5], 1),
                other => panic!("structure {other}"),
            }
            rest = after;
        }
        assert_eq!(ids, (0..vcpus).collect::<Vec<_>>());
        assert_eq!(ioapics, 1);
    }
}

#[test]
fn processors_that_can_come_are_listed_but_not_enabled() {
    let processors = Some(Processors { max: 4, present: 0x620, inserted: 0x628 });
    let all = tables(&Description { vcpus: 1, processors, ..Default::default() });
    let madt = find(&walk(&all), b"APIC").unwrap();
    let flags: Vec<u32> = madt[44..].chunks_exact(8).take(4).map(|entry| u32_at(entry, 4)).collect();
    assert_eq!(flags, [1, 2, 2, 2]);
}

#[test]
fn the_fadt_says_hardware_reduced_and_what_is_not_there() {
    let all = tables(&full());
    let fadt = find(&walk(&all), b"FACP").unwrap();
    assert_eq!(fadt.len(), 276);
    let flags = u32_at(fadt, 112);
    assert_ne!(flags & 1 << 20, 0, "hardware-reduced");
    assert_ne!(flags & 1 << 10, 0, "reset register");
    assert_eq!(fadt[109] & 0x26, 0x26, "8042 there; no VGA, no CMOS clock");
    // GAS: I/O space, 8 bits, byte access, port.
    assert_eq!((&fadt[116..120], u64_at(fadt, 120), fadt[128]), (&[1, 8, 0, 1][..], 0x600, 7));
    assert_eq!((fadt[244], u64_at(fadt, 248)), (1, 0x601));
    assert_eq!((fadt[256], u64_at(fadt, 260)), (1, 0x602));

    let all = tables(&Description { vcpus: 1, ..Default::default() });
    let fadt = find(&walk(&all), b"FACP").unwrap();
    assert_eq!(fadt[109] & 0x02, 0, "no 8042");
    assert_eq!(u32_at(fadt, 112) & 1 << 10, 0, "no reset register");
    assert_eq!(u64_at(fadt, 248), 0);
}

#[test]
fn the_mcfg_is_there_with_pci_only() {
    let all = tables(&full());
    let mcfg = find(&walk(&all), b"MCFG").unwrap();
    assert_eq!(u64_at(mcfg, 44), 0xe000_0000);
    assert_eq!(&mcfg[52..56], [0, 0, 0, 0], "segment 0, bus 0 to 0");
}

/// Reads an AML package length: value and bytes used.
fn package_length(aml: &[u8]) -> (usize, usize) {
    let more = usize::from(aml[0] >> 6);
    if more == 0 {
        return (usize::from(aml[0] & 0x3f), 1);
    }
    let low = usize::from(aml[0] & 0xf);
    let len = (0..more).fold(low, |len, i| len | usize::from(aml[1 + i]) << (4 + 8 * i));
    (len, 1 + more)
}

/// Names of the devices in `\_SB`, checking that lengths nest exactly.
fn devices(dsdt: &[u8]) -> Vec<String> {
    let body = &dsdt[36..];
    assert_eq!(body[0], 0x10, "a scope");
    let (len, used) = package_length(&body[1..]);
    let mut scope = &body[1 + used..1 + len];
    assert_eq!(&scope[..5], b"\\_SB_");
    scope = &scope[5..];
    let mut names = Vec::new();
    while !scope.is_empty() {
        assert_eq!(&scope[..2], [0x5b, 0x82], "a device");
        let (len, used) = package_length(&scope[2..]);
        names.push(String::from_utf8(scope[2 + used..6 + used].to_vec()).unwrap());
        scope = &scope[2 + len..];
    }
    names
}

#[test]
fn the_dsdt_names_what_is_there_and_nothing_else() {
    let all = tables(&full());
    let table = dsdt(&all);
    let names = devices(table);
    for name in
        ["CPUS", "S000", "KBD_", "PEVT", "V000", "V001", "PCI0", "MBRD", "PWRB", "VGEN", "VCLK", "GED_"]
    {
        assert_eq!(names.iter().filter(|n| *n == name).count(), 1, "{name}");
    }
    assert_eq!(names.len(), 1 + 11);
    assert!(contains(table, b"QEMU0001\0"));
    // The bit of the last processor, its name, its entry for the MADT.
    for part in [&b"Q03F\x01"[..], b"C03F", &[0, 8, 63, 63, 1, 0, 0, 0], b"\\/\x03_SB_CPUSSCAN"] {
        assert!(contains(table, part), "{part:?}");
    }
    assert!(contains(table, b"_S5_"));
    // Memory32Fixed and extended interrupt of the second virtio device.
    assert!(contains(table, &[0x86, 9, 0, 1, 0, 0x10, 0, 0xc0, 0, 0x10, 0, 0]));
    assert!(contains(table, &[0x89, 6, 0, 3, 1, 6, 0, 0, 0]));
    assert!(contains(table, b"_OSC") && contains(table, b"_EVT"));

    // Eject method of slot 31: its bit is stored to the register.
    assert!(contains(table, b"P01F") && !contains(table, b"P000") && !contains(table, b"P020"));
    assert!(contains(table, b"\x70\x0c\x00\x00\x00\x80PEJT"));

    let mut fixed = full();
    fixed.pci.iter_mut().for_each(|pci| pci.hotplug = None);
    let fixed = tables(&fixed);
    for name in [&b"PSCN"[..], b"_EJ0", b"PHPR"] {
        assert!(contains(table, name) && !contains(dsdt(&fixed), name));
    }

    // The id's address in two halves; both devices are notified by one event.
    assert!(contains(table, b"ADDR\x12\x08\x02\x0c\x00\xf0\x09\x00\x00"));
    for device in [b"\x86\\._SB_VGEN\x0a\x80", b"\x86\\._SB_VCLK\x0a\x80"] {
        assert!(contains(table, device), "{device:?}");
    }

    let bare = tables(&Description { vcpus: 4, ..Default::default() });
    assert!(devices(dsdt(&bare)).is_empty());
    assert!(!contains(dsdt(&bare), b"_S5_"));
}

#[test]
fn a_device_list_without_end_is_refused() {
    let many = vec![VirtioMmio { base: 0xc000_0000, len: 0x1000, line: 5 }; 4000];
    let machine = Description { vcpus: 1, virtio_mmio: &many, ..Default::default() };
    let memory = vm_memory::GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    assert!(matches!(write(&memory, &machine), Err(AcpiError::TooLong { .. })));
    assert_eq!(write(&memory, &full()).unwrap(), 0xe_0000);
}
