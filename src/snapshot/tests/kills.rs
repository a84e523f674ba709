//! Writers that are killed.

use std::{
    process::{Command, Stdio},
    time::Duration,
};

use super::*;
use crate::snapshot::draft::sweep;

const VICTIM: &str = "NACELLE_TEST_SNAPSHOT_VICTIM";
const ROUNDS: u64 = 120;

/// Pages of a generation: all of one content, so that a mixture is seen.
fn pages(generation: u64) -> Vec<(u64, Vec<u8>)> {
    (0..48).map(|n| (n, page(generation as u8 | 1))).collect()
}

#[test]
fn a_killed_writer_leaves_the_old_one_or_the_new_one_whole() {
    if let Some(dir) = std::env::var_os(VICTIM) {
        let path = PathBuf::from(dir).join("it");
        for generation in 0.. {
            write(Destination::replacing(&path), subject(64), manner(), &pages(generation)).unwrap();
        }
    }
    let (_keep, dir) = temporary();
    let path = dir.join("it");
    let first = write(Destination::new(&path), subject(64), manner(), &pages(0)).unwrap().id;
    let (mut last, mut changes, mut leftovers) = (first, 0, 0);
    let module = module_path!().split_once("::").unwrap().1;
    let test = format!("{module}::a_killed_writer_leaves_the_old_one_or_the_new_one_whole");
    for round in 0..10 * ROUNDS {
        if round >= ROUNDS && changes > 0 && leftovers > 0 {
            break;
        }
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", &test]).env(VICTIM, &dir).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = child.spawn().unwrap();
        // Delays that fall everywhere: a creation takes a few milliseconds. A host on which no
        // kill has hit anything yet is given longer ones.
        let delay = 4000 + round * 7919 % 24_000;
        std::thread::sleep(Duration::from_micros(delay * (1 + round / ROUNDS)));
        child.kill().unwrap();
        child.wait().unwrap();
        let snapshot = open(&path);
        snapshot.verify(true, &()).unwrap();
        let mut got = vec![0; 48 * PAGE as usize];
        snapshot.read(0, &mut got).unwrap();
        assert!(got.chunks(PAGE as usize).all(|p| *p == got[..PAGE as usize]), "round {round}");
        changes += u64::from(snapshot.manifest().id != last);
        last = snapshot.manifest().id;
        leftovers += names(&dir).len() - 1;
        sweep(&std::fs::File::open(&dir).unwrap());
        assert_eq!(names(&dir), ["it"], "round {round}");
    }
    // The test means something only if kills fell before and after a publication and within one.
    assert!(changes > 0 && leftovers > 0, "{changes} changes, {leftovers} leftovers");
}

#[test]
fn a_living_writer_is_not_swept() {
    let (_keep, dir) = temporary();
    let mut writer = Writer::begin(Destination::new(dir.join("a")), subject(64), manner(), None).unwrap();
    std::fs::create_dir(dir.join(".nacelle-snapshot-mine.tmp")).unwrap();
    assert_eq!(sweep(&std::fs::File::open(&dir).unwrap()), 0);
    write(Destination::new(dir.join("b")), subject(64), manner(), &pages(1)).unwrap();
    writer.run(0, &page(1)).unwrap();
    writer.finish().unwrap();
    open(&dir.join("a")).verify(true, &()).unwrap();
    assert_eq!(names(&dir), [".nacelle-snapshot-mine.tmp", "a", "b"]);
}
