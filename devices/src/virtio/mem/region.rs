//! The host's side of pluggable memory: one range of addresses, reserved once.
//!
//! ```text
//!   host addresses   | slot 0      | slot 1      | slot 2      | slot 3      |
//!                      open          closed        open          closed
//!                      own memory    the sink      own memory    the sink
//! ```
//!
//! The whole range stands in guest memory ([`crate::Memory`]) from the start, so that guest
//! memory never changes while devices work with it. A slot that holds no plugged block is
//! *closed*: KVM does not know it, so the guest's processors cannot reach it.
//!
//! **Devices can.** A guest may name any address of guest memory in a request to its disk,
//! plugged or not, and devices here follow such addresses with plain loads and stores. A
//! closed range without access rights would let one such request end the monitor by
//! `SIGSEGV`; a closed range of ordinary memory would let a guest use all the memory that it
//! was not given, through its disk. So every closed slot shows the same *sink*, a memory file
//! of one slot's size that is emptied every now and then. What is written there is lost or
//! comes back somewhere else, which only the guest that wrote it can notice; and however much
//! it writes, the host lends it one slot and no more.
//!
//! Inside an open slot, blocks that are not plugged stay reachable to the guest. It was told
//! not to touch them, their pages were given back, and if it touches them all the same it has
//! new pages, up to the size of the slot. Where that is too much, blocks are made as large as
//! slots.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd},
    sync::Arc,
};

use vm_memory::{GuestAddress, GuestRegionMmap, mmap::MmapRegionBuilder};

use crate::written::Written;

/// What host and guest addresses agree modulo, so that huge pages fit.
const HUGE: usize = 2 << 20;
const OPEN: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Which pages of the host plugged memory is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Pages {
    /// What the host does on its own.
    #[default]
    Small,
    /// Huge pages where the host finds some.
    Transparent,
    /// 2 MiB pages of the host's pool, taken when a slot is opened; without enough of them
    /// the driver is told to try again.
    Huge2M,
}

impl Pages {
    /// Flags of mmap(2).
    fn flags(self) -> i32 {
        match self {
            // Reserved at once: a guest must not die of an empty pool later.
            Pages::Huge2M => libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
            Pages::Small | Pages::Transparent => libc::MAP_NORESERVE,
        }
    }
}

/// Host addresses for pluggable memory; every slot is closed at first.
#[derive(Debug)]
pub struct Region {
    base: *mut u8,
    slots: usize,
    slot_size: usize,
    pages: Pages,
    sink: File,
}

// SAFETY: the pointer names a range of this process that stays mapped as long as the region
// lives. What is mapped there changes under a lock of the device's (`Pool`), and whoever
// reads or writes there does so as with all guest memory: volatile, trusting nothing.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Reserves addresses for `total` bytes in slots of `slot_size`, both multiples of 2 MiB
    /// and the one of the other. Takes no memory yet.
    pub fn reserve(total: u64, slot_size: u64, pages: Pages) -> io::Result<Region> {
        let wrong = || io::Error::from(io::ErrorKind::InvalidInput);
        let total = usize::try_from(total).map_err(|_| wrong())?;
        let slot_size = usize::try_from(slot_size).map_err(|_| wrong())?;
        let fits = slot_size > 0 && slot_size.is_multiple_of(HUGE) && total.is_multiple_of(slot_size);
        if !fits || total == 0 {
            return Err(wrong());
        }
        let sink = sink(slot_size)?;
        let base = reserve(total)?;
        let region = Region { base, slots: total / slot_size, slot_size, pages, sink };
        for slot in 0..region.slots {
            region.close(slot)?;
        }
        Ok(region)
    }

    /// Where the region begins in this process, a multiple of 2 MiB.
    pub fn host_address(&self) -> *mut u8 {
        self.base
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.slots as u64 * self.slot_size as u64
    }

    /// Whether it has no bytes, which none has.
    pub fn is_empty(&self) -> bool {
        self.slots == 0
    }

    /// Length of a slot in bytes.
    pub fn slot_size(&self) -> u64 {
        self.slot_size as u64
    }

    /// The region as one range of guest memory at `start`, to be made part of the machine's
    /// [`crate::Memory`]; with `tracked`, devices note there which pages they wrote. `None`
    /// when it would end beyond the address space.
    ///
    /// From here on the region stays mapped until the process ends, as guest memory does.
    pub fn guest_memory(self: &Arc<Self>, start: u64, tracked: bool) -> Option<GuestRegionMmap<Written>> {
        let size = self.slots * self.slot_size;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | self.pages.flags();
        // SAFETY: the range is mapped readable and writable, and the clone that is never
        // dropped keeps it so for good.
        let mapping = unsafe {
            MmapRegionBuilder::new_with_bitmap(size, Written::new(size, tracked))
                .with_mmap_prot(OPEN)
                .with_mmap_flags(flags)
                .with_raw_mmap_pointer(self.base)
                .build()
                .ok()?
        };
        std::mem::forget(Arc::clone(self));
        GuestRegionMmap::new(mapping, GuestAddress(start))
    }

    /// Host address of a slot; beyond the last one there is none.
    pub(super) fn slot(&self, slot: usize) -> io::Result<*mut u8> {
        if slot >= self.slots {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(self.base.wrapping_add(slot * self.slot_size))
    }

    /// Gives a slot memory of its own, empty.
    pub(super) fn open(&self, slot: usize) -> io::Result<()> {
        self.fresh(self.slot(slot)?, self.slot_size)
    }

    /// Gives a slot's memory back and shows the sink in its place. The guest must not reach
    /// the slot any more.
    pub(super) fn close(&self, slot: usize) -> io::Result<()> {
        let at = self.slot(slot)?;
        let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: the range lies inside the region, which is ours alone; who uses it at the
        // moment finds other memory there, readable and writable as before.
        let done = unsafe { libc::mmap(at.cast(), self.slot_size, OPEN, flags, self.sink.as_raw_fd(), 0) };
        if done == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Gives the pages of `len` bytes from `offset` on back; both are multiples of 2 MiB and
    /// inside open slots. Reads as zeroes afterwards.
    pub(super) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let wrong = || io::Error::from(io::ErrorKind::InvalidInput);
        if offset.checked_add(len).is_none_or(|end| end > self.len()) {
            return Err(wrong());
        }
        let at = self.base.wrapping_add(offset as usize);
        match advise(at, len as usize, libc::MADV_DONTNEED) {
            // Pages of the pool know this advice since Linux 5.18.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => self.fresh(at, len as usize),
            done => done,
        }
    }

    /// Gives back what devices were made to write into closed slots.
    pub(super) fn empty_sink(&self) {
        let how = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: takes a descriptor and numbers. Failing, the sink stays as it is: bounded.
        unsafe { libc::fallocate(self.sink.as_raw_fd(), how, 0, self.slot_size as i64) };
    }

    fn fresh(&self, at: *mut u8, len: usize) -> io::Result<()> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | self.pages.flags();
        // SAFETY: callers pass ranges inside the region, which is ours alone; who uses one at
        // the moment finds other memory there, readable and writable as before.
        let done = unsafe { libc::mmap(at.cast(), len, OPEN, flags, -1, 0) };
        if done == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        if self.pages == Pages::Transparent {
            // Best effort by its nature: a kernel without them goes on with small pages.
            let _ = advise(at, len, libc::MADV_HUGEPAGE);
        }
        Ok(())
    }

    /// Bytes the sink holds at the moment.
    #[cfg(test)]
    pub(super) fn sink_bytes(&self) -> u64 {
        std::os::unix::fs::MetadataExt::blocks(&self.sink.metadata().unwrap()) * 512
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the range is ours, and nobody else was given it for good: guest memory
        // keeps the region from being dropped.
        unsafe { libc::munmap(self.base.cast(), self.slots * self.slot_size) };
    }
}

/// A memory file of `bytes` with nothing in it.
fn sink(bytes: usize) -> io::Result<File> {
    // SAFETY: the name is a C string; the descriptor is new and nobody else's.
    let sink = unsafe {
        let fd = libc::memfd_create(c"unplugged".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        File::from_raw_fd(fd)
    };
    sink.set_len(bytes as u64)?;
    Ok(sink)
}

/// A range of `bytes` without access rights, at a multiple of 2 MiB.
fn reserve(bytes: usize) -> io::Result<*mut u8> {
    let room = bytes.checked_add(HUGE).ok_or(io::ErrorKind::OutOfMemory)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: the kernel chooses the place; what is given back is part of what was just had.
    unsafe {
        let base = libc::mmap(std::ptr::null_mut(), room, libc::PROT_NONE, flags, -1, 0);
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let before = base.addr().next_multiple_of(HUGE) - base.addr();
        let at = base.byte_add(before);
        if before > 0 {
            libc::munmap(base, before);
        }
        libc::munmap(at.byte_add(bytes), HUGE - before);
        Ok(at.cast())
    }
}

fn advise(at: *mut u8, len: usize, advice: i32) -> io::Result<()> {
    // SAFETY: callers pass ranges of a region, whose content nobody here relies on.
    match unsafe { libc::madvise(at.cast(), len, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOT: u64 = 4 << 20;

    fn region() -> Region {
        Region::reserve(4 * SLOT, SLOT, Pages::Small).unwrap()
    }

    fn poke(region: &Region, offset: u64, value: u64) {
        assert!(offset < region.len());
        // SAFETY: inside the region, which is readable and writable throughout.
        unsafe { region.base.add(offset as usize).cast::<u64>().write_volatile(value) };
    }

    fn peek(region: &Region, offset: u64) -> u64 {
        assert!(offset < region.len());
        // SAFETY: as above.
        unsafe { region.base.add(offset as usize).cast::<u64>().read_volatile() }
    }

    #[test]
    fn closed_slots_can_be_touched_and_hold_no_more_than_one_slot_altogether() {
        let region = region();
        assert_eq!(region.base.addr() % HUGE, 0);
        for offset in (0..region.len()).step_by(4096) {
            poke(&region, offset, offset);
        }
        assert!(region.sink_bytes() <= SLOT, "{}", region.sink_bytes());
        region.empty_sink();
        assert_eq!(region.sink_bytes(), 0);
        assert_eq!(peek(&region, 3 * SLOT), 0);
    }

    #[test]
    fn an_open_slot_is_its_own_and_empty_every_time() {
        let region = region();
        poke(&region, SLOT, 1);
        region.open(1).unwrap();
        assert_eq!(peek(&region, SLOT), 0, "the sink shows through");
        poke(&region, SLOT, 2);
        poke(&region, 0, 3);
        assert_eq!(peek(&region, SLOT), 2);
        region.close(1).unwrap();
        assert_eq!(peek(&region, SLOT), 3, "a closed slot shows the sink");
        region.open(1).unwrap();
        assert_eq!(peek(&region, SLOT), 0);
    }

    #[test]
    fn discarding_gives_back_exactly_what_was_named() {
        let region = region();
        region.open(2).unwrap();
        let at = 2 * SLOT;
        poke(&region, at, 1);
        poke(&region, at + (2 << 20) - 8, 2);
        poke(&region, at + (2 << 20), 3);
        region.discard(at, 2 << 20).unwrap();
        assert_eq!((peek(&region, at), peek(&region, at + (2 << 20) - 8)), (0, 0));
        assert_eq!(peek(&region, at + (2 << 20)), 3);
        assert!(region.discard(region.len() - SLOT, 2 * SLOT).is_err());
        assert!(region.discard(u64::MAX, 2).is_err());
        assert!(region.open(4).is_err() && region.close(4).is_err());
    }

    #[test]
    fn sizes_that_do_not_fit_each_other_are_refused() {
        for (total, slot) in [(0, SLOT), (SLOT, 0), (3 << 20, 1 << 20), (3 * SLOT / 2, SLOT), (1 << 62, SLOT)]
        {
            assert!(Region::reserve(total, slot, Pages::Small).is_err(), "{total:#x} {slot:#x}");
        }
    }
}
