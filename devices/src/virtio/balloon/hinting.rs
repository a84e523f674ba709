//! Free page hinting: runs, their numbers, and who may end them (VIRTIO 1.2 section 5.5.6.5).
//!
//! ```text
//!   host_cmd   0 ──begin──► 2 ─────────────── end, or the guest's stop ──► 1 ──begin──► 3
//!   guest            2, pages, pages, ..., 0 (stop)                     takes pages back
//! ```
//!
//! The owner asks for a run by putting a new number into the configuration. The driver sends
//! that number, then the pages that are free, then 0. It keeps those pages to itself until the
//! configuration says 1 ("done").
//!
//! From then on the guest may use these pages again, so giving one of them back to the host
//! that instant would destroy what the guest wrote. Therefore changing the number and giving
//! pages back exclude each other ([`Hinting::during_run`]): when [`Hinting::end`] returns, no
//! page of the run is touched any more. The lock is held for one piece of a range at most.
//!
//! What stays is a weakness of the mechanism itself: under memory pressure Linux takes hinted
//! pages back without asking. Its authors thought of migration, where a hint is only a page
//! less to send. Whoever starts a run accepts that, as with every monitor that has hints.

use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU32, Ordering},
};

use serde::{Deserialize, Serialize};

/// Number that the guest sends when it has no more pages, and the configuration's first value
/// (`VIRTIO_BALLOON_CMD_ID_STOP`).
pub(super) const STOP: u32 = 0;
/// Number in the configuration that lets the guest take hinted pages back
/// (`VIRTIO_BALLOON_CMD_ID_DONE`).
pub(super) const DONE: u32 = 1;
/// Smallest number of a run.
const FIRST_RUN: u32 = 2;

/// Everything about runs that is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Run {
    /// The number in the configuration.
    pub host_cmd: u32,
    /// The last number the guest sent.
    pub guest_cmd: Option<u32>,
    /// Number of the last run that was begun.
    last: u32,
    /// Whether the guest's stop ends the run.
    acknowledge: bool,
}

/// Free page hinting, shared by both halves of the device.
#[derive(Debug, Default)]
pub(super) struct Hinting {
    /// A copy of `host_cmd`, so that reading the configuration never waits.
    shown: AtomicU32,
    run: Mutex<Run>,
}

impl Hinting {
    /// The number in the configuration.
    pub fn shown(&self) -> u32 {
        self.shown.load(Ordering::Acquire)
    }

    /// The state as it is now.
    pub fn run(&self) -> Run {
        *self.lock()
    }

    /// Begins a run and returns its number; with `acknowledge` the guest's stop ends it.
    pub fn begin(&self, acknowledge: bool) -> u32 {
        let mut run = self.lock();
        run.last = run.last.wrapping_add(1).max(FIRST_RUN);
        run.acknowledge = acknowledge;
        let number = run.last;
        self.show(&mut run, number)
    }

    /// Ends the run: the guest may have its pages back.
    pub fn end(&self) {
        self.show(&mut self.lock(), DONE);
    }

    /// Takes a number from the guest; true when that ended the run, so that the configuration
    /// changed. Only a guest that is in this run can end it: one that was asked for a new run
    /// before it had finished the old one still sends the old one's stop.
    pub fn heard(&self, number: u32) -> bool {
        let mut run = self.lock();
        let was = run.guest_cmd.replace(number);
        // No driver sends "done"; it can mean nothing but the end.
        let stopped = number == STOP || number == DONE;
        let ends = stopped && run.acknowledge && run.host_cmd >= FIRST_RUN && was == Some(run.host_cmd);
        if ends {
            self.show(&mut run, DONE);
        }
        ends
    }

    /// Calls `f` if the guest's pages belong to the run that is on, which cannot end while
    /// `f` works.
    pub fn during_run<T>(&self, f: impl FnOnce() -> T) -> Option<T> {
        let run = self.lock();
        let on = run.host_cmd >= FIRST_RUN && run.guest_cmd == Some(run.host_cmd);
        on.then(f)
    }

    /// As before the first run.
    pub fn reset(&self) {
        let mut run = self.lock();
        *run = Run::default();
        self.show(&mut run, STOP);
    }

    /// Goes on from a saved state; true when the configuration is another one than the guest
    /// knew. A run does not survive: its pages may hold anything now, so the guest gets them.
    pub fn restore(&self, saved: Run) -> bool {
        let mut run = self.lock();
        *run = saved;
        let on = saved.host_cmd >= FIRST_RUN;
        self.show(&mut run, if on { DONE } else { saved.host_cmd });
        on
    }

    fn show(&self, run: &mut Run, number: u32) -> u32 {
        run.host_cmd = number;
        self.shown.store(number, Ordering::Release);
        number
    }

    fn lock(&self) -> MutexGuard<'_, Run> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_count_only_between_the_runs_number_and_its_end() {
        let hinting = Hinting::default();
        let on = |hinting: &Hinting| hinting.during_run(|| ()).is_some();
        assert!(!on(&hinting));
        assert_eq!(hinting.begin(false), 2);
        assert!(!on(&hinting), "the guest has not taken the run up");
        assert!(!hinting.heard(2));
        assert!(on(&hinting));
        assert!(!hinting.heard(STOP), "nobody asked for an acknowledgement");
        assert!(!on(&hinting), "after its stop the guest sends no pages");
        hinting.end();
        assert_eq!((hinting.shown(), on(&hinting)), (DONE, false));
    }

    #[test]
    fn the_guests_stop_ends_a_run_that_is_to_be_acknowledged() {
        let hinting = Hinting::default();
        hinting.begin(true);
        assert!(!hinting.heard(2));
        assert!(hinting.heard(STOP));
        assert_eq!(hinting.run().guest_cmd, Some(STOP));
        assert_eq!(hinting.shown(), DONE);
        assert!(!hinting.heard(STOP), "once");
    }

    #[test]
    fn the_stop_of_an_old_run_does_not_end_the_new_one() {
        let hinting = Hinting::default();
        hinting.begin(true);
        hinting.heard(2);
        assert_eq!(hinting.begin(true), 3);
        assert!(hinting.during_run(|| ()).is_none(), "pages of run 2 are stale");
        assert!(!hinting.heard(STOP));
        assert_eq!(hinting.shown(), 3);
        hinting.heard(3);
        assert!(hinting.heard(STOP));
    }

    #[test]
    fn a_guest_cannot_start_a_run_by_itself() {
        let hinting = Hinting::default();
        for number in [STOP, DONE, 2, u32::MAX] {
            assert!(!hinting.heard(number));
            assert!(hinting.during_run(|| ()).is_none());
        }
        hinting.end();
        hinting.heard(DONE);
        assert!(hinting.during_run(|| ()).is_none(), "the number for done is no run");
    }

    #[test]
    fn numbers_go_round_without_the_reserved_ones() {
        let hinting = Hinting::default();
        hinting.restore(Run { last: u32::MAX - 1, ..Run::default() });
        assert_eq!(hinting.begin(false), u32::MAX);
        assert_eq!(hinting.begin(false), 2);
    }

    #[test]
    fn a_restored_machine_gets_its_pages_back() {
        let hinting = Hinting::default();
        hinting.begin(true);
        hinting.heard(2);
        let next = Hinting::default();
        assert!(next.restore(hinting.run()));
        assert_eq!(next.shown(), DONE);
        assert!(next.during_run(|| ()).is_none());
        assert_eq!(next.begin(false), 3, "a number the guest has not seen");
        assert!(!Hinting::default().restore(Run::default()));
    }
}
