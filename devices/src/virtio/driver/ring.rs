//! The driver's side of one split ring (VIRTIO 1.2 section 2.7).
//!
//! Well-behaved calls ([`Ring::add`], [`Ring::take_used`]) keep a free list of descriptors.
//! The raw ones ([`Ring::write_desc`], [`Ring::offer`], [`Ring::set_avail_idx`]) write what
//! they are told and keep nothing: mix them only where the test means to.

use std::{
    num::Wrapping,
    sync::atomic::{Ordering, fence},
};

use vm_memory::{Bytes, GuestAddress};

use crate::{
    Memory,
    virtio::{F_EVENT_IDX, queue::QueueSetup},
};

/// One buffer of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// Guest address.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
    /// Whether the device may write it.
    pub writable: bool,
}

impl Buffer {
    /// A buffer the device reads.
    pub fn readable(address: u64, len: u32) -> Buffer {
        Buffer { address, len, writable: false }
    }

    /// A buffer the device writes.
    pub fn writable(address: u64, len: u32) -> Buffer {
        Buffer { address, len, writable: true }
    }
}

/// A raw descriptor (VIRTIO 1.2 section 2.7.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Desc {
    /// Guest address of the buffer.
    pub address: u64,
    /// Its length in bytes.
    pub len: u32,
    /// `NEXT`, `WRITE`, `INDIRECT`, or nonsense.
    pub flags: u16,
    /// The descriptor that follows when `NEXT` is set.
    pub next: u16,
}

impl Desc {
    /// Flag: `next` names a further descriptor.
    pub const NEXT: u16 = 1;
    /// Flag: the device writes the buffer.
    pub const WRITE: u16 = 2;
    /// Flag: the buffer is a table of descriptors.
    pub const INDIRECT: u16 = 4;

    /// The 16 bytes as they lie in memory.
    pub fn bytes(&self) -> [u8; 16] {
        let value = u128::from(self.address)
            | u128::from(self.len) << 64
            | u128::from(self.flags) << 96
            | u128::from(self.next) << 112;
        value.to_le_bytes()
    }
}

/// One entry of the used ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// Head of the chain that is done, as the device wrote it.
    pub head: u32,
    /// Bytes the device says it wrote.
    pub len: u32,
}

/// One ring in guest memory.
pub struct Ring {
    memory: Memory,
    setup: QueueSetup,
    event_idx: bool,
    avail_idx: Wrapping<u16>,
    /// Avail index the device was last asked to look at.
    told: Wrapping<u16>,
    used_idx: Wrapping<u16>,
    free: Vec<u16>,
    /// Descriptors to free when the chain with this head is used.
    chains: Vec<Vec<u16>>,
    quiet: bool,
}

impl Ring {
    pub(super) fn new(memory: Memory, size: u16, desc: u64, avail: u64, used: u64) -> Ring {
        let setup = QueueSetup { size, desc, avail, used, next_avail: 0, next_used: 0 };
        let free = (0..size).rev().collect();
        let chains = vec![Vec::new(); usize::from(size)];
        let zero = Wrapping(0);
        Ring {
            memory,
            setup,
            event_idx: false,
            avail_idx: zero,
            told: zero,
            used_idx: zero,
            free,
            chains,
            quiet: false,
        }
    }

    /// Where the ring lies and how far the device had come when it was last stopped.
    pub fn setup(&self) -> QueueSetup {
        self.setup
    }

    /// Overwrites where the device goes on from, as after a restore.
    pub fn set_position(&mut self, setup: QueueSetup) {
        self.setup = setup;
    }

    /// Takes note of the features in force.
    pub fn accept(&mut self, features: u64) {
        self.event_idx = features & F_EVENT_IDX != 0;
    }

    /// Forgets everything and clears the ring, as a driver does after a reset.
    pub fn clear(&mut self) {
        let QueueSetup { size, desc, avail, used, .. } = self.setup;
        let entries = usize::from(size);
        for (at, len) in [(desc, 16 * entries), (avail, 6 + 2 * entries), (used, 6 + 8 * entries)] {
            self.memory.write_slice(&vec![0; len], GuestAddress(at)).expect("ring in RAM");
        }
        *self = Ring::new(self.memory.clone(), size, desc, avail, used);
    }

    /// Free descriptors.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Adds a chain of direct descriptors and makes it available; returns its head.
    ///
    /// # Panics
    /// When `buffers` is empty or there are not enough free descriptors.
    pub fn add(&mut self, buffers: &[Buffer]) -> u16 {
        assert!(!buffers.is_empty() && buffers.len() <= self.free.len(), "no free descriptors");
        let taken = self.free.split_off(self.free.len() - buffers.len());
        for (i, buffer) in buffers.iter().enumerate() {
            let next = taken.get(i + 1).copied();
            self.write_desc(taken[i], desc(buffer, next));
        }
        let head = taken[0];
        self.chains[usize::from(head)] = taken;
        self.offer(head);
        head
    }

    /// Adds a chain whose descriptors lie in a table at `table` (16 bytes for each buffer)
    /// and makes it available; returns its head.
    ///
    /// # Panics
    /// When there is no free descriptor.
    pub fn add_indirect(&mut self, table: u64, buffers: &[Buffer]) -> u16 {
        for (i, buffer) in buffers.iter().enumerate() {
            let next = (i + 1 < buffers.len()).then_some(i as u16 + 1);
            let at = GuestAddress(table + 16 * i as u64);
            self.memory.write_slice(&desc(buffer, next).bytes(), at).expect("table in RAM");
        }
        let head = self.free.pop().expect("a free descriptor");
        let len = 16 * buffers.len() as u32;
        self.write_desc(head, Desc { address: table, len, flags: Desc::INDIRECT, next: 0 });
        self.chains[usize::from(head)] = vec![head];
        self.offer(head);
        head
    }

    /// Writes descriptor `index` of the table as it is.
    pub fn write_desc(&self, index: u16, desc: Desc) {
        let at = self.setup.desc + 16 * u64::from(index);
        self.memory.write_slice(&desc.bytes(), GuestAddress(at)).expect("descriptor table in RAM");
    }

    /// Makes the chain that begins at `head` available, whatever it is.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.avail_idx.0 % self.setup.size);
        self.store(self.setup.avail + 4 + 2 * slot, head);
        self.avail_idx += 1;
        self.store(self.setup.avail + 2, self.avail_idx.0);
    }

    /// Writes the avail index as it is.
    pub fn set_avail_idx(&mut self, index: u16) {
        self.avail_idx = Wrapping(index);
        self.store(self.setup.avail + 2, index);
    }

    /// The avail index as this driver last wrote it.
    pub fn avail_idx(&self) -> u16 {
        self.avail_idx.0
    }

    /// The used index as the device last wrote it.
    pub fn device_used_idx(&self) -> u16 {
        self.load(self.setup.used + 2)
    }

    /// Whether the device wants to be told about what was made available since the last call
    /// (VIRTIO 1.2 section 2.7.10).
    pub fn wants_kick(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let (old, new) = (self.told, self.avail_idx);
        self.told = new;
        if self.event_idx {
            let event = Wrapping(self.load(self.setup.used + 4 + 8 * u64::from(self.setup.size)));
            (new - event - Wrapping(1)).0 < (new - old).0
        } else {
            self.load(self.setup.used) & 1 == 0
        }
    }

    /// Asks for no interrupts (true) or for one with the next used entry (false).
    pub fn set_quiet(&mut self, quiet: bool) {
        self.quiet = quiet;
        self.store(self.setup.avail, u16::from(quiet));
        self.wish();
    }

    /// Asks to be interrupted when the used index passes `index` (`EVENT_IDX` only).
    pub fn set_used_event(&self, index: u16) {
        self.store(self.setup.avail + 4 + 2 * u64::from(self.setup.size), index);
    }

    /// Takes the next used entry, if there is one, and frees its descriptors; asks to be
    /// interrupted for the one after it unless the ring is quiet.
    pub fn take_used(&mut self) -> Option<Used> {
        if self.device_used_idx() == self.used_idx.0 {
            return None;
        }
        fence(Ordering::Acquire);
        let at = self.setup.used + 4 + 8 * u64::from(self.used_idx.0 % self.setup.size);
        let head: u32 = self.memory.read_obj(GuestAddress(at)).expect("used ring in RAM");
        let len: u32 = self.memory.read_obj(GuestAddress(at + 4)).expect("used ring in RAM");
        self.used_idx += 1;
        self.wish();
        if let Some(chain) = self.chains.get_mut(head as usize) {
            self.free.append(chain);
        }
        Some(Used { head: u32::from_le(head), len: u32::from_le(len) })
    }

    fn wish(&self) {
        if self.event_idx {
            let event = if self.quiet { self.used_idx - Wrapping(1) } else { self.used_idx };
            self.set_used_event(event.0);
        }
        fence(Ordering::SeqCst);
    }

    fn store(&self, at: u64, value: u16) {
        self.memory.store(value.to_le(), GuestAddress(at), Ordering::Release).expect("ring in RAM");
    }

    fn load(&self, at: u64) -> u16 {
        u16::from_le(self.memory.load(GuestAddress(at), Ordering::Acquire).expect("ring in RAM"))
    }
}

fn desc(buffer: &Buffer, next: Option<u16>) -> Desc {
    let mut flags = if buffer.writable { Desc::WRITE } else { 0 };
    if next.is_some() {
        flags |= Desc::NEXT;
    }
    Desc { address: buffer.address, len: buffer.len, flags, next: next.unwrap_or(0) }
}
