//! Which pages of guest memory hold something, and which were written.
//!
//! ```text
//!   all of RAM ──┬─ touched   /proc/self/pagemap or mincore: there is a page, or one in swap
//!                ├─ own       pagemap: there is one, and it is this process's: a file that is mapped
//!                │            privately shows through wherever nothing was written
//!                └─ dirty     KVM's log (guest) and bitmaps of `Memory` (devices)
//! ```
//!
//! The first two cost nothing while the guest runs and are always true, so a machine that came
//! from a memory file can be told apart from it at any time without any tracking: its own pages
//! are those that differ. KVM's log tells more (what was written since the log was read last) and
//! costs a fault for each page, so it is there where it was asked for.
//!
//! Offsets are those of the memory file: RAM region after region, then the pluggable region.

use std::io;

use devices::Memory;
use kvm_ioctls::VmFd;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::{
    pagemap::{PageMap, Span},
    snapshot::extents::{Gathering, Run},
};

const PAGE: u64 = 4096;

/// A piece of guest memory with its place in this process and in the memory file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// First guest address.
    pub guest: u64,
    /// First address in this process. Mapped as long as the process lives.
    pub host: usize,
    /// Where it begins in the memory file.
    pub offset: u64,
    /// Bytes; whole pages.
    pub len: u64,
}

impl Piece {
    /// The part of the piece that `run` of the memory file is.
    pub fn cut(self, run: Run) -> Option<Piece> {
        let run = run.within(Run { start: self.offset, end: self.offset + self.len });
        let skip = run.start.checked_sub(self.offset).filter(|_| !run.is_empty())?;
        let host = self.host + usize::try_from(skip).ok()?;
        Some(Piece { guest: self.guest + skip, host, offset: run.start, len: run.len() })
    }
}

/// The regions of `memory`, one after the other in the memory file.
pub fn pieces(memory: &Memory) -> Vec<Piece> {
    let mut offset = 0;
    let mut pieces = Vec::new();
    for region in memory.iter() {
        // A region of a mapping has an address.
        let host = region.get_host_address(MemoryRegionAddress(0)).map_or(0, |at| at as usize);
        let (guest, len) = (region.start_addr().raw_value(), region.len());
        pieces.push(Piece { guest, host, offset, len });
        offset += len;
    }
    pieces
}

/// What counts as a page of a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// Any that there is.
    Touched,
    /// Those that no file shows through.
    Own,
}

/// Adds the pages of `piece` that are there, as runs of the memory file.
pub fn find(map: &PageMap, piece: Piece, which: Which, found: &mut Gathering) -> io::Result<()> {
    let span = Span { host: piece.host as u64, len: piece.len, offset: piece.offset };
    match which {
        Which::Touched => map.scan_present(span, |run| found.add(run)),
        Which::Own => map.scan(span, |run, own| {
            if own {
                found.add(run);
            }
        }),
    }
}

/// Takes what was written to RAM since the last time: KVM's log of slots 0 and on (KVM API section
/// 4.8), and what devices noted. Both begin anew. What was taken is in `found` also when a later
/// slot fails.
pub fn take_dirty(vm: &VmFd, ram: &Memory, found: &mut Gathering) -> Result<(), kvm_ioctls::Error> {
    for ((slot, region), piece) in (0..).zip(ram.iter()).zip(pieces(ram)) {
        add_bits(piece, &(**region).bitmap().take(), found);
        let len = usize::try_from(piece.len).unwrap_or(usize::MAX);
        add_bits(piece, &vm.get_dirty_log(slot, len)?, found);
    }
    Ok(())
}

fn add_bits(piece: Piece, words: &[u64], found: &mut Gathering) {
    let pages = piece.len / PAGE;
    for (number, word) in (0u64..).zip(words) {
        let mut left = *word;
        while left != 0 {
            let first = left.trailing_zeros();
            let count = (left >> first).trailing_ones();
            let page = number * 64 + u64::from(first);
            let end = (page + u64::from(count)).min(pages);
            if page < end {
                let (start, end) = (piece.offset + page * PAGE, piece.offset + end * PAGE);
                found.add(Run { start, end });
            }
            // Adding to the lowest one of a run of ones carries past its end.
            left &= left.wrapping_add(1 << first);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use api::spec::MachineConfig;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::vm::memory::{self, Backing};

    fn machine(backing: Backing<'_>) -> Memory {
        let config = MachineConfig { mem_size_mib: 64, track_dirty_pages: true, ..MachineConfig::default() };
        memory::map(&config, backing).unwrap()
    }

    fn found(memory: &Memory, which: Which) -> Vec<Run> {
        let (map, mut found) = (PageMap::open().unwrap(), Gathering::default());
        pieces(memory).into_iter().for_each(|piece| find(&map, piece, which, &mut found).unwrap());
        found.finish().runs().to_vec()
    }

    fn run(first: u64, end: u64) -> Run {
        Run { start: first * PAGE, end: end * PAGE }
    }

    #[test]
    fn what_was_touched_is_found_and_nothing_else() {
        let memory = machine(Backing::Empty);
        for page in [0, 1, 2, 700, 9000, 16383] {
            memory.write_obj(1u8, GuestAddress(page * PAGE)).unwrap();
        }
        let expected = [run(0, 3), run(700, 701), run(9000, 9001), run(16383, 16384)];
        assert_eq!(found(&memory, Which::Touched), expected);
        assert_eq!(found(&memory, Which::Own), expected);
    }

    #[test]
    fn what_a_file_shows_is_touched_and_not_own() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&[7; 4 * PAGE as usize], 40 * PAGE).unwrap();
        let memory = machine(Backing::File(&file));
        let _: u8 = memory.read_obj(GuestAddress(41 * PAGE)).unwrap();
        memory.write_obj(9u8, GuestAddress(43 * PAGE)).unwrap();
        memory.write_obj(9u8, GuestAddress(5000 * PAGE)).unwrap();
        assert_eq!(found(&memory, Which::Own), [run(43, 44), run(5000, 5001)]);
        // The kernel maps neighbours that are in its cache along with a page that is read.
        assert!(found(&memory, Which::Touched).iter().any(|r| r.start <= 41 * PAGE && r.end > 41 * PAGE));
    }

    #[test]
    fn bits_become_runs_and_none_leads_beyond_the_end() {
        let piece = Piece { guest: 0, host: 0, offset: 100 * PAGE, len: 130 * PAGE };
        let mut found = Gathering::default();
        add_bits(piece, &[0b1011, 1 << 63, u64::MAX, u64::MAX], &mut found);
        assert_eq!(found.finish().runs(), [run(100, 102), run(103, 104), run(227, 230)]);
    }

    #[test]
    fn a_piece_is_cut_to_a_run() {
        let piece = Piece { guest: 1 << 32, host: 0x10000, offset: 8 * PAGE, len: 4 * PAGE };
        let cut = piece.cut(run(9, 100)).unwrap();
        assert_eq!((cut.guest, cut.host), ((1 << 32) + PAGE, 0x10000 + PAGE as usize));
        assert_eq!((cut.offset, cut.len), (9 * PAGE, 3 * PAGE));
        assert_eq!(piece.cut(run(12, 13)), None);
        assert_eq!(piece.cut(run(0, 8)), None);
    }
}
