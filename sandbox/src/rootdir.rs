//! # A directory of the host as an image
//!
//! The tree is walked twice: once for its fingerprint (names, types, owners, sizes, times, inode
//! numbers; no contents), which is the image's key, so that an unchanged directory is an image
//! that is ready; and once to build. The fingerprint is taken again at the end: a directory
//! that changes while it is read gives an error, not a mixture.
//!
//! Mounts inside the directory (`/proc` of a live root) become empty directories, sockets are
//! left out, device nodes stay metadata. The walk never follows a symbolic link.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use sha2::{Digest as _, Sha256};

use crate::digest::Digest;
use crate::erofs::{Contents, INLINE_BYTES, keeps_xattr};
use crate::limits::Limits;
use crate::tree::{Body, Content, Id, Meta, Tree};

/// Why a directory cannot become an image.
#[derive(Debug, thiserror::Error)]
pub enum RootDirError {
    /// Something in it cannot be read.
    #[error("'{}' cannot be read", path.display())]
    Read {
        /// What could not be read.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It was changed at the same time.
    #[error("'{}' changed while it was read: try again when nothing writes to it", path.display())]
    Changed {
        /// What changed.
        path: PathBuf,
    },
    /// A cap of [`Limits`] is reached.
    #[error("'{}' holds more than {limit} {what}, the limit set for one image", path.display())]
    Limit {
        /// The directory.
        path: PathBuf,
        /// What there is too much of.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// The image file cannot be written.
    #[error("The image file cannot be written")]
    Write(#[source] io::Error),
}

/// One file met on the walk.
struct Met<'a> {
    path: &'a Path,
    meta: &'a Metadata,
    depth: usize,
    /// Whether another file system is mounted here.
    mount: bool,
}

/// A directory to be read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RootDir<'a> {
    pub path: &'a Path,
    /// A directory whose contents are left out: the store that the image goes into.
    pub except: &'a Path,
    pub limits: &'a Limits,
}

impl RootDir<'_> {
    fn over(&self, what: &'static str, limit: u64) -> RootDirError {
        RootDirError::Limit { path: self.path.to_owned(), what, limit }
    }

    /// Meets everything below the directory, and itself first; names in byte order, parents
    /// before children.
    fn walk(&self, mut meet: impl FnMut(&Met<'_>) -> Result<(), RootDirError>) -> Result<(), RootDirError> {
        let root = fs::metadata(self.path).map_err(|e| read_error(self.path, e))?;
        let except = fs::metadata(self.except).ok().map(|m| (m.dev(), m.ino()));
        let mut left = vec![(self.path.to_owned(), 0)];
        let mut count = 0;
        while let Some((path, depth)) = left.pop() {
            let meta = if depth == 0 { fs::metadata(&path) } else { fs::symlink_metadata(&path) };
            let meta = meta.map_err(|e| read_error(&path, e))?;
            count += 1;
            if count > self.limits.entries {
                return Err(self.over("entries", self.limits.entries));
            }
            let mount = meta.is_dir() && meta.dev() != root.dev();
            meet(&Met { path: &path, meta: &meta, depth, mount })?;
            if !meta.is_dir() || mount || except == Some((meta.dev(), meta.ino())) {
                continue;
            }
            if depth >= self.limits.depth {
                return Err(self.over("nested directories", self.limits.depth as u64));
            }
            let mut below = Vec::new();
            for entry in fs::read_dir(&path).map_err(|e| read_error(&path, e))? {
                below.push(entry.map_err(|e| read_error(&path, e))?.path());
                if below.len() as u64 > self.limits.entries {
                    return Err(self.over("entries", self.limits.entries));
                }
            }
            below.sort_unstable_by(|a, b| b.cmp(a));
            left.extend(below.into_iter().map(|path| (path, depth + 1)));
        }
        Ok(())
    }

    /// What the tree looks like now, without reading its contents.
    pub(crate) fn fingerprint(&self) -> Result<Digest, RootDirError> {
        let mut hasher = Sha256::new();
        self.walk(|met| {
            let meta = met.meta;
            let name = met.path.as_os_str().as_bytes();
            hasher.update((name.len() as u64).to_le_bytes());
            hasher.update(name);
            // The length of a directory and the times of a mount say nothing about the tree.
            let size = if meta.is_dir() { 0 } else { meta.size() };
            let times = if met.mount {
                [0; 4]
            } else {
                [meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec()]
            };
            let owner = u64::from(meta.uid()) << 32 | u64::from(meta.gid());
            for field in [u64::from(meta.mode()), owner, size, meta.rdev(), meta.ino(), meta.dev()] {
                hasher.update(field.to_le_bytes());
            }
            for field in times {
                hasher.update(field.to_le_bytes());
            }
            Ok(())
        })?;
        Ok(Digest::of(&hasher.finalize()))
    }

    /// Reads the tree, contents into the image file.
    pub(crate) fn read(&self, contents: &mut Contents) -> Result<Tree, RootDirError> {
        let mut tree = Tree::new(self.limits.depth);
        // The directories on the way down, by depth.
        let mut dirs: Vec<Id> = Vec::new();
        let mut linked: HashMap<(u64, u64), Id> = HashMap::new();
        let (mut claimed, mut metadata) = (0u64, 0u64);
        self.walk(|met| {
            let meta = read_meta(met)?;
            metadata += met.path.as_os_str().len() as u64 + 256;
            metadata += meta.xattrs.iter().map(|(k, v)| (k.len() + v.len() + 64) as u64).sum::<u64>();
            if metadata > self.limits.metadata_bytes {
                return Err(self.over("bytes of names and attributes", self.limits.metadata_bytes));
            }
            if met.depth == 0 {
                tree.node_mut(Tree::ROOT).meta = meta;
                dirs = vec![Tree::ROOT];
                return Ok(());
            }
            dirs.truncate(met.depth);
            let dir = dirs.last().copied().unwrap_or(Tree::ROOT);
            let name = met.path.file_name().map_or(&b""[..], OsStrExt::as_bytes);
            let key = (met.meta.dev(), met.meta.ino());
            if let Some(&first) = linked.get(&key) {
                tree.link(dir, name, 0, first);
                return Ok(());
            }
            if met.meta.is_file() {
                claimed = claimed.saturating_add(met.meta.size());
                if claimed > self.limits.unpacked_bytes {
                    return Err(self.over("bytes in files", self.limits.unpacked_bytes));
                }
            }
            let Some(body) = read_body(met, contents)? else {
                return Ok(());
            };
            let is_dir = matches!(body, Body::Directory(_));
            let id = tree.insert(dir, name, 0, meta, body);
            if is_dir {
                dirs.push(id);
            } else if met.meta.nlink() > 1 {
                linked.insert(key, id);
            }
            Ok(())
        })?;
        Ok(tree)
    }
}

fn read_error(path: &Path, source: io::Error) -> RootDirError {
    RootDirError::Read { path: path.to_owned(), source }
}

/// The file's own kind and contents; `None` for a socket.
fn read_body(met: &Met<'_>, contents: &mut Contents) -> Result<Option<Body>, RootDirError> {
    let (path, kind) = (met.path, met.meta.file_type());
    let device = || (rustix::fs::major(met.meta.rdev()), rustix::fs::minor(met.meta.rdev()));
    Ok(Some(if kind.is_dir() {
        Body::Directory(BTreeMap::new())
    } else if kind.is_symlink() {
        let target = fs::read_link(path).map_err(|e| read_error(path, e))?;
        Body::Symlink(target.into_os_string().into_vec().into())
    } else if kind.is_char_device() {
        Body::Character(device().0, device().1)
    } else if kind.is_block_device() {
        Body::Block(device().0, device().1)
    } else if kind.is_fifo() {
        Body::Fifo
    } else if kind.is_socket() {
        return Ok(None);
    } else {
        Body::File(read_content(met, contents)?)
    }))
}

fn read_content(met: &Met<'_>, contents: &mut Contents) -> Result<Content, RootDirError> {
    let (path, size) = (met.path, met.meta.size());
    let changed = || RootDirError::Changed { path: path.to_owned() };
    // A link or a FIFO that has taken the file's place must neither be followed nor block.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let file = File::options().read(true).custom_flags(flags).open(path);
    let mut file = file.map_err(|e| read_error(path, e))?;
    let now = file.metadata().map_err(|e| read_error(path, e))?;
    if (now.dev(), now.ino(), now.size()) != (met.meta.dev(), met.meta.ino(), size) || !now.is_file() {
        return Err(changed());
    }
    if size <= INLINE_BYTES as u64 {
        let mut bytes = Vec::new();
        (&mut file).take(size + 1).read_to_end(&mut bytes).map_err(|e| read_error(path, e))?;
        if bytes.len() as u64 != size {
            return Err(changed());
        }
        return Ok(Content::Inline(bytes.into()));
    }
    let start = contents.allocate(size).map_err(RootDirError::Write)?;
    let mut buffer = vec![0; 256 << 10];
    let mut offset = 0;
    while offset < size {
        // Lossless: at most the buffer's length.
        let want = (size - offset).min(buffer.len() as u64) as usize;
        let got = file.read(&mut buffer[..want]).map_err(|e| read_error(path, e))?;
        if got == 0 {
            return Err(changed());
        }
        contents.write(start, offset, &buffer[..got]).map_err(RootDirError::Write)?;
        offset += got as u64;
    }
    Ok(Content::Blocks { start, size })
}

fn read_meta(met: &Met<'_>) -> Result<Meta, RootDirError> {
    let meta = met.meta;
    Ok(Meta {
        // Lossless: twelve bits.
        mode: (meta.mode() & 0o7777) as u16,
        uid: meta.uid(),
        gid: meta.gid(),
        mtime: (meta.mtime(), u32::try_from(meta.mtime_nsec()).unwrap_or(0)),
        xattrs: read_xattrs(met.path).map_err(|e| read_error(met.path, e))?,
    })
}

/// The attributes that an image can hold. A file system without any has none.
fn read_xattrs(path: &Path) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    // The kernel's own bounds for a list and for a value (XATTR_LIST_MAX, XATTR_SIZE_MAX).
    let mut names = vec![0u8; 64 << 10];
    let length = match rustix::fs::llistxattr(path, &mut names[..]) {
        Ok(length) => length,
        Err(rustix::io::Errno::NOTSUP) => 0,
        Err(error) => return Err(error.into()),
    };
    let mut xattrs = BTreeMap::new();
    let mut value = Vec::new();
    for name in names[..length].split(|&b| b == 0).filter(|n| !n.is_empty()) {
        value.resize(64 << 10, 0);
        let Ok(length) = rustix::fs::lgetxattr(path, name, &mut value[..]) else {
            // Gone since, or not for this user to read.
            continue;
        };
        if keeps_xattr(name, &value[..length]) {
            xattrs.insert(name.to_vec(), value[..length].to_vec());
        }
    }
    Ok(xattrs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(path: &Path) -> Digest {
        let limits = Limits::default();
        let except = Path::new("/nonexistent");
        RootDir { path, except, limits: &limits }.fingerprint().unwrap()
    }

    #[test]
    fn the_fingerprint_changes_with_the_tree_and_only_then() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), "1").unwrap();
        let first = digest(dir.path());
        assert_eq!(digest(dir.path()), first);
        fs::write(dir.path().join("b"), "2").unwrap();
        let second = digest(dir.path());
        assert_ne!(second, first);
        fs::set_permissions(dir.path().join("b"), std::os::unix::fs::PermissionsExt::from_mode(0o700))
            .unwrap();
        assert_ne!(digest(dir.path()), second);
    }

    #[test]
    fn entries_are_capped() {
        let dir = tempfile::tempdir().unwrap();
        for n in 0..5 {
            fs::write(dir.path().join(n.to_string()), "").unwrap();
        }
        let limits = Limits { entries: 5, ..Limits::default() };
        let root = RootDir { path: dir.path(), except: Path::new("/"), limits: &limits };
        assert!(matches!(root.fingerprint(), Err(RootDirError::Limit { limit: 5, .. })));
    }
}
