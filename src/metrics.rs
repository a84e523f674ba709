//! When the machine reached what, and how often it left the guest.
//!
//! Milestones are stamped from the first commit on: boot time is a feature, and a figure
//! nobody records is one that rots. A stamp is one clock reading and one store.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

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

/// Nanoseconds of the monotonic clock.
fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call fills the structure it is given.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Exits of one vCPU that were handed to this process, by kind.
#[derive(Debug, Default)]
pub struct Exits {
    /// Port reads and writes.
    pub port: AtomicU64,
    /// Memory-mapped register reads and writes.
    pub mmio: AtomicU64,
    /// Interruptions by a signal, to obey an order.
    pub kicked: AtomicU64,
    /// Everything else.
    pub other: AtomicU64,
}

impl Exits {
    /// The counts by name.
    pub fn counts(&self) -> [(&'static str, u64); 4] {
        let get = |a: &AtomicU64| a.load(Relaxed);
        [
            ("port", get(&self.port)),
            ("mmio", get(&self.mmio)),
            ("kicked", get(&self.kicked)),
            ("other", get(&self.other)),
        ]
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
