//! What is looked at, one function a check.

use std::{
    ffi::CString,
    fs::{self, File},
    io,
    os::{
        fd::{FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use super::Finding;
use crate::{
    cli::{kernel, kernel::Kernel, output, state::State},
    vm::kvm,
};

/// Oldest kernel on which everything works.
const OLDEST: (u32, u32) = (5, 10);
/// Free space under which the cache is a worry, in bytes.
const CACHE_SPACE: u64 = 2 << 30;
/// Free space under which the state directory is a worry, in bytes.
const STATE_SPACE: u64 = 64 << 20;
/// Memory under which machines hardly fit, in bytes.
const MEMORY: u64 = 256 << 20;

/// Everything, in the order in which it should be put right.
pub fn all() -> Vec<Finding> {
    let has_flag = kvm::has_hardware();
    vec![
        host_kernel(&read("/proc/sys/kernel/osrelease")),
        processor(has_flag),
        kvm_device(has_flag),
        nested(),
        memory(&read("/proc/meminfo")),
        cgroups(),
        huge_pages(&read("/proc/meminfo"), &read("/sys/kernel/mm/transparent_hugepage/enabled")),
        io_uring(),
        userfaultfd(),
        tun(),
        vhost(),
        directory("cache", &kernel::cache_directory(), CACHE_SPACE),
        directory("state", &State::directory(), STATE_SPACE),
        guest_kernel(),
        agent(),
    ]
}

/// What no machine runs without; the first thing to look at when one does not start.
pub fn needed() -> Vec<Finding> {
    let has_flag = kvm::has_hardware();
    vec![processor(has_flag), kvm_device(has_flag)]
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn host_kernel(release: &str) -> Finding {
    let release = release.trim();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|n| n.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= OLDEST {
        return Finding::ok("kernel", format!("Linux {release}"));
    }
    let (major, minor) = OLDEST;
    Finding::fail(
        "kernel",
        format!("Linux {release} is too old"),
        format!("use Linux {major}.{minor} or newer"),
    )
}

fn processor(has_flag: bool) -> Finding {
    let check = "processor";
    if cfg!(not(target_arch = "x86_64")) || has_flag {
        return Finding::ok(check, "Has hardware virtualization");
    }
    let virtual_host = read("/proc/cpuinfo").split_whitespace().any(|word| word == "hypervisor");
    let advice = if virtual_host {
        "this host is itself a virtual machine: enable nested virtualization for it on its own host"
    } else {
        "switch virtualization on in the firmware setup (Intel VT-x, AMD-V or SVM)"
    };
    Finding::fail(check, "Shows no hardware virtualization (neither vmx nor svm)", advice)
}

fn kvm_device(has_flag: bool) -> Finding {
    let check = "kvm";
    match kvm::open() {
        Ok(_) if has_flag || cfg!(not(target_arch = "x86_64")) => Finding::ok(check, "/dev/kvm can be used"),
        Ok(_) => Finding::fail(
            check,
            "/dev/kvm answers, but without hardware virtualization it emulates; Linux guests do not boot on it",
            "use a host whose processor shows vmx or svm, or the lab: 'cargo xtask run' uses it by itself",
        ),
        Err(kvm::KvmError::Missing) => Finding::fail(
            check,
            "There is no /dev/kvm",
            "load the module: 'nacelle doctor --fix' as root, or modprobe kvm_intel or kvm_amd",
        ),
        Err(kvm::KvmError::Permission) => Finding::fail(
            check,
            "No permission to open /dev/kvm",
            "join its group with 'sudo usermod -aG kvm $USER' and log in again, or run as root",
        ),
        Err(error) => Finding::fail(check, error.to_string(), "update the host's kernel"),
    }
}

fn nested() -> Finding {
    let check = "nested";
    let modules = ["kvm_intel", "kvm_amd"];
    let setting = |name: &&str| {
        let text = read(&format!("/sys/module/{name}/parameters/nested"));
        (!text.is_empty()).then(|| matches!(text.trim(), "Y" | "1"))
    };
    match modules.iter().find_map(setting) {
        Some(true) => Finding::ok(check, "Machines can run machines of their own"),
        Some(false) => Finding::warn(
            check,
            "Machines cannot run machines of their own",
            "if they should, load kvm_intel or kvm_amd with nested=1",
        ),
        None => Finding::warn(
            check,
            "Whether machines can run machines of their own is not known",
            "nothing, unless they should; it is a setting of kvm_intel and kvm_amd",
        ),
    }
}

fn memory(meminfo: &str) -> Finding {
    let available = kibibytes(meminfo, "MemAvailable:").saturating_mul(1024);
    let text = format!("{} available", output::bytes(available));
    if available >= MEMORY {
        return Finding::ok("memory", text);
    }
    Finding::warn("memory", text, "free some; machines take what they touch, up to what -m allows")
}

fn kibibytes(meminfo: &str, key: &str) -> u64 {
    let line = meminfo.lines().find_map(|l| l.strip_prefix(key)).unwrap_or_default();
    line.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0)
}

fn cgroups() -> Finding {
    let check = "cgroups";
    let controllers = read("/sys/fs/cgroup/cgroup.controllers");
    if controllers.is_empty() {
        return Finding::warn(
            check,
            "Control groups version 2 are not mounted at /sys/fs/cgroup",
            "boot the host with systemd.unified_cgroup_hierarchy=1; only limits on monitors need it",
        );
    }
    Finding::ok(check, format!("Version 2 with {}", controllers.trim()))
}

fn huge_pages(meminfo: &str, transparent: &str) -> Finding {
    let check = "huge pages";
    let (free, total) = (kibibytes(meminfo, "HugePages_Free:"), kibibytes(meminfo, "HugePages_Total:"));
    let mode = transparent.split(['[', ']']).nth(1).unwrap_or("not there");
    let text = format!("Transparent: {mode}; reserved: {free} of {total} free");
    if matches!(mode, "always" | "madvise") {
        return Finding::ok(check, text);
    }
    let advice = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled; guests run faster on them";
    Finding::warn(check, text, advice)
}

fn io_uring() -> Finding {
    let check = "io_uring";
    // The structure the kernel fills is 120 bytes of numbers.
    let mut parameters = [0u32; 30];
    // SAFETY: the buffer is as large as the kernel's `io_uring_params`, all zeroes is valid,
    // and the descriptor, if there is one, is owned by nobody else.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) };
    match owned(ring) {
        Ok(_) => Finding::ok(check, "Can be used"),
        Err(error) => Finding::warn(
            check,
            format!("Cannot be used ({error})"),
            "set /proc/sys/kernel/io_uring_disabled to 0; without it disks are slower",
        ),
    }
}

fn userfaultfd() -> Finding {
    let check = "userfaultfd";
    // SAFETY: no memory arguments; the descriptor, if there is one, is owned by nobody else.
    let fault = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    let device = || File::options().read(true).write(true).open("/dev/userfaultfd");
    match owned(fault).map(drop).or_else(|_| device().map(drop)) {
        Ok(()) => Finding::ok(check, "Can be used"),
        Err(error) => Finding::warn(
            check,
            format!("Cannot be used ({error})"),
            "run as root, or give this user /dev/userfaultfd; only guest memory that is loaded on demand needs it",
        ),
    }
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(result) {
        // SAFETY: the caller has just got this descriptor from the kernel.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

fn tun() -> Finding {
    let check = "tun";
    match File::options().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => Finding::ok(check, "/dev/net/tun can be used"),
        Err(error) => {
            let advice = match error.kind() {
                io::ErrorKind::PermissionDenied => "run as root, or give this user /dev/net/tun",
                _ => "'nacelle doctor --fix' as root loads the module and makes the device file",
            };
            Finding::warn(check, format!("/dev/net/tun cannot be used ({error}); --tap needs it"), advice)
        }
    }
}

fn vhost() -> Finding {
    let there = |path: &&str| Path::new(path).exists();
    let found: Vec<&str> = ["/dev/vhost-net", "/dev/vhost-vsock"].into_iter().filter(there).collect();
    let text = if found.is_empty() { "not there".to_owned() } else { found.join(" and ") };
    Finding::ok("vhost", format!("{text} (not needed: devices run in the monitor)"))
}

/// Whether a directory can be written and has room.
fn directory(check: &'static str, path: &Path, wanted: u64) -> Finding {
    let shown = path.display();
    let Some(there) = path.ancestors().find(|p| p.is_dir()) else {
        return Finding::fail(check, format!("{shown} cannot be made"), "name another place");
    };
    let there: PathBuf = if there.as_os_str().is_empty() { ".".into() } else { there.to_owned() };
    let Ok(name) = CString::new(there.as_os_str().as_bytes()) else {
        return Finding::fail(check, format!("{shown} is no path"), "name another place");
    };
    // SAFETY: a zero-terminated string that outlives the call.
    if unsafe { libc::access(name.as_ptr(), libc::W_OK | libc::X_OK) } != 0 {
        let variable = format!("NACELLE_{}_DIR", check.to_uppercase());
        let error = io::Error::last_os_error();
        return Finding::fail(
            check,
            format!("{} cannot be written ({error})", there.display()),
            format!("set {variable} to a directory of this user, or run as root"),
        );
    }
    // SAFETY: all zeroes is a valid `statvfs`, which the call fills.
    let (filled, space) = unsafe {
        let mut space: libc::statvfs = std::mem::zeroed();
        (libc::statvfs(name.as_ptr(), &raw mut space) == 0, space)
    };
    let free = if filled { space.f_bavail.saturating_mul(space.f_frsize) } else { 0 };
    let text = format!("{shown} has {} free", output::bytes(free));
    if free >= wanted {
        return Finding::ok(check, text);
    }
    let advice = format!("make room: {} are good to have", output::bytes(wanted));
    Finding::warn(check, text, advice)
}

fn guest_kernel() -> Finding {
    let check = "guest kernel";
    let advice = "build one with 'cargo xtask kernel', or name one with --kernel or NACELLE_KERNEL";
    let kernel = match Kernel::choose(None, &kernel::cache_directory()) {
        Ok(kernel) => kernel,
        Err(failure) => return Finding::fail(check, failure.message, advice),
    };
    let image = kernel.image.display();
    let Some(modules) = &kernel.modules else { return Finding::ok(check, image.to_string()) };
    match guest::modules::resolve_default(modules) {
        Ok(modules) => Finding::ok(check, format!("{image} with {} modules", modules.len())),
        Err(error) => Finding::fail(check, format!("{image}: {error}"), advice),
    }
}

fn agent() -> Finding {
    match kernel::agent() {
        Ok(path) if path.is_file() => Finding::ok("agent", path.display().to_string()),
        Ok(path) => Finding::fail(
            "agent",
            format!("NACELLE_AGENT names {}, which is no file", path.display()),
            "name the file nacelle-agent, or leave the variable out",
        ),
        Err(failure) => {
            Finding::fail("agent", failure.message, "build it with 'cargo build -p nacelle-guest'")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Level, *};

    #[test]
    fn kernels_are_compared_by_number() {
        for (release, level) in [
            ("5.10.0-28-amd64\n", Level::Ok),
            ("5.9.16", Level::Fail),
            ("10.0", Level::Ok),
            ("6.1.0-56-cloud-amd64", Level::Ok),
            ("", Level::Fail),
        ] {
            assert_eq!(host_kernel(release).level, level, "{release}");
        }
    }

    #[test]
    fn huge_pages_are_read_as_the_kernel_writes_them() {
        let meminfo = "HugePages_Total:       8\nHugePages_Free:        3\n";
        let found = huge_pages(meminfo, "always [madvise] never\n");
        assert_eq!(
            (found.level, &found.message[..]),
            (Level::Ok, "Transparent: madvise; reserved: 3 of 8 free")
        );
        assert_eq!(huge_pages(meminfo, "always madvise [never]\n").level, Level::Warn);
    }

    #[test]
    fn a_directory_that_is_not_there_yet_is_judged_by_the_one_above() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/c");
        assert_eq!(directory("cache", &path, 1).level, Level::Ok);
        assert_eq!(directory("cache", &path, u64::MAX).level, Level::Warn);
        assert!(!path.exists());
    }

    #[test]
    fn little_memory_is_a_warning() {
        assert_eq!(memory("MemTotal: 9 kB\nMemAvailable:    1048576 kB\n").level, Level::Ok);
        assert_eq!(memory("MemAvailable:    1024 kB\n").level, Level::Warn);
    }
}
