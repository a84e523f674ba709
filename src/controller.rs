//! The thread that owns the machine.
//!
//! Everything that happens to a machine after it was built happens here, one thing at a
//! time: requests from the door ([`Handle`]), endings reported by vCPUs and power registers,
//! signals. Nobody else holds the [`Vm`], so nothing needs a lock and no two changes cross.
//!
//! ```text
//!   Handle::call ──┐
//!   vCPU: ended ───┼──► queue + bell ──► Controller::run ──► phase.rs: allowed? ──► Vm
//!   power button ──┘                          ▲
//!   SIGTERM ───────────── signalfd ───────────┘
//! ```

use std::{
    io,
    os::fd::AsRawFd,
    sync::{Arc, mpsc},
    time::Duration,
};

use api::{Control, Fault, FaultKind, MachineInfo, Reply, Request};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::{
    metrics::Milestone,
    phase::{Phase, Verb},
    signals::Signals,
    vm::{Ending, Vm},
};

/// How long a caller waits for its answer before it is told that the machine is stuck.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);

enum Event {
    Call(Request, mpsc::SyncSender<Result<Reply, Fault>>),
    Ended(Ending),
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

    fn put(&self, event: Event) -> Result<(), Fault> {
        let gone = || Fault::new(FaultKind::Conflict, "The machine has ended");
        self.events.send(event).map_err(|_| gone())?;
        self.bell.write(1).map_err(|_| gone())
    }
}

impl Control for Handle {
    fn call(&self, request: Request) -> Result<Reply, Fault> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.put(Event::Call(request, reply))?;
        answer.recv_timeout(ANSWER_DEADLINE).unwrap_or_else(|_| {
            Err(Fault::new(FaultKind::Internal, "The machine did not answer in time; it may have ended"))
        })
    }
}

/// Where events come from: made before the machine, because the machine's own parts report
/// through it.
pub struct Mailbox {
    handle: Handle,
    events: mpsc::Receiver<Event>,
    bell: Arc<EventFd>,
}

impl Mailbox {
    /// An empty mailbox.
    pub fn new() -> io::Result<Mailbox> {
        let bell = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let (sender, events) = mpsc::channel();
        let handle = Handle { events: sender, bell: Arc::clone(&bell) };
        Ok(Mailbox { handle, events, bell })
    }

    /// Where to put events.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }
}

/// The owner of one machine.
pub struct Controller {
    id: String,
    vm: Vm,
    phase: Phase,
    mailbox: Mailbox,
    signals: Signals,
}

impl Controller {
    /// Takes over a machine that was built and not started.
    pub fn new(id: String, vm: Vm, mailbox: Mailbox, signals: Signals) -> Controller {
        Controller { id, vm, phase: Phase::NotStarted, mailbox, signals }
    }

    /// Starts the machine before the first event is looked at.
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
            while let Ok(event) = self.mailbox.events.try_recv() {
                match event {
                    Event::Ended(ending) => return Ok(self.end(ending)),
                    Event::Call(Request::Stop, reply) => {
                        let _ = reply.send(Ok(Reply::Done));
                        return Ok(self.end(Ending::Stopped));
                    }
                    Event::Call(request, reply) => {
                        let _ = reply.send(self.obey(request));
                    }
                }
            }
        }
    }

    /// The machine, for reading its counters after it ended.
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    fn end(&mut self, ending: Ending) -> Ending {
        self.phase = Phase::Ended;
        self.vm.milestones.reached(Milestone::Ended);
        ending
    }

    fn wait(&self) -> io::Result<()> {
        let watch = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut fds = [watch(self.mailbox.bell.as_raw_fd()), watch(self.signals.as_raw_fd())];
        // SAFETY: the array has two entries.
        match unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) } {
            -1 => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => Ok(()),
                e => Err(e),
            },
            _ => Ok(()),
        }
    }

    fn obey(&mut self, request: Request) -> Result<Reply, Fault> {
        let verb = match request {
            Request::Info => return Ok(Reply::Info(self.info())),
            Request::Start => Verb::Start,
            Request::Pause => Verb::Pause,
            Request::Resume => Verb::Resume,
            Request::PowerButton | Request::CtrlAltDel => Verb::Press,
            Request::Stop => Verb::Stop,
        };
        let next = self.phase.after(verb)?;
        match request {
            Request::PowerButton => self.vm.press_power_button(),
            Request::CtrlAltDel => self.vm.press_ctrl_alt_del(),
            _ if next == self.phase => Ok(()),
            Request::Start => self.vm.run(),
            Request::Resume => self.vm.resume(),
            Request::Pause => self.vm.pause(),
            Request::Stop | Request::Info => Ok(()),
        }
        .map_err(|e| Fault::from_error(e.kind(), &e))?;
        self.phase = next;
        Ok(Reply::Done)
    }

    fn info(&self) -> MachineInfo {
        MachineInfo {
            id: self.id.clone(),
            state: self.phase.shown(),
            vmm_version: env!("CARGO_PKG_VERSION").to_owned(),
            app_name: "nacelle".to_owned(),
        }
    }
}
