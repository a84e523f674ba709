//! # The image cache
//!
//! [`Store::open`] turns a [`Source`] into an [`Image`] that a machine can mount, from the cache
//! where it can. Images are kept by key:
//!
//! - an image with a configuration (registry, OCI layout, `docker save`): the digest of the
//!   configuration, which is the image id that `docker images` shows. The configuration names
//!   the digests of the uncompressed layers and those are checked while the layers are applied,
//!   so the key stands for the content whatever road it came by, and nobody can plant a file
//!   system under the key of another image.
//! - a root directory: the fingerprint of its tree.
//!
//! What a tag or an archive last stood for is remembered, so that a second `run busybox` needs
//! no network and a second `run image.tar.gz` no decompression. Making an image takes the lock
//! of its key: two processes that want the same image make it once. How things appear on disk,
//! and what happens when power fails, is in `disk`.

mod disk;
mod opening;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::archive::{self, ArchiveError};
use crate::config::{ConfigError, ImageConfig};
use crate::digest::Digest;
use crate::layer::LayerError;
use crate::limits::Limits;
use crate::progress::Progress;
use crate::pull::PullError;
use crate::reference::Source;
use crate::rootdir::RootDirError;
use disk::Disk;
use opening::Opening;

/// The form of the images and records; those of another number are made anew.
const FORMAT: u32 = 1;
/// How many layers are fetched at the same time (Docker's number).
const PARALLEL: usize = 3;

/// Why an image cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The cache directory cannot be used.
    #[error("The image cache '{}' cannot be used", path.display())]
    Disk {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A registry did not give the image.
    #[error("The image '{name}' cannot be pulled")]
    Pull {
        /// The image.
        name: String,
        /// Why.
        #[source]
        source: Box<PullError>,
    },
    /// A file or directory does not hold a usable image.
    #[error("The image '{name}' cannot be opened")]
    Archive {
        /// The image.
        name: String,
        /// Why.
        #[source]
        source: Box<ArchiveError>,
    },
    /// A root directory cannot be read.
    #[error("The root directory '{name}' cannot be made into an image")]
    RootDir {
        /// The directory.
        name: String,
        /// Why.
        #[source]
        source: Box<RootDirError>,
    },
    /// The configuration does not fit.
    #[error("The image '{name}' cannot be used on this host")]
    Config {
        /// The image.
        name: String,
        /// Why.
        #[source]
        source: ConfigError,
    },
    /// Configuration and manifest do not belong together.
    #[error("The configuration of '{name}' describes {described} layers, its manifest has {actual}")]
    Layers {
        /// The image.
        name: String,
        /// Layers in the configuration; 0 when a digest there is malformed.
        described: usize,
        /// Layers in the manifest.
        actual: usize,
    },
    /// A layer cannot be applied.
    #[error("Layer {number} of {count} of '{name}' ({digest}) cannot be applied")]
    Layer {
        /// The image.
        name: String,
        /// The layer, from 1.
        number: usize,
        /// How many there are.
        count: usize,
        /// The layer's digest, or its diff id where it has no other.
        digest: Digest,
        /// Why.
        #[source]
        source: Box<LayerError>,
    },
    /// The image was to come from the cache, and is not there.
    #[error("The image '{name}' is not in the cache, and pulling is switched off")]
    NotCached {
        /// The image.
        name: String,
    },
    /// Somebody else makes the image and does not finish.
    #[error(
        "Another process has been preparing '{name}' for more than {seconds} s: try again, or end that process"
    )]
    Busy {
        /// The image.
        name: String,
        /// How long was waited.
        seconds: u64,
    },
}

/// When a registry is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PullPolicy {
    /// When the image is not in the cache.
    #[default]
    Missing,
    /// Always, for a newer one of the same name.
    Always,
    /// Never.
    Never,
}

/// How an image is opened.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// The caps on what it may cost.
    pub limits: Limits,
    /// When the registry is asked.
    pub pull: PullPolicy,
    /// Speak plain HTTP; only with a registry on this machine.
    pub insecure: bool,
    /// How long to wait for another process that makes the same image.
    pub wait: Duration,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            pull: PullPolicy::Missing,
            insecure: false,
            wait: Duration::from_secs(1800),
        }
    }
}

/// An image that is ready to be mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// What it is called: the full reference, the name in the archive, or the path.
    pub name: String,
    /// Its key in the store, 64 hexadecimal digits; the image id where it has a configuration.
    pub key: String,
    /// The EROFS image file.
    #[serde(skip)]
    pub root: PathBuf,
    /// The length of that file in bytes.
    pub bytes: u64,
    /// When it was made here, in seconds since 1970.
    pub created: u64,
    /// How to run it; empty for a root directory.
    pub config: ImageConfig,
    /// See [`FORMAT`].
    format: u32,
}

/// What a reference or archive stood for last.
#[derive(Serialize, Deserialize)]
struct Seen {
    what: String,
    key: String,
}

/// The cache.
#[derive(Clone, Debug)]
pub struct Store {
    disk: Disk,
}

impl Store {
    /// Opens the cache in `root`, making it where it does not exist, and removes what processes
    /// that died have left.
    ///
    /// # Errors
    /// [`StoreError::Disk`].
    pub fn new(root: &Path) -> Result<Self, StoreError> {
        let disk = Disk::open(root).map_err(|source| StoreError::Disk { path: root.to_owned(), source })?;
        Ok(Self { disk })
    }

    /// Makes `source` ready, or finds it ready.
    ///
    /// # Errors
    /// [`StoreError`]; the cache holds nothing half-made then.
    pub fn open(
        &self,
        source: &Source,
        options: &OpenOptions,
        progress: &mut dyn Progress,
    ) -> Result<Image, StoreError> {
        let opening = Opening { store: self, name: source.to_string(), options };
        match source {
            Source::Registry(reference) => opening.registry(reference, progress),
            Source::Layout { path, pick } => {
                let found = archive::open_layout(path, pick.as_deref(), &options.limits);
                let found = found.map_err(|e| opening.archive_error(e))?;
                opening.found(&found, progress)
            }
            Source::Archive { path, pick } => opening.tar(path, pick.as_deref(), progress),
            Source::Directory { path } => opening.directory(path, progress),
        }
    }

    /// All ready images, the newest first.
    ///
    /// # Errors
    /// [`StoreError::Disk`].
    pub fn list(&self) -> Result<Vec<Image>, StoreError> {
        let dir = self.disk.root().join("images");
        let mut images = Vec::new();
        for entry in fs::read_dir(dir).map_err(|e| self.disk_error(e))? {
            let path = entry.map_err(|e| self.disk_error(e))?.path();
            let key = path.file_stem().and_then(|s| s.to_str()).unwrap_or_default();
            if path.extension().is_some_and(|e| e == "json") {
                images.extend(self.ready(key));
            }
        }
        images.sort_by(|a, b| (b.created, &a.key).cmp(&(a.created, &b.key)));
        Ok(images)
    }

    /// Removes an image; machines that have it open keep it until they end. False when there is
    /// none of that key.
    ///
    /// # Errors
    /// [`StoreError::Disk`], [`StoreError::Busy`] while it is being made.
    pub fn remove(&self, key: &str) -> Result<bool, StoreError> {
        if Digest::from_hex(key).is_none() {
            return Ok(false);
        }
        let lock = self.disk.lock(key, Duration::ZERO, || {}).map_err(|e| self.disk_error(e))?;
        let _lock = lock.ok_or_else(|| StoreError::Busy { name: key.to_owned(), seconds: 0 })?;
        let mut removed = false;
        // The record first: without it the image does not exist.
        for ending in ["json", "erofs"] {
            match fs::remove_file(self.disk.path("images", &format!("{key}.{ending}"))) {
                Ok(()) => removed = true,
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(self.disk_error(e)),
            }
        }
        Ok(removed)
    }

    /// Removes the pulled layers, which ready images do not need; returns the bytes set free.
    ///
    /// # Errors
    /// [`StoreError::Disk`].
    pub fn remove_layers(&self) -> Result<u64, StoreError> {
        let mut bytes = 0;
        let dir = self.disk.root().join("blobs/sha256");
        for entry in fs::read_dir(dir).map_err(|e| self.disk_error(e))? {
            let entry = entry.map_err(|e| self.disk_error(e))?;
            let length = entry.metadata().map_or(0, |m| m.len());
            if fs::remove_file(entry.path()).is_ok() {
                bytes += length;
            }
        }
        Ok(bytes)
    }

    fn disk_error(&self, source: io::Error) -> StoreError {
        StoreError::Disk { path: self.disk.root().to_owned(), source }
    }

    /// The image of that key, if it is complete.
    fn ready(&self, key: &str) -> Option<Image> {
        let root = self.disk.path("images", &format!("{key}.erofs"));
        let json = fs::read(self.disk.path("images", &format!("{key}.json"))).ok()?;
        let mut image: Image = serde_json::from_slice(&json).ok()?;
        let whole = fs::metadata(&root).is_ok_and(|m| m.len() == image.bytes);
        if !whole || image.format != FORMAT || image.key != key {
            return None;
        }
        image.root = root;
        Some(image)
    }

    fn seen_path(&self, what: &str) -> PathBuf {
        self.disk.path("refs", &format!("{}.json", Digest::of(what.as_bytes()).hex()))
    }

    /// The image that `what` stood for last, if it is still there.
    fn seen(&self, what: &str) -> Option<Image> {
        let json = fs::read(self.seen_path(what)).ok()?;
        let seen: Seen = serde_json::from_slice(&json).ok()?;
        self.ready(&seen.key).filter(|_| seen.what == what)
    }

    fn remember(&self, what: &str, key: &str) -> Result<(), StoreError> {
        let seen = Seen { what: what.to_owned(), key: key.to_owned() };
        let json = serde_json::to_vec(&seen).unwrap_or_default();
        self.disk.write(&self.seen_path(what), &json).map_err(|e| self.disk_error(e))
    }

    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.disk.path("blobs/sha256", digest.hex())
    }
}

#[cfg(test)]
mod tests;
