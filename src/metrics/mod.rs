//! What is counted, and the two ways it leaves: a file of lines, and a page for who asks.
//!
//! ```text
//!   vCPUs: exits.rs ──┐                       ┌─► line.rs ─► sink.rs: file or named pipe,
//!   devices' counters ┼─► reading.rs ─────────┤   names.rs   each minute and when asked
//!   milestones.rs ────┘   (at one moment)     │
//!   API: requests.rs ─────────────────────────┴─► openmetrics.rs ─► GET /metrics/openmetrics
//! ```
//!
//! Counters belong to what they count and only ever grow; nothing here is written while the
//! guest works. The lines are Firecracker's, because programs read them; the page has all.
//!
//! The controller's thread does both. It must never wait for a reader, so a line that the file
//! or pipe does not take at once is dropped and counted, and what it would have said is in the
//! next one.

pub mod exits;
mod line;
mod milestones;
mod names;
mod openmetrics;
pub mod reading;
pub mod requests;
mod sink;
pub mod times;

use std::{
    io,
    path::PathBuf,
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use api::{FaultKind, spec};

pub use exits::{ExitSums, Exits};
pub use milestones::{Milestone, Milestones, NAMES};
pub use reading::Reading;

use self::{line::Counts, requests::ApiCounters, sink::Sink};
use crate::logger;

/// Time between two lines (Firecracker's).
pub const PERIOD: Duration = Duration::from_secs(60);
/// When the other half of a torn line is tried again.
const AGAIN: Duration = Duration::from_secs(5);

/// Why metrics are not written.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// Where they go was said before.
    #[error("Metrics already go to {}; that can be set only once", .0.display())]
    Set(PathBuf),
    /// The file cannot be opened.
    #[error("The metrics file {} cannot be opened", path.display())]
    Open {
        /// Which one.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file or pipe did not take a line.
    #[error("The metrics could not be written to {}", path.display())]
    Lost {
        /// Where to.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl MetricsError {
    /// Whose fault it is.
    pub fn kind(&self) -> FaultKind {
        match self {
            MetricsError::Set(_) => FaultKind::Conflict,
            MetricsError::Open { .. } => FaultKind::Invalid,
            MetricsError::Lost { .. } => FaultKind::Internal,
        }
    }
}

/// What the caller of this process measured (`--start-time-us` and its like).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Startup {
    /// When the process was started, on the monotonic clock, in microseconds.
    pub start_us: Option<u64>,
    /// Processor time the process had used when it began on its own, in microseconds.
    pub start_cpu_us: Option<u64>,
    /// Processor time the caller had used for it, in microseconds.
    pub parent_cpu_us: Option<u64>,
}

/// What this process knows of itself rather than of the machine.
#[derive(Debug, Clone, Copy, Default)]
pub struct Own {
    /// Microseconds from the caller's start to the first request that could be taken.
    startup_us: u64,
    /// Processor time for it.
    startup_cpu_us: u64,
    /// Microseconds that the last pause took.
    pause_us: u64,
    /// Microseconds that the last resumption took.
    resume_us: u64,
    /// Lines of metrics that were lost.
    missed: u64,
    /// Lines of the log that were lost.
    lost_log_lines: u64,
    /// Bytes of memory that are resident, when the host tells.
    resident: Option<u64>,
}

#[derive(Debug)]
struct Target {
    spec: spec::Metrics,
    sink: Sink,
    /// Counts up to the last line that was written.
    before: Counts,
}

/// Counters of one process, and where they are written.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Requests to the API.
    pub api: ApiCounters,
    own: Own,
    target: Option<Target>,
    /// When the next line is to be written.
    next: Option<Instant>,
    /// When the rest of a torn line is tried again.
    again: Option<Instant>,
}

impl Metrics {
    /// Counters that begin now, when the process is ready for its first request.
    pub fn new(startup: Startup) -> Metrics {
        let clock = |id| {
            let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            // SAFETY: the call fills the structure it is given.
            unsafe { libc::clock_gettime(id, &raw mut time) };
            time.tv_sec as u64 * 1_000_000 + time.tv_nsec as u64 / 1000
        };
        let wall = startup.start_us.map(|start| clock(libc::CLOCK_MONOTONIC).saturating_sub(start));
        let processor = startup.start_cpu_us.map(|start| {
            let own = clock(libc::CLOCK_PROCESS_CPUTIME_ID).saturating_sub(start);
            own.saturating_add(startup.parent_cpu_us.unwrap_or(0))
        });
        let own =
            Own { startup_us: wall.unwrap_or(0), startup_cpu_us: processor.unwrap_or(0), ..Own::default() };
        Metrics { own, ..Metrics::default() }
    }

    /// Says where lines go. This can be said once.
    pub fn configure(&mut self, spec: &spec::Metrics) -> Result<(), MetricsError> {
        let path = spec.metrics_path.clone();
        if let Some(target) = &self.target {
            return Err(MetricsError::Set(target.spec.metrics_path.clone()));
        }
        let sink = Sink::open(&path).map_err(|source| MetricsError::Open { path, source })?;
        self.target = Some(Target { spec: spec.clone(), sink, before: Counts::new() });
        Ok(())
    }

    /// Whether it was said where lines go; without that there is no need for a reading.
    pub fn is_configured(&self) -> bool {
        self.target.is_some()
    }

    /// The machine was started: writes the first line, and one each [`PERIOD`] from now on. A
    /// line that is lost is in the log and in the count.
    pub fn begin(&mut self, reading: &Reading) {
        if self.target.is_some() {
            self.next = Some(Instant::now() + PERIOD);
            self.flush_or_log(reading);
        }
    }

    /// When [`Metrics::is_due`] has something to do.
    pub fn due(&self) -> Option<Instant> {
        [self.next, self.again].into_iter().flatten().min()
    }

    /// Whether the next line is to be written at `now`; each is due once. Also tries to finish
    /// a torn one.
    pub fn is_due(&mut self, now: Instant) -> bool {
        if let Some(target) = self.target.as_mut().filter(|_| self.again.is_some_and(|t| t <= now)) {
            // What hinders it is said when a whole line is lost.
            let _ = target.sink.finish();
            self.again = target.sink.is_torn().then(|| now + AGAIN);
        }
        let due = self.next.is_some_and(|next| next <= now);
        if due {
            // Not a period after it was due: who slept for long has not missed many lines.
            self.next = Some(now + PERIOD);
        }
        due
    }

    /// Writes a line and says in the log when it is lost.
    pub fn flush_or_log(&mut self, reading: &Reading) {
        if let Err(error) = self.flush(reading) {
            let cause = std::error::Error::source(&error).map(|e| format!(": {e}"));
            log::warn!("{error}{}", cause.unwrap_or_default());
        }
    }

    /// Writes a line now. Without a place to write to this does nothing.
    pub fn flush(&mut self, reading: &Reading) -> Result<(), MetricsError> {
        self.observe();
        let Some(target) = &mut self.target else { return Ok(()) };
        let now = line::counts(reading, &self.api, &self.own);
        let counts = line::since(&now, &target.before);
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let time = u64::try_from(time).unwrap_or(u64::MAX);
        let line = line::line(time, &target.spec, reading, &self.own, &counts);
        let written = target.sink.write(&line);
        self.again = target.sink.is_torn().then(|| Instant::now() + AGAIN);
        match written {
            Ok(()) => {
                target.before = now;
                Ok(())
            }
            Err(source) => {
                self.own.missed += 1;
                Err(MetricsError::Lost { path: target.spec.metrics_path.clone(), source })
            }
        }
    }

    /// Everything as text in OpenMetrics 1.0.
    pub fn page(&mut self, reading: &Reading) -> String {
        self.observe();
        self.own.resident = resident();
        openmetrics::text(reading, &self.api, &self.own)
    }

    /// The machine was paused, which took so long.
    pub fn paused(&mut self, took: Duration) {
        self.own.pause_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
    }

    /// The machine was resumed, which took so long.
    pub fn resumed(&mut self, took: Duration) {
        self.own.resume_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
    }

    fn observe(&mut self) {
        self.own.lost_log_lines = logger::LOST.load(Relaxed);
    }
}

/// Bytes of this process's memory that are resident, the guest's among them.
fn resident() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = text.split_whitespace().nth(1)?.parse().ok()?;
    // SAFETY: asks for a number.
    let page = u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).ok()?;
    pages.checked_mul(page)
}

#[cfg(test)]
mod tests;
