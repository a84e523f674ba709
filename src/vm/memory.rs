//! Guest memory: its backing on the host and its slots in KVM.
//!
//! The backing is chosen by purpose. A machine that boots gets private anonymous memory: a
//! page costs half as much to touch as one of a shared memory file. One that was saved gets a
//! private mapping of its memory file: what it only reads it shares with all others that come
//! from that file, what it writes is its own, and what it never touches is never read. Nothing is
//! reserved, so a machine costs the host what it touched. One slot for each region of RAM, never
//! split.

use std::{fs::File, io, os::fd::AsRawFd, sync::Arc};

use api::spec::{HugePages, MachineConfig};
use devices::{Memory, written::Written};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{
    Address, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
    mmap::{MmapRegionBuilder, MmapRegionError},
};

use crate::snapshot::extents::Run;

/// Why guest memory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// More than the host has in all.
    #[error("The machine asks for {asked} MiB of memory; this host has {have} MiB, swap included")]
    TooMuch {
        /// MiB asked for.
        asked: u64,
        /// MiB of memory and swap on the host.
        have: u64,
    },
    /// The mapping was refused.
    #[error("Cannot map {mib} MiB of guest memory{hint}")]
    Map {
        /// MiB of the region.
        mib: u64,
        /// What may help.
        hint: &'static str,
        /// What the kernel said.
        #[source]
        source: MmapRegionError,
    },
    /// The regions do not fit each other.
    #[error("Guest memory regions do not fit together")]
    Regions,
    /// The guest's processors can address no more.
    #[error("No room is left in the guest's address space for {mib} MiB of persistent memory")]
    Full {
        /// MiB asked for.
        mib: u64,
    },
    /// Touching the memory beforehand failed.
    #[error("Cannot populate guest memory; without prefault it is taken as the guest needs it")]
    Populate(#[source] io::Error),
    /// KVM refused a slot.
    #[error("KVM refused {mib} MiB of guest memory at {base:#x}")]
    Slot {
        /// MiB of the slot.
        mib: u64,
        /// Its guest address.
        base: u64,
        /// What it said.
        #[source]
        source: kvm_ioctls::Error,
    },
}

const PAGE: usize = 4096;

/// What guest memory is at first.
#[derive(Debug, Clone, Copy)]
pub enum Backing<'a> {
    /// Zero.
    Empty,
    /// Private copies of a file's pages, made as they are written. RAM lies in the file from its
    /// beginning, region after region.
    File(&'a File),
    /// The same from parts of several files, each at its own offset. What no part covers is zero.
    Layers(&'a [(Run, Arc<File>)]),
}

/// Maps the memory a machine asks for.
pub fn map(config: &MachineConfig, backing: Backing<'_>) -> Result<Memory, MemoryError> {
    let bytes = config.mem_size_mib << 20;
    let have = host_memory();
    if bytes > have {
        return Err(MemoryError::TooMuch { asked: config.mem_size_mib, have: have >> 20 });
    }
    let mut regions = Vec::new();
    let mut offset = 0;
    for (base, len) in arch::layout::ram_regions(bytes) {
        let size = usize::try_from(len).map_err(|_| MemoryError::Regions)?;
        let mut flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let mut hint = "";
        let file = match backing {
            Backing::Empty | Backing::Layers(_) => None,
            Backing::File(file) => Some((file, offset)),
        };
        let region = Run { start: offset, end: offset + len };
        offset += len;
        if config.huge_pages == HugePages::Huge2M {
            // Huge pages are reserved at once: a guest must not die of an empty pool later.
            flags = (flags & !libc::MAP_NORESERVE) | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
            hint = " from 2 MiB pages; raise /proc/sys/vm/nr_hugepages";
        }
        let failed = |source| MemoryError::Map { mib: len >> 20, hint, source };
        let at = map_aligned(size, flags, file).map_err(|e| failed(MmapRegionError::Mmap(e)))?;
        if let Backing::Layers(layers) = backing {
            lay(at, region, layers).map_err(|e| failed(MmapRegionError::Mmap(e)))?;
        }
        // SAFETY: `at` is a fresh mapping of `size` bytes with this protection and these
        // flags; it is never unmapped, as the region says of itself (it does not own it).
        let mapping = unsafe {
            MmapRegionBuilder::new_with_bitmap(size, Written::new(size, config.track_dirty_pages))
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(flags | libc::MAP_ANONYMOUS)
                .with_raw_mmap_pointer(at)
                .build()
        };
        let mapping = mapping.map_err(failed)?;
        if config.huge_pages == HugePages::Transparent {
            // Best effort by its nature: a kernel without them goes on with small pages.
            let _ = advise(mapping.as_ptr(), size, libc::MADV_HUGEPAGE);
        }
        if config.prefault {
            // Pages of a file are brought, and shared until the guest writes to them.
            let advice = match backing {
                Backing::Empty => libc::MADV_POPULATE_WRITE,
                Backing::File(_) | Backing::Layers(_) => libc::MADV_POPULATE_READ,
            };
            advise(mapping.as_ptr(), size, advice).map_err(MemoryError::Populate)?;
        }
        regions.push(GuestRegionMmap::new(mapping, base).ok_or(MemoryError::Regions)?);
    }
    Memory::from_regions(regions).map_err(|_| MemoryError::Regions)
}

/// Maps `size` bytes at an address that is a multiple of 2 MiB, as all regions of RAM are in
/// the guest. Only then can one huge page of the host back one of the guest; without it a
/// boot was measured to leave the guest six times as often, for pages to be mapped one by one.
fn map_aligned(size: usize, flags: i32, file: Option<(&File, u64)>) -> io::Result<*mut u8> {
    const HUGE: usize = 2 << 20;
    let (fd, offset, flags) = match file {
        None => (-1, 0, flags | libc::MAP_ANONYMOUS),
        Some((file, offset)) => {
            let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
            (file.as_raw_fd(), offset, flags)
        }
    };
    let room = size.checked_add(HUGE).ok_or(io::ErrorKind::OutOfMemory)?;
    let quiet = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let (null, open) = (std::ptr::null_mut(), libc::PROT_READ | libc::PROT_WRITE);
    // SAFETY: first an inaccessible range is taken at an address of the kernel's choice, then
    // part of it is replaced by the memory proper and the rest is given back. No other mapping
    // is touched.
    unsafe {
        let base = libc::mmap(null, room, libc::PROT_NONE, quiet, -1, 0);
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let before = (base as usize).next_multiple_of(HUGE) - base as usize;
        let at = base.byte_add(before);
        let mapped = libc::mmap(at, size, open, flags | libc::MAP_FIXED, fd, offset);
        if mapped == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            libc::munmap(base, room);
            return Err(error);
        }
        if before > 0 {
            libc::munmap(base, before);
        }
        // A region need not end on a page boundary of the huge kind.
        let end = size.next_multiple_of(PAGE);
        libc::munmap(at.byte_add(end), room - before - end);
        Ok(at.cast())
    }
}

/// Maps the parts of files that lie in `region` over its mapping at `at`.
fn lay(at: *mut u8, region: Run, layers: &[(Run, Arc<File>)]) -> io::Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED;
    let wrong = |_| io::Error::from(io::ErrorKind::InvalidInput);
    for (run, file) in layers {
        let run = run.within(region);
        if run.is_empty() {
            continue;
        }
        let offset = libc::off_t::try_from(run.start).map_err(wrong)?;
        let skip = usize::try_from(run.start - region.start).map_err(wrong)?;
        let len = usize::try_from(run.len()).map_err(wrong)?;
        let open = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the run lies inside the region, whose mapping is fresh and nobody else's; the
        // file is open for the length of the call.
        let mapped =
            unsafe { libc::mmap(at.byte_add(skip).cast(), len, open, flags, file.as_raw_fd(), offset) };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Begins or ends the records of what is written to RAM, that of KVM and ours, of a machine that
/// may be running.
pub fn track(vm: &VmFd, ram: &Memory, on: bool) -> Result<(), MemoryError> {
    let records = ram.iter().map(|region| (**region).bitmap());
    records.for_each(if on { Written::begin } else { Written::end });
    register(vm, ram, on).map(drop)
}

/// Gives each region of `memory` to KVM as a slot of its own, and returns the number of the
/// first slot that is free. A slot that is there already begins or ends its log.
pub fn register(vm: &VmFd, memory: &Memory, track_dirty_pages: bool) -> Result<u32, MemoryError> {
    let mut free = 0;
    for (slot, region) in (0..).zip(memory.iter()) {
        free = slot + 1;
        let (base, len) = (region.start_addr().raw_value(), region.len());
        let host =
            region.get_host_address(vm_memory::MemoryRegionAddress(0)).map_err(|_| MemoryError::Regions)?;
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: base,
            memory_size: len,
            userspace_addr: host as u64,
            flags: if track_dirty_pages { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
        };
        // SAFETY: the mapping is `len` bytes long and lives as long as `memory`, which the
        // machine keeps until the process ends; no slot overlaps another.
        unsafe { vm.set_user_memory_region(region) }.map_err(|source| MemoryError::Slot {
            mib: len >> 20,
            base,
            source,
        })?;
    }
    Ok(free)
}

fn advise(at: *mut u8, len: usize, advice: i32) -> io::Result<()> {
    // SAFETY: the range is one whole mapping of ours; neither advice changes its contents.
    match unsafe { libc::madvise(at.cast(), len, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Memory and swap of the host, in bytes.
fn host_memory() -> u64 {
    // SAFETY: `sysinfo` is plain numbers, for which all zeroes is a value.
    let mut info: libc::sysinfo = unsafe { std::mem::zeroed() };
    // SAFETY: the call fills the structure it is given.
    match unsafe { libc::sysinfo(&raw mut info) } {
        0 => (info.totalram + info.totalswap).saturating_mul(u64::from(info.mem_unit)),
        _ => u64::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_the_host_has_is_refused_by_number() {
        let config = MachineConfig { mem_size_mib: 1 << 24, ..MachineConfig::default() };
        let error = map(&config, Backing::Empty).unwrap_err().to_string();
        assert!(error.contains("16777216 MiB"), "{error}");
    }

    #[test]
    fn a_memory_file_is_shared_until_it_is_written() {
        use std::os::unix::fs::FileExt;
        use vm_memory::Bytes;
        let file = tempfile::tempfile().unwrap();
        file.set_len(16 << 20).unwrap();
        file.write_all_at(b"saved", 0x5000).unwrap();
        let config = MachineConfig { mem_size_mib: 16, ..MachineConfig::default() };
        let (one, other) =
            (map(&config, Backing::File(&file)).unwrap(), map(&config, Backing::File(&file)).unwrap());
        let read = |memory: &Memory| memory.read_obj::<[u8; 5]>(vm_memory::GuestAddress(0x5000)).unwrap();
        one.write_obj(*b"mine!", vm_memory::GuestAddress(0x5000)).unwrap();
        assert_eq!((&read(&one), &read(&other)), (b"mine!", b"saved"));
        let mut kept = [0; 5];
        file.read_exact_at(&mut kept, 0x5000).unwrap();
        assert_eq!(&kept, b"saved");
    }

    #[test]
    fn dirty_tracking_is_on_only_when_asked_for() {
        for track in [false, true] {
            let config = MachineConfig { track_dirty_pages: track, ..MachineConfig::default() };
            let memory = map(&config, Backing::Empty).unwrap();
            assert_eq!(memory.iter().all(|r| (**r).bitmap().is_on()), track);
        }
    }
}
