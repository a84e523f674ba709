//! One inode: its 64 bytes, its extended attributes, and the bytes of a directory.

use std::collections::BTreeMap;

use super::BLOCK;
use crate::tree::{Body, Meta};

/// `struct erofs_inode_extended`.
pub(crate) const INODE_BYTES: u64 = 64;
/// `struct erofs_xattr_ibody_header`.
const XATTR_HEADER: usize = 12;
/// `struct erofs_dirent`.
const DIRENT: usize = 12;
/// An address where there is no data block.
pub(crate) const NOWHERE: u32 = u32::MAX;

/// How an inode's data is found (`EROFS_INODE_FLAT_PLAIN`, `EROFS_INODE_FLAT_INLINE`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    Plain = 0,
    Inline = 2,
}

/// Prefixes that the format stores as a number.
const PREFIXES: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];

/// The number of an attribute's prefix, and the rest of its name.
fn split_xattr(name: &[u8]) -> Option<(u8, &[u8])> {
    PREFIXES.iter().find_map(|&(prefix, index)| {
        let rest = name.strip_prefix(prefix)?;
        // The two access control lists have no rest, the others must have one.
        (rest.is_empty() == matches!(index, 2 | 3)).then_some((index, rest))
    })
}

/// Whether an attribute goes into the image: one whose name and size the format can hold, and
/// that does not steer the overlay file system the image is mounted under.
pub(crate) fn keeps_xattr(name: &[u8], value: &[u8]) -> bool {
    let steers = name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.");
    !steers
        && value.len() <= usize::from(u16::MAX)
        && split_xattr(name).is_some_and(|(_, rest)| rest.len() <= usize::from(u8::MAX))
}

/// The attributes as they stand behind an inode; empty when there are none. What does not fit
/// into the 16-bit count (256 KiB) any more is left out; tar headers cannot carry that much
/// more.
pub(crate) fn xattr_bytes(xattrs: &BTreeMap<Vec<u8>, Vec<u8>>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in xattrs.iter().filter(|(n, v)| keeps_xattr(n, v)) {
        let Some((index, rest)) = split_xattr(name) else {
            continue;
        };
        let length = (4 + rest.len() + value.len()).next_multiple_of(4);
        if bytes.is_empty() {
            bytes.resize(XATTR_HEADER, 0);
        }
        if bytes.len() + length > 4 * usize::from(u16::MAX) {
            break;
        }
        let end = bytes.len() + length;
        // Lossless: keeps_xattr has checked both.
        bytes.extend([rest.len() as u8, index]);
        bytes.extend((value.len() as u16).to_le_bytes());
        bytes.extend(rest);
        bytes.extend(value);
        bytes.resize(end, 0);
    }
    bytes
}

/// What the 64 bytes of an inode say.
pub(crate) struct Inode<'a> {
    pub meta: &'a Meta,
    pub body: &'a Body,
    pub layout: Layout,
    pub xattr_bytes: usize,
    pub size: u64,
    /// First data block, or [`NOWHERE`].
    pub start: u32,
    /// Inode number for 32-bit programs.
    pub number: u32,
    pub links: u32,
}

impl Inode<'_> {
    pub(crate) fn encode(&self) -> [u8; INODE_BYTES as usize] {
        let mut out = [0; INODE_BYTES as usize];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        let xattr_count = match self.xattr_bytes {
            0 => 0,
            n => (n - XATTR_HEADER) / 4 + 1,
        };
        let union = match *self.body {
            Body::Character(major, minor) | Body::Block(major, minor) => {
                (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
            }
            Body::Fifo | Body::Gone => 0,
            _ => self.start,
        };
        put(0, &(1 | (self.layout as u16) << 1).to_le_bytes());
        // Lossless: xattr_bytes() stays below 256 KiB.
        put(2, &(xattr_count as u16).to_le_bytes());
        put(4, &(self.meta.mode & 0o7777 | type_bits(self.body)).to_le_bytes());
        put(8, &self.size.to_le_bytes());
        put(16, &union.to_le_bytes());
        put(20, &self.number.to_le_bytes());
        put(24, &self.meta.uid.to_le_bytes());
        put(28, &self.meta.gid.to_le_bytes());
        put(32, &self.meta.mtime.0.to_le_bytes());
        put(40, &self.meta.mtime.1.to_le_bytes());
        put(44, &self.links.to_le_bytes());
        out
    }
}

/// `S_IFMT` bits.
fn type_bits(body: &Body) -> u16 {
    match body {
        Body::Directory(_) => 0o040_000,
        Body::File(_) => 0o100_000,
        Body::Symlink(_) => 0o120_000,
        Body::Character(..) => 0o020_000,
        Body::Block(..) => 0o060_000,
        Body::Fifo | Body::Gone => 0o010_000,
    }
}

/// `EROFS_FT_*`.
pub(crate) fn dirent_type(body: &Body) -> u8 {
    match body {
        Body::File(_) => 1,
        Body::Directory(_) => 2,
        Body::Character(..) => 3,
        Body::Block(..) => 4,
        Body::Fifo | Body::Gone => 5,
        Body::Symlink(_) => 7,
    }
}

/// How many of the names, in order, go into each block of a directory, and the bytes used in
/// the last one. Names do not cross blocks, so that the kernel can search block by block.
pub(crate) fn dirent_blocks<'a>(names: impl Iterator<Item = &'a [u8]>) -> (Vec<usize>, usize) {
    let mut counts = Vec::new();
    let (mut count, mut used) = (0, 0);
    for name in names {
        let more = DIRENT + name.len();
        if used + more > BLOCK as usize {
            counts.push(count);
            (count, used) = (0, 0);
        }
        count += 1;
        used += more;
    }
    counts.push(count);
    (counts, used)
}

/// The bytes of a directory: per block the fixed parts, then the names. `entries` must be
/// sorted by name and give name, inode address and type.
pub(crate) fn dirent_bytes(entries: &[(&[u8], u64, u8)]) -> Vec<u8> {
    let (counts, _) = dirent_blocks(entries.iter().map(|e| e.0));
    let mut out: Vec<u8> = Vec::new();
    let mut rest = entries;
    for count in counts {
        let (block, later) = rest.split_at(count);
        rest = later;
        // The padding of the block before; the last block stays as long as it is.
        out.resize(out.len().next_multiple_of(BLOCK as usize), 0);
        let mut name_at = count * DIRENT;
        for (name, nid, kind) in block {
            out.extend(nid.to_le_bytes());
            // Lossless: below the block size.
            out.extend((name_at as u16).to_le_bytes());
            out.extend([*kind, 0]);
            name_at += name.len();
        }
        for (name, ..) in block {
            out.extend(*name);
        }
    }
    out
}
