//! Virtio devices (VIRTIO 1.2): the trait they implement and the parts they share.
//!
//! ```text
//!   mmio.rs ─┐                                ┌─ block/  net/  vsock/  rng.rs  console.rs
//!            ├─► core.rs ──► dyn VirtioDevice ┤      (control half, queue half)
//!   pci.rs ──┘   status machine, features,    └─ queue.rs: the ring they all read
//!                queue set-up, save, restore
//! ```
//!
//! The transports differ only in where a register is found. What a register *does* is in
//! [`core`], once, so the status state machine of the two faces cannot drift apart.
//!
//! Life of a device:
//!
//! ```text
//!            DRIVER_OK                 reset, pause, unplug, save
//!   stopped ───────────► started ───────────────────────────────► stopped
//!            start(Active)               stop() -> Vec<Queue>
//! ```

pub mod balloon;
pub mod block;
pub mod console;
pub mod core;
#[doc(hidden)]
pub mod driver;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod pci;
pub mod pmem;
pub mod queue;
pub mod rng;
pub mod severed;
pub mod vsock;

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::{
    Memory,
    limiter::LimiterConfig,
    state::{Section, StateError},
    trouble::Trouble,
    virtio::queue::Queue,
    worker::Worker,
};

/// `VIRTIO_F_INDIRECT_DESC` (VIRTIO 1.2 section 6): chains may live in a table of their own.
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`: either side says at which index it wants to be told.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`: the modern interface; the only one offered.
pub const F_VERSION_1: u64 = 1 << 32;
/// What every device here offers besides its own features.
pub const F_COMMON: u64 = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC;

/// What a device is, fixed for its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct About {
    /// Name of the kind, as used in saved sections and counters, for example `virtio-block`.
    pub kind: &'static str,
    /// Virtio device id (VIRTIO 1.2 section 5): 1 network, 2 block, 3 console, 4 entropy, 19 vsock.
    pub device_id: u32,
    /// PCI class code, subclass and programming interface, as `0xCCSSPP`.
    pub pci_class: u32,
    /// Features offered, [`F_COMMON`] included.
    pub features: u64,
    /// Largest size of each queue, a power of two from 1 to [`crate::limits::QUEUE_SIZE_MAX`].
    pub queues: Vec<u16>,
    /// Length of the device configuration space in bytes; reads beyond it are all ones.
    pub config_len: u32,
}

/// What a started device works with.
pub struct Active {
    /// Guest memory.
    pub memory: Memory,
    /// Features the driver accepted.
    pub features: u64,
    /// The queues the driver enabled, each with the descriptor that its doorbell writes.
    /// Queues left disabled are missing here; [`Queue::index`] says which one is which.
    pub queues: Vec<(Queue, EventFd)>,
    /// How to tell the driver.
    pub interrupt: Arc<dyn Interrupt>,
    /// The thread that the queue half is to run on, unless the device has its own.
    pub worker: Worker,
}

/// How a device tells its driver something. Implemented by the transports.
pub trait Interrupt: Send + Sync {
    /// Used buffers are waiting in queue `index` (VIRTIO 1.2 section 2.9, "used buffer
    /// notification"). Callers ask [`Queue::publish`] first whether the driver wants it.
    fn queue(&self, index: u16);
    /// The configuration space changed: bumps its generation and notifies the driver.
    fn config(&self);
    /// The device met something it cannot go on from: sets `DEVICE_NEEDS_RESET` and notifies
    /// (VIRTIO 1.2 section 2.1.2). The machine goes on; the driver may reset the device.
    fn needs_reset(&self);
    /// Something went wrong that the machine's owner may want to know. Nothing is told to the
    /// driver by it.
    fn trouble(&self, _trouble: Trouble) {}
}

/// Why a device could not do what its transport or its owner asked.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A descriptor, thread or ring could not be made, or a worker did not let go in time.
    #[error("{what}")]
    Host {
        /// What was being done.
        what: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The driver's queues or features cannot be served.
    #[error("The driver set the device up wrongly: {0}")]
    Driver(String),
    /// A live change that this device does not know or cannot make.
    #[error("{0}")]
    Change(String),
    /// The saved state was refused.
    #[error(transparent)]
    State(#[from] StateError),
}

/// A change to a running device, as its owner asks for it. The device decides what of it can
/// be done live and refuses the rest by name.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// Look at the backing file again: it grew, shrank, or was replaced by this path.
    Backing(Option<std::path::PathBuf>),
    /// New limits for a device that has one limiter.
    Limits(LimiterConfig),
    /// New limits for a device that has one for each direction, seen from the guest.
    DirectionLimits {
        /// Towards the guest.
        rx: LimiterConfig,
        /// From the guest.
        tx: LimiterConfig,
    },
    /// The balloon's new size, in MiB.
    BalloonTarget(u32),
    /// Seconds between two askings for the balloon's statistics; 0 stops them.
    BalloonStatistics(u16),
    /// A run of free page hinting begins; with the flag, the guest may use what it hinted
    /// again as soon as the run is over.
    HintingStart {
        /// Acknowledge the guest's stop at once.
        acknowledge_on_stop: bool,
    },
    /// The run of free page hinting ends.
    HintingStop,
    /// Bytes of pluggable memory that the guest should have.
    MemoryRequested(u64),
}

/// What a device says of itself beyond counters; most say nothing.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Report {
    /// Nothing.
    #[default]
    Nothing,
    /// A balloon.
    Balloon(balloon::BalloonReport),
    /// Pluggable memory.
    Memory(mem::MemoryReport),
}

/// The register half of a virtio device: what a transport needs of it.
///
/// All calls come with the transport's lock held, from vCPU threads or the machine's owner;
/// none may block for longer than [`crate::limits::DRAIN_DEADLINE`].
pub trait VirtioDevice: Send {
    /// What the device is. The answer never changes.
    fn about(&self) -> &About;

    /// Fills `data` from the configuration space. `offset + data.len()` lies inside it.
    fn read_config(&self, offset: u32, data: &mut [u8]);

    /// Writes to the configuration space; most devices have nothing to write there.
    /// `offset + data.len()` lies inside it.
    fn write_config(&mut self, _offset: u32, _data: &[u8]) {}

    /// Takes the queues and begins to serve them. Called with valid rings only, after
    /// `DRIVER_OK` or when a paused or restored machine goes on; each doorbell descriptor
    /// has been written once, so that what came meanwhile is seen.
    fn start(&mut self, active: Active) -> Result<(), DeviceError>;

    /// Finishes or gives up what is in flight and returns the queues, in any order. After it
    /// returns, guest memory is not touched. Empty when not started. Requests that were
    /// taken but not answered are put back ([`Queue::undo_pop`]) or kept in the device's own
    /// state, so that none is lost and none is done twice.
    fn stop(&mut self) -> Result<Vec<Queue>, DeviceError>;

    /// Back to the state before any driver was seen. Called stopped.
    fn reset(&mut self) {}

    /// The device's own bits; features, queues and status are saved by the transport.
    /// Called stopped.
    fn save(&self) -> Section;

    /// Takes over saved bits. Called stopped, before the first start.
    fn restore(&mut self, section: &Section) -> Result<(), DeviceError>;

    /// Makes a live change; refuses by name what cannot be done.
    fn update(&mut self, change: &Change) -> Result<(), DeviceError> {
        Err(DeviceError::Change(format!("A {} cannot be changed by {change:?}", self.about().kind)))
    }

    /// Counters for metrics, by name.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    /// What else there is to say.
    fn report(&self) -> Report {
        Report::Nothing
    }
}

/// As [`read_config_bytes`], for devices whose configuration is a row of 64-bit numbers.
pub fn read_config_words(words: &[u64], offset: u32, data: &mut [u8]) {
    let bytes = words.iter().flat_map(|word| word.to_le_bytes()).chain(std::iter::repeat(0));
    let from = usize::try_from(offset).unwrap_or(usize::MAX).min(8 * words.len());
    data.iter_mut().zip(bytes.skip(from)).for_each(|(to, byte)| *to = byte);
}

/// Fills `data` from `config` at `offset`, for devices whose configuration is plain bytes;
/// what lies outside reads as zero.
pub fn read_config_bytes(config: &[u8], offset: u32, data: &mut [u8]) {
    for (i, byte) in data.iter_mut().enumerate() {
        *byte = usize::try_from(offset).ok().and_then(|o| config.get(o + i)).copied().unwrap_or(0);
    }
}
