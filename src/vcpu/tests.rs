//! vCPUs that run a few instructions of real mode. They need a `/dev/kvm`, but not a fast one.

use std::{
    sync::atomic::AtomicU32,
    time::{Duration, Instant},
};

use devices::bus::{Bus, Registers};
use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VmFd};

use super::*;
use crate::metrics::Milestones;

const PORT: u64 = 0x80;
const CODE: u64 = 0x1000;
const HANDLER: u64 = 0x2000;
const STACK: u64 = 0x8000;
const MEMORY: usize = 64 << 10;

/// Counts writes.
#[derive(Default)]
struct Bell(AtomicU32);

impl Registers for Bell {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, _offset: u64, _data: &[u8]) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl Bell {
    fn waits_for(&self, count: u32) {
        let limit = Instant::now() + Duration::from_secs(20);
        while self.0.load(Ordering::SeqCst) < count && Instant::now() < limit {
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(self.0.load(Ordering::SeqCst), count);
    }
}

/// A machine of `count` vCPUs, with KVM's interrupt controllers or without. The first runs
/// `code`; its handler of vector 2 rings the bell and returns. `None` where there is no KVM.
fn machine(
    count: u64,
    controllers: bool,
    code: &[u8],
) -> Option<(VmFd, Vcpus, Arc<Bell>, mpsc::Receiver<Ending>)> {
    let kvm = Kvm::new().ok()?;
    let vm = kvm.create_vm().unwrap();
    let memory: &'static mut [u8] = Box::leak(vec![0u8; MEMORY + 4096].into_boxed_slice());
    let skew = memory.as_ptr().align_offset(4096);
    let memory = &mut memory[skew..skew + MEMORY];
    memory[8..12].copy_from_slice(&(HANDLER as u32).to_le_bytes());
    memory[CODE as usize..][..code.len()].copy_from_slice(code);
    // out 0x80, al; iret
    memory[HANDLER as usize..][..3].copy_from_slice(&[0xe6, PORT as u8, 0xcf]);
    let region = kvm_userspace_memory_region {
        memory_size: MEMORY as u64,
        userspace_addr: memory.as_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the memory is never freed, and nobody else touches it from here on.
    unsafe { vm.set_user_memory_region(region) }.unwrap();
    if controllers {
        arch::irqchip::create(&vm).unwrap();
    }
    let fds: Vec<_> = (0..count).map(|index| vm.create_vcpu(index).unwrap()).collect();
    let mut sregs = fds[0].get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    fds[0].set_sregs(&sregs).unwrap();
    fds[0].set_regs(&kvm_regs { rip: CODE, rsp: STACK, rflags: 2, ..Default::default() }).unwrap();

    let (bell, ports) = (Arc::new(Bell::default()), Arc::new(Bus::new()));
    ports.insert(PORT, 1, bell.clone()).unwrap();
    let buses = Buses {
        mmio: Arc::new(Bus::new()),
        ports,
        milestones: Arc::new(Milestones::default()),
        loading: Arc::new(crate::vm::loading::Loading::done()),
    };
    let (sender, endings) = mpsc::channel();
    let reporter: Reporter = Arc::new(move |report| {
        if let Report::Ended(ending) = report {
            let _ = sender.send(ending);
        }
    });
    Some((vm, Vcpus::spawn(fds, &buses, &reporter).unwrap(), bell, endings))
}

#[test]
fn an_nmi_reaches_a_halted_guest_running_or_paused() {
    // hlt, again and again; interrupts are off.
    let Some((_vm, vcpus, bell, endings)) = machine(2, true, &[0xf4, 0xeb, 0xfd]) else { return };
    vcpus.run().unwrap();
    vcpus.nmi().unwrap();
    bell.waits_for(1);
    vcpus.pause().unwrap();
    vcpus.nmi().unwrap();
    thread::sleep(Duration::from_millis(20));
    bell.waits_for(1);
    vcpus.run().unwrap();
    bell.waits_for(2);
    // The machine goes on obeying.
    vcpus.pause().unwrap();
    assert!(endings.try_recv().is_err());
    vcpus.finish();
}

#[test]
fn a_guest_that_ended_takes_an_nmi_and_is_not_entered_again() {
    // hlt; out 0x80, al; again. Without interrupt controllers a halt ends the guest; entered
    // once more, it would ring the bell.
    let Some((_vm, vcpus, bell, endings)) = machine(1, false, &[0xf4, 0xe6, 0x80, 0xeb, 0xfb]) else {
        return;
    };
    vcpus.run().unwrap();
    assert_eq!(endings.recv_timeout(Duration::from_secs(20)).unwrap(), Ending::Halted);
    for _ in 0..3 {
        vcpus.nmi().unwrap();
    }
    vcpus.pause().unwrap();
    vcpus.run().unwrap();
    vcpus.nmi().unwrap();
    assert!(endings.recv_timeout(Duration::from_millis(50)).is_err());
    assert_eq!(bell.0.load(Ordering::SeqCst), 0);
    vcpus.finish();
}

#[test]
fn vcpus_that_come_later_run_with_the_others_and_stand_still_with_them() {
    // hlt, again and again; interrupts are off.
    let Some((vm, mut vcpus, _bell, _endings)) = machine(1, true, &[0xf4, 0xeb, 0xfd]) else { return };
    let late = |vcpus: &mut Vcpus| {
        let fd = vm.create_vcpu(vcpus.count() as u64).unwrap();
        let (mmio, ports) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let loading = Arc::new(crate::vm::loading::Loading::done());
        let buses = Buses { mmio, ports, milestones: Arc::new(Milestones::default()), loading };
        let reporter: Reporter = Arc::new(|_| ());
        assert!(vcpus.add(vec![fd], &buses, &reporter).is_ok());
    };
    let stands = |vcpus: &Vcpus, index| vcpus.on(index, |_| ()).is_ok();
    vcpus.run().unwrap();
    late(&mut vcpus);
    assert!(stands(&vcpus, 1) && !stands(&vcpus, 0));
    vcpus.run_added().unwrap();
    assert!(!stands(&vcpus, 1));
    // Those of a machine that is paused, or held by a debugger, wait with it.
    vcpus.pause().unwrap();
    late(&mut vcpus);
    vcpus.run_added().unwrap();
    assert!((0..3).all(|index| stands(&vcpus, index)));
    vcpus.hold().unwrap();
    vcpus.run().unwrap();
    late(&mut vcpus);
    vcpus.run_added().unwrap();
    assert!((0..4).all(|index| stands(&vcpus, index)));
    vcpus.release(1 << 2).unwrap();
    assert!(!stands(&vcpus, 3) && stands(&vcpus, 2));
    vcpus.nmi().unwrap();
    assert_eq!(vcpus.count(), 4);
    vcpus.finish();
}
