//! `bench start`: what a machine costs before its guest does anything, and what an idle one
//! keeps: system calls and processor time from exec to the first `KVM_RUN`, memory beside the
//! guest's, threads and descriptors.

use std::fs;
use std::process::{Child, Command};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::{
    Arguments,
    machine::{self, Bench, Tap},
    report::{self, Figure, Program, Report, Target},
    spent,
};
use crate::host;

const LIMIT: Duration = Duration::from_secs(30);
/// How long a machine stands before its memory is looked at: longer than it takes to give back what
/// only its start needed.
const SETTLE: Duration = Duration::from_millis(1500);
const MANY: u32 = 32;

/// Measures and reports.
pub fn run(arguments: &Arguments) -> Result<Report> {
    host::need("bench start", &host::BENCH_PACKAGES)?;
    let bench = Bench::new(arguments)?;
    let tap = Tap::new()?;
    let devices = devices(&bench, &tap)?;
    let mut report =
        Report::new("Start and standing cost: 1 vCPU, a disk, a network card, vsock", "directly");
    let calls = calls_before_run(&bench, &devices)?;
    report
        .figures
        .push(Figure::new("system calls to the first KVM_RUN", "1", calls).target(Target::AtMost(150.0)));
    let (mut cpu, mut first) = (Vec::new(), Vec::new());
    for _ in 0..arguments.rounds {
        forget_sockets(&bench);
        let mut command = bench.command(1, "work=end", &devices)?;
        cpu.push(spent::run(command.stderr(std::process::Stdio::null()), Some(LIMIT))?.cpu());
        forget_sockets(&bench);
        let counters = bench.counters("work=end", &devices, LIMIT)?;
        first.extend(counters.get("first_run").copied());
    }
    report.figures.push(Figure::new("processor time, exec to exit", "us", report::median(&cpu)));
    report.figures.push(Figure::new("main() to the first KVM_RUN", "us", report::median(&first)));
    let one = idle(&bench, 1, &devices)?;
    let many = idle(&bench, MANY, &devices)?;
    let mib = |kib: f64| kib / 1024.0;
    // The program's own pages, which come in clusters and are the same for all, left out.
    let each = (many.anonymous - one.anonymous) / f64::from(MANY - 1);
    report.figures.extend([
        Figure::new("resident beside guest memory", "MiB", mib(one.resident)).target(Target::AtMost(3.0)),
        Figure::new("proportional share", "MiB", mib(one.shared)),
        Figure::new("private", "MiB", mib(one.private)),
        Figure::new("anonymous, so never shared", "MiB", mib(one.anonymous)),
        Figure::new("anonymous for each further vCPU", "KiB", each).target(Target::AtMost(24.0)),
        Figure::new("threads", "1", one.threads),
        Figure::new("descriptors", "1", one.descriptors),
    ]);
    report.programs.push(Program {
        name: "nacelle".to_owned(),
        version: report::version(&bench.nacelle),
        command: vec![format!("vmm --no-api --show-counters --config-file, {devices}")],
    });
    Ok(report)
}

fn devices(bench: &Bench, tap: &Tap) -> Result<Value> {
    let disk = bench.place.path().join("disk");
    fs::File::create(&disk)?.set_len(16 << 20)?;
    Ok(json!({
        "drives": [{ "drive_id": "disk", "path_on_host": disk, "is_root_device": false }],
        "network-interfaces": [{ "iface_id": "card", "host_dev_name": tap.0 }],
        "vsock": { "guest_cid": 3, "uds_path": bench.place.path().join("vsock") },
    }))
}

/// A machine that was killed leaves its socket; the next one would stumble over it.
fn forget_sockets(bench: &Bench) {
    let _ = fs::remove_file(bench.place.path().join("vsock"));
}

/// System calls of all threads before the first `KVM_RUN`, execve included.
fn calls_before_run(bench: &Bench, devices: &Value) -> Result<f64> {
    forget_sockets(bench);
    let log = bench.place.path().join("calls");
    let traced = bench.command(1, "work=end", devices)?;
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-o"]).arg(&log).arg(traced.get_program()).args(traced.get_args());
    host::run(&mut command)?;
    let text = fs::read_to_string(&log)?;
    let calls = text.lines().take_while(|line| !line.contains("KVM_RUN"));
    let count = calls.filter(|line| is_call(line)).count();
    if count == 0 || !text.contains("KVM_RUN") {
        bail!("strace saw no KVM_RUN");
    }
    Ok(count as f64)
}

/// Whether a line of strace is a call's beginning, and no signal, end or second half.
fn is_call(line: &str) -> bool {
    let call = line.split_once(' ').map_or(line, |(_, call)| call.trim_start());
    call.contains('(') && !call.starts_with(['<', '-', '+'])
}

/// What an idle machine has; memory in KiB beside the guest's.
struct Idle {
    resident: f64,
    shared: f64,
    private: f64,
    anonymous: f64,
    threads: f64,
    descriptors: f64,
}

fn idle(bench: &Bench, vcpus: u32, devices: &Value) -> Result<Idle> {
    forget_sockets(bench);
    let mut child = bench.command(vcpus, "work=idle", devices)?.spawn().context("Cannot run nacelle")?;
    thread::sleep(SETTLE);
    let idle = look_at(&mut child);
    child.kill()?;
    child.wait()?;
    idle
}

fn look_at(child: &mut Child) -> Result<Idle> {
    if let Some(status) = child.try_wait()? {
        bail!("The idle machine ended with {status}");
    }
    let place = format!("/proc/{}", child.id());
    let entries = |name: &str| -> Result<f64> { Ok(fs::read_dir(format!("{place}/{name}"))?.count() as f64) };
    let [resident, shared, private, anonymous] = beside_guest(&fs::read_to_string(format!("{place}/smaps"))?);
    Ok(Idle { resident, shared, private, anonymous, threads: entries("task")?, descriptors: entries("fd")? })
}

/// Resident, proportional, private and anonymous KiB of all mappings but the guest's memory,
/// which is known by its size.
fn beside_guest(smaps: &str) -> [f64; 4] {
    let mut sums = [0.0; 4];
    let mut is_guest = false;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(name), Some(value)) =
            (words.next(), words.next().and_then(|word| word.parse::<f64>().ok()))
        else {
            continue;
        };
        match name {
            "Size:" => is_guest = value >= (machine::MEMORY_MIB << 10) as f64 && !is_reservation(value),
            _ if is_guest => {}
            "Rss:" => sums[0] += value,
            "Pss:" => sums[1] += value,
            "Private_Clean:" | "Private_Dirty:" => sums[2] += value,
            "Anonymous:" => sums[3] += value,
            _ => {}
        }
    }
    sums
}

/// The allocator reserves address space of up to this many KiB for each thread, of which it
/// uses little; what is used lies in a mapping of its own.
fn is_reservation(kib: f64) -> bool {
    kib > (machine::MEMORY_MIB << 10) as f64 + 4096.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_halves_signals_and_ends_are_no_calls() {
        assert!(is_call("12 ioctl(7, KVM_CREATE_VM, 0) = 8"));
        assert!(is_call("12 poll([{fd=4}], 2, -1 <unfinished ...>"));
        assert!(!is_call("12 <... poll resumed>) = 1"));
        assert!(!is_call("12 --- SIGRT_2 {si_signo=SIGRT_2} ---"));
        assert!(!is_call("12 +++ exited with 0 +++"));
    }

    #[test]
    fn the_guests_own_memory_is_left_out() {
        let smaps = "a\nSize: 65536 kB\nRss: 5000 kB\nPss: 5000 kB\nPrivate_Dirty: 5000 kB\n\
                     b\nSize: 100 kB\nRss: 40 kB\nPss: 30 kB\nPrivate_Clean: 8 kB\nPrivate_Dirty: 12 kB\n\
                     Anonymous: 4 kB\n";
        assert_eq!(beside_guest(smaps), [40.0, 30.0, 20.0, 4.0]);
    }
}
