//! `nacelle stop`: asks machines to end, and sees to it.

use std::{thread, time::Duration};

use clap::Args as ClapArgs;

use super::{
    ending,
    failure::{Failure, Outcome},
    output,
    remote::Host,
    state::{State, Status},
};

/// Stop machines: ask their commands to end, kill them after a while
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// Seconds a command may take before it is killed
    #[arg(short = 't', long = "time", alias = "timeout", value_name = "SECONDS", default_value_t = 10)]
    time: u32,
    /// Names, ids or starts of ids
    #[arg(required = true, value_name = "MACHINE")]
    machines: Vec<String>,
}

/// Stops them, all at once; one that ended already is stopped.
pub fn run(args: &Args, host: Option<&Host>) -> Outcome<u8> {
    let grace = Duration::from_secs(args.time.into());
    let stop = |word: &str| {
        if let Some(host) = host {
            return host.stop(word, grace);
        }
        let mut machine = State::open()?.find(word)?;
        if matches!(machine.record.status(), Status::Exited | Status::Dead) {
            return Ok(());
        }
        ending::stop(&mut machine, grace)
    };
    let outcomes: Vec<Outcome<()>> = thread::scope(|scope| {
        let threads: Vec<_> = args.machines.iter().map(|word| scope.spawn(|| stop(word))).collect();
        let broken = |_| Err(Failure::new("A thread of this program failed"));
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(broken)).collect()
    });
    let mut outcomes = outcomes.into_iter();
    Ok(output::each(&args.machines, |word| {
        outcomes.next().unwrap_or(Ok(()))?;
        output::print(&format!("{word}\n"))
    }))
}
