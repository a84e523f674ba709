//! The moving half of a console: empties its wire and feeds it input, on a worker.
//!
//! The pump is not a handler itself: the serial port's handler has only the pump, the virtio
//! console's has queues as well. Both pass it the events whose tokens are below
//! [`TOKENS`] and a [`Receiver`] that stands for the guest's side of input.
//!
//! Nothing is watched that has no use at the moment: output only while bytes wait for the
//! reader, input only while the guest has room. A jam on either side therefore costs no
//! processor time, and what is not read stays in the sender's pipe or terminal. The price is
//! that somebody must ring when the guest has room again ([`Wake`]).

use std::{
    io,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::{Arc, PoisonError, atomic::Ordering},
};

use vmm_sys_util::epoll::EventSet;

use super::{
    output::{Sink, turn_away},
    wire::{Drained, Wire},
};
use crate::worker::{Source, Watch};

/// Tokens below this one belong to the pump.
pub const TOKENS: u32 = 4;
const BELL: u32 = 0;
const INPUT: u32 = 1;
const OUTPUT: u32 = 2;
const LISTENER: u32 = 3;

/// Bytes read from the far end at once.
const READ_SIZE: usize = 4096;

/// The guest's side of input.
pub trait Receiver {
    /// Bytes the guest can take now. When it says 0 it must see to it that [`Wake::wake`] is
    /// called once there is room again.
    fn room(&mut self) -> usize;
    /// Takes `bytes`, which are not more than `room` last said.
    fn receive(&mut self, bytes: &[u8]);
}

/// Makes a pump look again.
#[derive(Clone)]
pub struct Wake(Arc<Wire>);

impl Wake {
    /// A caller for the pump of `wire`.
    pub fn new(wire: &Arc<Wire>) -> Wake {
        Wake(Arc::clone(wire))
    }

    /// The guest has room for input again.
    pub fn wake(&self) {
        self.0.ring_bell();
    }
}

/// The moving half of a console.
pub struct Pump {
    wire: Arc<Wire>,
    input: Option<OwnedFd>,
    listener: Option<UnixListener>,
    terminal: Option<OwnedFd>,
    watching_input: bool,
    /// The reader's descriptor while it is watched.
    watching_output: Option<RawFd>,
}

impl Pump {
    /// The pump of `wire`. Input and listener move into it; a later pump of the same wire
    /// gets them once [`Pump::give_back`] was called.
    pub fn new(wire: &Arc<Wire>) -> Pump {
        let mut ends = wire.ends.lock().unwrap_or_else(PoisonError::into_inner);
        let (input, listener, terminal) = (ends.input.take(), ends.listener.take(), ends.terminal.take());
        drop(ends);
        // The first call to `ready` starts what can be started.
        wire.ring_bell();
        Pump {
            wire: Arc::clone(wire),
            input,
            listener,
            terminal,
            watching_input: false,
            watching_output: None,
        }
    }

    /// Whether input can ever come. Input from a file that cannot be waited for, `/dev/null` among
    /// them, is given up.
    pub fn has_input(&mut self) -> bool {
        self.input = self.input.take().filter(can_be_awaited);
        self.input.is_some() || self.listener.is_some()
    }

    /// What is watched now.
    pub fn sources(&self) -> Vec<Source> {
        let mut sources = vec![Source::readable(&self.wire.bell, BELL)];
        sources.extend(self.listener.as_ref().map(|l| Source::readable(l, LISTENER)));
        sources.extend(self.input.as_ref().filter(|_| self.watching_input).map(|i| readable(i, INPUT)));
        let out = |fd| Source { fd, events: EventSet::OUT, token: OUTPUT };
        sources.extend(self.watching_output.map(out));
        sources
    }

    /// Serves one event; `token` is below [`TOKENS`].
    pub fn ready(&mut self, token: u32, watch: &mut Watch<'_>, guest: &mut dyn Receiver) {
        match token {
            BELL => {
                let _ = self.wire.bell.read();
            }
            INPUT => self.read(watch, guest),
            LISTENER => self.accept(watch),
            _ => {}
        }
        self.settle(watch, guest);
    }

    /// Looks again at what can be done: the guest may have room for input now.
    pub fn look(&mut self, watch: &mut Watch<'_>, guest: &mut dyn Receiver) {
        self.settle(watch, guest);
    }

    /// Ends the pump; the wire keeps its ends for the next one. The worker must no longer
    /// watch them.
    pub fn give_back(self) {
        let mut ends = self.wire.ends.lock().unwrap_or_else(PoisonError::into_inner);
        ends.input = self.input;
        ends.listener = self.listener;
        ends.terminal = self.terminal;
    }

    /// Moves output on and then watches just what can make a difference.
    fn settle(&mut self, watch: &mut Watch<'_>, guest: &mut dyn Receiver) {
        match self.wire.drain() {
            Drained::Blocked(fd) => self.watch_output(fd, watch),
            Drained::Empty | Drained::Nobody => self.unwatch_output(watch),
            Drained::Broken => self.hang_up(watch),
        }
        let wanted = self.input.is_some() && guest.room() > 0;
        if wanted && !self.watching_input {
            let source = self.input.as_ref().map(|i| readable(i, INPUT));
            match source.map_or(Ok(()), |s| watch.add(s)) {
                Ok(()) => self.watching_input = true,
                // Some files, /dev/null among them, cannot be waited for: no input.
                Err(_) => self.input = None,
            }
        } else if !wanted {
            self.unwatch_input(watch);
        }
    }

    fn read(&mut self, watch: &mut Watch<'_>, guest: &mut dyn Receiver) {
        let Some(input) = &self.input else { return };
        let mut buffer = [0u8; READ_SIZE];
        let len = guest.room().min(READ_SIZE);
        if len == 0 {
            return;
        }
        // SAFETY: `buffer` has at least `len` bytes. The descriptor is ready, so that even a
        // blocking one answers at once.
        let got = unsafe { libc::read(input.as_raw_fd(), buffer.as_mut_ptr().cast(), len) };
        match usize::try_from(got) {
            Ok(0) => self.end_input(watch),
            Ok(got) => {
                self.wire.received.fetch_add(got as u64, Ordering::Relaxed);
                guest.receive(buffer.get(..got).unwrap_or_default());
            }
            Err(_) => match io::Error::last_os_error().kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => {}
                _ => self.end_input(watch),
            },
        }
    }

    /// The far end sends no more. Output may still be read.
    fn end_input(&mut self, watch: &mut Watch<'_>) {
        self.unwatch_input(watch);
        self.input = None;
        if self.listener.is_some() && self.wire.sink_fd().is_some_and(is_hung_up) {
            self.hang_up(watch);
        }
    }

    /// The reader is gone.
    fn hang_up(&mut self, watch: &mut Watch<'_>) {
        self.unwatch_output(watch);
        if self.listener.is_some() {
            self.unwatch_input(watch);
            self.input = None;
        }
        self.wire.set_sink(None);
    }

    fn accept(&mut self, watch: &mut Watch<'_>) {
        let Some(Ok((client, _))) = self.listener.as_ref().map(UnixListener::accept) else { return };
        if self.wire.sink_fd().is_some_and(|fd| !is_hung_up(fd)) {
            return turn_away(client);
        }
        self.hang_up(watch);
        let input: io::Result<UnixStream> = client.try_clone();
        if let Ok(input) = input {
            self.input = Some(input.into());
            self.wire.set_sink(Some(Sink::socket(client)));
        }
    }

    fn watch_output(&mut self, fd: RawFd, watch: &mut Watch<'_>) {
        if self.watching_output == Some(fd) {
            return;
        }
        self.unwatch_output(watch);
        match watch.add(Source { fd, events: EventSet::OUT, token: OUTPUT }) {
            Ok(()) => self.watching_output = Some(fd),
            Err(_) => self.hang_up(watch),
        }
    }

    fn unwatch_output(&mut self, watch: &mut Watch<'_>) {
        if let Some(fd) = self.watching_output.take() {
            let _ = watch.remove(fd);
        }
    }

    fn unwatch_input(&mut self, watch: &mut Watch<'_>) {
        if let Some(input) = self.input.as_ref().filter(|_| self.watching_input) {
            let _ = watch.remove(input.as_raw_fd());
        }
        self.watching_input = false;
    }
}

fn readable(fd: &OwnedFd, token: u32) -> Source {
    Source { fd: fd.as_raw_fd(), events: EventSet::IN, token }
}

/// Whether a descriptor can be put into an epoll set: no plain file can, nor `/dev/null`.
fn can_be_awaited(input: &OwnedFd) -> bool {
    const NULL: libc::dev_t = libc::makedev(1, 3);
    // SAFETY: `stat` is plain numbers, for which all zeroes is a value.
    let mut about: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, and the call fills the structure it is given.
    if unsafe { libc::fstat(input.as_raw_fd(), &raw mut about) } != 0 {
        return false;
    }
    let kind = about.st_mode & libc::S_IFMT;
    kind != libc::S_IFREG && !(kind == libc::S_IFCHR && about.st_rdev == NULL)
}

/// Whether both directions of a socket are closed by its peer.
fn is_hung_up(fd: RawFd) -> bool {
    let mut poll = libc::pollfd { fd, events: 0, revents: 0 };
    // SAFETY: one pollfd that lives across the call.
    unsafe { libc::poll(&raw mut poll, 1, 0) > 0 && poll.revents & (libc::POLLHUP | libc::POLLERR) != 0 }
}
