//! The boot timer: a register that the guest writes when it has reached user space.
//!
//! It lies where Firecracker has it, at the start of the first MMIO window, and knows the same
//! magic byte, so a guest prepared for one is measured by the other.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use devices::bus::Registers;

use crate::metrics::{Milestone, Milestones};

/// The byte that means "user space is reached".
pub const MAGIC: u8 = 123;
/// Bytes of the range it answers in.
pub const LENGTH: u64 = 0x1000;

/// The register.
pub struct BootTimer {
    milestones: Arc<Milestones>,
    told: AtomicBool,
}

impl BootTimer {
    /// A timer that stamps and logs.
    pub fn new(milestones: Arc<Milestones>) -> BootTimer {
        BootTimer { milestones, told: AtomicBool::new(false) }
    }
}

impl Registers for BootTimer {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // Once: a guest must not be able to fill the log with it.
        if offset != 0 || data != [MAGIC] || self.told.swap(true, Ordering::Relaxed) {
            return;
        }
        self.milestones.reached(Milestone::GuestInit);
        let since = self.milestones.since_exec();
        let at = |name| since.iter().find(|(known, _)| *known == name).map_or(0, |(_, us)| *us);
        let took = at("guest_init").saturating_sub(at("first_run"));
        log::info!("Guest-boot-time = {took:>6} us {} ms", took / 1000);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_magic_byte_at_the_first_address_counts() {
        let milestones = Arc::new(Milestones::default());
        milestones.reached(Milestone::Exec);
        let timer = BootTimer::new(Arc::clone(&milestones));
        timer.write(1, &[MAGIC]);
        timer.write(0, &[MAGIC, 0]);
        timer.write(0, &[1]);
        assert_eq!(milestones.since_exec().len(), 1);
        timer.write(0, &[MAGIC]);
        assert_eq!(milestones.since_exec()[1].0, "guest_init");
    }
}
