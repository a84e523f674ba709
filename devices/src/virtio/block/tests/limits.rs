//! A disk with limits: what it lets through, and what becomes of the rest.

use std::{
    thread,
    time::{Duration, Instant},
};

use super::*;
use crate::{
    limiter::{BucketConfig, LimiterConfig},
    virtio::{Change, block::saved::Saved},
};

const HOUR: u64 = 3_600_000;

fn bucket(size: u64, refill_time_ms: u64) -> Option<BucketConfig> {
    Some(BucketConfig { size, one_time_burst: 0, refill_time_ms })
}

fn ops(size: u64, refill_time_ms: u64) -> LimiterConfig {
    LimiterConfig { ops: bucket(size, refill_time_ms), ..LimiterConfig::default() }
}

fn limited(make: Make, path: &Path, limits: LimiterConfig) -> Guest {
    Guest::new(make(BlockConfig { limits, ..settings(path, Engine::Sync) }))
}

impl Guest {
    /// Makes `count` reads available, the first of which is number `first`.
    fn offer(&mut self, first: u64, count: u64) {
        self.put_header(IN, 0);
        for n in first..first + count {
            let data = Buffer::writable(self.data + n * 512, 512);
            let status = self.data + 65536 + n;
            self.driver.poke(status, &[0xee]);
            self.driver.send(0, &[Buffer::readable(self.header, 16), data, Buffer::writable(status, 1)]);
        }
    }

    /// Waits for `count` answers, all good.
    fn answered(&mut self, count: u64) {
        (0..count).for_each(|n| assert!(self.driver.wait_used(0).is_some(), "answer {n} of {count}"));
    }

    /// Statuses written to the first `count` reads.
    fn good(&self, count: usize) -> usize {
        self.driver.peek(self.data + 65536, count).into_iter().filter(|status| *status == OK).count()
    }
}

fn throttled(block: &Block) {
    let end = Instant::now() + Duration::from_secs(10);
    while counter(block, "rate_limiter_throttled_events") == 0 {
        assert!(Instant::now() < end, "it was never held back");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn so_many_requests_pass_and_new_limits_let_the_rest_go_at_once() {
    for (name, make) in engines() {
        let image = image(64);
        let mut guest = limited(make, image.path(), ops(5, 5 * HOUR));
        guest.offer(0, 8);
        guest.answered(5);
        throttled(&guest.block);
        guest.offer(8, 2);
        (0..20).for_each(|_| guest.driver.kick(0));
        thread::sleep(Duration::from_millis(20));
        assert!(guest.driver.rings[0].take_used().is_none(), "{name}");
        assert!(!guest.driver.rings[0].wants_kick(), "{name}: the doorbell is disarmed");
        assert_eq!(
            counter(&guest.block, "rate_limiter_throttled_events"),
            1,
            "{name}: doorbells are not heard"
        );
        // Another bucket than the one that holds them back changes nothing for them.
        let other = LimiterConfig { bandwidth: bucket(1 << 20, 1000), ops: None };
        guest.block.update(&Change::Limits(other)).unwrap();
        thread::sleep(Duration::from_millis(20));
        assert!(guest.driver.rings[0].take_used().is_none(), "{name}");
        guest.block.update(&Change::Limits(ops(4, 5 * HOUR))).unwrap();
        guest.answered(4);
        guest.block.update(&Change::Limits(ops(0, 0))).unwrap();
        guest.answered(1);
        assert_eq!(guest.good(10), 10, "{name}");
        guest.driver.stop(&mut guest.block).unwrap();
        assert_eq!(guest.block.settings().limits, other, "{name}");
        assert_eq!(counter(&guest.block, "reads"), 10, "{name}");
    }
}

#[test]
fn a_disk_that_waits_goes_on_by_itself_at_the_rate_it_may() {
    for (name, make) in engines() {
        let image = image(64);
        let begun = Instant::now();
        let mut guest = limited(make, image.path(), ops(10, 400));
        guest.offer(0, 15);
        guest.answered(15);
        assert!(begun.elapsed() >= Duration::from_millis(195), "{name}: {:?}", begun.elapsed());
        assert!(counter(&guest.block, "rate_limiter_event_count") > 0, "{name}: a timer woke it");
        assert_eq!(guest.good(15), 15, "{name}");
    }
}

#[test]
fn a_stop_while_it_waits_is_prompt_and_loses_nothing() {
    for (name, make) in engines() {
        let image = image(64);
        let mut guest = limited(make, image.path(), ops(3, 3 * HOUR));
        guest.offer(0, 7);
        guest.answered(3);
        throttled(&guest.block);
        let begun = Instant::now();
        let positions = guest.driver.stop(&mut guest.block).unwrap();
        assert!(begun.elapsed() < Duration::from_secs(2), "{name}");
        assert_eq!((positions[0].1.next_avail, positions[0].1.next_used), (3, 3), "{name}");
        // The machine goes on elsewhere, with the budget it had.
        let elsewhere = self::image(64);
        let mut other = make(settings(elsewhere.path(), Engine::Sync));
        other.restore(&guest.block.save()).unwrap();
        assert_eq!(other.settings().limits, ops(3, 3 * HOUR), "{name}");
        let features = other.about().features;
        guest.driver.start(&mut other, features).unwrap();
        throttled(&other);
        assert!(guest.driver.rings[0].take_used().is_none(), "{name}");
        other.update(&Change::Limits(ops(100, HOUR))).unwrap();
        guest.answered(4);
        guest.driver.stop(&mut other).unwrap();
        assert_eq!((guest.good(7), counter(&other, "reads")), (7, 4), "{name}");
    }
}

#[test]
fn bandwidth_counts_data_and_operations_count_everything() {
    let image = image(64);
    let limits = LimiterConfig { bandwidth: bucket(1 << 20, 1 << 50), ops: bucket(100, 1 << 50) };
    let mut guest = limited(engines()[0].1, image.path(), limits);
    assert_eq!(guest.write(0, &[1; 1024]).0, OK);
    assert_eq!(guest.read(0, 512).0, OK);
    assert_eq!(guest.request(FLUSH, 0, None).0, OK);
    assert_eq!(guest.ranges(DISCARD, &[(8, 8, 0)]).0, OK);
    assert_eq!(guest.read(1000, 512).0, IOERR, "outside of the disk");
    guest.driver.stop(&mut guest.block).unwrap();
    let saved = guest.block.throttle.save();
    assert_eq!((saved.bandwidth.unwrap().budget, saved.ops.unwrap().budget), ((1 << 20) - 1536, 95));
}

#[test]
fn a_request_larger_than_the_bucket_passes_and_is_paid_for() {
    for (name, make) in engines() {
        let image = image(64);
        let limits = LimiterConfig { bandwidth: bucket(1000, 100), ops: None };
        let mut guest = limited(make, image.path(), limits);
        let begun = Instant::now();
        assert_eq!(guest.read(0, 4096).0, OK, "{name}");
        assert_eq!(guest.read(0, 512).0, OK, "{name}");
        // What the first one owed and what the second one costs.
        assert!(begun.elapsed() >= Duration::from_millis(355), "{name}: {:?}", begun.elapsed());
    }
}

#[test]
fn all_queues_share_the_limits() {
    let image = image(64);
    let settings =
        BlockConfig { queues: 2, limits: ops(4, 4 * HOUR), ..settings(image.path(), Engine::Sync) };
    let mut guest = Guest::new(Block::new(settings).unwrap());
    guest.put_header(IN, 0);
    for n in 0..8 {
        let data = Buffer::writable(guest.data + n * 512, 512);
        let status = Buffer::writable(guest.data + 65536 + n, 1);
        guest.driver.send((n % 2) as u16, &[Buffer::readable(guest.header, 16), data, status]);
    }
    let end = Instant::now() + Duration::from_secs(10);
    let count = |name| counter(&guest.block, name);
    while count("rate_limiter_throttled_events") == 0 || count("reads") < 4 {
        assert!(Instant::now() < end);
        thread::sleep(Duration::from_millis(1));
    }
    thread::sleep(Duration::from_millis(20));
    assert_eq!(counter(&guest.block, "reads"), 4);
    guest.block.update(&Change::Limits(ops(0, 0))).unwrap();
    (0..8).for_each(|n| assert!(guest.driver.wait_used(n % 2).is_some()));
}

#[test]
fn impossible_tokens_are_refused() {
    let image = image(64);
    let mut block = engines()[0].1(BlockConfig { limits: ops(3, 1), ..settings(image.path(), Engine::Sync) });
    let mut saved = Saved::read(&block.save()).unwrap();
    saved.limiter.ops.as_mut().unwrap().budget = 4;
    assert!(block.restore(&saved.section()).is_err());
}
