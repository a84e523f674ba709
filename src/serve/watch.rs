//! What happens to machines is noticed here, whoever does it.
//!
//! The state directory is watched (inotify): machines come and go in it, and a record is replaced
//! whenever something happens to its machine. After each sign, and every few seconds without one
//! (a killed keeper writes nothing), all records are read and compared with what was seen before.
//! Beside that, the events of each running monitor are followed.

use std::{collections::HashMap, io, sync::Arc, time::Duration};

use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use serde_json::{Map, Value, json};
use tokio::{io::unix::AsyncFd, net::UnixStream};

use super::{Service, say};
use crate::cli::state::{Machine, Status};

/// Time between looks without a sign.
const INTERVAL: Duration = Duration::from_secs(3);
/// The same where the directory cannot be watched, and while a machine is being made: its keeper
/// may write the record before the machine's own directory is watched.
const UNWATCHED_INTERVAL: Duration = Duration::from_millis(250);
/// Signs that come together are answered by one look.
const SETTLE: Duration = Duration::from_millis(5);
/// Machines whose own events are followed.
const FOLLOWED: usize = 1024;
/// Longest line of a machine's events, in bytes.
const LINE_MAX: usize = 64 << 10;

/// Watches for as long as the service lives.
pub async fn run(service: Arc<Service>) {
    let mut watcher = Watcher { service, inotify: None, known: HashMap::new(), making: false, first: true };
    watcher.inotify =
        Inotify::new().inspect_err(|e| say(&format!("Machines are looked at by time: {e}"))).ok();
    loop {
        watcher.look().await;
        match &watcher.inotify {
            None => tokio::time::sleep(UNWATCHED_INTERVAL).await,
            Some(inotify) => {
                let interval = if watcher.making { UNWATCHED_INTERVAL } else { INTERVAL };
                if tokio::time::timeout(interval, inotify.sign()).await.is_ok() {
                    tokio::time::sleep(SETTLE).await;
                }
                inotify.drain();
            }
        }
    }
}

struct Watcher {
    service: Arc<Service>,
    inotify: Option<Inotify>,
    known: HashMap<String, Known>,
    /// A machine has no keeper yet.
    making: bool,
    /// This is the first look: what is there was there before.
    first: bool,
}

/// What was seen of a machine.
struct Known {
    name: String,
    status: Status,
    /// It is being followed, until this is done.
    follower: Option<tokio::task::JoinHandle<u64>>,
    /// Number of the last of its own events that was passed on.
    sequence: u64,
}

impl Watcher {
    async fn look(&mut self) {
        if let Some(inotify) = &self.inotify {
            inotify.watch(&self.service.state.place());
        }
        let service = Arc::clone(&self.service);
        let read = tokio::task::spawn_blocking(move || service.state.machines().unwrap_or_default());
        let machines = read.await.unwrap_or_default();
        self.making = false;
        for machine in machines.clone() {
            self.compare(machine).await;
        }
        let there = |id: &String| machines.iter().any(|machine| machine.record.id == *id);
        let gone: Vec<String> = self.known.keys().filter(|id| !there(id)).cloned().collect();
        for id in gone {
            if let Some(known) = self.known.remove(&id) {
                self.service.hub.add(&known.name, &id, event("MachineRemoved", Map::new()));
            }
        }
        self.first = false;
        self.service.hub.nudge();
    }

    async fn compare(&mut self, mut machine: Machine) {
        let status = machine.status();
        let record = &machine.record;
        let before = self.known.get(&record.id).map(|known| known.status);
        if let (None, Some(inotify)) = (before, &self.inotify) {
            inotify.watch(&machine.file(""));
        }
        if (record.keeper, record.started, &record.end) == (None, None, &None) {
            // It is being made: nobody keeps it yet. It is announced when somebody does.
            self.making = true;
            return;
        }
        let hub = &self.service.hub;
        let add =
            |kind: &str, details: Map<String, Value>| hub.add(&record.name, &record.id, event(kind, details));
        match before {
            None => {
                let kind = if self.first { "MachineFound" } else { "MachineCreated" };
                let details = json!({ "status": status, "image": record.image });
                add(kind, details.as_object().cloned().unwrap_or_default());
                if !self.first && matches!(status, Status::Running | Status::Exited | Status::Dead) {
                    add("MachineStarted", Map::new());
                }
            }
            Some(Status::Created) if status != Status::Created => add("MachineStarted", Map::new()),
            Some(Status::Running) if status == Status::Suspended => add("MachineSuspended", Map::new()),
            Some(Status::Suspended) if status == Status::Running => add("MachineResumed", Map::new()),
            Some(_) => {}
        }
        let over = |status| matches!(status, Status::Exited | Status::Dead);
        let was_over = before.map_or(self.first, over);
        if over(status) && !was_over {
            let end = record.end.as_ref();
            let details = json!({
                "status": status,
                "exit_code": end.map(|end| end.exit_code),
                "reason": end.and_then(|end| end.reason.as_ref()),
            });
            add("MachineEnded", details.as_object().cloned().unwrap_or_default());
        }
        let fresh = || Known { name: record.name.clone(), status, follower: None, sequence: 0 };
        let known = self.known.entry(record.id.clone()).or_insert_with(fresh);
        known.status = status;
        if let Some(done) = known.follower.take_if(|follower| follower.is_finished()) {
            known.sequence = done.await.unwrap_or(known.sequence);
        }
        let (idle, sequence) = (known.follower.is_none(), known.sequence);
        let followed = self.known.values().filter(|known| known.follower.is_some()).count();
        if idle && status == Status::Running && followed < FOLLOWED {
            let follower = tokio::spawn(follow(Arc::clone(&self.service), machine.clone(), sequence));
            if let Some(known) = self.known.get_mut(&record.id) {
                known.follower = Some(follower);
            }
        }
    }
}

fn event(kind: &str, mut details: Map<String, Value>) -> Map<String, Value> {
    details.insert("event".to_owned(), kind.into());
    details
}

/// Passes on a machine's own events, those after number `seen`, until its monitor ends or breaks
/// off. Returns the number of the last one.
async fn follow(service: Arc<Service>, machine: Machine, mut seen: u64) -> u64 {
    let Ok(stream) = UnixStream::connect(machine.api()).await else { return seen };
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let Ok((mut sender, connection)) = handshake else { return seen };
    tokio::spawn(connection);
    let request = hyper::Request::get(format!("/events?since={seen}")).header("Host", "localhost");
    let Ok(request) = request.body(Empty::<bytes::Bytes>::new()) else { return seen };
    let Ok(response) = sender.send_request(request).await else { return seen };
    let mut body = response.into_body();
    let mut held: Vec<u8> = Vec::new();
    while let Some(Ok(frame)) = body.frame().await {
        held.extend_from_slice(frame.data_ref().map_or(&[], |data| &data[..]));
        while let Some(end) = held.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = held.drain(..=end).collect();
            let Ok(Value::Object(details)) = serde_json::from_slice(&line) else { continue };
            seen = details.get("sequence").and_then(Value::as_u64).unwrap_or(seen);
            service.hub.add(&machine.record.name, &machine.record.id, details);
        }
        if held.len() > LINE_MAX {
            break;
        }
    }
    seen
}

/// Signs of changes in directories.
struct Inotify(AsyncFd<std::os::fd::OwnedFd>);

impl Inotify {
    fn new() -> io::Result<Inotify> {
        let signs = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        // SAFETY: the descriptor is owned, so it stays open and the same until it is dropped with
        // its registration.
        Ok(Inotify(unsafe { AsyncFd::register(signs) }?))
    }

    /// Watches a directory, once however often it is asked to.
    fn watch(&self, directory: &std::path::Path) {
        let what = WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVED_TO | WatchFlags::ONLYDIR;
        // What cannot be watched (there are limits) is seen when the next time for a look has come.
        let _ = inotify::add_watch(self.0.get_ref(), directory, what);
    }

    async fn sign(&self) {
        if let Ok(mut ready) = self.0.readable().await {
            ready.clear_ready();
        }
    }

    fn drain(&self) {
        let mut events = [0; 4096];
        while matches!(rustix::io::read(self.0.get_ref(), &mut events), Ok(1..)) {}
    }
}
