//! The device against a guest made of software and real unix sockets.
//!
//! [`Guest`] is the least of a socket driver: it posts receive buffers, sends packets with
//! headers as told, and hands out what came. [`Socket`] keeps one connection's counters, so
//! that a test can keep to the rules by default and break just one.

mod abuse;
mod data;
mod ends;
mod life;

use std::{
    collections::HashMap,
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    time::{Duration, Instant},
};

use super::{
    packet::{HEADER_LEN, Header, TYPE_STREAM, op},
    *,
};
use crate::virtio::driver::{Buffer, Driver, PATIENCE, memory};

const CID: u32 = 42;
const SLOT: u64 = 66 * 1024;
const SLOTS: usize = 64;

/// A guest with a vsock device.
struct Guest {
    driver: Driver,
    device: Vsock,
    features: u64,
    dir: tempfile::TempDir,
    /// Receive buffers by head.
    posted: HashMap<u32, Buffer>,
    /// Used ones, when they are not posted again by themselves.
    idle: Vec<Buffer>,
    repost: bool,
    tx_free: Vec<u64>,
    tx_busy: HashMap<u32, u64>,
}

/// One connection as the guest sees it.
#[derive(Debug, Clone, Copy)]
struct Socket {
    host_port: u32,
    guest_port: u32,
    sent: u32,
    taken: u32,
    room: u32,
    host_room: u32,
    host_taken: u32,
}

impl Socket {
    fn new(host_port: u32, guest_port: u32) -> Socket {
        Socket { host_port, guest_port, sent: 0, taken: 0, room: 1 << 18, host_room: 0, host_taken: 0 }
    }

    fn header(&self, op: u16) -> Header {
        Header {
            src_cid: u64::from(CID),
            dst_cid: 2,
            src_port: self.guest_port,
            dst_port: self.host_port,
            len: 0,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: self.room,
            fwd_cnt: self.taken,
        }
    }

    fn hear(&mut self, header: &Header) {
        self.host_room = header.buf_alloc;
        self.host_taken = header.fwd_cnt;
    }

    fn allowance(&self) -> u32 {
        self.host_room.saturating_sub(self.sent.wrapping_sub(self.host_taken))
    }
}

impl Guest {
    /// With `count` receive buffers of `len` bytes posted.
    fn new(count: usize, len: u32) -> Guest {
        Guest::with(count, len, F_COMMON)
    }

    fn with(count: usize, len: u32, features: u64) -> Guest {
        let dir = tempfile::tempdir().unwrap();
        let device = Vsock::new(VsockConfig { guest_cid: CID, uds_path: dir.path().join("v") }).unwrap();
        let driver = Driver::new(memory(&[(0, 64 << 20)]), &QUEUES);
        let mut guest = Guest {
            driver,
            device,
            features,
            dir,
            posted: HashMap::new(),
            idle: Vec::new(),
            repost: true,
            tx_free: Vec::new(),
            tx_busy: HashMap::new(),
        };
        for _ in 0..SLOTS {
            let slot = guest.driver.alloc(SLOT, 8);
            guest.tx_free.push(slot);
        }
        guest.start();
        for _ in 0..count {
            let buffer = guest.driver.writable(len);
            guest.post(buffer);
        }
        guest
    }

    fn start(&mut self) {
        self.driver.start(&mut self.device, self.features).unwrap();
    }

    fn stop(&mut self) {
        self.driver.stop(&mut self.device).unwrap();
    }

    fn path(&self, port: Option<u32>) -> PathBuf {
        self.dir.path().join(port.map_or("v".to_owned(), |p| format!("v_{p}")))
    }

    fn post(&mut self, buffer: Buffer) {
        let head = self.driver.send(0, &[buffer]);
        self.posted.insert(u32::from(head), buffer);
    }

    fn post_idle(&mut self) {
        for buffer in std::mem::take(&mut self.idle) {
            self.post(buffer);
        }
    }

    /// The next packet, if it comes within `limit`.
    fn poll(&mut self, limit: Duration) -> Option<(Header, Vec<u8>)> {
        let end = Instant::now() + limit;
        let signals = Arc::clone(&self.driver.signals);
        loop {
            let seen = signals.counts();
            if let Some(used) = self.driver.rings[0].take_used() {
                let buffer = self.posted.remove(&used.head).unwrap();
                let raw = self.driver.peek(buffer.address, used.len as usize);
                if self.repost {
                    self.post(buffer);
                } else {
                    self.idle.push(buffer);
                }
                let (head, payload) = raw.split_first_chunk::<HEADER_LEN>()?;
                let header = Header::parse(head);
                assert_eq!(header.len as usize, payload.len());
                assert_eq!((header.src_cid, header.dst_cid), (2, u64::from(CID)));
                return Some((header, payload.to_vec()));
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            signals.wait_for(left, |now| *now != seen);
        }
    }

    fn next(&mut self) -> (Header, Vec<u8>) {
        self.poll(PATIENCE).expect("a packet")
    }

    /// The next packet, which must be `op` on this connection.
    fn expect(&mut self, socket: &mut Socket, op: u16) -> (Header, Vec<u8>) {
        let (header, payload) = self.next();
        assert_eq!(header.op, op, "{header:?}");
        assert_eq!((header.src_port, header.dst_port), (socket.host_port, socket.guest_port));
        if op != op::RESET {
            socket.hear(&header);
        }
        socket.taken = socket.taken.wrapping_add(header.len);
        (header, payload)
    }

    fn silent(&mut self) {
        let packet = self.poll(Duration::from_millis(100)).map(|(header, _)| header);
        assert_eq!(packet, None);
    }

    /// Sends a packet as it is.
    fn send(&mut self, header: &Header, payload: &[u8]) {
        while let Some(used) = self.driver.rings[1].take_used() {
            self.tx_free.extend(self.tx_busy.remove(&used.head));
        }
        let slot = self.tx_free.pop().unwrap_or_else(|| {
            let used = self.driver.wait_used(1).expect("the device takes packets");
            self.tx_busy.remove(&used.head).unwrap()
        });
        self.driver.poke(slot, &header.bytes());
        self.driver.poke(slot + HEADER_LEN as u64, payload);
        let mut buffers = vec![Buffer::readable(slot, HEADER_LEN as u32)];
        if !payload.is_empty() {
            buffers.push(Buffer::readable(slot + HEADER_LEN as u64, payload.len() as u32));
        }
        let head = self.driver.send(1, &buffers);
        self.tx_busy.insert(u32::from(head), slot);
    }

    fn say(&mut self, socket: &Socket, op: u16) {
        self.send(&socket.header(op), &[]);
    }

    fn shut(&mut self, socket: &Socket, flags: u32) {
        self.send(&Header { flags, ..socket.header(op::SHUTDOWN) }, &[]);
    }

    fn write(&mut self, socket: &mut Socket, payload: &[u8]) {
        let header = Header { len: payload.len() as u32, ..socket.header(op::DATA) };
        socket.sent = socket.sent.wrapping_add(header.len);
        self.send(&header, payload);
    }

    /// All bytes up to the next packet that is not data, which is returned too.
    fn read_to_end(&mut self, socket: &mut Socket) -> (Vec<u8>, Header) {
        let mut all = Vec::new();
        loop {
            let (header, payload) = self.next();
            assert_eq!(header.src_port, socket.host_port);
            if header.op != op::DATA {
                return (all, header);
            }
            all.extend(payload);
            socket.hear(&header);
            socket.taken = socket.taken.wrapping_add(header.len);
            assert!(header.len <= socket.room);
            self.say(socket, op::CREDIT_UPDATE);
        }
    }

    /// A client of the host that is connected to `port` of the guest, and the guest's end.
    fn called(&mut self, port: u32) -> (UnixStream, Socket) {
        let mut client = UnixStream::connect(self.path(None)).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        let socket = self.answer(port);
        assert_eq!(line(&mut client), format!("OK {}", socket.host_port));
        (client, socket)
    }

    /// Accepts the connection that is being asked for.
    fn answer(&mut self, port: u32) -> Socket {
        let (header, _) = self.next();
        assert_eq!((header.op, header.dst_port), (op::REQUEST, port));
        let mut socket = Socket::new(header.src_port, port);
        socket.hear(&header);
        self.say(&socket, op::RESPONSE);
        socket
    }

    /// A connection from guest port `from` to the program that listens at `port`.
    fn call(&mut self, listener: &UnixListener, from: u32, port: u32) -> (UnixStream, Socket) {
        let mut socket = Socket::new(port, from);
        self.say(&socket, op::REQUEST);
        self.expect(&mut socket, op::RESPONSE);
        let (server, _) = listener.accept().unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        (server, socket)
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.path(Some(port))).unwrap()
    }

    fn count(&self, name: &str) -> u64 {
        self.device.counters().into_iter().find(|(n, _)| *n == name).unwrap().1
    }
}

/// A line from a client's socket, byte by byte, without its newline.
fn line(stream: &mut UnixStream) -> String {
    let mut text = Vec::new();
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte).unwrap();
        if byte == *b"\n" {
            return String::from_utf8(text).unwrap();
        }
        text.push(byte[0]);
    }
}

fn read_all(stream: &mut UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    all
}

/// Bytes that are easy to tell apart: `len` of them, from position `at` of an endless row.
fn pattern(at: usize, len: usize) -> Vec<u8> {
    (at..at + len).map(|i| (i as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect()
}

/// A small generator of numbers for chunk lengths.
struct Dice(u64);

impl Dice {
    fn up_to(&mut self, max: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        1 + (self.0 >> 33) as usize % max
    }
}
