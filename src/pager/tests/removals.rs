//! Pages that are given back: by a balloon, a memory device, free page reporting.

use super::*;

const ZERO: [u8; PAGE as usize] = [0; PAGE as usize];

#[test]
fn what_was_given_back_reads_as_zero_filled_or_not() {
    let area = Area::anonymous(256);
    let pager = serve(area, Model::of(0..256));
    assert_eq!(area.page(0), page(0));
    // Pages 4 to 8 were brought with page 0, those from 8 on were not.
    area.advise(4, 28, libc::MADV_DONTNEED);
    assert_eq!((area.page(3), area.page(32)), (page(3), page(32)));
    for number in 4..32 {
        assert_eq!(area.page(number), ZERO, "page {number}");
    }
    area.write(9, 3);
    assert_eq!(pager.served().removals, 1);
    assert!(pager.complete(LONG));
    assert_eq!((area.page(9)[0], area.page(10).as_slice()), (3, &ZERO[..]));
}

#[test]
fn nothing_is_missing_once_all_was_given_back() {
    let area = Area::anonymous(64);
    let pager = serve(area, Model::of(0..64));
    area.advise(0, 64, libc::MADV_DONTNEED);
    wait_for("the end", || pager.served().complete);
    assert_eq!(area.page(5), ZERO);
}

#[test]
fn a_storm_of_removals_is_drained_while_pages_are_brought() {
    // 100,000 pages are given back one by one, on two threads, while two others touch all pages
    // in other orders and everything is prefetched. A page is the source's or zero, and zero once
    // it was given back.
    const PAGES: u64 = 100_000;
    let area = Area::anonymous(PAGES + 16);
    let source = Box::new(Model::of(0..PAGES + 16));
    let prefetch = Prefetch { all: true, ..Prefetch::default() };
    let ranges = [area.part(0, PAGES, 0)];
    let pager = Pager::start(&ranges, source, &prefetch, false, never()).unwrap();
    std::thread::scope(|scope| {
        for half in 0..2 {
            scope.spawn(move || {
                for number in (half * PAGES / 2)..(half + 1) * PAGES / 2 {
                    area.advise(number, 1, libc::MADV_DONTNEED);
                    if number % 64 == 0 {
                        assert_eq!(area.page(number), ZERO, "page {number}");
                    }
                }
            });
        }
        for walk in [77_777, 33_331] {
            scope.spawn(move || {
                for step in 0..PAGES {
                    let number = step * walk % PAGES;
                    // It may be given back in the middle of the reading.
                    let (found, source) = (area.page(number), page(number));
                    let read = found.iter().zip(&source).take_while(|(one, other)| one == other).count();
                    assert_eq!(found[read..], ZERO[read..], "page {number}");
                }
            });
        }
    });
    for number in 0..PAGES {
        assert_eq!(area.page(number), ZERO, "page {number}");
    }
    wait_for("the end", || pager.served().complete);
    assert!(pager.broken().is_none());
}

#[test]
fn a_hundred_thousand_removals_are_counted() {
    let area = Area::anonymous(64);
    let pager = serve(area, Model::of(0..64));
    for round in 0..100_000 {
        area.advise(round % 63, 1, libc::MADV_DONTNEED);
    }
    // Who gave back goes on before it is counted.
    wait_for("the count", || pager.served().removals == 100_000);
    assert_eq!((area.page(63), area.page(0).as_slice()), (page(63), &ZERO[..]));
}
