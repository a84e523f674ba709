//! Files in and out of the container, as tar archives in blocks.
//!
//! All of it runs on a thread inside the container's mount namespace
//! ([`super::container::Container::within`]): paths and links mean what they mean to the
//! container's processes, and nothing outside is in reach whatever the paths say.

mod blocks;
mod pack;
mod unpack;

pub use blocks::{BlockReader, BlockWriter};
pub use pack::pack;
pub use unpack::{Rules, unpack};

use guest::protocol::{Failure, FailureKind, PathKind, PathStat};
use std::{fs, io, os::unix::fs::MetadataExt, path::Path};

/// What is at `path` of the caller's own root.
pub fn stat(path: &str, follow: bool) -> Result<PathStat, Failure> {
    let place = absolute(path)?;
    // `/dir/.` is the directory itself even if `dir` is a link to it.
    let follow = follow || path.ends_with("/.") || path.ends_with('/');
    let metadata = if follow { fs::metadata(place) } else { fs::symlink_metadata(place) };
    let metadata = metadata.map_err(|e| fail("look at", path, &e))?;
    let kind = match metadata.file_type() {
        t if t.is_file() => PathKind::File,
        t if t.is_dir() => PathKind::Directory,
        t if t.is_symlink() => PathKind::Link,
        _ => PathKind::Other,
    };
    if path.ends_with('/') && kind != PathKind::Directory {
        return Err(fail("look at", path, &io::Error::from_raw_os_error(libc::ENOTDIR)));
    }
    let link = fs::read_link(place).map(|l| l.to_string_lossy().into_owned());
    Ok(PathStat {
        name: name_of(path),
        kind,
        size: metadata.size(),
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: metadata.mtime(),
        link: if kind == PathKind::Link { link.unwrap_or_default() } else { String::new() },
    })
}

/// The last component of a path as it is named in an archive: `.` for a directory's content.
fn name_of(path: &str) -> String {
    if path.ends_with("/.") {
        return ".".into();
    }
    let last = Path::new(path).file_name().map(|n| n.to_string_lossy().into_owned());
    last.unwrap_or_else(|| if path.ends_with("..") { "..".into() } else { "/".into() })
}

fn absolute(path: &str) -> Result<&Path, Failure> {
    if path.starts_with('/') && !path.contains('\0') && path.len() < 4096 {
        return Ok(Path::new(path));
    }
    let shown: String = path.chars().take(100).collect();
    let message = format!("{shown:?} is no absolute path of the container");
    Err(Failure::new(FailureKind::BadRequest, message))
}

fn fail(what: &str, path: impl AsRef<Path>, error: &io::Error) -> Failure {
    let kind = match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => FailureKind::NoSuchPath,
        _ => FailureKind::System,
    };
    Failure::new(kind, format!("Cannot {what} {:?}: {error}", path.as_ref()))
}

#[cfg(test)]
mod tests;
