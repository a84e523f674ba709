//! The door to a machine: requests in, replies or faults out.

use serde::{Deserialize, Serialize};

use crate::Fault;

/// What may be asked of a machine that exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Begin to run the configured machine (`InstanceStart`).
    Start,
    /// Stop all vCPUs and devices where they are (`PATCH /vm` to `Paused`).
    Pause,
    /// Go on after a pause (`PATCH /vm` to `Resumed`).
    Resume,
    /// Press the power button: ask the guest to shut itself down.
    PowerButton,
    /// Press Ctrl+Alt+Del on the keyboard controller (`SendCtrlAltDel`).
    CtrlAltDel,
    /// End the machine now, whatever the guest does.
    Stop,
    /// What the machine is and does (`GET /`).
    Info,
}

/// The answer to a [`Request`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// Done.
    Done,
    /// The answer to [`Request::Info`].
    Info(MachineInfo),
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
