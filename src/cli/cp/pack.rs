//! Files of the host as a tar archive, packed on a thread of its own while it is read.

use std::{
    collections::HashMap,
    fs::{self, File, Metadata},
    io::{self, PipeReader, Read, Write},
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
};

use tar::{Builder, EntryType, Header};

use crate::cli::failure::{Outcome, doing};

/// Most files with several names that are remembered, so that the names stay one file.
const MAX_LINKS: usize = 1 << 16;

/// What was packed so far.
#[derive(Debug, Clone, Default)]
pub struct Counter(Arc<(AtomicU64, AtomicU64)>);

impl Counter {
    /// Files and bytes.
    pub fn so_far(&self) -> (u64, u64) {
        (self.0.0.load(Relaxed), self.0.1.load(Relaxed))
    }
}

/// An archive being packed. Reading it to its end succeeds only if all of it could be packed.
#[derive(Debug)]
pub struct Packed {
    pipe: PipeReader,
    thread: Option<JoinHandle<io::Result<()>>>,
    counter: Counter,
}

impl Packed {
    /// Begins to pack what is at `path`, called `top` in the archive; without a name, what is
    /// in the directory `path`. `follow`: if `path` is a link, what it leads to.
    pub fn start(path: PathBuf, top: Option<String>, follow: bool) -> Outcome<Packed> {
        let (pipe, writer) = doing(io::pipe(), || "No pipe can be had".to_owned())?;
        let counter = Counter::default();
        let count = counter.clone();
        let pack =
            move || pack(&path, top.as_deref(), follow, io::BufWriter::with_capacity(1 << 16, writer), count);
        let thread = doing(thread::Builder::new().spawn(pack), || "No thread can be had".to_owned())?;
        Ok(Packed { pipe, thread: Some(thread), counter })
    }

    /// Counts what is packed.
    pub fn counter(&self) -> Counter {
        self.counter.clone()
    }
}

impl Read for Packed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.pipe.read(buffer)?;
        if got == 0 && !buffer.is_empty() {
            let broken = |_| Err(io::Error::other("The thread that packs failed"));
            self.thread.take().map_or(Ok(()), |thread| thread.join().unwrap_or_else(broken))?;
        }
        Ok(got)
    }
}

fn pack(path: &Path, top: Option<&str>, follow: bool, to: impl Write, counter: Counter) -> io::Result<()> {
    let mut packer = Packer { builder: Builder::new(to), links: HashMap::new(), counter };
    let mut left = vec![(path.to_owned(), PathBuf::from(top.unwrap_or(".")), follow)];
    while let Some((place, name, follow)) = left.pop() {
        let metadata = if follow { fs::metadata(&place) } else { fs::symlink_metadata(&place) };
        let metadata = metadata.map_err(|e| named(&place, &e))?;
        // The directory whose content goes elsewhere does not itself.
        if name.as_os_str() != "." {
            packer.add(&place, &name, &metadata).map_err(|e| named(&place, &e))?;
        }
        if metadata.is_dir() {
            let entries = fs::read_dir(&place).and_then(Iterator::collect::<io::Result<Vec<_>>>);
            let mut entries: Vec<_> =
                entries.map_err(|e| named(&place, &e))?.iter().map(fs::DirEntry::file_name).collect();
            // Taken from the end: sorted in reverse, the archive's order is that of the names.
            entries.sort_unstable_by(|a, b| b.cmp(a));
            left.extend(entries.into_iter().map(|entry| (place.join(&entry), name.join(&entry), false)));
        }
    }
    packer.builder.into_inner()?.flush()
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

struct Packer<W: Write> {
    builder: Builder<W>,
    links: HashMap<(u64, u64), PathBuf>,
    counter: Counter,
}

impl<W: Write> Packer<W> {
    fn add(&mut self, place: &Path, name: &Path, metadata: &Metadata) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_metadata(metadata);
        header.set_size(0);
        let kind = metadata.file_type();
        if kind.is_socket() {
            // A socket is a meeting place, not a file: no tar format has a word for it.
            return Ok(());
        }
        if !kind.is_dir() {
            self.counter.0.0.fetch_add(1, Relaxed);
        }
        if kind.is_symlink() {
            header.set_entry_type(EntryType::Symlink);
            return self.builder.append_link(&mut header, name, fs::read_link(place)?);
        }
        if !kind.is_file() {
            return self.builder.append_data(&mut header, name, io::empty());
        }
        if metadata.nlink() > 1 {
            let id = (metadata.dev(), metadata.ino());
            if let Some(first) = self.links.get(&id) {
                header.set_entry_type(EntryType::Link);
                return self.builder.append_link(&mut header, name, first);
            }
            if self.links.len() < MAX_LINKS {
                self.links.insert(id, name.to_owned());
            }
        }
        // Between the look and the opening it may have become a pipe, which must not block us.
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = File::options().read(true).custom_flags(flags).open(place)?;
        let found = file.metadata()?;
        if !found.is_file() {
            return Err(io::Error::other("It changed while it was copied"));
        }
        header.set_size(found.len());
        self.counter.0.1.fetch_add(found.len(), Relaxed);
        self.builder.append_data(&mut header, name, Exactly { file, left: found.len() })
    }
}

/// Exactly as many bytes as announced, whatever the file does meanwhile.
struct Exactly {
    file: File,
    left: u64,
}

impl Read for Exactly {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let Some(part) = buffer.get_mut(..most).filter(|part| !part.is_empty()) else { return Ok(0) };
        let got = match self.file.read(part)? {
            0 => {
                part.fill(0);
                most
            }
            got => got,
        };
        self.left = self.left.saturating_sub(got as u64);
        Ok(got)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(path: &Path, top: Option<&str>) -> Vec<String> {
        let packed = Packed::start(path.to_owned(), top.map(str::to_owned), false).unwrap();
        let mut archive = tar::Archive::new(packed);
        let name = |e: io::Result<tar::Entry<'_, Packed>>| {
            let entry = e.unwrap();
            format!("{} {:?}", entry.path().unwrap().display(), entry.header().entry_type())
        };
        archive.entries().unwrap().map(name).collect()
    }

    #[test]
    fn a_tree_is_packed_under_the_name_it_is_given() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("d")).unwrap();
        fs::write(dir.path().join("d/f"), "x").unwrap();
        fs::hard_link(dir.path().join("d/f"), dir.path().join("d/g")).unwrap();
        std::os::unix::fs::symlink("nowhere", dir.path().join("d/l")).unwrap();
        assert_eq!(
            names(&dir.path().join("d"), Some("e")),
            ["e Directory", "e/f Regular", "e/g Link", "e/l Symlink"]
        );
        assert_eq!(names(&dir.path().join("d"), None), ["f Regular", "g Link", "l Symlink"]);
    }

    #[test]
    fn what_cannot_be_read_makes_the_archive_end_with_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let mut packed = Packed::start(dir.path().join("missing"), None, false).unwrap();
        let error = io::copy(&mut packed, &mut io::sink()).unwrap_err();
        assert!(error.to_string().contains("missing"), "{error}");
    }
}
