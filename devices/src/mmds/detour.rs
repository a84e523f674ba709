//! One network interface's way to the service: the handle its queue threads hold.
//!
//! A device with several queue pairs has one detour, because a guest may send the segments
//! of one connection through any of them. The lock inside is taken only for frames of the
//! service itself; every other frame costs a comparison, every idle turn one atomic load.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use vmm_sys_util::timerfd::TimerFd;

use super::{Mmds, stack::Stack, wire::aim};

/// Shortest sleep; what is due sooner is due then.
const TICK: Duration = Duration::from_millis(1);

/// The way of one network interface to the metadata service. Clones are the same way.
#[derive(Clone)]
pub struct Detour {
    address: [u8; 4],
    shared: Arc<Shared>,
}

struct Shared {
    mmds: Arc<Mmds>,
    /// Replies are waiting.
    waiting: AtomicBool,
    timer: RawFd,
    inside: Mutex<Inside>,
}

struct Inside {
    stack: Stack,
    timer: TimerFd,
    /// When the timer fires.
    armed: Option<Instant>,
}

impl std::fmt::Debug for Detour {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Detour").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Detour {
    /// A way to `mmds` at the address that it is configured for now. Fails when the host has
    /// no random bytes or no descriptor to spare.
    pub fn new(mmds: Arc<Mmds>) -> io::Result<Detour> {
        let address = mmds.config().address;
        let stack = Stack::new(Arc::clone(&mmds), address, Instant::now())?;
        let timer = TimerFd::new().map_err(io::Error::from)?;
        let shared = Shared {
            mmds,
            waiting: AtomicBool::new(false),
            timer: timer.as_raw_fd(),
            inside: Mutex::new(Inside { stack, timer, armed: None }),
        };
        Ok(Detour { address: address.octets(), shared: Arc::new(shared) })
    }

    /// Whether the frame that begins with `head` is the service's. `head` is the first
    /// [`super::HEAD_LEN`] bytes of the frame behind the virtio header, or all of it when it
    /// is shorter.
    #[inline]
    pub fn is_for_mmds(&self, head: &[u8]) -> bool {
        aim(head, self.address).is_some()
    }

    /// Takes a frame of the service from the guest: without virtio header, of any length that
    /// the device lets through, checksums complete or not.
    pub fn take(&self, frame: &[u8], now: Instant) {
        let mut inside = self.lock();
        inside.stack.take(frame, now);
        self.settle(&mut inside, now);
    }

    /// Whether [`Detour::next_reply`] has something.
    #[inline]
    pub fn has_reply(&self) -> bool {
        self.shared.waiting.load(Ordering::Acquire)
    }

    /// Puts the next frame for the guest into `buf`, complete with checksums and without
    /// virtio header, and returns its length, at most 14 bytes more than [`super::MTU`].
    pub fn next_reply(&self, buf: &mut [u8], now: Instant) -> Option<usize> {
        if !self.has_reply() {
            return None;
        }
        let mut inside = self.lock();
        let counters = &self.shared.mmds.counters;
        let reply = loop {
            match inside.stack.out.take(buf) {
                Some(Ok(len)) => break Some(len),
                Some(Err(_)) => counters.tx_errors.increment(),
                None => break None,
            }
        };
        if let Some(len) = reply {
            counters.tx_frames.increment();
            counters.tx_count.increment();
            counters.tx_bytes.add(len as u64);
        }
        if inside.stack.out.is_empty() && inside.stack.is_blocked() {
            inside.stack.run(now);
        }
        self.settle(&mut inside, now);
        reply
    }

    /// A descriptor that is readable when [`Detour::tick`] is due; for one thread to watch,
    /// as long as any clone lives. It is not to be read.
    pub fn timer(&self) -> RawFd {
        self.shared.timer
    }

    /// Does what is due: repeats what the guest did not acknowledge, gives up what it left.
    pub fn tick(&self, now: Instant) {
        let mut inside = self.lock();
        inside.stack.run(now);
        // Setting the timer, even to nothing, also makes its descriptor silent again.
        inside.armed = None;
        let _ = inside.timer.clear();
        self.settle(&mut inside, now);
    }

    /// Forgets all connections and replies, as when the guest's driver starts anew.
    pub fn reset(&self) {
        let mut inside = self.lock();
        inside.stack.reset();
        self.settle(&mut inside, Instant::now());
    }

    /// Bytes of answers not yet given to the guest.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.lock().stack.held()
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.shared.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Publishes whether there are replies and sees to it that the timer fires no later than
    /// needed. A timer that fires early does no harm, so it is not moved back.
    fn settle(&self, inside: &mut Inside, now: Instant) {
        self.shared.waiting.store(!inside.stack.out.is_empty(), Ordering::Release);
        let Some(sleep) = inside.stack.poll_in(now) else { return };
        let sleep = sleep.max(TICK);
        let due = now + sleep;
        if inside.armed.is_none_or(|armed| due < armed) && inside.timer.reset(sleep, None).is_ok() {
            inside.armed = Some(due);
        }
    }
}
