//! Starting processes: clone, listen to the child's words, and let it go.
//!
//! A container's main process is cloned into new namespaces and carries the container's plan
//! out; a further one is cloned into the container's process namespace and joins the others.
//! Both are born in the container's control group, so nothing they do is uncounted.

use super::{
    child::{self, Child, Stage, Word},
    plan::Plan,
    process::{Draft, Process, Processes},
    program::Program,
    streams::Streams,
    syscall::{check_long, join, message_pair, owned, pipe, wait, want},
};
use guest::protocol::{Failure, FailureKind, ProcessSpec};
use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    sync::Arc,
    time::{Duration, Instant},
};

/// Born in the control group given (`clone3`, Linux 5.7).
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Longest time from clone to exec.
const LIMIT: Duration = Duration::from_secs(60);

/// The container's namespaces, held so that it can be joined at any time.
#[derive(Debug)]
pub struct Namespaces {
    pub mount: OwnedFd,
    process: OwnedFd,
    others: Vec<(OwnedFd, libc::c_int)>,
}

impl Namespaces {
    /// The namespace of the machine's name.
    pub fn names(&self) -> Option<&OwnedFd> {
        self.others.iter().find(|(_, kind)| *kind == libc::CLONE_NEWUTS).map(|(fd, _)| fd)
    }

    fn of(pid: i32) -> io::Result<Self> {
        let open = |name: &str| File::open(format!("/proc/{pid}/ns/{name}")).map(OwnedFd::from);
        Ok(Self {
            mount: open("mnt")?,
            process: open("pid")?,
            others: vec![
                (open("ipc")?, libc::CLONE_NEWIPC),
                (open("uts")?, libc::CLONE_NEWUTS),
                (open("cgroup")?, libc::CLONE_NEWCGROUP),
            ],
        })
    }
}

/// What the container's main process leaves for others.
pub struct Born {
    pub namespaces: Namespaces,
    pub root: OwnedFd,
}

/// Starts the container's main process.
pub fn main(
    processes: &Processes,
    spec: &ProcessSpec,
    program: &Program,
    plan: &Plan,
    cgroup: Option<&OwnedFd>,
) -> Result<(Arc<Process>, Born), Failure> {
    let flags = libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    let ends = Ends::new(spec)?;
    let child = Child::new(program, Some(plan), Vec::new(), ends.status_raw(), ends.raw());
    let process = processes.spawn(ends.draft(spec, true)?, || clone(&child, flags, cgroup))?;
    let mut story = Story { plan: Some(plan), spec, root: None, namespaces: None };
    let heard = story.follow(&process, ends);
    settle(processes, &process, heard)?;
    match (story.namespaces, story.root) {
        (Some(namespaces), Some(root)) => Ok((process, Born { namespaces, root })),
        _ => Err(system("The container's first process said nothing of its root")),
    }
}

/// Starts a further process in the container.
pub fn further(
    processes: &Processes,
    spec: &ProcessSpec,
    program: &Program,
    namespaces: &Namespaces,
    cgroup: Option<&OwnedFd>,
) -> Result<Arc<Process>, Failure> {
    let ends = Ends::new(spec)?;
    let mut to_join: Vec<(RawFd, libc::c_int)> =
        namespaces.others.iter().map(|(fd, kind)| (fd.as_raw_fd(), *kind)).collect();
    to_join.push((namespaces.mount.as_raw_fd(), libc::CLONE_NEWNS));
    let draft = ends.draft(spec, false)?;
    let (status, streams) = (ends.status_raw(), ends.raw());
    // Joining a process namespace concerns later children only, and bars the thread from
    // making threads; so a thread of its own does it.
    let process = std::thread::scope(|scope| {
        let fork = || {
            let child = Child::new(program, None, to_join, status, streams);
            join(&namespaces.process, libc::CLONE_NEWPID)
                .map_err(|e| system(format!("Cannot enter the container; it has ended: {e}")))?;
            processes.spawn(draft, || clone(&child, 0, cgroup))
        };
        let thread = std::thread::Builder::new().stack_size(128 << 10).spawn_scoped(scope, fork);
        match thread {
            Ok(thread) => thread.join().unwrap_or_else(|_| Err(system("A thread broke off"))),
            Err(e) => Err(system(format!("Cannot make a thread: {e}"))),
        }
    })?;
    let mut story = Story { plan: None, spec, root: None, namespaces: None };
    let heard = story.follow(&process, ends);
    settle(processes, &process, heard)?;
    Ok(process)
}

fn settle(processes: &Processes, process: &Arc<Process>, heard: Result<(), Failure>) -> Result<(), Failure> {
    match heard {
        Ok(()) => processes.confirm(process),
        Err(_) => processes.withdraw(process),
    }
    heard
}

fn system(message: impl Into<String>) -> Failure {
    Failure::new(FailureKind::System, message)
}

fn clone(child: &Child<'_>, flags: libc::c_int, cgroup: Option<&OwnedFd>) -> io::Result<i32> {
    // SAFETY: clone_args is plain data for which all zeroes is valid.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = u64::from(flags.cast_unsigned());
    arguments.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = cgroup.as_raw_fd() as u64;
    }
    // Until its exec the child must not run a handler of the agent's; the mask is inherited.
    let blocked = Blocked::all();
    // SAFETY: a structure with its size. Like fork, parent and child go on with a copy of the
    // same memory, and the child only makes system calls (see child.rs).
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>()) };
    if pid == 0 {
        child.run();
    }
    drop(blocked);
    check_long(pid).map(|pid| pid as i32)
}

/// All signals blocked for this thread while it lives.
struct Blocked(libc::sigset_t);

impl Blocked {
    fn all() -> Self {
        // SAFETY: sigset_t is plain data; both sets are local.
        unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            let mut before: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
            Self(before)
        }
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // SAFETY: the set was filled by the kernel.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
    }
}

/// Both ends of what connects a child with the agent.
struct Ends {
    status: OwnedFd,
    childs_status: OwnedFd,
    /// The child's ends of its standard streams; none with a terminal.
    childs: Vec<OwnedFd>,
    /// Ours; taken when the process is made.
    ours: std::cell::RefCell<Option<(Option<OwnedFd>, OwnedFd, OwnedFd)>>,
}

impl Ends {
    fn new(spec: &ProcessSpec) -> Result<Self, Failure> {
        Self::make(spec).map_err(|e| system(format!("Cannot make pipes for a process: {e}")))
    }

    fn make(spec: &ProcessSpec) -> io::Result<Self> {
        let (status, childs_status) = message_pair()?;
        let (mut childs, mut ours) = (Vec::new(), None);
        if spec.terminal.is_none() {
            let (stdin, to_stdin) = if spec.stdin {
                let (read, write) = pipe()?;
                (read, Some(write))
            } else {
                (File::open("/dev/null")?.into(), None)
            };
            let (from_stdout, stdout) = pipe()?;
            let (from_stderr, stderr) = pipe()?;
            childs = vec![stdin, stdout, stderr];
            ours = Some((to_stdin, from_stdout, from_stderr));
        }
        Ok(Self { status, childs_status, childs, ours: ours.into() })
    }

    fn raw(&self) -> [RawFd; 3] {
        let fd = |i: usize| self.childs.get(i).map_or(-1, AsRawFd::as_raw_fd);
        [fd(0), fd(1), fd(2)]
    }

    fn status_raw(&self) -> RawFd {
        self.childs_status.as_raw_fd()
    }

    fn draft(&self, spec: &ProcessSpec, main: bool) -> Result<Draft, Failure> {
        let streams = match self.ours.take() {
            Some((stdin, stdout, stderr)) => Streams::pipes(stdin, stdout, stderr),
            None => Streams::without_terminal_yet(),
        };
        Ok(Draft {
            main,
            args: spec.args.clone(),
            user: spec.user.clone(),
            terminal: spec.terminal.is_some(),
            streams: streams.map_err(|e| system(format!("Cannot prepare streams: {e}")))?,
        })
    }
}

/// What a child has told so far.
struct Story<'a> {
    plan: Option<&'a Plan>,
    spec: &'a ProcessSpec,
    root: Option<OwnedFd>,
    namespaces: Option<Namespaces>,
}

impl Story<'_> {
    /// Listens until the program runs.
    fn follow(&mut self, process: &Process, ends: Ends) -> Result<(), Failure> {
        let Ends { status, childs_status, childs, .. } = ends;
        // Our copies must be gone, or we would wait for ourselves.
        drop((childs_status, childs));
        let until = Instant::now() + LIMIT;
        let mut released = false;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let heard = wait(&mut [want(&status, libc::POLLIN)], Some(left));
            if !heard.map_err(|e| system(format!("Cannot wait for a process: {e}")))? {
                return Err(system(format!("The process did not start within {LIMIT:?}")));
            }
            match receive(&status) {
                Ok(None) if released => return Ok(()),
                Ok(None) => return Err(system("The process was killed before it started")),
                Ok(Some((word, descriptor))) => {
                    released |= self.heed(process, &status, word, descriptor)?;
                }
                Err(e) => return Err(system(format!("Cannot hear from a process: {e}"))),
            }
        }
    }

    /// Acts on one word; whether the child was released.
    fn heed(
        &mut self,
        process: &Process,
        status: &OwnedFd,
        word: Word,
        descriptor: Option<OwnedFd>,
    ) -> Result<bool, Failure> {
        match (word.kind, descriptor) {
            (child::ROOT, Some(root)) => {
                // The child with the root is the container's process 1, and it lives: with an
                // init of ours it goes on to watch, without one it waits for us.
                let namespaces = Namespaces::of(process.pid);
                let failed = |e| system(format!("Cannot hold the container's namespaces: {e}"));
                self.namespaces = Some(namespaces.map_err(failed)?);
                self.root = Some(root);
                Ok(false)
            }
            (child::TERMINAL, Some(master)) => {
                let set = process.streams.set_terminal(master);
                set.map_err(|e| system(format!("Cannot use the terminal: {e}")))?;
                Ok(false)
            }
            (child::READY, None) => {
                super::syscall::write(status, b"g")
                    .map_err(|e| system(format!("Cannot release a process: {e}")))?;
                Ok(true)
            }
            (child::FAILED, _) => Err(self.explain(word)),
            _ => Err(system("A process said something strange before it started")),
        }
    }

    fn explain(&self, word: Word) -> Failure {
        let reason = io::Error::from_raw_os_error(word.errno);
        let command = self.spec.args.first().map_or("", String::as_str);
        let what = match Stage::of(word.stage) {
            Stage::Exec => return cannot_run(command, word.errno),
            Stage::Directory => {
                let message = format!("Cannot enter the working directory {:?}: {reason}", self.spec.cwd);
                return Failure::new(FailureKind::CommandNotExecutable, message);
            }
            Stage::Plan => match self.plan {
                Some(plan) => plan.describe(word.step as usize),
                None => "make the container".into(),
            },
            Stage::Namespaces => "enter the container".into(),
            Stage::Init => "start the container's init".into(),
            Stage::Terminal => "make a terminal".into(),
            Stage::Streams => "connect the standard streams".into(),
            Stage::Limits => "set resource limits".into(),
            Stage::Capabilities => "give up capabilities".into(),
            Stage::User => format!("become the user {:?}", self.spec.user),
        };
        system(format!("Cannot {what}: {reason}"))
    }
}

fn cannot_run(command: &str, errno: i32) -> Failure {
    let slash = command.contains('/');
    let (kind, why) = match errno {
        libc::ENOENT if slash => {
            (FailureKind::CommandNotFound, "no such file, or its interpreter is missing")
        }
        libc::ENOENT => (FailureKind::CommandNotFound, "not found in any directory of PATH"),
        libc::ENOTDIR => (FailureKind::CommandNotFound, "no such file"),
        libc::EACCES => (FailureKind::CommandNotExecutable, "permission denied"),
        libc::ENOEXEC => (
            FailureKind::CommandNotExecutable,
            "not a program of this machine's processor, nor a script that names its interpreter",
        ),
        libc::E2BIG => (FailureKind::CommandNotExecutable, "arguments and environment too long"),
        _ => {
            let reason = io::Error::from_raw_os_error(errno);
            let message = format!("Cannot run {command:?}: {reason}");
            return Failure::new(FailureKind::CommandNotExecutable, message);
        }
    };
    Failure::new(kind, format!("Cannot run {command:?}: {why}"))
}

/// One word with its descriptor; `None` at the end.
fn receive(from: &impl AsFd) -> io::Result<Option<(Word, Option<OwnedFd>)>> {
    let mut word = Word { kind: 0, stage: 0, step: 0, errno: 0 };
    let mut part = libc::iovec { iov_base: (&raw mut word).cast(), iov_len: size_of::<Word>() };
    let mut control = [0u64; 4];
    // SAFETY: msghdr is plain data for which all zeroes is valid; both buffers are described
    // with their sizes, and any bit pattern is a valid Word. A control message of the right
    // type holds one descriptor that is now ours.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        let fd = from.as_fd().as_raw_fd();
        let n = libc::recvmsg(fd, &raw mut message, libc::MSG_CMSG_CLOEXEC);
        if n < 0 {
            return Err(io::Error::last_os_error());
        }
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        let descriptor = if !header.is_null() && (*header).cmsg_type == libc::SCM_RIGHTS {
            Some(owned(std::ptr::read_unaligned(libc::CMSG_DATA(header).cast()))?)
        } else {
            None
        };
        if n == 0 {
            return Ok(None);
        }
        if n.cast_unsigned() < size_of::<Word>() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Some((word, descriptor)))
    }
}
