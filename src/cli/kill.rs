//! `nacelle kill`: sends a signal to the main processes of machines.

use clap::Args as ClapArgs;

use super::{
    ending,
    failure::{Failure, Outcome},
    output,
    remote::Host,
    state::{Machine, State, Status},
    values,
};

/// Send a signal to the commands of machines
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// Signal, by name or number
    #[arg(short, long, default_value = "KILL", value_parser = signal)]
    signal: i32,
    /// Names, ids or starts of ids
    #[arg(required = true, value_name = "MACHINE")]
    machines: Vec<String>,
}

/// Reads a signal's name or number; an error is the rule for it.
pub fn signal(word: &str) -> Result<i32, String> {
    values::signal(word).ok_or_else(|| "it must be a name such as TERM or a number from 1 to 64".to_owned())
}

/// Sends it to each.
pub fn run(args: &Args, host: Option<&Host>) -> Outcome<u8> {
    Ok(output::each(&args.machines, |word| {
        match host {
            None => send(&mut State::open()?.find(word)?, args.signal)?,
            Some(host) => host.kill(word, args.signal)?,
        }
        output::print(&format!("{word}\n"))
    }))
}

/// Sends it to one.
pub fn send(machine: &mut Machine, number: i32) -> Outcome<()> {
    match (machine.record.status(), number) {
        // A machine whose agent is lost can still be killed.
        (Status::Running | Status::Created, libc::SIGKILL) => ending::kill(machine),
        (Status::Running, number) => ending::signal(machine, number),
        (status, _) => {
            let (name, status) = (&machine.record.name, status.word());
            Err(Failure::new(format!("Machine {name} is {status}; there is nothing to send a signal to")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_has_a_name_or_a_number() {
        assert_eq!(signal("SIGTERM"), Ok(libc::SIGTERM));
        assert_eq!(signal("9"), Ok(libc::SIGKILL));
        assert!(signal("LOUD").unwrap_err().contains("TERM"));
    }
}
