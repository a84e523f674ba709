//! The first 256 bytes of a function's configuration space (PCI 3.0 chapter 6).
//!
//! Bytes and, for each, the bits software may change. That is all: read-only fields need no
//! case of their own, and the size of a BAR shows by itself, because the address bits below
//! its size cannot be set. The extended space behind it reads as zero, which means that there
//! are no extended capabilities.

/// Bytes of a conventional configuration space.
pub const LENGTH: usize = 256;
/// Offset of the first base address register.
pub const BAR0: u16 = 0x10;

const COMMAND: u16 = 0x04;
const STATUS: u16 = 0x06;
const CAPABILITIES: u16 = 0x34;
/// Memory decode, bus master, and interrupt line disable.
const COMMAND_WRITABLE: u16 = 0x0406;
const COMMAND_MEMORY: u16 = 2;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const FIRST_CAPABILITY: u8 = 0x40;
const BAR_64_BIT: u64 = 4;

/// What a function says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor of the function, and of the subsystem.
    pub vendor: u16,
    /// Device number given by the vendor, also for the subsystem.
    pub device: u16,
    /// Class, subclass and programming interface as `0xCCSSPP`.
    pub class: u32,
    /// Revision.
    pub revision: u8,
}

/// A type 0 configuration space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    bytes: [u8; LENGTH],
    writable: [u8; LENGTH],
    next: u8,
    last: u16,
}

impl Config {
    /// A space with a header and nothing else: no BAR, no capability, memory decode off.
    pub fn new(identity: Identity) -> Config {
        let mut config =
            Config { bytes: [0; LENGTH], writable: [0; LENGTH], next: FIRST_CAPABILITY, last: CAPABILITIES };
        let Identity { vendor, device, class, revision } = identity;
        config.put(0x00, &vendor.to_le_bytes());
        config.put(0x02, &device.to_le_bytes());
        config.put(0x08, &(class << 8 | u32::from(revision)).to_le_bytes());
        config.put(0x2c, &vendor.to_le_bytes());
        config.put(0x2e, &device.to_le_bytes());
        config.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        // Operating systems keep notes in the cache line size and the interrupt line.
        config.allow(0x0c, &[0xff]);
        config.allow(0x3c, &[0xff]);
        config
    }

    /// Makes BARs 0 and 1 one 64-bit memory BAR of `size` bytes (a power of two, at least 16).
    /// With an `address`, a multiple of it, the BAR lies there and memory decode is on; without,
    /// both are left to software.
    pub fn set_bar(&mut self, size: u64, address: Option<u64>) {
        self.put(BAR0, &(address.unwrap_or(0) | BAR_64_BIT).to_le_bytes());
        self.allow(BAR0, &(!(size - 1) & !15).to_le_bytes());
        if address.is_some() {
            let command = self.word(COMMAND) | COMMAND_MEMORY;
            self.put(COMMAND, &command.to_le_bytes());
        }
    }

    /// Where the memory BAR is decoded; `None` while decode is off or the address is 0.
    pub fn bar(&self) -> Option<u64> {
        let address = u64::from(self.dword(BAR0 + 4)) << 32 | u64::from(self.dword(BAR0) & !15);
        (self.word(COMMAND) & COMMAND_MEMORY != 0 && address != 0).then_some(address)
    }

    /// Appends a capability: `body` follows its id and link, and software may change the bits
    /// of it that are set in `writable`, as far as that goes. Returns its offset.
    ///
    /// # Panics
    /// When the space is full, which is a mistake of the device's author.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        let at = u16::from(self.next);
        let end = usize::from(at) + 2 + body.len();
        assert!(end <= LENGTH, "the capabilities do not fit into configuration space");
        self.put(self.last, &[self.next]);
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        self.last = at + 1;
        self.next = end.next_multiple_of(4).min(0xfc) as u8;
        let status = self.word(STATUS) | STATUS_CAPABILITIES;
        self.put(STATUS, &status.to_le_bytes());
        at
    }

    /// Fills `data` from `offset` on; zero beyond the end.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(usize::from(offset)..) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// Writes what may be written of `data` at `offset`.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (new, at) in data.iter().zip(usize::from(offset)..) {
            if let (Some(byte), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = *byte & !mask | new & mask;
            }
        }
    }

    /// The 16-bit field at `offset`.
    pub fn word(&self, offset: u16) -> u16 {
        let mut data = [0; 2];
        self.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// The 32-bit field at `offset`.
    pub fn dword(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// All bytes, for saving; [`Config::write`] at 0 takes them back.
    pub fn bytes(&self) -> &[u8; LENGTH] {
        &self.bytes
    }

    fn put(&mut self, offset: u16, data: &[u8]) {
        let at = usize::from(offset);
        self.bytes[at..at + data.len()].copy_from_slice(data);
    }

    fn allow(&mut self, offset: u16, mask: &[u8]) {
        let at = usize::from(offset);
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        let identity = Identity { vendor: 0x1af4, device: 0x1041, class: 0x02_0000, revision: 1 };
        let mut config = Config::new(identity);
        config.set_bar(0x8000, Some(0x1_c100_0000));
        config
    }

    #[test]
    fn a_bar_shows_its_size_and_moves() {
        let mut config = config();
        assert_eq!(config.bar(), Some(0x1_c100_0000));
        config.write(BAR0, &[0xff; 8]);
        assert_eq!((config.dword(BAR0), config.dword(BAR0 + 4)), (0xffff_8004, 0xffff_ffff));
        config.write(BAR0, &0xd000_1234_u32.to_le_bytes());
        config.write(BAR0 + 4, &[0; 4]);
        assert_eq!(config.bar(), Some(0xd000_0000));
        config.write(4, &[0, 0]);
        assert_eq!(config.bar(), None);
    }

    #[test]
    fn what_is_read_only_stays() {
        let mut config = config();
        let offset = config.add_capability(9, &[16, 1, 0], &[0, 0xf0]);
        let before = config.clone();
        for at in (0..256).filter(|at| !(4..6).contains(at) && !(0x10..0x18).contains(at)) {
            config.write(at, &[0xff]);
        }
        assert_eq!((config.dword(0), config.dword(8)), (before.dword(0), 0x0200_0001));
        assert_eq!(config.dword(offset), 0xf110_0009);
        config.write(4, &[0xff; 2]);
        assert_eq!(config.word(4), 0x0406);
    }

    #[test]
    fn capabilities_are_linked_in_order_and_the_rest_reads_zero() {
        let mut config = config();
        assert_eq!(config.word(6) & 0x10, 0);
        let first = config.add_capability(0x11, &[0; 10], &[]);
        let second = config.add_capability(9, &[0; 14], &[]);
        assert_eq!(config.word(0x34) & 0xff, first);
        assert_eq!(config.word(first), second << 8 | 0x11);
        assert_eq!(config.word(second), 9);
        assert_eq!(config.word(6) & 0x10, 0x10);
        let mut data = [7; 8];
        config.read(0xfc, &mut data);
        assert_eq!(data, [0; 8]);
        config.write(0xfff8, &data);
    }
}
