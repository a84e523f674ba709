//! Working sets of mapped memory files.

use std::{os::fd::AsRawFd, path::Path};

use super::{
    super::working_set::{FILE, Place, Recorder, WorkingSet},
    *,
};
use crate::snapshot::{Destination, Manner, Region, Search, Snapshot, Subject, Writer};

const PAGES: u64 = 4096;

fn snapshot(path: &Path) -> Snapshot {
    let regions = vec![Region { guest_address: 0, size: PAGES * PAGE, offset: 0, page_size: PAGE }];
    let subject = Subject { regions, ..Subject::default() };
    let mut writer = Writer::begin(Destination::new(path), subject, Manner::default(), None).unwrap();
    (0..PAGES).for_each(|n| writer.run(n * PAGE, &page(n)).unwrap());
    writer.finish().unwrap();
    Snapshot::open(path, &Search::default()).unwrap()
}

fn place(snapshot: &Snapshot) -> Place {
    Place::of(snapshot).unwrap()
}

fn map(snapshot: &Snapshot) -> Area {
    Area::map(PAGES, 0, snapshot.memory_file().unwrap().as_raw_fd())
}

/// What a machine does first: reads here and there, and writes less.
fn work(area: Area) {
    for number in (0..1500).step_by(3) {
        assert_eq!(area.page(number), page(number));
    }
    for number in (200..2000).step_by(9) {
        area.write(number, 1);
    }
}

/// Faults of this thread up to now.
fn faults() -> i64 {
    // SAFETY: `rusage` is plain numbers, for which all zeroes is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the call fills the structure it is given.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    usage.ru_minflt + usage.ru_majflt
}

#[test]
fn a_recorded_set_spares_the_next_machine_its_faults() {
    let dir = tempfile::tempdir().unwrap();
    let snapshot = snapshot(&dir.path().join("it"));
    assert_eq!(place(&snapshot).read(), None);
    let area = map(&snapshot);
    let range = area.range(0);
    let look = move || WorkingSet::of_mappings(&[range]);
    let recorder = Recorder::start(place(&snapshot), LONG, look).unwrap();
    let before = faults();
    work(area);
    let without = faults() - before;
    let recorded = recorder.finish().unwrap();

    let set = place(&snapshot).read().unwrap();
    assert_eq!(set, recorded);
    assert_eq!(set.written.bytes(), 200 * PAGE);
    let area = map(&snapshot);
    let done = set.prefetch(&[area.range(0)]);
    assert!(done.calls <= 210 && done.bytes >= 500 * PAGE, "{done:?}");
    let before = faults();
    work(area);
    let with = faults() - before;
    assert!(without >= 10 * with.max(1), "{without} faults without, {with} with");
    // What was brought beforehand is what lies in the snapshot.
    assert_eq!(area.page(201), page(201));
    snapshot.verify(true, &()).unwrap();
}

#[test]
fn a_set_is_recorded_by_itself_and_a_damaged_one_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let snapshot = snapshot(&dir.path().join("it"));
    std::fs::write(dir.path().join("it").join(FILE), b"NACLWORK and no more").unwrap();
    assert_eq!(place(&snapshot).read(), None);
    let area = map(&snapshot);
    area.write(77, 1);
    let range = area.range(0);
    let look = move || WorkingSet::of_mappings(&[range]);
    drop(Recorder::start(place(&snapshot), Duration::from_millis(1), look).unwrap());
    wait_for("the set", || place(&snapshot).read().is_some());
    let set = place(&snapshot).read().unwrap();
    assert_eq!(set.written.runs(), [Run { start: 77 * PAGE, end: 78 * PAGE }]);
    crate::snapshot::fold::remove(snapshot.path(), false).unwrap();
    assert!(!dir.path().join("it").exists());
}

#[test]
fn a_set_of_the_pager_is_brought_first() {
    let dir = tempfile::tempdir().unwrap();
    let snapshot = snapshot(&dir.path().join("it"));
    let area = Area::anonymous(PAGES);
    let source = Box::new(Model::of(0..PAGES));
    let pager = Pager::start(&[area.range(0)], source, &Prefetch::default(), true, never()).unwrap();
    work(area);
    let without = pager.served().faults;
    let touched = pager.touched().take();
    place(&snapshot).publish(&WorkingSet { touched, ..WorkingSet::default() }).unwrap();

    let first = place(&snapshot).read().unwrap().touched;
    let area = Area::anonymous(PAGES);
    let (source, bytes) = (Box::new(Model::of(0..PAGES)), first.bytes());
    let prefetch = Prefetch { first, all: false };
    let pager = Pager::start(&[area.range(0)], source, &prefetch, false, never()).unwrap();
    assert!(pager.has_first(LONG));
    assert_eq!(pager.served().filled, bytes);
    work(area);
    let with = pager.served().faults;
    assert!(without >= 100 && with == 0, "{without} faults without, {with} with");
}

#[test]
fn prefetching_stops_at_its_bound_and_passes_over_what_fails() {
    let dir = tempfile::tempdir().unwrap();
    let snapshot = snapshot(&dir.path().join("it"));
    let area = map(&snapshot);
    let all = Extents::checked(vec![Run { start: 0, end: PAGES * PAGE }], PAGES * PAGE).unwrap();
    let set = WorkingSet { touched: all, ..WorkingSet::default() };
    // Half of it is not mapped.
    // SAFETY: the pages lie in the mapping, which nobody else uses.
    unsafe { libc::munmap(area.address(PAGES / 2).cast(), (PAGES / 2 * PAGE) as usize) };
    let done = set.prefetch(&[area.part(0, PAGES / 2, 0), area.part(PAGES / 2, PAGES / 2, PAGES / 2 * PAGE)]);
    assert_eq!((done.calls, done.bytes), (2, PAGES / 2 * PAGE));
}
