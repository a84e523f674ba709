//! What a debugger needs to know of the processor: its registers, and what stops it.
//!
//! ```text
//!   gdb ◄── a block of bytes ──► Registers ◄── KVM_{GET,SET}_{REGS,SREGS,XSAVE} ──► vCPU
//!           (description.xml)
//!   Watchpoints, software breakpoints?, step? ── settings() ── KVM_SET_GUEST_DEBUG ──► vCPU
//! ```
//!
//! A processor stops for a debugger in three ways: at an INT3 (0xcc) that was put in the place
//! of an instruction, at one of four addresses in its debug registers, and after one
//! instruction. KVM keeps the debug registers of guest and host's debugger apart; while the
//! debugger uses some, the guest's own have no effect.

mod registers;
mod watchpoints;

use kvm_bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_BP, KVM_GUESTDBG_INJECT_DB,
    KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP, kvm_debug_exit_arch,
    kvm_guest_debug, kvm_guest_debug_arch,
};

pub use registers::{BLOCK, DESCRIPTION, PC, Registers};
pub use watchpoints::{Access, SLOTS, Watchpoint, pieces};

/// The instruction that stops: INT3.
pub const BREAKPOINT: u8 = 0xcc;

/// Vector of the debug exception: a step, or an address in a debug register.
const DEBUG_EXCEPTION: u32 = 1;
/// Vector of INT3.
const BREAKPOINT_EXCEPTION: u32 = 3;
/// The bit of DR6 that says "after a step".
const DR6_STEP: u64 = 1 << 14;
/// DR7: exact breakpoints (kept by habit, processors do without), and a bit that is always set.
const DR7_ALWAYS: u64 = 3 << 9;

/// What stops a vCPU; the default is nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// The four debug registers.
    pub watchpoints: [Option<Watchpoint>; SLOTS],
    /// There are INT3s in guest memory.
    pub software: bool,
    /// Stop after one instruction.
    pub step: bool,
    /// Deliver no interrupt during a step, where KVM can: a guest that stood still for a while
    /// has one due at every turn, and a step would lead into its handler each time.
    pub block_interrupts: bool,
}

impl Settings {
    /// For `KVM_SET_GUEST_DEBUG` (KVM API section 4.87).
    #[must_use]
    pub fn to_kvm(&self) -> kvm_guest_debug {
        let mut control = 0;
        let mut arch = kvm_guest_debug_arch::default();
        let mut debug_control = DR7_ALWAYS;
        for (index, watchpoint) in self.watchpoints.iter().enumerate() {
            let Some(watchpoint) = watchpoint else { continue };
            arch.debugreg[index] = watchpoint.address;
            debug_control |= watchpoint.control(index);
            control |= KVM_GUESTDBG_USE_HW_BP;
        }
        if self.software {
            control |= KVM_GUESTDBG_USE_SW_BP;
        }
        if self.step {
            control |= KVM_GUESTDBG_SINGLESTEP;
            if self.block_interrupts {
                control |= KVM_GUESTDBG_BLOCKIRQ;
            }
        }
        if control != 0 {
            control |= KVM_GUESTDBG_ENABLE;
            arch.debugreg[7] = debug_control;
        }
        kvm_guest_debug { control, pad: 0, arch }
    }

    /// The same, and the guest meets now what it met when the vCPU stopped.
    #[must_use]
    pub fn to_kvm_with(&self, exception: Exception) -> kvm_guest_debug {
        let mut debug = self.to_kvm();
        debug.control |= KVM_GUESTDBG_ENABLE
            | match exception {
                Exception::Breakpoint => KVM_GUESTDBG_INJECT_BP,
                Exception::Debug => KVM_GUESTDBG_INJECT_DB,
            };
        debug
    }

    /// What a vCPU with these settings has met.
    #[must_use]
    pub fn met(&self, exit: &kvm_debug_exit_arch) -> Met {
        let hit = |index: &usize| exit.dr6 >> index & 1 == 1 && self.watchpoints[*index].is_some();
        match (exit.exception, (0..SLOTS).find(hit)) {
            (BREAKPOINT_EXCEPTION, _) => Met::Breakpoint,
            (DEBUG_EXCEPTION, Some(index)) => Met::Watchpoint(index),
            (DEBUG_EXCEPTION, None) if self.step && exit.dr6 & DR6_STEP != 0 => Met::Step,
            _ => Met::Foreign,
        }
    }
}

/// What a vCPU has met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Met {
    /// An INT3, the debugger's or the guest's own.
    Breakpoint,
    /// The address in this debug register.
    Watchpoint(usize),
    /// The end of its step.
    Step,
    /// A debug exception that nothing here has asked for: it is the guest's.
    Foreign,
}

/// An exception that belongs to the guest and was taken from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exception {
    /// Its own INT3.
    Breakpoint,
    /// Its own step, or INT1.
    Debug,
}

/// Whether KVM can keep interrupts away during a step; `supported` is what it answers for the
/// capability `KVM_CAP_SET_GUEST_DEBUG2`, negative where it does not know that.
#[must_use]
pub fn blocks_interrupts(supported: i32) -> bool {
    supported > 0 && supported.cast_unsigned() & KVM_GUESTDBG_BLOCKIRQ != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(exception: u32, dr6: u64) -> kvm_debug_exit_arch {
        kvm_debug_exit_arch { exception, dr6, ..Default::default() }
    }

    #[test]
    fn nothing_set_switches_debugging_off() {
        assert_eq!(Settings::default().to_kvm(), kvm_guest_debug::default());
    }

    #[test]
    fn settings_are_the_bits_of_the_manual() {
        let write = Watchpoint { address: 0x1008, len: 8, access: Access::Write };
        let run = Watchpoint { address: 0x40_0000, len: 1, access: Access::Execute };
        let settings = Settings {
            watchpoints: [Some(run), None, Some(write), None],
            software: true,
            step: true,
            block_interrupts: true,
        };
        let debug = settings.to_kvm();
        assert_eq!(debug.control, 1 | 2 | 1 << 16 | 1 << 17 | 1 << 20);
        assert_eq!((debug.arch.debugreg[0], debug.arch.debugreg[2]), (0x40_0000, 0x1008));
        // G0 and G2; slot 2 waits for writes of eight bytes.
        assert_eq!(debug.arch.debugreg[7], 0x600 | 1 << 1 | 1 << 5 | 0b1001 << 24);
        assert_eq!(settings.to_kvm_with(Exception::Breakpoint).control & 3 << 18, 1 << 19);
    }

    #[test]
    fn what_nobody_asked_for_is_the_guests() {
        let mut settings = Settings::default();
        assert_eq!(settings.met(&exit(3, 0)), Met::Breakpoint);
        assert_eq!(settings.met(&exit(1, DR6_STEP)), Met::Foreign);
        assert_eq!(settings.met(&exit(1, 1)), Met::Foreign);
        settings.step = true;
        assert_eq!(settings.met(&exit(1, DR6_STEP)), Met::Step);
        settings.watchpoints[1] = Some(Watchpoint { address: 8, len: 1, access: Access::ReadWrite });
        assert_eq!(settings.met(&exit(1, DR6_STEP | 3)), Met::Watchpoint(1));
        assert_eq!(settings.met(&exit(14, 0)), Met::Foreign);
    }

    #[test]
    fn a_kvm_that_does_not_know_blocks_nothing() {
        assert!(!blocks_interrupts(-1) && !blocks_interrupts(0) && !blocks_interrupts(3));
        assert!(blocks_interrupts(1 << 20 | 1));
    }
}
