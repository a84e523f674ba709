//! What is saved of a [`Core`], and how it is believed when it comes back.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::{Core, Select, status};
use crate::{
    state::{Section, StateError},
    virtio::{DeviceError, queue::QueueSetup},
};

/// Kind of the section that holds status, features and queues.
pub const KIND: &str = "virtio-core";
const VERSION: u16 = 1;

#[derive(Serialize, Deserialize)]
struct Saved {
    /// Kind of the device behind it, so that states are not mixed up.
    device: String,
    status: u8,
    needs_reset: bool,
    accepted: u64,
    select: [u32; 3],
    isr: u32,
    generation: u32,
    queues: Vec<SavedQueue>,
}

#[derive(Serialize, Deserialize)]
struct SavedQueue {
    ready: bool,
    setup: QueueSetup,
}

fn impossible(reason: String) -> DeviceError {
    StateError::Impossible { kind: KIND, reason }.into()
}

impl Core {
    /// The core's section and the device's, in this order. Refused while the device runs,
    /// because its queues then move on.
    pub fn save(&self) -> Result<Vec<Section>, DeviceError> {
        if self.running || self.broken {
            let why = if self.broken { "did not stop when asked to" } else { "is running" };
            return Err(DeviceError::Change(format!("A {} that {why} cannot be saved", self.kind())));
        }
        let Select { offered, accepted, queue } = self.select;
        let saved = Saved {
            device: self.kind().to_owned(),
            status: self.status,
            needs_reset: self.flags.needs_reset(),
            accepted: self.accepted,
            select: [offered, accepted, queue],
            isr: self.flags.isr(),
            generation: self.flags.generation(),
            queues: (self.queues.slots().iter())
                .map(|slot| SavedQueue { ready: slot.ready, setup: slot.setup })
                .collect(),
        };
        Ok(vec![Section::new(KIND, VERSION, &saved), self.device.save()])
    }

    /// Takes over the core's section and the device's from `sections`, others are ignored.
    /// The core is paused afterwards. On an error it is as before, except that the device may
    /// have taken over its own part.
    pub fn restore(&mut self, sections: &[Section]) -> Result<(), DeviceError> {
        if self.running || self.broken {
            return Err(DeviceError::Change(format!("A {} in use cannot be restored", self.kind())));
        }
        let find = |kind: &str| {
            let found = sections.iter().find(|section| section.kind == kind);
            found.ok_or_else(|| impossible(format!("there is no section {kind:?}")))
        };
        let saved: Saved = find(KIND)?.open(KIND, VERSION)?;
        self.check(&saved)?;
        // The device's section is found by position when its kind is its own affair.
        let own = sections.iter().position(|s| s.kind == KIND).and_then(|at| sections.get(at + 1));
        self.device.restore(own.ok_or_else(|| impossible("the device's section is missing".to_owned()))?)?;
        let [offered, accepted, queue] = saved.select;
        self.select = Select { offered, accepted, queue };
        self.status = saved.status;
        self.accepted = saved.accepted;
        self.flags.isr.store(saved.isr, Ordering::SeqCst);
        self.flags.generation.store(saved.generation, Ordering::SeqCst);
        self.flags.needs_reset.store(saved.needs_reset, Ordering::SeqCst);
        for (slot, saved) in self.queues.slots_mut().iter_mut().zip(saved.queues) {
            slot.ready = saved.ready;
            slot.setup = saved.setup;
        }
        self.paused = true;
        Ok(())
    }

    fn check(&self, saved: &Saved) -> Result<(), DeviceError> {
        let about = self.device.about();
        if saved.device != about.kind {
            return Err(impossible(format!(
                "it belongs to a {:?}, this is a {:?}",
                saved.device, about.kind
            )));
        }
        if !status::reachable(saved.status) {
            return Err(impossible(format!("no driver reaches status {:#x}", saved.status)));
        }
        if saved.status & status::FEATURES_OK != 0 && !self.acceptable(saved.accepted) {
            let (accepted, offered) = (saved.accepted, about.features);
            return Err(impossible(format!(
                "features {accepted:#x} are not among those offered, {offered:#x}"
            )));
        }
        if saved.queues.len() != about.queues.len() {
            let (found, here) = (saved.queues.len(), about.queues.len());
            return Err(impossible(format!("it has {found} queues, this device {here}")));
        }
        for (i, (queue, max)) in saved.queues.iter().zip(&about.queues).enumerate() {
            let size = queue.setup.size;
            if !size.is_power_of_two() || size > *max {
                return Err(impossible(format!("queue {i} has size {size}, the largest here is {max}")));
            }
        }
        Ok(())
    }
}
