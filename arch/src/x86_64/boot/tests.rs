//! Kernels made here byte by byte: good ones that must land where they say, and the same ones
//! broken at random, which must end in an error and touch nothing outside their plan.

use std::io::Write;

use linux_loader::loader::bootparam::boot_params;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::kernel::What;

const MIB: u64 = 1 << 20;
const RAM: u64 = 32 * MIB;

pub(super) fn file(what: What, bytes: &[u8]) -> BootFile {
    let mut f = tempfile::tempfile().unwrap();
    f.write_all(bytes).unwrap();
    BootFile::from_file(what, "/boot/test".into(), f).unwrap()
}

fn kernel(bytes: &[u8]) -> BootFile {
    file(What::Kernel, bytes)
}

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap()
}

fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for word in [name.len() as u32, desc.len() as u32, kind] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    for part in [name, desc] {
        out.extend_from_slice(part);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    out
}

/// An ELF kernel: text of 0x3000 bytes at 16 MiB, data of 0x1000 bytes (0x8000 with BSS) at
/// 17 MiB, notes.
fn elf(notes: &[u8]) -> Vec<u8> {
    let mut out = vec![0u8; 0x1000];
    out[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
    out[16..20].copy_from_slice(&[2, 0, 62, 0]);
    out[24..32].copy_from_slice(&(16 * MIB + 0x100).to_le_bytes());
    out[32..40].copy_from_slice(&64u64.to_le_bytes());
    out[54..58].copy_from_slice(&[56, 0, 3, 0]);
    let segments: [(u32, u64, u64, u64, u64); 3] = [
        (1, 0x1000, 16 * MIB, 0x3000, 0x3000),
        (1, 0x4000, 17 * MIB, 0x1000, 0x8000),
        (4, 0x800, 0, notes.len() as u64, notes.len() as u64),
    ];
    for (header, (kind, offset, paddr, filesz, memsz)) in out[64..].chunks_exact_mut(56).zip(segments) {
        header[..4].copy_from_slice(&kind.to_le_bytes());
        for (at, value) in [(8, offset), (24, paddr), (32, filesz), (40, memsz)] {
            header[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
    }
    out[0x800..0x800 + notes.len()].copy_from_slice(notes);
    out.resize(0x4000, 0xaa);
    out.resize(0x5000, 0xdd);
    out
}

fn linux_notes() -> Vec<u8> {
    [
        note(b"GNU\0", 3, &[7; 20]),
        note(b"Xen\0", 18, &(16 * MIB as u32 + 0x200).to_le_bytes()),
        note(b"Linux\0", 0x100, b"salt"),
    ]
    .concat()
}

/// A bzImage of 2 setup sectors and a payload of 0x2000 bytes for 16 MiB.
fn bzimage() -> Vec<u8> {
    let mut out = vec![0u8; 3 * 512];
    out[0x1f1] = 2;
    out[0x1f4..0x1f8].copy_from_slice(&(0x2000u32 / 16).to_le_bytes());
    out[0x1fe..0x202].copy_from_slice(&[0x55, 0xaa, 0xeb, 0x6a]);
    out[0x202..0x206].copy_from_slice(b"HdrS");
    out[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    out[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    out[0x230..0x234].copy_from_slice(&0x20_0000u32.to_le_bytes());
    out[0x236..0x238].copy_from_slice(&1u16.to_le_bytes());
    out[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
    out[0x258..0x260].copy_from_slice(&(16 * MIB).to_le_bytes());
    out[0x260..0x264].copy_from_slice(&(2 * MIB as u32).to_le_bytes());
    out.resize(out.len() + 0x2000, 0xbb);
    out
}

fn boot(
    memory: &GuestMemoryMmap,
    kernel: &BootFile,
    initrd: Option<&BootFile>,
    entry: EntryChoice,
) -> Result<Loaded, BootError> {
    let command_line = CommandLine::new("console=ttyS0").unwrap();
    let payload =
        Payload { kernel, initrd, command_line: &command_line, entry, ram: RAM, rsdp: Some(0xe_0000) };
    load(memory, payload)
}

fn refuse(bytes: &[u8]) -> BootError {
    boot(&memory(), &kernel(bytes), None, EntryChoice::Auto).unwrap_err()
}

fn byte(memory: &GuestMemoryMmap, at: u64) -> u8 {
    memory.read_obj(GuestAddress(at)).unwrap()
}

#[test]
fn a_linux_vmlinux_is_entered_in_64_bits_and_its_segments_lie_where_they_say() {
    let memory = memory();
    let loaded = boot(&memory, &kernel(&elf(&linux_notes())), None, EntryChoice::Auto).unwrap();
    assert_eq!(loaded.protocol, Protocol::Linux64);
    assert_eq!(loaded.entry, 16 * MIB + 0x100);
    assert_eq!(loaded.kernel, 16 * MIB..17 * MIB + 0x8000);
    assert_eq!(byte(&memory, 16 * MIB), 0xaa);
    assert_eq!(byte(&memory, 16 * MIB + 0x2fff), 0xaa);
    assert_eq!(byte(&memory, 17 * MIB), 0xdd);
    assert_eq!(byte(&memory, 17 * MIB + 0x1000), 0, "BSS");
    let mut text = [0u8; 14];
    memory.read_slice(&mut text, GuestAddress(layout::COMMAND_LINE)).unwrap();
    assert_eq!(&text, b"console=ttyS0\0");
}

#[test]
fn the_entry_follows_the_notes_and_the_choice() {
    let entry = |notes: &[u8], choice| {
        boot(&memory(), &kernel(&elf(notes)), None, choice).map(|l| (l.protocol, l.entry - 16 * MIB))
    };
    let linux = linux_notes();
    let other = note(b"Xen\0", 18, &(16 * MIB as u32 + 0x200).to_le_bytes());
    assert_eq!(entry(&linux, EntryChoice::Pvh).unwrap(), (Protocol::Pvh, 0x200));
    assert_eq!(entry(&other, EntryChoice::Auto).unwrap(), (Protocol::Pvh, 0x200));
    assert_eq!(entry(&other, EntryChoice::Linux64).unwrap(), (Protocol::Linux64, 0x100));
    assert_eq!(entry(&[], EntryChoice::Auto).unwrap(), (Protocol::Linux64, 0x100));
    assert!(matches!(entry(&[], EntryChoice::Pvh), Err(BootError::NoPvhEntry { .. })));
    let outside = note(b"Xen\0", 18, &0u32.to_le_bytes());
    assert!(matches!(entry(&outside, EntryChoice::Auto), Err(BootError::Malformed { .. })));
}

#[test]
fn the_zero_page_tells_initrd_command_line_tables_and_memory() {
    for image in [elf(&linux_notes()), bzimage()] {
        let memory = memory();
        let initrd = file(What::Initrd, &[0xee; 5000]);
        let loaded = boot(&memory, &kernel(&image), Some(&initrd), EntryChoice::Auto).unwrap();
        let range = loaded.initrd.unwrap();
        assert_eq!(range.end - range.start, 5000);
        assert_eq!(range.start % 4096, 0);
        assert!(range.start >= loaded.kernel.end && range.end <= RAM);
        assert_eq!(byte(&memory, range.start + 4999), 0xee);
        let params: boot_params = memory.read_obj(GuestAddress(loaded.info)).unwrap();
        let header = params.hdr;
        assert_eq!({ header.ramdisk_image }, range.start as u32);
        assert_eq!({ header.ramdisk_size }, 5000);
        assert_eq!({ header.cmd_line_ptr }, layout::COMMAND_LINE as u32);
        assert_eq!({ header.type_of_loader }, 0xff);
        assert_eq!({ header.header }, u32::from_le_bytes(*b"HdrS"));
        assert_eq!({ header.boot_flag }, 0xaa55);
        assert_eq!({ params.acpi_rsdp_addr }, 0xe_0000);
        assert_eq!({ params.sentinel }, 0, "a set sentinel makes Linux clear fields");
        let table = params.e820_table;
        let expected = layout::memory_map(RAM);
        assert_eq!(usize::from(params.e820_entries), expected.len());
        for (have, want) in table.iter().zip(expected) {
            assert_eq!(
                ({ have.addr }, { have.size }, { have.r#type }),
                (want.start, want.len, want.kind as u32)
            );
        }
    }
}

#[test]
fn a_bzimage_payload_goes_to_its_preferred_address() {
    let memory = memory();
    let loaded = boot(&memory, &kernel(&bzimage()), None, EntryChoice::Auto).unwrap();
    assert_eq!(loaded.entry, 16 * MIB + 0x200);
    assert_eq!(loaded.kernel, 16 * MIB..18 * MIB);
    assert_eq!(byte(&memory, 16 * MIB + 0x1fff), 0xbb);
    assert_eq!(byte(&memory, 16 * MIB + 0x2000), 0);
}

#[test]
fn the_pvh_start_info_points_at_everything() {
    let memory = memory();
    let initrd = file(What::Initrd, &[1; 100]);
    let loaded = boot(&memory, &kernel(&elf(&linux_notes())), Some(&initrd), EntryChoice::Pvh).unwrap();
    assert_eq!(loaded.info, layout::PVH_INFO);
    let info: hvm_start_info = memory.read_obj(GuestAddress(loaded.info)).unwrap();
    assert_eq!((info.magic, info.version, info.nr_modules), (0x336e_c578, 1, 1));
    assert_eq!((info.rsdp_paddr, info.cmdline_paddr), (0xe_0000, layout::COMMAND_LINE));
    let module: hvm_modlist_entry = memory.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
    assert_eq!((module.paddr, module.size), (loaded.initrd.unwrap().start, 100));
    let expected = layout::memory_map(RAM);
    assert_eq!(info.memmap_entries as usize, expected.len());
    for (index, want) in (0u64..).zip(expected) {
        let at = GuestAddress(info.memmap_paddr + index * 24);
        let have: hvm_memmap_table_entry = memory.read_obj(at).unwrap();
        assert_eq!((have.addr, have.size, have.type_), (want.start, want.len, want.kind as u32));
    }
}

#[test]
fn each_wrong_kernel_is_refused_by_its_name() {
    assert!(matches!(refuse(b""), BootError::NotAKernel { found, .. } if found == "an empty file"));
    assert!(matches!(refuse(b"\x1f\x8b\x08gzip"), BootError::NotAKernel { .. }));
    let mut arm = elf(&[]);
    arm[18] = 183;
    assert!(matches!(refuse(&arm), BootError::WrongMachine { found, .. } if found == "aarch64"));
    let mut program = elf(&[]);
    program[64..68].copy_from_slice(&3u32.to_le_bytes());
    assert!(matches!(refuse(&program), BootError::NotAKernel { found, .. } if found.contains("program")));
    let whole = elf(&linux_notes());
    for len in [30, 64, 100, 0x1000, 0x4fff] {
        assert!(
            matches!(refuse(&whole[..len]), BootError::Truncated { .. } | BootError::NotAKernel { .. }),
            "{len}"
        );
    }
    let whole = bzimage();
    for len in [0x208, 0x220, 1024, whole.len() - 1] {
        assert!(matches!(refuse(&whole[..len]), BootError::Truncated { .. }), "{len}");
    }
    let mut old = bzimage();
    old[0x206] = 0x0a;
    let text = refuse(&old).to_string();
    assert!(text.contains("2.10") && text.contains("2.12"), "{text}");
    let mut narrow = bzimage();
    narrow[0x236] = 0;
    assert!(matches!(refuse(&narrow), BootError::WrongMachine { found, .. } if found == "i386"));
}

#[test]
fn what_does_not_fit_says_what_would_do() {
    let mut far = elf(&[]);
    far[64 + 24..64 + 32].copy_from_slice(&(64 * MIB).to_le_bytes());
    let text = refuse(&far).to_string();
    assert!(text.contains("32 MiB") && text.contains("65 MiB"), "{text}");
    let mut low = elf(&[]);
    low[64 + 24..64 + 32].copy_from_slice(&0u64.to_le_bytes());
    assert!(matches!(refuse(&low), BootError::Malformed { .. }));

    let tempfile = tempfile::tempfile().unwrap();
    tempfile.set_len(30 * MIB).unwrap();
    let initrd = BootFile::from_file(What::Initrd, "initrd.img".into(), tempfile).unwrap();
    let error = boot(&memory(), &kernel(&bzimage()), Some(&initrd), EntryChoice::Auto).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("30 MiB") && text.contains("14 MiB") && text.contains("48 MiB"), "{text}");

    let long = CommandLine::new(&"x".repeat(2048)).unwrap();
    let image = kernel(&bzimage());
    let payload = Payload {
        kernel: &image,
        initrd: None,
        command_line: &long,
        entry: EntryChoice::Auto,
        ram: RAM,
        rsdp: None,
    };
    assert!(matches!(Plan::new(payload), Err(BootError::CommandLineTooLong { len: 2048, limit: 2047 })));
}

/// A small generator of random numbers, so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Headers of valid kernels with random bytes and extreme numbers in them: no panic, no endless
/// loop, and an accepted plan stays inside memory and above the first MiB.
#[test]
fn hostile_headers_end_in_an_error_or_a_plan_inside_memory() {
    let originals = [elf(&linux_notes()), bzimage()];
    let command_line = CommandLine::default();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut accepted = 0;
    for round in 0..6000 {
        let mut bytes = originals[round % 2].clone();
        // Where the headers of the two lie.
        let (from, len) = if round % 2 == 0 { (4, 0x900) } else { (0x1f1, 0x80) };
        for _ in 0..=random.next() % 6 {
            let at = from + (random.next() % len) as usize;
            match random.next() % 4 {
                0 => bytes[at] = random.next() as u8,
                1 => bytes[at..at + 8].fill(0xff),
                2 => bytes[at..at + 8].copy_from_slice(&random.next().to_le_bytes()),
                _ => bytes[at..at + 4].fill(0),
            }
        }
        let kernel = kernel(&bytes);
        let payload = Payload {
            kernel: &kernel,
            initrd: None,
            command_line: &command_line,
            entry: [EntryChoice::Auto, EntryChoice::Pvh][round / 2 % 2],
            ram: RAM,
            rsdp: None,
        };
        let Ok(plan) = Plan::new(payload) else { continue };
        accepted += 1;
        for piece in plan.pieces() {
            assert!(piece.at >= layout::HIGH_RAM);
            assert!(piece.at + piece.len as u64 <= RAM);
            assert!(piece.offset + piece.len as u64 <= kernel.len());
        }
        assert!(plan.pieces().iter().map(|p| p.len as u64).sum::<u64>() <= RAM);
        let loaded = plan.finish(&memory()).unwrap();
        assert!(loaded.kernel.contains(&loaded.entry), "{:#x}", loaded.entry);
    }
    assert!(accepted > 500, "the mutations are too rough: {accepted}");
}
