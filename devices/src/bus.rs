//! From an address to the device that answers there.
//!
//! Two buses exist in a machine, memory and I/O ports, of the same type. A vCPU that leaves
//! the guest because of a register access looks its address up here. The table changes only
//! when a device is plugged or moved, so lookups share a read lock and hold it just long
//! enough to clone one reference: a device is never called with the table locked, and may
//! change the table from inside its own register (a PCI BAR being moved does).
//!
//! Lock order: none is needed. The table's lock is never held across a call.
//!
//! Rules for hostile accesses live here once instead of in every device: an address nobody
//! owns reads as all ones and swallows writes; an access that runs past the end of a device
//! is treated as unowned; sizes other than 1 to 8 bytes never reach a device.

use std::sync::{Arc, PoisonError, RwLock};

/// The register half of a device. `offset` counts from the start of the range it was
/// inserted with; `data` is 1 to 8 bytes and lies inside the range. Values are little-endian.
pub trait Registers: Send + Sync {
    /// Fills `data` from the register at `offset`.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes `data` to the register at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a range could not be inserted.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// Another device answers in part of the range.
    #[error("Bus range {base:#x}+{len:#x} overlaps a device at {other:#x}")]
    Overlap {
        /// First address asked for.
        base: u64,
        /// Length asked for, in bytes.
        len: u64,
        /// First address of the device in the way.
        other: u64,
    },
    /// The range is empty or runs past the last address.
    #[error("Bus range {base:#x}+{len:#x} is empty or wraps around")]
    Range {
        /// First address asked for.
        base: u64,
        /// Length asked for, in bytes.
        len: u64,
    },
}

struct Entry {
    base: u64,
    last: u64,
    device: Arc<dyn Registers>,
}

/// A table of devices by address.
#[derive(Default)]
pub struct Bus {
    entries: RwLock<Vec<Entry>>,
}

impl Bus {
    /// An empty bus.
    pub fn new() -> Bus {
        Bus::default()
    }

    /// Lets `device` answer from `base` for `len` bytes.
    pub fn insert(&self, base: u64, len: u64, device: Arc<dyn Registers>) -> Result<(), BusError> {
        let last =
            len.checked_sub(1).and_then(|n| base.checked_add(n)).ok_or(BusError::Range { base, len })?;
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        let at = entries.partition_point(|e| e.base < base);
        for near in [at.checked_sub(1), Some(at)].into_iter().flatten().filter_map(|i| entries.get(i)) {
            if near.base <= last && base <= near.last {
                return Err(BusError::Overlap { base, len, other: near.base });
            }
        }
        entries.insert(at, Entry { base, last, device });
        Ok(())
    }

    /// Takes away the device whose range starts at `base`; says whether there was one.
    pub fn remove(&self, base: u64) -> bool {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        let found = entries.iter().position(|e| e.base == base);
        found.map(|i| entries.remove(i)).is_some()
    }

    /// Reads `data.len()` bytes at `address`; all ones where nobody answers.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes `data` at `address`; returns false, and drops it, where nobody answers.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(Arc<dyn Registers>, u64)> {
        if !(1..=8).contains(&len) {
            return None;
        }
        let last = address.checked_add(len as u64 - 1)?;
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        let entry = entries.get(entries.partition_point(|e| e.base <= address).checked_sub(1)?)?;
        (last <= entry.last).then(|| (Arc::clone(&entry.device), address - entry.base))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    struct Echo(Mutex<Vec<(u64, Vec<u8>)>>);

    impl Registers for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    fn bus() -> (Bus, Arc<Echo>) {
        let echo = Arc::new(Echo(Mutex::default()));
        let bus = Bus::new();
        bus.insert(0x1000, 0x10, echo.clone()).unwrap();
        (bus, echo)
    }

    #[test]
    fn an_access_reaches_the_device_with_its_offset() {
        let (bus, echo) = bus();
        let mut data = [0; 4];
        bus.read(0x1004, &mut data);
        assert_eq!(data, [4; 4]);
        assert!(bus.write(0x100c, &[1, 2, 3, 4]));
        assert_eq!(*echo.0.lock().unwrap(), [(0xc, vec![1, 2, 3, 4])]);
    }

    #[test]
    fn unowned_short_and_straddling_accesses_read_as_ones() {
        let (bus, echo) = bus();
        for (address, len) in [(0xfff, 1), (0x100d, 4), (0x1010, 1), (u64::MAX, 8), (0x1000, 16)] {
            let mut data = vec![0; len];
            bus.read(address, &mut data);
            assert!(data.iter().all(|b| *b == 0xff), "{address:#x}+{len}");
            assert!(!bus.write(address, &data));
        }
        assert!(echo.0.lock().unwrap().is_empty());
    }

    #[test]
    fn overlaps_and_empty_ranges_are_refused() {
        let (bus, echo) = bus();
        for (base, len) in [(0x1000, 0x10), (0xff8, 9), (0x100f, 1), (0, 0x2000)] {
            assert!(matches!(bus.insert(base, len, echo.clone()), Err(BusError::Overlap { .. })));
        }
        assert!(matches!(bus.insert(0, 0, echo.clone()), Err(BusError::Range { .. })));
        assert!(matches!(bus.insert(u64::MAX, 2, echo.clone()), Err(BusError::Range { .. })));
        bus.insert(0x1010, 1, echo).unwrap();
        assert!(bus.remove(0x1010) && !bus.remove(0x1010));
    }
}
