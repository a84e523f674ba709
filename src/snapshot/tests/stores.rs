//! Chunks that snapshots share.

use std::collections::BTreeSet;

use super::*;
use crate::snapshot::{
    Chain, SnapshotError, Store,
    fold::{merge, remove},
    parent_of,
};

fn in_store(store: &Store) -> Manner<'_> {
    Manner { store: Some((store, "store".to_owned())), ..manner() }
}

fn objects(dir: &Path) -> usize {
    let shelves = names(&dir.join("store")).into_iter().filter(|n| n.len() == 2);
    shelves.map(|n| names(&dir.join("store").join(n)).len()).sum()
}

fn four() -> Vec<(u64, Vec<u8>)> {
    [3, 20, 21, 40].map(|n| (n, page(n as u8))).to_vec()
}

#[test]
fn equal_chunks_are_kept_once_and_go_with_their_last_snapshot() {
    let (_keep, dir) = temporary();
    let store = Store::make(&dir.join("store")).unwrap();
    let mut pages = four();
    write(Destination::new(dir.join("a")), subject(64), in_store(&store), &pages).unwrap();
    assert_eq!(objects(&dir), 3);
    pages.push((60, page(60)));
    write(Destination::new(dir.join("b")), subject(64), in_store(&store), &pages).unwrap();
    assert_eq!(objects(&dir), 4);
    for name in ["a", "b"] {
        assert_eq!(names(&dir.join(name)), ["manifest.json", "memory.index", "state"]);
        let snapshot = open(&dir.join(name));
        assert!(snapshot.memory_file().is_none() && snapshot.map(0).is_err());
        snapshot.verify(true, &()).unwrap();
        let mut got = page(0);
        for number in [40, 3, 21, 20] {
            snapshot.read(number * PAGE, &mut got).unwrap();
            assert_eq!(got, page(number as u8));
        }
    }
    remove(&dir.join("b"), false).unwrap();
    let collected = store.collect(None).unwrap();
    assert_eq!((collected.kept, collected.removed), (3, 1));
    open(&dir.join("a")).verify(true, &()).unwrap();
    // Somebody removed the directory without a word.
    std::fs::remove_dir_all(dir.join("a")).unwrap();
    assert_eq!(store.collect(None).unwrap().removed, 0);
    let collected = store.collect(Some(&BTreeSet::new())).unwrap();
    assert_eq!((collected.references, collected.removed, objects(&dir)), (1, 3, 0));
}

#[test]
fn damaged_chunks_are_found_and_written_anew() {
    let (_keep, dir) = temporary();
    let store = Store::make(&dir.join("store")).unwrap();
    write(Destination::new(dir.join("a")), subject(64), in_store(&store), &four()).unwrap();
    let shelf = names(&dir.join("store")).into_iter().find(|n| n.len() == 2).unwrap();
    let shelf = dir.join("store").join(shelf);
    let object = shelf.join(&names(&shelf)[0]);
    let whole = std::fs::read(&object).unwrap();
    for bit in 0..whole.len().min(600) * 8 {
        let mut flipped = whole.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        std::fs::write(&object, &flipped).unwrap();
        // Some flips decompress to the same bytes; none to others.
        let _ = open(&dir.join("a")).verify(true, &());
    }
    for length in 0..whole.len().min(600) {
        std::fs::write(&object, &whole[..length]).unwrap();
        assert!(open(&dir.join("a")).verify(true, &()).is_err(), "{length}");
    }
    write(Destination::new(dir.join("b")), subject(64), in_store(&store), &four()).unwrap();
    open(&dir.join("a")).verify(true, &()).unwrap();
}

#[test]
fn a_reference_that_cannot_be_read_stops_a_collection() {
    let (_keep, dir) = temporary();
    let store = Store::make(&dir.join("store")).unwrap();
    let id = write(Destination::new(dir.join("a")), subject(64), in_store(&store), &four()).unwrap().id;
    let reference = dir.join("store/refs").join(id.to_string());
    let whole = std::fs::read(&reference).unwrap();
    std::fs::write(&reference, &whole[..whole.len() - 32]).unwrap();
    assert!(store.collect(None).is_err());
    assert_eq!(objects(&dir), 3);
}

#[test]
fn chains_over_a_store_are_read_and_merged_out_of_it() {
    let (_keep, dir) = temporary();
    let store = Store::make(&dir.join("store")).unwrap();
    write(Destination::new(dir.join("a")), subject(64), in_store(&store), &four()).unwrap();
    let mut of = subject(64);
    of.parent = Some(parent_of(&dir.join("b"), &open(&dir.join("a"))));
    write(Destination::new(dir.join("b")), of, in_store(&store), &[(3, vec![0; PAGE as usize])]).unwrap();
    let chain = Chain::open(&dir.join("b"), &Search::default()).unwrap();
    merge(&chain, Destination::new(dir.join("c")), manner()).unwrap();
    let full = open(&dir.join("c"));
    assert_eq!(full.extents().bytes(), 3 * PAGE);
    full.map(0).unwrap();
    assert_eq!(full.manifest().note, serde_json::json!({"name": "web"}));
    // Without its store a snapshot says what it needs.
    std::fs::rename(dir.join("store"), dir.join("moved")).unwrap();
    let error = Snapshot::open(&dir.join("a"), &Search::default()).unwrap_err();
    assert!(matches!(&error, SnapshotError::Missing { needed, .. } if needed.contains("store")), "{error}");
    let search = Search { stores: vec![dir.join("moved")], ..Search::default() };
    Snapshot::open(&dir.join("a"), &search).unwrap().verify(true, &()).unwrap();
}
