//! Signals, as events of the main loop.
//!
//! Nothing runs inside a signal handler. The signals that mean something are blocked before
//! any thread starts, so that every thread inherits that, and are read from a descriptor by
//! the main loop, like everything else.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
};

/// Signals that end a machine, in order of their numbers.
pub const ENDING: [i32; 4] = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM];

/// A descriptor from which blocked signals are read.
#[derive(Debug)]
pub struct Signals(OwnedFd);

impl Signals {
    /// Blocks `numbers` in this thread and those it starts later, and returns where to read
    /// them. `SIGPIPE` and `SIGXFSZ` are ignored, so that a write to a closed socket or past
    /// a file limit is an error of that write and not the end of the machine.
    pub fn block(numbers: &[i32]) -> io::Result<Signals> {
        // SAFETY: the set is initialised by `sigemptyset` before anything reads it, and the
        // descriptor that `signalfd` returns is owned by nobody else.
        unsafe {
            libc::signal(libc::SIGPIPE, libc::SIG_IGN);
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            for number in numbers {
                libc::sigaddset(&raw mut set, *number);
            }
            if libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
            let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(Signals(OwnedFd::from_raw_fd(fd))) }
        }
    }

    /// The next signal that came, if any.
    pub fn next(&self) -> Option<i32> {
        let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
        // SAFETY: the buffer is as long as said.
        let got = unsafe { libc::read(self.0.as_raw_fd(), info.as_mut_ptr().cast(), info.len()) };
        let number = info.first_chunk::<4>().map(|b| u32::from_ne_bytes(*b))?;
        (got == info.len() as isize).then_some(number as i32)
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Gives a child the signal state a program expects: nothing blocked, `SIGPIPE` as it was.
/// For use between `fork` and `exec`.
pub fn restore_for_child() -> io::Result<()> {
    // SAFETY: the set is initialised before use; all calls are async-signal-safe.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        libc::signal(libc::SIGXFSZ, libc::SIG_DFL);
        match libc::pthread_sigmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}
