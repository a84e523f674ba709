//! Snapshots in files: directories, diffs over them, stores, and pairs.
//!
//! ```text
//!   WORK/base  WORK/full  WORK/diff ─► base  WORK/packed ─► store     valid, written once
//!   input: which one, edits of its manifest, its index, its state ─► rewritten, digests right
//! ```

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use devices::state::Section;
use nacelle::{
    pager::working_set::Place,
    snapshot::{
        self, Chain, Destination, Digest, Id, Manner, Pair, Region, Search, Store, Subject, Writer,
        manifest::{Json, Manifest},
        pair::About,
        parent_of, state as file,
    },
    vm::lazy,
};
use serde_json::{Value, json};

use crate::{
    edits::edited,
    formats::{from_sections, sections},
    pieces::{Pieces, piece},
};

const PAGE: u64 = 4096;
const CHUNK: u64 = 64 << 10;
const SIZE: u64 = 1 << 20;
/// More than that no file system has room for the length of.
const LENGTH_MAX: u64 = 1 << 42;
const NAMES: [&str; 3] = ["full", "diff", "packed"];

/// A directory of this process, gone with whoever made `NACELLE_FUZZ_DIR`, or with the host's
/// temporary files.
pub fn work() -> &'static Path {
    static WORK: OnceLock<PathBuf> = OnceLock::new();
    WORK.get_or_init(|| {
        let around = std::env::var_os("NACELLE_FUZZ_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        tempfile::tempdir_in(around).expect("a directory can be made").keep()
    })
}

/// What is there before an input, of each of [`NAMES`].
struct Original {
    path: PathBuf,
    manifest: Value,
    index: Vec<u8>,
    state: Vec<u8>,
}

fn originals() -> &'static [Original; 3] {
    static ORIGINALS: OnceLock<[Original; 3]> = OnceLock::new();
    ORIGINALS.get_or_init(|| {
        let store = Store::make(&work().join("store")).expect("a store can be made");
        write("base", Manner::default(), false);
        write("full", Manner::default(), false);
        write("diff", Manner::default(), true);
        write("packed", Manner { store: Some((&store, "store".to_owned())), ..Manner::default() }, false);
        NAMES.map(|name| {
            let path = work().join(name);
            let read = |file: &str| fs::read(path.join(file)).expect("a file that was just written");
            let manifest = snapshot::inspect(&path).expect("a snapshot that was just written");
            let manifest = serde_json::to_value(manifest).expect("plain data");
            Original { manifest, index: read("memory.index"), state: read("state"), path }
        })
    })
}

fn write(name: &str, manner: Manner<'_>, diff: bool) {
    let base = work().join("base");
    let path = work().join(name);
    let open = || Chain::open(&base, &Search::default()).expect("a snapshot that was just written");
    let parent = diff.then(|| parent_of(&path, open().top()));
    let region = |guest_address, offset| Region { guest_address, size: SIZE / 2, offset, page_size: PAGE };
    let subject = Subject {
        nacelle: "0.1.0".to_owned(),
        created: 1,
        machine: Json::of(&json!({ "machine-config": { "vcpu_count": 1, "mem_size_mib": 1 } })),
        regions: vec![region(0, 0), region(1 << 32, SIZE / 2)],
        parent,
        ..Subject::default()
    };
    let manner = Manner { chunk_size: CHUNK, ..manner };
    let mut writer = Writer::begin(Destination::new(&path), subject, manner, None).expect("a draft");
    for number in [0, 1, 3, 17, 200] {
        let page: Vec<u8> = (0..PAGE).map(|n| (n % 251 + number) as u8).collect();
        writer.run(number * PAGE, &page).expect("a page");
    }
    writer.section(Section::new("vcpu", 1, &7u32));
    writer.section(Section::new("serial", 2, &vec![3u8; 20]));
    let drive = work().join("drive");
    fs::write(&drive, [5; 8192]).expect("a drive");
    let drive = File::open(drive).expect("a drive");
    writer.drive("root", "/drive", snapshot::Capture::Copy, &drive).expect("a copy of it");
    writer.finish().expect("a snapshot");
}

/// Puts bytes where a file has others.
fn put(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).expect("room for a small file");
}

/// A manifest with the digest that belongs to it, whatever it says.
fn sealed(manifest: &Value) -> Vec<u8> {
    let text = manifest.to_string();
    let Some(rest) = text.strip_prefix('{') else { return text.into_bytes() };
    format!("{{\"digest\":\"{}\",{rest}", Digest::of(rest.as_bytes())).into_bytes()
}

/// A snapshot's directory: its manifest edited, its index and state replaced; opened as a machine
/// is restored from it, verified, and read.
pub fn snapshot(data: &[u8]) {
    let mut pieces = Pieces::of(data);
    let Some(original) = originals().get(usize::from(pieces.byte()) % NAMES.len()) else { return };
    let (edits, index, state) = (pieces.piece(), pieces.piece(), pieces.piece());
    let index = if index.is_empty() { &original.index } else { index };
    let state = if state.is_empty() { None } else { file::encode(&sections(&mut Pieces::of(state))).ok() };
    let state = state.as_ref().unwrap_or(&original.state);
    let mut manifest = original.manifest.clone();
    manifest["memory"]["index"]["digest"] = json!(Digest::of(index));
    manifest["memory"]["index"]["size"] = json!(index.len());
    manifest["state"]["digest"] = json!(Digest::of(state));
    manifest["state"]["size"] = json!(state.len());
    if let Ok(sections) = file::decode(state) {
        manifest["state"]["sections"] = json!(file::entries(&sections));
    }
    let manifest = edited(manifest, edits);
    let size = manifest["memory"]["size"].as_u64().unwrap_or(SIZE).min(LENGTH_MAX);
    put(&original.path.join("memory.index"), index);
    put(&original.path.join("state"), state);
    put(&original.path.join("manifest.json"), &sealed(&manifest));
    if let Ok(memory) = File::options().write(true).open(original.path.join("memory")) {
        memory.set_len(size).expect("a length for a sparse file");
    }
    read(&original.path);
}

fn read(path: &Path) {
    let search = Search::default();
    let _ = snapshot::list(path.parent().unwrap_or(path));
    let Ok(chain) = Chain::open(path, &search) else { return };
    let top = chain.top();
    let again = Manifest::decode(&top.manifest().encode(), path).expect("what was read can be written");
    assert_eq!(&again, top.manifest());
    let _ = top.sections();
    let _ = top.verify(false, &());
    let _ = top.verify(true, &());
    let _ = top.drive("root");
    let _ = (top.map(0), top.map(1));
    let _ = lazy::layers(&chain);
    let mut buffer = [0; 3 * PAGE as usize];
    for (run, _) in chain.flatten().into_iter().take(32) {
        let length = buffer.len().min(run.len() as usize);
        let part = &mut buffer[..length];
        let _ = (chain.read(run.start, part), chain.read_checked(run.start, part));
        let _ = chain.read(run.end - PAGE.min(run.len()), part);
    }
    if let Ok(place) = Place::of(top) {
        let _ = place.read();
    }
}

/// Each kind of snapshot as it is, with its index, and with its state.
pub fn snapshot_seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (number, original) in (0u8..).zip(originals()) {
        let state = file::decode(&original.state).expect("a state that was just written");
        let (none, index, state) = (piece(&[]), piece(&original.index), piece(&from_sections(&state)));
        seeds.push([&[number][..], &none, &none, &none].concat());
        seeds.push([&[number][..], &piece(&[9, 4, 20, 62]), &index, &none].concat());
        seeds.push([&[number][..], &none, &none, &state].concat());
    }
    seeds
}

/// The two files of a pair: what the state says edited, other sections behind it.
pub fn pair(data: &[u8]) {
    let mut pieces = Pieces::of(data);
    let (version, edits) = (u16::from(pieces.byte()), pieces.piece());
    let about = edited(serde_json::to_value(about()).expect("plain data"), edits);
    let first = Section { kind: "pair".to_owned(), version, bytes: about.to_string().into_bytes() };
    let sections: Vec<Section> = std::iter::once(first).chain(sections(&mut pieces)).collect();
    let Ok(bytes) = file::encode(&sections) else { return };
    let (state, memory) = (work().join("pair.state"), work().join("pair.memory"));
    put(&state, &bytes);
    let opened = File::options().create(true).truncate(false).write(true).open(&memory).expect("a file");
    opened
        .set_len(about["size"].as_u64().unwrap_or(SIZE).min(LENGTH_MAX))
        .expect("a length for a sparse file");
    if let Some(mark) = about["mark"].as_u64().filter(|mark| *mark < LENGTH_MAX) {
        let _ = opened.write_all_at(&[7; 16], mark);
    }
    let Ok(pair) = Pair::open(&state) else { return };
    let again = serde_json::to_value(&pair.about).expect("plain data");
    assert_eq!(serde_json::from_value::<About>(again).ok().as_ref(), Some(&pair.about));
    assert!(pair.about.mark + 16 <= pair.about.size);
    let _ = pair.memory(&memory);
}

fn about() -> About {
    let region = |guest_address, offset| Region { guest_address, size: SIZE / 2, offset, page_size: PAGE };
    About {
        id: Id([7; 16]),
        nacelle: "0.1.0".to_owned(),
        created: 1,
        machine: Json::of(&json!({ "machine-config": { "vcpu_count": 1, "mem_size_mib": 1 } })),
        cpu: Json::default(),
        size: SIZE,
        regions: vec![region(0, 0), region(1 << 32, SIZE / 2)],
        mark: 64,
    }
}

/// A pair as it is, and one with sections.
pub fn pair_seeds() -> Vec<Vec<u8>> {
    let sections = from_sections(&[Section::new("vcpu", 1, &7u32)]);
    vec![[vec![1], piece(&[])].concat(), [vec![1], piece(&[5, 4]), sections].concat()]
}
