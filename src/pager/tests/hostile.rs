//! Sources that fail, lie or take their time.

use super::*;

/// Touches a page on a thread that may wait for ever; what it read is sent.
pub(super) fn touch(area: Area, number: u64) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let _ = sender.send(area.page(number));
    });
    receiver
}

#[test]
fn a_source_that_fails_is_told_with_its_reason_and_nobody_gets_a_wrong_page() {
    let area = Area::anonymous(256);
    let (broken, told) = complaints();
    let model = Model { fails_at: Some(128), ..Model::of(0..256) };
    let pager = Pager::start(&[area.range(0)], Box::new(model), &Prefetch::default(), false, broken).unwrap();
    assert_eq!(area.page(127), page(127));
    let waiting = [touch(area, 128), touch(area, 129), touch(area, 200)];
    let reason = told.recv_timeout(LONG).unwrap();
    assert!(reason.starts_with("The disk is gone: Input/output error"), "{reason}");
    assert_eq!(pager.broken(), Some(reason));
    assert!(!pager.complete(LONG));
    for wait in &waiting {
        assert!(wait.recv_timeout(Duration::from_millis(200)).is_err());
    }
    // What was there stays.
    assert_eq!(area.page(120), page(120));
    pager.give_up();
    waiting.iter().for_each(|wait| drop(wait.recv_timeout(LONG).unwrap()));
    assert!(told.try_recv().is_err());
}

#[test]
fn a_source_that_fails_in_the_background_is_told_before_anybody_waits() {
    let area = Area::anonymous(256);
    let (broken, told) = complaints();
    let model = Model { fails_at: Some(100), ..Model::of(0..256) };
    let prefetch = Prefetch { all: true, ..Prefetch::default() };
    let _pager = Pager::start(&[area.range(0)], Box::new(model), &prefetch, false, broken).unwrap();
    assert!(told.recv_timeout(LONG).unwrap().contains("The disk is gone"));
}

#[test]
fn a_slow_source_is_waited_for() {
    let area = Area::anonymous(1024);
    let model = Model { delay: Duration::from_millis(30), ..Model::of(0..1024) };
    let _pager = serve(area, model);
    std::thread::scope(|scope| {
        for start in [0, 256, 512, 768] {
            scope.spawn(move || {
                for number in (start..start + 256).step_by(50) {
                    assert_eq!(area.page(number), page(number));
                }
            });
        }
    });
}

#[test]
fn ranges_that_are_no_whole_pages_are_refused_by_number() {
    let at = |address: usize| NonNull::new(address as *mut u8).unwrap();
    for (host, len, offset, size) in [
        (0x1001, PAGE, 0, PAGE),
        (0x1000, 100, 0, PAGE),
        (0x1000, 0, 0, PAGE),
        (0x1000, PAGE, 1, PAGE),
        (0x1000, PAGE, 0, 2 << 20),
        (0x1000, PAGE, 0, 12),
        (0x1000, PAGE, 0, 0),
        (0x1000, PAGE, u64::MAX - PAGE + 1, PAGE),
    ] {
        // SAFETY: the addresses are never touched.
        let refused = unsafe { Range::new(at(host), len, offset, size) }.unwrap_err().to_string();
        assert!(refused.contains(&format!("{len} bytes")), "{refused}");
    }
}
