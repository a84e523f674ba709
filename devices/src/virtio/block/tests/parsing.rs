//! The parser alone, over random chains, against a second opinion.

use super::*;
use crate::{
    disk::{Buffers, Extent},
    limits::{BLOCK_DISCARD_SECTORS_MAX, BLOCK_REQUEST_MAX, BLOCK_ZEROES_SECTORS_MAX},
    virtio::{
        F_INDIRECT_DESC,
        block::request::{Refusal, Request, Terms, parse},
        queue::{Chain, Queue},
    },
};

const ROOM: u64 = 1 << 20;

/// What the driver's bytes mean, worked out over flat copies of them.
fn opinion(terms: &Terms, sent: &[u8], room: u64) -> Result<Request, Refusal> {
    let Some(room) = room.checked_sub(1) else { return Err(Refusal::NoStatus) };
    let Some((header, data)) = sent.split_at_checked(16) else { return Err(Refusal::Failed) };
    let kind = u32::from_le_bytes(header[..4].try_into().unwrap());
    let sector = u64::from_le_bytes(header[8..].try_into().unwrap());
    let inside = |len: u64| {
        len.is_multiple_of(512)
            && len <= BLOCK_REQUEST_MAX
            && u128::from(sector) + u128::from(len / 512) <= u128::from(terms.sectors)
    };
    let ranges = |count: usize, most: u32, known: u32| {
        if data.is_empty() || !data.len().is_multiple_of(16) || data.len() / 16 > count {
            return Err(Refusal::Failed);
        }
        for range in data.chunks(16) {
            let first = u128::from(u64::from_le_bytes(range[..8].try_into().unwrap()));
            let count = u32::from_le_bytes(range[8..12].try_into().unwrap());
            let flags = u32::from_le_bytes(range[12..].try_into().unwrap());
            if flags & !known != 0 {
                return Err(Refusal::Unsupported);
            }
            if count > most || first + u128::from(count) > u128::from(terms.sectors) {
                return Err(Refusal::Failed);
            }
        }
        Ok(())
    };
    match kind {
        0 if data.is_empty() && inside(room) => Ok(Request::In(sector)),
        1 if room == 0 && !terms.read_only && inside(data.len() as u64) => Ok(Request::Out(sector)),
        0 | 1 => Err(Refusal::Failed),
        4 if terms.flush => Ok(Request::Flush),
        8 if room >= 20 => Ok(Request::GetId),
        8 => Err(Refusal::Failed),
        11 | 13 if terms.read_only => Err(Refusal::Failed),
        11 if terms.discard => ranges(16, BLOCK_DISCARD_SECTORS_MAX, 0).map(|()| Request::Discard),
        13 if terms.zeroes => ranges(1, BLOCK_ZEROES_SECTORS_MAX, 1).map(|()| Request::WriteZeroes),
        _ => Err(Refusal::Unsupported),
    }
}

/// Random lengths that add up to `len`.
fn cuts(dice: &mut Dice, len: u64) -> Vec<u64> {
    let (mut parts, mut left) = (Vec::new(), len);
    while left > 0 {
        let part = if parts.len() < 5 && dice.chance(60) { 1 + dice.below(left) } else { left };
        parts.push(part);
        left -= part;
    }
    parts
}

fn random_bytes(dice: &mut Dice) -> Vec<u8> {
    let kind =
        [0, 1, 4, 8, 11, 13, 13, 11, dice.below(20) as u32, dice.roll() as u32][dice.below(10) as usize];
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    let sector = match dice.below(4) {
        0 => dice.roll(),
        1 => u64::MAX - dice.below(4),
        _ => dice.below(300),
    };
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    if dice.chance(5) {
        return bytes[..dice.below(16) as usize].to_vec();
    }
    let mut bytes = bytes.to_vec();
    match kind {
        11 | 13 => {
            for _ in 0..dice.below(4) * dice.below(7) {
                let sector = if dice.chance(90) { dice.below(260) } else { dice.roll() };
                let count = if dice.chance(90) { dice.below(40) as u32 } else { dice.roll() as u32 };
                let flags = [0, 0, 0, 0, 1, 1, 2, dice.roll() as u32][dice.below(8) as usize];
                bytes.extend(sector.to_le_bytes());
                bytes.extend(count.to_le_bytes());
                bytes.extend(flags.to_le_bytes());
            }
            bytes.extend(vec![1; if dice.chance(5) { dice.below(16) as usize } else { 0 }]);
        }
        1 => bytes.extend(vec![7; (dice.below(20) * 512) as usize]),
        _ if dice.chance(10) => bytes.extend(vec![7; dice.below(20) as usize]),
        _ => {}
    }
    bytes
}

/// The runs of a chain or a list, as guest offsets from the first byte of memory.
fn flat(runs: &[libc::iovec], base: usize) -> Vec<usize> {
    runs.iter()
        .flat_map(|run| {
            let first = run.iov_base.addr() - base;
            first..first + run.iov_len
        })
        .collect()
}

#[test]
fn the_parser_agrees_with_a_second_opinion() {
    let mut dice = Dice(0x0dd0_dead_beef_1234);
    let mut driver = Driver::new(memory(&[(0, 4 << 20)]), &[64]);
    let area = driver.alloc(ROOM, 4096);
    let table = driver.alloc(64 * 16, 16);
    driver.rings[0].accept(F_INDIRECT_DESC);
    let mut queue = Queue::new(0, driver.rings[0].setup(), 64, F_INDIRECT_DESC, &driver.memory).unwrap();
    let (mut chain, mut buffers, mut extents) = (Chain::new(), Buffers::new(), Vec::<Extent>::new());
    let mut seen = [0; 4];
    for round in 0..20_000 {
        let bytes = random_bytes(&mut dice);
        let room = match dice.below(8) {
            0 => 0,
            1 => 1 + dice.below(2000),
            2 => 21,
            3 | 4 => 1 + 512 * dice.below(9),
            _ => 1,
        };
        let terms = Terms {
            sectors: dice.below(280),
            read_only: dice.chance(20),
            flush: dice.chance(70),
            discard: dice.chance(80),
            zeroes: dice.chance(80),
            unmap: dice.chance(50),
        };
        driver.poke(area, &bytes);
        let mut at = area;
        let mut list = Vec::new();
        for (len, writable) in [(bytes.len() as u64, false), (room, true)] {
            for part in cuts(&mut dice, len) {
                list.push(Buffer { address: at, len: part as u32, writable });
                at += part;
            }
        }
        if list.is_empty() {
            continue;
        }
        let ring = &mut driver.rings[0];
        if dice.chance(50) {
            ring.add_indirect(table, &list)
        } else {
            ring.add(&list)
        };
        assert!(queue.pop(&mut chain).unwrap());
        let found = parse(&chain, &terms, &mut buffers, &mut extents);
        let expected = opinion(&terms, &bytes, room);
        assert_eq!(found, expected, "round {round}: {terms:?} {room} {bytes:?}");
        check_places(&chain, &buffers, &found, room);
        seen[match found {
            Ok(Request::In(_) | Request::Out(_)) => 0,
            Ok(_) => 1,
            Err(Refusal::Failed) => 2,
            Err(_) => 3,
        }] += 1;
        assert!(extents.iter().all(|e| e.sector + u64::from(e.sectors) <= terms.sectors));
        assert!(terms.unmap || extents.iter().all(|e| !e.unmap));
        queue.push(chain.head(), 0);
        queue.publish();
        driver.rings[0].take_used().unwrap();
    }
    assert!(seen.iter().all(|n| *n > 300), "the dice miss a case: {seen:?}");
}

/// The data is exactly the chain's bytes between header and status.
fn check_places(chain: &Chain, buffers: &Buffers, found: &Result<Request, Refusal>, room: u64) {
    let runs = [chain.readable(), chain.writable()].concat();
    let base = runs.iter().map(|run| run.iov_base.addr()).min().unwrap();
    let place = flat(buffers.iovecs(), base);
    match found {
        Ok(Request::In(_)) => {
            assert_eq!(place, flat(chain.writable(), base)[..room as usize - 1]);
        }
        Ok(Request::Out(_)) => assert_eq!(place, flat(chain.readable(), base)[16..]),
        _ => {}
    }
}
