//! Connections: what each is for, and the answers to requests.
//!
//! One thread a connection, made when it comes and gone when it ends. That is as many threads
//! as there are open streams, which is few; in return every wait is a plain blocking one with
//! a limit, and a stuck connection is nobody else's problem.

use super::{
    archive::{self, BlockReader, BlockWriter, Rules},
    clock,
    container::Container,
    events::Events,
    network,
    power::Power,
    process::Process,
    streams::{self, GRACE},
    syscall::{wait, want},
    transport::{self, Arrival, Listener},
};
use guest::protocol::{
    Failure, FailureKind, Hello, Open, ProcessId, Reply, Request, VERSION,
    frame::{self, FrameError},
};
use std::{
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// Most connections at once.
const MAX_CONNECTIONS: usize = 1024;

/// A connection's thread needs little: JSON is parsed with bounded depth, buffers are on the
/// heap.
const STACK: usize = 256 << 10;

/// Longest wait for a connection to say what it is for.
const OPEN_LIMIT: Duration = Duration::from_secs(10);

/// Longest wait for the host to take a reply.
const REPLY_LIMIT: Duration = Duration::from_secs(30);

/// Longest wait for the next block of an archive, and bytes read of one after a failure.
const ARCHIVE_LIMIT: Duration = Duration::from_secs(60);
const ARCHIVE_REST: u64 = 64 << 20;

/// Everything a connection may need.
pub struct Server {
    pub container: Arc<Container>,
    pub events: Arc<Events>,
    pub power: Arc<Power>,
    pub ready_us: u64,
    connections: AtomicUsize,
}

impl Server {
    pub fn new(container: Arc<Container>, events: Arc<Events>, power: Arc<Power>, ready_us: u64) -> Self {
        Self { container, events, power, ready_us, connections: AtomicUsize::new(0) }
    }

    /// Takes connections for ever.
    pub fn listen(self: &Arc<Self>, listener: &Listener) -> ! {
        loop {
            match listener.accept() {
                Ok(Some(arrival)) => self.admit(arrival),
                Ok(None) => {}
                // Out of descriptors or memory: let others finish first.
                Err(_) => thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    /// Serves a connection on a thread of its own, unless there are too many.
    pub fn admit(self: &Arc<Self>, arrival: Arrival) {
        struct Leave(Arc<Server>);
        impl Drop for Leave {
            fn drop(&mut self) {
                self.0.connections.fetch_sub(1, Ordering::Relaxed);
            }
        }
        let before = self.connections.fetch_add(1, Ordering::Relaxed);
        let leave = Leave(self.clone());
        if before >= MAX_CONNECTIONS {
            return;
        }
        // If there is no thread to be had the connection closes, which says enough.
        let _ = thread::Builder::new().stack_size(STACK).spawn(move || {
            let connection = match arrival {
                Arrival::Host(connection) => Some(connection),
                Arrival::Test(connection) => transport::greet(connection).ok(),
            };
            if let Some(mut connection) = connection {
                // What went wrong with a connection has been said on it, if it could be.
                let _ = leave.0.serve(&mut connection);
            }
        });
    }

    fn serve(&self, connection: &mut UnixStream) -> Result<(), FrameError> {
        connection.set_read_timeout(Some(OPEN_LIMIT)).map_err(FrameError::Stream)?;
        connection.set_write_timeout(Some(REPLY_LIMIT)).map_err(FrameError::Stream)?;
        let open = match frame::read(connection) {
            Ok(open) => open,
            Err(e) => return refuse(connection, e),
        };
        connection.set_read_timeout(None).map_err(FrameError::Stream)?;
        match open {
            Open::Control { version } if version == VERSION => {
                frame::write(connection, &Reply::Hello(self.hello()))?;
                self.control(connection)
            }
            Open::Control { version } => {
                let message = format!("The agent speaks protocol {VERSION}, not {version}");
                answer(connection, Err(Failure::new(FailureKind::Version, message)))
            }
            Open::Stream { process, stream, keep } => {
                let process = self.container.processes.get(process);
                match process.and_then(|p| streams::attach(p, stream, keep)) {
                    Err(failure) => answer(connection, Err(failure)),
                    Ok(pump) => {
                        answer(connection, Ok(Reply::Done {}))?;
                        connection.set_write_timeout(None).map_err(FrameError::Stream)?;
                        pump.run(connection);
                        Ok(())
                    }
                }
            }
            Open::Read { path, follow } => self.read_archive(connection, &path, follow),
            Open::Write { path, keep_owner, replace_kind } => {
                self.write_archive(connection, &path, Rules { keep_owner, replace_kind })
            }
            Open::Events {} => {
                let greet = |c: &mut UnixStream| frame::write(c, &Reply::Done {}).is_ok();
                self.events.serve(connection, greet).map_err(FrameError::Stream)
            }
        }
    }

    fn hello(&self) -> Hello {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Hello {
            version: VERSION,
            agent: env!("CARGO_PKG_VERSION").into(),
            kernel: release.trim().into(),
            ready_us: self.ready_us,
        }
    }

    /// Requests one after the other until the host hangs up.
    fn control(&self, connection: &mut UnixStream) -> Result<(), FrameError> {
        loop {
            match frame::read(connection) {
                Ok(Request::Wait { process, timeout_ms }) => {
                    let limit = timeout_ms.map(Duration::from_millis);
                    let Some(reply) = self.wait(connection, process, limit) else {
                        return Ok(());
                    };
                    answer(connection, reply)?;
                }
                Ok(Request::Shutdown { reboot }) => {
                    self.power.shut_down(&self.container);
                    let said = answer(connection, Ok(Reply::Done {}));
                    self.power.off(reboot);
                    return said;
                }
                Ok(request) => {
                    let reply = self.execute(request);
                    answer(connection, reply)?;
                }
                // The message's bounds were right: the next one can be found.
                Err(e @ FrameError::Content(_)) => refuse(connection, e)?,
                Err(e) => return refuse(connection, e),
            }
        }
    }

    fn execute(&self, request: Request) -> Result<Reply, Failure> {
        let container = &self.container;
        let started = |p: Arc<Process>| Reply::Started { process: p.id, pid: p.pid.cast_unsigned() };
        match request {
            Request::Setup(setup) => container.setup(*setup)?,
            Request::Start(spec) => return container.start(&spec).map(started),
            Request::Exec(spec) => return container.exec(&spec).map(started),
            Request::Signal { process, signal } => container.processes.signal(process, signal)?,
            Request::Resize { process, size } => {
                container.processes.get(process)?.streams.resize(size)?;
            }
            Request::CloseStdin { process } => {
                container.processes.get(process)?.streams.close_stdin();
            }
            Request::List {} => return Ok(Reply::Processes(container.processes.list())),
            Request::Stats {} => return Ok(Reply::Stats(Box::new(container.cgroup.stats()))),
            Request::Stat { path, follow } => {
                return container.within(|| archive::stat(&path, follow)).map(Reply::Path);
            }
            // SAFETY: sync has no arguments and cannot fail.
            Request::Sync {} => unsafe { libc::sync() },
            Request::SetTime { unix_ns, entropy } => {
                clock::feed(&entropy)?;
                clock::set(unix_ns)?;
            }
            Request::Identify(identity) => return container.identify(&identity).map(Reply::Identified),
            Request::Network { interfaces } => network::configure(&interfaces)?,
            Request::Wait { .. } | Request::Shutdown { .. } => {
                return Err(Failure::new(FailureKind::BadRequest, "Not here"));
            }
        }
        Ok(Reply::Done {})
    }

    /// Waits for a process's end; `None` when the host has hung up meanwhile.
    fn wait(
        &self,
        connection: &UnixStream,
        id: ProcessId,
        limit: Option<Duration>,
    ) -> Option<Result<Reply, Failure>> {
        let process = match self.container.processes.get(id) {
            Ok(process) => process,
            Err(failure) => return Some(Err(failure)),
        };
        let until = limit.and_then(|l| Instant::now().checked_add(l));
        let mut ended_at = None;
        loop {
            if let Some(exit) = process.exit().filter(|_| process.ended.is_set()) {
                let since = *ended_at.get_or_insert_with(Instant::now);
                if process.streams.settled.is_set() {
                    return Some(Ok(Reply::Exited(exit.clone())));
                }
                if process.streams.unopened() && since.elapsed() >= GRACE {
                    process.streams.abandon();
                    continue;
                }
            }
            let left = until.map(|u| u.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Some(Ok(Reply::Running {}));
            }
            // Output that nobody has opened is looked at again when its time is over.
            let patience = ended_at.map(|_| Duration::from_secs(1));
            let latch = if ended_at.is_some() { &process.streams.settled } else { &process.ended };
            let mut entries = [want(latch, libc::POLLIN), want(connection, libc::POLLRDHUP)];
            let shortest = [left, patience].into_iter().flatten().min();
            if wait(&mut entries, shortest).is_err() || entries[1].revents != 0 {
                return None;
            }
        }
    }

    fn read_archive(&self, connection: &mut UnixStream, path: &str, follow: bool) -> Result<(), FrameError> {
        match self.container.within(|| archive::stat(path, follow)) {
            Ok(stat) => answer(connection, Ok(Reply::Path(stat)))?,
            Err(failure) => return answer(connection, Err(failure)),
        }
        let stream = &*connection;
        let packed = self.container.within(|| {
            let blocks = archive::pack(path, follow, BlockWriter::new(stream))?;
            let failed = |e| Failure::new(FailureKind::System, format!("Cannot send: {e}"));
            blocks.finish().map_err(failed)
        });
        if packed.is_err() {
            // The end of the blocks comes before the verdict, also of half an archive.
            frame::write_block(connection, b"")?;
        }
        answer(connection, packed.map(|()| Reply::Done {}))
    }

    fn write_archive(&self, connection: &mut UnixStream, path: &str, rules: Rules) -> Result<(), FrameError> {
        connection.set_read_timeout(Some(ARCHIVE_LIMIT)).map_err(FrameError::Stream)?;
        match self.container.within(|| archive::stat(path, true)) {
            Ok(stat) => answer(connection, Ok(Reply::Path(stat)))?,
            Err(failure) => return answer(connection, Err(failure)),
        }
        let stream = &*connection;
        let unpacked = self.container.within(|| {
            let mut blocks = BlockReader::new(stream);
            archive::unpack(path, &mut blocks, rules)?;
            // An archive has padding after its end.
            blocks
                .skip_rest(ARCHIVE_REST)
                .map_err(|e| Failure::new(FailureKind::BadRequest, format!("The archive has no end: {e}")))
        });
        let failed = unpacked.is_err();
        let said = answer(connection, unpacked.map(|()| Reply::Done {}));
        if failed {
            // Closing with bytes unread could take the reply back: read a little on.
            let brief = Some(Duration::from_secs(2));
            connection.set_read_timeout(brief).map_err(FrameError::Stream)?;
            let _ = std::io::copy(&mut std::io::Read::take(&*connection, ARCHIVE_REST), &mut std::io::sink());
        }
        said
    }
}

fn answer(connection: &mut UnixStream, reply: Result<Reply, Failure>) -> Result<(), FrameError> {
    let reply = reply.unwrap_or_else(Reply::Failed);
    match frame::write(connection, &reply) {
        Err(FrameError::Length { length, .. }) => {
            let message = format!("The answer has {length} bytes, too many to be sent");
            frame::write(connection, &Reply::Failed(Failure::new(FailureKind::Limit, message)))
        }
        other => other,
    }
}

/// Says why a message is not answered, if there is someone to hear it.
fn refuse(connection: &mut UnixStream, error: FrameError) -> Result<(), FrameError> {
    let message = match &error {
        FrameError::Content(why) => format!("The message is not understood: {why}"),
        FrameError::Length { .. } => error.to_string(),
        _ => return Err(error),
    };
    answer(connection, Err(Failure::new(FailureKind::BadRequest, message)))
}
