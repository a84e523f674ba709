//! What the agent tells: who it is, how processes ended, what they use.
//!
//! Read on the host with unknown fields ignored. Figures are absent, not zero, where the
//! guest's kernel does not count them.

use super::{Failure, ProcessId};
use serde::{Deserialize, Serialize};

/// Who answers on a control connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Protocol version of the agent.
    pub version: u32,
    /// Version of the agent's package.
    pub agent: String,
    /// Release of the guest's kernel, as `uname -r` prints it.
    pub kernel: String,
    /// Microseconds from the kernel's start until the agent could serve.
    pub ready_us: u64,
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// By which code or signal.
    pub status: ExitStatus,
    /// The kernel killed something of the container for want of memory.
    pub out_of_memory: bool,
    /// Milliseconds it lived.
    pub lived_ms: u64,
    /// When, in nanoseconds since 1970 by the guest's clock.
    pub unix_ns: u64,
}

/// By which code or signal a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// It returned this code.
    Code(u8),
    /// This signal killed it.
    Signal(u8),
}

impl ExitStatus {
    /// The code a shell would show: the code itself, or 128 and the signal.
    pub fn shell_code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => signal.saturating_add(128),
        }
    }
}

/// One process the agent started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessSummary {
    /// Its number here.
    pub process: ProcessId,
    /// Its number in the machine's kernel.
    pub pid: u32,
    /// What was started.
    pub args: Vec<String>,
    /// As whom, as asked for.
    pub user: String,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// Whether it runs.
    pub state: ProcessState,
}

/// Whether a process runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProcessState {
    /// It runs.
    Running,
    /// It has ended.
    Exited(Exit),
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Event {
    /// A process ended. Its output may not be read yet; [`super::Request::Wait`] waits for it.
    Exited {
        /// Which.
        process: ProcessId,
        /// How.
        exit: Exit,
    },
    /// The kernel killed something of the container for want of memory.
    OutOfMemory {
        /// How many times so far.
        count: u64,
    },
    /// Events were lost because this connection was read too slowly.
    Lost {
        /// How many.
        count: u64,
    },
    /// The agent cannot go on with the machine.
    Broken(Failure),
}

/// Resource use of the container and its machine.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Stats {
    /// Processor time of the container.
    pub cpu: CpuStats,
    /// Memory of the container.
    pub memory: MemoryStats,
    /// Block transfers of the container, by device.
    pub io: Vec<IoStats>,
    /// Tasks of the container.
    pub pids: PidStats,
    /// The machine's interfaces, without loopback.
    pub network: Vec<NetworkStats>,
    /// The whole machine.
    pub guest: GuestStats,
}

/// Processor time (cgroup v2 `cpu.stat`), in microseconds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CpuStats {
    /// All.
    pub usage_us: u64,
    /// In user mode.
    pub user_us: u64,
    /// In the kernel.
    pub system_us: u64,
    /// Held back by the limit.
    pub throttled_us: u64,
    /// Processors the machine has.
    pub online: u32,
}

/// Memory (cgroup v2 `memory.*`), in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MemoryStats {
    /// In use, page cache included; absent without the memory controller.
    pub current: Option<u64>,
    /// Most that was in use.
    pub peak: Option<u64>,
    /// The limit, if any.
    pub limit: Option<u64>,
    /// Not backed by files.
    pub anonymous: u64,
    /// Page cache.
    pub file: u64,
    /// Page cache that could be given back at once; `docker stats` subtracts it.
    pub inactive_file: u64,
    /// Held by the kernel for the container.
    pub kernel: u64,
    /// Times something was killed for want of memory.
    pub out_of_memory: u64,
}

/// Transfers of one block device (cgroup v2 `io.stat`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct IoStats {
    /// Name, as `vdb`.
    pub device: String,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Requests to read.
    pub reads: u64,
    /// Requests to write.
    pub writes: u64,
}

/// Tasks (cgroup v2 `pids.*`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PidStats {
    /// Now; absent without the pids controller.
    pub current: Option<u64>,
    /// The limit, if any.
    pub limit: Option<u64>,
}

/// Counters of one interface.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetworkStats {
    /// Name.
    pub name: String,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets received.
    pub rx_packets: u64,
    /// Receive errors.
    pub rx_errors: u64,
    /// Packets dropped on receipt.
    pub rx_dropped: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Send errors.
    pub tx_errors: u64,
    /// Packets dropped on sending.
    pub tx_dropped: u64,
}

/// The whole machine (`/proc/meminfo`, `/proc/uptime`, `/proc/loadavg`).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GuestStats {
    /// Bytes of memory the kernel manages.
    pub memory_total: u64,
    /// Bytes free.
    pub memory_free: u64,
    /// Bytes a new program could get.
    pub memory_available: u64,
    /// Milliseconds since start.
    pub uptime_ms: u64,
    /// Load over the last minute.
    pub load: f64,
}

/// What is at a path of the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathStat {
    /// Last component of the path.
    pub name: String,
    /// What sort of thing.
    pub kind: PathKind,
    /// Bytes.
    pub size: u64,
    /// Permission bits with set-id and sticky bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change of the content, seconds since 1970.
    pub mtime: i64,
    /// Where a symbolic link points, empty for others.
    pub link: String,
}

/// What sort of thing is at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PathKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Link,
    /// A device, socket or pipe.
    #[serde(other)]
    Other,
}
