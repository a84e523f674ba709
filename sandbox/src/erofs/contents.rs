//! The part of the image file that holds the contents of files.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::FallocateFlags;

use super::BLOCK;

/// Block addresses are 32 bits wide; the top is left free for what comes after the contents.
const MOST_BLOCKS: u64 = u32::MAX as u64 - (1 << 24);

/// The growing image: hands out runs of blocks and takes bytes for them.
#[derive(Debug)]
pub(crate) struct Contents {
    file: File,
    next: u64,
}

impl Contents {
    /// `file` must be empty; the first block is left for the superblock.
    pub(crate) fn new(file: File) -> Self {
        Self { file, next: 1 }
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// The first block that nobody has.
    pub(crate) fn next(&self) -> u64 {
        self.next
    }

    /// A run of blocks for `size` bytes. They read as zeros until written.
    pub(crate) fn allocate(&mut self, size: u64) -> io::Result<u32> {
        let end = self.next.saturating_add(size.div_ceil(BLOCK));
        if end > MOST_BLOCKS {
            let text = "the image would be larger than EROFS can address (16 TiB)";
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
        }
        let start = self.next;
        self.next = end;
        u32::try_from(start).map_err(io::Error::other)
    }

    /// Writes `bytes` at `offset` of the run that starts at block `start`. Zeros are not written:
    /// what is a hole for the file system of the host costs nothing there.
    pub(crate) fn write(&self, start: u32, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if bytes.iter().all(|&b| b == 0) {
            return Ok(());
        }
        self.file.write_all_at(bytes, u64::from(start) * BLOCK + offset)
    }

    /// Gives the host back the blocks before `end` that are in none of the `used` runs (first
    /// block and number of blocks).
    pub(crate) fn punch_unused(&self, end: u64, mut used: Vec<(u64, u64)>) {
        used.sort_unstable();
        let mut at = 1;
        for (start, count) in used.into_iter().chain([(end, 0)]) {
            if start > at {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                // A host file system that cannot punch keeps the dead bytes; nothing else.
                rustix::fs::fallocate(&self.file, flags, at * BLOCK, (start - at) * BLOCK).ok();
            }
            at = at.max(start + count);
        }
    }
}
