//! # Container images, from a reference to a disk that a machine mounts
//!
//! ```text
//!   IMAGE ──► reference ──► pull │ archive │ rootdir ──► layer ──► tree ──► erofs ──► store
//!             what it is    where the bytes are         applied   in memory  image     published
//!
//!   Image { root: …/images/KEY.erofs, config }  ──► config::process ──► the agent in the guest
//!   writable::create(path, size)                ──► an empty ext4 above the image
//! ```
//!
//! [`Store::open`] is the door: a [`Source`] goes in, an [`Image`] comes out, and whatever
//! happens in between (a wrong digest, a full disk, a lost connection, a kill) leaves no
//! half-made image behind. The result is a read-only EROFS file that any number of machines
//! share, and the image's configuration; [`config::process`] turns that into a command.
//!
//! Nothing of an image ever becomes a file of the host: see `layer`. Everything that can grow
//! has a cap: see [`limits`].

pub mod config;
pub mod limits;
pub mod progress;
pub mod writable;

mod archive;
mod digest;
mod erofs;
mod layer;
mod manifest;
mod pull;
mod reference;
mod rootdir;
mod store;
mod tree;

#[cfg(test)]
mod testing;

pub use archive::ArchiveError;
pub use config::{ConfigError, ImageConfig, Overrides, Process, process};
pub use digest::Digest;
pub use layer::LayerError;
pub use limits::Limits;
pub use manifest::ManifestError;
pub use progress::{Event, Progress, Silent};
pub use pull::PullError;
pub use reference::{Reference, ReferenceError, Source};
pub use rootdir::RootDirError;
pub use store::{Image, OpenOptions, PullPolicy, Store, StoreError};
