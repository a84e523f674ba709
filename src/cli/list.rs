//! `nacelle ls`: the machines of this host.

use clap::Args as ClapArgs;
use serde::{Deserialize, Serialize};

use super::{
    failure::Outcome,
    output::{self, Format, Table},
    remote::Host,
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
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    id: String,
    name: String,
    image: String,
    command: Vec<String>,
    created: String,
    started: Option<String>,
    finished: Option<String>,
    #[serde(default)]
    suspended: Option<String>,
    status: Status,
    exit_code: Option<u8>,
    reason: Option<String>,
    pid: Option<i32>,
    cpus: u8,
    memory_mib: u64,
}

/// Lists them.
pub fn run(args: &Args, host: Option<&Host>) -> Outcome<u8> {
    let rows = match host {
        None => rows(&State::open()?, args.all)?,
        Some(host) => host.client().get(&format!("/machines?all={}", args.all))?,
    };
    if args.quiet {
        let id = |row: &Row| format!("{}\n", if args.no_trunc { &row.id } else { row.short_id() });
        output::print(&rows.iter().map(id).collect::<String>())?;
    } else if args.format == Format::Json {
        output::print_json(&rows)?;
    } else {
        output::print(&table(&rows, args.no_trunc).text())?;
    }
    Ok(0)
}

/// The machines of this host, the newest first; those that ended only when `all` are wanted.
pub fn rows(state: &State, all: bool) -> Outcome<Vec<Row>> {
    let seen = |mut machine: Machine| {
        let status = machine.status();
        row(&machine.record, status)
    };
    let rows: Vec<Row> = state.machines()?.into_iter().map(seen).collect();
    let shown = |row: &Row| all || !matches!(row.status, Status::Exited | Status::Dead);
    Ok(rows.into_iter().filter(shown).collect())
}

impl Row {
    /// The machine's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    fn short_id(&self) -> &str {
        self.id.get(..12).unwrap_or(&self.id)
    }
}

fn row(record: &Record, status: Status) -> Row {
    let time = |seconds: u64| when::rfc3339(seconds.saturating_mul(1000));
    let end = record.end.as_ref();
    Row {
        id: record.id.clone(),
        name: record.name.clone(),
        image: record.image.clone(),
        command: record.command.clone(),
        created: time(record.created),
        started: record.started.map(time),
        finished: end.map(|e| time(e.at)),
        suspended: record.suspended.filter(|_| status == Status::Suspended).map(time),
        status,
        exit_code: end.map(|e| e.exit_code),
        reason: end.and_then(|e| e.reason.clone()),
        pid: record.monitor.filter(|_| status == Status::Running).map(|m| m.pid),
        cpus: record.cpus,
        memory_mib: record.memory_mib,
    }
}

fn table(rows: &[Row], whole: bool) -> Table {
    let mut table = Table::new(&["ID", "NAME", "IMAGE", "COMMAND", "CREATED", "STATUS"]);
    let fit = |text: String| if whole { text } else { output::cut(&text, WIDTH) };
    for row in rows {
        let id = if whole { &row.id } else { row.short_id() };
        table.add([
            id.to_owned(),
            row.name.clone(),
            // The end of a path or reference says more than its start.
            if whole { row.image.clone() } else { tail(&row.image, WIDTH) },
            fit(row.command.join(" ")),
            when::ago(seconds(&row.created)),
            status(row),
        ]);
    }
    table
}

/// A moment of a row in seconds since 1970.
fn seconds(moment: &str) -> u64 {
    when::moment(moment, 0).map_or(0, |millis| millis / 1000)
}

fn tail(text: &str, width: usize) -> String {
    let count = text.chars().count();
    if count <= width {
        return text.to_owned();
    }
    ['…'].into_iter().chain(text.chars().skip(count - (width - 1))).collect()
}

/// Where a machine stands and since when, in Docker's words.
fn status(row: &Row) -> String {
    let since = |moment: &Option<String>| seconds(moment.as_ref().unwrap_or(&row.created));
    match (row.status, row.exit_code) {
        (Status::Running, _) => {
            let up = super::state::now().saturating_sub(since(&row.started));
            format!("Up {}", when::in_words(up))
        }
        (Status::Suspended, _) => format!("Suspended {}", when::ago(since(&row.suspended))),
        (Status::Exited, Some(code)) => format!("Exited ({code}) {}", when::ago(since(&row.finished))),
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
            image: "registry.example/a/very/long/path/to/busybox:latest".to_owned(),
            command: vec!["sh".to_owned(), "-c".to_owned(), "echo\nhello".to_owned()],
            started: Some(state::now()),
            end: Some(End { exit_code: 3, reason: None, at: state::now() }),
            ..Record::example(&"0123456789abcdef".repeat(4), "web")
        }
    }

    #[test]
    fn a_row_fits_a_screen_and_ends_with_the_exit_code() {
        let record = record();
        let text = table(&[row(&record, record.status())], false).text();
        let line = text.lines().nth(1).unwrap();
        assert!(line.starts_with("0123456789ab   web"), "{line}");
        assert!(
            line.contains("…") && line.contains("/busybox:latest") && !line.contains("registry"),
            "{line}"
        );
        assert!(line.contains("echo\u{FFFD}hello") && line.contains("Exited (3)"), "{line}");
        assert!(table(&[row(&record, record.status())], true).text().contains(&record.id));
    }

    #[test]
    fn a_machine_without_an_end_and_without_processes_is_dead() {
        let mut record = record();
        record.end = None;
        assert_eq!(status(&row(&record, record.status())), "Dead");
        let json = serde_json::to_value(row(&record, record.status())).unwrap();
        assert_eq!(json["status"], "dead");
        assert_eq!(json["exit_code"], serde_json::Value::Null);
    }
}
