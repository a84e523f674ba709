//! Packets from the guest and what they do to its connections.
//!
//! A packet that breaks a rule costs the guest the connection it belongs to, and no other.
//! What belongs to no connection is answered with a reset, except a reset (two sides that
//! answer each other's resets would never stop).

use std::{io, time::Instant};

use super::{DIAL_AGAIN, Muxer, add};
use crate::{
    limits::VSOCK_TIMEOUT,
    virtio::vsock::{
        door,
        packet::{HOST_CID, Header, PAYLOAD_MAX, SHUT_BOTH, SHUT_RECEIVE, SHUT_SEND, TYPE_STREAM, op},
        poller::StreamId,
        stream::{Delivery, Place, Stage, Stream},
    },
};

/// What is to be done with a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Nothing more.
    Handled,
    /// Its payload is to be delivered to this connection, which has room for it.
    Data(StreamId),
}

impl Muxer {
    /// Acts on a packet of the guest, behind whose header `payload` bytes were sent.
    pub fn admit(&mut self, header: &Header, payload: u64) -> Admission {
        add(&self.counters.to_host_packets, 1);
        if header.src_cid != self.cid {
            if self.old_cid == Some(header.src_cid) {
                // It was restored with another context id and has not heard of that yet.
                self.answer(header);
            } else {
                // Whom it would answer is not known.
                self.count_bad_packet();
            }
            return Admission::Handled;
        }
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            self.answer(header);
            return Admission::Handled;
        }
        let found = self.table.find(header.dst_port, header.src_port);
        let lies = u64::from(header.len) > payload || header.len > PAYLOAD_MAX;
        if header.carries_data() && lies {
            self.count_bad_packet();
            match found {
                Some(id) => self.drop_stream(id.slot, true),
                None => self.answer(header),
            }
            return Admission::Handled;
        }
        match (found, header.op) {
            (Some(id), _) => return self.admit_to(id, header),
            (None, op::REQUEST) => self.dial(header),
            (None, _) => self.answer(header),
        }
        Admission::Handled
    }

    /// Answers a packet of no connection with a reset.
    fn answer(&mut self, header: &Header) {
        // Once is enough for a connection of before a restore; and none for one the guest gave up.
        self.stale.retain(|reset| !is_between(reset, header));
        if header.op != op::RESET {
            add(&self.counters.resets, 1);
            self.answers.push_back(header.reset());
        }
    }

    fn admit_to(&mut self, id: StreamId, header: &Header) -> Admission {
        let Some(stream) = self.table.get(id) else { return Admission::Handled };
        if header.op == op::RESET {
            self.guest_left(id);
            return Admission::Handled;
        }
        let mut fair = stream.credit.hear(header.buf_alloc, header.fwd_cnt).is_ok();
        stream.asked &= stream.credit.allowance() == 0;
        let mut admission = Admission::Handled;
        match (stream.stage, header.op) {
            (Stage::Requested, op::RESPONSE) if stream.known && fair => self.guest_accepted(id),
            (Stage::Open, op::DATA) => {
                fair &= stream.heard & SHUT_SEND == 0 && stream.credit.receive(header.len).is_ok();
                if header.len > 0 && fair {
                    admission = Admission::Data(id);
                }
            }
            (Stage::Open, op::SHUTDOWN) if fair => self.guest_shut(id, header.flags & SHUT_BOTH),
            (Stage::Open, op::CREDIT_UPDATE) => {}
            (Stage::Open, op::CREDIT_REQUEST) => stream.owed.credit = true,
            _ => fair = false,
        }
        if fair {
            self.table.line_up(id.slot);
        } else {
            self.count_bad_packet();
            self.drop_stream(id.slot, true);
        }
        admission
    }

    /// Hands `len` bytes of payload to a connection that admitted them.
    ///
    /// # Safety
    /// Each iovec must be readable memory; together they are `len` bytes.
    pub unsafe fn deliver(&mut self, id: StreamId, iovecs: &[libc::iovec], len: usize) {
        let (Some(stream), Some(poller)) = (self.table.get(id), self.poller.as_ref()) else { return };
        let mut place = Place { id, poller, pool: &mut self.pool };
        // First, so that whoever has got the bytes finds them counted.
        add(&self.counters.to_host_bytes, len as u64);
        // SAFETY: promised by the caller.
        let delivery = unsafe { stream.deliver(iovecs, len, &mut place) };
        if delivery == Delivery::Overrun {
            self.count_bad_packet();
            self.drop_stream(id.slot, true);
        } else {
            self.table.line_up(id.slot);
        }
    }

    /// The guest asks for a connection to a host program.
    fn dial(&mut self, header: &Header) {
        // Resets of an earlier connection between these ports are not for this one.
        self.answers.retain(|reset| !is_between(reset, header));
        self.stale.retain(|reset| !is_between(reset, header));
        let (stage, socket) = match self.door.dial(header.dst_port) {
            Ok(socket) => (Stage::Open, Some(socket)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                (Stage::Dialing(Instant::now() + VSOCK_TIMEOUT), None)
            }
            Err(_) => {
                add(&self.counters.refused, 1);
                return self.answer(header);
            }
        };
        let mut stream = Stream::new(stage, socket);
        stream.host_port = header.dst_port;
        stream.guest_port = header.src_port;
        stream.known = true;
        stream.owed.response = stage == Stage::Open;
        if stream.credit.hear(header.buf_alloc, header.fwd_cnt).is_err() {
            self.count_bad_packet();
            return self.answer(header);
        }
        let Some(id) = self.admit_stream(stream) else {
            add(&self.counters.refused, 1);
            return self.answer(header);
        };
        add(&self.counters.dialed, 1);
        self.table.name(id.slot);
        self.table.line_up(id.slot);
        if stage != Stage::Open {
            self.set_deadline(id.slot, Instant::now() + DIAL_AGAIN);
        }
    }

    /// Tries a listener whose queue was full once more.
    pub(super) fn dial_again(&mut self, slot: u32, until: Instant, now: Instant) {
        let Some(id) = self.table.id(slot) else { return };
        let Some(stream) = self.table.get(id) else { return };
        match self.door.dial(stream.host_port) {
            Ok(socket) => {
                stream.connected(socket);
                stream.owed.response = true;
                let fd = stream.fd();
                if self.poller.as_ref().is_none_or(|p| p.watch(fd, id).is_err()) {
                    return self.drop_stream(slot, true);
                }
                self.table.line_up(slot);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && now < until => {
                stream.deadline = Some(now + DIAL_AGAIN);
            }
            Err(_) => {
                add(&self.counters.refused, 1);
                self.drop_stream(slot, true);
            }
        }
    }

    /// The guest accepted a host client: tells it, and its bytes may flow.
    fn guest_accepted(&mut self, id: StreamId) {
        let Some(stream) = self.table.get(id) else { return };
        stream.stage = Stage::Open;
        stream.deadline = None;
        if door::confirm(stream.fd(), stream.host_port).is_err() {
            // The client is gone, but what it wrote before still counts.
            stream.deaf = true;
            stream.readable = true;
        }
    }

    /// The guest will not send, or not receive, or neither.
    fn guest_shut(&mut self, id: StreamId, flags: u32) {
        let Some(stream) = self.table.get(id) else { return };
        let news = flags & !stream.heard;
        stream.heard |= flags;
        if news & SHUT_RECEIVE != 0 && stream.heard != SHUT_BOTH {
            stream.shut_reading();
        }
        if !stream.is_waiting() {
            self.settle_end(id);
        }
    }

    /// The guest reset the connection. What it had sent before is still delivered.
    fn guest_left(&mut self, id: StreamId) {
        let Some(stream) = self.table.get(id) else { return };
        if stream.stage != Stage::Open || !stream.is_waiting() {
            return self.drop_stream(id.slot, false);
        }
        self.table.unname(id.slot);
        if let Some(stream) = self.table.get(id) {
            stream.stage = Stage::Orphan;
            stream.heard = SHUT_BOTH;
            stream.owed = Default::default();
            stream.deadline = None;
        }
    }
}

/// Whether `reset` is for the ports that the guest names in `header`.
fn is_between(reset: &Header, header: &Header) -> bool {
    (reset.src_port, reset.dst_port) == (header.dst_port, header.src_port)
}
