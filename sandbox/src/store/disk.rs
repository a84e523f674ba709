//! The store's directory: what lies where, who may write when, and how things appear in it.
//!
//! ```text
//!   blobs/sha256/HEX      layers as they were pulled, by digest
//!   images/KEY.erofs      ready images
//!   images/KEY.json       their records; an image without one does not exist
//!   refs/HEX.json         which key a reference or archive had last, by the digest of its name
//!   locks/NAME.lock       held (flock) while something is made
//!   tmp/…                 what is being made, each file locked by its maker
//! ```
//!
//! Everything appears by write, fsync, rename, fsync of the directory, the record last. A maker
//! that dies, at whatever point, leaves files in `tmp` whose lock nobody holds any more, and at
//! most an image without a record; both are removed when the store is opened next.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long the lock around the making of a temporary file may take; it is held for microseconds.
const SHORT: Duration = Duration::from_secs(10);

/// The directory.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    root: PathBuf,
}

/// A lock that ends when it is dropped, or when its holder dies.
#[derive(Debug)]
pub(super) struct Lock(#[expect(dead_code, reason = "the open file is the lock")] File);

/// A file that vanishes unless it is published.
#[derive(Debug)]
pub(crate) struct Temporary {
    path: PathBuf,
    file: File,
    kept: bool,
}

impl Temporary {
    /// The file, open for reading and writing.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Makes the file appear at `target`, complete and durable.
    pub(crate) fn publish(mut self, target: &Path) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.path, target)?;
        self.kept = true;
        match target.parent() {
            Some(dir) => File::open(dir)?.sync_all(),
            None => Ok(()),
        }
    }
}

impl Write for Temporary {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.kept {
            fs::remove_file(&self.path).ok();
        }
    }
}

impl Disk {
    /// Makes the directories that are missing and removes what dead makers left.
    pub(super) fn open(root: &Path) -> io::Result<Self> {
        for name in ["blobs/sha256", "images", "refs", "locks", "tmp"] {
            // Not for others to look through, but a confined monitor may open what it is given.
            fs::DirBuilder::new().recursive(true).mode(0o711).create(root.join(name))?;
        }
        // Absolute, because the paths of images outlive the working directory.
        let root = fs::canonicalize(root)?;
        let disk = Self { root };
        disk.clean()?;
        Ok(disk)
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn path(&self, dir: &str, name: &str) -> PathBuf {
        self.root.join(dir).join(name)
    }

    /// Waits for a lock until `wait` has passed; `None` then. `waiting` is called once, when
    /// somebody else has it.
    pub(super) fn lock(
        &self,
        name: &str,
        wait: Duration,
        waiting: impl FnOnce(),
    ) -> io::Result<Option<Lock>> {
        let path = self.path("locks", &format!("{name}.lock"));
        let file = File::options().create(true).write(true).truncate(false).open(path)?;
        let deadline = Instant::now() + wait;
        let mut waiting = Some(waiting);
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(Lock(file))),
                Err(TryLockError::Error(error)) => return Err(error),
                Err(TryLockError::WouldBlock) => {}
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            if let Some(tell) = waiting.take() {
                tell();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A new temporary file, locked as long as it is open.
    pub(super) fn temporary(&self) -> io::Result<Temporary> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        // Between the making of a file and its lock a cleaner must not see it.
        let _short = self.short_lock()?;
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let now = std::time::UNIX_EPOCH.elapsed().map_or(0, |d| d.as_nanos());
        let path = self.path("tmp", &format!("{}-{count}-{now}", std::process::id()));
        let file = File::options().create_new(true).read(true).write(true).open(&path)?;
        let temporary = Temporary { path, file, kept: false };
        temporary.file.try_lock().map_err(io::Error::other)?;
        Ok(temporary)
    }

    fn short_lock(&self) -> io::Result<Lock> {
        let lock = self.lock("tmp", SHORT, || {})?;
        lock.ok_or_else(|| io::Error::new(io::ErrorKind::TimedOut, "another process holds the lock 'tmp'"))
    }

    /// Writes a small file.
    pub(super) fn write(&self, target: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut temporary = self.temporary()?;
        temporary.write_all(bytes)?;
        temporary.publish(target)
    }

    /// Removes temporary files without a maker, and images without a record that nobody is
    /// making just now.
    fn clean(&self) -> io::Result<()> {
        let names = |dir: &str| -> io::Result<Vec<PathBuf>> {
            fs::read_dir(self.root.join(dir))?.map(|e| Ok(e?.path())).collect()
        };
        {
            let _short = self.short_lock()?;
            for path in names("tmp")? {
                let free = File::open(&path).is_ok_and(|file| file.try_lock().is_ok());
                if free {
                    fs::remove_file(&path).ok();
                }
            }
        }
        for path in names("images")? {
            let is_image = path.extension().is_some_and(|e| e == "erofs");
            if !is_image || path.with_extension("json").exists() {
                continue;
            }
            let key = path.file_stem().and_then(|s| s.to_str()).unwrap_or_default();
            let held = self.lock(key, Duration::ZERO, || {})?;
            if held.is_some() && !path.with_extension("json").exists() {
                fs::remove_file(&path).ok();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_dead_maker_left_is_removed_and_what_a_living_one_makes_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::open(dir.path()).unwrap();
        fs::write(disk.path("tmp", "dead"), "x").unwrap();
        fs::write(disk.path("images", "half.erofs"), "x").unwrap();
        fs::write(disk.path("images", "busy.erofs"), "x").unwrap();
        let _busy = disk.lock("busy", Duration::ZERO, || {}).unwrap().unwrap();
        let alive = disk.temporary().unwrap();
        Disk::open(dir.path()).unwrap();
        assert!(!disk.path("tmp", "dead").exists());
        assert!(!disk.path("images", "half.erofs").exists());
        assert!(disk.path("images", "busy.erofs").exists());
        assert!(alive.path.exists());
        let path = alive.path.clone();
        drop(alive);
        assert!(!path.exists());
    }

    #[test]
    fn a_lock_is_waited_for_and_not_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::open(dir.path()).unwrap();
        let first = disk.lock("k", Duration::ZERO, || {}).unwrap();
        assert!(first.is_some());
        let mut told = false;
        let second = disk.lock("k", Duration::from_millis(50), || told = true).unwrap();
        assert!(second.is_none() && told);
        drop(first);
        assert!(disk.lock("k", Duration::ZERO, || {}).unwrap().is_some());
    }
}
