//! The system calls that change a file system, behind a trait, so that tests can fail each one.
//!
//! All names are plain and seen from an open directory: what a path leads to is decided once.
//! Files are for their owner alone, since guest memory holds secrets.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::FileExt,
    },
};

use rustix::fs::{self, AtFlags, Mode, OFlags, RenameFlags};

/// What a snapshot is written with.
pub trait Disk: Send + Sync {
    /// Makes directory `name`; an error if there is one.
    fn make_directory(&self, at: BorrowedFd<'_>, name: &str) -> io::Result<()> {
        Ok(fs::mkdirat(at, name, Mode::RWXU)?)
    }

    /// Makes file `name` for reading and writing; an error if there is one.
    fn create(&self, at: BorrowedFd<'_>, name: &str) -> io::Result<File> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(fs::openat(at, name, flags, Mode::RUSR | Mode::WUSR)?.into())
    }

    /// Writes all of `bytes` at `offset`.
    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        file.write_all_at(bytes, offset)
    }

    /// Makes `file` exactly `size` bytes, of which those never written are a hole.
    fn set_size(&self, file: &File, size: u64) -> io::Result<()> {
        file.set_len(size)
    }

    /// Brings a file, or the names of a directory, to the disk.
    fn sync(&self, file: &File) -> io::Result<()> {
        file.sync_all()
    }

    /// Gives the file `name` of directory `from` the same name in `to` as well.
    fn link(&self, from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &str) -> io::Result<()> {
        Ok(fs::linkat(from, name, to, name, AtFlags::empty())?)
    }

    /// Renames, where nothing of the new name exists.
    fn rename_new(&self, at: BorrowedFd<'_>, from: &str, to: &str) -> io::Result<()> {
        match fs::renameat_with(at, from, at, to, RenameFlags::NOREPLACE) {
            // Some file systems do not know the flag. A plain rename of a directory replaces
            // nothing but an empty directory, and one of a file is checked first.
            Err(rustix::io::Errno::INVAL) if fs::statat(at, to, AtFlags::SYMLINK_NOFOLLOW).is_err() => {
                Ok(fs::renameat(at, from, at, to)?)
            }
            result => Ok(result?),
        }
    }

    /// Renames a file; what has the new name is replaced.
    fn rename(&self, at: BorrowedFd<'_>, from: &str, to: &str) -> io::Result<()> {
        Ok(fs::renameat(at, from, at, to)?)
    }

    /// Exchanges two names in one step.
    fn exchange(&self, at: BorrowedFd<'_>, one: &str, other: &str) -> io::Result<()> {
        Ok(fs::renameat_with(at, one, at, other, RenameFlags::EXCHANGE)?)
    }
}

/// The host's disk.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostDisk;

impl Disk for HostDisk {}

/// Makes file `name` with these bytes and brings them to the disk.
pub(crate) fn write_whole(disk: &dyn Disk, at: &File, name: &str, bytes: &[u8]) -> io::Result<()> {
    let file = disk.create(at.as_fd(), name)?;
    disk.write_at(&file, bytes, 0)?;
    disk.sync(&file)
}

/// Opens directory `path`; a link in its last place is followed, as for any name a user gives.
pub(crate) fn open_directory(path: &std::path::Path) -> io::Result<File> {
    let path = if path.as_os_str().is_empty() { std::path::Path::new(".") } else { path };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(fs::open(path, flags, Mode::empty())?.into())
}

/// Opens the regular file `name` of a directory for reading, and nothing that it links to.
pub(crate) fn open_file(at: &File, name: &str) -> io::Result<File> {
    // Without NONBLOCK a FIFO put in the file's place would hold the reader for ever.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file: File = fs::openat(at, name, flags, Mode::empty())?.into();
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
    }
    Ok(file)
}

/// Reads the whole of file `name`, at most `cap` bytes.
pub(crate) fn read_whole(at: &File, name: &str, cap: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    read_into(at, name, cap, &mut bytes).map(|()| bytes)
}

/// The same in place of what `bytes` holds, whose room is used again.
pub(crate) fn read_into(at: &File, name: &str, cap: u64, bytes: &mut Vec<u8>) -> io::Result<()> {
    let file = open_file(at, name)?;
    let size = file.metadata()?.len();
    if size > cap {
        let text = format!("it has {size} bytes, more than the {cap} that are read");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    bytes.clear();
    bytes.reserve(size as usize);
    io::Read::read_to_end(&mut io::Read::take(file, cap), bytes)?;
    Ok(())
}

/// The next run of data in `file` from `offset`, before `end`; nothing if only a hole is left.
pub(crate) fn next_data(file: &File, offset: u64, end: u64) -> io::Result<Option<(u64, u64)>> {
    let start = match fs::seek(file, fs::SeekFrom::Data(offset)) {
        Ok(start) => start,
        Err(rustix::io::Errno::NXIO) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    if start >= end {
        return Ok(None);
    }
    let hole = fs::seek(file, fs::SeekFrom::Hole(start))?;
    Ok(Some((start, hole.min(end))).filter(|(start, hole)| start < hole))
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // A page that is not zero is mostly found out by its first bytes.
    let (first, rest) = bytes.split_at(bytes.len().min(128));
    if !is_blank(first) {
        return false;
    }
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has what the function was compiled for.
        return unsafe { is_blank_avx2(rest) };
    }
    is_blank(rest)
}

/// As [`is_blank`], with registers twice as wide. Machines of huge pages have many pages of zeros,
/// and looking at those was a tenth of what a snapshot cost.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn is_blank_avx2(bytes: &[u8]) -> bool {
    is_blank(bytes)
}

/// Pieces of some cache lines let the compiler use wide registers.
#[inline(always)]
fn is_blank(bytes: &[u8]) -> bool {
    let (pieces, rest) = bytes.as_chunks::<512>();
    pieces.iter().all(|p| p.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.as_chunks::<128>().0.iter().all(|p| p.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.as_chunks::<128>().1.iter().all(|b| *b == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_anywhere_in_a_page_is_found() {
        let mut page = [0; 4096];
        assert!(is_zero(&page) && is_zero(&[]) && is_zero(&page[..1000]));
        for at in 0..page.len() {
            page[at] = 0x10;
            assert!(!is_zero(&page), "byte {at}");
            assert_eq!(is_zero(&page[..1000]), at >= 1000, "byte {at}");
            page[at] = 0;
        }
    }
}
