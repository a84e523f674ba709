//! Partial changes: the bodies of `PATCH` requests.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{HugePages, LogLevel, Logger, MachineConfig, NamedTemplate, RateLimiter, Spec};

/// `PATCH /machine-config`: what is absent stays.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfigPatch {
    /// Number of vCPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpu_count: Option<u8>,
    /// vCPUs that there is room for. *Ours.*
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_vcpu_count: Option<u8>,
    /// Memory in MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_size_mib: Option<u64>,
    /// Show two threads per core.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub smt: Option<bool>,
    /// Record the pages that are written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub track_dirty_pages: Option<bool>,
    /// Page size of guest memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub huge_pages: Option<HugePages>,
    /// What the processors show, by name. Deprecated; `None` takes a template away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<NamedTemplate>,
    /// Where gdb can connect to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gdb_socket_path: Option<PathBuf>,
    /// With a socket for gdb, do not run before gdb has come and said so. *Ours.*
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gdb_wait: Option<bool>,
}

impl MachineConfigPatch {
    /// `config` with the changes made.
    pub fn applied_to(&self, config: &MachineConfig) -> MachineConfig {
        MachineConfig {
            vcpu_count: self.vcpu_count.unwrap_or(config.vcpu_count),
            max_vcpu_count: self.max_vcpu_count.or(config.max_vcpu_count),
            mem_size_mib: self.mem_size_mib.unwrap_or(config.mem_size_mib),
            smt: self.smt.unwrap_or(config.smt),
            track_dirty_pages: self.track_dirty_pages.unwrap_or(config.track_dirty_pages),
            huge_pages: self.huge_pages.unwrap_or(config.huge_pages),
            cpu_template: self.cpu_template.or(config.cpu_template),
            gdb_socket_path: self.gdb_socket_path.clone().or_else(|| config.gdb_socket_path.clone()),
            gdb_wait: self.gdb_wait.unwrap_or(config.gdb_wait),
            ..config.clone()
        }
    }
}

/// `PATCH /drives/{id}`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrivePatch {
    /// Which one.
    pub drive_id: String,
    /// Another file, or the same one whose size has changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_on_host: Option<PathBuf>,
    /// Limits; a bucket that is absent stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// `PATCH /network-interfaces/{id}`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterfacePatch {
    /// Which one.
    pub iface_id: String,
    /// Limits towards the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Limits from the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// `PATCH /pmem/{id}`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemPatch {
    /// Which one.
    pub id: String,
    /// Limits of flushes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// `PATCH /balloon`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonPatch {
    /// Memory to take from the guest, in MiB.
    pub amount_mib: u32,
}

/// `PATCH /balloon/statistics`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonStatisticsPatch {
    /// Seconds between two askings.
    pub stats_polling_interval_s: u16,
}

/// `PATCH /balloon/hinting/start`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HintingStart {
    /// Let the guest use what it hinted again as soon as its run is over.
    #[serde(default = "yes")]
    pub acknowledge_on_stop: bool,
}

impl Default for HintingStart {
    fn default() -> HintingStart {
        HintingStart { acknowledge_on_stop: yes() }
    }
}

fn yes() -> bool {
    true
}

/// `PATCH /hotplug/memory`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryHotplugPatch {
    /// Memory that the guest should have besides its own, in MiB.
    pub requested_size_mib: u32,
}

/// `PUT /logger`: what is absent stays.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoggerPatch {
    /// File or named pipe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_path: Option<PathBuf>,
    /// Least severe level that is written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub level: Option<LogLevel>,
    /// Put the level in each line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_level: Option<bool>,
    /// Put the source file and line in each line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_log_origin: Option<bool>,
    /// Only lines of this module path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
}

impl LoggerPatch {
    /// `logger` with the changes made.
    pub fn applied_to(self, logger: &Logger) -> Logger {
        Logger {
            log_path: self.log_path.or_else(|| logger.log_path.clone()),
            level: self.level.unwrap_or(logger.level),
            show_level: self.show_level.unwrap_or(logger.show_level),
            show_log_origin: self.show_log_origin.unwrap_or(logger.show_log_origin),
            module: self.module.or_else(|| logger.module.clone()),
        }
    }
}

/// Puts `new` in the place of the entry that `same` finds, or behind the others.
fn put<T>(list: &mut Vec<T>, new: T, same: impl Fn(&T, &T) -> bool) {
    match list.iter().position(|old| same(old, &new)) {
        Some(at) => list[at] = new,
        None => list.push(new),
    }
}

impl Spec {
    /// Adds a disk, or replaces the one of the same name.
    pub fn put_drive(&mut self, drive: super::Drive) {
        put(&mut self.drives, drive, |a, b| a.drive_id == b.drive_id);
    }

    /// Adds a network interface, or replaces the one of the same name.
    pub fn put_network_interface(&mut self, interface: super::NetworkInterface) {
        put(&mut self.network_interfaces, interface, |a, b| a.iface_id == b.iface_id);
    }

    /// Adds persistent memory, or replaces the one of the same name.
    pub fn put_pmem(&mut self, pmem: super::Pmem) {
        put(&mut self.pmem, pmem, |a, b| a.id == b.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_changes_what_it_names() {
        let patch: MachineConfigPatch = serde_json::from_str(r#"{"mem_size_mib": 512}"#).unwrap();
        let config = patch.applied_to(&MachineConfig { vcpu_count: 3, ..MachineConfig::default() });
        assert_eq!((config.vcpu_count, config.mem_size_mib), (3, 512));
    }

    #[test]
    fn the_same_name_replaces_and_another_is_added() {
        let mut spec = Spec::default();
        for (id, path) in [("a", "1"), ("b", "2"), ("a", "3")] {
            let drive = super::super::Drive {
                drive_id: id.to_owned(),
                path_on_host: path.into(),
                ..super::super::Drive::default()
            };
            spec.put_drive(drive);
        }
        let seen: Vec<_> =
            spec.drives.iter().map(|d| (d.drive_id.as_str(), d.path_on_host.to_str())).collect();
        assert_eq!(seen, [("a", Some("3")), ("b", Some("2"))]);
    }
}
