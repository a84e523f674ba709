//! Random reads of 4 KiB, `depth` of them in flight.

use core::hint::spin_loop;

use crate::{
    clock,
    order::Order,
    ring::{self, NEXT, Ring, WRITE},
    virtio::Device,
};

const KIND: u32 = 2;
const QUEUE: u16 = 512;
const DEEPEST: usize = 128;
const PIECE: usize = 4096;
const SECTORS: u64 = PIECE as u64 / 512;

/// A request's header: type 0 is a read.
#[repr(C)]
#[derive(Clone, Copy)]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}

#[repr(C, align(4096))]
struct Buffers([[u8; PIECE]; DEEPEST]);

static mut RING: ring::Memory = ring::Memory::new();
static mut HEADERS: [Header; DEEPEST] = [Header { kind: 0, reserved: 0, sector: 0 }; DEEPEST];
static mut STATUS: [u8; DEEPEST] = [0xff; DEEPEST];
static mut BUFFERS: Buffers = Buffers([[0; PIECE]; DEEPEST]);

/// Reads until the time is over.
pub fn run(order: &Order) {
    let depth = order.depth.clamp(1, DEEPEST as u64) as u16;
    let device = Device::start(order.base, KIND, 0);
    // SAFETY: this is the only user of the memory.
    let mut ring = unsafe { Ring::new(&raw mut RING, QUEUE) };
    for slot in 0..depth {
        let (at, first) = (usize::from(slot), 3 * slot);
        // SAFETY: addresses only, within the arrays: a slot is below the depth.
        let (header, buffer, status) = unsafe {
            (&raw mut HEADERS[at] as usize, &raw mut BUFFERS.0[at] as usize, &raw mut STATUS[at] as usize)
        };
        ring.describe(first, header, size_of::<Header>() as u32, NEXT);
        ring.describe(first + 1, buffer, PIECE as u32, NEXT | WRITE);
        ring.describe(first + 2, status, 1, WRITE);
    }
    device.queue(0, &ring);
    device.go();
    let places = (order.sectors / SECTORS).max(1);
    let mut random = 0x9e37_79b9_7f4a_7c15;
    let mut aim = |slot: u16| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let sector = random % places * SECTORS;
        // SAFETY: the slot is below the depth, and its request is not in flight.
        unsafe { (&raw mut HEADERS[usize::from(slot)].sector).write_volatile(sector) };
    };
    (0..depth).for_each(|slot| {
        aim(slot);
        ring.add(3 * slot);
    });
    let start = clock::cycles();
    loop {
        if ring.publish() {
            device.kick(0);
        }
        if clock::is_over(start, order.cycles) {
            break;
        }
        let mut any = false;
        while let Some((head, _)) = ring.take() {
            let slot = head / 3;
            // SAFETY: the device answers with heads it was given.
            let status = unsafe { (&raw const STATUS[usize::from(slot)]).read_volatile() };
            assert!(status == 0);
            any = true;
            aim(slot);
            ring.add(head);
        }
        if !any {
            spin_loop();
        }
    }
}
