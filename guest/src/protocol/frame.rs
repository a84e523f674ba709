//! Messages and blocks on a byte stream.
//!
//! ```text
//!   message   ┌ length u32 LE, 1 to 1 MiB ┬ JSON ┐
//!   block     ┌ length u32 LE, 0 to 256 KiB ┬ bytes ┐     length 0 ends the sequence
//! ```
//!
//! The length is checked before anything is allocated, and memory grows with what has really
//! arrived, so that four bytes from a stranger never cost a megabyte.

use serde::{Serialize, de::DeserializeOwned};
use std::io::{self, Read, Write};

/// Most bytes of JSON in one message.
pub const MAX_MESSAGE: u32 = 1 << 20;

/// Most bytes in one block of an archive.
pub const MAX_BLOCK: u32 = 256 << 10;

/// What can go wrong with a message.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream ended between two messages.
    #[error("The connection was closed")]
    Closed,
    /// The stream ended inside a message.
    #[error("The connection was closed in the middle of a message")]
    Truncated,
    /// The length is zero or too large.
    #[error("A message of {length} bytes was announced; 1 to {most} are allowed")]
    Length {
        /// The announced length.
        length: u32,
        /// The largest one allowed.
        most: u32,
    },
    /// The bytes are not the message expected.
    #[error("A message could not be understood")]
    Content(#[source] serde_json::Error),
    /// The stream failed.
    #[error("The connection failed")]
    Stream(#[source] io::Error),
}

impl FrameError {
    /// Whether the reason is that time ran out.
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::Stream(e)
            if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut))
    }
}

/// Writes one message with a single call to `write_all`.
///
/// # Errors
/// [`FrameError::Length`] when the message is larger than [`MAX_MESSAGE`],
/// [`FrameError::Stream`] when the stream fails.
pub fn write<T: Serialize>(to: &mut impl Write, message: &T) -> Result<(), FrameError> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message).map_err(FrameError::Content)?;
    let length = u32::try_from(bytes.len() - 4).unwrap_or(u32::MAX);
    if length > MAX_MESSAGE {
        return Err(FrameError::Length { length, most: MAX_MESSAGE });
    }
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    to.write_all(&bytes).map_err(FrameError::Stream)
}

/// Reads one message.
///
/// # Errors
/// [`FrameError::Closed`] when the stream ends before the first byte; the others as named.
pub fn read<T: DeserializeOwned>(from: &mut impl Read) -> Result<T, FrameError> {
    let length = read_length(from)?;
    if length == 0 || length > MAX_MESSAGE {
        return Err(FrameError::Length { length, most: MAX_MESSAGE });
    }
    let mut bytes = Vec::new();
    read_body(from, length, &mut bytes)?;
    serde_json::from_slice(&bytes).map_err(FrameError::Content)
}

/// Writes one block; an empty one ends the sequence.
///
/// # Errors
/// [`FrameError::Length`] when `block` is larger than [`MAX_BLOCK`],
/// [`FrameError::Stream`] when the stream fails.
pub fn write_block(to: &mut impl Write, block: &[u8]) -> Result<(), FrameError> {
    let length = u32::try_from(block.len()).unwrap_or(u32::MAX);
    if length > MAX_BLOCK {
        return Err(FrameError::Length { length, most: MAX_BLOCK });
    }
    to.write_all(&length.to_le_bytes()).map_err(FrameError::Stream)?;
    to.write_all(block).map_err(FrameError::Stream)
}

/// Reads one block into `block`, replacing what it held; `false` at the end of the sequence.
///
/// # Errors
/// As [`read`]; the end of the stream is always an error here.
pub fn read_block(from: &mut impl Read, block: &mut Vec<u8>) -> Result<bool, FrameError> {
    block.clear();
    let length = read_length(from)?;
    if length > MAX_BLOCK {
        return Err(FrameError::Length { length, most: MAX_BLOCK });
    }
    read_body(from, length, block)?;
    Ok(length != 0)
}

fn read_length(from: &mut impl Read) -> Result<u32, FrameError> {
    let mut length = [0; 4];
    let mut have = 0;
    while have < length.len() {
        match from.read(&mut length[have..]) {
            Ok(0) if have == 0 => return Err(FrameError::Closed),
            Ok(0) => return Err(FrameError::Truncated),
            Ok(n) => have += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(FrameError::Stream(e)),
        }
    }
    Ok(u32::from_le_bytes(length))
}

fn read_body(from: &mut impl Read, length: u32, into: &mut Vec<u8>) -> Result<(), FrameError> {
    // `take` and `read_to_end` grow the buffer with what arrives, not with what is announced,
    // beyond what makes the usual message one read.
    into.reserve((length as usize).min(8 << 10));
    let read = from.take(u64::from(length)).read_to_end(into).map_err(FrameError::Stream)?;
    if read < length as usize { Err(FrameError::Truncated) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Open, ProcessSpec, Reply, Request};

    fn framed(bytes: &[u8]) -> Vec<u8> {
        let mut all = u32::try_from(bytes.len()).unwrap().to_le_bytes().to_vec();
        all.extend_from_slice(bytes);
        all
    }

    #[test]
    fn a_message_comes_back_as_it_went() {
        let sent = Request::Start(Box::new(ProcessSpec {
            args: vec!["sh".into(), "-c".into(), "echo \u{1F980}\n\0".into()],
            ..ProcessSpec::default()
        }));
        let mut wire = Vec::new();
        write(&mut wire, &sent).unwrap();
        write(&mut wire, &Request::Setup(Box::default())).unwrap();
        let mut rest = wire.as_slice();
        assert_eq!(read::<Request>(&mut rest).unwrap(), sent);
        assert!(matches!(read::<Request>(&mut rest).unwrap(), Request::Setup(_)));
        assert!(matches!(read::<Request>(&mut rest), Err(FrameError::Closed)));
    }

    #[test]
    fn an_announced_gigabyte_is_refused_before_it_is_read() {
        let wire = (1u32 << 30).to_le_bytes();
        assert!(matches!(
            read::<Request>(&mut wire.as_slice()),
            Err(FrameError::Length { length: 0x4000_0000, .. })
        ));
        assert!(matches!(read_block(&mut wire.as_slice(), &mut Vec::new()), Err(FrameError::Length { .. })));
    }

    #[test]
    fn a_truncated_message_is_an_error_wherever_it_is_cut() {
        let mut wire = Vec::new();
        write(&mut wire, &Request::List {}).unwrap();
        for cut in 1..wire.len() {
            assert!(matches!(read::<Request>(&mut &wire[..cut]), Err(FrameError::Truncated)));
        }
    }

    #[test]
    fn an_unknown_field_or_request_is_refused() {
        for text in [
            r#"{"start":{"args":["x"],"privileged":true}}"#,
            r#"{"setup":{"readonly":true}}"#,
            r#"{"signal":{"process":0,"signal":9,"all":true}}"#,
            r#"{"format_disks":{}}"#,
            "[]",
            "",
            "{\"list\":{}} trailing",
            "\u{0}\u{0}",
        ] {
            let wire = framed(text.as_bytes());
            assert!(read::<Request>(&mut wire.as_slice()).is_err(), "{text}");
        }
        let wire = framed(br#"{"control":{"version":1,"root":true}}"#);
        assert!(read::<Open>(&mut wire.as_slice()).is_err());
    }

    #[test]
    fn deep_nesting_is_an_error_and_not_a_stack_overflow() {
        let wire = framed("[".repeat(1_000_000).as_bytes());
        assert!(matches!(read::<Reply>(&mut wire.as_slice()), Err(FrameError::Content(_))));
    }

    #[test]
    fn a_message_too_large_to_be_read_is_not_written() {
        let spec = ProcessSpec { args: vec!["x".repeat(2 << 20)], ..ProcessSpec::default() };
        let mut wire = Vec::new();
        assert!(write(&mut wire, &Request::Exec(Box::new(spec))).is_err());
        assert!(wire.is_empty());
    }

    #[test]
    fn blocks_end_with_the_empty_one() {
        let mut wire = Vec::new();
        write_block(&mut wire, b"abc").unwrap();
        write_block(&mut wire, b"").unwrap();
        let (mut rest, mut block) = (wire.as_slice(), Vec::new());
        assert!(read_block(&mut rest, &mut block).unwrap());
        assert_eq!(block, b"abc");
        assert!(!read_block(&mut rest, &mut block).unwrap());
        assert!(matches!(read_block(&mut rest, &mut block), Err(FrameError::Closed)));
    }
}
