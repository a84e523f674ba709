//! Which pages of guest memory this process wrote, while somebody wants to know.
//!
//! KVM's own log sees what the guest writes, and not what devices write for it. So each region of
//! [`Memory`](crate::Memory) has a record of its own, which everyone marks who writes there through
//! `vm-memory` or past it. It costs nothing until it is wanted: a bit for each page is taken when it
//! is first begun. It is on for good where diff snapshots are taken, and for some milliseconds
//! where a machine goes on while it is saved.
//!
//! Who begins a record and then looks at memory misses nothing: a write that came too early to be
//! marked was in memory before.

use std::{
    num::NonZeroUsize,
    sync::{
        OnceLock,
        atomic::{
            AtomicBool,
            Ordering::{Acquire, Release},
        },
    },
};

use vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

const PAGE: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");

/// The record of one region.
#[derive(Debug, Default)]
pub struct Written {
    /// Bytes of the region.
    len: usize,
    on: AtomicBool,
    pages: OnceLock<AtomicBitmap>,
}

impl Written {
    /// The record of a region of `len` bytes, begun if `on`.
    pub fn new(len: usize, on: bool) -> Written {
        let record = Written { len, ..Written::default() };
        if on {
            record.begin();
        }
        record
    }

    /// Whether pages are marked.
    pub fn is_on(&self) -> bool {
        self.on.load(Acquire)
    }

    /// Marks pages from now on. What was marked before stays.
    pub fn begin(&self) {
        self.pages.get_or_init(|| AtomicBitmap::new(self.len, PAGE));
        self.on.store(true, Release);
    }

    /// Marks none any more, and forgets those that are.
    pub fn end(&self) {
        self.on.store(false, Release);
        self.pages.get().into_iter().for_each(AtomicBitmap::reset);
    }

    /// The pages that were marked, a bit for each in words of 64, and none any more. Nothing if it
    /// was never begun.
    pub fn take(&self) -> Vec<u64> {
        self.pages.get().map(AtomicBitmap::get_and_reset).unwrap_or_default()
    }
}

impl<'a> WithBitmapSlice<'a> for Written {
    type S = RefSlice<'a, Written>;
}

impl Bitmap for Written {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if self.is_on()
            && let Some(pages) = self.pages.get()
        {
            pages.set_addr_range(offset, len);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.pages.get().is_some_and(|pages| pages.is_addr_set(offset))
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Written> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for Written {
    fn with_len(len: usize) -> Written {
        Written::new(len, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_marked_from_the_beginning_to_the_end_of_a_record() {
        let record = Written::with_len(1 << 20);
        record.mark_dirty(0, 4096);
        assert_eq!((record.is_on(), record.take()), (false, Vec::new()));
        record.begin();
        record.slice_at(8192).slice_at(4095).mark_dirty(0, 2);
        assert!(record.dirty_at(8192) && record.dirty_at(12288) && !record.dirty_at(0));
        assert_eq!(record.take(), [0b1100, 0, 0, 0]);
        record.mark_dirty(0, 1);
        record.end();
        record.mark_dirty(4096, 1);
        record.begin();
        assert_eq!(record.take(), [0; 4]);
    }

    #[test]
    fn a_record_may_be_on_from_the_start() {
        let record = Written::new(8192, true);
        record.mark_dirty(4096, 4096);
        assert_eq!(record.take(), [2]);
    }
}
