//! The multiprocessor table (MultiProcessor Specification 1.4), there to be found.
//!
//! Processors and interrupts are described by ACPI; Linux reads the older table only when ACPI
//! is switched off (`acpi=off`). But it *looks* for the table before it looks at ACPI, and where
//! there is none it looks at every 16 bytes of the BIOS area, mapping the rest of the area anew
//! each time: 4096 times up to 17 pages, which was measured as 3 % of a whole boot to init. So
//! one lies where the second look goes, in the last KiB below 640 KiB.
//!
//! ```text
//!   0x9fc00  floating pointer (16 bytes)
//!   0x9fc10  header, processors, ISA bus, IOAPIC, 16 lines, two local lines
//!   0xa0000  end: room for 40 processors; a guest without ACPI sees no more
//! ```

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::layout;

const SPECIFICATION: u8 = 4;
const POINTER_LENGTH: usize = 16;
const HEADER_LENGTH: usize = 44;
/// The most processors that fit.
const PROCESSORS_MAX: u8 = 40;
/// Version of an integrated local APIC, as KVM's says.
const LOCAL_APIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 2;
/// Interrupt types of line entries.
const VECTORED: u8 = 0;
const NMI: u8 = 1;
const EXTERNAL: u8 = 3;
/// Lines of the ISA bus.
const ISA_LINES: u8 = 16;
const EVERY_LOCAL_APIC: u8 = 0xff;

/// Writes the table for `vcpus` processors, whose APIC ids are their indices.
///
/// # Errors
/// When guest memory does not reach there.
pub fn write<M: GuestMemoryBackend>(memory: &M, vcpus: u8) -> Result<(), GuestMemoryError> {
    let bytes = table(vcpus.min(PROCESSORS_MAX));
    memory.write_slice(&bytes, GuestAddress(layout::EBDA))
}

fn table(vcpus: u8) -> Vec<u8> {
    let (entries, count) = entries(vcpus);
    let place = layout::EBDA as u32 + POINTER_LENGTH as u32;
    let mut pointer = Vec::with_capacity(POINTER_LENGTH + HEADER_LENGTH + entries.len());
    pointer.extend_from_slice(b"_MP_");
    pointer.extend_from_slice(&place.to_le_bytes());
    pointer.extend_from_slice(&[1, SPECIFICATION, 0, 0, 0, 0, 0, 0]);
    pointer[10] = complement(&pointer);

    let mut body = Vec::with_capacity(HEADER_LENGTH + entries.len());
    body.extend_from_slice(b"PCMP");
    body.extend_from_slice(&((HEADER_LENGTH + entries.len()) as u16).to_le_bytes());
    body.extend_from_slice(&[SPECIFICATION, 0]);
    body.extend_from_slice(b"NACELLE MACHINE     ");
    // No table of the maker's.
    body.extend_from_slice(&[0; 6]);
    body.extend_from_slice(&count.to_le_bytes());
    body.extend_from_slice(&(layout::LOCAL_APIC as u32).to_le_bytes());
    body.extend_from_slice(&[0; 4]);
    body.extend_from_slice(&entries);
    body[7] = complement(&body);
    pointer.extend_from_slice(&body);
    pointer
}

/// The entries and how many they are.
fn entries(vcpus: u8) -> (Vec<u8>, u16) {
    let ioapic = vcpus;
    let mut entries: Vec<Vec<u8>> = Vec::new();
    for id in 0..vcpus {
        let flags = ENABLED | if id == 0 { BOOT_PROCESSOR } else { 0 };
        let mut entry = vec![0, id, LOCAL_APIC_VERSION, flags];
        entry.resize(20, 0);
        entries.push(entry);
    }
    entries.push([&[1, 0][..], b"ISA   "].concat());
    let address = (layout::IOAPIC as u32).to_le_bytes();
    entries.push([&[2, ioapic, IOAPIC_VERSION, ENABLED][..], &address].concat());
    // Flags of zero: polarity and trigger as the ISA bus has them, high and edge.
    entries.extend((0..ISA_LINES).map(|line| vec![3, VECTORED, 0, 0, 0, line, ioapic, line]));
    entries.push(vec![4, EXTERNAL, 0, 0, 0, 0, EVERY_LOCAL_APIC, 0]);
    entries.push(vec![4, NMI, 0, 0, 0, 0, EVERY_LOCAL_APIC, 1]);
    let count = entries.len() as u16;
    (entries.concat(), count)
}

/// What makes the sum of all bytes zero.
fn complement(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn pointer_and_table_sum_up_to_zero_and_agree() {
        for vcpus in [1, 2, PROCESSORS_MAX] {
            let bytes = table(vcpus);
            let (pointer, body) = bytes.split_at(POINTER_LENGTH);
            assert_eq!((&pointer[..4], &body[..4]), (&b"_MP_"[..], &b"PCMP"[..]));
            assert_eq!((sum(pointer), sum(body)), (0, 0));
            assert_eq!(usize::from(u16::from_le_bytes([body[4], body[5]])), body.len());
            assert_eq!(u16::from_le_bytes([body[34], body[35]]), u16::from(vcpus) + 20);
            assert_eq!(body.len(), HEADER_LENGTH + usize::from(vcpus) * 20 + 20 * 8);
        }
    }

    #[test]
    fn the_largest_table_ends_below_640_kib() {
        assert!(layout::EBDA + table(PROCESSORS_MAX).len() as u64 <= 0xa_0000);
    }
}
