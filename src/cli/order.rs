//! What a machine is ordered by: the flags of `nacelle run`, or the body of `POST /machines`.
//!
//! ```text
//!   nacelle run's flags ──┐            ┌─ image ──► record, files, Plan ──► keeper.rs
//!   POST /machines, JSON ─┴► Order ────┤
//!                                      └─ spec ───► record, config.json ──► plain.rs
//! ```
//!
//! There is one way to make a machine, whoever asks for it. An order says nothing of the caller:
//! paths are those of the host that carries it out, and environment variables have their values.

use std::path::{Path, PathBuf};

use api::spec::{
    BootSource, CacheType, ConsoleMode, Drive, Entropy, HugePages, IoEngine, MachineConfig, NetworkInterface,
    Serial, Spec, Transport, Vsock,
};
use guest::protocol::{Disk, Dns, Interface, ProcessSpec, Setup, Size, Tmpfs, Writable};
use sandbox::{Image, OpenOptions, Overrides, Progress, PullPolicy, Source, Store};
use serde::{Deserialize, Serialize};

use super::{
    doctor,
    failure::{Failure, Outcome, doing},
    keeper::{self, Plan},
    kernel::{self, Kernel},
    state::{self, Machine, Record, State},
    values::{self, DiskArg, TapArg, TmpfsArg},
};

/// The CID of every guest: each machine has a vsock device of its own, so they never meet.
const GUEST_CID: u32 = 3;
/// Memory of a machine unless said otherwise: a ceiling, taken from the host as it is touched.
const MEMORY_MIB: u64 = 2048;
/// vCPUs of a machine unless said otherwise.
const CPUS: u8 = 2;
/// Size of the layer that holds what a command writes, in MiB, unless said otherwise.
pub const STORAGE_MIB: u64 = 10 << 10;
/// Largest such layer, in MiB: what ext4 can hold.
const STORAGE_MIB_MAX: u64 = 16 << 20;

/// When to ask the registry for an image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Pull {
    /// When the host has none
    #[default]
    Missing,
    /// Each time
    Always,
    /// Not at all
    Never,
}

/// A machine to be made. Either `image` or `spec` is given; the other fields are for an image,
/// except `name` and `remove_at_end`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Order {
    /// Its name; one is made up when absent.
    pub name: Option<String>,
    /// It is removed when it ends.
    pub remove_at_end: bool,
    /// A machine in Firecracker's configuration format. One without a kernel must be empty, and
    /// is configured and started through its API.
    pub spec: Option<Spec>,
    /// OCI layout, saved image, root directory or registry reference.
    pub image: Option<String>,
    /// Command and arguments instead of the image's.
    pub command: Vec<String>,
    /// Program instead of the image's.
    pub entrypoint: Option<String>,
    /// Environment variables, `NAME=VALUE`.
    pub env: Vec<String>,
    /// Working directory.
    pub workdir: Option<String>,
    /// User, by name or number, with `:group` if need be.
    pub user: Option<String>,
    /// Host name in the machine.
    pub hostname: Option<String>,
    /// Memory in MiB; 2048, or half of the host's if that is less.
    pub memory_mib: Option<u64>,
    /// vCPUs, 1 to 64; 2, or 1 on a host with one.
    pub cpus: Option<u8>,
    /// The image's file system is mounted read-only.
    pub read_only: bool,
    /// Size of the layer that holds what the command writes, in MiB.
    pub storage_mib: u64,
    /// File systems in memory.
    pub tmpfs: Vec<TmpfsArg>,
    /// Raw disks.
    pub disks: Vec<DiskArg>,
    /// Tap devices.
    pub taps: Vec<TapArg>,
    /// Name servers.
    pub dns: Vec<String>,
    /// Kernel image, or a directory with one and its modules.
    pub kernel: Option<PathBuf>,
    /// A small init runs as process 1.
    pub init: bool,
    /// Devices are attached through PCI.
    pub pci: bool,
    /// When the registry is asked.
    pub pull: Pull,
    /// Plain HTTP is spoken with a registry on the host.
    pub insecure_registry: bool,
}

impl Default for Order {
    fn default() -> Order {
        Order {
            name: None,
            remove_at_end: false,
            spec: None,
            image: None,
            command: Vec::new(),
            entrypoint: None,
            env: Vec::new(),
            workdir: None,
            user: None,
            hostname: None,
            memory_mib: None,
            cpus: None,
            read_only: false,
            storage_mib: STORAGE_MIB,
            tmpfs: Vec::new(),
            disks: Vec::new(),
            taps: Vec::new(),
            dns: Vec::new(),
            kernel: None,
            init: false,
            pci: false,
            pull: Pull::Missing,
            insecure_registry: false,
        }
    }
}

/// The caller's end of a foreground run; nothing of it is there with `-d`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Console {
    /// The command gets a terminal of this size.
    pub terminal: Option<Size>,
    /// Its standard input is passed on.
    pub stdin: bool,
}

impl Order {
    /// Checks what can be checked without looking at the host.
    pub fn check(&self) -> Outcome<()> {
        let wrong = |text: &str| Err(Failure::new(text));
        if self.spec.is_some() == self.image.is_some() {
            return wrong("A machine needs either an image or a spec");
        }
        if let Some(spec) = &self.spec {
            let bare = Order {
                name: self.name.clone(),
                remove_at_end: self.remove_at_end,
                spec: self.spec.clone(),
                ..Order::default()
            };
            if *self != bare {
                return wrong("Only name and remove_at_end go with a spec; the rest is for an image");
            }
            if spec.boot_source.kernel_image_path.as_os_str().is_empty() && *spec != Spec::default() {
                return wrong(
                    "The spec has no boot-source; give one, or an empty spec and configure the machine \
                     through its API",
                );
            }
            return Ok(());
        }
        if !self.cpus.is_none_or(|cpus| (1..=api::spec::VCPUS_MAX).contains(&cpus)) {
            return wrong("cpus must be 1 to 64");
        }
        if !(1..=STORAGE_MIB_MAX).contains(&self.storage_mib) {
            return Err(Failure::new(format!("storage_mib must be 1 to {STORAGE_MIB_MAX}")));
        }
        if let Some(word) = self.env.iter().find(|word| !word.contains('=')) {
            return Err(Failure::new(format!(
                "The environment variable {word:?} has no value: write NAME=VALUE"
            )));
        }
        if let Some(tap) = self.taps.iter().find(|tap| !(1..=15).contains(&tap.name.len())) {
            return Err(Failure::new(format!(
                "{:?} is no name of a tap device; it has 1 to 15 characters",
                tap.name
            )));
        }
        Ok(())
    }

    /// Makes the machine and starts it under a keeper of its own.
    pub fn launch(&self, progress: &mut dyn Progress) -> Outcome<Machine> {
        self.check()?;
        doctor::require()?;
        let machine = match &self.spec {
            Some(spec) => self.make_plain(spec)?,
            None => self.make(Console::default(), progress, &mut |_| {})?.0,
        };
        // A machine that never ran its command is of no use to anybody.
        keeper::start_detached(Path::new(keeper::OWN), &machine).inspect_err(|_| drop(machine.remove()))?;
        // One that is removed at its end may be gone by now; then it is shown as it was made.
        let mut machine = machine;
        let _ = machine.reload();
        Ok(machine)
    }

    fn make_plain(&self, spec: &Spec) -> Outcome<Machine> {
        let config = &spec.machine_config;
        let kernel = spec.boot_source.kernel_image_path.clone();
        let record = Record {
            id: state::fresh_id()?,
            name: self.name.clone().unwrap_or_default(),
            ephemeral: self.remove_at_end,
            ..Record::plain(config.vcpu_count, config.mem_size_mib, kernel)
        };
        let machine = State::open()?.create(record)?;
        if *spec == Spec::default() {
            return Ok(machine);
        }
        let mut spec = spec.clone();
        // What the guest prints is kept, unless it is wanted elsewhere.
        spec.serial.get_or_insert_with(|| Serial {
            serial_out_path: Some(machine.file("console.log")),
            mode: Some(ConsoleMode::File),
            rate_limiter: None,
        });
        let path = machine.file("config.json");
        let text = serde_json::to_vec_pretty(&spec).unwrap_or_default();
        let written = doing(std::fs::write(&path, text), || format!("{} cannot be written", path.display()));
        written.inspect_err(|_| drop(machine.remove()))?;
        Ok(machine)
    }

    /// Makes the machine of an image, ready to be kept by the plan that comes back. `step` is
    /// told what was done.
    pub fn make(
        &self,
        console: Console,
        progress: &mut dyn Progress,
        step: &mut dyn FnMut(&str),
    ) -> Outcome<(Machine, Plan)> {
        let cache = kernel::cache_directory();
        let image = self.open_image(&cache, progress)?;
        step("image ready");
        let kernel = Kernel::choose(self.kernel.as_deref(), &cache)?;
        let initrd = kernel.initrd(&cache)?;
        step("kernel and initial RAM disk ready");
        let process = self.process(&image, console)?;
        let record = self.record(&image, &kernel, &process)?;
        let machine = State::open()?.create(record)?;
        let plan = self.prepare(&machine, &image, &kernel, &initrd, process);
        let plan = plan.inspect_err(|_| drop(machine.remove()))?;
        step("machine prepared");
        Ok((machine, plan))
    }

    fn open_image(&self, cache: &Path, progress: &mut dyn Progress) -> Outcome<Image> {
        let source = Source::parse(self.image.as_deref().unwrap_or_default())?;
        let store = Store::new(cache)?;
        let options = OpenOptions {
            pull: match self.pull {
                Pull::Always => PullPolicy::Always,
                Pull::Never => PullPolicy::Never,
                Pull::Missing => PullPolicy::Missing,
            },
            insecure: self.insecure_registry,
            ..OpenOptions::default()
        };
        Ok(store.open(&source, &options, progress)?)
    }

    fn process(&self, image: &Image, console: Console) -> Outcome<ProcessSpec> {
        let overrides = Overrides {
            entrypoint: self.entrypoint.clone().map(|program| vec![program]),
            command: self.command.clone(),
            env: self.env.clone(),
            working_dir: self.workdir.clone(),
            user: self.user.clone(),
            terminal: console.terminal.is_some(),
        };
        let process = sandbox::process(&image.config, &overrides)?;
        Ok(ProcessSpec {
            args: process.args,
            env: process.env,
            cwd: process.cwd,
            user: process.user,
            terminal: console.terminal,
            stdin: console.stdin,
            init: self.init,
            ..ProcessSpec::default()
        })
    }

    fn record(&self, image: &Image, kernel: &Kernel, process: &ProcessSpec) -> Outcome<Record> {
        let signal = &image.config.config.stop_signal;
        let stop_signal = if signal.is_empty() { Some(libc::SIGTERM) } else { values::signal(signal) };
        let host_cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Record {
            id: state::fresh_id()?,
            name: self.name.clone().unwrap_or_default(),
            image: image.name.clone(),
            image_key: image.key.clone(),
            command: process.args.clone(),
            env: process.env.clone(),
            cpus: self.cpus.unwrap_or_else(|| CPUS.min(u8::try_from(host_cpus).unwrap_or(CPUS))),
            memory_mib: self
                .memory_mib
                .unwrap_or_else(|| MEMORY_MIB.min(values::host_memory_mib() / 2).max(64)),
            kernel: kernel.image.clone(),
            terminal: process.terminal.is_some(),
            ephemeral: self.remove_at_end,
            plain: false,
            stop_signal: stop_signal.unwrap_or(libc::SIGTERM),
            created: state::now(),
            started: None,
            monitor: None,
            keeper: None,
            end: None,
            suspended: None,
        })
    }

    /// Makes the files of the machine and the plan to run it by.
    fn prepare(
        &self,
        machine: &Machine,
        image: &Image,
        kernel: &Kernel,
        initrd: &Path,
        process: ProcessSpec,
    ) -> Outcome<Plan> {
        let record = &machine.record;
        let mut drives = vec![Drive {
            is_read_only: true,
            io_engine: IoEngine::Async,
            ..drive(keeper::IMAGE, &image.root)
        }];
        let writable = if self.read_only {
            Writable::Memory { size: 0 }
        } else {
            let path = machine.file("upper.img");
            sandbox::writable::create(&path, self.storage_mib << 20)?;
            // What is thrown away at the end need not survive a crash of the host.
            let cache_type = if record.ephemeral { CacheType::Unsafe } else { CacheType::Writeback };
            let upper = Drive {
                cache_type,
                discard: true,
                io_engine: IoEngine::Async,
                ..drive(keeper::WRITABLE_LAYER, &path)
            };
            drives.push(upper);
            Writable::Disk { serial: "upper".to_owned() }
        };
        let mut disks = Vec::new();
        for (number, disk) in self.disks.iter().enumerate() {
            let serial = format!("disk{number}");
            drives.push(Drive {
                is_read_only: disk.read_only,
                cache_type: CacheType::Writeback,
                io_engine: IoEngine::Async,
                ..drive(&serial, &disk.file)
            });
            let path = disk.path.clone().unwrap_or_default();
            disks.push(Disk { serial, path, read_only: disk.read_only, ..Disk::default() });
        }
        let hostname = self.hostname.clone().unwrap_or_else(|| record.short_id().to_owned());
        let setup = Setup {
            hostname,
            writable,
            read_only: self.read_only,
            stop_signal: record.stop_signal,
            tmpfs: self.tmpfs.iter().map(tmpfs).collect(),
            disks,
            network: self.taps.iter().enumerate().map(|(i, tap)| interface(i, tap, record)).collect(),
            dns: (!self.dns.is_empty()).then(|| Dns { servers: self.dns.clone(), ..Dns::default() }),
            ..Setup::default()
        };
        let spec = Spec {
            boot_source: BootSource {
                kernel_image_path: kernel.image.clone(),
                initrd_path: Some(initrd.to_owned()),
                boot_args: Some(boot_args()),
            },
            machine_config: MachineConfig {
                vcpu_count: record.cpus,
                mem_size_mib: record.memory_mib,
                transport: if self.pci { Transport::Pci } else { Transport::Mmio },
                // A boot touches its memory nearly everywhere; a page at a time costs it a third.
                huge_pages: HugePages::Transparent,
                ..MachineConfig::default()
            },
            drives,
            network_interfaces: self.taps.iter().enumerate().map(|(i, tap)| card(i, tap, record)).collect(),
            vsock: Some(Vsock { guest_cid: GUEST_CID, uds_path: machine.vsock(), vsock_id: None }),
            entropy: Some(Entropy::default()),
            serial: Some(Serial {
                serial_out_path: Some(machine.file("console.log")),
                mode: Some(ConsoleMode::File),
                rate_limiter: None,
            }),
            ..Spec::default()
        };
        spec.check().map_err(|fault| Failure { code: 125, message: fault.message, causes: fault.causes })?;
        let plan = Plan { spec, setup, process };
        let text = serde_json::to_vec_pretty(&plan).unwrap_or_default();
        let path = machine.file("plan.json");
        std::fs::write(&path, text)
            .map_err(|e| Failure::because(format!("{} cannot be written", path.display()), &e))?;
        Ok(plan)
    }
}

/// The guest's kernel says nothing unless it dies, looks for nothing that is not there, and
/// ends instead of waiting for somebody to read its last words.
fn boot_args() -> String {
    "console=ttyS0 quiet loglevel=1 panic=-1 reboot=k tsc=reliable 8250.nr_uarts=1".to_owned()
}

fn drive(id: &str, path: &Path) -> Drive {
    Drive {
        drive_id: id.to_owned(),
        path_on_host: path.to_owned(),
        num_queues: 1,
        queue_size: 256,
        ..Drive::default()
    }
}

fn tmpfs(arg: &TmpfsArg) -> Tmpfs {
    let TmpfsArg { path, size, mode, noexec, read_only } = arg.clone();
    Tmpfs { path, size, mode, noexec, read_only }
}

/// A locally administered address that follows from the machine's id, so that both sides of
/// the plan agree on it.
fn mac(number: usize, tap: &TapArg, record: &Record) -> String {
    tap.mac.clone().unwrap_or_else(|| own_mac(number, record))
}

/// The address of an interface, by its number from 0, that nobody asked for another one.
pub fn own_mac(number: usize, record: &Record) -> String {
    let digits = |at: usize| record.id.get(at..at + 2).unwrap_or("00");
    format!("06:{}:{}:{}:{}:{:02x}", digits(0), digits(2), digits(4), digits(6), number & 0xff)
}

fn interface(number: usize, tap: &TapArg, record: &Record) -> Interface {
    Interface {
        mac: mac(number, tap, record),
        name: format!("eth{number}"),
        addresses: tap.addresses.clone(),
        gateways: tap.gateways.clone(),
        mtu: tap.mtu.unwrap_or(0).into(),
    }
}

fn card(number: usize, tap: &TapArg, record: &Record) -> NetworkInterface {
    NetworkInterface {
        iface_id: format!("eth{number}"),
        host_dev_name: Some(tap.name.clone()),
        host_dev_fd: None,
        by_descriptor: false,
        guest_mac: Some(mac(number, tap, record)),
        mtu: tap.mtu,
        rx_rate_limiter: None,
        tx_rate_limiter: None,
        num_queue_pairs: 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Outcome<Order> {
        let order: Order = serde_json::from_str(text).map_err(|e| Failure::new(api::explain_json(&e)))?;
        order.check().map(|()| order)
    }

    #[test]
    fn an_order_is_for_an_image_or_for_a_spec() {
        assert_eq!(read(r#"{"image": "busybox", "cpus": 2}"#).unwrap().storage_mib, STORAGE_MIB);
        assert!(read(r#"{"spec": {}, "name": "a", "remove_at_end": true}"#).is_ok());
        let cases = [
            ("{}", "either an image or a spec"),
            (r#"{"image": "a", "spec": {}}"#, "either an image or a spec"),
            (r#"{"spec": {}, "cpus": 2}"#, "Only name and remove_at_end"),
            (r#"{"spec": {"machine-config": {"vcpu_count": 2, "mem_size_mib": 64}}}"#, "no boot-source"),
            (r#"{"image": "a", "cpus": 65}"#, "1 to 64"),
            (r#"{"image": "a", "storage_mib": 18446744073709551615}"#, "storage_mib"),
            (r#"{"image": "a", "env": ["HOME"]}"#, "NAME=VALUE"),
            (r#"{"image": "a", "taps": [{}]}"#, "tap device"),
            (r#"{"image": "a", "comand": ["x"]}"#, "did you mean `command`?"),
        ];
        for (text, expected) in cases {
            let message = read(text).unwrap_err().message;
            assert!(message.contains(expected), "{text}: {message}");
        }
    }

    #[test]
    fn an_order_survives_the_wire() {
        let order = Order {
            image: Some("a".to_owned()),
            disks: vec![DiskArg { file: "f".into(), path: Some("/x".to_owned()), read_only: true }],
            pull: Pull::Never,
            ..Order::default()
        };
        assert_eq!(serde_json::from_str::<Order>(&serde_json::to_string(&order).unwrap()).unwrap(), order);
    }
}
