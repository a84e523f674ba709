//! The device under a driver in software.

mod hostile;
mod hosts;
mod life;
mod limits;
mod model;
mod parsing;

use std::{fs, io::Write, path::Path};

use super::{
    Block, BlockConfig, Cache, Engine, config,
    request::{IOERR, OK, UNSUPP},
};
use crate::{
    disk::{Disk, DiskOptions},
    virtio::{
        F_COMMON, VirtioDevice,
        driver::{Buffer, Driver, memory},
    },
};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;

/// A small generator of numbers that look random and repeat from run to run (xorshift64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, limit: u64) -> u64 {
        self.roll() % limit
    }
    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

fn image(sectors: usize) -> tempfile::NamedTempFile {
    let mut image = tempfile::NamedTempFile::new().unwrap();
    let content: Vec<u8> = (0..sectors * 512).map(|i| (i / 512 * 13 + i * 7) as u8).collect();
    image.write_all(&content).unwrap();
    image
}

/// A writable disk with flush and discard.
fn settings(path: &Path, engine: Engine) -> BlockConfig {
    BlockConfig {
        engine,
        cache: Cache::Writeback,
        discard: true,
        queue_size: 64,
        ..BlockConfig::new("disk-under-test", path)
    }
}

/// A device over the file, which goes through a ring even where the file is in memory.
fn slow(settings: BlockConfig) -> Block {
    let mut disk = Disk::open(&settings.path, settings.options()).unwrap();
    disk.pretend_slow();
    Block::over(disk, settings).unwrap()
}

/// A device over any descriptor.
fn pretended(file: fs::File, settings: BlockConfig) -> Block {
    let options = DiskOptions { read_only: settings.read_only, direct: false };
    Block::over(Disk::pretend(file, 1024, options), settings).unwrap()
}

fn counter(block: &Block, name: &str) -> u64 {
    block.counters().into_iter().find(|(n, _)| *n == name).unwrap().1
}

struct Guest {
    driver: Driver,
    block: Block,
    header: u64,
    data: u64,
    status: u64,
}

/// Bytes of the data area of a [`Guest`].
const AREA: u32 = 1 << 20;

impl Guest {
    fn new(block: Block) -> Guest {
        let features = block.about().features;
        Guest::with(block, features)
    }

    fn with(mut block: Block, features: u64) -> Guest {
        let ram = memory(&[(0, 8 << 20), (16 << 20, 1 << 20)]);
        let mut driver = Driver::new(ram, &block.about().queues);
        let header = driver.alloc(16, 16);
        let data = driver.alloc(u64::from(AREA), 4096);
        let status = driver.alloc(1, 1);
        driver.start(&mut block, features).unwrap();
        Guest { driver, block, header, data, status }
    }

    fn put_header(&self, kind: u32, sector: u64) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.driver.poke(self.header, &header);
    }

    /// Sends a chain and returns its status and length; 0xee where no status was written.
    fn chain(&mut self, buffers: &[Buffer]) -> (u8, u32) {
        self.driver.poke(self.status, &[0xee]);
        let len = self.driver.request(0, buffers).expect("an answer");
        (self.driver.peek(self.status, 1)[0], len)
    }

    fn request(&mut self, kind: u32, sector: u64, data: Option<Buffer>) -> (u8, u32) {
        self.put_header(kind, sector);
        let (head, tail) = (Buffer::readable(self.header, 16), Buffer::writable(self.status, 1));
        match data {
            Some(data) => self.chain(&[head, data, tail]),
            None => self.chain(&[head, tail]),
        }
    }

    fn read(&mut self, sector: u64, len: u32) -> (u8, u32, Vec<u8>) {
        self.driver.poke(self.data, &vec![0xdd; len as usize]);
        let (status, used) = self.request(IN, sector, Some(Buffer::writable(self.data, len)));
        (status, used, self.driver.peek(self.data, len as usize))
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> (u8, u32) {
        self.driver.poke(self.data, data);
        self.request(OUT, sector, Some(Buffer::readable(self.data, data.len() as u32)))
    }

    /// A discard or write-zeroes of `(sector, sectors, flags)`.
    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> (u8, u32) {
        let bytes: Vec<u8> = ranges
            .iter()
            .flat_map(|(sector, sectors, flags)| {
                let low = u64::from(*sectors) | u64::from(*flags) << 32;
                [sector.to_le_bytes(), low.to_le_bytes()].concat()
            })
            .collect();
        self.driver.poke(self.data, &bytes);
        self.request(kind, 0, Some(Buffer::readable(self.data, bytes.len() as u32)))
    }
}

type Make = fn(BlockConfig) -> Block;

/// The three roads a request can take: plain calls, whatever suits the file, always a ring.
fn engines() -> [(&'static str, Make); 3] {
    [
        ("sync", |s| Block::new(BlockConfig { engine: Engine::Sync, ..s }).unwrap()),
        ("async", |s| Block::new(BlockConfig { engine: Engine::Async, ..s }).unwrap()),
        ("ring", |s| slow(BlockConfig { engine: Engine::Async, ..s })),
    ]
}

#[test]
fn a_guest_reads_writes_flushes_and_asks_the_id() {
    for (name, make) in engines() {
        let image = image(64);
        let before = fs::read(image.path()).unwrap();
        let mut guest = Guest::new(make(settings(image.path(), Engine::Sync)));
        let (status, used, data) = guest.read(3, 1536);
        assert_eq!((status, used), (OK, 1537), "{name}");
        assert_eq!(data, before[3 * 512..6 * 512], "{name}");
        let fresh = vec![0x5a; 1024];
        assert_eq!(guest.write(62, &fresh), (OK, 1), "{name}");
        assert_eq!(guest.read(62, 1024).2, fresh, "{name}");
        assert_eq!(guest.request(FLUSH, 0, None), (OK, 1), "{name}");
        let room = Buffer::writable(guest.data, 20);
        assert_eq!(guest.request(GET_ID, 0, Some(room)), (OK, 21), "{name}");
        assert_eq!(guest.driver.peek(guest.data, 20), b"disk-under-test\0\0\0\0\0", "{name}");
        guest.driver.stop(&mut guest.block).unwrap();
        let after = fs::read(image.path()).unwrap();
        assert!(after[..62 * 512] == before[..62 * 512] && after[62 * 512..] == fresh, "{name}");
        let counts = ["reads", "read_bytes", "writes", "write_bytes", "flushes", "errors"];
        let counts = counts.map(|c| counter(&guest.block, c));
        assert_eq!(counts, [2, 2560, 1, 1024, 1, 0], "{name}");
    }
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    for (name, make) in engines() {
        let image = image(4096);
        let before = fs::read(image.path()).unwrap();
        let mut guest = Guest::new(make(settings(image.path(), Engine::Sync)));
        assert_eq!(guest.ranges(ZEROES, &[(10, 100, 0)]), (OK, 1), "{name}");
        assert_eq!(guest.ranges(ZEROES, &[(200, 50, 1)]), (OK, 1), "{name}");
        assert_eq!(guest.ranges(DISCARD, &[(1024, 1024, 0), (3000, 0, 0), (3072, 8, 0)]), (OK, 1), "{name}");
        guest.driver.stop(&mut guest.block).unwrap();
        let mut expected = before;
        expected[10 * 512..110 * 512].fill(0);
        expected[200 * 512..250 * 512].fill(0);
        let mut after = fs::read(image.path()).unwrap();
        for (at, sectors) in [(1024, 1024), (3072, 8)] {
            after[at * 512..(at + sectors) * 512].fill(0);
            expected[at * 512..(at + sectors) * 512].fill(0);
        }
        assert!(after == expected, "{name}");
        assert_eq!(counter(&guest.block, "discards"), 3, "{name}");
    }
}

#[test]
fn what_was_not_negotiated_is_unsupported_and_writes_are_then_durable_by_themselves() {
    for (name, make) in engines() {
        let image = image(64);
        let mut guest = Guest::with(make(settings(image.path(), Engine::Sync)), F_COMMON);
        assert_eq!(guest.request(FLUSH, 0, None), (UNSUPP, 1), "{name}");
        assert_eq!(guest.ranges(DISCARD, &[(0, 1, 0)]), (UNSUPP, 1), "{name}");
        assert_eq!(guest.ranges(ZEROES, &[(0, 1, 0)]), (UNSUPP, 1), "{name}");
        assert_eq!(guest.write(5, &[7; 512]), (OK, 1), "{name}");
        guest.driver.stop(&mut guest.block).unwrap();
        assert_eq!(counter(&guest.block, "unsupported"), 3, "{name}");
        // With zeroes but no flush, zeroing is made durable too.
        let mut guest = Guest::with(guest.block, F_COMMON | config::F_WRITE_ZEROES);
        assert_eq!(guest.ranges(ZEROES, &[(5, 1, 0)]), (OK, 1), "{name}");
        assert_eq!(guest.read(5, 512).2, [0; 512], "{name}");
    }
}

#[test]
fn a_read_only_disk_is_never_written() {
    for (name, make) in engines() {
        let image = image(64);
        let before = fs::read(image.path()).unwrap();
        let settings = BlockConfig { read_only: true, ..settings(image.path(), Engine::Sync) };
        let block = make(settings);
        let everything = block.about().features | config::F_DISCARD | config::F_WRITE_ZEROES;
        assert_ne!(block.about().features & config::F_RO, 0);
        let mut guest = Guest::with(block, everything);
        assert_eq!(guest.write(0, &[1; 512]), (IOERR, 1), "{name}");
        assert_eq!(guest.ranges(DISCARD, &[(0, 8, 0)]), (IOERR, 1), "{name}");
        assert_eq!(guest.ranges(ZEROES, &[(0, 8, 0)]), (IOERR, 1), "{name}");
        assert_eq!(guest.read(0, 512).0, OK, "{name}");
        guest.driver.stop(&mut guest.block).unwrap();
        assert!(fs::read(image.path()).unwrap() == before, "{name}");
    }
}

#[test]
fn several_queues_serve_one_disk() {
    for (name, make) in engines() {
        let image = image(1024);
        let settings = BlockConfig { queues: 4, ..settings(image.path(), Engine::Sync) };
        let mut guest = Guest::new(make(settings));
        assert_ne!(guest.block.about().features & config::F_MQ, 0);
        for round in 0..16u64 {
            for queue in 0..4u16 {
                let sector = round * 4 + u64::from(queue);
                guest.put_header(OUT, sector);
                guest.driver.poke(guest.data, &[sector as u8; 512]);
                let chain = [
                    Buffer::readable(guest.header, 16),
                    Buffer::readable(guest.data, 512),
                    Buffer::writable(guest.status, 1),
                ];
                assert_eq!(guest.driver.request(queue, &chain), Some(1), "{name}");
            }
        }
        assert_eq!(guest.driver.stop(&mut guest.block).unwrap().len(), 4);
        let after = fs::read(image.path()).unwrap();
        assert!((0..64).all(|n| after[n * 512..][..512] == [n as u8; 512]), "{name}");
    }
}

#[test]
fn impossible_settings_are_refused_with_their_numbers() {
    let image = image(8);
    for queues in [0, 65] {
        let wrong = BlockConfig { queues, ..settings(image.path(), Engine::Sync) };
        let text = Block::new(wrong).err().unwrap().to_string();
        assert!(text.contains(&format!("{queues} queues")), "{text}");
    }
    for queue_size in [0, 2, 100, 2048] {
        let wrong = BlockConfig { queue_size, ..settings(image.path(), Engine::Sync) };
        let text = Block::new(wrong).err().unwrap().to_string();
        assert!(text.contains(&format!("queues of {queue_size}")), "{text}");
    }
    let missing = settings(Path::new("/nowhere/disk"), Engine::Sync);
    assert!(Block::new(missing).err().unwrap().to_string().contains("does not exist"));
}
