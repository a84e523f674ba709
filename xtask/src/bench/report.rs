//! What a benchmark found: figures with their counterparts, and how they were got.

use std::fmt::{self, Display, Formatter};
use std::fs;
use std::path::Path;
use std::process::Command;

use serde::Serialize;

/// A program that was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Program {
    /// What the figures call it.
    pub name: String,
    /// What it says of itself, or where it comes from.
    pub version: String,
    /// How it was run.
    pub command: Vec<String>,
}

/// What a figure should be.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// Ours by the other one's: at most this.
    RatioAtMost(f64),
    /// Ours by the other one's: at least this.
    RatioAtLeast(f64),
    /// Ours: at most this.
    AtMost(f64),
}

/// One figure of ours, beside another one where there is one.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// What was measured.
    pub name: String,
    /// Its unit.
    pub unit: &'static str,
    /// Ours.
    pub ours: f64,
    /// Whose the other figure is, and it.
    pub other: Option<(String, f64)>,
    /// What it should be.
    pub target: Option<Target>,
}

impl Figure {
    /// A figure on its own.
    pub fn new(name: &str, unit: &'static str, ours: f64) -> Self {
        Self { name: name.to_owned(), unit, ours, other: None, target: None }
    }

    /// With a counterpart.
    pub fn beside(self, whose: &str, figure: f64) -> Self {
        Self { other: Some((whose.to_owned(), figure)), ..self }
    }

    /// With a target.
    pub fn target(self, target: Target) -> Self {
        Self { target: Some(target), ..self }
    }

    /// Ours by the other one's.
    pub fn ratio(&self) -> Option<f64> {
        self.other.as_ref().filter(|(_, figure)| *figure > 0.0).map(|(_, figure)| self.ours / figure)
    }

    /// Whether the target was met; `None` without one.
    pub fn is_met(&self) -> Option<bool> {
        let ratio = self.ratio();
        Some(match self.target? {
            Target::RatioAtMost(limit) => ratio.is_some_and(|ratio| ratio <= limit),
            Target::RatioAtLeast(limit) => ratio.is_some_and(|ratio| ratio >= limit),
            Target::AtMost(limit) => self.ours <= limit,
        })
    }

    fn cells(&self) -> [String; 6] {
        let other = self.other.as_ref();
        let target = match self.target {
            Some(Target::RatioAtMost(limit)) => format!("ratio <= {limit}"),
            Some(Target::RatioAtLeast(limit)) => format!("ratio >= {limit}"),
            Some(Target::AtMost(limit)) => format!("<= {}", number(limit)),
            None => String::new(),
        };
        let verdict = match self.is_met() {
            Some(true) => ", met",
            Some(false) => ", MISSED",
            None => "",
        };
        [
            format!("{} [{}]", self.name, self.unit),
            number(self.ours),
            other.map_or(String::new(), |(whose, _)| whose.clone()),
            other.map_or(String::new(), |(_, figure)| number(*figure)),
            self.ratio().map_or(String::new(), |ratio| format!("{ratio:.3}")),
            target + verdict,
        ]
    }
}

/// Three digits at least, no more behind the point than mean something.
fn number(figure: f64) -> String {
    match figure.abs() {
        size if size >= 100.0 || figure.fract() == 0.0 => format!("{figure:.0}"),
        size if size >= 10.0 => format!("{figure:.1}"),
        _ => format!("{figure:.2}"),
    }
}

/// Everything one benchmark found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Its title.
    pub title: String,
    /// Where it ran.
    pub host: String,
    /// What was measured.
    pub programs: Vec<Program>,
    /// The figures.
    pub figures: Vec<Figure>,
    /// What else is worth knowing.
    pub notes: Vec<String>,
}

impl Report {
    /// A report without figures yet.
    pub fn new(title: &str, place: &str) -> Self {
        let host = format!("{}, Linux {}, {place}", processor(), first_line("/proc/sys/kernel/osrelease"));
        Self { title: title.to_owned(), host, programs: Vec::new(), figures: Vec::new(), notes: Vec::new() }
    }

    /// Whether no target was missed.
    pub fn is_met(&self) -> bool {
        self.figures.iter().all(|figure| figure.is_met() != Some(false))
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n{}\n", self.title, self.host)?;
        let head = ["figure", "nacelle", "beside", "", "ratio", "target"].map(str::to_owned);
        let rows: Vec<[String; 6]> =
            std::iter::once(head).chain(self.figures.iter().map(Figure::cells)).collect();
        let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
        let widths: [usize; 6] = std::array::from_fn(width);
        for row in &rows {
            let line = format!(
                "{:<a$}  {:>b$}  {:<c$}  {:>d$}  {:>e$}  {}",
                row[0],
                row[1],
                row[2],
                row[3],
                row[4],
                row[5],
                a = widths[0],
                b = widths[1],
                c = widths[2],
                d = widths[3],
                e = widths[4]
            );
            writeln!(f, "{}", line.trim_end())?;
        }
        for note in &self.notes {
            writeln!(f, "\n{note}")?;
        }
        for program in &self.programs {
            writeln!(f, "\n{}: {}\n  {}", program.name, program.version, program.command.join(" "))?;
        }
        Ok(())
    }
}

fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("model name"));
    line.map_or("unknown processor", |line| line.trim_start_matches([' ', '\t', ':'])).to_owned()
}

fn first_line(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().lines().next().unwrap_or_default().to_owned()
}

/// What a program answers to `--version`, its first line.
pub fn version(program: &Path) -> String {
    let output = Command::new(program).arg("--version").output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or("version unknown").to_owned()
}

/// The middle one of `values`, of two middle ones the mean; 0 for none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match (sorted.get(middle.wrapping_sub(1)), sorted.get(middle)) {
        (Some(low), Some(high)) if sorted.len().is_multiple_of(2) => (low + high) / 2.0,
        (_, Some(value)) => *value,
        _ => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[3.0]), 3.0);
        assert_eq!(median(&[9.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 9.0]), 3.0);
    }

    #[test]
    fn a_target_of_a_ratio_needs_a_counterpart() {
        let figure = Figure::new("time", "ms", 40.0).target(Target::RatioAtMost(0.5));
        assert_eq!(figure.is_met(), Some(false));
        assert_eq!(figure.clone().beside("peer", 100.0).is_met(), Some(true));
        assert_eq!(figure.beside("peer", 79.0).is_met(), Some(false));
        assert_eq!(Figure::new("exits", "1", 35.0).target(Target::AtMost(35.0)).is_met(), Some(true));
        assert_eq!(Figure::new("exits", "1", 36.0).is_met(), None);
    }

    #[test]
    fn a_missed_target_is_seen_in_the_table_and_in_the_verdict() {
        let mut report = Report::new("Title", "here");
        report.figures.push(Figure::new("time", "ms", 1.5).target(Target::AtMost(1.0)));
        assert!(!report.is_met());
        let text = report.to_string();
        assert!(text.contains("time [ms]") && text.contains("1.50") && text.contains("MISSED"), "{text}");
    }
}
