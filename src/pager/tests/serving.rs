//! What is asked for comes, once, and right.

use super::*;

#[test]
fn many_threads_read_what_the_source_says() {
    let area = Area::anonymous(4096);
    let model = || Model::of((0..4096).filter(|n| n * 2_654_435_761 % 7 < 3));
    let pager = serve(area, model());
    std::thread::scope(|scope| {
        for walk in [1u64, 7, 4095, 1001] {
            scope.spawn(move || {
                let model = model();
                for step in 0..4096 {
                    let number = step * walk % 4096;
                    assert!(area.page(number) == model.expected(number), "page {number}");
                }
            });
        }
    });
    wait_for("the end", || pager.served().complete);
    assert!(pager.served().faults > 0 && pager.broken().is_none());
    // Memory is the kernel's again.
    area.advise(7, 1, libc::MADV_DONTNEED);
    assert_eq!(area.page(7), vec![0; PAGE as usize]);
}

#[test]
fn one_fault_brings_its_window_and_no_more() {
    let area = Area::anonymous(1024);
    let pager = serve(area, Model::of(0..1024));
    for number in [37, 32, 39, 36] {
        assert_eq!(area.page(number), page(number));
    }
    assert_eq!(area.there(), (32..40).collect::<Vec<_>>());
    // Who waited goes on before it is counted.
    wait_for("the count", || pager.served().filled == AROUND);
    assert_eq!(pager.served().faults, 1);
}

#[test]
fn what_no_layer_holds_is_left_to_the_kernel() {
    let area = Area::anonymous(8192);
    let pager = serve(area, Model::of((0..16).chain(8000..8016)));
    for number in 2000..4000 {
        area.write(number, 1);
    }
    assert_eq!(area.page(8015), page(8015));
    assert_eq!(pager.served().faults, 1);
}

#[test]
fn zero_pages_of_the_source_take_no_memory() {
    let area = Area::anonymous(64);
    let mut model = Model::of(0..64);
    (0..60).for_each(|n| drop(model.pages.insert(n, vec![0; PAGE as usize])));
    let pager = serve(area, model);
    assert_eq!(area.page(3), vec![0; PAGE as usize]);
    area.write(4, 9);
    assert!(pager.complete(LONG));
    let served = pager.served();
    assert_eq!((served.zeroed, served.filled), (60 * PAGE, 4 * PAGE));
    assert_eq!((area.page(4)[0], area.page(5)), (9, vec![0; PAGE as usize]));
}

#[test]
fn what_is_prefetched_causes_no_fault() {
    let area = Area::anonymous(2048);
    let first = Model::of((100..300).chain([1000])).present();
    let prefetch = Prefetch { first, all: false };
    let pager =
        Pager::start(&[area.range(0)], Box::new(Model::of(0..2048)), &prefetch, false, never()).unwrap();
    assert!(pager.has_first(LONG));
    assert_eq!(pager.served().filled, 201 * PAGE);
    assert_eq!(area.there(), (100..300).chain([1000]).collect::<Vec<_>>());
    assert_eq!((area.page(299), area.page(1000)), (page(299), page(1000)));
    assert_eq!(pager.served().faults, 0);
    assert_eq!(area.page(301), page(301));
    assert_eq!(pager.served().faults, 1);
}

#[test]
fn everything_can_be_brought_while_it_is_used() {
    let area = Area::anonymous(8192);
    let source = Model::of(0..8192);
    let prefetch = Prefetch { all: true, ..Prefetch::default() };
    let pager = Pager::start(&[area.range(0)], Box::new(source), &prefetch, false, never()).unwrap();
    for number in (0..8192).rev() {
        assert_eq!(area.page(number), page(number));
    }
    assert!(pager.complete(LONG) && pager.served().complete);
}

#[test]
fn what_was_touched_is_recorded_until_asked() {
    let area = Area::anonymous(1024);
    let source = Box::new(Model::of(0..1024));
    let pager = Pager::start(&[area.range(0)], source, &Prefetch::default(), true, never()).unwrap();
    for number in [5, 200, 17] {
        area.page(number);
    }
    let run = |start, end| Run { start: start * PAGE, end: end * PAGE };
    assert_eq!(pager.touched().take().runs(), [run(0, 8), run(16, 24), run(200, 208)]);
    area.page(900);
    assert_eq!(pager.touched().take(), Extents::default());
}

#[test]
fn ranges_lie_where_they_lie_in_the_snapshot() {
    let area = Area::anonymous(96);
    // The upper half of the snapshot lies below the lower one here, with a gap between.
    let ranges = [area.part(0, 32, 32 * PAGE), area.part(64, 32, 0)];
    let model = Model::of(0..64);
    let pager = Pager::start(&ranges, Box::new(model), &Prefetch::default(), false, never()).unwrap();
    assert_eq!((area.page(0), area.page(31)), (page(32), page(63)));
    assert_eq!((area.page(64), area.page(95)), (page(0), page(31)));
    assert_eq!(area.page(50), vec![0; PAGE as usize]);
    assert!(pager.complete(LONG));
}

#[test]
fn memory_is_served_without_its_pager_being_held() {
    let area = Area::anonymous(64);
    drop(serve(area, Model::of(0..64)));
    assert_eq!(area.page(63), page(63));
}

#[test]
fn memory_that_was_replaced_or_unmapped_is_no_failure() {
    let area = Area::anonymous(256);
    let pager = serve(area, Model::of(0..256));
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: both ranges lie in the mapping, which nobody else uses.
    unsafe {
        let length = (64 * PAGE) as usize;
        libc::mmap(area.address(10).cast(), length, libc::PROT_READ, flags, -1, 0);
        libc::munmap(area.address(150).cast(), length);
    }
    assert_eq!(area.page(9), page(9));
    assert!(pager.complete(LONG));
    assert_eq!((area.page(10), area.page(74)), (vec![0; PAGE as usize], page(74)));
    assert_eq!((area.page(149), area.page(255)), (page(149), page(255)));
}

#[test]
fn what_is_given_up_is_zero() {
    let area = Area::anonymous(64);
    let pager = serve(area, Model::of(0..64));
    assert_eq!(area.page(3), page(3));
    pager.give_up();
    assert_eq!((area.page(3), area.page(40)), (page(3), vec![0; PAGE as usize]));
}

#[test]
fn huge_pages_come_whole() {
    const HUGE: u64 = 2 << 20;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    let open = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping where the kernel chooses touches no memory of ours.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), 3 * HUGE as usize, open, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        // Only a host with /proc/sys/vm/nr_hugepages of 3 and more can show this.
        return;
    }
    let area = Area { at: at as usize, pages: 3 * HUGE / PAGE };
    // SAFETY: the mapping stays, and is only used through raw pointers.
    let range = unsafe { Range::new(NonNull::new(at.cast()).unwrap(), 3 * HUGE, 0, HUGE) }.unwrap();
    let model = Model::of((0..100).chain([600, 1300]));
    let pager = Pager::start(&[range], Box::new(model), &Prefetch::default(), false, never()).unwrap();
    assert_eq!((area.page(99), area.page(511)), (page(99), vec![0; PAGE as usize]));
    assert_eq!(pager.served().faults, 1);
    area.advise(512, 512, libc::MADV_DONTNEED);
    assert_eq!(area.page(600), vec![0; PAGE as usize]);
    assert!(pager.complete(LONG));
    assert_eq!(area.page(1300), page(1300));
}
