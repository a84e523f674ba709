//! What the host tells the lab's init to do: one file in the initrd, JSON.

use std::ffi::OsString;

use serde::{Deserialize, Serialize};

/// Where the order lies in the initrd.
pub const PATH: &str = "/order.json";
/// Folder of the initrd with the modules that the root file system needs, in order of loading.
pub const MODULES_FIRST: &str = "/modules/first";
/// Folder of the initrd with the other modules, in order of loading.
pub const MODULES_REST: &str = "/modules/rest";
/// 9p tag of the root directory.
pub const ROOT_TAG: &str = "root";
/// 9p tag of the kernel's module tree.
pub const MODULES_TAG: &str = "modules";

/// The order: what to run and where.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// Program and arguments; never empty.
    pub command: Vec<OsString>,
    /// The whole environment of the command.
    pub environment: Vec<(OsString, OsString)>,
    /// Its working directory.
    pub directory: OsString,
    /// A terminal of (rows, columns) is wanted instead of three pipes.
    pub terminal: Option<(u16, u16)>,
    /// The host's network is to be reached.
    pub network: bool,
    /// Writable directories: 9p tag and the path, the same outside and inside.
    pub shares: Vec<(String, OsString)>,
}
