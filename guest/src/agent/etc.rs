//! The machine's name, and the three files of `/etc` that every container gets from outside:
//! `hostname`, `hosts`, `resolv.conf`.

use super::syscall::check as check_call;
use guest::protocol::{Failure, FailureKind, Setup};
use std::{
    fmt::Write,
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

/// Longest `/etc/hosts` that is changed rather than written anew.
const MAX_HOSTS: u64 = 1 << 20;

/// The files made.
#[derive(Debug)]
pub struct Files {
    directory: PathBuf,
    names: Vec<(&'static str, &'static str)>,
}

impl Files {
    /// Each file and its place in the container.
    pub fn places(&self) -> impl Iterator<Item = (PathBuf, &'static str)> + '_ {
        self.names.iter().map(|(name, place)| (self.directory.join(name), *place))
    }
}

/// Names the machine; the container's processes inherit it.
pub fn set_hostname(name: &str) -> Result<(), Failure> {
    // SAFETY: the pointer and the length describe `name`.
    check_call(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) })
        .map(drop)
        .map_err(|e| fail(&format!("name the machine {name:?}"), &e))
}

/// Writes the files into `directory`.
pub fn write(directory: &Path, hostname: &str, setup: &Setup) -> Result<Files, Failure> {
    let mut contents = vec![
        ("hostname", "/etc/hostname", format!("{hostname}\n")),
        ("hosts", "/etc/hosts", hosts(hostname, setup)),
    ];
    if setup.dns.is_some() {
        contents.push(("resolv.conf", "/etc/resolv.conf", resolv_conf(setup)));
    }
    let mut names = Vec::new();
    fs::create_dir_all(directory).map_err(|e| fail("make a directory", &e))?;
    for (name, place, text) in contents {
        fs::write(directory.join(name), text).map_err(|e| fail(&format!("write {place}"), &e))?;
        names.push((name, place));
    }
    Ok(Files { directory: directory.into(), names })
}

/// Replaces the machine's name and addresses in files written before; what the container has
/// added to them stays.
pub fn rewrite(directory: &Path, before: (&str, &Setup), now: (&str, &Setup)) -> Result<(), Failure> {
    let path = directory.join("hosts");
    // Larger than it can have become by people's hands: begin anew.
    let there = fs::metadata(&path).is_ok_and(|file| file.len() <= MAX_HOSTS);
    let text = there.then(|| fs::read_to_string(&path).ok()).flatten();
    let text = match text {
        None => hosts(now.0, now.1),
        Some(text) => {
            let old = own_lines(before.0, before.1);
            let others = text.lines().filter(|line| !old.lines().any(|own| own == *line));
            let others: String = others.flat_map(|line| [line, "\n"]).collect();
            others + &own_lines(now.0, now.1)
        }
    };
    fs::write(&path, text).map_err(|e| fail("write /etc/hosts", &e))?;
    let name = format!("{}\n", now.0);
    fs::write(directory.join("hostname"), name).map_err(|e| fail("write /etc/hostname", &e))
}

fn fail(what: &str, error: &io::Error) -> Failure {
    Failure::new(FailureKind::System, format!("Cannot {what}: {error}"))
}

fn hosts(hostname: &str, setup: &Setup) -> String {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::0\tip6-localnet\n\
         ff00::0\tip6-mcastprefix\n\
         ff02::1\tip6-allnodes\n\
         ff02::2\tip6-allrouters\n",
    );
    text.push_str(&own_lines(hostname, setup));
    for host in &setup.hosts {
        let _ = writeln!(text, "{}\t{}", host.address, host.name);
    }
    text
}

/// The lines of the machine's own name.
fn own_lines(hostname: &str, setup: &Setup) -> String {
    let addresses = setup.network.iter().flat_map(|i| &i.addresses);
    let mut own: Vec<&str> = addresses.filter_map(|a| a.split('/').next()).collect();
    if own.is_empty() {
        own.push("127.0.1.1");
    }
    let mut text = String::new();
    if hostname != "localhost" {
        for address in own {
            let _ = writeln!(text, "{address}\t{hostname}");
        }
    }
    text
}

fn resolv_conf(setup: &Setup) -> String {
    let mut text = String::new();
    let Some(dns) = &setup.dns else { return text };
    if !dns.search.is_empty() {
        let _ = writeln!(text, "search {}", dns.search.join(" "));
    }
    for server in &dns.servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    if !dns.options.is_empty() {
        let _ = writeln!(text, "options {}", dns.options.join(" "));
    }
    text
}

/// Refuses what is no name for a machine.
pub fn check_hostname(name: &str) -> Result<(), Failure> {
    if name.len() > 64 || name.contains(|c: char| c == '/' || c.is_control() || c.is_whitespace()) {
        let message = format!("{name:?} is no host name; at most 64 bytes, no slash, no space");
        return Err(Failure::new(FailureKind::BadRequest, message));
    }
    Ok(())
}

/// Refuses names and addresses that would be more than one word of a line.
pub fn check(setup: &Setup) -> Result<(), Failure> {
    let bad = |what: &str, text: &str| {
        Err(Failure::new(FailureKind::BadRequest, format!("{text:?} is not {what}")))
    };
    let word = |text: &str| {
        !text.is_empty() && text.len() <= 255 && !text.contains(|c: char| c.is_whitespace() || c.is_control())
    };
    for host in &setup.hosts {
        if !word(&host.name) {
            return bad("a host name", &host.name);
        }
        if host.address.parse::<IpAddr>().is_err() {
            return bad("an IP address", &host.address);
        }
    }
    let Some(dns) = &setup.dns else { return Ok(()) };
    if let Some(server) = dns.servers.iter().find(|s| s.parse::<IpAddr>().is_err()) {
        return bad("the IP address of a name server", server);
    }
    match dns.search.iter().chain(&dns.options).find(|w| !word(w)) {
        Some(text) => bad("a word for resolv.conf", text),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest::protocol::{Dns, Host, Interface};

    #[test]
    fn the_machines_own_name_has_its_first_address() {
        let mut setup = Setup::default();
        assert!(hosts("box", &setup).ends_with("127.0.1.1\tbox\n"));
        setup.network = vec![Interface { addresses: vec!["10.0.0.2/24".into()], ..Interface::default() }];
        setup.hosts = vec![Host { name: "db".into(), address: "10.0.0.9".into() }];
        assert!(hosts("box", &setup).ends_with("10.0.0.2\tbox\n10.0.0.9\tdb\n"));
    }

    #[test]
    fn a_new_name_replaces_the_old_one_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let interface = |a: &str| vec![Interface { addresses: vec![a.into()], ..Interface::default() }];
        let before = Setup { network: interface("10.0.0.2/24"), ..Setup::default() };
        let now = Setup { network: interface("10.0.0.3/24"), ..Setup::default() };
        let path = directory.path().join("hosts");
        write(directory.path(), "old", &before).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, format!("{text}10.0.0.2\tolder\n10.9.9.9\told\n# mine")).unwrap();
        for _ in 0..2 {
            rewrite(directory.path(), ("old", &before), ("new", &now)).unwrap();
            let text = fs::read_to_string(&path).unwrap();
            let (base, rest) = text.split_once("ip6-allrouters\n").unwrap();
            assert!(base.starts_with("127.0.0.1\tlocalhost\n"));
            let expected = "10.0.0.2\tolder\n10.9.9.9\told\n# mine\n10.0.0.3\tnew\n";
            assert!(rest.starts_with(expected), "{rest}");
            assert_eq!(fs::read_to_string(directory.path().join("hostname")).unwrap(), "new\n");
            // The same again, as from a request that is repeated.
            fs::write(&path, text.replacen("10.0.0.3\tnew\n", "10.0.0.2\told\n", 1)).unwrap();
        }
        fs::write(&path, vec![b'x'; 2 << 20]).unwrap();
        rewrite(directory.path(), ("old", &before), ("new", &now)).unwrap();
        assert!(fs::read_to_string(&path).unwrap().ends_with("10.0.0.3\tnew\n"));
    }

    #[test]
    fn name_servers_are_written_as_the_resolver_reads_them() {
        let dns = Dns {
            servers: vec!["1.1.1.1".into(), "::1".into()],
            search: vec!["a.test".into(), "b.test".into()],
            options: vec!["ndots:2".into()],
        };
        let setup = Setup { dns: Some(dns), ..Setup::default() };
        let text = "search a.test b.test\nnameserver 1.1.1.1\nnameserver ::1\noptions ndots:2\n";
        assert_eq!(resolv_conf(&setup), text);
    }

    #[test]
    fn a_line_break_cannot_be_smuggled_in() {
        let host = Host { name: "a\n6.6.6.6 bank".into(), address: "1.1.1.1".into() };
        assert!(check(&Setup { hosts: vec![host], ..Setup::default() }).is_err());
        let dns = Dns { servers: vec!["1.1.1.1\nsearch x".into()], ..Dns::default() };
        assert!(check(&Setup { dns: Some(dns), ..Setup::default() }).is_err());
    }
}
