//! Everything a vsock device knows that outlives a pause: its connections, what they owe the
//! guest, and what happens to them when a socket, a packet or the clock says so.
//!
//! ```text
//!   sockets ──collect()──►┐                              ┌──► line ──round()──► rx ring
//!   clock   ──────────────┤  Table of Streams            │    (one turn each)
//!   tx ring ──admit()────►┘  each with owed packets ─────┤
//!             deliver()                                  └──► answers: resets for nobody
//! ```
//!
//! This file has the host's side of it; `admission` has the packets of the guest and
//! `service` those to the guest.
//!
//! Nothing here grows with what the guest or a client sends: connections are capped, each
//! stands in the line at most once, owed packets are flags, and when too many resets wait
//! for buffers of the guest, no more of its packets are taken.

mod admission;
mod service;

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use vmm_sys_util::epoll::EventSet;

pub use self::{admission::Admission, service::Round};
use crate::{
    limits::{VSOCK_CONNECTIONS_MAX, VSOCK_RESETS_MAX, VSOCK_TIMEOUT},
    virtio::vsock::{
        backlog::Pool,
        door::{self, Door, Greeting},
        packet::{HOST_CID, Header, SHUT_BOTH, SHUT_RECEIVE, TYPE_STREAM, op},
        poller::{Origin, Poller, StreamId},
        stream::{Delivery, Place, Stage, Stream},
        table::Table,
    },
};

/// Clients accepted in one turn.
const ACCEPT_MAX: usize = 64;
/// How long to wait before a listener with a full queue is tried again.
const DIAL_AGAIN: Duration = Duration::from_millis(10);
/// How long to wait when the process has no descriptor left for a client.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// How long a guest that was told to drop its connections may take before it gets new ones. One
/// whose memory comes from a slow disk as it is touched needs some time; one that never answers
/// keeps new connections waiting no longer than this.
const SETTLE: Duration = Duration::from_secs(2);
/// Connections by name that a restored guest is told of at most.
const STALE_MAX: usize = 2 * VSOCK_CONNECTIONS_MAX;

/// What a device counts. Written by its worker only.
#[derive(Debug, Default)]
pub struct Counters {
    to_guest_bytes: AtomicU64,
    to_guest_packets: AtomicU64,
    to_host_bytes: AtomicU64,
    to_host_packets: AtomicU64,
    bad_packets: AtomicU64,
    accepted: AtomicU64,
    dialed: AtomicU64,
    refused: AtomicU64,
    resets: AtomicU64,
    removed: AtomicU64,
    queue_errors: AtomicU64,
}

impl Counters {
    /// All counters by name.
    pub fn list(&self) -> Vec<(&'static str, u64)> {
        [
            ("to_guest_bytes", &self.to_guest_bytes),
            ("to_guest_packets", &self.to_guest_packets),
            ("to_host_bytes", &self.to_host_bytes),
            ("to_host_packets", &self.to_host_packets),
            ("bad_packets", &self.bad_packets),
            ("accepted", &self.accepted),
            ("dialed", &self.dialed),
            ("refused", &self.refused),
            ("resets", &self.resets),
            ("conns_removed", &self.removed),
            ("queue_errors", &self.queue_errors),
        ]
        .map(|(name, value)| (name, value.load(Ordering::Relaxed)))
        .to_vec()
    }
}

/// Adds to a counter that only this thread writes.
fn add(counter: &AtomicU64, count: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(count), Ordering::Relaxed);
}

/// The connections of a device and all that belongs to them.
pub struct Muxer {
    /// Context id of the guest.
    cid: u64,
    door: Arc<Door>,
    counters: Arc<Counters>,
    table: Table,
    /// Resets for packets that belong to no connection, or no longer.
    answers: VecDeque<Header>,
    pool: Pool,
    /// Made with the first start.
    poller: Option<Poller>,
    /// The guest has still to be told that its connections are gone.
    pub reset_pending: bool,
    /// Buffers for events that the guest had left when it was told.
    pub events_left: u16,
    /// Until when connections wait for a guest that has just been told so.
    settling: Option<Instant>,
    /// The context id that a restored guest has until it is told, if that is another one.
    old_cid: Option<u64>,
    /// Resets of a restored guest's connections, one each, for after it was told.
    stale: Vec<Header>,
    /// Clients may be waiting at the door.
    door_ready: bool,
    /// When to try the door again after a failure.
    door_again: Option<Instant>,
    /// Since when the device is stopped; deadlines do not run meanwhile.
    resting: Option<Instant>,
}

impl Muxer {
    /// Without connections. `door` is where clients come in.
    pub fn new(guest_cid: u32, door: Arc<Door>, counters: Arc<Counters>) -> Muxer {
        Muxer {
            cid: u64::from(guest_cid),
            door,
            counters,
            table: Table::default(),
            answers: VecDeque::new(),
            pool: Pool::default(),
            poller: None,
            reset_pending: false,
            events_left: 0,
            settling: None,
            old_cid: None,
            stale: Vec::new(),
            door_ready: false,
            door_again: None,
            resting: None,
        }
    }

    /// Gets ready to serve: makes what watches the sockets, or lets the clock run again.
    pub fn open(&mut self) -> io::Result<()> {
        if self.poller.is_none() {
            self.poller = Some(Poller::new(&*self.door)?);
        }
        let pause = self.resting.take().map_or(Duration::ZERO, |since| since.elapsed());
        for slot in self.table.slots() {
            let Some(stream) = self.table.at(slot) else { continue };
            if let Stage::Dialing(until) = &mut stream.stage {
                *until += pause;
            }
            stream.deadline = stream.deadline.map(|at| at + pause);
        }
        self.settling = self.settling.map(|at| at + pause);
        Ok(())
    }

    /// The device stops for a while.
    pub fn rest(&mut self) {
        self.resting = Some(Instant::now());
    }

    /// Drops all connections without a word: the guest's driver is not there any more.
    pub fn clear(&mut self) {
        self.table.clear();
        self.answers.clear();
        self.stale.clear();
        self.old_cid = None;
        self.reset_pending = false;
        self.settling = None;
    }

    /// How far the host-side ports have come.
    pub fn turn(&self) -> u32 {
        self.table.turn()
    }

    /// Host and guest port of each connection that the guest knows of, or may think it has.
    pub fn peers(&self) -> Vec<(u32, u32)> {
        let living = self.table.streams().filter(|stream| stream.known && stream.stage != Stage::Orphan);
        let living = living.map(|stream| (stream.host_port, stream.guest_port));
        let dead = self.answers.iter().chain(&self.stale).map(|reset| (reset.src_port, reset.dst_port));
        living.chain(dead).take(STALE_MAX).collect()
    }

    /// Begins anew for a guest that was restored: it was `cid` and knows of connections between
    /// `peers`, none of which exists any more. Host-side ports go on from `turn`.
    ///
    /// The guest drops its connections when the event tells it to. That leaves those which it was
    /// about to open, and which only a packet can end. It gets one for each of the peers once the
    /// event is through: before it, the packet would look like an orderly end.
    ///
    /// # Errors
    /// When there are more of them than can be.
    pub fn restored(&mut self, cid: u32, turn: u32, peers: &[(u32, u32)]) -> Result<(), String> {
        if peers.len() > STALE_MAX {
            return Err(format!("there are {} connections, at most {STALE_MAX} can be", peers.len()));
        }
        self.clear();
        self.table.set_turn(turn);
        self.reset_pending = true;
        let cid = u64::from(cid);
        self.old_cid = Some(cid).filter(|cid| *cid != self.cid);
        self.stale.extend(peers.iter().map(|(host_port, guest_port)| end_of(cid, *host_port, *guest_port)));
        Ok(())
    }

    /// The descriptor that is readable when [`Muxer::collect`] has something to do.
    pub fn watched(&self) -> RawFd {
        self.poller.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }

    /// Whether more of the guest's packets may be taken.
    pub fn has_room_for_answers(&self) -> bool {
        self.answers.len() < VSOCK_RESETS_MAX
    }

    /// Whether clients are left to accept that no event will remind of.
    pub fn is_unfinished(&self) -> bool {
        self.door_ready && self.door_again.is_none()
    }

    /// Counts a packet that was no packet.
    pub fn count_bad_packet(&self) {
        add(&self.counters.bad_packets, 1);
    }

    /// Counts a queue that cannot be served any more.
    pub fn count_queue_error(&self) {
        add(&self.counters.queue_errors, 1);
    }

    /// New connections from the host wait until the guest has dropped its old ones.
    pub fn settle(&mut self) {
        let until = Instant::now() + SETTLE;
        self.settling = Some(until);
        self.remind(until);
    }

    /// Whether they wait now.
    pub fn is_settling(&self) -> bool {
        self.settling.is_some()
    }

    /// The guest is ready for new connections.
    pub fn settled(&mut self) {
        self.settling = None;
        add(&self.counters.resets, self.stale.len() as u64);
        self.answers.extend(self.stale.drain(..));
        let deadline = Instant::now() + VSOCK_TIMEOUT;
        for slot in self.table.slots() {
            // Clients had to wait for the guest; now it has to answer.
            if self.table.at(slot).is_some_and(|stream| stream.stage == Stage::Requested && !stream.known) {
                self.set_deadline(slot, deadline);
            }
            self.table.line_up(slot);
        }
    }

    /// Takes in what the sockets and the clock have to say.
    pub fn collect(&mut self) {
        let count = self.poller.as_mut().map_or(0, Poller::collect);
        for i in 0..count {
            match self.poller.as_ref().and_then(|p| p.event(i)) {
                Some((Origin::Door, _)) => self.door_ready = true,
                Some((Origin::Clock, _)) => self.clock_rang(),
                Some((Origin::Stream(id), events)) => self.socket_event(id, events),
                None => {}
            }
        }
        if self.is_unfinished() {
            self.accept();
        }
    }

    fn remind(&mut self, deadline: Instant) {
        if let Some(poller) = &mut self.poller {
            poller.remind(deadline);
        }
    }

    /// Lets waiting clients in.
    fn accept(&mut self) {
        for _ in 0..ACCEPT_MAX {
            match self.door.accept() {
                Ok(client) => self.welcome(client),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.door_ready = false;
                    return;
                }
                Err(e) if e.raw_os_error() == Some(libc::ECONNABORTED) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    // Out of descriptors or memory: the client waits in the kernel.
                    let again = Instant::now() + ACCEPT_AGAIN;
                    self.door_again = Some(again);
                    return self.remind(again);
                }
            }
        }
    }

    fn welcome(&mut self, client: OwnedFd) {
        let Some(id) = self.admit_stream(Stream::new(Stage::Greeting, Some(client))) else {
            return add(&self.counters.refused, 1);
        };
        add(&self.counters.accepted, 1);
        self.set_deadline(id.slot, Instant::now() + VSOCK_TIMEOUT);
        // Most clients write their line at once.
        self.greet(id, false);
    }

    /// Puts a connection into the table and watches its socket. A full table makes room by
    /// dropping an orphan, whose guest is done with it and whose reader does not read.
    fn admit_stream(&mut self, stream: Stream) -> Option<StreamId> {
        if self.table.is_full() {
            let mut slots = self.table.slots();
            let slot = slots.find(|slot| self.table.at(*slot).is_some_and(|s| s.stage == Stage::Orphan))?;
            self.drop_stream(slot, false);
        }
        let id = self.table.insert(stream)?;
        let fd = self.table.at(id.slot).map_or(-1, |s| s.fd());
        if fd >= 0 && self.poller.as_ref().is_none_or(|p| p.watch(fd, id).is_err()) {
            self.table.remove(id.slot);
            return None;
        }
        Some(id)
    }

    fn set_deadline(&mut self, slot: u32, deadline: Instant) {
        if let Some(stream) = self.table.at(slot) {
            stream.deadline = Some(deadline);
        }
        self.remind(deadline);
    }

    /// Reads a client's greeting; `closed` when no more of it can come.
    fn greet(&mut self, id: StreamId, closed: bool) {
        let Some(stream) = self.table.get(id) else { return };
        let port = match door::greeting(stream.fd()) {
            Greeting::Port(port) => port,
            Greeting::Partial if !closed => return,
            Greeting::Partial | Greeting::Bad => {
                add(&self.counters.refused, 1);
                return self.drop_stream(id.slot, false);
            }
        };
        stream.stage = Stage::Requested;
        stream.guest_port = port;
        stream.owed.request = true;
        // Bytes may follow the line; the first read will tell.
        stream.readable = true;
        let host_port = self.table.next_port(id.slot);
        if let Some(stream) = self.table.get(id) {
            stream.host_port = host_port;
        }
        self.table.name(id.slot);
        self.table.line_up(id.slot);
        self.set_deadline(id.slot, Instant::now() + VSOCK_TIMEOUT);
    }

    fn socket_event(&mut self, id: StreamId, events: EventSet) {
        let Some(stream) = self.table.get(id) else { return };
        let hung_up = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        let closed = hung_up || events.contains(EventSet::READ_HANG_UP);
        stream.readable |= closed || events.contains(EventSet::IN);
        // Deaf also when both sides have only stopped sending: then nobody will miss it.
        stream.deaf |= hung_up;
        match stream.stage {
            Stage::Greeting => return self.greet(id, closed),
            Stage::Dialing(_) | Stage::Requested => {}
            Stage::Open | Stage::Orphan => {
                // Where the guest does not receive, nobody reads up to the end: take it as read.
                stream.ended |= hung_up && stream.heard & SHUT_RECEIVE != 0;
                if stream.ended {
                    stream.announce_end();
                }
                if events.contains(EventSet::OUT) || (hung_up && stream.is_waiting()) {
                    return self.flush(id);
                }
            }
        }
        self.table.line_up(id.slot);
    }

    /// Writes bytes put aside to a socket that has room, and ends what waited for that.
    fn flush(&mut self, id: StreamId) {
        let (Some(stream), Some(poller)) = (self.table.get(id), self.poller.as_ref()) else { return };
        let mut place = Place { id, poller, pool: &mut self.pool };
        if stream.flush(&mut place) == Delivery::Done {
            self.settle_end(id);
        }
        self.table.line_up(id.slot);
    }

    /// Nothing is put aside for the host: shuts or ends the connection if that was awaited.
    fn settle_end(&mut self, id: StreamId) {
        let Some(stream) = self.table.get(id) else { return };
        stream.shut_if_finished();
        if stream.stage == Stage::Orphan {
            self.drop_stream(id.slot, false);
        } else if stream.is_over() {
            self.drop_stream(id.slot, true);
        }
    }

    /// Ends a connection; with `reset` the guest is told.
    fn drop_stream(&mut self, slot: u32, reset: bool) {
        let Some(mut stream) = self.table.remove(slot) else { return };
        add(&self.counters.removed, 1);
        stream.release(&mut self.pool);
        if reset {
            add(&self.counters.resets, 1);
            self.answers.push_back(end_of(self.cid, stream.host_port, stream.guest_port));
        }
    }

    /// The clock rang: acts on the deadlines that have passed and sets it for the next.
    fn clock_rang(&mut self) {
        if let Some(poller) = &mut self.poller {
            poller.rang();
        }
        let now = Instant::now();
        if self.settling.is_some_and(|until| until <= now) {
            self.settled();
        }
        if self.door_again.is_some_and(|at| at <= now) {
            self.door_again = None;
        }
        for slot in self.table.slots() {
            if self.table.at(slot).and_then(|s| s.deadline).is_some_and(|at| at <= now) {
                self.deadline_passed(slot, now);
            }
        }
        let streams = self.table.slots().filter_map(|slot| self.table.at(slot).and_then(|s| s.deadline));
        let next = streams.chain(self.settling).chain(self.door_again).min();
        if let Some(next) = next {
            self.remind(next);
        }
    }

    fn deadline_passed(&mut self, slot: u32, now: Instant) {
        let Some(stream) = self.table.at(slot) else { return };
        stream.deadline = None;
        match stream.stage {
            // It has not been asked yet.
            Stage::Requested if self.settling.is_some() => {}
            Stage::Greeting => self.drop_stream(slot, false),
            Stage::Requested => {
                let known = stream.known;
                self.drop_stream(slot, known);
            }
            Stage::Dialing(until) => self.dial_again(slot, until, now),
            Stage::Open if stream.told == SHUT_BOTH => self.drop_stream(slot, true),
            Stage::Open => {
                let stalled = stream.wants_to_read() && stream.credit.allowance() == 0;
                stream.owed.question = stalled && !stream.asked;
                self.table.line_up(slot);
            }
            Stage::Orphan => {}
        }
    }
}

/// A reset of the connection between these ports, for a guest that is `cid`.
fn end_of(cid: u64, host_port: u32, guest_port: u32) -> Header {
    Header {
        src_cid: HOST_CID,
        dst_cid: cid,
        src_port: host_port,
        dst_port: guest_port,
        kind: TYPE_STREAM,
        op: op::RESET,
        ..Header::default()
    }
}
