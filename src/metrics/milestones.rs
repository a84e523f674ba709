//! When the machine reached what.
//!
//! Milestones are stamped from the first commit on: boot time is a feature, and a figure
//! nobody records is one that rots. A stamp is one clock reading and one store.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::times::now;

/// Points on the way from `exec` to a running guest, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Milestone {
    /// The program's first line ran.
    Exec,
    /// The specification was read and checked.
    Configured,
    /// The machine was built and its kernel is in memory.
    Built,
    /// A vCPU is about to enter the guest for the first time.
    FirstRun,
    /// The guest said it reached user space (`--boot-timer`).
    GuestInit,
    /// The guest ended.
    Ended,
}

/// Names of the milestones, by number.
pub const NAMES: [&str; 6] = ["exec", "configured", "built", "first_run", "guest_init", "ended"];

/// Times of the milestones, in nanoseconds of the monotonic clock.
#[derive(Debug, Default)]
pub struct Milestones([AtomicU64; 6]);

impl Milestones {
    /// Stamps `milestone` with the present time, unless it was reached before.
    pub fn reached(&self, milestone: Milestone) {
        let _ = self.0[milestone as usize].compare_exchange(0, now(), Relaxed, Relaxed);
    }

    /// Microseconds from [`Milestone::Exec`] to each milestone that was reached.
    pub fn since_exec(&self) -> Vec<(&'static str, u64)> {
        let start = self.0[0].load(Relaxed);
        let times = NAMES.iter().zip(&self.0).map(|(name, at)| (*name, at.load(Relaxed)));
        times.filter(|(_, at)| *at != 0).map(|(name, at)| (name, at.saturating_sub(start) / 1000)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn milestones_count_from_exec_and_are_stamped_once() {
        let milestones = Milestones::default();
        milestones.reached(Milestone::Exec);
        milestones.reached(Milestone::Built);
        let first = milestones.since_exec();
        milestones.reached(Milestone::Built);
        assert_eq!(milestones.since_exec(), first);
        assert_eq!(first.iter().map(|(n, _)| *n).collect::<Vec<_>>(), ["exec", "built"]);
    }
}
