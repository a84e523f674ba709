//! The kernel's userfaultfd: page faults of this process as messages, pages as answers.
//!
//! A few system calls and their numbers (`linux/userfaultfd.h`), written out here because the
//! crate for it needs a C compiler's headers and libclang at every build.
//!
//! The descriptor must see faults of the kernel too (KVM and `read` touch guest memory there),
//! so it takes `/dev/userfaultfd` (Linux 6.1), or the system call where that is allowed.
//!
//! What the answers of the kernel mean to whoever fills pages:
//!
//! | answer   | meaning                                                                         |
//! |----------|---------------------------------------------------------------------------------|
//! | `EEXIST` | the page is there already; somebody was quicker. Wake who waits for it          |
//! | `EAGAIN` | somebody is giving pages back: read the messages, see what is gone, go on       |
//! | `ENOENT` | nobody waits there any more: the memory was unmapped or replaced                |
//! | `ESRCH`  | the process is ending                                                           |

use std::{
    fs::{File, OpenOptions},
    io,
    mem::size_of,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

use super::PagerError;
use calls::{
    UFFDIO_API, UFFDIO_COPY, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE, UFFDIO_ZEROPAGE,
    USERFAULTFD_IOC_NEW,
};

const API: u64 = 0xaa;
const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_REMOVE: u8 = 0x15;

/// Pages that are given back (`madvise`) are told, so that they are not filled again.
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
/// Huge pages of a reserved pool can be filled, too.
const FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;

/// Faults of missing pages are told.
const MODE_MISSING: u64 = 1 << 0;

/// Messages that are read with one system call.
const BATCH: usize = 64;

#[repr(C)]
#[derive(Default)]
struct ApiRequest {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct Span {
    start: u64,
    len: u64,
}

#[repr(C)]
#[derive(Default)]
struct Register {
    span: Span,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    done: i64,
}

#[repr(C)]
#[derive(Default)]
struct Zero {
    span: Span,
    mode: u64,
    done: i64,
}

/// `struct uffd_msg`, 32 bytes.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    words: [u64; 3],
}

/// The numbers of the calls; the macros make public functions of them.
mod calls {
    use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iowr_nr};

    use super::{ApiRequest, Copy, Register, Span, Zero};

    ioctl_io_nr!(USERFAULTFD_IOC_NEW, 0xaa, 0x00);
    ioctl_iowr_nr!(UFFDIO_API, 0xaa, 0x3f, ApiRequest);
    ioctl_iowr_nr!(UFFDIO_REGISTER, 0xaa, 0x00, Register);
    ioctl_ior_nr!(UFFDIO_UNREGISTER, 0xaa, 0x01, Span);
    ioctl_ior_nr!(UFFDIO_WAKE, 0xaa, 0x02, Span);
    ioctl_iowr_nr!(UFFDIO_COPY, 0xaa, 0x03, Copy);
    ioctl_iowr_nr!(UFFDIO_ZEROPAGE, 0xaa, 0x04, Zero);
}

/// What the kernel tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A thread waits for the page at this address.
    Fault(u64),
    /// Pages from the first address to the second are being given back.
    Remove(u64, u64),
}

/// An open userfaultfd. Closing the last descriptor of it wakes all who wait, and missing pages
/// are zero from then on: whoever serves pages keeps it to the end.
#[derive(Debug)]
pub struct Userfault {
    file: File,
}

impl Userfault {
    /// Opens one that does not block, for memory with huge pages of a pool or without.
    pub fn new(huge: bool) -> Result<Userfault, PagerError> {
        let file = File::from(create().map_err(PagerError::Create)?);
        let features = FEATURE_EVENT_REMOVE | if huge { FEATURE_MISSING_HUGETLBFS } else { 0 };
        let mut request = ApiRequest { api: API, features, ioctls: 0 };
        // SAFETY: the kernel reads and writes the structure of this call.
        let result = unsafe { ioctl_with_mut_ref(&file, UFFDIO_API(), &mut request) };
        done(result).map(|()| Userfault { file }).map_err(PagerError::Features)
    }

    /// One that another process opened and sent: what a page-fault handler has.
    pub fn of(fd: OwnedFd) -> Userfault {
        Userfault { file: fd.into() }
    }

    /// From now on faults in `len` bytes from `at` on are messages here.
    ///
    /// # Safety
    /// The range is a mapping of its own that Rust knows only through raw pointers: bytes that
    /// were zero become others, and a thread that touches them waits until they do.
    pub unsafe fn register(&self, at: u64, len: u64) -> io::Result<()> {
        let mut request = Register { span: Span { start: at, len }, mode: MODE_MISSING, ioctls: 0 };
        // SAFETY: the kernel reads and writes the structure of this call; the caller answers
        // for the range.
        done(unsafe { ioctl_with_mut_ref(&self.file, UFFDIO_REGISTER(), &mut request) })
    }

    /// Faults there are no messages any more, and who waits goes on: missing pages are zero.
    pub fn unregister(&self, at: u64, len: u64) -> io::Result<()> {
        // SAFETY: the kernel reads the structure of this call. Pages keep what they hold.
        done(unsafe { ioctl_with_ref(&self.file, UFFDIO_UNREGISTER(), &Span { start: at, len }) })
    }

    /// Fills missing pages at `at` with `bytes` (whole pages) and wakes who waits for them.
    /// Returns how many bytes were filled, at least one page.
    pub fn copy(&self, at: u64, bytes: &[u8]) -> io::Result<u64> {
        let len = bytes.len() as u64;
        let mut request = Copy { to: at, from: bytes.as_ptr() as u64, len, mode: 0, done: 0 };
        // SAFETY: the kernel reads the structure and `bytes`, writes the structure, and fills
        // pages that are missing in a registered range and no others.
        let result = done(unsafe { ioctl_with_mut_ref(&self.file, UFFDIO_COPY(), &mut request) });
        filled(result, request.done)
    }

    /// Fills missing pages of `len` bytes at `at` with zeroes, at no memory of their own.
    /// Huge pages of a pool cannot be filled so.
    pub fn zero(&self, at: u64, len: u64) -> io::Result<u64> {
        let mut request = Zero { span: Span { start: at, len }, mode: 0, done: 0 };
        // SAFETY: the kernel reads and writes the structure of this call, and fills pages that
        // are missing in a registered range and no others.
        let result = done(unsafe { ioctl_with_mut_ref(&self.file, UFFDIO_ZEROPAGE(), &mut request) });
        filled(result, request.done)
    }

    /// Lets those who wait for pages there look again.
    pub fn wake(&self, at: u64, len: u64) -> io::Result<()> {
        // SAFETY: the kernel reads the structure of this call.
        done(unsafe { ioctl_with_ref(&self.file, UFFDIO_WAKE(), &Span { start: at, len }) })
    }

    /// Hands all messages that are there to `take`, and returns how many they were.
    pub fn drain(&self, mut take: impl FnMut(Event)) -> io::Result<usize> {
        let mut messages = [Message::default(); BATCH];
        let mut count = 0;
        loop {
            let room = size_of::<[Message; BATCH]>();
            // SAFETY: the kernel writes at most `room` bytes to the messages, which are plain
            // numbers.
            let read = unsafe { libc::read(self.file.as_raw_fd(), messages.as_mut_ptr().cast(), room) };
            let Ok(read) = usize::try_from(read) else {
                return match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::WouldBlock => Ok(count),
                    e if e.kind() == io::ErrorKind::Interrupted => continue,
                    e => Err(e),
                };
            };
            let read = read / size_of::<Message>();
            for message in messages.iter().take(read) {
                let [first, second, _] = message.words;
                match message.event {
                    // The address is the second word, after the flags.
                    EVENT_PAGEFAULT => take(Event::Fault(second)),
                    EVENT_REMOVE => take(Event::Remove(first, second)),
                    _ => {}
                }
            }
            count += read;
            // Less than was asked for: that was all.
            if read < BATCH {
                return Ok(count);
            }
        }
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// `/dev/userfaultfd` is for whoever may open it; the system call needs a capability or a
/// setting of the host.
fn create() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let raw = match OpenOptions::new().read(true).write(true).open("/dev/userfaultfd") {
        // SAFETY: the call takes the flags by value and returns a new descriptor.
        Ok(device) => unsafe { ioctl_with_val(&device, USERFAULTFD_IOC_NEW(), flags as libc::c_ulong) },
        // SAFETY: as above; a descriptor fits an `int`.
        Err(_) => unsafe { libc::syscall(libc::SYS_userfaultfd, flags) as i32 },
    };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

fn done(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A call that was stopped half-way says `EAGAIN` and how far it came.
fn filled(result: io::Result<()>, done: i64) -> io::Result<u64> {
    match (result, u64::try_from(done)) {
        (_, Ok(done)) if done > 0 => Ok(done),
        (Err(e), _) => Err(e),
        (Ok(()), _) => Err(io::ErrorKind::WriteZero.into()),
    }
}
