//! `bench clones`: what one of many clones of one snapshot costs the host while it waits, and what
//! starting one costs, beside peers and beside containers of the same busybox.
//!
//! What a clone costs is the host's `MemAvailable` before and after, divided by their number: it
//! counts what no list of a process does, such as KVM's tables and the kernel's stacks. Where it
//! goes is told by the processes' own mappings and by the kernel's own counts.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    Arguments,
    inside::{self, Copies, Monitor, PLACE},
    process,
    report::{self, Figure, Program, Report, Target},
    saved::{self, Machine, Place, Plan, Shape},
    spent,
};
use crate::host;

const MIB: u32 = 256;
const MANY: usize = 40;
/// How long they are left alone before memory is looked at: longer than a monitor takes to give
/// back what only its start needed.
const REST: Duration = Duration::from_secs(3);
/// Counts of the kernel's that are told.
const KERNEL: [&str; 9] = [
    "AnonPages",
    "Mapped",
    "Shmem",
    "Slab",
    "KernelStack",
    "PageTables",
    "SecPageTables",
    "Percpu",
    "Cached",
];

/// KiB, for one of many.
type Kibs = BTreeMap<String, f64>;

/// What was found of one monitor, or of containers.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Found {
    name: String,
    /// KiB of `MemAvailable` for each.
    each: f64,
    /// Where they go, by the processes' mappings.
    mappings: Kibs,
    /// Where they go, by the kernel's counts.
    kernel: Kibs,
    /// Microseconds of processor time from exec to the first line.
    start: Vec<f64>,
}

/// Measures and reports.
pub fn run(arguments: &Arguments) -> Result<Report> {
    host::need("bench clones", &host::LAB_PACKAGES)?;
    host::need("bench clones", &host::RUN_PACKAGES)?;
    host::need("bench clones", &host::CONTAINER_PACKAGES)?;
    let work = tempfile::tempdir().context("Cannot make a folder for the machine's files")?;
    let plan = saved::plan(arguments, work.path())?;
    let (found, place) = inside::have_measured("clones", &plan, measure)?;
    Ok(report(place, &plan, &found))
}

/// The part that runs in the lab.
pub fn inside(plan: &Path) -> Result<u8> {
    inside::inside(plan, measure)
}

fn measure(plan: &Plan) -> Result<Vec<Found>> {
    let _copies = Copies::made(&plan.copies)?;
    let found = |monitor| clones(plan, monitor).with_context(|| format!("{} failed", monitor.name));
    let mut all = plan.monitors.iter().map(found).collect::<Result<Vec<_>>>()?;
    all.push(containers(plan).context("runc failed")?);
    Ok(all)
}

fn clones(plan: &Plan, monitor: &Monitor) -> Result<Found> {
    let mut found = Found { name: monitor.name.clone(), ..Found::default() };
    let place = saved_machine(monitor, "tick")?;
    for round in 0..=plan.rounds {
        let mut machine = Machine::idle(monitor, "clone")?;
        machine.load(&place, json!({ "resume_vm": true }))?;
        machine.line("tick")?;
        let cost = process::cpu(machine.id())?;
        if round > 0 {
            found.start.push(cost);
        }
    }
    let place = saved_machine(monitor, "sleep")?;
    let start = |number: usize| {
        let mut machine = Machine::idle(monitor, &format!("clone{number}"))?;
        machine.load(&place, json!({ "resume_vm": true }))?;
        Ok(machine)
    };
    // One first, so that what all share is there already.
    let shared: Machine = start(MANY)?;
    let before = settled()?;
    let machines = (0..MANY).map(start).collect::<Result<Vec<Machine>>>()?;
    let after = settled()?;
    found.account(&before, &after);
    for machine in &machines {
        for (name, kib) in process::memory(machine.id(), f64::from(MIB << 10))? {
            *found.mappings.entry(name).or_default() += kib / MANY as f64;
        }
    }
    drop((machines, shared));
    Ok(found)
}

impl Found {
    fn account(&mut self, before: &Kibs, after: &Kibs) {
        let of = |all: &Kibs, name: &str| all.get(name).copied().unwrap_or(0.0);
        let each = |name: &str| (of(after, name) - of(before, name)) / MANY as f64;
        self.each = -each("MemAvailable");
        self.kernel = KERNEL.iter().map(|name| ((*name).to_owned(), each(name))).collect();
    }
}

/// The host's memory once all is quiet.
fn settled() -> Result<Kibs> {
    thread::sleep(REST);
    // Free pages and caches are counted in batches for each processor; this settles them.
    let _ = fs::write("/proc/sys/vm/drop_caches", "3");
    let _ = fs::read("/proc/sys/vm/stat_refresh");
    process::host_memory()
}

fn saved_machine(monitor: &Monitor, work: &'static str) -> Result<Place> {
    let place = Place::new(&format!("clones-{work}"))?;
    let shape = Shape { vcpus: 1, memory_mib: MIB, work, tracked: false };
    let mut machine = Machine::started(monitor, "source", shape)?;
    // Past what a guest does only once.
    thread::sleep(Duration::from_secs(2));
    machine.pause()?;
    machine.save(&place, false)?;
    Ok(place)
}

/// Containers of the same busybox.
fn containers(plan: &Plan) -> Result<Found> {
    let mut found = Found { name: "runc".to_owned(), ..Found::default() };
    let tick = bundle("tick", &["/bin/busybox", "echo", "tick"])?;
    for round in 0..=plan.rounds {
        let spent = spent::run(runc(&["run", "--bundle"]).arg(&tick).arg("once"), None)?;
        if round > 0 {
            found.start.push(spent.cpu());
        }
    }
    let sleep = bundle("sleep", &["/bin/busybox", "sleep", "1000000"])?;
    let mut names: Vec<String> = Vec::new();
    let mut start = |number: usize| {
        let name = format!("many{number}");
        let status = runc(&["run", "--detach", "--bundle"])
            .arg(&sleep)
            .arg(&name)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()?;
        names.push(name);
        if status.success() { Ok(()) } else { bail!("runc run ended with {status}") }
    };
    start(MANY)?;
    let before = settled()?;
    let started: Result<()> = (0..MANY).try_for_each(&mut start);
    let after = settled()?;
    for name in &names {
        let _ = runc(&["delete", "--force", name]).status();
    }
    started?;
    found.account(&before, &after);
    Ok(found)
}

fn runc(words: &[&str]) -> Command {
    let mut command = Command::new("runc");
    command.arg("--root").arg(Path::new(PLACE).join("runc")).args(words);
    command
}

/// A bundle whose process is `words`.
fn bundle(name: &str, words: &[&str]) -> Result<PathBuf> {
    let place = Path::new(PLACE).join(format!("bundle-{name}"));
    let binaries = place.join("rootfs/bin");
    fs::create_dir_all(&binaries)?;
    fs::copy(Path::new(PLACE).join("busybox"), binaries.join("busybox"))?;
    for folder in ["proc", "dev", "sys"] {
        fs::create_dir_all(place.join("rootfs").join(folder))?;
    }
    host::run(Command::new("runc").args(["spec", "--bundle"]).arg(&place))?;
    let path = place.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
    config["process"]["terminal"] = json!(false);
    config["process"]["args"] = json!(words);
    fs::write(&path, config.to_string())?;
    Ok(place)
}

fn report(place: &str, plan: &Plan, found: &[Found]) -> Report {
    let mut report = Report::new("Clones of one snapshot: 1 vCPU, 256 MiB, asleep", place);
    let Some((ours, others)) = found.split_first() else { return report };
    let each = Figure::new("memory of the host for each of 40", "KiB", ours.each);
    report.figures.push(each.clone().target(Target::AtMost(1200.0)));
    for other in others {
        report.figures.push(each.clone().beside(&other.name, other.each));
    }
    for other in others {
        let start = Figure::new("exec to the first line", "us", report::median(&ours.start));
        let beside = start.beside(&other.name, report::median(&other.start));
        let target = (other.name == "runc").then_some(Target::RatioAtMost(1.0));
        report.figures.push(Figure { target, ..beside });
    }
    for one in found {
        let listed = |all: &Kibs| {
            let mut parts: Vec<_> = all.iter().filter(|(_, kib)| kib.abs() >= 0.5).collect();
            parts.sort_by(|a, b| b.1.total_cmp(a.1));
            parts.iter().map(|(name, kib)| format!("{name} {kib:.0}")).collect::<Vec<_>>().join(", ")
        };
        report.notes.push(format!(
            "{}, KiB for each: {}\n  by the kernel's counts: {}",
            one.name,
            listed(&one.mappings),
            listed(&one.kernel)
        ));
    }
    report.programs.extend(plan.monitors.iter().map(Program::from));
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_has_less_is_divided_among_the_clones() {
        let kibs = |available: f64, slab: f64| -> Kibs {
            [("MemAvailable".to_owned(), available), ("Slab".to_owned(), slab)].into()
        };
        let mut found = Found::default();
        found.account(&kibs(100_000.0, 1000.0), &kibs(60_000.0, 5000.0));
        assert_eq!((found.each, found.kernel["Slab"]), (1000.0, 100.0));
    }

    #[test]
    fn a_container_is_what_the_start_is_compared_with() {
        let one = |name: &str, each: f64| Found {
            name: name.to_owned(),
            each,
            start: vec![each],
            ..Found::default()
        };
        let plan = Plan { copies: Vec::new(), monitors: Vec::new(), rounds: 1 };
        let report = report("here", &plan, &[one("nacelle", 1000.0), one("peer", 900.0), one("runc", 800.0)]);
        let met: Vec<_> = report.figures.iter().map(Figure::is_met).collect();
        assert_eq!(met, [Some(true), None, None, None, Some(false)]);
    }
}
