//! What the bits are called.
//!
//! The names are those of Linux's `/proc/cpuinfo` where it shows the bit, else those of its
//! headers, else those of the makers' manuals, in lower case. A bit without a name here is
//! called by its place, `cpuid:0x7:0x1:eax:9`, so that one that is newer than this table can
//! still be looked up.

use crate::x86_64::template::Register::{self, Eax, Ebx, Ecx, Edx};

/// Names of a register's bits from bit 0 up, separated by spaces; `-` for none.
type Row = (u32, u32, Register, &'static str);

const BITS: &[Row] = &[
    (
        1,
        0,
        Edx,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx \
         fxsr sse sse2 ss ht tm ia64 pbe",
    ),
    (
        1,
        0,
        Ecx,
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca \
         sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor",
    ),
    (6, 0, Eax, "dtherm ida arat - pln - pts hwp hwp_notify hwp_act_window hwp_epp hwp_pkg_req"),
    (6, 0, Ecx, "aperfmperf - - epb"),
    (
        7,
        0,
        Ebx,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx \
         rdt_a avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er \
         avx512cd sha_ni avx512bw avx512vl",
    ),
    (
        7,
        0,
        Ecx,
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni \
         avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid key_locker bus_lock_detect cldemote - \
         movdiri movdir64b enqcmd sgx_lc pks",
    ),
    (
        7,
        0,
        Edx,
        "- sgx_keys avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear \
         rtm_always_abort - tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 \
         avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities \
         spec_ctrl_ssbd",
    ),
    (
        7,
        1,
        Eax,
        "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc - - - - \
         fred lkgs wrmsrns nmi_source amx_fp16 hreset avx_ifma - - lam msrlist - - - movrs",
    ),
    (
        7,
        1,
        Edx,
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchiti user_msr - \
         uiret_uif cet_sss avx10",
    ),
    (7, 2, Edx, "psfd_ctrl ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no"),
    (0xd, 0, Eax, XSTATES),
    (0xd, 1, Eax, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    (0xd, 1, Ecx, XSTATES),
    (
        0x4000_0001,
        0,
        Eax,
        "kvm_clocksource kvm_nop_io_delay kvm_mmu_op kvm_clocksource2 kvm_async_pf kvm_steal_time kvm_pv_eoi \
         kvm_pv_unhalt - kvm_pv_tlb_flush kvm_async_pf_vmexit kvm_pv_send_ipi kvm_poll_control \
         kvm_pv_sched_yield kvm_async_pf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control \
         - - - - - - kvm_clocksource_stable",
    ),
    (
        0x8000_0001,
        0,
        Edx,
        "fpu vme de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov pat pse36 - mp nx - mmxext mmx \
         fxsr fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    (
        0x8000_0001,
        0,
        Ecx,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt \
         - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx \
         addr_mask_ext",
    ),
    (0x8000_0007, 0, Ebx, "overflow_recov succor - smca"),
    (0x8000_0007, 0, Edx, "- - - - - - - hw_pstate nonstop_tsc cpb - proc_feedback"),
    (
        0x8000_0008,
        0,
        Ebx,
        "clzero irperf xsaveerptr invlpgb rdpru - mba - - wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp \
         ibrs_always_on amd_stibp_always_on ibrs_preferred ibrs_same_mode no_efer_lmsle invlpgb_nested - \
         amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no amd_ibpb_ret brs",
    ),
    (
        0x8000_000a,
        0,
        Edx,
        "npt lbrv svm_lock nrip_save tsc_scale vmcb_clean flushbyasid decodeassists - - pausefilter - \
         pfthreshold avic - v_vmsave_vmload vgif gmet x2avic - v_spec_ctrl - - - - vnmi - - svme_addr_chk",
    ),
    (
        0x8000_0021,
        0,
        Eax,
        "no_nested_data_bp wrmsr_xx_base_ns lfence_rdtsc smm_pgcfg_lock - verw_clear null_sel_clr_base \
         upper_addr_ignore autoibrs no_smm_ctl_msr amd_fsrs amd_fsrc - prefetch_ctl_msr - - - cpuid_user_dis \
         epsf - prefetchi - - - eraps - - sbpb ibpb_brtype srso_no srso_user_kernel_no srso_bp_spec_reduce",
    ),
    (0x8000_0021, 0, Ecx, "- tsa_sq_no tsa_l1_no"),
    (0x8000_0022, 0, Eax, "perfmon_v2 amd_lbr_v2 amd_lbr_pmc_freeze"),
];

/// Components of the XSAVE area.
const XSTATES: &str = "xstate_x87 xstate_sse xstate_avx xstate_bndregs xstate_bndcsr xstate_opmask \
    xstate_zmm_hi256 xstate_hi16_zmm xstate_pt xstate_pkru xstate_pasid xstate_cet_user xstate_cet_supervisor \
    xstate_hdc xstate_uintr xstate_lbr xstate_hwp xstate_tilecfg xstate_tiledata xstate_apx";

/// Bits of `IA32_ARCH_CAPABILITIES`.
const CAPABILITIES: &str = "rdcl_no ibrs_all rsba skip_l1dfl_vmentry ssb_no mds_no pschange_mc_no tsx_ctrl \
    taa_no mcu_control misc_package_ctls energy_filtering doitm sbdr_ssdp_no fbsdp_no psdp_no \
    mcu_enumeration fb_clear fb_clear_ctrl rrsba bhi_no xapic_disable - overclocking pbrsb_no gds_ctrl \
    gds_no rfds_no rfds_clear";

fn nth(names: &'static str, bit: u32) -> Option<&'static str> {
    names.split_whitespace().nth(bit as usize).filter(|&name| name != "-")
}

/// What a bit of CPUID is called.
pub fn bit(leaf: u32, subleaf: u32, register: Register, bit: u32) -> String {
    let row = BITS.iter().find(|r| (r.0, r.1, r.2) == (leaf, subleaf, register));
    match row.and_then(|row| nth(row.3, bit)) {
        Some(name) => name.to_owned(),
        None => format!("cpuid:{leaf:#x}:{subleaf:#x}:{}:{bit}", self::register(register)),
    }
}

/// What a bit of `IA32_ARCH_CAPABILITIES` is called.
pub fn capability(bit: u32) -> String {
    nth(CAPABILITIES, bit).map_or_else(|| format!("arch_capabilities:{bit}"), str::to_owned)
}

/// What a component of the XSAVE area is called.
pub fn component(number: u32) -> String {
    nth(XSTATES, number).map_or_else(|| format!("xstate_{number}"), str::to_owned)
}

/// Every place of the bit with this name, as leaf, subleaf, register and mask.
pub fn places(name: &str) -> impl Iterator<Item = (u32, u32, Register, u32)> {
    BITS.iter().filter_map(move |&(leaf, subleaf, register, names)| {
        let bit = names.split_whitespace().position(|n| n == name)?;
        Some((leaf, subleaf, register, 1 << bit))
    })
}

fn register(register: Register) -> &'static str {
    match register {
        Eax => "eax",
        Ebx => "ebx",
        Ecx => "ecx",
        Edx => "edx",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_stand_where_the_manuals_have_them() {
        let known = [
            (1, 0, Edx, 0, "fpu"),
            (1, 0, Edx, 31, "pbe"),
            (1, 0, Ecx, 26, "xsave"),
            (1, 0, Ecx, 31, "hypervisor"),
            (7, 0, Ebx, 16, "avx512f"),
            (7, 0, Ebx, 31, "avx512vl"),
            (7, 0, Ecx, 3, "pku"),
            (7, 0, Ecx, 16, "la57"),
            (7, 0, Ecx, 22, "rdpid"),
            (7, 0, Ecx, 31, "pks"),
            (7, 0, Edx, 10, "md_clear"),
            (7, 0, Edx, 20, "ibt"),
            (7, 0, Edx, 31, "spec_ctrl_ssbd"),
            (7, 1, Eax, 4, "avx_vnni"),
            (7, 1, Eax, 21, "amx_fp16"),
            (7, 1, Eax, 26, "lam"),
            (7, 1, Edx, 19, "avx10"),
            (0xd, 0, Eax, 9, "xstate_pkru"),
            (0xd, 0, Eax, 18, "xstate_tiledata"),
            (0x4000_0001, 0, Eax, 14, "kvm_async_pf_int"),
            (0x4000_0001, 0, Eax, 24, "kvm_clocksource_stable"),
            (0x8000_0001, 0, Edx, 20, "nx"),
            (0x8000_0001, 0, Edx, 29, "lm"),
            (0x8000_0001, 0, Ecx, 22, "topoext"),
            (0x8000_0001, 0, Ecx, 29, "mwaitx"),
            (0x8000_0007, 0, Edx, 8, "nonstop_tsc"),
            (0x8000_0008, 0, Ebx, 12, "amd_ibpb"),
            (0x8000_0008, 0, Ebx, 29, "btc_no"),
            (0x8000_000a, 0, Edx, 25, "vnmi"),
            (0x8000_0021, 0, Eax, 8, "autoibrs"),
            (0x8000_0021, 0, Eax, 29, "srso_no"),
        ];
        for (leaf, subleaf, register, at, name) in known {
            assert_eq!(bit(leaf, subleaf, register, at), name);
        }
        assert_eq!((capability(5), capability(19), capability(28)), caps("mds_no", "rrsba", "rfds_clear"));
    }

    fn caps(a: &str, b: &str, c: &str) -> (String, String, String) {
        (a.to_owned(), b.to_owned(), c.to_owned())
    }

    #[test]
    fn a_bit_without_a_name_is_called_by_its_place() {
        assert_eq!(bit(7, 1, Eax, 9), "cpuid:0x7:0x1:eax:9");
        assert_eq!(bit(0x8000_0099, 3, Edx, 31), "cpuid:0x80000099:0x3:edx:31");
        assert_eq!((capability(22), component(40)), ("arch_capabilities:22".into(), "xstate_40".into()));
    }

    #[test]
    fn no_row_names_more_bits_than_a_register_has_or_one_twice() {
        for (leaf, subleaf, _, names) in BITS {
            let mut all: Vec<_> = names.split_whitespace().filter(|&n| n != "-").collect();
            assert!(names.split_whitespace().count() <= 32, "{leaf:#x} {subleaf}");
            all.sort_unstable();
            all.dedup();
            assert_eq!(all.len(), names.split_whitespace().filter(|&n| n != "-").count(), "{leaf:#x}");
        }
    }
}
