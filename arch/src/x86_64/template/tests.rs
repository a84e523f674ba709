use super::*;
use crate::x86_64::cpuid::CpuConfig;

fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
}

fn offered() -> CpuId {
    CpuId::from_entries(&[
        entry(0, 0, [0x1f, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        entry(1, 0, [SIGNATURE, 0x10_0800, u32::MAX, u32::MAX]),
        entry(4, 0, [0x1c00_4121, 0x01c0_003f, 0x3f, 0]),
        entry(5, 0, [0x40, 0x40, 3, 0x20]),
        entry(6, 0, [0; 4]),
        entry(7, 0, [2, u32::MAX, u32::MAX, u32::MAX]),
        entry(0xb, 0, [1, 2, 0x100, 0]),
        entry(0xd, 0, [0x2ff, 0x240, 0x240, 0]),
        entry(0xd, 1, [0xf, 0x240, 0, 0]),
        entry(0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
        entry(0x8000_0001, 0, [0, 0, u32::MAX, u32::MAX]),
        entry(0x8000_0008, 0, [0x3030, u32::MAX, 0, 0]),
    ])
    .unwrap()
}

const SIGNATURE: u32 = 0x0005_0654;

fn normal(vcpus: u8) -> Cpuid {
    let config = CpuConfig { vcpus, smt: false, tsc_khz: None, pmu: false, nested: false };
    Cpuid::normalise(&offered(), &config).unwrap()
}

fn change(leaf: u32, subleaf: u32, register: Register, mask: u32, value: u32) -> LeafChange {
    LeafChange { leaf, subleaf, flags: 0, registers: vec![(register, Bits { mask, value })] }
}

fn template(leaves: Vec<LeafChange>) -> Template {
    Template { leaves, ..Default::default() }
}

#[test]
fn only_the_named_bits_change() {
    let mut cpuid = normal(1);
    let before = *cpuid.entry(7, 0).unwrap();
    template(vec![change(7, 0, Register::Ebx, 0b1100, 0b0100)]).change_cpuid(&mut cpuid, &offered()).unwrap();
    let after = *cpuid.entry(7, 0).unwrap();
    assert_eq!(after.ebx, before.ebx & !0b1100 | 0b0100);
    assert_eq!((after.eax, after.ecx, after.edx), (before.eax, before.ecx, before.edx));
}

#[test]
fn a_template_has_the_last_word_on_what_normalising_sets_and_clears() {
    const X2APIC: u32 = 1 << 21;
    const VMX: u32 = 1 << 5;
    let mut cpuid = normal(1);
    assert_eq!(cpuid.entry(1, 0).unwrap().ecx & (X2APIC | VMX), X2APIC);
    template(vec![change(1, 0, Register::Ecx, X2APIC | VMX, VMX)])
        .change_cpuid(&mut cpuid, &offered())
        .unwrap();
    assert_eq!(cpuid.entry(1, 0).unwrap().ecx & (X2APIC | VMX), VMX);
}

#[test]
fn later_changes_of_a_register_build_on_earlier_ones_and_flags_are_taken_over() {
    let mut cpuid = normal(1);
    let mut first = change(7, 0, Register::Ecx, u32::MAX, 0b0110);
    first.flags = 1;
    first.registers.push((Register::Ecx, Bits { mask: 0b0011, value: 0b0001 }));
    template(vec![first]).change_cpuid(&mut cpuid, &offered()).unwrap();
    let entry = cpuid.entry(7, 0).unwrap();
    assert_eq!((entry.ecx, entry.flags), (0b0101, 1));
}

#[test]
fn a_leaf_that_kvm_does_not_offer_is_named_and_nothing_changes() {
    let mut cpuid = normal(1);
    let before = cpuid.entries().to_vec();
    let wrong =
        template(vec![change(7, 0, Register::Ebx, u32::MAX, 0), change(0x24, 1, Register::Ebx, 1, 1)]);
    let error = wrong.change_cpuid(&mut cpuid, &offered()).unwrap_err().to_string();
    assert!(error.contains("leaf 0x24, subleaf 0x1"), "{error}");
    assert_eq!(cpuid.entries(), before);
}

#[test]
fn a_leaf_that_normalising_took_away_begins_at_zero() {
    let mut cpuid = normal(1);
    assert!(cpuid.entry(5, 0).is_none() && cpuid.entry(6, 0).is_none());
    let both =
        template(vec![change(5, 0, Register::Eax, 0xff, 0x20), change(6, 0, Register::Eax, u32::MAX, 0)]);
    both.change_cpuid(&mut cpuid, &offered()).unwrap();
    let five = cpuid.entry(5, 0).unwrap();
    assert_eq!([five.eax, five.ebx, five.ecx, five.edx], [0x20, 0, 0, 0]);
    assert!(cpuid.entry(6, 0).is_none(), "what reads as zero takes no entry");
}

#[test]
fn the_dump_of_another_machine_changes_neither_maker_nor_geometry() {
    let dumped = normal(1);
    let all = dumped.entries().iter().map(|e| LeafChange {
        leaf: e.function,
        subleaf: e.index,
        flags: e.flags,
        registers: [
            (Register::Eax, e.eax),
            (Register::Ebx, e.ebx),
            (Register::Ecx, e.ecx),
            (Register::Edx, e.edx),
        ]
        .map(|(register, value)| (register, Bits { mask: u32::MAX, value }))
        .to_vec(),
    });
    let mut all = template(all.collect());
    all.leaves.push(change(0, 0, Register::Ebx, u32::MAX, 0x6874_7541));
    let mut cpuid = normal(4);
    all.change_cpuid(&mut cpuid, &offered()).unwrap();
    let expected = normal(4);
    for vcpu in 0..4 {
        let sorted = |c: &Cpuid| {
            let mut entries = c.for_vcpu(vcpu).unwrap().as_slice().to_vec();
            entries.sort_by_key(|e| (e.function, e.index));
            entries
        };
        assert_eq!(sorted(&cpuid), sorted(&expected));
    }
}

#[test]
fn registers_change_from_the_values_they_have() {
    let template = Template {
        msrs: vec![
            MsrChange { index: 0x10a, bits: Bits { mask: 0xf0, value: 0x50 } },
            MsrChange { index: 0x8b, bits: Bits { mask: u64::MAX, value: 7 } },
            MsrChange { index: 0x10a, bits: Bits { mask: 0x1f, value: 0x01 } },
        ],
        ..Default::default()
    };
    assert_eq!(template.msr_indices(), [0x8b, 0x10a]);
    let mut values = BTreeMap::from([(0x8b, 1), (0x10a, 0xffff)]);
    template.change_values(&mut values).unwrap();
    assert_eq!(values, BTreeMap::from([(0x8b, 7), (0x10a, 0xff41)]));
    values.remove(&0x8b);
    let error = template.change_values(&mut values).unwrap_err().to_string();
    assert!(error.contains("MSR 0x8b"), "{error}");
}

#[test]
fn capabilities_are_added_and_taken_away_in_order() {
    let needed = |capabilities| Template { capabilities, ..Default::default() }.needed_capabilities(&[0, 32]);
    assert_eq!(needed(vec![]), [0, 32]);
    assert_eq!(needed(vec![(171, true), (171, true), (32, true)]), [0, 171, 32]);
    assert_eq!(needed(vec![(171, true), (0, false), (171, false), (9, false)]), [32]);
}

#[test]
fn a_template_with_a_name_is_for_its_processors_only() {
    use Named::{C3, T2, T2A, T2CL, T2S};
    let fits = |name: Named, vendor, signature| name.template_for(vendor, signature).is_ok();
    let (intel, amd) = ("GenuineIntel", "AuthenticAMD");
    for (signature, expected) in
        [(0x50654, [true, true, true, false]), (0x50657, [true; 4]), (0x606a6, [true, true, false, true])]
    {
        assert_eq!([C3, T2, T2S, T2CL].map(|name| fits(name, intel, signature)), expected);
        assert_eq!([C3, T2, T2S, T2CL].map(|name| fits(name, amd, signature)), [false; 4]);
    }
    assert!(fits(T2A, amd, 0x00a0_0f11) && !fits(T2A, amd, 0x00a0_0f10) && !fits(T2A, intel, 0x00a0_0f11));
    // The processor type says nothing of the model.
    assert!(fits(T2, intel, 0x50654 | 1 << 12));
    let error = T2A.template_for(intel, 0x50654).unwrap_err().to_string();
    assert!(error.contains("\"AuthenticAMD\"") && error.contains("\"GenuineIntel\""), "{error}");
}

#[test]
fn the_t2_kind_shows_a_haswell_and_hides_avx_512() {
    for name in [Named::T2, Named::T2S] {
        let template = name.template_for("GenuineIntel", SIGNATURE).unwrap();
        let mut cpuid = normal(2);
        template.change_cpuid(&mut cpuid, &offered()).unwrap();
        assert_eq!(cpuid.entry(1, 0).unwrap().eax, 0x306f2);
        let ebx = cpuid.entry(7, 0).unwrap().ebx;
        assert_eq!(ebx & (1 << 16 | 1 << 17 | 1 << 30 | 1 << 31), 0, "AVX-512");
        assert_ne!(ebx & 1 << 5, 0, "AVX2");
        assert_eq!(cpuid.entry(0xd, 0).unwrap().eax, 7);
        assert_eq!(cpuid.entry(0xd, 1).unwrap().eax, 1);
        assert_eq!(template.msr_indices().as_slice(), if name == Named::T2S { &[0x10a][..] } else { &[] });
    }
}

/// Two vCPUs, or `None` where there is no KVM.
fn vcpus() -> Option<(kvm_ioctls::VmFd, Vec<VcpuFd>)> {
    let vm = kvm_ioctls::Kvm::new().ok()?.create_vm().unwrap();
    let fds = (0..2).map(|index| vm.create_vcpu(index).unwrap()).collect();
    Some((vm, fds))
}

#[test]
fn every_vcpu_of_kvm_gets_the_registers() {
    /// The page attribute table: eight types, of which 2 and 3 do not exist.
    const PAT: u32 = 0x277;
    let Some((_vm, fds)) = vcpus() else { return };
    let values = || {
        let read = |fd: &VcpuFd| {
            let mut list = msr::lists(&[msr::entry(PAT, 0)]).remove(0);
            assert_eq!(fd.get_msrs(&mut list).unwrap(), 1);
            list.as_slice()[0].data
        };
        fds.iter().map(read).collect::<Vec<_>>()
    };
    let with = |index, mask, value| Template {
        msrs: vec![MsrChange { index, bits: Bits { mask, value } }],
        ..Default::default()
    };
    let before = values();
    with(PAT, 0xff, 0x01).change_msrs(&fds).unwrap();
    let changed: Vec<u64> = before.iter().map(|old| old & !0xff | 0x01).collect();
    assert_eq!(values(), changed);
    // An emulated KVM may take anything; one that refuses is heard, and has changed nothing.
    if let Err(refused) = with(PAT, 0xff, 0x02).change_msrs(&fds) {
        let value = changed[0] & !0xff | 0x02;
        assert!(
            matches!(refused, TemplateError::MsrValue { index: PAT, value: v } if v == value),
            "{refused}"
        );
        assert_eq!(values(), changed);
    }
}

#[test]
fn a_register_that_kvm_does_not_have_is_named() {
    const NOBODYS: u32 = 0x00de_ad00;
    let Some((_vm, fds)) = vcpus() else { return };
    let ignored = std::fs::read_to_string("/sys/module/kvm/parameters/ignore_msrs");
    if ignored.is_ok_and(|text| text.starts_with('Y')) {
        return;
    }
    let template = Template {
        msrs: [NOBODYS, msr::IA32_MISC_ENABLE].map(|index| MsrChange { index, bits: Bits::default() }).into(),
        ..Default::default()
    };
    let error = template.change_msrs(&fds).unwrap_err();
    assert!(matches!(error, TemplateError::NoMsr(NOBODYS)), "{error}");
}
