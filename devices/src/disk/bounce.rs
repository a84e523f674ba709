//! What `O_DIRECT` refuses, through an aligned buffer.
//!
//! A driver may put its data at any address and, as long as it ignores the block size it was
//! told, at any sector. Direct I/O takes whole blocks at aligned addresses. The difference is
//! made up here, piece by piece through one bounded buffer a queue: reads fetch the blocks
//! around what is wanted, writes fetch the blocks at both ends first, change them and write
//! them back. It costs a copy and waits for the medium, on a path that drivers which keep to
//! the block size take only for oddly placed buffers.
//!
//! The buffer comes with the first request that needs it.

use std::{io, sync::PoisonError};

use super::{Buffers, Disk};
use crate::limits::BLOCK_BOUNCE;

/// The buffer of one queue.
#[derive(Debug, Default)]
pub struct Bounce {
    room: Vec<u8>,
}

/// A piece of a transfer: `skip` bytes into the blocks that begin at `start` and are `span`
/// bytes long, `take` bytes are the request's.
struct Piece {
    start: u64,
    span: usize,
    skip: usize,
    take: usize,
}

impl Piece {
    fn next(offset: u64, left: u64, unit: u64) -> Piece {
        let start = offset / unit * unit;
        let skip = (offset - start) as usize;
        let take = left.min((BLOCK_BOUNCE - skip) as u64) as usize;
        let span = (skip + take).next_multiple_of(unit as usize).min(BLOCK_BOUNCE);
        Piece { start, span, skip, take: take.min(span - skip) }
    }

    fn is_whole(&self) -> bool {
        self.skip == 0 && self.take == self.span
    }
}

impl Bounce {
    /// An empty bounce buffer.
    pub fn new() -> Bounce {
        Bounce::default()
    }

    fn room(&mut self, align: usize) -> &mut [u8] {
        self.room.resize(BLOCK_BOUNCE + align, 0);
        let skip = self.room.as_ptr().align_offset(align).min(align);
        self.room.get_mut(skip..skip + BLOCK_BOUNCE).unwrap_or_default()
    }

    pub(super) fn read(&mut self, disk: &Disk, buffers: &mut Buffers, offset: u64) -> io::Result<()> {
        let (unit, align) = alignment(disk);
        let mut at = offset;
        while !buffers.is_empty() {
            let piece = Piece::next(at, buffers.len(), unit);
            let room = self.room(align).get_mut(..piece.span).unwrap_or_default();
            let came = transfer(room, piece.start, |b, at| disk.read_once(b, at, 0))?;
            if came < piece.skip + piece.take {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            buffers.fill(room.get(piece.skip..piece.skip + piece.take).unwrap_or_default());
            at += piece.take as u64;
        }
        Ok(())
    }

    pub(super) fn write(
        &mut self,
        disk: &Disk,
        buffers: &mut Buffers,
        offset: u64,
        flags: i32,
    ) -> io::Result<()> {
        let (unit, align) = alignment(disk);
        let mut at = offset;
        while !buffers.is_empty() {
            let piece = Piece::next(at, buffers.len(), unit);
            let room = self.room(align).get_mut(..piece.span).unwrap_or_default();
            // Two queues that change different sectors of one block must not undo each other.
            let guard =
                (!piece.is_whole()).then(|| disk.patching.lock().unwrap_or_else(PoisonError::into_inner));
            if guard.is_some() {
                transfer(room, piece.start, |b, at| disk.read_once(b, at, 0))?;
            }
            buffers.drain_into(room.get_mut(piece.skip..piece.skip + piece.take).unwrap_or_default());
            let went = transfer(room, piece.start, |b, at| disk.write_once(b, at, flags))?;
            if went < piece.span {
                return Err(io::ErrorKind::WriteZero.into());
            }
            at += piece.take as u64;
        }
        Ok(())
    }
}

fn alignment(disk: &Disk) -> (u64, usize) {
    disk.direct.map_or((super::SECTOR, 1), |d| (u64::from(d.offset), d.memory.max(d.offset) as usize))
}

/// Moves `room` as a whole, or up to the end of the file; returns the bytes moved.
fn transfer(
    room: &mut [u8],
    start: u64,
    mut once: impl FnMut(&mut Buffers, u64) -> io::Result<u64>,
) -> io::Result<usize> {
    let mut buffers = Buffers::new();
    // SAFETY: `room` is borrowed for longer than the list lives, and not looked at meanwhile.
    unsafe { buffers.push(libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() }) };
    let (mut moved, mut retries) = (0, 0);
    while !buffers.is_empty() {
        match once(&mut buffers, start + moved) {
            Ok(0) => break,
            Ok(done) => moved += done,
            Err(e) if super::file::is_passing(&e) && retries < crate::limits::BLOCK_RETRIES_MAX => {
                retries += 1;
            }
            Err(e) => return Err(e),
        }
    }
    Ok(moved as usize)
}
