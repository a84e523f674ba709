//! `nacelle exec`: a further command in a running machine.
//!
//! It gets the container's environment, and its user and working directory unless others are
//! named. Streams, terminal, signals and exit code are those of a local command: what is
//! piped through comes out byte for byte, and a terminal is put back whatever happens.

use std::{path::PathBuf, sync::Arc, thread::JoinHandle, time::Duration};

use clap::Args as ClapArgs;
use guest::{
    client::{self, ClientError},
    protocol::{Exit, ProcessId, ProcessSpec, Size, Stream},
};

use super::{
    door::Door,
    failure::{Failure, Outcome, doing},
    remote::Host,
    streams::{self, Forwarder, Own},
    terminal, values,
};
use crate::signals::Signals;

/// Longest wait for output that is on its way when the command has ended.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Run a further command in a running machine
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// Pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// Give the command no terminal, even if there is one
    #[arg(long, conflicts_with = "tty")]
    no_tty: bool,
    /// Leave the command to itself, without its output
    #[arg(short, long)]
    detach: bool,
    /// Set an environment variable: NAME=VALUE, or NAME to pass on this one's
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Read environment variables from a file
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// Working directory of the command
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// User of the command: name or number, with :group if need be
    #[arg(short, long)]
    user: Option<String>,
    /// Name, id or start of an id
    machine: String,
    /// Command and arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Runs the command; the exit code is the command's.
pub fn run(args: &Args, host: Option<&Host>) -> Outcome<u8> {
    let door = Door::open(&args.machine, host)?;
    let both = terminal::is_terminal(0) && terminal::is_terminal(1);
    let terminal = args.tty || (both && !args.no_tty && !args.detach);
    if args.tty && args.interactive && !args.detach && !terminal::is_terminal(0) {
        return Err(Failure::new("-it needs a terminal as standard input; leave -t out"));
    }
    let spec = spec(args, &door, terminal)?;
    // Before any thread starts, so that all of them leave signals to the forwarder.
    let signals = doing(Signals::block(&streams::FORWARDED), || "Signals cannot be set up".to_owned())?;
    let mut agent = door.control()?;
    let (process, _) = agent.exec(spec.clone())?;
    if args.detach {
        return leave(&door, process, terminal).map(|()| 0);
    }
    let _forwarder = Forwarder::start(Arc::new(signals), (*door).clone(), process, terminal)?;
    let exit = attached(&door, &mut agent, process, &spec);
    terminal::restore();
    exit.map(|exit| exit.status.shell_code())
}

/// The process to start: the container's own settings under those of the command line.
fn spec(args: &Args, door: &Door, terminal: bool) -> Outcome<ProcessSpec> {
    let mut env = door.env.clone();
    for file in &args.env_file {
        env.extend(values::env_file(file)?);
    }
    // The last of a name counts.
    env.extend(args.env.iter().filter_map(|word| values::env(word)));
    let main = door.main.clone();
    let size = terminal::size(1).or_else(|| terminal::size(0));
    let size = size.map_or_else(Size::default, |(rows, cols)| Size { rows, cols });
    Ok(ProcessSpec {
        args: args.command.clone(),
        env,
        cwd: args.workdir.clone().unwrap_or(main.cwd),
        user: args.user.clone().unwrap_or(main.user),
        groups: main.groups,
        terminal: terminal.then_some(size),
        stdin: !args.detach && (args.interactive || terminal),
        ..ProcessSpec::default()
    })
}

/// Lets a process run on by itself: opened and closed, its streams throw away what it prints
/// instead of making it wait for a reader.
fn leave(door: &client::Machine, process: ProcessId, terminal: bool) -> Outcome<()> {
    let streams = if terminal { &[Stream::Stdout][..] } else { &[Stream::Stdout, Stream::Stderr] };
    for stream in streams {
        match door.stream(process, *stream) {
            // It may have ended already.
            Ok(_) | Err(ClientError::Agent(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Carries the process's streams until it has ended.
fn attached(
    door: &client::Machine,
    agent: &mut client::Agent,
    process: ProcessId,
    spec: &ProcessSpec,
) -> Outcome<Exit> {
    let mut threads: Vec<JoinHandle<()>> = Vec::new();
    let unread = |door: &client::Machine| {
        let door = door.clone();
        // What a local command would get that writes to a pipe nobody reads.
        move || {
            let _ = door.control().and_then(|mut agent| agent.signal(process, libc::SIGPIPE));
        }
    };
    let stdout = door.stream(process, Stream::Stdout)?;
    threads.push(streams::carry_out(stdout, Own::Out, unread(door))?);
    if spec.terminal.is_none() {
        let stderr = door.stream(process, Stream::Stderr)?;
        threads.push(streams::carry_out(stderr, Own::Err, unread(door))?);
    }
    if spec.stdin || spec.terminal.is_some() {
        let stdin = door.stream(process, Stream::Stdin)?;
        if spec.terminal.is_some() {
            terminal::make_raw(0);
        }
        streams::carry_in(stdin)?;
    }
    let exit = agent.wait(process, None)?;
    let until = std::time::Instant::now() + DRAIN_TIMEOUT;
    for thread in threads {
        while !thread.is_finished() && std::time::Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    exit.ok_or_else(|| Failure::new("The agent stopped waiting for the command"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn parse(line: &str) -> Args {
        Line::try_parse_from(["exec"].into_iter().chain(line.split(' '))).unwrap().args
    }

    #[test]
    fn flags_after_the_machine_are_the_commands() {
        let args = parse("-it -e A=1 web ls -l --all");
        assert!(args.interactive && args.tty);
        assert_eq!((&args.machine[..], args.command.len()), ("web", 3));
        assert_eq!(parse("web -- ls -l").command, ["ls", "-l"]);
        assert_eq!(parse("web sh -c -- x").command, ["sh", "-c", "--", "x"]);
    }

    #[test]
    fn a_command_is_needed_and_a_terminal_cannot_be_both_wanted_and_refused() {
        assert!(Line::try_parse_from(["exec", "web"]).is_err());
        assert!(Line::try_parse_from(["exec", "-t", "--no-tty", "web", "sh"]).is_err());
    }
}
