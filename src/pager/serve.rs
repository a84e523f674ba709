//! The pager's thread: faults first, then what is to be brought beforehand, then sleep.
//!
//! ```text
//!   userfaultfd ─► drain: removals settle pages at once ─► faults wait in a queue
//!                                                              │
//!   PageSource ─► buffer ─► place: copy, or zero, what is still missing ◄─ plan (prefetch)
//!                             │ EAGAIN: drain first, look again what is missing
//! ```
//!
//! All of it is one thread, so that a page cannot be given back between the look at the ledger
//! and the copy without the kernel saying so (`EAGAIN`).

use std::{
    collections::VecDeque,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{
    AROUND, Broken, PAGE, PageSource, PagerError, Prefetch, Range,
    bell::Bell,
    ledger::Ledger,
    told,
    uffd::{Event, Userfault},
};
use crate::snapshot::{
    disk::is_zero,
    extents::{Extents, Found, Gathering, Run},
};

/// Bytes that are brought beforehand between two looks for faults.
const PIECE: u64 = 256 << 10;
/// A gap between present pages that is at least so long is left to the kernel.
const GAP: u64 = 2 << 20;
/// Most pieces of memory that are registered; each costs the kernel two mappings.
const REGISTERED_MAX: usize = 1024;

/// How long nothing is asked for until what was kept for the next fault is given back.
const REST_AFTER: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// What a pager did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Served {
    /// Faults that were answered.
    pub faults: u64,
    /// Bytes that were filled from the source.
    pub filled: u64,
    /// Bytes that were filled with the kernel's page of zeroes.
    pub zeroed: u64,
    /// Messages of pages being given back.
    pub removals: u64,
    /// Nothing is missing any more, and the thread is gone.
    pub complete: bool,
}

#[derive(Debug, Default)]
struct Counters {
    faults: AtomicU64,
    filled: AtomicU64,
    zeroed: AtomicU64,
    removals: AtomicU64,
}

/// How it stands with the thread.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Standing {
    /// What is wanted first is not all there yet.
    Bringing,
    Serving,
    Complete,
    Broken(String),
}

#[derive(Debug)]
struct Shared {
    bell: Bell,
    all: AtomicBool,
    given_up: AtomicBool,
    counters: Counters,
    /// What was brought for faults, while that is recorded.
    touched: Mutex<Option<Gathering>>,
    standing: Mutex<Standing>,
    changed: Condvar,
}

impl Shared {
    fn stand(&self, standing: Standing) {
        *lock(&self.standing) = standing;
        self.changed.notify_all();
    }
}

/// A thread that serves the page faults of guest memory. Dropping this changes nothing: memory
/// is served until all of it is there or the process ends.
#[derive(Debug)]
pub struct Pager {
    shared: Arc<Shared>,
    thread: thread::JoinHandle<()>,
}

impl Pager {
    /// Starts to serve `ranges`, none of which was touched yet. With `record`,
    /// [`Pager::touched`] will tell what was asked for.
    pub fn start(
        ranges: &[Range],
        source: Box<dyn PageSource>,
        prefetch: &Prefetch,
        record: bool,
        broken: Broken,
    ) -> Result<Pager, PagerError> {
        let uffd = Userfault::new(ranges.iter().any(|r| r.page_size > PAGE))?;
        let bell = Bell::new().map_err(PagerError::Thread)?;
        let shared = Arc::new(Shared {
            bell,
            all: AtomicBool::new(prefetch.all),
            given_up: AtomicBool::new(false),
            counters: Counters::default(),
            touched: Mutex::new(record.then(Gathering::default)),
            standing: Mutex::new(Standing::Bringing),
            changed: Condvar::new(),
        });
        let mut worker = Worker::new(ranges, uffd, source, &prefetch.first, Arc::clone(&shared));
        worker.register()?;
        let thread = thread::Builder::new().name("pager".to_owned()).spawn(move || worker.run(broken));
        Ok(Pager { shared, thread: thread.map_err(PagerError::Thread)? })
    }

    /// What it did up to now.
    pub fn served(&self) -> Served {
        let Counters { faults, filled, zeroed, removals } = &self.shared.counters;
        Served {
            faults: faults.load(Relaxed),
            filled: filled.load(Relaxed),
            zeroed: zeroed.load(Relaxed),
            removals: removals.load(Relaxed),
            complete: *lock(&self.shared.standing) == Standing::Complete,
        }
    }

    /// The record of what was touched, for another thread.
    pub fn touched(&self) -> Touched {
        Touched(Arc::clone(&self.shared))
    }

    /// Brings everything now and waits until it is there, at most for `patience`; then memory is
    /// ordinary and the source needed no more. False if the time was too short, or the source
    /// is broken.
    pub fn complete(&self, patience: Duration) -> bool {
        self.shared.all.store(true, Relaxed);
        self.shared.bell.ring();
        self.wait(patience, |standing| matches!(standing, Standing::Complete | Standing::Broken(_)))
            == Standing::Complete
    }

    /// Waits until what was wanted first is there, at most for `patience`. False if that was too
    /// short, or the source is broken.
    pub fn has_first(&self, patience: Duration) -> bool {
        let standing = self.wait(patience, |standing| *standing != Standing::Bringing);
        matches!(standing, Standing::Serving | Standing::Complete)
    }

    fn wait(&self, patience: Duration, enough: impl Fn(&Standing) -> bool) -> Standing {
        let standing = lock(&self.shared.standing);
        let waited = self.shared.changed.wait_timeout_while(standing, patience, |s| !enough(s));
        waited.unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// Why pages cannot be had any more, if that is so.
    pub fn broken(&self) -> Option<String> {
        match &*lock(&self.shared.standing) {
            Standing::Broken(reason) => Some(reason.clone()),
            _ => None,
        }
    }

    /// Stops serving: what is missing is zero from then on. For memory that nobody will use,
    /// as after a restore that failed.
    pub fn give_up(self) {
        self.shared.given_up.store(true, Relaxed);
        self.shared.bell.ring();
        let _ = self.thread.join();
    }
}

/// The record of what was touched.
#[derive(Debug)]
pub struct Touched(Arc<Shared>);

impl Touched {
    /// What faults brought since the start, with what came along. Later ones are not recorded.
    pub fn take(&self) -> Extents {
        lock(&self.0.touched).take().map(Gathering::finish).unwrap_or_default()
    }
}

/// What belongs to the thread.
struct Worker {
    uffd: Userfault,
    ledgers: Vec<Ledger>,
    /// What was registered: addresses of the host.
    registered: Vec<Run>,
    source: Box<dyn PageSource>,
    present: Extents,
    /// Present pages that are not settled.
    remaining: u64,
    faults: VecDeque<u64>,
    plan: Plan,
    buffer: Vec<u8>,
    /// Nothing is kept for a next fault.
    resting: bool,
    shared: Arc<Shared>,
}

/// What is to be brought, in offsets of memory.
struct Plan {
    queue: VecDeque<Run>,
    /// How many of the present runs were put in the queue because everything is wanted.
    taken: usize,
}

impl Plan {
    fn next(&mut self, all: bool, present: &Extents) -> Option<Run> {
        if self.queue.is_empty() && all {
            self.queue.extend(present.runs().get(self.taken));
            self.taken += 1;
        }
        let run = self.queue.pop_front()?;
        let end = run.end.min((run.start / PIECE + 1) * PIECE);
        if end < run.end {
            self.queue.push_front(Run { start: end, end: run.end });
        }
        Some(Run { start: run.start, end })
    }
}

impl Worker {
    fn new(
        ranges: &[Range],
        uffd: Userfault,
        source: Box<dyn PageSource>,
        first: &Extents,
        shared: Arc<Shared>,
    ) -> Worker {
        Worker {
            uffd,
            ledgers: ranges.iter().copied().map(Ledger::new).collect(),
            registered: Vec::new(),
            present: source.present(),
            source,
            remaining: 0,
            faults: VecDeque::new(),
            plan: Plan { queue: first.runs().iter().copied().collect(), taken: 0 },
            buffer: Vec::new(),
            resting: true,
            shared,
        }
    }

    /// Registers what has present pages; the rest is settled, and the kernel's own.
    fn register(&mut self) -> Result<(), PagerError> {
        let mut gap = GAP;
        let runs = loop {
            let runs: Vec<Run> =
                self.ledgers.iter().flat_map(|l| islands(&self.present, l.range, gap)).collect();
            // With the widest gap there is one run a range, whatever the number of ranges.
            if runs.len() <= REGISTERED_MAX || gap >= u64::MAX / 2 {
                break runs;
            }
            gap *= 2;
        };
        for run in runs {
            // SAFETY: `Range::new` was promised that this is guest memory of that kind.
            let registered = unsafe { self.uffd.register(run.start, run.len()) };
            registered.map_err(|source| PagerError::Register { len: run.len(), source })?;
            self.registered.push(run);
        }
        for ledger in &mut self.ledgers {
            let mut at = 0;
            for run in &self.registered {
                let Some(start) = ledger.position(run.start) else { continue };
                ledger.settle(at, start);
                at = start + run.len();
            }
            ledger.settle(at, ledger.range.len);
            self.remaining += ledger.missing_of(&self.present, 0, ledger.range.len);
        }
        Ok(())
    }

    fn run(mut self, broken: Broken) {
        let result = self.serve();
        self.shared.stand(match &result {
            Ok(()) => Standing::Complete,
            Err(reason) => Standing::Broken(reason.clone()),
        });
        let Err(reason) = result else { return };
        broken(reason);
        // Who waits must never go on with wrong pages, so the descriptor stays open.
        while !self.shared.given_up.load(Relaxed) {
            let _ = poll(&mut [PollFd::new(&self.shared.bell, PollFlags::IN)], None);
        }
        self.release();
    }

    fn serve(&mut self) -> Result<(), String> {
        let mut bringing = true;
        loop {
            if bringing && self.plan.queue.is_empty() {
                bringing = false;
                self.shared.stand(Standing::Serving);
            }
            if self.shared.given_up.load(Relaxed) {
                break;
            }
            if let Some(address) = self.faults.pop_front() {
                self.fault(address)?;
            } else if self.remaining == 0 {
                break;
            } else if let Some(run) = self.plan.next(self.shared.all.load(Relaxed), &self.present) {
                self.bring(run)?;
                self.drain()?;
            } else {
                self.sleep()?;
                self.drain()?;
            }
        }
        self.release();
        Ok(())
    }

    /// Makes ordinary memory of all. Who waits goes on; what is missing is zero.
    fn release(&mut self) {
        for run in self.registered.drain(..) {
            // What is unmapped already needs nothing.
            let _ = self.uffd.unregister(run.start, run.len());
        }
    }

    fn sleep(&mut self) -> Result<(), String> {
        let mut fds = [PollFd::new(&self.uffd, PollFlags::IN), PollFd::new(&self.shared.bell, PollFlags::IN)];
        // A thread that may sleep for days keeps nothing; one that wakes at once has it still.
        let longest = (!self.resting).then_some(&REST_AFTER);
        match poll(&mut fds, longest) {
            Ok(0) => {
                self.resting = true;
                self.buffer = Vec::new();
                self.source.rest();
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(format!("Page faults cannot be waited for: {e}")),
        }
        self.shared.bell.quiet();
        Ok(())
    }

    /// Takes all messages. Removals count at once: they are older than any fault that follows.
    fn drain(&mut self) -> Result<usize, String> {
        let (faults, mut removed) = (&mut self.faults, Vec::new());
        let taken = self.uffd.drain(|event| match event {
            Event::Fault(address) => faults.push_back(address),
            Event::Remove(start, end) => removed.push((start, end)),
        });
        self.shared.counters.removals.fetch_add(removed.len() as u64, Relaxed);
        for (start, end) in removed {
            for index in 0..self.ledgers.len() {
                self.remove(index, start, end);
            }
        }
        taken.map_err(|e| format!("Page faults cannot be read: {e}"))
    }

    fn remove(&mut self, index: usize, start: u64, end: u64) {
        let Some(Range { host, page_size, .. }) = self.ledgers.get(index).map(|l| l.range) else { return };
        let range_end = self.ledgers.get(index).map_or(host, |l| l.range.end());
        let (start, end) = (start.max(host), end.min(range_end));
        if start < end {
            let start = (start - host) / page_size * page_size;
            self.settle(index, start, (end - host).next_multiple_of(page_size));
        }
    }

    fn settle(&mut self, index: usize, start: u64, end: u64) {
        let Some(ledger) = self.ledgers.get_mut(index) else { return };
        self.remaining = self.remaining.saturating_sub(ledger.missing_of(&self.present, start, end));
        ledger.settle(start, end);
    }

    fn fault(&mut self, address: u64) -> Result<(), String> {
        self.shared.counters.faults.fetch_add(1, Relaxed);
        let found =
            self.ledgers.iter().enumerate().find_map(|(n, l)| Some((n, l.position(address)?, l.range)));
        let Some((index, at, range)) = found else { return Ok(()) };
        let unit = range.page_size;
        let at = at / unit * unit;
        let Some(ledger) = self.ledgers.get(index).filter(|l| !l.settled(at)) else {
            // Given back, or somebody else's fault brought it meanwhile.
            self.buffer.clear();
            self.buffer.resize(unit as usize, 0);
            return self.place(index, at, true).map(drop);
        };
        let around = AROUND.max(unit);
        let start = ledger.missing_from(at / around * around, at);
        let end = ledger.missing_until(at, (at / around + 1) * around).min(range.len);
        self.read(range.offset + start, end - start)?;
        if let Some(touched) = &mut *lock(&self.shared.touched) {
            touched.add(Run { start: range.offset + start, end: range.offset + end });
        }
        if !self.place(index, start, false)? {
            let _ = self.uffd.wake(range.host + at, unit);
        }
        self.follow(range.offset + at)
    }

    /// Brings what was unpacked along with this page, now that it is at hand: filling it costs less
    /// than unpacking it again.
    fn follow(&mut self, offset: u64) -> Result<(), String> {
        let unit = self.source.unit(offset);
        if unit <= AROUND {
            return Ok(());
        }
        let mut start = offset / unit * unit;
        let end = start.saturating_add(unit);
        while start < end {
            let next = start.saturating_add(PIECE).min(end);
            self.bring(Run { start, end: next })?;
            start = next;
        }
        Ok(())
    }

    /// Brings the present pages of a piece that are still missing.
    fn bring(&mut self, piece: Run) -> Result<(), String> {
        for index in 0..self.ledgers.len() {
            let Some(range) = self.ledgers.get(index).map(|l| l.range) else { continue };
            let window = piece.within(Run { start: range.offset, end: range.offset + range.len });
            let mut offset = window.start;
            while offset < window.end {
                let until = match self.present.find(offset) {
                    Found::Until(end) => end,
                    Found::AbsentUntil(next) => {
                        offset = next;
                        continue;
                    }
                };
                let unit = range.page_size;
                let at = (offset - range.offset) / unit * unit;
                let end = (until.min(window.end) - range.offset).next_multiple_of(unit);
                offset = self.bring_missing(index, at, end)? + range.offset;
            }
        }
        Ok(())
    }

    /// Brings the first missing pages from `at` on, and says where they end.
    fn bring_missing(&mut self, index: usize, mut at: u64, end: u64) -> Result<u64, String> {
        let Some(ledger) = self.ledgers.get(index) else { return Ok(end) };
        while at < end && ledger.settled(at) {
            at += ledger.range.page_size;
        }
        let until = ledger.missing_until(at, end);
        if at < until {
            self.read(ledger.range.offset + at, until - at)?;
            self.place(index, at, false)?;
        }
        Ok(until.max(at))
    }

    fn read(&mut self, offset: u64, len: u64) -> Result<(), String> {
        self.resting = false;
        self.buffer.resize(len as usize, 0);
        self.source.read(offset, &mut self.buffer).map_err(|e| told(&*e))
    }

    /// Puts the buffer's pages where they belong, if they are missing there; with `again` even
    /// if they are settled (the kernel never lets one be overwritten). False if not all pages
    /// were filled by this.
    fn place(&mut self, index: usize, start: u64, again: bool) -> Result<bool, String> {
        let end = start + self.buffer.len() as u64;
        let (mut at, mut all, mut single) = (start, true, false);
        while at < end {
            let Some(ledger) = self.ledgers.get(index) else { break };
            let Range { host, page_size: unit, .. } = ledger.range;
            if !again && ledger.settled(at) {
                (at, all) = (at + unit, false);
                continue;
            }
            let until = if again { end } else { ledger.missing_until(at, end) };
            let bytes = self.buffer.get((at - start) as usize..(until - start) as usize).unwrap_or_default();
            let (mut count, zero) = alike(bytes, unit);
            if single {
                count = count.min(unit as usize);
            }
            let result = if zero {
                self.uffd.zero(host + at, count as u64)
            } else {
                self.uffd.copy(host + at, bytes.get(..count).unwrap_or_default())
            };
            match result {
                Ok(done) => {
                    let Counters { filled, zeroed, .. } = &self.shared.counters;
                    if zero { zeroed } else { filled }.fetch_add(done, Relaxed);
                    self.settle(index, at, at + done);
                    at += done;
                }
                Err(e) => match e.raw_os_error() {
                    Some(libc::EEXIST) => {
                        self.settle(index, at, at + unit);
                        let _ = self.uffd.wake(host + at, unit);
                        at += unit;
                    }
                    Some(libc::EAGAIN) => self.give_way()?,
                    Some(libc::EINTR) => {}
                    // The kernel takes no run that reaches from one mapping to another.
                    Some(libc::ENOENT) if !single && count as u64 > unit => single = true,
                    Some(libc::ENOENT | libc::ESRCH) => {
                        self.settle(index, at, at + unit);
                        at += unit;
                    }
                    _ => return Err(format!("Pages of guest memory cannot be filled: {e}")),
                },
            }
        }
        Ok(all)
    }

    /// Somebody is giving pages back: the kernel fills nothing until its message was read and
    /// that thread ran on.
    fn give_way(&mut self) -> Result<(), String> {
        if self.drain()? == 0 {
            thread::sleep(Duration::from_micros(20));
        }
        Ok(())
    }
}

/// How many of the bytes come in pages that are alike, all zero or none, from the first on.
/// Huge pages cannot be filled with the kernel's zeroes.
fn alike(bytes: &[u8], unit: u64) -> (usize, bool) {
    if unit > PAGE {
        return (bytes.len(), false);
    }
    let mut pages = bytes.chunks(PAGE as usize).map(is_zero);
    let zero = pages.next().unwrap_or(false);
    let more = pages.take_while(|z| *z == zero).count();
    (((more + 1) * PAGE as usize).min(bytes.len()), zero)
}

/// The parts of a range, as addresses, that hold present pages with no gap of `gap` bytes.
fn islands(present: &Extents, range: Range, gap: u64) -> Vec<Run> {
    let window = Run { start: range.offset, end: range.offset + range.len };
    let unit = range.page_size;
    let mut islands: Vec<Run> = Vec::new();
    for run in present.inside(window) {
        let start = range.host + (run.start - range.offset) / unit * unit;
        let end = range.host + (run.end - range.offset).next_multiple_of(unit);
        match islands.last_mut().filter(|last| start.saturating_sub(last.end) < gap) {
            Some(last) => last.end = end,
            None => islands.push(Run { start, end }),
        }
    }
    islands
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
