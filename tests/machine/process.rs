//! A child process that ends in time or is ended, and what it says.

use std::{
    io::Read,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::process::ExitStatusExt,
    },
    process::{Child, ExitStatus},
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// What was read from a stream so far, for any number of waiters.
#[derive(Clone, Default)]
pub struct Stream(Arc<(Mutex<Heard>, Condvar)>);

#[derive(Default)]
struct Heard {
    text: String,
    over: bool,
}

impl Stream {
    /// Reads `source` to its end on a thread of its own. A pseudo-terminal ends with an error.
    pub fn of(mut source: impl Read + Send + 'static) -> Stream {
        let stream = Stream::default();
        let writer = stream.clone();
        thread::spawn(move || {
            let mut piece = [0; 4096];
            loop {
                let got = source.read(&mut piece).unwrap_or(0);
                let mut heard = writer.0.0.lock().unwrap_or_else(PoisonError::into_inner);
                heard.over = got == 0;
                heard.text.push_str(&String::from_utf8_lossy(&piece[..got]).replace('\r', ""));
                writer.0.1.notify_all();
                if got == 0 {
                    return;
                }
            }
        });
        stream
    }

    /// Waits until `what` was heard; false when it was not by `deadline` or can no longer be.
    pub fn heard(&self, what: &str, deadline: Instant) -> bool {
        self.wait(deadline, |heard| heard.text.contains(what));
        self.text().contains(what)
    }

    /// Waits for the end of the stream; false when it did not come by `deadline`.
    pub fn ended(&self, deadline: Instant) -> bool {
        self.wait(deadline, |_| false)
    }

    /// All that was heard so far.
    pub fn text(&self) -> String {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).text.clone()
    }

    fn wait(&self, deadline: Instant, enough: impl Fn(&Heard) -> bool) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let heard = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.0.1.wait_timeout_while(heard, left, |heard| !enough(heard) && !heard.over);
        waited.is_ok_and(|(heard, _)| heard.over || enough(&heard))
    }
}

/// A child that does not outlive its owner.
pub struct Process {
    child: Child,
    status: Option<ExitStatus>,
}

impl Process {
    /// Takes charge of `child`.
    pub fn new(child: Child) -> Process {
        Process { child, status: None }
    }

    /// Its number, that of no other process before it is waited for.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The child, for taking its streams.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Sends it a signal. It was not waited for, so its id is still its own.
    pub fn signal(&self, number: i32) {
        assert!(self.status.is_none(), "the process has ended");
        let id = libc::pid_t::try_from(self.child.id()).unwrap();
        // SAFETY: the id belongs to a child that was not reaped.
        assert_eq!(unsafe { libc::kill(id, number) }, 0);
    }

    /// Waits until it ends; `None` when it has not by `deadline`.
    pub fn wait(&mut self, deadline: Instant) -> Option<ExitStatus> {
        if self.status.is_none() && self.is_over(deadline) {
            self.status = Some(self.child.wait().unwrap());
        }
        self.status
    }

    fn is_over(&self, deadline: Instant) -> bool {
        // SAFETY: the id belongs to a child that was not reaped; the new descriptor is owned here.
        let pidfd = unsafe {
            let fd = libc::syscall(libc::SYS_pidfd_open, self.child.id(), 0);
            assert!(fd >= 0, "pidfd_open: {}", std::io::Error::last_os_error());
            OwnedFd::from_raw_fd(i32::try_from(fd).unwrap())
        };
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut watch = libc::pollfd { fd: pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            let milliseconds = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
            // SAFETY: one entry.
            match unsafe { libc::poll(&raw mut watch, 1, milliseconds) } {
                1 => return true,
                0 => return false,
                _ => {}
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.status.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// The code of an ended process as a shell gives it: its own, or 128 and the signal.
pub fn code(status: ExitStatus) -> i32 {
    status.code().or_else(|| status.signal().map(|number| 128 + number)).unwrap()
}

/// `seconds` from now.
pub fn within(seconds: u64) -> Instant {
    Instant::now() + Duration::from_secs(seconds)
}
