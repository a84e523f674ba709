//! A PCI bus with 32 slots, as much of it as virtio devices need.
//!
//! ```text
//!   guest ─► ECAM window ─► root.rs   slot → Function
//!                              │
//!                              ▼
//!                          config.rs  256 bytes: header, BARs, capabilities
//!                          msix.rs    vector table, masks, pending bits ─► Host::message
//!   guest ─► ports ───────► hotplug.rs  slots that were filled, slots wanted back
//! ```
//!
//! Configuration space is reached by ECAM alone: the operating system finds it in the ACPI
//! MCFG table, and the old ports 0xcf8 and 0xcfc add exits and nothing else. There is one bus,
//! without bridges, and each slot but the first, which is empty, has one function. There are no
//! interrupt lines (pin 0): message-signalled interrupts need no routing table in firmware and no
//! sharing.
//!
//! Whoever builds the machine gives every BAR its address before the guest runs, because there
//! is no firmware to do so. A guest may move it all the same, and gives addresses itself to what
//! is inserted while it runs.

pub mod config;
pub mod hotplug;
pub mod msix;
pub mod root;

/// The configuration space of one PCI function.
pub trait Function: Send + Sync {
    /// Fills `data` (1 to 8 bytes) from `offset` on; `offset + data.len()` is at most 4096.
    fn read_config(&self, offset: u16, data: &mut [u8]);
    /// Writes `data` (1 to 8 bytes) at `offset`; `offset + data.len()` is at most 4096.
    fn write_config(&self, offset: u16, data: &[u8]);
    /// The function was taken out of its slot: stops, and answers nowhere any more.
    fn unplug(&self) {}
}
