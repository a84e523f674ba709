//! `nacelle cpu`: what hosts' processors can do, and what several of them have in common.
//!
//! ```text
//!   nacelle cpu dump > a.json                  on each host of a fleet
//!   nacelle cpu baseline a.json b.json         a CPU template: cpu-config of machines that move
//!   nacelle cpu check SNAPSHOT [--host a.json] whether a machine that was saved can run there
//! ```
//!
//! The records are read like anything that came from another host: bounded and checked.

use std::{
    fs::OpenOptions,
    io::Read,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use arch::needs::{self, BaselineError, Host, Loss, Missing, Needs};
use clap::{Args as ClapArgs, Subcommand};

use super::{
    failure::{Failure, Outcome, doing},
    output,
};
use crate::{
    snapshot::{Search, Snapshot},
    vm,
};

/// The most bytes of a host's record.
const RECORD_MAX: u64 = 1 << 20;
/// The most hosts of one baseline.
const HOSTS_MAX: usize = 4096;

/// Compare processors of hosts, and make templates for several
#[derive(Debug, ClapArgs)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Print what this host's processors can do, as JSON
    Dump(Dump),
    /// Print the CPU template with which machines run on all of these hosts
    Baseline(Baseline),
    /// Say what a host lacks to run the machine of a snapshot
    Check(Check),
}

#[derive(Debug, ClapArgs)]
struct Dump {
    /// Write it to this file
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

#[derive(Debug, ClapArgs)]
struct Baseline {
    /// Write it to this file
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Do not say what each host gives up
    #[arg(short, long)]
    quiet: bool,
    /// What 'nacelle cpu dump' printed on each host
    #[arg(required = true, value_name = "HOST.json")]
    hosts: Vec<PathBuf>,
}

#[derive(Debug, ClapArgs)]
struct Check {
    /// Another host than this, by what 'nacelle cpu dump' printed there
    #[arg(long, value_name = "HOST.json")]
    host: Option<PathBuf>,
    /// The snapshot
    snapshot: PathBuf,
}

/// Does what was asked.
pub fn run(args: &Args) -> Outcome<u8> {
    match &args.action {
        Action::Dump(args) => {
            put(&json(&this_host()?)?, args.output.as_deref())?;
            Ok(0)
        }
        Action::Baseline(args) => baseline(args),
        Action::Check(args) => check(args),
    }
}

fn baseline(args: &Baseline) -> Outcome<u8> {
    if args.hosts.len() > HOSTS_MAX {
        return Err(Failure::new(format!(
            "A baseline is of at most {HOSTS_MAX} hosts, not {}",
            args.hosts.len()
        )));
    }
    let hosts = args.hosts.iter().map(|path| read(path)).collect::<Outcome<Vec<Host>>>()?;
    let made = needs::baseline(&hosts).map_err(|e| {
        let which = match &e {
            BaselineError::Vendors { index, .. } | BaselineError::Cpuid { index, .. } => *index,
            _ => 0,
        };
        let path = args.hosts.get(which).map(|p| p.display().to_string()).unwrap_or_default();
        Failure::because(format!("{path} has nothing in common with the other hosts"), &e)
    })?;
    let text = json(&vm::cpu::config(&made.template))?;
    put(&text, args.output.as_deref())?;
    if args.quiet {
        return Ok(0);
    }
    for ((path, host), losses) in args.hosts.iter().zip(&hosts).zip(&made.losses) {
        eprintln!("{} ({}): {}", output::clean(&path.display().to_string()), host.model(), told(losses));
    }
    if !made.clocks_agree {
        eprintln!(
            "nacelle: The hosts' TSCs run at different frequencies and not all can scale them: machines start \
             on each with this template, but cannot be moved between all of them"
        );
    }
    Ok(0)
}

/// What a host gives up, in a line.
fn told(losses: &[Loss]) -> String {
    let features: Vec<&str> = losses
        .iter()
        .filter_map(|l| if let Loss::Feature(name) = l { Some(name.as_str()) } else { None })
        .collect();
    let mut parts = Vec::new();
    if !features.is_empty() {
        parts.push(format!("gives up {}", features.join(" ")));
    }
    for loss in losses {
        match loss {
            Loss::Amount { what, from, to } => parts.push(format!("shows {to} {what} instead of {from}")),
            Loss::Flaw(name) => parts.push(format!("admits {name}")),
            _ => {}
        }
    }
    if parts.is_empty() { "gives up nothing".to_owned() } else { parts.join("; ") }
}

fn check(args: &Check) -> Outcome<u8> {
    let snapshot = Snapshot::open(&args.snapshot, &Search::default())?;
    let needs: Needs = snapshot.manifest().cpu.read().map_err(|e| {
        Failure::because(format!("{} does not say what it needs of the CPU", args.snapshot.display()), &e)
    })?;
    let host = match &args.host {
        Some(path) => read(path)?,
        None => this_host()?,
    };
    let missing = needs
        .missing(&host)
        .map_err(|e| Failure::because("The host's CPUID cannot be used".to_owned(), &e))?;
    let lines: String = missing.iter().map(|m: &Missing| format!("{m}\n")).collect();
    output::print(&lines)?;
    Ok(u8::from(!missing.is_empty()))
}

/// This host, clock and all.
fn this_host() -> Outcome<Host> {
    let asked = |e: &(dyn std::error::Error + 'static)| Failure::because("This host cannot be asked", e);
    let kvm = vm::kvm::open().map_err(|e| asked(&e))?;
    let host = Host::of(&kvm).map_err(|e| asked(&e))?;
    let machine = vm::kvm::create_vm(&kvm).map_err(|e| asked(&e))?;
    let vcpu = machine.create_vcpu(0).map_err(|e| asked(&vm::kvm::call("create a vCPU")(e)))?;
    Ok(host.with_tsc(&vcpu))
}

/// Reads a host's record; whatever else `path` may be, this does not wait for it.
fn read(path: &Path) -> Outcome<Host> {
    let shown = path.display();
    let open = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    let file = doing(open, || format!("{shown} cannot be read"))?;
    let mut text = Vec::new();
    doing(file.take(RECORD_MAX + 1).read_to_end(&mut text), || format!("{shown} cannot be read"))?;
    if text.len() as u64 > RECORD_MAX {
        return Err(Failure::new(format!("{shown} is larger than {RECORD_MAX} bytes")));
    }
    serde_json::from_slice(&text)
        .map_err(|e| Failure::because(format!("{shown} is not what 'nacelle cpu dump' prints"), &e))
}

fn json(value: &impl serde::Serialize) -> Outcome<String> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| Failure::because("The answer cannot be written as JSON", &e))?;
    Ok(text + "\n")
}

fn put(text: &str, file: Option<&Path>) -> Outcome<()> {
    match file {
        None => output::print(text),
        Some(path) => doing(std::fs::write(path, text), || format!("{} cannot be written", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use api::spec::CpuConfig;
    use clap::Parser;
    use serde_json::{Value, json};

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn cpu(dir: &Path, words: &str) -> Outcome<u8> {
        let words = words.replace('@', dir.to_str().unwrap());
        run(&Line::try_parse_from(std::iter::once("cpu").chain(words.split(' '))).unwrap().args)
    }

    /// A small processor, with or without AVX-512.
    fn host(maker: [&str; 3], ebx: &str) -> Value {
        let row = |leaf: &str, [eax, ebx, ecx, edx]: [&str; 4]| json!({ "leaf": leaf, "subleaf": "0x0", "flags": 0, "eax": eax, "ebx": ebx, "ecx": ecx, "edx": edx });
        let vendor = if maker[0] == "0x756e6547" { "GenuineIntel" } else { "AuthenticAMD" };
        json!({ "format": 1, "vendor": vendor, "model": "A processor", "tsc_khz": 2_500_000, "tsc_scaling": true,
            "cpuid": [
                row("0x0", ["0x7", maker[0], maker[2], maker[1]]),
                row("0x1", ["0x506e3", "0x800", "0x80000001", "0x78bfbff"]),
                row("0x7", ["0x0", ebx, "0x0", "0x0"]),
                row("0x80000008", ["0x3027", "0x0", "0x0", "0x0"]),
            ],
            "msrs": [], "registers": ["0x10"] })
    }

    const INTEL: [&str; 3] = ["0x756e6547", "0x49656e69", "0x6c65746e"];
    const AMD: [&str; 3] = ["0x68747541", "0x69746e65", "0x444d4163"];

    fn write(dir: &Path, name: &str, value: &Value) {
        std::fs::write(dir.join(name), value.to_string()).unwrap();
    }

    #[test]
    fn a_baseline_is_a_template_that_machines_take() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        write(dir, "a.json", &host(INTEL, "0x10021"));
        write(dir, "b.json", &host(INTEL, "0x21"));
        assert_eq!(cpu(dir, "baseline @/a.json @/b.json --output @/template.json"), Ok(0));
        let text = std::fs::read_to_string(dir.join("template.json")).unwrap();
        let config = CpuConfig::from_json(&dir.join("template.json"), &text).unwrap();
        let [change] = config.cpuid_modifiers.as_slice() else { panic!("{text}") };
        let bitmap = change.modifiers.first().unwrap().bitmap;
        assert_eq!((change.leaf, change.modifiers.len()), (7, 1));
        assert_eq!((bitmap.mask, bitmap.value), (1 << 16, 0));
    }

    #[test]
    fn makers_do_not_mix_and_files_that_are_no_hosts_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        write(dir, "a.json", &host(INTEL, "0x21"));
        write(dir, "b.json", &host(AMD, "0x21"));
        let refused = cpu(dir, "baseline -q @/a.json @/b.json").unwrap_err().to_string();
        assert!(refused.contains("b.json") && refused.contains("between makers"), "{refused}");
        std::fs::write(dir.join("c.json"), "{}").unwrap();
        let refused = cpu(dir, "baseline -q @/a.json @/c.json").unwrap_err().to_string();
        assert!(refused.contains("c.json is not what 'nacelle cpu dump' prints"), "{refused}");
        std::fs::write(dir.join("d.json"), " ".repeat((1 << 20) + 1)).unwrap();
        let refused = cpu(dir, "baseline -q @/d.json").unwrap_err().to_string();
        assert!(refused.contains("larger than"), "{refused}");
        assert!(cpu(dir, "baseline -q @/none.json").unwrap_err().to_string().contains("cannot be read"));
    }

    #[test]
    fn what_is_given_up_is_told_in_a_line() {
        let lost = [
            Loss::Feature("avx512f".into()),
            Loss::Feature("pku".into()),
            Loss::Amount { what: "physical address bits", from: 46, to: 39 },
            Loss::Flaw("rsba".into()),
        ];
        let line = "gives up avx512f pku; shows 39 physical address bits instead of 46; admits rsba";
        assert_eq!((told(&lost), told(&[])), (line.to_owned(), "gives up nothing".to_owned()));
    }
}
