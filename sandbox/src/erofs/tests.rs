use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::process::Command;

use super::*;
use crate::tree::{Body, Content, Meta, Tree};

fn tool(name: &str) -> Command {
    let mut command = Command::new(name);
    command.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
    let there = command.arg("--version").output().is_ok();
    assert!(there, "{name} is needed for this test: install the package erofs-utils");
    let mut command = Command::new(name);
    command.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
    command
}

fn meta(mode: u16) -> Meta {
    Meta { mode, mtime: (1_700_000_000, 123_456_789), ..Meta::default() }
}

fn text(command: &mut Command) -> String {
    let out = command.output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{command:?}: {text}");
    text
}

/// A tree with one of everything, and directories of every size.
fn rich_tree(contents: &mut Contents) -> Tree {
    let mut tree = Tree::new(64);
    let root = Tree::ROOT;
    let file = |contents: &mut Contents, bytes: &[u8]| {
        if bytes.len() <= INLINE_BYTES {
            return Body::File(Content::Inline(bytes.into()));
        }
        let start = contents.allocate(bytes.len() as u64).unwrap();
        contents.write(start, 0, bytes).unwrap();
        Body::File(Content::Blocks { start, size: bytes.len() as u64 })
    };
    for size in [0usize, 1, 2047, 2048, 2049, 4096, 4097, 70_000] {
        let bytes: Vec<u8> = (0..size).map(|n| (n * 7 + size) as u8).collect();
        let body = file(contents, &bytes);
        tree.insert(root, format!("file-{size}").as_bytes(), 0, meta(0o644), body);
    }
    let first = tree.lookup(root, b"file-70000").unwrap();
    tree.link(root, b"hard", 0, first);
    for length in [1, 100, 3900, 4040, 4095] {
        let target = "t".repeat(length);
        let body = Body::Symlink(target.as_bytes().into());
        tree.insert(root, format!("link-{length}").as_bytes(), 0, meta(0o777), body);
    }
    tree.insert(root, b"null", 0, meta(0o666), Body::Character(1, 3));
    tree.insert(root, b"disk", 0, meta(0o660), Body::Block(259, 70_000));
    tree.insert(root, b"pipe", 0, meta(0o600), Body::Fifo);
    tree.insert(
        root,
        b"su",
        0,
        Meta { uid: 70_000, gid: 4_000_000_000, ..meta(0o4755) },
        Body::File(Content::Inline(b"s".as_slice().into())),
    );
    for count in [0usize, 1, 200, 3000] {
        let name = format!("dir-{count}");
        let dir = tree.insert(root, name.as_bytes(), 0, meta(0o755), Body::Directory(BTreeMap::new()));
        for n in 0..count {
            // Names before and after the dots in byte order.
            let start = if n % 3 == 0 { "!" } else { "name" };
            tree.insert(dir, format!("{start}-{n}").as_bytes(), 0, meta(0o600), Body::Fifo);
        }
    }
    for size in [1usize, 60, 4000, 65_535] {
        let mut with = meta(0o600);
        with.xattrs.insert(b"user.value".to_vec(), vec![b'v'; size]);
        with.xattrs.insert(b"security.capability".to_vec(), vec![1; 20]);
        with.xattrs.insert(b"unknown.name".to_vec(), vec![1; 20]);
        let body = Body::File(Content::Inline(b"with attributes".as_slice().into()));
        tree.insert(root, format!("xattr-{size}").as_bytes(), 0, with, body);
    }
    let odd: &[u8] = b"odd \xff\xfe \n name";
    tree.insert(root, odd, 0, meta(0o600), Body::Fifo);
    tree
}

fn write_rich(path: &Path) -> Tree {
    let file =
        std::fs::File::options().create(true).truncate(true).read(true).write(true).open(path).unwrap();
    let mut contents = Contents::new(file);
    let tree = rich_tree(&mut contents);
    let bytes = write(contents, &tree, [7; 16]).unwrap();
    assert_eq!(std::fs::metadata(path).unwrap().len(), bytes);
    tree
}

#[test]
fn the_checker_of_erofs_utils_finds_no_fault() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    write_rich(&path);
    // The checker of version 1.5 ends with success after some errors; its words count.
    let said = text(tool("fsck.erofs").arg("-d4").arg(&path));
    assert!(!said.contains("<E>"), "{said}");
    let said = text(tool("dump.erofs").arg("-s").arg(&path));
    assert!(said.contains("07070707-0707"), "{said}");
    // The checker does find faults, so its silence means something.
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[1100] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let out = tool("fsck.erofs").arg(&path).output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
    assert!(said.contains("checksum"), "{said}");
}

#[test]
fn erofs_utils_read_back_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    write_rich(&path);
    let out = dir.path().join("out");
    // Owners and devices need root; contents, modes, links and targets do not.
    text(
        tool("fsck.erofs").arg(format!("--extract={}", out.display())).arg("--no-preserve-owner").arg(&path),
    );
    for size in [0usize, 1, 2047, 2048, 2049, 4096, 4097, 70_000] {
        let wanted: Vec<u8> = (0..size).map(|n| (n * 7 + size) as u8).collect();
        assert_eq!(std::fs::read(out.join(format!("file-{size}"))).unwrap(), wanted, "{size}");
    }
    for length in [1, 100, 3900, 4040, 4095] {
        let target = std::fs::read_link(out.join(format!("link-{length}"))).unwrap();
        assert_eq!(target.as_os_str().len(), length);
    }
    for count in [0usize, 1, 200, 3000] {
        let names = std::fs::read_dir(out.join(format!("dir-{count}"))).unwrap();
        assert_eq!(names.count(), count);
    }
    let dumped = text(tool("dump.erofs").arg("--path=/su").arg(&path));
    assert!(dumped.contains("70000") && dumped.contains("4000000000"), "{dumped}");
}

#[test]
fn the_same_tree_gives_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let images = ["a", "b"].map(|name| {
        let path = dir.path().join(name);
        write_rich(&path);
        let mut bytes = Vec::new();
        std::fs::File::open(path).unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    });
    assert!(images[0] == images[1]);
}

#[test]
fn an_empty_tree_is_a_valid_image() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let contents = Contents::new(file.reopen().unwrap());
    write(contents, &Tree::new(4), [0; 16]).unwrap();
    text(tool("fsck.erofs").arg(file.path()));
}
