//! `cargo xtask fuzz TARGET`: bytes that lie, tried by the million, with libFuzzer's eyes for what
//! of the program they reach.
//!
//! ```text
//!   cargo build, instrumented, into TARGET_DIR/fuzz    tests/fuzz: the targets and their seeds
//!   TARGET_DIR/fuzz/corpus/TARGET                      what reached something new; kept
//!   TARGET_DIR/fuzz/found/TARGET-*                     inputs that failed
//! ```
//!
//! The stable compiler can instrument: the flags are those that `cargo fuzz` passes, without the
//! address sanitizer, which needs a nightly one. An input that failed is run again by
//! `cargo xtask fuzz TARGET -- FILE`.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::{build, host, progress};

const PLATFORM: &str = "x86_64-unknown-linux-gnu";

/// Coverage as libFuzzer reads it: counters, where they are, and what is compared with what.
const INSTRUMENTED: [&str; 5] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// What `cargo xtask fuzz` takes.
#[derive(Args)]
pub struct Arguments {
    /// What is tried: state, index, working-set, snapshot, pair, devices, spec, cpu, api
    target: String,
    /// For how long
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u32,
    /// Longest input, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = 16384)]
    longest: u32,
    /// For libFuzzer itself: its flags, or files to run instead
    #[arg(last = true)]
    more: Vec<OsString>,
}

/// Builds and runs a target; its exit code, which is not 0 when an input failed.
pub fn run(arguments: &Arguments) -> Result<u8> {
    host::need("fuzzing", &host::FUZZ_PACKAGES)?;
    let around = match std::env::var_os("CARGO_TARGET_DIR") {
        Some(directory) => build::repository().join(directory),
        None => build::repository().join("target"),
    };
    let around = around.join("fuzz");
    let program = instrumented(&around)?;
    let (corpus, seeds) =
        (around.join("corpus").join(&arguments.target), around.join("seeds").join(&arguments.target));
    let found = around.join("found");
    for directory in [&corpus, &seeds, &found] {
        fs::create_dir_all(directory).with_context(|| format!("Cannot make {}", directory.display()))?;
    }
    // Targets write small files by the million.
    let work = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir())?;
    let mut command = Command::new(program);
    command.env("NACELLE_FUZZ_TARGET", &arguments.target);
    command.env("NACELLE_FUZZ_SEEDS", &seeds).env("NACELLE_FUZZ_DIR", work.path());
    command.arg(format!("-artifact_prefix={}/{}-", found.display(), arguments.target));
    command.args(["-timeout=5", "-rss_limit_mb=512", "-print_final_stats=1"]);
    command.arg(format!("-max_len={}", arguments.longest));
    command.arg(format!("-max_total_time={}", arguments.seconds));
    command.args(&arguments.more);
    if !arguments.more.iter().any(|more| fs::metadata(more).is_ok_and(|m| m.is_file())) {
        command.arg(&corpus).arg(&seeds);
    }
    let status = command.status().context("Cannot run the fuzzer")?;
    Ok(host::exit_code(status))
}

fn instrumented(into: &std::path::Path) -> Result<PathBuf> {
    let flags = INSTRUMENTED.join(" ");
    progress::step_of_program(
        "Building the fuzzer (some minutes the first time)",
        build::cargo()
            .args(["build", "-p", "nacelle-fuzz", "--bin", "fuzz", "--features", "libfuzzer"])
            .args(["--target", PLATFORM, "--target-dir"])
            .arg(into)
            .env("RUSTFLAGS", flags),
    )?;
    let program = into.join(PLATFORM).join("debug/fuzz");
    if !program.is_file() {
        bail!("The build made no {}", program.display());
    }
    Ok(program)
}
