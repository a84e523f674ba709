//! nacelle: a virtual machine monitor, and the command that drives it.
//!
//! ```text
//!   cli/ ── one file a subcommand ───────────────┐
//!   nacelle vmm: cli/vmm.rs ─► controller.rs ─► vm/ (build, memory, attach) ─► vcpu/
//!                                  │ asks         debug/ (gdb)
//!                               phase.rs: what is allowed when
//!   nacelle-serve: serve/ ── one HTTP door for all machines of a host, with the code of cli/
//! ```
//!
//! The crates beside this one know nothing of it: `api` is data, `arch` is the processor,
//! `devices` are devices, `guest` is what runs inside, `sandbox` is images. Only this package
//! knows KVM and all of them at once, and only `vm/build.rs` joins them.
//!
//! A machine is one process. Its threads: the main thread, which owns the machine
//! ([`controller`]); one for each vCPU; one for the devices, started when a driver first
//! drives one; one more for each disk that may block and each further queue pair.

pub mod calendar;
pub mod cli;
pub mod controller;
pub mod debug;
pub mod footprint;
pub mod logger;
pub mod metrics;
pub mod pagemap;
pub mod pager;
pub mod phase;
pub mod serve;
pub mod server;
pub mod signals;
pub mod snapshot;
pub mod vcpu;
pub mod vm;
