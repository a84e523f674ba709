//! The agent on an ordinary host, in namespaces of its own: for tests, and to try things.
//!
//! `nacelle-agent --socket DIR` listens on `DIR/vsock.sock` as a monitor would and is process
//! 1 of new process, mount, host name, IPC, network and control-group namespaces. What
//! belongs to the whole kernel (clock, random numbers, power) it leaves alone.

use super::syscall::{check, mount};
use std::{io, path::Path};

/// Enters new namespaces and goes on in a child as their process 1; the caller ends with it.
pub fn enter(directory: &Path) -> Result<(), String> {
    let kinds = libc::CLONE_NEWPID
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWCGROUP;
    let failed = |what: &str, e: &io::Error| format!("cannot {what}: {e} (are you root?)");
    // SAFETY: unshare and fork have no memory arguments; there are no threads yet.
    check(unsafe { libc::unshare(kinds) }).map_err(|e| failed("make namespaces", &e))?;
    // SAFETY: as above.
    let child = check(unsafe { libc::fork() }).map_err(|e| failed("fork", &e))?;
    if child != 0 {
        let mut status = 0;
        // SAFETY: `status` is writable.
        while unsafe { libc::waitpid(child, &raw mut status, 0) } != child {}
        std::process::exit(if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { 1 });
    }
    // SAFETY: prctl with this command has no memory arguments.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let root = Path::new("/");
    mount("", root, "", libc::MS_REC | libc::MS_PRIVATE, "")
        .map_err(|e| failed("make mounts private", &e))?;
    mount("proc", Path::new("/proc"), "proc", super::plan::PLAIN, "")
        .map_err(|e| failed("mount /proc", &e))?;
    let base = directory.join("state");
    std::fs::create_dir_all(&base).map_err(|e| failed("make a directory", &e))?;
    mount("tmpfs", &base, "tmpfs", 0, "mode=755").map_err(|e| failed("mount a tmpfs", &e))?;
    Ok(())
}

/// A name for the control group that no other agent on the host has.
pub fn group_name() -> String {
    let outer = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    let digits: String = outer.to_string_lossy().chars().filter(char::is_ascii_digit).collect();
    format!("nacelle-agent-{digits}")
}
