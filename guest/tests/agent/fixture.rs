//! An agent with a container in it.

use guest::{
    client::{Agent, Machine, ReadyListener},
    protocol::{Exit, ExitStatus, MAIN, ProcessId, ProcessSpec, Root, Setup, Stream, Writable},
};
use std::{
    io::Read,
    os::unix::net::UnixStream,
    path::PathBuf,
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

/// Longest wait for anything in these tests.
pub const LIMIT: Duration = Duration::from_secs(60);

pub struct Fixture {
    process: Child,
    pub machine: Machine,
    pub uds: PathBuf,
    pub agent: Agent,
    _directory: tempfile::TempDir,
}

impl Fixture {
    /// An agent that has not been asked anything.
    pub fn bare() -> Self {
        // SAFETY: no arguments.
        let user = unsafe { libc::geteuid() };
        assert_eq!(user, 0, "these tests make namespaces and mounts: run them as root");
        let directory = tempfile::tempdir().unwrap();
        let uds = directory.path().join("vsock.sock");
        let ready = ReadyListener::bind(&uds).unwrap();
        let process = Command::new(env!("CARGO_BIN_EXE_nacelle-agent"))
            .arg("--socket")
            .arg(directory.path())
            .spawn()
            .unwrap();
        let agent = Agent::over(ready.accept(LIMIT).unwrap(), LIMIT).unwrap();
        let machine = Machine::new(&uds).with_timeout(LIMIT);
        Self { process, machine, uds, agent, _directory: directory }
    }

    /// An agent with its container set up.
    pub fn ready(change: impl FnOnce(&mut Setup)) -> Self {
        let mut fixture = Self::bare();
        let mut setup = Setup {
            hostname: "box".into(),
            root: Root::Directory { path: "/".into() },
            writable: Writable::Memory { size: 64 << 20 },
            ..Setup::default()
        };
        change(&mut setup);
        fixture.agent.setup(setup).unwrap();
        fixture
    }

    /// An agent whose container runs, and ends with code 7 on SIGTERM.
    pub fn running() -> Self {
        let mut fixture = Self::ready(|_| ());
        let wait = "trap 'exit 7' TERM; echo ready; while :; do sleep 1 & wait $!; done";
        fixture.agent.start(shell(wait)).unwrap();
        fixture.await_line(MAIN, "ready\n");
        fixture
    }

    /// Reads the first line of a process's output, and leaves the stream to others.
    pub fn await_line(&self, process: ProcessId, line: &str) {
        let mut stream = self.machine.kept_stream(process, Stream::Stdout).unwrap();
        let mut bytes = vec![0; line.len()];
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.read_exact(&mut bytes).unwrap();
        assert_eq!(String::from_utf8_lossy(&bytes), line);
    }

    /// Opens a stream that someone else has just let go of.
    pub fn take_over(&self, process: ProcessId, which: Stream) -> UnixStream {
        let until = Instant::now() + LIMIT;
        loop {
            match self.machine.kept_stream(process, which) {
                Ok(stream) => return stream,
                Err(e) if Instant::now() > until => panic!("{e}"),
                Err(_) => thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    /// Runs something beside the main process to its end: exit code, output, errors.
    pub fn run(&self, spec: ProcessSpec) -> (u8, String, String) {
        let mut agent = self.machine.control().unwrap();
        let (process, _) = agent.exec(spec).unwrap();
        self.finish(&mut agent, process)
    }

    /// Reads what a process writes, to its end, and its exit code.
    pub fn finish(&self, agent: &mut Agent, process: ProcessId) -> (u8, String, String) {
        let [out, err] = [Stream::Stdout, Stream::Stderr].map(|which| {
            let mut stream = self.machine.stream(process, which).unwrap();
            thread::spawn(move || {
                let mut bytes = Vec::new();
                stream.read_to_end(&mut bytes).unwrap();
                String::from_utf8_lossy(&bytes).into_owned()
            })
        });
        let exit = agent.wait(process, Some(LIMIT)).unwrap().expect("it ends in time");
        (exit.status.shell_code(), out.join().unwrap(), err.join().unwrap())
    }

    /// The host's process number of the process that started the agent.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        // In order first, so that no control group stays behind on the host.
        if let Ok(mut agent) = self.machine.clone().with_timeout(Duration::from_secs(5)).control() {
            let _ = agent.shutdown(false);
        }
        // The child we know waits for the agent proper, which dies with it.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub fn shell(script: &str) -> ProcessSpec {
    command(&["sh", "-c", script])
}

pub fn command(args: &[&str]) -> ProcessSpec {
    ProcessSpec { args: args.iter().map(|&a| a.into()).collect(), ..ProcessSpec::default() }
}

pub fn code(exit: &Exit) -> u8 {
    match exit.status {
        ExitStatus::Code(code) => code,
        ExitStatus::Signal(signal) => panic!("killed by signal {signal}"),
    }
}
