//! The store: chunks of many snapshots, each once, under the name of what it holds.
//!
//! ```text
//!   STORE/ab/cdef...     a chunk's present pages: one byte how (0 plain, 1 LZ4), then the bytes
//!   STORE/refs/<id>      the chunks that a snapshot needs: their digests, then one of all that
//!   STORE/lock           shared: somebody adds; alone: somebody collects
//! ```
//!
//! A chunk is needed while any file under `refs` names it, so counting needs no counters that a
//! crash could leave wrong, and snapshots may lie anywhere. The reference is written before the
//! chunks and the lock held until the snapshot is published: a collection never takes what is
//! being counted on. What a failed or killed writer added stays until the next collection.
//!
//! LZ4 because a pager decompresses while a guest waits: 2 MiB in about a millisecond, several
//! times faster than zstd, in safe Rust. A chunk that is there already is read and compared
//! before it is counted on; one that was damaged is written anew.

use std::{
    collections::BTreeSet,
    fs::File,
    io,
    ops::ControlFlow,
    os::{fd::AsFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::fs::{self, AtFlags, FlockOperation, Mode, OFlags};

use super::{
    SnapshotError,
    digest::{Digest, Id, LEN},
    disk::{Disk, open_directory, read_into, read_whole, write_whole},
    error::doing,
    index::Index,
    limits::{CHUNK_RANGE, INDEX_MAX},
    writer::Manner,
};

const REFS: &str = "refs";
const LOCK: &str = "lock";
const PLAIN: u8 = 0;
const LZ4: u8 = 1;

/// How long an addition waits for a collection to end.
const LOCK_PATIENCE: Duration = Duration::from_secs(60);

/// A directory of chunks.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    directory: File,
}

/// A snapshot's hold on its chunks. Dropped before [`Reference::keep`], the hold is gone.
pub(crate) struct Reference<'a> {
    store: &'a Store,
    id: Id,
    /// Whether to remove it when dropped.
    ours: bool,
    _lock: File,
}

/// What a collection did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Collected {
    /// Chunks that are needed.
    pub kept: u64,
    /// Chunks that were removed.
    pub removed: u64,
    /// Their bytes as they lay there.
    pub bytes: u64,
    /// References of snapshots that are gone, which were removed first.
    pub references: u64,
}

impl Store {
    /// Opens the store at `path`.
    pub fn open(path: &Path) -> Result<Store, SnapshotError> {
        let directory = open_directory(path);
        Ok(Store { path: path.into(), directory: doing(directory, || no_store(path))? })
    }

    /// Opens the store at `path`, which is made if there is none.
    pub fn make(path: &Path) -> Result<Store, SnapshotError> {
        doing(make_if_missing(fs::CWD, path), || format!("Store {} cannot be made", path.display()))?;
        Store::open(path)
    }

    /// Takes an open directory as the store.
    pub(crate) fn at(directory: File, path: PathBuf) -> Store {
        Store { path, directory }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Puts all chunks of a memory file into it, and a reference of snapshot `id` to them.
    pub(crate) fn put(
        &self,
        manner: &Manner<'_>,
        id: Id,
        index: &Index,
        memory: &File,
    ) -> Result<Reference<'_>, SnapshotError> {
        let cannot = || format!("Store {} cannot be written", self.path.display());
        let lock = self.lock(FlockOperation::NonBlockingLockShared, LOCK_PATIENCE)?;
        let mut reference = Reference { store: self, id, ours: false, _lock: lock };
        doing(self.refer(&*manner.disk, id, index, &mut reference.ours), cannot)?;
        let mut touched = BTreeSet::new();
        let total = index.extents.bytes();
        let mut done = 0;
        for (chunk, digest) in index.hashed_chunks() {
            let bytes = doing(pack(index, chunk, memory), cannot)?;
            if self.get(digest, bytes.len()).is_err() {
                doing(self.add(manner, digest, &bytes), cannot)?;
                touched.insert(shelf(digest));
            }
            done += bytes.len() as u64;
            if manner.watch.step(done, total) == ControlFlow::Break(()) {
                return Err(SnapshotError::Cancelled);
            }
        }
        for shelf in touched {
            let opened = self.open_shelf(&shelf);
            doing(opened.and_then(|d| manner.disk.sync(&d)), cannot)?;
        }
        doing(manner.disk.sync(&self.directory), cannot)?;
        Ok(reference)
    }

    /// The `length` bytes whose digest is `digest`. Whatever is wrong with the chunk is an error.
    pub fn get(&self, digest: Digest, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.get_into(digest, length, &mut bytes, &mut Vec::new()).map(|()| bytes)
    }

    /// The same into a buffer, with room for the chunk as it lies there; both are used again.
    pub(crate) fn get_into(
        &self,
        digest: Digest,
        length: usize,
        bytes: &mut Vec<u8>,
        packed: &mut Vec<u8>,
    ) -> io::Result<()> {
        let wrong = |why: String| io::Error::new(io::ErrorKind::InvalidData, format!("Chunk {digest} {why}"));
        if length as u64 > *CHUNK_RANGE.end() {
            return Err(wrong(format!("cannot have {length} bytes")));
        }
        let shelf = self.open_shelf(&shelf(digest))?;
        read_into(&shelf, &book(digest), length as u64 + 1, packed)?;
        match packed.split_first() {
            Some((&PLAIN, plain)) => {
                bytes.clear();
                bytes.extend_from_slice(plain);
            }
            Some((&LZ4, packed)) => {
                bytes.resize(length, 0);
                let got = lz4_flex::block::decompress_into(packed, bytes);
                bytes.truncate(got.map_err(|e| wrong(format!("does not decompress: {e}")))?);
            }
            _ => return Err(wrong("is packed in a way that is not known".to_owned())),
        }
        if bytes.len() != length || Digest::of(bytes) != digest {
            return Err(wrong("holds other bytes".to_owned()));
        }
        Ok(())
    }

    /// Gives up a snapshot's hold. Its chunks stay until [`Store::collect`].
    pub fn forget(&self, id: Id) -> Result<(), SnapshotError> {
        let cannot = || format!("Store {} cannot be written", self.path.display());
        let refs = doing(self.open_shelf(REFS), cannot)?;
        match fs::unlinkat(&refs, id.to_string(), AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => doing(refs.sync_all(), cannot),
            Err(e) => doing(Err(e), cannot),
        }
    }

    /// Removes what no snapshot needs. With `living`, references of any other snapshot are
    /// removed first.
    pub fn collect(&self, living: Option<&BTreeSet<Id>>) -> Result<Collected, SnapshotError> {
        let cannot = || format!("Store {} cannot be collected", self.path.display());
        let _lock = self.lock(FlockOperation::NonBlockingLockExclusive, Duration::ZERO)?;
        let mut collected = Collected::default();
        let needed = self.needed(living, &mut collected)?;
        for shelf in 0..=u8::MAX {
            let shelf = format!("{shelf:02x}");
            match self.open_shelf(&shelf) {
                Ok(directory) => doing(clear(&directory, &shelf, &needed, &mut collected), cannot)?,
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return doing(Err(e), cannot),
            }
        }
        Ok(collected)
    }

    /// All digests that references name. A reference that cannot be read stops a collection:
    /// nobody knows what it needs.
    fn needed(
        &self,
        living: Option<&BTreeSet<Id>>,
        collected: &mut Collected,
    ) -> Result<BTreeSet<Digest>, SnapshotError> {
        let cannot = |name: &str| format!("Reference {name} of store {} cannot be read", self.path.display());
        let mut needed = BTreeSet::new();
        let refs = match self.open_shelf(REFS) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(needed),
            refs => doing(refs, || cannot("list"))?,
        };
        for name in doing(names(&refs), || cannot("list"))? {
            let id = Id::parse(&name);
            if id.is_none() || id.is_some_and(|id| living.is_some_and(|l| !l.contains(&id))) {
                doing(fs::unlinkat(&refs, name.as_str(), AtFlags::empty()), || cannot(&name))?;
                collected.references += u64::from(id.is_some());
                continue;
            }
            let bytes = doing(read_whole(&refs, &name, INDEX_MAX), || cannot(&name))?;
            let body = unsealed(&bytes).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData));
            let body = doing(body, || cannot(&name))?;
            needed.extend(body.chunks_exact(LEN).filter_map(|d| d.try_into().ok()).map(Digest));
        }
        Ok(needed)
    }

    /// Writes the reference; `ours` becomes true if there was none before.
    fn refer(&self, disk: &dyn Disk, id: Id, index: &Index, ours: &mut bool) -> io::Result<()> {
        let mut bytes: Vec<u8> = index.hashes.iter().flat_map(|d| d.0).collect();
        bytes.extend(Digest::of(&bytes).0);
        make_if_missing(self.directory.as_fd(), Path::new(REFS))?;
        let refs = self.open_shelf(REFS)?;
        let name = id.to_string();
        if read_whole(&refs, &name, INDEX_MAX).is_ok_and(|old| old == bytes) {
            return Ok(());
        }
        *ours = true;
        put_file(disk, &refs, &name, &bytes)?;
        disk.sync(&refs)
    }

    fn add(&self, manner: &Manner<'_>, digest: Digest, bytes: &[u8]) -> io::Result<()> {
        let mut object = vec![0; 1 + lz4_flex::block::get_maximum_output_size(bytes.len())];
        let packed = object.split_first_mut().map(|(how, space)| {
            *how = LZ4;
            lz4_flex::block::compress_into(bytes, space)
        });
        match packed {
            Some(Ok(count)) if manner.compress && count < bytes.len() => object.truncate(1 + count),
            _ => object = [&[PLAIN], bytes].concat(),
        }
        let shelf = shelf(digest);
        make_if_missing(self.directory.as_fd(), Path::new(&shelf))?;
        put_file(&*manner.disk, &self.open_shelf(&shelf)?, &book(digest), &object)
    }

    fn open_shelf(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(fs::openat(&self.directory, name, flags, Mode::empty())?.into())
    }

    fn lock(&self, how: FlockOperation, patience: Duration) -> Result<File, SnapshotError> {
        let cannot = || format!("Store {} cannot be locked", self.path.display());
        let flags = OFlags::CREATE | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = doing(fs::openat(&self.directory, LOCK, flags, Mode::RUSR | Mode::WUSR), cannot)?;
        let until = Instant::now() + patience;
        loop {
            match fs::flock(&file, how) {
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    let path = self.path.display();
                    let text = format!("Store {path} is being changed by another process; try again later");
                    return Err(SnapshotError::Request(text));
                }
                result => {
                    doing(result, cannot)?;
                    return Ok(file.into());
                }
            }
        }
    }
}

impl Reference<'_> {
    /// Leaves the reference in the store.
    pub(crate) fn keep(mut self) {
        self.ours = false;
    }
}

impl Drop for Reference<'_> {
    fn drop(&mut self) {
        if self.ours {
            let _ = self.store.forget(self.id);
        }
    }
}

fn no_store(path: &Path) -> String {
    format!("Store {} cannot be opened", path.display())
}

/// Writes a file under another name first. A file that is there already is replaced.
fn put_file(disk: &dyn Disk, at: &File, name: &str, bytes: &[u8]) -> io::Result<()> {
    let temporary = format!(".{}", Id::random()?);
    let written = write_whole(disk, at, &temporary, bytes)
        .and_then(|()| Ok(fs::renameat(at, temporary.as_str(), at, name)?));
    written.inspect_err(|_| {
        let _ = fs::unlinkat(at, temporary.as_str(), AtFlags::empty());
    })
}

fn make_if_missing(at: impl AsFd, path: &Path) -> io::Result<()> {
    match fs::mkdirat(at, path, Mode::RWXU) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// The present pages of a chunk, one after the other.
fn pack(index: &Index, chunk: u64, memory: &File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for run in index.extents.inside(index.window(chunk)) {
        let at = bytes.len();
        bytes.resize(at + run.len() as usize, 0);
        memory.read_exact_at(bytes.get_mut(at..).unwrap_or_default(), run.start)?;
    }
    Ok(bytes)
}

/// Removes the chunks of a shelf that nobody needs, and what killed writers left there.
fn clear(
    directory: &File,
    shelf: &str,
    needed: &BTreeSet<Digest>,
    collected: &mut Collected,
) -> io::Result<()> {
    for name in names(directory)? {
        let digest = Digest::parse(&format!("{shelf}{name}"));
        if digest.is_some_and(|digest| needed.contains(&digest)) {
            collected.kept += 1;
        } else if digest.is_some() || name.starts_with('.') {
            let size = fs::statat(directory, name.as_str(), AtFlags::SYMLINK_NOFOLLOW)?.st_size;
            fs::unlinkat(directory, name.as_str(), AtFlags::empty())?;
            collected.removed += u64::from(digest.is_some());
            collected.bytes += size.cast_unsigned();
        }
    }
    Ok(())
}

fn names(directory: &File) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::Dir::read_from(directory)? {
        if let Ok(name) = entry?.file_name().to_str()
            && ![".", ".."].contains(&name)
        {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

fn unsealed(bytes: &[u8]) -> Option<&[u8]> {
    let (body, digest) = bytes.split_at_checked(bytes.len().checked_sub(LEN)?)?;
    (Digest::of(body).0 == digest).then_some(body)
}

fn shelf(digest: Digest) -> String {
    digest.to_string().chars().take(2).collect()
}

fn book(digest: Digest) -> String {
    digest.to_string().chars().skip(2).collect()
}
