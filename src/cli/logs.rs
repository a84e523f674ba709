//! `nacelle logs`: what a machine's container, kernel or monitor said, now or as it says it.
//!
//! What the container printed comes back byte for byte, standard output on standard output
//! and standard error on standard error. The kernel's console and the monitor's log are text
//! files without times of their own lines.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    path::Path,
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use api::client::ClientError;
use clap::{Args as ClapArgs, ValueEnum};
use serde::Deserialize;

use super::{
    failure::{Failure, Outcome, doing},
    log::{self, Entry, Reader, Stream},
    remote::{self, Host},
    state::{Machine, State, Status},
    when,
};

/// How often a log that is followed is looked at.
const INTERVAL: Duration = Duration::from_millis(50);
/// Bytes of a text file that are read at once.
const PART: usize = 64 * 1024;

/// Print what a machine said, also after its end
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// Go on until the machine ends
    #[arg(short, long)]
    follow: bool,
    /// Begin with the last lines only
    #[arg(short = 'n', long, value_name = "LINES", value_parser = tail)]
    tail: Option<Tail>,
    /// Begin at a time: 10m (ago), 2026-11-21T13:32:00Z, or seconds since 1970
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Put the time in front of each line
    #[arg(short, long)]
    timestamps: bool,
    /// Whose words
    #[arg(long, value_enum, default_value_t, value_name = "SOURCE")]
    source: Source,
    /// Name, id or start of an id
    machine: String,
}

/// Who may have said something.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The container: its standard output and error
    #[default]
    Container,
    /// The guest's kernel: its console
    Kernel,
    /// The monitor: its log
    Monitor,
}

/// How many of the last lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tail(usize);

fn tail(word: &str) -> Result<Tail, String> {
    if word == "all" {
        return Ok(Tail(usize::MAX));
    }
    word.parse().map(Tail).map_err(|_| "it must be a number of lines, or 'all'".to_owned())
}

/// Prints it.
pub fn run(args: &Args, host: Option<&Host>) -> Outcome<u8> {
    let wanted = args.wanted()?;
    let mut printer = Printer { timestamps: args.timestamps, inside_line: [false; 2] };
    if let Some(host) = host {
        if args.timestamps && args.source != Source::Container {
            return Err(Failure::new(NO_TIMES));
        }
        return printed(print_from(host, &args.machine, &wanted, &mut printer));
    }
    let machine = State::open()?.find(&args.machine)?;
    printed(match wanted.file(&machine) {
        None => wanted.entries(&machine, &|| true, &mut |entry| printer.print(&entry)),
        Some(_) if args.timestamps => return Err(Failure::new(NO_TIMES)),
        Some(name) => wanted.text(&machine, name, &|| true, &mut |part| {
            let mut out = io::stdout().lock();
            out.write_all(part).and_then(|()| out.flush())
        }),
    })
}

/// Prints all that a machine of another host prints until its end.
pub fn print_all(host: &Host, word: &str) -> Outcome<()> {
    let mut printer = Printer { timestamps: false, inside_line: [false; 2] };
    let wanted = Wanted { follow: true, ..Wanted::default() };
    printed(print_from(host, word, &wanted, &mut printer)).map(drop)
}

fn print_from(host: &Host, word: &str, wanted: &Wanted, printer: &mut Printer) -> Result<(), LogError> {
    let read = |e: ClientError| Failure::from_error(&e);
    let parts = host.client().parts(&remote::path(word, &wanted.query())?, log::ENTRIES).map_err(read)?;
    let mut held = Vec::new();
    for part in parts {
        held.extend_from_slice(&part.map_err(read)?);
        while let Some(entry) = doing(Entry::take(&mut held), || "The log's entries are damaged".to_owned())?
        {
            printer.print(&entry)?;
        }
    }
    Ok(())
}

/// What printing came to.
fn printed(printed: Result<(), LogError>) -> Outcome<u8> {
    match printed {
        // Whoever read it has read enough.
        Err(LogError::Print(e)) if e.kind() == io::ErrorKind::BrokenPipe => Ok(0),
        Err(LogError::Print(e)) => Err(Failure::because("The log cannot be printed", &e)),
        Err(LogError::Read(failure)) => Err(failure),
        Ok(()) => Ok(0),
    }
}

/// Why a log was not passed on.
#[derive(Debug)]
pub enum LogError {
    /// It cannot be read, or not that way.
    Read(Failure),
    /// What it was passed to failed.
    Print(io::Error),
}

impl From<Failure> for LogError {
    fn from(failure: Failure) -> LogError {
        LogError::Read(failure)
    }
}

impl From<io::Error> for LogError {
    fn from(error: io::Error) -> LogError {
        LogError::Print(error)
    }
}

const NO_TIMES: &str = "The kernel's and the monitor's logs are text without times of ours; -t and --since are for \
                        the container's output";

/// Which words are wanted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Whose.
    pub source: Source,
    /// Those to come, too, until the machine ends.
    pub follow: bool,
    /// Only the last lines of those that are there.
    pub tail: Option<usize>,
    /// Only those since a moment, in milliseconds since 1970.
    pub since: Option<u64>,
}

impl Args {
    fn wanted(&self) -> Outcome<Wanted> {
        let since = self.since.as_ref().map(|word| when::moment(word, now_millis())).transpose()?;
        let tail = self.tail.map(|Tail(lines)| lines);
        Ok(Wanted { source: self.source, follow: self.follow, tail, since })
    }
}

impl Wanted {
    /// The same as a path after a machine's name, for a service.
    fn query(&self) -> String {
        let source = format!("{:?}", self.source).to_lowercase();
        let mut query = format!("/logs?source={source}&follow={}", self.follow);
        for (name, value) in [("tail", self.tail.map(|lines| lines as u64)), ("since", self.since)] {
            if let Some(value) = value {
                query.push_str(&format!("&{name}={value}"));
            }
        }
        query
    }

    /// The text file that has them; none when they are entries of the container's log.
    pub fn file(&self, machine: &Machine) -> Option<&'static str> {
        match self.source {
            Source::Container if machine.record.plain => Some("console.log"),
            Source::Container => None,
            Source::Kernel => Some("console.log"),
            Source::Monitor => Some("monitor.log"),
        }
    }

    /// Passes what the container printed to `each`. Nobody waits for more once `heard` says that
    /// nobody listens.
    pub fn entries(
        &self,
        machine: &Machine,
        heard: &dyn Fn() -> bool,
        each: &mut dyn FnMut(Entry) -> io::Result<()>,
    ) -> Result<(), LogError> {
        let since = self.since.unwrap_or(0);
        let path = machine.file("output.log");
        let mut reader = Reader::open(&path);
        let mut next = || doing(reader.next_entry(), || format!("{} cannot be read", path.display()));
        let mut following = Following::new(machine, self.follow);
        if let Some(lines) = self.tail {
            let mut held = VecDeque::new();
            while let Some(entry) = next()? {
                if entry.millis >= since {
                    held.push_back(entry);
                }
            }
            last_lines(&mut held, lines);
            held.into_iter().try_for_each(&mut *each)?;
        }
        loop {
            // Asked before reading: what was written before the end is read after it is known.
            let more = following.more();
            while let Some(entry) = next()? {
                if entry.millis >= since {
                    each(entry)?;
                }
            }
            if !more || !heard() {
                return Ok(());
            }
            thread::sleep(INTERVAL);
        }
    }

    /// Passes what is in one of the text files to `each`.
    pub fn text(
        &self,
        machine: &Machine,
        name: &str,
        heard: &dyn Fn() -> bool,
        each: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), LogError> {
        if self.since.is_some() {
            return Err(Failure::new(NO_TIMES).into());
        }
        let path = machine.file(name);
        let mut following = Following::new(machine, self.follow);
        let start =
            |lines| doing(start_of_last(&path, lines), || format!("{} cannot be read", path.display()));
        let mut at = self.tail.map_or(Ok(0), start)?;
        loop {
            let more = following.more();
            at = copy_from(&path, at, each)?;
            if !more || !heard() {
                return Ok(());
            }
            thread::sleep(INTERVAL);
        }
    }
}

/// Whether more may come.
struct Following<'a> {
    machine: &'a Machine,
    wanted: bool,
}

impl<'a> Following<'a> {
    fn new(machine: &'a Machine, wanted: bool) -> Self {
        Following { machine, wanted }
    }

    fn more(&mut self) -> bool {
        let mut machine = self.machine.clone();
        // One that was removed has ended.
        let there = self.wanted && machine.reload().is_ok();
        // A suspended one will say more once it goes on.
        there && !matches!(machine.record.status(), Status::Exited | Status::Dead)
    }
}

/// Drops from the front what is not of the last `lines` lines. A last line without its end
/// counts.
fn last_lines(entries: &mut VecDeque<Entry>, lines: usize) {
    if lines == 0 {
        entries.clear();
        return;
    }
    let mut ends = 0;
    let mut last = true;
    for at in (0..entries.len()).rev() {
        let Some(entry) = entries.get_mut(at) else { return };
        for place in (0..entry.bytes.len()).rev() {
            let is_end = entry.bytes.get(place) == Some(&b'\n');
            // The newline that ends everything ends the last line, it does not begin another.
            if is_end && !last {
                ends += 1;
            }
            last = false;
            if ends == lines {
                entry.bytes.drain(..=place);
                entries.drain(..at);
                return;
            }
        }
    }
}

/// Prints entries where they belong.
struct Printer {
    timestamps: bool,
    /// For each stream, whether its last byte was in the middle of a line.
    inside_line: [bool; 2],
}

impl Printer {
    fn print(&mut self, entry: &Entry) -> io::Result<()> {
        match entry.stream {
            Stream::Out => self.write(entry, 0, &mut io::stdout().lock()),
            Stream::Err => self.write(entry, 1, &mut io::stderr().lock()),
        }
    }

    fn write(&mut self, entry: &Entry, stream: usize, to: &mut impl Write) -> io::Result<()> {
        if !self.timestamps {
            to.write_all(&entry.bytes)?;
            return to.flush();
        }
        let Some(inside) = self.inside_line.get_mut(stream) else { return Ok(()) };
        let time = when::rfc3339(entry.millis);
        let mut text = Vec::with_capacity(entry.bytes.len() + 64);
        for line in entry.bytes.split_inclusive(|b| *b == b'\n') {
            if !*inside {
                text.extend_from_slice(time.as_bytes());
                text.push(b' ');
            }
            text.extend_from_slice(line);
            *inside = line.last() != Some(&b'\n');
        }
        to.write_all(&text)?;
        to.flush()
    }
}

/// Passes a file on from a place; returns where it ended. A file that became shorter was begun
/// anew. One that is not there is empty.
fn copy_from(path: &Path, at: u64, each: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> io::Result<u64> {
    let Ok(mut file) = File::open(path) else { return Ok(0) };
    let len = file.metadata()?.len();
    let mut at = if at > len { 0 } else { at };
    file.seek(SeekFrom::Start(at))?;
    let mut part = vec![0; PART];
    loop {
        let count = file.read(&mut part)?;
        if count == 0 {
            return Ok(at);
        }
        each(part.get(..count).unwrap_or_default())?;
        at = at.saturating_add(count as u64);
    }
}

/// Where the last `lines` lines of a file begin.
fn start_of_last(path: &Path, lines: usize) -> io::Result<u64> {
    let mut file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(0),
        other => other?,
    };
    let len = file.metadata()?.len();
    if lines == 0 {
        return Ok(len);
    }
    let (mut end, mut ends) = (len, 0);
    while end > 0 {
        let start = end.saturating_sub(PART as u64);
        let mut part = Vec::new();
        file.seek(SeekFrom::Start(start))?;
        (&mut file).take(end - start).read_to_end(&mut part)?;
        for (place, byte) in part.iter().enumerate().rev() {
            let after = start + place as u64 + 1;
            if *byte == b'\n' && after < len {
                ends += 1;
                if ends == lines {
                    return Ok(after);
                }
            }
        }
        end = start;
    }
    Ok(0)
}

fn now_millis() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(texts: &[&str]) -> VecDeque<Entry> {
        let entry = |t: &&str| Entry { stream: Stream::Out, millis: 1500, bytes: t.as_bytes().to_vec() };
        texts.iter().map(entry).collect()
    }

    fn tail_of(texts: &[&str], lines: usize) -> String {
        let mut entries = entries(texts);
        last_lines(&mut entries, lines);
        entries.iter().map(|e| String::from_utf8_lossy(&e.bytes).into_owned()).collect()
    }

    #[test]
    fn the_last_lines_are_whole_whatever_the_pieces_they_came_in() {
        let pieces = ["a\nb", "b\nc", "c", "c\n"];
        assert_eq!(tail_of(&pieces, 1), "ccc\n");
        assert_eq!(tail_of(&pieces, 2), "bb\nccc\n");
        assert_eq!(tail_of(&pieces, 3), "a\nbb\nccc\n");
        assert_eq!(tail_of(&pieces, 99), "a\nbb\nccc\n");
        assert_eq!(tail_of(&pieces, 0), "");
        assert_eq!(tail_of(&["a\nb\nrest"], 2), "b\nrest");
        assert_eq!(tail_of(&["a\n", "\n"], 1), "\n");
        assert_eq!(tail_of(&[], 3), "");
    }

    #[test]
    fn a_text_file_has_the_same_last_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        assert_eq!(start_of_last(&path, 3).unwrap(), 0);
        let text = format!("{}\nlast but one\nlast", "x".repeat(200_000));
        std::fs::write(&path, &text).unwrap();
        for (lines, wanted) in [(0, ""), (1, "last"), (2, "last but one\nlast"), (9, &text[..])] {
            let mut out = Vec::new();
            let at = start_of_last(&path, lines).unwrap();
            assert_eq!(copy_from(&path, at, &mut |part| out.write_all(part)).unwrap(), text.len() as u64);
            assert_eq!(String::from_utf8(out).unwrap(), wanted);
        }
    }

    #[test]
    fn a_time_stands_before_each_line_once() {
        let mut printer = Printer { timestamps: true, inside_line: [false; 2] };
        let mut out = Vec::new();
        for entry in entries(&["a\nb", "b\n", "c"]) {
            printer.write(&entry, 0, &mut out).unwrap();
        }
        let time = "1970-01-01T00:00:01.500Z";
        assert_eq!(String::from_utf8(out).unwrap(), format!("{time} a\n{time} bb\n{time} c"));
    }

    #[test]
    fn a_log_begun_anew_is_read_from_its_start() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        std::fs::write(&path, "new").unwrap();
        let mut out = Vec::new();
        assert_eq!(copy_from(&path, 100, &mut |part| out.write_all(part)).unwrap(), 3);
        assert_eq!(out, b"new");
    }
}
