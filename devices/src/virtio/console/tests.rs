//! The console driven by the software driver, over pipes and sockets.

use std::{
    io::{self, PipeReader, PipeWriter, Read, Write},
    os::fd::OwnedFd,
    time::Instant,
};

use super::*;
use crate::{
    limits::CONSOLE_BUFFER,
    virtio::driver::{Buffer, Desc, Driver, PATIENCE},
};

struct Rig {
    console: Console,
    driver: Driver,
}

fn rig(wire: Wire) -> Rig {
    let console = Console::with_wire(wire);
    let mut rig = Rig { driver: Driver::for_device(&console), console };
    rig.start();
    rig
}

impl Rig {
    fn start(&mut self) {
        self.driver.start(&mut self.console, F_COMMON | F_SIZE).unwrap();
    }
    fn counter(&self, name: &str) -> u64 {
        self.console.counters().into_iter().find(|(n, _)| *n == name).unwrap().1
    }
    fn wait_counter(&self, name: &str, value: u64) {
        let end = Instant::now() + PATIENCE;
        while self.counter(name) < value {
            assert!(Instant::now() < end, "{name} is {}, not {value}", self.counter(name));
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn output() -> (PipeReader, Wire) {
    let (reader, writer): (PipeReader, PipeWriter) = io::pipe().unwrap();
    (reader, Wire::from_descriptors(None, Some(&writer.into())).unwrap())
}

fn input() -> (PipeWriter, Wire) {
    let (reader, writer) = io::pipe().unwrap();
    (writer, Wire::from_descriptors(Some(OwnedFd::from(reader)), None).unwrap())
}

#[test]
fn output_comes_out_whatever_pieces_it_was_in() {
    let (mut reader, wire) = output();
    let mut rig = rig(wire);
    let parts: Vec<Buffer> = [&b"one "[..], b"two ", b"three"].map(|b| rig.driver.readable(b)).to_vec();
    assert_eq!(rig.driver.request(TX, &parts), Some(0));
    let mut text = [0; 13];
    reader.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"one two three");
    rig.console.write_config(EMERG_WRITE, &[b'!', 0, 0, 0]);
    reader.read_exact(&mut text[..1]).unwrap();
    assert_eq!(text[0], b'!');
}

#[test]
fn a_flood_with_a_stopped_reader_is_always_taken() {
    let (mut reader, wire) = output();
    let mut rig = rig(wire);
    let all: Vec<u8> = (0..3_000_000u32).map(|i| (i / 5) as u8).collect();
    let at = rig.driver.alloc(30_000, 8);
    for part in all.chunks(30_000) {
        rig.driver.poke(at, part);
        assert_eq!(rig.driver.request(TX, &[Buffer::readable(at, part.len() as u32)]), Some(0));
    }
    let (direct, dropped) = (rig.counter("output_bytes"), rig.counter("dropped_bytes"));
    assert_eq!(direct + dropped + CONSOLE_BUFFER as u64, all.len() as u64);
    let mut seen = vec![0; direct as usize + CONSOLE_BUFFER];
    reader.read_exact(&mut seen).unwrap();
    assert_eq!(seen[direct as usize..], all[all.len() - CONSOLE_BUFFER..]);
}

#[test]
fn input_waits_for_buffers_and_survives_a_stop() {
    let (mut writer, wire) = input();
    let mut rig = rig(wire);
    writer.write_all(b"hello").unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.counter("input_bytes"), 0, "nothing is taken that nobody has room for");
    let first = rig.driver.writable(3);
    assert_eq!(rig.driver.request(RX, &[first]), Some(3));
    assert_eq!(rig.driver.peek(first.address, 3), b"hel");
    rig.driver.stop(&mut rig.console).unwrap();
    writer.write_all(b" again").unwrap();
    rig.start();
    let second = rig.driver.writable(100);
    assert_eq!(rig.driver.request(RX, &[second]), Some(8));
    assert_eq!(rig.driver.peek(second.address, 8), b"lo again");
    // A buffer that was popped and waits is put back by a stop.
    let third = rig.driver.writable(10);
    rig.driver.send(RX, &[third]);
    std::thread::sleep(Duration::from_millis(20));
    let setups = rig.driver.stop(&mut rig.console).unwrap();
    assert!(setups.iter().all(|(_, s)| s.next_avail == s.next_used));
    writer.write_all(b"x").unwrap();
    rig.start();
    assert_eq!(rig.driver.wait_used(RX).map(|u| u.len), Some(1));
    assert_eq!(rig.driver.peek(third.address, 1), b"x");
}

#[test]
fn a_flood_of_input_arrives_in_order_and_grows_nothing() {
    let (writer, wire) = input();
    let mut rig = rig(wire);
    let all: Vec<u8> = (0..400_000u32).map(|i| (i / 3) as u8).collect();
    let sent = all.clone();
    let feeder = std::thread::spawn(move || {
        let mut writer = writer;
        writer.write_all(&sent).unwrap();
    });
    let buffer = rig.driver.writable(1000);
    let mut got = Vec::new();
    while got.len() < all.len() {
        let len = rig.driver.request(RX, &[buffer]).expect("input");
        got.extend(rig.driver.peek(buffer.address, len as usize));
    }
    assert_eq!(got, all);
    feeder.join().unwrap();
}

#[test]
fn the_guest_is_told_when_the_size_changes() {
    let mut rig = rig(Wire::open(&Output::None).unwrap());
    let size = rig.console.size();
    size.set(80, 25);
    size.set(80, 25);
    assert_eq!(rig.driver.signals.counts().config, 1, "only of changes");
    let mut config = [0xff; 12];
    rig.console.read_config(0, &mut config);
    assert_eq!(config, [80, 0, 25, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    rig.driver.stop(&mut rig.console).unwrap();
    size.set(100, 30);
    assert_eq!(rig.driver.signals.counts().config, 1);
    let saved = rig.console.save();
    let mut other = Console::new(&Output::None).unwrap();
    other.restore(&saved).unwrap();
    assert_eq!(other.size().get(), (100, 30));
    assert!(other.restore(&Section::new("virtio-net", 1, &0u8)).is_err());
}

#[test]
fn hostile_chains_harm_nobody() {
    let (mut writer, wire) = input();
    let mut rig = rig(wire);
    // Without any room for input: returned empty, and the next one is used.
    let none = rig.driver.readable(b"");
    rig.driver.send(RX, &[Buffer { writable: true, ..none }]);
    assert_eq!(rig.driver.wait_used(RX).map(|u| u.len), Some(0));
    let some = rig.driver.writable(10);
    writer.write_all(b"in").unwrap();
    assert_eq!(rig.driver.request(RX, &[some]), Some(2));
    // A request of very many bytes ends.
    let huge = vec![Buffer::readable(0, 16 << 20); 60];
    assert_eq!(rig.driver.request(TX, &huge), Some(0));
    // A spoiled queue is reported once, and the other goes on.
    rig.driver.rings[1].write_desc(9, Desc { address: 1 << 40, len: 1, flags: 0, next: 0 });
    rig.driver.rings[1].offer(9);
    rig.driver.kick(TX);
    assert!(rig.driver.signals.wait(|c| c.needs_reset == 1));
    rig.driver.kick(TX);
    writer.write_all(b"still").unwrap();
    assert_eq!(rig.driver.request(RX, &[some]), Some(5));
    rig.driver.stop(&mut rig.console).unwrap();
    assert_eq!(rig.driver.signals.counts().needs_reset, 1);
}

#[test]
fn a_client_of_the_socket_gets_what_was_said_and_is_heard() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console.sock");
    let mut rig = rig(Wire::open(&Output::Socket(path.clone())).unwrap());
    let text = rig.driver.readable(b"before");
    assert_eq!(rig.driver.request(TX, &[text]), Some(0));
    let mut client = std::os::unix::net::UnixStream::connect(&path).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut got = [0; 6];
    client.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"before");
    client.write_all(b"typed").unwrap();
    let buffer = rig.driver.writable(64);
    assert_eq!(rig.driver.request(RX, &[buffer]), Some(5));
    rig.wait_counter("output_bytes", 6);
    // The client stays over a stop and a start.
    rig.driver.stop(&mut rig.console).unwrap();
    rig.start();
    client.write_all(b"more").unwrap();
    assert_eq!(rig.driver.request(RX, &[buffer]), Some(4));
}
