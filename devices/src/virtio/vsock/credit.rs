//! Flow control of one connection (VIRTIO 1.2 section 5.10.6.3).
//!
//! Each side has a receive buffer and tells the other its size (`buf_alloc`) and how many
//! bytes it has taken out of it so far (`fwd_cnt`, modulo 2^32). The sender counts what it
//! has sent. What it may still send is
//!
//! ```text
//!   free = buf_alloc - (sent - fwd_cnt)          all modulo 2^32
//!                       └── in flight ──┘
//! ```
//!
//! Towards the host the buffer is [`crate::limits::VSOCK_BUFFER`] bytes, of which none is
//! allocated while the host's reader keeps up. A guest that sends more than it was allowed
//! to, or that claims to have taken out more than it was sent, loses that connection.
//!
//! One case looks hostile and is not: `fwd_cnt` may step *back* a little. A driver with two
//! threads fills in the counter of one packet and queues another first. Such a value is
//! stale, and is ignored; a step back by more than was ever allowed in flight is a lie.

use crate::limits::VSOCK_BUFFER;

/// What both sides have sent and taken.
#[derive(Debug, Clone, Copy, Default)]
pub struct Credit {
    /// Bytes received from the guest.
    received: u32,
    /// Bytes of these handed to the host's socket.
    forwarded: u32,
    /// `forwarded` as the guest last heard it.
    told: u32,
    /// Bytes sent to the guest.
    sent: u32,
    /// Size of the guest's buffer.
    peer_alloc: u32,
    /// Bytes the guest has taken out of its buffer.
    peer_forwarded: u32,
    /// The largest buffer the guest ever announced: how stale a counter can be.
    peer_widest: u32,
}

/// The guest broke the rules of flow control.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Broken;

impl Credit {
    /// Takes in what a packet of the guest says about its buffer.
    pub fn hear(&mut self, buf_alloc: u32, fwd_cnt: u32) -> Result<(), Broken> {
        self.peer_alloc = buf_alloc;
        self.peer_widest = self.peer_widest.max(buf_alloc);
        let ahead = fwd_cnt.wrapping_sub(self.peer_forwarded);
        if ahead <= self.in_flight() {
            self.peer_forwarded = fwd_cnt;
            return Ok(());
        }
        let behind = self.peer_forwarded.wrapping_sub(fwd_cnt);
        if behind <= self.peer_widest.min(i32::MAX as u32) { Ok(()) } else { Err(Broken) }
    }

    /// Bytes sent that the guest has not taken yet.
    fn in_flight(&self) -> u32 {
        self.sent.wrapping_sub(self.peer_forwarded)
    }

    /// Bytes that may be sent to the guest now.
    pub fn allowance(&self) -> u32 {
        self.peer_alloc.saturating_sub(self.in_flight())
    }

    /// Counts bytes sent to the guest; at most [`Credit::allowance`].
    pub fn send(&mut self, len: u32) {
        self.sent = self.sent.wrapping_add(len);
    }

    /// Counts bytes received from the guest, which must fit what it was told.
    pub fn receive(&mut self, len: u32) -> Result<(), Broken> {
        // Against what really was taken, not what the guest heard of it: a guest that guesses
        // right harms nobody.
        let held = self.received.wrapping_sub(self.forwarded);
        if len > VSOCK_BUFFER.saturating_sub(held) {
            return Err(Broken);
        }
        self.received = self.received.wrapping_add(len);
        Ok(())
    }

    /// Counts received bytes as handed on to the host.
    pub fn forward(&mut self, len: u32) {
        self.forwarded = self.forwarded.wrapping_add(len);
    }

    /// Whether the guest should be told of new room: only once it sees less than half of the
    /// buffer free and there is more than that, so that a stream costs one update per half
    /// buffer and not one per packet.
    pub fn update_due(&self) -> bool {
        let seen_in_use = self.received.wrapping_sub(self.told);
        seen_in_use > VSOCK_BUFFER / 2 && self.forwarded != self.told
    }

    /// The `buf_alloc` and `fwd_cnt` for a packet that is about to be sent.
    pub fn tell(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        (VSOCK_BUFFER, self.forwarded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_allowance_is_what_is_free_in_the_guests_buffer() {
        let mut credit = Credit::default();
        assert_eq!(credit.allowance(), 0);
        credit.hear(1000, 0).unwrap();
        credit.send(600);
        assert_eq!(credit.allowance(), 400);
        credit.hear(1000, 500).unwrap();
        assert_eq!(credit.allowance(), 900);
        credit.hear(50, 500).unwrap();
        assert_eq!(credit.allowance(), 0, "a buffer may shrink below what is in flight");
    }

    #[test]
    fn counters_wrap() {
        let mut credit = Credit { sent: u32::MAX - 9, peer_forwarded: u32::MAX - 9, ..Credit::default() };
        credit.hear(u32::MAX, u32::MAX - 9).unwrap();
        credit.send(100);
        assert_eq!(credit.allowance(), u32::MAX - 100);
        credit.hear(u32::MAX, 90).unwrap();
        assert_eq!(credit.allowance(), u32::MAX);
        let mut credit = Credit { received: u32::MAX, forwarded: u32::MAX, told: u32::MAX, ..credit };
        credit.receive(VSOCK_BUFFER).unwrap();
        assert_eq!(credit.receive(1), Err(Broken));
        credit.forward(VSOCK_BUFFER);
        credit.receive(1).unwrap();
    }

    #[test]
    fn claims_to_have_taken_more_than_was_sent_are_broken() {
        let mut credit = Credit::default();
        credit.hear(1000, 0).unwrap();
        credit.send(10);
        assert_eq!(credit.hear(1000, 11), Err(Broken));
        assert_eq!(credit.hear(1000, 1 << 31), Err(Broken));
        credit.hear(1000, 10).unwrap();
    }

    #[test]
    fn a_counter_a_little_behind_is_stale_and_far_behind_is_broken() {
        let mut credit = Credit::default();
        credit.hear(1000, 0).unwrap();
        credit.send(1000);
        credit.hear(1000, 900).unwrap();
        credit.hear(1000, 400).unwrap();
        assert_eq!(credit.allowance(), 900, "the newer value stands");
        assert_eq!(credit.hear(1000, 900u32.wrapping_sub(1001)), Err(Broken));
    }

    #[test]
    fn updates_are_due_only_below_half() {
        let mut credit = Credit::default();
        credit.receive(VSOCK_BUFFER / 2).unwrap();
        credit.forward(VSOCK_BUFFER / 2);
        assert!(!credit.update_due());
        credit.receive(1).unwrap();
        assert!(credit.update_due());
        assert_eq!(credit.tell(), (VSOCK_BUFFER, VSOCK_BUFFER / 2));
        assert!(!credit.update_due());
    }
}
