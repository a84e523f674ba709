//! Three connections to the host, one after the other.
//!
//! | host port | what happens |
//! |---|---|
//! | 1 | every byte that comes is sent back, until the host closes |
//! | 2 | bytes are sent until the time is over |
//! | 3 | bytes are taken until the host closes |

use core::hint::spin_loop;

use crate::{
    clock,
    order::Order,
    ring::{self, NEXT, Ring, WRITE},
    virtio::Device,
};

const KIND: u32 = 19;
const QUEUE: u16 = 128;
const RECEIVE: u32 = 0;
const SEND: u32 = 1;
const EVENT: u32 = 2;
const HOST: u64 = 2;
const GUEST: u64 = 3;
/// Slots of each direction.
const SLOTS: u16 = 32;
const PIECE: usize = 0x1_0000;
const HEADER: usize = 44;

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;
const CREDIT: u16 = 6;
const CREDIT_REQUEST: u16 = 7;
const STREAM: u16 = 1;
const BOTH_WAYS: u32 = 3;

/// A packet's header (VIRTIO 1.2 section 5.10.6).
#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Header {
    from: u64,
    to: u64,
    from_port: u32,
    to_port: u32,
    length: u32,
    kind: u16,
    operation: u16,
    flags: u32,
    room: u32,
    taken: u32,
}

#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Slot {
    header: [u8; 64],
    data: [u8; PIECE],
}

static mut RINGS: [ring::Memory; 3] = [ring::Memory::new(), ring::Memory::new(), ring::Memory::new()];
static mut INBOX: [Slot; SLOTS as usize] = [Slot { header: [0; 64], data: [0; PIECE] }; SLOTS as usize];
static mut OUTBOX: [Slot; SLOTS as usize] = [Slot { header: [0; 64], data: [0; PIECE] }; SLOTS as usize];

struct Socket {
    device: Device,
    inbox: Ring,
    outbox: Ring,
    /// Free slots of the outbox, as bits.
    free: u32,
    port: u32,
    sent: u32,
    taken: u32,
    told: u32,
    peer_room: u32,
    peer_taken: u32,
}

/// Does the three things.
pub fn run(order: &Order) {
    let mut socket = Socket::new(order.base);
    for port in 1..=3 {
        socket.connect(port);
        match port {
            1 => socket.echo(),
            2 => socket.send_for(order.cycles, order.bytes.clamp(1, PIECE as u64) as u32),
            _ => socket.take_all(),
        }
    }
}

impl Socket {
    fn new(base: usize) -> Socket {
        let device = Device::start(base, KIND, 0);
        // SAFETY: each ring has memory of its own, used by nobody else.
        let [mut inbox, mut outbox, event] =
            unsafe { [0, 1, 2].map(|index| Ring::new(&raw mut RINGS[index], QUEUE)) };
        for slot in 0..SLOTS {
            let at = usize::from(slot);
            // SAFETY: addresses only, a slot being below the arrays' length.
            let addresses = unsafe {
                [
                    (&raw mut INBOX[at].header as usize, &raw mut INBOX[at].data as usize),
                    (&raw mut OUTBOX[at].header as usize, &raw mut OUTBOX[at].data as usize),
                ]
            };
            inbox.describe(2 * slot, addresses[0].0, HEADER as u32, NEXT | WRITE);
            inbox.describe(2 * slot + 1, addresses[0].1, PIECE as u32, WRITE);
            outbox.describe(2 * slot + 1, addresses[1].1, PIECE as u32, 0);
            inbox.add(2 * slot);
        }
        device.queue(RECEIVE, &inbox);
        device.queue(SEND, &outbox);
        device.queue(EVENT, &event);
        device.go();
        if inbox.publish() {
            device.kick(RECEIVE);
        }
        Socket {
            device,
            inbox,
            outbox,
            free: u32::MAX,
            port: 0,
            sent: 0,
            taken: 0,
            told: 0,
            peer_room: 0,
            peer_taken: 0,
        }
    }

    /// Connects to a port of the host.
    fn connect(&mut self, port: u32) {
        (self.port, self.sent, self.taken, self.told) = (port, 0, 0, 0);
        (self.peer_room, self.peer_taken) = (0, 0);
        self.send(REQUEST, 0, 0);
        while self.receive(|_, _| {}) != Some(RESPONSE) {
            spin_loop();
        }
    }

    fn echo(&mut self) {
        loop {
            let mut length = 0;
            match self.receive(|_, bytes| length = bytes) {
                Some(DATA) => self.send(DATA, length, 0),
                Some(RESET | SHUTDOWN) => break,
                _ => spin_loop(),
            }
        }
        self.send(RESET, 0, 0);
    }

    fn send_for(&mut self, cycles: u64, piece: u32) {
        let start = clock::cycles();
        while !clock::is_over(start, cycles) {
            let under_way = self.sent.wrapping_sub(self.peer_taken);
            if self.free & self.free.wrapping_sub(1) != 0 && under_way + piece <= self.peer_room {
                self.send(DATA, piece, 0);
            }
            if self.receive(|_, _| {}) == Some(RESET) {
                return;
            }
        }
        self.send(SHUTDOWN, 0, BOTH_WAYS);
        while self.receive(|_, _| {}) != Some(RESET) {
            spin_loop();
        }
    }

    fn take_all(&mut self) {
        loop {
            match self.receive(|_, _| {}) {
                Some(RESET | SHUTDOWN) => break,
                // Told in time: the host may have as much under way as all slots hold.
                Some(DATA) if self.taken.wrapping_sub(self.told) as usize >= PIECE * 8 => {
                    self.send(CREDIT, 0, 0);
                }
                Some(_) => {}
                None => spin_loop(),
            }
        }
        self.send(RESET, 0, 0);
    }

    /// Sends one packet; waits for a free slot.
    fn send(&mut self, operation: u16, length: u32, flags: u32) {
        loop {
            while let Some((head, _)) = self.outbox.take() {
                self.free |= 1 << (head / 2);
            }
            if self.free != 0 {
                break;
            }
            spin_loop();
        }
        let slot = self.free.trailing_zeros() as u16;
        self.free &= !(1 << slot);
        let header = Header {
            from: GUEST,
            to: HOST,
            from_port: 1000 + self.port,
            to_port: self.port,
            length,
            kind: STREAM,
            operation,
            flags,
            room: (PIECE * usize::from(SLOTS)) as u32,
            taken: self.taken,
        };
        self.told = self.taken;
        self.sent = self.sent.wrapping_add(length);
        // SAFETY: the slot is free, so the device does not use it; a header is 44 bytes.
        let at = unsafe { &raw mut OUTBOX[usize::from(slot)].header };
        // SAFETY: as above; the array is longer than a header.
        unsafe { at.cast::<Header>().write_unaligned(header) };
        let data = if length > 0 { NEXT } else { 0 };
        self.outbox.describe(2 * slot, at as usize, HEADER as u32, data);
        if length > 0 {
            // SAFETY: an address only.
            let bytes = unsafe { &raw mut OUTBOX[usize::from(slot)].data as usize };
            self.outbox.describe(2 * slot + 1, bytes, length, 0);
        }
        self.outbox.add(2 * slot);
        if self.outbox.publish() {
            self.device.kick(SEND);
        }
    }

    /// Takes one packet, if there is one: what it was. `see` gets its slot and length.
    fn receive(&mut self, mut see: impl FnMut(u16, u32)) -> Option<u16> {
        let (head, _) = self.inbox.take()?;
        let slot = head / 2;
        // SAFETY: the device gave the slot back, and heads are those it was given.
        let header =
            unsafe { (&raw const INBOX[usize::from(slot)].header).cast::<Header>().read_unaligned() };
        self.peer_room = header.room;
        self.peer_taken = header.taken;
        if header.operation == DATA {
            self.taken = self.taken.wrapping_add(header.length);
            see(slot, header.length);
        }
        self.inbox.add(head);
        if self.inbox.publish() {
            self.device.kick(RECEIVE);
        }
        if header.operation == CREDIT_REQUEST {
            self.send(CREDIT, 0, 0);
        }
        Some(header.operation)
    }
}
