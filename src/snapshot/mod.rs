//! Snapshots: a machine in a directory.
//!
//! ```text
//!   DIR/manifest.json   what it is, what it needs, which files, their sizes and digests
//!   DIR/state           the sections of the machine's state, each with a digest
//!   DIR/memory          guest memory, sparse, to be mapped as it is        (or chunks of a
//!   DIR/memory.index    which pages are present, a hash for each chunk      store, see below)
//!   DIR/drive-N         drives that were taken along
//!
//!   STATE and MEMORY    the same state, and memory, as two files of any names (pair.rs)
//!
//!   Writer ─► Draft ─► DIR          one rename, after all of it is on the disk
//!   Snapshot ◄─ DIR                 opened once, checked, verified, read, mapped
//!   Chain ◄─ DIR ─► parent ─► ..    diffs over a full one, read as one memory
//!   Store ◄─► STORE/ab/cdef..       chunks of many snapshots, each once
//! ```
//!
//! The directory is hostile when it is read: every length, count, offset and name is checked,
//! nothing outside is opened but by a hint that leads downwards and through no link, and what a
//! file claims to hold is never allocated before it is there. The directory is dear when it is
//! written: it appears whole or not at all, whatever fails and whoever is killed. The format is
//! described for people and other programs in `docs/snapshot.md`.
//!
//! Nothing here knows a machine. Sections are bytes to it; memory is runs of pages.

pub mod chain;
pub mod digest;
pub mod disk;
pub mod draft;
mod error;
pub mod extents;
pub mod fold;
pub mod index;
pub mod limits;
pub mod manifest;
pub mod pair;
pub mod reader;
pub mod state;
pub mod store;
#[cfg(test)]
mod tests;
pub mod writer;

pub use chain::{Chain, Place, hint_from, parent_of};
pub use digest::{Digest, Id};
pub use draft::Destination;
pub use error::SnapshotError;
pub use manifest::{Capture, Manifest, Parent, Region};
pub use pair::{Pair, PairWriter};
pub use reader::{Search, Snapshot, inspect, list};
pub use store::Store;
pub use writer::{Manner, Subject, Watch, Writer, Written};
