//! What a keeper does for other processes while its machine runs: suspend it.
//!
//! ```text
//!   nacelle suspend ── keeper.sock ──► steward
//!        {"suspend":{}}                  streams let go, PATCH /vm Paused
//!        ◄── {"step":{done,total}}       PUT /snapshot/create, into suspended/
//!        end of connection ─────────►    cancelled: goes on as before
//!        ◄── {"failed":{..}}             failed or cancelled
//!        ◄── end of connection           the monitor was killed, the keeper leaves
//! ```
//!
//! The keeper does it, and not the command, because it is the one whose death is the machine's:
//! a command that is killed half way leaves nobody who would let the machine go on. What decides
//! is one rename: once `suspended/` is there the machine is suspended, whoever is killed then.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, PipeWriter, Read, Write},
    os::{
        fd::AsRawFd,
        unix::net::{UnixListener, UnixStream},
    },
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use api::{
    Spec,
    client::Client,
    spec::{CreateSnapshot, JobState, SnapshotJob},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{
    super::{
        failure::{Failure, Outcome, doing},
        state::Machine,
    },
    carriage::Carriage,
    readable,
};

/// Longest wait for a request, once somebody connected.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest request, in bytes.
const REQUEST_MAX: u64 = 4096;
/// How often a snapshot that is being written is asked how far it is.
const INTERVAL: Duration = Duration::from_millis(20);

/// What a keeper can be asked for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Asked {
    /// To suspend its machine. The end of the connection cancels it.
    Suspend {},
}

/// What a keeper answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Told {
    /// How far it is, in bytes.
    Step {
        /// Bytes written.
        done: u64,
        /// Bytes to write.
        total: u64,
    },
    /// It was not done; the machine is as before.
    Failed {
        /// What was wrong.
        message: String,
        /// What led to it.
        causes: Vec<String>,
    },
}

/// Serves a keeper's socket until it is dropped.
#[derive(Debug)]
pub struct Steward {
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Steward {
    /// Begins to serve. `carriage` holds the streams of a machine that has some.
    pub(in crate::cli) fn start(
        machine: &Machine,
        carriage: Option<Arc<Mutex<Option<Carriage>>>>,
    ) -> Outcome<Steward> {
        let path = machine.keeper_socket();
        let _ = fs::remove_file(&path);
        let listener = doing(UnixListener::bind(&path), || format!("{} cannot be made", path.display()))?;
        let (stopped, stop) = doing(io::pipe(), || "No pipe can be had".to_owned())?;
        let machine = machine.clone();
        let serve = move || {
            let fds = [listener.as_raw_fd(), stopped.as_raw_fd()];
            loop {
                if !readable(&fds, Duration::from_secs(3600)) {
                    continue;
                }
                if readable(&[stopped.as_raw_fd()], Duration::ZERO) {
                    return;
                }
                let Ok((mut connection, _)) = listener.accept() else { continue };
                if let Err(failure) = serve(&machine, carriage.as_deref(), &mut connection) {
                    let Failure { message, causes, .. } = failure;
                    let _ = tell(&mut connection, &Told::Failed { message, causes });
                }
            }
        };
        let thread = doing(thread::Builder::new().spawn(serve), || "No thread can be had".to_owned())?;
        Ok(Steward { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Steward {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn tell(connection: &mut UnixStream, told: &Told) -> io::Result<()> {
    let mut line = serde_json::to_vec(told).unwrap_or_default();
    line.push(b'\n');
    connection.write_all(&line)
}

/// Does what is asked over one connection.
fn serve(
    machine: &Machine,
    carriage: Option<&Mutex<Option<Carriage>>>,
    connection: &mut UnixStream,
) -> Outcome<()> {
    let unread = || "The request cannot be read".to_owned();
    doing(connection.set_read_timeout(Some(REQUEST_TIMEOUT)), unread)?;
    doing(connection.set_write_timeout(Some(REQUEST_TIMEOUT)), unread)?;
    let mut line = Vec::new();
    let ours = doing(connection.try_clone(), unread)?;
    doing(BufReader::new(ours.take(REQUEST_MAX)).read_until(b'\n', &mut line), unread)?;
    let Asked::Suspend {} = serde_json::from_slice(&line)
        .map_err(|e| Failure::because("The request cannot be understood", &e))?;
    suspend(machine, carriage, connection)
}

/// Brings the machine into its snapshot and ends the monitor. After an error it goes on.
fn suspend(
    machine: &Machine,
    carriage: Option<&Mutex<Option<Carriage>>>,
    connection: &mut UnixStream,
) -> Outcome<()> {
    let mut client = Client::unix(machine.api());
    let info: Value = client.get("/")?;
    let ran = info.get("state").and_then(Value::as_str) == Some("Running");
    let mut held = carriage.map(|c| c.lock().unwrap_or_else(PoisonError::into_inner));
    let mut carriage = held.as_mut().and_then(|held| held.as_mut());
    // The agent of a machine that stands still would not answer.
    let detached = match &mut carriage {
        Some(carriage) if ran => carriage.detach(),
        _ => Ok(()),
    };
    let written = detached.and_then(|()| write(machine, ran, &mut client, connection));
    // Whatever was answered, or not: a snapshot that is there is whole.
    let failure = match written {
        Err(failure) if !machine.suspended().exists() => failure,
        _ => {
            drop(held);
            if let Some(monitor) = machine.record.monitor {
                monitor.signal(libc::SIGKILL);
            }
            return Ok(());
        }
    };
    if ran {
        let _: Result<Value, _> = client.patch("/vm", Some(&json!({ "state": "Resumed" })));
        // One that became whole since then is none any more: the machine runs. A monitor that
        // writes one does not let the machine run, so none comes later.
        let _ = fs::remove_dir_all(machine.suspended());
        if let Some(carriage) = carriage {
            // Without its streams the machine would stop at its next output.
            carriage.attach()?;
        }
    }
    Err(failure)
}

fn write(machine: &Machine, ran: bool, client: &mut Client, connection: &mut UnixStream) -> Outcome<()> {
    if ran {
        client.patch::<Value>("/vm", Some(&json!({ "state": "Paused" })))?;
    }
    let spec: Spec = client.get("/vm/config")?;
    let written = spec.drives.iter().filter(|drive| !drive.is_read_only);
    for path in written.map(|drive| &drive.path_on_host).filter(|path| path.exists()) {
        // The snapshot is on the disk before it counts, and so is what belongs to it.
        let synced = File::open(path).and_then(|file| file.sync_all());
        doing(synced, || format!("{} cannot be brought to the disk", path.display()))?;
    }
    let body = CreateSnapshot {
        snapshot_path: machine.suspended(),
        note: Some(note(machine)),
        background: true,
        replace: true,
        ..CreateSnapshot::default()
    };
    let mut job: SnapshotJob = client.put("/snapshot/create", Some(&body))?;
    let path = format!("/snapshot/jobs/{}", job.id);
    let mut cancelled = false;
    while job.state == JobState::Running {
        let (done, total) = (job.done_bytes, job.total_bytes);
        // Nothing more is asked over this connection: what is there to be read is its end.
        let gone = tell(connection, &Told::Step { done, total }).is_err()
            || readable(&[connection.as_raw_fd()], INTERVAL);
        if gone && !cancelled {
            cancelled = true;
            // It may be whole already; then it is.
            let _: Result<Value, _> = client.delete(&path);
        }
        if gone {
            thread::sleep(INTERVAL);
        }
        job = client.get(&path)?;
    }
    match job.state {
        JobState::Done => Ok(()),
        JobState::Cancelled => Err(Failure::new("It was cancelled; the machine goes on")),
        _ => Err(Failure {
            causes: job.error.into_iter().collect(),
            ..Failure::new("The snapshot of the machine cannot be written; it goes on")
        }),
    }
}

/// What a snapshot tells of its machine besides what the monitor knows.
pub fn note(machine: &Machine) -> Map<String, Value> {
    let mut note = Map::new();
    note.insert("record".to_owned(), serde_json::to_value(&machine.record).unwrap_or_default());
    if let Some(mut plan) = machine.plan() {
        // Seeds are for the machine alone.
        plan.setup.entropy.clear();
        note.insert("plan".to_owned(), serde_json::to_value(plan).unwrap_or_default());
    }
    note
}
