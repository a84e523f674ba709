//! How each part of CPUID travels.
//!
//! ```text
//!   Feature   a bit a guest may use          host must have it    baseline: what all have
//!   Flaw      a bit that admits a weakness   guest must know it   baseline: what any has
//!   Most      a number that is a limit       host's at least      baseline: the least
//!   Same      a place or size in memory      equal                baseline: equal or nothing
//!   Free      says how it is, not what can   never asked          baseline: the oldest host's
//! ```
//!
//! Whatever no row speaks of is a feature: a leaf that is newer than this table is then refused
//! rather than trusted. Free is what KVM keeps up to date itself (`osxsave`, the size of the
//! XSAVE area in use), what the monitor makes (topology, APIC ids), and what a guest can only
//! have read to go faster (caches) or to print (brand): a restored guest goes on seeing what it
//! saw.

use crate::x86_64::template::Register::{self, Eax, Ebx, Ecx, Edx};

/// How bits travel; see the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The guest may use what each bit stands for.
    Feature,
    /// Each bit admits a weakness.
    Flaw,
    /// A number that is a limit.
    Most,
    /// A number that must be the same.
    Same,
    /// Nothing relies on it.
    Free,
}
use Kind::{Flaw, Free, Most, Same};

/// Some bits of one register that travel the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field {
    /// Which bits; neighbours, for a number.
    pub mask: u32,
    /// How they travel.
    pub kind: Kind,
    /// What a number is called; nothing for bits.
    pub name: &'static str,
}

impl Field {
    /// The field's value in a register.
    pub fn of(self, register: u32) -> u32 {
        (register & self.mask) >> self.mask.trailing_zeros().min(31)
    }
}

/// Any subleaf.
const ANY: u32 = u32::MAX;
const ALL: u32 = u32::MAX;

/// Leaf, subleaf, register, and the field.
type Row = (u32, u32, Register, Field);

const fn row(leaf: u32, subleaf: u32, register: Register, mask: u32, kind: Kind, name: &'static str) -> Row {
    (leaf, subleaf, register, Field { mask, kind, name })
}

const fn free(leaf: u32, subleaf: u32, register: Register, mask: u32) -> Row {
    row(leaf, subleaf, register, mask, Free, "")
}

/// Leaves of which nothing is relied on: the numbers of leaves, the maker (asked apart), caches
/// (2, 4, 0x80000005, 6, 0x8000001d), MWAIT, frequencies, topology, brand, TLBs, hints on speed.
const FREE: &[u32] = &[
    0,
    2,
    3,
    4,
    5,
    9,
    0xb,
    0x15,
    0x16,
    0x17,
    0x18,
    0x1a,
    0x1f,
    0x4000_0000,
    TIMING,
    0x8000_0000,
    0x8000_0002,
    0x8000_0003,
    0x8000_0004,
    0x8000_0005,
    0x8000_0006,
    0x8000_0019,
    0x8000_001a,
    0x8000_001d,
    0x8000_001e,
    0x8000_0026,
];
const TIMING: u32 = 0x4000_0010;

/// In the order of leaves.
const ROWS: &[Row] = &[
    free(1, 0, Eax, ALL),
    free(1, 0, Ebx, 0xffff_00ff),
    row(1, 0, Ebx, 0xff00, Same, "CLFLUSH line size in 8 bytes"),
    // OSXSAVE: KVM's, from CR4.
    free(1, 0, Ecx, 1 << 27),
    // More than one thread or core.
    free(1, 0, Edx, 1 << 28),
    free(6, 0, Ebx, ALL),
    free(6, 0, Ecx, 0xff00),
    free(6, 0, Edx, ALL),
    free(7, 0, Eax, ALL),
    // OSPKE: KVM's, from CR4. The width of MPX addresses.
    free(7, 0, Ecx, 1 << 4 | 0x1f << 17),
    row(0xa, 0, Eax, 0xff, Most, "version of performance counters"),
    row(0xa, 0, Eax, 0xff00, Most, "performance counters"),
    row(0xa, 0, Eax, 0xff_0000, Most, "bits of a performance counter"),
    row(0xa, 0, Eax, 0xff00_0000, Most, "performance events"),
    row(0xa, 0, Ebx, ALL, Flaw, ""),
    row(0xa, 0, Edx, 0x1f, Most, "fixed performance counters"),
    row(0xa, 0, Edx, 0x1fe0, Most, "bits of a fixed performance counter"),
    free(0xa, 0, Edx, 0xffff_e000),
    // Sizes of areas: KVM's, from XCR0 and IA32_XSS.
    free(0xd, 0, Ebx, ALL),
    free(0xd, 0, Ecx, ALL),
    free(0xd, 1, Ebx, ALL),
    free(0x14, 0, Eax, ALL),
    row(0x14, 1, Eax, ALL, Same, "processor trace ranges"),
    // Tiles: their sizes are part of their state.
    row(0x1d, ANY, Eax, ALL, Same, "tile palette"),
    row(0x1d, ANY, Ebx, ALL, Same, "tile palette"),
    row(0x1d, ANY, Ecx, ALL, Same, "tile palette"),
    row(0x1e, 0, Ebx, ALL, Same, "tile multiplier"),
    free(0x24, 0, Eax, ALL),
    row(0x24, 0, Ebx, 0xff, Most, "version of AVX10"),
    free(0x4000_0001, 0, Ebx, ALL),
    free(0x4000_0001, 0, Ecx, ALL),
    // Hints.
    free(0x4000_0001, 0, Edx, ALL),
    free(0x8000_0001, 0, Eax, ALL),
    free(0x8000_0001, 0, Ebx, ALL),
    // CMP_LEGACY and TOPOEXT follow the machine's topology.
    free(0x8000_0001, 0, Ecx, 1 << 1 | 1 << 22),
    free(0x8000_0007, 0, Eax, ALL),
    free(0x8000_0007, 0, Ecx, ALL),
    row(0x8000_0008, 0, Eax, 0xff, Most, "physical address bits"),
    row(0x8000_0008, 0, Eax, 0xff00, Most, "linear address bits"),
    free(0x8000_0008, 0, Eax, 0xffff_0000),
    free(0x8000_0008, 0, Ecx, ALL),
    row(0x8000_0008, 0, Edx, 0xffff, Most, "pages of INVLPGB"),
    row(0x8000_0008, 0, Edx, 0xffff_0000, Most, "registers of RDPRU"),
    row(0x8000_000a, 0, Eax, 0xff, Most, "SVM revision"),
    row(0x8000_000a, 0, Ebx, ALL, Most, "address space ids"),
    // Size of a microcode patch, depth of the return predictor.
    free(0x8000_0021, 0, Ebx, ALL),
    row(0x8000_0022, 0, Ebx, 0xf, Most, "performance counters"),
    row(0x8000_0022, 0, Ebx, 0x3f0, Most, "last branch records"),
    row(0x8000_0022, 0, Ebx, 0xfc00, Most, "northbridge performance counters"),
    free(0x8000_0022, 0, Ebx, 0xffff_0000),
];

/// The fields that a register of CPUID falls into; together they are all its bits.
pub fn of(leaf: u32, subleaf: u32, register: Register) -> impl Iterator<Item = Field> + Clone {
    let all = |kind, name| Some(Field { mask: ALL, kind, name });
    let whole = if FREE.contains(&leaf) {
        all(Free, "")
    } else if leaf == 0xd && subleaf >= 2 {
        // A component of the XSAVE area: size, offset, how it is aligned.
        all(if register == Edx { Free } else { Same }, "layout")
    } else {
        None
    };
    let first = ROWS.partition_point(|r| r.0 < leaf);
    let rows = ROWS.get(first..).filter(|_| whole.is_none()).unwrap_or_default();
    let rows = rows.iter().take_while(move |r| r.0 == leaf);
    let rows = rows.filter(move |r| (r.1 == subleaf || r.1 == ANY) && r.2 == register).map(|r| r.3);
    let rest = if whole.is_some() { 0 } else { !rows.clone().fold(0, |mask, f| mask | f.mask) };
    let rest = (rest != 0).then_some(Field { mask: rest, kind: Kind::Feature, name: "" });
    whole.into_iter().chain(rows).chain(rest)
}

/// The bits of a register that a guest can rely on.
pub fn relied_on(leaf: u32, subleaf: u32, register: Register) -> u32 {
    of(leaf, subleaf, register).filter(|f| f.kind != Free).fold(0, |mask, f| mask | f.mask)
}

/// Leaves that a template must leave as they are: true of one host or of one machine only.
pub fn is_own(leaf: u32) -> bool {
    matches!(leaf, 0xb | 0x15 | 0x16 | 0x1f | 0x4000_0000 | TIMING | 0x8000_001e | 0x8000_0026)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_in_the_order_of_leaves() {
        assert!(ROWS.is_sorted_by_key(|row| row.0));
    }

    #[test]
    fn every_bit_of_every_register_travels_in_exactly_one_way() {
        let leaves = ROWS.iter().map(|r| (r.0, r.1.min(1))).chain([(7, 1), (0xd, 9), (0x99, 0), (4, 2)]);
        for (leaf, subleaf) in leaves {
            for register in [Eax, Ebx, Ecx, Edx] {
                let fields: Vec<Field> = of(leaf, subleaf, register).collect();
                let sum: u64 = fields.iter().map(|f| u64::from(f.mask)).sum();
                assert_eq!(sum, u64::from(ALL), "{leaf:#x} {subleaf} {register:?}");
                for field in fields.iter().filter(|f| matches!(f.kind, Most | Same)) {
                    assert!(!field.name.is_empty());
                    let shifted = field.mask >> field.mask.trailing_zeros();
                    assert!((u64::from(shifted) + 1).is_power_of_two(), "a number is of neighbours");
                }
            }
        }
    }

    #[test]
    fn a_field_is_read_as_its_number() {
        let bits: Vec<Field> = of(0x8000_0008, 0, Eax).collect();
        assert_eq!(bits[0].of(0x3930), 0x30);
        assert_eq!(bits[1].of(0x3930), 0x39);
        assert_eq!(of(0x8000_0099, 0, Eax).next().map(|f| f.kind), Some(Kind::Feature));
    }
}
