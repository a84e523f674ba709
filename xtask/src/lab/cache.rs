//! What every lab start needs and only the first one makes: Debian's generic kernel, its
//! module tree, and the kernel's uncompressed form.
//!
//! ```text
//!   $NACELLE_LAB_CACHE | /var/cache/nacelle/lab (root) | $XDG_CACHE_HOME/nacelle/lab
//!     lock                one maker at a time
//!     v1/vmlinux          the ELF file out of Debian's vmlinuz: QEMU starts it by PVH, which
//!                         saves the emulated processor three seconds of unpacking
//!     v1/lib/modules/REL  drivers the lab can load; sound, graphics and network cards left out
//! ```
//!
//! The generic kernel and not the cloud one, because only that has `kvm_amd`. The folder is
//! made under another name and renamed, so a half-made one is never used; `v1` rises when its
//! layout changes. To get a newer kernel, remove it.

use std::collections::HashSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{debian, elf_kernel, host, progress};

/// What the root file system of the lab stands on.
const FIRST: [&str; 4] = ["virtio_pci", "9p", "9pnet_virtio", "overlay"];
/// What commands in the lab expect.
const REST: [&str; 6] = ["virtio_console", "kvm_amd", "tun", "vhost_net", "vhost_vsock", "loop"];
/// What the way out needs.
const NETWORK: &str = "virtio_net";
/// Subtrees of drivers that the emulated machine can have no use for.
const LEFT_OUT: [&str; 9] = [
    "sound",
    "drivers/gpu",
    "drivers/media",
    "drivers/infiniband",
    "drivers/iio",
    "drivers/net/ethernet",
    "drivers/net/wireless",
    "drivers/scsi",
    "drivers/staging",
];

/// The lab's files.
pub struct Cache {
    /// The kernel, ELF with a PVH entry.
    pub kernel: PathBuf,
    /// `lib/modules`, with one release in it.
    pub modules: PathBuf,
    /// Modules for the root file system, in order of loading.
    pub first: Vec<PathBuf>,
    /// Other modules, in order of loading.
    pub rest: Vec<PathBuf>,
    /// Those for the network, to be loaded after the others.
    pub network: Vec<PathBuf>,
}

impl Cache {
    /// Gives the lab's files, made first if they are not there.
    pub fn ready() -> Result<Self> {
        let home = host::cache_directory("NACELLE_LAB_CACHE", "lab")?;
        let place = home.join("v1");
        if !place.exists() {
            let _lock = host::lock(&home.join("lock"))?;
            if !place.exists() {
                make(&home, &place).context("Cannot prepare the lab")?;
            }
        }
        Self::load(&place)
    }

    fn load(place: &Path) -> Result<Self> {
        let modules = place.join("lib/modules");
        let tree = debian::only_entry(&modules)?;
        let index = ModuleIndex::read(&tree)?;
        let mut seen = HashSet::new();
        let first = index.order(&FIRST, &mut seen)?;
        let rest = index.order(&REST, &mut seen)?;
        let network = index.order(&[NETWORK], &mut seen)?;
        Ok(Self { kernel: place.join("vmlinux"), modules, first, rest, network })
    }
}

fn make(home: &Path, place: &Path) -> Result<()> {
    host::need("the lab", &host::LAB_PACKAGES)?;
    let work = host::work_folder(home, "new-")?;
    let package = debian::fetch("linux-image-amd64", "linux-image-", work.path())?;
    progress::step("Unpacking the lab's kernel", || {
        let tree = work.path().join("v1");
        debian::unpack(&package, &tree)?;
        let release = debian::only_entry(&tree.join("lib/modules"))?;
        for folder in LEFT_OUT {
            let folder = release.join("kernel").join(folder);
            if folder.exists() {
                fs::remove_dir_all(folder)?;
            }
        }
        let name = release.file_name().context("The kernel has no release name")?;
        host::run(Command::new("depmod").arg("-b").arg(&tree).arg(name))?;
        let image = tree.join("boot").join(format!("vmlinuz-{}", name.to_string_lossy()));
        elf_kernel::extract(&image, &tree.join("vmlinux"))?;
        for folder in ["usr", "boot"] {
            let _ = fs::remove_dir_all(tree.join(folder));
        }
        fs::rename(&tree, place)?;
        File::open(home)?.sync_all()?;
        Ok(())
    })
}

/// `modules.dep`: what must be loaded before what.
struct ModuleIndex {
    tree: PathBuf,
    lines: String,
}

impl ModuleIndex {
    fn read(tree: &Path) -> Result<Self> {
        let path = tree.join("modules.dep");
        let lines = fs::read_to_string(&path).with_context(|| format!("Cannot read {}", path.display()))?;
        Ok(Self { tree: tree.to_owned(), lines })
    }

    /// Paths of the modules `names` and all they need, what is needed first, without those in
    /// `seen`.
    fn order(&self, names: &[&str], seen: &mut HashSet<PathBuf>) -> Result<Vec<PathBuf>> {
        let mut ordered = Vec::new();
        for name in names {
            let Some((module, needs)) = self
                .lines
                .lines()
                .find_map(|line| line.split_once(':').filter(|(module, _)| module_name(module) == *name))
            else {
                bail!("The lab's kernel has no module {name}");
            };
            for path in needs.split_whitespace().rev().chain([module]) {
                let path = self.tree.join(path);
                if seen.insert(path.clone()) {
                    ordered.push(path);
                }
            }
        }
        Ok(ordered)
    }
}

fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_need_and_only_once() {
        let index = ModuleIndex {
            tree: PathBuf::from("/m"),
            lines: "k/vhost-net.ko: k/tap.ko k/vhost.ko k/iotlb.ko\nk/vhost.ko: k/iotlb.ko\n\
                    k/iotlb.ko:\nk/tap.ko:\n"
                .to_owned(),
        };
        let mut seen = HashSet::new();
        let order = index.order(&["vhost", "vhost_net"], &mut seen).unwrap();
        let names: Vec<_> = order.iter().filter_map(|p| p.to_str()).collect();
        assert_eq!(names, ["/m/k/iotlb.ko", "/m/k/vhost.ko", "/m/k/tap.ko", "/m/k/vhost-net.ko"]);
    }

    #[test]
    fn a_module_that_is_not_there_is_named() {
        let index = ModuleIndex { tree: PathBuf::new(), lines: String::new() };
        let error = index.order(&["kvm_amd"], &mut HashSet::new()).unwrap_err();
        assert!(error.to_string().contains("kvm_amd"));
    }
}
