//! The command line: one file a subcommand.
//!
//! Habits are Docker's. Standard output carries only what was asked for; progress and
//! failures go to standard error. Exit codes: the guest's own, 128 and the number for a
//! signal, 126 and 127 for a command that cannot be run or found, 125 for failures of ours.

pub mod completion;
pub mod cp;
pub mod cpu;
pub mod doctor;
pub mod door;
pub mod drives;
pub mod ending;
pub mod exec;
pub mod failure;
pub mod fork;
pub mod images;
pub mod inspect;
pub mod keeper;
pub mod kernel;
pub mod kill;
pub mod list;
pub mod log;
pub mod logs;
pub mod order;
pub mod output;
pub mod overrides;
pub mod plain;
pub mod progress;
pub mod remote;
pub mod restore;
pub mod resume;
pub mod rm;
pub mod run;
pub mod scaffold;
pub mod serve;
pub mod snapshot;
pub mod state;
pub mod stats;
pub mod stop;
pub mod streams;
pub mod suspend;
pub mod terminal;
pub mod values;
pub mod vmm;
pub mod wait;
pub mod when;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use api::Fault;
use clap::{CommandFactory, Parser, Subcommand};

use failure::{EXIT_OURS, Failure, Outcome};
use remote::Host;

/// Virtual machines that start like processes and are moved like files
#[derive(Debug, Parser)]
#[command(name = "nacelle", version, infer_subcommands = false, disable_help_subcommand = true)]
#[command(after_help = "Run 'nacelle COMMAND --help' for more on a command.")]
pub struct Nacelle {
    /// Work through the service of a host: unix:///PATH or tcp://NAME:PORT [env: NACELLE_HOST]
    #[arg(long, global = true, value_name = "URL")]
    host: Option<String>,
    /// Directory with ca.pem, cert.pem and key.pem, for tcp:// [env: NACELLE_CERTS]
    #[arg(long, global = true, value_name = "DIR")]
    tlsdir: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(Box<run::Args>),
    Exec(exec::Args),
    #[command(visible_alias = "ps")]
    Ls(list::Args),
    Logs(logs::Args),
    Stop(stop::Args),
    Kill(kill::Args),
    Cp(cp::Args),
    #[command(visible_alias = "delete")]
    Rm(rm::Args),
    Wait(wait::Args),
    Inspect(inspect::Args),
    Stats(stats::Args),
    Pause(resume::PauseArgs),
    Suspend(suspend::Args),
    Resume(resume::Args),
    Restore(restore::Args),
    #[command(visible_alias = "clone")]
    Fork(fork::Args),
    Images(images::Args),
    Snapshot(snapshot::Args),
    Cpu(cpu::Args),
    Doctor(doctor::Args),
    Serve(serve::Args),
    Certs(serve::CertsArgs),
    Completion(completion::Args),
    /// Run one machine from a configuration file; see 'nacelle vmm --help'
    #[command(disable_help_flag = true)]
    Vmm {
        /// Firecracker's arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Carry out an order from standard input
    #[command(hide = true)]
    Launch,
    /// Keep a detached machine
    #[command(hide = true)]
    Keep {
        /// Its id
        id: String,
    },
}

/// The whole command line, for completion and manual pages.
pub fn command() -> clap::Command {
    Nacelle::command()
}

/// Runs the command that the process was called as.
pub fn main() -> ExitCode {
    let mut arguments = std::env::args();
    let name = arguments.next().unwrap_or_default();
    let called = Path::new(&name).file_name().and_then(|n| n.to_str()).unwrap_or_default();
    // The monitor is found before anything else is set up: its start is what counts.
    if called == "firecracker" {
        return vmm::main(arguments);
    }
    let mut arguments = arguments.peekable();
    if arguments.peek().is_some_and(|a| a == "vmm") {
        return vmm::main(arguments.skip(1));
    }
    match Nacelle::try_parse() {
        Ok(parsed) => finish(dispatch(parsed)),
        Err(error) => {
            let _ = error.print();
            ExitCode::from(if error.use_stderr() { EXIT_OURS } else { 0 })
        }
    }
}

fn dispatch(Nacelle { host, tlsdir, command }: Nacelle) -> Outcome<u8> {
    // What is about this host, or this program, does not ask another one.
    match &command {
        Command::Serve(_) | Command::Certs(_) => return serve::become_service(),
        Command::Doctor(args) => return doctor::run(args),
        Command::Cpu(args) => return cpu::run(args),
        Command::Completion(args) => return completion::run(args),
        Command::Launch => return run::launch(),
        Command::Keep { id } => return Ok(run::keep(id)),
        _ => {}
    }
    let host = Host::chosen(host.as_deref(), tlsdir.as_deref())?;
    let host = host.as_ref();
    match (command, host) {
        (Command::Run(args), None) => run::run(&args),
        (Command::Run(args), Some(host)) => remote::run(&args, host),
        (Command::Images(args), None) => images::run(&args),
        (Command::Snapshot(args), None) => snapshot::run(&args),
        (Command::Restore(args), None) => restore::run(&args),
        (Command::Fork(args), None) => fork::run(&args),
        (Command::Images(_) | Command::Snapshot(_) | Command::Restore(_) | Command::Fork(_), Some(_)) => {
            Err(Failure::new(
                "Images and snapshots are seen on their own host only; leave --host and NACELLE_HOST out, or ask \
                 there",
            ))
        }
        (Command::Pause(args), host) => resume::pause(&args, host),
        (Command::Suspend(args), host) => suspend::run(&args, host),
        (Command::Resume(args), host) => resume::run(&args, host),
        (Command::Exec(args), host) => exec::run(&args, host),
        (Command::Ls(args), host) => list::run(&args, host),
        (Command::Logs(args), host) => logs::run(&args, host),
        (Command::Stop(args), host) => stop::run(&args, host),
        (Command::Kill(args), host) => kill::run(&args, host),
        (Command::Cp(args), host) => cp::run(&args, host),
        (Command::Rm(args), host) => rm::run(&args, host),
        (Command::Wait(args), host) => wait::run(&args, host),
        (Command::Inspect(args), host) => inspect::run(&args, host),
        (Command::Stats(args), host) => stats::run(&args, host),
        // Done above, or found before the parser ran.
        _ => Ok(0),
    }
}

/// Prints a failure and ends the process with its code. Threads that still read a terminal
/// end with it.
fn finish(outcome: Outcome<u8>) -> ! {
    terminal::restore();
    let code = outcome.unwrap_or_else(|failure| {
        eprintln!("nacelle: {failure}");
        failure.code
    });
    std::process::exit(code.into())
}

/// Prints a fault to standard error: what was wrong, then each cause on its own line.
pub fn print_fault(fault: &Fault) {
    eprintln!("nacelle: {}", fault.message);
    for cause in &fault.causes {
        eprintln!("  caused by: {cause}");
    }
}
