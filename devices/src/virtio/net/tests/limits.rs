//! Both directions under limits.

use super::*;
use crate::limiter::BucketConfig;

const HOUR: u64 = 3_600_000;

fn bucket(size: u64, refill_time_ms: u64) -> Option<BucketConfig> {
    Some(BucketConfig { size, one_time_burst: 0, refill_time_ms })
}

fn ops(size: u64, refill_time_ms: u64) -> LimiterConfig {
    LimiterConfig { ops: bucket(size, refill_time_ms), ..LimiterConfig::default() }
}

fn bytes(size: u64, refill_time_ms: u64) -> LimiterConfig {
    LimiterConfig { bandwidth: bucket(size, refill_time_ms), ..LimiterConfig::default() }
}

const NONE: LimiterConfig = LimiterConfig { bandwidth: None, ops: None };

fn limited(rx: LimiterConfig, tx: LimiterConfig) -> Rig {
    let mut rig = rig_of(1, MRG);
    rig.net.limit(rx, tx);
    rig.start();
    rig
}

impl Rig {
    /// Makes `frame` available to be sent, and does not wait.
    fn offer(&mut self, frame: &[u8]) {
        let buffer = self.driver.readable(frame);
        self.driver.send(1, &[buffer]);
    }

    /// Whether a frame waits on the host's side of the device.
    fn waits(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.port.ends[0].as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd that lives across the call.
        unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
    }
}

#[test]
fn frames_towards_the_guest_stay_outside_until_they_may_come() {
    let mut rig = limited(ops(3, 3 * HOUR), NONE);
    (0..8).for_each(|_| rig.post(&[1600]));
    (0..6).for_each(|seed| assert!(rig.peers[0].send(&frame(100, seed))));
    (0..3).for_each(|seed| assert_eq!(rig.receive().0, with_count(frame(100, seed), 1)));
    rig.wait_counter("rx_rate_limiter_throttled", 1);
    (0..20).for_each(|_| rig.driver.kick(0));
    std::thread::sleep(Duration::from_millis(20));
    assert!(rig.driver.rings[0].take_used().is_none() && rig.waits());
    assert_eq!(rig.counter("rx_rate_limiter_throttled"), 1, "neither doorbells nor frames are heard");
    // The other direction knows nothing of it.
    rig.send(&frame(60, 9), &[]);
    assert_eq!(rig.peers[0].take().unwrap(), frame(60, 9));
    rig.net.update(&Change::DirectionLimits { rx: ops(2, HOUR), tx: NONE }).unwrap();
    (3..5).for_each(|seed| assert_eq!(rig.receive().0, with_count(frame(100, seed), 1)));
    rig.net.update(&Change::DirectionLimits { rx: ops(0, 0), tx: NONE }).unwrap();
    assert_eq!(rig.receive().0, with_count(frame(100, 5), 1));
    assert_eq!((rig.counter("rx_dropped"), rig.counter("tx_rate_limiter_throttled")), (0, 0));
}

#[test]
fn a_frame_larger_than_what_is_left_comes_and_is_owed() {
    let mut rig = limited(bytes(50, HOUR), NONE);
    (0..4).for_each(|_| rig.post(&[1600]));
    (0..2).for_each(|seed| assert!(rig.peers[0].send(&frame(1000, seed))));
    assert_eq!(rig.receive().0, with_count(frame(1000, 0), 1));
    rig.wait_counter("rx_rate_limiter_throttled", 1);
    rig.stop();
    let owed = rig.net.shared.rx_limits.save().bandwidth.unwrap().debt;
    assert!((940..=950).contains(&owed), "{owed}: headers of virtio cost nothing");
    assert!(rig.waits());
}

#[test]
fn frames_from_the_guest_wait_in_its_ring_over_a_stop_and_a_save() {
    let mut rig = limited(NONE, bytes(100, 100 * HOUR));
    (0..3).for_each(|seed| rig.offer(&frame(60, seed)));
    assert_eq!(rig.peers[0].take().unwrap(), frame(60, 0));
    rig.wait_counter("tx_rate_limiter_throttled", 1);
    assert!(!rig.driver.rings[1].wants_kick(), "the doorbell is disarmed");
    let begun = Instant::now();
    let positions = rig.driver.stop(&mut rig.net).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(2));
    let sent = positions.iter().find(|(index, _)| *index == 1).unwrap().1;
    assert_eq!((sent.next_avail, sent.next_used), (1, 1));
    let saved = rig.net.save();
    rig.net.limit(NONE, bytes(0, 0));
    rig.net.restore(&saved).unwrap();
    rig.start();
    rig.wait_counter("tx_rate_limiter_throttled", 2);
    assert!(rig.peers[0].take_for(Duration::from_millis(20)).is_none());
    rig.net.update(&Change::DirectionLimits { rx: NONE, tx: bytes(0, 0) }).unwrap();
    (1..3).for_each(|seed| assert_eq!(rig.peers[0].take().unwrap(), frame(60, seed)));
}

#[test]
fn both_directions_go_on_by_themselves_at_the_rate_they_may() {
    let mut rig = limited(ops(5, 100), ops(5, 100));
    let begun = Instant::now();
    for seed in 0..15 {
        rig.post(&[1600]);
        assert!(rig.peers[0].send(&frame(60, seed)));
        rig.offer(&frame(60, seed));
    }
    (0..15).for_each(|seed| assert_eq!(rig.receive().0, with_count(frame(60, seed), 1)));
    (0..15).for_each(|seed| assert_eq!(rig.peers[0].take().unwrap(), frame(60, seed)));
    assert!(begun.elapsed() >= Duration::from_millis(195), "{:?}", begun.elapsed());
    assert!(rig.counter("rx_event_rate_limiter_count") > 0 && rig.counter("tx_rate_limiter_event_count") > 0);
}

#[test]
fn a_frame_the_host_would_not_take_is_paid_for_once() {
    let mut rig = limited(NONE, ops(1000, 1 << 50));
    (0..60).for_each(|seed| rig.offer(&frame(9000, seed)));
    rig.wait_counter("tx_blocked", 1);
    (0..60).for_each(|seed| assert_eq!(rig.peers[0].take().unwrap(), frame(9000, seed)));
    rig.wait_counter("tx_packets", 60);
    rig.stop();
    assert_eq!(rig.net.shared.tx_limits.save().ops.unwrap().budget, 940);
}

#[test]
fn a_chain_too_long_for_a_frame_owes_no_bytes() {
    let mut rig = limited(NONE, bytes(1000, HOUR));
    let buffer = Buffer::readable(rig.scratch, SCRATCH as u32);
    assert_eq!(rig.driver.request(1, &[buffer]), Some(0));
    rig.wait_counter("tx_malformed", 1);
    rig.send(&frame(1000, 1), &[]);
    assert_eq!(rig.peers[0].take().unwrap(), frame(1000, 1));
}

#[test]
fn a_peer_that_hangs_up_while_frames_wait_takes_the_link_down_and_spins_nobody() {
    let mut rig = limited(ops(1, 50), ops(1, HOUR));
    rig.post(&[1600]);
    rig.post(&[1600]);
    assert!(rig.peers[0].send(&frame(60, 1)));
    assert_eq!(rig.receive().0, with_count(frame(60, 1), 1));
    rig.peers.clear();
    let end = Instant::now() + PATIENCE;
    while rig.net.link_is_up() {
        assert!(Instant::now() < end, "the loss was not seen");
        std::thread::sleep(Duration::from_millis(1));
    }
}
