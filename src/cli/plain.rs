//! The keeper of a machine that was made from a specification: no container and no agent in it,
//! just a monitor with its API, which somebody waits for.
//!
//! It counts as started when the monitor answers on its API socket; with a kernel in the
//! specification the machine runs by then, without one it waits to be configured.

use std::{
    os::{fd::AsRawFd, unix::process::ExitStatusExt},
    process::ExitStatus,
    time::{Duration, Instant},
};

use api::client::Client;
use serde_json::Value;

use super::{
    failure::{Failure, Outcome, doing},
    keeper::{self, Attached, Monitor, revive::Revival, steward::Steward},
    state::{End, Machine, ProcessName, now},
};
use crate::signals::{self, Signals};

/// How long the monitor may take to answer that it is there, each time it is asked.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a monitor that was told to end may take.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// Keeps `machine` from its start, or from where a snapshot left it, to its end. `started` is
/// called once its API answers. Returns the monitor's exit code; an error means that it did not
/// start.
pub fn keep(machine: &mut Machine, revival: Option<Revival>, started: &dyn Fn()) -> Outcome<u8> {
    let signals = doing(Signals::block(&signals::ENDING), || "Signals cannot be set up".to_owned())?;
    let begun = match revival {
        Some(revival) => Ok(revival.load(machine, &signals)?),
        None => begin(machine, &signals),
    };
    let outcome = begun.and_then(|monitor| attend(machine, monitor, &signals, started));
    match outcome {
        Ok(_) if machine.suspended().exists() => keeper::lay_down(machine, Attached::No),
        outcome => keeper::conclude(machine, outcome.map(end_of)),
    }
}

fn begin(machine: &mut Machine, signals: &Signals) -> Outcome<Monitor> {
    machine.record.keeper = ProcessName::of(std::process::id() as i32);
    machine.save()?;
    let mut monitor = Monitor::start(machine, Some(machine.file("config.json")), &[])?;
    machine.record.monitor = ProcessName::of(monitor.child.id() as i32);
    machine.save()?;
    wait_for_api(machine, &mut monitor, signals)?;
    machine.record.started = Some(now());
    machine.save()?;
    Ok(monitor)
}

fn attend(
    machine: &Machine,
    mut monitor: Monitor,
    signals: &Signals,
    started: &dyn Fn(),
) -> Outcome<ExitStatus> {
    let _steward = Steward::start(machine, None)?;
    started();
    let pidfd = monitor.pidfd.as_raw_fd();
    let mut patience = Duration::MAX;
    loop {
        if keeper::readable(&[pidfd], Duration::ZERO) {
            return doing(monitor.child.wait(), || "The monitor cannot be waited for".to_owned());
        }
        if !keeper::readable(&[pidfd, signals.as_raw_fd()], patience) {
            // It was told, and does not end.
            let _ = monitor.child.kill();
        }
        if signals.next().is_some() {
            machine.record.monitor.map(|name| name.signal(libc::SIGTERM));
            patience = END_TIMEOUT;
        }
    }
}

/// Waits until the monitor answers on its API socket.
pub(super) fn wait_for_api(machine: &Machine, monitor: &mut Monitor, signals: &Signals) -> Outcome<()> {
    let limit = keeper::start_timeout();
    let until = Instant::now() + limit;
    let watched = [monitor.pidfd.as_raw_fd(), signals.as_raw_fd()];
    let mut pause = Duration::from_millis(1);
    loop {
        let mut client = Client::unix(machine.api()).patience(ANSWER_TIMEOUT);
        if client.get::<Value>("/healthz").is_ok() {
            return Ok(());
        }
        if keeper::readable(&watched, pause) {
            if let Some(number) = signals.next() {
                let code = 128u8.saturating_add(number as u8);
                return Err(Failure::new(format!("Signal {number} stopped the start")).with_code(code));
            }
            return Err(monitor.explain(Failure::new("The monitor ended before its API answered")));
        }
        if Instant::now() > until {
            let seconds = limit.as_secs();
            return Err(
                monitor.explain(Failure::new(format!("The machine did not start within {seconds} s")))
            );
        }
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

fn end_of(status: ExitStatus) -> End {
    let (exit_code, reason) = match (status.code(), status.signal()) {
        (Some(0), _) => (0, None),
        (Some(code), _) => {
            let code = u8::try_from(code).unwrap_or(u8::MAX);
            (code, Some(format!("The monitor ended with exit code {code}")))
        }
        (None, number) => {
            let number = u8::try_from(number.unwrap_or(0)).unwrap_or(0);
            (128u8.saturating_add(number), Some(format!("The monitor was killed by signal {number}")))
        }
    };
    End { exit_code, reason, at: now() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_has_the_monitors_code_or_that_of_its_signal() {
        let seen = [0, 152 << 8, libc::SIGKILL].map(|raw| end_of(ExitStatus::from_raw(raw)));
        assert_eq!(seen.each_ref().map(|end| end.exit_code), [0, 152, 137]);
        assert_eq!(seen[0].reason, None);
        assert!(seen[2].reason.as_ref().unwrap().contains("signal 9"));
    }
}
