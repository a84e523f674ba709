use std::time::Instant;

use super::{ram::tests::resident, *};
use crate::{
    Memory,
    virtio::driver::{Buffer, Desc, Driver, PATIENCE, memory},
};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
/// Where the rings and buffers of these tests lie; the balloon gets what is above.
const LOW: u64 = 4 * MIB;
const ALL: u64 = F_STATS_VQ | F_DEFLATE_ON_OOM | F_FREE_PAGE_HINT | F_PAGE_REPORTING;

fn everything() -> BalloonConfig {
    BalloonConfig {
        amount_mib: 2,
        deflate_on_oom: true,
        stats_polling_interval_s: 1000,
        free_page_hinting: true,
        free_page_reporting: true,
    }
}

/// 16 MiB, a gap of 16 MiB, 8 MiB; the upper half of the first region filled.
fn ram() -> Memory {
    memory(&[(0, 16 << 20), (32 * MIB, 8 << 20)])
}

fn started_with(config: &BalloonConfig, features: u64) -> (Balloon, Driver) {
    let mut balloon = Balloon::new(config, 24).unwrap();
    let mut driver = Driver::new(ram(), &balloon.about.queues);
    driver.poke(8 * MIB, &vec![0x5a; 8 << 20]);
    driver.poke(32 * MIB, &vec![0x5a; 8 << 20]);
    driver.start(&mut balloon, F_COMMON | features).unwrap();
    (balloon, driver)
}

fn started() -> (Balloon, Driver) {
    started_with(&everything(), ALL)
}

fn report(balloon: &Balloon) -> BalloonReport {
    match balloon.report() {
        Report::Balloon(report) => report,
        other => panic!("{other:?}"),
    }
}

fn counter(balloon: &Balloon, name: &str) -> u64 {
    balloon.counters().into_iter().find(|(n, _)| *n == name).unwrap().1
}

fn config(balloon: &Balloon) -> [u32; 3] {
    let mut bytes = [0; 12];
    balloon.read_config(0, &mut bytes);
    std::array::from_fn(|i| u32::from_le_bytes(bytes[4 * i..4 * i + 4].try_into().unwrap()))
}

fn list(driver: &mut Driver, pages: impl IntoIterator<Item = u32>) -> Buffer {
    let bytes: Vec<u8> = pages.into_iter().flat_map(u32::to_le_bytes).collect();
    driver.readable(&bytes)
}

fn pfn(address: u64) -> u32 {
    (address / PAGE) as u32
}

fn pairs(values: &[(u16, u64)]) -> Vec<u8> {
    values.iter().flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()).collect()
}

/// Waits for something that the worker does without telling the driver.
fn wait(what: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !what() {
        assert!(Instant::now() < end, "it never came");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn inflated_pages_go_to_the_host_and_come_back_empty() {
    let (balloon, mut driver) = started();
    let first = pfn(8 * MIB);
    let pages = list(&mut driver, (first..first + 256).rev());
    assert_eq!(driver.request(0, &[pages]), Some(0));
    assert_eq!(resident(&driver.memory, 8 * MIB, MIB), 0);
    assert_eq!(resident(&driver.memory, 9 * MIB, MIB), MIB);
    assert_eq!(driver.peek(8 * MIB, 1 << 20), vec![0; 1 << 20]);
    assert_eq!(driver.peek(9 * MIB, 16), vec![0x5a; 16]);
    assert_eq!(driver.request(1, &[pages]), Some(0));
    assert_eq!(driver.peek(9 * MIB, 16), vec![0x5a; 16], "deflating gives nothing away");
    assert_eq!((counter(&balloon, "inflate_count"), counter(&balloon, "deflate_count")), (1, 1));
    assert_eq!(counter(&balloon, "inflate_freed"), MIB);
    assert_eq!(counter(&balloon, "bad_pages"), 0);
}

#[test]
fn pages_that_are_no_memory_are_counted_and_the_others_still_go() {
    let (balloon, mut driver) = started();
    let hostile = [u32::MAX, pfn(16 * MIB), pfn(9 * MIB), pfn(31 * MIB), pfn(40 * MIB), 1 << 31, u32::MAX];
    let pages = list(&mut driver, hostile.into_iter().chain([pfn(40 * MIB) - 1]));
    assert_eq!(driver.request(0, &[pages]), Some(0));
    assert_eq!(counter(&balloon, "bad_pages"), 5);
    assert_eq!(counter(&balloon, "inflate_freed"), 2 * PAGE);
    assert_eq!((driver.peek(9 * MIB, 1), driver.peek(40 * MIB - 1, 1)), (vec![0], vec![0]));
    assert_eq!(driver.signals.counts().needs_reset, 0);
}

#[test]
fn torn_and_empty_lists_are_answered() {
    let (balloon, mut driver) = started();
    let torn = driver.readable(&[0; 3]);
    assert_eq!(driver.request(0, &[torn]), Some(0));
    let room = driver.writable(4096);
    assert_eq!(driver.request(0, &[room]), Some(0));
    let split = [
        driver.readable(&pfn(9 * MIB).to_le_bytes()[..1]),
        driver.readable(&pfn(9 * MIB).to_le_bytes()[1..]),
    ];
    assert_eq!(driver.request(0, &split), Some(0));
    assert_eq!(counter(&balloon, "event_fails"), 2);
    assert_eq!(driver.peek(9 * MIB, 1), [0], "a number may lie in two buffers");
}

#[test]
fn a_list_of_millions_of_pages_does_not_keep_its_neighbours_waiting() {
    let (mut balloon, mut driver) = started();
    // The same four megabytes of page numbers again and again: 256 million numbers.
    for at in (LOW..8 * MIB).step_by(MIB as usize) {
        driver.poke(at, &[0xff; 1 << 20]);
    }
    let all = vec![Buffer::readable(LOW, 4 << 20); 256];
    driver.send(0, &all);
    let pages = list(&mut driver, [pfn(8 * MIB)]);
    for _ in 0..10 {
        assert_eq!(driver.request(1, &[pages]), Some(0));
    }
    assert_eq!(driver.rings[0].device_used_idx(), 0, "the long one is still being read");
    let begun = Instant::now();
    let positions = driver.stop(&mut balloon).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(2));
    assert_eq!((positions[0].1.next_avail, positions[1].1.next_avail), (0, 10));
}

#[test]
fn reported_ranges_go_to_the_host() {
    let (balloon, mut driver) = started();
    let ranges = [
        Buffer::writable(8 * MIB, 2 << 20),
        Buffer::writable(32 * MIB + 1, 8192),
        Buffer::writable(11 * MIB, 100),
    ];
    assert_eq!(driver.request(4, &ranges), Some(0));
    assert_eq!(resident(&driver.memory, 8 * MIB, 2 * MIB), 0);
    assert_eq!(driver.peek(32 * MIB + 4095, 2), [0x5a, 0]);
    assert_eq!(driver.peek(32 * MIB + 8192, 1), [0x5a]);
    assert_eq!(counter(&balloon, "free_page_report_count"), 3);
    assert_eq!(counter(&balloon, "free_page_report_freed"), 2 * MIB + PAGE);
    assert_eq!(counter(&balloon, "free_page_report_fails"), 0);
}

#[test]
fn a_reported_range_outside_memory_needs_a_reset_and_a_reset_heals() {
    let (mut balloon, mut driver) = started();
    driver.rings[4].write_desc(0, Desc { address: 16 * MIB - 4096, len: 8192, flags: Desc::WRITE, next: 0 });
    driver.rings[4].offer(0);
    driver.kick(4);
    assert!(driver.signals.wait(|counts| counts.needs_reset == 1));
    assert_eq!(driver.peek(16 * MIB - 1, 1), [0x5a]);
    driver.stop(&mut balloon).unwrap();
    balloon.reset();
    driver.rings[4].clear();
    driver.start(&mut balloon, F_COMMON | ALL).unwrap();
    assert_eq!(driver.request(4, &[Buffer::writable(8 * MIB, 4096)]), Some(0));
}

#[test]
fn queues_are_found_with_and_without_gaps() {
    let roles = |features, enabled: &[u16]| roles(features, enabled);
    use Role::{Deflate, Hinting, Inflate, Reporting, Statistics};
    let (both, fixed) = (F_FREE_PAGE_HINT | F_PAGE_REPORTING, [Some(Inflate), Some(Deflate)]);
    let with = |rest: &[Option<Role>]| [&fixed[..], rest].concat();
    // As Linux numbers them, as the specification does, and all of them enabled.
    assert_eq!(roles(both, &[0, 1, 2, 3]), with(&[Some(Hinting), Some(Reporting)]));
    assert_eq!(roles(both, &[0, 1, 3, 4]), with(&[Some(Hinting), Some(Reporting)]));
    assert_eq!(roles(both, &[0, 1, 2, 3, 4]), with(&[None, Some(Hinting), Some(Reporting)]));
    assert_eq!(roles(F_PAGE_REPORTING, &[0, 1, 2]), with(&[Some(Reporting)]));
    assert_eq!(roles(F_PAGE_REPORTING, &[0, 1, 4]), with(&[Some(Reporting)]));
    assert_eq!(roles(ALL, &[0, 1, 2, 3, 4]), with(&[Some(Statistics), Some(Hinting), Some(Reporting)]));
    assert_eq!(roles(0, &[0, 1, 2]), with(&[None]));
    assert_eq!(roles(ALL, &[1, 3]), [Some(Deflate), Some(Hinting)]);
}

#[test]
fn a_linux_driver_with_reporting_alone_is_served_on_its_third_queue() {
    let config = BalloonConfig { free_page_reporting: true, ..BalloonConfig::default() };
    let mut balloon = Balloon::new(&config, 24).unwrap();
    assert_eq!(balloon.about.features, F_COMMON | F_PAGE_REPORTING);
    let mut driver = Driver::new(ram(), &[QUEUE_SIZE; 3]);
    driver.start(&mut balloon, F_COMMON | F_PAGE_REPORTING).unwrap();
    driver.poke(8 * MIB, &[1]);
    assert_eq!(driver.request(2, &[Buffer::writable(8 * MIB, 4096)]), Some(0));
    assert_eq!(driver.peek(8 * MIB, 1), [0]);
}

#[test]
fn statistics_are_kept_and_asked_for_again() {
    let (mut balloon, mut driver) = started();
    assert_eq!(report(&balloon).stats, Some(Box::default()));
    let buffer = driver.readable(&pairs(&[(4, 1000), (5, 2000), (99, 1), (0, 7)]));
    driver.send(2, &[buffer]);
    wait(|| report(&balloon).stats.unwrap().free_memory == Some(1000));
    let stats = report(&balloon).stats.unwrap();
    let expected = BalloonStats {
        free_memory: Some(1000),
        total_memory: Some(2000),
        swap_in: Some(7),
        ..Default::default()
    };
    assert_eq!(*stats, expected);
    assert_eq!(driver.rings[2].device_used_idx(), 0, "the buffer is kept until the clock strikes");
    balloon.update(&Change::BalloonStatistics(500)).unwrap();
    assert!(driver.wait_used(2).is_some(), "a new interval asks at once");
    driver.poke(buffer.address, &pairs(&[(4, 3)]));
    driver.send(2, &[Buffer::readable(buffer.address, 10)]);
    wait(|| report(&balloon).stats.unwrap().free_memory == Some(3));
    assert_eq!(report(&balloon).stats.unwrap().total_memory, Some(2000));
    assert_eq!(counter(&balloon, "stats_updates_count"), 2);
    assert_eq!(counter(&balloon, "stats_update_fails"), 0);
    assert_eq!(report(&balloon).stats_polling_interval_s, 500);
}

#[test]
fn the_clock_asks_by_itself() {
    let (_balloon, mut driver) =
        started_with(&BalloonConfig { stats_polling_interval_s: 1, ..everything() }, ALL);
    let buffer = driver.readable(&pairs(&[(4, 1)]));
    for _ in 0..2 {
        assert_eq!(driver.request(2, &[buffer]), Some(0));
    }
}

#[test]
fn hostile_statistics_are_counted_and_do_no_harm() {
    let (mut balloon, mut driver) = started();
    let huge = Buffer::readable(8 * MIB, 8 << 20);
    driver.send(2, &[huge; 200]);
    wait(|| counter(&balloon, "stats_update_fails") == 1);
    let torn = driver.readable(&pairs(&[(4, 5), (5, 6)])[..19]);
    driver.send(2, &[torn]);
    assert!(driver.wait_used(2).is_some(), "a second buffer releases the first");
    wait(|| counter(&balloon, "stats_update_fails") == 2);
    let expected = BalloonStats { free_memory: Some(5), ..Default::default() };
    wait(|| *report(&balloon).stats.unwrap() == expected);
    let empty = driver.writable(100);
    driver.send(2, &[empty]);
    assert!(driver.wait_used(2).is_some());
    wait(|| counter(&balloon, "stats_update_fails") == 3);
    assert_eq!(*report(&balloon).stats.unwrap(), expected);
    balloon.update(&Change::BalloonStatistics(1)).unwrap();
    assert!(driver.wait_used(2).is_some(), "the device still asks");
}

#[test]
fn statistics_cannot_be_switched_on_or_off() {
    let (mut balloon, _driver) = started();
    balloon.update(&Change::BalloonStatistics(1000)).unwrap();
    assert!(balloon.update(&Change::BalloonStatistics(0)).is_err());
    let mut without = Balloon::new(&BalloonConfig::default(), 24).unwrap();
    without.update(&Change::BalloonStatistics(0)).unwrap();
    let error = without.update(&Change::BalloonStatistics(1)).unwrap_err().to_string();
    assert!(error.contains("made without statistics"), "{error}");
    assert_eq!(report(&without).stats, None);
    assert_eq!(without.about.queues.len(), 2);
}

#[test]
fn a_target_reaches_the_driver_whenever_it_is_set() {
    let mut balloon = Balloon::new(&everything(), 24).unwrap();
    assert_eq!(config(&balloon), [512, 0, 0]);
    balloon.update(&Change::BalloonTarget(3)).unwrap();
    balloon.reset();
    let mut driver = Driver::new(ram(), &balloon.about.queues);
    driver.start(&mut balloon, F_COMMON | ALL).unwrap();
    assert_eq!(config(&balloon), [768, 0, 0], "set before there was a driver");
    assert_eq!(driver.signals.counts().config, 0, "which reads it by itself");
    balloon.update(&Change::BalloonTarget(24)).unwrap();
    assert_eq!((config(&balloon)[0], driver.signals.counts().config), (24 * 256, 1));
    driver.stop(&mut balloon).unwrap();
    balloon.update(&Change::BalloonTarget(1)).unwrap();
    assert_eq!(driver.signals.counts().config, 1);
    driver.start(&mut balloon, F_COMMON | ALL).unwrap();
    assert_eq!(driver.signals.counts().config, 2, "set while the machine was paused");
    let report = report(&balloon);
    assert_eq!((report.target_mib, report.target_pages, report.active), (1, 256, true));
}

#[test]
fn a_target_beyond_memory_is_refused_by_number() {
    let mut balloon = Balloon::new(&everything(), 24).unwrap();
    for mib in [25, u32::MAX / 256, u32::MAX / 256 + 1, u32::MAX] {
        let error = balloon.update(&Change::BalloonTarget(mib)).unwrap_err().to_string();
        assert!(error.contains("at most 24 MiB"), "{error}");
    }
    assert_eq!(report(&balloon).target_mib, 2);
    assert!(Balloon::new(&BalloonConfig { amount_mib: 25, ..everything() }, 24).is_err());
    assert!(Balloon::new(&BalloonConfig { amount_mib: u32::MAX, ..everything() }, u64::MAX).is_err());
    assert!(balloon.update(&Change::Backing(None)).is_err());
}

#[test]
fn the_driver_writes_the_actual_size_and_nothing_else() {
    let (mut balloon, _driver) = started();
    balloon.write_config(4, &513u32.to_le_bytes());
    assert_eq!(config(&balloon), [512, 513, 0]);
    assert_eq!((report(&balloon).actual_pages, report(&balloon).actual_mib), (513, 2));
    balloon.write_config(0, &[0xff; 12]);
    assert_eq!(config(&balloon), [512, u32::MAX, 0]);
    balloon.write_config(7, &[0, 9]);
    assert_eq!(config(&balloon), [512, 0x00ff_ffff, 0]);
    balloon.write_config(11, &[1, 2, 3]);
    balloon.write_config(u32::MAX, &[1]);
    assert_eq!(config(&balloon), [512, 0x00ff_ffff, 0]);
}

fn say(driver: &mut Driver, number: u32) {
    let number = driver.readable(&number.to_le_bytes());
    assert_eq!(driver.request(3, &[number]), Some(0));
}

#[test]
fn hinted_pages_go_while_their_run_is_on_and_the_end_is_acknowledged() {
    let (mut balloon, mut driver) = started();
    assert_eq!(report(&balloon).guest_cmd, None);
    balloon.update(&Change::HintingStart { acknowledge_on_stop: true }).unwrap();
    assert_eq!((config(&balloon)[2], driver.signals.counts().config), (2, 1));
    // Number and pages may come in one chain.
    let number = driver.readable(&2u32.to_le_bytes());
    assert_eq!(driver.request(3, &[number, Buffer::writable(8 * MIB, 1 << 20)]), Some(0));
    assert_eq!(driver.request(3, &[Buffer::writable(10 * MIB, 1 << 20)]), Some(0));
    assert_eq!(resident(&driver.memory, 8 * MIB, 4 * MIB), 2 * MIB);
    assert_eq!((report(&balloon).host_cmd, report(&balloon).guest_cmd), (2, Some(2)));
    say(&mut driver, 0);
    assert_eq!((report(&balloon).host_cmd, report(&balloon).guest_cmd), (1, Some(0)));
    assert_eq!((config(&balloon)[2], driver.signals.counts().config), (1, 2));
    assert_eq!(driver.request(3, &[Buffer::writable(12 * MIB, 1 << 20)]), Some(0));
    assert_eq!(resident(&driver.memory, 12 * MIB, MIB), MIB, "the run was over");
    assert_eq!(counter(&balloon, "free_page_hint_count"), 2);
    assert_eq!(counter(&balloon, "free_page_hint_freed"), 2 * MIB);
}

#[test]
fn hints_of_a_stale_run_or_of_none_are_left_to_the_guest() {
    let (mut balloon, mut driver) = started();
    let range = Buffer::writable(8 * MIB, 1 << 20);
    let kept = |driver: &Driver| resident(&driver.memory, 8 * MIB, MIB) == MIB;
    assert_eq!(driver.request(3, &[range]), Some(0));
    balloon.update(&Change::HintingStart { acknowledge_on_stop: false }).unwrap();
    assert_eq!(driver.request(3, &[range]), Some(0));
    assert!(kept(&driver), "no number was sent");
    balloon.update(&Change::HintingStart { acknowledge_on_stop: false }).unwrap();
    say(&mut driver, 2);
    assert_eq!(driver.request(3, &[range]), Some(0));
    assert!(kept(&driver), "the number is that of the first run");
    say(&mut driver, 3);
    balloon.update(&Change::HintingStop).unwrap();
    assert_eq!((config(&balloon)[2], report(&balloon).host_cmd), (1, 1));
    assert_eq!(driver.request(3, &[range]), Some(0));
    assert!(kept(&driver), "the run was stopped");
    let (short, long) = (driver.readable(&[2]), driver.readable(&[0; 8]));
    assert_eq!(driver.request(3, &[short]), Some(0));
    assert_eq!(driver.request(3, &[long]), Some(0));
    assert_eq!(counter(&balloon, "event_fails"), 2);
    assert_eq!(counter(&balloon, "free_page_hint_count"), 0);
}

#[test]
fn hinting_needs_the_feature_and_a_driver_that_knows_it() {
    let start = Change::HintingStart { acknowledge_on_stop: true };
    let refusal = |balloon: &mut Balloon| balloon.update(&start).unwrap_err().to_string();
    let mut balloon = Balloon::new(&BalloonConfig::default(), 24).unwrap();
    assert!(refusal(&mut balloon).contains("made without"));
    let mut balloon = Balloon::new(&everything(), 24).unwrap();
    assert!(refusal(&mut balloon).contains("no driver"));
    assert!(balloon.update(&Change::HintingStop).is_err());
    let (mut balloon, _driver) = started_with(&everything(), ALL & !F_FREE_PAGE_HINT);
    assert!(refusal(&mut balloon).contains("does not know"));
    assert_eq!(config(&balloon)[2], 0);
}

#[test]
fn a_reset_forgets_the_driver_and_keeps_what_the_owner_wants() {
    let (mut balloon, mut driver) = started();
    balloon.write_config(4, &[1; 4]);
    balloon.update(&Change::HintingStart { acknowledge_on_stop: true }).unwrap();
    balloon.update(&Change::BalloonTarget(5)).unwrap();
    say(&mut driver, 2);
    let stats = driver.readable(&pairs(&[(4, 1)]));
    driver.send(2, &[stats]);
    wait(|| counter(&balloon, "stats_updates_count") == 1);
    driver.stop(&mut balloon).unwrap();
    balloon.reset();
    assert_eq!(config(&balloon), [5 * 256, 0, 0]);
    let after = report(&balloon);
    assert_eq!((after.active, after.guest_cmd, after.stats), (false, None, Some(Box::default())));
}

#[test]
fn a_stopped_balloon_goes_on_where_it_stood() {
    let (mut balloon, mut driver) = started();
    let stats = driver.readable(&pairs(&[(4, 77)]));
    driver.send(2, &[stats]);
    wait(|| report(&balloon).stats.unwrap().free_memory == Some(77));
    balloon.update(&Change::HintingStart { acknowledge_on_stop: true }).unwrap();
    say(&mut driver, 2);
    let positions = driver.stop(&mut balloon).unwrap();
    assert_eq!(positions[2].1.next_avail, 0, "the buffer that is kept is put back");
    driver.start(&mut balloon, F_COMMON | ALL).unwrap();
    assert_eq!(driver.request(3, &[Buffer::writable(8 * MIB, 1 << 20)]), Some(0));
    assert_eq!(resident(&driver.memory, 8 * MIB, MIB), 0, "a pause does not end a run");
    wait(|| counter(&balloon, "stats_updates_count") == 2);
    balloon.update(&Change::BalloonStatistics(2000)).unwrap();
    assert!(driver.wait_used(2).is_some());
}

#[test]
fn a_restored_balloon_has_its_state_and_no_run() {
    let (mut balloon, mut driver) = started();
    let stats = driver.readable(&pairs(&[(4, 77)]));
    driver.send(2, &[stats]);
    wait(|| report(&balloon).stats.unwrap().free_memory == Some(77));
    balloon.write_config(4, &256u32.to_le_bytes());
    balloon.update(&Change::BalloonTarget(7)).unwrap();
    balloon.update(&Change::BalloonStatistics(900)).unwrap();
    assert!(driver.wait_used(2).is_some());
    driver.send(2, &[stats]);
    balloon.update(&Change::HintingStart { acknowledge_on_stop: true }).unwrap();
    say(&mut driver, 2);
    driver.stop(&mut balloon).unwrap();
    let saved = balloon.save();
    let mut other = Balloon::new(&everything(), 24).unwrap();
    other.restore(&saved).unwrap();
    assert_eq!(config(&other), [7 * 256, 256, 1]);
    assert_eq!(report(&other), BalloonReport { host_cmd: 1, ..report(&balloon) });
    let told = driver.signals.counts().config;
    driver.start(&mut other, F_COMMON | ALL).unwrap();
    assert_eq!(driver.signals.counts().config, told + 1, "the guest may have its pages back");
    assert_eq!(driver.request(3, &[Buffer::writable(8 * MIB, 1 << 20)]), Some(0));
    assert_eq!(resident(&driver.memory, 8 * MIB, MIB), MIB);
    other.update(&Change::HintingStart { acknowledge_on_stop: true }).unwrap();
    assert_eq!(config(&other)[2], 3, "a number the guest has not seen");
    other.update(&Change::BalloonStatistics(1)).unwrap();
    assert!(driver.wait_used(2).is_some(), "the buffer is still known");
}

#[test]
fn a_target_set_before_a_save_is_told_after_it() {
    let (mut balloon, mut driver) = started();
    driver.stop(&mut balloon).unwrap();
    balloon.update(&Change::BalloonTarget(9)).unwrap();
    let mut other = Balloon::new(&everything(), 24).unwrap();
    other.restore(&balloon.save()).unwrap();
    let told = driver.signals.counts().config;
    driver.start(&mut other, F_COMMON | ALL).unwrap();
    assert_eq!((driver.signals.counts().config, config(&other)[0]), (told + 1, 9 * 256));
}

#[test]
fn saved_states_that_cannot_be_are_refused() {
    let balloon = Balloon::new(&everything(), 24).unwrap();
    let saved = balloon.save();
    let mut small = Balloon::new(&BalloonConfig { amount_mib: 0, ..everything() }, 1).unwrap();
    assert!(small.restore(&saved).unwrap_err().to_string().contains("512 pages"));
    let mut silent =
        Balloon::new(&BalloonConfig { stats_polling_interval_s: 0, ..everything() }, 24).unwrap();
    assert!(silent.restore(&saved).unwrap_err().to_string().contains("interval is 1000 s"));
    assert_eq!(report(&silent).target_mib, 2);
}
