//! The templates that have a name.
//!
//! They make Intel's Skylake, Cascade Lake and Ice Lake, and AMD's Milan, show themselves as
//! the processors of old EC2 instance types, or as each other. The tables are those that
//! machines of a fleet agree on, so they may never change: a machine that was stored on one host
//! compares what it saw with what the next host shows.
//!
//! Each is for named models only, because it clears what those have; a newer processor would
//! show what came after.

use super::{Bits, LeafChange, MsrChange, Register, Template, TemplateError};
use Register::{Eax, Ebx, Ecx, Edx};

/// A template that has a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Named {
    /// Like EC2's C3. On a Skylake without the microcode for it, the guest does not guard itself
    /// against stale MMIO data.
    C3,
    /// Like EC2's T2.
    T2,
    /// T2 for Skylake and Cascade Lake alike, down to the list of flaws.
    T2S,
    /// Like Cascade Lake.
    T2CL,
    /// T2CL's instructions on AMD's Milan.
    T2A,
}

const INTEL: &str = "GenuineIntel";
const AMD: &str = "AuthenticAMD";

// CPUID leaf 1, EAX: family, model and stepping.
const SKYLAKE: u32 = 0x0005_0654;
const CASCADE_LAKE: u32 = 0x0005_0657;
const ICE_LAKE: u32 = 0x0006_06a6;
const MILAN: u32 = 0x00a0_0f11;
/// All of the signature but the processor type and what is reserved.
const SIGNATURE: u32 = 0x0fff_0fff;

const IA32_ARCH_CAPABILITIES: u32 = 0x10a;

/// Leaf, subleaf, register, mask, value.
type Row = (u32, u32, Register, u32, u32);

const C3: &[Row] = &[
    (0x1, 0, Eax, 0x0fff_3fff, 0x0003_06e4),
    (0x1, 0, Ecx, 0x0040_dd3c, 0),
    (0x1, 0, Edx, 0xa864_1080, 0x1080),
    (0x7, 0, Ebx, 0xffaf_dd3c, 0),
    (0x7, 0, Ecx, 0x4041_481e, 0),
    (0x7, 0, Edx, 0x0000_000c, 0),
    (0xd, 0, Eax, 0x0000_02f8, 0),
    (0xd, 1, Eax, 0x0000_000e, 0),
    (0x8000_0001, 0, Ecx, 0x0000_0120, 0),
    (0x8000_0001, 0, Edx, 0x0400_0000, 0),
];

/// What all templates of the T2 kind have in common.
const T2_BASE: &[Row] = &[
    (0x1, 0, Eax, 0x0fff_3fff, 0x0003_06f2),
    (0x1, 0, Ecx, 0x0004_cdfc, 0),
    (0x1, 0, Edx, 0xe864_1080, 0x1080),
    (0x7, 0, Ebx, 0xffef_da14, 0x0200),
    (0x7, 0, Ecx, 0x4041_5f5e, 0),
    (0x7, 0, Edx, 0x0000_011c, 0),
    (0xd, 0, Eax, 0x0000_02f8, 0),
    (0xd, 1, Eax, 0x0000_000e, 0),
];

const T2_EXTENDED: &[Row] = &[
    (0x8000_0001, 0, Ecx, 0x2000_0100, 0),
    (0x8000_0001, 0, Edx, 0x0400_0000, 0),
    (0x8000_0008, 0, Ebx, 0x0000_0200, 0),
];

const T2CL_EXTENDED: &[Row] = &[
    (0x8000_0001, 0, Ecx, 0x2000_01c0, 0),
    (0x8000_0001, 0, Edx, 0x07c0_0000, 0),
    (0x8000_0008, 0, Ebx, 0x0000_0200, 0),
];

const T2A_EXTENDED: &[Row] = &[
    (0x8000_0001, 0, Ecx, 0x2000_01c4, 0),
    (0x8000_0001, 0, Edx, 0x0640_0000, 0),
    (0x8000_0008, 0, Ebx, 0x001c_0205, 0x001c_0004),
];

impl Named {
    /// The template, for the processor this runs on.
    ///
    /// # Errors
    /// [`TemplateError::Vendor`], [`TemplateError::Model`]: it is not for this processor.
    pub fn template(self) -> Result<Template, TemplateError> {
        let leaf = std::arch::x86_64::__cpuid(0);
        let vendor = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat();
        self.template_for(&String::from_utf8_lossy(&vendor), std::arch::x86_64::__cpuid(1).eax)
    }

    pub(super) fn template_for(self, vendor: &str, signature: u32) -> Result<Template, TemplateError> {
        let (name, wanted, models) = self.processors();
        if vendor != wanted {
            return Err(TemplateError::Vendor { name, wanted, found: vendor.to_owned() });
        }
        if !models.contains(&(signature & SIGNATURE)) {
            return Err(TemplateError::Model { name, signature });
        }
        let (tables, capabilities) = self.tables();
        let msrs = capabilities
            .map(|(mask, value)| MsrChange { index: IA32_ARCH_CAPABILITIES, bits: Bits { mask, value } });
        Ok(Template { leaves: changes(tables), msrs: msrs.into_iter().collect(), ..Default::default() })
    }

    fn processors(self) -> (&'static str, &'static str, &'static [u32]) {
        match self {
            Named::C3 => ("C3", INTEL, &[SKYLAKE, CASCADE_LAKE, ICE_LAKE]),
            Named::T2 => ("T2", INTEL, &[SKYLAKE, CASCADE_LAKE, ICE_LAKE]),
            Named::T2S => ("T2S", INTEL, &[SKYLAKE, CASCADE_LAKE]),
            Named::T2CL => ("T2CL", INTEL, &[CASCADE_LAKE, ICE_LAKE]),
            Named::T2A => ("T2A", AMD, &[MILAN]),
        }
    }

    /// Tables, and mask and value of `IA32_ARCH_CAPABILITIES`.
    fn tables(self) -> ([&'static [Row]; 2], Option<(u64, u64)>) {
        match self {
            Named::C3 => ([C3, &[]], None),
            Named::T2 => ([T2_BASE, T2_EXTENDED], None),
            // Everything is told: what Skylake lacks, Cascade Lake does not show.
            Named::T2S => ([T2_BASE, T2_EXTENDED], Some((u64::MAX, 0x0c0a_0c4c))),
            Named::T2CL => ([T2_BASE, T2CL_EXTENDED], Some((0xffff_ffff_e2f5_1e00, 0))),
            Named::T2A => ([T2_BASE, T2A_EXTENDED], None),
        }
    }
}

/// Rows, as changes of one entry each.
fn changes(tables: [&[Row]; 2]) -> Vec<LeafChange> {
    // The entries of leaves 7 and 0xd depend on the subleaf.
    let flags =
        |leaf| if matches!(leaf, 0x7 | 0xd) { kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
    let mut changes: Vec<LeafChange> = Vec::new();
    for &(leaf, subleaf, register, mask, value) in tables.into_iter().flatten() {
        let bits = Bits { mask, value };
        match changes.iter_mut().find(|c| (c.leaf, c.subleaf) == (leaf, subleaf)) {
            Some(change) => change.registers.push((register, bits)),
            None => {
                changes.push(LeafChange {
                    leaf,
                    subleaf,
                    flags: flags(leaf),
                    registers: vec![(register, bits)],
                });
            }
        }
    }
    changes
}
