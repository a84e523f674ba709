//! # Images in files: OCI layouts and `docker save` archives
//!
//! Both are a set of named byte runs with one index among them, whether the set is a directory
//! or a tar file. A tar is never unpacked: its headers are read once, and layers are then read
//! from their place in it. Only a compressed archive is decompressed first, into a temporary
//! file, because its parts come in any order.
//!
//! Content named by a digest is checked against it; a `docker save` archive of older versions
//! names layers by other means, and there the diff ids of the configuration do.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use crate::digest::Digest;
use crate::layer::{Kind, LayerError, Reader, decompress};
use crate::limits::{INDEX_DEPTH, Limits};
use crate::manifest::{Descriptor, IndexEntry, Manifest, ManifestError};
use crate::reference::Reference;

/// The most members an archive may have; a saved image has a handful per layer.
const MEMBERS: usize = 20_000;

/// Why an image file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The file or directory cannot be read.
    #[error("The image '{}' cannot be read", path.display())]
    Read {
        /// What could not be read.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Not a tar archive.
    #[error("'{}' is no readable tar archive", path.display())]
    Tar {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: LayerError,
    },
    /// A tar archive or directory of something else.
    #[error(
        "'{}' is no image: it has neither manifest.json ('docker save') nor index.json (OCI layout); unpack a plain root file system into a directory and name that",
        path.display()
    )]
    NotImage {
        /// The file.
        path: PathBuf,
    },
    /// A part that is named and not there.
    #[error("The image '{}' lacks its part '{name}'", path.display())]
    Missing {
        /// The image.
        path: PathBuf,
        /// The part.
        name: String,
    },
    /// Several images, and none chosen; or none of that name.
    #[error("'{}' holds {names}: choose one with 'oci:PATH:NAME' or 'docker-archive:PATH:NAME'", path.display())]
    Choice {
        /// The image.
        path: PathBuf,
        /// What there is.
        names: String,
    },
    /// A manifest that is none.
    #[error("The image '{}' has an unusable manifest", path.display())]
    Manifest {
        /// The image.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: ManifestError,
    },
    /// A part whose content is not what its name says.
    #[error("In '{}' the part '{name}' has the digest {actual}: the image is damaged", path.display())]
    Digest {
        /// The image.
        path: PathBuf,
        /// The part.
        name: String,
        /// The digest of its content.
        actual: Digest,
    },
    /// A part beyond its limit.
    #[error("In '{}' {what} is larger than {limit} bytes", path.display())]
    TooLarge {
        /// The image.
        path: PathBuf,
        /// Which part.
        what: String,
        /// The limit.
        limit: u64,
    },
}

/// A run of bytes in a file: one layer, compressed or not.
#[derive(Clone, Debug)]
pub(crate) struct Blob {
    file: Arc<File>,
    start: u64,
    length: u64,
    /// The digest still to be checked when the bytes are read.
    pub digest: Option<Digest>,
}

impl Blob {
    /// The whole of a file.
    pub(crate) fn of_file(file: File, digest: Option<Digest>) -> io::Result<Self> {
        Ok(Self { length: file.metadata()?.len(), file: Arc::new(file), start: 0, digest })
    }

    pub(crate) fn reader(&self) -> impl Read + use<> {
        let at = At { file: self.file.clone(), next: self.start };
        at.take(self.length)
    }
}

/// Reads a file from an offset on, without a position that others could move.
struct At {
    file: Arc<File>,
    next: u64,
}

impl Read for At {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buffer, self.next)?;
        self.next += n as u64;
        Ok(n)
    }
}

/// An image found in a file.
#[derive(Debug)]
pub(crate) struct Found {
    /// What it is called there, if it is called anything.
    pub name: Option<String>,
    pub config: Vec<u8>,
    pub layers: Vec<Blob>,
}

/// Finds the image in an OCI layout directory.
pub(crate) fn open_layout(path: &Path, pick: Option<&str>, limits: &Limits) -> Result<Found, ArchiveError> {
    let parts = Parts { path, limits, members: None };
    parts.oci(pick)
}

/// Finds the image in a tar file. `temporary` makes the file that a compressed archive is
/// decompressed into.
pub(crate) fn open_tar(
    path: &Path,
    pick: Option<&str>,
    limits: &Limits,
    temporary: impl FnOnce() -> io::Result<File>,
) -> Result<Found, ArchiveError> {
    let read_error = |source| ArchiveError::Read { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(read_error)?;
    let mut magic = [0; 4];
    let got = file.read_at(&mut magic, 0).map_err(read_error)?;
    if matches!(magic[..got], [0x1f, 0x8b, ..] | [0x28, 0xb5, 0x2f, 0xfd]) {
        let limit = limits.unpacked_bytes;
        let tar = decompress(&mut file).map_err(read_error)?;
        let mut plain = temporary().map_err(read_error)?;
        let copied = io::copy(&mut tar.take(limit.saturating_add(1)), &mut plain).map_err(read_error)?;
        if copied > limit {
            return Err(ArchiveError::TooLarge {
                path: path.to_owned(),
                what: "the decompressed archive".into(),
                limit,
            });
        }
        file = plain;
    }
    let members =
        members(&Arc::new(file)).map_err(|source| ArchiveError::Tar { path: path.to_owned(), source })?;
    let parts = Parts { path, limits, members: Some(members) };
    if parts.open("manifest.json")?.is_some() {
        return parts.docker(pick);
    }
    parts.oci(pick)
}

/// One member of a tar file.
enum Member {
    Bytes(Blob),
    /// Old `docker save` archives link equal layers to each other.
    Link(String),
}

fn members(file: &Arc<File>) -> Result<BTreeMap<String, Member>, LayerError> {
    let mut members = BTreeMap::new();
    let mut next = 0;
    loop {
        let mut reader = Reader::new(At { file: Arc::clone(file), next });
        let Some(entry) = reader.next_entry()? else {
            return Ok(members);
        };
        let start = next + reader.offset();
        let stored: u64 = entry.segments.iter().map(|s| s.1).sum();
        next = start + stored.next_multiple_of(512);
        let name = plain_name(&String::from_utf8_lossy(&entry.path));
        let target = String::from_utf8_lossy(&entry.link).into_owned();
        let member = match entry.kind {
            Kind::File if stored == entry.size => {
                Member::Bytes(Blob { file: file.clone(), start, length: stored, digest: None })
            }
            Kind::HardLink => Member::Link(plain_name(&target)),
            Kind::Symlink => {
                let dir = name.rsplit_once('/').map_or("", |(dir, _)| dir);
                Member::Link(plain_name(&format!("{dir}/{target}")))
            }
            _ => continue,
        };
        members.insert(name, member);
        if members.len() > MEMBERS {
            return Err(LayerError::Limit { what: "members", limit: MEMBERS as u64 });
        }
    }
}

/// A member name without `.`, `..` and empty components. Names are keys of a map here and never
/// paths, so `..` is worked out and cannot lead anywhere.
fn plain_name(name: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            _ => parts.push(part),
        }
    }
    parts.join("/")
}

/// The parts of an image, by name.
struct Parts<'a> {
    path: &'a Path,
    limits: &'a Limits,
    /// `None`: files below `path`.
    members: Option<BTreeMap<String, Member>>,
}

/// One image of `manifest.json` (Docker image spec v1.2, "Combined Image JSON + Filesystem
/// Changeset Format").
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Option<Vec<String>>,
}

impl Parts<'_> {
    fn read_error(&self, source: io::Error) -> ArchiveError {
        ArchiveError::Read { path: self.path.to_owned(), source }
    }

    fn missing(&self, name: &str) -> ArchiveError {
        ArchiveError::Missing { path: self.path.to_owned(), name: name.chars().take(200).collect() }
    }

    fn bad_manifest(&self, source: ManifestError) -> ArchiveError {
        ArchiveError::Manifest { path: self.path.to_owned(), source }
    }

    /// A part, if it is there. In a directory only names made by this module get here.
    fn open(&self, name: &str) -> Result<Option<Blob>, ArchiveError> {
        let Some(members) = &self.members else {
            return match File::open(self.path.join(name)) {
                Ok(file) => Blob::of_file(file, None).map(Some).map_err(|e| self.read_error(e)),
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(e) => Err(self.read_error(e)),
            };
        };
        let mut name = plain_name(name);
        // One link, perhaps two; a ring ends the loop.
        for _ in 0..4 {
            match members.get(&name) {
                Some(Member::Bytes(blob)) => return Ok(Some(blob.clone())),
                Some(Member::Link(target)) => name.clone_from(target),
                None => return Ok(None),
            }
        }
        Ok(None)
    }

    /// A small part, whole.
    fn bytes(&self, name: &str) -> Result<Vec<u8>, ArchiveError> {
        let blob = self.open(name)?.ok_or_else(|| self.missing(name))?;
        let limit = self.limits.manifest_bytes;
        if blob.length > limit {
            return Err(ArchiveError::TooLarge {
                path: self.path.to_owned(),
                what: format!("'{name}'"),
                limit,
            });
        }
        let mut bytes = Vec::new();
        blob.reader().read_to_end(&mut bytes).map_err(|e| self.read_error(e))?;
        Ok(bytes)
    }

    /// A small part named by its digest, checked.
    fn named(&self, descriptor: &Descriptor) -> Result<Vec<u8>, ArchiveError> {
        let name = blob_name(&descriptor.digest);
        let bytes = self.bytes(&name)?;
        self.check(&name, &descriptor.digest, &bytes)?;
        Ok(bytes)
    }

    fn check(&self, name: &str, expected: &Digest, bytes: &[u8]) -> Result<(), ArchiveError> {
        let actual = Digest::of(bytes);
        if actual == *expected {
            return Ok(());
        }
        Err(ArchiveError::Digest { path: self.path.to_owned(), name: name.to_owned(), actual })
    }

    /// A layer named by its digest, which is checked when it is applied.
    fn layer(&self, digest: &Digest) -> Result<Blob, ArchiveError> {
        let name = blob_name(digest);
        let mut blob = self.open(&name)?.ok_or_else(|| self.missing(&name))?;
        blob.digest = Some(digest.clone());
        Ok(blob)
    }

    fn oci(&self, pick: Option<&str>) -> Result<Found, ArchiveError> {
        if self.open("index.json")?.is_none() {
            return Err(ArchiveError::NotImage { path: self.path.to_owned() });
        }
        let parse = |json: &[u8]| Manifest::parse(json, self.limits).map_err(|e| self.bad_manifest(e));
        let mut manifest = parse(&self.bytes("index.json")?)?;
        let mut name = None;
        for level in 0..=INDEX_DEPTH {
            match manifest {
                Manifest::Image { config, layers } => {
                    return Ok(Found {
                        name,
                        config: self.named(&config)?,
                        layers: layers.iter().map(|l| self.layer(&l.digest)).collect::<Result<_, _>>()?,
                    });
                }
                Manifest::Index(entries) => {
                    // Only the outermost index has names to choose by.
                    let pick = if level == 0 { pick } else { None };
                    let entry = self.choose(&entries, pick)?;
                    name = name.or_else(|| entry.name.clone());
                    manifest = parse(&self.named(&entry.descriptor)?)?;
                }
            }
        }
        Err(self.bad_manifest(ManifestError::Syntax("indexes are nested too deep".into())))
    }

    fn choose<'a>(
        &self,
        entries: &'a [IndexEntry],
        pick: Option<&str>,
    ) -> Result<&'a IndexEntry, ArchiveError> {
        let names: Vec<&str> = entries.iter().filter_map(|e| e.name.as_deref()).collect();
        let found = match pick {
            Some(pick) => entries.iter().find(|e| e.name.as_deref().is_some_and(|n| is_called(n, pick))),
            None if names.iter().any(|n| *n != names[0]) => None,
            None => entries.first(),
        };
        found.ok_or_else(|| self.choice(&names))
    }

    fn choice(&self, names: &[&str]) -> ArchiveError {
        let some: Vec<String> = names.iter().take(20).map(|n| format!("'{n}'")).collect();
        ArchiveError::Choice {
            path: self.path.to_owned(),
            names: if some.is_empty() { "images without names".into() } else { some.join(", ") },
        }
    }

    fn docker(&self, pick: Option<&str>) -> Result<Found, ArchiveError> {
        let json = self.bytes("manifest.json")?;
        let images: Vec<Saved> = serde_json::from_slice(&json)
            .map_err(|e| self.bad_manifest(ManifestError::Syntax(e.to_string())))?;
        let tags = |image: &Saved| image.repo_tags.clone().unwrap_or_default();
        let image = match (pick, &images[..]) {
            (None, [one]) => Some(one),
            (None, _) => None,
            (Some(pick), all) => all.iter().find(|i| tags(i).iter().any(|t| is_called(t, pick))),
        };
        let Some(image) = image else {
            let names: Vec<String> = images.iter().flat_map(tags).collect();
            return Err(self.choice(&names.iter().map(String::as_str).collect::<Vec<_>>()));
        };
        let layers = image.layers.as_deref().unwrap_or_default();
        if layers.len() > self.limits.layers {
            return Err(self.bad_manifest(ManifestError::Limit {
                what: "layers",
                actual: layers.len() as u64,
                limit: self.limits.layers as u64,
            }));
        }
        let config = self.bytes(&image.config)?;
        if let Some(expected) = digest_in_name(&image.config) {
            self.check(&image.config, &expected, &config)?;
        }
        let mut blobs = Vec::with_capacity(layers.len());
        for name in layers {
            let mut blob = self.open(name)?.ok_or_else(|| self.missing(name))?;
            blob.digest = digest_in_name(name);
            blobs.push(blob);
        }
        Ok(Found { name: tags(image).into_iter().next(), config, layers: blobs })
    }
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// The digest that a `docker save` name promises: `blobs/sha256/HEX` of new versions, `HEX.json`
/// of a configuration in old ones.
fn digest_in_name(name: &str) -> Option<Digest> {
    let hex = name.strip_prefix("blobs/sha256/").or_else(|| name.strip_suffix(".json"))?;
    Digest::from_hex(hex)
}

/// Whether an image called `name` is meant by `pick`: the same text, the same reference, or the
/// tag alone.
fn is_called(name: &str, pick: &str) -> bool {
    let reference = |text| Reference::parse(text).ok();
    let same = || reference(name).is_some_and(|n| reference(pick) == Some(n));
    let tag = || reference(name).is_some_and(|n| n.tag() == Some(pick));
    name == pick || same() || tag()
}
