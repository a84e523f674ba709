//! What is said on the request queue (VIRTIO 1.2 section 5.15.6): 24 bytes there, 10 back.
//!
//! ```text
//!   request  0 type   2 padding   8 address   16 blocks   18 padding        24
//!   answer   0 type   2 padding   8 state     10
//! ```
//!
//! Everything is little-endian. Padding is ignored in requests and zero in answers. Whether
//! a range makes sense is not looked at here.

/// Bytes of a request.
pub(super) const REQUEST_LEN: usize = 24;
/// Bytes of an answer.
pub(super) const ANSWER_LEN: usize = 10;

/// Consecutive blocks, as the driver names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    /// Guest address of the first one.
    pub address: u64,
    /// How many.
    pub blocks: u16,
}

/// What the driver asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    Plug(Span),
    Unplug(Span),
    UnplugAll,
    State(Span),
    /// A type that is not in the specification.
    Unknown,
}

impl Request {
    /// Every pattern of bytes is some request.
    pub(super) fn parse(bytes: &[u8; REQUEST_LEN]) -> Request {
        let [t0, t1, _, _, _, _, _, _, a, b, c, d, e, f, g, h, n0, n1, ..] = *bytes;
        let address = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        let span = Span { address, blocks: u16::from_le_bytes([n0, n1]) };
        match u16::from_le_bytes([t0, t1]) {
            0 => Request::Plug(span),
            1 => Request::Unplug(span),
            2 => Request::UnplugAll,
            3 => Request::State(span),
            _ => Request::Unknown,
        }
    }
}

/// How much of a range is plugged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Filling {
    Plugged,
    Unplugged,
    Mixed,
}

/// What the driver is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// Done.
    Ack,
    /// Not now: it would be more than was asked for. The driver waits for a new size.
    Nack,
    /// Not now: the host could not. The driver tries again in a while.
    Busy,
    /// Never: the request makes no sense.
    Error,
    /// Done, and this is the state.
    State(Filling),
}

impl Answer {
    pub(super) fn bytes(self) -> [u8; ANSWER_LEN] {
        let (kind, state) = match self {
            Answer::Ack | Answer::State(Filling::Plugged) => (0, 0),
            Answer::State(Filling::Unplugged) => (0, 1),
            Answer::State(Filling::Mixed) => (0, 2),
            Answer::Nack => (1, 0),
            Answer::Busy => (2, 0),
            Answer::Error => (3, 0),
        };
        [kind, 0, 0, 0, 0, 0, 0, 0, state, 0]
    }

    /// Whether the driver got what it asked for.
    pub(super) fn is_ack(self) -> bool {
        matches!(self, Answer::Ack | Answer::State(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_by_the_layout_of_the_specification_and_padding_is_ignored() {
        let mut bytes = [0xee; REQUEST_LEN];
        bytes[8..16].copy_from_slice(&0x1_2345_6789_abcd_u64.to_le_bytes());
        bytes[16..18].copy_from_slice(&0x1234_u16.to_le_bytes());
        let span = Span { address: 0x1_2345_6789_abcd, blocks: 0x1234 };
        for (kind, request) in [
            (0u16, Request::Plug(span)),
            (1, Request::Unplug(span)),
            (2, Request::UnplugAll),
            (3, Request::State(span)),
            (4, Request::Unknown),
            (0x0100, Request::Unknown),
        ] {
            bytes[..2].copy_from_slice(&kind.to_le_bytes());
            assert_eq!(Request::parse(&bytes), request);
        }
    }

    #[test]
    fn answers_are_written_by_the_layout_of_the_specification() {
        let of = |answer: Answer| (answer.bytes()[0], answer.bytes()[8]);
        assert_eq!(of(Answer::Ack), (0, 0));
        assert_eq!(of(Answer::Nack), (1, 0));
        assert_eq!(of(Answer::Busy), (2, 0));
        assert_eq!(of(Answer::Error), (3, 0));
        assert_eq!(of(Answer::State(Filling::Plugged)), (0, 0));
        assert_eq!(of(Answer::State(Filling::Unplugged)), (0, 1));
        assert_eq!(of(Answer::State(Filling::Mixed)), (0, 2));
    }
}
