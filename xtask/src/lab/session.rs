//! One run, seen from the host: the machine's frames become the caller's output, the caller's
//! input becomes frames, and signals, the time limit or a broken pipe end it.
//!
//! One loop waits for all of it; only standard input, which may be anything, has a thread.

use std::io::{self, Read, Write, stdin};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::frame::{self, Assembler, Kind};
use super::machine::Machine;
use super::{Lab, Streams, terminal};
use crate::progress;

/// Exit code when the time limit ended the command, as coreutils' timeout has it.
const TIMED_OUT: u8 = 124;
/// Exit code of a writer whose reader has gone: 128 + SIGPIPE.
const BROKEN_PIPE: u8 = 141;
/// What a pipe takes at once without blocking when it is writable.
const PIPE_PIECE: usize = 4096;
/// What a terminal in raw mode gives for Ctrl-C: the command's, but so many in a row end a
/// machine that answers to nothing.
const CTRL_C: u8 = 3;
const INTERRUPTS_TO_END: u32 = 5;
/// How often the machine's processors are woken (see `machine.rs`).
const PULSE: Duration = Duration::from_millis(250);
/// Signals that end the run.
const ENDING: [i32; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

/// Ending signals as a file descriptor, blocked elsewhere until this is dropped.
pub struct Signals {
    file: OwnedFd,
    before: libc::sigset_t,
}

impl Signals {
    /// Blocks the signals in this thread and those it starts.
    pub fn block() -> Result<Self> {
        // SAFETY: the sets are initialised by sigemptyset or filled by pthread_sigmask before
        // they are read; the descriptor is checked before it is owned.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            let mut before: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            for signal in ENDING.into_iter().chain([libc::SIGWINCH]) {
                libc::sigaddset(&raw mut set, signal);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, &raw mut before);
            let descriptor = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if descriptor < 0 {
                return Err(io::Error::last_os_error()).context("Cannot watch for signals");
            }
            Ok(Self { file: OwnedFd::from_raw_fd(descriptor), before })
        }
    }

    fn take(&self) -> Option<i32> {
        let mut record = [0u8; size_of::<libc::signalfd_siginfo>()];
        // SAFETY: the pointer and length describe the buffer.
        let length = unsafe { libc::read(self.file.as_raw_fd(), record.as_mut_ptr().cast(), record.len()) };
        let [a, b, c, d, ..] = record;
        (length > 0).then(|| i32::from_ne_bytes([a, b, c, d]))
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // SAFETY: the set that pthread_sigmask gave.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut());
        }
    }
}

/// How a run went.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// Exit code of the command.
    pub code: u8,
    /// How long the machine took until the command was started.
    pub start: Duration,
}

/// Why the loop stopped before the command's own end.
enum Ended {
    Code(u8),
    Gone,
}

/// The state of one run.
pub struct Session<'a> {
    machine: Machine,
    signals: Signals,
    streams: &'a mut Streams,
    deadline: Option<Instant>,
    limit: Duration,
    writer: Arc<Mutex<UnixStream>>,
    interactive: bool,
    pulse: bool,
    raw: Option<terminal::Raw>,
    begin: Instant,
    start: Duration,
}

impl<'a> Session<'a> {
    /// Takes a started machine over for what `lab` asks for.
    pub fn new(
        machine: Machine,
        signals: Signals,
        streams: &'a mut Streams,
        lab: &Lab,
        interactive: bool,
    ) -> Result<Self> {
        let limit = lab.time_limit;
        let writer = Arc::new(Mutex::new(machine.port.try_clone()?));
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        let limit = limit.unwrap_or_default();
        Ok(Self {
            machine,
            signals,
            streams,
            deadline,
            limit,
            writer,
            interactive,
            // Where instructions are counted there is one thread, and what it runs is measured.
            pulse: !lab.count_instructions,
            raw: None,
            begin: Instant::now(),
            start: Duration::ZERO,
        })
    }

    /// Runs until the command or something else ends.
    pub fn run(mut self) -> Result<Outcome> {
        self.feed_input();
        if self.pulse {
            self.feed_pulses();
        }
        let ended = self.watch();
        self.raw = None;
        match ended? {
            Ended::Code(code) => Ok(Outcome { code, start: self.start }),
            Ended::Gone => {
                bail!(
                    "The lab's machine died before the command ended; the end of its console:\n{}",
                    self.machine.last_words()
                )
            }
        }
    }

    fn feed_input(&self) {
        let writer = Arc::clone(&self.writer);
        if !self.streams.takes_input() {
            let _ = frame::send(&*lock(&writer), Kind::StdinEnd, &[]);
            return;
        }
        let interactive = self.interactive;
        thread::spawn(move || {
            let mut buffer = vec![0; frame::PAYLOAD_MAX];
            let mut interrupts = 0;
            loop {
                let length = stdin().lock().read(&mut buffer).unwrap_or(0);
                interrupts = if buffer[..length] == [CTRL_C] { interrupts + 1 } else { 0 };
                if interactive && interrupts == INTERRUPTS_TO_END {
                    // SAFETY: a signal to this process, which `Signals` watches.
                    unsafe { libc::kill(libc::getpid(), libc::SIGINT) };
                }
                let kind = if length == 0 { Kind::StdinEnd } else { Kind::Stdin };
                if frame::send(&*lock(&writer), kind, &buffer[..length]).is_err() || length == 0 {
                    return;
                }
            }
        });
    }

    fn feed_pulses(&self) {
        let writer = Arc::clone(&self.writer);
        thread::spawn(move || {
            loop {
                thread::sleep(PULSE);
                if frame::send(&*lock(&writer), Kind::Pulse, &[]).is_err() {
                    return;
                }
            }
        });
    }

    fn watch(&mut self) -> Result<Ended> {
        let mut assembler = Assembler::default();
        let mut buffer = vec![0; frame::PAYLOAD_MAX];
        loop {
            if let Some(ended) = self.wait(self.machine.port.as_raw_fd(), libc::POLLIN)? {
                return Ok(ended);
            }
            match self.machine.port.read(&mut buffer) {
                Ok(0) | Err(_) => return Ok(Ended::Gone),
                Ok(length) => assembler.feed(&buffer[..length]),
            }
            while let Some((kind, bytes)) = assembler.next()? {
                if let Some(ended) = self.take(kind, &bytes)? {
                    return Ok(ended);
                }
            }
        }
    }

    fn take(&mut self, kind: Kind, bytes: &[u8]) -> Result<Option<Ended>> {
        match (kind, bytes) {
            (Kind::Started, _) => {
                self.start = self.begin.elapsed();
                // Not earlier: until here Ctrl-C must end a machine that does not come up.
                self.raw = if self.interactive { terminal::Raw::enter() } else { None };
                Ok(None)
            }
            (Kind::Exit, [code]) => Ok(Some(Ended::Code(*code))),
            (Kind::Failed, [code, reason @ ..]) => {
                eprintln!("lab: {}\r", String::from_utf8_lossy(reason));
                Ok(Some(Ended::Code(*code)))
            }
            (Kind::Stdout | Kind::Stderr, _) => match &mut self.streams {
                Streams::Captured { stdout, stderr } => {
                    (if kind == Kind::Stdout { stdout } else { stderr }).extend_from_slice(bytes);
                    Ok(None)
                }
                streams => {
                    if let (Streams::OutputOnly { stdout }, Kind::Stdout) = (streams, kind) {
                        stdout.extend_from_slice(bytes);
                    }
                    self.pass_on(if kind == Kind::Stdout { 1 } else { 2 }, bytes)
                }
            },
            _ => bail!("The lab's machine sent a frame that makes no sense ({kind:?})"),
        }
    }

    /// Writes to a stream of ours piece by piece, so that a reader who takes his time does not
    /// keep signals and the time limit waiting.
    fn pass_on(&mut self, stream: RawFd, bytes: &[u8]) -> Result<Option<Ended>> {
        let mut rest = bytes;
        while !rest.is_empty() {
            if let Some(ended) = self.wait(stream, libc::POLLOUT)? {
                return Ok(Some(ended));
            }
            let piece = &rest[..rest.len().min(PIPE_PIECE)];
            // SAFETY: the pointer and length describe the piece.
            let length = unsafe { libc::write(stream, piece.as_ptr().cast(), piece.len()) };
            match usize::try_from(length) {
                Ok(length) => rest = &rest[length..],
                Err(_) => match io::Error::last_os_error().kind() {
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => {}
                    io::ErrorKind::BrokenPipe => return Ok(Some(Ended::Code(BROKEN_PIPE))),
                    _ => return Err(io::Error::last_os_error()).context("Cannot pass output on"),
                },
            }
        }
        Ok(None)
    }

    /// Waits until `file` is ready; an answer means that the run is over instead.
    fn wait(&self, file: RawFd, event: i16) -> Result<Option<Ended>> {
        loop {
            let patience = match self.deadline.map(|at| at.checked_duration_since(Instant::now())) {
                None => -1,
                Some(None) => {
                    eprintln!("lab: the command did not end within {}\r", progress::seconds(self.limit));
                    return Ok(Some(Ended::Code(TIMED_OUT)));
                }
                Some(Some(left)) => i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX),
            };
            let mut files = [
                libc::pollfd { fd: self.signals.file.as_raw_fd(), events: libc::POLLIN, revents: 0 },
                libc::pollfd { fd: file, events: event, revents: 0 },
            ];
            // SAFETY: the pointer and count describe the array.
            let answer = unsafe { libc::poll(files.as_mut_ptr(), 2, patience) };
            if answer < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                return Err(io::Error::last_os_error()).context("Cannot wait for the machine");
            }
            match self.signals.take() {
                Some(libc::SIGWINCH) => self.send_size(),
                Some(signal) => {
                    return Ok(Some(Ended::Code(u8::try_from(128 + signal).unwrap_or(255))));
                }
                None => {}
            }
            if answer > 0 && files[1].revents != 0 {
                return Ok(None);
            }
        }
    }

    fn send_size(&self) {
        // When the input thread holds the port, the guest is behind with reading: the next
        // change of size will do.
        if let (true, Ok(writer)) = (self.interactive, self.writer.try_lock()) {
            let (rows, columns) = terminal::size();
            let bytes = [rows.to_le_bytes(), columns.to_le_bytes()].concat();
            let _ = frame::send(&*writer, Kind::Resize, &bytes);
        }
    }
}

fn lock(writer: &Mutex<UnixStream>) -> std::sync::MutexGuard<'_, UnixStream> {
    writer.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Flushes what Rust's own buffers hold before bytes are written past them.
pub fn flush_own_output() {
    let _ = io::stdout().flush();
    let _ = io::stderr().flush();
}
