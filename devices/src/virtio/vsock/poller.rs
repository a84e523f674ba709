//! The sockets a vsock device waits for, and its clock.
//!
//! A device has up to a thousand sockets, which outlive the handler that serves them (a pause
//! drains the handler and keeps the connections). So they are in an epoll set of the device's
//! own, and the worker's set holds only that one descriptor. While the device is stopped the
//! set goes on collecting; nothing is lost and nothing has to be registered again.
//!
//! Sockets are watched edge-triggered and registered once. The only later change is interest
//! in writing, which begins with the first refused write of a connection.
//!
//! The clock is one timer, set to a moment no later than the earliest deadline. A deadline
//! later than that costs no system call; when the timer fires, the muxer looks through its
//! connections and sets it again.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    time::{Duration, Instant},
};

use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    timerfd::TimerFd,
};

/// What an event belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The listening socket has clients.
    Door,
    /// A deadline may have passed.
    Clock,
    /// A connection.
    Stream(StreamId),
}

/// A connection by its place and the generation of that place, so that an event for one that
/// is gone is not taken for its successor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamId {
    /// Place in the table.
    pub slot: u32,
    /// How often the place was used before.
    pub generation: u32,
}

const DOOR: u64 = u64::MAX;
const CLOCK: u64 = u64::MAX - 1;
/// Events taken in one go.
const EVENTS: usize = 64;

/// The device's own epoll set and timer.
pub struct Poller {
    epoll: Epoll,
    timer: TimerFd,
    /// When the timer will fire.
    armed: Option<Instant>,
    events: [EpollEvent; EVENTS],
}

impl Poller {
    /// A set that watches `door` and its own timer.
    pub fn new(door: &impl AsRawFd) -> io::Result<Poller> {
        let epoll = Epoll::new()?;
        let timer = TimerFd::new().map_err(io::Error::from)?;
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        epoll.ctl(ControlOperation::Add, door.as_raw_fd(), EpollEvent::new(edge, DOOR))?;
        epoll.ctl(ControlOperation::Add, timer.as_raw_fd(), EpollEvent::new(edge, CLOCK))?;
        Ok(Poller { epoll, timer, armed: None, events: [EpollEvent::default(); EVENTS] })
    }

    /// Begins to watch a socket for input and hang-up.
    pub fn watch(&self, fd: RawFd, id: StreamId) -> io::Result<()> {
        self.control(ControlOperation::Add, fd, id, EventSet::empty())
    }

    /// Watches a socket for room to write as well, or no longer.
    pub fn watch_writing(&self, fd: RawFd, id: StreamId, on: bool) -> io::Result<()> {
        let more = if on { EventSet::OUT } else { EventSet::empty() };
        self.control(ControlOperation::Modify, fd, id, more)
    }

    fn control(&self, how: ControlOperation, fd: RawFd, id: StreamId, more: EventSet) -> io::Result<()> {
        let events = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED | more;
        let key = u64::from(id.generation) << 32 | u64::from(id.slot);
        self.epoll.ctl(how, fd, EpollEvent::new(events, key))
    }

    /// Takes up to a fixed number of events without waiting; [`Poller::event`] reads them.
    pub fn collect(&mut self) -> usize {
        self.epoll.wait(0, &mut self.events).unwrap_or(0)
    }

    /// The `i`-th event of the last [`Poller::collect`].
    pub fn event(&self, i: usize) -> Option<(Origin, EventSet)> {
        let event = self.events.get(i)?;
        let origin = match event.data() {
            DOOR => Origin::Door,
            CLOCK => Origin::Clock,
            key => Origin::Stream(StreamId { slot: key as u32, generation: (key >> 32) as u32 }),
        };
        Some((origin, event.event_set()))
    }

    /// Makes sure the clock is heard at `deadline` or before.
    pub fn remind(&mut self, deadline: Instant) {
        if self.armed.is_some_and(|armed| armed <= deadline) {
            return;
        }
        // A zero time would disarm the timer.
        let wait = deadline.saturating_duration_since(Instant::now()).max(Duration::from_micros(1));
        if self.timer.reset(wait, None).is_ok() {
            self.armed = Some(deadline);
        }
    }

    /// The clock was heard: it is not set any more.
    pub fn rang(&mut self) {
        self.armed = None;
    }
}

impl AsRawFd for Poller {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}
