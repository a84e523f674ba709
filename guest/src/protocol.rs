//! The language between the host and the agent: messages as plain data, nothing else.
//!
//! Every connection to the agent's vsock port begins with one [`Open`] message that says what
//! the connection is for; the agent answers with one [`Reply`]. What follows depends on it:
//!
//! ```text
//!   Open::Control   request, reply, request, reply, ... in order, one at a time
//!   Open::Stream    raw bytes of one standard stream; closing is end of file
//!   Open::Read      blocks of a tar archive out of the container, then a last reply
//!   Open::Write     blocks of a tar archive into the container, then a last reply
//!   Open::Events    a message for each event until either side closes
//! ```
//!
//! Messages are JSON after a four-byte length ([`frame`]): there are a few dozen in a
//! machine's life, so being readable in a trace is worth more than being compact. Bulk data
//! never passes through JSON. A waiting request blocks only its own connection, which is why
//! there are no request numbers: whoever wants to signal while waiting opens a second one.
//!
//! The host refuses to talk to an agent of another [`VERSION`]; within a version a field may
//! be added if leaving it out means what it meant before. Messages *to* the agent are read
//! strictly, since a restriction that is silently ignored is worse than an error.

mod failure;
pub mod frame;
mod identity;
mod report;
mod spec;

pub use failure::{Failure, FailureKind};
pub use identity::{Identity, InterfaceIdentity, Outcome, Part};
pub use report::{
    CpuStats, Event, Exit, ExitStatus, GuestStats, Hello, IoStats, MemoryStats, NetworkStats, PathKind,
    PathStat, PidStats, ProcessState, ProcessSummary, Stats,
};
pub use spec::{Disk, Dns, Host, Interface, Limits, ProcessSpec, Rlimit, Root, Setup, Size, Tmpfs, Writable};

use serde::{Deserialize, Serialize};

/// Version of this protocol; the two sides must agree exactly.
pub const VERSION: u32 = 1;

/// The vsock port the agent listens on inside the machine.
pub const AGENT_PORT: u32 = 1024;

/// The host's vsock port the agent connects to once, as soon as it can serve.
///
/// The monitor forwards that connection to the unix socket `<uds_path>_1024`, if one listens.
pub const READY_PORT: u32 = 1024;

/// The number of the container's main process.
pub const MAIN: ProcessId = ProcessId(0);

/// Number of a process the agent started; unique within a machine's life.
///
/// It is not the kernel's process number, which can be used again while a caller holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ProcessId(pub u32);

impl std::fmt::Display for ProcessId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// The first message on a connection: what it is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Open {
    /// Requests and replies. Answered by [`Reply::Hello`].
    Control {
        /// The [`VERSION`] the host speaks.
        version: u32,
    },
    /// One standard stream of a process. Answered by [`Reply::Done`], then raw bytes.
    Stream {
        /// Whose stream.
        process: ProcessId,
        /// Which of the three.
        stream: Stream,
        /// What the end of this connection means while the process lives. `false`: it is the
        /// end of standard input, and later output is thrown away. `true`: someone will attach
        /// again; input stays open, and the process waits once its pipe is full.
        keep: bool,
    },
    /// A path out of the container as a tar archive. Answered by [`Reply::Path`], then blocks
    /// ([`frame::write_block`]) to the empty one, then [`Reply::Done`] or [`Reply::Failed`].
    Read {
        /// Absolute path in the container. A trailing `/.` means the content of a directory
        /// without its own name.
        path: String,
        /// Whether a symbolic link at the end of the path is followed.
        follow: bool,
    },
    /// A tar archive into a directory of the container. Answered by [`Reply::Path`] of the
    /// directory; then the host sends blocks to the empty one and reads one more reply.
    Write {
        /// Absolute path of an existing directory in the container.
        path: String,
        /// Keep the archive's owners instead of making everything root's.
        keep_owner: bool,
        /// Let a file replace a directory or a directory a file.
        replace_kind: bool,
    },
    /// Events as they happen. Answered by [`Reply::Done`], then [`Event`] messages.
    Events {},
}

/// One of a process's standard streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stream {
    /// Standard input, host to process.
    Stdin,
    /// Standard output, process to host; with a terminal, everything it prints.
    Stdout,
    /// Standard error, process to host; absent with a terminal.
    Stderr,
}

/// What the host may ask on a control connection.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Make the container's root, name, network and clock. Once a machine.
    Setup(Box<Setup>),
    /// Start the container's main process, number [`MAIN`]. Once a machine. [`Reply::Started`].
    Start(Box<ProcessSpec>),
    /// Start a further process beside the main one. [`Reply::Started`].
    Exec(Box<ProcessSpec>),
    /// Send a signal to one process (not its children).
    Signal {
        /// To whom.
        process: ProcessId,
        /// Linux signal number, 1 to 64.
        signal: i32,
    },
    /// Tell a process with a terminal its new size.
    Resize {
        /// Whose terminal.
        process: ProcessId,
        /// The new size.
        size: Size,
    },
    /// End a process's standard input, after the bytes of an attached stream.
    CloseStdin {
        /// Whose input.
        process: ProcessId,
    },
    /// Wait until a process has ended and its output is read, or the time is over.
    /// [`Reply::Exited`], or [`Reply::Running`] when it has not. The ends of the last 128
    /// processes are known, and always the main one's. Output that nobody opens is given up
    /// ten seconds after the end.
    Wait {
        /// Whose end.
        process: ProcessId,
        /// Milliseconds to wait; without it as long as it takes.
        timeout_ms: Option<u64>,
    },
    /// The processes the agent started. [`Reply::Processes`].
    List {},
    /// Resource use of the container and the machine. [`Reply::Stats`].
    Stats {},
    /// What is at a path of the container. [`Reply::Path`].
    Stat {
        /// Absolute path in the container.
        path: String,
        /// Whether a symbolic link at the end of the path is followed.
        follow: bool,
    },
    /// Write every dirty page to the disks.
    Sync {},
    /// Set the clock, after a pause.
    SetTime {
        /// Nanoseconds since 1970, UTC.
        unix_ns: u64,
        /// Fresh random bytes for the kernel's generator, at most 512. A restored machine
        /// must not draw the numbers its twin drew.
        entropy: Vec<u8>,
    },
    /// Become another machine, after a restore: clock, random numbers, name, machine id and
    /// addresses, whichever are given. Refused as a whole when something in it could not be
    /// meant; else each part is done or not on its own. [`Reply::Identified`].
    Identify(Box<Identity>),
    /// Configure interfaces again, after a hot plug.
    Network {
        /// The interfaces to configure; others are left alone.
        interfaces: Vec<Interface>,
    },
    /// End everything, write the disks and turn the machine off.
    Shutdown {
        /// Restart instead of turning off.
        reboot: bool,
    },
}

/// What the agent answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// It is done.
    Done {},
    /// It could not be done.
    Failed(Failure),
    /// Who answers.
    Hello(Hello),
    /// A process runs.
    Started {
        /// Its number.
        process: ProcessId,
        /// Its number in the machine's kernel, for display.
        pid: u32,
    },
    /// A process has ended.
    Exited(Exit),
    /// The process still runs (the wait's time is over).
    Running {},
    /// The processes.
    Processes(Vec<ProcessSummary>),
    /// The figures.
    Stats(Box<Stats>),
    /// What is there.
    Path(PathStat),
    /// What became of each part that was asked for, in the order of the fields.
    Identified(Vec<Outcome>),
}
