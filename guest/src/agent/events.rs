//! Events to whoever listens: bounded queues, so that a slow listener costs nothing but its
//! own events.

use super::syscall::{Latch, wait, want};
use guest::protocol::{Event, frame};
use std::{
    collections::VecDeque,
    io,
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

/// Most events waiting for one listener.
const MAX_QUEUE: usize = 1024;

/// Everyone who listens.
#[derive(Default)]
pub struct Events {
    listeners: Mutex<Vec<Weak<Listener>>>,
}

struct Listener {
    queue: Mutex<Queue>,
}

struct Queue {
    events: VecDeque<Event>,
    lost: u64,
    /// Replaced each time the queue is emptied: a latch opens once.
    arrived: Arc<Latch>,
}

impl Events {
    /// Tells every listener.
    pub fn send(&self, event: &Event) {
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.retain(|listener| match listener.upgrade() {
            Some(listener) => {
                listener.push(event.clone());
                true
            }
            None => false,
        });
    }

    /// Serves one listener until its connection ends.
    pub fn serve(
        &self,
        connection: &mut UnixStream,
        mut greet: impl FnMut(&mut UnixStream) -> bool,
    ) -> io::Result<()> {
        let first = Queue { events: VecDeque::new(), lost: 0, arrived: Arc::new(Latch::new()?) };
        let listener = Arc::new(Listener { queue: Mutex::new(first) });
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&listener));
        if !greet(connection) {
            return Ok(());
        }
        connection.set_write_timeout(Some(Duration::from_secs(60)))?;
        loop {
            let (events, arrived) = listener.take()?;
            for event in events {
                if frame::write(connection, &event).is_err() {
                    return Ok(());
                }
            }
            let mut entries =
                [want(&*arrived, libc::POLLIN), want(connection, libc::POLLIN | libc::POLLRDHUP)];
            wait(&mut entries, None)?;
            if entries[1].revents != 0 {
                // A listener has nothing to say; whatever comes is its goodbye.
                return Ok(());
            }
        }
    }
}

impl Listener {
    fn push(&self, event: Event) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.events.len() < MAX_QUEUE {
            queue.events.push_back(event);
        } else {
            queue.lost += 1;
        }
        queue.arrived.set();
    }

    fn take(&self) -> io::Result<(VecDeque<Event>, Arc<Latch>)> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.arrived.is_set() {
            queue.arrived = Arc::new(Latch::new()?);
        }
        let mut events = std::mem::take(&mut queue.events);
        let count = std::mem::take(&mut queue.lost);
        if count > 0 {
            events.push_back(Event::Lost { count });
        }
        Ok((events, queue.arrived.clone()))
    }
}
