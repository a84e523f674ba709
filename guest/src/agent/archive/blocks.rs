//! A byte stream as a sequence of blocks with an end.

use guest::protocol::frame;
use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
};

/// Bytes gathered before a block is sent.
const BLOCK: usize = 64 << 10;

/// Writes blocks.
pub struct BlockWriter<'a> {
    to: &'a UnixStream,
    gathered: Vec<u8>,
}

impl<'a> BlockWriter<'a> {
    pub fn new(to: &'a UnixStream) -> Self {
        Self { to, gathered: Vec::with_capacity(BLOCK) }
    }

    /// Sends what is left and the end.
    pub fn finish(mut self) -> io::Result<()> {
        self.flush()?;
        frame::write_block(&mut self.to, b"").map_err(io::Error::other)
    }
}

impl Write for BlockWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = bytes.len().min(BLOCK - self.gathered.len());
        self.gathered.extend_from_slice(&bytes[..n]);
        if self.gathered.len() == BLOCK {
            self.flush()?;
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.gathered.is_empty() {
            frame::write_block(&mut self.to, &self.gathered).map_err(io::Error::other)?;
            self.gathered.clear();
        }
        Ok(())
    }
}

/// Reads blocks.
pub struct BlockReader<'a> {
    from: &'a UnixStream,
    block: Vec<u8>,
    used: usize,
    ended: bool,
}

impl<'a> BlockReader<'a> {
    pub fn new(from: &'a UnixStream) -> Self {
        Self { from, block: Vec::new(), used: 0, ended: false }
    }

    /// Reads on to the end, at most `most` bytes.
    pub fn skip_rest(&mut self, most: u64) -> io::Result<()> {
        io::copy(&mut self.take(most), &mut io::sink()).map(drop)
    }
}

impl Read for BlockReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.used == self.block.len() && !self.ended {
            self.used = 0;
            let more = frame::read_block(&mut self.from, &mut self.block);
            self.ended = !more.map_err(io::Error::other)?;
        }
        let left = self.block.get(self.used..).unwrap_or_default();
        let n = left.len().min(buffer.len());
        buffer[..n].copy_from_slice(&left[..n]);
        self.used += n;
        Ok(n)
    }
}
