//! Bytes from the guest that the host's socket would not take yet.
//!
//! A ring of exactly [`VSOCK_BUFFER`] bytes, which is what the guest is told it may send
//! ahead; so a guest that keeps to its credit never overfills it. The memory exists only
//! while there is something in it: most connections never need it, because their reader keeps
//! up. Emptied rings go to a small pool, so that a stream which runs against its reader does
//! not go to the allocator at every turn.

use crate::limits::{VSOCK_BUFFER, VSOCK_SPARE_BUFFERS};

const SIZE: usize = VSOCK_BUFFER as usize;

/// A few empty rings, kept for the next connection in need.
#[derive(Default)]
pub struct Pool {
    spare: Vec<Vec<u8>>,
}

/// A bounded first-in first-out store of bytes.
#[derive(Default)]
pub struct Backlog {
    /// Empty, or of [`SIZE`] bytes.
    data: Vec<u8>,
    start: usize,
    len: usize,
}

impl Backlog {
    /// Bytes waiting.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether none is waiting.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends the bytes of `iovecs` after the first `skip`; false, with nothing or only a
    /// part taken, when they do not fit.
    ///
    /// # Safety
    /// Each iovec must be readable memory. It may change while it is read.
    pub unsafe fn append(&mut self, iovecs: &[libc::iovec], skip: usize, pool: &mut Pool) -> bool {
        let mut skip = skip;
        for iovec in iovecs {
            let leave = skip.min(iovec.iov_len);
            skip -= leave;
            // SAFETY: promised by the caller; `leave` is at most the length.
            if !unsafe { self.put(iovec.iov_base.cast::<u8>().add(leave), iovec.iov_len - leave, pool) } {
                return false;
            }
        }
        true
    }

    /// # Safety
    /// `from` must be readable for `len` bytes.
    unsafe fn put(&mut self, from: *const u8, len: usize, pool: &mut Pool) -> bool {
        if len > SIZE - self.len {
            return false;
        }
        if len == 0 {
            return true;
        }
        if self.data.is_empty() {
            self.data = pool.spare.pop().unwrap_or_else(|| vec![0; SIZE]);
            self.start = 0;
        }
        let at = (self.start + self.len) % SIZE;
        let first = len.min(SIZE - at);
        let base = self.data.as_mut_ptr();
        // SAFETY: `at + first` and `len - first` are at most `SIZE`, the length of `data`; the
        // source is readable and is guest memory, which does not overlap ours.
        unsafe {
            std::ptr::copy_nonoverlapping(from, base.add(at), first);
            std::ptr::copy_nonoverlapping(from.add(first), base, len - first);
        }
        self.len += len;
        true
    }

    /// What is waiting, as one or two pieces in order.
    pub fn pieces(&self) -> [libc::iovec; 2] {
        let end = (self.start + self.len).min(SIZE);
        let first = self.data.get(self.start..end).unwrap_or_default();
        let second = self.data.get(..self.len - first.len()).unwrap_or_default();
        [first, second].map(|s| libc::iovec { iov_base: s.as_ptr().cast_mut().cast(), iov_len: s.len() })
    }

    /// Forgets the first `count` bytes; gives the memory back when none is left.
    pub fn consume(&mut self, count: usize, pool: &mut Pool) {
        let count = count.min(self.len);
        self.len -= count;
        self.start = (self.start + count) % SIZE;
        if self.len == 0 && !self.data.is_empty() {
            let data = std::mem::take(&mut self.data);
            if pool.spare.len() < VSOCK_SPARE_BUFFERS {
                pool.spare.push(data);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn iovec(data: &[u8]) -> libc::iovec {
        libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() }
    }

    fn front(backlog: &Backlog, count: usize) -> Vec<u8> {
        let mut all = Vec::new();
        for piece in backlog.pieces() {
            // SAFETY: the pieces lie inside the backlog.
            all.extend_from_slice(unsafe {
                std::slice::from_raw_parts(piece.iov_base.cast(), piece.iov_len)
            });
        }
        all.truncate(count);
        all
    }

    #[test]
    fn bytes_come_out_in_order_across_the_seam() {
        let (mut backlog, mut pool) = (Backlog::default(), Pool::default());
        let (mut put, mut got) = (0u64, 0u64);
        for step in 0..2000usize {
            let data: Vec<u8> = (0..(step * 37) % 5000).map(|i| ((put + i as u64) % 251) as u8).collect();
            // SAFETY: the slices live through the call.
            if unsafe {
                backlog.append(&[iovec(&data[..data.len() / 2]), iovec(&data)], data.len() / 2, &mut pool)
            } {
                put += data.len() as u64;
            }
            let take = ((step * 53) % 6000).min(backlog.len());
            for byte in front(&backlog, take) {
                assert_eq!(byte, (got % 251) as u8);
                got += 1;
            }
            backlog.consume(take, &mut pool);
        }
        assert!(got > 2 * SIZE as u64);
    }

    #[test]
    fn it_holds_its_size_and_not_a_byte_more() {
        let (mut backlog, mut pool) = (Backlog::default(), Pool::default());
        let data = vec![7; SIZE];
        // SAFETY: the slices live through the calls.
        unsafe {
            assert!(backlog.append(&[iovec(&data)], 0, &mut pool));
            assert!(!backlog.append(&[iovec(&data[..1])], 0, &mut pool));
        }
        backlog.consume(SIZE, &mut pool);
        assert!(backlog.data.is_empty(), "an empty backlog holds no memory");
        assert_eq!(pool.spare.len(), 1);
    }
}
