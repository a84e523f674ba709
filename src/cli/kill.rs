//! `nacelle kill`: sends a signal to the main processes of machines.

use clap::Args as ClapArgs;

use super::{
    ending,
    failure::{Failure, Outcome},
    output,
    state::{State, Status},
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

fn signal(word: &str) -> Result<i32, String> {
    values::signal(word).ok_or_else(|| "it must be a name such as TERM or a number from 1 to 64".to_owned())
}

/// Sends it to each.
pub fn run(args: &Args) -> Outcome<u8> {
    let state = State::open()?;
    Ok(output::each(&args.machines, |word| {
        let mut machine = state.find(word)?;
        match (machine.record.status(), args.signal) {
            // A machine whose agent is lost can still be killed.
            (Status::Running | Status::Created, libc::SIGKILL) => ending::kill(&mut machine)?,
            (Status::Running, number) => ending::signal(&machine, number)?,
            (status, _) => {
                let status = format!("{status:?}").to_lowercase();
                return Err(Failure::new(format!(
                    "Machine {word} is {status}; there is nothing to send a signal to"
                )));
            }
        }
        output::print(&format!("{word}\n"))
    }))
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
