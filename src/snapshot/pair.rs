//! A snapshot of two files, as Firecracker's clients know it: one of state, one of memory.
//!
//! ```text
//!   STATE    a state file (state.rs) whose first section, `pair`, is what a manifest says
//!   MEMORY   guest memory, sparse, to be mapped as it is
//! ```
//!
//! Whoever uses this form moves, copies and joins the two files with tools of his own, so nothing
//! in them leads to the other: no names, no index, no hashes of pages. But the memory carries a
//! mark, the snapshot's identity in a page that the guest has no use for, and a state is never
//! loaded with other memory than its own. Each file takes its name in one step when it is whole.
//! A kill between the two steps would leave the old state with new memory, which is found out;
//! because the old pair is gone then anyway, the old state goes before.
//!
//! A diff is written onto a memory file that is already there and as long as the machine's: the
//! result is the whole memory. Without such a file it holds what changed, and holes.

use std::{
    fs::File,
    io,
    ops::ControlFlow,
    os::{
        fd::AsFd,
        unix::fs::{FileExt, MetadataExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use devices::state::Section;
use rustix::fs::{self, AtFlags, FlockOperation, Mode, OFlags};
use serde::{Deserialize, Serialize};

use super::{
    SnapshotError,
    digest::Id,
    disk::{Disk, is_zero, next_data, open_directory, open_file, read_whole},
    draft::split,
    error::doing,
    limits::{MEMORY_MAX, PAGE, STATE_MAX},
    manifest::{Json, Region, check_regions},
    state,
    writer::{PIECE, Watch},
};

const KIND: &str = "pair";
const PREFIX: &str = ".nacelle-";
const SUFFIX: &str = ".part";
/// Bytes of the mark.
const MARK: u64 = 16;

/// What the state file says beside the state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct About {
    /// Identity of the snapshot.
    pub id: Id,
    /// Version of the nacelle that wrote it.
    pub nacelle: String,
    /// When it was taken, in milliseconds since 1970.
    pub created: u64,
    /// The machine's specification.
    pub machine: Json,
    /// What the machine needs of the CPU.
    pub cpu: Json,
    /// Bytes of the memory file.
    pub size: u64,
    /// Which guest addresses lie where in it.
    pub regions: Vec<Region>,
    /// Where in the memory file the 16 bytes of `id` stand: in memory that the guest has no use for.
    pub mark: u64,
}

/// A snapshot of two files that is open for reading.
#[derive(Debug)]
pub struct Pair {
    /// What it is.
    pub about: About,
    /// The machine's state.
    pub sections: Vec<Section>,
}

impl Pair {
    /// Opens and checks the state file at `path`.
    pub fn open(path: &Path) -> Result<Pair, SnapshotError> {
        let (directory, name) = place(path)?;
        let cannot = || format!("Snapshot {} cannot be read", path.display());
        let bytes = doing(read_whole(&directory, &name, STATE_MAX), cannot)?;
        let damaged =
            |reason: String| SnapshotError::Damaged { path: directory_of(path), file: name.clone(), reason };
        let mut sections = state::decode(&bytes).map_err(damaged)?;
        if sections.first().is_none_or(|first| first.kind != KIND) {
            return Err(damaged("it is a state file of a directory, which is loaded as a whole".to_owned()));
        }
        let first = sections.remove(0);
        if first.version != 1 {
            let (found, path) = (u64::from(first.version), path.to_owned());
            return Err(SnapshotError::Version { path, found, oldest: 1, newest: 1 });
        }
        let about: About = serde_json::from_slice(&first.bytes).map_err(|e| damaged(e.to_string()))?;
        if about.size > MEMORY_MAX || !about.size.is_multiple_of(PAGE) {
            return Err(damaged(format!("memory of {} bytes is not possible", about.size)));
        }
        check_regions(&about.regions, about.size).map_err(damaged)?;
        if about.mark.checked_add(MARK).is_none_or(|end| end > about.size) {
            return Err(damaged(format!("a mark at {} is not possible", about.mark)));
        }
        Ok(Pair { about, sections })
    }

    /// Opens its memory file, which must be as long as the state says and have its mark.
    pub fn memory(&self, path: &Path) -> Result<File, SnapshotError> {
        let (directory, name) = place(path)?;
        let file = doing(open_file(&directory, &name), || {
            format!("Guest memory {} cannot be opened", path.display())
        })?;
        let found = file.metadata().map_or(0, |m| m.len());
        let mut mark = [0; MARK as usize];
        let reason = if found != self.about.size {
            format!("it has {found} bytes; {} belong to this state", self.about.size)
        } else if file.read_exact_at(&mut mark, self.about.mark).is_err() || mark != self.about.id.0 {
            "it is not the memory that was written with this state".to_owned()
        } else {
            return Ok(file);
        };
        Err(SnapshotError::Damaged { path: directory_of(path), file: name, reason })
    }
}

/// A snapshot of two files that is being written. Dropped before [`PairWriter::finish`], nothing
/// is left of it.
pub struct PairWriter<'a> {
    about: About,
    state: Part,
    memory: Part,
    /// Pages that are zero must be written where there may be something already.
    onto: bool,
    disk: Arc<dyn Disk>,
    watch: &'a dyn Watch,
    expected: u64,
    done: u64,
}

impl<'a> PairWriter<'a> {
    /// Begins a snapshot. With `onto`, pages go onto a copy of the memory file that is there, if
    /// it is as long as the machine's memory. `expected` is how many bytes will come.
    pub fn begin(
        state: &Path,
        memory: &Path,
        about: About,
        onto: bool,
        disk: Arc<dyn Disk>,
        (watch, expected): (&'a dyn Watch, u64),
    ) -> Result<PairWriter<'a>, SnapshotError> {
        let state = Part::create(&*disk, state)?;
        let memory = Part::create(&*disk, memory)?;
        let base = open_file(&memory.directory, &memory.name).ok();
        let base = base.filter(|file| onto && file.metadata().is_ok_and(|m| m.len() == about.size));
        let onto = base.is_some();
        let mut writer = PairWriter { about, state, memory, onto, disk, watch, expected, done: 0 };
        let cannot = writer.memory.cannot();
        doing(writer.disk.set_size(&writer.memory.file, writer.about.size), || cannot.clone())?;
        if let Some(base) = base {
            writer.copy_base(&base)?;
        }
        Ok(writer)
    }

    fn copy_base(&mut self, base: &File) -> Result<(), SnapshotError> {
        if fs::ioctl_ficlone(&self.memory.file, base).is_ok() {
            return Ok(());
        }
        self.copy(base, 0, self.about.size)
    }

    /// Takes pages that lie at `offset` of the memory file.
    pub fn run(&mut self, offset: u64, bytes: &[u8]) -> Result<(), SnapshotError> {
        let mut at = offset;
        for piece in bytes.chunks(PIECE) {
            self.piece(at, piece)?;
            at += piece.len() as u64;
            self.done += piece.len() as u64;
            if self.watch.step(self.done, self.expected.max(self.done)) == ControlFlow::Break(()) {
                return Err(SnapshotError::Cancelled);
            }
        }
        Ok(())
    }

    fn piece(&mut self, offset: u64, bytes: &[u8]) -> Result<(), SnapshotError> {
        let cannot = || self.memory.cannot();
        let mut at = 0;
        while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
            let mut pages = rest.chunks(PAGE as usize);
            let skip = |page: &[u8]| !self.onto && is_zero(page);
            let zero = pages.next().is_some_and(skip);
            let more = pages.take_while(|page| skip(page) == zero).count();
            let length = ((1 + more) * PAGE as usize).min(rest.len());
            if !zero {
                let same = rest.get(..length).unwrap_or_default();
                doing(self.disk.write_at(&self.memory.file, same, offset + at as u64), cannot)?;
            }
            at += length;
        }
        Ok(())
    }

    /// Takes `length` bytes at `offset` of a file as the pages at the same offset; holes stay
    /// holes.
    pub fn copy(&mut self, file: &File, offset: u64, length: u64) -> Result<(), SnapshotError> {
        let cannot = || "Guest memory cannot be read".to_owned();
        let end = offset.saturating_add(length);
        let mut buffer = vec![0; PIECE.min(length as usize)];
        let mut at = offset;
        while let Some((start, stop)) = doing(next_data(file, at, end), cannot)? {
            at = start / PAGE * PAGE;
            let stop = stop.next_multiple_of(PAGE).min(end);
            while at < stop {
                let count = (stop - at).min(PIECE as u64);
                let piece = buffer.get_mut(..count as usize).unwrap_or_default();
                doing(file.read_exact_at(piece, at), cannot)?;
                self.run(at, piece)?;
                at += count;
            }
        }
        Ok(())
    }

    /// Writes the state, brings both files to the disk, and gives them their names.
    pub fn finish(self, sections: Vec<Section>) -> Result<Id, SnapshotError> {
        let bytes = serde_json::to_vec(&self.about).unwrap_or_default();
        let first = Section { kind: KIND.to_owned(), version: 1, bytes };
        let sections: Vec<Section> = std::iter::once(first).chain(sections).collect();
        let wrong = |why: String| SnapshotError::Request(format!("The state cannot be written: {why}"));
        let encoded = state::encode(&sections).map_err(wrong)?;
        if encoded.len() as u64 > STATE_MAX {
            return Err(wrong(format!("it has {} bytes; at most {STATE_MAX} are read", encoded.len())));
        }
        let PairWriter { about, state, memory, disk, .. } = self;
        doing(disk.write_at(&memory.file, &about.id.0, about.mark), || memory.cannot())?;
        doing(disk.write_at(&state.file, &encoded, 0), || state.cannot())?;
        doing(disk.sync(&state.file), || state.cannot())?;
        doing(disk.sync(&memory.file), || memory.cannot())?;
        state.remove_old()?;
        memory.publish(&*disk)?;
        state.publish(&*disk)?;
        Ok(about.id)
    }
}

/// A file that has not its name yet; gone when dropped before it gets it.
struct Part {
    path: PathBuf,
    directory: File,
    name: String,
    temporary: String,
    file: File,
    ours: bool,
}

impl Part {
    fn create(disk: &dyn Disk, path: &Path) -> Result<Part, SnapshotError> {
        let (directory, name) = place(path)?;
        let temporary = format!("{PREFIX}{name}{SUFFIX}");
        let cannot = || format!("{} cannot be written", path.display());
        if let Ok(found) = fs::statat(&directory, name.as_str(), AtFlags::SYMLINK_NOFOLLOW)
            && fs::FileType::from_raw_mode(found.st_mode) != fs::FileType::RegularFile
        {
            let text = format!("{} is there and no plain file; it is not replaced", path.display());
            return Err(SnapshotError::Request(text));
        }
        // What a writer that was killed left is nobody's: its lock went with it.
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        if let Ok(left) = fs::openat(&directory, temporary.as_str(), flags, Mode::empty()) {
            if fs::flock(&left, FlockOperation::NonBlockingLockExclusive).is_err() {
                let text = format!("{} is being written by somebody else", path.display());
                return Err(SnapshotError::Request(text));
            }
            let _ = fs::unlinkat(&directory, temporary.as_str(), AtFlags::empty());
        }
        let file = doing(disk.create(directory.as_fd(), &temporary), cannot)?;
        let part = Part { path: path.to_owned(), directory, name, temporary, file, ours: true };
        doing(fs::flock(&part.file, FlockOperation::NonBlockingLockExclusive), cannot)?;
        Ok(part)
    }

    fn cannot(&self) -> String {
        format!("{} cannot be written", self.path.display())
    }

    fn remove_old(&self) -> Result<(), SnapshotError> {
        match fs::unlinkat(&self.directory, self.name.as_str(), AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(e) => doing(Err(e), || format!("{} cannot be replaced", self.path.display())),
        }
    }

    fn publish(mut self, disk: &dyn Disk) -> Result<(), SnapshotError> {
        let renamed = disk.rename(self.directory.as_fd(), &self.temporary, &self.name);
        doing(renamed, || self.cannot())?;
        self.ours = false;
        doing(disk.sync(&self.directory), || self.cannot())
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let same = |named: fs::Stat| {
            self.file.metadata().is_ok_and(|m| (m.dev(), m.ino()) == (named.st_dev, named.st_ino))
        };
        let named = fs::statat(&self.directory, self.temporary.as_str(), AtFlags::SYMLINK_NOFOLLOW);
        if self.ours && named.is_ok_and(same) {
            let _ = fs::unlinkat(&self.directory, self.temporary.as_str(), AtFlags::empty());
        }
    }
}

/// The open directory that `path` lies in, and its name there.
fn place(path: &Path) -> Result<(File, String), SnapshotError> {
    let (directory, name) = split(path)?;
    let cannot = || format!("{} cannot be opened", directory.display());
    Ok((doing(open_directory(&directory), cannot)?, name))
}

fn directory_of(path: &Path) -> PathBuf {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned()
}

/// Whether the file at `path` can be the state of a pair: it is a plain file.
pub fn is_file(path: &Path) -> io::Result<bool> {
    Ok(std::fs::metadata(path)?.is_file())
}

#[cfg(test)]
mod tests {
    use super::{super::disk::HostDisk, *};

    const SIZE: u64 = 64 * PAGE;

    fn about() -> About {
        let region = Region { guest_address: 0, size: SIZE, offset: 0, page_size: PAGE };
        About {
            id: Id::random().unwrap(),
            nacelle: "1".to_owned(),
            created: 1,
            machine: Json::default(),
            cpu: Json::default(),
            size: SIZE,
            regions: vec![region],
            mark: 2 * PAGE + 64,
        }
    }

    fn page(byte: u8) -> Vec<u8> {
        vec![byte; PAGE as usize]
    }

    fn write(directory: &Path, onto: bool, pages: &[(u64, u8)]) -> Result<Id, SnapshotError> {
        let (state, memory) = (directory.join("state"), directory.join("memory"));
        let mut writer = PairWriter::begin(&state, &memory, about(), onto, Arc::new(HostDisk), (&(), 0))?;
        for (number, byte) in pages {
            writer.run(number * PAGE, &page(*byte))?;
        }
        writer.finish(vec![Section::new("vcpu", 1, &pages.len())])
    }

    fn names(directory: &Path) -> Vec<String> {
        let names = std::fs::read_dir(directory).unwrap();
        let mut names: Vec<_> =
            names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn two_files_come_back_and_zero_pages_are_holes() {
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), false, &[(3, 7), (4, 0), (60, 9)]).unwrap();
        assert_eq!(names(directory.path()), ["memory", "state"]);
        let pair = Pair::open(&directory.path().join("state")).unwrap();
        assert_eq!(pair.sections, [Section::new("vcpu", 1, &3usize)]);
        let memory = pair.memory(&directory.path().join("memory")).unwrap();
        let metadata = memory.metadata().unwrap();
        assert_eq!((metadata.len(), metadata.blocks()), (SIZE, 24), "two pages and the mark's");
        let mut found = page(1);
        memory.read_exact_at(&mut found, 3 * PAGE).unwrap();
        assert_eq!(found, page(7));
    }

    #[test]
    fn a_diff_goes_onto_the_memory_that_is_there_without_touching_it_before_it_is_whole() {
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), false, &[(3, 7), (4, 8)]).unwrap();
        let mapped = File::open(directory.path().join("memory")).unwrap();
        write(directory.path(), true, &[(4, 0), (5, 5)]).unwrap();
        let read = |file: &File, number: u64| {
            let mut found = [0];
            file.read_exact_at(&mut found, number * PAGE).unwrap();
            found[0]
        };
        let new = File::open(directory.path().join("memory")).unwrap();
        assert_eq!([3, 4, 5].map(|n| read(&new, n)), [7, 0, 5]);
        assert_eq!([3, 4, 5].map(|n| read(&mapped, n)), [7, 8, 0], "whoever maps the old one keeps it");
    }

    #[test]
    fn memory_of_another_snapshot_is_refused() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write(one.path(), false, &[(3, 7)]).unwrap();
        write(other.path(), false, &[(3, 7)]).unwrap();
        let pair = Pair::open(&one.path().join("state")).unwrap();
        let error = pair.memory(&other.path().join("memory")).unwrap_err().to_string();
        assert!(error.contains("not the memory that was written with this state"), "{error}");
    }

    #[test]
    fn what_is_dropped_or_was_left_is_removed_and_nothing_else_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let (state, memory) = (directory.path().join("state"), directory.path().join("memory"));
        let begin = || PairWriter::begin(&state, &memory, about(), false, Arc::new(HostDisk), (&(), 0));
        let writer = begin().unwrap();
        assert_eq!(names(directory.path()).len(), 2);
        assert!(begin().err().unwrap().to_string().contains("somebody else"));
        drop(writer);
        assert_eq!(names(directory.path()), [""; 0]);
        std::fs::write(directory.path().join(".nacelle-state.part"), "left").unwrap();
        write(directory.path(), false, &[(0, 1)]).unwrap();
        assert_eq!(names(directory.path()), ["memory", "state"]);
        std::fs::remove_file(&state).unwrap();
        std::fs::create_dir(&state).unwrap();
        assert!(begin().err().unwrap().to_string().contains("no plain file"));
    }

    #[test]
    fn damage_is_found() {
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), false, &[(0, 1)]).unwrap();
        let state = directory.path().join("state");
        let whole = std::fs::read(&state).unwrap();
        for length in 0..whole.len() {
            std::fs::write(&state, &whole[..length]).unwrap();
            assert!(Pair::open(&state).is_err(), "{length}");
        }
        for bit in 0..whole.len() * 8 {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&state, &flipped).unwrap();
            assert!(Pair::open(&state).is_err(), "{bit}");
        }
        std::fs::write(&state, &whole).unwrap();
        let memory = directory.path().join("memory");
        File::options().write(true).open(&memory).unwrap().set_len(SIZE - PAGE).unwrap();
        let error = Pair::open(&state).unwrap().memory(&memory).unwrap_err().to_string();
        assert!(error.contains("belong to this state"), "{error}");
    }
}
