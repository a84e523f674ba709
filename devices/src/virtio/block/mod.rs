//! virtio-block (VIRTIO 1.2 section 5.2): disks for the guest.
//!
//! ```text
//!   Block (register half)                    QueueHandler (queue half, one a queue)
//!   ─────────────────────                    ──────────────────────────────────────
//!   config space, features, save  ── start ─► pop ─► request.rs: what is asked, or why not
//!   stop, update, counters        ◄── stop ──   │
//!                                               ├─ now:   preadv/pwritev on this thread
//!                                               └─ later: io_uring; flight.rs keeps
//!                                                  the buffers until the kernel is done
//! ```
//!
//! **Where a request is carried out.** Figures of a 256 MiB image, 4 KiB random requests, 32
//! at a time, thousands a second on one core of a small cloud machine (Linux 6.18):
//!
//! | image               | `preadv` each | `RWF_NOWAIT` each | io_uring, batches of 32 |
//! |---------------------|---------------|-------------------|-------------------------|
//! | tmpfs, read         | 960           | refused           | 400 to 550              |
//! | tmpfs, write        | 730           | refused           | 300 to 600              |
//! | ext4, cached, read  | 1420          | 1410              | 1360 to 1450            |
//!
//! A ring saves the system call and spends as much on its own book-keeping, so for bytes that
//! are in memory it never wins; tmpfs does not do non-blocking calls at all, so there the
//! kernel hands each one to a helper thread. Hence, with [`Engine::Async`]:
//! - an image in memory (tmpfs) is served by plain calls: none of them can wait;
//! - a read is first tried with `RWF_NOWAIT`, at any depth; what is not cached goes to the
//!   ring, and after misses the attempt is left out for a while;
//! - writes, flushes and everything on an `O_DIRECT` disk go to the ring, in one batch.
//!
//! A polling driver on another core, 32 deep, was served this way with 760 thousand reads a
//! second from tmpfs (a program of its own with io_uring: 240 to 570) and 1150 thousand from
//! cached ext4 (1130 to 1390), with five doorbells in all: see `pace.rs`.
//!
//! [`Engine::Sync`] does everything by plain calls. Whatever may wait for a medium runs on a
//! worker thread of its own, so that a slow disk delays nobody else.
//!
//! **What a completed write means.** With [`Cache::Writeback`] it is in the host's page cache
//! and becomes durable with the next flush. A driver that does not know flush gets every
//! write made durable first (section 5.2.6.2). With [`Cache::Unsafe`] no flush is offered.
//! After a flush failed once, no flush succeeds until the driver resets the device or the
//! owner replaces the disk: the kernel reports lost data only once, the guest may ask twice.

//!
//! **Limits.** Bandwidth counts the data of reads and writes, operations count requests of
//! every kind, refused ones too. All queues of a disk share its limits.

mod config;
mod flight;
mod job;
mod pace;
mod request;
mod saved;
mod stats;
mod worker;

pub use request::{Refusal, Request, Terms, parse};

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
};

use vmm_sys_util::eventfd::EventFd;

use crate::{
    Memory,
    disk::{self, Disk, DiskError, DiskOptions},
    limiter::{LimiterConfig, Throttle},
    limits::{BLOCK_QUEUES_MAX, QUEUE_SIZE_MAX},
    state::{Section, StateError},
    virtio::{
        About, Active, Change, DeviceError, F_COMMON, Interrupt, VirtioDevice, queue::Queue,
        read_config_bytes,
    },
    worker::{HandlerId, Worker},
};
use saved::Saved;
use stats::Stats;
use worker::{QueueHandler, Shared};

const KIND: &str = "virtio-block";
const DEVICE_ID: u32 = 2;
/// Mass storage controller, of no further class.
const PCI_CLASS: u32 = 0x01_80_00;

/// What a completed write promises.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cache {
    /// No flush is offered: after a crash of the host anything may be lost. For scratch disks.
    #[default]
    Unsafe,
    /// The guest's flushes reach the medium.
    Writeback,
}

/// How requests are carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Engine {
    /// Plain calls on a thread of the disk's own.
    #[default]
    Sync,
    /// Plain calls where they cannot wait, io_uring for the rest. Becomes [`Engine::Sync`]
    /// where the host allows no ring.
    Async,
}

/// How a disk is attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockConfig {
    /// Raw image file or block device.
    pub path: PathBuf,
    /// Refuses writes, on the host's side.
    pub read_only: bool,
    /// What a completed write promises.
    pub cache: Cache,
    /// How requests are carried out.
    pub engine: Engine,
    /// Goes around the host's page cache (`O_DIRECT`).
    pub direct: bool,
    /// Name of the disk; the guest sees its first 20 bytes as the serial number.
    pub id: String,
    /// Request queues, 1 to [`BLOCK_QUEUES_MAX`].
    pub queues: u16,
    /// Descriptors of each queue, a power of two up to [`QUEUE_SIZE_MAX`].
    pub queue_size: u16,
    /// Lets the guest give space back to the host (discard, and write-zeroes that unmap).
    pub discard: bool,
    /// Limits of requests and of the bytes of data they move.
    pub limits: LimiterConfig,
}

impl BlockConfig {
    /// A writable disk called `id` at `path` with one queue of 256 and everything else off.
    pub fn new(id: &str, path: &Path) -> BlockConfig {
        BlockConfig {
            path: path.to_owned(),
            read_only: false,
            cache: Cache::default(),
            engine: Engine::default(),
            direct: false,
            id: id.to_owned(),
            queues: 1,
            queue_size: 256,
            discard: false,
            limits: LimiterConfig::default(),
        }
    }

    fn options(&self) -> DiskOptions {
        DiskOptions { read_only: self.read_only, direct: self.direct }
    }
}

/// Why a block device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The number of queues is out of range.
    #[error("Disk {id:?} asks for {queues} queues; 1 to {BLOCK_QUEUES_MAX} are possible")]
    Queues {
        /// Name of the disk.
        id: String,
        /// What was asked for.
        queues: u16,
    },
    /// The queue size is out of range.
    #[error("Disk {id:?} asks for queues of {size}; a power of two from 4 to {QUEUE_SIZE_MAX} is possible")]
    QueueSize {
        /// Name of the disk.
        id: String,
        /// What was asked for.
        size: u16,
    },
    /// The disk itself.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// The queue halves, while the driver runs.
struct Running {
    features: u64,
    interrupt: Arc<dyn Interrupt>,
    memory: Memory,
    /// The machine's worker, for handlers that never wait.
    worker: Worker,
    handlers: Vec<(Worker, HandlerId)>,
    bells: Vec<(u16, Arc<EventFd>)>,
}

/// A virtio block device.
pub struct Block {
    about: About,
    settings: BlockConfig,
    disk: Arc<Disk>,
    space: [u8; config::LEN],
    stats: Arc<Stats>,
    throttle: Arc<Throttle>,
    running: Option<Running>,
    /// The size the driver knows is not the disk's: tell it at the next start.
    announce: bool,
    /// The disk once did not let go of its requests in time; its threads may still use them.
    stuck: bool,
    /// Live changes, and those among them that failed.
    updates: [u64; 2],
}

impl Block {
    /// Opens, locks and measures the disk, and makes a device of it.
    pub fn new(settings: BlockConfig) -> Result<Block, BlockError> {
        let disk = Disk::open(&settings.path, settings.options())?;
        Block::over(disk, settings)
    }

    /// As [`Block::new`], with a disk somebody else opened; the path in `settings` is only
    /// its name in messages.
    pub fn with_file(settings: BlockConfig, file: File) -> Result<Block, BlockError> {
        let disk = Disk::from_file(file, &settings.path, settings.options())?;
        Block::over(disk, settings)
    }

    fn over(disk: Disk, settings: BlockConfig) -> Result<Block, BlockError> {
        let id = || settings.id.clone();
        if settings.queues == 0 || settings.queues > BLOCK_QUEUES_MAX {
            return Err(BlockError::Queues { id: id(), queues: settings.queues });
        }
        let size = settings.queue_size;
        if !size.is_power_of_two() || !(4..=QUEUE_SIZE_MAX).contains(&size) {
            return Err(BlockError::QueueSize { id: id(), size });
        }
        let about = About {
            kind: KIND,
            device_id: DEVICE_ID,
            pci_class: PCI_CLASS,
            features: F_COMMON | config::features(&settings),
            queues: vec![size; usize::from(settings.queues)],
            config_len: config::LEN as u32,
        };
        Ok(Block {
            about,
            space: config::space(&disk, &settings),
            disk: Arc::new(disk),
            throttle: Throttle::new(settings.limits),
            settings,
            stats: Arc::default(),
            running: None,
            announce: false,
            stuck: false,
            updates: [0; 2],
        })
    }

    /// How it is attached. The path follows a replaced disk, the limits their changes.
    pub fn settings(&self) -> &BlockConfig {
        &self.settings
    }

    /// Capacity in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.disk.sectors()
    }

    /// Whether some call of this disk may wait for a medium on the thread that serves it.
    fn waits(&self, rings: bool) -> bool {
        let memory = self.disk.is_memory_backed();
        let odd = self.disk.direct().is_some() || self.disk.is_block_device() && self.settings.discard;
        self.settings.engine == Engine::Sync || !memory && (!rings || odd)
    }

    fn host(&self, what: &str, source: io::Error) -> DeviceError {
        DeviceError::Host { what: format!("Disk {:?}: {what}", self.settings.id), source }
    }

    /// Moves the queues into handlers on their workers.
    fn launch(&mut self, mut running: Running, queues: Vec<Queue>) -> Result<(), DeviceError> {
        let wanted = self.settings.engine == Engine::Async && !self.disk.is_memory_backed();
        let rings = wanted && disk::available();
        if wanted && !rings {
            let id = &self.settings.id;
            log::warn!("Disk {id:?}: this host allows no io_uring here; a thread that waits is used instead");
        }
        let shared = Arc::new(Shared {
            disk: Arc::clone(&self.disk),
            stats: Arc::clone(&self.stats),
            throttle: Arc::clone(&self.throttle),
            interrupt: Arc::clone(&running.interrupt),
            memory: running.memory.clone(),
            terms: self.terms(running.features),
            serial: serial(&self.settings.id),
            stable: self.about.features & !running.features & config::F_FLUSH != 0,
            rings,
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            id: self.settings.id.clone(),
            logged: AtomicBool::new(false),
        });
        let several = queues.len() > 1;
        let own = several || self.waits(rings);
        for queue in queues {
            let index = queue.index();
            let Some((_, bell)) = running.bells.iter().find(|(i, _)| *i == index) else { continue };
            let worker = match (own, several) {
                (false, _) => running.worker.clone(),
                (true, false) => Worker::new(&format!("blk-{}", self.settings.id)),
                (true, true) => Worker::new(&format!("blk{index}-{}", self.settings.id)),
            };
            let handler = QueueHandler::new(queue, Arc::clone(bell), Arc::clone(&shared));
            let added = worker.add(Box::new(handler));
            let id = match added {
                Ok(id) => id,
                Err(e) => {
                    let _ = self.land(running);
                    return Err(self.host("a thread for its queues could not be had", e));
                }
            };
            running.handlers.push((worker, id));
        }
        self.running = Some(running);
        Ok(())
    }

    /// Takes the queues back from all handlers at once, within one deadline.
    fn land(&mut self, running: Running) -> Result<(Running, Vec<Queue>), DeviceError> {
        let mut running = running;
        let handlers = std::mem::take(&mut running.handlers);
        let answers: Vec<io::Result<Vec<Queue>>> = match handlers.as_slice() {
            [(worker, id)] => vec![worker.remove(*id)],
            many => std::thread::scope(|scope| {
                let asked: Vec<_> =
                    many.iter().map(|(worker, id)| scope.spawn(|| worker.remove(*id))).collect();
                asked.into_iter().map(|a| a.join().unwrap_or_else(|_| Ok(Vec::new()))).collect()
            }),
        };
        let mut queues = Vec::new();
        let mut late = None;
        for ((worker, _), answer) in handlers.into_iter().zip(answers) {
            match answer {
                Ok(mut back) if !back.is_empty() => queues.append(&mut back),
                Ok(_) => late = Some(io::ErrorKind::TimedOut.into()),
                Err(e) => {
                    // Dropping the last handle would wait for a thread that does not come.
                    std::mem::forget(worker);
                    late = Some(e);
                }
            }
        }
        match late {
            None => Ok((running, queues)),
            Some(e) => {
                self.stuck = true;
                Err(self.host("it did not finish the requests it was given", e))
            }
        }
    }

    /// Looks at the backing file again, or at another one, with the driver running.
    fn replace(&mut self, path: Option<&Path>) -> Result<(), DeviceError> {
        let disk = self
            .disk
            .reopen(path)
            .map_err(|e| self.host("its backing file was not changed", io::Error::other(e)))?;
        let told = self.running.as_ref().map(|running| Arc::clone(&running.interrupt));
        let landed = self.running.take().map(|running| self.land(running)).transpose();
        let landed = landed.inspect_err(|_| told.iter().for_each(|driver| driver.needs_reset()))?;
        if let Some(path) = path {
            path.clone_into(&mut self.settings.path);
        }
        self.space = config::space(&disk, &self.settings);
        self.disk = Arc::new(disk);
        let Some((running, queues)) = landed else {
            self.announce = true;
            return Ok(());
        };
        let (interrupt, bells) = (Arc::clone(&running.interrupt), running.bells.clone());
        let launched = self.launch(running, queues);
        match &launched {
            Ok(()) => interrupt.config(),
            Err(_) => interrupt.needs_reset(),
        }
        // What came while nobody was looking is found by looking once.
        for (_, bell) in bells {
            let _ = bell.write(1);
        }
        launched
    }

    fn terms(&self, features: u64) -> Terms {
        Terms {
            sectors: self.disk.sectors(),
            read_only: self.settings.read_only,
            flush: features & config::F_FLUSH != 0,
            discard: features & config::F_DISCARD != 0,
            zeroes: features & config::F_WRITE_ZEROES != 0,
            unmap: self.settings.discard,
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            let _ = self.land(running);
        }
    }
}

impl VirtioDevice for Block {
    fn about(&self) -> &About {
        &self.about
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        read_config_bytes(&self.space, offset, data);
    }

    fn start(&mut self, active: Active) -> Result<(), DeviceError> {
        if self.stuck {
            let text = "it still has requests of the machine from before".to_owned();
            return Err(self.host(&text, io::ErrorKind::ResourceBusy.into()));
        }
        let (mut queues, mut bells) = (Vec::new(), Vec::new());
        for (queue, bell) in active.queues {
            bells.push((queue.index(), Arc::new(bell)));
            queues.push(queue);
        }
        let interrupt = Arc::clone(&active.interrupt);
        let running = Running {
            features: active.features,
            interrupt: active.interrupt,
            memory: active.memory,
            worker: active.worker,
            handlers: Vec::new(),
            bells,
        };
        self.launch(running, queues)?;
        if std::mem::take(&mut self.announce) {
            interrupt.config();
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<Vec<Queue>, DeviceError> {
        match self.running.take() {
            Some(running) => Ok(self.land(running)?.1),
            None => Ok(Vec::new()),
        }
    }

    fn reset(&mut self) {
        self.disk.forgive();
    }

    fn save(&self) -> Section {
        let saved = Saved {
            sectors: self.disk.sectors(),
            queues: self.settings.queues,
            read_only: self.settings.read_only,
            flush_failed: self.disk.flush_failed(),
            limiter: self.throttle.save(),
            announce: self.announce,
        };
        saved.section()
    }

    fn restore(&mut self, section: &Section) -> Result<(), DeviceError> {
        let saved = Saved::read(section)?;
        let (id, sectors) = (&self.settings.id, self.disk.sectors());
        let wrong = |reason| Err(StateError::Impossible { kind: KIND, reason }.into());
        if saved.queues != self.settings.queues {
            let (saved, now) = (saved.queues, self.settings.queues);
            return wrong(format!("disk {id:?} had {saved} queues and is attached with {now}"));
        }
        if saved.read_only != self.settings.read_only {
            let name = |read_only| if read_only { "read-only" } else { "writable" };
            let (saved, now) = (name(saved.read_only), name(self.settings.read_only));
            return wrong(format!("disk {id:?} was {saved} and is attached {now}"));
        }
        if saved.sectors > sectors {
            let saved = saved.sectors;
            return wrong(format!("disk {id:?} had {saved} sectors and its file has {sectors} now"));
        }
        let impossible = |reason| StateError::Impossible { kind: KIND, reason };
        self.throttle.restore(&saved.limiter).map_err(impossible)?;
        self.settings.limits = self.throttle.config();
        self.announce = saved.announce || saved.sectors != sectors;
        if saved.flush_failed {
            self.disk.set_flush_failed();
        }
        Ok(())
    }

    fn update(&mut self, change: &Change) -> Result<(), DeviceError> {
        let done = match change {
            Change::Backing(path) => self.replace(path.as_deref()),
            Change::Limits(limits) => {
                self.throttle.change(*limits);
                self.settings.limits = self.throttle.config();
                // Queues that wait for the old limits look again.
                for (_, bell) in self.running.iter().flat_map(|running| &running.bells) {
                    let _ = bell.write(1);
                }
                Ok(())
            }
            _ => Err(DeviceError::Change(format!("A disk cannot be changed by {change:?}"))),
        };
        self.updates[0] += 1;
        self.updates[1] += u64::from(done.is_err());
        done
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let (throttled, woken) = self.throttle.counters();
        let [updates, failed] = self.updates;
        let further = [
            ("rate_limiter_throttled_events", throttled),
            ("rate_limiter_event_count", woken),
            ("update_count", updates),
            ("update_fails", failed),
        ];
        self.stats.list().into_iter().chain(further).collect()
    }
}

/// The serial number the guest sees: the first 20 bytes of the id, padded with zeroes.
fn serial(id: &str) -> [u8; 20] {
    let mut serial = [0; 20];
    for (place, byte) in serial.iter_mut().zip(id.bytes()) {
        *place = byte;
    }
    serial
}

#[cfg(test)]
mod tests;
