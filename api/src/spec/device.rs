//! The devices of a specification.

use std::{net::Ipv4Addr, path::PathBuf};

use serde::{Deserialize, Serialize};

use super::{is_default, or_default};

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
    /// The raw disk file or block device. One of this and `by_descriptor` must be given.
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "is_default")]
    pub path_on_host: PathBuf,
    /// The disk is the open file whose descriptor comes with the request. *Ours.*
    #[serde(default, skip_serializing_if = "is_default")]
    pub by_descriptor: bool,
    /// Socket of a vhost-user-block process. Refused: there is no such device here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// The guest's root file system is on it.
    #[serde(default)]
    pub is_root_device: bool,
    /// Refuse writes, in the monitor.
    #[serde(default, deserialize_with = "or_default")]
    pub is_read_only: bool,
    /// Unique id of the root partition, if the root is a partition.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partuuid: Option<String>,
    /// When a write counts as done.
    #[serde(default)]
    pub cache_type: CacheType,
    /// How the file is read and written.
    #[serde(default, deserialize_with = "or_default")]
    pub io_engine: IoEngine,
    /// Limits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
    /// Bypass the host's page cache. *Ours.*
    #[serde(default, skip_serializing_if = "is_default")]
    pub direct: bool,
    /// Offer discard, which punches holes into the file. *Ours.*
    #[serde(default, skip_serializing_if = "is_default")]
    pub discard: bool,
    /// Number of queues, 1 to 64. *Ours.*
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub num_queues: u16,
    /// Descriptors in each queue, a power of two up to 1024. *Ours.*
    #[serde(default = "queue_size", skip_serializing_if = "is_queue_size")]
    pub queue_size: u16,
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Name, of letters, digits and underscores.
    pub iface_id: String,
    /// Tap device by name. One of this, `by_descriptor` and `host_dev_fd` must be given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_dev_name: Option<String>,
    /// Tap device by inherited file descriptor. *Ours.*
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_dev_fd: Option<i32>,
    /// The tap's open descriptors, one for each pair of queues, come with the request. *Ours.*
    #[serde(default, skip_serializing_if = "is_default")]
    pub by_descriptor: bool,
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
    #[serde(default = "one", skip_serializing_if = "is_one")]
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

/// The memory balloon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// Memory to take from the guest, in MiB.
    pub amount_mib: u32,
    /// Give pages back when the guest runs out of memory.
    pub deflate_on_oom: bool,
    /// Seconds between two askings for statistics; 0 for none.
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    /// Offer runs of free page hinting.
    #[serde(default)]
    pub free_page_hinting: bool,
    /// Let the guest report free pages by itself.
    #[serde(default)]
    pub free_page_reporting: bool,
}

/// A file mapped into the guest as persistent memory.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pmem {
    /// Name, of letters, digits and underscores.
    pub id: String,
    /// The file.
    pub path_on_host: PathBuf,
    /// The guest's root file system is on it.
    #[serde(default)]
    pub root_device: bool,
    /// Refuse writes, in the monitor.
    #[serde(default)]
    pub read_only: bool,
    /// Limits of flushes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// Memory that can be added and taken away while the machine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryHotplug {
    /// Most memory that can be added, in MiB; a multiple of `slot_size_mib`.
    pub total_size_mib: u32,
    /// What the guest takes and gives at a time, in MiB; a power of two, at least 2.
    #[serde(default = "block_size_mib")]
    pub block_size_mib: u32,
    /// What the host takes and gives at a time, in MiB; at least 128, a multiple of
    /// `block_size_mib`.
    #[serde(default = "slot_size_mib")]
    pub slot_size_mib: u32,
}

/// How the metadata service is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum MmdsVersion {
    /// By plain requests. Deprecated.
    #[default]
    V1,
    /// With a session token.
    V2,
}

/// The metadata service that a guest reaches through its network interfaces.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MmdsConfig {
    /// How it is asked.
    #[serde(default)]
    pub version: MmdsVersion,
    /// The interfaces it is reached through.
    pub network_interfaces: Vec<String>,
    /// Its address, link-local; 169.254.169.254 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv4_address: Option<Ipv4Addr>,
    /// Answer as EC2's service does, whatever the request accepts.
    #[serde(default)]
    pub imds_compat: bool,
}

fn block_size_mib() -> u32 {
    2
}

fn slot_size_mib() -> u32 {
    128
}

fn one() -> u16 {
    1
}

fn is_one(value: &u16) -> bool {
    *value == one()
}

fn is_queue_size(value: &u16) -> bool {
    *value == queue_size()
}

fn queue_size() -> u16 {
    256
}
