use std::{
    path::Path,
    time::{Duration, Instant},
};

use super::*;
use crate::{
    limiter::BucketConfig,
    virtio::driver::{Buffer, Driver},
};

const START: u64 = 1 << 32;

fn image(bytes: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(bytes).unwrap();
    file
}

fn config(path: &Path) -> PmemConfig {
    let (path, limiter) = (path.to_owned(), LimiterConfig::default());
    PmemConfig { id: "data".to_owned(), path, read_only: false, limiter }
}

fn make(config: &PmemConfig) -> Pmem {
    let backing = Arc::new(Backing::open(&config.path, config.read_only).unwrap());
    Pmem::new(config, backing, START).unwrap()
}

fn started(config: &PmemConfig) -> (Pmem, Driver) {
    let mut pmem = make(config);
    let mut driver = Driver::for_device(&pmem);
    driver.start(&mut pmem, F_COMMON).unwrap();
    (pmem, driver)
}

/// Sends a request of four bytes; the result, when four bytes came.
fn ask(driver: &mut Driver, request: u32) -> i32 {
    let buffers = [driver.readable(&request.to_le_bytes()), driver.writable(4)];
    assert_eq!(driver.request(0, &buffers), Some(4));
    result(driver, buffers[1])
}

fn result(driver: &Driver, at: Buffer) -> i32 {
    i32::from_le_bytes(driver.peek(at.address, 4).try_into().unwrap())
}

fn count(pmem: &Pmem, name: &str) -> u64 {
    pmem.counters().iter().find(|(n, _)| *n == name).unwrap().1
}

fn limit(size: u64, refill_time_ms: u64) -> LimiterConfig {
    let bucket = BucketConfig { size, one_time_burst: 0, refill_time_ms };
    LimiterConfig { bandwidth: None, ops: Some(bucket) }
}

#[test]
fn the_driver_is_told_where_the_memory_lies() {
    let file = image(3 << 20);
    let pmem = make(&config(file.path()));
    let mut space = [0; 16];
    pmem.read_config(0, &mut space);
    assert_eq!(space[..8], START.to_le_bytes());
    assert_eq!(space[8..], (4u64 << 20).to_le_bytes());
    for bad in [START + 4096, 1, 0u64.wrapping_sub(2 << 20)] {
        let error = Pmem::new(&config(file.path()), Arc::clone(pmem.backing()), bad).err().unwrap();
        assert!(error.to_string().contains("\"data\""), "{error}");
    }
}

#[test]
fn a_flush_is_answered_with_success() {
    let file = image(1 << 20);
    let (pmem, mut driver) = started(&config(file.path()));
    assert_eq!(ask(&mut driver, 0), 0);
    assert_eq!((count(&pmem, "requests"), count(&pmem, "flushes")), (1, 1));
}

#[test]
fn what_is_no_flush_is_answered_with_failure_or_nothing() {
    let file = image(1 << 20);
    let (pmem, mut driver) = started(&config(file.path()));
    for other in [1, 0x100, u32::MAX] {
        assert_eq!(ask(&mut driver, other), -1);
    }
    let (request, room) = (driver.readable(&[0; 16]), driver.writable(16));
    let short = Buffer { len: 3, ..request };
    assert_eq!(driver.request(0, &[short, room]), Some(4));
    assert_eq!(result(&driver, room), -1);
    assert_eq!(driver.request(0, &[request, Buffer { len: 3, ..room }]), Some(0));
    assert_eq!(driver.request(0, &[request]), Some(0));
    assert_eq!(driver.request(0, &[room]), Some(4));
    assert_eq!((count(&pmem, "flushes"), count(&pmem, "event_fails")), (0, 7));
    // Larger buffers than need be, and in pieces, are a flush all the same.
    let pieces = [Buffer { len: 1, ..request }, Buffer::readable(request.address + 1, 15), room];
    assert_eq!(driver.request(0, &pieces), Some(4));
    assert_eq!(result(&driver, room), 0);
}

#[test]
fn flushes_that_wait_together_are_one_for_the_host() {
    let file = image(1 << 20);
    let mut pmem = make(&config(file.path()));
    let mut driver = Driver::for_device(&pmem);
    let request = driver.readable(&[0; 4]);
    let rooms: Vec<Buffer> = (0..20).map(|_| driver.writable(4)).collect();
    for room in &rooms {
        driver.poke(room.address, &[0x55; 4]);
        driver.rings[0].add(&[request, *room]);
    }
    driver.start(&mut pmem, F_COMMON).unwrap();
    for room in &rooms {
        assert_eq!(driver.wait_used(0).unwrap().len, 4);
        assert_eq!(result(&driver, *room), 0);
    }
    assert_eq!((count(&pmem, "requests"), count(&pmem, "flushes")), (20, 1));
}

#[test]
fn a_file_that_shrank_fails_flushes_and_the_device_lives() {
    let file = image(4 << 20);
    let (pmem, mut driver) = started(&config(file.path()));
    file.as_file().set_len(1 << 20).unwrap();
    assert_eq!(ask(&mut driver, 0), -1);
    assert_eq!(ask(&mut driver, 0), -1);
    assert_eq!(count(&pmem, "flush_fails"), 2);
    file.as_file().set_len(4 << 20).unwrap();
    assert_eq!(ask(&mut driver, 0), 0);
}

#[test]
fn a_failed_flush_stays_failed_until_a_reset_also_when_restored() {
    let file = image(1 << 20);
    let (mut pmem, mut driver) = started(&config(file.path()));
    pmem.backing.set_flush_failed();
    assert_eq!(ask(&mut driver, 0), -1);
    driver.stop(&mut pmem).unwrap();
    let saved = pmem.save();
    drop(pmem);
    let mut other = make(&config(file.path()));
    other.restore(&saved).unwrap();
    driver.start(&mut other, F_COMMON).unwrap();
    assert_eq!(ask(&mut driver, 0), -1);
    driver.stop(&mut other).unwrap();
    other.reset();
    driver.rings[0].clear();
    driver.start(&mut other, F_COMMON).unwrap();
    assert_eq!(ask(&mut driver, 0), 0);
}

#[test]
fn a_read_only_memory_has_nothing_to_flush() {
    let file = image(1 << 20);
    let (_pmem, mut driver) = started(&PmemConfig { read_only: true, ..config(file.path()) });
    assert_eq!(ask(&mut driver, 0), 0);
}

#[test]
fn a_limiter_holds_flushes_back_and_a_change_lets_them_go() {
    let file = image(1 << 20);
    // One flush, and the next in an hour.
    let limiter = limit(1, 3_600_000);
    let (mut pmem, mut driver) = started(&PmemConfig { limiter, ..config(file.path()) });
    assert_eq!(ask(&mut driver, 0), 0);
    let buffers = [driver.readable(&[0; 4]), driver.writable(4)];
    driver.send(0, &buffers);
    driver.kick(0);
    std::thread::sleep(Duration::from_millis(50));
    assert!(driver.rings[0].take_used().is_none());
    assert_eq!(count(&pmem, "flushes"), 1);
    assert!(count(&pmem, "rate_limiter_throttled_events") >= 1);
    // It waits through a stop, and the limits with it.
    driver.stop(&mut pmem).unwrap();
    driver.start(&mut pmem, F_COMMON).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert!(driver.rings[0].take_used().is_none());
    assert!(pmem.update(&Change::Backing(None)).is_err());
    pmem.update(&Change::Limits(limit(0, 0))).unwrap();
    assert_eq!(driver.wait_used(0).unwrap().len, 4);
}

#[test]
fn a_limiter_counts_one_operation_for_all_that_wait_and_opens_by_its_timer() {
    let file = image(1 << 20);
    let config = PmemConfig { limiter: limit(1, 100), ..config(file.path()) };
    let (pmem, mut driver) = started(&config);
    let begun = Instant::now();
    for _ in 0..4 {
        assert_eq!(ask(&mut driver, 0), 0);
    }
    assert!(begun.elapsed() >= Duration::from_millis(290), "{:?}", begun.elapsed());
    assert!(count(&pmem, "rate_limiter_event_count") >= 3);
}

#[test]
fn bandwidth_is_charged_with_the_whole_file() {
    let file = image(1 << 20);
    let bucket = BucketConfig { size: 2 << 20, one_time_burst: 0, refill_time_ms: 3_600_000 };
    let limiter = LimiterConfig { bandwidth: Some(bucket), ops: None };
    let (pmem, mut driver) = started(&PmemConfig { limiter, ..config(file.path()) });
    assert_eq!((ask(&mut driver, 0), ask(&mut driver, 0)), (0, 0));
    let buffers = [driver.readable(&[0; 4]), driver.writable(4)];
    driver.send(0, &buffers);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(count(&pmem, "flushes"), 2);
}

#[test]
fn a_state_of_another_memory_is_refused() {
    let file = image(1 << 20);
    let pmem = make(&config(file.path()));
    let saved = pmem.save();
    let mut elsewhere = Pmem::new(&config(file.path()), Arc::clone(pmem.backing()), START * 2).unwrap();
    assert!(elsewhere.restore(&saved).is_err());
    drop((pmem, elsewhere));
    let read_only = PmemConfig { read_only: true, ..config(file.path()) };
    assert!(make(&read_only).restore(&saved).is_err());
    let larger = image(3 << 20);
    assert!(make(&config(larger.path())).restore(&saved).is_err());
    make(&config(file.path())).restore(&saved).unwrap();
}

#[test]
fn a_broken_ring_asks_for_a_reset_and_a_new_start_serves_again() {
    let file = image(1 << 20);
    let (mut pmem, mut driver) = started(&config(file.path()));
    driver.rings[0].offer(0xffff);
    driver.kick(0);
    assert!(driver.signals.wait(|counts| counts.needs_reset == 1));
    driver.stop(&mut pmem).unwrap();
    pmem.reset();
    driver.rings[0].clear();
    driver.start(&mut pmem, F_COMMON).unwrap();
    assert_eq!(ask(&mut driver, 0), 0);
}
