//! One machine: memory, vCPUs and devices, put together in the order that costs least.
//!
//! ```text
//!   Spec ──► build.rs ──► Vm { memory.rs, vCPU threads, attach.rs: buses and transports }
//!                               ▲ kvm.rs, host.rs: doorbells, lines, messages by KVM
//!                plug.rs: devices that come and go later
//! ```
//!
//! Order of creation, and why: the VM, then its memory slots, and only then the in-kernel
//! interrupt controllers. Once those exist, every change of the slots has to wait for readers
//! inside the kernel, which was measured at a hundred times the cost of the same call made
//! before. There is no interval timer (PIT): a guest that is told its clock rate never asks
//! for one. vCPUs come next, event descriptors last and only when a driver asks for them.
//!
//! Order of pausing: vCPUs first, so that no new work arrives, then devices, which finish or
//! put back what they hold. Resuming is the same backwards.

pub mod ahead;
pub mod annex;
pub mod attach;
pub mod boot_timer;
pub mod build;
pub mod capture;
pub mod console;
pub mod coredump;
pub mod cpu;
pub mod faults;
pub mod generation;
pub mod handed;
pub mod host;
pub mod image;
pub mod kvm;
pub mod lazy;
pub mod loading;
pub mod memory;
pub mod pages;
pub mod plug;
pub mod processors;
pub mod saved;
pub mod torn;

use std::{path::Path, sync::Arc};

use api::FaultKind;
use arch::{state::StateShape, template::Template};
use devices::{
    Memory,
    legacy::{
        i8042::{I8042, NotListening},
        power::Power,
        pvpanic::PvPanic,
    },
    virtio::{DeviceError, core::Transport},
};

use crate::{
    metrics::Milestones,
    snapshot::extents::Gathering,
    vcpu::{VcpuError, Vcpus},
};

/// Why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// The guest switched itself off.
    Off,
    /// The guest asked to be reset; a machine boots once, so this ends it too.
    Reset,
    /// The guest's processor met a fault while handling a fault while handling a fault:
    /// a crash, or the last of Linux's ways to reboot.
    TripleFault,
    /// The guest stopped its last processor where no interrupt can wake it.
    Halted,
    /// It was told to stop through its door.
    Stopped,
    /// A signal ended it.
    Signal(i32),
    /// KVM or the processor refused to go on.
    Broken(String),
}

impl Ending {
    /// The exit code of the process: 0 when the guest ended itself or was stopped as asked,
    /// 128 and the number for a signal, 1 when something broke.
    pub fn exit_code(&self) -> i32 {
        match self {
            Ending::Off | Ending::Reset | Ending::TripleFault | Ending::Halted | Ending::Stopped => 0,
            Ending::Signal(number) => 128 + number,
            Ending::Broken(_) => 1,
        }
    }

    /// The reason as a sentence.
    pub fn reason(&self) -> String {
        match self {
            Ending::Off => "The guest switched itself off".to_owned(),
            Ending::Reset => "The guest asked for a reset".to_owned(),
            Ending::TripleFault => "The guest ended by a triple fault".to_owned(),
            Ending::Halted => "The guest halted its last processor".to_owned(),
            Ending::Stopped => "The machine was stopped".to_owned(),
            Ending::Signal(number) => format!("Signal {number} ended the machine"),
            Ending::Broken(reason) => format!("The machine cannot go on: {reason}"),
        }
    }
}

/// What can go wrong with a machine that was built.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// A vCPU did not obey.
    #[error("The machine's processors do not obey")]
    Vcpu(#[from] VcpuError),
    /// A device did not obey.
    #[error("Device {name:?} does not obey")]
    Device {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: DeviceError,
    },
    /// The core file could not be written.
    #[error(transparent)]
    CoreDump(#[from] coredump::CoreDumpError),
    /// Its state could not be read.
    #[error("The machine's interrupt controllers or clock cannot be read")]
    Irqchip(#[from] arch::irqchip::IrqchipError),
    /// KVM does not tell what was written.
    #[error("KVM does not tell which pages were written")]
    DirtyLog(#[source] kvm_ioctls::Error),
    /// There is no keyboard controller.
    #[error("The machine has no keyboard controller to press Ctrl+Alt+Del on")]
    NoKeyboard,
    /// Nobody in the guest reads the keyboard.
    #[error("Ctrl+Alt+Del cannot be pressed")]
    Keyboard(#[source] NotListening),
}

impl VmError {
    /// Whose fault it is.
    pub fn kind(&self) -> FaultKind {
        match self {
            VmError::NoKeyboard | VmError::Keyboard(_) => FaultKind::Unsupported,
            VmError::CoreDump(error) => error.kind(),
            _ => FaultKind::Internal,
        }
    }
}

/// A built machine. Its vCPU threads exist and wait for orders.
pub struct Vm {
    pub(crate) vcpus: Vcpus,
    /// What of a vCPU is saved on this host.
    pub(crate) shape: Arc<StateShape>,
    /// What its CPUs were changed by.
    pub(crate) template: Template,
    /// Virtio devices by name, in the order the guest finds them.
    pub(crate) devices: Vec<(String, Arc<dyn Transport>)>,
    pub(crate) power: Arc<Power>,
    /// For processors that can come, if some can.
    pub(crate) room: Option<processors::Room>,
    pub(crate) i8042: Arc<I8042>,
    pub(crate) platform: saved::Platform,
    pub(crate) pvpanic: Option<Arc<PvPanic>>,
    pub(crate) milestones: Arc<Milestones>,
    /// What the machine booted with; kept mapped until the process ends.
    pub(crate) ram: Memory,
    /// The same with memory that can be plugged in.
    pub(crate) memory: Memory,
    pub(crate) consoles: console::Consoles,
    /// Where devices can still be put.
    pub(crate) places: attach::Places,
    /// PCI slots with what is left of devices that were taken by force.
    pub(crate) severed: Vec<plug::Left>,
    /// Memory besides the RAM.
    pub(crate) annex: annex::Annex,
    /// What shows through where there is no page of this machine's own.
    pub(crate) beneath: capture::Beneath,
    /// KVM records which pages are written.
    pub(crate) tracks_dirty_pages: bool,
    /// The same, but for one snapshot alone.
    pub(crate) watched: bool,
    /// Guest memory is of huge pages.
    pub(crate) huge_pages: bool,
    /// What was written before KVM's record began anew, and is in no snapshot.
    pub(crate) carried: Gathering,
    pub(crate) host: Arc<host::KvmHost>,
    /// Who brings pages of RAM that are missing.
    pub(crate) served: Option<lazy::Served>,
    /// Brings pages that the guest will need first.
    pub(crate) prefetching: Option<std::thread::JoinHandle<()>>,
}

impl Vm {
    /// Lets the guest run for the first time. Devices are started by their drivers.
    pub fn run(&self) -> Result<(), VmError> {
        Ok(self.vcpus.run()?)
    }

    /// Before the first run: keeps the guest from running until a debugger lets it.
    pub fn wait_for_debugger(&self) {
        self.vcpus.hold_from_the_start();
    }

    /// Stops vCPUs, then devices, where they are.
    pub fn pause(&self) -> Result<(), VmError> {
        self.vcpus.pause()?;
        self.each_device(|device| device.pause())
    }

    /// Goes on after a pause.
    pub fn resume(&mut self) -> Result<(), VmError> {
        self.prefetched();
        self.each_device(|device| device.resume())?;
        Ok(self.vcpus.run()?)
    }

    /// Whether processors can come while the machine runs.
    pub fn has_room_for_vcpus(&self) -> bool {
        self.room.is_some()
    }

    /// Adds processors until there are `wanted`. `before_they_run` is called when they are there
    /// and stand still. The guest is told, and what it does then is its own affair. When that
    /// fails the machine is as it was.
    pub fn add_vcpus(
        &mut self,
        wanted: u8,
        before_they_run: impl FnOnce(&mut Vm),
    ) -> Result<(), processors::AddError> {
        // At most 64.
        let have = self.vcpus.count() as u8;
        let room = self.room.as_mut().ok_or(processors::AddError::Room { wanted, room: have })?;
        room.fill(wanted, &mut self.vcpus, &self.host)?;
        before_they_run(self);
        self.vcpus.run_added()?;
        if let Some(room) = &self.room {
            room.announce(have, wanted, &self.power);
        }
        Ok(())
    }

    /// Presses the power button (ACPI 6.4 section 4.8.2.2.1.2): asks the guest to shut down.
    pub fn press_power_button(&self) -> Result<(), VmError> {
        self.power.press_power_button();
        Ok(())
    }

    /// Presses Ctrl+Alt+Del on the keyboard controller.
    pub fn press_ctrl_alt_del(&self) -> Result<(), VmError> {
        if !self.platform.keyboard {
            return Err(VmError::NoKeyboard);
        }
        self.i8042.send_ctrl_alt_del().map_err(VmError::Keyboard)
    }

    /// Interrupts every vCPU where it cannot be masked, running or paused: a guest that hangs
    /// says where, or crashes as it was told to do then.
    pub fn inject_nmi(&self) -> Result<(), VmError> {
        Ok(self.vcpus.nmi()?)
    }

    /// Writes RAM and registers to `path`, which must not exist; only while paused. Memory that
    /// was plugged in later is left out. Takes as
    /// long as the disk takes for the memory that the guest has used.
    pub fn core_dump(&self, path: &Path) -> Result<coredump::Written, VmError> {
        let vcpus = self.vcpus.save(&self.shape)?;
        Ok(coredump::write(path, &self.ram, &vcpus)?)
    }

    /// Waits, for a bounded time, until what the guest printed has left.
    pub fn finish_consoles(&self) {
        self.consoles.finish();
    }

    /// The device of a kind (as in [`devices::virtio::About`]) by its name.
    pub fn device(&self, kind: &str, name: &str) -> Option<&Arc<dyn Transport>> {
        let mut devices = self.devices.iter();
        devices.find(|(known, device)| known == name && device.about().kind == kind).map(|(_, device)| device)
    }

    /// When what was reached.
    pub fn milestones(&self) -> &Milestones {
        &self.milestones
    }

    /// Exits handed to this process so far, by kind.
    pub fn exits(&self) -> Vec<(&'static str, u64)> {
        self.vcpus.exits()
    }

    /// Counters of every device: its name, the counter's name, the count.
    pub fn counters(&self) -> Vec<(String, &'static str, u64)> {
        let of = |(name, device): &(String, Arc<dyn Transport>)| {
            let counters = device.counters().into_iter();
            counters.map(|(counter, count)| (name.clone(), counter, count)).collect::<Vec<_>>()
        };
        let serial = self.consoles.counters().into_iter();
        let serial = serial.map(|(counter, count)| ("serial".to_owned(), counter, count));
        let pvpanic = self.pvpanic.iter().flat_map(|port| port.counters());
        let pvpanic = pvpanic.map(|(counter, count)| ("pvpanic".to_owned(), counter, count));
        self.devices.iter().flat_map(of).chain(serial).chain(pvpanic).collect()
    }

    fn each_device(&self, f: impl Fn(&Arc<dyn Transport>) -> Result<(), DeviceError>) -> Result<(), VmError> {
        self.devices.iter().try_for_each(|(name, device)| {
            f(device).map_err(|source| VmError::Device { name: name.clone(), source })
        })?;
        self.severed.iter().try_for_each(|(slot, left)| {
            f(left).map_err(|source| VmError::Device { name: format!("in slot {slot}"), source })
        })
    }
}
