//! The port as its driver sees it, with a pump on a real worker.

use std::{
    fs::File,
    io::{PipeReader, PipeWriter, Read},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::PathBuf,
    time::Instant,
};

use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::limits::CONSOLE_BUFFER;

const PATIENCE: Duration = Duration::from_secs(10);
const IIR: u64 = 2;
const LSR: u64 = 5;

struct Rig {
    serial: Serial,
    line: EventFd,
}

fn rig_on(wire: Wire) -> Rig {
    named_rig_on(wire, "serial-test")
}

fn named_rig_on(wire: Wire, name: &str) -> Rig {
    let line = EventFd::new(EFD_NONBLOCK).unwrap();
    let worker = Worker::new(name);
    Rig { serial: Serial::with_wire(wire, line.try_clone().unwrap(), worker), line }
}

fn rig(output: &Output) -> Rig {
    rig_on(Wire::open(output).unwrap())
}

impl Rig {
    fn get(&self, offset: u64) -> u8 {
        let mut data = [0xee];
        self.serial.read(offset, &mut data);
        data[0]
    }
    fn put(&self, offset: u64, value: u8) {
        self.serial.write(offset, &[value]);
    }
    fn print(&self, text: &[u8]) {
        text.iter().for_each(|b| self.put(0, *b));
    }
    fn listen(&self) {
        self.put(IER, IER_RECEIVE);
    }
    /// Receives until `count` bytes came or patience ends.
    fn receive(&self, count: usize) -> Vec<u8> {
        let end = Instant::now() + PATIENCE;
        let mut bytes = Vec::new();
        while bytes.len() < count && Instant::now() < end {
            match self.get(LSR) & LSR_READY {
                0 => std::thread::sleep(Duration::from_micros(50)),
                _ => bytes.push(self.get(0)),
            }
        }
        bytes
    }
    fn counter(&self, name: &str) -> u64 {
        self.serial.counters().into_iter().find(|(n, _)| *n == name).unwrap().1
    }
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn connect(path: &PathBuf) -> UnixStream {
    let client = UnixStream::connect(path).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client
}

#[test]
fn a_flood_with_a_stopped_reader_blocks_nobody_and_ends_with_the_newest() {
    let (mut reader, writer): (PipeReader, PipeWriter) = io::pipe().unwrap();
    let writer = OwnedFd::from(writer);
    let rig = rig_on(Wire::from_descriptors(None, Some(&writer)).unwrap());
    drop(writer);
    let all: Vec<u8> = (0..500_000u32).map(|i| (i / 3) as u8).collect();
    let start = Instant::now();
    rig.print(&all);
    assert!(start.elapsed() < PATIENCE);
    let (dropped, direct) = (rig.counter("dropped_bytes"), rig.counter("output_bytes"));
    assert_eq!(dropped + direct + CONSOLE_BUFFER as u64, all.len() as u64);
    // Now the reader goes on, and the pump brings the rest without another byte printed.
    let mut seen = vec![0; (direct as usize) + CONSOLE_BUFFER];
    reader.read_exact(&mut seen).unwrap();
    assert_eq!(seen[..direct as usize], all[..direct as usize]);
    assert_eq!(seen[direct as usize..], all[all.len() - CONSOLE_BUFFER..]);
}

#[test]
fn a_flood_of_input_is_taken_only_as_fast_as_the_guest_reads() {
    let (reader, writer): (PipeReader, PipeWriter) = io::pipe().unwrap();
    let rig = rig_on(Wire::from_descriptors(Some(reader.into()), None).unwrap());
    let all: Vec<u8> = (0..1_000_000u32).map(|i| (i / 5) as u8).collect();
    let sent = all.clone();
    let feeder = std::thread::spawn(move || {
        let mut writer = writer;
        writer.write_all(&sent).unwrap();
    });
    assert_eq!(rig.counter("input_bytes"), 0, "nothing is read before the guest listens");
    rig.listen();
    eventually("the FIFO fills", || rig.counter("input_bytes") == FIFO as u64);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.counter("input_bytes"), FIFO as u64, "the rest stays in the pipe");
    assert!(rig.line.read().is_ok());
    assert_eq!(rig.receive(all.len()), all);
    feeder.join().unwrap();
}

#[test]
fn one_client_of_a_socket_gets_the_last_lines_and_is_heard() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console.sock");
    let rig = rig(&Output::Socket(path.clone()));
    rig.print(b"printed before anybody came\n");
    rig.listen();
    let mut client = connect(&path);
    let mut text = [0; 28];
    client.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"printed before anybody came\n");

    let mut second = String::new();
    connect(&path).read_to_string(&mut second).unwrap();
    assert!(second.contains("has a client already"), "{second:?}");

    client.write_all(b"input").unwrap();
    assert_eq!(rig.receive(5), b"input");
    drop(client);
    eventually("a client that left makes place for another", || {
        let mut next = connect(&path);
        rig.print(b"#");
        let mut byte = [0];
        next.read_exact(&mut byte).is_ok() && byte == *b"#"
    });
}

#[test]
fn a_pseudo_terminal_carries_both_ways_and_echoes_nothing() {
    let rig = rig(&Output::Pty);
    let path = rig.serial.place().unwrap().to_owned();
    assert!(path.starts_with("/dev/pts"));
    rig.listen();
    rig.print(b"early\n");
    for round in 0..2 {
        let mut terminal = File::options().read(true).write(true).open(&path).unwrap();
        rig.print(b"late\n");
        let expected: &[u8] = if round == 0 { b"early\nlate\n" } else { b"late\n" };
        let mut text = vec![0; expected.len()];
        terminal.read_exact(&mut text).unwrap();
        assert_eq!(text, expected);
        terminal.write_all(b"typed\x03\r").unwrap();
        assert_eq!(rig.receive(7), b"typed\x03\r");
    }
}

#[test]
fn a_client_that_hangs_up_with_a_full_fifo_spins_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console.sock");
    let rig = named_rig_on(Wire::open(&Output::Socket(path.clone())).unwrap(), "serial-hang-up");
    rig.listen();
    connect(&path).write_all(&[b'z'; 1000]).unwrap();
    eventually("the FIFO fills", || rig.counter("input_bytes") == FIFO as u64);
    let before = cpu_time("serial-hang-up");
    std::thread::sleep(Duration::from_millis(200));
    assert!(cpu_time("serial-hang-up") - before < Duration::from_millis(100), "the worker spins");
    assert_eq!(rig.receive(1000), [b'z'; 1000], "what was sent before the end still arrives");
}

/// Processor time of the thread called `name` so far.
fn cpu_time(name: &str) -> Duration {
    let mut tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let ours = tasks.find(|t| std::fs::read_to_string(t.path().join("comm")).is_ok_and(|n| n.trim() == name));
    let text = std::fs::read_to_string(ours.unwrap().path().join("schedstat")).unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

#[test]
fn a_pending_transmit_interrupt_and_unread_input_survive_a_save() {
    let rig = rig(&Output::None);
    rig.put(3, LCR_DIVISOR | 3);
    rig.put(0, 1);
    rig.put(1, 0);
    rig.put(3, 3);
    rig.put(IER, 0b11);
    rig.line.read().unwrap();
    lock(&rig.serial.uart).enqueue_raw_bytes(b"unread").unwrap();
    let other = self::rig(&Output::None);
    other.serial.restore(&rig.serial.save()).unwrap();
    assert!(other.line.read().unwrap() >= 1, "the interrupt under way is raised again");
    assert_eq!(other.get(IIR) & 0b110, 0b110);
    assert_eq!(other.receive(6), b"unread");
    other.put(3, LCR_DIVISOR | 3);
    assert_eq!((other.get(0), other.get(1)), (1, 0));
}

#[test]
fn output_beyond_the_limit_is_dropped_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let rig = rig(&Output::File(path.clone()));
    let bucket = |size| BucketConfig { size, one_time_burst: 3, refill_time_ms: 3_600_000 };
    rig.serial.limit(Some(bucket(4)));
    rig.print(b"0123456789");
    assert_eq!(std::fs::read(&path).unwrap(), b"0123456");
    assert_eq!(rig.counter("rate_limiter_dropped_bytes"), 3);
    let saved = rig.serial.save();
    rig.serial.limit(Some(bucket(0)));
    rig.print(b"all of this");
    assert_eq!(std::fs::read(&path).unwrap(), b"0123456all of this");
    assert_eq!(rig.counter("dropped_bytes"), 0, "the reader is not to blame");
    rig.serial.restore(&saved).unwrap();
    rig.print(b"more");
    assert_eq!(rig.counter("rate_limiter_dropped_bytes"), 3, "nobody limits this port any more");
    rig.serial.limit(Some(bucket(4)));
    rig.serial.restore(&saved).unwrap();
    rig.print(b"x");
    assert_eq!(rig.counter("rate_limiter_dropped_bytes"), 4, "the same limit, and its bucket is empty");
}

#[test]
fn impossible_state_is_refused_and_changes_nothing() {
    let rig = rig(&Output::None);
    rig.put(7, 0x5a);
    let saved = Saved::read(&rig.serial.save()).unwrap();
    let config = BucketConfig { size: 8, one_time_burst: 0, refill_time_ms: 1000 };
    let bucket = Bucket::new(config, 0).unwrap().save(0);
    for broken in [
        Saved { input: vec![0; FIFO + 1], ..saved.clone() },
        Saved { interrupt_identification: 0x80, ..saved.clone() },
        Saved { interrupt_enable: 0x10, ..saved.clone() },
        Saved { limit: Some(BucketState { budget: 9, ..bucket }), ..saved.clone() },
        Saved { limit: Some(BucketState { refill_time_ms: 0, ..bucket }), ..saved.clone() },
    ] {
        let section = Section::new(KIND, VERSION, &broken);
        assert!(matches!(rig.serial.restore(&section), Err(StateError::Impossible { .. })));
    }
    assert!(rig.serial.restore(&Section::new("power", 1, &0u8)).is_err());
    assert_eq!(rig.get(7), 0x5a);
}

#[test]
fn a_port_that_was_saved_before_it_had_a_limit_comes_back() {
    let rig = rig(&Output::None);
    rig.put(7, 0x5a);
    let mut old = rig.serial.save();
    // Version 1 ended before the limit, of which there is none here.
    assert_eq!((old.version, old.bytes.pop()), (2, Some(0)));
    assert!(rig.serial.restore(&old).is_err(), "version 2 says whether there is a limit");
    old.version = 1;
    rig.put(7, 0xa5);
    rig.serial.restore(&old).unwrap();
    assert_eq!(rig.get(7), 0x5a);
    old.version = 3;
    let error = rig.serial.restore(&old).unwrap_err().to_string();
    assert!(error.contains("serial has version 3; this build writes version 2"), "{error}");
}

#[test]
fn accesses_of_any_place_and_size_are_harmless() {
    let rig = rig(&Output::None);
    for offset in (0..8).chain([255, 256, u64::MAX]) {
        for len in 1..=8 {
            rig.serial.write(offset, &vec![0xa5; len]);
            rig.serial.read(offset, &mut vec![0; len]);
        }
    }
    let mut wide = [0; 2];
    rig.serial.read(0, &mut wide);
    assert_eq!(wide, [0xff; 2]);
}

#[test]
fn a_port_that_needs_no_pump_starts_no_thread() {
    let dir = tempfile::tempdir().unwrap();
    let rig = rig(&Output::File(dir.path().join("log")));
    rig.listen();
    rig.print(b"text");
    assert!(matches!(*rig.serial.pump.lock().unwrap(), Running::Never));
}
