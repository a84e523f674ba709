//! Devices that come and go while the machine runs.
//!
//! ```text
//!   add     make the device ─► free PCI slot ─► event device: "look at this slot"
//!   remove  event device: "give this slot back" ─► guest lets go, ejects ─► forget the device
//! ```
//!
//! The guest has a say in a removal: it may have file systems on the disk and does not like to be
//! surprised. So a removal is asked for, and happens when the guest ejects; `devices::pci::hotplug`
//! empties the slot then, on the vCPU's thread, and the owner of the machine is told. A guest that
//! does not answer keeps its device, unless no driver holds it: then nobody misses it.
//!
//! What the device stands for on the host (files with their locks, taps, threads) is closed with
//! it, as soon as the owner forgets it.

use std::sync::Arc;

use api::{FaultKind, spec};
use devices::{
    legacy::power,
    mmds::Mmds,
    virtio::{
        VirtioDevice,
        core::{Location, Transport},
    },
};

use super::{
    Vm,
    attach::AttachError,
    build::{self, BuildError},
    handed::Handed,
};

/// A slot with what is left in it of a device that was taken by force.
pub type Left = (u8, Arc<dyn Transport>);

/// A device that can be added.
#[derive(Debug, Clone, Copy)]
pub enum Extra<'a> {
    /// A disk.
    Drive(&'a spec::Drive),
    /// Persistent memory.
    Pmem(&'a spec::Pmem),
    /// A network interface, and the metadata service that may be reached through it.
    NetworkInterface(&'a spec::NetworkInterface, Option<&'a Arc<Mmds>>),
    /// The entropy device.
    Entropy(&'a spec::Entropy),
}

/// Kinds of devices that come and go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Disks.
    Drive,
    /// Persistent memory.
    Pmem,
    /// Network interfaces.
    NetworkInterface,
    /// The entropy device.
    Entropy,
}

impl Kind {
    /// As in [`devices::virtio::About`].
    pub fn device(self) -> &'static str {
        match self {
            Kind::Drive => "virtio-block",
            Kind::Pmem => "virtio-pmem",
            Kind::NetworkInterface => "virtio-net",
            Kind::Entropy => "virtio-rng",
        }
    }
}

impl Vm {
    /// Adds a device, running or paused, and tells the guest. Nothing is changed when it fails.
    /// Descriptors that came for it are in `handed`.
    pub fn add(&mut self, extra: Extra<'_>, handed: &Handed) -> Result<(), BuildError> {
        self.has_slots()?;
        let (name, device) = match extra {
            Extra::Drive(drive) => (drive.drive_id.as_str(), build::disk(drive, handed)?),
            Extra::Pmem(pmem) => (pmem.id.as_str(), self.annex.add(self.host.vm(), pmem)?),
            Extra::NetworkInterface(interface, mmds) => {
                (interface.iface_id.as_str(), build::card(interface, mmds, handed)?)
            }
            Extra::Entropy(entropy) => ("entropy", build::generator(entropy)),
        };
        let placed = self.place(name, device);
        if let (Err(_), Extra::Pmem(_)) = (&placed, extra) {
            self.annex.remove(self.host.vm(), name)?;
        }
        Ok(placed?)
    }

    fn place(&mut self, name: &str, device: Box<dyn VirtioDevice>) -> Result<(), AttachError> {
        let transport = self.places.insert(name, device)?;
        self.devices.push((name.to_owned(), transport));
        self.power.raise(power::EVENT_PCI);
        Ok(())
    }

    /// Whether devices can come and go at all.
    pub fn has_slots(&self) -> Result<(), AttachError> {
        self.places.hotplug().map(|_| ())
    }

    /// The slot of a device; `None` when there is no such device.
    pub fn slot_of(&self, kind: Kind, name: &str) -> Result<Option<u8>, AttachError> {
        self.has_slots()?;
        Ok(match self.device(kind.device(), name).map(|device| device.location()) {
            Some(Location::Pci { slot }) => Some(slot),
            _ => None,
        })
    }

    /// Asks the guest to give back what is in `slot`.
    pub fn ask_back(&self, slot: u8) {
        if let Ok(pci) = self.places.hotplug() {
            pci.ask(slot);
            self.power.raise(power::EVENT_PCI);
        }
    }

    /// Tells a guest again that has not yet looked at what came or is to go; false when it has.
    pub fn remind(&self) -> bool {
        let unread = self.places.hotplug().is_ok_and(|pci| pci.unread());
        if unread {
            self.power.raise(power::EVENT_PCI);
        }
        unread
    }

    /// Whether a driver of the guest holds the device in `slot`.
    pub fn is_driven(&self, slot: u8) -> bool {
        self.in_slot(slot).is_some_and(|(_, device)| device.driven())
    }

    /// Empties `slot` whatever the guest does; false when the guest has just done so itself.
    pub fn take_out(&self, slot: u8) -> bool {
        self.places.hotplug().is_ok_and(|pci| pci.take(slot))
    }

    /// Closes what the device in `slot` stands for, whatever the guest does, and forgets it. The
    /// guest finds a device that answers to nothing, and is asked to give it back: until then it
    /// has its slot.
    pub fn sever(&mut self, slot: u8) -> Option<(Kind, String)> {
        let left = Arc::clone(&self.in_slot(slot)?.1);
        left.sever();
        let forgotten = self.forget(slot)?;
        self.severed.push((slot, left));
        self.ask_back(slot);
        Some(forgotten)
    }

    /// The guest has emptied `slot`: forgets the device that was in it, and says what it was;
    /// `None` when that is forgotten already.
    pub fn emptied(&mut self, slot: u8) -> Option<(Kind, String)> {
        match self.severed.iter().position(|(severed, _)| *severed == slot) {
            Some(at) => {
                self.severed.swap_remove(at);
                None
            }
            None => self.forget(slot),
        }
    }

    /// Forgets the device that was in `slot` and closes what it stood for; says what it was.
    pub fn forget(&mut self, slot: u8) -> Option<(Kind, String)> {
        let at = self.devices.iter().position(|(_, device)| is_in(device, slot))?;
        let (name, device) = self.devices.remove(at);
        let kinds = [Kind::Drive, Kind::Pmem, Kind::NetworkInterface, Kind::Entropy];
        let kind = kinds.into_iter().find(|kind| kind.device() == device.about().kind)?;
        if kind == Kind::Pmem
            && let Err(error) = self.annex.remove(self.host.vm(), &name)
        {
            log::error!("The memory of pmem {name:?} stays mapped: {error}");
        }
        Some((kind, name))
    }

    fn in_slot(&self, slot: u8) -> Option<&(String, Arc<dyn Transport>)> {
        self.devices.iter().find(|(_, device)| is_in(device, slot))
    }
}

fn is_in(device: &Arc<dyn Transport>, slot: u8) -> bool {
    device.location() == Location::Pci { slot }
}

impl AttachError {
    /// Whose fault it is.
    pub fn kind(&self) -> FaultKind {
        match self {
            AttachError::Fixed => FaultKind::Unsupported,
            _ => FaultKind::Invalid,
        }
    }
}
