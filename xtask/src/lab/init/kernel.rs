//! The system calls that process 1 makes and the standard library has no word for.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::ptr;

use anyhow::{Context, Result};

/// Mounts `source` of type `kind` on `target` with file-system options `options`.
pub fn mount(source: &str, target: &str, kind: &str, options: &str) -> Result<()> {
    mount_flags(source, target, kind, 0, options)
}

/// The same, read-only.
pub fn mount_read_only(source: &str, target: &str, kind: &str, options: &str) -> Result<()> {
    mount_flags(source, target, kind, libc::MS_RDONLY, options)
}

/// Moves the mount at `from` to `to`.
pub fn move_mount(from: &str, to: &str) -> Result<()> {
    mount_flags(from, to, "", libc::MS_MOVE, "")
}

fn mount_flags(source: &str, target: &str, kind: &str, flags: libc::c_ulong, options: &str) -> Result<()> {
    let (from, to) = (CString::new(source)?, CString::new(target)?);
    let (kind, options) = (CString::new(kind)?, CString::new(options)?);
    // SAFETY: all four are NUL-terminated strings that live through the call.
    let answer =
        unsafe { libc::mount(from.as_ptr(), to.as_ptr(), kind.as_ptr(), flags, options.as_ptr().cast()) };
    checked(answer).with_context(|| format!("Cannot mount {source} on {target}"))
}

/// Makes the mount at `path` the root of everything.
pub fn switch_root(path: &str) -> Result<()> {
    std::env::set_current_dir(path)?;
    move_mount(".", "/")?;
    let dot = c".";
    // SAFETY: a NUL-terminated string that lives through the call.
    checked(unsafe { libc::chroot(dot.as_ptr()) }).context("Cannot change the root")?;
    std::env::set_current_dir("/")?;
    Ok(())
}

/// Loads the kernel module at `path`.
pub fn load_module(path: &Path) -> Result<()> {
    let file = File::open(path)?;
    load_open_module(&file).with_context(|| format!("Cannot load {}", path.display()))
}

/// Loads the kernel module in `file`; one that is there already is no error.
pub fn load_open_module(file: &File) -> io::Result<()> {
    let options = c"";
    // SAFETY: finit_module reads from the descriptor and a NUL-terminated option string.
    let answer = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), options.as_ptr(), 0) };
    match checked(i32::try_from(answer).unwrap_or(-1)) {
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => Err(error),
        _ => Ok(()),
    }
}

/// Host name and limits.
pub fn settle() -> Result<()> {
    let name = b"lab";
    // SAFETY: the pointer and length describe the name.
    checked(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) })?;
    for (what, limit) in [
        (libc::RLIMIT_NOFILE, libc::rlimit { rlim_cur: 1024, rlim_max: 1 << 20 }),
        (libc::RLIMIT_MEMLOCK, libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY }),
    ] {
        // SAFETY: the pointer is to a whole rlimit.
        checked(unsafe { libc::setrlimit(what, &raw const limit) })?;
    }
    Ok(())
}

/// Brings what was written below `paths` to the host.
pub fn sync<'a>(paths: impl Iterator<Item = &'a Path>) {
    for directory in paths.filter_map(|path| File::open(path).ok()) {
        // SAFETY: an open descriptor.
        unsafe { libc::syncfs(directory.as_raw_fd()) };
    }
}

/// Ends the machine.
pub fn power_off() -> ! {
    // SAFETY: no argument but a constant; nothing in this process needs saving.
    unsafe { libc::reboot(libc::RB_POWER_OFF) };
    loop {
        std::thread::park();
    }
}

/// Waits for any child; its process id and wait status.
pub fn wait_any() -> io::Result<(i32, i32)> {
    let mut status = 0;
    // SAFETY: the pointer is to an int.
    let id = unsafe { libc::waitpid(-1, &raw mut status, 0) };
    checked(id)?;
    Ok((id, status))
}

/// A new pseudo-terminal: (master, terminal).
pub fn open_terminal(rows: u16, columns: u16) -> io::Result<(OwnedFd, OwnedFd)> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    let (mut master, mut terminal) = (-1, -1);
    // SAFETY: two pointers to ints, no name, default settings, a whole winsize.
    let answer = unsafe {
        libc::openpty(&raw mut master, &raw mut terminal, ptr::null_mut(), ptr::null(), &raw const size)
    };
    checked(answer)?;
    // SAFETY: openpty has just opened both for us.
    let (master, terminal) = unsafe { (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(terminal)) };
    // SAFETY: an open descriptor; the command must not inherit the master.
    checked(unsafe { libc::fcntl(master.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) })?;
    Ok((master, terminal))
}

/// Sets a terminal's size.
pub fn resize(master: &impl AsRawFd, rows: u16, columns: u16) {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize.
    unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
}

/// Makes descriptor 0 the controlling terminal of a new session; for use between fork and exec.
pub fn take_terminal() -> io::Result<()> {
    // SAFETY: both calls are async-signal-safe and take no pointers.
    unsafe {
        checked(libc::setsid())?;
        checked(libc::ioctl(0, libc::TIOCSCTTY, 0))
    }
}

/// Makes reads from `file` give up instead of waiting.
pub fn set_nonblocking(file: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: an open descriptor and constants.
    unsafe {
        let flags = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
        checked(libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK))
    }
}

/// The error behind a system call's negative answer.
pub fn checked(answer: i32) -> io::Result<()> {
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
