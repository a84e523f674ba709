//! A door for gdb: its remote protocol on a unix socket.
//!
//! ```text
//!   gdb ──► socket ──► Session ──► gdbstub's state machine ──► Guest ──► vCPUs, guest memory
//!    ▲                    │                                      │
//!    └── answers, stops ──┴── a vCPU met a breakpoint ◄──────────┘ breakpoints, steps
//! ```
//!
//! It is served on the thread that owns the machine, like the API: whatever stops, steps or
//! changes the machine then happens one after the other, and a machine without a debugger pays
//! for none of it: no thread, no descriptor, no system call.
//!
//! **Who holds the guest.** A vCPU runs when the API lets it (`Vcpus::run`) *and* the debugger
//! lets it (`Vcpus::release`). A machine that the API has paused stays so when the debugger
//! says `continue`, and a machine that stands at a breakpoint stays there when the API resumes
//! it. Devices stop only for the API.
//!
//! **A session** begins when a client connects, which stops the guest, and ends when it leaves:
//! by `detach`, by `kill`, by a closed connection or because what it sends is no protocol. All
//! of them are the same: breakpoints are taken out of memory and registers, and the guest goes on.
//! There is one session at a time; who comes meanwhile is turned away at once.
//!
//! A client is trusted with the guest, not with the monitor: packets have a length, answers that
//! it does not read have a cap after which it is cut off, and while they wait nothing more is
//! read from it.

mod breakpoints;
mod guest;
#[cfg(test)]
mod tests;
mod wire;

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::Path,
};

use gdbstub::stub::{GdbStub, state_machine::GdbStubStateMachine};
use rustix::{io::Errno, net::SendFlags};

use crate::{
    server::{Listener, SocketError},
    vcpu::VcpuError,
    vm::Vm,
};
use guest::{Guest, Reason};
use wire::Wire;

/// Connections looked at in one turn.
const ACCEPTS: usize = 4;
/// Bytes read in one turn.
const PIECE: usize = 4096;
/// What the messages of [`SocketError`] call the socket.
const SOCKET: &str = "gdb socket";
/// A debugger may do anything to the guest: only the user of this process may be one.
const MODE: u32 = 0o600;

type Stub = GdbStubStateMachine<'static, Guest, Wire>;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum Over {
    /// The client detached, or killed what it took for a process.
    #[error("it has detached")]
    Detached,
    /// The client closed its end.
    #[error("it is gone")]
    Gone,
    /// The socket failed.
    #[error("its socket failed: {0}")]
    Socket(#[from] io::Error),
    /// What it sent makes no sense, or it does not read the answers.
    #[error("{0}")]
    Protocol(String),
    /// The vCPUs do not obey.
    #[error("the vCPUs do not obey: {0}")]
    Vcpu(#[from] VcpuError),
}

/// The socket, and the session of the client that is there.
pub struct Debugger {
    listener: Listener,
    session: Option<Session>,
}

impl Debugger {
    /// Listens at `path`, which nothing may have yet.
    ///
    /// # Errors
    /// Say what is wrong with the path, or who has it.
    pub fn bind(path: &Path) -> Result<Debugger, SocketError> {
        Ok(Debugger { listener: Listener::bind(SOCKET, path, Some(MODE))?, session: None })
    }

    /// What to wait for.
    pub fn watch(&self) -> [libc::pollfd; 2] {
        let watch = |fd, events| libc::pollfd { fd, events, revents: 0 };
        let client = self.session.as_ref().map_or(watch(-1, 0), |session| {
            let events = if session.unsent { libc::POLLOUT } else { libc::POLLIN };
            watch(session.socket.as_raw_fd(), events)
        });
        [watch(self.listener.as_fd().as_raw_fd(), libc::POLLIN), client]
    }

    /// Serves who has come and what was sent, without waiting.
    pub fn serve(&mut self, vm: &mut Vm) {
        self.with(vm, Session::serve);
        for _ in 0..ACCEPTS {
            let Ok(socket) = self.listener.accept() else { break };
            match &self.session {
                Some(_) => log::warn!("A second debugger was turned away"),
                None => self.begin(socket, vm),
            }
        }
    }

    /// A vCPU met what was set. Called for each, and possibly late.
    pub fn met(&mut self, vm: &mut Vm) {
        match &self.session {
            Some(_) => self.with(vm, Session::met),
            // Set by a client that is gone: whoever stands there goes on.
            None => {
                let went_on = vm.vcpus.hold().and_then(|()| vm.vcpus.release(0));
                went_on.unwrap_or_else(|e| log::error!("The guest cannot go on: {e}"));
            }
        }
    }

    /// The machine has got vCPUs, which do not run yet: they stop where the others do.
    pub fn vcpus_added(&mut self, vm: &mut Vm) {
        self.with(vm, |session| {
            session.guest.set_added()?;
            let stub = session.stub.take().ok_or(Over::Gone)?;
            session.settle(stub)
        });
    }

    /// The guest is over.
    pub fn ended(&mut self, vm: &mut Vm, code: i32) {
        let Some(mut session) = self.session.take() else { return };
        std::mem::swap(&mut session.guest.vcpus, &mut vm.vcpus);
        // The client may be gone, or not waiting for this.
        let _ = session.report(Reason::Exited(u8::try_from(code).unwrap_or(1)));
        let _ = session.send();
        std::mem::swap(&mut session.guest.vcpus, &mut vm.vcpus);
    }

    /// Calls `f` while guest memory is what the guest has written, without breakpoints in it.
    pub fn without_breakpoints<T>(&self, f: impl FnOnce() -> T) -> T {
        let guest = self.session.as_ref().map(|session| &session.guest);
        guest.inspect(|guest| guest.lift());
        let result = f();
        guest.inspect(|guest| guest.plant());
        result
    }

    fn begin(&mut self, socket: OwnedFd, vm: &mut Vm) {
        let mut session = Session::new(socket, vm);
        std::mem::swap(&mut session.guest.vcpus, &mut vm.vcpus);
        let begun = session.begin();
        std::mem::swap(&mut session.guest.vcpus, &mut vm.vcpus);
        self.session = Some(session);
        match begun {
            Ok(()) => log::info!("A debugger is attached; the guest stands still for it"),
            Err(over) => self.end(vm, &over),
        }
    }

    /// Calls `f` for the session, with the vCPUs lent to it, and ends it if that is its end.
    fn with(&mut self, vm: &mut Vm, f: impl FnOnce(&mut Session) -> Result<(), Over>) {
        let Some(session) = &mut self.session else { return };
        std::mem::swap(&mut session.guest.vcpus, &mut vm.vcpus);
        let outcome = f(session).and_then(|()| session.send());
        std::mem::swap(&mut session.guest.vcpus, &mut vm.vcpus);
        if let Err(over) = outcome {
            self.end(vm, &over);
        }
    }

    fn end(&mut self, vm: &mut Vm, over: &Over) {
        let Some(mut session) = self.session.take() else { return };
        std::mem::swap(&mut session.guest.vcpus, &mut vm.vcpus);
        let _ = session.send();
        let went_on = session.guest.let_go();
        std::mem::swap(&mut session.guest.vcpus, &mut vm.vcpus);
        match went_on {
            Ok(()) => log::info!("The debugger left ({over}); the guest goes on"),
            Err(e) => log::error!("The debugger left ({over}), and the guest cannot go on: {e}"),
        }
    }
}

struct Session {
    socket: OwnedFd,
    /// Absent only while it is worked with, and after an error.
    stub: Option<Stub>,
    /// The client has answers to take before it is listened to again.
    unsent: bool,
    guest: Guest,
}

impl Session {
    fn new(socket: OwnedFd, vm: &Vm) -> Session {
        let block = guest::blocks_interrupts(vm.host.vm());
        let guest = Guest::new(vm.memory.clone(), vm.shape.clone(), block);
        Session { socket, stub: None, unsent: false, guest }
    }

    fn begin(&mut self) -> Result<(), Over> {
        self.guest.stop()?;
        let stub = GdbStub::new(Wire::default()).run_state_machine(&mut self.guest);
        self.stub = Some(stub.map_err(protocol)?);
        Ok(())
    }

    fn serve(&mut self) -> Result<(), Over> {
        self.send()?;
        if self.unsent {
            return Ok(());
        }
        let mut piece = [0; PIECE];
        let got = match rustix::io::read(&self.socket, &mut piece) {
            Ok(0) => return Err(Over::Gone),
            Ok(got) => got,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(e) => return Err(Over::Socket(e.into())),
        };
        piece.iter().take(got).try_for_each(|byte| self.take(*byte))
    }

    fn take(&mut self, byte: u8) -> Result<(), Over> {
        let next = match self.stub.take().ok_or(Over::Gone)? {
            Stub::Idle(stub) => stub.incoming_data(&mut self.guest, byte).map_err(protocol)?,
            Stub::Running(stub) => stub.incoming_data(&mut self.guest, byte).map_err(protocol)?,
            other => other,
        };
        self.settle(next)
    }

    /// Does what the protocol asks for besides answers.
    fn settle(&mut self, mut stub: Stub) -> Result<(), Over> {
        let guest = &mut self.guest;
        let over = loop {
            stub = match stub {
                Stub::CtrlCInterrupt(inner) => {
                    let reason = guest.interrupt()?;
                    inner.interrupt_handled(guest, reason).map_err(protocol)?
                }
                Stub::Running(inner) => match guest.next_pending() {
                    Some(reason) => inner.report_stop(guest, reason).map_err(protocol)?,
                    None => {
                        stub = inner.into();
                        break Ok(());
                    }
                },
                Stub::Disconnected(_) => break Err(Over::Detached),
                Stub::Idle(_) => break Ok(()),
            };
        };
        // Also at the end: the last answer is still to be sent.
        self.stub = Some(stub);
        over
    }

    fn met(&mut self) -> Result<(), Over> {
        if !matches!(self.stub, Some(Stub::Running(_))) {
            return Ok(());
        }
        match self.guest.stop_if_met()? {
            Some(reason) => self.report(reason),
            None => Ok(()),
        }
    }

    /// Tells the client why the guest that it lets run does not.
    fn report(&mut self, reason: Reason) -> Result<(), Over> {
        match self.stub.take() {
            Some(Stub::Running(stub)) => {
                let next = stub.report_stop(&mut self.guest, reason).map_err(protocol)?;
                self.settle(next)
            }
            other => {
                self.stub = other;
                Ok(())
            }
        }
    }

    /// Sends what the socket takes.
    fn send(&mut self) -> Result<(), Over> {
        let Some(wire) = self.stub.as_mut().map(wire) else { return Ok(()) };
        while !wire.waiting.is_empty() {
            match rustix::net::send(&self.socket, &wire.waiting, SendFlags::NOSIGNAL) {
                Ok(sent) => drop(wire.waiting.drain(..sent)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(e) => return Err(Over::Socket(e.into())),
            }
        }
        self.unsent = !wire.waiting.is_empty();
        Ok(())
    }
}

fn wire(stub: &mut Stub) -> &mut Wire {
    match stub {
        Stub::Idle(inner) => inner.borrow_conn(),
        Stub::Running(inner) => inner.borrow_conn(),
        Stub::CtrlCInterrupt(inner) => inner.borrow_conn(),
        Stub::Disconnected(inner) => inner.borrow_conn(),
    }
}

fn protocol<E: std::fmt::Display>(error: E) -> Over {
    Over::Protocol(error.to_string())
}
