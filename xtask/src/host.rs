//! This host: what it can do, what is installed on it, and where things are kept.

use std::env;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::progress;

/// A Debian package and the file that shows that it is there: a program, or an absolute path.
pub struct Package {
    name: &'static str,
    proof: &'static str,
}

const fn package(name: &'static str, proof: &'static str) -> Package {
    Package { name, proof }
}

/// What the lab needs.
pub const LAB_PACKAGES: [Package; 4] = [
    package("qemu-system-x86", "qemu-system-x86_64"),
    package("seabios", "/usr/share/seabios/bios-256k.bin"),
    package("kmod", "depmod"),
    package("xz-utils", "xz"),
];

/// What making an image for `cargo xtask run` and a guest kernel ready needs.
pub const RUN_PACKAGES: [Package; 2] = [package("busybox-static", "busybox"), package("kmod", "depmod")];

/// What the tests use as the other side or as the judge.
pub const TEST_PACKAGES: [Package; 12] = [
    package("busybox-static", "busybox"),
    package("cpio", "cpio"),
    package("curl", "curl"),
    package("docker-registry", "docker-registry"),
    package("e2fsprogs", "mke2fs"),
    package("erofs-utils", "mkfs.erofs"),
    package("gdb", "gdb"),
    package("iproute2", "ip"),
    package("kmod", "depmod"),
    package("openssl", "openssl"),
    package("systemd", "systemd-analyze"),
    package("tar", "tar"),
];

/// What makes the tests' Python environment, where `python3` has not all of it.
pub const PYTHON_PACKAGES: [Package; 1] = [package("python3-venv", "/usr/share/doc/python3-venv")];

/// What `cargo xtask bench` needs beside the lab.
pub const BENCH_PACKAGES: [Package; 2] = [package("iproute2", "ip"), package("strace", "strace")];

/// What builds libFuzzer.
pub const FUZZ_PACKAGES: [Package; 1] = [package("g++", "g++")];

/// What `cargo xtask bench clones` compares with.
pub const CONTAINER_PACKAGES: [Package; 1] = [package("runc", "runc")];

/// What `cargo xtask kernel` needs.
pub const KERNEL_PACKAGES: [Package; 10] = [
    package("bc", "bc"),
    package("bison", "bison"),
    package("flex", "flex"),
    package("gcc", "cc"),
    package("libelf-dev", "/usr/include/libelf.h"),
    package("linux-source", "/usr/share/doc/linux-source"),
    package("lz4", "lz4"),
    package("make", "make"),
    package("perl", "perl"),
    package("xz-utils", "xz"),
];

/// Whether virtual machines run here at the processor's speed: the processor says so and
/// `/dev/kvm` can be opened. A `/dev/kvm` without the processor's word is a software one, in
/// which Linux guests do not boot.
pub fn has_hardware_virtualization() -> bool {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    names_virtualization(&flags) && File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

fn names_virtualization(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter(|line| line.starts_with("flags"))
        .flat_map(str::split_whitespace)
        .any(|flag| flag == "vmx" || flag == "svm")
}

/// Makes sure that `packages` are installed, and installs what is not, saying so.
///
/// `purpose` completes "Installing ... for".
pub fn need(purpose: &str, packages: &[Package]) -> Result<()> {
    let missing: Vec<&str> = packages.iter().filter(|p| !is_there(p.proof)).map(|p| p.name).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    if find_program("apt-get").is_none() {
        bail!("Missing for {purpose}: the Debian packages {list}; this host has no apt-get to install them");
    }
    if !is_root() {
        bail!("Missing for {purpose}: the packages {list}; install them as root: apt-get install {list}");
    }
    update_package_lists(&format!("for {purpose}, which needs {list}"))?;
    progress::step(&format!("Installing {list} for {purpose}"), || {
        run(Command::new("apt-get")
            .args(["install", "-y", "-q", "--no-install-recommends"])
            .args(&missing)
            .env("DEBIAN_FRONTEND", "noninteractive"))
        .map(drop)
    })
}

/// Fetches the archive's package lists; `reason` completes "Updating the package lists".
pub fn update_package_lists(reason: &str) -> Result<()> {
    if !is_root() {
        bail!("The package lists must be updated {reason}; run as root: apt-get update");
    }
    progress::step(&format!("Updating the package lists {reason}"), || {
        run(Command::new("apt-get").args(["update", "-q"])).map(drop)
    })
}

fn is_there(proof: &str) -> bool {
    if proof.starts_with('/') { Path::new(proof).exists() } else { find_program(proof).is_some() }
}

/// The path of a program, looked for in `PATH` and where root's programs lie.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
}

/// Processors of this host that this process may use.
pub fn processors() -> u32 {
    std::thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(1))
}

/// Memory that could be given to one more machine now, in MiB: two thirds of what is free.
pub fn spare_memory_mib() -> u32 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    u32::try_from(kib.unwrap_or(3 << 20) / 1024 * 2 / 3).unwrap_or(u32::MAX)
}

/// Whether this process may do everything.
pub fn is_root() -> bool {
    // SAFETY: no arguments, cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// The folder for things that can be made again: what the environment variable `variable`
/// names, else `part` of root's or the user's cache. It is made if need be.
pub fn cache_directory(variable: &str, part: &str) -> Result<PathBuf> {
    let directory = match env::var_os(variable) {
        Some(path) if !path.is_empty() => PathBuf::from(path),
        _ if is_root() => Path::new("/var/cache/nacelle").join(part),
        _ => {
            let home = env::var_os("XDG_CACHE_HOME")
                .map(PathBuf::from)
                .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cache")));
            home.context("Neither XDG_CACHE_HOME nor HOME says where to keep caches")?
                .join("nacelle")
                .join(part)
        }
    };
    fs::create_dir_all(&directory)
        .with_context(|| format!("Cannot make the folder {}", directory.display()))?;
    Ok(fs::canonicalize(directory)?)
}

/// Waits for the lock file at `path`; it is free again when the answer is dropped.
pub fn lock(path: &Path) -> Result<File> {
    let file = File::create(path).with_context(|| format!("Cannot make {}", path.display()))?;
    let take = |how| {
        // SAFETY: an open descriptor and constants.
        if unsafe { libc::flock(file.as_raw_fd(), how) } == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    };
    if take(libc::LOCK_EX | libc::LOCK_NB).is_err() {
        eprintln!("Waiting for another run, which holds {}", path.display());
        take(libc::LOCK_EX).with_context(|| format!("Cannot lock {}", path.display()))?;
    }
    Ok(file)
}

/// A new folder in `home` to make something in, removed when dropped. The caller holds the lock
/// under which alone folders of this `prefix` are made, so others of it are left over from runs
/// that were killed, and go.
pub fn work_folder(home: &Path, prefix: &str) -> Result<TempDir> {
    for entry in fs::read_dir(home)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            fs::remove_dir_all(entry.path())
                .with_context(|| format!("Cannot remove {}", entry.path().display()))?;
        }
    }
    tempfile::Builder::new()
        .prefix(prefix)
        .tempdir_in(home)
        .with_context(|| format!("Cannot make a folder in {}", home.display()))
}

/// Runs a program to its end without showing what it says; its standard output. When it fails,
/// the end of what it said is the error.
pub fn run(command: &mut Command) -> Result<Vec<u8>> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("Cannot run {name}"))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let mut said = output.stdout;
    said.extend(output.stderr);
    let said = String::from_utf8_lossy(&said);
    let lines: Vec<&str> = said.lines().collect();
    let end = lines[lines.len().saturating_sub(20)..].join("\n");
    bail!("{name} failed ({}):\n{end}", output.status)
}

/// Ends this process (SIGTERM) when the one that started it has ended, so that a run that is
/// killed from outside, not by Ctrl-C, leaves nothing running. Used after fork and at start.
pub fn end_with_parent() -> io::Result<()> {
    // SAFETY: constants only; async-signal-safe.
    match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The code a shell would give for a program's end: its own, or 128+signal.
pub fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtualization_is_a_whole_word_of_the_flags_line() {
        assert!(names_virtualization("processor : 0\nflags : fpu svm lm\n"));
        assert!(names_virtualization("flags\t\t: fpu vmx lm\n"));
        assert!(!names_virtualization("flags : fpu svm_lock lm\n"));
        assert!(!names_virtualization("bugs : svm\nvmx flags : ept\n"));
    }

    #[test]
    fn a_failing_program_shows_the_end_of_what_it_said() {
        let error = run(Command::new("sh").args(["-c", "echo why >&2; exit 3"])).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("why") && text.contains('3'), "{text}");
    }

    #[test]
    fn what_a_killed_run_left_behind_goes_and_the_rest_stays() {
        let home = tempfile::tempdir().unwrap();
        for name in ["build-old", "kept"] {
            fs::create_dir(home.path().join(name)).unwrap();
        }
        let work = work_folder(home.path(), "build-").unwrap();
        assert!(work.path().is_dir() && home.path().join("kept").is_dir());
        assert!(!home.path().join("build-old").exists());
    }

    #[test]
    fn a_signal_is_a_code_above_128() {
        assert_eq!(exit_code(ExitStatus::from_raw(5 << 8)), 5);
        assert_eq!(exit_code(ExitStatus::from_raw(9)), 137);
    }

    #[test]
    fn programs_of_every_system_are_found_and_others_are_not() {
        assert!(find_program("sh").is_some());
        assert!(find_program("no-such-program-here").is_none());
    }
}
