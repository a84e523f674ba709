//! A file of the host as memory: opened, checked, locked and mapped.
//!
//! ```text
//!   file            |######################|
//!   host addresses  |## the file, shared ##|.. zeroes ..|
//!                   ^ a multiple of 2 MiB               ^ likewise
//! ```
//!
//! The guest sees whole 2 MiB (it maps huge pages); behind the file's end it finds memory of
//! its own that goes with the machine. The host's address is a multiple of 2 MiB as well, so
//! that a huge page of the host backs one of the guest where the file system has some.
//!
//! **Read-only** is kept by the host three times: the descriptor cannot write, the mapping can
//! neither write nor be made to, and the memory slot made of it is to be a read-only one. A
//! guest that writes leaves to the monitor, where nothing takes the write.
//!
//! **A file that shrinks** under a running machine takes its pages along. Nothing here reads or
//! writes through the mapping, and it is no part of [`crate::Memory`], so no device does; what
//! would be `SIGBUS` for a thread of the monitor cannot happen. A guest that touches a page that
//! is gone, or one that the file system has no room for, has its vCPU end with `EFAULT`: the
//! machine stops, the monitor lives and tells, and [`Backing::has_shrunk`] is the reason it can
//! give. Flushes of a file that shrank fail.

use std::{
    fs::File,
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use crate::disk::lock::{self, LockError};

/// What guest and host addresses, and the length in the guest, are multiples of: 2 MiB.
pub const ALIGNMENT: u64 = 2 << 20;
const PAGE: usize = 4096;

/// Why a file cannot be persistent memory.
#[derive(Debug, thiserror::Error)]
pub enum BackingError {
    /// Nothing is at the path.
    #[error("Persistent memory {path:?} does not exist")]
    Missing {
        /// The path asked for.
        path: PathBuf,
    },
    /// It is no regular file.
    #[error("Persistent memory {path:?} is a {what}; it must be a regular file")]
    Kind {
        /// The path asked for.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// It has no bytes.
    #[error("Persistent memory {path:?} is an empty file; its size is the size of the memory")]
    Empty {
        /// The path asked for.
        path: PathBuf,
    },
    /// The permissions, or the file system's, do not allow it.
    #[error("Persistent memory {path:?} may not be opened for {access}{hint}")]
    Permission {
        /// The path asked for.
        path: PathBuf,
        /// `reading`, or `reading and writing`.
        access: &'static str,
        /// What may help.
        hint: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Somebody else holds a lock that excludes this one.
    #[error(
        "Persistent memory {path:?} is in use by another machine or program; a file has one writer, \
         or any number of readers when every one attaches it read-only"
    )]
    InUse {
        /// The path asked for.
        path: PathBuf,
    },
    /// The file cannot be mapped.
    #[error("Persistent memory {path:?} of {mib} MiB cannot be mapped")]
    Map {
        /// The path asked for.
        path: PathBuf,
        /// Its size, rounded up.
        mib: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Anything else the kernel said.
    #[error("Persistent memory {path:?}: {what} failed")]
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

/// A file that is mapped and locked as long as this lives. The memory slot made of it must be
/// gone before.
#[derive(Debug)]
pub struct Backing {
    file: File,
    path: PathBuf,
    read_only: bool,
    file_len: u64,
    mapping: Mapping,
    /// A flush failed, so data the guest believes written may be gone; the kernel reports each
    /// loss only once.
    flush_failed: AtomicBool,
}

impl Backing {
    /// Opens, checks, locks and maps the file at `path`.
    pub fn open(path: &Path, read_only: bool) -> Result<Backing, BackingError> {
        // A pipe would block the open and a terminal would take us over: both are found out
        // on the opened descriptor, so that no swap of the path in between matters.
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let opened = File::options().read(true).write(!read_only).custom_flags(flags).open(path);
        let file = opened.map_err(|source| open_error(path, read_only, source))?;
        let file_len = check(&file, path)?;
        match lock::lock(&file, read_only, path) {
            Ok(()) => {}
            Err(LockError::Held) => return Err(BackingError::InUse { path: path.to_owned() }),
            Err(LockError::Host(source)) => return Err(host(path, "Locking it", source)),
        }
        let mapped = Mapping::of(&file, file_len, read_only);
        let mapping = mapped.map_err(|source| {
            let mib = file_len.div_ceil(ALIGNMENT).saturating_mul(ALIGNMENT >> 20);
            BackingError::Map { path: path.to_owned(), mib, source }
        })?;
        let flush_failed = AtomicBool::new(false);
        Ok(Backing { file, path: path.to_owned(), read_only, file_len, mapping, flush_failed })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where it is mapped in this process, a multiple of [`ALIGNMENT`]. Only for making a
    /// memory slot: the monitor itself never follows it.
    pub fn host_address(&self) -> *mut u8 {
        self.mapping.at
    }

    /// Bytes in the guest: the file's, rounded up to [`ALIGNMENT`].
    pub fn len(&self) -> u64 {
        self.mapping.len as u64
    }

    /// Whether it has no bytes, which none has.
    pub fn is_empty(&self) -> bool {
        self.mapping.len == 0
    }

    /// Bytes of the file when it was opened.
    pub fn file_len(&self) -> u64 {
        self.file_len
    }

    /// Whether writing is refused; the memory slot must be a read-only one then.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Whether the file is shorter than it was: the guest cannot touch all of it any more.
    pub fn has_shrunk(&self) -> bool {
        self.file.metadata().is_ok_and(|now| now.len() < self.file_len)
    }

    /// Puts on the medium what the guest wrote; waits for it. After a failure every flush
    /// fails until [`Backing::forgive`].
    pub fn flush(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        if self.has_shrunk() {
            let text = format!("The file is shorter than the {} bytes it had", self.file_len);
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
        }
        if self.flush_failed() {
            return Err(io::Error::other("An earlier flush failed, so data may be lost already"));
        }
        // Covers what was written through the mapping like msync(2), and cannot be confused by
        // pages that are gone.
        loop {
            match self.file.sync_data() {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    self.set_flush_failed();
                    return Err(e);
                }
                Ok(()) => return Ok(()),
            }
        }
    }

    /// Whether a flush failed.
    pub fn flush_failed(&self) -> bool {
        self.flush_failed.load(Ordering::Acquire)
    }

    /// Has every flush fail from now on.
    pub(super) fn set_flush_failed(&self) {
        self.flush_failed.store(true, Ordering::Release);
    }

    /// Forgets a failed flush: whoever might rely on it is gone.
    pub(super) fn forgive(&self) {
        self.flush_failed.store(false, Ordering::Release);
    }
}

fn host(path: &Path, what: &'static str, source: io::Error) -> BackingError {
    BackingError::Host { path: path.to_owned(), what, source }
}

fn open_error(path: &Path, read_only: bool, source: io::Error) -> BackingError {
    let path = path.to_owned();
    let access = if read_only { "reading" } else { "reading and writing" };
    let hint = match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => return BackingError::Missing { path },
        Some(libc::EISDIR) => return BackingError::Kind { path, what: "directory" },
        Some(libc::ENXIO | libc::ENODEV) => {
            return BackingError::Kind { path, what: "pipe, socket or device" };
        }
        Some(libc::EROFS) => "; its file system is read-only, so attach it read-only",
        Some(libc::ETXTBSY) => "; it is a program that runs",
        Some(libc::EACCES | libc::EPERM) => "; check its permissions and owner",
        _ => return BackingError::Host { path, what: "Opening it", source },
    };
    BackingError::Permission { path, access, hint, source }
}

/// The length of a file that can be persistent memory.
fn check(file: &File, path: &Path) -> Result<u64, BackingError> {
    let found = file.metadata().map_err(|source| host(path, "Looking at it", source))?;
    let kind = found.file_type();
    if !kind.is_file() {
        let kinds = [
            (kind.is_dir(), "directory"),
            (kind.is_fifo(), "pipe"),
            (kind.is_block_device(), "block device"),
            (kind.is_char_device(), "character device"),
        ];
        let what = kinds.iter().find(|(is, _)| *is).map_or("socket or the like", |(_, what)| what);
        return Err(BackingError::Kind { path: path.to_owned(), what });
    }
    if found.len() == 0 {
        return Err(BackingError::Empty { path: path.to_owned() });
    }
    Ok(found.len())
}

/// A range of this process's addresses, given back at the end.
#[derive(Debug)]
struct Mapping {
    at: *mut u8,
    len: usize,
}

// SAFETY: an address and a length; what lies there is never touched from here.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn of(file: &File, file_len: u64, read_only: bool) -> io::Result<Mapping> {
        let too_large = || io::Error::from(io::ErrorKind::FileTooLarge);
        let align = ALIGNMENT as usize;
        let bytes = usize::try_from(file_len).map_err(|_| too_large())?;
        let len = bytes.checked_next_multiple_of(align).ok_or_else(too_large)?;
        let room = len.checked_add(align).ok_or_else(too_large)?;
        let tail = bytes.next_multiple_of(PAGE);
        let access = if read_only { libc::PROT_READ } else { libc::PROT_READ | libc::PROT_WRITE };
        let quiet = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: the kernel chooses the place of the first mapping. All that follows replaces
        // or gives back parts of it; from `mapping` on its end is seen to.
        unsafe {
            let base = libc::mmap(std::ptr::null_mut(), room, libc::PROT_NONE, quiet, -1, 0);
            if base == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            let before = base.addr().next_multiple_of(align) - base.addr();
            let at = base.byte_add(before);
            if before > 0 {
                libc::munmap(base, before);
            }
            libc::munmap(at.byte_add(len), align - before);
            let mapping = Mapping { at: at.cast(), len };
            let shared = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE;
            if libc::mmap(at, bytes, access, shared, file.as_raw_fd(), 0) == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            if tail < len && libc::mprotect(at.byte_add(tail), len - tail, access) != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(mapping)
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is ours; by the contract of `Backing` no memory slot uses it any
        // more, and one that did would only find nothing there.
        unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use std::{ffi::CString, os::unix::ffi::OsStrExt};

    use super::*;

    const MIB: usize = 1 << 20;

    fn file(bytes: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        file
    }

    fn peek(backing: &Backing, offset: usize) -> u8 {
        assert!(offset < backing.mapping.len);
        // SAFETY: inside the mapping, and the test's file is as long as it was.
        unsafe { backing.mapping.at.add(offset).read_volatile() }
    }

    fn poke(backing: &Backing, offset: usize, value: u8) {
        assert!(offset < backing.mapping.len && !backing.read_only);
        // SAFETY: as above.
        unsafe { backing.mapping.at.add(offset).write_volatile(value) };
    }

    #[test]
    fn what_is_no_file_with_bytes_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |path: &Path, read_only| Backing::open(path, read_only).unwrap_err();
        assert!(matches!(refused(&dir.path().join("none"), false), BackingError::Missing { .. }));
        for read_only in [false, true] {
            let error = refused(dir.path(), read_only);
            assert!(error.to_string().contains("is a directory"), "{error}");
            let error = refused(Path::new("/dev/null"), read_only);
            assert!(error.to_string().contains("character device"), "{error}");
            assert!(matches!(refused(file(0).path(), read_only), BackingError::Empty { .. }));
        }
        let pipe = dir.path().join("pipe");
        let name = CString::new(pipe.as_os_str().as_bytes()).unwrap();
        // SAFETY: the name is a C string.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        for read_only in [false, true] {
            let error = refused(&pipe, read_only);
            assert!(error.to_string().contains("is a pipe"), "{error}");
        }
    }

    #[test]
    fn lengths_are_rounded_up_and_addresses_are_aligned() {
        for (bytes, len) in [(1, 2), (4096, 2), (2 << 20, 2), ((2 << 20) + 1, 4), (5 << 20, 6)] {
            for read_only in [false, true] {
                let file = file(bytes);
                let backing = Backing::open(file.path(), read_only).unwrap();
                assert_eq!((backing.file_len(), backing.len()), (bytes, len << 20));
                assert_eq!(backing.host_address().addr() % (2 * MIB), 0);
                let end = backing.mapping.len - 1;
                assert_eq!((peek(&backing, 0), peek(&backing, end)), (0, 0));
                assert_eq!(file.as_file().metadata().unwrap().len(), bytes);
            }
        }
    }

    #[test]
    fn writes_reach_the_file_and_those_behind_its_end_do_not() {
        let file = file(3 * MIB as u64 + 10);
        let backing = Backing::open(file.path(), false).unwrap();
        poke(&backing, 0, 1);
        poke(&backing, 3 * MIB + 9, 2);
        poke(&backing, 4 * MIB - 1, 3);
        backing.flush().unwrap();
        let bytes = std::fs::read(file.path()).unwrap();
        assert_eq!((bytes.len(), bytes[0], bytes[3 * MIB + 9]), (3 * MIB + 10, 1, 2));
        assert_eq!(peek(&backing, 4 * MIB - 1), 3);
    }

    #[test]
    fn a_read_only_mapping_shows_the_file_and_cannot_be_made_writable() {
        let file = file(2 * MIB as u64);
        std::os::unix::fs::FileExt::write_at(file.as_file(), b"x", 100).unwrap();
        let backing = Backing::open(file.path(), true).unwrap();
        assert_eq!(peek(&backing, 100), b'x');
        // SAFETY: would only make our own mapping writable; nobody writes.
        let done =
            unsafe { libc::mprotect(backing.mapping.at.cast(), 4096, libc::PROT_READ | libc::PROT_WRITE) };
        assert_eq!(done, -1);
        backing.flush().unwrap();
    }

    #[test]
    fn one_writer_or_many_readers_have_a_file() {
        let file = file(4096);
        let writer = Backing::open(file.path(), false).unwrap();
        assert!(matches!(Backing::open(file.path(), true), Err(BackingError::InUse { .. })));
        drop(writer);
        let first = Backing::open(file.path(), true).unwrap();
        let second = Backing::open(file.path(), true).unwrap();
        assert!(matches!(Backing::open(file.path(), false), Err(BackingError::InUse { .. })));
        drop((first, second));
        Backing::open(file.path(), false).unwrap();
    }

    #[test]
    fn a_file_that_shrank_fails_its_flushes_and_nothing_else() {
        let file = file(4 * MIB as u64);
        let backing = Backing::open(file.path(), false).unwrap();
        backing.flush().unwrap();
        file.as_file().set_len(4096).unwrap();
        assert!(backing.has_shrunk());
        assert_eq!(backing.flush().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        file.as_file().set_len(4 * MIB as u64).unwrap();
        backing.flush().unwrap();
    }

    #[test]
    fn after_a_failed_flush_none_succeeds_until_forgiven() {
        let file = file(4096);
        let backing = Backing::open(file.path(), false).unwrap();
        backing.set_flush_failed();
        assert!(backing.flush().is_err());
        backing.forgive();
        backing.flush().unwrap();
    }
}
