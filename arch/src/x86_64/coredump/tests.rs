use std::{collections::BTreeMap, io::Cursor};

use kvm_bindings::{kvm_dtable, kvm_segment};
use vm_memory::GuestMemoryMmap;

use super::*;

const HIGH: u64 = 4 << 30;

/// Two regions, the second far above and with an odd length.
fn memory() -> GuestMemoryMmap {
    let ranges = [(GuestAddress(0), 1 << 20), (GuestAddress(HIGH), (64 << 10) + 100)];
    GuestMemoryMmap::from_ranges(&ranges).unwrap()
}

fn vcpu(seed: u64) -> Registers {
    let mut registers = Registers { kernel_gs_base: seed + 50, ..Default::default() };
    registers.regs = kvm_regs {
        rax: seed,
        rbx: seed + 1,
        r15: seed + 15,
        rip: seed + 16,
        rsp: seed + 17,
        rflags: 2,
        ..Default::default()
    };
    registers.sregs.cs =
        kvm_segment { selector: 0x10, type_: 0xb, s: 1, present: 1, l: 1, g: 1, ..Default::default() };
    registers.sregs.gs.base = seed + 30;
    registers.sregs.idt = kvm_dtable { base: seed + 40, limit: 0xfff, ..Default::default() };
    (registers.sregs.cr0, registers.sregs.cr3, registers.sregs.cr4) = (1, seed + 43, 0x20);
    registers
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// A core file taken apart, by the rules of elf(5).
struct Parsed {
    notes: Vec<(Vec<u8>, u32, Vec<u8>)>,
    /// Content by physical address.
    loads: BTreeMap<u64, Vec<u8>>,
}

fn parse(file: &[u8]) -> Parsed {
    assert_eq!(file[..7], [0x7f, b'E', b'L', b'F', 2, 1, 1]);
    assert_eq!((u16_at(file, 16), u16_at(file, 18), u32_at(file, 20)), (4, 62, 1));
    assert_eq!((u64_at(file, 32), u16_at(file, 52), u16_at(file, 54)), (64, 64, 56));
    let mut parsed = Parsed { notes: vec![], loads: BTreeMap::new() };
    let mut first_load = u64::MAX;
    for index in 0..u16_at(file, 56) {
        let header = &file[64 + 56 * usize::from(index)..][..56];
        let (offset, len) = (u64_at(header, 8), u64_at(header, 32));
        let content = &file[offset as usize..(offset + len) as usize];
        assert_eq!(u64_at(header, 48), 0, "the alignment that crash asks for");
        match u32_at(header, 0) {
            4 => {
                assert_eq!(index, 0, "notes come first");
                parsed.notes = parse_notes(content);
                assert!(offset + len <= first_load);
            }
            1 => {
                assert_eq!(offset % 4096, 0);
                assert_eq!((u64_at(header, 16), u64_at(header, 40)), (u64_at(header, 24), len));
                first_load = first_load.min(offset);
                parsed.loads.insert(u64_at(header, 24), content.to_vec());
            }
            other => panic!("program header of type {other}"),
        }
    }
    parsed
}

fn parse_notes(mut bytes: &[u8]) -> Vec<(Vec<u8>, u32, Vec<u8>)> {
    let mut notes = vec![];
    while !bytes.is_empty() {
        let (name, content) = (u32_at(bytes, 0) as usize, u32_at(bytes, 4) as usize);
        let at = 12 + name.next_multiple_of(4);
        notes.push((bytes[12..12 + name].to_vec(), u32_at(bytes, 8), bytes[at..at + content].to_vec()));
        bytes = &bytes[at + content.next_multiple_of(4)..];
    }
    notes
}

fn dump(memory: &GuestMemoryMmap, vcpus: &[Registers]) -> (Parsed, Written) {
    let mut out = Cursor::new(vec![]);
    let written = write(memory, vcpus, &mut out).unwrap();
    let file = out.into_inner();
    assert_eq!(file.len() as u64, written.size);
    (parse(&file), written)
}

/// Fills memory with pages, zero and not, such that runs cross chunks.
fn fill(memory: &GuestMemoryMmap) {
    for page in (0u64..256).filter(|page| page % 7 > 2 || (60..70).contains(page)) {
        memory.write_obj(page as u8 | 1, GuestAddress(page * 4096 + page)).unwrap();
    }
    memory.write_obj(0xabu8, GuestAddress(HIGH + (64 << 10) + 99)).unwrap();
}

#[test]
fn memory_comes_back_as_it_was() {
    let memory = memory();
    fill(&memory);
    let (parsed, written) = dump(&memory, &[vcpu(0)]);
    assert_eq!(parsed.loads.keys().copied().collect::<Vec<_>>(), [0, HIGH]);
    for (base, content) in parsed.loads {
        let mut expected = vec![0; content.len()];
        memory.read_slice(&mut expected, GuestAddress(base)).unwrap();
        assert!(content == expected, "region at {base:#x}");
    }
    let pages = (0u64..256).filter(|page| page % 7 > 2 || (60..70).contains(page)).count() as u64;
    assert_eq!(written.data, pages * 4096 + 100);
    assert!(!written.vmcoreinfo);
}

#[test]
fn a_machine_of_zeros_is_as_long_as_its_memory_and_holds_nothing() {
    let (parsed, written) = dump(&memory(), &[]);
    assert_eq!(written.data, 0);
    assert_eq!(parsed.loads[&0].len(), 1 << 20);
    assert_eq!(parsed.loads[&HIGH].len(), (64 << 10) + 100);
    assert!(parsed.notes.is_empty());
}

#[test]
fn pages_of_zeros_take_no_room_on_disk() {
    use std::os::unix::fs::MetadataExt;
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap();
    memory.write_obj(1u8, GuestAddress(32 << 20)).unwrap();
    let mut file = tempfile::tempfile().unwrap();
    let written = write(&memory, &[vcpu(0)], &mut file).unwrap();
    let metadata = file.metadata().unwrap();
    assert_eq!(metadata.len(), written.size);
    assert!(metadata.blocks() * 512 < 1 << 20, "{} blocks", metadata.blocks());
}

#[test]
fn every_vcpu_has_a_thread_and_a_state() {
    let vcpus: Vec<_> = (0..64).map(|index| vcpu(index * 1000)).collect();
    let (parsed, _) = dump(&memory(), &vcpus);
    assert_eq!(parsed.notes.len(), 128);
    let (threads, states) = parsed.notes.split_at(64);
    for (index, ((name, kind, content), (qemu, zero, state))) in threads.iter().zip(states).enumerate() {
        let seed = index as u64 * 1000;
        assert_eq!((name.as_slice(), *kind, content.len()), (&b"CORE\0"[..], 1, 336));
        assert_eq!(u32_at(content, 32) as usize, index + 1);
        // r15 is the first register, rax the 11th, rip the 17th, cs the 18th, rsp the 20th,
        // gs_base the 23rd.
        let register = |number: usize| u64_at(content, 112 + 8 * (number - 1));
        assert_eq!([1, 11, 17, 20, 23].map(register), [15, 0, 16, 17, 30].map(|r| r + seed));
        assert_eq!(register(18), 0x10);
        assert_eq!((qemu.as_slice(), *zero, state.len()), (&b"QEMU\0"[..], 0, 440));
        assert_eq!((u32_at(state, 0), u32_at(state, 4)), (1, 440));
        assert_eq!((u64_at(state, 8), u64_at(state, 16)), (seed, seed + 1));
        assert_eq!(u64_at(state, 8 + 16 * 8), seed + 16, "rip");
        let segments = 8 + 18 * 8;
        assert_eq!((u32_at(state, segments), u32_at(state, segments + 8)), (0x10, 0x00a0_9b00), "cs");
        assert_eq!(u64_at(state, segments + 9 * 24 + 16), seed + 40, "base of the interrupt table");
        let control = segments + 10 * 24;
        let control = |number: usize| u64_at(state, control + 8 * number);
        assert_eq!([0, 3, 4, 5].map(control), [1, seed + 43, 0x20, seed + 50]);
    }
}

#[test]
fn the_note_of_the_kernel_about_itself_is_found() {
    let text = b"OSRELEASE=6.1.0\nPAGESIZE=4096\nKERNELOFFSET=1a000000\n";
    let mut note = [11, text.len() as u32, 0].map(u32::to_le_bytes).concat();
    note.extend(b"VMCOREINFO\0\0");
    note.extend(text);
    let memory = memory();
    memory.write_slice(&note, GuestAddress(HIGH + 0x3000)).unwrap();
    let (parsed, written) = dump(&memory, &[vcpu(0)]);
    assert!(written.vmcoreinfo);
    assert_eq!(parsed.notes[2], (b"VMCOREINFO\0".to_vec(), 0, text.to_vec()));
}

#[test]
fn what_only_looks_like_that_note_is_not_taken() {
    let good = |len: u32, text: &[u8]| {
        let mut note = [11, len, 0].map(u32::to_le_bytes).concat();
        note.extend(b"VMCOREINFO\0\0");
        note.extend(text);
        note.resize(4096, 0);
        note
    };
    assert_eq!(notes::vmcoreinfo_in(&good(11, b"OSRELEASE=6")), Some(&b"OSRELEASE=6"[..]));
    assert!(notes::vmcoreinfo_in(&good(4096 - 24, b"OSRELEASE=6")).is_some());
    assert_eq!(notes::vmcoreinfo_in(&good(4096 - 23, b"OSRELEASE=6")), None);
    assert_eq!(notes::vmcoreinfo_in(&good(u32::MAX, b"OSRELEASE=6")), None);
    assert_eq!(notes::vmcoreinfo_in(&good(11, b"osrelease=6")), None);
    assert_eq!(notes::vmcoreinfo_in(&good(3, b"OSRELEASE=6")), None);
    assert_eq!(notes::vmcoreinfo_in(&good(11, b"OSRELEASE=6")[1..]), None);
    assert_eq!(notes::vmcoreinfo_in(b"\x0b\0\0\0"), None);
}

/// A sink that is full after some bytes.
struct Full(Cursor<Vec<u8>>, usize);

impl Write for Full {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.1 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.1 -= bytes.len();
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Full {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.0.seek(to)
    }
}

#[test]
fn an_unfinished_file_does_not_look_like_a_core_file() {
    let memory = memory();
    fill(&memory);
    let mut full = Full(Cursor::new(vec![]), 100 << 10);
    let error = write(&memory, &[vcpu(0)], &mut full).unwrap_err();
    assert!(matches!(error, CoreDumpError::Write(e) if e.kind() == io::ErrorKind::StorageFull));
    assert_ne!(full.0.into_inner().get(..4), Some(&b"\x7fELF"[..]));
}
