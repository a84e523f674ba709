//! The format as a whole: what goes in comes out, whatever is wrong is said, whoever dies.

mod chains;
mod damage;
mod faults;
mod kills;
mod round;
mod stores;

use std::path::{Path, PathBuf};

use devices::state::Section;
use serde_json::json;

use super::{
    Destination, Manner, Region, Search, Snapshot, Subject, Writer, Written, limits::PAGE, manifest::Json,
};

/// The smallest chunk: several fit a small memory.
pub(super) const CHUNK: u64 = 64 << 10;

pub(super) fn manner() -> Manner<'static> {
    Manner { chunk_size: CHUNK, ..Manner::default() }
}

/// A subject with `pages` pages of memory in two regions with a gap between their addresses.
pub(super) fn subject(pages: u64) -> Subject {
    let half = pages / 2 * PAGE;
    let region = |guest_address, offset, size| Region { guest_address, size, offset, page_size: PAGE };
    Subject {
        nacelle: "0.1.0".to_owned(),
        created: 1_795_000_000_000,
        machine: Json::of(&json!({"machine-config": {"vcpu_count": 2, "mem_size_mib": 1}})),
        cpu: Json::of(&json!({"flags": ["avx2"]})),
        note: json!({"name": "web"}),
        regions: vec![region(0, 0, half), region(1 << 32, half, pages * PAGE - half)],
        parent: None,
    }
}

pub(super) fn page(seed: u8) -> Vec<u8> {
    (0..PAGE).map(|n| seed.wrapping_mul(31).wrapping_add((n % 251) as u8)).collect()
}

/// Writes a snapshot of some numbered pages at `destination`.
pub(super) fn write(
    destination: Destination,
    subject: Subject,
    manner: Manner<'_>,
    pages: &[(u64, Vec<u8>)],
) -> Result<Written, super::SnapshotError> {
    let mut writer = Writer::begin(destination, subject, manner, None)?;
    for (number, bytes) in pages {
        writer.run(number * PAGE, bytes)?;
    }
    writer.section(Section::new("vcpu", 1, &(1u32, 2u64)));
    writer.section(Section::new("serial", 2, &vec![3u8; 20]));
    writer.finish()
}

pub(super) fn open(path: &Path) -> Snapshot {
    Snapshot::open(path, &Search::default()).unwrap()
}

/// Names in a directory, sorted.
pub(super) fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

pub(super) fn temporary() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_owned();
    (directory, path)
}
