//! Tests of `nacelle vmm` as a user meets it: the program, a configuration file, a real Linux
//! guest, the host's own files, taps and sockets.
//!
//! ```text
//!   boot  block  net  vsock  hostile  hotplug  vcpus  snapshot  restored  api_*  ..   what is tested
//!        |                       |
//!        v                       |
//!   vm: Setup -> Vm -> Ended     |            one machine: its process, console and log
//!        |                       |
//!   guest: the initrd   kernel: which kernel, and its ELF form
//!        |                       |
//!        v                       v
//!   side: this same program inside the guest  process: a child with a deadline
//! ```
//!
//! All of them are one program, so that they share one start of the lab. They need `/dev/kvm`
//! in which Linux boots, and root; `cargo xtask test` runs them where both are, and sets the
//! variables that name the kernels. A test that lacks something fails and says what.
//!
//! Nothing here waits by looking again after a while: every wait is for an event (a line of
//! the console, the end of a process) and has a deadline, and a missed one shows the console.

mod api_curl;
mod api_devices;
mod api_life;
mod block;
mod boot;
mod calls;
mod chain;
mod clients;
mod debug;
mod descriptors;
mod faults;
mod full;
mod generation;
mod guest;
mod hostile;
mod hotplug;
mod kernel;
mod kills;
mod lazy;
mod live;
mod net;
mod process;
mod restored;
mod side;
mod snapshot;
mod torn;
mod vcpus;
mod vm;
mod vsock;
