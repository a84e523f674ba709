//! A tar archive out of a machine, unpacked on the host.
//!
//! The archive may be the work of a guest that wants to harm its host. So: every path is
//! resolved by the kernel below one directory and through no link at all
//! (`openat2(RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)`); set-id bits are dropped; devices, pipes
//! and sockets are not made, and not replaced; names are read with a cap on their length; and
//! nothing but the formats that our agent writes is understood.

use std::{
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path, PathBuf},
};

use guest::client::ClientError;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawMode, ResolveFlags, Timespec, Timestamps, UTIME_OMIT};
use tar::{Archive, Entry, EntryType};

use crate::cli::failure::{Failure, Outcome, doing};

/// Longest path or link in an archive, in bytes (the kernel's limit).
const NAME_MAX: u64 = 4096;
/// Most names of left-out files that are kept for the report.
const LEFT_OUT_MAX: usize = 1024;
/// Most directories whose times are set afterwards.
const TIMES_MAX: usize = 1 << 16;

/// What is done with an archive.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Give files the archive's owners instead of this user.
    pub keep_owner: bool,
    /// All entries are below one first component, which is not kept.
    pub named: bool,
}

/// What was unpacked.
#[derive(Debug, Default)]
pub struct Unpacked {
    /// Files, links counted.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// What is not made on a host.
    pub left_out: Vec<String>,
}

/// Unpacks `tar` into `directory`, under the name `top` there if one is given.
pub fn unpack(directory: &Path, top: Option<&str>, tar: impl Read, rules: Rules) -> Outcome<Unpacked> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(directory, flags, Mode::empty()).map_err(io::Error::from);
    let root = doing(root, || format!("The directory {} cannot be opened", directory.display()))?;
    let mut target = Target { root, top: top.map(PathBuf::from), rules, times: Vec::new() };
    let mut unpacked = Unpacked::default();
    let mut archive = Archive::new(tar);
    let broken = |e: &io::Error| Failure::because("The archive that the machine sent cannot be read", e);
    let (mut long_name, mut long_link) = (None, None);
    for entry in archive.entries().map_err(|e| broken(&e))?.raw(true) {
        let mut entry = entry.map_err(|e| broken(&e))?;
        match entry.header().entry_type() {
            EntryType::GNULongName => long_name = Some(long(&mut entry).map_err(|e| broken(&e))?),
            EntryType::GNULongLink => long_link = Some(long(&mut entry).map_err(|e| broken(&e))?),
            _ => {
                let name = long_name.take().unwrap_or_else(|| entry.path_bytes().into_owned());
                let link = long_link.take().or_else(|| entry.link_name_bytes().map(|l| l.into_owned()));
                let written = target.write(&mut entry, &path_of(&name), link.as_deref(), &mut unpacked);
                written.map_err(|error| explain(&name, directory, &error))?;
            }
        }
    }
    target.set_times();
    Ok(unpacked)
}

/// Says whose failure it was: the machine's, which could not send, or the host's.
fn explain(name: &[u8], directory: &Path, error: &io::Error) -> Failure {
    if let Some(sent) = error.get_ref().and_then(|e| e.downcast_ref::<ClientError>()) {
        return Failure::because("The machine could not send everything; what came is there", sent);
    }
    let shown = crate::cli::output::clean(&String::from_utf8_lossy(name));
    Failure::because(format!("{shown:?} could not be written to {}", directory.display()), error)
}

fn path_of(bytes: &[u8]) -> PathBuf {
    PathBuf::from(std::ffi::OsStr::from_bytes(bytes))
}

/// The name in an entry that only holds one for the next.
fn long(entry: &mut Entry<'_, impl Read>) -> io::Result<Vec<u8>> {
    let mut name = Vec::new();
    entry.take(NAME_MAX + 1).read_to_end(&mut name)?;
    if name.len() as u64 > NAME_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "A name in it is longer than 4096 bytes"));
    }
    while name.last() == Some(&0) {
        name.pop();
    }
    Ok(name)
}

fn refused(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

struct Target {
    root: OwnedFd,
    top: Option<PathBuf>,
    rules: Rules,
    /// Writing into a directory changes its time: those are set when all is written.
    times: Vec<(PathBuf, Mode, u64)>,
}

impl Target {
    /// Where an entry goes, below the root.
    fn place(&self, name: &Path) -> io::Result<PathBuf> {
        let mut parts = Vec::new();
        for component in name.components() {
            match component {
                Component::Normal(part) => parts.push(part),
                Component::CurDir | Component::RootDir => {}
                _ => return Err(refused("Its path leads out of the directory")),
            }
        }
        let kept = parts.get(usize::from(self.rules.named)..).unwrap_or_default();
        Ok(self.top.iter().map(|top| top.as_os_str()).chain(kept.iter().copied()).collect())
    }

    fn open(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        rustix::fs::openat2(&self.root, path, flags, Mode::empty(), resolve).map_err(|e| match e {
            rustix::io::Errno::LOOP => refused("A link on the host is in the way; copies go through none"),
            other => other.into(),
        })
    }

    /// The directory that `path` is in, made if missing.
    fn parent(&self, path: &Path) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let parent = path.parent().unwrap_or(Path::new(""));
        match self.open(parent, flags) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
        let mut so_far = PathBuf::new();
        for part in parent {
            let above = self.open(&so_far, flags)?;
            make_directory(above.as_fd(), Path::new(part))?;
            so_far.push(part);
        }
        self.open(parent, flags)
    }

    fn write(
        &mut self,
        entry: &mut Entry<'_, impl Read>,
        name: &Path,
        link: Option<&[u8]>,
        unpacked: &mut Unpacked,
    ) -> io::Result<()> {
        let path = self.place(name)?;
        let kind = entry.header().entry_type();
        let Some(last) = path.file_name().map(Path::new) else {
            // The directory itself: it is there and keeps what it has.
            return if kind.is_dir() { Ok(()) } else { Err(refused("It has no name")) };
        };
        if matches!(kind, EntryType::Char | EntryType::Block | EntryType::Fifo) {
            if unpacked.left_out.len() < LEFT_OUT_MAX {
                unpacked.left_out.push(name.display().to_string());
            }
            return Ok(());
        }
        let parent = self.parent(&path)?;
        make_room(parent.as_fd(), last, kind.is_dir())?;
        match kind {
            EntryType::Directory => {
                make_directory(parent.as_fd(), last)?;
                return self.dress_directory(entry, &path);
            }
            EntryType::Regular | EntryType::Continuous => {
                unpacked.bytes += self.file(entry, parent.as_fd(), last)?;
            }
            EntryType::Symlink => {
                let to = link.ok_or_else(|| refused("It is a link to nothing"))?;
                rustix::fs::symlinkat(path_of(to), &parent, last)?;
                if self.rules.keep_owner {
                    let (uid, gid) = owner(entry);
                    rustix::fs::chownat(&parent, last, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
                }
            }
            EntryType::Link => self.hard_link(link, parent.as_fd(), last)?,
            _ => return Err(refused("It is of a kind that the agent does not send")),
        }
        unpacked.files += 1;
        Ok(())
    }

    fn file(&self, entry: &mut Entry<'_, impl Read>, parent: BorrowedFd<'_>, name: &Path) -> io::Result<u64> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(parent, name, flags, Mode::RUSR | Mode::WUSR)?;
        let mut file = File::from(file);
        let expected = entry.header().entry_size()?;
        let copied = io::copy(entry, &mut file).and_then(|copied| {
            if copied == expected { Ok(copied) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
        });
        let copied = copied.inspect_err(|_| {
            // Half a file is worse than none.
            let _ = rustix::fs::unlinkat(parent, name, AtFlags::empty());
        })?;
        self.dress(entry, file.as_fd())?;
        Ok(copied)
    }

    /// Owner, permissions and time, in this order: a change of owner clears bits.
    fn dress(&self, entry: &Entry<'_, impl Read>, file: BorrowedFd<'_>) -> io::Result<()> {
        if self.rules.keep_owner {
            let (uid, gid) = owner(entry);
            rustix::fs::fchown(file, uid, gid)?;
        }
        rustix::fs::fchmod(file, mode(entry))?;
        stamp(file, entry.header().mtime().unwrap_or(0))
    }

    fn dress_directory(&mut self, entry: &Entry<'_, impl Read>, path: &Path) -> io::Result<()> {
        if self.rules.keep_owner {
            let directory = self.open(path, OFlags::RDONLY | OFlags::DIRECTORY)?;
            let (uid, gid) = owner(entry);
            rustix::fs::fchown(&directory, uid, gid)?;
        }
        // A directory without write permission could not be filled: later, too.
        if self.times.len() < TIMES_MAX {
            self.times.push((path.to_owned(), mode(entry), entry.header().mtime().unwrap_or(0)));
        }
        Ok(())
    }

    /// Times and permissions of directories, the deepest first.
    fn set_times(&self) {
        for (path, mode, time) in self.times.iter().rev() {
            // A time that cannot be set is no reason to call the copy failed.
            if let Ok(directory) = self.open(path, OFlags::RDONLY | OFlags::DIRECTORY) {
                let _ = stamp(directory.as_fd(), *time);
                let _ = rustix::fs::fchmod(&directory, *mode);
            }
        }
    }

    /// A further name for a file of the same archive.
    fn hard_link(&self, link: Option<&[u8]>, parent: BorrowedFd<'_>, name: &Path) -> io::Result<()> {
        let to = link.ok_or_else(|| refused("It is a link to nothing"))?;
        let to = self.place(&path_of(to))?;
        let last = to.file_name().ok_or_else(|| refused("It is a link to nothing"))?;
        let directory = self.parent(&to)?;
        // A second name for a host's own file would be a way to change that file.
        let there = rustix::fs::statat(&directory, last, AtFlags::SYMLINK_NOFOLLOW)?;
        if FileType::from_raw_mode(there.st_mode) != FileType::RegularFile {
            return Err(refused("It is a second name of what is no file"));
        }
        Ok(rustix::fs::linkat(&directory, last, parent, name, AtFlags::empty())?)
    }
}

fn owner(entry: &Entry<'_, impl Read>) -> (Option<rustix::fs::Uid>, Option<rustix::fs::Gid>) {
    let id = |n: io::Result<u64>| n.ok().and_then(|n| u32::try_from(n).ok()).filter(|n| *n != u32::MAX);
    let header = entry.header();
    (id(header.uid()).map(rustix::fs::Uid::from_raw), id(header.gid()).map(rustix::fs::Gid::from_raw))
}

/// Permissions without set-id bits: those mean something else to the host than to the guest.
fn mode(entry: &Entry<'_, impl Read>) -> Mode {
    Mode::from_raw_mode(entry.header().mode().unwrap_or(0o644) as RawMode & 0o1777)
}

fn stamp(file: BorrowedFd<'_>, mtime: u64) -> io::Result<()> {
    let seconds = i64::try_from(mtime).unwrap_or(0);
    let times = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: seconds, tv_nsec: 0 },
    };
    Ok(rustix::fs::futimens(file, &times)?)
}

fn make_directory(parent: BorrowedFd<'_>, name: &Path) -> io::Result<()> {
    match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
        Err(rustix::io::Errno::EXIST) => Ok(()),
        other => Ok(other?),
    }
}

/// Removes a file or link that is in the way. A directory is never replaced, nor anything that
/// is no file.
fn make_room(parent: BorrowedFd<'_>, name: &Path, wants_directory: bool) -> io::Result<()> {
    let there = match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(rustix::io::Errno::NOENT) => return Ok(()),
        other => FileType::from_raw_mode(other?.st_mode),
    };
    match (there, wants_directory) {
        (FileType::Directory, true) => Ok(()),
        (FileType::RegularFile | FileType::Symlink, false) => {
            Ok(rustix::fs::unlinkat(parent, name, AtFlags::empty())?)
        }
        (FileType::Directory, false) => Err(refused("A directory is in its place")),
        (FileType::Symlink, true) => {
            Err(refused("A link on the host is in its place; copies go through none"))
        }
        (_, true) => Err(refused("What is no directory is in its place")),
        _ => Err(refused("A device, pipe or socket is in its place")),
    }
}

#[cfg(test)]
mod tests;
