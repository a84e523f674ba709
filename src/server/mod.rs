//! The door for HTTP: a unix socket, its clients, and one epoll, on the thread that owns the
//! machine.
//!
//! ```text
//!   controller's wait ── one descriptor ──► epoll ──┬─ listener
//!                                                   ├─ one timer
//!        serve(handler) ◄───────────────────────────┴─ connections
//!              │ Request, Ticket
//!              ▼
//!           handler ──► Answer::Now ──────────────► sent at once
//!                  ├──► Answer::Later ── answer(ticket, response) when it is known
//!                  └──► Answer::Stream ─ push(ticket, part) … finish(ticket)
//! ```
//!
//! There is no thread of its own and no runtime: a monitor that is asked nothing pays two
//! descriptors and no cycles, and a request needs no lock, because it is served where the
//! machine is. A request on an open connection costs four system calls: the controller's
//! wait, this epoll, one receive, one send.
//!
//! A monitor must outlive its clients' mistakes, so everything is bounded ([`Limits`]):
//!
//! * Connections have a cap, and the next one is not turned away: the one that never made a
//!   request, or that has been quiet or unfinished for longest, makes room. Only clients that
//!   are owed an answer or read a stream are safe from that, and they have a cap too. So a
//!   thousand slow clients cost each other their place, and a fresh one is served at once.
//! * Memory that clients cause to be held (half requests, answers they do not read) has one
//!   cap for all; over it the oldest of those connections is cut. So have descriptors.
//! * A half request and an unread answer have a deadline, kept by one coarse timer that runs
//!   only while there is such a thing.
//! * Each call of [`Server::serve`] does bounded work; what is left makes the descriptor
//!   readable again.
//!
//! When the process has no descriptors left, accepting one more client first costs the
//! quietest its place, and if there is none the listener rests until the timer's next tick,
//! for a listener that stays readable would take all of the processor.

mod connection;
mod socket;

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    path::Path,
    time::{Duration, Instant},
};

use api::http::{Request, Response};
use rustix::{
    event::{
        Timespec,
        epoll::{self, EventData, EventFlags},
    },
    io::Errno,
    time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags},
};

use connection::{Connection, Fate, Turn};
pub(crate) use socket::Listener;
pub use socket::{LONGEST_PATH, SocketError};

/// The most descriptors that may come with one request.
pub const MAX_DESCRIPTORS: usize = 16;

/// Events that are handled in one call of [`Server::serve`].
const EVENTS: usize = 32;

/// New connections that are accepted in one call.
const ACCEPTS: usize = 16;

/// How much is received at once: a head of the longest kind, and then some body.
const SCRATCH: usize = 16 << 10;

/// How often deadlines are looked at while there are any.
const TICK: Duration = Duration::from_secs(1);

const LISTENER: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;

/// What clients may take. The defaults keep the whole server under 1 MiB.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Open connections.
    pub connections: usize,
    /// Connections among them that wait for a late answer or read a stream.
    pub owed: usize,
    /// The longest request body, in bytes (`--http-api-max-payload-size`).
    pub body: usize,
    /// Memory for half requests and unread answers, of all connections together, in bytes.
    /// Raised to what one request of the longest kind needs.
    pub memory: usize,
    /// Unread bytes of a stream beyond which its reader is cut. The kernel's socket buffer,
    /// about 200 KiB, comes before it.
    pub backlog: usize,
    /// Descriptors of half requests, of all connections together.
    pub descriptors: usize,
    /// How long a request may take to arrive, or an answer to be read.
    pub patience: Duration,
    /// Permission bits of the socket; none leaves them to the umask, as Firecracker does.
    pub mode: Option<u32>,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections: 64,
            owed: 32,
            body: 51_200,
            memory: 512 << 10,
            backlog: 64 << 10,
            descriptors: 4 * MAX_DESCRIPTORS,
            patience: Duration::from_secs(30),
            mode: None,
        }
    }
}

/// Names one request that was handed to the handler, for as long as the process lives. A
/// ticket whose client went away is harmless: answering it does nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ticket {
    slot: u32,
    serial: u64,
}

/// What a handler does with a request.
#[derive(Debug)]
pub enum Answer {
    /// This is the answer.
    Now(Response),
    /// The answer comes through [`Server::answer`] with the ticket. If too many are owed
    /// already, the client gets status 503 instead and the ticket is void.
    Later,
    /// The head of the answer and the beginning of its body (which may be empty); the rest
    /// comes through [`Server::push`] and [`Server::finish`] with the ticket. Too many make it
    /// void as above.
    Stream(Response),
}

/// A listening socket and its clients.
pub struct Server {
    epoll: OwnedFd,
    timer: OwnedFd,
    listener: Listener,
    limits: Limits,
    slots: Vec<Option<Box<Connection>>>,
    scratch: Box<[u8]>,
    head: Vec<u8>,
    serial: u64,
    /// Sum of what the connections hold, in bytes.
    held: usize,
    /// Sum of their descriptors.
    descriptors: usize,
    /// How many of them are owed something.
    owed: usize,
    ticking: bool,
    /// Whether the listener rests because there are no descriptors.
    resting: bool,
}

impl Server {
    /// Listens at `path`, which must not exist. The socket is removed when the server is
    /// dropped, if it is still the same one.
    ///
    /// Errors say what is wrong with the path, or who has it.
    pub fn new(path: &Path, limits: Limits) -> Result<Server, SocketError> {
        let descriptors = |e: Errno| SocketError::Descriptors(e.into());
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(descriptors)?;
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags).map_err(descriptors)?;
        let listener = Listener::bind("API socket", path, limits.mode)?;
        epoll::add(&epoll, &listener, EventData::new_u64(LISTENER), EventFlags::IN).map_err(descriptors)?;
        epoll::add(&epoll, &timer, EventData::new_u64(TIMER), EventFlags::IN).map_err(descriptors)?;
        let one_request = limits.body.saturating_mul(5) / 4 + 4 * SCRATCH;
        let limits = Limits { memory: limits.memory.max(one_request), ..limits };
        Ok(Server {
            epoll,
            timer,
            listener,
            limits,
            slots: Vec::new(),
            scratch: vec![0; SCRATCH].into_boxed_slice(),
            head: Vec::new(),
            serial: 0,
            held: 0,
            descriptors: 0,
            owed: 0,
            ticking: false,
            resting: false,
        })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        self.listener.path()
    }

    /// Handles what is ready, without waiting and with bounded work; whatever is left makes
    /// the descriptor readable again. `handler` is called once for each complete request, and
    /// for the requests of one connection in order, each after the one before was answered.
    ///
    /// Errors are those of epoll itself; those of clients end only their connections.
    pub fn serve(&mut self, handler: &mut dyn FnMut(Request, Ticket) -> Answer) -> io::Result<()> {
        let mut space = [const { MaybeUninit::<epoll::Event>::uninit() }; EVENTS];
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let (events, _) = match epoll::wait(&self.epoll, &mut space, Some(&zero)) {
            Err(Errno::INTR) => return Ok(()),
            waited => waited?,
        };
        let now = Instant::now();
        let (mut arrivals, mut ticks) = (false, false);
        for event in events.iter() {
            // Newcomers come last: who is open already cannot be evicted with a request that
            // has arrived, and a place is not given away while its events are handled.
            match event.data.u64() {
                LISTENER => arrivals = true,
                TIMER => ticks = true,
                slot => self.turn(slot, event.flags, now, handler),
            }
        }
        if ticks {
            self.tick(now);
        }
        for _ in 0..if arrivals { ACCEPTS } else { 0 } {
            let Some(slot) = self.admit(now) else { break };
            // Most clients have sent their request by now.
            self.turn(slot, EventFlags::IN, now, handler);
        }
        Ok(())
    }

    /// Sends the answer that was put off with [`Answer::Later`]. False if nobody waits for it
    /// any more.
    pub fn answer(&mut self, ticket: Ticket, response: &Response) -> bool {
        let now = Instant::now();
        let mut head = std::mem::take(&mut self.head);
        let alive = self.with(ticket, |c| c.answer(response, &mut head, now));
        self.head = head;
        alive
    }

    /// Sends one more part of a stream that was begun with [`Answer::Stream`]; a part should
    /// be a whole line or record. False if nobody reads it any more: the reader went away, or
    /// did not read and was cut.
    pub fn push(&mut self, ticket: Ticket, part: &[u8]) -> bool {
        let (now, backlog) = (Instant::now(), self.limits.backlog);
        self.with(ticket, |c| c.push(part, backlog, now))
    }

    /// Ends a stream in good order. False if nobody reads it any more.
    pub fn finish(&mut self, ticket: Ticket) -> bool {
        let now = Instant::now();
        self.with(ticket, |c| c.finish(now))
    }

    /// Whether somebody still waits for this ticket's answer or reads its stream. Who keeps
    /// tickets should drop those that are not open.
    pub fn is_open(&self, ticket: Ticket) -> bool {
        self.connection(ticket).is_some()
    }

    /// How many connections are open.
    pub fn connections(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// Waits at most `patience` until clients have taken what was sent to them; for the end of
    /// the process, when answers would be lost otherwise.
    pub fn flush(&mut self, patience: Duration) {
        let end = Instant::now() + patience;
        let mut refuse = |_: Request, _: Ticket| Answer::Now(Response::fault(503, "The monitor is ending"));
        while self.slots.iter().flatten().any(|c| c.has_output()) {
            let left = end.saturating_duration_since(Instant::now());
            let mut watched = [rustix::event::PollFd::new(&self.epoll, rustix::event::PollFlags::IN)];
            let timeout = Timespec::try_from(left).ok();
            if left.is_zero() || rustix::event::poll(&mut watched, timeout.as_ref()).is_err() {
                return;
            }
            if self.serve(&mut refuse).is_err() {
                return;
            }
        }
    }

    fn connection(&self, ticket: Ticket) -> Option<&Connection> {
        let slot = usize::try_from(ticket.slot).ok()?;
        self.slots.get(slot)?.as_deref().filter(|c| c.serves(ticket))
    }

    /// Does something with the connection of a ticket, if it is still there.
    fn with(&mut self, ticket: Ticket, act: impl FnOnce(&mut Connection) -> Fate) -> bool {
        if !self.is_open(ticket) {
            return false;
        }
        let slot = u64::from(ticket.slot);
        let Some(mut connection) = self.take(slot) else { return false };
        match act(&mut connection) {
            Fate::Lives => self.put(slot, connection),
            Fate::Ends => false,
        }
    }

    /// Lets one connection do what its events call for.
    fn turn(
        &mut self,
        slot: u64,
        events: EventFlags,
        now: Instant,
        handler: &mut dyn FnMut(Request, Ticket) -> Answer,
    ) {
        let Some(mut connection) = self.take(slot) else { return };
        let mut turn = Turn {
            scratch: &mut self.scratch,
            head: &mut self.head,
            limits: &self.limits,
            serial: &mut self.serial,
            slot: u32::try_from(slot).unwrap_or(u32::MAX),
            may_owe: self.owed < self.limits.owed,
            now,
            handler,
        };
        if connection.turn(events, &mut turn) == Fate::Lives {
            self.put(slot, connection);
        }
    }

    /// Takes a connection out of its place, and out of the sums.
    fn take(&mut self, slot: u64) -> Option<Box<Connection>> {
        let connection = self.slots.get_mut(usize::try_from(slot).ok()?)?.take()?;
        self.held = self.held.saturating_sub(connection.held());
        self.descriptors = self.descriptors.saturating_sub(connection.descriptors());
        self.owed = self.owed.saturating_sub(usize::from(connection.is_served()));
        Some(connection)
    }

    /// Puts it back, watched for what it waits for now. False if that failed and it is gone.
    fn put(&mut self, slot: u64, mut connection: Box<Connection>) -> bool {
        let wants = connection.wants();
        if wants != connection.interest {
            if epoll::modify(&self.epoll, connection.socket(), EventData::new_u64(slot), wants).is_err() {
                return false;
            }
            connection.interest = wants;
        }
        let due = connection.deadline(&self.limits).is_some();
        self.held = self.held.saturating_add(connection.held());
        self.descriptors += connection.descriptors();
        self.owed += usize::from(connection.is_served());
        let place = usize::try_from(slot).ok().and_then(|slot| self.slots.get_mut(slot));
        if let Some(place) = place {
            *place = Some(connection);
        }
        if due {
            self.start_ticking();
        }
        self.relieve(slot);
        true
    }

    /// Cuts connections, the oldest first, until those left hold no more than they may or there
    /// is only one: an answer of any size can be read as long as nobody else needs the room.
    /// `favoured` is the one that has just done something, and stays.
    fn relieve(&mut self, favoured: u64) {
        while self.held > self.limits.memory || self.descriptors > self.limits.descriptors {
            let memory = self.held > self.limits.memory;
            let holds = |c: &Connection| if memory { c.held() > 0 } else { c.descriptors() > 0 };
            let holders = || self.open().filter(|(_, c)| holds(c));
            let victim = match holders().count() {
                0 | 1 => None,
                _ => holders().filter(|(slot, _)| *slot != favoured).min_by_key(|(_, c)| c.rank()),
            };
            let Some((victim, _)) = victim else { return };
            drop(self.take(victim));
        }
    }

    fn open(&self) -> impl Iterator<Item = (u64, &Connection)> {
        (0..).zip(&self.slots).filter_map(|(slot, c)| Some((slot, c.as_deref()?)))
    }

    /// Accepts one client and says where it was put, making room if there is none.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        let socket = loop {
            match self.listener.accept() {
                Ok(socket) => break socket,
                // A client that has gone meanwhile.
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => return None,
                // No descriptors or no memory: a quiet client makes room.
                Err(_) if self.evict() => {}
                Err(_) => {
                    self.rest(true);
                    return None;
                }
            }
        };
        if self.connections() >= self.limits.connections && !self.evict() {
            return None;
        }
        let free = self.slots.iter().position(Option::is_none).unwrap_or(self.slots.len());
        let slot = u64::try_from(free).ok()?;
        epoll::add(&self.epoll, &socket, EventData::new_u64(slot), EventFlags::IN).ok()?;
        let connection = Box::new(Connection::new(socket, self.limits.body, now));
        match self.slots.get_mut(free) {
            Some(place) => *place = Some(connection),
            None => self.slots.push(Some(connection)),
        }
        Some(slot)
    }

    /// Closes the connection that is the least loss. False if none may be closed.
    fn evict(&mut self) -> bool {
        let victim =
            self.open().filter(|(_, c)| !c.is_served()).min_by_key(|(_, c)| c.rank()).map(|(slot, _)| slot);
        victim.and_then(|slot| self.take(slot)).is_some()
    }

    /// Stops or resumes watching the listener.
    fn rest(&mut self, resting: bool) {
        let flags = if resting { EventFlags::empty() } else { EventFlags::IN };
        if epoll::modify(&self.epoll, &self.listener, EventData::new_u64(LISTENER), flags).is_ok() {
            self.resting = resting;
        }
        if resting {
            self.start_ticking();
        }
    }

    fn start_ticking(&mut self) {
        if !self.ticking {
            let value = Timespec { tv_sec: TICK.as_secs().cast_signed(), tv_nsec: 0 };
            let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
            let set = rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once);
            self.ticking = set.is_ok();
        }
    }

    /// Cuts whose time is over, and looks again later if there may be more.
    fn tick(&mut self, now: Instant) {
        let mut count = [0; 8];
        // It only makes the timer unreadable.
        let _ = rustix::io::read(&self.timer, &mut count);
        self.ticking = false;
        if self.resting {
            self.rest(false);
        }
        let due = |c: &Connection| c.deadline(&self.limits).is_some_and(|d| d <= now);
        let late: Vec<u64> = self.open().filter(|(_, c)| due(c)).map(|(slot, _)| slot).collect();
        for slot in late {
            if let Some(mut connection) = self.take(slot) {
                connection.expire(&mut self.head);
            }
        }
        if self.open().any(|(_, c)| c.deadline(&self.limits).is_some()) {
            self.start_ticking();
        }
    }
}

impl AsRawFd for Server {
    /// A descriptor that is readable whenever [`Server::serve`] has something to do.
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

#[cfg(test)]
mod tests;
