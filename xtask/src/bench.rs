//! `cargo xtask bench`: what nacelle costs, beside a peer or a floor measured in the same run.
//!
//! | bench | measures | beside |
//! |---|---|---|
//! | `boot` | exec to guest init to exit: processor time, exits | QEMU's microvm, any `--peer` |
//! | `api` | the API: until it is served, a question, the call that starts a machine | any `--peer` |
//! | `start` | exec to the first `KVM_RUN`, and an idle machine's footprint | its limits |
//! | `block` | random reads by a polling guest | the same reads by a native io_uring program |
//! | `net` | large packets through a tap | reads and writes on the tap itself |
//! | `vsock` | streams and round trips to a unix socket | a socket pair |
//! | `snapshot` | a machine stopped and written down | write(2) of the same bytes, any `--peer` |
//! | `restore` | exec to loaded, exec to the guest's first line | any `--peer` |
//! | `clones` | one of forty clones asleep, and its start | `runc`, any `--peer` |
//!
//! An absolute figure of one machine says little on another one, so every figure has its
//! counterpart from the same minutes on the same machine, and what counts is the ratio.
//!
//! ```text
//!   boot, api, snapshot, restore, clones:
//!           this program -> lab counting instructions -> this program (--inside) -> monitors
//!   others: this program -> nacelle vmm -> bare-metal guest of tests/payload
//! ```
//!
//! The first group counts instructions where the host has no hardware virtualization: times are of
//! a machine that does 500 million instructions a second, and repeat within a percent.

mod api;
mod block;
mod boot;
mod clones;
mod inside;
mod machine;
mod net;
mod process;
mod report;
mod restore;
mod saved;
mod snapshot;
mod spent;
mod start;
mod trace;
mod vsock;

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};

use crate::build;

/// What `cargo xtask bench` takes.
#[derive(Args)]
pub struct Arguments {
    /// What to measure
    what: What,
    /// Print one JSON object instead of tables
    #[arg(long)]
    json: bool,
    /// How often everything is measured; the median counts
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Another monitor for the benchmarks that take one, as NAME=PROGRAM; it must understand Firecracker's flags and
    /// configuration file. May be repeated
    #[arg(long, value_name = "NAME=PROGRAM")]
    peer: Vec<String>,
    /// Measure this nacelle instead of a release build of this tree
    #[arg(long, value_name = "PROGRAM")]
    nacelle: Option<PathBuf>,
    /// The part of a benchmark that runs in the lab, by its plan
    #[arg(long, hide = true, value_name = "PLAN")]
    inside: Option<PathBuf>,
}

/// The benchmarks.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// Exec to guest init to exit
    Boot,
    /// The API: until it is served, a question, the call that starts a machine
    Api,
    /// Exec to the first KVM_RUN, and what an idle machine keeps
    Start,
    /// Random reads of a disk
    Block,
    /// Frames through a tap
    Net,
    /// Streams and round trips to a unix socket
    Vsock,
    /// A machine stopped and written down
    Snapshot,
    /// A saved machine loaded
    Restore,
    /// Many clones of one snapshot
    Clones,
}

/// Runs one benchmark; 0 when every target was met, 1 when one was missed.
pub fn run(arguments: &Arguments) -> Result<u8> {
    if let Some(plan) = &arguments.inside {
        return match arguments.what {
            What::Api => api::inside(plan),
            What::Snapshot => snapshot::inside(plan),
            What::Restore => restore::inside(plan),
            What::Clones => clones::inside(plan),
            _ => boot::inside(plan),
        };
    }
    let report = match arguments.what {
        What::Boot => boot::run(arguments)?,
        What::Api => api::run(arguments)?,
        What::Start => start::run(arguments)?,
        What::Block => block::run(arguments)?,
        What::Net => net::run(arguments)?,
        What::Vsock => vsock::run(arguments)?,
        What::Snapshot => snapshot::run(arguments)?,
        What::Restore => restore::run(arguments)?,
        What::Clones => clones::run(arguments)?,
    };
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    Ok(u8::from(!report.is_met()))
}

impl Arguments {
    /// The program that is measured.
    fn nacelle(&self) -> Result<PathBuf> {
        match &self.nacelle {
            Some(path) if path.is_file() => Ok(std::path::absolute(path)?),
            Some(path) => bail!("--nacelle is {}, which is no file", path.display()),
            None => build::release(),
        }
    }
}
