//! Every call that writes fails in turn, and nothing is left.

use std::{
    fs::File,
    io,
    os::fd::BorrowedFd,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
};

use super::*;
use crate::snapshot::{
    SnapshotError, Store,
    disk::{Disk, HostDisk},
    draft::remove,
};

/// Fails one call, counted from its making.
struct Failing {
    left: AtomicI64,
    errno: i32,
}

impl Failing {
    fn at(call: i64, errno: i32) -> Arc<Failing> {
        Arc::new(Failing { left: AtomicI64::new(call), errno })
    }

    fn turn(&self) -> io::Result<()> {
        match self.left.fetch_sub(1, Ordering::Relaxed) {
            0 => Err(io::Error::from_raw_os_error(self.errno)),
            _ => Ok(()),
        }
    }
}

impl Disk for Failing {
    fn make_directory(&self, at: BorrowedFd<'_>, name: &str) -> io::Result<()> {
        self.turn().and_then(|()| HostDisk.make_directory(at, name))
    }
    fn create(&self, at: BorrowedFd<'_>, name: &str) -> io::Result<File> {
        self.turn().and_then(|()| HostDisk.create(at, name))
    }
    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        // A full disk takes half of it first.
        self.turn().inspect_err(|_| {
            let _ = HostDisk.write_at(file, &bytes[..bytes.len() / 2], offset);
        })?;
        HostDisk.write_at(file, bytes, offset)
    }
    fn set_size(&self, file: &File, size: u64) -> io::Result<()> {
        self.turn().and_then(|()| HostDisk.set_size(file, size))
    }
    fn sync(&self, file: &File) -> io::Result<()> {
        self.turn().and_then(|()| HostDisk.sync(file))
    }
    fn rename_new(&self, at: BorrowedFd<'_>, from: &str, to: &str) -> io::Result<()> {
        // What undoes a rename comes after the one failure.
        self.turn().and_then(|()| HostDisk.rename_new(at, from, to))
    }
    fn exchange(&self, at: BorrowedFd<'_>, one: &str, other: &str) -> io::Result<()> {
        self.turn().and_then(|()| HostDisk.exchange(at, one, other))
    }
}

fn attempt(
    disk: Arc<Failing>,
    destination: Destination,
    store: Option<&Store>,
) -> Result<Written, SnapshotError> {
    let store = store.map(|s| (s, "store".to_owned()));
    let manner = Manner { disk, store, ..manner() };
    let mut writer = Writer::begin(destination, subject(64), manner, None)?;
    for number in [1, 2, 20, 50] {
        writer.run(number * PAGE, &page(number as u8))?;
    }
    writer.drive("root", "/x", crate::snapshot::Capture::Copy, &File::open("/proc/self/exe").unwrap())?;
    writer.section(Section::new("vcpu", 1, &1u32));
    writer.finish()
}

/// Fails every call of a creation in turn; `check` looks at what is there after each failure.
fn sweep(destination: &Destination, store: Option<&Store>, mut check: impl FnMut()) -> i64 {
    for call in 0.. {
        for errno in [libc::ENOSPC, libc::EIO, libc::EDQUOT] {
            match attempt(Failing::at(call, errno), destination.clone(), store) {
                Ok(_) => return call,
                Err(SnapshotError::Io { source, .. }) => assert_eq!(source.raw_os_error(), Some(errno)),
                Err(other) => panic!("call {call}: {other}"),
            }
            check();
        }
    }
    0
}

#[test]
fn a_failure_at_any_write_leaves_nothing() {
    let (_keep, dir) = temporary();
    let calls = sweep(&Destination::new(dir.join("new")), None, || assert!(names(&dir).is_empty()));
    assert!(calls > 20, "{calls}");
    open(&dir.join("new")).verify(true, &()).unwrap();
}

#[test]
fn a_failure_at_any_write_leaves_the_old_one_whole() {
    let (_keep, dir) = temporary();
    let path = dir.join("it");
    let old = write(Destination::new(&path), subject(64), manner(), &[(9, page(9))]).unwrap();
    sweep(&Destination::replacing(&path), None, || {
        assert_eq!(names(&dir), ["it"]);
        let snapshot = open(&path);
        snapshot.verify(true, &()).unwrap();
        assert_eq!(snapshot.manifest().id, old.id);
    });
    assert_eq!(names(&dir), ["it"]);
    assert_ne!(open(&path).manifest().id, old.id);
}

#[test]
fn a_failure_in_a_store_leaves_no_reference() {
    let (_keep, dir) = temporary();
    let store = Store::make(&dir.join("store")).unwrap();
    sweep(&Destination::new(dir.join("new")), Some(&store), || {
        assert_eq!(names(&dir), ["store"]);
        assert!(!dir.join("store/refs").exists() || names(&dir.join("store/refs")).is_empty());
    });
    open(&dir.join("new")).verify(true, &()).unwrap();
    let before = store.collect(None).unwrap();
    assert!(before.kept >= 3, "{before:?}");
    open(&dir.join("new")).verify(true, &()).unwrap();
}

#[test]
fn what_is_there_is_not_overwritten_unasked() {
    let (_keep, dir) = temporary();
    let path = dir.join("it");
    let pages = [(1, page(1))];
    write(Destination::new(&path), subject(4), manner(), &pages).unwrap();
    let again = |destination| write(destination, subject(4), manner(), &pages);
    assert!(matches!(again(Destination::new(&path)), Err(SnapshotError::Exists { .. })));
    for running in [path.clone(), path.join("memory"), path.join("state")] {
        let destination = Destination { running_from: vec![running], ..Destination::replacing(&path) };
        assert!(matches!(again(destination), Err(SnapshotError::InUse { .. })));
    }
    let destination = Destination { running_from: vec![dir.join("gone")], ..Destination::replacing(&path) };
    again(destination).unwrap();
    // What is no snapshot is never replaced, however much it is asked.
    std::fs::create_dir(dir.join("home")).unwrap();
    std::fs::write(dir.join("home/letter"), "dear").unwrap();
    std::fs::write(dir.join("file"), "dear").unwrap();
    std::os::unix::fs::symlink(&path, dir.join("link")).unwrap();
    for name in ["home", "file", "link"] {
        let replaced = again(Destination::replacing(dir.join(name)));
        assert!(matches!(replaced, Err(SnapshotError::NotASnapshot { .. })), "{name}");
        assert!(
            matches!(remove(&HostDisk, &dir.join(name)), Err(SnapshotError::NotASnapshot { .. })),
            "{name}"
        );
    }
    assert_eq!(names(&dir), ["file", "home", "it", "link"]);
    remove(&HostDisk, &path).unwrap();
    assert_eq!(names(&dir), ["file", "home", "link"]);
    assert!(again(Destination::new(dir.join("no/where"))).is_err());
    assert!(again(Destination::new("/")).is_err());
}

#[test]
fn a_reader_of_a_replaced_snapshot_goes_on() {
    let (_keep, dir) = temporary();
    let path = dir.join("it");
    write(Destination::new(&path), subject(64), manner(), &[(9, page(9))]).unwrap();
    let old = open(&path);
    write(Destination::replacing(&path), subject(64), manner(), &[(9, page(10))]).unwrap();
    let mut got = page(0);
    old.read(9 * PAGE, &mut got).unwrap();
    assert_eq!(got, page(9));
}

/// Writes snapshots until the disk is full; runs on a tmpfs of its own, in namespaces of its own.
const FULL: &str = "NACELLE_TEST_FULL_DISK";

#[test]
fn a_disk_that_is_really_full_leaves_nothing() {
    if let Some(dir) = std::env::var_os(FULL) {
        let path = PathBuf::from(dir).join("it");
        let pages: Vec<_> = (0..1024).map(|n| (n, page(n as u8 | 1))).collect();
        let ended = write(Destination::new(&path), subject(1024), manner(), &pages);
        let Err(SnapshotError::Io { source, .. }) = ended else { panic!("{ended:?}") };
        assert_eq!(source.raw_os_error(), Some(libc::ENOSPC));
        assert!(names(path.parent().unwrap()).is_empty());
        write(Destination::new(&path), subject(1024), manner(), &pages[..64]).unwrap();
        open(&path).verify(true, &()).unwrap();
        return;
    }
    let (_keep, dir) = temporary();
    let script = "mount -t tmpfs -o size=2m none \"$1\" || exit 77; exec \"$0\" --exact \"$2\"";
    let mut child = std::process::Command::new("unshare");
    child.args(["--user", "--map-root-user", "--mount", "sh", "-c", script]);
    child.arg(std::env::current_exe().unwrap()).arg(&dir);
    let module = module_path!().split_once("::").unwrap().1;
    child.arg(format!("{module}::a_disk_that_is_really_full_leaves_nothing")).env(FULL, &dir);
    match child.output() {
        Ok(output) if output.status.success() => {
            assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"));
        }
        Ok(output) if output.status.code() != Some(77) && output.status.code() != Some(1) => {
            panic!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        }
        _ => eprintln!("skipped: this host gives no file system of one's own"),
    }
}
