//! What is counted, added up on the worker and handed over once a turn.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($name:ident: $what:literal,)*) => {
        /// Counts of one turn.
        #[derive(Debug, Default)]
        pub(super) struct Tally {
            $(#[doc = $what] pub(super) $name: u64,)*
        }

        /// Counts since the device was made, over all queue pairs.
        #[derive(Debug, Default)]
        pub(super) struct Counters {
            $($name: AtomicU64,)*
        }

        impl Counters {
            /// Adds `tally` and empties it.
            pub(super) fn add(&self, tally: &mut Tally) {
                $(
                    let count = std::mem::take(&mut tally.$name);
                    if count > 0 {
                        self.$name.fetch_add(count, Ordering::Relaxed);
                    }
                )*
            }

            /// All counts by name.
            pub(super) fn list(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.load(Ordering::Relaxed)),)*]
            }
        }
    };
}

counters! {
    rx_packets: "Frames given to the guest.",
    rx_bytes: "Their bytes, without headers.",
    rx_dropped: "Frames that did not fit the guest's buffers or were no frames.",
    rx_stalls: "Times the guest had no buffer for frames.",
    tx_packets: "Frames taken from the guest and given to the host.",
    tx_bytes: "Their bytes, without headers.",
    tx_dropped: "Frames the host did not take.",
    tx_malformed: "Frames of a false length or with a false header.",
    tx_spoofed: "Frames with another source address than the device's.",
    tx_blocked: "Times the host could not take more at once.",
    port_read_errors: "Reads of the host's side that failed.",
    port_write_errors: "Writes to the host's side that failed.",
    port_events: "Times the host's side had something to say.",
    rx_doorbells: "Times the driver rang with buffers.",
    tx_doorbells: "Times the driver rang with frames.",
    queue_errors: "Queues that the driver spoiled.",
}
