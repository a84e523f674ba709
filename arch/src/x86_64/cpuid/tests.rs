use super::*;

const INTEL: [u32; 3] = [u32::from_le_bytes(*b"Genu"), 0x6c65_746e, 0x4965_6e69];
const AMD: [u32; 3] = [u32::from_le_bytes(*b"Auth"), 0x444d_4163, 0x6974_6e65];

fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
}

/// A table as KVM gives it, with a host's topology in it.
fn kvm_table(vendor: [u32; 3]) -> Vec<kvm_cpuid_entry2> {
    vec![
        entry(0, 0, [0x20, vendor[0], vendor[2], vendor[1]]),
        entry(1, 0, [0x806f8, 0x1340_0800, !LEAF1_ECX_HYPERVISOR, u32::MAX]),
        // L1 data, L1 code, L2, L3, end; as of 32 threads on the host.
        entry(4, 0, [0xfc00_4121, 1, 2, 3]),
        entry(4, 1, [0xfc00_4122, 1, 2, 3]),
        entry(4, 2, [0xfc00_4143, 1, 2, 3]),
        entry(4, 3, [0xfc1f_c163, 1, 2, 3]),
        entry(4, 4, [0, 0, 0, 0]),
        entry(5, 0, [64, 64, 3, 0x20]),
        entry(7, 0, [2, u32::MAX, u32::MAX, u32::MAX]),
        entry(0xa, 0, [0x0730_0805, 0, 7, 0x8603]),
        entry(0xb, 0, [1, 2, 0x100, 77]),
        entry(0xd, 0, [0xe7, 0, 0, 0]),
        entry(0x1f, 0, [1, 2, 0x100, 77]),
        entry(KVM_SIGNATURE, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
        entry(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
        entry(0x8000_0000, 0, [0x8000_0021, 0, 0, 0]),
        entry(0x8000_0001, 0, [0, 0, u32::MAX, u32::MAX]),
        entry(0x8000_0002, 0, [0x2044_4d41, 0x4359_5045, 0, 0]),
        entry(0x8000_0008, 0, [0x3030, 0, 0x703f, 0]),
        entry(0x8000_000a, 0, [1, 0x8000, 0, 0xff]),
        entry(0x8000_001e, 0, [9, 9, 9, 9]),
        entry(0x8000_001f, 0, [9, 9, 9, 9]),
    ]
}

fn host(leaf: u32, subleaf: u32) -> [u32; 4] {
    assert_eq!(leaf, 0x8000_001d, "the host is asked for cache leaves only");
    match subleaf {
        0 => [0x3c121, 1, 63, 0],
        1 => [0x3c122, 1, 63, 0],
        2 => [0x3c143, 1, 1023, 2],
        3 => [0x3c163, 1, 16383, 1],
        _ => [0; 4],
    }
}

fn config(vcpus: u8, smt: bool) -> CpuConfig {
    CpuConfig { vcpus, smt, tsc_khz: Some(2_900_000), pmu: false, nested: false }
}

fn table(vendor: [u32; 3], config: &CpuConfig) -> Cpuid {
    Cpuid::normalise_with(&kvm_table(vendor), config, &host).unwrap()
}

/// What the guest reads: zero where the table has nothing.
fn find(table: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32) -> kvm_cpuid_entry2 {
    table.iter().find(|e| e.function == leaf && e.index == subleaf).copied().unwrap_or_default()
}

/// Every size, both vendors, with and without SMT, read back as an operating system would.
#[test]
fn the_topology_reads_back_at_every_size() {
    for vendor in [INTEL, AMD] {
        for vcpus in 1..=MAX_VCPUS {
            for smt in [false, true] {
                if smt && vcpus > 1 && vcpus % 2 == 1 {
                    continue;
                }
                check_topology(vendor, vcpus, smt);
            }
        }
    }
}

fn check_topology(vendor: [u32; 3], vcpus: u8, smt: bool) {
    let machine = table(vendor, &config(vcpus, smt));
    let threads = if smt && vcpus > 1 { 2u32 } else { 1 };
    let mut ids = Vec::new();
    let mut cores = Vec::new();
    for index in 0..vcpus {
        let t = machine.for_vcpu(index).unwrap();
        let t = t.as_slice();
        let one = find(t, 1, 0);
        let (smt_level, core_level) = (find(t, 0xb, 0), find(t, 0xb, 1));
        let id = smt_level.edx;
        assert_eq!(one.ebx >> 24, id);
        assert_eq!(one.ebx >> 16 & 0xff, u32::from(vcpus));
        assert_eq!(one.edx & LEAF1_EDX_HTT != 0, vcpus > 1);
        assert_eq!(smt_level.ebx, threads);
        assert_eq!(1 << smt_level.eax, threads);
        assert_eq!(core_level.ebx, u32::from(vcpus));
        assert_eq!(id >> core_level.eax, 0, "one package");
        assert_eq!((smt_level.ecx, core_level.ecx), (0x100, 0x201));
        assert_eq!(find(t, 0xb, 2).ecx, 2, "the list of levels ends");
        let caches = if vendor == INTEL { 4 } else { 0x8000_001d };
        for (subleaf, level) in [(0, 1), (1, 1), (2, 2), (3, 3)] {
            let cache = find(t, caches, subleaf);
            let shared = (cache.eax >> 14 & 0xfff) + 1;
            let expected = if level < 3 { threads } else { u32::from(vcpus).next_power_of_two() };
            assert_eq!(cache.eax >> 5 & 7, level);
            assert_eq!(shared, expected, "{vcpus} {smt} L{level}");
        }
        if vendor == INTEL {
            assert_eq!((find(t, 4, 0).eax >> 26) + 1, u32::from(vcpus) / threads);
            assert_eq!(find(t, 0x1f, 1).ebx, u32::from(vcpus));
            cores.push(id >> smt_level.eax);
        } else {
            let (size, ext) = (find(t, 0x8000_0008, 0), find(t, 0x8000_001e, 0));
            assert_eq!((size.ecx & 0xff) + 1, u32::from(vcpus));
            assert!(1 << (size.ecx >> 12 & 0xf) >= u32::from(vcpus));
            assert_eq!(ext.eax, id);
            assert_eq!((ext.ebx >> 8 & 0xff) + 1, threads);
            cores.push(ext.ebx & 0xff);
        }
        ids.push(id);
    }
    ids.dedup();
    assert_eq!(ids.len(), usize::from(vcpus), "ids are unique");
    cores.dedup();
    assert_eq!(cores.len() as u32 * threads, u32::from(vcpus));
}

#[test]
fn impossible_topologies_are_refused_in_words() {
    let make = |vcpus, smt| Cpuid::normalise_with(&kvm_table(AMD), &config(vcpus, smt), &host);
    assert_eq!(make(0, false).unwrap_err(), CpuidError::Vcpus(0));
    assert_eq!(make(65, false).unwrap_err(), CpuidError::Vcpus(65));
    assert_eq!(make(3, true).unwrap_err(), CpuidError::OddThreads(3));
    assert!(make(1, true).is_ok());
    let four = make(4, true).unwrap();
    assert!(matches!(four.for_vcpu(4), Err(CpuidError::NoSuchVcpu { index: 4, vcpus: 4 })));
    assert_eq!(Cpuid::normalise_with(&[], &config(1, false), &host).unwrap_err(), CpuidError::NoLeaf(0));
    let long = vec![kvm_table(INTEL); 20].concat();
    assert!(matches!(Cpuid::normalise_with(&long, &config(1, false), &host), Err(CpuidError::TooLong(_))));
}

#[test]
fn what_a_guest_must_not_see_is_gone_and_what_it_needs_is_there() {
    for vendor in [INTEL, AMD] {
        let t = table(vendor, &config(2, false));
        let one = t.entry(1, 0).unwrap();
        let hidden = LEAF1_ECX_MONITOR | LEAF1_ECX_VMX | LEAF1_ECX_PDCM | LEAF1_ECX_DEBUG_STORE;
        assert_eq!((one.ecx & hidden, one.edx & LEAF1_EDX_DEBUG_STORE), (0, 0));
        let needed = LEAF1_ECX_X2APIC | LEAF1_ECX_TSC_DEADLINE | LEAF1_ECX_HYPERVISOR;
        assert_eq!(one.ecx & needed, needed);
        assert_eq!(t.entry(0x8000_0001, 0).unwrap().ecx & AMD1_ECX_SVM, 0);
        for gone in [5, 0xa, 0x12, 0x8000_000a, 0x8000_001f] {
            assert!(t.entry(gone, 0).is_none(), "{gone:#x}");
        }
        let seven = t.entry(7, 0).unwrap();
        assert_eq!(seven.edx & LEAF7_EDX_AMX, 0, "no tile state in leaf 0xd");
        assert_eq!(seven.ebx & LEAF7_EBX_SGX, 0);
        assert_eq!(t.vendor() == Vendor::Amd, vendor == AMD);
        assert_eq!(t.physical_bits(), 48);
    }
    let open = CpuConfig { pmu: true, nested: true, ..config(2, false) };
    let t = table(INTEL, &open);
    assert!(t.entry(0xa, 0).is_some());
    assert_ne!(t.entry(1, 0).unwrap().ecx & LEAF1_ECX_VMX, 0);
}

#[test]
fn the_tsc_frequency_is_told_behind_the_signature_of_kvm() {
    let t = table(AMD, &config(1, false));
    assert_eq!(t.entry(KVM_SIGNATURE, 0).unwrap().eax, TIMING);
    assert_eq!(t.entry(TIMING, 0).unwrap().eax, 2_900_000);
    assert_eq!(t.entry(0x4000_0001, 0).unwrap().eax, 0x0100_7efb);
    let silent = CpuConfig { tsc_khz: None, ..config(1, false) };
    assert!(table(AMD, &silent).entry(TIMING, 0).is_none());
}

#[test]
fn a_missing_brand_is_filled_in_and_a_given_one_kept() {
    assert_eq!(table(AMD, &config(1, false)).entry(0x8000_0002, 0).unwrap().eax, 0x2044_4d41);
    let mut without = kvm_table(INTEL);
    without.retain(|e| e.function != 0x8000_0002);
    let t = Cpuid::normalise_with(&without, &config(1, false), &host).unwrap();
    let text: Vec<u8> = (0x8000_0002..=0x8000_0004)
        .flat_map(|leaf| {
            let e = find(t.entries(), leaf, 0);
            [e.eax, e.ebx, e.ecx, e.edx].map(u32::to_le_bytes).concat()
        })
        .collect();
    assert!(text.starts_with(b"Intel(R) Xeon(R) Processor\0"));
}

#[test]
fn tiles_stay_when_their_state_is_granted() {
    let mut granted = kvm_table(INTEL);
    for e in &mut granted {
        if e.function == 0xd {
            e.eax |= XCR0_TILE;
        }
    }
    let t = Cpuid::normalise_with(&granted, &config(1, false), &host).unwrap();
    assert_eq!(t.entry(7, 0).unwrap().edx & LEAF7_EDX_AMX, LEAF7_EDX_AMX);
}
