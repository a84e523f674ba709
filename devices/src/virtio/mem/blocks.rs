//! Which blocks are plugged, and what may be asked of them: rules without effects.
//!
//! ```text
//!   start                    + requested       + usable                + total
//!     |##..####......##.........|................|.......................|
//!       plugged blocks            may be chosen    never plugged
//! ```
//!
//! The driver chooses blocks inside the usable part, and has at most as many as were
//! requested when it asks for more. The usable part is the requested size rounded up to whole
//! slots and no larger, because the guest can reach every slot that holds one plugged block:
//! so it never reaches more than it was offered at most. It shrinks only when the driver
//! unplugs everything (VIRTIO 1.2 section 5.15.4).

use std::ops::Range;

use super::request::{Answer, Filling, Span};

/// Where the region lies and how it is divided; all in bytes, checked by
/// [`super::MemConfig::check`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub start: u64,
    pub total: u64,
    pub block: u64,
    pub slot: u64,
}

impl Layout {
    pub(super) fn blocks(&self) -> usize {
        (self.total / self.block) as usize
    }

    pub(super) fn slots(&self) -> usize {
        (self.total / self.slot) as usize
    }

    fn slot_blocks(&self) -> usize {
        (self.slot / self.block) as usize
    }

    /// The slots that hold a block of `blocks`.
    pub(super) fn slots_of(&self, blocks: &Range<usize>) -> Range<usize> {
        let each = self.slot_blocks();
        blocks.start / each..blocks.end.div_ceil(each)
    }

    /// The blocks of a slot.
    pub(super) fn blocks_of(&self, slot: usize) -> Range<usize> {
        let each = self.slot_blocks();
        slot * each..(slot + 1) * each
    }

    /// Offset in the region and length of `blocks`, in bytes.
    pub(super) fn bytes_of(&self, blocks: &Range<usize>) -> (u64, u64) {
        (blocks.start as u64 * self.block, blocks.len() as u64 * self.block)
    }
}

/// The state of all blocks, and the sizes the driver is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Blocks {
    layout: Layout,
    /// A bit for each block, the first one lowest.
    words: Vec<u64>,
    /// How many bits are set.
    plugged: usize,
    requested: u64,
    usable: u64,
}

/// Bits of one word that belong to a range.
fn masks(blocks: Range<usize>) -> impl Iterator<Item = (usize, u64)> {
    let words = blocks.start / 64..blocks.end.div_ceil(64).max(blocks.start / 64);
    words.map(move |word| {
        let low = blocks.start.saturating_sub(word * 64).min(64) as u32;
        let high = (blocks.end - word * 64).min(64) as u32;
        let up_to = |bit| if bit >= 64 { u64::MAX } else { (1u64 << bit) - 1 };
        (word, up_to(high) & !up_to(low))
    })
}

impl Blocks {
    /// Nothing plugged, nothing requested.
    pub(super) fn new(layout: Layout) -> Blocks {
        let words = vec![0; layout.blocks().div_ceil(64)];
        Blocks { layout, words, plugged: 0, requested: 0, usable: 0 }
    }

    /// Bytes of all plugged blocks.
    pub(super) fn plugged_size(&self) -> u64 {
        self.plugged as u64 * self.layout.block
    }

    /// Bytes the guest should have.
    pub(super) fn requested(&self) -> u64 {
        self.requested
    }

    /// Bytes from the start in which the driver may plug.
    pub(super) fn usable(&self) -> u64 {
        self.usable
    }

    /// Asks the guest for a new size, which must be a multiple of the block size and not more
    /// than there is. Says which of the two is broken.
    pub(super) fn request(&mut self, bytes: u64) -> Result<(), String> {
        let Layout { total, block, .. } = self.layout;
        let mib = |bytes: u64| bytes >> 20;
        if !bytes.is_multiple_of(block) {
            let block = mib(block);
            return Err(format!("{} MiB is no multiple of the block size, {block} MiB", mib(bytes)));
        }
        if bytes > total {
            let total = mib(total);
            return Err(format!("{} MiB is more than the {total} MiB that can be plugged", mib(bytes)));
        }
        self.requested = bytes;
        self.usable = self.usable.max(self.enough());
        Ok(())
    }

    /// The least usable size for what is requested: it in whole slots.
    fn enough(&self) -> u64 {
        self.requested.next_multiple_of(self.layout.slot)
    }

    /// All blocks were unplugged: the usable part begins anew.
    pub(super) fn shrink(&mut self) {
        self.usable = self.enough();
    }

    /// The blocks that `span` names, when they are whole and usable ones.
    pub(super) fn find(&self, span: Span) -> Option<Range<usize>> {
        let block = self.layout.block;
        let offset = span.address.checked_sub(self.layout.start)?;
        let end = u64::from(span.blocks).checked_mul(block)?.checked_add(offset)?;
        let good = span.blocks > 0 && offset.is_multiple_of(block) && end <= self.usable;
        good.then(|| (offset / block) as usize..(end / block) as usize)
    }

    /// What a STATE request is told.
    pub(super) fn state(&self, span: Span) -> Answer {
        self.find(span).map_or(Answer::Error, |blocks| Answer::State(self.filling(blocks)))
    }

    /// The blocks a PLUG request is about, or why it is refused.
    pub(super) fn may_plug(&self, span: Span) -> Result<Range<usize>, Answer> {
        let blocks = self.find(span).ok_or(Answer::Error)?;
        if self.filling(blocks.clone()) != Filling::Unplugged {
            return Err(Answer::Error);
        }
        let room = (self.requested / self.layout.block) as usize;
        if self.plugged + blocks.len() > room { Err(Answer::Nack) } else { Ok(blocks) }
    }

    /// The blocks an UNPLUG request is about, or why it is refused.
    pub(super) fn may_unplug(&self, span: Span) -> Result<Range<usize>, Answer> {
        let blocks = self.find(span).ok_or(Answer::Error)?;
        if self.filling(blocks.clone()) == Filling::Plugged { Ok(blocks) } else { Err(Answer::Error) }
    }

    fn filling(&self, blocks: Range<usize>) -> Filling {
        let all = blocks.len();
        match self.count(blocks) {
            0 => Filling::Unplugged,
            some if some == all => Filling::Plugged,
            _ => Filling::Mixed,
        }
    }

    /// How many of `blocks` are plugged.
    pub(super) fn count(&self, blocks: Range<usize>) -> usize {
        let word = |at: usize| self.words.get(at).copied().unwrap_or(0);
        masks(blocks).map(|(at, mask)| (word(at) & mask).count_ones() as usize).sum()
    }

    /// Makes all of `blocks` plugged or unplugged.
    pub(super) fn set(&mut self, blocks: Range<usize>, plugged: bool) {
        let blocks = blocks.start..blocks.end.min(self.layout.blocks());
        let before = self.count(blocks.clone());
        self.plugged = self.plugged - before + if plugged { blocks.len() } else { 0 };
        for (at, mask) in masks(blocks) {
            if let Some(word) = self.words.get_mut(at) {
                *word = if plugged { *word | mask } else { *word & !mask };
            }
        }
    }

    /// The plugged ones of `blocks`, neighbours as one, in ascending order.
    pub(super) fn runs_in(&self, blocks: Range<usize>) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for (at, mask) in masks(blocks) {
            let mut left = self.words.get(at).map_or(0, |word| word & mask);
            while left != 0 {
                let first = left.trailing_zeros() as usize;
                let len = (left >> first).trailing_ones() as usize;
                let start = at * 64 + first;
                // Adding to the lowest one of a run of ones carries past its end.
                left &= left.wrapping_add(1 << first);
                match runs.last_mut() {
                    Some(last) if last.end == start => last.end = start + len,
                    _ => runs.push(start..start + len),
                }
            }
        }
        runs
    }

    /// Guest addresses of all plugged blocks, neighbours as one, in ascending order.
    pub(super) fn runs(&self) -> Vec<Range<u64>> {
        let address = |block: usize| self.layout.start + block as u64 * self.layout.block;
        let runs = self.runs_in(0..self.layout.blocks());
        runs.into_iter().map(|run| address(run.start)..address(run.end)).collect()
    }

    /// The bits as bytes, for saving.
    pub(super) fn bits(&self) -> Vec<u8> {
        self.words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// The state that was saved; says what of it cannot be.
    pub(super) fn from_saved(
        layout: Layout,
        requested: u64,
        usable: u64,
        bits: &[u8],
    ) -> Result<Blocks, String> {
        let mut blocks = Blocks::new(layout);
        blocks.request(requested)?;
        if usable > layout.total || !usable.is_multiple_of(layout.slot) || usable < blocks.usable {
            return Err(format!("{usable:#x} bytes cannot be usable with {requested:#x} requested"));
        }
        if bits.len() != blocks.words.len() * 8 {
            return Err(format!("{} bytes are not the state of {} blocks", bits.len(), layout.blocks()));
        }
        let (whole, _) = bits.as_chunks();
        blocks.words = whole.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect();
        blocks.usable = usable;
        let all: u32 = blocks.words.iter().map(|word| word.count_ones()).sum();
        blocks.plugged = blocks.count(0..(usable / layout.block) as usize);
        if blocks.plugged != all as usize {
            return Err("blocks outside the usable part are plugged".to_owned());
        }
        Ok(blocks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const START: u64 = 0x1_4000_0000;
    const LAYOUT: Layout = Layout { start: START, total: 1024 * MIB, block: 2 * MIB, slot: 128 * MIB };

    fn span(mib: u64, blocks: u16) -> Span {
        Span { address: START + mib * MIB, blocks }
    }

    fn requested(mib: u64) -> Blocks {
        let mut blocks = Blocks::new(LAYOUT);
        blocks.request(mib * MIB).unwrap();
        blocks
    }

    #[test]
    fn a_requested_size_is_a_multiple_of_the_block_and_not_more_than_there_is() {
        let mut blocks = requested(6);
        assert_eq!((blocks.requested(), blocks.usable()), (6 * MIB, 128 * MIB));
        for bad in [1, MIB, 2 * MIB + 1, 1026 * MIB, u64::MAX, u64::MAX - 2 * MIB + 1] {
            assert!(blocks.request(bad).is_err(), "{bad:#x}");
        }
        assert_eq!((blocks.requested(), blocks.usable()), (6 * MIB, 128 * MIB));
        blocks.request(1024 * MIB).unwrap();
        blocks.request(0).unwrap();
        assert_eq!(blocks.usable(), 1024 * MIB, "the usable part shrank under the driver");
        blocks.shrink();
        assert_eq!(blocks.usable(), 0);
        blocks.request(130 * MIB).unwrap();
        assert_eq!(blocks.usable(), 256 * MIB);
    }

    #[test]
    fn ranges_that_make_no_sense_are_errors_in_every_request() {
        let blocks = requested(256);
        for bad in [
            span(0, 0),
            span(1, 1),
            Span { address: START + 1, blocks: 1 },
            Span { address: START - 2 * MIB, blocks: 1 },
            Span { address: 0, blocks: 1 },
            Span { address: u64::MAX, blocks: u16::MAX },
            Span { address: u64::MAX - (2 * MIB) + 1, blocks: 1 },
            span(256, 1),
            span(254, 2),
            span(0, 129),
            span(0, u16::MAX),
        ] {
            assert_eq!(blocks.may_plug(bad), Err(Answer::Error), "{bad:x?}");
            assert_eq!(blocks.may_unplug(bad), Err(Answer::Error), "{bad:x?}");
            assert_eq!(blocks.state(bad), Answer::Error, "{bad:x?}");
        }
        assert_eq!(blocks.may_plug(span(0, 128)), Ok(0..128));
        assert_eq!(blocks.may_plug(span(254, 1)), Ok(127..128));
    }

    #[test]
    fn what_is_plugged_cannot_be_plugged_nor_the_other_way_round() {
        let mut blocks = requested(256);
        blocks.set(3..70, true);
        assert_eq!(blocks.may_plug(span(6, 1)), Err(Answer::Error));
        assert_eq!(blocks.may_plug(span(138, 2)), Err(Answer::Error), "half of it is");
        assert_eq!(blocks.may_unplug(span(4, 2)), Err(Answer::Error), "half of it is not");
        assert_eq!(blocks.may_unplug(span(6, 67)), Ok(3..70));
        assert_eq!(blocks.state(span(6, 67)), Answer::State(Filling::Plugged));
        assert_eq!(blocks.state(span(4, 67)), Answer::State(Filling::Mixed));
        assert_eq!(blocks.state(span(0, 3)), Answer::State(Filling::Unplugged));
        assert_eq!(blocks.plugged_size(), 67 * 2 * MIB);
    }

    #[test]
    fn no_more_is_plugged_than_was_requested() {
        let mut blocks = requested(8);
        assert_eq!(blocks.may_plug(span(0, 5)), Err(Answer::Nack));
        assert_eq!(blocks.may_plug(span(100, 4)), Ok(50..54));
        blocks.set(50..54, true);
        assert_eq!(blocks.may_plug(span(0, 1)), Err(Answer::Nack));
        assert_eq!(blocks.may_plug(span(100, 1)), Err(Answer::Error), "plugged counts for more than full");
        blocks.request(0).unwrap();
        assert_eq!(blocks.may_unplug(span(100, 4)), Ok(50..54), "less was requested meanwhile");
    }

    #[test]
    fn bits_agree_with_a_plain_list_of_booleans() {
        let mut blocks = requested(1024);
        let mut plain = vec![false; LAYOUT.blocks()];
        let mut seed = 1u64;
        let mut dice = |limit: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) as usize % limit
        };
        for _ in 0..2000 {
            let first = dice(plain.len());
            let end = first + dice(plain.len() - first + 1);
            let plugged = dice(2) == 0;
            blocks.set(first..end, plugged);
            plain[first..end].fill(plugged);
            let (a, b) = (dice(plain.len()), dice(plain.len()));
            let range = a.min(b)..a.max(b);
            assert_eq!(blocks.count(range.clone()), plain[range].iter().filter(|p| **p).count());
            assert_eq!(blocks.plugged, plain.iter().filter(|p| **p).count());
            let mut from_runs = vec![false; plain.len()];
            for run in blocks.runs() {
                let of = |address: u64| ((address - START) / LAYOUT.block) as usize;
                from_runs[of(run.start)..of(run.end)].fill(true);
            }
            assert_eq!(from_runs, plain);
        }
        let saved = Blocks::from_saved(LAYOUT, 1024 * MIB, 1024 * MIB, &blocks.bits()).unwrap();
        assert_eq!(saved, blocks);
    }

    #[test]
    fn saved_states_that_cannot_be_are_refused() {
        let mut blocks = requested(128);
        blocks.set(0..64, true);
        let bits = blocks.bits();
        let load = |requested, usable, bits: &[u8]| Blocks::from_saved(LAYOUT, requested, usable, bits);
        assert_eq!(load(128 * MIB, 128 * MIB, &bits), Ok(blocks));
        assert!(load(129 * MIB, 256 * MIB, &bits).is_err());
        assert!(load(1026 * MIB, 1024 * MIB, &bits).is_err());
        assert!(load(128 * MIB, 0, &bits).is_err());
        assert!(load(128 * MIB, 130 * MIB, &bits).is_err());
        assert!(load(128 * MIB, 1 << 40, &bits).is_err());
        assert!(load(0, 0, &bits).is_err(), "plugged beyond the usable part");
        assert!(load(128 * MIB, 128 * MIB, &bits[1..]).is_err());
        assert!(load(128 * MIB, 128 * MIB, &[]).is_err());
    }

    #[test]
    fn slots_and_blocks_know_each_other() {
        assert_eq!(LAYOUT.slots(), 8);
        assert_eq!(LAYOUT.slots_of(&(0..1)), 0..1);
        assert_eq!(LAYOUT.slots_of(&(63..65)), 0..2);
        assert_eq!(LAYOUT.slots_of(&(64..128)), 1..2);
        assert_eq!(LAYOUT.blocks_of(7), 448..512);
        assert_eq!(LAYOUT.bytes_of(&(64..66)), (128 * MIB, 4 * MIB));
    }
}
