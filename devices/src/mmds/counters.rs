//! What the service counts, by the names Firecracker's metrics have.

use std::sync::atomic::{AtomicU64, Ordering};

/// One counter of [`Counters`].
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub(super) fn increment(&self) {
        self.add(1);
    }
}

macro_rules! counters {
    ($($name:ident: $what:literal,)*) => {
        /// Counts since the service was made, over all network interfaces.
        #[derive(Debug, Default)]
        pub(super) struct Counters {
            $(#[doc = $what] pub(super) $name: Counter,)*
        }

        impl Counters {
            /// All counts by name.
            pub(super) fn list(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.0.load(Ordering::Relaxed)),)*]
            }
        }
    };
}

counters! {
    rx_accepted: "Frames taken from the guest.",
    rx_accepted_err: "Of these, packets that are no TCP to the service's port or cannot be read.",
    rx_accepted_unusual: "Of these, frames that are neither TCP nor a question for the address, and \
                          connections turned away because all places were taken.",
    rx_bad_eth: "Frames too short to be Ethernet.",
    rx_invalid_token: "GET requests with a token that is not valid.",
    rx_no_token: "GET requests without a token.",
    rx_count: "TCP segments taken in.",
    tx_bytes: "Bytes of the frames given to the guest.",
    tx_count: "Frames given to the guest.",
    tx_errors: "Frames that did not fit what they were to be put into.",
    tx_frames: "Frames given to the guest.",
    connections_created: "Connections the guest opened.",
    connections_destroyed: "Connections that ended.",
}
