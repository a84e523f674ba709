//! Model-specific registers: the few that a boot must set, and which ones a saved vCPU is made
//! of.
//!
//! KVM gives a new vCPU the reset values of the manual. Only two of them are wrong for a guest
//! without firmware, because firmware is what changes them on a real machine; every other MSR
//! that monitors usually write (SYSENTER, STAR, kvmclock, TSC) is zero already, and writing a
//! zero again costs a system call a vCPU.
//!
//! A saved vCPU keeps what KVM lists as worth keeping (`KVM_GET_MSR_INDEX_LIST`), less what this
//! monitor never shows to a guest, plus the MTRRs, which older KVMs do not list. Order matters
//! when they are written back, see [`restore_order`].

use kvm_bindings::{Msrs, kvm_msr_entry};

/// Time stamp counter.
pub const IA32_TSC: u32 = 0x10;
/// Fast string operations and other switches.
pub const IA32_MISC_ENABLE: u32 = 0x1a0;
/// The MTRRs' default type and enable bit.
pub const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
/// The local APIC timer's deadline.
pub const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// The GS base that SWAPGS exchanges.
pub const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// Fast strings on (without the bit, Linux does without REP MOVSB on Intel); branch trace store
/// and PEBS unavailable, as KVM's own reset value has it.
const MISC_ENABLE_VALUE: u64 = 1 | 1 << 11 | 1 << 12;
/// Write-back for all memory, MTRRs enabled. Kernels take disabled MTRRs as "no PAT either".
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// The MSRs to write before a vCPU's first instruction, on every vCPU.
#[must_use]
pub fn boot() -> [kvm_msr_entry; 2] {
    [entry(IA32_MISC_ENABLE, MISC_ENABLE_VALUE), entry(IA32_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK)]
}

/// The entry for `KVM_SET_MSRS` that sets `index` to `data`.
#[must_use]
pub fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}

/// Packs entries for `KVM_GET_MSRS` and `KVM_SET_MSRS` into as many lists as KVM's limit of 256
/// asks for.
#[must_use]
pub fn lists(entries: &[kvm_msr_entry]) -> Vec<Msrs> {
    entries
        .chunks(kvm_bindings::KVM_MAX_MSR_ENTRIES)
        // A chunk is never longer than the limit, the only reason to fail.
        .filter_map(|chunk| Msrs::from_entries(chunk).ok())
        .collect()
}

/// The indices a saved vCPU keeps, from what KVM lists, in the order in which they are written
/// back. `nested` keeps the VMX capability registers too.
#[must_use]
pub fn to_save(listed: &[u32], nested: bool) -> Vec<u32> {
    let mut keep: Vec<u32> =
        listed.iter().copied().filter(|&index| !is_hidden(index, nested)).chain(MTRRS.concat()).collect();
    keep.sort_unstable_by_key(|&index| (restore_order(index), index));
    keep.dedup();
    keep
}

/// Fixed-range, variable-range and default-type MTRRs.
const MTRRS: [&[u32]; 3] = [
    &[0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f],
    &[
        0x200, 0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, 0x208, 0x209, 0x20a, 0x20b, 0x20c, 0x20d,
        0x20e, 0x20f,
    ],
    &[IA32_MTRR_DEF_TYPE],
];

/// Whether `index` is an MTRR, which every vCPU has whether KVM lists it or not.
pub(super) fn is_mtrr(index: u32) -> bool {
    MTRRS.iter().any(|group| group.contains(&index))
}

/// What the guest never sees, or what describes the host and not the guest's doing: Hyper-V's
/// synthetic registers (0x40000000 up to KVM's own at 0x4b564d00) and the VMX capabilities.
fn is_hidden(index: u32, nested: bool) -> bool {
    matches!(index, 0x4000_0000..=0x4000_0fff) || (!nested && matches!(index, 0x480..=0x493))
}

/// When an MSR is written back relative to the others; smaller comes first.
///
/// 0: the TSC, because deadlines and clocks are relative to it. 1: all that does not care.
/// 2: KVM's own registers: enabling one makes KVM write guest memory, and the asynchronous page
/// fault's vector must stand before it is enabled, which the order of indices gives except for
/// the one in 3. 4: the timer's deadline, which fires at once if the TSC is still the old one,
/// and is ignored before the local APIC's timer mode is there.
fn restore_order(index: u32) -> u8 {
    const KVM_ASYNC_PF_EN: u32 = 0x4b56_4d02;
    match index {
        IA32_TSC => 0,
        IA32_TSC_DEADLINE => 4,
        KVM_ASYNC_PF_EN => 3,
        0x11 | 0x12 | 0x4b56_4d00..=0x4b56_4dff => 2,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deadline_is_restored_last_and_the_tsc_first() {
        let saved = to_save(
            &[IA32_TSC_DEADLINE, 0x4b56_4d02, 0x4b56_4d06, 0x174, 0x4b56_4d01, IA32_TSC, IA32_MISC_ENABLE],
            false,
        );
        assert_eq!(saved.first(), Some(&IA32_TSC));
        assert_eq!(saved.last(), Some(&IA32_TSC_DEADLINE));
        let at = |index| saved.iter().position(|&i| i == index).unwrap();
        assert!(at(0x174) < at(0x4b56_4d01));
        assert!(at(0x4b56_4d06) < at(0x4b56_4d02));
    }

    #[test]
    fn each_register_is_saved_once_and_hidden_ones_never() {
        let saved = to_save(&[0x2ff, 0x2ff, 0x4000_0020, 0x480, 0x277], false);
        assert_eq!(saved.iter().filter(|&&i| i == 0x2ff).count(), 1);
        assert!(!saved.contains(&0x4000_0020) && !saved.contains(&0x480));
        assert!(saved.contains(&0x277));
        assert!(to_save(&[0x480], true).contains(&0x480));
    }

    #[test]
    fn long_lists_are_cut_at_the_limit_of_kvm() {
        let entries = vec![entry(0x10, 1); 600];
        let lists = lists(&entries);
        let lens: Vec<usize> = lists.iter().map(|l| l.as_slice().len()).collect();
        assert_eq!(lens, [256, 256, 88]);
    }
}
