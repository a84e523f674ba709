//! The keeper of a container's machine: starts the monitor, speaks with the agent, carries the
//! container's input and output, waits for its end and writes it down.
//!
//! ```text
//!   nacelle run          keeper                     monitor            machine
//!   ───────────          ──────                     ───────            ───────
//!   plan ──────────────► listen for the agent
//!                        start ───────────────────► boots ───────────► agent
//!                        ◄──────────────────────────────────────────── ready
//!                        set up, start the command ──────────────────► container
//!   stdin  ────────────► stream ─────────────────────────────────────► its stdin
//!   stdout ◄──┬───────── stream ◄───────────────────────────────────── its stdout
//!             └ output.log
//!   exit code ◄───────── wait ◄─────────────────────────────────────── its end
//! ```
//!
//! In the foreground the keeper is the `nacelle run` process itself; with `-d` it is a process
//! of its own, which `run` starts and leaves. In both cases the monitor dies with its keeper
//! (it asks the kernel to see to that), so a keeper that was killed leaves no machine nobody
//! answers for.
//!
//! A machine that is suspended loses its keeper and its monitor and keeps its directory; one that
//! goes on gets new ones ([`revive`]), which take up the streams and the wait where they were.

pub(super) mod carriage;
pub mod revive;
pub mod steward;

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use api::Spec;
use carriage::Carriage;
use guest::{
    client::{Agent, ReadyListener},
    protocol::{Exit, ExitStatus, MAIN, ProcessSpec, Setup, Size},
};
use serde::{Deserialize, Serialize};

use super::{
    failure::{EXIT_OURS, Failure, Outcome, doing},
    state::{End, Machine, ProcessName, now},
    streams::{FORWARDED, Forwarder},
    terminal,
};
use crate::{
    signals::{self, Signals},
    snapshot::draft,
};
use revive::Revival;
use steward::Steward;

/// How long a machine may take from its start until its agent answers, unless
/// `NACELLE_START_TIMEOUT` (seconds) says otherwise.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// The id of the disk that is the container's image.
pub const IMAGE: &str = "root";
/// The id of the disk that holds what the container writes to its root.
pub const WRITABLE_LAYER: &str = "upper";
/// How long a machine may take to switch itself off.
const OFF_TIMEOUT: Duration = Duration::from_secs(10);

/// All that is needed to run a container: made by `run`, kept beside the record.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plan {
    /// The machine.
    pub spec: Spec,
    /// The container's surroundings.
    pub setup: Setup,
    /// Its command.
    pub process: ProcessSpec,
}

/// Whether the container's streams are this process's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attached {
    /// They are; this is a foreground run.
    Yes,
    /// They go to the log only.
    No,
}

/// Exit code of a foreground run whose machine was suspended: 128 and `SIGTSTP`, as a shell shows
/// a command that was stopped.
const EXIT_SUSPENDED: u8 = 148;

/// Keeps `machine` from its start, or from where a snapshot left it, to its end. `started` is
/// called once its command runs. Returns the exit code; an error means that the command did not
/// run, or that nobody knows how it ended.
pub fn keep(
    machine: &mut Machine,
    plan: Plan,
    revival: Option<Revival>,
    attached: Attached,
    started: impl FnOnce(&Machine),
) -> Outcome<u8> {
    let signals = doing(Signals::block(&FORWARDED).map(Arc::new), || "Signals cannot be set up".to_owned())?;
    let (process, keeps) = (plan.process.clone(), !machine.record.ephemeral || writes_own_disks(&plan.spec));
    let begun = match revival {
        None => {
            machine.record.keeper = ProcessName::of(std::process::id() as i32);
            machine.save()?;
            boot(machine, plan, &signals)
        }
        // What does not come up stays in its snapshot.
        Some(revival) => {
            let monitor = revival.load(machine, &signals)?;
            let reached = revival.reach(machine, monitor, &signals);
            let size = terminal::size(1).filter(|_| attached == Attached::Yes && process.terminal.is_some());
            reached.map(|(monitor, mut agent)| {
                // The terminal is another one than it was started at.
                let _ = size.map(|(rows, cols)| agent.resize(MAIN, Size { rows, cols }));
                (monitor, agent)
            })
        }
    };
    let attend =
        |(monitor, agent)| attend(machine, &process, attached, &signals, (monitor, agent, keeps), started);
    let outcome = begun.and_then(attend);
    terminal::restore();
    match outcome {
        Ok(None) => lay_down(machine, attached),
        Ok(Some(exit)) => conclude(machine, Ok(end_of(&exit))),
        Err(failure) => conclude(machine, Err(failure)),
    }
}

/// Leaves a suspended machine to its snapshot.
pub(super) fn lay_down(machine: &mut Machine, attached: Attached) -> Outcome<u8> {
    (machine.record.monitor, machine.record.keeper) = (None, None);
    machine.save()?;
    if attached == Attached::Yes {
        let name = &machine.record.name;
        eprintln!("nacelle: Machine {name} was suspended; 'nacelle resume {name}' lets it go on");
    }
    Ok(EXIT_SUSPENDED)
}

/// Writes down how a machine ended and tells those who wait. Returns its exit code, or what
/// went wrong.
pub(super) fn conclude(machine: &mut Machine, outcome: Outcome<End>) -> Outcome<u8> {
    let end = match &outcome {
        Ok(end) => end.clone(),
        Err(failure) => End { exit_code: failure.code, reason: Some(failure.message.clone()), at: now() },
    };
    let code = end.exit_code;
    machine.record.end = Some(end);
    machine.announce(code);
    if machine.record.ephemeral {
        machine.remove()?;
    } else {
        machine.save()?;
        // It may have ended while it was being suspended.
        let _ = std::fs::remove_dir_all(machine.suspended());
        draft::sweep_beside(&machine.suspended());
    }
    outcome.map(|_| code)
}

fn end_of(exit: &Exit) -> End {
    let (exit_code, mut reason) = match exit.status {
        ExitStatus::Code(code) => (code, None),
        ExitStatus::Signal(number) => {
            (128u8.saturating_add(number), Some(format!("Killed by signal {number}")))
        }
    };
    if exit.out_of_memory {
        reason = Some("Out of memory".to_owned());
    }
    End { exit_code, reason, at: now() }
}

/// Starts the monitor, waits for the agent and has it start the command.
fn boot(machine: &mut Machine, mut plan: Plan, signals: &Signals) -> Outcome<(Monitor, Agent)> {
    let ready = ReadyListener::bind(&machine.vsock())?;
    let config = machine.file("config.json");
    let text = serde_json::to_vec_pretty(&plan.spec).unwrap_or_default();
    doing(std::fs::write(&config, text), || format!("{} cannot be written", config.display()))?;
    // Whoever asks the monitor does so later; until then the socket would only delay the boot.
    let mut monitor = Monitor::start(machine, Some(config), &["--api-after-start"])?;
    machine.record.monitor = ProcessName::of(monitor.child.id() as i32);
    machine.save()?;
    let limit = start_timeout();
    monitor.wait_for(&ready, signals, limit)?;
    let connection = ready.accept(limit).map_err(|e| monitor.explain(Failure::from(e)))?;
    let mut agent = Agent::over(connection, limit).map_err(|e| monitor.explain(e.into()))?;
    plan.setup.unix_ns = Some(unix_nanos());
    plan.setup.entropy = entropy();
    agent.setup(plan.setup)?;
    agent.start(plan.process)?;
    machine.record.started = Some(now());
    machine.save()?;
    Ok((monitor, agent))
}

/// Carries the streams of a command that runs until its end; nothing comes back when it was
/// suspended instead.
fn attend(
    machine: &Machine,
    process: &ProcessSpec,
    attached: Attached,
    signals: &Arc<Signals>,
    (mut monitor, mut agent, keeps): (Monitor, Agent, bool),
    started: impl FnOnce(&Machine),
) -> Outcome<Option<Exit>> {
    let carriage = Arc::new(Mutex::new(Some(Carriage::begin(machine, process, attached)?)));
    let steward = Steward::start(machine, Some(Arc::clone(&carriage)))?;
    started(machine);
    let waited = wait(&mut agent, &mut monitor, machine, process, signals);
    if waited.is_ok() {
        // Before the monitor is told to end, so that what is said last is read.
        finish(&carriage);
        monitor.end(&mut agent, keeps);
    }
    // Whoever is being served hears of the end; nobody takes a snapshot of it any more.
    drop(monitor);
    drop(steward);
    finish(&carriage);
    match waited {
        Err(_) if machine.suspended().exists() => Ok(None),
        waited => waited.map(Some),
    }
}

/// Reads the streams to their end, unless somebody did.
fn finish(carriage: &Mutex<Option<Carriage>>) {
    if let Some(carriage) = carriage.lock().unwrap_or_else(PoisonError::into_inner).take() {
        carriage.finish();
    }
}

/// Whether disks of the user's, which outlive the machine, may have been written.
fn writes_own_disks(spec: &Spec) -> bool {
    spec.drives.iter().any(|drive| !drive.is_read_only && drive.drive_id != WRITABLE_LAYER)
}

/// Waits for the command's end, forwarding signals and terminal sizes meanwhile.
fn wait(
    agent: &mut Agent,
    monitor: &mut Monitor,
    machine: &Machine,
    process: &ProcessSpec,
    signals: &Arc<Signals>,
) -> Outcome<Exit> {
    let door = guest::client::Machine::new(machine.vsock());
    let _forwarder = Forwarder::start(Arc::clone(signals), door, MAIN, process.terminal.is_some())?;
    match agent.wait(MAIN, None) {
        Ok(Some(exit)) => Ok(exit),
        Ok(None) => Err(Failure::new("The agent stopped waiting for the command")),
        Err(error) => Err(monitor.explain(error.into())),
    }
}

/// The monitor's process.
pub(super) struct Monitor {
    pub(super) child: Child,
    pub(super) pidfd: OwnedFd,
    log: PathBuf,
    console: PathBuf,
}

impl Monitor {
    /// Starts it with the machine's API socket and, if there is one, a configuration.
    pub(super) fn start(machine: &Machine, config: Option<PathBuf>, flags: &[&str]) -> Outcome<Monitor> {
        let path = machine.file("monitor.log");
        // One that goes on from a snapshot has a log already.
        let log = File::options().append(true).create(true).open(&path);
        let log = doing(log, || format!("{} cannot be made", path.display()))?;
        let second = doing(log.try_clone(), || format!("{} cannot be opened", path.display()))?;
        let keeper = std::process::id() as i32;
        let mut command = Command::new(OWN);
        command.arg("vmm").arg("--api-sock").arg(machine.api()).args(flags);
        if let Some(config) = config.filter(|config| config.exists()) {
            command.arg("--config-file").arg(config);
        }
        command.args(["--id", machine.record.short_id(), "--level", "Info"]);
        command.stdin(Stdio::null()).stdout(log).stderr(second);
        let prepare = move || {
            signals::restore_for_child()?;
            // SAFETY: calls that are safe between fork and exec. A session of its own keeps
            // the terminal's Ctrl-C from the monitor; the parent is looked at once more
            // because it may have gone before the request was made.
            unsafe {
                libc::setsid();
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                if libc::getppid() != keeper {
                    return Err(io::Error::other("the keeper is gone"));
                }
            }
            Ok(())
        };
        // SAFETY: the closure only makes async-signal-safe calls.
        unsafe { command.pre_exec(prepare) };
        let child = doing(command.spawn(), || "The monitor cannot be started".to_owned())?;
        // SAFETY: asks for a descriptor of a child that was not waited for, so it exists.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) };
        if fd < 0 {
            return Err(Failure::because("The monitor cannot be watched", &io::Error::last_os_error()));
        }
        // SAFETY: the descriptor was just made and nobody else has it.
        let pidfd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        Ok(Monitor { child, pidfd, log: path, console: machine.file("console.log") })
    }

    /// Waits until the agent connects; an error when the monitor ends first, a signal comes,
    /// or the time is over.
    fn wait_for(&mut self, ready: &ReadyListener, signals: &Signals, limit: Duration) -> Outcome<()> {
        use std::os::fd::AsFd;
        let until = Instant::now() + limit;
        let agent = ready.as_fd().as_raw_fd();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let fds = [agent, self.pidfd.as_raw_fd(), signals.as_raw_fd()];
            if !readable(&fds, left) {
                let seconds = limit.as_secs();
                let text = format!("The machine did not start within {seconds} s");
                return Err(self.explain(Failure::new(text)));
            }
            if readable(&[agent], Duration::ZERO) {
                return Ok(());
            }
            if readable(&[self.pidfd.as_raw_fd()], Duration::ZERO) {
                return Err(self.explain(Failure::new("The machine ended before its agent answered")));
            }
            match signals.next() {
                Some(libc::SIGWINCH) | None => {}
                Some(number) => {
                    let code = 128u8.saturating_add(number as u8);
                    return Err(Failure::new(format!("Signal {number} stopped the start")).with_code(code));
                }
            }
        }
    }

    /// Adds to `failure` what the monitor and the guest said last.
    pub(super) fn explain(&mut self, mut failure: Failure) -> Failure {
        // The last lines are on their way when the connection breaks.
        let until = Instant::now() + Duration::from_millis(500);
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < until {
            thread::sleep(Duration::from_millis(5));
        }
        if let Ok(Some(status)) = self.child.try_wait() {
            failure.causes.push(format!("the monitor ended ({status})"));
        }
        for (name, path) in [("monitor", &self.log), ("console", &self.console)] {
            let lines = last_lines(path, 6);
            failure.causes.extend(lines.into_iter().map(|line| format!("{name}: {line}")));
        }
        failure
    }

    /// Switches the machine off, gently where what it wrote is kept.
    fn end(&mut self, agent: &mut Agent, keeps: bool) {
        if keeps && agent.shutdown(false).is_ok() && readable(&[self.pidfd.as_raw_fd()], OFF_TIMEOUT) {
            let _ = self.child.wait();
            return;
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether one of `fds` becomes readable (or closed) within `limit`.
pub(super) fn readable(fds: &[i32], limit: Duration) -> bool {
    let watch = |fd: &i32| libc::pollfd { fd: *fd, events: libc::POLLIN, revents: 0 };
    let mut fds: Vec<libc::pollfd> = fds.iter().map(watch).collect();
    let millis = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: the array is as long as said.
    unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, millis) > 0 }
}

pub(super) fn start_timeout() -> Duration {
    let asked = std::env::var("NACELLE_START_TIMEOUT").ok().and_then(|v| v.parse().ok());
    asked.map_or(START_TIMEOUT, Duration::from_secs)
}

fn unix_nanos() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

fn entropy() -> Vec<u8> {
    let mut bytes = vec![0; 64];
    let read = File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut bytes));
    if read.is_ok() { bytes } else { Vec::new() }
}

/// The last lines of a text file, without control characters; empty when it cannot be read.
pub(super) fn last_lines(path: &Path, count: usize) -> Vec<String> {
    use std::io::{Seek, SeekFrom};
    let mut text = Vec::new();
    let read = File::open(path).and_then(|mut file| {
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(4096)))?;
        file.read_to_end(&mut text)
    });
    if read.is_err() {
        return Vec::new();
    }
    let text = String::from_utf8_lossy(&text);
    let clean = |line: &str| line.chars().filter(|c| !c.is_control()).collect::<String>();
    let lines: Vec<String> = text.lines().map(clean).filter(|l| !l.trim().is_empty()).collect();
    lines.get(lines.len().saturating_sub(count)..).unwrap_or_default().to_vec()
}

/// This program.
pub const OWN: &str = "/proc/self/exe";

/// Starts a keeper of its own for `machine`, by a program that can be one, and waits until the
/// command runs or failed.
pub fn start_detached(program: &Path, machine: &Machine) -> Outcome<()> {
    let mut command = Command::new(program);
    command.arg("keep").arg(&machine.record.id).stdin(Stdio::null()).stdout(Stdio::piped());
    command.stderr(Stdio::null());
    let prepare = || {
        // SAFETY: safe between fork and exec; the keeper leaves the terminal's session.
        unsafe { libc::setsid() };
        signals::restore_for_child()
    };
    // SAFETY: the closure only makes async-signal-safe calls.
    unsafe { command.pre_exec(prepare) };
    let mut child = doing(command.spawn(), || "The keeper cannot be started".to_owned())?;
    let mut said = String::new();
    if let Some(mut pipe) = child.stdout.take() {
        let _ = pipe.read_to_string(&mut said);
    }
    match said.split_once('\n') {
        Some(("started", _)) => Ok(()),
        Some((code, text)) => {
            let mut lines = text.lines();
            let message = lines.next().unwrap_or("The keeper failed").to_owned();
            let causes = lines.map(|l| l.trim_start_matches("  caused by: ").to_owned()).collect();
            Err(Failure { code: code.parse().unwrap_or(EXIT_OURS), message, causes })
        }
        None => Err(Failure::new("The keeper ended before the machine started")),
    }
}

/// The body of a detached keeper, which is `keep`: tells its starter, once, how the start went.
pub fn main(keep: impl FnOnce(&dyn Fn()) -> Outcome<u8>) -> u8 {
    let told = std::cell::Cell::new(false);
    let tell = |text: &str| {
        if !told.replace(true) {
            let _ = io::stdout().write_all(text.as_bytes());
            let _ = io::stdout().flush();
            leave_stdout();
        }
    };
    match keep(&|| tell("started\n")) {
        Ok(code) => code,
        Err(failure) => {
            tell(&format!("{}\n{failure}\n", failure.code));
            failure.code
        }
    }
}

/// Lets go of the starter's pipe, so that it sees its end.
fn leave_stdout() {
    if let Ok(null) = File::options().write(true).open("/dev/null") {
        // SAFETY: both descriptors are open; standard output is replaced, not closed.
        unsafe { libc::dup2(null.as_raw_fd(), 1) };
    }
}
