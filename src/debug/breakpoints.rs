//! What a debugger has set: INT3s in guest memory, and addresses in debug registers.
//!
//! An INT3 is a byte of guest memory, so it is known by its *physical* address: it is there for
//! every process and every processor that maps it. The byte in whose place it stands is kept
//! here. Who reads guest memory for the debugger is shown that byte ([`Planted::hide`]), who
//! writes there changes that byte and not the INT3.

use std::collections::{BTreeMap, btree_map::Entry};

use arch::debug::{Access, BREAKPOINT, SLOTS, Watchpoint, pieces};
use devices::Memory;
use gdbstub::target::ext::breakpoints::WatchKind;
use vm_memory::{Bytes, GuestAddress};

/// INT3s that may stand in guest memory at a time.
const PLANTED: usize = 1024;

/// INT3s in guest memory.
#[derive(Default)]
pub struct Planted {
    /// Virtual addresses as the debugger gave them, and where they led then.
    places: BTreeMap<u64, u64>,
    /// By physical address, the bytes in whose places they stand.
    bytes: BTreeMap<u64, u8>,
}

impl Planted {
    /// Puts one at `physical`, which `virtual_address` leads to. False when there are too many,
    /// or no memory there. One that is there already stays.
    pub fn add(&mut self, memory: &Memory, virtual_address: u64, physical: u64) -> bool {
        if self.places.contains_key(&virtual_address) {
            return true;
        }
        if self.places.len() == PLANTED {
            return false;
        }
        if let Entry::Vacant(place) = self.bytes.entry(physical) {
            let Ok(byte) = memory.read_obj::<u8>(GuestAddress(physical)) else { return false };
            if !put(memory, physical, BREAKPOINT) {
                return false;
            }
            place.insert(byte);
        }
        self.places.insert(virtual_address, physical);
        true
    }

    /// Takes away the one at `virtual_address`, wherever that leads now. False when there is
    /// none. Where the guest has written something else meanwhile, that stays.
    pub fn remove(&mut self, memory: &Memory, virtual_address: u64) -> bool {
        let Some(physical) = self.places.remove(&virtual_address) else { return false };
        if self.places.values().all(|other| *other != physical)
            && let Some(byte) = self.bytes.remove(&physical)
        {
            restore(memory, physical, byte);
        }
        true
    }

    /// Takes all of them away for good.
    pub fn clear(&mut self, memory: &Memory) {
        self.lift(memory);
        (self.places, self.bytes) = Default::default();
    }

    /// Puts the guest's own bytes into their places for a while; [`Planted::plant`] ends it.
    pub fn lift(&self, memory: &Memory) {
        self.bytes.iter().for_each(|(physical, byte)| restore(memory, *physical, *byte));
    }

    /// Ends what [`Planted::lift`] began.
    pub fn plant(&self, memory: &Memory) {
        for physical in self.bytes.keys() {
            put(memory, *physical, BREAKPOINT);
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Whether one stands at `physical`.
    pub fn at(&self, physical: u64) -> bool {
        self.bytes.contains_key(&physical)
    }

    /// Puts the guest's own bytes into `data`, which was read from `physical` on.
    pub fn hide(&self, physical: u64, data: &mut [u8]) {
        for (at, byte) in self.within(physical, data.len()) {
            // Within the range, so within the slice.
            data[(at - physical) as usize] = byte;
        }
    }

    /// Writes `data` to `physical` on; INT3s there stay, and hide the new bytes. False where there
    /// is no memory.
    pub fn write(&mut self, memory: &Memory, physical: u64, data: &[u8]) -> bool {
        let mut changed = data.to_vec();
        let there: Vec<u64> = self.within(physical, data.len()).map(|(at, _)| at).collect();
        for at in &there {
            changed[(at - physical) as usize] = BREAKPOINT;
        }
        let written = memory.write_slice(&changed, GuestAddress(physical)).is_ok();
        for at in there.into_iter().filter(|_| written) {
            self.bytes.insert(at, data[(at - physical) as usize]);
        }
        written
    }

    fn within(&self, physical: u64, len: usize) -> impl Iterator<Item = (u64, u8)> {
        let end = physical.saturating_add(len as u64);
        self.bytes.range(physical..end).map(|(at, byte)| (*at, *byte))
    }
}

fn put(memory: &Memory, physical: u64, byte: u8) -> bool {
    memory.write_obj(byte, GuestAddress(physical)).is_ok()
}

fn restore(memory: &Memory, physical: u64, byte: u8) {
    if memory.read_obj::<u8>(GuestAddress(physical)).is_ok_and(|found| found == BREAKPOINT) {
        put(memory, physical, byte);
    }
}

/// What a debug register was set for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A breakpoint.
    Break,
    /// A watchpoint.
    Watch(WatchKind),
}

/// What the debugger asked to be watched, in its words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// First address.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// What for.
    pub purpose: Purpose,
}

/// The four debug registers, the same for all vCPUs.
#[derive(Default)]
pub struct Watched([Option<(Asked, Watchpoint)>; SLOTS]);

impl Watched {
    /// Watches a range; false when there are not enough registers left. One that is there
    /// already stays.
    pub fn add(&mut self, asked: Asked) -> bool {
        if self.0.iter().flatten().any(|(other, _)| *other == asked) {
            return true;
        }
        let access = match asked.purpose {
            Purpose::Break => Access::Execute,
            Purpose::Watch(WatchKind::Write) => Access::Write,
            // Reads alone cannot be watched for.
            Purpose::Watch(WatchKind::Read | WatchKind::ReadWrite) => Access::ReadWrite,
        };
        let len = if asked.purpose == Purpose::Break { 1 } else { asked.len };
        let free = self.0.iter().filter(|slot| slot.is_none()).count();
        let Some(pieces) = pieces(asked.address, len).filter(|pieces| pieces.len() <= free) else {
            return false;
        };
        let slots = self.0.iter_mut().filter(|slot| slot.is_none());
        for (slot, (address, len)) in slots.zip(pieces) {
            *slot = Some((asked, Watchpoint { address, len, access }));
        }
        true
    }

    /// Ends what [`Watched::add`] began; false when it had not.
    pub fn remove(&mut self, asked: Asked) -> bool {
        let mut found = false;
        for slot in &mut self.0 {
            if slot.is_some_and(|(other, _)| other == asked) {
                (*slot, found) = (None, true);
            }
        }
        found
    }

    /// What a register was set for.
    pub fn at(&self, slot: usize) -> Option<Asked> {
        self.0.get(slot).copied().flatten().map(|(asked, _)| asked)
    }

    /// For the vCPUs.
    pub fn registers(&self) -> [Option<Watchpoint>; SLOTS] {
        self.0.map(|slot| slot.map(|(_, watchpoint)| watchpoint))
    }
}

#[cfg(test)]
mod tests {
    use api::spec::MachineConfig;

    use super::*;

    fn memory() -> Memory {
        let config = MachineConfig { mem_size_mib: 1, ..MachineConfig::default() };
        let memory = crate::vm::memory::map(&config, crate::vm::memory::Backing::Empty).unwrap();
        memory.write_slice(&[1, 2, 3, 4, 5, 6, 7, 8], GuestAddress(0x1000)).unwrap();
        memory
    }

    fn raw(memory: &Memory) -> [u8; 8] {
        memory.read_obj(GuestAddress(0x1000)).unwrap()
    }

    #[test]
    fn one_that_stands_there_is_not_seen_and_survives_a_write() {
        let (memory, mut planted) = (memory(), Planted::default());
        assert!(planted.add(&memory, 0xffff_1002, 0x1002));
        assert_eq!(raw(&memory), [1, 2, 0xcc, 4, 5, 6, 7, 8]);
        let mut seen = raw(&memory);
        planted.hide(0x1000, &mut seen);
        assert_eq!(seen, [1, 2, 3, 4, 5, 6, 7, 8]);
        assert!(planted.write(&memory, 0x1001, &[20, 30, 40]));
        assert_eq!(raw(&memory), [1, 20, 0xcc, 40, 5, 6, 7, 8]);
        planted.lift(&memory);
        assert_eq!(raw(&memory)[2], 30);
        planted.plant(&memory);
        assert!(planted.remove(&memory, 0xffff_1002) && !planted.remove(&memory, 0xffff_1002));
        assert_eq!(raw(&memory), [1, 20, 30, 40, 5, 6, 7, 8]);
        assert!(planted.is_empty());
    }

    #[test]
    fn two_ways_to_one_place_share_it() {
        let (memory, mut planted) = (memory(), Planted::default());
        assert!(planted.add(&memory, 0xffff_1000, 0x1000) && planted.add(&memory, 0x7000, 0x1000));
        assert!(planted.remove(&memory, 0xffff_1000));
        assert_eq!(raw(&memory)[0], 0xcc);
        assert!(planted.remove(&memory, 0x7000));
        assert_eq!(raw(&memory)[0], 1);
    }

    #[test]
    fn what_the_guest_has_put_there_since_stays() {
        let (memory, mut planted) = (memory(), Planted::default());
        assert!(planted.add(&memory, 0x1000, 0x1000));
        memory.write_obj(9u8, GuestAddress(0x1000)).unwrap();
        planted.clear(&memory);
        assert_eq!(raw(&memory)[0], 9);
    }

    #[test]
    fn there_is_an_end_to_them_and_none_outside_memory() {
        let (memory, mut planted) = (memory(), Planted::default());
        assert!(!planted.add(&memory, 0, 1 << 20));
        assert!(!planted.write(&memory, u64::MAX - 1, &[1, 2, 3]));
        assert!((0..PLANTED as u64).all(|at| planted.add(&memory, at, at)));
        assert!(!planted.add(&memory, 5000, 5000) && planted.add(&memory, 7, 7));
    }

    #[test]
    fn debug_registers_are_given_out_as_far_as_they_go() {
        let mut watched = Watched::default();
        let stop = |address| Asked { address, len: 1, purpose: Purpose::Break };
        let watch = |address, len| Asked { address, len, purpose: Purpose::Watch(WatchKind::Write) };
        assert!(watched.add(watch(0x1000, 16)) && watched.add(stop(0x5000)) && watched.add(stop(0x5000)));
        assert!(!watched.add(watch(0x2000, 16)), "one is left");
        assert!(watched.add(stop(0x6000)) && !watched.add(stop(0x7000)));
        assert_eq!(watched.at(1), Some(watch(0x1000, 16)));
        assert!(watched.remove(watch(0x1000, 16)) && !watched.remove(watch(0x1000, 8)));
        assert_eq!(watched.registers().iter().flatten().count(), 2);
        assert_eq!((watched.at(0), watched.at(99)), (None, None));
    }
}
