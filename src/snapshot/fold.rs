//! What is done with snapshots as wholes: compare two, fold a chain into one, put a diff on
//! another parent, remove one.
//!
//! None changes a snapshot in place. A result is written as any snapshot is and appears whole;
//! a rebased diff takes its own place in one exchange, with its files linked, not copied.

use std::{
    collections::BTreeSet,
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::Arc,
};

use devices::state::Section;

use super::{
    SnapshotError,
    chain::{Chain, check_alike, parent_of},
    disk::{Disk, HostDisk},
    draft::{self, Destination, Draft},
    error::doing,
    extents::{Extents, Found, Gathering, Run},
    limits::PAGE,
    manifest::{self, Manifest},
    reader::{Search, Snapshot, follow_hint, inspect, list},
    store::Store,
    writer::{Manner, PIECE, Subject, Watch, Writer, Written, take_file},
};

/// How two snapshots differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The pages that differ.
    pub pages: Extents,
    /// Names of the sections of state that differ, are new, or are gone.
    pub sections: BTreeSet<String>,
}

/// Compares the memory and state of two snapshots, each with what it lies on. Pages that both
/// have from the same file are not read.
pub fn diff(one: &Chain, other: &Chain, watch: &dyn Watch) -> Result<Difference, SnapshotError> {
    check_same_memory(one.top(), other.top())?;
    let pages = compare((one, 0), (other, 0), watch)?;
    let (mine, theirs) = (one.top().sections()?, other.top().sections()?);
    let only = |a: &[Section], b: &[Section]| -> Vec<String> {
        a.iter().filter(|s| !b.contains(s)).map(|s| s.kind.clone()).collect()
    };
    let sections = only(&mine, &theirs).into_iter().chain(only(&theirs, &mine)).collect();
    Ok(Difference { pages, sections })
}

/// Writes a chain as one full snapshot, with a new identity, at `destination`.
pub fn merge(
    chain: &Chain,
    destination: Destination,
    mut manner: Manner<'_>,
) -> Result<Written, SnapshotError> {
    let top = chain.top();
    let from = top.manifest();
    let subject = Subject {
        nacelle: from.nacelle.clone(),
        created: from.created,
        machine: from.machine.clone(),
        cpu: from.cpu.clone(),
        note: from.note.clone(),
        regions: from.memory.regions.clone(),
        parent: None,
    };
    manner.chunk_size = from.memory.chunk_size;
    manner.expected = chain.layers().iter().map(|l| l.extents().bytes()).sum::<u64>().min(chain.size());
    let mut writer = Writer::begin(destination, subject, manner, None)?;
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    while let Some(place) = chain.place(at) {
        at += if place.layer.is_none() {
            place.length
        } else {
            let count = place.length.min(PIECE as u64);
            let piece = buffer.get_mut(..count as usize).unwrap_or_default();
            chain.read(at, piece)?;
            writer.run(at, piece)?;
            count
        };
    }
    top.sections()?.into_iter().for_each(|section| writer.section(section));
    for drive in &from.drives {
        match top.drive(&drive.id)? {
            Some(file) => writer.drive(&drive.id, &drive.source, manifest::Capture::Copy, &file)?,
            None => writer.share(drive.clone()),
        }
    }
    writer.finish()
}

/// Puts the diff at `path` on `parent`, if all pages that it does not have itself are the same
/// there; an error says how many are not. The snapshot keeps its identity, and those that lie
/// on it do not change.
pub fn rebase(path: &Path, parent: &Chain, search: &Search, watch: &dyn Watch) -> Result<(), SnapshotError> {
    let chain = Chain::open(path, search)?;
    let top = chain.top();
    if top.manifest().parent.is_none() {
        let text = format!("Snapshot {} is full and has no parent to change", path.display());
        return Err(SnapshotError::Request(text));
    }
    if parent.layers().iter().any(|l| l.manifest().id == top.manifest().id) {
        let text = format!("Snapshot {} cannot lie on itself", path.display());
        return Err(SnapshotError::Request(text));
    }
    check_alike(top, parent.top())?;
    let mut missing = Gathering::default();
    for run in compare((&chain, 1), (parent, 0), watch)?.runs() {
        let mut at = run.start;
        while at < run.end {
            let found = top.extents().find(at);
            let next = match found {
                Found::Until(end) => end.min(run.end),
                Found::AbsentUntil(end) => {
                    let end = end.min(run.end);
                    missing.add(Run { start: at, end });
                    end
                }
            };
            at = next;
        }
    }
    let missing = missing.finish();
    if let Some(first) = missing.runs().first() {
        let count = missing.bytes() / PAGE;
        let reason = format!("{count} pages that the diff relies on differ, the first at {}", first.start);
        let (one, other) = (path.into(), parent.top().path().into());
        return Err(SnapshotError::Unlike { one, other, reason });
    }
    let disk: Arc<dyn Disk> = Arc::new(HostDisk);
    let draft = Draft::begin(Arc::clone(&disk), Destination::replacing(path))?;
    let mut manifest = top.manifest().clone();
    manifest.parent = Some(parent_of(path, parent.top()));
    for name in top.manifest().files() {
        let taken = take_file(&*disk, top.directory(), &draft, name);
        doing(taken, || format!("{name} of snapshot {} cannot be taken over", path.display()))?;
    }
    draft.write(manifest::FILE, &manifest.encode())?;
    draft.publish()
}

/// Removes the snapshot at `path`. Unless `force`, it is an error if a snapshot beside it lies
/// on it. Its hold on a store is given up, unless a copy of it lies beside it.
pub fn remove(path: &Path, force: bool) -> Result<(), SnapshotError> {
    if let Some(child) = dependent(path).filter(|_| !force) {
        let (path, child) = (path.display(), child.display());
        let text = format!("{child} lies on {path}; merge or remove that first, or force it");
        return Err(SnapshotError::Request(text));
    }
    // A damaged snapshot can be removed, too; what it held in a store is found by a collection.
    let held = inspect(path).ok().and_then(|m| {
        let hint = &m.memory.store.as_ref()?.hint;
        let copied = beside(path).iter().any(|(_, other)| other.id == m.id);
        let (directory, at) = follow_hint(path, hint).ok().filter(|_| !copied)?;
        Some((Store::at(directory, at), m.id))
    });
    draft::remove(&HostDisk, path)?;
    held.map_or(Ok(()), |(store, id)| store.forget(id))
}

/// A snapshot beside the one at `path` that lies on it, unless a copy of it is there as well.
pub fn dependent(path: &Path) -> Option<PathBuf> {
    let id = inspect(path).ok()?.id;
    let beside = beside(path);
    let lies_on = |m: &Manifest| m.parent.as_ref().is_some_and(|p| p.id == id);
    let child = beside.iter().find(|(_, m)| lies_on(m)).map(|(at, _)| at.clone());
    child.filter(|_| !beside.iter().any(|(_, m)| m.id == id))
}

/// The other snapshots of the directory that the one at `path` lies in.
fn beside(path: &Path) -> Vec<(PathBuf, Manifest)> {
    let Ok(path) = std::fs::canonicalize(path) else { return Vec::new() };
    let found = path.parent().and_then(|around| list(around).ok()).unwrap_or_default();
    found.into_iter().filter(|(at, _)| *at != path).filter_map(|(at, m)| Some((at, m.ok()?))).collect()
}

fn check_same_memory(one: &Snapshot, other: &Snapshot) -> Result<(), SnapshotError> {
    let (a, b) = (&one.manifest().memory, &other.manifest().memory);
    if (a.size, &a.regions) == (b.size, &b.regions) {
        return Ok(());
    }
    let reason = format!("their memories of {} and {} bytes lie differently", a.size, b.size);
    Err(SnapshotError::Unlike { one: one.path().into(), other: other.path().into(), reason })
}

/// The pages that differ between two chains, each without its first layers.
fn compare(
    (one, skip): (&Chain, usize),
    (other, passed): (&Chain, usize),
    watch: &dyn Watch,
) -> Result<Extents, SnapshotError> {
    let mut differ = Gathering::default();
    let (mut left, mut right) = (vec![0; PIECE], vec![0; PIECE]);
    let total = one.size().min(other.size());
    let mut at = 0;
    while let (Some(mine), Some(theirs)) = (one.place_below(skip, at), other.place_below(passed, at)) {
        let length = mine.length.min(theirs.length);
        if one.source(mine) == other.source(theirs) {
            at += length;
        } else {
            let count = length.min(PIECE as u64);
            let left = left.get_mut(..count as usize).unwrap_or_default();
            let right = right.get_mut(..count as usize).unwrap_or_default();
            one.read_below(skip, at, left)?;
            other.read_below(passed, at, right)?;
            let pages = left.chunks(PAGE as usize).zip(right.chunks(PAGE as usize));
            for (start, _) in (at..).step_by(PAGE as usize).zip(pages).filter(|(_, (a, b))| a != b) {
                differ.add(Run { start, end: start + PAGE });
            }
            at += count;
        }
        if watch.step(at, total) == ControlFlow::Break(()) {
            return Err(SnapshotError::Cancelled);
        }
    }
    Ok(differ.finish())
}
