//! The guest's physical address space: the one place where addresses are decided.
//!
//! ```text
//!            0 +--------------------------------+
//!       0x0500 | GDT (64-bit entry)             |
//!       0x6000 | PVH start info, modules, map   |  first MiB: RAM up to VMClock, written only
//!       0x7000 | zero page (Linux boot_params)  |  at boot; the kernel copies what it needs
//!       0x9000 | page tables (64-bit entry)     |
//!      0x20000 | command line (64 KiB)          |
//!      0x9e000 | VMClock, generation id         |  not offered as RAM
//!      0x9fc00 | multiprocessor table, holes    |  not offered as RAM
//!      0xe0000 | ACPI tables, RSDP first        |  128 KiB, offered as ACPI data
//!     0x100000 +--------------------------------+
//!              | RAM: kernel at the bottom,     |
//!              | initrd at the top              |  at most 3 GiB in all
//!   0xc0000000 +--------------------------------+ <- the 32-bit gap, 1 GiB
//!              | MMIO window 1: one page each   |  16 MiB
//!   0xc1000000 | MMIO window 2: 32-bit BARs     |  496 MiB
//!   0xe0000000 | ECAM, 1 MiB a bus              |  256 MiB
//!   0xfec00000 | IOAPIC                         |
//!   0xfee00000 | local APIC, MSI addresses      |
//!   0xfffbc000 | KVM identity map, TSS          |  4 pages (Intel before unrestricted guest)
//!  0x100000000 +--------------------------------+
//!              | the rest of RAM                |
//!              | (room for memory that arrives) |
//!              | 64-bit MMIO window             |  to the end of the address space
//!              +--------------------------------+
//! ```
//!
//! The gap is 1 GiB because RAM below 4 GiB is what every kernel can use and windows there are
//! what every device can use; 3 GiB and 1 GiB is the split PCs settled on. Everything that goes
//! into the gap has a window, so that an allocator works on ranges and never meets a fixed
//! address. RAM comes in at most two regions, so a machine has at most two memory slots.

use std::ops::Range;

use vm_memory::GuestAddress;

/// The least memory a machine can have: 16 MiB.
pub const MIN_RAM: u64 = 16 << 20;

/// GDT for the 64-bit entry.
pub const GDT: u64 = 0x500;
/// PVH start info; its module list and memory map follow in the same page.
pub const PVH_INFO: u64 = 0x6000;
/// Linux `boot_params`, one page.
pub const ZERO_PAGE: u64 = 0x7000;
/// Top of the stack given to the 64-bit entry. Linux sets its own at once.
pub const BOOT_STACK: u64 = 0x8ff0;
/// PML4, then the PDPT, then up to three page directories.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Bytes reserved for the command line, its closing NUL included.
pub const COMMAND_LINE_MAX: usize = 0x1_0000;
/// The page of VMClock (see [`super::generation`]); RAM below 1 MiB ends before it.
pub const VM_CLOCK: Range<u64> = 0x9_e000..0x9_f000;
/// The 16 bytes of the generation id.
pub const GENERATION_ID: u64 = 0x9_f000;
/// Where the EBDA of a PC would begin: the multiprocessor table.
pub const EBDA: u64 = 0x9_fc00;
/// ACPI tables; the RSDP is the first thing in here.
pub const ACPI: Range<u64> = 0xe_0000..0x10_0000;
/// Where kernels may be loaded from.
pub const HIGH_RAM: u64 = 0x10_0000;

/// The 32-bit gap: no RAM in here.
pub const GAP: Range<u64> = 0xc000_0000..0x1_0000_0000;
/// Window for devices that are found by the firmware tables, one page each.
pub const MMIO_WINDOW: Range<u64> = 0xc000_0000..0xc100_0000;
/// Window for 32-bit PCI BARs.
pub const PCI_WINDOW_32: Range<u64> = 0xc100_0000..0xe000_0000;
/// PCI configuration space (ECAM), 1 MiB for each of 256 buses.
pub const ECAM: Range<u64> = 0xe000_0000..0xf000_0000;
/// ECAM bytes for one bus.
pub const ECAM_BUS: u64 = 1 << 20;
/// The IOAPIC's registers.
pub const IOAPIC: u64 = 0xfec0_0000;
/// The local APICs' registers, and the address MSIs are written to.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// For `KVM_SET_IDENTITY_MAP_ADDR`, one page.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// For `KVM_SET_TSS_ADDR`, three pages.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// Interrupt lines of the IOAPIC that a device may have. 0 to 4 belong to the legacy devices of
/// a PC, and line 4 is where a first serial port is expected.
pub const INTERRUPT_LINES: Range<u32> = 5..24;
/// The first GSI behind the IOAPIC's lines: message-signalled interrupts are routed from here.
pub const FIRST_MSI_GSI: u32 = 24;

/// Addresses between 1012 GiB and 1 TiB that AMD processors use for HyperTransport: neither RAM
/// nor a window may lie there.
const HYPERTRANSPORT: Range<u64> = 0xfd_0000_0000..0x100_0000_0000;

/// Splits memory around the gap: first address and size in bytes of one or two regions.
///
/// Map each at a host address that is equal to the guest's **modulo 2 MiB**: all regions begin on
/// 2 MiB, and KVM maps huge pages only where both sides agree. A boot to init in 256 MiB then has
/// 25 page-fault exits instead of 8155 (measured: 1503 against 9638 exits in all, 15 % less CPU).
#[must_use]
pub fn ram_regions(bytes: u64) -> Vec<(GuestAddress, u64)> {
    let low = bytes.min(GAP.start);
    let mut regions = vec![(GuestAddress(0), low)];
    if bytes > low {
        regions.push((GuestAddress(GAP.end), bytes - low));
    }
    regions
}

/// The first address behind all RAM, at least 4 GiB: where memory that arrives later can go.
/// `None` when `bytes` is beyond any address space.
#[must_use]
pub fn ram_end(bytes: u64) -> Option<u64> {
    bytes.saturating_sub(GAP.start).checked_add(GAP.end)
}

/// The most memory a guest with `physical_bits` of address space can have, with room left for a
/// 64-bit window of 1 GiB.
#[must_use]
pub fn max_ram(physical_bits: u8) -> u64 {
    let end = address_space_end(physical_bits).min(HYPERTRANSPORT.start);
    end.saturating_sub(GAP.end - GAP.start).saturating_sub(1 << 30)
}

/// The 64-bit MMIO window of a machine whose RAM, and room for RAM that may come, ends at
/// `ram_end`. Starts on a GiB so that huge BARs fit; `None` when the address space is full.
#[must_use]
pub fn mmio_window_64(ram_end: u64, physical_bits: u8) -> Option<Range<u64>> {
    const GIB: u64 = 1 << 30;
    let mut start = ram_end.max(GAP.end).checked_next_multiple_of(GIB)?;
    let mut end = address_space_end(physical_bits);
    if start < HYPERTRANSPORT.start {
        end = end.min(HYPERTRANSPORT.start);
    } else {
        start = start.max(HYPERTRANSPORT.end);
    }
    (start < end).then_some(start..end)
}

fn address_space_end(physical_bits: u8) -> u64 {
    // 52 is the most the page tables can express, 36 the least of any 64-bit processor.
    1 << physical_bits.clamp(36, 52)
}

/// Kinds of memory as both E820 and the PVH memory map number them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MapKind {
    /// Free to use.
    Ram = 1,
    /// Not to be touched.
    Reserved = 2,
    /// Firmware tables; free once they have been read.
    Acpi = 3,
}

/// One entry of the memory map a kernel is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// First address.
    pub start: u64,
    /// Size in bytes.
    pub len: u64,
    /// What it is.
    pub kind: MapKind,
}

/// The memory map for a machine with `bytes` of RAM: at most five entries, sorted, without
/// overlap.
#[must_use]
pub fn memory_map(bytes: u64) -> Vec<MapEntry> {
    let entry = |range: Range<u64>, kind| MapEntry { start: range.start, len: range.end - range.start, kind };
    let mut map = vec![
        entry(0..VM_CLOCK.start, MapKind::Ram),
        entry(VM_CLOCK.start..0xa_0000, MapKind::Reserved),
        entry(ACPI, MapKind::Acpi),
    ];
    for (start, len) in ram_regions(bytes) {
        let end = start.0.saturating_add(len);
        let start = start.0.max(HIGH_RAM);
        if end > start {
            map.push(entry(start..end, MapKind::Ram));
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn ram_never_lies_in_the_gap_and_none_is_lost() {
        for bytes in [MIN_RAM, GIB, 3 * GIB, 3 * GIB + 4096, 4 * GIB, 5 * GIB, 512 * GIB] {
            let regions = ram_regions(bytes);
            assert_eq!(regions.iter().map(|r| r.1).sum::<u64>(), bytes);
            for (start, len) in &regions {
                assert!(start.0 + len <= GAP.start || start.0 >= GAP.end, "{bytes:#x}");
            }
            let end = ram_end(bytes).unwrap();
            assert_eq!(end, (bytes + GIB).max(4 * GIB));
        }
        assert_eq!(ram_end(u64::MAX), None);
    }

    #[test]
    fn the_memory_map_is_sorted_disjoint_and_complete_at_every_size() {
        let mut bytes = MIN_RAM;
        while bytes <= 512 * GIB {
            for size in [bytes, bytes + 4096, bytes * 3 / 2] {
                let map = memory_map(size);
                for pair in map.windows(2) {
                    assert!(pair[0].start + pair[0].len <= pair[1].start, "{size:#x}");
                }
                let ram: u64 = map.iter().filter(|e| e.kind == MapKind::Ram).map(|e| e.len).sum();
                // All but the holes of the first MiB.
                assert_eq!(ram, size - (HIGH_RAM - VM_CLOCK.start), "{size:#x}");
                assert!(map.iter().all(|e| e.kind == MapKind::Reserved
                    || e.start + e.len <= GAP.start
                    || e.start >= GAP.end));
            }
            bytes *= 2;
        }
    }

    #[test]
    fn windows_do_not_overlap_what_is_fixed() {
        let fixed = [MMIO_WINDOW, PCI_WINDOW_32, ECAM, IOAPIC..IOAPIC + 4096];
        for pair in fixed.windows(2) {
            assert!(pair[0].end <= pair[1].start);
        }
        const { assert!(KVM_IDENTITY_MAP + 4096 == KVM_TSS && KVM_TSS + 3 * 4096 <= GAP.end) };
        assert!(COMMAND_LINE + COMMAND_LINE_MAX as u64 <= VM_CLOCK.start);
        const { assert!(VM_CLOCK.end <= GENERATION_ID && GENERATION_ID + 16 <= EBDA) };
        const { assert!(PAGE_TABLES + 5 * 4096 <= COMMAND_LINE) };
    }

    #[test]
    fn the_64_bit_window_avoids_hypertransport_and_ends_with_the_address_space() {
        assert_eq!(mmio_window_64(4 * GIB, 36), Some(4 * GIB..64 * GIB));
        assert_eq!(mmio_window_64(5 * GIB + 1, 40), Some(6 * GIB..0xfd_0000_0000));
        assert_eq!(mmio_window_64(0xfd_0000_0001, 40), None);
        assert_eq!(mmio_window_64(0xfd_0000_0001, 46), Some(0x100_0000_0000..1 << 46));
        assert_eq!(mmio_window_64(64 * GIB, 36), None);
        assert_eq!(mmio_window_64(u64::MAX, 52), None);
        for bits in [36, 40, 46, 52] {
            let most = ram_end(max_ram(bits)).unwrap();
            assert!(mmio_window_64(most, bits).is_some(), "{bits}");
        }
    }
}
