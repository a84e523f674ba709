//! The lab's way out: QEMU's user-mode network, whose addresses are always the same.
//!
//! ```text
//!   eth0 10.0.2.15/24 ---- 10.0.2.2 (gateway: the host's own network) , 10.0.2.3 (name server)
//! ```
//!
//! Set by the old ioctls, because they are four and need no program of the host.

use std::fs;
use std::io;
use std::mem;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::kernel::checked;

const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// How long the interface may take to appear after its driver is loaded.
const INTERFACE_WAIT: Duration = Duration::from_secs(10);

/// Brings the loopback interface up.
pub fn loopback() -> Result<()> {
    let socket = socket()?;
    up(&socket, "lo").context("Cannot bring the loopback interface up")
}

/// Connects the machine to the host's network.
pub fn way_out() -> Result<()> {
    let start = Instant::now();
    while !fs::exists("/sys/class/net/eth0")? {
        anyhow::ensure!(start.elapsed() < INTERFACE_WAIT, "No network interface appeared");
        thread::sleep(Duration::from_millis(5));
    }
    let socket = socket()?;
    for (request, address) in [(libc::SIOCSIFADDR, ADDRESS), (libc::SIOCSIFNETMASK, MASK)] {
        let mut interface = interface("eth0");
        interface.ifr_ifru.ifru_addr = internet(address);
        // SAFETY: both requests read one ifreq.
        checked(unsafe { libc::ioctl(socket.as_raw_fd(), request, &raw const interface) })?;
    }
    up(&socket, "eth0")?;
    // SAFETY: an rtentry of zeros is a valid one.
    let mut route: libc::rtentry = unsafe { mem::zeroed() };
    route.rt_dst = internet(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = internet(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = internet(GATEWAY);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    // SAFETY: SIOCADDRT reads one rtentry.
    checked(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT, &raw const route) })?;
    // It may be a link into a directory that is empty here.
    let _ = fs::remove_file("/etc/resolv.conf");
    fs::write("/etc/resolv.conf", format!("nameserver {NAME_SERVER}\n"))?;
    Ok(())
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: plain arguments; the result is checked before it is owned.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    checked(socket)?;
    // SAFETY: the descriptor is open and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(socket) })
}

fn up(socket: &OwnedFd, name: &str) -> io::Result<()> {
    let mut request = interface(name);
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP).unwrap_or(0);
    // SAFETY: SIOCSIFFLAGS reads one ifreq.
    checked(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) })
}

fn interface(name: &str) -> libc::ifreq {
    // SAFETY: an ifreq of zeros is a valid one (empty name, no flags).
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::try_from(from).unwrap_or(0);
    }
    request
}

fn internet(address: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    // The port comes first.
    for (to, from) in data.iter_mut().skip(2).zip(address.octets()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: data }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_lies_behind_the_port() {
        let address = internet(Ipv4Addr::new(10, 0, 2, 200));
        let bytes: Vec<u8> = address.sa_data.iter().map(|c| c.cast_unsigned()).collect();
        assert_eq!(bytes[..7], [0, 0, 10, 0, 2, 200, 0]);
    }
}
