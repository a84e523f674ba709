//! `nacelle fork`: several machines that begin where one is.
//!
//! ```text
//!   machine that runs ── one live snapshot ──┐
//!   suspended machine ── its snapshot ───────┼─► machines, a few at a time, each with drives,
//!   DIR ─────────────────────────────────────┘   sockets, name and identity of its own
//! ```
//!
//! One snapshot is for all of them: they share its memory, page for page, until they write. Each
//! succeeds or fails for itself, which the exit code and one line for each say.

use std::{
    ops::ControlFlow,
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use api::{client::Client, spec::CreateSnapshot};
use clap::Args as ClapArgs;
use serde::Serialize;

use super::{
    doctor, ending,
    failure::{Failure, Outcome},
    output::{self, Format},
    overrides::{self, Setting},
    restore::{self, Source, Wanted},
    scaffold::Scaffold,
    snapshot::{
        create,
        watching::{EXIT_INTERRUPTED, Watching},
    },
    state::{Machine, State, Status},
};
use crate::snapshot::{Watch, manifest};

/// Most machines that are made at a time: what one more would win, its memory and disk take.
const AT_ONCE: usize = 8;
/// Most machines of one call.
const COUNT_MAX: u32 = 1000;
/// How often signals are looked for.
const TURN: Duration = Duration::from_millis(20);

/// Make several machines that go on where one is
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// How many
    #[arg(short = 'n', long, value_name = "NUMBER", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=i64::from(COUNT_MAX)))]
    count: u32,
    /// What their names begin with, followed by '-' and a number [default: the original's name]
    #[arg(long, value_name = "PREFIX")]
    name: Option<String>,
    /// What is different in them; {n} is the number of each: network-interfaces.eth0.host_dev_name=tap{n}
    #[arg(long, value_name = "KEY=VALUE", value_parser = overrides::setting)]
    set: Vec<Setting>,
    /// Remove each machine when it ends
    #[arg(long)]
    rm: bool,
    /// How to print them
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    format: Format,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
    /// Name, id or start of an id of a machine, or a snapshot's directory
    #[arg(value_name = "MACHINE|DIR")]
    source: String,
}

/// What became of one, as JSON; keys stay what they are.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    id: Option<String>,
    error: Option<String>,
}

/// Makes them. The names of those that run are printed, one a line.
pub fn run(args: &Args) -> Outcome<u8> {
    doctor::require()?;
    let state = State::open()?;
    let scaffold = Scaffold::begin(&state)?;
    let watching = Watching::new("Writing", args.quiet)?;
    let source = source(&state, &args.source, &scaffold, &watching)?;
    let names = names(&state, args, source.name())?;
    let forks = Forks { state: &state, source: &source, scaffold: &scaffold, args, names: &names };
    let results = forks.make(&watching);
    let interrupted = watching.interrupted();
    drop(watching);
    if interrupted {
        // All or nothing: who asked no longer wants them.
        for machine in results.iter().flatten() {
            let _ = state.find(&machine.record.id).and_then(|mut machine| {
                ending::cut_off(&mut machine)?;
                super::rm::remove(&state, &mut machine, true)
            });
        }
        return Err(Failure::new("Interrupted; no machine was left").with_code(EXIT_INTERRUPTED));
    }
    report(args.format, &names, results)
}

fn report(format: Format, names: &[String], results: Vec<Outcome<Machine>>) -> Outcome<u8> {
    let failed = results.iter().any(Result::is_err);
    let mut rows = Vec::new();
    for (name, result) in names.iter().zip(results) {
        match &result {
            Ok(_) if format == Format::Table => output::print(&format!("{name}\n"))?,
            Ok(_) => {}
            Err(failure) => eprintln!("nacelle: Machine {name}: {failure}"),
        }
        let (id, error) = match result {
            Ok(machine) => (Some(machine.record.id), None),
            Err(failure) => (None, Some(failure.to_string())),
        };
        rows.push(Row { name: name.clone(), id, error });
    }
    if format == Format::Json {
        output::print_json(&rows)?;
    }
    Ok(u8::from(failed))
}

/// The snapshot that all are made of.
fn source(state: &State, word: &str, scaffold: &Scaffold, watch: &dyn Watch) -> Outcome<Source> {
    let path = Path::new(word);
    let found = state.find(word);
    // A machine's name is no path; where both are there, the machine is meant.
    if found.is_err() && path.join(manifest::FILE).exists() {
        return Source::open(path);
    }
    let mut machine = found?;
    if machine.status() == Status::Suspended {
        return Source::of_suspended(&machine);
    }
    machine.must_run("be forked")?;
    let snapshot_path = scaffold.snapshot();
    let drives = create::capture(&mut Client::unix(machine.api()), &snapshot_path)?;
    let request =
        CreateSnapshot { snapshot_path: snapshot_path.clone(), drives, live: true, ..Default::default() };
    create::take(&machine, request, watch)?;
    Source::open(&snapshot_path)
}

/// Names that nobody has.
fn names(state: &State, args: &Args, original: Option<&str>) -> Outcome<Vec<String>> {
    let taken: Vec<String> = state.machines()?.into_iter().map(|machine| machine.record.name).collect();
    let prefix = args.name.as_deref().or(original).unwrap_or("fork");
    let free = (1u64..).map(|number| format!("{prefix}-{number}")).filter(|name| !taken.contains(name));
    Ok(free.take(args.count as usize).collect())
}

/// What is to be made.
struct Forks<'a> {
    state: &'a State,
    source: &'a Source,
    scaffold: &'a Scaffold,
    args: &'a Args,
    names: &'a [String],
}

/// Tells those who copy whether anybody still wants it.
struct Wish<'a>(&'a AtomicBool);

impl Watch for Wish<'_> {
    fn step(&self, _: u64, _: u64) -> ControlFlow<()> {
        if self.0.load(Relaxed) { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }
}

impl Forks<'_> {
    /// Makes and starts all, a few at a time, and returns what became of each, in order.
    fn make(&self, watching: &Watching) -> Vec<Outcome<Machine>> {
        let (next, wanted) = (AtomicUsize::new(0), AtomicBool::new(true));
        let results = Mutex::new(Vec::new());
        let work = || {
            loop {
                let at = next.fetch_add(1, Relaxed);
                let Some(name) = self.names.get(at) else { return };
                let made = if wanted.load(Relaxed) {
                    self.one(at, name, &Wish(&wanted))
                } else {
                    Err(Failure::new("Interrupted"))
                };
                results.lock().unwrap_or_else(PoisonError::into_inner).push((at, made));
            }
        };
        thread::scope(|scope| {
            let threads = (0..self.names.len().min(AT_ONCE)).map(|_| scope.spawn(work));
            let threads: Vec<_> = threads.collect();
            while threads.iter().any(|thread| !thread.is_finished()) {
                if watching.step(0, 0).is_break() {
                    wanted.store(false, Relaxed);
                }
                thread::sleep(TURN);
            }
        });
        let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
        results.sort_by_key(|(at, _)| *at);
        results.into_iter().map(|(_, made)| made).collect()
    }

    fn one(&self, at: usize, name: &str, watch: &dyn Watch) -> Outcome<Machine> {
        let wanted = Wanted {
            name: name.to_owned(),
            number: u32::try_from(at + 1).unwrap_or(u32::MAX),
            ephemeral: self.args.rm,
            settings: &self.args.set,
        };
        let machine = self.source.make(self.state, self.scaffold, &wanted, watch)?;
        self.source.unchanged().inspect_err(|_| drop(machine.remove()))?;
        restore::start(self.scaffold, &machine)?;
        Ok(machine)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::state::Record, *};

    #[test]
    fn forks_get_names_that_nobody_has() {
        #[derive(Debug, clap::Parser)]
        struct Line {
            #[command(flatten)]
            args: Args,
        }
        let dir = tempfile::tempdir().unwrap();
        let state = State::at(dir.path().join("state")).unwrap();
        state.create(Record::example("a1", "web-2")).unwrap();
        let named = |words: &[&str]| {
            let line: Line = clap::Parser::try_parse_from(words).unwrap();
            names(&state, &line.args, Some("web")).unwrap()
        };
        assert_eq!(named(&["fork", "--count", "3", "web"]), ["web-1", "web-3", "web-4"]);
        assert_eq!(named(&["fork", "--name", "x", "web"]), ["x-1"]);
        assert!(<Line as clap::Parser>::try_parse_from(["fork", "-n", "0", "web"]).is_err());
    }
}
