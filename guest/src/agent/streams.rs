//! Standard streams: bytes between a process's pipes (or terminal) and the host.
//!
//! Nothing reads a process's output before someone opens the stream, so nothing is lost
//! before; the process just waits once its pipe is full. The thread of the stream's own
//! connection is the pump: reads and writes of at most one buffer, so a slow host slows the
//! process down instead of filling the machine's memory.
//!
//! ```text
//!            attach            connection lost, kept
//!    Free ───────────▶ Attached ───────────────────▶ Free
//!                         │ │ connection lost, not kept
//!                         │ └────────▶ Discarding ── attach ──▶ Attached
//!                         └─ end of file, or the process ended and all is read ──▶ Done
//! ```
//!
//! When a process ends, its descendants may still hold its pipe open and even write. So the
//! end of the stream is not the pipe's end of file: it is all that was in the pipe when the
//! process had ended.

use super::{
    process::Process,
    syscall::{Latch, read, readable, wait, want, write},
};
use guest::protocol::{Failure, FailureKind, Size, Stream};
use std::{
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Bytes moved at once.
const BUFFER: usize = 64 << 10;

/// Most bytes read from a terminal after its process has ended.
const MAX_TERMINAL_REST: usize = 1 << 20;

/// How long output that nobody has opened waits after the process's end.
pub const GRACE: Duration = Duration::from_secs(10);

/// A process's three streams.
#[derive(Debug)]
pub struct Streams {
    stdin: Slot,
    stdout: Slot,
    stderr: Slot,
    /// Set once all output is read or given up.
    pub settled: Latch,
    terminal: Mutex<Option<OwnedFd>>,
}

#[derive(Debug)]
struct Slot {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
enum State {
    /// The process has no such stream.
    Absent,
    /// Nobody has opened it.
    Free(OwnedFd),
    /// A connection pumps it. Input may have been asked to end with the connection.
    Attached { close: bool },
    /// Its connection is gone and its bytes are thrown away; the latch ends that.
    Discarding(Arc<Latch>),
    /// It is over.
    Done,
}

impl Slot {
    fn new(fd: Option<OwnedFd>) -> Self {
        let state = fd.map_or(State::Absent, State::Free);
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, state: State) {
        *self.lock() = state;
        self.changed.notify_all();
    }

    fn over(&self) -> bool {
        matches!(*self.lock(), State::Absent | State::Done)
    }

    /// Takes the descriptor for a connection; `None` when the stream is over.
    fn attach(&self, which: Stream) -> Result<Option<OwnedFd>, Failure> {
        let mut state = self.lock();
        if let State::Discarding(stop) = &*state {
            stop.set();
            let limit = Duration::from_secs(2);
            let waited = self.changed.wait_timeout_while(state, limit, |s| matches!(s, State::Discarding(_)));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        match std::mem::replace(&mut *state, State::Attached { close: false }) {
            State::Free(fd) => Ok(Some(fd)),
            State::Done => {
                *state = State::Done;
                Ok(None)
            }
            State::Absent => {
                *state = State::Absent;
                Err(Failure::new(
                    FailureKind::BadRequest,
                    format!("The process was started without {}", name(which)),
                ))
            }
            taken => {
                *state = taken;
                Err(Failure::new(FailureKind::Busy, format!("Someone else has {} open", name(which))))
            }
        }
    }
}

fn name(which: Stream) -> &'static str {
    match which {
        Stream::Stdin => "standard input",
        Stream::Stdout => "standard output",
        Stream::Stderr => "standard error",
    }
}

impl Streams {
    /// Streams over the agent's ends of pipes.
    pub fn pipes(stdin: Option<OwnedFd>, stdout: OwnedFd, stderr: OwnedFd) -> io::Result<Self> {
        for fd in stdin.iter().chain([&stdout, &stderr]) {
            super::syscall::set_nonblocking(fd)?;
        }
        Self::new(stdin, Some(stdout), Some(stderr))
    }

    /// Streams of a process whose terminal comes later.
    pub fn without_terminal_yet() -> io::Result<Self> {
        Self::new(None, None, None)
    }

    fn new(stdin: Option<OwnedFd>, stdout: Option<OwnedFd>, stderr: Option<OwnedFd>) -> io::Result<Self> {
        Ok(Self {
            stdin: Slot::new(stdin),
            stdout: Slot::new(stdout),
            stderr: Slot::new(stderr),
            settled: Latch::new()?,
            terminal: Mutex::new(None),
        })
    }

    /// The process has made its terminal; this is the other side of it.
    pub fn set_terminal(&self, master: OwnedFd) -> io::Result<()> {
        super::syscall::set_nonblocking(&master)?;
        self.stdin.set(State::Free(master.try_clone()?));
        self.stdout.set(State::Free(master.try_clone()?));
        *self.terminal.lock().unwrap_or_else(PoisonError::into_inner) = Some(master);
        Ok(())
    }

    /// Tells the terminal its size.
    pub fn resize(&self, size: Size) -> Result<(), Failure> {
        let terminal = self.terminal.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(terminal) = &*terminal else {
            return Err(Failure::new(FailureKind::BadRequest, "The process has no terminal"));
        };
        let size = libc::winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: TIOCSWINSZ reads one winsize.
        let result = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        super::syscall::check(result)
            .map(drop)
            .map_err(|e| Failure::new(FailureKind::System, format!("Cannot resize the terminal: {e}")))
    }

    /// Ends input, now or when the attached connection has brought its last byte.
    pub fn close_stdin(&self) {
        let mut state = self.stdin.lock();
        match &mut *state {
            State::Free(fd) if self.is_terminal() => type_end_of_file(fd),
            State::Free(_) => *state = State::Done,
            State::Attached { close } => *close = true,
            _ => {}
        }
    }

    fn is_terminal(&self) -> bool {
        self.terminal.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// The process has ended: input is over, and so is output that is empty and unopened.
    pub fn process_ended(&self) {
        {
            let mut stdin = self.stdin.lock();
            if matches!(*stdin, State::Free(_)) {
                *stdin = State::Done;
            }
        }
        self.give_up(|fd| readable(fd) == 0);
        *self.terminal.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.settle();
    }

    /// Gives up output that nobody opened.
    pub fn abandon(&self) {
        self.give_up(|_| true);
        self.settle();
    }

    /// Whether output waits that nobody has opened.
    pub fn unopened(&self) -> bool {
        [&self.stdout, &self.stderr].iter().any(|s| matches!(*s.lock(), State::Free(_)))
    }

    fn give_up(&self, when: impl Fn(&OwnedFd) -> bool) {
        for slot in [&self.stdout, &self.stderr] {
            let mut state = slot.lock();
            if matches!(&*state, State::Free(fd) if when(fd)) {
                *state = State::Done;
            }
        }
    }

    fn settle(&self) {
        // Only ever called when the process has ended or a stream is over.
        if self.stdout.over() && self.stderr.over() {
            self.settled.set();
        }
    }
}

/// Takes one stream for a connection; the caller then greets and calls [`Pump::run`].
pub fn attach(process: Arc<Process>, which: Stream, keep: bool) -> Result<Pump, Failure> {
    let fd = slot(&process, which).attach(which)?;
    Ok(Pump { process, which, keep, fd })
}

fn slot(process: &Process, which: Stream) -> &Slot {
    match which {
        Stream::Stdin => &process.streams.stdin,
        Stream::Stdout => &process.streams.stdout,
        Stream::Stderr => &process.streams.stderr,
    }
}

/// A stream with its connection.
pub struct Pump {
    process: Arc<Process>,
    which: Stream,
    keep: bool,
    fd: Option<OwnedFd>,
}

/// Why a pump stopped.
enum Stop {
    /// The stream is over.
    Finished,
    /// The connection is gone.
    Lost,
}

impl Pump {
    /// Moves bytes until the stream or the connection ends.
    pub fn run(mut self, connection: &UnixStream) {
        let Some(fd) = self.fd.take() else { return };
        if self.which == Stream::Stdin { self.input(fd, connection) } else { self.output(fd, connection) }
    }

    fn output(&self, fd: OwnedFd, connection: &UnixStream) {
        let slot = slot(&self.process, self.which);
        let sink = |bytes: &[u8]| io::Write::write_all(&mut &*connection, bytes);
        let stop = self.drain(&fd, Some(connection), None, sink);
        match stop {
            Stop::Lost if self.keep => return slot.set(State::Free(fd)),
            Stop::Lost => match Latch::new().map(Arc::new) {
                Ok(kicked) => {
                    slot.set(State::Discarding(kicked.clone()));
                    // The thread lives on for the process, not for the connection.
                    let _ = connection.shutdown(std::net::Shutdown::Both);
                    if let Stop::Lost = self.drain(&fd, None, Some(&kicked), |_| Ok(())) {
                        return slot.set(State::Free(fd));
                    }
                }
                Err(_) => return slot.set(State::Free(fd)),
            },
            Stop::Finished => {}
        }
        drop(fd);
        slot.set(State::Done);
        self.process.streams.settle();
    }

    /// Reads to the end of the stream. `connection` is watched for its end, `kicked` for
    /// being asked to stop.
    fn drain(
        &self,
        fd: &OwnedFd,
        connection: Option<&UnixStream>,
        kicked: Option<&Latch>,
        sink: impl Fn(&[u8]) -> io::Result<()>,
    ) -> Stop {
        const GONE: libc::c_short = libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR;
        let mut buffer = vec![0; BUFFER];
        // What may still be read once the process has ended.
        let mut rest = None;
        let mut hung_up = false;
        loop {
            if rest.is_none() {
                let none = libc::pollfd { fd: -1, events: 0, revents: 0 };
                let source = if hung_up { none } else { want(fd, libc::POLLIN) };
                let mut entries = [
                    source,
                    want(&self.process.ended, libc::POLLIN),
                    connection.map_or(none, |c| want(c, libc::POLLRDHUP)),
                    kicked.map_or(none, |k| want(k, libc::POLLIN)),
                ];
                // Without a hang-up to see (a terminal nobody has open at the moment), look
                // again now and then.
                let limit = hung_up.then_some(Duration::from_millis(50));
                if wait(&mut entries, limit).is_err() {
                    return Stop::Finished;
                }
                if entries[2].revents & GONE != 0 || entries[3].revents != 0 {
                    return Stop::Lost;
                }
                if entries[1].revents != 0 {
                    let terminal = self.process.terminal;
                    rest = Some(if terminal { MAX_TERMINAL_REST } else { readable(fd) });
                }
            }
            let most = rest.unwrap_or(BUFFER).min(BUFFER);
            if most == 0 {
                return Stop::Finished;
            }
            match read(fd, &mut buffer[..most]) {
                Ok(0) => return Stop::Finished,
                Ok(n) => {
                    hung_up = false;
                    if sink(&buffer[..n]).is_err() {
                        return Stop::Lost;
                    }
                    rest = rest.map(|r| r - n);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) if rest.is_some() => return Stop::Finished,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => hung_up = false,
                // A terminal that nobody has open; somebody may open it again.
                Err(e) if e.raw_os_error() == Some(libc::EIO) => hung_up = true,
                Err(_) => return Stop::Finished,
            }
        }
    }

    fn input(&self, fd: OwnedFd, connection: &UnixStream) {
        let slot = slot(&self.process, Stream::Stdin);
        let stop = self.feed(&fd, connection);
        let terminal = self.process.terminal;
        let mut state = slot.lock();
        let close = matches!(*state, State::Attached { close: true });
        *state = match stop {
            Stop::Finished => State::Done,
            // A lost terminal is not an end of file: who detaches will come back.
            Stop::Lost if terminal => {
                if close {
                    type_end_of_file(&fd);
                }
                State::Free(fd)
            }
            Stop::Lost if self.keep && !close => State::Free(fd),
            Stop::Lost => State::Done,
        };
        drop(state);
        slot.changed.notify_all();
    }

    fn feed(&self, fd: &OwnedFd, connection: &UnixStream) -> Stop {
        let mut buffer = vec![0; BUFFER];
        loop {
            let mut entries = [
                want(connection, libc::POLLIN),
                want(&self.process.ended, libc::POLLIN),
                // Only errors: the process has closed its input.
                want(fd, 0),
            ];
            if wait(&mut entries, None).is_err() || entries[1].revents != 0 {
                return Stop::Finished;
            }
            if entries[2].revents & libc::POLLERR != 0 && !self.process.terminal {
                return Stop::Finished;
            }
            if entries[0].revents == 0 {
                // A terminal that nobody has open hangs up for ever: do not spin on it.
                std::thread::sleep(Duration::from_millis(20));
                continue;
            }
            let n = match read(connection, &mut buffer) {
                Ok(0) => return Stop::Lost,
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return Stop::Lost,
            };
            if let Some(stop) = self.push(fd, &buffer[..n]) {
                return stop;
            }
        }
    }

    /// Writes all of `bytes` to the process, or says why not.
    fn push(&self, fd: &OwnedFd, mut bytes: &[u8]) -> Option<Stop> {
        while !bytes.is_empty() {
            match write(fd, bytes) {
                Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let ended = &self.process.ended;
                    let mut entries = [want(fd, libc::POLLOUT), want(ended, libc::POLLIN)];
                    if wait(&mut entries, None).is_err() || entries[1].revents != 0 {
                        return Some(Stop::Finished);
                    }
                }
                Err(_) => return Some(Stop::Finished),
            }
        }
        None
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        // Greeting failed: the stream is as free as before.
        if let Some(fd) = self.fd.take() {
            slot(&self.process, self.which).set(State::Free(fd));
        }
    }
}

/// Types the terminal's end-of-file character, if it takes whole lines at the moment.
fn type_end_of_file(master: &OwnedFd) {
    // SAFETY: termios is plain data for which all zeroes is valid.
    let mut settings: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: tcgetattr writes one termios.
    let known = unsafe { libc::tcgetattr(master.as_raw_fd(), &raw mut settings) } == 0;
    if known && settings.c_lflag & libc::ICANON != 0 {
        let _ = write(master, &[settings.c_cc[libc::VEOF]]);
    }
}
