//! Tar archives to and from the container, in blocks with a verdict at the end.
//!
//! The verdict is why archives are not simply raw streams: a copy that broke off in the
//! middle must not look like a small copy.

use super::{
    ClientError, WORK_TIMEOUT,
    agent::{expect_done, read_reply, unexpected},
    connection::Deadline,
};
use crate::protocol::{Reply, frame};
use std::{
    io::{self, Read},
    os::unix::net::UnixStream,
};

/// A tar archive coming out of the container. It reads to its end only if the agent has said
/// that it is whole; otherwise the last read fails, with the [`ClientError`] inside.
#[derive(Debug)]
pub struct ArchiveReader {
    connection: UnixStream,
    block: Vec<u8>,
    used: usize,
    ended: bool,
}

impl ArchiveReader {
    pub(super) fn new(connection: UnixStream) -> Self {
        Self { connection, block: Vec::new(), used: 0, ended: false }
    }

    fn next_block(&mut self) -> Result<bool, ClientError> {
        let what = "send the archive";
        self.used = 0;
        let mut from = Deadline::after(&self.connection, WORK_TIMEOUT);
        let more = frame::read_block(&mut from, &mut self.block)
            .map_err(|e| ClientError::from_frame(what, WORK_TIMEOUT, e))?;
        if !more {
            expect_done(read_reply(&self.connection, WORK_TIMEOUT, what)?, what)?;
        }
        Ok(more)
    }
}

impl Read for ArchiveReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.used == self.block.len() && !self.ended {
            let more = self.next_block().map_err(io::Error::other)?;
            self.ended = !more;
        }
        let left = self.block.get(self.used..).unwrap_or_default();
        let n = left.len().min(buffer.len());
        buffer[..n].copy_from_slice(&left[..n]);
        self.used += n;
        Ok(n)
    }
}

/// Sends `tar` as blocks and reads the verdict.
pub(super) fn send(connection: &mut UnixStream, mut tar: impl Read) -> Result<(), ClientError> {
    let what = "take the archive";
    connection.set_write_timeout(Some(WORK_TIMEOUT)).map_err(ClientError::Stream)?;
    let mut block = vec![0; 64 << 10];
    loop {
        let n = match tar.read(&mut block) {
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(ClientError::Input(e)),
        };
        if let Err(e) = frame::write_block(connection, &block[..n]) {
            // The agent stops reading when it cannot go on; its reason is already here.
            return match read_reply(connection, WORK_TIMEOUT, what) {
                Ok(reply @ Reply::Failed(_)) => Err(unexpected(reply, what)),
                _ => Err(ClientError::from_frame(what, WORK_TIMEOUT, e)),
            };
        }
        if n == 0 {
            break;
        }
    }
    expect_done(read_reply(connection, WORK_TIMEOUT, what)?, what)
}
