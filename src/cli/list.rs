//! `nacelle ls`: the machines of this host.

use clap::Args as ClapArgs;
use serde::Serialize;

use super::{
    failure::Outcome,
    output::{self, Format, Table},
    state::{Machine, Record, State, Status},
    when,
};

/// Characters of a command or image name that are shown unless all is asked for.
const WIDTH: usize = 30;

/// List machines
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// Show those that ended, too
    #[arg(short, long)]
    all: bool,
    /// Print ids only
    #[arg(short, long)]
    quiet: bool,
    /// How to print them
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    format: Format,
    /// Print ids, names and commands whole
    #[arg(long)]
    no_trunc: bool,
}

/// A machine as JSON; keys stay what they are.
#[derive(Debug, Serialize)]
struct Row<'a> {
    id: &'a str,
    name: &'a str,
    image: &'a str,
    command: &'a [String],
    created: String,
    started: Option<String>,
    finished: Option<String>,
    status: Status,
    exit_code: Option<u8>,
    reason: Option<&'a str>,
    pid: Option<i32>,
    cpus: u8,
    memory_mib: u64,
}

/// Lists them.
pub fn run(args: &Args) -> Outcome<u8> {
    let machines = State::open()?.machines()?;
    let shown = |m: &&Machine| args.all || matches!(m.record.status(), Status::Running | Status::Created);
    let machines: Vec<&Record> = machines.iter().filter(shown).map(|m| &m.record).collect();
    if args.quiet {
        let id = |r: &&Record| format!("{}\n", if args.no_trunc { &r.id } else { r.short_id() });
        output::print(&machines.iter().map(id).collect::<String>())?;
    } else if args.format == Format::Json {
        output::print_json(&machines.iter().map(|record| row(record)).collect::<Vec<_>>())?;
    } else {
        output::print(&table(&machines, args.no_trunc).text())?;
    }
    Ok(0)
}

fn row(record: &Record) -> Row<'_> {
    let time = |seconds: u64| when::rfc3339(seconds.saturating_mul(1000));
    let end = record.end.as_ref();
    let status = record.status();
    Row {
        id: &record.id,
        name: &record.name,
        image: &record.image,
        command: &record.command,
        created: time(record.created),
        started: record.started.map(time),
        finished: end.map(|e| time(e.at)),
        status,
        exit_code: end.map(|e| e.exit_code),
        reason: end.and_then(|e| e.reason.as_deref()),
        pid: record.monitor.filter(|_| status == Status::Running).map(|m| m.pid),
        cpus: record.cpus,
        memory_mib: record.memory_mib,
    }
}

fn table(machines: &[&Record], whole: bool) -> Table {
    let mut table = Table::new(&["ID", "NAME", "IMAGE", "COMMAND", "CREATED", "STATUS"]);
    let fit = |text: String| if whole { text } else { output::cut(&text, WIDTH) };
    for record in machines {
        let id = if whole { &record.id } else { record.short_id() };
        table.add([
            id.to_owned(),
            record.name.clone(),
            // The end of a path or reference says more than its start.
            if whole { record.image.clone() } else { tail(&record.image, WIDTH) },
            fit(record.command.join(" ")),
            when::ago(record.created),
            status(record),
        ]);
    }
    table
}

fn tail(text: &str, width: usize) -> String {
    let count = text.chars().count();
    if count <= width {
        return text.to_owned();
    }
    ['…'].into_iter().chain(text.chars().skip(count - (width - 1))).collect()
}

/// Where a machine stands and since when, in Docker's words.
pub fn status(record: &Record) -> String {
    let since = |moment: Option<u64>| moment.unwrap_or(record.created);
    match (record.status(), &record.end) {
        (Status::Running, _) => {
            let up = super::state::now().saturating_sub(since(record.started));
            format!("Up {}", when::in_words(up))
        }
        (Status::Exited, Some(end)) => format!("Exited ({}) {}", end.exit_code, when::ago(end.at)),
        (Status::Exited, None) => "Exited".to_owned(),
        (Status::Created, _) => "Starting".to_owned(),
        (Status::Dead, _) => "Dead".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::state::{self, End},
        *,
    };

    fn record() -> Record {
        Record {
            id: "0123456789abcdef".repeat(4),
            name: "web".to_owned(),
            image: "registry.example/a/very/long/path/to/busybox:latest".to_owned(),
            image_key: String::new(),
            command: vec!["sh".to_owned(), "-c".to_owned(), "echo\nhello".to_owned()],
            env: Vec::new(),
            cpus: 1,
            memory_mib: 128,
            kernel: "/boot/vmlinux".into(),
            terminal: false,
            ephemeral: false,
            plain: false,
            stop_signal: 15,
            created: state::now(),
            started: Some(state::now()),
            monitor: None,
            keeper: None,
            end: Some(End { exit_code: 3, reason: None, at: state::now() }),
        }
    }

    #[test]
    fn a_row_fits_a_screen_and_ends_with_the_exit_code() {
        let record = record();
        let text = table(&[&record], false).text();
        let line = text.lines().nth(1).unwrap();
        assert!(line.starts_with("0123456789ab   web"), "{line}");
        assert!(
            line.contains("…") && line.contains("/busybox:latest") && !line.contains("registry"),
            "{line}"
        );
        assert!(line.contains("echo\u{FFFD}hello") && line.contains("Exited (3)"), "{line}");
        assert!(table(&[&record], true).text().contains(&record.id));
    }

    #[test]
    fn a_machine_without_an_end_and_without_processes_is_dead() {
        let mut record = record();
        record.end = None;
        assert_eq!(status(&record), "Dead");
        let json = serde_json::to_value(row(&record)).unwrap();
        assert_eq!(json["status"], "dead");
        assert_eq!(json["exit_code"], serde_json::Value::Null);
    }
}
