//! What is written is what is read.

use std::{
    ops::ControlFlow,
    os::unix::fs::{FileExt, MetadataExt},
    sync::atomic::{AtomicU64, Ordering},
};

use super::*;
use crate::snapshot::{Capture, Chain, SnapshotError, Watch};

#[test]
fn pages_sections_and_manifest_come_back() {
    let (_keep, dir) = temporary();
    let path = dir.join("one");
    let pages = [(1, page(1)), (2, page(2)), (40, page(3))];
    let written = write(Destination::new(&path), subject(64), manner(), &pages).unwrap();
    assert_eq!(names(&dir), ["one"]);
    assert_eq!(names(&path), ["manifest.json", "memory", "memory.index", "state"]);
    let snapshot = open(&path);
    assert_eq!(snapshot.manifest().id, written.id);
    assert_eq!((written.bytes, snapshot.extents().bytes()), (3 * PAGE, 3 * PAGE));
    assert_eq!(snapshot.sections().unwrap()[1].open::<Vec<u8>>("serial", 2).unwrap(), vec![3; 20]);
    let verified = snapshot.verify(true, &()).unwrap();
    assert_eq!((verified.sections, verified.chunks, verified.bytes), (2, 2, 3 * PAGE));
    for (number, bytes) in &pages {
        let mut got = page(0);
        snapshot.read(number * PAGE, &mut got).unwrap();
        assert_eq!(&got, bytes);
    }
    assert!(snapshot.read(0, &mut page(0)).is_err());
    // Page 40 is in the second region, 8 pages in.
    let mapping = snapshot.map(1).unwrap();
    // SAFETY: the mapping is 32 pages and nobody else has it.
    let mapped = unsafe { std::slice::from_raw_parts(mapping.address().as_ptr(), mapping.length()) };
    assert_eq!(mapped[8 * PAGE as usize..][..PAGE as usize], page(3));
    assert!(mapped[..PAGE as usize].iter().all(|b| *b == 0));
}

#[test]
fn zero_pages_are_holes_and_holes_cost_nothing() {
    let (_keep, dir) = temporary();
    let path = dir.join("big");
    let mut writer = Writer::begin(Destination::new(&path), subject(1 << 20), manner(), None).unwrap();
    writer.run(0, &[page(0), vec![0; 512 * PAGE as usize], page(7)].concat()).unwrap();
    writer.zero(1 << 30, 1 << 30).unwrap();
    writer.finish().unwrap();
    let file = std::fs::metadata(path.join("memory")).unwrap();
    assert_eq!(file.len(), 4 << 30);
    assert!(file.blocks() * 512 <= 64 << 10, "{} blocks", file.blocks());
    assert_eq!(open(&path).extents().runs().len(), 2);
    open(&path).verify(true, &()).unwrap();
}

#[test]
fn pages_in_any_order_hash_alike_and_the_last_counts() {
    let (_keep, dir) = temporary();
    let rising: Vec<_> = (0..40).map(|n| (n, page(n as u8 + 1))).collect();
    let mut mixed: Vec<_> = (0..40).map(|n| (n, page(99))).collect();
    mixed.extend(rising.iter().rev().cloned());
    mixed.push((5, vec![0; PAGE as usize]));
    mixed.push((5, page(6)));
    write(Destination::new(dir.join("a")), subject(64), manner(), &rising).unwrap();
    write(Destination::new(dir.join("b")), subject(64), manner(), &mixed).unwrap();
    let (a, b) = (open(&dir.join("a")), open(&dir.join("b")));
    a.verify(true, &()).unwrap();
    b.verify(true, &()).unwrap();
    assert_eq!(a.manifest().memory.index.digest, b.manifest().memory.index.digest);
    // A page that became zero again is zero, wherever it is said to be.
    mixed.push((5, vec![0; PAGE as usize]));
    write(Destination::new(dir.join("c")), subject(64), manner(), &mixed).unwrap();
    let mut got = page(1);
    Chain::open(&dir.join("c"), &Search::default()).unwrap().read(5 * PAGE, &mut got).unwrap();
    assert!(got.iter().all(|b| *b == 0));
    open(&dir.join("c")).verify(true, &()).unwrap();
}

#[test]
fn a_sparse_source_is_copied_by_its_data_alone() {
    let (_keep, dir) = temporary();
    let source = tempfile::tempfile().unwrap();
    source.set_len(1 << 30).unwrap();
    source.write_all_at(&page(4), 300 * PAGE).unwrap();
    source.write_all_at(b"last", (1 << 30) - 4).unwrap();
    let path = dir.join("s");
    let mut writer = Writer::begin(Destination::new(&path), subject(1 << 18), manner(), None).unwrap();
    writer.copy(&source, 0, 0, 1 << 30).unwrap();
    assert_eq!(writer.finish().unwrap().bytes, 2 * PAGE);
    let mut got = page(0);
    open(&path).read(300 * PAGE, &mut got).unwrap();
    assert_eq!(got, page(4));
}

#[test]
fn drives_come_along_or_stay() {
    let (_keep, dir) = temporary();
    let disk = tempfile::tempfile().unwrap();
    disk.set_len(10 << 20).unwrap();
    disk.write_all_at(b"data", 5 << 20).unwrap();
    let mut writer = Writer::begin(Destination::new(dir.join("d")), subject(4), manner(), None).unwrap();
    writer.drive("root", "/disks/root.img", Capture::Copy, &disk).unwrap();
    writer.drive("data", "/disks/data.img", Capture::Share, &disk).unwrap();
    writer.finish().unwrap();
    let snapshot = open(&dir.join("d"));
    let copy = snapshot.drive("root").unwrap().unwrap();
    let mut got = [0; 4];
    copy.read_exact_at(&mut got, 5 << 20).unwrap();
    assert_eq!((&got, copy.metadata().unwrap().len()), (b"data", 10 << 20));
    assert!(snapshot.drive("data").unwrap().is_none());
    snapshot.verify(true, &()).unwrap();
}

struct StopAfter(AtomicU64);

impl Watch for StopAfter {
    fn step(&self, done: u64, total: u64) -> ControlFlow<()> {
        assert!(done <= total);
        match self.0.fetch_sub(1, Ordering::Relaxed) {
            0 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    }
}

#[test]
fn cancelling_leaves_nothing() {
    let (_keep, dir) = temporary();
    for steps in 0..3 {
        let watch = StopAfter(AtomicU64::new(steps));
        let pages = [(1, page(1)), (2, page(2)), (3, page(3))];
        let manner = Manner { watch: &watch, ..manner() };
        let ended = write(Destination::new(dir.join("x")), subject(64), manner, &pages);
        assert!(matches!(ended, Err(SnapshotError::Cancelled)));
        assert!(names(&dir).is_empty());
    }
}

#[test]
fn pages_beyond_memory_or_across_pages_are_refused() {
    let (_keep, dir) = temporary();
    let mut writer = Writer::begin(Destination::new(dir.join("x")), subject(4), manner(), None).unwrap();
    assert!(writer.run(1, &page(1)).is_err());
    assert!(writer.run(0, b"short").is_err());
    assert!(writer.run(4 * PAGE, &page(1)).is_err());
    assert!(writer.zero(u64::MAX - PAGE + 1, PAGE).is_err());
    let mut odd = subject(4);
    odd.regions[1].offset = 0;
    assert!(Writer::begin(Destination::new(dir.join("y")), odd, manner(), None).is_err());
}
