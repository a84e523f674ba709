//! `bench vsock`: one stream each way in pieces of 64 KiB, and round trips of one byte, between
//! a polling guest and a unix socket; beside them the same between two threads and a socket pair.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::{
    Arguments,
    machine::{self, Bench},
    report::{self, Figure, Program, Report},
};

const PIECE: usize = 64 << 10;
const DURATION: Duration = Duration::from_secs(1);
/// The longest silence on a socket.
const PATIENCE: Duration = Duration::from_secs(10);

/// What one run gave.
#[derive(Default)]
struct Run {
    /// Microseconds of a round trip.
    trip: f64,
    /// MiB a second from the guest, or first thread.
    out: f64,
    /// MiB a second to it.
    back: f64,
}

/// Measures and reports.
pub fn run(arguments: &Arguments) -> Result<Report> {
    let bench = Bench::new(arguments)?;
    let ticks = machine::ticks_per_second();
    let (mut ours, mut native) = (Vec::new(), Vec::new());
    for _ in 0..arguments.rounds {
        ours.push(with_guest(&bench, ticks)?);
        native.push(with_thread()?);
    }
    let middle =
        |runs: &[Run], part: fn(&Run) -> f64| report::median(&runs.iter().map(part).collect::<Vec<_>>());
    let mut report = Report::new("vsock: streams of 64 KiB pieces and round trips of one byte", "directly");
    let mut row = |name: &str, unit: &'static str, part: fn(&Run) -> f64| {
        let figure =
            Figure::new(name, unit, middle(&ours, part)).beside("socket pair", middle(&native, part));
        report.figures.push(figure);
    };
    row("round trip of one byte", "us", |run| run.trip);
    row("guest to host", "MiB/s", |run| run.out);
    row("host to guest", "MiB/s", |run| run.back);
    report.notes.extend(machine::caveat());
    report.programs.push(Program {
        name: "nacelle".to_owned(),
        version: report::version(&bench.nacelle),
        command: vec!["vmm --no-api --show-counters --config-file, a vsock device".to_owned()],
    });
    Ok(report)
}

fn with_guest(bench: &Bench, ticks: f64) -> Result<Run> {
    let path = bench.place.path().join("vsock");
    let mut paths = vec![path.clone()];
    let mut listeners = Vec::new();
    for port in 1..=3 {
        let at = PathBuf::from(format!("{}_{port}", path.display()));
        let _ = std::fs::remove_file(&at);
        let listener = UnixListener::bind(&at)?;
        listener.set_nonblocking(true)?;
        listeners.push(listener);
        paths.push(at);
    }
    let _ = std::fs::remove_file(&path);
    let cycles = (DURATION.as_secs_f64() * ticks) as u64;
    let work = format!("work=vsock {} cycles={cycles} bytes={PIECE}", machine::base());
    let device = json!({ "vsock": { "guest_cid": 3, "uds_path": path } });
    let log = bench.place.path().join("log");
    let mut child = bench.command(1, &work, &device)?.stderr(std::fs::File::create(&log)?).spawn()?;
    let done = (|| -> Result<Run> {
        let mut streams = listeners.iter().map(accept);
        let mut next = || streams.next().context("No such port")?;
        let trip = round_trips(&mut next()?)?;
        let out = take(&mut next()?)?;
        let back = give(&mut next()?)?;
        Ok(Run { trip, out, back })
    })();
    if done.is_err() {
        child.kill()?;
    }
    let ended = machine::end_within(&mut child, PATIENCE);
    paths.iter().for_each(|path| drop(std::fs::remove_file(path)));
    let said = || format!("The guest's connections: {}", std::fs::read_to_string(&log).unwrap_or_default());
    let run = done.with_context(said)?;
    ended.map(|()| run)
}

/// The same with a thread in the guest's place.
fn with_thread() -> Result<Run> {
    let pair = || -> Result<(UnixStream, UnixStream)> { Ok(UnixStream::pair()?) };
    let (mut near, mut far) = pair()?;
    let echo = thread::spawn(move || -> Result<()> {
        let mut byte = [0; 1];
        while far.read(&mut byte)? == 1 {
            far.write_all(&byte)?;
        }
        Ok(())
    });
    let trip = round_trips(&mut near)?;
    drop(near);
    joined(echo)?;
    let (mut near, mut far) = pair()?;
    let source = thread::spawn(move || give(&mut far).map(drop));
    let out = take(&mut near)?;
    joined(source)?;
    let (mut near, mut far) = pair()?;
    let sink = thread::spawn(move || take(&mut far).map(drop));
    let back = give(&mut near)?;
    drop(near);
    joined(sink)?;
    Ok(Run { trip, out, back })
}

fn joined(thread: thread::JoinHandle<Result<()>>) -> Result<()> {
    thread.join().unwrap_or_else(|_| bail!("A thread of the floor panicked"))
}

/// The guest's connection to a listener.
fn accept(listener: &UnixListener) -> Result<UnixStream> {
    let start = Instant::now();
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))?;
                return Ok(stream);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock && start.elapsed() < PATIENCE => {
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(error).context("The guest does not connect"),
        }
    }
}

/// Microseconds of one round trip of a byte, the mean over the duration.
fn round_trips(stream: &mut UnixStream) -> Result<f64> {
    let (start, mut trips) = (Instant::now(), 0u32);
    while start.elapsed() < DURATION {
        stream.write_all(&[7])?;
        stream.read_exact(&mut [0])?;
        trips += 1;
    }
    Ok(start.elapsed().as_secs_f64() * 1e6 / f64::from(trips))
}

/// MiB a second that come until the other side closes.
fn take(stream: &mut UnixStream) -> Result<f64> {
    let mut buffer = vec![0; PIECE];
    let (mut bytes, mut start) = (0u64, Instant::now());
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            // From the first byte on: before it the other side was made.
            _ if bytes == 0 => (bytes, start) = (1, Instant::now()),
            some => bytes += some as u64,
        }
    }
    Ok(bytes as f64 / start.elapsed().as_secs_f64() / f64::from(1 << 20))
}

/// MiB a second that the other side takes, for the duration.
fn give(stream: &mut UnixStream) -> Result<f64> {
    let piece = vec![0x5a; PIECE];
    let (start, mut bytes) = (Instant::now(), 0u64);
    while start.elapsed() < DURATION {
        stream.write_all(&piece)?;
        bytes += PIECE as u64;
    }
    Ok(bytes as f64 / start.elapsed().as_secs_f64() / f64::from(1 << 20))
}
