//! Lists of page numbers, as the inflate and deflate queues carry them.
//!
//! A driver names each page by itself, in no particular order (Linux names them from the last
//! to the first). Given back one by one, each would cost a system call and an interruption of
//! every vCPU; so a list is sorted and adjacent pages become one run.

/// Bytes of a balloon page, whatever the page size of guest or host (VIRTIO 1.2 section
/// 5.5.6: "PFN" is the address divided by 4096).
pub(super) const PAGE: u64 = 4096;

/// Balloon pages of one MiB.
pub(super) const PAGES_PER_MIB: u32 = 256;

/// Adjacent pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// Number of the first page.
    pub first: u64,
    /// How many pages, at least one.
    pub count: u64,
}

/// Replaces `numbers` by the little-endian 32-bit numbers in `bytes`; an incomplete last one
/// is left out.
pub(super) fn decode(bytes: &[u8], numbers: &mut Vec<u32>) {
    let (whole, _) = bytes.as_chunks::<4>();
    numbers.clear();
    numbers.extend(whole.iter().map(|number| u32::from_le_bytes(*number)));
}

/// Sorts `numbers` and returns them as runs, each page once.
pub(super) fn runs(numbers: &mut Vec<u32>) -> impl Iterator<Item = Run> {
    numbers.sort_unstable();
    numbers.dedup();
    // Sorted and each once, so the successor of a number that has one is larger and no sum
    // overflows.
    numbers.chunk_by(|a, b| b - a == 1).filter_map(|run| {
        let first = u64::from(*run.first()?);
        Some(Run { first, count: run.len() as u64 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(mut numbers: Vec<u32>) -> Vec<(u64, u64)> {
        runs(&mut numbers).map(|run| (run.first, run.count)).collect()
    }

    #[test]
    fn adjacent_pages_become_one_run_in_whatever_order_they_come() {
        assert_eq!(of(vec![]), []);
        assert_eq!(of((10..20).rev().collect()), [(10, 10)]);
        assert_eq!(of(vec![7, 3, 5, 4, 9, 8]), [(3, 3), (7, 3)]);
    }

    #[test]
    fn a_page_named_twice_counts_once() {
        assert_eq!(of(vec![5, 5, 6, 5]), [(5, 2)]);
    }

    #[test]
    fn the_ends_of_the_number_range_do_not_touch() {
        assert_eq!(of(vec![u32::MAX, 0, u32::MAX, u32::MAX - 1]), [(0, 1), (0xffff_fffe, 2)]);
    }

    #[test]
    fn an_incomplete_last_number_is_left_out() {
        let mut numbers = vec![99];
        decode(&[1, 0, 0, 0, 2, 1, 0, 0, 3, 0, 0], &mut numbers);
        assert_eq!(numbers, [1, 0x102]);
    }
}
