//! Whether the process that serves our page faults is alive, and at work.
//!
//! | socket    | process listening there | then                                                  |
//! |-----------|-------------------------|-------------------------------------------------------|
//! | open      | alive or dead           | somebody has the connection: go on                    |
//! | hung up   | alive                   | a handler may close it after the handshake: go on     |
//! | hung up   | dead                    | broken                                                |
//! | hung up   | not known               | broken as soon as a page takes a second               |
//!
//! The process is known by the socket (`SO_PEERPIDFD`, or `SO_PEERCRED` before Linux 6.5). It is
//! the one that called `listen`, which may have been a parent; one that is gone when we connect
//! cannot be the handler and counts as not known.
//!
//! A handler that lives and does not answer is seen by its work. The kernel says how many wait
//! for a page (`/proc/self/fdinfo`), kernel threads on behalf of KVM included. If somebody waits,
//! and for as long as the patience lasts nothing of this changed, and no fault of ours was
//! answered, nor memory of ours grew, the handler is stuck. That is one look a second while
//! nobody waits, four while somebody does, of three small files.

use std::{
    fs,
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Broken, bell::Bell, uffd::Userfault};

/// `SO_PEERPIDFD` of `asm-generic/socket.h`, which libc does not name yet.
const SO_PEERPIDFD: libc::c_int = 77;

/// Between two looks while nobody waits for a page, and while somebody does.
const IDLE_LOOK: Duration = Duration::from_secs(1);
const BUSY_LOOK: Duration = Duration::from_millis(250);

/// How long a page may take when the connection was closed by we do not know whom.
const ORPHAN_PATIENCE: Duration = Duration::from_secs(1);

/// The other end of the handler's socket.
pub(super) struct Peer {
    socket: UnixStream,
    process: Option<OwnedFd>,
}

impl Peer {
    pub(super) fn of(socket: OwnedFd) -> Peer {
        let process = peer_process(&socket).filter(|p| !readable(p));
        Peer { socket: socket.into(), process }
    }

    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }
}

/// What is watched.
pub(super) struct Watch {
    pub(super) uffd: Userfault,
    pub(super) peer: Peer,
    pub(super) patience: Duration,
    /// Rung to end the watch.
    pub(super) bell: Arc<Bell>,
    pub(super) path: PathBuf,
}

/// What changes when pages arrive.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Pulse {
    /// Faults that the handler has not read, and all that are not answered.
    unread: u64,
    waiting: u64,
    /// Faults of this process that were answered, and its resident pages.
    answered: u64,
    resident: u64,
}

impl Watch {
    pub(super) fn run(self, broken: Broken) {
        if let Some(reason) = self.until_broken() {
            broken(reason);
            // Who waits must never go on with wrong pages, so the descriptor stays open.
            let _ = poll(&mut [PollFd::new(&*self.bell, PollFlags::IN)], None);
        }
    }

    /// The reason, or nothing if the watch was ended.
    fn until_broken(&self) -> Option<String> {
        let path = self.path.display();
        let (mut hung_up, mut dead) = (false, false);
        let mut last: Option<(Pulse, Instant)> = None;
        loop {
            let busy = last.is_some_and(|(pulse, _)| pulse.waiting > 0);
            let (rung, hup, exit) = self.wait(hung_up, dead, if busy { BUSY_LOOK } else { IDLE_LOOK });
            (hung_up, dead) = (hung_up | hup, dead | exit);
            if rung {
                return None;
            }
            if hung_up && dead {
                return Some(format!("Page-fault handler {path} died; memory of the machine is incomplete"));
            }
            let now = Instant::now();
            // Without /proc only a death is seen.
            let pulse = Pulse::take(&self.uffd).unwrap_or_default();
            let since = last.filter(|(before, _)| *before == pulse).map_or(now, |(_, since)| since);
            last = Some((pulse, since));
            let unknown = hung_up && self.peer.process.is_none();
            let patience = if unknown { self.patience.min(ORPHAN_PATIENCE) } else { self.patience };
            if pulse.waiting > 0 && now.duration_since(since) >= patience {
                let for_seconds = patience.as_secs_f32();
                return Some(format!(
                    "Page-fault handler {path} is stuck: for {for_seconds} s it brought no page, and {} wait",
                    pulse.waiting
                ));
            }
        }
    }

    /// Whether the bell rang, the connection was closed, the process exited.
    fn wait(&self, hung_up: bool, dead: bool, longest: Duration) -> (bool, bool, bool) {
        let closed = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        let mut fds = vec![PollFd::new(&*self.bell, PollFlags::IN)];
        // What happened already would end every wait at once.
        if !hung_up {
            fds.push(PollFd::new(&self.peer.socket, PollFlags::RDHUP));
        }
        if let Some(process) = self.peer.process.as_ref().filter(|_| !dead) {
            fds.push(PollFd::new(process, PollFlags::IN));
        }
        let longest =
            Timespec { tv_sec: longest.as_secs().cast_signed(), tv_nsec: longest.subsec_nanos().into() };
        let _ = poll(&mut fds, Some(&longest));
        let mut seen = fds.iter().map(PollFd::revents);
        let rung = seen.next().is_some_and(|r| r.contains(PollFlags::IN));
        let hup = !hung_up && seen.next().is_some_and(|r| r.intersects(closed));
        (rung, hup, !dead && seen.next().is_some_and(|r| !r.is_empty()))
    }
}

impl Pulse {
    fn take(uffd: &Userfault) -> io::Result<Pulse> {
        let number = uffd.as_fd().as_raw_fd();
        let waits = small(&format!("/proc/self/fdinfo/{number}"))?;
        let field = |name: &str| {
            let line = waits.lines().find_map(|l| l.strip_prefix(name));
            line.and_then(|l| l.trim().parse().ok()).unwrap_or(0)
        };
        let (unread, waiting) = (field("pending:"), field("total:"));
        if waiting == 0 {
            return Ok(Pulse { unread, waiting, answered: 0, resident: 0 });
        }
        // Field 12 of the process's own statistics; the name in brackets may hold anything.
        let stat = small("/proc/self/stat")?;
        let after = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let word = |text: &str, n| text.split_whitespace().nth(n).and_then(|w| w.parse().ok()).unwrap_or(0);
        let resident = word(&small("/proc/self/statm")?, 1);
        Ok(Pulse { unread, waiting, answered: word(after, 9), resident })
    }
}

fn small(path: &str) -> io::Result<String> {
    let mut text = String::new();
    fs::File::open(path)?.take(1 << 16).read_to_string(&mut text)?;
    Ok(text)
}

/// A descriptor of the process at the other end, if the kernel knows it.
fn peer_process(socket: &OwnedFd) -> Option<OwnedFd> {
    let mut raw: libc::c_int = -1;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    let socket = socket.as_raw_fd();
    // SAFETY: the kernel writes at most `len` bytes to `raw`.
    let result = unsafe {
        libc::getsockopt(socket, libc::SOL_SOCKET, SO_PEERPIDFD, (&raw mut raw).cast(), &raw mut len)
    };
    if result == 0 && raw >= 0 {
        // SAFETY: the descriptor is new and has no other owner.
        return Some(unsafe { OwnedFd::from_raw_fd(raw) });
    }
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `peer`.
    let result = unsafe {
        libc::getsockopt(socket, libc::SOL_SOCKET, libc::SO_PEERCRED, (&raw mut peer).cast(), &raw mut len)
    };
    if result != 0 || peer.pid <= 0 {
        return None;
    }
    // SAFETY: the call takes numbers and returns a new descriptor.
    let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, peer.pid, 0) };
    // SAFETY: the descriptor is new and has no other owner.
    (raw >= 0).then(|| unsafe { OwnedFd::from_raw_fd(raw as i32) })
}

/// Whether a process's descriptor says that it is gone.
fn readable(process: &OwnedFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&now)).is_ok_and(|n| n > 0)
}
