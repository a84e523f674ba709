//! The device over sockets that keep frames apart, driven by the software driver.

mod hostile;
mod limits;
mod metadata;
mod traffic;

use std::{
    collections::HashMap,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::{
        Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use super::*;
use crate::virtio::driver::{Buffer, Driver, PATIENCE};

const MRG: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const STATUS: u64 = 1 << VIRTIO_NET_F_STATUS;
const ALL_FLAGS: u32 = libc::TUN_F_CSUM
    | libc::TUN_F_TSO4
    | libc::TUN_F_TSO6
    | libc::TUN_F_UFO
    | libc::TUN_F_USO4
    | libc::TUN_F_USO6;
const ADDRESS: Mac = Mac([2, 0, 0, 0, 0, 7]);

/// One socket a pair, instead of a tap.
struct Sockets {
    ends: Vec<OwnedFd>,
    flags: AtomicU32,
    attached: Mutex<Vec<bool>>,
}

impl Port for Sockets {
    fn descriptors(&self) -> &[OwnedFd] {
        &self.ends
    }
    fn offloads(&self) -> u32 {
        ALL_FLAGS
    }
    fn set_offloads(&self, flags: u32) -> io::Result<()> {
        self.flags.store(flags, Ordering::SeqCst);
        Ok(())
    }
    fn set_attached(&self, pair: usize, attached: bool) -> io::Result<()> {
        self.attached.lock().unwrap()[pair] = attached;
        Ok(())
    }
}

/// The far end of a socket.
struct Peer(OwnedFd);

impl Peer {
    /// Sends a frame, header included; false when the socket is full.
    fn send(&self, frame: &[u8]) -> bool {
        // SAFETY: the pointer and length are those of a live slice.
        let sent =
            unsafe { libc::send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), libc::MSG_DONTWAIT) };
        sent == frame.len() as isize
    }

    /// Takes a frame, header included, waiting for it.
    fn take(&self) -> Option<Vec<u8>> {
        self.take_for(PATIENCE)
    }

    fn take_for(&self, limit: Duration) -> Option<Vec<u8>> {
        let mut poll = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let mut frame = vec![0; 100_000];
        // SAFETY: a pollfd and a buffer that live across the calls.
        let got = unsafe {
            if libc::poll(&raw mut poll, 1, limit.as_millis() as i32) <= 0 {
                return None;
            }
            libc::recv(self.0.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len(), libc::MSG_DONTWAIT)
        };
        frame.truncate(usize::try_from(got).ok()?);
        Some(frame)
    }
}

fn sockets(pairs: usize) -> (Arc<Sockets>, Vec<Peer>) {
    let (mut ends, mut peers) = (Vec::new(), Vec::new());
    for _ in 0..pairs {
        let mut fds = [0; 2];
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // SAFETY: the call fills in two descriptors, which nobody else owns.
        unsafe {
            assert_eq!(libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()), 0);
            ends.push(OwnedFd::from_raw_fd(fds[0]));
            peers.push(Peer(OwnedFd::from_raw_fd(fds[1])));
        }
    }
    let attached = Mutex::new(vec![true; pairs]);
    (Arc::new(Sockets { ends, flags: AtomicU32::new(0), attached }), peers)
}

/// A guest, its device and the far end.
struct Rig {
    net: Net,
    driver: Driver,
    port: Arc<Sockets>,
    peers: Vec<Peer>,
    features: u64,
    /// Receive buffers by queue and head.
    posted: HashMap<(u16, u32), Vec<Buffer>>,
    /// Receive buffers that came back.
    returned: Vec<Vec<Buffer>>,
    /// Memory for frames to be sent, reused.
    scratch: u64,
}

const SCRATCH: u64 = 2 << 20;

fn rig_of(pairs: usize, features: u64) -> Rig {
    let (port, peers) = sockets(pairs);
    let net = Net::with_port(port.clone(), Some(ADDRESS), None).unwrap();
    let features = F_COMMON | features;
    assert_eq!(features & !net.about().features, 0, "not offered");
    let mut driver = Driver::for_device(&net);
    let scratch = driver.alloc(SCRATCH, 4096);
    Rig { net, driver, port, peers, features, posted: HashMap::new(), returned: Vec::new(), scratch }
}

fn rig(features: u64) -> Rig {
    let mut rig = rig_of(1, features);
    rig.start();
    rig
}

impl Rig {
    fn start(&mut self) {
        self.driver.start(&mut self.net, self.features).unwrap();
    }

    fn stop(&mut self) {
        self.driver.stop(&mut self.net).unwrap();
    }

    /// Posts one receive buffer on `queue` made of pieces of these lengths.
    fn post_on(&mut self, queue: u16, pieces: &[u32]) {
        let buffers: Vec<Buffer> = pieces.iter().map(|len| self.driver.writable(*len)).collect();
        let head = self.driver.send(queue, &buffers);
        self.posted.insert((queue, u32::from(head)), buffers);
    }

    /// Posts everything that came back again.
    fn repost(&mut self) {
        for buffers in std::mem::take(&mut self.returned) {
            let head = self.driver.send(0, &buffers);
            self.posted.insert((0, u32::from(head)), buffers);
        }
    }

    fn post(&mut self, pieces: &[u32]) {
        self.post_on(0, pieces);
    }

    /// Takes the next frame from `queue`: its bytes, header included, and its buffer count.
    fn receive_on(&mut self, queue: u16) -> (Vec<u8>, u16) {
        let mut frame = Vec::new();
        let (mut count, mut total) = (0, 1);
        while count < total {
            let used = self.driver.wait_used(queue).expect("a frame");
            let buffers = self.posted.remove(&(queue, used.head)).expect("a posted buffer");
            let mut left = used.len as usize;
            for buffer in &buffers {
                let part = left.min(buffer.len as usize);
                frame.extend(self.driver.peek(buffer.address, part));
                left -= part;
            }
            assert_eq!(left, 0, "more bytes than the buffer has");
            self.returned.push(buffers);
            count += 1;
            if count == 1 {
                total = u16::from_le_bytes([frame[10], frame[11]]);
            }
        }
        (frame, total)
    }

    fn receive(&mut self) -> (Vec<u8>, u16) {
        self.receive_on(0)
    }

    /// Sends `bytes`, header included, cut into pieces of these lengths (the last takes the
    /// rest), and waits until they are taken.
    fn send(&mut self, bytes: &[u8], pieces: &[usize]) {
        self.driver.poke(self.scratch, bytes);
        let (mut buffers, mut at) = (Vec::new(), 0);
        for len in pieces.iter().copied().chain([usize::MAX]) {
            let len = len.min(bytes.len() - at);
            if len > 0 {
                buffers.push(Buffer::readable(self.scratch + at as u64, len as u32));
                at += len;
            }
        }
        assert_eq!(self.driver.request(1, &buffers), Some(0));
    }

    fn counter(&self, name: &str) -> u64 {
        self.net.counters().into_iter().find(|(n, _)| *n == name).unwrap().1
    }

    fn wait_counter(&self, name: &str, value: u64) {
        let end = Instant::now() + PATIENCE;
        while self.counter(name) < value {
            assert!(Instant::now() < end, "{name} is {}, not {value}", self.counter(name));
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A frame of `len` bytes after an empty header, different for each `seed`.
fn frame(len: usize, seed: u32) -> Vec<u8> {
    let mut bytes = vec![0; header::LEN];
    bytes.extend((0..len as u32).map(|i| (i.wrapping_mul(31) ^ seed.wrapping_mul(7) ^ i >> 8) as u8));
    bytes
}

/// `frame` as a guest gets it.
fn with_count(mut frame: Vec<u8>, count: u16) -> Vec<u8> {
    frame[10..12].copy_from_slice(&count.to_le_bytes());
    frame
}

/// A small generator of repeatable numbers.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % below.max(1) as u64) as usize
    }
}

#[test]
fn addresses_are_read_and_printed() {
    let mac: Mac = "06:00:AC-10:00:02".parse().unwrap();
    assert_eq!((mac.0, mac.to_string().as_str()), ([6, 0, 0xac, 0x10, 0, 2], "06:00:ac:10:00:02"));
    for text in ["", "06:00:ac:10:00", "06:00:ac:10:00:02:03", "6:0:ac:10:0:2", "01:00:5e:00:00:01"] {
        assert!(text.parse::<Mac>().is_err(), "{text:?}");
    }
    assert!("00:00:00:00:00:00".parse::<Mac>().is_err() && "+6:00:ac:10:00:02".parse::<Mac>().is_err());
    let random = Mac::random().unwrap();
    assert_eq!(random.0[0] & 3, 2, "locally administered, unicast");
}

#[test]
fn the_configuration_says_what_was_asked_for() {
    let (port, _peers) = sockets(2);
    let net = Net::with_port(port.clone(), Some(ADDRESS), Some(1400)).unwrap();
    let mut config = [0xff; 12];
    net.read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 7, 1, 0, 2, 0, 0x78, 5]);
    let features = net.about().features;
    for bit in [VIRTIO_NET_F_MQ, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MTU, VIRTIO_NET_F_HOST_USO] {
        assert_ne!(features & 1 << bit, 0);
    }
    assert_eq!(net.about().queues.len(), 5);
    assert!(matches!(Net::with_port(port, None, Some(67)), Err(NetError::Mtu(67))));
    let (port, _peers) = sockets(0);
    assert!(matches!(Net::with_port(port, None, None), Err(NetError::Pairs(0))));
}

#[test]
fn the_tap_is_asked_for_what_the_driver_accepted() {
    let bits = |bits: &[u32]| bits.iter().fold(0u64, |all, bit| all | 1 << bit);
    let (csum, tso4, uso4, uso6) =
        (VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6);
    assert_eq!(wanted(bits(&[csum, tso4])), libc::TUN_F_CSUM | libc::TUN_F_TSO4);
    assert_eq!(wanted(bits(&[tso4])), 0, "segmentation without checksums is refused by the kernel");
    assert_eq!(wanted(bits(&[csum, uso4])), libc::TUN_F_CSUM);
    assert_eq!(wanted(bits(&[csum, uso4, uso6])), ALL_FLAGS & !0x1e);
    assert_eq!(offered(0), 0);
    let rig = rig(bits(&[csum, tso4]));
    assert_eq!(rig.port.flags.load(Ordering::SeqCst), libc::TUN_F_CSUM | libc::TUN_F_TSO4);
}

#[test]
fn state_is_taken_over_by_a_device_of_the_same_shape() {
    let first = rig_of(2, 0);
    use_pairs(&*first.net.port, &first.net.shared, 2);
    let (port, _peers) = sockets(2);
    let mut second = Net::with_port(port.clone(), None, None).unwrap();
    assert_eq!(*port.attached.lock().unwrap(), [true, false]);
    second.restore(&first.net.save()).unwrap();
    assert_eq!((second.mac(), port.attached.lock().unwrap()[1]), (ADDRESS, true));
    second.reset();
    assert!(!port.attached.lock().unwrap()[1], "a reset goes back to one pair");
    let good = || Saved::read(&first.net.save()).unwrap();
    for saved in [
        Saved { mac: ADDRESS, mtu: None, pairs: 1, pairs_in_use: 1, ..good() },
        Saved { mac: ADDRESS, mtu: Some(1500), pairs: 2, pairs_in_use: 1, ..good() },
        Saved { mac: ADDRESS, mtu: None, pairs: 2, pairs_in_use: 3, ..good() },
        Saved { mac: ADDRESS, mtu: None, pairs: 2, pairs_in_use: 0, ..good() },
    ] {
        assert!(second.restore(&saved.section()).is_err(), "{saved:?}");
    }
}
