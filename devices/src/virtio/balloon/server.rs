//! The queue half of the balloon: a handler on a worker that owns all queues.
//!
//! ```text
//!   inflate ──► list of pages ──► runs ──► Ram::inflate        answered when given back
//!   deflate ──► list of pages ──► (only where pages are huge)  answered
//!   statistics ──► Latest; the buffer is held until the clock strikes
//!   hinting ──► run number ──► ranges ──► Ram::give_back       while the run is on
//!   reporting ──► ranges ──► Ram::give_back                    answered when given back
//! ```
//!
//! A list or a range is as long as the guest pleases. So a turn has a number of steps
//! ([`BALLOON_TURN_STEPS`]), and a chain that needs more is gone on with in the next turn. Its
//! pages belong to the device until it is answered, so a chain that is cut short by a stop is
//! simply begun again later.

use std::{os::fd::AsRawFd, sync::Arc};

use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

use super::{
    pages::{self, decode},
    ram::{Outcome, Ram},
    shared::{Shared, add},
    stats::{Clock, PAIR},
};
use crate::{
    limits::{BALLOON_PIECE, BALLOON_STATISTICS_MAX, BALLOON_TURN_STEPS, TURN_BUDGET},
    virtio::{
        Interrupt,
        queue::{Chain, Queue, QueueError},
    },
    worker::{Handler, Source, Watch},
};

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Inflate,
    Deflate,
    Statistics,
    Hinting,
    Reporting,
}

/// Token of the clock; queues have the small ones.
const CLOCK: u32 = u32::MAX;

/// Bytes of a list that are looked at together.
const LIST_CHUNK: usize = 4096;

/// Steps left in a turn.
struct Budget(u64);

impl Budget {
    fn spend(&mut self, steps: usize) {
        self.0 = self.0.saturating_sub(steps as u64);
    }

    fn is_spent(&self) -> bool {
        self.0 == 0
    }
}

/// One queue.
struct Lane {
    role: Role,
    queue: Queue,
    kick: EventFd,
    chain: Chain,
    /// How many bytes of `chain` are done; `None` when there is no chain in work.
    done: Option<u64>,
    /// The statistics buffer that is kept, always the last one taken.
    held: Option<u16>,
}

/// The handler.
pub(super) struct Server {
    lanes: Vec<Lane>,
    /// Queues that the driver enabled without having accepted what they are for.
    idle: Vec<Queue>,
    clock: Option<Arc<Clock>>,
    work: Work,
}

/// What a request is served with, apart from its queue.
struct Work {
    ram: Ram,
    shared: Arc<Shared>,
    interrupt: Arc<dyn Interrupt>,
    numbers: Vec<u32>,
}

impl Server {
    /// A handler for `queues`, each with its role if it has one. `clock` is when statistics
    /// are asked for.
    pub fn new(
        queues: Vec<(Option<Role>, Queue, EventFd)>,
        ram: Ram,
        shared: Arc<Shared>,
        interrupt: Arc<dyn Interrupt>,
        clock: Option<Arc<Clock>>,
    ) -> Server {
        let (mut lanes, mut idle) = (Vec::new(), Vec::new());
        for (role, queue, kick) in queues {
            match role {
                Some(role) => {
                    lanes.push(Lane { role, queue, kick, chain: Chain::new(), done: None, held: None });
                }
                None => idle.push(queue),
            }
        }
        Server { lanes, idle, clock, work: Work { ram, shared, interrupt, numbers: Vec::new() } }
    }

    /// Asks for new statistics: the driver gets its buffer back.
    fn ask(&mut self) {
        for lane in &mut self.lanes {
            if let Some(head) = lane.held.take() {
                lane.queue.push(head, 0);
                lane.tell(&self.work);
            } else if lane.role == Role::Statistics {
                log::debug!("The guest has not answered the last question for its memory statistics");
            }
        }
    }
}

impl Handler for Server {
    fn sources(&self) -> Vec<Source> {
        let kicks = (0..).zip(&self.lanes).map(|(token, lane)| Source::readable(&lane.kick, token));
        kicks.chain(self.clock.as_deref().map(|clock| Source::readable(clock, CLOCK))).collect()
    }

    fn ready(&mut self, token: u32, _events: EventSet, watch: &mut Watch<'_>) {
        if token == CLOCK {
            if self.clock.as_ref().is_some_and(|clock| clock.struck()) {
                self.ask();
            }
            return;
        }
        let Some(lane) = self.lanes.get_mut(token as usize) else { return };
        let _ = lane.kick.read();
        let served = lane.serve(&mut self.work);
        lane.tell(&self.work);
        match served {
            Ok(true) => {
                // The turn is over and something is left: back in line behind the others.
                let _ = lane.kick.write(1);
            }
            Ok(false) => {}
            Err(error) => {
                log::warn!("The driver of the balloon broke its {:?} queue: {error}", lane.role);
                add(&self.work.shared.counters.event_fails, 1);
                self.work.interrupt.needs_reset();
                let _ = watch.remove(lane.kick.as_raw_fd());
            }
        }
    }

    fn drain(self: Box<Self>) -> Vec<Queue> {
        let Server { lanes, idle, work, .. } = *self;
        work.ram.park();
        let served = lanes.into_iter().map(|mut lane| {
            if lane.done.is_some() || lane.held.is_some() {
                lane.queue.undo_pop(1);
            }
            lane.queue
        });
        served.chain(idle).collect()
    }
}

impl Lane {
    /// Serves one turn; true when something is left.
    fn serve(&mut self, work: &mut Work) -> Result<bool, QueueError> {
        let mut budget = Budget(BALLOON_TURN_STEPS);
        self.queue.disarm();
        for _ in 0..TURN_BUDGET {
            let done = match self.done {
                Some(done) => done,
                None if budget.is_spent() => return Ok(true),
                None => {
                    // Between the last look and `arm` a request may have come that rings no bell.
                    while !self.queue.pop(&mut self.chain)? {
                        if !self.queue.arm() {
                            return Ok(false);
                        }
                    }
                    work.count(self.role);
                    0
                }
            };
            self.done = work.go_on(self.role, &self.chain, done, &mut budget);
            if self.done.is_some() {
                return Ok(true);
            }
            let head = self.chain.head();
            if self.role != Role::Statistics {
                self.queue.push(head, 0);
            } else if let Some(previous) = self.held.replace(head) {
                // A driver has one buffer; one that has more gets the older ones back.
                self.queue.push(previous, 0);
            }
        }
        Ok(true)
    }

    /// Shows the driver what was answered.
    fn tell(&mut self, work: &Work) {
        if self.queue.publish() {
            work.interrupt.queue(self.queue.index());
        }
    }
}

impl Work {
    fn count(&self, role: Role) {
        let counters = &self.shared.counters;
        match role {
            Role::Inflate => add(&counters.inflate_count, 1),
            Role::Deflate => add(&counters.deflate_count, 1),
            Role::Statistics => add(&counters.stats_updates_count, 1),
            // Counted by range.
            Role::Hinting | Role::Reporting => {}
        }
    }

    /// Works on a chain of which `done` bytes are done; returns how many are now, or `None`
    /// when it is finished.
    fn go_on(&mut self, role: Role, chain: &Chain, done: u64, budget: &mut Budget) -> Option<u64> {
        match role {
            Role::Inflate => self.list(chain, done, budget, Ram::inflate),
            Role::Deflate if self.ram.has_parts() => self.list(chain, done, budget, Ram::deflate),
            Role::Deflate => None,
            Role::Statistics => {
                self.statistics(chain);
                None
            }
            Role::Hinting => {
                if done == 0 {
                    self.number(chain);
                }
                self.ranges(chain, done, budget, Work::hinted)
            }
            Role::Reporting => self.ranges(chain, done, budget, Work::reported),
        }
    }

    /// Goes on with a list of pages, a chunk at a time.
    fn list(
        &mut self,
        chain: &Chain,
        mut done: u64,
        budget: &mut Budget,
        f: impl Fn(&mut Ram, pages::Run) -> Outcome,
    ) -> Option<u64> {
        let mut bytes = [0; LIST_CHUNK];
        loop {
            let got = chain.read(done, &mut bytes);
            decode(bytes.get(..got).unwrap_or_default(), &mut self.numbers);
            budget.spend(self.numbers.len());
            let mut outcome = Outcome::default();
            for run in pages::runs(&mut self.numbers) {
                let Outcome { freed, bad_pages, fails } = f(&mut self.ram, run);
                outcome.freed += freed;
                outcome.bad_pages += bad_pages;
                outcome.fails += fails;
            }
            let counters = &self.shared.counters;
            add(&counters.inflate_freed, outcome.freed);
            add(&counters.bad_pages, outcome.bad_pages);
            add(&counters.inflate_fails, outcome.fails);
            // Nothing at all in it, or a piece of a number at its end.
            let torn = !got.is_multiple_of(4) || (done == 0 && got == 0);
            add(&counters.event_fails, torn.into());
            done += got as u64;
            if got < bytes.len() {
                return None;
            }
            if budget.is_spent() {
                return Some(done);
            }
        }
    }

    /// Takes statistics over.
    fn statistics(&self, chain: &Chain) {
        let mut bytes = [0; BALLOON_STATISTICS_MAX * PAIR];
        let fits = chain.readable_len() <= bytes.len() as u64;
        if fits {
            let got = chain.read(0, &mut bytes);
            self.shared.latest().update(bytes.get(..got).unwrap_or_default());
        }
        let torn = chain.readable_len() == 0 || !chain.readable_len().is_multiple_of(PAIR as u64);
        add(&self.shared.counters.stats_update_fails, (!fits || torn).into());
    }

    /// Takes the number of a run over, if the chain has one.
    fn number(&self, chain: &Chain) {
        let mut number = [0; 4];
        match (chain.readable_len(), chain.read(0, &mut number)) {
            (0, _) => {}
            (4, 4) => {
                if self.shared.hinting.heard(u32::from_le_bytes(number)) {
                    self.interrupt.config();
                }
            }
            _ => add(&self.shared.counters.event_fails, 1),
        }
    }

    /// Goes on with ranges of free pages: the chain's writable buffers (VIRTIO 1.2 sections
    /// 5.5.6.5 and 5.5.6.7). `f` gets a piece and whether it begins a range; false ends it.
    fn ranges(
        &mut self,
        chain: &Chain,
        mut done: u64,
        budget: &mut Budget,
        f: impl Fn(&mut Work, Piece) -> bool,
    ) -> Option<u64> {
        while let Some(piece) = piece(chain.writable(), done) {
            done += piece.len;
            budget.spend(1 + (piece.len >> 16) as usize);
            if !f(self, piece) {
                return None;
            }
            if budget.is_spent() {
                return Some(done);
            }
        }
        None
    }

    fn reported(&mut self, piece: Piece) -> bool {
        let Outcome { freed, fails, .. } = self.ram.give_back(piece.host, piece.len);
        let counters = &self.shared.counters;
        add(&counters.free_page_report_count, piece.first.into());
        add(&counters.free_page_report_freed, freed);
        add(&counters.free_page_report_fails, fails);
        true
    }

    fn hinted(&mut self, piece: Piece) -> bool {
        let ram = &mut self.ram;
        let given = self.shared.hinting.during_run(|| ram.give_back(piece.host, piece.len));
        // Of an old run, or the run ended meanwhile: the rest is the guest's, too.
        let Some(Outcome { freed, fails, .. }) = given else { return false };
        let counters = &self.shared.counters;
        add(&counters.free_page_hint_count, piece.first.into());
        add(&counters.free_page_hint_freed, freed);
        add(&counters.free_page_hint_fails, fails);
        true
    }
}

/// A piece of a range of free pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    /// Address in this process.
    host: usize,
    /// Bytes, at most [`BALLOON_PIECE`].
    len: u64,
    /// Whether the range begins with it.
    first: bool,
}

/// The piece of `buffers` that follows `done` bytes.
fn piece(buffers: &[libc::iovec], mut done: u64) -> Option<Piece> {
    for buffer in buffers {
        let len = buffer.iov_len as u64;
        if done < len {
            let host = buffer.iov_base.expose_provenance() + done as usize;
            // Later pieces begin where those before them ended up to the alignment of the
            // first, so no page falls between two of them.
            let aligned = BALLOON_PIECE - (host as u64 % BALLOON_PIECE);
            return Some(Piece { host, len: aligned.min(len - done), first: done == 0 });
        }
        done -= len;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_into_pieces_that_lose_no_page() {
        let at = (3 * BALLOON_PIECE - 8192) as usize;
        let buffer = |at: usize, len: u64| libc::iovec {
            iov_base: std::ptr::without_provenance_mut(at),
            iov_len: len as usize,
        };
        let buffers = [buffer(at, 8192 + BALLOON_PIECE + 1), buffer(4096, 4096)];
        let (mut done, mut pieces) = (0, Vec::new());
        while let Some(next) = piece(&buffers, done) {
            done += next.len;
            pieces.push((next.host, next.len, next.first));
        }
        let aligned = at + 8192;
        let end = aligned + BALLOON_PIECE as usize;
        let expected =
            [(at, 8192, true), (aligned, BALLOON_PIECE, false), (end, 1, false), (4096, 4096, true)];
        assert_eq!(pieces, expected);
    }
}
