//! The calls of a disk through an io_uring, so that the caller does not wait.
//!
//! ```text
//!   push ─► submission queue ─┐ submit: one enter for all   ┌─► completion queue ─► reap
//!                             └────────► kernel ────────────┘   (its descriptor is readable)
//! ```
//!
//! One ring a queue, made on the thread that uses it when a request first has to wait, with
//! the disk as its only registered file, and restricted to the operations below on that file
//! before it is switched on: a monitor that is taken over gains nothing by its ring.
//!
//! Completions are found by watching the ring's own descriptor: there is no event descriptor
//! to read empty. Where the kernel knows it, `COOP_TASKRUN` lets completions wait for the
//! next system call instead of interrupting this thread; measured on tmpfs at depth 32 that
//! is 1.7 times the requests. `DEFER_TASKRUN` gave 8 % more, but then only the submitting
//! thread can collect what a stuck disk finishes late.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    time::Duration,
};

use io_uring::{IoUring, opcode, register::Restriction, squeue, types::Fixed};

use super::{Buffers, Disk, Extent};

/// What a ring is asked to do. Offsets are in bytes.
#[derive(Debug)]
pub enum Operation<'a> {
    /// Read into the buffers.
    Read(&'a Buffers, u64),
    /// Write from the buffers; with `true` complete when it is on the medium.
    Write(&'a Buffers, u64, bool),
    /// Put everything written so far on the medium.
    Flush,
    /// `fallocate` with this mode.
    Allocate(i32, Extent),
}

/// A ring over one disk.
pub struct Ring {
    uring: IoUring,
    in_flight: u32,
    queued: u32,
}

/// Whether this process may make rings, found out without making one: an impossible size is
/// refused with `EINVAL` only where rings are allowed (they are not under some sysctl
/// settings and seccomp filters).
pub fn available() -> bool {
    let mut parameters = [0u8; 120];
    // SAFETY: 120 bytes is the size of `io_uring_params`, all zeroes is valid, and with zero
    // entries the kernel refuses before it makes anything.
    let done = unsafe { libc::syscall(libc::SYS_io_uring_setup, 0, parameters.as_mut_ptr()) };
    done < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL)
}

impl Ring {
    /// A ring for up to `entries` operations at once on `disk`.
    pub fn new(disk: &Disk, entries: u16) -> io::Result<Ring> {
        let entries = u32::from(entries.max(1));
        let uring = IoUring::builder()
            .setup_r_disabled()
            .setup_coop_taskrun()
            .build(entries)
            // Before Linux 5.19 the kernel does not know COOP_TASKRUN.
            .or_else(|_| IoUring::builder().setup_r_disabled().build(entries))?;
        let submitter = uring.submitter();
        submitter.register_files(&[disk.file().as_raw_fd()])?;
        submitter.register_restrictions(&mut [
            Restriction::sqe_op(opcode::Read::CODE),
            Restriction::sqe_op(opcode::Write::CODE),
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_op(opcode::Fallocate::CODE),
            Restriction::sqe_flags_required(FIXED_FILE),
            Restriction::register_op(UNREGISTER_FILES),
        ])?;
        submitter.register_enable_rings()?;
        Ok(Ring { uring, in_flight: 0, queued: 0 })
    }

    /// Operations pushed and not reaped.
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Operations pushed and not yet given to the kernel.
    pub fn queued(&self) -> u32 {
        self.queued
    }

    /// Queues an operation; its result is reaped with `token`. False when the queue is full:
    /// submit first.
    ///
    /// # Safety
    /// The buffers of the operation stay where they are, unchanged, until `token` is reaped,
    /// even when the ring is dropped first.
    pub unsafe fn push(&mut self, operation: &Operation<'_>, token: u64) -> bool {
        let entry = entry(operation).user_data(token);
        // SAFETY: handed on to the caller.
        let pushed = unsafe { self.uring.submission().push(&entry) }.is_ok();
        self.in_flight += u32::from(pushed);
        self.queued += u32::from(pushed);
        pushed
    }

    /// Gives everything queued to the kernel, without waiting. False when the kernel is short
    /// of something now: reap, and submit again.
    pub fn submit(&mut self) -> io::Result<bool> {
        loop {
            if self.queued == 0 {
                return Ok(true);
            }
            match self.uring.submit() {
                Ok(0) => return Ok(false),
                Ok(taken) => self.queued = self.queued.saturating_sub(taken as u32),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM)) => {
                    return Ok(false);
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// The next completed operation: its token, and what it returned.
    pub fn reap(&mut self) -> Option<(u64, i32)> {
        let done = self.uring.completion().next()?;
        self.in_flight = self.in_flight.saturating_sub(1);
        Some((done.user_data(), done.result()))
    }

    /// Waits at most `limit` until something can be reaped; says whether it can.
    pub fn wait(&mut self, limit: Duration) -> bool {
        let milliseconds = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX).max(1);
        let mut poll = libc::pollfd { fd: self.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one element, which outlives the call.
        unsafe { libc::poll(&raw mut poll, 1, milliseconds) > 0 }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The kernel takes a closed ring apart later, on a thread of its own; the disk's lock
        // would be held until then.
        if self.in_flight == 0 {
            let _ = self.uring.submitter().unregister_files();
        }
    }
}

#[cfg(test)]
impl Ring {
    /// Tries to open a file through the ring and returns what the kernel says.
    pub(super) fn push_foreign(&mut self) -> i32 {
        let here = io_uring::types::Fd(libc::AT_FDCWD);
        let entry = opcode::OpenAt::new(here, c"/dev/null".as_ptr()).build();
        // SAFETY: the path is static.
        unsafe { self.uring.submission().push(&entry).unwrap() };
        self.uring.submit_and_wait(1).unwrap();
        self.uring.completion().next().unwrap().result()
    }
}

impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        self.uring.as_raw_fd()
    }
}

/// `IOSQE_FIXED_FILE` (io_uring_enter(2)): the descriptor is an index into the registered ones.
const FIXED_FILE: u8 = 1;
/// `IORING_UNREGISTER_FILES` (io_uring_register(2)).
const UNREGISTER_FILES: u8 = 3;

fn entry(operation: &Operation<'_>) -> squeue::Entry {
    let disk = Fixed(0);
    match operation {
        // One run is the common case and spares the kernel the copy of the vector.
        Operation::Read(buffers, at) => match buffers.iovecs() {
            [run] if u32::try_from(run.iov_len).is_ok() => {
                opcode::Read::new(disk, run.iov_base.cast(), run.iov_len as u32).offset(*at).build()
            }
            runs => opcode::Readv::new(disk, runs.as_ptr(), runs.len() as u32).offset(*at).build(),
        },
        Operation::Write(buffers, at, stable) => {
            let flags = if *stable { libc::RWF_DSYNC } else { 0 };
            match buffers.iovecs() {
                [run] if u32::try_from(run.iov_len).is_ok() => {
                    opcode::Write::new(disk, run.iov_base.cast(), run.iov_len as u32)
                        .offset(*at)
                        .rw_flags(flags)
                        .build()
                }
                runs => opcode::Writev::new(disk, runs.as_ptr(), runs.len() as u32)
                    .offset(*at)
                    .rw_flags(flags)
                    .build(),
            }
        }
        Operation::Flush => opcode::Fsync::new(disk).flags(io_uring::types::FsyncFlags::DATASYNC).build(),
        Operation::Allocate(mode, extent) => {
            opcode::Fallocate::new(disk, extent.len()).offset(extent.offset()).mode(*mode).build()
        }
    }
}
