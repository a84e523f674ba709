//! The registers of a transport as the driver uses them.
//!
//! A test written against [`Face`] runs on both transports: the two differ only in where a
//! register is found.

use std::sync::Arc;

use super::Bench;
use crate::{
    bus::{Bus, Registers},
    host::Doorbell,
    virtio::queue::QueueSetup,
};

/// What a driver does with a transport.
pub trait Face {
    /// Device status (VIRTIO 1.2 section 2.1).
    fn status(&self) -> u8;
    /// Writes the device status; 0 resets.
    fn set_status(&self, status: u8);
    /// Features offered.
    fn features(&self) -> u64;
    /// Writes the features accepted.
    fn accept(&self, features: u64);
    /// Largest size of queue `index`; 0 when there is none.
    fn queue_max(&self, index: u16) -> u16;
    /// Writes size and addresses of queue `index` and enables it.
    fn set_queue(&self, index: u16, setup: &QueueSetup);
    /// Whether queue `index` is enabled, as the device sees it.
    fn queue_ready(&self, index: u16) -> bool;
    /// Rings the doorbell of queue `index` the way a guest does.
    fn notify(&self, index: u16);
    /// Reads the device configuration.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes the device configuration.
    fn write_config(&self, offset: u64, data: &[u8]);
    /// Configuration generation.
    fn generation(&self) -> u32;

    /// Goes through the whole set-up of VIRTIO 1.2 section 3.1.1 with `features` of those
    /// offered, and the queues given; returns the status read back at the end.
    fn set_up(&self, features: u64, queues: &[QueueSetup]) -> u8 {
        self.set_status(0);
        self.set_status(1);
        self.set_status(3);
        self.accept(self.features() & features);
        self.set_status(0xb);
        for (index, setup) in queues.iter().enumerate() {
            self.set_queue(index as u16, setup);
        }
        self.set_status(0xf);
        self.status()
    }
}

/// Reads a little-endian number of `len` bytes from a bus.
fn get(bus: &Bus, at: u64, len: usize) -> u64 {
    let mut data = [0; 8];
    bus.read(at, &mut data[..len]);
    u64::from_le_bytes(data)
}

/// The driver's view of a virtio-mmio device (VIRTIO 1.2 section 4.2.2).
pub struct MmioFace {
    bus: Bus,
    base: u64,
    bench: Arc<Bench>,
}

impl MmioFace {
    /// Drives `device`, whose registers lie at `base` of the machine `bench`.
    pub fn new(device: Arc<dyn Registers>, base: u64, bench: Arc<Bench>) -> MmioFace {
        let bus = Bus::new();
        bus.insert(base, 0x1000, device).expect("an empty bus");
        MmioFace { bus, base, bench }
    }

    /// Reads the 32-bit register at `offset`.
    pub fn get(&self, offset: u64) -> u32 {
        get(&self.bus, self.base + offset, 4) as u32
    }

    /// Writes the 32-bit register at `offset`.
    pub fn set(&self, offset: u64, value: u32) {
        self.bus.write(self.base + offset, &value.to_le_bytes());
    }
}

impl Face for MmioFace {
    fn status(&self) -> u8 {
        self.get(0x70) as u8
    }
    fn set_status(&self, status: u8) {
        self.set(0x70, u32::from(status));
    }
    fn features(&self) -> u64 {
        self.set(0x14, 1);
        let high = u64::from(self.get(0x10));
        self.set(0x14, 0);
        high << 32 | u64::from(self.get(0x10))
    }
    fn accept(&self, features: u64) {
        for (half, value) in [features as u32, (features >> 32) as u32].into_iter().enumerate() {
            self.set(0x24, half as u32);
            self.set(0x20, value);
        }
    }
    fn queue_max(&self, index: u16) -> u16 {
        self.set(0x30, u32::from(index));
        self.get(0x34) as u16
    }
    fn set_queue(&self, index: u16, setup: &QueueSetup) {
        self.set(0x30, u32::from(index));
        self.set(0x38, u32::from(setup.size));
        for (offset, address) in [(0x80, setup.desc), (0x90, setup.avail), (0xa0, setup.used)] {
            self.set(offset, address as u32);
            self.set(offset + 4, (address >> 32) as u32);
        }
        self.set(0x44, 1);
    }
    fn queue_ready(&self, index: u16) -> bool {
        self.set(0x30, u32::from(index));
        self.get(0x44) == 1
    }
    fn notify(&self, index: u16) {
        if !self.bench.ring(Doorbell::Mmio(self.base + 0x50), u32::from(index)) {
            self.set(0x50, u32::from(index));
        }
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.bus.read(self.base + 0x100 + offset, data);
    }
    fn write_config(&self, offset: u64, data: &[u8]) {
        self.bus.write(self.base + 0x100 + offset, data);
    }
    fn generation(&self) -> u32 {
        self.get(0xfc)
    }
}

/// The driver's view of a modern virtio-pci device (VIRTIO 1.2 section 4.1): the structures
/// are found through its capabilities, as a guest finds them.
pub struct PciFace {
    bus: Arc<Bus>,
    ecam: u64,
    bench: Arc<Bench>,
    /// Guest addresses of common, notify, isr and device configuration.
    common: u64,
    notify: (u64, u64),
    isr: u64,
    config: u64,
}

impl PciFace {
    /// Drives the function whose configuration space lies at `ecam` on the memory bus.
    ///
    /// # Panics
    /// When it has no complete set of virtio capabilities.
    pub fn new(bus: Arc<Bus>, ecam: u64, bench: Arc<Bench>) -> PciFace {
        let mut face = PciFace { bus, ecam, bench, common: 0, notify: (0, 0), isr: 0, config: 0 };
        // Memory decode and bus master on.
        face.set(4, 2, 6);
        face.locate();
        face
    }

    /// Looks the structures up again, as after a move of the BAR.
    ///
    /// # Panics
    /// When the list of capabilities is not complete.
    pub fn locate(&mut self) {
        let mut at = self.get(0x34, 1);
        while at != 0 {
            if self.get(at, 1) == 9 {
                let bar = 0x10 + 4 * self.get(at + 4, 1);
                let low = self.get(bar, 4);
                let high = if low & 4 != 0 { self.get(bar + 4, 4) } else { 0 };
                let place = (high << 32 | low & !15) + self.get(at + 8, 4);
                match self.get(at + 3, 1) {
                    1 => self.common = place,
                    2 => self.notify = (place, self.get(at + 16, 4)),
                    3 => self.isr = place,
                    4 => self.config = place,
                    _ => {}
                }
            }
            at = self.get(at + 1, 1);
        }
        assert!(self.common != 0 && self.notify.0 != 0 && self.isr != 0, "a capability is missing");
    }

    /// Reads `len` bytes at `offset` of the configuration space.
    pub fn get(&self, offset: u64, len: usize) -> u64 {
        get(&self.bus, self.ecam + offset, len)
    }

    /// Writes `len` bytes at `offset` of the configuration space.
    pub fn set(&self, offset: u64, len: usize, value: u64) {
        self.bus.write(self.ecam + offset, &value.to_le_bytes()[..len]);
    }

    /// Reads `len` bytes at `offset` of the common configuration.
    pub fn common(&self, offset: u64, len: usize) -> u64 {
        get(&self.bus, self.common + offset, len)
    }

    /// Writes `len` bytes at `offset` of the common configuration.
    pub fn set_common(&self, offset: u64, len: usize, value: u64) {
        self.bus.write(self.common + offset, &value.to_le_bytes()[..len]);
    }

    /// Reads the interrupt status, which clears it.
    pub fn isr(&self) -> u8 {
        get(&self.bus, self.isr, 1) as u8
    }

    /// Programs MSI-X vector `vector` with `address` and `data`, unmasked, turns MSI-X on,
    /// and gives the vector to queue `queue`, or to configuration changes where that is
    /// `None`; returns the vector read back.
    ///
    /// # Panics
    /// When there is no MSI-X capability.
    pub fn set_vector(&self, vector: u16, address: u64, data: u32, queue: Option<u16>) -> u16 {
        let mut at = self.get(0x34, 1);
        while at != 0 && self.get(at, 1) != 0x11 {
            at = self.get(at + 1, 1);
        }
        assert_ne!(at, 0, "no MSI-X capability");
        let table = self.get(at + 4, 4);
        let bar = 0x10 + 4 * (table & 7);
        let low = self.get(bar, 4);
        let high = if low & 4 != 0 { self.get(bar + 4, 4) } else { 0 };
        let entry = (high << 32 | low & !15) + (table & !7) + 16 * u64::from(vector);
        let words = [address as u32, (address >> 32) as u32, data, 0];
        for (i, word) in words.into_iter().enumerate() {
            self.bus.write(entry + 4 * i as u64, &word.to_le_bytes());
        }
        self.set(at + 2, 2, 0x8000);
        match queue {
            Some(queue) => {
                self.set_common(0x16, 2, u64::from(queue));
                self.set_common(0x1a, 2, u64::from(vector));
                self.common(0x1a, 2) as u16
            }
            None => {
                self.set_common(0x10, 2, u64::from(vector));
                self.common(0x10, 2) as u16
            }
        }
    }
}

impl Face for PciFace {
    fn status(&self) -> u8 {
        self.common(0x14, 1) as u8
    }
    fn set_status(&self, status: u8) {
        self.set_common(0x14, 1, u64::from(status));
    }
    fn features(&self) -> u64 {
        self.set_common(0, 4, 1);
        let high = self.common(4, 4);
        self.set_common(0, 4, 0);
        high << 32 | self.common(4, 4)
    }
    fn accept(&self, features: u64) {
        for (half, value) in [features & 0xffff_ffff, features >> 32].into_iter().enumerate() {
            self.set_common(8, 4, half as u64);
            self.set_common(12, 4, value);
        }
    }
    fn queue_max(&self, index: u16) -> u16 {
        self.set_common(0x16, 2, u64::from(index));
        self.common(0x18, 2) as u16
    }
    fn set_queue(&self, index: u16, setup: &QueueSetup) {
        self.set_common(0x16, 2, u64::from(index));
        self.set_common(0x18, 2, u64::from(setup.size));
        for (offset, address) in [(0x20, setup.desc), (0x28, setup.avail), (0x30, setup.used)] {
            self.set_common(offset, 4, address & 0xffff_ffff);
            self.set_common(offset + 4, 4, address >> 32);
        }
        self.set_common(0x1c, 2, 1);
    }
    fn queue_ready(&self, index: u16) -> bool {
        self.set_common(0x16, 2, u64::from(index));
        self.common(0x1c, 2) == 1
    }
    fn notify(&self, index: u16) {
        self.set_common(0x16, 2, u64::from(index));
        let at = self.notify.0 + self.notify.1 * self.common(0x1e, 2);
        if !self.bench.ring(Doorbell::Mmio(at), u32::from(index)) {
            self.bus.write(at, &index.to_le_bytes());
        }
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.bus.read(self.config + offset, data);
    }
    fn write_config(&self, offset: u64, data: &[u8]) {
        self.bus.write(self.config + offset, data);
    }
    fn generation(&self) -> u32 {
        self.common(0x15, 1) as u32
    }
}
