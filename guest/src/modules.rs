//! Which kernel modules a distribution's kernel needs to be a machine's kernel.
//!
//! A distribution ships under `/lib/modules/<release>` the modules, `modules.dep` (what each
//! needs) and `modules.builtin` (what needs no module). From a list of names this makes the
//! list of files to load, each after all that it needs. What the kernel has built in is left
//! out, so for a kernel of our own the answer is empty.
//!
//! Some needs are not in `modules.dep`: ext4 asks the kernel's crypto interface for "crc32c" by
//! name when it mounts, and nothing in a machine could answer that call. Such names stand in
//! `modules.softdep` and `modules.alias`; they are loaded first where the kernel has them.
//!
//! The indexes are read as text; their binary twins exist for speed in tools that are called
//! a thousand times a boot, and this is called once a kernel.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

/// What a machine cannot do without, whatever it is made of: its bus, its disks and network,
/// the way to its agent, and the file systems of an image.
pub const REQUIRED: &[&str] = &[
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "vmw_vsock_virtio_transport",
    "ext4",
    "overlay",
];

/// What is loaded when the kernel has it.
pub const OPTIONAL: &[&str] = &[
    "erofs",
    "virtio_console",
    "virtio_rng",
    "virtio_balloon",
    "virtio_mem",
    "virtiofs",
    "af_packet",
    "evdev",
    "button",
];

/// Largest index file read, in bytes (Debian's full `modules.dep` has half a megabyte).
const MAX_INDEX: u64 = 64 << 20;

/// Why the modules could not be found.
#[derive(Debug, thiserror::Error)]
pub enum ModulesError {
    /// An index cannot be read.
    #[error("Cannot read {path}; are the modules of this kernel installed (depmod run)?")]
    Index {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A needed module is neither there nor built in.
    #[error(
        "The kernel of {directory} has no {name}, neither built in nor as a module; \
         a machine needs it, take another kernel"
    )]
    Missing {
        /// The module.
        name: String,
        /// The modules' directory.
        directory: PathBuf,
    },
    /// The index names a file that is not there.
    #[error("The module {path} is in the index but not on the disk; install the kernel anew")]
    NoFile {
        /// Which file.
        path: PathBuf,
    },
    /// Modules need each other in a circle.
    #[error("The modules' index says that {name} needs itself; run depmod anew")]
    Circle {
        /// One module of the circle.
        name: String,
    },
}

/// The files to load, in order, for [`REQUIRED`] and as much of [`OPTIONAL`] as there is.
///
/// `directory` is `/lib/modules/<release>`.
///
/// # Errors
/// [`ModulesError`].
pub fn resolve_default(directory: &Path) -> Result<Vec<PathBuf>, ModulesError> {
    resolve(directory, REQUIRED, OPTIONAL)
}

/// The files to load, in order, for all of `required` and as much of `optional` as there is.
///
/// Names are taken with `-` and `_` alike. `directory` is `/lib/modules/<release>`.
///
/// # Errors
/// [`ModulesError`].
pub fn resolve(directory: &Path, required: &[&str], optional: &[&str]) -> Result<Vec<PathBuf>, ModulesError> {
    let index = Index::read(directory)?;
    let mut order = Order { index: &index, files: Vec::new(), done: BTreeSet::new() };
    for name in required {
        if !order.add(name)? {
            return Err(ModulesError::Missing { name: (*name).into(), directory: directory.into() });
        }
    }
    for name in optional {
        order.add(name)?;
    }
    let files: Vec<PathBuf> = order.files.iter().map(|f| directory.join(f)).collect();
    match files.iter().find(|f| !f.is_file()) {
        Some(path) => Err(ModulesError::NoFile { path: path.clone() }),
        None => Ok(files),
    }
}

/// What the kernel has.
struct Index {
    /// Module name to its file and the files it needs.
    modules: BTreeMap<String, (String, Vec<String>)>,
    builtin: BTreeSet<String>,
    /// Module name to the names it would like loaded before it.
    wishes: BTreeMap<String, Vec<String>>,
    /// Those names to the modules that go by them.
    aliases: BTreeMap<String, Vec<String>>,
}

impl Index {
    fn read(directory: &Path) -> Result<Self, ModulesError> {
        let mut modules = BTreeMap::new();
        for line in text(&directory.join("modules.dep"))?.lines() {
            if let Some((file, needs)) = line.split_once(':') {
                let needs = needs.split_whitespace().map(str::to_owned).collect();
                modules.insert(name_of(file), (file.to_owned(), needs));
            }
        }
        let builtin = text(&directory.join("modules.builtin"))?.lines().map(name_of).collect();
        let mut wishes: BTreeMap<String, Vec<String>> = BTreeMap::new();
        // `softdep NAME pre: A B post: C`; both files may be missing.
        for line in text(&directory.join("modules.softdep")).unwrap_or_default().lines() {
            let mut words = line.split_whitespace();
            let (Some("softdep"), Some(name)) = (words.next(), words.next()) else { continue };
            let before = words.skip_while(|w| *w != "pre:").skip(1).take_while(|w| *w != "post:");
            wishes.entry(name.replace('-', "_")).or_default().extend(before.map(str::to_owned));
        }
        let wished: BTreeSet<&str> = wishes.values().flatten().map(String::as_str).collect();
        let mut aliases: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for line in text(&directory.join("modules.alias")).unwrap_or_default().lines() {
            let mut words = line.split_whitespace().skip(1);
            let (Some(alias), Some(name)) = (words.next(), words.next()) else { continue };
            if wished.contains(alias) {
                aliases.entry(alias.into()).or_default().push(name.replace('-', "_"));
            }
        }
        Ok(Self { modules, builtin, wishes, aliases })
    }
}

/// The list being made.
struct Order<'a> {
    index: &'a Index,
    files: Vec<&'a str>,
    done: BTreeSet<&'a str>,
}

impl<'a> Order<'a> {
    /// Adds a module after what it needs; `false` when the kernel does not have it.
    fn add(&mut self, name: &str) -> Result<bool, ModulesError> {
        let name = name.replace('-', "_");
        match self.index.modules.get(&name) {
            Some((file, needs)) => {
                self.add_file(file, needs, &mut Vec::new())?;
                Ok(true)
            }
            None => Ok(self.index.builtin.contains(&name)),
        }
    }

    fn add_file(
        &mut self,
        file: &'a str,
        needs: &'a [String],
        above: &mut Vec<&'a str>,
    ) -> Result<(), ModulesError> {
        if self.done.contains(file) {
            return Ok(());
        }
        if above.contains(&file) {
            return Err(ModulesError::Circle { name: name_of(file) });
        }
        above.push(file);
        for wish in self.index.wishes.get(&name_of(file)).into_iter().flatten() {
            let known = self.index.aliases.get(wish).map_or(&[][..], Vec::as_slice);
            for name in std::iter::once(wish).chain(known) {
                match self.index.modules.get(&name.replace('-', "_")) {
                    // A wish that leads back here is no wish for an order.
                    Some((file, needs)) if !above.contains(&file.as_str()) => {
                        self.add_file(file, needs, above)?;
                    }
                    _ => {}
                }
            }
        }
        // depmod lists needs so that the last one is to be loaded first.
        for need in needs.iter().rev() {
            match self.index.modules.get(&name_of(need)) {
                Some((file, needs)) => self.add_file(file, needs, above)?,
                None if self.index.builtin.contains(&name_of(need)) => {}
                None => return Err(ModulesError::NoFile { path: need.into() }),
            }
        }
        above.pop();
        self.done.insert(file);
        self.files.push(file);
        Ok(())
    }
}

/// `kernel/fs/ext4/ext4.ko.xz` is the module `ext4`; `-` counts as `_`.
fn name_of(file: &str) -> String {
    let base = file.rsplit('/').next().unwrap_or(file);
    let name = base.split_once(".ko").map_or(base, |(name, _)| name);
    name.replace('-', "_")
}

fn text(path: &Path) -> Result<String, ModulesError> {
    let failed = |source| ModulesError::Index { path: path.into(), source };
    let length = fs::metadata(path).map_err(failed)?.len();
    if length > MAX_INDEX {
        return Err(failed(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("It has {length} bytes, at most {MAX_INDEX} are allowed"),
        )));
    }
    fs::read(path).map(|b| String::from_utf8_lossy(&b).into_owned()).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(dep: &str, builtin: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("modules.dep"), dep).unwrap();
        fs::write(dir.path().join("modules.builtin"), builtin).unwrap();
        for line in dep.lines() {
            let file = dir.path().join(line.split(':').next().unwrap());
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, "").unwrap();
        }
        dir
    }

    fn names(dir: &Path, files: &[PathBuf]) -> Vec<String> {
        files.iter().map(|f| f.strip_prefix(dir).unwrap().to_str().unwrap().into()).collect()
    }

    const DEP: &str = "k/ext4.ko.xz: k/jbd2.ko.xz k/mbcache.ko.xz k/crc16.ko.xz\n\
                       k/jbd2.ko.xz:\nk/mbcache.ko.xz:\nk/crc16.ko.xz:\n\
                       k/virtio-blk.ko: k/virtio.ko k/ring.ko\nk/virtio.ko: k/ring.ko\nk/ring.ko:\n";

    #[test]
    fn what_a_module_needs_comes_before_it_and_only_once() {
        let dir = kernel(DEP, "");
        let files = resolve(dir.path(), &["virtio_blk", "ext4", "virtio"], &[]).unwrap();
        let expected = [
            "k/ring.ko",
            "k/virtio.ko",
            "k/virtio-blk.ko",
            "k/crc16.ko.xz",
            "k/mbcache.ko.xz",
            "k/jbd2.ko.xz",
            "k/ext4.ko.xz",
        ];
        assert_eq!(names(dir.path(), &files), expected);
    }

    #[test]
    fn a_soft_need_is_found_by_its_alias_and_comes_first() {
        let dir = kernel("k/fs.ko: k/lib.ko\nk/lib.ko:\nk/sum-generic.ko:\nk/sum-fast.ko:\n", "");
        let soft = "# comment\nsoftdep lib pre: sum absent post: x\nsoftdep sum_fast pre: sum\n";
        fs::write(dir.path().join("modules.softdep"), soft).unwrap();
        let alias = "alias sum sum_generic\nalias sum sum-fast\nalias sum fs\nalias pci:v* lib\n";
        fs::write(dir.path().join("modules.alias"), alias).unwrap();
        let files = resolve(dir.path(), &["fs"], &[]).unwrap();
        let expected = ["k/sum-generic.ko", "k/sum-fast.ko", "k/lib.ko", "k/fs.ko"];
        assert_eq!(names(dir.path(), &files), expected);
    }

    #[test]
    fn what_is_built_in_is_left_out() {
        let dir = kernel("k/a.ko: k/b-c.ko\n", "kernel/net/packet/af_packet.ko\nk/b_c.ko\n");
        fs::remove_file(dir.path().join("k/a.ko")).unwrap();
        assert!(resolve(dir.path(), &["af-packet"], &[]).unwrap().is_empty());
        fs::write(dir.path().join("k/a.ko"), "").unwrap();
        assert_eq!(names(dir.path(), &resolve(dir.path(), &["a"], &[]).unwrap()), ["k/a.ko"]);
    }

    #[test]
    fn a_missing_module_matters_only_if_required() {
        let dir = kernel(DEP, "");
        assert!(resolve(dir.path(), &[], &["erofs"]).unwrap().is_empty());
        let error = resolve(dir.path(), &["erofs"], &[]).unwrap_err();
        assert!(error.to_string().contains("has no erofs"));
    }

    #[test]
    fn a_circle_and_a_lost_file_are_errors_and_not_a_hang() {
        let dir = kernel("k/a.ko: k/b.ko\nk/b.ko: k/a.ko\n", "");
        assert!(matches!(resolve(dir.path(), &["a"], &[]), Err(ModulesError::Circle { .. })));
        let dir = kernel("k/a.ko: k/gone.ko\n", "");
        assert!(matches!(resolve(dir.path(), &["a"], &[]), Err(ModulesError::NoFile { .. })));
        let dir = kernel(DEP, "");
        fs::remove_file(dir.path().join("k/ring.ko")).unwrap();
        assert!(matches!(resolve(dir.path(), &["virtio_blk"], &[]), Err(ModulesError::NoFile { .. })));
    }

    #[test]
    fn a_directory_without_index_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = resolve_default(dir.path()).unwrap_err();
        assert!(error.to_string().contains("modules.dep"));
    }

    #[test]
    fn nonsense_in_the_index_is_skipped() {
        let dir = kernel("", "");
        fs::write(dir.path().join("modules.dep"), b"\xff\xfe\n:::\n\0\n: x\nno colon").unwrap();
        assert!(matches!(resolve(dir.path(), &["ext4"], &[]), Err(ModulesError::Missing { .. })));
    }
}
