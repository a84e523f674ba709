//! The container side, as a user meets it: the real program, real images, real machines.
//!
//! ```text
//!   streams      bytes and exit codes          registry   pulled, saved and plain images
//!   options      flags and image settings      hostile    images that mean harm, full disks
//!   interactive  a terminal                    habits     doctor, completion, what is asked wrong
//!   lifecycle    -d, ls, logs, exec, cp ...    death      processes that were killed
//!   serve        the service of a host         remote     the same through it
//!   suspend      suspend, resume, snapshot, restore, fork
//!   snapshots    snapshot create and its flags      versions   state of other builds
//!   generations  one container, many suspensions    clones     many of one container
//! ```
//!
//! Every test has a [`host::Host`]: a state directory of its own, so that tests run side by side
//! and whatever they leave behind is found. Every wait has an end, and a test that fails shows
//! what the program said.
//!
//! `cargo xtask test` names the guest kernels and the image in variables and, where the host
//! has no hardware virtualization, runs this program in the lab.

mod clones;
mod death;
mod generations;
mod habits;
mod host;
mod hostile;
mod image;
mod interactive;
mod lifecycle;
mod options;
mod registry;
mod remote;
mod serve;
mod snapshots;
mod streams;
mod suspend;
mod taps;
mod terminal;
mod versions;
