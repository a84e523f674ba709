//! A process's standard streams in a machine, joined to this process's own.
//!
//! ```text
//!   fd 0 ── carry_in ──► stdin      ┐
//!   fd 1 ◄─ carry_out ── stdout     ├ unix sockets to the agent, raw bytes
//!   fd 2 ◄─ carry_out ── stderr     ┘
//!   signals, terminal size ── Forwarder ──► requests on a control connection
//! ```
//!
//! Bytes are passed on as they are, as soon as they come. The reader of standard input is
//! never waited for: it may sit in a read of a terminal nobody types on.

use std::{
    fs::File,
    io::{self, PipeWriter, Read, Write},
    net::Shutdown,
    os::{
        fd::{AsFd, AsRawFd, RawFd},
        unix::net::UnixStream,
    },
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use guest::{
    client::Machine,
    protocol::{ProcessId, Size},
};

use super::{
    failure::{Outcome, doing},
    terminal,
};
use crate::signals::Signals;

/// Bytes carried at once.
const PART: usize = 64 * 1024;

/// Signals that are passed on to a process in a machine. `SIGWINCH` becomes a new size.
pub const FORWARDED: [i32; 7] =
    [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGUSR1, libc::SIGUSR2, libc::SIGWINCH];

/// One of this process's own output streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Own {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

impl Own {
    /// A file of its own for the stream, without a buffer.
    pub fn file(self) -> io::Result<File> {
        let fd = match self {
            Own::Out => io::stdout().as_fd().try_clone_to_owned(),
            Own::Err => io::stderr().as_fd().try_clone_to_owned(),
        };
        fd.map(File::from)
    }
}

/// Carries what a process prints to one of our streams, on a thread of its own. `unread` is
/// called if whoever read our stream is gone; what still comes is then thrown away.
pub fn carry_out(
    mut from: UnixStream,
    to: Own,
    unread: impl FnOnce() + Send + 'static,
) -> Outcome<JoinHandle<()>> {
    let mut to = doing(to.file(), || format!("Standard {to:?} cannot be used").to_lowercase())?;
    let carry = move || {
        let mut buffer = vec![0; PART];
        loop {
            let got = match from.read(&mut buffer) {
                Ok(0) => return,
                Ok(got) => got,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return,
            };
            if write_all(&mut to, buffer.get(..got).unwrap_or_default()).is_err() {
                break;
            }
        }
        unread();
        // The process must not wait for somebody to read on.
        while matches!(from.read(&mut buffer), Ok(1..)) {}
    };
    doing(thread::Builder::new().spawn(carry), || "No thread can be had".to_owned())
}

/// Writes all, also where another program has made the terminal one that does not wait.
fn write_all(to: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                wait_for(&[(to.as_raw_fd(), libc::POLLOUT)], None);
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Carries standard input to a process until either ends. The thread is not to be waited for.
pub fn carry_in(mut to: UnixStream) -> Outcome<()> {
    let carry = move || {
        let mut stdin = io::stdin().lock();
        let mut buffer = vec![0; PART];
        loop {
            match stdin.read(&mut buffer) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    wait_for(&[(libc::STDIN_FILENO, libc::POLLIN)], None);
                }
                Ok(0) | Err(_) => break,
                Ok(got) => {
                    if to.write_all(buffer.get(..got).unwrap_or_default()).is_err() {
                        return;
                    }
                }
            }
        }
        // The end of our input is the end of its input.
        let _ = to.shutdown(Shutdown::Write);
    };
    let started = thread::Builder::new().spawn(carry);
    doing(started.map(drop), || "No thread can be had".to_owned())
}

/// Passes signals and terminal sizes on to a process until it is dropped.
#[derive(Debug)]
pub struct Forwarder {
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Forwarder {
    /// Begins to pass on what `signals` brings to `process` of the machine behind `door`.
    pub fn start(
        signals: Arc<Signals>,
        door: Machine,
        process: ProcessId,
        terminal: bool,
    ) -> Outcome<Forwarder> {
        let (stopped, stop) = doing(io::pipe(), || "No pipe can be had".to_owned())?;
        let forward = move || {
            let watched = [(signals.as_raw_fd(), libc::POLLIN), (stopped.as_raw_fd(), libc::POLLIN)];
            let mut control = None;
            loop {
                wait_for(&watched, None);
                while let Some(number) = signals.next() {
                    pass_on(&mut control, &door, process, terminal, number);
                }
                if wait_for(&[(stopped.as_raw_fd(), libc::POLLIN)], Some(Duration::ZERO)) {
                    return;
                }
            }
        };
        let thread = doing(thread::Builder::new().spawn(forward), || "No thread can be had".to_owned())?;
        Ok(Forwarder { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn pass_on(
    control: &mut Option<guest::client::Agent>,
    door: &Machine,
    process: ProcessId,
    terminal: bool,
    number: i32,
) {
    let size = terminal::size(1).or_else(|| terminal::size(0));
    if number == libc::SIGWINCH && !(terminal && size.is_some()) {
        return;
    }
    // A connection of its own, made when first needed: the other one waits for the end.
    if control.is_none() {
        *control = door.control().ok();
    }
    let Some(agent) = control else { return };
    let sent = match (number, size) {
        (libc::SIGWINCH, Some((rows, cols))) => agent.resize(process, Size { rows, cols }),
        _ => agent.signal(process, number),
    };
    if sent.is_err() {
        *control = None;
    }
}

/// Waits until one of `fds` has one of its events, or is closed; false when `limit` is over.
pub fn wait_for(fds: &[(RawFd, i16)], limit: Option<Duration>) -> bool {
    let entry = |(fd, events): &(RawFd, i16)| libc::pollfd { fd: *fd, events: *events, revents: 0 };
    let mut entries: Vec<libc::pollfd> = fds.iter().map(entry).collect();
    let millis = limit.map_or(-1, |l| i32::try_from(l.as_millis()).unwrap_or(i32::MAX));
    // SAFETY: the array is as long as said.
    unsafe { libc::poll(entries.as_mut_ptr(), entries.len() as libc::nfds_t, millis) > 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_ends_at_the_limit_or_with_an_event() {
        let (reader, writer) = io::pipe().unwrap();
        let watched = [(reader.as_raw_fd(), libc::POLLIN)];
        assert!(!wait_for(&watched, Some(Duration::from_millis(5))));
        drop(writer);
        assert!(wait_for(&watched, None));
    }

    #[test]
    fn a_forwarder_ends_at_once_when_it_is_dropped() {
        let door = Machine::new("/nonexistent/vsock.sock");
        let start = std::time::Instant::now();
        drop(
            Forwarder::start(Signals::block(&[]).map(Arc::new).unwrap(), door, ProcessId(1), false).unwrap(),
        );
        assert!(start.elapsed() < Duration::from_secs(2));
    }
}
