//! How long things take, sorted into classes of fixed bounds.
//!
//! The bounds are the same for everything and in every process, so that histograms of many
//! machines can be added up.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Upper bounds of the classes, in nanoseconds, and in seconds as OpenMetrics 1.0 writes
/// numbers that are compared as text ("Considerations: Canonical Numbers").
pub const BOUNDS: [(u64, &str); 14] = [
    (1_000, "1e-06"),
    (2_500, "2.5e-06"),
    (5_000, "5e-06"),
    (10_000, "1e-05"),
    (25_000, "2.5e-05"),
    (50_000, "5e-05"),
    (100_000, "0.0001"),
    (250_000, "0.00025"),
    (1_000_000, "0.001"),
    (2_500_000, "0.0025"),
    (10_000_000, "0.01"),
    (25_000_000, "0.025"),
    (100_000_000, "0.1"),
    (1_000_000_000, "1.0"),
];

/// Classes of times: one for each bound, and one for what is longer.
pub const CLASSES: usize = BOUNDS.len() + 1;

fn class_of(nanoseconds: u64) -> usize {
    BOUNDS.iter().position(|(bound, _)| nanoseconds <= *bound).unwrap_or(BOUNDS.len())
}

/// Nanoseconds of the monotonic clock.
pub fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call fills the structure it is given.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Times of one kind, added up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Times {
    /// All of them, in nanoseconds.
    pub sum: u64,
    /// The shortest, in nanoseconds; 0 when there was none.
    pub least: u64,
    /// The longest, in nanoseconds.
    pub most: u64,
    /// How many were in each class of [`BOUNDS`]; the last is what was longer.
    pub classes: [u64; CLASSES],
}

impl Times {
    /// How many there were.
    pub fn count(&self) -> u64 {
        self.classes.iter().sum()
    }

    /// Adds one time, in nanoseconds.
    pub fn add(&mut self, nanoseconds: u64) {
        let mut classes = [0; CLASSES];
        classes[class_of(nanoseconds)] = 1;
        self.join(&Times { sum: nanoseconds, least: nanoseconds.max(1), most: nanoseconds, classes });
    }

    /// Adds all of `other`.
    pub fn join(&mut self, other: &Times) {
        self.sum = self.sum.wrapping_add(other.sum);
        self.least = match (self.least, other.least) {
            (0, least) | (least, 0) => least,
            (a, b) => a.min(b),
        };
        self.most = self.most.max(other.most);
        for (sum, part) in self.classes.iter_mut().zip(other.classes) {
            *sum = sum.wrapping_add(part);
        }
    }
}

/// Times that one thread adds up while others read them.
#[derive(Debug, Default)]
pub struct SharedTimes {
    sum: AtomicU64,
    least: AtomicU64,
    most: AtomicU64,
    classes: [AtomicU64; CLASSES],
}

impl SharedTimes {
    /// Does `work` and adds the time it took. To be called by one thread only: without
    /// locked instructions, what two threads add at once would be counted once.
    pub fn of<T>(&self, work: impl FnOnce() -> T) -> T {
        let start = now();
        let done = work();
        self.add(now().saturating_sub(start));
        done
    }

    fn add(&self, nanoseconds: u64) {
        let plus = |a: &AtomicU64, n: u64| a.store(a.load(Relaxed).wrapping_add(n), Relaxed);
        plus(&self.sum, nanoseconds);
        plus(&self.classes[class_of(nanoseconds)], 1);
        let least = self.least.load(Relaxed);
        if least == 0 || nanoseconds < least {
            self.least.store(nanoseconds.max(1), Relaxed);
        }
        if nanoseconds > self.most.load(Relaxed) {
            self.most.store(nanoseconds, Relaxed);
        }
    }

    /// What was added up so far.
    pub fn read(&self) -> Times {
        Times {
            sum: self.sum.load(Relaxed),
            least: self.least.load(Relaxed),
            most: self.most.load(Relaxed),
            classes: std::array::from_fn(|class| self.classes[class].load(Relaxed)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_sorted_by_upper_bounds_that_are_inclusive() {
        let mut times = Times::default();
        for nanoseconds in [0, 1000, 1001, 1_000_000_000, 1_000_000_001, u64::MAX / 2] {
            times.add(nanoseconds);
        }
        assert_eq!(times.classes[..2], [2, 1]);
        assert_eq!(times.classes[CLASSES - 2..], [1, 2]);
        assert_eq!((times.count(), times.least, times.most), (6, 1, u64::MAX / 2));
    }

    #[test]
    fn shared_and_plain_times_agree() {
        let (shared, mut plain) = (SharedTimes::default(), Times::default());
        for nanoseconds in [7, 9_999, 123_456, 3] {
            shared.add(nanoseconds);
            plain.add(nanoseconds);
        }
        assert_eq!(shared.read(), plain);
        assert_eq!(shared.of(|| 5), 5);
        assert_eq!(shared.read().count(), 5);
    }

    #[test]
    fn the_texts_of_the_bounds_are_their_values() {
        for (nanoseconds, text) in BOUNDS {
            let seconds: f64 = text.parse().unwrap();
            assert_eq!((seconds * 1e9).round() as u64, nanoseconds, "{text}");
        }
    }
}
