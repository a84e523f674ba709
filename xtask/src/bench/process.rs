//! What a process that runs has cost so far, and what it keeps.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result, bail};

/// Microseconds that all threads of a process have run, guests and threads that are gone
/// included.
pub fn cpu(process: u32) -> Result<f64> {
    let process = libc::pid_t::try_from(process)?;
    let (mut clock, mut time) = (0, libc::timespec { tv_sec: 0, tv_nsec: 0 });
    // SAFETY: both calls fill what they are given and keep nothing.
    let answers = unsafe {
        (libc::clock_getcpuclockid(process, &raw mut clock), libc::clock_gettime(clock, &raw mut time))
    };
    if answers != (0, 0) {
        bail!("The kernel does not tell how long process {process} ran");
    }
    Ok(time.tv_sec as f64 * 1e6 + time.tv_nsec as f64 / 1e3)
}

/// Page faults so far that needed no reading, and those that did.
pub fn faults(process: u32) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{process}/stat"))?;
    faults_of(&text).context("The kernel does not tell how often a process faulted")
}

fn faults_of(stat: &str) -> Option<f64> {
    // The name may hold anything but ends with the last parenthesis.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |field: usize| fields.get(field)?.parse::<f64>().ok();
    Some(number(7)? + number(9)?)
}

/// What a process keeps of memory in KiB, by what it is for.
pub fn memory(process: u32, guest_kib: f64) -> Result<BTreeMap<String, f64>> {
    Ok(memory_of(&fs::read_to_string(format!("/proc/{process}/smaps"))?, guest_kib))
}

/// Private KiB of mappings, by the kind of what is mapped; `guest_kib` is the size of guest
/// memory, and what is at least half of that belongs to it.
fn memory_of(smaps: &str, guest_kib: f64) -> BTreeMap<String, f64> {
    let mut sums = BTreeMap::new();
    let (mut kind, mut name) = ("", "");
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(first), rest) = (words.next(), words.clone()) else { continue };
        if !first.ends_with(':') {
            name = rest.clone().nth(4).unwrap_or("");
            continue;
        }
        let Some(value) = words.next().and_then(|word| word.parse::<f64>().ok()) else { continue };
        match first {
            "Size:" => {
                kind = match name {
                    _ if value >= guest_kib / 2.0 && value <= guest_kib => "guest memory",
                    "[heap]" => "heap",
                    "[stack]" => "stack",
                    "" => "anonymous",
                    _ if name.starts_with('[') => "kernel's",
                    _ if name.contains("kvm") => "KVM's",
                    _ => "files",
                };
            }
            "Private_Clean:" | "Private_Dirty:" => {
                *sums.entry(format!("{kind}, private")).or_default() += value;
            }
            "Pss:" => *sums.entry("proportional share".to_owned()).or_default() += value,
            _ => {}
        }
    }
    sums.retain(|_, value: &mut f64| *value > 0.0);
    sums
}

/// `/proc/meminfo`, in KiB.
pub fn host_memory() -> Result<BTreeMap<String, f64>> {
    Ok(host_memory_of(&fs::read_to_string("/proc/meminfo")?))
}

fn host_memory_of(meminfo: &str) -> BTreeMap<String, f64> {
    let field = |line: &str| {
        let (name, rest) = line.split_once(':')?;
        Some((name.to_owned(), rest.split_whitespace().next()?.parse().ok()?))
    };
    meminfo.lines().filter_map(field).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_runs_is_read() {
        let own = std::process::id();
        assert!(cpu(own).unwrap() > 0.0 && faults(own).unwrap() > 0.0);
        assert!(memory(own, 1e9).unwrap()["proportional share"] > 0.0);
        assert!(host_memory().unwrap()["MemAvailable"] > 0.0);
    }

    #[test]
    fn faults_are_counted_behind_any_name() {
        assert_eq!(faults_of("7 (a) b) S 1 2 3 4 5 6 70 8 5 10"), Some(75.0));
        assert_eq!(faults_of("7 (a"), None);
    }

    #[test]
    fn memory_is_sorted_by_what_it_is_for() {
        let smaps = "00-10 rw-p 0 0:0 0 [heap]\nSize: 100 kB\nPss: 4 kB\nPrivate_Dirty: 4 kB\n\
                     10-20 rw-p 0 0:0 9 /dev/shm/memory\nSize: 65536 kB\nPss: 9 kB\nPrivate_Dirty: 8 kB\n\
                     20-30 r--p 0 0:0 9 /bin/program\nSize: 50 kB\nPss: 1 kB\nPrivate_Clean: 0 kB\n";
        let sums = memory_of(smaps, 65536.0);
        let expected = [("guest memory, private", 8.0), ("heap, private", 4.0), ("proportional share", 14.0)];
        assert_eq!(sums, expected.map(|(name, kib)| (name.to_owned(), kib)).into());
    }
}
