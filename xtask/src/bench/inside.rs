//! The half of a benchmark that runs where guests do: in the lab, counting instructions, or, on a
//! host with hardware virtualization, right here.
//!
//! ```text
//!   made outside:  plan ──► plan.json ──► lab ──► this program, --inside plan.json ──► measure
//!   read outside:  found ◄────────────── JSON on standard output ◄────────────────────────┘
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{
    Arguments,
    report::{self, Program},
};
use crate::{build, host, lab};

/// Where the measured files are copied to, so that no reading of a disk or of the lab's shared
/// directories is counted.
pub const PLACE: &str = "/dev/shm/nacelle-bench";

/// A monitor that is measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Monitor {
    /// What the figures call it.
    pub name: String,
    /// What it says of itself.
    pub version: String,
    /// Its program, which is copied to [`PLACE`], and its arguments.
    pub command: Vec<String>,
}

impl From<&Monitor> for Program {
    fn from(monitor: &Monitor) -> Program {
        let Monitor { name, version, command } = monitor.clone();
        Program { name, version, command }
    }
}

/// A file and where it is copied to.
pub type Copy = (PathBuf, PathBuf);

/// The peers of the command line with `arguments` behind each one's program, and what to copy.
pub fn peers(of: &Arguments, arguments: &str) -> Result<(Vec<Monitor>, Vec<Copy>)> {
    let (mut monitors, mut copies) = (Vec::new(), Vec::new());
    for peer in &of.peer {
        let (name, path) = peer.split_once('=').with_context(|| format!("--peer {peer}: no NAME=PROGRAM"))?;
        let path = std::path::absolute(path)?;
        monitors.push(Monitor {
            name: name.to_owned(),
            version: report::version(&path),
            command: words(&format!("{PLACE}/{name} {arguments}")),
        });
        copies.push((path, Path::new(PLACE).join(name)));
    }
    Ok((monitors, copies))
}

/// The words of a command line in which nothing is quoted.
pub fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

/// Has `plan` measured by `bench WHAT` where guests run; with a word on where that was.
pub fn have_measured<P: Serialize, F: DeserializeOwned>(
    what: &str,
    plan: &P,
    measure: fn(&P) -> Result<F>,
) -> Result<(F, &'static str)> {
    if host::has_hardware_virtualization() {
        return Ok((measure(plan)?, "directly"));
    }
    let work = tempfile::tempdir().context("Cannot make a folder for the plan")?;
    let path = work.path().join("plan.json");
    fs::write(&path, serde_json::to_vec(plan)?)?;
    let lab = lab::Lab {
        count_instructions: true,
        // Room for a guest of 8 GiB, most of which nobody touches.
        memory_mib: host::spare_memory_mib().min(10 << 10),
        processors: 1,
        time_limit: Some(Duration::from_secs(1800)),
        ..lab::Lab::default()
    };
    let mut streams = lab::Streams::Captured { stdout: Vec::new(), stderr: Vec::new() };
    let own = build::own_program()?;
    let command = [own.into(), "bench".into(), what.into(), "--inside".into(), path.into()];
    let outcome = lab.run_with(&command, &mut streams)?;
    let lab::Streams::Captured { stdout, stderr } = streams else { unreachable!("it was made captured") };
    if outcome.code != 0 {
        bail!("Measuring in the lab ended with code {}:\n{}", outcome.code, String::from_utf8_lossy(&stderr));
    }
    let found = serde_json::from_slice(&stdout).context("The lab answered something else than figures")?;
    Ok((found, "in the lab counting instructions, 500 a microsecond"))
}

/// The part that runs in the lab; prints what it found as JSON.
pub fn inside<P: DeserializeOwned, F: Serialize>(plan: &Path, measure: fn(&P) -> Result<F>) -> Result<u8> {
    let plan: P = serde_json::from_slice(&fs::read(plan)?)?;
    println!("{}", serde_json::to_string(&measure(&plan)?)?);
    Ok(0)
}

/// Copies of files, which go when this does.
pub struct Copies;

impl Copies {
    /// Makes them.
    pub fn made(copies: &[Copy]) -> Result<Self> {
        fs::create_dir_all(PLACE)?;
        let made = Copies;
        for (from, to) in copies {
            fs::copy(from, to)
                .with_context(|| format!("Cannot copy {} to {}", from.display(), to.display()))?;
        }
        Ok(made)
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(PLACE);
    }
}
