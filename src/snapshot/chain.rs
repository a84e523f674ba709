//! A diff over a diff over a full snapshot, read as one memory.
//!
//! ```text
//!   layer 0  (the diff asked for)   ..AA......A...     the first layer from the top that has
//!   layer 1  (its parent)           .BBB.....BB...     a page is where the page comes from;
//!   layer 2  (full)                 CC..CCCC......     a page that none has is zero
//! ```
//!
//! Nothing is flattened when a chain is opened: a lookup halves its way through each layer's
//! extents, so opening costs what the layers' indexes cost and a page some microseconds even
//! under fifty layers.

use std::path::{Path, PathBuf};

use super::{
    SnapshotError,
    digest::Id,
    extents::{Found, Run},
    limits::{CHAIN_MAX, PAGE},
    manifest::Parent,
    reader::{Search, Snapshot, follow_hint, inspect, list},
    writer::PIECE,
};

/// Where pages come from, and for how many bytes that holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The layer, 0 being the top; nothing for zero pages.
    pub layer: Option<usize>,
    /// Offset in the guest's memory, which is that in the layer's memory file.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

/// A snapshot with all that it lies on.
#[derive(Debug)]
pub struct Chain {
    layers: Vec<Snapshot>,
}

impl Chain {
    /// Opens the snapshot at `path` and its parents down to a full one.
    pub fn open(path: &Path, search: &Search) -> Result<Chain, SnapshotError> {
        let mut layers = vec![Snapshot::open(path, search)?];
        while let Some(top) = layers.last()
            && let Some(parent) = &top.manifest().parent
        {
            let missing = |reason: &str| SnapshotError::Missing {
                path: top.path().into(),
                needed: format!("its parent {}", parent.id),
                reason: reason.to_owned(),
            };
            if layers.len() >= CHAIN_MAX {
                return Err(missing(&format!("would make the chain longer than {CHAIN_MAX}")));
            }
            if layers.iter().any(|l| l.manifest().id == parent.id) {
                return Err(missing("lies on this snapshot in turn: the chain is a ring"));
            }
            let at = find_parent(top.path(), parent, search)
                .ok_or_else(|| missing("is not where the hint points; name the directory it lies in"))?;
            let below = Snapshot::open(&at, search)?;
            // Another one may have been put there since it was found.
            let (id, index) = (below.manifest().id, below.manifest().memory.index.digest);
            if (id, index) != (parent.id, parent.index) {
                return Err(missing("was found with other pages than this diff was taken on"));
            }
            check_alike(top, &below)?;
            layers.push(below);
        }
        Ok(Chain { layers })
    }

    /// The layers, the diff first and the full snapshot last.
    pub fn layers(&self) -> &[Snapshot] {
        &self.layers
    }

    /// The snapshot that was asked for.
    pub fn top(&self) -> &Snapshot {
        // `open` never makes a chain of none.
        &self.layers[0]
    }

    /// Bytes of guest memory.
    pub fn size(&self) -> u64 {
        self.top().manifest().memory.size
    }

    /// Where the page at `offset` comes from. Nothing beyond the end of memory.
    pub fn place(&self, offset: u64) -> Option<Place> {
        self.place_below(0, offset)
    }

    /// The same as if the first `skip` layers were not there.
    pub(crate) fn place_below(&self, skip: usize, offset: u64) -> Option<Place> {
        let mut limit = self.size();
        if offset >= limit {
            return None;
        }
        for (number, layer) in self.layers.iter().enumerate().skip(skip) {
            match layer.extents().find(offset) {
                Found::Until(end) => {
                    let length = end.min(limit) - offset;
                    return Some(Place { layer: Some(number), offset, length });
                }
                Found::AbsentUntil(next) => limit = limit.min(next),
            }
        }
        Some(Place { layer: None, offset, length: limit - offset })
    }

    /// All of memory as runs of one layer each, in order. What no layer has is the full
    /// snapshot's, whose file has holes there; beyond the end of that it is in no run.
    pub fn flatten(&self) -> Vec<(Run, usize)> {
        let full = self.layers.len().saturating_sub(1);
        let end = self.layers.last().map_or(0, |l| l.manifest().memory.size);
        let mut runs: Vec<(Run, usize)> = Vec::new();
        let mut at = 0;
        while let Some(place) = self.place(at) {
            let mut next = at + place.length;
            let layer = place.layer.unwrap_or(full);
            if place.layer.is_none() {
                if at >= end {
                    at = next;
                    continue;
                }
                next = next.min(end);
            }
            match runs.last_mut() {
                Some((run, of)) if *of == layer && run.end == at => run.end = next,
                _ => runs.push((Run { start: at, end: next }, layer)),
            }
            at = next;
        }
        runs
    }

    /// Fills `buffer` with memory from `offset` on.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), SnapshotError> {
        self.read_below(0, offset, buffer)
    }

    /// The same, of bytes whose hashes were checked where there are hashes.
    pub fn read_checked(&self, offset: u64, buffer: &mut [u8]) -> Result<(), SnapshotError> {
        self.gather(0, offset, buffer, Snapshot::read_checked)
    }

    /// Hands on to `write` those pages of `bytes`, which are memory from `offset` on, that are not
    /// the same here.
    pub fn differing(
        &self,
        offset: u64,
        bytes: &[u8],
        mut write: impl FnMut(u64, &[u8]) -> Result<(), SnapshotError>,
    ) -> Result<(), SnapshotError> {
        let mut held = vec![0; PIECE.min(bytes.len())];
        let mut at = offset;
        for mut piece in bytes.chunks(PIECE) {
            if at.checked_add(piece.len() as u64).is_none_or(|end| end > self.size()) {
                write(at, piece)?;
                at = at.saturating_add(piece.len() as u64);
                continue;
            }
            held.truncate(piece.len());
            self.read(at, &mut held)?;
            let pages = piece.chunks(PAGE as usize).zip(held.chunks(PAGE as usize));
            let differs: Vec<bool> = pages.map(|(now, before)| now != before).collect();
            for run in differs.chunk_by(bool::eq) {
                let (pages, rest) = piece.split_at((run.len() * PAGE as usize).min(piece.len()));
                if run.contains(&true) {
                    write(at, pages)?;
                }
                (piece, at) = (rest, at + pages.len() as u64);
            }
        }
        Ok(())
    }

    pub(crate) fn read_below(
        &self,
        skip: usize,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), SnapshotError> {
        self.gather(skip, offset, buffer, Snapshot::read)
    }

    fn gather(
        &self,
        skip: usize,
        mut offset: u64,
        mut buffer: &mut [u8],
        read: fn(&Snapshot, u64, &mut [u8]) -> Result<(), SnapshotError>,
    ) -> Result<(), SnapshotError> {
        while !buffer.is_empty() {
            let beyond = || SnapshotError::Request(format!("Memory has no byte {offset}"));
            let place = self.place_below(skip, offset).ok_or_else(beyond)?;
            let count = place.length.min(buffer.len() as u64);
            let (head, rest) = buffer.split_at_mut(count as usize);
            match place.layer.and_then(|n| self.layers.get(n)) {
                Some(layer) => read(layer, offset, head)?,
                None => head.fill(0),
            }
            (buffer, offset) = (rest, offset + count);
        }
        Ok(())
    }

    /// Identity of the layer that a place is in.
    pub(crate) fn source(&self, place: Place) -> Option<Id> {
        Some(self.layers.get(place.layer?)?.manifest().id)
    }
}

/// What a later diff has to say of `parent` when it is to appear at `child`. The hint only
/// leads there if the parent lies beside the child or below that directory.
pub fn parent_of(child: &Path, parent: &Snapshot) -> Parent {
    let hint = hint_from(child, parent.path());
    Parent { id: parent.manifest().id, index: parent.manifest().memory.index.digest, hint }
}

/// The hint with which a snapshot that is to appear at `child` finds the directory `other`.
pub fn hint_from(child: &Path, other: &Path) -> String {
    let around = child.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let lies = std::fs::canonicalize(other).unwrap_or_else(|_| other.into());
    let around = std::fs::canonicalize(around).unwrap_or_else(|_| around.into());
    let below = lies.strip_prefix(&around).ok().and_then(Path::to_str);
    let name = lies.file_name().and_then(|n| n.to_str()).unwrap_or("parent");
    below.filter(|b| !b.is_empty()).unwrap_or(name).to_owned()
}

/// Looks where the hint points, then where the caller says, then beside.
fn find_parent(path: &Path, parent: &Parent, search: &Search) -> Option<PathBuf> {
    let is_it = |m: &super::manifest::Manifest| m.id == parent.id && m.memory.index.digest == parent.index;
    let hinted = follow_hint(path, &parent.hint).ok().map(|(_, at)| at);
    if let Some(at) = hinted.filter(|at| inspect(at).is_ok_and(|m| is_it(&m))) {
        return Some(at);
    }
    let around = std::fs::canonicalize(path).ok().and_then(|p| Some(p.parent()?.to_owned()));
    search.parents.iter().chain(&around).find_map(|directory| {
        let found = list(directory).ok()?;
        found.into_iter().find(|(_, m)| m.as_ref().is_ok_and(is_it)).map(|(at, _)| at)
    })
}

/// A diff and its parent have the same memory; a later one may have more of it.
pub(crate) fn check_alike(top: &Snapshot, below: &Snapshot) -> Result<(), SnapshotError> {
    let (one, other) = (&top.manifest().memory, &below.manifest().memory);
    let same = |r: &super::manifest::Region| {
        one.regions.iter().any(|t| (t.guest_address, t.offset, t.size) == (r.guest_address, r.offset, r.size))
    };
    if other.size <= one.size && other.regions.iter().all(same) {
        return Ok(());
    }
    let reason = "a region of memory of the second is not in the first".to_owned();
    Err(SnapshotError::Unlike { one: top.path().into(), other: below.path().into(), reason })
}
