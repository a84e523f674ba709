//! `nacelle run`: a container image in a machine of its own.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use api::spec::{
    BootSource, CacheType, ConsoleMode, Drive, Entropy, HugePages, IoEngine, MachineConfig, NetworkInterface,
    Serial, Spec, Transport, Vsock,
};
use clap::Args as ClapArgs;
use guest::protocol::{Disk, Dns, Interface, ProcessSpec, Setup, Size, Tmpfs, Writable};
use sandbox::{Image, OpenOptions, Overrides, PullPolicy, Source, Store};

use super::{
    doctor,
    failure::{Failure, Outcome},
    keeper::{self, Attached, Plan},
    kernel::{self, Kernel},
    progress::Reporter,
    state::{self, Machine, Record, State},
    terminal,
    values::{self, DiskArg, TapArg, TmpfsArg},
};

/// The CID of every guest: each machine has a vsock device of its own, so they never meet.
const GUEST_CID: u32 = 3;
/// Memory of a machine unless said otherwise: a ceiling, taken from the host as it is touched.
const MEMORY_MIB: u64 = 2048;
/// vCPUs of a machine unless said otherwise.
const CPUS: u8 = 2;

/// Run a command from a container image in a machine of its own
#[derive(Debug, ClapArgs)]
#[command(override_usage = "nacelle run [OPTIONS] IMAGE [COMMAND [ARGUMENT]...]")]
pub struct Args {
    /// Keep standard input open
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// Give the command no terminal, even if there is one
    #[arg(long, conflicts_with = "tty")]
    no_tty: bool,
    /// Run in the background and print the machine's id
    #[arg(short, long)]
    detach: bool,
    /// Remove the machine when it ends (as without --name and --detach anyway)
    #[arg(long)]
    rm: bool,
    /// Name of the machine; without one, and in the foreground, it is removed at its end
    #[arg(long)]
    name: Option<String>,
    /// Set an environment variable: NAME=VALUE, or NAME to pass on this one's
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Read environment variables from a file
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// Working directory of the command
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// User of the command: name or number, with :group if need be
    #[arg(short, long)]
    user: Option<String>,
    /// Program to run instead of the image's
    #[arg(long)]
    entrypoint: Option<String>,
    /// Memory of the machine, with a unit: 512M, 2G
    #[arg(short, long, value_name = "SIZE", value_parser = values::mebibytes)]
    memory: Option<u64>,
    /// vCPUs of the machine
    #[arg(short, long, value_name = "NUMBER", value_parser = clap::value_parser!(u8).range(1..=64))]
    cpus: Option<u8>,
    /// Mount the image's file system read-only
    #[arg(long)]
    read_only: bool,
    /// Mount a file system in memory: PATH[:size=SIZE,mode=MODE,ro,noexec]
    #[arg(long, value_name = "PATH", value_parser = values::tmpfs)]
    tmpfs: Vec<TmpfsArg>,
    /// Size of the layer that holds what the command writes
    #[arg(long, value_name = "SIZE", default_value = "10G", value_parser = values::mebibytes)]
    storage: u64,
    /// Host name in the machine
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// Kernel image, or a directory with one and its modules [env: NACELLE_KERNEL]
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,
    /// Attach a raw disk: FILE[:PATH][:ro]; with PATH it is mounted there
    #[arg(long, value_name = "FILE", value_parser = values::disk)]
    disk: Vec<DiskArg>,
    /// Attach a tap device: NAME[,ip=ADDRESS/PREFIX][,gw=ADDRESS][,mac=MAC][,mtu=N]
    #[arg(long, value_name = "NAME", value_parser = values::tap)]
    tap: Vec<TapArg>,
    /// Name server, with --tap
    #[arg(long, value_name = "ADDRESS")]
    dns: Vec<String>,
    /// Run a small init as process 1 that reaps orphans
    #[arg(long)]
    init: bool,
    /// Attach devices through PCI instead of MMIO
    #[arg(long)]
    pci: bool,
    /// When to ask the registry: missing, always or never
    #[arg(long, value_name = "WHEN", default_value = "missing", value_parser = ["missing", "always", "never"])]
    pull: String,
    /// Speak plain HTTP with a registry on this host
    #[arg(long)]
    insecure_registry: bool,
    /// Print what each step took, on standard error
    #[arg(long)]
    timing: bool,
    /// Print no progress
    #[arg(short, long)]
    quiet: bool,
    /// OCI layout, saved image, root directory or registry reference; then, instead of the
    /// image's own, a command and its arguments
    // One list, because flags end at the image: what follows is the command's.
    #[arg(value_names = ["IMAGE", "COMMAND"], required = true, num_args = 1.., trailing_var_arg = true)]
    words: Vec<String>,
}

/// Runs it; the exit code is the command's.
pub fn run(args: &Args) -> Outcome<u8> {
    doctor::require()?;
    let mut steps = Steps::new(args.timing);
    let cache = kernel::cache_directory();
    let mut reporter = Reporter::new(args.quiet);
    let image = open_image(args, &cache, &mut reporter)?;
    steps.done("image ready");
    let kernel = Kernel::choose(args.kernel.as_deref(), &cache)?;
    let initrd = kernel.initrd(&cache)?;
    steps.done("kernel and initial RAM disk ready");
    let terminal = wants_terminal(args)?;
    let process = process(args, &image, terminal)?;

    let state = State::open()?;
    let record = record(args, &image, &kernel, &process)?;
    let mut machine = state.create(record)?;
    let prepared = prepare(args, &machine, &image, &kernel, &initrd, process);
    let plan = prepared.inspect_err(|_| {
        let _ = machine.remove();
    })?;
    steps.done("machine prepared");
    if args.detach {
        return detach(&machine);
    }
    let mut running = |_: &Machine| steps.done("command started");
    let outcome = keeper::keep(&mut machine, plan, Attached::Yes, &mut running);
    steps.done("command ended");
    outcome
}

/// The body of the hidden `keep` command.
pub fn keep(id: &str) -> u8 {
    let found = State::open().and_then(|state| state.find(id)).and_then(|machine| {
        let path = machine.file("plan.json");
        let text = std::fs::read(&path).map_err(|e| Failure::because("The plan cannot be read", &e))?;
        let plan = serde_json::from_slice(&text).map_err(|e| Failure::because("The plan is damaged", &e))?;
        Ok((machine, plan))
    });
    match found {
        Ok((mut machine, plan)) => keeper::main(&mut machine, plan),
        Err(failure) => {
            println!("{}\n{failure}", failure.code);
            failure.code
        }
    }
}

fn detach(machine: &Machine) -> Outcome<u8> {
    match keeper::start_detached(machine) {
        Ok(()) => {
            println!("{}", machine.record.id);
            Ok(0)
        }
        Err(failure) => {
            // A machine that never ran its command is of no use to anybody.
            let _ = machine.remove();
            Err(failure)
        }
    }
}

/// Prints, where wanted, how long each step took.
struct Steps {
    shown: bool,
    last: Instant,
}

impl Steps {
    fn new(shown: bool) -> Steps {
        Steps { shown, last: Instant::now() }
    }

    fn done(&mut self, what: &str) {
        let took = self.last.elapsed();
        self.last = Instant::now();
        if self.shown {
            eprintln!("{:>9.1} ms  {what}", took.as_secs_f64() * 1000.0);
        }
    }
}

fn open_image(args: &Args, cache: &Path, reporter: &mut Reporter) -> Outcome<Image> {
    let image = args.words.first().map_or("", String::as_str);
    let source = Source::parse(image)?;
    let store = Store::new(cache)?;
    let options = OpenOptions {
        pull: match args.pull.as_str() {
            "always" => PullPolicy::Always,
            "never" => PullPolicy::Never,
            _ => PullPolicy::Missing,
        },
        insecure: args.insecure_registry,
        ..OpenOptions::default()
    };
    let image = store.open(&source, &options, reporter);
    reporter.finish();
    Ok(image?)
}

/// A terminal is given when asked for, or when the caller sits at one and nothing else was
/// asked for.
fn wants_terminal(args: &Args) -> Outcome<bool> {
    let both = terminal::is_terminal(0) && terminal::is_terminal(1);
    if args.tty && !args.detach && !terminal::is_terminal(0) {
        return Err(Failure::new("-t needs a terminal as standard input; leave it out or use -i alone"));
    }
    Ok(args.tty || (both && !args.no_tty && !args.detach))
}

fn process(args: &Args, image: &Image, terminal: bool) -> Outcome<ProcessSpec> {
    let mut env = Vec::new();
    for file in &args.env_file {
        env.extend(values::env_file(file)?);
    }
    env.extend(args.env.iter().filter_map(|word| values::env(word)));
    let overrides = Overrides {
        entrypoint: args.entrypoint.clone().map(|program| vec![program]),
        command: args.words.get(1..).unwrap_or_default().to_vec(),
        env,
        working_dir: args.workdir.clone(),
        user: args.user.clone(),
        terminal,
    };
    let process = sandbox::process(&image.config, &overrides)?;
    let size = terminal::size(1).or_else(|| terminal::size(0));
    let size = size.map_or_else(Size::default, |(rows, cols)| Size { rows, cols });
    Ok(ProcessSpec {
        args: process.args,
        env: process.env,
        cwd: process.cwd,
        user: process.user,
        terminal: terminal.then_some(size),
        stdin: (args.interactive || terminal) && !args.detach,
        init: args.init,
        ..ProcessSpec::default()
    })
}

fn record(args: &Args, image: &Image, kernel: &Kernel, process: &ProcessSpec) -> Outcome<Record> {
    let signal = &image.config.config.stop_signal;
    let stop_signal = if signal.is_empty() { Some(libc::SIGTERM) } else { values::signal(signal) };
    let host_cpus = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(Record {
        id: state::fresh_id()?,
        name: args.name.clone().unwrap_or_default(),
        image: image.name.clone(),
        image_key: image.key.clone(),
        command: process.args.clone(),
        env: process.env.clone(),
        cpus: args.cpus.unwrap_or_else(|| CPUS.min(u8::try_from(host_cpus).unwrap_or(CPUS))),
        memory_mib: args.memory.unwrap_or_else(|| MEMORY_MIB.min(values::host_memory_mib() / 2).max(64)),
        kernel: kernel.image.clone(),
        terminal: process.terminal.is_some(),
        ephemeral: args.rm || (args.name.is_none() && !args.detach),
        stop_signal: stop_signal.unwrap_or(libc::SIGTERM),
        created: state::now(),
        started: None,
        monitor: None,
        keeper: None,
        end: None,
    })
}

/// Makes the files of the machine and the plan to run it by.
fn prepare(
    args: &Args,
    machine: &Machine,
    image: &Image,
    kernel: &Kernel,
    initrd: &Path,
    process: ProcessSpec,
) -> Outcome<Plan> {
    let record = &machine.record;
    let mut drives =
        vec![Drive { is_read_only: true, io_engine: IoEngine::Async, ..drive("root", &image.root) }];
    let writable = if args.read_only {
        Writable::Memory { size: 0 }
    } else {
        let path = machine.file("upper.img");
        sandbox::writable::create(&path, args.storage << 20)?;
        // What is thrown away at the end need not survive a crash of the host.
        let cache_type = if record.ephemeral { CacheType::Unsafe } else { CacheType::Writeback };
        let upper = Drive { cache_type, discard: true, io_engine: IoEngine::Async, ..drive("upper", &path) };
        drives.push(upper);
        Writable::Disk { serial: "upper".to_owned() }
    };
    let mut disks = Vec::new();
    for (number, disk) in args.disk.iter().enumerate() {
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
    let hostname = args.hostname.clone().unwrap_or_else(|| record.short_id().to_owned());
    let setup = Setup {
        hostname,
        writable,
        read_only: args.read_only,
        stop_signal: record.stop_signal,
        tmpfs: args.tmpfs.iter().map(tmpfs).collect(),
        disks,
        network: args.tap.iter().enumerate().map(|(i, tap)| interface(i, tap, record)).collect(),
        dns: (!args.dns.is_empty()).then(|| Dns { servers: args.dns.clone(), ..Dns::default() }),
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
            transport: if args.pci { Transport::Pci } else { Transport::Mmio },
            // A boot touches its memory nearly everywhere; a page at a time costs it a third.
            huge_pages: HugePages::Transparent,
            ..MachineConfig::default()
        },
        drives,
        network_interfaces: args.tap.iter().enumerate().map(|(i, tap)| card(i, tap, record)).collect(),
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
    let digits = |at: usize| record.id.get(at..at + 2).unwrap_or("00").to_owned();
    let made = || format!("06:{}:{}:{}:{}:{number:02x}", digits(0), digits(2), digits(4), digits(6));
    tap.mac.clone().unwrap_or_else(made)
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
