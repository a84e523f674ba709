//! What a machine is made of, what may be asked of it, and how a refusal looks: data only.
//!
//! ```text
//!   configuration file ─┐                         ┌─► controller (owns the machine)
//!   HTTP body           ├─► spec ──► Request ──► Control
//!   command line        ┘                         └─◄ Reply or Fault
//! ```
//!
//! Names, fields, defaults and rules are Firecracker's, so that a file or a body written for
//! it means the same here; what it lacks is added in the same style. Nothing in this crate
//! but the [`client`] opens a file, a socket or a device: it can be tested, and its documents
//! compared with `resources/openapi.yaml`, without a machine.
//!
//! [`Control`] is the one door to a running machine. The HTTP server, the command line and
//! the tests all stand in front of it.

/// The version of Firecracker whose API this is, as `GET /version` and `--version` tell it to
/// programs that ask what they may send.
pub const FIRECRACKER_VERSION: &str = "1.17.0";

pub mod client;
mod control;
mod fault;
pub mod http;
mod nearest;
pub mod routes;
pub mod spec;

pub use control::{Control, MachineInfo, MachineState, Reply, Request};
pub use fault::{Fault, FaultKind};
pub use nearest::{explain_json, nearest};
pub use spec::Spec;
