//! The socket in the file system: made so that nothing is taken over, removed only if it is
//! still the one that was made.

use std::{
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{ffi::OsStrExt, net::UnixStream},
    },
    path::{Path, PathBuf},
};

use devices::own_path::OwnPath;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// The longest path a unix socket can have, in bytes (unix(7)).
pub const LONGEST_PATH: usize = 107;

/// Connections that may wait to be accepted; the kernel's own cap is `net.core.somaxconn`.
const BACKLOG: i32 = 1024;

/// Why there is no socket to serve on.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The path does not fit into a socket address.
    #[error(
        "The path of the {0} has {1} bytes; a unix socket's path has 1 to {LONGEST_PATH} bytes, \
         none of them 0"
    )]
    Path(&'static str, usize),
    /// Something has this path, and answers.
    #[error("The {0} '{path}' is in use: another process listens on it", path = .1.display())]
    InUse(&'static str, PathBuf),
    /// Something has this path, and does not answer.
    #[error(
        "The {0} '{path}' cannot be made: the path exists, and nobody listens on it. \
         Remove it if it was left behind by a monitor that was killed", path = .1.display()
    )]
    Exists(&'static str, PathBuf),
    /// The system refused for another reason.
    #[error("The {what} '{}' cannot be made", path.display())]
    Refused {
        /// Which socket.
        what: &'static str,
        /// Where it was to be.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Descriptors to watch connections with could not be had.
    #[error("The API server's descriptors cannot be made")]
    Descriptors(#[source] io::Error),
}

/// A listening socket with its place in the file system.
pub(crate) struct Listener {
    socket: OwnedFd,
    own: OwnPath,
}

impl Listener {
    /// Listens at a path that nothing has yet. `mode` are the permission bits (connecting
    /// needs write permission); without, the process's umask decides, as in Firecracker.
    /// Messages call it `what`.
    pub(crate) fn bind(what: &'static str, path: &Path, mode: Option<u32>) -> Result<Listener, SocketError> {
        let bytes = path.as_os_str().as_bytes();
        // An empty path would make the kernel choose an abstract name.
        if bytes.is_empty() || bytes.len() > LONGEST_PATH || bytes.contains(&0) {
            return Err(SocketError::Path(what, bytes.len()));
        }
        let refused = |e: rustix::io::Errno| match e {
            rustix::io::Errno::ADDRINUSE if UnixStream::connect(path).is_ok() => {
                SocketError::InUse(what, path.to_owned())
            }
            rustix::io::Errno::ADDRINUSE => SocketError::Exists(what, path.to_owned()),
            e => SocketError::Refused { what, path: path.to_owned(), source: e.into() },
        };
        let address = SocketAddrUnix::new(path).map_err(refused)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(refused)?;
        if let Some(mode) = mode {
            // The mode of an unbound socket is what bind creates the file with, so that it
            // never has a wider one.
            rustix::fs::fchmod(&socket, rustix::fs::Mode::from_raw_mode(mode)).map_err(refused)?;
        }
        net::bind(&socket, &address).map_err(refused)?;
        net::listen(&socket, BACKLOG).map_err(refused)?;
        Ok(Listener { socket, own: OwnPath::made(path) })
    }

    /// The next connection, if one waits.
    pub(crate) fn accept(&self) -> rustix::io::Result<OwnedFd> {
        net::accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        self.own.path()
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.own.remove();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::{fs::PermissionsExt, net::UnixListener},
    };

    use super::*;

    #[test]
    fn a_path_that_does_not_fit_is_refused_with_its_length() {
        let long = format!("/{}", "x".repeat(107));
        assert!(matches!(Listener::bind("socket", Path::new(&long), None), Err(SocketError::Path(_, 108))));
        assert!(matches!(Listener::bind("socket", Path::new(""), None), Err(SocketError::Path(_, 0))));
    }

    #[test]
    fn a_path_of_107_bytes_fits() {
        let directory = tempfile::tempdir().unwrap();
        let room = LONGEST_PATH - directory.path().as_os_str().len() - 1;
        let path = directory.path().join("x".repeat(room));
        assert_eq!(path.as_os_str().len(), 107);
        let _listener = Listener::bind("socket", &path, None).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_live_socket_a_stale_one_and_a_file_are_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api");
        let live = UnixListener::bind(&path).unwrap();
        assert!(matches!(Listener::bind("socket", &path, None), Err(SocketError::InUse(..))));
        drop(live);
        assert!(matches!(Listener::bind("socket", &path, None), Err(SocketError::Exists(..))));
        assert!(path.exists());
        fs::remove_file(&path).unwrap();
        fs::write(&path, "text").unwrap();
        assert!(matches!(Listener::bind("socket", &path, None), Err(SocketError::Exists(..))));
        assert_eq!(fs::read_to_string(&path).unwrap(), "text");
    }

    #[test]
    fn the_mode_is_that_asked_for_from_the_start() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api");
        let _listener = Listener::bind("socket", &path, Some(0o600)).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn the_socket_is_removed_unless_it_is_another_ones() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api");
        drop(Listener::bind("socket", &path, None).unwrap());
        assert!(!path.exists());
        let listener = Listener::bind("socket", &path, None).unwrap();
        fs::rename(&path, directory.path().join("moved")).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(listener);
        assert!(path.exists());
    }
}
