//! `bench block`: random reads of 4 KiB from a file in memory, by a polling guest and by a
//! native io_uring program with the same file, depth and duration, in turns.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use io_uring::{IoUring, opcode, types};
use serde_json::json;

use super::{
    Arguments,
    machine::{self, Bench},
    report::{self, Figure, Program, Report, Target},
};

const PIECE: u64 = 4096;
const FILE: u64 = 256 << 20;
const DEPTHS: [u32; 3] = [1, 32, 128];
const DURATION: Duration = Duration::from_secs(1);
const LIMIT: Duration = Duration::from_secs(30);

/// Measures and reports.
pub fn run(arguments: &Arguments) -> Result<Report> {
    let bench = Bench::new(arguments)?;
    let path = bench.place.path().join("disk");
    fill(&path)?;
    let ticks = machine::ticks_per_second();
    let mut report = Report::new("Block: random reads of 4 KiB, file on tmpfs, engine Async", "directly");
    for depth in DEPTHS {
        let (mut ours, mut native) = (Vec::new(), Vec::new());
        for _ in 0..arguments.rounds {
            ours.push(guest_reads(&bench, &path, depth, ticks)?);
            native.push(native_reads(&path, depth)?);
        }
        let figure = Figure::new(&format!("reads at depth {depth}"), "k/s", report::median(&ours) / 1e3)
            .beside("io_uring", report::median(&native) / 1e3);
        report.figures.push(match depth {
            32 => figure.target(Target::RatioAtLeast(0.85)),
            _ => figure,
        });
    }
    report.notes.extend(machine::caveat());
    report.programs.push(Program {
        name: "nacelle".to_owned(),
        version: report::version(&bench.nacelle),
        command: vec!["vmm --no-api --show-counters --config-file, one drive, io_engine Async".to_owned()],
    });
    Ok(report)
}

/// A file without holes.
fn fill(path: &Path) -> Result<()> {
    let mut file = File::create(path).with_context(|| format!("Cannot make {}", path.display()))?;
    let piece = vec![0x5a; 1 << 20];
    (0..FILE >> 20).try_for_each(|_| file.write_all(&piece))?;
    Ok(())
}

/// Reads a second by the guest.
fn guest_reads(bench: &Bench, path: &Path, depth: u32, ticks: f64) -> Result<f64> {
    let cycles = (DURATION.as_secs_f64() * ticks) as u64;
    let work = format!("work=block {} depth={depth} cycles={cycles} sectors={}", machine::base(), FILE / 512);
    let drive = json!({ "drives": [{
        "drive_id": "disk", "path_on_host": path, "is_root_device": false, "is_read_only": true,
        "io_engine": "Async", "queue_size": 512,
    }] });
    let counters = bench.counters(&work, &drive, LIMIT)?;
    let reads = counters.get("reads").copied().unwrap_or(0.0);
    if reads == 0.0 || counters.get("errors").is_some_and(|errors| *errors > 0.0) {
        bail!("The guest's reads failed: {counters:?}");
    }
    Ok(reads / DURATION.as_secs_f64())
}

/// Reads a second by this program.
fn native_reads(path: &Path, depth: u32) -> Result<f64> {
    let file = File::open(path)?;
    let mut ring = IoUring::new(depth.max(8)).context("Cannot make an io_uring")?;
    let mut buffers = vec![[0u8; PIECE as usize]; depth as usize];
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut submit = |ring: &mut IoUring, slot: usize| -> Result<()> {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let buffer = buffers.get_mut(slot).context("No such slot")?;
        let read = opcode::Read::new(types::Fd(file.as_raw_fd()), buffer.as_mut_ptr(), PIECE as u32)
            .offset(random % (FILE / PIECE) * PIECE)
            .build()
            .user_data(slot as u64);
        // SAFETY: the buffer and the file outlive the ring's use below, which waits for all
        // reads before it ends, and one slot has at most one read.
        unsafe { ring.submission().push(&read)? };
        Ok(())
    };
    (0..depth as usize).try_for_each(|slot| submit(&mut ring, slot))?;
    let (start, mut done) = (Instant::now(), 0u64);
    let mut ended = Vec::with_capacity(depth as usize);
    let mut in_flight = depth as usize;
    while in_flight > 0 {
        ring.submit_and_wait(1)?;
        ended.extend(ring.completion().map(|entry| (entry.user_data() as usize, entry.result())));
        for (slot, result) in ended.drain(..) {
            if result != PIECE as i32 {
                bail!("A native read gave {result}");
            }
            if start.elapsed() < DURATION {
                done += 1;
                submit(&mut ring, slot)?;
            } else {
                in_flight -= 1;
            }
        }
    }
    Ok(done as f64 / DURATION.as_secs_f64())
}
