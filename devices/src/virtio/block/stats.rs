//! What a disk has done, counted. Handlers count in plain numbers of their own and add them
//! up here once a batch.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Numbers of one batch, or since the device was made.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub reads: u64,
    pub writes: u64,
    pub read_bytes: u64,
    pub write_bytes: u64,
    pub flushes: u64,
    pub discards: u64,
    /// Requests answered with `VIRTIO_BLK_S_IOERR`, or not answerable at all.
    pub errors: u64,
    /// Requests answered with `VIRTIO_BLK_S_UNSUPP`.
    pub unsupported: u64,
    /// Rings given up because the driver broke them.
    pub queue_errors: u64,
    /// Times the driver rang.
    pub doorbells: u64,
    /// Times it rang and nothing was there.
    pub idle_doorbells: u64,
    /// Times the ring of the kernel did not take all that it was given.
    pub ring_full: u64,
}

const NAMES: [&str; 12] = [
    "reads",
    "writes",
    "read_bytes",
    "write_bytes",
    "flushes",
    "discards",
    "errors",
    "unsupported",
    "queue_errors",
    "queue_event_count",
    "no_avail_buffer",
    "io_engine_throttled_events",
];

/// The sums, read by whoever collects metrics.
#[derive(Debug, Default)]
pub(super) struct Stats([AtomicU64; 12]);

impl Stats {
    /// Adds a batch and empties it.
    pub fn add(&self, tally: &mut Tally) {
        let t = std::mem::take(tally);
        let parts = [
            t.reads,
            t.writes,
            t.read_bytes,
            t.write_bytes,
            t.flushes,
            t.discards,
            t.errors,
            t.unsupported,
            t.queue_errors,
            t.doorbells,
            t.idle_doorbells,
            t.ring_full,
        ];
        for (sum, part) in self.0.iter().zip(parts) {
            if part != 0 {
                sum.fetch_add(part, Relaxed);
            }
        }
    }

    /// All sums by name.
    pub fn list(&self) -> Vec<(&'static str, u64)> {
        NAMES.into_iter().zip(self.0.iter().map(|n| n.load(Relaxed))).collect()
    }
}
