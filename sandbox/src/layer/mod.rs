//! # Applying layers
//!
//! ```text
//!   blob ──► hash ──► gzip│zstd│plain ──► hash ──► tar entries ──► tree (names, metadata)
//!         digest                       diff id                └──► image file (contents)
//! ```
//!
//! One pass, nothing on the host but the image file. Both digests are checked at the end of
//! each layer; until then nothing that came out of it is published.
//!
//! What an entry may do follows the OCI image specification ("Image Layer Filesystem
//! Changeset") and, where that is silent, containerd:
//! - a name with a `..` component is an error, as is a hard link to one: no honest program
//!   writes them. A leading `/` is dropped: several build tools write it, and it means the
//!   image's root.
//! - parents are found through the symbolic links of the image, inside the image's root; missing
//!   parents are made (mode 0755, owner root).
//! - a directory over a directory merges, anything else replaces.
//! - `.wh.NAME` hides NAME of lower layers, `.wh..wh..opq` all that lower layers put into its
//!   directory; other names that start with `.wh..wh.` are bookkeeping of AUFS and are dropped.
//! - attributes that no Linux file system under EROFS can hold (`com.apple.*`) are dropped, and
//!   so are those that steer overlayfs (`trusted.overlay.*`): the image becomes a lower layer of
//!   an overlay in the guest, and must not speak to it.

mod stream;
mod tar;

use std::io::{self, Read};

pub(crate) use stream::decompress;
use tar::Entry;
pub(crate) use tar::{Kind, Reader};

use crate::digest::{Digest, Hashing};
use crate::erofs::{Contents, INLINE_BYTES};
use crate::limits::{Limits, NAME_BYTES, PATH_BYTES};
use crate::tree::{Body, Content, Id, Meta, Tree, Walk, WalkError};

/// Why a layer cannot be applied.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The blob cannot be read or decompressed.
    #[error("The layer's data cannot be read or decompressed")]
    Read(#[source] io::Error),
    /// The archive ends inside an entry.
    #[error("The layer ends in the middle of an entry, after {offset} bytes of tar")]
    Truncated {
        /// Tar bytes read so far.
        offset: u64,
    },
    /// The archive is not a well-formed tar.
    #[error("The tar archive {why} before byte {offset}")]
    Malformed {
        /// Tar bytes read so far.
        offset: u64,
        /// What is wrong with it.
        why: &'static str,
    },
    /// An entry of a type that has no place in a layer.
    #[error("Entry '{entry}' has type flag {flag:#04x}, which is no file, directory, link, device or FIFO")]
    Kind {
        /// The entry's name.
        entry: String,
        /// The flag byte.
        flag: u8,
    },
    /// An entry's own name is not acceptable.
    #[error("Entry '{entry}' {why}")]
    Name {
        /// The entry's name.
        entry: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The directory that an entry belongs into cannot be reached.
    #[error("Entry '{entry}' cannot be placed: {why}")]
    Parent {
        /// The entry's name.
        entry: String,
        /// What is in the way.
        why: &'static str,
    },
    /// A link cannot be made.
    #[error("Entry '{entry}' is a link to '{target}', which {why}")]
    Link {
        /// The entry's name.
        entry: String,
        /// The link's target.
        target: String,
        /// What is wrong with the target.
        why: &'static str,
    },
    /// A cap of [`Limits`] is reached.
    #[error("The layers hold more than {limit} {what}, the limit set for one image")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// The bytes are not the ones that were named.
    #[error("The layer's {what} is {actual}, but {expected} was asked for")]
    Digest {
        /// Which digest: of the blob, or of the archive in it.
        what: &'static str,
        /// What the manifest or configuration names.
        expected: Digest,
        /// What the bytes have.
        actual: Digest,
    },
    /// The image file cannot be written.
    #[error("The image file cannot be written")]
    Write(#[source] io::Error),
}

/// A name for a message: printable, and not longer than a person reads.
pub(crate) fn shown(name: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(name).chars().take(200).collect();
    text.escape_debug().to_string()
}

/// Applies layers to a tree, lowest first.
pub(crate) struct Applier<'a> {
    tree: Tree,
    contents: &'a mut Contents,
    limits: &'a Limits,
    layer: usize,
    entries: u64,
    unpacked: u64,
    metadata: u64,
    claimed: u64,
}

impl<'a> Applier<'a> {
    pub(crate) fn new(contents: &'a mut Contents, limits: &'a Limits) -> Self {
        Self {
            tree: Tree::new(limits.depth),
            contents,
            limits,
            layer: 0,
            entries: 0,
            unpacked: 0,
            metadata: 0,
            claimed: 0,
        }
    }

    /// The tree that the layers made.
    pub(crate) fn into_tree(self) -> Tree {
        self.tree
    }

    /// Applies one layer. `digest` is that of the blob (`None` when it was checked before),
    /// `diff_id` that of the tar archive in it.
    pub(crate) fn apply(
        &mut self,
        blob: impl Read,
        digest: Option<&Digest>,
        diff_id: &Digest,
    ) -> Result<(), LayerError> {
        let mut blob = Hashing::new(blob);
        let tar = decompress(&mut blob).map_err(LayerError::Read)?;
        // One byte above the limit tells "exactly the limit" from "more".
        let room = self.limits.unpacked_bytes - self.unpacked;
        let mut reader = Reader::new(Hashing::new(tar.take(room.saturating_add(1))));
        let entries = self.entries(&mut reader);
        // A stream cut at the limit looks truncated; say what really happened.
        if reader.offset() > room {
            return Err(self.too_large());
        }
        if let Err(error) = entries {
            // A damaged blob fails somewhere in the middle; its digest tells that it is damaged.
            drop(reader);
            if let (Some(expected), Ok((actual, _))) = (digest, blob.finish()) {
                check("digest", expected, actual)?;
            }
            return Err(error);
        }
        let (actual, bytes) = reader.into_inner().finish().map_err(LayerError::Read)?;
        if bytes > room {
            return Err(self.too_large());
        }
        self.unpacked += bytes;
        check("uncompressed digest (diff id)", diff_id, actual)?;
        if let Some(expected) = digest {
            let (actual, _) = blob.finish().map_err(LayerError::Read)?;
            check("digest", expected, actual)?;
        }
        self.layer += 1;
        Ok(())
    }

    fn too_large(&self) -> LayerError {
        LayerError::Limit { what: "unpacked bytes", limit: self.limits.unpacked_bytes }
    }

    fn entries<R: Read>(&mut self, reader: &mut Reader<R>) -> Result<(), LayerError> {
        while let Some(entry) = reader.next_entry()? {
            self.entries += 1;
            if self.entries > self.limits.entries {
                return Err(LayerError::Limit { what: "entries", limit: self.limits.entries });
            }
            self.entry(&entry, reader)?;
        }
        Ok(())
    }

    /// Counts what a node keeps in memory.
    fn charge(&mut self, bytes: usize) -> Result<(), LayerError> {
        self.metadata += bytes as u64;
        if self.metadata > self.limits.metadata_bytes {
            return Err(LayerError::Limit {
                what: "bytes of names and attributes",
                limit: self.limits.metadata_bytes,
            });
        }
        Ok(())
    }

    fn entry<R: Read>(&mut self, entry: &Entry, reader: &mut Reader<R>) -> Result<(), LayerError> {
        let parts =
            components(&entry.path).map_err(|why| LayerError::Name { entry: shown(&entry.path), why })?;
        let Some((&name, parents)) = parts.split_last() else {
            if entry.kind == Kind::Directory {
                self.tree.node_mut(Tree::ROOT).meta = meta(entry);
            }
            return Ok(());
        };
        if parts.iter().any(|p| p.starts_with(b".wh..wh.") && *p != b".wh..wh..opq") {
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(b".wh.") {
            return self.whiteout(entry, parents, hidden);
        }
        let Some(dir) = self.parent(&entry.path, parents, Walk::Create(self.layer))? else {
            return Ok(());
        };
        let xattrs: usize = entry.xattrs.iter().map(|(k, v)| k.len() + v.len() + 64).sum();
        self.charge(name.len() + entry.link.len() + xattrs + 256)?;
        let body = match entry.kind {
            Kind::Directory => {
                self.tree.merge_directory(dir, name, self.layer, meta(entry));
                return Ok(());
            }
            Kind::HardLink => return self.hard_link(entry, dir, name),
            Kind::File => Body::File(self.content(entry, reader)?),
            Kind::Symlink => Body::Symlink(symlink_target(entry)?),
            Kind::Character => Body::Character(entry.device.0, entry.device.1),
            Kind::Block => Body::Block(entry.device.0, entry.device.1),
            Kind::Fifo => Body::Fifo,
        };
        self.tree.insert(dir, name, self.layer, meta(entry), body);
        Ok(())
    }

    fn parent(&mut self, path: &[u8], parts: &[&[u8]], walk: Walk) -> Result<Option<Id>, LayerError> {
        let before = self.tree.len();
        let found = self
            .tree
            .directory(parts, walk)
            .map_err(|error| LayerError::Parent { entry: shown(path), why: walk_text(error) })?;
        self.charge((self.tree.len() - before) * (NAME_BYTES + 256))?;
        Ok(found)
    }

    fn whiteout(&mut self, entry: &Entry, parents: &[&[u8]], hidden: &[u8]) -> Result<(), LayerError> {
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(LayerError::Name { entry: shown(&entry.path), why: "is a whiteout of no name" });
        }
        if let Some(dir) = self.parent(&entry.path, parents, Walk::Look)? {
            if hidden == b".wh..opq" {
                self.tree.hide_contents(dir, self.layer);
            } else {
                self.tree.hide(dir, hidden, self.layer);
            }
        }
        Ok(())
    }

    fn hard_link(&mut self, entry: &Entry, dir: Id, name: &[u8]) -> Result<(), LayerError> {
        let bad = |why| LayerError::Link { entry: shown(&entry.path), target: shown(&entry.link), why };
        let parts = components(&entry.link).map_err(bad)?;
        let Some((&last, parents)) = parts.split_last() else {
            return Err(bad("is the image's root"));
        };
        let parent = self.tree.directory(parents, Walk::Look).map_err(|e| bad(walk_text(e)))?;
        let target = parent.and_then(|dir| self.tree.lookup(dir, last));
        let target = target.ok_or_else(|| bad("does not exist in the image"))?;
        if self.tree.entries(target).is_some() {
            return Err(bad("is a directory"));
        }
        self.tree.link(dir, name, self.layer, target);
        Ok(())
    }

    /// Copies a file's bytes to where they will stay.
    fn content<R: Read>(&mut self, entry: &Entry, reader: &mut Reader<R>) -> Result<Content, LayerError> {
        self.claimed = self.claimed.saturating_add(entry.size);
        if self.claimed > self.limits.unpacked_bytes {
            return Err(LayerError::Limit { what: "bytes in files", limit: self.limits.unpacked_bytes });
        }
        if entry.size <= INLINE_BYTES as u64 {
            // Lossless: at most INLINE_BYTES.
            let mut bytes = vec![0; entry.size as usize];
            for &(offset, length) in &entry.segments {
                let (from, to) = (offset as usize, (offset + length) as usize);
                reader.read_content(&mut bytes[from..to])?;
            }
            self.charge(bytes.len())?;
            return Ok(Content::Inline(bytes.into()));
        }
        let start = self.contents.allocate(entry.size).map_err(LayerError::Write)?;
        let mut buffer = vec![0; 64 << 10];
        for &(mut offset, length) in &entry.segments {
            let end = offset + length;
            while offset < end {
                // Lossless: at most the buffer's length.
                let want = (end - offset).min(buffer.len() as u64) as usize;
                let got = reader.read_content(&mut buffer[..want])?;
                if got == 0 {
                    return Err(LayerError::Truncated { offset: reader.offset() });
                }
                self.contents.write(start, offset, &buffer[..got]).map_err(LayerError::Write)?;
                offset += got as u64;
            }
        }
        Ok(Content::Blocks { start, size: entry.size })
    }
}

fn check(what: &'static str, expected: &Digest, actual: Digest) -> Result<(), LayerError> {
    if *expected == actual {
        return Ok(());
    }
    Err(LayerError::Digest { what, expected: expected.clone(), actual })
}

fn walk_text(error: WalkError) -> &'static str {
    match error {
        WalkError::NotDirectory => "has a parent that is no directory",
        WalkError::TooManyLinks => "has a parent behind more than 40 symbolic links",
        WalkError::TooDeep => "is deeper than directories may be nested",
    }
}

/// The components of a path inside the image.
fn components(path: &[u8]) -> Result<Vec<&[u8]>, &'static str> {
    if path.len() > PATH_BYTES {
        return Err("has a path above 4096 bytes");
    }
    if path.contains(&0) {
        return Err("has a zero byte in its path");
    }
    let mut parts = Vec::new();
    for part in path.split(|&b| b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err("has a '..' in its path, which could leave the image's root"),
            _ if part.len() > NAME_BYTES => return Err("has a name above 255 bytes"),
            _ => parts.push(part),
        }
    }
    Ok(parts)
}

fn symlink_target(entry: &Entry) -> Result<Box<[u8]>, LayerError> {
    let why = match &entry.link {
        target if target.is_empty() => "is empty",
        // The kernel reads a target into one page with a zero byte at its end.
        target if target.len() >= PATH_BYTES => "is above 4095 bytes",
        target if target.contains(&0) => "has a zero byte",
        target => return Ok(target[..].into()),
    };
    Err(LayerError::Link { entry: shown(&entry.path), target: shown(&entry.link), why })
}

fn meta(entry: &Entry) -> Meta {
    let mut xattrs = entry.xattrs.clone();
    xattrs.retain(|name, value| crate::erofs::keeps_xattr(name, value));
    Meta { mode: entry.mode, uid: entry.uid, gid: entry.gid, mtime: entry.mtime, xattrs }
}

#[cfg(test)]
mod tests;
