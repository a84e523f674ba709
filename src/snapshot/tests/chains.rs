//! Diffs over diffs, and what is made of them.

use super::*;
use crate::snapshot::{
    Chain, SnapshotError,
    fold::{diff, merge, rebase, remove},
    parent_of,
};

const PAGES: u64 = 64;

/// A model of memory beside the chain that is built.
struct Line {
    dir: PathBuf,
    memory: Vec<Vec<u8>>,
    last: Option<PathBuf>,
    count: usize,
}

impl Line {
    fn new(dir: &Path) -> Line {
        Line { dir: dir.into(), memory: vec![vec![0; PAGE as usize]; PAGES as usize], last: None, count: 0 }
    }

    /// Takes a snapshot of these changes: full the first time, a diff later.
    fn take(&mut self, changes: &[(u64, Vec<u8>)]) -> PathBuf {
        let path = self.dir.join(format!("g{}", self.count));
        let mut of = subject(PAGES);
        of.parent = self.last.as_ref().map(|last| parent_of(&path, &open(last)));
        write(Destination::new(&path), of, manner(), changes).unwrap();
        changes.iter().for_each(|(n, bytes)| self.memory[*n as usize] = bytes.clone());
        (self.last, self.count) = (Some(path.clone()), self.count + 1);
        path
    }

    fn all(&self) -> Vec<u8> {
        self.memory.concat()
    }
}

fn chain(path: &Path) -> Chain {
    Chain::open(path, &Search::default()).unwrap()
}

fn memory(chain: &Chain) -> Vec<u8> {
    let mut all = vec![1; chain.size() as usize];
    chain.read(0, &mut all).unwrap();
    all
}

fn fifty(dir: &Path) -> Line {
    let mut line = Line::new(dir);
    line.take(&(0..32).map(|n| (n, page(n as u8 + 1))).collect::<Vec<_>>());
    for generation in 1..=50u64 {
        // Some pages become zero again: in a diff that is not a hole.
        let zero = (generation * 5 % PAGES, vec![0; PAGE as usize]);
        line.take(&[(generation * 7 % PAGES, page(generation as u8 + 100)), zero]);
    }
    line
}

#[test]
fn a_chain_of_fifty_reads_as_the_memory_that_was() {
    let (_keep, dir) = temporary();
    let line = fifty(&dir);
    let top = chain(line.last.as_ref().unwrap());
    assert_eq!(top.layers().len(), 51);
    assert_eq!(memory(&top), line.all());
    let mut flat = vec![1; line.all().len()];
    for (run, layer) in top.flatten() {
        let file = top.layers()[layer].memory_file().unwrap();
        std::os::unix::fs::FileExt::read_exact_at(
            file,
            &mut flat[run.start as usize..run.end as usize],
            run.start,
        )
        .unwrap();
    }
    assert_eq!(flat, line.all());
    let mut at = 0;
    while let Some(place) = top.place(at) {
        assert!(place.offset == at && place.length > 0);
        at += place.length;
    }
    assert_eq!(at, PAGES * PAGE);
    let merged = merge(&top, Destination::new(dir.join("full")), manner()).unwrap();
    let full = chain(&dir.join("full"));
    assert_eq!((full.layers().len(), full.top().manifest().id), (1, merged.id));
    assert_eq!(memory(&full), line.all());
    full.top().verify(true, &()).unwrap();
    assert_eq!(diff(&top, &full, &()).unwrap().pages.bytes(), 0);
    assert_eq!(full.top().sections().unwrap(), top.top().sections().unwrap());
}

#[test]
fn missing_swapped_and_ring_shaped_parents_are_named() {
    let (_keep, dir) = temporary();
    let mut line = Line::new(&dir);
    let base = line.take(&[(1, page(1))]);
    let top = line.take(&[(2, page(2))]);
    let elsewhere = dir.join("far/away");
    std::fs::create_dir_all(&elsewhere).unwrap();
    std::fs::rename(&base, elsewhere.join("moved")).unwrap();
    let error = Chain::open(&top, &Search::default()).unwrap_err();
    assert!(error.to_string().contains("its parent"), "{error}");
    let search = Search { parents: vec![elsewhere.clone()], ..Search::default() };
    assert_eq!(memory(&Chain::open(&top, &search).unwrap()), line.all());
    // One with the same identity and other pages is another one.
    let id = open(&elsewhere.join("moved")).manifest().id;
    let mut writer = Writer::begin(Destination::new(&base), subject(PAGES), manner(), Some(id)).unwrap();
    writer.run(PAGE, &page(9)).unwrap();
    writer.finish().unwrap();
    assert!(matches!(Chain::open(&top, &Search::default()), Err(SnapshotError::Missing { .. })));
    // A chain that bites its tail: the base is said to lie on the top.
    std::fs::remove_dir_all(&base).unwrap();
    let mut of = subject(PAGES);
    of.parent = Some(parent_of(&base, &open(&top)));
    let mut writer = Writer::begin(Destination::new(&base), of, manner(), Some(id)).unwrap();
    writer.run(PAGE, &page(1)).unwrap();
    writer.finish().unwrap();
    let error = Chain::open(&top, &Search::default()).unwrap_err().to_string();
    assert!(error.contains("ring"), "{error}");
}

#[test]
fn differences_are_found_page_by_page() {
    let (_keep, dir) = temporary();
    let mut line = Line::new(&dir);
    let base = line.take(&[(1, page(1)), (2, page(2))]);
    let top = line.take(&[(2, page(3)), (1, page(1)), (40, page(4)), (41, page(5))]);
    let found = diff(&chain(&base), &chain(&top), &()).unwrap();
    let runs: Vec<_> = found.pages.runs().iter().map(|r| (r.start / PAGE, r.end / PAGE)).collect();
    assert_eq!(runs, [(2, 3), (40, 42)]);
    assert!(found.sections.is_empty());
    write(Destination::new(dir.join("other")), subject(8), manner(), &[]).unwrap();
    assert!(matches!(
        diff(&chain(&base), &chain(&dir.join("other")), &()),
        Err(SnapshotError::Unlike { .. })
    ));
}

#[test]
fn pages_that_a_chain_has_already_are_not_written_again() {
    let (_keep, dir) = temporary();
    let mut line = Line::new(&dir);
    line.take(&[(1, page(1)), (2, page(2))]);
    let chain = chain(&line.take(&[(2, page(3))]));
    // Pages 0 to 3: one that is zero on both sides, the parent's, the diff's, and a new one.
    let differing = |first: u64, pages: &[Vec<u8>]| {
        let mut found = Vec::new();
        let mut take = |at: u64, bytes: &[u8]| {
            found.push((at / PAGE, bytes.to_vec()));
            Ok(())
        };
        chain.differing(first * PAGE, &pages.concat(), &mut take).unwrap();
        found
    };
    let same = [vec![0; PAGE as usize], page(1), page(3)];
    assert_eq!(differing(0, &same), []);
    assert_eq!(differing(0, &[&same[..], &[page(4)]].concat()), [(3, page(4))]);
    assert_eq!(differing(1, &[page(2), page(2)]), [(1, [page(2), page(2)].concat())]);
    // A page that was emptied is written, and what lies beyond the chain's memory is not known there.
    assert_eq!(differing(1, &[vec![0; PAGE as usize]]), [(1, vec![0; PAGE as usize])]);
    let end = chain.size() / PAGE;
    assert_eq!(differing(end, &[page(9)]), [(end, page(9))]);
}

#[test]
fn a_diff_changes_its_parent_only_where_the_pages_agree() {
    let (_keep, dir) = temporary();
    let mut line = Line::new(&dir);
    let base = line.take(&[(1, page(1)), (2, page(2))]);
    let middle = line.take(&[(3, page(3))]);
    let top = line.take(&[(2, page(7)), (5, page(5))]);
    let child = line.take(&[(6, page(6))]);
    let id = open(&top).manifest().id;
    // The base lacks page 3, which the top relies on.
    let error = rebase(&top, &chain(&base), &Search::default(), &()).unwrap_err().to_string();
    assert!(error.contains("1 pages") && error.contains("12288"), "{error}");
    merge(&chain(&middle), Destination::new(dir.join("flat")), manner()).unwrap();
    rebase(&top, &chain(&dir.join("flat")), &Search::default(), &()).unwrap();
    remove(&middle, false).unwrap();
    remove(&base, false).unwrap();
    let (after, grandchild) = (chain(&top), chain(&child));
    assert_eq!((after.layers().len(), after.top().manifest().id), (2, id));
    assert_eq!(memory(&grandchild), line.all());
    after.top().verify(true, &()).unwrap();
    assert!(rebase(&top, &chain(&child), &Search::default(), &()).is_err());
    assert!(rebase(&dir.join("flat"), &chain(&child), &Search::default(), &()).is_err());
    assert_eq!(names(&dir), ["flat", "g2", "g3"]);
}

#[test]
fn what_others_lie_on_is_not_removed_unasked() {
    let (_keep, dir) = temporary();
    let mut line = Line::new(&dir);
    let base = line.take(&[(1, page(1))]);
    line.take(&[(2, page(2))]);
    let error = remove(&base, false).unwrap_err().to_string();
    assert!(error.contains("g1 lies on"), "{error}");
    remove(&base, true).unwrap();
    assert_eq!(names(&dir), ["g1"]);
}
