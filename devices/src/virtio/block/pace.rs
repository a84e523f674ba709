//! Whether to look a moment longer before going to sleep.
//!
//! A driver that polls has its next request ready a microsecond after it sees the last one
//! answered. If the queue went to sleep meanwhile, the driver pays a doorbell (an exit from
//! the guest) and the queue a wake-up, several times what the request itself costs. A driver
//! that waits for interrupts takes longer than any sensible look, so looking is wasted on it,
//! and on a host with one processor it only keeps the driver from running.
//!
//! So nothing is assumed. The queue looks longer only after a doorbell came so soon after it
//! fell asleep that a look would have caught it; a look in vain ends that, and makes it
//! distrust such doorbells twice as long as the last time.

use std::time::Instant;

use crate::limits::BLOCK_LINGER;

/// Doorbells that are distrusted at most after looks in vain.
const DISTRUST_MAX: u16 = 1023;

/// What one queue has learnt of its driver.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// There is a second processor, on which the driver can run meanwhile.
    possible: bool,
    eager: bool,
    asleep: Option<Instant>,
    distrust: u16,
    penalty: u16,
}

impl Pace {
    /// Nothing learnt yet, on a host with this many processors.
    pub fn new(processors: usize) -> Pace {
        Pace { possible: processors > 1, ..Pace::default() }
    }

    /// Whether a look is likely to pay.
    pub fn is_eager(&self) -> bool {
        self.eager
    }

    /// The queue goes to sleep.
    pub fn sleep(&mut self, now: Instant) {
        self.asleep = Some(now);
    }

    /// A doorbell woke it.
    pub fn wake(&mut self, now: Instant) {
        let Some(since) = self.asleep.take().filter(|_| self.possible) else { return };
        if now.saturating_duration_since(since) > BLOCK_LINGER {
            return;
        }
        match self.distrust.checked_sub(1) {
            Some(less) => self.distrust = less,
            None => self.eager = true,
        }
    }

    /// A look found something, or nothing.
    pub fn looked(&mut self, found: bool) {
        if found {
            self.penalty = 0;
        } else {
            self.eager = false;
            self.penalty = (self.penalty * 2 + 1).min(DISTRUST_MAX);
            self.distrust = self.penalty;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn doorbell(pace: &mut Pace, after: std::time::Duration) -> bool {
        let now = Instant::now();
        pace.sleep(now);
        pace.wake(now + after);
        pace.is_eager()
    }

    #[test]
    fn only_quick_doorbells_on_several_processors_make_it_eager() {
        assert!(!doorbell(&mut Pace::new(1), BLOCK_LINGER / 2));
        assert!(!doorbell(&mut Pace::new(2), BLOCK_LINGER * 2));
        assert!(doorbell(&mut Pace::new(2), BLOCK_LINGER / 2));
    }

    #[test]
    fn looks_in_vain_cost_ever_less_often() {
        let mut pace = Pace::new(2);
        let mut needed = Vec::new();
        for _ in 0..12 {
            needed.push((0..2000).take_while(|_| !doorbell(&mut pace, BLOCK_LINGER / 2)).count());
            pace.looked(false);
        }
        assert_eq!(needed[..4], [0, 1, 3, 7]);
        assert_eq!(needed[11], usize::from(DISTRUST_MAX));
        pace.looked(true);
        pace.looked(false);
        assert_eq!((0..9).take_while(|_| !doorbell(&mut pace, BLOCK_LINGER / 2)).count(), 1);
    }
}
