//! The interrupt controllers and the guest's clock, which belong to the machine and not to a
//! vCPU.
//!
//! **Full in-kernel interrupt controller, no PIT.** The alternative (split: local APICs in KVM,
//! IOAPIC here) was measured to cost the same to create once memory slots come first (0.65
//! against 0.63 ms for a whole two-vCPU machine), and it would hand every IOAPIC access and
//! every end of a level interrupt to userspace, with an IOAPIC to write, save and get right. So
//! the order is the caller's contract: memory slots, then [`create`], then vCPUs. With the slots
//! after it, each slot waits for a grace period of the kernel (4 to 7 ms).
//!
//! The two PICs come with the IOAPIC. No guest of ours uses them (the firmware tables say so),
//! and they are saved all the same: a guest is free to.
//!
//! **The IOAPIC's lines start as the firmware's own**: masked, and set to deliver a system
//! management interrupt. A line that the guest gives to a device is written anew by it. The
//! others stay as they are, and Linux, which clears every line when it shuts down or reboots,
//! leaves such a line alone after one look: 4 accesses instead of 12 for each of 24 lines. That
//! is 192 exits fewer of some 1150 from start to end, each one an instruction that KVM emulates.

use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data,
    kvm_ioapic_state, kvm_ioapic_state__bindgen_ty_1 as Redirection, kvm_irqchip,
};
use kvm_ioctls::VmFd;
use zerocopy::{FromBytes, IntoBytes};

use super::layout;

/// A part of the machine's interrupt or clock state could not be moved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IrqchipError {
    /// KVM refused.
    #[error("Cannot {0}")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    /// Bytes that are no saved state.
    #[error("The saved {what} has {have} bytes; {want} are right")]
    Length {
        /// Which state.
        what: &'static str,
        /// Bytes given.
        have: usize,
        /// Bytes of a valid state.
        want: usize,
    },
}

/// Makes the interrupt controllers. Memory slots must exist already, vCPUs must not.
///
/// # Errors
/// [`IrqchipError::Kvm`].
pub fn create(vm: &VmFd) -> Result<(), IrqchipError> {
    // Intel processors before unrestricted guest mode need these; the others ignore them.
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(|e| IrqchipError::Kvm("place KVM's identity map", e))?;
    vm.set_tss_address(layout::KVM_TSS as usize)
        .map_err(|e| IrqchipError::Kvm("place KVM's task segment", e))?;
    vm.create_irq_chip().map_err(|e| IrqchipError::Kvm("create the interrupt controllers", e))?;
    vm.set_irqchip(&ioapic_at_start()).map_err(|e| IrqchipError::Kvm("set the IOAPIC's lines", e))
}

/// The IOAPIC as a guest finds it: KVM's reset state, but for the lines' delivery mode.
fn ioapic_at_start() -> kvm_irqchip {
    // Redirection entry, 82093AA datasheet section 3.2.4: delivery mode 2 is SMI; masked.
    const MODE_SMI: u64 = 2 << 8;
    const MASKED: u64 = 1 << 16;
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
    chip.chip.ioapic = kvm_ioapic_state {
        base_address: layout::IOAPIC,
        redirtbl: [Redirection { bits: MODE_SMI | MASKED }; 24],
        ..Default::default()
    };
    chip
}

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// Both PICs and the IOAPIC.
#[derive(Clone)]
pub struct IrqchipState([kvm_irqchip; 3]);

impl IrqchipState {
    /// Reads the state of a paused machine.
    ///
    /// # Errors
    /// [`IrqchipError::Kvm`].
    pub fn save(vm: &VmFd) -> Result<Self, IrqchipError> {
        let mut chips = [kvm_irqchip::default(); 3];
        for (chip, id) in chips.iter_mut().zip(CHIPS) {
            chip.chip_id = id;
            vm.get_irqchip(chip).map_err(|e| IrqchipError::Kvm("read the interrupt controllers", e))?;
        }
        Ok(Self(chips))
    }

    /// Writes the state into a machine that has not run.
    ///
    /// # Errors
    /// [`IrqchipError::Kvm`].
    pub fn load(&self, vm: &VmFd) -> Result<(), IrqchipError> {
        for chip in &self.0 {
            vm.set_irqchip(chip).map_err(|e| IrqchipError::Kvm("set the interrupt controllers", e))?;
        }
        Ok(())
    }

    /// The state as bytes, always of the same length.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(IntoBytes::as_bytes).copied().collect()
    }

    /// The state from [`IrqchipState::to_bytes`]. Which chip is which is not read from the bytes.
    ///
    /// # Errors
    /// [`IrqchipError::Length`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, IrqchipError> {
        const ONE: usize = size_of::<kvm_irqchip>();
        let mut chips = [kvm_irqchip::default(); 3];
        if bytes.len() != chips.len() * ONE {
            return Err(IrqchipError::Length {
                what: "interrupt controller state",
                have: bytes.len(),
                want: chips.len() * ONE,
            });
        }
        for ((chip, part), id) in chips.iter_mut().zip(bytes.chunks_exact(ONE)).zip(CHIPS) {
            // A part has the length of the structure.
            *chip = kvm_irqchip::read_from_bytes(part).unwrap_or_default();
            chip.chip_id = id;
        }
        Ok(Self(chips))
    }
}

/// What the guest's clocks do with the time between saving and loading.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClockPolicy {
    /// Go on from where they stood: the guest does not notice.
    #[default]
    Continue,
    /// Jump by the time that went by in the world (needs Linux 5.16 on both hosts; continues
    /// otherwise).
    Advance,
}

/// The kvmclock: nanoseconds of the guest's life.
#[derive(Clone)]
pub struct ClockState(kvm_clock_data);

impl ClockState {
    /// Reads the clock of a paused machine.
    ///
    /// # Errors
    /// [`IrqchipError::Kvm`].
    pub fn save(vm: &VmFd) -> Result<Self, IrqchipError> {
        vm.get_clock().map(Self).map_err(|e| IrqchipError::Kvm("read the guest's clock", e))
    }

    /// Sets the clock of a machine that has not run; before the vCPUs are loaded.
    ///
    /// # Errors
    /// [`IrqchipError::Kvm`].
    pub fn load(&self, vm: &VmFd, policy: ClockPolicy) -> Result<(), IrqchipError> {
        let advance = policy == ClockPolicy::Advance && self.0.flags & KVM_CLOCK_REALTIME != 0;
        let clock = kvm_clock_data {
            clock: self.0.clock,
            realtime: if advance { self.0.realtime } else { 0 },
            flags: if advance { KVM_CLOCK_REALTIME } else { 0 },
            ..Default::default()
        };
        vm.set_clock(&clock).map_err(|e| IrqchipError::Kvm("set the guest's clock", e))
    }

    /// Nanoseconds since the guest's boot.
    #[must_use]
    pub fn nanoseconds(&self) -> u64 {
        self.0.clock
    }

    /// The state as bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        self.0.as_bytes().to_vec()
    }

    /// The state from [`ClockState::to_bytes`].
    ///
    /// # Errors
    /// [`IrqchipError::Length`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, IrqchipError> {
        kvm_clock_data::read_from_bytes(bytes).map(Self).map_err(|_| IrqchipError::Length {
            what: "clock",
            have: bytes.len(),
            want: size_of::<kvm_clock_data>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_of_the_ioapic_starts_masked_and_as_the_firmwares() {
        let chip = ioapic_at_start();
        // SAFETY: plain bytes under every view, and this one was written.
        let ioapic = unsafe { chip.chip.ioapic };
        assert_eq!((chip.chip_id, ioapic.base_address), (KVM_IRQCHIP_IOAPIC, 0xfec0_0000));
        assert!(ioapic.irr == 0 && ioapic.redirtbl.len() == 24);
        for line in ioapic.redirtbl {
            // SAFETY: as above.
            assert_eq!(unsafe { line.bits }, 0x1_0200);
        }
    }

    #[test]
    fn bytes_come_back_and_other_lengths_are_refused() {
        let mut chips = [kvm_irqchip::default(); 3];
        for (chip, id) in chips.iter_mut().zip(CHIPS) {
            chip.chip_id = id;
            // Every part of the union is plain bytes.
            chip.chip.dummy = [id as i8 + 1; 512];
        }
        let bytes = IrqchipState(chips).to_bytes();
        let back = IrqchipState::from_bytes(&bytes).unwrap();
        assert_eq!(back.to_bytes(), bytes);
        for len in [0, 1, bytes.len() - 1] {
            assert!(IrqchipState::from_bytes(&bytes[..len]).is_err());
        }
        // A hostile chip number does not choose another chip.
        let mut hostile = bytes.clone();
        hostile[0] = 0xff;
        assert_eq!(IrqchipState::from_bytes(&hostile).unwrap().to_bytes(), bytes);

        let clock = ClockState(kvm_clock_data { clock: 42, ..Default::default() });
        let back = ClockState::from_bytes(&clock.to_bytes()).unwrap();
        assert_eq!(back.nanoseconds(), 42);
        assert!(ClockState::from_bytes(&[0; 7]).is_err());
    }
}
