//! Values on the command line: sizes, signals, disks, taps, environment.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::failure::{Failure, Outcome};

/// `--disk FILE[:PATH][:ro]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DiskArg {
    /// The raw disk file.
    pub file: PathBuf,
    /// Where it is mounted in the container, if it is.
    pub path: Option<String>,
    /// Writes are refused.
    pub read_only: bool,
}

/// `--tap NAME[,ip=..][,gw=..][,mac=..][,mtu=..]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TapArg {
    /// The tap device.
    pub name: String,
    /// Addresses with prefix length.
    pub addresses: Vec<String>,
    /// Default routes.
    pub gateways: Vec<String>,
    /// The guest's hardware address.
    pub mac: Option<String>,
    /// Largest packet.
    pub mtu: Option<u16>,
}

/// `--tmpfs PATH[:OPTIONS]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TmpfsArg {
    /// Where it is mounted.
    pub path: String,
    /// Most bytes; 0 for the default.
    pub size: u64,
    /// Permission bits; 0 for the default.
    pub mode: u32,
    /// Programs cannot be run from it.
    pub noexec: bool,
    /// Writes are refused.
    pub read_only: bool,
}

/// A size with a unit, in bytes: `512M`, `2G`, `1.5g`, `4096k`, `100b`. Units are powers of
/// 1024. A bare number is refused, because nobody agrees what it means.
pub fn bytes(word: &str) -> Result<u64, String> {
    let wrong = || format!("{word:?} is no size; give a number with a unit, as in 512M or 2G");
    let split = word.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(wrong)?;
    let (number, unit) = word.split_at(split);
    let shift = match unit.to_ascii_lowercase().trim_end_matches("ib").trim_end_matches('b') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(wrong()),
    };
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let bytes = number * (1u64 << shift) as f64;
    if bytes.is_finite() && (0.0..9.0e18).contains(&bytes) { Ok(bytes as u64) } else { Err(wrong()) }
}

/// A size with a unit, in whole mebibytes.
pub fn mebibytes(word: &str) -> Result<u64, String> {
    match bytes(word)? >> 20 {
        0 => Err(format!("{word:?} is less than 1M")),
        mib => Ok(mib),
    }
}

/// `NAME=VALUE` as it is; `NAME` with this process's value, or nothing if it has none.
pub fn env(word: &str) -> Option<String> {
    if word.contains('=') {
        return Some(word.to_owned());
    }
    std::env::var(word).ok().map(|value| format!("{word}={value}"))
}

/// Variables from a file: one a line, `#` begins a comment line.
pub fn env_file(path: &Path) -> Outcome<Vec<String>> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| Failure::because(format!("Environment file {} cannot be read", path.display()), &e))?;
    let lines = text.lines().map(str::trim_start).filter(|l| !l.is_empty() && !l.starts_with('#'));
    Ok(lines.filter_map(env).collect())
}

/// A signal by number or name, with or without `SIG`.
pub fn signal(word: &str) -> Option<i32> {
    const NAMES: [(&str, i32); 20] = [
        ("HUP", libc::SIGHUP),
        ("INT", libc::SIGINT),
        ("QUIT", libc::SIGQUIT),
        ("ILL", libc::SIGILL),
        ("TRAP", libc::SIGTRAP),
        ("ABRT", libc::SIGABRT),
        ("BUS", libc::SIGBUS),
        ("FPE", libc::SIGFPE),
        ("KILL", libc::SIGKILL),
        ("USR1", libc::SIGUSR1),
        ("SEGV", libc::SIGSEGV),
        ("USR2", libc::SIGUSR2),
        ("PIPE", libc::SIGPIPE),
        ("ALRM", libc::SIGALRM),
        ("TERM", libc::SIGTERM),
        ("CHLD", libc::SIGCHLD),
        ("CONT", libc::SIGCONT),
        ("STOP", libc::SIGSTOP),
        ("TSTP", libc::SIGTSTP),
        ("WINCH", libc::SIGWINCH),
    ];
    let upper = word.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(offset) = name.strip_prefix("RTMIN+").and_then(|n| n.parse::<i32>().ok()) {
        return (0..=30).contains(&offset).then_some(34 + offset);
    }
    let number = name.parse().ok().filter(|n| (1..=64).contains(n));
    number.or_else(|| NAMES.iter().find(|(known, _)| *known == name).map(|(_, number)| *number))
}

/// Parses `--disk`.
pub fn disk(word: &str) -> Result<DiskArg, String> {
    let (rest, read_only) = match word.strip_suffix(":ro") {
        Some(rest) => (rest, true),
        None => (word.strip_suffix(":rw").unwrap_or(word), false),
    };
    let (file, path) = match rest.rsplit_once(":/") {
        Some((file, path)) => (file, Some(format!("/{path}"))),
        None => (rest, None),
    };
    if file.is_empty() {
        return Err("a disk is FILE[:PATH][:ro]; the file is missing".to_owned());
    }
    Ok(DiskArg { file: file.into(), path, read_only })
}

/// Parses `--tap`.
pub fn tap(word: &str) -> Result<TapArg, String> {
    let mut parts = word.split(',');
    let mut tap = TapArg { name: parts.next().unwrap_or_default().to_owned(), ..TapArg::default() };
    if tap.name.is_empty() || tap.name.len() > 15 {
        return Err(format!("{:?} is no name of a tap device; it has 1 to 15 characters", tap.name));
    }
    for part in parts {
        let known = "ip=, gw=, mac= and mtu= may follow the name";
        let (key, value) = part.split_once('=').ok_or_else(|| format!("{part:?} is not known; {known}"))?;
        match key {
            "ip" => tap.addresses.push(value.to_owned()),
            "gw" => tap.gateways.push(value.to_owned()),
            "mac" => tap.mac = Some(value.to_owned()),
            "mtu" => {
                let mtu = value.parse().map_err(|_| format!("mtu is {value:?}; it is 68 to 65535"))?;
                tap.mtu = Some(mtu);
            }
            _ => return Err(format!("{key:?} is not known; {known}")),
        }
    }
    Ok(tap)
}

/// Parses `--tmpfs`.
pub fn tmpfs(word: &str) -> Result<TmpfsArg, String> {
    let (path, options) = word.split_once(':').unwrap_or((word, ""));
    if !path.starts_with('/') {
        return Err(format!("{path:?} is no absolute path"));
    }
    let mut tmpfs = TmpfsArg { path: path.to_owned(), ..TmpfsArg::default() };
    for option in options.split(',').filter(|o| !o.is_empty()) {
        match option.split_once('=').unwrap_or((option, "")) {
            ("size", size) => tmpfs.size = bytes(size)?,
            ("mode", mode) => {
                let wrong = || format!("mode is {mode:?}; it is octal, as in 1777");
                tmpfs.mode = u32::from_str_radix(mode, 8).ok().filter(|m| *m <= 0o7777).ok_or_else(wrong)?;
            }
            ("noexec", "") => tmpfs.noexec = true,
            ("exec" | "rw", "") => {}
            ("ro", "") => tmpfs.read_only = true,
            _ => return Err(format!("{option:?} is not known; size=, mode=, noexec and ro are")),
        }
    }
    Ok(tmpfs)
}

/// Memory of the host, in mebibytes.
pub fn host_memory_mib() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"));
    let kib: Option<u64> = line.and_then(|l| l.trim().trim_end_matches("kB").trim().parse().ok());
    kib.map_or(u64::MAX, |kib| kib >> 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_need_units() {
        for (word, expected) in
            [("512M", 512 << 20), ("2g", 2 << 30), ("1.5K", 1536), ("7b", 7), ("1GiB", 1 << 30)]
        {
            assert_eq!(bytes(word), Ok(expected), "{word}");
        }
        for word in ["512", "", "M", "-1M", "1X", "1e400G", "1..2M"] {
            assert!(bytes(word).unwrap_err().contains("512M or 2G"), "{word}");
        }
        assert!(mebibytes("4k").is_err());
    }

    #[test]
    fn signals_have_names_and_numbers() {
        for (word, expected) in [("TERM", 15), ("sigkill", 9), ("3", 3), ("SIGRTMIN+1", 35)] {
            assert_eq!(signal(word), Some(expected), "{word}");
        }
        for word in ["0", "65", "FOO", "-1", ""] {
            assert_eq!(signal(word), None, "{word}");
        }
    }

    #[test]
    fn disks_taps_and_tmpfs_say_what_is_wrong() {
        let got = disk("/a:b.img:/data:ro").unwrap();
        assert_eq!((got.file, got.path.as_deref(), got.read_only), ("/a:b.img".into(), Some("/data"), true));
        assert_eq!(disk("x.img").unwrap().path, None);
        let got = tap("tap0,ip=10.0.0.2/24,gw=10.0.0.1,mtu=1400").unwrap();
        assert_eq!((got.addresses.len(), got.mtu), (1, Some(1400)));
        assert!(tap("tap0,x=1").unwrap_err().contains("gw="));
        assert!(tap("").is_err());
        let got = tmpfs("/run:size=64M,mode=700,noexec").unwrap();
        assert_eq!((got.size, got.mode, got.noexec), (64 << 20, 0o700, true));
        assert!(tmpfs("run").unwrap_err().contains("absolute"));
        assert!(tmpfs("/run:speed=9").unwrap_err().contains("size="));
    }
}
