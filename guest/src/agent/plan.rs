//! The container's file tree as a list of steps, made by the agent and carried out by the
//! container's first process.
//!
//! Some of it can only be done from inside (a `/proc` shows the process namespace it was
//! mounted in), where a fork of a program with threads must not allocate, lock or panic. So
//! every string is made beforehand, and what remains is a loop over system calls
//! ([`Plan::carry_out`]). A failure is the number of its step, which the agent turns back into
//! words. And a plan can be tested without a machine.

use super::syscall::cstring;
use std::{
    ffi::{CStr, CString},
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

/// One step.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Make a directory; one that is there is fine.
    Directory { path: CString, mode: libc::mode_t },
    /// Make an empty file; one that is there is fine.
    File { path: CString },
    /// Make a symbolic link; anything that is there is fine.
    Link { path: CString, to: CString },
    /// Make a device node.
    Device { path: CString, mode: libc::mode_t, device: libc::dev_t },
    /// `mount(2)`.
    Mount { source: CString, path: CString, kind: CString, flags: libc::c_ulong, data: CString },
    /// Write a kernel setting.
    Setting { path: CString, value: CString },
    /// Attach a mount that the agent has prepared.
    Graft { mount: RawFd, path: CString },
    /// Make a directory the root, and leave the old root behind.
    Pivot { path: CString },
    /// Take the machine's control groups from here on for the whole.
    OwnCgroups,
}

/// Steps in order.
#[derive(Debug, Default)]
pub struct Plan {
    steps: Vec<(Step, bool)>,
    /// Mounts to graft; kept open until the plan is carried out.
    grafts: Vec<OwnedFd>,
}

/// `nosuid,nodev,noexec`.
pub const PLAIN: libc::c_ulong = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;

impl Plan {
    /// Adds a step that must succeed.
    pub fn must(&mut self, step: Step) -> &mut Self {
        self.steps.push((step, true));
        self
    }

    /// Adds a step that may fail.
    pub fn may(&mut self, step: Step) -> &mut Self {
        self.steps.push((step, false));
        self
    }

    /// Steps for a directory and all above it. Trailing and double slashes are nothing.
    pub fn directories(&mut self, path: &str, mode: libc::mode_t) -> io::Result<&mut Self> {
        let mut so_far = String::new();
        for part in path.split('/').filter(|p| !p.is_empty() && *p != ".") {
            so_far.push('/');
            so_far.push_str(part);
            // What truly fails shows when the directory is used.
            self.may(Step::Directory { path: cstring(&so_far)?, mode });
        }
        Ok(self)
    }

    /// A mount step from plain strings.
    pub fn mount(
        &mut self,
        kind: &str,
        path: &str,
        flags: libc::c_ulong,
        data: &str,
    ) -> io::Result<&mut Self> {
        let step = mount(kind, path, flags, data)?;
        Ok(self.must(step))
    }

    /// A step to attach `mount` at `path`.
    pub fn graft(&mut self, mount: OwnedFd, path: &str, must: bool) -> io::Result<&mut Self> {
        let step = Step::Graft { mount: mount.as_raw_fd(), path: cstring(path)? };
        self.grafts.push(mount);
        self.steps.push((step, must));
        Ok(self)
    }

    /// What step `index` does, for people.
    pub fn describe(&self, index: usize) -> String {
        let text = |c: &CString| c.to_string_lossy().into_owned();
        match self.steps.get(index).map(|(step, _)| step) {
            Some(Step::Directory { path, .. }) => format!("make the directory {}", text(path)),
            Some(Step::File { path }) => format!("make the file {}", text(path)),
            Some(Step::Link { path, .. }) => format!("make the link {}", text(path)),
            Some(Step::Device { path, .. }) => format!("make the device {}", text(path)),
            Some(Step::Setting { path, value }) => format!("write {:?} to {}", text(value), text(path)),
            Some(Step::Mount { path, kind, .. }) if kind.is_empty() => {
                format!("change the mount of {}", text(path))
            }
            Some(Step::Mount { path, kind, .. }) => format!("mount {} on {}", text(kind), text(path)),
            Some(Step::Graft { path, .. }) => format!("mount on {}", text(path)),
            Some(Step::Pivot { .. }) => "enter the container's root".into(),
            Some(Step::OwnCgroups) => "make a namespace for control groups".into(),
            None => "do an unknown step".into(),
        }
    }

    /// Carries the plan out; on failure the number of the step and the kernel's error.
    ///
    /// Runs between fork and exec: nothing but system calls.
    pub fn carry_out(&self) -> Result<(), (usize, i32)> {
        for (index, (step, must)) in self.steps.iter().enumerate() {
            let result = step.carry_out();
            if *must && result < 0 {
                return Err((index, errno()));
            }
        }
        Ok(())
    }

    #[cfg(test)]
    fn steps(&self) -> impl Iterator<Item = &Step> {
        self.steps.iter().map(|(step, _)| step)
    }
}

/// A mount step from plain strings; the source is named after the type.
pub fn mount(kind: &str, path: &str, flags: libc::c_ulong, data: &str) -> io::Result<Step> {
    Ok(Step::Mount {
        source: cstring(kind)?,
        path: cstring(path)?,
        kind: cstring(kind)?,
        flags,
        data: cstring(data)?,
    })
}

fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

fn fine_if_there(result: libc::c_int) -> libc::c_int {
    if result < 0 && errno() == libc::EEXIST { 0 } else { result }
}

impl Step {
    fn carry_out(&self) -> libc::c_int {
        match self {
            // SAFETY: (this and the following) zero-terminated strings that outlive the call.
            Self::Directory { path, mode } => unsafe { fine_if_there(libc::mkdir(path.as_ptr(), *mode)) },
            Self::File { path } => {
                let flags = libc::O_CREAT | libc::O_WRONLY | libc::O_CLOEXEC | libc::O_NONBLOCK;
                // SAFETY: as above; the descriptor is closed at once.
                unsafe {
                    let fd = libc::open(path.as_ptr(), flags, 0o644 as libc::c_uint);
                    if fd < 0 { fd } else { libc::close(fd) }
                }
            }
            // SAFETY: as above.
            Self::Link { path, to } => unsafe { fine_if_there(libc::symlink(to.as_ptr(), path.as_ptr())) },
            // SAFETY: as above.
            Self::Device { path, mode, device } => unsafe { libc::mknod(path.as_ptr(), *mode, *device) },
            // SAFETY: as above.
            Self::Mount { source, path, kind, flags, data } => unsafe {
                libc::mount(source.as_ptr(), path.as_ptr(), kind.as_ptr(), *flags, data.as_ptr().cast())
            },
            Self::Setting { path, value } => write_setting(path, value),
            Self::Graft { mount, path } => graft(*mount, path),
            Self::Pivot { path } => pivot(path),
            // SAFETY: unshare has no memory arguments.
            Self::OwnCgroups => unsafe { libc::unshare(libc::CLONE_NEWCGROUP) },
        }
    }
}

fn graft(mount: RawFd, path: &CStr) -> libc::c_int {
    const MOVE_MOUNT_T_SYMLINKS: libc::c_uint = 0x10;
    const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 0x04;
    let flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_SYMLINKS;
    // SAFETY: zero-terminated strings that outlive the call.
    let result = unsafe {
        libc::syscall(libc::SYS_move_mount, mount, c"".as_ptr(), libc::AT_FDCWD, path.as_ptr(), flags)
    };
    result as libc::c_int
}

fn write_setting(path: &CStr, value: &CStr) -> libc::c_int {
    // SAFETY: zero-terminated strings; the bytes written are those of one of them.
    unsafe {
        let fd = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if fd < 0 {
            return fd;
        }
        let length = value.count_bytes();
        let written = libc::write(fd, value.as_ptr().cast(), length);
        let error = errno();
        libc::close(fd);
        *libc::__errno_location() = error;
        if written == length.cast_signed() { 0 } else { -1 }
    }
}

fn pivot(path: &CStr) -> libc::c_int {
    let here = c".".as_ptr();
    // SAFETY: zero-terminated strings that outlive the calls. With the same directory for new
    // and old root, the old one is stacked over the new and unmounted from there.
    unsafe {
        if libc::chdir(path.as_ptr()) < 0
            || libc::syscall(libc::SYS_pivot_root, here, here) < 0
            || libc::umount2(here, libc::MNT_DETACH) < 0
        {
            return -1;
        }
        libc::chdir(c"/".as_ptr())
    }
}

/// The devices every container has, with their numbers (Linux `admin-guide/devices`).
const DEVICES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

const LINKS: [(&str, &str); 6] = [
    ("ptmx", "pts/ptmx"),
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("core", "/proc/kcore"),
];

/// The plan's beginning, the same for every container: its root, and `/proc`, `/sys` and
/// `/dev` as Docker mounts them. `/proc/sys` can be written: these settings are the
/// machine's own, and the machine is the container's.
pub fn kernel_files(root: &str, shm_size: u64) -> io::Result<Plan> {
    let mut plan = Plan::default();
    let private = libc::MS_REC | libc::MS_PRIVATE;
    let read_only = PLAIN | libc::MS_RDONLY;
    plan.must(Step::OwnCgroups)
        .mount("", "/", private, "")?
        .must(Step::Pivot { path: cstring(root)? })
        .directories("/proc", 0o555)?
        .mount("proc", "/proc", PLAIN, "")?
        .directories("/sys", 0o555)?
        .mount("sysfs", "/sys", read_only, "")?
        .may(mount("cgroup2", "/sys/fs/cgroup", read_only, "")?)
        .directories("/dev", 0o755)?
        .mount("tmpfs", "/dev", libc::MS_NOSUID | libc::MS_NOEXEC, "mode=755,size=65536k")?
        .directories("/dev/pts", 0o755)?
        .mount(
            "devpts",
            "/dev/pts",
            libc::MS_NOSUID | libc::MS_NOEXEC,
            "newinstance,ptmxmode=0666,mode=0620,gid=5",
        )?
        .directories("/dev/shm", 0o755)?
        .mount("tmpfs", "/dev/shm", PLAIN, &format!("mode=1777,size={shm_size}"))?
        .directories("/dev/mqueue", 0o755)?
        .may(mount("mqueue", "/dev/mqueue", PLAIN, "")?);
    for (name, major, minor) in DEVICES {
        plan.must(device(&format!("/dev/{name}"), libc::S_IFCHR | 0o666, major, minor)?);
    }
    for (name, to) in LINKS {
        plan.must(Step::Link { path: cstring(format!("/dev/{name}"))?, to: cstring(to)? });
    }
    Ok(plan)
}

/// A step for a device node.
pub fn device(path: &str, mode: libc::mode_t, major: u32, minor: u32) -> io::Result<Step> {
    Ok(Step::Device { path: cstring(path)?, mode, device: libc::makedev(major, minor) })
}

/// The step that makes everything on the root's own file system read-only.
pub fn seal() -> Step {
    let empty = CString::default;
    let flags = libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY;
    Step::Mount { source: empty(), path: c"/".into(), kind: empty(), flags, data: empty() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_made_from_the_top() {
        let mut plan = Plan::default();
        plan.directories("/a//b/./c/", 0o755).unwrap();
        let paths: Vec<_> = plan.steps().map(|s| format!("{s:?}")).collect();
        assert_eq!(paths.len(), 3);
        assert!(paths[0].contains("\"/a\"") && paths[2].contains("\"/a/b/c\""));
    }

    #[test]
    fn a_zero_byte_in_a_path_is_an_error() {
        assert!(Plan::default().directories("/a\0b", 0o755).is_err());
        assert!(kernel_files("/x\0", 1).is_err());
    }

    #[test]
    fn nothing_is_mounted_before_the_root_is_entered() {
        let plan = kernel_files("/root", 1 << 20).unwrap();
        let pivot = plan.steps().position(|s| matches!(s, Step::Pivot { .. })).unwrap();
        let proc = plan.describe(plan.steps().position(|s| format!("{s:?}").contains("/proc")).unwrap());
        assert!(plan.steps().take(pivot).all(|s| match s {
            Step::Mount { path, .. } => path.as_c_str() == c"/",
            Step::OwnCgroups => true,
            _ => false,
        }));
        assert_eq!(proc, "make the directory /proc");
    }

    #[test]
    fn a_failed_step_is_named_and_an_optional_one_is_not() {
        let mut plan = Plan::default();
        plan.may(mount("no-such-type", "/no/such/place", 0, "").unwrap());
        assert_eq!(plan.carry_out(), Ok(()));
        plan.mount("no-such-type", "/no/such/place", 0, "").unwrap();
        let (step, error) = plan.carry_out().unwrap_err();
        assert_eq!((step, error > 0), (1, true));
        assert_eq!(plan.describe(step), "mount no-such-type on /no/such/place");
        assert_eq!(plan.describe(99), "do an unknown step");
    }
}
