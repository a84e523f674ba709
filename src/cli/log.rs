//! What a container printed, kept so that it can be read later, byte for byte.
//!
//! `output.log` is a run of entries: stream (1 byte: 1 standard output, 2 standard error),
//! time (8 bytes, milliseconds since 1970), length (4 bytes), then the bytes; numbers are
//! little-endian. When it has grown to [`LOG_MAX`] it becomes `output.log.1` and a new one is
//! begun, so that a container that never stops printing holds at most twice that.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

/// Bytes after which the log is turned over.
pub const LOG_MAX: u64 = 16 << 20;
/// Longest entry, in bytes.
pub const ENTRY_MAX: usize = 64 * 1024;
/// The media type of entries.
pub const ENTRIES: &str = "application/vnd.nacelle.log";
const HEADER: usize = 13;

/// One of the two output streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Out = 1,
    /// Standard error.
    Err = 2,
}

/// Something a container printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where.
    pub stream: Stream,
    /// When, in milliseconds since 1970.
    pub millis: u64,
    /// What.
    pub bytes: Vec<u8>,
}

impl Entry {
    /// Something on standard output.
    pub fn out(millis: u64, bytes: &[u8]) -> Entry {
        Entry { stream: Stream::Out, millis, bytes: bytes.to_vec() }
    }

    /// The entry as the log holds it.
    pub fn to_bytes(&self) -> Vec<u8> {
        encoded(self.stream, self.millis, &self.bytes)
    }

    /// Takes the first entry out of `bytes`, which begin with one; none while it is not whole.
    pub fn take(bytes: &mut Vec<u8>) -> io::Result<Option<Entry>> {
        let bad = || io::Error::new(io::ErrorKind::InvalidData, "The output log is damaged");
        let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() else { return Ok(None) };
        let [stream, t0, t1, t2, t3, t4, t5, t6, t7, l0, l1, l2, l3] = *header;
        let len = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        if len > ENTRY_MAX {
            return Err(bad());
        }
        let Some(part) = rest.get(..len) else { return Ok(None) };
        let stream = match stream {
            1 => Stream::Out,
            2 => Stream::Err,
            _ => return Err(bad()),
        };
        let millis = u64::from_le_bytes([t0, t1, t2, t3, t4, t5, t6, t7]);
        let entry = Entry { stream, millis, bytes: part.to_vec() };
        bytes.drain(..HEADER + len);
        Ok(Some(entry))
    }
}

fn encoded(stream: Stream, millis: u64, bytes: &[u8]) -> Vec<u8> {
    let mut entry = Vec::with_capacity(HEADER + bytes.len());
    entry.push(stream as u8);
    entry.extend(millis.to_le_bytes());
    entry.extend((bytes.len() as u32).to_le_bytes());
    entry.extend(bytes);
    entry
}

/// A log being written.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    file: File,
    len: u64,
    max: u64,
}

impl Writer {
    /// Begins or goes on with the log at `path`.
    pub fn open(path: &Path) -> io::Result<Writer> {
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
        let len = file.metadata()?.len();
        Ok(Writer { path: path.to_owned(), file, len, max: LOG_MAX })
    }

    /// Adds what was printed, at most [`ENTRY_MAX`] bytes at a time.
    pub fn add(&mut self, stream: Stream, bytes: &[u8]) -> io::Result<()> {
        let millis = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
        for part in bytes.chunks(ENTRY_MAX) {
            if self.len >= self.max {
                fs::rename(&self.path, older(&self.path))?;
                *self = Writer { max: self.max, ..Writer::open(&self.path)? };
            }
            let entry = encoded(stream, millis, part);
            self.file.write_all(&entry)?;
            self.len += entry.len() as u64;
        }
        Ok(())
    }
}

/// A log being read, from its oldest entry on.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    file: Option<File>,
    /// Bytes of an entry that is not whole yet.
    held: Vec<u8>,
}

impl Reader {
    /// Reads the log at `path`, which need not exist yet.
    pub fn open(path: &Path) -> Reader {
        let file = File::open(older(path)).or_else(|_| File::open(path)).ok();
        Reader { path: path.to_owned(), file, held: Vec::new() }
    }

    /// The next entry, or nothing when the end of what is written was reached. More may be
    /// written later; asking again then finds it.
    pub fn next_entry(&mut self) -> io::Result<Option<Entry>> {
        loop {
            if let Some(entry) = Entry::take(&mut self.held)? {
                return Ok(Some(entry));
            }
            let Some(file) = &mut self.file else {
                self.file = File::open(&self.path).ok();
                match self.file {
                    Some(_) => continue,
                    None => return Ok(None),
                }
            };
            let mut part = vec![0; ENTRY_MAX];
            let got = file.read(&mut part)?;
            self.held.extend_from_slice(part.get(..got).unwrap_or_default());
            if got == 0 && !self.turn_over()? {
                return Ok(None);
            }
        }
    }

    /// At the end of a file that was turned over, goes on with the next one.
    fn turn_over(&mut self) -> io::Result<bool> {
        use std::os::unix::fs::MetadataExt;
        let Some(file) = &self.file else { return Ok(false) };
        let Ok(newest) = fs::metadata(&self.path) else { return Ok(false) };
        if file.metadata()?.ino() == newest.ino() {
            return Ok(false);
        }
        self.held.clear();
        self.file = Some(File::open(&self.path)?);
        Ok(true)
    }
}

fn older(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(reader: &mut Reader, stream: Stream) -> Vec<u8> {
        let mut bytes = Vec::new();
        while let Some(entry) = reader.next_entry().unwrap() {
            if entry.stream == stream {
                bytes.extend(entry.bytes);
            }
        }
        bytes
    }

    #[test]
    fn both_streams_come_back_byte_for_byte() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("output.log");
        let mut reader = Reader::open(&path);
        assert_eq!(reader.next_entry().unwrap(), None);
        let mut writer = Writer::open(&path).unwrap();
        let long: Vec<u8> = (0..200_000u32).map(|i| i as u8).collect();
        writer.add(Stream::Out, &long).unwrap();
        writer.add(Stream::Err, b"\xff\x00no line end").unwrap();
        assert_eq!(all(&mut reader, Stream::Out), long);
        writer.add(Stream::Out, b"later").unwrap();
        assert_eq!(all(&mut reader, Stream::Out), b"later");
        assert_eq!(all(&mut Reader::open(&path), Stream::Err), b"\xff\x00no line end");
    }

    #[test]
    fn a_long_log_is_turned_over_and_still_read_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("output.log");
        let mut writer = Writer { max: 100, ..Writer::open(&path).unwrap() };
        for i in 0..10u8 {
            writer.add(Stream::Out, &[i; 40]).unwrap();
        }
        let kept = all(&mut Reader::open(&path), Stream::Out);
        let seen: Vec<u8> = kept.chunks(40).map(|c| c[0]).collect();
        assert!(
            seen.len() >= 2 && seen.ends_with(&[9]) && seen.windows(2).all(|w| w[1] == w[0] + 1),
            "{seen:?}"
        );
    }

    #[test]
    fn a_damaged_log_is_an_error_and_no_memory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("output.log");
        fs::write(&path, [1, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0]).unwrap();
        assert!(Reader::open(&path).next_entry().is_err());
    }
}
