//! The host's side of the door: the unix sockets a machine is reached by and reaches out to.
//!
//! ```text
//!   host client ── connect ──► uds_path          "CONNECT 52\n"  ──► guest port 52
//!                              ◄── "OK 1073741824\n", then bytes
//!   host server ── listen ───► uds_path_52   ◄── connection from the guest to CID 2, port 52
//! ```
//!
//! The listening socket is made with mode 0600 before it has a name, so there is no moment in
//! which another user could connect. A path that exists is an error and never removed: it may
//! belong to a machine that runs. On the way out only the very inode made here is unlinked.

use std::{
    io::{self, Write as _},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use crate::{
    limits::{VSOCK_CONNECT_LINE_MAX, VSOCK_PATH_MAX},
    own_path::OwnPath,
};

/// Connections the kernel holds for us until they are accepted.
const BACKLOG: i32 = 1024;

/// Why the socket of a vsock device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    /// The path does not fit a unix socket address.
    #[error(
        "The vsock socket path {} is {} bytes long; a unix socket path has at most {VSOCK_PATH_MAX}",
        path.display(), path.as_os_str().len()
    )]
    Long {
        /// The path as given.
        path: PathBuf,
    },
    /// The path is empty or has a zero byte in it.
    #[error("The vsock socket path {path:?} is empty or contains a zero byte")]
    Name {
        /// The path as given.
        path: PathBuf,
    },
    /// Something is there already.
    #[error("The vsock socket path {} exists already; remove it if no machine uses it", path.display())]
    Taken {
        /// The path as given.
        path: PathBuf,
    },
    /// The socket could not be made.
    #[error("Cannot listen on the vsock socket {}", path.display())]
    Listen {
        /// The path as given.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// The listening socket and the paths that belong to it.
#[derive(Debug)]
pub struct Door {
    own: OwnPath,
    socket: OwnedFd,
}

impl Door {
    /// Makes the listening socket at `path`.
    pub fn open(path: &Path) -> Result<Door, DoorError> {
        let path = path.to_owned();
        if path.as_os_str().len() > VSOCK_PATH_MAX {
            return Err(DoorError::Long { path });
        }
        let Some((address, len)) = address(&path, None) else { return Err(DoorError::Name { path }) };
        match listen(&address, len) {
            Ok(socket) => Ok(Door { own: OwnPath::made(path), socket }),
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => Err(DoorError::Taken { path }),
            Err(source) => Err(DoorError::Listen { path, source }),
        }
    }

    /// Takes the next waiting client; `WouldBlock` when there is none.
    pub fn accept(&self) -> io::Result<OwnedFd> {
        let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // SAFETY: a plain call on a descriptor we own; no address is asked for.
        owned(unsafe {
            libc::accept4(self.socket.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), flags)
        })
    }

    /// Connects to the host program that listens for guest port `port`, without waiting.
    /// `WouldBlock` when it listens but has too many waiting already: try again later.
    pub fn dial(&self, port: u32) -> io::Result<OwnedFd> {
        let (address, len) = address(self.own.path(), Some(port))
            .ok_or_else(|| io::Error::other("The path of the port is longer than a socket address"))?;
        let socket = stream_socket()?;
        // SAFETY: `address` is a valid socket address of `len` bytes.
        let done = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len) };
        if done == 0 { Ok(socket) } else { Err(io::Error::last_os_error()) }
    }
}

impl AsRawFd for Door {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.own.remove();
    }
}

/// The port named by a complete `CONNECT <port>` line, without its newline.
pub fn connect_line(line: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(line).ok()?;
    let text = text.strip_suffix('\r').unwrap_or(text);
    let mut words = text.split(' ').filter(|w| !w.is_empty());
    let word = words.next()?;
    let port = words.next()?;
    let plain = word.eq_ignore_ascii_case("connect") && port.bytes().all(|b| b.is_ascii_digit());
    if !plain || words.next().is_some() {
        return None;
    }
    port.parse().ok()
}

/// How much of a client's greeting has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Greeting {
    /// It asks for this guest port; the line is taken out of the socket, what follows is not.
    Port(u32),
    /// No newline yet.
    Partial,
    /// It is too long, not a greeting, or the client went away.
    Bad,
}

/// Looks at what `client` has sent and takes the greeting if it is complete. Nothing behind
/// the newline is taken: that is data for the guest.
pub fn greeting(client: RawFd) -> Greeting {
    let mut line = [0u8; VSOCK_CONNECT_LINE_MAX];
    let seen = match receive(client, &mut line, libc::MSG_PEEK) {
        Ok(0) => return Greeting::Bad,
        Ok(seen) => seen,
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Greeting::Partial,
        Err(_) => return Greeting::Bad,
    };
    let Some(end) = line.iter().take(seen).position(|b| *b == b'\n') else {
        return if seen == line.len() { Greeting::Bad } else { Greeting::Partial };
    };
    let Some(port) = line.get(..end).and_then(connect_line) else { return Greeting::Bad };
    // The bytes are there: a look does not take them, and nobody else reads this socket.
    let taken = line.get_mut(..=end).map_or(Ok(0), |part| receive(client, part, 0));
    if taken.is_ok_and(|n| n == end + 1) { Greeting::Port(port) } else { Greeting::Bad }
}

/// Tells the client that it is connected, from host port `port`.
pub fn confirm(client: RawFd, port: u32) -> io::Result<()> {
    let mut text = [0u8; 16];
    let mut rest = text.as_mut_slice();
    writeln!(rest, "OK {port}")?;
    let len = 16 - rest.len();
    // SAFETY: `text` is readable for `len` bytes.
    let sent = unsafe { libc::send(client, text.as_ptr().cast(), len, libc::MSG_NOSIGNAL) };
    if usize::try_from(sent).is_ok_and(|n| n == len) { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn receive(socket: RawFd, data: &mut [u8], flags: i32) -> io::Result<usize> {
    // SAFETY: `data` is writable for its length.
    let got = unsafe { libc::recv(socket, data.as_mut_ptr().cast(), data.len(), flags) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

fn owned(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn stream_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: a plain call without pointers.
    owned(unsafe { libc::socket(libc::AF_UNIX, kind, 0) })
}

/// A listening socket at `path` that only this user can connect to, from its first moment on.
pub(crate) fn private_listener(path: &Path) -> io::Result<OwnedFd> {
    let (address, len) = address(path, None).ok_or(io::ErrorKind::InvalidInput)?;
    listen(&address, len)
}

fn listen(address: &libc::sockaddr_un, len: libc::socklen_t) -> io::Result<OwnedFd> {
    let socket = stream_socket()?;
    let fd = socket.as_raw_fd();
    let check = |result: i32| if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    // The inode that `bind` makes inherits the mode of the socket.
    // SAFETY: plain calls on our descriptor; `address` is valid for `len` bytes.
    unsafe {
        check(libc::fchmod(fd, 0o600))?;
        check(libc::bind(fd, std::ptr::from_ref(address).cast(), len))?;
        check(libc::listen(fd, BACKLOG))?;
    }
    Ok(socket)
}

/// The socket address of `path`, or of `path_PORT`; none when it does not fit or is no path.
fn address(path: &Path, port: Option<u32>) -> Option<(libc::sockaddr_un, libc::socklen_t)> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() || bytes.contains(&0) {
        return None;
    }
    let mut name = [0u8; VSOCK_PATH_MAX];
    let mut rest = name.as_mut_slice();
    rest.write_all(bytes).ok()?;
    if let Some(port) = port {
        write!(rest, "_{port}").ok()?;
    }
    let len = VSOCK_PATH_MAX - rest.len();
    // SAFETY: all zeros is a valid address structure.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    for (to, from) in address.sun_path.iter_mut().zip(name.iter().take(len)) {
        *to = *from as libc::c_char;
    }
    // With the zero byte that ends the path.
    let len = std::mem::offset_of!(libc::sockaddr_un, sun_path) + len + 1;
    Some((address, len as libc::socklen_t))
}

#[cfg(test)]
mod tests {
    use std::os::unix::{fs::PermissionsExt, net::UnixListener};

    use super::*;

    #[test]
    fn only_a_word_and_a_port_are_a_greeting() {
        for (line, port) in [
            ("CONNECT 52", Some(52)),
            ("connect 0", Some(0)),
            ("CONNECT  4294967295\r", Some(u32::MAX)),
            ("CONNECT 4294967296", None),
            ("CONNECT +1", None),
            ("CONNECT -1", None),
            ("CONNECT", None),
            ("CONNECT 1 2", None),
            ("", None),
            ("GET / HTTP/1.1", None),
        ] {
            assert_eq!(connect_line(line.as_bytes()), port, "{line:?}");
        }
        assert_eq!(connect_line(b"CONNECT \xff"), None);
    }

    #[test]
    fn the_socket_is_private_and_goes_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let door = Door::open(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(Door::open(&path), Err(DoorError::Taken { .. })));
        drop(door);
        assert!(!path.exists());
    }

    #[test]
    fn a_path_taken_over_by_another_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let door = Door::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        // A second inode first, so that the number of the removed one is not simply reused.
        std::fs::write(dir.path().join("other"), b"").unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(door);
        assert!(path.exists());
    }

    #[test]
    fn paths_that_do_not_fit_are_refused_by_name() {
        let long = PathBuf::from(format!("/{}", "x".repeat(VSOCK_PATH_MAX)));
        let error = Door::open(&long).unwrap_err();
        assert!(error.to_string().contains("108 bytes"), "{error}");
        assert!(matches!(Door::open(Path::new("")), Err(DoorError::Name { .. })));
        assert!(matches!(Door::open(Path::new("/no/such/dir/v")), Err(DoorError::Listen { .. })));
    }

    #[test]
    fn what_is_not_a_listening_stream_socket_refuses() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let door = Door::open(&path).unwrap();
        assert!(door.dial(1).is_err());
        std::fs::create_dir(dir.path().join("v.sock_2")).unwrap();
        assert!(door.dial(2).is_err());
        let fifo = std::ffi::CString::new(dir.path().join("v.sock_3").as_os_str().as_bytes()).unwrap();
        // SAFETY: a valid string.
        assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
        assert!(door.dial(3).is_err());
        std::os::unix::fs::symlink("nowhere", dir.path().join("v.sock_4")).unwrap();
        assert!(door.dial(4).is_err());
        let _server = UnixListener::bind(dir.path().join("v.sock_5")).unwrap();
        door.dial(5).unwrap();
    }
}
