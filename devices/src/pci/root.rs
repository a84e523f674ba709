//! Bus 0 behind an ECAM window (PCI Express 3.0 section 7.2.2).
//!
//! ```text
//!   offset in the window:  bus(27..20)  device(19..15)  function(14..12)  register(11..0)
//! ```
//!
//! Whatever is not there reads as all ones, which is how an operating system finds out.
//!
//! Slot 0, where a PC has its host bridge, stays empty. The bridge of a bus is what firmware tables
//! describe, and no part of the bus; a function that shows it has nothing to drive, and finding it
//! was measured to cost a guest sixty-seven exits: more than twice what it costs it to learn of 31
//! slots that can be filled later (`hotplug.rs`).

use std::sync::{Arc, PoisonError, RwLock};

use super::Function;
use crate::bus::Registers;

/// Slots of the bus; slot 0 stays empty.
pub const SLOTS: u8 = 32;

const SPACE: u64 = 4096;

/// Why a slot could not be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SlotError {
    /// There is something in it.
    #[error("PCI slot {0} is taken")]
    Taken(u8),
    /// There is no such slot.
    #[error("PCI slot {0} does not exist; devices go into slots 1 to 31")]
    Range(u8),
}

/// The root bus. Insert it into the memory bus at the ECAM address, 1 MiB long (one bus).
pub struct Root {
    slots: RwLock<Vec<Option<Arc<dyn Function>>>>,
}

impl Root {
    /// An empty bus.
    pub fn new() -> Root {
        Root { slots: RwLock::new(vec![None; usize::from(SLOTS)]) }
    }

    /// Puts `function` into `slot`.
    pub fn add(&self, slot: u8, function: Arc<dyn Function>) -> Result<(), SlotError> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        match slots.get_mut(usize::from(slot)).filter(|_| slot != 0) {
            Some(Some(_)) => Err(SlotError::Taken(slot)),
            Some(place) => {
                *place = Some(function);
                Ok(())
            }
            None => Err(SlotError::Range(slot)),
        }
    }

    /// Takes the function out of `slot`.
    pub fn remove(&self, slot: u8) -> Option<Arc<dyn Function>> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        slots.get_mut(usize::from(slot))?.take()
    }

    /// The lowest empty slot.
    pub fn free_slot(&self) -> Option<u8> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        (0..SLOTS).zip(slots.iter()).skip(1).find_map(|(slot, place)| place.is_none().then_some(slot))
    }

    /// The slots that hold something, one bit each.
    pub fn taken(&self) -> u32 {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let bits = (0..).zip(slots.iter()).filter(|(_, place)| place.is_some());
        bits.fold(0, |taken, (slot, _): (u32, _)| taken | 1 << slot)
    }

    fn find(&self, offset: u64, len: usize) -> Option<(Arc<dyn Function>, u16)> {
        let register = offset % SPACE;
        // One bus, one function in each slot; and no access runs into the next function.
        let slot = offset / (8 * SPACE);
        if !(offset / SPACE).is_multiple_of(8) || register + len as u64 > SPACE {
            return None;
        }
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let function = slots.get(usize::try_from(slot).ok()?)?.clone()?;
        Some((function, register as u16))
    }
}

impl Default for Root {
    fn default() -> Root {
        Root::new()
    }
}

impl Registers for Root {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.find(offset, data.len()) {
            Some((function, register)) => function.read_config(register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((function, register)) = self.find(offset, data.len()) {
            function.write_config(register, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::config::{Config, Identity};

    struct Card(Config);

    impl Function for Card {
        fn read_config(&self, offset: u16, data: &mut [u8]) {
            self.0.read(offset, data);
        }
        fn write_config(&self, _offset: u16, _data: &[u8]) {}
    }

    fn read(root: &Root, offset: u64) -> u32 {
        let mut data = [0; 4];
        root.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn device() -> Arc<dyn Function> {
        let identity = Identity { vendor: 0x1af4, device: 0x1044, class: 0xff_0000, revision: 1 };
        Arc::new(Card(Config::new(identity)))
    }

    #[test]
    fn slots_are_found_and_empty_ones_read_as_ones() {
        let root = Root::new();
        assert_eq!(root.free_slot(), Some(1));
        root.add(5, device()).unwrap();
        assert_eq!((read(&root, 5 << 15), root.taken()), (0x1044_1af4, 1 << 5));
        for absent in [0, 1 << 15, 5 << 15 | 1 << 12, 1 << 20, 0xfff_ffff, u64::MAX - 8, 5 << 15 | 0xffe] {
            assert_eq!(read(&root, absent), u32::MAX, "{absent:#x}");
        }
    }

    #[test]
    fn a_slot_is_taken_once_and_given_back() {
        let root = Root::new();
        root.add(1, device()).unwrap();
        assert_eq!(root.add(1, device()), Err(SlotError::Taken(1)));
        assert_eq!(root.add(0, device()), Err(SlotError::Range(0)));
        assert_eq!(root.add(32, device()), Err(SlotError::Range(32)));
        assert!(root.remove(1).is_some() && root.remove(1).is_none());
        assert!(root.remove(0).is_none() && root.remove(200).is_none());
        assert_eq!(read(&root, 1 << 15), u32::MAX);
    }
}
