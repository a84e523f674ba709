//! Copies of disks: by sharing blocks where the file system can, else byte for byte with their
//! holes.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
};

use crate::snapshot::{Watch, disk::next_data};

/// Bytes that are copied at a time.
const PIECE: usize = 1 << 20;

/// Whether files beside `target` can share the blocks of the file at `source`.
pub fn can_share(source: &Path, target: &Path) -> bool {
    let beside = target.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // A file without a name is gone by itself.
    let made =
        OpenOptions::new().read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE).open(beside);
    let (Ok(copy), Ok(source)) = (made, File::open(source)) else { return false };
    rustix::fs::ioctl_ficlone(&copy, &source).is_ok()
}

/// Copies the file at `from` to the new file `to`. When `watch` ends it, the error is of kind
/// [`io::ErrorKind::Interrupted`]. After an error there is no file `to`.
pub fn copy(from: &Path, to: &Path, watch: &dyn Watch) -> io::Result<()> {
    let source = File::open(from)?;
    let target = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(to)?;
    let copied = match rustix::fs::ioctl_ficlone(&target, &source) {
        Ok(()) => Ok(()),
        Err(_) => copy_data(&source, &target, watch),
    };
    copied.inspect_err(|_| drop(std::fs::remove_file(to)))
}

fn copy_data(source: &File, target: &File, watch: &dyn Watch) -> io::Result<()> {
    let size = source.metadata()?.len();
    target.set_len(size)?;
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    while let Some((start, end)) = next_data(source, at, size)? {
        at = start;
        while at < end {
            let count = (end - at).min(PIECE as u64);
            let piece = buffer.get_mut(..count as usize).unwrap_or_default();
            source.read_exact_at(piece, at)?;
            target.write_all_at(piece, at)?;
            at += count;
            if watch.step(at, size).is_break() {
                return Err(io::ErrorKind::Interrupted.into());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{ops::ControlFlow, os::unix::fs::MetadataExt};

    struct Stop;

    impl Watch for Stop {
        fn step(&self, _: u64, _: u64) -> ControlFlow<()> {
            ControlFlow::Break(())
        }
    }

    #[test]
    fn a_copy_has_the_bytes_and_the_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let file = File::create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&[7; 5000], 3 << 20).unwrap();
        file.write_all_at(b"end", (64 << 20) - 3).unwrap();
        copy(&from, &to, &()).unwrap();
        assert!(std::fs::read(&from).unwrap() == std::fs::read(&to).unwrap());
        assert!(std::fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20);
        // What is there already is not written over.
        assert_eq!(copy(&from, &to, &()).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    }

    #[test]
    fn a_copy_that_is_stopped_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        std::fs::write(&from, [1; 100]).unwrap();
        if can_share(&from, &to) {
            // There is no time to stop it.
            return;
        }
        assert_eq!(copy(&from, &to, &Stop).unwrap_err().kind(), io::ErrorKind::Interrupted);
        assert!(!to.exists());
    }
}
