//! The specification of a machine, in the format of Firecracker's configuration file.
//!
//! ```json
//! { "boot-source": { "kernel_image_path": "vmlinux", "boot_args": "console=ttyS0" },
//!   "machine-config": { "vcpu_count": 2, "mem_size_mib": 256 },
//!   "drives": [ { "drive_id": "root", "path_on_host": "root.ext4", "is_root_device": true } ] }
//! ```
//!
//! Fields that Firecracker does not have are marked *ours*. An unknown field is an error.
//! [`Spec::check`] holds the rules that join parts; whether a file exists is found out by the
//! builder, which opens it anyway.

mod change;
mod check;
mod cpu;
mod device;
mod snapshot;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

pub use change::{
    BalloonPatch, BalloonStatisticsPatch, DrivePatch, HintingStart, LoggerPatch, MachineConfigPatch,
    MemoryHotplugPatch, NetworkInterfacePatch, PmemPatch,
};
pub use cpu::{
    Bitmap, CpuConfig, CpuSource, CpuidModifier, CpuidRegister, KvmCapability, MsrModifier, NamedTemplate,
    RegisterModifier,
};
pub use device::{
    Balloon, CacheType, Console, ConsoleMode, Drive, Entropy, IoEngine, MemoryHotplug, MmdsConfig,
    MmdsVersion, NetworkInterface, Pmem, RateLimiter, Serial, TokenBucket, Vsock,
};
pub use snapshot::{
    Compression, CreateSnapshot, DriveCapture, DriveOverride, JobState, LoadHugePages, LoadSnapshot,
    MemBackend, MemBackendType, NetworkOverride, PmemOverride, Prefetch, SnapshotJob, SnapshotType,
    VsockOverride,
};

use crate::{Fault, FaultKind, explain_json};

/// Most vCPUs a machine may have.
pub const VCPUS_MAX: u8 = 64;
/// Least memory a machine may have, in MiB.
pub const MEMORY_MIN_MIB: u64 = 16;
/// Largest configuration file read, in bytes.
pub const CONFIG_FILE_MAX: usize = 1 << 20;

/// The kernel command line used when none is given: Firecracker's default.
pub const DEFAULT_BOOT_ARGS: &str =
    "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce";

/// A whole machine.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// What to boot. Without a kernel the machine cannot start; it may be set later.
    #[serde(rename = "boot-source", default)]
    pub boot_source: BootSource,
    /// vCPUs and memory.
    #[serde(rename = "machine-config", default, deserialize_with = "or_default")]
    pub machine_config: MachineConfig,
    /// What the processors show; comes before a template of `machine-config` that has a name.
    #[serde(rename = "cpu-config", default, skip_serializing_if = "Option::is_none")]
    pub cpu_config: Option<CpuSource>,
    /// Disks, in the order the guest finds them, except that the root device comes first.
    #[serde(default)]
    pub drives: Vec<Drive>,
    /// Network interfaces, in the order the guest finds them.
    #[serde(rename = "network-interfaces", default)]
    pub network_interfaces: Vec<NetworkInterface>,
    /// The vsock device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<Vsock>,
    /// The entropy device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entropy: Option<Entropy>,
    /// The serial port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<Serial>,
    /// The virtio console. *Ours.*
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<Console>,
    /// The log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logger: Option<Logger>,
    /// Where metrics go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Metrics>,
    /// The memory balloon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<Balloon>,
    /// Files mapped into the guest as persistent memory.
    #[serde(default)]
    pub pmem: Vec<Pmem>,
    /// Memory that can be added and taken away while the machine runs.
    #[serde(rename = "memory-hotplug", default, skip_serializing_if = "Option::is_none")]
    pub memory_hotplug: Option<MemoryHotplug>,
    /// The metadata service.
    #[serde(rename = "mmds-config", default, skip_serializing_if = "Option::is_none")]
    pub mmds_config: Option<MmdsConfig>,
}

/// What to boot.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// The kernel: an ELF `vmlinux` or a `bzImage`.
    pub kernel_image_path: PathBuf,
    /// An initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<PathBuf>,
    /// The kernel command line; [`DEFAULT_BOOT_ARGS`] when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
}

/// Backing of guest memory by page size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum HugePages {
    /// 4 KiB pages.
    #[default]
    None,
    /// The kernel may use 2 MiB pages where it finds some.
    Transparent,
    /// 2 MiB pages from the reserved pool; the start fails when it is too small.
    #[serde(rename = "2M")]
    Huge2M,
}

/// How virtio devices are attached. *Ours* (Firecracker's `--enable-pci` chooses the second).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Transport {
    /// Memory-mapped registers with one interrupt line each.
    #[default]
    Mmio,
    /// PCI functions with message interrupts.
    Pci,
}

/// vCPUs and memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Number of vCPUs, 1 to [`VCPUS_MAX`].
    pub vcpu_count: u8,
    /// vCPUs that there is room for, from `vcpu_count` to [`VCPUS_MAX`]; more than `vcpu_count`
    /// can be added up to it while the machine runs. `vcpu_count` when absent. *Ours.*
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_vcpu_count: Option<u8>,
    /// Memory in MiB, at least [`MEMORY_MIN_MIB`].
    pub mem_size_mib: u64,
    /// Show two threads per core; needs an even number of vCPUs (or one).
    #[serde(default)]
    pub smt: bool,
    /// What the processors show, by name. Deprecated in favour of `cpu-config`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<NamedTemplate>,
    /// Record the pages that are written, for differential snapshots.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Page size of guest memory.
    #[serde(default)]
    pub huge_pages: HugePages,
    /// Touch all memory before the guest runs. *Ours.*
    #[serde(default, skip_serializing_if = "is_default")]
    pub prefault: bool,
    /// How virtio devices are attached. *Ours.*
    #[serde(default, skip_serializing_if = "is_default")]
    pub transport: Transport,
    /// Give the guest a port through which its kernel says that it crashed. *Ours.*
    #[serde(default, skip_serializing_if = "is_default")]
    pub pvpanic: bool,
    /// Where gdb can connect to, a unix socket that the start makes; see docs/debugging.md.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gdb_socket_path: Option<PathBuf>,
    /// With a socket for gdb, do not run before gdb has come and said so. *Ours.*
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    pub gdb_wait: bool,
}

impl MachineConfig {
    /// vCPUs that there is room for.
    pub fn vcpus_max(&self) -> u8 {
        self.max_vcpu_count.unwrap_or(self.vcpu_count)
    }
}

impl Default for MachineConfig {
    fn default() -> MachineConfig {
        MachineConfig {
            vcpu_count: 1,
            max_vcpu_count: None,
            mem_size_mib: 128,
            smt: false,
            cpu_template: None,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
            prefault: false,
            transport: Transport::Mmio,
            pvpanic: false,
            gdb_socket_path: None,
            gdb_wait: true,
        }
    }
}

/// How much the log says. It is read in capitals or not, as Firecracker does, and `Warn` is
/// another name of `Warning`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// What failed.
    Error,
    /// And what looks wrong.
    Warning,
    /// And what happened.
    #[default]
    Info,
    /// And how.
    Debug,
    /// And everything else.
    Trace,
}

/// The text is the name of no [`LogLevel`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown variant `{0}`, expected one of `Off`, `Error`, `Warning`, `Warn`, `Info`, `Debug`, `Trace`")]
pub struct NotLevel(String);

impl TryFrom<String> for LogLevel {
    type Error = NotLevel;

    fn try_from(text: String) -> Result<LogLevel, NotLevel> {
        match text.to_ascii_lowercase().as_str() {
            "off" => Ok(LogLevel::Off),
            "error" => Ok(LogLevel::Error),
            "warning" | "warn" => Ok(LogLevel::Warning),
            "info" => Ok(LogLevel::Info),
            "debug" => Ok(LogLevel::Debug),
            "trace" => Ok(LogLevel::Trace),
            _ => Err(NotLevel(text)),
        }
    }
}

/// Where the log goes and what it holds.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Logger {
    /// File or named pipe; standard error when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_path: Option<PathBuf>,
    /// Least severe level that is written.
    #[serde(default, deserialize_with = "or_default")]
    pub level: LogLevel,
    /// Put the level in each line.
    #[serde(default, deserialize_with = "or_default")]
    pub show_level: bool,
    /// Put the source file and line in each line.
    #[serde(default, deserialize_with = "or_default")]
    pub show_log_origin: bool,
    /// Only lines of this module path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
}

/// Where metrics go: one JSON object a line, every minute and when asked.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// File or named pipe.
    pub metrics_path: PathBuf,
    /// Put the machine's id into each line.
    #[serde(default)]
    pub emit_id: bool,
    /// Put these into each line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub properties: Option<BTreeMap<String, String>>,
}

/// Whether a field has its default value; fields that are *ours* are then left out of answers,
/// so that strict readers of Firecracker's format see only what they know.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Reads `null` as the default, for fields that are optional in Firecracker's own types.
fn or_default<'de, T, D>(from: D) -> Result<T, D::Error>
where
    T: Default + Deserialize<'de>,
    D: serde::Deserializer<'de>,
{
    Option::deserialize(from).map(Option::unwrap_or_default)
}

fn yes() -> bool {
    true
}

fn is_true(value: &bool) -> bool {
    *value
}

impl Spec {
    /// Reads a specification from the text of a configuration file called `name` and checks it.
    pub fn from_json(name: &Path, text: &str) -> Result<Spec, Fault> {
        let name = name.display();
        if text.len() > CONFIG_FILE_MAX {
            let message = format!("Configuration file {name} is larger than {CONFIG_FILE_MAX} bytes");
            return Err(Fault::new(FaultKind::Invalid, message));
        }
        let spec: Spec = serde_json::from_str(text).map_err(|e| Fault {
            kind: FaultKind::Invalid,
            message: format!("Configuration file {name} is not a machine specification"),
            causes: vec![explain_json(&e)],
        })?;
        spec.check()?;
        Ok(spec)
    }
}

#[cfg(test)]
mod tests;
