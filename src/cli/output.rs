//! What commands print about machines: tables for people, JSON for programs.
//!
//! A table's columns are as wide as their widest cell, three spaces apart, as `docker ps` prints
//! them. Cells may hold text that a guest or an image chose, so control characters never get
//! through. A reader that goes away (`nacelle ls | head -1`) ends the command without a word.

use std::io::{self, Write};

use serde::Serialize;

use super::failure::{Failure, Outcome};

/// How a list is printed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Columns for people
    #[default]
    Table,
    /// JSON with stable keys
    Json,
}

/// Rows under a header.
#[derive(Debug, Clone)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table with these column titles.
    pub fn new(titles: &[&str]) -> Table {
        Table { rows: vec![titles.iter().map(|t| (*t).to_owned()).collect()] }
    }

    /// Adds a row; cells beyond the titles are dropped.
    pub fn add(&mut self, cells: impl IntoIterator<Item = String>) {
        let columns = self.rows.first().map_or(0, Vec::len);
        self.rows.push(cells.into_iter().take(columns).map(|c| clean(&c)).collect());
    }

    /// The table as lines, each ended by a newline; without spaces at their ends.
    pub fn text(&self) -> String {
        let columns = self.rows.first().map_or(0, Vec::len);
        let width = |at: usize| self.rows.iter().filter_map(|r| r.get(at)).map(|c| c.chars().count()).max();
        let widths: Vec<usize> = (0..columns).map(|at| width(at).unwrap_or(0)).collect();
        let mut text = String::new();
        for row in &self.rows {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
            let line = cells.collect::<Vec<_>>().join("   ");
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Exit code of a program that wrote to a reader who was gone: 128 and `SIGPIPE`.
pub const EXIT_UNREAD: i32 = 141;

/// Prints to standard output. If its reader is gone, the process ends, as `SIGPIPE` would end
/// it if it were not ignored for the sake of sockets.
pub fn print(text: &str) -> Outcome<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => std::process::exit(EXIT_UNREAD),
        Err(e) => Err(Failure::because("Standard output cannot be written", &e)),
        Ok(()) => Ok(()),
    }
}

/// Prints a value as indented JSON and a newline.
pub fn print_json(value: &impl Serialize) -> Outcome<()> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| Failure::because("The answer cannot be written as JSON", &e))?;
    print(&format!("{text}\n"))
}

/// Does something for each of several machines, all of them whatever happens to some. Each
/// failure goes to standard error; the exit code is 1 when there was any.
pub fn each(words: &[String], mut one: impl FnMut(&str) -> Outcome<()>) -> u8 {
    let mut code = 0;
    for word in words {
        if let Err(failure) = one(word) {
            eprintln!("nacelle: {failure}");
            code = 1;
        }
    }
    code
}

/// Text without control characters.
pub fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{FFFD}' } else { c }).collect()
}

/// The start of a text, at most `width` characters, ended by an ellipsis if something is cut.
pub fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width.saturating_sub(1)).chain(['…']).collect()
}

/// Bytes in the unit that fits, with three or four figures: `512B`, `1.5MiB`, `12.25GiB`.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count}B");
    }
    let mut value = count as f64;
    let mut unit = "";
    for name in UNITS {
        if value < 1000.0 && !unit.is_empty() {
            break;
        }
        value /= 1024.0;
        unit = name;
    }
    let digits = if value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    let text = format!("{value:.digits$}");
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text}{unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&["ID", "NAME"]);
        table.add(["abcdef".to_owned(), "x".to_owned()]);
        table.add(["a".to_owned(), String::new()]);
        assert_eq!(table.text(), "ID       NAME\nabcdef   x\na\n");
    }

    #[test]
    fn what_a_guest_chose_cannot_move_the_cursor() {
        let mut table = Table::new(&["NAME"]);
        table.add(["a\x1b[2J\nb".to_owned()]);
        assert_eq!(table.text(), "NAME\na\u{FFFD}[2J\u{FFFD}b\n");
    }

    #[test]
    fn bytes_are_short_and_exact_where_they_can_be() {
        let shown: Vec<String> =
            [0, 1023, 1024, 1536, 20 << 20, 1000 << 20, u64::MAX].into_iter().map(bytes).collect();
        assert_eq!(shown, ["0B", "1023B", "1KiB", "1.5KiB", "20MiB", "0.98GiB", "16EiB"]);
    }

    #[test]
    fn a_cut_text_says_so() {
        assert_eq!(cut("abc", 3), "abc");
        assert_eq!(cut("äöüß", 3), "äö…");
    }

    #[test]
    fn every_machine_gets_its_turn_and_any_failure_shows() {
        let mut seen = Vec::new();
        let words = ["a".to_owned(), "b".to_owned(), "c".to_owned()];
        let code = each(&words, |word| {
            seen.push(word.to_owned());
            if word == "a" { Err(Failure::new("Not this one")) } else { Ok(()) }
        });
        assert_eq!((code, seen.len()), (1, 3));
        assert_eq!(each(&[], |_| Ok(())), 0);
    }
}
