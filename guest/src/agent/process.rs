//! The processes the agent started: who they are, whether they live, how they ended.
//!
//! A kernel process number can be used again the moment its process is reaped. So the reaper
//! looks without reaping, takes the table's lock, reaps, and records; and whoever signals a
//! process holds the same lock: a signal never goes to a stranger.
//!
//! ```text
//!   launch: lock ─ clone ─ insert ─ unlock ... confirm (the program runs)
//!   reaper: waitid(WNOWAIT) ─ lock ─ waitpid ─ record ─ unlock ─ latch
//!   wait:   poll(latch) ─ outputs read? ─ reply
//! ```

use super::{
    events::Events,
    streams::Streams,
    syscall::{Latch, check},
};
use guest::protocol::{
    Event, Exit, ExitStatus, Failure, FailureKind, MAIN, ProcessId, ProcessState, ProcessSummary,
};
use std::{
    collections::{BTreeMap, VecDeque},
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Most processes the agent has running at once; their children are not counted here.
pub const MAX_RUNNING: usize = 512;

/// How many ended processes are remembered for those who ask late.
const MAX_ENDED: usize = 128;

/// A process the agent started.
#[derive(Debug)]
pub struct Process {
    pub id: ProcessId,
    pub pid: i32,
    pub args: Vec<String>,
    pub user: String,
    pub terminal: bool,
    pub streams: Streams,
    /// Set once the process has ended.
    pub ended: Latch,
    exit: OnceLock<Exit>,
    started: Instant,
    kills_before: u64,
}

impl Process {
    /// How it ended, if it has.
    pub fn exit(&self) -> Option<&Exit> {
        self.exit.get()
    }

    fn summary(&self) -> ProcessSummary {
        ProcessSummary {
            process: self.id,
            pid: self.pid.cast_unsigned(),
            args: self.args.clone(),
            user: self.user.clone(),
            terminal: self.terminal,
            state: match self.exit.get() {
                Some(exit) => ProcessState::Exited(exit.clone()),
                None => ProcessState::Running,
            },
        }
    }
}

/// What a process is made of before it has a number.
pub struct Draft {
    pub main: bool,
    pub args: Vec<String>,
    pub user: String,
    pub terminal: bool,
    pub streams: Streams,
}

/// All processes the agent started.
pub struct Processes {
    table: Mutex<Table>,
    emptied: Condvar,
    events: Arc<Events>,
    /// Kills for want of memory in the container so far.
    kills: Box<dyn Fn() -> u64 + Send + Sync>,
}

#[derive(Default)]
struct Table {
    last: u32,
    running: BTreeMap<ProcessId, Entry>,
    ended: VecDeque<Arc<Process>>,
    closed: bool,
}

struct Entry {
    process: Arc<Process>,
    /// The program runs; before that its end is nobody's business but the launcher's.
    confirmed: bool,
}

impl Processes {
    pub fn new(events: Arc<Events>, kills: Box<dyn Fn() -> u64 + Send + Sync>) -> Self {
        Self { table: Mutex::default(), emptied: Condvar::new(), events, kills }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a process with `clone` and enters it before anyone can miss its end.
    pub fn spawn(
        &self,
        draft: Draft,
        clone: impl FnOnce() -> io::Result<i32>,
    ) -> Result<Arc<Process>, Failure> {
        let ended = Latch::new().map_err(|e| cannot_start(&e))?;
        let kills_before = (self.kills)();
        let mut table = self.lock();
        if table.closed {
            return Err(Failure::new(FailureKind::WrongState, "The machine is shutting down"));
        }
        if table.running.len() >= MAX_RUNNING {
            return Err(Failure::new(
                FailureKind::Limit,
                format!("{MAX_RUNNING} processes run already; end some first"),
            ));
        }
        let id = if draft.main { MAIN } else { ProcessId(table.last.wrapping_add(1)) };
        let pid = clone().map_err(|e| cannot_start(&e))?;
        table.last = table.last.max(id.0);
        let process = Arc::new(Process {
            id,
            pid,
            args: draft.args,
            user: draft.user,
            terminal: draft.terminal,
            streams: draft.streams,
            ended,
            exit: OnceLock::new(),
            started: Instant::now(),
            kills_before,
        });
        table.running.insert(id, Entry { process: process.clone(), confirmed: false });
        Ok(process)
    }

    /// The program runs.
    pub fn confirm(&self, process: &Arc<Process>) {
        let mut table = self.lock();
        match process.exit() {
            // It was quicker than we.
            Some(_) => self.retire(&mut table, process),
            None => {
                if let Some(entry) = table.running.get_mut(&process.id) {
                    entry.confirmed = true;
                }
            }
        }
    }

    /// The program never ran: forget the process, and kill what there is of it.
    pub fn withdraw(&self, process: &Arc<Process>) {
        let mut table = self.lock();
        if process.exit().is_none() {
            // SAFETY: kill has no memory arguments; the process is not reaped (see above).
            unsafe { libc::kill(process.pid, libc::SIGKILL) };
        }
        table.running.remove(&process.id);
        drop(table);
        self.emptied.notify_all();
    }

    /// A process by number.
    pub fn get(&self, id: ProcessId) -> Result<Arc<Process>, Failure> {
        let table = self.lock();
        let running = table.running.get(&id).map(|e| &e.process);
        running
            .or_else(|| table.ended.iter().find(|p| p.id == id))
            .cloned()
            .ok_or_else(|| Failure::new(FailureKind::NoSuchProcess, format!("There is no process {id}")))
    }

    /// Sends a signal.
    pub fn signal(&self, id: ProcessId, signal: i32) -> Result<(), Failure> {
        if !(1..=64).contains(&signal) {
            return Err(Failure::new(FailureKind::BadRequest, format!("{signal} is no signal; 1 to 64 are")));
        }
        let process = self.get(id)?;
        let _table = self.lock();
        if process.exit().is_some() {
            return Err(Failure::new(FailureKind::NoSuchProcess, format!("The process {id} has ended")));
        }
        // SAFETY: kill has no memory arguments; under the lock the process is not reaped.
        check(unsafe { libc::kill(process.pid, signal) })
            .map(drop)
            .map_err(|e| Failure::new(FailureKind::System, format!("Cannot signal process {id}: {e}")))
    }

    /// All processes, running first.
    pub fn list(&self) -> Vec<ProcessSummary> {
        let table = self.lock();
        let running = table.running.values().map(|e| &e.process);
        running.chain(&table.ended).map(|p| p.summary()).collect()
    }

    /// Starts nothing any more, and waits until nothing runs or the time is over.
    pub fn close(&self, limit: Duration) -> bool {
        let mut table = self.lock();
        table.closed = true;
        let (table, _) = self
            .emptied
            .wait_timeout_while(table, limit, |t| !t.running.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        table.running.is_empty()
    }

    /// Reaps what has ended, the agent's own children and orphans alike.
    pub fn reap(&self) {
        loop {
            // SAFETY: siginfo_t is plain data for which all zeroes is valid.
            let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
            let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
            // SAFETY: `info` is writable.
            let result = unsafe { libc::waitid(libc::P_ALL, 0, &raw mut info, flags) };
            // SAFETY: waitid filled the fields of a child's end, or left all zero.
            let pid = unsafe { info.si_pid() };
            if result < 0 || pid <= 0 {
                return;
            }
            self.reap_one(pid);
        }
    }

    fn reap_one(&self, pid: i32) {
        let mut table = self.lock();
        let mut status = 0;
        // SAFETY: `status` is writable.
        if unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) } != pid {
            return;
        }
        let Some(entry) = table.running.values().find(|e| e.process.pid == pid && e.process.exit().is_none())
        else {
            return;
        };
        let (process, confirmed) = (entry.process.clone(), entry.confirmed);
        let status = if libc::WIFSIGNALED(status) {
            ExitStatus::Signal((libc::WTERMSIG(status) & 0x7f) as u8)
        } else {
            ExitStatus::Code((libc::WEXITSTATUS(status) & 0xff) as u8)
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let exit = Exit {
            status,
            out_of_memory: (self.kills)() > process.kills_before,
            lived_ms: u64::try_from(process.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            unix_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
        };
        let _ = process.exit.set(exit);
        if confirmed {
            self.retire(&mut table, &process);
        }
        drop(table);
        process.streams.process_ended();
        process.ended.set();
        self.emptied.notify_all();
    }

    fn retire(&self, table: &mut Table, process: &Arc<Process>) {
        table.running.remove(&process.id);
        table.ended.push_back(process.clone());
        if table.ended.len() > MAX_ENDED {
            // The main process's end stays known: it is the machine's.
            let oldest = usize::from(table.ended.front().is_some_and(|p| p.id == MAIN));
            table.ended.remove(oldest);
        }
        if let Some(exit) = process.exit() {
            self.events.send(&Event::Exited { process: process.id, exit: exit.clone() });
        }
        self.emptied.notify_all();
    }
}

fn cannot_start(error: &io::Error) -> Failure {
    Failure::new(FailureKind::System, format!("Cannot make a process: {error}"))
}
