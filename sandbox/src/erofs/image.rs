//! From a finished tree to a finished image: give every inode its place, then write
//! directories, inodes and superblock.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

use super::inode::{
    INODE_BYTES, Inode, Layout, NOWHERE, dirent_blocks, dirent_bytes, dirent_type, xattr_bytes,
};
use super::{BLOCK, Contents};
use crate::tree::{Body, Content, Id, Name, Tree};

/// Inodes are addressed in units of 32 bytes.
const SLOT: u64 = 32;
/// The root's number is stored in 16 bits, so it comes first; number 0 would be taken for a
/// deleted entry by some C libraries.
const FIRST_SLOT: u64 = 2;
const MAGIC: u32 = 0xE0F5_E1E2;
/// `EROFS_FEATURE_COMPAT_SB_CHKSUM` and `EROFS_FEATURE_COMPAT_MTIME`.
const COMPAT: u32 = 1 | 2;
const SUPERBLOCK_AT: usize = 1024;

/// Where one node's parts go.
struct Place {
    id: Id,
    parent: Id,
    /// Byte offset of the inode from the start of the metadata.
    at: u64,
    layout: Layout,
    xattr_bytes: u64,
    size: u64,
    /// First block of what is not inline; for files that is where it was written already.
    start: u32,
}

impl Place {
    fn nid(&self) -> u64 {
        self.at / SLOT
    }
}

/// Writes everything but the contents and makes the file as long as the image. `uuid` names the
/// file system. Returns the image's length in bytes.
pub(crate) fn write(mut contents: Contents, tree: &Tree, uuid: [u8; 16]) -> io::Result<u64> {
    let dead_end = contents.next();
    let mut places = place_all(tree);
    let nids = inode_numbers(tree, &places);
    write_blocks(&mut contents, tree, &mut places, &nids)?;
    contents.punch_unused(dead_end, runs_in_use(tree, &places));
    let meta_start = contents.next();
    let meta_bytes = write_inodes(&contents, tree, &places, &nids)?;
    let blocks = meta_start + meta_bytes.div_ceil(BLOCK);
    let too_large = |_| io::Error::from(io::ErrorKind::FileTooLarge);
    let superblock = Superblock {
        blocks: u32::try_from(blocks).map_err(too_large)?,
        meta_start: u32::try_from(meta_start).map_err(too_large)?,
        inodes: places.len() as u64,
        uuid,
    };
    contents.file().set_len(blocks * BLOCK)?;
    contents.file().write_all_at(&superblock.encode(), 0)?;
    Ok(blocks * BLOCK)
}

/// All living nodes, the root first, the children of a directory next to each other.
fn place_all(tree: &Tree) -> Vec<Place> {
    let mut places: Vec<Place> = Vec::new();
    let mut seen = vec![false; tree.len()];
    let mut next = FIRST_SLOT * SLOT;
    let mut queue = std::collections::VecDeque::from([(Tree::ROOT, Tree::ROOT)]);
    while let Some((id, parent)) = queue.pop_front() {
        if std::mem::replace(&mut seen[id], true) {
            continue;
        }
        places.push(place(tree, id, parent, &mut next));
        if let Some(entries) = tree.entries(id) {
            queue.extend(entries.values().map(|child| (child.id, id)));
        }
    }
    places
}

fn place(tree: &Tree, id: Id, parent: Id, next: &mut u64) -> Place {
    let node = tree.node(id);
    let xattr_bytes = xattr_bytes(&node.meta.xattrs).len() as u64;
    let (size, wants_inline, start) = match &node.body {
        Body::Directory(entries) => {
            let (counts, last) = dirent_blocks(sorted_names(entries).map(|(name, _)| name));
            ((counts.len() as u64 - 1) * BLOCK + last as u64, true, NOWHERE)
        }
        Body::Symlink(target) => (target.len() as u64, true, NOWHERE),
        Body::File(Content::Inline(bytes)) => (bytes.len() as u64, !bytes.is_empty(), NOWHERE),
        Body::File(Content::Blocks { start, size }) => (*size, false, *start),
        _ => (0, false, NOWHERE),
    };
    let head = INODE_BYTES + xattr_bytes;
    let inline = wants_inline && head + size <= BLOCK;
    let whole = if inline { head + size } else { head };
    // Inline data must not cross a block, nor should an inode. Only an inode whose attributes
    // alone are larger than a block may; the kernel reads those across blocks.
    if *next % BLOCK + whole.min(BLOCK) > BLOCK {
        *next = next.next_multiple_of(BLOCK);
    }
    let at = *next;
    *next = (at + whole).next_multiple_of(SLOT);
    Place {
        id,
        parent,
        at,
        layout: if inline { Layout::Inline } else { Layout::Plain },
        xattr_bytes,
        size,
        start,
    }
}

/// The numbers of all nodes, by node; dead nodes have 0.
fn inode_numbers(tree: &Tree, places: &[Place]) -> Vec<u64> {
    let mut nids = vec![0; tree.len()];
    for place in places {
        nids[place.id] = place.nid();
    }
    nids
}

/// A directory's names with `.` and `..` among them, in byte order.
fn sorted_names(entries: &BTreeMap<Box<[u8]>, Name>) -> impl Iterator<Item = (&[u8], Option<Id>)> {
    let dots: [(&[u8], Option<Id>); 2] = [(b".", None), (b"..", None)];
    let mut names: Vec<_> = entries.iter().map(|(name, n)| (&**name, Some(n.id))).collect();
    names.extend(dots);
    names.sort_unstable();
    names.into_iter()
}

fn directory(tree: &Tree, place: &Place, nids: &[u64]) -> Vec<u8> {
    let Some(entries) = tree.entries(place.id) else {
        return Vec::new();
    };
    let entries: Vec<(&[u8], u64, u8)> = sorted_names(entries)
        .map(|(name, id)| {
            let own = if name == b"." { place.id } else { place.parent };
            let id = id.unwrap_or(own);
            (name, nids[id], dirent_type(&tree.node(id).body))
        })
        .collect();
    dirent_bytes(&entries)
}

/// The data of nodes other than files in blocks: directories, and the few whose attributes leave
/// no room for the inline data.
fn write_blocks(contents: &mut Contents, tree: &Tree, places: &mut [Place], nids: &[u64]) -> io::Result<()> {
    for place in places {
        if place.layout == Layout::Inline || place.size == 0 || place.start != NOWHERE {
            continue;
        }
        let bytes = data(tree, place, nids);
        let start = contents.allocate(bytes.len() as u64)?;
        contents.write(start, 0, &bytes)?;
        place.start = start;
    }
    Ok(())
}

/// The data of a node that is not in its blocks yet.
fn data(tree: &Tree, place: &Place, nids: &[u64]) -> Vec<u8> {
    match &tree.node(place.id).body {
        Body::Directory(_) => directory(tree, place, nids),
        Body::Symlink(target) => target.to_vec(),
        Body::File(Content::Inline(bytes)) => bytes.to_vec(),
        _ => Vec::new(),
    }
}

fn runs_in_use(tree: &Tree, places: &[Place]) -> Vec<(u64, u64)> {
    let mut runs = Vec::new();
    for place in places {
        if let Body::File(Content::Blocks { start, size }) = tree.node(place.id).body {
            runs.push((u64::from(start), size.div_ceil(BLOCK)));
        }
    }
    runs
}

/// Writes the metadata area after everything else; returns its length.
fn write_inodes(contents: &Contents, tree: &Tree, places: &[Place], nids: &[u64]) -> io::Result<u64> {
    let mut out = io::BufWriter::with_capacity(256 << 10, At { contents, next: contents.next() * BLOCK });
    let mut written = 0u64;
    for (index, place) in places.iter().enumerate() {
        let node = tree.node(place.id);
        let xattrs = xattr_bytes(&node.meta.xattrs);
        let inode = Inode {
            meta: &node.meta,
            body: &node.body,
            layout: place.layout,
            xattr_bytes: xattrs.len(),
            size: place.size,
            start: place.start,
            number: u32::try_from(index + 1).unwrap_or(u32::MAX),
            links: link_count(tree, place.id),
        };
        pad(&mut out, &mut written, place.at)?;
        out.write_all(&inode.encode())?;
        out.write_all(&xattrs)?;
        written += INODE_BYTES + place.xattr_bytes;
        if place.layout == Layout::Inline {
            let bytes = data(tree, place, nids);
            out.write_all(&bytes)?;
            written += bytes.len() as u64;
        }
    }
    out.flush()?;
    Ok(written)
}

fn pad(out: &mut impl Write, written: &mut u64, to: u64) -> io::Result<()> {
    io::copy(&mut io::Read::take(io::repeat(0), to - *written), out)?;
    *written = to;
    Ok(())
}

fn link_count(tree: &Tree, id: Id) -> u32 {
    match tree.entries(id) {
        None => tree.node(id).links,
        Some(entries) => {
            let below = entries.values().filter(|n| tree.entries(n.id).is_some());
            u32::try_from(below.count() + 2).unwrap_or(u32::MAX)
        }
    }
}

/// Writes at a moving offset of the image file.
struct At<'a> {
    contents: &'a Contents,
    next: u64,
}

impl Write for At<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.contents.file().write_all_at(bytes, self.next)?;
        self.next += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `struct erofs_super_block`.
struct Superblock {
    blocks: u32,
    meta_start: u32,
    inodes: u64,
    uuid: [u8; 16],
}

impl Superblock {
    fn encode(&self) -> [u8; BLOCK as usize] {
        let mut out = [0; BLOCK as usize];
        let mut put = |at: usize, bytes: &[u8]| {
            out[SUPERBLOCK_AT + at..SUPERBLOCK_AT + at + bytes.len()].copy_from_slice(bytes);
        };
        put(0, &MAGIC.to_le_bytes());
        put(8, &COMPAT.to_le_bytes());
        // log2 of the block size.
        put(12, &[12]);
        put(14, &(FIRST_SLOT as u16).to_le_bytes());
        put(16, &self.inodes.to_le_bytes());
        put(36, &self.blocks.to_le_bytes());
        put(40, &self.meta_start.to_le_bytes());
        put(48, &self.uuid);
        let sum = crc32c(&out[SUPERBLOCK_AT..]);
        out[SUPERBLOCK_AT + 4..SUPERBLOCK_AT + 8].copy_from_slice(&sum.to_le_bytes());
        out
    }
}

/// CRC-32C as the kernel's `crc32c()` gives it: seeded with ones, not inverted at the end.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ if crc & 1 != 0 { 0x82F6_3B78 } else { 0 };
        }
    }
    crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_castagnolis() {
        // The check value of CRC-32C in every catalogue, before the final inversion.
        assert_eq!(crc32c(b"123456789"), !0xE306_9283);
    }
}
