//! The queue half: takes requests one after the other and carries them out.
//!
//! Giving back a hundred gigabytes takes seconds, and a device must be able to stop within
//! [`crate::limits::DRAIN_DEADLINE`]. So what takes long is a [`Job`], done piece by piece with
//! a look at the thread's other events in between. A job that is cut off is forgotten and its
//! request put back into the queue: nothing of an UNPLUG is noted before its last piece, and to
//! give pages back twice is no harm; of an UNPLUG ALL each slot counts for itself.

use std::{
    ops::Range,
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

use super::{
    pool::Pool,
    request::{ANSWER_LEN, Answer, REQUEST_LEN, Request},
};
use crate::{
    limits::{MEM_REQUEST_SLOTS_MAX, MEM_TURN_BYTES, TURN_BUDGET},
    virtio::{
        Interrupt,
        queue::{Chain, Queue, QueueError},
    },
    worker::{Handler, Source, Watch},
};

/// A request that may take more than one turn.
enum Job {
    /// Gives back the pages of `blocks` from `next` on, then unplugs them all.
    Unplug { blocks: Range<usize>, next: usize },
    /// Unplugs slot after slot, from `next` on.
    UnplugAll { next: usize },
}

/// What came of a request in this turn.
enum Step {
    Answered(Answer),
    More(Job),
}

/// Owns the queue and lives on a worker of the device's own.
pub(super) struct Server {
    queue: Queue,
    kick: EventFd,
    interrupt: Arc<dyn Interrupt>,
    pool: Arc<Pool>,
    /// The driver promised to leave unplugged memory alone; without it, nothing is plugged.
    promised: bool,
    chain: Chain,
    /// What the chain at hand asks for, when it was not done in its turn.
    job: Option<Job>,
}

impl Server {
    pub(super) fn new(
        (queue, kick): (Queue, EventFd),
        interrupt: Arc<dyn Interrupt>,
        pool: Arc<Pool>,
        promised: bool,
    ) -> Server {
        Server { queue, kick, interrupt, pool, promised, chain: Chain::new(), job: None }
    }

    /// Serves until the queue is empty or the turn is over; true when more may be waiting.
    pub(super) fn serve(&mut self) -> Result<bool, QueueError> {
        self.queue.disarm();
        let mut left = MEM_TURN_BYTES;
        for _ in 0..TURN_BUDGET {
            let step = match self.job.take() {
                Some(job) => self.go_on(job, &mut left),
                None => {
                    // Between the last look and `arm` a request may have come that rings no bell.
                    while !self.queue.pop(&mut self.chain)? {
                        if !self.queue.arm() {
                            return Ok(false);
                        }
                    }
                    self.begin(&mut left)
                }
            };
            match step {
                Step::Answered(answer) => self.answer(answer),
                Step::More(job) => {
                    self.job = Some(job);
                    return Ok(true);
                }
            }
        }
        Ok(true)
    }

    /// Looks at the chain at hand and does what it asks for, or begins to.
    fn begin(&mut self, left: &mut u64) -> Step {
        let mut bytes = [0; REQUEST_LEN];
        let whole = self.chain.read(0, &mut bytes) == REQUEST_LEN;
        if !whole || self.chain.writable_len() < ANSWER_LEN as u64 {
            self.pool.counters.queue_event_fails.fetch_add(1, Relaxed);
            return Step::Answered(Answer::Error);
        }
        let pool = Arc::clone(&self.pool);
        let counters = &pool.counters;
        match Request::parse(&bytes) {
            Request::Plug(span) => {
                counters.plug_count.fetch_add(1, Relaxed);
                let may = if self.promised { pool.blocks().may_plug(span) } else { Err(Answer::Nack) };
                let answer = may.and_then(|blocks| pool.short(blocks)).map_or_else(
                    |refused| refused,
                    |blocks| {
                        let len = pool.layout.bytes_of(&blocks).1;
                        noted(pool.plug(blocks), &counters.plug_bytes, len)
                    },
                );
                Step::Answered(failed(answer, &counters.plug_fails))
            }
            Request::Unplug(span) => {
                counters.unplug_count.fetch_add(1, Relaxed);
                let may = pool.blocks().may_unplug(span);
                match may.and_then(|blocks| pool.short(blocks)) {
                    Ok(blocks) => self.go_on(Job::Unplug { next: blocks.start, blocks }, left),
                    Err(refused) => Step::Answered(failed(refused, &counters.unplug_fails)),
                }
            }
            Request::UnplugAll => {
                counters.unplug_all_count.fetch_add(1, Relaxed);
                self.go_on(Job::UnplugAll { next: 0 }, left)
            }
            Request::State(span) => {
                counters.state_count.fetch_add(1, Relaxed);
                let answer = pool.blocks().state(span);
                Step::Answered(failed(answer, &counters.state_fails))
            }
            Request::Unknown => {
                counters.queue_event_fails.fetch_add(1, Relaxed);
                Step::Answered(Answer::Error)
            }
        }
    }

    /// Works on a job as long as `left`, in bytes of this turn, allows.
    fn go_on(&self, job: Job, left: &mut u64) -> Step {
        match job {
            Job::Unplug { blocks, next } => self.unplug(blocks, next, left),
            Job::UnplugAll { next } => self.unplug_all(next, left),
        }
    }

    fn unplug(&self, blocks: Range<usize>, next: usize, left: &mut u64) -> Step {
        let (pool, counters) = (&self.pool, &self.pool.counters);
        // At least one block a turn, however large they are.
        let some = (*left / pool.layout.block).max(1) as usize;
        let end = blocks.end.min(next.saturating_add(some));
        pool.discard(&(next..end));
        let done = pool.layout.bytes_of(&(next..end)).1;
        *left = left.saturating_sub(done);
        if end < blocks.end {
            return Step::More(Job::Unplug { blocks, next: end });
        }
        let len = pool.layout.bytes_of(&blocks).1;
        let answer = noted(pool.unplug(blocks), &counters.unplug_bytes, len);
        Step::Answered(failed(answer, &counters.unplug_fails))
    }

    fn unplug_all(&self, mut next: usize, left: &mut u64) -> Step {
        let (pool, counters) = (&self.pool, &self.pool.counters);
        while next < pool.layout.slots() {
            let plugged = pool.blocks().count(pool.layout.blocks_of(next)) as u64 * pool.layout.block;
            if plugged > 0 {
                if *left == 0 {
                    return Step::More(Job::UnplugAll { next });
                }
                *left = left.saturating_sub(pool.layout.slot);
                let answer = pool.unplug_slot(next);
                noted(answer, &counters.unplug_bytes, plugged);
                if !answer.is_ack() {
                    return Step::Answered(failed(answer, &counters.unplug_all_fails));
                }
            }
            next += 1;
        }
        pool.blocks().shrink();
        Step::Answered(Answer::Ack)
    }

    fn answer(&mut self, answer: Answer) {
        let bytes = answer.bytes();
        let room = self.chain.writable_len() >= bytes.len() as u64;
        let written = if room { self.chain.write(&self.queue, 0, &bytes) } else { 0 };
        self.queue.push(self.chain.head(), written as u32);
    }
}

/// Counts `bytes` when they were moved.
fn noted(answer: Answer, counter: &AtomicU64, bytes: u64) -> Answer {
    if answer.is_ack() {
        counter.fetch_add(bytes, Relaxed);
    }
    answer
}

/// Counts what was not done.
fn failed(answer: Answer, counter: &AtomicU64) -> Answer {
    if !answer.is_ack() {
        counter.fetch_add(1, Relaxed);
    }
    answer
}

impl Pool {
    /// Refuses what would take too long to be stopped.
    fn short(&self, blocks: Range<usize>) -> Result<Range<usize>, Answer> {
        let slots = self.layout.slots_of(&blocks).len();
        if slots > MEM_REQUEST_SLOTS_MAX { Err(Answer::Busy) } else { Ok(blocks) }
    }
}

impl Handler for Server {
    fn sources(&self) -> Vec<Source> {
        vec![Source::readable(&self.kick, 0)]
    }

    fn ready(&mut self, _token: u32, _events: EventSet, watch: &mut Watch<'_>) {
        let _ = self.kick.read();
        self.pool.counters.queue_event_count.fetch_add(1, Relaxed);
        let served = self.serve();
        if self.queue.publish() {
            self.interrupt.queue(self.queue.index());
        }
        match served {
            Ok(true) => {
                // The turn is over and something is left: a stop may come first.
                let _ = self.kick.write(1);
            }
            Ok(false) => {}
            Err(error) => {
                log::warn!("The driver of pluggable memory broke its queue: {error}");
                self.pool.counters.queue_event_fails.fetch_add(1, Relaxed);
                self.interrupt.needs_reset();
                let _ = watch.remove(self.kick.as_raw_fd());
            }
        }
    }

    fn drain(mut self: Box<Self>) -> Vec<Queue> {
        if self.job.is_some() {
            self.queue.undo_pop(1);
        }
        vec![self.queue]
    }
}
