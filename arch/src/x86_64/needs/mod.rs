//! What a machine needs of the CPU, so that it is not moved to where it cannot live.
//!
//! A guest looks at CPUID once and believes it for the rest of its life: it has chosen its
//! routines, patched its kernel and laid out its stacks by what it read. KVM shows a restored
//! guest the same table on any host, true or not; whether the processor can do what the table
//! says is noticed at the first instruction that it lacks, in the guest, hours later. So a saved
//! machine takes along what it was shown, and a host is asked before anything is built.
//!
//! ```text
//!   VcpuState ──Needs::of──► Needs ──JSON──► manifest ──► Needs::missing ──► names, or nothing
//!   KVM ──Host::of──► Host ──JSON──► nacelle cpu dump         ▲
//!                      └──────────────────────────────────────┘
//!   Host, Host, ... ──baseline──► CPU template with which machines run on all of them
//! ```
//!
//! * [`Needs`] is a table of CPUID without what nothing relies on ([`fields`] says what that is),
//!   the guest's model-specific registers and the frequency of its TSC.
//! * [`Host`] is what KVM offers. What a machine would be shown there is made of it by the same
//!   [`Cpuid::normalise`](super::cpuid::Cpuid::normalise) that makes it for a new machine, so the
//!   monitor's own additions are never missed.
//! * [`baseline`] intersects hosts.
//!
//! **What counts** is only what the guest has and the host lacks. A host that can do more is no
//! matter: the guest does not see it. The exceptions are bits that admit a weakness, which a
//! guest must not be moved to without knowing, and the layout of the XSAVE area, which lies in
//! the guest's memory.
//!
//! **What a template sets is no need** where the host did not offer it either: whoever wrote the
//! template has vouched for it.

mod baseline;
mod fields;
mod host;
mod names;
mod record;
#[cfg(test)]
mod tests;

use std::{collections::BTreeSet, fmt};

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::Kvm;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use super::{
    cpuid::{Cpuid, CpuidError},
    state::{TSC_TOLERANCE_PPM, VcpuState},
    template::{Register, Template},
};
use fields::Kind;
use record::{FORMAT, Leaf, MsrValue};

pub use baseline::{Baseline, BaselineError, Loss, baseline};
pub use host::{Host, HostError};
pub use record::RecordError;

/// Which flaws the processor does not have, and which controls it has.
const ARCH_CAPABILITIES: u32 = 0x10a;
/// Its bits that admit a flaw: RSBA and RRSBA (returns may be predicted from elsewhere).
const CAPABILITY_FLAWS: u64 = 1 << 2 | 1 << 19;
/// Leaf 7, EDX: the register is there.
const LEAF7_EDX_ARCH_CAPABILITIES: u32 = 1 << 29;

const REGISTERS: [Register; 4] = [Register::Eax, Register::Ebx, Register::Ecx, Register::Edx];

/// What a machine needs of a host's processors. JSON is its only form; what was read from JSON
/// has been checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(remote = "Self")]
pub struct Needs {
    format: u32,
    vendor: String,
    model: String,
    tsc_khz: Option<u32>,
    cpuid: Vec<Leaf>,
    /// Registers that tell features, and what they told.
    msrs: Vec<MsrValue>,
    /// Registers that hold something.
    #[serde(with = "record::hex::list")]
    registers: Vec<u32>,
}

/// Something that a machine relies on and a host does not have.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Missing {
    /// The processors are of another maker.
    Vendor {
        /// The guest's.
        needed: String,
        /// The host's.
        has: String,
    },
    /// A feature, by the name that Linux shows, or by its place in CPUID.
    Feature(String),
    /// The host admits a weakness that the guest was not told of.
    Flaw(String),
    /// A number that the host does not reach.
    Amount {
        /// Of what.
        what: &'static str,
        /// The guest's.
        needed: u32,
        /// The host's.
        has: u32,
    },
    /// Something lies elsewhere or has another size.
    Differs(String),
    /// A model-specific register that holds something.
    Msr(u32),
    /// The TSC has another frequency and cannot be scaled.
    Tsc {
        /// The guest's, in kHz.
        needed: u32,
        /// The host's, in kHz.
        has: u32,
    },
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Missing::Vendor { needed, has } => write!(f, "processors of {needed} (these are of {has})"),
            Missing::Feature(name) => f.write_str(name),
            Missing::Flaw(name) => write!(f, "a processor without {name}"),
            Missing::Amount { what, needed, has } => write!(f, "{needed} {what} (there are {has})"),
            Missing::Differs(what) => write!(f, "the same {what}"),
            Missing::Msr(index) => write!(f, "MSR {index:#x}"),
            Missing::Tsc { needed, has } => {
                write!(f, "a TSC of {needed} kHz (it runs at {has} kHz and cannot be scaled)")
            }
        }
    }
}

/// Why a machine cannot run on a host.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NeedsError {
    /// The host lacks something.
    #[error("This host's processors lack what the machine relies on: {}", some(.0))]
    Lacking(Vec<Missing>),
    /// The host could not be asked.
    #[error("Cannot tell whether this host has what the machine relies on")]
    Host(#[from] HostError),
    /// The host offers no table of CPUID.
    #[error("This host's KVM offers no usable CPUID")]
    Cpuid(#[from] CpuidError),
}

/// The first few names, and how many there are besides.
fn some(missing: &[Missing]) -> String {
    const SHOWN: usize = 12;
    let names: Vec<String> = missing.iter().take(SHOWN).map(ToString::to_string).collect();
    let more = missing.len().saturating_sub(SHOWN);
    if more == 0 { names.join(", ") } else { format!("{} and {more} more", names.join(", ")) }
}

impl Needs {
    /// What the machine of these vCPUs needs. `template` is the one it was made with; what it
    /// sets is left out unless `host`, where the machine runs, offers that by itself. No system
    /// call.
    #[must_use]
    pub fn of(vcpus: &[VcpuState], template: &Template, host: Option<&Host>) -> Needs {
        let first = vcpus.first();
        let table = first.map_or(&[][..], VcpuState::cpuid);
        let mut needs = Needs::from_table(table);
        needs.tsc_khz = first.map(VcpuState::tsc_khz).filter(|&khz| khz > 0);
        let own = template.msr_indices();
        let held = vcpus.iter().flat_map(VcpuState::msrs).filter(|m| m.data != 0 && !own.contains(&m.index));
        needs.registers = held.map(|m| m.index).collect::<BTreeSet<u32>>().into_iter().collect();
        if tells_capabilities(table) {
            let told = first.into_iter().flat_map(VcpuState::msrs).find(|m| m.index == ARCH_CAPABILITIES);
            needs.msrs.extend(told.map(|m| MsrValue { index: m.index, value: m.data }));
        }
        needs.without_forced(template, host)
    }

    fn from_table(table: &[kvm_cpuid_entry2]) -> Needs {
        let mut cpuid: Vec<Leaf> = table.iter().map(Leaf::from).collect();
        for row in &mut cpuid {
            for register in REGISTERS {
                let mask = fields::relied_on(row.leaf, row.subleaf, register);
                *row.register_mut(register) &= mask;
            }
        }
        cpuid.retain(|r| r.eax | r.ebx | r.ecx | r.edx != 0);
        Needs {
            format: FORMAT,
            vendor: record::vendor(table),
            model: record::brand(table),
            tsc_khz: None,
            cpuid,
            msrs: Vec::new(),
            registers: Vec::new(),
        }
    }

    /// Takes away what only the template says is there.
    fn without_forced(mut self, template: &Template, host: Option<&Host>) -> Needs {
        let offered = host.and_then(|h| h.shown(true).ok());
        for change in &template.leaves {
            let Some(row) =
                self.cpuid.iter_mut().find(|r| (r.leaf, r.subleaf) == (change.leaf, change.subleaf))
            else {
                continue;
            };
            for &(register, bits) in &change.registers {
                let has = offered.as_ref().map_or(0, |c| read(c, change.leaf, change.subleaf, register));
                let features = fields::of(change.leaf, change.subleaf, register);
                let features = features.filter(|f| f.kind == Kind::Feature);
                let mask = features.fold(0, |mask, f| mask | f.mask);
                *row.register_mut(register) &= !(bits.value & mask & !has);
            }
        }
        for change in &template.msrs {
            let has = host.and_then(|h| h.msr(change.index)).unwrap_or(0);
            if let Some(told) = self.msrs.iter_mut().find(|m| m.index == change.index) {
                told.value &= !(change.bits.value & !has);
            }
        }
        self
    }

    /// The maker of the processors it ran on.
    #[must_use]
    pub fn vendor(&self) -> &str {
        &self.vendor
    }

    /// The brand that the guest was shown.
    #[must_use]
    pub fn model(&self) -> &str {
        &self.model
    }

    /// Asks the host that this runs on. Four ioctls. The TSC's frequency is left to
    /// [`VcpuState::load`], which has a vCPU to ask.
    ///
    /// # Errors
    /// [`NeedsError::Lacking`] with everything that is missing, or what KVM said.
    pub fn check(&self, kvm: &Kvm) -> Result<(), NeedsError> {
        let missing = self.missing(&Host::of(kvm)?)?;
        if missing.is_empty() { Ok(()) } else { Err(NeedsError::Lacking(missing)) }
    }

    /// What `host` lacks of this, in the order of CPUID's leaves; nothing where the machine can
    /// run.
    ///
    /// # Errors
    /// [`CpuidError`], for a host whose table is none.
    pub fn missing(&self, host: &Host) -> Result<Vec<Missing>, CpuidError> {
        if self.vendor != host.vendor() {
            // Nothing else can be compared.
            return Ok(vec![Missing::Vendor { needed: self.vendor.clone(), has: host.vendor().to_owned() }]);
        }
        let shown = host.shown(true)?;
        let mut missing = Vec::new();
        for row in &self.cpuid {
            for register in REGISTERS {
                compare(row, register, &shown, &mut missing);
            }
        }
        for told in &self.msrs {
            let has = host.msr(told.index).unwrap_or(0);
            let bits = |mask: u64| (0..64).filter(move |bit| mask >> bit & 1 == 1);
            let name = names::capability;
            missing.extend(bits(told.value & !has & !CAPABILITY_FLAWS).map(|b| Missing::Feature(name(b))));
            missing.extend(bits(has & !told.value & CAPABILITY_FLAWS).map(|b| Missing::Flaw(name(b))));
        }
        missing.extend(self.registers.iter().filter(|&&i| !host.has_msr(i)).map(|&i| Missing::Msr(i)));
        missing.extend(self.missing_clock(host));
        // AMD says some of leaf 1 again in leaf 0x80000001.
        let mut seen = BTreeSet::new();
        missing.retain(|m| seen.insert(m.clone()));
        Ok(missing)
    }

    fn missing_clock(&self, host: &Host) -> Option<Missing> {
        let (needed, has) = self.tsc_khz.zip(host.tsc_khz())?;
        let apart = u64::from(needed.abs_diff(has)) * 1_000_000;
        let near = apart <= TSC_TOLERANCE_PPM * u64::from(needed);
        (!near && !host.tsc_scaling()).then_some(Missing::Tsc { needed, has })
    }

    fn check_record(&self) -> Result<(), RecordError> {
        let texts = [("vendor", self.vendor.as_str()), ("model", self.model.as_str())];
        record::check(self.format, &self.cpuid, &self.registers, texts)?;
        let values: Vec<u32> = self.msrs.iter().map(|m| m.index).collect();
        record::check(self.format, &[], &values, texts)
    }
}

/// What a guest with this row needs of one register and `shown` does not have.
fn compare(row: &Leaf, register: Register, shown: &Cpuid, missing: &mut Vec<Missing>) {
    let Leaf { leaf, subleaf, .. } = *row;
    let (needed, has) = (row.register(register), read(shown, leaf, subleaf, register));
    let bits = |mask: u32| (0..32).filter(move |bit| mask >> bit & 1 == 1);
    for field in fields::of(leaf, subleaf, register) {
        let (n, h) = (field.of(needed), field.of(has));
        match field.kind {
            Kind::Feature => {
                let lacking = bits(needed & !has & field.mask);
                missing.extend(lacking.map(|b| Missing::Feature(names::bit(leaf, subleaf, register, b))));
            }
            Kind::Flaw => {
                let untold = bits(has & !needed & field.mask);
                missing.extend(untold.map(|b| Missing::Flaw(names::bit(leaf, subleaf, register, b))));
            }
            Kind::Most if n > h => missing.push(Missing::Amount { what: field.name, needed: n, has: h }),
            // A component that is not there at all is missed by its bit.
            Kind::Same if n != h && leaf == 0xd => {
                if shown.entry(leaf, subleaf).is_some() {
                    missing.push(Missing::Differs(format!("layout of {}", names::component(subleaf))));
                }
            }
            // A guest that was told nothing relies on nothing.
            Kind::Same if n != h && n != 0 => missing.push(Missing::Differs(field.name.to_owned())),
            Kind::Most | Kind::Same | Kind::Free => {}
        }
    }
}

/// What a guest reads: zero where the table has nothing.
fn read(cpuid: &Cpuid, leaf: u32, subleaf: u32, register: Register) -> u32 {
    cpuid.entry(leaf, subleaf).map_or(0, |e| Leaf::from(e).register(register))
}

/// Whether a guest with this table looks at `IA32_ARCH_CAPABILITIES`.
fn tells_capabilities(table: &[kvm_cpuid_entry2]) -> bool {
    let seven = table.iter().find(|e| (e.function, e.index) == (7, 0));
    seven.is_some_and(|e| e.edx & LEAF7_EDX_ARCH_CAPABILITIES != 0)
}

impl Leaf {
    fn register(&self, register: Register) -> u32 {
        match register {
            Register::Eax => self.eax,
            Register::Ebx => self.ebx,
            Register::Ecx => self.ecx,
            Register::Edx => self.edx,
        }
    }

    fn register_mut(&mut self, register: Register) -> &mut u32 {
        match register {
            Register::Eax => &mut self.eax,
            Register::Ebx => &mut self.ebx,
            Register::Ecx => &mut self.ecx,
            Register::Edx => &mut self.edx,
        }
    }
}

impl Serialize for Needs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Needs::serialize(self, serializer)
    }
}

impl<'de> Deserialize<'de> for Needs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Needs, D::Error> {
        let needs = Needs::deserialize(deserializer)?;
        needs.check_record().map_err(D::Error::custom)?;
        Ok(needs)
    }
}
