//! The monitor's log: one line an event, to standard error, a file or a named pipe.
//!
//! A sink that is full or blocked never blocks the machine: it is opened and written without
//! waiting, and a line that does not fit is dropped and counted. Lines that a guest can cause
//! are limited where they are made; here the whole log is limited once more, to
//! [`LINES_PER_SECOND`], because a guest finds the line that was forgotten.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use api::spec::{LogLevel, Logger as LoggerSpec};
use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::calendar;

/// Lines written in any one second; further ones are counted and dropped.
pub const LINES_PER_SECOND: u64 = 200;

/// Lines that were dropped because the sink or the limit did not allow them.
pub static LOST: AtomicU64 = AtomicU64::new(0);

struct Logger {
    id: String,
    settings: Mutex<(LoggerSpec, Option<File>)>,
    /// Second of the last line, and how many lines that second has had.
    pace: Mutex<(u64, u64)>,
}

/// Starts the log for the machine called `id`. Later calls change where it goes and what it
/// holds. Fails when the file cannot be opened.
pub fn start(id: &str, spec: &LoggerSpec) -> io::Result<()> {
    static INSTANCE: std::sync::OnceLock<Logger> = std::sync::OnceLock::new();
    let sink = spec.log_path.as_ref().map(|path| {
        // A named pipe without a reader must not hold the start up.
        OpenOptions::new()
            .append(true)
            .create(true)
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .mode(0o600)
            .open(path)
    });
    let sink = sink.transpose()?;
    let logger = INSTANCE.get_or_init(|| Logger {
        id: id.to_owned(),
        settings: Mutex::default(),
        pace: Mutex::default(),
    });
    *logger.settings.lock().unwrap_or_else(PoisonError::into_inner) = (spec.clone(), sink);
    log::set_max_level(filter(spec.level));
    // Set already: the second and later calls only change the settings.
    let _ = log::set_logger(logger);
    Ok(())
}

fn filter(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Off => LevelFilter::Off,
        LogLevel::Error => LevelFilter::Error,
        LogLevel::Warning => LevelFilter::Warn,
        LogLevel::Info => LevelFilter::Info,
        LogLevel::Debug => LevelFilter::Debug,
        LogLevel::Trace => LevelFilter::Trace,
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        if !self.in_pace(now.as_secs()) {
            LOST.fetch_add(1, Relaxed);
            return;
        }
        let mut guard = self.settings.lock().unwrap_or_else(PoisonError::into_inner);
        let (spec, sink) = &mut *guard;
        let path = record.module_path().unwrap_or_default();
        if spec.module.as_ref().is_some_and(|wanted| !path.starts_with(wanted.as_str())) {
            return;
        }
        let line = self.line(spec, record, now);
        let written = match sink {
            Some(file) => file.write_all(line.as_bytes()),
            None => io::stderr().write_all(line.as_bytes()),
        };
        if written.is_err() {
            LOST.fetch_add(1, Relaxed);
        }
    }

    fn flush(&self) {}
}

impl Logger {
    fn in_pace(&self, second: u64) -> bool {
        let mut pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
        if pace.0 != second {
            *pace = (second, 0);
        }
        pace.1 += 1;
        pace.1 <= LINES_PER_SECOND
    }

    fn line(&self, spec: &LoggerSpec, record: &Record<'_>, now: std::time::Duration) -> String {
        let level = match record.level() {
            Level::Warn => "WARN",
            other => other.as_str(),
        };
        let level = if spec.show_level { format!(":{level}") } else { String::new() };
        let origin = match (spec.show_log_origin, record.file(), record.line()) {
            (true, Some(file), Some(line)) => format!(":{file}:{line}"),
            _ => String::new(),
        };
        let time = calendar::utc(now.as_secs());
        format!("{time}.{:09} [{}{level}{origin}] {}\n", now.subsec_nanos(), self.id, record.args())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_each_second() {
        let logger = Logger { id: String::new(), settings: Mutex::default(), pace: Mutex::default() };
        let passed = (0..10_000).filter(|_| logger.in_pace(7)).count() as u64;
        assert_eq!(passed, LINES_PER_SECOND);
        assert!(logger.in_pace(8));
    }
}
