//! The conversation over the lab's one serial port: frames of a kind, a length and bytes.
//!
//! ```text
//!   +------+---------------+----------------------+
//!   | kind | length u32 LE | payload (<= 64 KiB)  |
//!   +------+---------------+----------------------+
//! ```
//!
//! One port carries all streams, so what the command wrote to its two outputs keeps its order
//! and the exit code cannot overtake the last byte of output. Both sides are this program, but
//! the host's side reads what a possibly crashing machine sends, so lengths are checked.

use std::io::{self, Write};

/// The longest payload of one frame, in bytes.
pub const PAYLOAD_MAX: usize = 64 * 1024;
/// Bytes before the payload.
const HEADER: usize = 5;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Guest to host: the command is about to start; nothing.
    Started,
    /// Guest to host: bytes of the command's standard output.
    Stdout,
    /// Guest to host: bytes of the command's standard error.
    Stderr,
    /// Guest to host: the command ended; one byte, its exit code or 128+signal.
    Exit,
    /// Guest to host: the command could not be run; one byte of exit code, then the reason.
    Failed,
    /// Host to guest: bytes for the command's standard input.
    Stdin,
    /// Host to guest: standard input has ended.
    StdinEnd,
    /// Host to guest: the terminal's size, rows and columns as u16 LE.
    Resize,
    /// Host to guest: every processor is to be woken once; nothing.
    Pulse,
}

const KINDS: [(Kind, u8); 9] = [
    (Kind::Started, 0),
    (Kind::Stdout, 1),
    (Kind::Stderr, 2),
    (Kind::Exit, 3),
    (Kind::Failed, 4),
    (Kind::Stdin, 16),
    (Kind::StdinEnd, 17),
    (Kind::Resize, 18),
    (Kind::Pulse, 19),
];

impl Kind {
    fn byte(self) -> u8 {
        KINDS.iter().find(|(kind, _)| *kind == self).map_or(0, |(_, byte)| *byte)
    }

    fn from_byte(byte: u8) -> Option<Self> {
        KINDS.iter().find(|(_, known)| *known == byte).map(|(kind, _)| *kind)
    }
}

/// Writes `bytes` as one or more frames of `kind`; an empty slice makes one empty frame.
pub fn send(mut to: impl Write, kind: Kind, bytes: &[u8]) -> io::Result<()> {
    let mut rest = bytes;
    loop {
        let (part, after) = rest.split_at(rest.len().min(PAYLOAD_MAX));
        let mut frame = Vec::with_capacity(HEADER + part.len());
        frame.push(kind.byte());
        frame.extend_from_slice(&u32::try_from(part.len()).unwrap_or(0).to_le_bytes());
        frame.extend_from_slice(part);
        to.write_all(&frame)?;
        rest = after;
        if rest.is_empty() {
            return to.flush();
        }
    }
}

/// Puts frames together from bytes as they arrive.
#[derive(Default)]
pub struct Assembler {
    pending: Vec<u8>,
}

impl Assembler {
    /// Adds bytes that arrived.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
    }

    /// Takes the next whole frame, `None` when more bytes are needed.
    ///
    /// Fails on an unknown kind or a length above [`PAYLOAD_MAX`].
    pub fn next(&mut self) -> io::Result<Option<(Kind, Vec<u8>)>> {
        let Some((header, rest)) = self.pending.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let [kind, length @ ..] = *header;
        let length = u32::from_le_bytes(length) as usize;
        let kind = Kind::from_byte(kind)
            .filter(|_| length <= PAYLOAD_MAX)
            .ok_or_else(|| io::Error::other("The lab's machine sent something that is no frame"))?;
        let Some(payload) = rest.get(..length) else {
            return Ok(None);
        };
        let payload = payload.to_vec();
        self.pending.drain(..HEADER + length);
        Ok(Some((kind, payload)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_survives_arriving_byte_by_byte() {
        let mut wire = Vec::new();
        send(&mut wire, Kind::Stdout, b"one").unwrap();
        send(&mut wire, Kind::Exit, &[7]).unwrap();
        let mut assembler = Assembler::default();
        let mut seen = Vec::new();
        for byte in wire {
            assembler.feed(&[byte]);
            seen.extend(assembler.next().unwrap());
        }
        assert_eq!(seen, [(Kind::Stdout, b"one".to_vec()), (Kind::Exit, vec![7])]);
    }

    #[test]
    fn long_output_is_cut_into_frames_and_keeps_every_byte() {
        let bytes: Vec<u8> = (0..PAYLOAD_MAX * 2 + 17).map(|i| (i % 251) as u8).collect();
        let mut wire = Vec::new();
        send(&mut wire, Kind::Stderr, &bytes).unwrap();
        let mut assembler = Assembler::default();
        assembler.feed(&wire);
        let mut back = Vec::new();
        while let Some((kind, part)) = assembler.next().unwrap() {
            assert_eq!(kind, Kind::Stderr);
            back.extend(part);
        }
        assert_eq!(back, bytes);
    }

    #[test]
    fn an_unknown_kind_and_a_huge_length_are_refused() {
        for wire in [[99u8, 0, 0, 0, 0], [1, 255, 255, 255, 255]] {
            let mut assembler = Assembler::default();
            assembler.feed(&wire);
            assert!(assembler.next().is_err());
        }
    }
}
