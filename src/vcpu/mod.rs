//! vCPU threads: orders go in, answers come out.
//!
//! ```text
//!   controller                     vCPU thread
//!   ──────────                     ─────────────────────────────────────────────
//!   order(Run) ──────────────────► KVM_RUN ─► exit ─► bus ─► KVM_RUN ─► ...
//!   order(Pause) + kick ─────────► leaves the guest, settles, ──► answer(Paused)
//!   order(Save) ─────────────────► reads its registers        ──► answer(Saved)
//!   order(Nmi) + kick ───────────► leaves the guest, KVM_NMI,  ──► answer(Nmi), KVM_RUN
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
//! out in between is of neither before nor after.

mod run;
#[cfg(test)]
mod tests;

use std::{
    io,
    os::unix::thread::JoinHandleExt,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use arch::state::{StateShape, VcpuState};
use kvm_ioctls::VcpuFd;

pub use run::Buses;

use crate::{
    metrics::{ExitSums, Exits},
    vm::Ending,
};

/// How long vCPUs may take to obey an order.
const OBEY_DEADLINE: Duration = Duration::from_secs(5);

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
    /// End the thread.
    Finish,
}

/// What a vCPU thread answers, once for each order except `Run` and `Finish`.
pub enum Answer {
    /// Stands still.
    Paused,
    /// Its registers.
    Saved(Result<Box<VcpuState>, arch::state::StateError>),
    /// Took the registers over, or why not.
    Loaded(Result<(), arch::state::StateError>),
    /// The interrupt waits for the next entry into the guest, or why not.
    Nmi(Result<(), kvm_ioctls::Error>),
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
    thread: thread::JoinHandle<VcpuFd>,
    exits: Arc<Exits>,
}

/// All vCPUs of a machine.
pub struct Vcpus(Vec<Handle>);

impl Vcpus {
    /// Starts a thread for each vCPU; they wait for orders. `ended` is called, from a vCPU
    /// thread, when the guest ends or cannot go on.
    pub fn spawn(
        fds: Vec<VcpuFd>,
        buses: &Buses,
        ended: &Arc<dyn Fn(Ending) + Send + Sync>,
    ) -> Result<Vcpus, VcpuError> {
        install_kick();
        let mut handles = Vec::with_capacity(fds.len());
        for (index, mut fd) in fds.into_iter().enumerate() {
            let immediate = Immediate::of(&mut fd);
            let (orders, inbox) = mpsc::sync_channel(WAITING);
            let (outbox, answers) = mpsc::sync_channel(WAITING);
            let exits = Arc::new(Exits::default());
            let vcpu = run::Vcpu::new(fd, buses.clone(), Arc::clone(ended), Arc::clone(&exits));
            let thread = thread::Builder::new()
                .name(format!("vcpu{index}"))
                .stack_size(256 * 1024)
                .spawn(move || vcpu.obey(&inbox, &outbox, immediate))
                .map_err(|source| VcpuError::Spawn { index, source })?;
            handles.push(Handle { orders, answers, immediate, thread, exits });
        }
        Ok(Vcpus(handles))
    }

    /// Lets all vCPUs run.
    pub fn run(&self) -> Result<(), VcpuError> {
        self.each(|index, h| h.order(index, Order::Run))
    }

    /// Stops all vCPUs where they are and waits until they stand still.
    pub fn pause(&self) -> Result<(), VcpuError> {
        self.each(|index, h| {
            h.order(index, Order::Pause)?;
            h.kick();
            Ok(())
        })?;
        self.each(|index, h| match h.answer(index)? {
            Answer::Paused => Ok(()),
            _ => Err(VcpuError::OutOfTurn(index)),
        })
    }

    /// Reads the state of every vCPU; only while paused.
    pub fn save(&self, shape: &Arc<StateShape>) -> Result<Vec<VcpuState>, VcpuError> {
        self.each(|index, h| h.order(index, Order::Save(Arc::clone(shape))))?;
        let saved = |(index, h): (usize, &Handle)| match h.answer(index)? {
            Answer::Saved(state) => state.map(|s| *s).map_err(|source| VcpuError::State { index, source }),
            _ => Err(VcpuError::OutOfTurn(index)),
        };
        self.0.iter().enumerate().map(saved).collect()
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
        self.0.len()
    }

    /// Exits handed to this process so far, over all vCPUs, with the time they took.
    pub fn exit_sums(&self) -> ExitSums {
        let mut sums = ExitSums::default();
        self.0.iter().for_each(|handle| sums.join(&handle.exits));
        sums
    }

    /// Exits handed to this process so far, by kind, over all vCPUs.
    pub fn exits(&self) -> Vec<(&'static str, u64)> {
        self.exit_sums().counts().to_vec()
    }

    /// Ends all threads and waits for them, each for a bounded time; the descriptors close.
    pub fn finish(self) {
        for handle in &self.0 {
            let _ = handle.orders.try_send(Order::Finish);
            handle.kick();
        }
        for handle in self.0 {
            // A thread blocked in a device must not block the end of the process.
            let limit = std::time::Instant::now() + OBEY_DEADLINE;
            while !handle.thread.is_finished() && std::time::Instant::now() < limit {
                handle.kick();
                thread::sleep(Duration::from_millis(1));
            }
            if handle.thread.is_finished() {
                let _ = handle.thread.join();
            }
        }
    }

    fn each(&self, mut f: impl FnMut(usize, &Handle) -> Result<(), VcpuError>) -> Result<(), VcpuError> {
        self.0.iter().enumerate().try_for_each(|(index, handle)| f(index, handle))
    }
}

impl Handle {
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
