//! `nacelle pause` and `nacelle resume`: machines that stand still, and machines that go on.
//!
//! A paused machine stays in memory with its processes; a suspended one (see `suspend.rs`) is
//! files. `resume` lets either go on.

use std::{path::Path, time::Duration};

use api::client::Client;
use clap::Args as ClapArgs;
use serde_json::{Value, json};

use super::{
    failure::{Failure, Outcome},
    keeper::{self, revive},
    output,
    remote::Host,
    state::{Machine, State, Status},
};

/// How long a monitor may take to stop or start its vCPUs.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Let machines stand still, in memory
#[derive(Debug, ClapArgs)]
pub struct PauseArgs {
    /// Names, ids or starts of ids
    #[arg(required = true, value_name = "MACHINE")]
    machines: Vec<String>,
}

/// Let paused or suspended machines go on
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// Have the terminal, input and output of one that was suspended, and wait for its end
    #[arg(short, long)]
    attach: bool,
    /// Names, ids or starts of ids
    #[arg(required = true, value_name = "MACHINE")]
    machines: Vec<String>,
}

/// Pauses each.
pub fn pause(args: &PauseArgs, host: Option<&Host>) -> Outcome<u8> {
    Ok(output::each(&args.machines, |word| {
        match host {
            None => {
                let mut machine = State::open()?.find(word)?;
                machine.must_run("be paused")?;
                set(&machine, "Paused")?;
            }
            Some(host) => host.set(word, "Paused")?,
        }
        output::print(&format!("{word}\n"))
    }))
}

/// Lets each go on.
pub fn run(args: &Args, host: Option<&Host>) -> Outcome<u8> {
    if args.attach {
        return match (host, args.machines.as_slice()) {
            (None, [word]) => revive::in_foreground(&mut State::open()?.find(word)?),
            (None, _) => Err(Failure::new("There is one terminal; name one machine with -a")),
            (Some(_), _) => Err(Failure::new(
                "A machine of another host cannot be attached; leave -a out and use 'nacelle logs -f' and \
                 'nacelle exec -it'",
            )),
        };
    }
    Ok(output::each(&args.machines, |word| {
        match host {
            None => resume(Path::new(keeper::OWN), &mut State::open()?.find(word)?)?,
            Some(host) => host.resume(word)?,
        }
        output::print(&format!("{word}\n"))
    }))
}

/// Lets one go on; if it was suspended, under a keeper of its own by `program`.
pub fn resume(program: &Path, machine: &mut Machine) -> Outcome<()> {
    match machine.status() {
        Status::Suspended => keeper::start_detached(program, machine),
        Status::Running => set(machine, "Resumed"),
        status => {
            let (name, status) = (&machine.record.name, status.word());
            Err(Failure::new(format!(
                "Machine {name} is {status}; only one that is paused or suspended can go on"
            )))
        }
    }
}

fn set(machine: &Machine, state: &str) -> Outcome<()> {
    let mut client = Client::unix(machine.api()).patience(TIMEOUT);
    client.patch::<Value>("/vm", Some(&json!({ "state": state })))?;
    Ok(())
}
