//! Reading one snapshot: open and check, verify, read pages, map a region.
//!
//! Opening reads the manifest, the index and the size of the memory file; what it costs does
//! not grow with memory but with what was touched. All files are opened once, by plain names
//! in one open directory, never through a link, and stay open: renaming or replacing the
//! directory does not change what a reader sees.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    ops::ControlFlow,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    ptr::NonNull,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use devices::state::Section;
use rustix::fs::{self, Mode, OFlags, ResolveFlags};

use super::{
    SnapshotError,
    digest::Digest,
    disk::{is_zero, next_data, open_directory, open_file, read_whole},
    error::doing,
    extents::{Extents, Found, Run},
    index::Index,
    limits::{INDEX_MAX, MANIFEST_MAX, PAGE, STATE_MAX},
    manifest::{self, FileEntry, Manifest},
    state,
    store::Store,
    writer::{PIECE, Watch, hash_run},
};

/// Where to look for what a snapshot needs, beside where its hints point.
#[derive(Debug, Clone, Default)]
pub struct Search {
    /// Parents, or directories that they lie in.
    pub parents: Vec<PathBuf>,
    /// Stores.
    pub stores: Vec<PathBuf>,
}

/// A snapshot that is open for reading.
#[derive(Debug)]
pub struct Snapshot {
    path: PathBuf,
    directory: File,
    manifest: Manifest,
    index: Index,
    pages: Pages,
    /// Numbers of the chunks that have hashes, in the order of the hashes.
    hashed: OnceLock<Vec<u64>>,
    recent: Mutex<Recent>,
}

/// Where its pages are.
#[derive(Debug)]
enum Pages {
    File(File),
    Store(Store),
}

/// What was unpacked lately. Memory of this size is the kernel's as soon as it is freed, and costs
/// hundreds of page faults to have again; so it is kept for the next chunk.
#[derive(Debug, Default)]
struct Recent {
    /// The latest first.
    chunks: VecDeque<(u64, Arc<Vec<u8>>)>,
    /// Room for a chunk as it lies in its store.
    packed: Vec<u8>,
}

/// Chunks that are kept: two guest threads that each walk through memory are served without
/// unpacking a chunk twice.
const RECENT: usize = 2;

/// What verifying found to be right.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Verified {
    /// Sections of state.
    pub sections: usize,
    /// Chunks whose hashes were computed; 0 for a quick look and for a snapshot without hashes.
    pub chunks: u64,
    /// Bytes of them.
    pub bytes: u64,
}

impl Snapshot {
    /// Opens and checks the snapshot at `path`.
    pub fn open(path: &Path, search: &Search) -> Result<Snapshot, SnapshotError> {
        let directory =
            doing(open_directory(path), || format!("Snapshot {} cannot be opened", path.display()))?;
        let manifest = read_manifest(&directory, path)?;
        let memory = &manifest.memory;
        let damaged = |reason| damaged(path, &memory.index.name, reason);
        let bytes = read_entry(&directory, path, &memory.index, INDEX_MAX)?;
        let index = Index::decode(&bytes, memory.size, memory.chunk_size, memory.hashed).map_err(damaged)?;
        let pages = match (&memory.file, &memory.store) {
            (Some(name), _) => Pages::File(open_memory(&directory, path, name, memory.size)?),
            (None, Some(store)) => Pages::Store(find_store(path, &store.hint, search)?),
            (None, None) => return Err(damaged("it has no pages".to_owned())),
        };
        Ok(Snapshot {
            path: path.into(),
            directory,
            manifest,
            index,
            pages,
            hashed: OnceLock::new(),
            recent: Mutex::default(),
        })
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it is.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Which pages it has.
    pub fn extents(&self) -> &Extents {
        &self.index.extents
    }

    /// Its directory.
    pub(crate) fn directory(&self) -> &File {
        &self.directory
    }

    /// The memory file, to map: byte `region.offset` is the first of a region. Nothing when
    /// pages are in a store.
    pub fn memory_file(&self) -> Option<&File> {
        match &self.pages {
            Pages::File(file) => Some(file),
            Pages::Store(_) => None,
        }
    }

    /// The store its pages are in, if they are.
    pub fn store(&self) -> Option<&Store> {
        match &self.pages {
            Pages::File(_) => None,
            Pages::Store(store) => Some(store),
        }
    }

    /// The copy of a drive that was taken along, for reading.
    pub fn drive(&self, id: &str) -> Result<Option<File>, SnapshotError> {
        let drive = self.manifest.drives.iter().find(|d| d.id == id);
        let Some((drive, name)) = drive.and_then(|d| Some((d, d.file.as_ref()?))) else { return Ok(None) };
        let file = doing(open_file(&self.directory, name), || {
            format!("Drive {id} of snapshot {} cannot be opened", self.path.display())
        })?;
        let size = file.metadata().map_or(0, |m| m.len());
        if size != drive.size {
            let reason = format!("it has {size} bytes; {} belong there", drive.size);
            return Err(damaged(&self.path, name, reason));
        }
        Ok(Some(file))
    }

    /// The machine's state.
    pub fn sections(&self) -> Result<Vec<Section>, SnapshotError> {
        let entry = &self.manifest.state;
        let damaged = |reason| damaged(&self.path, &entry.file.name, reason);
        let bytes = read_entry(&self.directory, &self.path, &entry.file, STATE_MAX)?;
        state::decode_listed(&bytes, &entry.sections).map_err(damaged)
    }

    /// Fills `buffer` with the pages at `offset`, which must be present ones of this snapshot.
    /// Those of a memory file are as they lie there.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), SnapshotError> {
        match &self.pages {
            Pages::File(file) => {
                self.check_present(offset, buffer.len())?;
                doing(file.read_exact_at(buffer, offset), || self.cannot_read())
            }
            Pages::Store(_) => self.read_checked(offset, buffer),
        }
    }

    /// The same, but a chunk that has a hash is read whole and must have that hash.
    pub fn read_checked(&self, offset: u64, buffer: &mut [u8]) -> Result<(), SnapshotError> {
        if !self.manifest.memory.hashed {
            return self.read(offset, buffer);
        }
        self.check_present(offset, buffer.len())?;
        self.read_chunks(offset, buffer)
    }

    fn check_present(&self, offset: u64, length: usize) -> Result<(), SnapshotError> {
        let end = offset.saturating_add(length as u64);
        if matches!(self.index.extents.find(offset), Found::Until(until) if until >= end) {
            return Ok(());
        }
        let text = format!("Pages at {offset} are not in snapshot {}", self.path.display());
        Err(SnapshotError::Request(text))
    }

    fn read_chunks(&self, mut offset: u64, mut buffer: &mut [u8]) -> Result<(), SnapshotError> {
        while !buffer.is_empty() {
            let number = offset / self.index.chunk_size;
            let window = self.index.window(number);
            let chunk = self.chunk(number)?;
            let before = Run { start: window.start, end: offset };
            let at: u64 = self.index.extents.inside(before).map(Run::len).sum();
            let count = buffer.len().min((window.end - offset) as usize);
            let (head, rest) = buffer.split_at_mut(count);
            let from = chunk.get(at as usize..).and_then(|c| c.get(..count));
            head.copy_from_slice(from.ok_or_else(|| self.no_chunk(number))?);
            (buffer, offset) = (rest, offset + count as u64);
        }
        Ok(())
    }

    /// The present pages of a chunk, checked against its hash.
    fn chunk(&self, number: u64) -> Result<Arc<Vec<u8>>, SnapshotError> {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let Recent { chunks, packed } = &mut *recent;
        if let Some((_, bytes)) = chunks.iter().find(|(at, _)| *at == number) {
            return Ok(Arc::clone(bytes));
        }
        let hashed = self.hashed.get_or_init(|| self.index.hashed_chunks().map(|(n, _)| n).collect());
        let at = hashed.binary_search(&number).map_err(|_| self.no_chunk(number))?;
        let digest = *self.index.hashes.get(at).ok_or_else(|| self.no_chunk(number))?;
        let runs: Vec<Run> = self.index.extents.inside(self.index.window(number)).collect();
        let length = runs.iter().map(|run| run.len()).sum::<u64>() as usize;
        let oldest = if chunks.len() < RECENT { None } else { chunks.pop_back() };
        let mut bytes = oldest.and_then(|(_, bytes)| Arc::try_unwrap(bytes).ok()).unwrap_or_default();
        match &self.pages {
            Pages::Store(store) => {
                doing(store.get_into(digest, length, &mut bytes, packed), || self.cannot_read())?;
            }
            Pages::File(file) => {
                bytes.resize(length, 0);
                let mut rest = bytes.as_mut_slice();
                for run in runs {
                    let (piece, after) = rest.split_at_mut(run.len() as usize);
                    doing(file.read_exact_at(piece, run.start), || self.cannot_read())?;
                    rest = after;
                }
                if Digest::of(&bytes) != digest {
                    return Err(self.no_chunk(number));
                }
            }
        }
        let bytes = Arc::new(bytes);
        chunks.push_front((number, Arc::clone(&bytes)));
        Ok(bytes)
    }

    /// Gives back the memory of chunks that were read lately.
    pub fn forget_chunks(&self) {
        *self.recent.lock().unwrap_or_else(PoisonError::into_inner) = Recent::default();
    }

    /// Checks the state, and with `full` every chunk and every hole.
    pub fn verify(&self, full: bool, watch: &dyn Watch) -> Result<Verified, SnapshotError> {
        let (sections, entry) = (self.sections()?, &self.manifest.state);
        let damaged = |reason| damaged(&self.path, &entry.file.name, reason);
        state::verify(&sections, &entry.sections).map_err(damaged)?;
        let mut verified = Verified { sections: sections.len(), ..Verified::default() };
        for drive in &self.manifest.drives {
            self.drive(&drive.id)?;
        }
        if !full {
            return Ok(verified);
        }
        let mut buffer = vec![0; PIECE];
        for (chunk, digest) in self.index.hashed_chunks() {
            let window = self.index.window(chunk);
            if let Pages::File(file) = &self.pages {
                let mut hasher = blake3::Hasher::new();
                for run in self.index.extents.inside(window) {
                    doing(hash_run(file, run, &mut buffer, &mut hasher), || self.cannot_read())?;
                }
                if Digest(*hasher.finalize().as_bytes()) != digest {
                    return Err(self.no_chunk(chunk));
                }
            } else {
                self.chunk(chunk)?;
            }
            verified.chunks += 1;
            verified.bytes += self.index.extents.inside(window).map(Run::len).sum::<u64>();
            if watch.step(verified.bytes, self.index.extents.bytes()) == ControlFlow::Break(()) {
                return Err(SnapshotError::Cancelled);
            }
        }
        if let Pages::File(file) = &self.pages {
            self.verify_holes(file, &mut buffer)?;
        }
        Ok(verified)
    }

    /// What is no present page must be zero: a full memory file is mapped as it is.
    fn verify_holes(&self, file: &File, buffer: &mut [u8]) -> Result<(), SnapshotError> {
        let cannot = || self.cannot_read();
        let mut at = 0;
        while at < self.index.size {
            let gap = match self.index.extents.find(at) {
                Found::Until(end) => {
                    at = end;
                    continue;
                }
                Found::AbsentUntil(end) => end.min(self.index.size),
            };
            let Some((start, end)) = doing(next_data(file, at, gap), cannot)? else {
                at = gap;
                continue;
            };
            let count = (end - start).min(buffer.len() as u64);
            let piece = buffer.get_mut(..count as usize).unwrap_or_default();
            doing(file.read_exact_at(piece, start), cannot)?;
            if !is_zero(piece) {
                let name = self.manifest.memory.file.as_deref().unwrap_or_default();
                let reason = format!("data at {start}, where no page belongs");
                return Err(damaged(&self.path, name, reason));
            }
            at = start + count;
        }
        Ok(())
    }

    /// Maps region number `region` of a full snapshot with a memory file, privately: the guest
    /// writes to copies of its own.
    pub fn map(&self, region: usize) -> Result<Mapping, SnapshotError> {
        let request = |why: &str| SnapshotError::Request(format!("Snapshot {} {why}", self.path.display()));
        let Pages::File(file) = &self.pages else {
            return Err(request("keeps its pages in a store, which cannot be mapped; use the pager"));
        };
        if self.manifest.parent.is_some() {
            return Err(request("is a diff, which cannot be mapped; use the pager or merge it first"));
        }
        let region = self.manifest.memory.regions.get(region).ok_or_else(|| request("has no such region"))?;
        let cannot = || format!("Memory of snapshot {} cannot be mapped", self.path.display());
        doing(Mapping::new(file, region.offset, region.size), cannot)
    }

    fn cannot_read(&self) -> String {
        format!("Memory of snapshot {} cannot be read", self.path.display())
    }

    fn no_chunk(&self, number: u64) -> SnapshotError {
        let name = self.manifest.memory.file.as_deref().unwrap_or("store");
        let at = self.index.window(number).start;
        damaged(&self.path, name, format!("the pages from {at} on do not have the hash that was recorded"))
    }
}

/// A private mapping of guest memory, gone when dropped.
#[derive(Debug)]
pub struct Mapping {
    address: NonNull<u8>,
    length: usize,
}

// SAFETY: the mapping is plain memory that belongs to this value; no thread is special to it.
unsafe impl Send for Mapping {}

impl Mapping {
    fn new(file: &File, offset: u64, length: u64) -> io::Result<Mapping> {
        let wrong = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let length = usize::try_from(length).map_err(wrong)?;
        let offset = libc::off_t::try_from(offset).map_err(wrong)?;
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_NORESERVE);
        // SAFETY: a new mapping where the kernel chooses touches no memory of ours; the file
        // descriptor is open for the length of the call.
        let address =
            unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, file.as_raw_fd(), offset) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let address = NonNull::new(address.cast()).ok_or_else(|| io::Error::from(io::ErrorKind::Other))?;
        Ok(Mapping { address, length })
    }

    /// Where it begins. It is the caller's care that nobody truncates the file meanwhile: an
    /// access beyond its end is `SIGBUS`.
    pub fn address(&self) -> NonNull<u8> {
        self.address
    }

    /// Bytes of it.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Gives the mapping away: it stays until its new owner unmaps it.
    pub fn into_raw(self) -> (NonNull<u8>, usize) {
        let raw = (self.address, self.length);
        std::mem::forget(self);
        raw
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this length and has no other owner.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.length) };
    }
}

/// Reads and checks the manifest of an open directory.
pub(crate) fn read_manifest(directory: &File, path: &Path) -> Result<Manifest, SnapshotError> {
    match read_whole(directory, manifest::FILE, MANIFEST_MAX) {
        Ok(bytes) => Manifest::decode(&bytes, path),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            Err(SnapshotError::NotASnapshot { path: path.into() })
        }
        Err(e) => doing(Err(e), || format!("Manifest of snapshot {} cannot be read", path.display())),
    }
}

/// Reads the manifest of the snapshot at `path`.
pub fn inspect(path: &Path) -> Result<Manifest, SnapshotError> {
    let directory = doing(open_directory(path), || format!("Snapshot {} cannot be opened", path.display()))?;
    read_manifest(&directory, path)
}

/// A snapshot of a list: where it is, and what its manifest says or why it cannot be read.
pub type Listed = (PathBuf, Result<Manifest, SnapshotError>);

/// The snapshots that lie in a directory, or the directory itself if it is one; each with what
/// its manifest says, or why it cannot be read.
pub fn list(directory: &Path) -> Result<Vec<Listed>, SnapshotError> {
    let cannot = || format!("Directory {} cannot be listed", directory.display());
    if directory.join(manifest::FILE).symlink_metadata().is_ok() {
        return Ok(vec![(directory.into(), inspect(directory))]);
    }
    let mut found = Vec::new();
    for entry in doing(std::fs::read_dir(directory), cannot)? {
        let entry = doing(entry, cannot)?;
        let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
        if !hidden && entry.path().join(manifest::FILE).symlink_metadata().is_ok() {
            let path = entry.path();
            found.push((path.clone(), inspect(&path)));
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}

/// Opens what a hint of the snapshot at `path` points to: below the directory the snapshot lies
/// in, and through no link.
pub(crate) fn follow_hint(path: &Path, hint: &str) -> io::Result<(File, PathBuf)> {
    let path = std::fs::canonicalize(path)?;
    let around = path.parent().unwrap_or(&path);
    let at = open_directory(around)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    Ok((fs::openat2(&at, hint, flags, Mode::empty(), resolve)?.into(), around.join(hint)))
}

fn find_store(path: &Path, hint: &str, search: &Search) -> Result<Store, SnapshotError> {
    if let Some(store) = search.stores.first() {
        return Store::open(store);
    }
    let missing = |e: io::Error| SnapshotError::Missing {
        path: path.into(),
        needed: format!("the store {hint}"),
        reason: format!("cannot be opened beside it ({e}); name the store if it lies elsewhere"),
    };
    follow_hint(path, hint).map(|(directory, path)| Store::at(directory, path)).map_err(missing)
}

fn open_memory(directory: &File, path: &Path, name: &str, size: u64) -> Result<File, SnapshotError> {
    let file = doing(open_file(directory, name), || {
        format!("Memory of snapshot {} cannot be opened", path.display())
    })?;
    let found =
        doing(file.metadata(), || format!("Memory of snapshot {} cannot be read", path.display()))?.len();
    if found != size || found % PAGE != 0 {
        return Err(damaged(path, name, format!("it has {found} bytes; {size} belong there")));
    }
    Ok(file)
}

fn read_entry(directory: &File, path: &Path, entry: &FileEntry, cap: u64) -> Result<Vec<u8>, SnapshotError> {
    let cannot = || format!("{} of snapshot {} cannot be read", entry.name, path.display());
    let bytes = doing(read_whole(directory, &entry.name, cap), cannot)?;
    if bytes.len() as u64 != entry.size {
        let reason = format!("it has {} bytes; {} belong there", bytes.len(), entry.size);
        return Err(damaged(path, &entry.name, reason));
    }
    if Digest::of(&bytes) != entry.digest {
        return Err(damaged(path, &entry.name, "its digest is not the one in the manifest".to_owned()));
    }
    Ok(bytes)
}

fn damaged(path: &Path, file: &str, reason: String) -> SnapshotError {
    SnapshotError::Damaged { path: path.into(), file: file.into(), reason }
}
