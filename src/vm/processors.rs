//! Processors that come while the machine runs.
//!
//! A machine that has room for more than it starts with (`max_vcpu_count`) shows its guest from
//! the start the geometry of the largest it can become: CPUID, APIC ids, and ACPI tables that
//! list all processors, the missing ones as "can come". Adding some is then three steps:
//!
//! ```text
//!   KVM_CREATE_VCPU, CPUID, MSRs ─► a thread, which waits as the machine does
//!     ─► register block: "present", "has come" ─► event device: the guest looks
//! ```
//!
//! The guest learns of it last, so a failure on the way leaves it as it was. KVM cannot take
//! a vCPU back; one that was made and could not be used is kept for the next try.
//!
//! KVM sets the time stamp counter of a vCPU that is made late to that of the others, as they
//! run. A new processor waits for the guest's start-up message, like the others at a boot.

use std::sync::Arc;

use arch::{cpuid::Cpuid, regs, template::Template};
use devices::{
    legacy::{
        power::{self, Power},
        processors::Processors,
    },
    state::Section,
};
use kvm_ioctls::VcpuFd;

use super::{
    host::KvmHost,
    kvm::{self, KvmError},
};
use crate::vcpu::{Buses, Reporter, VcpuError, Vcpus};

/// Why no processors were added.
#[derive(Debug, thiserror::Error)]
pub enum AddError {
    /// There is no room for so many.
    #[error("The machine cannot have {wanted} vCPUs: it was started with room for {room} (max_vcpu_count)")]
    Room {
        /// How many there were to be.
        wanted: u8,
        /// How many there can be.
        room: u8,
    },
    /// Fewer than there are.
    #[error("The machine has {have} vCPUs; they cannot be taken away again, so not {wanted}")]
    Fewer {
        /// How many there were to be.
        wanted: u8,
        /// How many there are.
        have: usize,
    },
    /// KVM made none.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// One could not be given its first state.
    #[error("vCPU {index} cannot be set up")]
    Setup {
        /// Which.
        index: u8,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// One has no thread, or the others do not obey.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
}

impl AddError {
    /// Whether it is the caller's mistake.
    pub fn is_invalid(&self) -> bool {
        matches!(self, AddError::Room { .. } | AddError::Fewer { .. })
    }
}

/// Room for processors that can come, and what they are made from.
pub struct Room {
    max: u8,
    cpuid: Cpuid,
    template: Template,
    buses: Buses,
    reporter: Reporter,
    registers: Arc<Processors>,
    /// vCPUs that KVM has and that have no thread yet.
    made: Vec<VcpuFd>,
}

impl Room {
    /// Room for `max` processors with this CPUID and template, which answer through `registers`.
    pub fn new(
        max: u8,
        (cpuid, template): (Cpuid, Template),
        (buses, reporter): (Buses, Reporter),
        registers: Arc<Processors>,
    ) -> Room {
        Room { max, cpuid, template, buses, reporter, registers, made: Vec::new() }
    }

    /// Adds processors until there are `wanted`; they stand still until [`Vcpus::run_added`].
    pub fn fill(&mut self, wanted: u8, vcpus: &mut Vcpus, host: &KvmHost) -> Result<(), AddError> {
        let have = vcpus.count();
        if wanted > self.max {
            return Err(AddError::Room { wanted, room: self.max });
        }
        if usize::from(wanted) < have {
            return Err(AddError::Fewer { wanted, have });
        }
        // The count is at most 64.
        let first = have as u8;
        while self.made.len() < usize::from(wanted - first) {
            let index = first + self.made.len() as u8;
            let made = host.vm().create_vcpu(index.into()).map_err(kvm::call("create a vCPU"))?;
            self.made.push(made);
        }
        let fresh = self.made.get(..usize::from(wanted - first)).unwrap_or_default();
        for (index, fd) in (first..).zip(fresh) {
            self.configure(index, fd).map_err(|source| AddError::Setup { index, source })?;
        }
        let fresh = self.made.drain(..usize::from(wanted - first)).collect();
        if let Err((error, unused)) = vcpus.add(fresh, &self.buses, &self.reporter) {
            self.made.splice(0..0, unused);
            return Err(error.into());
        }
        Ok(())
    }

    fn configure(&self, index: u8, fd: &VcpuFd) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        regs::configure_waiting_vcpu(fd, index, &self.cpuid.for_vcpu(index)?)?;
        // KVM looks up whom a start-up message is for in a map that it makes anew when a local APIC
        // changes, and not when a vCPU is made: without this the last one that came is never
        // reached, unless another one happens to start after it.
        fd.set_lapic(&fd.get_lapic()?)?;
        Ok(self.template.change_msrs(std::slice::from_ref(fd))?)
    }

    /// What of the guest's registers is saved.
    pub fn save(&self) -> Section {
        self.registers.save()
    }

    /// Tells the guest that processors `first` to `end` - 1 are there.
    pub fn announce(&self, first: u8, end: u8, power: &Power) {
        if first < end {
            self.registers.insert(first, end);
            power.raise(power::EVENT_PROCESSORS);
        }
    }
}
