//! nacelle with the bare-metal guest of tests/payload, run directly on this host.
//!
//! The guest spends its time in ring 3, which is as fast as any program even where guest
//! kernel code is emulated, so this needs no lab: only a `/dev/kvm`.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::Arguments;
use crate::{build, host, progress};

/// Where the first virtio device's registers are: the second page of the window.
const FIRST_DEVICE: u64 = 0xc000_1000;
/// The guest's memory: little, since none of it is used.
pub const MEMORY_MIB: u64 = 64;

/// A nacelle and a guest for it.
pub struct Bench {
    /// The monitor.
    pub nacelle: PathBuf,
    payload: PathBuf,
    /// Files of the run, in memory.
    pub place: TempDir,
}

impl Bench {
    /// Builds both.
    pub fn new(arguments: &Arguments) -> Result<Self> {
        if File::options().read(true).write(true).open("/dev/kvm").is_err() {
            bail!("This host has no /dev/kvm that can be opened; run this benchmark in the lab");
        }
        let payload = payload()?;
        let nacelle = arguments.nacelle()?;
        let place = tempfile::Builder::new().prefix("nacelle-bench-").tempdir_in("/dev/shm")?;
        Ok(Self { nacelle, payload, place })
    }

    /// The command that runs the guest with `work` as its command line. `devices` are fields
    /// of the configuration file.
    pub fn command(&self, vcpus: u32, work: &str, devices: &Value) -> Result<Command> {
        let mut machine = json!({
            "boot-source": { "kernel_image_path": self.payload, "boot_args": work },
            "machine-config": { "vcpu_count": vcpus, "mem_size_mib": MEMORY_MIB },
            "serial": { "mode": "off" },
        });
        for (name, value) in devices.as_object().into_iter().flatten() {
            machine[name] = value.clone();
        }
        let path = self.place.path().join("machine.json");
        fs::write(&path, machine.to_string())?;
        let mut command = Command::new(&self.nacelle);
        command.args(["vmm", "--no-api", "--show-counters", "--config-file"]).arg(path);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        // SAFETY: prctl is async-signal-safe; the numbers are constants.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        Ok(command)
    }

    /// Runs the guest to its end and gives the monitor's counters of its first device.
    pub fn counters(&self, work: &str, devices: &Value, limit: Duration) -> Result<HashMap<String, f64>> {
        let log = self.place.path().join("counters");
        let mut child = self
            .command(1, work, devices)?
            .stderr(File::create(&log)?)
            .spawn()
            .context("Cannot run nacelle")?;
        let ended = end_within(&mut child, limit);
        let text = fs::read_to_string(&log)?;
        ended.with_context(|| format!("The guest with {work:?}: {}", text.trim()))?;
        Ok(counters_of(&text))
    }
}

/// The words of a command line that say where the first device is.
pub fn base() -> String {
    format!("base={FIRST_DEVICE}")
}

/// Waits for the end of `child`, which is killed when it takes longer than `limit`.
pub fn end_within(child: &mut Child, limit: Duration) -> Result<()> {
    let start = Instant::now();
    loop {
        match child.try_wait()? {
            Some(status) if status.success() => return Ok(()),
            Some(status) => bail!("nacelle ended with {status}"),
            None if start.elapsed() > limit => {
                child.kill()?;
                child.wait()?;
                bail!("nacelle did not end within {} s", limit.as_secs());
            }
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn counters_of(text: &str) -> HashMap<String, f64> {
    let counter = |line: &str| {
        let mut words = line.split_whitespace();
        match words.next()? {
            "device" => words.next().map(drop)?,
            "milestone" => {}
            _ => return None,
        }
        Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
    };
    text.lines().filter_map(counter).collect()
}

/// What distorts figures of a guest on this host, if anything does.
pub fn caveat() -> Option<String> {
    (!host::has_hardware_virtualization()).then(|| {
        "This host emulates what leaves the guest: a doorbell costs some hundred microseconds here, so \
         figures with one request at a time say little about the monitor."
            .to_owned()
    })
}

/// Builds the guest.
fn payload() -> Result<PathBuf> {
    let source = build::repository().join("tests/payload");
    let target = build::own_program()?;
    let target =
        target.parent().map(Path::to_owned).context("This program lies in no folder")?.join("payload");
    progress::step_of_program(
        "Building the bare-metal guest",
        build::cargo()
            .args(["build", "--release", "--quiet"])
            .current_dir(&source)
            .env_remove("RUSTFLAGS")
            .env("CARGO_TARGET_DIR", &target),
    )?;
    Ok(target.join("x86_64-unknown-linux-gnu/release/payload"))
}

/// Ticks of the time stamp counter in a second, measured.
pub fn ticks_per_second() -> f64 {
    // SAFETY: reads a register.
    let ticks = || unsafe { std::arch::x86_64::_rdtsc() };
    let (start, first) = (Instant::now(), ticks());
    std::thread::sleep(Duration::from_millis(100));
    (ticks() - first) as f64 / start.elapsed().as_secs_f64()
}

/// A tap device that is there while this is.
pub struct Tap(pub String);

impl Tap {
    /// Makes one, up, with a name of this process.
    pub fn new() -> Result<Self> {
        let tap = Tap(format!("nacb{}", std::process::id()));
        let ip = |words: &str| host::run(Command::new("ip").args(words.split(' ')));
        ip(&format!("tuntap add dev {} mode tap vnet_hdr", tap.0))?;
        ip(&format!("link set dev {} up", tap.0))?;
        Ok(tap)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", "dev", &self.0]).status();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_by_name() {
        let counters = counters_of("milestone ended 7 us\nexits mmio 3\ndevice d reads 12\nnoise\n");
        assert_eq!(counters.len(), 2);
        assert_eq!((counters["reads"], counters["ended"]), (12.0, 7.0));
    }
}
