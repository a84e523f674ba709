//! The rules that a specification must keep before anything is opened.

use std::collections::HashSet;

use super::{ConsoleMode, CpuSource, HugePages, MEMORY_MIN_MIB, NamedTemplate, Spec, VCPUS_MAX};
use crate::{Fault, FaultKind};

/// Longest path of a unix socket, without its final zero byte (unix(7)).
const SOCKET_PATH_MAX: usize = 107;

fn wrong(message: impl Into<String>) -> Fault {
    Fault::new(FaultKind::Invalid, message)
}

impl Spec {
    /// Checks every rule that needs no look at the host, for a machine that is to start. The
    /// first broken one is named.
    pub fn check(&self) -> Result<(), Fault> {
        if self.boot_source.kernel_image_path.as_os_str().is_empty() {
            return Err(wrong("There is no kernel to boot; set kernel_image_path of the boot-source"));
        }
        self.check_parts()
    }

    /// The same for a machine that is still being put together.
    pub fn check_parts(&self) -> Result<(), Fault> {
        self.check_machine()?;
        self.check_processors()?;
        self.check_names()?;
        self.check_drives()?;
        self.check_network()?;
        self.check_consoles()?;
        self.check_balloon()?;
        self.check_memory_hotplug()?;
        self.check_mmds()?;
        let Some(vsock) = &self.vsock else { return Ok(()) };
        if vsock.guest_cid < 3 || vsock.guest_cid == u32::MAX {
            let cid = vsock.guest_cid;
            return Err(wrong(format!("Vsock guest_cid is {cid}; 0 to 2 and 4294967295 are reserved")));
        }
        check_socket_path("vsock uds_path", &vsock.uds_path)
    }

    fn check_machine(&self) -> Result<(), Fault> {
        let config = &self.machine_config;
        let (cpus, memory) = (config.vcpu_count, config.mem_size_mib);
        if !(1..=VCPUS_MAX).contains(&cpus) {
            return Err(wrong(format!("vcpu_count is {cpus}; it must be 1 to {VCPUS_MAX}")));
        }
        if config.smt && cpus != 1 && !cpus.is_multiple_of(2) {
            return Err(wrong(format!("vcpu_count is {cpus}; with smt it must be 1 or even")));
        }
        if let Some(max) = config.max_vcpu_count {
            if !(cpus..=VCPUS_MAX).contains(&max) {
                let rule = format!("it must be vcpu_count, which is {cpus}, to {VCPUS_MAX}");
                return Err(wrong(format!("max_vcpu_count is {max}; {rule}")));
            }
            if config.smt && max != 1 && !max.is_multiple_of(2) {
                return Err(wrong(format!("max_vcpu_count is {max}; with smt it must be 1 or even")));
            }
        }
        if memory < MEMORY_MIN_MIB {
            return Err(wrong(format!("mem_size_mib is {memory}; it must be at least {MEMORY_MIN_MIB}")));
        }
        if memory.checked_mul(1 << 20).is_none_or(|bytes| bytes > 1 << 46) {
            return Err(wrong(format!("mem_size_mib is {memory}; more than 64 TiB cannot be addressed")));
        }
        if config.huge_pages == HugePages::Huge2M && !memory.is_multiple_of(2) {
            return Err(wrong(format!("mem_size_mib is {memory}; with 2M pages it must be even")));
        }
        Ok(())
    }

    fn check_processors(&self) -> Result<(), Fault> {
        if self.machine_config.cpu_template == Some(NamedTemplate::V1N1) {
            return Err(wrong("cpu_template is V1N1, which is for Arm processors; this host is an x86_64"));
        }
        match &self.cpu_config {
            Some(CpuSource::Here(config)) => config.check(),
            _ => Ok(()),
        }
    }

    fn check_names(&self) -> Result<(), Fault> {
        let drives = self.drives.iter().map(|d| ("drive_id", &d.drive_id));
        let interfaces = self.network_interfaces.iter().map(|n| ("iface_id", &n.iface_id));
        let pmem = self.pmem.iter().map(|p| ("pmem id", &p.id));
        let mut seen = HashSet::new();
        for (field, id) in drives.chain(interfaces).chain(pmem) {
            let fine = |c: char| c.is_ascii_alphanumeric() || c == '_';
            if id.is_empty() || id.len() > 64 || !id.chars().all(fine) {
                let rule = "it must be 1 to 64 letters, digits and underscores";
                return Err(wrong(format!("{field} is {id:?}; {rule}")));
            }
            if !seen.insert((field, id)) {
                return Err(wrong(format!("Two devices have the {field} {id:?}; each needs its own")));
            }
        }
        Ok(())
    }

    fn check_drives(&self) -> Result<(), Fault> {
        let drives = self.drives.iter().filter(|d| d.is_root_device).map(|d| &d.drive_id);
        let pmem = self.pmem.iter().filter(|p| p.root_device).map(|p| &p.id);
        let roots: Vec<_> = drives.chain(pmem).collect();
        if let [first, second, ..] = roots[..] {
            return Err(wrong(format!(
                "Drives {first:?} and {second:?} both are root devices; only one may be"
            )));
        }
        for drive in &self.drives {
            let (id, queues, size) = (&drive.drive_id, drive.num_queues, drive.queue_size);
            if !(1..=64).contains(&queues) {
                return Err(wrong(format!("Drive {id:?} has num_queues {queues}; it must be 1 to 64")));
            }
            if !size.is_power_of_two() || !(4..=1024).contains(&size) {
                let rule = "it must be a power of two from 4 to 1024";
                return Err(wrong(format!("Drive {id:?} has queue_size {size}; {rule}")));
            }
            match (drive.path_on_host.as_os_str().is_empty(), drive.by_descriptor) {
                _ if drive.socket.is_some() => {
                    let rule = "vhost-user-block is not supported; give path_on_host";
                    return Err(wrong(format!("Drive {id:?} has a socket; {rule}")));
                }
                (true, true) | (false, false) => {}
                (false, true) => {
                    let rule = "a disk is either at path_on_host or by_descriptor";
                    return Err(wrong(format!("Drive {id:?}: {rule}")));
                }
                (true, false) => {
                    let rule = "either path_on_host or by_descriptor must be given";
                    return Err(wrong(format!("Drive {id:?}: {rule}")));
                }
            }
            if drive.discard && drive.is_read_only {
                return Err(wrong(format!("Drive {id:?} is read-only; discard needs a writable one")));
            }
        }
        Ok(())
    }

    fn check_balloon(&self) -> Result<(), Fault> {
        let Some(balloon) = &self.balloon else { return Ok(()) };
        let (amount, memory) = (u64::from(balloon.amount_mib), self.machine_config.mem_size_mib);
        if amount > memory {
            return Err(wrong(format!(
                "The balloon's amount_mib is {amount}; the machine has {memory} MiB of memory"
            )));
        }
        Ok(())
    }

    fn check_memory_hotplug(&self) -> Result<(), Fault> {
        let Some(memory) = &self.memory_hotplug else { return Ok(()) };
        let (total, block, slot) = (memory.total_size_mib, memory.block_size_mib, memory.slot_size_mib);
        let of = |field: &str, value: u32, rule: String| {
            Err(wrong(format!("{field} of memory-hotplug is {value}; it must be {rule}")))
        };
        if block < 2 || !block.is_power_of_two() {
            return of("block_size_mib", block, "a power of two, at least 2".to_owned());
        }
        if slot < 128 || !slot.is_multiple_of(block) {
            return of("slot_size_mib", slot, format!("at least 128 and a multiple of {block}"));
        }
        if total < slot || !total.is_multiple_of(slot) {
            return of("total_size_mib", total, format!("at least {slot} and a multiple of it"));
        }
        Ok(())
    }

    fn check_mmds(&self) -> Result<(), Fault> {
        let Some(mmds) = &self.mmds_config else { return Ok(()) };
        if mmds.network_interfaces.is_empty() {
            return Err(wrong("mmds-config names no network interface; it must name at least one"));
        }
        let known = |id: &&String| self.network_interfaces.iter().any(|n| n.iface_id == **id);
        if let Some(unknown) = mmds.network_interfaces.iter().find(|id| !known(id)) {
            return Err(wrong(format!(
                "mmds-config names the network interface {unknown:?}, which the machine does not have"
            )));
        }
        match mmds.ipv4_address {
            // The first and the last 256 addresses are reserved (RFC 3927 section 2.1).
            Some(address) if !matches!(address.octets(), [169, 254, 1..=254, _]) => Err(wrong(format!(
                "The ipv4_address of mmds-config is {address}; it must be 169.254.1.0 to 169.254.254.255"
            ))),
            _ => Ok(()),
        }
    }

    fn check_network(&self) -> Result<(), Fault> {
        let mut taps = HashSet::new();
        for interface in &self.network_interfaces {
            let id = &interface.iface_id;
            match (&interface.host_dev_name, interface.host_dev_fd) {
                (None, None) if interface.by_descriptor => {}
                _ if interface.by_descriptor => {
                    let rule = "a tap that comes by_descriptor has no other name";
                    return Err(wrong(format!("Interface {id:?}: {rule}")));
                }
                (Some(name), None) if name.is_empty() || name.len() > 15 || name.contains(['/', ' ']) => {
                    let rule = "an interface name is 1 to 15 characters without '/' or spaces";
                    return Err(wrong(format!("Interface {id:?} has host_dev_name {name:?}; {rule}")));
                }
                (Some(name), None) => {
                    if !taps.insert(name) {
                        return Err(wrong(format!(
                            "Two interfaces use the tap {name:?}; each needs its own"
                        )));
                    }
                }
                (None, Some(fd)) if fd > 2 => {}
                (None, Some(fd)) => {
                    return Err(wrong(format!("Interface {id:?} has host_dev_fd {fd}; it must be above 2")));
                }
                _ => {
                    let rule = "one of host_dev_name, by_descriptor and host_dev_fd must be given";
                    return Err(wrong(format!("Interface {id:?}: {rule}")));
                }
            }
            if let Some(mac) = interface.guest_mac.as_ref().filter(|mac| !is_mac(mac)) {
                let rule = "a MAC address is six pairs of hexadecimal digits with colons between";
                return Err(wrong(format!("Interface {id:?} has guest_mac {mac:?}; {rule}")));
            }
            if interface.mtu.is_some_and(|mtu| mtu < 68) {
                return Err(wrong(format!(
                    "Interface {id:?} has an mtu below 68, the least IPv4 works with"
                )));
            }
            if !(1..=16).contains(&interface.num_queue_pairs) {
                let pairs = interface.num_queue_pairs;
                return Err(wrong(format!(
                    "Interface {id:?} has num_queue_pairs {pairs}; it must be 1 to 16"
                )));
            }
        }
        Ok(())
    }

    fn check_consoles(&self) -> Result<(), Fault> {
        let serial = self.serial.as_ref().map(|s| ("serial", s.far_end(), &s.serial_out_path));
        let console = self.console.as_ref().map(|c| ("console", c.mode, &c.path));
        for (name, mode, path) in serial.into_iter().chain(console) {
            let needs = matches!(mode, ConsoleMode::File | ConsoleMode::Socket);
            match path {
                None if needs => return Err(wrong(format!("The {name} in mode {mode:?} needs a path"))),
                Some(_) if !needs => {
                    return Err(wrong(format!("The {name} in mode {mode:?} takes no path")));
                }
                Some(path) if mode == ConsoleMode::Socket => check_socket_path(name, path)?,
                _ => {}
            }
        }
        Ok(())
    }
}

impl super::Serial {
    /// What the far end is, the default filled in.
    pub fn far_end(&self) -> ConsoleMode {
        let implied = if self.serial_out_path.is_some() { ConsoleMode::File } else { ConsoleMode::Stdio };
        self.mode.unwrap_or(implied)
    }
}

fn is_mac(text: &str) -> bool {
    let pair = |pair: &str| pair.len() == 2 && pair.bytes().all(|byte| byte.is_ascii_hexdigit());
    text.split(':').count() == 6 && text.split(':').all(pair)
}

fn check_socket_path(what: &str, path: &std::path::Path) -> Result<(), Fault> {
    let len = path.as_os_str().len();
    if len == 0 || len > SOCKET_PATH_MAX {
        return Err(wrong(format!("The {what} has {len} bytes; a socket path has 1 to {SOCKET_PATH_MAX}")));
    }
    Ok(())
}
