//! Archives of real files, and archives that lie.

use super::*;
use std::os::unix::fs::{PermissionsExt, symlink};
use tar::{Builder, EntryType, Header};

const RULES: Rules = Rules { keep_owner: false, replace_kind: false };

fn is_root() -> bool {
    // SAFETY: no memory arguments.
    unsafe { libc::geteuid() == 0 }
}

fn header(kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(0o644);
    header.set_mtime(1_000_000);
    header
}

/// An archive with names set byte for byte, as no honest tool would.
fn archive(entries: &[(&str, EntryType, &str)]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (name, kind, text) in entries {
        let file = matches!(kind, EntryType::Regular);
        let mut header = header(*kind, if file { text.len() as u64 } else { 0 });
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        if !file {
            header.as_old_mut().linkname[..text.len()].copy_from_slice(text.as_bytes());
        }
        header.set_cksum();
        builder.append(&header, if file { text.as_bytes() } else { b"" }).unwrap();
    }
    builder.into_inner().unwrap()
}

fn unpack_into(dir: &Path, bytes: &[u8], rules: Rules) -> Result<(), Failure> {
    unpack(dir.to_str().unwrap(), &mut &bytes[..], rules)
}

#[test]
fn a_tree_comes_back_as_it_went() {
    if !is_root() {
        return;
    }
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let tree = from.path().join("tree");
    fs::create_dir_all(tree.join("a/b")).unwrap();
    let long = "n".repeat(200);
    fs::write(tree.join("a/b").join(&long), vec![7; 100_000]).unwrap();
    fs::hard_link(tree.join("a/b").join(&long), tree.join("a/twin")).unwrap();
    symlink("/nowhere/at/all", tree.join("dangling")).unwrap();
    fs::set_permissions(tree.join("a"), fs::Permissions::from_mode(0o2750)).unwrap();
    let bytes = pack(tree.to_str().unwrap(), false, Vec::new()).unwrap();
    unpack_into(to.path(), &bytes, RULES).unwrap();
    let copy = to.path().join("tree");
    let big = fs::metadata(copy.join("a/b").join(&long)).unwrap();
    assert_eq!(big.len(), 100_000);
    assert_eq!(big.ino(), fs::metadata(copy.join("a/twin")).unwrap().ino());
    assert_eq!(fs::read_link(copy.join("dangling")).unwrap(), Path::new("/nowhere/at/all"));
    assert_eq!(fs::metadata(copy.join("a")).unwrap().mode() & 0o7777, 0o2750);
    let times = [&tree, &copy].map(|t| fs::metadata(t.join("a")).unwrap().mtime());
    assert_eq!(times[0], times[1]);
}

#[test]
fn a_directorys_content_is_packed_without_its_name() {
    let from = tempfile::tempdir().unwrap();
    fs::write(from.path().join("x"), "x").unwrap();
    let path = format!("{}/.", from.path().display());
    let bytes = pack(&path, false, Vec::new()).unwrap();
    let mut tar = tar::Archive::new(&bytes[..]);
    let names: Vec<_> = tar.entries().unwrap().map(|e| e.unwrap().path().unwrap().into_owned()).collect();
    assert_eq!(names, [Path::new("."), Path::new("x")]);
}

#[test]
fn nothing_is_written_outside_of_the_directory() {
    if !is_root() {
        return;
    }
    let outside = tempfile::tempdir().unwrap();
    let out = outside.path().to_str().unwrap();
    let hostile: [&[(&str, EntryType, &str)]; 6] = [
        &[("../escape", EntryType::Regular, "x")],
        &[("a/../../escape", EntryType::Regular, "x")],
        &[("l", EntryType::Symlink, out), ("l/escape", EntryType::Regular, "x")],
        &[("l", EntryType::Symlink, ".."), ("l/escape", EntryType::Regular, "x")],
        &[("d", EntryType::Symlink, out), ("d/e/escape", EntryType::Directory, "")],
        &[("h", EntryType::Link, "../../etc/passwd")],
    ];
    for entries in hostile {
        let dir = tempfile::tempdir().unwrap();
        let into = dir.path().join("into");
        fs::create_dir(&into).unwrap();
        let error = unpack_into(&into, &archive(entries), RULES).unwrap_err();
        assert!(error.message.contains("leads out of"), "{error}");
        assert!(!dir.path().join("escape").exists());
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    }
}

#[test]
fn a_link_is_replaced_and_not_written_through() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("precious"), "keep").unwrap();
    let into = dir.path().join("into");
    fs::create_dir(&into).unwrap();
    symlink("../precious", into.join("file")).unwrap();
    unpack_into(&into, &archive(&[("/file", EntryType::Regular, "new")]), RULES).unwrap();
    assert_eq!(fs::read_to_string(dir.path().join("precious")).unwrap(), "keep");
    assert_eq!(fs::read_to_string(into.join("file")).unwrap(), "new");
}

#[test]
fn a_file_replaces_a_directory_only_if_told() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("x/y")).unwrap();
    let bytes = archive(&[("x", EntryType::Regular, "file")]);
    assert!(unpack_into(dir.path(), &bytes, RULES).is_err());
    assert!(dir.path().join("x/y").is_dir());
    unpack_into(dir.path(), &bytes, Rules { replace_kind: true, ..RULES }).unwrap();
    assert!(dir.path().join("x").is_file());
    let back = archive(&[("x", EntryType::Directory, ""), ("x/z", EntryType::Regular, "z")]);
    assert!(unpack_into(dir.path(), &back, RULES).is_err());
    unpack_into(dir.path(), &back, Rules { replace_kind: true, ..RULES }).unwrap();
    assert!(dir.path().join("x/z").is_file());
}

#[test]
fn a_truncated_archive_is_an_error() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let bytes = archive(&[("x", EntryType::Regular, &"y".repeat(5000))]);
    let error = unpack_into(dir.path(), &bytes[..2000], RULES).unwrap_err();
    assert!(!error.message.is_empty());
    assert!(unpack_into(dir.path(), &[0xff; 1024], RULES).is_err());
}

#[test]
fn a_path_is_described_with_its_link() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), "four").unwrap();
    symlink("f", dir.path().join("l")).unwrap();
    let path = |n: &str| dir.path().join(n).to_str().unwrap().to_owned();
    let link = stat(&path("l"), false).unwrap();
    assert_eq!((link.kind, link.link.as_str()), (PathKind::Link, "f"));
    let file = stat(&path("l"), true).unwrap();
    assert_eq!((file.kind, file.size, file.name.as_str()), (PathKind::File, 4, "l"));
    assert_eq!(stat(&path("none"), true).unwrap_err().kind, FailureKind::NoSuchPath);
    assert_eq!(stat(&path("f/"), true).unwrap_err().kind, FailureKind::NoSuchPath);
    assert_eq!(stat("relative", true).unwrap_err().kind, FailureKind::BadRequest);
    assert_eq!(stat("/", false).unwrap().name, "/");
}

#[test]
fn a_pipe_is_packed_without_waiting_for_a_writer() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = crate::agent::syscall::cpath(&dir.path().join("p")).unwrap();
    // SAFETY: a zero-terminated string.
    assert_eq!(unsafe { libc::mkfifo(pipe.as_ptr(), 0o600) }, 0);
    let bytes = pack(dir.path().to_str().unwrap(), false, Vec::new()).unwrap();
    let mut tar = tar::Archive::new(&bytes[..]);
    let kinds: Vec<_> = tar.entries().unwrap().map(|e| e.unwrap().header().entry_type()).collect();
    assert_eq!(kinds, [EntryType::Directory, EntryType::Fifo]);
}
