//! `nacelle completion`: what a shell needs to complete the command line.

use clap::{Args as ClapArgs, ValueEnum};
use clap_complete::Shell;

use super::{failure::Outcome, output};

/// Print the completion script of a shell
#[derive(Debug, ClapArgs)]
#[command(after_help = "For this shell alone: source <(nacelle completion bash)")]
pub struct Args {
    /// For which shell
    #[arg(value_enum)]
    shell: Kind,
}

/// The shells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// GNU Bash
    Bash,
    /// Z shell
    Zsh,
    /// The friendly interactive shell
    Fish,
}

/// Prints it.
pub fn run(args: &Args) -> Outcome<u8> {
    output::print(&script(args.shell))?;
    Ok(0)
}

fn script(kind: Kind) -> String {
    let shell = match kind {
        Kind::Bash => Shell::Bash,
        Kind::Zsh => Shell::Zsh,
        Kind::Fish => Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut super::command(), "nacelle", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        crate::cli::command().debug_assert();
    }

    #[test]
    fn every_shell_learns_the_subcommands() {
        for kind in [Kind::Bash, Kind::Zsh, Kind::Fish] {
            let script = script(kind);
            assert!(script.contains("nacelle") && script.contains("completion"), "{kind:?}");
        }
    }
}
