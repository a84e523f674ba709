//! Which processors a machine has, for a guest that takes on new ones while it runs.
//!
//! ```text
//!   +0  present   u64   a bit a processor
//!   +8  inserted  u64   a bit for each that has come; reading takes the bits that are read
//! ```
//!
//! The ACPI tables name both (`_STA` of the processors, and the method that the Generic Event
//! Device calls when the power block raises [`super::power::EVENT_PROCESSORS`]). They are there
//! only on machines that have room for more processors than they start with.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::{
    bus::Registers,
    state::{Section, StateError},
};

/// First I/O port of the block.
pub const BASE: u16 = 0x620;
/// Number of ports.
pub const LEN: u16 = 16;
/// First port of the register of those that are present.
pub const PRESENT: u16 = BASE;
/// First port of the register of those that have come.
pub const INSERTED: u16 = BASE + 8;

const KIND: &str = "processors";

/// The register block.
pub struct Processors {
    present: AtomicU64,
    inserted: AtomicU64,
}

impl Processors {
    /// Processors 0 to `count` - 1 are present; at most 64.
    pub fn new(count: u8) -> Processors {
        Processors { present: AtomicU64::new(bits(0, count)), inserted: AtomicU64::new(0) }
    }

    /// Processors `first` to `end` - 1 have come. The guest looks when it is told to
    /// ([`super::power::Power::raise`]).
    pub fn insert(&self, first: u8, end: u8) {
        self.present.fetch_or(bits(first, end), Ordering::AcqRel);
        self.inserted.fetch_or(bits(first, end), Ordering::AcqRel);
    }

    /// Which are present, and which the guest has not looked at yet.
    pub fn save(&self) -> Section {
        let state = (self.present.load(Ordering::Acquire), self.inserted.load(Ordering::Acquire));
        Section::new(KIND, 1, &state)
    }

    /// Takes over saved bits. The block must have been made for as many processors as the saved
    /// machine had.
    ///
    /// # Errors
    /// When the section is another one's, or is about other processors than there are here.
    pub fn restore(&self, section: &Section) -> Result<(), StateError> {
        let (present, inserted): (u64, u64) = section.open(KIND, 1)?;
        let here = self.present.load(Ordering::Acquire);
        if present != here || inserted & !present != 0 {
            let reason =
                format!("processors {present:#x} are there and {inserted:#x} new, here are {here:#x}");
            return Err(StateError::Impossible { kind: KIND, reason });
        }
        self.inserted.store(inserted, Ordering::Release);
        Ok(())
    }
}

/// The bits from `first` to `end` - 1.
fn bits(first: u8, end: u8) -> u64 {
    (first..end.min(64)).fold(0, |bits, index| bits | 1 << index)
}

impl Registers for Processors {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let (register, at) = (offset / 8, offset % 8);
        if at + data.len() as u64 > 8 {
            return;
        }
        let shift = 8 * at as u32;
        let value = match register {
            0 => self.present.load(Ordering::Acquire),
            1 => {
                let mask = (0..data.len() as u32).fold(0, |mask, byte| mask | 0xff << (shift + 8 * byte));
                self.inserted.fetch_and(!mask, Ordering::AcqRel)
            }
            _ => return,
        };
        data.iter_mut().zip((value >> shift).to_le_bytes()).for_each(|(to, from)| *to = from);
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn byte(processors: &Processors, offset: u64) -> u8 {
        let mut data = [0xff];
        processors.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn those_that_come_are_present_for_good_and_new_once() {
        let processors = Processors::new(2);
        assert_eq!((byte(&processors, 0), byte(&processors, 8)), (0b11, 0));
        processors.insert(2, 10);
        assert_eq!((byte(&processors, 0), byte(&processors, 1)), (0xff, 0b11));
        assert_eq!((byte(&processors, 8), byte(&processors, 8)), (0b1111_1100, 0));
        assert_eq!((byte(&processors, 9), byte(&processors, 9)), (0b11, 0));
    }

    #[test]
    fn sixty_four_is_all_bits() {
        let processors = Processors::new(1);
        processors.insert(1, 64);
        let mut data = [0; 8];
        processors.read(0, &mut data);
        assert_eq!(data, [0xff; 8]);
    }

    #[test]
    fn what_the_guest_has_not_seen_survives_a_save() {
        let (processors, other) = (Processors::new(1), Processors::new(3));
        processors.insert(1, 3);
        other.restore(&processors.save()).unwrap();
        assert_eq!((byte(&other, 0), byte(&other, 8)), (0b111, 0b110));
        assert!(other.restore(&Section::new("power", 1, &0u8)).is_err());
        for bits in [(0b111u64, 0b1000u64), (0b11, 0), (0b1111, 0), (u64::MAX, u64::MAX)] {
            let section = Section::new(KIND, 1, &bits);
            assert!(matches!(other.restore(&section), Err(StateError::Impossible { .. })), "{bits:x?}");
        }
        assert_eq!((byte(&other, 0), byte(&other, 8)), (0b111, 0));
    }

    #[test]
    fn accesses_of_any_place_and_size_are_harmless() {
        let processors = Processors::new(64);
        for offset in 0..16u64 {
            for len in 1..=8.min(16 - offset as usize) {
                processors.read(offset, &mut vec![0; len]);
                processors.write(offset, &vec![0xff; len]);
            }
        }
        assert_eq!(byte(&processors, 7), 0xff);
    }
}
