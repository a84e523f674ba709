//! All that a device may ask of the machine it is plugged into.
//!
//! Three things leave or enter a device without a register access: a *doorbell* (the guest
//! tells the device to look at a queue), an interrupt *line*, and an interrupt *message*.
//! The machine builder implements [`Host`] over the hypervisor; tests implement it over
//! plain event descriptors.
//!
//! Messages are sent, not routed: the transport holds the guest's MSI-X table and passes the
//! address and data it found there. So programming a vector costs the machine nothing (a
//! routing table would have to be replaced as a whole in the kernel, with a grace period, on
//! every change), and masked vectors stay the transport's own affair.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// Where a doorbell is rung.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Doorbell {
    /// A 32-bit register at a guest-physical address.
    Mmio(u64),
    /// A port of the x86 I/O space.
    Port(u16),
}

/// A message-signalled interrupt as the guest programmed it (PCI 3.0 section 6.8.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Message {
    /// Message address: where the write goes.
    pub address: u64,
    /// Message data: what is written there.
    pub data: u32,
}

/// What a machine offers its devices.
pub trait Host: Send + Sync {
    /// Returns a descriptor that becomes readable each time the guest writes to `at`; with
    /// `value`, only when it writes just that 16- or 32-bit value. Such writes then never
    /// reach the device's registers. Fails when the place is taken.
    fn doorbell(&self, at: Doorbell, value: Option<u32>) -> io::Result<EventFd>;

    /// Takes back a doorbell made with the same arguments.
    fn remove_doorbell(&self, at: Doorbell, value: Option<u32>, bell: &EventFd) -> io::Result<()>;

    /// Returns a descriptor that raises interrupt line `gsi` (edge) each time it is written.
    fn line(&self, gsi: u32) -> io::Result<EventFd>;

    /// Delivers a message-signalled interrupt now.
    fn message(&self, message: Message) -> io::Result<()>;
}
