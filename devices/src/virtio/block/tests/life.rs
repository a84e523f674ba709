//! Start, stop, save, restore, change; with requests in flight.

use std::{
    fs::File,
    io::Read,
    os::fd::FromRawFd,
    thread,
    time::{Duration, Instant},
};

use super::*;
use crate::{
    state::{Section, StateError},
    virtio::{Change, DeviceError},
};

/// Two ends of a pipe: a disk over the first one answers reads when the test writes to the
/// second.
fn pipe() -> (File, File) {
    let mut ends = [0; 2];
    // SAFETY: the array has room for both descriptors, which are ours alone.
    unsafe {
        assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC), 0);
        (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1]))
    }
}

/// A guest with `count` reads of a sector in flight on a disk that does not answer.
fn stalled(count: u64) -> (Guest, File, Vec<u16>) {
    let (from, to) = pipe();
    let settings = settings(Path::new("stalled"), Engine::Async);
    let mut guest = Guest::new(pretended(from, settings));
    guest.put_header(IN, 0);
    let heads = (0..count)
        .map(|n| {
            let data = Buffer::writable(guest.data + n * 512, 512);
            let status = Buffer::writable(guest.data + 65536 + n, 1);
            guest.driver.send(0, &[Buffer::readable(guest.header, 16), data, status])
        })
        .collect();
    // The device asks to be told about the next one only when it has taken all of these.
    let setup = guest.driver.rings[0].setup();
    let wish = setup.used + 4 + 8 * u64::from(setup.size);
    let end = Instant::now() + Duration::from_secs(10);
    while guest.driver.peek(wish, 2) != (count as u16).to_le_bytes() {
        assert!(Instant::now() < end, "the requests were not taken");
        thread::sleep(Duration::from_millis(1));
    }
    (guest, to, heads)
}

fn rings() -> bool {
    let available = crate::disk::available();
    if !available {
        eprintln!("no io_uring here");
    }
    available
}

#[test]
fn stop_waits_for_what_the_host_works_on() {
    if !rings() {
        return;
    }
    let (mut guest, mut to, heads) = stalled(8);
    let answer = thread::spawn(move || {
        thread::sleep(Duration::from_millis(300));
        to.write_all(&[0xa5; 8 * 512]).unwrap();
        to
    });
    let begun = Instant::now();
    let queues = guest.driver.stop(&mut guest.block).unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(250), "it was not waited for");
    assert_eq!((queues[0].1.next_avail, queues[0].1.next_used), (8, 8));
    let mut done: Vec<u16> =
        std::iter::from_fn(|| guest.driver.rings[0].take_used()).map(|used| used.head as u16).collect();
    done.sort_unstable();
    let mut sent = heads;
    sent.sort_unstable();
    assert_eq!(done, sent, "each request is answered once");
    assert_eq!(guest.driver.peek(guest.data, 8 * 512), [0xa5; 8 * 512]);
    assert_eq!(guest.driver.peek(guest.data + 65536, 8), [OK; 8]);
    drop(answer.join());
}

#[test]
fn a_disk_that_never_answers_fails_stop_in_time_and_keeps_the_buffers() {
    if !rings() {
        return;
    }
    let (mut guest, mut to, _) = stalled(4);
    let begun = Instant::now();
    let error = guest.driver.stop(&mut guest.block).unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
    assert!(error.to_string().contains("did not finish"), "{error}");
    let features = guest.block.about().features;
    assert!(guest.driver.start(&mut guest.block, features).is_err(), "its old requests still live");
    // Everything of the guest goes; what the kernel writes late must still find its place.
    drop(guest);
    to.write_all(&[1; 2048]).unwrap();
    thread::sleep(Duration::from_millis(50));
}

#[test]
fn a_device_dropped_while_it_runs_finishes_first() {
    if !rings() {
        return;
    }
    let (mut guest, mut to, _) = stalled(4);
    let Guest { block, .. } = &mut guest;
    let image = image(8);
    let other = Block::new(settings(image.path(), Engine::Sync)).unwrap();
    let answer = thread::spawn(move || {
        thread::sleep(Duration::from_millis(200));
        to.write_all(&[3; 2048]).unwrap();
    });
    drop(std::mem::replace(block, other));
    assert_eq!(guest.driver.peek(guest.data, 2048), [3; 2048]);
    answer.join().unwrap();
}

#[test]
fn a_descriptor_offered_twice_at_once_breaks_the_ring() {
    if !rings() {
        return;
    }
    let (mut guest, mut to, heads) = stalled(1);
    guest.driver.rings[0].offer(heads[0]);
    guest.driver.kick(0);
    assert!(guest.driver.signals.wait(|c| c.needs_reset == 1));
    to.write_all(&[1; 512]).unwrap();
    guest.driver.stop(&mut guest.block).unwrap();
    assert_eq!(guest.driver.rings[0].device_used_idx(), 0, "a broken ring is left alone");
}

#[test]
fn a_stalled_disk_delays_no_neighbour_on_the_worker() {
    if !rings() {
        return;
    }
    let (mut slow, mut to, _) = stalled(4);
    let image = image(64);
    let mut block = super::slow(settings(image.path(), Engine::Async));
    let mut quick = Driver::new(memory(&[(0, 1 << 20)]), &block.about().queues);
    quick.worker = slow.driver.worker.clone();
    let features = block.about().features;
    quick.start(&mut block, features).unwrap();
    let chain = [quick.readable(&[0; 16]), quick.writable(512), quick.writable(1)];
    let begun = Instant::now();
    assert_eq!(quick.request(0, &chain), Some(513));
    assert!(begun.elapsed() < Duration::from_secs(1));
    to.write_all(&[0; 2048]).unwrap();
    quick.stop(&mut block).unwrap();
    slow.driver.stop(&mut slow.block).unwrap();
}

#[test]
fn a_device_goes_on_where_it_was_saved() {
    for (name, make) in engines() {
        let image = image(64);
        let mut guest = Guest::new(make(settings(image.path(), Engine::Sync)));
        assert_eq!(guest.write(7, &[7; 512]).0, OK, "{name}");
        guest.block.disk.set_flush_failed();
        guest.driver.stop(&mut guest.block).unwrap();
        // Sent while nobody serves: found after the restore.
        guest.put_header(IN, 7);
        let chain = [
            Buffer::readable(guest.header, 16),
            Buffer::writable(guest.data, 512),
            Buffer::writable(guest.status, 1),
        ];
        guest.driver.rings[0].add(&chain);
        let section = guest.block.save();
        let Guest { mut driver, block, header, data, status } = guest;
        drop(block);
        let mut block = make(settings(image.path(), Engine::Sync));
        block.restore(&section).unwrap();
        let features = block.about().features;
        driver.start(&mut block, features).unwrap();
        assert_eq!(driver.wait_used(0).unwrap().len, 513, "{name}");
        assert_eq!(driver.peek(data, 512), [7; 512], "{name}");
        let mut guest = Guest { driver, block, header, data, status };
        assert_eq!(guest.request(FLUSH, 0, None).0, IOERR, "{name}: the loss came along");
        assert_eq!(guest.driver.signals.counts().config, 0, "{name}");
    }
}

#[test]
fn saved_state_that_does_not_fit_is_refused() {
    let big = image(64);
    let saved = |change: fn(&mut BlockConfig)| {
        let mut settings = settings(big.path(), Engine::Sync);
        change(&mut settings);
        Block::new(settings).unwrap().save()
    };
    let plain = saved(|_| {});
    let queues = saved(|s| s.queues = 2);
    let read_only = saved(|s| s.read_only = true);
    let mut garbage = plain.clone();
    garbage.bytes.push(0);
    let small = image(32);
    for (section, path, text) in [
        (&plain, small.path(), "had 64 sectors"),
        (&queues, big.path(), "had 2 queues"),
        (&read_only, big.path(), "was read-only"),
        (&garbage, big.path(), "1 bytes follow"),
        (&Section::new("virtio-net", 1, &0u8), big.path(), "virtio-net"),
    ] {
        let mut block = Block::new(settings(path, Engine::Sync)).unwrap();
        let error = block.restore(section).unwrap_err();
        assert!(matches!(error, DeviceError::State(_)) && error.to_string().contains(text), "{error}");
    }
    let mut newer = plain;
    newer.version += 1;
    let error = Block::new(settings(big.path(), Engine::Sync)).unwrap().restore(&newer).unwrap_err();
    assert!(matches!(error, DeviceError::State(StateError::Version { .. })));
}

#[test]
fn a_disk_that_grew_while_saved_is_announced() {
    let image = image(64);
    let section = Block::new(settings(image.path(), Engine::Sync)).unwrap().save();
    image.as_file().set_len(128 * 512).unwrap();
    let mut block = Block::new(settings(image.path(), Engine::Sync)).unwrap();
    block.restore(&section).unwrap();
    let guest = Guest::new(block);
    assert_eq!(guest.driver.signals.counts().config, 1);
}

#[test]
fn a_disk_that_changed_before_a_save_is_announced_after_it() {
    let image = image(64);
    let mut block = Block::new(settings(image.path(), Engine::Sync)).unwrap();
    image.as_file().set_len(128 * 512).unwrap();
    block.update(&Change::Backing(None)).unwrap();
    let section = block.save();
    drop(block);
    let mut block = Block::new(settings(image.path(), Engine::Sync)).unwrap();
    block.restore(&section).unwrap();
    assert_eq!(Guest::new(block).driver.signals.counts().config, 1);
}

fn capacity(block: &Block) -> u64 {
    let mut bytes = [0; 8];
    block.read_config(0, &mut bytes);
    u64::from_le_bytes(bytes)
}

#[test]
fn a_running_disk_is_resized_and_replaced() {
    for (name, make) in engines() {
        let first = image(64);
        let mut guest = Guest::new(make(settings(first.path(), Engine::Sync)));
        assert_eq!(guest.read(64, 512).0, IOERR, "{name}");
        first.as_file().set_len(128 * 512).unwrap();
        guest.block.update(&Change::Backing(None)).unwrap();
        assert_eq!(capacity(&guest.block), 128, "{name}");
        assert_eq!(guest.driver.signals.counts().config, 1, "{name}");
        assert_eq!(guest.read(64, 512), (OK, 513, vec![0; 512]), "{name}");
        let second = image(16);
        fs::write(second.path(), [9; 16 * 512]).unwrap();
        guest.block.update(&Change::Backing(Some(second.path().to_owned()))).unwrap();
        assert_eq!((capacity(&guest.block), guest.driver.signals.counts().config), (16, 2), "{name}");
        assert_eq!(guest.read(15, 512), (OK, 513, vec![9; 512]), "{name}");
        assert_eq!(guest.write(0, &[8; 512]), (OK, 1), "{name}");
        // The first file is free again, and a bad one changes nothing.
        Block::new(settings(first.path(), Engine::Sync)).unwrap();
        let bad = Change::Backing(Some("/nowhere/disk".into()));
        assert!(guest.block.update(&bad).is_err(), "{name}");
        assert_eq!(guest.read(0, 512), (OK, 513, vec![8; 512]), "{name}");
        guest.driver.stop(&mut guest.block).unwrap();
        assert_eq!(fs::read(second.path()).unwrap()[..512], [8; 512], "{name}");
    }
}

#[test]
fn a_file_handed_in_is_served_and_stays_locked() {
    let image = image(64);
    let file = File::options().read(true).write(true).open(image.path()).unwrap();
    let block = Block::with_file(settings(Path::new("handed in"), Engine::Sync), file).unwrap();
    let refused = Block::new(settings(image.path(), Engine::Sync)).err().unwrap();
    assert!(refused.to_string().contains("in use"), "{refused}");
    let mut guest = Guest::new(block);
    assert_eq!(guest.write(1, &[4; 512]).0, OK);
    guest.driver.stop(&mut guest.block).unwrap();
    let mut content = Vec::new();
    File::open(image.path()).unwrap().read_to_end(&mut content).unwrap();
    assert_eq!(content[512..1024], [4; 512]);
}
