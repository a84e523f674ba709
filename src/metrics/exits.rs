//! How often vCPUs left the guest for this process, and how long they stayed.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::times::{SharedTimes, Times};

/// Exits of one vCPU that were handed to this process, by kind. Its thread writes them.
#[derive(Debug, Default)]
pub struct Exits {
    /// Port reads.
    pub port_in: SharedTimes,
    /// Port writes.
    pub port_out: SharedTimes,
    /// Reads of memory-mapped registers.
    pub mmio_read: SharedTimes,
    /// Writes of memory-mapped registers.
    pub mmio_write: SharedTimes,
    /// Interruptions by a signal, to obey an order.
    pub kicked: AtomicU64,
    /// Everything else.
    pub other: AtomicU64,
}

/// Exits of one or more vCPUs, as read at one time.
#[derive(Debug, Clone, Copy, Default)]
pub struct ExitSums {
    /// Port reads.
    pub port_in: Times,
    /// Port writes.
    pub port_out: Times,
    /// Reads of memory-mapped registers.
    pub mmio_read: Times,
    /// Writes of memory-mapped registers.
    pub mmio_write: Times,
    /// Interruptions by a signal, to obey an order.
    pub kicked: u64,
    /// Everything else.
    pub other: u64,
}

impl ExitSums {
    /// Adds what one vCPU has counted.
    pub fn join(&mut self, exits: &Exits) {
        self.port_in.join(&exits.port_in.read());
        self.port_out.join(&exits.port_out.read());
        self.mmio_read.join(&exits.mmio_read.read());
        self.mmio_write.join(&exits.mmio_write.read());
        self.kicked += exits.kicked.load(Relaxed);
        self.other += exits.other.load(Relaxed);
    }

    /// The counts by name, reads and writes together.
    pub fn counts(&self) -> [(&'static str, u64); 4] {
        [
            ("port", self.port_in.count() + self.port_out.count()),
            ("mmio", self.mmio_read.count() + self.mmio_write.count()),
            ("kicked", self.kicked),
            ("other", self.other),
        ]
    }

    /// Those that are answered here and whose time is known, by name.
    pub fn timed(&self) -> [(&'static str, &Times); 4] {
        [
            ("port_in", &self.port_in),
            ("port_out", &self.port_out),
            ("mmio_read", &self.mmio_read),
            ("mmio_write", &self.mmio_write),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_of_all_vcpus_are_added_up() {
        let (a, b) = (Exits::default(), Exits::default());
        a.port_in.of(|| ());
        b.port_out.of(|| ());
        b.mmio_read.of(|| ());
        a.kicked.store(3, Relaxed);
        let mut sums = ExitSums::default();
        sums.join(&a);
        sums.join(&b);
        assert_eq!(sums.counts(), [("port", 2), ("mmio", 1), ("kicked", 3), ("other", 0)]);
    }
}
