//! From a path or a descriptor to a [`Disk`], or to the one sentence that says why not.

use std::{
    fs::File,
    io,
    mem::MaybeUninit,
    os::{
        fd::AsRawFd,
        unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::{Mutex, atomic::AtomicBool},
};

use super::{Alignment, Disk, Geometry, SECTOR, lock};

// linux/fs.h, which the bindings lack: size of a block device in bytes (`_IOR(0x12, 114, size_t)`).
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;
const TMPFS_MAGIC: u64 = 0x0102_1994;
const RAMFS_MAGIC: u64 = 0x8584_58f6;
/// What `O_DIRECT` surely accepts where the kernel does not tell.
const SAFE_ALIGNMENT: u32 = 4096;

/// How a disk is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiskOptions {
    /// Opens and locks for reading only.
    pub read_only: bool,
    /// Goes around the host's page cache (`O_DIRECT`).
    pub direct: bool,
}

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Nothing is at the path.
    #[error("Disk {path:?} does not exist")]
    Missing {
        /// The path asked for.
        path: PathBuf,
    },
    /// The path is a directory.
    #[error("Disk {path:?} is a directory; a disk is a raw image file or a block device")]
    Directory {
        /// The path asked for.
        path: PathBuf,
    },
    /// The path is a pipe, a socket, a terminal or the like.
    #[error("Disk {path:?} is neither a regular file nor a block device")]
    Kind {
        /// The path asked for.
        path: PathBuf,
    },
    /// The permissions do not allow it.
    #[error("Disk {path:?} may not be opened for {access}; check its permissions and owner")]
    Permission {
        /// The path asked for.
        path: PathBuf,
        /// `reading`, or `reading and writing`.
        access: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The file is on a read-only file system or device and writing was asked for.
    #[error("Disk {path:?} can only be read here; attach it read-only")]
    ReadOnlyHost {
        /// The path asked for.
        path: PathBuf,
    },
    /// Another disk, of this machine or another, holds a lock that excludes this one.
    #[error(
        "Disk {path:?} is in use by another machine or program; a disk has one writer, \
         or any number of readers when every one attaches it read-only"
    )]
    InUse {
        /// The path asked for.
        path: PathBuf,
    },
    /// Less than one sector, or with direct I/O less than one block.
    #[error("Disk {path:?} holds {bytes} bytes; the least is one block of {unit} bytes")]
    Empty {
        /// The path asked for.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The least there must be.
        unit: u64,
    },
    /// The file system has no `O_DIRECT`.
    #[error("Disk {path:?} is on a file system without direct I/O; turn direct I/O off for it")]
    Direct {
        /// The path asked for.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A descriptor that was handed in is not open for writing, or the like.
    #[error("Disk {path:?} was handed in as a descriptor that is not open for {access}")]
    Descriptor {
        /// The name it was given.
        path: PathBuf,
        /// `reading`, or `reading and writing`.
        access: &'static str,
    },
    /// Anything else the kernel said.
    #[error("Disk {path:?}: {what} failed")]
    Host {
        /// The path asked for.
        path: PathBuf,
        /// Which step.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl Disk {
    /// Opens, checks, locks and measures the disk at `path`.
    pub fn open(path: &Path, options: DiskOptions) -> Result<Disk, DiskError> {
        // A pipe would block the open and a terminal would take us over: both are found out
        // on the opened descriptor, so that no swap of the path in between matters.
        let mut flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        if options.direct {
            flags |= libc::O_DIRECT;
        }
        let opened = File::options().read(true).write(!options.read_only).custom_flags(flags).open(path);
        let file = opened.map_err(|source| open_error(path, options, source))?;
        let kind = kind(&file, path)?;
        set_flags(&file, options.direct).map_err(|source| host(path, "Setting its flags", source))?;
        Disk::finish(file, path.to_owned(), options, &kind)
    }

    /// Takes a disk that somebody else opened; `name` is what messages call it. The
    /// descriptor must be open for what `options` asks; `O_DIRECT` is set or cleared on it.
    pub fn from_file(file: File, name: &Path, options: DiskOptions) -> Result<Disk, DiskError> {
        Disk::check(&file, name, options)?;
        let kind = kind(&file, name)?;
        set_flags(&file, options.direct)
            .map_err(|source| DiskError::Direct { path: name.to_owned(), source })?;
        let disk = Disk::finish(file, name.to_owned(), options, &kind)?;
        Ok(Disk { given: true, ..disk })
    }

    /// Says whether [`Disk::from_file`] could take this file, as far as looking at it tells.
    pub fn check(file: &File, name: &Path, options: DiskOptions) -> Result<(), DiskError> {
        kind(file, name)?;
        // SAFETY: F_GETFL takes no pointer.
        let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
        let mode = flags & libc::O_ACCMODE;
        let enough = mode == libc::O_RDWR || options.read_only && mode == libc::O_RDONLY;
        // A descriptor that stands for a place alone (O_PATH) says that it is open for reading.
        if flags < 0 || flags & libc::O_PATH != 0 || !enough {
            return Err(DiskError::Descriptor { path: name.to_owned(), access: access(options) });
        }
        Ok(())
    }

    /// Opens the disk that is at `path` now, for a machine that runs on this one. The same
    /// file is measured again and keeps its lock and its history of failed flushes; another
    /// file is opened like any disk.
    pub fn reopen(&self, path: Option<&Path>) -> Result<Disk, DiskError> {
        let own = self.given && path.is_none();
        let path = path.unwrap_or(&self.path);
        // The name of a file that was given is no path.
        let same = match path.metadata() {
            _ if own => true,
            Ok(found) => (found.dev(), found.ino()) == self.identity,
            Err(_) => path == self.path,
        };
        if !same {
            return Disk::open(path, self.options);
        }
        let file =
            self.file.try_clone().map_err(|source| host(path, "Duplicating its descriptor", source))?;
        let kind = kind(&file, path)?;
        let disk = Disk::finish(file, path.to_owned(), self.options, &kind)?;
        let disk = Disk { given: own, ..disk };
        if self.flush_failed() {
            disk.set_flush_failed();
        }
        Ok(disk)
    }

    fn finish(file: File, path: PathBuf, options: DiskOptions, kind: &Kind) -> Result<Disk, DiskError> {
        match lock::lock(&file, options.read_only, &path) {
            Ok(()) => {}
            Err(lock::LockError::Held) => return Err(DiskError::InUse { path }),
            Err(lock::LockError::Host(source)) => return Err(host(&path, "Locking it", source)),
        }
        let block_device = kind.block_device;
        let bytes = bytes(&file, block_device).map_err(|source| host(&path, "Measuring it", source))?;
        let direct = options.direct.then(|| alignment(&file, block_device));
        // What is no whole block cannot be written directly without growing the file.
        let unit = direct.map_or(SECTOR, |d| u64::from(d.offset));
        if bytes < unit {
            return Err(DiskError::Empty { path, bytes, unit });
        }
        let rest = bytes % unit;
        if rest != 0 {
            let name = path.display();
            log::warn!("Disk {name} has {bytes} bytes: the last {rest} are no whole block and out of reach");
        }
        let geometry = geometry(&file, kind, direct);
        Ok(Disk {
            path,
            options,
            given: false,
            identity: kind.identity,
            block_device,
            memory_backed: !block_device && is_memory_backed(&file),
            sectors: (bytes - rest) / SECTOR,
            geometry,
            direct,
            flush_failed: AtomicBool::new(false),
            zeroing: 0.into(),
            patching: Mutex::new(()),
            file,
        })
    }
}

struct Kind {
    block_device: bool,
    identity: (u64, u64),
    preferred: u64,
}

fn kind(file: &File, path: &Path) -> Result<Kind, DiskError> {
    let found = file.metadata().map_err(|source| host(path, "Looking at it", source))?;
    let block_device = found.file_type().is_block_device();
    if found.is_dir() {
        return Err(DiskError::Directory { path: path.to_owned() });
    }
    if !block_device && !found.is_file() {
        return Err(DiskError::Kind { path: path.to_owned() });
    }
    Ok(Kind { block_device, identity: (found.dev(), found.ino()), preferred: found.blksize() })
}

fn open_error(path: &Path, options: DiskOptions, source: io::Error) -> DiskError {
    let path = path.to_owned();
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => DiskError::Missing { path },
        Some(libc::EISDIR) => DiskError::Directory { path },
        Some(libc::ENXIO | libc::ENODEV) => DiskError::Kind { path },
        Some(libc::EROFS) => DiskError::ReadOnlyHost { path },
        Some(libc::EACCES | libc::EPERM) => DiskError::Permission { path, access: access(options), source },
        Some(libc::EINVAL) if options.direct => DiskError::Direct { path, source },
        _ => DiskError::Host { path, what: "Opening it", source },
    }
}

fn access(options: DiskOptions) -> &'static str {
    if options.read_only { "reading" } else { "reading and writing" }
}

fn host(path: &Path, what: &'static str, source: io::Error) -> DiskError {
    DiskError::Host { path: path.to_owned(), what, source }
}

/// Leaves `O_DIRECT` alone of the flags that can change: a non-blocking regular file would
/// make the ring give up where it should wait.
fn set_flags(file: &File, direct: bool) -> io::Result<()> {
    let flags = if direct { libc::O_DIRECT } else { 0 };
    // SAFETY: F_SETFL takes a number.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn bytes(file: &File, block_device: bool) -> io::Result<u64> {
    if !block_device {
        return Ok(file.metadata()?.len());
    }
    ask(file, BLKGETSIZE64)
}

/// An ioctl of a block device that answers with one number of at most 64 bits.
fn ask(file: &File, request: libc::Ioctl) -> io::Result<u64> {
    let mut answer = 0u64;
    // SAFETY: the requests used here write 4 or 8 bytes to the pointer.
    match unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut answer) } {
        0 => Ok(answer),
        _ => Err(io::Error::last_os_error()),
    }
}

fn is_memory_backed(file: &File) -> bool {
    let mut about = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the kernel fills the whole struct when it returns 0.
    let kind = unsafe {
        if libc::fstatfs(file.as_raw_fd(), about.as_mut_ptr()) != 0 {
            return false;
        }
        about.assume_init().f_type
    };
    matches!(kind as u64, TMPFS_MAGIC | RAMFS_MAGIC)
}

fn alignment(file: &File, block_device: bool) -> Alignment {
    let mut about = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the empty path means the descriptor itself; the kernel fills at most the struct.
    let done = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            about.as_mut_ptr(),
        )
    };
    // SAFETY: zeroed above, and plain numbers.
    let about = unsafe { about.assume_init() };
    let (memory, offset) = (about.stx_dio_mem_align, about.stx_dio_offset_align);
    let told = done == 0 && about.stx_mask & libc::STATX_DIOALIGN != 0;
    if told && memory.is_power_of_two() && offset.is_power_of_two() && memory.max(offset) <= 65536 {
        return Alignment { memory, offset: offset.max(SECTOR as u32) };
    }
    let logical = block_device.then(|| ask(file, libc::BLKSSZGET).ok()).flatten();
    let offset = logical.and_then(|n| u32::try_from(n).ok()).filter(|n| valid_block(*n));
    Alignment { memory: SAFE_ALIGNMENT, offset: offset.unwrap_or(SAFE_ALIGNMENT) }
}

fn geometry(file: &File, kind: &Kind, direct: Option<Alignment>) -> Geometry {
    let number = |request| ask(file, request).ok().and_then(|n| u32::try_from(n).ok());
    if kind.block_device {
        let logical = number(libc::BLKSSZGET).filter(|n| valid_block(*n)).unwrap_or(SECTOR as u32);
        let physical = number(libc::BLKPBSZGET).filter(|n| valid_block(*n)).unwrap_or(logical);
        let optimal = number(libc::BLKIOOPT).unwrap_or(0);
        // Without O_DIRECT the page cache takes any sector.
        let logical = direct.map_or(SECTOR as u32, |_| logical);
        return Geometry { logical, physical: physical.max(logical), optimal };
    }
    let logical = direct.map_or(SECTOR as u32, |d| d.offset);
    let physical = u32::try_from(kind.preferred).ok().filter(|n| valid_block(*n)).unwrap_or(logical);
    Geometry { logical, physical: physical.clamp(logical, 4096.max(logical)), optimal: 0 }
}

fn valid_block(size: u32) -> bool {
    size.is_power_of_two() && (SECTOR as u32..=65536).contains(&size)
}

#[cfg(test)]
mod tests {
    use std::{ffi::CString, os::unix::ffi::OsStrExt};

    use super::*;

    fn image(bytes: u64) -> tempfile::NamedTempFile {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(bytes).unwrap();
        image
    }

    fn refused(path: &Path, read_only: bool) -> DiskError {
        Disk::open(path, DiskOptions { read_only, direct: false }).unwrap_err()
    }

    #[test]
    fn what_is_not_a_disk_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(refused(&dir.path().join("none"), false), DiskError::Missing { .. }));
        assert!(matches!(refused(dir.path(), false), DiskError::Directory { .. }));
        assert!(matches!(refused(dir.path(), true), DiskError::Directory { .. }));
        assert!(matches!(refused(Path::new("/dev/null"), false), DiskError::Kind { .. }));
        let pipe = dir.path().join("pipe");
        let name = CString::new(pipe.as_os_str().as_bytes()).unwrap();
        // SAFETY: the name is a C string.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        assert!(matches!(refused(&pipe, true), DiskError::Kind { .. }));
        assert!(matches!(refused(image(511).path(), false), DiskError::Empty { bytes: 511, .. }));
    }

    #[test]
    fn a_rest_below_a_sector_is_out_of_reach() {
        let image = image(1024 + 511);
        assert_eq!(Disk::open(image.path(), DiskOptions::default()).unwrap().sectors(), 2);
    }

    #[test]
    fn a_second_writer_is_kept_out_until_the_first_is_gone() {
        let image = image(4096);
        let first = Disk::open(image.path(), DiskOptions::default()).unwrap();
        let error = refused(image.path(), true);
        assert!(matches!(error, DiskError::InUse { .. }));
        assert!(error.to_string().contains("in use by another"));
        drop(first);
        let readers =
            [(); 2].map(|()| Disk::open(image.path(), DiskOptions { read_only: true, direct: false }));
        assert!(readers.iter().all(Result::is_ok));
        assert!(matches!(refused(image.path(), false), DiskError::InUse { .. }));
    }

    #[test]
    fn a_descriptor_must_be_open_for_what_is_asked() {
        let image = image(4096);
        let name = Path::new("fd");
        let reader = || File::open(image.path()).unwrap();
        let refused = Disk::from_file(reader(), name, DiskOptions::default()).unwrap_err();
        assert!(matches!(refused, DiskError::Descriptor { .. }));
        let disk = Disk::from_file(reader(), name, DiskOptions { read_only: true, direct: false }).unwrap();
        assert_eq!(disk.sectors(), 8);
    }

    #[test]
    fn a_reopened_file_is_measured_again_under_its_old_lock() {
        let image = image(4096);
        let disk = Disk::open(image.path(), DiskOptions::default()).unwrap();
        disk.set_flush_failed();
        image.as_file().set_len(8192).unwrap();
        let again = disk.reopen(None).unwrap();
        assert_eq!((disk.sectors(), again.sectors()), (8, 16));
        assert!(again.flush_failed(), "the lost data is still lost");
        drop(disk);
        assert!(matches!(refused(image.path(), false), DiskError::InUse { .. }));
        let other = tempfile::NamedTempFile::new().unwrap();
        other.as_file().set_len(512).unwrap();
        let moved = again.reopen(Some(other.path())).unwrap();
        assert!(moved.sectors() == 1 && !moved.flush_failed());
    }
}
