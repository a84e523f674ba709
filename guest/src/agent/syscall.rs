//! The kernel interfaces the standard library has no name for, as safe functions.
//!
//! One wrapper a call, no policy. Descriptors are always made close-on-exec.

use std::{
    ffi::{CStr, CString},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    path::Path,
    time::Duration,
};

/// The result of a call that returns -1 and sets `errno`.
pub fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// The same for calls made by number.
pub fn check_long(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Takes ownership of a descriptor a call just returned.
pub fn owned(result: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: the kernel just made this descriptor for us and nobody else knows it.
    check(result).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A C string; a zero byte inside is an error of the caller's input.
pub fn cstring(text: impl AsRef<[u8]>) -> io::Result<CString> {
    CString::new(text.as_ref())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "A zero byte is inside the text"))
}

/// A C string of a path.
pub fn cpath(path: &Path) -> io::Result<CString> {
    cstring(std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str()))
}

/// Something that happens once and that any number of threads can wait for with `poll`.
#[derive(Debug)]
pub struct Latch(OwnedFd);

impl Latch {
    pub fn new() -> io::Result<Self> {
        // SAFETY: eventfd has no memory arguments.
        owned(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) }).map(Self)
    }

    /// Lets everyone through, for ever.
    pub fn set(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight readable bytes. It can only fail when it has been set 2^64 times.
        unsafe { libc::write(self.0.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }

    pub fn is_set(&self) -> bool {
        wait(&mut [want(self, libc::POLLIN)], Some(Duration::ZERO)).unwrap_or(false)
    }
}

impl AsFd for Latch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// An entry for [`wait`].
pub fn want(fd: &impl AsFd, events: libc::c_short) -> libc::pollfd {
    libc::pollfd { fd: fd.as_fd().as_raw_fd(), events, revents: 0 }
}

/// `poll`; `false` when the time is over. An entry with a negative descriptor is ignored.
pub fn wait(entries: &mut [libc::pollfd], limit: Option<Duration>) -> io::Result<bool> {
    let until = limit.and_then(|l| std::time::Instant::now().checked_add(l));
    loop {
        let millis = until.map_or(-1, |until| {
            let left = until.saturating_duration_since(std::time::Instant::now());
            // Rounded up, so that the last millisecond is not spun through.
            left.as_micros().div_ceil(1000).min(60_000) as libc::c_int
        });
        // SAFETY: the pointer and the count describe `entries`.
        let n = unsafe { libc::poll(entries.as_mut_ptr(), entries.len() as libc::nfds_t, millis) };
        match check(n) {
            Ok(0) if until.is_some_and(|u| std::time::Instant::now() >= u) => return Ok(false),
            Ok(0) => {}
            Ok(_) => return Ok(true),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// A pipe: reading end, writing end.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [-1; 2];
    // SAFETY: two writable integers.
    check(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) })?;
    Ok((owned(ends[0])?, owned(ends[1])?))
}

/// A pair of sockets that keep messages apart and carry descriptors.
pub fn message_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [-1; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: two writable integers.
    check(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()) })?;
    Ok((owned(ends[0])?, owned(ends[1])?))
}

/// Makes reads and writes return instead of waiting.
pub fn set_nonblocking(fd: &impl AsFd) -> io::Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: fcntl with these commands has no memory arguments.
    let flags = check(unsafe { libc::fcntl(fd, libc::F_GETFL) })?;
    // SAFETY: as above.
    check(unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) }).map(drop)
}

/// Reads once.
pub fn read(fd: &impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the pointer and the length describe `buffer`.
    let n = unsafe { libc::read(fd.as_fd().as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Writes once.
pub fn write(fd: &impl AsFd, bytes: &[u8]) -> io::Result<usize> {
    // SAFETY: the pointer and the length describe `bytes`.
    let n = unsafe { libc::write(fd.as_fd().as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Bytes that can be read at once.
pub fn readable(fd: &impl AsFd) -> usize {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one integer.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::FIONREAD, &raw mut count) };
    if result < 0 { 0 } else { usize::try_from(count).unwrap_or(0) }
}

/// `mount(2)`.
pub fn mount(source: &str, target: &Path, kind: &str, flags: libc::c_ulong, data: &str) -> io::Result<()> {
    let (source, target) = (cstring(source)?, cpath(target)?);
    let (kind, data) = (cstring(kind)?, cstring(data)?);
    // SAFETY: four zero-terminated strings that outlive the call.
    check(unsafe {
        libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, data.as_ptr().cast())
    })
    .map(drop)
}

/// `umount2(2)`.
pub fn unmount(target: &Path, flags: libc::c_int) -> io::Result<()> {
    let target = cpath(target)?;
    // SAFETY: a zero-terminated string that outlives the call.
    check(unsafe { libc::umount2(target.as_ptr(), flags) }).map(drop)
}

/// A mount of what is at `path`, attached nowhere yet (`open_tree`, Linux 5.2).
pub fn detached_copy(path: &Path) -> io::Result<OwnedFd> {
    const OPEN_TREE_CLONE: libc::c_uint = 1;
    let path = cpath(path)?;
    let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC as libc::c_uint;
    // SAFETY: a zero-terminated string that outlives the call.
    let fd = check_long(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) })?;
    owned(fd as RawFd)
}

/// `openat2`: opens `path` under `directory` by the rules in `resolve`.
pub fn open_under(
    directory: &impl AsFd,
    path: &CStr,
    flags: libc::c_int,
    mode: libc::mode_t,
    resolve: u64,
) -> io::Result<OwnedFd> {
    // SAFETY: open_how is plain data for which all zeroes is valid.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = u64::from((flags | libc::O_CLOEXEC).cast_unsigned());
    how.mode = u64::from(mode);
    how.resolve = resolve;
    let size = size_of::<libc::open_how>();
    let directory = directory.as_fd().as_raw_fd();
    loop {
        // SAFETY: a zero-terminated string and a structure with its size.
        let fd = check_long(unsafe {
            libc::syscall(libc::SYS_openat2, directory, path.as_ptr(), &raw const how, size)
        });
        match fd {
            Ok(fd) => return owned(fd as RawFd),
            // Something was renamed meanwhile; the kernel asks to try again.
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => {}
            Err(e) => return Err(e),
        }
    }
}

/// `open(2)` of a path by the caller's own root.
pub fn open(path: &Path, flags: libc::c_int) -> io::Result<OwnedFd> {
    let path = cpath(path)?;
    // SAFETY: a zero-terminated string that outlives the call.
    owned(unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC) })
}

/// Joins a namespace; with 0 as `kind`, of whatever kind it is.
pub fn join(namespace: &impl AsFd, kind: libc::c_int) -> io::Result<()> {
    // SAFETY: setns has no memory arguments.
    check(unsafe { libc::setns(namespace.as_fd().as_raw_fd(), kind) }).map(drop)
}
