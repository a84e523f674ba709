//! A small init for containers that ask for one: process 1 that hands signals on to its only
//! child, reaps orphans, and ends with the child's code.
//!
//! It is a fork of the agent that never execs, so the rules of [`super::child`] hold: system
//! calls only. All signals are blocked before the fork and taken one by one.

use std::ptr;

/// Watches over `child`, and ends as it does (128 and the signal if one killed it).
pub fn watch(child: libc::pid_t) -> ! {
    // SAFETY: system calls on plain local data. Descriptors 0 to 2 become /dev/null so that
    // the streams' ends are the program's; the rest, the agent's, are closed.
    unsafe {
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
        for number in 0..3 {
            if null >= 0 {
                libc::dup2(null, number);
            }
        }
        libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0);
        libc::prctl(libc::PR_SET_NAME, c"nacelle-init".as_ptr());
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const all, ptr::null_mut());
        loop {
            reap(child);
            match libc::sigwaitinfo(&raw const all, ptr::null_mut()) {
                // Those of a terminal are for its foreground, which has had them already.
                libc::SIGCHLD | libc::SIGTTIN | libc::SIGTTOU => {}
                signal if signal > 0 => {
                    libc::kill(child, signal);
                }
                _ => {}
            }
        }
    }
}

fn reap(child: libc::pid_t) {
    let mut status = 0;
    loop {
        // SAFETY: `status` is writable.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
        if pid <= 0 {
            return;
        }
        if pid == child {
            let code = if libc::WIFSIGNALED(status) {
                128 + libc::WTERMSIG(status)
            } else {
                libc::WEXITSTATUS(status)
            };
            // SAFETY: ends only this process.
            unsafe { libc::_exit(code) }
        }
    }
}
