//! The service of one host: all its machines behind one HTTP door.
//!
//! ```text
//!   curl, --host ──► unix socket ──┐                  ┌─ state directory (cli/state.rs)
//!   other hosts ──► TCP, mutual TLS┴► seats ► routes ─┼─ machines: list, inspect, wait, stop, rm
//!                                       │             ├─ launch ──► `nacelle launch` ──► keeper ──► monitor
//!                                       │             ├─ through ─► a machine's api.sock, its vsock.sock
//!                                       └─ caps       ├─ logs, metrics
//!                                                     └─ events ◄── watch: inotify, each api.sock
//! ```
//!
//! **It holds nothing.** What it knows of machines it reads from the state directory, like every
//! other command; machines are children of their keepers, which are in sessions of their own and
//! nobody's children here. So it can be killed at any moment: no machine notices, and the next one
//! finds them all, those of `nacelle run -d` included. Machines are launched by the code that `run
//! -d` runs, in a process of its own, so that images are unpacked where it costs the service
//! neither memory nor its life.
//!
//! **It is a program of its own**, `nacelle-serve`, because a monitor is started far more often
//! than a service. In one file a runtime, an HTTP server and a TLS server are some 2 MiB more, with
//! relocations that every start of a static program carries out and pages that it then owns.
//! `nacelle serve` becomes that program.
//!
//! **Who may connect may do everything** that the service's user may: on the unix socket that is
//! its owner, on TCP whoever has a key that the given authority signed. There is no TCP without
//! TLS 1.3 with both ends' certificates.
//!
//! **Nothing grows.** Connections have seats ([`seats`]), bodies and heads have caps, launches and
//! slow work have turns, events a ring; answers that never end (`/events`, `logs`, `wait`, tunnels)
//! are bounded in number and hold no more than one piece each.

mod answer;
mod certs;
#[cfg(test)]
mod description;
mod events;
mod launch;
mod listen;
mod logs;
mod machines;
mod metrics;
mod routes;
mod seats;
#[cfg(test)]
mod tests;
mod through;
mod tls;
mod watch;

use std::{io, path::PathBuf, process::ExitCode, sync::Arc};

use clap::{Parser, Subcommand};
use tokio::sync::Semaphore;

use crate::cli::{
    failure::{EXIT_OURS, Failure, Outcome, doing},
    serve::{Args, CertsArgs},
    state::State,
};
use events::Hub;

/// Launches at a time; more wait.
const LAUNCHES: usize = 8;
/// Requests at a time that take a thread for seconds (stopping, figures); more wait.
const SLOW: usize = 64;
/// Logs that are read at a time, each by a thread; more are refused.
const LOGS: usize = 64;
/// Threads for what blocks: those above, and room for what is quick.
const THREADS: usize = SLOW + LOGS + 32;

/// The service of one host, with its machines
#[derive(Debug, Parser)]
#[command(name = "nacelle-serve", version)]
struct Program {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(Args),
    Certs(CertsArgs),
}

/// What every request has at hand.
struct Service {
    state: State,
    hub: Hub,
    /// The `nacelle` that launches machines.
    program: PathBuf,
    launches: Semaphore,
    slow: Semaphore,
    logs: Arc<Semaphore>,
}

/// Runs the program.
pub fn main() -> ExitCode {
    let outcome = match Program::parse().command {
        Command::Serve(args) => serve(&args),
        Command::Certs(args) => certs::make(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("nacelle: {failure}");
            ExitCode::from(failure.code)
        }
    }
}

fn serve(args: &Args) -> Outcome<()> {
    let tls = tls::Files::of(args)?;
    let state = State::open()?;
    let path = args.sock.clone().unwrap_or_else(|| State::directory().join("serve.sock"));
    let unix = listen::Unix::bind(&path)?;
    let tcp = tls.map(|(address, files)| listen::Tcp::bind(address, &files)).transpose()?;
    let service = Service {
        state,
        hub: Hub::new(),
        program: program()?,
        launches: Semaphore::new(LAUNCHES),
        slow: Semaphore::new(SLOW),
        logs: Arc::new(Semaphore::new(LOGS)),
    };
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(2).max_blocking_threads(THREADS).enable_all().build();
    let runtime = doing(runtime, || "The service's threads cannot be started".to_owned())?;
    let ended = runtime.block_on(listen::run(Arc::new(service), unix, tcp));
    // Streams that go on are cut; whoever waits for a thread has nothing to lose.
    runtime.shutdown_background();
    doing(ended, || "The service cannot go on".to_owned())
}

/// The program that launches machines: the one that became this, or the one beside it.
fn program() -> Outcome<PathBuf> {
    if let Some(path) = std::env::var_os(crate::cli::serve::PROGRAM).filter(|v| !v.is_empty()) {
        return Ok(path.into());
    }
    let own = doing(std::env::current_exe(), || "The path of this program cannot be found".to_owned())?;
    let path = own.with_file_name("nacelle");
    if path.is_file() {
        return Ok(path);
    }
    let text = format!("nacelle is not at {}; start the service with 'nacelle serve'", path.display());
    Err(Failure::new(text).with_code(EXIT_OURS))
}

/// Says something on standard error, where the journal takes it.
fn say(text: &str) {
    use io::Write;
    // There is nobody else to tell.
    let _ = writeln!(io::stderr().lock(), "nacelle serve: {text}");
}
