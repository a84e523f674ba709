//! The command line: one file a subcommand.

pub mod terminal;
pub mod vmm;

use std::{path::Path, process::ExitCode};

use api::Fault;

/// Runs the command that the process was called as.
pub fn main() -> ExitCode {
    let mut arguments = std::env::args();
    let name = arguments.next().unwrap_or_default();
    let called = Path::new(&name).file_name().and_then(|n| n.to_str()).unwrap_or_default();
    // The monitor is found before anything else is set up: its start is what counts.
    if called == "firecracker" {
        return vmm::main(arguments);
    }
    let mut arguments = arguments.peekable();
    if arguments.peek().is_some_and(|a| a == "vmm") {
        return vmm::main(arguments.skip(1));
    }
    eprintln!("nacelle: unknown command");
    ExitCode::from(125)
}

/// Prints a fault to standard error: what was wrong, then each cause on its own line.
pub fn print_fault(fault: &Fault) {
    eprintln!("nacelle: {}", fault.message);
    for cause in &fault.causes {
        eprintln!("  caused by: {cause}");
    }
}
