//! Memory besides the RAM that a machine boots with: files mapped as persistent memory, and a
//! region that memory can be plugged into.
//!
//! ```text
//!   RAM | hole to 2 GiB | pluggable region: slots come and go | pmem, pmem, ... | 64-bit window
//! ```
//!
//! Both lie behind all RAM and in no firmware table: their virtio devices tell the guest where.
//! The pluggable region is part of [`Memory`], because disks and cards read and write there; its
//! KVM slots exist only while something in them is plugged. Persistent memory is a KVM slot of its
//! own and no part of [`Memory`]. What comes while the machine runs lies behind all that it started
//! with, in the first gap that is long enough.

use std::{io, ops::Range, sync::Arc};

use api::spec::{self, HugePages, Spec};
use arch::layout;
use devices::{
    Memory,
    state::{Section, StateError},
    virtio::{
        VirtioDevice,
        mem::{self, Mem, MemConfig, Plugged, Region, Slot, Slots},
        pmem::{self, Backing, Pmem, PmemConfig},
    },
};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::{
    attach::Places,
    build::{BuildError, limiter, named},
    host::KvmHost,
    memory::MemoryError,
    saved::SavedError,
    torn,
};

const MIB: u64 = 1 << 20;

const KIND: &str = "annex";

/// The addresses of files, as they are saved.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    starts: Vec<(String, u64)>,
    end: u64,
}

impl Saved {
    /// Where the file of `id` was. Not among the RAM, whatever is claimed; that no two files lie on
    /// each other KVM sees to.
    fn start_of(&self, id: &str, ram_end: u64) -> Result<u64, SavedError> {
        let found = self.starts.iter().find(|(known, _)| known == id);
        let (_, start) = found
            .ok_or_else(|| SavedError::Missing { kind: "virtio-pmem".to_owned(), name: id.to_owned() })?;
        if *start >= ram_end && start.is_multiple_of(pmem::ALIGNMENT) {
            return Ok(*start);
        }
        let reason = format!("pmem {id:?} is at {start:#x}, memory ends at {ram_end:#x}");
        Err(StateError::Impossible { kind: KIND, reason }.into())
    }
}

/// A file in the guest's memory.
struct Mapped {
    id: String,
    backing: Arc<Backing>,
    start: u64,
    /// Its slot in KVM.
    slot: u32,
}

impl Mapped {
    /// Makes KVM's slot, or takes it away with a length of 0.
    fn set(&self, vm: &VmFd, len: u64) -> Result<(), MemoryError> {
        let region = kvm_userspace_memory_region {
            slot: self.slot,
            guest_phys_addr: self.start,
            memory_size: len,
            userspace_addr: self.backing.host_address() as u64,
            flags: if self.backing.read_only() { KVM_MEM_READONLY } else { 0 },
        };
        // SAFETY: the mapping is this long and lives as long as the backing, which is kept here
        // until the slot is taken away or the process ends; no two files share an address.
        unsafe { vm.set_user_memory_region(region) }.map_err(|source| MemoryError::Slot {
            mib: self.backing.len() / MIB,
            base: self.start,
            source,
        })
    }

    fn device(&self, pmem: &spec::Pmem) -> Result<Box<dyn VirtioDevice>, BuildError> {
        let config = PmemConfig {
            id: pmem.id.clone(),
            path: pmem.path_on_host.clone(),
            read_only: pmem.read_only,
            limiter: limiter(pmem.rate_limiter.as_ref()),
        };
        let device = Pmem::new(&config, Arc::clone(&self.backing), self.start);
        Ok(Box::new(device.map_err(named(format!("Pmem {:?}", pmem.id)))?))
    }
}

fn open(pmem: &spec::Pmem) -> Result<Arc<Backing>, BuildError> {
    let opened = Backing::open(&pmem.path_on_host, pmem.read_only);
    Ok(Arc::new(opened.map_err(named(format!("Pmem {:?}", pmem.id)))?))
}

/// What a machine has besides its RAM.
pub struct Annex {
    files: Vec<Mapped>,
    pluggable: Option<(MemConfig, Arc<Region>)>,
    plugged: Option<Plugged>,
    /// The first address behind all that the machine starts with.
    end: u64,
    /// Width of the guest's physical addresses; known when its processors are.
    pub(super) physical_bits: u8,
    /// The first of KVM's slots for the pluggable region.
    pluggable_slot: u32,
    /// The first of KVM's slots behind all that the machine starts with.
    end_slot: u32,
}

impl Annex {
    /// Opens the files and takes addresses, those of a machine that was `saved` again. Nothing is
    /// given to KVM yet.
    pub fn open(spec: &Spec, saved: Option<&Section>) -> Result<Annex, BuildError> {
        let saved = saved.map(|section| section.open::<Saved>(KIND, 1)).transpose();
        let saved = saved.map_err(SavedError::from)?;
        let full = || BuildError::Memory(MemoryError::Regions);
        let mut next = layout::ram_end(spec.machine_config.mem_size_mib * MIB).ok_or_else(full)?;
        let mut pluggable = None;
        if let Some(memory) = &spec.memory_hotplug {
            let what = "Pluggable memory".to_owned();
            let bytes = |mib: u32| u64::from(mib) * MIB;
            let (total, block_size, slot_size) =
                (bytes(memory.total_size_mib), bytes(memory.block_size_mib), bytes(memory.slot_size_mib));
            let start = next.next_multiple_of(mem::START_ALIGNMENT.max(block_size));
            let config = MemConfig { start, total, block_size, slot_size };
            config.check().map_err(named(what.clone()))?;
            let pages = match spec.machine_config.huge_pages {
                HugePages::None => mem::Pages::Small,
                HugePages::Transparent => mem::Pages::Transparent,
                HugePages::Huge2M => mem::Pages::Huge2M,
            };
            pluggable =
                Some((config, Arc::new(Region::reserve(total, slot_size, pages).map_err(named(what))?)));
            next = start.checked_add(total).ok_or_else(full)?;
        }
        let mut files = Vec::new();
        let ram_end = next;
        for pmem in &spec.pmem {
            let backing = open(pmem)?;
            let start = match &saved {
                None => next.next_multiple_of(pmem::ALIGNMENT),
                Some(saved) => saved.start_of(&pmem.id, ram_end)?,
            };
            let end = start.checked_add(backing.len()).ok_or_else(full)?;
            next = next.max(end);
            files.push(Mapped { id: pmem.id.clone(), backing, start, slot: 0 });
        }
        if let Some(saved) = &saved {
            next = next.max(saved.end);
        }
        Ok(Annex {
            files,
            pluggable,
            plugged: None,
            end: next,
            physical_bits: 0,
            pluggable_slot: 0,
            end_slot: 0,
        })
    }

    /// `memory` with the pluggable region at its end.
    pub fn joined_to(&self, memory: Memory, tracked: bool) -> Result<Memory, MemoryError> {
        let Some((config, region)) = &self.pluggable else { return Ok(memory) };
        let region = region.guest_memory(config.start, tracked).ok_or(MemoryError::Regions)?;
        memory.insert_region(Arc::new(region)).map_err(|_| MemoryError::Regions)
    }

    /// Gives the files to KVM, as slots from number `first` on. Pluggable memory and what comes
    /// later take the numbers behind.
    pub fn register(&mut self, vm: &VmFd, first: u32) -> Result<(), MemoryError> {
        self.pluggable_slot = first;
        for file in &mut self.files {
            file.slot = self.pluggable_slot;
            file.set(vm, file.backing.len())?;
            self.pluggable_slot += 1;
        }
        let slots = self.pluggable.as_ref().map_or(0, |(config, _)| config.total / config.slot_size);
        let slots = u32::try_from(slots).map_err(|_| MemoryError::Regions)?;
        self.end_slot = self.pluggable_slot.checked_add(slots).ok_or(MemoryError::Regions)?;
        Ok(())
    }

    /// Puts the devices into `places`.
    pub fn attach(
        &mut self,
        spec: &Spec,
        host: &Arc<KvmHost>,
        places: &mut Places,
    ) -> Result<(), BuildError> {
        for (pmem, file) in spec.pmem.iter().zip(&self.files) {
            places.attach(&pmem.id, file.device(pmem)?)?;
        }
        let flags = if spec.machine_config.track_dirty_pages { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        if let Some((config, region)) = &self.pluggable {
            let slots = Arc::new(KvmSlots { host: Arc::clone(host), first: self.pluggable_slot, flags });
            let device = Mem::new(*config, Arc::clone(region), slots);
            let device = device.map_err(named("Pluggable memory".to_owned()))?;
            self.plugged = Some(device.plugged());
            places.attach("memory", Box::new(device))?;
        }
        Ok(())
    }
}

impl Annex {
    /// Which pluggable memory is plugged, if any can be.
    pub fn plugged(&self) -> Option<&Plugged> {
        self.plugged.as_ref()
    }

    /// A file that is shorter than it was, in words.
    pub fn cut_short(&self) -> Option<String> {
        let lost = self.files.iter().map(|file| &file.backing).find(|backing| backing.has_shrunk())?;
        let found = std::fs::metadata(lost.path()).map_or(0, |m| m.len());
        Some(torn::cut_short(&lost.path().display().to_string(), found, lost.file_len()))
    }

    /// Where the files are.
    pub fn save(&self) -> Section {
        let starts = self.files.iter().map(|file| (file.id.clone(), file.start)).collect();
        Section::new(KIND, 1, &Saved { starts, end: self.end })
    }

    /// Maps one more file, and gives it to KVM, for a machine that was built. The caller finds
    /// the device a place, or takes the file back by [`Annex::remove`].
    pub fn add(&mut self, vm: &VmFd, pmem: &spec::Pmem) -> Result<Box<dyn VirtioDevice>, BuildError> {
        let backing = open(pmem)?;
        let len = backing.len();
        let start = layout::mmio_window_64(self.end, self.physical_bits)
            .and_then(|room| {
                first_gap(room, self.files.iter().map(|f| f.start..f.start + f.backing.len()), len)
            })
            .ok_or(MemoryError::Full { mib: len / MIB })?;
        let taken = |slot: &u32| self.files.iter().any(|file| file.slot == *slot);
        let slot = (self.end_slot..).find(|slot| !taken(slot)).ok_or(MemoryError::Regions)?;
        let file = Mapped { id: pmem.id.clone(), backing, start, slot };
        let device = file.device(pmem)?;
        file.set(vm, len)?;
        self.files.push(file);
        Ok(device)
    }

    /// Takes the file of `id`, if there is one, from KVM.
    pub fn remove(&mut self, vm: &VmFd, id: &str) -> Result<(), MemoryError> {
        let Some(at) = self.files.iter().position(|file| file.id == id) else { return Ok(()) };
        self.files[at].set(vm, 0)?;
        self.files.remove(at);
        Ok(())
    }
}

/// The lowest address in `room` from which `len` bytes meet none of the `taken` ranges.
fn first_gap(room: Range<u64>, taken: impl Iterator<Item = Range<u64>>, len: u64) -> Option<u64> {
    let mut taken: Vec<_> = taken.collect();
    taken.sort_by_key(|range| range.start);
    let mut start = room.start;
    for range in taken {
        if start.checked_add(len)? <= range.start {
            break;
        }
        start = start.max(range.end);
    }
    (start.checked_add(len)? <= room.end).then_some(start)
}

/// KVM's memory slots for the pluggable region (KVM API section 4.35).
struct KvmSlots {
    host: Arc<KvmHost>,
    first: u32,
    flags: u32,
}

impl KvmSlots {
    fn set(&self, slot: &Slot, len: u64) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot: self.first + slot.index,
            guest_phys_addr: slot.guest_address,
            memory_size: len,
            userspace_addr: slot.host_address as u64,
            flags: self.flags,
        };
        // SAFETY: the slot is part of the region, which the device keeps mapped for its life;
        // length 0 takes the slot away.
        unsafe { self.host.vm().set_user_memory_region(region) }.map_err(io::Error::from)
    }
}

impl Slots for KvmSlots {
    fn plug(&self, slot: &Slot) -> io::Result<()> {
        self.set(slot, slot.len)
    }

    fn unplug(&self, slot: &Slot) -> io::Result<()> {
        self.set(slot, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_gap_that_is_long_enough_is_taken() {
        let gap = |taken: &[Range<u64>], len| first_gap(100..200, taken.iter().cloned(), len);
        assert_eq!(gap(&[], 100), Some(100));
        assert_eq!(gap(&[], 101), None);
        // Neither order nor what lies before the room matters.
        let taken = [150..160, 20..110, 120..140];
        assert_eq!((gap(&taken, 10), gap(&taken, 11), gap(&taken, 41)), (Some(110), Some(160), None));
        assert_eq!(gap(&taken, u64::MAX), None);
    }
}
