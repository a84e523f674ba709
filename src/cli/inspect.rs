//! `nacelle inspect`: everything that is known of a machine, as JSON with stable keys.

use std::path::PathBuf;

use clap::Args as ClapArgs;
use serde::Serialize;
use serde_json::Value;

use super::{
    failure::Outcome,
    output,
    remote::Host,
    state::{Machine, ProcessName, State, Status},
    when,
};

/// Print everything known of machines, as a JSON array
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// Names, ids or starts of ids
    #[arg(required = true, value_name = "MACHINE")]
    machines: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Inspection<'a> {
    id: &'a str,
    name: &'a str,
    state: Standing<'a>,
    created: String,
    image: &'a str,
    image_key: &'a str,
    command: &'a [String],
    environment: &'a [String],
    terminal: bool,
    remove_at_end: bool,
    stop_signal: i32,
    resources: Resources,
    kernel: KernelUse<'a>,
    paths: Paths,
    /// What the monitor was given (Firecracker's format).
    machine: Value,
    /// The container's surroundings.
    setup: Value,
    /// Its main process.
    process: Value,
}

#[derive(Debug, Serialize)]
struct Standing<'a> {
    status: Status,
    exit_code: Option<u8>,
    reason: Option<&'a str>,
    started: Option<String>,
    finished: Option<String>,
    suspended: Option<String>,
    monitor: Option<ProcessName>,
    keeper: Option<ProcessName>,
}

#[derive(Debug, Serialize)]
struct Resources {
    cpus: u8,
    memory_mib: u64,
    /// Most that the writable layer may hold, in bytes.
    storage_bytes: Option<u64>,
    /// What it takes on the host now, in bytes.
    storage_used_bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
struct KernelUse<'a> {
    image: &'a PathBuf,
    initrd: Value,
    command_line: Value,
}

#[derive(Debug, Serialize)]
struct Paths {
    directory: PathBuf,
    config: PathBuf,
    vsock: PathBuf,
    api: PathBuf,
    console_log: PathBuf,
    output_log: PathBuf,
    monitor_log: PathBuf,
    writable_layer: Option<PathBuf>,
    /// What a suspended machine goes on from.
    suspended: Option<PathBuf>,
}

/// Prints them. What can be found is printed, even when something cannot.
pub fn run(args: &Args, host: Option<&Host>) -> Outcome<u8> {
    let state = host.is_none().then(State::open).transpose()?;
    let mut found = Vec::new();
    let code = output::each(&args.machines, |word| {
        found.push(match (&state, host) {
            (Some(state), _) => value(&state.find(word)?),
            (None, Some(host)) => host.inspect(word)?,
            (None, None) => Value::Null,
        });
        Ok(())
    });
    output::print_json(&found)?;
    Ok(code)
}

/// All that is known of a machine; keys stay what they are.
pub fn value(machine: &Machine) -> Value {
    serde_json::to_value(inspect(machine)).unwrap_or_default()
}

fn inspect(machine: &Machine) -> Inspection<'_> {
    let record = &machine.record;
    let time = |seconds: u64| when::rfc3339(seconds.saturating_mul(1000));
    let status = record.status();
    let running = matches!(status, Status::Running | Status::Created);
    let end = record.end.as_ref();
    let plan = read(machine, "plan.json");
    let spec = match read(machine, "config.json") {
        Value::Null => part(&plan, "/spec"),
        spec => spec,
    };
    Inspection {
        id: &record.id,
        name: &record.name,
        state: Standing {
            status,
            exit_code: end.map(|e| e.exit_code),
            reason: end.and_then(|e| e.reason.as_deref()),
            started: record.started.map(time),
            finished: end.map(|e| time(e.at)),
            suspended: record.suspended.filter(|_| status == Status::Suspended).map(time),
            monitor: record.monitor.filter(|_| running),
            keeper: record.keeper.filter(|_| running),
        },
        created: time(record.created),
        image: &record.image,
        image_key: &record.image_key,
        command: &record.command,
        environment: &record.env,
        terminal: record.terminal,
        remove_at_end: record.ephemeral,
        stop_signal: record.stop_signal,
        resources: resources(machine),
        kernel: KernelUse {
            image: &record.kernel,
            initrd: part(&spec, "/boot-source/initrd_path"),
            command_line: part(&spec, "/boot-source/boot_args"),
        },
        paths: paths(machine),
        setup: without_entropy(part(&plan, "/setup")),
        process: part(&plan, "/process"),
        machine: spec,
    }
}

fn resources(machine: &Machine) -> Resources {
    use std::os::unix::fs::MetadataExt;
    let layer = std::fs::metadata(machine.file("upper.img")).ok();
    Resources {
        cpus: machine.record.cpus,
        memory_mib: machine.record.memory_mib,
        storage_bytes: layer.as_ref().map(|m| m.len()),
        storage_used_bytes: layer.as_ref().map(|m| m.blocks().saturating_mul(512)),
    }
}

fn paths(machine: &Machine) -> Paths {
    Paths {
        directory: machine.file(""),
        config: machine.file("config.json"),
        vsock: machine.vsock(),
        api: machine.api(),
        console_log: machine.file("console.log"),
        output_log: machine.file("output.log"),
        monitor_log: machine.file("monitor.log"),
        writable_layer: Some(machine.file("upper.img")).filter(|p| p.exists()),
        suspended: Some(machine.suspended()).filter(|p| p.exists()),
    }
}

/// One of the machine's JSON files; null when it is not there (yet) or damaged.
fn read(machine: &Machine, name: &str) -> Value {
    let text = std::fs::read(machine.file(name)).unwrap_or_default();
    serde_json::from_slice(&text).unwrap_or_default()
}

fn part(value: &Value, pointer: &str) -> Value {
    value.pointer(pointer).cloned().unwrap_or_default()
}

/// Seeds are for the machine alone.
fn without_entropy(mut setup: Value) -> Value {
    if let Some(fields) = setup.as_object_mut() {
        fields.remove("entropy");
    }
    setup
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_that_are_not_there_are_null() {
        let value: Value = serde_json::from_str(r#"{"setup":{"hostname":"a","entropy":[1]}}"#).unwrap();
        assert_eq!(part(&value, "/spec"), Value::Null);
        assert_eq!(without_entropy(part(&value, "/setup")), serde_json::json!({"hostname": "a"}));
        assert_eq!(without_entropy(Value::Null), Value::Null);
    }
}
