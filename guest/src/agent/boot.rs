//! From the kernel's first breath to an agent that can be reached.
//!
//! Only what is needed for that stands before it; the rest waits for the host's setup. The
//! host is told by a connection to it, so that it need not ask again and again.

use super::syscall::{check_long, cstring, mount, open};
use std::{
    fs, io,
    os::fd::AsRawFd,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

/// Where modules are listed, in the initial file system.
const MODULES: &str = "/etc/nacelle/modules";

/// Longest wait for the vsock device.
const LIMIT: Duration = Duration::from_secs(10);

/// Mounts the kernel's file systems and loads modules.
pub fn prepare() -> Result<(), String> {
    MACHINE.store(true, Ordering::Relaxed);
    let plain = super::plan::PLAIN;
    let dev = libc::MS_NOSUID | libc::MS_NOEXEC;
    for (kind, at, flags, data) in [
        ("proc", "/proc", plain, ""),
        ("sysfs", "/sys", plain, ""),
        ("devtmpfs", "/dev", dev, "mode=755"),
        ("tmpfs", "/run", libc::MS_NOSUID | libc::MS_NODEV, "mode=755"),
    ] {
        let place = Path::new(at);
        let done = fs::create_dir_all(place).and_then(|()| mount(kind, place, kind, flags, data));
        match done {
            // Something else has mounted it already.
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
            other => other.map_err(|e| format!("cannot mount {kind} on {at}: {e}"))?,
        }
    }
    // Whatever the container uses up, the agent must stay.
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    load_modules()?;
    leave_initial_root().map_err(|e| format!("cannot leave the initial root: {e}"))
}

/// The initial file system cannot be pivoted away from, so the container could not get a root
/// of its own. A bind mount of it over itself can.
fn leave_initial_root() -> io::Result<()> {
    let root = Path::new("/run/root");
    fs::create_dir_all(root)?;
    mount("/", root, "", libc::MS_BIND | libc::MS_REC, "")?;
    let root = open(root, libc::O_PATH | libc::O_DIRECTORY)?;
    let here = c".".as_ptr();
    // SAFETY: zero-terminated strings that outlive the calls.
    unsafe {
        super::syscall::check(libc::fchdir(root.as_raw_fd()))?;
        let none = std::ptr::null();
        super::syscall::check(libc::mount(here, c"/".as_ptr(), none, libc::MS_MOVE, none.cast()))?;
        super::syscall::check(libc::chroot(here))?;
        super::syscall::check(libc::chdir(c"/".as_ptr()))?;
    }
    Ok(())
}

fn load_modules() -> Result<(), String> {
    let list = match fs::read_to_string(MODULES) {
        Ok(list) => list,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(format!("cannot read {MODULES}: {e}")),
    };
    let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    for name in list.lines() {
        let path = Path::new("/lib/modules").join(name);
        load(&path, &parameters(&command_line, name))
            .map_err(|e| format!("cannot load the kernel module {name}: {e}"))?;
        // It is in the kernel now; its file only takes memory.
        let _ = fs::remove_file(path);
    }
    Ok(())
}

fn load(path: &Path, parameters: &str) -> io::Result<()> {
    const COMPRESSED: libc::c_int = 4; // MODULE_INIT_COMPRESSED_FILE, Linux 5.17
    let plain = path.extension().is_some_and(|e| e == "ko");
    let flags = if plain { 0 } else { COMPRESSED };
    let file = open(path, libc::O_RDONLY)?;
    let parameters = cstring(parameters)?;
    // SAFETY: a zero-terminated string that outlives the call.
    let result = check_long(unsafe {
        libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), parameters.as_ptr(), flags)
    });
    match result {
        // Already loaded, or for a processor or device that this machine has not got.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EEXIST | libc::ENODEV)) => Ok(()),
        Err(e) if !plain && matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => {
            Err(io::Error::other("this kernel cannot load compressed modules"))
        }
        other => other.map(drop),
    }
}

/// What the kernel's command line says to a module: `NAME.parameter=value`.
fn parameters(command_line: &str, file: &str) -> String {
    let name = file.split_once(".ko").map_or(file, |(name, _)| name).replace('-', "_");
    let for_it = |word: &str| {
        let (module, parameter) = word.split_once('.')?;
        (module.replace('-', "_") == name).then(|| parameter.to_owned())
    };
    command_line.split_whitespace().filter_map(for_it).collect::<Vec<_>>().join(" ")
}

/// Opens the connection to the host that says that we are there; `None` when the host does
/// not listen for it, an error when there is no way to the host at all.
///
/// A socket can listen without any device, so this is what finds out whether there is one.
pub fn announce<T>(connect: impl Fn() -> io::Result<T>) -> Result<Option<T>, String> {
    let until = Instant::now() + LIMIT;
    loop {
        match connect() {
            Ok(connection) => return Ok(Some(connection)),
            Err(e) if e.raw_os_error() != Some(libc::ENODEV) => return Ok(None),
            Err(_) if Instant::now() >= until => {
                return Err("the machine has no vsock device, so the host cannot reach it".into());
            }
            // A driver that probes in the background: milliseconds, in kernels with modules.
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// Microseconds since the kernel's start.
pub fn uptime_us() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: one writable timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut now) };
    now.tv_sec.cast_unsigned() * 1_000_000 + now.tv_nsec.cast_unsigned() / 1000
}

/// Set once this is known to be a machine of ours, whose log may be written to.
static MACHINE: AtomicBool = AtomicBool::new(false);

/// Says something where a person looks when a machine does not come up: the kernel's log,
/// which goes to the console, or standard error.
pub fn say(text: &str) {
    let line = format!("<3>nacelle-agent: {text}\n");
    let logged = || {
        let mut log = fs::OpenOptions::new().write(true).open("/dev/kmsg")?;
        io::Write::write_all(&mut log, line.as_bytes())
    };
    if !MACHINE.load(Ordering::Relaxed) || logged().is_err() {
        eprintln!("nacelle-agent: {text}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_modules_parameters_are_found_on_the_command_line() {
        let line = "quiet virtio_mmio.device=4K@0x1:5 virtio-mmio.device=4K@0x2:6 other.x=1 a.b";
        let both = "device=4K@0x1:5 device=4K@0x2:6";
        assert_eq!(parameters(line, "virtio_mmio.ko"), both);
        assert_eq!(parameters(line, "virtio-mmio.ko.xz"), both);
        assert_eq!(parameters(line, "virtio.ko"), "");
    }
}
