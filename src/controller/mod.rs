//! The thread that owns the machine.
//!
//! Everything that happens to a machine happens here, one thing at a time: requests from the
//! API's socket or another thread ([`Handle`]), endings reported by vCPUs and power registers,
//! signals. Nobody else holds the machine, so nothing needs a lock and no two changes cross.
//!
//! ```text
//!   API socket: server ──► http.rs ─┐
//!   Handle::call ──┐                ├─► phase.rs: allowed? ─► draft.rs, load.rs (before the start)
//!   vCPU: ended ───┼► queue + bell ─┘                       └► live.rs, plug.rs, snapshot.rs
//!   power button ──┘        ▲
//!   SIGTERM ─── signalfd ───┘                    events.rs: what happened, for readers
//! ```
//!
//! The API is served on this thread too: a request then costs no switch to another one, and
//! while the machine is busy with a change nobody could be answered anyway.
//!
//! Before the start there is only a specification, which requests change; the machine is built
//! when it is told to start, all at once, so a refused start leaves nothing behind.

mod draft;
mod events;
mod http;
mod live;
mod load;
mod metadata;
mod metrics;
mod plug;
mod snapshot;
mod sockets;

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use api::{
    Control, Fault, FaultKind, MachineInfo, Reply, Request, Spec,
    spec::{self, Logger},
};
use devices::mmds::Mmds;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::{
    debug::Debugger,
    logger,
    metrics::{Metrics, Milestone, Milestones, Startup},
    pager::working_set::Place,
    phase::{Phase, Verb},
    server::Server,
    signals::Signals,
    vcpu::Report,
    vm::{
        Ending, Vm,
        build::{self, Origin},
        faults::{Faults, Incident},
        handed::{Gift, Handed},
        saved::Platform,
        torn,
    },
};
use events::Events;
use live::Live;
use sockets::Sockets;

/// How long a caller waits for its answer before it is told that the machine is stuck.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);
/// How long a machine runs before the program text that only starting needed is given back. One
/// that lives shorter has nothing of it, and would pay for touching some of it again.
const SETTLED: Duration = Duration::from_secs(1);
/// How long clients are waited for at the end, when they have still to read an answer.
const FAREWELL: Duration = Duration::from_millis(500);

enum Event {
    Call(Box<Request>, mpsc::SyncSender<Result<Reply, Fault>>),
    Ended(Ending),
    Incident(Incident, u64),
    /// The guest has given back what was in a PCI slot.
    Ejected(u8),
    /// A vCPU met what a debugger has set.
    Debugged,
    /// Memory is there of which a snapshot is to be taken.
    MemoryBrought(Box<spec::CreateSnapshot>),
    /// A snapshot needs only memory any more.
    DrivesCopied,
    /// A snapshot was written, or was not.
    SnapshotEnded(Box<snapshot::Outcome>),
}

/// Where events for a controller are put. Cheap to clone, usable from any thread.
#[derive(Clone)]
pub struct Handle {
    events: mpsc::Sender<Event>,
    bell: Arc<EventFd>,
}

impl Handle {
    /// Reports that the guest ended or cannot go on.
    pub fn ended(&self, ending: Ending) {
        let _ = self.put(Event::Ended(ending));
    }

    /// Reports an incident, and how many like it were not reported.
    fn happened(&self, incident: Incident, untold: u64) {
        let _ = self.put(Event::Incident(incident, untold));
    }

    /// Reports that the guest has emptied a PCI slot.
    pub fn ejected(&self, slot: u8) {
        let _ = self.put(Event::Ejected(slot));
    }

    fn report(&self, report: Report) {
        match report {
            Report::Ended(ending) => self.ended(ending),
            Report::Debugged => drop(self.put(Event::Debugged)),
        }
    }

    fn put(&self, event: Event) -> Result<(), Fault> {
        let gone = || Fault::new(FaultKind::Conflict, "The machine has ended");
        self.events.send(event).map_err(|_| gone())?;
        self.bell.write(1).map_err(|_| gone())
    }
}

impl Control for Handle {
    fn call(&self, request: Request) -> Result<Reply, Fault> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.put(Event::Call(Box::new(request), reply))?;
        answer.recv_timeout(ANSWER_DEADLINE).unwrap_or_else(|_| {
            Err(Fault::new(FaultKind::Internal, "The machine did not answer in time; it may have ended"))
        })
    }
}

/// Where events come from: made before the machine, because the machine's own parts report
/// through it.
struct Mailbox {
    handle: Handle,
    events: mpsc::Receiver<Event>,
    bell: Arc<EventFd>,
}

impl Mailbox {
    fn new() -> io::Result<Mailbox> {
        let bell = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let (sender, events) = mpsc::channel();
        let handle = Handle { events: sender, bell: Arc::clone(&bell) };
        Ok(Mailbox { handle, events, bell })
    }
}

/// What a controller is told when it is made: what no request can change.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// Name of the machine (`--id`).
    pub id: String,
    /// Attach devices through PCI (`--enable-pci`), whatever the specification says.
    pub pci: bool,
    /// Put the boot timer's register in its place (`--boot-timer`).
    pub boot_timer: bool,
    /// Show a keyboard controller, for `SendCtrlAltDel`.
    pub keyboard: bool,
    /// Where the log goes and what it holds, as the command line says it.
    pub log: Logger,
    /// Bytes that the metadata service holds at most (`--mmds-size-limit`).
    pub mmds_size_limit: Option<usize>,
    /// What the caller measured of the start of this process.
    pub startup: Startup,
}

/// The owner of one machine.
pub struct Controller {
    settings: Settings,
    milestones: Arc<Milestones>,
    phase: Phase,
    spec: Spec,
    live: Option<Live>,
    /// Descriptors that came for devices of the machine that is to start.
    handed: Handed,
    /// Descriptors of the request that is being carried out.
    arrived: Vec<OwnedFd>,
    mmds: Option<Arc<Mmds>>,
    server: Option<Server>,
    events: Events,
    metrics: Metrics,
    /// What happened while the server was busy with the request that made it happen.
    unannounced: Vec<(&'static str, serde_json::Value)>,
    /// The server is calling.
    serving: bool,
    /// Clients of `POST /vm/wait` and `PUT /vm/shutdown`.
    waiting: Vec<crate::server::Ticket>,
    /// Devices that the guest was asked for.
    removals: plug::Removals,
    /// Snapshots that are being written.
    jobs: snapshot::Jobs,
    /// What the next diff is a diff of.
    lineage: Option<snapshot::Lineage>,
    /// Where what the guest touches first is to be recorded, once it runs.
    unrecorded: Option<Place>,
    /// When a machine that was asked to shut down is ended.
    deadline: Option<Instant>,
    /// When a machine that was started has settled.
    settled: Option<Instant>,
    mailbox: Mailbox,
    signals: Signals,
}

impl Controller {
    /// An owner without a machine yet; `spec` is what is known of it. With a `server`,
    /// requests come from there.
    pub fn new(
        settings: Settings,
        milestones: Arc<Milestones>,
        spec: Spec,
        server: Option<Server>,
        signals: Signals,
    ) -> io::Result<Controller> {
        let mut controller = Controller {
            metrics: Metrics::new(settings.startup),
            settings,
            milestones,
            phase: Phase::NotStarted,
            spec,
            live: None,
            handed: Handed::default(),
            arrived: Vec::new(),
            mmds: None,
            server,
            events: Events::default(),
            unannounced: Vec::new(),
            serving: false,
            waiting: Vec::new(),
            removals: plug::Removals::default(),
            jobs: snapshot::Jobs::default(),
            lineage: None,
            unrecorded: None,
            deadline: None,
            settled: None,
            mailbox: Mailbox::new()?,
            signals,
        };
        controller.keep_transport();
        torn::ring(controller.mailbox.bell.as_raw_fd());
        Ok(controller)
    }

    /// Takes requests from `server` from now on, for a machine that was started without one.
    pub fn serve_on(&mut self, server: Server) {
        self.server = Some(server);
    }

    /// A door for other threads.
    pub fn handle(&self) -> Handle {
        self.mailbox.handle.clone()
    }

    /// Builds and starts the machine before the first event is looked at.
    pub fn start(&mut self) -> Result<(), Fault> {
        self.obey(Request::Start).map(|_| ())
    }

    /// Serves events until the machine ends, and says why it did.
    pub fn run(&mut self) -> io::Result<Ending> {
        loop {
            self.wait()?;
            if let Some(number) = self.signals.next() {
                return Ok(self.end(Ending::Signal(number)));
            }
            let _ = self.mailbox.bell.read();
            if let Some(reason) = torn::gone() {
                return Ok(self.end(Ending::Broken(reason)));
            }
            while let Ok(event) = self.mailbox.events.try_recv() {
                match event {
                    Event::Ended(ending) => {
                        let ending = self.explained(ending);
                        return Ok(self.end(ending));
                    }
                    Event::Incident(incident, untold) => {
                        let (kind, details) = events::incident(&incident, untold);
                        self.announce(kind, details);
                    }
                    Event::Ejected(slot) => self.slot_emptied(slot),
                    Event::MemoryBrought(create) => self.memory_brought(*create),
                    Event::DrivesCopied => self.release_machine(),
                    Event::SnapshotEnded(outcome) => self.snapshot_ended(*outcome),
                    Event::Debugged => self.live.iter_mut().for_each(Live::debugged),
                    Event::Call(request, reply) => {
                        let _ = reply.send(self.obey(*request));
                    }
                }
            }
            self.serve()?;
            self.live.iter_mut().for_each(Live::debug);
            self.report_when_due();
            self.attend_removals();
            if self.settled.is_some_and(|settled| settled <= Instant::now()) {
                self.settled = None;
                crate::footprint::give_back();
            }
            if self.phase == Phase::Ended {
                return Ok(self.end(Ending::Stopped));
            }
            if self.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                return Ok(self.end(Ending::Stopped));
            }
        }
    }

    /// The machine, once it was built.
    pub fn vm(&self) -> Option<&Vm> {
        self.live.as_ref().map(|live| &live.vm)
    }

    /// The specification as it stands.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Removes the sockets of the API and of consoles and lets go of the rest as it is, for a
    /// process that ends now: what the kernel takes back by itself need not be taken apart, and the
    /// socket of vsock stays where its owner looks for it.
    pub fn close(mut self) {
        if let Some(live) = &mut self.live {
            live.sockets.remove();
            drop(live.debugger.take());
        }
        drop(self.server.take());
        std::mem::forget(self);
    }

    /// A vCPU that cannot go on does not know that a file was cut short under it.
    fn explained(&self, ending: Ending) -> Ending {
        let lost = || torn::found().or_else(|| self.live.as_ref()?.vm.annex.cut_short());
        match ending {
            Ending::Broken(reason) => Ending::Broken(lost().unwrap_or(reason)),
            other => other,
        }
    }

    fn end(&mut self, ending: Ending) -> Ending {
        self.phase = Phase::Ended;
        self.milestones.reached(Milestone::Ended);
        self.report();
        self.live.iter_mut().for_each(|live| live.end(ending.exit_code()));
        let end = serde_json::json!({ "reason": ending.reason(), "exit_code": ending.exit_code() });
        self.announce("Ended", end.clone());
        self.abandon_removals();
        self.abandon_snapshot();
        if let Some(server) = &mut self.server {
            let response = api::http::Response::value(&end);
            for ticket in self.waiting.drain(..) {
                server.answer(ticket, &response);
            }
            self.events.finish(server);
            server.flush(FAREWELL);
        }
        ending
    }

    fn wait(&self) -> io::Result<()> {
        let watch = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let server = self.server.as_ref().map_or(-1, Server::as_raw_fd);
        let next = [self.deadline, self.settled, self.metrics.due(), self.removals.due()]
            .into_iter()
            .flatten()
            .min();
        let debugger = self.live.as_ref().and_then(|live| live.debugger.as_ref());
        let [listener, client] = debugger.map_or([watch(-1), watch(-1)], Debugger::watch);
        let (bell, signals) = (watch(self.mailbox.bell.as_raw_fd()), watch(self.signals.as_raw_fd()));
        let mut fds = [bell, signals, watch(server), listener, client];
        let left = next.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        // Rounded up, so that the deadline has passed when the wait is over.
        let timeout = left.map_or(-1, |left| i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX));
        // SAFETY: the array has this many entries; a negative descriptor is passed over.
        match unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) } {
            -1 => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => Ok(()),
                e => Err(e),
            },
            _ => Ok(()),
        }
    }

    /// Carries out one request, or refuses it and changes nothing.
    fn obey(&mut self, request: Request) -> Result<Reply, Fault> {
        let arrived = std::mem::take(&mut self.arrived);
        let next = self.phase.after(verb(&request))?;
        if request == Request::Resume {
            self.jobs.let_run()?;
        }
        if let Request::LoadSnapshot(load) = &request {
            return self.become_snapshot(load, arrived).map(|()| Reply::Done);
        }
        let gift = Gift::of(&request, arrived)?;
        let before = self.phase;
        let asked = Instant::now();
        let reply = match request {
            Request::Info => Ok(Reply::Info(self.info())),
            Request::Version => Ok(Reply::Version(api::FIRECRACKER_VERSION.to_owned())),
            Request::Config => Ok(Reply::Config(Box::new(self.spec.clone()))),
            Request::MachineConfig => Ok(Reply::MachineConfig(self.spec.machine_config.clone())),
            Request::PutLogger(patch) => self.put_logger(patch),
            Request::PutMetrics(wanted) => self.configure_metrics(wanted).map(|()| Reply::Done),
            Request::FlushMetrics => self.flush_metrics().map(|()| Reply::Done),
            Request::OpenMetrics => Ok(Reply::Text(self.metrics_page())),
            Request::Mmds => Ok(self.metadata()),
            Request::PutMmds(data) => self.put_metadata(data).map(|()| Reply::Done),
            Request::PatchMmds(data) => self.patch_metadata(data).map(|()| Reply::Done),
            Request::Start => self.launch().map(|()| Reply::Done),
            Request::Stop => Ok(Reply::Done),
            Request::CreateSnapshot(create) => self.create_snapshot(create),
            Request::SnapshotJobs | Request::SnapshotJob(_) | Request::CancelSnapshot(_) => {
                self.about_jobs(&request)
            }
            other if self.live.is_some() && plug::concerns(&other) => self.change_devices(&other, gift),
            other => match &mut self.live {
                Some(live) => live.change(&mut self.spec, other, before),
                None => {
                    let (spec, reply) = draft::change(&self.spec, other)?;
                    self.handed.keep(gift)?;
                    self.spec = spec;
                    self.keep_transport();
                    Ok(reply)
                }
            },
        }?;
        self.phase = next;
        if next == Phase::Running {
            self.record_working_set();
        }
        if next != before {
            self.measure_change(before, asked.elapsed());
            self.announce(next.name(), serde_json::Value::Null);
        }
        Ok(reply)
    }

    /// Firecracker's clients know nothing of a transport in the machine's configuration.
    fn keep_transport(&mut self) {
        if self.settings.pci {
            self.spec.machine_config.transport = spec::Transport::Pci;
        }
    }

    fn put_logger(&mut self, patch: spec::LoggerPatch) -> Result<Reply, Fault> {
        let wanted = patch.applied_to(self.spec.logger.as_ref().unwrap_or(&self.settings.log));
        logger::start(&self.settings.id, &wanted).map_err(|e| Fault {
            kind: FaultKind::Invalid,
            message: "The log cannot be opened".to_owned(),
            causes: vec![e.to_string()],
        })?;
        self.spec.logger = Some(wanted);
        Ok(Reply::Done)
    }

    fn launch(&mut self) -> Result<(), Fault> {
        self.spec.check()?;
        let config = &self.spec.machine_config;
        let wait = config.gdb_wait;
        let platform = Platform { keyboard: self.settings.keyboard, boot_timer: self.settings.boot_timer };
        self.build(platform, Origin::Boot)?;
        let Some(live) = &self.live else { return Ok(()) };
        if live.debugger.is_some() && wait {
            live.vm.wait_for_debugger();
        }
        live.vm.run().map_err(|e| {
            let fault = Fault::from_error(e.kind(), &e);
            self.live = None;
            fault
        })
    }

    /// Becomes the machine of a snapshot, and lets it run if that is asked for.
    fn become_snapshot(&mut self, load: &spec::LoadSnapshot, arrived: Vec<OwnedFd>) -> Result<(), Fault> {
        let before = self.phase;
        let asked = Instant::now();
        self.load_snapshot(load, arrived)?;
        self.phase = Phase::Paused;
        self.measure_change(before, asked.elapsed());
        self.announce(self.phase.name(), serde_json::Value::Null);
        if load.resume_vm { self.obey(Request::Resume).map(|_| ()) } else { Ok(()) }
    }

    /// Builds the machine of the specification. Nothing runs yet.
    fn build(&mut self, platform: Platform, origin: Origin) -> Result<(), Fault> {
        let mmds = self.configured_service()?;
        let config = &self.spec.machine_config;
        let debugger = config.gdb_socket_path.as_deref().map(Debugger::bind).transpose();
        let debugger = debugger.map_err(|e| Fault::from_error(FaultKind::Invalid, &e))?;
        let report = self.mailbox.handle.clone();
        let witness = self.mailbox.handle.clone();
        let ejected = self.mailbox.handle.clone();
        let plan = build::Plan {
            spec: &self.spec,
            milestones: Arc::clone(&self.milestones),
            faults: Faults::new(Box::new(move |incident, untold| witness.happened(incident, untold))),
            ejected: Arc::new(move |slot| ejected.ejected(slot)),
            reporter: Arc::new(move |told| report.report(told)),
            platform,
            mmds,
            handed: &self.handed,
            origin,
        };
        let vm = build::build(plan).map_err(|e| Fault::from_error(e.kind(), &e))?;
        self.milestones.reached(Milestone::Built);
        self.live = Some(Live { vm, sockets: Sockets::of(&self.spec), debugger });
        self.handed.clear();
        self.settled = Instant::now().checked_add(SETTLED);
        Ok(())
    }

    fn announce(&mut self, kind: &'static str, details: serde_json::Value) {
        if self.serving {
            self.unannounced.push((kind, details));
        } else {
            self.events.add(kind, details, self.server.as_mut());
        }
    }

    fn info(&self) -> MachineInfo {
        MachineInfo {
            id: self.settings.id.clone(),
            state: self.phase.shown(),
            vmm_version: env!("CARGO_PKG_VERSION").to_owned(),
            app_name: "nacelle".to_owned(),
        }
    }
}

/// What kind of request this is, for the rules of [`Phase`].
fn verb(request: &Request) -> Verb {
    match request {
        Request::Info | Request::Version | Request::Config | Request::MachineConfig => Verb::Look,
        Request::Balloon | Request::Mmds | Request::PutMmds(_) | Request::PatchMmds(_) => Verb::Look,
        Request::PutLogger(_) | Request::OpenMetrics => Verb::Look,
        Request::SnapshotJobs | Request::SnapshotJob(_) | Request::CancelSnapshot(_) => Verb::Look,
        Request::PutBootSource(_)
        | Request::PutMachineConfig(_)
        | Request::PutCpuConfig(_)
        | Request::PutVsock(_)
        | Request::PutSerial(_)
        | Request::PutBalloon(_)
        | Request::PutMemoryHotplug(_)
        | Request::PutMmdsConfig(_)
        | Request::PutMetrics(_) => Verb::Prepare,
        Request::LoadSnapshot(_) => Verb::Load,
        // Before the start they describe the machine, after it they change it.
        Request::PatchMachineConfig(_)
        | Request::PutDrive(_)
        | Request::PutPmem(_)
        | Request::PutNetworkInterface(_)
        | Request::PutEntropy(_) => Verb::Look,
        Request::BalloonStatistics
        | Request::HintingStatus
        | Request::MemoryHotplug
        | Request::Counters
        | Request::FlushMetrics
        | Request::PatchDrive(_)
        | Request::DeleteDrive(_)
        | Request::PatchPmem(_)
        | Request::DeletePmem(_)
        | Request::PatchNetworkInterface(_)
        | Request::DeleteNetworkInterface(_)
        | Request::DeleteEntropy
        | Request::PatchBalloon(_)
        | Request::PatchBalloonStatistics(_)
        | Request::StartHinting(_)
        | Request::StopHinting
        | Request::PatchMemoryHotplug(_)
        | Request::Nmi => Verb::Change,
        Request::CreateSnapshot(create) if create.live => Verb::Change,
        Request::CreateSnapshot(_) | Request::CoreDump(_) => Verb::Copy,
        Request::Start => Verb::Start,
        Request::Pause => Verb::Pause,
        Request::Resume => Verb::Resume,
        Request::PowerButton | Request::CtrlAltDel => Verb::Press,
        Request::Stop => Verb::Stop,
    }
}
