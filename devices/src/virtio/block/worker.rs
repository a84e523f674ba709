//! The queue half: one queue of a disk, on a worker thread.
//!
//! ```text
//!   doorbell ─► take: pop, parse ─┬─► done at once ──────────────┐
//!                                 └─► ring ─► submit (one call)  ├─► push ─► publish ─► interrupt
//!   ring readable ─► reap ───────────────────────────────────────┘          every few   once a turn
//! ```
//!
//! A turn goes on as long as chains keep coming, up to its budget; then it rings its own
//! doorbell and lets the neighbours on the thread run. Used chains are shown to the driver in
//! small groups while the turn still runs, so that a polling driver works in parallel, and
//! the interrupt, if the driver wants one, is sent once, before the kernel is given its next
//! batch.

use std::{
    fmt::Display,
    io,
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

use super::{
    flight::Flight,
    job::{Job, Step, give_back},
    pace::Pace,
    request::{IOERR, OK, Refusal, Request, Terms, UNSUPP},
    stats::{Stats, Tally},
};
use crate::{
    Memory,
    disk::{Bounce, Disk, Ring},
    limiter::{Gate, Throttle},
    limits::{BLOCK_LINGER, BLOCK_TURN_BYTES, DRAIN_DEADLINE, TURN_BUDGET},
    trouble::Trouble,
    virtio::{Interrupt, queue::Queue},
    worker::{Handler, Source, Watch},
};

const BELL: u32 = 0;
const RING: u32 = 1;
const TIMER: u32 = 2;
/// Used chains that are shown to the driver together while a turn runs.
const GROUP: u32 = 8;
/// Cached reads are not tried for at most this many reads after misses in a row.
const PATIENCE: u16 = 63;

/// What the queues of a running disk have in common.
pub(super) struct Shared {
    pub disk: Arc<Disk>,
    pub stats: Arc<Stats>,
    pub throttle: Arc<Throttle>,
    pub interrupt: Arc<dyn Interrupt>,
    pub memory: Memory,
    pub terms: Terms,
    pub serial: [u8; 20],
    /// Writes complete when they are durable.
    pub stable: bool,
    /// What may wait goes through rings.
    pub rings: bool,
    /// Processors of this host.
    pub processors: usize,
    pub id: String,
    /// A failure was logged since the driver started.
    pub logged: AtomicBool,
}

impl Shared {
    /// Logs the first failure of an activation; the others are counted.
    fn log(&self, what: &dyn Display) {
        if !self.logged.swap(true, Relaxed) {
            log::error!("Disk {:?}: {what}; further failures are counted, not logged", self.id);
        }
    }
}

/// One queue.
pub(super) struct QueueHandler {
    queue: Queue,
    bell: Arc<EventFd>,
    shared: Arc<Shared>,
    /// The request being taken.
    fresh: Job,
    flight: Flight,
    rings: bool,
    bounce: Bounce,
    tally: Tally,
    /// The driver wants an interrupt for something already published.
    signal: bool,
    unpublished: u32,
    /// Reads that go straight to the ring before the cache is tried again, and how many it
    /// was the last time; `None` when the host has no such call.
    skip: Option<(u16, u16)>,
    pace: Pace,
    gate: Gate,
    broken: bool,
}

struct Budget {
    requests: usize,
    bytes: u64,
}

impl Budget {
    fn is_spent(&self) -> bool {
        self.requests == 0 || self.bytes == 0
    }
}

/// How a queue came to its end.
enum Fault {
    Queue(crate::virtio::queue::QueueError),
    Busy(u16),
    Ring(io::Error),
}

impl Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Fault::Queue(e) => write!(f, "the driver broke its queue: {e}"),
            Fault::Busy(head) => {
                write!(f, "the driver broke its queue: descriptor {head} was offered again while in use")
            }
            Fault::Ring(e) => write!(f, "its io_uring takes no requests: {e}"),
        }
    }
}

impl QueueHandler {
    pub fn new(queue: Queue, bell: Arc<EventFd>, shared: Arc<Shared>) -> QueueHandler {
        let jobs = if shared.rings { queue.size() } else { 0 };
        QueueHandler {
            flight: Flight::new(jobs, shared.memory.clone()),
            rings: shared.rings,
            skip: (shared.disk.direct().is_none()).then_some((0, 0)),
            pace: Pace::new(shared.processors),
            gate: Gate::new(Arc::clone(&shared.throttle), TIMER),
            queue,
            bell,
            shared,
            fresh: Job::default(),
            bounce: Bounce::new(),
            tally: Tally::default(),
            signal: false,
            unpublished: 0,
            broken: false,
        }
    }

    fn turn(&mut self, watch: &mut Watch<'_>) {
        let mut budget = Budget { requests: TURN_BUDGET, bytes: BLOCK_TURN_BYTES };
        self.queue.disarm();
        loop {
            self.reap();
            if let Err(fault) = self.take(&mut budget, watch) {
                self.give_up(&fault, watch);
                break;
            }
            self.tell();
            let all = match self.submit() {
                Ok(all) => all,
                Err(fault) => {
                    self.give_up(&fault, watch);
                    break;
                }
            };
            self.tally.ring_full += u64::from(!all);
            let limited = self.gate.is_shut();
            if budget.is_spent() || !all || limited && !self.gate.sleep(watch) {
                let _ = self.bell.write(1);
                break;
            }
            if limited {
                break;
            }
            if self.linger() {
                continue;
            }
            if !self.queue.arm() {
                self.pace.sleep(Instant::now());
                break;
            }
            self.queue.disarm();
        }
        self.tell();
        self.shared.stats.add(&mut self.tally);
    }

    /// Looks a moment longer for more to do, where that was seen to pay.
    fn linger(&mut self) -> bool {
        if !self.pace.is_eager() || self.flight.count() > 0 {
            return false;
        }
        self.tell();
        let begun = Instant::now();
        let found = loop {
            if self.queue.waiting().is_ok_and(|n| n > 0) {
                break true;
            }
            if begun.elapsed() > BLOCK_LINGER {
                break false;
            }
            (0..16).for_each(|_| std::hint::spin_loop());
        };
        self.pace.looked(found);
        found
    }

    /// Takes what the driver offers, until nothing is left, the budget is spent or the limiter
    /// lets no more through.
    fn take(&mut self, budget: &mut Budget, watch: &mut Watch<'_>) -> Result<(), Fault> {
        if self.gate.is_shut() {
            return Ok(());
        }
        while !budget.is_spent() && self.queue.pop(&mut self.fresh.chain).map_err(Fault::Queue)? {
            budget.requests -= 1;
            let head = self.fresh.chain.head();
            if self.flight.table.get(usize::from(head)).is_some_and(|job| job.busy) {
                return Err(Fault::Busy(head));
            }
            let asked = self.fresh.read_request(&self.shared.terms);
            if !self.gate.pass(asked.map_or(0, |()| self.fresh.bytes())) {
                self.queue.undo_pop(1);
                return Ok(());
            }
            match asked {
                Err(refusal) => self.refuse(refusal),
                Ok(()) => {
                    let bytes = self.fresh.bytes();
                    if let Some(result) = self.begin(watch) {
                        budget.bytes = budget.bytes.saturating_sub(bytes);
                        let status = judge(&self.shared, self.fresh.request, result);
                        self.fresh.finish(&mut self.queue, status, &mut self.tally);
                        self.count_pushed();
                    }
                }
            }
        }
        Ok(())
    }

    fn refuse(&mut self, refusal: Refusal) {
        let status = if refusal == Refusal::Unsupported { UNSUPP } else { IOERR };
        self.tally.unsupported += u64::from(status == UNSUPP);
        self.tally.errors += u64::from(status == IOERR);
        give_back(&self.fresh.chain, &mut self.queue, status, 0);
        self.count_pushed();
    }

    /// Carries the fresh request out, or gives it to the ring: `None` then.
    fn begin(&mut self, watch: &mut Watch<'_>) -> Option<io::Result<()>> {
        let (shared, fresh) = (&*self.shared, &mut self.fresh);
        if fresh.request == Request::GetId {
            fresh.chain.write(&self.queue, 0, &shared.serial);
            return Some(Ok(()));
        }
        if fresh.is_empty() {
            return Some(Ok(()));
        }
        let refused = self.rings && shared.disk.refuses(&fresh.buffers, fresh.offset);
        if self.rings && !refused {
            if let Some(result) = self.try_cached() {
                return Some(result);
            }
            if self.have_ring(watch) && self.later() {
                return None;
            }
        }
        Some(self.fresh.plain(&self.shared.disk, self.shared.stable, &mut self.bounce))
    }

    /// Reads what is in the page cache, without waiting; `None` when there is more to do.
    fn try_cached(&mut self) -> Option<io::Result<()>> {
        let (Request::In(_), Some((skip, last))) = (self.fresh.request, self.skip) else { return None };
        if skip > 0 {
            self.skip = Some((skip - 1, last));
            return None;
        }
        let longer = (last * 2 + 1).min(PATIENCE);
        let (job, disk) = (&mut self.fresh, &self.shared.disk);
        match disk.read_once(&mut job.buffers, job.offset, libc::RWF_NOWAIT) {
            Ok(0) => return Some(Err(io::ErrorKind::UnexpectedEof.into())),
            Ok(_) if job.buffers.is_empty() => {
                self.skip = Some((0, 0));
                return Some(Ok(()));
            }
            Ok(part) => job.offset += part,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.skip = Some((longer, longer)),
            Err(e) if crate::disk::is_unsupported(&e) => self.skip = None,
            // The ring will meet it again and say so.
            Err(_) => {}
        }
        None
    }

    /// Makes the ring with the first request that needs it. Without one, this queue goes on
    /// with plain calls.
    fn have_ring(&mut self, watch: &mut Watch<'_>) -> bool {
        if self.flight.ring.is_some() {
            return true;
        }
        let made = Ring::new(&self.shared.disk, self.queue.size())
            .and_then(|ring| watch.add(Source::readable(&ring, RING)).map(|()| ring));
        match made {
            Ok(ring) => self.flight.ring = Some(ring),
            Err(e) => {
                self.shared.log(&format_args!("no io_uring could be made ({e}), so its requests wait"));
                self.rings = false;
            }
        }
        self.rings
    }

    /// Queues the fresh request for the ring; false when only a plain call will do.
    fn later(&mut self) -> bool {
        let head = self.fresh.chain.head();
        let (Some(job), Some(ring)) = (self.flight.table.get_mut(usize::from(head)), &mut self.flight.ring)
        else {
            return false;
        };
        std::mem::swap(job, &mut self.fresh);
        let shared = &self.shared;
        let failed = shared.disk.flush_failed() && job.request == Request::Flush;
        job.busy = !failed && push(ring, job, head, shared);
        if !job.busy {
            std::mem::swap(job, &mut self.fresh);
            return false;
        }
        true
    }

    /// Gives what was queued to the kernel, and finishes what it did at once, which may queue
    /// more; false when the kernel took only a part.
    fn submit(&mut self) -> Result<bool, Fault> {
        while let Some(ring) = self.flight.ring.as_mut().filter(|ring| ring.queued() > 0) {
            if !ring.submit().map_err(Fault::Ring)? {
                return Ok(false);
            }
            self.reap();
        }
        Ok(true)
    }

    /// Finishes what the kernel has finished.
    fn reap(&mut self) {
        while let Some((token, result)) = self.flight.ring.as_mut().and_then(Ring::reap) {
            let head = token as u16;
            let Some(job) = self.flight.table.get_mut(usize::from(head)).filter(|job| job.busy) else {
                continue;
            };
            let shared = &self.shared;
            let result = match job.completed(result, &shared.disk) {
                Step::Done(result) => result,
                Step::Again
                    if self.flight.ring.as_mut().is_some_and(|ring| push(ring, job, head, shared)) =>
                {
                    continue;
                }
                Step::Again | Step::Plain => job.plain(&shared.disk, shared.stable, &mut self.bounce),
            };
            let status = judge(shared, job.request, result);
            if self.broken {
                job.busy = false;
                continue;
            }
            job.finish(&mut self.queue, status, &mut self.tally);
            self.count_pushed();
        }
    }

    fn count_pushed(&mut self) {
        self.unpublished += 1;
        if self.unpublished >= GROUP {
            self.publish();
        }
    }

    fn publish(&mut self) {
        self.unpublished = 0;
        self.signal |= self.queue.publish();
    }

    fn tell(&mut self) {
        if self.broken {
            return;
        }
        self.publish();
        if std::mem::take(&mut self.signal) {
            self.shared.interrupt.queue(self.queue.index());
        }
    }

    /// The queue cannot be served: the driver is told, and it is left alone from now on.
    fn give_up(&mut self, fault: &Fault, watch: &mut Watch<'_>) {
        self.tell();
        self.broken = true;
        self.tally.queue_errors += 1;
        self.shared.log(fault);
        let _ = watch.remove(self.bell.as_raw_fd());
        self.shared.interrupt.needs_reset();
    }

    /// Waits until the kernel is done with everything, or for `limit`.
    fn settle(&mut self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        loop {
            self.reap();
            let _ = self.submit();
            if self.flight.count() == 0 {
                return true;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            if let Some(ring) = &mut self.flight.ring {
                ring.wait(left.min(Duration::from_millis(200)));
            }
        }
    }
}

/// Queues the next operation of a job for the kernel; false when it has none for a ring.
fn push(ring: &mut Ring, job: &mut Job, head: u16, shared: &Shared) -> bool {
    let Some(operation) = job.operation(&shared.disk, shared.stable) else { return false };
    // SAFETY: the job stays in the table, and the table and guest memory (through the queue)
    // in the handler, until the completion is reaped; `drain` sees to that at the end.
    unsafe { ring.push(&operation, u64::from(head)) }
}

fn judge(shared: &Shared, request: Request, result: io::Result<()>) -> u8 {
    match result {
        Ok(()) => OK,
        Err(e) => {
            shared.log(&format_args!("a {} failed: {e}", request.name()));
            shared.interrupt.trouble(Trouble::io(request.name(), &e));
            IOERR
        }
    }
}

impl Handler for QueueHandler {
    fn sources(&self) -> Vec<Source> {
        let ring = self.flight.ring.as_ref().map(|ring| Source::readable(ring, RING));
        let sources = [Source::readable(&*self.bell, BELL)];
        sources.into_iter().chain(ring).chain(self.gate.source()).collect()
    }

    fn ready(&mut self, token: u32, _events: EventSet, watch: &mut Watch<'_>) {
        match token {
            BELL => {
                let _ = self.bell.read();
                self.pace.wake(Instant::now());
                self.tally.doorbells += 1;
                let idle = self.flight.count() == 0 && self.queue.waiting().is_ok_and(|n| n == 0);
                self.tally.idle_doorbells += u64::from(idle);
            }
            TIMER => self.gate.opened(),
            _ => {}
        }
        if self.broken {
            self.reap();
        } else {
            self.turn(watch);
        }
    }

    fn drain(mut self: Box<Self>) -> Vec<Queue> {
        // A little less than what the asker waits, so that it hears of it from us.
        let settled = self.settle(DRAIN_DEADLINE * 4 / 5);
        self.tell();
        self.shared.stats.add(&mut self.tally);
        if settled {
            return vec![self.queue];
        }
        // The kernel may still write into guest memory: all of it stays until it is done, on
        // a thread of its own, and the queue is not given back, which the asker reports.
        self.shared.log(&format_args!("{} requests were not finished in time", self.flight.count()));
        self.broken = true;
        let late = thread::Builder::new().name("blk-late".to_owned()).stack_size(64 * 1024);
        let _ = late.spawn(move || while !self.settle(Duration::from_secs(3600)) {});
        Vec::new()
    }
}
