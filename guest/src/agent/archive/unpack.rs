//! A tar archive into a directory of the container.
//!
//! Every entry is placed relative to an open directory with `openat2(RESOLVE_BENEATH)`: the
//! kernel itself refuses a path that would leave it, by `..`, by an absolute link or by a link
//! that the archive has just made. A refusal ends the copy with a sentence; it is never
//! silently put somewhere else.

use super::fail;
use crate::agent::syscall::{check, cpath, cstring, open, open_under};
use guest::protocol::{Failure, FailureKind};
use std::{
    ffi::{CString, OsStr},
    fs::{self, File},
    io::{self, Read},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path, PathBuf},
};
use tar::{Archive, Entry, EntryType};

/// What an archive may do.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Keep the archive's owners instead of making everything root's.
    pub keep_owner: bool,
    /// Let a file replace a directory or a directory a file.
    pub replace_kind: bool,
}

/// Unpacks `archive` into the directory `path`.
pub fn unpack(path: &str, archive: &mut impl Read, rules: Rules) -> Result<(), Failure> {
    let place = super::absolute(path)?;
    let root = open(place, libc::O_PATH | libc::O_DIRECTORY).map_err(|e| fail("enter", path, &e))?;
    let mut archive = Archive::new(archive);
    let broken =
        |e: &io::Error| Failure::new(FailureKind::BadRequest, format!("The archive cannot be read: {e}"));
    let target = Target { root, path: place.to_owned(), rules };
    // Writing into a directory changes its time: those are set when all is written.
    let mut times = Vec::new();
    for entry in archive.entries().map_err(|e| broken(&e))? {
        let mut entry = entry.map_err(|e| broken(&e))?;
        let name = entry.path().map_err(|e| broken(&e))?.into_owned();
        let inside = inside(&name)?;
        let written = target.write(&mut entry, &inside);
        written.map_err(|e| explain(&name, &e))?;
        if entry.header().entry_type().is_dir() && times.len() < 1 << 16 {
            times.push((inside, entry.header().mtime().unwrap_or(0)));
        }
    }
    for (name, time) in times.iter().rev() {
        // A time that cannot be set is no reason to call the copy failed.
        let _ = target.open(name, libc::O_RDONLY | libc::O_DIRECTORY).and_then(|d| stamp(&d, *time));
    }
    Ok(())
}

fn explain(name: &Path, error: &io::Error) -> Failure {
    if error.raw_os_error() == Some(libc::EXDEV) {
        return Failure::new(
            FailureKind::BadRequest,
            format!("The archive's {name:?} leads out of the directory it is unpacked into"),
        );
    }
    fail("write", name, error)
}

/// An entry's path as one below the directory; leading slashes are nothing, `..` is refused.
fn inside(name: &Path) -> Result<PathBuf, Failure> {
    let mut path = PathBuf::new();
    for component in name.components() {
        match component {
            Component::Normal(part) => path.push(part),
            Component::CurDir | Component::RootDir => {}
            _ => return Err(explain(name, &io::Error::from_raw_os_error(libc::EXDEV))),
        }
    }
    Ok(path)
}

struct Target {
    root: OwnedFd,
    path: PathBuf,
    rules: Rules,
}

impl Target {
    fn open(&self, path: &Path, flags: libc::c_int) -> io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_MAGICLINKS;
        open_under(&self.root, &cpath(path)?, flags, 0, resolve)
    }

    /// The directory that `path` is in, made if missing, and its name there.
    fn parent<'a>(&self, path: &'a Path) -> io::Result<(OwnedFd, &'a OsStr)> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidFilename)?;
        let parent = path.parent().unwrap_or(Path::new(""));
        let flags = libc::O_PATH | libc::O_DIRECTORY;
        match self.open(parent, flags) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            other => return other.map(|d| (d, name)),
        }
        let mut so_far = PathBuf::new();
        for part in parent {
            let above = self.open(&so_far, flags)?;
            so_far.push(part);
            fine_if_there(make_directory(&above, part))?;
        }
        self.open(parent, flags).map(|d| (d, name))
    }

    fn write(&self, entry: &mut Entry<'_, impl Read>, path: &Path) -> io::Result<()> {
        let kind = entry.header().entry_type();
        if path.as_os_str().is_empty() {
            // The directory itself, as `.`: it is there and keeps what it has.
            return if kind.is_dir() { Ok(()) } else { Err(io::ErrorKind::InvalidFilename.into()) };
        }
        let (parent, name) = self.parent(path)?;
        self.make_room(&parent, name, path, kind.is_dir())?;
        let name_c = cstring(name.as_bytes())?;
        match kind {
            EntryType::Directory => {
                fine_if_there(make_directory(&parent, name))?;
                let directory = self.open(path, libc::O_RDONLY | libc::O_DIRECTORY)?;
                self.dress(entry, &directory)
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let mut file = File::from(create(&parent, &name_c)?);
                io::copy(entry, &mut file)?;
                self.dress(entry, &file.into())
            }
            EntryType::Symlink => self.symlink(entry, &parent, &name_c),
            EntryType::Link => self.hard_link(entry, &parent, &name_c),
            EntryType::Char | EntryType::Block | EntryType::Fifo => self.node(entry, &parent, &name_c),
            // Extended headers have been applied by the reader; others carry nothing to write.
            _ => Ok(()),
        }
    }

    /// Removes what is in the way, if the rules allow it.
    fn make_room(
        &self,
        parent: &OwnedFd,
        name: &OsStr,
        path: &Path,
        wanted_directory: bool,
    ) -> io::Result<()> {
        let name_c = cstring(name.as_bytes())?;
        let flags = libc::O_PATH | libc::O_NOFOLLOW;
        let beneath = libc::RESOLVE_BENEATH;
        let there = match open_under(parent, &name_c, flags, 0, beneath) {
            Ok(there) => File::from(there).metadata()?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(e),
        };
        match (there.is_dir(), wanted_directory) {
            (true, true) => Ok(()),
            (false, false) => match remove(parent, &name_c) {
                // A mount point, such as /etc/hosts: written to instead of replaced.
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => Ok(()),
                other => other,
            },
            // A link to a directory is as good as the directory.
            (false, true) if there.is_symlink() && self.is_directory(path) => Ok(()),
            _ if !self.rules.replace_kind => Err(io::Error::other(if wanted_directory {
                "A directory cannot replace what is no directory"
            } else {
                "What is no directory cannot replace a directory"
            })),
            (true, false) => fs::remove_dir_all(self.path.join(path)),
            (false, true) => remove(parent, &name_c),
        }
    }

    fn is_directory(&self, path: &Path) -> bool {
        self.open(path, libc::O_PATH | libc::O_DIRECTORY).is_ok()
    }

    fn owner(&self, entry: &Entry<'_, impl Read>) -> (u32, u32) {
        let id = |n: io::Result<u64>| n.ok().and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
        if self.rules.keep_owner { (id(entry.header().uid()), id(entry.header().gid())) } else { (0, 0) }
    }

    /// Gives a file or directory its owner, permissions and time, in this order: a change of
    /// owner clears set-id bits.
    fn dress(&self, entry: &Entry<'_, impl Read>, file: &OwnedFd) -> io::Result<()> {
        let (uid, gid) = self.owner(entry);
        let mode = entry.header().mode().unwrap_or(0o644) & 0o7777;
        // SAFETY: no memory arguments.
        check(unsafe { libc::fchown(file.as_raw_fd(), uid, gid) })?;
        // SAFETY: as above.
        check(unsafe { libc::fchmod(file.as_raw_fd(), mode) })?;
        stamp(file, entry.header().mtime().unwrap_or(0))
    }

    fn symlink(&self, entry: &Entry<'_, impl Read>, parent: &OwnedFd, name: &CString) -> io::Result<()> {
        let target = entry.link_name_bytes().ok_or(io::ErrorKind::InvalidData)?;
        let target = cstring(&*target)?;
        let parent = parent.as_raw_fd();
        // SAFETY: zero-terminated strings that outlive the call.
        check(unsafe { libc::symlinkat(target.as_ptr(), parent, name.as_ptr()) })?;
        let (uid, gid) = self.owner(entry);
        let flags = libc::AT_SYMLINK_NOFOLLOW;
        // SAFETY: as above.
        check(unsafe { libc::fchownat(parent, name.as_ptr(), uid, gid, flags) }).map(drop)
    }

    /// A further name for something the archive (or the directory) has.
    fn hard_link(&self, entry: &Entry<'_, impl Read>, parent: &OwnedFd, name: &CString) -> io::Result<()> {
        let target = entry.link_name()?.ok_or(io::ErrorKind::InvalidData)?;
        let leaves = |_| io::Error::from_raw_os_error(libc::EXDEV);
        let target = inside(&target).map_err(leaves)?;
        let (directory, target) = self.parent(&target)?;
        let target = cstring(target.as_bytes())?;
        // SAFETY: zero-terminated strings that outlive the call; links are not followed.
        check(unsafe {
            libc::linkat(directory.as_raw_fd(), target.as_ptr(), parent.as_raw_fd(), name.as_ptr(), 0)
        })
        .map(drop)
    }

    fn node(&self, entry: &Entry<'_, impl Read>, parent: &OwnedFd, name: &CString) -> io::Result<()> {
        let header = entry.header();
        let kind = match header.entry_type() {
            EntryType::Char => libc::S_IFCHR,
            EntryType::Block => libc::S_IFBLK,
            _ => libc::S_IFIFO,
        };
        let number = |n: io::Result<Option<u32>>| n.ok().flatten().unwrap_or(0);
        let device = libc::makedev(number(header.device_major()), number(header.device_minor()));
        let mode = header.mode().unwrap_or(0o600) & 0o7777;
        let (uid, gid) = self.owner(entry);
        let parent = parent.as_raw_fd();
        // SAFETY: zero-terminated strings that outlive the calls.
        unsafe {
            check(libc::mknodat(parent, name.as_ptr(), kind | mode, device))?;
            let flags = libc::AT_SYMLINK_NOFOLLOW;
            check(libc::fchownat(parent, name.as_ptr(), uid, gid, flags))?;
        }
        Ok(())
    }
}

fn fine_if_there(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

fn make_directory(parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
    let name = cstring(name.as_bytes())?;
    // SAFETY: a zero-terminated string that outlives the call.
    check(unsafe { libc::mkdirat(parent.as_raw_fd(), name.as_ptr(), 0o755) }).map(drop)
}

fn remove(parent: &OwnedFd, name: &CString) -> io::Result<()> {
    // SAFETY: a zero-terminated string that outlives the call.
    check(unsafe { libc::unlinkat(parent.as_raw_fd(), name.as_ptr(), 0) }).map(drop)
}

fn create(parent: &OwnedFd, name: &CString) -> io::Result<OwnedFd> {
    let flags =
        libc::O_WRONLY | libc::O_CREAT | libc::O_TRUNC | libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    open_under(parent, name, flags, 0o600, libc::RESOLVE_BENEATH)
}

fn stamp(file: &OwnedFd, mtime: u64) -> io::Result<()> {
    let time = libc::timespec { tv_sec: i64::try_from(mtime).unwrap_or(0), tv_nsec: 0 };
    // SAFETY: two readable timespecs.
    check(unsafe { libc::futimens(file.as_raw_fd(), [time, time].as_ptr()) }).map(drop)
}
