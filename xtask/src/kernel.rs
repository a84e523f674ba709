//! Guest kernels: nacelle's own small one, built here, and Debian's cloud kernel, fetched.
//!
//! ```text
//!   $NACELLE_CACHE_DIR | /var/cache/nacelle (root) | $XDG_CACHE_HOME/nacelle
//!     kernels/HASH/{vmlinux,bzImage,config}     built from Debian's kernel source
//!     kernels/current -> HASH                   the last one built
//!     kernels/debian-RELEASE/{vmlinuz,release,modules/lib/modules/RELEASE}   fetched
//! ```
//!
//! HASH is of the version of the source package, the configuration in resources/kernel and the
//! recipe below: the same three give the same kernel, and a change of any of them another
//! folder. Folders are made under another name and renamed, so a half-made one is never used.
//!
//! **The image is packed**, see [`pack`]: as Linux lays itself out, 4 MiB of the memory of each
//! machine hold two KiB of code and nothing else.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::{debian, host, progress};

/// Rises when the steps below change what comes out.
const RECIPE: &str = "2";
/// Where Linux says how its image is laid out.
const LAYOUT: &str = "arch/x86/kernel/vmlinux.lds.S";
/// The configuration, laid over `make allnoconfig`.
const CONFIGURATION: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../resources/kernel/config");

/// The folder of all guest kernels.
pub fn folder() -> Result<PathBuf> {
    let folder = host::cache_directory("NACELLE_CACHE_DIR", "")?.join("kernels");
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// The kernel built last, if there is one.
pub fn built() -> Option<PathBuf> {
    let current = folder().ok()?.join("current");
    current.join("vmlinux").exists().then(|| fs::canonicalize(current).ok()).flatten()
}

/// Builds nacelle's kernel with `jobs` compilers at a time unless it is there; its folder.
pub fn build(jobs: u32) -> Result<PathBuf> {
    host::need("building the guest kernel", &host::KERNEL_PACKAGES)?;
    let source = Source::find()?;
    let fragment =
        fs::read_to_string(CONFIGURATION).with_context(|| format!("Cannot read {CONFIGURATION}"))?;
    let hash = hash(&[RECIPE, &source.version, &fragment]);
    let folder = folder()?;
    let place = folder.join(&hash);
    let _lock = host::lock(&folder.join("lock-build"))?;
    // The work folder goes last: removing a kernel's tree takes a while.
    let _work = if place.exists() { None } else { Some(compile(&folder, &place, &source, &fragment, jobs)?) };
    point_current(&folder, &hash)?;
    Ok(place)
}

/// Debian's kernel source package.
struct Source {
    archive: PathBuf,
    version: String,
}

impl Source {
    fn find() -> Result<Self> {
        let mut archives: Vec<PathBuf> = fs::read_dir("/usr/src")?
            .filter_map(|entry| entry.ok().map(|entry| entry.path()))
            .filter(|path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                name.starts_with("linux-source-") && name.ends_with(".tar.xz")
            })
            .collect();
        archives.sort();
        let archive = archives.pop().context("The package linux-source left no archive in /usr/src")?;
        let name = archive.file_name().unwrap_or_default().to_string_lossy().replace(".tar.xz", "");
        let version = host::run(Command::new("dpkg-query").args(["-W", "-f", "${Version}", &name]))?;
        let version = format!("{name} {}", String::from_utf8_lossy(&version));
        Ok(Self { archive, version })
    }
}

fn hash(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part.len().to_le_bytes());
        hash.update(part);
    }
    hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// Makes the kernel at `place`; the folder it was made in.
fn compile(folder: &Path, place: &Path, source: &Source, fragment: &str, jobs: u32) -> Result<TempDir> {
    let work = host::work_folder(folder, "build-")?;
    progress::step(&format!("Unpacking {}", source.version), || {
        host::run(
            Command::new("tar")
                .args(["-x", "--strip-components=1", "-f"])
                .arg(&source.archive)
                .arg("-C")
                .arg(work.path()),
        )
        .map(drop)
    })?;
    let make = || {
        let mut make = Command::new("make");
        // The same input gives the same bytes: no date, user or host in the kernel.
        make.current_dir(work.path())
            .args(["ARCH=x86_64", "KBUILD_BUILD_TIMESTAMP=@0", "KBUILD_BUILD_USER=nacelle"])
            .args(["KBUILD_BUILD_HOST=nacelle", "KBUILD_BUILD_VERSION=1", "LOCALVERSION=-nacelle"]);
        make
    };
    let layout = work.path().join(LAYOUT);
    fs::write(&layout, pack(&fs::read_to_string(&layout)?)?)?;
    host::run(make().arg(format!("KCONFIG_ALLCONFIG={CONFIGURATION}")).arg("allnoconfig"))?;
    let config = fs::read_to_string(work.path().join(".config"))?;
    check_configuration(fragment, &config)?;
    progress::step_of_program(
        "Compiling the guest kernel (about 8 minutes on two cores)",
        make().arg(format!("-j{jobs}")).args(["vmlinux", "bzImage"]),
    )?;
    let result = work.path().join("result");
    fs::create_dir(&result)?;
    host::run(
        Command::new("strip")
            .arg("-s")
            .arg("-o")
            .arg(result.join("vmlinux"))
            .arg(work.path().join("vmlinux")),
    )?;
    fs::copy(work.path().join("arch/x86/boot/bzImage"), result.join("bzImage"))?;
    fs::write(result.join("config"), config)?;
    publish(&result, place)?;
    Ok(work)
}

/// The linker script `text`, so changed that the image has no 2 MiB pages with next to nothing in
/// them. Each costs every boot its clearing and its reading (2 ms of 250 in the lab).
///
/// ```text
///   as it comes       code | entry code | 2 KiB of code | constants | data, BSS | room | early tables
///   2 MiB pages       4      1            1               1           2 (BSS is cleared up to 4 MiB) 1
///   packed            code, those 2 KiB | entry code | constants | data, BSS, early tables
///   2 MiB pages       4                   1            1           2
/// ```
///
/// The entry code alone begins and ends on 2 MiB, because user space's page tables map it so. And
/// BSS ends on 2 MiB for memory that is shared with the hypervisor of an encrypted guest, which
/// this kernel cannot be: a page is enough.
fn pack(text: &str) -> Result<String> {
    const ENTRY: [&str; 2] = ["\t\tALIGN_ENTRY_TEXT_BEGIN\n", "\t\tALIGN_ENTRY_TEXT_END\n"];
    const CODE_ENDS: &str = "\t} :text";
    const SHARED: &str = "#define BSS_DECRYPTED";
    let unknown = || format!("{LAYOUT} of this kernel is not as expected; the recipe must be looked at");
    let (before, rest) = text.split_once(ENTRY[0]).with_context(unknown)?;
    let (entry, rest) = rest.split_once(ENTRY[1]).with_context(unknown)?;
    let (small, after) = rest.split_once(CODE_ENDS).with_context(unknown)?;
    let text = [before, small, ENTRY[0], entry, ENTRY[1], CODE_ENDS, after].concat();
    // The macro's body: its lines but the last end with a backslash.
    let (before, rest) = text.split_once(SHARED).with_context(unknown)?;
    let (body, after) = rest.split_once("\n\n").with_context(unknown)?;
    let body = body.replace("ALIGN(PMD_SIZE)", "ALIGN(PAGE_SIZE)");
    Ok([before, SHARED, &body, "\n\n", after].concat())
}

/// Every line of the fragment must be in the result; one that is not means that something it
/// depends on is missing, or that this version of the kernel calls it otherwise.
fn check_configuration(fragment: &str, result: &str) -> Result<()> {
    let set: std::collections::HashSet<&str> = result.lines().collect();
    let missing: Vec<&str> = fragment
        .lines()
        .map(str::trim)
        .filter(|line| line.starts_with("CONFIG_"))
        .filter(|line| match line.strip_suffix("=n") {
            // What depends on something that is off is not mentioned at all.
            Some(name) => result.lines().any(|set| set.starts_with(&format!("{name}="))),
            None => !set.contains(line),
        })
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    bail!("These lines of resources/kernel/config did not make it into the kernel: {}", missing.join(", "))
}

/// Moves a finished folder to its place, on disk before it is seen.
fn publish(finished: &Path, place: &Path) -> Result<()> {
    for entry in fs::read_dir(finished)? {
        let path = entry?.path();
        if path.is_file() {
            fs::File::open(path)?.sync_all()?;
        }
    }
    fs::rename(finished, place).with_context(|| format!("Cannot make {}", place.display()))?;
    let parent = place.parent().unwrap_or(Path::new("/"));
    fs::File::open(parent)?.sync_all()?;
    Ok(())
}

fn point_current(folder: &Path, hash: &str) -> Result<()> {
    let new = folder.join(format!(".current.{}", std::process::id()));
    let _ = fs::remove_file(&new);
    std::os::unix::fs::symlink(hash, &new)?;
    fs::rename(&new, folder.join("current"))?;
    Ok(())
}

/// Debian's kernel for cloud machines, fetched unless one is there; its folder.
pub fn debian_cloud() -> Result<PathBuf> {
    let folder = folder()?;
    let _lock = host::lock(&folder.join("lock-fetch"))?;
    if let Some(place) = fetched(&folder)? {
        return Ok(place);
    }
    host::need("the guest kernel", &host::RUN_PACKAGES)?;
    let work = host::work_folder(&folder, "fetch-")?;
    let package = debian::fetch("linux-image-cloud-amd64", "linux-image-", work.path())?;
    progress::step("Unpacking Debian's cloud kernel", || {
        let (tree, result) = (work.path().join("tree"), work.path().join("result"));
        debian::unpack(&package, &tree)?;
        let modules = debian::only_entry(&tree.join("lib/modules"))?;
        let release = modules.file_name().unwrap_or_default().to_string_lossy().into_owned();
        fs::create_dir_all(result.join("modules/lib"))?;
        fs::rename(tree.join("lib/modules"), result.join("modules/lib/modules"))?;
        fs::rename(tree.join("boot").join(format!("vmlinuz-{release}")), result.join("vmlinuz"))?;
        host::run(Command::new("depmod").arg("-b").arg(result.join("modules")).arg(&release))?;
        fs::write(result.join("release"), format!("{release}\n"))?;
        let place = folder.join(format!("debian-{release}"));
        publish(&result, &place)?;
        Ok(place)
    })
}

fn fetched(folder: &Path) -> Result<Option<PathBuf>> {
    let mut found: Vec<PathBuf> = fs::read_dir(folder)?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.file_name().unwrap_or_default().to_string_lossy().starts_with("debian-"))
        .collect();
    found.sort();
    Ok(found.pop())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_did_not_make_it_is_named() {
        let fragment = "# why\nCONFIG_A=y\nCONFIG_B=y\nCONFIG_C=n\nCONFIG_D=n\nCONFIG_E=\"x\"\n";
        let good = "CONFIG_A=y\nCONFIG_B=y\n# CONFIG_C is not set\nCONFIG_E=\"x\"\n";
        check_configuration(fragment, good).unwrap();
        let bad = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=y\nCONFIG_E=\"y\"\n";
        let text = check_configuration(fragment, bad).unwrap_err().to_string();
        for named in ["CONFIG_B=y", "CONFIG_C=n", "CONFIG_E"] {
            assert!(text.contains(named), "{text}");
        }
        assert!(!text.contains("CONFIG_A=y") && !text.contains("CONFIG_D"), "{text}");
    }

    #[test]
    fn packing_puts_the_entry_code_last_and_needs_no_2_mib_for_shared_memory() {
        let script = "#define BSS_DECRYPTED\t\\\n\t. = ALIGN(PMD_SIZE);\t\\\n\t*(.x);\n\n#define OTHER \
                      ALIGN(PMD_SIZE)\n\t\tCODE\n\t\tALIGN_ENTRY_TEXT_BEGIN\n\t\tENTRY\n\
                      \t\tALIGN_ENTRY_TEXT_END\n\t\tSMALL\n\t} :text\n\tREST\n";
        let packed = "#define BSS_DECRYPTED\t\\\n\t. = ALIGN(PAGE_SIZE);\t\\\n\t*(.x);\n\n#define OTHER \
                      ALIGN(PMD_SIZE)\n\t\tCODE\n\t\tSMALL\n\t\tALIGN_ENTRY_TEXT_BEGIN\n\t\tENTRY\n\
                      \t\tALIGN_ENTRY_TEXT_END\n\t} :text\n\tREST\n";
        assert_eq!(pack(script).unwrap(), packed);
        assert!(pack("a script of another kind").is_err());
    }

    #[test]
    fn the_hash_keeps_its_parts_apart() {
        assert_eq!(hash(&["1", "ab", "c"]), hash(&["1", "ab", "c"]));
        assert_ne!(hash(&["1", "ab", "c"]), hash(&["1", "a", "bc"]));
    }

    #[test]
    fn the_configuration_of_the_repository_turns_on_both_transports() {
        let text = fs::read_to_string(CONFIGURATION).unwrap();
        for line in ["CONFIG_VIRTIO_PCI=y", "CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES=y", "CONFIG_PVH=y"] {
            assert!(text.lines().any(|have| have == line), "{line}");
        }
    }

    #[test]
    fn the_newest_kernel_is_the_current_one() {
        let folder = tempfile::tempdir().unwrap();
        for hash in ["one", "two"] {
            point_current(folder.path(), hash).unwrap();
            assert_eq!(fs::read_link(folder.path().join("current")).unwrap(), Path::new(hash));
        }
    }
}
