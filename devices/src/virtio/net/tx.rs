//! Frames from the guest: `writev` from the guest's buffers straight to the host's side.
//!
//! Only the header and the Ethernet header behind it are copied, because they are checked and
//! the guest could change them between the check and the use. A frame that is false in any way is counted, dropped and returned
//! like any other: a driver is not told of frames that the cable lost.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    time::Instant,
};

use vmm_sys_util::eventfd::EventFd;

use super::{header, tally::Tally};
use crate::{
    limiter::Gate,
    limits::NET_FRAME_MAX,
    mmds::{Detour, HEAD_LEN},
    virtio::queue::{Chain, Queue, QueueError},
};

/// Frames after which they are returned, while more are being sent.
const PUBLISH_EVERY: usize = 32;
/// Most segments one `writev` takes.
const SEGMENTS_MAX: usize = 1024;
/// Bytes at the start of a frame that are copied before they are looked at.
const COPIED: usize = header::LEN + header::ETHERNET;
/// The same where frames may be the metadata service's: as much as shows whether they are.
const COPIED_MMDS: usize = header::LEN + HEAD_LEN;
/// Where the sender's address lies in them.
const SOURCE: std::ops::Range<usize> = header::LEN + 6..header::LEN + 12;

/// Why a turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// The guest has no more frames; its doorbell is armed.
    Idle,
    /// The host takes no more now.
    Blocked,
    /// The limiter lets no more through now. No doorbell is armed.
    Limited,
    /// There is more; others are to run first.
    Budget,
    /// The host's side is gone.
    Gone,
}

/// The row of segments of one frame.
#[derive(Default)]
struct Vectors(Vec<libc::iovec>);

// SAFETY: between calls the row is only memory to be reused; what it points to is not used.
unsafe impl Send for Vectors {}

/// The sending side of a queue pair.
pub(super) struct Tx {
    pub(super) queue: Queue,
    pub(super) kick: EventFd,
    pub(super) gate: Gate,
    chain: Chain,
    vectors: Vectors,
    features: u64,
    /// Frames must come from this address.
    source: Option<[u8; 6]>,
    /// There is no host's side: frames are taken and dropped.
    pub(super) unplugged: bool,
    /// Where frames of the metadata service go.
    pub(super) mmds: Option<Detour>,
}

/// What became of a frame.
enum Sent {
    Done(usize),
    /// The metadata service has it; the host never sees it, and it costs nothing.
    Detoured,
    Malformed,
    Spoofed,
    Failed(io::Error),
}

impl Tx {
    pub(super) fn new(queue: Queue, kick: EventFd, gate: Gate, features: u64, source: Option<[u8; 6]>) -> Tx {
        Tx {
            queue,
            kick,
            gate,
            chain: Chain::new(),
            vectors: Vectors::default(),
            features,
            source,
            unplugged: false,
            mmds: None,
        }
    }

    /// Moves up to `budget` frames. `notify` is called when the driver is to be told.
    pub(super) fn run(
        &mut self,
        port: &OwnedFd,
        budget: usize,
        tally: &mut Tally,
        notify: &mut dyn FnMut(),
    ) -> Result<Turn, QueueError> {
        self.queue.disarm();
        for done in 0..budget {
            while !self.queue.pop(&mut self.chain)? {
                self.publish(notify);
                if !self.queue.arm() {
                    return Ok(Turn::Idle);
                }
                self.queue.disarm();
            }
            // What is only dropped is not limited.
            let bytes = self.chain.readable_len().saturating_sub(header::LEN as u64);
            // A chain too long for a frame moves nothing and owes nothing but an operation.
            let bytes = if bytes > NET_FRAME_MAX as u64 { 0 } else { bytes };
            if !self.unplugged && (self.gate.is_shut() || !self.gate.admits(bytes)) {
                self.queue.undo_pop(1);
                self.publish(notify);
                return Ok(Turn::Limited);
            }
            let mut free = self.unplugged;
            match self.send(port) {
                Sent::Done(len) => {
                    tally.tx_packets += 1;
                    tally.tx_bytes += len as u64;
                }
                Sent::Detoured => free = true,
                Sent::Malformed => tally.tx_malformed += 1,
                Sent::Spoofed => tally.tx_spoofed += 1,
                Sent::Failed(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.queue.undo_pop(1);
                    self.publish(notify);
                    return Ok(Turn::Blocked);
                }
                Sent::Failed(e) if !self.unplugged && super::is_gone(&e) => {
                    self.queue.undo_pop(1);
                    self.publish(notify);
                    return Ok(Turn::Gone);
                }
                Sent::Failed(_) => {
                    tally.tx_dropped += 1;
                    tally.port_write_errors += u64::from(!self.unplugged);
                }
            }
            if !free {
                // Only now: a frame that went back was not sent.
                self.gate.charge(bytes);
            }
            self.queue.push(self.chain.head(), 0);
            if done % PUBLISH_EVERY == PUBLISH_EVERY - 1 {
                self.publish(notify);
            }
        }
        self.publish(notify);
        Ok(Turn::Budget)
    }

    /// Returns the queue; nothing is ever in flight between turns.
    pub(super) fn give_back(mut self) -> Queue {
        self.queue.publish();
        self.queue
    }

    fn publish(&mut self, notify: &mut dyn FnMut()) {
        if self.queue.publish() {
            notify();
        }
    }

    /// Checks the frame in `chain` and gives it to the host; the bytes given, without header.
    fn send(&mut self, port: &OwnedFd) -> Sent {
        let len = self.chain.readable_len();
        // Before anything is copied or looked at: the length decides how much that would be.
        if !(COPIED as u64..=NET_FRAME_MAX as u64).contains(&len) {
            return Sent::Malformed;
        }
        let frame = len as usize - header::LEN;
        let copied = if self.mmds.is_some() { COPIED_MMDS.min(len as usize) } else { COPIED };
        let mut start = [0; COPIED_MMDS];
        let start = &mut start[..copied];
        self.chain.read(0, start);
        let checked = start.first_chunk().and_then(|raw| header::check(*raw, frame, self.features));
        let Some(checked) = checked else { return Sent::Malformed };
        if self.source.is_some_and(|mac| start[SOURCE] != mac) {
            return Sent::Spoofed;
        }
        if self.detour(&start[header::LEN..], frame) {
            return Sent::Detoured;
        }
        start[..header::LEN].copy_from_slice(&checked);
        if self.unplugged {
            return Sent::Failed(io::ErrorKind::NotConnected.into());
        }
        if !self.gather(start) {
            return Sent::Malformed;
        }
        let row = &self.vectors.0;
        loop {
            // SAFETY: the row holds the start on this stack and segments of guest memory,
            // which the queue keeps mapped; its length was checked.
            let sent = unsafe { libc::writev(port.as_raw_fd(), row.as_ptr(), row.len() as libc::c_int) };
            if sent >= 0 {
                return Sent::Done(frame);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Sent::Failed(error);
            }
        }
    }

    /// Gives the frame of `len` bytes that begins with `head` to the metadata service when it
    /// is meant for that.
    fn detour(&self, head: &[u8], len: usize) -> bool {
        let Some(mmds) = self.mmds.as_ref().filter(|mmds| mmds.is_for_mmds(head)) else { return false };
        let mut frame = vec![0; len];
        self.chain.read(header::LEN as u64, &mut frame);
        // What was looked at is what counts, whatever the guest wrote there since.
        if let Some(place) = frame.get_mut(..head.len()) {
            place.copy_from_slice(head);
        }
        mmds.take(&frame, Instant::now());
        true
    }

    /// Lines up the checked start and what follows the guest's one; false when these are
    /// too many pieces for one call.
    fn gather(&mut self, start: &mut [u8]) -> bool {
        let row = &mut self.vectors.0;
        row.clear();
        row.push(libc::iovec { iov_base: start.as_mut_ptr().cast(), iov_len: start.len() });
        let mut skip = start.len();
        for segment in self.chain.readable() {
            let past = skip.min(segment.iov_len);
            skip -= past;
            if past < segment.iov_len {
                let base = segment.iov_base.cast::<u8>().wrapping_add(past);
                row.push(libc::iovec { iov_base: base.cast(), iov_len: segment.iov_len - past });
            }
        }
        row.len() <= SEGMENTS_MAX
    }
}
