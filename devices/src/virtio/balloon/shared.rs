//! What both halves of the balloon know.
//!
//! The queue half writes here once a request or once a statistics interval, the register half
//! reads when it is asked. Nothing here is held while waiting for anything.

use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

use super::{hinting::Hinting, parts::Parts, stats::Latest};

macro_rules! counters {
    ($($name:ident: $what:literal,)*) => {
        /// Counts since the device was made.
        #[derive(Debug, Default)]
        pub(super) struct Counters {
            $(#[doc = $what] pub(super) $name: AtomicU64,)*
        }

        impl Counters {
            /// All counts by name.
            pub(super) fn list(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.load(Ordering::Relaxed)),)*]
            }
        }
    };
}

counters! {
    activate_fails: "Times the device could not be started.",
    inflate_count: "Lists of pages that went into the balloon.",
    inflate_freed: "Bytes that the host got back by them.",
    inflate_fails: "Runs of pages that the host would not take back.",
    deflate_count: "Lists of pages that came out of the balloon.",
    bad_pages: "Pages named in a list that are no memory.",
    stats_updates_count: "Buffers of statistics.",
    stats_update_fails: "Such buffers that were too long or torn.",
    event_fails: "Queues that the driver spoiled, and lists and numbers that were torn.",
    free_page_report_count: "Ranges that the guest reported free.",
    free_page_report_freed: "Bytes that the host got back by them.",
    free_page_report_fails: "Such ranges that the host would not take back.",
    free_page_hint_count: "Ranges hinted in the run that was on.",
    free_page_hint_freed: "Bytes that the host got back by them.",
    free_page_hint_fails: "Such ranges that the host would not take back.",
}

/// Adds to a counter.
pub(super) fn add(counter: &AtomicU64, by: u64) {
    if by > 0 {
        counter.fetch_add(by, Ordering::Relaxed);
    }
}

/// State of one balloon outside its registers.
#[derive(Debug, Default)]
pub(super) struct Shared {
    pub counters: Counters,
    pub hinting: Hinting,
    /// Pieces of private file mappings that were replaced by anonymous memory.
    pub overlays: AtomicU32,
    latest: Mutex<Latest>,
    parts: Mutex<Vec<Option<Parts>>>,
}

impl Shared {
    /// The guest's statistics.
    pub fn latest(&self) -> MutexGuard<'_, Latest> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which parts of huge pages are in the balloon, by region, while nobody serves the queues.
    pub fn parts(&self) -> MutexGuard<'_, Vec<Option<Parts>>> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets what the driver said.
    pub fn reset(&self) {
        self.hinting.reset();
        *self.latest() = Latest::default();
        self.parts().clear();
    }
}
