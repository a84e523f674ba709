//! Learning that the agent can serve, without asking again and again.

use super::ClientError;
use crate::protocol::READY_PORT;
use std::{
    ffi::OsString,
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// The socket `<uds>_1024`, to which the agent connects once it can serve.
///
/// Bind it before the machine starts. The first connection is the agent's: nothing of the
/// container runs yet. After it the socket is removed, so that the container, which can open
/// the same port, finds nobody to lie to.
#[derive(Debug)]
pub struct ReadyListener {
    listener: UnixListener,
    path: PathBuf,
}

impl ReadyListener {
    /// Listens beside the vsock socket `uds`, replacing a socket left there by a machine that
    /// is gone.
    ///
    /// # Errors
    /// [`ClientError::Listen`].
    pub fn bind(uds: &Path) -> Result<Self, ClientError> {
        let mut name = OsString::from(uds.as_os_str());
        name.push(format!("_{READY_PORT}"));
        let path = PathBuf::from(name);
        let listen = || {
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
            let listener = UnixListener::bind(&path)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        match listen() {
            Ok(listener) => Ok(Self { listener, path }),
            Err(source) => Err(ClientError::Listen { path, source }),
        }
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for the agent and stops listening. [`super::Agent::over`] greets it.
    ///
    /// To wait for the monitor's end as well, poll this ([`AsFd`]) for readability first.
    ///
    /// # Errors
    /// [`ClientError::Timeout`], [`ClientError::Stream`].
    pub fn accept(self, timeout: Duration) -> Result<UnixStream, ClientError> {
        let until = Instant::now() + timeout;
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false).map_err(ClientError::Stream)?;
                    return Ok(stream);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(ClientError::Stream(e)),
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ClientError::Timeout { what: "start", after: timeout });
            }
            let millis = left.as_millis().clamp(1, 60_000) as libc::c_int;
            let mut poll = libc::pollfd { fd: self.listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one pollfd is passed and one is announced.
            unsafe { libc::poll(&raw mut poll, 1, millis) };
        }
    }
}

impl AsFd for ReadyListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for ReadyListener {
    fn drop(&mut self) {
        // If it cannot be removed it is still dead: nobody accepts any more.
        let _ = fs::remove_file(&self.path);
    }
}
