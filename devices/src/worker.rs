//! Threads that own queues.
//!
//! A [`Worker`] is one thread with one epoll set. It runs [`Handler`]s: each has descriptors
//! to watch (doorbells, a tap, a socket, a ring's completion event) and is called when one is
//! ready. The handler owns its queues and buffers outright; the thread is the lock.
//!
//! ```text
//!   register half                      worker thread
//!   ─────────────                      ─────────────────────────────
//!   add(handler)  ──── moved in ────►  epoll_wait ─► handler.ready(token)
//!   remove(id)    ──── asks ────────►  handler.drain() ─┐
//!        ◄───────────  queues  ────────────────────────-┘
//! ```
//!
//! The thread starts with its first handler, so a machine whose guest never drives a device
//! never pays for it. Most devices of a machine share one worker; one whose back end may
//! block (a synchronous disk) gets its own.
//!
//! Every wait has a deadline: a handler that does not drain within
//! [`crate::limits::DRAIN_DEADLINE`] leaves its device broken, and the machine alive.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsRawFd, RawFd},
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
};

use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd},
};

use crate::{limits::DRAIN_DEADLINE, virtio::queue::Queue};

/// A descriptor a handler wants to be called for.
#[derive(Debug, Clone, Copy)]
pub struct Source {
    /// The descriptor; it stays open as long as it is watched.
    pub fd: RawFd,
    /// Which readiness counts. Level-triggered unless `EDGE_TRIGGERED` is set.
    pub events: EventSet,
    /// What `ready` is called with.
    pub token: u32,
}

impl Source {
    /// Watches `fd` for being readable.
    pub fn readable(fd: &impl AsRawFd, token: u32) -> Source {
        Source { fd: fd.as_raw_fd(), events: EventSet::IN, token }
    }
}

/// The queue half of a device, moved into a worker.
pub trait Handler: Send {
    /// What to watch from the start.
    fn sources(&self) -> Vec<Source>;

    /// The source with this token is ready. Serves at most [`crate::limits::TURN_BUDGET`]
    /// requests and returns; with work left it re-arms itself by leaving a level-triggered
    /// source ready.
    fn ready(&mut self, token: u32, events: EventSet, watch: &mut Watch<'_>);

    /// Finishes or gives up what is in flight and returns the queues. Guest memory is not
    /// touched afterwards.
    fn drain(self: Box<Self>) -> Vec<Queue>;
}

/// Lets a handler change what is watched from inside `ready`.
pub struct Watch<'a> {
    epoll: &'a Epoll,
    handler: u32,
}

impl Watch<'_> {
    /// Begins to watch `source`.
    pub fn add(&mut self, source: Source) -> io::Result<()> {
        control(self.epoll, ControlOperation::Add, self.handler, source)
    }

    /// Changes the events of a watched descriptor.
    pub fn modify(&mut self, source: Source) -> io::Result<()> {
        control(self.epoll, ControlOperation::Modify, self.handler, source)
    }

    /// Stops watching `fd`.
    pub fn remove(&mut self, fd: RawFd) -> io::Result<()> {
        let none = Source { fd, events: EventSet::empty(), token: 0 };
        control(self.epoll, ControlOperation::Delete, self.handler, none)
    }
}

fn control(epoll: &Epoll, how: ControlOperation, handler: u32, source: Source) -> io::Result<()> {
    let key = u64::from(handler) << 32 | u64::from(source.token);
    epoll.ctl(how, source.fd, EpollEvent::new(source.events, key))
}

/// Names a handler on its worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HandlerId(u32);

enum Order {
    Add(HandlerId, Box<dyn Handler>, mpsc::SyncSender<io::Result<()>>),
    Remove(HandlerId, mpsc::SyncSender<Vec<Queue>>),
    Finish,
}

struct Running {
    orders: mpsc::Sender<Order>,
    bell: EventFd,
    thread: Option<thread::JoinHandle<()>>,
}

struct Shared {
    name: String,
    next: Mutex<(u32, Option<Running>)>,
}

/// A handle on a worker thread; clones name the same thread. The thread ends when the last
/// handle is dropped.
#[derive(Clone)]
pub struct Worker {
    shared: Arc<Shared>,
}

impl Worker {
    /// A worker whose thread, once needed, is called `name` (15 bytes are shown).
    pub fn new(name: &str) -> Worker {
        Worker { shared: Arc::new(Shared { name: name.to_owned(), next: Mutex::new((1, None)) }) }
    }

    /// Moves `handler` into the thread, starting it if need be, and waits until its sources
    /// are watched.
    pub fn add(&self, handler: Box<dyn Handler>) -> io::Result<HandlerId> {
        let (reply, answer) = mpsc::sync_channel(1);
        let id = {
            let mut guard = self.shared.next.lock().unwrap_or_else(PoisonError::into_inner);
            let (next, running) = &mut *guard;
            if running.is_none() {
                *running = Some(Running::start(&self.shared.name)?);
            }
            let id = HandlerId(*next);
            *next = next.wrapping_add(1).max(1);
            running.as_ref().map_or(Err(gone()), |r| r.send(Order::Add(id, handler, reply)))?;
            id
        };
        answer.recv_timeout(DRAIN_DEADLINE).map_err(|_| stuck())??;
        Ok(id)
    }

    /// Drains the handler and returns its queues. `TimedOut` when it does not let go within
    /// [`DRAIN_DEADLINE`]; it may still finish later, its queues are then dropped.
    pub fn remove(&self, id: HandlerId) -> io::Result<Vec<Queue>> {
        let (reply, answer) = mpsc::sync_channel(1);
        {
            let guard = self.shared.next.lock().unwrap_or_else(PoisonError::into_inner);
            guard.1.as_ref().map_or(Err(gone()), |r| r.send(Order::Remove(id, reply)))?;
        }
        answer.recv_timeout(DRAIN_DEADLINE).map_err(|_| stuck())
    }
}

fn gone() -> io::Error {
    io::Error::other("The device worker thread has ended")
}

fn stuck() -> io::Error {
    let text = format!("The device worker did not answer within {} s", DRAIN_DEADLINE.as_secs());
    io::Error::new(io::ErrorKind::TimedOut, text)
}

impl Drop for Shared {
    fn drop(&mut self) {
        let running = self.next.get_mut().unwrap_or_else(PoisonError::into_inner).1.take();
        if let Some(mut running) = running {
            let told = running.send(Order::Finish).is_ok();
            // A handler that drops the last handle runs on the thread itself, which cannot
            // wait for its own end.
            let own = running.thread.as_ref().is_some_and(|t| t.thread().id() == thread::current().id());
            if let Some(thread) = running.thread.take().filter(|_| told && !own) {
                let _ = thread.join();
            }
        }
    }
}

impl Running {
    fn start(name: &str) -> io::Result<Running> {
        let (orders, inbox) = mpsc::channel();
        let bell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let epoll = Epoll::new()?;
        let ear = bell.try_clone()?;
        epoll.ctl(ControlOperation::Add, ear.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))?;
        let turn = Turn { epoll, ear, inbox, handlers: HashMap::new() };
        // Handlers recurse nowhere and keep their buffers on the heap.
        let thread =
            thread::Builder::new().name(name.to_owned()).stack_size(128 * 1024).spawn(move || turn.run())?;
        Ok(Running { orders, bell, thread: Some(thread) })
    }

    fn send(&self, order: Order) -> io::Result<()> {
        self.orders.send(order).map_err(|_| gone())?;
        self.bell.write(1)
    }
}

struct Turn {
    epoll: Epoll,
    ear: EventFd,
    inbox: mpsc::Receiver<Order>,
    handlers: HashMap<u32, Box<dyn Handler>>,
}

impl Turn {
    fn run(mut self) {
        let mut events = [EpollEvent::default(); 16];
        loop {
            let count = match self.epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return log::error!("A device worker cannot wait for events: {e}"),
            };
            for event in events.iter().take(count) {
                let handler = (event.data() >> 32) as u32;
                if handler == 0 {
                    let _ = self.ear.read();
                    if !self.obey() {
                        return;
                    }
                } else if let Some(found) = self.handlers.get_mut(&handler) {
                    let mut watch = Watch { epoll: &self.epoll, handler };
                    found.ready(event.data() as u32, event.event_set(), &mut watch);
                }
            }
        }
    }

    /// Watches all of `sources` or none: one left behind would wake the thread for nobody,
    /// again and again.
    fn watch(&self, id: HandlerId, sources: &[Source]) -> io::Result<()> {
        for (i, source) in sources.iter().enumerate() {
            if let Err(error) = control(&self.epoll, ControlOperation::Add, id.0, *source) {
                for added in sources.iter().take(i) {
                    let _ = control(&self.epoll, ControlOperation::Delete, id.0, *added);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Carries out waiting orders; false when told to finish.
    fn obey(&mut self) -> bool {
        while let Ok(order) = self.inbox.try_recv() {
            match order {
                Order::Add(id, handler, reply) => {
                    let watched = self.watch(id, &handler.sources());
                    if watched.is_ok() {
                        self.handlers.insert(id.0, handler);
                    }
                    let _ = reply.send(watched);
                }
                Order::Remove(id, reply) => {
                    // Sources added later by the handler close with it, which ends their
                    // watch, because handlers own what they watch. Doorbells are clones held
                    // elsewhere too, so those known from the start are taken out by hand.
                    let queues = self.handlers.remove(&id.0).map_or_else(Vec::new, |handler| {
                        for source in handler.sources() {
                            let _ = control(&self.epoll, ControlOperation::Delete, id.0, source);
                        }
                        handler.drain()
                    });
                    let _ = reply.send(queues);
                }
                Order::Finish => return false,
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Count {
        bell: EventFd,
        seen: mpsc::Sender<u64>,
    }

    impl Handler for Count {
        fn sources(&self) -> Vec<Source> {
            vec![Source::readable(&self.bell, 7)]
        }
        fn ready(&mut self, token: u32, _: EventSet, _: &mut Watch<'_>) {
            assert_eq!(token, 7);
            let _ = self.seen.send(self.bell.read().unwrap_or(0));
        }
        fn drain(self: Box<Self>) -> Vec<Queue> {
            let _ = self.seen.send(99);
            Vec::new()
        }
    }

    #[test]
    fn a_handler_is_called_until_it_is_removed() {
        let worker = Worker::new("test");
        let bell = EventFd::new(EFD_NONBLOCK).unwrap();
        let (seen, heard) = mpsc::channel();
        let id = worker.add(Box::new(Count { bell: bell.try_clone().unwrap(), seen })).unwrap();
        bell.write(3).unwrap();
        assert_eq!(heard.recv_timeout(DRAIN_DEADLINE).unwrap(), 3);
        assert!(worker.remove(id).unwrap().is_empty());
        assert_eq!(heard.recv_timeout(DRAIN_DEADLINE).unwrap(), 99);
        bell.write(1).unwrap();
        assert!(heard.recv_timeout(DRAIN_DEADLINE).is_err());
        assert!(worker.remove(id).unwrap().is_empty(), "removing twice finds nothing");
    }

    struct Pair(EventFd, RawFd);

    impl Handler for Pair {
        fn sources(&self) -> Vec<Source> {
            let second = Source { fd: self.1, events: EventSet::IN, token: 1 };
            vec![Source::readable(&self.0, 0), second]
        }
        fn ready(&mut self, _: u32, _: EventSet, _: &mut Watch<'_>) {
            let _ = self.0.read();
        }
        fn drain(self: Box<Self>) -> Vec<Queue> {
            Vec::new()
        }
    }

    #[test]
    fn a_handler_that_cannot_be_watched_leaves_nothing_watched() {
        let worker = Worker::new("test");
        let (bell, other) = (EventFd::new(EFD_NONBLOCK).unwrap(), EventFd::new(EFD_NONBLOCK).unwrap());
        let epoll = Epoll::new().unwrap();
        let turn = Turn {
            epoll,
            ear: EventFd::new(EFD_NONBLOCK).unwrap(),
            inbox: mpsc::channel().1,
            handlers: HashMap::new(),
        };
        let handler = Pair(bell, -1);
        assert!(turn.watch(HandlerId(1), &handler.sources()).is_err());
        let fixed = Pair(handler.0, other.as_raw_fd());
        turn.watch(HandlerId(2), &fixed.sources()).expect("the first descriptor is free again");
        assert!(worker.add(Box::new(Pair(fixed.0, -1))).is_err());
    }

    #[test]
    fn dropping_the_last_handle_ends_the_thread() {
        let worker = Worker::new("test");
        let bell = EventFd::new(EFD_NONBLOCK).unwrap();
        let (seen, heard) = mpsc::channel();
        worker.add(Box::new(Count { bell, seen })).unwrap();
        drop(worker.clone());
        assert!(matches!(heard.try_recv(), Err(mpsc::TryRecvError::Empty)));
        drop(worker);
        assert!(matches!(heard.try_recv(), Err(mpsc::TryRecvError::Disconnected)));
    }
}
