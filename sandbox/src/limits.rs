//! # Every cap on what an image may cost
//!
//! An image is written by a stranger. Whatever it declares (a layer of a petabyte, a path of a
//! megabyte, ten million empty files, four kilobytes of gzip that unfold to a terabyte) is
//! checked against one number of this file before memory, disk or time is spent on it. The
//! caller may move the numbers that scale with the image; those that follow from a file format
//! or from the kernel are constants.

use std::time::Duration;

/// The longest file name, in bytes (Linux `NAME_MAX`; EROFS has the same).
pub const NAME_BYTES: usize = 255;
/// The longest path and the longest symbolic link target, in bytes (Linux `PATH_MAX`).
pub const PATH_BYTES: usize = 4096;
/// How many symbolic links one path may pass through (Linux allows the same).
pub const LINK_HOPS: usize = 40;
/// The largest extension header of a tar entry (long names, PAX records), in bytes.
pub const EXTENSION_BYTES: u64 = 1 << 20;
/// The most data segments in one sparse file.
pub const SPARSE_SEGMENTS: usize = 1 << 16;
/// The largest window a zstd stream may ask for, in bytes (what the zstd program itself accepts).
pub const ZSTD_WINDOW_BYTES: u64 = 128 << 20;
/// How many redirects one registry request may follow.
pub const REDIRECTS: usize = 5;
/// How deep an image index may point to another index.
pub const INDEX_DEPTH: usize = 3;
/// How many tries one registry request gets when the network or the server fails.
pub const TRIES: u32 = 3;
/// The longest answer of a token server or error page that is read, in bytes.
pub const ANSWER_BYTES: u64 = 1 << 20;
/// How long a connection may take to be made.
pub const CONNECT_TIME: Duration = Duration::from_secs(15);
/// How long a server may stay silent, before its answer or in the middle of it.
pub const SILENCE_TIME: Duration = Duration::from_secs(60);

/// The caps that a caller may move.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The largest manifest, index or image configuration, in bytes.
    pub manifest_bytes: u64,
    /// The most layers in one image.
    pub layers: usize,
    /// The most compressed bytes of all layers together.
    pub download_bytes: u64,
    /// The most bytes all layers together may unfold to, and the most that all file contents
    /// together may claim (a sparse file counts with its full length).
    pub unpacked_bytes: u64,
    /// The most entries (files, directories, links, whiteouts) in all layers together.
    pub entries: u64,
    /// The most memory for names, links, attributes and small files, in bytes.
    pub metadata_bytes: u64,
    /// How many directories deep the tree may be.
    pub depth: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            manifest_bytes: 4 << 20,
            layers: 128,
            download_bytes: 64 << 30,
            unpacked_bytes: 128 << 30,
            entries: 2_000_000,
            metadata_bytes: 1 << 30,
            depth: 512,
        }
    }
}
