//! How a snapshot appears: whole, or not at all.
//!
//! ```text
//!   parent/.nacelle-snapshot-<32 digits>.tmp/   made, locked (flock), filled, each file synced
//!        │ sync it, rename (NOREPLACE), or exchange with the one that is replaced
//!   parent/TARGET/                              then sync parent, remove what was replaced
//! ```
//!
//! A writer that is killed leaves its directory behind, and its lock goes with it: the next
//! writer beside it sweeps every such directory whose lock it gets. A writer that fails removes
//! its own. Removing never follows a link or goes into a directory, so that nothing but the
//! files of a snapshot is ever removed.

use std::{
    fs::File,
    io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::fs::{self, AtFlags, FlockOperation, Mode, OFlags};

use super::{
    SnapshotError,
    digest::Id,
    disk::{Disk, open_directory, write_whole},
    error::doing,
    manifest,
};

const PREFIX: &str = ".nacelle-snapshot-";
const SUFFIX: &str = ".tmp";

/// Where a snapshot is to appear.
#[derive(Debug, Clone, Default)]
pub struct Destination {
    /// The directory that will be it.
    pub path: PathBuf,
    /// A snapshot that is there already is replaced, in one step.
    pub replace: bool,
    /// Directories and files that the machine runs from, which are never replaced.
    pub running_from: Vec<PathBuf>,
}

impl Destination {
    /// A new directory, which must not exist.
    pub fn new(path: impl Into<PathBuf>) -> Destination {
        Destination { path: path.into(), ..Destination::default() }
    }

    /// The same, replacing what is there.
    pub fn replacing(path: impl Into<PathBuf>) -> Destination {
        Destination { replace: true, ..Destination::new(path) }
    }
}

/// A snapshot directory in the making. Dropped before it is published, it is removed.
pub struct Draft {
    disk: Arc<dyn Disk>,
    destination: Destination,
    target: String,
    parent: File,
    temporary: String,
    /// Locked (`flock`) as long as it is open.
    directory: File,
    /// The temporary name is ours to remove.
    ours: bool,
}

impl Draft {
    /// Sweeps what killed writers left beside `destination`, checks that it is free or may be
    /// replaced, and makes the temporary directory.
    pub fn begin(disk: Arc<dyn Disk>, destination: Destination) -> Result<Draft, SnapshotError> {
        let path = destination.path.clone();
        let (parent, target) = split(&path)?;
        let parent = doing(open_directory(&parent), || format!("{} cannot be opened", parent.display()))?;
        sweep(&parent);
        let cannot = || format!("Beside {} no directory can be made", path.display());
        let temporary = format!("{PREFIX}{}{SUFFIX}", doing(Id::random(), cannot)?);
        if !is_free(&parent, &target, &destination)? && !destination.replace {
            return Err(SnapshotError::Exists { path });
        }
        doing(disk.make_directory(parent.as_fd(), &temporary), cannot)?;
        let opened = open_beneath(&parent, &temporary).and_then(|d| hold(&parent, &temporary, d));
        let directory = opened.inspect_err(|_| {
            let _ = fs::unlinkat(&parent, temporary.as_str(), AtFlags::REMOVEDIR);
        });
        let directory = doing(directory, cannot)?;
        Ok(Draft { disk, destination, target, parent, temporary, directory, ours: true })
    }

    /// The temporary directory.
    pub fn directory(&self) -> &File {
        &self.directory
    }

    /// Where it will appear.
    pub fn path(&self) -> &Path {
        &self.destination.path
    }

    /// Makes a file in it.
    pub fn create(&self, name: &str) -> Result<File, SnapshotError> {
        doing(self.disk.create(self.directory.as_fd(), name), || self.cannot(name))
    }

    /// Makes a file with these bytes in it, and brings them to the disk.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), SnapshotError> {
        doing(write_whole(&*self.disk, &self.directory, name, bytes), || self.cannot(name))
    }

    fn cannot(&self, name: &str) -> String {
        format!("{name} of snapshot {} cannot be written", self.path().display())
    }

    /// Makes the directory the snapshot of its destination. All its files are on the disk.
    pub fn publish(mut self) -> Result<(), SnapshotError> {
        let cannot = |path: &Path| format!("Snapshot {} cannot be published", path.display());
        let path = self.path().to_owned();
        doing(self.disk.sync(&self.directory), || cannot(&path))?;
        let at = self.parent.as_fd();
        let exchanged = match self.disk.rename_new(at, &self.temporary, &self.target) {
            Ok(()) => false,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && self.destination.replace => {
                // Somebody may have put something else there since we looked.
                is_free(&self.parent, &self.target, &self.destination)?;
                doing(self.disk.exchange(at, &self.temporary, &self.target), || cannot(&path))?;
                true
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Err(SnapshotError::Exists { path }),
            Err(e) => return doing(Err(e), || cannot(&path)),
        };
        if let Err(e) = self.disk.sync(&self.parent) {
            // The caller is told that it failed, so it must not be there.
            let undone = if exchanged {
                self.disk.exchange(at, &self.temporary, &self.target)
            } else {
                self.disk.rename_new(at, &self.target, &self.temporary)
            };
            self.ours = undone.is_ok();
            return doing(Err(e), || cannot(&path));
        }
        // After an exchange the temporary name holds what was replaced.
        self.ours = exchanged;
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.ours {
            let _ = remove_flat(&self.parent, &self.temporary);
        }
    }
}

/// Removes the snapshot at `path`: first its name, in one step, then its files.
pub fn remove(disk: &dyn Disk, path: &Path) -> Result<(), SnapshotError> {
    let cannot = || format!("Snapshot {} cannot be removed", path.display());
    let (parent, target) = split(path)?;
    let parent = doing(open_directory(&parent), cannot)?;
    sweep(&parent);
    if is_free(&parent, &target, &Destination::replacing(path))? {
        return Err(SnapshotError::NotASnapshot { path: path.into() });
    }
    let temporary = format!("{PREFIX}{}{SUFFIX}", doing(Id::random(), cannot)?);
    doing(disk.rename_new(parent.as_fd(), &target, &temporary), cannot)?;
    doing(disk.sync(&parent), cannot)?;
    doing(remove_flat(&parent, &temporary), cannot)
}

/// Directory and name of a path, with `..` and links of all but the name resolved.
pub(crate) fn split(path: &Path) -> Result<(PathBuf, String), SnapshotError> {
    let wrong = || SnapshotError::Request(format!("{} does not name a directory to be", path.display()));
    let name = path.file_name().and_then(|n| n.to_str()).ok_or_else(wrong)?;
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok((parent.to_owned(), name.to_owned()))
}

/// Whether nothing is called `target`. What is there must be a snapshot that may be replaced.
fn is_free(parent: &File, target: &str, destination: &Destination) -> Result<bool, SnapshotError> {
    let path = || destination.path.clone();
    let found = match fs::statat(parent, target, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(found) => found,
        Err(rustix::io::Errno::NOENT) => return Ok(true),
        Err(e) => return doing(Err(e), || format!("{} cannot be looked at", destination.path.display())),
    };
    if !destination.replace {
        return Ok(false);
    }
    let directory = open_beneath(parent, target).map_err(|_| SnapshotError::NotASnapshot { path: path() })?;
    if fs::statat(&directory, manifest::FILE, AtFlags::SYMLINK_NOFOLLOW).is_err() {
        return Err(SnapshotError::NotASnapshot { path: path() });
    }
    let mut avoided = destination.running_from.iter().filter_map(|p| std::fs::metadata(p).ok());
    let inside = |name: &std::ffi::CStr, m: &std::fs::Metadata| {
        fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|s| (s.st_dev, s.st_ino) == (m.dev(), m.ino()))
    };
    let runs_from = avoided.any(|m| {
        (m.dev(), m.ino()) == (found.st_dev, found.st_ino)
            || names(&directory).is_ok_and(|names| names.iter().any(|name| inside(name, &m)))
    });
    if runs_from { Err(SnapshotError::InUse { path: path() }) } else { Ok(false) }
}

/// Opens directory `name` and nothing that it links to.
fn open_beneath(at: &File, name: &str) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(fs::openat(at, name, flags, Mode::empty())?.into())
}

/// Locks the directory that was just made; an error if a sweeper was quicker.
fn hold(parent: &File, name: &str, directory: File) -> io::Result<File> {
    fs::flock(&directory, FlockOperation::NonBlockingLockExclusive)?;
    let (ours, named) = (directory.metadata()?, fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?);
    if (ours.dev(), ours.ino()) == (named.st_dev, named.st_ino) {
        return Ok(directory);
    }
    Err(io::Error::from(io::ErrorKind::NotFound))
}

fn names(directory: &File) -> io::Result<Vec<std::ffi::CString>> {
    let entries = fs::Dir::read_from(directory)?;
    let names = entries.map(|e| e.map(|e| e.file_name().to_owned()));
    let names = names.collect::<Result<Vec<_>, _>>()?;
    Ok(names.into_iter().filter(|n| ![c".", c".."].contains(&n.as_c_str())).collect())
}

/// Removes a directory that holds nothing but files.
fn remove_flat(parent: &File, name: &str) -> io::Result<()> {
    let directory = open_beneath(parent, name)?;
    for file in names(&directory)? {
        fs::unlinkat(&directory, &file, AtFlags::empty())?;
    }
    Ok(fs::unlinkat(parent, name, AtFlags::REMOVEDIR)?)
}

/// Removes what writers that are gone left beside `path`.
pub fn sweep_beside(path: &Path) {
    let parent = path.parent().map(open_directory);
    if let Some(Ok(parent)) = parent {
        sweep(&parent);
    }
}

/// Removes what writers that are gone left in `parent`; returns how many directories. What
/// cannot be removed stays for the next time.
pub(crate) fn sweep(parent: &File) -> usize {
    let abandoned = |name: &&str| {
        let Ok(directory) = open_beneath(parent, name) else { return false };
        fs::flock(&directory, FlockOperation::NonBlockingLockExclusive).is_ok()
            && remove_flat(parent, name).is_ok()
    };
    let names = names(parent).unwrap_or_default();
    let names = names.iter().filter_map(|n| n.to_str().ok());
    let drafts = names.filter(|n| {
        let middle = n.strip_prefix(PREFIX).and_then(|n| n.strip_suffix(SUFFIX));
        middle.is_some_and(|m| Id::parse(m).is_some())
    });
    drafts.filter(abandoned).count()
}
