//! Guests that mean harm: every device, both transports, and it must still work afterwards.

use std::{
    thread,
    time::{Duration, Instant},
};

use devices::virtio::{
    core::status,
    driver::{Desc, PATIENCE, memory},
    queue::QueueSetup,
};

use crate::{
    each,
    kinds::kinds,
    plugged::{BASE, BUFFERS, ECAM, FUNCTION, Plugged, TRANSPORTS, Where},
};

const END: u64 = 4 << 20;

/// Descriptor tables that no driver may write, beginning at descriptor 0 each, for a ring of
/// `size`.
fn tables(size: u16) -> Vec<Vec<Desc>> {
    let desc = |address, len, flags, next| Desc { address, len, flags, next };
    let mut tables = Vec::new();
    // Where nothing is, or too much: T01 and T04.
    for (address, len) in [
        (END, 64),
        (END - 8, 64),
        (END - 64, u32::MAX),
        (BASE, 4),
        (BASE + 0x50, 4),
        (ECAM, 4096),
        (u64::MAX - 8, 64),
        (u64::MAX, 0),
        (BUFFERS, 0),
        (0, u32::MAX),
        (0, END as u32),
        (0xfee0_0000, 16),
    ] {
        for flags in [0, Desc::WRITE] {
            tables.push(vec![desc(address, len, flags, 0)]);
            // The same behind a proper header, and in front of a proper end.
            tables.push(vec![
                desc(BUFFERS, 16, Desc::NEXT, 1),
                desc(address, len, flags | Desc::NEXT, 2),
                desc(BUFFERS + 64, 1, Desc::WRITE, 0),
            ]);
        }
    }
    // Sizes no header has, in both directions.
    for len in [1, 2, 11, 12, 13, 15, 16, 17, 43, 44, 45, 511, 513, 65_535, 1 << 20] {
        tables.push(vec![desc(BUFFERS, len, 0, 0)]);
        tables.push(vec![desc(BUFFERS, len, Desc::WRITE, 0)]);
        tables.push(vec![desc(BUFFERS, len, Desc::NEXT, 1), desc(BUFFERS, len, Desc::WRITE, 0)]);
    }
    // Loops, order, links: T05.
    tables.push(vec![desc(BUFFERS, 16, Desc::NEXT, 0)]);
    tables.push(vec![desc(BUFFERS, 16, Desc::NEXT, 1), desc(BUFFERS, 16, Desc::NEXT, 0)]);
    tables.push(vec![desc(BUFFERS, 16, Desc::NEXT, size)]);
    tables.push(vec![desc(BUFFERS, 16, Desc::NEXT, 0xffff)]);
    tables.push(vec![desc(BUFFERS, 16, Desc::NEXT | Desc::WRITE, 1), desc(BUFFERS, 16, 0, 0)]);
    tables
        .push((0..size).map(|i| desc(BUFFERS, 1 << 20, Desc::NEXT | Desc::WRITE, (i + 1) % size)).collect());
    // As long as the ring, all over the same megabyte: much asked for, little there.
    for flags in [0, Desc::WRITE] {
        let link = |i| if i + 1 < size { Desc::NEXT } else { 0 };
        tables.push((0..size).map(|i| desc(BUFFERS, 1 << 20, flags | link(i), i + 1)).collect());
    }
    // Indirect tables that cannot be.
    for (len, flags) in [(0, 0), (15, 0), (24, 0), (16, Desc::NEXT), (16, Desc::WRITE), (!15, 0)] {
        tables.push(vec![desc(BUFFERS, len, Desc::INDIRECT | flags, 1)]);
    }
    tables.push(vec![desc(END - 16, 32, Desc::INDIRECT, 0)]);
    // An indirect table that is itself: the ring's own table.
    tables.push(vec![desc(0, 16, Desc::INDIRECT, 0)]);
    tables
}

#[test]
fn hostile_chains_on_every_queue_never_end_a_device_for_good() {
    each(|mut plugged| {
        for queue in 0..plugged.driver.rings.len() {
            let size = plugged.driver.rings[queue].setup().size;
            for table in tables(size) {
                plugged.up();
                let ring = &mut plugged.driver.rings[queue];
                for (i, desc) in table.iter().enumerate() {
                    ring.write_desc(i as u16, *desc);
                }
                ring.offer(0);
                plugged.face.notify(queue as u16);
                // Answered, given up on, or kept for later: whatever it is, a reset ends it.
                let end = Instant::now() + Duration::from_millis(3);
                while plugged.driver.rings[queue].device_used_idx() == 0
                    && plugged.face.status() & status::NEEDS_RESET == 0
                    && Instant::now() < end
                {
                    thread::sleep(Duration::from_micros(100));
                }
            }
            plugged.up();
            plugged.talk();
        }
    });
}

#[test]
fn avail_rings_that_lie_need_a_reset_and_a_reset_heals() {
    each(|mut plugged| {
        for queue in 0..plugged.driver.rings.len() {
            let size = plugged.driver.rings[queue].setup().size;
            for index in [size + 1, 0x8000, 0xffff] {
                plugged.up();
                plugged.driver.rings[queue].set_avail_idx(index);
                plugged.face.notify(queue as u16);
                wait_broken(&plugged, queue);
            }
            for head in [size, 0x8000, 0xffff] {
                plugged.up();
                plugged.driver.rings[queue].offer(head);
                plugged.face.notify(queue as u16);
                wait_broken(&plugged, queue);
            }
            plugged.up();
            plugged.talk();
        }
    });
}

/// Waits for the device to say that it cannot go on. Only a queue that it need not look at
/// (room for input while there is none) may be left alone.
fn wait_broken(plugged: &Plugged, queue: usize) {
    let asked = plugged.asks_on(queue);
    let limit = if asked { PATIENCE } else { Duration::from_millis(20) };
    let end = Instant::now() + limit;
    while plugged.face.status() & status::NEEDS_RESET == 0 && Instant::now() < end {
        thread::sleep(Duration::from_micros(200));
    }
    assert!(!asked || plugged.face.status() == 0x4f, "queue {queue} is broken and nobody said so");
    assert_eq!(plugged.driver.rings[queue].device_used_idx(), 0, "something was answered");
}

#[test]
fn rings_that_cannot_be_are_refused_and_a_reset_heals() {
    each(|mut plugged| {
        for index in 0..plugged.driver.rings.len() {
            let good = plugged.setups();
            let it = good[index];
            for bad in [
                QueueSetup { desc: it.desc + 8, ..it },
                QueueSetup { avail: it.avail + 1, ..it },
                QueueSetup { used: it.used + 2, ..it },
                QueueSetup { desc: END - 16, ..it },
                QueueSetup { used: BASE, ..it },
                QueueSetup { avail: u64::MAX - 1, ..it },
                QueueSetup { used: it.desc, ..it },
            ] {
                let mut setups = good.clone();
                setups[index] = bad;
                assert_eq!(plugged.face.set_up(u64::MAX, &setups), 0x4f, "{bad:x?}");
            }
        }
        plugged.up();
        plugged.talk();
    });
}

#[test]
fn a_storm_of_doorbells_with_nothing_behind_them_changes_nothing() {
    each(|mut plugged| {
        plugged.up();
        let queues = plugged.driver.rings.len() as u16;
        for i in 0..20_000u32 {
            plugged.face.notify((i % u32::from(queues + 2)) as u16);
        }
        // Those that no event descriptor takes.
        let offset = if plugged.place == Where::Mmio { 0x50 } else { 0x3000 };
        for i in 0..5_000u32 {
            plugged.bus.write(BASE + offset, &i.to_le_bytes());
        }
        plugged.talk();
        assert_eq!(plugged.face.status(), 0xf);
    });
}

#[test]
fn every_queue_number_can_be_selected() {
    each(|mut plugged| {
        plugged.up();
        let queues = plugged.driver.rings.len() as u16;
        for index in queues..=u16::MAX {
            assert_eq!(plugged.face.queue_max(index), 0);
        }
        for index in [queues, 0x7fff, 0x8000, 0xffff] {
            plugged.face.set_queue(index, &QueueSetup { size: 1, ..QueueSetup::default() });
            assert!(!plugged.face.queue_ready(index));
        }
        plugged.talk();
    });
}

/// A small generator with a fixed start, so that a failure comes again.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 16 ^ self.0 << 40
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.roll() % limit
    }

    /// Values that mean something now and then.
    fn value(&mut self) -> u64 {
        match self.below(8) {
            0 => 0,
            1 => 1,
            2 => u64::MAX,
            3 => 1 << self.below(64),
            4 => self.below(16),
            5 => self.below(END),
            6 => [0xf, 0xb, 3, 0x8000, 0xffff_8000, BASE, ECAM, 0x1000][self.below(8) as usize],
            _ => self.roll(),
        }
    }
}

#[test]
fn random_register_accesses_never_panic_and_leave_a_device_that_works() {
    const ACCESSES: usize = 100_000;
    let kinds = kinds();
    for transport in TRANSPORTS {
        for (seed, kind) in (1..).zip(&kinds) {
            println!("{} over {transport:?}", kind.name);
            let mut plugged = Plugged::new(kind, transport, memory(&[(0, END as usize)]));
            let mut dice = Dice(seed);
            for i in 0..ACCESSES / kinds.len() {
                if i % 500 == 0 {
                    // Begin from a device that runs with something in its rings.
                    plugged.recover();
                    for ring in &mut plugged.driver.rings {
                        let (address, len) = (dice.value(), dice.value() as u32);
                        ring.write_desc(0, Desc { address, len, flags: dice.below(8) as u16, next: 0 });
                        ring.offer(0);
                    }
                    plugged.bench.messages();
                }
                access(&plugged, &mut dice);
            }
            plugged.recover();
            plugged.talk();
        }
    }
}

fn access(plugged: &Plugged, dice: &mut Dice) {
    let window = match (plugged.place, dice.below(3)) {
        (Where::Mmio, 0) => (BASE, 0x1000),
        (Where::Mmio, _) => (BASE, 0x120),
        (Where::Pci, 0) => (FUNCTION, 0x100),
        (Where::Pci, 1) => (BASE + 0x1000 * dice.below(8), 0x40),
        (Where::Pci, _) => (ECAM + (dice.below(64) << 12), 0x1000),
    };
    let len = [1, 2, 4, 8, 4, 4, 2, 3][dice.below(8) as usize];
    let mut at = window.0 + dice.below(window.1);
    if dice.below(4) != 0 {
        at &= !(len as u64).next_power_of_two().wrapping_sub(1);
    }
    let mut data = dice.value().to_le_bytes();
    if dice.below(3) == 0 {
        plugged.bus.read(at, &mut data[..len]);
    } else {
        plugged.bus.write(at, &data[..len]);
    }
}
