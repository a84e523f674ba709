//! A host to run machines on: directories of its own, and the program called with them.

use std::{
    env, fs,
    io::{Read, Write},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;

/// Longest that one call of the program may take.
pub const LIMIT: Duration = Duration::from_secs(90);
/// Flags of a machine that starts quickly.
pub const SMALL: [&str; 4] = ["-m", "256M", "--cpus", "1"];

/// A state directory, and a cache that is shared with other tests unless they ask for their own.
pub struct Host {
    dir: TempDir,
    cache: PathBuf,
}

impl Host {
    /// One with the cache that all share, so that the image is made once.
    pub fn new() -> Host {
        Host { dir: fresh_dir(), cache: Path::new(env!("CARGO_TARGET_TMPDIR")).join("cli-cache") }
    }

    /// One with an empty cache of its own.
    pub fn with_own_cache() -> Host {
        let dir = fresh_dir();
        let cache = dir.path().join("cache");
        Host { dir, cache }
    }

    /// A directory that goes with the host.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The cache's directory.
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// The program, ready to be called, with this host's directories.
    pub fn command<S: AsRef<str>>(&self, arguments: &[S]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nacelle"));
        command.args(arguments.iter().map(AsRef::as_ref));
        command.env("NACELLE_STATE_DIR", self.state()).env("NACELLE_CACHE_DIR", &self.cache);
        command.env("NACELLE_KERNEL", kernel());
        command
    }

    /// Calls the program with nothing to read.
    pub fn nacelle<S: AsRef<str>>(&self, arguments: &[S]) -> Ended {
        Running::start(self.command(arguments), None).end(LIMIT)
    }

    /// `nacelle run` of a shell script in a small machine of the test image.
    pub fn run(&self, flags: &[&str], script: &str) -> Ended {
        self.nacelle(&self.line(flags, script))
    }

    /// The same, not waited for, and with something to read.
    pub fn start(&self, flags: &[&str], script: &str, input: Option<Vec<u8>>) -> Running {
        Running::start(self.command(&self.line(flags, script)), input)
    }

    fn line<'a>(&self, flags: &[&'a str], script: &'a str) -> Vec<String> {
        let image = test_image();
        let all = [&["run", "-q"], &SMALL[..], flags, &[image.as_str(), "sh", "-c", script]].concat();
        all.into_iter().map(str::to_owned).collect()
    }

    /// Starts a named machine in the background and returns its id.
    pub fn detached(&self, name: &str, script: &str) -> String {
        let ended = self.run(&["-d", "--name", name], script).expect(0);
        let id = ended.text();
        assert!(id.len() == 65 && id.ends_with('\n'), "no id: {id:?}");
        id.trim().to_owned()
    }

    /// What `nacelle inspect` says about a machine.
    pub fn inspect(&self, machine: &str) -> Value {
        let ended = self.nacelle(&["inspect", machine]).expect(0);
        let value: Value = serde_json::from_slice(&ended.out).expect("inspect prints JSON");
        value[0].clone()
    }

    /// What `nacelle ls -a` says about a machine; null when it is not listed.
    pub fn listed(&self, machine: &str) -> Value {
        let ended = self.nacelle(&["ls", "-a", "--format", "json"]).expect(0);
        let value: Value = serde_json::from_slice(&ended.out).expect("ls prints JSON");
        let mut rows = value.as_array().expect("an array").iter();
        rows.find(|row| row["name"] == machine || row["id"] == machine).cloned().unwrap_or_default()
    }

    /// Machines that are recorded.
    pub fn machines(&self) -> Vec<PathBuf> {
        entries(&self.state().join("machines"))
    }

    /// Files that a made image leaves, and whatever a failed one left.
    pub fn cached(&self) -> Vec<PathBuf> {
        let folders = ["images", "tmp", "blobs/sha256", "refs"].map(|name| self.cache.join(name));
        folders.iter().flat_map(|folder| walk(folder)).filter(|path| !path.is_dir()).collect()
    }

    /// Processes that were started for this host: all have its state directory in their
    /// environment.
    pub fn processes(&self) -> Vec<i32> {
        let needle = self.state().into_os_string().into_encoded_bytes();
        let numbers = entries(Path::new("/proc")).into_iter().filter_map(|path| {
            let number: i32 = path.file_name()?.to_str()?.parse().ok()?;
            let environment = fs::read(path.join("environ")).ok()?;
            environment.windows(needle.len()).any(|part| part == needle).then_some(number)
        });
        numbers.collect()
    }

    /// Checks that nothing runs and nothing is recorded any more.
    pub fn assert_nothing_left(&self) {
        wait_until("no process to be left", || self.processes().is_empty());
        assert_eq!(self.machines(), Vec::<PathBuf>::new());
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for number in self.processes() {
            // SAFETY: plain numbers; the process was started for this host.
            unsafe { libc::kill(number, libc::SIGKILL) };
        }
    }
}

/// A short path: sockets' are at most 107 bytes long.
fn fresh_dir() -> TempDir {
    let memory = Path::new("/dev/shm");
    let home = if memory.is_dir() { memory.to_owned() } else { env::temp_dir() };
    tempfile::Builder::new().prefix("nc").tempdir_in(home).expect("a directory for the test")
}

fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// The guest kernel for most tests: nacelle's own where it is built.
pub fn kernel() -> String {
    variable("NACELLE_TEST_BUILT_KERNEL").unwrap_or_else(stock_kernel)
}

/// Debian's stock kernel.
pub fn stock_kernel() -> String {
    variable("NACELLE_TEST_KERNEL").expect("these tests need a kernel: run them with cargo xtask test")
}

/// An OCI layout with busybox.
pub fn test_image() -> String {
    variable("NACELLE_TEST_IMAGE").expect("these tests need an image: run them with cargo xtask test")
}

/// Whether this process may mount and make device nodes.
pub fn is_root() -> bool {
    // SAFETY: reads a number.
    unsafe { libc::geteuid() == 0 }
}

/// A call that has not ended.
pub struct Running {
    child: Child,
    said: String,
    out: Stream,
    err: Stream,
    /// Held so that its input stays open.
    _input: Option<std::io::PipeWriter>,
}

impl Running {
    /// Starts a call; `input` is written to it from another thread.
    pub fn start(command: Command, input: Option<Vec<u8>>) -> Running {
        let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
        let mut running = Running::start_reading(command, stdin);
        if let (Some(bytes), Some(mut stdin)) = (input, running.child.stdin.take()) {
            // One that ends early does not read all of it.
            thread::spawn(move || drop(stdin.write_all(&bytes)));
        }
        running
    }

    fn start_reading(mut command: Command, stdin: Stdio) -> Running {
        let said = format!("{command:?}");
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program can be started");
        let out = Stream::read(child.stdout.take().expect("a pipe"));
        let err = Stream::read(child.stderr.take().expect("a pipe"));
        Running { child, said, out, err, _input: None }
    }

    /// Starts a call whose input stays open and empty.
    pub fn start_with_open_input(command: Command) -> Running {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        let mut running = Running::start_reading(command, reader.into());
        running._input = Some(writer);
        running
    }

    /// Its number.
    pub fn id(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Sends it a signal.
    pub fn signal(&self, number: i32) {
        // SAFETY: plain numbers; the child was not waited for, so the number is still its own.
        unsafe { libc::kill(self.id(), number) };
    }

    /// Waits until standard output holds `text`.
    pub fn wait_for(&mut self, text: &str) {
        let until = Instant::now() + LIMIT;
        while !String::from_utf8_lossy(&self.out.bytes).contains(text) {
            let ended = self.child.try_wait().expect("it is ours").is_some();
            let more = self.out.more(until.min(Instant::now() + Duration::from_millis(200)));
            if (ended && !more) || Instant::now() > until {
                self.fail(&format!("did not print {text:?}"));
            }
        }
    }

    /// Waits for its end and the end of its output.
    pub fn end(mut self, limit: Duration) -> Ended {
        let until = Instant::now() + limit;
        let status = loop {
            match self.child.try_wait().expect("it is ours") {
                Some(status) => break status,
                None if Instant::now() > until => self.fail(&format!("did not end within {limit:?}")),
                None => thread::sleep(Duration::from_millis(3)),
            }
        };
        // Whoever else holds these pipes would keep a caller's pipe open as well.
        let until = Instant::now() + Duration::from_secs(15);
        if !self.out.all(until) || !self.err.all(until) {
            self.fail("ended, but somebody holds its output open");
        }
        let err = String::from_utf8_lossy(&self.err.bytes).into_owned();
        Ended { said: self.said.clone(), code: code(status), out: std::mem::take(&mut self.out.bytes), err }
    }

    fn fail(&mut self, what: &str) -> ! {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let until = Instant::now() + Duration::from_secs(2);
        self.out.all(until);
        self.err.all(until);
        let shown = |bytes: &[u8]| String::from_utf8_lossy(bytes.get(..4000).unwrap_or(bytes)).into_owned();
        let (out, err) = (shown(&self.out.bytes), shown(&self.err.bytes));
        panic!("{} {what}\n--- standard output\n{out}\n--- standard error\n{err}", self.said);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn code(status: ExitStatus) -> i32 {
    status.code().or_else(|| status.signal().map(|signal| 1000 + signal)).unwrap_or(-1)
}

/// One output of a call, read by a thread of its own.
struct Stream {
    parts: Receiver<Vec<u8>>,
    bytes: Vec<u8>,
}

impl Stream {
    fn read(mut from: impl Read + Send + 'static) -> Stream {
        let (sender, parts) = mpsc::channel();
        thread::spawn(move || {
            let mut buffer = vec![0; 64 * 1024];
            while let Ok(got @ 1..) = from.read(&mut buffer) {
                if sender.send(buffer[..got].to_vec()).is_err() {
                    return;
                }
            }
        });
        Stream { parts, bytes: Vec::new() }
    }

    /// Takes the next part; false at the end or when the time is over.
    fn more(&mut self, until: Instant) -> bool {
        let part = self.parts.recv_timeout(until.saturating_duration_since(Instant::now()));
        self.bytes.extend(part.iter().flatten());
        part.is_ok()
    }

    /// Takes everything; false when it does not end in time.
    fn all(&mut self, until: Instant) -> bool {
        loop {
            match self.parts.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(part) => self.bytes.extend(part),
                Err(error) => return error == mpsc::RecvTimeoutError::Disconnected,
            }
        }
    }
}

/// A call that has ended.
pub struct Ended {
    said: String,
    /// Exit code; 1000 and the number when a signal ended it.
    pub code: i32,
    /// Standard output.
    pub out: Vec<u8>,
    /// Standard error.
    pub err: String,
}

impl Ended {
    /// Checks the exit code.
    #[track_caller]
    pub fn expect(self, code: i32) -> Ended {
        assert_eq!(
            self.code,
            code,
            "exit code of {}\n--- standard error\n{}\n--- standard output\n{}",
            self.said,
            self.err,
            self.text()
        );
        self
    }

    /// Checks that standard error names all of `words`.
    #[track_caller]
    pub fn says(self, words: &[&str]) -> Ended {
        for word in words {
            assert!(self.err.contains(word), "{word:?} is not in what {} said:\n{}", self.said, self.err);
        }
        assert!(!self.err.contains("panicked"), "{}", self.err);
        self
    }

    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.out).into_owned()
    }
}

/// Waits for something to become true.
#[track_caller]
pub fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < until, "waited too long for {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Bytes that look random and are the same each time.
pub fn noise(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let words = std::iter::repeat_with(next).take(count.div_ceil(8));
    words.flatten().take(count).collect()
}

/// What a directory holds; nothing when it is not there.
pub fn entries(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// Everything below a directory, links not followed.
pub fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut left = vec![dir.to_owned()];
    while let Some(dir) = left.pop() {
        for path in entries(&dir) {
            if path.is_dir() && !path.is_symlink() {
                left.push(path.clone());
            }
            found.push(path);
        }
    }
    found
}
