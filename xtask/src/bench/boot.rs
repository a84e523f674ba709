//! `bench boot`: exec -> guest init -> exit, with the same kernel, initrd and command line for
//! every monitor, in instructions where the host cannot run guests.
//!
//! The guest's init ends the machine at once by `reboot -f`, which with `reboot=t` is a triple
//! fault: every monitor takes that as the end. What is measured is processor time of the whole
//! process, guest included, from exec until the kernel has taken everything back, because a
//! machine that is taken down slowly was not cheap either. Exits are counted in a run of their
//! own, since recording them costs time.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use flate2::{Compression, write::GzEncoder};
use serde::{Deserialize, Serialize};

use super::{
    Arguments,
    inside::{self, Copies, Copy, Monitor, PLACE, words},
    report::{self, Figure, Report, Target},
    spent::{self, Spent},
    trace::{self, Exits},
};
use crate::{host, kernel, lab};

/// One command line for all. The monitors that would add `pci=off` find it there.
const COMMAND_LINE: &str =
    "quiet loglevel=0 tsc=reliable reboot=t panic=-1 8250.nr_uarts=0 pci=off rdinit=/init";
const MEMORY_MIB: u32 = 256;
const INIT: &str = "#!/bin/busybox sh\nexec /bin/busybox reboot -f\n";
/// QEMU's small machine as it comes, and with everything off that can be.
const QEMU: [(&str, &str); 2] = [
    ("qemu-microvm", "microvm"),
    ("qemu-microvm-bare", "microvm,x-option-roms=off,pit=off,pic=off,rtc=off,isa-serial=off,acpi=off"),
];
const QEMU_FLAGS: &str = "-accel kvm -cpu host -smp 1 -nodefaults -no-user-config -no-reboot -display none";
/// The longest one boot may take where time is time.
const LIMIT: Duration = Duration::from_secs(60);

/// What is to be measured inside: made outside, read inside.
#[derive(Debug, Serialize, Deserialize)]
struct Plan {
    copies: Vec<Copy>,
    monitors: Vec<Monitor>,
    rounds: u32,
}

/// What was found inside, one entry for each monitor of the plan.
#[derive(Debug, Serialize, Deserialize)]
struct Found {
    spent: Vec<Spent>,
    exits: Exits,
}

/// Measures and reports.
pub fn run(arguments: &Arguments) -> Result<Report> {
    host::need("bench boot", &host::LAB_PACKAGES)?;
    host::need("bench boot", &host::RUN_PACKAGES)?;
    let work = tempfile::tempdir().context("Cannot make a folder for the machine's files")?;
    let plan = plan(arguments, work.path())?;
    let (found, place) = inside::have_measured("boot", &plan, measure)?;
    Ok(report(place, &plan, &found))
}

/// The part that runs in the lab.
pub fn inside(plan: &Path) -> Result<u8> {
    inside::inside(plan, measure)
}

fn plan(arguments: &Arguments, work: &Path) -> Result<Plan> {
    let place = Path::new(PLACE);
    let nacelle = arguments.nacelle()?;
    let kernel = kernel::built().context("There is no kernel yet; make it with: cargo xtask kernel")?;
    let busybox = host::find_program("busybox").context("There is no busybox")?;
    let initrd = work.join("initrd.gz");
    fs::write(&initrd, init_archive(&fs::read(busybox)?)?)?;
    let mut copies = vec![
        (kernel.join("vmlinux"), place.join("vmlinux")),
        (initrd, place.join("initrd.gz")),
        (nacelle.clone(), place.join("nacelle")),
    ];
    for (name, serial) in [("nacelle.json", true), ("peer.json", false)] {
        fs::write(work.join(name), configuration(serial).to_string())?;
        copies.push((work.join(name), place.join(name)));
    }
    let mut monitors = vec![Monitor {
        name: "nacelle".to_owned(),
        version: report::version(&nacelle),
        command: words(&format!("{PLACE}/nacelle vmm --no-api --config-file {PLACE}/nacelle.json")),
    }];
    let (peers, programs) = inside::peers(arguments, &format!("--no-api --config-file {PLACE}/peer.json"))?;
    monitors.extend(peers);
    copies.extend(programs);
    for (name, machine) in QEMU {
        monitors.push(qemu(name, machine)?);
    }
    Ok(Plan { copies, monitors, rounds: arguments.rounds })
}

fn qemu(name: &str, machine: &str) -> Result<Monitor> {
    let program = host::find_program("qemu-system-x86_64").context("There is no qemu-system-x86_64")?;
    let mut command = vec![program.to_string_lossy().into_owned(), "-M".to_owned(), machine.to_owned()];
    command.extend(words(QEMU_FLAGS));
    command
        .extend(words(&format!("-m {MEMORY_MIB} -kernel {PLACE}/vmlinux -initrd {PLACE}/initrd.gz -append")));
    command.push(COMMAND_LINE.to_owned());
    Ok(Monitor { name: name.to_owned(), version: report::version(&program), command })
}

/// The machine, for nacelle with the field that switches the serial port off.
fn configuration(serial: bool) -> serde_json::Value {
    let mut machine = serde_json::json!({
        "boot-source": {
            "kernel_image_path": format!("{PLACE}/vmlinux"),
            "initrd_path": format!("{PLACE}/initrd.gz"),
            "boot_args": COMMAND_LINE,
        },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": MEMORY_MIB },
        "drives": [],
    });
    if serial {
        machine["serial"] = serde_json::json!({ "mode": "off" });
    }
    machine
}

/// A gzip'd cpio archive whose init ends the machine.
fn init_archive(busybox: &[u8]) -> Result<Vec<u8>> {
    let mut archive = lab::Archive::new();
    for folder in ["bin", "dev"] {
        archive.directory(folder);
    }
    archive.device("dev/console", 5, 1);
    archive.file("bin/busybox", busybox);
    archive.file("init", INIT.as_bytes());
    let mut gzip = GzEncoder::new(Vec::new(), Compression::best());
    gzip.write_all(&archive.finish())?;
    Ok(gzip.finish()?)
}

fn measure(plan: &Plan) -> Result<Vec<Found>> {
    let _copies = Copies::made(&plan.copies)?;
    let mut found: Vec<Found> = plan
        .monitors
        .iter()
        .map(|monitor| {
            // The first run, not counted, also brings the program's libraries into memory.
            run_once(monitor)?;
            let exits = trace::record(|| run_once(monitor).map(drop))?;
            Ok(Found { spent: Vec::new(), exits })
        })
        .collect::<Result<_>>()?;
    for _ in 0..plan.rounds {
        for (monitor, found) in plan.monitors.iter().zip(&mut found) {
            found.spent.push(run_once(monitor)?);
        }
    }
    Ok(found)
}

fn run_once(monitor: &Monitor) -> Result<Spent> {
    let (program, arguments) = monitor.command.split_first().context("An empty command")?;
    let limit = env::var_os("NACELLE_LAB").is_none().then_some(LIMIT);
    spent::run(Command::new(program).args(arguments), limit)
}

fn report(place: &str, plan: &Plan, found: &[Found]) -> Report {
    let mut report = Report::new("Boot: exec -> guest init -> exit, 1 vCPU, 256 MiB, no serial port", place);
    let middle = |found: &Found, part: fn(&Spent) -> f64| {
        report::median(&found.spent.iter().map(part).collect::<Vec<_>>())
    };
    let Some((ours, peers)) = found.split_first() else { return report };
    for (peer, monitor) in peers.iter().zip(&plan.monitors[1..]) {
        let least = if monitor.name.starts_with("qemu") { 0.5 } else { 0.95 };
        let whole = Figure::new("processor time", "ms", middle(ours, Spent::cpu) / 1e3)
            .beside(&monitor.name, middle(peer, Spent::cpu) / 1e3)
            .target(Target::RatioAtMost(least));
        let mut row = |name: &str, ours: f64, theirs: f64| {
            report.figures.push(Figure::new(name, "1", ours).beside(&monitor.name, theirs));
        };
        row("exits", ours.exits.total() as f64, peer.exits.total() as f64);
        row("exits to the monitor", ours.exits.handed() as f64, peer.exits.handed() as f64);
        row("page faults", middle(ours, |spent| spent.faults), middle(peer, |spent| spent.faults));
        report.figures.push(whole);
    }
    report.figures.push(
        Figure::new("exits to the monitor", "1", ours.exits.handed() as f64).target(Target::AtMost(35.0)),
    );
    for (found, monitor) in found.iter().zip(&plan.monitors) {
        report.notes.push(format!(
            "{}: {:.2} ms user and guest, {:.2} ms system; runs: {}\n  exits: {}\n  to the monitor: {}",
            monitor.name,
            middle(found, |spent| spent.user) / 1e3,
            middle(found, |spent| spent.system) / 1e3,
            found
                .spent
                .iter()
                .map(|spent| format!("{:.2} ms", spent.cpu() / 1e3))
                .collect::<Vec<_>>()
                .join(", "),
            listed(&found.exits.all),
            listed(&found.exits.userspace),
        ));
        report.programs.push(monitor.into());
    }
    report
}

fn listed(counts: &BTreeMap<String, u64>) -> String {
    let mut sorted: Vec<_> = counts.iter().collect();
    sorted.sort_by(|a, b| b.1.cmp(a.1));
    sorted.iter().map(|(name, count)| format!("{count} {name}")).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_nacelles_machine_names_the_serial_port() {
        assert!(configuration(true).get("serial").is_some());
        assert!(configuration(false).get("serial").is_none());
    }

    #[test]
    fn the_archive_is_compressed_and_starts_as_the_kernel_expects() {
        use std::io::Read;
        let mut plain = Vec::new();
        let packed = init_archive(b"program").unwrap();
        flate2::read::GzDecoder::new(&packed[..]).read_to_end(&mut plain).unwrap();
        assert!(plain.starts_with(b"070701"));
        assert!(plain.windows(INIT.len()).any(|part| part == INIT.as_bytes()));
    }

    #[test]
    fn counts_are_listed_from_the_largest() {
        let counts = BTreeMap::from([("a".to_owned(), 1), ("b".to_owned(), 3)]);
        assert_eq!(listed(&counts), "3 b, 1 a");
    }
}
