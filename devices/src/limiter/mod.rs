//! Rate limiters: token buckets of bytes and operations, with the semantics of Firecracker.
//!
//! ```text
//!   register half                       queue half (one a queue, on a worker)
//!   ─────────────                       ────────────────────────────────────────────
//!   Throttle ◄──────── shared ────────► Gate: a request? ─ take() ─► yes: served
//!     Limiter                             │                          no:  put back, shut
//!       Bucket of bytes                   └ timerfd ── it is time ─► open, look again
//!       Bucket of operations
//! ```
//!
//! [`Bucket`] and [`Limiter`] are plain values that are told what time it is; they know
//! neither clocks nor descriptors. [`Throttle`] puts one of them behind a lock, so that the
//! queues of a device share its limits and its owner can change them. A [`Gate`] is what one
//! queue holds of it, with the timer that wakes the queue.
//!
//! **The rules.** A bucket starts full and fills evenly, `size` tokens in `refill_time`; its
//! one-time burst is spent first and never comes back. A request needs its tokens of both
//! buckets at once and takes them of both or of none. A request larger than a bucket could
//! never be had so; it passes as soon as the bucket is in no debt and leaves it in debt, which
//! has to fill before anything else passes. The same is granted to a request that has waited
//! as long as its own tokens take to come, in case other queues of the device emptied the
//! bucket meanwhile: so none waits for ever, and no more flows than is allowed.
//!
//! **Waiting.** A queue whose request does not pass puts it back into the driver's ring,
//! leaves its doorbell disarmed and sleeps until the timer fires: a guest can neither make it
//! spin nor lose a request by stopping, pausing or saving it meanwhile. Fast limits wake it a
//! thousand times a second at most and let it serve a small batch then. Without limits all of
//! this is one relaxed load and a branch a request, and there is no timer.

mod bucket;
mod gate;
mod pair;

pub use self::{
    bucket::{Bucket, BucketState},
    gate::{Gate, Throttle, now},
    pair::{Cost, Limiter, LimiterState, Wait},
};

/// One bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BucketConfig {
    /// Tokens it holds; 0 means no limit.
    pub size: u64,
    /// Tokens it starts with besides, once.
    pub one_time_burst: u64,
    /// Milliseconds from empty to full; 0 means no limit.
    pub refill_time_ms: u64,
}

impl BucketConfig {
    /// Whether it limits anything.
    pub fn is_limit(&self) -> bool {
        self.size > 0 && self.refill_time_ms > 0
    }
}

/// Limits of one direction of a device. In a live change an absent bucket stays as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LimiterConfig {
    /// Bytes.
    pub bandwidth: Option<BucketConfig>,
    /// Operations.
    pub ops: Option<BucketConfig>,
}

impl LimiterConfig {
    /// What is in force after the live change `change`: a bucket that is absent there stays, a
    /// present one replaces, and one of size or refill time 0 takes the limit away.
    #[must_use]
    pub fn changed(self, change: LimiterConfig) -> LimiterConfig {
        let one =
            |old: Option<BucketConfig>, new: Option<BucketConfig>| new.or(old).filter(BucketConfig::is_limit);
        LimiterConfig { bandwidth: one(self.bandwidth, change.bandwidth), ops: one(self.ops, change.ops) }
    }
}

#[cfg(test)]
mod tests;
