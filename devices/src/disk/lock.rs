//! One writer or many readers, among all processes that ask.
//!
//! The lock is an *open file description* lock (fcntl(2), `F_OFD_SETLK`) over the whole
//! file. It belongs to the opened file, not to the process: two disks of one machine with
//! the same image exclude each other too, closing some other descriptor of the file does not
//! drop it, and it goes with a descriptor that is handed to another process. It ends with
//! the descriptor, however the process dies.
//!
//! A ring of a killed process keeps its disk open until the kernel has taken it apart, some
//! milliseconds after the process is gone. So a lock that is held is asked for again, for a
//! short while, before that is believed.
//!
//! It is advisory. File systems without locks (some network mounts) are used without, with
//! a warning.

use std::{
    fs::File,
    io,
    os::fd::AsRawFd,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use crate::limits::DISK_LOCK_PATIENCE;

/// Why no lock was had.
#[derive(Debug)]
pub(crate) enum LockError {
    /// Somebody else holds a lock that excludes this one.
    Held,
    /// The kernel said something else.
    Host(io::Error),
}

/// Takes the lock, exclusive for a writer, shared for a reader; waits for it no longer than
/// [`DISK_LOCK_PATIENCE`].
pub(crate) fn lock(file: &File, read_only: bool, path: &Path) -> Result<(), LockError> {
    let end = Instant::now() + DISK_LOCK_PATIENCE;
    loop {
        match try_lock(file, read_only, path) {
            Err(LockError::Held) if Instant::now() < end => thread::sleep(Duration::from_millis(5)),
            done => return done,
        }
    }
}

/// As [`lock`], without waiting at all.
pub(super) fn try_lock(file: &File, read_only: bool, path: &Path) -> Result<(), LockError> {
    let kind = if read_only { libc::F_RDLCK } else { libc::F_WRLCK };
    // SAFETY: all-zero is a valid `flock`: the whole file, from its start.
    let mut what: libc::flock = unsafe { std::mem::zeroed() };
    what.l_type = kind as libc::c_short;
    what.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: `what` outlives the call, which only reads it.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const what) };
    if done == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Err(LockError::Held),
        Some(libc::ENOLCK | libc::ENOSYS | libc::EINVAL | libc::EOPNOTSUPP) => {
            log::warn!("{} cannot be locked, so nothing keeps a second writer out: {error}", path.display());
            Ok(())
        }
        _ => Err(LockError::Host(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &Path) -> File {
        File::options().read(true).write(true).open(path).unwrap()
    }

    #[test]
    fn many_readers_or_one_writer_hold_a_file() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let path = image.path();
        let (first, second, third) = (open(path), open(path), open(path));
        lock(&first, true, path).unwrap();
        lock(&second, true, path).unwrap();
        assert!(matches!(lock(&third, false, path), Err(LockError::Held)));
        drop((first, second));
        lock(&third, false, path).unwrap();
        assert!(matches!(lock(&open(path), true, path), Err(LockError::Held)));
    }
}
