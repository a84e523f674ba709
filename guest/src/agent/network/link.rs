//! Talking to the kernel about interfaces, in rtnetlink.
//!
//! ```text
//!   nlmsghdr │ ifinfomsg / ifaddrmsg / rtmsg │ attribute │ attribute │ ...
//! ```
//!
//! Seven kinds of messages are all that is needed, each acknowledged by the kernel; they are
//! written here rather than by the usual crate because that one brings an async runtime into
//! process 1 (source: Linux `rtnetlink(7)`, `netlink(7)`).

use crate::agent::syscall::{check, owned, read, write};
use std::{
    io,
    net::IpAddr,
    os::fd::{AsRawFd, OwnedFd},
};

/// Most parts of a dump, and most interfaces or addresses, that are looked at.
const MAX_PARTS: usize = 1000;
const MAX_FOUND: usize = 1024;

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;

/// An interface that is there.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    pub index: i32,
    pub name: String,
    pub mac: Option<[u8; 6]>,
}

/// A message being written.
struct Message(Vec<u8>);

impl Message {
    /// A message of `kind` with its fixed part.
    fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; 4]; // length, known at the end
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&(flags | NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]); // sequence and port: one request at a time
        bytes.extend_from_slice(fixed);
        Self(bytes)
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = (4 + value.len()) as u16;
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn finish(mut self) -> Vec<u8> {
        let length = self.0.len() as u32;
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

fn family(address: IpAddr) -> u8 {
    (if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }) as u8
}

/// A conversation with the kernel's network: one request at a time.
pub(super) struct Link(OwnedFd);

impl Link {
    pub(super) fn open() -> io::Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: socket has no memory arguments.
        let socket = owned(unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE) })?;
        let limit = libc::timeval { tv_sec: 5, tv_usec: 0 };
        let size = size_of::<libc::timeval>() as libc::socklen_t;
        // SAFETY: a timeval with its size.
        check(unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVTIMEO,
                (&raw const limit).cast(),
                size,
            )
        })?;
        Ok(Self(socket))
    }

    /// `RTM_NEWLINK`: attributes, and up if asked.
    pub(super) fn change(&mut self, index: i32, attributes: &[(u16, Vec<u8>)], up: bool) -> io::Result<()> {
        if attributes.is_empty() && !up {
            return Ok(());
        }
        let flags = if up { libc::IFF_UP as u32 } else { 0 };
        let mut fixed = vec![0; 4]; // family, padding, type
        fixed.extend_from_slice(&index.to_ne_bytes());
        fixed.extend_from_slice(&flags.to_ne_bytes());
        fixed.extend_from_slice(&flags.to_ne_bytes()); // which flags change
        let message = Message::new(libc::RTM_NEWLINK, 0, &fixed);
        let message = attributes.iter().fold(message, |m, (kind, value)| m.attribute(*kind, value));
        self.ask(message)
    }

    /// `RTM_NEWADDR`.
    pub(super) fn add_address(&mut self, index: i32, address: IpAddr, prefix: u8) -> io::Result<()> {
        // An address given by the host is not doubted: no duplicate detection, at once usable.
        let flags = libc::IFA_F_PERMANENT | libc::IFA_F_NODAD;
        let mut fixed = vec![family(address), prefix, flags as u8, 0];
        fixed.extend_from_slice(&index.to_ne_bytes());
        let mut message = Message::new(libc::RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &fixed)
            .attribute(libc::IFA_LOCAL, &octets(address))
            .attribute(libc::IFA_ADDRESS, &octets(address));
        if let IpAddr::V4(a) = address
            && prefix < 31
        {
            let broadcast = a.to_bits() | u32::MAX.checked_shr(prefix.into()).unwrap_or(0);
            message = message.attribute(libc::IFA_BROADCAST, &broadcast.to_be_bytes());
        }
        self.ask(message)
    }

    /// `RTM_DELADDR`.
    pub(super) fn remove_address(&mut self, index: i32, (address, prefix): (IpAddr, u8)) -> io::Result<()> {
        let mut fixed = vec![family(address), prefix, 0, 0];
        fixed.extend_from_slice(&index.to_ne_bytes());
        let message = Message::new(libc::RTM_DELADDR, 0, &fixed)
            .attribute(libc::IFA_LOCAL, &octets(address))
            .attribute(libc::IFA_ADDRESS, &octets(address));
        match self.ask(message) {
            // Gone with the one before it, in whose net it was.
            Err(e) if e.raw_os_error() == Some(libc::EADDRNOTAVAIL) => Ok(()),
            other => other,
        }
    }

    /// `RTM_GETADDR`: the addresses of an interface with their prefixes.
    pub(super) fn addresses(&mut self, index: i32) -> io::Result<Vec<(IpAddr, u8)>> {
        let mut found = Vec::new();
        self.dump(libc::RTM_GETADDR, &[0; 8], |kind, message| {
            if kind == libc::RTM_NEWADDR && found.len() < MAX_FOUND {
                found.extend(address_in(message, index));
            }
        })?;
        Ok(found)
    }

    /// `RTM_GETLINK`: all interfaces.
    pub(super) fn interfaces(&mut self) -> io::Result<Vec<Found>> {
        let mut found = Vec::new();
        self.dump(libc::RTM_GETLINK, &[0; 16], |kind, message| {
            if kind == libc::RTM_NEWLINK && found.len() < MAX_FOUND {
                found.extend(interface_in(message));
            }
        })?;
        Ok(found)
    }

    /// Asks for all there is of something, and calls `f` with the kind of each message and what
    /// follows its header.
    fn dump(&mut self, kind: u16, fixed: &[u8], mut f: impl FnMut(u16, &[u8])) -> io::Result<()> {
        write(&self.0, &Message::new(kind, libc::NLM_F_DUMP as u16, fixed).finish())?;
        let mut buffer = vec![0; 32 << 10];
        for _ in 0..MAX_PARTS {
            let n = read(&self.0, &mut buffer)?;
            if each_in(buffer.get(..n).unwrap_or_default(), &mut f)? {
                return Ok(());
            }
        }
        Err(io::ErrorKind::InvalidData.into())
    }

    /// `RTM_NEWROUTE` for everything by `gateway`, which need not be in the interface's net.
    pub(super) fn add_default(&mut self, index: i32, gateway: IpAddr) -> io::Result<()> {
        let mut fixed = vec![
            family(gateway),
            0, // destination prefix: everything
            0,
            0,
            libc::RT_TABLE_MAIN,
            libc::RTPROT_BOOT,
            libc::RT_SCOPE_UNIVERSE,
            libc::RTN_UNICAST,
        ];
        const RTNH_F_ONLINK: u32 = 4;
        let on_link = RTNH_F_ONLINK;
        fixed.extend_from_slice(&on_link.to_ne_bytes());
        let message = Message::new(libc::RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &fixed)
            .attribute(libc::RTA_GATEWAY, &octets(gateway))
            .attribute(libc::RTA_OIF, &index.to_ne_bytes());
        self.ask(message)
    }

    /// Sends a message and reads the kernel's acknowledgement.
    fn ask(&mut self, message: Message) -> io::Result<()> {
        const ERROR: u16 = libc::NLMSG_ERROR as u16;
        write(&self.0, &message.finish())?;
        let mut answer = [0; 4096];
        let n = read(&self.0, &mut answer)?;
        let field = |at: usize| answer[..n].get(at..at + 4).and_then(|b| b.try_into().ok());
        let kind = answer[..n].get(4..6).map(|b| u16::from_ne_bytes([b[0], b[1]]));
        match (kind, field(16).map(i32::from_ne_bytes)) {
            (Some(ERROR), Some(0)) => Ok(()),
            (Some(ERROR), Some(error)) => Err(io::Error::from_raw_os_error(error.wrapping_neg())),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// Calls `f` with each message of one part of a dump; true when it was the last part.
fn each_in(mut part: &[u8], f: &mut impl FnMut(u16, &[u8])) -> io::Result<bool> {
    const DONE: u16 = libc::NLMSG_DONE as u16;
    const ERROR: u16 = libc::NLMSG_ERROR as u16;
    let broken = || io::Error::from(io::ErrorKind::InvalidData);
    while let Some(&[a, b, c, d, e, g, ..]) = part.first_chunk::<16>() {
        let (length, kind) = (u32::from_ne_bytes([a, b, c, d]) as usize, u16::from_ne_bytes([e, g]));
        let message = part.get(16..length).ok_or_else(broken)?;
        match kind {
            DONE => return Ok(true),
            ERROR => return Err(broken()),
            kind => f(kind, message),
        }
        part = part.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

/// The attributes of a message, up to the first that is not whole.
fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let &[a, b, c, d] = rest.first_chunk::<4>()?;
        let (length, kind) = (usize::from(u16::from_ne_bytes([a, b])), u16::from_ne_bytes([c, d]));
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The address that an `RTM_NEWADDR` tells, if it is one of interface `index`.
fn address_in(message: &[u8], index: i32) -> Option<(IpAddr, u8)> {
    let (&[_, prefix, _, _, a, b, c, d], rest) = message.split_first_chunk::<8>()?;
    if i32::from_ne_bytes([a, b, c, d]) != index {
        return None;
    }
    let (mut local, mut address) = (None, None);
    for (kind, value) in attributes(rest) {
        let four = <[u8; 4]>::try_from(value).map(IpAddr::from);
        let parsed = four.or_else(|_| <[u8; 16]>::try_from(value).map(IpAddr::from)).ok();
        match kind {
            libc::IFA_LOCAL => local = parsed,
            libc::IFA_ADDRESS => address = parsed,
            _ => {}
        }
    }
    // Of a link between two, the address is the other's.
    local.or(address).map(|address| (address, prefix))
}

/// The interface that an `RTM_NEWLINK` tells.
fn interface_in(message: &[u8]) -> Option<Found> {
    let (&[_, _, _, _, a, b, c, d, ..], rest) = message.split_first_chunk::<16>()?;
    let mut found = Found { index: i32::from_ne_bytes([a, b, c, d]), ..Found::default() };
    for (kind, value) in attributes(rest) {
        match kind {
            libc::IFLA_IFNAME => {
                found.name = String::from_utf8_lossy(value).trim_end_matches('\0').to_owned();
            }
            libc::IFLA_ADDRESS => found.mac = value.try_into().ok(),
            _ => {}
        }
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_to_four_bytes() {
        let bytes = Message::new(16, 0, &[0; 16]).attribute(3, b"eth0\0").finish();
        assert_eq!(bytes.len(), 16 + 16 + 12);
        assert_eq!(bytes[..4], 44u32.to_ne_bytes());
        assert_eq!(bytes[32..36], [9, 0, 3, 0]);
    }

    #[test]
    fn addresses_are_read_out_of_a_dump_and_damage_is_harmless() {
        let told = |index: i32, attributes: &[(u16, &[u8])]| {
            let mut fixed = vec![libc::AF_INET as u8, 24, 0, 0];
            fixed.extend_from_slice(&index.to_ne_bytes());
            let message = Message::new(libc::RTM_NEWADDR, 0, &fixed);
            attributes.iter().fold(message, |m, (kind, value)| m.attribute(*kind, value)).finish()
        };
        let mut dump = told(2, &[(libc::IFA_ADDRESS, &[10, 0, 0, 9]), (libc::IFA_LOCAL, &[10, 0, 0, 1])]);
        dump.extend(told(3, &[(libc::IFA_LOCAL, &[10, 0, 0, 2])]));
        dump.extend(told(2, &[(libc::IFA_LABEL, b"eth0\0"), (libc::IFA_ADDRESS, &[0xfd; 16])]));
        let read = |dump: &[u8]| {
            let mut found = Vec::new();
            let last = each_in(dump, &mut |kind, message| {
                assert_ne!(kind, libc::NLMSG_DONE as u16);
                found.extend(address_in(message, 2));
                interface_in(message);
            });
            (last, found)
        };
        let (last, found) = read(&dump);
        let six = IpAddr::from([0xfd; 16]);
        assert_eq!((last.unwrap(), found), (false, vec![("10.0.0.1".parse().unwrap(), 24), (six, 24)]));
        dump.extend(Message::new(libc::NLMSG_DONE as u16, 0, &[0; 4]).finish());
        assert!(read(&dump).0.unwrap());
        for at in 0..dump.len() {
            let _ = read(&dump[..at]);
            for byte in [0, 1, 0x7f, 0xff] {
                let mut damaged = dump.clone();
                damaged[at] = byte;
                let _ = read(&damaged);
            }
        }
    }

    #[test]
    fn an_interface_is_told_with_its_name_and_hardware_address() {
        let mut fixed = [0; 16];
        fixed[4..8].copy_from_slice(&7i32.to_ne_bytes());
        let message = Message::new(libc::RTM_NEWLINK, 0, &fixed);
        let message = message.attribute(libc::IFLA_IFNAME, b"eth1\0").attribute(libc::IFLA_ADDRESS, &[2; 6]);
        let found = interface_in(&message.finish()[16..]).unwrap();
        assert_eq!(found, Found { index: 7, name: "eth1".into(), mac: Some([2; 6]) });
    }
}
