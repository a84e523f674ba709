use std::{fs, os::unix::fs::MetadataExt};

use tar::{Builder, Header};

use super::*;

enum Item<'a> {
    Dir(&'a str),
    File(&'a str, &'a str, u32),
    Link(&'a str, &'a str),
    Hard(&'a str, &'a str),
    Device(&'a str),
}

fn tar(items: &[Item<'_>]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for item in items {
        let mut header = Header::new_gnu();
        header.set_size(0);
        header.set_mode(0o755);
        header.set_mtime(1_000_000);
        // Names are put in as they are: the builder refuses what an attacker would send.
        let mut raw = |header: &mut Header, name: &str, kind: EntryType, link: &str, data: &str| {
            header.set_entry_type(kind);
            header.set_size(data.len() as u64);
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
            header.set_cksum();
            builder.append(header, data.as_bytes()).unwrap();
        };
        match item {
            Item::Dir(name) => raw(&mut header, name, EntryType::Directory, "", ""),
            Item::File(name, data, mode) => {
                header.set_mode(*mode);
                raw(&mut header, name, EntryType::Regular, "", data);
            }
            Item::Link(name, to) => raw(&mut header, name, EntryType::Symlink, to, ""),
            Item::Hard(name, to) => raw(&mut header, name, EntryType::Link, to, ""),
            Item::Device(name) => raw(&mut header, name, EntryType::Char, "", ""),
        }
    }
    builder.into_inner().unwrap()
}

fn into(directory: &Path, top: Option<&str>, named: bool, items: &[Item<'_>]) -> Outcome<Unpacked> {
    unpack(directory, top, &tar(items)[..], Rules { keep_owner: false, named })
}

#[test]
fn a_tree_gets_its_new_name_its_times_and_its_permissions() {
    let dir = tempfile::tempdir().unwrap();
    let items = [Item::Dir("old"), Item::File("old/f", "text", 0o6751), Item::Hard("old/g", "old/f")];
    let done = into(dir.path(), Some("new"), true, &items).unwrap();
    assert_eq!((done.files, done.bytes), (2, 4));
    let file = fs::metadata(dir.path().join("new/f")).unwrap();
    assert_eq!((file.mode() & 0o7777, file.mtime(), file.nlink()), (0o751, 1_000_000, 2));
    assert_eq!(fs::metadata(dir.path().join("new")).unwrap().mtime(), 1_000_000);
    assert!(!dir.path().join("old").exists());
}

#[test]
fn content_goes_straight_into_the_directory_and_replaces_files() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), "before").unwrap();
    into(dir.path(), None, false, &[Item::Dir("."), Item::File("./f", "after", 0o600)]).unwrap();
    assert_eq!(fs::read_to_string(dir.path().join("f")).unwrap(), "after");
}

#[test]
fn nothing_leaves_the_directory_by_dots_links_or_second_names() {
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret");
    fs::write(&secret, "mine").unwrap();
    let to = outside.path().to_str().unwrap();
    let attacks: [&[Item<'_>]; 5] = [
        &[Item::File("x/../../secret", "bad", 0o600)],
        &[Item::Link("x/l", to), Item::File("x/l/secret", "bad", 0o600)],
        &[Item::Link("x", to), Item::File("x/secret", "bad", 0o600)],
        &[Item::Link("x/l", to), Item::Hard("x/h", "x/l/secret")],
        &[Item::Link("x/l", "secret"), Item::Hard("x/h", "x/l"), Item::File("x/h/y", "bad", 0o600)],
    ];
    for attack in attacks {
        let dir = tempfile::tempdir_in(outside.path()).unwrap();
        into(dir.path(), Some("x"), true, attack).unwrap_err();
        assert_eq!(fs::read_to_string(&secret).unwrap(), "mine");
        assert_eq!(fs::metadata(&secret).unwrap().nlink(), 1);
    }
}

#[test]
fn a_copy_does_not_go_through_links_that_the_host_has() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("real")).unwrap();
    std::os::unix::fs::symlink("real", dir.path().join("x")).unwrap();
    into(dir.path(), Some("x"), true, &[Item::Dir("x"), Item::File("x/f", "bad", 0o600)]).unwrap_err();
    assert!(!dir.path().join("real/f").exists());
}

#[test]
fn devices_are_left_out_and_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let done = into(dir.path(), None, false, &[Item::Device("null"), Item::File("f", "", 0o600)]).unwrap();
    assert_eq!(done.left_out, ["null"]);
    assert!(!dir.path().join("null").exists());
    let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("s")).unwrap();
    let refused = into(dir.path(), None, false, &[Item::File("s", "x", 0o600)]).unwrap_err();
    assert!(refused.to_string().contains("socket"), "{refused}");
}

#[test]
fn long_names_are_read_up_to_the_kernels_limit() {
    let dir = tempfile::tempdir().unwrap();
    let long = format!("d/{}/f", "n".repeat(200));
    let mut builder = Builder::new(Vec::new());
    let mut header = Header::new_gnu();
    header.set_size(1);
    header.set_mode(0o644);
    builder.append_data(&mut header, &long, &b"x"[..]).unwrap();
    let rules = Rules { keep_owner: false, named: false };
    unpack(dir.path(), None, &builder.into_inner().unwrap()[..], rules).unwrap();
    assert!(dir.path().join(&long).is_file());

    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::GNULongName);
    header.set_size(1 << 40);
    header.set_cksum();
    let endless = Read::chain(&header.as_bytes()[..], io::repeat(b'n'));
    let refused = unpack(dir.path(), None, endless, rules).unwrap_err();
    assert!(refused.to_string().contains("4096"), "{refused}");
}

#[test]
fn a_truncated_archive_is_an_error_and_leaves_no_half_file() {
    let dir = tempfile::tempdir().unwrap();
    let whole = tar(&[Item::File("f", &"x".repeat(5000), 0o600)]);
    let rules = Rules { keep_owner: false, named: false };
    unpack(dir.path(), None, &whole[..2000], rules).unwrap_err();
    assert!(!dir.path().join("f").exists());
}
