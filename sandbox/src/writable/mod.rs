//! # The writable layer: an empty ext4 in a sparse file
//!
//! Above the read-only image a machine gets a disk of its own. It is formatted here, without a
//! program of the host: some sixty KiB are written whatever the size, the rest of the file is a
//! hole. So one is made for each machine and nothing needs to be cached or copied.
//!
//! ```text
//!   group 0                                                              groups 1..15
//!   ┌────┬─────┬───────────────┬───────────────┬──────────────┬─────────┬──┬──┬──────┐┌───────
//!   │ sb │ gdt │ block bitmaps │ inode bitmaps │ inode tables │ journal │ /│lf│ free ││ free …
//!   │    │     │ of 16 groups  │ of 16 groups  │ of 16 groups │         │  │  │      ││
//!   └────┴─────┴───────────────┴───────────────┴──────────────┴─────────┴──┴──┴──────┘└───────
//!   groups 16, 32, …: the same without sb, gdt, journal and directories
//! ```
//!
//! Groups that hold nothing are marked uninitialised (`uninit_bg`), their bitmaps are computed
//! by the kernel; inode tables are marked zeroed, which the hole makes true, so the kernel's
//! background initialisation has nothing to do. There is a journal: a machine may be killed at
//! any time, and the layer is used again when it is started or copied from.
//!
//! ## Why not `arcbox-ext4`
//! It is the one formatter in Rust that was found (0.1.2, young), and it works: 10 GiB in 2.6
//! ms, clean under e2fsck. But its file systems have no journal, it writes all bitmaps (2.7 MB
//! for 10 GiB, 270 MB for 1 TiB), rounds sizes up to 128 MiB, and brings `tar` and `uuid`. What
//! is needed here, an empty file system, is the small part of such a crate.
//!
//! Format: Linux Documentation/filesystems/ext4 and `fs/ext4/ext4.h`; journal: `jbd2.h`.

mod format;

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// The size of a writable layer when nothing else is asked for, in bytes.
pub const DEFAULT_BYTES: u64 = 10 << 30;
/// The smallest layer, in bytes: below it the journal would fill it.
pub const LEAST_BYTES: u64 = 16 << 20;
/// The largest layer, in bytes: what 32-bit block numbers reach.
pub const MOST_BYTES: u64 = (16 << 40) - (128 << 20);

/// Why a writable layer cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum WritableError {
    /// Too small or too large.
    #[error(
        "A writable layer of {bytes} bytes is not possible: it needs at least 16 MiB and less than 16 TiB"
    )]
    Size {
        /// What was asked for.
        bytes: u64,
    },
    /// The file exists, or cannot be made or written.
    #[error("The writable layer '{}' cannot be made", path.display())]
    Write {
        /// The file.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Makes a sparse file of `bytes` (rounded down to 4 KiB) with an empty ext4 in it. The file
/// must not exist; when this fails, it does not exist afterwards.
///
/// # Errors
/// [`WritableError`].
pub fn create(path: &Path, bytes: u64) -> Result<(), WritableError> {
    if !(LEAST_BYTES..=MOST_BYTES).contains(&bytes) {
        return Err(WritableError::Size { bytes });
    }
    let error = |source| WritableError::Write { path: path.to_owned(), source };
    let file = File::options().write(true).create_new(true).mode(0o600).open(path).map_err(error)?;
    let made = fill(&file, bytes);
    if made.is_err() {
        std::fs::remove_file(path).ok();
    }
    made.map_err(error)
}

fn fill(file: &File, bytes: u64) -> io::Result<()> {
    let mut random = [0; 32];
    File::open("/dev/urandom")?.read_exact(&mut random)?;
    file.set_len(bytes / format::BLOCK * format::BLOCK)?;
    format::write(file, bytes / format::BLOCK, &random)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::process::Command;

    use super::*;

    fn e2fsck(path: &Path) -> (bool, String) {
        let run =
            Command::new("e2fsck").arg("-fn").arg(path).env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").output();
        let out = run.expect("e2fsck is needed for this test: install the package e2fsprogs");
        let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
        (out.status.success(), text)
    }

    #[test]
    fn every_size_is_clean_for_e2fsck() {
        let dir = tempfile::tempdir().unwrap();
        let group = 128 << 20;
        let sizes = [
            LEAST_BYTES,
            (100 << 20) + 5000,
            group,
            group + 4096,
            group + (1 << 20),
            3 * group,
            16 * group,
            16 * group + (1 << 20),
            16 * group + (64 << 20),
            20 * group - 4096,
            DEFAULT_BYTES,
            1 << 40,
        ];
        for (n, size) in sizes.into_iter().enumerate() {
            let path = dir.path().join(n.to_string());
            create(&path, size).unwrap();
            let (clean, text) = e2fsck(&path);
            assert!(clean && !text.contains("Fix"), "{size} bytes: {text}");
        }
    }

    #[test]
    fn ten_gibibytes_cost_less_than_a_hundred_kibibytes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer");
        create(&path, DEFAULT_BYTES).unwrap();
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!(meta.len(), DEFAULT_BYTES);
        assert!(meta.blocks() * 512 < 100 << 10, "{} bytes", meta.blocks() * 512);
    }

    #[test]
    fn impossible_sizes_and_existing_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer");
        for size in [0, LEAST_BYTES - 1, MOST_BYTES + 1, u64::MAX] {
            assert!(matches!(create(&path, size), Err(WritableError::Size { .. })));
        }
        std::fs::write(&path, "mine").unwrap();
        assert!(matches!(create(&path, LEAST_BYTES), Err(WritableError::Write { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    }
}
