//! Tap devices: the host's end of a virtual cable.
//!
//! A tap is opened by name or comes as an open descriptor. By name it must exist already
//! (the kernel would silently make one that leads nowhere) unless its making is asked for.
//! Every queue pair has a descriptor of its own on the same tap. Each frame on it begins
//! with a virtio-net header of [`super::header::LEN`] bytes, so that checksums and
//! segmentation pass between guest and host kernel undone.

use std::{
    fs::OpenOptions,
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
};

use super::{header, port::Port};

/// Longest name of a network interface, in bytes.
pub const NAME_MAX: usize = libc::IFNAMSIZ - 1;

/// Which tap.
#[derive(Debug)]
pub enum TapSource {
    /// By name, at most [`NAME_MAX`] bytes.
    Name {
        /// The interface.
        name: String,
        /// Make it when it does not exist; it then goes with the machine.
        create: bool,
    },
    /// Open descriptors of one tap with `IFF_VNET_HDR` and `IFF_NO_PI`, one for each pair.
    Descriptors(Vec<OwnedFd>),
}

/// Why a tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name is not one of an interface.
    #[error("Tap name {0:?} is not valid: 1 to 15 bytes without '/', '%', ':' or spaces are needed")]
    Name(String),
    /// There is no interface of this name.
    #[error("Tap {0} does not exist; make it first, for example with: ip tuntap add {0} mode tap")]
    Missing(String),
    /// Somebody else has it open.
    #[error("Tap {0} is in use by another process")]
    Busy(String),
    /// It is an interface of another kind or mode.
    #[error("Interface {0} is not a tap with {1}")]
    Kind(String, &'static str),
    /// The process may not open it.
    #[error("Tap {0} may not be opened; root, CAP_NET_ADMIN or ownership of the tap is needed")]
    Forbidden(String, #[source] io::Error),
    /// A descriptor that was passed in is not a tap of the needed mode.
    #[error("Descriptor {fd} is not a tap opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR")]
    Descriptor {
        /// Its number.
        fd: i32,
        /// Why, where the kernel said.
        #[source]
        source: Option<io::Error>,
    },
    /// The number of descriptors and queue pairs differ.
    #[error("{got} tap descriptors were given for {pairs} queue pairs; one for each is needed")]
    Count {
        /// Descriptors given.
        got: usize,
        /// Pairs wanted.
        pairs: u16,
    },
    /// Descriptors of one device lead to several taps.
    #[error("The descriptors are those of two taps, {0} and {1}; a device has one")]
    Several(String, String),
    /// Something else failed.
    #[error("Tap {name} failed on {call}")]
    Call {
        /// The tap.
        name: String,
        /// The operation.
        call: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// An open tap.
pub struct Tap {
    queues: Vec<OwnedFd>,
    offered: u32,
}

impl Tap {
    /// Opens `source` with `pairs` queues.
    pub fn open(source: TapSource, pairs: u16) -> Result<Tap, TapError> {
        match source {
            TapSource::Name { name, create } => Tap::by_name(&name, create, pairs),
            TapSource::Descriptors(queues) => {
                Tap::check(&queues, pairs)?;
                queues.iter().try_for_each(make_nonblocking)?;
                Tap::finish("by descriptor", queues)
            }
        }
    }

    /// Says whether descriptors are those of one tap that can serve `pairs` queue pairs, and
    /// changes nothing.
    pub fn check(queues: &[OwnedFd], pairs: u16) -> Result<(), TapError> {
        if queues.len() != usize::from(pairs) {
            return Err(TapError::Count { got: queues.len(), pairs });
        }
        let mut names = queues.iter().map(name_of).collect::<Result<Vec<_>, _>>()?.into_iter();
        let first = names.next().unwrap_or_default();
        match names.find(|name| *name != first) {
            Some(other) => Err(TapError::Several(first, other)),
            None => Ok(()),
        }
    }

    fn by_name(name: &str, create: bool, pairs: u16) -> Result<Tap, TapError> {
        let bad = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | '%' | ':');
        if name.is_empty() || name.len() > NAME_MAX || name.contains(bad) || matches!(name, "." | "..") {
            return Err(TapError::Name(name.to_owned()));
        }
        if !create && !exists(name).map_err(|source| call(name, "SIOCGIFINDEX", source))? {
            return Err(TapError::Missing(name.to_owned()));
        }
        let mut queues = Vec::new();
        let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if pairs > 1 {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        for _ in 0..pairs {
            let attached = attach(name, flags);
            // A tap that was made for several queues cannot be opened as one for a single
            // one, but may well be used with only one.
            let attached = match attached {
                Err(TapError::Kind(..)) if pairs == 1 => attach(name, flags | libc::IFF_MULTI_QUEUE),
                other => other,
            };
            queues.push(attached?);
        }
        Tap::finish(name, queues)
    }

    /// Sets the header length and finds out what the host's kernel can pass on undone.
    fn finish(name: &str, queues: Vec<OwnedFd>) -> Result<Tap, TapError> {
        let len = header::LEN as libc::c_int;
        for queue in &queues {
            // SAFETY: the kernel reads an int at the pointer, which lives across the call.
            let done = unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const len) };
            if done < 0 {
                return Err(call(name, "TUNSETVNETHDRSZ", io::Error::last_os_error()));
            }
        }
        let basic = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_UFO;
        // UDP segmentation came with Linux 6.2; UFO may go some day.
        let datagrams = libc::TUN_F_USO4 | libc::TUN_F_USO6;
        let tried = [basic | datagrams, basic, basic & !libc::TUN_F_UFO, libc::TUN_F_CSUM, 0];
        let mut tap = Tap { queues, offered: 0 };
        for flags in tried {
            if tap.set_offloads(flags).is_ok() {
                tap.offered = flags;
                break;
            }
        }
        tap.set_offloads(0).map_err(|source| call(name, "TUNSETOFFLOAD", source))?;
        Ok(tap)
    }
}

impl Port for Tap {
    fn descriptors(&self) -> &[OwnedFd] {
        &self.queues
    }

    fn offloads(&self) -> u32 {
        self.offered
    }

    fn set_offloads(&self, flags: u32) -> io::Result<()> {
        let Some(queue) = self.queues.first() else { return Ok(()) };
        // SAFETY: this call takes its argument by value.
        let done = unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn set_attached(&self, pair: usize, attached: bool) -> io::Result<()> {
        let Some(queue) = self.queues.get(pair).filter(|_| self.queues.len() > 1) else { return Ok(()) };
        let mut request = request("");
        let flags = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: the kernel reads an ifreq at the pointer, which lives across the call.
        let done = unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) };
        match io::Error::last_os_error() {
            _ if done >= 0 => Ok(()),
            // It already is as asked.
            e if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            e => Err(e),
        }
    }
}

fn call(name: &str, call: &'static str, source: io::Error) -> TapError {
    TapError::Call { name: name.to_owned(), call, source }
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: an ifreq is plain bytes, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero.
    for (to, from) in request.ifr_name.iter_mut().take(NAME_MAX).zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

/// Whether an interface of this name is there, asked without `/sys`, which a jail lacks.
fn exists(name: &str) -> io::Result<bool> {
    // SAFETY: makes a socket; the result is checked and owned here alone.
    let socket = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `socket` was just made and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let mut request = request(name);
    // SAFETY: the kernel reads and writes an ifreq at the pointer, which lives across the call.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFINDEX as _, &raw mut request) };
    match io::Error::last_os_error() {
        _ if done >= 0 => Ok(true),
        e if e.raw_os_error() == Some(libc::ENODEV) => Ok(false),
        e => Err(e),
    }
}

fn attach(name: &str, flags: libc::c_int) -> Result<OwnedFd, TapError> {
    let options =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun");
    let file = options.map_err(|e| match e.kind() {
        io::ErrorKind::PermissionDenied => TapError::Forbidden(name.to_owned(), e),
        _ => call(name, "opening /dev/net/tun", e),
    })?;
    let mut request = request(name);
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the kernel reads and writes an ifreq at the pointer, which lives across the call.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } >= 0 {
        return Ok(file.into());
    }
    let error = io::Error::last_os_error();
    Err(match error.raw_os_error() {
        Some(libc::EBUSY) => TapError::Busy(name.to_owned()),
        Some(libc::EPERM | libc::EACCES) => TapError::Forbidden(name.to_owned(), error),
        Some(libc::EINVAL) if flags & libc::IFF_MULTI_QUEUE != 0 => {
            TapError::Kind(name.to_owned(), "several queues (multi_queue)")
        }
        Some(libc::EINVAL) => TapError::Kind(name.to_owned(), "one queue"),
        Some(libc::E2BIG) => TapError::Kind(name.to_owned(), "that many queues"),
        _ => call(name, "TUNSETIFF", error),
    })
}

/// Checks a descriptor from outside and tells the name of its tap.
fn name_of(fd: &OwnedFd) -> Result<String, TapError> {
    let number = fd.as_raw_fd();
    let refused = |source| TapError::Descriptor { fd: number, source };
    let mut request = request("");
    // SAFETY: the kernel writes an ifreq at the pointer, which lives across the call.
    if unsafe { libc::ioctl(number, libc::TUNGETIFF, &raw mut request) } < 0 {
        return Err(refused(Some(io::Error::last_os_error())));
    }
    // SAFETY: the call above filled in the flags.
    let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
    let needed = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if flags & needed != needed {
        return Err(refused(None));
    }
    let name = request.ifr_name.iter().map(|byte| *byte as u8).take_while(|byte| *byte != 0).collect();
    Ok(String::from_utf8(name).unwrap_or_default())
}

fn make_nonblocking(fd: &OwnedFd) -> Result<(), TapError> {
    let number = fd.as_raw_fd();
    // SAFETY: reads and sets the status flags of an open descriptor.
    let done = unsafe {
        let flags = libc::fcntl(number, libc::F_GETFL);
        if flags < 0 { flags } else { libc::fcntl(number, libc::F_SETFL, flags | libc::O_NONBLOCK) }
    };
    let failed = || TapError::Descriptor { fd: number, source: Some(io::Error::last_os_error()) };
    if done < 0 { Err(failed()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by_name(name: &str) -> TapSource {
        TapSource::Name { name: name.to_owned(), create: false }
    }

    #[test]
    fn names_that_no_interface_can_have_are_refused() {
        for name in ["", "a/b", "tap%d", "sixteen-bytes-xx", "a b", "a:1", ".."] {
            assert!(matches!(Tap::open(by_name(name), 1), Err(TapError::Name(_))), "{name:?}");
        }
    }

    #[test]
    fn a_tap_that_does_not_exist_is_named_and_not_made() {
        for _ in 0..2 {
            let error = Tap::open(by_name("nacelle-none0"), 1).err().unwrap();
            assert!(error.to_string().contains("nacelle-none0 does not exist"), "{error}");
        }
    }

    #[test]
    fn an_interface_of_another_kind_is_refused() {
        assert!(matches!(
            Tap::open(by_name("lo"), 1),
            Err(TapError::Kind(..) | TapError::Forbidden(..) | TapError::Call { .. } | TapError::Missing(_))
        ));
    }

    #[test]
    fn descriptors_of_other_files_and_a_wrong_count_are_refused() {
        let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let opened = Tap::open(TapSource::Descriptors(vec![null()]), 1);
        assert!(matches!(opened, Err(TapError::Descriptor { .. })));
        let opened = Tap::open(TapSource::Descriptors(vec![null()]), 2);
        assert!(matches!(opened, Err(TapError::Count { got: 1, pairs: 2 })));
    }
}
