//! The manifest: what the snapshot is and which files hold it.
//!
//! JSON that begins with its own digest, in exactly these bytes, so that the digest can cover
//! all that follows without a second file or a canonical form:
//!
//! ```text
//!   {"digest":"<64 digits>",        77 bytes, not covered
//!   "format":1, ... }               covered to the last byte of the file
//! ```
//!
//! Fields that a reader does not know are passed over; what it must know stands by name in
//! `needs`. So old readers read what they can and name what they cannot.

use std::{
    collections::BTreeSet,
    path::{Component, Path},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Value, value::RawValue};

use super::{
    SnapshotError,
    digest::{Digest, Id, LEN},
    limits::{
        ADDRESS_END, CHUNK_RANGE, DRIVES_MAX, FORMAT, HINT_MAX, KIND_MAX, MEMORY_MAX, NAME_MAX, PAGE,
        REGIONS_MAX, SECTIONS_MAX, STATE_MAX, readable,
    },
};

/// Name of the manifest in the directory.
pub const FILE: &str = "manifest.json";

const HEAD: &[u8] = b"{\"digest\":\"";
const NECK: &[u8] = b"\",";

/// The names that may stand in [`Manifest::needs`] and are known here.
pub const KNOWN: [&str; 2] = ["diff", "store-lz4"];

/// JSON whose meaning is somebody else's, kept as text until they read it: a restore then reads it
/// once.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Json(Box<RawValue>);

impl Json {
    /// What `value` is in JSON; null where it cannot be said in JSON.
    pub fn of<T: Serialize>(value: &T) -> Json {
        Json(serde_json::value::to_raw_value(value).unwrap_or_default())
    }

    /// Reads it.
    pub fn read<T: DeserializeOwned>(&self) -> serde_json::Result<T> {
        serde_json::from_str(self.0.get())
    }
}

impl PartialEq for Json {
    fn eq(&self, other: &Json) -> bool {
        self.0.get() == other.0.get()
    }
}

/// What the snapshot is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the format.
    pub format: u32,
    /// What a reader must know to make sense of the rest.
    pub needs: Vec<String>,
    /// Identity of the snapshot.
    pub id: Id,
    /// What a diff is a diff of; nothing for a full snapshot.
    pub parent: Option<Parent>,
    /// Version of the nacelle that wrote it.
    pub nacelle: String,
    /// When it was taken, in milliseconds since 1970.
    pub created: u64,
    /// The machine's specification.
    pub machine: Json,
    /// What the machine needs of the CPU.
    pub cpu: Json,
    /// What whoever asked for the snapshot wants to find in it again; its meaning is theirs.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub note: Value,
    /// Where guest memory lies.
    pub memory: Memory,
    /// The state file.
    pub state: State,
    /// Drives at this point in time.
    pub drives: Vec<Drive>,
}

/// The snapshot that a diff lies on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    /// Its identity.
    pub id: Id,
    /// Digest of its memory index, so that another with the same identity is not taken for it.
    pub index: Digest,
    /// Where it may lie, seen from the directory that this snapshot lies in.
    pub hint: String,
}

/// Guest memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Bytes of the memory file, holes included.
    pub size: u64,
    /// Bytes of a page; 4096.
    pub page_size: u64,
    /// Bytes of a chunk, the unit of hashes and of the store.
    pub chunk_size: u64,
    /// Which guest addresses lie where in the file.
    pub regions: Vec<Region>,
    /// Whether each chunk has a hash in the index.
    pub hashed: bool,
    /// The index: which pages are present, and the hashes.
    pub index: FileEntry,
    /// The memory file, if pages are in this directory.
    pub file: Option<String>,
    /// The store, if they are there.
    pub store: Option<StoreEntry>,
}

/// One piece of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// First guest physical address.
    pub guest_address: u64,
    /// Bytes.
    pub size: u64,
    /// Where it begins in the memory file.
    pub offset: u64,
    /// Bytes of the host pages that backed it: 4096, 2 MiB or 1 GiB.
    pub page_size: u64,
}

/// A file of this directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its name.
    pub name: String,
    /// Its bytes.
    pub size: u64,
    /// Digest of all of it.
    pub digest: Digest,
}

/// A store of chunks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreEntry {
    /// Where it may lie, seen from the directory that this snapshot lies in.
    pub hint: String,
}

/// The state file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The file.
    #[serde(flatten)]
    pub file: FileEntry,
    /// Its sections, in order.
    pub sections: Vec<SectionEntry>,
}

/// A section of the state file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SectionEntry {
    /// What wrote it.
    pub kind: String,
    /// Version of its layout.
    pub version: u16,
    /// Bytes of it.
    pub length: u64,
    /// Digest of them.
    pub digest: Digest,
}

/// A drive of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drive {
    /// Its `drive_id`.
    pub id: String,
    /// The file behind it when the snapshot was taken.
    pub source: String,
    /// How it was taken along.
    pub capture: Capture,
    /// Its bytes.
    pub size: u64,
    /// The file of this directory that holds it, unless it is shared.
    pub file: Option<String>,
}

/// How a drive belongs to a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Capture {
    /// Copied; holes stay holes.
    Copy,
    /// Copied by sharing blocks (`FICLONE`).
    Reflink,
    /// Not taken along: the source itself is used again.
    Share,
}

impl Manifest {
    /// The file's bytes.
    pub fn encode(&self) -> Vec<u8> {
        // Structs of plain data and JSON values always encode.
        let body = serde_json::to_string_pretty(self).unwrap_or_default();
        let rest = body.strip_prefix('{').unwrap_or(&body);
        let digest = Digest::of(rest.as_bytes()).to_string();
        [HEAD, digest.as_bytes(), NECK, rest.as_bytes()].concat()
    }

    /// Reads and checks a manifest. `path` is the snapshot's directory, for messages.
    pub fn decode(bytes: &[u8], path: &Path) -> Result<Manifest, SnapshotError> {
        let damaged =
            |reason: String| SnapshotError::Damaged { path: path.into(), file: FILE.into(), reason };
        covered(bytes).map_err(|reason| damaged(reason.to_owned()))?;
        let wrong = |error: serde_json::Error| match Front::check(bytes, path) {
            Ok(()) => damaged(error.to_string()),
            Err(better) => better,
        };
        // The digest is a field that this program does not know.
        let manifest: Manifest = serde_json::from_slice(bytes).map_err(wrong)?;
        Front { format: manifest.format.into(), needs: manifest.needs.clone() }.understood(path)?;
        manifest.check().map_err(damaged)?;
        Ok(manifest)
    }

    /// What a reader must know for this manifest.
    pub(crate) fn needed(&self) -> Vec<String> {
        let diff = self.parent.as_ref().map(|_| "diff".to_owned());
        let store = self.memory.store.as_ref().map(|_| "store-lz4".to_owned());
        diff.into_iter().chain(store).collect()
    }

    /// Checks every number and name; the first that cannot be is named.
    pub fn check(&self) -> Result<(), String> {
        self.memory.check()?;
        if self.needs != self.needed() {
            return Err(format!("needs is {:?} where {:?} is used", self.needs, self.needed()));
        }
        if let Some(parent) = &self.parent {
            check_hint("parent.hint", &parent.hint)?;
            if parent.id == self.id {
                return Err(format!("the snapshot {} is said to be its own parent", self.id));
            }
        }
        self.state.check()?;
        if self.drives.len() > DRIVES_MAX {
            return Err(format!("{} drives are more than {DRIVES_MAX}", self.drives.len()));
        }
        for drive in &self.drives {
            if (drive.capture == Capture::Share) != drive.file.is_none() || drive.size > MEMORY_MAX * 64 {
                return Err(format!("drive {:?} is not possible", drive.id));
            }
        }
        let mut names = BTreeSet::from([FILE]);
        for name in self.files() {
            check_name(name)?;
            if !names.insert(name) {
                return Err(format!("file {name:?} is named twice"));
            }
        }
        Ok(())
    }

    /// Names of all files of the directory but the manifest.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        let fixed = [self.memory.index.name.as_str(), self.state.file.name.as_str()];
        let memory = self.memory.file.as_deref();
        fixed.into_iter().chain(memory).chain(self.drives.iter().filter_map(|d| d.file.as_deref()))
    }
}

/// What tells whether the rest can be understood. A field that changed its meaning must not be
/// reported as damage.
#[derive(Deserialize)]
struct Front {
    format: u64,
    #[serde(default)]
    needs: Vec<String>,
}

impl Front {
    fn check(bytes: &[u8], path: &Path) -> Result<(), SnapshotError> {
        serde_json::from_slice::<Front>(bytes).map_or(Ok(()), |front| front.understood(path))
    }

    fn understood(self, path: &Path) -> Result<(), SnapshotError> {
        let (found, path, read) = (self.format, path.to_owned(), readable(FORMAT));
        if !u32::try_from(found).is_ok_and(|format| read.contains(&format)) {
            let oldest = *read.start();
            return Err(SnapshotError::Version { path, found, oldest, newest: FORMAT });
        }
        match self.needs.into_iter().find(|n| !KNOWN.contains(&n.as_str())) {
            Some(name) => Err(SnapshotError::Lacks { path, name }),
            None => Ok(()),
        }
    }
}

impl Memory {
    fn check(&self) -> Result<(), String> {
        let Memory { size, page_size, chunk_size, .. } = *self;
        if size > MEMORY_MAX || size % PAGE != 0 {
            return Err(format!("memory.size is {size}; it is whole pages, at most {MEMORY_MAX} bytes"));
        }
        if page_size != PAGE {
            return Err(format!("memory.page_size is {page_size}; it is {PAGE}"));
        }
        if !chunk_size.is_power_of_two() || !CHUNK_RANGE.contains(&chunk_size) {
            return Err(format!("memory.chunk_size is {chunk_size}; it is a power of two, 64 KiB to 64 MiB"));
        }
        if self.file.is_some() == self.store.is_some() {
            return Err("memory is in one of file and store".to_owned());
        }
        if let Some(store) = &self.store {
            check_hint("memory.store.hint", &store.hint)?;
            if !self.hashed {
                return Err("memory in a store has no hashes".to_owned());
            }
        }
        check_regions(&self.regions, size)
    }
}

impl State {
    fn check(&self) -> Result<(), String> {
        let (count, size) = (self.sections.len(), self.file.size);
        if count > SECTIONS_MAX || size > STATE_MAX {
            return Err(format!(
                "state of {count} sections and {size} bytes; at most {SECTIONS_MAX} and {STATE_MAX} are read"
            ));
        }
        let long = self.sections.iter().find(|s| s.kind.len() > KIND_MAX || s.length > size);
        long.map_or(Ok(()), |s| Err(format!("state section {:?} is not possible", s.kind)))
    }
}

/// Regions lie inside the file and the guest's addresses, on pages, and not on each other.
pub(crate) fn check_regions(regions: &[Region], size: u64) -> Result<(), String> {
    if regions.len() > REGIONS_MAX {
        return Err(format!("{} memory regions are more than {REGIONS_MAX}", regions.len()));
    }
    for region in regions {
        let Region { guest_address: at, size: bytes, offset, page_size } = *region;
        let whole = bytes > 0 && [at, bytes, offset].iter().all(|n| n % PAGE == 0);
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= size)
            && at.checked_add(bytes).is_some_and(|end| end <= ADDRESS_END);
        if !whole || !inside || ![PAGE, 2 << 20, 1 << 30].contains(&page_size) {
            return Err(format!(
                "memory region at {at:#x} ({bytes} bytes at offset {offset} of {size}, pages of {page_size}) \
                 is not possible"
            ));
        }
    }
    for key in [|r: &Region| r.guest_address, |r: &Region| r.offset] {
        let mut sorted: Vec<(u64, u64)> = regions.iter().map(|r| (key(r), r.size)).collect();
        sorted.sort_unstable();
        let overlap = sorted.windows(2).find(|w| matches!(w, [a, b] if b.0 - a.0 < a.1));
        if let Some([(at, _), ..]) = overlap {
            return Err(format!("memory region at {at:#x} overlaps the next"));
        }
    }
    Ok(())
}

/// A plain file name: one component, nothing that leads elsewhere.
pub(crate) fn check_name(name: &str) -> Result<(), String> {
    let plain = !name.is_empty() && name.len() <= NAME_MAX && name != "." && name != "..";
    if plain && !name.contains(|c: char| c == '/' || c.is_control()) {
        return Ok(());
    }
    Err(format!("{name:?} is no file of this directory"))
}

/// A relative path that only goes down.
pub(crate) fn check_hint(field: &str, hint: &str) -> Result<(), String> {
    let down = Path::new(hint).components().all(|c| matches!(c, Component::Normal(_)));
    if down && !hint.is_empty() && hint.len() <= HINT_MAX && !hint.contains(char::is_control) {
        return Ok(());
    }
    Err(format!("{field} is {hint:?}; it is a relative path without \"..\""))
}

/// The bytes that the digest covers, once it is right.
fn covered(bytes: &[u8]) -> Result<&[u8], &'static str> {
    let begins = "does not begin with its digest";
    let rest = bytes.strip_prefix(HEAD).ok_or(begins)?;
    let (digest, rest) = rest.split_at_checked(2 * LEN).ok_or(begins)?;
    let digest = std::str::from_utf8(digest).ok().and_then(Digest::parse).ok_or(begins)?;
    let rest = rest.strip_prefix(NECK).ok_or(begins)?;
    if Digest::of(rest) == digest { Ok(rest) } else { Err("its digest is of other bytes") }
}
