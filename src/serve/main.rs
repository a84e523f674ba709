//! The `nacelle-serve` program; `nacelle serve` and `nacelle certs` become it.

use std::process::ExitCode;

fn main() -> ExitCode {
    nacelle::serve::main()
}
