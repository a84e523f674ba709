//! The container: its surroundings, made once, and the processes in it.
//!
//! ```text
//!   base/lower   the image, read-only            base/root   both, by overlayfs:
//!   base/upper   what the container writes                   the container's root
//!   base/etc     hostname, hosts, resolv.conf    base/disks  further disks
//! ```
//!
//! The agent mounts these where the container cannot see them; the container's first process
//! takes them along when it enters its root ([`super::plan`]). Even a read-only container has
//! an overlay, in memory, so that mount points missing in the image can be made before the
//! root is sealed.

mod identity;

use super::{
    cgroup::Cgroup,
    disks,
    etc::{self, Files},
    launch::{self, Born, Namespaces},
    network,
    plan::{self, Plan, Step},
    process::{Process, Processes},
    program::Program,
    syscall::{cstring, detached_copy, join, mount, open, unmount},
};
use guest::protocol::{Disk, Failure, FailureKind, ProcessSpec, Root, Setup, Tmpfs, Writable};
use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Most mounts of one kind in a setup.
const MAX_MOUNTS: usize = 64;

/// Bytes of `/dev/shm` unless said otherwise, as in Docker.
const SHM_SIZE: u64 = 64 << 20;

/// The machine's container.
pub struct Container {
    base: PathBuf,
    /// The clock and the random generator are the machine's own to set.
    owns_kernel: bool,
    pub processes: Arc<Processes>,
    pub cgroup: Arc<Cgroup>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    phase: Phase,
    setup: Setup,
    files: Option<Files>,
    disks: Vec<disks::Device>,
    live: Option<Arc<Live>>,
}

#[derive(Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Fresh,
    Ready,
    Started,
    /// Setting up failed halfway.
    Broken,
}

/// A container that has a process.
pub struct Live {
    namespaces: Namespaces,
    root: OwnedFd,
    first: i32,
}

impl Container {
    /// A container under `base`, not set up.
    pub fn new(base: &Path, owns_kernel: bool, processes: Arc<Processes>, cgroup: Arc<Cgroup>) -> Self {
        Self { base: base.into(), owns_kernel, processes, cgroup, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes everything but processes.
    pub fn setup(&self, setup: Setup) -> Result<(), Failure> {
        let mut state = self.lock();
        if state.phase != Phase::Fresh {
            return Err(Failure::new(FailureKind::WrongState, "The container is set up already"));
        }
        check(&setup)?;
        state.phase = Phase::Broken;
        if self.owns_kernel {
            if let Some(time) = setup.unix_ns {
                super::clock::set(time)?;
            }
            super::clock::feed(&setup.entropy)?;
        }
        let hostname = hostname(&setup);
        etc::set_hostname(hostname)?;
        self.mount_root(&setup)?;
        for (number, disk) in setup.disks.iter().enumerate() {
            let device = disks::find(&disk.serial)?;
            if !disk.path.is_empty() {
                let place = self.disk_place(number);
                disks::attach(&device, &place, &disk.filesystem, disk.read_only).map_err(|mut failure| {
                    failure.message = format!("{} (the one for {})", failure.message, disk.path);
                    failure
                })?;
            }
            state.disks.push(device);
        }
        state.files = Some(etc::write(&self.base.join("etc"), hostname, &setup)?);
        network::configure(&setup.network)?;
        self.cgroup.limit(&setup.limits)?;
        state.setup = setup;
        state.phase = Phase::Ready;
        Ok(())
    }

    fn mount_root(&self, setup: &Setup) -> Result<(), Failure> {
        let [lower, upper, root] = ["lower", "upper", "root"].map(|n| self.base.join(n));
        let fail = |what: &str, e: &io::Error| Failure::new(FailureKind::Disk, format!("Cannot {what}: {e}"));
        for directory in [&lower, &upper, &root] {
            fs::create_dir_all(directory).map_err(|e| fail("make a directory", &e))?;
        }
        match &setup.root {
            Root::Disk { serial } => disks::attach(&disks::find(serial)?, &lower, "", true)?,
            Root::Directory { path } => mount(path, &lower, "", libc::MS_BIND, "")
                .map_err(|e| fail(&format!("use the directory {path:?} as root"), &e))?,
        }
        match &setup.writable {
            Writable::Disk { serial } if !setup.read_only => {
                disks::attach(&disks::find(serial)?, &upper, "", false)?;
            }
            Writable::Memory { size } if *size != 0 && !setup.read_only => {
                mount("tmpfs", &upper, "tmpfs", 0, &format!("mode=700,size={size}"))
                    .map_err(|e| fail("make the writable layer in memory", &e))?;
            }
            _ => mount("tmpfs", &upper, "tmpfs", 0, "mode=700")
                .map_err(|e| fail("make the writable layer in memory", &e))?,
        }
        let [upper, work] = ["upper", "work"].map(|n| upper.join(n));
        for directory in [&upper, &work] {
            fs::create_dir_all(directory).map_err(|e| fail("prepare the writable layer", &e))?;
        }
        // The upper directory's own attributes become the root's.
        copy_attributes(&lower, &upper).map_err(|e| fail("prepare the writable layer", &e))?;
        let options =
            format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
        mount("overlay", &root, "overlay", 0, &options).map_err(|e| match e.raw_os_error() {
            Some(libc::ENODEV) => Failure::new(FailureKind::Disk, "The machine's kernel has no overlayfs"),
            _ => fail("lay the writable layer over the image", &e),
        })
    }

    fn disk_place(&self, number: usize) -> PathBuf {
        self.base.join("disks").join(number.to_string())
    }

    /// The signal that asks the main process to end.
    pub fn stop_signal(&self) -> i32 {
        match self.lock().setup.stop_signal {
            0 => libc::SIGTERM,
            signal => signal,
        }
    }

    /// Starts the main process.
    pub fn start(&self, spec: &ProcessSpec) -> Result<Arc<Process>, Failure> {
        let mut state = self.lock();
        match state.phase {
            Phase::Ready => {}
            Phase::Started => {
                let message = "The container's main process was started already";
                return Err(Failure::new(FailureKind::WrongState, message));
            }
            _ => return Err(not_ready()),
        }
        let root = open(&self.base.join("root"), libc::O_PATH | libc::O_DIRECTORY)
            .map_err(|e| Failure::new(FailureKind::System, format!("Cannot open the root: {e}")))?;
        let program = Program::prepare(spec, &root, hostname(&state.setup))?;
        let plan = self
            .plan(&state, spec)
            .map_err(|e| Failure::new(FailureKind::System, format!("Cannot plan the container: {e}")))?;
        let seat = self.cgroup.seat(None);
        let (process, Born { namespaces, root }) =
            launch::main(&self.processes, spec, &program, &plan, seat.as_ref())?;
        state.live = Some(Arc::new(Live { namespaces, root, first: process.pid }));
        state.phase = Phase::Started;
        Ok(process)
    }

    /// Starts a further process.
    pub fn exec(&self, spec: &ProcessSpec) -> Result<Arc<Process>, Failure> {
        let live = self.live()?;
        let name = hostname(&self.lock().setup).to_owned();
        let program = Program::prepare(spec, &live.root, &name)?;
        let seat = self.cgroup.seat(Some(live.first));
        launch::further(&self.processes, spec, &program, &live.namespaces, seat.as_ref())
    }

    fn live(&self) -> Result<Arc<Live>, Failure> {
        self.lock().live.clone().ok_or_else(not_ready)
    }

    /// Runs `work` where paths are the container's, and none of the agent's is in reach.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> Result<T, Failure> + Send) -> Result<T, Failure> {
        let live = self.live()?;
        let enter = || {
            // A thread that shares its root with no other may join a mount namespace, and
            // then has that namespace's root for its own.
            // SAFETY: unshare has no memory arguments.
            super::syscall::check(unsafe { libc::unshare(libc::CLONE_FS) })?;
            join(&live.namespaces.mount, libc::CLONE_NEWNS)
        };
        let cannot = |e| Failure::new(FailureKind::System, format!("Cannot enter the container: {e}"));
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .stack_size(256 << 10)
                .spawn_scoped(scope, || enter().map_err(cannot).and_then(|()| work()));
            match thread.map(std::thread::ScopedJoinHandle::join) {
                Ok(Ok(result)) => result,
                Ok(Err(_)) => Err(Failure::new(FailureKind::System, "A thread broke off")),
                Err(e) => Err(cannot(e)),
            }
        })
    }

    fn plan(&self, state: &State, spec: &ProcessSpec) -> io::Result<Plan> {
        let setup = &state.setup;
        let shm = if setup.shm_size == 0 { SHM_SIZE } else { setup.shm_size };
        let mut plan = plan::kernel_files(&self.base.join("root").to_string_lossy(), shm)?;
        for (name, value) in &setup.sysctls {
            let path = setting_path(name);
            plan.must(Step::Setting { path: cstring(path)?, value: cstring(value)? });
        }
        if let Some(files) = &state.files {
            plan.directories("/etc", 0o755)?;
            for (source, target) in files.places() {
                plan.may(Step::File { path: cstring(target)? });
                // An image without a place for it, on a root that cannot get one, does without.
                plan.graft(detached_copy(&source)?, target, false)?;
            }
        }
        for (number, (disk, device)) in setup.disks.iter().zip(&state.disks).enumerate() {
            if disk.path.is_empty() {
                let (path, mode) = (format!("/dev/{}", device.name), libc::S_IFBLK | 0o660);
                plan.must(plan::device(&path, mode, device.major, device.minor)?);
            } else {
                plan.directories(&disk.path, 0o755)?;
                plan.graft(detached_copy(&self.disk_place(number))?, &disk.path, true)?;
            }
        }
        for tmpfs in &setup.tmpfs {
            plan.directories(&tmpfs.path, 0o755)?;
            plan.must(tmpfs_step(tmpfs)?);
        }
        plan.directories(&spec.cwd, 0o755)?;
        if setup.read_only {
            plan.must(plan::seal());
        }
        Ok(plan)
    }

    /// Unmounts the disks; every process has ended.
    pub fn release(&self) {
        let mut state = self.lock();
        state.live = None;
        state.phase = Phase::Broken;
        let disks = (0..state.setup.disks.len()).map(|n| self.disk_place(n));
        let mounts = ["root", "upper", "lower"].map(|n| self.base.join(n));
        for place in mounts.into_iter().chain(disks) {
            if unmount(&place, 0).is_err() {
                // Still in use, by a copy in progress: at least write it out.
                let _ = mount("", &place, "", libc::MS_REMOUNT | libc::MS_RDONLY, "");
                let _ = unmount(&place, libc::MNT_DETACH);
            }
        }
        self.cgroup.remove();
    }
}

fn hostname(setup: &Setup) -> &str {
    if setup.hostname.is_empty() { "localhost" } else { &setup.hostname }
}

fn not_ready() -> Failure {
    Failure::new(FailureKind::WrongState, "The container is not running yet")
}

fn copy_attributes(from: &Path, to: &Path) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    let metadata = fs::metadata(from)?;
    std::os::unix::fs::chown(to, Some(metadata.uid()), Some(metadata.gid()))?;
    fs::set_permissions(to, metadata.permissions())
}

fn tmpfs_step(tmpfs: &Tmpfs) -> io::Result<Step> {
    let mode = if tmpfs.mode == 0 { 0o1777 } else { tmpfs.mode & 0o7777 };
    let mut options = format!("mode={mode:o}");
    if tmpfs.size != 0 {
        options.push_str(&format!(",size={}", tmpfs.size));
    }
    let mut flags = libc::MS_NOSUID | libc::MS_NODEV;
    if tmpfs.noexec {
        flags |= libc::MS_NOEXEC;
    }
    if tmpfs.read_only {
        flags |= libc::MS_RDONLY;
    }
    plan::mount("tmpfs", &tmpfs.path, flags, &options)
}

fn setting_path(name: &str) -> String {
    // Dots separate unless slashes do: `net.ipv4.conf.eth0/1.x` is the kernel's own notation.
    let name = if name.contains('/') { name.to_owned() } else { name.replace('.', "/") };
    format!("/proc/sys/{name}")
}

/// Refuses what could not be meant.
fn check(setup: &Setup) -> Result<(), Failure> {
    let bad = |message: String| Err(Failure::new(FailureKind::BadRequest, message));
    etc::check_hostname(&setup.hostname)?;
    if !(0..=64).contains(&setup.stop_signal) {
        return bad(format!("{} is no signal; 1 to 64 are", setup.stop_signal));
    }
    if setup.tmpfs.len() > MAX_MOUNTS || setup.disks.len() > MAX_MOUNTS {
        return bad(format!("More than {MAX_MOUNTS} disks or memory file systems were given"));
    }
    let disk = |d: &&Disk| !d.path.is_empty();
    let paths = setup.tmpfs.iter().map(|t| &t.path);
    for path in paths.chain(setup.disks.iter().filter(disk).map(|d| &d.path)) {
        let root = path.split('/').all(|part| part.is_empty() || part == ".");
        if !path.starts_with('/') || root || path.contains('\0') {
            return bad(format!("{path:?} is no place to mount; it must be absolute and not /"));
        }
    }
    for (name, _) in &setup.sysctls {
        if name.is_empty() || setting_path(name).contains("/../") || name.contains('\0') {
            return bad(format!("{name:?} is no kernel setting; they are like net.core.somaxconn"));
        }
    }
    etc::check(setup)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_found_by_dots_or_slashes() {
        assert_eq!(setting_path("net.core.somaxconn"), "/proc/sys/net/core/somaxconn");
        assert_eq!(setting_path("net/ipv4/conf/eth0.1/x"), "/proc/sys/net/ipv4/conf/eth0.1/x");
    }

    #[test]
    fn what_could_not_be_meant_is_refused() {
        let tmpfs = |path: &str| Setup {
            tmpfs: vec![Tmpfs { path: path.into(), ..Tmpfs::default() }],
            ..Setup::default()
        };
        for path in ["", "/", "//./", "tmp", "/a\0"] {
            assert!(check(&tmpfs(path)).is_err(), "{path:?}");
        }
        assert!(check(&tmpfs("/tmp")).is_ok());
        let name = |hostname: String| Setup { hostname, ..Setup::default() };
        assert!(check(&name("a".repeat(65))).is_err());
        assert!(check(&name("a/b".into())).is_err());
        let sysctl =
            Setup { sysctls: vec![("net/../../../etc/passwd".into(), "x".into())], ..Setup::default() };
        assert!(check(&sysctl).is_err());
    }

    #[test]
    fn a_tmpfs_has_dockers_defaults() {
        let step = tmpfs_step(&Tmpfs { path: "/t".into(), size: 9, ..Tmpfs::default() }).unwrap();
        let Step::Mount { data, flags, .. } = step else { unreachable!() };
        assert_eq!(data.to_str().unwrap(), "mode=1777,size=9");
        assert_eq!(flags, libc::MS_NOSUID | libc::MS_NODEV);
    }
}
