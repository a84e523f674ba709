//! Packages of the host's Debian as a source of kernels: downloaded and unpacked, never
//! installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{host, progress};

/// Downloads the package that the meta package `meta` stands for today, the dependency whose
/// name starts with `prefix`, into `folder`; the path of the `.deb` file.
pub fn fetch(meta: &str, prefix: &str, folder: &Path) -> Result<PathBuf> {
    let name = match dependency(meta, prefix) {
        Ok(name) => name,
        Err(_) => {
            host::update_package_lists(&format!("to find the package behind {meta}"))?;
            dependency(meta, prefix)?
        }
    };
    match download(&name, folder) {
        Ok(path) => Ok(path),
        // The lists may be older than the archive: what they name is gone from it.
        Err(_) => {
            host::update_package_lists(&format!("to download {name}"))?;
            download(&dependency(meta, prefix)?, folder)
        }
    }
}

fn dependency(meta: &str, prefix: &str) -> Result<String> {
    let listing = host::run(Command::new("apt-cache").args(["depends", meta]))?;
    String::from_utf8_lossy(&listing)
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with(prefix))
        .map(str::to_owned)
        .with_context(|| format!("The package {meta} is not known here or needs no {prefix}*"))
}

fn download(name: &str, folder: &Path) -> Result<PathBuf> {
    progress::step(&format!("Downloading Debian's package {name}"), || {
        host::run(
            Command::new("apt-get")
                .args(["-q", "-o", "APT::Sandbox::User=root", "download", name])
                .current_dir(folder),
        )?;
        fs::read_dir(folder)?
            .filter_map(|entry| entry.ok().map(|entry| entry.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .context("apt-get download left no package file")
    })
}

/// Unpacks the files of the package at `path` below `target` and removes the package file.
pub fn unpack(path: &Path, target: &Path) -> Result<()> {
    host::run(Command::new("dpkg-deb").arg("-x").arg(path).arg(target))?;
    fs::remove_file(path)?;
    Ok(())
}

/// The only entry of a folder.
pub fn only_entry(folder: &Path) -> Result<PathBuf> {
    let mut entries = fs::read_dir(folder)
        .with_context(|| format!("Cannot read {}", folder.display()))?
        .collect::<Result<Vec<_>, _>>()?;
    match (entries.pop(), entries.is_empty()) {
        (Some(entry), true) => Ok(entry.path()),
        _ => bail!("{} should have exactly one entry", folder.display()),
    }
}
