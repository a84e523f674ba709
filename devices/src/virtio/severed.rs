//! What is left in the slot of a device that was taken from its guest by force.
//!
//! A driver that finds nothing where its device was reads all ones, and Linux waits without end
//! for a status of 0 there, with it all that comes and goes on that bus. So the registers go on
//! answering, with the configuration as it was last, until the guest lets go of them; behind them
//! is nothing: no file, no tap, no thread. Requests are taken by nobody. The driver is told once
//! that its device needs a reset, and after one is served no better.

use super::{About, Active, Change, DeviceError, VirtioDevice, queue::Queue, read_config_bytes};
use crate::state::{Section, StateError};

const KIND: &str = "virtio-severed";

/// A device without anything behind it.
pub(super) struct Severed {
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
        Section::new(KIND, 1, &())
    }

    fn restore(&mut self, _: &Section) -> Result<(), DeviceError> {
        let reason = "it was taken away from its guest".to_owned();
        Err(StateError::Impossible { kind: KIND, reason }.into())
    }

    fn update(&mut self, _: &Change) -> Result<(), DeviceError> {
        Err(self.gone())
    }
}
