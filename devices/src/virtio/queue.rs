//! The split virtqueue, device side (VIRTIO 1.2 section 2.7).
//!
//! ```text
//!   descriptor table      avail ring (driver writes)     used ring (device writes)
//!   16 bytes x size       flags idx ring[size] used_event flags idx ring[size] avail_event
//! ```
//!
//! The three rings are checked once, when the queue is made: aligned, inside one region of
//! RAM each, and then reached through plain pointers. A request costs no lookup of the ring
//! and one scan of the (two or three) memory regions for each of its buffers. Nothing is
//! allocated per request: [`Queue::pop`] fills a [`Chain`] whose vectors keep their capacity.
//!
//! What the driver wrote is read once and then only the copy is used. The rules it must keep
//! and what happens when it does not:
//!
//! | the driver                                        | here                       |
//! |---------------------------------------------------|----------------------------|
//! | publishes more entries than the ring has           | [`QueueError::Ahead`]      |
//! | names a head or a next descriptor outside the table| [`QueueError::Index`]      |
//! | makes a chain longer than the ring (or a loop)     | [`QueueError::Long`]       |
//! | puts a writable buffer before a readable one       | [`QueueError::Order`]      |
//! | nests indirect tables, or sizes one badly          | [`QueueError::Indirect`]   |
//! | points outside RAM                                 | [`QueueError::Memory`]     |
//!
//! An error leaves the queue unusable in the driver's own view: the device reports
//! `DEVICE_NEEDS_RESET` and stops looking. The host is never harmed.
//!
//! Notifications: [`Queue::publish`] makes everything pushed so far visible at once and says
//! whether the driver wants an interrupt; [`Queue::arm`] asks for a doorbell and says whether
//! more work came in meanwhile. Both follow `EVENT_IDX` when it was negotiated (section
//! 2.7.10), so at saturation neither side signals.

use std::{
    num::Wrapping,
    sync::atomic::{AtomicU16, Ordering, fence},
};

use serde::{Deserialize, Serialize};
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress, VolatileSlice,
    bitmap::Bitmap,
};

use crate::{
    Memory,
    virtio::{F_EVENT_IDX, F_INDIRECT_DESC},
};

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_INDIRECT: u16 = 4;
const DESC_LEN: u64 = 16;
const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// Where a queue lies and how far it has come: what the driver set up, and what is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct QueueSetup {
    /// Number of descriptors, a power of two.
    pub size: u16,
    /// Guest address of the descriptor table, 16-byte aligned.
    pub desc: u64,
    /// Guest address of the avail ring, 2-byte aligned.
    pub avail: u64,
    /// Guest address of the used ring, 4-byte aligned.
    pub used: u64,
    /// Index of the next avail entry to take.
    pub next_avail: u16,
    /// Index of the next used entry to fill.
    pub next_used: u16,
}

/// What a driver did wrong with a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The size is zero, not a power of two, or more than the device offers.
    #[error("Queue size {0} is not a power of two within the offered maximum")]
    Size(u16),
    /// A ring is misaligned or not inside one region of RAM.
    #[error("The {ring} at {address:#x} is misaligned or not inside guest memory")]
    Ring {
        /// Which of the three.
        ring: &'static str,
        /// Its guest address.
        address: u64,
    },
    /// The avail index is further ahead than the ring is long.
    #[error("The avail index runs {0} entries ahead, more than the ring holds")]
    Ahead(u16),
    /// A descriptor index is outside the table.
    #[error("Descriptor {0} is outside the table")]
    Index(u16),
    /// A chain has more descriptors than the ring.
    #[error("A descriptor chain is longer than the ring or loops")]
    Long,
    /// A readable descriptor follows a writable one.
    #[error("A readable buffer follows a writable one")]
    Order,
    /// An indirect table is nested, empty, not a multiple of 16 bytes, or was not negotiated.
    #[error("An indirect descriptor table is not valid")]
    Indirect,
    /// A buffer is not inside RAM.
    #[error("A buffer at {address:#x} of {len} bytes is not inside guest memory")]
    Memory {
        /// Guest address of the buffer.
        address: u64,
        /// Its length in bytes.
        len: u32,
    },
}

/// One run of guest memory that is contiguous on the host, for RAM lookups without locks.
#[derive(Debug, Clone, Copy)]
struct Span {
    first: u64,
    len: u64,
    host: *mut u8,
}

/// A virtqueue that is set up and can be served.
pub struct Queue {
    index: u16,
    setup: QueueSetup,
    next_avail: Wrapping<u16>,
    next_used: Wrapping<u16>,
    /// Used index at the last publish, for the `EVENT_IDX` comparison.
    published: Wrapping<u16>,
    event_idx: bool,
    indirect: bool,
    desc: *const u8,
    avail: *const u16,
    used: *mut u16,
    spans: Vec<Span>,
    memory: Memory,
}

// SAFETY: the pointers lead into guest memory, which `memory` keeps mapped for as long as the
// queue lives; guest memory is shared with running vCPUs anyway and only accessed volatilely.
unsafe impl Send for Queue {}

impl Queue {
    /// Makes queue `index` of a device from what the driver set up. `size_max` is what the
    /// device offers; `features` are those the driver accepted.
    pub fn new(
        index: u16,
        setup: QueueSetup,
        size_max: u16,
        features: u64,
        memory: &Memory,
    ) -> Result<Queue, QueueError> {
        let size = setup.size;
        if size == 0 || !size.is_power_of_two() || size > size_max {
            return Err(QueueError::Size(size));
        }
        let spans = spans(memory);
        let entries = u64::from(size);
        let ring = |ring, address: u64, len, align: u64| {
            let inside = address.is_multiple_of(align).then(|| resolve(&spans, address, len)).flatten();
            inside.ok_or(QueueError::Ring { ring, address })
        };
        let desc = ring("descriptor table", setup.desc, DESC_LEN * entries, 16)?;
        let avail = ring("avail ring", setup.avail, 6 + 2 * entries, 2)?;
        let used = ring("used ring", setup.used, 6 + 8 * entries, 4)?;
        Ok(Queue {
            index,
            setup,
            next_avail: Wrapping(setup.next_avail),
            next_used: Wrapping(setup.next_used),
            published: Wrapping(setup.next_used),
            event_idx: features & F_EVENT_IDX != 0,
            indirect: features & F_INDIRECT_DESC != 0,
            desc,
            avail: avail.cast(),
            used: used.cast(),
            spans,
            memory: memory.clone(),
        })
    }

    /// Which queue of its device this is.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.setup.size
    }

    /// Where the queue lies and how far it has come.
    pub fn setup(&self) -> QueueSetup {
        QueueSetup { next_avail: self.next_avail.0, next_used: self.next_used.0, ..self.setup }
    }

    /// Takes the next chain the driver made available into `chain`; false when there is none.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        let ready = self.waiting()?;
        if ready == 0 {
            return Ok(false);
        }
        let slot = self.next_avail.0 & (self.setup.size - 1);
        let head = self.load_avail(2 + usize::from(slot), Ordering::Relaxed);
        self.walk(head, chain)?;
        self.next_avail += 1;
        Ok(true)
    }

    /// Puts the last `count` popped chains back, to be popped again. They must be the most
    /// recent ones and must not have been pushed as used.
    pub fn undo_pop(&mut self, count: u16) {
        self.next_avail -= count;
    }

    /// Entries the driver made available and the device has not taken.
    pub fn waiting(&self) -> Result<u16, QueueError> {
        // Acquire: what the driver wrote before the index is read after it.
        let ahead = Wrapping(self.load_avail(1, Ordering::Acquire)) - self.next_avail;
        if ahead.0 > self.setup.size { Err(QueueError::Ahead(ahead.0)) } else { Ok(ahead.0) }
    }

    /// Returns the chain that began at `head` to the driver with `len` bytes written into it.
    /// Not visible before [`Queue::publish`]. A `head` that cannot be right is ignored.
    pub fn push(&mut self, head: u16, len: u32) {
        if head >= self.setup.size {
            return;
        }
        let slot = usize::from(self.next_used.0 & (self.setup.size - 1));
        // SAFETY: the used ring holds `size` entries of two 32-bit words after two 16-bit
        // ones and was checked to lie inside RAM; `slot` is below `size`.
        unsafe {
            let entry = self.used.add(2 + 4 * slot).cast::<u32>();
            entry.write_volatile(u32::from(head).to_le());
            entry.add(1).write_volatile(len.to_le());
        }
        self.next_used += 1;
    }

    /// Makes everything pushed visible to the driver; true when it wants an interrupt.
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return false;
        }
        self.published = new;
        // Release: the entries are visible before the index that covers them.
        self.atomic(self.used.wrapping_add(1)).store(new.0.to_le(), Ordering::Release);
        self.mark(self.setup.used, 6 + 8 * u64::from(self.setup.size));
        // The driver stores its wish and then reads the index; here it is the other way
        // round. Without a full barrier both could read the old value.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = Wrapping(self.load_avail(2 + usize::from(self.setup.size), Ordering::Relaxed));
            (new - event - Wrapping(1)).0 < (new - old).0
        } else {
            self.load_avail(0, Ordering::Relaxed) & AVAIL_NO_INTERRUPT == 0
        }
    }

    /// Asks the driver to ring the doorbell for the next chain. True when chains are already
    /// waiting: serve them, because the doorbell may not ring for them.
    pub fn arm(&mut self) -> bool {
        if self.event_idx {
            let at = self.used.wrapping_add(2 + 4 * usize::from(self.setup.size));
            self.atomic(at).store(self.next_avail.0.to_le(), Ordering::Relaxed);
            self.mark(self.setup.used, 6 + 8 * u64::from(self.setup.size));
        } else {
            self.set_used_flags(0);
        }
        fence(Ordering::SeqCst);
        self.waiting().map_or(true, |n| n > 0)
    }

    /// Tells the driver not to ring the doorbell while the device is looking anyway. With
    /// `EVENT_IDX` the stale event index already says so.
    pub fn disarm(&mut self) {
        if !self.event_idx {
            self.set_used_flags(USED_NO_NOTIFY);
        }
    }

    /// Records for dirty tracking that the host wrote `len` bytes of the chain's writable
    /// part by other means than [`Chain::write`] (a `readv` into its segments).
    pub fn mark_written(&self, chain: &Chain, len: u64) {
        if self.is_tracked() {
            let mut left = len;
            for (address, iovec) in chain.addresses[chain.readable..].iter().zip(chain.writable()) {
                let part = left.min(iovec.iov_len as u64);
                self.mark(*address, part);
                left -= part;
            }
        }
    }

    fn set_used_flags(&self, flags: u16) {
        self.atomic(self.used).store(flags.to_le(), Ordering::Relaxed);
        self.mark(self.setup.used, 2);
    }

    fn load_avail(&self, word: usize, order: Ordering) -> u16 {
        debug_assert!(word <= 2 + usize::from(self.setup.size));
        u16::from_le(self.atomic(self.avail.wrapping_add(word).cast_mut()).load(order))
    }

    fn atomic(&self, word: *mut u16) -> &AtomicU16 {
        // SAFETY: every caller passes a word of the avail or used ring, which were checked to
        // lie inside RAM, two-byte aligned, and stay mapped while `self.memory` lives.
        unsafe { AtomicU16::from_ptr(word) }
    }

    /// Whether somebody wants to know what is written, at this moment.
    fn is_tracked(&self) -> bool {
        self.memory.iter().any(|region| (**region).bitmap().is_on())
    }

    fn mark(&self, address: u64, len: u64) {
        if len == 0 || !self.is_tracked() {
            return;
        }
        let start = GuestAddress(address);
        if let Some(region) = self.memory.find_region(start) {
            let offset = start.unchecked_offset_from(region.start_addr());
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            region.bitmap().mark_dirty(MemoryRegionAddress(offset).0 as usize, len);
        }
    }

    fn walk(&self, head: u16, chain: &mut Chain) -> Result<(), QueueError> {
        chain.clear(head);
        let mut table = Table { at: self.desc, len: self.setup.size, indirect: false };
        let mut next = head;
        // The whole chain, its indirect part included, is at most as long as the ring.
        for _ in 0..=self.setup.size {
            let Some(desc) = table.read(next) else { return Err(QueueError::Index(next)) };
            if desc.flags & DESC_INDIRECT != 0 {
                table = self.indirect(&desc, &table)?;
                next = 0;
                continue;
            }
            if chain.descriptors == self.setup.size {
                return Err(QueueError::Long);
            }
            chain.descriptors += 1;
            self.append(&desc, chain)?;
            if desc.flags & DESC_NEXT == 0 {
                return Ok(());
            }
            next = desc.next;
        }
        Err(QueueError::Long)
    }

    fn indirect(&self, desc: &Desc, table: &Table) -> Result<Table, QueueError> {
        let entries = u64::from(desc.len) / DESC_LEN;
        let whole = entries * DESC_LEN == u64::from(desc.len);
        let allowed = self.indirect && !table.indirect && desc.flags & DESC_NEXT == 0;
        if !allowed || !whole || entries == 0 || entries > u64::from(self.setup.size) {
            return Err(QueueError::Indirect);
        }
        let bad = QueueError::Memory { address: desc.address, len: desc.len };
        let at = resolve(&self.spans, desc.address, u64::from(desc.len)).ok_or(bad)?;
        Ok(Table { at, len: entries as u16, indirect: true })
    }

    fn append(&self, desc: &Desc, chain: &mut Chain) -> Result<(), QueueError> {
        let writable = desc.flags & DESC_WRITE != 0;
        if !writable && chain.readable < chain.iovecs.len() {
            return Err(QueueError::Order);
        }
        let (mut address, mut left) = (desc.address, u64::from(desc.len));
        // A buffer may cross from one region to the next where they touch.
        while left > 0 {
            let bad = QueueError::Memory { address: desc.address, len: desc.len };
            let (host, len) = locate(&self.spans, address, left).ok_or(bad)?;
            chain.iovecs.push(libc::iovec { iov_base: host.cast(), iov_len: len as usize });
            chain.addresses.push(address);
            if writable {
                chain.writable_len += len;
            } else {
                chain.readable += 1;
                chain.readable_len += len;
            }
            address = address.wrapping_add(len);
            left -= len;
        }
        Ok(())
    }
}

/// A descriptor, copied out of guest memory (VIRTIO 1.2 section 2.7.5).
struct Desc {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

struct Table {
    at: *const u8,
    len: u16,
    indirect: bool,
}

impl Table {
    fn read(&self, index: u16) -> Option<Desc> {
        if index >= self.len {
            return None;
        }
        // SAFETY: the table was checked to hold `len` descriptors of 16 bytes inside RAM.
        // Indirect tables have no alignment rule, hence the unaligned type; each field is
        // read once.
        let raw = unsafe { self.at.add(usize::from(index) * 16).cast::<[u8; 16]>().read_volatile() };
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = raw;
        Some(Desc {
            address: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            len: u32::from_le_bytes([i, j, k, l]),
            flags: u16::from_le_bytes([m, n]),
            next: u16::from_le_bytes([o, p]),
        })
    }
}

/// A request: the buffers of one descriptor chain as host memory, readable ones first.
///
/// Reused from request to request. The pointers stay valid as long as guest memory is
/// mapped, which the device sees to by keeping the [`Queue`] or [`Memory`] alive.
#[derive(Default)]
pub struct Chain {
    head: u16,
    descriptors: u16,
    /// How many of `iovecs` the device may read; the rest it may write.
    readable: usize,
    readable_len: u64,
    writable_len: u64,
    iovecs: Vec<libc::iovec>,
    addresses: Vec<u64>,
}

// SAFETY: as for `Queue`: pointers into guest memory, which is shared by nature.
unsafe impl Send for Chain {}

impl Chain {
    /// An empty chain to pop into.
    pub fn new() -> Chain {
        Chain::default()
    }

    fn clear(&mut self, head: u16) {
        self.head = head;
        self.descriptors = 0;
        self.readable = 0;
        self.readable_len = 0;
        self.writable_len = 0;
        self.iovecs.clear();
        self.addresses.clear();
    }

    /// Index of the first descriptor: what the chain is returned by.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Buffers to read from, in order.
    pub fn readable(&self) -> &[libc::iovec] {
        self.iovecs.get(..self.readable).unwrap_or_default()
    }

    /// Buffers to write to, in order.
    pub fn writable(&self) -> &[libc::iovec] {
        self.iovecs.get(self.readable..).unwrap_or_default()
    }

    /// Bytes in the readable buffers.
    pub fn readable_len(&self) -> u64 {
        self.readable_len
    }

    /// Bytes in the writable buffers.
    pub fn writable_len(&self) -> u64 {
        self.writable_len
    }

    /// Copies from the readable part, from `offset` on, until `data` is full or the buffers
    /// end; returns the bytes copied. The guest may change them meanwhile: look at the copy.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> usize {
        let mut done = 0;
        each_part(self.readable(), offset, data.len(), |slice, _| {
            done += slice.copy_to(data.get_mut(done..).unwrap_or_default());
        });
        done
    }

    /// Copies `data` into the writable part, from `offset` on, until it is written or the
    /// buffers end; returns the bytes copied and marks the pages in `queue`'s memory.
    pub fn write(&self, queue: &Queue, offset: u64, data: &[u8]) -> usize {
        let mut done = 0;
        each_part(self.writable(), offset, data.len(), |slice, (i, within)| {
            let rest = data.get(done..).unwrap_or_default();
            let len = slice.len().min(rest.len());
            slice.copy_from(rest);
            if let Some(address) = self.addresses.get(self.readable + i) {
                queue.mark(address.wrapping_add(within), len as u64);
            }
            done += len;
        });
        done
    }
}

/// Calls `f` for each piece of `iovecs` that holds bytes `offset..offset + len`, with the
/// number of the iovec and the offset inside it.
fn each_part(
    iovecs: &[libc::iovec],
    offset: u64,
    len: usize,
    mut f: impl FnMut(VolatileSlice<'_, ()>, (usize, u64)),
) {
    let (mut skip, mut left) = (usize::try_from(offset).unwrap_or(usize::MAX), len);
    for (i, iovec) in iovecs.iter().enumerate() {
        if left == 0 {
            return;
        }
        if skip >= iovec.iov_len {
            skip -= iovec.iov_len;
            continue;
        }
        let part = (iovec.iov_len - skip).min(left);
        // SAFETY: iovecs of a chain lie inside mapped guest memory (checked by `append`), and
        // `skip + part` does not exceed this one.
        let slice = unsafe { VolatileSlice::new(iovec.iov_base.cast::<u8>().add(skip), part) };
        f(slice, (i, skip as u64));
        left -= part;
        skip = 0;
    }
}

fn spans(memory: &Memory) -> Vec<Span> {
    memory
        .iter()
        .map(|r| Span {
            first: r.start_addr().raw_value(),
            len: r.len(),
            host: r.get_host_address(MemoryRegionAddress(0)).unwrap_or(std::ptr::null_mut()),
        })
        .filter(|s| !s.host.is_null())
        .collect()
}

/// Host address of `address` and how many of the `len` bytes follow it there.
fn locate(spans: &[Span], address: u64, len: u64) -> Option<(*mut u8, u64)> {
    let span = spans.iter().find(|s| address.wrapping_sub(s.first) < s.len)?;
    let offset = address - span.first;
    Some((span.host.wrapping_add(offset as usize), len.min(span.len - offset)))
}

/// Host address of a run that must lie in one region.
fn resolve(spans: &[Span], address: u64, len: u64) -> Option<*mut u8> {
    locate(spans, address, len).filter(|(_, have)| *have == len).map(|(host, _)| host)
}

#[cfg(test)]
mod tests;
