//! Limits at work: shared by the queues of a device, and a timer for each that has to wait.
//!
//! A queue goes through its gate like this:
//!
//! ```text
//!   event ──► is_shut()? ── yes ──► nothing is popped (doorbells change nothing)
//!                 │ no
//!                 ▼
//!             pop, pass(bytes)? ── no ──► put back; is_shut() from now on
//!                                           │ end of the turn
//!                                           ▼
//!                                         sleep(watch): timer set, doorbell stays disarmed
//!   timer ──► opened() ──► look again
//!   change ─► the owner rings the doorbell; the gate sees that the limits are others: open
//! ```

use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use vmm_sys_util::timerfd::TimerFd;

use super::{Cost, Limiter, LimiterConfig, LimiterState, Wait};
use crate::worker::{Source, Watch};

/// Longest sleep; whoever has to wait longer looks in between.
const SLEEP_MAX: Duration = Duration::from_secs(3600);
/// How long a queue without a timer rests before it looks again.
const REST: Duration = Duration::from_millis(1);

/// Nanoseconds of the monotonic clock: the time that limiters are told.
pub fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec that lives across the call; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0))
}

/// The limits of a device or of one direction of it, shared by its queues and its owner.
#[derive(Debug, Default)]
pub struct Throttle {
    limiter: Mutex<Limiter>,
    active: AtomicBool,
    /// Counts changes, so that a gate sees that it was shut by limits of the past.
    version: AtomicU32,
    throttled: AtomicU64,
    woken: AtomicU64,
}

impl Throttle {
    /// Full buckets as `config` says.
    pub fn new(config: LimiterConfig) -> Arc<Throttle> {
        let throttle = Throttle::default();
        throttle.change(config);
        Arc::new(throttle)
    }

    /// The limits in force.
    pub fn config(&self) -> LimiterConfig {
        self.lock().config()
    }

    /// A live change; see [`Limiter::change`]. The queues' doorbells are to be rung after it,
    /// so that those that wait look again.
    pub fn change(&self, change: LimiterConfig) {
        let mut limiter = self.lock();
        limiter.change(change, now());
        self.changed(&limiter);
    }

    /// What is to be saved.
    pub fn save(&self) -> LimiterState {
        self.lock().save(now())
    }

    /// Takes over saved limits and tokens. Time did not pass for them since they were saved.
    pub fn restore(&self, state: &LimiterState) -> Result<(), String> {
        let restored = Limiter::restore(state, now())?;
        let mut limiter = self.lock();
        *limiter = restored;
        self.changed(&limiter);
        Ok(())
    }

    /// Times that a queue had to stop, and times that a timer let it go on.
    pub fn counters(&self) -> (u64, u64) {
        (self.throttled.load(Ordering::Relaxed), self.woken.load(Ordering::Relaxed))
    }

    fn changed(&self, limiter: &Limiter) {
        self.active.store(limiter.is_active(), Ordering::Release);
        self.version.fetch_add(1, Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, Limiter> {
        self.limiter.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a gate knows of the request that did not pass.
#[derive(Debug, Clone, Copy)]
struct Held {
    version: u32,
    /// When its tokens will have come.
    due: u64,
    /// How long to sleep from the refusal on.
    sleep: u64,
    /// The timer was set for it.
    asleep: bool,
    /// The timer fired since.
    opened: bool,
}

/// One queue's way through a [`Throttle`].
pub struct Gate {
    throttle: Arc<Throttle>,
    /// What the timer's event is called.
    token: u32,
    /// Made with the first sleep.
    timer: Option<TimerFd>,
    held: Option<Held>,
    /// A failure to get a timer was logged.
    logged: bool,
}

impl Gate {
    /// A gate of `throttle` whose timer, once it has one, wakes its handler with `token`.
    pub fn new(throttle: Arc<Throttle>, token: u32) -> Gate {
        Gate { throttle, token, timer: None, held: None, logged: false }
    }

    /// Takes the tokens of a request that moves `bytes`; false when it has to wait. Then the
    /// gate is shut.
    pub fn pass(&mut self, bytes: u64) -> bool {
        !self.throttle.active.load(Ordering::Relaxed) || self.ask(Cost::one(bytes), true)
    }

    /// Whether a request that moves `bytes` may be carried out, taking nothing: for one that
    /// may fail, or whose length shows later (1 then). Its real cost is to be
    /// [charged](Gate::charge) afterwards. When false, the gate is shut.
    pub fn admits(&mut self, bytes: u64) -> bool {
        !self.throttle.active.load(Ordering::Relaxed) || self.ask(Cost::one(bytes), false)
    }

    /// Takes the tokens of a request that was carried out and moved `bytes`, present or not.
    pub fn charge(&mut self, bytes: u64) {
        if self.throttle.active.load(Ordering::Relaxed) {
            self.throttle.lock().spend(Cost::one(bytes));
        }
    }

    /// Whether the first request in the queue still has to wait: the timer has not fired and
    /// the limits are those that held it back.
    pub fn is_shut(&self) -> bool {
        self.held.is_some_and(|h| !h.opened && h.version == self.throttle.version.load(Ordering::Acquire))
    }

    /// At the end of a turn in which the gate was shut: sets the timer. When false, there is
    /// no timer to be had; the handler is to ring its own doorbell and try again.
    pub fn sleep(&mut self, watch: &mut Watch<'_>) -> bool {
        let Some(held) = self.held.filter(|held| !held.opened) else { return false };
        if held.asleep {
            return true;
        }
        match self.set_timer(Duration::from_nanos(held.sleep), watch) {
            Ok(()) => {
                self.held = Some(Held { asleep: true, ..held });
                true
            }
            Err(e) => {
                if !std::mem::replace(&mut self.logged, true) {
                    log::error!("A rate limiter has no timer and looks every {REST:?}: {e}");
                }
                thread::sleep(REST);
                self.open();
                false
            }
        }
    }

    /// The timer's event came.
    pub fn opened(&mut self) {
        // Setting it anew also takes back what it has to say; reading could wait.
        if let Some(timer) = &mut self.timer {
            let _ = timer.clear();
        }
        self.throttle.woken.fetch_add(1, Ordering::Relaxed);
        self.open();
    }

    /// The timer, if there is one yet.
    pub fn source(&self) -> Option<Source> {
        self.timer.as_ref().map(|timer| Source::readable(timer, self.token))
    }

    fn open(&mut self) {
        if let Some(held) = &mut self.held {
            held.opened = true;
        }
    }

    fn ask(&mut self, cost: Cost, take: bool) -> bool {
        let mut limiter = self.throttle.lock();
        let (version, now) = (self.throttle.version.load(Ordering::Acquire), now());
        let due = self.held.filter(|held| held.version == version).map(|held| held.due);
        let late = due.is_some_and(|due| due <= now);
        let asked = if take { limiter.take(cost, late, now) } else { limiter.look(cost, late, now) };
        drop(limiter);
        match asked {
            Ok(()) => {
                self.held = None;
                true
            }
            Err(Wait { until_due, sleep }) => {
                let due = due.unwrap_or_else(|| now.saturating_add(until_due));
                self.held = Some(Held { version, due, sleep, asleep: false, opened: false });
                self.throttle.throttled.fetch_add(1, Ordering::Relaxed);
                false
            }
        }
    }

    fn set_timer(&mut self, sleep: Duration, watch: &mut Watch<'_>) -> io::Result<()> {
        let sleep = sleep.clamp(Duration::from_nanos(1), SLEEP_MAX);
        if let Some(timer) = &mut self.timer {
            return timer.reset(sleep, None).map_err(io::Error::from);
        }
        let mut timer = TimerFd::new().map_err(io::Error::from)?;
        timer.reset(sleep, None).map_err(io::Error::from)?;
        watch.add(Source::readable(&timer, self.token))?;
        self.timer = Some(timer);
        Ok(())
    }
}
