//! Disks over real files: whole transfers, odd alignments, zeroes, lost flushes.

use std::{fs, io::ErrorKind, os::unix::fs::FileExt};

use super::*;
use crate::limits::BLOCK_BOUNCE;

const SIZE: usize = 1 << 20;

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + seed * 7 + i / 512) as u8).collect()
}

fn image() -> (tempfile::NamedTempFile, Vec<u8>) {
    let image = tempfile::NamedTempFile::new().unwrap();
    let content = pattern(SIZE, 1);
    fs::write(image.path(), &content).unwrap();
    (image, content)
}

fn buffers(memory: &mut [u8], cuts: &[usize]) -> Buffers {
    let mut buffers = Buffers::new();
    let mut rest = memory;
    for cut in cuts {
        let (part, behind) = rest.split_at_mut(*cut);
        // SAFETY: the tests use the list before the memory ends.
        unsafe {
            buffers.push(libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: part.len() });
        }
        rest = behind;
    }
    buffers
}

#[test]
fn transfers_are_whole_or_fail() {
    let (image, mut content) = image();
    let disk = Disk::open(image.path(), DiskOptions::default()).unwrap();
    let mut memory = vec![0; 3000];
    disk.read(&mut buffers(&mut memory, &[1, 512, 2487]), 512, &mut Bounce::new()).unwrap();
    assert_eq!(memory, content[512..3512]);
    let mut fresh = pattern(3000, 9);
    disk.write(&mut buffers(&mut fresh, &[1000, 2000]), 1024, true, &mut Bounce::new()).unwrap();
    content[1024..4024].copy_from_slice(&fresh);
    assert_eq!(fs::read(image.path()).unwrap(), content);
    image.as_file().set_len(1000).unwrap();
    let cut = disk.read(&mut buffers(&mut memory, &[3000]), 0, &mut Bounce::new()).unwrap_err();
    assert_eq!(cut.kind(), ErrorKind::UnexpectedEof);
    assert_eq!(memory[..1000], content[..1000], "what is there still comes");
}

#[test]
fn oddly_placed_buffers_reach_a_direct_disk() {
    let (image, mut content) = image();
    for unit in [512, 4096] {
        let options = DiskOptions { read_only: false, direct: true };
        let mut disk = match Disk::open(image.path(), options) {
            Ok(disk) => disk,
            Err(DiskError::Direct { .. }) => Disk::open(image.path(), DiskOptions::default()).unwrap(),
            Err(e) => panic!("{e}"),
        };
        disk.pretend_direct(Alignment { memory: 4096, offset: unit });
        let mut bounce = Bounce::new();
        let cases = [(512, 512), (3584, 1024), (0, 4096), (1536, 2 * BLOCK_BOUNCE + 1024), (SIZE - 512, 512)];
        for (n, (offset, len)) in cases.into_iter().enumerate() {
            let mut odd = vec![0; len + 1];
            let mut there = buffers(&mut odd[1..], &[len / 2, len - len / 2]);
            assert!(disk.refuses(&there, offset as u64));
            disk.read(&mut there, offset as u64, &mut bounce).unwrap();
            assert!(odd[1..] == content[offset..offset + len], "read {offset}+{len} by {unit}");
            let mut fresh = pattern(len, n + unit as usize);
            let whole = [len];
            disk.write(&mut buffers(&mut fresh, &whole), offset as u64, false, &mut bounce).unwrap();
            content[offset..offset + len].copy_from_slice(&fresh);
            assert!(fs::read(image.path()).unwrap() == content, "write {offset}+{len} by {unit}");
        }
    }
}

#[test]
fn every_way_to_zero_gives_zeroes_and_leaves_the_rest() {
    for without in [0, 1, 2, 3, 6, 7] {
        for unmap in [false, true] {
            let (image, mut content) = image();
            let disk = Disk::open(image.path(), DiskOptions::default()).unwrap();
            disk.zeroing.store(without, std::sync::atomic::Ordering::Relaxed);
            let extent = Extent { sector: 3, sectors: 1001, unmap };
            disk.zero(extent, &mut Bounce::new()).unwrap();
            content[3 * 512..1004 * 512].fill(0);
            assert!(fs::read(image.path()).unwrap() == content, "without {without}, unmap {unmap}");
        }
    }
}

#[test]
fn a_discard_stays_inside_its_extent_and_the_file_keeps_its_size() {
    let (image, content) = image();
    let disk = Disk::open(image.path(), DiskOptions::default()).unwrap();
    disk.discard(Extent { sector: 8, sectors: 2040, unmap: false }).unwrap();
    let now = fs::read(image.path()).unwrap();
    assert_eq!(now.len(), SIZE);
    assert!(now[..4096] == content[..4096]);
}

#[test]
fn after_a_lost_flush_no_flush_succeeds_until_forgiven() {
    let full = File::options().read(true).write(true).open("/dev/full").unwrap();
    let disk = Disk::pretend(full, 8, DiskOptions::default());
    disk.flush().unwrap_err();
    assert!(disk.flush_failed());
    let (image, _) = image();
    let good = Disk::open(image.path(), DiskOptions::default()).unwrap();
    good.flush().unwrap();
    assert!(good.set_flush_failed() && !good.set_flush_failed());
    assert!(good.flush().unwrap_err().to_string().contains("earlier flush"));
    good.forgive();
    good.flush().unwrap();
}

#[test]
fn a_ring_reads_writes_flushes_and_zeroes() {
    if !available() {
        return eprintln!("no io_uring here");
    }
    let (image, mut content) = image();
    let disk = Disk::open(image.path(), DiskOptions::default()).unwrap();
    let mut ring = Ring::new(&disk, 4).unwrap();
    let (mut one, mut two) = (vec![0; 4096], pattern(1024, 5));
    let (from, to) = (buffers(&mut one, &[4096]), buffers(&mut two, &[1000, 24]));
    let extent = Extent { sector: 64, sectors: 8, unmap: true };
    let mode = disk.zeroing(extent).unwrap();
    let operations =
        [Operation::Read(&from, 8192), Operation::Write(&to, 512, true), Operation::Allocate(mode, extent)];
    for (token, operation) in operations.iter().enumerate() {
        // SAFETY: the buffers live until all three are reaped below.
        assert!(unsafe { ring.push(operation, token as u64) });
    }
    assert_eq!(ring.in_flight(), 3);
    assert!(ring.submit().unwrap());
    let mut results = [0; 4];
    let mut reap = |ring: &mut Ring, count: u32| {
        while ring.in_flight() > count {
            match ring.reap() {
                Some((token, result)) => results[token as usize] = result,
                None => assert!(ring.wait(std::time::Duration::from_secs(5))),
            }
        }
        results
    };
    reap(&mut ring, 0);
    // SAFETY: a flush has no buffers.
    assert!(unsafe { ring.push(&Operation::Flush, 3) });
    ring.submit().unwrap();
    assert_eq!(reap(&mut ring, 0), [4096, 1024, 0, 0]);
    assert_eq!(one, content[8192..12288]);
    content[512..1536].copy_from_slice(&two);
    content[64 * 512..72 * 512].fill(0);
    let mut now = vec![0; SIZE];
    image.as_file().read_exact_at(&mut now, 0).unwrap();
    assert!(now == content);
}

#[test]
fn a_ring_does_nothing_but_disk_requests() {
    if !available() {
        return eprintln!("no io_uring here");
    }
    let (image, _) = image();
    let disk = Disk::open(image.path(), DiskOptions::default()).unwrap();
    let mut ring = Ring::new(&disk, 4).unwrap();
    let refused = ring.push_foreign();
    assert_eq!(refused, -libc::EACCES);
}

#[test]
fn a_dropped_ring_lets_the_lock_go_at_once() {
    if !available() {
        return eprintln!("no io_uring here");
    }
    let (image, _) = image();
    for _ in 0..20 {
        let disk = Disk::open(image.path(), DiskOptions::default()).unwrap();
        let mut ring = Ring::new(&disk, 4).unwrap();
        // SAFETY: a flush has no buffers.
        assert!(unsafe { ring.push(&Operation::Flush, 0) });
        ring.submit().unwrap();
        while ring.reap().is_none() {
            assert!(ring.wait(std::time::Duration::from_secs(5)));
        }
        drop((ring, disk));
        let next = File::options().read(true).write(true).open(image.path()).unwrap();
        assert!(lock::try_lock(&next, false, image.path()).is_ok());
    }
}
