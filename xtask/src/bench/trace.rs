//! Exits of a machine, from the kernel's trace events of KVM.
//!
//! `kvm_exit` says why a guest was left, `kvm_userspace_exit` that the monitor was asked, and
//! `kvm_mmio` at which address; the port of an access is in the first event's information
//! word on both makes of processor. So each exit that reached the monitor gets a name that
//! says which register cost it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::host;

const TRACING: &str = "/sys/kernel/tracing";
const EVENTS: [&str; 3] = ["kvm_exit", "kvm_userspace_exit", "kvm_mmio"];

/// Exits of one machine from its start to its end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exits {
    /// All, by reason.
    pub all: BTreeMap<String, u64>,
    /// Those handed to the monitor, by what was accessed.
    pub userspace: BTreeMap<String, u64>,
}

impl Exits {
    /// How many in all.
    pub fn total(&self) -> u64 {
        self.all.values().sum()
    }

    /// How many were handed to the monitor.
    pub fn handed(&self) -> u64 {
        self.userspace.values().sum()
    }
}

/// Does `work` while exits are recorded.
pub fn record(work: impl FnOnce() -> Result<()>) -> Result<Exits> {
    let tracing = Path::new(TRACING);
    if !tracing.join("trace").exists() {
        host::run(Command::new("mount").args(["-t", "tracefs", "tracefs", TRACING]))?;
    }
    let put = |name: &str, text: &str| {
        fs::write(tracing.join(name), text).with_context(|| format!("Cannot write {TRACING}/{name}"))
    };
    let switch =
        |value: &str| EVENTS.iter().try_for_each(|event| put(&format!("events/kvm/{event}/enable"), value));
    put("buffer_size_kb", "32768")?;
    put("trace", "")?;
    switch("1")?;
    let done = work();
    switch("0")?;
    done?;
    let text = fs::read(tracing.join("trace"))?;
    put("trace", "")?;
    let exits = parse(&String::from_utf8_lossy(&text));
    if exits.total() == 0 {
        bail!("The kernel recorded no exits at all");
    }
    Ok(exits)
}

fn parse(text: &str) -> Exits {
    let mut exits = Exits::default();
    let (mut reason, mut information, mut access) = (String::new(), 0, None);
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        if let Some((_, event)) = line.split_once(": kvm_exit: ") {
            reason = word_after(event, "reason ").to_owned();
            information = hexadecimal(word_after(event, "info1 "));
            access = None;
            *exits.all.entry(reason.clone()).or_default() += 1;
        } else if let Some((_, event)) = line.split_once(": kvm_mmio: ") {
            let verb = if event.contains("write") { "write" } else { "read" };
            access = Some(format!("mmio {verb} {:#x}", hexadecimal(word_after(event, "gpa "))));
        } else if let Some((_, event)) = line.split_once(": kvm_userspace_exit: ") {
            let what = word_after(event, "reason ");
            let name = match (what, access.take()) {
                ("KVM_EXIT_IO", _) => format!("port {:#x}", information >> 16 & 0xffff),
                ("KVM_EXIT_MMIO", Some(access)) => access,
                (what, _) if event.contains("restart") => format!("{what}, interrupted"),
                (what, _) => format!("{what} after {reason}"),
            };
            *exits.userspace.entry(name).or_default() += 1;
        }
    }
    exits
}

fn word_after<'a>(text: &'a str, label: &str) -> &'a str {
    let rest = text.split_once(label).map_or("", |(_, rest)| rest);
    rest.split_whitespace().next().unwrap_or_default()
}

fn hexadecimal(word: &str) -> u64 {
    u64::from_str_radix(word.trim_start_matches("0x"), 16).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "# tracer: nop
 vcpu0-1 [000] ..... 1.0: kvm_exit: vcpu 0 reason io rip 0x1 info1 0x0000000000710220 info2 0x0
 vcpu0-1 [000] ..... 1.1: kvm_userspace_exit: reason KVM_EXIT_IO (2)
 vcpu0-1 [000] ..... 1.2: kvm_exit: vcpu 0 reason npf rip 0x1 info1 0x000000010000000d info2 0xc0001070
 vcpu0-1 [000] ..... 1.3: kvm_mmio: mmio write len 4 gpa 0xc0001070 val 0x1
 vcpu0-1 [000] ..... 1.4: kvm_userspace_exit: reason KVM_EXIT_MMIO (6)
 vcpu0-1 [000] ..... 1.5: kvm_exit: vcpu 0 reason cpuid rip 0x1 info1 0x0 info2 0x0
 vcpu0-1 [000] ..... 1.6: kvm_exit: vcpu 0 reason shutdown rip 0x1 info1 0x0 info2 0x0
 vcpu0-1 [000] ..... 1.7: kvm_userspace_exit: reason KVM_EXIT_SHUTDOWN (8)
";

    #[test]
    fn each_exit_to_the_monitor_has_the_register_that_cost_it() {
        let exits = parse(TRACE);
        assert_eq!((exits.total(), exits.handed()), (4, 3));
        let names: Vec<&str> = exits.userspace.keys().map(String::as_str).collect();
        assert_eq!(names, ["KVM_EXIT_SHUTDOWN after shutdown", "mmio write 0xc0001070", "port 0x71"]);
        assert_eq!(exits.all["cpuid"], 1);
    }
}
