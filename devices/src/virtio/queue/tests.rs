//! The ring against a driver that keeps the rules, and against ones that do not.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::*;
use crate::virtio::{
    F_COMMON, F_VERSION_1,
    driver::{Buffer, Desc, Driver, memory, tracked_memory},
};

const MIB: usize = 1 << 20;
/// Memory of two regions: the second one does not touch the first.
const RANGES: [(u64, usize); 2] = [(0, MIB), (0x4000_0000, MIB)];
const BUFFER: u64 = 0x8_0000;

fn pair(size: u16, features: u64) -> (Driver, Queue) {
    let mut driver = Driver::new(memory(&RANGES), &[size]);
    driver.rings[0].accept(features);
    let setup = driver.rings[0].setup();
    let queue = Queue::new(0, setup, size, features, &driver.memory).unwrap();
    (driver, queue)
}

/// What the device makes of the chain that begins at descriptor 0.
fn walk(driver: &mut Driver, queue: &mut Queue, table: &[Desc]) -> Result<Vec<(usize, bool)>, QueueError> {
    for (i, desc) in table.iter().enumerate() {
        driver.rings[0].write_desc(i as u16, *desc);
    }
    driver.rings[0].offer(0);
    let mut chain = Chain::new();
    queue.pop(&mut chain)?;
    let part = |iovecs: &[libc::iovec], writable| {
        iovecs.iter().map(|iovec| (iovec.iov_len, writable)).collect::<Vec<_>>()
    };
    Ok([part(chain.readable(), false), part(chain.writable(), true)].concat())
}

fn one(table: &[Desc]) -> Result<Vec<(usize, bool)>, QueueError> {
    let (mut driver, mut queue) = pair(8, F_COMMON);
    walk(&mut driver, &mut queue, table)
}

fn desc(address: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc { address, len, flags, next }
}

#[test]
fn two_hundred_thousand_requests_go_around_the_indices_and_none_is_lost() {
    for (size, features) in [(256, F_COMMON), (8, F_VERSION_1), (1, F_COMMON)] {
        let (mut driver, mut queue) = pair(size, features);
        let mut chain = Chain::new();
        let (mut sent, mut done) = (0u32, 0u32);
        let mut seed = 7u32;
        while done < 200_000 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let burst = (seed >> 16) % u32::from(size) + 1;
            let ring = &mut driver.rings[0];
            for _ in 0..burst.min(ring.free() as u32) {
                ring.add(&[Buffer::writable(BUFFER, 1 + sent % 4000)]);
                sent += 1;
            }
            while queue.pop(&mut chain).unwrap() {
                queue.push(chain.head(), chain.writable_len() as u32);
            }
            queue.publish();
            while let Some(used) = driver.rings[0].take_used() {
                assert_eq!(used.len, 1 + done % 4000, "request {done} came back out of order");
                done += 1;
            }
            assert_eq!(sent, done);
        }
        let setup = queue.setup();
        assert_eq!((setup.next_avail, setup.next_used), (done as u16, done as u16));
        assert_eq!(driver.rings[0].free(), usize::from(size), "a descriptor was lost");
    }
}

#[test]
fn interrupts_come_exactly_when_the_driver_asked() {
    // The model: the driver is to be told if the index it named is among those published now.
    let (mut driver, mut queue) = pair(64, F_COMMON);
    let mut chain = Chain::new();
    let (mut used, mut seed) = (0u32, 99u64);
    for _ in 0..20_000 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let batch = (seed >> 60) as u32;
        for _ in 0..batch {
            driver.rings[0].add(&[Buffer::writable(BUFFER, 8)]);
        }
        // Somewhere near: before, among or behind the coming entries.
        let event = used.wrapping_add((seed >> 40) as u32 % 24).wrapping_sub(4);
        driver.rings[0].set_used_event(event as u16);
        while queue.pop(&mut chain).unwrap() {
            queue.push(chain.head(), 0);
        }
        let wanted = (used..used + batch).any(|index| index as u16 == event as u16);
        assert_eq!(queue.publish(), wanted, "entries {used}+{batch}, event at {event}");
        while driver.rings[0].take_used().is_some() {}
        used += batch;
    }
}

#[test]
fn doorbells_ring_exactly_when_the_device_asked() {
    let (mut driver, mut queue) = pair(64, F_COMMON);
    let mut chain = Chain::new();
    let mut seed = 5u32;
    for _ in 0..20_000 {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        queue.disarm();
        while queue.pop(&mut chain).unwrap() {
            queue.push(chain.head(), 0);
        }
        queue.publish();
        let armed = seed & 0x1_0000 != 0;
        if armed {
            assert!(!queue.arm());
        }
        while driver.rings[0].take_used().is_some() {}
        // Unarmed, the event index is stale: the driver rings only when it comes around.
        let mut rung = 0;
        for _ in 0..1 + (seed >> 28) {
            driver.rings[0].add(&[Buffer::writable(BUFFER, 8)]);
            rung += u32::from(driver.rings[0].wants_kick());
        }
        assert!(rung <= 1);
        if armed {
            assert_eq!(rung, 1, "the first chain after arming rings, the others do not");
        }
        assert_eq!(queue.arm(), queue.waiting().unwrap() > 0, "arming finds what came before it");
    }
}

#[test]
fn without_event_idx_the_flags_decide() {
    let (mut driver, mut queue) = pair(8, F_VERSION_1);
    let mut chain = Chain::new();
    for quiet in [false, true, false] {
        driver.rings[0].set_quiet(quiet);
        queue.disarm();
        driver.rings[0].add(&[Buffer::writable(BUFFER, 8)]);
        assert!(!driver.rings[0].wants_kick());
        assert!(queue.arm(), "arming finds what came before it");
        assert!(driver.rings[0].wants_kick());
        assert!(queue.pop(&mut chain).unwrap());
        queue.push(chain.head(), 0);
        assert_eq!(queue.publish(), !quiet);
        assert!(!queue.publish(), "nothing new");
        assert!(driver.rings[0].take_used().is_some());
    }
}

#[test]
fn buffers_outside_memory_are_refused() {
    let end = MIB as u64;
    for (address, len) in [
        (end, 1),
        (end - 1, 2),
        (end - 16, u32::MAX),
        (0x2000_0000, 4096),
        (0x4000_0000 - 1, 2),
        (0x4000_0000 + end - 1, 2),
        (0xfee0_0000, 4),
        (u64::MAX, 1),
        (u64::MAX - 3, 16),
        (0, u32::MAX),
    ] {
        for flags in [0, Desc::WRITE] {
            let got = one(&[desc(address, len, flags, 0)]);
            assert!(matches!(got, Err(QueueError::Memory { .. })), "{address:#x}+{len:#x}: {got:?}");
        }
    }
    assert_eq!(one(&[desc(end - 16, 16, 0, 0)]).unwrap(), [(16, false)]);
    assert_eq!(one(&[desc(u64::MAX, 0, 0, 0)]).unwrap(), [], "an empty buffer is nowhere");
}

#[test]
fn a_buffer_may_cross_from_one_region_to_the_next_where_they_touch() {
    let mut driver = Driver::new(memory(&[(0, MIB), (MIB as u64, MIB)]), &[8]);
    let setup = driver.rings[0].setup();
    let mut queue = Queue::new(0, setup, 8, F_COMMON, &driver.memory).unwrap();
    let got = walk(&mut driver, &mut queue, &[desc(MIB as u64 - 10, 30, Desc::WRITE, 0)]);
    assert_eq!(got.unwrap(), [(10, true), (20, true)]);
}

#[test]
fn avail_indices_that_cannot_be_are_refused() {
    for jump in [9, 10, 0x4000, 0x8000, 0xffff] {
        let (mut driver, mut queue) = pair(8, F_COMMON);
        driver.rings[0].set_avail_idx(jump);
        assert_eq!(queue.pop(&mut Chain::new()), Err(QueueError::Ahead(jump)));
        assert!(queue.arm(), "the mistake is not slept over");
    }
    // Backwards, in the middle of work.
    let (mut driver, mut queue) = pair(8, F_COMMON);
    driver.rings[0].add(&[Buffer::readable(BUFFER, 1)]);
    assert!(queue.pop(&mut Chain::new()).unwrap());
    driver.rings[0].set_avail_idx(0);
    assert_eq!(queue.pop(&mut Chain::new()), Err(QueueError::Ahead(0xffff)));
}

#[test]
fn heads_and_links_outside_the_table_are_refused() {
    for head in [8, 9, 0x7fff, 0x8000, 0xffff] {
        let (mut driver, mut queue) = pair(8, F_COMMON);
        driver.rings[0].offer(head);
        assert_eq!(queue.pop(&mut Chain::new()), Err(QueueError::Index(head)));
        let got = one(&[desc(BUFFER, 1, Desc::NEXT, head)]);
        assert_eq!(got, Err(QueueError::Index(head)));
    }
}

#[test]
fn loops_end_after_as_many_steps_as_the_ring_is_long() {
    let own = [desc(BUFFER, 1, Desc::NEXT, 0)];
    let two = [desc(BUFFER, 1, Desc::NEXT, 1), desc(BUFFER, 1, Desc::NEXT, 0)];
    let all: Vec<_> = (0..8).map(|i| desc(BUFFER, 1, Desc::NEXT, (i + 1) % 8)).collect();
    for table in [&own[..], &two[..], &all[..]] {
        assert_eq!(one(table), Err(QueueError::Long));
    }
    let mut straight = all;
    straight[7].flags = 0;
    assert_eq!(one(&straight).unwrap().len(), 8, "as long as the ring is fine");
}

#[test]
fn readable_buffers_come_first() {
    let table = [desc(BUFFER, 5, Desc::NEXT | Desc::WRITE, 1), desc(BUFFER, 1, 0, 0)];
    assert_eq!(one(&table), Err(QueueError::Order));
    let table = [desc(BUFFER, 5, Desc::NEXT, 1), desc(BUFFER, 1, Desc::WRITE, 0)];
    assert_eq!(one(&table).unwrap(), [(5, false), (1, true)]);
}

#[test]
fn indirect_tables_are_followed_once_and_only_if_whole() {
    let (mut driver, mut queue) = pair(8, F_COMMON);
    let buffers: Vec<_> = (1..=8).map(|len| Buffer::writable(BUFFER, len)).collect();
    let head = driver.rings[0].add_indirect(BUFFER + 0x1001, &buffers);
    let mut chain = Chain::new();
    assert!(queue.pop(&mut chain).unwrap());
    assert_eq!((chain.head(), chain.writable().len(), chain.writable_len()), (head, 8, 36));

    let indirect = |len, flags| one(&[desc(BUFFER, len, Desc::INDIRECT | flags, 1)]);
    for (len, flags) in [(0, 0), (15, 0), (17, 0), (16, Desc::NEXT), (16 * 9, 0), (!15, 0)] {
        assert_eq!(indirect(len, flags), Err(QueueError::Indirect), "{len} {flags}");
    }
    let outside = one(&[desc(MIB as u64 - 16, 32, Desc::INDIRECT, 0)]);
    assert!(matches!(outside, Err(QueueError::Memory { .. })));
    let (mut driver, mut queue) = pair(8, F_VERSION_1);
    let got = walk(&mut driver, &mut queue, &[desc(BUFFER, 16, Desc::INDIRECT, 0)]);
    assert_eq!(got, Err(QueueError::Indirect), "not negotiated");
    // A table inside a table, and one that loops.
    for inner in [desc(BUFFER, 16, Desc::INDIRECT, 0), desc(BUFFER, 16, Desc::NEXT, 1)] {
        let (mut driver, mut queue) = pair(8, F_COMMON);
        driver.poke(BUFFER, &inner.bytes());
        let got = walk(&mut driver, &mut queue, &[desc(BUFFER, 16, Desc::INDIRECT, 0)]);
        assert!(matches!(got, Err(QueueError::Indirect | QueueError::Index(1))), "{got:?}");
    }
    // A chain in front of the table counts too.
    let (mut driver, mut queue) = pair(8, F_COMMON);
    for i in 0..8 {
        driver.poke(BUFFER + 16 * i, &desc(BUFFER, 1, Desc::NEXT, i as u16 + 1).bytes());
    }
    let table = [desc(BUFFER, 1, Desc::NEXT, 1), desc(BUFFER, 16 * 8, Desc::INDIRECT, 0)];
    let got = walk(&mut driver, &mut queue, &table);
    assert!(matches!(got, Err(QueueError::Long | QueueError::Index(8))), "{got:?}");
}

#[test]
fn rings_that_cannot_be_are_refused() {
    let driver = Driver::new(memory(&RANGES), &[8]);
    let good = driver.rings[0].setup();
    let make = |setup| Queue::new(0, setup, 8, F_COMMON, &driver.memory).map(|_| ());
    assert_eq!(make(good), Ok(()));
    for size in [0, 3, 16, 32768, 65535] {
        assert_eq!(make(QueueSetup { size, ..good }), Err(QueueError::Size(size)));
    }
    let end = MIB as u64;
    for (desc, avail, used) in [
        (good.desc + 8, good.avail, good.used),
        (good.desc, good.avail + 1, good.used),
        (good.desc, good.avail, good.used + 2),
        (end - 64, good.avail, good.used),
        (good.desc, end - 20, good.used),
        (good.desc, good.avail, 0x4000_0000 - 4),
        (0xc000_0000, good.avail, good.used),
        (good.desc, u64::MAX - 1, good.used),
        (good.desc, good.avail, u64::MAX - 3),
    ] {
        assert!(matches!(make(QueueSetup { desc, avail, used, ..good }), Err(QueueError::Ring { .. })));
    }
}

#[test]
fn chains_put_back_are_popped_again_and_positions_survive_a_save() {
    let (mut driver, mut queue) = pair(8, F_COMMON);
    for len in 1..=3 {
        driver.rings[0].add(&[Buffer::writable(BUFFER, len)]);
    }
    let mut chain = Chain::new();
    queue.pop(&mut chain).unwrap();
    queue.push(chain.head(), 1);
    queue.publish();
    queue.pop(&mut chain).unwrap();
    queue.pop(&mut chain).unwrap();
    queue.undo_pop(2);
    let mut queue = Queue::new(0, queue.setup(), 8, F_COMMON, &driver.memory).unwrap();
    assert_eq!(queue.waiting(), Ok(2));
    queue.pop(&mut chain).unwrap();
    assert_eq!(chain.writable_len(), 2);
    queue.push(chain.head(), 2);
    queue.push(0xffff, 9);
    queue.publish();
    let lens: Vec<_> = std::iter::from_fn(|| driver.rings[0].take_used()).map(|used| used.len).collect();
    assert_eq!(lens, [1, 2]);
}

#[test]
fn copies_go_through_all_segments_and_stop_at_the_end() {
    let (mut driver, mut queue) = pair(8, F_COMMON);
    driver.poke(BUFFER, b"hello, world");
    driver.rings[0].add(&[
        Buffer::readable(BUFFER, 5),
        Buffer::readable(BUFFER + 5, 7),
        Buffer::writable(BUFFER + 100, 3),
        Buffer::writable(BUFFER + 200, 4),
    ]);
    let mut chain = Chain::new();
    queue.pop(&mut chain).unwrap();
    let mut data = [0; 20];
    assert_eq!(chain.read(0, &mut data), 12);
    assert_eq!(&data[..12], b"hello, world");
    assert_eq!(chain.read(4, &mut data[..3]), 3);
    assert_eq!(&data[..3], b"o, ");
    assert_eq!((chain.read(12, &mut data), chain.read(u64::MAX, &mut data)), (0, 0));
    assert_eq!(chain.write(&queue, 1, b"abcdefghij"), 6);
    assert_eq!(driver.peek(BUFFER + 100, 4), b"\0ab\0");
    assert_eq!(driver.peek(BUFFER + 200, 5), b"cdef\0");
}

#[test]
fn pages_the_device_wrote_are_marked() {
    let mut driver = Driver::new(tracked_memory(&RANGES), &[8]);
    let setup = driver.rings[0].setup();
    let mut queue = Queue::new(0, setup, 8, F_COMMON, &driver.memory).unwrap();
    let dirty = |driver: &Driver, address: u64| {
        let region = driver.memory.find_region(GuestAddress(address)).unwrap();
        let bitmap = std::ops::Deref::deref(region).bitmap();
        let mut seen = Vec::new();
        for page in 0..region.len() / 4096 {
            if bitmap.dirty_at(page as usize * 4096) {
                seen.push(page);
            }
        }
        bitmap.take();
        seen
    };
    driver.rings[0].add(&[Buffer::writable(BUFFER + 4090, 10), Buffer::writable(0x4000_2000, 5000)]);
    dirty(&driver, 0);
    let mut chain = Chain::new();
    queue.pop(&mut chain).unwrap();
    chain.write(&queue, 0, &[1; 11]);
    assert_eq!(dirty(&driver, BUFFER), [0x80, 0x81]);
    assert_eq!(dirty(&driver, 0x4000_0000), [2]);
    queue.mark_written(&chain, 10 + 4097);
    assert_eq!(dirty(&driver, BUFFER), [0x80, 0x81]);
    assert_eq!(dirty(&driver, 0x4000_0000), [2, 3]);
    queue.push(chain.head(), 10);
    queue.publish();
    assert_eq!(dirty(&driver, 0), [setup.used / 4096]);
}

#[test]
fn a_driver_that_writes_while_the_device_reads_does_no_harm() {
    let (driver, mut queue) = pair(8, F_COMMON);
    let memory = driver.memory.clone();
    let setup = driver.rings[0].setup();
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let writer = std::thread::spawn(move || {
        let mut ring = driver.rings;
        let mut seed = 1u64;
        while !stopped.load(Ordering::Relaxed) {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let flags = (seed >> 33) as u16 & 7;
            let address = if seed & 1 == 0 { BUFFER } else { seed };
            let next = (seed >> 50) as u16 % 9;
            ring[0].write_desc((seed >> 60) as u16 % 8, desc(address, (seed >> 20) as u32 % 65, flags, next));
            ring[0].offer((seed >> 55) as u16 % 8);
        }
    });
    let mut chain = Chain::new();
    let (mut popped, mut refused) = (0, 0);
    let end = Instant::now() + Duration::from_secs(1);
    while (popped < 5_000 || refused < 5_000) && Instant::now() < end {
        match queue.pop(&mut chain) {
            Ok(true) => {
                popped += 1;
                assert!(chain.readable().len() + chain.writable().len() <= 8);
                let mut data = [0; 64];
                assert!(chain.read(0, &mut data) as u64 <= chain.readable_len());
                chain.write(&queue, 0, &data);
                queue.push(chain.head(), 0);
                queue.publish();
            }
            Ok(false) => std::thread::yield_now(),
            // What a device answers with a reset; here the ring goes on behind the mistake.
            Err(error) => {
                refused += 1;
                let next_avail = match error {
                    // The writer does not wait: take up the last few entries of many.
                    QueueError::Ahead(by) => queue.setup().next_avail.wrapping_add(by).wrapping_sub(4),
                    _ => queue.setup().next_avail.wrapping_add(1),
                };
                queue = Queue::new(0, QueueSetup { next_avail, ..setup }, 8, F_COMMON, &memory).unwrap();
            }
        }
    }
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    assert!(popped > 0 && refused > 0, "{popped} chains taken, {refused} refused");
}
