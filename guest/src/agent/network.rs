//! Network interfaces: addresses, routes, MTU, up; and, for a machine that was restored, other
//! addresses than those it had.

mod link;

use guest::protocol::{Failure, FailureKind, Interface, InterfaceIdentity};
use link::{Found, Link};
use std::{
    io,
    net::{IpAddr, Ipv6Addr},
    time::{Duration, Instant},
};

/// Longest wait for an interface to appear.
const LIMIT: Duration = Duration::from_secs(5);

/// Most addresses an interface is given at once.
const MAX_ADDRESSES: usize = 64;

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
    let Found { name, index, .. } = find(link, interface)?;
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

/// Refuses what could not be meant.
pub fn check_identity(identity: &InterfaceIdentity) -> Result<(), Failure> {
    check_name(&identity.name)?;
    if identity.name.is_empty() && identity.mac.is_empty() {
        return Err(bad("An interface to change has neither a name nor a hardware address".to_owned()));
    }
    for mac in [(!identity.mac.is_empty()).then_some(&identity.mac), identity.new_mac.as_ref()] {
        mac.map_or(Ok(()), |mac| parse_mac(mac).map(drop))?;
    }
    if identity.addresses.len() > MAX_ADDRESSES {
        let count = identity.addresses.len();
        return Err(bad(format!(
            "An interface is to have {count} addresses, at most {MAX_ADDRESSES} may be"
        )));
    }
    identity.addresses.iter().try_for_each(|address| parse_prefix(address).map(drop))?;
    let gateways = identity.gateways.iter().map(|gateway| parse_address(gateway));
    let gateways = gateways.collect::<Result<Vec<_>, _>>()?;
    let of = |four| gateways.iter().filter(|gateway| gateway.is_ipv4() == four).count();
    if of(true) > 1 || of(false) > 1 {
        return Err(bad("An interface is to have several default routes of one family".to_owned()));
    }
    Ok(())
}

/// Gives an interface other addresses than it has. Already having them is fine.
pub fn identify(identity: &InterfaceIdentity) -> Result<(), Failure> {
    check_identity(identity)?;
    let addresses = identity.addresses.iter().map(|a| parse_prefix(a)).collect::<Result<Vec<_>, _>>()?;
    let new_mac = identity.new_mac.as_deref().map(parse_mac).transpose()?;
    let mut link = Link::open().map_err(|e| fail("talk to the kernel's network", &e))?;
    // By its present address, or by the new one if it has that already.
    let by = |mac: &str| Interface { mac: mac.into(), name: identity.name.clone(), ..Interface::default() };
    let found = look(&mut link, &by(&identity.mac));
    let found = found.or_else(|| look(&mut link, &by(identity.new_mac.as_deref()?)));
    let found = found.ok_or_else(|| absent(&by(&identity.mac)))?;
    let (name, index) = (&found.name, found.index);
    if let Some(mac) = new_mac {
        change_mac(&mut link, &found, mac)
            .map_err(|e| fail(&format!("give a new hardware address to the interface {name}"), &e))?;
    }
    if !addresses.is_empty() {
        replace_addresses(&mut link, index, &addresses)
            .map_err(|e| fail(&format!("change the addresses of the interface {name}"), &e))?;
        link.change(index, &[], true).map_err(|e| fail(&format!("bring up the interface {name}"), &e))?;
    }
    for gateway in &identity.gateways {
        link.add_default(index, parse_address(gateway)?)
            .map_err(|e| fail(&format!("route by {gateway} on the interface {name}"), &e))?;
    }
    Ok(())
}

/// Changes a hardware address, and the IPv6 address that the kernel made from it: two clones on
/// one network must not share that either.
fn change_mac(link: &mut Link, found: &Found, mac: [u8; 6]) -> io::Result<()> {
    let (index, old) = (found.index, found.mac);
    if old == Some(mac) {
        return Ok(());
    }
    link.change(index, &[(libc::IFLA_ADDRESS, mac.to_vec())], false)?;
    let Some(old) = old.map(|mac| (link_local(mac), 64)) else { return Ok(()) };
    if link.addresses(index)?.contains(&old) {
        link.remove_address(index, old)?;
        let (address, prefix) = (link_local(mac), 64);
        link.add_address(index, address, prefix)?;
    }
    Ok(())
}

/// Takes away what is not in `wanted` and gives what is missing. In this order: an address of the
/// same net as one that is there would be second to it, and go with it.
fn replace_addresses(link: &mut Link, index: i32, wanted: &[(IpAddr, u8)]) -> io::Result<()> {
    for old in link.addresses(index)? {
        let of_the_link = matches!(old.0, IpAddr::V6(a) if a.is_unicast_link_local());
        if !of_the_link && !wanted.contains(&old) {
            link.remove_address(index, old)?;
        }
    }
    wanted.iter().try_for_each(|(address, prefix)| link.add_address(index, *address, *prefix))
}

/// The address that IPv6 makes from a hardware address (RFC 4291, appendix A).
fn link_local([a, b, c, d, e, f]: [u8; 6]) -> IpAddr {
    let identifier = [a ^ 2, b, c, 0xff, 0xfe, d, e, f];
    let prefix = [0xfe, 0x80, 0, 0, 0, 0, 0, 0];
    let mut octets = [0; 16];
    octets.iter_mut().zip(prefix.into_iter().chain(identifier)).for_each(|(to, from)| *to = from);
    Ipv6Addr::from(octets).into()
}

fn parse_mac(text: &str) -> Result<[u8; 6], Failure> {
    let wrong =
        || bad(format!("{text:?} is not the hardware address of an interface, like 02:fc:00:00:00:01"));
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
        *byte = part.and_then(|p| u8::from_str_radix(p, 16).ok()).ok_or_else(wrong)?;
    }
    let [first, ..] = mac;
    if parts.next().is_some() || first & 1 != 0 || mac == [0; 6] {
        return Err(wrong());
    }
    Ok(mac)
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

/// Finds an interface by its hardware address or name.
fn find(link: &mut Link, interface: &Interface) -> Result<Found, Failure> {
    check_name(&interface.name)?;
    let until = Instant::now() + LIMIT;
    loop {
        if let Some(found) = look(link, interface) {
            return Ok(found);
        }
        if Instant::now() >= until {
            return Err(absent(interface));
        }
        // Only reached when the host names an interface that its machine has not got yet.
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn absent(interface: &Interface) -> Failure {
    let by = if interface.mac.is_empty() { &interface.name } else { &interface.mac };
    Failure::new(FailureKind::System, format!("The machine has no network interface {by:?}"))
}

fn check_name(name: &str) -> Result<(), Failure> {
    if name.len() > 15 || name.contains(['/', '\0', ' ']) {
        return Err(bad(format!("{name:?} is no name for an interface")));
    }
    Ok(())
}

/// The interface with this hardware address or, where none is given, this name.
fn look(link: &mut Link, interface: &Interface) -> Option<Found> {
    // An address of another form is of no interface here.
    let mac = (!interface.mac.is_empty()).then(|| parse_mac(&interface.mac).ok());
    let is_it = |found: &Found| match mac {
        Some(mac) => mac.is_some() && found.mac == mac,
        None => found.name == interface.name,
    };
    link.interfaces().ok()?.into_iter().find(is_it)
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
    fn hardware_addresses_are_those_of_one_interface() {
        assert_eq!(parse_mac("02:FC:00:00:00:0a").unwrap(), [2, 0xfc, 0, 0, 0, 10]);
        for text in ["", "02:fc:00:00:00", "02:fc:00:00:00:01:02", "01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff"] {
            assert!(parse_mac(text).is_err(), "{text}");
        }
        for text in
            ["00:00:00:00:00:00", "2:fc:0:0:0:1", "02-fc-00-00-00-01", "+2:fc:00:00:00:01", "ü:ü:ü:ü:ü:ü"]
        {
            assert!(parse_mac(text).is_err(), "{text}");
        }
        assert_eq!(link_local([0x02, 0xfc, 0, 0, 0, 1]).to_string(), "fe80::fc:ff:fe00:1");
    }

    #[test]
    fn an_identity_that_could_not_be_meant_is_refused() {
        let eth0 = || InterfaceIdentity { name: "eth0".into(), ..InterfaceIdentity::default() };
        let list = |texts: &[&str]| texts.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>();
        check_identity(&eth0()).unwrap();
        for wrong in [
            InterfaceIdentity::default(),
            InterfaceIdentity { name: "x".repeat(16), ..eth0() },
            InterfaceIdentity { mac: "x".into(), ..eth0() },
            InterfaceIdentity { new_mac: Some(String::new()), ..eth0() },
            InterfaceIdentity { addresses: list(&["10.0.0.1"]), ..eth0() },
            InterfaceIdentity { addresses: vec!["10.0.0.1/8".into(); 65], ..eth0() },
            InterfaceIdentity { gateways: list(&["10.0.0.1/8"]), ..eth0() },
            InterfaceIdentity { gateways: list(&["10.0.0.1", "10.0.0.2"]), ..eth0() },
        ] {
            assert_eq!(check_identity(&wrong).unwrap_err().kind, FailureKind::BadRequest, "{wrong:?}");
        }
        check_identity(&InterfaceIdentity { gateways: list(&["10.0.0.1", "fd00::1"]), ..eth0() }).unwrap();
    }

    #[test]
    fn an_absent_interface_is_named() {
        let interface = Interface { name: "no/such".into(), ..Interface::default() };
        assert!(find(&mut Link::open().unwrap(), &interface).unwrap_err().message.contains("no/such"));
    }
}
