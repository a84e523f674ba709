//! The initial file system of a machine: the agent, and modules if its kernel needs any.
//!
//! ```text
//!   /init                         the agent
//!   /dev/console                  5:1, so that process 1 has descriptors 0 to 2
//!   /dev/null                     1:3, what it has instead in a machine without console
//!   /dev /proc /sys /run          where the agent mounts things
//!   /etc/nacelle/modules          file names under /lib/modules, in the order to load
//!   /lib/modules/NAME.ko[.xz]     the modules
//! ```
//!
//! It is an uncompressed archive in the kernel's "newc" cpio format: copying a few megabytes
//! once is faster than decompressing them on one virtual processor. For the same reason the
//! agent goes in without what the kernel does not load (symbols, debug information): that is
//! most of a program built for development.

mod cpio;
mod elf;

pub use elf::loadable_part;

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

/// Largest agent or module accepted, in bytes.
const MAX_FILE: u64 = 256 << 20;

/// What can go wrong when building the archive.
#[derive(Debug, thiserror::Error)]
pub enum InitrdError {
    /// The agent or a module cannot be read.
    #[error("Cannot read {path} for the machine's initial file system")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The agent is not a program of Linux.
    #[error("{path} is not a 64-bit ELF program and cannot be the agent")]
    NotAProgram {
        /// Which file.
        path: PathBuf,
    },
    /// The agent needs a dynamic loader, which the archive does not have.
    #[error("{path} is dynamically linked; the agent must be static (build it with crt-static)")]
    Dynamic {
        /// Which file.
        path: PathBuf,
    },
    /// Two modules have the same file name, or one has a name that is not plain text.
    #[error("The module {path} cannot be added: its file name is used twice or is not text")]
    ModuleName {
        /// Which file.
        path: PathBuf,
    },
    /// The archive cannot be written.
    #[error("Cannot write the machine's initial file system to {path}")]
    Write {
        /// Where to.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Builds the archive from the agent's program and the modules in the order to load them
/// (as [`crate::modules::resolve`] gives them; none for a kernel with everything built in).
///
/// The same input gives the same bytes.
///
/// # Errors
/// [`InitrdError`], all variants but `Write`.
pub fn build(agent: &Path, modules: &[PathBuf]) -> Result<Vec<u8>, InitrdError> {
    let program = read(agent)?;
    let program = loadable_part(&program).map_err(|e| match e {
        elf::ElfError::NotAProgram => InitrdError::NotAProgram { path: agent.into() },
        elf::ElfError::Dynamic => InitrdError::Dynamic { path: agent.into() },
    })?;
    let mut archive = cpio::Archive::new();
    for directory in ["dev", "proc", "sys", "run"] {
        archive.directory(directory, 0o755);
    }
    archive.character_device("dev/console", 0o600, 5, 1);
    // A program whose first descriptors are closed ends before its first line if it cannot
    // open this in their place, and the kernel with it.
    archive.character_device("dev/null", 0o666, 1, 3);
    archive.file("init", 0o755, &program);
    if !modules.is_empty() {
        for directory in ["etc", "etc/nacelle", "lib", "lib/modules"] {
            archive.directory(directory, 0o755);
        }
        let mut seen = BTreeSet::new();
        let mut list = String::new();
        for path in modules {
            let name = path.file_name().and_then(|n| n.to_str()).filter(|n| !n.contains('\n'));
            let Some(name) = name.filter(|n| seen.insert(n.to_string())) else {
                return Err(InitrdError::ModuleName { path: path.clone() });
            };
            archive.file(&format!("lib/modules/{name}"), 0o644, &read(path)?);
            list.push_str(name);
            list.push('\n');
        }
        archive.file("etc/nacelle/modules", 0o644, list.as_bytes());
    }
    Ok(archive.finish())
}

/// Builds the archive into a file, which appears whole or not at all.
///
/// # Errors
/// [`InitrdError`].
pub fn write(to: &Path, agent: &Path, modules: &[PathBuf]) -> Result<(), InitrdError> {
    let bytes = build(agent, modules)?;
    let mut name = to.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    let temporary = PathBuf::from(name);
    let publish = || {
        let mut file = fs::File::create(&temporary)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, to)?;
        let directory = to.parent().filter(|p| !p.as_os_str().is_empty());
        fs::File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
    };
    publish().map_err(|source| {
        let _ = fs::remove_file(&temporary);
        InitrdError::Write { path: to.into(), source }
    })
}

fn read(path: &Path) -> Result<Vec<u8>, InitrdError> {
    let failed = |source| InitrdError::Read { path: path.into(), source };
    let length = fs::metadata(path).map_err(failed)?.len();
    if length > MAX_FILE {
        return Err(failed(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("It has {length} bytes, at most {MAX_FILE} are allowed"),
        )));
    }
    fs::read(path).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    /// The entries of a newc archive, read by the rules of the kernel's documentation.
    fn entries(mut archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut found = Vec::new();
        loop {
            assert_eq!(&archive[..6], b"070701");
            let field = |i: usize| {
                let text = std::str::from_utf8(&archive[6 + 8 * i..14 + 8 * i]).unwrap();
                u32::from_str_radix(text, 16).unwrap() as usize
            };
            let (mode, size, name_size) = (field(1), field(6), field(11));
            let name = std::str::from_utf8(&archive[110..110 + name_size - 1]).unwrap().to_owned();
            let data = (110 + name_size).next_multiple_of(4);
            if name == "TRAILER!!!" {
                return found;
            }
            found.push((name, mode as u32, archive[data..data + size].to_vec()));
            archive = &archive[(data + size).next_multiple_of(4)..];
        }
    }

    fn myself() -> PathBuf {
        std::env::current_exe().unwrap()
    }

    #[test]
    fn modules_are_listed_in_the_order_given() {
        let dir = tempfile::tempdir().unwrap();
        let modules: Vec<_> = ["b.ko", "a.ko.xz"].map(|n| dir.path().join(n)).to_vec();
        for m in &modules {
            fs::write(m, m.to_str().unwrap()).unwrap();
        }
        let found = entries(&build(&myself(), &modules).unwrap());
        let get = |n: &str| found.iter().find(|e| e.0 == n).unwrap_or_else(|| panic!("{n}"));
        assert_eq!(get("etc/nacelle/modules").2, b"b.ko\na.ko.xz\n");
        assert_eq!(get("lib/modules/b.ko").2, modules[0].to_str().unwrap().as_bytes());
        assert_eq!(get("init").1, 0o100_755);
        assert_eq!(get("dev/console").1, 0o020_600);
        assert_eq!(get("proc").1, 0o040_755);
    }

    #[test]
    fn parents_come_before_what_is_in_them() {
        let dir = tempfile::tempdir().unwrap();
        let module = dir.path().join("x.ko");
        fs::write(&module, "x").unwrap();
        let names: Vec<_> = entries(&build(&myself(), &[module]).unwrap()).into_iter().map(|e| e.0).collect();
        for (i, name) in names.iter().enumerate() {
            if let Some((parent, _)) = name.rsplit_once('/') {
                assert!(names[..i].iter().any(|n| n == parent), "{name}");
            }
        }
    }

    #[test]
    fn the_loadable_part_of_a_program_still_runs_and_is_smaller() {
        let whole = fs::read(myself()).unwrap();
        let part = loadable_part(&whole).unwrap();
        assert!(part.len() < whole.len());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("copy");
        fs::write(&path, part).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let output = Command::new(&path).arg("--list").output().unwrap();
        assert!(String::from_utf8_lossy(&output.stdout).contains("loadable_part"));
    }

    #[test]
    fn a_file_that_is_no_static_program_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        for (content, name) in [(&b"#!/bin/sh\n"[..], "script"), (b"", "empty")] {
            fs::write(&path, content).unwrap();
            assert!(matches!(build(&path, &[]), Err(InitrdError::NotAProgram { .. })), "{name}");
        }
        let whole = fs::read(myself()).unwrap();
        fs::write(&path, &whole[..200]).unwrap();
        assert!(build(&path, &[]).is_err());
        let shell = Path::new("/bin/bash");
        if shell.exists() {
            assert!(matches!(build(shell, &[]), Err(InitrdError::Dynamic { .. })));
        }
    }

    #[test]
    fn two_modules_of_one_name_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let module = dir.path().join("x.ko");
        fs::write(&module, "x").unwrap();
        let twice = [module.clone(), module];
        assert!(matches!(build(&myself(), &twice), Err(InitrdError::ModuleName { .. })));
    }

    #[test]
    fn a_failed_write_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("initrd");
        fs::create_dir(&to).unwrap();
        fs::write(to.join("full"), "").unwrap();
        assert!(matches!(write(&to, &myself(), &[]), Err(InitrdError::Write { .. })));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn cpio_agrees_where_it_is_installed() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("initrd");
        write(&to, &myself(), &[]).unwrap();
        let input = fs::File::open(&to).unwrap();
        let Ok(output) = Command::new("cpio").args(["-it", "--quiet"]).stdin(input).output() else {
            return;
        };
        assert!(output.status.success());
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            "dev\nproc\nsys\nrun\ndev/console\ndev/null\ninit\n"
        );
    }
}
