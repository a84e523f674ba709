//! Network interfaces: addresses, routes, MTU, up.
//!
//! ```text
//!   nlmsghdr │ ifinfomsg / ifaddrmsg / rtmsg │ attribute │ attribute │ ...
//! ```
//!
//! Four kinds of rtnetlink messages are all that is needed, each acknowledged by the kernel;
//! they are written here rather than by the usual crate because that one brings an async
//! runtime into process 1 (source: Linux `rtnetlink(7)`, `netlink(7)`).

use super::syscall::{check, owned, read, write};
use guest::protocol::{Failure, FailureKind, Interface};
use std::{
    fs, io,
    net::IpAddr,
    os::fd::{AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

/// Longest wait for an interface to appear.
const LIMIT: Duration = Duration::from_secs(5);

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;

/// Brings the loopback interface up.
pub fn loopback() -> Result<(), Failure> {
    let up = || Link::open()?.change(1, &[], true);
    up().map_err(|e| fail("bring the loopback interface up", &e))
}

/// Configures interfaces.
pub fn configure(interfaces: &[Interface]) -> Result<(), Failure> {
    let mut link = Link::open().map_err(|e| fail("talk to the kernel's network", &e))?;
    for interface in interfaces {
        configure_one(&mut link, interface)?;
    }
    Ok(())
}

fn configure_one(link: &mut Link, interface: &Interface) -> Result<(), Failure> {
    let addresses = interface.addresses.iter().map(|a| parse_prefix(a)).collect::<Result<Vec<_>, _>>()?;
    let gateways = interface.gateways.iter().map(|a| parse_address(a)).collect::<Result<Vec<_>, _>>()?;
    let (name, index) = find(interface)?;
    let what = |what: &str| format!("{what} the interface {name}");
    let mut changes = Vec::new();
    if !interface.name.is_empty() && interface.name != name {
        changes.push((libc::IFLA_IFNAME, zero_ended(&interface.name)));
    }
    if interface.mtu != 0 {
        changes.push((libc::IFLA_MTU, interface.mtu.to_ne_bytes().to_vec()));
    }
    link.change(index, &changes, false).map_err(|e| fail(&what("change"), &e))?;
    for (address, prefix) in addresses {
        link.add_address(index, address, prefix)
            .map_err(|e| fail(&format!("give {address}/{prefix} to the interface {name}"), &e))?;
    }
    link.change(index, &[], true).map_err(|e| fail(&what("bring up"), &e))?;
    for gateway in gateways {
        link.add_default(index, gateway)
            .map_err(|e| fail(&format!("route by {gateway} on the interface {name}"), &e))?;
    }
    Ok(())
}

fn fail(what: &str, error: &io::Error) -> Failure {
    Failure::new(FailureKind::System, format!("Cannot {what}: {error}"))
}

fn bad(message: String) -> Failure {
    Failure::new(FailureKind::BadRequest, message)
}

fn parse_address(text: &str) -> Result<IpAddr, Failure> {
    text.parse().map_err(|_| bad(format!("{text:?} is not an IP address")))
}

fn parse_prefix(text: &str) -> Result<(IpAddr, u8), Failure> {
    let wrong = || bad(format!("{text:?} is not an address with its prefix, like 172.16.0.2/24"));
    let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
    let address: IpAddr = address.parse().map_err(|_| wrong())?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    let prefix = prefix.parse().ok().filter(|p| *p <= most).ok_or_else(wrong)?;
    Ok((address, prefix))
}

fn zero_ended(text: &str) -> Vec<u8> {
    [text.as_bytes(), b"\0"].concat()
}

/// Finds an interface by its hardware address or name; its present name and number.
fn find(interface: &Interface) -> Result<(String, i32), Failure> {
    if interface.name.len() > 15 || interface.name.contains(['/', '\0', ' ']) {
        return Err(bad(format!("{:?} is no name for an interface", interface.name)));
    }
    let until = Instant::now() + LIMIT;
    loop {
        if let Some(found) = look(interface) {
            return Ok(found);
        }
        if Instant::now() >= until {
            let by = if interface.mac.is_empty() { &interface.name } else { &interface.mac };
            return Err(Failure::new(
                FailureKind::System,
                format!("The machine has no network interface {by:?}"),
            ));
        }
        // Only reached when the host names an interface that its machine has not got yet.
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn look(interface: &Interface) -> Option<(String, i32)> {
    for entry in fs::read_dir("/sys/class/net").ok()?.flatten() {
        let text = |file: &str| fs::read_to_string(entry.path().join(file)).map(|t| t.trim().to_owned()).ok();
        let name = entry.file_name().into_string().ok()?;
        let matches = if interface.mac.is_empty() {
            name == interface.name
        } else {
            text("address").is_some_and(|a| a.eq_ignore_ascii_case(&interface.mac))
        };
        if matches {
            return Some((name, text("ifindex")?.parse().ok()?));
        }
    }
    None
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

/// A conversation with the kernel's network.
struct Link(OwnedFd);

impl Link {
    fn open() -> io::Result<Self> {
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
    fn change(&mut self, index: i32, attributes: &[(u16, Vec<u8>)], up: bool) -> io::Result<()> {
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
    fn add_address(&mut self, index: i32, address: IpAddr, prefix: u8) -> io::Result<()> {
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

    /// `RTM_NEWROUTE` for everything by `gateway`, which need not be in the interface's net.
    fn add_default(&mut self, index: i32, gateway: IpAddr) -> io::Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_need_a_prefix_that_fits() {
        assert_eq!(parse_prefix("10.0.0.1/8").unwrap(), ("10.0.0.1".parse().unwrap(), 8));
        assert_eq!(parse_prefix("fd00::2/64").unwrap().1, 64);
        for text in ["", "10.0.0.1", "10.0.0.1/33", "10.0.0.1/-1", "::/129", "a/8", "10.0.0.1/8/8"] {
            assert!(parse_prefix(text).is_err(), "{text}");
        }
    }

    #[test]
    fn attributes_are_padded_to_four_bytes() {
        let bytes = Message::new(16, 0, &[0; 16]).attribute(3, b"eth0\0").finish();
        assert_eq!(bytes.len(), 16 + 16 + 12);
        assert_eq!(bytes[..4], 44u32.to_ne_bytes());
        assert_eq!(bytes[32..36], [9, 0, 3, 0]);
    }

    #[test]
    fn an_absent_interface_is_named() {
        let interface = Interface { name: "no/such".into(), ..Interface::default() };
        assert!(find(&interface).unwrap_err().message.contains("no/such"));
    }
}
