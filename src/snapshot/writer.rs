//! Writing a snapshot: pages in any order, sections, drives, and then all at once.
//!
//! ```text
//!   begin ─► run / copy / zero (pages) ─► section, drive ─► finish ─► published
//!              │                                               │
//!              ├ zero pages are not written: holes             ├ hashes of chunks out of order
//!              └ hashed while they are at hand, in order       └ to the store, if one was asked for
//! ```
//!
//! Pages that come in rising order, as they do from a dirty bitmap or a memory file, are hashed
//! while they are in the cache. Those of a live snapshot come as the guest touches them; their
//! chunks are read back once, at the end.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    ops::ControlFlow,
    os::{fd::AsFd, unix::fs::FileExt},
    sync::Arc,
};

use devices::state::Section;
use serde_json::Value;

use super::{
    SnapshotError,
    digest::{Digest, Id},
    disk::{Disk, HostDisk, is_zero, next_data},
    draft::{Destination, Draft},
    error::doing,
    extents::{Extents, Gathering, Run},
    index::Index,
    limits::{CHUNK, CHUNK_RANGE, FORMAT, INDEX_MAX, MANIFEST_MAX, PAGE, STATE_MAX},
    manifest::{self, Capture, Drive, FileEntry, Json, Manifest, Memory, Parent, Region, State, StoreEntry},
    state,
    store::Store,
};

/// Names of the files that are written.
const MEMORY: &str = "memory";
const INDEX: &str = "memory.index";
const STATE: &str = "state";

/// Bytes that are copied at a time.
pub(crate) const PIECE: usize = 1 << 20;

/// Who is told how far the work has come, and may stop it.
pub trait Watch: Sync {
    /// `done` of about `total` bytes are through. [`ControlFlow::Break`] stops the work.
    fn step(&self, done: u64, total: u64) -> ControlFlow<()>;
}

/// Nobody watches.
impl Watch for () {
    fn step(&self, _: u64, _: u64) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// What a snapshot is of.
#[derive(Debug, Clone, Default)]
pub struct Subject {
    /// Version of nacelle that asks for it.
    pub nacelle: String,
    /// Now, in milliseconds since 1970.
    pub created: u64,
    /// The machine's specification.
    pub machine: Json,
    /// What the machine needs of the CPU.
    pub cpu: Json,
    /// What whoever asks for it wants to find in the manifest again; null for nothing.
    pub note: Value,
    /// Where guest memory lies in the memory file.
    pub regions: Vec<Region>,
    /// What a diff is a diff of.
    pub parent: Option<Parent>,
}

/// How it is written.
#[derive(Clone)]
pub struct Manner<'a> {
    /// Each chunk gets a hash. Without, a snapshot is written faster and cannot be verified.
    pub hash: bool,
    /// Bytes of a chunk; a power of two.
    pub chunk_size: u64,
    /// A store keeps pages as LZ4 blocks where that is shorter.
    pub compress: bool,
    /// Pages go to this store, and the hint stands in the manifest.
    pub store: Option<(&'a Store, String)>,
    /// How many bytes will come, for the watcher; 0 if unknown.
    pub expected: u64,
    /// Who watches.
    pub watch: &'a dyn Watch,
    /// What it is written with.
    pub disk: Arc<dyn Disk>,
}

impl Default for Manner<'_> {
    fn default() -> Self {
        let disk = Arc::new(HostDisk);
        Manner { hash: true, chunk_size: CHUNK, compress: true, store: None, expected: 0, watch: &(), disk }
    }
}

/// A snapshot that is being written. Dropped before [`Writer::finish`], nothing is left of it.
pub struct Writer<'a> {
    draft: Draft,
    subject: Subject,
    manner: Manner<'a>,
    id: Id,
    size: u64,
    memory: File,
    present: Gathering,
    hashing: Hashing,
    sections: Vec<Section>,
    drives: Vec<Drive>,
    done: u64,
}

/// What `finish` made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Identity of the snapshot.
    pub id: Id,
    /// Digest of its memory index, for the parent field of a later diff.
    pub index: Digest,
    /// Bytes of present pages.
    pub bytes: u64,
}

impl<'a> Writer<'a> {
    /// Begins a snapshot of `subject`. `id` is its identity; a new one if there is none.
    pub fn begin(
        destination: Destination,
        subject: Subject,
        manner: Manner<'a>,
        id: Option<Id>,
    ) -> Result<Writer<'a>, SnapshotError> {
        let end = |r: &Region| r.offset.saturating_add(r.size);
        let size = subject.regions.iter().map(end).max().unwrap_or(0);
        manifest::check_regions(&subject.regions, size)
            .map_err(|why| SnapshotError::Request(capital(&why)))?;
        if !manner.chunk_size.is_power_of_two() || !CHUNK_RANGE.contains(&manner.chunk_size) {
            let text = format!("Chunks of {} bytes are not possible; take a power of two", manner.chunk_size);
            return Err(SnapshotError::Request(text));
        }
        if manner.store.is_some() && !manner.hash {
            let text = "A snapshot in a store needs hashes; leave them on";
            return Err(SnapshotError::Request(text.to_owned()));
        }
        let draft = Draft::begin(Arc::clone(&manner.disk), destination)?;
        let id = id.map_or_else(Id::random, Ok);
        let id = doing(id, || "Random numbers cannot be read".to_owned())?;
        let memory = draft.create(MEMORY)?;
        let cannot = || format!("Memory of snapshot {} cannot be written", draft.path().display());
        doing(manner.disk.set_size(&memory, size), cannot)?;
        let hashing = Hashing { on: manner.hash, chunk_size: manner.chunk_size, ..Hashing::default() };
        let (sections, drives, present) = Default::default();
        Ok(Writer { draft, subject, manner, id, size, memory, present, hashing, sections, drives, done: 0 })
    }

    /// Identity that the snapshot will have.
    pub fn id(&self) -> Id {
        self.id
    }

    /// Takes pages that lie at `offset` of the memory file. Zero pages become holes. Pages may
    /// come in any order; the last that came counts.
    pub fn run(&mut self, offset: u64, bytes: &[u8]) -> Result<(), SnapshotError> {
        self.check(offset, bytes.len() as u64)?;
        let mut at = offset;
        for piece in bytes.chunks(PIECE) {
            self.piece(at, piece)?;
            at += piece.len() as u64;
            self.step(piece.len() as u64)?;
        }
        Ok(())
    }

    /// Takes `length` bytes at `from` of a file (a memfd, or another memory file) as the pages
    /// at `offset`. Holes of the file are not read: in a diff they are zero pages.
    pub fn copy(&mut self, file: &File, from: u64, offset: u64, length: u64) -> Result<(), SnapshotError> {
        self.check(offset, length)?;
        let cannot = || "Guest memory cannot be read".to_owned();
        let end = from.checked_add(length);
        let end = end.ok_or_else(|| SnapshotError::Request("The source of pages is too long".to_owned()))?;
        let mut buffer = vec![0; PIECE.min(length as usize)];
        let mut at = from;
        while at < end {
            let data = doing(next_data(file, at, end), cannot)?;
            // File systems report data in blocks that may be smaller than our pages.
            let start = data.map_or(end, |(start, _)| from + (start - from) / PAGE * PAGE);
            self.zero(offset + (at - from), start - at)?;
            at = start;
            let stop = data.map_or(end, |(_, stop)| (from + (stop - from).next_multiple_of(PAGE)).min(end));
            while at < stop {
                let count = (stop - at).min(PIECE as u64);
                let piece = buffer.get_mut(..count as usize).unwrap_or_default();
                doing(file.read_exact_at(piece, at), cannot)?;
                self.piece(offset + (at - from), piece)?;
                self.step(count)?;
                at += count;
            }
        }
        Ok(())
    }

    /// Takes pages at `offset` that are all zero.
    pub fn zero(&mut self, offset: u64, length: u64) -> Result<(), SnapshotError> {
        self.check(offset, length)?;
        let window = Run { start: offset, end: offset + length };
        let is_diff = self.subject.parent.is_some();
        if !is_diff && !self.present.touches(window) {
            return self.step(length);
        }
        let zeros = vec![0; PIECE.min(length as usize)];
        let mut at = offset;
        while at < window.end {
            let count = (window.end - at).min(PIECE as u64);
            self.piece(at, zeros.get(..count as usize).unwrap_or_default())?;
            at += count;
        }
        self.step(length)
    }

    /// Adds a section of state.
    pub fn section(&mut self, section: Section) {
        self.sections.push(section);
    }

    /// Takes a drive along: `file` is copied, by sharing blocks where `capture` says so, unless
    /// it is shared.
    pub fn drive(
        &mut self,
        id: &str,
        source: &str,
        capture: Capture,
        file: &File,
    ) -> Result<(), SnapshotError> {
        let cannot = || format!("Drive {id} cannot be copied into the snapshot");
        let size = doing(file.metadata(), cannot)?.len();
        let mut drive = Drive { id: id.into(), source: source.into(), capture, size, file: None };
        if capture != Capture::Share {
            let name = format!("drive-{}", self.drives.len());
            let copy = self.draft.create(&name)?;
            match capture {
                Capture::Reflink => doing(rustix::fs::ioctl_ficlone(&copy, file), cannot)?,
                _ => self.copy_drive(file, &copy, size).map_err(|e| match e {
                    CopyEnd::Cancelled => SnapshotError::Cancelled,
                    CopyEnd::Io(source) => SnapshotError::Io { what: cannot(), source },
                })?,
            }
            doing(self.manner.disk.sync(&copy), cannot)?;
            drive.file = Some(name);
        }
        self.drives.push(drive);
        Ok(())
    }

    /// Mentions a drive that was not taken along.
    pub fn share(&mut self, drive: Drive) {
        self.drives.push(drive);
    }

    fn copy_drive(&mut self, from: &File, to: &File, size: u64) -> Result<(), CopyEnd> {
        let disk = Arc::clone(&self.manner.disk);
        disk.set_size(to, size)?;
        let mut buffer = vec![0; PIECE];
        let mut at = 0;
        while let Some((start, end)) = next_data(from, at, size)? {
            at = start;
            while at < end {
                let count = (end - at).min(PIECE as u64);
                let piece = buffer.get_mut(..count as usize).unwrap_or_default();
                from.read_exact_at(piece, at)?;
                disk.write_at(to, piece, at)?;
                at += count;
                self.step(count).map_err(|_| CopyEnd::Cancelled)?;
            }
        }
        Ok(())
    }

    /// Writes the rest, brings all of it to the disk, and publishes it. An error leaves nothing.
    pub fn finish(mut self) -> Result<Written, SnapshotError> {
        let path = self.draft.path().to_owned();
        let cannot = || format!("Memory of snapshot {} cannot be written", path.display());
        let extents = std::mem::take(&mut self.present).finish();
        let hashes = std::mem::take(&mut self.hashing);
        let hashes = doing(hashes.finish(&extents, &self.memory), cannot)?;
        let index = Index { size: self.size, chunk_size: self.manner.chunk_size, extents, hashes };
        let (bytes, reference) = (index.extents.bytes(), self.keep_pages(&index)?);
        let (index, state) = (index.encode(), self.encode_state()?);
        if index.len() as u64 > INDEX_MAX || state.len() as u64 > STATE_MAX {
            let text = "The snapshot has more extents or state than its format holds; nothing was written";
            return Err(SnapshotError::Request(text.to_owned()));
        }
        let manifest = self.manifest(&index, &state);
        manifest.check().map_err(|why| SnapshotError::Request(capital(&why)))?;
        let encoded = manifest.encode();
        if encoded.len() as u64 > MANIFEST_MAX {
            let text = format!("The machine's specification is larger than {MANIFEST_MAX} bytes");
            return Err(SnapshotError::Request(text));
        }
        self.draft.write(INDEX, &index)?;
        self.draft.write(STATE, &state)?;
        self.draft.write(manifest::FILE, &encoded)?;
        let written = Written { id: self.id, index: manifest.memory.index.digest, bytes };
        self.draft.publish()?;
        if let Some(reference) = reference {
            reference.keep();
        }
        Ok(written)
    }

    /// Brings the pages to the disk: as the memory file, or in the store.
    fn keep_pages(&self, index: &Index) -> Result<Option<super::store::Reference<'a>>, SnapshotError> {
        let cannot = || format!("Memory of snapshot {} cannot be written", self.draft.path().display());
        let Some((store, _)) = &self.manner.store else {
            doing(self.manner.disk.sync(&self.memory), cannot)?;
            return Ok(None);
        };
        let reference = store.put(&self.manner, self.id, index, &self.memory)?;
        let removed = rustix::fs::unlinkat(self.draft.directory(), MEMORY, rustix::fs::AtFlags::empty());
        doing(removed, cannot)?;
        Ok(Some(reference))
    }

    fn encode_state(&self) -> Result<Vec<u8>, SnapshotError> {
        let wrong = |why: String| SnapshotError::Request(format!("The state cannot be written: {why}"));
        state::encode(&self.sections).map_err(wrong)
    }

    fn manifest(&self, index: &[u8], state: &[u8]) -> Manifest {
        let Subject { nacelle, created, machine, cpu, note, regions, parent } = self.subject.clone();
        let entry = |name: &str, bytes: &[u8]| FileEntry {
            name: name.to_owned(),
            size: bytes.len() as u64,
            digest: Digest::of(bytes),
        };
        let store = self.manner.store.as_ref().map(|(_, hint)| StoreEntry { hint: hint.clone() });
        let memory = Memory {
            size: self.size,
            page_size: PAGE,
            chunk_size: self.manner.chunk_size,
            regions,
            hashed: self.manner.hash,
            index: entry(INDEX, index),
            file: store.is_none().then(|| MEMORY.to_owned()),
            store,
        };
        let state = State { file: entry(STATE, state), sections: state::entries(&self.sections) };
        let drives = self.drives.clone();
        let (format, id, needs) = (FORMAT, self.id, Vec::new());
        let mut manifest = Manifest {
            format,
            needs,
            id,
            parent,
            nacelle,
            created,
            machine,
            cpu,
            note,
            memory,
            state,
            drives,
        };
        manifest.needs = manifest.needed();
        manifest
    }

    fn check(&self, offset: u64, length: u64) -> Result<(), SnapshotError> {
        let inside = offset.checked_add(length).is_some_and(|end| end <= self.size);
        if inside && offset.is_multiple_of(PAGE) && length.is_multiple_of(PAGE) {
            return Ok(());
        }
        let size = self.size;
        let text = format!("{length} bytes at {offset} are not whole pages of a memory of {size} bytes");
        Err(SnapshotError::Request(text))
    }

    /// Takes at most [`PIECE`] bytes of pages.
    fn piece(&mut self, offset: u64, bytes: &[u8]) -> Result<(), SnapshotError> {
        let is_diff = self.subject.parent.is_some();
        let window = Run { start: offset, end: offset + bytes.len() as u64 };
        // What was written once is written again, be it with zeros.
        let again = self.present.touches(window);
        let mut at = 0;
        while let Some(rest) = bytes.get(at..).filter(|r| !r.is_empty()) {
            let mut pages = rest.chunks(PAGE as usize);
            let zero = !again && pages.next().is_some_and(is_zero);
            let more = pages.take_while(|page| (!again && is_zero(page)) == zero).count();
            let length = ((1 + more) * PAGE as usize).min(rest.len());
            let (start, same) = (offset + at as u64, rest.get(..length).unwrap_or_default());
            if !zero {
                let cannot =
                    || format!("Memory of snapshot {} cannot be written", self.draft.path().display());
                doing(self.manner.disk.write_at(&self.memory, same, start), cannot)?;
            }
            if !zero || is_diff {
                self.hashing.feed(start, same);
                self.present.add(Run { start, end: start + length as u64 });
            }
            at += length;
        }
        Ok(())
    }

    fn step(&mut self, count: u64) -> Result<(), SnapshotError> {
        self.done = self.done.saturating_add(count);
        let total = self.manner.expected.max(self.done);
        match self.manner.watch.step(self.done, total) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(SnapshotError::Cancelled),
        }
    }
}

enum CopyEnd {
    Cancelled,
    Io(std::io::Error),
}

impl From<std::io::Error> for CopyEnd {
    fn from(error: std::io::Error) -> Self {
        CopyEnd::Io(error)
    }
}

/// The hashes of chunks, as far as pages came in order.
#[derive(Default)]
struct Hashing {
    on: bool,
    chunk_size: u64,
    /// The chunk that pages are coming for, where the next may begin, and its hash so far.
    current: Option<(u64, u64, blake3::Hasher)>,
    done: BTreeMap<u64, Digest>,
    /// Chunks that have to be read back.
    stale: BTreeSet<u64>,
}

impl Hashing {
    fn feed(&mut self, mut offset: u64, mut bytes: &[u8]) {
        while self.on && !bytes.is_empty() {
            let chunk = offset / self.chunk_size;
            let left = (chunk + 1) * self.chunk_size - offset;
            let (head, rest) = bytes.split_at(bytes.len().min(left as usize));
            let end = offset + head.len() as u64;
            match &mut self.current {
                Some((current, next, hasher)) if *current == chunk && offset >= *next => {
                    hasher.update(head);
                    *next = end;
                }
                Some((current, ..)) if *current == chunk => {
                    self.stale.insert(chunk);
                    self.current = None;
                }
                _ => {
                    self.close();
                    if self.done.contains_key(&chunk) {
                        self.stale.insert(chunk);
                    } else if !self.stale.contains(&chunk) {
                        let mut hasher = blake3::Hasher::new();
                        hasher.update(head);
                        self.current = Some((chunk, end, hasher));
                    }
                }
            }
            (offset, bytes) = (end, rest);
        }
    }

    fn close(&mut self) {
        if let Some((chunk, _, hasher)) = self.current.take() {
            self.done.insert(chunk, Digest(*hasher.finalize().as_bytes()));
        }
    }

    fn finish(mut self, extents: &Extents, memory: &File) -> std::io::Result<Vec<Digest>> {
        self.close();
        let mut buffer = vec![0; if self.stale.is_empty() { 0 } else { PIECE }];
        for chunk in &self.stale {
            let start = chunk * self.chunk_size;
            let mut hasher = blake3::Hasher::new();
            for run in extents.inside(Run { start, end: start + self.chunk_size }) {
                hash_run(memory, run, &mut buffer, &mut hasher)?;
            }
            self.done.insert(*chunk, Digest(*hasher.finalize().as_bytes()));
        }
        Ok(self.done.into_values().collect())
    }
}

/// Hashes a run of a memory file, through a buffer.
pub(crate) fn hash_run(
    file: &File,
    run: Run,
    buffer: &mut [u8],
    hasher: &mut blake3::Hasher,
) -> std::io::Result<()> {
    let mut at = run.start;
    while at < run.end {
        let count = (run.end - at).min(buffer.len() as u64);
        let piece = buffer.get_mut(..count as usize).unwrap_or_default();
        file.read_exact_at(piece, at)?;
        hasher.update(piece);
        at += count;
    }
    Ok(())
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

/// Links a file of another snapshot into a draft, or copies it where links do not go.
pub(crate) fn take_file(disk: &dyn Disk, from: &File, draft: &Draft, name: &str) -> std::io::Result<()> {
    if disk.link(from.as_fd(), draft.directory().as_fd(), name).is_ok() {
        return Ok(());
    }
    let source = super::disk::open_file(from, name)?;
    let size = source.metadata()?.len();
    let copy = disk.create(draft.directory().as_fd(), name)?;
    disk.set_size(&copy, size)?;
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    while let Some((start, end)) = next_data(&source, at, size)? {
        at = start;
        while at < end {
            let count = (end - at).min(PIECE as u64);
            let piece = buffer.get_mut(..count as usize).unwrap_or_default();
            source.read_exact_at(piece, at)?;
            disk.write_at(&copy, piece, at)?;
            at += count;
        }
    }
    disk.sync(&copy)
}
