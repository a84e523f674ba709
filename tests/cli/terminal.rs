//! A person at a terminal: a pty, what is typed on it, and what is seen.

use std::{
    fs::File,
    io::{Read, Write},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Child, Command},
    ptr,
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

use super::host::LIMIT;

/// A program at a terminal of its own.
pub struct Terminal {
    child: Child,
    master: File,
    /// Our copy of the program's side: the terminal and its settings outlive the program.
    own: OwnedFd,
    parts: Receiver<Vec<u8>>,
    seen: String,
    /// Up to where what was seen has been looked through.
    at: usize,
}

impl Terminal {
    /// Starts a program in the foreground of a new terminal of 24 lines and 80 columns.
    pub fn start(mut command: Command) -> Terminal {
        let (master, own) = open();
        command.stdin(own.try_clone().expect("a descriptor"));
        command.stdout(own.try_clone().expect("a descriptor"));
        command.stderr(own.try_clone().expect("a descriptor"));
        let prepare = || {
            // SAFETY: system calls only. The terminal becomes that of a new session.
            unsafe {
                libc::setsid();
                match libc::ioctl(0, libc::TIOCSCTTY, 0) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                }
            }
        };
        // SAFETY: the closure only makes async-signal-safe calls.
        unsafe { command.pre_exec(prepare) };
        let child = command.spawn().expect("the program can be started");
        let mut from = master.try_clone().expect("a descriptor");
        let (sender, parts) = mpsc::channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(got @ 1..) = from.read(&mut buffer) {
                if sender.send(buffer[..got].to_vec()).is_err() {
                    return;
                }
            }
        });
        Terminal { child, master, own, parts, seen: String::new(), at: 0 }
    }

    /// Types keys.
    pub fn type_keys(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).expect("keys can be typed");
    }

    /// Waits until `text` is seen after what was waited for last.
    #[track_caller]
    pub fn see(&mut self, text: &str) {
        let until = Instant::now() + LIMIT;
        loop {
            if let Some(place) = self.seen[self.at..].find(text) {
                self.at += place + text.len();
                return;
            }
            match self.parts.recv_timeout(until.saturating_duration_since(Instant::now())) {
                // What is typed and shown here is ASCII.
                Ok(part) => self.seen.push_str(&String::from_utf8_lossy(&part)),
                Err(_) => panic!("{text:?} did not appear in\n{}", self.seen),
            }
        }
    }

    /// Changes the size, of which the kernel tells the program.
    pub fn resize(&self, rows: u16, cols: u16) {
        let size = libc::winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: a size for a terminal that is open.
        assert_eq!(unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }, 0);
    }

    /// Waits for the program's end; its exit code.
    #[track_caller]
    pub fn end(&mut self) -> i32 {
        let until = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.child.try_wait().expect("it is ours") {
                return status.code().unwrap_or(-1);
            }
            assert!(Instant::now() < until, "the program did not end; seen so far:\n{}", self.rest());
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// All that was seen.
    pub fn rest(&mut self) -> &str {
        while let Ok(part) = self.parts.recv_timeout(Duration::from_millis(200)) {
            self.seen.push_str(&String::from_utf8_lossy(&part));
        }
        &self.seen
    }

    /// Whether keys are shown and lines are edited, as before any program changed that.
    pub fn is_cooked(&self) -> bool {
        // SAFETY: an all-zero `termios` is valid and the call fills it.
        unsafe {
            let mut mode: libc::termios = std::mem::zeroed();
            assert_eq!(libc::tcgetattr(self.own.as_raw_fd(), &raw mut mode), 0);
            let wanted = libc::ECHO | libc::ICANON | libc::ISIG;
            mode.c_lflag & wanted == wanted
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn open() -> (File, OwnedFd) {
    let (mut master, mut own) = (-1, -1);
    let size = libc::winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: places for two descriptors, no name, no settings, a size.
    unsafe {
        let made =
            libc::openpty(&raw mut master, &raw mut own, ptr::null_mut(), ptr::null(), &raw const size);
        assert_eq!(made, 0, "no terminal: {}", std::io::Error::last_os_error());
        for fd in [master, own] {
            libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC);
        }
        (File::from_raw_fd(master), OwnedFd::from_raw_fd(own))
    }
}
