//! The verbs, as they are called.

use clap::Parser;

use super::*;
use crate::snapshot::{Region, Subject, Writer, parent_of};

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    args: Args,
}

/// Runs a command line in which `@` stands for a directory.
fn snapshot(dir: &Path, words: &str) -> Outcome<u8> {
    let words = words.replace('@', dir.to_str().unwrap());
    let line = Line::try_parse_from(std::iter::once("snapshot").chain(words.split(' '))).unwrap();
    run(&line.args)
}

/// Writes a snapshot of one page on `parent`.
fn take(dir: &Path, name: &str, parent: Option<&str>, page: u64) {
    let open = |name: &str| Snapshot::open(&dir.join(name), &Search::default()).unwrap();
    let subject = Subject {
        regions: vec![Region { guest_address: 0, size: 1 << 20, offset: 0, page_size: 4096 }],
        parent: parent.map(|parent| parent_of(&dir.join(name), &open(parent))),
        ..Subject::default()
    };
    let mut writer =
        Writer::begin(Destination::new(dir.join(name)), subject, Manner::default(), None).unwrap();
    writer.run(page * 4096, &[page as u8; 4096]).unwrap();
    writer.finish().unwrap();
}

#[test]
fn a_chain_is_verified_merged_rebased_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    take(dir, "base", None, 1);
    take(dir, "middle", Some("base"), 2);
    take(dir, "top", Some("middle"), 3);
    for words in ["ls @", "ls -q @", "ls --format json @", "inspect @/top", "verify @/top @/base"] {
        assert_eq!(snapshot(dir, words), Ok(0), "{words}");
    }
    assert_eq!(snapshot(dir, "merge -q @/middle @/flat --into-store @/store"), Ok(0));
    assert_eq!(snapshot(dir, "diff --format json @/middle @/flat"), Ok(0));
    let refused = snapshot(dir, "rebase @/top --onto @/base").unwrap_err().message;
    assert!(refused.contains("1 pages"), "{refused}");
    assert_eq!(snapshot(dir, "rm @/middle"), Ok(1));
    let refused = snapshot(dir, "merge @/middle @/base --replace").unwrap_err().message;
    assert!(refused.contains("middle lies on"), "{refused}");
    assert_eq!(snapshot(dir, "rebase @/top --onto @/flat"), Ok(0));
    assert_eq!(snapshot(dir, "rm @/middle @/base"), Ok(0));
    assert_eq!(snapshot(dir, "verify @/top"), Ok(0));
    assert_eq!(snapshot(dir, "merge @/top @/top --replace"), Ok(0));
    assert_eq!(snapshot(dir, "rm @/flat"), Ok(0));
    assert_eq!(snapshot(dir, "gc @/store --only @"), Ok(0));
    assert_eq!(snapshot(dir, "verify @/top"), Ok(0));
    let chain = Chain::open(&dir.join("top"), &Search::default()).unwrap();
    let mut memory = vec![0; 4 * 4096];
    chain.read(0, &mut memory).unwrap();
    assert!(memory.chunks(4096).zip(0u8..).all(|(page, number)| page.iter().all(|b| *b == number)));
}

#[test]
fn what_is_wrong_is_said_and_the_code_is_1_where_there_are_several() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    take(dir, "good", None, 1);
    take(dir, "bad", None, 1);
    std::fs::write(dir.join("bad/state"), "other").unwrap();
    assert_eq!(snapshot(dir, "verify -q @/bad @/good @/none"), Ok(1));
    assert_eq!(snapshot(dir, "verify --quick @/good"), Ok(0));
    std::fs::write(dir.join("bad/manifest.json"), "{}").unwrap();
    assert_eq!(snapshot(dir, "ls @"), Ok(0));
    let row = &list(dir).unwrap()[0];
    assert!(row_error(row).contains("does not begin with its digest"));
    assert!(snapshot(dir, "merge @/good @/bad").unwrap_err().message.contains("exists already"));
    std::fs::create_dir(dir.join("store")).unwrap();
    let refused = snapshot(dir, "gc @/store --only @").unwrap_err().message;
    assert!(refused.contains("nothing was removed"), "{refused}");
    assert_eq!(snapshot(dir, "rm @/bad"), Ok(0));
}

fn row_error((path, read): &(PathBuf, Result<Manifest, SnapshotError>)) -> String {
    row(path, read).error.unwrap()
}
