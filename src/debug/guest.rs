//! The guest as the protocol sees it: threads are vCPUs, numbered from 1.
//!
//! The protocol's own state machine allows some packets while the guest runs that make no sense
//! then; here is where they are refused: nothing is read or written, and nobody is let run
//! twice, unless the guest stands still for the debugger.

use std::sync::Arc;

use arch::{
    debug::{self, BLOCK, DESCRIPTION, Exception, Met, PC, Registers, Settings},
    state::StateShape,
};
use devices::Memory;
use gdbstub::{
    arch::{Arch, Registers as Block},
    common::{Signal, Tid},
    stub::MultiThreadStopReason,
    target::{
        Target, TargetError, TargetResult,
        ext::{
            base::{
                BaseOps,
                multithread::{
                    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
                    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
                },
            },
            breakpoints::{
                Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps,
                SwBreakpoint, SwBreakpointOps, WatchKind,
            },
            monitor_cmd::{ConsoleOutput, MonitorCmd, MonitorCmdOps, outputln},
            thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps},
        },
    },
};
use vm_memory::{Bytes, GuestAddress};

use super::breakpoints::{Asked, Planted, Purpose, Watched};
use crate::vcpu::{VcpuError, Vcpus};

/// What a page is at least; a translation holds within one.
const PAGE: u64 = 4096;
/// From here on addresses are the kernel's, and lead to the same place in every process.
const KERNEL: u64 = 1 << 63;
/// What is answered when an address leads nowhere: `EFAULT`.
const NOWHERE: u8 = 14;

/// Why a guest stands still, in the protocol's words.
pub type Reason = MultiThreadStopReason<u64>;

/// x86_64, with the registers that [`arch::debug::DESCRIPTION`] names.
pub enum X86 {}

impl Arch for X86 {
    type Usize = u64;
    type Registers = RegisterBlock;
    type BreakpointKind = usize;
    type RegId = ();

    fn target_description_xml() -> Option<&'static str> {
        Some(DESCRIPTION)
    }
}

/// All registers of a vCPU as they go over the wire.
#[derive(Clone, Debug, PartialEq)]
pub struct RegisterBlock([u8; BLOCK]);

impl Default for RegisterBlock {
    fn default() -> RegisterBlock {
        RegisterBlock([0; BLOCK])
    }
}

impl Block for RegisterBlock {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        self.0[PC..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        self.0.iter().for_each(|byte| write_byte(Some(*byte)));
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        self.0 = *<&[u8; BLOCK]>::try_from(bytes).map_err(|_| ())?;
        Ok(())
    }
}

/// A guest that a debugger is attached to.
pub struct Guest {
    /// The machine's vCPUs, lent for the time of one call; see [`super::Session`].
    pub vcpus: Vcpus,
    memory: Memory,
    shape: Arc<StateShape>,
    block_interrupts: bool,
    planted: Planted,
    watched: Watched,
    /// What each vCPU is set to.
    settings: Vec<Settings>,
    /// The vCPU that stopped last; its view of memory is the one that breakpoints are set in.
    current: usize,
    /// Addresses are physical.
    physical: bool,
    stopped: bool,
    /// What other vCPUs met when the guest stopped and would not meet again.
    pending: Vec<Reason>,
    /// vCPUs that were named when the debugger let the guest run, and those among them that step.
    named: u64,
    steps: u64,
    /// vCPUs that it did not let run.
    held: u64,
    locked: bool,
}

impl Guest {
    /// A guest that runs.
    pub fn new(memory: Memory, shape: Arc<StateShape>, block_interrupts: bool) -> Guest {
        Guest {
            vcpus: Vcpus::default(),
            memory,
            shape,
            block_interrupts,
            planted: Planted::default(),
            watched: Watched::default(),
            settings: Vec::new(),
            current: 0,
            physical: false,
            stopped: false,
            pending: Vec::new(),
            named: 0,
            steps: 0,
            held: 0,
            locked: false,
        }
    }

    /// Stops the guest, and says what stopped it if it was not this.
    pub fn stop(&mut self) -> Result<Option<Reason>, VcpuError> {
        self.vcpus.hold()?;
        self.stopped = true;
        let mut first = None;
        for (index, exit) in self.vcpus.take_stops() {
            let reason = self.met(index, &exit)?;
            match (first, reason) {
                (None, Some(reason)) => {
                    self.current = index;
                    first = Some(reason);
                }
                // A breakpoint is met again when its vCPU goes on; a change of memory is not.
                (Some(_), Some(reason @ Reason::Watch { .. })) => self.pending.push(reason),
                _ => {}
            }
        }
        Ok(first)
    }

    /// Stops the guest because a vCPU has met something. `None` when that was the guest's own
    /// affair; it goes on then.
    pub fn stop_if_met(&mut self) -> Result<Option<Reason>, VcpuError> {
        let reason = self.stop()?;
        if reason.is_none() {
            self.stopped = false;
            self.vcpus.release(self.held)?;
        }
        Ok(reason)
    }

    /// Stops the guest because the debugger says so; `None` when it stands still already.
    pub fn interrupt(&mut self) -> Result<Option<Reason>, VcpuError> {
        if self.stopped {
            return Ok(None);
        }
        let interrupted = Reason::SignalWithThread { tid: tid(self.current), signal: Signal::SIGINT };
        Ok(Some(self.stop()?.unwrap_or(interrupted)))
    }

    /// Why the guest that was just let run stands still all the same.
    pub fn next_pending(&mut self) -> Option<Reason> {
        if self.stopped {
            return None;
        }
        let reason = self.pending.pop()?;
        self.stopped = true;
        Some(reason)
    }

    /// Takes away all that was set, and lets the guest run.
    pub fn let_go(&mut self) -> Result<(), VcpuError> {
        self.vcpus.hold()?;
        self.planted.clear(&self.memory);
        self.watched = Watched::default();
        (self.stopped, self.steps) = (false, 0);
        self.pending.clear();
        let set = self.set_all();
        self.vcpus.release(0)?;
        set
    }

    /// Puts the guest's own bytes back into memory for a while; see [`Planted::lift`].
    pub fn lift(&self) {
        self.planted.lift(&self.memory);
    }

    /// Ends what [`Guest::lift`] began.
    pub fn plant(&self) {
        self.planted.plant(&self.memory);
    }

    /// Sets vCPUs that were added to stop where the others do. When all stand still that is done
    /// as they go on.
    pub fn set_added(&mut self) -> Result<(), VcpuError> {
        if self.stopped {
            return Ok(());
        }
        let reason = self.stop()?;
        self.stopped = false;
        self.pending.extend(reason);
        self.set_all()?;
        if self.pending.is_empty() { self.vcpus.release(self.held) } else { Ok(()) }
    }

    /// Sets all vCPUs, each of which stands still, to stop where they are to.
    fn set_all(&mut self) -> Result<(), VcpuError> {
        self.settings.resize(self.vcpus.count(), Settings::default());
        for index in 0..self.settings.len() {
            let wanted = Settings {
                watchpoints: self.watched.registers(),
                software: !self.planted.is_empty(),
                step: self.steps >> index & 1 == 1,
                block_interrupts: self.block_interrupts,
            };
            // A step is set again at each: KVM remembers where it began.
            if wanted.step || wanted.to_kvm() != self.settings[index].to_kvm() {
                let debug = wanted.to_kvm();
                let set = self.vcpus.on(index, move |fd| fd.set_guest_debug(&debug))?;
                set.map_err(|source| VcpuError::Debug { index, source })?;
            }
            self.settings[index] = wanted;
        }
        Ok(())
    }

    /// What an exit of a vCPU is to the debugger; what is the guest's own is given back to it.
    fn met(
        &mut self,
        index: usize,
        exit: &kvm_bindings::kvm_debug_exit_arch,
    ) -> Result<Option<Reason>, VcpuError> {
        let settings = self.settings.get(index).copied().unwrap_or_default();
        let tid = tid(index);
        let exception = match settings.met(exit) {
            Met::Step => return Ok(Some(Reason::SignalWithThread { tid, signal: Signal::SIGTRAP })),
            Met::Watchpoint(slot) => {
                return Ok(self.watched.at(slot).map(|asked| match asked.purpose {
                    Purpose::Break => Reason::HwBreak(tid),
                    Purpose::Watch(kind) => Reason::Watch { tid, kind, addr: asked.address },
                }));
            }
            Met::Breakpoint => {
                let place = self.translate(index, exit.pc)?;
                if place.is_some_and(|physical| self.planted.at(physical)) {
                    return Ok(Some(Reason::SwBreak(tid)));
                }
                Exception::Breakpoint
            }
            Met::Foreign => Exception::Debug,
        };
        let debug = settings.to_kvm_with(exception);
        let given = self.vcpus.on(index, move |fd| fd.set_guest_debug(&debug))?;
        if let Err(e) = given {
            log::warn!("vCPU {index} could not be given its own exception back: {e}");
        }
        Ok(None)
    }

    /// The vCPU of a thread, if it can be looked at.
    fn standing(&self, tid: Tid) -> Result<usize, TargetError<VcpuError>> {
        let index = tid.get() - 1;
        let there = self.stopped && index < self.vcpus.count();
        if there { Ok(index) } else { Err(TargetError::NonFatal) }
    }

    /// Where an address leads to. The kernel's addresses lead to the same place for all, so that
    /// one that a vCPU does not map, because it is in a program, or not yet started, is looked up
    /// with the others too.
    fn locate(&self, index: usize, address: u64) -> Result<Option<u64>, VcpuError> {
        if self.physical {
            return Ok(Some(address));
        }
        let found = self.translate(index, address)?;
        if found.is_some() || address < KERNEL {
            return Ok(found);
        }
        for other in (0..self.vcpus.count()).filter(|other| *other != index) {
            if let Some(physical) = self.translate(other, address)? {
                return Ok(Some(physical));
            }
        }
        Ok(None)
    }

    /// Walks one vCPU's page tables, as they are in whatever mode it is in (`KVM_TRANSLATE`, KVM
    /// API section 4.15).
    fn translate(&self, index: usize, address: u64) -> Result<Option<u64>, VcpuError> {
        let translation = self.vcpus.on(index, move |fd| fd.translate_gva(address))?;
        Ok(translation.ok().filter(|found| found.valid != 0).map(|found| found.physical_address))
    }

    /// Calls `f` for each piece of a range that lies in one page, with its physical address and
    /// its place in the range, until one leads nowhere. Returns how far that went.
    fn walk(
        &mut self,
        index: usize,
        start: u64,
        len: usize,
        mut f: impl FnMut(&mut Guest, u64, std::ops::Range<usize>) -> bool,
    ) -> TargetResult<usize, Guest> {
        let nowhere = || TargetError::Errno(NOWHERE);
        start.checked_add(len as u64).ok_or_else(nowhere)?;
        let mut done = 0;
        while done < len {
            let place = self.locate(index, start + done as u64).map_err(TargetError::Fatal)?;
            let Some(physical) = place else { break };
            let piece = (len - done).min((PAGE - physical % PAGE) as usize);
            if !f(self, physical, done..done + piece) {
                break;
            }
            done += piece;
        }
        if done == 0 && len > 0 { Err(nowhere()) } else { Ok(done) }
    }

    fn bit(&self, tid: Tid) -> Result<u64, VcpuError> {
        let index = tid.get() - 1;
        if index < self.vcpus.count() { Ok(1 << index) } else { Err(VcpuError::Gone(index)) }
    }
}

fn tid(index: usize) -> Tid {
    Tid::MIN.saturating_add(index)
}

impl Target for Guest {
    type Arch = X86;
    type Error = VcpuError;

    fn base_ops(&mut self) -> BaseOps<'_, X86, VcpuError> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_monitor_cmd(&mut self) -> Option<MonitorCmdOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Guest {
    fn read_registers(&mut self, block: &mut RegisterBlock, tid: Tid) -> TargetResult<(), Self> {
        let (index, shape) = (self.standing(tid)?, Arc::clone(&self.shape));
        let read = self.vcpus.on(index, move |fd| Registers::read(fd, &shape)).map_err(TargetError::Fatal)?;
        block.0 = read.map_err(|_| TargetError::NonFatal)?.to_block();
        Ok(())
    }

    fn write_registers(&mut self, block: &RegisterBlock, tid: Tid) -> TargetResult<(), Self> {
        let (index, shape, block) = (self.standing(tid)?, Arc::clone(&self.shape), block.clone());
        let change = move |fd: &kvm_ioctls::VcpuFd| {
            let before = Registers::read(fd, &shape)?;
            let mut after = before.clone();
            after.set_block(&block.0);
            after.write(&before, fd, &shape)
        };
        let written = self.vcpus.on(index, change).map_err(TargetError::Fatal)?;
        written.map_err(|e| {
            log::info!("A debugger's registers were refused: {e}");
            TargetError::NonFatal
        })
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let index = self.standing(tid)?;
        self.walk(index, start, data.len(), |guest, physical, range| {
            let Some(piece) = data.get_mut(range) else { return false };
            let read = guest.memory.read_slice(piece, GuestAddress(physical)).is_ok();
            guest.planted.hide(physical, piece);
            read
        })
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let index = self.standing(tid)?;
        let done = self.walk(index, start, data.len(), |guest, physical, range| {
            data.get(range).is_some_and(|piece| guest.planted.write(&guest.memory, physical, piece))
        })?;
        if done == data.len() { Ok(()) } else { Err(TargetError::Errno(NOWHERE)) }
    }

    fn list_active_threads(&mut self, thread_is_active: &mut dyn FnMut(Tid)) -> Result<(), VcpuError> {
        // The current one comes first: it is the one that a debugger takes for the one to show.
        thread_is_active(tid(self.current));
        let others = (0..self.vcpus.count()).filter(|index| *index != self.current);
        others.for_each(|index| thread_is_active(tid(index)));
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadResume for Guest {
    fn resume(&mut self) -> Result<(), VcpuError> {
        if !self.stopped {
            return Err(VcpuError::OutOfTurn(self.current));
        }
        self.held = if self.locked { !self.named } else { 0 };
        self.stopped = false;
        if self.pending.is_empty() {
            self.set_all()?;
            self.vcpus.release(self.held)?;
        }
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), VcpuError> {
        if !self.stopped {
            return Err(VcpuError::OutOfTurn(self.current));
        }
        (self.named, self.steps, self.locked) = (0, 0, false);
        Ok(())
    }

    fn set_resume_action_continue(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), VcpuError> {
        self.named |= self.bit(tid)?;
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for Guest {
    fn set_resume_action_step(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), VcpuError> {
        self.named |= self.bit(tid)?;
        self.steps |= self.bit(tid)?;
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for Guest {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), VcpuError> {
        self.locked = true;
        Ok(())
    }
}

impl Breakpoints for Guest {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Guest {
    fn add_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        let index = self.standing(tid(self.current))?;
        let place = self.locate(index, address).map_err(TargetError::Fatal)?;
        Ok(place.is_some_and(|physical| self.planted.add(&self.memory, address, physical)))
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.standing(tid(self.current))?;
        Ok(self.planted.remove(&self.memory, address))
    }
}

impl HwBreakpoint for Guest {
    fn add_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.standing(tid(self.current))?;
        Ok(self.watched.add(Asked { address, len: 1, purpose: Purpose::Break }))
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.standing(tid(self.current))?;
        Ok(self.watched.remove(Asked { address, len: 1, purpose: Purpose::Break }))
    }
}

impl HwWatchpoint for Guest {
    fn add_hw_watchpoint(&mut self, address: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        self.standing(tid(self.current))?;
        Ok(self.watched.add(Asked { address, len, purpose: Purpose::Watch(kind) }))
    }

    fn remove_hw_watchpoint(&mut self, address: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        self.standing(tid(self.current))?;
        Ok(self.watched.remove(Asked { address, len, purpose: Purpose::Watch(kind) }))
    }
}

impl ThreadExtraInfo for Guest {
    fn thread_extra_info(&self, tid: Tid, buffer: &mut [u8]) -> Result<usize, VcpuError> {
        let text = format!("vCPU {}", tid.get() - 1);
        let len = text.len().min(buffer.len());
        buffer[..len].copy_from_slice(&text.as_bytes()[..len]);
        Ok(len)
    }
}

impl MonitorCmd for Guest {
    fn handle_monitor_cmd(&mut self, command: &[u8], mut out: ConsoleOutput<'_>) -> Result<(), VcpuError> {
        match command {
            b"physical on" => self.physical = true,
            b"physical off" => self.physical = false,
            b"physical" => {}
            _ => {
                outputln!(
                    out,
                    "physical on|off   take addresses for physical ones, or for those of the vCPU"
                );
                return Ok(());
            }
        }
        outputln!(out, "Addresses are {}", if self.physical { "physical" } else { "those of the vCPU" });
        Ok(())
    }
}

/// Whether this KVM keeps interrupts away during steps.
pub fn blocks_interrupts(vm: &kvm_ioctls::VmFd) -> bool {
    debug::blocks_interrupts(vm.check_extension_raw(kvm_bindings::KVM_CAP_SET_GUEST_DEBUG2.into()))
}
