//! The container's control group: its limits, and what it uses.
//!
//! Version 2 only. Where the kernel has no controllers (or the whole hierarchy cannot be
//! mounted) the container runs all the same, without figures; only a limit that was asked for
//! and cannot be set is an error.

use super::syscall::{mount, open};
use guest::protocol::{
    CpuStats, Failure, FailureKind, GuestStats, IoStats, Limits, MemoryStats, NetworkStats, PidStats, Stats,
};
use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

/// The container's control group.
#[derive(Debug)]
pub struct Cgroup {
    mount: PathBuf,
    group: PathBuf,
}

impl Cgroup {
    /// The group `name` in the hierarchy to be mounted at `mount`.
    pub fn new(mount: &Path, name: &str) -> Self {
        Self { mount: mount.into(), group: mount.join(name) }
    }

    /// Mounts the hierarchy and makes the group.
    pub fn make(&self) -> io::Result<()> {
        fs::create_dir_all(&self.mount)?;
        mount("cgroup2", &self.mount, "cgroup2", super::plan::PLAIN, "")?;
        for controller in ["cpu", "memory", "io", "pids", "cpuset"] {
            let _ = fs::write(self.mount.join("cgroup.subtree_control"), format!("+{controller}"));
        }
        match fs::create_dir(&self.group) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }
    }

    /// Removes the group; everything in it has ended.
    pub fn remove(&self) {
        let _ = fs::remove_dir(&self.group);
    }

    /// Sets limits.
    pub fn limit(&self, limits: &Limits) -> Result<(), Failure> {
        let settings = [
            (limits.memory, "memory.max", limits.memory.to_string()),
            (limits.pids, "pids.max", limits.pids.to_string()),
            (limits.cpu_millis, "cpu.max", format!("{} 100000", limits.cpu_millis.saturating_mul(100))),
        ];
        for (value, file, text) in settings {
            if value != 0 {
                fs::write(self.group.join(file), text).map_err(|e| {
                    Failure::new(FailureKind::System, format!("Cannot set {file} to {value}: {e}"))
                })?;
            }
        }
        Ok(())
    }

    /// The group's directory, for processes to be born in. When the container has made
    /// groups of its own within, the group itself takes none any more; its process 1's does.
    pub fn seat(&self, first: Option<i32>) -> Option<OwnedFd> {
        let flags = libc::O_PATH | libc::O_DIRECTORY;
        let divided = fs::read_to_string(self.group.join("cgroup.subtree_control"))
            .is_ok_and(|text| !text.trim().is_empty());
        let directory = match first {
            Some(pid) if divided => {
                let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
                let path = text.lines().find_map(|l| l.strip_prefix("0::/"))?;
                self.mount.join(path)
            }
            _ => self.group.clone(),
        };
        open(&directory, flags).ok()
    }

    /// Times the kernel killed something of the container for want of memory.
    pub fn kills(&self) -> u64 {
        value(&self.text("memory.events"), "oom_kill")
    }

    /// The file that changes with [`Self::kills`].
    pub fn kills_file(&self) -> PathBuf {
        self.group.join("memory.events")
    }

    /// What the container and the machine use.
    pub fn stats(&self) -> Stats {
        Stats {
            cpu: self.cpu(),
            memory: self.memory(),
            io: io_stats(&self.text("io.stat")),
            pids: PidStats { current: self.number("pids.current"), limit: self.number("pids.max") },
            network: network_stats(&proc("net/dev")),
            guest: guest_stats(&proc("meminfo"), &proc("uptime"), &proc("loadavg")),
        }
    }

    fn cpu(&self) -> CpuStats {
        let text = self.text("cpu.stat");
        // SAFETY: sysconf has no memory arguments.
        let online = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
        CpuStats {
            usage_us: value(&text, "usage_usec"),
            user_us: value(&text, "user_usec"),
            system_us: value(&text, "system_usec"),
            throttled_us: value(&text, "throttled_usec"),
            online: u32::try_from(online).unwrap_or(1),
        }
    }

    fn memory(&self) -> MemoryStats {
        let text = self.text("memory.stat");
        MemoryStats {
            current: self.number("memory.current"),
            peak: self.number("memory.peak"),
            limit: self.number("memory.max"),
            anonymous: value(&text, "anon"),
            file: value(&text, "file"),
            inactive_file: value(&text, "inactive_file"),
            kernel: value(&text, "kernel"),
            out_of_memory: self.kills(),
        }
    }

    fn text(&self, file: &str) -> String {
        fs::read_to_string(self.group.join(file)).unwrap_or_default()
    }

    fn number(&self, file: &str) -> Option<u64> {
        self.text(file).trim().parse().ok()
    }
}

fn proc(file: &str) -> String {
    fs::read_to_string(Path::new("/proc").join(file)).unwrap_or_default()
}

/// The number after `key` at the start of a line.
fn value(text: &str, key: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix([' ', ':'])?.split_whitespace().next())
        .and_then(|number| number.parse().ok())
        .unwrap_or(0)
}

/// `253:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6`, a line a device.
fn io_stats(text: &str) -> Vec<IoStats> {
    let line = |line: &str| {
        let (device, rest) = line.split_once(' ')?;
        let field = |key: &str| {
            let number = rest.split(' ').find_map(|f| f.strip_prefix(key)?.strip_prefix('='));
            number.and_then(|n| n.parse().ok()).unwrap_or(0)
        };
        let link = fs::read_link(format!("/sys/dev/block/{device}")).ok();
        let name = link.as_ref().and_then(|l| l.file_name()?.to_str());
        Some(IoStats {
            device: name.unwrap_or(device).into(),
            read_bytes: field("rbytes"),
            write_bytes: field("wbytes"),
            reads: field("rios"),
            writes: field("wios"),
        })
    };
    text.lines().filter_map(line).collect()
}

fn network_stats(text: &str) -> Vec<NetworkStats> {
    let line = |line: &str| {
        let (name, numbers) = line.split_once(':')?;
        let numbers: Vec<u64> = numbers.split_whitespace().map(|n| n.parse().unwrap_or(0)).collect();
        let at = |i: usize| numbers.get(i).copied().unwrap_or(0);
        Some(NetworkStats {
            name: name.trim().into(),
            rx_bytes: at(0),
            rx_packets: at(1),
            rx_errors: at(2),
            rx_dropped: at(3),
            tx_bytes: at(8),
            tx_packets: at(9),
            tx_errors: at(10),
            tx_dropped: at(11),
        })
    };
    text.lines().skip(2).filter_map(line).filter(|n| n.name != "lo").collect()
}

fn guest_stats(memory: &str, uptime: &str, load: &str) -> GuestStats {
    let first =
        |text: &str| text.split_whitespace().next().and_then(|n| n.parse::<f64>().ok()).unwrap_or(0.0);
    let bytes = |key: &str| value(memory, key).saturating_mul(1024);
    GuestStats {
        memory_total: bytes("MemTotal"),
        memory_free: bytes("MemFree"),
        memory_available: bytes("MemAvailable"),
        uptime_ms: (first(uptime) * 1000.0) as u64,
        load: first(load),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_matched_whole() {
        let text = "anon_thp 7\nanon 5\nfile 1\n";
        assert_eq!(value(text, "anon"), 5);
        assert_eq!(value(text, "kernel"), 0);
        assert_eq!(value("MemTotal:       1024 kB\n", "MemTotal"), 1024);
    }

    #[test]
    fn interfaces_are_read_without_loopback() {
        let text = "Inter-|\n face |\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  \
                    eth0:100 2 3 4 0 0 0 0 200 5 6 7 0 0 0 0\n";
        let stats = network_stats(text);
        assert_eq!(stats.len(), 1);
        assert_eq!((stats[0].name.as_str(), stats[0].rx_bytes, stats[0].tx_dropped), ("eth0", 100, 7));
    }

    #[test]
    fn transfers_are_read_by_device() {
        let stats = io_stats("999:99 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n");
        assert_eq!(stats.len(), 1);
        assert_eq!((stats[0].device.as_str(), stats[0].writes), ("999:99", 4));
        assert!(io_stats("nonsense").is_empty());
    }
}
