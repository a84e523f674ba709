//! # Writing an EROFS image
//!
//! EROFS is the read-only file system that every kernel since 5.4 has, that needs no decoding
//! for uncompressed data, and that a guest mounts straight from a virtio block device.
//!
//! ```text
//!   block 0        blocks 1..D                 D..M                    M..end
//!   ┌────────────┬───────────────────────────┬───────────────────────┬─────────────────────────┐
//!   │ superblock │ file contents, as they    │ large directories,    │ inodes, each with its   │
//!   │ at 1024    │ came out of the layers    │ what is not inline    │ xattrs and inline tail  │
//!   └────────────┴───────────────────────────┴───────────────────────┴─────────────────────────┘
//!                                                                     ▲ meta_blkaddr = M
//! ```
//!
//! Contents come first because they arrive first: a layer is a stream, and its files go to their
//! final place as they pass. Names and metadata wait in memory ([`Tree`](crate::tree::Tree))
//! until the last layer has said its word, and then become inodes at the end of the image, which
//! the format allows by `meta_blkaddr`. Contents that an upper layer has replaced or whited out
//! are punched out of the file at the end and cost nothing.
//!
//! The subset written: extended inodes (64 bytes: 32-bit owners, nanoseconds), plain data in
//! 4 KiB blocks, inline data for symbolic links, directories and files up to
//! [`INLINE_BYTES`], inline extended attributes, superblock checksum. No feature that Linux 5.10
//! lacks. The same tree gives the same bytes.
//!
//! Looked for before writing this: `erofs-rs` 0.3 reads only (its documentation speaks of
//! building, its source has no writer), `erofs` 0.0.2 is an empty command line, `composefs`
//! 0.9 writes images whose contents live elsewhere, whole in memory, and brings OpenSSL and
//! tokio; `mkfs.erofs` would be a program of the host and would need the layers unpacked there.
//!
//! Format: Linux `fs/erofs/erofs_fs.h` and Documentation/filesystems/erofs.rst.

mod contents;
mod image;
mod inode;

pub(crate) use contents::Contents;
pub(crate) use image::write;
pub(crate) use inode::keeps_xattr;

/// The block size: the page size of x86, the only size that every kernel takes.
pub(crate) const BLOCK: u64 = 4096;

/// Files up to this length stand beside their inode. They wait in memory for it, so the number
/// is small; most of an image's small files (package lists, `__init__.py`) are below it.
pub(crate) const INLINE_BYTES: usize = 2048;

#[cfg(test)]
mod tests;
