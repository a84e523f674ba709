//! Giving guest memory back to the host.
//!
//! What "back" takes depends on what the memory is:
//!
//! | mapping                         | how                                                   |
//! |---------------------------------|-------------------------------------------------------|
//! | private, anonymous              | `MADV_DONTNEED`: reads as zero afterwards             |
//! | shared (memfd, file)            | `MADV_REMOVE`: a hole in the file; zero for everybody |
//! | private, of a file (a snapshot) | anonymous memory in its place: reads as zero          |
//!
//! In the last case `MADV_DONTNEED` would only drop the guest's own copy. The next touch would
//! bring the page of the file back: a read from the disk for a page that nobody wants. Each
//! replaced piece splits the mapping, of which a process may have 65,530; so their number is
//! capped by [`BALLOON_OVERLAYS_MAX`], and beyond it `MADV_DONTNEED` has to do.
//!
//! All of it works on whole pages of the host. Ranges are cut to them; huge pages named by
//! their parts are collected in [`Parts`] first.
//!
//! The content of what was given back changed, so it is marked where dirty pages are tracked,
//! after the fact: whoever copies between the two copies again.

use std::{
    io,
    ops::Range,
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
    bitmap::Bitmap,
};

use super::{
    pages::{PAGE, Run},
    parts::Parts,
    shared::Shared,
};
use crate::{Memory, limits::BALLOON_OVERLAYS_MAX, written::Written};

/// What came of giving something back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Outcome {
    /// Bytes the host has now.
    pub freed: u64,
    /// Pages of the list that are no memory.
    pub bad_pages: u64,
    /// Ranges the host would not take.
    pub fails: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Backing {
    Anonymous,
    Shared,
    /// A private mapping of a file, with this protection.
    File(i32),
}

struct Region {
    /// First guest address.
    first: u64,
    len: u64,
    /// Address in this process; always used with its provenance exposed.
    host: usize,
    backing: Backing,
    /// Bytes of the smallest piece the host can take back.
    page: u64,
    /// What of its huge pages is in the balloon; `None` where pages are small.
    parts: Option<Parts>,
}

/// Guest memory as the balloon sees it.
pub(super) struct Ram {
    memory: Memory,
    regions: Vec<Region>,
    shared: Arc<Shared>,
    warned: bool,
}

impl Ram {
    /// Looks at what `memory` consists of, and goes on with the parts of huge pages that
    /// [`Ram::park`] left in `shared`.
    pub fn new(memory: Memory, shared: Arc<Shared>) -> Ram {
        let regions = memory.iter().filter_map(Region::of).collect();
        Ram::of(memory, regions, shared)
    }

    fn of(memory: Memory, mut regions: Vec<Region>, shared: Arc<Shared>) -> Ram {
        let parked = std::mem::take(&mut *shared.parts());
        for (region, parked) in regions.iter_mut().zip(parked) {
            if let (Some(parts), Some(parked)) = (&mut region.parts, parked)
                && parts.fits(&parked)
            {
                *parts = parked;
            }
        }
        Ram { memory, regions, shared, warned: false }
    }

    /// Leaves the parts of huge pages for the next one.
    pub fn park(self) {
        *self.shared.parts() = self.regions.into_iter().map(|region| region.parts).collect();
    }

    /// Whether it matters which pages leave the balloon.
    pub fn has_parts(&self) -> bool {
        self.regions.iter().any(|region| region.parts.is_some())
    }

    /// The pages of `run` went into the balloon: gives back what is memory of them, region by
    /// region.
    pub fn inflate(&mut self, run: Run) -> Outcome {
        let mut outcome = Outcome::default();
        self.each_region(run, &mut outcome, |ram, index, range, outcome| {
            let Some(parts) = ram.regions.get_mut(index).and_then(|region| region.parts.as_mut()) else {
                return ram.discard(index, range, outcome);
            };
            let mut wholes: Vec<Range<u64>> = Vec::new();
            parts.insert(range.start / PAGE..range.end / PAGE, |whole| wholes.push(whole));
            for whole in wholes {
                ram.discard(index, whole.start * PAGE..whole.end * PAGE, outcome);
            }
        });
        outcome
    }

    /// The pages of `run` left the balloon; nothing is given to anybody.
    pub fn deflate(&mut self, run: Run) -> Outcome {
        let mut outcome = Outcome::default();
        self.each_region(run, &mut outcome, |ram, index, range, _| {
            if let Some(parts) = ram.regions.get_mut(index).and_then(|region| region.parts.as_mut()) {
                parts.remove(range.start / PAGE..range.end.div_ceil(PAGE));
            }
        });
        outcome
    }

    /// Gives back the whole pages inside `len` bytes at `host`, an address in this process
    /// that came from a descriptor chain.
    pub fn give_back(&mut self, host: usize, len: u64) -> Outcome {
        let mut outcome = Outcome::default();
        let inside = |r: &Region| host.checked_sub(r.host).is_some_and(|offset| (offset as u64) < r.len);
        if let Some(index) = self.regions.iter().position(inside) {
            let offset = self.regions.get(index).map_or(0, |r| (host - r.host) as u64);
            let end = self.regions.get(index).map_or(0, |r| offset.saturating_add(len).min(r.len));
            self.discard(index, offset..end, &mut outcome);
        } else {
            outcome.fails += 1;
        }
        outcome
    }

    /// Calls `f` with each piece of `run` that lies in one region, as the region's number and
    /// a range of offsets in it. What lies in none is counted.
    fn each_region(
        &mut self,
        run: Run,
        outcome: &mut Outcome,
        mut f: impl FnMut(&mut Ram, usize, Range<u64>, &mut Outcome),
    ) {
        let (mut at, end) = (run.first * PAGE, (run.first + run.count) * PAGE);
        while at < end {
            let found = self.regions.iter().position(|r| at.wrapping_sub(r.first) < r.len);
            let piece = found.and_then(|index| Some((index, self.regions.get(index)?)));
            at = if let Some((index, Region { first, len, .. })) = piece {
                let (offset, stop) = (at - first, end.min(first + len));
                let range = offset..stop - first;
                f(self, index, range, outcome);
                stop
            } else {
                let firsts = self.regions.iter().map(|region| region.first);
                let next = firsts.filter(|first| *first > at).min().unwrap_or(end).min(end);
                outcome.bad_pages += (next - at).div_ceil(PAGE);
                next
            };
        }
    }

    /// Gives the whole pages in `range` of a region back.
    fn discard(&mut self, index: usize, range: Range<u64>, outcome: &mut Outcome) {
        let Some(region) = self.regions.get(index) else { return };
        // Addresses of this process are what the host's pages are aligned by.
        let host = region.host as u64;
        let start = (host + range.start).next_multiple_of(region.page) - host;
        let Some(end) = ((host + range.end) / region.page * region.page).checked_sub(host) else { return };
        if start >= end || end > region.len {
            return;
        }
        match region.release(start, end - start, &self.shared.overlays) {
            Ok(()) => outcome.freed += end - start,
            Err(error) => {
                outcome.fails += 1;
                if !std::mem::replace(&mut self.warned, true) {
                    let kib = (end - start) >> 10;
                    log::warn!("The host does not take {kib} KiB of guest memory back: {error}");
                }
            }
        }
        // Also after a failure, which may have come half-way.
        if let Some(region) = self.memory.find_region(GuestAddress(region.first)) {
            region.bitmap().mark_dirty(start as usize, (end - start) as usize);
        }
    }
}

impl Region {
    fn of(region: &GuestRegionMmap<Written>) -> Option<Region> {
        let (first, len) = (region.start_addr().raw_value(), region.len());
        let host = region.get_host_address(MemoryRegionAddress(0)).ok()?.expose_provenance();
        let flags = region.flags();
        let backing = if flags & libc::MAP_PRIVATE == 0 {
            Backing::Shared
        } else if flags & libc::MAP_ANONYMOUS != 0 {
            Backing::Anonymous
        } else {
            Backing::File(region.prot())
        };
        let page = page_size(region);
        let parts = (page > PAGE).then(|| Parts::new(len / PAGE, page / PAGE));
        Some(Region { first, len, host, backing, page, parts })
    }

    fn release(&self, offset: u64, len: u64, overlays: &AtomicU32) -> io::Result<()> {
        let at = std::ptr::with_exposed_provenance_mut::<libc::c_void>(self.host + offset as usize);
        let len = len as usize;
        let advice = match self.backing {
            Backing::File(protection) if overlays.load(Ordering::Relaxed) < BALLOON_OVERLAYS_MAX => {
                overlays.fetch_add(1, Ordering::Relaxed);
                return overlay(at, len, protection);
            }
            Backing::Anonymous | Backing::File(_) => libc::MADV_DONTNEED,
            Backing::Shared => libc::MADV_REMOVE,
        };
        // SAFETY: the range lies inside one region of guest memory, which `Ram` keeps mapped.
        // Nothing in this process relies on what guest memory contains.
        if unsafe { libc::madvise(at, len, advice) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// Puts anonymous memory in the place of `len` bytes at `at`.
fn overlay(at: *mut libc::c_void, len: usize, protection: i32) -> io::Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: the range lies inside one region of guest memory, which `Ram` keeps mapped; it is
    // replaced in one step by memory that can be used in the same way, and unmapped with it.
    let new = unsafe { libc::mmap(at, len, protection, flags, -1, 0) };
    if new == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Bytes of a page of the host in a region: more than [`PAGE`] where it is made of huge ones.
fn page_size(region: &GuestRegionMmap<Written>) -> u64 {
    const DEFAULT_HUGE: u64 = 2 << 20;
    let flags = region.flags();
    if flags & libc::MAP_HUGETLB != 0 {
        let exponent = flags >> libc::MAP_HUGE_SHIFT & libc::MAP_HUGE_MASK;
        return if exponent == 0 { DEFAULT_HUGE } else { 1 << exponent };
    }
    let Some(file) = region.file_offset() else { return PAGE };
    // SAFETY: `statfs` is plain numbers, for which all zeroes is a value.
    let mut about: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the call fills the structure it is given.
    let known = unsafe { libc::fstatfs(file.file().as_raw_fd(), &raw mut about) } == 0;
    let size = u64::try_from(about.f_bsize).unwrap_or(PAGE);
    let huge = known && about.f_type == libc::HUGETLBFS_MAGIC && size.is_power_of_two();
    if huge { size.max(PAGE) } else { PAGE }
}

#[cfg(test)]
pub(super) mod tests;
