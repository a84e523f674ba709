//! What carries a container's streams: to and from this process's own, and to the log.
//!
//! ```text
//!   agent ── stdout ──► thread ──┬─► our standard output (a foreground run)
//!         ── stderr ──► thread ──┴─► output.log
//!         ◄─ stdin ──── thread ◄──── our standard input (the same)
//! ```
//!
//! The agent keeps a stream that loses its connection, so a carriage can let go of all of them
//! and take them up again, from another monitor even. Letting go loses nothing: our half of each
//! connection is closed, the agent answers by closing its own, and what it had sent by then has
//! arrived when we read to the end. So nothing is on its way when the machine is stopped after
//! that.

use std::{
    fs::File,
    io::{self, Read, Write},
    net::Shutdown,
    os::{fd::FromRawFd, unix::net::UnixStream},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use guest::{
    client::ClientError,
    protocol::{FailureKind, MAIN, ProcessSpec, Stream},
};

use super::{
    super::{
        failure::{Failure, Outcome, doing},
        log::{self, Writer},
        state::Machine,
        terminal,
    },
    Attached,
};

/// How long the last output may take to arrive after the command ended.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the agent may take to let go of a stream.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the agent may take to notice that a stream lost its connection.
const NOTICE_TIMEOUT: Duration = Duration::from_secs(10);

/// The streams of a machine's main process.
pub(in crate::cli) struct Carriage {
    door: guest::client::Machine,
    terminal: bool,
    /// Where output goes besides the log.
    attached: Attached,
    output: Arc<Mutex<Writer>>,
    /// Output that is being carried.
    open: Vec<(UnixStream, JoinHandle<()>)>,
    input: Option<Arc<Input>>,
}

impl Carriage {
    /// Takes the streams up.
    pub(super) fn begin(machine: &Machine, process: &ProcessSpec, attached: Attached) -> Outcome<Carriage> {
        let output = Writer::open(&machine.file("output.log"));
        let output = doing(output, || "The output log cannot be opened".to_owned())?;
        let door = guest::client::Machine::new(machine.vsock());
        let terminal = process.terminal.is_some();
        let reads = attached == Attached::Yes && (process.stdin || terminal);
        let input = reads.then(|| Input::start(door.clone())).transpose()?;
        let output = Arc::new(Mutex::new(output));
        let mut carriage = Carriage { door, terminal, attached, output, open: Vec::new(), input };
        carriage.attach()?;
        if terminal && reads {
            terminal::make_raw(0);
        }
        Ok(carriage)
    }

    /// Takes the streams up again.
    pub(in crate::cli) fn attach(&mut self) -> Outcome<()> {
        let own = |fd| (self.attached == Attached::Yes).then_some(fd);
        let mut outputs = vec![(Stream::Stdout, own(1), log::Stream::Out)];
        if !self.terminal {
            outputs.push((Stream::Stderr, own(2), log::Stream::Err));
        }
        for (which, to, stream) in outputs {
            let from = self.connect(which)?;
            let ours = doing(from.try_clone(), || "A stream cannot be shared".to_owned())?;
            let thread = carry_out(from, to, stream, Arc::clone(&self.output));
            self.open.push((ours, thread));
        }
        if let Some(input) = &self.input {
            input.connect(Some(self.connect(Stream::Stdin)?));
        }
        Ok(())
    }

    /// A stream, also where the agent has yet to notice that the one before lost its connection.
    fn connect(&self, which: Stream) -> Outcome<UnixStream> {
        let until = Instant::now() + NOTICE_TIMEOUT;
        loop {
            match self.door.kept_stream(MAIN, which) {
                Err(ClientError::Agent(failure))
                    if failure.kind == FailureKind::Busy && Instant::now() < until =>
                {
                    thread::sleep(Duration::from_millis(10));
                }
                other => return Ok(other?),
            }
        }
    }

    /// Lets go of all streams, once everything that is on its way has arrived.
    pub(in crate::cli) fn detach(&mut self) -> Outcome<()> {
        let mut released = true;
        if let Some(stream) = self.input.as_ref().and_then(|input| input.connect(None)) {
            released = release(&stream);
        }
        for (stream, _) in &self.open {
            let _ = stream.shutdown(Shutdown::Write);
        }
        let open = std::mem::take(&mut self.open).into_iter().map(|(_, thread)| thread).collect();
        if released && join(open, RELEASE_TIMEOUT) {
            return Ok(());
        }
        Err(Failure::new("The agent inside the machine does not let go of the container's output"))
    }

    /// Waits until everything that was printed has arrived.
    pub(super) fn finish(self) {
        join(self.open.into_iter().map(|(_, thread)| thread).collect(), DRAIN_TIMEOUT);
    }
}

/// Waits for threads to end; false when `limit` is over before.
fn join(threads: Vec<JoinHandle<()>>, limit: Duration) -> bool {
    let until = Instant::now() + limit;
    for thread in threads {
        while !thread.is_finished() {
            if Instant::now() >= until {
                return false;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
    true
}

/// Ends our half of a stream and waits for the other to be ended.
fn release(mut stream: &UnixStream) -> bool {
    let mut rest = [0; 64];
    let closed = stream.shutdown(Shutdown::Write).is_err()
        || stream.set_read_timeout(Some(RELEASE_TIMEOUT)).is_err()
        || matches!(stream.read(&mut rest), Ok(0));
    let _ = stream.shutdown(Shutdown::Both);
    closed
}

/// Standard input on its way to the container, over one connection after the other.
struct Input {
    to: Mutex<Option<UnixStream>>,
    changed: Condvar,
}

impl Input {
    /// Begins to read; nothing is lost while there is no connection.
    fn start(door: guest::client::Machine) -> Outcome<Arc<Input>> {
        let input = Arc::new(Input { to: Mutex::new(None), changed: Condvar::new() });
        let carrier = Arc::clone(&input);
        let started = thread::Builder::new().spawn(move || carrier.carry(&door));
        doing(started.map(|_| input), || "No thread can be had".to_owned())
    }

    fn lock(&self) -> MutexGuard<'_, Option<UnixStream>> {
        self.to.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Goes on over another connection, or over none. Returns the one before.
    fn connect(&self, next: Option<UnixStream>) -> Option<UnixStream> {
        let before = std::mem::replace(&mut *self.lock(), next);
        self.changed.notify_all();
        before
    }

    fn carry(&self, door: &guest::client::Machine) {
        let mut stdin = io::stdin().lock();
        let mut buffer = vec![0; log::ENTRY_MAX];
        loop {
            match stdin.read(&mut buffer) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    super::readable(&[0], Duration::from_secs(3600));
                }
                Ok(0) | Err(_) => break,
                Ok(got) => self.write(buffer.get(..got).unwrap_or_default()),
            }
        }
        // The end of our input is the end of its input: the agent is told, because it keeps a
        // stream that merely loses its connection.
        let to = self.lock();
        let to = self.changed.wait_while(to, |to| to.is_none()).unwrap_or_else(PoisonError::into_inner);
        if let (Some(stream), Ok(mut agent)) = (&*to, door.control()) {
            let _ = agent.close_stdin(MAIN);
            let _ = stream.shutdown(Shutdown::Write);
        }
    }

    /// Writes all of `bytes`, over as many connections as it takes.
    fn write(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let to = self.lock();
            let to = self.changed.wait_while(to, |to| to.is_none()).unwrap_or_else(PoisonError::into_inner);
            let Some(stream) = to.as_ref().and_then(|stream| stream.try_clone().ok()) else { continue };
            drop(to);
            match (&stream).write(bytes) {
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.lose(&stream),
            }
        }
    }

    /// Forgets a connection that failed, unless there is another one by now.
    fn lose(&self, stream: &UnixStream) {
        let mut to = self.lock();
        // Both are ends of the same socket if they have the same peer; a socket has no other name.
        let same = |other: &UnixStream| inode(other) == inode(stream);
        if to.as_ref().is_some_and(same) {
            *to = None;
        }
    }
}

fn inode(stream: &UnixStream) -> Option<u64> {
    use std::os::fd::AsFd;
    rustix::fs::fstat(stream.as_fd()).ok().map(|stat| stat.st_ino)
}

fn carry_out(
    mut from: UnixStream,
    to: Option<i32>,
    stream: log::Stream,
    log: Arc<Mutex<Writer>>,
) -> JoinHandle<()> {
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
