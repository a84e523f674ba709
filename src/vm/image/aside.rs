//! Pages that are in an image instead of what its process has: those that were written after it
//! was taken, as they were later.
//!
//! They lie in blocks that never move, in the order in which they were first kept, so that room for
//! more can be made beforehand.

use std::collections::BTreeMap;

const PAGE: usize = 4096;

/// Bytes of a block.
const BLOCK: usize = 1 << 20;

/// See the module.
#[derive(Debug, Default)]
pub struct Aside {
    blocks: Vec<Box<[u8]>>,
    /// Pages by their addresses: which of all in the blocks.
    places: BTreeMap<usize, usize>,
}

impl Aside {
    /// Has memory for `len` more bytes, and touches it.
    pub fn make_room(&mut self, len: usize) {
        let wanted = self.places.len() * PAGE + len;
        while self.blocks.len() * BLOCK < wanted {
            // Zeros would be had without a page of memory behind them.
            self.blocks.push(vec![1; BLOCK].into_boxed_slice());
        }
    }

    /// Keeps what is in the `len` bytes from address `at` on: whole pages.
    ///
    /// # Safety
    /// They are mapped and readable. They may be written to meanwhile.
    pub unsafe fn keep(&mut self, at: usize, len: usize) {
        for page in (at..at.saturating_add(len)).step_by(PAGE) {
            let next = self.places.len();
            let place = *self.places.entry(page).or_insert(next) * PAGE;
            if place / BLOCK == self.blocks.len() {
                self.blocks.push(vec![1; BLOCK].into_boxed_slice());
            }
            let block = self.blocks.get_mut(place / BLOCK);
            if let Some(to) = block.and_then(|block| block.get_mut(place % BLOCK..place % BLOCK + PAGE)) {
                // SAFETY: the page is mapped, and no part of a block. It may be written to while it is
                // copied, which only a call that the compiler knows nothing of may meet.
                unsafe { libc::memcpy(to.as_mut_ptr().cast(), page as *const libc::c_void, PAGE) };
            }
        }
    }

    /// Puts what was kept in its place in `bytes`, which begin at address `at`.
    pub fn lay_over(&self, at: usize, bytes: &mut [u8]) {
        for (page, place) in self.places.range(at..at.saturating_add(bytes.len())) {
            let place = place * PAGE;
            let from =
                self.blocks.get(place / BLOCK).and_then(|b| b.get(place % BLOCK..place % BLOCK + PAGE));
            if let (Some(from), Some(to)) = (from, bytes.get_mut(page - at..page - at + PAGE)) {
                to.copy_from_slice(from);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_kept_last_lies_over_what_was_there() {
        let memory = [[1u8; PAGE], [2; PAGE], [3; PAGE]];
        let at = memory.as_ptr() as usize;
        let mut aside = Aside::default();
        aside.make_room(1);
        // SAFETY: the pages of the array.
        unsafe {
            aside.keep(at + PAGE, 2 * PAGE);
            aside.keep(at + PAGE, PAGE);
        }
        assert_eq!((aside.places.len(), aside.blocks.len()), (2, 1));
        let mut bytes = [0; 4 * PAGE];
        aside.lay_over(at, &mut bytes);
        let first = |bytes: &[u8]| bytes.iter().step_by(PAGE).copied().collect::<Vec<_>>();
        assert_eq!(first(&bytes), [0, 2, 3, 0]);
        let mut bytes = [0; 2 * PAGE];
        aside.lay_over(at + 2 * PAGE, &mut bytes);
        assert_eq!(first(&bytes), [3, 0]);
    }

    #[test]
    fn more_pages_than_there_is_room_for_get_more() {
        let memory = vec![7u8; BLOCK + 2 * PAGE];
        let mut aside = Aside::default();
        // SAFETY: the bytes of the vector.
        unsafe { aside.keep(memory.as_ptr() as usize, memory.len()) };
        let mut bytes = vec![0; memory.len()];
        aside.lay_over(memory.as_ptr() as usize, &mut bytes);
        assert!(bytes == memory && aside.blocks.len() == 2);
    }
}
