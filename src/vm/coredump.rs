//! The core file of a machine, published as a whole or not at all.
//!
//! It is written under another name beside its place, only for the user of this process to
//! read (a guest's memory holds its secrets), brought to the disk, and then given its name in
//! one step that does not replace anything. What ends the process in between leaves a file
//! whose name ends in `.part` and nothing under the name that was asked for.
//!
//! The machine must stand still: vCPUs so that registers are of one moment, devices because
//! they write to memory.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use api::FaultKind;
use arch::{coredump, state::VcpuState};
use devices::Memory;
use rustix::fs::{CWD, RenameFlags};

pub use coredump::Written;

/// Why there is no core file.
#[derive(Debug, thiserror::Error)]
pub enum CoreDumpError {
    /// Something has the name already.
    #[error("{} exists already; a core file does not replace anything", .0.display())]
    Exists(PathBuf),
    /// The path names no file.
    #[error("{} is no path of a file", .0.display())]
    NoName(PathBuf),
    /// The file could not be made beside its place.
    #[error("Cannot create a file in {}", directory.display())]
    Create {
        /// Where.
        directory: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Memory could not be read, or the file not written.
    #[error("The core file {} cannot be written", path.display())]
    Write {
        /// Where it was to be.
        path: PathBuf,
        /// Why.
        #[source]
        source: coredump::CoreDumpError,
    },
    /// The finished file could not be brought to the disk or given its name.
    #[error("The core file {} cannot be published", path.display())]
    Publish {
        /// Where it was to be.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl CoreDumpError {
    /// Whose fault it is.
    pub fn kind(&self) -> FaultKind {
        match self {
            CoreDumpError::Exists(_) => FaultKind::Conflict,
            CoreDumpError::NoName(_) | CoreDumpError::Create { .. } => FaultKind::Invalid,
            CoreDumpError::Write { .. } | CoreDumpError::Publish { .. } => FaultKind::Internal,
        }
    }
}

/// Writes the core file of a paused machine to `path`, which must not exist. Takes as long as
/// the disk takes for what the guest has in memory.
pub fn write(path: &Path, memory: &Memory, vcpus: &[VcpuState]) -> Result<Written, CoreDumpError> {
    let registers: Vec<_> = vcpus.iter().map(VcpuState::registers).collect();
    let (_, directory) = parts(path)?;
    // Found at once here; a file that appears later is found when this one gets its name.
    if path.symlink_metadata().is_ok() {
        return Err(CoreDumpError::Exists(path.to_owned()));
    }
    let (mut file, part) = Part::create(&directory)
        .map_err(|source| CoreDumpError::Create { directory: directory.clone(), source })?;
    let written = coredump::write(memory, &registers, &mut file)
        .map_err(|source| CoreDumpError::Write { path: path.to_owned(), source })?;
    let publish = |source: io::Error| match source.kind() {
        io::ErrorKind::AlreadyExists => CoreDumpError::Exists(path.to_owned()),
        _ => CoreDumpError::Publish { path: path.to_owned(), source },
    };
    file.sync_all().map_err(publish)?;
    part.publish(path).map_err(publish)?;
    File::open(&directory).and_then(|d| d.sync_all()).map_err(publish)?;
    Ok(written)
}

/// The name, and the directory that it is in.
fn parts(path: &Path) -> Result<(OsString, PathBuf), CoreDumpError> {
    let name = path.file_name().ok_or_else(|| CoreDumpError::NoName(path.to_owned()))?;
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    Ok((name.to_owned(), directory))
}

/// A file under a name of its own, gone unless it was published.
struct Part(Option<PathBuf>);

impl Part {
    fn create(directory: &Path) -> io::Result<(File, Part)> {
        // What an earlier process of this number left is stepped over.
        const TRIES: u32 = 100;
        let mut error = io::ErrorKind::AlreadyExists.into();
        for number in 0..TRIES {
            let path = directory.join(format!(".core-{}-{number}.part", std::process::id()));
            match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
                Ok(file) => return Ok((file, Part(Some(path)))),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => error = e,
                Err(e) => return Err(e),
            }
        }
        Err(error)
    }

    /// Gives the file the name `path`, if nothing has it.
    fn publish(mut self, path: &Path) -> io::Result<()> {
        let Some(part) = &self.0 else { return Ok(()) };
        match rustix::fs::renameat_with(CWD, part, CWD, path, RenameFlags::NOREPLACE) {
            Ok(()) => self.0 = None,
            // Not every file system can; a second name does not replace anything either, and
            // the first one goes when this is dropped.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => fs::hard_link(part, path)?,
            Err(e) => return Err(e.into()),
        }
        Ok(())
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use api::spec::MachineConfig;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn memory() -> Memory {
        let config = MachineConfig { mem_size_mib: 16, ..MachineConfig::default() };
        let memory = crate::vm::memory::map(&config, crate::vm::memory::Backing::Empty).unwrap();
        memory.write_obj(0x1234_5678u32, GuestAddress(0x2000)).unwrap();
        memory
    }

    fn names(directory: &Path) -> Vec<OsString> {
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    }

    #[test]
    fn a_core_file_appears_whole_private_and_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("core");
        let written = write(&path, &memory(), &[]).unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!((metadata.len(), metadata.mode() & 0o777), (written.size, 0o600));
        assert_eq!(fs::read(&path).unwrap()[..4], *b"\x7fELF");
        assert_eq!(names(directory.path()), ["core"]);
    }

    #[test]
    fn nothing_is_replaced_and_nothing_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let (file, link) = (directory.path().join("file"), directory.path().join("link"));
        fs::write(&file, "mine").unwrap();
        symlink("nowhere", &link).unwrap();
        for path in [&file, &link] {
            assert!(matches!(write(path, &memory(), &[]), Err(CoreDumpError::Exists(_))));
        }
        assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
        assert_eq!(names(directory.path()).len(), 2);
    }

    #[test]
    fn a_file_that_appears_meanwhile_wins() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("core");
        let (_, part) = Part::create(directory.path()).unwrap();
        fs::write(&path, "first").unwrap();
        let error = part.publish(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read_to_string(&path).unwrap(), "first");
        assert_eq!(names(directory.path()), ["core"]);
    }

    #[test]
    fn a_directory_that_is_not_there_and_a_path_without_a_name_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let missing = directory.path().join("missing/core");
        let error = write(&missing, &memory(), &[]).unwrap_err();
        assert!(matches!(&error, CoreDumpError::Create { directory, .. } if directory.ends_with("missing")));
        for path in ["/", "..", ""] {
            assert!(matches!(write(Path::new(path), &memory(), &[]), Err(CoreDumpError::NoName(_))));
        }
    }
}
