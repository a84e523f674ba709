//! How the making of an image looks: a bar on a terminal, plain lines elsewhere, nothing when
//! asked to be quiet. Always on standard error: standard output is the container's.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use sandbox::{Event, Progress};

use super::terminal;

/// Shows the events of an image being opened.
pub struct Reporter {
    quiet: bool,
    bar: Option<ProgressBar>,
    /// What was said last, so that plain lines are not repeated for every piece that arrives.
    said: Option<(usize, u64)>,
}

impl Reporter {
    /// Shows events, unless `quiet`.
    pub fn new(quiet: bool) -> Reporter {
        Reporter { quiet, bar: None, said: None }
    }

    /// Takes the bar away.
    pub fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn line(&mut self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => eprintln!("{text}"),
        }
    }

    fn download(&mut self, index: usize, count: usize, done: u64, total: u64) {
        if terminal::is_terminal(2) {
            let bar = self.bar.get_or_insert_with(|| {
                let style = "layer {prefix} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}";
                let style =
                    ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
                let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
                bar.with_style(style.progress_chars("=> "))
            });
            bar.set_prefix(format!("{}/{count}", index + 1));
            bar.set_length(total);
            bar.set_position(done);
            return;
        }
        // A line each quarter says enough.
        let quarter = (done * 4).checked_div(total).unwrap_or(4);
        if self.said.replace((index, quarter)) != Some((index, quarter)) {
            let percent = (done * 100).checked_div(total).unwrap_or(100);
            self.line(&format!("Layer {} of {count}: {percent} % of {total} bytes", index + 1));
        }
    }
}

impl Progress for Reporter {
    fn event(&mut self, event: Event<'_>) {
        if self.quiet {
            return;
        }
        match event {
            Event::Resolving { name } => self.line(&format!("Asking the registry for {name}")),
            Event::Waiting { .. } => self.line("Waiting for another process that makes the same image"),
            Event::Download { index, count, done, total, .. } => self.download(index, count, done, total),
            Event::Apply { index, count } => {
                self.finish();
                self.line(&format!("Unpacking layer {} of {count}", index + 1));
            }
            Event::Walk { path } => self.line(&format!("Reading {}", path.display())),
            Event::Ready { bytes, cached: false, .. } => {
                self.finish();
                self.line(&format!("Image ready ({} KiB)", bytes >> 10));
            }
            Event::Ready { .. } => {}
        }
    }
}
