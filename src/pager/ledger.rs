//! Which pages are settled: filled, or given back by the guest, and never to be filled again.
//!
//! One bit a page of 4 KiB, in memory that is zero until it is touched: 64 GiB of guest memory
//! cost 2 MiB at the most. Huge pages are settled whole.

use super::{PAGE, Range};
use crate::snapshot::extents::{Extents, Run};

/// A range and what became of its pages. Positions are bytes from its start.
#[derive(Debug)]
pub(super) struct Ledger {
    pub(super) range: Range,
    bits: Vec<u64>,
}

impl Ledger {
    pub(super) fn new(range: Range) -> Ledger {
        Ledger { range, bits: vec![0; (range.len / PAGE).div_ceil(64) as usize] }
    }

    /// Where an address of the host is in this range.
    pub(super) fn position(&self, address: u64) -> Option<u64> {
        let at = address.checked_sub(self.range.host)?;
        (at < self.range.len).then_some(at)
    }

    pub(super) fn settled(&self, at: u64) -> bool {
        let page = at / PAGE;
        self.bits.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 == 1)
    }

    /// Settles the pages from `start` to `end`.
    pub(super) fn settle(&mut self, start: u64, end: u64) {
        let (mut page, end) = (start / PAGE, end.min(self.range.len).div_ceil(PAGE));
        while page < end {
            let (word, bit) = ((page / 64) as usize, page % 64);
            let count = (64 - bit).min(end - page);
            let mask = u64::MAX >> (64 - count) << bit;
            if let Some(word) = self.bits.get_mut(word) {
                *word |= mask;
            }
            page += count;
        }
    }

    /// Where the pages from `at` on, up to `end`, stop to be missing.
    pub(super) fn missing_until(&self, at: u64, end: u64) -> u64 {
        let mut next = at;
        while next < end && !self.settled(next) {
            next += PAGE;
        }
        next.min(end)
    }

    /// Where the missing pages that reach up to `at` begin, at `start` or later.
    pub(super) fn missing_from(&self, start: u64, at: u64) -> u64 {
        let mut first = at;
        while first > start && !self.settled(first - PAGE) {
            first -= PAGE;
        }
        first
    }

    /// How many missing pages from `start` to `end` are in `extents` (offsets in memory).
    pub(super) fn missing_of(&self, extents: &Extents, start: u64, end: u64) -> u64 {
        let base = self.range.offset;
        let window = Run { start: base + start, end: base + end.min(self.range.len) };
        let pages = extents.inside(window).flat_map(|r| r.start / PAGE..r.end / PAGE);
        pages.filter(|page| !self.settled(page * PAGE - base)).count() as u64
    }
}

#[cfg(test)]
mod tests {
    use std::ptr::NonNull;

    use super::*;

    fn ledger(pages: u64) -> Ledger {
        // SAFETY: nothing is ever mapped or touched at this address here.
        let range = unsafe { Range::new(NonNull::new(0x10000 as *mut u8).unwrap(), pages * PAGE, 0, PAGE) };
        Ledger::new(range.unwrap())
    }

    #[test]
    fn pages_are_settled_across_words_and_not_beyond_the_range() {
        let mut ledger = ledger(200);
        ledger.settle(60 * PAGE, 140 * PAGE);
        let settled: Vec<u64> = (0..300).filter(|p| ledger.settled(p * PAGE)).collect();
        assert_eq!(settled, (60..140).collect::<Vec<_>>());
        ledger.settle(0, 1000 * PAGE);
        assert!(ledger.settled(199 * PAGE) && !ledger.settled(200 * PAGE));
    }

    #[test]
    fn what_is_missing_is_found_on_both_sides() {
        let mut ledger = ledger(128);
        ledger.settle(60 * PAGE, 61 * PAGE);
        ledger.settle(70 * PAGE, 71 * PAGE);
        assert_eq!(ledger.missing_until(65 * PAGE, 80 * PAGE), 70 * PAGE);
        assert_eq!(ledger.missing_from(48 * PAGE, 65 * PAGE), 61 * PAGE);
        assert_eq!(ledger.missing_from(64 * PAGE, 65 * PAGE), 64 * PAGE);
        assert_eq!(ledger.missing_until(70 * PAGE, 80 * PAGE), 70 * PAGE);
        let extents = Extents::checked(vec![Run { start: 59 * PAGE, end: 71 * PAGE }], 128 * PAGE).unwrap();
        assert_eq!(ledger.missing_of(&extents, 0, 1000 * PAGE), 10);
        assert_eq!(ledger.position(0x10000 + PAGE), Some(PAGE));
        assert_eq!((ledger.position(0xffff), ledger.position(0x10000 + 128 * PAGE)), (None, None));
    }
}
