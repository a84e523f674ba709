//! Puts devices where the guest finds them: on a transport, at an address, with an interrupt.
//!
//! Memory-mapped devices get a page of the first MMIO window and an interrupt line each; PCI
//! functions get a slot, a BAR in the second window, and messages. Which of the two is chosen
//! once for a machine. The tables the guest reads (ACPI) are made from the same record, so
//! they cannot disagree with what is there.
//!
//! PCI slots can be filled and emptied while the machine runs ([`Places::insert`]); `plug.rs` says
//! how a device comes to that. Memory-mapped devices are in tables that a guest reads once.

use std::{mem, ops::Range, sync::Arc};

use arch::{acpi, layout};
use devices::{
    Memory,
    bus::{Bus, BusError},
    host::Host,
    pci::{
        hotplug::Hotplug,
        root::{SLOTS, SlotError},
    },
    virtio::{
        DeviceError, VirtioDevice,
        core::Transport,
        mmio::{self, MmioTransport},
        pci::{BAR_LENGTH, PciTransport},
        severed::Severed,
    },
    worker::Worker,
};

use super::{faults::Faults, saved::Slots};

/// Why a device could not be attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// All interrupt lines, pages or slots are taken.
    #[error("There is no room for device {name:?}: {room} fit on {bus}")]
    Full {
        /// The device.
        name: String,
        /// How many fit.
        room: usize,
        /// On which bus.
        bus: &'static str,
    },
    /// There are no slots that can be filled.
    #[error(
        "PCI is not enabled, and only PCI has slots to add and remove devices while the machine runs; \
         start the monitor with --enable-pci"
    )]
    Fixed,
    /// The transport could not be made.
    #[error("Device {name:?} cannot be attached")]
    Transport {
        /// The device.
        name: String,
        /// Why.
        #[source]
        source: DeviceError,
    },
    /// Its slot is taken.
    #[error("Device {name:?} cannot be attached")]
    Slot {
        /// The device.
        name: String,
        /// Why.
        #[source]
        source: SlotError,
    },
    /// Its address is taken.
    #[error("Device {name:?} cannot be attached")]
    Bus {
        /// The device.
        name: String,
        /// Why.
        #[source]
        source: BusError,
    },
}

/// The places of one machine, and what stands in them.
pub struct Places {
    memory: Memory,
    host: Arc<dyn Host>,
    mmio: Arc<Bus>,
    worker: Worker,
    lines: Range<u32>,
    pages: Vec<acpi::VirtioMmio>,
    pci: Option<Arc<Hotplug>>,
    devices: Vec<(String, Arc<dyn Transport>)>,
    faults: Arc<Faults>,
    /// Where devices of a saved machine were.
    was: Option<Slots>,
}

impl Places {
    /// All places free. With `pci`, devices go there instead of to memory-mapped pages. Trouble of
    /// devices goes to `faults`.
    pub fn new(
        memory: Memory,
        host: Arc<dyn Host>,
        mmio: Arc<Bus>,
        pci: Option<Arc<Hotplug>>,
        faults: Arc<Faults>,
    ) -> Places {
        Places {
            memory,
            host,
            mmio,
            worker: Worker::new("devices"),
            lines: layout::INTERRUPT_LINES,
            pages: Vec::new(),
            pci,
            devices: Vec::new(),
            faults,
            was: None,
        }
    }

    /// Has devices put into the slots they were in, with nothing of what a firmware would set up:
    /// the guest's settings are about to be restored.
    pub fn as_they_were(&mut self, was: Slots) {
        self.was = Some(was);
    }

    /// Takes the next free interrupt line.
    pub fn line(&mut self) -> Option<u32> {
        self.lines.next()
    }

    /// Attaches `device` under `name` in the next free place.
    pub fn attach(&mut self, name: &str, device: Box<dyn VirtioDevice>) -> Result<(), AttachError> {
        let transport = match self.pci.clone() {
            Some(pci) => self.attach_pci(name, device, &pci)?,
            None => self.attach_mmio(name, device)?,
        };
        transport.watch(self.faults.witness(name, transport.about().kind));
        self.devices.push((name.to_owned(), transport));
        Ok(())
    }

    fn attach_mmio(
        &mut self,
        name: &str,
        device: Box<dyn VirtioDevice>,
    ) -> Result<Arc<dyn Transport>, AttachError> {
        let room = layout::INTERRUPT_LINES.len();
        let full = || AttachError::Full { name: name.to_owned(), room, bus: "the MMIO transport" };
        let line = self.lines.next().ok_or_else(full)?;
        // The first page of the window belongs to the boot timer.
        let base = layout::MMIO_WINDOW.start + mmio::LENGTH * (self.pages.len() as u64 + 1);
        let transport = MmioTransport::new(
            device,
            self.memory.clone(),
            self.worker.clone(),
            Arc::clone(&self.host),
            base,
            line,
        )
        .map_err(|source| AttachError::Transport { name: name.to_owned(), source })?;
        self.mmio
            .insert(base, mmio::LENGTH, transport.clone())
            .map_err(|source| AttachError::Bus { name: name.to_owned(), source })?;
        self.pages.push(acpi::VirtioMmio { base: base as u32, len: mmio::LENGTH as u32, line });
        Ok(transport)
    }

    fn attach_pci(
        &mut self,
        name: &str,
        device: Box<dyn VirtioDevice>,
        pci: &Hotplug,
    ) -> Result<Arc<dyn Transport>, AttachError> {
        let (slot, bar) = match &self.was {
            None => {
                let slot = free_slot(name, pci)?;
                (slot, Some(layout::PCI_WINDOW_32.start + BAR_LENGTH * u64::from(slot)))
            }
            Some(was) => match was.of(device.about().kind, name) {
                Some(slot) => (slot, None),
                None => (free_slot(name, pci)?, None),
            },
        };
        let transport = self.function(name, device, slot, bar)?;
        pci.root()
            .add(slot, transport.clone())
            .map_err(|source| AttachError::Slot { name: name.to_owned(), source })?;
        Ok(transport)
    }

    /// Puts `device` into a PCI slot of a machine that runs. The guest gives it its addresses
    /// when it is told to look, which is up to the caller.
    pub fn insert(
        &self,
        name: &str,
        device: Box<dyn VirtioDevice>,
    ) -> Result<Arc<dyn Transport>, AttachError> {
        let pci = self.hotplug()?;
        let slot = free_slot(name, pci)?;
        let transport = self.function(name, device, slot, None)?;
        transport.watch(self.faults.witness(name, transport.about().kind));
        pci.insert(slot, transport.clone())
            .map_err(|source| AttachError::Slot { name: name.to_owned(), source })?;
        Ok(transport)
    }

    /// Puts what was left of a device that was taken by force where it was.
    pub fn left_in(&self, slot: u8, left: Severed) -> Result<Arc<dyn Transport>, AttachError> {
        let name = format!("in slot {slot}");
        let transport = self.function(&name, Box::new(left), slot, None)?;
        let added = self.hotplug()?.root().add(slot, transport.clone());
        added.map_err(|source| AttachError::Slot { name, source })?;
        Ok(transport)
    }

    /// The registers through which slots are filled and emptied.
    pub fn hotplug(&self) -> Result<&Hotplug, AttachError> {
        self.pci.as_deref().ok_or(AttachError::Fixed)
    }

    fn function(
        &self,
        name: &str,
        device: Box<dyn VirtioDevice>,
        slot: u8,
        bar: Option<u64>,
    ) -> Result<Arc<PciTransport>, AttachError> {
        let fail = |source| AttachError::Transport { name: name.to_owned(), source };
        PciTransport::new(
            device,
            self.memory.clone(),
            self.worker.clone(),
            Arc::clone(&self.host),
            &self.mmio,
            slot,
            bar,
        )
        .map_err(fail)
    }

    /// What the guest's tables say about memory-mapped devices.
    pub fn pages(&self) -> &[acpi::VirtioMmio] {
        &self.pages
    }

    /// The devices so far, by name, in the order the guest finds them.
    pub fn devices(&self) -> &[(String, Arc<dyn Transport>)] {
        &self.devices
    }

    /// Hands over the devices, by name, in the order the guest finds them.
    pub fn take_devices(&mut self) -> Vec<(String, Arc<dyn Transport>)> {
        mem::take(&mut self.devices)
    }
}

fn free_slot(name: &str, pci: &Hotplug) -> Result<u8, AttachError> {
    let room = usize::from(SLOTS) - 1;
    pci.root().free_slot().ok_or_else(|| AttachError::Full { name: name.to_owned(), room, bus: "PCI bus 0" })
}
