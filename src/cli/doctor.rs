//! `nacelle doctor`: whether this host can run machines, and what to do where it cannot.
//!
//! Every check looks at the thing itself (opens the device, asks the kernel) instead of
//! guessing from versions. A failure means that machines do not run; a warning, that
//! something is slower or missing which not everybody needs.

mod checks;
mod fixes;

use clap::Args as ClapArgs;
use serde::Serialize;

use super::{
    failure::{Failure, Outcome},
    output::{self, Format},
    terminal,
};

/// Check whether this host can run machines
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// Do what can safely be done: load modules, make device files and directories
    #[arg(long)]
    fix: bool,
    /// How to print the findings
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    format: Format,
}

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    /// As it should be.
    Ok,
    /// Machines run, but something is slower or missing.
    Warn,
    /// Machines do not run.
    Fail,
}

/// What a check found; keys stay what they are.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Finding {
    /// What was looked at, in a word or two.
    pub check: &'static str,
    /// How it is.
    pub level: Level,
    /// What was found.
    pub message: String,
    /// What to do about it.
    pub advice: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, message: impl Into<String>) -> Finding {
        Finding { check, level: Level::Ok, message: message.into(), advice: None }
    }

    fn warn(check: &'static str, message: impl Into<String>, advice: impl Into<String>) -> Finding {
        Finding { check, level: Level::Warn, message: message.into(), advice: Some(advice.into()) }
    }

    fn fail(check: &'static str, message: impl Into<String>, advice: impl Into<String>) -> Finding {
        Finding { check, level: Level::Fail, message: message.into(), advice: Some(advice.into()) }
    }
}

/// Checks the host; the exit code is 1 if machines do not run here.
pub fn run(args: &Args) -> Outcome<u8> {
    if args.fix {
        for line in fixes::apply() {
            eprintln!("nacelle doctor: {line}");
        }
    }
    let findings = checks::all();
    match args.format {
        Format::Json => output::print_json(&findings)?,
        Format::Table => output::print(&text(&findings, colours()))?,
    }
    Ok(u8::from(findings.iter().any(|f| f.level == Level::Fail)))
}

/// Fails, in the words of the checks, on a host where no machine runs: at once instead of
/// after a wait for something that cannot come.
pub fn require() -> Outcome<()> {
    let findings = checks::needed();
    let Some(first) = findings.iter().find(|f| f.level == Level::Fail) else { return Ok(()) };
    let advice = first.advice.as_ref().map(|a| format!("\n  -> {a}")).unwrap_or_default();
    let more = "\n  -> 'nacelle doctor' looks at everything";
    Err(Failure::new(format!("This host cannot run machines: {}{advice}{more}", first.message)))
}

fn colours() -> bool {
    terminal::is_terminal(1) && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

fn text(findings: &[Finding], colours: bool) -> String {
    let width = findings.iter().map(|f| f.check.len()).max().unwrap_or(0);
    let mut text = String::new();
    for finding in findings {
        let (word, colour) = match finding.level {
            Level::Ok => ("ok", 32),
            Level::Warn => ("warn", 33),
            Level::Fail => ("fail", 31),
        };
        let word = if colours { format!("\x1b[{colour}m{word:<4}\x1b[0m") } else { format!("{word:<4}") };
        text.push_str(&format!("{word}  {:<width$}  {}\n", finding.check, output::clean(&finding.message)));
        if let Some(advice) = &finding.advice {
            text.push_str(&format!("      {:<width$}  -> {advice}\n", ""));
        }
    }
    let failed = findings.iter().filter(|f| f.level == Level::Fail).count();
    text.push_str(match failed {
        0 => "\nThis host can run machines.\n",
        1 => "\nThis host cannot run machines: one check failed.\n",
        _ => "\nThis host cannot run machines: several checks failed.\n",
    });
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_finding_is_a_line_and_its_advice_another() {
        let findings = [
            Finding::ok("kernel", "6.1.0"),
            Finding::fail("kvm", "There is no /dev/kvm", "run 'nacelle doctor --fix'"),
        ];
        let shown = text(&findings, false);
        let lines: Vec<&str> = shown.lines().collect();
        assert_eq!(lines[0], "ok    kernel  6.1.0");
        assert_eq!(lines[1], "fail  kvm     There is no /dev/kvm");
        assert_eq!(lines[2], "              -> run 'nacelle doctor --fix'");
        assert!(shown.ends_with("cannot run machines: one check failed.\n"));
        assert!(text(&findings, true).contains("\x1b[31mfail\x1b[0m"));
    }

    #[test]
    fn json_has_levels_in_lower_case() {
        let json = serde_json::to_value([Finding::warn("tun", "a", "b")]).unwrap();
        assert_eq!(json[0]["level"], "warn");
        assert_eq!(json[0]["advice"], "b");
    }
}
