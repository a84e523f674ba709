//! One token bucket, exact to a fraction of a token.
//!
//! ```text
//!                 size ┬───────── full: what comes is lost
//!                      │ level    budget: may be spent
//!                    0 ┼─────────
//!                      │          debt of a request that passed without its tokens
//! ```
//!
//! In `dt` nanoseconds `dt * size / refill` tokens come. What remains of that division is
//! kept and counted the next time, so no rate drifts, however odd the refill time and however
//! often somebody looks. All products fit 128 bits: times and sizes have 64 each.

use serde::{Deserialize, Serialize};

use super::BucketConfig;

const NANOSECONDS: u128 = 1_000_000;
/// Longest sleep, in nanoseconds, that is worth a wake-up of its own.
const NAP_MAX: u128 = 1_000_000;

/// A bucket with its tokens. Times are nanoseconds of one clock that never goes back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bucket {
    config: BucketConfig,
    /// Nanoseconds from empty to full.
    refill: u128,
    /// What is left of the one-time burst.
    burst: u64,
    /// Budget, or debt below zero: from `-u64::MAX` to `size`.
    level: i128,
    /// Part of the next token that has come, in `refill`ths.
    fraction: u128,
    /// When `level` was true.
    last: u64,
}

/// What is saved of a bucket: its limits and its tokens at the moment of saving.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BucketState {
    /// As in [`BucketConfig`].
    pub size: u64,
    /// As in [`BucketConfig`].
    pub one_time_burst: u64,
    /// As in [`BucketConfig`].
    pub refill_time_ms: u64,
    /// What is left of the one-time burst.
    pub burst_left: u64,
    /// Tokens in the bucket; at most `size`.
    pub budget: u64,
    /// Tokens owed; 0 unless `budget` is.
    pub debt: u64,
    /// Part of the next token, in nanoseconds of the refill time.
    pub fraction: u128,
}

impl Bucket {
    /// A full bucket with its burst; `None` when `config` is no limit.
    pub fn new(config: BucketConfig, now: u64) -> Option<Bucket> {
        config.is_limit().then(|| Bucket {
            config,
            refill: u128::from(config.refill_time_ms) * NANOSECONDS,
            burst: config.one_time_burst,
            level: i128::from(config.size),
            fraction: 0,
            last: now,
        })
    }

    /// The limits it was made with.
    pub fn config(&self) -> BucketConfig {
        self.config
    }

    /// Lets in what has come until `now`.
    pub fn fill(&mut self, now: u64) {
        let size = i128::from(self.config.size);
        if self.level < size {
            let passed = u128::from(now.saturating_sub(self.last));
            let come = (passed * u128::from(self.config.size)).saturating_add(self.fraction);
            self.fraction = come % self.refill;
            // At most 2^128 / 10^6, which has a sign bit to spare.
            self.level += (come / self.refill) as i128;
        }
        if self.level >= size {
            self.level = size;
            self.fraction = 0;
        }
        self.last = self.last.max(now);
    }

    /// Nanoseconds from the last [`Bucket::fill`] until `tokens` may be spent; 0: they may now.
    /// For a request that is `late` it is enough that nothing is owed.
    pub fn wait(&self, tokens: u64, late: bool) -> u64 {
        let rest = tokens.saturating_sub(self.burst);
        let beyond = late || rest > self.config.size;
        let needed = if beyond { 0 } else { i128::from(rest) };
        match u128::try_from(needed - self.level) {
            Ok(missing) if missing > 0 && rest > 0 => {
                let parts = missing.saturating_mul(self.refill) - self.fraction;
                u64::try_from(parts.div_ceil(u128::from(self.config.size))).unwrap_or(u64::MAX)
            }
            _ => 0,
        }
    }

    /// Spends `tokens`, whether they are there or not: first of the burst, then of the bucket.
    pub fn spend(&mut self, tokens: u64) {
        let burst = self.burst.min(tokens);
        self.burst -= burst;
        self.level = (self.level - i128::from(tokens - burst)).max(-i128::from(u64::MAX));
    }

    /// Spends `tokens` if they may be spent at `now`; says whether.
    pub fn take(&mut self, tokens: u64, now: u64) -> bool {
        self.fill(now);
        let may = self.wait(tokens, false) == 0;
        if may {
            self.spend(tokens);
        }
        may
    }

    /// Nanoseconds that one who waits may sleep at least: short enough that the bucket is not
    /// full by then, long enough not to be woken for every token.
    pub fn nap(&self) -> u64 {
        NAP_MAX.min(self.refill / 4) as u64
    }

    /// What is to be saved at `now`.
    pub fn save(&mut self, now: u64) -> BucketState {
        self.fill(now);
        BucketState {
            size: self.config.size,
            one_time_burst: self.config.one_time_burst,
            refill_time_ms: self.config.refill_time_ms,
            burst_left: self.burst,
            budget: u64::try_from(self.level).unwrap_or(0),
            debt: u64::try_from(-self.level).unwrap_or(0),
            fraction: self.fraction,
        }
    }

    /// A bucket with the tokens it had when it was saved, as of `now`: time did not pass for
    /// it meanwhile. Whoever wants it to have passed gives an earlier `now`. An impossible
    /// state is refused with the reason.
    pub fn restore(state: &BucketState, now: u64) -> Result<Bucket, String> {
        let config = BucketConfig {
            size: state.size,
            one_time_burst: state.one_time_burst,
            refill_time_ms: state.refill_time_ms,
        };
        let Some(full) = Bucket::new(config, now) else {
            let (size, time) = (state.size, state.refill_time_ms);
            return Err(format!("a bucket of {size} tokens in {time} ms is no limit"));
        };
        let wrong = if state.budget > state.size {
            Some(format!("a bucket of {} tokens holds {}", state.size, state.budget))
        } else if state.budget > 0 && state.debt > 0 {
            Some(format!("a bucket holds {} tokens and owes {}", state.budget, state.debt))
        } else if state.burst_left > state.one_time_burst {
            Some(format!("{} tokens are left of a burst of {}", state.burst_left, state.one_time_burst))
        } else if state.fraction >= full.refill {
            Some(format!("a part of a token is {} ns of {}", state.fraction, full.refill))
        } else {
            None
        };
        match wrong {
            Some(reason) => Err(reason),
            None => Ok(Bucket {
                burst: state.burst_left,
                level: i128::from(state.budget) - i128::from(state.debt),
                fraction: state.fraction,
                ..full
            }),
        }
    }
}
