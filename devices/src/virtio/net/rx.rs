//! Frames towards the guest: `readv` from the host's side straight into the guest's buffers.
//!
//! | the guest's buffers hold   | what happens                                             |
//! |----------------------------|----------------------------------------------------------|
//! | the largest frame          | read; the frame lies in guest memory, nothing is copied   |
//! | something, but less        | read with a spare buffer behind them. What ends up there  |
//! |                            | waits for further guest buffers (mergeable) or the frame  |
//! |                            | is dropped (not mergeable)                                |
//! | nothing                    | the host's side is not watched until the guest rings      |
//!
//! The second line keeps a small ring, or a guest short of memory, alive: waiting until the
//! largest frame fits could wait for ever. The third keeps a guest that offers no buffers
//! from costing any processor time; frames then wait, and are dropped, in the host's kernel.
//!
//! So they do while a limiter holds them back. How long a frame is shows only when it was
//! read, so one is read when any token is left, and what it costs beyond that is owed.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    time::Instant,
};

use vmm_sys_util::eventfd::EventFd;

use super::{
    header,
    pool::{BufferError, Pool},
    tally::Tally,
};
use crate::{
    limiter::Gate,
    limits::NET_FRAME_MAX,
    mmds::{Detour, MTU},
    virtio::queue::Queue,
};

/// Frames after which the driver is told, while more are coming.
const PUBLISH_EVERY: usize = 32;

/// The largest frame of the metadata service, header included.
const REPLY_MAX: usize = header::LEN + header::ETHERNET + MTU;

/// One byte more than the largest frame, so that a longer one shows.
const WANTED: u64 = NET_FRAME_MAX as u64 + 1;

/// Why a turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// The host has no more frames.
    Idle,
    /// The guest has no more buffers; its doorbell is armed.
    Starved,
    /// There may be more; others are to run first. No doorbell is armed.
    Budget,
    /// The limiter lets no more through now. No doorbell is armed.
    Limited,
    /// The host's side is gone.
    Gone,
}

/// A frame whose end lies in the spare buffer.
struct Held {
    /// Bytes of the frame, header included.
    len: usize,
    /// Bytes of it in guest buffers.
    placed: usize,
    /// Offset of the rest in the spare buffer.
    rest: usize,
}

/// The receiving side of a queue pair.
pub(super) struct Rx {
    pub(super) queue: Queue,
    pub(super) kick: EventFd,
    pub(super) gate: Gate,
    pool: Pool,
    mergeable: bool,
    /// Made when first needed.
    spare: Vec<u8>,
    held: Option<Held>,
}

impl Rx {
    pub(super) fn new(queue: Queue, kick: EventFd, gate: Gate, mergeable: bool) -> Rx {
        Rx { queue, kick, gate, pool: Pool::default(), mergeable, spare: Vec::new(), held: None }
    }

    /// Whether a frame that comes now can be read.
    pub(super) fn has_room(&self) -> bool {
        !self.gate.is_shut() && !self.pool.is_empty() && self.held.is_none()
    }

    /// Moves up to `budget` frames. `notify` is called when the driver is to be told.
    pub(super) fn run(
        &mut self,
        port: &OwnedFd,
        budget: usize,
        tally: &mut Tally,
        notify: &mut dyn FnMut(),
    ) -> Result<Turn, BufferError> {
        self.queue.disarm();
        for done in 0..budget {
            while !self.prepare(tally)? {
                self.publish(notify);
                if !self.queue.arm() {
                    tally.rx_stalls += 1;
                    return Ok(Turn::Starved);
                }
                self.queue.disarm();
            }
            if self.gate.is_shut() || !self.gate.admits(1) {
                return self.end(Turn::Limited, notify);
            }
            match self.read(port) {
                Ok(0) => return self.end(Turn::Gone, notify),
                Ok(len) => {
                    self.gate.charge(len.saturating_sub(header::LEN) as u64);
                    self.arrived(len, tally)?;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return self.end(Turn::Idle, notify),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if super::is_gone(&e) => return self.end(Turn::Gone, notify),
                Err(_) => {
                    tally.port_read_errors += 1;
                    tally.rx_dropped += 1;
                }
            }
            if done % PUBLISH_EVERY == PUBLISH_EVERY - 1 {
                self.publish(notify);
            }
        }
        self.end(Turn::Budget, notify)
    }

    /// Gives the guest what the metadata service has for it, as far as the limiter lets it
    /// and there are buffers; when these are wanting, the guest's doorbell is armed.
    pub(super) fn inject(
        &mut self,
        mmds: &Detour,
        tally: &mut Tally,
        notify: &mut dyn FnMut(),
    ) -> Result<(), BufferError> {
        // An empty virtio header: all checksums are there.
        let mut reply = [0; REPLY_MAX];
        self.queue.disarm();
        while mmds.has_reply() {
            while !self.prepare(tally)? || self.wants_room_for(REPLY_MAX as u64) {
                self.publish(notify);
                if !self.queue.arm() {
                    return Ok(());
                }
                self.queue.disarm();
            }
            if self.gate.is_shut() || !self.gate.admits(1) {
                break;
            }
            let place = reply.get_mut(header::LEN..).unwrap_or_default();
            let Some(len) = mmds.next_reply(place, Instant::now()) else { break };
            self.gate.charge(len as u64);
            let len = header::LEN + len;
            if len as u64 > self.pool.capacity() {
                tally.rx_dropped += 1;
                continue;
            }
            self.pool.write(&self.queue, reply.get(..len).unwrap_or_default());
            self.deliver(len, tally);
        }
        self.publish(notify);
        // The doorbell is not armed, and the last buffer may be gone: frames of the host are
        // looked after next.
        let _ = self.kick.write(1);
        Ok(())
    }

    /// Whether `len` bytes do not fit now, but may when the guest has given more buffers.
    fn wants_room_for(&self, len: u64) -> bool {
        self.mergeable && self.pool.capacity() < len && !self.pool.is_full()
    }

    /// Returns the queue as if nothing that was popped and not used had been. A frame in two
    /// halves is lost, as frames may be.
    pub(super) fn give_back(mut self, tally: &mut Tally) -> Queue {
        if self.held.take().is_some() {
            tally.rx_dropped += 1;
        }
        self.pool.give_back(&mut self.queue);
        self.publish(&mut || {});
        self.queue
    }

    fn end(&mut self, turn: Turn, notify: &mut dyn FnMut()) -> Result<Turn, BufferError> {
        self.publish(notify);
        Ok(turn)
    }

    fn publish(&mut self, notify: &mut dyn FnMut()) {
        if self.queue.publish() {
            notify();
        }
    }

    /// Completes a held frame and sees to it that there is at least one buffer; false when
    /// the guest has not given enough.
    fn prepare(&mut self, tally: &mut Tally) -> Result<bool, BufferError> {
        while let Some(held) = &mut self.held {
            if !self.pool.take(&mut self.queue)? {
                return Ok(false);
            }
            let rest = self.spare.get(held.rest..held.rest + held.len - held.placed).unwrap_or_default();
            let written = self.pool.write_newest(&self.queue, rest);
            held.placed += written;
            held.rest += written;
            if held.placed >= held.len {
                let len = held.len;
                self.held = None;
                self.deliver(len, tally);
            }
        }
        if self.mergeable {
            self.pool.fill(&mut self.queue, WANTED)?;
        } else if self.pool.is_empty() {
            self.pool.take(&mut self.queue)?;
        }
        Ok(!self.pool.is_empty())
    }

    fn read(&mut self, port: &OwnedFd) -> io::Result<usize> {
        let short = self.pool.capacity() < WANTED;
        if short && self.spare.is_empty() {
            self.spare = vec![0; WANTED as usize];
        }
        let tail = if short { self.spare.as_mut_slice() } else { &mut [] };
        self.pool.with_tail(tail, |row| {
            // SAFETY: the row holds segments of guest memory, which the queue keeps mapped,
            // and the spare buffer; its length is at most 1024.
            let got = unsafe { libc::readv(port.as_raw_fd(), row.as_ptr(), row.len() as libc::c_int) };
            usize::try_from(got).map_err(|_| io::Error::last_os_error())
        })
    }

    /// A frame of `len` bytes, header included, was read.
    fn arrived(&mut self, len: usize, tally: &mut Tally) -> Result<(), BufferError> {
        let capacity = self.pool.capacity();
        if !(header::LEN..=NET_FRAME_MAX).contains(&len) || (len as u64 > capacity && !self.mergeable) {
            tally.rx_dropped += 1;
        } else if len as u64 > capacity {
            // Smaller than `len`, so it is a small number.
            self.held = Some(Held { len, placed: capacity as usize, rest: 0 });
        } else {
            self.deliver(len, tally);
        }
        Ok(())
    }

    fn deliver(&mut self, len: usize, tally: &mut Tally) {
        self.pool.deliver(&mut self.queue, len as u64);
        tally.rx_packets += 1;
        tally.rx_bytes += (len - header::LEN) as u64;
    }
}
