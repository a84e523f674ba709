//! vCPU threads: orders go in, answers come out.
//!
//! ```text
//!   controller                     vCPU thread
//!   ──────────                     ─────────────────────────────────────────────
//!   order(Run) ──────────────────► KVM_RUN ─► exit ─► bus ─► KVM_RUN ─► ...
//!   order(Pause) + kick ─────────► leaves the guest, settles, ──► answer(Paused)
//!   order(Save) ─────────────────► reads its registers        ──► answer(Saved)
//!   order(Nmi) + kick ───────────► leaves the guest, KVM_NMI,  ──► answer(Nmi), KVM_RUN
//!   order(Do) ───────────────────► a debugger's errand         ──► answer(Did)
//!          ◄── report(Debugged) ── met a breakpoint: stands still until the next Run
//!   order(Finish) + kick ────────► ends
//! ```
//!
//! An order to a running vCPU needs a *kick*: `immediate_exit` is set in the shared page
//! first and then a signal is sent (KVM API section 5). Whichever side of the guest entry
//! the thread is on, one of the two gets it out; neither alone would.
//!
//! All vCPUs are told first and waited for afterwards, so a pause of 64 costs about what a
//! pause of one does. Before it answers, a vCPU *settles*: an access to a register that it
//! had left the guest for is completed by one more `KVM_RUN`, because the state KVM hands
//! out in between is of neither before nor after. One that was interrupted has none to complete.
//!
//! A vCPU runs when two agree: the machine, which [`Vcpus::run`] and [`Vcpus::pause`] speak
//! for, and a debugger if there is one, which [`Vcpus::hold`] and [`Vcpus::release`] speak
//! for. Neither need know of the other: a machine that is resumed while its debugger holds it
//! goes on when the debugger lets go, and the other way round.

mod run;
#[cfg(test)]
mod tests;

use std::{
    cell::Cell,
    io,
    os::unix::thread::JoinHandleExt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU8, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use arch::state::{StateShape, VcpuState};
use kvm_bindings::kvm_debug_exit_arch;
use kvm_ioctls::VcpuFd;

pub use run::Buses;

use crate::{
    metrics::{ExitSums, Exits},
    vm::Ending,
};

/// How long vCPUs may take to obey an order.
const OBEY_DEADLINE: Duration = Duration::from_secs(5);

/// What is done on a vCPU's thread for somebody else. Brings its answer by a way of its own.
pub type Errand = Box<dyn FnOnce(&VcpuFd) + Send>;

/// What vCPU threads tell without being asked. May be called from any of them, and must not
/// block.
pub type Reporter = Arc<dyn Fn(Report) + Send + Sync>;

/// See [`Reporter`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// The guest ended, or cannot go on.
    Ended(Ending),
    /// A vCPU met what a debugger has set; [`Vcpus::take_stops`] says which and what.
    Debugged,
}

/// What a vCPU thread is told.
pub enum Order {
    /// Enter the guest and stay there.
    Run,
    /// Leave the guest and stand still.
    Pause,
    /// Hand out the registers; only while paused. The shape says what to read.
    Save(Arc<StateShape>),
    /// Take over registers; only while paused.
    Load(Arc<StateShape>, Box<VcpuState>),
    /// Interrupt the guest where it cannot be masked; go on with what was done before.
    Nmi,
    /// Do something with the vCPU; only while paused.
    Do(Errand),
    /// End the thread.
    Finish,
}

/// What a vCPU thread answers, once for each order except `Run` and `Finish`.
pub enum Answer {
    /// Stands still. What a debugger had set and the vCPU met since it began to run.
    Paused(Option<kvm_debug_exit_arch>),
    /// Its registers.
    Saved(Result<Box<VcpuState>, arch::state::StateError>),
    /// Took the registers over, or why not.
    Loaded(Result<(), arch::state::StateError>),
    /// The interrupt waits for the next entry into the guest, or why not.
    Nmi(Result<(), kvm_ioctls::Error>),
    /// The errand is done.
    Did,
}

/// Why a vCPU did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// No answer in time.
    #[error("vCPU {index} did not answer within {} s", OBEY_DEADLINE.as_secs())]
    Stuck {
        /// Which vCPU.
        index: usize,
    },
    /// Its thread is gone.
    #[error("The thread of vCPU {0} has ended")]
    Gone(usize),
    /// The thread could not be started.
    #[error("Cannot start a thread for vCPU {index}")]
    Spawn {
        /// Which vCPU.
        index: usize,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It answered something else than what was asked.
    #[error("vCPU {0} gave an answer out of turn")]
    OutOfTurn(usize),
    /// KVM did not take the interrupt.
    #[error("vCPU {index} cannot be interrupted")]
    Nmi {
        /// Which vCPU.
        index: usize,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM did not take what a debugger wants it to stop at.
    #[error("vCPU {index} cannot be set to stop where the debugger wants it to")]
    Debug {
        /// Which vCPU.
        index: usize,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// Its state could not be read or written.
    #[error("The state of vCPU {index} cannot be moved")]
    State {
        /// Which vCPU.
        index: usize,
        /// Why.
        #[source]
        source: arch::state::StateError,
    },
}

/// Orders or answers that may wait. One is under way at a time; a vCPU that does not obey fills
/// this and is then told to be stuck.
const WAITING: usize = 4;

/// The `immediate_exit` byte of a vCPU's shared page.
#[derive(Clone, Copy)]
struct Immediate(*const AtomicU8);

// SAFETY: the byte is only accessed atomically, and the page stays mapped because vCPU
// descriptors are never dropped before their handle (see `Handle`).
unsafe impl Send for Immediate {}
// SAFETY: as above.
unsafe impl Sync for Immediate {}

impl Immediate {
    fn of(fd: &mut VcpuFd) -> Immediate {
        Immediate((&raw mut fd.get_kvm_run().immediate_exit).cast_const().cast())
    }

    fn set(self, value: u8) {
        // SAFETY: see the `Send` reason: the page outlives every handle that holds this.
        unsafe { (*self.0).store(value, Ordering::SeqCst) };
    }
}

struct Handle {
    orders: mpsc::SyncSender<Order>,
    answers: mpsc::Receiver<Answer>,
    immediate: Immediate,
    thread: thread::JoinHandle<Option<VcpuFd>>,
    exits: Arc<Exits>,
    /// Told to run, and not to stand still since.
    running: Cell<bool>,
    /// What it met before it stood still.
    stop: Cell<Option<kvm_debug_exit_arch>>,
}

/// All vCPUs, for [`Vcpus::hold`] and [`Vcpus::release`]: one bit each.
const ALL: u64 = u64::MAX;

/// All vCPUs of a machine. The default is none.
#[derive(Default)]
pub struct Vcpus {
    handles: Vec<Handle>,
    /// The machine is to run.
    wanted: Cell<bool>,
    /// Those that stand still for a debugger, one bit each.
    held: Cell<u64>,
}

impl Vcpus {
    /// Starts a thread for each vCPU; they wait for orders.
    pub fn spawn(fds: Vec<VcpuFd>, buses: &Buses, reporter: &Reporter) -> Result<Vcpus, VcpuError> {
        install_kick();
        let mut vcpus = Vcpus { handles: Vec::with_capacity(fds.len()), ..Vcpus::default() };
        match vcpus.add(fds, buses, reporter) {
            Ok(()) => Ok(vcpus),
            Err((error, _)) => Err(error),
        }
    }

    /// Adds vCPUs; they stand still until [`Vcpus::run_added`]. When that fails none was added,
    /// and the descriptors come back.
    pub fn add(
        &mut self,
        fds: Vec<VcpuFd>,
        buses: &Buses,
        reporter: &Reporter,
    ) -> Result<(), (VcpuError, Vec<VcpuFd>)> {
        let before = self.handles.len();
        let mut fds = fds.into_iter();
        while let Some(fd) = fds.next() {
            match spawn(self.handles.len(), fd, buses, reporter) {
                Ok(handle) => self.handles.push(handle),
                Err((error, fd)) => {
                    let added = self.handles.split_off(before);
                    let returned = added.into_iter().filter_map(Handle::finish);
                    return Err((error, returned.chain(fd).chain(fds).collect()));
                }
            }
        }
        Ok(())
    }

    /// Lets vCPUs that were added run if the others do.
    pub fn run_added(&self) -> Result<(), VcpuError> {
        if self.wanted.get() { self.run() } else { Ok(()) }
    }

    /// Lets all vCPUs run that no debugger holds.
    pub fn run(&self) -> Result<(), VcpuError> {
        self.wanted.set(true);
        self.each(|index, h| {
            let held = self.held.get() >> index & 1 == 1;
            if held || h.running.get() {
                return Ok(());
            }
            h.stop.set(None);
            h.order(index, Order::Run)?;
            h.running.set(true);
            Ok(())
        })
    }

    /// Stops all vCPUs where they are and waits until they stand still.
    pub fn pause(&self) -> Result<(), VcpuError> {
        self.wanted.set(false);
        self.halt()
    }

    /// Before the first run: none runs until [`Vcpus::release`].
    pub fn hold_from_the_start(&self) {
        self.held.set(ALL);
    }

    /// Stops all vCPUs for a debugger, those of a paused machine too.
    pub fn hold(&self) -> Result<(), VcpuError> {
        self.held.set(ALL);
        self.halt()
    }

    /// Ends a hold, but for the vCPUs whose bits are set in `held`.
    pub fn release(&self, held: u64) -> Result<(), VcpuError> {
        self.held.set(held);
        self.run_added()
    }

    /// The vCPUs that met what a debugger has set before they came to stand still, and what
    /// they met, in order of their indices. Told once, and forgotten when they run again.
    pub fn take_stops(&self) -> Vec<(usize, kvm_debug_exit_arch)> {
        self.handles.iter().enumerate().filter_map(|(index, h)| Some((index, h.stop.take()?))).collect()
    }

    /// Does something with one vCPU on its thread; only while it stands still.
    pub fn on<T: Send + 'static>(
        &self,
        index: usize,
        errand: impl FnOnce(&VcpuFd) -> T + Send + 'static,
    ) -> Result<T, VcpuError> {
        let handle = self.handles.get(index).filter(|h| !h.running.get()).ok_or(VcpuError::Gone(index))?;
        let (result, answer) = mpsc::sync_channel(1);
        let errand = Box::new(move |fd: &VcpuFd| {
            let _ = result.send(errand(fd));
        });
        handle.order(index, Order::Do(errand))?;
        match handle.answer(index)? {
            Answer::Did => answer.try_recv().map_err(|_| VcpuError::Gone(index)),
            _ => Err(VcpuError::OutOfTurn(index)),
        }
    }

    /// As if a vCPU that stands still had met this.
    #[cfg(test)]
    pub fn pretend(&self, index: usize, stop: kvm_debug_exit_arch) {
        self.handles[index].stop.set(Some(stop));
    }

    fn halt(&self) -> Result<(), VcpuError> {
        self.each(|index, h| {
            if h.running.get() {
                h.order(index, Order::Pause)?;
                h.kick();
            }
            Ok(())
        })?;
        // The last one told is the last one waited for anyway. Waited for first, it is mostly the
        // only one that has to wake this thread: the answers of the others lie here by then.
        for (index, h) in self.handles.iter().enumerate().rev().filter(|(_, h)| h.running.get()) {
            match h.answer(index)? {
                Answer::Paused(stop) => {
                    h.running.set(false);
                    h.stop.set(stop);
                }
                _ => return Err(VcpuError::OutOfTurn(index)),
            }
        }
        Ok(())
    }

    /// Reads the state of every vCPU; only while paused.
    pub fn save(&self, shape: &Arc<StateShape>) -> Result<Vec<VcpuState>, VcpuError> {
        self.each(|index, h| h.order(index, Order::Save(Arc::clone(shape))))?;
        let saved = |(index, h): (usize, &Handle)| match h.answer(index)? {
            Answer::Saved(state) => state.map(|s| *s).map_err(|source| VcpuError::State { index, source }),
            _ => Err(VcpuError::OutOfTurn(index)),
        };
        self.handles.iter().enumerate().map(saved).collect()
    }

    /// Interrupts all vCPUs where they cannot mask it, running or paused. KVM takes the request
    /// only while the vCPU is not running, so each one leaves the guest for it. One that waits
    /// for its start-up message, as all but the first do before the guest has processors for
    /// them, forgets the interrupt when it starts.
    pub fn nmi(&self) -> Result<(), VcpuError> {
        self.each(|index, h| {
            h.order(index, Order::Nmi)?;
            h.kick();
            Ok(())
        })?;
        self.each(|index, h| match h.answer(index)? {
            Answer::Nmi(told) => told.map_err(|source| VcpuError::Nmi { index, source }),
            _ => Err(VcpuError::OutOfTurn(index)),
        })
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.handles.len()
    }

    /// Exits handed to this process so far, over all vCPUs, with the time they took.
    pub fn exit_sums(&self) -> ExitSums {
        let mut sums = ExitSums::default();
        self.handles.iter().for_each(|handle| sums.join(&handle.exits));
        sums
    }

    /// Exits handed to this process so far, by kind, over all vCPUs.
    pub fn exits(&self) -> Vec<(&'static str, u64)> {
        self.exit_sums().counts().to_vec()
    }

    /// Ends all threads and waits for them, each for a bounded time; the descriptors close.
    pub fn finish(self) {
        for handle in &self.handles {
            let _ = handle.orders.try_send(Order::Finish);
            handle.kick();
        }
        for handle in self.handles {
            drop(handle.finish());
        }
    }

    fn each(&self, mut f: impl FnMut(usize, &Handle) -> Result<(), VcpuError>) -> Result<(), VcpuError> {
        self.handles.iter().enumerate().try_for_each(|(index, handle)| f(index, handle))
    }
}

/// Starts the thread of a vCPU. When there is none to be had the descriptor comes back.
fn spawn(
    index: usize,
    mut fd: VcpuFd,
    buses: &Buses,
    reporter: &Reporter,
) -> Result<Handle, (VcpuError, Option<VcpuFd>)> {
    let immediate = Immediate::of(&mut fd);
    let (orders, inbox) = mpsc::sync_channel(WAITING);
    let (outbox, answers) = mpsc::sync_channel(WAITING);
    let exits = Arc::new(Exits::default());
    let vcpu = run::Vcpu::new(fd, buses.clone(), Arc::clone(reporter), Arc::clone(&exits));
    // A thread that cannot be started drops what it was given: it takes the vCPU from here.
    let place = Arc::new(Mutex::new(Some(vcpu)));
    let take = |place: &Mutex<Option<run::Vcpu>>| place.lock().ok().and_then(|mut vcpu| vcpu.take());
    let given = Arc::clone(&place);
    let thread = thread::Builder::new()
        .name(format!("vcpu{index}"))
        .stack_size(256 * 1024)
        .spawn(move || take(&given).map(|vcpu| vcpu.obey(&inbox, &outbox, immediate)))
        .map_err(|source| (VcpuError::Spawn { index, source }, take(&place).map(run::Vcpu::into_fd)))?;
    let (running, stop) = (Cell::new(false), Cell::new(None));
    Ok(Handle { orders, answers, immediate, thread, exits, running, stop })
}

impl Handle {
    /// Ends the thread, which is waited for for a bounded time, and returns the vCPU.
    fn finish(self) -> Option<VcpuFd> {
        let _ = self.orders.try_send(Order::Finish);
        // A thread blocked in a device must not block the end of the process.
        let limit = std::time::Instant::now() + OBEY_DEADLINE;
        while !self.thread.is_finished() && std::time::Instant::now() < limit {
            self.kick();
            thread::sleep(Duration::from_millis(1));
        }
        if self.thread.is_finished() { self.thread.join().ok().flatten() } else { None }
    }

    fn kick(&self) {
        if self.thread.is_finished() {
            return;
        }
        self.immediate.set(1);
        // SAFETY: the thread was not joined, so its id still names it; the signal has a
        // handler that does nothing.
        unsafe { libc::pthread_kill(self.thread.as_pthread_t() as _, kick_signal()) };
    }

    fn order(&self, index: usize, order: Order) -> Result<(), VcpuError> {
        self.orders.try_send(order).map_err(|e| match e {
            mpsc::TrySendError::Full(_) => VcpuError::Stuck { index },
            mpsc::TrySendError::Disconnected(_) => VcpuError::Gone(index),
        })
    }

    fn answer(&self, index: usize) -> Result<Answer, VcpuError> {
        self.answers.recv_timeout(OBEY_DEADLINE).map_err(|e| match e {
            mpsc::RecvTimeoutError::Timeout => VcpuError::Stuck { index },
            mpsc::RecvTimeoutError::Disconnected => VcpuError::Gone(index),
        })
    }
}

fn kick_signal() -> i32 {
    libc::SIGRTMIN()
}

/// Gives the kick signal a handler that does nothing: it is there to interrupt `KVM_RUN`.
fn install_kick() {
    extern "C" fn nothing(_: i32) {}
    // SAFETY: an all-zero action is a valid one; the handler is a function that touches
    // nothing.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        libc::sigaction(kick_signal(), &raw const action, std::ptr::null_mut());
    }
}
