//! What runs inside a machine, seen from both sides of its wall.
//!
//! ```text
//!   host                                     │  machine
//!                                            │
//!   client::Machine ── unix socket ── monitor│─ virtio-vsock ── nacelle-agent (pid 1)
//!     control()   requests and answers       │                    ├─ the container's pid 1
//!     stream()    stdin, stdout, stderr      │                    └─ further processes
//!     archives    files in and out           │
//!   initrd::build, modules::resolve ─────────│─▶ /init, /lib/modules
//! ```
//!
//! This library is what the host links: [`protocol`] holds every message as plain data,
//! [`client`] speaks it with a deadline on every wait, [`initrd`] packs the agent into the
//! archive the kernel unpacks, and [`modules`] finds which kernel modules a distribution's
//! kernel needs for that. The agent itself is the binary `nacelle-agent` of this package;
//! it shares nothing with the host but [`protocol`].
//!
//! Neither side trusts the other. A guest may have replaced its agent, so the client bounds
//! every message, string and wait; the agent accepts connections from the host alone, with
//! caps on connections, processes and sizes.

pub mod client;
pub mod initrd;
pub mod modules;
pub mod protocol;
