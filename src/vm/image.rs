//! Guest memory as it was at one moment, while the machine goes on.
//!
//! ```text
//!   machine stands still ─► Image::take: a forked process ─► machine goes on
//!                                  │ has all of memory as it was; pages that the machine
//!                                  │ writes from now on are copied by the kernel, for the machine
//!   writer ─ "these bytes" ─► copies them into a buffer that both see, and lets go of them
//!          ◄──── "there" ────
//!   or: Image::take ─► machine stands still ─► Image::keep: what it wrote meanwhile ─► goes on
//!   Image dropped, or this process gone ─► it is killed
//! ```
//!
//! Whoever writes guest memory next (a vCPU, a worker, the kernel for io_uring or `read`) needs to
//! know nothing: copy-on-write holds for all of them, for anonymous memory as for what was mapped
//! privately from a memory file, for pages small or huge.
//!
//! # Why not userfaultfd
//!
//! Its write protection does the same with a thread of ours that answers each first write. Measured
//! for 1 GiB that was touched (a two-core virtual machine, busy, Linux 6.18):
//!
//! | | stands still, 4 KiB pages | 2 MiB pages | a first write, median | mean |
//! |---|---|---|---|---|
//! | fork | 43 ms | 1.0 ms | 3.0 µs | 8 µs |
//! | userfaultfd | 53 ms | 0.03 ms | 6.0 µs | 15 µs |
//!
//! So the pause is the same where it is long (and can be had beforehand: [`super::ahead`]), and the
//! guest is slowed half as much; it never waits
//! for our thread, nor for a disk. Private mappings of files cannot be protected by userfaultfd at
//! all, nor missing pages before Linux 6.4. What fork costs instead is memory: a page that is
//! written before it was saved exists twice, until it was. A guest that writes all of its memory
//! meanwhile has twice of it. If the host has no room for that, the forked process is the first that
//! the kernel ends (`oom_score_adj`), or that loses its huge pages: the snapshot fails, and the
//! machine goes on.
//!
//! # What the other process is
//!
//! It shares nothing with this one but a socket and the buffer: it has no threads, takes no
//! signals, dumps no core, and closes every descriptor that it was born with at once, so that no
//! lock, tap or socket of the machine lives on through it. It makes system calls only; locks of the
//! allocator may have been held when it was made.
//!
//! Faults of missing pages that a pager serves are not served to it: what is to be in the image
//! must be there before. Shared mappings are not frozen; guest memory is private.

use std::{
    ffi::c_long,
    io, mem,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    ptr::{self, NonNull},
    slice,
    time::Duration,
};

use rustix::net::{SendFlags, send};

mod aside;

use aside::Aside;

/// Bytes that are read at most at a time.
pub const PIECE: usize = 1 << 20;

/// How long the other process may take to copy them. It may have to read them from swap.
const PATIENCE: Duration = Duration::from_secs(60);

/// An address and a length.
type Wanted = [usize; 2];

/// All of this process's private memory as it was when it was taken.
#[derive(Debug)]
pub struct Image {
    child: libc::pid_t,
    socket: OwnedFd,
    buffer: NonNull<u8>,
    /// Pages that are other than what the process has.
    aside: Aside,
}

// SAFETY: the buffer is a mapping of this image alone, and the process may be spoken to, killed and
// waited for by any thread.
unsafe impl Send for Image {}

impl Image {
    /// Takes one. The call takes as long as the kernel takes for the page tables. The image ends
    /// with the thread that took it, too: take it on one that stays.
    ///
    /// What other threads write at this moment is in it or not. With `huge`, pages may be those of a
    /// pool of huge pages, and are kept to the end.
    pub fn take(huge: bool) -> io::Result<Image> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(PATIENCE))?;
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { libc::mmap(ptr::null_mut(), PIECE, access, flags, -1, 0) };
        let buffer = NonNull::new(at.cast::<u8>()).filter(|_| at != libc::MAP_FAILED);
        let buffer = buffer.ok_or_else(io::Error::last_os_error)?;
        // SAFETY: takes nothing.
        let parent = unsafe { libc::getpid() };
        let before = block_signals();
        // SAFETY: no flags and no stack: as `fork`, but without a signal at its end, which others
        // in this process could take for that of a child of theirs. The child runs `serve`, which
        // takes no locks and never returns.
        let child = unsafe { libc::syscall(libc::SYS_clone, 0, 0, 0, 0, 0) };
        if child == 0 {
            serve(theirs.as_raw_fd(), buffer.as_ptr(), parent, huge);
        }
        let failed = io::Error::last_os_error();
        // SAFETY: the mask is what this thread had.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut()) };
        match libc::pid_t::try_from(child) {
            Ok(child) if child > 0 => {
                Ok(Image { child, socket: ours.into(), buffer, aside: Aside::default() })
            }
            _ => {
                // SAFETY: the mapping from above, which nobody else has.
                unsafe { libc::munmap(buffer.as_ptr().cast(), PIECE) };
                Err(failed)
            }
        }
    }

    /// What was in the `len` bytes from address `at` on: whole pages, at most [`PIECE`]. Each is read
    /// once: the image lets go of what was read.
    ///
    /// # Safety
    /// The bytes were mapped and readable when the image was taken.
    pub unsafe fn read(&mut self, at: usize, len: usize) -> io::Result<&[u8]> {
        let gone = || io::Error::new(io::ErrorKind::BrokenPipe, "The process that holds it was killed");
        if len > PIECE {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut message = [0; size_of::<Wanted>()];
        let (first, second) = message.split_at_mut(size_of::<usize>());
        first.copy_from_slice(&at.to_ne_bytes());
        second.copy_from_slice(&len.to_ne_bytes());
        send(&self.socket, &message, SendFlags::NOSIGNAL).map_err(|_| gone())?;
        match rustix::io::retry_on_intr(|| rustix::io::read(&self.socket, &mut [0u8; 1])) {
            Ok(1) => {}
            Ok(_) | Err(rustix::io::Errno::CONNRESET) => return Err(gone()),
            Err(rustix::io::Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(e) => return Err(e.into()),
        }
        // SAFETY: the buffer is this long; the child has said that it is done with it, and writes
        // there only when it is asked again, which the borrow keeps from happening.
        let bytes = unsafe { slice::from_raw_parts_mut(self.buffer.as_ptr(), len) };
        self.aside.lay_over(at, bytes);
        Ok(bytes)
    }

    /// Makes what is in the `len` bytes from address `at` on now, whole pages, part of the image
    /// instead of what was there when it was taken.
    ///
    /// # Safety
    /// The bytes are mapped and readable. They may be written to meanwhile: then what is kept is
    /// neither of before nor after.
    pub unsafe fn keep(&mut self, at: usize, len: usize) {
        // SAFETY: as for this function.
        unsafe { self.aside.keep(at, len) };
    }

    /// Has memory for `len` more bytes of pages that are kept.
    pub fn make_room(&mut self, len: usize) {
        self.aside.make_room(len);
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // SAFETY: it is a child that was not waited for, so its number is nobody else's; the
        // mapping is this image's alone.
        unsafe {
            libc::kill(self.child, libc::SIGKILL);
            // It sends no SIGCHLD, so only this takes it.
            while libc::waitpid(self.child, ptr::null_mut(), libc::__WALL) < 0
                && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
            {}
            libc::munmap(self.buffer.as_ptr().cast(), PIECE);
        }
    }
}

/// Blocks all signals of this thread, and returns which were.
fn block_signals() -> libc::sigset_t {
    // SAFETY: sets of signals are plain numbers, which the calls fill.
    unsafe {
        let (mut all, mut before) = (mem::zeroed(), mem::zeroed());
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        before
    }
}

/// The other process, to its end. No memory may be had here, and no lock.
fn serve(socket: RawFd, buffer: *mut u8, parent: libc::pid_t, keep: bool) -> ! {
    // SAFETY: system calls with numbers, constant texts, and memory of this frame; all of them are
    // allowed after a fork.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::prctl(libc::PR_SET_DUMPABLE, 0);
        let adjust = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        libc::write(adjust, c"1000".as_ptr().cast(), 4);
        let socket = c_long::from(socket);
        let closed = libc::syscall(libc::SYS_close_range, socket + 1, c_long::from(u32::MAX), 0);
        if socket > 0 {
            libc::syscall(libc::SYS_close_range, 0, socket - 1, 0);
        }
        if closed == 0 && libc::getppid() == parent {
            answer(socket as RawFd, buffer, keep);
        }
        libc::_exit(0)
    }
}

/// Copies what is asked for until nobody can ask any more.
///
/// # Safety
/// `buffer` has [`PIECE`] bytes, and whoever asks does so for memory that is mapped.
unsafe fn answer(socket: RawFd, buffer: *mut u8, keep: bool) {
    loop {
        let mut wanted: Wanted = [0; 2];
        let size = size_of::<Wanted>();
        // SAFETY: the kernel writes at most these bytes, which are plain numbers.
        let got = unsafe { libc::recv(socket, wanted.as_mut_ptr().cast(), size, libc::MSG_WAITALL) };
        let [at, len] = wanted;
        if got != size as isize || len > PIECE {
            return;
        }
        // SAFETY: both are mapped and this long, and the buffer is no part of guest memory. A page
        // that the kernel took away is a signal, which ends this process alone.
        unsafe {
            libc::memcpy(buffer.cast(), at as *const libc::c_void, len);
            // The machine's next write there needs no copy. Before Linux 6.1 the advice gave back more
            // of a pool's pages than it was given for.
            if !keep {
                libc::madvise(at as *mut libc::c_void, len, libc::MADV_DONTNEED);
            }
            if libc::send(socket, [1u8].as_ptr().cast(), 1, libc::MSG_NOSIGNAL) != 1 {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests;
