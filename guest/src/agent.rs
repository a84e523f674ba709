//! The agent: process 1 of a machine.
//!
//! ```text
//!   boot      mounts, modules                    serve      connections, requests
//!   transport vsock (or a test's unix socket)      │
//!                                               container ── disks, etc, network, cgroup
//!   power     the end                              │         plan: the container's mounts
//!                                               launch ── program ── child ── init
//!   process   table, reaping                       │     processors: those that come later
//!   streams   stdin, stdout, stderr             archive   files in and out
//! ```
//!
//! Threads: the first takes connections, one reaps and takes signals, one per connection.
//! A panic would end one connection; the agent itself must never end, because a kernel whose
//! process 1 ends has nothing left to do but to panic.

mod archive;
mod boot;
mod cgroup;
mod child;
mod clock;
mod container;
mod disks;
mod etc;
mod events;
mod init;
mod launch;
mod nested;
mod network;
mod plan;
mod power;
mod process;
mod processors;
mod program;
mod serve;
mod streams;
mod syscall;
mod transport;
mod user;

use cgroup::Cgroup;
use container::Container;
use events::Events;
use guest::protocol::{AGENT_PORT, Event, READY_PORT};
use power::Power;
use process::Processes;
use serve::Server;
use std::{
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};
use transport::{Arrival, Listener};

/// Where the agent keeps its mounts in a machine.
const BASE: &str = "/run/nacelle";

/// Runs the agent; comes back only when it could not begin.
pub fn run() {
    let mut args = std::env::args_os().skip(1);
    let nested = match (args.next(), args.next()) {
        (Some(flag), Some(directory)) if flag == "--socket" => Some(PathBuf::from(directory)),
        _ => None,
    };
    if nested.is_none() && std::process::id() != 1 {
        eprintln!(
            "nacelle-agent is process 1 of a nacelle machine; to try it here: \
             nacelle-agent --socket DIRECTORY"
        );
        std::process::exit(2);
    }
    let Err(why) = match nested {
        Some(directory) => in_namespaces(&directory),
        None => in_a_machine(),
    };
    boot::say(&why);
}

fn in_a_machine() -> Result<std::convert::Infallible, String> {
    let begun = boot::prepare();
    let power = Arc::new(Power::new(true));
    let result = begun.and_then(|()| {
        let listener = Listener::vsock(AGENT_PORT)
            .map_err(|e| format!("cannot listen; has the kernel no virtio vsock? {e}"))?;
        let agent = Agent::new(Path::new(BASE), Path::new("/sys/fs/cgroup"), "container", power.clone());
        agent.serve(&listener, || transport::announce_by_vsock(READY_PORT).map(Arrival::Host))
    });
    if let Err(why) = &result {
        boot::say(&format!("{why}; turning the machine off"));
        power.off(false);
    }
    result
}

fn in_namespaces(directory: &Path) -> Result<std::convert::Infallible, String> {
    let directory = std::fs::canonicalize(directory).map_err(|e| format!("no directory: {e}"))?;
    let socket = directory.join("vsock.sock");
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).map_err(|e| format!("cannot listen on {socket:?}: {e}"))?;
    nested::enter(&directory)?;
    let base = directory.join("state");
    let name = nested::group_name();
    let agent = Agent::new(&base, &base.join("cgroup"), &name, Arc::new(Power::new(false)));
    agent.serve(&Listener::Unix(listener), move || {
        transport::announce_by_unix(&socket, READY_PORT).map(Arrival::Host)
    })
}

struct Agent {
    server: Arc<Server>,
    machine: bool,
}

impl Agent {
    fn new(base: &Path, cgroups: &Path, group: &str, power: Arc<Power>) -> Self {
        let machine = base == Path::new(BASE);
        let cgroup = Arc::new(Cgroup::new(cgroups, group));
        let events = Arc::new(Events::default());
        let counter = cgroup.clone();
        let processes = Arc::new(Processes::new(events.clone(), Box::new(move || counter.kills())));
        let container = Arc::new(Container::new(base, machine, processes, cgroup));
        let server = Arc::new(Server::new(container, events, power, boot::uptime_us()));
        Self { server, machine }
    }

    fn serve(
        &self,
        listener: &Listener,
        announce: impl Fn() -> std::io::Result<Arrival> + Send + 'static,
    ) -> Result<std::convert::Infallible, String> {
        // Before there are threads: they inherit the mask, so only the reaper takes signals.
        block_signals();
        raise_file_limit();
        let server = self.server.clone();
        spawn(move || match boot::announce(announce) {
            Ok(Some(arrival)) => server.admit(arrival),
            Ok(None) => {}
            Err(why) => {
                boot::say(&format!("{why}; turning the machine off"));
                server.power.off(false);
            }
        })?;
        let server = self.server.clone();
        spawn(move || take_signals(&server))?;
        // The rest can happen while the host thinks of its first request.
        let container = self.server.container.clone();
        if let Err(e) = container.cgroup.make() {
            boot::say(&format!("no control groups, so no limits and no figures: {e}"));
        }
        if let Err(failure) = network::loopback() {
            boot::say(&failure.message);
        }
        self.watch_memory()?;
        if self.machine {
            // SAFETY: reboot with this command has no memory arguments; Ctrl-Alt-Del becomes
            // a signal to us.
            unsafe { libc::reboot(libc::RB_DISABLE_CAD) };
            power::watch_button(self.server.power.clone(), container);
            processors::watch();
        }
        self.server.listen(listener)
    }

    /// Sends an event for each kill for want of memory. The kernel marks the file of its
    /// counter as changed (`POLLPRI`).
    fn watch_memory(&self) -> Result<(), String> {
        let (cgroup, events) = (self.server.container.cgroup.clone(), self.server.events.clone());
        let Ok(file) = syscall::open(&cgroup.kills_file(), libc::O_RDONLY) else { return Ok(()) };
        spawn(move || {
            let mut told = 0;
            loop {
                let count = cgroup.kills();
                if count > told {
                    told = count;
                    events.send(&Event::OutOfMemory { count });
                }
                let mut entries = [syscall::want(&file, libc::POLLPRI)];
                if syscall::wait(&mut entries, None).is_err() {
                    return;
                }
                // Reading is what makes the next wait wait.
                let mut text = [0; 512];
                // SAFETY: lseek has no memory arguments.
                unsafe { libc::lseek(std::os::fd::AsRawFd::as_raw_fd(&file), 0, libc::SEEK_SET) };
                if syscall::read(&file, &mut text).is_err() {
                    return;
                }
            }
        })
    }
}

fn spawn(work: impl FnOnce() + Send + 'static) -> Result<(), String> {
    let thread = thread::Builder::new().stack_size(256 << 10).spawn(work);
    thread.map(drop).map_err(|e| format!("cannot make a thread: {e}"))
}

/// The signals the agent takes.
fn signals() -> libc::sigset_t {
    // SAFETY: sigset_t is plain data that the calls fill.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in [libc::SIGCHLD, libc::SIGINT, libc::SIGTERM, libc::SIGPWR] {
            libc::sigaddset(&raw mut set, signal);
        }
        set
    }
}

fn block_signals() {
    let set = signals();
    // SAFETY: a readable set.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
}

/// Reaps children, and ends the machine when the kernel or an operator asks for it.
fn take_signals(server: &Server) {
    let set = signals();
    loop {
        // Before waiting: a signal that came before this thread began is pending, not lost.
        server.container.processes.reap();
        // SAFETY: a readable set; no information is wanted back.
        match unsafe { libc::sigwaitinfo(&raw const set, std::ptr::null_mut()) } {
            signal @ (libc::SIGINT | libc::SIGTERM | libc::SIGPWR) => {
                let (power, container) = (server.power.clone(), server.container.clone());
                // Reaping must go on meanwhile: the end waits for it.
                let _ = spawn(move || power.by_button(&container, signal == libc::SIGINT));
            }
            signal if signal > 0 => {}
            _ => thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// Streams and connections are descriptors; the kernel's default would be 1024.
fn raise_file_limit() {
    let limit = libc::rlimit { rlim_cur: 16_384, rlim_max: 1 << 20 };
    // SAFETY: one readable rlimit. Where it is refused, the old limit serves.
    unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
}
