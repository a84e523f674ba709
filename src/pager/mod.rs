//! Guest memory that comes when it is touched.
//!
//! ```text
//!   Range: bytes of guest memory on the host, and where they lie in the snapshot
//!
//!   Pager::start     our own thread serves faults from a PageSource      a chain of diffs,
//!                    (uffd.rs, serve.rs, ledger.rs)                      a store (source.rs)
//!   Handler::connect another process serves them, by Firecracker's
//!                    protocol; we watch that it lives (handler.rs)       Uffd back end
//!   working_set      which pages a machine needs first: recorded once,
//!                    brought in few system calls later                   any of them, and files
//! ```
//!
//! A full snapshot with a memory file needs none of this: the kernel maps it. What cannot be
//! mapped, because the pages lie in a store or under diffs, is served by the pager: a guest
//! that touches a missing page waits until the thread has put it there, with its neighbours
//! up to [`AROUND`] bytes. Pages that no layer holds are never registered where they are many,
//! so that the kernel serves them alone.
//!
//! A page is filled once at most. One that the guest gave back (balloon, memory device, free
//! page reporting: `MADV_DONTNEED`) reads as zero afterwards, even if it was never filled: the
//! kernel tells of it before it happens, and [`ledger::Ledger`] marks it as settled. When all is
//! settled the ranges are ordinary memory again and the thread ends.
//!
//! What cannot be had ends the machine: the source fails, a chunk does not have its hash, the
//! other process dies or is stuck. Then `broken` is called, once, with the reason; the threads
//! that wait for pages go on waiting (a wrong page would be worse) and do not keep the process
//! from exiting. Whoever is called must not need such a thread to end the machine.
//!
//! Pages from the pager are private copies. Clones share memory if they are mapped from a full
//! snapshot's memory file: `nacelle snapshot merge` makes one of a chain or a store, and costs
//! once what each clone would pay.
//!
//! Nothing here knows a machine, a vCPU or a device.

mod bell;
mod handler;
mod ledger;
mod serve;
mod source;
#[cfg(test)]
mod tests;
pub mod uffd;
mod watch;
pub mod working_set;

use std::{io, path::PathBuf, ptr::NonNull};

pub use handler::{Handler, PATIENCE};
pub use serve::{Pager, Served, Touched};
pub use source::ChainSource;

use crate::{pagemap::Span, snapshot::extents::Extents};

/// Bytes of a small page.
pub const PAGE: u64 = 4096;

/// A fault brings up to so many bytes around it, if they are missing: those of one aligned
/// window of this size. A fault costs 6 us of processor time with one page; guests touch
/// neighbours. Measured, in processor time and memory, for all pages of 64 MiB in order, and for
/// 256 runs of eight pages here and there:
///
/// | window    | in order | scattered runs |
/// |-----------|----------|----------------|
/// | 4 KiB     | 94 ms    | 12 ms, 8 MiB   |
/// | 16 KiB    | 53 ms    | 22 ms, 10 MiB  |
/// | 32 KiB    | 41 ms    | 9 ms, 13 MiB   |
/// | 64 KiB    | 38 ms    | 27 ms, 19 MiB  |
/// | 256 KiB   | 39 ms    | 31 ms, 55 MiB  |
pub const AROUND: u64 = 32 << 10;

/// A piece of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    host: u64,
    len: u64,
    offset: u64,
    page_size: u64,
}

impl Range {
    /// `len` bytes at `host` are those of the snapshot's memory from `offset` on, in host pages
    /// of `page_size` bytes (4096, or 2 MiB for memory of a pool of huge pages). All are whole
    /// pages.
    ///
    /// # Safety
    /// The bytes are a private mapping of guest memory (anonymous for a pager or a handler) that
    /// Rust knows only through raw pointers, and that stays until the process ends or its pager
    /// was given up.
    pub unsafe fn new(host: NonNull<u8>, len: u64, offset: u64, page_size: u64) -> Result<Range, PagerError> {
        let host = host.as_ptr() as u64;
        let whole = [host, len, offset].iter().all(|n| page_size >= PAGE && n % page_size == 0);
        if !whole || !page_size.is_power_of_two() || len == 0 || offset.checked_add(len).is_none() {
            return Err(PagerError::Range { host, len, offset, page_size });
        }
        Ok(Range { host, len, offset, page_size })
    }

    /// The same as a mapping, whatever the size of its pages.
    fn span(self) -> Span {
        Span { host: self.host, len: self.len, offset: self.offset }
    }

    fn end(self) -> u64 {
        self.host.saturating_add(self.len)
    }
}

/// Where pages come from.
pub trait PageSource: Send {
    /// The pages that are not zero, or may not be; offsets in the snapshot's memory.
    fn present(&self) -> Extents;

    /// Fills `buffer` with memory from `offset` on. What is not present is zero. The error's
    /// chain of sources is told to the user.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;

    /// Bytes around `offset` that cost nothing more once it was read (a power of two: the
    /// chunk that was unpacked or checked). They follow at once.
    fn unit(&self, _offset: u64) -> u64 {
        PAGE
    }

    /// Nothing is asked for at the moment, and may not be for days.
    fn rest(&self) {}
}

/// What is brought before it is touched.
#[derive(Debug, Clone, Default)]
pub struct Prefetch {
    /// These first, in the order of their offsets.
    pub first: Extents,
    /// Then everything else.
    pub all: bool,
}

/// Who is told, once, why pages cannot be had any more. It is called on a thread of the pager.
pub type Broken = Box<dyn FnOnce(String) + Send>;

/// Why lazy memory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// No userfaultfd.
    #[error(
        "Page faults of guest memory cannot be served; give this process read and write access to \
         /dev/userfaultfd (Linux 6.1), or set the host's vm.unprivileged_userfaultfd to 1"
    )]
    Create(#[source] io::Error),
    /// The kernel's userfaultfd is too old.
    #[error("The userfaultfd of this kernel lacks what guest memory needs; Linux 5.10 has it")]
    Features(#[source] io::Error),
    /// A range was refused.
    #[error("The kernel does not let page faults of {len} bytes of guest memory be served")]
    Register {
        /// Bytes of the range.
        len: u64,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// A range is not possible.
    #[error(
        "{len} bytes of guest memory at {host:#x} from offset {offset} are not whole pages of {page_size} bytes"
    )]
    Range {
        /// Address on the host.
        host: u64,
        /// Bytes.
        len: u64,
        /// Offset in the snapshot's memory.
        offset: u64,
        /// Bytes of a page.
        page_size: u64,
    },
    /// The thread could not be started.
    #[error("No thread can be started that serves page faults")]
    Thread(#[source] io::Error),
    /// Nobody takes the connection.
    #[error(
        "Page-fault handler {} cannot be connected to; start it, and let it listen there, before the \
         snapshot is loaded", path.display()
    )]
    Connect {
        /// Its socket.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// The handler did not take the message.
    #[error("Page-fault handler {} did not take the description of guest memory", path.display())]
    Send {
        /// Its socket.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
}

/// An error and all that is behind it, as one text.
fn told(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(next) = source {
        text.push_str(": ");
        text.push_str(&next.to_string());
        source = next.source();
    }
    text
}
