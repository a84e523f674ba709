//! What the host asks for: the container's surroundings and its processes.
//!
//! Everything has a default that means "as Docker would", so that a message holds only what
//! somebody chose.

use serde::{Deserialize, Serialize};

/// The container's surroundings, made once before its main process starts.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Setup {
    /// Name of the machine: at most 64 bytes, no `/`. Empty: `localhost`.
    pub hostname: String,
    /// Where the files of the image come from.
    pub root: Root,
    /// Where what the container writes goes.
    pub writable: Writable,
    /// The container sees its root read-only; its tmpfs mounts and disks stay writable.
    pub read_only: bool,
    /// Memory file systems to mount in the container, in order.
    pub tmpfs: Vec<Tmpfs>,
    /// Further disks to mount in the container, in order.
    pub disks: Vec<Disk>,
    /// Network interfaces to configure. The loopback interface is always up.
    pub network: Vec<Interface>,
    /// Name resolution. Without it the image's own `/etc/resolv.conf` stays.
    pub dns: Option<Dns>,
    /// Lines for `/etc/hosts` besides the loopback ones and the machine's own.
    pub hosts: Vec<Host>,
    /// Kernel settings, `name=value` with the name's dots or slashes (`net.core.somaxconn`).
    pub sysctls: Vec<(String, String)>,
    /// Limits on the whole container within the machine.
    pub limits: Limits,
    /// Signal that asks the main process to end, for the power button. 0: SIGTERM.
    pub stop_signal: i32,
    /// Bytes of `/dev/shm`. 0: 64 MiB.
    pub shm_size: u64,
    /// Nanoseconds since 1970, UTC. Without it the clock the machine started with stays.
    pub unix_ns: Option<u64>,
    /// Random bytes for the kernel's generator, at most 512, counted as fully random.
    pub entropy: Vec<u8>,
}

/// Where the container's read-only files come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Root {
    /// A disk, found by its serial (the virtio-blk id); the file system is recognised.
    Disk {
        /// The id given to the disk on the host, at most 20 bytes.
        serial: String,
    },
    /// A directory that the agent sees: one of its initrd, or of the host in tests.
    Directory {
        /// Absolute path.
        path: String,
    },
}

impl Default for Root {
    fn default() -> Self {
        Self::Disk { serial: "root".into() }
    }
}

/// Where writes to the container's root go. Both are laid over the root with overlayfs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Writable {
    /// A disk with a writable file system on it.
    Disk {
        /// The id given to the disk on the host, at most 20 bytes.
        serial: String,
    },
    /// The machine's memory.
    Memory {
        /// Most bytes it may take; 0: half of the machine's memory.
        size: u64,
    },
}

impl Default for Writable {
    fn default() -> Self {
        Self::Memory { size: 0 }
    }
}

/// A memory file system in the container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tmpfs {
    /// Absolute path in the container; made if missing.
    pub path: String,
    /// Most bytes; 0: half of the machine's memory.
    pub size: u64,
    /// Permission bits of its root; 0: 0o1777.
    pub mode: u32,
    /// Refuse to run programs from it.
    pub noexec: bool,
    /// Mount it read-only.
    pub read_only: bool,
}

/// A further disk in the container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Disk {
    /// The id given to the disk on the host, at most 20 bytes.
    pub serial: String,
    /// Absolute path in the container; made if missing. Empty: not mounted, the device alone
    /// is there, under `/dev`.
    pub path: String,
    /// File system type; empty: recognised.
    pub filesystem: String,
    /// Mount it read-only.
    pub read_only: bool,
}

/// A network interface to configure.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Interface {
    /// Hardware address `aa:bb:cc:dd:ee:ff` it is found by; empty: found by `name`.
    pub mac: String,
    /// Name, as `eth0`; with `mac` given and another name found, it is renamed.
    pub name: String,
    /// Addresses with their prefix length: `172.16.0.2/24`, `fd00::2/64`.
    pub addresses: Vec<String>,
    /// Default routes: at most one address of each family.
    pub gateways: Vec<String>,
    /// Largest packet in bytes; 0: as the device says.
    pub mtu: u32,
}

/// Name resolution: what `/etc/resolv.conf` says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Dns {
    /// Addresses of servers.
    pub servers: Vec<String>,
    /// Domains tried for short names.
    pub search: Vec<String>,
    /// Options such as `ndots:2`.
    pub options: Vec<String>,
}

/// A line of `/etc/hosts`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Host {
    /// The name.
    pub name: String,
    /// Its address.
    pub address: String,
}

/// Limits on the container's control group; 0 means none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Bytes of memory.
    pub memory: u64,
    /// Number of tasks.
    pub pids: u64,
    /// Thousandths of a processor.
    pub cpu_millis: u64,
}

/// A process to start in the container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProcessSpec {
    /// Program and arguments; the program is looked up in the `PATH` of `env` if it has no
    /// slash. At least one.
    pub args: Vec<String>,
    /// Environment as `NAME=value`. Missing `PATH`, `HOME`, `HOSTNAME` and, with a terminal,
    /// `TERM` are added as Docker adds them.
    pub env: Vec<String>,
    /// Working directory in the container; empty: `/`. The main process's is made if missing.
    pub cwd: String,
    /// `name|uid[:group|gid]` by the container's own files; empty: root.
    pub user: String,
    /// Names or numbers of further groups.
    pub groups: Vec<String>,
    /// Give it a terminal of this size; its output is then one stream.
    pub terminal: Option<Size>,
    /// It has standard input; otherwise it reads `/dev/null`. A terminal implies one.
    pub stdin: bool,
    /// Resource limits to set; `nofile` is 1024 soft and 524288 hard unless given.
    pub rlimits: Vec<Rlimit>,
    /// Capabilities to keep, as `CAP_NET_ADMIN`. Without it all: the machine is the wall.
    pub capabilities: Option<Vec<String>>,
    /// Set-uid programs give nothing.
    pub no_new_privileges: bool,
    /// Main process only: a small init of ours is process 1 and reaps orphans.
    pub init: bool,
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Size {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

impl Default for Size {
    fn default() -> Self {
        Self { rows: 24, cols: 80 }
    }
}

/// One resource limit (`setrlimit`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rlimit {
    /// Name as in `docker run --ulimit`: `nofile`, `core`, `stack`, ...
    pub name: String,
    /// Soft limit; `u64::MAX` is unlimited.
    pub soft: u64,
    /// Hard limit; `u64::MAX` is unlimited.
    pub hard: u64,
}
