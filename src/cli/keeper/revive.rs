//! How a keeper takes up a machine that is in a snapshot: one that was suspended, or one that a
//! command made of a snapshot.
//!
//! ```text
//!   suspended/ ─────────────┐
//!   restore.json ─► some ───┴► monitor, PUT /snapshot/load      fails: all stays as it is
//!                   snapshot   suspended/ ─► .resumed/           the moment from which it runs
//!                              PATCH /vm Resumed
//!                              agent: clock, random numbers, who it is now
//!                              streams, wait                     as after a boot
//! ```
//!
//! The snapshot of a suspended machine is good for one resumption, because its drives are the
//! machine's own and change as soon as it runs. So it is taken away before the first instruction:
//! whoever is killed before leaves a suspended machine, whoever is killed after one that ran.

use std::{
    fs,
    io::Write,
    os::fd::AsRawFd,
    thread,
    time::{Duration, Instant},
};

use api::{client::Client, spec::LoadSnapshot};
use guest::{
    client::{Agent, ClientError},
    protocol::{FailureKind, Identity, InterfaceIdentity},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    super::{
        failure::{Failure, Outcome, doing},
        plain,
        state::{Machine, ProcessName, State, Status, now},
    },
    Attached, Monitor, entropy, keep, readable, start_timeout, unix_nanos,
};
use crate::signals::Signals;

/// The file that says what a machine is made of; it is gone once it was.
const ORDER: &str = "restore.json";
/// What becomes of a suspended machine's snapshot when it goes on.
const RESUMED: &str = ".resumed";
/// How long a monitor may take to load a snapshot.
const LOAD_TIMEOUT: Duration = Duration::from_secs(600);
/// How long the agent may take to answer one greeting.
const GREETING_TIMEOUT: Duration = Duration::from_secs(2);

/// How a machine comes out of a snapshot.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Revival {
    /// What its monitor loads.
    pub load: LoadSnapshot,
    /// It is another machine than the one that the snapshot was taken of, and so has a name of
    /// its own and shares no secrets.
    pub is_new: bool,
    /// Its interfaces that have other hardware addresses.
    pub network: Vec<InterfaceIdentity>,
}

impl Revival {
    /// The revival that waits for `machine`, if one does. From now on this process keeps it.
    pub fn of(machine: &mut Machine) -> Outcome<Option<Revival>> {
        // Two that want the same machine to go on must not both have it.
        let _lock = State::open()?.lock()?;
        machine.reload()?;
        let revival = match fs::read(machine.file(ORDER)) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|e| Failure::because("What the machine is made of cannot be read", &e))?,
            Err(_) if machine.record.status() == Status::Suspended => Revival {
                load: LoadSnapshot { snapshot_path: machine.suspended(), ..LoadSnapshot::default() },
                is_new: false,
                network: Vec::new(),
            },
            Err(_) => return Ok(None),
        };
        machine.record.keeper = ProcessName::of(std::process::id() as i32);
        machine.save()?;
        Ok(Some(revival))
    }

    /// Writes down what `machine` is to be made of.
    pub fn write(&self, machine: &Machine) -> Outcome<()> {
        let path = machine.file(ORDER);
        let text = serde_json::to_vec_pretty(self).unwrap_or_default();
        doing(fs::write(&path, text), || format!("{} cannot be written", path.display()))
    }

    /// Starts a monitor that goes on from the snapshot. After an error the machine is as before.
    pub(in crate::cli) fn load(&self, machine: &mut Machine, signals: &Signals) -> Outcome<Monitor> {
        self.run(machine, signals).inspect_err(|_| {
            (machine.record.monitor, machine.record.keeper) = (None, None);
            // The error that is reported is the first one.
            let _ = machine.save();
        })
    }

    fn run(&self, machine: &mut Machine, signals: &Signals) -> Outcome<Monitor> {
        // Those of a monitor that is gone.
        for socket in [machine.api(), machine.vsock()] {
            let _ = fs::remove_file(socket);
        }
        let (suspended, resumed) = (machine.suspended(), machine.file(RESUMED));
        let _ = fs::remove_dir_all(&resumed);
        let mut monitor = Monitor::start(machine, None, &[])?;
        machine.record.monitor = ProcessName::of(monitor.child.id() as i32);
        machine.save()?;
        plain::wait_for_api(machine, &mut monitor, signals)?;
        let mut client = Client::unix(machine.api()).patience(LOAD_TIMEOUT);
        let loaded = client.put::<Value>("/snapshot/load", Some(&self.load));
        loaded.map_err(|e| self.explain(machine, &mut monitor, &e))?;
        if !self.is_new {
            let moved = fs::rename(&suspended, &resumed);
            doing(moved, || format!("{} cannot be moved away", suspended.display()))?;
        }
        machine.record.started.get_or_insert_with(now);
        machine.save()?;
        let running = client.patch::<Value>("/vm", Some(&json!({ "state": "Resumed" })));
        running.map_err(|e| {
            // It was refused, so not one instruction has run. Any other error may hide that some
            // have, and then there is no way back.
            if !self.is_new && matches!(e, api::client::ClientError::Fault { .. }) {
                let _ = fs::rename(&resumed, &suspended);
            }
            monitor.explain(Failure::from(e))
        })?;
        // The monitor has what it needs open.
        let _ = if self.is_new { fs::remove_file(machine.file(ORDER)) } else { fs::remove_dir_all(&resumed) };
        Ok(monitor)
    }

    fn explain(&self, machine: &Machine, monitor: &mut Monitor, error: &api::client::ClientError) -> Failure {
        let name = &machine.record.name;
        let what = if self.is_new { "cannot be made of its snapshot" } else { "cannot go on" };
        let failure = Failure::because(format!("Machine {name} {what}"), error);
        match error {
            // The monitor lives and has said all.
            api::client::ClientError::Fault { .. } => failure,
            _ => monitor.explain(failure),
        }
    }

    /// Waits for the agent of a machine that goes on and tells it the time, random numbers and,
    /// where the machine is a new one, who it is.
    pub(super) fn reach(
        &self,
        machine: &Machine,
        mut monitor: Monitor,
        signals: &Signals,
    ) -> Outcome<(Monitor, Agent)> {
        let door = guest::client::Machine::new(machine.vsock());
        let until = Instant::now() + start_timeout();
        let mut pause = Duration::from_millis(1);
        while let Err(error) = door.clone().with_timeout(GREETING_TIMEOUT).control() {
            if readable(&[monitor.pidfd.as_raw_fd()], Duration::ZERO) || Instant::now() > until {
                return Err(monitor.explain(Failure::from(error)));
            }
            if let Some(number) = signals.next().filter(|number| *number != libc::SIGWINCH) {
                let code = 128u8.saturating_add(number as u8);
                return Err(Failure::new(format!("Signal {number} ended the machine")).with_code(code));
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
        let mut agent = door.control().map_err(|e| monitor.explain(e.into()))?;
        self.identify(machine, &mut agent).map_err(|failure| monitor.explain(failure))?;
        Ok((monitor, agent))
    }

    fn identify(&self, machine: &Machine, agent: &mut Agent) -> Outcome<()> {
        let record = &machine.record;
        let identity = Identity {
            unix_ns: Some(unix_nanos()),
            entropy: entropy(),
            hostname: self.is_new.then(|| record.name.clone()),
            // Ids are random and nobody else's.
            machine_id: self.is_new.then(|| record.id.chars().take(32).collect()),
            network: self.network.clone(),
        };
        let outcomes = match agent.identify(identity) {
            // An agent that was saved before there was this.
            Err(ClientError::Agent(failure)) if failure.kind == FailureKind::BadRequest => {
                return Ok(agent.set_time(unix_nanos(), entropy())?);
            }
            outcomes => outcomes?,
        };
        // A machine with a twin's name is better than none; its log says so.
        let log = fs::OpenOptions::new().append(true).create(true).open(machine.file("monitor.log"));
        if let Ok(mut log) = log {
            let failures = outcomes.iter().filter_map(|o| Some((&o.part, o.failure.as_ref()?)));
            for (part, failure) in failures {
                let _ = writeln!(log, "Keeper: the agent could not change {part}: {failure}");
            }
        }
        Ok(())
    }
}

/// Lets a machine go on from its snapshot with this process as its keeper and its terminal.
/// Returns the exit code of its command.
pub fn in_foreground(machine: &mut Machine) -> Outcome<u8> {
    let name = machine.record.name.clone();
    let revival = Revival::of(machine)?;
    let revival = revival.ok_or_else(|| Failure::new(format!("Machine {name} is in no snapshot")))?;
    if machine.record.plain {
        return plain::keep(machine, Some(revival), &|| {});
    }
    let plan = machine.plan().ok_or_else(|| Failure::new("The machine's plan is gone or damaged"))?;
    keep(machine, plan, Some(revival), Attached::Yes, |_| {})
}
