//! A driver in software: the guest's side of virtio, for tests, benchmarks and fuzzing.
//!
//! A device cannot be tested without somebody who fills its rings, and hostile rings cannot
//! be made by a well-behaved kernel. So this module plays the guest: it makes guest memory,
//! lays out rings in it, adds chains (good ones and arbitrary nonsense), rings doorbells and
//! reads what came back.
//!
//! ```text
//!   Driver ── start/stop ─────────────────────────────► dyn VirtioDevice   (device alone)
//!     │ rings: Vec<Ring>                                       ▲
//!     └── Face (registers of MMIO or PCI) ──► transport ───────┘           (whole road)
//!
//!   Signals   an Interrupt that counts and can be waited for
//!   Bench     a Host whose doorbells and lines are plain event descriptors
//! ```
//!
//! It is compiled into the library because integration tests, benches and fuzz targets are
//! crates of their own, but it is no part of the monitor and panics freely: whatever goes
//! wrong here is a broken test.

mod bench;
mod face;
mod ring;

use std::{
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestRegionMmap, mmap::MmapRegionBuilder};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use self::{
    bench::Bench,
    face::{Face, MmioFace, PciFace},
    ring::{Buffer, Desc, Ring, Used},
};
use crate::{
    Memory,
    virtio::{
        Active, DeviceError, Interrupt, VirtioDevice,
        queue::{Queue, QueueSetup},
    },
    worker::Worker,
    written::Written,
};

/// How long a test waits for something that must happen.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Guest memory with a region for each `(address, bytes)`, in ascending order, zeroed and
/// private to this process; without dirty tracking.
///
/// # Panics
/// When the ranges overlap or cannot be mapped.
pub fn memory(ranges: &[(u64, usize)]) -> Memory {
    build(ranges, false)
}

/// Like [`memory`], with a bitmap of the pages that devices wrote.
///
/// # Panics
/// When the ranges overlap or cannot be mapped.
pub fn tracked_memory(ranges: &[(u64, usize)]) -> Memory {
    build(ranges, true)
}

fn build(ranges: &[(u64, usize)], tracked: bool) -> Memory {
    let regions = ranges.iter().map(|(base, len)| {
        let mapping = MmapRegionBuilder::new_with_bitmap(*len, Written::new(*len, tracked))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_PRIVATE)
            .build()
            .expect("anonymous memory");
        GuestRegionMmap::new(mapping, GuestAddress(*base)).expect("range inside the address space")
    });
    Memory::from_regions(regions.collect()).expect("ranges in ascending order")
}

/// Counts of what a device signalled.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Counts {
    /// Used buffer notifications by queue index.
    pub queues: Vec<u64>,
    /// Configuration changes.
    pub config: u64,
    /// Requests for a reset.
    pub needs_reset: u64,
}

impl Counts {
    /// Notifications for queue `index` so far.
    pub fn queue(&self, index: u16) -> u64 {
        self.queues.get(usize::from(index)).copied().unwrap_or(0)
    }
}

/// An [`Interrupt`] that counts and wakes whoever waits.
#[derive(Debug, Default)]
pub struct Signals {
    counts: Mutex<Counts>,
    changed: Condvar,
}

impl Signals {
    /// Nothing signalled yet.
    pub fn new() -> Arc<Signals> {
        Arc::default()
    }

    /// What came so far.
    pub fn counts(&self) -> Counts {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until `enough` holds, for [`PATIENCE`] at most; says whether it came to hold.
    pub fn wait(&self, enough: impl Fn(&Counts) -> bool) -> bool {
        self.wait_for(PATIENCE, enough)
    }

    /// Waits until `enough` holds, for `limit` at most; says whether it came to hold.
    pub fn wait_for(&self, limit: Duration, enough: impl Fn(&Counts) -> bool) -> bool {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let (counts, _) = self
            .changed
            .wait_timeout_while(counts, limit, |counts| !enough(counts))
            .unwrap_or_else(PoisonError::into_inner);
        enough(&counts)
    }

    fn change(&self, f: impl FnOnce(&mut Counts)) {
        f(&mut self.counts.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }
}

impl Interrupt for Signals {
    fn queue(&self, index: u16) {
        self.change(|counts| {
            let index = usize::from(index);
            if counts.queues.len() <= index {
                counts.queues.resize(index + 1, 0);
            }
            counts.queues[index] += 1;
        });
    }
    fn config(&self) {
        self.change(|counts| counts.config += 1);
    }
    fn needs_reset(&self) {
        self.change(|counts| counts.needs_reset += 1);
    }
}

/// A guest with one device: its memory, its rings, and its ear for interrupts.
pub struct Driver {
    /// Guest memory.
    pub memory: Memory,
    /// The rings, by queue index.
    pub rings: Vec<Ring>,
    /// What the device signals when it was started by [`Driver::start`].
    pub signals: Arc<Signals>,
    /// The worker given to the device.
    pub worker: Worker,
    kicks: Vec<EventFd>,
    /// Next free byte of memory and the end of the region it lies in.
    free: (u64, u64),
}

impl Driver {
    /// A driver with one ring of each size in `sizes`, laid out from the start of the first
    /// region of `memory`; buffers are handed out behind them by [`Driver::alloc`].
    ///
    /// # Panics
    /// When the rings do not fit.
    pub fn new(memory: Memory, sizes: &[u16]) -> Driver {
        use vm_memory::GuestMemoryRegion;
        let region = memory.iter().next().expect("a region");
        let free = (region.start_addr().0, region.start_addr().0 + region.len());
        let signals = Signals::new();
        let worker = Worker::new("driver-test");
        let mut driver = Driver { memory, rings: Vec::new(), signals, worker, kicks: Vec::new(), free };
        for size in sizes {
            let entries = u64::from(*size);
            let desc = driver.alloc(16 * entries, 16);
            let avail = driver.alloc(6 + 2 * entries, 2);
            let used = driver.alloc(6 + 8 * entries, 4);
            driver.rings.push(Ring::new(driver.memory.clone(), *size, desc, avail, used));
        }
        driver
    }

    /// A driver for `device`, with 16 MiB of memory at address 0 and rings of the sizes the
    /// device offers.
    pub fn for_device(device: &dyn VirtioDevice) -> Driver {
        Driver::new(memory(&[(0, 16 << 20)]), &device.about().queues)
    }

    /// Takes `len` bytes of guest memory, never given back.
    ///
    /// # Panics
    /// When the first region is full.
    pub fn alloc(&mut self, len: u64, align: u64) -> u64 {
        let at = self.free.0.next_multiple_of(align.max(1));
        assert!(at + len <= self.free.1, "guest memory of the test is full");
        self.free.0 = at + len;
        at
    }

    /// Takes a readable buffer filled with `data`.
    pub fn readable(&mut self, data: &[u8]) -> Buffer {
        let address = self.alloc(data.len() as u64, 8);
        self.poke(address, data);
        Buffer::readable(address, data.len() as u32)
    }

    /// Takes a writable buffer of `len` bytes.
    pub fn writable(&mut self, len: u32) -> Buffer {
        Buffer::writable(self.alloc(u64::from(len), 8), len)
    }

    /// Writes guest memory.
    ///
    /// # Panics
    /// When the range is not RAM.
    pub fn poke(&self, address: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(address)).expect("address in RAM");
    }

    /// Reads guest memory.
    ///
    /// # Panics
    /// When the range is not RAM.
    pub fn peek(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(address)).expect("address in RAM");
        data
    }

    /// Starts `device` on all rings as a transport would, with the driver having accepted
    /// `features`. Goes on where the last [`Driver::stop`] ended.
    pub fn start(&mut self, device: &mut dyn VirtioDevice, features: u64) -> Result<(), DeviceError> {
        let mut queues = Vec::new();
        self.kicks.clear();
        for (i, ring) in self.rings.iter_mut().enumerate() {
            ring.accept(features);
            let max = device.about().queues[i];
            let queue = Queue::new(i as u16, ring.setup(), max, features, &self.memory)
                .map_err(|e| DeviceError::Driver(e.to_string()))?;
            let kick = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).expect("event descriptor");
            kick.write(1).expect("event descriptor");
            self.kicks.push(kick.try_clone().expect("event descriptor"));
            queues.push((queue, kick));
        }
        device.start(Active {
            memory: self.memory.clone(),
            features,
            queues,
            interrupt: self.signals.clone(),
            worker: self.worker.clone(),
        })
    }

    /// Stops `device` and keeps how far its queues came; returns the positions by index.
    pub fn stop(&mut self, device: &mut dyn VirtioDevice) -> Result<Vec<(u16, QueueSetup)>, DeviceError> {
        let queues = device.stop()?;
        for queue in &queues {
            self.rings[usize::from(queue.index())].set_position(queue.setup());
        }
        Ok(queues.iter().map(|q| (q.index(), q.setup())).collect())
    }

    /// Rings the doorbell of queue `index`, wanted or not.
    pub fn kick(&self, index: u16) {
        self.kicks[usize::from(index)].write(1).expect("event descriptor");
    }

    /// Adds one chain to queue `index`, makes it available and rings the doorbell when the
    /// device wants that; returns its head.
    pub fn send(&mut self, index: u16, buffers: &[Buffer]) -> u16 {
        let ring = &mut self.rings[usize::from(index)];
        let head = ring.add(buffers);
        if ring.wants_kick() {
            self.kick(index);
        }
        head
    }

    /// Takes the next used entry of queue `index`, waiting for it with [`PATIENCE`].
    pub fn wait_used(&mut self, index: u16) -> Option<Used> {
        let signals = self.signals.clone();
        let end = Instant::now() + PATIENCE;
        loop {
            let seen = signals.counts();
            if let Some(used) = self.rings[usize::from(index)].take_used() {
                return Some(used);
            }
            let left = end.saturating_duration_since(Instant::now());
            if !signals.wait_for(left, |now| *now != seen) {
                return self.rings[usize::from(index)].take_used();
            }
        }
    }

    /// Sends one chain and waits for its answer: the bytes written, or `None` when the device
    /// does not answer.
    pub fn request(&mut self, index: u16, buffers: &[Buffer]) -> Option<u32> {
        let head = self.send(index, buffers);
        let used = self.wait_used(index)?;
        assert_eq!(used.head, u32::from(head), "the answer is for another chain");
        Some(used.len)
    }
}
