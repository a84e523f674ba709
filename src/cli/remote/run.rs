//! `nacelle run` on another host: the machine is launched there and left to itself; a foreground
//! run prints what it prints, passes signals on and waits for its end.
//!
//! Standard input and terminals would need the machine's keeper, which is over there and has none;
//! `exec -it` has both, through the agent.

use std::{os::fd::AsRawFd, sync::Arc, thread};

use serde_json::Value;

use super::Host;
use crate::{
    cli::{
        failure::{Failure, Outcome, doing},
        logs, output,
        run::Args,
        streams,
    },
    signals::Signals,
};

/// Runs it; the exit code is the command's.
pub fn run(args: &Args, host: &Host) -> Outcome<u8> {
    if args.attached() {
        return Err(Failure::new(
            "On another host a run has no standard input and no terminal; leave -i and -t out, or use -d and \
             'nacelle exec -it'",
        ));
    }
    let mut order = args.order()?;
    let detached = args.detached();
    let remove = order.remove_at_end && !detached;
    if !detached {
        // Only after its output was read; one whose caller goes away stays.
        order.remove_at_end = false;
    }
    order.check()?;
    let signals = match detached {
        true => None,
        // Before any thread starts, so that all of them leave signals to the one that waits.
        false => Some(doing(Signals::block(&streams::FORWARDED), || "Signals cannot be set up".to_owned())?),
    };
    let machine: Value = host.patient().post("/machines", Some(&order))?;
    let id = machine.get("id").and_then(Value::as_str).unwrap_or_default().to_owned();
    let Some(signals) = signals else {
        output::print(&format!("{id}\n"))?;
        return Ok(0);
    };
    pass_signals(host, &id, Arc::new(signals))?;
    let printed = logs::print_all(host, &id);
    let code = host.wait(&id);
    if remove {
        host.remove(&id, true)?;
    }
    printed?;
    code
}

/// Passes signals to the machine's command, on a thread that ends with the process.
fn pass_signals(host: &Host, id: &str, signals: Arc<Signals>) -> Outcome<()> {
    let (host, id) = (host.clone(), id.to_owned());
    let pass = move || {
        loop {
            streams::wait_for(&[(signals.as_raw_fd(), libc::POLLIN)], None);
            while let Some(number) = signals.next().filter(|number| *number != libc::SIGWINCH) {
                // It may have ended meanwhile.
                let _ = host.kill(&id, number);
            }
        }
    };
    doing(thread::Builder::new().spawn(pass).map(drop), || "No thread can be had".to_owned())
}
