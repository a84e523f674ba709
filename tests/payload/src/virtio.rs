//! A virtio device behind memory-mapped registers (VIRTIO 1.2 section 4.2), from the driver's
//! side.

use crate::ring::Ring;

const MAGIC: usize = 0x00;
const DEVICE_ID: usize = 0x08;
const DEVICE_FEATURES: usize = 0x10;
const DEVICE_FEATURES_SEL: usize = 0x14;
const DRIVER_FEATURES: usize = 0x20;
const DRIVER_FEATURES_SEL: usize = 0x24;
const QUEUE_SEL: usize = 0x30;
const QUEUE_NUM: usize = 0x38;
const QUEUE_READY: usize = 0x44;
const QUEUE_NOTIFY: usize = 0x50;
const STATUS: usize = 0x70;
const QUEUE_DESC: usize = 0x80;
const QUEUE_DRIVER: usize = 0x90;
const QUEUE_DEVICE: usize = 0xa0;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;

/// `VIRTIO_F_VERSION_1` and `VIRTIO_F_EVENT_IDX`: taken from every device.
const COMMON: u64 = 1 << 32 | 1 << 29;

/// A device, by the address of its registers.
#[derive(Clone, Copy)]
pub struct Device(usize);

impl Device {
    /// Resets the device of kind `id` at `base` and accepts of its features those in `wanted`.
    pub fn start(base: usize, id: u32, wanted: u64) -> Device {
        let device = Device(base);
        assert!(device.get(MAGIC) == u32::from_le_bytes(*b"virt") && device.get(DEVICE_ID) == id);
        device.set(STATUS, 0);
        device.set(STATUS, ACKNOWLEDGE | DRIVER);
        for half in 0..2 {
            device.set(DEVICE_FEATURES_SEL, half);
            let offered = device.get(DEVICE_FEATURES);
            device.set(DRIVER_FEATURES_SEL, half);
            device.set(DRIVER_FEATURES, offered & ((COMMON | wanted) >> (32 * half)) as u32);
        }
        device.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert!(device.get(STATUS) & FEATURES_OK != 0);
        device
    }

    /// Gives queue `index` its ring.
    pub fn queue(self, index: u32, ring: &Ring) {
        self.set(QUEUE_SEL, index);
        self.set(QUEUE_NUM, u32::from(ring.size()));
        let (descriptors, available, used) = ring.addresses();
        for (register, address) in
            [(QUEUE_DESC, descriptors), (QUEUE_DRIVER, available), (QUEUE_DEVICE, used)]
        {
            self.set(register, address as u32);
            self.set(register + 4, (address >> 32) as u32);
        }
        self.set(QUEUE_READY, 1);
    }

    /// Lets it work.
    pub fn go(self) {
        self.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Tells it that queue `index` has something.
    pub fn kick(self, index: u32) {
        self.set(QUEUE_NOTIFY, index);
    }

    fn get(self, register: usize) -> u32 {
        // SAFETY: the bench said that a device's page is there; no memory is touched.
        unsafe { ((self.0 + register) as *const u32).read_volatile() }
    }

    fn set(self, register: usize, value: u32) {
        // SAFETY: as above; what the device then writes, it writes into rings and buffers
        // that are given to it and accessed by volatile or atomic operations only.
        unsafe { ((self.0 + register) as *mut u32).write_volatile(value) };
    }
}
