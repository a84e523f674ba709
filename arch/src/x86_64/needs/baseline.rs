//! One template for several hosts: what all of them have.
//!
//! ```text
//!   Host ──shown──► table ─┐
//!   Host ──shown──► table ─┼─ each register ─► target ──xsave, dependents──► target
//!   Host ──shown──► table ─┘                      │
//!                                                 ▼
//!               template: the bits in which any host differs from the target
//! ```
//!
//! Features are those that all hosts have, numbers the least of any, admitted weaknesses those of
//! any. What says how a processor is and not what it can do (its signature, caches, brand) is
//! taken from the **oldest** host, the one with the smallest family, model and stepping, so
//! that the guest sees a processor that exists, or less than it.
//!
//! Only bits in which the hosts differ are changed. A template that named all bits would promise
//! what a later host may lack, and would take from machines what their own description turns on.
//! No bit is ever set that a host does not have, but for weaknesses.
//!
//! The XSAVE area is the one part that does not split into bits: a component that lies elsewhere
//! on one host is given up on all, and with it the instructions that use it, and the sizes that
//! leaf 0xd tells are computed anew.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    ARCH_CAPABILITIES, CAPABILITY_FLAWS, Host, LEAF7_EDX_ARCH_CAPABILITIES, REGISTERS,
    fields::{self, Kind},
    names, read,
};
use crate::x86_64::{
    cpuid::{Cpuid, CpuidError},
    template::{Bits, LeafChange, MsrChange, Register, Template},
};

/// Why hosts have nothing in common.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BaselineError {
    /// No host was given.
    #[error("A baseline is of at least one host")]
    None,
    /// The hosts' processors are of different makers.
    #[error(
        "The hosts' processors are of {first} and of {other}; a machine cannot be moved between makers, so make one template for each"
    )]
    Vendors {
        /// The first host's maker.
        first: String,
        /// Another's.
        other: String,
        /// Which one.
        index: usize,
    },
    /// A host's table is none.
    #[error("The CPUID of host {index} cannot be used")]
    Cpuid {
        /// Which one, from 0.
        index: usize,
        /// Why.
        #[source]
        source: CpuidError,
    },
}

/// What one host gives up under a baseline.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Loss {
    /// A feature that it has, by name.
    Feature(String),
    /// A number becomes less.
    Amount {
        /// Of what.
        what: &'static str,
        /// What the host has.
        from: u32,
        /// What machines see.
        to: u32,
    },
    /// Machines are told of a weakness that it does not have.
    Flaw(String),
}

/// A template for several hosts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Baseline {
    /// With it a machine sees the same processors on all of them.
    pub template: Template,
    /// What each gives up, in their order.
    pub losses: Vec<Vec<Loss>>,
    /// Whether a machine can be moved between all of them as far as the TSC goes: its frequency
    /// is the same or can be scaled everywhere. No template changes that.
    pub clocks_agree: bool,
}

/// The values of a table's registers by leaf and subleaf.
type Table = BTreeMap<(u32, u32), [u32; 4]>;

/// Computes a template with which machines run on all `hosts` and can be moved between them.
///
/// # Errors
/// [`BaselineError`].
pub fn baseline(hosts: &[Host]) -> Result<Baseline, BaselineError> {
    let first = hosts.first().ok_or(BaselineError::None)?;
    if let Some(index) = hosts.iter().position(|h| h.vendor() != first.vendor()) {
        let other = hosts.get(index).unwrap_or(first).vendor().to_owned();
        return Err(BaselineError::Vendors { first: first.vendor().to_owned(), other, index });
    }
    let shown = |(index, host): (usize, &Host)| {
        host.shown(false).map_err(|source| BaselineError::Cpuid { index, source })
    };
    let tables = hosts.iter().enumerate().map(shown).collect::<Result<Vec<Cpuid>, _>>()?;
    let mut target = intersection(&tables);
    settle_xsave(&mut target, &tables);
    let msrs = capabilities(hosts, &target);
    let losses = hosts.iter().zip(&tables).map(|(host, table)| losses(host, table, &target, msrs));
    let losses = losses.collect();
    let template = Template {
        leaves: changes(&tables, &target),
        msrs: msrs.into_iter().filter_map(|target| capability_change(hosts, target)).collect(),
        ..Default::default()
    };
    Ok(Baseline { template, losses, clocks_agree: clocks_agree(hosts) })
}

/// What all tables have.
fn intersection(tables: &[Cpuid]) -> Table {
    let rows = tables.iter().flat_map(|t| t.entries().iter().map(|e| (e.function, e.index)));
    let rows: BTreeSet<(u32, u32)> = rows.filter(|&(leaf, _)| !fields::is_own(leaf)).collect();
    let oldest = tables.iter().min_by_key(|t| age(read(t, 1, 0, Register::Eax)));
    let target = |&(leaf, subleaf): &(u32, u32)| {
        REGISTERS.map(|register| {
            let values: Vec<u32> = tables.iter().map(|t| read(t, leaf, subleaf, register)).collect();
            let model = oldest.map_or(0, |t| read(t, leaf, subleaf, register));
            // What a host has no row for cannot be given to it.
            let everywhere = tables.iter().all(|t| t.entry(leaf, subleaf).is_some());
            fields::of(leaf, subleaf, register)
                .map(|field| {
                    field.mask & merged(field.kind, field.mask, &values, everywhere.then_some(model))
                })
                .fold(0, |register, bits| register | bits)
        })
    };
    rows.iter().map(|row| (*row, target(row))).collect()
}

/// The value that a field has for all hosts; `model` is the oldest host's.
fn merged(kind: Kind, mask: u32, values: &[u32], model: Option<u32>) -> u32 {
    let all = || values.iter().fold(u32::MAX, |all, v| all & v);
    let same = || values.iter().all(|v| Some(v & mask) == values.first().map(|f| f & mask));
    match kind {
        Kind::Feature => all(),
        Kind::Flaw => values.iter().fold(0, |any, v| any | v),
        Kind::Most => values.iter().map(|v| v & mask).min().unwrap_or(0),
        Kind::Same if same() => all(),
        Kind::Same => 0,
        Kind::Free => model.unwrap_or(0),
    }
}

/// Family, model and stepping of a signature, in the order in which processors came out.
fn age(signature: u32) -> (u32, u32, u32) {
    let family = (signature >> 8 & 0xf) + (signature >> 20 & 0xff);
    let model = signature >> 4 & 0xf | signature >> 12 & 0xf0;
    (family, model, signature & 0xf)
}

/// What uses a component of the XSAVE area. AVX-512 needs its three together.
const USERS: &[(&[u32], &str)] = &[
    (
        &[2],
        "avx fma f16c avx2 vaes vpclmulqdq avx_vnni avx_ifma avx_vnni_int8 avx_ne_convert avx_vnni_int16 sha512 \
         sm3 sm4 xop fma4",
    ),
    (
        &[2, 5, 6, 7],
        "avx512f avx512dq avx512ifma avx512pf avx512er avx512cd avx512bw avx512vl avx512vbmi avx512_vbmi2 \
         avx512_vnni avx512_bitalg avx512_vpopcntdq avx512_4vnniw avx512_4fmaps avx512_vp2intersect avx512_fp16 \
         avx512_bf16 avx10",
    ),
    (&[3, 4], "mpx"),
    (&[9], "pku ospke"),
    (&[11, 12], "shstk ibt"),
    (&[17, 18], "amx_tile amx_int8 amx_bf16 amx_fp16 amx_complex"),
];

/// Gives up components that do not lie in the same place everywhere, and what uses them, and
/// computes the sizes that leaf 0xd tells.
fn settle_xsave(target: &mut Table, tables: &[Cpuid]) {
    const LEAF: u32 = 0xd;
    let layout = |t: &Cpuid, n: u32| REGISTERS.map(|r| read(t, LEAF, n, r));
    let same = |n: u32| tables.iter().all(|t| Some(layout(t, n)) == tables.first().map(|f| layout(f, n)));
    let alike = |&(leaf, n): &(u32, u32)| leaf != LEAF || same(n);
    if target.keys().all(alike) {
        return;
    }
    let components = |target: &Table, subleaf: u32, low: usize| {
        target.get(&(LEAF, subleaf)).map_or(0, |r| u64::from(r[low]) | u64::from(r[3]) << 32)
    };
    let mut user = components(target, 0, 0);
    let mut supervisor = components(target, 1, 2);
    let mut gone =
        (2..63).filter(|&n| (user | supervisor) >> n & 1 == 1 && !same(n)).fold(0u64, |m, n| m | 1 << n);
    for (parts, _) in USERS {
        let parts = parts.iter().filter(|&&n| n > 2).fold(0u64, |mask, n| mask | 1 << n);
        if gone & parts != 0 {
            gone |= parts;
        }
    }
    user &= !gone;
    supervisor &= !gone;
    for (parts, users) in USERS {
        if parts.iter().any(|n| (user | supervisor) >> n & 1 == 0) {
            users.split_whitespace().for_each(|name| clear(target, name));
        }
    }
    let had = |n: u32| tables.iter().any(|t| t.entry(LEAF, n).is_some());
    for n in (2..63).filter(|&n| had(n) && (user | supervisor) >> n & 1 == 0) {
        target.insert((LEAF, n), [0; 4]);
    }
    if user == 0 {
        // A host has no XSAVE at all.
        clear(target, "xsave");
        target.iter_mut().filter(|(row, _)| row.0 == LEAF).for_each(|(_, values)| *values = [0; 4]);
        return;
    }
    let (standard, compacted) = (standard_size(target, user), compacted_size(target, user | supervisor));
    if let Some([eax, ebx, ecx, edx]) = target.get_mut(&(LEAF, 0)) {
        (*eax, *edx) = (user as u32, (user >> 32) as u32);
        // KVM tells in EBX what is in use, and until a guest sets XCR0 that is all.
        (*ebx, *ecx) = (standard, standard);
    }
    if let Some([eax, ebx, ecx, edx]) = target.get_mut(&(LEAF, 1)) {
        (*ecx, *edx) = (supervisor as u32, (supervisor >> 32) as u32);
        const COMPACTS: u32 = 1 << 1 | 1 << 3;
        *ebx = if *eax & COMPACTS == 0 { 0 } else { compacted };
    }
}

/// x87 and SSE registers, and the header.
const XSAVE_FIXED: u32 = 576;

fn standard_size(target: &Table, components: u64) -> u32 {
    let end = |n: u32| target.get(&(0xd, n)).map_or(0, |r| r[0].saturating_add(r[1]));
    (2..63).filter(|n| components >> n & 1 == 1).map(end).fold(XSAVE_FIXED, u32::max)
}

fn compacted_size(target: &Table, components: u64) -> u32 {
    const ALIGNED: u32 = 1 << 1;
    (2..63).filter(|n| components >> n & 1 == 1).fold(XSAVE_FIXED, |end, n| {
        let [size, _, how, _] = target.get(&(0xd, n)).copied().unwrap_or_default();
        let start = if how & ALIGNED == 0 { end } else { end.checked_next_multiple_of(64).unwrap_or(end) };
        start.saturating_add(size)
    })
}

fn clear(target: &mut Table, name: &str) {
    for (leaf, subleaf, register, mask) in names::places(name) {
        if let Some(row) = target.get_mut(&(leaf, subleaf)) {
            row[register as usize] &= !mask;
        }
    }
}

/// What every host's `IA32_ARCH_CAPABILITIES` can be, if all have it and guests look at it.
fn capabilities(hosts: &[Host], target: &Table) -> Option<u64> {
    let looked_at = target.get(&(7, 0)).is_some_and(|r| r[3] & LEAF7_EDX_ARCH_CAPABILITIES != 0);
    let values: Vec<u64> = hosts.iter().map(|h| h.msr(ARCH_CAPABILITIES)).collect::<Option<_>>()?;
    let all = values.iter().fold(u64::MAX, |all, v| all & v);
    let any = values.iter().fold(0, |any, v| any | v);
    looked_at.then_some(all & !CAPABILITY_FLAWS | any & CAPABILITY_FLAWS)
}

fn capability_change(hosts: &[Host], target: u64) -> Option<MsrChange> {
    let mask = hosts.iter().filter_map(|h| h.msr(ARCH_CAPABILITIES)).fold(0, |mask, v| mask | v ^ target);
    let bits = Bits { mask, value: target & mask };
    (mask != 0).then_some(MsrChange { index: ARCH_CAPABILITIES, bits })
}

/// The bits in which any table is not the target.
fn changes(tables: &[Cpuid], target: &Table) -> Vec<LeafChange> {
    let mut changes = Vec::new();
    for (&(leaf, subleaf), values) in target {
        // A row that is given up goes whole, with what a machine's topology puts into it.
        let shown = tables.iter().any(|t| t.entry(leaf, subleaf).is_some());
        let given_up = shown && *values == [0; 4];
        let mask = |register| {
            let value = values[register as usize];
            let differs = |t| read(t, leaf, subleaf, register) ^ value;
            if given_up { u32::MAX } else { tables.iter().map(differs).fold(0, |mask, bits| mask | bits) }
        };
        let registers: Vec<(Register, Bits<u32>)> = REGISTERS
            .into_iter()
            .map(|r| (r, Bits { mask: mask(r), value: values[r as usize] & mask(r) }))
            .filter(|(_, bits)| bits.mask != 0)
            .collect();
        if !registers.is_empty() {
            let flags = tables.iter().find_map(|t| t.entry(leaf, subleaf)).map_or(0, |e| e.flags);
            changes.push(LeafChange { leaf, subleaf, flags, registers });
        }
    }
    changes
}

/// What a host with this table has and the target has not.
fn losses(host: &Host, table: &Cpuid, target: &Table, msrs: Option<u64>) -> Vec<Loss> {
    let mut losses = Vec::new();
    for (&(leaf, subleaf), values) in target {
        for register in REGISTERS {
            let (has, shown) = (read(table, leaf, subleaf, register), values[register as usize]);
            for field in fields::of(leaf, subleaf, register) {
                let (from, to) = (field.of(has), field.of(shown));
                let bits = |mask: u32| (0..32).filter(move |bit| mask >> bit & 1 == 1);
                let name = |bit| names::bit(leaf, subleaf, register, bit);
                match field.kind {
                    Kind::Feature => {
                        losses.extend(bits(has & !shown & field.mask).map(|b| Loss::Feature(name(b))));
                    }
                    Kind::Flaw => {
                        losses.extend(bits(shown & !has & field.mask).map(|b| Loss::Flaw(name(b))));
                    }
                    Kind::Most if from != to => losses.push(Loss::Amount { what: field.name, from, to }),
                    Kind::Most | Kind::Same | Kind::Free => {}
                }
            }
        }
    }
    if let (Some(shown), Some(has)) = (msrs, host.msr(ARCH_CAPABILITIES)) {
        let bits = |mask: u64| (0..64).filter(move |bit| mask >> bit & 1 == 1);
        losses.extend(bits(has & !shown).map(|b| Loss::Feature(names::capability(b))));
        losses.extend(bits(shown & !has).map(|b| Loss::Flaw(names::capability(b))));
    }
    let mut seen = Vec::new();
    losses.retain(|loss| {
        !seen.contains(loss) && {
            seen.push(loss.clone());
            true
        }
    });
    losses
}

fn clocks_agree(hosts: &[Host]) -> bool {
    use crate::x86_64::state::TSC_TOLERANCE_PPM;
    let known = || hosts.iter().filter_map(Host::tsc_khz);
    let (least, most) = (known().min().unwrap_or(0), known().max().unwrap_or(0));
    let apart = u64::from(most - least) * 1_000_000;
    apart <= TSC_TOLERANCE_PPM * u64::from(least) || hosts.iter().all(Host::tsc_scaling)
}
