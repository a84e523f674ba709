//! Buckets under made-up clocks: exact figures, then laws over many random histories.

use std::sync::Arc;

use super::*;

const SECOND: u64 = 1_000_000_000;
const MS: u64 = 1_000_000;

fn config(size: u64, one_time_burst: u64, refill_time_ms: u64) -> BucketConfig {
    BucketConfig { size, one_time_burst, refill_time_ms }
}

fn bucket(size: u64, burst: u64, refill_time_ms: u64) -> Bucket {
    Bucket::new(config(size, burst, refill_time_ms), 0).unwrap()
}

fn ops(size: u64, refill_time_ms: u64) -> LimiterConfig {
    LimiterConfig { ops: Some(config(size, 0, refill_time_ms)), ..LimiterConfig::default() }
}

/// Numbers that look random and are the same each time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below.max(1)
    }
}

#[test]
fn a_bucket_starts_full_and_fills_evenly() {
    let mut bucket = bucket(10, 0, 1000);
    assert!(bucket.take(10, 0));
    assert!(!bucket.take(1, 99 * MS));
    assert_eq!(bucket.wait(1, false), MS);
    assert!(bucket.take(1, 100 * MS));
    assert!(!bucket.take(5, 599 * MS));
    assert!(bucket.take(5, 600 * MS));
    assert!(bucket.take(10, 100 * SECOND));
    assert!(!bucket.take(1, 100 * SECOND), "a bucket never holds more than its size");
}

#[test]
fn the_burst_is_spent_first_and_never_comes_back() {
    let mut bucket = bucket(10, 25, 1000);
    assert!(bucket.take(25, 0));
    assert!(bucket.take(10, 0));
    assert!(!bucket.take(1, 0));
    assert!(bucket.take(10, 50 * SECOND));
    assert!(!bucket.take(1, 50 * SECOND));
}

#[test]
fn a_request_may_be_paid_by_burst_and_bucket_together_or_not_at_all() {
    let mut bucket = bucket(10, 5, 1000);
    assert!(bucket.take(10, 0) && !bucket.take(10, 0));
    let left = bucket.save(0);
    assert_eq!((left.burst_left, left.budget), (0, 5));
    assert!(bucket.take(5, 0));
}

#[test]
fn a_request_larger_than_the_bucket_passes_once_and_its_debt_is_waited_out() {
    let mut bucket = bucket(100, 0, 1000);
    assert!(bucket.take(350, 0));
    assert_eq!(bucket.save(0).debt, 250);
    assert_eq!(bucket.wait(1, false), 2510 * MS);
    assert!(!bucket.take(350, 2499 * MS), "debt is paid before the next large one");
    assert!(bucket.take(350, 2500 * MS));
    assert!(!bucket.take(1, 2500 * MS));
}

#[test]
fn nothing_costs_nothing_even_in_debt() {
    let mut bucket = bucket(1, 0, 1000);
    assert!(bucket.take(1000, 0) && bucket.take(0, 0));
}

#[test]
fn zero_size_or_refill_time_is_no_limit() {
    assert!(Bucket::new(config(0, 7, 1), 0).is_none());
    assert!(Bucket::new(config(7, 7, 0), 0).is_none());
    let none = LimiterConfig { bandwidth: Some(config(0, 1, 1)), ops: Some(config(1, 1, 0)) };
    assert!(!Limiter::new(none, 0).is_active());
}

#[test]
fn the_largest_numbers_overflow_nowhere() {
    const MAX: u64 = u64::MAX;
    for (size, refill) in [(MAX, MAX), (MAX, 1), (1, MAX), (MAX - 1, 7)] {
        let mut bucket = bucket(size, MAX, refill);
        assert!(bucket.take(MAX, 0), "the burst pays");
        assert!(bucket.take(MAX, 1));
        bucket.spend(MAX);
        bucket.spend(MAX);
        assert!(bucket.wait(MAX, false) > 0 && bucket.wait(1, true) > 0);
        bucket.fill(MAX);
        bucket.fill(0);
        let saved = bucket.save(MAX);
        assert_eq!(Bucket::restore(&saved, MAX).unwrap(), bucket);
        let _ = (bucket.take(MAX, MAX), bucket.wait(MAX, false), bucket.nap());
    }
    let mut fast = bucket(MAX, 0, 1);
    fast.spend(MAX);
    fast.fill(MS / 2);
    assert_eq!(fast.save(MS / 2).budget, MAX / 2);
}

#[test]
fn a_clock_that_goes_back_makes_no_tokens() {
    let mut bucket = bucket(10, 0, 1000);
    assert!(bucket.take(10, 10 * SECOND));
    assert!(!bucket.take(1, 9 * SECOND));
    assert!(!bucket.take(1, 10 * SECOND + 99 * MS));
    assert!(bucket.take(1, 10 * SECOND + 100 * MS));
}

#[test]
fn odd_refill_times_do_not_drift_however_often_somebody_looks() {
    for (size, refill_ms) in [(7, 1001), (1000, 997), (3, 86_400_000), (1_000_003, 333)] {
        let mut bucket = bucket(size, 0, refill_ms);
        bucket.spend(size);
        let mut dice = Dice(size + refill_ms);
        let mut taken = 0u128;
        let mut at = 0;
        let end = 10 * refill_ms * MS;
        while at < end {
            at = (at + 1 + dice.roll(refill_ms * MS / (100 * size.min(50)))).min(end);
            taken += u128::from(bucket.take(1, at));
            while bucket.take(1, at) {
                taken += 1;
            }
        }
        assert_eq!(taken, u128::from(10 * size), "{size} in {refill_ms} ms");
    }
}

/// Sends requests as fast as the limiter lets them, each waiting as long as it is told (and
/// a little longer, as real timers do); returns when each passed and what it cost.
fn history(limiter: &mut Limiter, costs: &mut dyn FnMut() -> Cost, until: u64, lag: u64) -> Vec<(u64, Cost)> {
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let (mut at, mut passed) = (0, Vec::new());
    while at < until {
        let cost = costs();
        let mut due = None;
        while let Err(wait) = limiter.take(cost, due.is_some_and(|due| due <= at), at) {
            assert!(wait.sleep >= wait.until_due && wait.until_due > 0);
            due = due.or(Some(at + wait.until_due));
            at += wait.sleep + dice.roll(lag);
        }
        passed.push((at, cost));
    }
    passed
}

#[test]
fn over_any_ten_seconds_the_rate_is_kept_within_five_percent_and_the_burst() {
    let mut dice = Dice(42);
    for round in 0..60 {
        let refill_ms = 20 + dice.roll(1000);
        let bits = 1 + dice.roll(30);
        let size = 1 + dice.roll(1 << bits);
        let burst = dice.roll(3) * dice.roll(size);
        let largest = 1 + dice.roll(size.saturating_mul(2));
        // So that a history has some ten thousand requests at most.
        let least = (size * 60_000 / refill_ms / 20_000).min(largest - 1);
        let limits = LimiterConfig { bandwidth: Some(config(size, burst, refill_ms)), ops: None };
        let mut limiter = Limiter::new(limits, 0);
        let mut costs = || Cost::one(least + 1 + dice.roll(largest - least));
        let passed = history(&mut limiter, &mut costs, 60 * SECOND, MS / 10);
        let rate = size as f64 * 1000.0 / refill_ms as f64;
        let (all, end) = (passed.iter().map(|(_, c)| c.bytes as f64).sum::<f64>(), passed.last().unwrap().0);
        let expected = rate * end as f64 / SECOND as f64 + (size + burst) as f64;
        assert!(
            (all - expected).abs() <= 0.01 * expected + 2.0 * (size + largest) as f64,
            "{all}, {expected}"
        );
        let window = 10 * SECOND;
        for start in (0..45).map(|s| s * SECOND + 12_345) {
            let inside = passed.iter().filter(|(at, _)| (start..start + window).contains(at));
            let sum: f64 = inside.map(|(_, cost)| cost.bytes as f64).sum();
            let (size, burst, largest) = (size as f64, burst as f64, largest as f64);
            assert!(
                sum <= rate * 10.0 * 1.05 + size + burst + largest,
                "round {round}: {sum} in 10 s at {rate}/s, size {size}, burst {burst}, requests of {largest}"
            );
            assert!(
                sum >= rate * 10.0 * 0.95 - size - largest,
                "round {round}: only {sum} in 10 s at {rate}/s, size {size}, requests of {largest}"
            );
        }
    }
}

#[test]
fn a_fast_limit_wakes_a_thousand_times_a_second_and_loses_nothing() {
    let mut limiter = Limiter::new(ops(10_000, 100), 0);
    let passed = history(&mut limiter, &mut || Cost::one(4096), 10 * SECOND, 1);
    let mut times: Vec<u64> = passed.iter().map(|(at, _)| *at).collect();
    times.dedup();
    assert!(times.len() <= 10_010, "{} wakes in 10 s", times.len());
    assert!((1_005_000..=1_010_200).contains(&passed.len()), "{} in 10 s at 100000/s", passed.len());
}

#[test]
fn a_large_request_is_not_starved_by_small_ones_of_other_queues() {
    let limits = LimiterConfig { bandwidth: Some(config(1000, 0, 1000)), ops: None };
    let mut limiter = Limiter::new(limits, 0);
    limiter.spend(Cost::one(1000));
    let wait = limiter.take(Cost::one(900), false, 0).unwrap_err();
    let (mut small, mut at) = (0, 0);
    let passed = loop {
        at += MS;
        // The others always come first, and take all that is there.
        while limiter.take(Cost::one(1), false, at).is_ok() {
            small += 1;
        }
        if limiter.take(Cost::one(900), at >= wait.until_due, at).is_ok() {
            break at;
        }
        assert!(at < 10 * SECOND, "it never passed");
    };
    assert!((900 * MS..=910 * MS).contains(&passed), "{passed}");
    assert!(small >= 899);
    let next = limiter.take(Cost::one(1), false, passed).unwrap_err();
    assert!(next.until_due >= 890 * MS, "what was passed on credit is waited out");
}

#[test]
fn a_request_takes_of_both_buckets_or_of_none() {
    let limits = LimiterConfig { bandwidth: Some(config(100, 0, 1000)), ops: Some(config(2, 0, 1000)) };
    let mut limiter = Limiter::new(limits, 0);
    assert!(limiter.take(Cost::one(60), false, 0).is_ok());
    assert!(limiter.take(Cost::one(60), false, 0).is_err());
    assert_eq!(limiter.save(0).ops.unwrap().budget, 1);
    assert!(limiter.take(Cost::one(40), false, 0).is_ok());
    let wait = limiter.take(Cost::one(0), false, 0).unwrap_err();
    assert_eq!(wait.until_due, 500 * MS);
}

#[test]
fn a_change_replaces_what_is_present_and_leaves_the_rest() {
    let limits = LimiterConfig { bandwidth: Some(config(100, 0, 1000)), ops: Some(config(2, 0, 1000)) };
    let mut limiter = Limiter::new(limits, 0);
    limiter.spend(Cost { bytes: 100, ops: 2 });
    let change = ops(5, 1000);
    limiter.change(change, 0);
    let saved = limiter.save(0);
    assert_eq!((saved.bandwidth.unwrap().budget, saved.ops.unwrap().budget), (0, 5));
    assert_eq!(limiter.config(), limits.changed(change));
    let none = LimiterConfig { bandwidth: Some(config(0, 0, 0)), ops: None };
    limiter.change(none, 0);
    assert_eq!(limiter.config(), limits.changed(change).changed(none));
    assert_eq!(limiter.config(), change);
}

#[test]
fn saved_tokens_come_back_and_impossible_ones_do_not() {
    let limits = LimiterConfig { bandwidth: Some(config(100, 30, 1000)), ops: Some(config(3, 0, 7)) };
    let mut limiter = Limiter::new(limits, 0);
    limiter.spend(Cost { bytes: 500, ops: 2 });
    let saved = limiter.save(12_345);
    let mut back = Limiter::restore(&saved, 50 * SECOND).unwrap();
    assert_eq!(back.save(50 * SECOND), saved);
    assert_eq!(back.config(), limits);
    // Time that passed meanwhile is counted by whoever wants it counted.
    let mut later = Limiter::restore(&saved, 50 * SECOND).unwrap();
    assert_eq!(later.save(52 * SECOND), limiter.save(12_345 + 2 * SECOND));

    let good = saved.bandwidth.unwrap();
    let wrong = [
        BucketState { size: 0, ..good },
        BucketState { refill_time_ms: 0, ..good },
        BucketState { budget: 101, debt: 0, ..good },
        BucketState { budget: 1, debt: 1, ..good },
        BucketState { burst_left: 31, ..good },
        BucketState { fraction: u128::from(1000 * MS), ..good },
    ];
    for state in wrong {
        let state = LimiterState { bandwidth: Some(state), ops: None };
        assert!(Limiter::restore(&state, 0).is_err(), "{state:?}");
    }
}

#[test]
fn a_throttle_without_limits_lets_everything_through_and_counts_nothing() {
    let throttle = Throttle::new(LimiterConfig::default());
    let mut gate = Gate::new(Arc::clone(&throttle), 0);
    assert!((0..1000).all(|_| gate.pass(u64::MAX) && gate.admits(u64::MAX)));
    assert!(!gate.is_shut() && gate.source().is_none());
    assert_eq!(throttle.counters(), (0, 0));
}

#[test]
fn a_gate_is_shut_until_its_timer_fires_or_the_limits_change() {
    let throttle = Throttle::new(ops(1, 3_600_000));
    let mut gate = Gate::new(Arc::clone(&throttle), 0);
    assert!(gate.pass(0) && !gate.pass(0) && gate.is_shut());
    gate.opened();
    assert!(!gate.is_shut() && !gate.pass(0) && gate.is_shut());
    throttle.change(LimiterConfig { bandwidth: Some(config(1, 0, 1)), ops: None });
    assert!(!gate.is_shut(), "limits changed");
    assert!(!gate.pass(0), "the bucket of operations is as empty as it was");
    throttle.change(ops(0, 0));
    assert!(!gate.is_shut() && gate.pass(0));
    assert_eq!(throttle.counters(), (3, 1));
}

#[test]
fn who_is_admitted_takes_nothing_but_a_charge_takes_all() {
    let throttle = Throttle::new(LimiterConfig { bandwidth: Some(config(1000, 0, 3_600_000)), ops: None });
    let mut gate = Gate::new(Arc::clone(&throttle), 0);
    assert!(gate.admits(1) && gate.admits(1000));
    gate.charge(1500);
    assert_eq!(throttle.save().bandwidth.unwrap().debt, 500);
    assert!(!gate.admits(1));
}
