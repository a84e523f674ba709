//! `bench restore`: from the start of a monitor until a saved machine is loaded, and until its
//! guest says something, beside peers that take Firecracker's requests.
//!
//! ```text
//!   exec ─► API ─► PUT /snapshot/load ─► loaded ─► PATCH /vm ─► guest's first line
//!   |<------------ exec to loaded ----------->|                         |
//!   |<------------------ exec to the first line ----------------------->|   faults, bytes
//! ```
//!
//! Processor time is that of the monitor's process, its guest included. The memory file is in the
//! page cache, so that no disk is measured. A machine of 8 GiB, of which little was touched, is
//! measured only for ours: a peer that writes every page has no room for it.

use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    Arguments,
    inside::{self, Copies, Monitor},
    process,
    report::{self, Figure, Report, Target},
    saved::{self, Machine, Place, Plan, Shape},
};
use crate::host;

const SMALL: u32 = 256;
const LARGE: u32 = 8192;

/// What one load cost: microseconds, and page faults.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct Cost {
    served: f64,
    loaded: f64,
    line: f64,
    loaded_faults: f64,
    line_faults: f64,
}

/// What was found of one monitor.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Found {
    bytes: f64,
    small: Vec<Cost>,
    /// Ours only.
    large: Vec<Cost>,
    /// With the working set of an earlier load; ours only.
    remembered: Vec<Cost>,
}

/// Measures and reports.
pub fn run(arguments: &Arguments) -> Result<Report> {
    host::need("bench restore", &host::LAB_PACKAGES)?;
    host::need("bench restore", &host::RUN_PACKAGES)?;
    let work = tempfile::tempdir().context("Cannot make a folder for the machine's files")?;
    let plan = saved::plan(arguments, work.path())?;
    let (found, place) = inside::have_measured("restore", &plan, measure)?;
    Ok(report(place, &plan, &found))
}

/// The part that runs in the lab.
pub fn inside(plan: &Path) -> Result<u8> {
    inside::inside(plan, measure)
}

fn measure(plan: &Plan) -> Result<Vec<Found>> {
    let _copies = Copies::made(&plan.copies)?;
    saved::allow_overcommit();
    plan.monitors
        .iter()
        .map(|monitor| found(plan, monitor).with_context(|| format!("{} failed", monitor.name)))
        .collect()
}

fn found(plan: &Plan, monitor: &Monitor) -> Result<Found> {
    let mut found = Found::default();
    let place = saved_machine(monitor, SMALL)?;
    found.bytes = place.bytes()?;
    found.small = rounds(plan, monitor, &place, &json!({}))?;
    if !saved::is_ours(monitor) {
        return Ok(found);
    }
    load(monitor, &place, &json!({ "record_working_set": true }))?;
    found.remembered = rounds(plan, monitor, &place, &json!({ "prefetch": "working_set" }))?;
    drop(place);
    let place = saved_machine(monitor, LARGE)?;
    found.large = rounds(plan, monitor, &place, &json!({}))?;
    Ok(found)
}

fn saved_machine(monitor: &Monitor, memory_mib: u32) -> Result<Place> {
    let place = Place::new("restore")?;
    let shape = Shape { vcpus: 1, memory_mib, work: "tick", tracked: false };
    let mut machine = Machine::started(monitor, "source", shape)?;
    machine.line("tick")?;
    machine.pause()?;
    machine.save(&place, false)?;
    Ok(place)
}

fn rounds(plan: &Plan, monitor: &Monitor, place: &Place, fields: &Value) -> Result<Vec<Cost>> {
    // The first, not counted, brings programs and libraries into memory.
    (0..=plan.rounds).map(|_| load(monitor, place, fields)).skip(1).collect()
}

fn load(monitor: &Monitor, place: &Place, fields: &Value) -> Result<Cost> {
    let mut machine = Machine::idle(monitor, "copy")?;
    let id = machine.id();
    let served = process::cpu(id)?;
    machine.load(place, fields.clone())?;
    let (loaded, loaded_faults) = (process::cpu(id)?, process::faults(id)?);
    machine.resume()?;
    machine.line("tick")?;
    let (line, line_faults) = (process::cpu(id)?, process::faults(id)?);
    Ok(Cost { served, loaded, line, loaded_faults, line_faults })
}

fn report(place: &str, plan: &Plan, found: &[Found]) -> Report {
    let mut report = Report::new("Restore: 1 vCPU, 256 MiB, memory file in the page cache", place);
    let Some((ours, peers)) = found.split_first() else { return report };
    type Part = (&'static str, &'static str, fn(&Cost) -> f64, f64);
    let parts: [Part; 4] = [
        ("exec to loaded", "us", |cost| cost.loaded, 0.4),
        ("faults to loaded", "1", |cost| cost.loaded_faults, f64::INFINITY),
        ("exec to the guest's first line", "us", |cost| cost.line, 0.6),
        ("faults to the first line", "1", |cost| cost.line_faults, 0.6),
    ];
    let middle =
        |costs: &[Cost], part: fn(&Cost) -> f64| report::median(&costs.iter().map(part).collect::<Vec<_>>());
    for (name, unit, part, most) in parts {
        let own = Figure::new(name, unit, middle(&ours.small, part));
        if peers.is_empty() {
            report.figures.push(own.clone());
        }
        for (peer, monitor) in peers.iter().zip(plan.monitors.iter().skip(1)) {
            let beside = own.clone().beside(&monitor.name, middle(&peer.small, part));
            let target = most.is_finite().then_some(Target::RatioAtMost(most));
            report.figures.push(Figure { target, ..beside });
        }
    }
    let small = |part| middle(&ours.small, part);
    let large = |part| middle(&ours.large, part);
    let set = |part| middle(&ours.remembered, part);
    report.figures.extend([
        Figure::new("8 GiB: exec to loaded", "us", large(|c| c.loaded))
            .beside("256 MiB", small(|c| c.loaded))
            .target(Target::RatioAtMost(1.2)),
        Figure::new("8 GiB: exec to the first line", "us", large(|c| c.line))
            .beside("256 MiB", small(|c| c.line))
            .target(Target::RatioAtMost(1.2)),
        Figure::new("working set: faults to the first line", "1", set(|c| c.line_faults))
            .beside("without", small(|c| c.line_faults))
            .target(Target::RatioAtMost(0.1)),
        Figure::new("working set: exec to the first line", "us", set(|c| c.line))
            .beside("without", small(|c| c.line)),
    ]);
    for (one, monitor) in found.iter().zip(&plan.monitors) {
        report.notes.push(format!(
            "{}: served {:.0} us; the snapshot takes {:.0} KiB",
            monitor.name,
            middle(&one.small, |cost| cost.served),
            one.bytes / 1024.0
        ));
        report.programs.push(monitor.into());
    }
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_is_compared_with_peers_and_with_itself() {
        let monitor = |name: &str| Monitor { name: name.to_owned(), version: String::new(), command: vec![] };
        let cost = |loaded: f64| Cost { loaded, line: loaded * 3.0, line_faults: 100.0, ..Cost::default() };
        let plan =
            Plan { copies: Vec::new(), monitors: vec![monitor("nacelle"), monitor("other")], rounds: 1 };
        let few = Cost { line_faults: 9.0, ..cost(3.0) };
        let ours = Found {
            small: vec![cost(3.0)],
            large: vec![cost(4.0)],
            remembered: vec![few],
            ..Found::default()
        };
        let other = Found { small: vec![cost(9.0)], ..Found::default() };
        let report = report("here", &plan, &[ours, other]);
        let met: Vec<_> = report.figures.iter().filter_map(Figure::is_met).collect();
        assert_eq!(met, [true, true, false, false, false, true]);
    }
}
