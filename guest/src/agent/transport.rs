//! Where the host's connections come from: vsock in a machine, a unix socket in tests.
//!
//! In a machine only the host (context id 2) is served. A process of the container can reach
//! the agent's port over vsock too, where the kernel has the loopback transport; it is turned
//! away by the sender's address, which the kernel vouches for.
//!
//! In tests the monitor's part is played as well: the host's `CONNECT <port>` line is read and
//! answered here, so that the same client code runs against both.

use super::syscall::{check, owned};
use std::{
    ffi::OsString,
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::PathBuf,
    time::Duration,
};

/// The host's context id (virtio 1.2, 5.10.4).
const HOST: u32 = 2;

/// A source of connections. Every connection is handled as a `UnixStream`, which is only a
/// name for a connected socket here: reading, writing, shutting down and timeouts are the
/// same calls for every family.
pub enum Listener {
    /// `AF_VSOCK`.
    Vsock(OwnedFd),
    /// A unix socket of the host.
    Unix(UnixListener),
}

/// A connection that may still have to say who it is.
pub enum Arrival {
    /// From the host.
    Host(UnixStream),
    /// Over the test socket; [`greet`] comes first.
    Test(UnixStream),
}

impl Listener {
    /// Listens on a vsock port.
    pub fn vsock(port: u32) -> io::Result<Self> {
        let socket = vsock_socket()?;
        let address = vsock_address(libc::VMADDR_CID_ANY, port);
        let size = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
        let fd = socket.as_raw_fd();
        // SAFETY: an address with its size; listen has no memory arguments.
        unsafe {
            check(libc::bind(fd, (&raw const address).cast(), size))?;
            check(libc::listen(fd, 128))?;
        }
        Ok(Self::Vsock(socket))
    }

    /// The next connection. Errors of a single connection are worth another try.
    pub fn accept(&self) -> io::Result<Option<Arrival>> {
        match self {
            Self::Unix(listener) => listener.accept().map(|(s, _)| Some(Arrival::Test(s))),
            Self::Vsock(socket) => {
                let mut address = vsock_address(0, 0);
                let mut size = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
                // SAFETY: a writable address with its size.
                let connection = owned(unsafe {
                    libc::accept4(
                        socket.as_raw_fd(),
                        (&raw mut address).cast(),
                        &raw mut size,
                        libc::SOCK_CLOEXEC,
                    )
                })?;
                Ok((address.svm_cid == HOST).then(|| Arrival::Host(connection.into())))
            }
        }
    }
}

/// Reads and answers the line the monitor would have read.
pub fn greet(mut stream: UnixStream) -> io::Result<UnixStream> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') && line.len() < 32 {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    if line != format!("CONNECT {}\n", guest::protocol::AGENT_PORT).as_bytes() {
        return Err(io::ErrorKind::InvalidData.into());
    }
    stream.write_all(b"OK 1073741824\n")?;
    Ok(stream)
}

/// Connects to the host's own port, to say that we are there. The host need not listen.
pub fn announce_by_vsock(port: u32) -> io::Result<UnixStream> {
    let socket = vsock_socket()?;
    let address = vsock_address(HOST, port);
    let size = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: an address with its size. The kernel gives up after two seconds.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), size) })?;
    Ok(socket.into())
}

/// The same over the test socket's twin `<socket>_<port>`.
pub fn announce_by_unix(socket: &std::path::Path, port: u32) -> io::Result<UnixStream> {
    let mut name = OsString::from(socket.as_os_str());
    name.push(format!("_{port}"));
    UnixStream::connect(PathBuf::from(name))
}

fn vsock_socket() -> io::Result<OwnedFd> {
    // SAFETY: socket has no memory arguments.
    owned(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })
}

fn vsock_address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: sockaddr_vm is plain data for which all zeroes is valid.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}
