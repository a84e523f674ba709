//! `cargo xtask`: what developers do with nacelle beside building it.
//!
//! | command | does |
//! |---|---|
//! | `run` | sets everything up and runs a container image in a machine of its own |
//! | `test` | all tests: unit tests directly, guest tests directly or in the lab |
//! | `lab` | runs any command in an emulated machine with a real `/dev/kvm` |
//! | `kernel` | builds nacelle's small guest kernel |
//! | `fuzz` | gives bytes that lie to what reads bytes |
//! | `bench` | measures, beside a peer or a floor of the same run |
//!
//! The program is static, because it is also process 1 of the lab's machine (`lab::init`).

mod bench;
mod build;
mod debian;
mod elf_kernel;
mod fuzz;
mod host;
mod image;
mod kernel;
mod lab;
mod progress;
mod python;
mod run;
mod test;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

/// Developer commands of nacelle.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Set everything up and run a container image in a machine of its own
    Run {
        /// What `nacelle run` gets: flags, an image ("busybox" is made here), a command.
        /// Without any, a short tour
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "IMAGE COMMAND")]
        arguments: Vec<OsString>,
    },
    /// Run all tests, guest tests in the lab where the host cannot
    Test {
        /// Parts of test names, and flags for the test programs
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        filter: Vec<OsString>,
    },
    /// Run a command in an emulated machine that has a real /dev/kvm
    Lab(LabArguments),
    /// Build nacelle's guest kernel from Debian's kernel source
    Kernel {
        /// Fetch Debian's prebuilt cloud kernel instead of building one
        #[arg(long, conflicts_with = "jobs")]
        debian: bool,
        /// Compilers at a time; all processors when not given
        #[arg(short, long)]
        jobs: Option<u32>,
    },
    /// Measure boot, the API, start, disks, network, vsock or snapshots beside a peer or a floor of the same run
    Bench(bench::Arguments),
    /// Try bytes that lie on what reads files, requests and states, by the million
    Fuzz(fuzz::Arguments),
    /// Run a test program in the lab, for cargo's runner setting
    #[command(hide = true)]
    LabRunner {
        /// The test program and its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<OsString>,
    },
}

#[derive(Args)]
struct LabArguments {
    /// Memory of the machine in MiB
    #[arg(short, value_name = "MB", default_value_t = 4096)]
    memory: u32,
    /// Processors of the machine
    #[arg(short, value_name = "CPUS", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// Count instructions: one processor whose clock is driven by them, so that times repeat
    #[arg(short)]
    instructions: bool,
    /// Connect it to the host's network, outwards only
    #[arg(short)]
    network: bool,
    /// Make this directory of the host writable in there; may be repeated
    #[arg(short, value_name = "DIR")]
    writable: Vec<PathBuf>,
    /// Use this directory as the machine's root instead of the host's
    #[arg(short, value_name = "ROOT", default_value = "/")]
    root: PathBuf,
    /// Set a variable, or pass the caller's one on; may be repeated
    #[arg(short, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// End the run with code 124 after this time
    #[arg(short, value_name = "SECONDS")]
    time_limit: Option<u64>,
    /// The command and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    command: Vec<OsString>,
}

fn main() -> ExitCode {
    if lab::init::is_wanted() {
        lab::init::main();
    }
    let (command, failure) = match Cli::parse().command {
        Task::Lab(arguments) => (run_in_lab(&arguments), lab::FAILED),
        Task::Run { arguments } => (run::run(&arguments), lab::FAILED),
        Task::Test { filter } => (test::run(&filter), 1),
        Task::Kernel { debian, jobs } => (make_kernel(debian, jobs), 1),
        Task::Bench(arguments) => (bench::run(&arguments), lab::FAILED),
        Task::Fuzz(arguments) => (fuzz::run(&arguments), 1),
        Task::LabRunner { command } => (lab::run_test(&command), lab::FAILED),
    };
    match command {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::from(failure)
        }
    }
}

fn make_kernel(debian: bool, jobs: Option<u32>) -> Result<u8> {
    let place =
        if debian { kernel::debian_cloud()? } else { kernel::build(jobs.unwrap_or_else(host::processors))? };
    println!("{}", place.display());
    Ok(0)
}

fn run_in_lab(arguments: &LabArguments) -> Result<u8> {
    let lab = lab::Lab {
        memory_mib: arguments.memory,
        processors: arguments.cpus,
        network: arguments.network,
        count_instructions: arguments.instructions,
        writable: arguments.writable.clone(),
        root: std::fs::canonicalize(&arguments.root)
            .map_err(|error| anyhow::anyhow!("Cannot use {}: {error}", arguments.root.display()))?,
        environment: arguments.env.iter().filter_map(|text| lab::variable(text)).collect(),
        time_limit: arguments.time_limit.map(Duration::from_secs),
        ..lab::Lab::default()
    };
    lab.run(&arguments.command)
}
