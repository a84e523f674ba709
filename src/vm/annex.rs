//! Memory besides the RAM that a machine boots with: files mapped as persistent memory, and a
//! region that memory can be plugged into.
//!
//! ```text
//!   RAM | hole to 2 GiB | pluggable region: slots come and go | pmem, pmem, ... | 64-bit window
//! ```
//!
//! Both lie behind all RAM and in no firmware table: their virtio devices tell the guest where.
//! The pluggable region is part of [`Memory`], because disks and cards read and write there; its
//! KVM slots exist only while something in them is plugged. Persistent memory is a KVM slot that
//! never changes and no part of [`Memory`].

use std::{io, sync::Arc};

use api::spec::{HugePages, Spec};
use arch::layout;
use devices::{
    Memory,
    virtio::{
        mem::{self, Mem, MemConfig, Region, Slot, Slots},
        pmem::{self, Backing, Pmem, PmemConfig},
    },
};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

use super::{
    attach::Places,
    build::{BuildError, limiter, named},
    host::KvmHost,
    memory::MemoryError,
};

const MIB: u64 = 1 << 20;

/// What a machine has besides its RAM.
#[derive(Default)]
pub struct Annex {
    files: Vec<(Arc<Backing>, u64)>,
    pluggable: Option<(MemConfig, Arc<Region>)>,
}

impl Annex {
    /// Opens the files and takes addresses. Nothing is given to KVM yet.
    pub fn open(spec: &Spec) -> Result<Annex, BuildError> {
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
        for pmem in &spec.pmem {
            let opened = Backing::open(&pmem.path_on_host, pmem.read_only);
            let backing = opened.map_err(named(format!("Pmem {:?}", pmem.id)))?;
            let start = next.next_multiple_of(pmem::ALIGNMENT);
            next = start.checked_add(backing.len()).ok_or_else(full)?;
            files.push((Arc::new(backing), start));
        }
        Ok(Annex { files, pluggable })
    }

    /// `memory` with the pluggable region at its end.
    pub fn joined_to(&self, memory: Memory, tracked: bool) -> Result<Memory, MemoryError> {
        let Some((config, region)) = &self.pluggable else { return Ok(memory) };
        let region = region.guest_memory(config.start, tracked).ok_or(MemoryError::Regions)?;
        memory.insert_region(Arc::new(region)).map_err(|_| MemoryError::Regions)
    }

    /// Gives the files to KVM, as slots from number `first` on, and returns the next number.
    pub fn register(&self, vm: &VmFd, first: u32) -> Result<u32, MemoryError> {
        let mut slot = first;
        for (backing, start) in &self.files {
            let region = kvm_userspace_memory_region {
                slot,
                guest_phys_addr: *start,
                memory_size: backing.len(),
                userspace_addr: backing.host_address() as u64,
                flags: if backing.read_only() { KVM_MEM_READONLY } else { 0 },
            };
            // SAFETY: the mapping is this long and lives as long as the backing, which the
            // device and this machine keep until the process ends; addresses were taken one
            // behind the other.
            unsafe { vm.set_user_memory_region(region) }.map_err(|source| MemoryError::Slot {
                mib: backing.len() / MIB,
                base: *start,
                source,
            })?;
            slot += 1;
        }
        Ok(slot)
    }

    /// Puts the devices into `places`. Pluggable memory takes KVM's slots from number `first` on.
    pub fn attach(
        &self,
        spec: &Spec,
        host: &Arc<KvmHost>,
        first: u32,
        places: &mut Places,
    ) -> Result<(), BuildError> {
        for (pmem, (backing, start)) in spec.pmem.iter().zip(&self.files) {
            let config = PmemConfig {
                id: pmem.id.clone(),
                path: pmem.path_on_host.clone(),
                read_only: pmem.read_only,
                limiter: limiter(pmem.rate_limiter.as_ref()),
            };
            let device = Pmem::new(&config, Arc::clone(backing), *start);
            let device = device.map_err(named(format!("Pmem {:?}", pmem.id)))?;
            places.attach(&pmem.id, Box::new(device))?;
        }
        let flags = if spec.machine_config.track_dirty_pages { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        if let Some((config, region)) = &self.pluggable {
            let slots = Arc::new(KvmSlots { host: Arc::clone(host), first, flags });
            let device = Mem::new(*config, Arc::clone(region), slots);
            let device = device.map_err(named("Pluggable memory".to_owned()))?;
            places.attach("memory", Box::new(device))?;
        }
        Ok(())
    }
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
