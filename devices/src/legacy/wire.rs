//! Output towards a reader that may be slow, stopped or gone.
//!
//! ```text
//!   vCPU or queue ── write() ──► ring empty? ── yes ──► write to the reader at once
//!                                     │ no, or it took only a part
//!                                     ▼
//!                     ring, CONSOLE_BUFFER bytes, oldest dropped and counted
//!                                     │ bell
//!                                     ▼
//!                     pump (worker) drains it when the reader can take more
//! ```
//!
//! The direct write keeps the last words of a crashing machine from staying in a buffer. The
//! lock is held for one system call that never waits; the pump and the writer never hold it
//! across anything else.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::output::{Opened, Output, OutputError, Sink};
use crate::limits::CONSOLE_BUFFER;

/// The way of a console's output, shared by those who write and the pump.
pub struct Wire {
    state: Mutex<State>,
    pub(super) bell: EventFd,
    /// What the pump takes over once: input, listener, terminal.
    pub(super) ends: Mutex<Opened>,
    place: Option<PathBuf>,
    unlink: bool,
    pub(super) received: AtomicU64,
    written: AtomicU64,
    dropped: AtomicU64,
}

struct State {
    sink: Option<Sink>,
    /// The reader went away; the pump is to take the sink out.
    broken: bool,
    /// Output is kept while there is no reader, because one may come.
    keep: bool,
    /// There was a reader or one may come: what is not delivered counts as dropped.
    count: bool,
    ring: VecDeque<u8>,
}

/// How far a drain came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Drained {
    /// Nothing is left.
    Empty,
    /// The reader cannot take more now.
    Blocked(RawFd),
    /// The reader is gone.
    Broken,
    /// There is no reader.
    Nobody,
}

impl Wire {
    /// Opens `output`.
    pub fn open(output: &Output) -> Result<Wire, OutputError> {
        let socket = matches!(output, Output::Socket(_));
        Wire::from_ends(output.open()?, socket)
    }

    /// A wire over descriptors that somebody else opened: output goes to `output` and input
    /// comes from `input`. Their open files may be shared; their flags are left alone where
    /// that is possible.
    pub fn from_descriptors(input: Option<OwnedFd>, output: Option<&OwnedFd>) -> Result<Wire, OutputError> {
        let sink = output.map(|fd| Sink::shared(fd.as_raw_fd())).transpose();
        let sink = sink.map_err(OutputError::Descriptor)?;
        Wire::from_ends(Opened { sink, input, ..Opened::default() }, false)
    }

    fn from_ends(mut ends: Opened, socket: bool) -> Result<Wire, OutputError> {
        let bell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(OutputError::Descriptor)?;
        let sink = ends.sink.take();
        let count = sink.is_some() || socket;
        let place = ends.place.take();
        let state = State { sink, broken: false, keep: socket, count, ring: VecDeque::new() };
        Ok(Wire {
            state: Mutex::new(state),
            bell,
            ends: Mutex::new(ends),
            place,
            unlink: socket,
            received: AtomicU64::new(0),
            written: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
        })
    }

    /// Path of the file, pseudo-terminal or socket at the far end.
    pub fn place(&self) -> Option<&Path> {
        self.place.as_deref()
    }

    /// Whether a pump is of no use: nothing can come in and output never has to wait.
    pub fn needs_no_pump(&self) -> bool {
        let ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = ends.input.is_none() && ends.listener.is_none();
        idle && !self.lock().sink.as_ref().is_some_and(Sink::can_fill)
    }

    /// Takes `bytes` without waiting: writes them out, or keeps them, or drops the oldest
    /// that are kept. True when bytes are left for the pump that were not there before.
    pub fn write(&self, mut bytes: &[u8]) -> bool {
        let mut state = self.lock();
        if state.ring.is_empty() && !state.broken {
            match state.send(bytes) {
                Ok(sent) => {
                    self.written.fetch_add(sent as u64, Ordering::Relaxed);
                    bytes = bytes.get(sent..).unwrap_or_default();
                }
                Err(_) => state.broken = true,
            }
        }
        if bytes.is_empty() {
            return false;
        }
        // A full disk may have room again later; what did not fit is lost but the file stays.
        let can_wait = state.sink.as_ref().map_or(state.keep, Sink::can_fill) && !state.broken;
        let kept = if can_wait || state.keep { bytes.len().min(CONSOLE_BUFFER) } else { 0 };
        let over = (state.ring.len() + kept).saturating_sub(CONSOLE_BUFFER);
        let lost = bytes.len() - kept + over;
        if state.count {
            self.dropped.fetch_add(lost as u64, Ordering::Relaxed);
        }
        let first = state.ring.is_empty();
        state.ring.drain(..over);
        state.ring.extend(bytes.get(bytes.len() - kept..).unwrap_or_default());
        let news = first && (kept > 0 || state.broken);
        drop(state);
        if news {
            self.ring_bell();
        }
        news
    }

    /// Waits, `limit` at most, until the reader took all that is kept: for the end of a
    /// machine, when nothing else runs. True when nothing is left.
    pub fn finish(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        loop {
            let fd = match self.drain() {
                Drained::Empty => return true,
                Drained::Blocked(fd) => fd,
                Drained::Broken | Drained::Nobody => return false,
            };
            let left = end.saturating_duration_since(Instant::now()).as_millis();
            let mut poll = libc::pollfd { fd, events: libc::POLLOUT, revents: 0 };
            // SAFETY: one pollfd that lives across the call. The descriptor is only looked
            // at; if the pump closed it meanwhile the answer is an error or a retry.
            let ready = unsafe { libc::poll(&raw mut poll, 1, i32::try_from(left).unwrap_or(0)) };
            if left == 0 || ready <= 0 {
                return false;
            }
        }
    }

    /// Bytes taken over by the reader, bytes lost, bytes that came in.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("output_bytes", self.written.load(Ordering::Relaxed)),
            ("dropped_bytes", self.dropped.load(Ordering::Relaxed)),
            ("input_bytes", self.received.load(Ordering::Relaxed)),
        ]
    }

    /// Output bytes that were dropped because the reader did not take them.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    pub(super) fn ring_bell(&self) {
        // Nothing but a full counter can fail, and then the bell has rung.
        let _ = self.bell.write(1);
    }

    /// Gives the reader what it can take of the ring.
    pub(super) fn drain(&self) -> Drained {
        let mut state = self.lock();
        if state.broken {
            return Drained::Broken;
        }
        let Some(fd) = state.sink.as_ref().map(AsRawFd::as_raw_fd) else { return Drained::Nobody };
        while !state.ring.is_empty() {
            let (head, _) = state.ring.as_slices();
            let len = head.len();
            let sent = match state.sink.as_ref().map(|sink| sink.write(head)) {
                Some(Ok(sent)) => sent,
                Some(Err(e)) if e.kind() == io::ErrorKind::WouldBlock => 0,
                _ => {
                    state.broken = true;
                    return Drained::Broken;
                }
            };
            state.ring.drain(..sent.min(len));
            self.written.fetch_add(sent as u64, Ordering::Relaxed);
            if sent < len {
                return Drained::Blocked(fd);
            }
        }
        // The buffer came of a jam; an idle console keeps none.
        state.ring = VecDeque::new();
        Drained::Empty
    }

    /// The descriptor of the reader, if there is one.
    pub(super) fn sink_fd(&self) -> Option<RawFd> {
        self.lock().sink.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Puts a new reader in place of the old one, or none. Without one, and when none can
    /// come any more, what was kept is dropped.
    pub(super) fn set_sink(&self, sink: Option<Sink>) {
        let mut state = self.lock();
        state.broken = false;
        state.sink = sink;
        if state.sink.is_none() && !state.keep {
            let lost = std::mem::take(&mut state.ring).len();
            self.dropped.fetch_add(lost as u64, Ordering::Relaxed);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Writes to the reader as much as it takes now. An error means that it is gone.
    fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(sink) = &self.sink else { return Ok(0) };
        match sink.write(bytes) {
            Ok(sent) => Ok(sent.min(bytes.len())),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock || !sink.can_fill() => Ok(0),
            Err(e) => Err(e),
        }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        let _ = self.drain();
        if let Some(path) = self.place.as_ref().filter(|_| self.unlink) {
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests;
