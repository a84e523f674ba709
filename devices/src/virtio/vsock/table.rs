//! All connections of a device, by place and by ports.
//!
//! A place (slot) has a generation, so that late events for a connection that is gone do not
//! hit the next one in its place. Ports of the host's side are made from both:
//!
//! ```text
//!   host_port = 01 | turn (20 bits) | slot (10 bits)
//! ```
//!
//! Two living connections differ in the slot, so a port is never used twice at a time, and
//! nothing is looked up to make sure; the turn keeps a port from coming back soon.

use std::collections::{HashMap, VecDeque};

use crate::{
    limits::VSOCK_CONNECTIONS_MAX,
    virtio::vsock::{poller::StreamId, stream::Stream},
};

const SLOT_BITS: u32 = 10;
const TURN_MASK: u32 = (1 << 20) - 1;
const FIRST_PORT: u32 = 1 << 30;
const _: () = assert!(VSOCK_CONNECTIONS_MAX <= 1 << SLOT_BITS);

#[derive(Default)]
struct Place {
    generation: u32,
    stream: Option<Stream>,
    /// The slot stands in the line. Kept here and not with the connection, so that a slot is
    /// in the line once, however often its connection changes.
    in_line: bool,
}

/// The connections of one device; at most [`VSOCK_CONNECTIONS_MAX`].
#[derive(Default)]
pub struct Table {
    places: Vec<Place>,
    free: Vec<u32>,
    by_ports: HashMap<(u32, u32), u32>,
    /// The ports looked up last: packets of one connection tend to come in a row.
    last: Option<((u32, u32), u32)>,
    turn: u32,
    /// Slots whose connections may have something for the guest, served in turn.
    line: VecDeque<u32>,
}

impl Table {
    /// Whether there is no place left.
    pub fn is_full(&self) -> bool {
        self.free.is_empty() && self.places.len() >= VSOCK_CONNECTIONS_MAX
    }

    /// Puts a connection in; none when the table is full, and the connection is dropped.
    pub fn insert(&mut self, stream: Stream) -> Option<StreamId> {
        if self.is_full() {
            return None;
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            self.places.push(Place::default());
            self.places.len() as u32 - 1
        });
        let place = self.places.get_mut(slot as usize)?;
        place.generation = place.generation.wrapping_add(1);
        place.stream = Some(stream);
        Some(StreamId { slot, generation: place.generation })
    }

    /// The connection in `slot`, whichever it is now.
    pub fn at(&mut self, slot: u32) -> Option<&mut Stream> {
        self.places.get_mut(slot as usize)?.stream.as_mut()
    }

    /// The connection with this name, if it still is there.
    pub fn get(&mut self, id: StreamId) -> Option<&mut Stream> {
        let place = self.places.get_mut(id.slot as usize)?;
        if place.generation == id.generation { place.stream.as_mut() } else { None }
    }

    /// The full name of what is in `slot`.
    pub fn id(&self, slot: u32) -> Option<StreamId> {
        let place = self.places.get(slot as usize).filter(|p| p.stream.is_some())?;
        Some(StreamId { slot, generation: place.generation })
    }

    /// The connection the guest means by these ports.
    pub fn find(&mut self, host_port: u32, guest_port: u32) -> Option<StreamId> {
        let key = (host_port, guest_port);
        let slot = match self.last {
            Some((last, slot)) if last == key => slot,
            _ => *self.by_ports.get(&key)?,
        };
        self.last = Some((key, slot));
        self.id(slot)
    }

    /// Makes a connection findable by its ports.
    pub fn name(&mut self, slot: u32) {
        if let Some(stream) = self.at(slot) {
            let key = (stream.host_port, stream.guest_port);
            self.by_ports.insert(key, slot);
        }
    }

    /// Makes it unfindable again.
    pub fn unname(&mut self, slot: u32) {
        self.last = None;
        if let Some(stream) = self.at(slot) {
            let key = (stream.host_port, stream.guest_port);
            if self.by_ports.get(&key) == Some(&slot) {
                self.by_ports.remove(&key);
            }
        }
    }

    /// Takes a connection out.
    pub fn remove(&mut self, slot: u32) -> Option<Stream> {
        self.unname(slot);
        let stream = self.places.get_mut(slot as usize)?.stream.take()?;
        self.free.push(slot);
        Some(stream)
    }

    /// Puts a connection at the end of the line if it has work and is not in it.
    pub fn line_up(&mut self, slot: u32) {
        let Some(place) = self.places.get_mut(slot as usize) else { return };
        if !place.in_line && place.stream.as_ref().is_some_and(Stream::has_work) {
            place.in_line = true;
            self.line.push_back(slot);
        }
    }

    /// Takes the first of the line, which may meanwhile have nothing to do.
    pub fn next_in_line(&mut self) -> Option<u32> {
        let slot = self.line.pop_front()?;
        if let Some(place) = self.places.get_mut(slot as usize) {
            place.in_line = false;
        }
        Some(slot)
    }

    /// Puts a connection back where [`Table::next_in_line`] took it.
    pub fn back_in_front(&mut self, slot: u32) {
        if let Some(place) = self.places.get_mut(slot as usize).filter(|p| !p.in_line) {
            place.in_line = true;
            self.line.push_front(slot);
        }
    }

    /// How many stand in the line.
    pub fn in_line(&self) -> usize {
        self.line.len()
    }

    /// A host-side port for the connection in `slot`.
    pub fn next_port(&mut self, slot: u32) -> u32 {
        self.turn = self.turn.wrapping_add(1) & TURN_MASK;
        FIRST_PORT | self.turn << SLOT_BITS | slot
    }

    /// How far the host-side ports have come.
    pub fn turn(&self) -> u32 {
        self.turn
    }

    /// Goes on with host-side ports from `turn`.
    pub fn set_turn(&mut self, turn: u32) {
        self.turn = turn & TURN_MASK;
    }

    /// All connections.
    pub fn streams(&self) -> impl Iterator<Item = &Stream> {
        self.places.iter().filter_map(|place| place.stream.as_ref())
    }

    /// All slots that were ever used, for a walk through the connections.
    pub fn slots(&self) -> std::ops::Range<u32> {
        0..self.places.len() as u32
    }

    /// Takes all connections out.
    pub fn clear(&mut self) {
        for slot in self.slots() {
            self.remove(slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::vsock::stream::Stage;

    fn stream() -> Stream {
        Stream::new(Stage::Greeting, None)
    }

    #[test]
    fn it_holds_as_many_as_it_may_and_takes_places_again() {
        let mut table = Table::default();
        let ids: Vec<_> = (0..VSOCK_CONNECTIONS_MAX).map(|_| table.insert(stream()).unwrap()).collect();
        assert!(table.is_full() && table.insert(stream()).is_none());
        table.remove(ids[7].slot).unwrap();
        let again = table.insert(stream()).unwrap();
        assert_eq!(again.slot, ids[7].slot);
        assert!(table.get(ids[7]).is_none() && table.get(again).is_some());
    }

    #[test]
    fn living_ports_differ() {
        let mut table = Table::default();
        let mut seen = std::collections::HashSet::new();
        for round in 0..3 {
            for slot in 0..VSOCK_CONNECTIONS_MAX as u32 {
                assert!(seen.insert(table.next_port(slot)), "round {round}");
            }
        }
        table.set_turn(u32::MAX);
        assert!(table.next_port(5) >= FIRST_PORT && table.next_port(5) < 1 << 31);
    }

    #[test]
    fn a_removed_connection_is_not_found_by_its_ports() {
        let mut table = Table::default();
        let id = table.insert(stream()).unwrap();
        let found = table.at(id.slot).unwrap();
        (found.host_port, found.guest_port) = (5, 6);
        table.name(id.slot);
        assert_eq!(table.find(5, 6), Some(id));
        assert_eq!(table.find(6, 5), None);
        table.remove(id.slot);
        assert_eq!(table.find(5, 6), None);
    }
}
