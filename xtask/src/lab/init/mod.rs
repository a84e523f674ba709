//! Process 1 of the lab's machine: makes the host's root directory the root here, runs one
//! command, and reports.
//!
//! ```text
//!   /order.json, /modules/*           (initrd)
//!        |            load: virtio, 9p, overlay        | second thread: console, kvm, tun, ...
//!        v
//!   9p "root" read-only -> /lower --overlay with tmpfs--> /root --switch--> /
//!        |            proc sys dev devpts shm run cgroup2 lo, writable 9p shares
//!        v
//!   the command, its streams framed over a virtio serial port (see `frame`)
//! ```
//!
//! It is the same program as the host's side, started by the kernel, because a shell script
//! that forks thirty tools costs seconds on an emulated processor, and because framing binary
//! streams is no work for a shell.

mod job;
mod kernel;
mod network;
mod pulse;

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::frame::{self, Kind};
use super::order::{self, Order};

/// How long the serial port may take to appear after its driver is loaded.
const PORT_WAIT: Duration = Duration::from_secs(30);
/// How the serial port that carries the frames is called; the number in it depends on the
/// machine's other devices.
const PORT: &str = "vport";

/// Whether this process is process 1 of a lab.
pub fn is_wanted() -> bool {
    std::process::id() == 1 && Path::new(order::PATH).exists()
}

/// Does everything and powers the machine off; never comes back.
pub fn main() -> ! {
    if let Err(error) = boot_and_run() {
        eprintln!("lab init: {error:#}");
    }
    kernel::power_off()
}

fn boot_and_run() -> Result<()> {
    let order: Order = serde_json::from_slice(&fs::read(order::PATH)?).context("A bad order")?;
    kernel::mount("dev", "/dev", "devtmpfs", "")?;
    for module in modules(order::MODULES_FIRST)? {
        kernel::load_module(&module)?;
    }
    let rest = modules(order::MODULES_REST)?
        .into_iter()
        .map(|path| fs::File::open(&path).map(|file| (path, file)))
        .collect::<Result<Vec<_>, _>>()?;
    let loader = thread::spawn(move || {
        for (path, file) in rest {
            // One that fails costs the command one facility, not the whole machine; the
            // console says which.
            if let Err(error) = kernel::load_open_module(&file) {
                eprintln!("lab init: module {}: {error}", path.display());
            }
        }
    });
    make_root().context("Cannot make the root directory")?;
    furnish(&order)?;
    loader.join().map_err(|_| anyhow!("Loading modules failed"))?;
    if order.network {
        network::way_out().context("Cannot connect to the host's network")?;
    }
    let port = open_port()?;
    frame::send(&port, Kind::Started, &[])?;
    match job::run(&order, &port) {
        Ok(code) => {
            kernel::sync(order.shares.iter().map(|(_, path)| Path::new(path)));
            frame::send(&port, Kind::Exit, &[code])?;
        }
        Err(error) => {
            let (code, reason) = job::explain(&error);
            let mut report = vec![code];
            report.extend(reason.into_bytes());
            frame::send(&port, Kind::Failed, &report)?;
        }
    }
    // The host ends the machine when it has read the frame; powering off is for a host that
    // does not.
    thread::sleep(Duration::from_secs(20));
    Ok(())
}

fn modules(folder: &str) -> Result<Vec<PathBuf>> {
    let mut paths =
        fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path())).collect::<Result<Vec<_>, _>>()?;
    paths.sort();
    Ok(paths)
}

fn make_root() -> Result<()> {
    kernel::mount_read_only(order::ROOT_TAG, "/lower", "9p", &p9("loose"))?;
    kernel::mount("tmpfs", "/upper", "tmpfs", "size=70%")?;
    fs::create_dir("/upper/files")?;
    fs::create_dir("/upper/work")?;
    let layers = "lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work";
    kernel::mount("overlay", "/root", "overlay", layers)?;
    for name in ["proc", "sys", "dev", "run", "tmp", "root"] {
        fs::create_dir_all(Path::new("/root").join(name))?;
    }
    kernel::move_mount("/dev", "/root/dev")?;
    kernel::switch_root("/root")
}

fn p9(cache: &str) -> String {
    format!("trans=virtio,version=9p2000.L,msize=524288,cache={cache}")
}

/// Everything beside the root itself. Only what every command needs may fail the start.
fn furnish(order: &Order) -> Result<()> {
    kernel::mount("proc", "/proc", "proc", "")?;
    kernel::mount("sysfs", "/sys", "sysfs", "")?;
    kernel::mount("tmpfs", "/run", "tmpfs", "mode=755")?;
    for name in ["/dev/pts", "/dev/shm", "/run/lock"] {
        fs::create_dir_all(name)?;
    }
    kernel::mount("devpts", "/dev/pts", "devpts", "ptmxmode=666,mode=620,gid=5")?;
    kernel::mount("shm", "/dev/shm", "tmpfs", "mode=1777")?;
    for (name, target) in [("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")] {
        let _ = std::os::unix::fs::symlink(format!("/proc/self/fd{target}"), Path::new("/dev").join(name));
    }
    kernel::mount("cgroup2", "/sys/fs/cgroup", "cgroup2", "")?;
    for controller in ["cpu", "cpuset", "io", "memory", "pids"] {
        let _ = fs::write("/sys/fs/cgroup/cgroup.subtree_control", format!("+{controller}"));
    }
    fs::create_dir_all("/lib/modules")?;
    kernel::mount_read_only(order::MODULES_TAG, "/lib/modules", "9p", &p9("loose"))?;
    for (tag, path) in &order.shares {
        fs::create_dir_all(path)?;
        let path = path.to_str().context("A shared directory's name is not UTF-8")?;
        kernel::mount(tag, path, "9p", &p9("mmap"))?;
    }
    network::loopback()?;
    kernel::settle()
}

fn open_port() -> Result<fs::File> {
    let start = Instant::now();
    loop {
        let port = fs::read_dir("/dev")?
            .filter_map(Result::ok)
            .find(|entry| entry.file_name().to_string_lossy().starts_with(PORT));
        match port {
            Some(port) => return Ok(OpenOptions::new().read(true).write(true).open(port.path())?),
            None if start.elapsed() > PORT_WAIT => bail!("There is no serial port to talk to the host"),
            None => thread::sleep(Duration::from_millis(5)),
        }
    }
}
