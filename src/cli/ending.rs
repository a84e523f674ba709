//! Bringing a machine to its end, from the gentlest way to the one that cannot fail.
//!
//! ```text
//!   signal to the main process, by the agent      the command ends as it likes
//!   SIGKILL to the main process, by the agent     the command ends, disks are written
//!   SIGKILL to the monitor                        the machine ends as if unplugged
//!   SIGKILL to the keeper                         nobody is left; the machine is dead
//! ```
//!
//! The end is over when the keeper has written it down (or, for a machine that is removed at
//! its end, removed it). Each step has a limit, after which the next one is taken.

use std::{
    thread,
    time::{Duration, Instant},
};

use guest::{client::ClientError, protocol::MAIN};

use super::{
    failure::{Failure, Outcome},
    state::{Machine, ProcessName, Status},
};

/// Longest wait for a quick answer of the agent before it counts as lost.
const AGENT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait, after the command was killed, until disks are written and the end is recorded.
const AFTER_KILL: Duration = Duration::from_secs(30);
/// Longest wait for the keeper to record that its monitor is gone.
const AFTER_MONITOR: Duration = Duration::from_secs(15);
/// Longest wait for the kernel to take a killed keeper away.
const AFTER_KEEPER: Duration = Duration::from_secs(5);

/// Whether the machine's processes have nothing to do any more.
pub fn is_over(machine: &mut Machine) -> bool {
    // A record that cannot be read is that of a machine which was removed.
    machine.reload().is_err() || matches!(machine.status(), Status::Exited | Status::Dead)
}

/// Waits until the machine's end is recorded; false when `limit` is over before.
pub fn wait_until_over(machine: &mut Machine, limit: Duration) -> bool {
    let until = Instant::now() + limit;
    // Quick at first: most ends take milliseconds.
    let mut pause = Duration::from_millis(1);
    loop {
        if is_over(machine) {
            return true;
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        thread::sleep(pause.min(left));
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Sends a signal to the main process, or to the monitor of a machine without one.
///
/// Whether it had ended already does not matter here. An error says that the agent could not
/// be asked.
pub fn signal(machine: &Machine, number: i32) -> Outcome<()> {
    if machine.record.plain {
        let sent = machine.record.monitor.is_some_and(|monitor| monitor.signal(number));
        let gone = || Failure::new(format!("The monitor of machine {} is gone", machine.record.name));
        return sent.then_some(()).ok_or_else(gone);
    }
    let door = guest::client::Machine::new(machine.vsock()).with_timeout(AGENT_TIMEOUT);
    match door.control()?.signal(MAIN, number) {
        Err(ClientError::Agent(_)) => Ok(()),
        other => Ok(other?),
    }
}

/// Asks the command to end, and sees to it once `grace` is over.
pub fn stop(machine: &mut Machine, grace: Duration) -> Outcome<()> {
    if is_over(machine) {
        return Ok(());
    }
    if machine.record.status() == Status::Suspended {
        let name = &machine.record.name;
        return Err(Failure::new(format!(
            "Machine {name} is suspended; 'nacelle resume {name}' lets it go on, 'nacelle rm {name}' removes it"
        )));
    }
    if machine.record.status() == Status::Created {
        // There is no command to ask yet, but the keeper listens.
        let keeper = machine.record.keeper.as_ref();
        if keeper.is_some_and(|k| k.signal(libc::SIGTERM)) && wait_until_over(machine, grace) {
            return Ok(());
        }
        return cut_off(machine);
    }
    if machine.record.plain {
        return switch_off(machine, grace);
    }
    match signal(machine, machine.record.stop_signal) {
        Ok(()) if wait_until_over(machine, grace) => Ok(()),
        Ok(()) => kill(machine),
        Err(_) => cut_off(machine),
    }
}

/// Presses the power button of a machine without an agent, and ends it once `grace` is over.
fn switch_off(machine: &mut Machine, grace: Duration) -> Outcome<()> {
    let mut client = api::client::Client::unix(machine.api()).patience(grace.saturating_add(AGENT_TIMEOUT));
    let body = serde_json::json!({ "timeout_s": grace.as_secs() });
    // Answered when the machine has ended; if it could not be asked, the monitor is told.
    if client.put::<serde_json::Value>("/vm/shutdown", Some(&body)).is_err() {
        let _ = signal(machine, libc::SIGTERM);
    }
    if wait_until_over(machine, AFTER_MONITOR) { Ok(()) } else { cut_off(machine) }
}

/// Kills the command; the machine ends in order.
pub fn kill(machine: &mut Machine) -> Outcome<()> {
    if machine.record.plain {
        return cut_off(machine);
    }
    if signal(machine, libc::SIGKILL).is_ok() && wait_until_over(machine, AFTER_KILL) {
        return Ok(());
    }
    cut_off(machine)
}

/// Kills the monitor and, if that does not help, the keeper.
pub fn cut_off(machine: &mut Machine) -> Outcome<()> {
    let signal = |process: &Option<ProcessName>| process.as_ref().is_some_and(|p| p.signal(libc::SIGKILL));
    if is_over(machine) {
        return Ok(());
    }
    if signal(&machine.record.monitor) && wait_until_over(machine, AFTER_MONITOR) {
        return Ok(());
    }
    signal(&machine.record.keeper);
    if wait_until_over(machine, AFTER_KEEPER) {
        return Ok(());
    }
    let pid = |process: Option<ProcessName>| process.map_or(0, |p| p.pid);
    Err(Failure::new(format!(
        "Machine {} does not end: its monitor (process {}) and keeper (process {}) were killed but are \
         still there; they may wait for a disk",
        machine.record.name,
        pid(machine.record.monitor),
        pid(machine.record.keeper)
    )))
}

/// Waits until the keeper is gone, which writes until its last moment.
pub fn wait_for_keeper(machine: &Machine) {
    let until = Instant::now() + AFTER_KEEPER;
    // A foreground run's keeper may still have to hand its last output on; it does not touch
    // the machine's files any more, so going on after the limit is right.
    while machine.record.keeper.is_some_and(|k| k.is_alive()) && Instant::now() < until {
        thread::sleep(Duration::from_millis(2));
    }
}
