//! Frames both ways, compared byte by byte, in every cut and under every shortage.

use super::*;
use crate::limits::TURN_BUDGET;

#[test]
fn frames_cut_at_every_byte_arrive_whole() {
    let mut rig = rig(0);
    let bytes = frame(60, 1);
    for cut in 1..bytes.len() {
        rig.send(&bytes, &[cut]);
        assert_eq!(rig.peers[0].take().unwrap(), bytes, "sent in {cut} and the rest");
        rig.post(&[cut as u32, (bytes.len() - cut) as u32]);
        assert!(rig.peers[0].send(&bytes));
        assert_eq!(rig.receive().0, with_count(bytes.clone(), 1), "received in {cut} and the rest");
    }
}

#[test]
fn random_frames_in_random_cuts_arrive_whole() {
    let mut rig = rig(MRG);
    let mut dice = Dice(42);
    for seed in 0..2000 {
        let len = if seed % 50 == 0 { 65_550 } else { 14 + dice.roll(3000) };
        let bytes = frame(len, seed);
        let cuts: Vec<usize> = (0..dice.roll(12)).map(|_| dice.roll(bytes.len())).collect();
        rig.send(&bytes, &cuts);
        assert_eq!(rig.peers[0].take().unwrap(), bytes, "sent in {cuts:?}");
    }
    rig.wait_counter("tx_packets", 2000);
    assert_eq!(rig.counter("tx_malformed"), 0);
}

#[test]
fn mergeable_buffers_take_frames_of_every_size() {
    let mut dice = Dice(7);
    let mut rig = rig(MRG);
    for seed in 0..600 {
        let len = if seed % 40 == 0 { 9_000 } else { 14 + dice.roll(2000) };
        let bytes = frame(len, seed);
        assert!(rig.peers[0].send(&bytes));
        // One buffer at a time, so that the frame waits in every state there is.
        let mut room = rig.posted.values().flatten().map(|b| b.len as usize).sum::<usize>();
        while room < bytes.len() {
            let piece = 12 + dice.roll(400);
            let second = dice.roll(200);
            rig.post(
                if second == 0 { vec![piece as u32] } else { vec![piece as u32, second as u32] }.as_slice(),
            );
            room += piece + second;
        }
        let (got, count) = rig.receive();
        assert_eq!(got, with_count(bytes, count), "frame {seed} of {len} bytes in {count} buffers");
    }
    rig.wait_counter("rx_packets", 600);
    assert_eq!(rig.counter("rx_dropped"), 0);
}

#[test]
fn a_large_frame_fills_many_small_buffers_without_a_copy() {
    let mut rig = rig(MRG);
    for round in 0..3 {
        (0..60).for_each(|_| rig.post(&[1536]));
        let bytes = frame(65_550, round);
        assert!(rig.peers[0].send(&bytes));
        let (got, count) = rig.receive();
        assert_eq!((got, count), (with_count(bytes, 43), 43));
        // What is left serves small frames.
        for seed in 0..17 {
            assert!(rig.peers[0].send(&frame(100, seed)));
            assert_eq!(rig.receive(), (with_count(frame(100, seed), 1), 1));
        }
    }
}

#[test]
fn a_frame_that_does_not_fit_waits_for_mergeable_buffers() {
    let mut rig = rig(MRG);
    rig.post(&[100]);
    rig.post(&[100]);
    let bytes = frame(488, 3);
    assert!(rig.peers[0].send(&bytes));
    assert!(!rig.driver.signals.wait_for(Duration::from_millis(50), |c| c.queue(0) > 0));
    (0..3).for_each(|_| rig.post(&[100]));
    assert_eq!(rig.receive(), (with_count(bytes, 5), 5));
    assert_eq!(rig.counter("rx_dropped"), 0);
}

#[test]
fn a_frame_that_does_not_fit_a_single_buffer_is_dropped() {
    let mut rig = rig(0);
    rig.post(&[60, 40]);
    assert!(rig.peers[0].send(&frame(89, 1)));
    assert!(rig.peers[0].send(&frame(88, 2)));
    assert_eq!(rig.receive(), (with_count(frame(88, 2), 1), 1));
    rig.wait_counter("rx_dropped", 1);
}

#[test]
fn a_guest_without_buffers_costs_nothing_and_goes_on_when_it_has_some() {
    for features in [0, MRG] {
        let mut rig = rig(features);
        rig.post(&[2000]);
        let mut sent = 0;
        let flood = Instant::now();
        while flood.elapsed() < Duration::from_millis(200) {
            if rig.peers[0].send(&frame(1000, sent)) {
                sent += 1;
            } else {
                std::thread::sleep(Duration::from_micros(100));
            }
        }
        assert!(sent > 10);
        assert!(rig.counter("rx_stalls") <= 3, "{} turns without a buffer", rig.counter("rx_stalls"));
        for seed in 0..sent {
            if seed > 0 {
                rig.post(&[2000]);
            }
            assert_eq!(rig.receive().0, with_count(frame(1000, seed), 1), "frame {seed} of {sent}");
        }
        rig.post(&[2000]);
        assert!(rig.peers[0].send(&frame(14, 9)), "traffic goes on");
        assert_eq!(rig.receive().0, with_count(frame(14, 9), 1));
    }
}

#[test]
fn a_host_that_takes_no_more_gets_the_rest_later_in_order() {
    let mut rig = rig(0);
    let bytes: Vec<Vec<u8>> = (0..120).map(|seed| frame(8000, seed)).collect();
    for (i, bytes) in bytes.iter().enumerate() {
        let at = rig.scratch + i as u64 * 8192;
        rig.driver.poke(at, bytes);
        rig.driver.send(1, &[Buffer::readable(at, bytes.len() as u32)]);
    }
    rig.wait_counter("tx_blocked", 1);
    for (i, bytes) in bytes.iter().enumerate() {
        assert_eq!(&rig.peers[0].take().unwrap(), bytes, "frame {i}");
    }
    rig.wait_counter("tx_packets", 120);
    assert_eq!(rig.counter("tx_dropped"), 0);
    for _ in 0..120 {
        assert!(rig.driver.wait_used(1).is_some());
    }
}

#[test]
fn nothing_is_lost_or_doubled_when_the_device_is_stopped_in_between() {
    let mut rig = rig(MRG);
    let mut next = 0;
    for round in 0..30 {
        (0..8).for_each(|_| rig.post(&[300]));
        for seed in next..next + 8 {
            assert!(rig.peers[0].send(&frame(200, seed)));
        }
        if round % 2 == 0 {
            rig.stop();
            let setup = rig.driver.rings[0].setup();
            assert_eq!(setup.next_avail, setup.next_used, "unused buffers were put back");
            rig.start();
        }
        for seed in next..next + 8 {
            assert_eq!(rig.receive().0, with_count(frame(200, seed), 1));
        }
        next += 8;
    }
}

#[test]
fn both_ways_at_once_under_load_keep_every_frame() {
    let mut rig = rig(MRG | STATUS);
    let peer = Peer(rig.peers[0].0.try_clone().unwrap());
    let echo = std::thread::spawn(move || {
        for seed in 0..3000u32 {
            let got = peer.take().expect("a frame from the guest");
            assert_eq!(got, frame(14 + (seed as usize * 37) % 1400, seed));
            while !peer.send(&got) {
                std::thread::yield_now();
            }
        }
    });
    for _ in 0..100 {
        rig.post(&[1700]);
    }
    for seed in 0..3000u32 {
        let bytes = frame(14 + (seed as usize * 37) % 1400, seed);
        rig.send(&bytes, &[12]);
        assert_eq!(rig.receive(), (with_count(bytes, 1), 1));
        if seed % 16 == 0 {
            rig.repost();
        }
    }
    echo.join().unwrap();
}

#[test]
fn two_pairs_are_used_when_the_driver_says_so() {
    let mq = 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ;
    let mut rig = rig_of(2, MRG | mq);
    rig.start();
    rig.post_on(2, &[2000]);
    assert!(rig.peers[1].send(&frame(50, 1)));
    assert!(!rig.driver.signals.wait_for(Duration::from_millis(50), |c| c.queue(2) > 0), "not in use");
    let command = |rig: &mut Rig, bytes: &[u8]| {
        let request = rig.driver.readable(bytes);
        let answer = rig.driver.writable(1);
        assert_eq!(rig.driver.request(4, &[request, answer]), Some(1));
        rig.driver.peek(answer.address, 1)[0]
    };
    for bad in [&[4, 0, 0, 0][..], &[4, 0, 3, 0], &[4, 0, 2], &[4, 1, 2, 0], &[0, 0, 2, 0], &[4, 0, 2, 0, 0]]
    {
        assert_eq!(command(&mut rig, bad), 1, "{bad:?}");
    }
    assert_eq!(*rig.port.attached.lock().unwrap(), [true, false]);
    assert_eq!(command(&mut rig, &[4, 0, 2, 0]), 0);
    assert_eq!(*rig.port.attached.lock().unwrap(), [true, true]);
    assert_eq!(rig.receive_on(2).0, with_count(frame(50, 1), 1));
    let bytes = frame(70, 2);
    let buffer = rig.driver.readable(&bytes);
    assert_eq!(rig.driver.request(3, &[buffer]), Some(0));
    assert_eq!(rig.peers[1].take().unwrap(), bytes);
    // Counted at the end of a turn, in which the pair stays as it was.
    rig.wait_counter("tx_packets", 1);
    assert_eq!(command(&mut rig, &[4, 0, 1, 0]), 0);
    assert_eq!(rig.driver.request(3, &[buffer]), Some(0));
    assert!(rig.peers[1].take_for(Duration::from_millis(20)).is_none(), "dropped: not in use");
    rig.wait_counter("tx_dropped", 1);
}

#[test]
fn a_cable_that_is_cut_takes_the_link_down_and_another_brings_it_up() {
    let mut rig = rig(MRG | STATUS);
    (0..4).for_each(|_| rig.post(&[2000]));
    rig.peers.clear();
    assert!(rig.driver.signals.wait(|c| c.config == 1));
    let mut status = [0; 2];
    rig.net.read_config(6, &mut status);
    assert_eq!((status, rig.net.link_is_up()), ([0, 0], false));
    rig.send(&frame(100, 1), &[]);
    rig.wait_counter("tx_dropped", 1);
    assert_eq!(rig.driver.signals.counts().config, 1, "told once");

    let (port, peers) = sockets(1);
    rig.net.replug(port).unwrap();
    assert_eq!(rig.driver.signals.counts().config, 2);
    rig.net.read_config(6, &mut status);
    assert_eq!(status, [1, 0]);
    rig.send(&frame(100, 2), &[]);
    assert_eq!(peers[0].take().unwrap(), frame(100, 2));
    assert!(peers[0].send(&frame(100, 3)));
    assert_eq!(rig.receive().0, with_count(frame(100, 3), 1));
    let (two, _peers) = sockets(2);
    assert!(matches!(rig.net.replug(two), Err(DeviceError::Change(_))));
}

#[test]
fn a_turn_that_ends_with_the_last_buffer_does_not_end_receiving() {
    const FRAMES: u32 = TURN_BUDGET as u32 + 4;
    for features in [0, MRG] {
        let mut rig = rig(features);
        // Starved: nothing is looked at before the doorbell.
        rig.wait_counter("rx_stalls", 1);
        (0..FRAMES).for_each(|seed| assert!(rig.peers[0].send(&frame(20, seed)), "frame {seed}"));
        for _ in 0..TURN_BUDGET {
            let buffers = vec![rig.driver.writable(64)];
            let head = rig.driver.rings[0].add(&buffers);
            rig.posted.insert((0, u32::from(head)), buffers);
        }
        assert!(rig.driver.rings[0].wants_kick());
        rig.driver.kick(0);
        for seed in 0..TURN_BUDGET as u32 {
            assert_eq!(rig.receive().0, with_count(frame(20, seed), 1));
        }
        rig.repost();
        for seed in TURN_BUDGET as u32..FRAMES {
            assert_eq!(rig.receive().0, with_count(frame(20, seed), 1));
        }
    }
}
