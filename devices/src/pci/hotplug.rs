//! How a running guest learns that a device came, and gives one back (ACPI 6.5 section 6.3).
//!
//! ```text
//!   owner ─ insert ─► slot filled, bit in +0 ─┐ line of the event device
//!   owner ─ ask ────► bit in +4 ──────────────┤
//!                                             ▼
//!   guest: event method reads +0, +4 ─► Notify(slot, "look" or "give back")
//!   guest: lets go of the device, _EJ0 writes the slot's bit to +8
//!          ─► out of its slot, off the memory bus ─► owner is told, closes files and taps
//! ```
//!
//! | port | width | read | written |
//! |---|---|---|---|
//! | +0 | 32 bits | slots that were filled; reading takes the bits | nothing |
//! | +4 | 32 bits | slots to be given back; reading takes the bits | nothing |
//! | +8 | 32 bits | 0 | slots that the guest has let go of |
//!
//! **ACPI, not PCI Express hotplug.** Native hotplug belongs to the ports of bridges: each device
//! would need a root port of its own, which the guest finds, numbers and gives windows to at every
//! start, and Linux waits five seconds after the "attention button" before it acts. Devices here
//! are on the root bus; three registers and some AML reach them, and cost a boot next to nothing.
//!
//! **Only what was asked for is ejected.** A guest may write anything: bits of slots whose device
//! nobody wants back change nothing. The slot is emptied on the vCPU's thread, before the write is
//! over: the guest may scan the bus right after it and must not find the device again.
//!
//! A device that is inserted has no address. The guest gives it one, as it does to hardware, for
//! it alone knows what in the window is free since it moved others about.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{
    Function,
    root::{Root, SlotError},
};
use crate::{
    bus::Registers,
    state::{Section, StateError},
};

/// First I/O port of the block.
pub const BASE: u16 = 0x640;
/// Number of ports.
pub const LEN: u16 = 16;
/// Offset of the register that says which slots were filled.
pub const INSERTED: u16 = 0;
/// Offset of the register that says which slots are wanted back.
pub const WANTED: u16 = 4;
/// Offset of the register that takes the slots the guest gives back.
pub const EJECT: u16 = 8;

const KIND: &str = "pci-hotplug";

/// Called, on the vCPU thread that wrote the register, with a slot that was emptied. Must not
/// block.
pub type Ejected = Arc<dyn Fn(u8) + Send + Sync>;

/// One bit a slot in each.
#[derive(Debug, Default)]
struct Bits {
    inserted: u32,
    wanted: u32,
    /// Wanted back, whether the guest has read so or not.
    asked: u32,
}

/// The register block, and the bus it is about.
pub struct Hotplug {
    root: Arc<Root>,
    ejected: Ejected,
    bits: Mutex<Bits>,
}

impl Hotplug {
    /// A block for `root` that reports ejected slots to `ejected`.
    pub fn new(root: Arc<Root>, ejected: Ejected) -> Hotplug {
        Hotplug { root, ejected, bits: Mutex::default() }
    }

    /// The bus.
    pub fn root(&self) -> &Arc<Root> {
        &self.root
    }

    /// Puts `function` into `slot`. The caller raises the event that makes the guest look.
    pub fn insert(&self, slot: u8, function: Arc<dyn Function>) -> Result<(), SlotError> {
        self.root.add(slot, function)?;
        let mut bits = self.bits();
        bits.forget(slot);
        bits.inserted |= bit(slot);
        Ok(())
    }

    /// Wants the device in `slot` back. The caller raises the event that makes the guest look;
    /// asking again is fine.
    pub fn ask(&self, slot: u8) {
        let mut bits = self.bits();
        bits.wanted |= bit(slot);
        bits.asked |= bit(slot);
    }

    /// Empties `slot` without the guest's consent; false when it is empty already, because the
    /// guest was faster.
    pub fn take(&self, slot: u8) -> bool {
        self.bits().forget(slot);
        self.empty(slot)
    }

    /// Whether there is something that the guest has not read yet.
    pub fn unread(&self) -> bool {
        let bits = self.bits();
        bits.inserted | bits.wanted != 0
    }

    /// What the guest has not read yet, and what it was asked for and has not given back.
    pub fn save(&self) -> Section {
        let (bits, taken) = (self.bits(), self.root.taken());
        let saved = [bits.inserted & taken, bits.wanted & taken, bits.asked & taken];
        Section::new(KIND, 1, &saved)
    }

    /// Takes over saved bits. The devices must be in their slots already, put there without
    /// [`Hotplug::insert`]. The event that makes the guest look is the power block's, which
    /// raises what it had pending by itself.
    ///
    /// # Errors
    /// When the section is another one's, or is about slots that are empty here.
    pub fn restore(&self, section: &Section) -> Result<(), StateError> {
        let [inserted, wanted, asked]: [u32; 3] = section.open(KIND, 1)?;
        let taken = self.root.taken();
        let impossible = |reason| Err(StateError::Impossible { kind: KIND, reason });
        let empty = (inserted | wanted | asked) & !taken;
        if empty != 0 {
            return impossible(format!("slots {empty:#x} are to hold devices, those that do are {taken:#x}"));
        }
        if wanted & !asked != 0 {
            return impossible(format!(
                "slots {wanted:#x} are wanted back, but only {asked:#x} were asked for"
            ));
        }
        *self.bits() = Bits { inserted, wanted, asked };
        Ok(())
    }

    fn empty(&self, slot: u8) -> bool {
        let taken = self.root.remove(slot);
        taken.inspect(|function| function.unplug()).is_some()
    }

    fn bits(&self) -> MutexGuard<'_, Bits> {
        self.bits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Bits {
    fn forget(&mut self, slot: u8) {
        for bits in [&mut self.inserted, &mut self.wanted, &mut self.asked] {
            *bits &= !bit(slot);
        }
    }
}

fn bit(slot: u8) -> u32 {
    1u32.checked_shl(slot.into()).unwrap_or(0)
}

impl Registers for Hotplug {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else { return };
        let mut bits = self.bits();
        let register = match u16::try_from(offset) {
            Ok(INSERTED) => &mut bits.inserted,
            Ok(WANTED) => &mut bits.wanted,
            _ => return,
        };
        *data = std::mem::take(register).to_le_bytes();
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (true, Ok(data)) = (offset == u64::from(EJECT), <[u8; 4]>::try_from(data)) else { return };
        let given = u32::from_le_bytes(data);
        for slot in (0..u32::BITS as u8).filter(|slot| given & bit(*slot) != 0) {
            let asked = {
                let mut bits = self.bits();
                let asked = bits.asked & bit(slot) != 0;
                if asked {
                    bits.forget(slot);
                }
                asked
            };
            if asked && self.empty(slot) {
                (self.ejected)(slot);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::config::{Config, Identity};

    #[derive(Default)]
    struct Card(Mutex<u32>);

    impl Function for Card {
        fn read_config(&self, offset: u16, data: &mut [u8]) {
            let identity = Identity { vendor: 0x1af4, device: 0x1042, class: 0, revision: 1 };
            Config::new(identity).read(offset, data);
        }
        fn write_config(&self, _: u16, _: &[u8]) {}
        fn unplug(&self) {
            *self.0.lock().unwrap() += 1;
        }
    }

    struct Rig {
        hotplug: Hotplug,
        card: Arc<Card>,
        ejected: Arc<Mutex<Vec<u8>>>,
    }

    /// A card in slot 4 that the guest has not heard of.
    fn rig() -> Rig {
        let ejected = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&ejected);
        let callback: Ejected = Arc::new(move |slot| sink.lock().unwrap().push(slot));
        let hotplug = Hotplug::new(Arc::new(Root::new()), callback);
        let card = Arc::new(Card::default());
        hotplug.insert(4, card.clone()).unwrap();
        Rig { hotplug, card, ejected }
    }

    impl Rig {
        fn read(&self, offset: u16) -> u32 {
            let mut data = [0xff; 4];
            self.hotplug.read(offset.into(), &mut data);
            u32::from_le_bytes(data)
        }

        fn eject(&self, slots: u32) {
            self.hotplug.write(EJECT.into(), &slots.to_le_bytes());
        }

        fn present(&self) -> bool {
            let mut data = [0; 2];
            self.hotplug.root().read(4 << 15, &mut data);
            data == [0xf4, 0x1a]
        }
    }

    #[test]
    fn a_guest_reads_of_a_device_once_and_gives_it_back_when_asked() {
        let rig = rig();
        assert!(rig.hotplug.unread() && rig.present());
        assert_eq!((rig.read(INSERTED), rig.read(INSERTED), rig.read(WANTED)), (1 << 4, 0, 0));
        rig.hotplug.ask(4);
        rig.hotplug.ask(4);
        assert_eq!((rig.read(WANTED), rig.read(WANTED)), (1 << 4, 0));
        assert!(!rig.hotplug.unread() && rig.present());
        rig.eject(1 << 4);
        assert_eq!((&*rig.ejected.lock().unwrap(), *rig.card.0.lock().unwrap()), (&vec![4], 1));
        assert!(!rig.present());
        rig.eject(1 << 4);
        assert_eq!(*rig.ejected.lock().unwrap(), [4]);
        rig.hotplug.insert(4, rig.card.clone()).expect("the slot is free again");
        rig.eject(1 << 4);
        assert!(rig.present(), "what was asked of the old device does not hold for the new one");
    }

    #[test]
    fn nothing_is_ejected_that_was_not_asked_for() {
        let rig = rig();
        rig.eject(u32::MAX);
        rig.hotplug.ask(0);
        rig.hotplug.ask(31);
        rig.hotplug.ask(200);
        for offset in 0..u64::from(LEN) {
            for len in 1..=8.min(usize::from(LEN) - offset as usize) {
                if (offset, len) == (EJECT.into(), 4) {
                    continue;
                }
                rig.hotplug.write(offset, &vec![0xff; len]);
                let mut data = vec![0xff; len];
                rig.hotplug.read(offset, &mut data);
                let inserted = (offset, len) == (0, 4) && data == [1 << 4, 0, 0, 0];
                let wanted = (offset, len) == (4, 4) && data == [1, 0, 0, 0x80];
                assert!(data.iter().all(|byte| *byte == 0) || inserted || wanted, "{offset}+{len}");
            }
        }
        assert!(rig.present() && rig.ejected.lock().unwrap().is_empty());
        rig.eject(u32::MAX);
        assert!(rig.present() && rig.ejected.lock().unwrap().is_empty(), "there is nothing in 31");
    }

    #[test]
    fn what_the_guest_has_not_read_or_given_back_survives_a_save() {
        let old = rig();
        old.hotplug.insert(9, old.card.clone()).unwrap();
        old.hotplug.ask(9);
        old.hotplug.ask(20);
        let (saved, new) = (old.hotplug.save(), rig());
        new.read(INSERTED);
        assert!(matches!(new.hotplug.restore(&saved), Err(StateError::Impossible { .. })), "9 is empty");
        assert!(!new.hotplug.unread(), "a refused state changes nothing");
        new.hotplug.root().add(9, new.card.clone()).unwrap();
        new.hotplug.restore(&saved).unwrap();
        assert_eq!((new.read(INSERTED), new.read(WANTED)), (1 << 4 | 1 << 9, 1 << 9));
        let asked = new.hotplug.save();
        new.hotplug.take(9);
        new.hotplug.root().add(9, new.card.clone()).unwrap();
        new.hotplug.restore(&asked).unwrap();
        new.eject(u32::MAX);
        assert_eq!(*new.ejected.lock().unwrap(), [9], "it was asked for before the save");
    }

    #[test]
    fn saved_bits_that_cannot_be_are_refused() {
        let rig = rig();
        for bits in [[1u32, 0, 0], [0, 1 << 4, 0], [0, 0, 1 << 31], [u32::MAX; 3]] {
            let section = Section::new(KIND, 1, &bits);
            assert!(matches!(rig.hotplug.restore(&section), Err(StateError::Impossible { .. })), "{bits:x?}");
        }
        assert!(rig.hotplug.restore(&Section::new("power", 1, &[0u32; 3])).is_err());
        assert_eq!(rig.read(INSERTED), 1 << 4);
    }

    #[test]
    fn what_is_taken_needs_no_guest() {
        let rig = rig();
        rig.hotplug.ask(4);
        assert!(rig.hotplug.take(4) && !rig.hotplug.take(4));
        rig.eject(1 << 4);
        assert!(!rig.present() && !rig.hotplug.unread() && rig.ejected.lock().unwrap().is_empty());
        assert_eq!(*rig.card.0.lock().unwrap(), 1);
    }
}
