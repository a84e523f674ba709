//! What is known of the machines of this host: one directory each, readable without anybody's
//! help.
//!
//! ```text
//!   $NACELLE_STATE_DIR | $XDG_RUNTIME_DIR/nacelle | /run/nacelle
//!     lock                      held while a machine is made, found a name, or removed
//!     machines/<start of the id>/
//!       machine.json            the record; replaced as a whole, never changed in place
//!       config.json             what the monitor was given
//!       vsock.sock              the door to the agent
//!       api.sock                the monitor's API
//!       console.log             what the guest's kernel printed
//!       exit-code               empty until its end, then one byte
//!       output.log              what the container printed (see log.rs)
//!       upper.img               what the container wrote
//!       keeper.sock             the door to its keeper
//!       suspended/              a snapshot; while it is there, the machine goes on from it
//!     making/                   what commands that make machines of snapshots have put up
//! ```
//!
//! A directory is named by the first twelve digits of the id, because a socket's path is at most
//! 107 bytes long and a user's runtime directory takes some of them.
//!
//! Nothing runs in order to keep this true. A record names the processes behind it by number
//! and start time, so a number that was given to somebody else is not mistaken for ours, and
//! a machine whose processes are gone without having said how it ended is seen as dead.

use std::{
    fs::{self, File},
    io::Write,
    os::{
        fd::AsRawFd,
        unix::fs::{DirBuilderExt, FileExt},
    },
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use super::{
    failure::{Failure, Outcome, doing},
    scaffold,
};

/// Name of the directory from which a suspended machine goes on.
const SUSPENDED: &str = "suspended";
/// Name of the file that [`Ending`] is.
const ENDING: &str = "exit-code";

/// A process, named so that another one with its number is told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessName {
    /// Process number.
    pub pid: i32,
    /// When it started, in clock ticks since the host's start (proc(5), field 22 of `stat`).
    pub started: u64,
}

impl ProcessName {
    /// The process with this number, if it runs.
    pub fn of(pid: i32) -> Option<ProcessName> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field is a name in brackets that may hold anything.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let zombie = matches!(fields.first(), Some(&"Z" | &"X"));
        let started = fields.get(19)?.parse().ok()?;
        (!zombie).then_some(ProcessName { pid, started })
    }

    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        ProcessName::of(self.pid).as_ref() == Some(self)
    }

    /// Sends it a signal; false when it is gone.
    pub fn signal(&self, number: i32) -> bool {
        // SAFETY: `pidfd_open` and `pidfd_send_signal` take numbers only. The descriptor is
        // opened first and the start time compared after, so the signal cannot reach another
        // process that was given the number meanwhile.
        unsafe {
            let fd = libc::syscall(libc::SYS_pidfd_open, self.pid, 0);
            if fd < 0 {
                return false;
            }
            let ours = self.is_alive();
            let null = std::ptr::null::<libc::siginfo_t>();
            let sent = ours && libc::syscall(libc::SYS_pidfd_send_signal, fd, number, null, 0) == 0;
            libc::close(fd as i32);
            sent
        }
    }
}

/// How a machine's container ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// Exit code as a shell would show it.
    pub exit_code: u8,
    /// Anything worth saying: a signal, want of memory, a failure of ours.
    pub reason: Option<String>,
    /// When, in seconds since 1970.
    pub at: u64,
}

/// What is recorded of a machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// 64 hexadecimal digits.
    pub id: String,
    /// Its name.
    pub name: String,
    /// The image, as it was called.
    pub image: String,
    /// The image's key in the store.
    pub image_key: String,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Environment.
    pub env: Vec<String>,
    /// vCPUs.
    pub cpus: u8,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// It has a terminal.
    pub terminal: bool,
    /// It is removed when it ends.
    pub ephemeral: bool,
    /// It was made from a specification: there is no container and no agent in it.
    #[serde(default)]
    pub plain: bool,
    /// Signal that asks it to end.
    pub stop_signal: i32,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// When its command started.
    pub started: Option<u64>,
    /// The monitor.
    pub monitor: Option<ProcessName>,
    /// The process that holds its output and waits for its end.
    pub keeper: Option<ProcessName>,
    /// How it ended.
    pub end: Option<End>,
    /// Since when there is a snapshot that it goes on from, in seconds since 1970. Not written
    /// down: the snapshot says it, so that there is one moment at which it becomes true.
    #[serde(skip)]
    pub suspended: Option<u64>,
}

/// Where a machine stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Its command has not started yet.
    Created,
    /// It runs.
    Running,
    /// It is in a snapshot, without any process.
    Suspended,
    /// Its command ended.
    Exited,
    /// Its processes are gone and did not say how it ended.
    Dead,
}

impl Status {
    /// Its name, as commands print it.
    pub fn word(self) -> String {
        format!("{self:?}").to_lowercase()
    }
}

impl Record {
    /// A machine without a container and without an id, which nobody keeps yet.
    pub fn plain(cpus: u8, memory_mib: u64, kernel: PathBuf) -> Record {
        Record {
            id: String::new(),
            name: String::new(),
            image: String::new(),
            image_key: String::new(),
            command: Vec::new(),
            env: Vec::new(),
            cpus,
            memory_mib,
            kernel,
            terminal: false,
            ephemeral: false,
            plain: true,
            stop_signal: libc::SIGTERM,
            created: now(),
            started: None,
            monitor: None,
            keeper: None,
            end: None,
            suspended: None,
        }
    }

    /// A machine that nobody keeps yet.
    #[cfg(test)]
    pub fn example(id: &str, name: &str) -> Record {
        Record {
            id: id.to_owned(),
            name: name.to_owned(),
            image: "busybox".to_owned(),
            command: vec!["true".to_owned()],
            plain: false,
            ..Record::plain(1, 128, PathBuf::new())
        }
    }

    /// Where it stands now.
    pub fn status(&self) -> Status {
        let alive = |p: &Option<ProcessName>| p.as_ref().is_some_and(ProcessName::is_alive);
        match (&self.end, self.started) {
            (Some(_), _) => Status::Exited,
            // Also while the monitor is gone already: the keeper is about to say how it ended.
            (None, Some(_)) if alive(&self.keeper) => Status::Running,
            (None, None) if alive(&self.keeper) => Status::Created,
            _ if self.suspended.is_some() => Status::Suspended,
            _ => Status::Dead,
        }
    }

    /// The first twelve digits of the id.
    pub fn short_id(&self) -> &str {
        self.id.get(..12).unwrap_or(&self.id)
    }
}

/// A machine of this host.
#[derive(Debug, Clone)]
pub struct Machine {
    dir: PathBuf,
    /// Its record, as it was read.
    pub record: Record,
}

impl Machine {
    /// The path of one of its files.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The socket of its agent.
    pub fn vsock(&self) -> PathBuf {
        self.file("vsock.sock")
    }

    /// The socket of its monitor's API.
    pub fn api(&self) -> PathBuf {
        self.file("api.sock")
    }

    /// The plan of its container, as far as it is known.
    pub fn plan(&self) -> Option<super::keeper::Plan> {
        serde_json::from_slice(&fs::read(self.file("plan.json")).ok()?).ok()
    }

    /// Its agent, for requests; an error in words when the machine does not run.
    pub fn agent(&self) -> Outcome<guest::client::Machine> {
        match self.record.status() {
            _ if self.record.plain => Err(Failure::new(format!(
                "Machine {} was made from a specification; there is no agent in it to ask",
                self.record.name
            ))),
            Status::Running => Ok(guest::client::Machine::new(self.vsock())),
            status => Err(Failure::new(format!(
                "Machine {} is {}; only a running one can be asked",
                self.record.name,
                status.word()
            ))),
        }
    }

    /// Where the snapshot of a suspended one is.
    pub fn suspended(&self) -> PathBuf {
        self.file(SUSPENDED)
    }

    /// The socket of its keeper.
    pub fn keeper_socket(&self) -> PathBuf {
        self.file("keeper.sock")
    }

    /// An error in words unless it runs. `what` is what cannot be done else.
    pub fn must_run(&mut self, what: &str) -> Outcome<()> {
        let name = &self.record.name;
        match self.record.status() {
            Status::Running => Ok(()),
            Status::Suspended => Err(Failure::new(format!(
                "Machine {name} is suspended; let it go on with 'nacelle resume {name}' to {what}"
            ))),
            status => {
                let status = status.word();
                Err(Failure::new(format!("Machine {name} is {status}; only a running one can {what}")))
            }
        }
    }

    /// Replaces the record on disk by this one.
    pub fn save(&self) -> Outcome<()> {
        let text = serde_json::to_vec_pretty(&self.record).unwrap_or_default();
        let (path, temporary) = (self.file("machine.json"), self.file("machine.json.new"));
        let write = || {
            let mut file = File::create(&temporary)?;
            file.write_all(&text)?;
            file.sync_data()?;
            fs::rename(&temporary, &path)
        };
        doing(write(), || format!("The record {} cannot be written", path.display()))
    }

    /// Reads the record again.
    pub fn reload(&mut self) -> Outcome<()> {
        self.record = read_record(&self.dir)?;
        Ok(())
    }

    /// Where it stands now. A machine that seems dead is looked at once more: its keeper may have
    /// written the end down, and gone, since the record was read.
    pub fn status(&mut self) -> Status {
        match self.record.status() {
            // Or it was suspended.
            Status::Dead => match self.reload() {
                Ok(()) => self.record.status(),
                Err(_) => Status::Dead,
            },
            status => status,
        }
    }

    /// Tells those who hold [`Machine::ending`] how it ended, also when it is removed next.
    pub fn announce(&self, code: u8) {
        let file = File::options().write(true).open(self.file(ENDING));
        // Nobody may be waiting, so nobody may have to be told.
        let _ = file.and_then(|mut file| file.write_all(&[code]));
    }

    /// Where the exit code will be, to be held while one waits: it can still be read once the
    /// machine was removed. `None` when it was already.
    pub fn ending(&self) -> Option<Ending> {
        File::open(self.file(ENDING)).ok().map(Ending)
    }

    /// Removes everything that is kept of the machine.
    pub fn remove(&self) -> Outcome<()> {
        // The record goes first: a directory without one is no machine, whatever else is left.
        let _ = fs::remove_file(self.file("machine.json"));
        match fs::remove_dir_all(&self.dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Failure::because(format!("{} cannot be removed", self.dir.display()), &e))
            }
            _ => Ok(()),
        }
    }
}

/// The file of a machine that will hold its exit code.
#[derive(Debug)]
pub struct Ending(File);

impl Ending {
    /// The exit code, once it is known.
    pub fn code(&self) -> Option<u8> {
        let mut code = [0];
        self.0.read_exact_at(&mut code, 0).ok().map(|()| code[0])
    }
}

/// The state directory.
#[derive(Debug, Clone)]
pub struct State {
    root: PathBuf,
}

/// Held while machines are made or removed.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "its lock ends with it")] File);

impl State {
    /// Where the state is: `NACELLE_STATE_DIR`, `nacelle` in `XDG_RUNTIME_DIR`, or
    /// `/run/nacelle`.
    pub fn directory() -> PathBuf {
        let variable = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let runtime = || variable("XDG_RUNTIME_DIR").map(|dir| dir.join("nacelle"));
        variable("NACELLE_STATE_DIR").or_else(runtime).unwrap_or_else(|| "/run/nacelle".into())
    }

    /// Opens the directory, making it if need be, for this user alone. What killed commands left
    /// is taken away.
    pub fn open() -> Outcome<State> {
        let state = State::at(State::directory())?;
        scaffold::sweep(&state);
        Ok(state)
    }

    /// The state in `root`.
    pub fn at(root: PathBuf) -> Outcome<State> {
        let make = fs::DirBuilder::new().recursive(true).mode(0o700).create(root.join("machines"));
        doing(make, || format!("The state directory {} cannot be made", root.display()))?;
        Ok(State { root })
    }

    /// Where the machines' directories are.
    pub fn place(&self) -> PathBuf {
        self.root.join("machines")
    }

    /// Where commands put what they need while they make machines of a snapshot.
    pub fn making(&self) -> PathBuf {
        self.root.join("making")
    }

    /// Takes the lock; others wait.
    pub fn lock(&self) -> Outcome<Lock> {
        let path = self.root.join("lock");
        let lock = || {
            let file = File::options().create(true).truncate(false).write(true).open(&path)?;
            // SAFETY: the descriptor is open.
            match unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) } {
                0 => Ok(Lock(file)),
                _ => Err(std::io::Error::last_os_error()),
            }
        };
        doing(lock(), || format!("{} cannot be locked", path.display()))
    }

    /// Every machine, the newest first. Directories without a readable record are passed over.
    pub fn machines(&self) -> Outcome<Vec<Machine>> {
        let dir = self.place();
        let entries = doing(fs::read_dir(&dir), || format!("{} cannot be read", dir.display()))?;
        let mut machines: Vec<Machine> = entries
            .flatten()
            .filter_map(|entry| {
                let dir = entry.path();
                read_record(&dir).ok().map(|record| Machine { dir, record })
            })
            .collect();
        machines.sort_by(|a, b| (b.record.created, &b.record.id).cmp(&(a.record.created, &a.record.id)));
        Ok(machines)
    }

    /// The machine called `word`: by name, by id, or by the start of an id that no other has.
    pub fn find(&self, word: &str) -> Outcome<Machine> {
        let machines = self.machines()?;
        if let Some(found) = machines.iter().find(|m| m.record.name == word || m.record.id == word) {
            return Ok(found.clone());
        }
        let starts = |m: &&Machine| !word.is_empty() && m.record.id.starts_with(word);
        let found: Vec<&Machine> = machines.iter().filter(starts).collect();
        match found[..] {
            [one] => Ok(one.clone()),
            [] => {
                let names = machines.iter().map(|m| m.record.name.as_str());
                let hint = api::nearest(word, names).map(|n| format!("; did you mean {n}?"));
                Err(Failure::new(format!("No machine is called {word:?}{}", hint.unwrap_or_default())))
            }
            _ => {
                let list: Vec<String> =
                    found.iter().map(|m| format!("{} ({})", m.record.short_id(), m.record.name)).collect();
                let list = list.join(", ");
                Err(Failure::new(format!("{word:?} is the start of several ids: {list}; give more of it")))
            }
        }
    }

    /// Makes the directory of a new machine. A name that another one has is refused; without
    /// a name, one is made up. The record is written.
    pub fn create(&self, mut record: Record) -> Outcome<Machine> {
        let _lock = self.lock()?;
        let machines = self.machines()?;
        if record.name.is_empty() {
            record.name = free_name(&record.id, &machines);
        }
        check_name(&record.name)?;
        if let Some(taken) = machines.iter().find(|m| m.record.name == record.name) {
            let (name, id) = (&record.name, taken.record.short_id());
            return Err(Failure::new(format!(
                "The name {name:?} is taken by machine {id}; remove it with 'nacelle rm {name}' or choose another"
            )));
        }
        let dir = self.place().join(record.short_id());
        let made = fs::DirBuilder::new().mode(0o700).create(&dir);
        doing(made, || format!("{} cannot be made", dir.display()))?;
        let machine = Machine { dir, record };
        let ending = machine.file(ENDING);
        let made = doing(File::create(&ending), || format!("{} cannot be made", ending.display()));
        made.and_then(|_| machine.save()).inspect_err(|_| {
            let _ = machine.remove();
        })?;
        Ok(machine)
    }
}

/// A fresh id: 64 hexadecimal digits from the kernel's generator.
pub fn fresh_id() -> Outcome<String> {
    let mut bytes = [0u8; 32];
    let read = File::open("/dev/urandom").and_then(|mut f| std::io::Read::read_exact(&mut f, &mut bytes));
    doing(read, || "No random bytes can be had".to_owned())?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

fn read_record(dir: &Path) -> Outcome<Record> {
    let path = dir.join("machine.json");
    let text = doing(fs::read(&path), || format!("{} cannot be read", path.display()))?;
    let mut record: Record = serde_json::from_slice(&text)
        .map_err(|e| Failure::because(format!("{} is not a machine's record", path.display()), &e))?;
    // A snapshot appears whole, and is taken away before its machine goes on.
    let taken = fs::metadata(dir.join(SUSPENDED).join("manifest.json")).and_then(|m| m.modified());
    let seconds = |t: SystemTime| t.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    record.suspended = taken.ok().map(seconds);
    Ok(record)
}

fn check_name(name: &str) -> Outcome<()> {
    let first = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    let rest = name.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
    if first && rest && name.len() <= 64 {
        return Ok(());
    }
    let rule = "it must be 1 to 64 letters, digits, '_', '.' and '-', beginning with a letter or digit";
    Err(Failure::new(format!("The name {name:?} cannot be used; {rule}")))
}

/// A name nobody has, easy to say and to type, chosen by the id.
fn free_name(id: &str, machines: &[Machine]) -> String {
    const FIRST: [&str; 16] = [
        "amber", "brisk", "calm", "dusky", "early", "fleet", "glad", "hazel", "ivory", "keen", "lofty",
        "mild", "noble", "quiet", "swift", "tidy",
    ];
    const SECOND: [&str; 16] = [
        "albatross",
        "balloon",
        "cirrus",
        "condor",
        "falcon",
        "glider",
        "harrier",
        "kestrel",
        "kite",
        "lark",
        "martin",
        "osprey",
        "petrel",
        "swallow",
        "swift",
        "zephyr",
    ];
    let digit = |at: usize| id.get(at..=at).and_then(|d| usize::from_str_radix(d, 16).ok()).unwrap_or(0);
    let plain = format!("{}-{}", FIRST[digit(0)], SECOND[digit(1)]);
    let taken = |name: &str| machines.iter().any(|m| m.record.name == name);
    if taken(&plain) { format!("{plain}-{}", id.get(2..8).unwrap_or_default()) } else { plain }
}

#[cfg(test)]
mod tests;
