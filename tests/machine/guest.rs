//! The initial file system of a test's guest: busybox, the modules its kernel needs, a script,
//! and this program where the script needs more than busybox can.
//!
//! The script tells what it found on the console:
//!
//! ```text
//!   fact NAME VALUE      @NAME=VALUE
//!   part NAME COMMAND    @begin NAME, what the command prints, @end NAME
//!   restart              the machine is reset by the way on its command line
//!   at the end           @exit=CODE, then the machine is switched off
//! ```
//!
//! Ending a machine forgets what its serial port has not sent yet, so it is waited for first
//! (`drain`: changing a terminal's mode does that).

use std::{env, fs, path::Path};

use guest::{initrd::loadable_part, modules};

use crate::kernel::Kernel;

/// What every guest's process 1 does before and after the script.
const INIT: &str = r#"#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
stty -echo
while read -r name; do insmod /modules/$name || echo "@module=$name cannot be loaded"; done < /order
cat > /prelude <<'END'
fact() { name=$1; shift; echo "@$name=$*"; }
part() { name=$1; shift; echo "@begin $name"; "$@"; echo "@end $name"; }
drain() { stty -echo; }
restart() { drain; reboot -f; }
END
sh -e -c '. /prelude; . /script'
echo "@exit=$?"
stty -echo
poweroff -f
"#;

/// Modules for what a test's guest drives.
const REQUIRED: [&str; 5] =
    ["virtio_mmio", "virtio_pci", "virtio_blk", "virtio_net", "vmw_vsock_virtio_transport"];
const OPTIONAL: [&str; 9] = [
    "virtio_console",
    "virtio_rng",
    "evdev",
    "button",
    "virtio_pmem",
    "nd_pmem",
    "virtio_balloon",
    "virtio_mem",
    "pvpanic_mmio",
];

/// Writes the archive for `kernel` to `path`. With `side`, this program is `/bin/side` in it.
pub fn write_initrd(path: &Path, kernel: &Kernel, script: &str, side: bool) {
    let mut archive = Archive::default();
    for directory in ["bin", "dev", "proc", "sys", "tmp", "modules"] {
        archive.entry(directory, 0o040_755, 0, b"");
    }
    archive.entry("dev/console", 0o020_600, 5 << 8 | 1, b"");
    let busybox = fs::read("/bin/busybox").expect("Debian's package busybox-static is needed for guests");
    archive.entry("bin/busybox", 0o100_755, 0, &busybox);
    archive.entry("init", 0o100_755, 0, INIT.as_bytes());
    archive.entry("script", 0o100_644, 0, script.as_bytes());
    let files = kernel.modules.as_ref().map(|from| modules::resolve(from, &REQUIRED, &OPTIONAL).unwrap());
    let mut order = String::new();
    for file in files.iter().flatten() {
        let name = file.file_name().unwrap().to_str().unwrap();
        archive.entry(&format!("modules/{name}"), 0o100_644, 0, &fs::read(file).unwrap());
        order += &format!("{name}\n");
    }
    archive.entry("order", 0o100_644, 0, order.as_bytes());
    if side {
        let own = fs::read(env::current_exe().unwrap()).unwrap();
        archive.entry("bin/side", 0o100_755, 0, &loadable_part(&own).unwrap());
    }
    archive.entry("TRAILER!!!", 0, 0, b"");
    fs::write(path, archive.0).unwrap();
}

/// An archive in the "newc" cpio format.
#[derive(Default)]
struct Archive(Vec<u8>);

impl Archive {
    /// Adds an entry; `device` is major and minor in one.
    fn entry(&mut self, name: &str, mode: usize, device: usize, content: &[u8]) {
        let inode = self.0.len();
        let fields =
            [inode, mode, 0, 0, 1, 0, content.len(), 0, 0, device >> 8, device & 255, name.len() + 1, 0];
        self.0.extend_from_slice(b"070701");
        for field in fields {
            self.0.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        for bytes in [name.as_bytes(), b"\0"] {
            self.0.extend_from_slice(bytes);
        }
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}
