//! What is saved of a PCI transport beside its core: configuration space and vectors.

use serde::{Deserialize, Serialize};

use super::PciTransport;
use crate::{
    pci::{config::LENGTH, msix::Vector},
    state::{Section, StateError},
    virtio::DeviceError,
};

const KIND: &str = "virtio-pci";
const VERSION: u16 = 1;

#[derive(Serialize, Deserialize)]
struct Saved {
    /// Configuration space; read-only bits in here are ignored when it is restored.
    config: Vec<u8>,
    config_vector: u16,
    queue_vectors: Vec<u16>,
    table: Vec<Vector>,
}

fn impossible(reason: String) -> DeviceError {
    StateError::Impossible { kind: KIND, reason }.into()
}

impl PciTransport {
    pub(super) fn save_all(&self) -> Result<Vec<Section>, DeviceError> {
        let front = self.front();
        let mut sections = self.core().save()?;
        let (config_vector, queue_vectors) = self.vectors.save();
        let config = front.config.bytes().to_vec();
        let saved = Saved { config, config_vector, queue_vectors, table: self.msix.save() };
        sections.push(Section::new(KIND, VERSION, &saved));
        Ok(sections)
    }

    pub(super) fn restore_all(&self, sections: &[Section]) -> Result<(), DeviceError> {
        let section = sections.iter().find(|section| section.kind == KIND);
        let missing = || impossible("the section is missing".to_owned());
        let saved: Saved = section.ok_or_else(missing)?.open(KIND, VERSION)?;
        let (vectors, queues) = (usize::from(self.msix.count()), self.about.queues.len());
        if saved.config.len() != LENGTH || saved.table.len() != vectors || saved.queue_vectors.len() != queues
        {
            return Err(impossible(format!(
                "{} bytes of configuration, {} vectors and {} queues do not belong to this device",
                saved.config.len(),
                saved.table.len(),
                saved.queue_vectors.len()
            )));
        }
        let mut front = self.front();
        self.core().restore(sections)?;
        front.config.write(0, &saved.config);
        self.msix.restore(&saved.table, front.config.word(front.msix + 2));
        self.vectors.restore(saved.config_vector, &saved.queue_vectors);
        self.place(&mut front).map_err(|error| impossible(format!("its BAR has no place: {error}")))
    }
}
