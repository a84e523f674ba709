//! Disks: found by the id the host gave them, waited for without asking again and again, and
//! mounted as what is on them.

use super::syscall::{check, mount, owned, read, wait, want};
use guest::protocol::{Failure, FailureKind};
use std::{
    fs,
    io::{self, Read, Seek, SeekFrom},
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Longest wait for a disk to appear.
const LIMIT: Duration = Duration::from_secs(10);

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Name, as `vda`.
    pub name: String,
    pub major: u32,
    pub minor: u32,
}

impl Device {
    /// Its node.
    pub fn path(&self) -> PathBuf {
        Path::new("/dev").join(&self.name)
    }
}

/// Finds the disk with this id, waiting for it if need be.
pub fn find(serial: &str) -> Result<Device, Failure> {
    // Listening begins before looking, so that nothing can appear in between.
    let news = listen();
    let until = Instant::now() + LIMIT;
    loop {
        if let Some(device) = look(Path::new("/sys/block"), serial) {
            return Ok(device);
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Failure::new(
                FailureKind::Disk,
                format!("The machine has no disk with the id {serial:?}"),
            ));
        }
        match &news {
            Ok(news) => {
                let _ = wait(&mut [want(news, libc::POLLIN)], Some(left));
                let mut message = [0; 4096];
                while read(news, &mut message).is_ok() {}
            }
            // Without news, look again now and then.
            Err(_) => std::thread::sleep(left.min(Duration::from_millis(20))),
        }
    }
}

/// A socket on which the kernel announces devices (`NETLINK_KOBJECT_UEVENT`).
pub fn listen() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: socket has no memory arguments.
    let socket = owned(unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_KOBJECT_UEVENT) })?;
    // SAFETY: sockaddr_nl is plain data for which all zeroes is valid.
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
    address.nl_groups = 1;
    let size = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
    // SAFETY: an address with its size.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) })?;
    Ok(socket)
}

fn look(blocks: &Path, serial: &str) -> Option<Device> {
    for entry in fs::read_dir(blocks).ok()?.flatten() {
        let directory = entry.path();
        let text = |file: &str| fs::read_to_string(directory.join(file)).ok();
        if text("serial").is_none_or(|s| s.trim_end_matches(['\n', '\0']) != serial) {
            continue;
        }
        let numbers = text("dev")?;
        let (major, minor) = numbers.trim().split_once(':')?;
        return Some(Device {
            name: entry.file_name().into_string().ok()?,
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
        });
    }
    None
}

/// Mounts a disk; an empty `kind` is recognised.
pub fn attach(device: &Device, at: &Path, kind: &str, read_only: bool) -> Result<(), Failure> {
    let fail = |why: String| {
        Failure::new(FailureKind::Disk, format!("Cannot mount the disk {}: {why}", device.name))
    };
    fs::create_dir_all(at).map_err(|e| fail(e.to_string()))?;
    let path = device.path();
    let found;
    let kind = if kind.is_empty() {
        found = recognise(&path).map_err(|e| fail(format!("cannot read it: {e}")))?;
        found.ok_or_else(|| fail("there is no file system on it that the agent knows".into()))?
    } else {
        kind
    };
    let flags = if read_only || kind == "erofs" || kind == "squashfs" { libc::MS_RDONLY } else { 0 };
    let source = path.to_string_lossy();
    mount(&source, at, kind, flags, "").map_err(|e| match e.raw_os_error() {
        Some(libc::ENODEV) => fail(format!("the machine's kernel has no {kind}")),
        Some(libc::EINVAL | libc::EUCLEAN) => fail(format!("its {kind} file system is damaged")),
        _ => fail(format!("{kind}: {e}")),
    })
}

/// What is on a disk, by the marks file systems leave.
fn recognise(path: &Path) -> io::Result<Option<&'static str>> {
    const MARKS: [(u64, &[u8], &str); 9] = [
        (1024, b"\xe2\xe1\xf5\xe0", "erofs"),
        (1080, b"\x53\xef", "ext4"),
        (0, b"hsqs", "squashfs"),
        (0, b"XFSB", "xfs"),
        (65600, b"_BHRfS_M", "btrfs"),
        (1024, b"\x10\x20\xf5\xf2", "f2fs"),
        (82, b"FAT32", "vfat"),
        (54, b"FAT1", "vfat"),
        (32769, b"CD001", "iso9660"),
    ];
    let mut disk = fs::File::open(path)?;
    for (offset, mark, kind) in MARKS {
        let mut found = [0; 8];
        let found = &mut found[..mark.len()];
        disk.seek(SeekFrom::Start(offset))?;
        match disk.read_exact(found) {
            Ok(()) if found == mark => return Ok(Some(kind)),
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(e) => return Err(e),
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_found_by_its_id_and_not_by_its_place() {
        let dir = tempfile::tempdir().unwrap();
        for (name, serial, dev) in
            [("vda", Some("upper\n"), "253:0\n"), ("vdb", Some("root"), "253:16\n"), ("loop0", None, "7:0")]
        {
            fs::create_dir(dir.path().join(name)).unwrap();
            fs::write(dir.path().join(name).join("dev"), dev).unwrap();
            if let Some(serial) = serial {
                fs::write(dir.path().join(name).join("serial"), serial).unwrap();
            }
        }
        let root = look(dir.path(), "root").unwrap();
        assert_eq!((root.name.as_str(), root.major, root.minor), ("vdb", 253, 16));
        assert_eq!(look(dir.path(), "upper").unwrap().name, "vda");
        assert_eq!(look(dir.path(), ""), None);
    }

    #[test]
    fn file_systems_are_recognised_by_their_marks() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        let write = |bytes: &[u8]| fs::write(&disk, bytes).unwrap();
        write(b"");
        assert_eq!(recognise(&disk).unwrap(), None);
        let mut bytes = vec![0; 4096];
        bytes[1080..1082].copy_from_slice(b"\x53\xef");
        write(&bytes);
        assert_eq!(recognise(&disk).unwrap(), Some("ext4"));
        bytes[1024..1028].copy_from_slice(&0xe0f5_e1e2u32.to_le_bytes());
        write(&bytes);
        assert_eq!(recognise(&disk).unwrap(), Some("erofs"));
    }
}
