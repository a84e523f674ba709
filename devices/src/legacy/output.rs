//! What stands at the far end of a serial port or console, and how it is written to.
//!
//! | far end      | output                                   | input                        |
//! |--------------|------------------------------------------|------------------------------|
//! | `None`       | swallowed                                | none                         |
//! | `Stdio`      | standard output                          | standard input, if pollable  |
//! | `File`       | appended, directly                       | none                         |
//! | `Pty`        | a new pseudo-terminal, raw               | the same                     |
//! | `Socket`     | the one client of a unix socket          | the same                     |
//!
//! A write must never wait. Descriptors that are ours are made non-blocking. Standard output
//! is not ours: it shares its open file with the shell and with whoever else holds it, and
//! making *that* non-blocking breaks them. So it is opened a second time through `/proc`,
//! which gives the same pipe or terminal under an open file of its own; a socket is written
//! with `MSG_DONTWAIT`; only where neither works is the flag set, and taken back at the end.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::{
            fs::{FileTypeExt, OpenOptionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

use crate::virtio::vsock::door::private_listener;

/// What stands at the far end.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Output {
    /// Nothing: output is swallowed, no input comes.
    #[default]
    None,
    /// Standard output and, when it can be waited for (a terminal, a pipe, a socket),
    /// standard input. Terminal modes are left as they are.
    Stdio,
    /// A file, made if need be (mode 0600), that output is added to; or a named pipe.
    File(PathBuf),
    /// A new pseudo-terminal; its path is reported.
    Pty,
    /// A unix socket made at this path (mode 0600). One client at a time gets the output; what comes
    /// while nobody is connected is kept, the last [`crate::limits::CONSOLE_BUFFER`] bytes
    /// of it, for the next one.
    Socket(PathBuf),
}

/// Why a far end cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// The file cannot be opened for writing.
    #[error("Console output file {} cannot be opened for writing", .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The path is there but is not a file or named pipe.
    #[error("Console output {} is {found}; a regular file or named pipe is needed", .path.display())]
    Kind {
        /// The path.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// The socket cannot be made.
    #[error("Console socket {} cannot be made", .path.display())]
    Socket {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No pseudo-terminal could be had.
    #[error("A pseudo-terminal for the console cannot be made")]
    Pty(#[source] io::Error),
    /// A descriptor could not be made or duplicated.
    #[error("A descriptor for the console cannot be made")]
    Descriptor(#[source] io::Error),
}

/// A far end, opened.
#[derive(Default)]
pub(super) struct Opened {
    pub(super) sink: Option<Sink>,
    pub(super) input: Option<OwnedFd>,
    pub(super) listener: Option<UnixListener>,
    /// The guest-side end of a pseudo-terminal is kept open, or reading from the other side
    /// would fail while nobody else has it open.
    pub(super) terminal: Option<OwnedFd>,
    /// Where it is found: the path of the pseudo-terminal or the socket.
    pub(super) place: Option<PathBuf>,
}

impl Output {
    /// Opens the far end.
    pub(super) fn open(&self) -> Result<Opened, OutputError> {
        match self {
            Output::None => Ok(Opened::default()),
            Output::Stdio => {
                let sink = Sink::shared(io::stdout().as_fd().as_raw_fd());
                let input = io::stdin().as_fd().try_clone_to_owned();
                let input = input.ok().filter(|fd| !is_regular(fd));
                Ok(Opened { sink: Some(sink.map_err(OutputError::Descriptor)?), input, ..Opened::default() })
            }
            Output::File(path) => {
                Ok(Opened { sink: Some(open_file(path)?), place: Some(path.clone()), ..Opened::default() })
            }
            Output::Pty => open_pty().map_err(OutputError::Pty),
            Output::Socket(path) => {
                let bound = listen(path);
                let listener = bound.map_err(|source| OutputError::Socket { path: path.clone(), source })?;
                Ok(Opened { listener: Some(listener), place: Some(path.clone()), ..Opened::default() })
            }
        }
    }
}

/// How a write to a descriptor is kept from waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    /// A regular file never makes a writer wait for a reader.
    Plain,
    /// The open file is ours and non-blocking.
    Nonblocking,
    /// `MSG_DONTWAIT`.
    Socket,
    /// The open file is shared; its flags are put back to these.
    Borrowed(libc::c_int),
}

/// A descriptor that is written to without waiting.
pub(super) struct Sink {
    fd: OwnedFd,
    manner: Manner,
}

impl Sink {
    /// Wraps a descriptor whose open file others hold too.
    pub(super) fn shared(fd: RawFd) -> io::Result<Sink> {
        // SAFETY: duplicates a descriptor number; the result is checked and owned here alone.
        let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
        if copy < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `copy` was just made and belongs to nobody else.
        let copy = File::from(unsafe { OwnedFd::from_raw_fd(copy) });
        let kind = copy.metadata()?.file_type();
        if kind.is_file() {
            return Ok(Sink { fd: copy.into(), manner: Manner::Plain });
        }
        if kind.is_socket() {
            return Ok(Sink { fd: copy.into(), manner: Manner::Socket });
        }
        let again = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(format!("/proc/self/fd/{}", copy.as_raw_fd()));
        match again {
            Ok(own) => Ok(Sink { fd: own.into(), manner: Manner::Nonblocking }),
            Err(_) => {
                let flags = add_nonblocking(copy.as_raw_fd())?;
                Ok(Sink { fd: copy.into(), manner: Manner::Borrowed(flags) })
            }
        }
    }

    /// Wraps a connected stream socket.
    pub(super) fn socket(stream: UnixStream) -> Sink {
        Sink { fd: stream.into(), manner: Manner::Socket }
    }

    /// Whether a full reader makes a write fail with `WouldBlock`; else what cannot be
    /// written is lost for good.
    pub(super) fn can_fill(&self) -> bool {
        self.manner != Manner::Plain
    }

    /// Writes what fits, without waiting.
    pub(super) fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let fd = self.fd.as_raw_fd();
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        loop {
            // SAFETY: the pointer and length are those of a live slice.
            let sent = unsafe {
                match self.manner {
                    Manner::Socket => libc::send(fd, bytes.as_ptr().cast(), bytes.len(), flags),
                    _ => libc::write(fd, bytes.as_ptr().cast(), bytes.len()),
                }
            };
            match usize::try_from(sent) {
                Ok(sent) => return Ok(sent),
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }
}

impl AsRawFd for Sink {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        if let Manner::Borrowed(flags) = self.manner {
            // SAFETY: sets the status flags of an open descriptor.
            unsafe { libc::fcntl(self.fd.as_raw_fd(), libc::F_SETFL, flags) };
        }
    }
}

fn is_regular(fd: &OwnedFd) -> bool {
    let copy = fd.try_clone().map(File::from);
    copy.and_then(|f| f.metadata()).is_ok_and(|m| m.is_file())
}

/// Makes the open file non-blocking and returns the flags it had.
fn add_nonblocking(fd: RawFd) -> io::Result<libc::c_int> {
    // SAFETY: reads and sets the status flags of an open descriptor.
    unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        if flags < 0 || libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(flags)
    }
}

fn open_file(path: &Path) -> Result<Sink, OutputError> {
    let pipe = path.metadata().is_ok_and(|m| m.file_type().is_fifo());
    // A pipe is also opened for reading: then it may be opened before its reader is there,
    // and the reader may come and go.
    let opened = OpenOptions::new()
        .append(true)
        .create(true)
        .read(pipe)
        .mode(0o600)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path);
    let opened = opened.and_then(|f| f.metadata().map(|m| (f, m.file_type())));
    let (file, kind) = match opened {
        Ok(found) => found,
        Err(e) if e.kind() == io::ErrorKind::IsADirectory => {
            return Err(OutputError::Kind { path: path.to_owned(), found: "a directory" });
        }
        Err(source) => return Err(OutputError::Open { path: path.to_owned(), source }),
    };
    if kind.is_block_device() {
        return Err(OutputError::Kind { path: path.to_owned(), found: "a block device" });
    }
    let manner = if kind.is_file() { Manner::Plain } else { Manner::Nonblocking };
    Ok(Sink { fd: file.into(), manner })
}

/// Makes the socket; one left by a process that is gone is replaced, one in use is not.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let bound = match private_listener(path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            let stale = path.symlink_metadata().is_ok_and(|m| m.file_type().is_socket())
                && UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused);
            if !stale {
                return Err(e);
            }
            std::fs::remove_file(path)?;
            private_listener(path)
        }
        bound => bound,
    }?;
    // Non-blocking already.
    Ok(bound.into())
}

fn open_pty() -> io::Result<Opened> {
    let master = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open("/dev/ptmx")?;
    let (unlocked, mut number): (libc::c_int, libc::c_int) = (0, 0);
    // SAFETY: each call gets a live descriptor and, where it takes one, a pointer to an int
    // or a termios that lives across it; results are checked before they are used.
    let slave = unsafe {
        let fd = master.as_raw_fd();
        if libc::ioctl(fd, libc::TIOCSPTLCK, &raw const unlocked) < 0
            || libc::ioctl(fd, libc::TIOCGPTN, &raw mut number) < 0
        {
            return Err(io::Error::last_os_error());
        }
        let slave = libc::ioctl(fd, libc::TIOCGPTPEER, libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC);
        if slave < 0 {
            return Err(io::Error::last_os_error());
        }
        let slave = OwnedFd::from_raw_fd(slave);
        let mut modes: libc::termios = std::mem::zeroed();
        if libc::tcgetattr(slave.as_raw_fd(), &raw mut modes) < 0 {
            return Err(io::Error::last_os_error());
        }
        libc::cfmakeraw(&raw mut modes);
        if libc::tcsetattr(slave.as_raw_fd(), libc::TCSANOW, &raw const modes) < 0 {
            return Err(io::Error::last_os_error());
        }
        slave
    };
    let input = master.try_clone()?.into();
    Ok(Opened {
        sink: Some(Sink { fd: master.into(), manner: Manner::Nonblocking }),
        input: Some(input),
        terminal: Some(slave),
        place: Some(PathBuf::from(format!("/dev/pts/{number}"))),
        ..Opened::default()
    })
}

/// Writes a line to a client that comes second, which is then closed.
pub(super) fn turn_away(stream: UnixStream) {
    let _ = stream.set_nonblocking(true);
    let mut stream = stream;
    let _ = stream.write_all(b"This console has a client already\r\n");
}
