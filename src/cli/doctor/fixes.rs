//! What `--fix` does: only what a host's administrator would type without a second thought.
//! Nothing is changed that outlives a restart, and nothing that is there is touched.

use std::{fs, os::unix::fs::DirBuilderExt, path::Path, process::Command};

use crate::cli::{kernel, state::State};

/// Device number of `/dev/net/tun` (Linux `misc` major 10, minor 200).
const TUN: (u32, u32) = (10, 200);

/// Does it; a line for each thing that was tried.
pub fn apply() -> Vec<String> {
    let mut said = Vec::new();
    if !Path::new("/dev/kvm").exists() {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let has = |flag: &str| cpuinfo.split_whitespace().any(|word| word == flag);
        if has("vmx") {
            said.push(load("kvm_intel"));
        } else if has("svm") {
            said.push(load("kvm_amd"));
        }
    }
    if !Path::new("/dev/net/tun").exists() {
        if !Path::new("/sys/class/misc/tun").exists() {
            said.push(load("tun"));
        }
        if !Path::new("/dev/net/tun").exists() {
            said.push(make_tun());
        }
    }
    said.push(make_cache());
    match State::open() {
        Ok(_) => {}
        Err(failure) => said.push(failure.to_string()),
    }
    said.retain(|line| !line.is_empty());
    said
}

fn load(module: &str) -> String {
    match Command::new("modprobe").arg(module).output() {
        Ok(output) if output.status.success() => format!("Loaded the module {module}"),
        Ok(output) => {
            let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            format!("The module {module} could not be loaded: {why}")
        }
        Err(error) => format!("modprobe cannot be run: {error}"),
    }
}

fn make_tun() -> String {
    let make = || {
        fs::create_dir_all("/dev/net")?;
        let device = libc::makedev(TUN.0, TUN.1);
        // SAFETY: a zero-terminated string that outlives the call.
        match unsafe { libc::mknod(c"/dev/net/tun".as_ptr(), libc::S_IFCHR | 0o666, device) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    match make() {
        Ok(()) => "Made /dev/net/tun".to_owned(),
        Err(error) => format!("/dev/net/tun could not be made: {error}"),
    }
}

fn make_cache() -> String {
    let path = kernel::cache_directory();
    if path.is_dir() {
        return String::new();
    }
    match fs::DirBuilder::new().recursive(true).mode(0o755).create(&path) {
        Ok(()) => format!("Made {}", path.display()),
        Err(error) => format!("{} could not be made: {error}", path.display()),
    }
}
