//! Persistent memory (VIRTIO 1.2 section 5.19): a file of the host in the guest's memory.
//!
//! ```text
//!   backing.rs: the file, mapped ──► a memory slot of the hypervisor, behind all RAM
//!                     ▲                          ▲ loads and stores of the guest: no exits
//!                     │ fdatasync                │
//!   Pmem (register half) ── start ─► Server (queue half): FLUSH, and nothing else
//! ```
//!
//! The guest reads and writes the file's pages where they are, in the page cache of the host;
//! machines with the same read-only file share them. The device itself only says where the
//! memory lies and flushes it. The owner makes the [`Backing`], registers its memory with the
//! hypervisor at an address of its choice, and tells the device which.
//!
//! **Flushes** wait for the medium, so they have a thread of their own. All that wait in the
//! queue are answered by one call: each was made before the call began, so it covers each. That
//! call costs one operation and the whole file's length of the limiter, which is what the host
//! may have to write for it.
//!
//! The memory is not part of [`crate::Memory`]: a device that is given an address in it (direct
//! I/O of a guest that maps the file with DAX) refuses the request. In return a file that
//! shrinks cannot end the monitor; `backing.rs` says what happens then.

mod backing;
#[cfg(test)]
mod tests;

pub use backing::{ALIGNMENT, Backing, BackingError};

use std::{
    io,
    os::fd::AsRawFd,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use serde::{Deserialize, Serialize};
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

use crate::{
    limiter::{Gate, LimiterConfig, LimiterState, Throttle},
    limits::PMEM_QUEUE_SIZE,
    state::{Section, StateError},
    trouble::Trouble,
    virtio::{
        About, Active, Change, DeviceError, F_COMMON, Interrupt, VirtioDevice,
        queue::{Chain, Queue, QueueError},
        read_config_words,
    },
    worker::{Handler, HandlerId, Source, Watch, Worker},
};

const KIND: &str = "virtio-pmem";
const VERSION: u16 = 1;
const CONFIG_LEN: usize = 16;
/// The only request there is (VIRTIO 1.2 section 5.19.6).
const FLUSH: u32 = 0;
const KICK: u32 = 0;
const TIMER: u32 = 1;

/// How persistent memory is attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PmemConfig {
    /// Name of the device in messages.
    pub id: String,
    /// A regular file; its length is the memory's, rounded up to [`ALIGNMENT`] in the guest.
    pub path: PathBuf,
    /// Refuses writes, on the host's side.
    pub read_only: bool,
    /// Limits of flushing: each costs one operation and the file's length in bytes.
    pub limiter: LimiterConfig,
}

/// Why persistent memory cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum PmemError {
    /// The file.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// The guest address is not possible.
    #[error(
        "Persistent memory {id:?} of {len:#x} bytes cannot lie at {start:#x}: no multiple of 2 MiB, or too far up"
    )]
    Start {
        /// Name of the device.
        id: String,
        /// The address.
        start: u64,
        /// Bytes in the guest.
        len: u64,
    },
}

#[derive(Debug, Default)]
struct Counters {
    queue_event_count: AtomicU64,
    event_fails: AtomicU64,
    requests: AtomicU64,
    flushes: AtomicU64,
    flush_fails: AtomicU64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    start: u64,
    len: u64,
    read_only: bool,
    flush_failed: bool,
    limiter: LimiterState,
}

/// A persistent memory device.
pub struct Pmem {
    about: About,
    id: String,
    backing: Arc<Backing>,
    start: u64,
    throttle: Arc<Throttle>,
    counters: Arc<Counters>,
    running: Option<(Worker, HandlerId, EventFd)>,
    /// A flush once did not end in time; the thread may still wait for it.
    stuck: bool,
}

impl Pmem {
    /// A device for `backing`, whose memory the guest finds at `start`, a multiple of
    /// [`ALIGNMENT`]. The backing is the one made from the path and mode in `config`.
    pub fn new(config: &PmemConfig, backing: Arc<Backing>, start: u64) -> Result<Pmem, PmemError> {
        let len = backing.len();
        if !start.is_multiple_of(ALIGNMENT) || start.checked_add(len).is_none() {
            return Err(PmemError::Start { id: config.id.clone(), start, len });
        }
        let about = About {
            kind: KIND,
            device_id: 27,
            // Nothing that PCI has a class for.
            pci_class: 0x00ff_0000,
            features: F_COMMON,
            queues: vec![PMEM_QUEUE_SIZE],
            config_len: CONFIG_LEN as u32,
        };
        let throttle = Throttle::new(config.limiter);
        let counters = Arc::default();
        let id = config.id.clone();
        Ok(Pmem { about, id, backing, start, throttle, counters, running: None, stuck: false })
    }

    /// The file and its mapping.
    pub fn backing(&self) -> &Arc<Backing> {
        &self.backing
    }

    fn host(&self, what: &str, source: io::Error) -> DeviceError {
        DeviceError::Host { what: format!("Persistent memory {:?} cannot be {what}", self.id), source }
    }
}

impl Drop for Pmem {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

impl VirtioDevice for Pmem {
    fn about(&self) -> &About {
        &self.about
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        read_config_words(&[self.start, self.backing.len()], offset, data);
    }

    fn start(&mut self, active: Active) -> Result<(), DeviceError> {
        if self.stuck {
            return Err(
                self.host("started: an earlier flush still waits", io::ErrorKind::ResourceBusy.into())
            );
        }
        let Active { queues, interrupt, .. } = active;
        let Some((queue, kick)) = queues.into_iter().next() else { return Ok(()) };
        let bell = kick.try_clone().map_err(|source| self.host("started", source))?;
        let server = Server {
            queue,
            kick,
            waiting: Vec::new(),
            interrupt,
            gate: Gate::new(Arc::clone(&self.throttle), TIMER),
            backing: Arc::clone(&self.backing),
            counters: Arc::clone(&self.counters),
            logged: false,
        };
        let worker = Worker::new(&format!("pmem-{}", self.id));
        let id = worker.add(Box::new(server)).map_err(|source| self.host("started", source))?;
        self.running = Some((worker, id, bell));
        Ok(())
    }

    fn stop(&mut self) -> Result<Vec<Queue>, DeviceError> {
        let Some((worker, id, _)) = self.running.take() else { return Ok(Vec::new()) };
        worker.remove(id).map_err(|source| {
            self.stuck = true;
            // Dropping the last handle would wait for a thread that does not come.
            std::mem::forget(worker);
            self.host("stopped", source)
        })
    }

    fn reset(&mut self) {
        self.backing.forgive();
    }

    fn save(&self) -> Section {
        let saved = Saved {
            start: self.start,
            len: self.backing.len(),
            read_only: self.backing.read_only(),
            flush_failed: self.backing.flush_failed(),
            limiter: self.throttle.save(),
        };
        Section::new(KIND, VERSION, &saved)
    }

    fn restore(&mut self, section: &Section) -> Result<(), DeviceError> {
        let saved: Saved = section.open(KIND, VERSION)?;
        let id = &self.id;
        let impossible = |reason| DeviceError::from(StateError::Impossible { kind: KIND, reason });
        let (was, is) = ((saved.start, saved.len), (self.start, self.backing.len()));
        if was != is {
            let reason = format!("{id:?} had its address and length at {was:x?} and has them at {is:x?}");
            return Err(impossible(reason));
        }
        if saved.read_only != self.backing.read_only() {
            let name = |read_only| if read_only { "read-only" } else { "writable" };
            let (was, is) = (name(saved.read_only), name(self.backing.read_only()));
            return Err(impossible(format!("{id:?} was {was} and is attached {is}")));
        }
        self.throttle.restore(&saved.limiter).map_err(impossible)?;
        if saved.flush_failed {
            self.backing.set_flush_failed();
        }
        Ok(())
    }

    fn update(&mut self, change: &Change) -> Result<(), DeviceError> {
        let Change::Limits(limits) = change else {
            return Err(DeviceError::Change(format!("Persistent memory cannot be changed by {change:?}")));
        };
        self.throttle.change(*limits);
        if let Some((_, _, bell)) = &self.running {
            let _ = bell.write(1);
        }
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let counters = &*self.counters;
        let (throttled, woken) = self.throttle.counters();
        let of = |counter: &AtomicU64| counter.load(Relaxed);
        vec![
            ("queue_event_count", of(&counters.queue_event_count)),
            ("event_fails", of(&counters.event_fails)),
            ("requests", of(&counters.requests)),
            ("flushes", of(&counters.flushes)),
            ("flush_fails", of(&counters.flush_fails)),
            ("rate_limiter_throttled_events", throttled),
            ("rate_limiter_event_count", woken),
        ]
    }
}

/// A request that was taken from the queue.
#[derive(Default)]
struct Waiting {
    chain: Chain,
    /// Whether it asks for a flush at all.
    good: bool,
}

/// The queue half: owns the queue and lives on a worker of the device's own.
struct Server {
    queue: Queue,
    kick: EventFd,
    /// What the flush at hand will answer, at most as many as the queue is long, and chains of
    /// earlier ones to be used again.
    waiting: Vec<Waiting>,
    interrupt: Arc<dyn Interrupt>,
    gate: Gate,
    backing: Arc<Backing>,
    counters: Arc<Counters>,
    /// A failed flush was logged; a guest may cause as many as it likes.
    logged: bool,
}

impl Handler for Server {
    fn sources(&self) -> Vec<Source> {
        vec![Source::readable(&self.kick, KICK)]
    }

    fn ready(&mut self, token: u32, _events: EventSet, watch: &mut Watch<'_>) {
        if token == TIMER {
            self.gate.opened();
        } else {
            let _ = self.kick.read();
            self.counters.queue_event_count.fetch_add(1, Relaxed);
        }
        if self.gate.is_shut() {
            return;
        }
        let served = self.serve();
        if self.queue.publish() {
            self.interrupt.queue(self.queue.index());
        }
        match served {
            Ok(Turn::Idle) => {}
            Ok(turn) => {
                let asleep = matches!(turn, Turn::Shut) && self.gate.sleep(watch);
                if !asleep {
                    // Again at once, but a stop may come first.
                    let _ = self.kick.write(1);
                }
            }
            Err(error) => {
                log::warn!("The driver of persistent memory broke its queue: {error}");
                self.counters.event_fails.fetch_add(1, Relaxed);
                self.interrupt.needs_reset();
                let _ = watch.remove(self.kick.as_raw_fd());
                if let Some(timer) = self.gate.source() {
                    let _ = watch.remove(timer.fd);
                }
            }
        }
    }

    fn drain(self: Box<Self>) -> Vec<Queue> {
        vec![self.queue]
    }
}

enum Turn {
    /// Nothing waits; the doorbell will ring.
    Idle,
    /// More may wait.
    Over,
    /// What waits has to wait for the limiter.
    Shut,
}

impl Server {
    /// Answers all that waits with one flush.
    fn serve(&mut self) -> Result<Turn, QueueError> {
        self.queue.disarm();
        while self.queue.waiting()? == 0 {
            if !self.queue.arm() {
                return Ok(Turn::Idle);
            }
        }
        if !self.gate.pass(self.backing.file_len()) {
            return Ok(Turn::Shut);
        }
        let (count, whole) = self.take();
        let wanted = self.waiting.iter().take(count).any(|one| one.good);
        let flushed = wanted && self.flush();
        for one in self.waiting.iter().take(count) {
            let result: i32 = if one.good && flushed { 0 } else { -1 };
            let room = one.chain.writable_len() >= 4;
            let written = if room { one.chain.write(&self.queue, 0, &result.to_le_bytes()) } else { 0 };
            self.queue.push(one.chain.head(), written as u32);
        }
        whole.map(|()| Turn::Over)
    }

    /// Takes what is in the queue, at most as much as it holds: how many that is, and whether
    /// the queue broke behind them.
    fn take(&mut self) -> (usize, Result<(), QueueError>) {
        for count in 0..usize::from(self.queue.size()) {
            if self.waiting.len() == count {
                self.waiting.push(Waiting::default());
            }
            let Some(one) = self.waiting.get_mut(count) else { return (count, Ok(())) };
            match self.queue.pop(&mut one.chain) {
                Ok(true) => {}
                end => return (count, end.map(|_| ())),
            }
            let mut kind = [0; 4];
            let whole = one.chain.read(0, &mut kind) == kind.len() && one.chain.writable_len() >= 4;
            one.good = whole && u32::from_le_bytes(kind) == FLUSH;
            let counter = if one.good { &self.counters.requests } else { &self.counters.event_fails };
            counter.fetch_add(1, Relaxed);
        }
        (usize::from(self.queue.size()), Ok(()))
    }

    fn flush(&mut self) -> bool {
        self.counters.flushes.fetch_add(1, Relaxed);
        let Err(error) = self.backing.flush() else { return true };
        self.counters.flush_fails.fetch_add(1, Relaxed);
        self.interrupt.trouble(Trouble::io("flush", &error));
        if !std::mem::replace(&mut self.logged, true) {
            let path = self.backing.path().display();
            log::error!(
                "Persistent memory {path} cannot be flushed; later failures are only counted: {error}"
            );
        }
        false
    }
}
