//! Which kernel a container's machine boots, and the initial RAM disk that goes with it.
//!
//! In order: what was asked for (`--kernel`, `NACELLE_KERNEL`), nacelle's own kernel where it
//! was built, a distribution's kernel fetched for it, and the host's own. The first has
//! everything built in; for the others the modules that the agent and the devices need are
//! put into the initial RAM disk. So there is always one, with nothing built at all.

use std::{
    env, fs,
    hash::{DefaultHasher, Hash, Hasher},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::failure::{Failure, Outcome, doing};

/// A kernel and, if it has modules, where they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// The image: an ELF `vmlinux` or a `bzImage`.
    pub image: PathBuf,
    /// Its `/lib/modules/<release>`.
    pub modules: Option<PathBuf>,
}

/// The cache: `NACELLE_CACHE_DIR`, `/var/cache/nacelle` for root, or the user's own.
pub fn cache_directory() -> PathBuf {
    let variable = |name| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    // SAFETY: reads a number.
    let root = unsafe { libc::geteuid() } == 0;
    let user = || {
        let home = variable("HOME").unwrap_or_else(|| "/".into());
        variable("XDG_CACHE_HOME").unwrap_or_else(|| home.join(".cache")).join("nacelle")
    };
    let system = || if root { "/var/cache/nacelle".into() } else { user() };
    variable("NACELLE_CACHE_DIR").unwrap_or_else(system)
}

impl Kernel {
    /// The kernel to boot. `asked` is what `--kernel` said.
    pub fn choose(asked: Option<&Path>, cache: &Path) -> Outcome<Kernel> {
        let variable = env::var_os("NACELLE_KERNEL").filter(|v| !v.is_empty()).map(PathBuf::from);
        if let Some(path) = asked.map(Path::to_owned).or(variable) {
            return Kernel::at(&path);
        }
        let kernels = cache.join("kernels");
        let own = kernels.join("current");
        let fetched = newest(&kernels, "debian-");
        let candidates = [Some(own.clone()), fetched].into_iter().flatten();
        if let Some(kernel) = candidates.filter(|c| c.is_dir()).find_map(|c| Kernel::at(&c).ok()) {
            return Ok(kernel);
        }
        host_kernel().ok_or_else(|| {
            Failure::new(format!(
                "No guest kernel was found: none in {}, and no /boot/vmlinuz-* with modules; build one with \
                 'cargo xtask kernel', or name one with --kernel or NACELLE_KERNEL",
                kernels.display()
            ))
        })
    }

    /// The kernel in a file, or in a directory as the cache holds them.
    pub fn at(path: &Path) -> Outcome<Kernel> {
        let found = |what: &str| format!("Kernel {} {what}", path.display());
        let metadata = doing(fs::metadata(path), || found("cannot be read"))?;
        if metadata.is_file() {
            return Ok(Kernel { image: path.to_owned(), modules: modules_beside(path) });
        }
        let image = ["vmlinux", "bzImage", "vmlinuz"].into_iter().map(|n| path.join(n)).find(|p| p.is_file());
        let image = image.ok_or_else(|| {
            Failure::new(found("is a directory without a vmlinux, bzImage or vmlinuz in it"))
        })?;
        Ok(Kernel { image, modules: only_entry(&path.join("modules/lib/modules")) })
    }

    /// The initial RAM disk with the agent and this kernel's modules, from the cache or made.
    pub fn initrd(&self, cache: &Path) -> Outcome<PathBuf> {
        let agent = agent()?;
        let modules = match &self.modules {
            Some(directory) => guest::modules::resolve_default(directory)?,
            None => Vec::new(),
        };
        let mut hasher = DefaultHasher::new();
        for path in std::iter::once(&agent).chain(&modules) {
            let of = doing(fs::metadata(path), || format!("{} cannot be read", path.display()))?;
            (path, of.len(), of.mtime(), of.mtime_nsec()).hash(&mut hasher);
        }
        let directory = cache.join("initrd");
        let made = fs::create_dir_all(&directory);
        doing(made, || format!("{} cannot be made", directory.display()))?;
        let path = directory.join(format!("{:016x}.cpio", hasher.finish()));
        if !path.is_file() {
            guest::initrd::write(&path, &agent, &modules)?;
        }
        Ok(path)
    }
}

/// The agent's binary: named by `NACELLE_AGENT`, or where it is installed.
pub fn agent() -> Outcome<PathBuf> {
    if let Some(path) = env::var_os("NACELLE_AGENT").filter(|v| !v.is_empty()) {
        return Ok(path.into());
    }
    let own = doing(env::current_exe(), || "The path of this program cannot be found".to_owned())?;
    beside(&own, "nacelle-agent").map_err(|places| {
        Failure::new(format!(
            "The guest agent was not found at {places}; install nacelle-agent there or name it with \
             NACELLE_AGENT"
        ))
    })
}

/// Another program of this package, where it is installed: beside `own`, or in `libexec`. An
/// error is the places where it is not.
pub fn beside(own: &Path, name: &str) -> Result<PathBuf, String> {
    let library = own.parent().and_then(Path::parent).map(|p| p.join("libexec/nacelle").join(name));
    let places: Vec<PathBuf> = std::iter::once(own.with_file_name(name)).chain(library).collect();
    places.iter().find(|p| p.is_file()).cloned().ok_or_else(|| {
        let looked: Vec<_> = places.iter().map(|p| p.display().to_string()).collect();
        looked.join(" or ")
    })
}

/// Modules for a kernel file: in `modules/` beside it, or installed for the release in its name.
fn modules_beside(image: &Path) -> Option<PathBuf> {
    let near = image.parent().map(|p| p.join("modules/lib/modules")).and_then(|p| only_entry(&p));
    let name = image.file_name()?.to_str()?;
    let release = name.strip_prefix("vmlinuz-").or_else(|| name.strip_prefix("vmlinux-"));
    let installed = || release.map(|r| Path::new("/lib/modules").join(r)).filter(|p| p.is_dir());
    near.or_else(installed)
}

fn only_entry(directory: &Path) -> Option<PathBuf> {
    let mut entries = fs::read_dir(directory).ok()?.flatten().map(|e| e.path()).filter(|p| p.is_dir());
    entries.next().filter(|_| entries.next().is_none())
}

/// The entry of `directory` whose name starts with `prefix` and sorts last.
fn newest(directory: &Path, prefix: &str) -> Option<PathBuf> {
    let entries = fs::read_dir(directory).ok()?.flatten().map(|e| e.path());
    let named = |p: &PathBuf| p.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(prefix));
    entries.filter(named).max()
}

/// The host distribution's own kernel: the running release, or the newest with modules.
fn host_kernel() -> Option<Kernel> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let running = PathBuf::from(format!("/boot/vmlinuz-{}", release.trim()));
    let candidates = [Some(running), newest(Path::new("/boot"), "vmlinuz-")];
    let usable = |p: PathBuf| {
        let modules = modules_beside(&p)?;
        p.is_file().then_some(Kernel { image: p, modules: Some(modules) })
    };
    candidates.into_iter().flatten().find_map(usable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_as_the_cache_holds_it_has_an_image_and_modules() {
        let dir = tempfile::tempdir().unwrap();
        let modules = dir.path().join("modules/lib/modules/6.1.0-test");
        fs::create_dir_all(&modules).unwrap();
        let empty = Kernel::at(dir.path()).unwrap_err().message;
        assert!(empty.contains("without a vmlinux"), "{empty}");
        fs::write(dir.path().join("vmlinuz"), "").unwrap();
        let kernel = Kernel::at(dir.path()).unwrap();
        assert_eq!(kernel.modules, Some(modules.clone()));
        assert_eq!(Kernel::at(&dir.path().join("vmlinuz")).unwrap().modules, Some(modules));
    }

    #[test]
    fn a_missing_kernel_is_named() {
        let error = Kernel::at(Path::new("/nonexistent/kernel")).unwrap_err();
        assert!(error.message.contains("/nonexistent/kernel"));
        assert!(!error.causes.is_empty());
    }

    #[test]
    fn the_newest_of_a_kind_is_the_last_by_name() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["debian-6.1.0-9", "debian-6.1.1-1", "other"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        assert_eq!(newest(dir.path(), "debian-"), Some(dir.path().join("debian-6.1.1-1")));
    }
}
