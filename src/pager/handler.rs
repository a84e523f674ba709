//! Another process serves the page faults: Firecracker's protocol, from the monitor's side.
//!
//! The handler listens on a unix socket. The monitor connects and sends one message: a JSON
//! array that says where guest memory lies in this process and in the snapshot's memory, and
//! with it the userfaultfd. Nothing else is ever said; a handler may close the connection or
//! keep it.
//!
//! The monitor keeps the descriptor: were the handler's the last one, its death would turn all
//! missing pages to zeroes under the guest. So a death has to be seen, and [`super::watch`]
//! looks for it.

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, connect, sendmsg, socket_with,
};
use serde::Serialize;

use super::{
    Broken, PAGE, PagerError, Range,
    bell::Bell,
    uffd::Userfault,
    watch::{Peer, Watch},
};

/// How long a handler that listens may take to accept others first.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);

/// How long a page may take where nobody says otherwise. A handler may fetch pages from far
/// away, and one object-store request that is repeated takes some seconds; a Linux guest calls
/// a processor locked up that stood still for 20 s. Past that the guest is as good as frozen.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// One range, in Firecracker's words (`GuestRegionUffdMapping`).
#[derive(Debug, Serialize)]
struct Mapping {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: u64,
    /// Bytes in spite of its name, as Firecracker sends it.
    page_size_kib: u64,
}

/// A process that serves page faults. Dropping this changes nothing: it is watched until this
/// process ends.
#[derive(Debug)]
pub struct Handler {
    bell: Arc<Bell>,
    thread: thread::JoinHandle<()>,
}

impl Handler {
    /// Gives the page faults of `ranges`, none of which was touched yet, to the process that
    /// listens at `path`. `broken` is called within a second of that process's death, and when
    /// a page took longer than `patience`.
    pub fn connect(
        path: &Path,
        ranges: &[Range],
        patience: Duration,
        broken: Broken,
    ) -> Result<Handler, PagerError> {
        let socket = reach(path).map_err(|source| PagerError::Connect { path: path.into(), source })?;
        let uffd = Userfault::new(ranges.iter().any(|r| r.page_size > PAGE))?;
        for range in ranges {
            // SAFETY: `Range::new` was promised that this is guest memory of that kind.
            let registered = unsafe { uffd.register(range.host, range.len) };
            registered.map_err(|source| PagerError::Register { len: range.len, source })?;
        }
        let peer = Peer::of(socket);
        send(peer.socket(), ranges, &uffd)
            .map_err(|source| PagerError::Send { path: path.into(), source })?;
        let bell = Arc::new(Bell::new().map_err(PagerError::Thread)?);
        let watch = Watch { uffd, peer, patience, bell: Arc::clone(&bell), path: path.into() };
        let thread = thread::Builder::new().name("pager-watch".to_owned()).spawn(move || watch.run(broken));
        Ok(Handler { bell, thread: thread.map_err(PagerError::Thread)? })
    }

    /// Stops watching and lets go of the faults: what is missing is zero from then on, unless
    /// the handler still serves it. For memory that nobody will use, as after a restore that
    /// failed.
    pub fn give_up(self) {
        self.bell.ring();
        let _ = self.thread.join();
    }
}

/// Connects without ever blocking: a listener that accepts nobody must not hold the monitor.
fn reach(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let address = SocketAddrUnix::new(path)?;
    let until = Instant::now() + CONNECT_PATIENCE;
    loop {
        match connect(&socket, &address) {
            Ok(()) => return Ok(socket),
            // The queue of the listener is full.
            Err(rustix::io::Errno::AGAIN) if Instant::now() < until => {
                thread::sleep(Duration::from_millis(10));
            }
            Err(e) => return Err(e.into()),
        }
    }
}

fn send(socket: &UnixStream, ranges: &[Range], uffd: &Userfault) -> io::Result<()> {
    let mapping = |r: &Range| Mapping {
        base_host_virt_addr: r.host,
        size: r.len,
        offset: r.offset,
        page_size: r.page_size,
        page_size_kib: r.page_size,
    };
    let text = serde_json::to_vec(&ranges.iter().map(mapping).collect::<Vec<_>>())?;
    let fds = [uffd.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    // The handler reads it at once and whole; a part of it would be no JSON.
    let sent = sendmsg(socket, &[IoSlice::new(&text)], &mut control, SendFlags::NOSIGNAL)?;
    if sent == text.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}
