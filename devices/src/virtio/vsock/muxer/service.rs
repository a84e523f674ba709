//! Packets to the guest: one turn for each connection in the line, round after round.
//!
//! A turn sends what is owed and then at most [`SHARE`] bytes, so that one stream does not
//! hold up the others. A connection without credit leaves the line until the guest gives it
//! some; without buffers of the guest everybody keeps their place and nobody is looked at,
//! however much the host writes.

use std::{io, time::Instant};

use super::{Muxer, add};
use crate::{
    limits::VSOCK_TIMEOUT,
    virtio::vsock::{
        packet::{SHUT_BOTH, op},
        rings::Outlet,
        stream::{Stream, is_hung_up, read_socket},
    },
};

/// Bytes one connection may send to the guest in one turn.
const SHARE: u32 = 64 * 1024;
/// Bytes that count as one more request against the turn's budget.
const BYTES_PER_REQUEST: usize = 4096;

/// How a round ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Round {
    /// Nobody has anything for the guest.
    Idle,
    /// Somebody has, and the guest has buffers.
    More,
    /// Somebody has, and the guest has no buffers.
    Starved,
}

/// How the turn of one connection ended.
enum Turn {
    Done,
    Again,
    Starved,
}

impl Muxer {
    /// Serves each connection in the line once, counting `budget` down.
    pub fn round(&mut self, outlet: &mut Outlet, budget: &mut usize) -> Round {
        while let Some(header) = self.answers.front() {
            if *budget == 0 {
                return Round::More;
            }
            if !outlet.control(header) {
                return Round::Starved;
            }
            add(&self.counters.to_guest_packets, 1);
            self.answers.pop_front();
            *budget -= 1;
        }
        for _ in 0..self.table.in_line() {
            if *budget == 0 {
                return Round::More;
            }
            let Some(slot) = self.table.next_in_line() else { break };
            *budget -= 1;
            match self.serve(slot, outlet, budget) {
                Turn::Done => {}
                Turn::Again => self.table.line_up(slot),
                Turn::Starved => {
                    self.table.back_in_front(slot);
                    return Round::Starved;
                }
            }
        }
        if self.table.in_line() == 0 && self.answers.is_empty() { Round::Idle } else { Round::More }
    }

    fn serve(&mut self, slot: u32, outlet: &mut Outlet, budget: &mut usize) -> Turn {
        let (cid, settling) = (self.cid, self.is_settling());
        let Some(stream) = self.table.at(slot) else { return Turn::Done };
        // A guest that has still to drop its connections would drop a new one with them.
        if settling && (stream.owed.request || stream.owed.response) || !stream.has_work() {
            return Turn::Done;
        }
        if !say_first(stream, cid, outlet, &self.counters.to_guest_packets) {
            return Turn::Starved;
        }
        if stream.wants_to_read() && stream.credit.allowance() > 0 {
            if !outlet.has_buffer() {
                return Turn::Starved;
            }
            if let Some(got) = send_data(stream, cid, outlet) {
                add(&self.counters.to_guest_bytes, got as u64);
                add(&self.counters.to_guest_packets, 1);
                *budget = budget.saturating_sub(got / BYTES_PER_REQUEST);
                if stream.credit.allowance() > 0 {
                    return Turn::Again;
                }
            }
        }
        if !say_last(stream, cid, outlet, &self.counters.to_guest_packets) {
            return Turn::Starved;
        }
        let unconfirmed = stream.told == SHUT_BOTH && stream.deadline.is_none();
        if unconfirmed || stream.is_stalled() {
            self.set_deadline(slot, Instant::now() + VSOCK_TIMEOUT);
        }
        Turn::Done
    }
}

/// Sends what must come before data; false when the guest offers no buffer.
fn say_first(stream: &mut Stream, cid: u64, outlet: &mut Outlet, count: &super::AtomicU64) -> bool {
    if stream.owed.request {
        if !say(stream, cid, op::REQUEST, outlet, count) {
            return false;
        }
        stream.owed.request = false;
        stream.known = true;
    }
    if stream.owed.response {
        if !say(stream, cid, op::RESPONSE, outlet, count) {
            return false;
        }
        stream.owed.response = false;
    }
    if stream.owed.question {
        if !say(stream, cid, op::CREDIT_REQUEST, outlet, count) {
            return false;
        }
        stream.owed.question = false;
        stream.asked = true;
    }
    // The host hears no more but still speaks: the guest need not wait for the end.
    stream.ended || say_shutdown(stream, cid, outlet, count)
}

/// Sends what may come after data; false when the guest offers no buffer.
fn say_last(stream: &mut Stream, cid: u64, outlet: &mut Outlet, count: &super::AtomicU64) -> bool {
    if !say_shutdown(stream, cid, outlet, count) {
        return false;
    }
    !stream.owed.credit || say(stream, cid, op::CREDIT_UPDATE, outlet, count)
}

fn say_shutdown(stream: &mut Stream, cid: u64, outlet: &mut Outlet, count: &super::AtomicU64) -> bool {
    if !stream.owed.shutdown {
        return true;
    }
    if !say(stream, cid, op::SHUTDOWN, outlet, count) {
        return false;
    }
    stream.told |= stream.shutdown_flags();
    stream.owed.shutdown = false;
    if stream.told == SHUT_BOTH {
        // From now on the deadline is for the guest to confirm.
        stream.deadline = None;
    }
    true
}

fn say(stream: &mut Stream, cid: u64, op: u16, outlet: &mut Outlet, count: &super::AtomicU64) -> bool {
    if !outlet.has_buffer() {
        return false;
    }
    let mut header = stream.header(cid, op, 0);
    if op == op::SHUTDOWN {
        header.flags = stream.shutdown_flags();
    }
    add(count, 1);
    outlet.control(&header)
}

/// Reads from the socket into buffers of the guest. The bytes that went, or none when there
/// were none or the host's side ended.
fn send_data(stream: &mut Stream, cid: u64, outlet: &mut Outlet) -> Option<usize> {
    let want = stream.credit.allowance().min(SHARE);
    let fd = stream.fd();
    // SAFETY: the outlet passes buffers of the guest, which the device may write.
    let read = |pieces: &[libc::iovec]| unsafe { read_socket(fd, pieces) };
    match outlet.data(want, read, |len| stream.header(cid, op::DATA, len))? {
        Ok(0) => {
            stream.ended = true;
            // A host that closed says so in one packet instead of two.
            stream.deaf |= is_hung_up(fd);
        }
        Ok(got) => {
            stream.credit.send(got as u32);
            return Some(got);
        }
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
            stream.readable = false;
            return None;
        }
        Err(_) => {
            stream.ended = true;
            stream.deaf = true;
        }
    }
    stream.announce_end();
    None
}
