//! Snapshots that were damaged, and ones that lie under right digests.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::{FileExt, symlink},
};

use serde_json::Value;

use super::*;
use crate::snapshot::{
    Chain, Digest, Manifest, SnapshotError, digest::LEN, index::Index, inspect, limits::readable, state,
};

fn small(dir: &Path) -> PathBuf {
    let path = dir.join("small");
    write(Destination::new(&path), subject(4), manner(), &[(1, page(1)), (3, page(2))]).unwrap();
    path
}

/// Opens and verifies everything.
fn judge(path: &Path) -> Result<(), SnapshotError> {
    let chain = Chain::open(path, &Search::default())?;
    chain.top().verify(true, &())?;
    let size = chain.size().min(1 << 20);
    chain.read(0, &mut vec![0; size as usize])
}

#[test]
fn every_truncation_is_a_clear_error() {
    let (_keep, dir) = temporary();
    let path = small(&dir);
    for name in ["manifest.json", "state", "memory.index"] {
        let whole = std::fs::read(path.join(name)).unwrap();
        for length in 0..whole.len() {
            std::fs::write(path.join(name), &whole[..length]).unwrap();
            let error = judge(&path).unwrap_err();
            let named = matches!(&error, SnapshotError::Damaged { file, .. } if file == name);
            assert!(named, "{name} of {length} bytes: {error}");
        }
        std::fs::write(path.join(name), [&whole[..], b"\n"].concat()).unwrap();
        judge(&path).unwrap_err();
        std::fs::write(path.join(name), &whole).unwrap();
    }
    let memory = OpenOptions::new().write(true).open(path.join("memory")).unwrap();
    for length in (0..4 * PAGE).step_by(512).chain([4 * PAGE + 1, 5 * PAGE]) {
        memory.set_len(length).unwrap();
        let error = judge(&path).unwrap_err().to_string();
        assert!(error.contains("16384 belong there"), "{error}");
    }
}

#[test]
fn every_flipped_bit_is_a_clear_error() {
    let (_keep, dir) = temporary();
    let path = small(&dir);
    let manifest = std::fs::read(path.join("manifest.json")).unwrap();
    for bit in 0..manifest.len() * 8 {
        let mut flipped = manifest.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(Manifest::decode(&flipped, &path).is_err(), "bit {bit} of the manifest");
    }
    for name in ["state", "memory.index"] {
        let whole = std::fs::read(path.join(name)).unwrap();
        let file = OpenOptions::new().write(true).open(path.join(name)).unwrap();
        for bit in 0..whole.len() * 8 {
            let (at, byte) = (bit / 8, whole[bit / 8]);
            file.write_all_at(&[byte ^ 1 << (bit % 8)], at as u64).unwrap();
            assert!(judge(&path).is_err(), "bit {bit} of {name}");
            file.write_all_at(&[byte], at as u64).unwrap();
        }
    }
    let snapshot = open(&path);
    let whole = std::fs::read(path.join("memory")).unwrap();
    let file = OpenOptions::new().write(true).open(path.join("memory")).unwrap();
    // In the pages and in the holes: a hole is mapped as well.
    for bit in 0..whole.len() * 8 {
        let (at, byte) = (bit / 8, whole[bit / 8]);
        file.write_all_at(&[byte ^ 1 << (bit % 8)], at as u64).unwrap();
        assert!(snapshot.verify(true, &()).is_err(), "bit {bit} of memory");
        file.write_all_at(&[byte], at as u64).unwrap();
    }
    judge(&path).unwrap();
}

fn seal(body: &Value) -> Vec<u8> {
    let text = serde_json::to_string(body).unwrap();
    let rest = &text[1..];
    [b"{\"digest\":\"", Digest::of(rest.as_bytes()).to_string().as_bytes(), b"\",", rest.as_bytes()].concat()
}

fn pointers(value: &Value, at: &str, found: &mut Vec<String>) {
    found.push(at.to_owned());
    match value {
        Value::Object(map) => map.iter().for_each(|(k, v)| pointers(v, &format!("{at}/{k}"), found)),
        Value::Array(list) => {
            list.iter().enumerate().for_each(|(n, v)| pointers(v, &format!("{at}/{n}"), found));
        }
        _ => {}
    }
}

#[test]
fn manifests_that_lie_under_a_right_digest_are_survived() {
    let (_keep, dir) = temporary();
    let path = small(&dir);
    let mut writer = Writer::begin(Destination::replacing(&path), subject(4), manner(), None).unwrap();
    writer.run(PAGE, &page(1)).unwrap();
    writer.drive("root", "/x", crate::snapshot::Capture::Copy, &tempfile::tempfile().unwrap()).unwrap();
    writer.finish().unwrap();
    let mut body: Value =
        serde_json::from_slice(&std::fs::read(path.join("manifest.json")).unwrap()).unwrap();
    body.as_object_mut().unwrap().remove("digest");
    let mut fields = Vec::new();
    pointers(&body, "", &mut fields);
    let lies = serde_json::json!([
        null,
        0,
        1,
        -1,
        4095,
        4096,
        65536,
        1u64 << 32,
        1u64 << 45,
        1u64 << 63,
        u64::MAX,
        1e300,
        true,
        "",
        ".",
        "..",
        "../small",
        "/etc/passwd",
        "a/b",
        "a\u{0}b",
        "memory",
        "state",
        "manifest.json",
        "0".repeat(32),
        "f".repeat(64),
        "x".repeat(300),
        [],
        [[]],
        [0],
        {}
    ]);
    for field in fields.iter().filter(|f| !f.is_empty()) {
        for lie in lies.as_array().unwrap() {
            let mut changed = body.clone();
            *changed.pointer_mut(field).unwrap() = lie.clone();
            std::fs::write(path.join("manifest.json"), seal(&changed)).unwrap();
            let judged = judge(&path);
            // What somebody says of where and when is theirs to say.
            let opaque = [
                "/machine",
                "/cpu",
                "/note",
                "/created",
                "/nacelle",
                "/id",
                "/drives/0/id",
                "/drives/0/source",
            ];
            let free = opaque.iter().any(|o| field.starts_with(o))
                || field.ends_with("guest_address")
                || field.ends_with("page_size")
                || field == "/memory/regions"
                || field == "/parent"
                || field == "/drives"
                || field.ends_with("/capture");
            let same = body.pointer(field) == Some(lie);
            let harmless = field == "/memory/hashed" || field.starts_with("/memory/regions/");
            assert!(judged.is_err() || free || same || harmless, "{field} = {lie}");
        }
    }
}

#[test]
fn versions_and_needs_are_named() {
    let (_keep, dir) = temporary();
    let path = small(&dir);
    let mut body: Value =
        serde_json::from_slice(&std::fs::read(path.join("manifest.json")).unwrap()).unwrap();
    body.as_object_mut().unwrap().remove("digest");
    let with = |field: &str, value: Value| {
        let mut changed = body.clone();
        changed[field] = value;
        Manifest::decode(&seal(&changed), &path).unwrap_err().to_string()
    };
    assert!(with("format", 9.into()).contains("has format 9; this build reads 1 to 1"));
    assert!(with("format", 0.into()).contains("has format 0"));
    assert!(with("needs", serde_json::json!(["encryption"])).contains("needs \"encryption\""));
    let mut more = body.clone();
    more["colour"] = "of a later version that nobody needs to know".into();
    Manifest::decode(&seal(&more), &path).unwrap();
    // What older ones did not write yet.
    more.as_object_mut().unwrap().remove("note");
    assert!(Manifest::decode(&seal(&more), &path).unwrap().note.is_null());
}

#[test]
fn the_version_that_is_written_and_two_before_it_are_read() {
    assert_eq!([1, 2, 3, 4, 9].map(readable), [1..=1, 1..=2, 1..=3, 2..=4, 7..=9]);
}

#[test]
fn files_of_a_newer_version_are_named_with_both_versions() {
    let (_keep, dir) = temporary();
    let path = small(&dir);
    let manifest = inspect(&path).unwrap();
    let renewed = |name: &str, sealed: bool| {
        let mut bytes = std::fs::read(path.join(name)).unwrap();
        bytes[8] = 2;
        if sealed {
            let end = bytes.len() - LEN;
            let digest = Digest::of(&bytes[..end]).0;
            bytes[end..].copy_from_slice(&digest);
        }
        bytes
    };
    let error = state::decode(&renewed(&manifest.state.file.name, true)).unwrap_err();
    assert_eq!(error, "its version is 2; this build reads 1");
    let memory = &manifest.memory;
    let index = renewed(&memory.index.name, false);
    let error = Index::decode(&index, memory.size, memory.chunk_size, memory.hashed).unwrap_err();
    assert_eq!(error, "its version is 2; this build reads 1");
}

#[test]
fn links_and_pipes_in_the_place_of_files_are_not_opened() {
    let (_keep, dir) = temporary();
    let path = small(&dir);
    for name in ["manifest.json", "state", "memory.index", "memory"] {
        let (file, aside) = (path.join(name), dir.join("aside"));
        std::fs::rename(&file, &aside).unwrap();
        symlink(&aside, &file).unwrap();
        assert!(judge(&path).is_err(), "{name} as a link");
        std::fs::remove_file(&file).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &file, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
            .unwrap();
        assert!(judge(&path).is_err(), "{name} as a pipe");
        std::fs::remove_file(&file).unwrap();
        std::fs::rename(&aside, &file).unwrap();
    }
    judge(&path).unwrap();
}

#[test]
fn directories_without_a_manifest_are_no_snapshots() {
    let (_keep, dir) = temporary();
    assert!(matches!(judge(&dir), Err(SnapshotError::NotASnapshot { .. })));
    assert!(judge(&dir.join("none")).is_err());
    File::create(dir.join("file")).unwrap();
    assert!(judge(&dir.join("file")).is_err());
}
