//! Requests no honest driver makes, and hosts that fail.

use std::time::Duration;

use super::*;
use crate::{limits::BLOCK_RANGES_MAX, virtio::driver::Desc};

/// Sends everything of a list of malformed requests and compares the statuses.
fn malformed(guest: &mut Guest, name: &str) {
    let sectors = guest.block.sectors();
    for (what, kind, sector, len, status) in [
        ("past the end", IN, sectors, 512, IOERR),
        ("across the end", IN, sectors - 1, 1024, IOERR),
        ("far past the end", OUT, u64::MAX, 512, IOERR),
        ("wrapping", OUT, u64::MAX - 1, 1024, IOERR),
        ("wrapping in bytes", OUT, u64::MAX / 512 + 1, 512, IOERR),
        ("odd read", IN, 0, 511, IOERR),
        ("odd write", OUT, 0, 513, IOERR),
        ("unknown type", 77, 0, 512, UNSUPP),
        ("unknown type of all ones", u32::MAX, u64::MAX, 512, UNSUPP),
        ("short id", GET_ID, 0, 19, IOERR),
        ("empty discard", DISCARD, 0, 0, IOERR),
        ("half a range", ZEROES, 0, 8, IOERR),
        ("too many ranges", DISCARD, 0, 16 * (BLOCK_RANGES_MAX + 1), IOERR),
        ("too many zeroes", ZEROES, 0, 32, IOERR),
    ] {
        guest.driver.poke(guest.data, &[0; 2048]);
        let data = match (kind, len) {
            (_, 0) => None,
            (IN | GET_ID, _) => Some(Buffer::writable(guest.data, len)),
            _ => Some(Buffer::readable(guest.data, len)),
        };
        assert_eq!(guest.request(kind, sector, data), (status, 1), "{name}: {what}");
    }
    for (what, kind, range, status) in [
        ("past the end", DISCARD, (sectors, 1, 0), IOERR),
        ("across the end", ZEROES, (sectors - 1, 2, 0), IOERR),
        ("wrapping", ZEROES, (u64::MAX, 1, 0), IOERR),
        ("2^32 - 1 sectors", DISCARD, (0, u32::MAX, 0), IOERR),
        ("unmap", DISCARD, (0, 1, 1), UNSUPP),
        ("unknown flag", ZEROES, (0, 1, 2), UNSUPP),
        ("unknown flags", ZEROES, (0, 1, u32::MAX), UNSUPP),
    ] {
        assert_eq!(guest.ranges(kind, &[range]), (status, 1), "{name}: {what}");
    }
    // One bad range of several: none is carried out.
    assert_eq!(guest.ranges(DISCARD, &[(0, 8, 0), (sectors, 8, 0)]), (IOERR, 1), "{name}");
}

/// Chains of the wrong shape.
fn misshapen(guest: &mut Guest, name: &str) {
    let (header, data, status) = (guest.header, guest.data, guest.status);
    let good = Buffer::readable(header, 16);
    let end = Buffer::writable(status, 1);
    guest.put_header(OUT, 0);
    for (what, chain, answer) in [
        ("no status", vec![good, Buffer::readable(data, 512)], (0xee, 0)),
        ("read-only status", vec![good, Buffer::readable(data, 512), Buffer::readable(status, 1)], (0xee, 0)),
        ("short header", vec![Buffer::readable(header, 15), end], (IOERR, 1)),
        ("no header", vec![end], (IOERR, 1)),
        ("a write with room", vec![good, Buffer::writable(data, 512), end], (IOERR, 1)),
    ] {
        assert_eq!(guest.chain(&chain), answer, "{name}: {what}");
    }
    guest.put_header(IN, 0);
    let chain = [good, Buffer::readable(data, 512), end];
    assert_eq!(guest.chain(&chain), (IOERR, 1), "{name}: a read with data");
    assert_eq!(guest.chain(&[good, end]), (OK, 1), "{name}: nothing to read");
}

#[test]
fn malformed_requests_fail_and_leave_the_disk_alone() {
    for (name, make) in engines() {
        let image = image(64);
        let before = fs::read(image.path()).unwrap();
        let mut guest = Guest::new(make(settings(image.path(), Engine::Sync)));
        malformed(&mut guest, name);
        misshapen(&mut guest, name);
        assert_eq!(guest.read(0, 512).0, OK, "{name}: it goes on");
        guest.driver.stop(&mut guest.block).unwrap();
        assert!(fs::read(image.path()).unwrap() == before, "{name}");
        assert_eq!(guest.driver.signals.counts().needs_reset, 0, "{name}");
    }
}

#[test]
fn a_broken_ring_asks_for_a_reset_once_and_the_device_starts_again() {
    for (name, make) in engines() {
        let image = image(64);
        let mut guest = Guest::new(make(settings(image.path(), Engine::Sync)));
        let far = Desc { address: 1 << 40, len: 512, flags: 0, next: 0 };
        guest.driver.rings[0].write_desc(0, far);
        guest.driver.rings[0].offer(0);
        guest.driver.kick(0);
        assert!(guest.driver.signals.wait(|c| c.needs_reset == 1), "{name}");
        guest.driver.kick(0);
        guest.driver.stop(&mut guest.block).unwrap();
        assert_eq!(guest.driver.signals.counts().needs_reset, 1, "{name}");
        assert_eq!(counter(&guest.block, "queue_errors"), 1, "{name}");
        guest.block.reset();
        guest.driver.rings[0].clear();
        let features = guest.block.about().features;
        guest.driver.start(&mut guest.block, features).unwrap();
        assert_eq!(guest.read(0, 512).0, OK, "{name}");
    }
}

#[test]
fn nonsense_in_rings_and_headers_never_ends_the_device() {
    let image = image(64);
    let before = fs::read(image.path()).unwrap();
    for (name, make) in engines() {
        let settings = BlockConfig { read_only: true, ..settings(image.path(), Engine::Sync) };
        let mut guest = Guest::new(make(settings));
        let mut dice = Dice(0x1234_5678_9abc_def1);
        for _ in 0..200 {
            for index in 0..64 {
                let next = dice.below(66) as u16;
                let address = if dice.chance(90) { dice.below(1 << 20) } else { dice.roll() };
                let len = if dice.chance(90) { dice.below(5000) as u32 } else { dice.roll() as u32 };
                let desc = Desc { address, len, flags: dice.below(8) as u16, next };
                guest.driver.rings[0].write_desc(index, desc);
            }
            guest.put_header(dice.below(16) as u32, dice.below(80));
            for _ in 0..dice.below(8) {
                guest.driver.rings[0].offer(dice.below(66) as u16);
            }
            let resets = guest.driver.signals.counts().needs_reset;
            guest.driver.kick(0);
            guest.driver.signals.wait_for(Duration::from_millis(2), |c| c.needs_reset > resets);
            guest.driver.stop(&mut guest.block).unwrap();
            guest.block.reset();
            guest.driver.rings[0].clear();
            let features = guest.block.about().features;
            guest.driver.start(&mut guest.block, features).unwrap();
        }
        assert_eq!(guest.read(0, 512).0, OK, "{name}");
        assert!(counter(&guest.block, "queue_errors") > 0, "{name}: no ring was broken");
        assert!(counter(&guest.block, "errors") > 0, "{name}: no request was refused");
        guest.driver.stop(&mut guest.block).unwrap();
        assert!(fs::read(image.path()).unwrap() == before, "{name}");
    }
}

#[test]
fn a_failing_host_fails_requests_and_nothing_else() {
    let open = |path: &str| fs::File::options().read(true).write(true).open(path).unwrap();
    for engine in [Engine::Sync, Engine::Async] {
        // Writes find no space, and flushes do not work.
        let settings = settings(Path::new("full"), engine);
        let mut guest = Guest::new(pretended(open("/dev/full"), settings.clone()));
        assert_eq!(guest.write(0, &[1; 512]), (IOERR, 1), "{engine:?}");
        assert_eq!(guest.read(0, 512), (OK, 513, vec![0; 512]), "{engine:?}");
        assert_eq!(guest.request(FLUSH, 0, None), (IOERR, 1), "{engine:?}");
        assert_eq!(guest.request(FLUSH, 0, None), (IOERR, 1), "{engine:?}");
        assert_eq!(guest.read(0, 512).0, OK, "{engine:?}");
        guest.driver.stop(&mut guest.block).unwrap();
        assert_eq!(counter(&guest.block, "errors"), 3, "{engine:?}");
        // Nothing is mapped at address 0 of this process: EIO.
        let mut guest = Guest::new(pretended(open("/proc/self/mem"), settings));
        assert_eq!(guest.read(0, 512).0, IOERR, "{engine:?}");
        assert_eq!(guest.write(0, &[1; 512]).0, IOERR, "{engine:?}");
    }
}

#[test]
fn a_file_cut_short_fails_reads_behind_its_end() {
    for (name, make) in engines() {
        let image = image(64);
        let mut guest = Guest::new(make(settings(image.path(), Engine::Sync)));
        image.as_file().set_len(700).unwrap();
        assert_eq!(guest.read(0, 512).0, OK, "{name}");
        assert_eq!(guest.read(1, 512).0, IOERR, "{name}: half a sector is there");
        assert_eq!(guest.read(0, 4096).0, IOERR, "{name}");
        assert_eq!(guest.read(8, 4096).0, IOERR, "{name}");
        image.as_file().set_len(64 * 512).unwrap();
        assert_eq!(guest.read(8, 4096).0, OK, "{name}: it is back");
    }
}

#[test]
fn a_lost_flush_stays_lost_until_the_driver_starts_over() {
    for (name, make) in engines() {
        let image = image(64);
        let mut guest = Guest::new(make(settings(image.path(), Engine::Sync)));
        guest.block.disk.set_flush_failed();
        assert_eq!(guest.request(FLUSH, 0, None), (IOERR, 1), "{name}");
        assert_eq!(guest.write(0, &[3; 512]), (OK, 1), "{name}");
        assert_eq!(guest.request(FLUSH, 0, None), (IOERR, 1), "{name}");
        guest.driver.stop(&mut guest.block).unwrap();
        let features = guest.block.about().features;
        guest.driver.start(&mut guest.block, features).unwrap();
        assert_eq!(guest.request(FLUSH, 0, None), (IOERR, 1), "{name}: a pause heals nothing");
        guest.driver.stop(&mut guest.block).unwrap();
        guest.block.reset();
        guest.driver.rings[0].clear();
        guest.driver.start(&mut guest.block, features).unwrap();
        assert_eq!(guest.request(FLUSH, 0, None), (OK, 1), "{name}");
    }
}
