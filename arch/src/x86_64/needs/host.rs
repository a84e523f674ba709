//! What a host's processors can show, as its KVM says.
//!
//! The table is KVM's own, before anything is made of it, so that a record taken today serves
//! machines of another shape tomorrow. AMD's cache leaves are added, which KVM does not list
//! and which [`Cpuid::normalise`] takes from the processor itself.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use super::{
    ARCH_CAPABILITIES,
    record::{self, FORMAT, Leaf, MsrValue, RecordError},
};
use crate::x86_64::{
    cpuid::{CpuConfig, Cpuid, CpuidError, Vendor},
    msr,
};

/// Why a host could not be asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// KVM refused to tell.
    #[error("KVM does not tell {0}")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
}

/// A host's processors as its KVM offers them. As JSON it is what `nacelle cpu dump` prints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(remote = "Self")]
pub struct Host {
    format: u32,
    vendor: String,
    model: String,
    tsc_khz: Option<u32>,
    tsc_scaling: bool,
    cpuid: Vec<Leaf>,
    msrs: Vec<MsrValue>,
    #[serde(with = "record::hex::list")]
    registers: Vec<u32>,
}

impl Host {
    /// Asks KVM. Four ioctls.
    ///
    /// # Errors
    /// [`HostError::Kvm`].
    pub fn of(kvm: &Kvm) -> Result<Host, HostError> {
        let offered = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|e| HostError::Kvm("what its processors can do", e))?;
        let listed = kvm.get_msr_index_list().map_err(|e| HostError::Kvm("its list of MSRs", e))?;
        let mut table = offered.as_slice().to_vec();
        add_amd_caches(&mut table);
        let mut host = Host::from_table(&table);
        host.tsc_scaling = kvm.check_extension(Cap::TscControl);
        host.registers = listed.as_slice().to_vec();
        for mut list in msr::lists(&[msr::entry(ARCH_CAPABILITIES, 0)]) {
            // A host without the register reads none.
            if matches!(kvm.get_msrs(&mut list), Ok(1)) {
                let values = list.as_slice().iter().map(|e| MsrValue { index: e.index, value: e.data });
                host.msrs.extend(values);
            }
        }
        Ok(host)
    }

    /// The same with the frequency of its TSC, which only a vCPU tells.
    #[must_use]
    pub fn with_tsc(mut self, vcpu: &VcpuFd) -> Host {
        self.tsc_khz = vcpu.get_tsc_khz().ok().filter(|&khz| khz > 0);
        self
    }

    /// A host that offers this table and nothing else.
    pub(super) fn from_table(table: &[kvm_cpuid_entry2]) -> Host {
        Host {
            format: FORMAT,
            vendor: record::vendor(table),
            model: record::brand(table),
            tsc_khz: None,
            tsc_scaling: false,
            cpuid: table.iter().map(Leaf::from).collect(),
            msrs: Vec::new(),
            registers: Vec::new(),
        }
    }

    /// The maker, as leaf 0 names it.
    #[must_use]
    pub fn vendor(&self) -> &str {
        &self.vendor
    }

    /// The brand, for people.
    #[must_use]
    pub fn model(&self) -> &str {
        &self.model
    }

    /// Frequency of the TSC in kHz, if it is known.
    #[must_use]
    pub fn tsc_khz(&self) -> Option<u32> {
        self.tsc_khz
    }

    /// Whether guests can have a TSC of another frequency.
    #[must_use]
    pub fn tsc_scaling(&self) -> bool {
        self.tsc_scaling
    }

    /// The table as KVM gave it.
    pub(super) fn entries(&self) -> Vec<kvm_cpuid_entry2> {
        self.cpuid.iter().map(|&row| row.into()).collect()
    }

    /// What a machine of one vCPU would show here; `all` with what only some machines show
    /// (performance counters, nested virtualization).
    pub(super) fn shown(&self, all: bool) -> Result<Cpuid, CpuidError> {
        let config = CpuConfig { vcpus: 1, smt: false, tsc_khz: None, pmu: all, nested: all };
        // A record has all there is; this processor has no say.
        Cpuid::normalise_with(&self.entries(), &config, &|_, _| [0; 4])
    }

    /// Whether a vCPU has the register.
    pub(super) fn has_msr(&self, index: u32) -> bool {
        self.registers.contains(&index) || msr::is_mtrr(index)
    }

    /// The value that new vCPUs have in a register that tells features.
    pub(super) fn msr(&self, index: u32) -> Option<u64> {
        self.msrs.iter().find(|m| m.index == index).map(|m| m.value)
    }

    /// The same host with another register value.
    #[cfg(test)]
    pub(super) fn with_msr(mut self, index: u32, value: u64) -> Host {
        self.msrs.push(MsrValue { index, value });
        self
    }

    /// The same host with another clock.
    #[cfg(test)]
    pub(super) fn with_clock(mut self, khz: u32, scaling: bool) -> Host {
        (self.tsc_khz, self.tsc_scaling) = (Some(khz), scaling);
        self
    }

    fn check(&self) -> Result<(), RecordError> {
        let texts = [("vendor", self.vendor.as_str()), ("model", self.model.as_str())];
        record::check(self.format, &self.cpuid, &self.registers, texts)?;
        let values: Vec<u32> = self.msrs.iter().map(|m| m.index).collect();
        record::check(self.format, &[], &values, texts)?;
        let has = |leaf| self.cpuid.iter().any(|r| r.leaf == leaf && r.subleaf == 0);
        if let Some(leaf) = [0, 1].into_iter().find(|&leaf| !has(leaf)) {
            return Err(RecordError::NoLeaf(leaf));
        }
        let found = record::vendor(&self.entries());
        if found != self.vendor {
            return Err(RecordError::Vendor { named: self.vendor.clone(), found });
        }
        Ok(())
    }
}

impl Serialize for Host {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Host::serialize(self, serializer)
    }
}

impl<'de> Deserialize<'de> for Host {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Host, D::Error> {
        let host = Host::deserialize(deserializer)?;
        host.check().map_err(D::Error::custom)?;
        Ok(host)
    }
}

fn add_amd_caches(table: &mut Vec<kvm_cpuid_entry2>) {
    const CACHES: u32 = 0x8000_001d;
    let amd = Cpuid::maker(table) == Vendor::Amd;
    if !amd || table.iter().any(|e| e.function == CACHES) {
        return;
    }
    for index in 0..8 {
        let r = std::arch::x86_64::__cpuid_count(CACHES, index);
        if r.eax & 0x1f == 0 {
            break;
        }
        table.push(kvm_cpuid_entry2 {
            function: CACHES,
            index,
            flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: r.eax,
            ebx: r.ebx,
            ecx: r.ecx,
            edx: r.edx,
            ..Default::default()
        });
    }
}
