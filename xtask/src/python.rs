//! The tests' Python: an environment with the published Firecracker client that drives nacelle.
//!
//! ```text
//!   $NACELLE_CACHE_DIR/xtask/python-HASH/bin/python
//! ```
//!
//! It is made beforehand, on the host, because the lab has no network. Every version is fixed in
//! `tests/machine/clients/requirements.txt`; that text and the interpreter's version are the key.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::{host, progress};

/// What is installed: one package and its version a line.
const REQUIREMENTS: &str = include_str!("../../tests/machine/clients/requirements.txt");

/// Gives the environment's interpreter, made first if it is not there.
pub fn interpreter() -> Result<PathBuf> {
    if !makes_environments() {
        host::need("the tests' Python", &host::PYTHON_PACKAGES)?;
    }
    let version = host::run(Command::new("python3").arg("--version"))?;
    let home = host::cache_directory("NACELLE_CACHE_DIR", "")?.join("xtask");
    fs::create_dir_all(&home)?;
    let place = home.join(format!("python-{}", key(&version, REQUIREMENTS)));
    let _lock = host::lock(&home.join("python.lock"))?;
    if !place.exists() {
        progress::step("Making the tests' Python environment", || {
            // Not "python-": what begins so is removed as left over.
            let work = host::work_folder(&home, "making-python-")?;
            let made = work.path().join("environment");
            fill(&made)?;
            fs::rename(&made, &place).with_context(|| format!("Cannot make {}", place.display()))
        })?;
    }
    Ok(place.join("bin/python"))
}

/// Whether `python3` is there with all that an environment is made of; Debian has that in a
/// package of its own.
fn makes_environments() -> bool {
    host::run(Command::new("python3").args(["-c", "import venv, ensurepip"])).is_ok()
}

/// Makes an environment; it is found by its interpreter, and so it can be moved afterwards.
fn fill(made: &Path) -> Result<()> {
    host::run(Command::new("python3").args(["-m", "venv"]).arg(made))?;
    let list = made.join("requirements.txt");
    fs::write(&list, REQUIREMENTS)?;
    // Only what is named, and nothing that would have to be built here.
    let options =
        ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"];
    let mut pip = Command::new(made.join("bin/python"));
    pip.args(["-m", "pip", "install"]).args(options).arg("--requirement").arg(&list);
    host::run(&mut pip).context("Cannot install the Firecracker client for Python that the tests run")?;
    Ok(())
}

fn key(version: &[u8], requirements: &str) -> String {
    let digest = Sha256::new().chain_update(version).chain_update(requirements).finalize();
    digest[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_package_has_its_version() {
        for line in REQUIREMENTS.lines().filter(|line| !line.starts_with('#')) {
            let (name, version) = line.split_once("==").expect(line);
            assert!(!name.is_empty() && version.starts_with(|first: char| first.is_ascii_digit()), "{line}");
        }
    }

    #[test]
    fn another_interpreter_or_list_is_another_environment() {
        let keys = [key(b"3.11", "a==1"), key(b"3.13", "a==1"), key(b"3.11", "a==2")];
        assert!(keys[0].len() == 16 && keys[0] != keys[1] && keys[0] != keys[2]);
    }
}
