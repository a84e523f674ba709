//! What the device needs of the thing that frames go into and come out of.
//!
//! On the data path that is only a descriptor for each queue pair on which one `readv` or
//! `writev` moves one frame, its virtio-net header in front, and never waits. A tap is such a
//! thing; so is a socket that keeps message boundaries, which is what tests use.

use std::{io, os::fd::OwnedFd};

/// The host's side of a network device.
pub trait Port: Send + Sync {
    /// One non-blocking descriptor a queue pair.
    fn descriptors(&self) -> &[OwnedFd];

    /// Offloads it can take and give, as `TUN_F_` bits of `linux/if_tun.h`.
    fn offloads(&self) -> u32;

    /// Says which offloads the receiver of its frames can deal with, as `TUN_F_` bits.
    fn set_offloads(&self, flags: u32) -> io::Result<()>;

    /// Begins or ends to spread frames to queue pair `pair` (0 is always in use).
    fn set_attached(&self, pair: usize, attached: bool) -> io::Result<()>;
}
