//! The two buckets of a limiter: a request needs its tokens of both.

use serde::{Deserialize, Serialize};

use super::{Bucket, BucketConfig, BucketState, LimiterConfig};

/// What one request costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    /// Bytes of data it moves.
    pub bytes: u64,
    /// Operations it counts as.
    pub ops: u64,
}

impl Cost {
    /// One operation that moves `bytes`.
    pub fn one(bytes: u64) -> Cost {
        Cost { bytes, ops: 1 }
    }
}

/// How long a request that does not pass has to wait, in nanoseconds, at least 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wait {
    /// Until its tokens will have come, if nobody else takes them.
    pub until_due: u64,
    /// To sleep before looking again; a little longer where tokens come fast.
    pub sleep: u64,
}

/// Limits of bytes and of operations, either of which may be absent. Times are nanoseconds
/// of one clock that never goes back.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Limiter {
    bandwidth: Option<Bucket>,
    ops: Option<Bucket>,
}

/// What is saved of a limiter: its limits, as they were last changed, and its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LimiterState {
    /// Bytes.
    pub bandwidth: Option<BucketState>,
    /// Operations.
    pub ops: Option<BucketState>,
}

impl Limiter {
    /// Full buckets as `config` says.
    pub fn new(config: LimiterConfig, now: u64) -> Limiter {
        let bucket = |config: Option<BucketConfig>| config.and_then(|c| Bucket::new(c, now));
        Limiter { bandwidth: bucket(config.bandwidth), ops: bucket(config.ops) }
    }

    /// Whether anything is limited.
    pub fn is_active(&self) -> bool {
        self.bandwidth.is_some() || self.ops.is_some()
    }

    /// The limits in force.
    pub fn config(&self) -> LimiterConfig {
        LimiterConfig {
            bandwidth: self.bandwidth.as_ref().map(Bucket::config),
            ops: self.ops.as_ref().map(Bucket::config),
        }
    }

    /// A live change: absent buckets stay as they are with their tokens, present ones are
    /// replaced by full ones, or removed where they are no limit.
    pub fn change(&mut self, change: LimiterConfig, now: u64) {
        if let Some(config) = change.bandwidth {
            self.bandwidth = Bucket::new(config, now);
        }
        if let Some(config) = change.ops {
            self.ops = Bucket::new(config, now);
        }
    }

    /// Takes what a request costs of both buckets, or nothing of either. A request is `late`
    /// when it has waited until it was due and still does not pass: then it only needs that
    /// nothing is owed.
    pub fn take(&mut self, cost: Cost, late: bool, now: u64) -> Result<(), Wait> {
        self.look(cost, late, now)?;
        self.spend(cost);
        Ok(())
    }

    /// Whether a request passes at `now`, taking nothing: for a request whose real cost shows
    /// only when it was carried out and is to be [spent](Limiter::spend) then.
    pub fn look(&mut self, cost: Cost, late: bool, now: u64) -> Result<(), Wait> {
        let (mut until_due, mut nap) = (0, 0);
        let pairs = [(&mut self.bandwidth, cost.bytes), (&mut self.ops, cost.ops)];
        for (bucket, tokens) in pairs.into_iter().filter_map(|(b, n)| Some((b.as_mut()?, n))) {
            bucket.fill(now);
            let wait = bucket.wait(tokens, late);
            if wait > 0 {
                until_due = until_due.max(wait);
                nap = nap.max(bucket.nap());
            }
        }
        match until_due {
            0 => Ok(()),
            _ => Err(Wait { until_due, sleep: until_due.max(nap) }),
        }
    }

    /// Takes what a request costs, whether it is there or not; what is missing is owed.
    pub fn spend(&mut self, cost: Cost) {
        if let Some(bucket) = &mut self.bandwidth {
            bucket.spend(cost.bytes);
        }
        if let Some(bucket) = &mut self.ops {
            bucket.spend(cost.ops);
        }
    }

    /// What is to be saved at `now`.
    pub fn save(&mut self, now: u64) -> LimiterState {
        LimiterState {
            bandwidth: self.bandwidth.as_mut().map(|b| b.save(now)),
            ops: self.ops.as_mut().map(|b| b.save(now)),
        }
    }

    /// A limiter with the limits and tokens it was saved with, as of `now`; see
    /// [`Bucket::restore`].
    pub fn restore(state: &LimiterState, now: u64) -> Result<Limiter, String> {
        let bucket = |state: Option<BucketState>| state.map(|s| Bucket::restore(&s, now)).transpose();
        Ok(Limiter { bandwidth: bucket(state.bandwidth)?, ops: bucket(state.ops)? })
    }
}
