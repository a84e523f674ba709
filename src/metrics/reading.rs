//! Everything that is counted about a machine, as it stands at one moment.
//!
//! Plain data: what is made of it can be tested without a machine.

use super::exits::ExitSums;
use crate::vm::Vm;

/// A device and what it has counted since it was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// What it is: `virtio-block`, `serial`, ...
    pub kind: &'static str,
    /// Its name in the specification.
    pub name: String,
    /// Counters by name.
    pub counters: Vec<(&'static str, u64)>,
}

/// What a machine has counted. Most of it is empty before the start.
#[derive(Debug, Clone, Default)]
pub struct Reading {
    /// The machine's id.
    pub id: String,
    /// The phase of its life, as in events.
    pub phase: &'static str,
    /// Microseconds from the start of the process to each milestone.
    pub milestones: Vec<(&'static str, u64)>,
    /// Exits over all vCPUs.
    pub exits: ExitSums,
    /// Devices in the order the guest finds them, then those without a driver's help.
    pub devices: Vec<Device>,
    /// vCPUs.
    pub vcpus: u64,
    /// Bytes of memory that the guest starts with.
    pub memory: u64,
}

impl Reading {
    /// Adds what only a started machine has.
    pub fn add_machine(&mut self, vm: &Vm) {
        self.exits = vm.vcpus.exit_sums();
        for (name, device) in &vm.devices {
            let (kind, counters) = (device.about().kind, device.counters());
            self.devices.push(Device { kind, name: name.clone(), counters });
        }
        self.add("serial", vm.consoles.counters());
        self.add("i8042", if vm.platform.keyboard { vm.i8042.counters() } else { Vec::new() });
        self.add("pvpanic", vm.pvpanic.as_ref().map_or_else(Vec::new, |port| port.counters()));
    }

    /// Adds a part of which there is one, unless it counts nothing.
    pub fn add(&mut self, kind: &'static str, counters: Vec<(&'static str, u64)>) {
        if !counters.is_empty() {
            self.devices.push(Device { kind, name: kind.to_owned(), counters });
        }
    }
}
