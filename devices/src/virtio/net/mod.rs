//! The network device (VIRTIO 1.2 section 5.1): frames between a guest and a tap.
//!
//! ```text
//!   mod.rs      Net: features, configuration space, start and stop    (register half)
//!   tap.rs      a tap, opened and checked; port.rs: what is needed of it
//!   worker.rs   Pair: one receive and one send queue                  (queue half)
//!   rx.rs       host to guest: readv into the guest's buffers, kept ready by pool.rs
//!   tx.rs       guest to host: writev from them, header checked by header.rs
//!   control.rs  how many pairs the driver uses
//!   detour.rs   the way to the metadata service, past the tap
//! ```
//!
//! Frames are never copied in this process. Checksums and segmentation are left to whoever
//! needs them done: frames of up to 64 KiB cross in one piece, with a header that says what
//! is still to do. One worker serves a device with one queue pair; with more, each pair has
//! its own.
//!
//! A tap that is deleted while the machine runs takes the link down and nothing else: the
//! driver is told by the status field, and [`Change::Backing`] plugs the device into another
//! (or the same, made again).

mod control;
mod detour;
pub mod header;
mod pool;
pub mod port;
mod rx;
mod saved;
mod tally;
pub mod tap;
mod tx;
mod worker;

use std::{
    fmt, io,
    str::FromStr,
    sync::{Arc, atomic::Ordering},
};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
};
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

use self::{
    control::{Control, use_pairs},
    rx::Rx,
    saved::Saved,
    tally::Tally,
    tx::Tx,
    worker::{Pair, RX_TIMER, Shared, TX_TIMER},
};
pub use self::{
    port::Port,
    tap::{Tap, TapError, TapSource},
};
use crate::{
    Memory,
    limiter::{Gate, LimiterConfig, Throttle},
    limits::{NET_PAIRS_MAX, NET_QUEUE_SIZE},
    mmds::Detour,
    state::{Section, StateError},
    virtio::{
        About, Active, Change, DeviceError, F_COMMON, Interrupt, VirtioDevice,
        queue::{Chain, Queue},
        read_config_bytes,
    },
    worker::{Handler, HandlerId, Worker},
};

const KIND: &str = "virtio-net";
/// Smallest MTU that IPv4 can live with (RFC 791) and that the feature may announce.
const MTU_MIN: u16 = 68;

/// The address of a network interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// A random unicast address from the locally administered range.
    pub fn random() -> io::Result<Mac> {
        let mut bytes = [0u8; 6];
        // SAFETY: the pointer and length are those of a live array.
        let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        if got != bytes.len() as isize {
            return Err(io::Error::last_os_error());
        }
        bytes[0] = bytes[0] & !1 | 2;
        Ok(Mac(bytes))
    }
}

/// The text is not a MAC address of one interface.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a unicast MAC address like 06:00:ac:10:00:02")]
pub struct NotMac(String);

impl FromStr for Mac {
    type Err = NotMac;

    fn from_str(text: &str) -> Result<Mac, NotMac> {
        let wrong = || NotMac(text.to_owned());
        let mut bytes = [0u8; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
            *byte = u8::from_str_radix(part.ok_or_else(wrong)?, 16).map_err(|_| wrong())?;
        }
        let unicast = bytes[0] & 1 == 0 && bytes != [0; 6];
        if parts.next().is_some() || !unicast { Err(wrong()) } else { Ok(Mac(bytes)) }
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// What a network device is to be.
#[derive(Debug)]
pub struct NetConfig {
    /// The host's side.
    pub tap: TapSource,
    /// The guest's address; a random one when absent.
    pub mac: Option<Mac>,
    /// Largest packet announced to the guest, 68 to 65535 bytes; nothing when absent.
    pub mtu: Option<u16>,
    /// Queue pairs, 1 to [`NET_PAIRS_MAX`].
    pub pairs: u16,
    /// Drop frames that the guest sends from another address than its own. It cannot bridge
    /// then.
    pub drop_spoofed: bool,
    /// Limits of frames and their bytes towards the guest.
    pub rx_limits: LimiterConfig,
    /// Limits of frames and their bytes from the guest.
    pub tx_limits: LimiterConfig,
}

/// Why a network device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The tap cannot be used.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The number of queue pairs is out of range.
    #[error("A network device has 1 to {NET_PAIRS_MAX} queue pairs, not {0}")]
    Pairs(u16),
    /// The MTU is out of range.
    #[error("An MTU of {0} is too small; at least {MTU_MIN} bytes are needed")]
    Mtu(u16),
    /// No random address could be had.
    #[error("A random MAC address cannot be made")]
    Random(#[source] io::Error),
}

/// What is needed to go on serving after a stop that the driver does not see.
struct Started {
    memory: Memory,
    features: u64,
    interrupt: Arc<dyn Interrupt>,
    worker: Worker,
    /// The doorbells by queue index.
    kicks: Vec<(u16, EventFd)>,
    handlers: Vec<(Worker, HandlerId)>,
    /// Queues that a driver enabled although it did not negotiate as many.
    idle: Vec<Queue>,
}

/// A handler with the number of its pair; the control queue's has none.
type Numbered = (Option<u16>, Box<dyn Handler>);

/// A network device.
pub struct Net {
    about: About,
    mac: Mac,
    /// It was asked for, not made up here.
    mac_was_given: bool,
    mtu: Option<u16>,
    pairs: u16,
    drop_spoofed: bool,
    mmds: Option<Detour>,
    port: Arc<dyn Port>,
    shared: Arc<Shared>,
    started: Option<Started>,
}

impl Net {
    /// A device on a tap, which is opened now.
    pub fn new(config: NetConfig) -> Result<Net, NetError> {
        check(config.pairs, config.mtu)?;
        let NetConfig { tap, mac, mtu, pairs, drop_spoofed, rx_limits, tx_limits } = config;
        let mut net = Net::with_port(Arc::new(Tap::open(tap, pairs)?), mac, mtu)?;
        net.drop_spoofed = drop_spoofed;
        net.limit(rx_limits, tx_limits);
        Ok(net)
    }

    /// A device on any port, with as many queue pairs as that has descriptors.
    pub fn with_port(port: Arc<dyn Port>, mac: Option<Mac>, mtu: Option<u16>) -> Result<Net, NetError> {
        let pairs = u16::try_from(port.descriptors().len()).unwrap_or(u16::MAX);
        check(pairs, mtu)?;
        let mac_was_given = mac.is_some();
        let mac = mac.map_or_else(Mac::random, Ok).map_err(NetError::Random)?;
        let mut features = F_COMMON
            | 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_STATUS
            | 1 << VIRTIO_NET_F_MRG_RXBUF
            | offered(port.offloads());
        features |= mtu.map_or(0, |_| 1 << VIRTIO_NET_F_MTU);
        let mut queues = vec![NET_QUEUE_SIZE; 2 * usize::from(pairs)];
        if pairs > 1 {
            features |= 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ;
            queues.push(NET_QUEUE_SIZE);
        }
        let about =
            About { kind: KIND, device_id: 1, pci_class: 0x02_0000, features, queues, config_len: 12 };
        let shared = Arc::new(Shared::default());
        use_pairs(&*port, &shared, 1);
        Ok(Net {
            about,
            mac,
            mac_was_given,
            mtu,
            pairs,
            drop_spoofed: false,
            mmds: None,
            port,
            shared,
            started: None,
        })
    }

    /// The address the guest sees.
    pub fn mac(&self) -> Mac {
        self.mac
    }

    /// Whether the host's side is there.
    pub fn link_is_up(&self) -> bool {
        !self.shared.link_down.load(Ordering::Acquire)
    }

    /// Changes the limits; pairs that wait for the old ones look again.
    fn limit(&self, rx: LimiterConfig, tx: LimiterConfig) {
        self.shared.rx_limits.change(rx);
        self.shared.tx_limits.change(tx);
        for (_, kick) in self.started.iter().flat_map(|started| &started.kicks) {
            let _ = kick.write(1);
        }
    }

    fn config(&self) -> [u8; 12] {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.mac.0);
        let status = if self.link_is_up() { VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
        config[6..8].copy_from_slice(&status.to_le_bytes());
        config[8..10].copy_from_slice(&self.pairs.to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        config
    }

    /// Puts every queue into a handler: pairs first, then the control queue.
    fn serve(&mut self, active: Active) -> Result<(), DeviceError> {
        let Active { memory, features, queues, interrupt, worker } = active;
        let host = |what: &str| {
            let what = format!("A network device cannot {what}");
            move |source| DeviceError::Host { what: what.clone(), source }
        };
        let flags = wanted(features);
        self.port.set_offloads(flags).map_err(host("set the offloads of its tap"))?;
        let several = features & 1 << VIRTIO_NET_F_MQ != 0;
        let pairs = if several { self.pairs } else { 1 };
        let mut kicks = Vec::new();
        for (queue, kick) in &queues {
            kicks.push((queue.index(), kick.try_clone().map_err(host("copy a doorbell"))?));
        }
        // Behind the pairs there is the control queue (section 5.1.2), and behind that nothing.
        let (queues, idle): (Vec<_>, Vec<_>) =
            queues.into_iter().partition(|(queue, _)| queue.index() <= 2 * pairs);
        let idle = idle.into_iter().map(|(queue, _)| queue).collect();
        let started = Started { memory, features, interrupt, worker, kicks, handlers: Vec::new(), idle };
        let handlers = self.handlers(&started, queues, pairs).map_err(host("copy a doorbell"))?;
        let own = handlers.iter().filter(|(pair, _)| pair.is_some()).count() > 1;
        self.started = Some(started);
        for (pair, handler) in handlers {
            let Some(started) = &mut self.started else { break };
            let worker = match pair {
                Some(pair) if own => Worker::new(&format!("net-q{pair}")),
                _ => started.worker.clone(),
            };
            match worker.add(handler) {
                Ok(id) => started.handlers.push((worker, id)),
                Err(source) => {
                    let _ = self.stop();
                    return Err(host("start its worker")(source));
                }
            }
        }
        Ok(())
    }

    /// The handlers for `queues`.
    fn handlers(
        &self,
        started: &Started,
        queues: Vec<(Queue, EventFd)>,
        pairs: u16,
    ) -> io::Result<Vec<Numbered>> {
        let features = started.features;
        let mergeable = features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        let source = self.drop_spoofed.then_some(self.mac.0);
        let gate = |throttle: &Arc<Throttle>, token| Gate::new(Arc::clone(throttle), token);
        let mut control = None;
        let mut halves: Vec<(Option<Rx>, Option<Tx>)> = (0..pairs).map(|_| (None, None)).collect();
        for (queue, kick) in queues {
            let index = queue.index();
            match halves.get_mut(usize::from(index / 2)) {
                Some((rx, _)) if index % 2 == 0 => {
                    *rx = Some(Rx::new(queue, kick, gate(&self.shared.rx_limits, RX_TIMER), mergeable));
                }
                Some((_, tx)) => {
                    let gate = gate(&self.shared.tx_limits, TX_TIMER);
                    let mut half = Tx::new(queue, kick, gate, features, source);
                    half.mmds = self.mmds.clone();
                    *tx = Some(half);
                }
                None => control = Some((queue, kick)),
            }
        }
        let mut handlers: Vec<Numbered> = Vec::new();
        for (number, (rx, tx)) in (0..pairs).zip(halves) {
            if rx.is_some() || tx.is_some() {
                handlers.push((Some(number), Box::new(self.pair(started, number, rx, tx))));
            }
        }
        if let Some((queue, kick)) = control {
            let bells = started.kicks.iter().filter(|(index, _)| *index < 2 * pairs && index % 2 == 0);
            let bells = bells.map(|(_, bell)| bell.try_clone()).collect::<io::Result<Vec<_>>>()?;
            let control = Control {
                queue,
                kick,
                chain: Chain::new(),
                port: Arc::clone(&self.port),
                shared: Arc::clone(&self.shared),
                interrupt: Arc::clone(&started.interrupt),
                pairs_max: pairs,
                pairs: bells,
                spoiled: false,
            };
            handlers.push((None, Box::new(control)));
        }
        Ok(handlers)
    }

    fn pair(&self, started: &Started, number: u16, rx: Option<Rx>, tx: Option<Tx>) -> Pair {
        Pair {
            number,
            rx,
            tx,
            port: Arc::clone(&self.port),
            shared: Arc::clone(&self.shared),
            interrupt: Arc::clone(&started.interrupt),
            status: started.features & 1 << VIRTIO_NET_F_STATUS != 0,
            watched: EventSet::empty(),
            blocked: false,
            gone: false,
            rx_spoiled: false,
            tx_spoiled: false,
            mmds: self.mmds.clone(),
            tally: Tally::default(),
        }
    }

    /// Stops serving; what is needed to go on comes back with the queues.
    fn halt(&mut self) -> Result<Option<(Started, Vec<Queue>)>, DeviceError> {
        let Some(mut started) = self.started.take() else { return Ok(None) };
        let mut queues = std::mem::take(&mut started.idle);
        let mut failed = None;
        for (worker, id) in std::mem::take(&mut started.handlers) {
            match worker.remove(id) {
                Ok(mut found) => queues.append(&mut found),
                Err(source) => failed = Some(source),
            }
        }
        match failed {
            Some(source) => {
                Err(DeviceError::Host { what: "A network device cannot stop its worker".to_owned(), source })
            }
            None => Ok(Some((started, queues))),
        }
    }

    /// Plugs the device into another port; the driver sees the link go up.
    pub fn replug(&mut self, port: Arc<dyn Port>) -> Result<(), DeviceError> {
        let missing = self.about.features & !(self.about.features & !OFFLOADS | offered(port.offloads()));
        if port.descriptors().len() != usize::from(self.pairs) || missing != 0 {
            let text = "The new tap has another number of queues or fewer offloads than the old one";
            return Err(DeviceError::Change(text.to_owned()));
        }
        let told = self.started.as_ref().map(|started| Arc::clone(&started.interrupt));
        let broken = |_: &DeviceError| told.iter().for_each(|driver| driver.needs_reset());
        let halted = self.halt().inspect_err(broken)?;
        let pairs = self.shared.pairs.load(Ordering::Acquire);
        self.port = port;
        use_pairs(&*self.port, &self.shared, pairs);
        self.shared.link_down.store(false, Ordering::Release);
        let Some((started, queues)) = halted else { return Ok(()) };
        let Started { memory, features, interrupt, worker, mut kicks, .. } = started;
        let mut pairs = Vec::new();
        for queue in queues {
            let found = kicks.iter().position(|(index, _)| *index == queue.index());
            if let Some(at) = found {
                let (_, kick) = kicks.swap_remove(at);
                // What came while nobody looked is seen.
                let _ = kick.write(1);
                pairs.push((queue, kick));
            }
        }
        self.serve(Active { memory, features, queues: pairs, interrupt, worker }).inspect_err(broken)?;
        if features & 1 << VIRTIO_NET_F_STATUS != 0 {
            told.iter().for_each(|driver| driver.config());
        }
        Ok(())
    }
}

impl VirtioDevice for Net {
    fn about(&self) -> &About {
        &self.about
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn start(&mut self, active: Active) -> Result<(), DeviceError> {
        self.serve(active)
    }

    fn stop(&mut self) -> Result<Vec<Queue>, DeviceError> {
        Ok(self.halt()?.map_or_else(Vec::new, |(_, queues)| queues))
    }

    fn reset(&mut self) {
        use_pairs(&*self.port, &self.shared, 1);
        self.mmds.iter().for_each(Detour::reset);
    }

    fn save(&self) -> Section {
        let pairs_in_use = self.shared.pairs.load(Ordering::Acquire);
        let (rx, tx) = (self.shared.rx_limits.save(), self.shared.tx_limits.save());
        let saved = Saved { mac: self.mac, mtu: self.mtu, pairs: self.pairs, pairs_in_use, rx, tx };
        saved.section()
    }

    fn restore(&mut self, section: &Section) -> Result<(), DeviceError> {
        let saved = Saved::read(section)?;
        let impossible = |reason: String| StateError::Impossible { kind: KIND, reason };
        if saved.pairs != self.pairs || saved.mtu.is_some() != self.mtu.is_some() {
            let (now, then) = (self.pairs, saved.pairs);
            let reason =
                format!("it had {then} queue pairs and MTU {:?}, not {now} and {:?}", saved.mtu, self.mtu);
            return Err(impossible(reason).into());
        }
        if !(1..=saved.pairs).contains(&saved.pairs_in_use) {
            let reason = format!("{} of {} queue pairs are in use", saved.pairs_in_use, saved.pairs);
            return Err(impossible(reason).into());
        }
        self.shared.rx_limits.restore(&saved.rx).map_err(impossible)?;
        self.shared.tx_limits.restore(&saved.tx).map_err(impossible)?;
        // One that was asked for is the saved one, or another that its guest is told of.
        if !self.mac_was_given {
            self.mac = saved.mac;
        }
        self.mtu = saved.mtu;
        use_pairs(&*self.port, &self.shared, saved.pairs_in_use);
        Ok(())
    }

    /// [`Change::Backing`] with the name of a tap plugs the device into that;
    /// [`Change::DirectionLimits`] limits frames and bytes anew.
    fn update(&mut self, change: &Change) -> Result<(), DeviceError> {
        let name = match change {
            Change::Backing(Some(name)) => name,
            Change::Backing(None) => {
                let text = "A network device needs the name of its new tap";
                return Err(DeviceError::Change(text.to_owned()));
            }
            Change::DirectionLimits { rx, tx } => {
                self.limit(*rx, *tx);
                return Ok(());
            }
            _ => {
                let text = format!("A network device cannot be changed by {change:?}");
                return Err(DeviceError::Change(text));
            }
        };
        let source = TapSource::Name { name: name.to_string_lossy().into_owned(), create: false };
        let tap = Tap::open(source, self.pairs);
        let tap = tap.map_err(|e| DeviceError::Host {
            what: format!("A network device cannot be plugged into tap {}", name.display()),
            source: io::Error::other(e),
        })?;
        self.replug(Arc::new(tap))
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let (rx, rx_woken) = self.shared.rx_limits.counters();
        let (tx, tx_woken) = self.shared.tx_limits.counters();
        let limiters = [
            ("rx_rate_limiter_throttled", rx),
            ("rx_event_rate_limiter_count", rx_woken),
            ("tx_rate_limiter_throttled", tx),
            ("tx_rate_limiter_event_count", tx_woken),
        ];
        self.shared.counters.list().into_iter().chain(limiters).collect()
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

fn check(pairs: u16, mtu: Option<u16>) -> Result<(), NetError> {
    if !(1..=NET_PAIRS_MAX).contains(&pairs) {
        return Err(NetError::Pairs(pairs));
    }
    mtu.filter(|mtu| *mtu < MTU_MIN).map_or(Ok(()), |mtu| Err(NetError::Mtu(mtu)))
}

/// Which of the tap's offloads stands behind which feature, towards the guest.
const TO_GUEST: [(u32, u32); 6] = [
    (libc::TUN_F_CSUM, VIRTIO_NET_F_GUEST_CSUM),
    (libc::TUN_F_TSO4, VIRTIO_NET_F_GUEST_TSO4),
    (libc::TUN_F_TSO6, VIRTIO_NET_F_GUEST_TSO6),
    (libc::TUN_F_UFO, VIRTIO_NET_F_GUEST_UFO),
    (libc::TUN_F_USO4, VIRTIO_NET_F_GUEST_USO4),
    (libc::TUN_F_USO6, VIRTIO_NET_F_GUEST_USO6),
];

/// And towards the host, which takes whatever its kernel knows.
const TO_HOST: [(u32, u32); 5] = [
    (libc::TUN_F_CSUM, VIRTIO_NET_F_CSUM),
    (libc::TUN_F_TSO4, VIRTIO_NET_F_HOST_TSO4),
    (libc::TUN_F_TSO6, VIRTIO_NET_F_HOST_TSO6),
    (libc::TUN_F_UFO, VIRTIO_NET_F_HOST_UFO),
    (libc::TUN_F_USO4, VIRTIO_NET_F_HOST_USO),
];

/// All features that depend on the tap.
const OFFLOADS: u64 = {
    let mut bits = 0u64;
    let mut i = 0;
    while i < TO_GUEST.len() {
        bits |= 1 << TO_GUEST[i].1;
        i += 1;
    }
    i = 0;
    while i < TO_HOST.len() {
        bits |= 1 << TO_HOST[i].1;
        i += 1;
    }
    bits
};

/// Features to offer over a port with these offloads.
fn offered(flags: u32) -> u64 {
    let known = TO_GUEST.iter().chain(&TO_HOST).filter(|(flag, _)| flags & flag != 0);
    known.fold(0, |features, (_, bit)| features | 1 << bit)
}

/// Offloads to ask of the port for a driver that accepted `features`. The kernel refuses
/// segmentation without checksums and one half of UDP segmentation without the other.
fn wanted(features: u64) -> u32 {
    let asked = TO_GUEST.iter().filter(|(_, bit)| features & 1 << bit != 0);
    let flags = asked.fold(0, |flags, (flag, _)| flags | flag);
    let both = libc::TUN_F_USO4 | libc::TUN_F_USO6;
    match flags {
        _ if flags & libc::TUN_F_CSUM == 0 => 0,
        _ if flags & both != both => flags & !both,
        _ => flags,
    }
}

/// Whether an error of the host's side means that it will not come back.
fn is_gone(error: &io::Error) -> bool {
    const GONE: [i32; 8] = [
        libc::EBADFD,
        libc::EBADF,
        libc::ENODEV,
        libc::ENXIO,
        libc::EPIPE,
        libc::ECONNRESET,
        libc::ECONNREFUSED,
        libc::ENOTCONN,
    ];
    error.raw_os_error().is_some_and(|code| GONE.contains(&code))
}

#[cfg(test)]
mod tests;
