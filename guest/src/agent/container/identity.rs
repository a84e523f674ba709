//! A restored machine becomes another one than it was saved as.
//!
//! ```text
//!   check everything ─► random numbers ─► clock ─► name ─► machine id ─► interfaces ─► hosts
//!        │ wrong: nothing was done            each on its own; what fails is told
//! ```
//!
//! Random numbers come first: whoever sees the new name may already draw some. What runs in the
//! container has run all the while; nothing here can come before it.

use super::{Container, Live, hostname};
use crate::agent::{
    clock, etc, network,
    syscall::{check as check_call, cstring, join, open, open_under, write},
};
use guest::protocol::{Failure, FailureKind, Identity, InterfaceIdentity, Outcome, Part};
use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd},
    path::Path,
    sync::Arc,
    thread,
};

/// Most interfaces in one request.
const MAX_INTERFACES: usize = 64;

/// Files that hold the machine id (`machine-id(5)`; D-Bus has its own where it is no link).
const MACHINE_ID: [&str; 2] = ["etc/machine-id", "var/lib/dbus/machine-id"];

impl Container {
    /// Changes who the machine is, part by part.
    ///
    /// # Errors
    /// When something in `identity` could not be meant. Then nothing was done.
    pub fn identify(&self, identity: &Identity) -> Result<Vec<Outcome>, Failure> {
        check(identity)?;
        let mut outcomes = Vec::new();
        let mut tell = |part, result: Result<(), Failure>| {
            outcomes.push(Outcome { part, failure: result.err() });
        };
        if !identity.entropy.is_empty() {
            tell(Part::Random, self.own_kernel().and_then(|()| clock::feed(&identity.entropy)));
        }
        if let Some(time) = identity.unix_ns {
            tell(Part::Clock, self.own_kernel().and_then(|()| clock::set(time)));
        }
        if let Some(name) = &identity.hostname {
            tell(Part::Hostname, self.rename(name));
        }
        if let Some(id) = &identity.machine_id {
            tell(Part::MachineId, self.set_machine_id(id));
        }
        for interface in &identity.network {
            let done = network::identify(interface).and_then(|()| self.readdress(interface));
            let name = if interface.mac.is_empty() { &interface.name } else { &interface.mac };
            tell(Part::Interface(name.clone()), done);
        }
        Ok(outcomes)
    }

    fn own_kernel(&self) -> Result<(), Failure> {
        if self.owns_kernel {
            return Ok(());
        }
        let message = "The agent runs in namespaces of a host, whose kernel is not its own to change";
        Err(Failure::new(FailureKind::WrongState, message))
    }

    /// Names the machine and the container, and writes the name where it is read.
    fn rename(&self, name: &str) -> Result<(), Failure> {
        let mut state = self.lock();
        etc::set_hostname(name)?;
        if let Some(live) = &state.live {
            in_names_of(live, || etc::set_hostname(name))?;
        }
        let before = std::mem::replace(&mut state.setup.hostname, name.to_owned());
        if state.files.is_none() {
            return Ok(());
        }
        let before = super::Setup { hostname: before, ..state.setup.clone() };
        etc::rewrite(&self.base.join("etc"), (hostname(&before), &before), (name, &state.setup))
    }

    /// Notes an interface's new addresses, for `/etc/hosts`.
    fn readdress(&self, identity: &InterfaceIdentity) -> Result<(), Failure> {
        let mut state = self.lock();
        let (before, has_files) = (state.setup.clone(), state.files.is_some());
        let mut interfaces = state.setup.network.iter_mut();
        let known = interfaces.find(|known| {
            let same_mac = |mac: &str| !mac.is_empty() && known.mac.eq_ignore_ascii_case(mac);
            let by_mac = same_mac(&identity.mac) || identity.new_mac.as_deref().is_some_and(same_mac);
            by_mac || (identity.mac.is_empty() && known.name == identity.name)
        });
        let Some(known) = known else { return Ok(()) };
        if let (Some(mac), false) = (&identity.new_mac, known.mac.is_empty()) {
            known.mac.clone_from(mac);
        }
        if !identity.gateways.is_empty() {
            known.gateways.clone_from(&identity.gateways);
        }
        if identity.addresses.is_empty() {
            return Ok(());
        }
        known.addresses.clone_from(&identity.addresses);
        if !has_files {
            return Ok(());
        }
        let name = hostname(&before);
        etc::rewrite(&self.base.join("etc"), (name, &before), (name, &state.setup))
    }

    /// Puts `id` into each file that holds the machine id: the container's, and the machine's own.
    fn set_machine_id(&self, id: &str) -> Result<(), Failure> {
        let fail =
            |e: io::Error| Failure::new(FailureKind::System, format!("Cannot write the machine id: {e}"));
        let live = self.lock().live.clone();
        if let Some(live) = live {
            replace_machine_ids(&live.root, id).map_err(fail)?;
        } else if let Ok(root) = open(&self.base.join("root"), libc::O_PATH | libc::O_DIRECTORY) {
            replace_machine_ids(&root, id).map_err(fail)?;
        }
        if self.owns_kernel {
            let root = open(Path::new("/"), libc::O_PATH | libc::O_DIRECTORY).map_err(fail)?;
            replace_machine_ids(&root, id).map_err(fail)?;
        }
        Ok(())
    }
}

/// Runs `work` where the machine's name is the container's.
fn in_names_of(live: &Arc<Live>, work: impl FnOnce() -> Result<(), Failure> + Send) -> Result<(), Failure> {
    let cannot = |e| Failure::new(FailureKind::System, format!("Cannot enter the container: {e}"));
    thread::scope(|scope| {
        let names = live.namespaces.names().ok_or_else(|| cannot(io::ErrorKind::NotFound.into()))?;
        let enter = || join(names, libc::CLONE_NEWUTS).map_err(cannot).and_then(|()| work());
        match thread::Builder::new().stack_size(128 << 10).spawn_scoped(scope, enter) {
            Ok(thread) => {
                thread.join().unwrap_or_else(|_| Err(Failure::new(FailureKind::System, "A thread broke off")))
            }
            Err(e) => Err(cannot(e)),
        }
    })
}

/// Writes `id` into the files under `root` that are there and are files: the container may have
/// put anything in their place.
fn replace_machine_ids(root: &impl AsFd, id: &str) -> io::Result<()> {
    for path in MACHINE_ID {
        let flags = libc::O_WRONLY | libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_NOFOLLOW;
        let rules = libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS;
        let file = match open_under(root, &cstring(path)?, flags, 0, rules) {
            Ok(file) => fs::File::from(file),
            // Not there, a link, or nothing that could be written.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP)) => {
                continue;
            }
            Err(e) if matches!(e.raw_os_error(), Some(libc::EISDIR | libc::ENXIO)) => continue,
            Err(e) => return Err(e),
        };
        if !file.metadata()?.is_file() {
            continue;
        }
        // SAFETY: ftruncate has no memory arguments.
        check_call(unsafe { libc::ftruncate(file.as_raw_fd(), 0) })?;
        let line = format!("{id}\n");
        if write(&file, line.as_bytes())? != line.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
    }
    Ok(())
}

/// Refuses what could not be meant.
fn check(identity: &Identity) -> Result<(), Failure> {
    let bad = |message: String| Err(Failure::new(FailureKind::BadRequest, message));
    clock::check_entropy(&identity.entropy)?;
    if let Some(name) = &identity.hostname {
        if name.is_empty() {
            return bad("A machine's new name is empty".to_owned());
        }
        etc::check_hostname(name)?;
    }
    if let Some(id) = &identity.machine_id {
        let digits = id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if id.len() != 32 || !digits || id.bytes().all(|b| b == b'0') {
            return bad(format!("{id:?} is no machine id: 32 lower-case hexadecimal digits, not all zero"));
        }
    }
    if identity.network.len() > MAX_INTERFACES {
        let count = identity.network.len();
        return bad(format!("{count} interfaces are to change, at most {MAX_INTERFACES} may"));
    }
    identity.network.iter().try_for_each(network::check_identity)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl FnOnce(&mut Identity)) -> String {
        let mut identity = Identity::default();
        change(&mut identity);
        let failure = check(&identity).unwrap_err();
        assert_eq!(failure.kind, FailureKind::BadRequest);
        failure.message
    }

    #[test]
    fn what_could_not_be_meant_is_refused() {
        assert!(refused(|i| i.entropy = vec![0; 513]).contains("513"));
        for name in [String::new(), "a/b".into(), "a\nb".into(), "a b".into(), "x".repeat(65)] {
            refused(|i| i.hostname = Some(name));
        }
        let long = "a".repeat(33);
        for id in ["", "x", &"0".repeat(32), &"A".repeat(32), &"g".repeat(32), &long, &"é".repeat(16)] {
            refused(|i| i.machine_id = Some(id.to_owned()));
        }
        refused(|i| i.network = vec![InterfaceIdentity { name: "lo".into(), ..Default::default() }; 65]);
        let whole = Identity {
            unix_ns: Some(1),
            entropy: vec![7; 512],
            hostname: Some("x".repeat(64)),
            machine_id: Some("0123456789abcdef0123456789abcdef".into()),
            network: vec![InterfaceIdentity { name: "eth0".into(), ..Default::default() }; 64],
        };
        check(&whole).unwrap();
        check(&Identity::default()).unwrap();
    }

    #[test]
    fn only_files_that_are_there_get_the_id() {
        let directory = tempfile::tempdir().unwrap();
        let at = |path: &str| directory.path().join(path);
        let root = open(directory.path(), libc::O_PATH | libc::O_DIRECTORY).unwrap();
        replace_machine_ids(&root, "new").unwrap();
        assert!(!at("etc").exists());
        fs::create_dir_all(at("etc")).unwrap();
        fs::create_dir_all(at("var/lib/dbus")).unwrap();
        fs::write(at("etc/machine-id"), "an old one, and longer\n").unwrap();
        fs::write(at("outside"), "untouched").unwrap();
        std::os::unix::fs::symlink(at("outside"), at("var/lib/dbus/machine-id")).unwrap();
        replace_machine_ids(&root, "new").unwrap();
        assert_eq!(fs::read_to_string(at("etc/machine-id")).unwrap(), "new\n");
        assert_eq!(fs::read_to_string(at("outside")).unwrap(), "untouched");
        // A pipe without a reader would keep a careless agent waiting for ever.
        fs::remove_file(at("etc/machine-id")).unwrap();
        let pipe = cstring(at("etc/machine-id").to_str().unwrap()).unwrap();
        // SAFETY: a zero-terminated string.
        assert_eq!(unsafe { libc::mkfifo(pipe.as_ptr(), 0o600) }, 0);
        replace_machine_ids(&root, "new").unwrap();
    }
}
