//! `nacelle snapshot create`, or `nacelle snapshot MACHINE DIR`: a machine that runs, as a
//! directory of which any number of machines can be made.

use std::{
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use api::{
    Spec,
    client::{Client, ClientError},
    spec::{Compression, CreateSnapshot, DriveCapture, JobState, SnapshotJob, SnapshotType},
};
use clap::{Args as ClapArgs, ValueEnum};
use serde_json::{Value, json};

use super::{
    super::{
        drives,
        failure::{Failure, Outcome},
        keeper::steward,
        output,
        state::{Machine, State},
    },
    watching::{EXIT_INTERRUPTED, Watching},
};
use crate::snapshot::{Chain, Search, Watch, fold};

/// How often a snapshot that is being written is asked how far it is.
const INTERVAL: Duration = Duration::from_millis(50);

/// How drives are taken along.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Drives {
    /// Copied
    Copy,
    /// Copied by sharing blocks, where the file system can
    Reflink,
    /// Not taken along: the files are used again, as they are then
    Share,
}

/// Write a machine that runs into a directory
#[derive(Debug, ClapArgs)]
#[command(override_usage = "nacelle snapshot create [OPTIONS] MACHINE DIR")]
pub struct Create {
    /// Let the machine stand still until all is written, not just for a moment
    #[arg(long)]
    pause: bool,
    /// Write only what changed since the snapshot that was taken or loaded last
    #[arg(long)]
    diff: bool,
    /// How drives are taken along [default: reflink where the file system can, else copy]
    #[arg(long, value_enum, value_name = "HOW")]
    drives: Option<Drives>,
    /// Put pages into this store, each content once
    #[arg(long, value_name = "STORE")]
    store: Option<PathBuf>,
    /// Keep pages in the store compressed
    #[arg(long, requires = "store")]
    compress: bool,
    /// Write a hash of each piece of memory, for 'nacelle snapshot verify'
    #[arg(long)]
    hash: bool,
    /// Take the place of a snapshot that is there
    #[arg(long)]
    replace: bool,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
    /// Name, id or start of an id
    #[arg(value_name = "MACHINE")]
    machine: Option<String>,
    /// The directory, which does not exist yet
    #[arg(value_name = "DIR")]
    directory: Option<PathBuf>,
}

/// Writes it and prints its path.
pub fn run(args: &Create) -> Outcome<u8> {
    let (Some(word), Some(directory)) = (&args.machine, &args.directory) else {
        return Err(Failure::new("Name a machine and a directory: nacelle snapshot create MACHINE DIR"));
    };
    let mut machine = State::open()?.find(word)?;
    machine.must_run("be written into a snapshot")?;
    let absolute = |path: &PathBuf| {
        std::path::absolute(path).map_err(|e| Failure::because(format!("{} is no path", path.display()), &e))
    };
    let mut client = Client::unix(machine.api());
    let snapshot_path = absolute(directory)?;
    let request = CreateSnapshot {
        snapshot_type: if args.diff { SnapshotType::Diff } else { SnapshotType::Full },
        drives: match args.drives {
            Some(Drives::Copy) => DriveCapture::Copy,
            Some(Drives::Reflink) => DriveCapture::Reflink,
            Some(Drives::Share) => DriveCapture::Share,
            None => capture(&mut client, &snapshot_path)?,
        },
        store: args.store.as_ref().map(absolute).transpose()?,
        compression: if args.compress { Compression::Lz4 } else { Compression::None },
        hash: args.hash,
        live: !args.pause,
        replace: args.replace,
        snapshot_path,
        ..CreateSnapshot::default()
    };
    let watching = Watching::new("Writing", args.quiet)?;
    let paused = args.pause && stand_still(&mut client)?;
    let written = take(&machine, request, &watching);
    if paused {
        client.patch::<Value>("/vm", Some(&json!({ "state": "Resumed" })))?;
    }
    drop(watching);
    written?;
    if args.diff {
        based(directory)?;
    }
    output::print(&format!("{}\n", directory.display()))?;
    Ok(0)
}

/// Checks that the snapshot which a diff lies on is there: one that a machine went on from is not
/// kept, be it suspended or forked.
fn based(directory: &Path) -> Outcome<()> {
    let Err(error) = Chain::open(directory, &Search::default()) else { return Ok(()) };
    // As a diff of nothing it is of no use.
    let _ = fold::remove(directory, true);
    Err(Failure::because("The machine's last snapshot is gone; take one without --diff first", &error))
}

/// Stops the vCPUs; false when they stood still already.
fn stand_still(client: &mut Client) -> Outcome<bool> {
    let info: Value = client.get("/")?;
    if info.get("state").and_then(Value::as_str) == Some("Paused") {
        return Ok(false);
    }
    client.patch::<Value>("/vm", Some(&json!({ "state": "Paused" })))?;
    Ok(true)
}

/// How drives are taken along unless somebody says: so that the snapshot is of one moment, and
/// good for any number of machines.
pub fn capture(client: &mut Client, target: &Path) -> Outcome<DriveCapture> {
    let spec: Spec = client.get("/vm/config")?;
    let mut written = spec.drives.iter().filter(|drive| !drive.is_read_only);
    let all = written.all(|drive| drives::can_share(&drive.path_on_host, target));
    Ok(if all { DriveCapture::Reflink } else { DriveCapture::Copy })
}

/// Has the monitor write a snapshot, with what is known of the machine here in its note, and
/// waits until it is whole. When `watch` ends it, nothing is left.
pub fn take(machine: &Machine, request: CreateSnapshot, watch: &dyn Watch) -> Outcome<()> {
    let mut client = Client::unix(machine.api());
    let request = CreateSnapshot { background: true, note: Some(steward::note(machine)), ..request };
    let job: SnapshotJob = client.put("/snapshot/create", Some(&request))?;
    let path = format!("/snapshot/jobs/{}", job.id);
    let job = follow(&mut client, job, &path, watch)?;
    match job.state {
        JobState::Done => Ok(()),
        JobState::Cancelled => {
            Err(Failure::new("Interrupted; nothing was written").with_code(EXIT_INTERRUPTED))
        }
        _ => {
            let name = &machine.record.name;
            let causes = job.error.into_iter().collect();
            Err(Failure { causes, ..Failure::new(format!("The snapshot of machine {name} was not written")) })
        }
    }
}

fn follow(
    client: &mut Client,
    mut job: SnapshotJob,
    path: &str,
    watch: &dyn Watch,
) -> Result<SnapshotJob, ClientError> {
    let mut cancelled = false;
    while job.state == JobState::Running {
        if !cancelled && watch.step(job.done_bytes, job.total_bytes).is_break() {
            cancelled = true;
            // It may be whole by now; then that is what became of it.
            let _: Result<Value, _> = client.delete(path);
        }
        thread::sleep(INTERVAL);
        job = client.get(path)?;
    }
    Ok(job)
}
