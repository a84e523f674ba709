//! `cargo xtask test`: all tests, each where it can run.
//!
//! ```text
//!   every crate but nacelle      cargo test                     directly
//!   nacelle, library, programs   cargo test --lib --bins        directly
//!   nacelle, tests/*.rs          cargo test --test '*'          directly with hardware
//!                                                               virtualization, else each
//!                                                               test program in the lab
//! ```
//!
//! The last is by cargo's runner setting, so that what a person reads is cargo's own output and
//! the last lines are its summary. Tests that need a guest find what they need in variables:
//! `NACELLE_CACHE_DIR` (kernels lie in `kernels/` there), `NACELLE_TEST_KERNEL` (Debian's cloud
//! kernel), `NACELLE_TEST_BUILT_KERNEL` (nacelle's own, where it is built),
//! `NACELLE_TEST_IMAGE` (an OCI layout with busybox), `NACELLE_TEST_PYTHON` (an interpreter with
//! a published Firecracker client).

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result};

use crate::{build, host, image, kernel, lab, python};

/// Runs all tests, or those whose names contain one of `filter`; flags for the test programs
/// may be among them. 0 when all passed.
pub fn run(filter: &[OsString]) -> Result<u8> {
    let in_lab = !host::has_hardware_virtualization();
    host::need("the tests", &host::TEST_PACKAGES)?;
    lab::prepare()?;
    let mut passed = true;
    if let Err(error) = build::nacelle() {
        passed = false;
        eprintln!("{error:#}\nGoing on with the tests that do without.");
    }
    let variables = variables()?;
    let filter: Vec<&OsString> = filter.iter().filter(|argument| *argument != "--").collect();
    let test = |part: &[&str], runner: Option<&str>| -> Result<bool> {
        let mut cargo = build::cargo();
        cargo.arg("test").args(runner.iter().flat_map(|runner| ["--config", runner]));
        cargo.args(part).arg("--no-fail-fast").arg("--").args(&filter);
        Ok(command_passes(cargo.envs(variables.iter().cloned())))
    };
    for part in [&["--workspace", "--exclude", "nacelle"][..], &["-p", "nacelle", "--lib", "--bins"]] {
        if !test(part, None)? {
            passed = false;
            eprintln!("Tests failed in: cargo test {}; going on with the others.", part.join(" "));
        }
    }
    let runner = in_lab.then(lab_runner).transpose()?;
    if in_lab {
        eprintln!("This host has no hardware virtualization: guest tests run in the lab.");
    }
    passed &= test(&["-p", "nacelle", "--test", "*"], runner.as_deref())?;
    Ok(u8::from(!passed))
}

fn command_passes(command: &mut Command) -> bool {
    // SAFETY: between fork and exec one system call is made.
    unsafe { command.pre_exec(host::end_with_parent) };
    match command.status() {
        Ok(status) => status.success(),
        Err(error) => {
            eprintln!("Cannot run cargo: {error}");
            false
        }
    }
}

fn variables() -> Result<Vec<(&'static str, OsString)>> {
    let mut variables = vec![
        ("NACELLE_CACHE_DIR", host::cache_directory("NACELLE_CACHE_DIR", "")?.into_os_string()),
        ("NACELLE_TEST_KERNEL", kernel::debian_cloud()?.into_os_string()),
        ("NACELLE_TEST_IMAGE", image::busybox()?.into_os_string()),
    ];
    match python::interpreter() {
        Ok(python) => variables.push(("NACELLE_TEST_PYTHON", python.into_os_string())),
        Err(error) => eprintln!("{error:#}\nGoing on; the tests that need it will fail."),
    }
    variables.extend(kernel::built().map(|kernel| ("NACELLE_TEST_BUILT_KERNEL", kernel.into_os_string())));
    Ok(variables)
}

/// cargo's setting that makes it start test programs through this one.
fn lab_runner() -> Result<String> {
    let own = build::own_program()?;
    let own = own.to_str().context("This program's path is not UTF-8")?;
    // A JSON string is a TOML one.
    let own = serde_json::to_string(own)?;
    Ok(format!("target.x86_64-unknown-linux-gnu.runner=[{own},\"lab-runner\"]"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runner_setting_names_this_program_and_its_task() {
        let setting = lab_runner().unwrap();
        let own = std::env::current_exe().unwrap();
        assert!(setting.contains(own.to_str().unwrap()), "{setting}");
        assert!(setting.ends_with(",\"lab-runner\"]"), "{setting}");
    }

    #[test]
    fn a_program_that_fails_or_is_not_there_does_not_pass() {
        assert!(command_passes(&mut Command::new("true")));
        assert!(!command_passes(&mut Command::new("false")));
        assert!(!command_passes(&mut Command::new("no-such-program-here")));
    }
}
