//! One machine under test: its specification, its process, its console.
//!
//! ```text
//!   Setup::new(kernel, transport).script("fact cpus $(nproc)").start()
//!       -> Vm: wait for a line, answer, send a signal
//!       -> Ended: exit code, facts and parts of the script, the log's last word
//! ```

use std::{
    ffi::OsStr,
    fs::{self, File, OpenOptions},
    io::Write,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use api::{
    client::Client,
    spec::{ConsoleMode, Serial, Spec, Transport},
};
use tempfile::TempDir;

use crate::{
    guest,
    kernel::Kernel,
    process::{Process, Stream, code, within},
};

/// The longest that a machine of a test may live. The lab is slow, and two tests share it.
const LIFE_SECONDS: u64 = 200;

/// What every guest gets, beside the way to reboot.
const BOOT_ARGS: &str = "console=ttyS0 quiet panic=-1";

/// A machine to be started.
pub struct Setup {
    /// What is put into the configuration file.
    pub spec: Spec,
    kernel: Kernel,
    script: String,
    side: bool,
    flags: Vec<String>,
    folder: TempDir,
}

impl Setup {
    /// One vCPU, 256 MiB, serial port on standard output, no devices; ends by `reboot=k`.
    pub fn new(kernel: Kernel, transport: Transport) -> Setup {
        let mut spec = Spec::default();
        (spec.machine_config.vcpu_count, spec.machine_config.mem_size_mib) = (1, 256);
        spec.boot_source.boot_args = Some(format!("{BOOT_ARGS} reboot=k"));
        spec.machine_config.transport = transport;
        let folder = tempfile::tempdir().unwrap();
        Setup { spec, kernel, script: String::new(), side: false, flags: Vec::new(), folder }
    }

    /// Boots another kernel, made from this machine's folder.
    pub fn kernel(mut self, make: impl FnOnce(&Path) -> Kernel) -> Setup {
        self.kernel = make(self.folder.path());
        self
    }

    /// Sets vCPUs and memory in MiB.
    pub fn size(mut self, vcpus: u8, memory: u64) -> Setup {
        (self.spec.machine_config.vcpu_count, self.spec.machine_config.mem_size_mib) = (vcpus, memory);
        self
    }

    /// Adds kernel parameters.
    pub fn parameters(mut self, more: &str) -> Setup {
        self.spec.boot_source.boot_args = Some(format!("{BOOT_ARGS} {more}"));
        self
    }

    /// What the guest does.
    pub fn script(mut self, script: impl Into<String>) -> Setup {
        self.script = script.into();
        self
    }

    /// Puts this program into the guest as `/bin/side`, see the module of that name.
    pub fn with_side(mut self) -> Setup {
        self.side = true;
        self
    }

    /// Passes a flag to the program.
    pub fn flag(mut self, flag: &str) -> Setup {
        self.flags.push(flag.to_owned());
        self
    }

    /// A folder that lives as long as the machine, for its disks and sockets.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Writes what the monitor reads: the initrd, and the configuration into `machine.json`.
    pub fn write(&mut self) {
        let initrd = self.folder.path().join("initrd");
        guest::write_initrd(&initrd, &self.kernel, &self.script, self.side);
        self.spec.boot_source.kernel_image_path.clone_from(&self.kernel.image);
        self.spec.boot_source.initrd_path = Some(initrd);
        let text = serde_json::to_vec_pretty(&self.spec).unwrap();
        fs::write(self.folder.path().join("machine.json"), text).unwrap();
    }

    /// Starts the machine, and connects to its serial port where that is not standard output.
    pub fn start(mut self) -> Vm {
        self.write();
        let config = self.folder.path().join("machine.json");
        self.spawn(["--no-api".as_ref(), "--config-file".as_ref(), config.as_os_str()])
    }

    /// The same with an API socket beside, see [`Vm::client`].
    pub fn start_with_api(mut self) -> Vm {
        self.write();
        let (config, socket) = (self.folder.path().join("machine.json"), self.folder.path().join("api"));
        let flags = ["--api-sock".as_ref(), socket.as_os_str(), "--config-file".as_ref(), config.as_os_str()];
        self.spawn(flags)
    }

    /// Starts a monitor that knows of no machine yet; the initrd and what [`Setup::spec`] says
    /// are for requests through [`Vm::client`].
    pub fn start_empty(mut self) -> (Vm, Spec) {
        self.write();
        let (spec, socket) = (self.spec.clone(), self.folder.path().join("api"));
        (self.spawn(["--api-sock".as_ref(), socket.as_os_str()]), spec)
    }

    /// How the machine ended that another program made of what [`Setup::write`] wrote.
    pub fn ended(self, code: i32, console: String, log: String) -> Ended {
        Ended { code, console, log, folder: self.folder }
    }

    fn spawn<const N: usize>(mut self, flags: [&OsStr; N]) -> Vm {
        let (mut process, log) = monitor(&flags, &self.flags);
        let serial = self.spec.serial.take().unwrap_or_default();
        let deadline = within(LIFE_SECONDS);
        let (console, input) = connect(&serial, &mut process, &log, deadline);
        let (flags, folder) = (self.flags, self.folder);
        Vm { process, console, log, input, serial, deadline, flags, folder }
    }
}

/// Starts a monitor, and what it logs.
fn monitor(flags: &[&OsStr], more: &[String]) -> (Process, Stream) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nacelle"));
    command.args(["vmm", "--level", "Info", "--show-counters"]);
    command.args(flags).args(more);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = Process::new(command.spawn().unwrap());
    let log = Stream::of(process.child().stderr.take().unwrap());
    (process, log)
}

type Input = Option<Box<dyn Write>>;

fn connect(serial: &Serial, process: &mut Process, log: &Stream, deadline: Instant) -> (Stream, Input) {
    match serial.far_end() {
        ConsoleMode::Stdio => {
            let output = process.child().stdout.take().unwrap();
            (Stream::of(output), Some(Box::new(process.child().stdin.take().unwrap())))
        }
        ConsoleMode::Pty => {
            let terminal = OpenOptions::new().read(true).write(true).open(place(log, deadline)).unwrap();
            (Stream::of(terminal.try_clone().unwrap()), Some(Box::new(terminal)))
        }
        ConsoleMode::Socket => {
            let socket = UnixStream::connect(place(log, deadline)).unwrap();
            (Stream::of(socket.try_clone().unwrap()), Some(Box::new(socket)))
        }
        // Read when the machine has ended.
        ConsoleMode::File | ConsoleMode::Off => (Stream::default(), None),
    }
}

/// Where the log says the serial port is.
fn place(log: &Stream, deadline: Instant) -> String {
    const SAYS: &str = "The serial port is at ";
    assert!(log.heard(SAYS, deadline), "The log does not say where the serial port is:\n{}", log.text());
    let text = log.text();
    let line = text.lines().find_map(|line| line.split_once(SAYS)).unwrap();
    line.1.trim().to_owned()
}

/// A machine that runs.
pub struct Vm {
    process: Process,
    console: Stream,
    log: Stream,
    input: Input,
    serial: Serial,
    deadline: Instant,
    flags: Vec<String>,
    folder: TempDir,
}

impl Vm {
    /// Kills the monitor and starts another one in its place, which knows of no machine yet.
    /// Its standard output is the console of the machine that it is told to be.
    pub fn successor(self) -> Vm {
        let Vm { process, folder, serial, flags, deadline, .. } = self;
        drop(process);
        let socket = folder.path().join("api");
        let _ = fs::remove_file(&socket);
        let (mut process, log) = monitor(&["--api-sock".as_ref(), socket.as_os_str()], &flags);
        let (console, input) = connect(&serial, &mut process, &log, deadline);
        Vm { process, console, log, input, serial, deadline, flags, folder }
    }

    /// A monitor beside this one, which knows of no machine yet, with its API's socket.
    pub fn beside(&self, name: &str) -> (Vm, Client) {
        let folder = tempfile::tempdir_in(self.folder.path()).unwrap();
        let socket = folder.path().join("api");
        let (mut process, log) = monitor(
            &["--api-sock".as_ref(), socket.as_os_str(), "--id".as_ref(), name.as_ref()],
            &self.flags,
        );
        let (serial, flags, deadline) = (Serial::default(), self.flags.clone(), within(LIFE_SECONDS));
        let (console, input) = connect(&serial, &mut process, &log, deadline);
        let vm = Vm { process, console, log, input, serial, deadline, flags, folder };
        let client = vm.client();
        (vm, client)
    }

    /// A folder that lives as long as the machine.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Waits until the guest has printed `what`.
    pub fn wait_for(&self, what: &str) {
        if !self.console.heard(what, self.deadline) {
            self.fail(&format!("The guest did not print {what:?}"));
        }
    }

    /// What the guest has printed so far.
    pub fn console(&self) -> String {
        self.console.text()
    }

    /// Types a line.
    pub fn say(&mut self, line: &str) {
        let input = self.input.as_mut().expect("this console takes no input");
        input.write_all(format!("{line}\n").as_bytes()).unwrap();
        input.flush().unwrap();
    }

    /// A client of the API, once it is served.
    pub fn client(&self) -> Client {
        let socket = self.socket();
        // Listening is the first thing that can be seen of a monitor without a machine.
        while UnixStream::connect(&socket).is_err() {
            if Instant::now() > self.deadline {
                self.fail("The API is not served");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Client::unix(socket)
    }

    /// Path of the API's socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("api")
    }

    /// Descriptors that the monitor has open.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.process.id())).unwrap().count()
    }

    /// Page faults of the monitor's process so far, those of guests in KVM among them.
    pub fn page_faults(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.process.id())).unwrap();
        let after = stat.rsplit_once(')').unwrap().1;
        let field = |n: usize| after.split_whitespace().nth(n).unwrap().parse::<u64>().unwrap();
        // Fields 10 and 12 of proc(5).
        field(7) + field(9)
    }

    /// Number of the monitor's process.
    pub fn process_id(&self) -> u32 {
        self.process.id()
    }

    /// Sends the monitor a signal.
    pub fn signal(&self, number: i32) {
        self.process.signal(number);
    }

    /// Waits until the machine has ended by itself.
    pub fn wait(mut self) -> Ended {
        let Some(status) = self.process.wait(self.deadline) else {
            self.fail("The machine did not end");
        };
        // Both ends of the streams are gone with the process.
        self.log.ended(self.deadline);
        let console = match &self.serial.serial_out_path {
            Some(path) if self.serial.far_end() == ConsoleMode::File => {
                fs::read_to_string(path).unwrap().replace('\r', "")
            }
            _ => {
                self.console.ended(self.deadline);
                self.console.text()
            }
        };
        Ended { code: code(status), console, log: self.log.text(), folder: self.folder }
    }

    /// Waits for an end by the script's own, with nothing failed.
    pub fn succeed(self) -> Ended {
        let ended = self.wait();
        if ended.find("exit") != Some("0".to_owned()) || ended.code != 0 {
            ended.fail("The guest's script failed");
        }
        ended.says("The guest switched itself off");
        ended
    }

    fn fail(&self, why: &str) -> ! {
        show(why, &self.console.text(), &self.log.text())
    }
}

/// A machine that has ended.
pub struct Ended {
    /// The exit code of its process.
    pub code: i32,
    /// What was printed on its serial port.
    pub console: String,
    /// What the monitor wrote to standard error: log and counters.
    pub log: String,
    folder: TempDir,
}

impl Ended {
    /// What the guest told by `fact NAME`.
    pub fn fact(&self, name: &str) -> String {
        self.find(name).unwrap_or_else(|| self.fail(&format!("The guest did not tell {name:?}")))
    }

    /// A fact that is a number.
    pub fn number(&self, name: &str) -> u64 {
        let text = self.fact(name);
        text.parse().unwrap_or_else(|_| self.fail(&format!("{name:?} is {text:?}, not a number")))
    }

    /// What the guest printed in `part NAME`.
    pub fn part(&self, name: &str) -> String {
        let after = self.console.split_once(&format!("@begin {name}\n"));
        let inside = after.and_then(|(_, after)| after.split_once(&format!("@end {name}\n")));
        match inside {
            Some((inside, _)) => inside.to_owned(),
            None => self.fail(&format!("The guest did not print the part {name:?}")),
        }
    }

    /// Checks a fact.
    #[track_caller]
    pub fn is(&self, name: &str, expected: &(impl ToString + ?Sized)) {
        let (found, expected) = (self.fact(name), expected.to_string());
        if found != expected {
            self.fail(&format!("{name:?} is {found:?} in the guest; {expected:?} was expected"));
        }
    }

    /// Checks that the monitor's log has `reason`.
    #[track_caller]
    pub fn says(&self, reason: &str) {
        if !self.log.contains(reason) {
            self.fail(&format!("The log does not say {reason:?}"));
        }
    }

    /// A counter of a device, as `--show-counters` printed it.
    pub fn counter(&self, device: &str, counter: &str) -> u64 {
        let start = format!("device {device} {counter} ");
        let line = self.log.lines().find_map(|line| line.strip_prefix(&start));
        line.and_then(|count| count.parse().ok())
            .unwrap_or_else(|| self.fail(&format!("There is no counter {counter:?} of {device:?}")))
    }

    /// The machine's folder, still there.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Fails with all that was printed.
    #[track_caller]
    pub fn fail(&self, why: &str) -> ! {
        show(&format!("{why} (exit code {})", self.code), &self.console, &self.log)
    }

    fn find(&self, name: &str) -> Option<String> {
        let start = format!("@{name}=");
        self.console.lines().find_map(|line| line.strip_prefix(&start)).map(|value| value.trim().to_owned())
    }
}

#[track_caller]
fn show(why: &str, console: &str, log: &str) -> ! {
    panic!("{why}\n--- console ---\n{console}\n--- monitor ---\n{log}\n---")
}

/// `mib` MiB in a new file that differ everywhere, and from those of another `seed`.
pub fn random_file(path: &Path, mib: usize, seed: u64) -> Vec<u8> {
    let data = random_bytes(mib << 20, seed);
    File::create(path).and_then(|mut file| file.write_all(&data)).unwrap();
    data
}

/// Bytes of a xorshift generator (the same everywhere, and without a pattern).
pub fn random_bytes(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// The SHA-256 of `data` in hexadecimal, by the host's own program.
pub fn sha256(data: &[u8]) -> String {
    let mut child = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(data).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap().split_whitespace().next().unwrap().to_owned()
}
