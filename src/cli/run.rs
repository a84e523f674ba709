//! `nacelle run`: a container image in a machine of its own.

use std::{
    io::Read,
    path::{Path, PathBuf},
    time::Instant,
};

use clap::Args as ClapArgs;
use guest::protocol::Size;

use super::{
    doctor,
    failure::{Failure, Outcome, doing},
    inspect,
    keeper::{self, Attached, revive::Revival},
    order::{Console, Order, Pull},
    output, plain,
    progress::Reporter,
    state::{Machine, State},
    terminal,
    values::{self, DiskArg, TapArg, TmpfsArg},
};

/// Longest order that is read, in bytes.
const ORDER_MAX: u64 = 1 << 20;

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
    #[arg(long, value_enum, value_name = "WHEN", default_value_t)]
    pull: Pull,
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
    let mut reporter = Reporter::new(args.quiet);
    let console = args.console()?;
    let order = args.order()?;
    order.check()?;
    let made = order.make(console, &mut reporter, &mut |what| steps.done(what));
    reporter.finish();
    let (mut machine, plan) = made?;
    if args.detach {
        return detach(&machine);
    }
    let mut running = |_: &Machine| steps.done("command started");
    let outcome = keeper::keep(&mut machine, plan, None, Attached::Yes, &mut running);
    steps.done("command ended");
    outcome
}

/// The body of the hidden `launch` command: carries out the order on standard input and prints,
/// in one line of JSON, all that is known of the machine, or `code`, `message` and `causes` of what
/// went wrong.
pub fn launch() -> Outcome<u8> {
    let mut text = Vec::new();
    let read = std::io::stdin().lock().take(ORDER_MAX).read_to_end(&mut text);
    doing(read, || "The order cannot be read".to_owned())?;
    let order = serde_json::from_slice::<Order>(&text).map_err(|e| Failure::new(api::explain_json(&e)));
    let launched = order.and_then(|order| order.launch(&mut Reporter::new(true)));
    let (code, said) = match launched {
        Ok(machine) => (0, inspect::value(&machine)),
        Err(f) => (f.code, serde_json::json!({ "code": f.code, "message": f.message, "causes": f.causes })),
    };
    output::print(&format!("{said}\n"))?;
    Ok(code)
}

/// The body of the hidden `keep` command.
pub fn keep(id: &str) -> u8 {
    let found = State::open().and_then(|state| state.find(id));
    keeper::main(|started| {
        let mut machine = found?;
        let revival = Revival::of(&mut machine)?;
        if machine.record.plain {
            return plain::keep(&mut machine, revival, started);
        }
        let plan = machine.plan();
        let plan = plan.ok_or_else(|| Failure::new("The machine's plan is gone or damaged"))?;
        keeper::keep(&mut machine, plan, revival, Attached::No, |_| started())
    })
}

fn detach(machine: &Machine) -> Outcome<u8> {
    match keeper::start_detached(Path::new(keeper::OWN), machine) {
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

impl Args {
    /// It runs in the background.
    pub(super) fn detached(&self) -> bool {
        self.detach
    }

    /// This end is asked to do more than to print.
    pub(super) fn attached(&self) -> bool {
        (self.interactive || self.tty) && !self.detach
    }

    /// The machine that is wanted, without what this end has to do with it.
    pub(super) fn order(&self) -> Outcome<Order> {
        let mut env = Vec::new();
        for file in &self.env_file {
            env.extend(values::env_file(file)?);
        }
        env.extend(self.env.iter().filter_map(|word| values::env(word)));
        Ok(Order {
            name: self.name.clone(),
            remove_at_end: self.rm || (self.name.is_none() && !self.detach),
            spec: None,
            image: self.words.first().cloned(),
            command: self.words.get(1..).unwrap_or_default().to_vec(),
            entrypoint: self.entrypoint.clone(),
            env,
            workdir: self.workdir.clone(),
            user: self.user.clone(),
            hostname: self.hostname.clone(),
            memory_mib: self.memory,
            cpus: self.cpus,
            read_only: self.read_only,
            storage_mib: self.storage,
            tmpfs: self.tmpfs.clone(),
            disks: self.disk.clone(),
            taps: self.tap.clone(),
            dns: self.dns.clone(),
            kernel: self.kernel.clone(),
            init: self.init,
            pci: self.pci,
            pull: self.pull,
            insecure_registry: self.insecure_registry,
        })
    }

    /// A terminal is given when asked for, or when the caller sits at one and nothing else was
    /// asked for.
    fn console(&self) -> Outcome<Console> {
        let both = terminal::is_terminal(0) && terminal::is_terminal(1);
        if self.tty && !self.detach && !terminal::is_terminal(0) {
            return Err(Failure::new("-t needs a terminal as standard input; leave it out or use -i alone"));
        }
        let terminal = self.tty || (both && !self.no_tty && !self.detach);
        let size = terminal::size(1).or_else(|| terminal::size(0));
        let size = size.map_or_else(Size::default, |(rows, cols)| Size { rows, cols });
        Ok(Console {
            terminal: terminal.then_some(size),
            stdin: (self.interactive || terminal) && !self.detach,
        })
    }
}
