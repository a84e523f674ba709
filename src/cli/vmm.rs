//! `nacelle vmm`: one machine monitor, one process, one machine.
//!
//! The arguments are Firecracker's. This is the start path that every machine takes, so it
//! reads its few flags itself and starts nothing it does not need.

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use api::{
    Fault, FaultKind, Spec,
    spec::{LogLevel, Logger, Metrics},
};

use crate::{
    controller::{Controller, Settings},
    logger,
    metrics::{Milestone, Milestones, Startup},
    server::{Limits, Server},
    signals::{self, Signals},
    snapshot::{self, Pair},
    vm::{Ending, kvm},
};

const USAGE: &str = "\
Run one machine, described through an API socket or by a configuration file

Usage: nacelle vmm [--api-sock PATH] [--config-file FILE] [OPTIONS]

Options:
      --api-sock PATH      Socket of the API [default: /run/firecracker.socket]
      --config-file FILE   The machine, as JSON in Firecracker's format; it starts at once
      --no-api             Serve no API socket; needs --config-file
      --api-after-start    Make the API socket when the machine runs already, and go on without it
                           if that fails; needs --config-file
      --id ID              Name of the machine in its log [default: anonymous-instance]
      --enable-pci         Attach devices through PCI instead of MMIO
      --log-path FILE      Write the log to a file or named pipe [default: standard error]
      --level LEVEL        Off, Error, Warning, Info, Debug or Trace [default: Warning]
      --module PATH        Log only this module
      --show-level         Put the level into each line
      --show-log-origin    Put the source line into each line
      --metrics-path FILE  Write metrics to a file or named pipe, one JSON object a line
      --boot-timer         Log when the guest says it reached user space
      --metadata FILE      Data of the metadata service, as JSON
      --mmds-size-limit BYTES
                           Most data the service holds [default: that of a request]
      --http-api-max-payload-size BYTES
                           Largest body of a request [default: 51200]
      --start-time-us, --start-time-cpu-us, --parent-cpu-time-us N
                           When the caller started this process, for metrics
      --seccomp-filter FILE, --no-seccomp
                           Taken and without effect: no filter is installed yet
      --snapshot-version   Print the version of the snapshot format
      --describe-snapshot FILE
                           Print the version of the snapshot format of a file
      --show-counters      At the end, print milestones, exits and device counters
      --version            Print the version
  -h, --help               Print this help";

/// Exit code for arguments that cannot be understood (Firecracker's).
pub const EXIT_ARGUMENTS: u8 = 153;
/// Exit code for a configuration that cannot be built (Firecracker's).
pub const EXIT_CONFIGURATION: u8 = 152;

/// Where the API is served when nothing else is said (Firecracker's).
const API_SOCKET: &str = "/run/firecracker.socket";

/// Version of the snapshots that are written, as Firecracker tells its own.
const SNAPSHOT_VERSION: &str = "1.0.0";

#[derive(Debug, Default)]
struct Arguments {
    api_sock: Option<PathBuf>,
    payload_max: Option<usize>,
    mmds_max: Option<usize>,
    metadata: Option<PathBuf>,
    config_file: Option<PathBuf>,
    no_api: bool,
    api_after_start: bool,
    id: Option<String>,
    enable_pci: bool,
    log: Logger,
    log_given: bool,
    boot_timer: bool,
    metrics: Option<PathBuf>,
    startup: Startup,
    show_counters: bool,
    show: Option<String>,
    described: Option<PathBuf>,
}

/// Runs the monitor with the arguments after `vmm`.
pub fn main(arguments: impl Iterator<Item = String>) -> ExitCode {
    let milestones = Arc::new(Milestones::default());
    milestones.reached(Milestone::Exec);
    // One heap for all threads: they hardly allocate, and an arena of its own would cost each
    // of them four calls and some pages.
    // SAFETY: sets a number in the allocator before any thread is started.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    let arguments = match parse(arguments) {
        Ok(arguments) => arguments,
        Err(text) => {
            eprintln!("nacelle vmm: {text}\nTry 'nacelle vmm --help'");
            return ExitCode::from(EXIT_ARGUMENTS);
        }
    };
    if let Some(text) = &arguments.show {
        println!("{text}");
        return ExitCode::SUCCESS;
    }
    if let Some(path) = &arguments.described {
        return match describe_snapshot(path) {
            Ok(version) => {
                println!("{version}");
                ExitCode::SUCCESS
            }
            Err(error) => {
                super::print_fault(&Fault::from_error(FaultKind::Invalid, &error));
                ExitCode::FAILURE
            }
        };
    }
    match run(&arguments, &milestones) {
        Ok(ending) => leave(ending.exit_code()),
        Err(fault) => {
            super::print_fault(&fault);
            // A thread may still sit in a device; the process ends all the same.
            leave(EXIT_CONFIGURATION.into())
        }
    }
}

/// Ends the process without unwinding what the kernel takes back faster by itself.
fn leave(code: i32) -> ! {
    super::terminal::restore();
    // SAFETY: nothing of this process is used afterwards; output was written unbuffered or
    // flushed line by line.
    unsafe { libc::_exit(code) }
}

fn run(arguments: &Arguments, milestones: &Arc<Milestones>) -> Result<Ending, Fault> {
    let invalid = |text: &str| Fault::new(FaultKind::Invalid, text);
    if arguments.no_api && arguments.config_file.is_none() {
        return Err(invalid("--no-api needs --config-file: there is no other way to describe the machine"));
    }
    if arguments.api_after_start && (arguments.no_api || arguments.config_file.is_none()) {
        return Err(invalid("--api-after-start needs --config-file, and does not go with --no-api"));
    }
    let spec = arguments.config_file.as_deref().map(read).transpose()?;
    let settings = Settings {
        id: arguments.id.clone().unwrap_or_else(|| "anonymous-instance".to_owned()),
        pci: arguments.enable_pci,
        boot_timer: arguments.boot_timer,
        keyboard: !arguments.no_api && !arguments.api_after_start,
        log: arguments.log.clone(),
        mmds_size_limit: arguments.mmds_max.or(arguments.payload_max),
        startup: arguments.startup,
    };
    let in_file = spec.as_ref().and_then(|spec| spec.logger.as_ref()).filter(|_| !arguments.log_given);
    logger::start(&settings.id, in_file.unwrap_or(&arguments.log)).map_err(|e| Fault {
        kind: FaultKind::Invalid,
        message: "The log cannot be opened".to_owned(),
        causes: vec![e.to_string()],
    })?;
    milestones.reached(Milestone::Configured);

    let internal = |e: std::io::Error| Fault::from_error(FaultKind::Internal, &e);
    let signals = Signals::block(&signals::ENDING).map_err(internal)?;
    let at_once = !arguments.no_api && !arguments.api_after_start;
    let server = at_once.then(|| serve(arguments)).transpose()?;
    if !kvm::has_hardware() {
        log::warn!("This processor has no hardware virtualization: a Linux guest will not boot");
    }
    let starts = spec.is_some();
    let spec = spec.unwrap_or_default();
    let flag = arguments.metrics.clone().map(|path| Metrics { metrics_path: path, ..Metrics::default() });
    let metrics = [flag, spec.metrics.clone()];
    let mut controller =
        Controller::new(settings, Arc::clone(milestones), spec, server, signals).map_err(internal)?;
    metrics.into_iter().flatten().try_for_each(|metrics| controller.configure_metrics(metrics))?;
    if let Some(path) = &arguments.metadata {
        controller.put_metadata(metadata(path)?)?;
    }
    if starts {
        controller.start()?;
    }
    if arguments.api_after_start {
        // The machine runs and has its owner; it is not ended for want of a door.
        match serve(arguments) {
            Ok(server) => controller.serve_on(server),
            Err(fault) => log::error!("The API is not served: {fault}"),
        }
    }
    let ending = controller.run().map_err(internal)?;
    match &ending {
        Ending::Broken(_) => eprintln!("nacelle vmm: {}", ending.reason()),
        _ => log::info!("{}", ending.reason()),
    }
    if let Some(vm) = controller.vm() {
        vm.finish_consoles();
        if arguments.show_counters {
            print_counters(vm);
        }
    }
    controller.close();
    Ok(ending)
}

fn serve(arguments: &Arguments) -> Result<Server, Fault> {
    let path = arguments.api_sock.clone().unwrap_or_else(|| API_SOCKET.into());
    let limits = Limits::default();
    let limits = Limits { body: arguments.payload_max.unwrap_or(limits.body), ..limits };
    Server::new(&path, limits).map_err(|e| Fault::from_error(FaultKind::Invalid, &e))
}

fn read(path: &std::path::Path) -> Result<Spec, Fault> {
    Spec::from_json(path, &text_of("Configuration file", path)?)
}

fn metadata(path: &std::path::Path) -> Result<serde_json::Value, Fault> {
    serde_json::from_str(&text_of("Metadata file", path)?).map_err(|e| Fault {
        kind: FaultKind::Invalid,
        message: format!("Metadata file {} is not JSON", path.display()),
        causes: vec![e.to_string()],
    })
}

/// The text of a file, one byte more than a configuration may have at most.
fn text_of(what: &str, path: &std::path::Path) -> Result<String, Fault> {
    use std::io::Read;
    let mut text = String::with_capacity(8 << 10);
    let limit = api::spec::CONFIG_FILE_MAX as u64 + 1;
    let read = std::fs::File::open(path).and_then(|f| f.take(limit).read_to_string(&mut text));
    read.map(|_| text).map_err(|e| Fault {
        kind: FaultKind::Invalid,
        message: format!("{what} {} cannot be read", path.display()),
        causes: vec![e.to_string()],
    })
}

fn print_counters(vm: &crate::vm::Vm) {
    for (name, microseconds) in vm.milestones().since_exec() {
        eprintln!("milestone {name} {microseconds} us");
    }
    for (kind, count) in vm.exits() {
        eprintln!("exits {kind} {count}");
    }
    for (device, counter, count) in vm.counters() {
        eprintln!("device {device} {counter} {count}");
    }
}

fn parse(arguments: impl Iterator<Item = String>) -> Result<Arguments, String> {
    const FLAGS: [&str; 26] = [
        "--metadata",
        "--mmds-size-limit",
        "--api-sock",
        "--http-api-max-payload-size",
        "--start-time-us",
        "--start-time-cpu-us",
        "--parent-cpu-time-us",
        "--seccomp-filter",
        "--no-seccomp",
        "--snapshot-version",
        "--describe-snapshot",
        "--config-file",
        "--no-api",
        "--api-after-start",
        "--id",
        "--enable-pci",
        "--log-path",
        "--level",
        "--module",
        "--show-level",
        "--show-log-origin",
        "--metrics-path",
        "--boot-timer",
        "--show-counters",
        "--version",
        "--help",
    ];
    let mut parsed =
        Arguments { log: Logger { level: LogLevel::Warning, ..Logger::default() }, ..Arguments::default() };
    let mut rest = arguments;
    while let Some(argument) = rest.next() {
        let (flag, inline) = match argument.split_once('=') {
            Some((flag, value)) => (flag.to_owned(), Some(value.to_owned())),
            None => (argument, None),
        };
        let mut value =
            || inline.clone().or_else(|| rest.next()).ok_or_else(|| format!("{flag} needs a value"));
        match flag.as_str() {
            "--api-sock" => parsed.api_sock = Some(value()?.into()),
            "--metadata" => parsed.metadata = Some(value()?.into()),
            "--mmds-size-limit" => parsed.mmds_max = Some(number(&flag, &value()?)?),
            "--http-api-max-payload-size" => parsed.payload_max = Some(number(&flag, &value()?)?),
            "--start-time-us" => parsed.startup.start_us = Some(number(&flag, &value()?)?),
            "--start-time-cpu-us" => parsed.startup.start_cpu_us = Some(number(&flag, &value()?)?),
            "--parent-cpu-time-us" => parsed.startup.parent_cpu_us = Some(number(&flag, &value()?)?),
            "--metrics-path" => parsed.metrics = Some(value()?.into()),
            "--seccomp-filter" => drop(value()?),
            "--no-seccomp" => {}
            "--snapshot-version" => parsed.show = Some(format!("v{SNAPSHOT_VERSION}")),
            "--describe-snapshot" => parsed.described = Some(value()?.into()),
            "--config-file" => parsed.config_file = Some(value()?.into()),
            "--id" => parsed.id = Some(id(&value()?)?),
            "--log-path" => parsed.log.log_path = Some(value()?.into()),
            "--level" => parsed.log.level = level(&value()?)?,
            "--module" => parsed.log.module = Some(value()?),
            "--no-api" => parsed.no_api = true,
            "--api-after-start" => parsed.api_after_start = true,
            "--enable-pci" => parsed.enable_pci = true,
            "--show-level" => parsed.log.show_level = true,
            "--show-log-origin" => parsed.log.show_log_origin = true,
            "--boot-timer" => parsed.boot_timer = true,
            "--show-counters" => parsed.show_counters = true,
            "--version" | "-V" => parsed.show = Some(version()),
            "--help" | "-h" => parsed.show = Some(USAGE.to_owned()),
            other => {
                let hint = api::nearest(other, FLAGS).map(|f| format!("; did you mean {f}?"));
                return Err(format!("Unknown argument {other:?}{}", hint.unwrap_or_default()));
            }
        }
        if flag == "--boot-timer" && !parsed.log_given {
            // What it says is information.
            parsed.log.level = LogLevel::Info;
        }
        parsed.log_given |= matches!(flag.as_str(), "--log-path" | "--level" | "--module");
        parsed.log_given |= flag.starts_with("--show-l");
    }
    Ok(parsed)
}

/// Two lines: the first is Firecracker's, which programs take apart to learn what they may send.
fn version() -> String {
    format!("Firecracker v{}\nnacelle {}", api::FIRECRACKER_VERSION, env!("CARGO_PKG_VERSION"))
}

/// The version of the format of a snapshot, be it a directory or the state of a pair of files.
fn describe_snapshot(path: &std::path::Path) -> Result<String, snapshot::SnapshotError> {
    if path.is_dir() {
        let format = snapshot::inspect(path)?.format;
        return Ok(format!("v{format}.0.0"));
    }
    Pair::open(path).map(|_| format!("v{SNAPSHOT_VERSION}"))
}

fn number<T: std::str::FromStr>(flag: &str, word: &str) -> Result<T, String> {
    word.parse().map_err(|_| format!("{flag} is {word:?}; it must be a number"))
}

fn level(word: &str) -> Result<LogLevel, String> {
    LogLevel::try_from(word.to_owned())
        .map_err(|_| format!("--level is {word:?}; it must be Off, Error, Warning, Info, Debug or Trace"))
}

fn id(word: &str) -> Result<String, String> {
    let fine = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if word.is_empty() || word.len() > 64 || !word.chars().all(fine) {
        return Err(format!("--id is {word:?}; it must be 1 to 64 letters, digits and hyphens"));
    }
    Ok(word.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<Arguments, String> {
        parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn flags_are_firecrackers() {
        let got = read("--no-api --config-file=m.json --id a-1 --level Debug --show-level").unwrap();
        assert!(got.no_api && got.log.show_level && got.log_given);
        assert_eq!(got.config_file, Some("m.json".into()));
        assert_eq!(got.log.level, LogLevel::Debug);
    }

    #[test]
    fn the_snapshot_format_has_a_version_and_no_file_is_one() {
        assert_eq!(read("--snapshot-version").unwrap().show.as_deref(), Some("v1.0.0"));
        let file = read("--describe-snapshot Cargo.toml").unwrap().described.unwrap();
        assert!(describe_snapshot(&file).unwrap_err().to_string().contains("damaged"));
        assert!(describe_snapshot(std::path::Path::new("/nowhere")).is_err());
    }

    #[test]
    fn slips_are_answered_with_the_nearest_flag() {
        assert!(read("--config-fil x").unwrap_err().contains("did you mean --config-file?"));
        assert!(read("--id a/b").unwrap_err().contains("letters"));
        assert!(read("--id").unwrap_err().contains("needs a value"));
        assert_eq!(read("--level WARN").unwrap().log.level, LogLevel::Warning);
        assert!(read("--level loud").unwrap_err().contains("Trace"));
    }
}
