//! The two data queues, seen as what they carry.
//!
//! The [`Outlet`] is the receive queue: buffers of the guest that the device fills. A Linux
//! guest offers buffers of less than 4 KiB each, so a packet per read would cost a system
//! call per 4 KiB. Instead one read fills many buffers, past a gap for the header in each:
//!
//! ```text
//!   buffers    ┌────┬──────────────┐ ┌────┬──────────────┐ ┌────┬──────────────┐
//!              │head│ payload      │ │head│ payload      │ │head│ payload      │   taken
//!              └────┴──────▲───────┘ └────┴──────▲───────┘ └────┴──────▲───────┘   from the ring
//!   one readv ─────────────┴─────────────────────┴─────────────────────┘
//! ```
//!
//! and the headers follow for those that got something. Buffers that got nothing wait in a
//! stash for the next connection; when the device stops they go back to the ring.
//!
//! The [`Inlet`] is the transmit queue. Packets of one connection that come in a row are
//! gathered and written to its socket by one call.

use std::{collections::VecDeque, io};

use crate::virtio::{
    queue::{Chain, Queue, QueueError},
    vsock::{
        muxer::{Admission, Muxer},
        packet::{HEADER_LEN, Header, PAYLOAD_MAX},
        poller::StreamId,
    },
};

/// Buffers filled by one read at most.
const STASH_MAX: usize = 32;
/// Pieces of memory in one system call at most (the kernel takes 1024).
const PIECES_MAX: usize = 1000;
/// Pieces one more chain may add: a full queue of descriptors, each split between regions.
const PIECES_SPARE: usize = 300;
/// Packets gathered for one write at most, and their bytes.
const GATHER_MAX: usize = 32;
const GATHER_BYTES_MAX: usize = 128 * 1024;

/// Buffers of the guest to fill.
pub struct Outlet {
    queue: Queue,
    /// Chains taken and not yet used, oldest first: always the newest ones taken.
    stash: VecDeque<Chain>,
    spare: Vec<Chain>,
    pieces: Vec<libc::iovec>,
    broken: Option<QueueError>,
}

// SAFETY: `pieces` holds pointers into guest memory only while a read runs; the queue keeps
// that memory mapped, and it is shared by nature.
unsafe impl Send for Outlet {}

impl Outlet {
    /// Over the receive queue.
    pub fn new(mut queue: Queue) -> Outlet {
        queue.disarm();
        Outlet {
            queue,
            stash: VecDeque::with_capacity(STASH_MAX),
            spare: Vec::with_capacity(STASH_MAX),
            pieces: Vec::new(),
            broken: None,
        }
    }

    /// What the driver did wrong, if it did; the queue is not looked at any more.
    pub fn broken(&self) -> Option<QueueError> {
        self.broken
    }

    /// Makes what was sent visible; true when the driver wants an interrupt.
    pub fn publish(&mut self) -> bool {
        self.queue.publish()
    }

    /// Asks for a doorbell when the driver adds buffers; true when there are some already.
    pub fn wait(&mut self) -> bool {
        if self.broken.is_some() {
            return false;
        }
        let more = self.queue.arm();
        if more {
            self.queue.disarm();
        }
        more
    }

    /// No doorbells until [`Outlet::wait`].
    pub fn quiet(&mut self) {
        self.queue.disarm();
    }

    /// The queue, with unused buffers put back.
    pub fn into_queue(mut self) -> Queue {
        self.queue.undo_pop(self.stash.len() as u16);
        self.queue
    }

    /// Sends a packet without payload; false when the guest offers no buffer.
    pub fn control(&mut self, header: &Header) -> bool {
        if !self.has_buffer() {
            return false;
        }
        let Some(chain) = self.stash.pop_front() else { return false };
        let len = chain.write(&self.queue, 0, &header.bytes());
        self.queue.push(chain.head(), len as u32);
        self.spare.push(chain);
        true
    }

    /// Fills buffers with at most `want` bytes from `read`, which gets the memory and says how
    /// much of it was written, and sends them as packets whose headers `header` makes from
    /// their lengths. `None` when the guest offers no buffer; zero when there was nothing to
    /// read any more.
    pub fn data(
        &mut self,
        want: u32,
        read: impl FnOnce(&[libc::iovec]) -> io::Result<usize>,
        mut header: impl FnMut(u32) -> Header,
    ) -> Option<io::Result<usize>> {
        if !self.has_buffer() {
            return None;
        }
        let room = self.lay_out(want as usize);
        let got = match read(&self.pieces) {
            Ok(got) => got.min(room),
            Err(e) => return Some(Err(e)),
        };
        let mut left = got;
        while left > 0 {
            let Some(chain) = self.stash.pop_front() else { break };
            let part = payload_room(&chain).min(left);
            chain.write(&self.queue, 0, &header(part as u32).bytes());
            let whole = HEADER_LEN + part;
            self.queue.mark_written(&chain, whole as u64);
            self.queue.push(chain.head(), whole as u32);
            self.spare.push(chain);
            left -= part;
        }
        Some(Ok(got))
    }

    /// Makes `pieces` the payload parts of stashed and newly taken buffers, up to `want`
    /// bytes; returns how many bytes they hold.
    fn lay_out(&mut self, want: usize) -> usize {
        self.pieces.clear();
        let (mut room, mut at) = (0, 0);
        while room < want && at < STASH_MAX && self.pieces.len() + PIECES_SPARE <= PIECES_MAX {
            if at == self.stash.len() && !self.take() {
                break;
            }
            let Some(chain) = self.stash.get(at) else { break };
            let part = payload_room(chain).min(want - room);
            if part == 0 {
                // Too small a buffer; it is given back once it comes to the front.
                break;
            }
            append_part(&mut self.pieces, chain.writable(), HEADER_LEN, part);
            room += part;
            at += 1;
        }
        room
    }

    /// Whether the guest offers a buffer that can hold a packet; those that cannot are given
    /// back empty.
    ///
    /// At most one ring full of them at a time: a driver may add them as fast as they come
    /// back. Then [`Outlet::wait`] says that there are more.
    pub fn has_buffer(&mut self) -> bool {
        for _ in 0..self.queue.size() {
            if self.stash.is_empty() && !self.take() {
                return false;
            }
            if self.stash.front().is_some_and(|chain| payload_room(chain) > 0) {
                return true;
            }
            if let Some(chain) = self.stash.pop_front() {
                self.queue.push(chain.head(), 0);
                self.spare.push(chain);
            }
        }
        false
    }

    /// Takes one more buffer from the ring into the stash.
    fn take(&mut self) -> bool {
        if self.broken.is_some() {
            return false;
        }
        let mut chain = self.spare.pop().unwrap_or_default();
        match self.queue.pop(&mut chain) {
            Ok(true) => {
                self.stash.push_back(chain);
                return true;
            }
            Ok(false) => {}
            Err(e) => self.broken = Some(e),
        }
        self.spare.push(chain);
        false
    }
}

/// Bytes of payload a buffer has room for.
fn payload_room(chain: &Chain) -> usize {
    let room = usize::try_from(chain.writable_len()).unwrap_or(usize::MAX);
    room.saturating_sub(HEADER_LEN).min(PAYLOAD_MAX as usize)
}

/// Appends to `pieces` what lies in `from` after the first `skip` bytes, `len` bytes of it.
fn append_part(pieces: &mut Vec<libc::iovec>, from: &[libc::iovec], skip: usize, len: usize) {
    let (mut skip, mut len) = (skip, len);
    for iovec in from {
        let leave = skip.min(iovec.iov_len);
        skip -= leave;
        let part = (iovec.iov_len - leave).min(len);
        if part > 0 {
            let iov_base = iovec.iov_base.cast::<u8>().wrapping_add(leave).cast();
            pieces.push(libc::iovec { iov_base, iov_len: part });
            len -= part;
        }
    }
}

/// Why the inlet stopped taking packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// There are no more; the doorbell will ring.
    All,
    /// The turn's budget is used up.
    Budget,
    /// Answers are waiting for buffers of the guest; nothing more is taken before they left.
    Blocked,
}

/// Packets of the guest to take.
pub struct Inlet {
    queue: Queue,
    spare: Vec<Chain>,
    held: Vec<Chain>,
    pieces: Vec<libc::iovec>,
    bytes: usize,
    target: Option<StreamId>,
    broken: Option<QueueError>,
}

// SAFETY: as for `Outlet`.
unsafe impl Send for Inlet {}

impl Inlet {
    /// Over the transmit queue.
    pub fn new(mut queue: Queue) -> Inlet {
        queue.disarm();
        Inlet {
            queue,
            spare: Vec::with_capacity(GATHER_MAX),
            held: Vec::with_capacity(GATHER_MAX),
            pieces: Vec::new(),
            bytes: 0,
            target: None,
            broken: None,
        }
    }

    /// What the driver did wrong, if it did; the queue is not looked at any more.
    pub fn broken(&self) -> Option<QueueError> {
        self.broken
    }

    /// The queue.
    pub fn into_queue(self) -> Queue {
        self.queue
    }

    /// Takes packets into `muxer`, counting `budget` down; `interrupt` is called when the
    /// driver wants to hear of its buffers.
    pub fn take(&mut self, muxer: &mut Muxer, budget: &mut usize, interrupt: impl Fn()) -> Taken {
        loop {
            if self.broken.is_some() {
                return Taken::All;
            }
            self.queue.disarm();
            while *budget > 0 && muxer.has_room_for_answers() && self.take_one(muxer) {
                *budget -= 1;
            }
            self.deliver(muxer);
            if self.queue.publish() {
                interrupt();
            }
            if *budget == 0 {
                return Taken::Budget;
            }
            if !muxer.has_room_for_answers() {
                return Taken::Blocked;
            }
            if self.broken.is_some() || !self.queue.arm() {
                return Taken::All;
            }
        }
    }

    fn take_one(&mut self, muxer: &mut Muxer) -> bool {
        let mut chain = self.spare.pop().unwrap_or_default();
        match self.queue.pop(&mut chain) {
            Ok(true) => self.sort(chain, muxer),
            Ok(false) => {
                self.spare.push(chain);
                return false;
            }
            Err(e) => {
                self.spare.push(chain);
                self.broken = Some(e);
                return false;
            }
        }
        true
    }

    /// Gathers a data packet, or lets the muxer act on any other.
    fn sort(&mut self, chain: Chain, muxer: &mut Muxer) {
        let mut raw = [0; HEADER_LEN];
        if chain.read(0, &mut raw) == HEADER_LEN {
            let header = Header::parse(&raw);
            let payload = chain.readable_len() - HEADER_LEN as u64;
            if !header.carries_data() {
                // What it says comes after what was gathered.
                self.deliver(muxer);
            }
            if let Admission::Data(id) = muxer.admit(&header, payload) {
                return self.gather(chain, id, header.len as usize, muxer);
            }
        } else {
            muxer.count_bad_packet();
        }
        self.queue.push(chain.head(), 0);
        self.spare.push(chain);
    }

    fn gather(&mut self, chain: Chain, id: StreamId, len: usize, muxer: &mut Muxer) {
        let full = self.held.len() >= GATHER_MAX
            || self.bytes + len > GATHER_BYTES_MAX
            || self.pieces.len() + PIECES_SPARE > PIECES_MAX;
        if full || self.target.is_some_and(|target| target != id) {
            self.deliver(muxer);
        }
        append_part(&mut self.pieces, chain.readable(), HEADER_LEN, len);
        self.bytes += len;
        self.target = Some(id);
        self.held.push(chain);
    }

    /// Hands over what was gathered and gives its buffers back.
    fn deliver(&mut self, muxer: &mut Muxer) {
        if let Some(id) = self.target.take() {
            // SAFETY: the pieces are payload parts of chains just taken, inside guest memory
            // that the queue keeps mapped, and `bytes` is their sum.
            unsafe { muxer.deliver(id, &self.pieces, self.bytes) };
        }
        self.pieces.clear();
        self.bytes = 0;
        for chain in self.held.drain(..) {
            self.queue.push(chain.head(), 0);
            self.spare.push(chain);
        }
    }
}
