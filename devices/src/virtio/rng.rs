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

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

use crate::{
    limits::{RNG_REQUEST_MAX, TURN_BUDGET},
    state::Section,
    virtio::{
        About, Active, DeviceError, F_COMMON, Interrupt, VirtioDevice,
        queue::{Chain, Queue, QueueError},
    },
    worker::{Handler, HandlerId, Source, Watch, Worker},
};

const KIND: &str = "virtio-rng";
const VERSION: u16 = 1;
const QUEUE_SIZE: u16 = 64;

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
    running: Option<(Worker, HandlerId)>,
}

impl Rng {
    /// A device nobody has driven yet.
    pub fn new() -> Rng {
        let about = About {
            kind: KIND,
            device_id: 4,
            // Neither storage nor network nor anything else that PCI has a class for.
            pci_class: 0x00ff_0000,
            features: F_COMMON,
            queues: vec![QUEUE_SIZE],
            config_len: 0,
        };
        Rng { about, counters: Arc::default(), running: None }
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
        let server = Server { queue, kick, chain: Chain::new(), interrupt, counters };
        let id = worker.add(Box::new(server)).map_err(|source| host("started", source))?;
        self.running = Some((worker, id));
        Ok(())
    }

    fn stop(&mut self) -> Result<Vec<Queue>, DeviceError> {
        let Some((worker, id)) = self.running.take() else { return Ok(Vec::new()) };
        worker.remove(id).map_err(|source| host("stopped", source))
    }

    fn save(&self) -> Section {
        Section::new(KIND, VERSION, &())
    }

    fn restore(&mut self, section: &Section) -> Result<(), DeviceError> {
        Ok(section.open::<()>(KIND, VERSION)?)
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let Counters { requests, bytes, errors } = &*self.counters;
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![("requests", of(requests)), ("bytes", of(bytes)), ("errors", of(errors))]
    }
}

fn host(what: &str, source: std::io::Error) -> DeviceError {
    DeviceError::Host { what: format!("The entropy device cannot be {what}"), source }
}

/// The queue half: owns the queue and lives on a worker.
struct Server {
    queue: Queue,
    kick: EventFd,
    chain: Chain,
    interrupt: Arc<dyn Interrupt>,
    counters: Arc<Counters>,
}

impl Handler for Server {
    fn sources(&self) -> Vec<Source> {
        vec![Source::readable(&self.kick, 0)]
    }

    fn ready(&mut self, _token: u32, _events: EventSet, watch: &mut Watch<'_>) {
        let _ = self.kick.read();
        let served = self.serve();
        if self.queue.publish() {
            self.interrupt.queue(self.queue.index());
        }
        match served {
            Ok(true) => {
                // The budget is spent and requests are left: back in line behind the others.
                let _ = self.kick.write(1);
            }
            Ok(false) => {}
            Err(error) => {
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
    /// Answers up to a turn's budget of requests; true when more may be waiting.
    fn serve(&mut self) -> Result<bool, QueueError> {
        self.queue.disarm();
        for _ in 0..TURN_BUDGET {
            // Between the last look and `arm` a request may have come that rings no bell.
            while !self.queue.pop(&mut self.chain)? {
                if !self.queue.arm() {
                    return Ok(false);
                }
            }
            let filled = fill(self.chain.writable());
            self.queue.mark_written(&self.chain, u64::from(filled));
            self.queue.push(self.chain.head(), filled);
            self.counters.requests.fetch_add(1, Ordering::Relaxed);
            self.counters.bytes.fetch_add(u64::from(filled), Ordering::Relaxed);
        }
        Ok(true)
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
