//! TCP connections to the service, each answering one request after the other.
//!
//! ```text
//!   segment ──► socket's buffer ──► inbox ──► answer.rs ──► answer ──► socket's buffer ──► guest
//!                 BUFFER            HEAD_MAX                ANSWERS_MAX    BUFFER
//! ```
//!
//! Everything moves only as far as the next stage has room, so a guest that does not read
//! its answers stops being read itself. A place for a connection is made when its first
//! segment comes and taken back when it ends. With all [`CONNECTIONS_MAX`] places taken, a
//! newcomer gets that of a connection that is over, that never came about, or that has been
//! silent for long, in this order; else it is not heard, and its guest tries again.

use std::{
    io,
    net::Ipv4Addr,
    sync::Arc,
    time::{Duration, Instant},
};

use smoltcp::{
    iface::{Config, Interface, PollResult, SocketHandle, SocketSet},
    socket::tcp::{Socket, SocketBuffer, State},
    time,
    wire::{HardwareAddress, IpAddress, IpCidr, IpEndpoint, IpProtocol, Ipv4Packet, TcpPacket},
};

use super::{
    Mmds,
    http::{HEAD_MAX, Response, head_len},
    token::random,
    wire::{Aim, ETHERNET, Outbox, Wire, aim},
};

/// Port of the service.
const PORT: u16 = 80;
/// Connections one network interface has at most.
pub(super) const CONNECTIONS_MAX: usize = 30;
/// Bytes of each of a connection's two buffers.
const BUFFER: usize = 4096;
/// Bytes of answers that one interface holds before it makes further ones.
pub(super) const ANSWERS_MAX: usize = 1 << 20;
/// How long the guest may be silent while it owes an acknowledgement.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a connection is silent before its place may be given away.
const SILENCE: Duration = Duration::from_secs(10);
/// How long a handshake takes before its place may be given away. Both ends are on one
/// machine.
const HANDSHAKE: Duration = Duration::from_millis(200);

/// A connection.
struct Connection {
    handle: SocketHandle,
    remote: IpEndpoint,
    /// When the guest was last heard.
    heard: Instant,
    inbox: Vec<u8>,
    answer: Vec<u8>,
    /// Bytes of the answer that are in the socket's buffer or beyond.
    sent: usize,
    /// There is nothing more to say after the answer: once the guest has all of it, the
    /// connection is closed.
    ending: bool,
}

/// The service on one network interface.
pub(super) struct Stack {
    mmds: Arc<Mmds>,
    address: [u8; 4],
    start: Instant,
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
    pub(super) out: Outbox,
    /// Something could not be sent because too much was waiting.
    blocked: bool,
}

impl Stack {
    /// A stack with the service's address. Fails when the host has no random bytes.
    pub(super) fn new(mmds: Arc<Mmds>, address: Ipv4Addr, start: Instant) -> io::Result<Stack> {
        let mut seed = [0; 8];
        random(&mut seed)?;
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = u64::from_ne_bytes(seed);
        let mut out = Outbox::new();
        let mut wire = Wire { packet: None, out: &mut out };
        let mut interface = Interface::new(config, &mut wire, time::Instant::ZERO);
        // The whole world is on this cable: whoever asks is answered.
        let network = IpCidr::new(IpAddress::Ipv4(address), 0);
        interface.update_ip_addrs(|addresses| {
            let _ = addresses.push(network);
        });
        Ok(Stack {
            mmds,
            address: address.octets(),
            start,
            interface,
            sockets: SocketSet::new(Vec::new()),
            connections: Vec::new(),
            out,
            blocked: false,
        })
    }

    /// Takes in a frame from the guest.
    pub(super) fn take(&mut self, frame: &[u8], now: Instant) {
        let counters = &self.mmds.counters;
        counters.rx_accepted.increment();
        match aim(frame, self.address) {
            Some(Aim::Ipv4) => self.packet(frame, now),
            Some(Aim::Arp) if self.out.answer_arp(frame, self.address) => {}
            _ if frame.len() < ETHERNET => counters.rx_bad_eth.increment(),
            _ => counters.rx_accepted_unusual.increment(),
        }
    }

    /// Takes in a packet for the service.
    fn packet(&mut self, frame: &[u8], now: Instant) {
        let mmds = Arc::clone(&self.mmds);
        let counters = &mmds.counters;
        let bytes = frame.get(ETHERNET..).unwrap_or_default();
        let Some(packet) = Ipv4Packet::new_checked(bytes).ok().filter(|packet| packet.version() == 4) else {
            return counters.rx_accepted_err.increment();
        };
        if packet.next_header() != IpProtocol::Tcp || packet.more_frags() || packet.frag_offset() != 0 {
            return counters.rx_accepted_unusual.increment();
        }
        let segment = TcpPacket::new_checked(packet.payload()).ok();
        let Some(segment) = segment.filter(|segment| segment.dst_port() == PORT && segment.src_port() != 0)
        else {
            return counters.rx_accepted_err.increment();
        };
        let remote = IpEndpoint::new(IpAddress::Ipv4(packet.src_addr()), segment.src_port());
        self.out.learn(frame);
        let opens = segment.syn() && !segment.ack() && !segment.rst();
        if opens && !self.admit(remote, now) {
            return counters.rx_accepted_unusual.increment();
        }
        if self.ingest(bytes, now) {
            counters.rx_count.increment();
        } else {
            counters.rx_accepted_err.increment();
        }
        if let Some(connection) = self.connections.iter_mut().find(|one| one.remote == remote) {
            connection.heard = now;
        }
        self.close_ears();
        self.run(now);
    }

    /// Hands a packet to the stack; false when there is no room for what it may answer.
    fn ingest(&mut self, packet: &[u8], now: Instant) -> bool {
        let at = self.at(now);
        let mut wire = Wire { packet: Some(packet), out: &mut self.out };
        self.interface.poll_ingress_single(at, &mut wire, &mut self.sockets);
        let taken = wire.packet.is_none();
        self.blocked |= !taken;
        taken
    }

    /// Answers what can be answered and sends what can be sent; to be called after a frame
    /// came, when replies were taken and when [`Stack::poll_in`] is over.
    pub(super) fn run(&mut self, now: Instant) {
        self.give_up(now);
        self.serve(now);
        let at = self.at(now);
        while !self.out.is_full() {
            let mut wire = Wire { packet: None, out: &mut self.out };
            if self.interface.poll_egress(at, &mut wire, &mut self.sockets) == PollResult::None {
                break;
            }
        }
        self.blocked = self.out.is_full();
        // What was answered last may have been the end of it.
        self.bury();
    }

    /// Whether something waits that can be sent once replies are taken.
    pub(super) fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// How long until [`Stack::run`] has something to do of itself.
    pub(super) fn poll_in(&mut self, now: Instant) -> Option<Duration> {
        if self.blocked {
            return None;
        }
        let at = self.at(now);
        self.interface.poll_delay(at, &self.sockets).map(Duration::from)
    }

    /// Forgets every connection, as when the machine at the other end was switched off.
    pub(super) fn reset(&mut self) {
        while let Some(connection) = self.connections.pop() {
            self.forget(&connection);
        }
        self.out.clear();
        self.blocked = false;
    }

    /// Bytes of answers that are not yet in a socket's buffer.
    pub(super) fn held(&self) -> usize {
        self.connections.iter().map(|one| one.answer.len()).sum()
    }

    fn at(&self, now: Instant) -> time::Instant {
        let micros = now.saturating_duration_since(self.start).as_micros();
        time::Instant::from_micros(i64::try_from(micros).unwrap_or(i64::MAX))
    }

    fn state(&self, connection: &Connection) -> State {
        self.sockets.get::<Socket<'_>>(connection.handle).state()
    }

    fn forget(&mut self, connection: &Connection) {
        self.sockets.remove(connection.handle);
        self.mmds.counters.connections_destroyed.increment();
    }

    /// Sees to it that the opening segment from `remote` is heard, unless there is no place.
    fn admit(&mut self, remote: IpEndpoint, now: Instant) -> bool {
        if let Some(at) = self.connections.iter().position(|one| one.remote == remote) {
            let over = self.connections.get(at).map(|one| self.state(one)) == Some(State::TimeWait);
            if !over {
                return true;
            }
            // The guest uses the port again, as it may.
            let connection = self.connections.swap_remove(at);
            self.forget(&connection);
        }
        if self.connections.len() >= CONNECTIONS_MAX && !self.evict(now) {
            return false;
        }
        let buffer = || SocketBuffer::new(vec![0; BUFFER]);
        let mut socket = Socket::new(buffer(), buffer());
        // Answers are written in one go, so there is nothing to wait for.
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        if socket.listen(PORT).is_err() {
            return false;
        }
        let handle = self.sockets.add(socket);
        let (inbox, answer) = (Vec::new(), Vec::new());
        let connection = Connection { handle, remote, heard: now, inbox, answer, sent: 0, ending: false };
        self.connections.push(connection);
        self.mmds.counters.connections_created.increment();
        true
    }

    /// Gives up the connection that is missed least; false when all are needed.
    fn evict(&mut self, now: Instant) -> bool {
        let mut worst: Option<(u8, Instant, usize)> = None;
        for (at, connection) in self.connections.iter().enumerate() {
            let silent = now.saturating_duration_since(connection.heard);
            let rank = match self.state(connection) {
                State::Closed | State::TimeWait | State::Listen => 0,
                State::SynReceived if silent >= HANDSHAKE => 1,
                _ if silent >= SILENCE => 2,
                _ => continue,
            };
            let candidate = (rank, connection.heard, at);
            if worst.is_none_or(|worst| candidate < worst) {
                worst = Some(candidate);
            }
        }
        let Some((_, _, at)) = worst else { return false };
        // Should the guest speak of it again, it is told that there is no such connection.
        let connection = self.connections.swap_remove(at);
        self.forget(&connection);
        true
    }

    /// Drops connections whose guest has been silent for too long about what it was sent.
    /// Repeating it is what wakes the stack up, so that this is seen to.
    fn give_up(&mut self, now: Instant) {
        self.remove_where(|connection, socket| {
            let owed = socket.send_queue() > 0 || !connection.answer.is_empty();
            let owed = owed || !matches!(socket.state(), State::Established | State::CloseWait);
            owed && now.saturating_duration_since(connection.heard) >= PATIENCE
        });
    }

    /// Takes back places whose opening segment came to nothing, so that no segment finds an
    /// open ear that was meant for another one.
    fn close_ears(&mut self) {
        self.remove_where(|_, socket| socket.state() == State::Listen);
    }

    /// Takes back the places of connections that are over and have nothing left to send.
    fn bury(&mut self) {
        self.remove_where(|_, socket| socket.state() == State::Closed && socket.remote_endpoint().is_none());
    }

    fn remove_where(&mut self, over: impl Fn(&Connection, &Socket<'_>) -> bool) {
        let mut at = 0;
        while let Some(connection) = self.connections.get(at) {
            if over(connection, self.sockets.get::<Socket<'_>>(connection.handle)) {
                let connection = self.connections.swap_remove(at);
                self.forget(&connection);
            } else {
                at += 1;
            }
        }
    }

    /// Moves every connection as far as it goes.
    fn serve(&mut self, now: Instant) {
        loop {
            let mut held = self.held();
            let mut moved = false;
            for connection in &mut self.connections {
                let socket = self.sockets.get_mut::<Socket<'_>>(connection.handle);
                moved |= connection.step(socket, &self.mmds, &mut held, now);
            }
            if !moved {
                return;
            }
        }
    }
}

impl Connection {
    /// Takes one step; false when there is none to take. `held` are the bytes of all answers.
    fn step(&mut self, socket: &mut Socket<'_>, mmds: &Mmds, held: &mut usize, now: Instant) -> bool {
        if !self.answer.is_empty() {
            return self.send(socket, held);
        }
        if self.ending {
            if socket.send_queue() == 0 {
                socket.close();
            }
            // What the guest says now is of no interest, but it must be able to end.
            return matches!(socket.recv(|bytes| (bytes.len(), bytes.len())), Ok(1..));
        }
        let read = self.read(socket);
        if *held < ANSWERS_MAX && self.make_answer(mmds, now) {
            *held += self.answer.len();
            return true;
        }
        let over = socket.state() == State::CloseWait && !socket.can_recv();
        if over && head_len(&self.inbox).is_none() {
            self.ending = true;
            return true;
        }
        read
    }

    /// Moves bytes of the answer on; true when that was the last of them.
    fn send(&mut self, socket: &mut Socket<'_>, held: &mut usize) -> bool {
        let rest = self.answer.get(self.sent..).unwrap_or_default();
        match socket.send_slice(rest) {
            Ok(sent) => self.sent += sent,
            // Nobody listens any more.
            Err(_) => {
                self.sent = self.answer.len();
                self.ending = true;
            }
        }
        if self.sent < self.answer.len() {
            return false;
        }
        *held = held.saturating_sub(self.answer.len());
        self.answer = Vec::new();
        self.sent = 0;
        if self.ending {
            self.inbox = Vec::new();
        }
        true
    }

    /// Fills the inbox; false when nothing came or nothing fits.
    fn read(&mut self, socket: &mut Socket<'_>) -> bool {
        let inbox = &mut self.inbox;
        let read = socket.recv(|bytes| {
            let part = bytes.get(..HEAD_MAX.saturating_sub(inbox.len()).min(bytes.len())).unwrap_or_default();
            inbox.extend_from_slice(part);
            (part.len(), part.len())
        });
        matches!(read, Ok(1..))
    }

    /// Answers the first request in the inbox; false when it is not all there.
    fn make_answer(&mut self, mmds: &Mmds, now: Instant) -> bool {
        let head = head_len(&self.inbox).and_then(|len| self.inbox.get(..len));
        if let Some(head) = head {
            let len = head.len();
            (self.answer, self.ending) = mmds.answer(head, now);
            self.inbox.drain(..len);
        } else if self.inbox.len() >= HEAD_MAX {
            let text = format!("A request has at most {HEAD_MAX} bytes.");
            (self.answer, self.ending) = (Response::last(431, text).encode(), true);
        } else {
            return false;
        }
        true
    }
}
