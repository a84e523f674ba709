//! A path of the container as a tar archive.
//!
//! The container goes on running, so files shrink, grow and vanish while they are read: each
//! entry has exactly the size its header says (padded with zeros if need be), and what has
//! vanished since its directory was listed is left out.

use super::{fail, name_of};
use guest::protocol::Failure;
use std::{
    collections::BTreeMap,
    fs::{self, File, Metadata},
    io::{self, Read, Write},
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};
use tar::{Builder, EntryType, Header};

/// Most files of several names remembered; beyond, such a file is packed once a name.
const MAX_LINKS: usize = 1 << 20;

/// Most directories above each other.
const MAX_DEPTH: usize = 1024;

/// Writes `path` and all below it to `to`, named by its last component.
pub fn pack<W: Write>(path: &str, follow: bool, to: W) -> Result<W, Failure> {
    let place = super::absolute(path)?;
    let mut builder = Builder::new(to);
    builder.follow_symlinks(false);
    let mut packer = Packer { builder, links: BTreeMap::new() };
    let follow = follow || path.ends_with("/.") || path.ends_with('/');
    let metadata = if follow { fs::metadata(place) } else { fs::symlink_metadata(place) };
    let metadata = metadata.map_err(|e| fail("read", path, &e))?;
    let name = match name_of(path).as_str() {
        "/" | ".." => ".".into(),
        name => PathBuf::from(name),
    };
    packer.add(place, &name, &metadata, follow)?;
    if metadata.is_dir() {
        packer.add_below(place, &name)?;
    }
    packer.builder.into_inner().map_err(|e| fail("send the archive of", path, &e))
}

struct Packer<W: Write> {
    builder: Builder<W>,
    /// Files with several names, by device and number, and the first name packed.
    links: BTreeMap<(u64, u64), PathBuf>,
}

impl<W: Write> Packer<W> {
    /// Adds everything below a directory, without recursion: depth is the container's choice.
    fn add_below(&mut self, place: &Path, name: &Path) -> Result<(), Failure> {
        let mut open = vec![(place.to_owned(), name.to_owned(), list(place)?)];
        while let Some((place, name, rest)) = open.last_mut() {
            let Some(entry) = rest.pop() else {
                open.pop();
                continue;
            };
            let (place, name) = (place.join(&entry), name.join(&entry));
            let metadata = match fs::symlink_metadata(&place) {
                Ok(metadata) => metadata,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(fail("read", &place, &e)),
            };
            self.add(&place, &name, &metadata, false)?;
            if metadata.is_dir() {
                if open.len() >= MAX_DEPTH {
                    return Err(fail("read", &place, &io::ErrorKind::InvalidFilename.into()));
                }
                let entries = list(&place)?;
                open.push((place, name, entries));
            }
        }
        Ok(())
    }

    fn add(&mut self, place: &Path, name: &Path, metadata: &Metadata, follow: bool) -> Result<(), Failure> {
        self.add_entry(place, name, metadata, follow).map_err(|e| fail("copy", place, &e))
    }

    fn add_entry(&mut self, place: &Path, name: &Path, metadata: &Metadata, follow: bool) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_metadata(metadata);
        header.set_size(0);
        let kind = metadata.file_type();
        if kind.is_symlink() {
            header.set_entry_type(EntryType::Symlink);
            return self.builder.append_link(&mut header, name, fs::read_link(place)?);
        }
        if kind.is_socket() {
            // A socket is a meeting place, not a file: no tar format has a word for it.
            return Ok(());
        }
        if kind.is_file() && metadata.nlink() > 1 {
            let id = (metadata.dev(), metadata.ino());
            if let Some(first) = self.links.get(&id) {
                header.set_entry_type(EntryType::Link);
                return self.builder.append_link(&mut header, name, first);
            }
            if self.links.len() < MAX_LINKS {
                self.links.insert(id, name.to_owned());
            }
        }
        if !kind.is_file() {
            return self.builder.append_data(&mut header, name, io::empty());
        }
        // Between the look and the opening it may have become a pipe, which must not block us.
        let link = if follow { 0 } else { libc::O_NOFOLLOW };
        let flags = link | libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = File::options().read(true).custom_flags(flags).open(place)?;
        let found = file.metadata()?;
        if !found.is_file() {
            return Err(io::Error::other("It changed while it was copied"));
        }
        header.set_size(found.len());
        let content = Exactly { file, left: found.len() };
        self.builder.append_data(&mut header, name, content)
    }
}

fn list(directory: &Path) -> Result<Vec<std::ffi::OsString>, Failure> {
    let read = || fs::read_dir(directory)?.map(|e| e.map(|e| e.file_name())).collect();
    let mut entries: Vec<_> = match read() {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(e) => return Err(fail("list", directory, &e)),
    };
    // Taken from the end: sorted in reverse, the archive's order is that of the names.
    entries.sort_unstable_by(|a: &std::ffi::OsString, b| b.cmp(a));
    Ok(entries)
}

/// Exactly as many bytes as announced, whatever the file does meanwhile.
struct Exactly {
    file: File,
    left: u64,
}

impl Read for Exactly {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let n = match self.file.read(&mut buffer[..most])? {
            0 => {
                buffer[..most].fill(0);
                most
            }
            n => n,
        };
        self.left -= n as u64;
        Ok(n)
    }
}
