//! How far the work is: a bar on a terminal, a line each quarter elsewhere, nothing when asked
//! to be quiet; and the signals that stop it.

use std::{
    ops::ControlFlow,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::super::{
    failure::{Outcome, doing},
    terminal,
};
use crate::{
    signals::{ENDING, Signals},
    snapshot::Watch,
};

/// Exit code of a command that was interrupted: 128 and `SIGINT`.
pub const EXIT_INTERRUPTED: u8 = 130;
/// Work of less than this is over before anybody wonders; it gets no lines.
const WORTH_A_LINE: u64 = 256 << 20;

/// Shows work on snapshots, and stops it at a signal. From its making on, signals that end a
/// program wait for the work to look.
pub struct Watching {
    doing: &'static str,
    quiet: bool,
    bar: Option<ProgressBar>,
    quarter: AtomicU64,
    signals: Signals,
    interrupted: AtomicBool,
}

impl Watching {
    /// Watches work that is called `doing`, as in `Verifying`.
    pub fn new(doing_what: &'static str, quiet: bool) -> Outcome<Watching> {
        let signals = doing(Signals::block(&ENDING), || "Signals cannot be set up".to_owned())?;
        let bar = (!quiet && terminal::is_terminal(2)).then(|| {
            let style = "{prefix} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}";
            let style = ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            bar.set_prefix(doing_what);
            bar.with_style(style.progress_chars("=> "))
        });
        let (quarter, interrupted) = (AtomicU64::new(0), AtomicBool::new(false));
        Ok(Watching { doing: doing_what, quiet, bar, quarter, signals, interrupted })
    }

    /// Whether a signal stopped the work.
    pub fn interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }
}

impl Watch for Watching {
    fn step(&self, done: u64, total: u64) -> ControlFlow<()> {
        if self.interrupted() || self.signals.next().is_some() {
            self.interrupted.store(true, Ordering::Relaxed);
            return ControlFlow::Break(());
        }
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
        } else if !self.quiet && total >= WORTH_A_LINE {
            let quarter = (u128::from(done) * 4 / u128::from(total)) as u64;
            if self.quarter.swap(quarter, Ordering::Relaxed) < quarter {
                eprintln!("{}: {} % of {total} bytes", self.doing, quarter * 25);
            }
        }
        ControlFlow::Continue(())
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
