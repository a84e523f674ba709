//! Long steps, shown on standard error: a line that counts seconds on a terminal, two plain
//! lines elsewhere.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};

/// Does `work` under the title `what`; a failure is marked and passed on.
pub fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    let bar = stderr().is_terminal().then(|| spinner(what));
    if bar.is_none() {
        eprintln!("{what} ...");
    }
    let result = work();
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    let end = if result.is_ok() { "done" } else { "failed" };
    eprintln!("{what}: {end} in {}", seconds(start.elapsed()));
    result
}

fn spinner(what: &str) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_message(what.to_owned());
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// A duration for people.
pub fn seconds(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if seconds < 1.0 {
        format!("{:.0} ms", seconds * 1000.0)
    } else if seconds < 120.0 {
        format!("{seconds:.1} s")
    } else {
        format!("{} min {} s", duration.as_secs() / 60, duration.as_secs() % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_in_the_unit_a_person_would_use() {
        assert_eq!(seconds(Duration::from_millis(7)), "7 ms");
        assert_eq!(seconds(Duration::from_millis(2_340)), "2.3 s");
        assert_eq!(seconds(Duration::from_secs(185)), "3 min 5 s");
    }

    #[test]
    fn a_failing_step_passes_its_error_on() {
        let error = step("Failing", || -> Result<()> { anyhow::bail!("no") }).unwrap_err();
        assert_eq!(error.to_string(), "no");
    }
}
