//! The devices of a specification.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// When a write counts as done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum CacheType {
    /// When the host's page cache has it; the guest is offered no flush.
    #[default]
    Unsafe,
    /// The guest is offered a flush, and it reaches the disk.
    Writeback,
}

/// How a disk file is read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum IoEngine {
    /// By plain system calls on the disk's own thread.
    #[default]
    Sync,
    /// Through io_uring.
    Async,
}

/// A token bucket: `size` tokens, refilled in `refill_time` milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Tokens it holds.
    pub size: u64,
    /// Tokens it starts with besides, once.
    #[serde(default)]
    pub one_time_burst: Option<u64>,
    /// Milliseconds from empty to full.
    pub refill_time: u64,
}

/// Limits of a device in bytes and operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    /// Bytes.
    #[serde(default)]
    pub bandwidth: Option<TokenBucket>,
    /// Operations.
    #[serde(default)]
    pub ops: Option<TokenBucket>,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Name, of letters, digits and underscores; its first 20 bytes are the serial number.
    pub drive_id: String,
    /// The raw disk file or block device.
    pub path_on_host: PathBuf,
    /// The guest's root file system is on it.
    #[serde(default)]
    pub is_root_device: bool,
    /// Refuse writes, in the monitor.
    #[serde(default)]
    pub is_read_only: bool,
    /// Unique id of the root partition, if the root is a partition.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partuuid: Option<String>,
    /// When a write counts as done.
    #[serde(default)]
    pub cache_type: CacheType,
    /// How the file is read and written.
    #[serde(default)]
    pub io_engine: IoEngine,
    /// Limits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
    /// Bypass the host's page cache. *Ours.*
    #[serde(default)]
    pub direct: bool,
    /// Offer discard, which punches holes into the file. *Ours.*
    #[serde(default)]
    pub discard: bool,
    /// Number of queues, 1 to 64. *Ours.*
    #[serde(default = "one")]
    pub num_queues: u16,
    /// Descriptors in each queue, a power of two up to 1024. *Ours.*
    #[serde(default = "queue_size")]
    pub queue_size: u16,
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Name, of letters, digits and underscores.
    pub iface_id: String,
    /// Tap device by name. One of this and `host_dev_fd` must be given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_dev_name: Option<String>,
    /// Tap device by inherited file descriptor. *Ours.*
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_dev_fd: Option<i32>,
    /// MAC address the guest sees; a random one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<String>,
    /// Largest packet, in bytes, announced to the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Limits towards the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Limits from the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
    /// Pairs of queues, 1 to 16. *Ours.*
    #[serde(default = "one")]
    pub num_queue_pairs: u16,
}

/// The vsock device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The guest's context id, 3 to 2^32 - 2.
    pub guest_cid: u32,
    /// Unix socket that stands for the device on the host.
    pub uds_path: PathBuf,
    /// Ignored; once a name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
}

/// The entropy device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entropy {
    /// Limits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// What the far end of a console is. *Ours.*
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConsoleMode {
    /// Standard output and, when it is not a file, standard input.
    #[default]
    Stdio,
    /// A file that output is added to.
    File,
    /// A pseudo-terminal; its path is logged.
    Pty,
    /// A unix socket that one reader at a time may connect to.
    Socket,
    /// Nothing; the device is not there.
    Off,
}

/// The serial port, `ttyS0` in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// The file (or, in mode `socket`, the socket) that stands for the far end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_out_path: Option<PathBuf>,
    /// Limit of output in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<TokenBucket>,
    /// What the far end is; `file` when a path is given and `stdio` else. *Ours.*
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<ConsoleMode>,
}

/// The virtio console, `hvc0` in the guest. *Ours.*
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Console {
    /// What the far end is.
    #[serde(default)]
    pub mode: ConsoleMode,
    /// The file or socket that stands for the far end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
}

fn one() -> u16 {
    1
}

fn queue_size() -> u16 {
    256
}
