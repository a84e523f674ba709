//! The caller's terminal while a command in the lab uses it: raw, and its size.

use std::io::{IsTerminal, stdin, stdout};
use std::mem;

/// Puts the terminal back when dropped.
pub struct Raw {
    before: libc::termios,
}

impl Raw {
    /// Makes the terminal on standard input raw, so that every key reaches the command; `None`
    /// where it refuses.
    pub fn enter() -> Option<Self> {
        // SAFETY: termios is plain data that tcgetattr fills; both calls take pointers to it.
        unsafe {
            let mut settings: libc::termios = mem::zeroed();
            if libc::tcgetattr(0, &raw mut settings) != 0 {
                return None;
            }
            let before = settings;
            libc::cfmakeraw(&raw mut settings);
            libc::tcsetattr(0, libc::TCSANOW, &raw const settings);
            Some(Self { before })
        }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // SAFETY: a pointer to the settings that tcgetattr gave.
        unsafe { libc::tcsetattr(0, libc::TCSANOW, &raw const self.before) };
    }
}

/// Whether a person sits at both ends of the streams.
pub fn is_interactive() -> bool {
    stdin().is_terminal() && stdout().is_terminal()
}

/// Rows and columns of the terminal on standard output.
pub fn size() -> (u16, u16) {
    // SAFETY: TIOCGWINSZ fills one winsize, which is plain data.
    let size = unsafe {
        let mut size: libc::winsize = mem::zeroed();
        libc::ioctl(1, libc::TIOCGWINSZ, &raw mut size);
        size
    };
    if size.ws_row == 0 || size.ws_col == 0 { (24, 80) } else { (size.ws_row, size.ws_col) }
}
