//! CPU templates: changes to what the processors of a machine show.
//!
//! ```text
//!   KVM's table ──normalise──► Cpuid ──change_cpuid──► Cpuid ──► each vCPU ──change_msrs──► vCPU
//! ```
//!
//! A fleet of hosts with different processors shows its guests one processor, the smallest
//! common one; that is what templates are for. They are a convenience and no wall: a guest that
//! does not look at a feature's bit can often use the feature nevertheless.
//!
//! **A template changes features, not geometry.** It is carried out on the normalised table, so
//! that it has the last word on every feature. Maker, number of vCPUs, threads, cores and caches
//! are then put right once more: templates are often dumps of another machine, whose number of
//! processors would otherwise come along.
//!
//! **What can be changed** is what KVM offers or what normalising put there. A leaf that KVM
//! offers and that normalising took away, because it is zero or not for guests, begins at zero.
//! Setting a bit in a leaf or register that is not there is an error: a fleet that is not as
//! alike as it should be is found at the start of a machine, not by its guest. Clearing bits of
//! a leaf that is not there is none, because they read as zero already; so one template takes
//! from the newer hosts of a fleet what the older do not know.
//!
//! Model-specific registers are read from each vCPU when it has its CPUID and its boot values,
//! because KVM answers differently before, and some of them (the local APIC's base) differ
//! between vCPUs.

mod named;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use kvm_ioctls::VcpuFd;

use super::{cpuid::Cpuid, msr};

pub use named::Named;

/// Why a template cannot be carried out here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// KVM does not offer the leaf.
    #[error(
        "The CPU template changes CPUID leaf {leaf:#x}, subleaf {subleaf:#x}, which this host's KVM does not offer"
    )]
    NoLeaf {
        /// The leaf.
        leaf: u32,
        /// The subleaf.
        subleaf: u32,
    },
    /// KVM cannot read the register.
    #[error("The CPU template changes MSR {0:#x}, which this host's KVM does not have")]
    NoMsr(u32),
    /// KVM does not take the new value.
    #[error("The CPU template gives MSR {index:#x} the value {value:#x}, which this host's KVM refuses")]
    MsrValue {
        /// The register.
        index: u32,
        /// The value it was to have.
        value: u64,
    },
    /// KVM failed in another way.
    #[error("Cannot {what} the MSRs that the CPU template changes")]
    Kvm {
        /// "read" or "write".
        what: &'static str,
        /// What it said.
        source: kvm_ioctls::Error,
    },
    /// A template with a name is for processors of another maker.
    #[error("The CPU template {name} is for processors of {wanted:?}; this host's say they are {found:?}")]
    Vendor {
        /// The template.
        name: &'static str,
        /// Maker it is for.
        wanted: &'static str,
        /// Maker of the host's processors.
        found: String,
    },
    /// A template with a name is for other models.
    #[error(
        "The CPU template {name} is not for this host's processor, whose signature is {signature:#x}; a template of your own is, as cpu-config"
    )]
    Model {
        /// The template.
        name: &'static str,
        /// EAX of CPUID leaf 1.
        signature: u32,
    },
}

/// New values for some bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bits<T> {
    /// Which bits.
    pub mask: T,
    /// Their values; zero outside the mask.
    pub value: T,
}

impl Bits<u32> {
    fn apply(self, old: u32) -> u32 {
        old & !self.mask | self.value
    }
}

impl Bits<u64> {
    fn apply(self, old: u64) -> u64 {
        old & !self.mask | self.value
    }
}

/// One of the registers that CPUID answers in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// A change of one CPUID entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeafChange {
    /// EAX of the instruction.
    pub leaf: u32,
    /// ECX of the instruction.
    pub subleaf: u32,
    /// The entry's flags (KVM API section 4.46), which replace those it has.
    pub flags: u32,
    /// New bits, in the order in which they are set.
    pub registers: Vec<(Register, Bits<u32>)>,
}

/// A change of one model-specific register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsrChange {
    /// Its number.
    pub index: u32,
    /// New bits.
    pub bits: Bits<u64>,
}

/// A CPU template. The default changes nothing and costs nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Template {
    /// Changes to CPUID, in their order.
    pub leaves: Vec<LeafChange>,
    /// Changes to model-specific registers, in their order.
    pub msrs: Vec<MsrChange>,
    /// Capabilities (`KVM_CAP_*`), in their order: asked for where true, else no longer.
    pub capabilities: Vec<(u32, bool)>,
}

impl Template {
    /// The capabilities that KVM must have for a machine with this template, from those it must
    /// have for any.
    #[must_use]
    pub fn needed_capabilities(&self, always: &[u32]) -> Vec<u32> {
        let mut needed = always.to_vec();
        for &(capability, wanted) in &self.capabilities {
            needed.retain(|&other| other != capability);
            if wanted {
                needed.push(capability);
            }
        }
        needed
    }

    /// Changes `cpuid`, which was normalised from `offered`. Nothing is changed when it fails.
    ///
    /// # Errors
    /// [`TemplateError::NoLeaf`].
    pub fn change_cpuid(&self, cpuid: &mut Cpuid, offered: &CpuId) -> Result<(), TemplateError> {
        let is = |e: &kvm_cpuid_entry2, c: &LeafChange| e.function == c.leaf && e.index == c.subleaf;
        // What is not there reads as zero, so that clearing it is done already.
        let clears = |c: &LeafChange| c.registers.iter().all(|(_, bits)| bits.value == 0);
        let there = |c: &&LeafChange| {
            clears(c)
                || cpuid.entry(c.leaf, c.subleaf).is_some()
                || offered.as_slice().iter().any(|e| is(e, c))
        };
        if let Some(LeafChange { leaf, subleaf, .. }) = self.leaves.iter().find(|c| !there(c)) {
            return Err(TemplateError::NoLeaf { leaf: *leaf, subleaf: *subleaf });
        }
        if self.leaves.is_empty() {
            return Ok(());
        }
        let maker = cpuid.entry(0, 0).map(|e| (e.ebx, e.ecx, e.edx));
        for change in &self.leaves {
            change.apply(cpuid);
        }
        if let (Some(maker), Some(e)) = (maker, cpuid.entry_mut(0, 0)) {
            (e.ebx, e.ecx, e.edx) = maker;
        }
        cpuid.restore_topology();
        Ok(())
    }

    /// Changes the registers of each of `vcpus`, which have their CPUID and their boot values.
    /// Two ioctls a vCPU, none where the template has no such change.
    ///
    /// # Errors
    /// [`TemplateError::NoMsr`], [`TemplateError::MsrValue`], [`TemplateError::Kvm`].
    pub fn change_msrs(&self, vcpus: &[VcpuFd]) -> Result<(), TemplateError> {
        if self.msrs.is_empty() {
            return Ok(());
        }
        for vcpu in vcpus {
            let mut values = self.read_msrs(vcpu)?;
            self.change_values(&mut values)?;
            write_msrs(vcpu, &values)?;
        }
        Ok(())
    }

    /// Numbers of the registers that change, each once, in ascending order. A saved machine
    /// keeps them too.
    #[must_use]
    pub fn msr_indices(&self) -> Vec<u32> {
        let mut indices: Vec<u32> = self.msrs.iter().map(|m| m.index).collect();
        indices.sort_unstable();
        indices.dedup();
        indices
    }

    /// Changes register values.
    ///
    /// # Errors
    /// [`TemplateError::NoMsr`] for one that is not among them.
    pub fn change_values(&self, values: &mut BTreeMap<u32, u64>) -> Result<(), TemplateError> {
        for change in &self.msrs {
            let value = values.get_mut(&change.index).ok_or(TemplateError::NoMsr(change.index))?;
            *value = change.bits.apply(*value);
        }
        Ok(())
    }

    fn read_msrs(&self, vcpu: &VcpuFd) -> Result<BTreeMap<u32, u64>, TemplateError> {
        let wanted: Vec<_> = self.msr_indices().into_iter().map(|index| msr::entry(index, 0)).collect();
        let mut values = BTreeMap::new();
        for mut list in msr::lists(&wanted) {
            let read =
                vcpu.get_msrs(&mut list).map_err(|source| TemplateError::Kvm { what: "read", source })?;
            // KVM stops at the first that it does not have.
            if let Some(missing) = list.as_slice().get(read) {
                return Err(TemplateError::NoMsr(missing.index));
            }
            values.extend(list.as_slice().iter().map(|e| (e.index, e.data)));
        }
        Ok(values)
    }
}

fn write_msrs(vcpu: &VcpuFd, values: &BTreeMap<u32, u64>) -> Result<(), TemplateError> {
    let entries: Vec<_> = values.iter().map(|(&index, &value)| msr::entry(index, value)).collect();
    for list in msr::lists(&entries) {
        let written = vcpu.set_msrs(&list).map_err(|source| TemplateError::Kvm { what: "write", source })?;
        if let Some(refused) = list.as_slice().get(written) {
            return Err(TemplateError::MsrValue { index: refused.index, value: refused.data });
        }
    }
    Ok(())
}

impl LeafChange {
    /// Changes the entry, making it if it was not there and does not come out as zero, which is
    /// what a missing one reads as.
    fn apply(&self, cpuid: &mut Cpuid) {
        let old = cpuid.entry(self.leaf, self.subleaf).copied();
        let mut entry = old.unwrap_or_default();
        (entry.function, entry.index, entry.flags) = (self.leaf, self.subleaf, self.flags);
        for &(register, bits) in &self.registers {
            let place = match register {
                Register::Eax => &mut entry.eax,
                Register::Ebx => &mut entry.ebx,
                Register::Ecx => &mut entry.ecx,
                Register::Edx => &mut entry.edx,
            };
            *place = bits.apply(*place);
        }
        if old.is_some() || entry.eax | entry.ebx | entry.ecx | entry.edx != 0 {
            cpuid.set_entry(entry);
        }
    }
}
