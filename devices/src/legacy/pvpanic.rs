//! The panic notifier: one port through which a guest's kernel says that it crashed.
//!
//! The interface is QEMU's (`docs/specs/pvpanic`): reading the port tells which events the host
//! takes, writing it reports some. Linux finds it by the ACPI name `QEMU0001` and drives it with
//! `pvpanic-mmio`, which takes a port as well as an address; it writes once from its panic
//! notifier, before it dumps, resets or hangs, as its command line says. Nothing else is said of
//! the crash: the reasons are on the guest's console.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use crate::bus::Registers;

/// Its port, where QEMU has it.
pub const PORT: u16 = 0x505;
/// How many ports there are.
pub const LEN: u16 = 1;

/// What the guest reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PanicEvent {
    /// Its kernel has crashed, and does not handle that.
    Panicked,
    /// Its kernel has crashed, and a crash kernel takes over.
    CrashLoaded,
}

impl PanicEvent {
    /// All of them, each with its bit.
    const ALL: [(u8, PanicEvent); 2] = [(1, PanicEvent::Panicked), (2, PanicEvent::CrashLoaded)];

    /// Its name, as others who take this event call it.
    pub fn name(self) -> &'static str {
        match self {
            PanicEvent::Panicked => "panicked",
            PanicEvent::CrashLoaded => "crash-loaded",
        }
    }
}

/// Called on the vCPU thread that wrote, as often as the guest writes. Must not block.
pub type PanicCallback = Arc<dyn Fn(PanicEvent) + Send + Sync>;

/// The port.
pub struct PvPanic {
    callback: PanicCallback,
    counts: [AtomicU64; 2],
}

impl PvPanic {
    /// A port that reports to `callback`.
    pub fn new(callback: PanicCallback) -> PvPanic {
        PvPanic { callback, counts: Default::default() }
    }

    /// How often what was reported.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let counts = self.counts.iter().map(|count| count.load(Relaxed));
        ["panicked", "crash_loaded"].into_iter().zip(counts).collect()
    }
}

impl Registers for PvPanic {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(PanicEvent::ALL.iter().fold(0, |bits, (bit, _)| bits | bit));
    }

    fn write(&self, _: u64, data: &[u8]) {
        let &[written] = data else { return };
        for ((bit, event), count) in PanicEvent::ALL.into_iter().zip(&self.counts) {
            if written & bit != 0 {
                count.fetch_add(1, Relaxed);
                (self.callback)(event);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn events_that_are_known_are_passed_on_and_others_are_not() {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let ears = Arc::clone(&heard);
        let port = PvPanic::new(Arc::new(move |event| ears.lock().unwrap().push(event)));
        let mut offered = [0];
        port.read(0, &mut offered);
        assert_eq!(offered, [3]);
        for written in [&[0][..], &[4], &[1, 0], &[1], &[3]] {
            port.write(0, written);
        }
        use PanicEvent::{CrashLoaded, Panicked};
        assert_eq!(*heard.lock().unwrap(), [Panicked, Panicked, CrashLoaded]);
        assert_eq!(port.counters(), [("panicked", 2), ("crash_loaded", 1)]);
    }
}
