//! Where lines of metrics are written: a file or a named pipe that may be full or unread.
//!
//! The sink is opened and written without waiting. A line that does not fit at all is lost as
//! a whole. A named pipe can also take the first half of one (pipe(7), `O_NONBLOCK` with more
//! than `PIPE_BUF` bytes): the other half is kept and goes first, before any other line, so
//! that a reader never meets half a line in front of a new one.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

/// An open file or pipe for lines.
#[derive(Debug)]
pub struct Sink {
    file: File,
    /// The end of a line whose beginning was written.
    rest: Vec<u8>,
}

impl Sink {
    /// Opens or creates the file, or opens the pipe whether or not somebody reads it.
    pub fn open(path: &Path) -> io::Result<Sink> {
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            // A pipe that is opened to be read as well opens without a reader.
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .mode(0o600)
            .open(path)?;
        Ok(Sink { file, rest: Vec::new() })
    }

    /// Writes `line`, to which the line feed is added. When this fails nothing of the line
    /// was written or ever will be.
    pub fn write(&mut self, line: &str) -> io::Result<()> {
        self.finish()?;
        self.rest.clear();
        self.rest.extend_from_slice(line.as_bytes());
        self.rest.push(b'\n');
        let whole = self.rest.len();
        match self.finish() {
            Err(error) if self.rest.len() == whole => {
                self.rest.clear();
                Err(error)
            }
            _ => Ok(()),
        }
    }

    /// Writes what is left of the last line.
    pub fn finish(&mut self) -> io::Result<()> {
        while !self.rest.is_empty() {
            match self.file.write(&self.rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => drop(self.rest.drain(..written.min(self.rest.len()))),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Whether the last line was written in part.
    pub fn is_torn(&self) -> bool {
        !self.rest.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::{ffi::CString, io::Read, os::unix::ffi::OsStrExt, time::Instant};

    use super::*;

    fn pipe(path: &Path) -> File {
        let name = CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: the name ends with a zero byte.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path).unwrap()
    }

    fn drain(pipe: &mut File) -> String {
        let mut text = Vec::new();
        let mut part = [0; 1000];
        while let Ok(n) = pipe.read(&mut part) {
            text.extend_from_slice(&part[..n]);
        }
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn a_pipe_that_nobody_reads_never_blocks_and_keeps_whole_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        let mut reader = pipe(&path);
        let mut sink = Sink::open(&path).unwrap();
        let start = Instant::now();
        // Five pages with its line feed; a pipe has sixteen.
        let line = |i: usize| format!("{i:05}{}", "x".repeat(5 * 4096 - 6));
        let written: Vec<usize> = (0..100).filter(|i| sink.write(&line(*i)).is_ok()).collect();
        assert!(start.elapsed().as_secs() < 5);
        assert!(written.len() < 100 && sink.write("late").is_err());
        let mut text = drain(&mut reader);
        assert!(sink.is_torn());
        sink.write("after").unwrap();
        text += &drain(&mut reader);
        let expected: Vec<String> = written.iter().map(|i| line(*i)).chain(["after".to_owned()]).collect();
        assert_eq!(text.lines().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_file_is_continued() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "old\n").unwrap();
        Sink::open(&path).unwrap().write("new").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "old\nnew\n");
        assert!(Sink::open(dir.path()).is_err());
    }

    #[test]
    fn a_full_disk_is_told() {
        let mut sink = Sink::open(Path::new("/dev/full")).unwrap();
        assert_eq!(sink.write("line").unwrap_err().raw_os_error(), Some(libc::ENOSPC));
        assert!(!sink.is_torn());
    }
}
