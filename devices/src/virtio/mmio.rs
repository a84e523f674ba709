//! Virtio over memory-mapped registers, version 2 (VIRTIO 1.2 section 4.2).
//!
//! ```text
//!   base+0x000  identification         base+0x060  interrupt status and acknowledge
//!       +0x010  features                   +0x070  device status
//!       +0x030  one queue at a time        +0x0b0  shared memory (none)
//!       +0x050  doorbell of all queues     +0x100  device configuration
//! ```
//!
//! All meaning is in [`Core`]; here is only where it is found. The registers are 32 bits wide
//! and take nothing else (section 4.2.2.2); other accesses read as all ones and are dropped.
//! The configuration takes any width.
//!
//! The doorbell register has one event descriptor for each started queue, matched by the
//! value written, so that a notification wakes a worker without this code. The interrupt is
//! an edge on a line after the status bit is set: each event gives a new edge, so a driver
//! that acknowledges between two of them misses none.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::{
    Memory,
    bus::Registers,
    host::Host,
    state::Section,
    trouble::{Trouble, Witness},
    virtio::{
        About, Change, DeviceError, Interrupt, Report, VirtioDevice,
        core::{Bells, Core, Flags, ISR_CONFIG, ISR_QUEUE, Location, Plug, Ring, Transport},
    },
    worker::Worker,
};

/// Bytes of address space that one device takes.
pub const LENGTH: u64 = 0x1000;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"ncll");

const DEVICE_ID: u64 = 0x08;
const VENDOR_ID: u64 = 0x0c;
const DEVICE_FEATURES: u64 = 0x10;
const DEVICE_FEATURES_SEL: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SEL: u64 = 0x24;
const QUEUE_SEL: u64 = 0x30;
const QUEUE_NUM_MAX: u64 = 0x34;
const QUEUE_NUM: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const QUEUE_NOTIFY: u64 = 0x50;
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;
const STATUS: u64 = 0x70;
const QUEUE_DESC: u64 = 0x80;
const QUEUE_DRIVER: u64 = 0x90;
const QUEUE_DEVICE: u64 = 0xa0;
const SHM_FIRST: u64 = 0xb0;
const SHM_LAST: u64 = 0xbc;
const CONFIG_GENERATION: u64 = 0xfc;
const CONFIG: u64 = 0x100;

/// A virtio device behind memory-mapped registers.
pub struct MmioTransport {
    about: About,
    base: u64,
    gsi: u32,
    flags: Arc<Flags>,
    line: Arc<Line>,
    core: Mutex<Core>,
}

impl MmioTransport {
    /// Plugs `device` in with its registers at `base` ([`LENGTH`] bytes) and its interrupt on
    /// line `gsi`. The caller puts the result on the bus. Fails when the line cannot be made.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        worker: Worker,
        host: Arc<dyn Host>,
        base: u64,
        gsi: u32,
    ) -> Result<Arc<MmioTransport>, DeviceError> {
        let line = host.line(gsi).map_err(|source| {
            let what = format!("Interrupt line {gsi} cannot be given to a {}", device.about().kind);
            DeviceError::Host { what, source }
        })?;
        let flags = Arc::new(Flags::default());
        let line = Arc::new(Line { flags: Arc::clone(&flags), line });
        let interrupt = Arc::clone(&line) as Arc<dyn Interrupt>;
        let about = device.about().clone();
        let bells = Some(Bells { base: base.wrapping_add(QUEUE_NOTIFY), stride: 0 });
        let plug = Plug { device, memory, worker, host, flags: Arc::clone(&flags), interrupt, bells };
        Ok(Arc::new(MmioTransport { about, base, gsi, flags, line, core: Mutex::new(Core::new(plug)) }))
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, offset: u64) -> u32 {
        match offset {
            0 => MAGIC,
            4 => VERSION,
            DEVICE_ID => self.about.device_id,
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => self.core().offered(),
            QUEUE_NUM_MAX => self.core().queue().map_or(0, |queue| u32::from(queue.max)),
            QUEUE_READY => self.core().queue().map_or(0, |queue| u32::from(queue.ready)),
            INTERRUPT_STATUS => self.flags.isr(),
            STATUS => u32::from(self.core().status()),
            // A shared memory region that does not exist has a length of all ones.
            SHM_FIRST..=SHM_LAST => u32::MAX,
            CONFIG_GENERATION => self.flags.generation(),
            _ => 0,
        }
    }

    fn set(&self, offset: u64, value: u32) {
        if offset == INTERRUPT_ACK {
            self.flags.acknowledge(value);
            return;
        }
        let mut core = self.core();
        match offset {
            DEVICE_FEATURES_SEL => core.select.offered = value,
            DRIVER_FEATURES => core.accept(value),
            DRIVER_FEATURES_SEL => core.select.accepted = value,
            QUEUE_SEL => core.select.queue = value,
            QUEUE_NOTIFY => core.notify(value),
            STATUS => {
                if let Ok(status) = u8::try_from(value) {
                    core.set_status(status);
                }
            }
            _ => {
                let Some(queue) = core.queue_mut() else { return };
                match offset {
                    QUEUE_NUM => queue.set_size(u16::try_from(value).unwrap_or(0)),
                    QUEUE_READY => queue.ready = value == 1,
                    _ => {
                        let ring = match offset & !4 {
                            QUEUE_DESC => Ring::Desc,
                            QUEUE_DRIVER => Ring::Avail,
                            QUEUE_DEVICE => Ring::Used,
                            _ => return,
                        };
                        queue.set_address(ring, offset & 4 != 0, value);
                    }
                }
            }
        }
    }
}

impl Registers for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.core().read_config(offset, data);
            return;
        }
        data.fill(0xff);
        if let (Ok(word), true) = (<&mut [u8; 4]>::try_from(data), offset.is_multiple_of(4)) {
            *word = self.get(offset).to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.core().write_config(offset, data);
        } else if let (Ok(word), true) = (<[u8; 4]>::try_from(data), offset.is_multiple_of(4)) {
            self.set(offset, u32::from_le_bytes(word));
        }
    }
}

impl Transport for MmioTransport {
    fn about(&self) -> &About {
        &self.about
    }
    fn location(&self) -> Location {
        Location::Mmio { base: self.base, gsi: self.gsi }
    }
    fn pause(&self) -> Result<(), DeviceError> {
        self.core().pause()
    }
    fn resume(&self) -> Result<(), DeviceError> {
        self.core().resume()?;
        // The edge of an event that the driver has not seen may have been on its way from the
        // descriptor to the interrupt controller when that was saved. One more harms nobody.
        if self.flags.isr() != 0 {
            self.line.raise(0);
        }
        Ok(())
    }
    fn save(&self) -> Result<Vec<Section>, DeviceError> {
        self.core().save()
    }
    fn restore(&self, sections: &[Section]) -> Result<(), DeviceError> {
        self.core().restore(sections)
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

/// An interrupt line with its status bits.
struct Line {
    flags: Arc<Flags>,
    line: EventFd,
}

impl Line {
    fn raise(&self, bits: u32) {
        self.flags.raise(bits);
        self.flags.count_interrupt();
        // Fails only when the counter is full: then an edge is on its way already.
        let _ = self.line.write(1);
    }
}

impl Interrupt for Line {
    fn queue(&self, _index: u16) {
        self.raise(ISR_QUEUE);
    }
    fn config(&self) {
        self.flags.config_changed();
        self.raise(ISR_CONFIG);
    }
    fn trouble(&self, trouble: Trouble) {
        self.flags.report(trouble);
    }
    fn needs_reset(&self) {
        if self.flags.set_needs_reset() {
            self.raise(ISR_CONFIG);
        }
    }
}
