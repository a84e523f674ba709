//! What a client speaks over.

use std::{
    any::Any,
    fmt::Debug,
    io::{self, IoSlice, Read, Write},
    mem::MaybeUninit,
    os::{fd::BorrowedFd, unix::net::UnixStream},
    path::PathBuf,
    time::Duration,
};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

/// The most descriptors that go with a request.
const MAX_DESCRIPTORS: usize = 16;

/// A connected stream whose waits can be limited: a unix socket, or a TLS session over TCP.
pub trait Stream: Read + Write + Send + Debug + Any {
    /// Limits each wait for reading and for writing; none waits for ever. A wait that is over
    /// ends with `WouldBlock` or `TimedOut`.
    fn limit(&mut self, wait: Option<Duration>) -> io::Result<()>;

    /// Sends some bytes with descriptors, and returns how many bytes; an error of kind
    /// `Unsupported` if descriptors cannot be sent this way.
    fn send(&mut self, _bytes: &[u8], _descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl Stream for UnixStream {
    fn limit(&mut self, wait: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(wait)?;
        self.set_write_timeout(wait)
    }

    fn send(&mut self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let parts = [IoSlice::new(bytes)];
        Ok(rustix::net::sendmsg(&*self, &parts, &mut control, SendFlags::NOSIGNAL)?)
    }
}

/// Where a client gets its connections from.
pub trait Connect: Debug + Send + Sync {
    /// Makes a connection.
    fn connect(&self) -> io::Result<Box<dyn Stream>>;

    /// Where it leads, in words, as in "Nothing answers at ...".
    fn place(&self) -> String;
}

/// The unix socket at a path.
impl Connect for PathBuf {
    fn connect(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(UnixStream::connect(self)?))
    }

    fn place(&self) -> String {
        format!("the API socket '{}'", self.display())
    }
}
