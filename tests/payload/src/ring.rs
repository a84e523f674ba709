//! A split ring (VIRTIO 1.2 section 2.7) whose chains are laid out once and used again.
//!
//! No interrupt is ever asked for; with `VIRTIO_F_EVENT_IDX` that is a `used_event` which the
//! device never reaches, kept half a circle behind. A doorbell is rung only when the device
//! asked for it.

use core::sync::atomic::{AtomicU16, Ordering, fence};

/// Most entries a ring can have here.
pub const MOST: usize = 1024;
/// The device writes into the buffer.
pub const WRITE: u16 = 2;
/// The chain goes on.
pub const NEXT: u16 = 1;

#[repr(C)]
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct UsedEntry {
    id: u32,
    length: u32,
}

/// The memory of one ring, shared with the device.
#[repr(C, align(4096))]
pub struct Memory {
    descriptors: [Descriptor; MOST],
    available: [u16; MOST + 4],
    used_index: [u16; 2],
    used: [UsedEntry; MOST + 1],
}

impl Memory {
    /// All zero.
    pub const fn new() -> Memory {
        Memory {
            descriptors: [Descriptor { address: 0, length: 0, flags: 0, next: 0 }; MOST],
            available: [0; MOST + 4],
            used_index: [0; 2],
            used: [UsedEntry { id: 0, length: 0 }; MOST + 1],
        }
    }
}

/// A ring over its memory.
pub struct Ring {
    memory: *mut Memory,
    size: u16,
    added: u16,
    told: u16,
    taken: u16,
}

impl Ring {
    /// A ring of `size` entries, a power of two of at most [`MOST`].
    ///
    /// # Safety
    /// `memory` is used by this ring alone.
    pub unsafe fn new(memory: *mut Memory, size: u16) -> Ring {
        Ring { memory, size, added: 0, told: 0, taken: 0 }
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Where the device finds descriptors, available and used ring.
    pub fn addresses(&self) -> (usize, usize, usize) {
        // SAFETY: only addresses are made, within the memory that `new` was given.
        unsafe {
            let memory = self.memory;
            (
                &raw mut (*memory).descriptors as usize,
                &raw mut (*memory).available as usize,
                &raw mut (*memory).used_index as usize,
            )
        }
    }

    /// Lays out descriptor `index`.
    pub fn describe(&mut self, index: u16, address: usize, length: u32, flags: u16) {
        let descriptor = Descriptor { address: address as u64, length, flags, next: index.wrapping_add(1) };
        // SAFETY: the index is reduced to the array's length; the device reads what was added.
        unsafe {
            (&raw mut (*self.memory).descriptors[usize::from(index) % MOST]).write_volatile(descriptor)
        };
    }

    /// Puts the chain that starts at `head` into the ring; [`Ring::publish`] shows it.
    pub fn add(&mut self, head: u16) {
        let at = 2 + usize::from(self.added % self.size);
        // SAFETY: the place is within the array, size being at most MOST.
        unsafe { (&raw mut (*self.memory).available[at % (MOST + 4)]).write_volatile(head) };
        self.added = self.added.wrapping_add(1);
    }

    /// Shows the device what was added; whether it wants its doorbell rung.
    pub fn publish(&mut self) -> bool {
        let old = self.told;
        if old == self.added {
            return false;
        }
        // SAFETY: the fields are within the memory and aligned; the device accesses the same
        // ones, and so these accesses are atomic.
        unsafe {
            let memory = self.memory;
            let index = AtomicU16::from_ptr(&raw mut (*memory).available[1]);
            let used_event = &raw mut (*memory).available[2 + usize::from(self.size)];
            AtomicU16::from_ptr(used_event).store(self.taken.wrapping_sub(0x8000), Ordering::Relaxed);
            index.store(self.added, Ordering::Release);
            fence(Ordering::SeqCst);
            let event = (&raw mut (*memory).used).cast::<u16>().add(4 * usize::from(self.size));
            let event = AtomicU16::from_ptr(event).load(Ordering::Acquire);
            self.told = self.added;
            self.added.wrapping_sub(event).wrapping_sub(1) < self.added.wrapping_sub(old)
        }
    }

    /// Takes the next used chain: its head and the bytes the device wrote.
    pub fn take(&mut self) -> Option<(u16, u32)> {
        // SAFETY: as in `publish`; the entry was written before the index.
        unsafe {
            let memory = self.memory;
            let index = AtomicU16::from_ptr(&raw mut (*memory).used_index[1]).load(Ordering::Acquire);
            if index == self.taken {
                return None;
            }
            let at = usize::from(self.taken % self.size);
            let entry = (&raw mut (*memory).used[at % (MOST + 1)]).read_volatile();
            self.taken = self.taken.wrapping_add(1);
            Some((entry.id as u16, entry.length))
        }
    }
}
