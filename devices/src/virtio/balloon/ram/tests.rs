use std::{
    fs::File,
    os::fd::{FromRawFd, OwnedFd},
};

use vm_memory::{Bytes, FileOffset, mmap::MmapRegionBuilder};

use super::*;
use crate::virtio::driver::{memory, tracked_memory};

const MIB: u64 = 1 << 20;
const PAGES: u64 = 256;

/// Bytes of guest memory that the host holds, from `address` on.
pub(crate) fn resident(memory: &Memory, address: u64, len: u64) -> u64 {
    let host = memory.get_host_address(GuestAddress(address)).unwrap();
    let mut pages = vec![0u8; (len / PAGE) as usize];
    // SAFETY: the range is mapped and there is a byte for each of its pages.
    let done = unsafe { libc::mincore(host.cast(), len as usize, pages.as_mut_ptr()) };
    assert_eq!(done, 0);
    pages.iter().filter(|page| **page & 1 != 0).count() as u64 * PAGE
}

fn ram(memory: &Memory) -> Ram {
    Ram::new(memory.clone(), Arc::default())
}

fn fill(memory: &Memory, address: u64, len: u64) {
    memory.write_slice(&vec![0x5a; len as usize], GuestAddress(address)).unwrap();
}

fn peek(memory: &Memory, address: u64) -> u8 {
    memory.read_obj(GuestAddress(address)).unwrap()
}

fn run(first: u64, count: u64) -> Run {
    Run { first, count }
}

fn mapped(file: File, len: usize, flags: i32) -> Memory {
    let mapping = MmapRegionBuilder::new_with_bitmap(len, Written::new(len, true))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(flags)
        .with_file_offset(FileOffset::new(file, 0))
        .build()
        .unwrap();
    Memory::from_regions(vec![GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap()]).unwrap()
}

/// Anonymous memory at `first` whose place in this process is a multiple of `align`.
fn aligned(first: u64, len: usize, align: u64) -> Memory {
    let (room, align) = (len + align as usize, align as usize);
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a fresh mapping with room for `len` bytes from the next multiple on, never unmapped.
    let mapping = unsafe {
        let base = libc::mmap(std::ptr::null_mut(), room, protection, flags, -1, 0);
        assert_ne!(base, libc::MAP_FAILED);
        let at = base.byte_add((base as usize).next_multiple_of(align) - base as usize);
        MmapRegionBuilder::new_with_bitmap(len, Written::new(len, false))
            .with_mmap_prot(protection)
            .with_mmap_flags(flags)
            .with_raw_mmap_pointer(at.cast())
            .build()
    };
    let region = GuestRegionMmap::new(mapping.unwrap(), GuestAddress(first)).unwrap();
    Memory::from_regions(vec![region]).unwrap()
}

fn memfd(len: u64, flags: u32) -> Option<File> {
    // SAFETY: the name is a string of its own; the descriptor is nobody else's.
    let file = unsafe {
        let fd = libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC | flags);
        if fd < 0 {
            return None;
        }
        File::from(OwnedFd::from_raw_fd(fd))
    };
    file.set_len(len).ok().map(|()| file)
}

#[test]
fn anonymous_pages_go_back_and_read_as_zero() {
    let memory = memory(&[(0, 2 << 20)]);
    fill(&memory, 0, 2 * MIB);
    let mut ram = ram(&memory);
    assert_eq!(resident(&memory, MIB, MIB), MIB);
    let outcome = ram.inflate(run(PAGES, PAGES));
    assert_eq!(outcome, Outcome { freed: MIB, bad_pages: 0, fails: 0 });
    assert_eq!((resident(&memory, MIB, MIB), resident(&memory, 0, MIB)), (0, MIB));
    assert_eq!((peek(&memory, MIB), peek(&memory, MIB - 1)), (0, 0x5a));
}

#[test]
fn a_run_over_a_gap_is_split_and_what_is_no_memory_is_counted() {
    let memory = memory(&[(MIB, 1 << 20), (3 * MIB, 1 << 20)]);
    fill(&memory, MIB, MIB);
    fill(&memory, 3 * MIB, MIB);
    let mut ram = ram(&memory);
    let outcome = ram.inflate(run(0, 5 * PAGES));
    assert_eq!(outcome, Outcome { freed: 2 * MIB, bad_pages: 3 * PAGES, fails: 0 });
    assert_eq!(peek(&memory, MIB) + peek(&memory, 4 * MIB - 1), 0);
    assert_eq!(ram.inflate(run(0xffff_ffff, 1)), Outcome { bad_pages: 1, ..Outcome::default() });
    assert_eq!(ram.inflate(run(0, 1 << 32)).bad_pages, (1 << 32) - 2 * PAGES);
}

#[test]
fn what_was_given_back_is_marked_dirty_and_nothing_else() {
    let memory = tracked_memory(&[(0, 1 << 20), (2 * MIB, 1 << 20)]);
    let mut ram = ram(&memory);
    ram.inflate(run(2 * PAGES + 16, 8));
    let second = memory.iter().nth(1).unwrap();
    let dirty: Vec<usize> = (0..256).filter(|page| second.bitmap().dirty_at(page * 4096)).collect();
    assert_eq!(dirty, (16..24).collect::<Vec<_>>());
    let first = memory.iter().next().unwrap();
    assert!((0..256).all(|page| !first.bitmap().dirty_at(page * 4096)));
}

#[test]
fn a_range_is_cut_to_whole_pages() {
    let memory = memory(&[(0, 1 << 20)]);
    fill(&memory, 0, MIB);
    let mut ram = ram(&memory);
    let host = memory.get_host_address(GuestAddress(0)).unwrap() as usize;
    assert_eq!(ram.give_back(host + 1, 2 * PAGE).freed, PAGE);
    assert_eq!(peek(&memory, PAGE - 1), 0x5a);
    assert_eq!(peek(&memory, PAGE), 0);
    assert_eq!(peek(&memory, 2 * PAGE), 0x5a);
    assert_eq!(ram.give_back(host + 10, PAGE), Outcome::default());
    assert_eq!(ram.give_back(host, u64::MAX).freed, MIB, "what follows the region is not ours");
    assert_eq!(ram.give_back(host.wrapping_sub(1), 1).fails, 1);
}

#[test]
fn a_shared_memory_file_gets_a_hole() {
    use std::os::unix::fs::MetadataExt;
    let file = memfd(2 * MIB, 0).unwrap();
    let memory = mapped(file.try_clone().unwrap(), 2 << 20, libc::MAP_SHARED | libc::MAP_NORESERVE);
    fill(&memory, 0, 2 * MIB);
    let before = file.metadata().unwrap().blocks();
    let mut ram = ram(&memory);
    assert_eq!(ram.inflate(run(0, PAGES)).freed, MIB);
    assert_eq!(file.metadata().unwrap().blocks(), before / 2, "the file still holds it");
    assert_eq!((peek(&memory, 0), peek(&memory, MIB)), (0, 0x5a));
}

#[test]
fn a_private_file_is_covered_by_zeroes_up_to_the_cap_and_never_changed() {
    let mut file = tempfile::tempfile().unwrap();
    io::Write::write_all(&mut file, &vec![0x77; 2 << 20]).unwrap();
    let memory = mapped(file.try_clone().unwrap(), 2 << 20, libc::MAP_PRIVATE | libc::MAP_NORESERVE);
    fill(&memory, 0, PAGE);
    let mut ram = ram(&memory);
    assert_eq!(ram.inflate(run(0, 2)).freed, 2 * PAGE);
    assert_eq!((peek(&memory, 0), peek(&memory, PAGE), peek(&memory, 2 * PAGE)), (0, 0, 0x77));
    fill(&memory, 0, PAGE);
    assert_eq!(peek(&memory, 0), 0x5a, "the memory in its place can be written");
    ram.shared.overlays.store(BALLOON_OVERLAYS_MAX, Ordering::Relaxed);
    fill(&memory, 4 * PAGE, PAGE);
    assert_eq!(ram.inflate(run(4, 1)).freed, PAGE);
    assert_eq!(peek(&memory, 4 * PAGE), 0x77, "the guest's copy is gone");
    let mut content = vec![0; 4 * 4096];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut content, 0).unwrap();
    assert!(content.iter().all(|byte| *byte == 0x77));
}

#[test]
fn huge_pages_go_back_when_all_their_parts_have_come() {
    const HUGE: u64 = 256 << 10;
    let memory = aligned(4 * MIB, 4 << 20, HUGE);
    fill(&memory, 4 * MIB, 4 * MIB);
    let shared = Arc::<Shared>::default();
    // Hosts of tests have no huge pages to spare; the arithmetic is the same.
    let made = || {
        let mut regions: Vec<Region> = memory.iter().filter_map(Region::of).collect();
        regions[0].page = HUGE;
        regions[0].parts = Some(Parts::new(4 * PAGES, HUGE / PAGE));
        Ram::of(memory.clone(), regions, Arc::clone(&shared))
    };
    let mut ram = made();
    assert!(ram.has_parts());
    assert_eq!(ram.inflate(run(4 * PAGES, 10)), Outcome::default());
    assert_eq!(ram.deflate(run(4 * PAGES, 1)), Outcome::default());
    assert_eq!(ram.inflate(run(4 * PAGES + 10, 60)).freed, 0);
    assert_eq!(resident(&memory, 4 * MIB, MIB), MIB);
    let parts = ram.regions[0].parts.clone();
    ram.park();
    assert_eq!(shared.parts()[0], parts);
    let mut ram = made();
    assert_eq!(ram.regions[0].parts, parts, "a pause forgets nothing");
    // One part was missing. What is beyond the second page is none of its parts.
    assert_eq!(ram.inflate(run(4 * PAGES, 1)).freed, HUGE);
    assert_eq!((peek(&memory, 4 * MIB), peek(&memory, 4 * MIB + HUGE)), (0, 0x5a));
}

#[test]
fn real_huge_pages_go_back_whole() {
    // Only where the host has some to spare.
    let Some(file) = memfd(4 * MIB, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB) else { return };
    let flags = libc::MAP_SHARED;
    let region = MmapRegionBuilder::new_with_bitmap(4 << 20, Written::new(4 << 20, false))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(flags)
        .with_file_offset(FileOffset::new(file, 0))
        .build();
    let Ok(mapping) = region else { return };
    let regions = vec![GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap()];
    let memory = Memory::from_regions(regions).unwrap();
    fill(&memory, 0, 4 * MIB);
    let mut ram = ram(&memory);
    assert_eq!(ram.inflate(run(0, 511)).freed, 0);
    assert_eq!(peek(&memory, 0), 0x5a);
    assert_eq!(ram.inflate(run(511, 2)).freed, 2 * MIB);
    assert_eq!((peek(&memory, 0), peek(&memory, 2 * MIB)), (0, 0x5a));
}
