//! A disk of the host: an image file or a block device, opened, locked and measured.
//!
//! ```text
//!   path or descriptor ──► Disk::open ──► kind, rights, lock, size, alignments
//!                                             │
//!          ┌──────────────────────────────────┼───────────────────────────┐
//!    file.rs: synchronous calls         uring.rs: the same calls     lock.rs: one writer
//!    (whole, or not at all)             through a ring, later        or many readers
//!          │
//!    buffers.rs: where the bytes of a request lie
//!    bounce.rs: what O_DIRECT refuses, through an aligned buffer
//! ```
//!
//! The image is *raw*: byte `n` of the file is byte `n` of the disk. No format is ever
//! guessed from the content, because the guest writes the content: a guest that turns its
//! first sector into the header of a format with a backing file would otherwise choose which
//! host file is opened next.
//!
//! Everything an owner can get wrong is found here, before the machine starts, and said in
//! one sentence. What goes wrong later (a full file system, a file cut short, a broken
//! medium) is an `io::Error` of one request and never more.

mod bounce;
mod buffers;
mod file;
pub(crate) mod lock;
mod open;
mod uring;

pub use bounce::Bounce;
pub use buffers::Buffers;
pub use file::Extent;
pub(crate) use file::is_unsupported;
pub use open::{DiskError, DiskOptions};
pub use uring::{Operation, Ring, available};

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU8},
    },
};

/// Bytes of a sector: the unit of every virtio block address, whatever the host's disk uses
/// (VIRTIO 1.2 section 5.2.4).
pub const SECTOR: u64 = 512;

/// What `O_DIRECT` asks of a request on this disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Alignment {
    /// Bytes that buffer addresses are a multiple of.
    pub memory: u32,
    /// Bytes that file offsets and lengths are a multiple of.
    pub offset: u32,
}

/// Sizes that a driver may want to know, in bytes; powers of two except `optimal`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Smallest unit addressed without a read-modify-write.
    pub logical: u32,
    /// Unit the medium works in.
    pub physical: u32,
    /// Preferred length of a request, 0 when not known.
    pub optimal: u32,
}

/// An opened and locked disk, shared by the handlers of all its queues.
#[derive(Debug)]
pub struct Disk {
    file: File,
    path: PathBuf,
    options: DiskOptions,
    /// Device and inode, to tell whether a path still names this file.
    identity: (u64, u64),
    /// It came as an open file, and its path is only a name.
    given: bool,
    block_device: bool,
    memory_backed: bool,
    sectors: u64,
    geometry: Geometry,
    direct: Option<Alignment>,
    /// A flush failed, so data the guest believes written may be gone: no later flush may
    /// report success, although the kernel reports each loss only once.
    flush_failed: AtomicBool,
    /// How zeroes are written here; see `file::Zeroing`.
    zeroing: AtomicU8,
    /// Held while a block is read, changed and written back.
    patching: Mutex<()>,
}

impl Disk {
    /// The path it was opened by, or a name for a descriptor that was handed in.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Capacity in sectors of 512 bytes. A rest smaller than a sector is not reachable.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Block sizes.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Whether writes are refused. Kept by the host: the descriptor itself is read-only
    /// unless it was handed in open for writing.
    pub fn read_only(&self) -> bool {
        self.options.read_only
    }

    /// What `O_DIRECT` asks for, when it is on.
    pub fn direct(&self) -> Option<Alignment> {
        self.direct
    }

    /// Whether this is a block device of the host, not a file.
    pub fn is_block_device(&self) -> bool {
        self.block_device
    }

    /// Whether the bytes live in memory (tmpfs), so that no call waits for a medium.
    pub fn is_memory_backed(&self) -> bool {
        self.memory_backed
    }

    /// The descriptor, for the ring.
    pub fn file(&self) -> &File {
        &self.file
    }
}

#[cfg(test)]
impl Disk {
    /// Any descriptor as a disk of `sectors`: pipes that stall and devices that fail on
    /// purpose make the hosts that tests need.
    pub(crate) fn pretend(file: File, sectors: u64, options: DiskOptions) -> Disk {
        Disk {
            file,
            path: PathBuf::from("pretended"),
            options,
            identity: (0, 0),
            given: false,
            block_device: false,
            memory_backed: false,
            sectors,
            geometry: Geometry { logical: 512, physical: 512, optimal: 0 },
            direct: None,
            flush_failed: AtomicBool::new(false),
            zeroing: 0.into(),
            patching: Mutex::new(()),
        }
    }

    /// Has the disk treated as one whose calls may wait, wherever the file is.
    pub(crate) fn pretend_slow(&mut self) {
        self.memory_backed = false;
    }

    /// Has every transfer treated as `O_DIRECT` of these alignments would.
    pub(crate) fn pretend_direct(&mut self, alignment: Alignment) {
        self.direct = Some(alignment);
    }
}

#[cfg(test)]
mod tests;
