//! What every virtio register does, once for both transports.
//!
//! ```text
//!   vCPU ─► MmioTransport / PciTransport ─► Mutex<Core> ─► dyn VirtioDevice
//!                      │                        │  status, features, queue set-up,
//!                      │ no lock                │  doorbells, pause, save, restore
//!                      ▼                        ▼
//!   worker ─► Interrupt ─► Flags (atomics): interrupt status, generation, needs reset
//! ```
//!
//! A transport decodes an address and calls a method here; nothing about *when* something is
//! allowed is decided anywhere else. The rules:
//!
//! - the status register only moves along the ladder of [`status`], or back to 0;
//! - features are writable before `FEATURES_OK`, queues only between `FEATURES_OK` and
//!   `DRIVER_OK`; everything else a driver writes is ignored and the old value stays;
//! - what the driver set up is checked when it says `DRIVER_OK`. If it cannot be served the
//!   device says `DEVICE_NEEDS_RESET`, and a reset makes it whole again;
//! - every number from the guest that selects something goes through `get`.
//!
//! Locks: vCPU threads and the machine's owner hold the mutex around a [`Core`] while a
//! device is stopped, and stopping waits for a worker. So a worker must never need that
//! mutex. Whatever it can call, the [`Interrupt`] of the transport, works on [`Flags`] and at
//! most on locks that are never held while waiting.

mod queues;
mod saved;
pub mod status;
#[cfg(test)]
mod tests;

use std::{
    mem,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
};

use self::{queues::Queues, status::Step};
pub use self::{
    queues::{Bells, Ring, Slot},
    saved::KIND,
};
use crate::{
    Memory,
    host::Host,
    state::Section,
    trouble::{Trouble, Witness},
    virtio::{Active, Change, DeviceError, Interrupt, Report, VirtioDevice, queue::Queue, severed::Severed},
    worker::Worker,
};

/// Interrupt status: a queue has used buffers (VIRTIO 1.2 section 4.2.2, 4.1.4.5).
pub const ISR_QUEUE: u32 = 1;
/// Interrupt status: the configuration changed.
pub const ISR_CONFIG: u32 = 2;

/// The part of a device's state that workers change, readable and writable without a lock.
#[derive(Default)]
pub struct Flags {
    isr: AtomicU32,
    generation: AtomicU32,
    needs_reset: AtomicBool,
    resets_wanted: AtomicU64,
    interrupts: AtomicU64,
    witness: OnceLock<Witness>,
}

impl Flags {
    /// Tells whoever watches the device of trouble.
    pub fn report(&self, trouble: Trouble) {
        if let Some(witness) = self.witness.get() {
            witness(trouble);
        }
    }

    /// Has a witness told of trouble from now on. Only the first one counts.
    pub fn watch(&self, witness: Witness) {
        let _ = self.witness.set(witness);
    }

    /// Counts an interrupt that is sent.
    pub fn count_interrupt(&self) {
        self.interrupts.fetch_add(1, Ordering::Relaxed);
    }

    /// Interrupt status bits that wait for the driver.
    pub fn isr(&self) -> u32 {
        self.isr.load(Ordering::SeqCst)
    }

    /// Sets interrupt status bits. Done before the interrupt itself is raised, so that the
    /// driver finds them.
    pub fn raise(&self, bits: u32) {
        self.isr.fetch_or(bits, Ordering::SeqCst);
    }

    /// Clears interrupt status bits and returns what was set before.
    pub fn acknowledge(&self, bits: u32) -> u32 {
        self.isr.fetch_and(!bits, Ordering::SeqCst)
    }

    /// Configuration generation (VIRTIO 1.2 section 2.5.1).
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Notes that the configuration changed.
    pub fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    /// Whether the device asked for a reset.
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// Notes that the device cannot go on; true when it is news.
    pub fn set_needs_reset(&self) -> bool {
        let news = !self.needs_reset.swap(true, Ordering::SeqCst);
        if news {
            self.resets_wanted.fetch_add(1, Ordering::Relaxed);
            self.report(Trouble::NeedsReset);
        }
        news
    }

    fn clear(&self) {
        self.isr.store(0, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
    }
}

/// Where a device is plugged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Location {
    /// Registers at a guest-physical address, with an interrupt line.
    Mmio {
        /// First address of the registers.
        base: u64,
        /// Interrupt line.
        gsi: u32,
    },
    /// A function of PCI bus 0.
    Pci {
        /// Device number, 0 to 31.
        slot: u8,
    },
}

/// A plugged device as the owner of the machine sees it, whatever its transport.
///
/// The owner stops the vCPUs before it pauses, and restores before it resumes.
pub trait Transport: Send + Sync {
    /// What the device is.
    fn about(&self) -> &super::About;

    /// Where it is plugged.
    fn location(&self) -> Location;

    /// Stops the device and keeps what the driver set up. Does nothing when paused already.
    /// An error means the device did not let go of its queues: it is broken from then on.
    fn pause(&self) -> Result<(), DeviceError>;

    /// Goes on after a pause or a restore. Every queue is looked at once, so that nothing
    /// that came meanwhile is missed.
    fn resume(&self) -> Result<(), DeviceError>;

    /// State of transport and device. Refused while the device runs.
    fn save(&self) -> Result<Vec<Section>, DeviceError>;

    /// Takes over what [`Transport::save`] of the same kind of device and transport returned.
    /// The device stays paused until [`Transport::resume`]. Refused while it runs.
    fn restore(&self, sections: &[Section]) -> Result<(), DeviceError>;

    /// Makes a live change to the device.
    fn update(&self, change: &Change) -> Result<(), DeviceError>;

    /// Whether a driver of the guest holds the device.
    fn driven(&self) -> bool;

    /// Takes away all that is behind the registers. They go on answering, and nothing is served.
    fn sever(&self);

    /// Counters of device and transport, by name.
    fn counters(&self) -> Vec<(&'static str, u64)>;

    /// What else the device says of itself.
    fn report(&self) -> Report;

    /// Has `witness` told of trouble with the device from now on. Only the first one counts.
    fn watch(&self, witness: Witness);
}

/// What a transport gives its core.
pub struct Plug {
    /// The device behind the registers.
    pub device: Box<dyn VirtioDevice>,
    /// Guest memory.
    pub memory: Memory,
    /// The thread devices run on unless they have their own.
    pub worker: Worker,
    /// Where doorbells come from.
    pub host: Arc<dyn Host>,
    /// Lock-free state, shared with `interrupt`.
    pub flags: Arc<Flags>,
    /// How the device reaches its driver. Must not take the lock around the core.
    pub interrupt: Arc<dyn Interrupt>,
    /// Where the doorbells of the queues are; `None` while the transport is not decoded.
    pub bells: Option<Bells>,
}

/// Registers that select what other registers show.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Select {
    /// Which 32 bits of the offered features are shown.
    pub offered: u32,
    /// Which 32 bits of the accepted features are shown and written.
    pub accepted: u32,
    /// Which queue is shown and written.
    pub queue: u32,
}

/// The one state machine behind the registers of a virtio device.
pub struct Core {
    device: Box<dyn VirtioDevice>,
    memory: Memory,
    worker: Worker,
    flags: Arc<Flags>,
    interrupt: Arc<dyn Interrupt>,
    status: u8,
    accepted: u64,
    queues: Queues,
    /// The selecting registers; any value is fine here.
    pub select: Select,
    running: bool,
    /// Queues the running device was given.
    lent: usize,
    paused: bool,
    /// The device once failed to stop: it may still be using its queues.
    broken: bool,
    /// Starts that failed.
    activate_fails: u64,
    /// Writes to the configuration that lay outside of it.
    cfg_fails: u64,
}

impl Core {
    /// The core of a device nobody has driven yet.
    pub fn new(plug: Plug) -> Core {
        let queues = Queues::new(&plug.device.about().queues, plug.host, plug.bells);
        Core {
            device: plug.device,
            memory: plug.memory,
            worker: plug.worker,
            flags: plug.flags,
            interrupt: plug.interrupt,
            status: 0,
            accepted: 0,
            queues,
            select: Select::default(),
            running: false,
            lent: 0,
            paused: false,
            broken: false,
            activate_fails: 0,
            cfg_fails: 0,
        }
    }

    /// The status register: what the driver set, and `DEVICE_NEEDS_RESET`. After a reset it is
    /// 0 even when the device did not survive that: drivers wait for 0 without end (VIRTIO 1.2
    /// section 4.1.4.3.2).
    pub fn status(&self) -> u8 {
        let broken = self.status != 0 && self.flags.needs_reset();
        self.status | if broken { status::NEEDS_RESET } else { 0 }
    }

    /// A write to the status register (VIRTIO 1.2 sections 2.1 and 3.1).
    pub fn set_status(&mut self, written: u8) {
        match status::next(self.status, written) {
            Step::Reset => self.reset(),
            Step::Ignore => log::debug!(
                "A driver's write of {written:#x} to the status {:#x} of a {} was ignored",
                self.status,
                self.kind()
            ),
            Step::To(to) => {
                let added = to & !self.status;
                // A device that is given up agrees to nothing, so that its driver gives up too
                // instead of waiting for answers.
                let agreed = !self.broken && self.acceptable(self.accepted);
                if added & status::FEATURES_OK != 0 && !agreed {
                    return;
                }
                self.status = to;
                if added & status::DRIVER_OK != 0 {
                    self.activate();
                }
            }
        }
    }

    /// The selected 32 bits of the offered features.
    pub fn offered(&self) -> u32 {
        half(self.device.about().features, self.select.offered)
    }

    /// The selected 32 bits of the accepted features.
    pub fn accepted(&self) -> u32 {
        half(self.accepted, self.select.accepted)
    }

    /// Writes the selected 32 bits of the accepted features; ignored outside the time between
    /// `DRIVER` and `FEATURES_OK`.
    pub fn accept(&mut self, bits: u32) {
        let negotiating = self.status & (status::DRIVER | status::FEATURES_OK | status::FAILED);
        if negotiating == status::DRIVER && self.select.accepted < 2 {
            let shift = 32 * self.select.accepted;
            self.accepted = self.accepted & !(0xffff_ffff << shift) | u64::from(bits) << shift;
        }
    }

    /// The selected queue as the driver sees it; `None` when there is no such queue.
    pub fn queue(&self) -> Option<&Slot> {
        self.queues.get(self.select.queue)
    }

    /// The selected queue for a change by the driver; `None` as well while queues may not be
    /// changed.
    pub fn queue_mut(&mut self) -> Option<&mut Slot> {
        let set_up = self.status & (status::FEATURES_OK | status::DRIVER_OK | status::FAILED);
        if set_up == status::FEATURES_OK { self.queues.get_mut(self.select.queue) } else { None }
    }

    /// Whether the driver has said `DRIVER_OK`: the set-up is frozen.
    pub fn frozen(&self) -> bool {
        self.status & status::DRIVER_OK != 0
    }

    /// A doorbell write that came as an ordinary register write.
    pub fn notify(&self, queue: u32) {
        if self.running {
            self.queues.ring(queue);
        }
    }

    /// Reads the device configuration. Bytes beyond its end are all ones.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let rest = u64::from(self.device.about().config_len).saturating_sub(offset);
        let len = data.len().min(usize::try_from(rest).unwrap_or(usize::MAX));
        if let (Ok(offset), Some(inside @ [_, ..])) = (u32::try_from(offset), data.get_mut(..len)) {
            self.device.read_config(offset, inside);
        }
    }

    /// Writes the device configuration; dropped unless it lies inside.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        let end = offset.checked_add(data.len() as u64);
        let inside = end.is_some_and(|end| end <= u64::from(self.device.about().config_len));
        if let (true, false, Ok(offset)) = (inside, data.is_empty(), u32::try_from(offset)) {
            self.device.write_config(offset, data);
        } else {
            self.cfg_fails += 1;
        }
    }

    /// Moves the doorbells to where the transport is decoded now. A running device is stopped
    /// for the moment: its doorbell descriptors change.
    pub fn move_bells(&mut self, bells: Option<Bells>) {
        let was_running = self.running;
        if self.stop().is_ok() {
            self.queues.move_to(bells);
            if was_running {
                self.activate();
            }
        }
    }

    /// Stops the device and keeps the queues' positions.
    pub fn pause(&mut self) -> Result<(), DeviceError> {
        self.paused = true;
        self.stop()
    }

    /// Starts the device again if its driver had started it.
    pub fn resume(&mut self) -> Result<(), DeviceError> {
        self.paused = false;
        if self.frozen() && !self.running { self.start() } else { Ok(()) }
    }

    /// Makes a live change.
    pub fn update(&mut self, change: &Change) -> Result<(), DeviceError> {
        self.device.update(change)
    }

    /// Whether a driver holds the device: it said so, and has neither reset the device since nor
    /// given it up. That somebody has noticed the device does not count: Linux says that of devices
    /// that its drivers have let go of.
    pub fn driven(&self) -> bool {
        self.status & (status::DRIVER | status::FAILED) == status::DRIVER
    }

    /// Stops the device, drops it and tells the driver. What is left answers as before and serves
    /// nothing.
    pub fn sever(&mut self) {
        if let Err(error) = self.stop() {
            log::error!("A {} that is taken from its guest does not stop: {error}", self.kind());
        }
        self.device = Box::new(Severed::instead_of(&*self.device));
        self.interrupt.needs_reset();
    }

    /// The device's counters and those that every device has.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut counters = self.device.counters();
        counters.push(("needs_reset", self.flags.resets_wanted.load(Ordering::Relaxed)));
        counters.push(("interrupts", self.flags.interrupts.load(Ordering::Relaxed)));
        counters.push(("activate_fails", self.activate_fails));
        counters.push(("cfg_fails", self.cfg_fails));
        counters
    }

    /// What else the device says of itself.
    pub fn report(&self) -> Report {
        self.device.report()
    }

    fn kind(&self) -> &'static str {
        self.device.about().kind
    }

    fn acceptable(&self, features: u64) -> bool {
        features & !self.device.about().features == 0 && features & super::F_VERSION_1 != 0
    }

    /// `DRIVER_OK`: starts, or tells the driver that it cannot be.
    fn activate(&mut self) {
        if let Err(error) = self.start() {
            self.activate_fails += 1;
            log::warn!("A {} cannot be started as its driver set it up: {error}", self.kind());
            self.interrupt.needs_reset();
        }
    }

    fn start(&mut self) -> Result<(), DeviceError> {
        // A device that asked for a reset is left alone until it gets one.
        if self.paused || self.broken || self.flags.needs_reset() {
            return Ok(());
        }
        let queues = self.queues.build(self.accepted, &self.memory)?;
        self.lent = queues.len();
        self.device.start(Active {
            memory: self.memory.clone(),
            features: self.accepted,
            queues,
            interrupt: Arc::clone(&self.interrupt),
            worker: self.worker.clone(),
        })?;
        self.running = true;
        Ok(())
    }

    fn stop(&mut self) -> Result<(), DeviceError> {
        if !mem::take(&mut self.running) {
            return Ok(());
        }
        // A queue that does not come back (a live change went wrong half-way) may still be
        // served, and how far it came is not known.
        let whole = |queues: Vec<Queue>| {
            if queues.len() == self.lent { Ok(queues) } else { Err(lost(&queues, self.lent)) }
        };
        match self.device.stop().and_then(whole) {
            Ok(queues) => {
                self.queues.take_back(&queues);
                Ok(())
            }
            Err(error) => {
                // Something may still run with these queues. Nothing else gets them.
                self.broken = true;
                self.flags.set_needs_reset();
                Err(error)
            }
        }
    }

    /// Back to the state before any driver, at any point (VIRTIO 1.2 section 2.4).
    fn reset(&mut self) {
        if let Err(error) = self.stop() {
            log::error!("A {} did not stop for a reset and is given up: {error}", self.kind());
        }
        self.status = 0;
        self.accepted = 0;
        self.select = Select::default();
        self.queues.reset();
        if !self.broken {
            self.device.reset();
            self.flags.clear();
        }
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        let _ = self.stop();
        self.queues.reset();
    }
}

fn lost(back: &[Queue], lent: usize) -> DeviceError {
    let what = format!("Only {} of {lent} queues came back from a device that was stopped", back.len());
    DeviceError::Host { what, source: std::io::ErrorKind::BrokenPipe.into() }
}

/// 32 of 64 feature bits; further ones do not exist.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}
