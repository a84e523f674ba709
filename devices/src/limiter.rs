//! Rate limiters: token buckets of bytes and operations.

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

/// Limits of one direction of a device. In a live change an absent bucket stays as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LimiterConfig {
    /// Bytes.
    pub bandwidth: Option<BucketConfig>,
    /// Operations.
    pub ops: Option<BucketConfig>,
}
