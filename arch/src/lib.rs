//! What differs between processors, and nothing else.
//!
//! The monitor builds every machine the same way; this crate answers the questions whose
//! answers depend on the processor. It names no device and not the monitor: a serial port is
//! here only a line in a firmware table, described by whoever has one.
//!
//! ```text
//!   layout   where memory, windows and tables lie in the guest's physical address space
//!   kernel   files: is this a kernel, of which processor, and how it gets into guest memory
//!   boot     kernel + initrd + command line -> guest memory, and the state to enter it with
//!   acpi     what the machine has -> firmware tables in guest memory
//!   generation  what tells a guest that it was restored
//!   cpuid    what KVM offers -> what each vCPU shows        msr, regs   first register values
//!   template changes to that and to MSRs, as a machine's description asks for
//!   irqchip  interrupt controllers and guest clock: save, load
//!   state    one vCPU: save, load, bytes
//!   needs    what a saved machine relies on, what a host offers, what several have in common
//!   coredump memory and registers -> a file that debuggers open
//!   debug    registers as gdb names them, breakpoints as the processor keeps them
//! ```
//!
//! **What a processor must offer.** One processor is compiled in; its module is re-exported
//! under the names below, and the monitor uses only these, so a second processor is a second
//! folder with the same names where the thing is the same, and a compile error where it is not:
//!
//! | name | what |
//! |---|---|
//! | [`layout`] | `ram_regions`, the 32-bit and 64-bit windows, interrupt lines |
//! | [`boot::load`], [`boot::Payload`], [`boot::Loaded`] | a kernel into memory |
//! | [`regs::configure_vcpu`] | the state a vCPU starts with |
//! | [`state::VcpuState`] | one vCPU saved: `save`, `load`, `to_bytes`, `from_bytes` |
//! | [`irqchip::IrqchipState`], [`irqchip::ClockState`] | the same for the machine |
//! | [`acpi`] (x86_64), a device tree (others) | how the guest learns what is there |
//!
//! **Rules kept here.** A kernel file, a saved state and a table of CPUID are hostile: every
//! number read from them is checked before it is used, every loop over them has a cap, and the
//! tests mutate them at random. Nothing is copied that the kernel can read into place.

pub mod kernel;

#[cfg(target_arch = "x86_64")]
pub mod x86_64;

#[cfg(target_arch = "x86_64")]
pub use x86_64::{
    acpi, boot, coredump, cpuid, debug, generation, irqchip, layout, msr, needs, regs, state, template,
};

#[cfg(not(target_arch = "x86_64"))]
compile_error!("nacelle runs on x86_64 only so far: a processor is a folder beside src/x86_64");
