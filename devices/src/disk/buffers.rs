//! Where the bytes of a request lie: runs of guest memory, consumed from the front.

use vm_memory::VolatileSlice;

/// A list of memory runs that a disk reads into or writes from.
///
/// The vector keeps its capacity from request to request. Progress is made in place, so that
/// a transfer the host cut short goes on where it stopped, and the list stays where it is for
/// as long as the kernel may look at it.
#[derive(Debug, Default)]
pub struct Buffers {
    iovecs: Vec<libc::iovec>,
    first: usize,
    len: u64,
}

// SAFETY: the runs are guest memory, which is shared by nature and outlives the list by the
// contract of `push`.
unsafe impl Send for Buffers {}

impl Buffers {
    /// An empty list.
    pub fn new() -> Buffers {
        Buffers::default()
    }

    /// Forgets all runs and keeps the room for them.
    pub fn clear(&mut self) {
        self.iovecs.clear();
        self.first = 0;
        self.len = 0;
    }

    /// Appends a run; an empty one is left out.
    ///
    /// # Safety
    /// The run is memory that stays mapped, and is accessed by nobody through references,
    /// until the list is cleared or dropped and every operation started on it has ended. It
    /// is writable if the list is ever read into.
    pub unsafe fn push(&mut self, run: libc::iovec) {
        if run.iov_len > 0 {
            self.iovecs.push(run);
            self.len = self.len.saturating_add(run.iov_len as u64);
        }
    }

    /// Bytes left.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The runs left, in order.
    pub fn iovecs(&self) -> &[libc::iovec] {
        self.iovecs.get(self.first..).unwrap_or_default()
    }

    /// Takes `count` bytes off the front.
    pub fn advance(&mut self, count: u64) {
        let mut left = count.min(self.len);
        self.len -= left;
        while let Some(run) = self.iovecs.get_mut(self.first) {
            let part = left.min(run.iov_len as u64) as usize;
            run.iov_base = run.iov_base.cast::<u8>().wrapping_add(part).cast();
            run.iov_len -= part;
            left -= part as u64;
            if run.iov_len > 0 {
                return;
            }
            self.first += 1;
        }
    }

    /// Fills the front from `data` and takes it off.
    pub fn fill(&mut self, data: &[u8]) {
        self.each_front(data.len(), |slice, at| slice.copy_from(data.get(at..).unwrap_or_default()));
    }

    /// Copies the front into `data` and takes it off.
    pub fn drain_into(&mut self, data: &mut [u8]) {
        let len = data.len();
        self.each_front(len, |slice, at| {
            slice.copy_to(data.get_mut(at..).unwrap_or_default());
        });
    }

    fn each_front(&mut self, len: usize, mut f: impl FnMut(VolatileSlice<'_, ()>, usize)) {
        let mut at = 0;
        while at < len {
            let Some(run) = self.iovecs().first().copied() else { return };
            let part = run.iov_len.min(len - at);
            // SAFETY: by the contract of `push` the run is mapped memory.
            f(unsafe { VolatileSlice::new(run.iov_base.cast(), part) }, at);
            at += part;
            self.advance(part as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_made_across_runs() {
        let mut memory = [0u8; 8];
        let base = memory.as_mut_ptr();
        let mut buffers = Buffers::new();
        for (at, len) in [(0, 3), (3, 0), (5, 3)] {
            // SAFETY: inside `memory`, which outlives the list.
            unsafe { buffers.push(libc::iovec { iov_base: base.wrapping_add(at).cast(), iov_len: len }) };
        }
        assert_eq!((buffers.len(), buffers.iovecs().len()), (6, 2));
        buffers.fill(&[1, 2]);
        assert_eq!((buffers.len(), buffers.iovecs()[0].iov_len), (4, 1));
        buffers.fill(&[3, 4, 5, 6, 7]);
        assert!(buffers.is_empty() && buffers.iovecs().is_empty());
        assert_eq!(memory, [1, 2, 3, 0, 0, 4, 5, 6]);
        buffers.advance(u64::MAX);
    }
}
