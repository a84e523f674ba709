//! Virtio over PCI, modern only (VIRTIO 1.2 section 4.1).
//!
//! ```text
//!   configuration space                     BAR 0 (64-bit memory, 32 KiB)
//!   ├─ vendor 1af4, device 1040+id          0x0000  common configuration
//!   ├─ capability: common ──────────────►   0x1000  interrupt status
//!   ├─ capability: notify (multiplier 4)    0x2000  device configuration
//!   ├─ capability: isr                      0x3000  doorbells, 4 bytes a queue
//!   ├─ capability: device                   0x4000  MSI-X table
//!   ├─ capability: access through config    0x5000  MSI-X pending bits
//!   └─ MSI-X
//! ```
//!
//! As in the MMIO transport, what a register does is in [`Core`]. The parts are a page apart,
//! so that each could be mapped by itself. Each queue has its own doorbell address, so the
//! machine needs no match on the value written.
//!
//! The BAR of a device that the machine starts with has its address and is decoded before the
//! guest runs; to one that comes later the guest gives an address. A guest that moves it, or
//! turns decode off, moves the bus range and the doorbells; a running device is stopped for
//! that moment. A place that is taken leaves the BAR undecoded.
//!
//! Locks, in the order in which they may be taken: configuration space (`Front`), then the
//! core, then the vector table. Interrupts take the last one only.

mod saved;
#[cfg(test)]
mod tests;
mod vectors;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use self::vectors::Vectors;
use crate::{
    Memory,
    bus::{Bus, BusError, Registers},
    host::Host,
    pci::{
        Function,
        config::{Config, Identity},
        msix::{self, Msix, VECTORS_MAX},
    },
    state::Section,
    trouble::Witness,
    virtio::{
        About, Change, DeviceError, Report, VirtioDevice,
        core::{Bells, Core, Flags, Location, Plug, Ring, Transport},
    },
    worker::Worker,
};

/// Bytes of address space that one device takes; its BAR is aligned to as many.
pub const BAR_LENGTH: u64 = 0x8000;

/// A vector that is none: nothing is signalled (VIRTIO 1.2 section 4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE: u16 = 0x1040;

const PAGE: u64 = 0x1000;
const COMMON: u64 = 0;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;

const NOTIFY_STRIDE: u64 = 4;
const COMMON_LENGTH: u64 = 56;

const VENDOR_CAPABILITY: u8 = 9;
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_ACCESS: u8 = 5;

/// A virtio device in a PCI slot.
pub struct PciTransport {
    about: About,
    slot: u8,
    flags: Arc<Flags>,
    msix: Arc<Msix>,
    vectors: Arc<Vectors>,
    front: Mutex<Front>,
    core: Mutex<Core>,
    bus: Weak<Bus>,
    own: Weak<PciTransport>,
}

/// Configuration space, and where the BAR is for the rest of the machine.
struct Front {
    config: Config,
    /// Offset of the capability that reaches into the BAR.
    access: u16,
    /// Offset of the MSI-X capability.
    msix: u16,
    /// What the configuration space last asked for.
    wanted: Option<u64>,
    /// Where the bus has the BAR.
    placed: Option<u64>,
}

impl PciTransport {
    /// Makes a function for `slot` of the root bus with its BAR decoded at `bar`, a multiple
    /// of [`BAR_LENGTH`], on the memory bus, or nowhere until the guest places it. The caller
    /// adds it to the root bus. Fails when the place is taken.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        worker: Worker,
        host: Arc<dyn Host>,
        bus: &Arc<Bus>,
        slot: u8,
        bar: Option<u64>,
    ) -> Result<Arc<PciTransport>, DeviceError> {
        let about = device.about().clone();
        let queues = u16::try_from(about.queues.len()).unwrap_or(u16::MAX);
        let flags = Arc::new(Flags::default());
        let msix = Arc::new(Msix::new(Arc::clone(&host), queues.saturating_add(1).min(VECTORS_MAX)));
        let vectors = Arc::new(Vectors::new(Arc::clone(&flags), Arc::clone(&msix), queues));
        let front = Front::new(&about, &msix, bar);
        let interrupt = Arc::clone(&vectors) as Arc<dyn super::Interrupt>;
        let plug = Plug { device, memory, worker, host, flags: Arc::clone(&flags), interrupt, bells: None };
        let core = Mutex::new(Core::new(plug));
        let transport = Arc::new_cyclic(|own| PciTransport {
            about,
            slot,
            flags,
            msix,
            vectors,
            front: Mutex::new(front),
            core,
            bus: Arc::downgrade(bus),
            own: own.clone(),
        });
        let placed = transport.place(&mut transport.front());
        placed.map(|()| transport).map_err(|error| no_place(bar.unwrap_or(0), error))
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn front(&self) -> MutexGuard<'_, Front> {
        self.front.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the bus and the doorbells follow what configuration space says.
    fn place(&self, front: &mut Front) -> Result<(), BusError> {
        let wanted = front.config.bar();
        if wanted == front.wanted {
            return Ok(());
        }
        front.wanted = wanted;
        let (Some(bus), Some(own)) = (self.bus.upgrade(), self.own.upgrade()) else { return Ok(()) };
        if let Some(at) = front.placed.take() {
            bus.remove(at);
        }
        let inserted = wanted.map_or(Ok(()), |at| bus.insert(at, BAR_LENGTH, own));
        front.placed = wanted.filter(|_| inserted.is_ok());
        let bells = front.placed.and_then(|at| at.checked_add(NOTIFY));
        self.core().move_bells(bells.map(|base| Bells { base, stride: NOTIFY_STRIDE }));
        inserted
    }

    fn read_common(&self, offset: u64, len: usize) -> Option<u64> {
        let core = self.core();
        let queue = core.queue();
        let ring = |ring| queue.map_or(0, |queue| queue.address(ring));
        let index = core.select.queue;
        let value = match (offset, len) {
            (0x00, 4) => u64::from(core.select.offered),
            (0x04, 4) => u64::from(core.offered()),
            (0x08, 4) => u64::from(core.select.accepted),
            (0x0c, 4) => u64::from(core.accepted()),
            (0x10, 2) => u64::from(self.vectors.config()),
            (0x12, 2) => self.about.queues.len() as u64,
            (0x14, 1) => u64::from(core.status()),
            (0x15, 1) => u64::from(self.flags.generation() & 0xff),
            (0x16, 2) => u64::from(index),
            (0x18, 2) => queue.map_or(0, |queue| u64::from(queue.setup.size)),
            (0x1a, 2) => u64::from(self.vectors.queue(index)),
            (0x1c, 2) => queue.map_or(0, |queue| u64::from(queue.ready)),
            (0x1e, 2) => queue.map_or(0, |_| u64::from(index)),
            (0x20, 4 | 8) => ring(Ring::Desc),
            (0x24, 4) => ring(Ring::Desc) >> 32,
            (0x28, 4 | 8) => ring(Ring::Avail),
            (0x2c, 4) => ring(Ring::Avail) >> 32,
            (0x30, 4 | 8) => ring(Ring::Used),
            (0x34, 4) => ring(Ring::Used) >> 32,
            _ => return None,
        };
        Some(value)
    }

    fn write_common(&self, offset: u64, len: usize, value: u64) {
        let mut core = self.core();
        let (low, high) = (value as u32, (value >> 32) as u32);
        match (offset, len) {
            (0x00, 4) => core.select.offered = low,
            (0x08, 4) => core.select.accepted = low,
            (0x0c, 4) => core.accept(low),
            (0x10, 2) if !core.frozen() => self.vectors.set_config(low as u16),
            (0x14, 1) => {
                core.set_status(low as u8);
                if low == 0 {
                    self.vectors.clear();
                }
            }
            (0x16, 2) => core.select.queue = low,
            (0x1a, 2) if !core.frozen() => self.vectors.set_queue(core.select.queue, low as u16),
            (0x18, 2) => {
                if let Some(queue) = core.queue_mut() {
                    queue.set_size(low as u16);
                }
            }
            (0x1c, 2) => {
                // Writing 0 is not a way to take a queue back (section 4.1.4.3.2).
                if let Some(queue) = core.queue_mut().filter(|_| low == 1) {
                    queue.ready = true;
                }
            }
            (0x20..0x38, 4 | 8) if offset.is_multiple_of(len as u64) => {
                let Some(queue) = core.queue_mut() else { return };
                let ring = match offset & !7 {
                    0x20 => Ring::Desc,
                    0x28 => Ring::Avail,
                    _ => Ring::Used,
                };
                queue.set_address(ring, offset & 4 != 0, low);
                if len == 8 {
                    queue.set_address(ring, true, high);
                }
            }
            _ => {}
        }
    }
}

fn no_place(bar: u64, source: BusError) -> DeviceError {
    let what = format!("The BAR of a PCI device cannot be placed at {bar:#x}");
    DeviceError::Host { what, source: std::io::Error::other(source) }
}

impl Front {
    fn new(about: &About, msix: &Msix, bar: Option<u64>) -> Front {
        let mut config = Config::new(Identity {
            vendor: VENDOR,
            device: FIRST_DEVICE.wrapping_add(about.device_id as u16),
            class: about.pci_class,
            revision: 1,
        });
        config.set_bar(BAR_LENGTH, bar.map(|bar| bar & !(BAR_LENGTH - 1)));
        let mut add = |kind, offset: u64, length: u64, extra: &[u8], writable: &[u8]| {
            // Fields of `virtio_pci_cap` (section 4.1.4) behind id and link.
            let mut body = vec![16 + extra.len() as u8, kind, 0, 0, 0, 0];
            body.extend_from_slice(&(offset as u32).to_le_bytes());
            body.extend_from_slice(&(length as u32).to_le_bytes());
            body.extend_from_slice(extra);
            config.add_capability(VENDOR_CAPABILITY, &body, writable)
        };
        add(CFG_COMMON, COMMON, COMMON_LENGTH, &[], &[]);
        let bells = (NOTIFY_STRIDE * about.queues.len() as u64).clamp(NOTIFY_STRIDE, PAGE);
        add(CFG_NOTIFY, NOTIFY, bells, &(NOTIFY_STRIDE as u32).to_le_bytes(), &[]);
        add(CFG_ISR, ISR, 1, &[], &[]);
        if about.config_len > 0 {
            add(CFG_DEVICE, DEVICE, u64::from(about.config_len).min(PAGE), &[], &[]);
        }
        // BAR number, offset, length, and the window itself.
        let mut writable = [0xff; 18];
        writable[..2].fill(0);
        writable[3..6].fill(0);
        let access = add(CFG_ACCESS, 0, 0, &[0; 4], &writable);
        let (body, writable) = msix.capability(TABLE as u32, PENDING as u32);
        let msix = config.add_capability(msix::CAPABILITY, &body, &writable);
        Front { config, access, msix, wanted: None, placed: None }
    }

    /// Where in the BAR an access of `len` bytes at `offset` leads, if it is one to the
    /// window of the access capability (section 4.1.4.9) and that is set up for it.
    fn through(&self, offset: u16, len: usize) -> Option<u64> {
        let at = self.access;
        let (bar, target) = (self.config.word(at + 4) & 0xff, u64::from(self.config.dword(at + 8)));
        let length = self.config.dword(at + 12);
        let fits = matches!(length, 1 | 2 | 4) && length as usize == len;
        let inside = target.is_multiple_of(u64::from(length.max(1))) && target + 4 <= BAR_LENGTH;
        (offset == at + 16 && bar == 0 && fits && inside).then_some(target)
    }
}

impl Registers for PciTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (part, at) = (offset & !(PAGE - 1), offset & (PAGE - 1));
        match part {
            COMMON => {
                let value = self.read_common(at, data.len()).unwrap_or(u64::MAX).to_le_bytes();
                for (to, from) in data.iter_mut().zip(value) {
                    *to = from;
                }
            }
            ISR => {
                data.fill(0);
                if let (0, [status, ..]) = (at, data) {
                    // Reading takes it (section 4.1.4.5).
                    *status = self.flags.acknowledge(u32::MAX) as u8;
                }
            }
            DEVICE => self.core().read_config(at, data),
            TABLE => self.msix.read_table(at, data),
            PENDING => self.msix.read_pending(at, data),
            _ => data.fill(0),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (part, at) = (offset & !(PAGE - 1), offset & (PAGE - 1));
        match part {
            COMMON => {
                let mut value = [0; 8];
                for (to, from) in value.iter_mut().zip(data) {
                    *to = *from;
                }
                self.write_common(at, data.len(), u64::from_le_bytes(value));
            }
            DEVICE => self.core().write_config(at, data),
            NOTIFY if at.is_multiple_of(NOTIFY_STRIDE) => self.core().notify((at / NOTIFY_STRIDE) as u32),
            TABLE => self.msix.write_table(at, data),
            _ => {}
        }
    }
}

impl Function for PciTransport {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let front = self.front();
        match front.through(offset, data.len()) {
            Some(target) => self.read(target, data),
            None => front.config.read(offset, data),
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let mut front = self.front();
        if let Some(target) = front.through(offset, data.len()) {
            self.write(target, data);
            return;
        }
        front.config.write(offset, data);
        self.msix.set_control(front.config.word(front.msix + 2));
        if let Err(error) = self.place(&mut front) {
            log::debug!("The guest moved the BAR of PCI slot {} to where it cannot be: {error}", self.slot);
        }
    }

    fn unplug(&self) {
        let mut front = self.front();
        if let (Some(at), Some(bus)) = (front.placed.take(), self.bus.upgrade()) {
            bus.remove(at);
        }
        // Somebody may hold this for a while yet: memory is left alone from now on, and the
        // machine's owner may say "resume" to what has no driver any more.
        let mut core = self.core();
        if let Err(error) = core.pause() {
            log::error!("A device that was unplugged from PCI slot {} does not stop: {error}", self.slot);
        }
        core.set_status(0);
        core.move_bells(None);
    }
}

impl Transport for PciTransport {
    fn about(&self) -> &About {
        &self.about
    }
    fn location(&self) -> Location {
        Location::Pci { slot: self.slot }
    }
    fn pause(&self) -> Result<(), DeviceError> {
        self.core().pause()
    }
    fn resume(&self) -> Result<(), DeviceError> {
        self.core().resume()
    }
    fn save(&self) -> Result<Vec<Section>, DeviceError> {
        self.save_all()
    }
    fn restore(&self, sections: &[Section]) -> Result<(), DeviceError> {
        self.restore_all(sections)
    }
    fn update(&self, change: &Change) -> Result<(), DeviceError> {
        self.core().update(change)
    }
    fn driven(&self) -> bool {
        self.core().driven()
    }
    fn sever(&self) {
        self.core().sever();
    }
    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.core().counters()
    }
    fn report(&self) -> Report {
        self.core().report()
    }
    fn watch(&self, witness: Witness) {
        self.flags.watch(witness);
    }
}
