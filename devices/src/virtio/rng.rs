//! The entropy device (VIRTIO 1.2 section 5.4): fills the guest's buffers with random bytes.
//!
//! It is also the model of a device here, whole in one file:
//!
//! ```text
//!   Rng (register half)                       Server (queue half, on a worker)
//!   ───────────────────                       ────────────────────────────────
//!   start(Active) ── moves queue in ────────► ready(): pop, fill, push ... publish
//!   stop() ◄──────── gets it back ─────────── drain()
//! ```
//!
//! The host's generator writes straight into guest memory; nothing is buffered here. A guest
//! decides how many bytes it asks for, so one request gets at most
//! [`RNG_REQUEST_MAX`] of them: section 5.4.6 allows fewer than asked, as long as it is one.
//!
//! A limiter counts requests and the bytes they are given (not those asked for). A request
//! that has to wait stays in the driver's ring.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use serde::{Deserialize, Serialize};
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

use crate::{
    limiter::{Gate, LimiterConfig, LimiterState, Throttle},
    limits::{RNG_REQUEST_MAX, TURN_BUDGET},
    state::{Section, StateError},
    virtio::{
        About, Active, Change, DeviceError, F_COMMON, Interrupt, VirtioDevice,
        queue::{Chain, Queue, QueueError},
    },
    worker::{Handler, HandlerId, Source, Watch, Worker},
};

const KIND: &str = "virtio-rng";
const VERSION: u16 = 2;
const QUEUE_SIZE: u16 = 64;
const BELL: u32 = 0;
const TIMER: u32 = 1;

#[derive(Debug, Default)]
struct Counters {
    requests: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
}

/// An entropy device, fed by the host's `getrandom`.
pub struct Rng {
    about: About,
    counters: Arc<Counters>,
    throttle: Arc<Throttle>,
    running: Option<Running>,
}

struct Running {
    worker: Worker,
    id: HandlerId,
    /// Rung when the limits change.
    bell: EventFd,
}

/// What is saved of a device, version 2.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    limiter: LimiterState,
}

impl Saved {
    /// Of version 1, too, which said nothing: there were no limits.
    fn read(section: &Section) -> Result<Saved, StateError> {
        match section.version {
            1 => section.open(KIND, 1).map(|()| Saved { limiter: LimiterState::default() }),
            _ => section.open(KIND, VERSION),
        }
    }
}

impl Rng {
    /// A device without limits that nobody has driven yet.
    pub fn new() -> Rng {
        Rng::limited(LimiterConfig::default())
    }

    /// The same with limits of requests and of the bytes they are given.
    pub fn limited(limits: LimiterConfig) -> Rng {
        let about = About {
            kind: KIND,
            device_id: 4,
            // Neither storage nor network nor anything else that PCI has a class for.
            pci_class: 0x00ff_0000,
            features: F_COMMON,
            queues: vec![QUEUE_SIZE],
            config_len: 0,
        };
        Rng { about, counters: Arc::default(), throttle: Throttle::new(limits), running: None }
    }
}

impl Default for Rng {
    fn default() -> Rng {
        Rng::new()
    }
}

impl VirtioDevice for Rng {
    fn about(&self) -> &About {
        &self.about
    }

    fn read_config(&self, _offset: u32, data: &mut [u8]) {
        data.fill(0);
    }

    fn start(&mut self, active: Active) -> Result<(), DeviceError> {
        let Active { queues, interrupt, worker, .. } = active;
        let Some((queue, kick)) = queues.into_iter().next() else { return Ok(()) };
        let counters = Arc::clone(&self.counters);
        let bell = kick.try_clone().map_err(|source| host("started", source))?;
        let gate = Gate::new(Arc::clone(&self.throttle), TIMER);
        let server = Server { queue, kick, gate, chain: Chain::new(), interrupt, counters, broken: false };
        let id = worker.add(Box::new(server)).map_err(|source| host("started", source))?;
        self.running = Some(Running { worker, id, bell });
        Ok(())
    }

    fn stop(&mut self) -> Result<Vec<Queue>, DeviceError> {
        let Some(Running { worker, id, .. }) = self.running.take() else { return Ok(Vec::new()) };
        worker.remove(id).map_err(|source| host("stopped", source))
    }

    fn save(&self) -> Section {
        Section::new(KIND, VERSION, &Saved { limiter: self.throttle.save() })
    }

    fn restore(&mut self, section: &Section) -> Result<(), DeviceError> {
        let saved = Saved::read(section)?;
        let impossible = |reason| StateError::Impossible { kind: KIND, reason };
        Ok(self.throttle.restore(&saved.limiter).map_err(impossible)?)
    }

    fn update(&mut self, change: &Change) -> Result<(), DeviceError> {
        let Change::Limits(limits) = change else {
            return Err(DeviceError::Change(format!("An entropy device cannot be changed by {change:?}")));
        };
        self.throttle.change(*limits);
        if let Some(running) = &self.running {
            let _ = running.bell.write(1);
        }
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let Counters { requests, bytes, errors } = &*self.counters;
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (throttled, woken) = self.throttle.counters();
        vec![
            ("requests", of(requests)),
            ("bytes", of(bytes)),
            ("errors", of(errors)),
            ("entropy_rate_limiter_throttled", throttled),
            ("rate_limiter_event_count", woken),
        ]
    }
}

fn host(what: &str, source: std::io::Error) -> DeviceError {
    DeviceError::Host { what: format!("The entropy device cannot be {what}"), source }
}

/// The queue half: owns the queue and lives on a worker.
struct Server {
    queue: Queue,
    kick: EventFd,
    gate: Gate,
    chain: Chain,
    interrupt: Arc<dyn Interrupt>,
    counters: Arc<Counters>,
    /// The driver broke the queue; a timer that still fires finds nothing to do.
    broken: bool,
}

/// Why a turn ended.
enum Served {
    /// Nothing is left; the doorbell is armed.
    Idle,
    /// The limiter lets no more through now.
    Limited,
    /// There may be more; others are to run first.
    Budget,
}

impl Handler for Server {
    fn sources(&self) -> Vec<Source> {
        [Source::readable(&self.kick, BELL)].into_iter().chain(self.gate.source()).collect()
    }

    fn ready(&mut self, token: u32, _events: EventSet, watch: &mut Watch<'_>) {
        match token {
            TIMER => self.gate.opened(),
            _ => drop(self.kick.read()),
        }
        if self.broken || self.gate.is_shut() {
            return;
        }
        let served = self.serve();
        if self.queue.publish() {
            self.interrupt.queue(self.queue.index());
        }
        match served {
            Ok(Served::Idle) => {}
            Ok(Served::Limited) if self.gate.sleep(watch) => {}
            Ok(Served::Limited | Served::Budget) => {
                // Requests are left: back in line behind the others.
                let _ = self.kick.write(1);
            }
            Err(error) => {
                self.broken = true;
                log::warn!("The driver of the entropy device broke its queue: {error}");
                self.counters.errors.fetch_add(1, Ordering::Relaxed);
                self.interrupt.needs_reset();
                let _ = watch.remove(std::os::fd::AsRawFd::as_raw_fd(&self.kick));
            }
        }
    }

    fn drain(self: Box<Self>) -> Vec<Queue> {
        vec![self.queue]
    }
}

impl Server {
    /// Answers up to a turn's budget of requests.
    fn serve(&mut self) -> Result<Served, QueueError> {
        self.queue.disarm();
        for _ in 0..TURN_BUDGET {
            // Between the last look and `arm` a request may have come that rings no bell.
            while !self.queue.pop(&mut self.chain)? {
                if !self.queue.arm() {
                    return Ok(Served::Idle);
                }
            }
            if !self.gate.pass(self.chain.writable_len().min(u64::from(RNG_REQUEST_MAX))) {
                self.queue.undo_pop(1);
                self.queue.disarm();
                return Ok(Served::Limited);
            }
            let filled = fill(self.chain.writable());
            self.queue.mark_written(&self.chain, u64::from(filled));
            self.queue.push(self.chain.head(), filled);
            self.counters.requests.fetch_add(1, Ordering::Relaxed);
            self.counters.bytes.fetch_add(u64::from(filled), Ordering::Relaxed);
        }
        Ok(Served::Budget)
    }
}

/// Fills `buffers` from the front, up to the cap; returns the bytes written.
fn fill(buffers: &[libc::iovec]) -> u32 {
    let mut done = 0;
    for buffer in buffers {
        let end = done + buffer.iov_len.min(RNG_REQUEST_MAX as usize - done);
        let start = done;
        while done < end {
            // SAFETY: the buffer is guest memory that its chain keeps mapped, and the bytes
            // from `done - start` up to `end - start` lie inside it.
            let got = unsafe { libc::getrandom(buffer.iov_base.byte_add(done - start), end - done, 0) };
            match usize::try_from(got) {
                Ok(got) => done += got,
                Err(_) if std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted => {}
                // Without a generator the guest gets what there is, which may be nothing.
                Err(_) => return done as u32,
            }
        }
    }
    done as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::driver::{Desc, Driver};

    fn started() -> (Rng, Driver) {
        let mut rng = Rng::new();
        let mut driver = Driver::for_device(&rng);
        driver.start(&mut rng, F_COMMON).unwrap();
        (rng, driver)
    }

    #[test]
    fn a_request_is_filled_with_bytes_that_differ_each_time() {
        let (_rng, mut driver) = started();
        let (first, second) = (driver.writable(64), driver.writable(64));
        assert_eq!(driver.request(0, &[first]), Some(64));
        assert_eq!(driver.request(0, &[second]), Some(64));
        let (a, b) = (driver.peek(first.address, 64), driver.peek(second.address, 64));
        assert_ne!(a, b);
        assert_ne!(a, vec![0; 64]);
    }

    #[test]
    fn a_huge_request_is_cut_at_the_cap() {
        let (rng, mut driver) = started();
        let halves = [driver.writable(RNG_REQUEST_MAX - 100), driver.writable(1 << 20)];
        assert_eq!(driver.request(0, &halves), Some(RNG_REQUEST_MAX));
        let beyond = driver.peek(halves[1].address + 100, 1000);
        assert_eq!(beyond, vec![0; 1000], "bytes beyond the cap were written");
        assert!(rng.counters().contains(&("bytes", u64::from(RNG_REQUEST_MAX))));
    }

    #[test]
    fn a_request_without_room_is_answered_with_nothing() {
        let (_rng, mut driver) = started();
        let buffer = driver.readable(&[7; 16]);
        assert_eq!(driver.request(0, &[buffer]), Some(0));
    }

    #[test]
    fn more_requests_than_a_turn_serves_are_all_answered() {
        let (mut rng, mut driver) = started();
        for _ in 0..TURN_BUDGET {
            for _ in 0..u64::from(QUEUE_SIZE) {
                let buffer = crate::virtio::driver::Buffer::writable(0x8_0000, 8);
                driver.send(0, &[buffer]);
            }
            for _ in 0..QUEUE_SIZE {
                assert_eq!(driver.wait_used(0).unwrap().len, 8);
            }
        }
        driver.stop(&mut rng).unwrap();
        assert!(rng.counters().contains(&("requests", TURN_BUDGET as u64 * u64::from(QUEUE_SIZE))));
    }

    fn ops(size: u64, refill_time_ms: u64) -> LimiterConfig {
        let ops = Some(crate::limiter::BucketConfig { size, one_time_burst: 0, refill_time_ms });
        LimiterConfig { ops, ..LimiterConfig::default() }
    }

    fn counter(rng: &Rng, name: &str) -> u64 {
        rng.counters().into_iter().find(|(n, _)| *n == name).unwrap().1
    }

    /// A device that three of four requests pass, the last waiting for an hour.
    fn limited() -> (Rng, Driver) {
        let mut rng = Rng::limited(ops(3, 3 * 3_600_000));
        let mut driver = Driver::for_device(&rng);
        driver.start(&mut rng, F_COMMON).unwrap();
        let buffer = driver.writable(16);
        for _ in 0..4 {
            driver.send(0, &[buffer]);
        }
        assert!((0..3).all(|_| driver.wait_used(0).unwrap().len == 16));
        while counter(&rng, "entropy_rate_limiter_throttled") == 0 {
            std::thread::yield_now();
        }
        (rng, driver)
    }

    #[test]
    fn a_limited_device_answers_so_many_requests_and_goes_on_in_time() {
        let mut rng = Rng::limited(ops(10, 400));
        let mut driver = Driver::for_device(&rng);
        driver.start(&mut rng, F_COMMON).unwrap();
        let begun = std::time::Instant::now();
        let buffer = driver.writable(16);
        for _ in 0..15 {
            driver.send(0, &[buffer]);
        }
        assert!((0..15).all(|_| driver.wait_used(0).unwrap().len == 16));
        assert!(begun.elapsed() >= std::time::Duration::from_millis(190), "{:?}", begun.elapsed());
        assert!(counter(&rng, "entropy_rate_limiter_throttled") > 0);
        assert!(counter(&rng, "rate_limiter_event_count") > 0, "it was the timer that woke it");
    }

    #[test]
    fn doorbells_do_not_move_a_device_that_waits_but_new_limits_do() {
        let (mut rng, mut driver) = limited();
        (0..20).for_each(|_| driver.kick(0));
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(driver.rings[0].take_used().is_none());
        assert_eq!(counter(&rng, "entropy_rate_limiter_throttled"), 1, "the doorbell is not heard");
        let wrong = Change::Backing(None);
        assert!(matches!(rng.update(&wrong), Err(DeviceError::Change(_))));
        rng.update(&Change::Limits(ops(0, 0))).unwrap();
        assert_eq!(driver.wait_used(0).unwrap().len, 16);
    }

    #[test]
    fn a_request_that_waits_survives_a_stop_and_so_do_the_limits() {
        let (mut rng, mut driver) = limited();
        let positions = driver.stop(&mut rng).unwrap();
        assert_eq!((positions[0].1.next_avail, positions[0].1.next_used), (3, 3));
        let saved = rng.save();
        let mut other = Rng::new();
        other.restore(&saved).unwrap();
        driver.start(&mut other, F_COMMON).unwrap();
        while counter(&other, "entropy_rate_limiter_throttled") == 0 {
            std::thread::yield_now();
        }
        other.update(&Change::Limits(ops(1, 1000))).unwrap();
        assert_eq!(driver.wait_used(0).unwrap().len, 16);
        let broken = LimiterState { ops: None, bandwidth: None };
        other.restore(&Section::new(KIND, VERSION, &Saved { limiter: broken })).unwrap();
        assert_eq!(other.throttle.config(), LimiterConfig::default());
    }

    #[test]
    fn a_device_that_was_saved_before_there_were_limits_comes_back() {
        let mut rng = Rng::new();
        let saved = |version, bytes| Section { kind: KIND.to_owned(), version, bytes };
        rng.restore(&saved(1, Vec::new())).unwrap();
        rng.restore(&saved(2, vec![0, 0])).unwrap();
        let error = rng.restore(&saved(3, vec![0, 0])).unwrap_err().to_string();
        assert!(error.contains("version 3; this build writes version 2"), "{error}");
        assert!(rng.restore(&saved(1, vec![0, 0])).is_err() && rng.restore(&saved(2, Vec::new())).is_err());
    }

    #[test]
    fn bytes_count_as_they_are_given_and_a_huge_request_passes() {
        let bandwidth =
            crate::limiter::BucketConfig { size: 100, one_time_burst: 0, refill_time_ms: 1 << 40 };
        let mut rng = Rng::limited(LimiterConfig { bandwidth: Some(bandwidth), ops: None });
        let mut driver = Driver::for_device(&rng);
        driver.start(&mut rng, F_COMMON).unwrap();
        let huge = driver.writable(1 << 20);
        assert_eq!(driver.request(0, &[huge]), Some(RNG_REQUEST_MAX));
        driver.stop(&mut rng).unwrap();
        let debt = rng.throttle.save().bandwidth.unwrap().debt;
        assert_eq!(debt, u64::from(RNG_REQUEST_MAX) - 100);
    }

    #[test]
    fn a_broken_ring_asks_for_a_reset_and_a_new_start_serves_again() {
        let (mut rng, mut driver) = started();
        driver.rings[0].write_desc(0, Desc { address: u64::MAX - 8, len: 64, flags: Desc::WRITE, next: 0 });
        driver.rings[0].offer(0);
        driver.kick(0);
        assert!(driver.signals.wait(|counts| counts.needs_reset == 1));
        driver.stop(&mut rng).unwrap();
        rng.reset();
        driver.rings[0].clear();
        driver.start(&mut rng, F_COMMON).unwrap();
        let buffer = driver.writable(32);
        assert_eq!(driver.request(0, &[buffer]), Some(32));
    }

    #[test]
    fn a_stopped_device_goes_on_where_it_stood() {
        let (mut rng, mut driver) = started();
        let buffer = driver.writable(16);
        assert_eq!(driver.request(0, &[buffer]), Some(16));
        let positions = driver.stop(&mut rng).unwrap();
        assert_eq!((positions[0].1.next_avail, positions[0].1.next_used), (1, 1));
        // What comes while the device is stopped is found by the first look.
        driver.rings[0].add(&[buffer]);
        let saved = rng.save();
        let mut other = Rng::new();
        other.restore(&saved).unwrap();
        driver.start(&mut other, F_COMMON).unwrap();
        assert_eq!(driver.wait_used(0).unwrap().len, 16);
    }
}
