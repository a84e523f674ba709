//! What is left in the slot of a device that was taken from its guest by force.
//!
//! A driver that finds nothing where its device was reads all ones, and Linux waits without end
//! for a status of 0 there, with it all that comes and goes on that bus. So the registers go on
//! answering, with the configuration as it was last, until the guest lets go of them; behind them
//! is nothing: no file, no tap, no thread. Requests are taken by nobody. The driver is told once
//! that its device needs a reset, and after one is served no better.
//!
//! A machine may be saved before its guest has let go: what is left is saved with all that a driver
//! can see of it, and there again in the restored machine.

use serde::{Deserialize, Serialize};

use super::{About, Active, Change, DeviceError, VirtioDevice, queue::Queue, read_config_bytes};
use crate::{
    limits::QUEUE_SIZE_MAX,
    state::{Section, StateError},
};

const KIND: &str = "virtio-severed";
const VERSION: u16 = 1;
/// Kinds of devices that can be taken.
const KINDS: [&str; 4] = ["virtio-block", "virtio-net", "virtio-pmem", "virtio-rng"];
/// More queues, and more bytes of configuration, than any of them has.
const QUEUES_MAX: usize = 256;
const CONFIG_MAX: usize = 4096;

/// What a driver sees of the device.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Saved {
    kind: String,
    device_id: u32,
    pci_class: u32,
    features: u64,
    queues: Vec<u16>,
    config: Vec<u8>,
}

/// A device without anything behind it.
pub struct Severed {
    about: About,
    config: Vec<u8>,
    queues: Vec<Queue>,
}

impl Severed {
    /// Takes the place of `device`, which may be dropped then.
    pub(super) fn instead_of(device: &dyn VirtioDevice) -> Severed {
        let about = device.about().clone();
        let mut config = vec![0; usize::try_from(about.config_len).unwrap_or(0)];
        if !config.is_empty() {
            device.read_config(0, &mut config);
        }
        Severed { about, config, queues: Vec::new() }
    }

    /// What was left in a machine that was saved, from the sections of its transport.
    ///
    /// # Errors
    /// [`StateError`] for sections that are another device's or cannot be.
    pub fn saved(sections: &[Section]) -> Result<Severed, StateError> {
        let impossible = |reason: String| StateError::Impossible { kind: KIND, reason };
        let section = sections.iter().find(|section| section.kind == KIND);
        let section = section.ok_or_else(|| impossible("the section is missing".to_owned()))?;
        let Saved { kind, device_id, pci_class, features, queues, config } = section.open(KIND, VERSION)?;
        let known = KINDS.into_iter().find(|known| *known == kind);
        let kind = known.ok_or_else(|| impossible(format!("a {kind:?} is never taken")))?;
        let size = |size: &u16| size.is_power_of_two() && *size <= QUEUE_SIZE_MAX;
        if queues.is_empty()
            || queues.len() > QUEUES_MAX
            || !queues.iter().all(size)
            || config.len() > CONFIG_MAX
        {
            let (queues, bytes) = (queues.len(), config.len());
            return Err(impossible(format!("{queues} queues and {bytes} bytes of configuration")));
        }
        let about = About { kind, device_id, pci_class, features, queues, config_len: config.len() as u32 };
        Ok(Severed { about, config, queues: Vec::new() })
    }

    fn seen(&self) -> Saved {
        let About { kind, device_id, pci_class, features, ref queues, .. } = self.about;
        let (kind, queues, config) = (kind.to_owned(), queues.clone(), self.config.clone());
        Saved { kind, device_id, pci_class, features, queues, config }
    }

    fn gone(&self) -> DeviceError {
        DeviceError::Change(format!("The {} was taken away from its guest", self.about.kind))
    }
}

impl VirtioDevice for Severed {
    fn about(&self) -> &About {
        &self.about
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn start(&mut self, active: Active) -> Result<(), DeviceError> {
        self.queues = active.queues.into_iter().map(|(queue, _)| queue).collect();
        Ok(())
    }

    fn stop(&mut self) -> Result<Vec<Queue>, DeviceError> {
        Ok(std::mem::take(&mut self.queues))
    }

    fn save(&self) -> Section {
        Section::new(KIND, VERSION, &self.seen())
    }

    fn restore(&mut self, section: &Section) -> Result<(), DeviceError> {
        if section.open::<Saved>(KIND, VERSION)? == self.seen() {
            return Ok(());
        }
        let reason = "it is what is left of another device".to_owned();
        Err(StateError::Impossible { kind: KIND, reason }.into())
    }

    fn update(&mut self, _: &Change) -> Result<(), DeviceError> {
        Err(self.gone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::rng::Rng;

    #[test]
    fn what_is_left_of_a_device_is_saved_with_what_its_driver_sees() {
        let left = Severed::instead_of(&Rng::new());
        let saved = left.save();
        let mut again = Severed::saved(std::slice::from_ref(&saved)).unwrap();
        assert_eq!(again.about(), left.about());
        again.restore(&saved).unwrap();
        assert_eq!(again.save(), saved);
    }

    #[test]
    fn what_no_device_left_is_refused() {
        let seen = |change: fn(&mut Saved)| {
            let mut seen = Severed::instead_of(&Rng::new()).seen();
            change(&mut seen);
            Severed::saved(&[Section::new(KIND, VERSION, &seen)])
        };
        assert!(seen(|_| ()).is_ok());
        let lies: [fn(&mut Saved); 6] = [
            |s| s.kind = "virtio-vsock".to_owned(),
            |s| s.queues = vec![3],
            |s| s.queues = vec![2 * QUEUE_SIZE_MAX],
            |s| s.queues.clear(),
            |s| s.queues = vec![16; QUEUES_MAX + 1],
            |s| s.config = vec![0; CONFIG_MAX + 1],
        ];
        assert!(lies.into_iter().all(|lie| seen(lie).is_err()));
        assert!(Severed::saved(&[]).is_err());
        let mut other = Severed::instead_of(&Rng::new());
        let mut seen = other.seen();
        seen.features ^= 1;
        assert!(other.restore(&Section::new(KIND, VERSION, &seen)).is_err());
    }
}
