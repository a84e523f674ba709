//! The few parts of a personal computer that guests still expect outside of any bus.
//!
//! ```text
//!   port          device       file        what for
//!   0x060, 0x064  keyboard     i8042.rs    reset by the oldest way; Ctrl-Alt-Del to the guest
//!   0x3f8..0x3ff  serial       serial.rs   ttyS0: early messages, a console without drivers
//!   0x505         panic        pvpanic.rs  the guest's kernel says that it crashed, if asked for
//!   0x600..0x60f  power        power.rs    ACPI: sleep (off), reset, power button
//!   0x640..0x64f  PCI hotplug  (../pci/hotplug.rs) ACPI: slots filled and wanted back
//!   0x620..0x62f  processors   processors.rs  ACPI: present, come since (where some can come)
//! ```
//!
//! The serial port and the virtio console talk to the host through one mechanism: a
//! [`wire::Wire`], which takes output without ever blocking the caller, and a [`pump::Pump`],
//! which runs on a worker, empties the wire when its reader can take more, and hands input
//! over only as far as the guest has room for it. [`output::Output`] says what the far end is.

pub mod i8042;
pub mod output;
pub mod power;
pub mod processors;
pub mod pump;
pub mod pvpanic;
pub mod serial;
pub mod wire;

pub use i8042::I8042;
pub use output::{Output, OutputError};
pub use power::{Power, PowerCallback, PowerEvent};
pub use serial::Serial;
