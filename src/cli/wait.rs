//! `nacelle wait`: blocks until machines have ended and prints their exit codes.

use std::{thread, time::Duration};

use clap::Args as ClapArgs;
use guest::protocol::MAIN;

use super::{
    ending,
    failure::{Failure, Outcome},
    output,
    state::{Machine, State, Status},
};

/// Longest single wait on the agent, after which the record is looked at again.
const TURN: Duration = Duration::from_secs(1);

/// Wait until machines have ended and print their exit codes
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// Names, ids or starts of ids
    #[arg(required = true, value_name = "MACHINE")]
    machines: Vec<String>,
}

/// Waits for one after the other.
pub fn run(args: &Args) -> Outcome<u8> {
    let state = State::open()?;
    Ok(output::each(&args.machines, |word| {
        let mut machine = state.find(word)?;
        let code = exit_code(&mut machine)?;
        output::print(&format!("{code}\n"))
    }))
}

fn exit_code(machine: &mut Machine) -> Outcome<u8> {
    // A machine that is removed at its end takes its record with it, so the agent is asked,
    // too; the record, which knows of failures of ours, has precedence.
    let mut seen = None;
    let mut connection = None;
    while !ending::is_over(machine) {
        if seen.is_some() || machine.record.status() == Status::Created {
            thread::sleep(Duration::from_millis(5));
            continue;
        }
        let door = guest::client::Machine::new(machine.vsock());
        let agent = match &mut connection {
            Some(agent) => Ok(agent),
            none => door.control().map(|agent| none.insert(agent)),
        };
        match agent.and_then(|agent| agent.wait(MAIN, Some(TURN))) {
            Ok(Some(exit)) => seen = Some(exit.status.shell_code()),
            Ok(None) => {}
            Err(_) => {
                connection = None;
                thread::sleep(Duration::from_millis(50));
            }
        }
    }
    let name = &machine.record.name;
    match (&machine.record.end, seen) {
        (Some(end), _) => Ok(end.exit_code),
        (None, Some(code)) => Ok(code),
        (None, None) => Err(Failure::new(format!(
            "Machine {name} is gone and did not say how it ended; 'nacelle logs {name}' may tell more"
        ))),
    }
}
