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

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use api::Spec;
use guest::{
    client::{Agent, ReadyListener},
    protocol::{Exit, ExitStatus, MAIN, ProcessSpec, Setup, Stream},
};
use serde::{Deserialize, Serialize};

use super::{
    failure::{EXIT_OURS, Failure, Outcome, doing},
    log::{self, Writer},
    state::{End, Machine, ProcessName, now},
    streams::{self, FORWARDED, Forwarder},
    terminal,
};
use crate::signals::{self, Signals};

/// How long a machine may take from its start until its agent answers, unless
/// `NACELLE_START_TIMEOUT` (seconds) says otherwise.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// The id of the disk that holds what the container writes to its root.
pub const WRITABLE_LAYER: &str = "upper";
/// How long the last output may take to arrive after the command ended.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
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

/// Keeps `machine` from its start to its end. `started` is called once its command runs.
/// Returns the exit code; an error means that the command did not run, or that nobody knows
/// how it ended.
pub fn keep(
    machine: &mut Machine,
    plan: Plan,
    attached: Attached,
    started: impl FnOnce(&Machine),
) -> Outcome<u8> {
    machine.record.keeper = ProcessName::of(std::process::id() as i32);
    machine.save()?;
    let signals = doing(Signals::block(&FORWARDED).map(Arc::new), || "Signals cannot be set up".to_owned())?;
    let outcome = run(machine, plan, attached, &signals, started).map(|exit| end_of(&exit));
    terminal::restore();
    conclude(machine, outcome)
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

fn run(
    machine: &mut Machine,
    mut plan: Plan,
    attached: Attached,
    signals: &Arc<Signals>,
    started: impl FnOnce(&Machine),
) -> Outcome<Exit> {
    let door = machine.vsock();
    let ready = ReadyListener::bind(&door)?;
    let config = machine.file("config.json");
    let text = serde_json::to_vec_pretty(&plan.spec).unwrap_or_default();
    doing(std::fs::write(&config, text), || format!("{} cannot be written", config.display()))?;
    // Whoever asks the monitor does so later; until then the socket would only delay the boot.
    let mut monitor = Monitor::start(machine, &["--api-after-start"])?;
    machine.record.monitor = ProcessName::of(monitor.child.id() as i32);
    machine.save()?;
    let limit = start_timeout();
    monitor.wait_for(&ready, signals, limit)?;
    let connection = ready.accept(limit).map_err(|e| monitor.explain(Failure::from(e)))?;
    let mut agent = Agent::over(connection, limit).map_err(|e| monitor.explain(e.into()))?;
    plan.setup.unix_ns = Some(unix_nanos());
    plan.setup.entropy = entropy();
    agent.setup(plan.setup)?;
    agent.start(plan.process.clone())?;
    machine.record.started = Some(now());
    machine.save()?;

    let output =
        doing(Writer::open(&machine.file("output.log")), || "The output log cannot be opened".to_owned())?;
    let streams = Streams::begin(machine, &plan.process, attached, output)?;
    started(machine);
    let exit = wait(&mut agent, &mut monitor, machine, &plan.process, signals)?;
    streams.finish();
    let keeps = !machine.record.ephemeral || writes_own_disks(&plan.spec);
    monitor.end(&mut agent, keeps);
    Ok(exit)
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
    log: std::path::PathBuf,
    console: std::path::PathBuf,
}

impl Monitor {
    /// Starts it with the machine's `config.json`, if there is one, and its API socket.
    pub(super) fn start(machine: &Machine, flags: &[&str]) -> Outcome<Monitor> {
        let path = machine.file("monitor.log");
        let log = doing(File::create(&path), || format!("{} cannot be made", path.display()))?;
        let second = doing(log.try_clone(), || format!("{} cannot be opened", path.display()))?;
        let keeper = std::process::id() as i32;
        let mut command = Command::new("/proc/self/exe");
        command.arg("vmm").arg("--api-sock").arg(machine.api()).args(flags);
        let config = machine.file("config.json");
        if config.exists() {
            command.arg("--config-file").arg(&config);
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

/// The threads that carry the container's streams.
struct Streams(Vec<thread::JoinHandle<()>>);

impl Streams {
    fn begin(
        machine: &Machine,
        process: &ProcessSpec,
        attached: Attached,
        output: Writer,
    ) -> Outcome<Streams> {
        let door = guest::client::Machine::new(machine.vsock());
        let output = Arc::new(Mutex::new(output));
        let mut threads = Vec::new();
        let own = |fd| (attached == Attached::Yes).then_some(fd);
        let stdout = door.stream(MAIN, Stream::Stdout)?;
        threads.push(carry_out(stdout, own(1), log::Stream::Out, Arc::clone(&output)));
        if process.terminal.is_none() {
            let stderr = door.stream(MAIN, Stream::Stderr)?;
            threads.push(carry_out(stderr, own(2), log::Stream::Err, output));
        }
        if attached == Attached::Yes && (process.stdin || process.terminal.is_some()) {
            let stdin = door.stream(MAIN, Stream::Stdin)?;
            if process.terminal.is_some() {
                terminal::make_raw(0);
            }
            streams::carry_in(stdin)?;
        }
        Ok(Streams(threads))
    }

    /// Waits until everything that was printed has arrived.
    fn finish(self) {
        let until = Instant::now() + DRAIN_TIMEOUT;
        for thread in self.0 {
            while !thread.is_finished() && Instant::now() < until {
                thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

fn carry_out(
    mut from: std::os::unix::net::UnixStream,
    to: Option<i32>,
    stream: log::Stream,
    log: Arc<Mutex<Writer>>,
) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        // SAFETY: standard output and error are open for the life of the process; the file is
        // never dropped, so they are not closed here.
        let mut own = to.map(|fd| std::mem::ManuallyDrop::new(unsafe { File::from_raw_fd(fd) }));
        let mut buffer = vec![0; log::ENTRY_MAX];
        loop {
            let got = match from.read(&mut buffer) {
                Ok(0) => return,
                Ok(got) => got,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return,
            };
            let bytes = buffer.get(..got).unwrap_or_default();
            if own.as_mut().is_some_and(|file| file.write_all(bytes).is_err()) {
                // Whoever read it is gone; the log goes on, and so does the container.
                own = None;
            }
            // A log that cannot be written must not stop the container.
            let _ = log.lock().unwrap_or_else(PoisonError::into_inner).add(stream, bytes);
        }
    })
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
pub(super) fn last_lines(path: &std::path::Path, count: usize) -> Vec<String> {
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

/// Starts a keeper of its own for `machine` and waits until the command runs or failed.
pub fn start_detached(machine: &Machine) -> Outcome<()> {
    let mut command = Command::new("/proc/self/exe");
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
