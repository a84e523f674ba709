//! nacelle's own programs, built by the cargo that runs this one.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::progress;

/// The repository's root directory.
pub fn repository() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}

/// cargo, standing in the repository.
pub fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // What `cargo run` set for this program would make the inner cargo build things anew.
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("CARGO_PKG_") || name == "CARGO_MANIFEST_DIR" || name == "CARGO_MANIFEST_PATH" {
            cargo.env_remove(&*name);
        }
    }
    cargo.current_dir(repository());
    cargo
}

/// The path of this program. When a build has replaced the file since this process was started,
/// that is the new one's.
pub fn own_program() -> Result<PathBuf> {
    let path = env::current_exe().context("Cannot tell where this program lies")?;
    Ok(without_mark(path))
}

/// The kernel marks the path of a program whose file was replaced.
fn without_mark(path: PathBuf) -> PathBuf {
    match path.to_str().and_then(|path| path.strip_suffix(" (deleted)")) {
        Some(plain) => plain.into(),
        None => path,
    }
}

/// Builds the monitor and the guest agent; the path of the monitor, which has the agent beside
/// it.
pub fn nacelle() -> Result<PathBuf> {
    progress::step_of_program(
        "Building nacelle and its guest agent",
        cargo().args(["build", "-p", "nacelle", "-p", "nacelle-guest"]),
    )?;
    let own = own_program()?;
    let folder = own.parent().context("This program lies in no folder")?;
    Ok(folder.join("nacelle"))
}

/// Builds the monitor alone as it is shipped; its path.
pub fn release() -> Result<PathBuf> {
    progress::step_of_program(
        "Building nacelle's release (some minutes the first time)",
        cargo().args(["build", "--release", "-p", "nacelle"]),
    )?;
    let own = own_program()?;
    // TARGET/debug/xtask stands beside TARGET/release/nacelle.
    let folder = own.parent().and_then(Path::parent).context("This program lies in no folder")?;
    Ok(folder.join("release/nacelle"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_was_replaced_is_found_at_its_place() {
        assert_eq!(without_mark("/t/debug/xtask (deleted)".into()), Path::new("/t/debug/xtask"));
        assert_eq!(without_mark("/t/debug/xtask".into()), Path::new("/t/debug/xtask"));
        assert!(own_program().unwrap().is_file());
    }
}
