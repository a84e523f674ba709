//! Rows of CPUID and of registers as they stand in JSON.
//!
//! ```json
//! { "leaf": "0x7", "subleaf": "0x0", "flags": 1,
//!   "eax": "0x2", "ebx": "0xf1bf27eb", "ecx": "0x405fce", "edx": "0xac004410" }
//! { "index": "0x10a", "value": "0x8000000d" }
//! ```
//!
//! Numbers that people read in hexadecimal are strings, as in a CPU template. Lists are checked
//! when they are read: no row twice, and never more than KVM itself can have.

use std::collections::BTreeSet;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

/// The most model-specific registers that are read.
pub const MSRS_MAX: usize = 1024;
/// The most bytes of a text.
const TEXT_MAX: usize = 64;
/// Version of the records.
pub const FORMAT: u32 = 1;

/// Why a record is none.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// Written by a newer program.
    #[error("It has format {0}; this program reads format {FORMAT}")]
    Format(u32),
    /// More than there can be.
    #[error("It lists {count} {what}; at most {most} are possible")]
    Many {
        /// Of what.
        what: &'static str,
        /// How many.
        count: usize,
        /// How many there can be.
        most: usize,
    },
    /// A row of CPUID that is there twice.
    #[error("It has CPUID leaf {leaf:#x}, subleaf {subleaf:#x}, twice")]
    LeafTwice {
        /// The leaf.
        leaf: u32,
        /// The subleaf.
        subleaf: u32,
    },
    /// A register that is there twice.
    #[error("It has MSR {0:#x} twice")]
    MsrTwice(u32),
    /// A text that is not one of a processor.
    #[error("Its {0} is no printable text of at most {TEXT_MAX} bytes")]
    Text(&'static str),
    /// Leaves that every processor has.
    #[error("It lacks CPUID leaf {0:#x}, which every processor has")]
    NoLeaf(u32),
    /// The maker is not the one in CPUID.
    #[error("It names the maker {named:?}, but its CPUID says {found:?}")]
    Vendor {
        /// The maker it names.
        named: String,
        /// The maker in leaf 0.
        found: String,
    },
}

/// One row of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leaf {
    /// EAX of the instruction.
    #[serde(with = "hex")]
    pub leaf: u32,
    /// ECX of the instruction.
    #[serde(with = "hex")]
    pub subleaf: u32,
    /// KVM's flags of the row (KVM API section 4.46).
    pub flags: u32,
    /// What it answers in EAX.
    #[serde(with = "hex")]
    pub eax: u32,
    /// What it answers in EBX.
    #[serde(with = "hex")]
    pub ebx: u32,
    /// What it answers in ECX.
    #[serde(with = "hex")]
    pub ecx: u32,
    /// What it answers in EDX.
    #[serde(with = "hex")]
    pub edx: u32,
}

impl From<&kvm_cpuid_entry2> for Leaf {
    fn from(e: &kvm_cpuid_entry2) -> Leaf {
        let kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, .. } = *e;
        Leaf { leaf: function, subleaf: index, flags, eax, ebx, ecx, edx }
    }
}

impl From<Leaf> for kvm_cpuid_entry2 {
    fn from(row: Leaf) -> kvm_cpuid_entry2 {
        let Leaf { leaf, subleaf, flags, eax, ebx, ecx, edx } = row;
        kvm_cpuid_entry2 { function: leaf, index: subleaf, flags, eax, ebx, ecx, edx, ..Default::default() }
    }
}

/// A model-specific register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsrValue {
    /// Its number.
    #[serde(with = "hex")]
    pub index: u32,
    /// Its value.
    #[serde(with = "hex")]
    pub value: u64,
}

/// Checks what all records have in common.
pub fn check(
    format: u32,
    cpuid: &[Leaf],
    msrs: &[u32],
    texts: [(&'static str, &str); 2],
) -> Result<(), RecordError> {
    if format != FORMAT {
        return Err(RecordError::Format(format));
    }
    let counts = [("rows of CPUID", cpuid.len(), KVM_MAX_CPUID_ENTRIES), ("registers", msrs.len(), MSRS_MAX)];
    if let Some((what, count, most)) = counts.into_iter().find(|c| c.1 > c.2) {
        return Err(RecordError::Many { what, count, most });
    }
    let mut seen = BTreeSet::new();
    if let Some(row) = cpuid.iter().find(|r| !seen.insert((r.leaf, r.subleaf))) {
        return Err(RecordError::LeafTwice { leaf: row.leaf, subleaf: row.subleaf });
    }
    let mut seen = BTreeSet::new();
    if let Some(&index) = msrs.iter().find(|&&index| !seen.insert(index)) {
        return Err(RecordError::MsrTwice(index));
    }
    let printable =
        |text: &str| text.len() <= TEXT_MAX && text.chars().all(|c| c == ' ' || c.is_ascii_graphic());
    match texts.into_iter().find(|(_, text)| !printable(text)) {
        Some((what, _)) => Err(RecordError::Text(what)),
        None => Ok(()),
    }
}

/// The maker's name in leaf 0, printable whatever is there.
pub fn vendor(cpuid: &[kvm_cpuid_entry2]) -> String {
    let zero = cpuid.iter().find(|e| e.function == 0).copied().unwrap_or_default();
    text([zero.ebx, zero.edx, zero.ecx].into_iter())
}

/// The brand in leaves 0x80000002 to 0x80000004, printable whatever is there.
pub fn brand(cpuid: &[kvm_cpuid_entry2]) -> String {
    let row = |leaf| cpuid.iter().find(move |e| e.function == leaf).copied().unwrap_or_default();
    text((0x8000_0002..=0x8000_0004).map(row).flat_map(|e| [e.eax, e.ebx, e.ecx, e.edx]))
}

fn text(words: impl Iterator<Item = u32>) -> String {
    let bytes = words.flat_map(u32::to_le_bytes).take_while(|&b| b != 0);
    let shown = bytes.map(|b| if b == b' ' || b.is_ascii_graphic() { char::from(b) } else { '?' });
    shown.collect::<String>().trim().to_owned()
}

/// Numbers as strings with `0x` before them.
pub mod hex {
    use std::{borrow::Cow, fmt::LowerHex};

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// Writes `"0x..."`.
    pub fn serialize<S: Serializer, N: LowerHex>(number: &N, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{number:#x}"))
    }

    /// Reads `"0x..."`.
    pub fn deserialize<'de, D: Deserializer<'de>, N: TryFrom<u64>>(deserializer: D) -> Result<N, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        let wrong = || D::Error::custom(format!("{text:?} is no number that begins with 0x and fits here"));
        let digits = text.strip_prefix("0x").filter(|d| !d.starts_with('+')).ok_or_else(wrong)?;
        let number = u64::from_str_radix(digits, 16).map_err(|_| wrong())?;
        N::try_from(number).map_err(|_| wrong())
    }

    /// The same for lists.
    pub mod list {
        use serde::{Deserialize, Deserializer, Serialize, Serializer};

        #[derive(Serialize, Deserialize)]
        #[serde(transparent)]
        struct One(#[serde(with = "super")] u32);

        /// Writes `["0x...", ...]`.
        pub fn serialize<S: Serializer>(numbers: &[u32], serializer: S) -> Result<S::Ok, S::Error> {
            serializer.collect_seq(numbers.iter().map(|&n| One(n)))
        }

        /// Reads `["0x...", ...]`.
        pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u32>, D::Error> {
            Ok(Vec::<One>::deserialize(deserializer)?.into_iter().map(|one| one.0).collect())
        }
    }
}
