//! Thousands of random requests, cut into random descriptors, against a vector of bytes.

use super::*;
use crate::virtio::{F_EVENT_IDX, F_INDIRECT_DESC};

const SECTORS: u64 = 512;
const DEPTH: u64 = 12;
const DATA_MAX: u64 = 24 * 512;
/// Bytes of guest memory of one request: header, table, data, status.
const SLOT: u64 = 64 * 1024;

/// A request that was sent and not yet answered.
struct Sent {
    head: u16,
    slot: u64,
    kind: u32,
    sector: u64,
    sectors: u64,
    /// Where the status byte lies.
    status: u64,
    /// Where the data of a read lies, piece by piece.
    pieces: Vec<Buffer>,
    expected: Vec<u8>,
}

struct Model {
    driver: Driver,
    block: Block,
    area: u64,
    content: Vec<u8>,
    dice: Dice,
    indirect: bool,
    sent: Vec<Sent>,
    free: Vec<u64>,
}

/// Cuts `len` bytes at `address` into buffers of random lengths.
fn cut(dice: &mut Dice, address: u64, len: u64, writable: bool) -> Vec<Buffer> {
    let (mut buffers, mut at) = (Vec::new(), 0);
    while at < len {
        let most = if buffers.len() < 3 { len - at } else { 0 };
        let part = if most > 1 && dice.chance(50) { 1 + dice.below(most - 1) } else { len - at };
        buffers.push(Buffer { address: address + at, len: part as u32, writable });
        at += part;
    }
    buffers
}

impl Model {
    fn new(mut block: Block, content: Vec<u8>, features: u64, seed: u64) -> Model {
        let mut driver = Driver::new(memory(&[(0, 4 << 20)]), &block.about().queues);
        let area = driver.alloc(DEPTH * SLOT, 4096);
        driver.start(&mut block, features).unwrap();
        let indirect = features & F_INDIRECT_DESC != 0;
        let free = (0..DEPTH).collect();
        Model { driver, block, area, content, dice: Dice(seed), indirect, sent: Vec::new(), free }
    }

    /// One step: sends a request, or collects an answer.
    fn step(&mut self) {
        let full = self.free.is_empty() || self.driver.rings[0].free() < 16;
        if full || !self.sent.is_empty() && self.dice.chance(30) {
            return self.collect();
        }
        let sector = self.dice.below(SECTORS);
        let sectors = 1 + self.dice.below((SECTORS - sector).min(DATA_MAX / 512));
        let kind = match self.dice.below(100) {
            0..45 => IN,
            45..85 => OUT,
            85..90 => FLUSH,
            90..95 => ZEROES,
            95..98 => DISCARD,
            _ => GET_ID,
        };
        // Requests that overlap a write have no order: the earlier ones are waited for.
        let overlaps = |s: &Sent| {
            s.sector < sector + sectors && sector < s.sector + s.sectors && (kind != IN || s.kind != IN)
        };
        while self.sent.iter().any(overlaps) {
            self.collect();
        }
        self.send(kind, sector, sectors);
    }

    fn send(&mut self, kind: u32, sector: u64, sectors: u64) {
        let slot = self.free.pop().unwrap();
        let base = self.area + slot * SLOT;
        let (table, data) = (base + 64, base + 4096 + self.dice.below(64));
        let range = sector as usize * 512..(sector + sectors) as usize * 512;
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        let (mut sent_data, mut room, mut expected) = (Vec::new(), 0, Vec::new());
        match kind {
            IN => {
                header[8..].copy_from_slice(&sector.to_le_bytes());
                room = sectors * 512;
                expected = self.content[range].to_vec();
            }
            OUT => {
                header[8..].copy_from_slice(&sector.to_le_bytes());
                sent_data = (0..sectors * 512).map(|_| self.dice.roll() as u8).collect();
                self.content[range].copy_from_slice(&sent_data);
            }
            ZEROES | DISCARD => {
                let unmap = u64::from(kind == ZEROES) * self.dice.below(2);
                sent_data = [sector.to_le_bytes(), (sectors | unmap << 32).to_le_bytes()].concat();
                self.content[range].fill(0);
            }
            GET_ID => {
                room = 20;
                expected = b"disk-under-test\0\0\0\0\0".to_vec();
            }
            _ => {}
        }
        self.driver.poke(base, &header);
        self.driver.poke(data, &sent_data);
        let status = data + room.max(sent_data.len() as u64);
        self.driver.poke(status, &[0xee]);
        let mut chain = cut(&mut self.dice, base, 16, false);
        chain.extend(cut(&mut self.dice, data, sent_data.len() as u64, false));
        // The status follows the data and shares its last descriptor or not, as it falls.
        let written = if room > 0 { room + 1 } else { 0 };
        let pieces = cut(&mut self.dice, data, written, true);
        chain.extend(&pieces);
        if room == 0 {
            chain.push(Buffer::writable(status, 1));
        }
        let ring = &mut self.driver.rings[0];
        let head = if self.indirect && self.dice.chance(50) {
            ring.add_indirect(table, &chain)
        } else {
            ring.add(&chain)
        };
        if ring.wants_kick() {
            self.driver.kick(0);
        }
        self.sent.push(Sent { head, slot, kind, sector, sectors, status, pieces, expected });
    }

    fn collect(&mut self) {
        let used = self.driver.wait_used(0).expect("an answer");
        let at = self.sent.iter().position(|s| u32::from(s.head) == used.head).expect("a head in flight");
        let sent = self.sent.swap_remove(at);
        let what = format!("kind {} sector {}+{}", sent.kind, sent.sector, sent.sectors);
        assert_eq!(self.driver.peek(sent.status, 1), [OK], "{what}");
        assert_eq!(used.len as usize, sent.expected.len() + 1, "{what}");
        let first = sent.pieces.first().map_or(0, |p| p.address);
        assert!(self.driver.peek(first, sent.expected.len()) == sent.expected, "{what}");
        self.free.push(sent.slot);
    }
}

/// `steps` steps on a fresh disk, then the file against the model.
fn run(make: Make, features: u64, steps: usize, change: fn(&mut BlockConfig)) {
    let image = image(SECTORS as usize);
    let content = fs::read(image.path()).unwrap();
    let mut settings = settings(image.path(), Engine::Sync);
    change(&mut settings);
    let block = make(settings);
    let features = block.about().features & !(F_EVENT_IDX | F_INDIRECT_DESC) | features;
    let mut model = Model::new(block, content, features, 0x9e37_79b9_7f4a_7c15 ^ features);
    for step in 0..steps {
        model.step();
        // Now and then the machine is paused and goes on, with requests on their way.
        if step % 1000 == 999 {
            model.driver.stop(&mut model.block).unwrap();
            model.driver.start(&mut model.block, features).unwrap();
        }
    }
    while !model.sent.is_empty() {
        model.collect();
    }
    model.driver.stop(&mut model.block).unwrap();
    assert!(fs::read(image.path()).unwrap() == model.content);
    assert_eq!(counter(&model.block, "errors"), 0);
}

#[test]
fn random_requests_agree_with_a_vector_of_bytes() {
    for (_, make) in engines() {
        run(make, F_EVENT_IDX | F_INDIRECT_DESC, 10_000, |_| {});
        run(make, 0, 4_000, |_| {});
    }
}

#[test]
fn random_requests_agree_on_a_direct_disk() {
    for (_, make) in engines() {
        let probe = image(8);
        let direct = BlockConfig { direct: true, ..settings(probe.path(), Engine::Sync) };
        if let Err(e) = Block::new(direct) {
            return eprintln!("no direct I/O here: {e}");
        }
        run(make, F_EVENT_IDX | F_INDIRECT_DESC, 3_000, |s| s.direct = true);
    }
}
