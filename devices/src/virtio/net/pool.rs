//! Buffers the guest has made ready for frames, popped once and kept until used.
//!
//! ```text
//!   chains    [ c3 ][ c4 ][ c5 ] ...          popped, oldest first
//!   vectors   x x x | v v | v | v v v | ...   their segments in one row, ready for readv
//!                     ▲ first
//! ```
//!
//! With mergeable buffers one 64 KiB frame fills dozens of chains and a small one only the
//! first; which it will be is known only after the read. Popping and putting back dozens of
//! chains for every small frame would cost more than the frame. So the pool keeps what it
//! popped, as one flat row of segments, and only moves its start.

use std::collections::VecDeque;

use super::header;
use crate::virtio::queue::{Chain, Queue, QueueError};

/// Segments one buffer may have. Together with [`FILL_MAX`] it keeps a row within what one
/// `readv` takes (1024), with one to spare.
const CHAIN_MAX: usize = 512;
/// Segments at which the pool counts as full.
const FILL_MAX: usize = 511;

/// What a driver did wrong with its receive buffers.
#[derive(Debug, thiserror::Error)]
pub(super) enum BufferError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("A receive buffer of {0} bytes is shorter than the header")]
    Short(u64),
    #[error("A receive buffer is made of {0} pieces, more than {CHAIN_MAX}")]
    Scattered(usize),
}

/// The row of segments.
#[derive(Default)]
struct Vectors(Vec<libc::iovec>);

// SAFETY: the pointers lead into guest memory, which the queue beside the pool keeps mapped
// and which is shared by nature.
unsafe impl Send for Vectors {}

/// Buffers popped and not used yet.
#[derive(Default)]
pub(super) struct Pool {
    chains: VecDeque<Chain>,
    spare: Vec<Chain>,
    vectors: Vectors,
    first: usize,
    capacity: u64,
}

impl Pool {
    /// Bytes that fit.
    pub(super) fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Chains held.
    pub(super) fn len(&self) -> u16 {
        // At most as many as the queue has descriptors.
        self.chains.len() as u16
    }

    /// Whether nothing is held.
    pub(super) fn is_empty(&self) -> bool {
        self.chains.is_empty()
    }

    /// Whether no more is popped, however little fits.
    pub(super) fn is_full(&self) -> bool {
        self.vectors.0.len() - self.first >= FILL_MAX
    }

    /// Pops until `wanted` bytes fit or the guest has no more.
    pub(super) fn fill(&mut self, queue: &mut Queue, wanted: u64) -> Result<(), BufferError> {
        while self.capacity < wanted && self.vectors.0.len() - self.first < FILL_MAX && self.take(queue)? {}
        Ok(())
    }

    /// Pops one chain; false when there is none.
    pub(super) fn take(&mut self, queue: &mut Queue) -> Result<bool, BufferError> {
        let mut chain = self.spare.pop().unwrap_or_default();
        if !queue.pop(&mut chain)? {
            self.spare.push(chain);
            return Ok(false);
        }
        let (pieces, len) = (chain.writable().len(), chain.writable_len());
        let wrong = if len < header::LEN as u64 {
            Some(BufferError::Short(len))
        } else {
            (pieces > CHAIN_MAX).then_some(BufferError::Scattered(pieces))
        };
        if let Some(wrong) = wrong {
            queue.undo_pop(1);
            return Err(wrong);
        }
        self.make_place();
        self.vectors.0.extend_from_slice(chain.writable());
        self.capacity += len;
        self.chains.push_back(chain);
        Ok(true)
    }

    /// The row, with one more segment behind it when `tail` has any length.
    pub(super) fn with_tail<T>(&mut self, tail: &mut [u8], f: impl FnOnce(&[libc::iovec]) -> T) -> T {
        let extra = !tail.is_empty();
        if extra {
            let tail = libc::iovec { iov_base: tail.as_mut_ptr().cast(), iov_len: tail.len() };
            self.vectors.0.push(tail);
        }
        let result = f(self.vectors.0.get(self.first..).unwrap_or_default());
        if extra {
            self.vectors.0.pop();
        }
        result
    }

    /// Writes `data` into the newest chain, from its start; returns the bytes that fitted.
    pub(super) fn write_newest(&self, queue: &Queue, data: &[u8]) -> usize {
        self.chains.back().map_or(0, |chain| chain.write(queue, 0, data))
    }

    /// Writes `data`, which fits, into the oldest chains.
    pub(super) fn write(&self, queue: &Queue, data: &[u8]) {
        let mut rest = data;
        for chain in &self.chains {
            if rest.is_empty() {
                break;
            }
            let written = chain.write(queue, 0, rest);
            rest = rest.get(written..).unwrap_or_default();
        }
    }

    /// Gives the driver the frame of `len` bytes that lies in the oldest chains; says in the
    /// header how many they are.
    pub(super) fn deliver(&mut self, queue: &mut Queue, len: u64) {
        let (mut left, mut count) = (len, 0u16);
        for chain in &self.chains {
            left = left.saturating_sub(chain.writable_len());
            count += 1;
            if left == 0 {
                break;
            }
        }
        if let Some(chain) = self.chains.front() {
            chain.write(queue, header::NUM_BUFFERS, &count.to_le_bytes());
        }
        let mut left = len;
        for _ in 0..count {
            let Some(chain) = self.chains.pop_front() else { break };
            let part = left.min(chain.writable_len());
            queue.mark_written(&chain, part);
            queue.push(chain.head(), part as u32);
            left -= part;
            self.capacity -= chain.writable_len();
            self.first += chain.writable().len();
            self.spare.push(chain);
        }
        if self.chains.is_empty() {
            self.vectors.0.clear();
            self.first = 0;
        }
    }

    /// Puts everything back into the queue.
    pub(super) fn give_back(&mut self, queue: &mut Queue) {
        queue.undo_pop(self.len());
        self.spare.extend(self.chains.drain(..));
        self.vectors.0.clear();
        self.first = 0;
        self.capacity = 0;
    }

    /// Moves the row to the front of its memory once half of that is behind it, so that each
    /// segment is moved at most once on average and the memory does not grow.
    fn make_place(&mut self) {
        if self.first > FILL_MAX && self.first * 2 > self.vectors.0.len() {
            self.vectors.0.drain(..self.first);
            self.first = 0;
        }
    }
}
