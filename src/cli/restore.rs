//! `nacelle restore`: a machine of its own, made of a snapshot.
//!
//! ```text
//!   DIR/manifest.json ── machine, note ──► record, plan.json
//!   DIR/drive-N ───────── copy ──────────► upper.img, drive-N.img     the machine's own
//!   --set, paths ────────────────────────► restore.json ──► keeper (keeper/revive.rs) loads DIR
//! ```
//!
//! DIR stays what it is: memory is mapped privately, drives that were taken along are copied. A
//! drive that was not is used as it is; while another machine writes it, the monitor refuses it.

use std::path::{Path, PathBuf};

use api::{
    Spec,
    spec::{ConsoleMode, DriveOverride, LoadSnapshot, Serial, VsockOverride},
};
use clap::Args as ClapArgs;
use guest::protocol::InterfaceIdentity;
use serde::Deserialize;

use super::{
    doctor, drives,
    failure::{Failure, Outcome, doing},
    keeper::{
        self, IMAGE, Plan, WRITABLE_LAYER,
        revive::{self, Revival},
    },
    order, output,
    overrides::{self, Setting},
    scaffold::Scaffold,
    snapshot::watching::{EXIT_INTERRUPTED, Watching},
    state::{self, Machine, Record, State},
};
use crate::snapshot::{Manifest, Watch, inspect, manifest};

/// Make a machine of a snapshot
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// Name of the machine
    #[arg(long)]
    name: Option<String>,
    /// What is different in it: drives.root.path=FILE, network-interfaces.eth0.host_dev_name=TAP ...
    #[arg(long, value_name = "KEY=VALUE", value_parser = overrides::setting)]
    set: Vec<Setting>,
    /// Remove the machine when it ends
    #[arg(long)]
    rm: bool,
    /// Have its terminal, input and output, and wait for its end
    #[arg(short, long)]
    attach: bool,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
    /// The snapshot's directory
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// Makes it, and prints its id.
pub fn run(args: &Args) -> Outcome<u8> {
    doctor::require()?;
    let state = State::open()?;
    let source = Source::open(&args.directory)?;
    let name = args.name.clone().unwrap_or_default();
    let wanted = Wanted { name, number: 1, ephemeral: args.rm, settings: &args.set };
    let scaffold = Scaffold::begin(&state)?;
    let watching = Watching::new("Copying drives", args.quiet)?;
    let made = source.make(&state, &scaffold, &wanted, &watching);
    drop(watching);
    let mut machine = made?;
    if args.attach {
        let id = machine.record.id.clone();
        let outcome = revive::in_foreground(&mut machine);
        // One that ran stays, unless it is removed at its end.
        if let Ok(machine) = state.find(&id)
            && machine.record.started.is_some()
        {
            scaffold.runs(&machine);
        }
        return outcome;
    }
    start(&scaffold, &machine)?;
    output::print(&format!("{}\n", machine.record.id))?;
    Ok(0)
}

/// Starts a machine that was made; one that does not come up is removed.
pub fn start(scaffold: &Scaffold, machine: &Machine) -> Outcome<()> {
    let started = keeper::start_detached(Path::new(keeper::OWN), machine);
    if started.is_err() {
        let _ = machine.remove();
    }
    scaffold.runs(machine);
    started
}

/// What a snapshot says about its machine besides what the monitor knows.
#[derive(Debug, Clone, Deserialize)]
struct Note {
    record: Record,
    plan: Option<Plan>,
}

/// A snapshot of which machines are made.
#[derive(Debug)]
pub struct Source {
    dir: PathBuf,
    manifest: Manifest,
    spec: Spec,
    note: Option<Note>,
    /// Drives that were not taken along are copied, too: those of a suspended machine, which goes
    /// on with them later.
    copies_all: bool,
}

/// What a machine is to be.
#[derive(Debug, Clone)]
pub struct Wanted<'a> {
    /// Its name; empty for one that is made up.
    pub name: String,
    /// Which of those that are made, from 1.
    pub number: u32,
    /// It is removed when it ends.
    pub ephemeral: bool,
    /// What is different in it.
    pub settings: &'a [Setting],
}

impl Source {
    /// Reads what the snapshot at `dir` is of.
    pub fn open(dir: &Path) -> Outcome<Source> {
        let dir = doing(std::path::absolute(dir), || format!("{} is no path", dir.display()))?;
        let manifest = inspect(&dir)?;
        let spec = manifest.machine.read().map_err(|e| {
            Failure::because(format!("The machine in {} cannot be understood", dir.display()), &e)
        })?;
        let note = match &manifest.note {
            serde_json::Value::Null => None,
            note => Some(serde_json::from_value(note.clone()).map_err(|e| {
                Failure::because(format!("The note of {} cannot be understood", dir.display()), &e)
            })?),
        };
        Ok(Source { dir, manifest, spec, note, copies_all: false })
    }

    /// The snapshot of a suspended machine, which stays as it is.
    pub fn of_suspended(machine: &Machine) -> Outcome<Source> {
        Ok(Source { copies_all: true, ..Source::open(&machine.suspended())? })
    }

    /// An error if the machine whose own drives were copied has gone on meanwhile.
    pub fn unchanged(&self) -> Outcome<()> {
        let same = || inspect(&self.dir).is_ok_and(|manifest| manifest.id == self.manifest.id);
        if !self.copies_all || same() {
            return Ok(());
        }
        Err(Failure::new("The machine has gone on while its drives were copied; fork it as it runs"))
    }

    /// Name of the machine that it is of, if it had one.
    pub fn name(&self) -> Option<&str> {
        self.note.as_ref().map(|note| note.record.name.as_str())
    }

    /// Makes a machine ready to be started. After an error there is none.
    pub fn make(
        &self,
        state: &State,
        scaffold: &Scaffold,
        wanted: &Wanted<'_>,
        watch: &dyn Watch,
    ) -> Outcome<Machine> {
        let machine = state.create(self.record(wanted)?)?;
        let filled = scaffold.holds(&machine).and_then(|()| self.fill(&machine, wanted, watch));
        filled.inspect_err(|_| {
            let _ = machine.remove();
            scaffold.runs(&machine);
        })?;
        Ok(machine)
    }

    fn record(&self, wanted: &Wanted<'_>) -> Outcome<Record> {
        let base = self.note.as_ref().map(|note| note.record.clone());
        let plain = || {
            let config = &self.spec.machine_config;
            let kernel = self.spec.boot_source.kernel_image_path.clone();
            Record::plain(config.vcpu_count, config.mem_size_mib, kernel)
        };
        Ok(Record {
            id: state::fresh_id()?,
            name: wanted.name.clone(),
            ephemeral: wanted.ephemeral,
            created: state::now(),
            started: None,
            monitor: None,
            keeper: None,
            end: None,
            suspended: None,
            ..base.unwrap_or_else(plain)
        })
    }

    fn fill(&self, machine: &Machine, wanted: &Wanted<'_>, watch: &dyn Watch) -> Outcome<()> {
        let mut load = overrides::apply(&self.base(machine), wanted.settings, wanted.number)?;
        overrides::check(&load, wanted.settings, &self.spec)?;
        for (number, drive) in self.manifest.drives.iter().enumerate() {
            if load.drive_overrides.iter().any(|change| change.drive_id == drive.id) {
                continue;
            }
            let Some(path) = self.drive(machine, number, drive, watch)? else { continue };
            let drive_id = drive.id.clone();
            load.drive_overrides.push(DriveOverride {
                drive_id,
                path_on_host: Some(path),
                by_descriptor: false,
            });
        }
        let network = self.interfaces(machine, wanted, &mut load)?;
        self.write_plan(machine, &load)?;
        Revival { load, is_new: true, network }.write(machine)
    }

    /// Gives interfaces that are on another tap a hardware address of their own, and returns what
    /// the agent inside must be told of all that are to be different.
    fn interfaces(
        &self,
        machine: &Machine,
        wanted: &Wanted<'_>,
        load: &mut LoadSnapshot,
    ) -> Outcome<Vec<InterfaceIdentity>> {
        let has_agent = self.note.as_ref().is_some_and(|note| note.plan.is_some());
        let mut changes = Vec::new();
        for (number, card) in self.spec.network_interfaces.iter().enumerate() {
            let id = &card.iface_id;
            let (addresses, gateways) = overrides::addresses(wanted.settings, id, wanted.number);
            let is_set = !addresses.is_empty() || !gateways.is_empty();
            if is_set && !has_agent {
                let text = "There is no agent in the machine that could be told addresses; set none";
                return Err(Failure::new(text));
            }
            let change = load.network_overrides.iter_mut().find(|change| change.iface_id == *id);
            let Some(mac) = card.guest_mac.clone().filter(|_| has_agent) else { continue };
            let own = || order::own_mac(number, &machine.record);
            let new_mac = change.map(|change| change.guest_mac.get_or_insert_with(own).clone());
            if new_mac.is_some() || is_set {
                changes.push(InterfaceIdentity { mac, name: String::new(), new_mac, addresses, gateways });
            }
        }
        Ok(changes)
    }

    /// The file that the machine has for a drive, if it is not the one that it was: a copy of its
    /// own, except for an image that is still where it was.
    fn drive(
        &self,
        machine: &Machine,
        number: usize,
        drive: &manifest::Drive,
        watch: &dyn Watch,
    ) -> Outcome<Option<PathBuf>> {
        let of = |d: &&api::spec::Drive| d.drive_id == drive.id;
        let read_only = self.spec.drives.iter().find(of).is_some_and(|d| d.is_read_only);
        let source = PathBuf::from(&drive.source);
        let from = match &drive.file {
            None if self.copies_all && !read_only => source,
            None => return Ok(None),
            // Images are called by what they hold, so this is the same one.
            Some(_) if read_only && self.is_image(drive) => return Ok(Some(source)),
            Some(file) => self.dir.join(file),
        };
        let is_layer = drive.id == WRITABLE_LAYER;
        let name = if is_layer { "upper.img".to_owned() } else { format!("drive-{number}.img") };
        let path = machine.file(&name);
        drives::copy(&from, &path, watch).map_err(|e| match e.kind() {
            std::io::ErrorKind::Interrupted => Failure::new("Interrupted").with_code(EXIT_INTERRUPTED),
            _ => Failure::because(format!("Drive {} cannot be copied from {}", drive.id, from.display()), &e),
        })?;
        Ok(Some(path))
    }

    /// Whether a drive is the image of a container, and is there.
    fn is_image(&self, drive: &manifest::Drive) -> bool {
        let there = std::fs::metadata(&drive.source).is_ok_and(|m| m.len() == drive.size);
        there && drive.id == IMAGE && self.note.as_ref().is_some_and(|note| note.plan.is_some())
    }

    /// What is loaded unless somebody sets something else: sockets and logs are the machine's own.
    fn base(&self, machine: &Machine) -> LoadSnapshot {
        let vsock = self.spec.vsock.as_ref();
        let to_file = |serial: &&Serial| serial.far_end() == ConsoleMode::File;
        LoadSnapshot {
            snapshot_path: self.dir.clone(),
            vsock_override: vsock.map(|_| VsockOverride { uds_path: machine.vsock(), guest_cid: None }),
            serial_override: self.spec.serial.as_ref().filter(to_file).map(|serial| Serial {
                serial_out_path: Some(machine.file("console.log")),
                ..serial.clone()
            }),
            ..LoadSnapshot::default()
        }
    }

    /// Writes down what the machine's container is, for its keeper and for whoever asks.
    fn write_plan(&self, machine: &Machine, load: &LoadSnapshot) -> Outcome<()> {
        let mut spec = self.spec.clone();
        for drive in &mut spec.drives {
            let change = load.drive_overrides.iter().find(|change| change.drive_id == drive.drive_id);
            if let Some(path) = change.and_then(|change| change.path_on_host.clone()) {
                drive.path_on_host = path;
            }
        }
        if let (Some(vsock), Some(change)) = (&mut spec.vsock, &load.vsock_override) {
            vsock.uds_path = change.uds_path.clone();
        }
        let write = |name: &str, text: Vec<u8>| {
            let path = machine.file(name);
            doing(std::fs::write(&path, text), || format!("{} cannot be written", path.display()))
        };
        match self.note.as_ref().and_then(|note| note.plan.clone()) {
            None => write("config.json", serde_json::to_vec_pretty(&spec).unwrap_or_default()),
            Some(mut plan) => {
                plan.spec = spec;
                plan.setup.hostname = machine.record.name.clone();
                write("plan.json", serde_json::to_vec_pretty(&plan).unwrap_or_default())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        cli::keeper::steward,
        snapshot::{Capture, Destination, Manner, Region, Subject, Writer},
    };

    const MAC: &str = "06:00:ab:ab:ab:00";

    /// A snapshot of a container's machine: its image still there, its layer taken along.
    fn snapshot(dir: &Path, machine: &Machine) -> PathBuf {
        for (name, size) in [("image", 8192), ("upper", 1 << 20)] {
            std::fs::write(dir.join(name), vec![7; size]).unwrap();
        }
        let spec = json!({
            "machine-config": {"vcpu_count": 1, "mem_size_mib": 1},
            "drives": [
                {"drive_id": IMAGE, "path_on_host": dir.join("image"), "is_root_device": true, "is_read_only": true},
                {"drive_id": WRITABLE_LAYER, "path_on_host": dir.join("upper"), "is_root_device": false}
            ],
            "network-interfaces": [{"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": MAC}],
            "vsock": {"guest_cid": 3, "uds_path": dir.join("v.sock")},
            "serial": {"serial_out_path": dir.join("c.log"), "mode": "file"}
        });
        let plan = Plan {
            spec: serde_json::from_value(spec.clone()).unwrap(),
            setup: guest::protocol::Setup {
                hostname: "old".into(),
                entropy: vec![1; 8],
                ..Default::default()
            },
            process: guest::protocol::ProcessSpec::default(),
        };
        std::fs::write(machine.file("plan.json"), serde_json::to_vec(&plan).unwrap()).unwrap();
        let subject = Subject {
            machine: manifest::Json::of(&spec),
            regions: vec![Region { guest_address: 0, size: 1 << 20, offset: 0, page_size: 4096 }],
            note: steward::note(machine).into(),
            ..Subject::default()
        };
        let path = dir.join("taken");
        let mut writer =
            Writer::begin(Destination::new(path.clone()), subject, Manner::default(), None).unwrap();
        for (id, name) in [(IMAGE, "image"), (WRITABLE_LAYER, "upper")] {
            let file = std::fs::File::open(dir.join(name)).unwrap();
            writer.drive(id, dir.join(name).to_str().unwrap(), Capture::Copy, &file).unwrap();
        }
        writer.finish().unwrap();
        path
    }

    fn made(state: &State, source: &Source, name: &str, words: &[&str]) -> Outcome<Machine> {
        let settings: Vec<Setting> = words.iter().map(|word| overrides::setting(word).unwrap()).collect();
        let scaffold = Scaffold::begin(state).unwrap();
        let wanted = Wanted { name: name.to_owned(), number: 2, ephemeral: true, settings: &settings };
        let machine = source.make(state, &scaffold, &wanted, &())?;
        scaffold.runs(&machine);
        Ok(machine)
    }

    #[test]
    fn a_machine_of_a_snapshot_has_files_and_addresses_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::at(dir.path().join("s")).unwrap();
        let original = Record { env: vec!["A=b".into()], ..Record::example(&"ab".repeat(32), "web") };
        let path = snapshot(dir.path(), &state.create(original).unwrap());
        let source = Source::open(&path).unwrap();
        assert_eq!(source.name(), Some("web"));
        let tap = "network-interfaces.eth0.host_dev_name=tap{n}";
        let ip = "network-interfaces.eth0.ip=10.0.0.{n}/24";
        let machine = made(&state, &source, "two", &[tap, ip]).unwrap();
        let record = &machine.record;
        assert_eq!((&record.env, record.ephemeral, record.started), (&vec!["A=b".to_owned()], true, None));
        let text = std::fs::read(machine.file("restore.json")).unwrap();
        let Revival { load, is_new, network } = serde_json::from_slice(&text).unwrap();
        assert!(is_new);
        assert_eq!(load.snapshot_path, path);
        let paths: Vec<_> = load.drive_overrides.iter().map(|d| d.path_on_host.clone().unwrap()).collect();
        assert_eq!(paths, [dir.path().join("image"), machine.file("upper.img")]);
        assert!(std::fs::read(machine.file("upper.img")).unwrap() == vec![7; 1 << 20]);
        assert_eq!(load.vsock_override.unwrap().uds_path, machine.vsock());
        assert_eq!(load.serial_override.unwrap().serial_out_path, Some(machine.file("console.log")));
        assert_eq!(load.network_overrides[0].host_dev_name.as_deref(), Some("tap2"));
        let [interface] = &network[..] else { panic!("{network:?}") };
        assert_eq!((interface.mac.as_str(), &interface.addresses[0][..]), (MAC, "10.0.0.2/24"));
        assert_eq!(interface.new_mac, load.network_overrides[0].guest_mac);
        assert_ne!(interface.new_mac.as_deref(), Some(MAC));
        let plan = machine.plan().unwrap();
        assert_eq!((plan.setup.hostname.as_str(), plan.setup.entropy.len()), ("two", 0));
        assert_eq!(plan.spec.drives[1].path_on_host, machine.file("upper.img"));
    }

    #[test]
    fn a_drive_that_is_set_is_not_copied_and_a_machine_that_cannot_be_made_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::at(dir.path().join("s")).unwrap();
        let original = state.create(Record::example(&"ab".repeat(32), "web")).unwrap();
        let path = snapshot(dir.path(), &original);
        let source = Source::open(&path).unwrap();
        let machine = made(&state, &source, "two", &["drives.upper.path=/mine.img"]).unwrap();
        assert!(!machine.file("upper.img").exists());
        let said = |name: &str, words: &[&str]| made(&state, &source, name, words).unwrap_err().message;
        assert!(said("two", &[]).contains("taken"));
        assert!(said("three", &["drives.uper.path=/x"]).contains("did you mean upper?"));
        // A copy that cannot be made takes the machine with it.
        std::fs::remove_file(path.join("drive-1")).unwrap();
        assert!(said("three", &[]).contains("Drive upper cannot be copied"));
        assert_eq!(state.machines().unwrap().len(), 2);
        assert_eq!(std::fs::read_dir(state.making()).unwrap().count(), 0);
    }
}
