//! `bench snapshot`: what it costs to stop a machine and to write it down, beside writing the
//! same bytes to the same place, and beside peers.
//!
//! ```text
//!   full    PATCH Paused, PUT create       beside write(2) of the file's data, holes left out
//!   diff    after the guest wrote 16 MiB   beside write(2) of the diff's data
//!   pause   PATCH Paused of 1 and of many vCPUs
//!   live    1 GiB, the guest writes 100 MB a second: how long it stood still
//! ```

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    Arguments,
    inside::{self, Copies, Monitor, PLACE},
    process,
    report::{self, Figure, Program, Report, Target},
    saved::{self, Machine, Place, Plan, Shape},
};
use crate::host;

const MIB: u32 = 256;
const LIVE_MIB: u32 = 1024;
const MANY: u32 = 64;

/// What one kind of snapshot cost.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct Written {
    /// Microseconds of processor time.
    cpu: f64,
    /// Microseconds that writing the same bytes takes.
    floor: f64,
    /// Bytes on the disk.
    bytes: f64,
}

/// What was found of one monitor.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Found {
    full: Vec<Written>,
    diff: Vec<Written>,
    pause: Vec<f64>,
    /// Of [`MANY`] vCPUs; ours only.
    pause_many: Vec<f64>,
    /// Microseconds that the guest stood still for a live snapshot; ours only.
    live: Vec<f64>,
    /// Why there is none.
    live_error: Option<String>,
}

/// Measures and reports.
pub fn run(arguments: &Arguments) -> Result<Report> {
    host::need("bench snapshot", &host::LAB_PACKAGES)?;
    host::need("bench snapshot", &host::RUN_PACKAGES)?;
    let work = tempfile::tempdir().context("Cannot make a folder for the machine's files")?;
    let plan = saved::plan(arguments, work.path())?;
    let (found, place) = inside::have_measured("snapshot", &plan, measure)?;
    Ok(report(place, &plan, &found))
}

/// The part that runs in the lab.
pub fn inside(plan: &Path) -> Result<u8> {
    inside::inside(plan, measure)
}

fn measure(plan: &Plan) -> Result<Vec<Found>> {
    let _copies = Copies::made(&plan.copies)?;
    plan.monitors
        .iter()
        .map(|monitor| found(plan, monitor).with_context(|| format!("{} failed", monitor.name)))
        .collect()
}

fn found(plan: &Plan, monitor: &Monitor) -> Result<Found> {
    let mut found = Found::default();
    let shape = Shape { vcpus: 1, memory_mib: MIB, work: "dirty", tracked: true };
    for round in 0..=plan.rounds {
        let mut machine = Machine::started(monitor, "source", shape)?;
        machine.line("tick")?;
        let pause = machine.cost(Machine::pause)?;
        let (base, diff) = (Place::new("base")?, Place::new("diff")?);
        let full = written(&mut machine, &base, false)?;
        machine.resume()?;
        machine.line("tick")?;
        machine.pause()?;
        let diff = written(&mut machine, &diff, true)?;
        // The first, not counted, brings programs and libraries into memory.
        if round > 0 {
            found.pause.push(pause);
            found.full.push(full);
            found.diff.push(diff);
        }
    }
    if saved::is_ours(monitor) {
        found.pause_many = pauses(monitor, plan.rounds)?;
        match live(monitor, plan.rounds) {
            Ok(pauses) => found.live = pauses,
            Err(error) => found.live_error = Some(format!("{error:#}")),
        }
    }
    Ok(found)
}

fn written(machine: &mut Machine, place: &Place, diff: bool) -> Result<Written> {
    let cpu = machine.cost(|machine| machine.save(place, diff))?;
    Ok(Written { cpu, floor: floor(&largest(place.directory())?)?, bytes: place.bytes()? })
}

/// The memory file: the largest of a snapshot.
fn largest(directory: &Path) -> Result<PathBuf> {
    let mut files = Vec::new();
    for folder in [directory.to_owned(), directory.join("saved")] {
        for entry in fs::read_dir(folder).into_iter().flatten() {
            let entry = entry?;
            let about = entry.metadata()?;
            if about.is_file() {
                files.push((about.len(), entry.path()));
            }
        }
    }
    files.into_iter().max().map(|(_, path)| path).context("The snapshot has no files")
}

/// Microseconds of processor time that writing the data of `file` to another one in the same
/// place takes. Once, as the snapshot was written once: whoever writes again gets the pages that he
/// has just given back, which costs a twentieth less.
fn floor(file: &Path) -> Result<f64> {
    let pieces = data(file)?;
    let copy = Path::new(PLACE).join("floor");
    let target = File::create(&copy)?;
    let before = process::cpu(std::process::id())?;
    for (offset, bytes) in &pieces {
        target.write_all_at(bytes, *offset)?;
    }
    target.sync_data()?;
    let took = process::cpu(std::process::id())? - before;
    fs::remove_file(&copy)?;
    Ok(took)
}

/// The data of a sparse file, run by run.
fn data(path: &Path) -> Result<Vec<(u64, Vec<u8>)>> {
    use std::os::fd::AsRawFd;
    let mut file = File::open(path)?;
    let end = file.metadata()?.len();
    let seek = |from: u64, whence| {
        // SAFETY: a descriptor that is open, and numbers.
        let at = unsafe { libc::lseek(file.as_raw_fd(), from as i64, whence) };
        u64::try_from(at).ok()
    };
    let mut runs = Vec::new();
    let mut at = 0;
    while at < end
        && let Some(start) = seek(at, libc::SEEK_DATA)
    {
        at = seek(start, libc::SEEK_HOLE).unwrap_or(end);
        runs.push((start, at - start));
    }
    let mut pieces = Vec::new();
    for (start, length) in runs {
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = vec![0; usize::try_from(length)?];
        file.read_exact(&mut bytes)?;
        pieces.push((start, bytes));
    }
    Ok(pieces)
}

fn pauses(monitor: &Monitor, rounds: u32) -> Result<Vec<f64>> {
    let shape = Shape { vcpus: MANY, memory_mib: MIB, work: "tick", tracked: false };
    let mut machine = Machine::started(monitor, "many", shape)?;
    let mut costs = Vec::new();
    for _ in 0..=rounds {
        machine.line("tick")?;
        costs.push(machine.cost(Machine::pause)?);
        machine.resume()?;
    }
    Ok(costs.split_off(1))
}

fn live(monitor: &Monitor, rounds: u32) -> Result<Vec<f64>> {
    let shape = Shape { vcpus: 1, memory_mib: LIVE_MIB, work: "storm", tracked: false };
    let mut machine = Machine::started(monitor, "live", shape)?;
    let mut pauses = Vec::new();
    for _ in 0..rounds {
        let place = Place::new("live")?;
        machine.save_with(&place, json!({ "snapshot_type": "Full", "live": true }))?;
        let jobs: Value = machine.client.get("/snapshot/jobs")?;
        let Some(pause) = jobs.as_array().and_then(|all| all.last()?.get("pause_us")?.as_f64()) else {
            bail!("The job of a live snapshot does not say how long the guest stood still: {jobs}");
        };
        pauses.push(pause);
    }
    Ok(pauses)
}

fn report(place: &str, plan: &Plan, found: &[Found]) -> Report {
    let mut report = Report::new("Snapshots: 1 vCPU, 256 MiB, written to memory", place);
    let Some((ours, peers)) = found.split_first() else { return report };
    let middle = |all: &[Written], part: fn(&Written) -> f64| {
        report::median(&all.iter().map(part).collect::<Vec<_>>())
    };
    type Kind = (&'static str, fn(&Found) -> &[Written], f64);
    let kinds: [Kind; 2] = [("full", |f| &f.full, 1.15), ("diff of 16 MiB", |f| &f.diff, 1.3)];
    for (name, kind, most) in kinds {
        let cpu = Figure::new(name, "us", middle(kind(ours), |w| w.cpu));
        let floor = cpu.clone().beside("write(2)", middle(kind(ours), |w| w.floor));
        report.figures.push(floor.target(Target::RatioAtMost(most)));
        for (peer, monitor) in peers.iter().zip(plan.monitors.iter().skip(1)) {
            report.figures.push(cpu.clone().beside(&monitor.name, middle(kind(peer), |w| w.cpu)));
            let bytes = Figure::new(&format!("{name}: bytes"), "1", middle(kind(ours), |w| w.bytes));
            report.figures.push(bytes.beside(&monitor.name, middle(kind(peer), |w| w.bytes)));
        }
    }
    let pause = report::median(&ours.pause);
    let mut one = Figure::new("pause, 1 vCPU", "us", pause).target(Target::AtMost(300.0));
    for (peer, monitor) in peers.iter().zip(plan.monitors.iter().skip(1)) {
        one = one.beside(&monitor.name, report::median(&peer.pause));
    }
    report.figures.extend([
        one,
        Figure::new("pause, 64 vCPUs", "us", report::median(&ours.pause_many)).beside("1 vCPU", pause),
    ]);
    if !ours.live.is_empty() {
        let live = Figure::new("live: the guest stood still", "us", report::median(&ours.live));
        report.figures.push(live.target(Target::AtMost(10_000.0)));
    }
    report.notes.extend(ours.live_error.iter().map(|error| format!("No live snapshot: {error}")));
    report.programs.extend(plan.monitors.iter().map(Program::from));
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_of_a_sparse_file_is_found_without_its_holes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8 << 20).unwrap();
        file.as_file().write_all_at(&[1; 4096], 0).unwrap();
        file.as_file().write_all_at(&[2; 4096], 4 << 20).unwrap();
        let found = data(file.path()).unwrap();
        let bytes: usize = found.iter().map(|(_, bytes)| bytes.len()).sum();
        assert!(bytes < 4 << 20, "{bytes}");
        assert!(found.iter().any(|(at, bytes)| bytes.get(((4u64 << 20) - at) as usize) == Some(&2)));
    }
}
