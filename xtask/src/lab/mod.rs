//! The lab: one command inside a throw-away Linux machine that has a real `/dev/kvm`.
//!
//! Machines that build software often have no hardware virtualization. The lab is QEMU's
//! software emulation of an AMD processor *with SVM*, running Debian's stock kernel with its
//! own `kvm_amd`; its root directory is the host's, read-only under a tmpfs overlay, so every
//! program of the host runs in there, and what it writes is forgotten.
//!
//! ```text
//!   host                                      emulated machine
//!   +---------------------+   9p: / (ro) ,    +------------------------------+
//!   | session  <- frames ---- modules (ro), ---- init (this program, pid 1)  |
//!   | machine: QEMU       |   -w DIR (rw)     |   the command <-> /dev/kvm   |
//!   +---------------------+                   +------------------------------+
//! ```
//!
//! | file | owns |
//! |---|---|
//! | `cache` | kernel and modules, made once |
//! | `initrd`, `order` | what the machine's init is and is told |
//! | `machine` | QEMU's command line and process |
//! | `session` | streams, signals and time limit of one run |
//! | `frame` | the wire between `session` and `init` |
//! | `init` | the inside |

mod cache;
mod frame;
pub mod init;
mod initrd;
mod machine;
mod order;
mod session;
mod terminal;

use std::env;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::host;
use cache::Cache;
pub use initrd::Archive;
use machine::Machine;
use order::Order;
pub use session::Outcome;
use session::{Session, Signals};

/// Exit code when the lab itself failed.
pub const FAILED: u8 = 125;
/// Variables that every command in the lab gets from its caller, beside whole families.
const INHERITED: [&str; 7] = ["PATH", "HOME", "USER", "LANG", "TERM", "COLUMNS", "NO_COLOR"];
/// Families of variables that go along: cargo's and Rust's for tests, ours.
const FAMILIES: [&str; 4] = ["CARGO", "RUST", "NACELLE_", "LLVM_PROFILE_"];

/// Where a command's streams lead.
pub enum Streams {
    /// To and from this program's own standard streams; a terminal stays one.
    Inherited,
    /// Output to ours, standard input empty.
    OutputOnly {
        /// Bytes of standard output that were passed on.
        stdout: Vec<u8>,
    },
    /// Standard input empty, outputs kept.
    Captured {
        /// Bytes of standard output.
        stdout: Vec<u8>,
        /// Bytes of standard error.
        stderr: Vec<u8>,
    },
}

impl Streams {
    fn takes_input(&self) -> bool {
        matches!(self, Self::Inherited)
    }
}

/// A description of the machine to run a command in.
#[derive(Clone, Debug)]
pub struct Lab {
    /// Memory of the machine, in MiB.
    pub memory_mib: u32,
    /// Processors of the machine.
    pub processors: u32,
    /// Let the clock count instructions on one processor, so that times repeat.
    pub count_instructions: bool,
    /// Directories of the host that are writable in the machine, under the same path.
    pub writable: Vec<PathBuf>,
    /// The directory that becomes the machine's root.
    pub root: PathBuf,
    /// Connect the machine to the host's network, outwards only.
    pub network: bool,
    /// Variables for the command, beside those it gets from this program's environment.
    pub environment: Vec<(OsString, OsString)>,
    /// Working directory of the command.
    pub directory: PathBuf,
    /// The longest the whole run may take.
    pub time_limit: Option<Duration>,
}

impl Default for Lab {
    fn default() -> Self {
        Self {
            memory_mib: 4096,
            // All of them run on one processor of the host, see `machine`.
            processors: 1,
            count_instructions: false,
            writable: Vec::new(),
            root: PathBuf::from("/"),
            network: false,
            environment: Vec::new(),
            directory: env::current_dir().unwrap_or_else(|_| PathBuf::from("/")),
            time_limit: None,
        }
    }
}

impl Lab {
    /// Runs a command with this program's own streams; its exit code, 128+signal when a signal
    /// ended it, 126 or 127 when it cannot be run, 124 when the time limit ended it.
    ///
    /// An error means that the lab failed, not the command.
    pub fn run(&self, command: &[OsString]) -> Result<u8> {
        self.run_with(command, &mut Streams::Inherited).map(|outcome| outcome.code)
    }

    /// The same with a choice of streams, and with the time that the machine took to start.
    pub fn run_with(&self, command: &[OsString], streams: &mut Streams) -> Result<Outcome> {
        let cache = Cache::ready()?;
        let interactive = streams.takes_input() && terminal::is_interactive();
        let order = self.order(command, interactive)?;
        session::flush_own_output();
        let signals = Signals::block()?;
        let machine = Machine::start(self, &cache, &order)?;
        Session::new(machine, signals, streams, self, interactive)?.run()
    }

    fn order(&self, command: &[OsString], interactive: bool) -> Result<Order> {
        let mut shares = Vec::new();
        for (number, path) in self.writable.iter().enumerate() {
            let path = std::fs::canonicalize(path)
                .with_context(|| format!("The lab cannot share {}", path.display()))?;
            shares.push((format!("w{number}"), path.into_os_string()));
        }
        // A directory before those in it, or mounting it would hide them.
        shares.sort_by(|a, b| a.1.cmp(&b.1));
        Ok(Order {
            command: command.to_vec(),
            environment: self.full_environment(),
            directory: self.directory.clone().into_os_string(),
            network: self.network,
            terminal: interactive.then(terminal::size),
            shares,
        })
    }

    fn full_environment(&self) -> Vec<(OsString, OsString)> {
        let mut variables: Vec<_> = env::vars_os().filter(|(name, _)| is_inherited(name)).collect();
        variables.push(("NACELLE_LAB".into(), "1".into()));
        variables.extend(self.environment.iter().cloned());
        variables
    }
}

fn is_inherited(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    INHERITED.contains(&&*name)
        || name.to_ascii_lowercase().ends_with("_proxy")
        || FAMILIES.iter().any(|family| name.starts_with(family))
}

/// Turns the `-e NAME[=VALUE]` of a command line into a variable; without a value it is the
/// caller's, and one the caller lacks is left out.
pub fn variable(argument: &str) -> Option<(OsString, OsString)> {
    match argument.split_once('=') {
        Some((name, value)) => Some((name.into(), value.into())),
        None => env::var_os(argument).map(|value| (argument.into(), value)),
    }
}

/// Runs `command` in the lab for a cargo runner: a test binary with its arguments, standing in
/// its package.
pub fn run_test(command: &[OsString]) -> Result<u8> {
    host::end_with_parent()?;
    let lab = Lab {
        memory_mib: host::spare_memory_mib().min(9216),
        time_limit: Some(TEST_TIME_LIMIT),
        ..Lab::default()
    };
    let mut streams = Streams::OutputOnly { stdout: Vec::new() };
    let code = lab.run_with(command, &mut streams)?.code;
    if code == 0 {
        return Ok(code);
    }
    let Streams::OutputOnly { stdout } = &mut streams else { return Ok(code) };
    let failed = failed(&String::from_utf8_lossy(stdout));
    eprintln!(
        "lab: {} failed with code {code}. Time passes unevenly in the emulation, so they are run once \
         more; what fails twice is a failure.",
        if failed.is_empty() { "these tests".to_owned() } else { failed.join(", ") }
    );
    stdout.clear();
    let exact = (!failed.is_empty()).then(|| "--exact".into());
    let again: Vec<OsString> =
        command.iter().cloned().chain(exact).chain(failed.into_iter().map(Into::into)).collect();
    lab.run_with(&again, &mut streams).map(|outcome| outcome.code)
}

/// The tests that failed, as a test binary lists them before its summary; none if it did not come
/// so far.
fn failed(output: &str) -> Vec<String> {
    let Some((_, list)) = output.rsplit_once("\nfailures:\n") else { return Vec::new() };
    let names = list.lines().map_while(|line| line.strip_prefix("    "));
    names.map(|name| name.trim().to_owned()).collect()
}

/// The longest that one test binary may take in the lab.
const TEST_TIME_LIMIT: Duration = Duration::from_secs(30 * 60);

/// Makes sure that the lab can start, so that the first run does not seem to hang.
pub fn prepare() -> Result<()> {
    host::need("the lab", &host::LAB_PACKAGES)?;
    Cache::ready().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tests_that_failed_are_those_of_the_last_list() {
        let output = "running 2 tests\ntest a ... ok\n\nfailures:\n\n---- b::c stdout ----\nfailures:\n    x\n\n\
                      failures:\n    b::c\n    d\n\ntest result: FAILED. 1 passed\n";
        assert_eq!(failed(output), ["b::c", "d"]);
        assert!(failed("running 2 tests\ntest a ... ").is_empty());
    }

    #[test]
    fn a_variable_without_value_is_the_callers_and_an_unknown_one_is_none() {
        assert_eq!(variable("A=b=c"), Some(("A".into(), "b=c".into())));
        assert_eq!(variable("A="), Some(("A".into(), "".into())));
        assert!(variable("PATH").is_some());
        assert_eq!(variable("NO_SUCH_VARIABLE_HERE"), None);
    }

    #[test]
    fn the_environment_says_that_this_is_a_lab_and_hides_the_rest() {
        let lab = Lab { environment: vec![("X".into(), "1".into())], ..Lab::default() };
        let names: Vec<_> = lab.full_environment().into_iter().map(|(name, _)| name).collect();
        assert!(names.contains(&"NACELLE_LAB".into()) && names.contains(&"X".into()));
        assert!(names.iter().all(|name| name == "X" || is_inherited(name)));
    }

    #[test]
    fn an_outer_share_is_mounted_before_an_inner_one() {
        let outer = tempfile::tempdir().unwrap();
        let inner = outer.path().join("inner");
        std::fs::create_dir(&inner).unwrap();
        let lab = Lab { writable: vec![inner.clone(), outer.path().to_owned()], ..Lab::default() };
        let order = lab.order(&["true".into()], false).unwrap();
        assert!(order.shares[0].1.len() < order.shares[1].1.len());
    }
}
