//! Made-up hosts: what each lacks is named, and what all have is shown everywhere alike.

use super::*;
use crate::x86_64::{cpuid::CpuConfig, msr, template::Bits, template::LeafChange};
use kvm_bindings::CpuId;

const INTEL: [u32; 3] = [0x756e_6547, 0x6c65_746e, 0x4965_6e69];
const AMD: [u32; 3] = [0x6874_7541, 0x444d_4163, 0x6974_6e65];

fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    let flags = u32::from(matches!(function, 4 | 7 | 0xb | 0xd | 0x1d | 0x1f | 0x8000_001d));
    kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
}

/// A table as KVM gives it, of a processor that has everything.
fn full(maker: [u32; 3]) -> Vec<kvm_cpuid_entry2> {
    let amd = maker == AMD;
    let mut table = vec![
        entry(0, 0, [0x1f, maker[0], maker[1], maker[2]]),
        entry(1, 0, [0x000c_06f2, 0x0010_0800, 0xfffa_3223, 0x178b_fbff]),
        entry(2, 0, [0x00fe_ff01, 0xf0, 0, 0]),
        entry(6, 0, [4, 0, 0, 0]),
        entry(7, 0, [2, 0xf1bf_27eb, 0x1b41_5f6e, 0xbc81_4410]),
        entry(7, 1, [0x1c30, 0, 0, 0x4000]),
        entry(7, 2, [0, 0, 0, 0x3f]),
        entry(0xa, 0, [0x0730_0805, 0, 0, 0x8603]),
        entry(0xd, 0, [0x602e7, 0x2b00, 0x2b00, 0]),
        entry(0xd, 1, [0x1f, 0x2a00, 0x1800, 0]),
        entry(0xd, 2, [0x100, 0x240, 0, 0]),
        entry(0xd, 5, [0x40, 0x440, 0, 0]),
        entry(0xd, 6, [0x200, 0x480, 0, 0]),
        entry(0xd, 7, [0x400, 0x680, 0, 0]),
        entry(0xd, 9, [8, 0xa80, 0, 0]),
        entry(0xd, 11, [0x10, 0, 1, 0]),
        entry(0xd, 12, [0x18, 0, 1, 0]),
        entry(0xd, 17, [0x40, 0xac0, 2, 0]),
        entry(0xd, 18, [0x2000, 0xb00, 6, 0]),
        entry(0x1d, 0, [1, 0, 0, 0]),
        entry(0x1d, 1, [0x0400_2000, 0x0008_0040, 0x10, 0]),
        entry(0x1e, 0, [0, 0x4010, 0, 0]),
        entry(0x4000_0000, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
        entry(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
        entry(0x8000_0000, 0, [0x8000_0022, 0, 0, 0]),
        entry(0x8000_0001, 0, [0, 0, 0x121, 0x2c10_0800]),
        entry(0x8000_0002, 0, [0x6465_614e, 0x6e6f, 0, 0]),
        entry(0x8000_0007, 0, [0, 0, 0, 0x100]),
        entry(0x8000_0008, 0, [0x3934, 0x200, 0, 0]),
    ];
    if amd {
        table.extend([
            entry(0x8000_001d, 0, [0x121, 0x1c0_003f, 0x3f, 0]),
            entry(0x8000_001d, 1, [0x143, 0x1c0_003f, 0x7ff, 2]),
            entry(0x8000_0021, 0, [0x0001_0046, 0x30, 6, 0]),
        ]);
    } else {
        table.extend([
            entry(4, 0, [0x121, 0x2c0_003f, 0x3f, 0]),
            entry(4, 1, [0x163, 0x380_003f, 0x1ffff, 4]),
        ]);
    }
    table
}

fn host(table: &[kvm_cpuid_entry2]) -> Host {
    Host::from_table(table).with_msr(ARCH_CAPABILITIES, 0x0d08_e1eb)
}

fn change(table: &mut [kvm_cpuid_entry2], leaf: u32, subleaf: u32, with: impl Fn(&mut kvm_cpuid_entry2)) {
    with(table.iter_mut().find(|e| (e.function, e.index) == (leaf, subleaf)).unwrap());
}

/// What a machine with `template` is shown on `host`.
fn guest_table(host: &Host, template: &Template, vcpus: u8) -> Cpuid {
    let table = host.entries();
    let config = CpuConfig { vcpus, smt: false, tsc_khz: Some(2_500_000), pmu: false, nested: false };
    let mut cpuid = Cpuid::normalise_with(&table, &config, &|_, _| [0; 4]).unwrap();
    template.change_cpuid(&mut cpuid, &CpuId::from_entries(&table).unwrap()).unwrap();
    cpuid
}

/// What a machine made on `host` with `template` needs.
fn needs(host: &Host, template: &Template) -> Needs {
    let table = guest_table(host, template, 2);
    let mut needs = Needs::from_table(table.for_vcpu(1).unwrap().as_slice());
    let mut values = host.msr(ARCH_CAPABILITIES).map(|v| [(ARCH_CAPABILITIES, v)].into()).unwrap_or_default();
    if tells_capabilities(table.entries()) {
        template.change_values(&mut values).unwrap();
        needs.msrs.extend(values.into_iter().map(|(index, value)| MsrValue { index, value }));
    }
    needs
}

fn missing(needs: &Needs, host: &Host) -> Vec<String> {
    needs.missing(host).unwrap().iter().map(ToString::to_string).collect()
}

#[test]
fn a_machine_can_always_be_restored_where_it_ran() {
    for maker in [INTEL, AMD] {
        let host = host(&full(maker));
        let needs = needs(&host, &Template::default());
        assert_eq!(missing(&needs, &host), [""; 0]);
        let text = serde_json::to_string(&needs).unwrap();
        assert_eq!(serde_json::from_str::<Needs>(&text).unwrap(), needs);
        assert_eq!(needs.vendor(), if maker == AMD { "AuthenticAMD" } else { "GenuineIntel" });
        assert_eq!(needs.model(), "Naedon");
    }
}

#[test]
fn what_a_host_lacks_is_named_and_what_it_has_more_is_not() {
    let new = host(&full(INTEL));
    let mut old = full(INTEL);
    change(&mut old, 7, 0, |e| {
        e.ebx &= !(1 << 16 | 1 << 17);
        e.ecx &= !(1 << 3);
    });
    change(&mut old, 7, 1, |e| e.eax &= !(1 << 5));
    change(&mut old, 0x8000_0008, 0, |e| e.eax = 0x302e);
    change(&mut old, 0x4000_0001, 0, |e| e.eax &= !(1 << 5));
    let old = Host::from_table(&old).with_msr(ARCH_CAPABILITIES, 0x0d08_e1cb & !(1 << 5) | 1 << 2);
    let names = missing(&needs(&new, &Template::default()), &old);
    assert_eq!(
        names,
        [
            "avx512f",
            "avx512dq",
            "pku",
            "avx512_bf16",
            "kvm_steal_time",
            "52 physical address bits (there are 46)",
            "57 linear address bits (there are 48)",
            "mds_no",
            "a processor without rsba",
        ]
    );
    assert_eq!(missing(&needs(&old, &Template::default()), &new), ["a processor without rsba"; 0]);
}

#[test]
fn bits_without_names_makers_layouts_registers_and_clocks_are_told_apart() {
    let mut strange = full(INTEL);
    change(&mut strange, 7, 1, |e| e.eax |= 1 << 9);
    strange.push(entry(0x21, 3, [0, 4, 0, 0]));
    let (strange, plain) = (host(&strange), host(&full(INTEL)));
    let of = |host: &Host| needs(host, &Template::default());
    assert_eq!(missing(&of(&strange), &plain), ["cpuid:0x7:0x1:eax:9", "cpuid:0x21:0x3:ebx:2"]);
    assert_eq!(
        missing(&of(&plain), &host(&full(AMD))),
        ["processors of GenuineIntel (these are of AuthenticAMD)"]
    );
    let mut moved = full(INTEL);
    change(&mut moved, 0xd, 9, |e| e.ebx = 0x340);
    change(&mut moved, 1, 0, |e| e.ebx = 0x0010_1000);
    assert_eq!(
        missing(&of(&plain), &host(&moved)),
        ["the same CLFLUSH line size in 8 bytes", "the same layout of xstate_pkru"]
    );
    let mut uses = of(&plain);
    uses.registers = vec![0x174, msr::IA32_MTRR_DEF_TYPE];
    assert_eq!(missing(&uses, &plain), ["MSR 0x174"]);
    let mut clocked = of(&plain);
    clocked.tsc_khz = Some(2_900_000);
    let at = |khz, scaling| missing(&clocked, &plain.clone().with_clock(khz, scaling));
    assert_eq!(at(2_400_000, false), ["a TSC of 2900000 kHz (it runs at 2400000 kHz and cannot be scaled)"]);
    assert_eq!((at(2_400_000, true), at(2_900_500, false)), (vec![], vec![]));
}

#[test]
fn what_kvm_and_the_topology_change_at_run_time_is_no_need() {
    let host = host(&full(INTEL));
    let table = guest_table(&host, &Template::default(), 8);
    let mut entries = table.for_vcpu(7).unwrap().as_slice().to_vec();
    change(&mut entries, 1, 0, |e| e.ecx |= 1 << 27);
    change(&mut entries, 7, 0, |e| e.ecx |= 1 << 4);
    change(&mut entries, 0xd, 0, |e| e.ebx = 0x240);
    assert_eq!(missing(&Needs::from_table(&entries), &host), [""; 0]);
}

#[test]
fn what_a_template_sets_beyond_the_host_is_vouched_for_and_the_rest_is_not() {
    let mut small = full(INTEL);
    change(&mut small, 7, 0, |e| e.ebx &= !(1 << 16));
    let small = host(&small);
    // One bit that the host has, one that it has not.
    let registers = vec![(Register::Ebx, Bits { mask: 3 << 16, value: 3 << 16 })];
    let template = Template {
        leaves: vec![LeafChange { leaf: 7, subleaf: 0, flags: 1, registers }],
        ..Default::default()
    };
    let all = needs(&small, &template);
    assert_eq!(missing(&all, &small), ["avx512f"]);
    let real = all.without_forced(&template, Some(&small));
    assert_eq!(missing(&real, &small), [""; 0]);
    let mut smaller = full(INTEL);
    change(&mut smaller, 7, 0, |e| e.ebx &= !(3 << 16));
    assert_eq!(missing(&real, &host(&smaller)), ["avx512dq"]);
}

#[test]
fn many_missing_features_are_counted() {
    let mut bare = full(INTEL);
    change(&mut bare, 7, 0, |e| e.ebx = 0);
    let found = needs(&host(&full(INTEL)), &Template::default()).missing(&host(&bare)).unwrap();
    let text = NeedsError::Lacking(found).to_string();
    assert!(text.starts_with("This host's processors lack what the machine relies on: fsgsbase, "), "{text}");
    assert!(text.ends_with(" more"), "{text}");
}

/// A generator of numbers that is the same on every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A processor that lacks some of what the full one has.
    fn host(&mut self, maker: [u32; 3]) -> Host {
        let mut table = full(maker);
        table.retain(|e| {
            matches!(e.function, 0 | 1 | 0x8000_0000 | 0x8000_0001 | 0x8000_0008)
                || !self.roll().is_multiple_of(12)
        });
        for e in &mut table {
            let few = |dice: &mut Dice| (dice.roll() & dice.roll() & dice.roll()) as u32;
            match e.function {
                0 | 0x8000_0000 | 0x4000_0000 => e.eax -= (self.roll() % 3) as u32,
                0xd if e.index >= 2 => {
                    if self.roll().is_multiple_of(20) {
                        e.ebx = e.ebx.wrapping_add(0x40);
                    }
                }
                0x8000_0008 => e.eax = 0x3024 + (self.roll() % 16) as u32,
                // A cache with a size of its own; one without a type ends the list.
                4 | 0x8000_001d => e.ecx += (self.roll() % 3) as u32,
                _ => {
                    for register in [&mut e.eax, &mut e.ebx, &mut e.ecx, &mut e.edx] {
                        *register &= !few(self);
                    }
                }
            }
        }
        Host::from_table(&table).with_msr(ARCH_CAPABILITIES, self.roll() & 0x1fff_ffff)
    }
}

/// All rows of both, without what is the host's own.
fn assert_alike(one: &Cpuid, other: &Cpuid) {
    let rows = one.entries().iter().chain(other.entries());
    for (leaf, subleaf) in rows.map(|e| (e.function, e.index)).collect::<BTreeSet<_>>() {
        for register in REGISTERS.into_iter().filter(|_| !matches!(leaf, 0x4000_0000 | 0x4000_0010)) {
            let (a, b) = (read(one, leaf, subleaf, register), read(other, leaf, subleaf, register));
            assert_eq!(a, b, "{leaf:#x} {subleaf:#x} {register:?}: {a:#x} {b:#x}");
        }
    }
}

#[test]
fn with_a_baseline_guests_see_the_same_and_can_go_everywhere() {
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    for round in 0..300 {
        let maker = if round % 2 == 0 { INTEL } else { AMD };
        let hosts: Vec<Host> = (0..2 + round % 4).map(|_| dice.host(maker)).collect();
        let made = baseline(&hosts).unwrap();
        let vcpus = [1, 3, 8][round % 3];
        for one in &hosts {
            let seen = guest_table(one, &made.template, vcpus);
            for other in &hosts {
                assert_alike(&seen, &guest_table(other, &made.template, vcpus));
                assert_eq!(missing(&needs(one, &made.template), other), [""; 0], "round {round}");
            }
            // Nothing is promised that the host does not have.
            let own = needs(one, &made.template);
            assert_eq!(
                missing(
                    &own,
                    &Host::from_table(&one.entries()).with_msr(ARCH_CAPABILITIES, !CAPABILITY_FLAWS)
                ),
                [""; 0]
            );
        }
    }
}

#[test]
fn hosts_that_are_alike_need_no_template() {
    let made = baseline(&[host(&full(AMD)), host(&full(AMD))]).unwrap();
    assert_eq!((made.template, made.losses), (Template::default(), vec![vec![], vec![]]));
    assert!(made.clocks_agree);
    let clocks = [2_000_000, 3_000_000].map(|khz| host(&full(AMD)).with_clock(khz, false));
    assert!(!baseline(&clocks).unwrap().clocks_agree);
    assert!(matches!(baseline(&[]), Err(BaselineError::None)));
    let makers = baseline(&[host(&full(INTEL)), host(&full(AMD))]).unwrap_err().to_string();
    assert!(makers.contains("GenuineIntel and of AuthenticAMD"), "{makers}");
}

#[test]
fn a_baseline_says_what_each_host_gives_up() {
    let mut old = full(INTEL);
    change(&mut old, 7, 0, |e| e.ebx &= !(1 << 16));
    change(&mut old, 0x8000_0008, 0, |e| e.eax = 0x392e);
    change(&mut old, 1, 0, |e| e.eax = 0x0005_0654);
    let old = Host::from_table(&old).with_msr(ARCH_CAPABILITIES, 0x0d08_e1eb | 1 << 2);
    let made = baseline(&[host(&full(INTEL)), old]).unwrap();
    let lost = [
        Loss::Feature("avx512f".into()),
        Loss::Amount { what: "physical address bits", from: 52, to: 46 },
        Loss::Flaw("rsba".into()),
    ];
    assert_eq!(made.losses, [lost.to_vec(), vec![]]);
    // The guest sees the older one.
    let seen = guest_table(&host(&full(INTEL)), &made.template, 1);
    assert_eq!(read(&seen, 1, 0, Register::Eax), 0x0005_0654);
}

#[test]
fn a_component_that_lies_elsewhere_is_given_up_with_all_that_uses_it() {
    let mut moved = full(INTEL);
    change(&mut moved, 0xd, 6, |e| e.ebx += 0x40);
    let made = baseline(&[host(&full(INTEL)), host(&moved)]).unwrap();
    let seen = guest_table(&host(&moved), &made.template, 1);
    let leaf = |leaf, subleaf, register| read(&seen, leaf, subleaf, register);
    assert_eq!(leaf(0xd, 0, Register::Eax), 0x6_0207, "x87, SSE, AVX, protection keys and tiles");
    assert_eq!((leaf(0xd, 0, Register::Ecx), leaf(0xd, 1, Register::Ebx)), (0x2b00, 0x23c0));
    assert_eq!(leaf(7, 0, Register::Ebx) >> 16 & 3, 0, "avx512f, avx512dq");
    assert_eq!(leaf(7, 0, Register::Ebx) >> 5 & 1, 1, "avx2");
    assert_eq!(leaf(0xd, 6, Register::Ebx), 0);
}

#[test]
fn hostile_records_are_refused_in_words() {
    let good = serde_json::to_value(host(&full(INTEL))).unwrap();
    assert!(serde_json::from_value::<Host>(good.clone()).is_ok());
    let why = |with: &dyn Fn(&mut serde_json::Value)| {
        let mut bad = good.clone();
        with(&mut bad);
        serde_json::from_value::<Host>(bad).unwrap_err().to_string()
    };
    assert_eq!(why(&|v| v["format"] = 2.into()), "It has format 2; this program reads format 1");
    assert!(why(&|v| v["vendor"] = "GenuineAMD".into()).contains("but its CPUID says"));
    assert!(why(&|v| v["model"] = "a\u{1b}[2J".into()).contains("printable"));
    assert!(why(&|v| v["model"] = "a".repeat(65).into()).contains("printable"));
    let row = good["cpuid"][0].clone();
    assert!(
        why(&|v| v["cpuid"].as_array_mut().unwrap().push(row.clone()))
            .contains("leaf 0x0, subleaf 0x0, twice")
    );
    assert!(why(&|v| v["cpuid"].as_array_mut().unwrap().clear()).contains("lacks CPUID leaf 0x0"));
    assert!(why(&|v| v["cpuid"] = vec![row.clone(); 257].into()).contains("257 rows of CPUID"));
    assert!(why(&|v| v["registers"] = vec!["0x10"; 2].into()).contains("MSR 0x10 twice"));
    for number in ["12", "0x", "0x1ffffffff", "0x+1", "0xg", "-0x1"] {
        assert!(why(&|v| v["cpuid"][0]["eax"] = number.into()).contains("begins with 0x"), "{number}");
    }
    assert!(why(&|v| v["tsc_khz"] = (-1).into()).contains("invalid value"));
}

#[test]
fn no_change_of_a_record_makes_it_panic() {
    let text = serde_json::to_string(&needs(&host(&full(AMD)), &Template::default())).unwrap();
    let hosts = [host(&full(AMD)), host(&full(AMD))];
    let mut dice = Dice(7);
    for _ in 0..3000 {
        let mut bytes = text.clone().into_bytes();
        for _ in 0..1 + dice.roll() % 3 {
            let at = dice.roll() as usize % bytes.len();
            bytes[at] = b"0123456789abcdefx\",:{}[]"[dice.roll() as usize % 24];
        }
        if let Ok(needs) = serde_json::from_slice::<Needs>(&bytes) {
            let _ = needs.missing(&hosts[0]);
        }
    }
    // Rows of any value, as hosts.
    for _ in 0..300 {
        let mut table = full(AMD);
        for e in &mut table {
            let mut any = || (dice.roll() >> 16) as u32;
            if e.function != 0 {
                (e.eax, e.ebx, e.ecx, e.edx) = (any(), any(), any(), any());
            }
        }
        let strange = Host::from_table(&table);
        let made = baseline(&[strange.clone(), hosts[1].clone()]).unwrap();
        guest_table(&hosts[1], &made.template, 4);
        let _ = needs(&hosts[0], &Template::default()).missing(&strange);
    }
}
