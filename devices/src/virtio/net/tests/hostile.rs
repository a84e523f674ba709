//! What a guest or a host may send to do harm.

use super::*;
use crate::virtio::driver::{Desc, memory, tracked_memory};

#[test]
fn frames_of_a_false_length_are_counted_dropped_and_returned() {
    let mut rig = rig(0);
    let mut malformed = 0;
    for (len, good) in [
        (0, false),
        (1, false),
        (13, false),
        (14, true),
        (1514, true),
        (65_550, true),
        (65_551, false),
        (1 << 20, false),
    ] {
        let bytes = frame(len, 1);
        rig.send(&bytes, &[12]);
        if good {
            assert_eq!(rig.peers[0].take().unwrap(), bytes);
        } else {
            malformed += 1;
        }
        rig.wait_counter("tx_malformed", malformed);
    }
    // Not even a whole header.
    for len in 1..12 {
        rig.send(&vec![0; len], &[]);
    }
    rig.wait_counter("tx_malformed", malformed + 11);
    assert!(rig.peers[0].take_for(Duration::from_millis(20)).is_none());
    assert_eq!(rig.driver.signals.counts().needs_reset, 0);
}

#[test]
fn only_true_headers_reach_the_host() {
    let csum = 1u64 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_HOST_TSO4;
    let mut rig = rig(csum);
    let header = |flags, gso, len: u16, size: u16, start: u16, offset: u16| {
        let mut bytes = frame(2000, 5);
        bytes[0] = flags;
        bytes[1] = gso;
        for (at, value) in [(2, len), (4, size), (6, start), (8, offset), (10, 0xffff)] {
            bytes[at..at + 2].copy_from_slice(&u16::to_le_bytes(value));
        }
        bytes
    };
    let bad = [
        header(1, 1, 54, 0, 34, 16),
        header(1, 1, 2001, 1448, 34, 16),
        header(1, 0, 0, 0, 1999, 16),
        header(1, 0, 0, 0, 0xffff, 0xffff),
        header(1, 4, 54, 1448, 34, 16),
        header(1, 77, 54, 1448, 34, 16),
        header(0, 1, 54, 1448, 34, 16),
    ];
    for bytes in &bad {
        rig.send(bytes, &[5, 5]);
    }
    rig.wait_counter("tx_malformed", bad.len() as u64);
    let good = header(1, 1, 54, 1448, 34, 16);
    rig.send(&good, &[5, 5]);
    assert_eq!(rig.peers[0].take().unwrap(), with_count(good, 0), "the count of buffers is cleared");
}

#[test]
fn foreign_source_addresses_are_dropped_when_asked_for() {
    let mut rig = rig_of(1, 0);
    rig.net.drop_spoofed = true;
    rig.start();
    let mut bytes = frame(100, 1);
    rig.send(&bytes, &[]);
    rig.wait_counter("tx_spoofed", 1);
    bytes[18..24].copy_from_slice(&ADDRESS.0);
    rig.send(&bytes, &[20]);
    assert_eq!(rig.peers[0].take().unwrap(), bytes);
}

#[test]
fn an_address_that_changes_after_its_check_does_not_pass() {
    let mut rig = rig_of(1, 0);
    rig.net.drop_spoofed = true;
    rig.start();
    let mut bytes = frame(100, 1);
    bytes[18..24].copy_from_slice(&ADDRESS.0);
    rig.driver.poke(rig.scratch, &bytes);
    let buffer = [Buffer::readable(rig.scratch, bytes.len() as u32)];
    let (memory, at) = (rig.driver.memory.clone(), rig.scratch + 23);
    let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let seen = Arc::clone(&done);
    std::thread::spawn(move || {
        use vm_memory::{Bytes, GuestAddress};
        while !seen.load(Ordering::Relaxed) {
            for last in [9, ADDRESS.0[5]] {
                memory.write_obj(last, GuestAddress(at)).unwrap();
            }
        }
    });
    for _ in 0..3000 {
        assert_eq!(rig.driver.request(1, &buffer), Some(0));
        while let Some(frame) = rig.peers[0].take_for(Duration::ZERO) {
            assert_eq!(frame[18..24], ADDRESS.0, "it was another one when it was checked");
        }
    }
    done.store(true, Ordering::Relaxed);
    assert!(rig.counter("tx_packets") > 0);
}

#[test]
fn frames_of_a_false_length_from_the_host_never_reach_the_guest() {
    let mut rig = rig(MRG);
    (0..60).for_each(|_| rig.post(&[2000]));
    assert!(rig.peers[0].send(&[0; 11]));
    assert!(rig.peers[0].send(&vec![0; 65_563]));
    assert!(rig.peers[0].send(&vec![0; 90_000]));
    assert!(rig.peers[0].send(&frame(100, 1)));
    assert_eq!(rig.receive(), (with_count(frame(100, 1), 1), 1));
    rig.wait_counter("rx_packets", 1);
    assert_eq!(rig.counter("rx_dropped"), 3);
}

#[test]
fn a_receive_buffer_without_room_for_the_header_needs_a_reset_and_sending_goes_on() {
    for features in [0, MRG] {
        let mut rig = rig(features);
        rig.post(&[11]);
        assert!(rig.driver.signals.wait(|c| c.needs_reset == 1));
        rig.send(&frame(100, 1), &[]);
        assert_eq!(rig.peers[0].take().unwrap(), frame(100, 1));
        assert!(rig.peers[0].send(&frame(100, 1)));
        rig.stop();
        assert_eq!(rig.driver.signals.counts().needs_reset, 1);
        assert_eq!(rig.counter("queue_errors"), 1);
    }
}

#[test]
fn broken_rings_need_a_reset_and_leave_the_other_direction_alone() {
    let mut rig = rig(MRG);
    let outside = Desc { address: 1 << 40, len: 100, flags: 0, next: 0 };
    rig.driver.rings[1].write_desc(9, outside);
    rig.driver.rings[1].offer(9);
    rig.driver.kick(1);
    assert!(rig.driver.signals.wait(|c| c.needs_reset == 1));
    rig.post(&[500]);
    assert!(rig.peers[0].send(&frame(100, 1)));
    assert_eq!(rig.receive().0, with_count(frame(100, 1), 1));
    let index = rig.driver.rings[0].setup().next_avail;
    rig.driver.rings[0].set_avail_idx(index.wrapping_add(4000));
    rig.driver.kick(0);
    assert!(rig.driver.signals.wait(|c| c.needs_reset == 2));
    rig.stop();
}

#[test]
fn random_rings_end_nothing() {
    let mut dice = Dice(99);
    for round in 0..60 {
        let mut rig = rig_of(1, if round % 2 == 0 { MRG } else { 0 });
        for queue in 0..2 {
            for index in 0..64 {
                let address = match dice.roll(4) {
                    0 => dice.0,
                    _ => dice.roll(16 << 20) as u64,
                };
                let len = if dice.roll(4) == 0 { dice.0 as u32 } else { dice.roll(3000) as u32 };
                let desc = Desc { address, len, flags: dice.roll(8) as u16, next: dice.roll(80) as u16 };
                rig.driver.rings[queue].write_desc(index, desc);
            }
            for _ in 0..dice.roll(40) {
                rig.driver.rings[queue].offer(dice.roll(70) as u16);
            }
        }
        rig.start();
        for _ in 0..20 {
            rig.peers[0].send(&frame(dice.roll(5000), 1));
        }
        rig.driver.kick(0);
        rig.driver.kick(1);
        while rig.peers[0].take_for(Duration::from_millis(1)).is_some() {}
        rig.stop();
        rig.stop();
    }
}

#[test]
fn a_frame_marks_just_the_pages_it_was_written_to() {
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, bitmap::Bitmap};
    let (port, peers) = sockets(1);
    let mut net = Net::with_port(port, Some(ADDRESS), None).unwrap();
    let mut driver = Driver::new(tracked_memory(&[(0, 4 << 20)]), &net.about().queues.clone());
    let at = driver.alloc(64 << 10, 4096);
    driver.start(&mut net, F_COMMON | MRG).unwrap();
    for i in 0..4 {
        driver.send(0, &[Buffer::writable(at + i * 8192, 8192)]);
    }
    assert!(peers[0].send(&frame(12_000, 1)));
    assert!(driver.wait_used(0).is_some());
    let region = driver.memory.iter().next().unwrap();
    let bitmap = std::ops::Deref::deref(region).bitmap();
    let dirty: Vec<bool> = (0..8).map(|page| bitmap.dirty_at((at + page * 4096) as usize)).collect();
    assert_eq!(dirty, [true, true, true, false, false, false, false, false]);
    assert_eq!(region.start_addr().0, 0);
    net.stop().unwrap();
}

#[test]
fn a_buffer_of_very_many_pieces_is_refused_before_it_overruns_a_call() {
    // Regions that touch: one descriptor over all of them falls into as many pieces.
    let ranges: Vec<(u64, usize)> = (0..256).map(|i| ((16 << 20) + i * 4096, 4096)).collect();
    let mut all = vec![(0, 8 << 20)];
    all.extend(ranges);
    let (port, peers) = sockets(1);
    let mut net = Net::with_port(port, Some(ADDRESS), None).unwrap();
    let mut driver = Driver::new(memory(&all), &net.about().queues.clone());
    driver.start(&mut net, F_COMMON | MRG).unwrap();
    let whole = |writable| Buffer { address: 16 << 20, len: 256 * 4096, writable };
    driver.send(0, &[whole(true); 4]);
    assert!(driver.signals.wait(|c| c.needs_reset == 1));
    driver.send(1, &[Buffer::readable(16 << 20, 65_562)]);
    assert!(driver.wait_used(1).is_some());
    assert_eq!(peers[0].take().unwrap().len(), 65_562);
    net.stop().unwrap();
}
