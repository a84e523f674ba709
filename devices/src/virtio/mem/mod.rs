//! Pluggable memory (VIRTIO 1.2 section 5.15): a guest grows and shrinks while it runs.
//!
//! ```text
//!   Mem (register half)          Server (queue half, on a worker of its own)
//!   ───────────────────          ───────────────────────────────────────────
//!   requested size ── interrupt ─► the driver ─► PLUG, UNPLUG, UNPLUG ALL, STATE
//!   config space, report                              │ request.rs
//!   save, restore                                     ▼
//!        └──────────────── Pool ◄── blocks.rs: what is plugged, what may be
//!                           │
//!              region.rs: host memory      Slots: the hypervisor's memory slots
//! ```
//!
//! The owner says how much the guest should have; the guest's driver chooses the blocks, asks
//! for them, and says how far it came. The region is divided twice: into *blocks*, which the
//! driver plugs, and into *slots* of many blocks, which the hypervisor knows or does not. A
//! slot without a plugged block is out of the guest's reach altogether, see `region.rs`.
//!
//! **What a guest can get.** Blocks lie in the usable part, which is the largest requested
//! size since the last UNPLUG ALL, rounded up to whole slots; it can reach these slots when
//! each holds one block, and all their pages. So with slots as large as blocks a guest has what
//! was requested and not a page more; with the usual 128 MiB and 2 MiB a hostile one has at most
//! what was once requested, rounded up. Devices lend it one slot besides.
//!
//! **Drivers.** The device offers `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`, because it cannot let a
//! guest read unplugged memory. A driver that does not accept it (Linux before 5.16) may
//! start, and every PLUG it sends is answered NACK: such a guest has the memory it was started with.
//! Linux plugs in memory blocks of its own, 128 MiB, or up to 2 GiB when it has 64 GiB and
//! more, that must lie inside the usable part as a whole: then the requested size is best a
//! multiple of 2 GiB too, and the region begins on one ([`START_ALIGNMENT`]).
//!
//! Answers: ERROR for what makes no sense, whatever the state of the host; NACK for more than was
//! requested; BUSY where the host could not, and the driver tries again. A request is carried
//! out as a whole or not at all. A reset of the device changes no block (section 5.15.5.2).
//!
//! **Saved** are the sizes and a bit for each block. Who saves or loads guest memory asks
//! [`Plugged::runs`] which parts of the region are worth it; memory is loaded *after*
//! [`VirtioDevice::restore`], which gives open slots their memory, empty.

mod blocks;
mod pool;
mod region;
mod request;
mod server;
#[cfg(test)]
mod tests;

pub use region::{Pages, Region};

use std::{io, ops::Range, sync::Arc};

use serde::{Deserialize, Serialize};

use self::{
    blocks::{Blocks, Layout},
    pool::Pool,
    server::Server,
};
use crate::{
    limits::{MEM_BLOCKS_MAX, MEM_SLOTS_MAX},
    state::{Section, StateError},
    virtio::{
        About, Active, Change, DeviceError, F_COMMON, Report, VirtioDevice, queue::Queue, read_config_words,
    },
    worker::{HandlerId, Worker},
};

const KIND: &str = "virtio-mem";
const VERSION: u16 = 1;
const QUEUE_SIZE: u16 = 64;
const CONFIG_LEN: usize = 56;
/// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`: the driver leaves unplugged memory alone.
pub const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// The smallest block, in bytes: 2 MiB.
pub const BLOCK_SIZE_MIN: u64 = 2 << 20;
/// The smallest slot, in bytes: 128 MiB.
pub const SLOT_SIZE_MIN: u64 = 128 << 20;
/// What the region's first address is best a multiple of: the largest memory block of Linux.
pub const START_ALIGNMENT: u64 = 2 << 30;

/// Where pluggable memory lies in the guest and how it is divided, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemConfig {
    /// First guest address of the region: behind all RAM, a multiple of the block size.
    pub start: u64,
    /// All that can be plugged: a multiple of the slot size, at most
    /// [`MEM_SLOTS_MAX`] slots and [`MEM_BLOCKS_MAX`] blocks.
    pub total: u64,
    /// What is plugged at a time: a power of two, at least [`BLOCK_SIZE_MIN`].
    pub block_size: u64,
    /// What the hypervisor is given at a time: a multiple of the block size, at least
    /// [`SLOT_SIZE_MIN`].
    pub slot_size: u64,
}

/// Why pluggable memory cannot be set up so. Sizes are told in MiB.
#[derive(Debug, thiserror::Error)]
pub enum MemError {
    /// Less than [`BLOCK_SIZE_MIN`] or no power of two.
    #[error("The block size of pluggable memory is {0} MiB; it must be a power of two of at least 2 MiB")]
    BlockSize(u64),
    /// Less than [`SLOT_SIZE_MIN`] or no multiple of the block size.
    #[error(
        "The slot size of pluggable memory is {slot} MiB; it must be at least 128 MiB and a multiple \
         of the block size, {block} MiB"
    )]
    SlotSize {
        /// Slot size asked for.
        slot: u64,
        /// Block size.
        block: u64,
    },
    /// Nothing, or no multiple of the slot size.
    #[error("Pluggable memory of {total} MiB must be one or more times the slot size, {slot} MiB")]
    Total {
        /// Size asked for.
        total: u64,
        /// Slot size.
        slot: u64,
    },
    /// More slots or blocks than there may be.
    #[error(
        "Pluggable memory of {total} MiB has {slots} slots and {blocks} blocks; there may be \
         {MEM_SLOTS_MAX} and {MEM_BLOCKS_MAX}, so larger ones are needed"
    )]
    TooMany {
        /// Size asked for.
        total: u64,
        /// Slots that makes.
        slots: u64,
        /// Blocks that makes.
        blocks: u64,
    },
    /// Not on a block, or beyond the address space.
    #[error("Pluggable memory cannot begin at {0:#x}: that is no multiple of its block size, or too far up")]
    Start(u64),
    /// The host memory is not that of this configuration.
    #[error("Pluggable memory of {total} MiB was given {found} MiB of host addresses, or other slots")]
    Region {
        /// Size asked for.
        total: u64,
        /// Size of the host region.
        found: u64,
    },
}

impl MemConfig {
    /// Checks everything; [`Mem::new`] does too.
    pub fn check(&self) -> Result<(), MemError> {
        let MemConfig { start, total, block_size, slot_size } = *self;
        let mib = |bytes: u64| bytes >> 20;
        if block_size < BLOCK_SIZE_MIN || !block_size.is_power_of_two() {
            return Err(MemError::BlockSize(mib(block_size)));
        }
        if slot_size < SLOT_SIZE_MIN || !slot_size.is_multiple_of(block_size) {
            return Err(MemError::SlotSize { slot: mib(slot_size), block: mib(block_size) });
        }
        if total == 0 || !total.is_multiple_of(slot_size) {
            return Err(MemError::Total { total: mib(total), slot: mib(slot_size) });
        }
        let (slots, blocks) = (total / slot_size, total / block_size);
        if slots > MEM_SLOTS_MAX || blocks > MEM_BLOCKS_MAX {
            return Err(MemError::TooMany { total: mib(total), slots, blocks });
        }
        if !start.is_multiple_of(block_size) || start.checked_add(total).is_none() {
            return Err(MemError::Start(start));
        }
        Ok(())
    }

    fn layout(&self) -> Layout {
        Layout { start: self.start, total: self.total, block: self.block_size, slot: self.slot_size }
    }
}

/// A slot of pluggable memory, as the hypervisor is to know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Its number in the region, from 0.
    pub index: u32,
    /// Its first guest address.
    pub guest_address: u64,
    /// Where its memory is in this process.
    pub host_address: *mut u8,
    /// Its length in bytes.
    pub len: u64,
}

/// The hypervisor's memory slots, as pluggable memory needs them. Called from the device's
/// thread while the machine runs and from its owner's while it does not, never both at once.
pub trait Slots: Send + Sync {
    /// Lets the guest's processors reach the slot, which they did not.
    fn plug(&self, slot: &Slot) -> io::Result<()>;
    /// Takes the slot, which was plugged, out of their reach; when this returns, none can
    /// touch it any more.
    fn unplug(&self, slot: &Slot) -> io::Result<()>;
}

/// What pluggable memory says of itself, in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MemoryReport {
    /// First guest address of the region.
    pub start: u64,
    /// All that can be plugged.
    pub total: u64,
    /// What the guest should have.
    pub requested: u64,
    /// What it has.
    pub plugged: u64,
    /// What is plugged at a time.
    pub block_size: u64,
    /// What the hypervisor is given at a time.
    pub slot_size: u64,
}

/// Tells which parts of the region hold memory; a handle on the device for its owner.
#[derive(Clone)]
pub struct Plugged(Arc<Pool>);

impl Plugged {
    /// Guest addresses of the plugged blocks, neighbours as one, in ascending order. All else
    /// in the region has no content.
    pub fn runs(&self) -> Vec<Range<u64>> {
        self.0.blocks().runs()
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    start: u64,
    total: u64,
    block_size: u64,
    slot_size: u64,
    requested: u64,
    usable: u64,
    plugged: Vec<u8>,
    /// The driver has not been told of the requested size yet.
    announce: bool,
}

/// Pluggable memory.
pub struct Mem {
    about: About,
    config: MemConfig,
    pool: Arc<Pool>,
    running: Option<(Worker, HandlerId, Arc<dyn super::Interrupt>)>,
    /// The requested size changed while nobody could be told.
    announce: bool,
    /// It was logged that the driver is too old.
    warned: bool,
    /// The host once did not finish in time; the thread may still be at it.
    stuck: bool,
}

impl Mem {
    /// A device with everything unplugged and nothing requested. `region` is the host memory
    /// for it, with the same total and slot size, already a part of guest memory at
    /// `config.start` ([`Region::guest_memory`]).
    pub fn new(config: MemConfig, region: Arc<Region>, slots: Arc<dyn Slots>) -> Result<Mem, MemError> {
        config.check()?;
        if (region.len(), region.slot_size()) != (config.total, config.slot_size) {
            return Err(MemError::Region { total: config.total >> 20, found: region.len() >> 20 });
        }
        let about = About {
            kind: KIND,
            device_id: 24,
            // Nothing that PCI has a class for.
            pci_class: 0x00ff_0000,
            features: F_COMMON | F_UNPLUGGED_INACCESSIBLE,
            queues: vec![QUEUE_SIZE],
            config_len: CONFIG_LEN as u32,
        };
        let pool = Arc::new(Pool::new(config.layout(), region, slots));
        Ok(Mem { about, config, pool, running: None, announce: false, warned: false, stuck: false })
    }

    /// A handle that tells what is plugged, now and later.
    pub fn plugged(&self) -> Plugged {
        Plugged(Arc::clone(&self.pool))
    }

    /// The configuration space (VIRTIO 1.2 section 5.15.4).
    fn space(&self) -> [u64; CONFIG_LEN / 8] {
        let blocks = self.pool.blocks();
        [
            self.config.block_size,
            // The node, which is not told, and padding.
            0,
            self.config.start,
            self.config.total,
            blocks.usable(),
            blocks.plugged_size(),
            blocks.requested(),
        ]
    }
}

impl Drop for Mem {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

impl VirtioDevice for Mem {
    fn about(&self) -> &About {
        &self.about
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        read_config_words(&self.space(), offset, data);
    }

    fn start(&mut self, active: Active) -> Result<(), DeviceError> {
        if self.stuck {
            return Err(host(
                "started: an earlier request is still at work",
                io::ErrorKind::ResourceBusy.into(),
            ));
        }
        let Some(queue) = active.queues.into_iter().next() else { return Ok(()) };
        let promised = active.features & F_UNPLUGGED_INACCESSIBLE != 0;
        if !promised && !std::mem::replace(&mut self.warned, true) {
            log::warn!(
                "The guest's driver for pluggable memory is too old to be given any; Linux has a newer \
                 one since 5.16"
            );
        }
        let interrupt = active.interrupt;
        let server = Server::new(queue, Arc::clone(&interrupt), Arc::clone(&self.pool), promised);
        // Giving memory back takes long, and asking the hypervisor takes milliseconds.
        let worker = Worker::new(KIND);
        let id = worker.add(Box::new(server)).map_err(|source| host("started", source))?;
        if std::mem::take(&mut self.announce) {
            interrupt.config();
        }
        self.running = Some((worker, id, interrupt));
        Ok(())
    }

    fn stop(&mut self) -> Result<Vec<Queue>, DeviceError> {
        let Some((worker, id, _)) = self.running.take() else { return Ok(Vec::new()) };
        worker.remove(id).map_err(|source| {
            self.stuck = true;
            // Dropping the last handle would wait for a thread that does not come.
            std::mem::forget(worker);
            host("stopped", source)
        })
    }

    fn save(&self) -> Section {
        let blocks = self.pool.blocks();
        let MemConfig { start, total, block_size, slot_size } = self.config;
        let saved = Saved {
            start,
            total,
            block_size,
            slot_size,
            requested: blocks.requested(),
            usable: blocks.usable(),
            plugged: blocks.bits(),
            announce: self.announce,
        };
        Section::new(KIND, VERSION, &saved)
    }

    fn restore(&mut self, section: &Section) -> Result<(), DeviceError> {
        let saved: Saved = section.open(KIND, VERSION)?;
        let impossible = |reason| StateError::Impossible { kind: KIND, reason };
        let Saved { start, total, block_size, slot_size, .. } = saved;
        let config = MemConfig { start, total, block_size, slot_size };
        if config != self.config {
            let (was, is) = (config, self.config);
            return Err(impossible(format!("the region was {was:x?} and is {is:x?}")).into());
        }
        let layout = self.config.layout();
        let blocks = Blocks::from_saved(layout, saved.requested, saved.usable, &saved.plugged);
        self.pool.load(blocks.map_err(impossible)?).map_err(|source| host("restored", source))?;
        self.announce = saved.announce;
        Ok(())
    }

    fn update(&mut self, change: &Change) -> Result<(), DeviceError> {
        let Change::MemoryRequested(bytes) = change else {
            return Err(DeviceError::Change(format!("Pluggable memory cannot be changed by {change:?}")));
        };
        let asked = self.pool.blocks().request(*bytes);
        asked.map_err(|why| DeviceError::Change(format!("Memory cannot be requested: {why}")))?;
        match &self.running {
            Some((_, _, interrupt)) => interrupt.config(),
            None => self.announce = true,
        }
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.pool.counters.list()
    }

    fn report(&self) -> Report {
        let blocks = self.pool.blocks();
        let MemConfig { start, total, block_size, slot_size } = self.config;
        Report::Memory(MemoryReport {
            start,
            total,
            requested: blocks.requested(),
            plugged: blocks.plugged_size(),
            block_size,
            slot_size,
        })
    }
}

fn host(what: &str, source: io::Error) -> DeviceError {
    DeviceError::Host { what: format!("Pluggable memory cannot be {what}"), source }
}
