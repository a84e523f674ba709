//! The door to a machine: requests in, replies or faults out.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{
    Fault, Spec,
    spec::{
        Balloon, BalloonPatch, BalloonStatisticsPatch, BootSource, CpuConfig, CreateSnapshot, Drive,
        DrivePatch, Entropy, HintingStart, LoadSnapshot, LoggerPatch, MachineConfig, MachineConfigPatch,
        MemoryHotplug, MemoryHotplugPatch, Metrics, MmdsConfig, NetworkInterface, NetworkInterfacePatch,
        Pmem, PmemPatch, Serial, SnapshotJob, Vsock,
    },
};

/// What may be asked of a machine, before and after it starts. [`crate::routes`] says which
/// HTTP request is which.
#[derive(Debug, Clone, PartialEq)]
pub enum Request {
    /// What the machine is and does (`GET /`).
    Info,
    /// The monitor's version.
    Version,
    /// The whole specification as it stands.
    Config,
    /// vCPUs and memory.
    MachineConfig,
    /// The balloon.
    Balloon,
    /// The balloon's latest statistics.
    BalloonStatistics,
    /// How far free page hinting is.
    HintingStatus,
    /// Memory that can be added, and how much of it is.
    MemoryHotplug,
    /// The data of the metadata service.
    Mmds,
    /// Counters of every device and vCPU. *Ours.*
    Counters,
    /// All figures in the text format of Prometheus. *Ours.*
    OpenMetrics,

    /// What to boot.
    PutBootSource(BootSource),
    /// vCPUs and memory.
    PutMachineConfig(MachineConfig),
    /// Some of vCPUs and memory.
    PatchMachineConfig(MachineConfigPatch),
    /// What the guest sees of the processor.
    PutCpuConfig(CpuConfig),
    /// Adds or replaces a disk.
    PutDrive(Drive),
    /// Changes a disk of a running machine.
    PatchDrive(DrivePatch),
    /// Takes a disk out of a running machine.
    DeleteDrive(String),
    /// Adds or replaces persistent memory.
    PutPmem(Pmem),
    /// Changes persistent memory of a running machine.
    PatchPmem(PmemPatch),
    /// Takes persistent memory out of a running machine.
    DeletePmem(String),
    /// Adds or replaces a network interface.
    PutNetworkInterface(NetworkInterface),
    /// Changes a network interface of a running machine.
    PatchNetworkInterface(NetworkInterfacePatch),
    /// Takes a network interface out of a running machine.
    DeleteNetworkInterface(String),
    /// The vsock device.
    PutVsock(Vsock),
    /// The entropy device.
    PutEntropy(Entropy),
    /// Takes the entropy device out of a running machine. *Ours.*
    DeleteEntropy,
    /// The serial port.
    PutSerial(Serial),
    /// The balloon.
    PutBalloon(Balloon),
    /// The balloon's size.
    PatchBalloon(BalloonPatch),
    /// How often the balloon's statistics are asked for.
    PatchBalloonStatistics(BalloonStatisticsPatch),
    /// Begins a run of free page hinting.
    StartHinting(HintingStart),
    /// Ends it.
    StopHinting,
    /// Memory that can be added.
    PutMemoryHotplug(MemoryHotplug),
    /// How much of it the guest should have.
    PatchMemoryHotplug(MemoryHotplugPatch),
    /// Replaces the data of the metadata service.
    PutMmds(serde_json::Value),
    /// Merges into the data of the metadata service.
    PatchMmds(serde_json::Value),
    /// Through which interfaces the metadata service is reached.
    PutMmdsConfig(MmdsConfig),
    /// Where the log goes and what it holds.
    PutLogger(LoggerPatch),
    /// Where metrics go.
    PutMetrics(Metrics),

    /// Begin to run the configured machine (`InstanceStart`).
    Start,
    /// Write metrics now (`FlushMetrics`).
    FlushMetrics,
    /// Press Ctrl+Alt+Del on the keyboard controller (`SendCtrlAltDel`).
    CtrlAltDel,
    /// Stop all vCPUs and devices where they are (`PATCH /vm` to `Paused`).
    Pause,
    /// Go on after a pause (`PATCH /vm` to `Resumed`).
    Resume,
    /// Take a snapshot.
    CreateSnapshot(CreateSnapshot),
    /// Become the machine of a snapshot.
    LoadSnapshot(Box<LoadSnapshot>),
    /// The snapshots that are or were being written. *Ours.*
    SnapshotJobs,
    /// One of them. *Ours.*
    SnapshotJob(u64),
    /// Do not write one any further, and leave nothing of it. *Ours.*
    CancelSnapshot(u64),
    /// Press the power button: ask the guest to shut itself down. *Ours.*
    PowerButton,
    /// Interrupt all vCPUs unmaskably. *Ours.*
    Nmi,
    /// Write the machine's memory and registers to an ELF core file. *Ours.*
    CoreDump(PathBuf),
    /// End the machine now, whatever the guest does. *Ours.*
    Stop,
}

/// The answer to a [`Request`].
#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    /// Done.
    Done,
    /// The answer to [`Request::Info`].
    Info(MachineInfo),
    /// The answer to [`Request::Version`].
    Version(String),
    /// The answer to [`Request::Config`].
    Config(Box<Spec>),
    /// The answer to [`Request::MachineConfig`].
    MachineConfig(MachineConfig),
    /// The answer to [`Request::Balloon`].
    Balloon(Balloon),
    /// What was asked for goes on in the background.
    Begun(SnapshotJob),
    /// A JSON document.
    Json(serde_json::Value),
    /// A text, not JSON.
    Text(String),
}

/// State of a machine in its life cycle, in Firecracker's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MachineState {
    /// Configured, or still being configured; nothing runs.
    #[serde(rename = "Not started")]
    NotStarted,
    /// vCPUs run.
    Running,
    /// vCPUs and devices stand still.
    Paused,
}

/// What `GET /` answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineInfo {
    /// Identifier given with `--id`.
    pub id: String,
    /// Where it is in its life.
    pub state: MachineState,
    /// Version of the monitor.
    pub vmm_version: String,
    /// Name of the program.
    pub app_name: String,
}

/// The one door to a machine. Calls are carried out one at a time, in order; each one either
/// happens as a whole or changes nothing and says why.
pub trait Control: Send + Sync {
    /// Carries out `request`. Returns within a bounded time.
    fn call(&self, request: Request) -> Result<Reply, Fault>;
}
