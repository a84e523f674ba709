//! Which event of a device fires which MSI-X vector.

use std::sync::{
    Arc,
    atomic::{AtomicU16, Ordering},
};

use super::NO_VECTOR;
use crate::{
    pci::msix::Msix,
    trouble::Trouble,
    virtio::{
        Interrupt,
        core::{Flags, ISR_CONFIG, ISR_QUEUE},
    },
};

/// The vector of each queue and of configuration changes. Workers read it without a lock.
pub(super) struct Vectors {
    flags: Arc<Flags>,
    msix: Arc<Msix>,
    config: AtomicU16,
    queues: Vec<AtomicU16>,
}

impl Vectors {
    pub(super) fn new(flags: Arc<Flags>, msix: Arc<Msix>, queues: u16) -> Vectors {
        let queues = (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect();
        Vectors { flags, msix, config: AtomicU16::new(NO_VECTOR), queues }
    }

    pub(super) fn config(&self) -> u16 {
        self.config.load(Ordering::SeqCst)
    }

    /// Gives configuration changes a vector; one that does not exist becomes [`NO_VECTOR`],
    /// which tells the driver that it failed (VIRTIO 1.2 section 4.1.5.1.2).
    pub(super) fn set_config(&self, vector: u16) {
        self.config.store(self.existing(vector), Ordering::SeqCst);
    }

    pub(super) fn queue(&self, index: u32) -> u16 {
        self.find(index).map_or(NO_VECTOR, |vector| vector.load(Ordering::SeqCst))
    }

    /// Gives queue `index` a vector, as for [`Vectors::set_config`].
    pub(super) fn set_queue(&self, index: u32, vector: u16) {
        if let Some(place) = self.find(index) {
            place.store(self.existing(vector), Ordering::SeqCst);
        }
    }

    /// No vectors, as after a reset.
    pub(super) fn clear(&self) {
        self.restore(NO_VECTOR, &[]);
    }

    /// The vector of configuration changes, then those of the queues.
    pub(super) fn save(&self) -> (u16, Vec<u16>) {
        let queues = self.queues.iter().map(|vector| vector.load(Ordering::SeqCst));
        (self.config(), queues.collect())
    }

    /// Takes saved vectors over; queues that are not named have none.
    pub(super) fn restore(&self, config: u16, queues: &[u16]) {
        self.set_config(config);
        let queues = queues.iter().copied().chain(std::iter::repeat(NO_VECTOR));
        for (place, vector) in self.queues.iter().zip(queues) {
            place.store(self.existing(vector), Ordering::SeqCst);
        }
    }

    fn find(&self, index: u32) -> Option<&AtomicU16> {
        self.queues.get(usize::try_from(index).ok()?)
    }

    fn fire(&self, vector: u16) {
        self.flags.count_interrupt();
        self.msix.fire(vector);
    }

    fn existing(&self, vector: u16) -> u16 {
        if vector < self.msix.count() { vector } else { NO_VECTOR }
    }
}

impl Interrupt for Vectors {
    fn queue(&self, index: u16) {
        // The status bit is for drivers that use no messages: without interrupt lines that
        // leaves those that poll (VIRTIO 1.2 section 4.1.5.3.1).
        if !self.msix.enabled() {
            self.flags.raise(ISR_QUEUE);
        }
        self.fire(self.queue(u32::from(index)));
    }

    fn config(&self) {
        self.flags.config_changed();
        self.flags.raise(ISR_CONFIG);
        self.fire(self.config());
    }

    fn trouble(&self, trouble: Trouble) {
        self.flags.report(trouble);
    }

    fn needs_reset(&self) {
        if self.flags.set_needs_reset() {
            self.flags.raise(ISR_CONFIG);
            self.fire(self.config());
        }
    }
}
