//! Snapshots: the bodies of `PUT /snapshot/create` and `PUT /snapshot/load`, and what is told of
//! one that is being written.
//!
//! ```text
//!   snapshot_path + mem_file_path   Firecracker's form: a file of state and one of memory
//!   snapshot_path alone             a directory, docs/snapshot.md (ours)
//! ```

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Serial, is_default};
use crate::{Fault, FaultKind};

/// What of memory is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum SnapshotType {
    /// What changed since the snapshot that was taken or loaded last.
    Diff,
    /// All.
    #[default]
    Full,
}

/// How drives belong to a snapshot. *Ours.*
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DriveCapture {
    /// Copied, holes staying holes.
    Copy,
    /// Copied by sharing blocks; refused where the file system cannot.
    Reflink,
    /// Not taken along: the files themselves are used again, as they are then.
    #[default]
    Share,
}

/// How pages of a store are kept. *Ours.*
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// As they are.
    #[default]
    None,
    /// As LZ4 blocks.
    Lz4,
}

/// `PUT /snapshot/create`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    /// All of memory, or what changed.
    #[serde(default)]
    pub snapshot_type: SnapshotType,
    /// The file that gets the state; without `mem_file_path` the directory that gets all.
    pub snapshot_path: PathBuf,
    /// The file that gets guest memory. Always there in Firecracker's requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_file_path: Option<PathBuf>,
    /// Whether drives are taken along. *Ours.*
    #[serde(default, skip_serializing_if = "is_default")]
    pub drives: DriveCapture,
    /// Put pages into the store in this directory, each content once. *Ours.*
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store: Option<PathBuf>,
    /// How the store keeps them. *Ours.*
    #[serde(default, skip_serializing_if = "is_default")]
    pub compression: Compression,
    /// Compute a hash of each chunk of memory, so that it can be verified. *Ours.*
    #[serde(default, skip_serializing_if = "is_default")]
    pub hash: bool,
    /// Let the guest go on while its memory is written; the machine may be running. The host keeps a
    /// second copy of what the guest writes until that. *Ours.*
    #[serde(default, skip_serializing_if = "is_default")]
    pub live: bool,
    /// Answer 202 with the job at once. *Ours.*
    #[serde(default, skip_serializing_if = "is_default")]
    pub background: bool,
    /// Kept in the snapshot's manifest as it is, for whoever asks for the snapshot. *Ours.*
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<serde_json::Map<String, serde_json::Value>>,
    /// Take the place of the snapshot that is at `snapshot_path` already, once this one is
    /// whole. Firecracker's form always does. *Ours.*
    #[serde(default, skip_serializing_if = "is_default")]
    pub replace: bool,
}

impl CreateSnapshot {
    /// Checks what does not depend on a machine.
    pub fn check(&self) -> Result<(), Fault> {
        let wrong = |text: &str| Err(Fault::new(FaultKind::Invalid, text));
        if self.snapshot_path.as_os_str().is_empty() {
            return wrong("snapshot_path is empty; name the file or directory to write");
        }
        if self.compression != Compression::None && self.store.is_none() {
            return wrong("compression is for pages in a store; name one in store, or leave compression out");
        }
        if self.mem_file_path.is_none() {
            return Ok(());
        }
        if self.mem_file_path.as_ref() == Some(&self.snapshot_path) {
            return wrong("snapshot_path and mem_file_path are the same file");
        }
        if self.drives != DriveCapture::Share || self.store.is_some() || self.hash || self.note.is_some() {
            return wrong(
                "drives, store, hash and note need a directory; leave out mem_file_path to write one",
            );
        }
        Ok(())
    }
}

/// Where guest memory comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemBackendType {
    /// A memory file, mapped as it is.
    File,
    /// A process that serves page faults, reached through a unix socket.
    Uffd,
}

/// Where guest memory comes from, with its path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemBackend {
    /// What it is.
    pub backend_type: MemBackendType,
    /// The memory file, or the socket of the page fault handler.
    pub backend_path: PathBuf,
}

/// Page size of guest memory after a load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum LoadHugePages {
    /// What the machine had.
    #[default]
    Snapshot,
    /// The host's page size.
    None,
    /// 2 MiB pages where the kernel finds some.
    Transparent,
    /// 2 MiB pages from the reserved pool; not for a mapped memory file.
    #[serde(rename = "2M")]
    Huge2M,
}

/// What is brought into memory before the guest asks for it. *Ours.*
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prefetch {
    /// Nothing.
    None,
    /// What the guest used after an earlier load, if that was recorded.
    #[default]
    WorkingSet,
    /// All.
    All,
}

/// Another tap, or another address, for a network interface.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkOverride {
    /// Which one.
    pub iface_id: String,
    /// The tap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_dev_name: Option<String>,
    /// The tap's descriptors come with the request, one for each pair of queues. *Ours.*
    #[serde(default, skip_serializing_if = "is_default")]
    pub by_descriptor: bool,
    /// The MAC address that the device has from now on. A guest that runs learns of it from its
    /// agent only. *Ours.*
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<String>,
}

/// Another socket for the vsock device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockOverride {
    /// The socket.
    pub uds_path: PathBuf,
    /// The context id that the guest has from now on. *Ours.*
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_cid: Option<u32>,
}

/// Another file for a drive. *Ours.*
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveOverride {
    /// Which one.
    pub drive_id: String,
    /// The file, with the contents that the guest knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_on_host: Option<PathBuf>,
    /// The file's descriptor comes with the request.
    #[serde(default, skip_serializing_if = "is_default")]
    pub by_descriptor: bool,
}

/// Another file for persistent memory. *Ours.*
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemOverride {
    /// Which one.
    pub id: String,
    /// The file, of the same length.
    pub path_on_host: PathBuf,
}

/// `PUT /snapshot/load`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadSnapshot {
    /// The file with the state, or the directory with all.
    pub snapshot_path: PathBuf,
    /// The file with guest memory. Deprecated in favour of `mem_backend`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_file_path: Option<PathBuf>,
    /// Where guest memory comes from. A directory holds its memory; only a page fault handler can
    /// be named beside it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_backend: Option<MemBackend>,
    /// The same as `track_dirty_pages`. Deprecated.
    #[serde(default, skip_serializing_if = "is_default")]
    pub enable_diff_snapshots: bool,
    /// Record the pages that are written, in KVM.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Let the machine run at once.
    #[serde(default)]
    pub resume_vm: bool,
    /// Other taps.
    #[serde(default)]
    pub network_overrides: Vec<NetworkOverride>,
    /// Another vsock socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_override: Option<VsockOverride>,
    /// Let the guest's clock go forward by the time that has passed since the snapshot was taken,
    /// instead of going on where it stood.
    #[serde(default)]
    pub clock_realtime: bool,
    /// Page size of guest memory.
    #[serde(default)]
    pub huge_pages: LoadHugePages,
    /// Other files for drives. *Ours.*
    #[serde(default, skip_serializing_if = "is_default")]
    pub drive_overrides: Vec<DriveOverride>,
    /// Other files for persistent memory. *Ours.*
    #[serde(default, skip_serializing_if = "is_default")]
    pub pmem_overrides: Vec<PmemOverride>,
    /// Another far end of the serial port. *Ours.*
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_override: Option<Serial>,
    /// What is brought into memory beforehand. *Ours.*
    #[serde(default, skip_serializing_if = "is_default")]
    pub prefetch: Prefetch,
    /// Record what the guest uses in its first second, for later loads, in place of what was
    /// recorded before. Without it that is done where nothing is recorded yet and `prefetch` is
    /// `working_set`. *Ours.*
    #[serde(default, skip_serializing_if = "is_default")]
    pub record_working_set: bool,
    /// Where parents and stores are looked for besides where the snapshot says. *Ours.*
    #[serde(default, skip_serializing_if = "is_default")]
    pub search: Vec<PathBuf>,
}

impl LoadSnapshot {
    /// Checks what does not depend on a snapshot. The words are Firecracker's where it has some.
    pub fn check(&self) -> Result<(), Fault> {
        let wrong = |text: String| Err(Fault::new(FaultKind::Invalid, text));
        if self.mem_backend.is_some() && self.mem_file_path.is_some() {
            let text = "too many fields: either `mem_backend` or `mem_file_path` exclusively is required";
            return wrong(text.to_owned());
        }
        for change in &self.network_overrides {
            let id = &change.iface_id;
            match (&change.host_dev_name, change.by_descriptor, &change.guest_mac) {
                (Some(_), true, _) => {
                    return wrong(format!("Override of {id:?} has both host_dev_name and by_descriptor"));
                }
                (None, false, None) => {
                    return wrong(format!(
                        "Override of {id:?} changes nothing; give host_dev_name, by_descriptor or guest_mac"
                    ));
                }
                _ => {}
            }
        }
        match self.drive_overrides.iter().find(|d| d.path_on_host.is_some() == d.by_descriptor) {
            Some(DriveOverride { drive_id: id, .. }) => {
                wrong(format!("Override of drive {id:?} needs one of path_on_host and by_descriptor"))
            }
            None => Ok(()),
        }
    }

    /// Where memory comes from, whichever field said it.
    pub fn backend(&self) -> Option<MemBackend> {
        let file =
            |path: &PathBuf| MemBackend { backend_type: MemBackendType::File, backend_path: path.clone() };
        self.mem_backend.clone().or_else(|| self.mem_file_path.as_ref().map(file))
    }
}

/// How far a snapshot is. *Ours.*
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum JobState {
    /// It is being written.
    Running,
    /// It is whole.
    Done,
    /// It is not there; see the error.
    Failed,
    /// It is not there, as was asked.
    Cancelled,
}

/// A snapshot that is or was being written (`GET /snapshot/jobs`). *Ours.*
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotJob {
    /// Number of the job, from 1.
    pub id: u64,
    /// What is written.
    pub snapshot_path: PathBuf,
    /// All, or what changed.
    pub snapshot_type: SnapshotType,
    /// How far it is.
    pub state: JobState,
    /// Bytes written.
    pub done_bytes: u64,
    /// Bytes to write, as far as known.
    pub total_bytes: u64,
    /// Microseconds that the guest stood still for it, once it goes on or is done.
    pub pause_us: u64,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> LoadSnapshot {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn firecrackers_bodies_read_with_its_defaults() {
        let create: CreateSnapshot =
            serde_json::from_str(r#"{"snapshot_path": "s", "mem_file_path": "m"}"#).unwrap();
        create.check().unwrap();
        assert_eq!((create.snapshot_type, create.drives), (SnapshotType::Full, DriveCapture::Share));
        let load = load(r#"{"snapshot_path": "s", "mem_file_path": "m", "resume_vm": true}"#);
        load.check().unwrap();
        let backend = load.backend().unwrap();
        assert_eq!((backend.backend_type, backend.backend_path), (MemBackendType::File, "m".into()));
    }

    #[test]
    fn what_does_not_go_together_is_refused_by_name() {
        let refused = |text: &str| {
            let create: CreateSnapshot = serde_json::from_str(text).unwrap();
            create.check().unwrap_err().message
        };
        assert!(refused(r#"{"snapshot_path": ""}"#).contains("snapshot_path is empty"));
        assert!(refused(r#"{"snapshot_path": "s", "compression": "lz4"}"#).contains("store"));
        assert!(refused(r#"{"snapshot_path": "s", "mem_file_path": "s"}"#).contains("same file"));
        assert!(
            refused(r#"{"snapshot_path": "s", "mem_file_path": "m", "hash": true}"#).contains("directory")
        );
        let refused = |text: &str| load(text).check().unwrap_err().message;
        let both = r#"{"snapshot_path": "s", "mem_file_path": "m",
            "mem_backend": {"backend_type": "File", "backend_path": "m"}}"#;
        assert!(refused(both).contains("too many fields"));
        let nothing = r#"{"snapshot_path": "s", "network_overrides": [{"iface_id": "eth0"}]}"#;
        assert!(refused(nothing).contains("changes nothing"));
        let nothing = r#"{"snapshot_path": "s", "drive_overrides": [{"drive_id": "root"}]}"#;
        assert!(refused(nothing).contains("needs one of"));
    }
}
