//! Files in and out of a running container.

use crate::fixture::{Fixture, shell};
use guest::{
    client::ClientError,
    protocol::{FailureKind, PathKind},
};
use std::io::{self, Read};

fn tar_of(entries: &[(&str, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, text) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o640);
        header.set_uid(1234);
        builder.append_data(&mut header, name, text.as_bytes()).unwrap();
    }
    builder.into_inner().unwrap()
}

#[test]
fn files_go_in_and_come_out() {
    let mut f = Fixture::running();
    f.run(shell("mkdir -p /data && ln -s /data /link"));
    let tar = tar_of(&[("a.txt", "hello"), ("sub/b.txt", "deep")]);
    f.machine.write_archive("/link", &tar[..], false, false).unwrap();
    assert_eq!(
        f.run(shell("cat /data/a.txt /data/sub/b.txt; stat -c %u:%a /data/a.txt")).1,
        "hellodeep0:640\n"
    );
    f.machine.write_archive("/data", &tar[..], true, false).unwrap();
    assert_eq!(f.run(shell("stat -c %u /data/a.txt")).1, "1234\n");
    let (stat, reader) = f.machine.read_archive("/data", false).unwrap();
    assert_eq!((stat.kind, stat.name.as_str()), (PathKind::Directory, "data"));
    let mut archive = tar::Archive::new(reader);
    let mut names = Vec::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        names.push(entry.path().unwrap().to_string_lossy().into_owned());
        if names.last().unwrap() == "data/sub/b.txt" {
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            assert_eq!(text, "deep");
        }
    }
    assert_eq!(names, ["data", "data/a.txt", "data/sub", "data/sub/b.txt"]);
    assert_eq!(f.agent.stat("/link", false).unwrap().link, "/data");
}

#[test]
fn a_link_in_the_container_points_into_the_container() {
    let mut f = Fixture::running();
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("secret"), "host").unwrap();
    let (path, up) = (outside.path().display(), "../".repeat(20));
    // The same path is seen inside, through the overlay; what is changed there stays there.
    f.run(shell(&format!("echo guest > {path}/secret; ln -s {up}{path} /up; ln -s /up/secret /s")));
    let (_, reader) = f.machine.read_archive("/s", true).unwrap();
    let mut text = String::new();
    let mut archive = tar::Archive::new(reader);
    archive.entries().unwrap().next().unwrap().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "guest\n");
    let up = f.agent.stat("/up", true).unwrap();
    assert_eq!(up.kind, PathKind::Directory);
    f.machine.write_archive("/up", &tar_of(&[("secret", "new")])[..], false, false).unwrap();
    assert_eq!(std::fs::read_to_string(outside.path().join("secret")).unwrap(), "host");
}

#[test]
fn what_is_not_there_is_named_and_nothing_hangs() {
    let f = Fixture::running();
    let kind = |r: Result<(), ClientError>| match r {
        Err(ClientError::Agent(failure)) => failure.kind,
        other => panic!("{other:?}"),
    };
    let tar = tar_of(&[("x", "y")]);
    assert_eq!(kind(f.machine.read_archive("/none", false).map(drop)), FailureKind::NoSuchPath);
    assert_eq!(kind(f.machine.write_archive("/none", &tar[..], false, false)), FailureKind::NoSuchPath);
    assert_eq!(kind(f.machine.write_archive("/etc/passwd", &tar[..], false, false)), FailureKind::NoSuchPath);
    assert_eq!(kind(f.machine.write_archive("/tmp", &[7; 4096][..], false, false)), FailureKind::BadRequest);
    let truncated = tar_of(&[("x", &"y".repeat(100_000))]);
    let cut = f.machine.write_archive("/tmp", &truncated[..50_000], false, false);
    assert!(matches!(cut, Err(ClientError::Agent(_))), "{cut:?}");
    // A failure in the middle of a long archive is heard, and the sender is not left hanging.
    let mut long = archive_with_name("../out");
    long.extend(std::iter::repeat_n(1, 80 << 20));
    let failed = f.machine.write_archive("/tmp", &long[..], false, false);
    assert!(matches!(&failed, Err(ClientError::Agent(e)) if e.message.contains("leads out")), "{failed:?}");
}

/// An archive with a name that the tar crate itself would not write.
fn archive_with_name(name: &str) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_size(0);
    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    header.set_cksum();
    header.as_bytes().to_vec()
}

#[test]
fn a_broken_off_copy_is_an_error_on_both_sides() {
    let f = Fixture::running();
    struct Breaks(u32);
    impl Read for Breaks {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0 += 1;
            if self.0 > 3 { Err(io::Error::other("disk on fire")) } else { Ok(buffer.len()) }
        }
    }
    let failed = f.machine.write_archive("/tmp", Breaks(0), false, false);
    assert!(matches!(failed, Err(ClientError::Input(_))));
    assert_eq!(f.run(shell("echo alive")).1, "alive\n");
}
