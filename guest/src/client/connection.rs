//! From a socket path to a connection with the agent's greeting behind it.

use super::{
    Agent, ArchiveReader, ClientError, Events,
    agent::{ask, expect_done, unexpected},
    archive,
};
use crate::protocol::{AGENT_PORT, Open, PathStat, ProcessId, Reply, Stream, frame::FrameError};
use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::{ffi::OsStrExt, net::UnixStream},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// A machine's agent as somewhere to connect to. Cheap; holds no connection.
#[derive(Debug, Clone)]
pub struct Machine {
    uds: PathBuf,
    port: u32,
    timeout: Duration,
}

impl Machine {
    /// The agent behind the vsock socket at `uds`, on its usual port, with
    /// [`super::ANSWER_TIMEOUT`] for connecting and for quick answers.
    pub fn new(uds: impl Into<PathBuf>) -> Self {
        Self { uds: uds.into(), port: AGENT_PORT, timeout: super::ANSWER_TIMEOUT }
    }

    /// The same with another limit for connecting and for quick answers.
    #[must_use]
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Opens a connection for requests and exchanges greetings.
    ///
    /// # Errors
    /// Every variant of [`ClientError`] about connecting, and [`ClientError::Version`].
    pub fn control(&self) -> Result<Agent, ClientError> {
        Agent::over(self.connect()?, self.timeout)
    }

    /// Opens one standard stream of a process. What comes back is the raw stream: reading it
    /// to its end gives exactly what the process wrote; shutting it down for writing ends the
    /// process's input. It has no timeouts set.
    ///
    /// # Errors
    /// [`ClientError::Agent`] when the process, or that stream of it, is not there or taken.
    pub fn stream(&self, process: ProcessId, which: Stream) -> Result<UnixStream, ClientError> {
        self.attach(process, which, false)
    }

    /// As [`Self::stream`], for a keeper that comes back after a lost connection: input does
    /// not end with the connection (see [`Agent::close_stdin`]) and output waits in the
    /// process instead of being thrown away.
    ///
    /// # Errors
    /// As [`Self::stream`].
    pub fn kept_stream(&self, process: ProcessId, which: Stream) -> Result<UnixStream, ClientError> {
        self.attach(process, which, true)
    }

    fn attach(&self, process: ProcessId, stream: Stream, keep: bool) -> Result<UnixStream, ClientError> {
        let what = "open a stream";
        let mut connection = self.connect()?;
        let open = Open::Stream { process, stream, keep };
        expect_done(ask(&mut connection, &open, self.timeout, what)?, what)?;
        connection.set_read_timeout(None).map_err(ClientError::Stream)?;
        connection.set_write_timeout(None).map_err(ClientError::Stream)?;
        Ok(connection)
    }

    /// A path out of the container as a tar archive, with what the path is.
    ///
    /// The archive's first entry has the path's own last component as its name, or `.` when
    /// the path ends in `/.`. `follow` says whether a link at the end of the path is followed.
    ///
    /// # Errors
    /// [`ClientError::Agent`] when there is nothing at the path.
    pub fn read_archive(&self, path: &str, follow: bool) -> Result<(PathStat, ArchiveReader), ClientError> {
        let what = "read a path";
        let mut connection = self.connect()?;
        let open = Open::Read { path: path.into(), follow };
        match ask(&mut connection, &open, self.timeout, what)? {
            Reply::Path(stat) => Ok((stat, ArchiveReader::new(connection))),
            other => Err(unexpected(other, what)),
        }
    }

    /// Unpacks a tar archive into the existing directory `path` of the container.
    ///
    /// Everything becomes root's unless `keep_owner`; a file never replaces a directory nor
    /// the reverse unless `replace_kind`. Entries cannot leave the directory.
    ///
    /// # Errors
    /// [`ClientError::Input`] when `tar` fails, [`ClientError::Agent`] when unpacking does.
    pub fn write_archive(
        &self,
        path: &str,
        tar: impl Read,
        keep_owner: bool,
        replace_kind: bool,
    ) -> Result<(), ClientError> {
        let what = "write a path";
        let mut connection = self.connect()?;
        let open = Open::Write { path: path.into(), keep_owner, replace_kind };
        match ask(&mut connection, &open, self.timeout, what)? {
            Reply::Path(_) => archive::send(&mut connection, tar),
            other => Err(unexpected(other, what)),
        }
    }

    /// Opens a connection on which events arrive.
    ///
    /// # Errors
    /// Those about connecting.
    pub fn events(&self) -> Result<Events, ClientError> {
        let what = "send events";
        let mut connection = self.connect()?;
        expect_done(ask(&mut connection, &Open::Events {}, self.timeout, what)?, what)?;
        Ok(Events::new(connection))
    }

    fn connect(&self) -> Result<UnixStream, ClientError> {
        connect(&self.uds, self.port, self.timeout)
    }
}

/// Connects to a vsock port inside the machine: `CONNECT <port>` on the device's unix socket.
///
/// # Errors
/// [`ClientError::Connect`] when the socket is not there, [`ClientError::Refused`] when the
/// monitor closes (nobody listens in the guest), [`ClientError::Timeout`] and
/// [`ClientError::Handshake`].
pub fn connect(uds: &Path, port: u32, timeout: Duration) -> Result<UnixStream, ClientError> {
    let what = "accept a connection";
    let no_connection = |source| ClientError::Connect { path: uds.into(), source };
    let mut stream = connect_unix(uds, timeout).map_err(no_connection)?;
    stream.set_write_timeout(Some(timeout)).map_err(ClientError::Stream)?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).map_err(no_connection)?;
    // The answer is read byte by byte: what follows its newline belongs to the guest's stream.
    let mut from = Deadline::after(&stream, timeout);
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        match from.read(&mut byte) {
            Ok(0) if line.is_empty() => return Err(ClientError::Refused { port }),
            Err(e) if line.is_empty() && e.kind() == io::ErrorKind::ConnectionReset => {
                return Err(ClientError::Refused { port });
            }
            Ok(0) => return Err(ClientError::Handshake { path: uds.into() }),
            Ok(_) if line.len() >= 31 => {
                return Err(ClientError::Handshake { path: uds.into() });
            }
            Ok(_) => line.push(byte[0]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(ClientError::from_frame(what, timeout, FrameError::Stream(e))),
        }
    }
    if !line.starts_with(b"OK ") {
        return Err(ClientError::Handshake { path: uds.into() });
    }
    Ok(stream)
}

/// Connects without waiting for ever: a unix socket whose backlog is full blocks `connect`.
fn connect_unix(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let until = Instant::now() + timeout;
    let (address, length) = unix_address(path)?;
    // SAFETY: socket has no memory arguments.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and nobody else holds it.
    let stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
    stream.set_nonblocking(true)?;
    loop {
        // SAFETY: the address is a whole sockaddr_un, of which `length` bytes are set.
        let result = unsafe { libc::connect(stream.as_raw_fd(), (&raw const address).cast(), length) };
        match io::Error::last_os_error() {
            _ if result == 0 => break,
            // The only sign that a full backlog has room again is that connecting works.
            e if e.kind() == io::ErrorKind::WouldBlock && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(2));
            }
            e => return Err(e),
        }
    }
    stream.set_nonblocking(false)?;
    Ok(stream)
}

fn unix_address(path: &Path) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    // SAFETY: sockaddr_un is plain data for which all zeroes is valid.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("The path has {} bytes, a socket's may have 107", bytes.len()),
        ));
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    let length = std::mem::offset_of!(libc::sockaddr_un, sun_path) + bytes.len() + 1;
    Ok((address, length as libc::socklen_t))
}

/// A reader that gives up at one moment, however the bytes trickle.
pub(super) struct Deadline<'a> {
    stream: &'a UnixStream,
    until: Option<Instant>,
}

impl<'a> Deadline<'a> {
    pub(super) fn after(stream: &'a UnixStream, timeout: Duration) -> Self {
        // A moment too far away to be named is no limit.
        Self { stream, until: Instant::now().checked_add(timeout) }
    }

    pub(super) fn never(stream: &'a UnixStream) -> Self {
        Self { stream, until: None }
    }
}

impl Read for Deadline<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = match self.until {
            None => None,
            Some(until) => match until.checked_duration_since(Instant::now()) {
                Some(left) if !left.is_zero() => Some(left),
                _ => return Err(io::ErrorKind::TimedOut.into()),
            },
        };
        self.stream.set_read_timeout(left)?;
        (&mut &*self.stream).read(buffer)
    }
}
