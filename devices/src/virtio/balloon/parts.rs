//! Huge pages that are in the balloon piece by piece.
//!
//! Where guest memory consists of huge pages of the host, nothing smaller can be given back.
//! The driver knows nothing of that and names pages of 4 KiB. So it is remembered which of
//! them are in the balloon, one bit for each, and a huge page goes back to the host when the
//! last of its parts has come. A part that leaves the balloon makes it incomplete again.

use std::ops::Range;

/// The parts of one region of memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Parts {
    bits: Vec<u64>,
    /// Parts of one huge page, a multiple of 64.
    of_whole: u64,
}

impl Parts {
    /// None of `count` parts is in the balloon; `of_whole` make one huge page.
    pub fn new(count: u64, of_whole: u64) -> Parts {
        let words = usize::try_from(count.div_ceil(64)).unwrap_or(0);
        Parts { bits: vec![0; words], of_whole: of_whole.next_multiple_of(64) }
    }

    /// Whether this was made for as many parts of the same size.
    pub fn fits(&self, other: &Parts) -> bool {
        self.bits.len() == other.bits.len() && self.of_whole == other.of_whole
    }

    /// Notes that `parts` went in, and calls `whole` with the parts of each huge page that is
    /// complete now.
    pub fn insert(&mut self, parts: Range<u64>, mut whole: impl FnMut(Range<u64>)) {
        self.change(parts.clone(), |word, mask| *word |= mask);
        let mut page = parts.start / self.of_whole;
        while page * self.of_whole < parts.end {
            let all = page * self.of_whole..(page + 1) * self.of_whole;
            if self.is_complete(&all) {
                whole(all);
            }
            page += 1;
        }
    }

    /// Notes that `parts` went out.
    pub fn remove(&mut self, parts: Range<u64>) {
        self.change(parts, |word, mask| *word &= !mask);
    }

    fn change(&mut self, parts: Range<u64>, f: impl Fn(&mut u64, u64)) {
        let mut at = parts.start;
        while at < parts.end {
            let count = (64 - at % 64).min(parts.end - at);
            let mask = (u64::MAX >> (64 - count)) << (at % 64);
            if let Some(word) = self.bits.get_mut((at / 64) as usize) {
                f(word, mask);
            }
            at += count;
        }
    }

    fn is_complete(&self, all: &Range<u64>) -> bool {
        let words = self.bits.get((all.start / 64) as usize..(all.end / 64) as usize);
        words.is_some_and(|words| words.iter().all(|word| *word == u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn insert(parts: &mut Parts, range: Range<u64>) -> Vec<(u64, u64)> {
        let mut wholes = Vec::new();
        parts.insert(range, |whole| wholes.push((whole.start, whole.end)));
        wholes
    }

    #[test]
    fn the_last_part_completes_a_page_in_whatever_order_they_come() {
        let mut parts = Parts::new(2048, 512);
        assert_eq!(insert(&mut parts, 700..1024), []);
        assert_eq!(insert(&mut parts, 0..512), [(0, 512)]);
        assert_eq!(insert(&mut parts, 512..699), []);
        assert_eq!(insert(&mut parts, 699..700), [(512, 1024)]);
        assert_eq!(insert(&mut parts, 1024..2048), [(1024, 1536), (1536, 2048)]);
    }

    #[test]
    fn a_part_that_leaves_makes_its_page_incomplete() {
        let mut parts = Parts::new(1024, 512);
        insert(&mut parts, 0..511);
        parts.remove(63..65);
        assert_eq!(insert(&mut parts, 511..512), []);
        assert_eq!(insert(&mut parts, 63..65), [(0, 512)]);
    }

    #[test]
    fn an_incomplete_page_at_the_end_and_parts_beyond_it_are_never_whole() {
        let mut parts = Parts::new(600, 512);
        assert_eq!(insert(&mut parts, 512..5000), []);
        parts.remove(0..5000);
        assert_eq!(insert(&mut parts, 0..5000), [(0, 512)]);
    }
}
