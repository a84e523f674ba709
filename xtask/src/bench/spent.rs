//! What a program cost, from its start to its end.

use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// Processor time and page faults of one process, all of its threads included. The time a
/// guest ran is part of `user`.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Spent {
    /// Microseconds in user mode and in guests.
    pub user: f64,
    /// Microseconds in the kernel.
    pub system: f64,
    /// Microseconds of wall time.
    pub wall: f64,
    /// Page faults that needed no reading.
    pub faults: f64,
}

impl Spent {
    /// Microseconds of processor time.
    pub fn cpu(&self) -> f64 {
        self.user + self.system
    }
}

/// Runs `command` to its end and says what it cost. No other child of this process may end in
/// the meantime. Where time is counted in instructions there can be no `limit`: the clock runs
/// ahead to the next alarm whenever the machine waits.
pub fn run(command: &mut Command, limit: Option<Duration>) -> Result<Spent> {
    let name = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let (before, start) = (children(), Instant::now());
    let mut child = command.spawn().with_context(|| format!("Cannot run {name}"))?;
    let status = wait(&mut child, limit).with_context(|| format!("Cannot wait for {name}"))?;
    let (after, wall) = (children(), start.elapsed());
    if !status.success() {
        bail!("{name} ended with {status}");
    }
    Ok(Spent {
        user: after.user - before.user,
        system: after.system - before.system,
        wall: wall.as_secs_f64() * 1e6,
        faults: after.faults - before.faults,
    })
}

/// Waits for the end without waking up before it: a parent that polls would take part in what
/// is measured. An alarm ends a child that takes longer than `limit`.
fn wait(child: &mut Child, limit: Option<Duration>) -> Result<ExitStatus> {
    let alarm = |seconds: u64| {
        // SAFETY: a number only; the alarm's default action ends this process.
        unsafe { libc::alarm(u32::try_from(seconds).unwrap_or(u32::MAX)) };
    };
    if let Some(limit) = limit {
        alarm(limit.as_secs());
    }
    let status = child.wait();
    alarm(0);
    Ok(status?)
}

/// What all children waited for so far cost.
fn children() -> Spent {
    // SAFETY: plain numbers, for which all zeroes is a value; the call fills what it is given.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage);
        usage
    };
    let microseconds = |time: libc::timeval| time.tv_sec as f64 * 1e6 + time.tv_usec as f64;
    Spent {
        user: microseconds(usage.ru_utime),
        system: microseconds(usage.ru_stime),
        wall: 0.0,
        faults: usage.ru_minflt as f64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_works_costs_more_than_one_that_sleeps() {
        let limit = Some(Duration::from_secs(60));
        let shell = |script: &str| run(Command::new("sh").args(["-c", script]), limit);
        let sleeps = shell("sleep 0.1").unwrap();
        let works = shell("i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done").unwrap();
        assert!(works.cpu() > sleeps.cpu(), "{works:?} {sleeps:?}");
        assert!(sleeps.wall > 90_000.0 && sleeps.cpu() < sleeps.wall, "{sleeps:?}");
        assert!(shell("exit 3").is_err());
    }
}
