//! Ethernet: which frames are the service's, how an address is found, and replies in a row.
//!
//! ```text
//!   0         6        12         14                30           34        38       42
//!   to        from     0x0800     IPv4 header ...   destination  ...
//!   to        from     0x0806     ARP ...                                  target
//! ```
//!
//! Whether a frame is for the service is a matter of two comparisons at fixed places in its
//! first [`HEAD_LEN`] bytes. The hardware address it is sent to does not count: a guest that
//! has no route to link-local addresses sends to its gateway's, and is answered all the same.
//!
//! The stack below speaks IP only. Replies go to the hardware address that the guest's own
//! frames came from, so the service never has to ask for one.

use std::collections::VecDeque;

use smoltcp::{
    phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken},
    time::Instant,
};

/// Bytes at the start of a frame that say whether it is for the service.
pub const HEAD_LEN: usize = 42;

/// Largest IP packet the service sends, in bytes. It takes any that fits into a frame.
pub const MTU: usize = 1500;

/// The service's hardware address, locally administered.
pub(super) const MAC: [u8; 6] = [0x06, 0x01, 0x23, 0x45, 0x67, 0x01];

/// Length of an Ethernet header.
pub(super) const ETHERNET: usize = 14;

/// Replies that wait for the guest to take them. Beyond it nothing is sent, and what would
/// have been answered at once is lost; TCP repeats it.
const REPLIES_MAX: usize = 32;

/// Guest addresses whose hardware addresses are remembered.
const NEIGHBOURS_MAX: usize = 16;

const IPV4: [u8; 2] = [0x08, 0x00];
const ARP: [u8; 2] = [0x08, 0x06];

/// What brings a frame to the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Aim {
    /// It asks for or tells something of the service's address.
    Arp,
    /// It is a packet to it.
    Ipv4,
}

/// What brings the frame that begins with `head` to `address`, if anything.
#[inline]
pub(super) fn aim(head: &[u8], address: [u8; 4]) -> Option<Aim> {
    let (aim, target) = match *head.get(12..ETHERNET)?.first_chunk::<2>()? {
        IPV4 => (Aim::Ipv4, 30..34),
        ARP => (Aim::Arp, 38..42),
        _ => return None,
    };
    (*head.get(target)? == address).then_some(aim)
}

/// The six bytes at `at`, of which the caller knows that they are there.
fn mac(frame: &[u8], at: usize) -> [u8; 6] {
    frame.get(at..at + 6).and_then(|bytes| bytes.first_chunk()).copied().unwrap_or_default()
}

/// Replies that wait, and where they go.
#[derive(Debug)]
pub(super) struct Outbox {
    frames: VecDeque<Vec<u8>>,
    spare: Vec<Vec<u8>>,
    /// Oldest first.
    neighbours: Vec<([u8; 4], [u8; 6])>,
    latest: [u8; 6],
}

impl Outbox {
    pub(super) fn new() -> Outbox {
        Outbox { frames: VecDeque::new(), spare: Vec::new(), neighbours: Vec::new(), latest: [0xff; 6] }
    }

    pub(super) fn is_full(&self) -> bool {
        self.frames.len() >= REPLIES_MAX
    }

    pub(super) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    pub(super) fn clear(&mut self) {
        *self = Outbox::new();
    }

    /// Puts the next reply into `buf`: its length, or nothing when there is none, or the
    /// length as an error when it does not fit, in which case it is dropped.
    pub(super) fn take(&mut self, buf: &mut [u8]) -> Option<Result<usize, usize>> {
        let frame = self.frames.pop_front()?;
        let len = frame.len();
        let fits = buf.get_mut(..len).map(|place| place.copy_from_slice(&frame));
        self.spare.push(frame);
        Some(if fits.is_some() { Ok(len) } else { Err(len) })
    }

    /// Remembers where the packet in `frame` came from.
    pub(super) fn learn(&mut self, frame: &[u8]) {
        let from = mac(frame, 6);
        self.latest = from;
        let Some(address) = frame.get(26..30).and_then(|bytes| bytes.first_chunk()).copied() else { return };
        if let Some(known) = self.neighbours.iter_mut().find(|(known, _)| *known == address) {
            known.1 = from;
            return;
        }
        if self.neighbours.len() >= NEIGHBOURS_MAX {
            self.neighbours.remove(0);
        }
        self.neighbours.push((address, from));
    }

    /// Answers the ARP packet in `frame` when it is a question; false when it is none or
    /// there is no room.
    pub(super) fn answer_arp(&mut self, frame: &[u8], address: [u8; 4]) -> bool {
        // Ethernet and IPv4, with addresses of 6 and 4 bytes, operation 1 (RFC 826).
        const QUESTION: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
        let (Some(head), Some(sender)) = (frame.get(ETHERNET..22), frame.get(22..32)) else { return false };
        if head != QUESTION || self.is_full() {
            return false;
        }
        let mut reply = self.blank(HEAD_LEN);
        let asker = mac(frame, 22);
        for (at, bytes) in [
            (0, &asker[..]),
            (6, &MAC),
            (12, &ARP),
            (14, &QUESTION),
            (21, &[2]),
            (22, &MAC),
            (28, &address),
            (32, sender),
        ] {
            if let Some(place) = reply.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        }
        self.frames.push_back(reply);
        true
    }

    /// A frame of `len` zero bytes.
    fn blank(&mut self, len: usize) -> Vec<u8> {
        let mut frame = self.spare.pop().unwrap_or_default();
        frame.clear();
        frame.resize(len, 0);
        frame
    }
}

/// The stack's network device, for the length of one call: one packet in, the outbox out.
pub(super) struct Wire<'a> {
    pub(super) packet: Option<&'a [u8]>,
    pub(super) out: &'a mut Outbox,
}

impl Device for Wire<'_> {
    type RxToken<'b>
        = Arrived<'b>
    where
        Self: 'b;
    type TxToken<'b>
        = Leaving<'b>
    where
        Self: 'b;

    fn receive(&mut self, _now: Instant) -> Option<(Arrived<'_>, Leaving<'_>)> {
        if self.out.is_full() {
            return None;
        }
        Some((Arrived(self.packet.take()?), Leaving(self.out)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Leaving<'_>> {
        if self.out.is_full() { None } else { Some(Leaving(self.out)) }
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        // A guest may leave its checksums to the device, and between the two of them there is
        // nothing but memory. What is sent to it is complete.
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}

/// The packet that came.
pub(super) struct Arrived<'a>(&'a [u8]);

impl RxToken for Arrived<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

/// Room for a packet to go.
pub(super) struct Leaving<'a>(&'a mut Outbox);

impl TxToken for Leaving<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = self.0.blank(ETHERNET + len);
        let (header, packet) = frame.split_at_mut(ETHERNET);
        let result = f(packet);
        let target = packet.get(16..20).unwrap_or_default();
        let known = self.0.neighbours.iter().find(|(address, _)| address == target);
        let (to, rest) = header.split_at_mut(6);
        to.copy_from_slice(&known.map_or(self.0.latest, |(_, mac)| *mac));
        let (from, kind) = rest.split_at_mut(6);
        from.copy_from_slice(&MAC);
        kind.copy_from_slice(&IPV4);
        self.0.frames.push_back(frame);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESS: [u8; 4] = [169, 254, 169, 254];

    fn frame(kind: [u8; 2], at: usize, len: usize) -> Vec<u8> {
        let mut frame = vec![0; len];
        frame[12..14].copy_from_slice(&kind);
        frame[at..at + 4].copy_from_slice(&ADDRESS);
        frame
    }

    #[test]
    fn a_frame_is_recognized_by_kind_and_target_alone() {
        assert_eq!(aim(&frame(IPV4, 30, 34), ADDRESS), Some(Aim::Ipv4));
        assert_eq!(aim(&frame(ARP, 38, 42), ADDRESS), Some(Aim::Arp));
        for (kind, at) in [(IPV4, 38), (ARP, 30), ([0x86, 0xdd], 38), ([0x81, 0x00], 30), (IPV4, 26)] {
            assert_eq!(aim(&frame(kind, at, 60), ADDRESS), None);
        }
        let whole = frame(IPV4, 30, 34);
        for len in 0..whole.len() {
            assert_eq!(aim(&whole[..len], ADDRESS), None);
        }
    }

    #[test]
    fn a_question_for_the_address_is_answered_to_who_asked() {
        let mut question = frame(ARP, 38, 60);
        question[..6].fill(0xff);
        question[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
        question[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
        question[22..28].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
        question[28..32].copy_from_slice(&[10, 0, 0, 2]);
        let mut out = Outbox::new();
        assert!(out.answer_arp(&question, ADDRESS));
        let mut reply = [0xaa; 64];
        assert_eq!(out.take(&mut reply), Some(Ok(42)));
        let mut expected = Vec::new();
        expected.extend_from_slice(&[2, 0, 0, 0, 0, 9]);
        expected.extend_from_slice(&MAC);
        expected.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
        expected.extend_from_slice(&MAC);
        expected.extend_from_slice(&ADDRESS);
        expected.extend_from_slice(&[2, 0, 0, 0, 0, 9, 10, 0, 0, 2]);
        assert_eq!(reply[..42], expected);
        question[21] = 2;
        assert!(!out.answer_arp(&question, ADDRESS), "what is told needs no answer");
        assert!(!out.answer_arp(&question[..30], ADDRESS));
        assert_eq!(out.take(&mut reply), None);
    }

    #[test]
    fn replies_that_nobody_takes_are_bounded() {
        let mut question = frame(ARP, 38, 42);
        question[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
        let mut out = Outbox::new();
        let answered = (0..1000).filter(|_| out.answer_arp(&question, ADDRESS)).count();
        assert_eq!(answered, REPLIES_MAX);
        assert!(Wire { packet: Some(&[0; 20]), out: &mut out }.receive(Instant::ZERO).is_none());
        assert_eq!(out.take(&mut [0; 41]), Some(Err(42)), "one that does not fit is dropped");
        assert_eq!(out.take(&mut [0; 42]), Some(Ok(42)));
        assert_eq!(out.frames.len() + out.spare.len(), REPLIES_MAX);
    }

    #[test]
    fn a_reply_goes_where_its_receiver_was_last_seen() {
        let mut out = Outbox::new();
        for guest in 0..40u8 {
            let mut packet = frame(IPV4, 30, 60);
            packet[6..12].copy_from_slice(&[2, 0, 0, 0, 0, guest]);
            packet[26..30].copy_from_slice(&[10, 0, 0, guest]);
            out.learn(&packet);
        }
        assert_eq!(out.neighbours.len(), NEIGHBOURS_MAX);
        for (guest, expected) in [(30, 30), (39, 39), (1, 39)] {
            Leaving(&mut out).consume(20, |packet| packet[16..20].copy_from_slice(&[10, 0, 0, guest]));
            let mut reply = [0; 64];
            assert_eq!(out.take(&mut reply), Some(Ok(34)));
            assert_eq!(reply[..6], [2, 0, 0, 0, 0, expected], "forgotten ones get the latest");
            assert_eq!(reply[6..12], MAC);
        }
    }
}
