//! Synchronous calls on a disk. Each does the whole of what it says or reports why not.
//!
//! What the kernel may do short of that is dealt with here: `EINTR` and transfers cut short
//! go on where they stopped, `EAGAIN` is tried again a bounded number of times, and reading
//! past the end (the file was cut short under a running machine) is `UnexpectedEof`.
//!
//! A failed flush is remembered. The kernel reports a write that never reached the medium
//! once, to the next `fdatasync`, and then calls the pages clean; a second flush would
//! succeed although the data is lost. So after the first failure every flush fails, until
//! the disk is opened anew.

use std::{
    io,
    os::fd::AsRawFd,
    sync::atomic::Ordering::{Acquire, Relaxed, Release},
};

use super::{Bounce, Buffers, Disk, SECTOR};
use crate::limits::BLOCK_RETRIES_MAX;

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
/// Bits of `Disk::zeroing`: what this host was found not to know.
const NO_PUNCH: u8 = 1;
const NO_ZERO: u8 = 2;
const NO_ALLOCATE: u8 = 4;

// linux/fs.h, which the bindings lack: discard a byte range (`_IO(0x12, 119)`).
const BLKDISCARD: libc::Ioctl = 0x1277;

/// A run of sectors that lies inside its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First sector.
    pub sector: u64,
    /// Number of sectors.
    pub sectors: u32,
    /// Whether the host may give the space back (`VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`).
    pub unmap: bool,
}

impl Extent {
    /// First byte.
    pub fn offset(&self) -> u64 {
        self.sector.saturating_mul(SECTOR)
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        u64::from(self.sectors) * SECTOR
    }

    /// Whether it covers nothing.
    pub fn is_empty(&self) -> bool {
        self.sectors == 0
    }
}

impl Disk {
    /// One `preadv2` at byte `offset` with `flags`; returns what came, and takes that off
    /// `buffers`.
    pub fn read_once(&self, buffers: &mut Buffers, offset: u64, flags: i32) -> io::Result<u64> {
        let (iovecs, at) = (buffers.iovecs(), position(offset)?);
        // SAFETY: the runs are mapped and writable by the contract of `Buffers::push`.
        let done =
            unsafe { libc::preadv2(self.file.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as i32, at, flags) };
        let done = count(done)?;
        buffers.advance(done);
        Ok(done)
    }

    /// One `pwritev2` at byte `offset` with `flags`; returns what went, and takes that off
    /// `buffers`.
    pub fn write_once(&self, buffers: &mut Buffers, offset: u64, flags: i32) -> io::Result<u64> {
        let (iovecs, at) = (buffers.iovecs(), position(offset)?);
        // SAFETY: the runs are mapped by the contract of `Buffers::push`.
        let done =
            unsafe { libc::pwritev2(self.file.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as i32, at, flags) };
        let done = count(done)?;
        buffers.advance(done);
        Ok(done)
    }

    /// Fills all of `buffers` from byte `offset`. Waits for the medium.
    pub fn read(&self, buffers: &mut Buffers, offset: u64, bounce: &mut Bounce) -> io::Result<()> {
        if self.refuses(buffers, offset) {
            return bounce.read(self, buffers, offset);
        }
        whole(buffers, offset, |buffers, at| self.read_once(buffers, at, 0))
    }

    /// Writes all of `buffers` at byte `offset`; with `stable`, returns when it is on the
    /// medium. Waits for the medium.
    pub fn write(
        &self,
        buffers: &mut Buffers,
        offset: u64,
        stable: bool,
        bounce: &mut Bounce,
    ) -> io::Result<()> {
        let flags = if stable { libc::RWF_DSYNC } else { 0 };
        if self.refuses(buffers, offset) {
            return bounce.write(self, buffers, offset, flags);
        }
        whole(buffers, offset, |buffers, at| self.write_once(buffers, at, flags))
    }

    /// Whether `O_DIRECT` would refuse this transfer, so that it must go through a [`Bounce`].
    pub fn refuses(&self, buffers: &Buffers, offset: u64) -> bool {
        let Some(need) = self.direct else { return false };
        let unit = u64::from(need.offset);
        let fits = |run: &libc::iovec| {
            run.iov_base.addr().is_multiple_of(need.memory as usize)
                && (run.iov_len as u64).is_multiple_of(unit)
        };
        !offset.is_multiple_of(unit) || !buffers.iovecs().iter().all(fits)
    }

    /// Puts everything written so far on the medium. Waits for it.
    pub fn flush(&self) -> io::Result<()> {
        if self.flush_failed() {
            return Err(lost());
        }
        loop {
            // SAFETY: takes a descriptor alone.
            if unsafe { libc::fdatasync(self.file.as_raw_fd()) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                self.set_flush_failed();
                return Err(error);
            }
        }
    }

    /// Whether a flush failed since the disk was opened or last [forgiven](Disk::forgive).
    pub fn flush_failed(&self) -> bool {
        self.flush_failed.load(Acquire)
    }

    /// Remembers that a flush failed; true when it is news.
    pub fn set_flush_failed(&self) -> bool {
        !self.flush_failed.swap(true, Release)
    }

    /// Forgets failed flushes: a new driver begins, which was promised nothing.
    pub fn forgive(&self) {
        self.flush_failed.store(false, Release);
    }

    /// Tells the host that the bytes of `extent` are not needed. Their content is undefined
    /// afterwards; a host that cannot give space back does nothing, as it may (VIRTIO 1.2
    /// section 5.2.6.2).
    pub fn discard(&self, extent: Extent) -> io::Result<()> {
        let done = if self.block_device { self.discard_device(extent) } else { self.allocate(PUNCH, extent) };
        done.or_else(|e| if is_unsupported(&e) { Ok(()) } else { Err(e) })
    }

    /// Makes `extent` read as zeroes by the cheapest means the host has.
    pub fn zero(&self, extent: Extent, bounce: &mut Bounce) -> io::Result<()> {
        while let Some(mode) = self.zeroing(extent) {
            match self.allocate(mode, extent) {
                Err(e) if is_unsupported(&e) => self.cannot(mode),
                done => return done,
            }
        }
        // A hole that is filled with reserved space again reads as zeroes and cannot run out
        // of space later: the best of file systems (tmpfs) that do not zero in place.
        let known = self.zeroing.load(Relaxed);
        if !self.block_device && known & (NO_PUNCH | NO_ALLOCATE) == 0 {
            let both =
                self.allocate(PUNCH, extent).and_then(|()| self.allocate(libc::FALLOC_FL_KEEP_SIZE, extent));
            match both {
                Err(e) if is_unsupported(&e) => self.cannot(libc::FALLOC_FL_KEEP_SIZE),
                done => return done,
            }
        }
        self.zero_by_hand(extent, bounce)
    }

    /// The `fallocate` mode that zeroes `extent` here as far as is known; `None` when only
    /// [`Disk::zero`] can.
    pub fn zeroing(&self, extent: Extent) -> Option<i32> {
        let known = self.zeroing.load(Relaxed);
        if extent.unmap && known & NO_PUNCH == 0 {
            return Some(PUNCH);
        }
        (known & NO_ZERO == 0).then_some(ZERO)
    }

    /// The `fallocate` mode that discards here; `None` for block devices.
    pub fn discarding(&self) -> Option<i32> {
        (!self.block_device).then_some(PUNCH)
    }

    /// Remembers that the host does not know this `fallocate` mode.
    pub fn cannot(&self, mode: i32) {
        let bit = match mode {
            PUNCH => NO_PUNCH,
            ZERO => NO_ZERO,
            _ => NO_ALLOCATE,
        };
        self.zeroing.fetch_or(bit, Relaxed);
    }

    fn allocate(&self, mode: i32, extent: Extent) -> io::Result<()> {
        if extent.is_empty() {
            return Ok(());
        }
        let (offset, len) = (position(extent.offset())?, position(extent.len())?);
        loop {
            // SAFETY: takes numbers alone.
            if unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, len) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// `BLKDISCARD` on the whole blocks inside `extent`.
    fn discard_device(&self, extent: Extent) -> io::Result<()> {
        let unit = u64::from(self.geometry.physical.max(self.geometry.logical));
        let start = extent.offset().next_multiple_of(unit);
        let end = (extent.offset() + extent.len()) / unit * unit;
        if end <= start {
            return Ok(());
        }
        let range = [start, end - start];
        // SAFETY: the request reads two 64-bit numbers.
        match unsafe { libc::ioctl(self.file.as_raw_fd(), BLKDISCARD, range.as_ptr()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn zero_by_hand(&self, extent: Extent, bounce: &mut Bounce) -> io::Result<()> {
        #[repr(align(4096))]
        struct Page([u8; 4096]);
        static ZEROES: Page = Page([0; 4096]);
        let (mut at, mut left) = (extent.offset(), extent.len());
        let mut buffers = Buffers::new();
        while left > 0 {
            buffers.clear();
            for _ in 0..256 {
                let len = (left - buffers.len()).min(4096) as usize;
                let run = libc::iovec { iov_base: (&raw const ZEROES.0).cast_mut().cast(), iov_len: len };
                // SAFETY: the page is static and only ever read.
                unsafe { buffers.push(run) };
            }
            let part = buffers.len();
            self.write(&mut buffers, at, false, bounce)?;
            at += part;
            left -= part;
        }
        Ok(())
    }
}

/// Repeats `once` until `buffers` are used up.
fn whole(
    buffers: &mut Buffers,
    offset: u64,
    mut once: impl FnMut(&mut Buffers, u64) -> io::Result<u64>,
) -> io::Result<()> {
    let (mut at, mut retries) = (offset, 0);
    while !buffers.is_empty() {
        match once(buffers, at) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(done) => at += done,
            Err(e) if is_passing(&e) && retries < BLOCK_RETRIES_MAX => {
                retries += 1;
                if e.kind() == io::ErrorKind::WouldBlock {
                    std::thread::yield_now();
                }
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Whether the same call may succeed when made again at once.
pub(super) fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}

/// Whether the host says that it has no such operation, as opposed to that it failed.
pub(crate) fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL))
}

fn lost() -> io::Error {
    io::Error::other("An earlier flush failed, so data written before it may be lost")
}

fn position(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn count(done: isize) -> io::Result<u64> {
    u64::try_from(done).map_err(|_| io::Error::last_os_error())
}
