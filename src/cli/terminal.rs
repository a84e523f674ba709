//! The terminal a machine's console is attached to: raw while the machine runs, and always
//! put back.

use std::sync::{Mutex, PoisonError};

static SAVED: Mutex<Option<(i32, libc::termios)>> = Mutex::new(None);

/// Whether `fd` is a terminal.
pub fn is_terminal(fd: i32) -> bool {
    // SAFETY: asks about a number; any number may be asked about.
    unsafe { libc::isatty(fd) == 1 }
}

/// Makes terminal `fd` hand every key through as it is, until [`restore`]. Nothing happens
/// when it is no terminal.
pub fn make_raw(fd: i32) {
    // SAFETY: an all-zero `termios` is valid, and is only used after `tcgetattr` filled it.
    unsafe {
        let mut mode: libc::termios = std::mem::zeroed();
        if libc::tcgetattr(fd, &raw mut mode) != 0 {
            return;
        }
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some((fd, mode));
        libc::cfmakeraw(&raw mut mode);
        libc::tcsetattr(fd, libc::TCSANOW, &raw const mode);
    }
}

/// Puts the terminal back as it was found.
pub fn restore() {
    if let Some((fd, mode)) = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take() {
        // SAFETY: the mode was filled by `tcgetattr` for this descriptor.
        unsafe { libc::tcsetattr(fd, libc::TCSANOW, &raw const mode) };
    }
}

/// Size of terminal `fd` as rows and columns, if it is one and knows.
pub fn size(fd: i32) -> Option<(u16, u16)> {
    // SAFETY: an all-zero `winsize` is valid, and the call fills it.
    unsafe {
        let mut size: libc::winsize = std::mem::zeroed();
        let answered = libc::ioctl(fd, libc::TIOCGWINSZ, &raw mut size) == 0;
        (answered && size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
    }
}
