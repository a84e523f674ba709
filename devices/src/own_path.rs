//! A path at which this process has made something, to be removed at the end.
//!
//! By then it may be somebody else's: the socket was removed by hand, and the next machine has made
//! its own at the same path. So what was made is known by its inode, and anything else stays.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// A path with what this process made there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnPath {
    path: PathBuf,
    /// Device and inode of it; none when there was nothing.
    inode: Option<(u64, u64)>,
}

impl OwnPath {
    /// What is at `path` now, right after it was made.
    pub fn made(path: impl Into<PathBuf>) -> OwnPath {
        let path = path.into();
        OwnPath { inode: inode(&path), path }
    }

    /// The path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes what was made, if it is still there.
    pub fn remove(&self) {
        if self.inode.is_some() && inode(&self.path) == self.inode {
            // It may be gone by now; then there is nothing to remove.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|found| (found.dev(), found.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_took_the_place_of_ones_own_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let nothing = OwnPath::made(&path);
        fs::write(&path, "own").unwrap();
        nothing.remove();
        let own = OwnPath::made(&path);
        fs::rename(&path, folder.path().join("moved")).unwrap();
        fs::write(&path, "other").unwrap();
        own.remove();
        assert_eq!(fs::read_to_string(&path).unwrap(), "other");
        OwnPath::made(&path).remove();
        assert!(!path.exists());
    }
}
