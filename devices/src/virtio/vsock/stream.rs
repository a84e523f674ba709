//! One connection: a unix socket on the host's side, a pair of ports on the guest's.
//!
//! ```text
//!   host client:  Greeting ──CONNECT──► Requested ──RESPONSE──┐
//!                                                             ├─► Open ──► (gone)
//!   guest:        (Dialing ─────────────────────────────────► ┘     │
//!                  only while the listener's queue is full)         └──► Orphan ──► (gone)
//! ```
//!
//! Either direction ends on its own. What the host wrote before it closed is read to the end
//! before the guest hears of the end; what the guest wrote before it closed is written to the
//! end before the socket is shut. A guest that resets a connection behind its last bytes does
//! not take them back: the connection becomes an *orphan*, unknown to the guest, until the
//! host's reader has them.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    time::Instant,
};

use crate::virtio::vsock::{
    backlog::{Backlog, Pool},
    credit::Credit,
    packet::{HOST_CID, Header, SHUT_BOTH, SHUT_RECEIVE, SHUT_SEND, TYPE_STREAM},
    poller::{Poller, StreamId},
};

/// Empty wake-ups for room to write after which a connection stops asking for them.
const IDLE_WRITABLE_MAX: u8 = 16;

/// How far a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// A host client has connected and not yet said which port it wants.
    Greeting,
    /// The guest asked for a connection; the host's listener has too many waiting. Tried
    /// again until this moment.
    Dialing(Instant),
    /// The guest is (or will be) asked for a connection.
    Requested,
    /// Both sides agreed.
    Open,
    /// The guest is done with it; bytes for the host are left.
    Orphan,
}

/// Packets without payload that a connection owes the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Owed {
    /// Ask for the connection.
    pub request: bool,
    /// Accept the connection.
    pub response: bool,
    /// Tell how much room there is.
    pub credit: bool,
    /// Ask how much room the guest has.
    pub question: bool,
    /// Tell what the host will no longer send or receive.
    pub shutdown: bool,
}

impl Owed {
    /// Whether anything is owed.
    pub fn any(self) -> bool {
        self.request || self.response || self.credit || self.question || self.shutdown
    }
}

/// What became of the bytes meant for the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// All are with the host, or nobody wants them any more.
    Done,
    /// Some are put aside until the socket takes more.
    Waiting,
    /// More came than the guest had room for; it does not keep to its credit.
    Overrun,
}

/// One connection.
pub struct Stream {
    /// How far it is.
    pub stage: Stage,
    /// Port on the host's side.
    pub host_port: u32,
    /// Port on the guest's side.
    pub guest_port: u32,
    /// Flow control.
    pub credit: Credit,
    /// What the guest is owed.
    pub owed: Owed,
    /// When something must have happened; what, depends on the stage.
    pub deadline: Option<Instant>,
    /// The guest was asked for credit since it last gave some.
    pub asked: bool,
    /// The socket may have bytes that were not read yet.
    pub readable: bool,
    /// The host will send no more: everything it sent has been read.
    pub ended: bool,
    /// The host will receive no more.
    pub deaf: bool,
    /// The request was sent, so the guest knows of the connection.
    pub known: bool,
    /// Shutdown flags the guest was told.
    pub told: u32,
    /// Shutdown flags the guest told.
    pub heard: u32,
    socket: Option<OwnedFd>,
    backlog: Backlog,
    /// The writing half of the socket is shut.
    write_shut: bool,
    watches_writing: bool,
    idle_writable: u8,
}

impl Stream {
    /// A connection in `stage` over `socket`, which may still be missing while dialing.
    pub fn new(stage: Stage, socket: Option<OwnedFd>) -> Stream {
        Stream {
            stage,
            host_port: 0,
            guest_port: 0,
            credit: Credit::default(),
            owed: Owed::default(),
            deadline: None,
            asked: false,
            readable: false,
            ended: false,
            deaf: false,
            known: false,
            told: 0,
            heard: 0,
            socket,
            backlog: Backlog::default(),
            write_shut: false,
            watches_writing: false,
            idle_writable: 0,
        }
    }

    /// The descriptor of the socket, or -1, which every call refuses, while there is none.
    pub fn fd(&self) -> RawFd {
        self.socket.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }

    /// Takes over the socket that dialing gave.
    pub fn connected(&mut self, socket: OwnedFd) {
        self.socket = Some(socket);
        self.stage = Stage::Open;
    }

    /// A header from the host to the guest on this connection; tells the guest our credit.
    pub fn header(&mut self, guest_cid: u64, op: u16, len: u32) -> Header {
        let (buf_alloc, fwd_cnt) = self.credit.tell();
        self.owed.credit = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.host_port,
            dst_port: self.guest_port,
            len,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc,
            fwd_cnt,
        }
    }

    /// Whether there is something to do for it now: a packet is owed, bytes may be read and
    /// the guest has room for them, or that lack of room is to be timed.
    pub fn has_work(&self) -> bool {
        self.owed.any() || (self.wants_to_read() && (self.credit.allowance() > 0 || self.is_stalled()))
    }

    /// The host may have bytes, the guest has no room for them, and no clock runs for that yet.
    pub fn is_stalled(&self) -> bool {
        self.wants_to_read() && self.credit.allowance() == 0 && !self.asked && self.deadline.is_none()
    }

    /// Whether bytes of the host may be on their way to the guest.
    pub fn wants_to_read(&self) -> bool {
        self.stage == Stage::Open && self.readable && !self.ended && self.heard & SHUT_RECEIVE == 0
    }

    /// The shutdown flags that are true of the host now.
    pub fn shutdown_flags(&self) -> u32 {
        let send = if self.ended { SHUT_SEND } else { 0 };
        let receive = if self.deaf { SHUT_RECEIVE } else { 0 };
        send | receive
    }

    /// The host sends no more, or receives no more, or both: the guest is to be told, if it
    /// does not know.
    pub fn announce_end(&mut self) {
        self.owed.shutdown = self.stage == Stage::Open && self.shutdown_flags() & !self.told != 0;
    }

    /// Hands `len` bytes of the guest to the host.
    ///
    /// # Safety
    /// Each iovec must be readable memory; together they are `len` bytes.
    pub unsafe fn deliver(&mut self, iovecs: &[libc::iovec], len: usize, place: &mut Place<'_>) -> Delivery {
        if self.deaf {
            self.forwarded(len);
            return Delivery::Done;
        }
        let sent = if self.backlog.is_empty() {
            // SAFETY: promised by the caller.
            match unsafe { self.send(iovecs) } {
                Ok(sent) => sent,
                Err(_) => {
                    self.stop_hearing(place.pool);
                    self.forwarded(len);
                    return Delivery::Done;
                }
            }
        } else {
            0
        };
        self.forwarded(sent);
        if sent >= len {
            return Delivery::Done;
        }
        // SAFETY: promised by the caller.
        if !unsafe { self.backlog.append(iovecs, sent, place.pool) } {
            return Delivery::Overrun;
        }
        self.watch_writing(true, place);
        Delivery::Waiting
    }

    /// The socket has room: writes what was put aside.
    pub fn flush(&mut self, place: &mut Place<'_>) -> Delivery {
        if self.backlog.is_empty() {
            // Every byte the host reads makes room; a reader that keeps up would wake us for
            // each of its reads.
            self.idle_writable = self.idle_writable.saturating_add(1);
            if self.idle_writable >= IDLE_WRITABLE_MAX {
                self.watch_writing(false, place);
            }
            return Delivery::Done;
        }
        self.idle_writable = 0;
        while !self.backlog.is_empty() {
            let before = self.backlog.len();
            // SAFETY: the pieces lie in the backlog's own memory.
            match unsafe { self.send(&self.backlog.pieces()) } {
                Ok(0) => return Delivery::Waiting,
                Ok(sent) => {
                    self.backlog.consume(sent, place.pool);
                    self.forwarded(before - self.backlog.len());
                }
                Err(_) => self.stop_hearing(place.pool),
            }
        }
        Delivery::Done
    }

    /// Gives the memory of the backlog back; whatever is in it is lost.
    pub fn release(&mut self, pool: &mut Pool) {
        let left = self.backlog.len();
        self.backlog.consume(left, pool);
    }

    /// Whether bytes for the host are put aside.
    pub fn is_waiting(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// The guest sends no more and everything it sent is with the host: says so to the host.
    pub fn shut_if_finished(&mut self) {
        if self.heard & SHUT_SEND != 0 && self.backlog.is_empty() && !self.write_shut {
            self.write_shut = true;
            self.shut(libc::SHUT_WR);
        }
    }

    /// The guest receives no more: a host that goes on writing gets an error.
    pub fn shut_reading(&mut self) {
        self.shut(libc::SHUT_RD);
    }

    /// Both directions are over for the guest and nothing is left for the host.
    pub fn is_over(&self) -> bool {
        self.heard == SHUT_BOTH && self.backlog.is_empty()
    }

    fn shut(&self, how: i32) {
        // SAFETY: a plain call on our descriptor. It can only fail when the peer is gone.
        unsafe { libc::shutdown(self.fd(), how) };
    }

    /// The host's side is gone for writing; bytes put aside will never be wanted.
    fn stop_hearing(&mut self, pool: &mut Pool) {
        self.deaf = true;
        let left = self.backlog.len();
        self.backlog.consume(left, pool);
        self.forwarded(left);
        self.announce_end();
    }

    fn forwarded(&mut self, len: usize) {
        self.credit.forward(len as u32);
        self.owed.credit |= self.stage == Stage::Open && self.credit.update_due();
    }

    /// Writes to the socket without waiting: 0 when it takes nothing now.
    ///
    /// # Safety
    /// Each iovec must be readable memory.
    unsafe fn send(&self, iovecs: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: all zeros is a valid message header.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = iovecs.as_ptr().cast_mut();
        message.msg_iovlen = iovecs.len();
        loop {
            // SAFETY: the message holds nothing but the caller's iovecs, which the kernel
            // only reads.
            let sent = unsafe { libc::sendmsg(self.fd(), &raw const message, libc::MSG_NOSIGNAL) };
            match usize::try_from(sent) {
                Ok(count) => return Ok(count),
                Err(_) => match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => {}
                    e if e.kind() == io::ErrorKind::WouldBlock => return Ok(0),
                    e => return Err(e),
                },
            }
        }
    }

    fn watch_writing(&mut self, on: bool, place: &Place<'_>) {
        if self.watches_writing != on {
            let done = place.poller.watch_writing(self.fd(), place.id, on);
            self.watches_writing = on && done.is_ok();
            self.idle_writable = 0;
        }
    }
}

/// Reads from a socket into `iovecs` without waiting; zero bytes mean the end.
///
/// # Safety
/// Each iovec must be memory that may be written.
pub unsafe fn read_socket(fd: RawFd, iovecs: &[libc::iovec]) -> io::Result<usize> {
    loop {
        // SAFETY: promised by the caller; the count is that of a slice.
        let got = unsafe { libc::readv(fd, iovecs.as_ptr(), iovecs.len() as i32) };
        match usize::try_from(got) {
            Ok(count) => return Ok(count),
            Err(_) => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => {}
                e => return Err(e),
            },
        }
    }
}

/// Whether both directions of a socket are over, as after the other side closed it.
pub fn is_hung_up(fd: RawFd) -> bool {
    let mut asked = libc::pollfd { fd, events: 0, revents: 0 };
    // SAFETY: one valid entry, and no waiting.
    let ready = unsafe { libc::poll(&raw mut asked, 1, 0) };
    ready == 1 && asked.revents & (libc::POLLHUP | libc::POLLERR) != 0
}

/// What a connection needs of the device around it.
pub struct Place<'a> {
    /// Its own name.
    pub id: StreamId,
    /// Where it is watched.
    pub poller: &'a Poller,
    /// Where memory for its backlog comes from.
    pub pool: &'a mut Pool,
}
