use super::*;

fn state() -> VcpuState {
    let regs = kvm_regs { rip: 0x10_0000, rax: 7, ..Default::default() };
    VcpuState {
        mp_state: kvm_mp_state { mp_state: 3 },
        regs,
        sregs: kvm_sregs::default(),
        xcrs: kvm_xcrs { nr_xcrs: 1, ..Default::default() },
        debug: kvm_debugregs::default(),
        lapic: kvm_lapic_state::default(),
        events: kvm_vcpu_events::default(),
        tsc_khz: 2_900_000,
        cpuid: vec![kvm_cpuid_entry2::default(); 30],
        msrs: vec![msr::entry(msr::IA32_TSC, 5), msr::entry(msr::IA32_TSC_DEADLINE, 0)],
        xsave: vec![1; 4096],
        nested: Some(Box::new(KvmNestedStateBuffer::empty())),
    }
}

#[test]
fn bytes_come_back_as_the_same_state() {
    let bytes = state().to_bytes();
    let back = VcpuState::from_bytes(&bytes).unwrap();
    assert_eq!(back.to_bytes(), bytes);
    assert_eq!(back.regs.rip, 0x10_0000);
    assert_eq!(back.cpuid().len(), 30);
    let plain = VcpuState { nested: None, ..state() };
    let back = VcpuState::from_bytes(&plain.to_bytes()).unwrap();
    assert!(back.nested.is_none());
}

#[test]
fn every_truncation_and_every_flipped_length_is_refused_without_a_panic() {
    let bytes = state().to_bytes();
    for len in 0..bytes.len() {
        // Cut exactly before the optional last section, it is a whole state again.
        if let Ok(state) = VcpuState::from_bytes(&bytes[..len]) {
            assert!(state.nested.is_none());
        }
    }
    for at in 0..bytes.len().min(4096) {
        for flip in [0x01, 0x80, 0xff] {
            let mut hostile = bytes.clone();
            hostile[at] ^= flip;
            let _ = VcpuState::from_bytes(&hostile);
        }
    }
}

#[test]
fn nested_state_is_only_for_machines_with_nesting() {
    let shape = |nested| StateShape { listed: Vec::new(), msrs: OnceLock::new(), xsave: XSAVE_MIN, nested };
    assert!(state().check_nested(&shape(true)).is_ok());
    assert!(state().check_nested(&shape(false)).is_err());
    let plain = VcpuState { nested: None, ..state() };
    assert!(plain.check_nested(&shape(false)).is_ok());
}

#[test]
fn damage_is_named() {
    let bytes = state().to_bytes();
    let why = |bytes: &[u8]| match VcpuState::from_bytes(bytes) {
        Err(e) => e.to_string(),
        Ok(_) => panic!("accepted"),
    };
    assert!(why(b"").contains("cut short"));
    assert!(why(b"XXXXXXXX").contains("begin"));
    let mut other = bytes.clone();
    other[4] = 9;
    assert_eq!(why(&other), "The saved vCPU has format version 9; this program reads version 1");
    let mut twice = bytes.clone();
    twice.extend_from_slice(&bytes[8..]);
    assert!(why(&twice).contains("twice"));
    assert!(why(&bytes[..8]).contains("missing"));
    let many_xcrs = VcpuState { xcrs: kvm_xcrs { nr_xcrs: 17, ..Default::default() }, ..state() };
    assert!(why(&many_xcrs.to_bytes()).contains("17 XCRs"));
    let long = VcpuState { msrs: vec![msr::entry(1, 1); MAX_MSRS + 1], ..state() };
    assert!(why(&long.to_bytes()).contains("section 10"));
    let short = VcpuState { xsave: vec![0; 512], ..state() };
    assert!(why(&short.to_bytes()).contains("512"));
}

#[test]
fn an_expired_deadline_fires_again_only_when_the_timer_is_armed() {
    let with_timer = |lvt: u32, deadline: u64| {
        let mut lapic = kvm_lapic_state::default();
        for (reg, byte) in lapic.regs[0x320..0x324].iter_mut().zip(lvt.to_le_bytes()) {
            *reg = byte as _;
        }
        let mut msrs = vec![msr::entry(msr::IA32_TSC, 1000), msr::entry(msr::IA32_TSC_DEADLINE, deadline)];
        keep_expired_timer(&mut msrs, &lapic);
        msrs[1].data
    };
    assert_eq!(with_timer(2 << 17 | 0xec, 0), 1000);
    assert_eq!(with_timer(2 << 17 | 0xec, 5000), 5000);
    assert_eq!(with_timer(2 << 17 | 1 << 16, 0), 0, "masked");
    assert_eq!(with_timer(1 << 17 | 0xec, 0), 0, "periodic");
}
