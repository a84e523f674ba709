//! `nacelle suspend`: brings machines into snapshots, so that they take no memory and no CPU.
//!
//! The machine's keeper does the work (see `keeper/steward.rs`); this is who asks for it, shows
//! how far it is and, at a signal, has it cancelled.

use std::{
    io::{ErrorKind, Read, Write},
    os::unix::net::UnixStream,
    time::Duration,
};

use clap::Args as ClapArgs;

use super::{
    ending,
    failure::{Failure, Outcome, doing},
    keeper::steward::{Asked, Told},
    output,
    remote::Host,
    snapshot::watching::{EXIT_INTERRUPTED, Watching},
    state::{Machine, State, Status},
};
use crate::snapshot::Watch;

/// How long the keeper may take to leave once the machine is in its snapshot.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(30);
/// How often signals are looked for while the keeper works.
const TURN: Duration = Duration::from_millis(50);
/// Longest line of an answer, in bytes.
const LINE_MAX: usize = 1 << 20;

/// Bring machines into snapshots, from which 'nacelle resume' lets them go on
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
    /// Names, ids or starts of ids
    #[arg(required = true, value_name = "MACHINE")]
    machines: Vec<String>,
}

/// Suspends one after the other; one that is suspended already stays so.
pub fn run(args: &Args, host: Option<&Host>) -> Outcome<u8> {
    let mut interrupted = false;
    let code = output::each(&args.machines, |word| {
        if interrupted {
            return Ok(());
        }
        match host {
            Some(host) => host.suspend(word)?,
            None => {
                let watching = Watching::new("Suspending", args.quiet)?;
                let suspended = suspend(&mut State::open()?.find(word)?, &watching);
                interrupted = watching.interrupted();
                drop(watching);
                suspended?;
            }
        }
        output::print(&format!("{word}\n"))
    });
    Ok(if interrupted { EXIT_INTERRUPTED } else { code })
}

/// Suspends one. After an error it is what it was.
pub fn suspend(machine: &mut Machine, watch: &dyn Watch) -> Outcome<()> {
    if machine.status() == Status::Suspended {
        return Ok(());
    }
    machine.must_run("be suspended")?;
    let name = machine.record.name.clone();
    let cannot = || format!("The keeper of machine {name} cannot be asked");
    let mut keeper = doing(UnixStream::connect(machine.keeper_socket()), cannot)?;
    doing(keeper.set_read_timeout(Some(TURN)), cannot)?;
    let mut line = serde_json::to_vec(&Asked::Suspend {}).unwrap_or_default();
    line.push(b'\n');
    doing(keeper.write_all(&line), cannot)?;
    listen(&mut keeper, watch).map_err(|failure| {
        let mut failure = failure;
        failure.causes.insert(0, std::mem::take(&mut failure.message));
        failure.message = format!("Machine {name} was not suspended");
        failure
    })?;
    await_keeper(machine)
}

/// Reads what the keeper says until it leaves.
fn listen(keeper: &mut UnixStream, watch: &dyn Watch) -> Outcome<()> {
    let (mut held, mut part) = (Vec::new(), [0; 4096]);
    let (mut step, mut cancelled) = ((0, 0), false);
    loop {
        match keeper.read(&mut part) {
            Ok(0) => return Ok(()),
            Ok(count) => held.extend_from_slice(part.get(..count).unwrap_or_default()),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            // A keeper that was killed; the machine's directory tells what became of it.
            Err(_) => return Ok(()),
        }
        while let Some(end) = held.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = held.drain(..=end).collect();
            match serde_json::from_slice(&line) {
                Ok(Told::Step { done, total }) => step = (done, total),
                Ok(Told::Failed { message, causes }) => {
                    return Err(Failure { causes, ..Failure::new(message) });
                }
                Err(e) => return Err(Failure::because("Its keeper's answer cannot be understood", &e)),
            }
        }
        if held.len() > LINE_MAX {
            return Err(Failure::new("Its keeper's answer has no end"));
        }
        if !cancelled && watch.step(step.0, step.1).is_break() {
            cancelled = true;
            // The end of what we say cancels it; what became of it is still heard.
            let _ = keeper.shutdown(std::net::Shutdown::Write);
        }
    }
}

/// Waits until the keeper has left, and says what it left.
fn await_keeper(machine: &mut Machine) -> Outcome<()> {
    let name = machine.record.name.clone();
    let until = std::time::Instant::now() + LEAVE_TIMEOUT;
    loop {
        let ended = || Failure::new(format!("Machine {name} ended before it was suspended"));
        machine.reload().map_err(|_| ended())?;
        match machine.status() {
            Status::Suspended => {
                ending::wait_for_keeper(machine);
                return Ok(());
            }
            Status::Exited | Status::Dead => return Err(ended()),
            _ if std::time::Instant::now() > until => {
                return Err(Failure::new(format!("The keeper of machine {name} does not leave it")));
            }
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader},
        ops::ControlFlow,
        os::unix::net::UnixListener,
        process::{Child, Command},
        sync::{
            Arc, Mutex,
            atomic::{AtomicUsize, Ordering::Relaxed},
        },
        thread,
    };

    use super::{
        super::{
            keeper::steward::Steward,
            state::{ProcessName, Record},
        },
        *,
    };

    /// A machine of this process's, with a monitor that only answers and a process for it.
    struct Bench {
        _dir: tempfile::TempDir,
        machine: Machine,
        monitor: Child,
        asked: Arc<Mutex<Vec<String>>>,
    }

    /// What the job is said to be when it was asked for often enough.
    fn bench(becomes: &'static str) -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let state = State::at(dir.path().join("s")).unwrap();
        let monitor = Command::new("sleep").arg("1000").spawn().unwrap();
        let record = Record {
            started: Some(1),
            keeper: ProcessName::of(std::process::id().cast_signed()),
            monitor: ProcessName::of(monitor.id().cast_signed()),
            ..Record::example(&"ab".repeat(16), "web")
        };
        let machine = state.create(record).unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let listener = UnixListener::bind(machine.api()).unwrap();
        let (seen, place) = (Arc::clone(&asked), machine.suspended());
        thread::spawn(move || {
            let polls = AtomicUsize::new(0);
            let after = if becomes == "Cancelled" { 100_000 } else { 3 };
            for stream in listener.incoming().map_while(Result::ok) {
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
                if let Some(first) = lines.next() {
                    let mut head = lines.by_ref().take_while(|line| !line.is_empty());
                    let length = head.find_map(|line| line.strip_prefix("Content-Length: ")?.parse().ok());
                    head.for_each(drop);
                    assert!(length.is_none_or(|length: usize| length < 50_000));
                    seen.lock().unwrap().push(first.clone());
                    let job = |state: &str| {
                        format!(
                            r#"{{"id": 1, "snapshot_path": "x", "snapshot_type": "Full", "state": "{state}",
                                "done_bytes": 1, "total_bytes": 2, "pause_us": 0}}"#
                        )
                    };
                    let body = match first.split(' ').collect::<Vec<_>>()[..] {
                        ["GET", "/", _] => r#"{"state": "Running"}"#.to_owned(),
                        ["GET", "/vm/config", _] => "{}".to_owned(),
                        ["DELETE", ..] => {
                            polls.store(100_000, Relaxed);
                            "null".to_owned()
                        }
                        // A cancelled one is so only once it was.
                        ["GET", ..] if polls.fetch_add(1, Relaxed) >= after => {
                            if becomes == "Done" {
                                std::fs::create_dir_all(&place).unwrap();
                                std::fs::write(place.join("manifest.json"), "").unwrap();
                            }
                            job(becomes)
                        }
                        ["PUT" | "GET", ..] => job("Running"),
                        _ => "null".to_owned(),
                    };
                    let length = body.len();
                    let answer = format!(
                        "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
                    );
                    (&stream).write_all(answer.as_bytes()).unwrap();
                }
                // Its body was not read; closing at once would reset the answer.
                let _ = stream.shutdown(std::net::Shutdown::Write);
                thread::spawn(move || lines.for_each(drop));
            }
        });
        Bench { _dir: dir, machine, monitor, asked }
    }

    impl Bench {
        fn count(&self, start: &str) -> usize {
            self.asked.lock().unwrap().iter().filter(|line| line.starts_with(start)).count()
        }
    }

    impl Drop for Bench {
        fn drop(&mut self) {
            let _ = self.monitor.kill();
            let _ = self.monitor.wait();
        }
    }

    struct Stop;

    impl Watch for Stop {
        fn step(&self, _: u64, _: u64) -> ControlFlow<()> {
            ControlFlow::Break(())
        }
    }

    #[test]
    fn a_machine_whose_snapshot_is_whole_is_suspended_and_its_monitor_is_gone() {
        let mut bench = bench("Done");
        let _steward = Steward::start(&bench.machine, None).unwrap();
        let mut machine = bench.machine.clone();
        let client = thread::spawn(move || (suspend(&mut machine, &()), machine));
        assert!(!bench.monitor.wait().unwrap().success());
        // What its keeper does then.
        let mut kept = bench.machine.clone();
        kept.record.keeper = None;
        kept.save().unwrap();
        let (suspended, machine) = client.join().unwrap();
        suspended.unwrap();
        assert_eq!(machine.record.status(), Status::Suspended);
        assert_eq!(bench.count("PATCH /vm"), 1);
    }

    #[test]
    fn a_machine_whose_snapshot_fails_or_is_cancelled_goes_on() {
        for (becomes, watch) in [("Failed", &() as &dyn Watch), ("Cancelled", &Stop)] {
            let mut bench = bench(becomes);
            let _steward = Steward::start(&bench.machine, None).unwrap();
            let mut machine = bench.machine.clone();
            let failure = suspend(&mut machine, watch).unwrap_err();
            assert!(failure.message.contains("web was not suspended"), "{failure}");
            // Paused, and resumed.
            assert_eq!(bench.count("PATCH /vm"), 2);
            assert_eq!(bench.count("DELETE /snapshot/jobs/1"), usize::from(becomes == "Cancelled"));
            assert_eq!(bench.monitor.try_wait().unwrap(), None, "the monitor lives");
            assert_eq!(machine.record.status(), Status::Running);
        }
    }

    #[test]
    fn a_command_that_is_killed_cancels() {
        let bench = bench("Cancelled");
        let _steward = Steward::start(&bench.machine, None).unwrap();
        let mut keeper = UnixStream::connect(bench.machine.keeper_socket()).unwrap();
        keeper.write_all(b"{\"suspend\":{}}\n").unwrap();
        drop(keeper);
        let until = std::time::Instant::now() + Duration::from_secs(20);
        while bench.count("PATCH /vm") < 2 {
            assert!(std::time::Instant::now() < until, "{:?}", bench.asked.lock().unwrap());
            thread::sleep(Duration::from_millis(5));
        }
        // Nonsense is answered and changes nothing.
        let mut keeper = UnixStream::connect(bench.machine.keeper_socket()).unwrap();
        keeper.write_all(b"{\"explode\":{}}\n").unwrap();
        let mut said = String::new();
        keeper.read_to_string(&mut said).unwrap();
        assert!(said.contains("failed") && said.contains("cannot be understood"), "{said}");
    }
}
