//! Which pages of a memory file are present: sorted runs, and the questions asked of them.
//!
//! [`Extents`] never change and are searched by halving; [`Gathering`] takes runs in any order
//! and is what a writer fills. Runs are `start..end` in bytes, never touch or overlap, and are
//! whole pages.

use std::collections::BTreeMap;

use super::limits::PAGE;

/// A run of pages, in bytes: `start` and the first byte after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Run {
    /// First byte.
    pub start: u64,
    /// First byte after it, above `start`.
    pub end: u64,
}

impl Run {
    /// Bytes of it.
    pub fn len(self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether it holds nothing.
    pub fn is_empty(self) -> bool {
        self.end <= self.start
    }

    /// What it has in common with `other`; may be empty.
    pub fn within(self, other: Run) -> Run {
        Run { start: self.start.max(other.start), end: self.end.min(other.end) }
    }
}

/// Sorted runs of present pages.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Extents(Vec<Run>);

/// What [`Extents::find`] found at an offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// The page is present, and so is all up to this offset.
    Until(u64),
    /// The page is absent, and so is all up to this offset (`u64::MAX`: to the end).
    AbsentUntil(u64),
}

impl Extents {
    /// Takes runs as they stand in a file, after checking that they are in order, apart from
    /// each other, whole pages, and inside `size` bytes.
    pub fn checked(runs: Vec<Run>, size: u64) -> Result<Extents, String> {
        let mut last = None;
        for (number, run) in runs.iter().enumerate() {
            let Run { start, end } = *run;
            if start >= end || end > size {
                return Err(format!("extent {number} is {start} to {end} of {size} bytes"));
            }
            if start % PAGE != 0 || end % PAGE != 0 {
                return Err(format!("extent {number}, {start} to {end}, is not whole pages of {PAGE} bytes"));
            }
            if last.is_some_and(|last| start <= last) {
                return Err(format!("extent {number} begins at {start}, not beyond the one before it"));
            }
            last = Some(end);
        }
        Ok(Extents(runs))
    }

    /// All runs, in order.
    pub fn runs(&self) -> &[Run] {
        &self.0
    }

    /// Bytes of all runs.
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|r| r.len()).sum()
    }

    /// Whether the page at `offset` is present, and how far that holds.
    pub fn find(&self, offset: u64) -> Found {
        let at = self.0.partition_point(|r| r.end <= offset);
        match self.0.get(at) {
            Some(run) if run.start <= offset => Found::Until(run.end),
            Some(run) => Found::AbsentUntil(run.start),
            None => Found::AbsentUntil(u64::MAX),
        }
    }

    /// The runs inside `window`, cut to it.
    pub fn inside(&self, window: Run) -> impl Iterator<Item = Run> + '_ {
        let at = self.0.partition_point(|r| r.end <= window.start);
        let rest = self.0.get(at..).unwrap_or_default();
        rest.iter().take_while(move |r| r.start < window.end).map(move |r| r.within(window))
    }

    /// Numbers of the chunks of `size` bytes that hold any present page, rising.
    pub fn chunks(&self, size: u64) -> impl Iterator<Item = u64> + '_ {
        let mut next = 0;
        self.0.iter().flat_map(move |r| {
            let first = (r.start / size).max(next);
            next = (r.end - 1) / size + 1;
            first..next
        })
    }
}

/// Runs that are still being gathered, in any order.
#[derive(Debug, Clone, Default)]
pub struct Gathering(BTreeMap<u64, u64>);

impl Gathering {
    /// Adds a run; what it overlaps or touches becomes one with it.
    pub fn add(&mut self, run: Run) {
        if run.is_empty() {
            return;
        }
        let Run { mut start, mut end } = run;
        while let Some((&s, &e)) = self.0.range(..=end).next_back().filter(|&(_, &e)| e >= start) {
            self.0.remove(&s);
            start = start.min(s);
            end = end.max(e);
        }
        self.0.insert(start, end);
    }

    /// Whether any page of `run` was added.
    pub fn touches(&self, run: Run) -> bool {
        self.0.range(..run.end).next_back().is_some_and(|(_, &end)| end > run.start)
    }

    /// The runs, sorted.
    pub fn finish(self) -> Extents {
        Extents(self.0.into_iter().map(|(start, end)| Run { start, end }).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(start: u64, end: u64) -> Run {
        Run { start: start * PAGE, end: end * PAGE }
    }

    #[test]
    fn runs_in_any_order_become_sorted_and_joined() {
        let mut gathering = Gathering::default();
        for (start, end) in [(8, 9), (0, 1), (4, 6), (1, 2), (5, 8), (20, 30), (22, 23)] {
            gathering.add(run(start, end));
        }
        assert!(gathering.touches(run(8, 12)) && !gathering.touches(run(2, 4)));
        assert_eq!(gathering.finish().runs(), [run(0, 2), run(4, 9), run(20, 30)]);
    }

    #[test]
    fn a_page_is_found_with_how_far_the_answer_holds() {
        let extents = Extents::checked(vec![run(1, 3), run(5, 6)], 8 * PAGE).unwrap();
        assert_eq!(extents.find(0), Found::AbsentUntil(PAGE));
        assert_eq!(extents.find(2 * PAGE), Found::Until(3 * PAGE));
        assert_eq!(extents.find(3 * PAGE), Found::AbsentUntil(5 * PAGE));
        assert_eq!(extents.find(6 * PAGE), Found::AbsentUntil(u64::MAX));
        assert_eq!(extents.inside(run(2, 6)).collect::<Vec<_>>(), [run(2, 3), run(5, 6)]);
        assert_eq!(extents.chunks(2 * PAGE).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(extents.bytes(), 3 * PAGE);
    }

    #[test]
    fn extents_of_a_file_are_checked() {
        let size = 8 * PAGE;
        for bad in [
            vec![run(2, 2)],
            vec![run(3, 2)],
            vec![run(7, 9)],
            vec![run(1, 2), run(2, 3)],
            vec![run(4, 5), run(1, 2)],
            vec![Run { start: 1, end: PAGE }],
            vec![Run { start: 0, end: u64::MAX }],
        ] {
            assert!(Extents::checked(bad.clone(), size).is_err(), "{bad:?}");
        }
    }
}
