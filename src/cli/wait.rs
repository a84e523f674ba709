//! `nacelle wait`: blocks until machines have ended and prints their exit codes.

use std::time::Duration;

use clap::Args as ClapArgs;

use super::{
    ending,
    failure::{Failure, Outcome},
    output,
    remote::Host,
    state::{Ending, Machine, State},
};

/// Longest single wait; there are as many as it takes.
const TURN: Duration = Duration::from_secs(3600);

/// Wait until machines have ended and print their exit codes
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// Names, ids or starts of ids
    #[arg(required = true, value_name = "MACHINE")]
    machines: Vec<String>,
}

/// Waits for one after the other.
pub fn run(args: &Args, host: Option<&Host>) -> Outcome<u8> {
    Ok(output::each(&args.machines, |word| {
        let code = match host {
            None => exit_code(&mut State::open()?.find(word)?)?,
            Some(host) => host.wait(word)?,
        };
        output::print(&format!("{code}\n"))
    }))
}

fn exit_code(machine: &mut Machine) -> Outcome<u8> {
    // A machine that is removed at its end takes its record with it; what is held open stays.
    let held = machine.ending();
    while !ending::wait_until_over(machine, TURN) {}
    code(machine, held.as_ref())
}

/// The exit code of a machine that is over. `held` was got before it was.
pub fn code(machine: &Machine, held: Option<&Ending>) -> Outcome<u8> {
    let recorded = machine.record.end.as_ref().map(|end| end.exit_code);
    recorded.or_else(|| held.and_then(Ending::code)).ok_or_else(|| {
        let name = &machine.record.name;
        Failure::new(format!(
            "Machine {name} is gone and did not say how it ended; 'nacelle logs {name}' may tell more"
        ))
    })
}
