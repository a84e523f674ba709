//! # From compressed bytes to tar bytes
//!
//! Media types lie (`tar+gzip` layers that are plain tar exist in the wild), so the first bytes
//! decide: gzip, zstd or plain. zstd is decoded by a pure Rust decoder: a layer is hostile, and
//! the decoder needs no C compiler. Both decoders read several streams after each other, as
//! parallel compressors and seekable formats write them, and the latter's skippable frames.

use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

use crate::limits::ZSTD_WINDOW_BYTES;

/// The tar bytes of `input`, whatever it is compressed with.
pub(crate) fn decompress<'a>(input: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    // The largest magic is four bytes; a pipe may deliver them one by one.
    let mut input = input;
    let mut head = Vec::new();
    (&mut input).take(4).read_to_end(&mut head)?;
    let kind = head.clone();
    let whole = BufReader::with_capacity(64 << 10, io::Cursor::new(head).chain(input));
    Ok(match &kind[..] {
        [0x1f, 0x8b, ..] => Box::new(MultiGzDecoder::new(whole)),
        // A frame, or a skippable frame before the first (0x184D2A50 to 0x184D2A5F).
        [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => Box::new(Zstd::new(whole)),
        _ => Box::new(whole),
    })
}

/// Decodes zstd frames until the input ends.
struct Zstd<R> {
    input: R,
    decoder: FrameDecoder,
    inside: bool,
}

impl<R: BufRead> Zstd<R> {
    fn new(input: R) -> Self {
        let mut decoder = FrameDecoder::new();
        decoder.set_max_window_size(ZSTD_WINDOW_BYTES);
        Self { input, decoder, inside: false }
    }

    /// Starts the next frame; false where the input ends.
    fn next_frame(&mut self) -> io::Result<bool> {
        loop {
            if self.input.fill_buf()?.is_empty() {
                return Ok(false);
            }
            match self.decoder.init(&mut self.input) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let skipped = io::copy(&mut (&mut self.input).take(length.into()), &mut io::sink())?;
                    if skipped < length.into() {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
            }
        }
    }
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if !self.inside {
                if !self.next_frame()? {
                    return Ok(0);
                }
                self.inside = true;
            }
            if self.decoder.can_collect() > 0 {
                return self.decoder.read(buffer);
            }
            if self.decoder.is_finished() {
                self.inside = false;
                continue;
            }
            let one = BlockDecodingStrategy::UptoBlocks(1);
            let step = self.decoder.decode_blocks(&mut self.input, one);
            step.map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// `printf hello | zstd`.
    const HELLO: &[u8] = &[
        0x28, 0xb5, 0x2f, 0xfd, 0x24, 0x05, 0x29, 0x00, 0x00, b'h', b'e', b'l', b'l', b'o', 0x42, 0x29, 0x8a,
        0x5c,
    ];

    fn text(bytes: &[u8]) -> io::Result<String> {
        let mut text = String::new();
        decompress(bytes)?.read_to_string(&mut text)?;
        Ok(text)
    }

    #[test]
    fn the_first_bytes_decide() {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(b"hello").unwrap();
        let gzip = gzip.finish().unwrap();
        assert_eq!(text(b"hello").unwrap(), "hello");
        assert_eq!(text(b"he").unwrap(), "he");
        assert_eq!(text(b"").unwrap(), "");
        assert_eq!(text(&gzip).unwrap(), "hello");
        assert_eq!(text(&[&gzip[..], &gzip].concat()).unwrap(), "hellohello");
    }

    #[test]
    fn zstd_frames_follow_each_other_and_skippable_ones_are_skipped() {
        let skippable = [0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3];
        let all = [&skippable[..], HELLO, &skippable, HELLO].concat();
        assert_eq!(text(&all).unwrap(), "hellohello");
    }

    #[test]
    fn a_stream_that_stops_is_an_error() {
        assert!(text(&HELLO[..12]).is_err());
        assert!(text(&[0x1f, 0x8b, 8, 0, 0]).is_err());
        assert!(text(&[0x50, 0x2a, 0x4d, 0x18, 200, 0, 0, 0, 1]).is_err());
    }
}
