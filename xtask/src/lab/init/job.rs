//! The one command: its start, its streams, its end.
//!
//! Output goes through pipes (or one pseudo-terminal) and a thread each into frames, not
//! straight to the serial port: a program may open `/dev/stderr` again, which a port refuses.
//! When the command ends, what lies in the pipes is still sent; what a left-over child of it
//! might write later is not waited for.

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::os::unix::thread::JoinHandleExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};

use super::{kernel, pulse::Pulse};
use crate::lab::frame::{self, Assembler, Kind};
use crate::lab::order::Order;

/// Exit code of a command that is there but cannot be run, as shells have it.
const NOT_RUNNABLE: u8 = 126;
/// Exit code of a command that is not there.
const NOT_FOUND: u8 = 127;
/// Exit code of a failure of the lab itself.
const LAB_FAILED: u8 = 125;

/// What a terminal's driver may need to pass on the last output after the command has ended.
const TERMINAL_DRAIN: Duration = Duration::from_millis(30);

/// One writer for both output threads, so that frames never mix.
type Port = Arc<Mutex<File>>;

/// Runs the command to its end; its exit code, or 128+signal.
pub fn run(order: &Order, port: &File) -> Result<u8> {
    let writer: Port = Arc::new(Mutex::new(port.try_clone()?));
    let (stdin, outputs, child) = match order.terminal {
        Some(size) => on_terminal(order, size)?,
        None => on_pipes(order)?,
    };
    let gates: Vec<OwnedFd> =
        outputs.iter().map(|(_, file)| file.try_clone().map(OwnedFd::from)).collect::<Result<_, _>>()?;
    let relays: Vec<JoinHandle<()>> = outputs
        .into_iter()
        .map(|(kind, file)| {
            let writer = Arc::clone(&writer);
            thread::spawn(move || relay_output(kind, file, &writer))
        })
        .collect();
    let reader = port.try_clone()?;
    thread::spawn(move || relay_input(reader, stdin));
    let code = reap(child)?;
    if order.terminal.is_some() {
        thread::sleep(TERMINAL_DRAIN);
    }
    for gate in &gates {
        kernel::set_nonblocking(gate)?;
    }
    relays.into_iter().for_each(finish);
    Ok(code)
}

/// The exit code and sentence for an error of [`run`].
pub fn explain(error: &anyhow::Error) -> (u8, String) {
    let code = match error.downcast_ref::<io::Error>().map(io::Error::kind) {
        Some(io::ErrorKind::NotFound) => NOT_FOUND,
        Some(_) => NOT_RUNNABLE,
        None => LAB_FAILED,
    };
    (code, format!("{error:#}"))
}

type Started = (File, Vec<(Kind, File)>, i32);

fn command(order: &Order) -> Result<Command> {
    let (program, arguments) = order.command.split_first().context("The order has no command in it")?;
    let directory = Path::new(&order.directory);
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(order.environment.iter().map(|(name, value)| (name, value)))
        // Another root tree need not have the directory that the caller stands in.
        .current_dir(if directory.is_dir() { directory } else { Path::new("/") });
    Ok(command)
}

fn spawn(mut command: Command) -> Result<i32> {
    let child =
        command.spawn().with_context(|| format!("Cannot run {}", command.get_program().to_string_lossy()))?;
    Ok(i32::try_from(child.id())?)
}

fn on_pipes(order: &Order) -> Result<Started> {
    let (stdin, feed) = io::pipe()?;
    let (out, stdout) = io::pipe()?;
    let (err, stderr) = io::pipe()?;
    let mut command = command(order)?;
    command.stdin(stdin).stdout(stdout).stderr(stderr);
    let child = spawn(command)?;
    Ok((from_writer(feed), vec![(Kind::Stdout, from_reader(out)), (Kind::Stderr, from_reader(err))], child))
}

fn from_writer(pipe: PipeWriter) -> File {
    OwnedFd::from(pipe).into()
}

fn from_reader(pipe: PipeReader) -> File {
    OwnedFd::from(pipe).into()
}

fn on_terminal(order: &Order, (rows, columns): (u16, u16)) -> Result<Started> {
    let (master, terminal) = kernel::open_terminal(rows, columns)?;
    let mut command = command(order)?;
    command
        .stdin(Stdio::from(terminal.try_clone()?))
        .stdout(Stdio::from(terminal.try_clone()?))
        .stderr(Stdio::from(terminal));
    // SAFETY: take_terminal makes two system calls and touches no memory.
    unsafe { command.pre_exec(kernel::take_terminal) };
    let child = spawn(command)?;
    let master = File::from(master);
    Ok((master.try_clone()?, vec![(Kind::Stdout, master)], child))
}

/// Reads until the end of the stream, or, when the command has ended, until nothing is left.
fn relay_output(kind: Kind, mut from: File, port: &Port) {
    let mut buffer = vec![0; frame::PAYLOAD_MAX];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => {
                let port = port.lock().unwrap_or_else(PoisonError::into_inner);
                if frame::send(&*port, kind, &buffer[..length]).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // EAGAIN: the command has ended and its pipe is empty; EIO: the terminal is gone.
            Err(_) => return,
        }
    }
}

/// Interrupts a relay until it is done: a read that was waiting when its pipe became
/// non-blocking goes on waiting while a left-over child holds the other end.
fn finish(relay: JoinHandle<()>) {
    while !relay.is_finished() {
        // SAFETY: the thread has not been joined, so its handle is valid; `reap` has installed
        // a handler for SIGUSR1 that does nothing.
        unsafe { libc::pthread_kill(relay.as_pthread_t(), libc::SIGUSR1) };
        thread::sleep(Duration::from_millis(2));
    }
    // A relay that panicked has lost output, which the console shows; the code still counts.
    let _ = relay.join();
}

fn relay_input(mut port: File, stdin: File) {
    let mut stdin = Some(stdin);
    let pulse = Pulse::new();
    let mut assembler = Assembler::default();
    let mut buffer = vec![0; frame::PAYLOAD_MAX];
    loop {
        match port.read(&mut buffer) {
            Ok(0) | Err(_) => return,
            Ok(length) => assembler.feed(&buffer[..length]),
        }
        while let Ok(Some((kind, bytes))) = assembler.next() {
            match (kind, &mut stdin) {
                (Kind::Stdin, _) => give(&mut stdin, &bytes),
                (Kind::StdinEnd, _) => stdin = None,
                (Kind::Pulse, _) => pulse.beat(),
                (Kind::Resize, Some(master)) => {
                    if let [a, b, c, d] = bytes[..] {
                        let (rows, columns) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
                        kernel::resize(&master.as_raw_fd(), rows, columns);
                    }
                }
                _ => {}
            }
        }
    }
}

/// Writes to the command's input; a command that has closed it gets no more.
fn give(stdin: &mut Option<File>, bytes: &[u8]) {
    if stdin.as_mut().is_some_and(|file| file.write_all(bytes).is_err()) {
        *stdin = None;
    }
}

/// Collects children, orphans too, until `child` has ended.
fn reap(child: i32) -> Result<u8> {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: a zeroed sigaction has an empty mask and no flags (so no SA_RESTART: a waiting
    // read must come back); the handler does nothing.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut());
    }
    loop {
        let (id, status) = kernel::wait_any().context("The command was lost")?;
        if id == child {
            let code = if libc::WIFSIGNALED(status) {
                128 + libc::WTERMSIG(status)
            } else {
                libc::WEXITSTATUS(status)
            };
            return Ok(u8::try_from(code).unwrap_or(LAB_FAILED));
        }
    }
}
