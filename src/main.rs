//! The `nacelle` command. Called as `firecracker` it is `nacelle vmm`.

use std::process::ExitCode;

fn main() -> ExitCode {
    nacelle::cli::main()
}
