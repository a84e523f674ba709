//! Snapshots that are being written.
//!
//! ```text
//!   PUT /snapshot/create ─► capture (machine stands still) ─► thread: drives, pages, publish
//!                                │                                │ progress, cancel
//!                                └► job: 202, or an answer later ◄┘ event, lineage
//!
//!   live   memory that is served ─► image ─► capture ─► drives copied ─► goes on ─► pages of the image
//!          is brought, on a thread              └─ stands still ─┘
//! ```
//!
//! A snapshot is captured on this thread and written on another, so that a machine whose memory
//! takes a minute to write is still asked how it is, how far it is, or to stop. One is written at a
//! time. A machine that is to stand still while it is written cannot be resumed before. With `live` it
//! stands still until its state and the last of its memory are held ([`crate::vm::ahead`]) and its
//! drives are copied.
//!
//! Whatever goes wrong, the machine is as it was: what was to be in the snapshot is captured again
//! by the next one.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use api::{
    Fault, FaultKind, Reply, Request, Spec,
    http::{self, Response},
    routes,
    spec::{Compression, CreateSnapshot, DriveCapture, JobState, SnapshotJob, SnapshotType},
};
use devices::state::Section;
use serde_json::{Value, json};

use super::{Controller, Event, http::rendered};
use crate::{
    phase::Phase,
    server::{Answer, Ticket},
    snapshot::{
        self, Chain, Destination, Manner, PairWriter, Parent, Search, SnapshotError, Store, Subject, Watch,
        Writer,
        disk::HostDisk,
        extents::Run,
        hint_from,
        manifest::{self, Json},
    },
    vm::{
        ahead::Ahead,
        capture::{Capture, From, Part},
        image::{self, Image},
        pages::Piece,
        torn,
    },
};

/// Jobs that have ended and are still told of.
const KEPT: usize = 16;

/// How long a job that was told to stop is waited for when the machine ends.
const FAREWELL: Duration = Duration::from_secs(2);

/// The snapshot that a machine's next diff is a diff of.
#[derive(Debug, Clone)]
pub(super) struct Lineage {
    /// Where it lies.
    pub path: PathBuf,
    /// Its identity.
    pub id: snapshot::Id,
    /// Digest of its memory index.
    pub index: snapshot::Digest,
}

impl Lineage {
    /// The snapshot with all it lies on, if it is still there and the same.
    fn chain(&self) -> Option<Chain> {
        let chain = Chain::open(&self.path, &Search::default()).ok()?;
        let manifest = chain.top().manifest();
        (manifest.id == self.id && manifest.memory.index.digest == self.index).then_some(chain)
    }
}

/// How far a writer is, and whether it is to go on.
#[derive(Debug, Default)]
pub(super) struct Progress {
    done: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
}

impl Watch for Progress {
    fn step(&self, done: u64, total: u64) -> ControlFlow<()> {
        self.done.store(done, Relaxed);
        self.total.fetch_max(total, Relaxed);
        if self.cancelled.load(Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

/// A snapshot that is being written.
struct Running {
    job: SnapshotJob,
    progress: Arc<Progress>,
    thread: Option<thread::JoinHandle<()>>,
    /// Clients that are answered when it is done.
    waiting: Option<Ticket>,
    /// Since when the machine stands still for it, while it does.
    held: Option<Instant>,
    /// What it took from the record of what was written.
    dirty: Vec<Run>,
}

impl Running {
    fn busy(&self) -> Fault {
        let id = self.job.id;
        let text = format!("A snapshot is being written (job {id}); wait until it is done, or cancel it");
        Fault::new(FaultKind::Conflict, text)
    }
}

/// What became of one.
pub(super) type Outcome = Result<Option<Lineage>, SnapshotError>;

/// All of them.
#[derive(Default)]
pub(super) struct Jobs {
    last: u64,
    running: Option<Running>,
    ended: VecDeque<SnapshotJob>,
}

impl Jobs {
    fn shown(&self) -> impl Iterator<Item = SnapshotJob> + '_ {
        let running = self.running.iter().map(|running| {
            let (done, total) = (&running.progress.done, &running.progress.total);
            let (done_bytes, total_bytes) = (done.load(Relaxed), total.load(Relaxed));
            SnapshotJob { done_bytes, total_bytes, ..running.job.clone() }
        });
        self.ended.iter().cloned().chain(running)
    }

    fn find(&self, id: u64) -> Result<SnapshotJob, Fault> {
        let missing = || Fault::new(FaultKind::NotFound, format!("There is no snapshot job {id}"));
        self.shown().find(|job| job.id == id).ok_or_else(missing)
    }

    /// Refuses a second one.
    fn let_begin(&self) -> Result<(), Fault> {
        self.running.as_ref().map_or(Ok(()), |running| Err(running.busy()))
    }

    /// Refuses what would change memory that is being written.
    pub(super) fn let_run(&self) -> Result<(), Fault> {
        let held = self.running.as_ref().filter(|running| running.held.is_some());
        held.map_or(Ok(()), |running| Err(running.busy()))
    }
}

/// All that is written, apart from the machine.
struct Work {
    create: CreateSnapshot,
    subject: Subject,
    sections: Vec<Section>,
    parts: Vec<Part>,
    /// What pages are compared with, where nobody knows which have changed.
    base: Option<Lineage>,
    drives: Vec<Captured>,
    running_from: Vec<PathBuf>,
    id: snapshot::Id,
    /// Memory as it was, where the machine goes on.
    image: Option<Image>,
    /// Called when only the image is needed any more.
    release: Release,
}

type Release = Option<Box<dyn FnOnce() + Send>>;

/// A drive that belongs to the snapshot, open.
struct Captured {
    id: String,
    source: String,
    capture: manifest::Capture,
    file: Option<File>,
}

impl Controller {
    /// `PUT /snapshot/create`: answered when it is done, unless it is to go on in the background.
    pub(super) fn create_for(&mut self, request: &http::Request, ticket: Ticket) -> Answer {
        let background = match routes::parse("PUT", &request.path, &request.body) {
            Ok(routes::Parsed { request: Request::CreateSnapshot(create), .. }) => create.background,
            _ => false,
        };
        let response = self.ask(request);
        match &mut self.jobs.running {
            Some(running) if response.status == 202 && !background => {
                running.waiting = Some(ticket);
                Answer::Later
            }
            _ => Answer::Now(response),
        }
    }

    /// Begins a snapshot.
    pub(super) fn create_snapshot(&mut self, create: CreateSnapshot) -> Result<Reply, Fault> {
        create.check()?;
        self.jobs.let_begin()?;
        let live = self.live.as_ref();
        let live = live.ok_or_else(|| Fault::new(FaultKind::Conflict, crate::phase::TOO_EARLY))?;
        let served = live.vm.served_memory().filter(|_| create.live);
        self.jobs.last += 1;
        let job = SnapshotJob {
            id: self.jobs.last,
            snapshot_path: create.snapshot_path.clone(),
            snapshot_type: create.snapshot_type,
            state: JobState::Running,
            done_bytes: 0,
            total_bytes: 0,
            pause_us: 0,
            error: None,
        };
        let progress = Arc::new(Progress::default());
        let running = Running { job, progress, thread: None, waiting: None, held: None, dirty: Vec::new() };
        let id = running.job.id;
        self.jobs.running = Some(running);
        let begun = match served {
            Some(memory) => self.bring_memory(create, memory),
            None => self.write_snapshot(create),
        };
        let begun = begun.and_then(|()| self.jobs.find(id));
        begun.map(Reply::Begun).inspect_err(|_| self.jobs.running = None)
    }

    /// Has memory brought that is served by a touch, while the machine goes on.
    fn bring_memory(&mut self, create: CreateSnapshot, memory: Vec<Piece>) -> Result<(), Fault> {
        let Some(running) = &mut self.jobs.running else { return Ok(()) };
        let (watch, handle) = (Arc::clone(&running.progress), self.mailbox.handle.clone());
        let spawned = thread::Builder::new().name("snapshot".to_owned()).spawn(move || {
            let _ = handle.put(match touch(&memory, &watch) {
                ControlFlow::Continue(()) => Event::MemoryBrought(Box::new(create)),
                ControlFlow::Break(()) => Event::SnapshotEnded(Box::new(Err(SnapshotError::Cancelled))),
            });
        });
        running.thread = Some(spawned.map_err(|e| Fault::from_error(FaultKind::Internal, &e))?);
        Ok(())
    }

    /// All of memory is there: the snapshot that waited for it is taken.
    pub(super) fn memory_brought(&mut self, create: CreateSnapshot) {
        if let Err(fault) = self.write_snapshot(create) {
            self.snapshot_ended(Err(SnapshotError::Request(fault.to_string())));
        }
    }

    /// Captures the machine and begins to write it. When that fails the machine is as it was.
    fn write_snapshot(&mut self, create: CreateSnapshot) -> Result<(), Fault> {
        let drives = captured(&self.spec, create.drives)?;
        // Only drives that are copied need the machine to stand still once there is an image.
        let stays = !create.live || drives.iter().any(|drive| drive.file.is_some());
        let ahead = self.image_ahead(&create);
        let begins = Instant::now();
        if let (Phase::Running, Some(live)) = (self.phase, &mut self.live)
            && let Err(error) = live.vm.pause()
        {
            live.vm.unwatch();
            return Err(Fault::from_error(error.kind(), &error));
        }
        if let Some(running) = &mut self.jobs.running {
            running.held = Some(begins);
        }
        let work = self.captured_work(create, drives, ahead, stays);
        if work.is_err() || !stays {
            self.release_machine();
        }
        let begun = self.begin_writing(work?);
        if begun.is_err() {
            self.release_machine();
        }
        begun
    }

    /// The image of a live snapshot, if it can be taken before the machine stands still.
    fn image_ahead(&mut self, create: &CreateSnapshot) -> Option<Ahead> {
        let live = self.live.as_mut().filter(|_| create.live && self.phase == Phase::Running)?;
        // An image holds memory without the breakpoints of a debugger, which are in it now.
        if live.debugger.is_some() {
            return None;
        }
        live.vm
            .image_ahead()
            .inspect_err(|e| log::info!("Memory is held only while the machine stands still: {e}"))
            .ok()
            .flatten()
    }

    /// Captures the machine, which stands still.
    fn captured_work(
        &mut self,
        create: CreateSnapshot,
        drives: Vec<Captured>,
        mut ahead: Option<Ahead>,
        stays: bool,
    ) -> Result<Work, Fault> {
        let id = snapshot::Id::random().map_err(|e| internal(&e))?;
        let (Some(live), Some(running)) = (&mut self.live, &mut self.jobs.running) else {
            return Err(Fault::new(FaultKind::Conflict, crate::phase::TOO_EARLY));
        };
        let changed_only = create.snapshot_type == SnapshotType::Diff
            && (create.mem_file_path.is_some() || self.lineage.is_some());
        let (mmds, vm) = (self.mmds.as_ref(), &mut live.vm);
        let huge = vm.huge_pages;
        let mut capture = || {
            let capture = vm.capture(changed_only, mmds, ahead.as_mut())?;
            let image = match ahead.take() {
                Some(ahead) => Ok(Some(ahead.image)),
                None => create.live.then(|| Image::take(huge)).transpose(),
            };
            Ok((capture, image))
        };
        let capture = match live.debugger.as_ref() {
            Some(debugger) => debugger.without_breakpoints(capture),
            None => capture(),
        };
        let fault = |e: crate::vm::VmError| Fault::from_error(e.kind(), &e);
        let (capture, image) = capture.map_err(fault)?;
        let image = match image {
            Ok(image) => image,
            Err(error) => {
                live.vm.put_back(&capture.dirty);
                return Err(Fault {
                    kind: FaultKind::Internal,
                    message: "The machine's memory cannot be held as it is while the machine goes on; take \
                              the snapshot without live"
                        .to_owned(),
                    causes: vec![error.to_string()],
                });
            }
        };
        let lineage = self.lineage.as_ref();
        let parent = lineage.filter(|_| changed_only && create.mem_file_path.is_none());
        let base = parent.filter(|_| capture.guessed).cloned();
        let subject = subject(&self.spec, &create, &capture, parent);
        running.job.total_bytes = capture.bytes();
        running.progress.total.store(capture.bytes(), Relaxed);
        running.dirty = capture.dirty;
        let running_from = lineage.iter().map(|lineage| lineage.path.clone()).collect();
        let handle = self.mailbox.handle.clone();
        let release: Release = (create.live && stays)
            .then(|| Box::new(move || drop(handle.put(Event::DrivesCopied))) as Box<dyn FnOnce() + Send>);
        let (sections, parts) = (capture.sections, capture.parts);
        Ok(Work { create, subject, sections, parts, base, drives, running_from, id, image, release })
    }

    /// Begins to write what was captured.
    fn begin_writing(&mut self, work: Work) -> Result<(), Fault> {
        let (Some(live), Some(running)) = (&mut self.live, &mut self.jobs.running) else { return Ok(()) };
        let (watch, handle) = (Arc::clone(&running.progress), self.mailbox.handle.clone());
        let spawned = thread::Builder::new().name("snapshot".to_owned()).spawn(move || {
            let outcome = work.write(&watch);
            let _ = handle.put(Event::SnapshotEnded(Box::new(outcome)));
        });
        running.thread = Some(spawned.map_err(|e| {
            live.vm.put_back(&std::mem::take(&mut running.dirty));
            internal(&e)
        })?);
        Ok(())
    }

    /// The snapshot that is being written does not need the machine to stand still any more.
    pub(super) fn release_machine(&mut self) {
        let Some(running) = &mut self.jobs.running else { return };
        let Some(since) = running.held.take() else { return };
        // Somebody may have paused it meanwhile, for himself.
        if let (Phase::Running, Some(live)) = (self.phase, &mut self.live)
            && let Err(error) = live.vm.resume()
        {
            log::error!("The machine does not go on after its snapshot: {error}");
        }
        running.job.pause_us = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.live.iter_mut().for_each(|live| live.vm.unwatch());
    }

    /// A writer is done, or has given up.
    pub(super) fn snapshot_ended(&mut self, outcome: Outcome) {
        self.release_machine();
        let Some(Running { mut job, progress, thread, waiting, dirty, .. }) = self.jobs.running.take() else {
            return;
        };
        thread.map(thread::JoinHandle::join);
        (job.done_bytes, job.total_bytes) = (progress.done.load(Relaxed), progress.total.load(Relaxed));
        job.state = match &outcome {
            Ok(_) => JobState::Done,
            Err(SnapshotError::Cancelled) => JobState::Cancelled,
            Err(_) => JobState::Failed,
        };
        let answer = match outcome {
            Ok(lineage) => {
                let tracked = self.live.as_ref().is_some_and(|live| live.vm.tracks_dirty_pages);
                // What was written since the last directory is recorded nowhere any more if a pair
                // of files has just taken it.
                if lineage.is_some() || tracked {
                    self.lineage = lineage;
                }
                Ok(Reply::Done)
            }
            Err(error) => {
                if let Some(live) = &mut self.live {
                    live.vm.put_back(&dirty);
                }
                let fault = Fault::from_error(FaultKind::Internal, &error);
                job.error = Some(fault.to_string());
                Err(fault)
            }
        };
        let kind = match job.state {
            JobState::Done => "SnapshotCreated",
            _ => "SnapshotFailed",
        };
        let details = json!({ "job": job.id, "snapshot_path": &job.snapshot_path, "error": job.error });
        self.announce(kind, details);
        if let (Some(ticket), Some(server)) = (waiting, &mut self.server) {
            server.answer(ticket, &rendered(&answer));
        }
        if self.jobs.ended.len() == KEPT {
            self.jobs.ended.pop_front();
        }
        self.jobs.ended.push_back(job);
    }

    /// What is asked about jobs.
    pub(super) fn about_jobs(&mut self, request: &Request) -> Result<Reply, Fault> {
        let shown = |job: SnapshotJob| Reply::Json(serde_json::to_value(job).unwrap_or_default());
        match request {
            Request::SnapshotJob(id) => self.jobs.find(*id).map(shown),
            Request::CancelSnapshot(id) => {
                self.jobs.find(*id)?;
                if let Some(running) = self.jobs.running.as_ref().filter(|running| running.job.id == *id) {
                    running.progress.cancelled.store(true, Relaxed);
                }
                Ok(Reply::Done)
            }
            _ => {
                let jobs: Vec<SnapshotJob> = self.jobs.shown().collect();
                Ok(Reply::Json(serde_json::to_value(jobs).unwrap_or_default()))
            }
        }
    }

    /// The machine ends: a snapshot that is not whole by now will not be.
    pub(super) fn abandon_snapshot(&mut self) {
        let Some(mut running) = self.jobs.running.take() else { return };
        running.progress.cancelled.store(true, Relaxed);
        let limit = Instant::now() + FAREWELL;
        let Some(thread) = running.thread.take() else { return };
        while !thread.is_finished() && Instant::now() < limit {
            thread::sleep(Duration::from_millis(1));
        }
        if let (Some(ticket), Some(server)) = (running.waiting, &mut self.server) {
            let fault = Fault::new(FaultKind::Conflict, "The machine has ended");
            let response: Response = rendered(&Err(fault));
            server.answer(ticket, &response);
        }
    }
}

fn internal(error: &io::Error) -> Fault {
    Fault::from_error(FaultKind::Internal, error)
}

/// The drives of a machine as they are to belong to its snapshot, open where they are copied.
fn captured(spec: &Spec, how: DriveCapture) -> Result<Vec<Captured>, Fault> {
    let capture = match how {
        DriveCapture::Copy => manifest::Capture::Copy,
        DriveCapture::Reflink => manifest::Capture::Reflink,
        DriveCapture::Share => manifest::Capture::Share,
    };
    let one = |drive: &api::spec::Drive| {
        let id = drive.drive_id.clone();
        let source = drive.path_on_host.display().to_string();
        if how == DriveCapture::Share {
            return Ok(Captured { id, source, capture, file: None });
        }
        if drive.by_descriptor {
            let text = format!(
                "Drive {id:?} came as a descriptor and cannot be copied by its path; take the snapshot with \
                 drives: share"
            );
            return Err(Fault::new(FaultKind::Invalid, text));
        }
        let file = File::open(&drive.path_on_host).map_err(|e| Fault {
            kind: FaultKind::Invalid,
            message: format!("Drive {id:?} ({source}) cannot be opened to be copied"),
            causes: vec![e.to_string()],
        })?;
        Ok(Captured { id, source, capture, file: Some(file) })
    };
    spec.drives.iter().map(one).collect()
}

/// What a snapshot says of the machine.
fn subject(spec: &Spec, create: &CreateSnapshot, capture: &Capture, parent: Option<&Lineage>) -> Subject {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Subject {
        nacelle: env!("CARGO_PKG_VERSION").to_owned(),
        created: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
        machine: Json::of(spec),
        cpu: Json::of(&capture.needs),
        note: create.note.clone().map_or(Value::Null, Value::Object),
        regions: capture.regions.clone(),
        parent: parent.map(|lineage| Parent {
            id: lineage.id,
            index: lineage.index,
            hint: hint_from(&create.snapshot_path, &lineage.path),
        }),
    }
}

/// Touches each page of memory once, so that it is there.
fn touch(memory: &[Piece], watch: &Progress) -> ControlFlow<()> {
    let mut done = 0;
    let total = memory.iter().map(|piece| piece.len).sum();
    for piece in memory {
        for at in (piece.host..piece.host + piece.len as usize).step_by(4096) {
            // SAFETY: a piece is guest memory, mapped until the process ends; what is read is not
            // looked at, as others may write it meanwhile.
            unsafe { std::ptr::read_volatile(at as *const u8) };
            done += 4096;
            if done % (1 << 20) == 0 {
                watch.step(done, total)?;
            }
        }
    }
    watch.step(done, total)
}

/// A file that was cut short took pages along, and reads as if nothing had been there.
fn whole() -> Result<(), SnapshotError> {
    let lost = |why| SnapshotError::Request(format!("Not all of the machine is there any more: {why}"));
    torn::found().map_or(Ok(()), |why| Err(lost(why)))
}

impl Work {
    fn write(self, watch: &Progress) -> Outcome {
        match self.create.mem_file_path.clone() {
            Some(memory) => self.write_pair(&memory, watch).map(|()| None),
            None => self.write_directory(watch).map(Some),
        }
    }

    fn write_pair(mut self, memory: &Path, watch: &Progress) -> Result<(), SnapshotError> {
        let end = |r: &snapshot::Region| r.offset + r.size;
        let Subject { nacelle, created, machine, cpu, regions, .. } = self.subject;
        let size = regions.iter().map(end).max().unwrap_or(0);
        let mark = arch::layout::GENERATION_ID + 64;
        let about =
            snapshot::pair::About { id: self.id, nacelle, created, machine, cpu, size, regions, mark };
        let onto = self.create.snapshot_type == SnapshotType::Diff;
        let expected = self.parts.iter().map(|part| part.len).sum();
        let (state, disk) = (&self.create.snapshot_path, Arc::new(HostDisk));
        let mut writer = PairWriter::begin(state, memory, about, onto, disk, (watch, expected))?;
        if let Some(release) = self.release.take() {
            release();
        }
        let mut image = self.image.take();
        for part in &self.parts {
            match &part.from {
                From::Memory(at) => {
                    each(&mut image, *at, part.len, |from, bytes| writer.run(part.offset + from, bytes))?;
                }
                From::File(file) => writer.copy(file, part.offset, part.len)?,
            }
        }
        drop(image);
        whole()?;
        writer.finish(self.sections).map(|_| ())
    }

    fn write_directory(mut self, watch: &Progress) -> Result<Lineage, SnapshotError> {
        let path = self.create.snapshot_path;
        let store = self.create.store.as_deref().map(Store::make).transpose()?;
        let manner = Manner {
            hash: self.create.hash || store.is_some(),
            compress: self.create.compression == Compression::Lz4,
            store: store.as_ref().map(|store| (store, hint_from(&path, store.path()))),
            expected: self.parts.iter().map(|part| part.len).sum(),
            watch,
            ..Manner::default()
        };
        let (replace, running_from) = (self.create.replace, self.running_from);
        let destination = Destination { path: path.clone(), replace, running_from };
        let mut writer = Writer::begin(destination, self.subject, manner, Some(self.id))?;
        // Drives come first: what can be shared with their files is shared at once.
        for Captured { id, source, capture, file } in self.drives {
            match file {
                Some(file) => writer.drive(&id, &source, capture, &file)?,
                None => writer.share(manifest::Drive { id, source, capture, size: 0, file: None }),
            }
        }
        if let Some(release) = self.release.take() {
            release();
        }
        let mut image = self.image.take();
        // One that is gone cannot be compared with; the diff is whole all the same.
        let base = self.base.and_then(|base| base.chain());
        for part in &self.parts {
            match &part.from {
                From::Memory(at) => each(&mut image, *at, part.len, |from, bytes| match &base {
                    Some(base) => {
                        base.differing(part.offset + from, bytes, |at, pages| writer.run(at, pages))
                    }
                    None => writer.run(part.offset + from, bytes),
                })?,
                From::File(file) => writer.copy(file, part.offset, part.offset, part.len)?,
            }
        }
        drop(image);
        whole()?;
        self.sections.into_iter().for_each(|section| writer.section(section));
        let written = writer.finish()?;
        Ok(Lineage {
            path: std::fs::canonicalize(&path).unwrap_or(path),
            id: written.id,
            index: written.index,
        })
    }
}

/// Hands guest memory at an address to `take`, with how far in it is: that of the image, or that of
/// the machine, which stands still.
fn each(
    image: &mut Option<Image>,
    at: usize,
    len: u64,
    mut take: impl FnMut(u64, &[u8]) -> Result<(), SnapshotError>,
) -> Result<(), SnapshotError> {
    let len = usize::try_from(len).unwrap_or(0);
    let Some(image) = image else {
        // SAFETY: a capture names mapped guest memory only, which stays mapped until the process
        // ends; and neither vCPUs nor devices write to it as long as the machine is not resumed,
        // which waits for the writer.
        return take(0, unsafe { std::slice::from_raw_parts(at as *const u8, len) });
    };
    let mut done = 0;
    while done < len {
        let count = (len - done).min(image::PIECE);
        // SAFETY: as above; the image was taken when the machine was captured.
        let bytes = unsafe { image.read(at + done, count) };
        let bytes = bytes.map_err(|source| SnapshotError::Io {
            what: "The image of guest memory is lost; the host may lack memory for what the machine \
                   writes meanwhile"
                .to_owned(),
            source,
        })?;
        take(done as u64, bytes)?;
        done += count;
    }
    Ok(())
}
