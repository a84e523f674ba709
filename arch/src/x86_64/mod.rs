//! The PC, as far as a machine without firmware needs it: see [`layout`] for the map.

pub mod acpi;
pub mod boot;
pub mod coredump;
pub mod cpuid;
pub mod debug;
pub mod generation;
pub mod irqchip;
pub mod layout;
mod mptable;
pub mod msr;
pub mod needs;
pub mod regs;
pub mod state;
pub mod template;
