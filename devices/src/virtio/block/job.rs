//! A request on its way: the chain, where its data lies, how far it came.
//!
//! Jobs are made once, one for each descriptor of the ring, and keep their room. A request
//! that the kernel works on lives in the job of its head descriptor, untouched, until its
//! completion is reaped, whatever the driver, the owner or the device's own end have asked
//! for meanwhile: the kernel writes into guest memory through it.

use std::io;

use super::{
    request::{IOERR, OK, Refusal, Request, Terms, parse},
    stats::Tally,
};
use crate::{
    disk::{Bounce, Buffers, Disk, Extent, Operation, SECTOR},
    limits::BLOCK_RETRIES_MAX,
    virtio::queue::{Chain, Queue},
};

/// One request.
pub(super) struct Job {
    pub chain: Chain,
    pub request: Request,
    /// Where the data lies that is still to be moved.
    pub buffers: Buffers,
    /// Where on the disk it belongs, in bytes.
    pub offset: u64,
    /// The kernel works on it.
    pub busy: bool,
    extents: Vec<Extent>,
    /// Extents done.
    extents_done: usize,
    /// `fallocate` mode of the extent the kernel works on.
    mode: i32,
    /// Bytes of data when it was taken.
    len: u64,
    retries: u16,
}

/// What a completion means for its job.
#[derive(Debug)]
pub(super) enum Step {
    /// Give it to the kernel again: there is more to do.
    Again,
    /// The kernel cannot; a plain call may.
    Plain,
    /// It is over.
    Done(io::Result<()>),
}

impl Default for Job {
    fn default() -> Job {
        Job {
            chain: Chain::new(),
            request: Request::Flush,
            buffers: Buffers::new(),
            offset: 0,
            busy: false,
            extents: Vec::new(),
            extents_done: 0,
            mode: 0,
            len: 0,
            retries: 0,
        }
    }
}

impl Job {
    /// Finds out what the chain asks for.
    pub fn read_request(&mut self, terms: &Terms) -> Result<(), Refusal> {
        self.request = parse(&self.chain, terms, &mut self.buffers, &mut self.extents)?;
        self.offset = match self.request {
            Request::In(sector) | Request::Out(sector) => sector * SECTOR,
            _ => 0,
        };
        self.len = self.buffers.len();
        self.extents_done = 0;
        self.retries = 0;
        Ok(())
    }

    /// Bytes of data it moves.
    pub fn bytes(&self) -> u64 {
        self.len
    }

    /// Whether there is nothing to do for the disk.
    pub fn is_empty(&self) -> bool {
        match self.request {
            Request::In(_) | Request::Out(_) => self.buffers.is_empty(),
            Request::Discard | Request::WriteZeroes => self.extents_done >= self.extents.len(),
            Request::Flush | Request::GetId => false,
        }
    }

    /// What to ask of a ring next; `None` when only a plain call will do.
    pub fn operation(&mut self, disk: &Disk, stable: bool) -> Option<Operation<'_>> {
        match self.request {
            Request::In(_) => Some(Operation::Read(&self.buffers, self.offset)),
            Request::Out(_) => Some(Operation::Write(&self.buffers, self.offset, stable)),
            Request::Flush => Some(Operation::Flush),
            Request::GetId => None,
            // Made durable one by one by plain calls for a driver without flush.
            Request::Discard | Request::WriteZeroes if stable => None,
            Request::Discard | Request::WriteZeroes => {
                let extent = *self.extents.get(self.extents_done)?;
                let discard = self.request == Request::Discard;
                self.mode = if discard { disk.discarding()? } else { disk.zeroing(extent)? };
                Some(Operation::Allocate(self.mode, extent))
            }
        }
    }

    /// Takes in what the kernel said about the last operation.
    pub fn completed(&mut self, result: i32, disk: &Disk) -> Step {
        let Ok(done) = u64::try_from(result) else {
            return self.failed(io::Error::from_raw_os_error(result.saturating_neg()), disk);
        };
        match self.request {
            // The file ends before the disk does: it was cut short.
            Request::In(_) | Request::Out(_) if done == 0 => {
                Step::Done(Err(io::ErrorKind::UnexpectedEof.into()))
            }
            Request::In(_) | Request::Out(_) => {
                self.buffers.advance(done);
                self.offset += done;
                if self.buffers.is_empty() { Step::Done(Ok(())) } else { self.again() }
            }
            // Of two flushes at once, the kernel may have told only the other one of a loss.
            Request::Flush if disk.flush_failed() => Step::Done(Err(io::ErrorKind::Other.into())),
            Request::Flush | Request::GetId => Step::Done(Ok(())),
            Request::Discard | Request::WriteZeroes => {
                self.extents_done += 1;
                if self.is_empty() { Step::Done(Ok(())) } else { Step::Again }
            }
        }
    }

    fn failed(&mut self, error: io::Error, disk: &Disk) -> Step {
        if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) {
            return self.again();
        }
        match self.request {
            Request::Flush => {
                disk.set_flush_failed();
                Step::Done(Err(error))
            }
            Request::Discard => Step::Plain,
            Request::WriteZeroes if crate::disk::is_unsupported(&error) => {
                disk.cannot(self.mode);
                Step::Plain
            }
            _ => Step::Done(Err(error)),
        }
    }

    fn again(&mut self) -> Step {
        self.retries = self.retries.saturating_add(1);
        if self.retries > BLOCK_RETRIES_MAX {
            return Step::Done(Err(io::ErrorKind::TimedOut.into()));
        }
        Step::Again
    }

    /// Does what is left by plain calls, and waits for it.
    pub fn plain(&mut self, disk: &Disk, stable: bool, bounce: &mut Bounce) -> io::Result<()> {
        match self.request {
            Request::In(_) => disk.read(&mut self.buffers, self.offset, bounce),
            Request::Out(_) => disk.write(&mut self.buffers, self.offset, stable, bounce),
            Request::Flush => disk.flush(),
            Request::GetId => Ok(()),
            Request::Discard | Request::WriteZeroes => {
                while let Some(extent) = self.extents.get(self.extents_done) {
                    match self.request {
                        Request::Discard => disk.discard(*extent)?,
                        _ => disk.zero(*extent, bounce)?,
                    }
                    self.extents_done += 1;
                }
                if stable { disk.flush() } else { Ok(()) }
            }
        }
    }

    /// Gives the chain back with its status, and counts it.
    pub fn finish(&mut self, queue: &mut Queue, status: u8, tally: &mut Tally) {
        self.busy = false;
        let good = status == OK;
        let mut written = 0;
        match self.request {
            Request::In(_) => {
                // Also after a failure: some of it may have come.
                queue.mark_written(&self.chain, self.len);
                tally.reads += 1;
                if good {
                    written = self.len;
                    tally.read_bytes += self.len;
                }
            }
            Request::Out(_) => {
                tally.writes += 1;
                tally.write_bytes += if good { self.len } else { 0 };
            }
            Request::Flush => tally.flushes += 1,
            Request::GetId => written = if good { super::request::ID_LEN as u64 } else { 0 },
            Request::Discard | Request::WriteZeroes => tally.discards += 1,
        }
        tally.errors += u64::from(status == IOERR);
        give_back(&self.chain, queue, status, written);
    }
}

/// Writes the status into the last writable byte and returns the chain, `data` bytes of which
/// were written before it.
pub(super) fn give_back(chain: &Chain, queue: &mut Queue, status: u8, data: u64) {
    let at = chain.writable_len().saturating_sub(1);
    let len = data + chain.write(queue, at, &[status]) as u64;
    // Data is capped far below 4 GiB.
    queue.push(chain.head(), u32::try_from(len).unwrap_or(u32::MAX));
}
