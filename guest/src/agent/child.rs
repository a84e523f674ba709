//! From fork to exec: what a new process does before it is the program.
//!
//! ```text
//!   main process                         further process
//!     carry out the plan                   join the container's namespaces
//!     Root ──fd──▶ agent
//!     [ init: fork; process 1 reaps ]
//!     session, terminal ──fd──▶ agent
//!     Ready ──▶ agent,  wait for its word
//!     standard streams, limits, groups, capabilities, user, directory
//!     exec
//! ```
//!
//! The agent has threads, and a fork has only one of them: any lock may be held for ever by a
//! thread that is not here. So nothing in this file allocates, locks or panics; it is system
//! calls over memory prepared before. C library functions that do more than their system call
//! (`setuid` tells all threads, for instance) are called by number instead. Failures go to
//! the agent as numbers over the status socket, which closes by itself on a successful exec.

use super::{plan::Plan, program::Program};
use std::{
    ffi::{CStr, c_char},
    io,
    os::fd::RawFd,
    ptr,
};

/// What a child tells the agent, followed by a descriptor for some.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Word {
    pub kind: u32,
    /// [`Stage`] of a failure.
    pub stage: u32,
    /// Step of the plan that failed.
    pub step: u32,
    /// The kernel's error.
    pub errno: i32,
}

/// The container's root directory is attached to the word.
pub const ROOT: u32 = 1;
/// The terminal's master is attached.
pub const TERMINAL: u32 = 2;
/// All that needs the agent is done; the child waits for one byte.
pub const READY: u32 = 3;
/// It failed.
pub const FAILED: u32 = 4;

/// Where a child was when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Stage {
    Plan,
    Namespaces,
    Init,
    Terminal,
    Streams,
    Limits,
    Capabilities,
    User,
    Directory,
    Exec,
}

impl Stage {
    /// The stage of a number, for the agent.
    pub fn of(number: u32) -> Self {
        const ALL: [Stage; 10] = [
            Stage::Plan,
            Stage::Namespaces,
            Stage::Init,
            Stage::Terminal,
            Stage::Streams,
            Stage::Limits,
            Stage::Capabilities,
            Stage::User,
            Stage::Directory,
            Stage::Exec,
        ];
        ALL.into_iter().find(|s| *s as u32 == number).unwrap_or(Stage::Exec)
    }
}

/// Everything a child needs, prepared.
pub struct Child<'a> {
    program: &'a Program,
    plan: Option<&'a Plan>,
    /// Namespaces to join: descriptor and kind.
    join: Vec<(RawFd, libc::c_int)>,
    status: RawFd,
    /// Pipes for a process without terminal.
    streams: [RawFd; 3],
    argv: Vec<*const c_char>,
    envp: Vec<*const c_char>,
}

type Step = Result<(), (Stage, usize, i32)>;

fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

fn at(stage: Stage, result: libc::c_long) -> Result<libc::c_long, (Stage, usize, i32)> {
    if result < 0 { Err((stage, 0, errno())) } else { Ok(result) }
}

impl<'a> Child<'a> {
    /// Prepares a child; allocates, so before the fork.
    pub fn new(
        program: &'a Program,
        plan: Option<&'a Plan>,
        join: Vec<(RawFd, libc::c_int)>,
        status: RawFd,
        streams: [RawFd; 3],
    ) -> Self {
        let list = |strings: &'a [std::ffi::CString]| {
            strings.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
        };
        let (argv, envp) = (list(&program.args), list(&program.env));
        Self { program, plan, join, status, streams, argv, envp }
    }

    /// Becomes the program. Only in a fresh fork.
    pub fn run(&self) -> ! {
        let (stage, step, errno) = match self.become_program() {
            Ok(never) => match never {},
            Err(failure) => failure,
        };
        let word = Word { kind: FAILED, stage: stage as u32, step: step as u32, errno };
        self.tell(&word, -1);
        // SAFETY: ends only this process, without running the agent's clean-up.
        unsafe { libc::_exit(127) }
    }

    fn become_program(&self) -> Result<std::convert::Infallible, (Stage, usize, i32)> {
        // SAFETY: umask cannot fail and has no memory arguments.
        unsafe { libc::umask(0) };
        for &(namespace, kind) in &self.join {
            // SAFETY: setns has no memory arguments.
            at(Stage::Namespaces, unsafe { libc::setns(namespace, kind) }.into())?;
        }
        if let Some(plan) = self.plan {
            plan.carry_out().map_err(|(step, errno)| (Stage::Plan, step, errno))?;
            self.tell_root()?;
            if self.program.init {
                self.split()?;
            }
        }
        // SAFETY: no memory arguments.
        unsafe {
            libc::umask(0o022);
            libc::setsid();
        }
        self.unprotect();
        let mut streams = self.streams;
        if self.program.terminal.is_some() {
            streams = [self.terminal()?; 3];
        }
        self.tell(&Word { kind: READY, stage: 0, step: 0, errno: 0 }, -1);
        self.await_word()?;
        self.set_streams(streams)?;
        self.set_limits()?;
        self.set_user()?;
        Err((Stage::Exec, 0, self.exec()))
    }

    /// The agent is never to be killed for want of memory; this process may be.
    fn unprotect(&self) {
        // SAFETY: zero-terminated path, one readable byte; failing does not matter.
        unsafe {
            let flags = libc::O_WRONLY | libc::O_CLOEXEC;
            let fd = libc::open(c"/proc/self/oom_score_adj".as_ptr(), flags);
            if fd >= 0 {
                libc::write(fd, c"0".as_ptr().cast(), 1);
                libc::close(fd);
            }
        }
    }

    fn tell_root(&self) -> Step {
        let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
        // SAFETY: zero-terminated path.
        let root = at(Stage::Plan, unsafe { libc::open(c"/".as_ptr(), flags) }.into())? as RawFd;
        self.tell(&Word { kind: ROOT, stage: 0, step: 0, errno: 0 }, root);
        // SAFETY: our own descriptor.
        unsafe { libc::close(root) };
        Ok(())
    }

    /// Sends a word, with a descriptor unless it is negative.
    fn tell(&self, word: &Word, descriptor: RawFd) {
        let mut part =
            libc::iovec { iov_base: ptr::from_ref(word).cast_mut().cast(), iov_len: size_of::<Word>() };
        // Room for one control message with one descriptor, aligned as its header.
        let mut control = [0u64; 4];
        // SAFETY: msghdr is plain data for which all zeroes is valid; the control buffer is
        // larger than CMSG_SPACE of one integer, so the first header and its data are inside.
        unsafe {
            let mut message: libc::msghdr = std::mem::zeroed();
            message.msg_iov = &raw mut part;
            message.msg_iovlen = 1;
            if descriptor >= 0 {
                message.msg_control = control.as_mut_ptr().cast();
                message.msg_controllen = libc::CMSG_SPACE(size_of::<RawFd>() as u32) as usize;
                let header = libc::CMSG_FIRSTHDR(&raw const message);
                (*header).cmsg_level = libc::SOL_SOCKET;
                (*header).cmsg_type = libc::SCM_RIGHTS;
                (*header).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as usize;
                ptr::write_unaligned(libc::CMSG_DATA(header).cast(), descriptor);
            }
            libc::sendmsg(self.status, &raw const message, libc::MSG_NOSIGNAL);
        }
    }

    fn await_word(&self) -> Step {
        let mut byte = 0u8;
        // SAFETY: one writable byte.
        let n = unsafe { libc::read(self.status, (&raw mut byte).cast(), 1) };
        if n == 1 { Ok(()) } else { Err((Stage::Exec, 0, libc::ECANCELED)) }
    }

    /// Makes this process a small init and goes on in its only child.
    fn split(&self) -> Step {
        // SAFETY: like fork, with the child on a copy of this stack.
        let child = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
        if at(Stage::Init, child)? == 0 {
            return Ok(());
        }
        super::init::watch(child as libc::pid_t)
    }

    /// Makes a terminal in the container's own `/dev/pts` and sends its other side off.
    fn terminal(&self) -> Result<RawFd, (Stage, usize, i32)> {
        let stage = Stage::Terminal;
        let size = self.program.terminal.unwrap_or_default();
        let size = libc::winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 };
        let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
        let mut number: libc::c_uint = 0;
        let unlock: libc::c_int = 0;
        // SAFETY: zero-terminated paths, and ioctls with the arguments their numbers ask for.
        unsafe {
            let master = at(stage, libc::open(c"/dev/ptmx".as_ptr(), flags).into())? as RawFd;
            at(stage, libc::ioctl(master, libc::TIOCSPTLCK, &raw const unlock).into())?;
            at(stage, libc::ioctl(master, libc::TIOCSWINSZ, &raw const size).into())?;
            at(stage, libc::ioctl(master, libc::TIOCGPTN, &raw mut number).into())?;
            let slave = libc::ioctl(master, libc::TIOCGPTPEER, flags);
            let slave = at(stage, slave.into())? as RawFd;
            at(stage, libc::ioctl(slave, libc::TIOCSCTTY, 0).into())?;
            libc::fchown(slave, self.program.uid, u32::MAX);
            if self.plan.is_some() {
                put_on_console(number);
            }
            self.tell(&Word { kind: TERMINAL, stage: 0, step: 0, errno: 0 }, master);
            libc::close(master);
            Ok(slave)
        }
    }

    fn set_streams(&self, streams: [RawFd; 3]) -> Step {
        for (number, from) in (0..).zip(streams) {
            // SAFETY: no memory arguments, as in the rest of this function. The pipes were
            // made after descriptors 0 to 2, so none of them is overwritten before its turn.
            at(Stage::Streams, unsafe { libc::dup2(from, number) }.into())?;
            if self.program.terminal.is_none() {
                self.give(number);
            }
        }
        let flags = libc::CLOSE_RANGE_CLOEXEC as libc::c_uint;
        // SAFETY: as above. Everything is close-on-exec already; this is the belt.
        unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, flags) };
        Ok(())
    }

    /// Lets the program open `/dev/stdout` and its like again under its own user.
    fn give(&self, stream: RawFd) {
        // SAFETY: stat is plain data for which all zeroes is valid, and writable; fchown has
        // no memory arguments. Only our pipes are given away, never a device.
        unsafe {
            let mut stat: libc::stat = std::mem::zeroed();
            if libc::fstat(stream, &raw mut stat) == 0 && stat.st_mode & libc::S_IFMT == libc::S_IFIFO {
                libc::fchown(stream, self.program.uid, self.program.gid);
            }
        }
    }

    fn set_limits(&self) -> Step {
        for &(which, soft, hard) in &self.program.rlimits {
            let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
            let none = ptr::null_mut::<libc::rlimit>();
            // SAFETY: one readable rlimit; process 0 is the caller.
            let result = unsafe { libc::syscall(libc::SYS_prlimit64, 0, which, &raw const limit, none) };
            at(Stage::Limits, result)?;
        }
        Ok(())
    }

    fn set_user(&self) -> Step {
        let program = self.program;
        // Once as root, once as the user: either may be the one who is allowed to.
        // SAFETY: zero-terminated path.
        let entered = unsafe { libc::chdir(program.cwd.as_ptr()) } == 0;
        if let Some(keep) = program.capabilities {
            bound_capabilities(keep)?;
        }
        let groups = &program.groups;
        // SAFETY: the pointer and the count describe `groups`; the rest have no memory
        // arguments. By number, since the C library would involve the agent's other threads.
        unsafe {
            let stage = Stage::User;
            at(stage, libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()))?;
            let (uid, gid) = (program.uid, program.gid);
            at(stage, libc::syscall(libc::SYS_setresgid, gid, gid, gid))?;
            at(stage, libc::syscall(libc::SYS_setresuid, uid, uid, uid))?;
            if program.capabilities.is_some() && program.uid == 0 {
                keep_capabilities(program.capabilities.unwrap_or(0))?;
            }
            if program.no_new_privileges {
                let result = libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
                at(stage, result.into())?;
            }
            if !entered {
                at(Stage::Directory, libc::chdir(program.cwd.as_ptr()).into())?;
            }
        }
        Ok(())
    }

    /// Tries every candidate; returns the error that says most.
    fn exec(&self) -> i32 {
        reset_signals();
        let mut worst = libc::ENOENT;
        for path in &self.program.candidates {
            // SAFETY: a zero-terminated path and two null-terminated lists of such strings.
            unsafe { libc::execve(path.as_ptr(), self.argv.as_ptr(), self.envp.as_ptr()) };
            match errno() {
                libc::ENOENT | libc::ENOTDIR => {}
                libc::EACCES => worst = libc::EACCES,
                other => return other,
            }
        }
        worst
    }
}

/// Every signal as a new program expects it: default, unblocked.
pub fn reset_signals() {
    // The kernel's own structure: handler, flags, restorer, mask; all zero is the default. By
    // number, since the C library keeps two signals to itself, and they may be ignored too.
    let default = [0u64; 4];
    // SAFETY: a structure and the size of its mask; signals that cannot be changed answer
    // with an error. sigset_t is plain data for which all zeroes is valid.
    unsafe {
        for signal in 1..=64 {
            let before = ptr::null_mut::<u64>();
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), before, 8);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
    }
}

/// Puts terminal `number` on `/dev/console` too, as container images expect; never fatal.
fn put_on_console(number: libc::c_uint) {
    let mut path = *b"/dev/pts/\0\0\0\0\0\0\0\0\0\0\0";
    let mut digits = [0u8; 10];
    let (mut left, mut count) = (number, 0);
    loop {
        digits[count] = b'0' + (left % 10) as u8;
        left /= 10;
        count += 1;
        if left == 0 {
            break;
        }
    }
    for i in 0..count {
        path[9 + i] = digits[count - 1 - i];
    }
    let Ok(path) = CStr::from_bytes_until_nul(&path) else { return };
    let console = c"/dev/console".as_ptr();
    let flags = libc::O_CREAT | libc::O_WRONLY | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: zero-terminated strings; the descriptor is closed at once.
    unsafe {
        let fd = libc::open(console, flags, 0o620 as libc::c_uint);
        if fd >= 0 {
            libc::close(fd);
        }
        libc::mount(path.as_ptr(), console, ptr::null(), libc::MS_BIND, ptr::null());
    }
}

/// Takes every capability but `keep` out of reach of this process and its children.
fn bound_capabilities(keep: u64) -> Step {
    for number in 0..64 {
        // SAFETY: prctl with these commands has no memory arguments.
        unsafe {
            if libc::prctl(libc::PR_CAPBSET_READ, number, 0, 0, 0) < 0 {
                return Ok(());
            }
            if keep & 1 << number == 0 {
                at(Stage::Capabilities, libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0).into())?;
            }
        }
    }
    Ok(())
}

/// Gives up every capability but `keep` now.
fn keep_capabilities(keep: u64) -> Step {
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0];
    let (low, high) = (keep as u32, (keep >> 32) as u32);
    // Effective, permitted, inheritable; the low words first. Inheritable stays empty.
    let data = [low, low, 0, high, high, 0];
    // SAFETY: a header and two data structures as version 3 defines them.
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) };
    at(Stage::Capabilities, result).map(drop)
}
