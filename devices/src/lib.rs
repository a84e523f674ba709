//! Every device a machine can have, and nothing about the hypervisor under it.
//!
//! ```text
//!            guest writes a register              guest rings a doorbell
//!                     │                                    │
//!        bus.rs  address → device                   an event descriptor
//!                     │                                    │
//!   ┌─────────────────▼───────────────┐        ┌───────────▼────────────┐
//!   │ registers: virtio/mmio.rs,      │ start  │ queues: a Handler on a │
//!   │ virtio/pci.rs over virtio/core  ├───────►│ Worker thread, no lock │
//!   │ (status, features, queue setup) │◄───────┤ block, net, vsock, ... │
//!   └─────────────────────────────────┘  stop  └───────────┬────────────┘
//!                                                          │ Interrupt
//!                                                     host.rs: Host
//! ```
//!
//! A virtio device has two halves. The *register half* sits behind its transport and is
//! touched by vCPU threads, rarely. The *queue half* is a [`worker::Handler`] that owns the
//! queues outright; nobody else touches them, so it takes no lock. `start` hands the queues
//! over, `stop` drains them and hands them back. Pause, reset, unplug, save and migration
//! are all "stop, then something": one mechanism instead of five.
//!
//! The crate never names KVM. What a transport needs of the machine (a doorbell, an
//! interrupt line, a message interrupt) comes through the small trait [`host::Host`].
//!
//! To add a device: one file under `virtio/` with a type that implements
//! [`virtio::VirtioDevice`], one variant in the specification, one arm in the builder.

pub mod bus;
pub mod disk;
pub mod host;
pub mod legacy;
pub mod limiter;
pub mod limits;
pub mod mmds;
pub mod own_path;
pub mod pci;
pub mod state;
pub mod trouble;
pub mod virtio;
pub mod worker;
pub mod written;

/// Guest memory as every device sees it: mapped regions by guest-physical address, each with a
/// record of the pages that devices wrote, which is on only while somebody wants it.
pub type Memory = vm_memory::GuestMemoryMmap<written::Written>;
