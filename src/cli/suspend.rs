//! `nacelle suspend`: brings machines into snapshots, so that they take no memory and no CPU.
//!
//! The machine's keeper does the work (see `keeper/steward.rs`); this is who asks for it, shows
//! how far it is and, at a signal, has it cancelled.

use std::{
    io::{ErrorKind, Read, Write},
    os::unix::net::UnixStream,
    time::Duration,
};

use clap::Args as ClapArgs;

use super::{
    ending,
    failure::{Failure, Outcome, doing},
    keeper::steward::{Asked, Told},
    output,
    remote::Host,
    snapshot::watching::{EXIT_INTERRUPTED, Watching},
    state::{Machine, State, Status},
};
use crate::snapshot::Watch;

/// How long the keeper may take to leave once the machine is in its snapshot.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(30);
/// How often signals are looked for while the keeper works.
const TURN: Duration = Duration::from_millis(50);
/// Longest line of an answer, in bytes.
const LINE_MAX: usize = 1 << 20;

/// Bring machines into snapshots, from which 'nacelle resume' lets them go on
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
    /// Names, ids or starts of ids
    #[arg(required = true, value_name = "MACHINE")]
    machines: Vec<String>,
}

/// Suspends one after the other; one that is suspended already stays so.
pub fn run(args: &Args, host: Option<&Host>) -> Outcome<u8> {
    let mut interrupted = false;
    let code = output::each(&args.machines, |word| {
        if interrupted {
            return Ok(());
        }
        match host {
            Some(host) => host.suspend(word)?,
            None => {
                let watching = Watching::new("Suspending", args.quiet)?;
                let suspended = suspend(&mut State::open()?.find(word)?, &watching);
                interrupted = watching.interrupted();
                drop(watching);
                suspended?;
            }
        }
        output::print(&format!("{word}\n"))
    });
    Ok(if interrupted { EXIT_INTERRUPTED } else { code })
}

/// Suspends one. After an error it is what it was.
pub fn suspend(machine: &mut Machine, watch: &dyn Watch) -> Outcome<()> {
    if machine.status() == Status::Suspended {
        return Ok(());
    }
    machine.must_run("be suspended")?;
    let name = machine.record.name.clone();
    let cannot = || format!("The keeper of machine {name} cannot be asked");
    let mut keeper = doing(UnixStream::connect(machine.keeper_socket()), cannot)?;
    doing(keeper.set_read_timeout(Some(TURN)), cannot)?;
    let mut line = serde_json::to_vec(&Asked::Suspend {}).unwrap_or_default();
    line.push(b'\n');
    doing(keeper.write_all(&line), cannot)?;
    listen(&mut keeper, watch).map_err(|failure| {
        let mut failure = failure;
        failure.causes.insert(0, std::mem::take(&mut failure.message));
        failure.message = format!("Machine {name} was not suspended");
        failure
    })?;
    await_keeper(machine)
}

/// Reads what the keeper says until it leaves.
fn listen(keeper: &mut UnixStream, watch: &dyn Watch) -> Outcome<()> {
    let (mut held, mut part) = (Vec::new(), [0; 4096]);
    let (mut step, mut cancelled) = ((0, 0), false);
    loop {
        match keeper.read(&mut part) {
            Ok(0) => return Ok(()),
            Ok(count) => held.extend_from_slice(part.get(..count).unwrap_or_default()),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            // A keeper that was killed; the machine's directory tells what became of it.
            Err(_) => return Ok(()),
        }
        while let Some(end) = held.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = held.drain(..=end).collect();
            match serde_json::from_slice(&line) {
                Ok(Told::Step { done, total }) => step = (done, total),
                Ok(Told::Failed { message, causes }) => {
                    return Err(Failure { causes, ..Failure::new(message) });
                }
                Err(e) => return Err(Failure::because("Its keeper's answer cannot be understood", &e)),
            }
        }
        if held.len() > LINE_MAX {
            return Err(Failure::new("Its keeper's answer has no end"));
        }
        if !cancelled && watch.step(step.0, step.1).is_break() {
            cancelled = true;
            // The end of what we say cancels it; what became of it is still heard.
            let _ = keeper.shutdown(std::net::Shutdown::Write);
        }
    }
}

/// Waits until the keeper has left, and says what it left.
fn await_keeper(machine: &mut Machine) -> Outcome<()> {
    let name = machine.record.name.clone();
    let until = std::time::Instant::now() + LEAVE_TIMEOUT;
    loop {
        let ended = || Failure::new(format!("Machine {name} ended before it was suspended"));
        machine.reload().map_err(|_| ended())?;
        match machine.status() {
            Status::Suspended => {
                ending::wait_for_keeper(machine);
                return Ok(());
            }
            Status::Exited | Status::Dead => return Err(ended()),
            _ if std::time::Instant::now() > until => {
                return Err(Failure::new(format!("The keeper of machine {name} does not leave it")));
            }
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}
