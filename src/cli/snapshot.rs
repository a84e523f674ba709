//! `nacelle snapshot`: directories that hold machines, written, listed, checked, compared and
//! folded.
//!
//! `nacelle snapshot MACHINE DIR` is short for `nacelle snapshot create MACHINE DIR`; a machine
//! that is called like one of the other verbs needs the long form. All but `create` works on
//! directories and asks no machine. What takes long shows how far it is on
//! standard error and can be interrupted; an interrupted command leaves nothing behind.

use std::path::{Path, PathBuf};

use clap::{Args as ClapArgs, Subcommand};
use serde::Serialize;

use super::{
    failure::{Failure, Outcome},
    output::{self, Format, Table},
    when,
};
use crate::snapshot::{
    Chain, Destination, Manifest, Manner, Search, Snapshot, SnapshotError, Store, fold, hint_from, list,
};

pub mod create;
pub mod watching;

use watching::{EXIT_INTERRUPTED, Watching};

/// Write, list, check, compare and fold snapshots
#[derive(Debug, ClapArgs)]
#[command(args_conflicts_with_subcommands = true, arg_required_else_help = true)]
#[command(override_usage = "nacelle snapshot [OPTIONS] MACHINE DIR\n       nacelle snapshot COMMAND")]
pub struct Args {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    create: create::Create,
}

#[derive(Debug, Subcommand)]
enum Action {
    Create(create::Create),
    /// List the snapshots of a directory
    Ls(Ls),
    /// Print everything known of snapshots, as a JSON array
    Inspect(Inspect),
    /// Check every byte of snapshots and of those they lie on
    Verify(Verify),
    /// Say how many pages and which parts of the state differ
    Diff(Diff),
    /// Fold a diff and all it lies on into a full snapshot
    Merge(Merge),
    /// Put a diff on another parent that has the same pages
    Rebase(Rebase),
    /// Remove snapshots
    Rm(Rm),
    /// Remove the chunks of a store that no snapshot needs
    Gc(Gc),
}

#[derive(Debug, ClapArgs)]
struct Ls {
    /// Print paths only
    #[arg(short, long)]
    quiet: bool,
    /// How to print them
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    format: Format,
    /// Print ids whole
    #[arg(long)]
    no_trunc: bool,
    /// The directory they lie in
    #[arg(default_value = ".", value_name = "DIR")]
    directory: PathBuf,
}

/// Where to look for what snapshots need.
#[derive(Debug, ClapArgs)]
struct Needs {
    /// Look for parents here as well; may be repeated
    #[arg(long, value_name = "DIR")]
    search: Vec<PathBuf>,
    /// The store that pages are in, if it is not where it was
    #[arg(long, value_name = "STORE")]
    store: Option<PathBuf>,
}

#[derive(Debug, ClapArgs)]
struct Inspect {
    #[command(flatten)]
    needs: Needs,
    /// Snapshots
    #[arg(required = true, value_name = "SNAPSHOT")]
    snapshots: Vec<PathBuf>,
}

#[derive(Debug, ClapArgs)]
struct Verify {
    /// Check manifest, index and state, but not every page
    #[arg(long)]
    quick: bool,
    /// Say nothing but what is wrong
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    needs: Needs,
    /// Snapshots
    #[arg(required = true, value_name = "SNAPSHOT")]
    snapshots: Vec<String>,
}

#[derive(Debug, ClapArgs)]
struct Diff {
    /// How to print it
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    format: Format,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    needs: Needs,
    /// One snapshot
    one: PathBuf,
    /// The other
    other: PathBuf,
}

#[derive(Debug, ClapArgs)]
struct Merge {
    /// Replace a snapshot that is there
    #[arg(long)]
    replace: bool,
    /// Put the pages into this store, which is made if there is none
    #[arg(long, value_name = "STORE")]
    into_store: Option<PathBuf>,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    needs: Needs,
    /// The diff
    snapshot: PathBuf,
    /// The directory that will be the full snapshot
    target: PathBuf,
}

#[derive(Debug, ClapArgs)]
struct Rebase {
    /// The new parent
    #[arg(long, value_name = "SNAPSHOT")]
    onto: PathBuf,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    needs: Needs,
    /// The diff
    snapshot: PathBuf,
}

#[derive(Debug, ClapArgs)]
struct Rm {
    /// Even if other snapshots lie on them
    #[arg(short, long)]
    force: bool,
    /// Snapshots
    #[arg(required = true, value_name = "SNAPSHOT")]
    snapshots: Vec<String>,
}

#[derive(Debug, ClapArgs)]
struct Gc {
    /// Count only snapshots that lie in these directories; others have lost their chunks
    #[arg(long, value_name = "DIR")]
    only: Vec<PathBuf>,
    /// The store
    store: PathBuf,
}

/// A snapshot of a list as JSON; keys stay what they are.
#[derive(Debug, Serialize)]
struct Row<'a> {
    path: &'a Path,
    id: Option<String>,
    parent: Option<String>,
    created: Option<String>,
    nacelle: Option<&'a str>,
    memory_bytes: Option<u64>,
    stored_bytes: u64,
    error: Option<String>,
}

/// A snapshot as JSON: what was found, and its manifest.
#[derive(Debug, Serialize)]
struct Inspection {
    path: PathBuf,
    present_bytes: u64,
    extents: usize,
    stored_bytes: u64,
    /// Paths of what it lies on, the nearest first.
    chain: Vec<PathBuf>,
    /// Why the chain cannot be followed.
    chain_error: Option<String>,
    manifest: Manifest,
}

/// How two snapshots differ as JSON.
#[derive(Debug, Serialize)]
struct Differing {
    pages: u64,
    bytes: u64,
    runs: Vec<(u64, u64)>,
    sections: Vec<String>,
}

/// Does what was asked.
pub fn run(args: &Args) -> Outcome<u8> {
    let Some(action) = &args.action else { return create::run(&args.create) };
    match action {
        Action::Create(args) => create::run(args),
        Action::Ls(args) => ls(args),
        Action::Inspect(args) => print_inspections(args),
        Action::Verify(args) => verify(args),
        Action::Diff(args) => diff(args),
        Action::Merge(args) => merge(args),
        Action::Rebase(args) => rebase(args),
        Action::Rm(args) => Ok(output::each(&args.snapshots, |word| {
            fold::remove(Path::new(word), args.force)?;
            output::print(&format!("{word}\n"))
        })),
        Action::Gc(args) => gc(args),
    }
}

impl Needs {
    fn search(&self) -> Search {
        Search { parents: self.search.clone(), stores: self.store.clone().into_iter().collect() }
    }
}

fn ls(args: &Ls) -> Outcome<u8> {
    let found = list(&args.directory)?;
    if args.quiet {
        output::print(&found.iter().map(|(path, _)| format!("{}\n", path.display())).collect::<String>())?;
    } else if args.format == Format::Json {
        output::print_json(&found.iter().map(|(path, read)| row(path, read)).collect::<Vec<_>>())?;
    } else {
        let mut table = Table::new(&["SNAPSHOT", "ID", "PARENT", "TAKEN", "MEMORY", "STORED"]);
        for (path, read) in &found {
            table.add(cells(path, read, args.no_trunc));
        }
        output::print(&table.text())?;
    }
    Ok(0)
}

fn row<'a>(path: &'a Path, read: &'a Result<Manifest, SnapshotError>) -> Row<'a> {
    let known = read.as_ref().ok();
    Row {
        path,
        id: known.map(|m| m.id.to_string()),
        parent: known.and_then(|m| Some(m.parent.as_ref()?.id.to_string())),
        created: known.map(|m| when::rfc3339(m.created)),
        nacelle: known.map(|m| m.nacelle.as_str()),
        memory_bytes: known.map(|m| m.memory.size),
        stored_bytes: stored(path),
        error: read.as_ref().err().map(ToString::to_string),
    }
}

fn cells(path: &Path, read: &Result<Manifest, SnapshotError>, whole: bool) -> Vec<String> {
    let name = path.display().to_string();
    let short = |id: String| if whole { id } else { id.chars().take(12).collect() };
    match read {
        Ok(m) => vec![
            name,
            short(m.id.to_string()),
            m.parent.as_ref().map(|p| short(p.id.to_string())).unwrap_or_default(),
            when::ago(m.created / 1000),
            output::bytes(m.memory.size),
            output::bytes(stored(path)),
        ],
        Err(e) => vec![name, "unreadable".to_owned(), String::new(), e.to_string()],
    }
}

/// Bytes that the files of a directory take on the disk; holes take none.
fn stored(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    entries.filter_map(|e| Some(e.metadata().ok()?.blocks().saturating_mul(512))).sum()
}

fn print_inspections(args: &Inspect) -> Outcome<u8> {
    let search = args.needs.search();
    let mut inspections = Vec::new();
    for path in &args.snapshots {
        let snapshot = Snapshot::open(path, &search)?;
        let chain = Chain::open(path, &search);
        let below = |c: &Chain| c.layers().iter().skip(1).map(|l| l.path().to_owned()).collect();
        inspections.push(Inspection {
            path: path.clone(),
            present_bytes: snapshot.extents().bytes(),
            extents: snapshot.extents().runs().len(),
            stored_bytes: stored(path),
            chain: chain.as_ref().map(below).unwrap_or_default(),
            chain_error: chain.err().map(|e| e.to_string()),
            manifest: snapshot.manifest().clone(),
        });
    }
    output::print_json(&inspections)?;
    Ok(0)
}

fn verify(args: &Verify) -> Outcome<u8> {
    let search = args.needs.search();
    let mut interrupted = false;
    let code = output::each(&args.snapshots, |word| {
        if interrupted {
            return Ok(());
        }
        let chain = Chain::open(Path::new(word), &search)?;
        for layer in chain.layers() {
            let watching = Watching::new("Verifying", args.quiet)?;
            let verified = layer.verify(!args.quick, &watching);
            interrupted = watching.interrupted();
            drop(watching);
            let verified = verified?;
            let how = match (args.quick, layer.manifest().memory.hashed) {
                (true, _) => "pages not read".to_owned(),
                (false, true) => {
                    format!("{} chunks, {}", verified.chunks, output::bytes(verified.bytes))
                }
                (false, false) => "written without hashes, pages cannot be checked".to_owned(),
            };
            if !args.quiet {
                let path = output::clean(&layer.path().display().to_string());
                output::print(&format!("{path}: good ({} sections of state; {how})\n", verified.sections))?;
            }
        }
        Ok(())
    });
    Ok(if interrupted { EXIT_INTERRUPTED } else { code })
}

fn diff(args: &Diff) -> Outcome<u8> {
    let search = args.needs.search();
    let (one, other) = (Chain::open(&args.one, &search)?, Chain::open(&args.other, &search)?);
    let found = watched("Comparing", args.quiet, |watching| fold::diff(&one, &other, watching))?;
    let bytes = found.pages.bytes();
    let pages = bytes / crate::snapshot::limits::PAGE;
    let sections: Vec<String> = found.sections.iter().map(|s| output::clean(s)).collect();
    if args.format == Format::Json {
        let runs = found.pages.runs().iter().map(|r| (r.start, r.end)).collect();
        output::print_json(&Differing { pages, bytes, runs, sections })?;
    } else {
        let mut table = Table::new(&["PAGES", "BYTES", "RUNS", "STATE"]);
        let state = if sections.is_empty() { "same".to_owned() } else { sections.join(",") };
        table.add([pages.to_string(), output::bytes(bytes), found.pages.runs().len().to_string(), state]);
        output::print(&table.text())?;
    }
    Ok(0)
}

fn merge(args: &Merge) -> Outcome<u8> {
    let chain = Chain::open(&args.snapshot, &args.needs.search())?;
    let destination = Destination {
        path: args.target.clone(),
        replace: args.replace,
        running_from: chain.layers().iter().skip(1).map(|l| l.path().to_owned()).collect(),
    };
    let child = args.replace.then(|| fold::dependent(&args.target)).flatten();
    if let Some(child) = child {
        let (child, target) = (child.display(), args.target.display());
        return Err(Failure::new(format!(
            "{child} lies on {target}, which can therefore not be replaced; choose another directory"
        )));
    }
    let store = args.into_store.as_deref().map(Store::make).transpose()?;
    let store = store.as_ref().map(|store| (store, hint_from(&args.target, store.path())));
    let written = watched("Merging", args.quiet, |watch| {
        fold::merge(&chain, destination, Manner { store, watch, ..Manner::default() })
    })?;
    output::print(&format!("{}\n", written.id))?;
    Ok(0)
}

fn rebase(args: &Rebase) -> Outcome<u8> {
    let search = args.needs.search();
    let parent = Chain::open(&args.onto, &search)?;
    watched("Comparing", args.quiet, |watching| fold::rebase(&args.snapshot, &parent, &search, watching))?;
    output::print(&format!("{}\n", args.snapshot.display()))?;
    Ok(0)
}

fn gc(args: &Gc) -> Outcome<u8> {
    let store = Store::open(&args.store)?;
    let mut living = std::collections::BTreeSet::new();
    for directory in &args.only {
        for (path, read) in list(directory)? {
            // One that cannot be read may need its chunks all the same.
            let manifest = read.map_err(|e| {
                Failure::because(format!("{} may need the store; nothing was removed", path.display()), &e)
            })?;
            living.insert(manifest.id);
        }
    }
    let collected = store.collect((!args.only.is_empty()).then_some(&living))?;
    let (kept, removed, freed) = (collected.kept, collected.removed, output::bytes(collected.bytes));
    output::print(&format!("{removed} chunks removed ({freed}), {kept} kept\n"))?;
    Ok(0)
}

/// Does something that takes long, shown on standard error and ended by a signal.
fn watched<T>(
    doing: &'static str,
    quiet: bool,
    work: impl FnOnce(&Watching) -> Result<T, SnapshotError>,
) -> Outcome<T> {
    let watching = Watching::new(doing, quiet)?;
    match work(&watching) {
        Err(e @ SnapshotError::Cancelled) => Err(Failure::from_error(&e).with_code(EXIT_INTERRUPTED)),
        result => Ok(result?),
    }
}

#[cfg(test)]
mod tests;
