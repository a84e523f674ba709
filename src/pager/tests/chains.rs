//! Real snapshots as sources: chains of diffs, stores, hashes that are right and wrong.

use std::{
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use super::*;
use crate::snapshot::{
    Chain, Destination, Manner, Region, Search, Snapshot, Store, Subject, Writer, parent_of,
};

const PAGES: u64 = 1024;
const CHUNK: u64 = 64 << 10;

fn write(path: &Path, parent: Option<&Path>, manner: Manner<'_>, pages: &BTreeMap<u64, Vec<u8>>) {
    let open = |path| Snapshot::open(path, &Search::default()).unwrap();
    let subject = Subject {
        regions: vec![Region { guest_address: 0, size: PAGES * PAGE, offset: 0, page_size: PAGE }],
        parent: parent.map(|parent| parent_of(path, &open(parent))),
        ..Subject::default()
    };
    let mut writer = Writer::begin(Destination::new(path), subject, manner, None).unwrap();
    for (number, bytes) in pages {
        writer.run(number * PAGE, bytes).unwrap();
    }
    writer.finish().unwrap();
}

/// A full snapshot and `diffs` over it, and the memory that all of them make.
fn line(dir: &Path, diffs: u64, manner: &Manner<'_>) -> (PathBuf, BTreeMap<u64, Vec<u8>>) {
    let mut memory: BTreeMap<_, _> = (0..700).map(|n| (n, page(n))).collect();
    let mut last = dir.join("g0");
    write(&last, None, manner.clone(), &memory);
    for generation in 1..=diffs {
        let mut changes = BTreeMap::new();
        for step in 0..20 {
            changes.insert((generation * 131 + step * 37) % PAGES, page(generation * 1000 + step));
        }
        changes.insert(generation * 7 % PAGES, vec![0; PAGE as usize]);
        let path = dir.join(format!("g{generation}"));
        write(&path, Some(&last), manner.clone(), &changes);
        memory.extend(changes);
        last = path;
    }
    (last, memory)
}

fn source(path: &Path) -> Box<ChainSource> {
    Box::new(ChainSource::new(Arc::new(Chain::open(path, &Search::default()).unwrap())))
}

fn check(area: Area, memory: &BTreeMap<u64, Vec<u8>>) {
    for step in 0..PAGES {
        let number = step * 389 % PAGES;
        let expected = memory.get(&number).cloned().unwrap_or_else(|| vec![0; PAGE as usize]);
        assert!(area.page(number) == expected, "page {number}");
    }
}

#[test]
fn a_chain_of_fifty_is_served_as_the_memory_that_was() {
    let dir = tempfile::tempdir().unwrap();
    for hash in [false, true] {
        let manner = Manner { hash, chunk_size: CHUNK, ..Manner::default() };
        let (last, memory) = line(&dir.path().join(""), 50, &manner);
        let area = Area::anonymous(PAGES);
        let pager =
            Pager::start(&[area.range(0)], source(&last), &Prefetch::default(), false, never()).unwrap();
        check(area, &memory);
        wait_for("the end", || pager.served().complete);
        (0..=50).for_each(|n| std::fs::remove_dir_all(dir.path().join(format!("g{n}"))).unwrap());
    }
}

#[test]
fn a_store_is_served_chunk_by_chunk() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::make(&dir.path().join("store")).unwrap();
    let manner =
        Manner { chunk_size: 4 * CHUNK, store: Some((&store, "store".to_owned())), ..Manner::default() };
    let (last, memory) = line(dir.path(), 3, &manner);
    let area = Area::anonymous(PAGES);
    let pager = Pager::start(&[area.range(0)], source(&last), &Prefetch::default(), false, never()).unwrap();
    // The rest of a chunk that was unpacked for one fault follows by itself.
    assert_eq!(area.page(80), memory[&80]);
    wait_for("the chunk", || pager.served().filled >= 60 * PAGE);
    assert_eq!(pager.served().faults, 1);
    check(area, &memory);
    assert!(pager.complete(LONG));
}

#[test]
fn a_chunk_without_its_hash_ends_the_machine_and_the_others_are_served() {
    let dir = tempfile::tempdir().unwrap();
    let manner = Manner { chunk_size: CHUNK, ..Manner::default() };
    let (last, memory) = line(dir.path(), 1, &manner);
    let file = std::fs::File::options().write(true).open(dir.path().join("g0/memory")).unwrap();
    file.write_all_at(&[0x55], 400 * PAGE + 77).unwrap();
    let area = Area::anonymous(PAGES);
    let (broken, told) = complaints();
    let pager = Pager::start(&[area.range(0)], source(&last), &Prefetch::default(), false, broken).unwrap();
    assert_eq!(area.page(350), memory[&350]);
    // Another page of the same chunk: none of it is believed.
    let waiting = hostile::touch(area, 401);
    let reason = told.recv_timeout(LONG).unwrap();
    assert!(reason.contains("g0") && reason.contains("do not have the hash"), "{reason}");
    assert!(waiting.recv_timeout(Duration::from_millis(200)).is_err());
    pager.give_up();
}

#[test]
fn files_that_are_cut_and_chunks_that_are_gone_are_told_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let manner = Manner { hash: false, chunk_size: CHUNK, ..Manner::default() };
    let (last, _) = line(dir.path(), 1, &manner);
    let area = Area::anonymous(PAGES);
    let (broken, told) = complaints();
    let pager = Pager::start(&[area.range(0)], source(&last), &Prefetch::default(), false, broken).unwrap();
    std::fs::File::options().write(true).open(dir.path().join("g0/memory")).unwrap().set_len(PAGE).unwrap();
    drop(hostile::touch(area, 500));
    let reason = told.recv_timeout(LONG).unwrap();
    assert!(reason.contains("g0 cannot be read"), "{reason}");
    pager.give_up();

    let store = Store::make(&dir.path().join("store")).unwrap();
    let manner = Manner { chunk_size: CHUNK, store: Some((&store, "store".to_owned())), ..Manner::default() };
    let path = dir.path().join("packed");
    write(&path, None, manner, &(0..PAGES).map(|n| (n, page(n))).collect());
    let area = Area::anonymous(PAGES);
    let (broken, told) = complaints();
    let pager = Pager::start(&[area.range(0)], source(&path), &Prefetch::default(), false, broken).unwrap();
    assert_eq!(area.page(0), page(0));
    std::fs::remove_dir_all(dir.path().join("store")).unwrap();
    drop(hostile::touch(area, 900));
    let reason = told.recv_timeout(LONG).unwrap();
    assert!(reason.contains("packed cannot be read: No such file"), "{reason}");
    pager.give_up();
}
