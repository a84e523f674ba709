//! The loop of one vCPU: enter the guest, serve the exit, enter again.

use std::sync::{Arc, atomic::Ordering::Relaxed, mpsc};

use api::{Fault, FaultKind};
use arch::state::{VcpuState, announce_pause};
use devices::bus::Bus;
use kvm_bindings::{
    KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_debug_exit_arch,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::{Answer, Immediate, Order, Report, Reporter};
use crate::{
    metrics::{Exits, Milestone, Milestones},
    vm::{
        Ending,
        loading::{Loading, LoadingError},
    },
};

/// Where the accesses of a vCPU go.
#[derive(Clone)]
pub struct Buses {
    /// Memory address space.
    pub mmio: Arc<Bus>,
    /// Port address space.
    pub ports: Arc<Bus>,
    /// Stamped when a vCPU first enters the guest.
    pub milestones: Arc<Milestones>,
    /// What has to be in memory before.
    pub loading: Arc<Loading>,
}

/// What the loop does next.
enum Next {
    Enter,
    Obey,
    Stop(kvm_debug_exit_arch),
    End(Ending),
}

/// One vCPU, owned by its thread.
pub struct Vcpu {
    fd: VcpuFd,
    buses: Buses,
    reporter: Reporter,
    exits: Arc<Exits>,
    /// The guest ended on this vCPU: it is not entered again.
    over: bool,
    /// The guest has run, or ran before it was saved, and stood still since.
    stood_still: bool,
    /// It left the guest for an access, which KVM completes when it is entered next.
    unsettled: bool,
    /// What a debugger had set and the vCPU met: it is not entered before the next `Run`.
    stop: Option<kvm_debug_exit_arch>,
}

impl Vcpu {
    /// A vCPU that has its first state.
    pub fn new(fd: VcpuFd, buses: Buses, reporter: Reporter, exits: Arc<Exits>) -> Vcpu {
        let (over, stood_still, unsettled) = (false, false, true);
        Vcpu { fd, buses, reporter, exits, over, stood_still, unsettled, stop: None }
    }

    /// The descriptor of a vCPU whose thread never was.
    pub fn into_fd(self) -> VcpuFd {
        self.fd
    }

    /// Obeys orders until told to finish or until nobody is left to give any. The descriptor
    /// is returned rather than dropped: its shared page must outlive every kick.
    pub fn obey(
        mut self,
        inbox: &mpsc::Receiver<Order>,
        outbox: &mpsc::SyncSender<Answer>,
        immediate: Immediate,
    ) -> VcpuFd {
        let mut running = false;
        loop {
            let order = if running { self.run_until_order(inbox) } else { inbox.recv().ok() };
            let told = match order {
                None | Some(Order::Finish) => return self.fd,
                Some(Order::Run) => {
                    running = true;
                    self.stop = None;
                    if let Err(error) = self.buses.loading.finish() {
                        self.give_up(&error);
                        continue;
                    }
                    if std::mem::take(&mut self.stood_still)
                        && let Err(error) = announce_pause(&self.fd)
                    {
                        // The guest may take the pause for a hang of its own and say so.
                        log::warn!("{error}");
                    }
                    self.buses.milestones.reached(Milestone::FirstRun);
                    continue;
                }
                Some(Order::Pause) => {
                    self.settle();
                    self.stood_still = true;
                    running = false;
                    Answer::Paused(self.stop)
                }
                Some(Order::Nmi) => Answer::Nmi(self.fd.nmi()),
                Some(Order::Do(errand)) => {
                    errand(&self.fd);
                    Answer::Did
                }
                Some(Order::Save(shape)) => Answer::Saved(VcpuState::save(&self.fd, &shape).map(Box::new)),
                Some(Order::Load(shape, state)) => {
                    self.over = false;
                    Answer::Loaded(state.load(&self.fd, &shape))
                }
            };
            immediate.set(0);
            // An answer that nobody waits for any more may be lost.
            if let Err(mpsc::TrySendError::Disconnected(_)) = outbox.try_send(told) {
                return self.fd;
            }
        }
    }

    /// Runs the guest until an order arrives. A guest that ended is not entered again.
    fn run_until_order(&mut self, inbox: &mpsc::Receiver<Order>) -> Option<Order> {
        while !self.over && self.stop.is_none() {
            match self.enter() {
                Next::Enter => {}
                Next::Obey => match inbox.try_recv() {
                    Ok(order) => return Some(order),
                    Err(mpsc::TryRecvError::Disconnected) => return None,
                    // A stray signal: nothing was ordered.
                    Err(mpsc::TryRecvError::Empty) => {}
                },
                Next::Stop(stop) => {
                    self.stop = Some(stop);
                    (self.reporter)(Report::Debugged);
                }
                Next::End(ending) => {
                    self.over = true;
                    (self.reporter)(Report::Ended(ending));
                }
            }
        }
        inbox.recv().ok()
    }

    /// The guest is not entered, for want of a kernel. Who met the error first reports it.
    fn give_up(&mut self, error: &LoadingError) {
        self.over = true;
        if !matches!(error, LoadingError::Before) {
            let fault = Fault::from_error(FaultKind::Internal, error);
            (self.reporter)(Report::Ended(Ending::Broken(fault.to_string())));
        }
    }

    fn enter(&mut self) -> Next {
        let left = self.fd.run();
        // KVM completes a pending access before it looks for a reason not to enter the guest: one
        // that was interrupted has none pending.
        self.unsettled = !matches!(&left, Err(e) if e.errno() == libc::EINTR);
        match left {
            Ok(exit) => match exit {
                VcpuExit::IoOut(port, data) => {
                    self.exits.port_out.of(|| self.buses.ports.write(port.into(), data));
                    Next::Enter
                }
                VcpuExit::IoIn(port, data) => {
                    self.exits.port_in.of(|| self.buses.ports.read(port.into(), data));
                    Next::Enter
                }
                VcpuExit::MmioWrite(address, data) => {
                    self.exits.mmio_write.of(|| self.buses.mmio.write(address, data));
                    Next::Enter
                }
                VcpuExit::MmioRead(address, data) => {
                    self.exits.mmio_read.of(|| self.buses.mmio.read(address, data));
                    Next::Enter
                }
                other => {
                    self.exits.other.fetch_add(1, Relaxed);
                    end_of(&other)
                }
            },
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {
                self.exits.kicked.fetch_add(1, Relaxed);
                // `immediate_exit` stays set until an order was obeyed; without one it must
                // not keep the vCPU out of the guest.
                self.fd.set_kvm_immediate_exit(0);
                Next::Obey
            }
            Err(e) if e.errno() == libc::EFAULT => {
                let text = "A page of its memory cannot be had: KVM met a bad address".to_owned();
                Next::End(Ending::Broken(text))
            }
            Err(e) => Next::End(Ending::Broken(format!("KVM cannot run the vCPU: {e}"))),
        }
    }

    /// Completes an access that the vCPU left the guest for: one entry that returns at once.
    fn settle(&mut self) {
        if !std::mem::take(&mut self.unsettled) {
            return;
        }
        self.fd.set_kvm_immediate_exit(1);
        // The answer is EINTR by design; the pending access was completed on the way. Only the
        // end of a debugger's step, if the access was that step, is told instead.
        if let Ok(VcpuExit::Debug(stop)) = self.fd.run() {
            self.stop = Some(stop);
        }
        self.fd.set_kvm_immediate_exit(0);
    }
}

/// What an exit that is no access means.
fn end_of(exit: &VcpuExit<'_>) -> Next {
    match exit {
        // With in-kernel interrupt controllers KVM handles HLT itself; this is a guest that
        // waits for something while it cannot be woken.
        VcpuExit::Hlt => Next::End(Ending::Halted),
        VcpuExit::Shutdown => Next::End(Ending::TripleFault),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => Next::End(Ending::Off),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => Next::End(Ending::Reset),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _) => {
            Next::End(Ending::Broken("The guest reported a crash".to_owned()))
        }
        VcpuExit::Intr | VcpuExit::IrqWindowOpen => Next::Obey,
        VcpuExit::Debug(stop) => Next::Stop(*stop),
        VcpuExit::FailEntry(reason, cpu) => {
            let text = format!("The processor refused to enter the guest: reason {reason:#x} on CPU {cpu}");
            Next::End(Ending::Broken(text))
        }
        VcpuExit::InternalError => {
            Next::End(Ending::Broken("KVM met an instruction or state it cannot emulate".to_owned()))
        }
        other => Next::End(Ending::Broken(format!("KVM left the guest for an unknown reason: {other:?}"))),
    }
}
