//! Long steps, shown on standard error: a line that counts seconds on a terminal, two plain
//! lines elsewhere.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, IsTerminal, stderr};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

/// How often a long program is reported to be alive where there is no terminal.
const SIGN_OF_LIFE: Duration = Duration::from_secs(30);
/// How much of what a program said is kept for its error.
const LINES_KEPT: usize = 20;

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

/// Runs a long program under the title `what`: on a terminal with the last line that it said,
/// elsewhere with a sign of life every half minute. When it fails, the end of what it said is
/// the error.
pub fn step_of_program(what: &str, command: &mut Command) -> Result<()> {
    let start = Instant::now();
    let bar = stderr().is_terminal().then(|| spinner(what));
    if bar.is_none() {
        eprintln!("{what} ...");
    }
    let said = follow(command, |lines, last, at: &mut Instant| match &bar {
        Some(bar) => bar.set_message(format!("{what}: {}", last.trim())),
        None if at.elapsed() > SIGN_OF_LIFE => {
            *at = Instant::now();
            eprintln!("{what}: {} so far, {lines} steps", seconds(start.elapsed()));
        }
        None => {}
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    let (status, end) = said?;
    if !status.success() {
        let end: Vec<String> = end.into();
        bail!("{what} failed ({status}):\n{}", end.join("\n"));
    }
    eprintln!("{what}: done in {}", seconds(start.elapsed()));
    Ok(())
}

/// The program's status and its last lines; `see` is told of each line.
fn follow(
    command: &mut Command,
    see: impl Fn(usize, &str, &mut Instant),
) -> Result<(ExitStatus, VecDeque<String>)> {
    let name = command.get_program().to_string_lossy().into_owned();
    let (reader, writer) = std::io::pipe()?;
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn().with_context(|| format!("Cannot run {name}"))?;
    // Our copies of the writing end would keep the loop below from ending.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let (mut end, mut at) = (VecDeque::new(), Instant::now());
    for (count, line) in BufReader::new(reader).split(b'\n').enumerate() {
        let line = String::from_utf8_lossy(&line?).into_owned();
        see(count + 1, &line, &mut at);
        end.push_back(line);
        if end.len() > LINES_KEPT {
            end.pop_front();
        }
    }
    Ok((child.wait()?, end))
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
    fn a_failing_program_is_quoted() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo before; echo broken >&2; exit 4"]);
        let text = step_of_program("Trying", &mut command).unwrap_err().to_string();
        assert!(text.contains("broken") && text.contains('4'), "{text}");
        step_of_program("Trying", Command::new("sh").args(["-c", "echo fine"])).unwrap();
    }

    #[test]
    fn a_failing_step_passes_its_error_on() {
        let error = step("Failing", || -> Result<()> { anyhow::bail!("no") }).unwrap_err();
        assert_eq!(error.to_string(), "no");
    }
}
