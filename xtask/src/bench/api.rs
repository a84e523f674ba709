//! `bench api`: what the API costs: until it is served, for a question on an open connection, and
//! for the call that starts a machine, beside peers that speak the same API.
//!
//! What is measured is processor time of the monitor's process, as the kernel's scheduler counts it, so the client's part is left out. The start is that of a machine of 1 vCPU and 256 MiB with
//! vsock and entropy devices and the small kernel; what its vCPU has already done when the answer
//! is read counts with it, for all monitors alike.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use api::client::Client;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    Arguments,
    inside::{self, Copies, Copy, Monitor, PLACE, words},
    process,
    report::{self, Figure, Report, Target},
};
use crate::{host, kernel};

/// Questions on one connection.
const QUESTIONS: u32 = 500;
/// How long a monitor that was started is left alone before its cost is read.
const REST: Duration = Duration::from_millis(200);
/// How long a monitor may take to serve.
const LIMIT: Duration = Duration::from_secs(30);

/// What is to be measured.
#[derive(Debug, Serialize, Deserialize)]
struct Plan {
    copies: Vec<Copy>,
    monitors: Vec<Monitor>,
    rounds: u32,
}

/// What one monitor cost in one round, in microseconds.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Cost {
    ready: f64,
    question: f64,
    start: f64,
}

/// Measures and reports.
pub fn run(arguments: &Arguments) -> Result<Report> {
    host::need("bench api", &host::LAB_PACKAGES)?;
    let plan = plan(arguments)?;
    let (found, place) = inside::have_measured("api", &plan, measure)?;
    Ok(report(place, &plan, &found))
}

/// The part that runs in the lab.
pub fn inside(plan: &Path) -> Result<u8> {
    inside::inside(plan, measure)
}

fn plan(arguments: &Arguments) -> Result<Plan> {
    let place = Path::new(PLACE);
    let nacelle = arguments.nacelle()?;
    let kernel = kernel::built().context("There is no kernel yet; make it with: cargo xtask kernel")?;
    let (peers, programs) = inside::peers(arguments, &format!("--api-sock {PLACE}/api"))?;
    let own = Monitor {
        name: "nacelle".to_owned(),
        version: report::version(&nacelle),
        command: words(&format!("{PLACE}/nacelle vmm --api-sock {PLACE}/api")),
    };
    let mut copies = vec![(kernel.join("vmlinux"), place.join("vmlinux")), (nacelle, place.join("nacelle"))];
    copies.extend(programs);
    let monitors = [own].into_iter().chain(peers).collect();
    Ok(Plan { copies, monitors, rounds: arguments.rounds })
}

/// For each monitor its cost in each round.
fn measure(plan: &Plan) -> Result<Vec<Vec<Cost>>> {
    let _copies = Copies::made(&plan.copies)?;
    let mut found = vec![Vec::new(); plan.monitors.len()];
    // The first round, not counted, brings programs and libraries into memory.
    for round in 0..=plan.rounds {
        for (monitor, costs) in plan.monitors.iter().zip(&mut found) {
            let cost = cost(monitor).with_context(|| format!("{} failed", monitor.name))?;
            if round > 0 {
                costs.push(cost);
            }
        }
    }
    Ok(found)
}

/// A monitor that is ended with this.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        for name in ["api", "vsock"] {
            let _ = fs::remove_file(Path::new(PLACE).join(name));
        }
    }
}

fn cost(monitor: &Monitor) -> Result<Cost> {
    let (program, arguments) = monitor.command.split_first().context("An empty command")?;
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let served = Served(command.spawn().with_context(|| format!("Cannot run {program}"))?);
    let id = served.0.id();
    let socket = Path::new(PLACE).join("api");
    let begun = Instant::now();
    while !socket.exists() {
        if begun.elapsed() > LIMIT {
            bail!("It serves no API");
        }
        thread::sleep(Duration::from_millis(1));
    }
    thread::sleep(REST);
    let ready = process::cpu(id)?;
    let mut client = Client::unix(&socket);
    let _: Value = client.get("/")?;
    let before = process::cpu(id)?;
    for _ in 0..QUESTIONS {
        let _: Value = client.get("/")?;
    }
    let question = (process::cpu(id)? - before) / f64::from(QUESTIONS);
    for (path, body) in [
        ("/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": 256 })),
        (
            "/boot-source",
            json!({ "kernel_image_path": format!("{PLACE}/vmlinux"),
                    "boot_args": "quiet loglevel=0 panic=-1 reboot=k" }),
        ),
        ("/vsock", json!({ "guest_cid": 3, "uds_path": format!("{PLACE}/vsock") })),
        ("/entropy", json!({})),
    ] {
        let _: Value = client.put(path, Some(&body))?;
    }
    let before = process::cpu(id)?;
    let _: Value = client.put("/actions", Some(&json!({ "action_type": "InstanceStart" })))?;
    let start = process::cpu(id)? - before;
    Ok(Cost { ready, question, start })
}

fn report(place: &str, plan: &Plan, found: &[Vec<Cost>]) -> Report {
    let mut report = Report::new("API: processor time of the monitor", place);
    let middle =
        |costs: &[Cost], part: fn(&Cost) -> f64| report::median(&costs.iter().map(part).collect::<Vec<_>>());
    type Part = (&'static str, fn(&Cost) -> f64, f64);
    // What is asked of the ratio to Firecracker.
    let parts: [Part; 3] = [
        ("exec to a served socket", |cost| cost.ready, 0.6),
        ("GET / on an open connection", |cost| cost.question, 0.5),
        ("InstanceStart", |cost| cost.start, 0.5),
    ];
    let Some((ours, peers)) = found.split_first() else { return report };
    for (name, part, most) in parts {
        let own = Figure::new(name, "us", middle(ours, part));
        if peers.is_empty() {
            report.figures.push(own.clone());
        }
        for (peer, monitor) in peers.iter().zip(&plan.monitors[1..]) {
            let beside = own.clone().beside(&monitor.name, middle(peer, part));
            report.figures.push(beside.target(Target::RatioAtMost(most)));
        }
    }
    for (costs, monitor) in found.iter().zip(&plan.monitors) {
        let runs = costs.iter().map(|cost| format!("{:.0}", cost.start)).collect::<Vec<_>>().join(", ");
        report.notes.push(format!("{}: InstanceStart {runs} us", monitor.name));
        report.programs.push(monitor.into());
    }
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_peer_there_are_figures_and_no_targets() {
        let monitor = |name: &str| Monitor { name: name.to_owned(), version: String::new(), command: vec![] };
        let cost = Cost { ready: 2.0, question: 1.0, start: 4.0 };
        let mut plan = Plan { copies: Vec::new(), monitors: vec![monitor("nacelle")], rounds: 1 };
        assert!(report("here", &plan, &[vec![cost]]).figures.iter().all(|f| f.is_met().is_none()));
        plan.monitors.push(monitor("other"));
        let other = Cost { ready: 4.0, question: 2.0, start: 7.0 };
        let both = report("here", &plan, &[vec![cost], vec![other]]);
        let met: Vec<_> = both.figures.iter().map(Figure::is_met).collect();
        assert_eq!(met, [Some(true), Some(true), Some(false)]);
    }
}
