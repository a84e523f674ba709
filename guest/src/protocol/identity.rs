//! Who a machine is, for one that was restored from the memory of another.

use super::Failure;
use serde::{Deserialize, Serialize};

/// What a restored machine is to be from now on. What is left out stays as it is; sending the
/// same twice changes nothing more.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Identity {
    /// Nanoseconds since 1970, UTC. The clock is set to it at once; time that only counts on
    /// (`CLOCK_MONOTONIC`) is not touched.
    pub unix_ns: Option<u64>,
    /// Fresh random bytes for the kernel's generator, at most 512, counted as fully random. It
    /// draws from them from then on. A guest whose kernel knows VMGENID has done that by itself,
    /// earlier: programs can run, and draw numbers, before the agent is heard.
    pub entropy: Vec<u8>,
    /// Name of the machine: 1 to 64 bytes, no `/`. In `/etc/hostname` and `/etc/hosts` too.
    pub hostname: Option<String>,
    /// 32 lower-case hexadecimal digits, not all zero (`machine-id(5)`). Put into the files that
    /// are there; a container that has none gets none.
    pub machine_id: Option<String>,
    /// Interfaces that change, at most 64.
    pub network: Vec<InterfaceIdentity>,
}

/// What a network interface is to be from now on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct InterfaceIdentity {
    /// Hardware address `aa:bb:cc:dd:ee:ff` it is found by; empty: found by `name`.
    pub mac: String,
    /// Name it is found by, as `eth0`.
    pub name: String,
    /// Its new hardware address; not a group's.
    pub new_mac: Option<String>,
    /// Addresses with their prefix length, at most 64: it has these from then on, and no others
    /// but those that IPv6 derives for the link itself. Routes through others go with them.
    /// Empty: they stay.
    pub addresses: Vec<String>,
    /// Default routes: at most one address of each family. Empty: they stay, as far as the
    /// addresses do.
    pub gateways: Vec<String>,
}

/// A part of an [`Identity`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// The kernel's generator of random numbers.
    Random,
    /// The clock.
    Clock,
    /// The name of the machine.
    Hostname,
    /// The machine id.
    MachineId,
    /// An interface, by its name or hardware address as asked for.
    Interface(String),
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Random => f.write_str("random numbers"),
            Self::Clock => f.write_str("clock"),
            Self::Hostname => f.write_str("host name"),
            Self::MachineId => f.write_str("machine id"),
            Self::Interface(name) => write!(f, "interface {name}"),
        }
    }
}

/// What became of one part of an [`Identity`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Which.
    pub part: Part,
    /// Why it was not done, or not wholly; `None`: it was done.
    pub failure: Option<Failure>,
}
